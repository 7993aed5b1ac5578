-- review: central-0013
-- makes: table yj_duplicate
CREATE TABLE yj_duplicate (node_id VARCHAR(64) NOT NULL, epoch_id VARCHAR(16) NOT NULL, seq_no BIGINT NOT NULL, record_id VARCHAR(64) NOT NULL, of_node VARCHAR(64) NOT NULL, of_epoch VARCHAR(16) NOT NULL, of_seq BIGINT NOT NULL, created_by VARCHAR(64) NOT NULL, created_at BIGINT NOT NULL, modified_by VARCHAR(64) NOT NULL, modified_at BIGINT NOT NULL, PRIMARY KEY (node_id, epoch_id, seq_no))

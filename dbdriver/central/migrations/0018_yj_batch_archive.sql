-- review: central-0018
-- makes: table yj_batch_archive
CREATE TABLE yj_batch_archive (node_id VARCHAR(64) NOT NULL, epoch_id VARCHAR(16) NOT NULL, first_seq BIGINT NOT NULL, last_seq BIGINT NOT NULL, batch_mac VARCHAR(64) NOT NULL, mac_key_id VARCHAR(64) NOT NULL, created_by VARCHAR(64) NOT NULL, created_at BIGINT NOT NULL, modified_by VARCHAR(64) NOT NULL, modified_at BIGINT NOT NULL, PRIMARY KEY (node_id, epoch_id, first_seq))

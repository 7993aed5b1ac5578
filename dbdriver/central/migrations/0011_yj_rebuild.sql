-- review: central-0011
-- makes: table yj_rebuild
CREATE TABLE yj_rebuild (node_id VARCHAR(64) NOT NULL, rebuilt_by VARCHAR(64) NOT NULL, phase_name VARCHAR(32) NOT NULL, created_by VARCHAR(64) NOT NULL, created_at BIGINT NOT NULL, modified_by VARCHAR(64) NOT NULL, modified_at BIGINT NOT NULL, PRIMARY KEY (node_id))

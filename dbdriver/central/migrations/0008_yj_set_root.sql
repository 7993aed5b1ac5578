-- review: central-0008
-- makes: table yj_set_root
CREATE TABLE yj_set_root (node_id VARCHAR(64) NOT NULL, set_name VARCHAR(64) NOT NULL, root_version BIGINT NOT NULL, entry_count BIGINT NOT NULL, set_sum VARCHAR(256) NOT NULL, root_mac VARCHAR(64) NOT NULL, mac_key_id VARCHAR(64) NOT NULL, created_by VARCHAR(64) NOT NULL, created_at BIGINT NOT NULL, modified_by VARCHAR(64) NOT NULL, modified_at BIGINT NOT NULL, PRIMARY KEY (node_id, set_name))

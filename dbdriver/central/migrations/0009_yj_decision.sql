-- review: central-0009
-- makes: table yj_decision
CREATE TABLE yj_decision (object_kind VARCHAR(32) NOT NULL, object_id VARCHAR(128) NOT NULL, version_no BIGINT NOT NULL, node_id VARCHAR(64) NOT NULL, epoch_id VARCHAR(16) NOT NULL, intent_id VARCHAR(64) NOT NULL, body_sm3 VARCHAR(64) NOT NULL, decided_at BIGINT NOT NULL, created_by VARCHAR(64) NOT NULL, created_at BIGINT NOT NULL, modified_by VARCHAR(64) NOT NULL, modified_at BIGINT NOT NULL, PRIMARY KEY (object_kind, object_id, version_no))

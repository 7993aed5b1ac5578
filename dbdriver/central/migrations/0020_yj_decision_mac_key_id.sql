-- review: central-0020
-- makes: column yj_decision.mac_key_id
ALTER TABLE yj_decision ADD mac_key_id VARCHAR(64)

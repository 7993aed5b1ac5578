-- review: central-0022
-- makes: column yj_duplicate.mac_key_id
ALTER TABLE yj_duplicate ADD mac_key_id VARCHAR(64)

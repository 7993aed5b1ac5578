-- review: central-0021
-- makes: column yj_duplicate.row_mac
ALTER TABLE yj_duplicate ADD row_mac VARCHAR(64)

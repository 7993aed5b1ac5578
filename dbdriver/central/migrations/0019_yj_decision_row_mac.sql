-- review: central-0019
-- makes: column yj_decision.row_mac
ALTER TABLE yj_decision ADD row_mac VARCHAR(64)

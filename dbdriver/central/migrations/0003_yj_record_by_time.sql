-- review: central-0003
-- makes: index yj_record_by_time
CREATE INDEX yj_record_by_time ON yj_record (signed_at_us)

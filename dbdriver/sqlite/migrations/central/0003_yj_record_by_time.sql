CREATE INDEX yj_record_by_time ON yj_record (signed_at_us)

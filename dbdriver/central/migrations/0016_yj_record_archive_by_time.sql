-- review: central-0016
-- makes: index yj_record_archive_by_time
CREATE INDEX yj_record_archive_by_time ON yj_record_archive (signed_at_us)

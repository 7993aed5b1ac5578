-- review: central-0015
-- makes: index yj_record_archive_by_id
CREATE INDEX yj_record_archive_by_id ON yj_record_archive (record_id)

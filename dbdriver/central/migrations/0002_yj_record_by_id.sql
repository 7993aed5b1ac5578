-- review: central-0002
-- makes: index yj_record_by_id
CREATE INDEX yj_record_by_id ON yj_record (record_id)

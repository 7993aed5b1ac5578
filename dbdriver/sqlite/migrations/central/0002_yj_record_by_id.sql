CREATE INDEX yj_record_by_id ON yj_record (record_id)

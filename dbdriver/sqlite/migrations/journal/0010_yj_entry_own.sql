ALTER TABLE yj_entry ADD COLUMN own_data BLOB

CREATE INDEX yj_entry_ref ON yj_entry (ref_hash) WHERE ref_hash IS NOT NULL

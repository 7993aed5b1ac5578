CREATE INDEX yj_entry_ref ON yj_entry (seq_no >> 14, ref_hash) WHERE ref_hash IS NOT NULL

DROP INDEX yj_entry_ref

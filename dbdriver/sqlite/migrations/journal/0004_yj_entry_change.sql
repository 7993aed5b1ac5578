CREATE INDEX yj_entry_change ON yj_entry (seq_no) WHERE change_flag = 1

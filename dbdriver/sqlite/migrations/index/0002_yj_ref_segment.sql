CREATE TABLE yj_ref_segment (segment_no INTEGER PRIMARY KEY, seal_sm3 BLOB NOT NULL) STRICT

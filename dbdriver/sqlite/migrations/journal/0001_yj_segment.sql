CREATE TABLE yj_segment (segment_no INTEGER PRIMARY KEY, format_no INTEGER NOT NULL, first_seq INTEGER NOT NULL, seal_data BLOB) STRICT

CREATE TABLE yj_checkpoint (tree_size INTEGER PRIMARY KEY, note_text BLOB NOT NULL, note_sig BLOB NOT NULL) STRICT

CREATE TABLE yj_node (level_no INTEGER NOT NULL, index_no INTEGER NOT NULL, node_hash BLOB NOT NULL, PRIMARY KEY (level_no, index_no)) STRICT, WITHOUT ROWID

CREATE TABLE yj_checkpoint_token (tree_size INTEGER PRIMARY KEY, token_der BLOB NOT NULL) STRICT

package sqlite

// Every statement of the package is here. Columns are listed by name. They are SQLite's own; those of the central
// database are in dbdriver/central.

// Segments.
const (
	insertSegment = `INSERT INTO yj_segment (segment_no, format_no, first_seq) VALUES (?, ?, ?)`
	selectSegment = `SELECT segment_no, format_no, first_seq, seal_data FROM yj_segment`
	countSegments = `SELECT COUNT(*) FROM yj_segment`
	updateSeal    = `UPDATE yj_segment SET seal_data = ? WHERE segment_no = ?`

	updateFormat = `UPDATE yj_segment SET format_no = ? WHERE segment_no = ?`

	insertEntry = `INSERT INTO yj_entry (` + entryColumns + `) VALUES (?, ?, ?, ?, ?, ?, ?, ?)`

	entryColumns     = `seq_no, kind_name, ref_hash, change_flag, leaf_hash, chain_hash, entry_der, own_data`
	selectEntry      = `SELECT ` + entryColumns + ` FROM yj_entry WHERE seq_no = ?`
	selectEntries    = `SELECT ` + entryColumns + ` FROM yj_entry WHERE seq_no >= ? ORDER BY seq_no LIMIT ?`
	selectLastEntry  = `SELECT ` + entryColumns + ` FROM yj_entry ORDER BY seq_no DESC LIMIT 1`
	selectChanges    = `SELECT ` + entryColumns + ` FROM yj_entry WHERE change_flag = 1 AND seq_no >= ? ORDER BY seq_no LIMIT ?`
	selectLastChange = `SELECT ` + entryColumns + ` FROM yj_entry WHERE change_flag = 1 ORDER BY seq_no DESC LIMIT 1`
	// By reference: formats 1 and 2, then format 3, whose index is asked run by run.
	selectByRef       = `SELECT seq_no FROM yj_entry WHERE ref_hash = ? ORDER BY seq_no LIMIT ?`
	selectByRefInRuns = `WITH RECURSIVE yj_run (run_no) AS (SELECT (` + selectFirstRun + `) UNION ALL SELECT (` + selectNextRun + `run_no` + orderRuns + `) FROM yj_run WHERE run_no IS NOT NULL) SELECT seq_no FROM yj_run CROSS JOIN yj_entry ON seq_no >> 14 = run_no AND ref_hash = ? ORDER BY seq_no LIMIT ?`
	selectFirstRun    = `SELECT seq_no >> 14 FROM yj_entry WHERE ref_hash IS NOT NULL` + orderRuns
	selectNextRun     = `SELECT seq_no >> 14 FROM yj_entry WHERE ref_hash IS NOT NULL AND seq_no >> 14 > `
	orderRuns         = ` ORDER BY seq_no >> 14 LIMIT 1`
	// The references of a run, 32 bytes each, and as many numbers. In one row, for a row costs more than what is in it.
	selectRunRefs = `SELECT CAST(group_concat(ref_hash, '') AS BLOB), group_concat(seq_no) FROM yj_entry WHERE ref_hash IS NOT NULL AND length(ref_hash) = 32 AND seq_no >> 14 = ?`
	// The row itself: its page is read anyway, the page of the segment's index would be one more.
	selectRefAt  = `SELECT seq_no FROM yj_entry WHERE seq_no = ? AND +ref_hash = ?`
	selectRefs   = `SELECT ref_hash, seq_no FROM yj_entry WHERE ref_hash IS NOT NULL AND (ref_hash, seq_no) > (?, ?) ORDER BY ref_hash, seq_no LIMIT ?`
	countEntries = `SELECT COUNT(*) FROM yj_entry`

	insertNode = `INSERT INTO yj_node (node_no, node_hash) VALUES (?, ?)`
	// Several by their keys: the keys come first, and each is looked up.
	selectNodes  = `WITH yj_wanted (want_no) AS (VALUES (?)) SELECT node_no, node_hash FROM yj_wanted CROSS JOIN yj_node ON node_no = want_no`
	selectLeaves = `WITH yj_wanted (want_no) AS (VALUES (?)) SELECT seq_no, leaf_hash FROM yj_wanted CROSS JOIN yj_entry ON seq_no = want_no`
	// Leaf hashes in one row, with what says that none is missing.
	selectLeafRange = `SELECT COUNT(*), COALESCE(MIN(seq_no), 0), COALESCE(MAX(seq_no), 0), CAST(group_concat(leaf_hash, '') AS BLOB) FROM (SELECT seq_no, leaf_hash FROM yj_entry WHERE seq_no >= ? AND seq_no < ? ORDER BY seq_no LIMIT ?)`
	selectNodeRange = `SELECT node_no, node_hash FROM yj_node WHERE node_no >= ? AND node_no < ?`
	countNodes      = `SELECT COUNT(*) FROM yj_node`
	// Of formats 1 and 2.
	insertLevelNode      = `INSERT INTO yj_node (level_no, index_no, node_hash) VALUES (?, ?, ?)`
	selectLevelNodes     = `WITH yj_wanted (want_level, want_index) AS (VALUES (?, ?)) SELECT level_no, index_no, node_hash FROM yj_wanted CROSS JOIN yj_node ON level_no = want_level AND index_no = want_index`
	selectLevelNodeRange = `SELECT index_no, node_hash FROM yj_node WHERE level_no = ? AND index_no >= ? AND index_no < ?`

	insertBlob = `INSERT OR IGNORE INTO yj_blob (blob_sm3, blob_data) VALUES (?, ?)`
	selectSums = `SELECT row_no, blob_sm3 FROM yj_blob WHERE row_no > ? ORDER BY row_no LIMIT ?`
	selectBlob = `SELECT blob_data FROM yj_blob WHERE blob_sm3 = ?`

	// One row, in the active segment.
	replaceHeadSeal = `INSERT OR REPLACE INTO yj_head_seal (seal_no, head_size, head_mac) VALUES (1, ?, ?)`
	selectHeadSeal  = `SELECT head_size, head_mac FROM yj_head_seal WHERE seal_no = 1`
	deleteHeadSeal  = `DELETE FROM yj_head_seal`

	insertCheckpoint = `INSERT INTO yj_checkpoint (tree_size, note_text, note_sig) VALUES (?, ?, ?)`
	// A token may arrive when its checkpoint's segment is sealed; it is then kept in the active one.
	insertToken          = `INSERT OR IGNORE INTO yj_checkpoint_token (tree_size, token_der) VALUES (?, ?)`
	selectToken          = `SELECT token_der FROM yj_checkpoint_token WHERE tree_size = ?`
	selectTokens         = `SELECT tree_size FROM yj_checkpoint_token WHERE tree_size > ? ORDER BY tree_size LIMIT ?`
	selectCheckpoints    = `SELECT tree_size, note_text, note_sig FROM yj_checkpoint WHERE tree_size >= ? ORDER BY tree_size LIMIT ?`
	selectLastCheckpoint = `SELECT tree_size, note_text, note_sig FROM yj_checkpoint ORDER BY tree_size DESC LIMIT 1`
)

// The index of references.
const (
	insertRef        = `INSERT OR IGNORE INTO yj_ref (ref_no, seq_no) VALUES (?, ?)`
	selectRef        = `SELECT seq_no FROM yj_ref WHERE ref_no = ? ORDER BY seq_no`
	insertRefSegment = `INSERT INTO yj_ref_segment (segment_no, seal_sm3) VALUES (?, ?)`
	selectRefSegment = `SELECT segment_no, seal_sm3 FROM yj_ref_segment`
)

// Migrations.
const (
	createMigrations = `CREATE TABLE yj_migration (migration_no BIGINT NOT NULL, file_name VARCHAR(128) NOT NULL, file_sm3 VARCHAR(64) NOT NULL, PRIMARY KEY (migration_no))`
	tableExists      = `SELECT COUNT(*) FROM sqlite_master WHERE type = 'table' AND name = ?`
	migrationTable   = `yj_migration`
	selectMigrations = `SELECT migration_no, file_name, file_sm3 FROM yj_migration ORDER BY migration_no`
	insertMigration  = `INSERT INTO yj_migration (migration_no, file_name, file_sm3) VALUES (?, ?, ?)`
)

// The schema of a file. In schemaText each value is quoted, so that no two schemas have the same text.
const (
	selectObjects = `SELECT type, name, tbl_name, COALESCE(sql, '') FROM main.sqlite_master ORDER BY name`
	schemaText    = `SELECT group_concat(quote(type) || quote(name) || quote(tbl_name) || quote(sql)) FROM (SELECT type, name, tbl_name, sql FROM main.sqlite_master ORDER BY name, type)`
)

// Beside the central database's registry.
const (
	indexExists    = `SELECT COUNT(*) FROM sqlite_master WHERE type = 'index' AND name = ?`
	dropMigrations = `DROP TABLE yj_migration`
	selectColumns  = `SELECT m.name, NULL, p.name, p.type, 1 - p."notnull", NULL FROM sqlite_master m JOIN pragma_table_info(m.name) p WHERE m.type = 'table' AND m.name LIKE 'yj$_%' ESCAPE '$' ORDER BY m.name, p.cid`
	selectVersion  = `SELECT sqlite_version()`
)

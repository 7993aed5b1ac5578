package central

// Every statement that the central database is asked lies in the registry: one text for DM8, PostgreSQL's wire and
// SQLite. The subset (lint_test.go holds each text against it): names with an underscore and never quoted, bound
// values as question marks, columns listed by name, no upsert, no empty text, times as BIGINT microseconds UTC,
// hashes as lower-case hexadecimal. The migrations keep to it too, with {{bytes}} for a column of bytes.

// A Statement is a text of the registry under its name.
type Statement struct{ Name, Text string }

var registry []Statement

// register is called for package variables only, so that the registry is whole before anything runs.
func register(name, text string) Statement {
	s := Statement{name, text}
	registry = append(registry, s)
	return s
}

// Registry lists all statements, in the order of the source.
func Registry() []Statement { return append([]Statement(nil), registry...) }

// What was signed.
const recordColumns = `node_id, epoch_id, seq_no, leaf_hash, record_id, kind_name, application_id, signer_id, department_name, document_type, campus_name, signed_at_us, bound_us, status_code, created_by, created_at, modified_by, modified_at`

var (
	insertRecord  = register("record.insert", `INSERT INTO yj_record (`+recordColumns+`) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`)
	selectRecords = registerBoth("record.page", `SELECT `+recordColumns+` FROM yj_record WHERE node_id = ? AND epoch_id = ? AND seq_no >= ? ORDER BY seq_no LIMIT ?`)
	selectLeaf    = registerBoth("record.leaf", `SELECT leaf_hash FROM yj_record WHERE node_id = ? AND epoch_id = ? AND seq_no = ?`)
	selectLeaves  = register("record.leaves", andArchive(`SELECT seq_no, leaf_hash FROM yj_record WHERE node_id = ? AND epoch_id = ? AND seq_no >= ? AND seq_no <= ?`))
	selectLastSeq = registerBoth("record.last", `SELECT MAX(seq_no) FROM yj_record WHERE node_id = ? AND epoch_id = ?`)
	recordNodes   = registerBoth("record.nodes", `SELECT DISTINCT node_id FROM yj_record`)
	recordEpochs  = registerBoth("record.epochs", `SELECT DISTINCT epoch_id FROM yj_record WHERE node_id = ?`)
)

// What was shipped together.
const batchColumns = `node_id, epoch_id, first_seq, last_seq, batch_mac, mac_key_id, created_by, created_at, modified_by, modified_at`

var (
	insertBatch   = register("batch.insert", `INSERT INTO yj_batch (`+batchColumns+`) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`)
	selectBatches = registerBoth("batch.page", `SELECT `+batchColumns+` FROM yj_batch WHERE node_id = ? AND epoch_id = ? AND first_seq >= ? ORDER BY first_seq LIMIT ?`)
	selectBatch   = register("batch.get", andArchive(`SELECT last_seq, batch_mac, mac_key_id FROM yj_batch WHERE node_id = ? AND epoch_id = ? AND first_seq = ?`))
	batchNodes    = registerBoth("batch.nodes", `SELECT DISTINCT node_id FROM yj_batch`)
	batchEpochs   = registerBoth("batch.epochs", `SELECT DISTINCT epoch_id FROM yj_batch WHERE node_id = ?`)
)

// The migrations that were applied. This table is made before the first of them.
const historyTable = "yj_schema_change"

var (
	createHistory = register("history.create", `CREATE TABLE yj_schema_change (change_no BIGINT NOT NULL, file_name VARCHAR(128) NOT NULL, statement_sm3 VARCHAR(64) NOT NULL, review_id VARCHAR(64) NOT NULL, created_by VARCHAR(64) NOT NULL, created_at BIGINT NOT NULL, modified_by VARCHAR(64) NOT NULL, modified_at BIGINT NOT NULL, PRIMARY KEY (change_no))`)
	insertHistory = register("history.insert", `INSERT INTO yj_schema_change (change_no, file_name, statement_sm3, review_id, created_by, created_at, modified_by, modified_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?)`)
	selectHistory = register("history.list", `SELECT change_no, file_name, statement_sm3, review_id FROM yj_schema_change ORDER BY change_no`)
)

// What an acceptance check (dbdriver/check) does, in tables of its own that it drops.
const (
	ProbeTable = "yj_probe"
	ProbeIndex = "yj_probe_by_text"
	// ProbeSecondIndex is made within a transaction.
	ProbeSecondIndex = "yj_probe_by_time"
)

// The check's statements.
var (
	ProbeCreate = register("probe.create", `CREATE TABLE yj_probe (probe_no BIGINT NOT NULL, probe_text VARCHAR(256), probe_data {{bytes}}, created_by VARCHAR(64) NOT NULL, created_at BIGINT NOT NULL, modified_by VARCHAR(64) NOT NULL, modified_at BIGINT NOT NULL, PRIMARY KEY (probe_no))`)
	ProbeUnique = register("probe.unique", `CREATE UNIQUE INDEX yj_probe_by_text ON yj_probe (probe_text)`)
	ProbeSecond = register("probe.second", `CREATE INDEX yj_probe_by_time ON yj_probe (created_at)`)
	ProbeDrop   = register("probe.drop", `DROP TABLE yj_probe`)
	ProbeInsert = register("probe.insert", `INSERT INTO yj_probe (probe_no, probe_text, probe_data, created_by, created_at, modified_by, modified_at) VALUES (?, ?, ?, ?, ?, ?, ?)`)
	ProbeText   = register("probe.text", `SELECT probe_text FROM yj_probe WHERE probe_no = ?`)
	ProbeData   = register("probe.data", `SELECT probe_data FROM yj_probe WHERE probe_no = ?`)
	ProbeTimes  = register("probe.times", `SELECT created_at, modified_at FROM yj_probe WHERE probe_no = ?`)
	ProbeFind   = register("probe.find", `SELECT COUNT(*) FROM yj_probe WHERE probe_text = ?`)
	ProbeCount  = register("probe.count", `SELECT COUNT(*) FROM yj_probe WHERE probe_no >= ? AND probe_no <= ?`)
	ProbePage   = register("probe.page", `SELECT probe_no FROM yj_probe WHERE probe_no >= ? AND probe_no <= ? ORDER BY probe_no LIMIT ?`)
	ProbeChange = register("probe.change", `UPDATE yj_probe SET modified_by = ?, modified_at = ? WHERE probe_no = ? AND modified_at = ?`)
	DropRecords = register("record.drop", `DROP TABLE yj_record`)
	DropBatches = register("batch.drop", `DROP TABLE yj_batch`)
	DropHistory = register("history.drop", `DROP TABLE yj_schema_change`)
)

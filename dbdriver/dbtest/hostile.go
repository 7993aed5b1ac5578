package dbtest

import (
	"cmp"
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"unicode/utf8"
)

// An Op is what a driver is about to be asked.
type Op struct {
	Kind string // "connect", "begin", "prepare", "exec", "query", "commit"
	Text string // of a statement
	// N counts the operations that change something (exec, commit) from 1 on, over all connections.
	N int64
}

// A Fault is what becomes of it. The zero value lets it pass.
type Fault struct {
	Before error // it is not done, this is the answer
	After  error // it is done, this is the answer
	Hang   bool  // nothing is answered until the context ends
}

// A Driver stands between database/sql and a real driver. With its flags it behaves as DM8's driver and server were
// read to, over SQLite; without them it only injects faults. What it cannot tell is whether DM8 behaves so.
type Driver struct {
	UpperCase   bool // column names come back in upper case
	LOBs        bool // BLOB and TEXT come as objects, not as bytes
	DDLCommits  bool // CREATE, ALTER and DROP commit what was done before them, and themselves
	EmptyIsNull bool // '' is NULL, in and out (COMPATIBLE_MODE = 2)
	BlankPadded bool // 'a' = 'a ' (BLANK_PAD_MODE = 0), in unique keys too
	DMErrors    bool // errors are *DMError, and the words of DM's dictionary are known

	Charset string // SF_GET_UNICODE_FLAG's answer; "": 1
	// Role is V$INSTANCE's MODE$; in STANDBY all writes are refused. nil: PRIMARY.
	Role atomic.Pointer[string]
	// Fault is asked before everything; nil: no faults. It may be called by several goroutines.
	Fault func(Op) Fault

	changes atomic.Int64
}

// Hostile has all flags set.
func Hostile() *Driver {
	return &Driver{UpperCase: true, LOBs: true, DDLCommits: true, EmptyIsNull: true, BlankPadded: true, DMErrors: true}
}

// A DMError has the shape of the driver's (facts of its source: fields ErrCode and ErrText; the text is localised).
type DMError struct {
	ErrCode int32
	ErrText string
}

func (e *DMError) Error() string { return fmt.Sprintf("Error %d: %s", e.ErrCode, e.ErrText) }

// DMCode is what the main of a build with the driver hands to dbdriver/dm.
func DMCode(err error) (int32, bool) {
	var e *DMError
	if !errors.As(err, &e) {
		return 0, false
	}
	return e.ErrCode, true
}

// Errors of DM8 that a Fault may answer.
var (
	Deadlock = &DMError{-6403, "死锁"} // of which DM8 rolls back the one statement
	Standby  = &DMError{-2018, "备库禁止修改"}
)

// Over opens a pool whose connections come from inner.
func (d *Driver) Over(inner driver.Connector) *sql.DB { return sql.OpenDB(connector{d, inner}) }

// OverSQLite opens a pool over a SQLite file.
func (d *Driver) OverSQLite(file string) *sql.DB {
	db, err := sql.Open("sqlite3-yinjian", "")
	if err != nil {
		panic(err) // dbdriver/sqlite registers it
	}
	defer db.Close()
	return d.Over(byDSN{db.Driver(), "file:" + file + "?_busy_timeout=2000&_txlock=immediate&_journal_mode=WAL&_synchronous=OFF", d.DMErrors})
}

// byDSN is a connector for drivers that have none.
type byDSN struct {
	driver   driver.Driver
	dsn      string
	comments bool // there is a table for them, which SQLite has no words for
}

func (f byDSN) Connect(ctx context.Context) (driver.Conn, error) {
	c, err := f.driver.Open(f.dsn)
	if err == nil && f.comments {
		_, err = c.(driver.ExecerContext).ExecContext(ctx, `CREATE TABLE IF NOT EXISTS dm_comment (what_name VARCHAR(128) PRIMARY KEY, comment_words VARCHAR(2000))`, nil)
	}
	return c, err
}
func (f byDSN) Driver() driver.Driver { return f.driver }

type connector struct {
	d     *Driver
	inner driver.Connector
}

func (c connector) Driver() driver.Driver { return c.inner.Driver() }

func (c connector) Connect(ctx context.Context) (driver.Conn, error) {
	var inner driver.Conn
	err := c.d.do(ctx, Op{Kind: "connect"}, func() (err error) {
		inner, err = c.inner.Connect(ctx)
		return err
	})
	if err != nil {
		return nil, err
	}
	return &conn{d: c.d, inner: inner}, nil
}

// do asks for a fault and does what it leaves.
func (d *Driver) do(ctx context.Context, op Op, f func() error) error {
	if op.Kind == "exec" && !strings.HasPrefix(op.Text, "COMMENT ") || op.Kind == "commit" {
		op.N = d.changes.Add(1)
	}
	var fault Fault
	if d.Fault != nil {
		fault = d.Fault(op)
	}
	if fault.Hang {
		<-ctx.Done()
		return ctx.Err()
	}
	if fault.Before != nil {
		return fault.Before
	}
	if err := f(); err != nil {
		return d.translate(err)
	}
	return fault.After
}

// translate makes DM8's errors of SQLite's.
func (d *Driver) translate(err error) error {
	if !d.DMErrors {
		return err
	}
	for _, t := range []struct {
		words string
		code  int32
	}{
		{"UNIQUE constraint failed", -6602}, {"no such table", -2106}, {"no such column", -2111}, {"syntax error", -2007},
	} {
		if strings.Contains(err.Error(), t.words) {
			return &DMError{t.code, err.Error()}
		}
	}
	if strings.Contains(err.Error(), "already exists") {
		code := int32(-2124)
		if strings.HasPrefix(err.Error(), "index") {
			code = -2140
		}
		return &DMError{code, err.Error()}
	}
	return err
}

var (
	reDDL     = regexp.MustCompile(`^(CREATE|ALTER|DROP)\b`)
	reWrite   = regexp.MustCompile(`^(INSERT|UPDATE|DELETE|CREATE|ALTER|DROP)\b`)
	reComment = regexp.MustCompile(`^COMMENT ON (?:TABLE|COLUMN) (\S+) IS ('.*')$`)
	reVarchar = regexp.MustCompile(`VARCHAR\(\d+\)`)
)

// dictionary is what of DM8 dbdriver/dm asks for, for SQLite.
var dictionary = strings.NewReplacer(
	"USER_TABLES", "(SELECT UPPER(name) AS TABLE_NAME FROM sqlite_master WHERE type = 'table')",
	"USER_INDEXES", "(SELECT UPPER(name) AS INDEX_NAME FROM sqlite_master WHERE type = 'index')",
	"USER_TAB_COLUMNS", `(SELECT UPPER(m.name) AS TABLE_NAME, UPPER(p.name) AS COLUMN_NAME, CASE WHEN p.type LIKE 'VARCHAR%' THEN 'VARCHAR' ELSE p.type END AS DATA_TYPE, CAST(SUBSTR(p.type, 9) AS INTEGER) AS DATA_LENGTH, CASE WHEN p."notnull" THEN 'N' ELSE 'Y' END AS NULLABLE, p.cid AS COLUMN_ID FROM sqlite_master m JOIN pragma_table_info(m.name) p WHERE m.type = 'table')`,
	"USER_TAB_COMMENTS", "(SELECT UPPER(what_name) AS TABLE_NAME, comment_words AS COMMENTS FROM dm_comment)",
	"USER_COL_COMMENTS", "(SELECT UPPER(SUBSTR(what_name, 1, INSTR(what_name, '.') - 1)) AS TABLE_NAME, UPPER(SUBSTR(what_name, INSTR(what_name, '.') + 1)) AS COLUMN_NAME, comment_words AS COMMENTS FROM dm_comment)",
	"SF_GET_CASE_SENSITIVE_FLAG()", "1", "SF_GET_PAGE_SIZE()", "8192",
	"V$DM_INI", "(SELECT 'COMPATIBLE_MODE' AS PARA_NAME, '2' AS PARA_VALUE UNION ALL SELECT 'BLANK_PAD_MODE', '0' UNION ALL SELECT 'LENGTH_IN_CHAR', '0')",
)

func (d *Driver) role() string {
	if r := d.Role.Load(); r != nil {
		return *r
	}
	return "PRIMARY"
}

// sqlite is a statement of DM8 for SQLite.
func (d *Driver) sqlite(q string) string {
	if d.DMErrors {
		q = reComment.ReplaceAllString(dictionary.Replace(q), "INSERT OR REPLACE INTO dm_comment (what_name, comment_words) VALUES ('$1', $2)")
		q = strings.ReplaceAll(q, "SF_GET_UNICODE_FLAG()", cmp.Or(d.Charset, "1"))
		q = strings.ReplaceAll(q, "V$INSTANCE", "(SELECT 'stand-in over SQLite' AS SVR_VERSION, '"+d.role()+"' AS MODE$)")
	}
	if d.BlankPadded && reDDL.MatchString(q) {
		q = reVarchar.ReplaceAllString(q, "$0 COLLATE RTRIM")
	}
	return q
}

func (d *Driver) args(in []driver.NamedValue) []driver.NamedValue {
	if !d.EmptyIsNull {
		return in
	}
	out := append([]driver.NamedValue(nil), in...)
	for i := range out {
		if out[i].Value == "" {
			out[i].Value = nil
		}
	}
	return out
}

// A conn is used by one goroutine at a time.
type conn struct {
	d     *Driver
	inner driver.Conn
	tx    driver.Tx
	ctx   context.Context // of the transaction
	bad   bool
}

func (c *conn) Prepare(q string) (driver.Stmt, error) {
	return c.PrepareContext(context.Background(), q)
}
func (c *conn) Close() error              { return c.inner.Close() }
func (c *conn) Begin() (driver.Tx, error) { return c.BeginTx(context.Background(), driver.TxOptions{}) }

// IsValid implements driver.Validator: after a lost connection there is no other use of it.
func (c *conn) IsValid() bool { return !c.bad }

func (c *conn) do(ctx context.Context, op Op, f func() error) error {
	err := c.d.do(ctx, op, f)
	if errors.Is(err, driver.ErrBadConn) || ctx.Err() != nil {
		c.bad = true
	}
	return err
}

func (c *conn) PrepareContext(ctx context.Context, q string) (s driver.Stmt, err error) {
	err = c.do(ctx, Op{Kind: "prepare", Text: q}, func() error {
		s, err = c.inner.(driver.ConnPrepareContext).PrepareContext(ctx, c.d.sqlite(q))
		return err
	})
	return s, err
}

func (c *conn) BeginTx(ctx context.Context, opts driver.TxOptions) (driver.Tx, error) {
	err := c.do(ctx, Op{Kind: "begin"}, func() (err error) {
		c.tx, err = c.inner.(driver.ConnBeginTx).BeginTx(ctx, opts)
		return err
	})
	if err != nil {
		return nil, err
	}
	c.ctx = ctx
	return c, nil
}

func (c *conn) Commit() error {
	tx := c.tx
	c.tx = nil
	committed := false
	err := c.do(c.ctx, Op{Kind: "commit"}, func() error {
		committed = true
		return tx.Commit()
	})
	if !committed {
		tx.Rollback() // as the server does when the connection goes
	}
	return err
}

func (c *conn) Rollback() error {
	tx := c.tx
	c.tx = nil
	return tx.Rollback()
}

func (c *conn) ExecContext(ctx context.Context, q string, args []driver.NamedValue) (res driver.Result, err error) {
	err = c.do(ctx, Op{Kind: "exec", Text: q}, func() error {
		if c.d.role() == "STANDBY" && reWrite.MatchString(q) {
			return Standby
		}
		if c.d.DDLCommits && c.tx != nil && reDDL.MatchString(q) {
			if err := c.tx.Commit(); err != nil {
				return err
			}
			defer func() { c.tx, _ = c.inner.(driver.ConnBeginTx).BeginTx(ctx, driver.TxOptions{}) }()
		}
		res, err = c.inner.(driver.ExecerContext).ExecContext(ctx, c.d.sqlite(q), c.d.args(args))
		return err
	})
	return res, err
}

func (c *conn) QueryContext(ctx context.Context, q string, args []driver.NamedValue) (driver.Rows, error) {
	var inner driver.Rows
	err := c.do(ctx, Op{Kind: "query", Text: q}, func() (err error) {
		inner, err = c.inner.(driver.QueryerContext).QueryContext(ctx, c.d.sqlite(q), c.d.args(args))
		return err
	})
	if err != nil {
		return nil, err
	}
	return &rows{Rows: inner, d: c.d}, nil
}

type rows struct {
	driver.Rows
	d *Driver
}

func (r *rows) Columns() []string {
	names := append([]string(nil), r.Rows.Columns()...)
	for i := range names {
		if r.d.UpperCase {
			names[i] = strings.ToUpper(names[i])
		}
	}
	return names
}

func (r *rows) Next(dest []driver.Value) error {
	if err := r.Rows.Next(dest); err != nil {
		return err
	}
	typed, _ := r.Rows.(driver.RowsColumnTypeDatabaseTypeName)
	for i, v := range dest {
		declared := ""
		if typed != nil {
			declared = strings.ToUpper(typed.ColumnTypeDatabaseTypeName(i))
		}
		switch v := v.(type) {
		case string:
			if v == "" && r.d.EmptyIsNull {
				dest[i] = nil
			} else if r.d.LOBs && (declared == "TEXT" || declared == "CLOB") {
				dest[i] = NewClob(v)
			}
		case []byte:
			if r.d.LOBs && declared == "BLOB" {
				dest[i] = NewBlob(append([]byte(nil), v...))
			}
		}
	}
	return nil
}

// A Blob has the methods of the driver's: it is a reader.
type Blob struct {
	mu   sync.Mutex
	data []byte
	at   int
}

// NewBlob makes one.
func NewBlob(b []byte) *Blob { return &Blob{data: b} }

// Read implements io.Reader, in small pieces.
func (b *Blob) Read(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.at == len(b.data) {
		return 0, io.EOF
	}
	n := copy(p[:min(len(p), 1000)], b.data[b.at:])
	b.at += n
	return n, nil
}

// A Clob has the methods of the driver's: a length in characters, and reading from 1 on.
type Clob struct{ text []rune }

// NewClob makes one.
func NewClob(s string) *Clob { return &Clob{text: []rune(s)} }

// GetLength answers the characters.
func (c *Clob) GetLength() (int64, error) { return int64(len(c.text)), nil }

// ReadString reads n characters from position pos, which begins at 1, and no more than a thousand at once.
func (c *Clob) ReadString(pos, n int) (string, error) {
	if pos < 1 || pos > len(c.text)+1 {
		return "", &DMError{6057, "position " + fmt.Sprint(pos)}
	}
	s := string(c.text[pos-1 : min(len(c.text), pos-1+n, pos-1+1000)])
	if !utf8.ValidString(s) {
		return "", errors.New("half a character")
	}
	return s, nil
}

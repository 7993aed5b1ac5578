package sqlite

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"

	sqlite3 "github.com/mattn/go-sqlite3"
	"golang.org/x/sys/unix"

	"yinjian/appliance/audit"
	"yinjian/dbdriver"
)

// A writer is the active segment's one writing connection with its statements, all compiled once. It goes past
// database/sql, whose pool and conversions cost as much as a short transaction: Journal.writing says who uses it.
type writer struct {
	conn *sqlite3.SQLiteConn
	file string
	made *schema // of the segment's format
	// args and values are of the statement that runs, kept for their memory.
	args   []driver.NamedValue
	values []driver.Value
	// checked is SQLite's data_version when the schema was last compared; 0: it was not.
	checked int64
	// opened are the file and its log, as they were when they were written first; nil: they were not.
	opened []inode
	// sealBytes is how many bytes the stored head seal's size takes; 0: not known.
	sealBytes int

	statements                               []*sqlite3.SQLiteStmt // all of them
	begin, commit, rollback, version, schema *sqlite3.SQLiteStmt
	entry, node, blob                        [len(rowsPerStatement)]*sqlite3.SQLiteStmt
	note, token, stored, stamped, head, seal *sqlite3.SQLiteStmt
	wipe, keep                               *sqlite3.SQLiteStmt
}

// openWriter opens a segment of that format for writing.
func openWriter(file string, format int) (*writer, error) {
	made, err := journalSchemas[format]()
	if err != nil {
		return nil, err
	}
	c, err := (&sqlite3.SQLiteDriver{ConnectHook: distrust}).Open(dataSource(file, false, "FULL"))
	if err != nil {
		return nil, classify(err)
	}
	w := &writer{conn: c.(*sqlite3.SQLiteConn), file: file, made: made}
	if err := w.prepare(format); err != nil {
		return nil, errors.Join(classify(err), w.close())
	}
	return w, nil
}

func (w *writer) prepare(format int) error {
	var mode string
	row, err := w.statement(`PRAGMA journal_mode = WAL`)
	if err == nil {
		err = w.queryRow(row, &mode)
	}
	if err != nil {
		return err
	}
	if mode != "wal" {
		return fmt.Errorf("journal mode is %q, want wal: the file system does not allow it", mode)
	}
	// References are random, so that each new row changes a page of their index: in format 3 one of the 250 of a run, which a
	// small cache holds beside the rows that go by. Before, it is one of a million entries' index, and digests have one too:
	// those fit in 64 MiB. The log is copied into the file every 4 MiB: from 32 MiB the copying takes eight times as long, and who
	// commits then, and all that wait with him, wait for it.
	cache := `PRAGMA cache_size = -8192`
	if format < 3 {
		cache = `PRAGMA cache_size = -65536`
	}
	for _, pragma := range []string{cache, `PRAGMA wal_autocheckpoint = 1024`} {
		if _, err := w.conn.Exec(pragma, nil); err != nil {
			return err
		}
	}
	for stmt, text := range map[**sqlite3.SQLiteStmt]string{
		&w.begin: `BEGIN IMMEDIATE`, &w.commit: `COMMIT`, &w.rollback: `ROLLBACK`, &w.version: `PRAGMA data_version`, &w.schema: schemaText,
		&w.note: insertCheckpoint, &w.token: insertToken, &w.head: replaceHeadSeal, &w.seal: updateSeal,
		&w.stored: selectBlob, &w.stamped: selectToken, &w.wipe: `PRAGMA secure_delete = ON`, &w.keep: `PRAGMA secure_delete = OFF`,
	} {
		if *stmt, err = w.statement(text); err != nil {
			return err
		}
	}
	node := insertNode
	if format < 3 {
		node = insertLevelNode
	}
	for stmts, text := range map[*[len(rowsPerStatement)]*sqlite3.SQLiteStmt]string{&w.entry: insertEntry, &w.node: node, &w.blob: insertBlob} {
		for i, n := range rowsPerStatement {
			if stmts[i], err = w.statement(severalRows(text, n)); err != nil {
				return err
			}
		}
	}
	return nil
}

func (w *writer) statement(text string) (*sqlite3.SQLiteStmt, error) {
	s, err := w.conn.Prepare(text)
	if err != nil {
		return nil, err
	}
	w.statements = append(w.statements, s.(*sqlite3.SQLiteStmt))
	return s.(*sqlite3.SQLiteStmt), nil
}

// exec runs a statement and answers how many rows it wrote.
func (w *writer) exec(s *sqlite3.SQLiteStmt, values ...driver.Value) (int64, error) {
	w.args = w.args[:0]
	for i, v := range values {
		w.args = append(w.args, driver.NamedValue{Ordinal: i + 1, Value: v})
	}
	res, err := s.ExecContext(context.Background(), w.args)
	if err != nil {
		return 0, err
	}
	return res.RowsAffected()
}

// writeOne runs a statement that has to write one row.
func (w *writer) writeOne(s *sqlite3.SQLiteStmt, values ...driver.Value) error {
	n, err := w.exec(s, values...)
	if err == nil && n != 1 {
		err = notOne(n)
	}
	return err
}

// queryRow reads the first column of the first row into one of *int64, *string and *[]byte; without a row it is
// [sql.ErrNoRows]. NULL is the zero value.
func (w *writer) queryRow(s *sqlite3.SQLiteStmt, to any, values ...driver.Value) error {
	w.args = w.args[:0]
	for i, v := range values {
		w.args = append(w.args, driver.NamedValue{Ordinal: i + 1, Value: v})
	}
	rows, err := s.QueryContext(context.Background(), w.args)
	if err != nil {
		return err
	}
	defer rows.Close()
	var v [1]driver.Value
	if err := rows.Next(v[:]); errors.Is(err, io.EOF) {
		return sql.ErrNoRows
	} else if err != nil {
		return err
	}
	ok := true
	switch to := to.(type) {
	case *int64:
		*to, ok = v[0].(int64)
	case *string:
		*to, ok = v[0].(string)
	case *[]byte:
		*to, ok = v[0].([]byte)
	}
	if !ok && v[0] != nil {
		return fmt.Errorf("%w (%w): a column holds a %T", dbdriver.ErrDamaged, audit.ErrCorrupt, v[0])
	}
	return nil
}

// inTx runs fn in a transaction, after it has made sure that the schema is the one that was made. beside reads the same
// file.
func (w *writer) inTx(beside querier, fn func() error) error {
	if _, err := w.exec(w.begin); err != nil {
		return classify(err)
	}
	err := w.unchanged(beside)
	if err == nil {
		err = fn()
	}
	if err == nil {
		err = w.inPlace()
	}
	if err == nil {
		_, err = w.exec(w.commit)
	}
	if err != nil {
		w.sealBytes = 0
		w.exec(w.rollback) // the cause is err; a COMMIT that failed may leave the transaction open
	}
	return classify(err)
}

// An inode is a file, whatever its name is.
type inode struct{ dev, ino uint64 }

// inPlace makes sure that what is written has its name in the folder still: SQLite goes on writing to a file that was removed,
// or that another one was put in the place of, and with the process what was acknowledged would be gone.
func (w *writer) inPlace() error {
	var now []inode
	for _, name := range []string{w.file, w.file + "-wal"} {
		var st unix.Stat_t
		if err := unix.Stat(name, &st); errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("%w (%w): %s was removed while it was written", dbdriver.ErrDamaged, audit.ErrCorrupt, filepath.Base(name))
		} else if err != nil {
			return fmt.Errorf("%w: %s: %v", dbdriver.ErrUnavailable, filepath.Base(name), err)
		}
		now = append(now, inode{uint64(st.Dev), st.Ino})
	}
	if w.opened == nil {
		w.opened = now
	}
	if !slices.Equal(now, w.opened) {
		return fmt.Errorf("%w (%w): another file was put in the place of %s, or of its log, while it was written", dbdriver.ErrDamaged, audit.ErrCorrupt, filepath.Base(w.file))
	}
	return nil
}

// unchanged compares the schema when another connection has written to the file since it was last compared: the first
// statement of each transaction that writes. Nobody else can change the file then. SQLite's data_version moves with every
// commit that is not this connection's (https://www.sqlite.org/pragma.html#pragma_data_version), whatever the commit did,
// so that a trigger planted meanwhile is seen before it could run, also if somebody set the schema cookie back.
func (w *writer) unchanged(beside querier) error {
	var version int64
	if err := w.queryRow(w.version, &version); err != nil {
		return err
	}
	if version == w.checked {
		return nil
	}
	var text string
	if err := w.queryRow(w.schema, &text); err != nil {
		return err
	}
	if text != w.made.text {
		if err := w.made.check(context.Background(), beside); err != nil {
			return err
		}
		return schemaError([]string{"its text differs"})
	}
	w.checked = version
	return nil
}

// rowsPerStatement are the lengths of statements that insert several rows, the longest first: each crossing into SQLite
// costs more than most rows do.
var rowsPerStatement = [...]int{64, 16, 4, 1}

// severalRows is an INSERT … VALUES (…) for n rows.
func severalRows(insert string, n int) string {
	values := insert[strings.LastIndex(insert, "VALUES ")+len("VALUES "):]
	return insert + strings.Repeat(", "+values, n-1)
}

// insertRows inserts rows 0 to n-1 in order. stmts are of the lengths of rowsPerStatement; add appends a row's values;
// wrote gets how many rows each statement wrote of those it had.
func (w *writer) insertRows(stmts *[len(rowsPerStatement)]*sqlite3.SQLiteStmt, n int, add func(values []driver.Value, row int) []driver.Value, wrote func(from, to int, affected int64) error) error {
	from := 0
	for i, length := range rowsPerStatement {
		for ; n-from >= length; from += length {
			w.values = w.values[:0]
			for row := from; row < from+length; row++ {
				w.values = add(w.values, row)
			}
			affected, err := w.exec(stmts[i], w.values...)
			if err == nil {
				err = wrote(from, from+length, affected)
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// all is insertRows' check that each row was written.
func all(from, to int, affected int64) error {
	if affected != int64(to-from) {
		return fmt.Errorf("%w (%w): a statement that writes %d rows wrote %d", dbdriver.ErrDamaged, audit.ErrCorrupt, to-from, affected)
	}
	return nil
}

// sameBlob makes sure that the payload stored under its digest is this one.
func (w *writer) sameBlob(x audit.Blob) error {
	var stored []byte
	err := w.queryRow(w.stored, &stored, x.Sum[:])
	if err != nil && !errors.Is(err, sql.ErrNoRows) {
		return err
	}
	if err != nil || string(stored) != string(x.Data) {
		return fmt.Errorf("%w (%w): the payload stored under SM3 %s is another one, or was not stored", dbdriver.ErrDamaged, audit.ErrCorrupt, x.Sum)
	}
	return nil
}

// putHead replaces the head seal, and leaves nothing of the one before in the file. A row as long as the one before is
// written over it, byte for byte; one of another length leaves a hole, which is wiped. Nothing else is deleted in a
// segment, and wiping what is moved when an index grows is a tenth of a record's time.
func (w *writer) putHead(seal audit.HeadSeal) error {
	bytes := integerBytes(int64(seal.Size)) + len(seal.MAC)
	if bytes == w.sealBytes {
		return w.writeOne(w.head, int64(seal.Size), seal.MAC)
	}
	if _, err := w.exec(w.wipe); err != nil {
		return err
	}
	if err := w.writeOne(w.head, int64(seal.Size), seal.MAC); err != nil {
		return err // the connection goes on wiping, which harms nobody
	}
	if _, err := w.exec(w.keep); err != nil {
		return err
	}
	w.sealBytes = bytes
	return nil
}

// integerBytes is how many bytes SQLite stores an integer in (https://www.sqlite.org/fileformat2.html#record_format).
func integerBytes(n int64) int {
	if n == 0 || n == 1 {
		return 0
	}
	for _, bytes := range []int{1, 2, 3, 4, 6} {
		if limit := int64(1) << (8*bytes - 1); n >= -limit && n < limit {
			return bytes
		}
	}
	return 8
}

// putToken inserts a token. Of two for one checkpoint the first stays; the verifier checks it.
func (w *writer) putToken(size uint64, token []byte) error {
	n, err := w.exec(w.token, int64(size), token)
	if err != nil || n == 1 {
		return err
	}
	var stored []byte
	if err := w.queryRow(w.stamped, &stored, int64(size)); errors.Is(err, sql.ErrNoRows) {
		return fmt.Errorf("%w (%w): the token of checkpoint %d was not stored", dbdriver.ErrDamaged, audit.ErrCorrupt, size)
	} else {
		return err
	}
}

// close finalises the statements and closes the connection; the last connection folds the log into the file.
func (w *writer) close() error {
	var errs []error
	for _, s := range w.statements {
		errs = append(errs, s.Close())
	}
	return classify(errors.Join(append(errs, w.conn.Close())...))
}

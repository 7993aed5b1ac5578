// Package sqlite keeps the journal in SQLite files, and opens the embedded central database.
//
// [Journal] is an audit.Store: segments journal-000001.db … in one folder, each a database in WAL mode with
// synchronous=FULL, so that a commit returns after fsync (https://www.sqlite.org/pragma.html#pragma_synchronous).
// [OpenCentral] opens a file for dbdriver/central.
//
// What is written in which order, and what a stop at any point leaves, is said at the functions that write. All SQL
// is in statements.go and in migrations/.
package sqlite

import (
	"context"

	"database/sql"
	"embed"

	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	sqlite3 "github.com/mattn/go-sqlite3"

	"yinjian/appliance/audit"
	"yinjian/dbdriver"
)

//go:embed migrations
var migrations embed.FS

// open makes a pool for one file. Writable pools have one connection: SQLite has one writer anyway.
func open(file string, readOnly bool, conns int) (*sql.DB, error) {
	return openSynchronous(file, readOnly, conns, "FULL")
}

// openSynchronous is open with another https://www.sqlite.org/pragma.html#pragma_synchronous for what is written.
func openSynchronous(file string, readOnly bool, conns int, synchronous string) (*sql.DB, error) {
	db, err := sql.Open(driverName, dataSource(file, readOnly, synchronous))
	if err != nil {
		return nil, fmt.Errorf("sqlite: opening %s: %w", filepath.Base(file), classify(err))
	}
	db.SetMaxOpenConns(conns)
	db.SetMaxIdleConns(conns)
	return db, nil
}

// openImmutable is open for reading a file that is never written (https://www.sqlite.org/uri.html#uriimmutable): a log beside
// it is not looked at.
func openImmutable(file string, conns int) (*sql.DB, error) {
	db, err := sql.Open(driverName, dataSource(file, true, "FULL")+"&immutable=1")
	if err != nil {
		return nil, fmt.Errorf("sqlite: opening %s: %w", filepath.Base(file), classify(err))
	}
	db.SetMaxOpenConns(conns)
	db.SetMaxIdleConns(conns)
	return db, nil
}

// dataSource is what the driver opens.
func dataSource(file string, readOnly bool, synchronous string) string {
	q := url.Values{}
	q.Set("_mutex", "no") // database/sql gives a connection to one goroutine at a time
	q.Set("_busy_timeout", "10000")
	q.Set("_stmt_cache_size", "32") // compiling a statement costs more than most of ours do
	if readOnly {
		q.Set("mode", "ro")
		q.Set("_query_only", "true")
	} else {
		q.Set("mode", "rw")
		q.Set("_synchronous", synchronous)
		q.Set("_txlock", "immediate")
		q.Set("_foreign_keys", "true")
	}
	return (&url.URL{Scheme: "file", Opaque: (&url.URL{Path: file}).EscapedPath(), RawQuery: q.Encode()}).String()
}

var errNoRow = fmt.Errorf("%w (%w)", audit.ErrNotFound, dbdriver.ErrNotFound)

// classify turns the driver's errors into those of audit and dbdriver. The driver's own type does not pass.
func classify(err error) error {
	if err == nil || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	if errors.Is(err, sql.ErrNoRows) {
		return errNoRow
	}
	var se sqlite3.Error
	if !errors.As(err, &se) {
		return err
	}
	if se.Code == sqlite3.ErrFull || se.SystemErrno == syscall.ENOSPC { // the latter of an index file, also one that reads wants
		return fmt.Errorf("%w (%w): %v", dbdriver.ErrFull, dbdriver.ErrUnavailable, err)
	}
	kind := error(nil)
	switch se.Code {
	case sqlite3.ErrConstraint:
		kind = dbdriver.ErrConflict
	case sqlite3.ErrCorrupt, sqlite3.ErrNotADB, sqlite3.ErrFormat:
		return fmt.Errorf("%w (%w): %v", dbdriver.ErrDamaged, audit.ErrCorrupt, err)
	default: // I/O, locks, permissions, memory
		kind = dbdriver.ErrUnavailable
	}
	return fmt.Errorf("%w: %v", kind, err)
}

// halfDone is whether a reading connection met a rollback journal or a log that only one that writes can apply.
func halfDone(err error) bool {
	var se sqlite3.Error
	return errors.As(err, &se) && (se.ExtendedCode == sqlite3.ErrReadonlyRollback || se.ExtendedCode == sqlite3.ErrReadonlyRecovery)
}

// migrate applies the numbered files of folder that the database has not seen, each in a transaction of its own. One
// file holds one statement. A file that was changed after it was applied is refused. Files after number last are left
// out.
func migrate(ctx context.Context, db *sql.DB, folder string, last int64) error {
	var n int
	if err := db.QueryRowContext(ctx, tableExists, migrationTable).Scan(&n); err != nil {
		return fmt.Errorf("sqlite: migrations: %w", classify(err))
	}
	if n == 0 {
		if _, err := db.ExecContext(ctx, createMigrations); err != nil {
			return fmt.Errorf("sqlite: migrations: %w", classify(err))
		}
	}
	applied := map[int64]string{}
	rows, err := db.QueryContext(ctx, selectMigrations)
	if err != nil {
		return fmt.Errorf("sqlite: migrations: %w", classify(err))
	}
	defer rows.Close()
	for rows.Next() {
		var no int64
		var name, sum string
		if err := rows.Scan(&no, &name, &sum); err != nil {
			return fmt.Errorf("sqlite: migrations: %w", classify(err))
		}
		applied[no] = sum
	}
	if err := rows.Err(); err != nil {
		return fmt.Errorf("sqlite: migrations: %w", classify(err))
	}
	rows.Close()

	files, err := migrationFiles(folder, last)
	if err != nil {
		return err
	}
	for _, m := range files {
		if old, ok := applied[m.no]; ok {
			if old != m.sum {
				return fmt.Errorf("sqlite: migration %s was changed after it had been applied", m.name)
			}
			continue
		}
		err = inTx(ctx, db, func(tx *sql.Tx) error { return m.apply(ctx, tx) })
		if err != nil {
			return fmt.Errorf("sqlite: migration %s: %w", m.name, err)
		}
	}
	return nil
}

// A migration is a file with one statement.
type migration struct {
	no        int64
	name, sum string // sum: SM3 of the file, hexadecimal
	text      string
}

// migrationFiles reads those of folder up to number last, in order.
func migrationFiles(folder string, last int64) ([]migration, error) {
	files, err := fs.ReadDir(migrations, path.Join("migrations", folder)) // sorted by name
	if err != nil {
		return nil, err
	}
	var out []migration
	for _, f := range files {
		no, err := strconv.ParseInt(f.Name()[:4], 10, 64)
		if err != nil {
			return nil, fmt.Errorf("sqlite: migration %s has no number", f.Name())
		}
		if no > last {
			break
		}
		text, err := migrations.ReadFile(path.Join("migrations", folder, f.Name()))
		if err != nil {
			return nil, err
		}
		out = append(out, migration{no, f.Name(), audit.Sum(text).String(), strings.TrimSpace(string(text))})
	}
	return out, nil
}

func (m migration) apply(ctx context.Context, tx *sql.Tx) error {
	if _, err := tx.ExecContext(ctx, m.text); err != nil {
		return err
	}
	return one(tx.ExecContext(ctx, insertMigration, m.no, m.name, m.sum))
}

// inTx runs fn in a transaction that is not cut off by ctx half way.
func inTx(ctx context.Context, db *sql.DB, fn func(*sql.Tx) error) error {
	tx, err := db.BeginTx(context.WithoutCancel(ctx), nil)
	if err != nil {
		return classify(err)
	}
	if err := fn(tx); err != nil {
		tx.Rollback() // the cause is err
		return classify(err)
	}
	if err := tx.Commit(); err != nil { // the driver rolls back what a failed COMMIT leaves open
		return classify(err)
	}
	return nil
}

func syncFolder(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

package sqlite

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math"
	"sort"
	"strings"
	"sync"

	sqlite3 "github.com/mattn/go-sqlite3"

	"yinjian/appliance/audit"
	"yinjian/dbdriver"
)

// A file's schema is code that runs inside our own writes: a trigger can swallow or replace what is inserted, and the
// INSERT succeeds all the same. So the schema of every file is compared with what the migrations make, when a file is
// opened and again inside each transaction that writes.

// driverName is the driver whose connections do not let a file's views and triggers call functions that reach further
// than the database (https://www.sqlite.org/pragma.html#pragma_trusted_schema).
const driverName = "sqlite3-yinjian"

func init() {
	sql.Register(driverName, &sqlite3.SQLiteDriver{ConnectHook: distrust})
}

func distrust(c *sqlite3.SQLiteConn) error {
	_, err := c.Exec(`PRAGMA trusted_schema = OFF`, nil)
	return err
}

// A schema is what the migrations of one folder make.
type schema struct {
	text    string // answer to schemaText
	objects map[string]object
	applied map[int64]string // file name and SM3 of each migration
}

// An object is a row of sqlite_master. Its sql is "" for the indexes that SQLite makes itself.
type object struct{ kind, table, sql string }

var (
	// journalSchemas are those of the segments' formats.
	journalSchemas = [...]func() (*schema, error){
		1: sync.OnceValues(func() (*schema, error) { return buildSchema("journal", formatMigrations[1]) }),
		2: sync.OnceValues(func() (*schema, error) { return buildSchema("journal", formatMigrations[2]) }),
		3: sync.OnceValues(func() (*schema, error) { return buildSchema("journal", formatMigrations[3]) }),
	}
	indexSchema = sync.OnceValues(func() (*schema, error) { return buildSchema("index", math.MaxInt64) })
)

// buildSchema applies the migrations up to number last in memory and reads what they made.
func buildSchema(folder string, last int64) (*schema, error) {
	s, err := readSchema(func(ctx context.Context, db *sql.DB) error { return migrate(ctx, db, folder, last) })
	if err != nil {
		return nil, err
	}
	files, err := migrationFiles(folder, last)
	if err != nil {
		return nil, err
	}
	for _, m := range files {
		s.applied[m.no] = m.name + " " + m.sum
	}
	return s, nil
}

// readSchema answers what migrations make of an empty database.
func readSchema(migrations func(context.Context, *sql.DB) error) (*schema, error) {
	ctx := context.Background()
	db, err := sql.Open(driverName, ":memory:")
	if err != nil {
		return nil, classify(err)
	}
	defer db.Close()
	db.SetMaxOpenConns(1) // each connection has a memory of its own
	if err := migrations(ctx, db); err != nil {
		return nil, err
	}
	s := &schema{applied: map[int64]string{}}
	if err := db.QueryRowContext(ctx, schemaText).Scan(&s.text); err != nil {
		return nil, classify(err)
	}
	if s.objects, err = objects(ctx, db); err != nil {
		return nil, err
	}
	return s, nil
}

// A querier is a *sql.DB or a *sql.Tx.
type querier interface {
	QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
}

func objects(ctx context.Context, q querier) (map[string]object, error) {
	rows, err := q.QueryContext(ctx, selectObjects)
	if err != nil {
		return nil, classify(err)
	}
	defer rows.Close()
	out := map[string]object{}
	for rows.Next() {
		var o object
		var name string
		if err := rows.Scan(&o.kind, &name, &o.table, &o.sql); err != nil {
			return nil, classify(err)
		}
		if _, twice := out[name]; twice { // SQLite itself never allows that; a file written by hand can have it
			name += " (second)"
		}
		out[name] = o
	}
	return out, classify(rows.Err())
}

// differences names what of a file is not as the migrations make it, sorted; none for a file as it should be. lost
// says that a table is not there or is another one, so that the file cannot be read.
func (s *schema) differences(ctx context.Context, q querier) (found []string, lost bool, err error) {
	have, err := objects(ctx, q)
	if err != nil {
		return nil, false, err
	}
	for name, want := range s.objects {
		got, ok := have[name]
		switch {
		case !ok:
			found = append(found, fmt.Sprintf("%s %s is missing", want.kind, name))
		case got != want:
			found = append(found, fmt.Sprintf("%s %s was changed", got.kind, name))
		default:
			continue
		}
		lost = lost || want.kind == "table"
	}
	for name, got := range have {
		if _, ok := s.objects[name]; !ok {
			found = append(found, fmt.Sprintf("%s %q on %q was added", got.kind, name, got.table))
		}
	}
	var version int64
	if err := q.QueryRowContext(ctx, `PRAGMA user_version`).Scan(&version); err != nil {
		return nil, false, classify(err)
	}
	if version != 0 {
		found = append(found, fmt.Sprintf("user_version is %d, not 0", version))
	}
	if o, ok := have[migrationTable]; ok && o == s.objects[migrationTable] {
		applied, err := s.migrations(ctx, q)
		if err != nil {
			return nil, false, err
		}
		found = append(found, applied...)
	}
	sort.Strings(found)
	return found, lost, nil
}

// migrations compares the list of applied migrations.
func (s *schema) migrations(ctx context.Context, q querier) (found []string, err error) {
	rows, err := q.QueryContext(ctx, selectMigrations)
	if err != nil {
		return nil, classify(err)
	}
	defer rows.Close()
	seen := map[int64]bool{}
	for rows.Next() {
		var no int64
		var name, sum string
		if err := rows.Scan(&no, &name, &sum); err != nil {
			return nil, classify(err)
		}
		seen[no] = true
		if s.applied[no] != name+" "+sum {
			found = append(found, fmt.Sprintf("migration %d, %q, is not one of ours", no, name))
		}
	}
	for no := range s.applied {
		if !seen[no] {
			found = append(found, fmt.Sprintf("migration %d is not in the list of those applied", no))
		}
	}
	return found, classify(rows.Err())
}

// check is differences as an error, dbdriver.ErrDamaged and audit.ErrCorrupt.
func (s *schema) check(ctx context.Context, q querier) error {
	found, _, err := s.differences(ctx, q)
	if err != nil {
		return err
	}
	return schemaError(found)
}

func schemaError(found []string) error {
	if len(found) == 0 {
		return nil
	}
	return fmt.Errorf("%w (%w): the schema is not the one that was made: %s", dbdriver.ErrDamaged, audit.ErrCorrupt, strings.Join(found, "; "))
}

// unchanged compares the schema inside a transaction that writes, as its first statement. Nobody else can change the
// file then. What our connection compiles its statements with is the schema that it checked before, or, if the file's
// schema cookie moved, the one that this statement reads: a trigger planted meanwhile is seen here before it could run,
// also if somebody set the cookie back. The journal's own writer looks only when somebody else has written, see
// writer.unchanged.
func (s *schema) unchanged(ctx context.Context, tx *sql.Tx) error {
	var text sql.NullString
	err := tx.QueryRowContext(ctx, schemaText).Scan(&text)
	if err != nil || text.String == s.text {
		return err
	}
	if err := s.check(ctx, tx); err != nil {
		return err
	}
	return schemaError([]string{"its text differs"})
}

// one checks that a statement wrote its one row.
func one(res sql.Result, err error) error {
	if err != nil {
		return err
	}
	n, err := res.RowsAffected()
	if err == nil && n != 1 {
		err = notOne(n)
	}
	return err
}

func notOne(n int64) error {
	return fmt.Errorf("%w (%w): a statement that writes one row wrote %d", dbdriver.ErrDamaged, audit.ErrCorrupt, n)
}

// errFormat means that a segment is of a later format; its schema is then not ours to judge.
var errFormat = errors.New("segment format is not known")

package central

import (
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"strings"

	"yinjian/appliance/audit"
	"yinjian/dbdriver"
)

//go:embed migrations
var migrationFiles embed.FS

// An Author is who changes the schema, and when (µs since 1970 UTC): the fields that every table has.
type Author struct {
	Name   string
	Micros int64
}

// A migration is a file with one statement that makes one object.
//
//	-- review: central-0001
//	-- makes: table yj_record
//	CREATE TABLE yj_record (…)
type migration struct {
	no           int64
	name         string
	review       string // whose absence keeps it from being applied
	kind, object string // what it makes: "table", "index" or "column", and its name
	text         string
	sum          string // SM3 of text, hexadecimal
}

// parseMigrations reads all files, in order.
func parseMigrations(files fs.FS) ([]migration, error) {
	entries, err := fs.ReadDir(files, "migrations") // sorted by name
	if err != nil {
		return nil, err
	}
	var out []migration
	for i, e := range entries {
		b, err := fs.ReadFile(files, "migrations/"+e.Name())
		if err != nil {
			return nil, err
		}
		m, err := parseMigration(e.Name(), string(b))
		if err == nil && m.no != int64(i)+1 {
			err = fmt.Errorf("its number should be %d", i+1)
		}
		if err != nil {
			return nil, fmt.Errorf("%w: migration %s: %w", dbdriver.ErrUnfit, e.Name(), err)
		}
		out = append(out, m)
	}
	return out, nil
}

func parseMigration(name, text string) (migration, error) {
	m := migration{name: name}
	var err error
	digits, _, _ := strings.Cut(name, "_")
	if m.no, err = strconv.ParseInt(digits, 10, 64); err != nil {
		return m, errors.New("the name has no number")
	}
	for strings.HasPrefix(text, "--") {
		var line string
		line, text, _ = strings.Cut(text, "\n")
		key, value, _ := strings.Cut(strings.TrimPrefix(line, "--"), ":")
		switch value = strings.TrimSpace(value); strings.TrimSpace(key) {
		case "review":
			m.review = value
		case "makes":
			m.kind, m.object, _ = strings.Cut(value, " ")
		}
	}
	m.text = strings.TrimSpace(text)
	m.sum = audit.Sum([]byte(m.text)).String()
	switch {
	case m.review == "":
		return m, errors.New("nobody reviewed it: the line '-- review: …' is missing")
	case !slices.Contains([]string{"table", "index", "column"}, m.kind) || m.object == "":
		return m, errors.New("the line '-- makes: table|index|column name' is missing")
	case m.text == "" || strings.Contains(m.text, ";"):
		return m, errors.New("one statement is wanted, without a semicolon")
	}
	return m, nil
}

// Migrate applies the files that the database has not seen, in order, with seam's forms. No transaction holds a
// statement of DDL and its row in the list together, since DM8 commits at DDL: a stop between them leaves an object that
// the list does not have. So each object is looked for before it is made, and one that is there is listed. Two
// appliances may do this at once. A file that was changed after it was applied is refused; files that a later program
// applied are left as they are, as every migration is such that the program before it can go on, until rows have been archived,
// of which that program knows nothing.
func Migrate(ctx context.Context, db *sql.DB, seam *Seam, by Author) error {
	return migrate(ctx, db, seam, by, migrationFiles, false)
}

func migrate(ctx context.Context, db *sql.DB, seam *Seam, by Author, files fs.FS, again bool) error {
	todo, err := parseMigrations(files)
	if err != nil {
		return err
	}
	unguarded := *seam // the guard is for the schema as it will be
	unguarded.Guard = nil
	seam = &unguarded
	if err := ensure(ctx, db, seam, "table", historyTable, seam.Text(createHistory.Text)); err != nil {
		return fmt.Errorf("central database: the list of migrations: %w", err)
	}
	applied, err := history(ctx, db, seam)
	if err != nil {
		return err
	}
	for _, m := range todo {
		if old, ok := applied[m.no]; ok {
			if old != m.sum {
				return fmt.Errorf("%w: migration %s was changed after it had been applied", dbdriver.ErrUnfit, m.name)
			}
			if !again {
				continue
			}
		}
		if err := ensure(ctx, db, seam, m.kind, m.object, seam.Text(m.text)); err != nil {
			return fmt.Errorf("central database: migration %s: %w", m.name, err)
		}
		if _, ok := applied[m.no]; ok {
			continue
		}
		err := inTx(ctx, db, seam, func(tx *sql.Tx) error {
			_, err := tx.ExecContext(ctx, seam.Text(insertHistory.Text), m.no, m.name, m.sum, m.review, by.Name, by.Micros, by.Name, by.Micros)
			return err
		})
		if errors.Is(err, dbdriver.ErrConflict) { // the other campus did the same
			var again map[int64]string
			if again, err = history(ctx, db, seam); err == nil && again[m.no] != m.sum {
				err = fmt.Errorf("%w: another migration %d was applied meanwhile", dbdriver.ErrUnfit, m.no)
			}
		}
		if err != nil {
			return fmt.Errorf("central database: listing migration %s: %w", m.name, err)
		}
	}
	return nil
}

// ensure makes one object if it is not there.
func ensure(ctx context.Context, db *sql.DB, seam *Seam, kind, name, ddl string) error {
	there, err := exists(ctx, db, seam, kind, name)
	if err != nil || there {
		return err
	}
	if _, err = db.ExecContext(ctx, ddl); err == nil {
		return nil
	}
	if there, again := exists(ctx, db, seam, kind, name); again == nil && there { // made meanwhile, or the answer was lost
		return nil
	}
	return classify(seam, err)
}

func exists(ctx context.Context, db *sql.DB, seam *Seam, kind, name string) (bool, error) {
	query := seam.TableExists
	switch kind {
	case "index":
		query = seam.IndexExists
	case "column":
		table, column, _ := strings.Cut(name, ".")
		tables, err := live(ctx, db, seam)
		return err == nil && tables[table] != nil && slices.ContainsFunc(tables[table].Columns, func(c Column) bool { return c.Name == column }), err
	}
	var n int64
	err := db.QueryRowContext(ctx, query, name).Scan(&n)
	return n > 0, classify(seam, err)
}

// history is the sums of what was applied, by number.
func history(ctx context.Context, db *sql.DB, seam *Seam) (map[int64]string, error) {
	rows, err := db.QueryContext(ctx, seam.Text(selectHistory.Text))
	if err != nil {
		return nil, fmt.Errorf("central database: the list of migrations: %w", classify(seam, err))
	}
	defer rows.Close()
	applied := map[int64]string{}
	for rows.Next() {
		var no int64
		var name, sum, review string
		if err := rows.Scan(&no, &name, &sum, &review); err != nil {
			return nil, fmt.Errorf("central database: the list of migrations: %w", classify(seam, err))
		}
		applied[no] = sum
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("central database: the list of migrations: %w", classify(seam, err))
	}
	return applied, nil
}

package sqlite

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"yinjian/dbdriver/central"
)

// Seam is SQLite's, without the guard against a changed schema that [OpenCentral] adds.
func Seam() *central.Seam {
	return &central.Seam{
		Name: "sqlite", Bytes: "BLOB", Classify: classify, TableExists: tableExists, IndexExists: indexExists,
		Columns: selectColumns, Settings: centralSettings,
	}
}

// OpenCentral opens or makes the embedded central database, for the installation of one campus that has no database
// server: a file (mode 0600). A file whose schema is another one than the migrations make is refused with
// dbdriver.ErrDamaged.
func OpenCentral(ctx context.Context, file string, by central.Author) (*central.Store, error) {
	db, err := CentralDB(file)
	if err != nil {
		return nil, err
	}
	s, err := openCentral(ctx, db, by)
	if err != nil {
		db.Close()
		return nil, fmt.Errorf("sqlite: opening central database: %w", err)
	}
	return s, nil
}

// CentralDB opens or makes the file (mode 0600), without looking at what is in it.
func CentralDB(file string) (*sql.DB, error) {
	f, err := os.OpenFile(file, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("sqlite: opening central database: %w", err)
	}
	f.Close()
	if err := syncFolder(filepath.Dir(file)); err != nil {
		return nil, fmt.Errorf("sqlite: opening central database: %w", err)
	}
	// NORMAL: a power cut may take the last transactions along, whole and in order; the shipper asks where to go on. The
	// journal's fsyncs, for which signatures wait, have the disk to themselves.
	return openSynchronous(file, false, 4, "NORMAL")
}

// SetCentralAside gives the file another name, with what SQLite keeps beside it, so that [OpenCentral] makes a new one.
// The main file goes last: a stop before leaves one that is still found damaged.
func SetCentralAside(file string, micros int64) (string, error) {
	to := fmt.Sprintf("%s.damaged-%d", file, micros)
	for _, suffix := range []string{"-wal", "-shm", ""} {
		if err := os.Rename(file+suffix, to+suffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", fmt.Errorf("sqlite: setting the central database aside: %w", err)
		}
	}
	return to, syncFolder(filepath.Dir(file))
}

func openCentral(ctx context.Context, db *sql.DB, by central.Author) (*central.Store, error) {
	schema, err := centralSchema()
	if err != nil {
		return nil, err
	}
	var mode string
	if err := db.QueryRowContext(ctx, `PRAGMA journal_mode = WAL`).Scan(&mode); err != nil || mode != "wal" {
		return nil, fmt.Errorf("journal mode %q: %w", mode, classify(err))
	}
	if err := forgetOldList(ctx, db); err != nil {
		return nil, err
	}
	seam := Seam()
	seam.Guard = schema.unchanged
	return central.Open(ctx, db, seam, by)
}

// forgetOldList removes the list of migrations that files of before have: the tables are the same, and are found and
// listed anew.
func forgetOldList(ctx context.Context, db *sql.DB) error {
	var n int
	if err := db.QueryRowContext(ctx, tableExists, migrationTable).Scan(&n); err != nil || n == 0 {
		return classify(err)
	}
	_, err := db.ExecContext(ctx, dropMigrations)
	return classify(err)
}

// centralSchema is what the migrations make, applied in memory.
var centralSchema = sync.OnceValues(func() (*schema, error) {
	return readSchema(func(ctx context.Context, db *sql.DB) error { return central.Migrate(ctx, db, Seam(), central.Author{}) })
})

// centralSettings are those of a file: they could be others only if somebody else had made it.
func centralSettings(ctx context.Context, db *sql.DB) ([]central.Setting, error) {
	var version, encoding string
	if err := db.QueryRowContext(ctx, selectVersion).Scan(&version); err != nil {
		return nil, err
	}
	if err := db.QueryRowContext(ctx, `PRAGMA encoding`).Scan(&encoding); err != nil {
		return nil, err
	}
	s := central.Setting{Name: "encoding", Value: encoding, Verdict: central.Fit}
	if encoding != "UTF-8" {
		s.Verdict, s.Why = central.Unfit, "须为 UTF-8 (UTF-8 is wanted)"
	}
	return []central.Setting{{Name: "version", Value: version, Verdict: central.Fit}, s}, nil
}

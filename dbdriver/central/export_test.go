package central

import (
	"context"
	"database/sql"
	"io/fs"
)

// MigrateFS applies other files than ours.
func MigrateFS(ctx context.Context, db *sql.DB, seam *Seam, files fs.FS) error {
	return migrate(ctx, db, seam, Author{Name: "test"}, files, false)
}

// Migrations are the texts of our files by name.
func Migrations() (map[string]string, error) {
	ms, err := parseMigrations(migrationFiles)
	out := map[string]string{}
	for _, m := range ms {
		out[m.name] = m.text
	}
	return out, err
}

// Comments are the words of the dictionary.
func Comments() map[string]string { return comments }

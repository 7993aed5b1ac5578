package central_test

import (
	"errors"
	"strings"
	"testing"
	"testing/fstest"

	"yinjian/dbdriver"
	"yinjian/dbdriver/central"
	"yinjian/dbdriver/dbtest"
)

// A migration that nobody reviewed, that does not say what it makes, or that is more than one statement is refused, and
// nothing of any other is applied.
func TestMigrationsRefused(t *testing.T) {
	t.Parallel()
	const good = "-- review: r-1\n-- makes: table yj_a\nCREATE TABLE yj_a (a_no BIGINT NOT NULL, PRIMARY KEY (a_no))\n"
	for name, c := range map[string]struct{ text, names string }{
		"no review":      {strings.Replace(good, "-- review: r-1\n", "", 1), "review"},
		"empty review":   {strings.Replace(good, "r-1", "", 1), "review"},
		"no object":      {strings.Replace(good, "-- makes: table yj_a\n", "", 1), "makes"},
		"unknown object": {strings.Replace(good, "table yj_a\n", "view yj_a\n", 1), "makes"},
		"two statements": {good + "; DROP TABLE yj_a", "semicolon"},
		"no statement":   {"-- review: r-1\n-- makes: table yj_a\n", "statement"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := dbtest.SQLite(t)
			db := d.Pool(nil)
			defer db.Close()
			err := central.MigrateFS(t.Context(), db, d.Seam(), fstest.MapFS{
				"migrations/0001_a.sql": {Data: []byte(good)}, "migrations/0002_b.sql": {Data: []byte(c.text)},
			})
			if !errors.Is(err, dbdriver.ErrUnfit) || !strings.Contains(err.Error(), c.names) || !strings.Contains(err.Error(), "0002_b.sql") {
				t.Errorf("Migrate = %v, want %v that names the file and %q", err, dbdriver.ErrUnfit, c.names)
			}
			var n int
			if err := db.QueryRow(`SELECT COUNT(*) FROM sqlite_master`).Scan(&n); err != nil || n != 0 {
				t.Errorf("%d objects were made, %v", n, err)
			}
		})
	}
	gap := fstest.MapFS{"migrations/0002_b.sql": {Data: []byte(good)}}
	d := dbtest.SQLite(t)
	db := d.Pool(nil)
	defer db.Close()
	if err := central.MigrateFS(t.Context(), db, d.Seam(), gap); !errors.Is(err, dbdriver.ErrUnfit) {
		t.Errorf("Migrate with a gap = %v, want %v", err, dbdriver.ErrUnfit)
	}
}

func TestDollar(t *testing.T) {
	t.Parallel()
	if got := central.Dollar("a = ? AND b IN (?, ?) LIMIT ?"); got != "a = $1 AND b IN ($2, $3) LIMIT $4" {
		t.Error(got)
	}
}

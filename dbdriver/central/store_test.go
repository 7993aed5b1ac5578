package central_test

import (
	"testing"

	"yinjian/dbdriver/dbtest"
)

func TestSQLite(t *testing.T) {
	t.Parallel()
	dbtest.Suite(t, dbtest.SQLite)
}

func TestPostgres(t *testing.T) {
	t.Parallel()
	dbtest.Suite(t, dbtest.Postgres(dbtest.StartPostgres(t)))
}

// The driver that behaves as badly as DM8's was read to.
func TestHostile(t *testing.T) {
	t.Parallel()
	dbtest.Suite(t, dbtest.DM)
}

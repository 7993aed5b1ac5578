package check_test

import (
	"database/sql/driver"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"yinjian/dbdriver/check"
	"yinjian/dbdriver/dbtest"
)

func item(r *check.Report, name string) check.Item {
	for _, i := range r.Items {
		if i.Name == name {
			return i
		}
	}
	return check.Item{Result: "absent"}
}

// The checks pass on the databases that we have, twice, leave nothing behind, and observe what each of them is known for.
func TestRun(t *testing.T) {
	t.Parallel()
	cluster := dbtest.StartPostgres(t)
	for name, c := range map[string]struct {
		fresh    func(testing.TB) *dbtest.Database
		observed map[string]string
		skipped  []string
	}{
		"sqlite":   {dbtest.SQLite, map[string]string{"empty": `""`, "trailing-space": "不同", "ddl": "made): false"}, []string{"deadlock"}},
		"postgres": {dbtest.Postgres(cluster), map[string]string{"empty": `""`, "trailing-space": "不同", "ddl": "made): false"}, nil},
		"hostile":  {dbtest.DM, map[string]string{"empty": "NULL", "trailing-space": "相同", "ddl": "committed): true；索引建成了 (the index was made): true"}, []string{"deadlock"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := c.fresh(t)
			db := d.Pool(nil)
			defer db.Close()
			for range 2 {
				var r check.Report
				if err := check.Run(t.Context(), db, d.Seam(), 0, &r); err != nil {
					t.Fatal(err)
				}
				for _, i := range r.Items {
					if i.Result == check.Failed || i.Result == check.Skipped && !slices.Contains(c.skipped, i.Name) {
						t.Errorf("%s: %s: %s", i.Name, i.Result, i.Detail)
					}
				}
				if !r.OK() || len(r.Items) < 25 || len(r.CommitsMS) != 3 || len(r.Settings) == 0 {
					t.Errorf("report = %+v", r)
				}
				for name, want := range c.observed {
					if i := item(&r, name); i.Result != check.Observed || !strings.Contains(i.Detail, want) {
						t.Errorf("%s: %+v, want %q", name, i, want)
					}
				}
				for _, table := range append(migrated(t), "yj_probe", "yj_schema_change") {
					if there, err := d.Seam().Exists(t.Context(), db, "table", table); err != nil || there {
						t.Errorf("%s was left behind, %v", table, err)
					}
				}
			}
		})
	}
}

// migrated are the tables that the migrations make.
func migrated(t *testing.T) (tables []string) {
	t.Helper()
	files, err := filepath.Glob("../central/migrations/*.sql")
	if err != nil || len(files) == 0 {
		t.Fatalf("no migrations: %v", err)
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		if _, name, ok := strings.Cut(string(b), "-- makes: table "); ok {
			name, _, _ = strings.Cut(name, "\n")
			tables = append(tables, name)
		}
	}
	return tables
}

// A server that is killed and comes back while rows are written: each is there once. Answers that were lost are found.
func TestSoak(t *testing.T) {
	t.Parallel()
	c := dbtest.StartPostgres(t)
	d := dbtest.Postgres(c)(t)
	var soaking atomic.Bool
	var commits atomic.Int64
	killed := make(chan bool)
	db := d.Pool(func(op dbtest.Op) dbtest.Fault {
		if op.Text == "DROP TABLE yj_schema_change" { // the last thing before
			soaking.Store(true)
		}
		if !soaking.Load() || op.Kind != "commit" {
			return dbtest.Fault{}
		}
		switch n := commits.Add(1); {
		case n == 5:
			close(killed)
		case n%7 == 0:
			return dbtest.Fault{After: driver.ErrBadConn}
		}
		return dbtest.Fault{}
	})
	defer db.Close()
	var r check.Report
	done := make(chan error, 1)
	go func() { done <- check.Run(t.Context(), db, d.Seam(), 12*time.Second, &r) }()
	select {
	case <-killed:
		c.Kill()
		c.Start(t)
	case err := <-done:
		t.Fatalf("Run = %v before anything was written: %+v", err, r)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	i := item(&r, "soak")
	if s := r.Soak; i.Result != check.Passed || s == nil || s.Rows < 10 || s.AnswersLost == 0 || len(s.Errors) == 0 {
		t.Errorf("soak = %+v, %+v", i, r.Soak)
	}
}

// Tables in use are not touched.
func TestInUse(t *testing.T) {
	t.Parallel()
	d := dbtest.SQLite(t)
	s := d.Open(t)
	j, _ := dbtest.Journal(t, t.TempDir(), false)
	dbtest.Append(t, j, 0, 20)
	dbtest.Ship(t, j, s, dbtest.CaughtUp)
	db := d.Pool(nil)
	defer db.Close()
	var r check.Report
	if err := check.Run(t.Context(), db, d.Seam(), 0, &r); err != nil {
		t.Fatal(err)
	}
	if i := item(&r, "store"); i.Result != check.Skipped || !r.OK() {
		t.Errorf("store: %+v, %v", i, r.OK())
	}
	if c := dbtest.Compare(t, j, s); !c.OK() || c.Rows != j.Size() {
		t.Errorf("compare = %+v", c)
	}
}

// A database with a fault fails, and the check that is for it says so.
func TestFaultsAreFound(t *testing.T) {
	t.Parallel()
	gone := &dbtest.DMError{ErrCode: -9999, ErrText: "fault"}
	for name, c := range map[string]struct {
		fault func(dbtest.Op) dbtest.Fault
		items []string
	}{
		"no long inserts": {func(op dbtest.Op) dbtest.Fault {
			if strings.Count(op.Text, "(?, ?") > 10 {
				return dbtest.Fault{Before: gone}
			}
			return dbtest.Fault{}
		}, []string{"rows", "store"}},
		"no limit": {func(op dbtest.Op) dbtest.Fault {
			if strings.Contains(op.Text, "LIMIT") {
				return dbtest.Fault{Before: gone}
			}
			return dbtest.Fault{}
		}, []string{"limit", "store"}},
		"no updates": {func(op dbtest.Op) dbtest.Fault {
			if strings.HasPrefix(op.Text, "UPDATE") {
				return dbtest.Fault{Before: gone}
			}
			return dbtest.Fault{}
		}, []string{"conditional", "deadline"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := dbtest.DM(t)
			db := d.Pool(c.fault)
			defer db.Close()
			var r check.Report
			if err := check.Run(t.Context(), db, d.Seam(), 0, &r); err != nil {
				t.Fatal(err)
			}
			if r.OK() != (len(c.items) == 0) {
				t.Errorf("OK = %v", r.OK())
			}
			for _, name := range c.items {
				if i := item(&r, name); i.Result != check.Failed || !strings.Contains(i.Detail, "fault") {
					t.Errorf("%s: %+v, want a failure", name, i)
				}
			}
		})
	}
}

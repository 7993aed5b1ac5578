package postgres_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"yinjian/appliance/audit"
	"yinjian/dbdriver"
	"yinjian/dbdriver/central"
	"yinjian/dbdriver/connect"
	"yinjian/dbdriver/dbtest"
	"yinjian/dbdriver/postgres"
)

var by = central.Author{Name: "test", Micros: 1}

func open(t *testing.T, dsn string) *central.Store {
	t.Helper()
	s, err := connect.Open(t.Context(), connect.Place{DSN: dsn}, by)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func failing(s audit.ShipperStatus) bool { return s.LastError != nil }

func same(t *testing.T, j *audit.Journal, s *central.Store) {
	t.Helper()
	var r *audit.CompareReport
	var err error
	for range 5 { // a connection of the pool may have been ended with a backend, and shows it at its next use
		if r, err = audit.Compare(t.Context(), j, s, dbtest.Keys); !errors.Is(err, dbdriver.ErrUnavailable) {
			break
		}
	}
	if err != nil || !r.OK() || r.Rows != j.Size() || r.NotShipped != 0 {
		t.Errorf("compare = %+v, %v, want %d rows and no difference", r, err, j.Size())
	}
}

// The server is killed, and later frozen; the journal takes entries, the shipper says how far behind it is, and goes on
// by itself.
func TestServerAway(t *testing.T) {
	t.Parallel()
	c := dbtest.StartPostgres(t)
	j, _ := dbtest.Journal(t, t.TempDir(), false)
	dbtest.Append(t, j, 0, 50)
	s := open(t, c.DSN(c.Fresh(t)))
	sh := dbtest.StartShipper(t, j, s, func(c *audit.ShipperConfig) {
		c.Deadline, c.RetryMax = time.Second, 50*time.Millisecond
	})
	sh.Wait(t, dbtest.CaughtUp)

	c.Kill()
	shipped := j.Size()
	dbtest.Append(t, j, 50, 50)
	if st := sh.Wait(t, failing); st.Lag != j.Size()-shipped || !errors.Is(st.LastError, dbdriver.ErrUnavailable) {
		t.Errorf("while it is down: %+v", st)
	}
	c.Start(t)
	sh.Wait(t, dbtest.CaughtUp)
	same(t, j, s)

	c.Freeze()
	shipped = j.Size()
	dbtest.Append(t, j, 100, 50)
	if st := sh.Wait(t, failing); st.Lag != j.Size()-shipped {
		t.Errorf("while it is frozen: %+v", st)
	}
	c.Thaw()
	sh.Wait(t, dbtest.CaughtUp)
	same(t, j, s)
}

// A backend that is killed while it works takes the server's connections along; a row lock that somebody holds, and a
// deadlock, cost an attempt.
func TestBackendsKilledAndLocks(t *testing.T) {
	t.Parallel()
	c := dbtest.StartPostgres(t, "-c", "deadlock_timeout=50ms")
	name := c.Fresh(t)
	j, _ := dbtest.Journal(t, t.TempDir(), false)
	s := open(t, c.DSN(name))
	sh := dbtest.StartShipper(t, j, s, func(c *audit.ShipperConfig) { c.Deadline = time.Second })
	for i := range 10 {
		dbtest.Append(t, j, i*20, 20)
		c.Exec(t, "postgres", fmt.Sprintf(`SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '%s' AND application_name = 'yinjian'`, name))
	}
	sh.Wait(t, dbtest.CaughtUp)
	same(t, j, s)

	db := c.Open(t, name)
	defer db.Close()
	tx, err := db.BeginTx(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback()
	if _, err := tx.Exec(`LOCK TABLE yj_record IN ACCESS EXCLUSIVE MODE`); err != nil {
		t.Fatal(err)
	}
	dbtest.Append(t, j, 1000, 10)
	sh.Wait(t, failing)
	if err := tx.Rollback(); err != nil {
		t.Fatal(err)
	}
	sh.Wait(t, dbtest.CaughtUp)
	same(t, j, s)
}

// A primary with a standby: the standby is refused by name, and takes over when it is promoted and the primary is gone.
func TestStandby(t *testing.T) {
	t.Parallel()
	c := dbtest.StartPostgres(t, "-c", "wal_level=replica", "-c", "synchronous_commit=on")
	name := c.Fresh(t)
	standby := c.Standby(t)
	if _, err := connect.Open(t.Context(), connect.Place{DSN: standby.DSN(name)}, by); !errors.Is(err, dbdriver.ErrReadOnly) ||
		!errors.Is(err, dbdriver.ErrUnavailable) || errors.Is(err, dbdriver.ErrUnfit) {
		t.Errorf("Open of a standby = %v, want %v", err, dbdriver.ErrReadOnly)
	}
	// A server that begins to refuse writes is one too.
	j, _ := dbtest.Journal(t, t.TempDir(), false)
	dbtest.Append(t, j, 0, 50)
	s := open(t, fmt.Sprintf("host=%s,%s user=yinjian dbname=%s", c.Run, standby.Run, name))
	sh := dbtest.StartShipper(t, j, s, func(c *audit.ShipperConfig) { c.Deadline, c.RetryMax = 2*time.Second, 50*time.Millisecond })
	sh.Wait(t, dbtest.CaughtUp)
	c.Exec(t, "postgres", `ALTER DATABASE `+name+` SET default_transaction_read_only = on`)
	c.Exec(t, "postgres", `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'yinjian'`)
	dbtest.Append(t, j, 50, 10)
	if st := sh.Wait(t, failing); !errors.Is(st.LastError, dbdriver.ErrUnavailable) {
		t.Errorf("status = %+v, want %v", st, dbdriver.ErrUnavailable)
	}
	c.Exec(t, "postgres", `ALTER DATABASE `+name+` SET default_transaction_read_only = off`)
	sh.Wait(t, dbtest.CaughtUp)
	same(t, j, s)
	// What the standby lacks at the switchover is shipped again.
	dbtest.Append(t, j, 60, 30)
	c.Kill()
	sh.Wait(t, failing)
	standby.Promote(t)
	sh.Wait(t, dbtest.CaughtUp)
	same(t, j, s)
}

// A connection to a server that became a standby is not kept: the error says what it is, and the next one is looked for.
func TestReadOnlyConnection(t *testing.T) {
	t.Parallel()
	c := dbtest.StartPostgres(t)
	name := c.Fresh(t)
	s := open(t, c.DSN(name))
	backends := func() (n int) {
		db := c.Open(t, "postgres")
		defer db.Close()
		if err := db.QueryRow(`SELECT COUNT(*) FROM pg_stat_activity WHERE datname = $1 AND application_name = 'yinjian'`, name).Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	c.Exec(t, "postgres", `ALTER SYSTEM SET default_transaction_read_only = on`)
	c.Exec(t, "postgres", `SELECT pg_reload_conf()`)
	row := audit.ProjectedRow{
		Node: "east", Epoch: "e", LeafHash: "ab", Kind: "k", Status: "recorded", CreatedBy: "x", ModifiedBy: "x",
	}
	b := audit.ProjectedBatch{Node: "east", Epoch: "e", MAC: "cd", KeyID: "k", Rows: []audit.ProjectedRow{row}}
	var err error
	for range 1000 { // until the backend has read its configuration again
		if err = s.Apply(t.Context(), b); err != nil {
			break
		}
		b.First, b.Last, b.Rows[0].Sequence = b.First+1, b.Last+1, b.Rows[0].Sequence+1
	}
	if !errors.Is(err, dbdriver.ErrReadOnly) || !errors.Is(err, dbdriver.ErrUnavailable) {
		t.Fatalf("Apply = %v, want %v", err, dbdriver.ErrReadOnly)
	}
	for deadline := time.Now().Add(2 * time.Minute); backends() > 0; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the connection is kept")
		}
	}
}

// Settings that do not fit are refused by name; doubtful ones are told.
func TestSettings(t *testing.T) {
	t.Parallel()
	c := dbtest.StartPostgres(t)
	c.Exec(t, "postgres", `CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0`)
	if _, err := connect.Open(t.Context(), connect.Place{DSN: c.DSN("latin")}, by); !errors.Is(err, dbdriver.ErrUnfit) || !strings.Contains(err.Error(), "server_encoding = LATIN1") {
		t.Errorf("Open of a LATIN1 database = %v, want %v", err, dbdriver.ErrUnfit)
	}
	name := c.Fresh(t)
	for setting, value := range map[string]string{"standard_conforming_strings": "off", "default_transaction_read_only": "on"} {
		c.Exec(t, "postgres", fmt.Sprintf(`ALTER DATABASE %s SET %s = %s`, name, setting, value))
		if _, err := connect.Open(t.Context(), connect.Place{DSN: c.DSN(name)}, by); err == nil || !strings.Contains(err.Error(), setting) {
			t.Errorf("Open with %s = %s: %v", setting, value, err)
		}
		c.Exec(t, "postgres", fmt.Sprintf(`ALTER DATABASE %s RESET %s`, name, setting))
	}
	c.Exec(t, "postgres", fmt.Sprintf(`ALTER DATABASE %s SET default_transaction_isolation = serializable`, name))
	s := open(t, c.DSN(name))
	verdicts := map[string]central.Verdict{}
	for _, set := range s.Settings() {
		verdicts[set.Name] = set.Verdict
	}
	for name, want := range map[string]central.Verdict{
		"transport": central.Fit, "role": central.Fit, "server_encoding": central.Fit, "default_transaction_isolation": central.Doubtful, "fsync": central.Doubtful,
	} {
		if verdicts[name] != want {
			t.Errorf("%s: %q, want %q", name, verdicts[name], want)
		}
	}
}

// The tables of another program under our names are refused, not written to.
func TestOtherTables(t *testing.T) {
	t.Parallel()
	c := dbtest.StartPostgres(t)
	name := c.Fresh(t)
	c.Exec(t, name, `CREATE TABLE yj_record (id int)`)
	if _, err := connect.Open(t.Context(), connect.Place{DSN: c.DSN(name)}, by); err == nil {
		t.Error("opened")
	}
	// An account that may not write.
	c.Exec(t, name, `DROP TABLE yj_record, yj_schema_change`)
	open(t, c.DSN(name))
	c.Exec(t, name, `CREATE ROLE reader LOGIN`)
	c.Exec(t, name, `GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader`)
	s, err := connect.Open(t.Context(), connect.Place{DSN: strings.Replace(c.DSN(name), "user=yinjian", "user=reader", 1)}, by)
	if err == nil {
		err = s.Apply(t.Context(), audit.ProjectedBatch{Node: "n", Epoch: "e", MAC: "m", KeyID: "k", Rows: []audit.ProjectedRow{{Node: "n", Epoch: "e", LeafHash: "l", Kind: "k", Status: "s", CreatedBy: "c", ModifiedBy: "m"}}})
		s.Close()
	}
	if !errors.Is(err, dbdriver.ErrUnfit) {
		t.Errorf("with an account that may not write: %v, want %v", err, dbdriver.ErrUnfit)
	}
}

// A server on the network: password and certificate.
func TestPasswordAndTLS(t *testing.T) {
	t.Parallel()
	c := dbtest.StartPostgres(t)
	name, ca := c.Secure(t, "app", "right-Pass_1")
	dsn := fmt.Sprintf("postgres://app@127.0.0.1:%d/%s?sslmode=", c.Port, name)
	for what, k := range map[string]struct {
		dsn, password string
		ok            bool
	}{
		"right":                     {dsn + "verify-full&sslrootcert=" + ca, "right-Pass_1", true},
		"wrong password":            {dsn + "verify-full&sslrootcert=" + ca, "wrong", false},
		"unknown CA":                {dsn + "verify-full", "right-Pass_1", false},
		"unverified, on one's word": {dsn + "require", "right-Pass_1", true},
	} {
		s, err := connect.Open(t.Context(), connect.Place{DSN: k.dsn, Password: k.password}, by)
		if (err == nil) != k.ok {
			t.Errorf("%s: %v", what, err)
		}
		if err != nil && strings.Contains(err.Error(), "right-Pass_1") {
			t.Errorf("%s: the password is in %v", what, err)
		}
		if err == nil {
			s.Close()
		}
	}
}

// A DSN with a password is refused, and not repeated in the error; so is one that cannot be read.
func TestDSN(t *testing.T) {
	t.Parallel()
	for _, dsn := range []string{
		"postgres://app:s3cret@db/x", "host=db user=app password=s3cret", "host=db Password = s3cret", "postgres://app@db/x?password=s3cret",
		"postgres://app:s3cret@db:port/x", "host=db port=abc",
	} {
		_, err := connect.Open(t.Context(), connect.Place{DSN: dsn}, by)
		if !errors.Is(err, dbdriver.ErrUnfit) || strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%s: %v", dsn, err)
		}
	}
	for dsn, want := range map[string]struct {
		verified bool
		verdict  central.Verdict
	}{
		"postgres://app@db.example/x":                        {true, central.Fit},
		"postgres://app@db.example/x?application_name=y":     {true, central.Fit},
		"host=db.example user=app":                           {true, central.Fit},
		"postgres://app@db.example/x?sslmode=prefer":         {false, central.Doubtful},
		"host=db.example user=app sslmode=disable":           {false, central.Doubtful},
		"host=127.0.0.1,db.example user=app sslmode=disable": {false, central.Doubtful},
		"host=/run/postgresql user=app":                      {false, central.Fit},
		"host=127.0.0.1 user=app":                            {false, central.Fit},
	} {
		cfg, way, err := postgres.Parse(postgres.Config{DSN: dsn})
		if err != nil {
			t.Fatal(err)
		}
		if verified := cfg.TLSConfig != nil && !cfg.TLSConfig.InsecureSkipVerify && cfg.TLSConfig.ServerName == "db.example"; verified != want.verified || way.Verdict != want.verdict {
			t.Errorf("%s: verified %v, %q, want %v, %q", dsn, verified, way.Verdict, want.verified, want.verdict)
		}
	}
}

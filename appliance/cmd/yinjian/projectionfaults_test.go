package main_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"yinjian/api/client"
	"yinjian/appliance"
	"yinjian/appliance/alarm"
	"yinjian/dbdriver/dbtest"
)

// TestDatabaseKills kills the appliance, PostgreSQL, or both, and freezes PostgreSQL, at random moments under sixteen
// clients: once each; 200 times in all with YINJIAN_LONG=1. Afterwards every acknowledged signature is in journal and database
// once, at the same place.
func TestDatabaseKills(t *testing.T) {
	t.Parallel()
	rounds := 4
	if os.Getenv("YINJIAN_LONG") != "" {
		rounds = 200
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	c := dbtest.StartPostgres(t)
	name := c.Fresh(t)
	k := &killer{T: t, rnd: rand.New(rand.NewPCG(seed, 4)), slowest: map[string]time.Duration{}, kills: map[string]int{}, ends: map[string]int{}}
	k.dir = initAppliance(t, startTimeServer(t), "--listen", freePort(t))
	configure(t, k.dir, func(cfg *appliance.Config) { cfg.Database.DSN, cfg.Policy.SegmentEntries = c.DSN(name), 1500 })
	m := serve(t, k.dir)
	m.trusted(t)
	m.enrol(t, "D1", "")
	var configs []client.Config
	for i := range retryApps {
		id := fmt.Sprintf("app-%d", i)
		m.register(t, id, "--consent", "app-asserted")
		configs = append(configs, m.clientConfig(t, id))
	}
	m.stop(t)
	k.start()
	k.clients = newRetryLoad(t, configs, []string{"D1"}, k.app.Load)
	t.Cleanup(k.clients.end)
	k.mustReturn("start")
	for round := range rounds {
		what, wait := []string{"appliance", "database", "both", "database frozen"}[round%4], k.upTo(700*time.Millisecond)
		time.Sleep(k.upTo(300 * time.Millisecond))
		database := what == "database" || what == "both"
		if database {
			c.Kill()
			k.kills["database"]++
		}
		if what == "database frozen" {
			c.Freeze()
			time.Sleep(wait)
			c.Thaw()
		}
		if what == "appliance" || what == "both" {
			k.strike("appliance", syscall.SIGKILL)
			k.app.Store((k.app.Load() + 1) % retryApps)
			k.start()
		}
		k.mustReturn(what) // the database is away still
		if database {
			time.Sleep(wait)
			c.Start(t)
		}
		if t.Failed() {
			return
		}
	}
	k.clients.end()
	k.m.await(t)
	k.m.trusted(t)
	eventually(t, 2*time.Minute, "everything is shipped", func() bool { return k.m.state(t).Projection.Lag == 0 })
	k.m.mustBeClean(t)
	k.m.stop(t)
	t.Logf("%s", k.ledger(k.judgeJournal()))
	judgeDatabase(t, c, name, k)
}

// judgeDatabase wants every acknowledged record of the appliances in the database once, at the place that its result names,
// and no other.
func judgeDatabase(t *testing.T, c *dbtest.Cluster, name string, appliances ...*killer) {
	t.Helper()
	db := c.Open(t, name)
	defer db.Close()
	rows, err := db.QueryContext(t.Context(), `SELECT record_id, epoch_id || ' ' || seq_no FROM yj_record WHERE kind_name = 'sign.v1'`)
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	places := map[string]string{}
	for rows.Next() {
		var id, place string
		if err := rows.Scan(&id, &place); err != nil {
			t.Fatal(err)
		}
		if before, twice := places[id]; twice {
			t.Errorf("record %s is in the database at %s and at %s", id, before, place)
		}
		places[id] = place
	}
	if err := rows.Err(); err != nil {
		t.Fatal(err)
	}
	made := 0
	for _, k := range appliances {
		made += len(k.clients.made)
		for key, r := range k.clients.made {
			if want := fmt.Sprint(r.Epoch, " ", r.Sequence); places[r.RecordID] != want {
				t.Errorf("%s was acknowledged at %s and is in the database at %q", key, want, places[r.RecordID])
			}
		}
	}
	if len(places) != made {
		t.Errorf("%d records in the database, %d acknowledged", len(places), made)
	}
}

// TestDatabaseSwitchover: under the whole product the database is frozen, takes no writes for a while, and goes over to a
// standby; then its schema is one release older, and one newer. Signing goes on all the time.
func TestDatabaseSwitchover(t *testing.T) {
	t.Parallel()
	primary := dbtest.StartPostgres(t, "-c", "wal_level=replica", "-c", "synchronous_commit=on")
	name := primary.Fresh(t)
	standby := primary.Standby(t)
	dir := initAppliance(t, startTimeServer(t))
	configure(t, dir, func(cfg *appliance.Config) {
		cfg.Database.DSN = fmt.Sprintf("host=%s,%s user=yinjian dbname=%s", primary.Run, standby.Run, name)
		cfg.Alarms.Lag = 1
	})
	configure(t, dir, quick)
	m := serve(t, dir)
	m.trusted(t)
	m.enrol(t, "D1001", "")
	his := m.register(t, "his", "--consent", "app-asserted")
	status := func(word string) func() bool {
		return func() bool { return strings.Contains(mustRun(t, "status", "--dir", dir).stdout, word) }
	}
	whole := func() {
		t.Helper()
		eventually(t, 2*time.Minute, "everything is shipped", func() bool { return m.state(t).Projection.Lag == 0 })
		m.mustBeClean(t)
	}
	signs(t, his, "before", 3)
	whole()

	primary.Freeze()
	signs(t, his, "frozen", 3)
	if m.state(t).Projection.Lag == 0 {
		t.Error("a frozen database has everything")
	}
	m.raises(t, alarm.DatabaseLag)
	primary.Thaw()
	whole()
	m.clears(t, alarm.DatabaseLag)

	primary.Exec(t, "postgres", `ALTER DATABASE `+name+` SET default_transaction_read_only = on`)
	primary.Exec(t, "postgres", `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'yinjian'`)
	signs(t, his, "read-only", 3)
	eventually(t, time.Minute, "the state says so", status("库只读"))
	primary.Exec(t, "postgres", `ALTER DATABASE `+name+` SET default_transaction_read_only = off`)
	whole()

	primary.Kill()
	signs(t, his, "gone", 3)
	standby.Promote(t)
	whole()
	m.stop(t)

	// A release ago there were four migrations.
	standby.Exec(t, name, `DROP TABLE yj_change, yj_set_root, yj_decision, yj_rebuild`)
	standby.Exec(t, name, `DELETE FROM yj_schema_change WHERE change_no > 4`)
	m = serve(t, dir)
	m.trusted(t)
	his = m.client(t, "his")
	signs(t, his, "older", 3)
	whole()
	m.stop(t)
	// The next one has a table and a column more.
	standby.Exec(t, name, `CREATE TABLE yj_later (later_no BIGINT PRIMARY KEY)`)
	standby.Exec(t, name, `ALTER TABLE yj_record ADD later_text VARCHAR(64)`)
	standby.Exec(t, name, `INSERT INTO yj_schema_change (change_no, file_name, statement_sm3, review_id, created_by, created_at, modified_by, modified_at) VALUES (9999, '9999_later.sql', '00', 'later', 'x', 1, 'x', 1)`)
	m = serve(t, dir)
	m.trusted(t)
	his = m.client(t, "his")
	signs(t, his, "newer", 3)
	whole()
	m.stop(t)
}

// TestDatabaseFull: the database server's disk is full to the last byte. Signing goes on, the state says why nothing is
// shipped, and when there is room again everything is.
func TestDatabaseFull(t *testing.T) {
	t.Parallel()
	c := dbtest.NewCluster(t)
	if err := os.Mkdir(c.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(c.Run)
	if err != nil {
		t.Fatal(err)
	}
	owner, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		t.Fatal("no owner")
	}
	tmpfs(t, c.Dir, fmt.Sprintf("size=96m,uid=%d,gid=%d", owner.Uid, owner.Gid))
	c.Init(t, "--wal-segsize=1")
	c.Args = []string{"-c", "min_wal_size=4MB", "-c", "max_wal_size=8MB", "-c", "autovacuum=off"}
	c.Start(t)
	name := c.Fresh(t)
	m := withPostgres(t, c, name)
	var configs []client.Config
	for _, id := range []string{"app-0", "app-1"} {
		m.register(t, id, "--consent", "app-asserted")
		configs = append(configs, m.clientConfig(t, id))
	}
	var app atomic.Int32
	l := newRetryLoad(t, configs, []string{"D1001"}, app.Load)
	t.Cleanup(l.end)
	l.await()
	eventually(t, readyWithin, "signatures", l.returned)
	eventually(t, time.Minute, "rows", func() bool { return m.state(t).Projection.Lag < 200 })

	free := fill(t, c.Dir, 0)
	eventually(t, 2*time.Minute, "the state says why nothing is shipped", func() bool {
		out := mustRun(t, "status", "--dir", m.dir).stdout
		return strings.Contains(out, "库的磁盘已满") || strings.Contains(out, "库不可用") // without room for its log the server ends itself
	})
	l.await()
	eventually(t, readyWithin, "signatures while it is full", l.returned)
	if s := m.state(t); s.Projection.Lag == 0 || !s.Ready {
		t.Errorf("while it is full: %+v", s)
	}
	free()
	db := c.Open(t, name)
	defer db.Close()
	if err := db.PingContext(t.Context()); err != nil {
		t.Logf("the server has ended: %v", err)
		c.Kill()
		c.Start(t)
	}
	l.end()
	for code := range l.refused {
		if code != "clock_skew" {
			t.Errorf("refused with %s", code)
		}
	}
	eventually(t, 2*time.Minute, "everything is shipped", func() bool { return m.state(t).Projection.Lag == 0 })
	m.mustBeClean(t)
	m.stop(t)
	k := &killer{T: t, dir: m.dir, clients: l}
	t.Logf("%d entries, %d signatures", k.judgeJournal(), len(l.made))
	judgeDatabase(t, c, name, k)
}

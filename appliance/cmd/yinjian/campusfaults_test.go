package main_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"yinjian/api/client"
	"yinjian/dbdriver/dbtest"
)

// TestCampusKills: two appliances over one PostgreSQL, sixteen clients at each, an administrator at each who stops and
// starts one signer. At random moments either appliance, a part of it or the database is killed, the database is frozen, the
// line between the campuses is cut or swallows; with YINJIAN_LONG=1 until 200 were killed. Afterwards every acknowledged
// signature is in one journal and in the database once, at the same place, and both directories are the same.
func TestCampusKills(t *testing.T) {
	t.Parallel()
	rounds, most := 6, 1<<30
	if os.Getenv("YINJIAN_LONG") != "" {
		rounds, most = 1<<30, 200
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 5))
	l := newLand(t)
	c := dbtest.StartPostgres(t)
	name := c.Fresh(t)
	var ends [2]*campus
	var killers [2]*killer
	for i := range ends {
		ends[i] = newCampus(t, l, i, c.DSN(name))
		ends[i].launch(t)
	}
	const shared = "A1" // whom both administrators decide on
	for i, e := range ends {
		e.await(t)
		e.trusted(t)
		side := [2]string{"a", "b"}[i]
		signer := [2]string{"A1", "B1"}[i]
		e.enrol(t, signer, "")
		k := &killer{
			T: t, rnd: rnd, dir: e.place, binary: l.inside(t, i, built.init),
			slowest: map[string]time.Duration{}, kills: map[string]int{}, ends: map[string]int{},
		}
		var configs []client.Config
		for n := range retryApps {
			id := fmt.Sprintf("%s-%d", side, n)
			e.register(t, id, "--consent", "app-asserted")
			configs = append(configs, e.clientConfig(t, id))
		}
		if i == 0 {
			e.enrol(t, "A2", "") // signs; A1 is stopped now and then
			signer = "A2"
		}
		k.clients = newRetryLoad(t, configs, []string{signer}, k.app.Load)
		t.Cleanup(k.clients.end)
		k.m = e.machine
		killers[i] = k
	}
	pairUp(t, ends[0].machine, ends[1].machine)
	for _, k := range killers {
		k.mustReturn("pairing")
	}
	again := func(k *killer) {
		k.app.Store((k.app.Load() + 1) % retryApps)
		k.start()
	}
	killed := func() (n int) {
		for _, k := range killers {
			for _, sum := range k.kills {
				n += sum
			}
		}
		return n
	}
	decisions := map[string]int{} // by what became of them
	for round := 0; round < rounds && killed() < most; round++ {
		k := killers[rnd.IntN(2)]
		what := []string{"appliance", "a part", "both appliances", "database", "database frozen", "line"}[round%6]
		time.Sleep(k.upTo(300 * time.Millisecond))
		heal := func() {}
		switch what {
		case "appliance":
			k.strike("appliance", syscall.SIGKILL)
			again(k)
		case "a part":
			k.strike(parts[rnd.IntN(len(parts))], syscall.SIGKILL)
		case "both appliances":
			for _, k := range killers {
				k.strike("appliance", syscall.SIGKILL)
			}
			for _, k := range killers {
				again(k)
			}
		case "database":
			c.Kill()
			k.kills["database"]++
			heal = func() { c.Start(t) }
		case "database frozen":
			c.Freeze()
			heal = c.Thaw
		case "line":
			l.cut(t)
			heal = func() { l.mend(t) }
			if rnd.IntN(2) == 0 {
				l.mend(t)
				l.swallow(t)
				heal = func() { l.release(t) }
			}
		}
		decided := make(chan string, 2)
		for i, k := range killers {
			go func() { decided <- decide(t, k.dir, shared, (round+i)%2 == 0) }()
		}
		for _, k := range killers {
			k.mustReturn(what) // signing goes on, or comes back, whatever else is away
		}
		time.Sleep(k.upTo(500 * time.Millisecond))
		heal()
		for range killers {
			decisions[<-decided]++
		}
		if t.Failed() {
			return
		}
	}
	for _, k := range killers {
		k.clients.end()
		k.m.await(t)
		k.m.trusted(t)
	}
	var size [2]uint64
	for i, k := range killers {
		size[i] = k.m.state(t).Journal.Entries
	}
	for i, k := range killers {
		eventually(t, time.Minute, "the other campus has heard and cosigned everything", func() bool {
			k.again()
			p := k.m.peer(t)
			return p.Up && p.Gotten >= size[i] && p.Split == "" && p.Accused == ""
		})
		k.m.mustBeClean(t)
	}
	// One more decision at either campus: nothing is frozen, nothing waits.
	mustRun(t, "signer", "stop", shared, "--dir", killers[0].dir, "--reason", "x")
	eventually(t, time.Minute, "a start at the other campus", func() bool {
		return yinjian(t, "signer", "start", shared, "--dir", killers[1].dir, "--reason", "x").code == 0
	})
	versions := func(k *killer) string { return mustRun(t, "directory", "versions", "--dir", k.dir).stdout }
	eventually(t, time.Minute, "both directories are the same", func() bool { return versions(killers[0]) == versions(killers[1]) })
	for i, k := range killers {
		if o := mustRun(t, "directory", "status", "--dir", k.dir); o.code != 0 {
			t.Errorf("%v", o)
		}
		k.m.stop(t)
		t.Logf("%s%s", campusNames[i], k.ledger(k.judgeJournal()))
	}
	judgeDatabase(t, c, name, killers[0], killers[1])
	t.Logf("decisions: %v", decisions)
}

// decide has the signer stopped or started, and answers what became of it.
func decide(t *testing.T, dir, signer string, stop bool) string {
	act := "start"
	if stop {
		act = "stop"
	}
	if o := yinjian(t, "signer", act, signer, "--dir", dir, "--reason", "x"); o.code != 0 {
		return "refused, or not running"
	}
	return "decided"
}

// TestDatabaseLine: the line to the database swallows every packet, first at one campus and then at both, while both sign and the line
// between them is up. Connections hang that were open, and new ones do not come about. Signing goes on; the state says what is
// away; changes of the directory are refused with a reason where it is, and are made where it is not. Afterwards all is shipped
// and both directories are the same.
func TestDatabaseLine(t *testing.T) {
	t.Parallel()
	pause := time.Duration(0)
	if os.Getenv("YINJIAN_LONG") != "" {
		pause = 3 * time.Minute
	}
	l := newLand(t)
	at := l.databaseLines(t)
	pg := dbtest.NewCluster(t)
	pg.Init(t)
	pg.Listen(t, at[:]...)
	pg.Start(t)
	name := pg.Fresh(t)
	var ends [2]*campus
	for i := range ends {
		ends[i] = newCampus(t, l, i, fmt.Sprintf("host=%s port=%d user=yinjian dbname=%s sslmode=disable", at[i], pg.Port, name))
		ends[i].launch(t)
	}
	var loads [2]*rounds
	for i, e := range ends {
		e.await(t)
		e.trusted(t)
		e.enrol(t, [2]string{"A1", "B1"}[i], "")
		e.enrol(t, [2]string{"A2", "B2"}[i], "")
		loads[i] = startRounds(t, e.register(t, [2]string{"his", "emr"}[i], "--consent", "app-asserted"), [2]string{"A1", "B1"}[i])
	}
	pairUp(t, ends[0].machine, ends[1].machine)
	shipped := func(i int) func() bool { return func() bool { return ends[i].state(t).Projection.Lag < 100 } }
	change := func(i int, act, signer string) outcome {
		return yinjian(t, "signer", act, signer, "--dir", ends[i].dir, "--reason", "x")
	}
	for round, lost := range [][]int{{0}, {0, 1}} {
		for i := range ends {
			eventually(t, time.Minute, "entries are shipped", shipped(i))
		}
		for _, i := range lost {
			l.losePackets(t, i)
		}
		for _, i := range lost {
			before := ends[i].state(t).Projection.Lag
			eventually(t, time.Minute, "the lag grows", func() bool { return ends[i].state(t).Projection.Lag > before+20 })
			if o := change(i, "stop", "A2"); o.code != 1 || !strings.Contains(o.stderr, "[centre_unavailable]") || !strings.Contains(o.stderr, "签名与时间戳不受影响") {
				t.Errorf("a change without the database: %v", o)
			}
		}
		time.Sleep(pause)
		for _, i := range lost {
			if round > 0 { // once a batch's time is over
				eventually(t, 2*time.Minute, "the state says what is away", func() bool {
					return strings.Contains(mustRun(t, "status", "--dir", ends[i].dir).stdout, "库不可用")
				})
			}
		}
		for i, e := range ends {
			loads[i].goesOn(t, 20)
			if s := e.state(t); !s.Ready {
				t.Errorf("%s is not ready: %+v", campusNames[i], s)
			}
			if p := e.peer(t); !p.Up || p.Error != "" {
				t.Errorf("the other campus of %s: %+v", campusNames[i], p)
			}
		}
		if round == 0 { // the other campus decides, and this one hears of it over their own line
			if o := change(1, "stop", "B2"); o.code != 0 {
				t.Errorf("a change where the database is: %v", o)
			}
			emr := ends[0].client(t, "his")
			eventually(t, time.Minute, "the stop is known at the campus without the database", func() bool {
				return codeOf(t, emr, "B2", fmt.Sprint("stopped-", time.Now().UnixNano())) == "signer_stopped"
			})
		}
		for _, i := range lost {
			l.findPackets(t, i)
		}
		for _, i := range lost {
			eventually(t, 2*time.Minute, "entries are shipped again", shipped(i))
			eventually(t, time.Minute, "a change", func() bool { return change(i, "stop", "A2").code == 0 })
			eventually(t, time.Minute, "a change back", func() bool { return change(i, "start", "A2").code == 0 })
		}
	}
	for i, e := range ends {
		loads[i].goesOn(t, 5)
		loads[i].end()
		e.mustBeClean(t)
	}
	versions := func(i int) string { return mustRun(t, "directory", "versions", "--dir", ends[i].dir).stdout }
	eventually(t, time.Minute, "both directories are the same", func() bool { return versions(0) == versions(1) })
}

// TestPowerCutAfterDecision: both appliances, with all that is below them, and the database lose their power when the database has
// a decision on its disk and has not answered yet. Afterwards the decision is there and its change is not: the version is filled, at
// both campuses, whoever starts first, and the next change is made.
func TestPowerCutAfterDecision(t *testing.T) {
	t.Parallel()
	l := newLand(t)
	pg := dbtest.StartPostgres(t)
	name := pg.Fresh(t)
	ends := [2]*campus{newCampus(t, l, 0, pg.DSN(name)), newCampus(t, l, 1, pg.DSN(name))}
	for i, e := range ends {
		e.serve(t)
		e.enrol(t, [2]string{"A1", "B1"}[i], "")
	}
	pairUp(t, ends[0].machine, ends[1].machine)
	has := func(e *campus, kind, object string) int {
		n := 0
		for _, one := range entries(t, e.dir, kind) {
			if one.Object == object {
				n++
			}
		}
		return n
	}
	eventually(t, time.Minute, "everything is shipped", func() bool { return ends[0].state(t).Projection.Lag == 0 && ends[1].state(t).Projection.Lag == 0 })

	// A commit that waits for a standby that never comes is on the disk, and holds its locks.
	pg.Exec(t, "postgres", `ALTER SYSTEM SET synchronous_standby_names = 'nobody'`)
	pg.Exec(t, "postgres", `SELECT pg_reload_conf()`)
	stopping := exec.Command(built.binary, "signer", "stop", "A1", "--dir", ends[0].dir, "--reason", "x")
	if err := stopping.Start(); err != nil {
		t.Fatal(err)
	}
	db := pg.Open(t, name)
	eventually(t, time.Minute, "the decision is on the disk", func() bool {
		var n int
		err := db.QueryRowContext(t.Context(), `SELECT COUNT(*) FROM pg_stat_activity a JOIN pg_locks l ON l.pid = a.pid WHERE a.wait_event = 'SyncRep' AND l.relation = 'yj_decision'::regclass`).Scan(&n)
		if err != nil {
			t.Fatal(err)
		}
		return n > 0
	})
	db.Close()
	for _, e := range ends {
		all := descendants(t, e.cmd.Process.Pid)
		e.kill(t)
		for _, p := range all {
			if p.alive() {
				_ = syscall.Kill(p.pid, syscall.SIGKILL)
			}
		}
	}
	pg.Kill()
	if err := stopping.Wait(); err == nil {
		t.Error("the change was acknowledged")
	}

	pg.Args = append(pg.Args, "-c", "synchronous_standby_names=")
	pg.Start(t)
	ends[1].serve(t) // whoever has not decided comes first
	var o outcome
	eventually(t, time.Minute, "the database answers", func() bool {
		o = yinjian(t, "signer", "stop", "A1", "--dir", ends[1].dir, "--reason", "x")
		return !strings.Contains(o.stderr, "[centre_unavailable]")
	})
	if o.code != 1 || !strings.Contains(o.stderr, "[directory_behind]") {
		t.Errorf("a change of what the other campus may have changed: %v", o)
	}
	ends[0].serve(t)
	eventually(t, time.Minute, "the version is filled", func() bool { return has(ends[0], "account.filled/outcome", "A1") == 1 })
	his := ends[0].register(t, "his", "--consent", "app-asserted")
	if _, err := his.Sign(t.Context(), "after", asserted("A1", "after")); err != nil {
		t.Errorf("what was not acknowledged has stopped the signer: %v", err)
	}
	eventually(t, time.Minute, "a change at the other campus", func() bool {
		return yinjian(t, "signer", "stop", "A1", "--dir", ends[1].dir, "--reason", "x").code == 0
	})
	eventually(t, time.Minute, "it is known", func() bool {
		return codeOf(t, his, "A1", fmt.Sprint("stopped-", time.Now().UnixNano())) == "signer_stopped"
	})
	versions := func(i int) string { return mustRun(t, "directory", "versions", "--dir", ends[i].dir).stdout }
	eventually(t, time.Minute, "both directories are the same", func() bool { return versions(0) == versions(1) })
	for _, e := range ends {
		e.mustBeClean(t)
	}
}

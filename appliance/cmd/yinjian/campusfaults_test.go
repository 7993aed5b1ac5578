package main_test

import (
	"fmt"
	"math/rand/v2"
	"os"
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

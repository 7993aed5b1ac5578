package uses_test

import (
	"context"
	"maps"
	"os"
	"path/filepath"
	"testing"

	"yinjian/appliance/uses"
	"yinjian/hsm/uselog"
)

// A machineCount stands for a cipher machine that counts.
type machineCount map[string]uint64

func (m machineCount) config(c *uses.Config) {
	c.Sessions, c.Idle = func(string) int { return 4 }, []string{"staff"}
	c.Counters = func(_ context.Context, slot string) (map[string]uint64, error) {
		if slot != "staff" {
			return nil, nil
		}
		return maps.Clone(m), nil
	}
}

// A key that is older than the log begins with what the machine says; from then on each use past the worker is named,
// once, also of a key that the log has never seen. What an end out of order can have left is named without an alarm, and
// no more than that.
func TestCounters(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	for n := range 8 { // a journal that is older than the log
		b.append(entry([]byte{byte(n)}))
	}
	machine := machineCount{"staff/D1": 70, "staff/D2": 5}
	for n := range 3 {
		b.record(n)
	}
	machine["staff/D1"] += 3
	want := 0
	next := func(life byte, final bool, reasons ...string) {
		t.Helper()
		if life > 0 {
			b.start(life)
		}
		s := b.pass(b.reconciler(machine.config), final)
		if len(s.Counters) != 1 || s.Counters[0] != "staff" {
			t.Errorf("counters %v", s.Counters)
		}
		want += len(reasons)
		apart := b.verify().Apart
		if len(apart) != want {
			t.Fatalf("%d differences, want %d: %+v", len(apart), want, apart)
		}
		for i, d := range apart[want-len(reasons):] {
			if d.Reason != reasons[i] {
				t.Errorf("difference %+v, want reason %q", d, reasons[i])
			}
		}
	}
	next(0, true)
	machine["staff/D1"] += 2
	machine["staff/D3"] = 1
	next(2, false, uses.Past, uses.Past)
	next(0, true)
	// The machine was put back.
	machine["staff/D2"]--
	next(3, false, uses.Past)
	// A kill with four under way, at most.
	b.record(10)
	machine["staff/D1"] += 1 + 4
	next(4, false, uses.Ended)
	b.worker(uselog.Hash{4}) // the appliance goes on with another worker
	machine["staff/D1"] += 9
	next(5, false, uses.Past)
	s := b.pass(b.reconciler(machine.config), true)
	if c := s.Slots["staff"]; c.Elsewhere != 2+1-1+4+9 || s.Alarms != 4 {
		t.Errorf("summary %+v", s)
	}
}

// A power cut takes the log's last records: what came of those signatures has entries, which is why the machine counts
// more. What has none is named as an alarm all the same.
func TestCountersAfterPowerCut(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	machine := machineCount{}
	used := func(from, to int) {
		for n := from; n < to; n++ {
			b.record(n)
			machine["staff/D1"]++
		}
	}
	names := func() string {
		files, err := filepath.Glob(filepath.Join(b.dir, "staff-*.uses"))
		if err != nil || len(files) != 1 {
			t.Fatalf("%v, %v", files, err)
		}
		return files[0]
	}
	used(0, 3)
	b.pass(b.reconciler(machine.config), false)
	life := byte(1)
	cut := func(past int) uses.Summary {
		t.Helper()
		st, err := os.Stat(names())
		if err != nil {
			t.Fatal(err)
		}
		used(100*int(life), 100*int(life)+30)
		machine["staff/D1"] += uint64(past)
		b.log.Close()
		if err := os.Truncate(names(), st.Size()); err != nil {
			t.Fatal(err)
		}
		life++
		b.start(life)
		return b.pass(b.reconciler(machine.config), false)
	}
	if s := cut(0); s.Alarms != 0 || s.Slots["staff"].Elsewhere != 30 {
		t.Errorf("30 with entries: %+v", s)
	}
	if s := cut(4); s.Alarms != 0 || s.Slots["staff"].Elsewhere != 30+34 {
		t.Errorf("30 with entries and 4 that were under way: %+v", s)
	}
	if s := cut(9); s.Alarms != 1 || s.Slots["staff"].Elsewhere != 30+34+39 {
		t.Errorf("9 that nothing explains: %+v", s)
	}
	apart := b.verify().Apart
	if len(apart) != 3 || apart[0].Reason != uses.Ended || apart[1].Reason != uses.Ended || apart[2].Reason != uses.Past {
		t.Errorf("%+v", apart)
	}
}

// A machine whose log is found before the machine itself can be asked (it is being added, or has refused its PIN) begins
// with what it says when it is first asked.
func TestCountersOfMachineAskedLater(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	log, err := uselog.Open(b.dir, "staff.b", b.life)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	var machine machineCount
	config := func(c *uses.Config) {
		atOnce(c)
		c.Sessions = func(string) int { return 4 }
		c.Counters = func(_ context.Context, slot string) (map[string]uint64, error) {
			if slot != "staff.b" {
				return nil, nil
			}
			return maps.Clone(machine), nil
		}
	}
	r := b.reconciler(config)
	b.pass(r, false)
	b.pass(r, false)
	machine = machineCount{"staff/D1": 500}
	b.pass(r, false)
	if s := b.pass(r, false); s.Alarms != 0 {
		t.Errorf("what a key had signed before: %+v", s)
	}
	machine["staff/D1"]++
	r = b.reconciler(config)
	b.pass(r, false)
	if s := b.pass(r, false); s.Alarms != 1 {
		t.Errorf("what it signed past the worker: %+v", s)
	}
}

// While a key is used, what is under way is no difference; when it rests, the least one is.
func TestCountersUnderLoad(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	machine := machineCount{}
	r := b.reconciler(func(c *uses.Config) {
		machine.config(c)
		c.Idle = nil
	})
	machine["staff/D1"] = 3 // under way, recorded after the pass
	b.pass(r, false)
	for n := range 3 {
		b.record(n)
	}
	if s := b.pass(r, false); s.Alarms != 0 {
		t.Errorf("under load: %+v", s)
	}
	machine["staff/D1"]++
	r = b.reconciler(machine.config)
	if s := b.pass(r, false); s.Alarms != 1 || s.Slots["staff"].Elsewhere != 1 {
		t.Errorf("at rest: %+v", s)
	}
}

// What is signed between the reading of the machine's count and that of the log is no difference, now or later, at the first
// comparison and at others; nor does it hide one.
func TestCountersReadWhileUsed(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	machine := machineCount{"staff/D1": 0}
	n, busy := 0, true
	used := func() {
		machine["staff/D1"]++
		b.record(n)
		n++
	}
	config := func(c *uses.Config) {
		machine.config(c)
		c.Idle = nil
		ask := c.Counters
		c.Counters = func(ctx context.Context, slot string) (map[string]uint64, error) {
			counts, err := ask(ctx, slot)
			if busy && slot == "staff" {
				used()
				used()
			}
			return counts, err
		}
	}
	pass := func(what string, alarms uint64) {
		t.Helper()
		r := b.reconciler(config)
		b.pass(r, false)
		if s := b.pass(r, false); s.Alarms != alarms {
			t.Errorf("%s: %+v", what, s)
		}
	}
	used()
	pass("the first comparison", 0)
	used()
	pass("the second", 0)
	busy = false
	pass("at rest", 0)
	machine["staff/D1"] -= 3 // put back by more than can have been signed between
	busy = true
	pass("put back", 1)
}

package ntp_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"yinjian/ntp"
)

// A machine is a kernel with clocks that tests turn. True time is separate from all of them.
type machine struct {
	mu                         sync.Mutex
	boot, mono, raw, wall, now time.Duration // wall and now (true time) since noon
	ppm                        int           // the oscillator's error: boot, mono and raw gain ppm on now
	bend                       int           // by adjtimex(2): boot, mono and wall gain ppm on raw
}

func (m *machine) read(d *time.Duration) time.Duration { m.mu.Lock(); defer m.mu.Unlock(); return *d }
func (m *machine) Boot() time.Duration                 { return m.read(&m.boot) }
func (m *machine) Monotonic() time.Duration            { return m.read(&m.mono) }
func (m *machine) Raw() time.Duration                  { return m.read(&m.raw) }
func (m *machine) Realtime() time.Time                 { return noon.Add(m.read(&m.wall)) }
func (m *machine) truth() time.Time                    { return noon.Add(m.read(&m.now)) }

// pass lets true time go on.
func (m *machine) pass(d time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.now += d
	d += d / 1_000_000 * time.Duration(m.ppm)
	m.raw += d
	d += d / 1_000_000 * time.Duration(m.bend)
	m.boot, m.mono, m.wall = m.boot+d, m.mono+d, m.wall+d
}

func (m *machine) change(f func()) { m.mu.Lock(); defer m.mu.Unlock(); f() }

// A bench is a clock under test, with what it told.
type bench struct {
	*testing.T
	*machine
	*ntp.Clock
	told []string
}

func newBench(t *testing.T, cfg ntp.Config) *bench {
	t.Helper()
	b := &bench{T: t, machine: &machine{boot: time.Hour, mono: time.Hour, raw: time.Hour}}
	c, err := ntp.NewClock(cfg, b.machine)
	if err != nil {
		t.Fatal(err)
	}
	b.Clock = c
	b.Clock.OnChange(b.tell)
	return b
}

func (b *bench) tell(from, to ntp.State, reason string, r ntp.Reading) {
	if r.State != to || reason == "" || from == to {
		b.Errorf("told %s to %s (%q) with a reading in %s", from, to, reason, r.State)
	}
	b.told = append(b.told, string(to))
}

// round lets a second pass and the named sources answer with true time + off, give or take half.
func (b *bench) round(off, half time.Duration, names ...string) ntp.Round {
	b.pass(time.Second)
	return b.at(off, half, names...)
}

func (b *bench) at(off, half time.Duration, names ...string) ntp.Round {
	if names == nil {
		names = []string{"a", "b", "c"}
	}
	var in []ntp.Measurement
	for _, n := range names {
		in = append(in, b.measure(n, off, half))
	}
	return b.Update(in)
}

func (b *bench) measure(name string, off, half time.Duration) ntp.Measurement {
	m := says(name, off, half)
	m.UTC, m.Boot, m.Bent = b.truth().Add(off), b.Boot(), b.Monotonic()-b.Raw()
	return m
}

func (b *bench) trusted(half time.Duration, names ...string) *bench {
	b.Helper()
	for range 3 {
		if r := b.round(0, half, names...); r.Err != nil {
			b.Fatal(r.Err)
		}
	}
	b.want(ntp.Trusted)
	return b
}

func (b *bench) want(s ntp.State) ntp.Reading {
	b.Helper()
	r := b.Now()
	if r.State != s {
		b.Fatalf("state %s, want %s (changes: %v, last round: %v)", r.State, s, b.told, b.Last().Err)
	}
	if r.Trusted() {
		if d := b.truth().Sub(r.Time); d.Abs() > r.Bound {
			b.Fatalf("reading is %v off, bound %v", d, r.Bound)
		}
	}
	return r
}

func TestFirstTrust(t *testing.T) {
	t.Parallel()
	b := newBench(t, ntp.Config{PolicyNote: "本机时间，仅演示"})
	if r := b.want(ntp.Cold); !r.Time.IsZero() {
		t.Errorf("cold clock shows %v", r.Time)
	}
	if r := b.round(0, ms, "a", "b"); !errors.Is(r.Err, ntp.ErrTooFew) {
		t.Errorf("two groups where three are wanted: %v", r.Err)
	}
	b.round(0, 60*ms)
	b.want(ntp.Acquiring)
	b.round(0, 60*ms, "a") // breaks the row
	b.want(ntp.Cold)
	b.round(0, 60*ms)
	b.round(0, 60*ms)
	if r := b.want(ntp.Acquiring); !r.Time.IsZero() {
		t.Errorf("acquiring clock shows %v", r.Time)
	}
	b.round(0, 60*ms)
	r := b.want(ntp.Trusted)
	if !strings.HasPrefix(r.Provenance, "a+b+c, 3 of 3 groups; 本机时间") {
		t.Errorf("provenance %q", r.Provenance)
	}
	if got, want := fmt.Sprint(b.told), "[acquiring cold acquiring trusted]"; got != want {
		t.Errorf("told %s, want %s", got, want)
	}
}

// TestRoundsMustAgreeWithOneAnother: three majorities, each elsewhere, are no agreement.
func TestRoundsMustAgreeWithOneAnother(t *testing.T) {
	t.Parallel()
	b := newBench(t, ntp.Config{})
	for i := range 6 {
		b.round(time.Duration(i)*time.Second, 10*ms)
		b.want(ntp.Acquiring)
	}
}

// TestHoldover has the numbers of the policy: 60 ms, accuracy 1 s, 50 ppm make (1−0.06)/50e-6 = 18800 s = 5.2 h.
func TestHoldover(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		bound, max time.Duration
		ppm        int
		last       time.Duration // the last second trusted, after the last agreement
	}{
		{60 * ms, time.Second, 50, 18800 * time.Second},
		{60 * ms, time.Second, 15, 62666 * time.Second},
		{60 * ms, 500 * ms, 50, 8800 * time.Second},
	} {
		b := newBench(t, ntp.Config{MaxBound: c.max, DriftPPM: c.ppm, AgreeRounds: 1})
		b.at(0, c.bound)
		if r := b.want(ntp.Trusted); r.Bound != c.bound {
			t.Fatalf("bound %v, want %v", r.Bound, c.bound)
		}
		b.pass(1000 * time.Second)
		if r, want := b.want(ntp.Holdover), c.bound+time.Duration(c.ppm)*ms; r.Bound != want {
			t.Errorf("bound after 1000 s %v, want %v", r.Bound, want)
		}
		b.pass(c.last - 1000*time.Second)
		b.want(ntp.Holdover)
		b.pass(time.Second)
		if r := b.want(ntp.Untrusted); r.Trusted() || r.Bound <= c.max {
			t.Errorf("%v after %v: bound %v, ceiling %v", r.State, c.last, r.Bound, c.max)
		}
		if got, want := fmt.Sprint(b.told), "[acquiring trusted holdover untrusted]"; got != want {
			t.Errorf("told %s, want %s", got, want)
		}
		// It comes back by agreement only.
		b.AgreeAgain(c.bound)
	}
}

func (b *bench) AgreeAgain(half time.Duration) {
	b.Helper()
	b.round(0, half)
	b.want(ntp.Trusted)
}

func TestHoldoverCap(t *testing.T) {
	t.Parallel()
	b := newBench(t, ntp.Config{HoldoverMax: time.Hour, AgreeRounds: 1})
	b.at(0, ms)
	b.pass(time.Hour)
	b.want(ntp.Holdover)
	b.pass(1)
	b.want(ntp.Untrusted)
}

// TestLostPacketIsNoEvent, while contradiction is.
func TestLostPacketIsNoEvent(t *testing.T) {
	t.Parallel()
	b := newBench(t, ntp.Config{}).trusted(60 * ms)
	if r := b.round(0, 60*ms, "a"); !errors.Is(r.Err, ntp.ErrTooFew) {
		t.Error(r.Err)
	}
	b.want(ntp.Trusted)
	b.pass(time.Second)
	if r := b.Update([]ntp.Measurement{b.measure("a", 0, ms), b.measure("b", time.Second, ms)}); !errors.Is(r.Err, ntp.ErrNoMajority) {
		t.Error(r.Err)
	}
	b.want(ntp.Holdover)
	b.round(0, 60*ms)
	b.want(ntp.Trusted)
}

func TestOutvotedLiar(t *testing.T) {
	t.Parallel()
	b := newBench(t, ntp.Config{MinSources: 2}).trusted(60 * ms)
	b.pass(time.Second)
	r := b.Update([]ntp.Measurement{b.measure("a", 0, 60*ms), b.measure("b", 0, 60*ms), b.measure("c", 5*time.Second, 60*ms)})
	if r.Err != nil || fmt.Sprint(r.Rejected) != "[c]" {
		t.Errorf("round %+v", r)
	}
	if got := b.want(ntp.Trusted).Provenance; !strings.HasPrefix(got, "a+b, 2 of 3 groups") {
		t.Errorf("provenance %q", got)
	}
}

// TestJump is the spoof of a whole majority: refused at once, and not let in without an operator.
func TestJump(t *testing.T) {
	t.Parallel()
	for name, lie := range map[string]time.Duration{"ahead": 5 * time.Second, "back": -5 * time.Second} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBench(t, ntp.Config{}).trusted(60 * ms)
			if r := b.round(lie, 60*ms); !errors.Is(r.Err, ntp.ErrJump) || (r.Offset-lie).Abs() > time.Millisecond {
				t.Errorf("round %+v", r)
			}
			b.want(ntp.Suspect)
			if err := b.Readmit(); err == nil {
				t.Error("readmitted a majority that has not lasted")
			}
			var r ntp.Round
			for range 10 {
				r = b.round(lie, 60*ms)
				b.want(ntp.Suspect)
			}
			if !errors.Is(r.Err, ntp.ErrOperator) {
				t.Errorf("round %+v, want ErrOperator", r)
			}
			// The truth returns: three rounds, no operator.
			b.round(0, 60*ms)
			b.round(0, 60*ms)
			b.want(ntp.Suspect)
			b.round(0, 60*ms)
			b.want(ntp.Trusted)
		})
	}
}

func TestReadmit(t *testing.T) {
	t.Parallel()
	b := newBench(t, ntp.Config{}).trusted(60 * ms)
	was := b.want(ntp.Trusted)
	b.change(func() { b.now += 5 * time.Second }) // it is we who were wrong: a paused virtual machine
	for range 5 {
		b.round(0, 60*ms)
	}
	b.want(ntp.Suspect)
	if err := b.Readmit(); err != nil {
		t.Fatal(err)
	}
	// Permission is for that majority, not for the next one.
	b.round(-2*time.Second, 60*ms)
	for range 4 {
		b.round(0, 60*ms)
	}
	b.want(ntp.Suspect)
	if err := b.Readmit(); err != nil {
		t.Fatal(err)
	}
	b.round(0, 60*ms)
	if r := b.want(ntp.Trusted); r.Time.Before(was.Time.Add(5 * time.Second)) {
		t.Errorf("readmitted, but shows %v", r.Time)
	}
}

// TestNeverBackwards: not even an operator makes the time vouched for unsaid.
func TestNeverBackwards(t *testing.T) {
	t.Parallel()
	b := newBench(t, ntp.Config{})
	for range 3 {
		b.round(10*time.Second, 60*ms) // a lie from the start
	}
	r := b.Now()
	if r.State != ntp.Trusted {
		t.Fatal(r.State)
	}
	for range 4 {
		b.round(0, 60*ms)
	}
	if err := b.Readmit(); err != nil {
		t.Fatal(err)
	}
	var rounds int
	for b.Now().State == ntp.Suspect && rounds < 20 {
		rounds++
		if got := b.round(0, 60*ms); b.Now().State == ntp.Suspect && !errors.Is(got.Err, ntp.ErrBackwards) {
			t.Fatalf("round %+v, want ErrBackwards", got)
		}
	}
	if again := b.want(ntp.Trusted); again.Time.Before(r.Time) || rounds < 4 {
		t.Errorf("after %d rounds shows %v, had vouched for %v", rounds, again.Time, r.Time)
	}
}

// TestHeldBack: a small correction backwards repeats the last time, and the bound says so.
func TestHeldBack(t *testing.T) {
	t.Parallel()
	b := newBench(t, ntp.Config{AgreeRounds: 1})
	b.at(50*ms, 60*ms)
	r1 := b.want(ntp.Trusted)
	b.at(-50*ms, 60*ms) // both contain the truth; together they leave ±10 ms
	r2 := b.want(ntp.Trusted)
	if !r2.Time.Equal(r1.Time) || r2.Bound != 60*ms {
		t.Errorf("held %v ± %v, want %v ± 60ms", r2.Time, r2.Bound, r1.Time)
	}
	b.pass(50*ms + 1)
	if r3 := b.want(ntp.Trusted); !r3.Time.After(r1.Time) || r3.Bound > 11*ms {
		t.Errorf("after catching up %v ± %v", r3.Time, r3.Bound)
	}
}

// TestCreep: a majority that walks away slowly runs out of the interval that our own clock allows.
func TestCreep(t *testing.T) {
	t.Parallel()
	b := newBench(t, ntp.Config{}).trusted(60 * ms)
	var off time.Duration
	for b.Now().State == ntp.Trusted {
		off += 2 * ms
		if off > time.Second {
			t.Fatal("carried off by a second")
		}
		b.round(off, 60*ms)
	}
	b.Now()
	if off > 130*ms || b.Now().State != ntp.Suspect {
		t.Errorf("noticed at %v in state %s", off, b.Now().State)
	}
}

// TestDisturbances of the machine's clocks make the clock suspect at once, in Now, before any round.
func TestDisturbances(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		disturb func(m *machine)
		inNow   bool
		why     string // if it is found by a round
	}{
		"wall clock forward": {func(m *machine) { m.wall += time.Second }, true, ""},
		"wall clock back":    {func(m *machine) { m.wall -= 200 * ms }, true, ""},
		"sleep":              {func(m *machine) { m.boot += time.Minute; m.wall += time.Minute; m.now += time.Minute }, true, ""},
		"snapshot restored":  {func(m *machine) { m.boot, m.mono, m.wall = m.boot-time.Minute, m.mono-time.Minute, m.wall-time.Minute }, true, ""},
		"restored to after the last round": {func(m *machine) {
			m.boot, m.mono, m.raw, m.wall = m.boot-30*time.Second, m.mono-30*time.Second, m.raw-30*time.Second, m.wall-30*time.Second
		}, false, "went back"},
		"slewed by 300 ms":     {func(m *machine) { m.boot, m.mono, m.wall = m.boot+300*ms, m.mono+300*ms, m.wall+300*ms }, false, "slewed by 300ms"},
		"step below the bound": {func(m *machine) { m.wall += 20 * ms }, true, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBench(t, ntp.Config{}).trusted(60 * ms)
			if name == "restored to after the last round" { // a minute without an answer, nor a caller of Now
				b.pass(40 * time.Second)
				b.Update(nil)
			}
			b.change(func() { c.disturb(b.machine) })
			if name == "step below the bound" {
				b.want(ntp.Trusted)
				return
			}
			if c.inNow {
				b.want(ntp.Suspect)
			} else if r := b.round(0, 60*ms); r.Err == nil || !strings.Contains(r.Err.Error(), c.why) {
				t.Errorf("round %+v", r)
			}
			b.want(ntp.Suspect)
			for range 3 {
				b.want(ntp.Suspect)
				b.round(0, 60*ms)
			}
			if strings.Contains(name, "restored") { // our count has lost a minute: nobody but an operator can tell who is right
				b.want(ntp.Suspect)
				return
			}
			b.want(ntp.Trusted)
		})
	}
}

// TestBentClock: a frequency correction within what adjtimex(2) may set for good is no disturbance, but the bound has to
// grow by it, in Holdover and from round to round.
func TestBentClock(t *testing.T) {
	t.Parallel()
	for _, bend := range []int{450, -450} {
		b := newBench(t, ntp.Config{}).trusted(10 * ms)
		b.change(func() { b.bend = bend })
		for i := range 200 {
			b.pass(15 * time.Second)
			if r := b.round(time.Duration(i%19-9)*ms, 10*ms); r.Err != nil {
				t.Fatal(r.Err)
			}
			b.want(ntp.Trusted) // and wrong by no more than it admits
		}
		b.pass(1000 * time.Second)
		if r := b.want(ntp.Holdover); r.Bound < 500*ms {
			t.Errorf("bound %v after 1000 s at %d ppm, want 450 ppm and the oscillator's 50", r.Bound, bend)
		}
		raw, err := json.Marshal(b.Snapshot("boot-1"))
		if err != nil {
			t.Fatal(err)
		}
		var snap ntp.Snapshot
		if err := json.Unmarshal(raw, &snap); err != nil {
			t.Fatal(err)
		}
		c, err := ntp.NewClock(ntp.Config{}, b.machine)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Restore(snap, "boot-1"); err != nil {
			t.Fatal(err)
		}
		if r, was := c.Now(), b.want(ntp.Holdover); (r.Bound-was.Bound).Abs() > 1 || r.State != ntp.Holdover {
			t.Errorf("restored %v, %s, want %v", r.Bound, r.State, was.Bound)
		}
		b.pass(1100 * time.Second)
		b.want(ntp.Untrusted)
	}
}

// TestBentWithinARound: a round waits for its slowest source, and what the clock is bent by meanwhile is in none of the
// answers that came before.
func TestBentWithinARound(t *testing.T) {
	t.Parallel()
	for _, bend := range []int{80_000, -80_000} {
		b := newBench(t, ntp.Config{}).trusted(2 * ms)
		b.pass(40 * time.Second)
		var early []ntp.Measurement
		for _, name := range []string{"a", "b", "c"} {
			early = append(early, b.measure(name, 0, 2*ms))
		}
		b.change(func() { b.bend = bend })
		b.pass(250 * time.Millisecond) // 20 ms, too little to be noticed as a slew
		b.change(func() { b.bend = 0 })
		if r := b.Update(early); r.Err != nil {
			t.Fatal(r.Err)
		}
		b.want(ntp.Trusted) // and wrong by no more than it admits
		b.round(0, 2*ms)
		b.want(ntp.Trusted)
	}
}

// TestAnswerFromBeforeADisturbance does not count as fresh, even if the disturbance was noticed before the round.
func TestAnswerFromBeforeADisturbance(t *testing.T) {
	t.Parallel()
	b := newBench(t, ntp.Config{MinSources: 1, AgreeRounds: 1})
	b.at(0, 60*ms, "a")
	b.want(ntp.Trusted)
	early := b.measure("a", 0, 60*ms)
	b.change(func() { b.boot += 30 * time.Second; b.wall += 30 * time.Second; b.now += 31 * time.Second }) // sleep, badly counted
	b.want(ntp.Suspect)
	if r := b.Update([]ntp.Measurement{early}); !errors.Is(r.Unfit["a"], ntp.ErrUnfit) {
		t.Errorf("round %+v, want the answer from before the sleep unfit", r)
	}
	b.want(ntp.Suspect)
}

// TestSmallJumpsAddUp: who owns the majority may move a clock by the re-entry limit, not by that much each minute.
func TestSmallJumpsAddUp(t *testing.T) {
	t.Parallel()
	jump := func(b *bench, lie time.Duration) ntp.Round {
		for range 3 {
			b.round(lie, 10*ms)
		}
		return b.round(lie, 10*ms)
	}
	b := newBench(t, ntp.Config{MinSources: 1}).trusted(10*ms, "a")
	if r := jump(b, 600*ms); r.Err != nil || b.Now().State != ntp.Trusted {
		t.Fatalf("within the limit: %v, %s", r.Err, b.Now().State)
	}
	if r := jump(b, 1200*ms); !errors.Is(r.Err, ntp.ErrOperator) || b.Now().State != ntp.Suspect {
		t.Fatalf("the second: %v, %s, want ErrOperator", r.Err, b.Now().State)
	}
	// A restart forgets nothing.
	c, err := ntp.NewClock(ntp.Config{MinSources: 1}, b.machine)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Restore(b.Snapshot("boot-1"), "boot-1"); err != nil {
		t.Fatal(err)
	}
	if r := jump(&bench{T: t, machine: b.machine, Clock: c}, 1200*ms); !errors.Is(r.Err, ntp.ErrOperator) {
		t.Errorf("after a restart: %v, want ErrOperator", r.Err)
	}
	// An operator's word begins a new count, and so does a day without a jump.
	if err := b.Readmit(); err != nil {
		t.Fatal(err)
	}
	b.round(1200*ms, 10*ms)
	if r := jump(b, 1800*ms); r.Err != nil {
		t.Errorf("after an operator's word: %v", r.Err)
	}
	for range 25 * 4 {
		b.pass(15 * time.Minute)
		b.round(1800*ms, 10*ms)
	}
	if r := jump(b, 2400*ms); r.Err != nil {
		t.Errorf("a day later: %v", r.Err)
	}
}

// TestDisturbedWhileAcquiring: what rounds agreed on before a step does not count.
func TestDisturbedWhileAcquiring(t *testing.T) {
	t.Parallel()
	b := newBench(t, ntp.Config{})
	b.round(0, 60*ms)
	b.round(0, 60*ms)
	b.change(func() { b.wall += time.Hour })
	if r := b.round(0, 60*ms); r.Err == nil {
		t.Error("a round across a step was used")
	}
	b.round(0, 60*ms)
	b.round(0, 60*ms)
	b.want(ntp.Acquiring)
	b.round(0, 60*ms)
	b.want(ntp.Trusted)
}

func TestLeapSecond(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		leap  ntp.Leap
		shift time.Duration // of Unix time
	}{
		"inserted": {ntp.LeapInsert, -time.Second}, "deleted": {ntp.LeapDelete, time.Second},
		"insertion that did not come": {ntp.LeapInsert, 0}, "deletion that did not come": {ntp.LeapDelete, 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBench(t, ntp.Config{AgreeRounds: 2})
			month := time.Date(2026, 12, 1, 0, 0, 0, 0, time.UTC)
			announce := func(l ntp.Leap) ntp.Round {
				var in []ntp.Measurement
				for _, n := range []string{"a", "b", "c"} {
					m := b.measure(n, 0, ms)
					m.Leap = l
					in = append(in, m)
				}
				return b.Update(in)
			}
			b.pass(month.Sub(noon) - 12*time.Second)
			for range 2 {
				b.pass(time.Second)
				announce(c.leap)
			}
			b.want(ntp.Trusted)
			for b.truth().Before(month.Add(-1100 * ms)) {
				b.want(ntp.Trusted)
				b.pass(100 * ms)
			}
			b.pass(100 * ms) // 23:59:59
			b.want(ntp.Suspect)
			b.pass(time.Second) // 23:59:60, or 00:00:00
			b.change(func() { b.now += c.shift; b.wall += c.shift })
			for range 20 { // sources are not listened to
				b.pass(100 * ms)
				announce(c.leap)
				if r := b.want(ntp.Suspect); r.Trusted() {
					t.Fatal("trusted within the leap second")
				}
			}
			b.pass(3 * time.Second)
			for range 3 {
				b.pass(time.Second)
				announce(ntp.LeapNone)
			}
			if r := b.want(ntp.Trusted); r.Bound > 5*ms {
				t.Errorf("bound %v", r.Bound)
			}
		})
	}
}

// TestLeapSecondWithAWideBound: the refusal begins when the first of the instants that it may be now is in the leap second,
// and ends after the last.
func TestLeapSecondWithAWideBound(t *testing.T) {
	t.Parallel()
	month := time.Date(2026, 12, 1, 0, 0, 0, 0, time.UTC)
	for _, off := range []time.Duration{-1900 * ms, 0, 1900 * ms} {
		b := newBench(t, ntp.Config{MinSources: 1, AgreeRounds: 1, MaxBound: 3 * time.Second})
		b.pass(month.Sub(noon) - 20*time.Second)
		m := b.measure("a", off, 2*time.Second)
		m.Leap = ntp.LeapInsert
		b.Update([]ntp.Measurement{m})
		b.want(ntp.Trusted)
		for i := range 300 {
			b.pass(100 * ms)
			if i == 209 { // 23:59:60 is over
				b.change(func() { b.now -= time.Second })
			}
			if r := b.Now(); r.Trusted() && b.truth().Sub(r.Time).Abs() > r.Bound {
				t.Fatalf("source %v off: reading is %v off, bound %v", off, b.truth().Sub(r.Time), r.Bound)
			}
			if b.truth().After(month.Add(-time.Second)) && b.truth().Before(month.Add(2*time.Second)) {
				if r := b.Update([]ntp.Measurement{b.measure("a", off, 2*time.Second)}); r.Err == nil {
					t.Fatalf("source %v off: a round was taken at %v", off, b.truth())
				}
			}
		}
	}
}

// TestUnheardLeapSecond: at the end of June and December a clock that has heard nobody for longer than a leap second is
// announced cannot know whether there is one. At the end of other months it goes on.
func TestUnheardLeapSecond(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		end   time.Time
		away  time.Duration
		shift time.Duration // by which the second that nobody announced moves Unix time
		stops bool
	}{
		{time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC), 13 * time.Hour, -time.Second, true},
		{time.Date(2027, 7, 1, 0, 0, 0, 0, time.UTC), 13 * time.Hour, time.Second, true},
		{time.Date(2027, 7, 1, 0, 0, 0, 0, time.UTC), 13 * time.Hour, 0, true},
		{time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC), 11 * time.Hour, 0, false},
		{time.Date(2026, 12, 1, 0, 0, 0, 0, time.UTC), 13 * time.Hour, 0, false},
	} {
		b := newBench(t, ntp.Config{MaxBound: 5 * time.Second})
		b.pass(c.end.Sub(noon) - c.away - 3*time.Second)
		b.trusted(10 * ms)
		b.pass(c.away - 4*time.Second) // the bound is 2.3 s or so
		b.want(ntp.Holdover)
		b.pass(4 * time.Second)
		if !c.stops {
			b.want(ntp.Holdover)
			continue
		}
		b.want(ntp.Suspect)
		b.pass(time.Second)
		b.change(func() { b.now += c.shift })
		b.pass(10 * time.Second)
		for range 3 {
			b.want(ntp.Suspect)
			b.round(0, 10*ms)
		}
		b.want(ntp.Trusted) // without an operator
	}
}

// TestStartInLeapSecond: rounds within the last two seconds are not counted.
func TestStartInLeapSecond(t *testing.T) {
	t.Parallel()
	b := newBench(t, ntp.Config{AgreeRounds: 1, MinSources: 1})
	month := time.Date(2026, 12, 1, 0, 0, 0, 0, time.UTC)
	b.pass(month.Sub(noon) - 1900*ms)
	m := b.measure("a", 0, ms)
	m.Leap = ntp.LeapInsert
	if r := b.Update([]ntp.Measurement{m}); !errors.Is(r.Err, ntp.ErrLeap) {
		t.Errorf("round %+v, want ErrLeap", r)
	}
	b.want(ntp.Cold)
	// Nor if the middle of what they say has passed the end of the month already.
	b.pass(1800 * ms)
	m = b.measure("a", 500*ms, 600*ms)
	m.Leap = ntp.LeapInsert
	if r := b.Update([]ntp.Measurement{m}); !errors.Is(r.Err, ntp.ErrLeap) {
		t.Errorf("round %+v, want ErrLeap", r)
	}
}

// TestAcquireOverLeapSecond: rounds before and after the second do not agree with one another, however wide they are.
func TestAcquireOverLeapSecond(t *testing.T) {
	t.Parallel()
	b := newBench(t, ntp.Config{MinSources: 1})
	month := time.Date(2026, 12, 1, 0, 0, 0, 0, time.UTC)
	b.pass(month.Sub(noon) - 4*time.Second)
	m := b.measure("a", 0, 900*ms)
	m.Leap = ntp.LeapInsert
	b.Update([]ntp.Measurement{m})
	b.want(ntp.Acquiring)
	b.pass(6 * time.Second)
	b.change(func() { b.now -= time.Second })
	for range 2 {
		b.round(-400*ms, 900*ms, "a")
		b.want(ntp.Acquiring)
	}
	b.round(-400*ms, 900*ms, "a")
	b.want(ntp.Trusted)
}

func TestSnapshot(t *testing.T) {
	t.Parallel()
	b := newBench(t, ntp.Config{}).trusted(60 * ms)
	last := b.want(ntp.Trusted)
	raw, err := json.Marshal(b.Snapshot("boot-1"))
	if err != nil {
		t.Fatal(err)
	}
	var snap ntp.Snapshot
	if err := json.Unmarshal(raw, &snap); err != nil {
		t.Fatal(err)
	}
	again := func(t *testing.T, snap ntp.Snapshot, boot string, before func(m *machine)) *bench {
		t.Helper()
		m := &machine{boot: b.boot, mono: b.mono, raw: b.raw, wall: b.wall, now: b.now}
		m.pass(1000 * time.Second)
		if before != nil {
			before(m)
		}
		c, err := ntp.NewClock(ntp.Config{}, m)
		if err != nil {
			t.Fatal(err)
		}
		n := &bench{T: t, machine: m, Clock: c}
		c.OnChange(n.tell)
		if err := c.Restore(snap, boot); err != nil {
			t.Fatal(err)
		}
		return n
	}
	t.Run("same boot", func(t *testing.T) {
		n := again(t, snap, "boot-1", nil)
		if r := n.want(ntp.Holdover); r.Bound < 110*ms || r.Bound > 111*ms || r.Provenance != last.Provenance {
			t.Errorf("restored %+v", r)
		}
		n.round(0, 60*ms)
		n.want(ntp.Trusted)
		if err := n.Restore(snap, "boot-1"); !errors.Is(err, ntp.ErrSnapshot) {
			t.Errorf("restoring a clock in use: %v", err)
		}
	})
	t.Run("too long away", func(t *testing.T) {
		again(t, snap, "boot-1", func(m *machine) { m.pass(6 * time.Hour) }).want(ntp.Untrusted)
	})
	t.Run("stepped while away", func(t *testing.T) {
		again(t, snap, "boot-1", func(m *machine) { m.wall += time.Second }).want(ntp.Suspect)
	})
	t.Run("suspect stays suspect", func(t *testing.T) {
		s := snap
		s.State = ntp.Suspect
		again(t, s, "boot-1", nil).want(ntp.Suspect)
	})
	t.Run("other boot", func(t *testing.T) {
		n := again(t, snap, "boot-2", nil)
		n.want(ntp.Cold)
		for range 4 { // a majority that lives in the past
			n.round(-2000*time.Second, 60*ms)
		}
		n.want(ntp.Suspect)
		if err := n.Last().Err; !errors.Is(err, ntp.ErrBackwards) {
			t.Errorf("round: %v, want ErrBackwards", err)
		}
		for range 3 {
			n.round(0, 60*ms)
		}
		n.want(ntp.Trusted)
	})
	t.Run("taken of disturbed clocks", func(t *testing.T) {
		n := again(t, snap, "boot-1", nil)
		n.want(ntp.Holdover)
		n.change(func() {
			d := 900 * time.Second // the anchor is older
			n.boot, n.mono, n.raw, n.wall = n.boot-d, n.mono-d, n.raw-d, n.wall-d
		})
		s := n.Snapshot("boot-1")
		if s.State != ntp.Suspect {
			t.Errorf("snapshot of a restored machine: %s, want suspect", s.State)
		}
		// Nor does a restart lose it, although the anchor may lie ahead.
		n.change(func() {
			n.boot, n.mono, n.raw, n.wall = n.boot-200*time.Second, n.mono-200*time.Second, n.raw-200*time.Second, n.wall-200*time.Second
		})
		if s = n.Snapshot("boot-1"); s.Boot <= s.Taken {
			t.Fatalf("anchor at %v of a snapshot taken at %v", s.Boot, s.Taken)
		}
		c, err := ntp.NewClock(ntp.Config{}, n.machine)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Restore(s, "boot-1"); err != nil || c.Now().State != ntp.Suspect {
			t.Errorf("restart of a clock that is suspect: %v, %s", err, c.Now().State)
		}
	})
	t.Run("nonsense", func(t *testing.T) {
		for name, spoil := range map[string]func(*ntp.Snapshot){
			"future":   func(s *ntp.Snapshot) { s.Boot += time.Second },
			"taken":    func(s *ntp.Snapshot) { s.Taken += 24 * time.Hour },
			"agreed":   func(s *ntp.Snapshot) { s.Agreed += time.Second },
			"negative": func(s *ntp.Snapshot) { s.Bound = -1 },
			"year":     func(s *ntp.Snapshot) { s.UTC = s.UTC.AddDate(900, 0, 0) },
			"emitted":  func(s *ntp.Snapshot) { s.Emitted = s.Emitted.AddDate(900, 0, 0) },
			"leap":     func(s *ntp.Snapshot) { s.Leap = ntp.LeapUnsynchronized },
			"leapless": func(s *ntp.Snapshot) { s.Leap, s.LeapAt = ntp.LeapInsert, time.Time{} },
			"leap at":  func(s *ntp.Snapshot) { s.LeapAt = s.LeapAt.AddDate(900, 0, 0) },
			"bent":     func(s *ntp.Snapshot) { s.Bent = -1 << 63 },
			"moved":    func(s *ntp.Snapshot) { s.Moved = -1 },
			"state":    func(s *ntp.Snapshot) { s.State = "excellent" },
		} {
			s := snap
			spoil(&s)
			c, err := ntp.NewClock(ntp.Config{}, &machine{boot: 2 * time.Hour})
			if err != nil {
				t.Fatal(err)
			}
			if err := c.Restore(s, "boot-1"); !errors.Is(err, ntp.ErrSnapshot) {
				t.Errorf("%s: %v, want ErrSnapshot", name, err)
			}
			if st := c.Now().State; st != ntp.Cold {
				t.Errorf("%s: state %s after refusal", name, st)
			}
		}
	})
}

// TestRandomHistory is the promise itself: whatever the machine goes through, less than half of the sources lying, a
// trusted reading contains the true time and none goes back.
func TestRandomHistory(t *testing.T) {
	t.Parallel()
	var trusted, total int
	for seed := range uint64(150) {
		rng := rand.New(rand.NewPCG(seed, 3))
		b := newBench(t, ntp.Config{MinSources: 2, AgreeRounds: 1 + rng.IntN(3)})
		b.ppm = rng.IntN(99) - 49
		var last time.Time
		for range 400 {
			b.pass(time.Duration(rng.Int64N(int64(20 * time.Second))))
			switch rng.IntN(60) {
			case 0:
				step := time.Duration(rng.Int64N(int64(4*time.Second))) - 2*time.Second
				b.change(func() { b.wall += step })
			case 1:
				b.pass(time.Duration(rng.Int64N(int64(8 * time.Hour)))) // outage
			case 2:
				d := time.Duration(rng.Int64N(int64(time.Hour)))
				b.change(func() { b.boot += d; b.wall += d; b.now += d }) // sleep
			}
			var in []ntp.Measurement
			for i, name := range []string{"a", "b", "c", "d", "e"} {
				half := time.Duration(1 + rng.Int64N(int64(90*ms)))
				off := time.Duration(rng.Int64N(2*int64(half)+1)) - half
				switch {
				case i < 2: // liars
					off = time.Duration(rng.Int64N(int64(400*ms))) - 200*ms
				case rng.IntN(20) == 0: // silent; then the liars may be half, and MinSources has to hold
					if i == 4 {
						continue
					}
				}
				in = append(in, b.measure(name, off, half))
			}
			if len(in) == 5 {
				b.Update(in)
			} else {
				b.Update(nil)
			}
			r := b.Now()
			total++
			if !r.Trusted() {
				continue
			}
			trusted++
			if d := b.truth().Sub(r.Time); d.Abs() > r.Bound {
				t.Fatalf("seed %d: %v off with bound %v", seed, d, r.Bound)
			}
			if r.Time.Before(last) {
				t.Fatalf("seed %d: went back from %v to %v", seed, last, r.Time)
			}
			last = r.Time
		}
	}
	if trusted < total/2 {
		t.Errorf("trusted in %d of %d readings: a clock that is never trusted proves nothing", trusted, total)
	}
}

// TestConcurrentNow: readings taken in an order are in that order, while rounds push the clock to and fro.
func TestConcurrentNow(t *testing.T) {
	t.Parallel()
	b := newBench(t, ntp.Config{AgreeRounds: 1})
	b.at(0, 60*ms)
	var wg sync.WaitGroup
	stop := make(chan struct{})
	for range 4 {
		wg.Go(func() {
			var last time.Time
			for {
				select {
				case <-stop:
					return
				default:
				}
				r := b.Now()
				if r.Trusted() && r.Time.Before(last) {
					t.Errorf("went back from %v to %v", last, r.Time)
					return
				}
				last = r.Time
			}
		})
	}
	rng := rand.New(rand.NewPCG(1, 4))
	for range 2000 {
		b.pass(time.Duration(rng.Int64N(int64(ms))))
		b.at(time.Duration(rng.Int64N(int64(80*ms)))-40*ms, 60*ms)
	}
	close(stop)
	wg.Wait()
	b.want(ntp.Trusted)
}

// TestOnChangeMayCallTheClock, and hears everything in order.
func TestOnChangeMayCallTheClock(t *testing.T) {
	t.Parallel()
	m := &machine{boot: time.Hour}
	c, err := ntp.NewClock(ntp.Config{AgreeRounds: 1, MinSources: 1}, m)
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{T: t, machine: m, Clock: c}
	c.OnChange(func(from, to ntp.State, reason string, r ntp.Reading) {
		b.tell(from, to, reason, r)
		c.Now()
		c.Last()
		if to == ntp.Acquiring {
			c.Update(nil)
		}
	})
	b.at(0, ms, "a")
	if got, want := fmt.Sprint(b.told), "[acquiring trusted]"; got != want {
		t.Errorf("told %s, want %s", got, want)
	}
}

func TestUpdateRefusesStaleAndUnfit(t *testing.T) {
	t.Parallel()
	b := newBench(t, ntp.Config{MinSources: 1, AgreeRounds: 1})
	old, future, unfit := b.measure("old", 0, ms), b.measure("future", 0, ms), b.measure("unfit", 0, ms)
	old.Boot -= time.Minute + 1
	future.Boot += time.Second
	unfit.Stratum = 16
	r := b.Update([]ntp.Measurement{old, future, unfit})
	for _, name := range []string{"old", "future", "unfit"} {
		if !errors.Is(r.Unfit[name], ntp.ErrUnfit) {
			t.Errorf("%s: %v, want ErrUnfit", name, r.Unfit[name])
		}
	}
	b.want(ntp.Cold)
}

func TestConfig(t *testing.T) {
	t.Parallel()
	_, err := ntp.NewClock(ntp.Config{MinSources: -1, DriftPPM: 1000, AgreeRounds: -1, MaxBound: -1, HoldoverMax: -1, FreshFor: 1}, &machine{})
	if err == nil {
		t.Fatal("nonsense accepted")
	}
	for _, key := range []string{"min_sources", "drift_ppm", "agree_rounds", "max_bound", "holdover_max", "fresh_for"} {
		if !strings.Contains(err.Error(), key) {
			t.Errorf("error does not name %s: %v", key, err)
		}
	}
}

func BenchmarkNow(b *testing.B) {
	m := &machine{boot: time.Hour}
	c, err := ntp.NewClock(ntp.Config{AgreeRounds: 1, MinSources: 1}, m)
	if err != nil {
		b.Fatal(err)
	}
	r := says("a", 0, ms)
	r.Boot = m.Boot()
	c.Update([]ntp.Measurement{r})
	b.ReportAllocs()
	for b.Loop() {
		m.pass(1)
		if !c.Now().Trusted() {
			b.Fatal("not trusted")
		}
	}
}

// FuzzClock reads from bytes what a machine with honest and fewer lying sources goes through, four to an event. A trusted
// reading contains the true time, and none goes back.
func FuzzClock(f *testing.F) {
	round := []byte{1, 0, 0, 0}
	trusted := slices.Concat(round, round, round)
	for _, events := range [][]byte{
		{},
		slices.Concat(trusted, []byte{0, 0, 0xff, 0xff, 1, 9, 200, 100}),          // holdover
		slices.Concat(trusted, []byte{3, 1, 200, 0}, trusted, []byte{3, 2, 0, 9}), // steps
		slices.Concat(trusted, []byte{4, 50, 10, 0}, trusted),                     // sleep
		slices.Concat(trusted, []byte{5, 0, 1, 244, 0, 0, 2, 0, 1, 3, 7, 1, 5, 1, 0, 0}, trusted),
		slices.Concat(trusted, []byte{6, 90, 0, 0, 0, 0, 20, 0, 1, 255, 255, 255}, trusted),
		slices.Concat(trusted, []byte{7, 0, 0, 10}, trusted), // restart
		slices.Concat(trusted, []byte{8, 0, 0, 60}, trusted, []byte{9, 0, 0, 0}, round),
		slices.Concat(trusted, []byte{0, 0, 0, 250, 0, 0, 0, 40, 1, 0, 0, 0, 0, 0, 0, 6}, trusted), // over the end of the year
		slices.Concat(trusted, []byte{2, 200, 100, 7, 2, 0, 0, 0}, trusted, []byte{10, 0, 0, 0}),
	} {
		for config := range byte(24) {
			f.Add(append([]byte{config}, events...))
		}
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		if len(raw) == 0 {
			return
		}
		liars := int(raw[0]) % 4
		cfg := ntp.Config{MinSources: liars + 1, AgreeRounds: 1 + int(raw[0]>>4)%3}
		leap, comes := ntp.Leap(raw[0]>>2%4%3), raw[0]&128 == 0
		b := newBench(t, cfg)
		end := time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC)
		b.pass(end.Sub(noon) - 5*time.Minute)
		over := false
		// pass lets the leap second come on the way, if one does.
		pass := func(d time.Duration) {
			at := end.Add(time.Second)
			if leap == ntp.LeapDelete {
				at = end.Add(-time.Second)
			}
			if left := at.Sub(b.truth()); leap != ntp.LeapNone && comes && !over && left <= d {
				over = true
				b.pass(left)
				b.change(func() {
					if b.now += time.Second; leap == ntp.LeapInsert {
						b.now -= 2 * time.Second
					}
				})
				d -= left
			}
			b.pass(d)
		}
		var last time.Time
		for raw = raw[1:]; len(raw) >= 4; raw = raw[4:] {
			n := int(raw[2])<<8 | int(raw[3])
			switch raw[0] % 10 {
			case 0:
				pass(time.Duration(n) * time.Second)
			case 1, 2: // a round: each source says something within its claim, and liars what the bytes say
				pass(time.Duration(1+raw[1]%16) * time.Second)
				var in []ntp.Measurement
				for i := range 2*liars + 1 {
					half := time.Duration(1+n*(i+1)%97) * ms
					if raw[0]%10 == 2 {
						half *= 10 // up to a second
					}
					off := time.Duration(int64(half) * int64(int8(raw[3-i%3])) / 128)
					if i < liars {
						off, half = time.Duration(int8(raw[1+i]))*10*ms, time.Duration(1+raw[3])*ms
					}
					m := b.measure(string(rune('a'+i)), off, half)
					if b.truth().Before(end) {
						m.Leap = leap
					}
					in = append(in, m)
				}
				if now := b.truth(); leap == ntp.LeapInsert && comes && !over && !now.Before(end) {
					in = nil // servers do not answer within the inserted second
				}
				b.Update(in)
			case 3:
				b.change(func() { b.wall += time.Duration(int16(n)) * ms })
			case 4: // sleep, counted badly
				d, wrong := time.Duration(1+n)*time.Second, time.Duration(int8(raw[1]))*3*ms
				pass(0)
				b.change(func() {
					if d += wrong; d < 0 || leap != ntp.LeapNone && !over {
						return // a leap second in sleep is not what this is about
					}
					b.boot, b.wall, b.now = b.boot+d, b.wall+d, b.now+d-wrong
				})
			case 5: // adjtimex(2), for good or fast for a while
				b.change(func() { b.bend = int(int16(n)) % 501 })
				if raw[1]%2 != 0 {
					b.change(func() { b.bend = 100_000 - 200_000*(n%2) })
					pass(time.Duration(raw[1]) * 10 * ms)
					b.Now()
					b.change(func() { b.bend = 0 })
				}
			case 6:
				b.change(func() { b.ppm = int(int8(raw[1])) % 50 })
			case 7: // a restart in the same boot
				s, err := json.Marshal(b.Snapshot("boot-1"))
				if err != nil {
					t.Fatal(err)
				}
				var snap ntp.Snapshot
				if err := json.Unmarshal(s, &snap); err != nil {
					t.Fatal(err)
				}
				pass(time.Duration(4+n%100) * time.Second)
				if b.Clock, err = ntp.NewClock(cfg, b.machine); err != nil {
					t.Fatal(err)
				}
				if err := b.Restore(snap, "boot-1"); err != nil {
					t.Fatalf("%s: %v", s, err)
				}
			case 8: // all clocks go back
				if d := time.Duration(20+n) * time.Second; d < b.Boot() {
					b.change(func() { b.boot, b.mono, b.raw, b.wall = b.boot-d, b.mono-d, b.raw-d, b.wall-d })
				}
			case 9:
				_ = b.Readmit()
			}
			r := b.Now()
			if !r.Trusted() {
				continue
			}
			if d := b.truth().Sub(r.Time); d.Abs() > r.Bound {
				t.Fatalf("%v off with bound %v in state %s, after event %v: %+v", d, r.Bound, r.State, raw[:4], b.Last())
			}
			if r.Time.Before(last) {
				t.Fatalf("went back from %v to %v", last, r.Time)
			}
			last = r.Time
		}
	})
}

// FuzzRestore: whatever the file of an earlier run says, it makes no clock trusted, widens no bound's promise, and what
// is refused leaves the clock cold.
func FuzzRestore(f *testing.F) {
	for _, s := range []ntp.Snapshot{
		{BootID: "boot-1", State: ntp.Trusted, UTC: noon, Taken: time.Hour, Boot: time.Hour, Bound: 60 * ms, Agreed: time.Hour, Wall: noon, Emitted: noon, Provenance: "a"},
		{BootID: "boot-1", State: ntp.Holdover, UTC: noon, Taken: 90 * time.Minute, Boot: time.Hour, Bound: time.Second, Leap: ntp.LeapInsert, LeapAt: noon.Add(12 * time.Hour)},
		{BootID: "boot-1", State: ntp.Suspect, UTC: noon}, {BootID: "boot-2", State: ntp.Trusted, UTC: noon, Emitted: noon}, {},
	} {
		raw, err := json.Marshal(s)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw)
	}
	f.Add([]byte(`{"state":"trusted","boot_id":"boot-1","utc":"0001-01-01T00:00:00.000000001Z","wall":"9999-12-31T23:59:59Z"}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		var s ntp.Snapshot
		if json.Unmarshal(raw, &s) != nil {
			return
		}
		m := &machine{boot: 2 * time.Hour, mono: 2 * time.Hour, raw: 2 * time.Hour, wall: time.Hour, now: time.Hour}
		c, err := ntp.NewClock(ntp.Config{}, m)
		if err != nil {
			t.Fatal(err)
		}
		err = c.Restore(s, "boot-1")
		r := c.Now()
		switch {
		case r.State == ntp.Trusted:
			t.Errorf("%s makes a clock trusted", raw)
		case err != nil && r.State != ntp.Cold:
			t.Errorf("%s is refused and leaves the clock %s", raw, r.State)
		case r.State == ntp.Holdover && (s.BootID != "boot-1" || s.State != ntp.Trusted && s.State != ntp.Holdover):
			t.Errorf("%s is held over", raw)
		case r.State == ntp.Holdover && (r.Bound < s.Bound || r.Bound < 0):
			t.Errorf("%s gives a bound of %v", raw, r.Bound)
		case r.Trusted() && r.Time.Before(s.Emitted):
			t.Errorf("%s goes on at %v", raw, r.Time)
		}
		c.Update(nil) // and the next round is survived
		// What is saved now is taken over by the next process as the same.
		again, err := ntp.NewClock(ntp.Config{}, m)
		if err != nil {
			t.Fatal(err)
		}
		if err := again.Restore(c.Snapshot("boot-1"), "boot-1"); err != nil {
			t.Errorf("%s leaves a snapshot that is refused: %v", raw, err)
		}
		if a, b := c.Now(), again.Now(); a.Trusted() != b.Trusted() || a.Trusted() && (!a.Time.Equal(b.Time) || a.Bound != b.Bound) {
			t.Errorf("%s goes on as %+v, and then as %+v", raw, a, b)
		}
	})
}

package tsa_test

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unicode"

	"github.com/sirupsen/logrus"

	"yinjian/ntp"
	"yinjian/ntp/source"
	"yinjian/tsa"
)

// A world is a simulated true time, the clocks of a machine in it, and NTP servers that answer from that time plus what is
// wrong with them. Network delays are simulated too; what is real is UDP, sources, poller, clock and authority.
type world struct {
	mu        sync.Mutex // guards what follows
	truth     time.Time
	boot      time.Duration
	mono, raw time.Duration
	wall      time.Time
	ppm       int // the oscillator's error
	bend      int // adjtimex(2), in ppm too
	leap      ntp.Leap
	leapAt    time.Time // when the second comes; zero: none does
	bootID    int
	rng       *rand.Rand
}

func (w *world) pass(d time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.passed(d)
}

func (w *world) passed(d time.Duration) {
	w.truth = w.truth.Add(d)
	if !w.leapAt.IsZero() {
		switch {
		case w.leap == ntp.LeapInsert && !w.truth.Before(w.leapAt.Add(time.Second)):
			w.truth, w.leapAt = w.truth.Add(-time.Second), time.Time{}
		case w.leap == ntp.LeapDelete && !w.truth.Before(w.leapAt.Add(-time.Second)):
			w.truth, w.leapAt = w.truth.Add(time.Second), time.Time{}
		}
	}
	d += d / 1_000_000 * time.Duration(w.ppm)
	w.raw += d
	d += d / 1_000_000 * time.Duration(w.bend)
	w.boot, w.mono, w.wall = w.boot+d, w.mono+d, w.wall.Add(d)
}

// delay lets up to d pass, as networks do.
func (w *world) delay(d time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.passed(time.Duration(w.rng.Int64N(int64(d))))
}

func (w *world) change(f func()) { w.mu.Lock(); defer w.mu.Unlock(); f() }

func look[T any](w *world, v *T) T { w.mu.Lock(); defer w.mu.Unlock(); return *v }

func (w *world) Boot() time.Duration      { return look(w, &w.boot) }
func (w *world) Monotonic() time.Duration { return look(w, &w.mono) }
func (w *world) Raw() time.Duration       { return look(w, &w.raw) }
func (w *world) Realtime() time.Time      { return look(w, &w.wall) }

// announced is what an honest server says of the end of the month, a day before it.
func (w *world) announced() ntp.Leap {
	w.mu.Lock()
	defer w.mu.Unlock()
	end := time.Date(w.truth.Year(), w.truth.Month()+1, 1, 0, 0, 0, 0, time.UTC)
	if end.Sub(w.truth) > 24*time.Hour {
		return ntp.LeapNone
	}
	return w.leap
}

// A packet is an NTP answer in the making: the numbers, and then what is done to the bytes.
type packet struct {
	leap               ntp.Leap
	version, mode      byte
	stratum, precision byte
	delay, disp        time.Duration
	refID              string
	refAge, off        time.Duration
	bytes              func([]byte) [][]byte
}

// kinds are the ways in which a server can be wrong, those of ntp/source.TestFaults that need no key.
var kinds = map[string]func(*packet){
	"stratum 16":       func(p *packet) { p.stratum = 16 },
	"LI=3":             func(p *packet) { p.leap = ntp.LeapUnsynchronized },
	"RATE":             func(p *packet) { p.stratum, p.refID = 0, "RATE" },
	"DENY":             func(p *packet) { p.stratum, p.refID = 0, "DENY" },
	"INIT":             func(p *packet) { p.stratum, p.refID = 0, "INIT" },
	"reference 2 h":    func(p *packet) { p.refAge = 2 * time.Hour },
	"reference 48 h":   func(p *packet) { p.refAge = 48 * time.Hour },
	"reference ahead":  func(p *packet) { p.refAge = -time.Minute },
	"dispersion 10 s":  func(p *packet) { p.disp = 10 * time.Second },
	"dispersion 17 s":  func(p *packet) { p.disp = 17 * time.Second },
	"root delay 20 s":  func(p *packet) { p.delay = 20 * time.Second },
	"precision absurd": func(p *packet) { p.precision = 127 },
	"5 s ahead":        func(p *packet) { p.off = 5 * time.Second },
	"5 s behind":       func(p *packet) { p.off = -5 * time.Second },
	"a day behind":     func(p *packet) { p.off = -24 * time.Hour },
	"year 1990":        func(p *packet) { p.off = -40 * 365 * 24 * time.Hour },
	"leap inserted":    func(p *packet) { p.leap = ntp.LeapInsert },
	"leap deleted":     func(p *packet) { p.leap = ntp.LeapDelete },
	"version 3":        func(p *packet) { p.version = 3 },
	"mode 3":           func(p *packet) { p.mode = 3 },
	"wrong origin":     func(p *packet) { p.bytes = func(b []byte) [][]byte { b[30] ^= 1; return [][]byte{b} } },
	"transmit time 0":  func(p *packet) { p.bytes = func(b []byte) [][]byte { clear(b[40:48]); return [][]byte{b} } },
	"received later":   func(p *packet) { p.bytes = func(b []byte) [][]byte { b[33]++; return [][]byte{b} } },
	"short":            func(p *packet) { p.bytes = func(b []byte) [][]byte { return [][]byte{b[:47]} } },
	"extension":        func(p *packet) { p.bytes = func(b []byte) [][]byte { return [][]byte{append(b, b[:28]...)} } },
	"silence":          func(p *packet) { p.bytes = func([]byte) [][]byte { return nil } },
	"spoofed first": func(p *packet) {
		p.bytes = func(b []byte) [][]byte {
			spoof := slices.Clone(b)
			spoof[24], spoof[42] = ^spoof[24], ^spoof[42]
			return [][]byte{spoof, {}, b}
		}
	},
}

// unfit are kinds that an honest server falls into when its antenna is lost: it does not serve, but does not lie.
var unfit = []string{"stratum 16", "LI=3", "reference 2 h", "dispersion 10 s", "INIT", "silence"}

// A server answers honestly, its error within what it claims, unless fault is set.
type server struct {
	address string
	fault   atomic.Pointer[func(*packet)]
	slow    atomic.Int64 // one way, at most
	answers atomic.Int64
}

func (w *world) serve(t *testing.T) *server {
	c, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	s := &server{address: c.LocalAddr().String()}
	s.slow.Store(int64(4 * time.Millisecond))
	go func() {
		buf := make([]byte, 1024)
		for {
			n, from, err := c.ReadFrom(buf)
			if err != nil {
				return
			}
			if n < 48 {
				continue
			}
			for _, b := range s.answer(w, buf[:n]) {
				_, _ = c.WriteTo(b, from)
			}
			s.answers.Add(1)
		}
	}()
	return s
}

func (s *server) answer(w *world, req []byte) [][]byte {
	w.delay(time.Duration(s.slow.Load()))
	p := packet{leap: w.announced(), version: 4, mode: 4, stratum: 2, precision: 0xec, refID: "LAN", refAge: 3 * time.Second,
		bytes: func(b []byte) [][]byte { return [][]byte{b} }}
	w.change(func() {
		p.delay, p.disp = time.Duration(w.rng.Int64N(int64(40*time.Millisecond))), time.Duration(w.rng.Int64N(int64(40*time.Millisecond)))
		width := int64(p.delay/2 + p.disp)
		p.off = time.Duration(w.rng.Int64N(2*width+1) - width) // anywhere in what it claims
	})
	if f := s.fault.Load(); f != nil {
		(*f)(&p)
	}
	ntpTime := func(at time.Time) uint64 {
		d := at.Sub(time.Date(1900, 1, 1, 0, 0, 0, 0, time.UTC))
		return uint64(d/time.Second)<<32 | uint64(d%time.Second)<<32/uint64(time.Second)
	}
	short := func(d time.Duration) uint32 {
		return uint32((uint64(d)<<16 + uint64(time.Second) - 1) / uint64(time.Second))
	}
	b := make([]byte, 48, 96)
	b[0], b[1], b[2], b[3] = byte(p.leap)<<6|p.version<<3|p.mode, p.stratum, 6, p.precision
	binary.BigEndian.PutUint32(b[4:], short(p.delay))
	binary.BigEndian.PutUint32(b[8:], short(p.disp))
	copy(b[12:16], p.refID)
	copy(b[24:32], req[40:48])
	now := look(w, &w.truth).Add(p.off)
	binary.BigEndian.PutUint64(b[16:], ntpTime(now.Add(-p.refAge)))
	binary.BigEndian.PutUint64(b[32:], ntpTime(now))
	w.delay(100 * time.Microsecond)
	binary.BigEndian.PutUint64(b[40:], ntpTime(look(w, &w.truth).Add(p.off)))
	w.delay(time.Duration(s.slow.Load()))
	return p.bytes(b)
}

// A history is one appliance in a world, and the tokens that it issued.
type history struct {
	t      *testing.T
	name   string
	w      *world
	rng    *rand.Rand
	policy ntp.Config
	f      int       // how many may lie, the first ones
	all    []*server // one voice each, but for the last, which repeats the first
	tokens *tsa.Authority
	poller *source.Poller
	saved  []byte // an earlier snapshot, as is left by a crash
	rounds int
	calm   bool // nothing befalls the machine and the honest servers for some rounds; the liars go on

	calmTill time.Time

	mu                  sync.Mutex // guards what follows
	last                time.Time
	serials             map[string]bool
	granted, refused    int
	inCalm, calmGranted int
	quiet               int // rounds in calm that all honest servers have answered
}

// scenarios say how many groups there are, how many of them must agree, and how many may lie. The last is a majority that
// does not exist: half of them lie, together and grossly, and nothing may be issued once they do.
var scenarios = []struct{ groups, min, liars int }{{3, 3, 1}, {4, 3, 1}, {5, 3, 1}, {5, 5, 2}, {7, 5, 2}, {1, 1, 0}, {4, 3, 2}}

// TestNoTokenOutsideItsAccuracy is the promise of the whole: whatever the servers and the machine's clocks do, as long as
// fewer liars are among the groups than the policy allows for, no token's genTime is further from the true time than the
// token says, none is earlier than one before it, and serials do not repeat. In calm times tokens are issued: an authority
// that always refuses would pass otherwise.
//
// YINJIAN_SEED repeats the choices of one history; the order in which servers read the simulated clock is up to the
// scheduler.
func TestNoTokenOutsideItsAccuracy(t *testing.T) {
	t.Parallel()
	histories, rounds := 21, 80
	if os.Getenv("YINJIAN_LONG") != "" {
		histories, rounds = 350, 400
	}
	first := uint64(0)
	if s := os.Getenv("YINJIAN_SEED"); s != "" {
		n, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		first, histories = n, 1
	}
	var wg sync.WaitGroup
	var granted, refused, calm, calmGranted atomic.Int64
	// They mostly wait for answers that do not come.
	slots := make(chan struct{}, 24)
	for seed := first; seed < first+uint64(histories); seed++ {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			h := newHistory(t, seed)
			for range rounds {
				h.step()
			}
			granted.Add(int64(h.granted))
			refused.Add(int64(h.refused))
			calm.Add(int64(h.inCalm))
			calmGranted.Add(int64(h.calmGranted))
		})
	}
	wg.Wait()
	t.Logf("%d histories: %d tokens issued, %d refused; in calm times %d of %d issued", histories, granted.Load(), refused.Load(), calmGranted.Load(), calm.Load())
	if first == 0 && histories > 1 && (calm.Load() < int64(histories) || calmGranted.Load() < calm.Load() || granted.Load() < refused.Load()/8) {
		t.Errorf("%d of %d issued in calm times, %d and %d refused in all: it is no feat to refuse always", calmGranted.Load(), calm.Load(), granted.Load(), refused.Load())
	}
}

func newHistory(t *testing.T, seed uint64) *history {
	s := scenarios[seed%uint64(len(scenarios))]
	rng := rand.New(rand.NewPCG(seed, 5))
	w := &world{truth: time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC).Add(time.Duration(rng.Int64N(int64(12 * time.Hour)))),
		boot: time.Hour, mono: time.Hour, raw: time.Hour, ppm: rng.IntN(91) - 45, rng: rand.New(rand.NewPCG(seed, 6))}
	w.wall = w.truth.Add(time.Duration(rng.Int64N(int64(time.Minute))))
	var calmTill time.Time
	if rng.IntN(2) == 0 { // the night of a leap second, which comes, or comes not; mostly to a clock that has settled
		end := time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC)
		w.truth = end.Add(-time.Duration(rng.Int64N(int64(6 * time.Minute))))
		if rng.IntN(4) != 0 {
			calmTill = end.Add(time.Minute)
		}
		w.leap = ntp.Leap(1 + rng.IntN(2))
		if rng.IntN(2) == 0 {
			w.leapAt = end
		}
	}
	h := &history{t: t, name: fmt.Sprintf("seed %d (%d groups, %d must agree, %d lie)", seed, s.groups, s.min, s.liars),
		w: w, rng: rng, calmTill: calmTill, f: s.liars, policy: ntp.Config{MinSources: s.min}, serials: make(map[string]bool)}
	for range s.groups + 1 {
		h.all = append(h.all, w.serve(t))
	}
	h.start(nil)
	return h
}

// clock lets the authority follow the history's clock over restarts.
type clock struct{ h *history }

func (c clock) Now() ntp.Reading { return c.h.poller.Clock.Now() }

// start is a process that begins, with the snapshot that an earlier one left.
func (h *history) start(snapshot []byte) {
	c, err := ntp.NewClock(h.policy, h.w)
	if err != nil {
		h.t.Error(err)
		return
	}
	if snapshot != nil {
		var s ntp.Snapshot
		if err := json.Unmarshal(snapshot, &s); err != nil {
			h.t.Error(err)
		}
		if err := c.Restore(s, h.bootID()); err != nil && !errors.Is(err, ntp.ErrSnapshot) {
			h.t.Error(err)
		}
	}
	log := logrus.New()
	log.SetOutput(io.Discard)
	h.poller = &source.Poller{Clock: c, Log: log}
	for i, s := range h.all {
		group := i % (len(h.all) - 1)
		src, err := source.New(source.Config{Name: "s" + strconv.Itoa(i), Group: "g" + strconv.Itoa(group), Address: s.address, Timeout: 150 * time.Millisecond, Clock: h.w})
		if err != nil {
			h.t.Error(err)
			return
		}
		h.poller.Sources = append(h.poller.Sources, src)
	}
	if h.tokens == nil {
		u := sm2Unit()
		config := u.config()
		config.Clock = clock{h}
		h.tokens = newAuthority(h.t, config)
	}
}

func (h *history) bootID() string { return strconv.Itoa(look(h.w, &h.w.bootID)) }

func (h *history) save() []byte {
	b, err := json.Marshal(h.poller.Clock.Snapshot(h.bootID()))
	if err != nil {
		h.t.Error(err)
	}
	return b
}

// stamp issues a token and holds it against the truth. It may run beside rounds and other stamps.
func (h *history) stamp(calm bool) {
	h.mu.Lock()
	last := h.last
	h.mu.Unlock()
	before := look(h.w, &h.w.truth)
	token, err := h.tokens.Issue(context.Background(), request([]byte("record")))
	after := look(h.w, &h.w.truth)
	if err == nil {
		token, err = tsa.ParseToken(token.DER)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if calm {
		h.inCalm++
	}
	if err != nil {
		h.refused++
		if !errors.Is(err, tsa.ErrTimeNotAvailable) {
			h.t.Errorf("%s: %v", h.name, err)
		}
		if calm {
			h.t.Logf("%s: refused in calm times: %v; last round %+v", h.name, err, h.poller.Clock.Last())
		}
		return
	}
	h.granted++
	if calm {
		h.calmGranted++
	}
	if after.Before(before) { // a leap second was inserted meanwhile
		before, after = after, before
	}
	if low, high := token.GenTime.Add(-token.Accuracy), token.GenTime.Add(token.Accuracy); token.Accuracy <= 0 || low.After(after) || high.Before(before) {
		h.t.Errorf("%s: genTime %v ± %v at %v: %+v, last round %+v", h.name, token.GenTime, token.Accuracy, before, token.Provenance, h.poller.Clock.Last())
	}
	if token.GenTime.Before(last) {
		h.t.Errorf("%s: genTime %v after %v", h.name, token.GenTime, last)
	}
	if token.GenTime.After(h.last) {
		h.last = token.GenTime
	}
	if s := token.Serial.String(); h.serials[s] {
		h.t.Errorf("%s: serial %s twice", h.name, s)
	} else {
		h.serials[s] = true
	}
}

// step is a round of the poller with what comes before and between.
func (h *history) step() {
	w, rng := h.w, h.rng
	// 1. Time passes, and tokens are issued all the while.
	interval := 16 * time.Second
	if h.poller.Clock.Now().State != ntp.Trusted {
		interval = 4 * time.Second
	}
	for range 1 + rng.IntN(4) {
		w.pass(time.Duration(rng.Int64N(int64(interval))) / 2)
		now := look(w, &w.truth)
		night := now.Add(time.Minute).Month() != now.Add(-time.Minute).Month()
		h.stamp(h.quiet > 6 && !night)
	}
	// 2. Something befalls the machine.
	h.rounds++
	if h.calm = h.rounds%40 >= 25 || look(w, &w.truth).Before(h.calmTill); !h.calm {
		h.quiet = 0
	}
	if !h.calm && rng.IntN(5) == 0 {
		h.disturb()
		h.stamp(false)
	}
	if !h.calm && rng.IntN(12) == 0 { // and something under load
		var wg sync.WaitGroup
		for range 2 {
			wg.Go(func() {
				for range 4 {
					h.stamp(false)
				}
			})
		}
		h.befall(rng.IntN(6))
		wg.Wait()
		h.saved = h.save()
	}
	// 3. Servers turn bad and good again.
	outage := !h.calm && rng.IntN(12) == 0
	honest := h.mood(outage)
	if outage {
		w.pass(time.Duration(rng.Int64N(int64(3 * time.Hour))))
	}
	// 4. A round, with stamps beside it.
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() { h.stamp(false) })
	}
	r := h.poller.Round(h.t.Context())
	wg.Wait()
	h.stamp(false)
	// 5. A person looks, where only a person may decide: the servers are honest, so the appliance was wrong.
	if errors.Is(r.Err, ntp.ErrOperator) && honest && rng.IntN(3) == 0 {
		if err := h.poller.Clock.Readmit(); err != nil {
			h.t.Errorf("%s: %v", h.name, err)
		}
	}
	if rng.IntN(3) == 0 { // an older snapshot of the same boot is as true, unless all clocks went back meanwhile
		h.saved = h.save()
	}
	h.quiet++
	for i, st := range h.poller.Status() {
		if i >= h.f && i < len(h.all)-1 && st.Err != nil {
			h.quiet = 0
		}
	}
	if h.policy.MinSources > len(h.all)-1-h.f || h.f*2 >= len(h.all)-1 || errors.Is(r.Err, ntp.ErrLeap) || errors.Is(r.Err, ntp.ErrOperator) || errors.Is(r.Err, ntp.ErrBackwards) {
		h.quiet = 0
	}
}

// mood sets the servers' faults for the next round. Fewer than MinSources/2 of the groups lie. It is true if none does.
func (h *history) mood(outage bool) (honest bool) {
	rng := h.rng
	names := make([]string, 0, len(kinds))
	for name := range kinds {
		names = append(names, name)
	}
	slices.Sort(names)
	set := func(s *server, f func(*packet)) { s.fault.Store(&f) }
	for _, s := range h.all {
		s.fault.Store(nil)
		s.slow.Store(int64(4 * time.Millisecond))
		if !h.calm && rng.IntN(20) == 0 {
			s.slow.Store(int64(400 * time.Millisecond))
		}
	}
	groups := len(h.all) - 1
	for i := h.f; i < groups; i++ {
		if outage || !h.calm && rng.IntN(20) == 0 {
			set(h.all[i], kinds[unfit[rng.IntN(len(unfit))]])
		}
	}
	honest = true
	together := time.Duration(rng.Int64N(int64(300*time.Millisecond))) - 150*time.Millisecond
	if h.f*2 >= groups || rng.IntN(3) == 0 { // half of them could move the edge of what the honest say, so they lie grossly
		together = 5 * time.Second
	}
	choice := rng.IntN(3)
	for i := range h.f {
		honest = false
		f := kinds[names[rng.IntN(len(names))]]
		switch {
		case choice == 0 || h.f*2 >= groups: // hand in hand, and sure of it
			f = func(p *packet) { p.off, p.delay, p.disp = together, 0, time.Millisecond }
		case choice == 1: // each by itself, a little
			off := time.Duration(rng.Int64N(int64(200*time.Millisecond))) - 100*time.Millisecond
			f = func(p *packet) { p.off, p.delay, p.disp = off, 0, time.Millisecond }
		}
		set(h.all[i], f)
	}
	// The last server repeats the first one's voice.
	h.all[groups].fault.Store(h.all[0].fault.Load())
	// A single source has nobody to contradict it: what can be caught is a jump away from the clock's own prediction.
	if groups == 1 && !h.calm && h.poller.Clock.Now().Trusted() && rng.IntN(3) == 0 {
		f := kinds[names[rng.IntN(len(names))]]
		if lie := time.Duration(2+rng.IntN(10)) * time.Second; rng.IntN(2) == 0 {
			f = func(p *packet) { p.off = lie }
		}
		for _, s := range h.all {
			set(s, f)
		}
		honest = false
	}
	return honest
}

// disturb is what befalls the process, or its machine.
func (h *history) disturb() {
	w, rng := h.w, h.rng
	switch kind := rng.IntN(9); kind {
	case 6: // a restart
		saved := h.save()
		w.pass(4*time.Second + h.random(time.Minute))
		h.start(saved)
	case 7: // a crash, with an older snapshot
		if h.saved == nil {
			return
		}
		w.pass(4*time.Second + h.random(time.Minute))
		h.start(h.saved)
	case 8: // a boot
		saved := h.save()
		w.change(func() {
			w.bootID++
			w.boot, w.mono, w.raw, w.bend = 0, 0, 0, 0
			w.wall = w.wall.Add(h.random(4*time.Second) - 2*time.Second)
		})
		w.pass(10*time.Second + h.random(time.Minute))
		h.start(saved)
	default:
		h.befall(kind)
	}
	h.saved = h.save()
}

func (h *history) random(max time.Duration) time.Duration {
	return time.Duration(h.rng.Int64N(int64(max)))
}

// befall is what befalls the machine's clocks. Stamps may go on beside it.
func (h *history) befall(kind int) {
	w, rng, random := h.w, h.rng, h.random
	switch kind {
	case 0: // an operator sets the clock
		w.change(func() { w.wall = w.wall.Add(random(8*time.Second) - 4*time.Second) })
	case 1: // sleep, which the clock counts badly
		d, wrong := random(time.Hour), random(600*time.Millisecond)-300*time.Millisecond
		w.change(func() { w.truth, w.boot, w.wall = w.truth.Add(d), w.boot+d+wrong, w.wall.Add(d+wrong) })
	case 2: // a frequency, for good
		w.change(func() { w.bend = rng.IntN(1001) - 500 })
	case 3: // a slew at ten per cent
		w.change(func() { w.bend = 100_000 - 200_000*rng.IntN(2) })
		for range 4 {
			w.pass(random(2 * time.Second))
			h.stamp(false)
		}
		w.change(func() { w.bend = 0 })
	case 4: // temperature
		w.change(func() { w.ppm = rng.IntN(91) - 45 })
	case 5: // restored from a snapshot: all clocks go back, the true time does not
		boot := look(w, &w.boot)
		if boot < 2*time.Minute {
			return
		}
		d := 20*time.Second + random(min(boot-time.Minute, time.Hour))
		w.change(func() {
			w.boot, w.mono, w.raw = w.boot-d, w.mono-d, w.raw-d
			if rng.IntN(2) == 0 {
				w.wall = w.wall.Add(-d)
			}
		})
	}
}

// TestLiars has servers that hold hands five seconds ahead, from the first question on. A group has one voice, however many
// servers it has.
func TestLiars(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		groups string // one server each; upper case lies
		min    int
		issues bool
	}{
		"1 of 3":                             {"abC", 2, true},
		"1 of 3, all of whom must agree":     {"abC", 3, false},
		"2 of 5":                             {"abcDE", 3, true},
		"2 of 4":                             {"abCD", 2, false},
		"1 of 2":                             {"aB", 1, false},
		"four servers of one group, of 3":    {"abCCCC", 2, true},
		"a group that is of two minds, of 3": {"abcC", 2, true},
		"the same, of 2":                     {"acC", 1, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := &world{truth: now, boot: time.Hour, mono: time.Hour, raw: time.Hour, wall: now, rng: rand.New(rand.NewPCG(1, 7))}
			clock, err := ntp.NewClock(ntp.Config{MinSources: c.min}, w)
			if err != nil {
				t.Fatal(err)
			}
			log := logrus.New()
			log.SetOutput(io.Discard)
			p := &source.Poller{Clock: clock, Log: log}
			for i, g := range c.groups {
				s := w.serve(t)
				if unicode.IsUpper(g) {
					lie := kinds["5 s ahead"]
					s.fault.Store(&lie)
				}
				src, err := source.New(source.Config{Name: strconv.Itoa(i), Group: strings.ToLower(string(g)), Address: s.address, Timeout: 10 * time.Second, Clock: w})
				if err != nil {
					t.Fatal(err)
				}
				p.Sources = append(p.Sources, src)
			}
			config := sm2Unit().config()
			config.Clock = clock
			authority := newAuthority(t, config)
			for range 5 {
				p.Round(t.Context())
				w.pass(16 * time.Second)
			}
			token, err := authority.Issue(t.Context(), request([]byte("record")))
			switch {
			case !c.issues:
				if !errors.Is(err, tsa.ErrTimeNotAvailable) {
					t.Errorf("%+v, %v, want ErrTimeNotAvailable", token, err)
				}
			case err != nil:
				t.Errorf("%v; last round %+v", err, clock.Last())
			case look(w, &w.truth).Sub(token.GenTime).Abs() > token.Accuracy:
				t.Errorf("genTime %v ± %v at %v", token.GenTime, token.Accuracy, w.truth)
			}
		})
	}
}

// TestStopsAtTheComputedSecond: after the last agreement tokens are issued until the bound, E + drift × t, reaches the
// accuracy of the policy, and not a second longer; and each says the bound of its instant.
func TestStopsAtTheComputedSecond(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		bound, accuracy time.Duration
		ppm             int
		last            float64 // seconds; (accuracy − bound) / ppm, by hand
	}{
		{60 * time.Millisecond, time.Second, 50, 18_800},
		{60 * time.Millisecond, time.Second, 15, 62_666.6},
		{60 * time.Millisecond, 500 * time.Millisecond, 50, 8_800},
		{2 * time.Millisecond, 100 * time.Millisecond, 200, 490},
	} {
		w := &world{truth: now, boot: time.Hour, mono: time.Hour, raw: time.Hour, wall: now}
		clock, err := ntp.NewClock(ntp.Config{MinSources: 1, AgreeRounds: 1, MaxBound: c.accuracy, DriftPPM: c.ppm}, w)
		if err != nil {
			t.Fatal(err)
		}
		clock.Update([]ntp.Measurement{{Source: "rack", Boot: w.boot, UTC: w.truth, RootDistance: c.bound, Stratum: 1, RefID: "BDS"}})
		config := sm2Unit().config()
		config.Clock, config.Accuracy = clock, c.accuracy
		authority := newAuthority(t, config)
		rounding := 2000 / float64(c.ppm) // at most 2 ms of the bound, in seconds
		passed := 0.0
		until := func(second float64) {
			w.pass(time.Duration((second - passed) * float64(time.Second)))
			passed = second
		}
		for second := 1000.0; second < c.last-rounding; second += 1000 {
			until(second)
			token, err := authority.Issue(t.Context(), request([]byte("record")))
			if err != nil {
				t.Fatalf("%v, %v s after the last agreement: %v", c, second, err)
			}
			want := c.bound.Seconds() + float64(c.ppm)*second/1e6
			if said := token.Accuracy.Seconds(); said < want || said > want+0.0021 { // rounded up to a millisecond, and genTime down
				t.Errorf("%v, after %v s: accuracy %v, want %v s", c, second, token.Accuracy, want)
			}
		}
		until(c.last - rounding - 1)
		if _, err := authority.Issue(t.Context(), request([]byte("record"))); err != nil {
			t.Errorf("%v, before %v s: %v", c, c.last, err)
		}
		until(c.last - 0.5)
		if r := clock.Now(); r.State != ntp.Holdover {
			t.Errorf("%v: %s half a second before", c, r.State)
		}
		until(c.last + 0.5)
		if token, err := authority.Issue(t.Context(), request([]byte("record"))); !errors.Is(err, tsa.ErrTimeNotAvailable) {
			t.Errorf("%v, after %v s: %+v, %v", c, c.last, token, err)
		}
		if r := clock.Now(); r.State != ntp.Untrusted {
			t.Errorf("%v: %s", c, r.State)
		}
	}
}

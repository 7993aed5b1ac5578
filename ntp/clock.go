package ntp

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// A BootClock reads the kernel's clocks; ntp/sysclock has the real one. All methods are safe for concurrent use.
type BootClock interface {
	Boot() time.Duration      // CLOCK_BOOTTIME: never stepped, goes on in sleep
	Monotonic() time.Duration // CLOCK_MONOTONIC: Boot less the time slept, but for a constant
	Raw() time.Duration       // CLOCK_MONOTONIC_RAW: Monotonic without what adjtimex(2) bends
	Realtime() time.Time      // CLOCK_REALTIME: compared with Boot to notice steps, and used for nothing else
}

// Config are the policies of a [Clock]. The zero value of each field is its default.
type Config struct {
	// MinSources is the number of groups that must agree, at least. Default 3, the fewest that outvote a liar: n tolerate
	// (n−1)/2 liars, even liars who can silence the others. With 1 whoever owns that source owns the time, within what the
	// clock's own prediction catches.
	MinSources int
	// MaxBound is the accuracy the policy promises: beyond it the clock is Untrusted. Default 1 s.
	MaxBound time.Duration
	// HoldoverMax is how long the clock is trusted without a fresh agreement, however small the bound. Default 24 h.
	HoldoverMax time.Duration
	// DriftPPM is by how much the oscillator may be off, 15 to 500 parts per million; the bound grows by it. Default 50.
	// What adjtimex(2) bends the kernel's clock by comes on top, so run chronyd with -x.
	DriftPPM int
	// AgreeRounds is how many rounds in a row must agree, and with one another, before the clock is Trusted. Default 3.
	AgreeRounds int
	// MaxRootDistance and MaxReferenceAge sort out answers before the selection. Defaults MaxBound and 1 h.
	MaxRootDistance time.Duration
	MaxReferenceAge time.Duration
	// ReentryLimit is how far from the clock's own prediction a majority may be taken without an operator (Readmit)
	// once the clock was Suspect or Untrusted, in all: what such entries have moved the clock beyond its bound is added up
	// until none has for HoldoverMax, or an operator confirms one. Default MaxBound. Below 600 ms a leap second needs the
	// operator too.
	ReentryLimit time.Duration
	// FreshFor is how old the last agreement may be for the clock to be called Trusted and not Holdover, so that one lost
	// packet is no event; three poll intervals or more. Sources that answer and contradict one another end Trusted at
	// once. Default 1 min.
	FreshFor time.Duration
	// PolicyNote is repeated in each Reading's Provenance. Default "min_sources=N".
	PolicyNote string
}

// withDefaults returns c with its defaults filled in, and everything wrong with it.
func (c Config) withDefaults() (Config, error) {
	def := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	num := func(n *int, v int) {
		if *n == 0 {
			*n = v
		}
	}
	num(&c.MinSources, 3)
	num(&c.DriftPPM, 50)
	num(&c.AgreeRounds, 3)
	def(&c.MaxBound, time.Second)
	def(&c.HoldoverMax, 24*time.Hour)
	def(&c.MaxRootDistance, c.MaxBound)
	def(&c.MaxReferenceAge, time.Hour)
	def(&c.ReentryLimit, c.MaxBound)
	def(&c.FreshFor, time.Minute)
	if c.PolicyNote == "" {
		c.PolicyNote = fmt.Sprintf("min_sources=%d", c.MinSources)
	}
	var errs []error
	refuse := func(bad bool, format string, args ...any) {
		if bad {
			errs = append(errs, fmt.Errorf("ntp: "+format, args...))
		}
	}
	refuse(c.MinSources < 1, "min_sources %d: want 1 or more", c.MinSources)
	refuse(c.AgreeRounds < 1, "agree_rounds %d: want 1 or more", c.AgreeRounds)
	refuse(c.DriftPPM < 15 || c.DriftPPM > 500, "drift_ppm %d: want 15 to 500", c.DriftPPM)
	// An hour and a year are far beyond use; the limits keep the arithmetic far from overflow.
	for name, d := range map[string]time.Duration{"max_bound": c.MaxBound, "max_root_distance": c.MaxRootDistance, "reentry_limit": c.ReentryLimit} {
		refuse(d < time.Millisecond || d > time.Hour, "%s %v: want 1 ms to 1 h", name, d)
	}
	for name, d := range map[string]time.Duration{"holdover_max": c.HoldoverMax, "max_reference_age": c.MaxReferenceAge, "fresh_for": c.FreshFor} {
		refuse(d < time.Millisecond || d > 366*24*time.Hour, "%s %v: want 1 ms to 366 days", name, d)
	}
	return c, errors.Join(errs...)
}

const (
	// stepTolerance is by how much REALTIME−BOOTTIME and BOOTTIME−MONOTONIC may seem to change: two clocks cannot be
	// read at one instant.
	stepTolerance = 5 * time.Millisecond
	// slewPPM is the most that the kernel's steady frequency correction may be (500 ppm, adjtimex(2)); what bends the
	// clock more than that is a slew.
	slewPPM = 500
	// minBound is the smallest bound ever published: scheduling, interrupt latency and the reading itself.
	minBound = time.Millisecond
	// leapBefore and leapAfter surround the end of the month by our own count, from the first instant that it may be to the
	// last; between them neither genTime nor a round is taken. After an inserted second our count is one second ahead, hence
	// 3: that is 00:00:02 UTC.
	leapBefore = time.Second
	leapAfter  = 3 * time.Second
	// leapNotice is how long before the end of the month every server announces a leap second; chronyd does so for a day. A
	// clock that has heard nobody since cannot know.
	leapNotice = 12 * time.Hour
)

// An instant is a reading of BOOTTIME with what it takes to judge how far the kernel's clock can be relied on since another
// one.
type instant struct {
	boot time.Duration
	bent time.Duration // MONOTONIC−RAW: what adjtimex(2) has bent the clock by, but for a constant
	torn time.Duration // by how much bent may be wrong, its two clocks not having been read at one instant
}

// An anchor is an interval of UTC at an instant. Everything later is predicted from it.
type anchor struct {
	instant
	span span
}

// at carries the anchor to t, widened by the drift of the way and by what the clock was bent on it. The oscillator keeps
// within ppm; BOOTTIME is the oscillator as adjtimex(2) has it, which a root user may set to 500 ppm for good and to ten
// per cent for a while. MONOTONIC is bent alike, and sleep shows in neither it nor RAW.
func (a anchor) at(t instant, ppm int) span {
	way := t.boot - a.boot
	g := int64(growth(way, ppm) + (t.bent - a.bent).Abs() + t.torn + a.torn)
	return span{a.span.low + int64(way) - g, a.span.high + int64(way) + g}
}

// floored is s, no narrower than minBound to either side.
func floored(s span) span {
	if s.half() >= minBound {
		return s
	}
	return span{s.mid() - int64(minBound), s.mid() + int64(minBound)}
}

// A view is everything that Now needs. It is never changed after it is stored.
type view struct {
	state      State
	anchored   bool
	anchor     anchor
	agreed     time.Duration // BOOTTIME of the last agreement
	wall       int64         // REALTIME−BOOTTIME in Unix nanoseconds, when last found in order
	slept      time.Duration // BOOTTIME−MONOTONIC, likewise
	leapAt     int64         // end of a month at which a leap second may come; 0: none
	leap       Leap          // what a majority announced for it; LeapNone: it is too early to know
	moved      time.Duration // by how much re-entries without an operator have moved the clock beyond its bound
	movedAt    time.Duration // BOOTTIME of the last of them
	provenance string
}

// A candidate is what rounds have agreed on that are not yet enough.
type candidate struct {
	anchor  anchor
	rounds  int
	leapAt  int64 // end of the month that a leap second was announced for; 0: none
	readmit bool  // an operator has taken responsibility for it, however far it is
}

// A Round is the outcome of one Update, for the operator.
type Round struct {
	At       time.Duration    // CLOCK_BOOTTIME
	Agreed   []string         // groups
	Rejected []string         // groups outvoted
	Unfit    map[string]error // sources whose answer was not a candidate, each wrapping ErrUnfit
	Offset   time.Duration    // middle of the majority less own prediction; 0 without either
	Err      error            // why this round did not confirm the clock; nil if it did, or if it counted towards Trusted
}

var (
	// ErrTooFew means that a majority agreed, but not enough groups for the policy.
	ErrTooFew = errors.New("ntp: fewer groups agree than the policy wants")
	// ErrJump means that the majority contradicts the clock's own prediction.
	ErrJump = errors.New("ntp: majority contradicts own prediction")
	// ErrOperator means that the majority is further away than the machine may correct by itself; see Clock.Readmit.
	ErrOperator = errors.New("ntp: majority is beyond the re-entry limit, an operator must confirm")
	// ErrBackwards means that the majority's time lies before one already vouched for.
	ErrBackwards = errors.New("ntp: majority lies before a time already vouched for")
	// ErrLeap means that no round is taken around a leap second.
	ErrLeap = errors.New("ntp: leap second in progress")
)

// A Clock is the appliance's own time: an anchor that the majority of sources agreed on, carried forward on
// CLOCK_BOOTTIME, with a bound that grows by DriftPPM until the next agreement. CLOCK_REALTIME never enters it.
//
// A round that agrees does not replace the clock's own interval, it is intersected with it. So the bound is at every
// instant what all rounds since the last entry to Trusted allow, and a majority that creeps away faster than DriftPPM
// runs out of the interval and is caught as a jump.
//
// Now is lock-free and safe for concurrent use, as are all other methods.
type Clock struct {
	cfg     Config
	clock   BootClock
	view    atomic.Pointer[view]
	emitted atomic.Int64 // latest time vouched for, Unix nanoseconds; only grows
	// withheld is a drill's; nil: there is none.
	withheld atomic.Pointer[withholding]

	// mu guards the writing of view and everything below.
	mu       sync.Mutex
	cand     *candidate
	raw      time.Duration
	rawBoot  time.Duration
	order    time.Duration // BOOTTIME since which nobody is known to have disturbed the machine's clocks
	seen     time.Duration // BOOTTIME of the latest look
	last     Round
	onChange func(from, to State, reason string, r Reading)
	pending  []func()
	draining bool
}

// NewClock returns a clock in state Cold. The error lists everything wrong with cfg.
func NewClock(cfg Config, clock BootClock) (*Clock, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	c := &Clock{cfg: cfg, clock: clock}
	c.view.Store(&view{state: Cold})
	c.mu.Lock()
	defer c.mu.Unlock()
	c.refer(c.sample())
	return c, nil
}

// OnChange sets the function that is told of every change of state, with the reading right after it. Calls come one at
// a time and in order, from the goroutine of whoever noticed the change, a caller of Now included; f may call the
// clock. Set it before the first Update; a change before that is lost.
func (c *Clock) OnChange(f func(from, to State, reason string, r Reading)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.onChange = f
}

// Now returns the present reading.
//
// The Time of a reading that is Trusted is never before that of an earlier one: when a round moved the clock back, the
// last time is repeated until the clock has caught up, and the bound includes the difference. A reading that is not
// Trusted may be looked at and not signed; its Time is zero while the clock is Cold or Acquiring for the first time.
func (c *Clock) Now() Reading {
	for try := 1; ; try++ {
		v := c.view.Load() // before the clocks, so that the anchor is never in the future
		s := c.glance()
		if try > 1 {
			s = c.sample()
		}
		if v.usable() {
			if to, _ := c.verdict(v, s, 0); to != v.state {
				if c.settle(v) {
					continue
				}
				// Two clock readings torn apart by the scheduler looked like a step. The careful look found none.
			}
		}
		if r, ok := c.reading(v, s.instant()); ok {
			return r
		}
		if try < 4 {
			continue // a faster caller was handed a later time while we were off the processor: look again
		}
		c.fail(Untrusted, "ntp: bound exceeded by holding the time back from going backwards, or by a busy processor")
	}
}

func (v *view) usable() bool { return v.state == Trusted || v.state == Holdover }

// reading makes the reading of v at t. It is false if v is usable but the bound exceeds its ceiling: the time would have to
// be held back too far, or the clocks were read too far apart.
func (c *Clock) reading(v *view, t instant) (Reading, bool) {
	r := Reading{State: v.state, Provenance: v.provenance}
	if !v.anchored {
		return r, true
	}
	s := v.anchor.at(t, c.cfg.DriftPPM)
	if v.usable() && s.half() > c.cfg.MaxBound {
		return Reading{}, false
	}
	now, bound := s.mid(), s.half()
	for {
		last := c.emitted.Load()
		if now <= last { // hold
			bound += time.Duration(last - now)
			now = last
			if v.usable() && bound > c.cfg.MaxBound {
				return Reading{}, false
			}
			break
		}
		if !v.usable() || c.emitted.CompareAndSwap(last, now) {
			break
		}
	}
	r.Time, r.Bound = unixNano(now), bound
	return r, true
}

// A sample is one look at the kernel's clocks; mono and wall were read between boot and boot2.
type sample struct {
	boot, boot2, mono, raw time.Duration
	wall                   time.Time
}

func (s sample) instant() instant { return instant{s.boot, s.mono - s.raw, s.boot2 - s.boot} }

// glance looks once. MONOTONIC stands in for the second look at BOOTTIME: it is cheaper, and the two differ by sleep.
func (c *Clock) glance() sample {
	s := sample{boot: c.clock.Boot(), mono: c.clock.Monotonic(), raw: c.clock.Raw(), wall: c.clock.Realtime()}
	s.boot2 = s.boot + max(c.clock.Monotonic()-s.mono, 0)
	return s
}

// sample looks until the clocks were read within a millisecond of one another, or gives up and returns the tightest.
func (c *Clock) sample() sample {
	var best sample
	for i := range 20 {
		s := sample{boot: c.clock.Boot(), mono: c.clock.Monotonic(), raw: c.clock.Raw(), wall: c.clock.Realtime()}
		s.boot2 = c.clock.Boot()
		if i == 0 || s.boot2-s.boot < best.boot2-best.boot {
			best = s
		}
		if best.boot2-best.boot < time.Millisecond {
			break
		}
	}
	return best
}

const wentBack = "ntp: CLOCK_BOOTTIME went back: the machine was restored from a snapshot"

// verdict is the state that v should have at s, and why. Only clocks in use are judged. Extra is added to the tolerances.
func (c *Clock) verdict(v *view, s sample, extra time.Duration) (State, string) {
	own := v.anchor.at(s.instant(), c.cfg.DriftPPM)
	bound, age := own.half(), s.boot-v.agreed
	if s.boot < v.anchor.boot {
		return Suspect, wentBack
	}
	if d := s.boot - s.mono - v.slept; d > stepTolerance+extra || d < -stepTolerance-extra {
		return Suspect, fmt.Sprintf("ntp: the machine slept for %v: drift meanwhile is unknown", d.Round(time.Millisecond))
	}
	// A step that is smaller than the bound could not have made a wrong stamp even if REALTIME were used, and is below
	// what the sources themselves are worth.
	if d := time.Duration(s.wall.UnixNano() - int64(s.boot) - v.wall); d.Abs() > max(stepTolerance, bound)+extra {
		return Suspect, fmt.Sprintf("ntp: CLOCK_REALTIME was stepped by %v", d.Round(time.Millisecond))
	}
	if v.leapAt != 0 && own.high >= v.leapAt-int64(leapBefore) {
		if v.leap == LeapNone {
			return Suspect, fmt.Sprintf("ntp: there may be a leap second, and no agreement for %v that could have announced it", age.Round(time.Second))
		}
		return Suspect, ErrLeap.Error()
	}
	if bound > c.cfg.MaxBound {
		return Untrusted, fmt.Sprintf("ntp: bound exceeds %v, %v after the last agreement", c.cfg.MaxBound, age.Round(time.Second))
	}
	if age > c.cfg.HoldoverMax {
		return Untrusted, fmt.Sprintf("ntp: no agreement for %v", age.Round(time.Second))
	}
	if v.state == Trusted && age > c.cfg.FreshFor {
		return Holdover, fmt.Sprintf("ntp: no agreement for %v", age.Round(time.Second))
	}
	if w := c.withholds(s.boot); w != nil {
		return w.verdict(v.state, s.boot)
	}
	return v.state, ""
}

// settle takes a careful look and applies what it finds. It is true if v is no longer the view, whoever replaced it.
func (c *Clock) settle(v *view) bool {
	c.mu.Lock()
	if c.view.Load() == v {
		_ = c.look(c.sample()) // told by OnChange
	}
	changed := c.view.Load() != v
	c.mu.Unlock()
	c.drain()
	return changed
}

func (c *Clock) fail(to State, reason string) {
	c.mu.Lock()
	if c.view.Load().usable() {
		c.move(to, reason, func(*view) {})
	}
	c.mu.Unlock()
	c.drain()
}

// look applies a sample under mu, in whatever state the clock is. The error, if any, tells how the machine's clocks were
// disturbed; then agreement has to start afresh.
func (c *Clock) look(s sample) error {
	v, torn := c.view.Load(), s.boot2-s.boot
	var reason string
	if v.usable() {
		var to State
		if to, reason = c.verdict(v, s, torn); to == Holdover || to == Untrusted {
			c.move(to, reason, func(*view) {})
			reason = ""
		}
	} else if slept, wall := s.boot-s.mono-v.slept, time.Duration(s.wall.UnixNano()-int64(s.boot)-v.wall); max(slept.Abs(), wall.Abs()) > stepTolerance+torn {
		// Nobody relies on the clock now, but neither what the rounds agreed on, nor the anchor that re-entry is measured
		// from, survives a step or a sleep untouched.
		reason = fmt.Sprintf("ntp: CLOCK_REALTIME was stepped by %v or the machine slept for %v", wall, slept)
	}
	// The machine may have been restored to an instant later than the anchor's.
	if reason == "" && s.boot < c.seen {
		reason = wentBack
	}
	c.seen = s.boot
	// Has anybody bent the clock? The baseline is a minute or more, so that a slew just below the tolerance cannot go on
	// for ever unseen.
	way := s.boot - c.rawBoot
	if d := (s.raw - c.raw) - way; reason == "" && d.Abs() > growth(way, slewPPM)+stepTolerance+torn {
		reason = fmt.Sprintf("ntp: the kernel's clock was slewed by %v in %v", (-d).Round(time.Millisecond), way.Round(time.Millisecond))
	}
	if reason == "" {
		if way > time.Minute {
			c.raw, c.rawBoot = s.raw, s.boot
		}
		return nil
	}
	c.cand = nil
	c.refer(s)
	err := errors.New(reason)
	if c.view.Load().anchored {
		c.suspect(err)
	}
	return err
}

// refer takes s as the order of things from now on.
func (c *Clock) refer(s sample) {
	v := *c.view.Load()
	v.wall, v.slept = s.wall.UnixNano()-int64(s.boot), s.boot-s.mono
	c.view.Store(&v)
	c.raw, c.rawBoot, c.order = s.raw, s.boot, s.boot
}

// move stores a view in state to, changed further by f, and queues the news. Callers hold mu and drain after.
func (c *Clock) move(to State, reason string, f func(*view)) {
	v := *c.view.Load()
	from := v.state
	v.state = to
	f(&v)
	c.view.Store(&v)
	if from == to || c.onChange == nil {
		return
	}
	// The reading is of the new view and claims nothing that Now has not: it does not advance what was emitted.
	quiet := v
	r := c.peek(&quiet)
	tell := c.onChange
	c.pending = append(c.pending, func() { tell(from, to, reason, r) })
}

// peek is a reading of v for the record; it is not handed out for stamping.
func (c *Clock) peek(v *view) Reading {
	r := Reading{State: v.state, Provenance: v.provenance}
	if v.anchored {
		s := v.anchor.at(c.glance().instant(), c.cfg.DriftPPM)
		now := max(s.mid(), c.emitted.Load())
		r.Time, r.Bound = unixNano(now), s.half()+time.Duration(now-s.mid())
	}
	return r
}

// drain tells what is pending, unless another goroutine is at it, which then tells ours as well. Callers hold no lock.
func (c *Clock) drain() {
	c.mu.Lock()
	if c.draining {
		c.mu.Unlock()
		return
	}
	c.draining = true
	for len(c.pending) > 0 {
		batch := c.pending
		c.pending = nil
		c.mu.Unlock()
		for _, tell := range batch {
			tell()
		}
		c.mu.Lock()
	}
	c.draining = false
	c.mu.Unlock()
}

// Update takes one round of measurements, one or none of each source, all fresh. Calling it with none is right when
// nobody answered.
func (c *Clock) Update(ms []Measurement) Round {
	c.mu.Lock()
	r := c.update(ms)
	c.last = r
	c.mu.Unlock()
	c.drain()
	return r
}

// Last is the last round, for the operator.
func (c *Clock) Last() Round {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.last
}

func (c *Clock) update(ms []Measurement) Round {
	s := c.sample()
	r := Round{At: s.boot, Unfit: make(map[string]error)}

	// 1. What has happened to the machine meanwhile? An answer that was under way in a step or sleep is not fresh.
	if err := c.look(s); err != nil {
		r.Err = err
		return r
	}
	// 2. Around a leap second no two clocks agree what time it is. Afterwards our count has to find its place again.
	if v := c.view.Load(); v.leapAt != 0 && v.anchored {
		now := v.anchor.at(s.instant(), c.cfg.DriftPPM)
		switch {
		case now.low >= v.leapAt+int64(leapAfter):
			c.afterLeap()
		case now.high >= v.leapAt-int64(leapBefore):
			c.cand = nil
			r.Err = ErrLeap
			return r
		}
	}
	if c.withholds(s.boot) != nil {
		c.disagree(ErrWithheld, 0)
		r.Err = ErrWithheld
		return r
	}
	// 3. Who is fit to vote? An old or a future answer is a mistake of the caller, and not used. One from before a
	// disturbance that a caller of Now has noticed meanwhile is not fresh either.
	limits := Limits{MaxRootDistance: c.cfg.MaxRootDistance, MaxReferenceAge: c.cfg.MaxReferenceAge}
	var fit []Measurement
	for _, m := range ms {
		err := m.Check(limits)
		switch {
		case err != nil:
		case m.Boot > s.boot2 || s.boot-m.Boot > time.Minute:
			err = fmt.Errorf("%w: taken at %v of CLOCK_BOOTTIME, now is %v", ErrUnfit, m.Boot, s.boot)
		case m.Boot < c.order:
			err = fmt.Errorf("%w: taken at %v of CLOCK_BOOTTIME, before the machine's clocks were disturbed at %v", ErrUnfit, m.Boot, c.order)
		}
		if err != nil {
			r.Unfit[m.Source] = err
			continue
		}
		// A round waits for its slowest source. What the clock was bent by since this one answered, Boot does not show.
		m.RootDistance += (s.mono - s.raw - m.Bent).Abs() + s.boot2 - s.boot
		fit = append(fit, m)
	}
	// 4. What do they say?
	sel, err := Select(fit, s.boot, c.cfg.DriftPPM)
	r.Agreed, r.Rejected = sel.Agreed, sel.Rejected
	if err == nil && len(sel.Agreed) < c.cfg.MinSources {
		err = fmt.Errorf("%w: %d, policy %d", ErrTooFew, len(sel.Agreed), c.cfg.MinSources)
	}
	if err != nil {
		c.disagree(err, groups(fit))
		r.Err = err
		return r
	}
	// A clock that has just started must not begin its count within a leap second, before or after the jump.
	if s := sel.span(); sel.Leap != LeapNone && monthEnd(s.low)-s.high < int64(2*leapBefore) {
		c.cand = nil
		r.Err = ErrLeap
		return r
	}
	if v := c.view.Load(); v.anchored {
		r.Offset = time.Duration(sel.span().mid() - v.anchor.at(s.instant(), c.cfg.DriftPPM).mid())
	}
	r.Err = c.agree(sel, s.instant())
	return r
}

// disagree is a round without majority among so many groups. Silence is left to FreshFor.
func (c *Clock) disagree(err error, groups int) {
	c.cand = nil
	switch v := c.view.Load(); {
	case v.state == Trusted && errors.Is(err, ErrNoMajority) && groups > 1:
		c.move(Holdover, err.Error(), func(*view) {})
	case v.state == Acquiring && v.anchored:
		c.move(Untrusted, err.Error(), func(*view) {})
	case v.state == Acquiring:
		c.move(Cold, err.Error(), func(*view) {})
	}
}

// agree is a round with a majority, at t.
func (c *Clock) agree(sel Selection, t instant) error {
	v := c.view.Load()
	now := anchor{t, sel.span()}
	if v.usable() {
		own := v.anchor.at(t, c.cfg.DriftPPM)
		if !own.touches(now.span) {
			err := fmt.Errorf("%w: %v away, own bound %v, majority's %v", ErrJump,
				time.Duration(now.span.mid()-own.mid()).Round(time.Microsecond), own.half().Round(time.Microsecond), now.span.half().Round(time.Microsecond))
			c.cand = nil
			c.move(Suspect, err.Error(), func(*view) {})
			return err
		}
		now.span = floored(own.intersect(now.span))
		c.trust(now, sel)
		return nil
	}

	// Not trusted: the rounds must first agree with one another.
	if c.cand != nil {
		own := c.cand.anchor.at(t, c.cfg.DriftPPM)
		if c.cand.leapAt != 0 && own.high >= c.cand.leapAt-int64(leapBefore) || !own.touches(now.span) { // no count goes over a leap second
			c.cand = nil
		} else {
			c.cand.anchor = anchor{t, floored(own.intersect(now.span))}
			c.cand.rounds++
		}
	}
	if c.cand == nil {
		c.cand = &candidate{anchor: anchor{t, floored(now.span)}, rounds: 1}
	}
	if sel.Leap != LeapNone {
		c.cand.leapAt = monthEnd(now.span.low)
	}
	if v.state == Cold || v.state == Untrusted {
		c.move(Acquiring, fmt.Sprintf("%s agree", strings.Join(sel.Agreed, "+")), func(*view) {})
	}
	if c.cand.rounds < c.cfg.AgreeRounds {
		return nil
	}

	// Enough rounds. Is it where we expected it?
	found := c.cand.anchor
	if bound := found.span.half(); bound > c.cfg.MaxBound {
		return fmt.Errorf("%w: the majority's bound %v exceeds %v", ErrNoMajority, bound, c.cfg.MaxBound)
	}
	var moved time.Duration
	if v.anchored && !c.cand.readmit {
		own := v.anchor.at(t, c.cfg.DriftPPM)
		off := time.Duration(found.span.mid() - own.mid())
		// Small jumps add up. Otherwise whoever has the majority could move the clock by the limit again and again.
		before := v.moved
		if t.boot-v.movedAt > c.cfg.HoldoverMax {
			before = 0
		}
		moved = before + max(off.Abs()-own.half(), 0)
		if max(off.Abs(), moved) > c.cfg.ReentryLimit {
			err := fmt.Errorf("%w: %v away, and earlier ones without an operator %v, limit %v", ErrOperator,
				off.Round(time.Microsecond), before.Round(time.Microsecond), c.cfg.ReentryLimit)
			c.suspect(err)
			return err
		}
		if v.state != Suspect && !own.touches(found.span) {
			err := fmt.Errorf("%w: %v away, own bound %v", ErrJump, off.Round(time.Microsecond), own.half().Round(time.Microsecond))
			c.cand = nil
			c.suspect(err)
			return err
		}
	}
	// The time never goes back; it can be held only as far as the bounds cover it.
	if last := c.emitted.Load(); found.span.high < last || time.Duration(last-found.span.mid())+found.span.half() > c.cfg.MaxBound {
		err := fmt.Errorf("%w: %v before %v", ErrBackwards, time.Duration(last-found.span.mid()).Round(time.Microsecond), unixNano(last).Format(time.RFC3339Nano))
		c.suspect(err)
		return err
	}
	c.cand = nil
	if moved != v.moved {
		w := *v
		w.moved, w.movedAt = moved, t.boot
		c.view.Store(&w)
	}
	c.trust(found, sel)
	return nil
}

func (c *Clock) suspect(err error) {
	if c.view.Load().state != Suspect {
		c.move(Suspect, err.Error(), func(*view) {})
	}
}

// trust makes a the clock's anchor.
func (c *Clock) trust(a anchor, sel Selection) {
	prov := fmt.Sprintf("%s, %d of %d groups; %s", strings.Join(sel.Names, "+"), len(sel.Agreed), len(sel.Agreed)+len(sel.Rejected), c.cfg.PolicyNote)
	c.move(Trusted, strings.Join(sel.Agreed, "+")+" agree", func(v *view) {
		v.anchored, v.anchor, v.agreed, v.provenance = true, a, a.boot, prov
		// Leap seconds are inserted at the end of a month of UTC (RFC 5905 §7.3, leap indicator), up to now of June or December.
		now := a.span.low // its month has not ended, whatever the true time is
		v.leapAt, v.leap = 0, sel.Leap
		if end := halfYearEnd(now); sel.Leap != LeapNone {
			v.leapAt = monthEnd(now)
		} else if end-now > int64(leapNotice) {
			v.leapAt = end
		}
	})
}

func halfYearEnd(ns int64) int64 {
	t := unixNano(ns)
	return time.Date(t.Year(), (t.Month()-1)/6*6+7, 1, 0, 0, 0, 0, time.UTC).UnixNano()
}

func monthEnd(ns int64) int64 {
	t := unixNano(ns)
	return time.Date(t.Year(), t.Month()+1, 1, 0, 0, 0, 0, time.UTC).UnixNano()
}

// afterLeap makes the prediction leave open whether the second came: servers have announced leap seconds that did not.
// Unix time goes back by one when a second is inserted. The clock is Suspect, so nobody relies on the wide bound; fresh
// rounds decide, and half a second either way is within the re-entry limit.
func (c *Clock) afterLeap() {
	c.cand = nil
	v := *c.view.Load()
	if v.leap != LeapDelete {
		v.anchor.span.low -= int64(time.Second)
	}
	if v.leap != LeapInsert {
		v.anchor.span.high += int64(time.Second)
	}
	v.leapAt, v.leap = 0, LeapNone
	c.view.Store(&v)
}

// Readmit lets the majority in that was refused with [ErrOperator], at its next round, however far it is from the clock's
// own prediction, but never before a time already vouched for. The caller has had it confirmed by two persons, and
// journals it. If that majority is lost or changes its mind first, the permission is lost with it. It is an error if no
// majority is waiting.
func (c *Clock) Readmit() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cand == nil || c.cand.rounds < c.cfg.AgreeRounds {
		return fmt.Errorf("ntp: no majority waits to be readmitted (state %s)", c.view.Load().state)
	}
	c.cand.readmit = true
	return nil
}

// groups counts the voices of ms.
func groups(ms []Measurement) int {
	names := make(map[string]bool)
	for _, m := range ms {
		names[m.group()] = true
	}
	return len(names)
}

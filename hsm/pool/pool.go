// Package pool makes one hsm.Token of several machines' tokens of a slot class, so that the loss of one machine costs
// no signature whose key another machine holds too, and so that machines can be added and taken away while keys sign.
//
// # Which machine
//
// The pool knows which machine holds which key: it reads the labels when a machine is taken in, and follows what it
// makes and destroys. An operation goes to a machine that holds the key, is not draining, and whose breaker is closed.
// Among these it takes one whose expected time (the moving mean of its latency × (1 + operations there ÷ weight)) is
// the least, or nearly so; those that are nearly the same take turns by weight. A key is made on the machine that has
// the fewest for its weight where it is a signer's, and on the first machine otherwise.
//
// A label means one key: a machine that holds another key under a label of the pool is not taken in (key pairs are
// compared by their public key, MAC keys by what they answer), and says so until somebody has looked.
//
// # What happens when something fails
//
//   - An operation that another machine may do (no answer in half of CallDeadline, hsm.ErrUnavailable, hsm.ErrDeadline,
//     hsm.ErrNeedsOperator there, PKCS#11 classes other than permanent, a signature that does not verify) is done once more, on another machine that
//     holds the key. Both tries together take CallDeadline at most. Generating and destroying keys is never repeated.
//   - A call that took too long, a machine that is not available, a signature that does not verify, or three failures in a
//     row open its breaker: it gets
//     no operation until a signature with a key made for that (hsm.HealthPrefix) has verified. One is asked for each
//     second while the breaker is open, and while nothing else shows that the machine works.
//   - A key that a machine says it has not: the pool does not ask that machine for it again.
//
// With one machine there is nothing to choose: its token is called as if there were no pool, and nothing is asked of it
// that nobody has asked for.
//
// # Fairness
//
// In front of each machine stands a queue with as many places as the machine has sessions and its worker keeps waiting calls. Applications (hsm.Caller)
// take turns in it, whoever asks for more waits in a longer line of his own. Over its quota of operations a second, an
// application is refused with [*hsm.QuotaError]; over its sessions it waits for them.
package pool

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"hash/fnv"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sirupsen/logrus"

	"yinjian/hsm"
	"yinjian/hsm/worker"
)

// A Token is a machine's token as a worker drives it. *worker.Client is one.
type Token interface {
	hsm.Token
	State() worker.State
}

// A Machine is what is taken into a pool.
type Machine struct {
	Name   string
	Token  Token // closed by its owner, after Remove
	Weight int   // share of the work, 1 to 100
	// Sessions is how many operations may be under way until the token itself says how many.
	Sessions int
	Draining bool // it gets no operation before Resume
}

// Config makes a [Pool].
type Config struct {
	Class hsm.SlotClass
	// CallDeadline bounds an operation with both its tries; 0: 5 s.
	CallDeadline time.Duration
	// Interval is the time between two looks at a machine, Probe what a look may take; 0: 1 s, 2 s.
	Interval, Probe time.Duration
	// Now answers the trusted UTC time, zero while there is none. It is what [State.Since] is taken from.
	Now func() time.Time
	// Discarded, if set, is given an answer that its asker's check refused (hsm.CheckAnswer). It must not block.
	Discarded func(answer []byte, reason error)
	Log       logrus.FieldLogger
}

// A Phase is what a machine is doing in a pool.
type Phase string

const (
	Starting      Phase = "starting"       // its keys are not known yet: it gets no operation
	Up            Phase = "up"             //
	Down          Phase = "down"           // the breaker is open
	NeedsOperator Phase = "needs_operator" // it refused a PIN
	Refused       Phase = "refused"        // it holds another key under a label of the pool
	Draining      Phase = "draining"       // told so: no new operation
)

// State is a machine's health in a pool.
type State struct {
	Machine string
	Class   hsm.SlotClass
	Phase   Phase
	Reason  string    // what brought it there
	Since   time.Time // UTC; zero when no time was trusted then
	Weight  int
	// UnderWay and Waiting are operations now, Done since the start, Failed those that the machine failed.
	UnderWay, Waiting, Done, Failed int64
	Latency                         time.Duration // moving mean; 0: none measured
	Keys, Only                      int           // keys it holds, and of these those that no other machine holds
}

// A Pool is an hsm.Token. Safe for concurrent use.
type Pool struct {
	cfg    Config
	log    logrus.FieldLogger
	quotas quotas

	members atomic.Pointer[[]*member] // replaced under mu; the first is the one that keys stay on
	admit   sync.Mutex                // held while a machine is taken in

	mu      sync.Mutex               // guards what follows, and the members' fields that say so
	holders map[string][]*member     // by label; slices are replaced, never changed
	making  map[string]chan struct{} // by label; closed when the key is made
	looks   sync.WaitGroup
}

var _ hsm.Token = (*Pool)(nil)

// A member is a machine in the pool.
type member struct {
	Machine
	queue  queue
	failed atomic.Int64
	looked atomic.Bool // a look is under way

	// Guarded by the pool's mu:
	phase    Phase
	reason   string // of the phase
	why      string // what opened the breaker, or kept its keys from being read
	since    time.Time
	draining bool
	known    bool // its keys were read, and they agree with the others'
	refused  error
	open     bool      // the breaker
	closed   time.Time // when the breaker last closed; monotonic
	row      int       // failures in a row
	well     time.Time // when an operation last succeeded; monotonic, and only kept where there are several machines
	busy     int       // operations that were sent here
	latency  time.Duration
	measured time.Time // monotonic
	turn     float64   // work given so far ÷ weight
	keys     map[string]hsm.KeyInfo
	lacks    map[string]bool // wrapping keys that it turned out not to have, or not to be fit for
	health   *healthKey
}

// Most is how many machines a pool takes.
const Most = 16

const (
	// rowOpens is how many failures in a row open the breaker, where none of them says that the machine is away.
	rowOpens = 3
	// alike is how much worse than the best a machine's expected time may be for the two to take turns: measured latencies
	// of equal machines differ as much.
	alike = 3
	// lead is how many turns a machine that rested can be behind: it must not get everything when it comes back.
	lead = 500
	// forget is how long it takes until a latency that is not measured again counts for half.
	forget = 100 * time.Millisecond
	// smooth is the weight of a new latency in the moving mean: 1/smooth.
	smooth = 16
	// outlier is how many times the mean one latency can count for: a machine is slow when its calls are, not when a single
	// one was.
	outlier = 4
)

// New makes a pool without machines.
func New(cfg Config) *Pool {
	for d, otherwise := range map[*time.Duration]time.Duration{&cfg.CallDeadline: 5 * time.Second, &cfg.Interval: time.Second, &cfg.Probe: 2 * time.Second} {
		if *d == 0 {
			*d = otherwise
		}
	}
	p := &Pool{cfg: cfg, log: cfg.Log.WithField("slot", string(cfg.Class)), quotas: quotas{of: map[string]*quota{}}, holders: map[string][]*member{}, making: map[string]chan struct{}{}}
	p.members.Store(&[]*member{})
	return p
}

func (p *Pool) all() []*member { return *p.members.Load() }

func (p *Pool) find(name string) *member {
	for _, m := range p.all() {
		if m.Name == name {
			return m
		}
	}
	return nil
}

// Run looks after the machines until ctx ends.
func (p *Pool) Run(ctx context.Context) error {
	tick := time.NewTicker(p.cfg.Interval)
	defer tick.Stop()
	defer p.looks.Wait()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
		members := p.all()
		for _, m := range members {
			if m.looked.CompareAndSwap(false, true) {
				p.looks.Go(func() {
					defer m.looked.Store(false)
					p.look(ctx, m, len(members) > 1)
				})
			}
		}
	}
}

// Add takes a machine in. The first of a pool is taken as it is. Another one's keys are read and held against those
// that are there: it gets operations once that is done, which Add waits for. An error says why it could not be done
// now; the machine stays in the pool, and is tried again while [Pool.Run] runs, unless Remove is called.
func (p *Pool) Add(ctx context.Context, machine Machine) error {
	if machine.Weight < 1 || machine.Weight > 100 || machine.Name == "" || len(p.all()) >= Most {
		return fmt.Errorf("hsm/pool: machine %q of weight %d, after %d others", machine.Name, machine.Weight, len(p.all()))
	}
	m := &member{Machine: machine, phase: Starting, draining: machine.Draining, keys: map[string]hsm.KeyInfo{}, lacks: map[string]bool{}}
	m.queue.capacity.Store(int64(max(1, machine.Sessions)))
	p.mu.Lock()
	old := p.all()
	if p.find(machine.Name) != nil {
		p.mu.Unlock()
		return fmt.Errorf("hsm/pool: machine %q is in the pool already", machine.Name)
	}
	if m.since = p.now(); len(old) == 0 {
		m.phase, m.closed = Up, time.Now() // interval
	}
	next := append(slices.Clone(old), m)
	if len(old) == 0 {
		p.members.Store(&next)
		p.mu.Unlock()
		return nil
	}
	p.mu.Unlock()
	// The first one's keys have to be known before there is a choice.
	if err := p.learn(ctx, old[0]); err != nil {
		return fmt.Errorf("hsm/pool: machine %s: %w", old[0].Name, err)
	}
	p.mu.Lock()
	next = append(slices.Clone(p.all()), m)
	p.members.Store(&next)
	p.mu.Unlock()
	if err := p.learn(ctx, m); err != nil {
		return fmt.Errorf("hsm/pool: machine %s: %w", m.Name, err)
	}
	return nil
}

// Drain lets a machine finish what it has and gives it no more; Resume ends that.
func (p *Pool) Drain(name string) error  { return p.drain(name, true) }
func (p *Pool) Resume(name string) error { return p.drain(name, false) }

func (p *Pool) drain(name string, on bool) error {
	m := p.find(name)
	if m == nil {
		return fmt.Errorf("hsm/pool: no machine %q", name)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	m.draining = on
	p.judge(m)
	return nil
}

// Only answers the labels of keys that this machine holds and no other one does that works and is not draining. A pool of
// one machine follows no keys: it answers none.
func (p *Pool) Only(name string) []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	m := p.find(name)
	if m == nil {
		return nil
	}
	var labels []string
	for label := range m.keys {
		if !hsm.IsMachines(label) && !slices.ContainsFunc(p.holders[label], func(o *member) bool { return o != m && !o.draining && !o.open && o.known }) {
			labels = append(labels, label)
		}
	}
	slices.Sort(labels)
	return labels
}

// Unread names the machines of several whose keys are not known, so that they may hold any.
func (p *Pool) Unread() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	var names []string
	for _, m := range p.all() {
		if !m.known && len(p.all()) > 1 {
			names = append(names, m.Name)
		}
	}
	return names
}

// Remove takes a machine out, when what it has is finished or ctx has ended, and answers its token. The first machine
// stays.
func (p *Pool) Remove(ctx context.Context, name string) (Token, error) {
	m := p.find(name)
	if m == nil || p.all()[0] == m {
		return nil, fmt.Errorf("hsm/pool: no machine %q that could be removed", name)
	}
	if err := p.Drain(name); err != nil {
		return nil, err
	}
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for waiting := true; waiting && m.queue.underWay()+m.queue.waiters.Load() > 0; {
		select {
		case <-tick.C:
		case <-ctx.Done():
			waiting = false
		}
	}
	p.admit.Lock() // nobody reads its keys now
	defer p.admit.Unlock()
	p.mu.Lock()
	defer p.mu.Unlock()
	next := without(p.all(), m)
	p.members.Store(&next)
	for label := range m.keys {
		p.dropLocked(m, label)
	}
	if len(next) == 1 { // nobody follows its keys from now on, and nobody would close its breaker
		next[0].known, next[0].open, next[0].row = false, false, 0
		clear(next[0].keys)
		clear(p.holders)
		p.judge(next[0])
	}
	return m.Token, nil
}

// States answers the machines' health, the first machine's first.
func (p *Pool) States() []State {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []State
	for _, m := range p.all() {
		p.judge(m)
		out = append(out, p.state(m))
	}
	return out
}

// state is one machine's. mu is held.
func (p *Pool) state(m *member) State {
	s := State{
		Machine: m.Name, Class: p.cfg.Class, Phase: m.phase, Reason: m.reason, Since: m.since, Weight: m.Weight,
		UnderWay: m.queue.underWay(), Waiting: m.queue.waiters.Load(), Done: m.queue.done(), Failed: m.failed.Load(), Latency: m.latency,
	}
	for label := range m.keys {
		if !hsm.IsMachines(label) {
			s.Keys++
			if len(p.holders[label]) == 1 {
				s.Only++
			}
		}
	}
	return s
}

func (p *Pool) now() time.Time {
	if p.cfg.Now == nil {
		return time.Time{}
	}
	return p.cfg.Now()
}

// judge sets the machine's phase from what is known of it. mu is held.
func (p *Pool) judge(m *member) {
	phase, reason := Up, ""
	w := m.Token.State()
	several := len(p.all()) > 1
	switch {
	case m.refused != nil:
		phase, reason = Refused, m.refused.Error()
	case w.Phase == worker.NeedsOperator:
		phase, reason = NeedsOperator, errorText(w.LastError)
	case m.draining:
		phase = Draining
	case m.open:
		phase, reason = Down, m.why
	case w.Phase != worker.Ready:
		phase, reason = Down, "the worker is being restarted: "+errorText(w.LastError)
	case several && !m.known:
		phase, reason = Starting, m.why
	}
	if !slices.Contains(p.all(), m) {
		return
	}
	if m.reason = reason; phase == m.phase {
		return
	}
	was := m.phase
	m.phase, m.since = phase, p.now()
	log := p.log.WithFields(logrus.Fields{"machine": m.Name, "from": was, "to": phase, "reason": reason})
	if phase == Up || phase == Draining || phase == Starting {
		log.Info("cipher machine changed state")
	} else {
		log.Warning("cipher machine changed state")
	}
}

func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// usable says whether the machine may get an operation. mu is held.
func (p *Pool) usable(m *member) bool {
	if ms := p.all(); len(ms) == 1 && ms[0] == m {
		return true // the others were removed since the operation was begun
	}
	return m.known && !m.draining && !m.open && m.Token.State().Phase == worker.Ready
}

// choose picks the machine for an operation and counts it as sent; nil, if none is usable. One that is preferred is taken
// if it is as good as any. others says whether another one could be tried.
func (p *Pool) choose(from []*member, but, prefer *member) (m *member, others bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now() // interval
	var could [Most]*member
	var expected [Most]float64
	n, least, ahead := 0, 0.0, 0.0
	for _, m := range from {
		if m == but || !p.usable(m) {
			continue
		}
		// A latency that nobody has measured for a while counts for less and less: one bad answer must not keep a machine
		// idle.
		d := m.latency >> min(30, max(0, int(now.Sub(m.measured)/forget)))
		e := float64(max(d, time.Microsecond)) * (1 + float64(m.busy)/float64(m.Weight))
		if n == 0 || e < least {
			least = e
		}
		could[n], expected[n] = m, e
		n++
		ahead = max(ahead, m.turn)
	}
	for i, c := range could[:n] {
		c.turn = max(c.turn, ahead-lead)
		if expected[i] <= least*alike && (m == nil || c == prefer || m != prefer && c.turn < m.turn) {
			m = c
		}
	}
	if m == nil {
		return nil, false
	}
	m.busy++
	m.turn += 1 / float64(m.Weight)
	return m, n > 1
}

// unavailable says why none of them is usable. mu is not held.
func (p *Pool) unavailable(what string, from []*member) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	operator := len(from) > 0
	text := ""
	for _, m := range from {
		p.judge(m)
		operator = operator && m.phase == NeedsOperator
		text += fmt.Sprintf("; machine %s is %s", m.Name, m.phase)
		if m.reason != "" {
			text += " (" + m.reason + ")"
		}
	}
	if operator {
		return fmt.Errorf("hsm/pool: %s: %w%s", what, hsm.ErrNeedsOperator, text)
	}
	return fmt.Errorf("hsm/pool: %s: %w%s", what, hsm.ErrUnavailable, text)
}

// again says whether another machine may be tried after err, and whether the machine is to blame.
func again(err error) bool {
	switch {
	case err == nil:
		return false
	case errors.Is(err, hsm.ErrDeclined), errors.Is(err, hsm.ErrDeadline), errors.Is(err, hsm.ErrUnavailable), errors.Is(err, hsm.ErrNeedsOperator), errors.Is(err, hsm.ErrBadSignature):
		return true
	}
	var e *hsm.Error
	return errors.As(err, &e) && e.Class() != hsm.ClassPermanent
}

// errSlow ends a try that another machine could make instead.
var errSlow = fmt.Errorf("%w: another machine is asked", hsm.ErrDeadline)

// A need is what an operation needs of a machine: the key of a label, or, for a wrapped key, the key that wraps it.
type need struct {
	label   string
	wrapped bool
	prefer  func(from []*member) *member // the machine that may have it at hand; nil: all are alike
	fits    func(machine string) bool    // whether a machine may be asked; nil: each
}

// lacking says whether the machine has not what the operation needs: nothing was done.
func (n need) lacking(err error) bool {
	return errors.Is(err, hsm.ErrKeyNotFound) || n.wrapped && errors.Is(err, hsm.ErrNoWrapping)
}

// route performs call on a machine of those that have what it needs, and once on another where that is right.
func route[T any](ctx context.Context, p *Pool, n need, call func(context.Context, *member) (T, error)) (T, error) {
	var none T
	ctx, cancel := context.WithTimeoutCause(ctx, p.cfg.CallDeadline, fmt.Errorf("%w (after %v)", hsm.ErrDeadline, p.cfg.CallDeadline))
	defer cancel()
	from, err := p.having(ctx, n)
	if err != nil {
		return none, err
	}
	if n.fits != nil {
		if from = slices.DeleteFunc(slices.Clone(from), func(m *member) bool { return !n.fits(m.Name) }); len(from) == 0 {
			return none, fmt.Errorf("hsm/pool: key %q: no machine that holds it: %w", n.label, hsm.ErrDeclined)
		}
	}
	var before *member
	var failure error
	for tries := 0; tries < 2 && ctx.Err() == nil; {
		var prefer *member
		if n.prefer != nil {
			prefer = n.prefer(from)
		}
		m, others := p.choose(from, before, prefer)
		if m == nil {
			break
		}
		limit := time.Duration(0)
		if others && before == nil {
			limit = p.cfg.CallDeadline / 2
		}
		out, err := try(ctx, p, m, limit, call)
		switch {
		case n.lacking(err):
			p.lost(m, n)
			from = without(from, m)
		case !again(err):
			return out, err
		default:
			before = m
			tries++
		}
		failure = err
	}
	if failure != nil {
		return none, failure
	}
	if ctx.Err() != nil { // no machine was asked: the caller had gone
		return none, fmt.Errorf("hsm/pool: key %q: %w", n.label, context.Cause(ctx))
	}
	return none, p.unavailable(fmt.Sprintf("key %q", n.label), from)
}

func without(from []*member, m *member) []*member {
	return slices.DeleteFunc(slices.Clone(from), func(o *member) bool { return o == m })
}

// having answers the machines that have what is needed, as far as is known.
func (p *Pool) having(ctx context.Context, n need) ([]*member, error) {
	switch {
	case n.wrapped:
		p.mu.Lock()
		defer p.mu.Unlock()
		from := slices.DeleteFunc(slices.Clone(p.all()), func(m *member) bool { return m.lacks[n.label] })
		if len(from) == 0 {
			return nil, fmt.Errorf("hsm/pool: no machine has the wrapping key %q: %w", n.label, hsm.ErrNoWrapping)
		}
		return from, nil
	case n.label == "":
		return p.all(), nil
	}
	return p.holding(ctx, n.label)
}

// try performs call on one machine, at most for limit (0: as ctx says), and keeps account of how that went.
func try[T any](ctx context.Context, p *Pool, m *member, limit time.Duration, call func(context.Context, *member) (T, error)) (out T, err error) {
	attempt := ctx
	if limit > 0 {
		var cancel context.CancelFunc
		attempt, cancel = context.WithTimeoutCause(ctx, limit, errSlow)
		defer cancel()
	}
	begun := time.Now() // interval
	if err = m.queue.enter(attempt, hsm.CallerOf(ctx).Application); err != nil {
		err = fmt.Errorf("hsm/pool: waiting for machine %s: %w", m.Name, err)
		p.note(m, begun, 0, err)
		return out, err
	}
	sent := time.Now() // interval
	out, err = call(attempt, m)
	m.queue.leave()
	took := time.Since(sent)
	if answer, ok := any(out).([]byte); ok && err == nil {
		if err = p.check(ctx, answer); err != nil {
			var none T
			out = none
		}
	}
	p.note(m, sent, took, err)
	return out, err
}

// check performs the check that the asker has given along.
func (p *Pool) check(ctx context.Context, answer []byte) error {
	err := hsm.CheckAnswer(ctx, answer)
	if err != nil && p.cfg.Discarded != nil {
		p.cfg.Discarded(answer, err)
	}
	return err
}

// note keeps account of an operation that was begun then.
func (p *Pool) note(m *member, begun time.Time, took time.Duration, err error) {
	now := time.Now() // interval
	p.mu.Lock()
	defer p.mu.Unlock()
	m.busy--
	late := errors.Is(err, hsm.ErrDeadline)
	if !late && (errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)) {
		return // the caller has gone
	}
	if !again(err) || errors.Is(err, hsm.ErrDeclined) {
		m.well = now
		if m.row = 0; err == nil && took > 0 {
			if m.measured = now; m.latency == 0 {
				m.latency = took
			}
			m.latency += (min(took, outlier*m.latency) - m.latency) / smooth
		}
		return
	}
	m.failed.Add(1)
	// A call that was sent before the breaker closed says nothing about now, and one that timed out says nothing of a
	// machine that has answered others meanwhile: it had too much to do.
	if begun.Before(m.closed) || late && m.well.After(begun) {
		return
	}
	m.row++
	if late || m.row >= rowOpens || errors.Is(err, hsm.ErrUnavailable) || errors.Is(err, hsm.ErrNeedsOperator) || errors.Is(err, hsm.ErrBadSignature) {
		p.trip(m, err)
	}
}

// trip opens the breaker. mu is held.
func (p *Pool) trip(m *member, err error) {
	if m.open || len(p.all()) < 2 {
		return
	}
	m.open, m.why = true, err.Error()
	p.judge(m)
}

// lost takes note that a machine has not what was thought.
func (p *Pool) lost(m *member, n need) {
	log := p.log.WithFields(logrus.Fields{"machine": m.Name, "object": n.label})
	p.mu.Lock()
	defer p.mu.Unlock()
	if n.wrapped {
		m.lacks[n.label] = true
		log.Warning("the cipher machine has no such wrapping key that is fit")
		return
	}
	p.dropLocked(m, n.label)
	log.Error("the cipher machine has lost a key that it held")
}

func (p *Pool) dropLocked(m *member, label string) {
	delete(m.keys, label)
	if left := without(p.holders[label], m); len(left) > 0 {
		p.holders[label] = left
	} else {
		delete(p.holders, label)
	}
}

func (p *Pool) heldLocked(m *member, info hsm.KeyInfo) {
	if !slices.Contains(p.all(), m) {
		return // it was removed meanwhile
	}
	m.keys[info.Label] = info
	if !hsm.IsMachines(info.Label) && !slices.Contains(p.holders[info.Label], m) {
		p.holders[info.Label] = append(slices.Clone(p.holders[info.Label]), m)
	}
}

// holding answers the machines that hold the label. Of one that nobody has heard of all are asked.
func (p *Pool) holding(ctx context.Context, label string) ([]*member, error) {
	p.mu.Lock()
	from := p.holders[label]
	p.mu.Unlock()
	if len(from) > 0 {
		return from, nil
	}
	var unasked []*member
	var infos []hsm.KeyInfo
	for _, m := range p.all() {
		p.mu.Lock()
		usable, known := p.usable(m), m.known
		p.mu.Unlock()
		if !usable {
			if !known {
				unasked = append(unasked, m)
			}
			continue
		}
		info, err := m.Token.FindKey(ctx, label)
		switch {
		case err == nil:
			if len(from) > 0 {
				if err := p.same(ctx, m, info, from[0], infos[0]); err != nil {
					return nil, fmt.Errorf("%w: %w", hsm.ErrKeyAmbiguous, err)
				}
			}
			from, infos = append(from, m), append(infos, info)
		case errors.Is(err, hsm.ErrKeyNotFound):
		case !again(err):
			return nil, err
		default:
			unasked = append(unasked, m)
		}
	}
	switch {
	case len(from) == 0 && len(unasked) > 0:
		return nil, p.unavailable(fmt.Sprintf("key %q is on no machine that answers", label), unasked)
	case len(from) == 0:
		return nil, fmt.Errorf("hsm/pool: key %q: %w", label, hsm.ErrKeyNotFound)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, m := range from {
		p.heldLocked(m, infos[i])
	}
	return from, nil
}

// single answers the only machine, nil when there are several.
func (p *Pool) single() *member {
	if ms := p.all(); len(ms) == 1 {
		return ms[0]
	}
	return nil
}

// enter takes what the caller's quota allows; leave gives it back.
func (p *Pool) enter(ctx context.Context, caller hsm.Caller, what string) (leave func(), err error) {
	if caller.Rate == 0 && caller.Sessions == 0 {
		return func() {}, nil
	}
	places, err := p.quotas.enter(ctx, caller)
	if err != nil {
		return nil, fmt.Errorf("hsm/pool: key %q: %w", what, err)
	}
	return func() {
		if places != nil {
			<-places
		}
	}, nil
}

// alone performs call on the only machine, when it is the caller's turn.
func (p *Pool) alone(ctx context.Context, m *member, caller hsm.Caller, call func() ([]byte, error)) ([]byte, error) {
	if err := m.queue.enter(ctx, caller.Application); err != nil {
		return nil, fmt.Errorf("hsm/pool: waiting for the cipher machine: %w", err)
	}
	out, err := call()
	m.queue.leave()
	if err == nil {
		if err = p.check(ctx, out); err != nil {
			out = nil
		}
	}
	if again(err) && !errors.Is(err, hsm.ErrDeclined) {
		m.failed.Add(1)
	}
	return out, err
}

// An Extender is a machine's worker that has an extension. *worker.Client is one. An alias, so that whoever extends a worker
// need not know pools.
type Extender = interface {
	Extend(ctx context.Context, request func() ([]byte, error)) ([]byte, error)
}

// Extend has the worker of a machine that holds the key of label do what only it can: call is given the machine's name and
// its worker, and says what came of it. It is routed as an operation is, and done once more on another machine when call
// answers hsm.ErrDeclined too, which is not held against the first. Of several machines those that do not fit are not asked.
func (p *Pool) Extend(ctx context.Context, label string, fits func(machine string) bool,
	call func(ctx context.Context, machine string, w Extender) ([]byte, error)) ([]byte, error) {
	caller := hsm.CallerOf(ctx)
	leave, err := p.enter(ctx, caller, label)
	if err != nil {
		return nil, err
	}
	defer leave()
	on := func(ctx context.Context, m *member) ([]byte, error) {
		w, ok := m.Token.(Extender)
		if !ok {
			return nil, fmt.Errorf("hsm/pool: machine %s: its token has no worker that could be extended", m.Name)
		}
		return call(ctx, m.Name, w)
	}
	if m := p.single(); m != nil {
		return p.alone(ctx, m, caller, func() ([]byte, error) { return on(ctx, m) })
	}
	return route(ctx, p, need{label: label, fits: fits}, on)
}

// Do implements hsm.Token.
func (p *Pool) Do(ctx context.Context, label string, op hsm.Operation, data []byte) ([]byte, error) {
	caller := hsm.CallerOf(ctx)
	leave, err := p.enter(ctx, caller, label)
	if err != nil {
		return nil, err
	}
	defer leave()
	if m := p.single(); m != nil {
		return p.alone(ctx, m, caller, func() ([]byte, error) { return m.Token.Do(ctx, label, op, data) })
	}
	return route(ctx, p, need{label: label}, func(ctx context.Context, m *member) ([]byte, error) { return m.Token.Do(ctx, label, op, data) })
}

// DoWrapped implements hsm.Token: any machine that has the wrapping key will do. Among those that are equally good it
// is the same one for a key each time, for that one may have it unwrapped.
func (p *Pool) DoWrapped(ctx context.Context, key *hsm.WrappedKey, op hsm.Operation, data []byte) ([]byte, error) {
	caller := hsm.CallerOf(ctx)
	leave, err := p.enter(ctx, caller, key.Label)
	if err != nil {
		return nil, err
	}
	defer leave()
	if m := p.single(); m != nil {
		return p.alone(ctx, m, caller, func() ([]byte, error) { return m.Token.DoWrapped(ctx, key, op, data) })
	}
	// Rendezvous: each machine has a number for the key, and the highest is preferred. A machine more or less moves only
	// the keys that it takes or had.
	digest := key.Digest()
	prefer := func(from []*member) (best *member) {
		var most uint64
		p.mu.Lock()
		defer p.mu.Unlock()
		for _, m := range from {
			h := fnv.New64a()
			h.Write(digest[:])
			h.Write([]byte(m.Name))
			if n := h.Sum64(); p.usable(m) && (best == nil || n > most) {
				best, most = m, n
			}
		}
		return best
	}
	return route(ctx, p, need{label: key.KEK, wrapped: true, prefer: prefer}, func(ctx context.Context, m *member) ([]byte, error) {
		return m.Token.DoWrapped(ctx, key, op, data)
	})
}

// GenerateWrapped implements hsm.Token, on a machine that has the wrapping key.
func (p *Pool) GenerateWrapped(ctx context.Context, spec hsm.KeySpec, kek string) (hsm.KeyInfo, []byte, error) {
	if m := p.single(); m != nil {
		return m.Token.GenerateWrapped(ctx, spec, kek)
	}
	n := need{label: kek, wrapped: true}
	from, err := p.having(ctx, n)
	for err == nil {
		m, _ := p.choose(from, nil, nil)
		if m == nil {
			return hsm.KeyInfo{}, nil, p.unavailable(fmt.Sprintf("generating key %q", spec.Label), from)
		}
		begun := time.Now() // interval
		info, blob, gerr := m.Token.GenerateWrapped(ctx, spec, kek)
		p.note(m, begun, 0, gerr) // how long it takes to make a key says nothing of a signature
		if !n.lacking(gerr) {
			return info, blob, gerr
		}
		p.lost(m, n)
		from, err = p.having(ctx, n)
	}
	return hsm.KeyInfo{}, nil, err
}

// ForgetWrapped implements hsm.Token, on every machine. One that cannot be asked is an error: it may have the key. It is not
// waited for, so that the others forget in time.
func (p *Pool) ForgetWrapped(ctx context.Context, digest [32]byte) error {
	var errs []error
	for _, m := range p.all() {
		if p.single() == nil && m.Token.State().Phase != worker.Ready {
			errs = append(errs, p.unavailable("forgetting a wrapped key", []*member{m}))
			continue
		}
		if err := m.Token.ForgetWrapped(ctx, digest); err != nil {
			errs = append(errs, fmt.Errorf("hsm/pool: machine %s: %w", m.Name, err))
		}
	}
	return errors.Join(errs...)
}

// Info implements hsm.Token: it is the first machine's.
func (p *Pool) Info(ctx context.Context) (hsm.TokenInfo, error) { return p.all()[0].Token.Info(ctx) }

// FindKey implements hsm.Token.
func (p *Pool) FindKey(ctx context.Context, label string) (hsm.KeyInfo, error) {
	if m := p.single(); m != nil {
		return m.Token.FindKey(ctx, label)
	}
	return route(ctx, p, need{label: label}, func(ctx context.Context, m *member) (hsm.KeyInfo, error) {
		return m.Token.FindKey(ctx, label)
	})
}

// Random implements hsm.Token.
func (p *Pool) Random(ctx context.Context, n int) ([]byte, error) {
	if m := p.single(); m != nil {
		return m.Token.Random(ctx, n)
	}
	return route(ctx, p, need{}, func(ctx context.Context, m *member) ([]byte, error) { return m.Token.Random(ctx, n) })
}

// GenerateKey implements hsm.Token. A signer's key is made on the usable machine with the fewest keys for its weight,
// any other on the first machine.
func (p *Pool) GenerateKey(ctx context.Context, spec hsm.KeySpec) (hsm.KeyInfo, error) {
	if m := p.single(); m != nil {
		return m.Token.GenerateKey(ctx, spec)
	}
	done, err := p.claim(ctx, spec.Label)
	if err != nil {
		return hsm.KeyInfo{}, err
	}
	defer done()
	members := p.all()
	if from, err := p.holding(ctx, spec.Label); err == nil {
		return hsm.KeyInfo{}, fmt.Errorf("hsm/pool: key %q on machine %s: %w", spec.Label, from[0].Name, hsm.ErrKeyExists)
	} else if !errors.Is(err, hsm.ErrKeyNotFound) && !errors.Is(err, hsm.ErrUnavailable) {
		return hsm.KeyInfo{}, err
	}
	m := members[0]
	if p.cfg.Class == hsm.Staff {
		m = nil
		p.mu.Lock()
		for _, c := range members {
			if p.usable(c) && (m == nil || (len(c.keys)+1)*m.Weight < (len(m.keys)+1)*c.Weight) {
				m = c
			}
		}
		p.mu.Unlock()
		if m == nil {
			return hsm.KeyInfo{}, p.unavailable(fmt.Sprintf("generating key %q", spec.Label), members)
		}
	}
	info, err := m.Token.GenerateKey(ctx, spec)
	if err == nil {
		p.mu.Lock()
		p.heldLocked(m, info)
		p.mu.Unlock()
	}
	return info, err
}

// claim waits until nobody else makes a key of that label: two at once could make it on two machines.
func (p *Pool) claim(ctx context.Context, label string) (done func(), err error) {
	for {
		p.mu.Lock()
		other := p.making[label]
		if other == nil {
			mine := make(chan struct{})
			p.making[label] = mine
			p.mu.Unlock()
			return func() {
				p.mu.Lock()
				delete(p.making, label)
				p.mu.Unlock()
				close(mine)
			}, nil
		}
		p.mu.Unlock()
		select {
		case <-other:
		case <-ctx.Done():
			return nil, fmt.Errorf("hsm/pool: generating key %q: another call is making it: %w", label, context.Cause(ctx))
		}
	}
}

// DestroyKey implements hsm.Token. The key goes from each machine that holds it; while one of them is away nothing is
// destroyed, for its copy would go on.
func (p *Pool) DestroyKey(ctx context.Context, label string) error {
	if m := p.single(); m != nil {
		return m.Token.DestroyKey(ctx, label)
	}
	from, err := p.holding(ctx, label)
	if err != nil {
		return err
	}
	for _, m := range from {
		if m.Token.State().Phase != worker.Ready {
			return p.unavailable(fmt.Sprintf("destroying key %q", label), []*member{m})
		}
	}
	for _, m := range from {
		if err := m.Token.DestroyKey(ctx, label); err != nil && !errors.Is(err, hsm.ErrKeyNotFound) {
			return fmt.Errorf("hsm/pool: machine %s: %w", m.Name, err)
		}
		p.mu.Lock()
		p.dropLocked(m, label)
		p.mu.Unlock()
	}
	return nil
}

// Keys implements hsm.Token: the keys of all machines, each once, without those made for health. Of a machine that is
// away it answers what is known. Uses is set only for a key that one machine alone holds.
func (p *Pool) Keys(ctx context.Context) ([]hsm.KeyInfo, error) {
	if m := p.single(); m != nil {
		return m.Token.Keys(ctx)
	}
	at := map[string]int{}
	var out []hsm.KeyInfo
	for _, m := range p.all() {
		keys, err := m.Token.Keys(ctx)
		if err != nil {
			if !again(err) {
				return nil, err
			}
			keys = nil
			p.mu.Lock()
			for _, info := range m.keys {
				keys = append(keys, info)
			}
			p.mu.Unlock()
		}
		for _, info := range keys {
			if hsm.IsMachines(info.Label) {
				continue
			}
			if i, ok := at[info.Label]; ok {
				out[i].Uses = nil
				continue
			}
			at[info.Label] = len(out)
			out = append(out, info)
		}
	}
	return out, nil
}

// Close implements hsm.Token. The machines' tokens are their owner's to close.
func (p *Pool) Close() error {
	p.looks.Wait()
	return nil
}

// sameKey says whether two descriptions are of the same key pair; of secret keys there is nothing to compare.
func sameKey(a, b hsm.KeyInfo) bool {
	if a.Algorithm != b.Algorithm || (a.Public == nil) != (b.Public == nil) {
		return false
	}
	if a.Public == nil {
		return true
	}
	k, ok := a.Public.(interface{ Equal(crypto.PublicKey) bool })
	return ok && k.Equal(b.Public)
}

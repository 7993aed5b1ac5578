package api

import (
	"hash/maphash"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"yinjian/appliance/account"
)

// shares divides a number of places so that one holder shuts nobody out: who asks for more may afterwards hold no more than
// is left free. One holder alone gets half, a second one half of the rest, and so on; as places come back, n of them even
// out at 1/(n+1) each. So many holders at once that nothing is left to halve do shut a newcomer out.
type shares[holder comparable] struct {
	mu   sync.Mutex
	free int64            // guarded by mu
	held map[holder]int64 // guarded by mu; none is 0
}

func newShares[holder comparable](most int64) *shares[holder] {
	return &shares[holder]{free: most, held: map[holder]int64{}}
}

// take takes n places, or none.
func (s *shares[holder]) take(who holder, n int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.held[who]+n > s.free {
		return false
	}
	s.held[who] += n
	s.free -= n
	return true
}

// give returns what was taken.
func (s *shares[holder]) give(who holder, n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.free += n
	if s.held[who] -= n; s.held[who] == 0 {
		delete(s.held, who)
	}
}

// failures bounds failed authentications. Whoever fails more often than perMinute from one address is refused before his
// body is read, until a minute's budget has come back. Each address has sixteen budgets, and which one counts is drawn
// from the application's id by a key of this run: so an application that has the wrong key seldom stands in the way of
// another behind the same address, and the answers do not tell which ids exist. One that has proved itself from the
// address of late is not refused: whoever sends rubbish under its name from behind the same proxy would lock it out.
type failures struct {
	perMinute int
	seed      maphash.Seed

	mu     sync.Mutex
	of     map[failing]*rate.Limiter // guarded by mu
	proofs map[proof]time.Time       // guarded by mu: when it last was made; monotonic
}

// A proof is an application's that proved itself from an address.
type proof struct {
	from netip.Prefix
	app  string
}

// provedFor is how long a proof counts: an application that rests over a night proves itself anew.
const provedFor = 24 * time.Hour

type failing struct {
	from  netip.Prefix
	share uint8
}

const (
	failureShares = 16
	maxFailing    = 10_000 // budgets remembered, some 1 MB
)

func newFailures(perMinute int) *failures {
	return &failures{perMinute: perMinute, seed: maphash.MakeSeed(), of: map[failing]*rate.Limiter{}, proofs: map[proof]time.Time{}}
}

// who is the budget of an application at an address; "" is for requests that name none.
func (f *failures) who(from netip.Prefix, app string) failing {
	if app == "" {
		return failing{from, failureShares}
	}
	return failing{from, uint8(maphash.String(f.seed, app) % failureShares)}
}

// wait is how long one must wait before another failure is within the budget, 0 if none.
func (f *failures) wait(from netip.Prefix, app string) time.Duration {
	f.mu.Lock()
	defer f.mu.Unlock()
	l := f.of[f.who(from, app)]
	if at, ok := f.proofs[proof{from, app}]; l == nil || ok && time.Since(at) < provedFor { // interval
		return 0
	}
	return until(l, 1)
}

// proved remembers that an application has proved itself.
func (f *failures) proved(from netip.Prefix, app string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.proofs) >= maxFailing {
		clear(f.proofs) // each comes back with its next request that is looked at
	}
	f.proofs[proof{from, app}] = time.Now() // interval
}

// count takes one failure from the budget.
func (f *failures) count(from netip.Prefix, app string) {
	who := f.who(from, app)
	f.mu.Lock()
	defer f.mu.Unlock()
	l := f.of[who]
	if l == nil {
		if len(f.of) >= maxFailing {
			for k, l := range f.of {
				if l.Tokens() >= float64(f.perMinute) {
					delete(f.of, k)
				}
			}
		}
		if len(f.of) >= maxFailing { // so many addresses at once: begin anew rather than grow or shut out
			clear(f.of)
		}
		l = rate.NewLimiter(rate.Limit(f.perMinute)/60, f.perMinute)
		f.of[who] = l
	}
	l.Allow()
}

// until is how long it takes until l allows n more.
func until(l *rate.Limiter, n int) time.Duration {
	if missing := float64(n) - l.Tokens(); missing > 0 {
		return time.Duration(missing / float64(l.Limit()) * float64(time.Second))
	}
	return 0
}

// rates is how many requests each application may make.
type rates struct {
	limit func(app *account.Application) (perSecond, burst int)
	mu    sync.Mutex
	of    map[string]*rate.Limiter // guarded by mu, by application
}

// allow takes one request, or answers after which time there is one. A change of the application's limits counts at once.
func (r *rates) allow(app *account.Application) (ok bool, after time.Duration) {
	l := r.limiter(app)
	if l.Allow() { // a monotonic interval
		return true, 0
	}
	return false, until(l, 1)
}

// more takes n further requests at once, or none; more than burst it never does.
func (r *rates) more(app *account.Application, n int) (ok bool, after time.Duration, burst int) {
	l := r.limiter(app)
	if l.AllowN(time.Now(), n) { // interval
		return true, 0, l.Burst()
	}
	return false, until(l, n), l.Burst()
}

// limiter is the application's, with its limits as they are now.
func (r *rates) limiter(app *account.Application) *rate.Limiter {
	perSecond, burst := r.limit(app)
	r.mu.Lock()
	l := r.of[app.ID]
	if l == nil {
		l = rate.NewLimiter(rate.Limit(perSecond), burst)
		r.of[app.ID] = l
	}
	r.mu.Unlock()
	if l.Limit() != rate.Limit(perSecond) || l.Burst() != burst {
		l.SetLimit(rate.Limit(perSecond))
		l.SetBurst(burst)
	}
	return l
}

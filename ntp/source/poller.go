package source

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"yinjian/ntp"
)

// A Poller asks all sources at an interval and feeds the clock.
type Poller struct {
	Sources  []*Source
	Clock    *ntp.Clock
	Interval time.Duration // between rounds while the clock is Trusted; default 16 s
	// Fast is the interval while it is not, so that a start or a recovery does not take AgreeRounds long intervals.
	// Default a quarter of Interval, at least 1 s (but never more than Interval).
	Fast time.Duration
	Log  logrus.FieldLogger
	// OnRound, if set, is called after each round.
	OnRound func(ntp.Round)

	mu     sync.Mutex
	status map[string]Status
}

// A Status is what a source last said.
type Status struct {
	Source      string
	Measurement ntp.Measurement // zero if it never answered
	Err         error           // of the last query or of its fitness; nil if it was a candidate
}

// Status returns one entry for each source that was asked, in the order of Sources.
func (p *Poller) Status() []Status {
	p.mu.Lock()
	defer p.mu.Unlock()
	var all []Status
	for _, s := range p.Sources {
		if st, ok := p.status[s.Name()]; ok {
			all = append(all, st)
		}
	}
	return all
}

// Run polls until ctx ends, and returns nil then. A source is asked by one goroutine, for no longer than its timeout; Run
// returns after the last of them.
func (p *Poller) Run(ctx context.Context) error {
	if len(p.Sources) == 0 || p.Clock == nil || p.Log == nil {
		return errors.New("ntp source: a poller needs sources, a clock and a log")
	}
	names := make(map[string]bool)
	for _, s := range p.Sources {
		if names[s.Name()] {
			return errors.New("ntp source: two sources are named " + s.Name())
		}
		names[s.Name()] = true
	}
	interval := p.Interval
	if interval <= 0 {
		interval = 16 * time.Second
	}
	fast := p.Fast
	if fast <= 0 {
		fast = max(interval/4, time.Second)
	}
	fast = min(fast, interval)
	for {
		p.Round(ctx)
		if ctx.Err() != nil {
			return nil
		}
		wait := interval
		if p.Clock.Now().State != ntp.Trusted {
			wait = fast
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
	}
}

// Round asks every source once, all at the same time, and updates the clock. A round cut short by ctx is not used: that
// sources were not waited for does not mean that they are gone.
func (p *Poller) Round(ctx context.Context) ntp.Round {
	measurements, errs := make([]ntp.Measurement, len(p.Sources)), make([]error, len(p.Sources))
	var wg sync.WaitGroup
	for i, s := range p.Sources {
		wg.Go(func() { measurements[i], errs[i] = s.Query(ctx) })
	}
	wg.Wait()
	if ctx.Err() != nil {
		return ntp.Round{Err: context.Cause(ctx)}
	}
	var ms []ntp.Measurement
	for i, m := range measurements {
		if errs[i] == nil {
			ms = append(ms, m)
		}
	}
	r := p.Clock.Update(ms)
	for i, s := range p.Sources {
		err := errs[i]
		if err == nil {
			err = r.Unfit[s.Name()]
		}
		p.record(s.Name(), measurements[i], err)
	}
	if p.OnRound != nil {
		p.OnRound(r)
	}
	return r
}

// record keeps the status of a source, and logs when it goes from good to bad or back; not each time.
func (p *Poller) record(name string, m ntp.Measurement, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.status == nil {
		p.status = make(map[string]Status)
	}
	was, known := p.status[name]
	now := Status{Source: name, Measurement: m, Err: err}
	if m.Source == "" {
		now.Measurement = was.Measurement
	}
	p.status[name] = now
	log := p.Log.WithField("source", name)
	switch {
	case err != nil && (!known || was.Err == nil):
		log.WithError(err).Warning("time source lost")
	case err == nil && (!known || was.Err != nil):
		log.WithFields(logrus.Fields{"stratum": m.Stratum, "root_distance_ms": m.RootDistance.Milliseconds()}).Info("time source found")
	}
}

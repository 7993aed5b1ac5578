package source

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"yinjian/ntp"
)

// A Poller asks all sources at an interval and feeds the clock.
type Poller struct {
	Sources  []*Source // at the start; see Use
	Clock    *ntp.Clock
	Interval time.Duration // between rounds while the clock is Trusted; default 16 s
	// Fast is the interval while it is not, so that a start or a recovery does not take AgreeRounds long intervals.
	// Default a quarter of Interval, at least 1 s (but never more than Interval).
	Fast time.Duration
	Log  logrus.FieldLogger
	// OnRound, if set, is called after each round.
	OnRound func(ntp.Round)
	// Observe, if set, is told of each round with what every source said in it, in the order of the sources.
	Observe func(ntp.Round, []Status)

	mu     sync.Mutex // guards Sources and status
	status map[string]Status
}

// Use replaces the sources, from the next round on. A source that stays should be the same *Source: it remembers what its
// server asked for. What a source of an earlier list said is forgotten with it. Two sources of one name are an error.
func (p *Poller) Use(sources []*Source) error {
	if err := distinct(sources); err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for name := range p.status {
		i := slices.IndexFunc(sources, func(s *Source) bool { return s.Name() == name })
		j := slices.IndexFunc(p.Sources, func(s *Source) bool { return s.Name() == name })
		if i < 0 || j < 0 || sources[i] != p.Sources[j] {
			delete(p.status, name)
		}
	}
	p.Sources = slices.Clone(sources)
	return nil
}

func distinct(sources []*Source) error {
	if len(sources) == 0 {
		return errors.New("ntp source: a poller needs sources")
	}
	names := make(map[string]bool)
	for _, s := range sources {
		if names[s.Name()] {
			return fmt.Errorf("ntp source: two sources are named %s", s.Name())
		}
		names[s.Name()] = true
	}
	return nil
}

// now are the sources as they are now.
func (p *Poller) now() []*Source {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.Sources)
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
	if p.Clock == nil || p.Log == nil {
		return errors.New("ntp source: a poller needs a clock and a log")
	}
	if err := distinct(p.now()); err != nil {
		return err
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
	sources := p.now()
	said := make([]Status, len(sources))
	var wg sync.WaitGroup
	for i, s := range sources {
		wg.Go(func() {
			m, err := s.Query(ctx)
			said[i] = Status{Source: s.Name(), Measurement: m, Err: err}
		})
	}
	wg.Wait()
	if ctx.Err() != nil {
		return ntp.Round{Err: context.Cause(ctx)}
	}
	var ms []ntp.Measurement
	for _, st := range said {
		if st.Err == nil {
			ms = append(ms, st.Measurement)
		}
	}
	r := p.Clock.Update(ms)
	for i, st := range said {
		if st.Err == nil {
			said[i].Err = r.Unfit[st.Source]
		}
		p.record(sources[i], said[i])
	}
	if p.Observe != nil {
		p.Observe(r, said)
	}
	if p.OnRound != nil {
		p.OnRound(r)
	}
	return r
}

// record keeps the status of a source, and logs when it goes from good to bad or back; not each time.
func (p *Poller) record(s *Source, now Status) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !slices.Contains(p.Sources, s) {
		return // removed while it was asked
	}
	if p.status == nil {
		p.status = make(map[string]Status)
	}
	was, known := p.status[now.Source]
	m, err := now.Measurement, now.Err
	if m.Source == "" {
		now.Measurement = was.Measurement
	}
	p.status[now.Source] = now
	log := p.Log.WithField("source", now.Source)
	switch {
	case err != nil && (!known || was.Err == nil):
		log.WithError(err).Warning("time source lost")
	case err == nil && (!known || was.Err != nil):
		log.WithFields(logrus.Fields{"stratum": m.Stratum, "root_distance_ms": m.RootDistance.Milliseconds()}).Info("time source found")
	}
}

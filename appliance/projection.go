package appliance

import (
	"context"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"yinjian/appliance/audit"
	"yinjian/dbdriver/central"
	"yinjian/dbdriver/connect"
)

// A projection keeps the central database open and fed. Signing never waits for it: a database that cannot be opened is
// tried again, and the lag is shown.
type projection struct {
	a *Appliance

	mu      sync.Mutex // guards what follows
	central *central.Store
	shipper *audit.Shipper
	err     error // why it is not open
}

const (
	projectionRetry   = 10 * time.Second
	projectionOpening = 2 * time.Minute // migrations of a large database included
)

// run opens, ships, and opens again after a failure, until ctx ends.
func (p *projection) run(ctx context.Context) error {
	for {
		if err := p.once(ctx); err != nil && ctx.Err() == nil {
			p.a.log.WithError(err).Error("the projection is not being fed; signing goes on, the entries are shipped later")
			p.set(nil, nil, err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(projectionRetry):
		}
	}
}

func (p *projection) set(c *central.Store, s *audit.Shipper, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.central, p.shipper, p.err = c, s, err
}

func (p *projection) once(ctx context.Context) error {
	place, err := p.a.cfg.Database.Place(p.a.dir)
	if err != nil {
		return err
	}
	place.Now = func() time.Time { return p.a.clock.Now().Time }
	opening, cancel := context.WithTimeout(ctx, projectionOpening)
	defer cancel()
	store, err := connect.Open(opening, place, p.author())
	if err != nil {
		return err
	}
	for _, s := range store.Settings() {
		if s.Verdict == central.Doubtful {
			p.a.log.WithFields(logrus.Fields{"setting": s.Name, "value": s.Value}).Warning("the central database has a doubtful setting: " + s.Why)
		}
	}
	defer func() {
		p.set(nil, nil, p.err)
		store.Close()
	}()
	shipper, err := audit.NewShipper(audit.ShipperConfig{
		Journal: p.a.journal, Projection: store, MAC: p.a.batchMAC(), MACKeyID: batchLabel, Log: p.a.log,
	})
	if err != nil {
		return err
	}
	p.set(store, shipper, nil)
	return shipper.Run(ctx)
}

// author is who changes the schema of the database, and when.
func (p *projection) author() central.Author {
	return central.Author{Name: p.a.cfg.Node, Micros: p.a.clock.Now().Time.UnixMicro()}
}

// status is what /health/state shows.
func (p *projection) status() projectionState {
	p.mu.Lock()
	shipper, err := p.shipper, p.err
	p.mu.Unlock()
	if shipper == nil {
		return projectionState{Lag: p.a.journal.Size(), Error: errorText(err)}
	}
	s := shipper.Status()
	return projectionState{Shipped: s.Shipped, Lag: s.Lag, Fork: s.Fork, Error: errorText(s.LastError)}
}

// compare derives every row again. It answers a nil report when the database is not open.
func (p *projection) compare(ctx context.Context) (*audit.CompareReport, error) {
	p.mu.Lock()
	store, err := p.central, p.err
	p.mu.Unlock()
	if store == nil {
		return nil, err
	}
	return audit.Compare(ctx, p.a.journal, store, p.a.batchMAC())
}

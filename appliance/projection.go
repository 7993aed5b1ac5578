package appliance

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"yinjian/appliance/audit"
	"yinjian/dbdriver"
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
	for _, warning := range doubtful(store) {
		p.a.log.WithField("setting", warning).Warning("the central database has a doubtful setting")
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

// doubtful are the database's settings that somebody should look at.
func doubtful(store *central.Store) []string {
	var out []string
	for _, s := range store.Settings() {
		if s.Verdict == central.Doubtful {
			out = append(out, fmt.Sprintf("%s = %s：%s", s.Name, s.Value, s.Why))
		}
	}
	return out
}

// warnings are about the database that is open.
func (p *projection) warnings() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []string
	if p.central != nil {
		for _, s := range doubtful(p.central) {
			out = append(out, "中心库的设置 (a setting of the central database): "+s)
		}
	}
	return out
}

// open is the database while it is open, nil otherwise.
func (p *projection) open() audit.Projection {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.central == nil {
		return nil
	}
	return p.central
}

// status is what /health/state shows.
func (p *projection) status() projectionState {
	p.mu.Lock()
	shipper, err := p.shipper, p.err
	p.mu.Unlock()
	if shipper == nil {
		return projectionState{Lag: p.a.journal.Size(), Error: shownError(err)}
	}
	s := shipper.Status()
	return projectionState{Shipped: s.Shipped, Lag: s.Lag, Fork: s.Fork, Error: shownError(s.LastError)}
}

// shownError says in words of ours what is wrong: applications may read the state, and a server's own words have its
// address, accounts and tables in them. Those are in the log.
func shownError(err error) string {
	switch {
	case err == nil:
		return ""
	case errors.Is(err, audit.ErrFork):
		return "分叉：库中同一位置有另一条目 (fork: another entry under the same key)"
	case errors.Is(err, dbdriver.ErrReadOnly):
		return "库只读，或是备库 (the database takes no writes, or is a standby)"
	case errors.Is(err, dbdriver.ErrFull):
		return "库的磁盘已满 (the database's disk is full)"
	case errors.Is(err, dbdriver.ErrDeadlock):
		return "死锁或锁超时，将重试 (deadlock or lock timeout, tried again)"
	case errors.Is(err, dbdriver.ErrDamaged):
		return "库已损坏，详见运行日志 (the database is damaged, see the log)"
	case errors.Is(err, dbdriver.ErrUnfit):
		return "库不合用，详见运行日志与 yinjian db check (the database is unfit for use, see the log and yinjian db check)"
	}
	return "库不可用，将重试；详见运行日志 (the database is not available, tried again; see the log)"
}

// compare derives every row again. It answers a nil report when the database is not open.
func (p *projection) compare(ctx context.Context) (*audit.CompareReport, error) {
	p.mu.Lock()
	store, err := p.central, p.err
	p.mu.Unlock()
	if store == nil {
		return nil, err
	}
	return audit.Compare(ctx, p.a.journal, store, p.a.batchMAC(), p.a.cfg.Database.Nodes...)
}

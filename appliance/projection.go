package appliance

import (
	"context"
	"errors"
	"fmt"
	"slices"
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
	a      *Appliance
	turn   chan struct{} // capacity 1: who uses the database, the shipper or a rebuild
	resume chan struct{} // capacity 1: the shipper is wanted again

	sweeping  sync.Mutex // held by the sweep that runs
	archiving sync.Mutex // held while rows are moved to the archive

	mu         sync.Mutex // guards what follows
	found      int        // differences that the last sweep named
	central    *central.Store
	shipper    *audit.Shipper
	err        error                  // why it is not open
	interrupt  context.CancelFunc     // ends the shipper
	rebuilding *audit.RebuildProgress // nil: no rebuild
	archived   *audit.RebuildProgress // nil: no rows are being moved to the archive
	severed    bool                   // by a drill: it stays closed
	unfinished string                 // the appliance whose rebuild of this node was not finished when the database was opened
}

func newProjection(a *Appliance) *projection {
	return &projection{a: a, turn: make(chan struct{}, 1), resume: make(chan struct{}, 1)}
}

const (
	projectionRetry   = 10 * time.Second
	projectionOpening = 2 * time.Minute // migrations of a large database included
	behindRows        = 1024            // fewer commits while there is much to ship
)

// run opens, ships, and opens again after a failure, until ctx ends.
func (p *projection) run(ctx context.Context) error {
	for {
		select {
		case p.turn <- struct{}{}:
		case <-ctx.Done():
			return nil
		}
		once, interrupt := context.WithCancel(ctx)
		p.mu.Lock()
		p.interrupt = interrupt
		if p.rebuilding != nil { // it waits for its turn
			interrupt()
		}
		severed := p.severed
		p.mu.Unlock()
		if !severed {
			if err := p.once(once); err != nil && once.Err() == nil {
				p.a.log.WithError(err).Error("the projection is not being fed; signing goes on, the entries are shipped later")
				p.set(nil, nil, err)
			}
		}
		interrupt()
		<-p.turn
		select {
		case <-ctx.Done():
			return nil
		case <-p.resume:
		case <-time.After(projectionRetry):
		}
	}
}

// sever closes the database, as if its line were cut, until it is called again; for drills.
func (p *projection) sever(on bool) {
	p.mu.Lock()
	p.severed = on
	if on {
		p.err = errDrilled
		if p.interrupt != nil {
			p.interrupt()
		}
	}
	p.mu.Unlock()
	select {
	case p.resume <- struct{}{}: // at once, not after the pause
	default:
	}
}

func (p *projection) set(c *central.Store, s *audit.Shipper, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.central, p.shipper, p.err = c, s, err
}

func (p *projection) once(ctx context.Context) error {
	place, err := p.place()
	if err != nil {
		return err
	}
	opening, cancel := context.WithTimeout(ctx, projectionOpening)
	defer cancel()
	store, err := connect.Open(opening, place, p.author())
	if err != nil {
		return err
	}
	p.seal(store)
	for _, warning := range doubtful(store) {
		p.a.log.WithField("setting", warning).Warning("the central database has a doubtful setting")
	}
	defer func() {
		p.mu.Lock()
		p.central, p.shipper = nil, nil
		p.mu.Unlock()
		store.Close()
	}()
	shipper, err := audit.NewShipper(audit.ShipperConfig{
		Journal: p.a.journal, Projection: &duplicates{Store: store, paired: p.a.directory.Paired, log: p.a.log}, MAC: p.a.batchMAC(), MACKeyID: batchLabel, Log: p.a.log, BehindRows: behindRows,
		Shrunk: func(had, has uint64) {
			if err := p.wentBack(ctx, had, has); err != nil {
				p.a.log.WithError(err).Warning("the journal does not say that the database has less than it had")
			}
		},
	})
	if err != nil {
		return err
	}
	rebuilder, err := store.Rebuilder(opening, p.a.cfg.Node)
	if err != nil {
		return err
	}
	if rebuilder == "" {
		known, err := p.marks(opening)
		if err != nil {
			return err
		}
		n, err := audit.FillChanges(ctx, p.a.journal, store, store, store.ApplyChanges, p.a.batchMAC(), batchLabel)
		if err != nil {
			return err
		}
		if n > 0 {
			p.a.log.WithField("changes", n).Warning("the database had no change log of this appliance: it was filled from the journal")
		}
		if n > 0 && known.Versions[audit.ChangeSet] > 0 {
			if err := p.tell(ctx, fmt.Sprintf("the change log that the database had was removed, with its root; %d changes were filled in from the journal", n)); err != nil {
				return err
			}
		}
		if err := p.lookBack(ctx, store, known); err != nil {
			return err
		}
	}
	p.set(store, shipper, nil)
	p.mu.Lock()
	p.unfinished = rebuilder
	p.mu.Unlock()
	return shipper.Run(ctx)
}

// seal gives a store what it seals the rows with that it makes itself.
func (p *projection) seal(store *central.Store) {
	store.SealWith(p.a.cfg.Node, p.a.batchMAC(), func(node string) string { return keyOf(node, p.a.cfg.Node) })
}

// author is who changes the schema of the database, and when: by the trusted clock, or, before it has a time, as of the last
// entry of the journal.
func (p *projection) author() central.Author {
	by := central.Author{Name: p.a.cfg.Node}
	if now := p.a.clock.Now(); !now.Time.IsZero() {
		by.Micros = now.Time.UnixMicro()
	} else if last, err := p.a.journal.Entry(context.Background(), p.a.journal.Size()-1); err == nil {
		by.Micros = max(last.Entry.Time.Micros, 0)
	}
	return by
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
	switch r := p.rebuilding; {
	case r != nil:
		out = append(out, fmt.Sprintf("中心库正在重建，其中的记录不全 (the central database is being rebuilt, and is not whole): %s", rebuildWords(*r)))
	case p.unfinished != "":
		out = append(out, fmt.Sprintf("设备 %s 对中心库的重建没有完成，其中的记录可能不全：请在该设备再次运行 yinjian db rebuild (a rebuild by %s is not finished: run yinjian db rebuild there again)", p.unfinished, p.unfinished))
	}
	if p.found > 0 {
		out = append(out, fmt.Sprintf("中心库被改动：最近一次清查指出 %d 处，运行 yinjian db sweep 查看 (the central database is not what was written: the last sweep named %d differences, see yinjian db sweep)", p.found, p.found))
	}
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

// rebuildWords say how far a rebuild is.
func rebuildWords(r audit.RebuildProgress) string {
	words := r.Phase
	for _, w := range []string{r.Table, r.Node} {
		if w != "" {
			words += " " + w
		}
	}
	if r.Total > 0 {
		return fmt.Sprintf("%s %d/%d", words, r.Done, r.Total)
	}
	return fmt.Sprintf("%s %d", words, r.Done)
}

// status is what /health/state shows.
func (p *projection) status() projectionState {
	p.mu.Lock()
	shipper, err, rebuilding, archived := p.shipper, p.err, p.rebuilding, p.archived
	p.mu.Unlock()
	if shipper == nil {
		return projectionState{Lag: p.a.journal.Size(), Error: shownError(err), Rebuild: rebuilding, Archive: archived}
	}
	s := shipper.Status()
	return projectionState{Shipped: s.Shipped, Lag: s.Lag, Fork: s.Fork, Error: shownError(s.LastError), Rebuild: rebuilding, Archive: archived}
}

// shownError says in words of ours what is wrong: applications may read the state, and a server's own words have its
// address, accounts and tables in them. Those are in the log.
func shownError(err error) string {
	switch {
	case err == nil:
		return ""
	case errors.Is(err, errDrilled):
		return errDrilled.Error()
	case errors.Is(err, audit.ErrFork):
		return "分叉：库中同一位置有另一条目 (fork: another entry under the same key)"
	case errors.Is(err, audit.ErrRebuilding):
		return "另一台设备正在重建本节点的行 (another appliance makes this node's rows anew)"
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

// nodes are the other appliances whose rows belong in the database.
func (p *projection) nodes() []string {
	nodes := p.a.cfg.Database.Nodes
	if pair, _ := p.a.peers.current(); pair != nil && !slices.Contains(nodes, pair.Node) {
		nodes = append(slices.Clone(nodes), pair.Node)
	}
	return nodes
}

// compare derives every row again. It answers a nil report when the database is not open.
func (p *projection) compare(ctx context.Context) (*audit.CompareReport, error) {
	p.mu.Lock()
	store, err := p.central, p.err
	p.mu.Unlock()
	if store == nil {
		return nil, err
	}
	report, err := audit.Compare(ctx, p.a.journal, store, p.a.batchKeys(), p.nodes()...)
	if err == nil {
		_, err = audit.CompareChanges(ctx, report, p.a.journal, store, store, p.nodes()...)
	}
	return report, err
}

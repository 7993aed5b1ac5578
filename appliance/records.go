package appliance

import (
	"context"
	"crypto/hmac"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"yinjian/api/wire"
	"yinjian/appliance/account"
	"yinjian/appliance/audit"
	"yinjian/appliance/problem"
	"yinjian/dbdriver/central"
)

// kindSwept says what a sweep of the central database saw and found, filed under its day.
const kindSwept = "projection.swept"

const (
	sweepPause = 50 * time.Millisecond // before each MAC in the background: ten million rows in batches of 256 take half an hour
	sweepFirst = time.Minute           // after the start, at the least
	// marksKept is how far back the last sweep is looked for.
	marksKept = 31 * 24 * time.Hour
)

var errProjectionClosed = problem.New(problem.NotReady, "投影库未打开 (the projection is not open)",
	"见 yinjian status 与运行日志 (see yinjian status and the log)")

// database is the database, or why there is none.
func (p *projection) database() (*central.Store, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.central == nil {
		return nil, errProjectionClosed.With(p.err)
	}
	return p.central, nil
}

// keepSweeping goes through the database from time to time, slowly.
func (p *projection) keepSweeping(ctx context.Context) error {
	every := time.Duration(p.a.cfg.Database.SweepEvery)
	wait := min(every, sweepFirst)
	for {
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return nil
		}
		if s := p.status(); s.Lag > 0 || s.Error != "" {
			wait = min(every, sweepFirst) // what is missing is known
			continue
		}
		wait = every
		report, err := p.sweep(ctx, "appliance", func(ctx context.Context) error {
			select {
			case <-time.After(sweepPause):
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		})
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			p.a.log.WithError(err).Warning("the central database could not be gone through; it is tried again")
			wait = min(every, sweepFirst)
		case !report.OK():
			p.a.log.WithField("differences", len(report.Differences)).WithField("first", report.Differences[0].Detail).Error("the central database is not what was written: see yinjian db sweep")
		}
	}
}

// sweep goes through the database and journals what it saw. One at a time.
func (p *projection) sweep(ctx context.Context, actor string, pause func(context.Context) error) (*audit.SweepReport, error) {
	p.sweeping.Lock()
	defer p.sweeping.Unlock()
	store, err := p.database()
	if err != nil {
		return nil, err
	}
	by, err := store.Rebuilder(ctx, p.a.cfg.Node)
	if err != nil {
		return nil, err
	}
	if by != "" {
		return nil, problem.New(problem.NotReady, fmt.Sprintf("设备 %s 对本节点的重建没有完成 (a rebuild by %s is not finished)", by, by), "重建完成后再清查 (sweep when it is)")
	}
	known, err := p.marks(ctx)
	if err != nil {
		return nil, err
	}
	report, err := audit.Sweep(ctx, audit.SweepConfig{
		Journal: p.a.journal, Projection: store, Log: store, MACs: p.a.batchKeys(), Sets: []audit.Set{audit.ChangesOf(store), store.DecisionsOf(p.decided), store.MarksOf()},
		Campuses: p.nodes(), Known: known, Pause: pause,
	})
	if err != nil {
		return nil, err
	}
	seen, err := json.Marshal(report.Seen)
	if err != nil {
		return nil, err
	}
	first := ""
	if !report.OK() {
		first = cutText(report.Differences[0].Detail)
	}
	d := audit.Draft{Kind: kindSwept, Actor: actor, Object: p.a.cfg.Node, Fields: []audit.Field{
		{Name: "seen", Value: audit.Text(seen)}, {Name: "batches", Value: audit.Int(report.Batches)}, {Name: "macs", Value: audit.Int(report.MACsChecked)},
		{Name: "differences", Value: audit.Int(uint64(len(report.Differences)) + report.Omitted)}, {Name: "first", Value: audit.Text(first)},
	}}
	d.Ref = dayRef(kindSwept, p.a.time.day(p.a.clock.Now().Time))
	if _, err := p.a.journal.Append(ctx, d); err != nil {
		return nil, journalRefused(err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.found = len(report.Differences)
	return report, nil
}

// decided calls fn with the decisions of this appliance that its journal has.
func (p *projection) decided(ctx context.Context, fn func(account.Decision) error) error {
	return p.a.journal.State(ctx, func(r audit.Record) error {
		if d, ok := account.Decided(&r.Entry); ok && d.Node == p.a.cfg.Node {
			return fn(d)
		}
		return nil
	})
}

// marks are the furthest that the database was seen to be: by the last sweeps, which the journal has, and by the shipper.
func (p *projection) marks(ctx context.Context) (audit.Marks, error) {
	out := audit.Marks{Versions: map[string]uint64{}}
	now := p.a.time.day(p.a.clock.Now().Time) // a start looks before the clock has the time
	err := p.a.time.filed(ctx, kindSwept, now.Add(-marksKept), now, func(e *audit.Entry) error {
		var m audit.Marks
		if err := json.Unmarshal([]byte(e.Text("seen")), &m); err != nil {
			return fmt.Errorf("entry %d: %w", e.Sequence, err)
		}
		out.Shipped = max(out.Shipped, m.Shipped)
		for set, v := range m.Versions {
			out.Versions[set] = max(out.Versions[set], v)
		}
		return nil
	})
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.shipper != nil {
		out.Shipped = max(out.Shipped, p.shipper.Status().Shipped)
	}
	return out, err
}

// lookBack names a database that was further once, before it is fed again.
func (p *projection) lookBack(ctx context.Context, store *central.Store, known audit.Marks) error {
	has, err := audit.ShippedTo(ctx, p.a.journal, store)
	if err != nil || has >= known.Shipped {
		return err
	}
	return p.wentBack(ctx, known.Shipped, has)
}

// wentBack journals that the database has fewer entries than it had.
func (p *projection) wentBack(ctx context.Context, had, has uint64) error {
	return p.tell(ctx, fmt.Sprintf("the database had %d entries of the journal and has %d: an older copy was put in its place, its end was removed, or the last transactions went with a power cut or a switchover; it is fed again", had, has),
		audit.Field{Name: "had", Value: audit.Int(had)}, audit.Field{Name: "has", Value: audit.Int(has)})
}

// tell journals something that was found beside the sweeps, and that goes by being found.
func (p *projection) tell(ctx context.Context, words string, fields ...audit.Field) error {
	p.a.log.Error(words)
	_, err := p.a.journal.Append(ctx, audit.Draft{Kind: kindSwept, Actor: "appliance", Object: p.a.cfg.Node, Fields: append(fields,
		audit.Field{Name: "differences", Value: audit.Int(1)}, audit.Field{Name: "first", Value: audit.Text(words)},
	)})
	return err
}

func (d admin) Sweep(ctx context.Context, actor string, _ wire.Sweep) (any, error) {
	defer d.a.works.begin("sweep").end()
	return d.a.projection.sweep(ctx, actor, nil)
}

const (
	listedChanges = 200
	listedSince   = 30 * 24 * time.Hour
)

// period is what a search looks at: as the request says, which was checked with it, or the last [listedSince].
func (a *Appliance) period(from, to string) (since, until time.Time) {
	until = a.clock.Now().Time.Add(time.Minute) // what was shipped since counts, too
	if to != "" {
		until, _ = time.Parse(time.RFC3339, to)
	}
	since = until.Add(-listedSince)
	if from != "" {
		since, _ = time.Parse(time.RFC3339, from)
	}
	return since, until
}

func (d admin) ListChanges(ctx context.Context, _ string, req wire.ListChanges) (any, error) {
	store, err := d.a.projection.database()
	if err != nil {
		return nil, err
	}
	since, until := d.a.period(req.Since, req.Until)
	limit := req.Limit
	if limit == 0 {
		limit = listedChanges
	}
	var rows []audit.ProjectedChange
	out := wire.Changes{Changes: []wire.Change{}}
	err = store.ListChanges(ctx, req.Object, since.UnixMicro(), until.UnixMicro(), func(c audit.ProjectedChange) error {
		if !strings.Contains(c.Actor, req.Actor) || !strings.HasPrefix(c.Kind, req.Kind) {
			return nil
		}
		rows = append(rows, c)
		if len(rows) == 2*limit {
			rows = append(rows[:0], rows[limit:]...)
			out.Omitted += limit
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if extra := len(rows) - limit; extra > 0 {
		rows = rows[extra:]
		out.Omitted += extra
	}
	keys := d.a.batchKeys()
	for _, c := range rows {
		line := wire.Change{
			Node: c.Node, Sequence: c.Sequence, Epoch: c.Epoch, Time: time.UnixMicro(c.ChangedAt).UTC().Format(time.RFC3339Nano), Actor: c.Actor, Kind: c.Kind,
			Act: c.Act, Object: c.Object, Reason: c.Reason, Before: c.Before, After: c.After, MAC: "other",
		}
		// A key's name says whose it is only together with the node: the other campus's own has the name of ours.
		if mac, known := keys[c.KeyID]; c.Node == d.a.cfg.Node && mac != nil {
			want, err := audit.RowMAC(ctx, mac, audit.ChangeSet, c.Columns())
			if err != nil {
				return nil, err
			}
			line.MAC = "ok"
			if !hmac.Equal([]byte(want), []byte(c.MAC)) {
				line.MAC = "wrong"
			}
		} else if c.Node == d.a.cfg.Node && !known {
			line.MAC = "wrong"
		}
		out.Changes = append(out.Changes, line)
	}
	return out, nil
}

package audit

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
)

// A Rebuildable is a projection that can be made anew.
type Rebuildable interface {
	Projection
	// Cut removes the rows at the end of an epoch, at most most numbers of them, every batch that reaches into what was
	// removed, the changes among it and their root, in one transaction. It answers how many rows that were, and whether it
	// found anything at all.
	ChangeEpochs(ctx context.Context, node string) ([]string, error)
	Cut(ctx context.Context, node, epoch string, most int) (rows uint64, more bool, err error)
	// Marks lists the rebuilds that are not finished, by node.
	Marks(ctx context.Context) ([]RebuildMark, error)
	// Mark keeps how far a rebuild is, and Unmark that there is none, in the database itself, where everybody sees it.
	Mark(ctx context.Context, m RebuildMark) error
	Unmark(ctx context.Context, node string) error
}

// A RebuildMark says that a node's part of the database is not whole, because it is being made anew.
type RebuildMark struct {
	Node  string // whose rows
	By    string // the appliance that does it
	Phase RebuildPhase
	At    int64 // µs, when the phase began
}

// A RebuildPhase is how far a rebuild is.
type RebuildPhase string

// Phases of a rebuild.
const (
	Emptying RebuildPhase = "emptying"
	Filling  RebuildPhase = "filling"
)

// ErrRebuilding means that another appliance makes this node's rows anew; nothing else may write them.
var ErrRebuilding = errors.New("audit: the projection of this node is being rebuilt by another appliance")

// A Table is a part of the central database that follows from journals. Tables are filled in the order in which they are
// given, and emptied in the other.
type Table interface {
	Name() string
	// Empty removes what it has of a node, from the end on in bounded transactions: whatever a stop leaves is a beginning.
	// done is told now and then how many rows that were so far.
	Empty(ctx context.Context, node string, done func(rows uint64)) error
	// Fill writes what follows from the journals and is not there, as far as they went at the call: an object's changes in
	// the order of its versions, whichever journals they are in. It may be called again after a stop. done is told how many
	// entries are there, of how many.
	Fill(ctx context.Context, journals []Source, done func(entries, total uint64)) error
}

// Records are the tables of records, of their batches and of the changes among them, which are written together.
type Records struct {
	Projection Rebuildable
	MAC        MAC
	// KeyID names the key of a node's batches.
	KeyID func(node string) string
	By    string // the appliance that does it
	Log   logrus.FieldLogger
}

// cutRows is how many rows one transaction removes.
const cutRows = 2048

// Name implements [Table].
func (r Records) Name() string { return "yj_record" }

// Empty implements [Table].
func (r Records) Empty(ctx context.Context, node string, done func(rows uint64)) error {
	epochs, err := r.Projection.Epochs(ctx, node)
	if err != nil {
		return err
	}
	changed, err := r.Projection.ChangeEpochs(ctx, node)
	if err != nil {
		return err
	}
	epochs = append(epochs, changed...)
	total := uint64(0)
	for _, epoch := range epochs {
		for more := true; more; {
			var n uint64
			if n, more, err = r.Projection.Cut(ctx, node, epoch, cutRows); err != nil {
				return err
			}
			total += n
			done(total)
		}
	}
	return nil
}

// Fill implements [Table].
func (r Records) Fill(ctx context.Context, journals []Source, done func(entries, total uint64)) error {
	var before, total uint64
	for _, j := range journals {
		total += j.Size()
	}
	for _, j := range journals {
		size := j.Size()
		s, err := NewShipper(ShipperConfig{
			Journal: j, Projection: r.Projection, MAC: r.MAC, MACKeyID: r.KeyID(j.Node()), Log: r.Log, BehindRows: 1024, Gather: time.Millisecond, By: r.By,
		})
		if err != nil {
			return err
		}
		if err := r.follow(ctx, s, size, func(shipped uint64) { done(before+min(shipped, size), total) }); err != nil {
			return fmt.Errorf("node %s: %w", j.Node(), err)
		}
		before += size
	}
	return nil
}

// follow has the shipper work and tells how far it is.
func (r Records) follow(ctx context.Context, s *Shipper, size uint64, done func(shipped uint64)) error {
	ctx, stop := context.WithCancel(ctx)
	var telling sync.WaitGroup
	telling.Go(func() {
		for tick := time.NewTicker(200 * time.Millisecond); ; {
			select {
			case <-tick.C:
				done(s.Status().Shipped)
			case <-ctx.Done():
				tick.Stop()
				return
			}
		}
	})
	err := s.Ship(ctx, size)
	stop()
	telling.Wait()
	done(s.Status().Shipped)
	return err
}

// RebuildConfig says what [Rebuild] does. Projection, Tables, Journals, By and Now are needed.
type RebuildConfig struct {
	Projection Rebuildable
	Tables     []Table
	// Journals are those of the nodes whose rows are made anew.
	Journals []Source
	// Remove are nodes without a journal whose rows go.
	Remove []string
	By     string // the appliance that does it
	Now    func() int64
	// MACs and Campuses are for [Compare].
	MACs     MACs
	Campuses []string
	Progress func(RebuildProgress)
}

// RebuildProgress is how far a rebuild is.
type RebuildProgress struct {
	Phase string `json:"phase"` // emptying, filling, comparing
	Table string `json:"table,omitempty"`
	Node  string `json:"node,omitempty"`
	Done  uint64 `json:"done"`
	Total uint64 `json:"total,omitempty"` // 0: not known
}

// ErrNotWhole means that after a rebuild the projection still differs from a journal: somebody changes it.
var ErrNotWhole = errors.New("audit: the rebuilt projection differs from the journal")

// Rebuild empties the journals' nodes in the projection and fills them again, then compares. While it is not finished,
// the database says so ([RebuildMark]), and only By's appliance writes these nodes. After a stop at any moment what is
// there is less than the whole, never something else, and Rebuild goes on where it was: what was emptied is not emptied
// again. The answers are the comparisons, by journal.
func Rebuild(ctx context.Context, cfg RebuildConfig) ([]*CompareReport, error) {
	reports, err := rebuild(ctx, &cfg)
	if err != nil {
		err = fmt.Errorf("audit: rebuilding: %w", err)
	}
	return reports, err
}

func rebuild(ctx context.Context, cfg *RebuildConfig) ([]*CompareReport, error) {
	p := cfg.Projection
	marks, err := p.Marks(ctx)
	if err != nil {
		return nil, err
	}
	var nodes, empty []string
	for _, j := range cfg.Journals {
		nodes = append(nodes, j.Node())
	}
	// 1. Everything is marked before anything is removed.
	for _, node := range slices.Concat(nodes, cfg.Remove) {
		if slices.ContainsFunc(marks, func(m RebuildMark) bool { return m.Node == node && m.By == cfg.By && m.Phase == Filling }) {
			continue
		}
		if err := p.Mark(ctx, RebuildMark{node, cfg.By, Emptying, cfg.Now()}); err != nil {
			return nil, err
		}
		empty = append(empty, node)
	}
	for _, t := range slices.Backward(cfg.Tables) {
		for _, node := range empty {
			err := t.Empty(ctx, node, func(rows uint64) { cfg.Progress(RebuildProgress{string(Emptying), t.Name(), node, rows, 0}) })
			if err != nil {
				return nil, fmt.Errorf("emptying %s of node %s: %w", t.Name(), node, err)
			}
		}
	}
	for _, node := range empty {
		if slices.Contains(cfg.Remove, node) {
			err = p.Unmark(ctx, node)
		} else {
			err = p.Mark(ctx, RebuildMark{node, cfg.By, Filling, cfg.Now()})
		}
		if err != nil {
			return nil, err
		}
	}

	// 2. Filled, table by table.
	for _, t := range cfg.Tables {
		err := t.Fill(ctx, cfg.Journals, func(entries, total uint64) {
			cfg.Progress(RebuildProgress{string(Filling), t.Name(), "", entries, total})
		})
		if err != nil {
			return nil, fmt.Errorf("filling %s: %w", t.Name(), err)
		}
	}

	// 3. Compared; only then is it whole. What differs now somebody wrote meanwhile: the next time begins anew.
	var reports []*CompareReport
	for i, j := range cfg.Journals {
		cfg.Progress(RebuildProgress{"comparing", "", j.Node(), uint64(i), uint64(len(cfg.Journals))})
		r, err := compare(ctx, j, p, cfg.MACs, slices.Concat(cfg.Campuses, nodes))
		if err != nil {
			return reports, fmt.Errorf("comparing node %s: %w", j.Node(), err)
		}
		reports = append(reports, r)
		if r.OK() {
			err = p.Unmark(ctx, j.Node())
		} else {
			err = errors.Join(fmt.Errorf("%w: node %s, %d differences", ErrNotWhole, j.Node(), uint64(len(r.Differences))+r.Omitted),
				p.Mark(ctx, RebuildMark{j.Node(), cfg.By, Emptying, cfg.Now()}))
		}
		if err != nil {
			return reports, err
		}
	}
	return reports, nil
}

// Beyond counts the rows of the journal's node that the journal has no entries for: those that a restore lost, or that
// somebody added. A rebuild cannot make them again.
func Beyond(ctx context.Context, j Source, p Projection) (n uint64, err error) {
	spans, err := j.Epochs(ctx)
	if err != nil {
		return 0, fmt.Errorf("audit: rows beyond the journal: %w", err)
	}
	epochs, err := p.Epochs(ctx, j.Node())
	for i := 0; i < len(epochs) && err == nil; i++ {
		from := uint64(0)
		if at := slices.IndexFunc(spans, func(s EpochSpan) bool { return s.Epoch.String() == epochs[i] }); at >= 0 {
			from = spans[at].End // nothing is shipped meanwhile
		}
		err = p.Rows(ctx, j.Node(), epochs[i], from, func(ProjectedRow) error { n++; return nil })
	}
	if err != nil {
		return 0, fmt.Errorf("audit: rows beyond the journal: %w", err)
	}
	return n, nil
}

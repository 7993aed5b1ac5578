package audit

import (
	"context"
	"errors"
	"fmt"
	"math"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
)

// ShipperConfig makes a [Shipper]. All but the sizes are needed.
type ShipperConfig struct {
	Journal    Source
	Projection Projection
	MAC        MAC
	MACKeyID   string // kept with each batch
	Log        logrus.FieldLogger
	BatchRows  int           // 0: 256
	BehindRows int           // rows of a batch while there are as many to ship, ≥ BatchRows; 0: BatchRows
	RetryMin   time.Duration // first pause after a failure, doubled up to RetryMax; 0: 200 ms
	RetryMax   time.Duration // 0: 30 s
	Deadline   time.Duration // for one batch; 0: 30 s
	// Gather is how long entries wait for others to share a batch with, unless there are BatchRows of them; 0: 200 ms.
	// Each batch costs the database a transaction and the cipher machine a MAC, which signatures want too.
	Gather time.Duration
	By     string // the appliance that ships; "": the journal's node
	// Shrunk is told when the projection has fewer entries than it had, before they are shipped again: somebody removed its
	// end, or its last transactions were lost. nil: nobody is.
	Shrunk func(had, has uint64)
}

// A Shipper copies the journal's entries to a projection: in order, at least once, applied once. It never delays the
// journal. One Run or Ship runs at a time; Status may be asked meanwhile.
type Shipper struct {
	cfg   ShipperConfig
	fresh []Record // Ship's, what is being shipped, and room for the next

	mu     sync.Mutex // guards what follows
	status ShipperStatus
}

// ShipperStatus is how far the projection is behind.
type ShipperStatus struct {
	Shipped uint64 // entries that the projection has
	Size    uint64 // entries that the journal has
	Lag     uint64 // Size − Shipped
	// LastError is why the last attempt failed; nil after a success. After [ErrFork] nothing is shipped any more.
	LastError error
	Fork      bool
}

// NewShipper checks the configuration.
func NewShipper(cfg ShipperConfig) (*Shipper, error) {
	if cfg.Journal == nil || cfg.Projection == nil || cfg.MAC == nil || cfg.MACKeyID == "" || cfg.Log == nil {
		return nil, errors.New("audit: shipper: Journal, Projection, MAC, MACKeyID and Log are needed")
	}
	setDefault(&cfg.BatchRows, 256)
	cfg.BehindRows = max(cfg.BehindRows, cfg.BatchRows)
	setDefault(&cfg.RetryMin, 200*time.Millisecond)
	setDefault(&cfg.RetryMax, 30*time.Second)
	setDefault(&cfg.Deadline, 30*time.Second)
	setDefault(&cfg.Gather, 200*time.Millisecond)
	setDefault(&cfg.By, cfg.Journal.Node())
	return &Shipper{cfg: cfg}, nil
}

// Status answers how far the shipper is.
func (s *Shipper) Status() ShipperStatus {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.status
	st.Size = s.cfg.Journal.Size()
	st.Lag = st.Size - min(st.Size, st.Shipped)
	return st
}

func (s *Shipper) set(shipped uint64, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.status.LastError = err
	s.status.Fork = s.status.Fork || errors.Is(err, ErrFork)
	if err == nil {
		s.status.Shipped = shipped
	}
}

// Run ships until ctx ends and returns nil. Failures are retried for ever, with growing pauses. A fork is an alarm
// that stays: Run then waits for ctx without shipping, since going on would bury the contradiction.
func (s *Shipper) Run(ctx context.Context) error {
	if err := s.Ship(ctx, math.MaxUint64); errors.Is(err, ErrFork) {
		s.cfg.Log.WithError(err).Error("fork: the central database holds another history of this node")
		<-ctx.Done()
	}
	return nil
}

// Ship ships the first size entries, and returns nil when they are there. Failures are retried; the errors are [ErrFork]
// and ctx's.
func (s *Shipper) Ship(ctx context.Context, size uint64) error {
	pause := s.cfg.RetryMin
	failing := false
	known := false
	var next uint64
	for ctx.Err() == nil {
		var err error
		if !known { // where to go on is asked after each failure: the last batch may have landed
			next, err = s.position(ctx)
			known = err == nil
			if had := s.Status().Shipped; known && next < had && s.cfg.Shrunk != nil {
				s.cfg.Shrunk(had, next)
			}
		}
		if err == nil {
			s.set(next, nil)
			if failing {
				s.cfg.Log.Info("shipping goes on")
				failing = false
			}
			if next >= size {
				return nil
			}
			if err := s.gather(ctx, next); err != nil {
				return err
			}
			next, err = s.ship(ctx, next)
			if err == nil {
				pause = s.cfg.RetryMin
				continue
			}
			known = false
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		s.set(0, err)
		if errors.Is(err, ErrFork) {
			return err
		}
		if !failing {
			s.cfg.Log.WithError(err).Warning("shipping failed, will be retried")
		}
		failing = true
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
		}
		pause = min(2*pause, s.cfg.RetryMax)
	}
	return ctx.Err()
}

// gather waits until there is something to ship and, for Gather at most, until it is a whole batch.
func (s *Shipper) gather(ctx context.Context, next uint64) error {
	size, err := s.cfg.Journal.WaitSize(ctx, next)
	if err != nil || size >= next+uint64(s.cfg.BatchRows) {
		return err
	}
	limited, cancel := context.WithTimeout(ctx, s.cfg.Gather)
	defer cancel()
	if _, err = s.cfg.Journal.WaitSize(limited, next+uint64(s.cfg.BatchRows)-1); ctx.Err() == nil {
		err = nil // the time is over: what there is goes
	}
	return err
}

// position asks the projection what it has, epoch by epoch, and answers the first entry that it lacks. The last row of
// each epoch that is in both must be the journal's: it is compared, so that a journal that was put back without a new
// epoch is noticed before anything is added.
func (s *Shipper) position(ctx context.Context) (uint64, error) {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.Deadline)
	defer cancel()
	j := s.cfg.Journal
	if by, err := s.cfg.Projection.Rebuilder(ctx, j.Node()); err != nil {
		return 0, fmt.Errorf("audit: shipping: asking for rebuilds: %w", err)
	} else if by != "" && by != s.cfg.By {
		return 0, fmt.Errorf("%w: %s", ErrRebuilding, by)
	}
	spans, err := j.Epochs(ctx)
	if err != nil {
		return 0, fmt.Errorf("audit: shipping: reading epochs: %w", err)
	}
	for i, span := range spans {
		last, err := s.cfg.Projection.Shipped(ctx, j.Node(), span.Epoch.String())
		if errors.Is(err, ErrNotFound) {
			return span.First, nil
		}
		if err != nil {
			return 0, fmt.Errorf("audit: shipping: asking for the position: %w", err)
		}
		current := i == len(spans)-1
		if last >= span.End {
			if current {
				return 0, fmt.Errorf("%w: the projection has entry %d of epoch %s, the journal ends at %d", ErrFork, last, span.Epoch, span.End)
			}
			last = span.End - 1 // entries that a restore lost; Compare lists them
		}
		rec, err := j.Entry(ctx, last)
		if err != nil {
			return 0, fmt.Errorf("audit: shipping: %w", err)
		}
		leaf, err := s.cfg.Projection.Leaf(ctx, j.Node(), span.Epoch.String(), last)
		if err != nil {
			return 0, fmt.Errorf("audit: shipping: asking for entry %d: %w", last, err)
		}
		if leaf != rec.LeafHash.String() {
			return 0, fmt.Errorf("%w: entry %d of epoch %s", ErrFork, last, span.Epoch)
		}
		if last+1 < span.End || current {
			return last + 1, nil
		}
	}
	return j.Size(), nil
}

// ship sends one batch from next on, of one epoch, and answers where to go on.
func (s *Shipper) ship(ctx context.Context, next uint64) (uint64, error) {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.Deadline)
	defer cancel()
	var b ProjectedBatch
	rows, bytes := s.cfg.BatchRows, 0
	if s.cfg.Journal.Size() >= next+uint64(s.cfg.BehindRows) {
		rows = s.cfg.BehindRows
	}
	add := func(r Record) error {
		row := Project(r)
		bytes += row.bytes()
		if len(b.Rows) == rows || len(b.Rows) > 0 && (row.Epoch != b.Epoch || bytes > maxShippedBytes) {
			return errStop
		}
		b.Node, b.Epoch = row.Node, row.Epoch
		b.Rows = append(b.Rows, row)
		if c, is := ProjectChange(r); is {
			b.Changes = append(b.Changes, c)
		}
		return nil
	}
	// What was just written is in memory still; what is not is read from the disk.
	var err error
	fresh := s.cfg.Journal.recentFrom(s.fresh[:0], next, rows)
	defer clear(fresh)
	s.fresh = fresh
	b.Rows = make([]ProjectedRow, 0, len(fresh))
	for i := 0; i < len(fresh) && err == nil; i++ {
		err = add(fresh[i])
	}
	if len(fresh) == 0 {
		err = s.cfg.Journal.Range(ctx, next, add)
	}
	if err != nil && !errors.Is(err, errStop) {
		return 0, fmt.Errorf("audit: shipping from %d: %w", next, err)
	}
	b.First, b.Last = next, next+uint64(len(b.Rows))-1
	if err := b.seal(ctx, s.cfg.MAC, s.cfg.MACKeyID); err != nil {
		return 0, fmt.Errorf("audit: shipping from %d: %w", next, err)
	}
	if err := s.cfg.Projection.Apply(ctx, b); err != nil {
		return 0, fmt.Errorf("audit: shipping entries %d to %d: %w", b.First, b.Last, err)
	}
	s.cfg.Journal.forgetRecent(b.Last + 1)
	return b.Last + 1, nil
}

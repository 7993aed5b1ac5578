package audit_test

import (
	"context"
	"io"
	"reflect"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"yinjian/appliance/audit"
	"yinjian/ntp"
)

// memStore is a Store in memory whose failures a callback decides.
type memStore struct {
	mu          sync.Mutex
	rows        []audit.Row
	nodes       map[audit.NodeID]audit.Hash
	blobs       map[audit.Hash][]byte
	checkpoints []audit.StoredCheckpoint
	batches     []int // rows of each
	seal        *audit.HeadSeal

	nodeReads, nodeCalls atomic.Int64
	// onAppend decides: was it written, and what is answered. nil: written, no error.
	onAppend func(audit.Batch) (landed bool, err error)
	onHead   func() error
}

// same reports whether both hold the same.
func (s *memStore) same(o *memStore) bool {
	return reflect.DeepEqual(s.rows, o.rows) && reflect.DeepEqual(s.nodes, o.nodes) && reflect.DeepEqual(s.blobs, o.blobs) &&
		reflect.DeepEqual(s.checkpoints, o.checkpoints)
}

func newMemStore() *memStore {
	return &memStore{nodes: map[audit.NodeID]audit.Hash{}, blobs: map[audit.Hash][]byte{}}
}

func (s *memStore) Head(context.Context) (uint64, *audit.Row, error) {
	if s.onHead != nil {
		if err := s.onHead(); err != nil {
			return 0, nil, err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.rows) == 0 {
		return 0, nil, nil
	}
	return uint64(len(s.rows)), &s.rows[len(s.rows)-1], nil
}

func (s *memStore) Append(_ context.Context, b audit.Batch) error {
	landed, err := true, error(nil)
	if s.onAppend != nil {
		landed, err = s.onAppend(b)
	}
	if landed {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.batches = append(s.batches, len(b.Rows))
		s.rows = append(s.rows, b.Rows...)
		for _, n := range b.Nodes {
			s.nodes[n.ID] = n.Hash
		}
		for _, x := range b.Blobs {
			s.blobs[x.Sum] = slices.Clone(x.Data)
		}
		if b.Seal != nil {
			s.seal = b.Seal
		}
	}
	return err
}

func (s *memStore) PutHeadSeal(_ context.Context, seal audit.HeadSeal) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seal = &seal
	return nil
}

func (s *memStore) HeadSeal(context.Context) (audit.HeadSeal, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.seal == nil {
		return audit.HeadSeal{}, audit.ErrNotFound
	}
	return *s.seal, nil
}

func (s *memStore) Room(context.Context, time.Time) (int, error) { return 1 << 20, nil }
func (s *memStore) Roll(context.Context, audit.Seal) error       { panic("memStore has one segment") }

func (s *memStore) Segments(context.Context) ([]audit.Segment, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return []audit.Segment{{Number: 1, Count: uint64(len(s.rows))}}, nil
}

func (s *memStore) Row(_ context.Context, seq uint64) (audit.Row, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if seq >= uint64(len(s.rows)) {
		return audit.Row{}, audit.ErrNotFound
	}
	return s.rows[seq], nil
}

func (s *memStore) Rows(_ context.Context, _ int, from int64, fn func(audit.Row) error) error {
	s.mu.Lock()
	rows := slices.Clone(s.rows[min(max(from, 0), int64(len(s.rows))):])
	s.mu.Unlock()
	for _, r := range rows {
		if err := fn(r); err != nil {
			return err
		}
	}
	return nil
}

func (s *memStore) Changes(ctx context.Context, from uint64, fn func(audit.Row) error) error {
	return s.Rows(ctx, 1, int64(from), func(r audit.Row) error {
		if !r.Change {
			return nil
		}
		return fn(r)
	})
}

func (s *memStore) LastChange(ctx context.Context) (last audit.Row, err error) {
	err = audit.ErrNotFound
	s.Changes(ctx, 0, func(r audit.Row) error { last, err = r, nil; return nil })
	return last, err
}

func (s *memStore) FindRef(_ context.Context, ref []byte, limit int) (out []uint64, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.rows {
		if string(r.Ref) == string(ref) && len(out) < limit {
			out = append(out, uint64(r.Sequence))
		}
	}
	return out, nil
}

func (s *memStore) Nodes(_ context.Context, ids ...audit.NodeID) (map[audit.NodeID]audit.Hash, error) {
	s.nodeReads.Add(int64(len(ids)))
	s.nodeCalls.Add(1)
	s.mu.Lock()
	defer s.mu.Unlock()
	out := map[audit.NodeID]audit.Hash{}
	for _, id := range ids {
		if id.Level == 0 && id.Index < uint64(len(s.rows)) {
			out[id] = audit.Hash(s.rows[id.Index].Leaf)
		} else if h, ok := s.nodes[id]; ok {
			out[id] = h
		}
	}
	return out, nil
}

func (s *memStore) PathNodes(ctx context.Context, ids ...audit.NodeID) (map[audit.NodeID]audit.Hash, error) {
	return s.Nodes(ctx, ids...)
}

func (s *memStore) Leaves(_ context.Context, _ int, first, end uint64, fn func([]audit.Hash) error) error {
	s.mu.Lock()
	var leaves []audit.Hash
	for i := first; i < min(end, uint64(len(s.rows))); i++ {
		leaves = append(leaves, audit.Hash(s.rows[i].Leaf))
	}
	s.mu.Unlock()
	if uint64(len(leaves)) < end-first {
		return audit.ErrCorrupt
	}
	return fn(leaves)
}

func (s *memStore) NodesOver(_ context.Context, first, end uint64, fn func(audit.NodeID, audit.Hash)) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for level := uint8(1); first>>level < end>>level; level++ {
		for i := first >> level; i < end>>level; i++ {
			id := audit.NodeID{Level: level, Index: i}
			if h, ok := s.nodes[id]; ok {
				fn(id, h)
			}
		}
	}
	return nil
}

func (s *memStore) NodeCount(context.Context, int) (uint64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return uint64(len(s.nodes)), nil
}

func (s *memStore) Blobs(_ context.Context, _ int, fn func(audit.Hash) error) error {
	s.mu.Lock()
	var sums []audit.Hash
	for sum := range s.blobs {
		sums = append(sums, sum)
	}
	s.mu.Unlock()
	for _, sum := range sums {
		if err := fn(sum); err != nil {
			return err
		}
	}
	return nil
}

// Reread: memory is all there is.
func (s *memStore) Reread() error { return nil }

// SchemaChanges: memory has no schema.
func (s *memStore) SchemaChanges(context.Context, int) ([]string, error) { return nil, nil }

func (s *memStore) Tokens(_ context.Context, fn func(uint64) error) error {
	s.mu.Lock()
	all := slices.Clone(s.checkpoints)
	s.mu.Unlock()
	for _, c := range all {
		if c.Token != nil {
			if err := fn(c.Size); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *memStore) Blob(_ context.Context, _ int, sum audit.Hash) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b, ok := s.blobs[sum]
	if !ok {
		return nil, audit.ErrNotFound
	}
	return b, nil
}

func (s *memStore) PutCheckpoint(_ context.Context, c audit.StoredCheckpoint) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.checkpoints = append(s.checkpoints, c)
	return nil
}

func (s *memStore) PutToken(_ context.Context, size uint64, token []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.checkpoints {
		if s.checkpoints[i].Size == size {
			s.checkpoints[i].Token = token
			return nil
		}
	}
	return audit.ErrNotFound
}

func (s *memStore) LastCheckpoint(context.Context) (audit.StoredCheckpoint, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.checkpoints) == 0 {
		return audit.StoredCheckpoint{}, audit.ErrNotFound
	}
	return s.checkpoints[len(s.checkpoints)-1], nil
}

func (s *memStore) Checkpoints(_ context.Context, from uint64, fn func(audit.StoredCheckpoint) error) error {
	s.mu.Lock()
	all := slices.Clone(s.checkpoints)
	s.mu.Unlock()
	for _, c := range all {
		if c.Size >= from {
			if err := fn(c); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *memStore) FreeBytes() (uint64, error) { return 1 << 30, nil }

type fixedClock struct{ ntp.Reading }

func (c fixedClock) Now() ntp.Reading { return c.Reading }

var testClock = fixedClock{ntp.Reading{
	Time: time.Date(2026, 3, 1, 8, 0, 0, 123456789, time.UTC), Bound: 3 * time.Millisecond, State: ntp.Trusted, Provenance: "test",
}}

func quiet() logrus.FieldLogger {
	l := logrus.New()
	l.SetOutput(io.Discard)
	return l
}

func openMem(t testing.TB, s audit.Store, change func(*audit.Config)) *audit.Journal {
	t.Helper()
	cfg := audit.Config{Store: s, Node: "east", Clock: testClock, Log: quiet(), CheckpointEvery: time.Millisecond}
	if change != nil {
		change(&cfg)
	}
	j, err := audit.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	return j
}

func startMem(t testing.TB, s audit.Store, change func(*audit.Config)) *audit.Journal {
	t.Helper()
	j := openMem(t, s, change)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- j.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run = %v", err)
		}
	})
	return j
}

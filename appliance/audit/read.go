package audit

import (
	"context"
	"errors"
	"fmt"
	"maps"

	"github.com/transparency-dev/merkle/proof"
)

// recordOf reads a row and checks it against itself: the entry parses, is the one of that number, and hashes to the
// leaf beside it.
func recordOf(r Row) (Record, error) {
	e, err := ParseEntry(r.DER)
	if err != nil {
		return Record{}, fmt.Errorf("%w: row %d: %v", ErrCorrupt, r.Sequence, err)
	}
	leaf := LeafHash(r.DER)
	switch {
	case r.Sequence < 0 || uint64(r.Sequence) != e.Sequence:
		return Record{}, fmt.Errorf("%w: row %d holds entry %d", ErrCorrupt, r.Sequence, e.Sequence)
	case string(r.Leaf) != string(leaf[:]):
		return Record{}, fmt.Errorf("%w: entry %d does not hash to its leaf", ErrCorrupt, e.Sequence)
	case len(r.Chain) != len(Hash{}):
		return Record{}, fmt.Errorf("%w: entry %d has no chain hash", ErrCorrupt, e.Sequence)
	}
	return Record{Epoch: e.Epoch, Sequence: e.Sequence, LeafHash: leaf, Entry: *e, EntryDER: r.DER}, nil
}

// Size is the number of entries on disk.
func (j *Journal) Size() uint64 {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.head.frontier.size()
}

// Node is the name of the journal's node.
func (j *Journal) Node() string { return j.cfg.Node }

// Epoch is that of the last entry.
func (j *Journal) Epoch() Epoch {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.head.epoch
}

// Root is the root of the tree of the first size entries. It reads O(log n) nodes.
func (j *Journal) Root(ctx context.Context, size uint64) (Hash, error) {
	if size > j.Size() {
		return Hash{}, fmt.Errorf("audit: root of %d entries: %w", size, ErrNotFound)
	}
	f, err := loadFrontier(ctx, j.store, size)
	if err != nil {
		return Hash{}, fmt.Errorf("audit: root of %d entries: %w", size, err)
	}
	return f.root(), nil
}

// Entry answers one entry, checked against its leaf hash.
func (j *Journal) Entry(ctx context.Context, sequence uint64) (Record, error) {
	if sequence >= j.Size() {
		return Record{}, fmt.Errorf("audit: entry %d: %w", sequence, ErrNotFound)
	}
	row, err := j.store.Row(ctx, sequence)
	if err != nil {
		return Record{}, fmt.Errorf("audit: entry %d: %w", sequence, err)
	}
	return recordOf(row)
}

var errNoRef = fmt.Errorf("audit: no entry has this reference: %w", ErrNotFound)

// maxByRef is how many entries ByRef answers.
const maxByRef = 1000

// ByRef answers the entries with this reference, ascending; none is [ErrNotFound].
func (j *Journal) ByRef(ctx context.Context, ref []byte) ([]Record, error) {
	seqs, err := j.store.FindRef(ctx, ref, maxByRef)
	if err == nil && len(seqs) == 0 {
		return nil, errNoRef // made once: each signature asks for a reference that is not there
	}
	if err != nil {
		return nil, fmt.Errorf("audit: entries of reference %x: %w", ref, err)
	}
	out := make([]Record, 0, len(seqs))
	for _, seq := range seqs {
		rec, err := j.Entry(ctx, seq)
		if err != nil {
			return nil, err
		}
		if string(rec.Entry.Ref) != string(ref) {
			return nil, fmt.Errorf("%w: entry %d is filed under another reference", ErrCorrupt, seq)
		}
		out = append(out, rec)
	}
	return out, nil
}

// Payload is [ReadPayload] from the journal's store.
func (j *Journal) Payload(ctx context.Context, e *Entry, name string) ([]byte, error) {
	return ReadPayload(ctx, j.store, e, name)
}

// errStop ends a scan whose caller has seen enough; errEnd one that has come to its end.
var (
	errStop = errors.New("stop")
	errEnd  = errors.New("end")
)

// Range calls fn with the entries from number from to the last one on disk at the call, in order, each checked against
// its leaf hash. A gap is [ErrCorrupt]. An error of fn ends it and is returned.
func (j *Journal) Range(ctx context.Context, from uint64, fn func(Record) error) error {
	return Scan(ctx, j.store, from, j.Size(), fn)
}

// Scan is [Journal.Range] over a store, from number from to the one before end.
func Scan(ctx context.Context, store Store, from, end uint64, fn func(Record) error) error {
	segs, err := store.Segments(ctx)
	if err != nil {
		return fmt.Errorf("audit: listing segments: %w", err)
	}
	next := from
	for i, seg := range segs {
		if i+1 < len(segs) && segs[i+1].First <= next || next >= end {
			continue
		}
		err := store.Rows(ctx, seg.Number, int64(next), func(r Row) error {
			if next >= end {
				return errEnd
			}
			rec, err := recordOf(r)
			if err != nil {
				return err
			}
			if rec.Sequence != next {
				return fmt.Errorf("%w: entry %d is missing", ErrCorrupt, next)
			}
			next++
			return fn(rec)
		})
		if err != nil && !errors.Is(err, errEnd) {
			return err
		}
	}
	if next < end {
		return fmt.Errorf("%w: entry %d is missing", ErrCorrupt, next)
	}
	return nil
}

// State replays the changes of state (drafts with State set), in order. Each is proved to be a leaf of the tree, and
// their ordinals must have no gap and reach what the last checkpoint counts, so that neither a changed entry nor a
// cleared mark goes unseen; either is [ErrCorrupt]. An error of fn ends it and is returned. Changes written while it
// runs may be left out.
func (j *Journal) State(ctx context.Context, fn func(Record) error) error {
	j.mu.Lock()
	h, last, proved := j.head, j.last, j.proved
	j.mu.Unlock()
	size, root := h.frontier.size(), h.frontier.root()
	cache := map[NodeID]Hash{} // upper nodes are shared by all paths
	var next uint64
	var page []Record // that are not proved yet
	flush := func() error {
		if err := j.fetch(ctx, page, size, cache); err != nil {
			return fmt.Errorf("%w: %v", ErrCorrupt, err)
		}
		for _, rec := range page {
			path, err := j.inclusion(ctx, rec.Sequence, size, cache)
			if err != nil {
				return fmt.Errorf("%w: %v", ErrCorrupt, err)
			}
			if err := VerifyInclusion(rec.Sequence, size, rec.LeafHash, path, root); err != nil {
				return fmt.Errorf("%w: %v", ErrCorrupt, err)
			}
			n, _ := rec.Entry.Change()
			j.prove(n, provedChange{rec.Sequence, rec.LeafHash})
			if err := fn(rec); err != nil {
				return err
			}
		}
		page = page[:0]
		maps.DeleteFunc(cache, func(id NodeID, _ Hash) bool { return id.Level < 4 })
		return nil
	}
	err := j.store.Changes(ctx, 0, func(r Row) error {
		if r.Sequence >= 0 && uint64(r.Sequence) >= size {
			return errEnd
		}
		rec, err := recordOf(r)
		if err != nil {
			return err
		}
		if n, ok := rec.Entry.Change(); !ok || n != next {
			return fmt.Errorf("%w: change of state %d is missing before entry %d", ErrCorrupt, next, rec.Sequence)
		}
		next++
		if p := (provedChange{rec.Sequence, rec.LeafHash}); next <= uint64(len(proved)) {
			if proved[next-1] != p {
				return fmt.Errorf("%w: change of state %d is another entry than before", ErrCorrupt, next-1)
			}
			return fn(rec)
		}
		if page = append(page, rec); len(page) < changesAtOnce {
			return nil
		}
		return flush()
	})
	if err == nil || errors.Is(err, errEnd) {
		err = flush()
	}
	if err != nil {
		return err
	}
	if next != h.changes || last != nil && next < last.Changes {
		return fmt.Errorf("%w: %d changes of state were found, there are %d", ErrCorrupt, next, h.changes)
	}
	return nil
}

// Changes calls fn with the changes of state from number from to the one before end, in order, each checked against its
// leaf hash alone: [Journal.State] proves that none is missing. An error of fn ends it and is returned.
func (j *Journal) Changes(ctx context.Context, from, end uint64, fn func(Record) error) error {
	err := j.store.Changes(ctx, from, func(r Row) error {
		if r.Sequence >= 0 && uint64(r.Sequence) >= end {
			return errEnd
		}
		rec, err := recordOf(r)
		if err != nil {
			return err
		}
		return fn(rec)
	})
	if errors.Is(err, errEnd) {
		err = nil
	}
	return err
}

// changesAtOnce is how many changes of state are proved with one call to the store.
const changesAtOnce = 128

// fetch brings into cache what the proofs of all these entries need and memory does not have.
func (j *Journal) fetch(ctx context.Context, page []Record, size uint64, cache map[NodeID]Hash) error {
	edge, err := j.edge(ctx, size)
	if err != nil {
		return err
	}
	var missing []NodeID
	asked := map[NodeID]bool{}
	for _, rec := range page {
		nodes, err := proof.Inclusion(rec.Sequence, size)
		if err != nil {
			return err
		}
		for _, n := range nodes.IDs {
			id := NodeID{Level: uint8(n.Level), Index: n.Index}
			if _, ok := j.inMemory(id, edge, cache); !ok && !asked[id] {
				asked[id] = true
				missing = append(missing, id)
			}
		}
	}
	if len(missing) == 0 {
		return nil
	}
	read, err := j.store.PathNodes(ctx, missing...)
	for id, h := range read {
		cache[id] = h
		j.keepUpper(id, h)
	}
	return err
}

// A provedChange is a change of state that was proved to be a leaf of this journal's tree, which only grows: a start reads
// them several times, and proves them once.
type provedChange struct {
	sequence uint64
	leaf     Hash
}

// prove remembers the change with that ordinal, if all before it are.
func (j *Journal) prove(ordinal uint64, p provedChange) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if uint64(len(j.proved)) == ordinal {
		j.proved = append(j.proved, p)
	}
}

// InclusionProof proves that the entry is in the tree of the first size entries (RFC 6962 §2.1.1). It reads O(log n)
// nodes.
func (j *Journal) InclusionProof(ctx context.Context, sequence, size uint64) ([]Hash, error) {
	if size > j.Size() {
		return nil, fmt.Errorf("audit: inclusion proof in a tree of %d: %w", size, ErrNotFound)
	}
	return j.inclusion(ctx, sequence, size, nil)
}

// inclusion is InclusionProof with the nodes in cache, which may be nil.
func (j *Journal) inclusion(ctx context.Context, sequence, size uint64, cache map[NodeID]Hash) ([]Hash, error) {
	nodes, err := proof.Inclusion(sequence, size)
	if err != nil {
		return nil, fmt.Errorf("audit: inclusion proof: %w", err)
	}
	edge, err := j.edge(ctx, size)
	if err != nil {
		return nil, fmt.Errorf("audit: inclusion proof: %w", err)
	}
	return j.collect(ctx, nodes, edge, cache)
}

// An edge is the right edge of the tree of a size, which all proofs under one checkpoint have in common.
type edge struct {
	size  uint64
	nodes map[NodeID]Hash // never changed
}

// edge answers the nodes of the right edge, from memory if they are those of the last proof.
func (j *Journal) edge(ctx context.Context, size uint64) (map[NodeID]Hash, error) {
	if e := j.lastEdge.Load(); e != nil && e.size == size {
		return e.nodes, nil
	}
	nodes, err := j.store.Nodes(ctx, edgeOf(size)...)
	if err == nil {
		j.lastEdge.Store(&edge{size, nodes})
	}
	return nodes, err
}

// ConsistencyProof proves that the tree of the first to entries continues that of the first from (RFC 6962 §2.1.2).
func (j *Journal) ConsistencyProof(ctx context.Context, from, to uint64) ([]Hash, error) {
	if to > j.Size() {
		return nil, fmt.Errorf("audit: consistency proof to %d: %w", to, ErrNotFound)
	}
	nodes, err := proof.Consistency(from, to)
	if err != nil {
		return nil, fmt.Errorf("audit: consistency proof: %w", err)
	}
	return j.collect(ctx, nodes, nil, nil)
}

// Nodes from upperLevel on are above 4096 entries and more. They are few, and lie in segments of their own: they are kept in
// memory, maxUpper of them at most, so that a proof reads as many nodes from as many files however long the journal is.
const (
	upperLevel = 12
	maxUpper   = 1 << 16
)

// inMemory answers a node of edge, of cache, or one of the upper ones.
func (j *Journal) inMemory(id NodeID, edge, cache map[NodeID]Hash) (Hash, bool) {
	if h, ok := edge[id]; ok {
		return h, true
	}
	if h, ok := cache[id]; ok {
		return h, true
	}
	j.upperMu.Lock()
	defer j.upperMu.Unlock()
	h, ok := j.upper[id]
	return h, ok
}

// collect gets the nodes of a proof from memory, or from the store, in one call. edge and cache may be nil.
func (j *Journal) collect(ctx context.Context, nodes proof.Nodes, edge, cache map[NodeID]Hash) ([]Hash, error) {
	hashes := make([][]byte, len(nodes.IDs))
	var missing []NodeID
	for i, n := range nodes.IDs {
		id := NodeID{Level: uint8(n.Level), Index: n.Index}
		if h, ok := j.inMemory(id, edge, cache); ok {
			hashes[i] = h[:]
		} else {
			missing = append(missing, id)
		}
	}
	if len(missing) > 0 {
		read, err := j.store.PathNodes(ctx, missing...)
		if err != nil {
			return nil, fmt.Errorf("audit: nodes of a proof: %w", err)
		}
		for i, n := range nodes.IDs {
			if hashes[i] != nil {
				continue
			}
			id := NodeID{Level: uint8(n.Level), Index: n.Index}
			h, ok := read[id]
			if !ok {
				return nil, fmt.Errorf("audit: node (%d, %d) of a proof: %w", n.Level, n.Index, ErrNotFound)
			}
			hashes[i] = h[:]
			j.keepUpper(id, h)
		}
	}
	path, err := nodes.Rehash(hashes, hasher{}.HashChildren)
	if err != nil {
		return nil, fmt.Errorf("audit: proof: %w", err)
	}
	return toHashes(path)
}

func (j *Journal) keepUpper(id NodeID, h Hash) {
	if id.Level < upperLevel {
		return
	}
	j.upperMu.Lock()
	defer j.upperMu.Unlock()
	if j.upper == nil || len(j.upper) >= maxUpper {
		j.upper = map[NodeID]Hash{}
	}
	j.upper[id] = h
}

// Checkpoints calls fn with the stored checkpoints whose size is ≥ from, by size.
func (j *Journal) Checkpoints(ctx context.Context, from uint64, fn func(Checkpoint) error) error {
	return j.store.Checkpoints(ctx, from, func(s StoredCheckpoint) error {
		c, err := s.parse()
		if err != nil {
			return err
		}
		return fn(*c)
	})
}

// CheckpointFor answers the first stored checkpoint that covers the entry, or [ErrNotFound].
func (j *Journal) CheckpointFor(ctx context.Context, sequence uint64) (Checkpoint, error) {
	var found *Checkpoint
	err := j.Checkpoints(ctx, sequence+1, func(c Checkpoint) error { found = &c; return errStop })
	if err != nil && !errors.Is(err, errStop) {
		return Checkpoint{}, err
	}
	if found == nil {
		return Checkpoint{}, fmt.Errorf("audit: checkpoint for entry %d: %w", sequence, ErrNotFound)
	}
	return *found, nil
}

// An EpochSpan is one epoch's part of the journal, [First, End).
type EpochSpan struct {
	Epoch      Epoch
	First, End uint64
}

// Epochs lists the epochs of the journal in order.
func (j *Journal) Epochs(ctx context.Context) ([]EpochSpan, error) {
	return epochsOf(ctx, j.store, j.Size())
}

func epochsOf(ctx context.Context, store Store, end uint64) ([]EpochSpan, error) {
	var spans []EpochSpan
	err := store.Changes(ctx, 0, func(r Row) error {
		if r.Kind != KindEpoch || uint64(r.Sequence) >= end {
			return nil
		}
		rec, err := recordOf(r)
		if err != nil {
			return err
		}
		if n := len(spans); n > 0 {
			spans[n-1].End = rec.Sequence
		}
		spans = append(spans, EpochSpan{Epoch: rec.Epoch, First: rec.Sequence, End: end})
		return nil
	})
	if err == nil && len(spans) == 0 {
		err = fmt.Errorf("%w: no epoch is announced", ErrCorrupt)
	}
	return spans, err
}

package audit

import (
	"context"
	"encoding/binary"
	"fmt"
	"hash"
	"slices"
	"time"

	"github.com/emmansun/gmsm/sm3"
	"github.com/transparency-dev/merkle/compact"
)

// A NodeID names a node of the tree: Level 0 are the leaves, node Index covers the leaves from Index<<Level on.
type NodeID struct {
	Level uint8
	Index uint64
}

// Last is the last leaf below a perfect node.
func (n NodeID) Last() uint64 { return (n.Index+1)<<n.Level - 1 }

// A Row is an entry as a store keeps it. All columns but DER can be computed from DER and the rows before; they are
// kept so that reading is fast and so that changes show.
type Row struct {
	Sequence int64 // signed: a row that somebody inserted can have any number
	Kind     string
	Ref      []byte // nil or 32 bytes
	Change   bool
	Leaf     []byte // 32 bytes
	Chain    []byte // 32 bytes
	DER      []byte
	// Own holds payloads that are this entry's alone, in the form that [ParseOwn] reads; nil: there are none.
	Own []byte
}

// A Node is an inner node that became complete: the root of a perfect subtree, Level ≥ 1.
type Node struct {
	ID   NodeID
	Hash Hash
}

// A Blob is a payload and its digest.
type Blob struct {
	Sum  Hash
	Data []byte
}

// What is kept in an entry's row. An index of digests is random, so that each payload in it changes a page of its own:
// a signature and its authorisation, which nobody looks up but by their entry, have no place there.
const (
	maxOwnPayload = 16 << 10 // one payload
	maxOwn        = 64 << 10 // all of a row, which is read as a whole
)

// ownBytes are what a payload has in its row beside its own.
const ownBytes = len(Hash{}) + 4

// appendOwn adds a payload to those of its row: digest, length (4 bytes, big-endian), bytes.
func appendOwn(own []byte, b Blob) []byte {
	own = slices.Grow(own, ownBytes+len(b.Data))
	own = append(own, b.Sum[:]...)
	own = binary.BigEndian.AppendUint32(own, uint32(len(b.Data)))
	return append(own, b.Data...)
}

// ParseOwn reads [Row].Own; the data are parts of it. The digests are as they are stored: they are not compared with
// the data. Other bytes than the journal writes are [ErrCorrupt].
func ParseOwn(own []byte) ([]Blob, error) {
	var out []Blob
	for rest := own; len(rest) > 0; {
		if len(rest) < len(Hash{})+4 {
			return nil, fmt.Errorf("%w: payloads in a row end in %d bytes that are none", ErrCorrupt, len(rest))
		}
		sum, n := Hash(rest[:len(Hash{})]), binary.BigEndian.Uint32(rest[len(Hash{}):])
		if rest = rest[len(Hash{})+4:]; uint64(n) > uint64(len(rest)) {
			return nil, fmt.Errorf("%w: a payload in a row has %d bytes, %d are there", ErrCorrupt, n, len(rest))
		}
		out = append(out, Blob{sum, rest[:n:n]})
		rest = rest[n:]
	}
	return out, nil
}

// ReadPayload answers the entry's payload of that name, checked against the digest that the entry has of it. An entry
// without it, or a payload that is gone, is [ErrNotFound].
func ReadPayload(ctx context.Context, store Store, e *Entry, name string) ([]byte, error) {
	p, ok := e.Payload(name)
	if !ok {
		return nil, fmt.Errorf("audit: entry %d has no payload %q: %w", e.Sequence, name, ErrNotFound)
	}
	data, err := findPayload(ctx, store, e.Sequence, p.SM3)
	if err == nil && Sum(data) != p.SM3 {
		err = fmt.Errorf("%w: it hashes to %s", ErrCorrupt, Sum(data))
	}
	if err != nil {
		return nil, fmt.Errorf("audit: entry %d: payload %q, SM3 %s: %w", e.Sequence, name, p.SM3, err)
	}
	return data, nil
}

func findPayload(ctx context.Context, store Store, sequence uint64, sum Hash) ([]byte, error) {
	row, err := store.Row(ctx, sequence)
	if err != nil {
		return nil, err
	}
	own, err := ParseOwn(row.Own)
	if err != nil {
		return nil, err
	}
	if i := slices.IndexFunc(own, func(b Blob) bool { return b.Sum == sum }); i >= 0 {
		return own[i].Data, nil
	}
	return store.Blob(ctx, 0, sum)
}

// A Batch is written as a whole or not at all. Rows are contiguous and continue the store's last row.
type Batch struct {
	Rows  []Row
	Nodes []Node
	Blobs []Blob    // payloads that are not in their rows
	Seal  *HeadSeal // of the head that the batch makes; it replaces the one before. nil: that one stays
}

// A Seal sums up a finished segment.
type Seal struct {
	Segment     int
	First, Last uint64 // sequences
	Count       uint64
	Root        Hash // of the tree whose leaves are the segment's, numbered from 0
	Leaves      Hash // SM3 of the leaf hashes, one after the other
}

// A Segment is one part of the journal.
type Segment struct {
	Number int    // from 1
	First  uint64 // sequence of its first entry
	Count  uint64 // entries in it, by its seal or its last row
	Seal   *Seal  // nil for the active segment, the last one
	// Err is why the segment could not be read. Only the verifier goes on then.
	Err error
}

// A StoredCheckpoint is the signed text of a checkpoint and what is kept beside it.
type StoredCheckpoint struct {
	Size      uint64
	Note      []byte
	Signature []byte
	Token     []byte // nil until there is one
}

// A Store keeps the journal's bytes. Reads are safe for concurrent use, also while something is written; Append, Roll,
// PutHeadSeal and PutCheckpoint are called by one goroutine at a time each.
//
// What is not there is [ErrNotFound]. After an error of Append the caller does not assume anything: it reads Head.
type Store interface {
	// Head reads from the disk how many entries there are (the last row's sequence + 1) and the last row. It reports
	// durable entries only.
	Head(ctx context.Context) (size uint64, last *Row, err error)
	// Append returns nil only after the batch is on disk (fsync). It does not keep the batch's own slices, whose memory the next batch
	// gets; what their elements point to it may keep.
	Append(ctx context.Context, b Batch) error
	// PutHeadSeal replaces the head seal, durably. The journal does not append meanwhile.
	PutHeadSeal(ctx context.Context, s HeadSeal) error
	// HeadSeal answers the stored one. There is at most one; it outlives Roll.
	HeadSeal(ctx context.Context) (HeadSeal, error)
	// Room is how many more entries the active segment takes; 0 asks for Roll first. now is the zero time when the
	// clock is not trusted: then only the count decides.
	Room(ctx context.Context, now time.Time) (int, error)
	// Roll seals the active segment with s and makes the next one. After a crash inside it, opening the store finishes
	// it.
	Roll(ctx context.Context, s Seal) error
	// Segments lists all segments by number.
	Segments(ctx context.Context) ([]Segment, error)

	// Reread has everything that is read from then on come from what is stored now, whatever was read before and by whom.
	Reread() error

	// SchemaChanges names, for people, what a segment's file has beside the tables that were made in it, or lacks of
	// them: a trigger, say, that swallows or changes what is written. None is an empty answer. A segment that cannot be
	// read at all may answer why.
	SchemaChanges(ctx context.Context, segment int) ([]string, error)

	// Row answers one row.
	Row(ctx context.Context, sequence uint64) (Row, error)
	// Rows calls fn with the rows of one segment in ascending order of sequence, from the first that is ≥ from. No
	// read transaction is open while fn runs. A row of another number than it should have is delivered like any other.
	Rows(ctx context.Context, segment int, from int64, fn func(Row) error) error
	// Leaves calls fn with the stored leaf hashes of a segment's entries from first to the one before end, in order and many
	// at a time. It is [ErrCorrupt] if one is not there, or is no hash. No read transaction is open while fn runs.
	Leaves(ctx context.Context, segment int, first, end uint64, fn func([]Hash) error) error
	// Changes calls fn with the rows that have Change set, ascending, over all segments, from the first that is ≥ from; 0:
	// all, those too that somebody gave a number below 0.
	Changes(ctx context.Context, from uint64, fn func(Row) error) error
	// LastChange answers the last of them.
	LastChange(ctx context.Context) (Row, error)
	// FindRef answers the sequences of the entries with this ref, ascending, the first limit of
	// them; none is an empty answer.
	FindRef(ctx context.Context, ref []byte, limit int) ([]uint64, error)
	// Nodes answers leaf hashes (Level 0) and inner nodes. What is not there is left out.
	Nodes(ctx context.Context, ids ...NodeID) (map[NodeID]Hash, error)
	// PathNodes is Nodes for proofs, which whoever gets them checks: what was read before may be answered again.
	PathNodes(ctx context.Context, ids ...NodeID) (map[NodeID]Hash, error)
	// NodesOver calls fn with the inner nodes that became complete with entries first to end-1, which are of one segment, in
	// any order. What is not there, or is no hash, is left out.
	NodesOver(ctx context.Context, first, end uint64, fn func(NodeID, Hash)) error
	// NodeCount is the number of inner nodes kept in a segment.
	NodeCount(ctx context.Context, segment int) (uint64, error)
	// Blob answers a payload that is not in its row. With segment 0 all segments are searched, the newest first.
	Blob(ctx context.Context, segment int, sum Hash) ([]byte, error)

	// Blobs calls fn with the digests under which a segment's payloads are stored outside rows, in any order.
	Blobs(ctx context.Context, segment int, fn func(Hash) error) error

	// PutCheckpoint stores a checkpoint durably; a size is stored once.
	PutCheckpoint(ctx context.Context, c StoredCheckpoint) error
	// PutToken stores a timestamp token beside the checkpoint of that size.
	PutToken(ctx context.Context, size uint64, token []byte) error
	// LastCheckpoint answers the checkpoint with the greatest size.
	LastCheckpoint(ctx context.Context) (StoredCheckpoint, error)
	// Checkpoints calls fn with all checkpoints whose size is ≥ from, by size, over all segments.
	Checkpoints(ctx context.Context, from uint64, fn func(StoredCheckpoint) error) error

	// Tokens calls fn with the sizes for which there is a token, over all segments, in any order.
	Tokens(ctx context.Context, fn func(size uint64) error) error

	// FreeBytes is the space left for the journal.
	FreeBytes() (uint64, error)
}

// loadFrontier reads the right edge of the tree with that size.
func loadFrontier(ctx context.Context, s Store, size uint64) (frontier, error) {
	ids := edgeOf(size)
	nodes, err := s.Nodes(ctx, ids...)
	if err != nil {
		return frontier{}, err
	}
	hashes := make([]Hash, len(ids))
	for i, id := range ids {
		h, ok := nodes[id]
		if !ok {
			return frontier{}, fmt.Errorf("node (%d, %d): %w", id.Level, id.Index, ErrNotFound)
		}
		hashes[i] = h
	}
	return newFrontier(size, hashes)
}

// edgeOf lists the nodes of the right edge of a tree, from the left.
func edgeOf(size uint64) []NodeID {
	var ids []NodeID
	for _, id := range compact.RangeNodes(0, size, nil) {
		ids = append(ids, NodeID{Level: uint8(id.Level), Index: id.Index})
	}
	return ids
}

// A tally is a segment's seal while the segment grows.
type tally struct {
	segment     int
	first, next uint64
	own         frontier
	leaves      hash.Hash
}

func newTally(segment int, first uint64) *tally {
	own, _ := newFrontier(0, nil) // an empty range is never refused
	return &tally{segment: segment, first: first, next: first, own: own, leaves: sm3.New()}
}

func (t *tally) add(leaf Hash) error {
	t.next++
	t.leaves.Write(leaf[:])
	return t.own.grow(leaf, nil)
}

// read adds what is stored, up to the entry before end. After each step it calls rest with what that took; nil: it does
// not rest.
func (t *tally) read(ctx context.Context, s Store, end uint64, rest func(time.Duration)) error {
	if t.next >= end {
		return nil
	}
	begun := time.Now() // interval
	return s.Leaves(ctx, t.segment, t.next, end, func(leaves []Hash) error {
		for _, leaf := range leaves {
			if err := t.add(leaf); err != nil {
				return err
			}
		}
		if rest != nil {
			rest(time.Since(begun))
			begun = time.Now() // interval
		}
		return ctx.Err()
	})
}

func (t *tally) seal() Seal {
	return Seal{
		Segment: t.segment, First: t.first, Last: t.next - 1, Count: t.next - t.first,
		Root: t.own.root(), Leaves: Hash(t.leaves.Sum(nil)),
	}
}

// Kinds and fields that the journal writes itself.
const (
	KindEpoch  = "journal.epoch"          // a new epoch begins with this entry
	KindSealed = "journal.segment.sealed" // first entry of a segment, or the second behind [KindEpoch]: the seal of the one before
)

func (s Seal) draft() Draft {
	return Draft{Kind: KindSealed, Actor: "journal", Fields: []Field{
		{"journal.count", Int(s.Count)},
		{"journal.first", Int(s.First)},
		{"journal.last", Int(s.Last)},
		{"journal.leaves", Octets(s.Leaves[:])},
		{"journal.root", Octets(s.Root[:])},
		{"journal.segment", Int(s.Segment)},
	}}
}

// sealIn reads the seal from a journal.segment.sealed entry.
func sealIn(e *Entry) (Seal, error) {
	num := func(name string) uint64 { n, _ := e.Field(name).(Int); return uint64(n) }
	s := Seal{
		Segment: int(num("journal.segment")), First: num("journal.first"), Last: num("journal.last"),
		Count: num("journal.count"),
	}
	leaves, _ := e.Field("journal.leaves").(Octets)
	root, _ := e.Field("journal.root").(Octets)
	if len(leaves) != 32 || len(root) != 32 {
		return Seal{}, fmt.Errorf("%w: entry %d has no seal in it", ErrCorrupt, e.Sequence)
	}
	s.Leaves, s.Root = Hash(leaves), Hash(root)
	return s, nil
}

// Marshal is the seal's fixed form, which stores may keep: 8-byte big-endian numbers, then the two hashes.
func (s Seal) Marshal() []byte {
	b := make([]byte, 0, 96)
	for _, n := range []uint64{uint64(s.Segment), s.First, s.Last, s.Count} {
		b = binary.BigEndian.AppendUint64(b, n)
	}
	b = append(b, s.Root[:]...)
	return append(b, s.Leaves[:]...)
}

// ParseSeal reads what [Seal.Marshal] gives.
func ParseSeal(b []byte) (Seal, error) {
	if len(b) != 96 {
		return Seal{}, fmt.Errorf("%w: seal of %d bytes", ErrCorrupt, len(b))
	}
	n := func(i int) uint64 { return binary.BigEndian.Uint64(b[8*i:]) }
	return Seal{
		Segment: int(n(0)), First: n(1), Last: n(2), Count: n(3), Root: Hash(b[32:64]), Leaves: Hash(b[64:96]),
	}, nil
}

// Fields of entries that the projection knows; others stay in the journal.
const (
	FieldApplication  = "application"
	FieldSigner       = "signer"
	FieldDepartment   = "department"
	FieldDocumentType = "document.type"
	FieldCampus       = "campus"
	FieldTest         = "test"
)

// KindImported is a record that another system made: what was read is journalled, and nothing in it is vouched for. No
// signature in it is one of ours, whatever it holds.
const KindImported = "history.imported"

package audit

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"

	"yinjian/ntp"
)

// A Clock answers what time it is, with its bound.
type Clock interface{ Now() ntp.Reading }

// A Draft is what a caller wants recorded. The journal adds node, epoch, sequence and time.
type Draft struct {
	Kind   string // [a-z0-9./_-]; "journal." is kept for the journal
	Actor  string
	Object string
	Ref    []byte // nil or 32 bytes
	// Unique refuses the draft with a [*DuplicateRefError] if any entry has the same Ref already.
	Unique bool
	// Absent, for Unique: the caller looked Ref up when the journal had at least this many entries ([Journal.Size], asked
	// before), and there was none. It saves a second look at the disk. 0: nobody looked.
	Absent uint64
	// State marks a change of state (accounts, keys, policies), which [Journal.State] replays.
	State bool
	// Fields in any order. In that of their names they are kept as they are, and must not be changed afterwards; in another
	// they are copied.
	Fields   []Field
	Payloads []Attachment
}

// An Attachment is a payload with its bytes. The bytes must not be changed while Append runs, nor afterwards if it
// answered [ErrOutcomeUnknown].
type Attachment struct {
	Name      string
	MediaType string
	Data      []byte
	// Shared says that the same bytes recur in many entries, as certificates and CRLs do, from the same place in memory and
	// unchanged for ever: their digest is remembered, and they are stored once a segment. Others are kept with their entry,
	// if they are short.
	Shared bool
}

// A Record is an entry of the journal.
type Record struct {
	Epoch    Epoch
	Sequence uint64
	LeafHash Hash
	Entry    Entry
	EntryDER []byte
}

// A Receipt says that the entry is on disk.
type Receipt = Record

// Config makes a [Journal]. Store, Node, Clock and Log are needed.
type Config struct {
	Store Store
	Node  string // [a-z0-9._-], at most 64; the same for the life of the journal
	// NewEpoch begins a new epoch, as must be done once after a restore. A new journal always begins one. It also opens
	// what is not sealed; the epoch's entry then says from which entry on (field journal.unsealed_from).
	NewEpoch bool
	Clock    Clock
	Log      logrus.FieldLogger
	// Checkpointer and Stamper may be nil, and may be set later.
	Checkpointer CheckpointSigner
	Stamper      Stamper
	// Discarded, if set, is given a checkpoint's signature or token that could not be stored, and why. It must not block.
	Discarded func(reason error, made ...[]byte)
	// LogKeys: if not empty, Open wants the last checkpoint signed by one of them.
	LogKeys []crypto.PublicKey
	// Sealer computes head seals with a key in the cipher machine; nil: there are none. With it, Open wants the end of the
	// journal sealed ([ErrUnsealed]), and each batch is written with a [HeadSeal]. A sealer that fails, or does not answer
	// within 500 ms, never keeps a batch from being written: the head is sealed afterwards, as soon as it answers.
	Sealer MAC
	// UnsealedOK says which entries after the last head seal Open takes over without NewEpoch; nil: none. Changes of state
	// it never takes over.
	UnsealedOK func(*Entry) bool
	// CheckpointEvery is the least time between two checkpoints, 0 < d ≤ 1 s; 0: 500 ms.
	CheckpointEvery time.Duration
	// CommitTimeout bounds how long Append waits for the outcome of a write that has begun; 0: 30 s.
	CommitTimeout time.Duration
	MaxBatch      int       // most entries of one transaction; 0: 256
	QueueBytes    int64     // most bytes of drafts that wait; 0: 128 MiB
	Rand          io.Reader // for epochs; nil: crypto/rand
	// SumUpAfter is how long after Run begins the active segment is read for its seal, which takes a second of a processor for
	// a million entries: a start comes first. 0: 15 s.
	SumUpAfter time.Duration
}

// A Journal appends entries and answers questions about them. Safe for concurrent use. [Journal.Run] must run for
// Append to return.
type Journal struct {
	cfg   Config
	store Store
	queue *semaphore.Weighted // bytes of waiting drafts

	wake     chan struct{} // capacity 1: requests are waiting
	expected atomic.Int64  // entries on their way

	// mu guards what follows.
	mu       sync.Mutex
	waiting  []*request
	closing  bool
	failed   error         // set once
	head     head          // what is durable
	grown    chan struct{} // closed and replaced when head grows
	last     *Checkpoint   // last stored; nil: none
	signed   chan struct{} // closed and replaced when last changes
	cosigned *Checkpoint   // the newest with a cosignature; nil: none
	signer   CheckpointSigner
	stamper  Stamper
	unstamps chan struct{} // capacity 1: a checkpoint or a stamper is new
	urgent   chan struct{} // capacity 1: a change of state was written, and somebody waits for its checkpoint
	prompt   bool          // changes of state are urgent

	recent      []Record // the last entries, without a gap up to the head; none after a write in doubt
	recentBytes int      // of their encodings
	asked       [followers]asking
	kept        []Record // the memory that recent is a part of

	sums sharedSums

	proved []provedChange // guarded by mu: by ordinal, without a gap

	upperMu  sync.Mutex
	upper    map[NodeID]Hash // guarded by upperMu
	lastEdge atomic.Pointer[edge]

	sealedTo   uint64        // guarded by mu: entries under the stored head seal
	sealerAway atomic.Bool   // the last seal was not to be had
	sealing    chan struct{} // capacity 1: the sealer is being asked
	unsealed   chan struct{} // capacity 1: something was written without a seal
	storing    sync.Mutex    // held while a batch or a head seal is written

	unstored bool // the signing goroutine's: storing the last checkpoint was answered with an error

	// Owned by the committing goroutine (and by Open before it).
	refs        recentRefs
	took        time.Duration // by the last write
	doubt       bool          // the last write failed: read the head before the next
	pendingSeal *Seal         // must become the next entry
	room        Batch         // empty: memory for the next batch, the committer's
	tally       *tally        // of the active segment; nil after a restart, until Run has read what was there
	summed      chan *tally   // capacity 1: that reading, done
}

// A head is the end of the journal. Its frontier is never changed in place.
type head struct {
	frontier frontier
	epoch    Epoch
	leaf     Hash // of the last entry
	chain    Hash
	changes  uint64
}

// Bounds of the entries that are kept in memory until all who have asked for them are done: some seconds of the busiest load. What is read
// from the disk instead is parsed anew. They hold many pointers, which the garbage collector follows.
const (
	maxRecent      = 8192
	maxRecentBytes = 16 << 20 // of their encodings
)

// keepRecent adds entries that were written; nil: it is not known what was. The caller holds mu.
func (j *Journal) keepRecent(rs []*request) {
	if rs == nil {
		j.recent, j.recentBytes, j.refs = nil, 0, recentRefs{}
		return
	}
	for _, r := range rs {
		if r.receipt.EntryDER == nil {
			continue
		}
		j.refs.add(r.receipt.Sequence, r.receipt.Entry.Ref)
		if j.asked == ([followers]asking{}) {
			continue
		}
		if n := len(j.recent); n > 0 && j.recent[n-1].Sequence+1 != r.receipt.Sequence { // never; who reads them relies on it
			clear(j.recent)
			j.recent, j.recentBytes = nil, 0
		}
		if len(j.recent) == cap(j.recent) { // at the end of the memory that holds them: back to its beginning
			if j.kept == nil {
				j.kept = make([]Record, 2*maxRecent)
			}
			n := copy(j.kept, j.recent)
			clear(j.kept[n:])
			j.recent = j.kept[:n]
		}
		j.recent = append(j.recent, r.receipt)
		j.recentBytes += len(r.receipt.EntryDER)
	}
	drop := 0
	for ; j.recentBytes > maxRecentBytes || len(j.recent)-drop > maxRecent; drop++ {
		j.recentBytes -= len(j.recent[drop].EntryDER)
	}
	clear(j.recent[:drop])
	j.recent = j.recent[drop:]
}

// recentRefs are the references of all entries from one on, with the first sequence of each among these. No pointers:
// the garbage collector leaves them alone.
type recentRefs struct {
	known bool   // there is something
	from  uint64 // sequence from which on all are here
	of    map[[32]byte]uint64
	order []recentRef
}

type recentRef struct {
	ref      [32]byte
	sequence uint64
}

// maxRecentRefs is some seconds of the busiest load; a signature looks its reference up some milliseconds before it is
// committed.
const maxRecentRefs = 1 << 13

func (r *recentRefs) add(sequence uint64, ref []byte) {
	if !r.known {
		*r = recentRefs{known: true, from: sequence, of: map[[32]byte]uint64{}}
	}
	if len(ref) != 32 {
		return
	}
	k := [32]byte(ref)
	if _, had := r.of[k]; had {
		return
	}
	r.of[k] = sequence
	r.order = append(r.order, recentRef{k, sequence})
	if len(r.order) > maxRecentRefs {
		first := r.order[0]
		delete(r.of, first.ref)
		r.order = r.order[1:]
		r.from = first.sequence + 1
	}
}

// Who reads the entries that are in memory: the shipper, and who asks by [Journal.Recent].
const (
	shipping = iota
	following
	followers
)

// An asking is how far one of them is.
type asking struct {
	yes  bool   // he has asked
	from uint64 // and is done with what is before
}

// Recent appends to into the entries from number from on, most at most, if they are still in memory; none if not: [Journal.Range] has them.
// Those before are let go. They are on the disk, without a gap. One alone may ask, again and again: from the first time on what is written is
// kept for him, within bounds; most may be 0, to say how far he is.
func (j *Journal) Recent(into []Record, from uint64, most int) []Record {
	j.mu.Lock()
	defer j.mu.Unlock()
	into = j.recentOf(following, into, from, most)
	j.letGo()
	return into
}

// recentFrom is Recent for the shipper, and lets go of nothing.
func (j *Journal) recentFrom(into []Record, from uint64, most int) []Record {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.recentOf(shipping, into, from, most)
}

// recentOf, as letGo, is called with mu held.
func (j *Journal) recentOf(who int, into []Record, from uint64, most int) []Record {
	j.asked[who] = asking{true, from}
	if len(j.recent) == 0 || from < j.recent[0].Sequence || from-j.recent[0].Sequence >= uint64(len(j.recent)) {
		return into
	}
	found := j.recent[from-j.recent[0].Sequence:]
	return append(into, found[:min(len(found), most)]...)
}

// forgetRecent says of the entries before that number that they were shipped.
func (j *Journal) forgetRecent(before uint64) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.asked[shipping] = asking{true, before}
	j.letGo()
}

// letGo lets go of the entries that nobody will ask for.
func (j *Journal) letGo() {
	before := uint64(math.MaxUint64)
	for _, a := range j.asked {
		if a.yes {
			before = min(before, a.from)
		}
	}
	drop := 0
	for ; drop < len(j.recent) && j.recent[drop].Sequence < before; drop++ {
		j.recentBytes -= len(j.recent[drop].EntryDER)
	}
	clear(j.recent[:drop])
	j.recent = j.recent[drop:]
}

// sharedSums remembers the digests of payloads that recur in many entries, by where their bytes lie: a revocation list
// has megabytes, which nobody wants to compare for each signature. What is remembered is kept, so that no other bytes
// come to lie there.
type sharedSums struct {
	mu    sync.RWMutex
	of    map[*byte]sharedSum // by the first byte; guarded by mu
	bytes int                 // guarded by mu
}

type sharedSum struct {
	data []byte
	sum  Hash
}

const maxSharedSums = 256 << 20 // bytes kept, most of them also elsewhere

func (s *sharedSums) sum(data []byte) Hash {
	if len(data) == 0 {
		return Sum(nil)
	}
	s.mu.RLock()
	had := s.of[&data[0]]
	s.mu.RUnlock()
	if len(had.data) == len(data) {
		return had.sum
	}
	sum := Sum(data)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.of == nil || s.bytes+len(data) > maxSharedSums {
		s.of, s.bytes = map[*byte]sharedSum{}, 0
	}
	s.of[&data[0]] = sharedSum{data, sum}
	s.bytes += len(data)
	return sum
}

// A request is one draft on its way, and the memory of its entry: nothing else is asked for until it is encoded.
type request struct {
	draft    Draft
	payloads []Payload // sorted, with digests
	own      []byte    // payloads for the entry's row
	blobs    []Blob    // and the others
	cost     int64
	taken    bool // guarded by Journal.mu: no longer to be cancelled
	internal bool
	epoch    *Epoch // internal: this entry begins that epoch
	done     chan struct{}
	// receipt is the caller's when done is closed. Before, its Entry is what is being encoded, and EntryDER is set with the rest
	// of it when the entry has its place.
	receipt Receipt
	err     error

	// der and leaf are of receipt.Entry, if der is not nil; it may have been encoded ahead, for a place that it will not get.
	der   []byte
	leaf  Hash
	chain Hash
}

// Open reads the head of the store and checks it: the last entry, the right edge of the tree and the last checkpoint
// must agree. A journal that was cut off below its last checkpoint does not open ([ErrCorrupt]). With a Sealer, one whose
// end is not sealed does not open either ([ErrUnsealed]), and none does while the Sealer does not answer. In a new
// store, and with NewEpoch, it writes the entry that announces the epoch.
func Open(ctx context.Context, cfg Config) (*Journal, error) {
	if cfg.Store == nil || cfg.Clock == nil || cfg.Log == nil {
		return nil, errors.New("audit: opening journal: Store, Clock and Log are needed")
	}
	if !isName(cfg.Node) || strings.Contains(cfg.Node, "/") {
		return nil, fmt.Errorf("audit: opening journal: node name %q: want 1 to %d of a-z 0-9 . _ -", cfg.Node, MaxNameBytes)
	}
	if cfg.CheckpointEvery < 0 || cfg.CheckpointEvery > time.Second {
		return nil, errors.New("audit: opening journal: CheckpointEvery must be at most one second")
	}
	setDefault(&cfg.CheckpointEvery, 500*time.Millisecond)
	setDefault(&cfg.CommitTimeout, 30*time.Second)
	setDefault(&cfg.MaxBatch, 256)
	setDefault(&cfg.SumUpAfter, 15*time.Second)
	setDefault(&cfg.QueueBytes, 128<<20)
	cfg.QueueBytes = max(cfg.QueueBytes, MaxDraftBytes+draftCost)
	if cfg.Rand == nil {
		cfg.Rand = rand.Reader
	}
	j := &Journal{
		cfg: cfg, store: cfg.Store, queue: semaphore.NewWeighted(cfg.QueueBytes),
		wake: make(chan struct{}, 1), grown: make(chan struct{}), signed: make(chan struct{}),
		unstamps: make(chan struct{}, 1), urgent: make(chan struct{}, 1), summed: make(chan *tally, 1), sealing: make(chan struct{}, 1), unsealed: make(chan struct{}, 1), signer: cfg.Checkpointer, stamper: cfg.Stamper,
	}
	if err := j.load(ctx); err != nil {
		return nil, fmt.Errorf("audit: opening journal: %w", err)
	}
	unsealed, err := j.checkSeal(ctx)
	if err != nil && !(cfg.NewEpoch && errors.Is(err, ErrUnsealed)) {
		return nil, fmt.Errorf("audit: opening journal: %w", err)
	}
	var note []Field
	if err != nil {
		note = append(note, Field{fieldUnsealed, Int(unsealed)})
		cfg.Log.WithError(err).WithField("unsealed_from", unsealed).Warn("the journal is opened with an end that is not sealed, because a restore was announced")
	}
	if cfg.NewEpoch || j.head.frontier.size() == 0 {
		if err := j.beginEpoch(note); err != nil {
			return nil, fmt.Errorf("audit: opening journal: announcing epoch: %w", err)
		}
	}
	return j, nil
}

func setDefault[T comparable](v *T, def T) {
	var zero T
	if *v == zero {
		*v = def
	}
}

// load reads the head and checks it against the last checkpoint.
func (j *Journal) load(ctx context.Context) error {
	size, last, err := j.store.Head(ctx)
	if err != nil {
		return fmt.Errorf("reading the head: %w", err)
	}
	h := head{}
	if h.frontier, err = loadFrontier(ctx, j.store, size); err != nil {
		return fmt.Errorf("%w: the right edge of the tree: %v", ErrCorrupt, err)
	}
	if size > 0 {
		rec, err := recordOf(*last)
		if err != nil {
			return err
		}
		if rec.Entry.Node != j.cfg.Node {
			return fmt.Errorf("the journal is that of node %q, not of %q", rec.Entry.Node, j.cfg.Node)
		}
		h.epoch, h.leaf, h.chain = rec.Epoch, rec.LeafHash, Hash(last.Chain)
		change, err := j.store.LastChange(ctx)
		if err != nil {
			return fmt.Errorf("the last change of state: %w", err)
		}
		rec, err = recordOf(change)
		if err != nil {
			return err
		}
		n, ok := rec.Entry.Change()
		if !ok {
			return fmt.Errorf("%w: entry %d is marked a change of state and is none", ErrCorrupt, rec.Sequence)
		}
		h.changes = n + 1
	}
	j.head = h
	if err := j.loadSeal(ctx); err != nil {
		return err
	}

	stored, err := j.store.LastCheckpoint(ctx)
	if errors.Is(err, ErrNotFound) {
		return nil
	} else if err != nil {
		return fmt.Errorf("the last checkpoint: %w", err)
	}
	c, err := stored.parse()
	if err != nil {
		return fmt.Errorf("the last checkpoint: %w", err)
	}
	if len(j.cfg.LogKeys) > 0 && !slices.ContainsFunc(j.cfg.LogKeys, func(k crypto.PublicKey) bool {
		return VerifyCheckpoint(k, c) == nil
	}) {
		return fmt.Errorf("%w: the last checkpoint is not signed by the log's key", ErrCorrupt)
	}
	switch {
	case c.Node != j.cfg.Node:
		return fmt.Errorf("%w: the last checkpoint is that of node %q", ErrCorrupt, c.Node)
	case c.Size > size:
		return fmt.Errorf("%w: a checkpoint covers %d entries, the journal has %d", ErrCorrupt, c.Size, size)
	}
	f, err := loadFrontier(ctx, j.store, c.Size)
	if err != nil {
		return fmt.Errorf("%w: the tree at the last checkpoint: %v", ErrCorrupt, err)
	}
	if f.root() != c.Root {
		return fmt.Errorf("%w: the root of %d entries is not that of the last checkpoint", ErrCorrupt, c.Size)
	}
	if c.Changes > h.changes {
		return fmt.Errorf("%w: a checkpoint counts %d changes of state, the journal has %d", ErrCorrupt, c.Changes, h.changes)
	}
	j.last = c
	if c.Size < size {
		// After a clean stop there are none.
		j.cfg.Log.WithFields(logrus.Fields{"covered": c.Size, "entries": size}).
			Warn("the last entries of the journal are under no checkpoint: it was not stopped cleanly, or the log's key did not answer, or a checkpoint was removed")
	}
	return nil
}

// loadSeal finds out whether the segment before an empty one has still to be entered in the journal: the stop came
// between making the segment and its first write.
func (j *Journal) loadSeal(ctx context.Context) error {
	segs, err := j.store.Segments(ctx)
	if err != nil {
		return fmt.Errorf("listing segments: %w", err)
	}
	j.pendingSeal = nil
	if n := len(segs); n > 0 && segs[n-1].Count == 0 && (j.tally == nil || j.tally.segment != segs[n-1].Number) {
		j.tally = newTally(segs[n-1].Number, segs[n-1].First)
	}
	if n := len(segs); n > 1 && segs[n-1].Count == 0 {
		if segs[n-2].Seal == nil {
			return fmt.Errorf("%w: segment %d is not sealed and not the last", ErrCorrupt, segs[n-2].Number)
		}
		j.pendingSeal = segs[n-2].Seal
	}
	return nil
}

// beginEpoch writes the entry that announces a new epoch, with the fields; it belongs to the new epoch.
func (j *Journal) beginEpoch(fields []Field) error {
	var e Epoch
	if _, err := io.ReadFull(j.cfg.Rand, e[:]); err != nil {
		return fmt.Errorf("drawing an epoch: %w", err)
	}
	d := Draft{Kind: KindEpoch, Actor: "journal", Object: e.String(), State: true, Fields: fields}
	if j.head.frontier.size() > 0 {
		d.Fields = append(d.Fields, Field{"journal.previous", Octets(bytes.Clone(j.head.epoch[:]))})
	}
	r, err := j.prepare(d, true)
	if err != nil {
		return err
	}
	r.epoch = &e
	j.commit([]*request{r})
	return r.err
}

// draftCost is what a draft weighs in the queue beside its payloads.
const draftCost = 4096

// longestName and longestTime stand for those that an entry may get.
var (
	longestName = strings.Repeat("x", MaxNameBytes)
	longestTime = Time{BoundMicros: 1<<63 - 1, State: ntp.State(strings.Repeat("x", maxStateBytes)), Provenance: strings.Repeat("x", maxProvenanceBytes)}
)

// prepare checks a draft and hashes its payloads, in the caller's goroutine.
func (j *Journal) prepare(d Draft, internal bool) (*request, error) {
	r := &request{internal: internal, done: make(chan struct{}), cost: draftCost}
	d.Ref = bytes.Clone(d.Ref)
	byName := func(a, b Field) int { return strings.Compare(a.Name, b.Name) }
	if d.State || !slices.IsSortedFunc(d.Fields, byName) {
		d.Fields = append(make([]Field, 0, len(d.Fields)+1), d.Fields...)
	}
	if !internal {
		if strings.HasPrefix(d.Kind, "journal.") {
			return nil, fmt.Errorf("%w: kind %q is kept for the journal", ErrInvalidDraft, d.Kind)
		}
		for _, f := range d.Fields {
			if strings.HasPrefix(f.Name, "journal.") {
				return nil, fmt.Errorf("%w: field %q is kept for the journal", ErrInvalidDraft, f.Name)
			}
		}
	}
	if d.Unique && len(d.Ref) == 0 {
		return nil, fmt.Errorf("%w: unique, and without a reference", ErrInvalidDraft)
	}
	if d.State {
		d.Fields = append(d.Fields, Field{fieldChange, Int(0)}) // the committer knows the number
	}
	if !slices.IsSortedFunc(d.Fields, byName) {
		slices.SortFunc(d.Fields, byName)
	}
	var shared int64
	own, apart := 0, 0 // what r.own will have, if its row has room for all, and how many are not in it
	for _, p := range d.Payloads {
		if !p.Shared && len(p.Data) <= maxOwnPayload {
			own += ownBytes + len(p.Data)
		} else {
			apart++
		}
	}
	r.blobs = slices.Grow(r.blobs, apart)
	if r.payloads = make([]Payload, 0, len(d.Payloads)); own > 0 {
		r.own = make([]byte, 0, min(own, maxOwn))
	}
	for _, p := range d.Payloads {
		var sum Hash
		if p.Shared {
			sum = j.sums.sum(p.Data)
		} else {
			sum = Sum(p.Data)
		}
		r.payloads = append(r.payloads, Payload{p.Name, p.MediaType, int64(len(p.Data)), sum})
		if b := (Blob{sum, p.Data}); p.Shared || len(p.Data) > maxOwnPayload || len(r.own)+len(p.Data) > maxOwn {
			r.blobs = append(r.blobs, b)
		} else {
			r.own = appendOwn(r.own, b)
		}
		if p.Shared { // in memory and on the disk once for all
			shared += int64(len(p.Data))
		} else {
			r.cost += int64(len(p.Data))
		}
	}
	if own := r.cost - draftCost; own > MaxDraftBytes || shared > MaxSharedBytes {
		return nil, fmt.Errorf("%w: payloads of %d bytes together and %d that recur, at most %d and %d", ErrInvalidDraft, own, shared, MaxDraftBytes, MaxSharedBytes)
	}
	slices.SortFunc(r.payloads, func(a, b Payload) int { return strings.Compare(a.Name, b.Name) })
	r.draft = d
	// A trial, so that a bad draft fails alone and not its batch. The greatest values stand for those to come.
	trial := r.entry()
	trial.Node, trial.Sequence, trial.Time = longestName, 1<<63-1, longestTime
	if err := trial.check(); err != nil {
		return nil, fmt.Errorf("%w: %v", ErrInvalidDraft, err)
	}
	if n := trial.sizes().whole; n > MaxEntryBytes {
		return nil, fmt.Errorf("%w: an entry of up to %d bytes, at most %d are allowed", ErrInvalidDraft, n, MaxEntryBytes)
	}
	return r, nil
}

// entry begins the entry anew. It shares its fields with the draft, but for a change of state, whose number is written into them.
func (r *request) entry() *Entry {
	fields := r.draft.Fields
	if r.draft.State {
		fields = slices.Clone(fields)
	}
	r.der = nil
	r.receipt.Entry = Entry{Kind: r.draft.Kind, Actor: r.draft.Actor, Object: r.draft.Object, Ref: r.draft.Ref, Fields: fields, Payloads: r.payloads}
	return &r.receipt.Entry
}

// Append records d and returns when the entry is on disk. Drafts that wait at the same time share one transaction.
//
// Errors: [ErrInvalidDraft]; a [*DuplicateRefError]; [ErrJournalUnwritable]; [ErrOutcomeUnknown]; [ErrJournalFailed];
// [ErrClosed]; that of ctx while the draft waited in the queue, in which case nothing was or will be written. Once the
// write has begun, ctx is no longer looked at: the outcome is awaited, for at most Config.CommitTimeout.
func (j *Journal) Append(ctx context.Context, d Draft) (Receipt, error) {
	if err := ctx.Err(); err != nil {
		return Receipt{}, err
	}
	r, err := j.prepare(d, false)
	if err != nil {
		return Receipt{}, err
	}
	if err := j.queue.Acquire(ctx, r.cost); err != nil {
		return Receipt{}, err
	}
	j.mu.Lock()
	switch {
	case j.failed != nil:
		err = j.failed
	case j.closing:
		err = ErrClosed
	default:
		j.waiting = append(j.waiting, r)
	}
	j.mu.Unlock()
	if err != nil {
		j.queue.Release(r.cost)
		return Receipt{}, err
	}
	notify(j.wake)

	select {
	case <-r.done:
		return r.receipt, r.err
	case <-ctx.Done():
	}
	j.mu.Lock()
	taken := r.taken
	if !taken {
		j.waiting = slices.DeleteFunc(j.waiting, func(o *request) bool { return o == r })
	}
	j.mu.Unlock()
	if !taken {
		j.queue.Release(r.cost)
		return Receipt{}, ctx.Err()
	}
	limit := time.NewTimer(j.cfg.CommitTimeout)
	defer limit.Stop()
	select {
	case <-r.done:
		return r.receipt, r.err
	case <-limit.C:
		return Receipt{}, ErrOutcomeUnknown
	}
}

func notify(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Run commits, signs checkpoints and has them stamped until ctx ends. Then it refuses new drafts, commits those that
// wait, tries for at most five seconds to sign a last checkpoint and to seal the head, and returns nil: a journal that was
// stopped so while the cipher machine answers is sealed, and a checkpoint covers all of it. It is called once.
func (j *Journal) Run(ctx context.Context) error {
	// The checkpoint goroutine outlives the committer, so that the last entries are covered.
	signCtx, stopSigning := context.WithCancel(context.WithoutCancel(ctx))
	defer stopSigning()
	var g errgroup.Group
	if j.tally == nil { // the committer's, once it runs
		g.Go(func() error { j.sumUp(ctx); return nil })
	}
	g.Go(func() error {
		defer stopSigning()
		j.commitLoop(ctx)
		return nil
	})
	g.Go(func() error { j.signLoop(signCtx); return nil })
	g.Go(func() error { j.stampLoop(signCtx); return nil })
	g.Go(func() error { j.sealLoop(signCtx); return nil })
	return g.Wait()
}

// sumUp reads the active segment as a restart found it, so that rolling need not read it while drafts wait. If it
// fails, rolling does.
func (j *Journal) sumUp(ctx context.Context) {
	select {
	case <-time.After(j.cfg.SumUpAfter):
	case <-ctx.Done():
		return
	}
	size := j.Size()
	segs, err := j.store.Segments(ctx)
	if err == nil && len(segs) > 0 {
		last := segs[len(segs)-1]
		if size < last.First {
			return
		}
		t := newTally(last.Number, last.First)
		err = t.read(ctx, j.store, size, func(took time.Duration) { // signing comes first
			select {
			case <-time.After(took):
			case <-ctx.Done():
			}
		})
		if err == nil {
			j.summed <- t
		}
	}
	if err != nil && ctx.Err() == nil {
		j.cfg.Log.WithError(err).Warning("active segment not summed up")
	}
}

// count adds rows that were written to the tally. Where rows between are missing in it, it waits for roll to read them.
func (j *Journal) count(ctx context.Context, rows []Row) {
	select {
	case t := <-j.summed:
		if j.tally == nil {
			// Only what was written since that reading began.
			if err := t.read(ctx, j.store, uint64(rows[0].Sequence), nil); err == nil {
				j.tally = t
			}
		}
	default:
	}
	for _, r := range rows {
		if j.tally == nil || j.tally.next != uint64(r.Sequence) {
			return
		}
		if err := j.tally.add(Hash(r.Leaf)); err != nil {
			j.tally = nil
		}
	}
}

// Expect says that an entry is on its way: its Append will come before done is called, if it comes at all. done may be
// called once.
//
// A transaction costs much the same for one entry and for fifty. While several are on their way, the journal waits for
// most of them, as long as the last transaction took and gatherLimit at most; what else they have to do goes on meanwhile.
// An entry that is alone never waits.
func (j *Journal) Expect() (done func()) {
	j.expected.Add(1)
	return func() { j.expected.Add(-1) }
}

const gatherLimit = 2 * time.Millisecond

// gather waits for more requests, if some wait already and others are expected.
func (j *Journal) gather() {
	var limit *time.Timer
	for {
		want := min(int(j.expected.Load()*3/4), j.cfg.MaxBatch)
		if want < 2 {
			return
		}
		j.mu.Lock()
		n := len(j.waiting)
		j.mu.Unlock()
		if n == 0 || n >= want {
			return
		}
		if limit == nil {
			limit = time.NewTimer(min(gatherLimit, j.took))
			defer limit.Stop()
		}
		select {
		case <-j.wake:
		case <-limit.C:
			return
		}
	}
}

func (j *Journal) commitLoop(ctx context.Context) {
	for {
		j.gather()
		batch := j.take()
		if len(batch) > 0 {
			j.commit(batch)
			continue
		}
		select {
		case <-j.wake:
			continue
		case <-ctx.Done():
		}
		j.mu.Lock()
		j.closing = true // after this nothing is added
		empty := len(j.waiting) == 0
		j.mu.Unlock()
		if empty {
			return
		}
	}
}

// maxBatchBytes bounds what one transaction writes in payloads; a single draft can be larger.
const maxBatchBytes = 32 << 20

// take removes the next batch from the queue. From then on the requests cannot be cancelled.
func (j *Journal) take() []*request {
	j.mu.Lock()
	defer j.mu.Unlock()
	n, bytes := 0, int64(0)
	for n < len(j.waiting) && n < j.cfg.MaxBatch && (n == 0 || bytes+j.waiting[n].cost <= maxBatchBytes) {
		bytes += j.waiting[n].cost
		j.waiting[n].taken = true
		n++
	}
	batch := slices.Clone(j.waiting[:n])
	j.waiting = slices.Delete(j.waiting, 0, n)
	return batch
}

// commit writes the requests, in as many segments as they need, and answers each.
func (j *Journal) commit(batch []*request) {
	answer := func(rs []*request, err error) {
		for _, r := range rs {
			if err != nil {
				r.err = err
			}
			if r.err != nil {
				r.receipt = Receipt{}
			}
			if !r.internal {
				j.queue.Release(r.cost)
			}
			close(r.done)
		}
	}
	for len(batch) > 0 {
		n, err := j.commitSome(batch)
		if err != nil {
			answer(batch, err)
			return
		}
		answer(batch[:n], nil)
		batch = batch[n:]
	}
}

// commitSome writes a prefix of batch that fits in the active segment, and answers its length. A request may have its
// own error (a duplicate reference); the error returned is everybody's.
//
// Order: 1. look at the store if the last write is in doubt; 2. roll to a new segment if the active one is full;
// 3. give each draft its sequence; 4. write; 5. publish the new head. A stop before 4 leaves nothing, a stop after it
// leaves entries that nobody was told of.
func (j *Journal) commitSome(batch []*request) (int, error) {
	ctx := context.Background() // a write is not abandoned half way; Append has its own limit
	j.mu.Lock()
	failed, h := j.failed, j.head
	j.mu.Unlock()
	if failed != nil {
		return 0, failed
	}
	if j.doubt {
		if err := j.resync(ctx); err != nil {
			return 0, err
		}
		j.mu.Lock()
		h = j.head
		j.mu.Unlock()
	}
	reading := j.cfg.Clock.Now()
	var now time.Time
	if reading.Trusted() {
		now = reading.Time
	}
	room, err := j.store.Room(ctx, now)
	// The seal of a full segment is an entry, too: of a journal that was restored it must not be one of the epoch before,
	// where the original has another. So the epoch's first entry goes into the full segment.
	if err == nil && batch[0].epoch != nil && j.pendingSeal == nil {
		room = max(room, 1)
	}
	if err == nil && room == 0 && j.pendingSeal == nil {
		if err = j.roll(ctx); err == nil {
			room, err = j.store.Room(ctx, now)
		}
	}
	if err == nil && room == 0 && j.pendingSeal == nil {
		err = errors.New("the store has no room after rolling")
	}
	if err != nil {
		j.doubt = true
		return 0, fmt.Errorf("%w: %v", ErrJournalUnwritable, err)
	}

	work := batch
	if j.pendingSeal != nil {
		seal, err := j.prepare(j.pendingSeal.draft(), true)
		if err != nil {
			return 0, err
		}
		work = append([]*request{seal}, batch...)
		if batch[0].epoch != nil { // the epoch first, for the same reason
			work[0], work[1] = work[1], work[0]
		}
	}
	if j.pendingSeal != nil {
		room = max(room, 2) // a seal and one draft, or a segment of one entry would never end
	}
	work = work[:min(len(work), room)]

	b, next, errs, err := j.build(ctx, h, work, TimeOf(reading))
	if err != nil {
		j.doubt = true
		return 0, fmt.Errorf("%w: %v", ErrJournalUnwritable, err)
	}
	if len(b.Rows) > 0 {
		err = j.write(ctx, b, next, work)
	}
	j.reuse(b)
	if err != nil {
		return 0, err
	}
	for i, err := range errs {
		work[i].err = err
	}
	if j.pendingSeal != nil {
		j.pendingSeal = nil
		return len(work) - 1, nil
	}
	return len(work), nil
}

// reuse keeps the memory of a batch that was written for the next, and nothing of what was in it. A store holds on to no slice of a
// batch's (see [Store.Append]).
func (j *Journal) reuse(b Batch) {
	clear(b.Rows)
	clear(b.Nodes)
	clear(b.Blobs)
	j.room = Batch{}
	if cap(b.Rows) <= maxRoom && cap(b.Blobs) <= maxRoom {
		j.room = Batch{Rows: b.Rows[:0], Nodes: b.Nodes[:0], Blobs: b.Blobs[:0]}
	}
}

// maxRoom bounds the rows that memory is kept for.
const maxRoom = 4096

// build makes the rows of work on top of h. errs has one element for each request.
func (j *Journal) build(ctx context.Context, h head, work []*request, now Time) (Batch, head, []error, error) {
	blobs := 0
	for _, r := range work {
		blobs += len(r.blobs)
	}
	b := j.room
	b.Rows, b.Nodes, b.Blobs = slices.Grow(b.Rows, len(work)), slices.Grow(b.Nodes, 2*len(work)), slices.Grow(b.Blobs, blobs) // n leaves complete less than n inner nodes, but for the edge
	errs := make([]error, len(work))
	next := h
	next.frontier = h.frontier.clone()
	fresh := make(map[string]uint64, len(work)) // refs of this batch
	inTime := true
	for i, r := range work {
		if r.draft.Unique {
			seq, known := fresh[string(r.draft.Ref)]
			if !known {
				var err error
				if seq, known, err = j.lookUp(ctx, &r.draft); err != nil {
					return b, next, nil, fmt.Errorf("looking a reference up: %w", err)
				}
			}
			if known {
				errs[i] = &DuplicateRefError{Sequence: seq}
				continue
			}
		}
		if r.epoch != nil {
			next.epoch = *r.epoch
		}
		// What was encoded ahead came before now, so that after one that was not none can follow.
		e := &r.receipt.Entry
		inTime = inTime && r.der != nil && e.Sequence == next.frontier.size() && e.Epoch == next.epoch
		if !inTime {
			r.entry()
			if r.draft.State {
				k := slices.IndexFunc(e.Fields, func(f Field) bool { return f.Name == fieldChange })
				e.Fields[k].Value = Int(next.changes)
				next.changes++
			}
			if err := j.encode(r, next.epoch, next.frontier.size(), now); err != nil {
				return b, next, nil, err
			}
		}
		next.leaf = r.leaf
		next.chain = ChainHash(next.chain, next.leaf)
		r.chain = next.chain
		if err := next.frontier.grow(next.leaf, func(id NodeID, hash Hash) {
			b.Nodes = append(b.Nodes, Node{id, hash})
		}); err != nil {
			return b, next, nil, err
		}
		b.Rows = append(b.Rows, Row{
			Sequence: int64(e.Sequence), Kind: e.Kind, Ref: e.Ref, Change: r.draft.State,
			Leaf: r.leaf[:], Chain: r.chain[:], DER: r.der, Own: r.own,
		})
		b.Blobs = append(b.Blobs, r.blobs...)
		if len(e.Ref) > 0 {
			if _, ok := fresh[string(e.Ref)]; !ok {
				fresh[string(e.Ref)] = e.Sequence
			}
		}
		r.receipt.Epoch, r.receipt.Sequence, r.receipt.LeafHash, r.receipt.EntryDER = e.Epoch, e.Sequence, next.leaf, r.der
	}
	return b, next, errs, nil
}

// encode gives the request's entry its place.
func (j *Journal) encode(r *request, epoch Epoch, sequence uint64, now Time) (err error) {
	e := &r.receipt.Entry
	e.Node, e.Epoch, e.Sequence, e.Time = j.cfg.Node, epoch, sequence, now
	if r.der, err = e.encode(); err == nil { // prepare has checked it
		r.leaf = LeafHash(r.der)
	}
	return err
}

// encodeAhead encodes what waits behind a batch that is being written, as it will be if nothing comes between: a tenth of
// the committer's work, done while it waits for the disk. Whether nothing did, build sees. The function answered ends it.
func (j *Journal) encodeAhead(h head) (end func()) {
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for i := 0; i < j.cfg.MaxBatch; {
			var r *request
			j.mu.Lock()
			if i < len(j.waiting) {
				r = j.waiting[i]
			}
			j.mu.Unlock()
			if r == nil {
				select {
				case <-j.wake: // the committer looks at what waits before it waits for this
					continue
				case <-stop:
					return
				}
			}
			select {
			case <-stop:
				return
			default:
			}
			if r.draft.State || r.epoch != nil {
				return // the committer knows the number, and encodes what follows
			}
			r.entry()
			if err := j.encode(r, h.epoch, h.frontier.size()+uint64(i), TimeOf(j.cfg.Clock.Now())); err != nil {
				return // build meets it again
			}
			i++
		}
	}()
	return func() { close(stop); <-done }
}

// lookUp answers the first entry with the draft's reference, of those on disk. What came after Absent is in memory, or
// the disk is asked.
func (j *Journal) lookUp(ctx context.Context, d *Draft) (seq uint64, known bool, err error) {
	if j.refs.known && d.Absent >= j.refs.from {
		seq, known = j.refs.of[[32]byte(d.Ref)] // of that length, prepare has seen to it
		return seq, known, nil
	}
	found, err := j.store.FindRef(ctx, d.Ref, 1)
	switch {
	case errors.Is(err, ErrNotFound), err == nil && len(found) == 0:
		return 0, false, nil
	case err != nil:
		return 0, false, err
	}
	return found[0], true, nil
}

// write appends b, the rows of work, and publishes next. When the store answers with an error, its head is read: what is there counts.
func (j *Journal) write(ctx context.Context, b Batch, next head, work []*request) error {
	b.Seal = j.sealBatch(ctx, next)
	j.storing.Lock()
	end := func() {}
	if j.expected.Load() > int64(len(work)) { // more are on their way than are being written
		end = j.encodeAhead(next)
	}
	begun := time.Now() // interval
	err := j.store.Append(ctx, b)
	j.took = time.Since(begun)
	end()
	j.storing.Unlock()
	if err != nil {
		j.doubt = true
		j.cfg.Log.WithError(err).WithField("entries", len(b.Rows)).Error("journal write failed")
		if syncErr := j.resync(ctx); errors.Is(syncErr, ErrJournalUnwritable) {
			// The head cannot be read either. The batch may be there: the next write looks again and takes it over then.
			return fmt.Errorf("%w: %v; %v", ErrOutcomeUnknown, err, syncErr)
		} else if syncErr != nil {
			return syncErr
		}
		j.mu.Lock()
		landed := j.head.frontier.size() == next.frontier.size() && j.head.leaf == next.leaf
		j.mu.Unlock()
		if !landed && errors.Is(err, ErrCorrupt) {
			return j.fail(err) // somebody changed the store under us: stopping is meant
		} else if !landed {
			return fmt.Errorf("%w: %v", ErrJournalUnwritable, err)
		}
		return nil // it landed, the answer was lost
	}
	j.publish(next, b.Seal, work)
	j.count(ctx, b.Rows)
	return nil
}

// publish makes h the head. seal is what was written with it; nil: it is to be sealed. rs are the requests that were
// written; nil: unknown.
func (j *Journal) publish(h head, seal *HeadSeal, rs []*request) {
	j.mu.Lock()
	if j.prompt && h.changes != j.head.changes {
		notify(j.urgent)
	}
	j.head = h
	j.keepRecent(rs)
	if seal != nil {
		j.sealedTo = seal.Size
	} else {
		notify(j.unsealed)
	}
	close(j.grown)
	j.grown = make(chan struct{})
	j.mu.Unlock()
}

// resync reads the store's head after a failed write. The store must still end in what was acknowledged, or continue
// it by entries that were written and whose acknowledgement was lost; otherwise the journal fails for good.
func (j *Journal) resync(ctx context.Context) error {
	unwritable := func(err error) error { return fmt.Errorf("%w: reading the head: %v", ErrJournalUnwritable, err) }
	j.mu.Lock()
	h := j.head
	j.mu.Unlock()
	size, _, err := j.store.Head(ctx)
	if err != nil {
		return unwritable(err)
	}
	known := h.frontier.size()
	if size < known {
		return j.fail(fmt.Errorf("the store has %d entries, %d were acknowledged", size, known))
	}
	if known > 0 {
		row, err := j.store.Row(ctx, known-1)
		if err != nil && !errors.Is(err, ErrNotFound) {
			return unwritable(err)
		}
		if err != nil || !bytes.Equal(row.Leaf, h.leaf[:]) {
			return j.fail(fmt.Errorf("entry %d is not the one that was acknowledged", known-1))
		}
	}
	next := h
	next.frontier = h.frontier.clone()
	for seq := known; seq < size; seq++ {
		row, err := j.store.Row(ctx, seq)
		if err != nil && !errors.Is(err, ErrNotFound) {
			return unwritable(err)
		}
		var rec Record
		if err == nil {
			rec, err = recordOf(row)
		}
		if err != nil {
			return j.fail(fmt.Errorf("entry %d after a failed write: %v", seq, err))
		}
		if rec.Sequence != seq || rec.Entry.Node != j.cfg.Node {
			return j.fail(fmt.Errorf("entry %d after a failed write is not ours", seq))
		}
		next.epoch, next.leaf = rec.Epoch, rec.LeafHash
		next.chain = ChainHash(next.chain, next.leaf)
		if n, ok := rec.Entry.Change(); ok {
			next.changes = n + 1
		}
		if err := next.frontier.grow(next.leaf, nil); err != nil {
			return j.fail(err)
		}
	}
	if err := j.loadSeal(ctx); err != nil {
		return unwritable(err)
	}
	if size > known {
		j.publish(next, nil, nil)
	}
	j.doubt = false
	return nil
}

// fail latches the journal.
func (j *Journal) fail(cause error) error {
	err := fmt.Errorf("%w: %v", ErrJournalFailed, cause)
	j.mu.Lock()
	if j.failed == nil {
		j.failed = err
	}
	j.mu.Unlock()
	j.cfg.Log.WithError(err).Error("journal closed for writing")
	return err
}

// roll seals the active segment. The seal says what was acknowledged, counted as it was written; what of it is not
// counted yet (after a restart, or a write in doubt) is read, about a second for a million entries, in which drafts
// wait.
func (j *Journal) roll(ctx context.Context) error {
	segs, err := j.store.Segments(ctx)
	if err != nil {
		return fmt.Errorf("listing segments: %w", err)
	}
	active := segs[len(segs)-1]
	if j.tally == nil || j.tally.segment != active.Number {
		j.tally = newTally(active.Number, active.First)
	}
	err = j.tally.read(ctx, j.store, j.Size(), nil)
	if err == nil && j.tally.next == active.First {
		err = fmt.Errorf("%w: it is empty", ErrCorrupt)
	}
	if err != nil {
		j.tally = nil
		return fmt.Errorf("summing segment %d up: %w", active.Number, err)
	}
	seal := j.tally.seal()
	if err := j.store.Roll(ctx, seal); err != nil {
		return fmt.Errorf("rolling to segment %d: %w", seal.Segment+1, err)
	}
	j.pendingSeal = &seal
	j.tally = newTally(seal.Segment+1, seal.Last+1)
	j.cfg.Log.WithFields(logrus.Fields{"segment": seal.Segment, "first": seal.First, "last": seal.Last}).Info("journal segment sealed")
	return nil
}

// Failed is nil, or why the journal is closed for writing.
func (j *Journal) Failed() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.failed
}

// FreeBytes is the space left for the journal.
func (j *Journal) FreeBytes() (uint64, error) { return j.store.FreeBytes() }

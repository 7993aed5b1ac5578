package audit

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"crypto/hmac"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"math"
	"math/bits"
	"slices"
	"time"

	"github.com/emmansun/gmsm/sm3"

	"yinjian/ntp"
)

// A FindingKind names what [Verify] found. The names are stable.
type FindingKind string

const (
	EntryChanged       FindingKind = "entry-changed"       // the entry does not hash to what was recorded for it
	LeafChanged        FindingKind = "leaf-changed"        // the stored leaf hash was changed, the entry was not
	ColumnChanged      FindingKind = "column-changed"      // a column says something else than its entry
	ChainChanged       FindingKind = "chain-changed"       // the stored chain hash was changed
	NodeChanged        FindingKind = "node-changed"        // an inner node does not follow from what is below it
	NodeMissing        FindingKind = "node-missing"        // an inner node is gone
	NodesWithoutEntry  FindingKind = "nodes-without-entry" // nodes are left of entries that are gone
	EntryRemoved       FindingKind = "entry-removed"       // a number is missing
	EntryAdded         FindingKind = "entry-added"         // a row stands where no entry was written
	EntryReordered     FindingKind = "entry-reordered"     // a row holds the entry of another number
	Truncated          FindingKind = "truncated"           // a signed checkpoint covers more entries than there are
	HistoryRewritten   FindingKind = "history-rewritten"   // a signed root differs, and everything stored agrees with itself
	CheckpointInvalid  FindingKind = "checkpoint-invalid"  // a checkpoint does not parse or its signature is not the log's
	CheckpointRemoved  FindingKind = "checkpoint-removed"  // a checkpoint or a token names a checkpoint that is gone or another
	PayloadMissing     FindingKind = "payload-missing"     // an entry's payload is gone
	PayloadChanged     FindingKind = "payload-changed"     // a payload does not hash to what its entry says
	PayloadAdded       FindingKind = "payload-added"       // a payload is stored that no entry of its segment has
	SealWrong          FindingKind = "seal-wrong"          // a segment is not what its seal says
	SegmentMissing     FindingKind = "segment-missing"     // a segment is gone, not sealed or not in its place
	SegmentUnreadable  FindingKind = "segment-unreadable"  // a segment's file cannot be read
	EpochWrong         FindingKind = "epoch-wrong"         // an epoch without announcement, or used twice
	ChangeOutOfOrder   FindingKind = "change-out-of-order" // the changes of state are not numbered without gap
	WrongNode          FindingKind = "wrong-node"          // an entry or checkpoint of another node
	RolledBack         FindingKind = "rolled-back"         // a checkpoint known from elsewhere is later than the journal
	SchemaChanged      FindingKind = "schema-changed"      // a segment's file has a trigger, table, index or view of its own, or lacks one
	TokenInvalid       FindingKind = "token-invalid"       // a checkpoint's timestamp token is not one over its signature
	Empty              FindingKind = "empty"               // there are no entries at all
	HeadSealWrong      FindingKind = "head-seal-wrong"     // the end is not what the cipher machine sealed
	maxFindings                    = 1000                  // kept; the rest is counted
	expectedCheckpoint             = int64(10 * 1_000_000) // µs of entries without a checkpoint that make a remark
)

// A Finding is one thing that is not as it was written.
type Finding struct {
	Kind     FindingKind `json:"kind"`
	Segment  int         `json:"segment,omitempty"`
	Sequence uint64      `json:"sequence"`      // the first entry concerned
	Through  uint64      `json:"through"`       // the last one
	Ref      string      `json:"ref,omitempty"` // of the entry, hexadecimal: the record id
	Detail   string      `json:"detail"`        // English
	DetailZH string      `json:"detail_zh"`     // Chinese
}

// A Report is what [Verify] found.
type Report struct {
	Node        string   `json:"node"`
	Entries     uint64   `json:"entries"` // the number that should be there: the last one's + 1
	Root        string   `json:"root"`    // of what is stored, hexadecimal
	Segments    int      `json:"segments"`
	Epochs      []string `json:"epochs"`
	Checkpoints uint64   `json:"checkpoints"` // valid ones
	Tokens      uint64   `json:"tokens"`      // checkpoints with a timestamp token
	// TokensChecked of them were handed to Options.CheckToken and found good. WithoutToken checkpoints have none: the
	// stamping unit did not answer then, or the token was removed.
	TokensChecked uint64 `json:"tokens_checked"`
	WithoutToken  uint64 `json:"without_token"`
	Payloads      uint64 `json:"payloads"`
	// CoveredTo: the first CoveredTo entries are under a valid signed checkpoint. The Uncovered ones after it are
	// protected by the chain of hashes alone, which whoever can write the files can compute again.
	CoveredTo uint64 `json:"covered_to"`
	Uncovered uint64 `json:"uncovered"`
	// Covered: every entry is under a valid signed checkpoint. While it is false no finding does not mean no change: of
	// the uncovered entries nothing can be said offline.
	Covered bool `json:"covered"`
	// HeadSealChecked: the head seal was compared (Options.Sealer).
	HeadSealChecked bool `json:"head_seal_checked"`
	// UncoveredMicros is how much time lies between the first and the last uncovered entry with a trusted time. While
	// the appliance runs and its log key answers, checkpoints follow within a second, and a clean stop leaves none
	// uncovered: more than that is remarked upon.
	UncoveredMicros int64 `json:"uncovered_us"`
	// SignaturesChecked is false when no key was given: then checkpoints prove only that the files agree.
	SignaturesChecked bool      `json:"signatures_checked"`
	Findings          []Finding `json:"findings"`
	Omitted           uint64    `json:"omitted"` // findings beyond those listed
	Remarks           []string  `json:"remarks"` // what a reader should know; no finding
}

// OK reports whether nothing was found. It says nothing about entries that no checkpoint covers: see Covered.
func (r *Report) OK() bool { return len(r.Findings) == 0 }

// Options are what a verifier brings along.
type Options struct {
	// LogKey verifies the checkpoints; OldLogKeys are its predecessors. Without any key signatures are not checked.
	LogKey     crypto.PublicKey
	OldLogKeys []crypto.PublicKey
	// Known are checkpoints kept elsewhere (by the other campus, in evidence). Only they show that the whole journal
	// was put back to an earlier state.
	Known []Checkpoint
	// CheckToken, if set, says what is wrong with a timestamp token that stands beside a checkpoint with this signature
	// (DER, exactly what was stamped); nil: nothing. Without it tokens are counted only. With Workers it is called by
	// several goroutines.
	CheckToken func(signature, token []byte) error
	// Sealer, if set, checks the head seal ([HeadSeal]); only the appliance's own cipher machine can.
	Sealer MAC
	// Wait is how long to wait at the beginning for a checkpoint over what is there then: the journal may be beside its
	// running appliance, which signs one within a second. 0: not at all.
	Wait time.Duration
	// Progress, if set, is called now and then.
	Progress func(done, total uint64)
	// Workers is how many goroutines read entries apart and hash, beside the one that reads the store and the one that
	// judges. 0: the caller's own does all of it, as is right where signing comes first.
	Workers int
}

// Verify reads the whole store again and names what is not as it was written.
//
// For each entry: the canonical encoding, the number, the leaf hash, the chain, the columns, the payloads. For the
// tree: each stored inner node must follow from the two below it, so that a damage is found where it is and not only
// at the root; then the root of the stored nodes is compared with every signed checkpoint. Together that is the same
// as computing each root from the entries. If somebody computed leaf, chain and all nodes again, only the checkpoints
// differ; the finding then names the entries between the last checkpoint that fits and the first that does not.
//
// The store may be written meanwhile: what it had at the beginning is verified, and what came up to the last checkpoint
// that was waited for.
//
// The error is about reading, not about findings; after it the report is incomplete.
func Verify(ctx context.Context, store Store, opt Options) (*Report, error) {
	return verifyInParts(ctx, store, opt, partRows)
}

func verifyInParts(ctx context.Context, store Store, opt Options, partRows int) (*Report, error) {
	v := &verifier{partRows: partRows, ctx: ctx, store: store, opt: opt, report: &Report{}, epochs: map[Epoch]bool{}, open: -1, before: map[int]Finding{}}
	if opt.LogKey != nil {
		v.keys = append([]crypto.PublicKey{opt.LogKey}, opt.OldLogKeys...)
	}
	v.report.SignaturesChecked = len(v.keys) > 0
	err := v.run()
	return v.report, err
}

type verifier struct {
	ctx    context.Context
	store  Store
	opt    Options
	keys   []crypto.PublicKey
	report *Report

	seg       Segment
	next      uint64 // number of the next entry
	partRows  int
	part      *part           // the rows that are being judged
	leaves    []Hash          // of them, those that were taken for entries
	pending   [64]value       // by level: the left node that waits for its sibling, if it is known
	chain     *Hash           // of the entry before; nil: not known
	suspect   *suspicion      // the entry before, if it is to be settled by this one
	named     *uint64         // the entry before, if it was named as changed
	open      int             // finding of a lowest node that does not fit, which no chain explains yet; -1: none
	proved    *uint64         // last entry whose leaf is under a signed root without a stored node between
	refs      [2][]byte       // of the entry before and of this one
	before    map[int]Finding // findings as they were before they were laid to an entry
	sum       hash.Hash       // over the segment's leaf hashes
	own       frontier        // the segment's own tree
	nodes     uint64          // inner nodes that the segment should have
	prior     *Seal           // of the segment before
	announced bool            // the segment begins with the announcement of an epoch
	node      string
	epoch     *Epoch
	epochs    map[Epoch]bool
	changes   uint64
	checked   map[Hash]bool // payloads of this segment
	stored    []uint64      // first bytes of the digests of all of them

	// Sizes of the first and the last checkpoint without token.
	bareFirst, bareLast uint64

	sizes    []uint64 // of all stored checkpoints, ascending
	points   []point  // those to be compared, by size
	firstBad bool     // a root differed already
	goodSize uint64   // last size whose root fits
	// Trusted times of the first and the last entry that no checkpoint covers.
	uncovered       bool
	firstAt, lastAt int64
	goodAt          int64 // time of the last checkpoint that fits

	headSeal *HeadSeal // to be compared; nil: none is
	headErr  error     // why there is none
	headMAC  []byte    // what it should be; nil: its size was not reached
}

// find lists a finding and answers its index, -1 if it is only counted.
func (v *verifier) find(f Finding) int {
	if len(v.report.Findings) >= maxFindings {
		v.report.Omitted++
		return -1
	}
	if f.Through < f.Sequence {
		f.Through = f.Sequence
	}
	if f.Segment == 0 {
		f.Segment = v.seg.Number
	}
	v.report.Findings = append(v.report.Findings, f)
	return len(v.report.Findings) - 1
}

func (v *verifier) run() error {
	if err := v.store.Reread(); err != nil {
		return fmt.Errorf("audit: verifying: %w", err)
	}
	began, _, err := v.extent()
	if err != nil {
		return err
	}
	if err := v.await(began); err != nil {
		return err
	}
	// Checkpoints and seal first: a journal that grows meanwhile then has more entries than they cover, never fewer.
	if err := v.loadCheckpoints(); err != nil {
		return fmt.Errorf("audit: verifying: reading checkpoints: %w", err)
	}
	if err := v.loadHeadSeal(); err != nil {
		return fmt.Errorf("audit: verifying: reading the head seal: %w", err)
	}
	total, segs, err := v.extent()
	if err != nil {
		return err
	}
	v.report.Segments = len(segs)
	if covered := v.coveredAll(began); covered > 0 && covered < total {
		// What came after a checkpoint that covers all there was in the beginning was written meanwhile: it has not had
		// its checkpoint yet.
		if last := &segs[len(segs)-1]; covered > last.First && last.Err == nil && last.Seal == nil {
			total = covered
			last.Count = total - last.First
		}
	}
	zero := Hash{}
	v.chain = &zero
	for i, s := range segs {
		v.seg = s
		if err := v.segment(i, segs, total); err != nil {
			return fmt.Errorf("audit: verifying segment %d: %w", s.Number, err)
		}
	}
	v.settle(nil)
	if err := v.judgeHeadSeal(); err != nil {
		return fmt.Errorf("audit: verifying: the head seal: %w", err)
	}
	v.finish()
	return nil
}

// extent lists the segments and answers how many entries there are.
func (v *verifier) extent() (total uint64, segs []Segment, err error) {
	if segs, err = v.store.Segments(v.ctx); err != nil {
		return 0, nil, fmt.Errorf("audit: verifying: listing segments: %w", err)
	}
	for _, s := range segs {
		total = max(total, s.First+s.Count)
	}
	return total, segs, nil
}

// await waits for a checkpoint over the first size entries, for at most Options.Wait. That there is none is no error.
func (v *verifier) await(size uint64) error {
	if v.opt.Wait <= 0 || size == 0 {
		return nil
	}
	limit := time.NewTimer(v.opt.Wait)
	defer limit.Stop()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		c, err := v.store.LastCheckpoint(v.ctx)
		if err == nil && c.Size >= size || err != nil && !errors.Is(err, ErrNotFound) {
			return v.ctx.Err() // what is wrong with it is found when all are read
		}
		select {
		case <-tick.C:
		case <-limit.C:
			return nil
		case <-v.ctx.Done():
			return v.ctx.Err()
		}
	}
}

// coveredAll answers the greatest size of a checkpoint if it is at least size and nothing asks for what comes after it;
// otherwise 0.
func (v *verifier) coveredAll(size uint64) uint64 {
	if len(v.sizes) == 0 || v.opt.Sealer != nil {
		return 0
	}
	last := v.sizes[len(v.sizes)-1]
	if last < size || slices.ContainsFunc(v.opt.Known, func(c Checkpoint) bool { return c.Size > last }) {
		return 0
	}
	return last
}

// loadHeadSeal reads the seal, if there is somebody to check it.
func (v *verifier) loadHeadSeal() error {
	if v.opt.Sealer == nil {
		return nil
	}
	seal, err := v.store.HeadSeal(v.ctx)
	switch {
	case err == nil:
		v.headSeal = &seal
	case errors.Is(err, ErrNotFound), errors.Is(err, ErrCorrupt):
		v.headErr = err
	default:
		return err
	}
	return nil
}

// sealAt computes the head seal when its size is reached.
func (v *verifier) sealAt() error {
	if v.headSeal == nil || v.headSeal.Size != v.next || v.epoch == nil || v.chain == nil {
		return nil
	}
	roots := v.roots()
	if len(roots) == 0 {
		return nil
	}
	mac, err := v.opt.Sealer.MAC(v.ctx, HeadSealInput(v.node, *v.epoch, v.next, v.changes, *v.chain, roots[0]))
	if err != nil {
		return fmt.Errorf("the sealer: %w", err)
	}
	v.headMAC = mac
	return nil
}

// judgeHeadSeal says whether the end is sealed.
func (v *verifier) judgeHeadSeal() error {
	if v.opt.Sealer == nil || v.next == 0 {
		return nil
	}
	v.report.HeadSealChecked = true
	f := Finding{Kind: HeadSealWrong}
	switch seal := v.headSeal; {
	case seal == nil:
		f.Through = v.next - 1
		f.Detail = fmt.Sprintf("the end of the journal has no seal of the cipher machine: %v", v.headErr)
		f.DetailZH = fmt.Sprintf("日志末尾没有密码机的封存值：%v", v.headErr)
	case v.headMAC == nil || !hmac.Equal(v.headMAC, seal.MAC):
		f.Sequence, f.Through = min(v.goodSize, v.next-1), max(v.next, seal.Size)-1
		f.Detail = fmt.Sprintf("the cipher machine sealed %d entries, and not these: something after the last checkpoint that fits was changed, cut off or added", seal.Size)
		f.DetailZH = fmt.Sprintf("密码机封存的 %d 条记录与现存的不符：最后一个相符的检查点之后有改动、截去或增添", seal.Size)
	case seal.Size < v.next:
		// Sealed since? Then it was only being written.
		if now, err := v.store.HeadSeal(v.ctx); err == nil && now.Size > seal.Size {
			return nil
		} else if err != nil && !errors.Is(err, ErrNotFound) && !errors.Is(err, ErrCorrupt) {
			return err
		}
		f.Sequence, f.Through = seal.Size, v.next-1
		f.Detail = fmt.Sprintf("entries %d to %d are not sealed by the cipher machine: it was away when they were written, or they were added", seal.Size, v.next-1)
		f.DetailZH = fmt.Sprintf("第 %d 至 %d 条记录未经密码机封存：写入时密码机离线，或是后来加入的", seal.Size, v.next-1)
	default:
		return nil
	}
	v.find(f)
	return nil
}

// loadCheckpoints reads all checkpoints, checks their signatures and their own chain, and adds the known ones.
func (v *verifier) loadCheckpoints() error {
	var before *Checkpoint
	seen := false
	judge := func(x *examinedCheckpoint) {
		first := !seen
		seen = true
		v.sizes = append(v.sizes, x.Size)
		c := x.parsed
		if x.err != nil {
			v.find(Finding{
				Kind: CheckpointInvalid, Sequence: x.Size, Detail: fmt.Sprintf("checkpoint of size %d: %v", x.Size, x.err),
				DetailZH: fmt.Sprintf("规模为 %d 的检查点无效：%v", x.Size, x.err),
			})
			before = nil
			return
		}
		if c.PreviousSize > 0 || before != nil {
			switch {
			case first, before != nil && before.Size != c.PreviousSize:
				v.find(Finding{
					Kind: CheckpointRemoved, Sequence: c.PreviousSize,
					Detail:   fmt.Sprintf("the checkpoint of size %d, which the one of size %d names, is gone", c.PreviousSize, c.Size),
					DetailZH: fmt.Sprintf("规模为 %d 的检查点所指的前一检查点（规模 %d）已被删除", c.Size, c.PreviousSize),
				})
			case before != nil && Sum(before.Note) != c.PreviousHash:
				v.find(Finding{
					Kind: CheckpointRemoved, Sequence: c.PreviousSize,
					Detail:   fmt.Sprintf("the checkpoint of size %d is another than the one of size %d names", c.PreviousSize, c.Size),
					DetailZH: fmt.Sprintf("规模为 %d 的检查点与规模 %d 的检查点所指的不是同一个", c.PreviousSize, c.Size),
				})
			}
		}
		before = c
		v.report.Checkpoints++
		v.token(x)
		v.points = append(v.points, pointOf(c))
	}
	var some []examinedCheckpoint
	flush := func() {
		v.examineCheckpoints(some)
		for i := range some {
			judge(&some[i])
		}
		some = some[:0]
	}
	err := v.store.Checkpoints(v.ctx, 0, func(s StoredCheckpoint) error {
		if some = append(some, examinedCheckpoint{StoredCheckpoint: s}); len(some) == checkpointsAtOnce {
			flush()
		}
		return v.ctx.Err()
	})
	flush()
	if err != nil && !errors.Is(err, ErrCorrupt) {
		return err
	}
	if err != nil {
		v.find(Finding{Kind: SegmentUnreadable, Detail: err.Error(), DetailZH: "检查点无法读取：" + err.Error()})
	}
	if err := v.loadTokens(); err != nil {
		return err
	}
	for i := range v.opt.Known {
		c := &v.opt.Known[i]
		if err := v.signed(c); err != nil {
			return fmt.Errorf("known checkpoint of size %d: %w", c.Size, err)
		}
		v.points = append(v.points, pointOf(c))
	}
	slices.SortStableFunc(v.points, func(a, b point) int { return cmp.Compare(a.size, b.size) })
	return nil
}

// A point is what is compared of a checkpoint. A journal has one for every few entries: nothing else is kept.
type point struct {
	size    uint64
	root    Hash
	node    string
	epoch   Epoch
	changes uint64
	micros  int64
	note    Hash // SM3 of the text
}

func pointOf(c *Checkpoint) point {
	return point{c.Size, c.Root, c.Node, c.Epoch, c.Changes, c.Time.Micros, Sum(c.Note)}
}

// token judges a checkpoint's token. An empty one is no token.
func (v *verifier) token(x *examinedCheckpoint) {
	r := v.report
	switch {
	case len(x.Token) == 0:
		if r.WithoutToken == 0 {
			v.bareFirst = x.Size
		}
		v.bareLast = x.Size
		r.WithoutToken++
		return
	case v.opt.CheckToken == nil:
	case x.tokenErr != nil:
		v.find(Finding{
			Kind: TokenInvalid, Sequence: x.Size,
			Detail:   fmt.Sprintf("the timestamp token of the checkpoint of size %d does not hold: %v", x.Size, x.tokenErr),
			DetailZH: fmt.Sprintf("规模为 %d 的检查点的时间戳无效：%v", x.Size, x.tokenErr),
		})
	default:
		r.TokensChecked++
	}
	r.Tokens++
}

// loadTokens names tokens whose checkpoint is gone: the last checkpoint has no later one that would name it.
func (v *verifier) loadTokens() error {
	var orphans []uint64
	has := func(size uint64) bool {
		_, ok := slices.BinarySearchFunc(v.sizes, size, cmp.Compare[uint64])
		return ok
	}
	err := v.store.Tokens(v.ctx, func(size uint64) error {
		if !has(size) && (len(v.sizes) == 0 || size <= v.sizes[len(v.sizes)-1]) {
			orphans = append(orphans, size)
			return nil
		}
		if has(size) {
			return nil
		}
		// It may have come with a checkpoint that was signed since they were read.
		found := false
		err := v.store.Checkpoints(v.ctx, size, func(c StoredCheckpoint) error { found = c.Size == size; return errStop })
		if err != nil && !errors.Is(err, errStop) {
			return err
		}
		if !found {
			orphans = append(orphans, size)
		}
		return nil
	})
	for _, size := range orphans {
		v.find(Finding{
			Kind: CheckpointRemoved, Sequence: size,
			Detail:   fmt.Sprintf("there is a timestamp token for a checkpoint of size %d, and the checkpoint is gone", size),
			DetailZH: fmt.Sprintf("存有规模为 %d 的检查点的时间戳，而该检查点已被删除", size),
		})
	}
	if err != nil && !errors.Is(err, ErrCorrupt) {
		return err
	}
	return nil
}

func (v *verifier) signed(c *Checkpoint) error {
	if len(v.keys) == 0 {
		return nil
	}
	var first error
	for _, k := range v.keys {
		err := VerifyCheckpoint(k, c)
		if err == nil {
			return nil
		}
		if first == nil {
			first = err
		}
	}
	return first
}

func (v *verifier) segment(i int, segs []Segment, total uint64) error {
	s := v.seg
	switch {
	case (i == 0 && s.Number != 1) || i > 0 && s.Number != segs[i-1].Number+1:
		want := 1
		v.prior = nil
		if i > 0 {
			want = segs[i-1].Number + 1
		}
		v.find(Finding{
			Kind: SegmentMissing, Segment: want, Sequence: v.next, Through: max(s.First, 1) - 1,
			Detail:   fmt.Sprintf("segments %d to %d are gone, entries %d to %d with them", want, s.Number-1, v.next, max(s.First, 1)-1),
			DetailZH: fmt.Sprintf("第 %d 至 %d 段缺失，其中为第 %d 至 %d 条记录", want, s.Number-1, v.next, max(s.First, 1)-1),
		})
	case s.Seal == nil && i+1 < len(segs):
		v.find(Finding{
			Kind: SegmentMissing, Sequence: s.First, Detail: "the segment is not sealed and not the last",
			DetailZH: "该段未封存，却不是最后一段",
		})
	}
	changes, err := v.store.SchemaChanges(v.ctx, s.Number)
	if err != nil && s.Err == nil && !errors.Is(err, ErrCorrupt) {
		return err
	}
	for _, c := range changes {
		v.find(Finding{
			Kind: SchemaChanged, Sequence: s.First, Through: s.First + max(s.Count, 1) - 1,
			Detail:   fmt.Sprintf("the schema of segment %d is not the one that was made: %s", s.Number, c),
			DetailZH: fmt.Sprintf("第 %d 段的库结构被改动：%s", s.Number, c),
		})
	}
	if s.Err != nil {
		v.find(Finding{
			Kind: SegmentUnreadable, Sequence: v.next, Detail: s.Err.Error(), DetailZH: "该段无法读取：" + s.Err.Error(),
		})
		if s.Seal == nil && i+1 == len(segs) {
			return nil
		}
	}
	if s.First > v.next {
		v.skip(s.First)
	}
	if s.Err != nil {
		v.prior = nil
		if i+1 < len(segs) {
			v.skip(segs[i+1].First)
		}
		return nil
	}
	v.sum, v.nodes, v.checked, v.stored = sm3.New(), 0, map[Hash]bool{}, nil
	v.own, _ = newFrontier(0, nil) // an empty range is never refused
	begin := v.next
	end := uint64(math.MaxInt64)
	switch {
	case i+1 < len(segs) && segs[i+1].Number == s.Number+1 && segs[i+1].Err == nil:
		end = segs[i+1].First
	case s.Seal != nil:
		end = s.Seal.Last + 1
	}
	err = v.rows(end, total)
	if errors.Is(err, errEnd) {
		err = nil
	}
	if errors.Is(err, ErrCorrupt) {
		v.find(Finding{
			Kind: SegmentUnreadable, Sequence: v.next, Detail: err.Error(), DetailZH: "该段无法读取：" + err.Error(),
		})
		err = nil
	}
	if err != nil {
		return err
	}
	if end != math.MaxInt64 && v.next < end {
		v.removed(v.next, end-1)
		v.skip(end)
	}
	stored, err := v.store.NodeCount(v.ctx, s.Number)
	grew := false
	if s.Seal == nil && err == nil && stored > v.nodes { // more nodes than at the beginning: is it still being written?
		now, err := v.store.Segments(v.ctx)
		if err != nil {
			return err
		}
		grew = slices.ContainsFunc(now, func(n Segment) bool { return n.Number == s.Number && n.Count > s.Count })
	}
	if err == nil && stored > v.nodes && !grew {
		v.find(Finding{
			Kind: NodesWithoutEntry, Sequence: v.next,
			Detail:   fmt.Sprintf("%d stored nodes belong to entries that are not there; entries were removed after number %d", stored-v.nodes, int64(v.next)-1),
			DetailZH: fmt.Sprintf("有 %d 个树节点没有对应记录：第 %d 条之后的记录曾被删除", stored-v.nodes, int64(v.next)-1),
		})
	} else if err != nil && !errors.Is(err, ErrCorrupt) {
		return err
	}
	if err := v.strayPayloads(); err != nil {
		return err
	}
	v.prior = nil
	if v.own.size() > 0 {
		v.prior = &Seal{
			Segment: s.Number, First: begin, Last: v.next - 1, Count: v.own.size(), Root: v.own.root(),
			Leaves: Hash(v.sum.Sum(nil)),
		}
		if s.Seal != nil && *s.Seal != *v.prior {
			v.find(Finding{
				Kind: SealWrong, Sequence: begin, Through: v.next - 1,
				Detail:   fmt.Sprintf("the segment is not what its seal says (%d entries from %d)", s.Seal.Count, s.Seal.First),
				DetailZH: fmt.Sprintf("该段内容与其封存摘要不符（封存时为自第 %d 条起共 %d 条）", s.Seal.First, s.Seal.Count),
			})
		}
		if s.Seal != nil {
			v.prior = s.Seal
		}
	}
	return nil
}

// strayPayloads names payloads that stand in the segment and that none of its entries has. Those of an entry are
// written with it, so there are no others. Of each digest eight bytes are compared: whoever finds another payload with
// them has added one that nothing refers to.
func (v *verifier) strayPayloads() error {
	slices.Sort(v.stored)
	var stray int
	var one Hash
	err := v.store.Blobs(v.ctx, v.seg.Number, func(sum Hash) error {
		if _, ok := slices.BinarySearch(v.stored, binary.BigEndian.Uint64(sum[:])); !ok {
			stray, one = stray+1, sum
		}
		return nil
	})
	if err != nil && !errors.Is(err, ErrCorrupt) {
		return err
	}
	if stray > 0 && v.seg.Seal == nil {
		now, err := v.store.Segments(v.ctx)
		if err != nil {
			return err
		}
		if slices.ContainsFunc(now, func(n Segment) bool { return n.Number == v.seg.Number && n.Count > v.seg.Count }) {
			v.report.Remarks = append(v.report.Remarks, "the last segment was being written: payloads without an entry were not looked for in it")
			return nil
		}
	}
	if stray > 0 {
		v.find(Finding{
			Kind: PayloadAdded, Sequence: v.seg.First, Through: max(v.next, v.seg.First+1) - 1,
			Detail:   fmt.Sprintf("%d payloads are stored that no entry of segment %d has (one under SM3 %s): they were added, or their entries were removed or changed", stray, v.seg.Number, one),
			DetailZH: fmt.Sprintf("第 %d 段存有 %d 个附件未被任何记录引用（其一登记的 SM3 为 %s）：是后来加入的，或其记录被删除、改动", v.seg.Number, stray, one),
		})
	}
	return nil
}

func (v *verifier) removed(from, through uint64) {
	v.find(Finding{
		Kind: EntryRemoved, Sequence: from, Through: through,
		Detail:   fmt.Sprintf("entries %d to %d are gone", from, through),
		DetailZH: fmt.Sprintf("第 %d 至 %d 条记录已被删除", from, through),
	})
}

// skip goes on as if the entries up to to had been there, unknown.
func (v *verifier) skip(to uint64) {
	for v.next < to {
		v.grow(nil, nil)
	}
	v.settle(nil)
	v.chain = nil
}

// row takes the next row of a segment.
func (v *verifier) row(r *examined, end, total uint64) error {
	if r.Sequence < 0 || uint64(r.Sequence) < v.next || uint64(r.Sequence) >= end {
		v.find(Finding{
			Kind: EntryAdded, Sequence: uint64(max(r.Sequence, 0)), Ref: hex.EncodeToString(r.Ref),
			Detail:   fmt.Sprintf("a row with number %d stands outside its segment", r.Sequence),
			DetailZH: fmt.Sprintf("编号为 %d 的行不属于该段，是后来加入的", r.Sequence),
		})
		return nil
	}
	seq := uint64(r.Sequence)
	if seq >= total {
		return errEnd // written since the verifier began
	}
	if seq > v.next {
		if seq-v.next > 1<<24 { // a number from nowhere: nothing to walk through
			v.find(Finding{
				Kind: EntryAdded, Sequence: seq, Ref: hex.EncodeToString(r.Ref),
				Detail:   fmt.Sprintf("a row with number %d stands far behind the last entry, %d", seq, int64(v.next)-1),
				DetailZH: fmt.Sprintf("编号为 %d 的行远在最后一条记录（第 %d 条）之后，是后来加入的", seq, int64(v.next)-1),
			})
			return nil
		}
		v.removed(v.next, seq-1)
		v.skip(seq)
	}
	if v.opt.Progress != nil && seq%4096 == 0 {
		v.opt.Progress(seq, total)
	}

	// 1. The entry itself.
	e, parseErr, computed := r.entry, r.parseErr, r.computed
	ref := r.Ref
	if parseErr == nil {
		ref = e.Ref
	}
	v.refs = [2][]byte{v.refs[1], ref}
	moved := parseErr == nil && e.Sequence != seq
	find := func(kind FindingKind, detail, detailZH string) {
		v.find(Finding{Kind: kind, Sequence: seq, Ref: hex.EncodeToString(ref), Detail: detail, DetailZH: detailZH})
	}

	// 2. Entry, leaf and chain. If entry and leaf differ, the chain says which of them was written. If they agree and
	// the chain does not lead to them, the next row tells: its chain continues either the stored hash (then entry and
	// leaf were changed together) or the computed one (then only the chain hash was).
	var stored, chain Hash
	wellFormed := len(r.Leaf) == len(stored) && len(r.Chain) == len(chain)
	if wellFormed {
		stored, chain = Hash(r.Leaf), Hash(r.Chain)
	}
	follows := func(before *Hash, leaf Hash) bool {
		switch {
		case before == nil:
			return false
		case r.linked && *before == r.before && leaf == stored:
			return r.link == chain
		}
		return ChainHash(*before, leaf) == chain
	}
	v.settle(func(before *Hash) bool { return follows(before, stored) || follows(before, computed) })
	leaf := &stored // what the tree is checked with; nil: the one that was written is not known
	suspect := false
	switch {
	case moved:
		find(EntryReordered, fmt.Sprintf("row %d holds entry %d", seq, e.Sequence),
			fmt.Sprintf("第 %d 行存放的是第 %d 条记录，次序被改动", seq, e.Sequence))
		leaf = nil
	case computed != stored && follows(v.chain, computed):
		leaf = &computed
		find(LeafChanged, fmt.Sprintf("the leaf hash stored for entry %d was changed; the entry is as it was written", seq),
			fmt.Sprintf("第 %d 条记录的叶哈希被改动，记录本身未变", seq))
	case computed != stored:
		find(EntryChanged, fmt.Sprintf("entry %d was changed: it hashes to %s, recorded is %s", seq, computed, stored),
			fmt.Sprintf("第 %d 条记录被改动：现哈希为 %s，登记的为 %s", seq, computed, stored))
		if !follows(v.chain, stored) {
			leaf = nil
		}
	case parseErr != nil:
		find(EntryChanged, fmt.Sprintf("entry %d is not in the journal's format: %v", seq, parseErr),
			fmt.Sprintf("第 %d 条记录不符合日志格式：%v", seq, parseErr))
		leaf = nil
	default:
		suspect = v.chain != nil && !follows(v.chain, stored)
	}

	// 3. The tree above it.
	noNode := false
	nodeFits, err := v.grow(leaf, func(id NodeID, missing bool) int {
		low, high := id.Index<<id.Level, id.Last()
		if id.Level == 1 {
			noNode = missing
			if suspect || v.named != nil && *v.named >= low && *v.named <= high {
				return -1 // it does not fit because of an entry that is named
			}
		}
		f := Finding{Sequence: low, Through: high}
		if missing {
			f.Kind = NodeMissing
			f.Detail = fmt.Sprintf("the node above entries %d to %d is gone", low, high)
			f.DetailZH = fmt.Sprintf("第 %d 至 %d 条记录之上的树节点缺失", low, high)
			return v.find(f)
		}
		f.Kind = NodeChanged
		f.Detail = fmt.Sprintf("the node above entries %d to %d does not follow from what is below it: it was changed, or one of them together with its hashes", low, high)
		f.DetailZH = fmt.Sprintf("第 %d 至 %d 条记录之上的树节点与其下内容不符：节点被改动，或其中有记录连同其哈希被改动", low, high)
		i := v.find(f)
		if id.Level == 1 {
			v.open = i
		}
		return i
	})
	if err != nil {
		return err
	}
	v.suspect = nil
	if suspect {
		want := ChainHash(*v.chain, stored)
		v.suspect = &suspicion{
			seq: seq, computed: want, inTree: nodeFits && seq&1 == 1, noNode: noNode, segment: v.seg.Number,
			refs: [2]string{hex.EncodeToString(v.refs[0]), hex.EncodeToString(v.refs[1])},
		}
	}
	v.chain = nil
	if wellFormed && leaf != nil {
		v.chain = &chain
	}
	v.sum.Write(stored[:])
	v.leaves = append(v.leaves, stored)

	// 4. What the entry says.
	if parseErr == nil {
		for _, p := range e.Payloads {
			if !slices.ContainsFunc(r.own, func(b ownPayload) bool { return b.Sum == p.SM3 }) {
				v.stored = append(v.stored, binary.BigEndian.Uint64(p.SM3[:]))
			}
		}
	}
	if parseErr == nil && !moved {
		if err := v.content(r); err != nil {
			return err
		}
	}
	if parseErr == nil && (e.Time.State == ntp.Trusted || e.Time.State == ntp.Holdover) {
		if !v.uncovered {
			v.uncovered, v.firstAt = true, e.Time.Micros
		}
		v.lastAt = e.Time.Micros
	}
	if err := v.sealAt(); err != nil {
		return err
	}
	return v.compare()
}

// A suspicion is an entry that agrees with its leaf hash, and to which the chain does not lead.
type suspicion struct {
	seq      uint64
	segment  int
	computed Hash      // the chain hash that the row should have
	inTree   bool      // the node above it fits
	noNode   bool      // there is no node above it
	refs     [2]string // of the entry before and of this one, hexadecimal
}

// pair is what is to be named when entry seq, or the one before it under the same node, was changed: the chain breaks
// between them either way. A signed root that ends in the one before clears that one.
func (v *verifier) pair(f *Finding, seq uint64, refs [2]string) {
	f.Sequence, f.Through, f.Ref = seq, seq, refs[1]
	if seq&1 == 1 && (v.proved == nil || *v.proved != seq-1) {
		f.Sequence, f.Ref = seq-1, ""
	}
}

// blame turns the finding about a node into one about the entries below it: what was built on the node, in the tree or
// in a signed root, contains the node as it is stored.
func (v *verifier) blame(i int) {
	if i < 0 || v.report.Findings[i].Kind != NodeChanged {
		return
	}
	f := &v.report.Findings[i]
	v.before[i] = *f
	f.Kind = EntryChanged
	low, high := f.Sequence, f.Through
	if high == low+1 {
		v.pair(f, high, [2]string{"", f.Ref})
	}
	if f.Sequence == f.Through {
		f.Detail = fmt.Sprintf("entry %d was changed together with its leaf and chain hashes: the node above it, made when it was written, does not follow from it", f.Sequence)
		f.DetailZH = fmt.Sprintf("第 %d 条记录连同其叶哈希、链哈希被改动：写入时生成的上层树节点与其不符", f.Sequence)
		return
	}
	f.Ref = ""
	f.Detail = fmt.Sprintf("of entries %d to %d at least one was changed together with its leaf and chain hashes: the node above them, made when they were written, does not follow from them", low, high)
	f.DetailZH = fmt.Sprintf("第 %d 至 %d 条记录中至少有一条连同其叶哈希、链哈希被改动：写入时生成的上层树节点与其不符", low, high)
}

// clear says that it was the node that was changed, and nothing below it.
func (v *verifier) clear(i int) {
	if i < 0 {
		return
	}
	if f, ok := v.before[i]; ok {
		v.report.Findings[i] = f
	}
	if v.open == i {
		v.open = -1
	}
}

// settle names the suspected entry before this row. continues says whether this row's chain follows from a hash; nil
// when there is no further row.
func (v *verifier) settle(continues func(*Hash) bool) {
	s := v.suspect
	v.suspect, v.named = nil, nil
	if s == nil {
		return
	}
	f := Finding{Segment: s.segment, Sequence: s.seq, Ref: s.refs[1]}
	recomputed := continues != nil && continues(&s.computed)
	switch {
	case v.open >= 0 && !recomputed:
		// The chain leads up to here from an entry that does not fit its node: it was changed, the chain computed again
		// as far as this, and this entry is as it was.
		v.blame(v.open)
		v.open = -1
		return
	case continues == nil && !s.inTree && s.seq&1 == 1 && !s.noNode:
		f.Kind = EntryChanged
		v.pair(&f, s.seq, s.refs)
		changedWithLeaf(&f)
	case continues == nil && !s.inTree:
		f.Kind = EntryAdded
		f.Detail = fmt.Sprintf("entry %d at the end does not follow from the ones before: it was added, or changed together with its leaf hash", s.seq)
		f.DetailZH = fmt.Sprintf("末尾第 %d 条记录与之前的不衔接：是后来加入的，或连同叶哈希被改动", s.seq)
	case continues == nil, recomputed, s.inTree:
		f.Kind = ChainChanged
		f.Detail = fmt.Sprintf("the chain hash of entry %d was changed; the entry is as it was written", s.seq)
		f.DetailZH = fmt.Sprintf("第 %d 条记录的链哈希被改动，记录本身未变", s.seq)
		if recomputed {
			v.chain = &s.computed
		}
	default:
		f.Kind = EntryChanged
		v.pair(&f, s.seq, s.refs)
		changedWithLeaf(&f)
		v.named = &s.seq
	}
	v.find(f)
}

func changedWithLeaf(f *Finding) {
	if f.Sequence == f.Through {
		f.Detail = fmt.Sprintf("entry %d was changed together with its leaf hash: the chain does not lead to it", f.Sequence)
		f.DetailZH = fmt.Sprintf("第 %d 条记录连同其叶哈希被改动：链哈希与之不符", f.Sequence)
		return
	}
	f.Detail = fmt.Sprintf("entry %d was changed together with its leaf and chain hashes, or entry %d with its leaf hash: the chain breaks between them, and the node above them does not fit", f.Sequence, f.Through)
	f.DetailZH = fmt.Sprintf("第 %d 条记录连同其叶哈希、链哈希被改动，或第 %d 条记录连同其叶哈希被改动：链在两者之间断开，其上的树节点也不符", f.Sequence, f.Through)
}

// content checks the columns, the node, the epoch, the number of the change of state, the seal, and the payloads.
func (v *verifier) content(r *examined) error {
	e, own := r.entry, r.own
	found := func() Finding { return Finding{Sequence: e.Sequence, Ref: hex.EncodeToString(e.Ref)} }
	_, isChange := e.Change()
	for _, c := range [...]struct {
		name string
		same bool
	}{{"kind", r.Kind == e.Kind}, {"ref", bytes.Equal(r.Ref, e.Ref)}, {"change", r.Change == isChange}} {
		if !c.same {
			f := found()
			f.Kind, f.Detail = ColumnChanged, fmt.Sprintf("column %s of row %d says something else than its entry", c.name, e.Sequence)
			f.DetailZH = fmt.Sprintf("第 %d 行的 %s 列与记录内容不符", e.Sequence, c.name)
			v.find(f)
		}
	}
	if v.node == "" {
		v.node = e.Node
		v.report.Node = e.Node
	}
	if e.Node != v.node {
		f := found()
		f.Kind, f.Detail = WrongNode, fmt.Sprintf("entry %d is of node %q, the journal of %q", e.Sequence, e.Node, v.node)
		f.DetailZH = fmt.Sprintf("第 %d 条记录属于节点 %q，而日志属于 %q", e.Sequence, e.Node, v.node)
		v.find(f)
	}
	if v.epoch == nil || *v.epoch != e.Epoch {
		if e.Kind != KindEpoch || v.epochs[e.Epoch] || e.Object != e.Epoch.String() {
			f := found()
			f.Kind, f.Detail = EpochWrong, fmt.Sprintf("epoch %s begins at entry %d without being announced, or for the second time", e.Epoch, e.Sequence)
			f.DetailZH = fmt.Sprintf("纪元 %s 自第 %d 条起使用，却未经宣告或曾经用过", e.Epoch, e.Sequence)
			v.find(f)
		}
		v.epochs[e.Epoch] = true
		v.epoch = &e.Epoch
		v.report.Epochs = append(v.report.Epochs, e.Epoch.String())
	}
	if n, ok := e.Change(); ok {
		if n != v.changes {
			f := found()
			f.Kind, f.Detail = ChangeOutOfOrder, fmt.Sprintf("entry %d is change of state %d, expected is %d", e.Sequence, n, v.changes)
			f.DetailZH = fmt.Sprintf("第 %d 条记录是第 %d 次状态变更，应为第 %d 次", e.Sequence, n, v.changes)
			v.find(f)
		}
		v.changes = n + 1
	}
	// The seal of the segment before stands first, or behind the announcement of an epoch.
	place := v.seg.First
	if e.Sequence == v.seg.First {
		v.announced = e.Kind == KindEpoch
	}
	if v.announced {
		place++
	}
	if e.Sequence == place && v.seg.Number > 1 && v.prior != nil && v.prior.Segment == v.seg.Number-1 {
		seal, err := sealIn(e)
		if e.Kind != KindSealed || err != nil || seal != *v.prior {
			f := found()
			f.Kind, f.Detail = SealWrong, fmt.Sprintf("entry %d does not hold the seal of segment %d", e.Sequence, v.prior.Segment)
			f.DetailZH = fmt.Sprintf("第 %d 条记录所载的第 %d 段封存摘要不符", e.Sequence, v.prior.Segment)
			v.find(f)
		}
	}
	if r.ownErr != nil {
		f := found()
		f.Kind, f.Detail = PayloadChanged, fmt.Sprintf("the payloads in the row of entry %d were changed: %v", e.Sequence, r.ownErr)
		f.DetailZH = fmt.Sprintf("第 %d 条记录行内所存的附件被改动：%v", e.Sequence, r.ownErr)
		v.find(f)
	}
	for _, p := range e.Payloads {
		v.report.Payloads++
		var good bool
		var err error
		i := slices.IndexFunc(own, func(b ownPayload) bool { return b.Sum == p.SM3 })
		switch {
		case i >= 0:
			good = own[i].computed == p.SM3 && int64(len(own[i].Data)) == p.Size
			own = slices.Delete(own, i, i+1)
		case v.checked[p.SM3]:
			continue
		default:
			var data []byte
			data, err = v.store.Blob(v.ctx, v.seg.Number, p.SM3)
			good = err == nil && Sum(data) == p.SM3 && int64(len(data)) == p.Size
		}
		switch {
		case good:
			if i < 0 && len(v.checked) < 1<<16 {
				v.checked[p.SM3] = true
			}
		case errors.Is(err, ErrNotFound) && r.ownErr != nil: // named above
		case errors.Is(err, ErrNotFound):
			f := found()
			f.Kind, f.Detail = PayloadMissing, fmt.Sprintf("payload %q of entry %d is gone (SM3 %s)", p.Name, e.Sequence, p.SM3)
			f.DetailZH = fmt.Sprintf("第 %d 条记录的附件 %q 缺失（SM3 %s）", e.Sequence, p.Name, p.SM3)
			v.find(f)
		case err != nil && !errors.Is(err, ErrCorrupt):
			return err
		default:
			f := found()
			f.Kind, f.Detail = PayloadChanged, fmt.Sprintf("payload %q of entry %d was changed (recorded SM3 %s)", p.Name, e.Sequence, p.SM3)
			f.DetailZH = fmt.Sprintf("第 %d 条记录的附件 %q 被改动（登记的 SM3 为 %s）", e.Sequence, p.Name, p.SM3)
			v.find(f)
		}
	}
	if len(own) > 0 {
		f := found()
		f.Kind, f.Detail = PayloadAdded, fmt.Sprintf("beside entry %d is kept what it does not have as a payload (SM3 %s)", e.Sequence, own[0].Sum)
		f.DetailZH = fmt.Sprintf("第 %d 条记录旁存有并非其附件的内容（登记的 SM3 为 %s）", e.Sequence, own[0].Sum)
		v.find(f)
	}
	return nil
}

// A value is the hash of a node: the stored one, and the computed one where it differs. Which of the two was written
// is known only further up.
type value struct {
	known    bool
	stored   Hash
	computed *Hash
	finding  int // what says that they differ; -1: nothing does
}

// settled takes what was built on the node for a verdict: it contains the stored hash or the computed one.
func (v *verifier) settled(x value, h Hash) {
	if x.computed == nil {
		return
	}
	if h == x.stored {
		v.blame(x.finding)
	} else {
		v.clear(x.finding)
	}
}

func (v value) either() []Hash {
	if v.computed == nil {
		return []Hash{v.stored}
	}
	return []Hash{v.stored, *v.computed}
}

// grow appends a leaf, nil if it is not known, and checks each stored node that the leaf completes. It answers whether
// the lowest of them fits. A node that does not fit is reported once: what is above it may follow from the stored hash
// or from the computed one.
func (v *verifier) grow(leaf *Hash, bad func(id NodeID, missing bool) int) (bool, error) {
	fits := true
	var cur value
	if leaf != nil {
		cur = value{known: true, stored: *leaf}
	}
	level := uint8(0)
	for i := v.next; i&1 == 1; i >>= 1 {
		level++
		id := NodeID{Level: level, Index: v.next >> level}
		left, right := v.pending[level-1], cur
		v.pending[level-1] = value{}
		n, err := v.storedNode(id)
		if err != nil {
			return false, err
		}
		if n.there {
			v.nodes++
		}
		var want *Hash
		same := false
		switch {
		case !left.known || !right.known:
		case n.there && n.fits && left.computed == nil && right.computed == nil && left.stored == n.left && right.stored == n.right:
			same = true // as it nearly always is; want is not asked for then
		default:
			for _, l := range left.either() {
				for _, r := range right.either() {
					h := NodeHash(l, r)
					if want == nil {
						want = &h
					}
					if n.there && !same && h == n.stored {
						same = true
						v.settled(left, l)
						v.settled(right, r)
					}
				}
			}
		}
		finding := -1
		if bad != nil && (!n.there || want != nil && !same) {
			fits = fits && level != 1
			finding = bad(id, !n.there)
		}
		switch {
		case !n.there && want == nil:
			cur = value{}
		case !n.there:
			cur = value{known: true, stored: *want}
		case want == nil || same:
			cur = value{known: true, stored: n.stored}
		default:
			cur = value{known: true, stored: n.stored, computed: want, finding: finding}
		}
	}
	v.pending[level] = cur
	v.next++
	return fits, nil
}

// roots are the roots at the present size that the stored and the computed hashes give, the stored ones' first; none
// if a part is not known.
func (v *verifier) roots() []Hash {
	var roots []Hash
	for level := range bits.Len64(v.next) {
		if v.next>>level&1 == 0 {
			continue
		}
		h := v.pending[level]
		if !h.known {
			return nil
		}
		if roots == nil {
			roots = h.either()
			continue
		}
		var next []Hash
		for _, left := range h.either() {
			for _, right := range roots {
				if len(next) < 16 { // more damages than that at one edge are named anyway
					next = append(next, NodeHash(left, right))
				}
			}
		}
		roots = next
	}
	if roots == nil {
		return []Hash{EmptyRoot()}
	}
	return roots
}

// compare holds the present root against the checkpoints of this size.
func (v *verifier) compare() error {
	for len(v.points) > 0 && v.points[0].size <= v.next {
		c := v.points[0]
		v.points = v.points[1:]
		if c.size < v.next {
			continue // inside a gap; the gap is named
		}
		roots := v.roots()
		known, fits := len(roots) > 0, slices.Contains(roots, c.root)
		if fits && roots[0] == c.root { // the stored nodes are in it
			for level := range bits.Len64(v.next) {
				if x := v.pending[level]; v.next>>level&1 == 1 && x.known {
					v.settled(x, x.stored)
				}
			}
			if c.size&1 == 1 {
				last := c.size - 1
				v.proved = &last
			}
		}
		node := v.node == "" || c.node == v.node
		if !node {
			v.find(Finding{
				Kind: WrongNode, Sequence: c.size, Detail: fmt.Sprintf("the checkpoint of size %d is of node %q", c.size, c.node),
				DetailZH: fmt.Sprintf("规模为 %d 的检查点属于节点 %q", c.size, c.node),
			})
			continue
		}
		switch {
		case fits && (v.epoch == nil || *v.epoch == c.epoch) && v.changes == c.changes:
			v.goodSize, v.goodAt = c.size, c.micros
			v.uncovered = false
		case fits && v.changes != c.changes:
			v.find(Finding{
				Kind: ChangeOutOfOrder, Sequence: c.size,
				Detail:   fmt.Sprintf("the checkpoint of size %d counts %d changes of state, there are %d", c.size, c.changes, v.changes),
				DetailZH: fmt.Sprintf("规模为 %d 的检查点记有 %d 次状态变更，实有 %d 次", c.size, c.changes, v.changes),
			})
			v.goodSize, v.goodAt = c.size, c.micros
			v.uncovered = false
		case fits:
			v.find(Finding{
				Kind: EpochWrong, Sequence: c.size, Detail: fmt.Sprintf("the checkpoint of size %d is of epoch %s", c.size, c.epoch),
				DetailZH: fmt.Sprintf("规模为 %d 的检查点属于纪元 %s", c.size, c.epoch),
			})
		case v.suspect != nil && v.suspect.seq+1 == c.size && c.size&1 == 1:
			// The root contains the suspected leaf itself, with no stored node over it: the entry will be named.
		case known && !v.firstBad:
			v.firstBad = true
			v.find(Finding{
				Kind: HistoryRewritten, Sequence: v.goodSize, Through: c.size - 1,
				Detail: fmt.Sprintf("the signed root of the first %d entries differs from that of the stored ones, that of the first %d fits: something in entries %d to %d was changed, added or removed and all hashes computed again",
					c.size, v.goodSize, v.goodSize, c.size-1),
				DetailZH: fmt.Sprintf("前 %d 条记录的签名根与现存内容不符，而前 %d 条相符：第 %d 至 %d 条中有记录被改动、增加或删除，且所有哈希被重算",
					c.size, v.goodSize, v.goodSize, c.size-1),
			})
		}
	}
	return nil
}

func (v *verifier) finish() {
	r := v.report
	r.Entries = v.next
	if roots := v.roots(); len(roots) > 0 {
		r.Root = roots[0].String()
	}
	for _, c := range v.points { // larger than the journal
		known := slices.ContainsFunc(v.opt.Known, func(k Checkpoint) bool { return k.Size == c.size && Sum(k.Note) == c.note })
		f := Finding{Kind: Truncated, Sequence: v.next, Through: c.size - 1}
		f.Detail = fmt.Sprintf("a signed checkpoint covers %d entries, the journal has %d: entries from %d on were cut off", c.size, v.next, v.next)
		f.DetailZH = fmt.Sprintf("有签名检查点覆盖 %d 条记录，日志只有 %d 条：第 %d 条起被截去", c.size, v.next, v.next)
		if known {
			f.Kind = RolledBack
			f.Detail = fmt.Sprintf("a checkpoint known from elsewhere covers %d entries, the journal has %d: it was put back to an earlier state", c.size, v.next)
			f.DetailZH = fmt.Sprintf("外部持有的检查点覆盖 %d 条记录，日志只有 %d 条：日志被换回了较早的状态", c.size, v.next)
		}
		v.find(f)
		break // the smallest says enough; the others follow from it
	}
	if v.next == 0 {
		v.find(Finding{
			Kind: Empty, Detail: "no entries: a journal begins with the entry of its first epoch, so this one was emptied, or it is another folder",
			DetailZH: "没有条目：日志一经启用即有首条记录，故此日志已被清空，或所给目录有误",
		})
	}
	r.CoveredTo = v.goodSize
	r.Uncovered = v.next - min(v.next, v.goodSize)
	r.Covered = v.next > 0 && r.Uncovered == 0
	if v.uncovered {
		r.UncoveredMicros = v.lastAt - v.firstAt
	}
	if r.Uncovered > 0 {
		signed := "no checkpoint fits"
		if r.CoveredTo > 0 {
			signed = fmt.Sprintf("the last one that fits covers %d and was signed at %s", r.CoveredTo, utc(v.goodAt))
		}
		r.Remarks = append(r.Remarks, fmt.Sprintf("entries %d to %d are under no checkpoint (%s): only the chain protects them, which whoever can write the files can compute again, so that they may be forged, or a checkpoint over them removed", r.CoveredTo, v.next-1, signed))
	}
	if r.UncoveredMicros > expectedCheckpoint {
		r.Remarks = append(r.Remarks, fmt.Sprintf("these entries are from %s to %s, longer than a checkpoint takes: signing failed then, or checkpoints were removed at the end, or entries were added", utc(v.firstAt), utc(v.lastAt)))
	}
	if v.uncovered && r.CoveredTo > 0 && v.firstAt < v.goodAt-expectedCheckpoint {
		r.Remarks = append(r.Remarks, fmt.Sprintf("the first of these entries says %s, which is before the last checkpoint: its time was set back, or it was added", utc(v.firstAt)))
	}
	if !r.SignaturesChecked {
		r.Remarks = append(r.Remarks, "no key of the log was given: the signatures of the checkpoints were not checked")
	}
	if r.WithoutToken > 0 {
		r.Remarks = append(r.Remarks, fmt.Sprintf("%d checkpoints have no timestamp token, the first of size %d, the last of size %d: they followed each other faster than the unit stamps, it did not answer or the appliance was stopped, or tokens were removed", r.WithoutToken, v.bareFirst, v.bareLast))
	}
	if v.opt.CheckToken == nil && r.Tokens > 0 {
		r.Remarks = append(r.Remarks, fmt.Sprintf("the timestamp tokens of %d checkpoints were not checked", r.Tokens))
	}
	if len(v.opt.Known) == 0 {
		r.Remarks = append(r.Remarks, "no checkpoint from elsewhere was given: that the whole journal was put back to an earlier state cannot be seen")
	}
}

func utc(micros int64) string { return time.UnixMicro(micros).UTC().Format(time.RFC3339) }

package audit

import (
	"context"
	"errors"
	"math"
	"math/bits"
	"sync"
	"sync/atomic"

	"github.com/transparency-dev/merkle/compact"
)

// The part of a verification that needs no row but its own: reading entries apart, and nearly all hashing. Several
// goroutines may do it; what it comes to is judged in the order of the rows.

// An examined row is a row with what can be said of it without the rows before.
type examined struct {
	Row
	entry    *Entry // if parseErr is nil
	parseErr error
	computed Hash // of the entry
	own      []ownPayload
	ownErr   error
	// link is the chain hash that follows from the stored one before, if linked.
	linked       bool
	before, link Hash
}

// An ownPayload is a payload in a row, with the digest that it has.
type ownPayload struct {
	Blob
	computed Hash
}

// A node is an inner node as it is stored, with what it was compared with.
type node struct {
	there       bool
	stored      Hash
	fits        bool // it follows from left and right
	left, right Hash // as they are stored below it
}

// A part is some rows of one segment.
type part struct {
	rows  []examined
	bytes int
	// nodes are those that entries first to end-1 completed, by level and from the left. Of others nothing is known here.
	first, end uint64
	nodes      [][]node
	own        *compact.Range // of the leaves in the segment's own tree; nil: not one after the other
	err        error
	done       chan struct{} // closed when it is examined
}

const (
	partRows  = 512
	partBytes = 1 << 20
)

// rows hands the segment's rows to [verifier.row].
func (v *verifier) rows(end, total uint64) error {
	ctx, cancel := context.WithCancel(v.ctx)
	defer cancel()
	if v.opt.Workers <= 0 {
		return v.parts(ctx, func(p *part) error {
			p.examine(ctx, v.store, v.seg.First, end)
			return v.judge(p, end, total)
		})
	}
	parts, work := make(chan *part, 2*v.opt.Workers), make(chan *part, 2*v.opt.Workers)
	var wg sync.WaitGroup
	for range v.opt.Workers {
		wg.Go(func() {
			for p := range work {
				p.examine(ctx, v.store, v.seg.First, end)
				close(p.done)
			}
		})
	}
	var readErr error
	wg.Go(func() {
		defer close(work)
		defer close(parts)
		readErr = v.parts(ctx, func(p *part) error {
			for _, c := range []chan<- *part{parts, work} {
				select {
				case c <- p:
				case <-ctx.Done():
					return ctx.Err()
				}
			}
			return nil
		})
	})
	defer wg.Wait()
	defer cancel()
	for p := range parts {
		select {
		case <-p.done:
		case <-ctx.Done():
			return ctx.Err()
		}
		if err := v.judge(p, end, total); err != nil {
			return err
		}
	}
	return readErr // written before parts was closed
}

// parts reads the segment and calls fn with its parts.
func (v *verifier) parts(ctx context.Context, fn func(*part) error) error {
	p := &part{done: make(chan struct{})}
	err := v.store.Rows(ctx, v.seg.Number, math.MinInt64, func(r Row) error {
		p.rows = append(p.rows, examined{Row: r})
		p.bytes += len(r.DER) + len(r.Own)
		if len(p.rows) < v.partRows && p.bytes < partBytes {
			return nil
		}
		full := p
		p = &part{done: make(chan struct{}), rows: make([]examined, 0, v.partRows)}
		return fn(full)
	})
	if len(p.rows) > 0 && (err == nil || errors.Is(err, ErrCorrupt)) { // what was read before the damage counts
		if ferr := fn(p); ferr != nil {
			return ferr
		}
	}
	return err
}

// judge takes a part's rows in turn.
func (v *verifier) judge(p *part, end, total uint64) error {
	if err := v.ctx.Err(); err != nil {
		return err
	}
	if p.err != nil {
		return p.err
	}
	v.part, v.leaves = p, v.leaves[:0]
	var err error
	for i := range p.rows {
		if err = v.row(&p.rows[i], end, total); err != nil {
			break
		}
	}
	if gerr := v.growOwn(p); gerr != nil {
		return gerr
	}
	return err
}

// growOwn adds what was taken of the part to the segment's own tree, as a whole if all of it was.
func (v *verifier) growOwn(p *part) error {
	if p.own != nil && len(v.leaves) == len(p.rows) && p.own.Begin() == v.own.size() {
		return v.own.r.AppendRange(p.own, nil)
	}
	for _, leaf := range v.leaves {
		if err := v.own.grow(leaf, nil); err != nil {
			return err
		}
	}
	return nil
}

// storedNode answers an inner node.
func (v *verifier) storedNode(id NodeID) (node, error) {
	if p := v.part; p != nil && id.Last() >= p.first && id.Last() < p.end {
		return *p.node(id), nil
	}
	nodes, err := v.store.Nodes(v.ctx, id)
	if err != nil && !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrNotFound) {
		return node{}, err
	}
	h, there := nodes[id]
	return node{there: there, stored: h}, nil
}

// node is that of the part with the id, which it has.
func (p *part) node(id NodeID) *node { return &p.nodes[id.Level][id.Index-p.first>>id.Level] }

// examine does the part's work. The segment has the numbers from segmentFirst to the one before segmentEnd.
func (p *part) examine(ctx context.Context, store Store, segmentFirst, segmentEnd uint64) {
	for i := range p.rows {
		x := &p.rows[i]
		x.entry, x.parseErr = readEntry(x.DER, true)
		x.computed = LeafHash(x.DER)
		own, err := ParseOwn(x.Own)
		x.ownErr = err
		if len(own) > 0 {
			x.own = make([]ownPayload, len(own))
		}
		for k, b := range own {
			x.own[k] = ownPayload{b, Sum(b.Data)}
		}
		if i == 0 || len(x.Leaf) != len(Hash{}) || len(x.Chain) != len(Hash{}) || len(p.rows[i-1].Chain) != len(Hash{}) {
			continue
		}
		x.before = Hash(p.rows[i-1].Chain)
		x.linked, x.link = true, ChainHash(x.before, Hash(x.Leaf))
	}
	n := uint64(len(p.rows))
	first, last := p.rows[0].Sequence, p.rows[n-1].Sequence
	if first < 0 || uint64(first) < segmentFirst || uint64(last) >= segmentEnd || uint64(last-first) != n-1 {
		return // somebody was here: one by one then
	}
	for i := range p.rows {
		if p.rows[i].Sequence != first+int64(i) || len(p.rows[i].Leaf) != len(Hash{}) {
			return
		}
	}
	p.first, p.end = uint64(first), uint64(last)+1
	for level := 0; level == 0 || p.first>>level < p.end>>level; level++ {
		p.nodes = append(p.nodes, make([]node, p.end>>level-p.first>>level))
	}
	for i := range p.rows {
		p.nodes[0][i] = node{there: true, stored: Hash(p.rows[i].Leaf)}
	}
	err := store.NodesOver(ctx, p.first, p.end, func(id NodeID, h Hash) { *p.node(id) = node{there: true, stored: h} })
	if errors.Is(err, ErrCorrupt) {
		p.first, p.end = 0, 0
		return // which of them can be read is found out one by one
	}
	if err != nil {
		p.err = err
		return
	}
	whole := true // every node over leaves of this part alone fits
	for level := 1; level < len(p.nodes); level++ {
		below := p.first >> (level - 1)
		for i := range p.nodes[level] {
			x := &p.nodes[level][i]
			left := 2 * (p.first>>level + uint64(i))
			if left < below {
				continue // the left one is of a part before
			}
			l, r := &p.nodes[level-1][left-below], &p.nodes[level-1][left-below+1]
			if x.there && l.there && r.there {
				x.left, x.right, x.fits = l.stored, r.stored, NodeHash(l.stored, r.stored) == x.stored
			}
			whole = whole && x.fits
		}
	}
	p.own = p.ownRange(segmentFirst, whole)
}

// ownRange is the range of the part's leaves in the segment's own tree, whose leaf 0 is number segmentFirst. What lies under
// nodes of both trees is not hashed again: those of levels up to the number of zeros at the end of segmentFirst, where all
// stored nodes were found to fit (whole).
func (p *part) ownRange(segmentFirst uint64, whole bool) *compact.Range {
	common := uint(0)
	if whole {
		common = uint(bits.TrailingZeros64(segmentFirst)) // 64 in the first segment
	}
	var hash func(level uint, index uint64) Hash
	hash = func(level uint, index uint64) Hash {
		if level <= common {
			return p.node(NodeID{Level: uint8(level), Index: index + segmentFirst>>level}).stored
		}
		return NodeHash(hash(level-1, 2*index), hash(level-1, 2*index+1))
	}
	first, end := p.first-segmentFirst, p.end-segmentFirst
	var hashes [][]byte
	for _, id := range compact.RangeNodes(first, end, nil) {
		h := hash(id.Level, id.Index)
		hashes = append(hashes, h[:])
	}
	own, err := ranges.NewRange(first, end, hashes)
	if err != nil {
		return nil
	}
	return own
}

// An examinedCheckpoint is a stored one with what can be said of it alone.
type examinedCheckpoint struct {
	StoredCheckpoint
	parsed   *Checkpoint // if err is nil
	err      error       // it does not parse, or its signature is not the log's
	tokenErr error       // Options.CheckToken's answer
}

// checkpointsAtOnce bounds what is in memory of checkpoints and their tokens.
const checkpointsAtOnce = 256

// examineCheckpoints checks signatures and tokens, each of which costs as much as some fifty entries.
func (v *verifier) examineCheckpoints(some []examinedCheckpoint) {
	var next atomic.Int64
	examine := func() {
		for i := next.Add(1) - 1; i < int64(len(some)); i = next.Add(1) - 1 {
			x := &some[i]
			if x.parsed, x.err = x.parse(); x.err == nil {
				x.err = v.signed(x.parsed)
			}
			if x.err == nil && v.opt.CheckToken != nil && len(x.Token) > 0 {
				x.tokenErr = v.opt.CheckToken(x.Signature, x.Token)
			}
		}
	}
	var wg sync.WaitGroup
	for range v.opt.Workers - 1 {
		wg.Go(examine)
	}
	examine()
	wg.Wait()
}

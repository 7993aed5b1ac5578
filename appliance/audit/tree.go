package audit

import (
	"encoding/hex"
	"errors"
	"fmt"
	"sync"

	"github.com/emmansun/gmsm/sm3"
	"github.com/transparency-dev/merkle/compact"
	"github.com/transparency-dev/merkle/proof"
)

// A Hash is an SM3 digest (GM/T 0004-2012).
type Hash [32]byte

// String is the digest as 64 lower-case hexadecimal digits.
func (h Hash) String() string { return hex.EncodeToString(h[:]) }

// Sum is SM3 of data.
func Sum(data []byte) Hash { return Hash(sm3.Sum(data)) }

// LeafHash is SM3(0x00 ‖ entry), RFC 6962 §2.1 with SM3 in the place of SHA-256.
func LeafHash(entryDER []byte) Hash {
	b := scratch.Get().(*[]byte)
	defer scratch.Put(b)
	*b = append(append((*b)[:0], 0), entryDER...)
	return Sum(*b) // in one call it needs no memory of its own
}

// NodeHash is SM3(0x01 ‖ left ‖ right).
func NodeHash(left, right Hash) Hash { return hashPair(1, left[:], right[:]) }

// hashPair is SM3(prefix ‖ a ‖ b) of two digests.
func hashPair(prefix byte, a, b []byte) Hash {
	var in [1 + 2*sm3.Size]byte
	in[0] = prefix
	copy(in[1:], a)
	copy(in[1+sm3.Size:], b)
	return Sum(in[:])
}

// scratch keeps buffers for bytes that are put together, hashed or compared, and thrown away.
var scratch = sync.Pool{New: func() any { return new([]byte) }}

// EmptyRoot is the root of a tree without leaves, SM3 of nothing.
func EmptyRoot() Hash { return Sum(nil) }

// ChainHash is SM3(0x02 ‖ previous ‖ leaf). The chain runs through all entries from 32 zero bytes. It proves nothing
// that the tree does not prove; it tells which one of two neighbours was changed together with its leaf hash.
func ChainHash(previous, leaf Hash) Hash { return hashPair(2, previous[:], leaf[:]) }

// hasher satisfies merkle.LogHasher.
type hasher struct{}

func (hasher) EmptyRoot() []byte { h := EmptyRoot(); return h[:] }
func (hasher) Size() int         { return sm3.Size }

func (hasher) HashLeaf(leaf []byte) []byte { h := LeafHash(leaf); return h[:] }

func (hasher) HashChildren(l, r []byte) []byte { h := hashPair(1, l, r); return h[:] }

// VerifyInclusion checks that the leaf with this hash is number sequence of the tree with this size and root
// (RFC 9162 §2.1.3.2). It needs nothing but its arguments.
func VerifyInclusion(sequence, size uint64, leaf Hash, path []Hash, root Hash) error {
	if err := proof.VerifyInclusion(hasher{}, sequence, size, leaf[:], toSlices(path), root[:]); err != nil {
		return fmt.Errorf("audit: inclusion proof of entry %d in a tree of %d: %w", sequence, size, err)
	}
	return nil
}

// VerifyConsistency checks that the tree (to, toRoot) continues the tree (from, fromRoot) (RFC 9162 §2.1.4.2).
func VerifyConsistency(from, to uint64, path []Hash, fromRoot, toRoot Hash) error {
	if from == 0 {
		// Every tree continues the empty one; the library would take any root for it.
		if len(path) != 0 || fromRoot != EmptyRoot() {
			return errors.New("audit: consistency proof from the empty tree must be empty")
		}
		return nil
	}
	if err := proof.VerifyConsistency(hasher{}, from, to, toSlices(path), fromRoot[:], toRoot[:]); err != nil {
		return fmt.Errorf("audit: consistency proof from %d to %d: %w", from, to, err)
	}
	return nil
}

func toSlices(in []Hash) [][]byte {
	out := make([][]byte, len(in))
	for i := range in {
		out[i] = in[i][:]
	}
	return out
}

func toHashes(in [][]byte) ([]Hash, error) {
	out := make([]Hash, len(in))
	for i := range in {
		if len(in[i]) != len(Hash{}) {
			return nil, fmt.Errorf("%w: a node of %d bytes", ErrCorrupt, len(in[i]))
		}
		out[i] = Hash(in[i])
	}
	return out, nil
}

var ranges = &compact.RangeFactory{Hash: hasher{}.HashChildren}

// A frontier is the right edge of a tree, as a compact range: the roots of the perfect subtrees of its leaves.
type frontier struct{ r *compact.Range }

func newFrontier(size uint64, hashes []Hash) (frontier, error) {
	r, err := ranges.NewRange(0, size, toSlices(hashes))
	if err != nil {
		return frontier{}, fmt.Errorf("audit: right edge of the tree: %w", err)
	}
	return frontier{r}, nil
}

// grow appends leaf and reports each inner node that thereby became complete.
func (f frontier) grow(leaf Hash, visit func(NodeID, Hash)) error {
	return f.r.Append(leaf[:], func(id compact.NodeID, hash []byte) {
		if visit != nil && id.Level > 0 {
			visit(NodeID{Level: uint8(id.Level), Index: id.Index}, Hash(hash))
		}
	})
}

func (f frontier) size() uint64 { return f.r.End() }

func (f frontier) root() Hash {
	root, err := f.r.GetRootHash(nil)
	if err != nil || root == nil { // err: a range that does not begin at 0, which none of ours does
		return EmptyRoot()
	}
	return Hash(root)
}

// clone makes a copy that can grow, or be thrown away, on its own.
func (f frontier) clone() frontier {
	hashes := make([][]byte, len(f.r.Hashes()))
	copy(hashes, f.r.Hashes())
	r, err := ranges.NewRange(0, f.r.End(), hashes)
	if err != nil {
		panic("audit: a compact range refused its own hashes")
	}
	return frontier{r}
}

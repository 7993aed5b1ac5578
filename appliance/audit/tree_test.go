package audit_test

import (
	"fmt"
	"math/bits"
	"slices"
	"testing"

	"yinjian/appliance/audit"
)

// The recursive definitions of RFC 6962 §2.1, §2.1.1 and §2.1.2, written down as they stand there, are the oracle.

func split(n int) int { return 1 << (bits.Len(uint(n-1)) - 1) } // largest power of two smaller than n

func mth(d []audit.Hash) audit.Hash {
	switch len(d) {
	case 0:
		return audit.Sum(nil)
	case 1:
		return d[0]
	}
	k := split(len(d))
	l, r := mth(d[:k]), mth(d[k:])
	return audit.Sum(slices.Concat([]byte{1}, l[:], r[:]))
}

func path(m int, d []audit.Hash) []audit.Hash {
	if len(d) == 1 {
		return nil
	}
	k := split(len(d))
	if m < k {
		return append(path(m, d[:k]), mth(d[k:]))
	}
	return append(path(m-k, d[k:]), mth(d[:k]))
}

func subproof(m int, d []audit.Hash, whole bool) []audit.Hash {
	if m == len(d) {
		if whole {
			return nil
		}
		return []audit.Hash{mth(d)}
	}
	k := split(len(d))
	if m <= k {
		return append(subproof(m, d[:k], whole), mth(d[k:]))
	}
	return append(subproof(m-k, d[k:], false), mth(d[:k]))
}

// All proofs in all trees of up to 70 leaves are those of the definition, and the verifying functions accept them and
// nothing near them.
func TestTreeAgainstTheDefinition(t *testing.T) {
	t.Parallel()
	const most = 70
	store := newMemStore()
	j := startMem(t, store, nil)
	for i := j.Size(); i < most; i++ {
		if _, err := j.Append(t.Context(), audit.Draft{Kind: "test", Object: fmt.Sprint(i)}); err != nil {
			t.Fatal(err)
		}
	}
	var leaves []audit.Hash
	if err := j.Range(t.Context(), 0, func(r audit.Record) error {
		if want := audit.Sum(append([]byte{0}, r.EntryDER...)); r.LeafHash != want {
			t.Errorf("leaf %d = %s, want %s", r.Sequence, r.LeafHash, want)
		}
		leaves = append(leaves, r.LeafHash)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if len(leaves) != most {
		t.Fatalf("%d leaves", len(leaves))
	}
	var wrong audit.Hash
	wrong[0] = 1
	for size := range most + 1 {
		root, err := j.Root(t.Context(), uint64(size))
		if err != nil || root != mth(leaves[:size]) {
			t.Fatalf("Root(%d) = %s, %v, want %s", size, root, err, mth(leaves[:size]))
		}
		for m := range size {
			got, err := j.InclusionProof(t.Context(), uint64(m), uint64(size))
			if want := path(m, leaves[:size]); err != nil || !slices.Equal(got, want) {
				t.Fatalf("InclusionProof(%d, %d) = %v, %v, want %v", m, size, got, err, want)
			}
			if err := audit.VerifyInclusion(uint64(m), uint64(size), leaves[m], got, root); err != nil {
				t.Errorf("VerifyInclusion(%d, %d): %v", m, size, err)
			}
			for name, err := range map[string]error{
				"other leaf":  audit.VerifyInclusion(uint64(m), uint64(size), wrong, got, root),
				"other root":  audit.VerifyInclusion(uint64(m), uint64(size), leaves[m], got, wrong),
				"longer path": audit.VerifyInclusion(uint64(m), uint64(size), leaves[m], append(slices.Clone(got), wrong), root),
				"beyond":      audit.VerifyInclusion(uint64(size), uint64(size), leaves[m], got, root),
			} {
				if err == nil {
					t.Errorf("VerifyInclusion(%d, %d) with %s = nil, want an error", m, size, name)
				}
			}
		}
		for from := range size + 1 {
			got, err := j.ConsistencyProof(t.Context(), uint64(from), uint64(size))
			var want []audit.Hash
			if from > 0 {
				want = subproof(from, leaves[:size], true)
			}
			if err != nil || !slices.Equal(got, want) {
				t.Fatalf("ConsistencyProof(%d, %d) = %v, %v, want %v", from, size, got, err, want)
			}
			before := mth(leaves[:from])
			if err := audit.VerifyConsistency(uint64(from), uint64(size), got, before, root); err != nil {
				t.Errorf("VerifyConsistency(%d, %d): %v", from, size, err)
			}
			if audit.VerifyConsistency(uint64(from), uint64(size), got, wrong, root) == nil {
				t.Errorf("VerifyConsistency(%d, %d) from another root = nil, want an error", from, size)
			}
			if from > 0 && audit.VerifyConsistency(uint64(from), uint64(size), got, before, wrong) == nil {
				t.Errorf("VerifyConsistency(%d, %d) to another root = nil, want an error", from, size)
			}
			if audit.VerifyConsistency(uint64(from), uint64(size), append(slices.Clone(got), wrong), before, root) == nil {
				t.Errorf("VerifyConsistency(%d, %d) with a longer path = nil, want an error", from, size)
			}
		}
	}
	if _, err := j.InclusionProof(t.Context(), 0, most+1); err == nil {
		t.Error("InclusionProof beyond the journal = nil, want an error")
	}
	if _, err := j.ConsistencyProof(t.Context(), 5, 4); err == nil {
		t.Error("ConsistencyProof backwards = nil, want an error")
	}
}

// A proof reads as many nodes as the tree is high, however long the journal is.
func TestProofsReadFewNodes(t *testing.T) {
	t.Parallel()
	store := newMemStore()
	j := startMem(t, store, nil)
	for i := j.Size(); i < 1000; i++ {
		if _, err := j.Append(t.Context(), audit.Draft{Kind: "test", Object: fmt.Sprint(i)}); err != nil {
			t.Fatal(err)
		}
	}
	for _, m := range []uint64{0, 511, 512, 900, 999} {
		before := store.nodeReads.Load()
		if _, err := j.InclusionProof(t.Context(), m, 1000); err != nil {
			t.Fatal(err)
		}
		if n := store.nodeReads.Load() - before; n > 20 {
			t.Errorf("inclusion of %d read %d nodes, want at most 20", m, n)
		}
		before = store.nodeReads.Load()
		if _, err := j.ConsistencyProof(t.Context(), m, 1000); err != nil {
			t.Fatal(err)
		}
		if n := store.nodeReads.Load() - before; n > 20 {
			t.Errorf("consistency from %d read %d nodes, want at most 20", m, n)
		}
	}
}

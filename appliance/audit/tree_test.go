package audit_test

import (
	"errors"
	"fmt"
	"math/bits"
	"slices"
	"testing"

	"golang.org/x/sync/errgroup"

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

// What a proof asks of the store does not grow with the journal: the nodes high up are in memory, and so is the edge under
// one checkpoint. Those of one segment come in one call.
func TestProofsDoNotGrow(t *testing.T) {
	t.Parallel()
	store := newMemStore()
	j := startMem(t, store, func(c *audit.Config) { c.MaxBatch = 1024 })
	cost := func(size uint64) (reads, calls int64) {
		const proofs = 64
		for round := range 2 { // the first fills the memory
			reads, calls = store.nodeReads.Load(), store.nodeCalls.Load()
			for i := range uint64(proofs) {
				if _, err := j.InclusionProof(t.Context(), (i*size/proofs+i*uint64(round)*7)%size, size); err != nil {
					t.Fatal(err)
				}
			}
		}
		return (store.nodeReads.Load() - reads) / proofs, (store.nodeCalls.Load() - calls) / proofs
	}
	var short [2]int64
	for _, size := range []uint64{1 << 13, 1 << 16} {
		fill(t, j, size+5)
		reads, calls := cost(size + 5)
		if short[0] == 0 {
			short = [2]int64{reads, calls}
		}
		if reads > short[0] || calls > 1 {
			t.Errorf("under %d entries a proof reads %d nodes in %d calls, under %d it reads %d", size, reads, calls, 1<<13, short[0])
		}
	}
}

// A start replays the changes of state several times, and proves them once.
func TestStateIsProvedOnce(t *testing.T) {
	t.Parallel()
	store := newMemStore()
	j := startMem(t, store, nil)
	for i := range 50 {
		fill(t, j, j.Size()+20)
		if _, err := j.Append(t.Context(), audit.Draft{Kind: "test.change", Object: fmt.Sprint(i), State: true}); err != nil {
			t.Fatal(err)
		}
	}
	var calls int64
	replay := func() (n int, reads int64) {
		before, called := store.nodeReads.Load(), store.nodeCalls.Load()
		defer func() { calls = store.nodeCalls.Load() - called }()
		if err := j.State(t.Context(), func(audit.Record) error { n++; return nil }); err != nil {
			t.Fatal(err)
		}
		return n, store.nodeReads.Load() - before
	}
	if n, reads := replay(); n != 51 || reads < 50 {
		t.Errorf("the first replay: %d changes, %d nodes", n, reads)
	}
	if calls > 2 { // the right edge, and what 128 proofs need
		t.Errorf("the first replay asked the store %d times for nodes", calls)
	}
	if n, reads := replay(); n != 51 || reads != 0 {
		t.Errorf("the second replay: %d changes, %d nodes, want none", n, reads)
	}
	// One that is another than before is not taken for proved.
	store.mu.Lock()
	for i := range store.rows {
		if r := &store.rows[i]; r.Change && r.Kind == "test.change" {
			e, err := audit.ParseEntry(r.DER)
			if err != nil {
				t.Fatal(err)
			}
			e.Object = "forged"
			if r.DER, err = e.Marshal(); err != nil {
				t.Fatal(err)
			}
			leaf := audit.LeafHash(r.DER)
			r.Leaf = leaf[:]
			break
		}
	}
	store.mu.Unlock()
	if err := j.State(t.Context(), func(audit.Record) error { return nil }); !errors.Is(err, audit.ErrCorrupt) {
		t.Errorf("a change that was exchanged: %v", err)
	}
}

// fill appends until the journal has size entries.
func fill(t testing.TB, j *audit.Journal, size uint64) {
	t.Helper()
	var g errgroup.Group
	g.SetLimit(512)
	for i := j.Size(); i < size; i++ {
		g.Go(func() error {
			_, err := j.Append(t.Context(), audit.Draft{Kind: "test", Object: fmt.Sprint(i)})
			return err
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
}

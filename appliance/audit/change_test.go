package audit_test

import (
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"reflect"
	"slices"
	"testing"
	"time"

	"yinjian/appliance/audit"
)

// clone is a store that can be changed behind a verifier's back.
func (s *memStore) clone() *memStore {
	c := newMemStore()
	for _, r := range s.rows {
		r.DER, r.Leaf, r.Chain, r.Ref, r.Own = bytes.Clone(r.DER), bytes.Clone(r.Leaf), bytes.Clone(r.Chain), bytes.Clone(r.Ref), bytes.Clone(r.Own)
		c.rows = append(c.rows, r)
	}
	c.nodes = maps.Clone(s.nodes)
	for sum, b := range s.blobs {
		c.blobs[sum] = bytes.Clone(b)
	}
	for _, p := range s.checkpoints {
		p.Note, p.Signature = bytes.Clone(p.Note), bytes.Clone(p.Signature)
		c.checkpoints = append(c.checkpoints, p)
	}
	return c
}

func pick[T any](rnd *rand.Rand, m map[audit.Hash]T) audit.Hash {
	keys := slices.SortedFunc(maps.Keys(m), func(a, b audit.Hash) int { return bytes.Compare(a[:], b[:]) })
	return keys[rnd.IntN(len(keys))]
}

func flip(rnd *rand.Rand, b []byte) { b[rnd.IntN(len(b))] ^= 1 << rnd.IntN(8) }

// changes are all that somebody could do to one thing that is stored. Each answers what it did and the entry that it
// concerns, -1 if none.
var changes = []func(*rand.Rand, *memStore) (string, int){
	func(r *rand.Rand, s *memStore) (string, int) {
		k := r.IntN(len(s.rows))
		flip(r, s.rows[k].DER)
		return "entry", k
	},
	func(r *rand.Rand, s *memStore) (string, int) {
		k := r.IntN(len(s.rows))
		flip(r, s.rows[k].Leaf)
		return "leaf hash", k
	},
	func(r *rand.Rand, s *memStore) (string, int) {
		k := r.IntN(len(s.rows))
		flip(r, s.rows[k].Chain)
		return "chain hash", k
	},
	func(r *rand.Rand, s *memStore) (string, int) {
		k := r.IntN(len(s.rows))
		switch r.IntN(3) {
		case 0:
			s.rows[k].Kind += "x"
		case 1:
			s.rows[k].Ref = append(s.rows[k].Ref, 1)
		default:
			s.rows[k].Change = !s.rows[k].Change
		}
		return "column", k
	},
	func(r *rand.Rand, s *memStore) (string, int) {
		k := r.IntN(len(s.rows))
		s.rows[k].Leaf = s.rows[k].Leaf[:r.IntN(32)]
		return "leaf hash cut", k
	},
	func(r *rand.Rand, s *memStore) (string, int) { // entry, leaf, and as many chain hashes as he likes
		k := r.IntN(len(s.rows)-1) + 1
		e, err := audit.ParseEntry(s.rows[k].DER)
		if err != nil {
			return "nothing: it was changed before", -1
		}
		e.Actor = "somebody else"
		s.rows[k].DER, _ = e.Marshal()
		h := audit.LeafHash(s.rows[k].DER)
		s.rows[k].Leaf = h[:]
		through := k + r.IntN(5) - 1
		for i := k; i <= through && i < len(s.rows); i++ {
			if len(s.rows[i-1].Chain) != 32 || len(s.rows[i].Leaf) != 32 {
				break
			}
			c := audit.ChainHash(audit.Hash(s.rows[i-1].Chain), audit.Hash(s.rows[i].Leaf))
			s.rows[i].Chain = c[:]
		}
		return fmt.Sprintf("entry with leaf hash, and chain hashes to %d", through), k
	},
	func(r *rand.Rand, s *memStore) (string, int) {
		k := r.IntN(len(s.rows))
		s.rows = slices.Delete(s.rows, k, k+1)
		return "row deleted", k
	},
	func(r *rand.Rand, s *memStore) (string, int) {
		k := r.IntN(len(s.rows))
		s.rows = slices.Insert(s.rows, k, s.rows[k])
		return "row twice", k
	},
	func(r *rand.Rand, s *memStore) (string, int) {
		k := r.IntN(len(s.rows) - 1)
		s.rows[k].DER, s.rows[k+1].DER = s.rows[k+1].DER, s.rows[k].DER
		return "entries swapped", -1
	},
	func(r *rand.Rand, s *memStore) (string, int) {
		ids := slices.SortedFunc(maps.Keys(s.nodes), func(a, b audit.NodeID) int {
			if a.Level != b.Level {
				return int(a.Level) - int(b.Level)
			}
			return int(a.Index) - int(b.Index)
		})
		id := ids[r.IntN(len(ids))]
		if r.IntN(3) == 0 {
			delete(s.nodes, id)
			return fmt.Sprintf("node %v deleted", id), -2
		}
		h := s.nodes[id]
		flip(r, h[:])
		s.nodes[id] = h
		return fmt.Sprintf("node %v", id), -2
	},
	func(r *rand.Rand, s *memStore) (string, int) {
		sum := pick(r, s.blobs)
		switch r.IntN(3) {
		case 0:
			delete(s.blobs, sum)
			return "payload deleted", -2
		case 1:
			s.blobs[audit.Sum([]byte("new"))] = []byte("new")
			return "payload added", -2
		}
		s.blobs[sum] = append(s.blobs[sum], 0)
		return "payload", -2
	},
	func(r *rand.Rand, s *memStore) (string, int) {
		k := 1 + r.IntN(len(s.rows)-1) // the first is the epoch's, which has no payload
		switch r.IntN(4) {
		case 0:
			s.rows[k].Own = nil
			return "payloads of a row deleted", k
		case 1:
			s.rows[k].Own = append(s.rows[k].Own, s.rows[1+k%(len(s.rows)-1)].Own...)
			return "payloads added to a row", k
		case 2:
			s.rows[k].Own = append(s.rows[k].Own, byte(r.IntN(256)))
			return "byte added to a row's payloads", k
		}
		flip(r, s.rows[k].Own)
		return "payload in a row", k
	},
	func(r *rand.Rand, s *memStore) (string, int) {
		c := &s.checkpoints[r.IntN(len(s.checkpoints))]
		if r.IntN(2) == 0 {
			flip(r, c.Note)
			return "checkpoint", -2
		}
		flip(r, c.Signature)
		return "signature of a checkpoint", -2
	},
	func(r *rand.Rand, s *memStore) (string, int) {
		k := r.IntN(len(s.checkpoints) - 1) // of the last one only its token tells, and here it has none
		s.checkpoints = slices.Delete(s.checkpoints, k, k+1)
		return "checkpoint deleted", -2
	},
}

// Whatever single thing is changed is found; if it is an entry's, that entry is named, and no other is.
func TestVerifyFindsAnyChange(t *testing.T) {
	t.Parallel()
	key := newLogKey(t)
	original := newMemStore()
	j := startMem(t, original, func(c *audit.Config) { c.Checkpointer, c.CheckpointEvery = key, time.Millisecond })
	for i := range 76 {
		d := draft(i)
		d.Ref = bytes.Repeat([]byte{byte(i + 1)}, 32)
		d.State = i%5 == 0
		d.Payloads = []audit.Attachment{
			{Name: "p", MediaType: "text/plain", Data: fmt.Append(nil, "payload ", i)},
			{Name: "s", MediaType: "text/plain", Data: fmt.Append(nil, "shared ", i), Shared: true},
		}
		r, err := j.Append(t.Context(), d)
		if err != nil {
			t.Fatal(err)
		}
		if i%11 == 0 || i == 75 {
			if _, err := j.WaitCheckpoint(t.Context(), r.Sequence); err != nil {
				t.Fatal(err)
			}
		}
	}
	opt := audit.Options{LogKey: key.Public()}
	if r, err := audit.Verify(t.Context(), original, opt); err != nil || !r.OK() || r.Uncovered != 0 {
		t.Fatalf("before any change: %+v, %v", r, err)
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 1))
	for i := range 600 {
		s := original.clone()
		var what []string
		concerned := -1
		n := 1
		if i%4 == 3 {
			n += rnd.IntN(4)
		}
		for range n {
			w, k := changes[rnd.IntN(len(changes))](rnd, s)
			what, concerned = append(what, fmt.Sprint(w, " ", k)), k
		}
		if s.same(original) {
			continue // what one change did the next undid: a row twice, and the second deleted
		}
		r, err := audit.Verify(t.Context(), s, opt)
		if err != nil {
			t.Errorf("%q: Verify = %v", what, err)
			continue
		}
		if r.OK() {
			t.Errorf("%q: nothing was found", what)
		}
		// However it is divided, and among however many, the judgement is the same.
		rows, workers := 1+rnd.IntN(30), rnd.IntN(4)
		other := opt
		other.Workers = workers
		again, err := audit.VerifyInParts(t.Context(), s, other, rows)
		for _, report := range []*audit.Report{again, r} {
			for k, f := range report.Findings {
				if f.Kind == audit.PayloadAdded { // which of them is named is the store's choice
					report.Findings[k].Detail, report.Findings[k].DetailZH = "", ""
				}
			}
		}
		if err != nil || !reflect.DeepEqual(again, r) {
			t.Errorf("%q: in parts of %d rows, by %d goroutines: %+v, %v\nas a whole: %+v", what, rows, workers, again, err, r)
		}
		if n > 1 || concerned == -1 {
			continue
		}
		named := concerned < 0
		for _, f := range r.Findings {
			in := concerned >= 0 && f.Sequence <= uint64(concerned) && uint64(concerned) <= f.Through
			named = named || in
			switch f.Kind {
			case audit.EntryChanged, audit.LeafChanged, audit.ChainChanged, audit.ColumnChanged, audit.EntryReordered, audit.EntryRemoved:
				if !in {
					t.Errorf("%q: named is %d…%d, %s: %s", what, f.Sequence, f.Through, f.Kind, f.Detail)
				}
			}
		}
		if !named {
			t.Errorf("%q: the entry is not named: %+v", what, r.Findings)
		}
	}
}

// A verification reads nodes and rows in passes: what it asks of the store does not depend on the number of entries in a
// part, and each entry's node is asked for once.
func TestVerifyReadsInPasses(t *testing.T) {
	t.Parallel()
	store := newMemStore()
	j := startMem(t, store, func(c *audit.Config) { c.MaxBatch = 1024 })
	fill(t, j, 10_000)
	for _, workers := range []int{0, 2} {
		before := store.nodeCalls.Load()
		r, err := audit.Verify(t.Context(), store, audit.Options{Workers: workers})
		if err != nil || !r.OK() || r.Entries != 10_000 {
			t.Fatalf("Verify = %+v, %v", r, err)
		}
		if n := store.nodeCalls.Load() - before; n != 0 {
			t.Errorf("with %d goroutines %d nodes were asked for one by one", workers, n)
		}
	}
}

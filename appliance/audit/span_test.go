package audit_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"yinjian/appliance/audit"
)

// A span that was not changed holds between any two checkpoints. Whatever is changed in it, in an entry, its hashes or its
// payloads, is found; what is changed below it is another's affair.
func TestVerifySpan(t *testing.T) {
	t.Parallel()
	key := newLogKey(t)
	original := newMemStore()
	j := startMem(t, original, func(c *audit.Config) { c.Checkpointer, c.CheckpointEvery = key, time.Millisecond })
	points := []audit.Checkpoint{{}}
	for i := range 60 {
		d := draft(i)
		d.Payloads = []audit.Attachment{
			{Name: "p", MediaType: "text/plain", Data: fmt.Append(nil, "payload ", i)},
			{Name: "s", MediaType: "text/plain", Data: fmt.Append(nil, "shared ", i), Shared: true},
		}
		r, err := j.Append(t.Context(), d)
		if err != nil {
			t.Fatal(err)
		}
		if i%7 == 6 || i == 59 {
			c, err := j.WaitCheckpoint(t.Context(), r.Sequence)
			if err != nil {
				t.Fatal(err)
			}
			points = append(points, c)
		}
	}
	for i, from := range points {
		for _, to := range points[max(i, 1):] {
			r, err := audit.VerifySpan(t.Context(), original, key.Public(), from, to)
			if err != nil || r.Wrong != "" || r.To != to.Size || r.Payloads == 0 && from.Size != to.Size {
				t.Errorf("%d to %d: %+v, %v", from.Size, to.Size, r, err)
			}
		}
	}
	other := newLogKey(t)
	last := points[len(points)-1]
	if r, err := audit.VerifySpan(t.Context(), original, other.Public(), points[1], last); err != nil || r.Wrong == "" {
		t.Errorf("another log's key: %+v, %v", r, err)
	}
	if _, err := audit.VerifySpan(t.Context(), original, key.Public(), last, points[1]); err == nil {
		t.Error("a span that ends before it begins was taken")
	}
	rnd := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 3))
	tried := 0
	for range 600 {
		s := original.clone()
		what, k := changes[rnd.IntN(len(changes))](rnd, s)
		from := points[rnd.IntN(len(points)-1)]
		if what == "leaf hash cut" && uint64(k) < from.Size {
			continue // this store in memory takes no short hash for a node
		}
		r, err := audit.VerifySpan(t.Context(), s, key.Public(), from, last)
		if err != nil {
			t.Errorf("%s %d: %v", what, k, err)
			continue
		}
		switch {
		case s.same(original), k < 0, what == "column", what == "payloads added to a row", strings.HasPrefix(what, "nothing"), uint64(k) < from.Size, uint64(k) >= last.Size:
			continue // Verify's affair
		case what == "row twice" && uint64(k) == last.Size-1:
			continue // the second one is after the span
		}
		tried++
		if r.Wrong == "" {
			t.Errorf("%s %d, in a span from %d: nothing was found", what, k, from.Size)
		}
	}
	if tried < 50 {
		t.Errorf("only %d changes were tried", tried)
	}
	// A history that was written anew from somewhere on, in itself without fault.
	s := original.clone()
	for i := 30; i < len(s.rows); i++ {
		e, err := audit.ParseEntry(s.rows[i].DER)
		if err != nil {
			t.Fatal(err)
		}
		if i == 30 {
			e.Actor = "somebody else"
		}
		if s.rows[i].DER, err = e.Marshal(); err != nil {
			t.Fatal(err)
		}
		leaf := audit.LeafHash(s.rows[i].DER)
		chain := audit.ChainHash(audit.Hash(s.rows[i-1].Chain), leaf)
		s.rows[i].Leaf, s.rows[i].Chain = bytes.Clone(leaf[:]), bytes.Clone(chain[:])
	}
	if r, err := audit.VerifySpan(t.Context(), s, key.Public(), points[1], last); err != nil || r.Wrong == "" {
		t.Errorf("a history written anew: %+v, %v", r, err)
	}
}

package appliance_test

import (
	"fmt"
	"strings"
	"testing"

	"yinjian/appliance"
	"yinjian/appliance/audit"
	"yinjian/appliance/evidence"
	"yinjian/dbdriver/central"
	"yinjian/dbdriver/dbtest"
)

// Rows that were written before a stop came between them and the look for duplicates are looked at after the next start.
func TestDuplicatesAreLookedForAgain(t *testing.T) {
	t.Parallel()
	store := dbtest.SQLite(t).Open(t)
	batch := func(node string, first uint64) audit.ProjectedBatch {
		b := audit.ProjectedBatch{Node: node, Epoch: "0123456789abcdef", First: first, Last: first + 9, MAC: strings.Repeat("cd", 32), KeyID: "mac"}
		for seq := first; seq <= b.Last; seq++ {
			b.Rows = append(b.Rows, audit.ProjectedRow{
				Node: node, Epoch: b.Epoch, Sequence: seq, LeafHash: strings.Repeat("ab", 32), RecordID: fmt.Sprintf("%064x", seq), Kind: evidence.KindSign,
				SignedAt: int64(seq) + map[string]int64{"west": 5}[node], Status: audit.StatusRecorded, CreatedBy: "shipper/" + node, ModifiedBy: "shipper/" + node,
			})
		}
		return b
	}
	marked := func(seq uint64) bool {
		t.Helper()
		of, ok, err := store.DuplicateOf(t.Context(), central.Place{Node: "west", Epoch: "0123456789abcdef", Sequence: seq})
		if err != nil || ok && of != (central.Place{Node: "east", Epoch: "0123456789abcdef", Sequence: seq}) {
			t.Fatalf("%+v, %v", of, err)
		}
		return ok
	}
	apply := func(p audit.Projection, node string, first uint64) {
		t.Helper()
		if err := p.Apply(t.Context(), batch(node, first)); err != nil {
			t.Fatal(err)
		}
	}
	alone := appliance.Duplicates(store, func() bool { return false })
	for _, node := range []string{"east", "west"} {
		apply(alone, node, 0)
		apply(alone, node, 10)
	}
	if marked(3) {
		t.Error("an appliance without another campus looked for duplicates")
	}
	paired := appliance.Duplicates(store, func() bool { return true })
	apply(alone, "east", 20)
	apply(paired, "west", 20)
	for seq := range uint64(30) {
		if !marked(seq) {
			t.Errorf("%d is not marked", seq)
		}
	}
}

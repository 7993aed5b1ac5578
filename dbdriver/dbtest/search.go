package dbtest

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"yinjian/appliance/audit"
	"yinjian/dbdriver/central"
)

// search: each condition alone and together, against a sieve of the rows in memory, page by page, with rows of one time on
// both sides of a page's end.
func search(t *testing.T, fresh func(testing.TB) *Database) {
	t.Parallel()
	s := fresh(t).Open(t)
	var rows []audit.ProjectedRow
	for i, node := range []string{"east", "west"} {
		var own []audit.ProjectedRow
		for seq := range uint64(40) {
			r := row("e", seq)
			r.Node, r.CreatedBy, r.ModifiedBy = node, "shipper/"+node, "shipper/"+node
			r.SignedAt = int64(1000 + seq/3) // three of a time on each node
			r.RecordID = fmt.Sprintf("%064x", seq%11)
			r.Application, r.Signer, r.Department = []string{"emr", "his", ""}[seq%3], fmt.Sprint("D", seq%4), []string{"心内科", "胸外科"}[(int(seq)+i)%2]
			if seq%5 == 0 {
				r.Kind = "token.v1"
			}
			own = append(own, r)
		}
		if err := s.Apply(t.Context(), batch(own...)); err != nil {
			t.Fatal(err)
		}
		rows = append(rows, own...)
	}
	slices.SortFunc(rows, func(a, b audit.ProjectedRow) int {
		if a.SignedAt != b.SignedAt {
			return int(b.SignedAt - a.SignedAt)
		}
		if c := strings.Compare(b.Node, a.Node); c != 0 {
			return c
		}
		return int(b.Sequence) - int(a.Sequence)
	})
	for name, q := range map[string]central.RecordQuery{
		"all":              {},
		"times":            {From: 1003, Before: 1006},
		"kind":             {Kind: "token.v1"},
		"application":      {Application: "his"},
		"department":       {Department: "心内科"},
		"signer":           {Signer: "D2"},
		"id":               {RecordID: fmt.Sprintf("%064x", 3)},
		"id and signer":    {RecordID: fmt.Sprintf("%064x", 3), Signer: "D3"},
		"signer and times": {Signer: "D2", From: 1002, Before: 1008, Department: "胸外科", Application: "emr"},
		"nobody":           {Signer: "D' OR 1=1 --"},
	} {
		if q.Before == 0 {
			q.Before = 1 << 50
		}
		var want, got []audit.ProjectedRow
		for _, r := range rows {
			if r.SignedAt >= q.From && r.SignedAt < q.Before && (q.Kind == "" || r.Kind == q.Kind) && (q.Application == "" || r.Application == q.Application) &&
				(q.Department == "" || r.Department == q.Department) && (q.Signer == "" || r.Signer == q.Signer) && (q.RecordID == "" || r.RecordID == q.RecordID) {
				want = append(want, r)
			}
		}
		for q.Most = 5; ; {
			page, err := s.SearchRecords(t.Context(), q)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			got = append(got, page...)
			if len(page) < q.Most {
				break
			}
			last := page[len(page)-1]
			q.After = &central.RecordPlace{SignedAt: last.SignedAt, Node: last.Node, Epoch: last.Epoch, Sequence: int64(last.Sequence)}
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: got %d rows, want %d\n%v\n%v", name, len(got), len(want), got, want)
		}
		if len(want) == 0 && name != "nobody" {
			t.Errorf("%s: nothing to find", name)
		}
	}
}

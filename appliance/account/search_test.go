package account_test

import (
	"fmt"
	"slices"
	"testing"

	"yinjian/appliance/account"
	"yinjian/appliance/internal/testkit"
)

// Pages are in the order of the ids, whatever the order of enrolment; a word is looked for in each of what people see.
func TestSearchSigners(t *testing.T) {
	t.Parallel()
	h := testkit.New(t)
	for i, id := range []string{"D30", "D10", "a7", "D20", "D2"} {
		e := account.Enrolment{ID: id, Name: fmt.Sprint("张", i), Department: []string{"心内科", "ICU"}[i%2], Campus: "east", Algorithms: []string{"SM2"}}
		if _, err := h.Directory.Enrol(t.Context(), "admin", e); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := h.Directory.StopSigner(t.Context(), "admin", "D10", true, "离职"); err != nil {
		t.Fatal(err)
	}
	yes, no := true, false
	for name, c := range map[string]struct {
		q     account.SignerQuery
		want  []string
		total int
	}{
		"all":        {account.SignerQuery{Most: 9}, []string{"D10", "D2", "D20", "D30", "a7"}, 5},
		"page":       {account.SignerQuery{Skip: 1, Most: 2}, []string{"D2", "D20"}, 5},
		"past":       {account.SignerQuery{Skip: 9, Most: 2}, nil, 5},
		"id":         {account.SignerQuery{Text: "d2", Most: 9}, []string{"D2", "D20"}, 2},
		"second":     {account.SignerQuery{Text: "d2", Skip: 1, Most: 9}, []string{"D20"}, 2},
		"department": {account.SignerQuery{Text: "icu", Most: 9}, []string{"D10", "D20"}, 2},
		"name":       {account.SignerQuery{Text: "张4", Most: 9}, []string{"D2"}, 1},
		"stopped":    {account.SignerQuery{Stopped: &yes, Most: 9}, []string{"D10"}, 1},
		"running":    {account.SignerQuery{Stopped: &no, Text: "icu", Most: 9}, []string{"D20"}, 1},
		"nobody":     {account.SignerQuery{Text: "D4", Most: 9}, nil, 0},
	} {
		page, total := h.Directory.SearchSigners(c.q)
		var got []string
		for _, g := range page {
			got = append(got, g.ID)
			if now, _ := h.Directory.Signer(g.ID); now != g {
				t.Errorf("%s: %s is an older version", name, g.ID)
			}
		}
		if !slices.Equal(got, c.want) || total != c.total {
			t.Errorf("%s: %v of %d, want %v of %d", name, got, total, c.want, c.total)
		}
	}
}

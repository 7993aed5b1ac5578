package account_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

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

// Keys and certificates are found owner by owner, each once over all pages, and an owner's stand on one page.
func TestSearchHeld(t *testing.T) {
	t.Parallel()
	h := testkit.New(t)
	for i, id := range []string{"D30", "D10", "a7", "D20", "D2"} {
		e := account.Enrolment{ID: id, Name: fmt.Sprint("张", i), Department: "心内科", Campus: "east", Algorithms: []string{"SM2", "RSA-2048"}, External: id == "a7"}
		if _, err := h.Directory.Enrol(t.Context(), "admin", e); err != nil {
			t.Fatal(err)
		}
	}
	serial := ""
	for _, l := range h.Directory.Certificates() {
		if l.Owner == "signer:D20" {
			serial = l.Serial
		}
	}
	walk := func(q account.HeldQuery) (keys, certificates []string) {
		keys, certificates = []string{}, []string{}
		first := q.After
		for {
			page, next := h.Directory.SearchKeys(q)
			for _, k := range page {
				keys = append(keys, k.Owner)
			}
			if q.After = next; next == "" {
				break
			}
		}
		q.After = first
		for {
			page, next := h.Directory.SearchCertificates(q)
			for _, l := range page {
				certificates = append(certificates, l.Owner)
			}
			if q.After = next; next == "" {
				break
			}
		}
		return slices.Compact(keys), slices.Compact(certificates)
	}
	signers := []string{"signer:D10", "signer:D2", "signer:D20", "signer:D30", "signer:a7"}
	for name, c := range map[string]struct {
		q                  account.HeldQuery
		keys, certificates []string
	}{
		"signers":         {account.HeldQuery{Scope: account.ScopeSigners, Most: 9}, signers, signers},
		"page by page":    {account.HeldQuery{Scope: account.ScopeSigners, Most: 1}, signers, signers},
		"two an owner":    {account.HeldQuery{Scope: account.ScopeSigners, Most: 3}, signers, signers},
		"after":           {account.HeldQuery{Scope: account.ScopeSigners, After: "signer:D20", Most: 9}, signers[3:], signers[3:]},
		"after no owner":  {account.HeldQuery{Scope: account.ScopeSigners, After: "signer:D21", Most: 9}, signers[3:], signers[3:]},
		"owner":           {account.HeldQuery{Text: "signer:d2", Most: 1}, signers[1:3], signers[1:3]},
		"name":            {account.HeldQuery{Text: "张3", Most: 9}, signers[2:3], signers[2:3]},
		"serial":          {account.HeldQuery{Text: serial, Most: 9}, []string{}, signers[2:3]},
		"subject":         {account.HeldQuery{Text: "心内", Most: 9}, []string{}, signers[:4]},
		"label":           {account.HeldQuery{Text: "staff/d10/", Most: 9}, signers[:1], signers[:1]},
		"end in a month":  {account.HeldQuery{Scope: account.ScopeSigners, Within: 30 * 24 * time.Hour, Most: 9}, signers, []string{}},
		"end in 10 years": {account.HeldQuery{Scope: account.ScopeSigners, Within: 3650 * 24 * time.Hour, Most: 1}, signers, signers[:4]},
		"nobody":          {account.HeldQuery{Text: "no such", Most: 9}, []string{}, []string{}},
	} {
		keys, certificates := walk(c.q)
		if !slices.Equal(keys, c.keys) || !slices.Equal(certificates, c.certificates) {
			t.Errorf("%s: keys of %v, certificates of %v; want %v and %v", name, keys, certificates, c.keys, c.certificates)
		}
	}
	all := h.Directory.Certificates()
	own, _ := h.Directory.SearchCertificates(account.HeldQuery{Scope: account.ScopeOwn, Most: len(all)})
	staff, next := h.Directory.SearchCertificates(account.HeldQuery{Scope: account.ScopeSigners, Most: len(all)})
	if len(own)+len(staff) != len(all) || len(own) == 0 || next != "" || slices.ContainsFunc(own, func(l account.CertificateLine) bool { return strings.HasPrefix(l.Owner, "signer:") }) {
		t.Errorf("%d of the appliance's and %d of signers, of %d; next %q", len(own), len(staff), len(all), next)
	}
	if keys, _ := h.Directory.SearchKeys(account.HeldQuery{Most: 500}); len(keys) != len(h.Directory.KeyRecords()) {
		t.Errorf("%d keys of %d", len(keys), len(h.Directory.KeyRecords()))
	}
	if page, next := h.Directory.SearchKeys(account.HeldQuery{Scope: account.ScopeSigners, Most: 1}); len(page) != 2 || next != "signer:D10" {
		t.Errorf("a page of one is %v, then %q", page, next)
	}
}

// A page costs what is on it: twelve times as many signers make no more of it.
func TestSearchHeldCostsAPage(t *testing.T) {
	h := testkit.New(t)
	enrolled := 0
	cost := func(signers int) (keys, certificates float64) {
		for ; enrolled < signers; enrolled++ {
			e := account.Enrolment{ID: fmt.Sprintf("D%03d", enrolled), Name: "张", Department: "心内科", Campus: "east", Algorithms: []string{"SM2"}}
			if _, err := h.Directory.Enrol(t.Context(), "admin", e); err != nil {
				t.Fatal(err)
			}
		}
		q := account.HeldQuery{Scope: account.ScopeSigners, After: "signer:D001", Most: 2}
		return testing.AllocsPerRun(20, func() { h.Directory.SearchKeys(q) }), testing.AllocsPerRun(20, func() { h.Directory.SearchCertificates(q) })
	}
	keys, certificates := cost(5)
	if k, c := cost(60); k > keys || c > certificates {
		t.Errorf("a page of keys costs %.0f allocations among 60 signers and %.0f among 5, one of certificates %.0f and %.0f", k, keys, c, certificates)
	}
}

package evidence_test

import (
	"encoding/json"
	"flag"
	"slices"
	"testing"

	"yinjian/appliance/account"
	"yinjian/appliance/evidence"
	"yinjian/appliance/internal/testkit"
	"yinjian/appliance/pki"
	"yinjian/appliance/sign"
)

var update = flag.Bool("update", false, "record the bundles in testdata anew")

// A kind of signature.
type kind struct{ algorithm, form string }

func (k kind) String() string { return k.form + "/" + k.algorithm }

var kinds = []kind{{"SM2", "raw"}, {"RSA-2048", "raw"}, {"SM2", "cms"}, {"RSA-2048", "cms"}}

// A ward is a house with an application and two doctors.
type ward struct {
	*testkit.House
	app    *account.Application
	doctor *account.Signer
	other  *account.Signer
}

func newWard(t testing.TB) *ward {
	h := testkit.New(t)
	return &ward{h, h.App("his", nil), h.Doctor("D001"), h.Doctor("D002")}
}

func request(key string, k kind) *sign.Request {
	q := testkit.Request(key, "D001")
	q.Algorithm, q.Form = k.algorithm, k.form
	return q
}

// bundle signs Document by assertion and answers the evidence.
func (w *ward) bundle(t testing.TB, q *sign.Request) *evidence.Bundle {
	t.Helper()
	return parse(t, w.Evidence(w.app, w.Sign(w.app, q).RecordID))
}

func parse(t testing.TB, data []byte) *evidence.Bundle {
	t.Helper()
	b, err := evidence.Parse(data)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func encode(t testing.TB, b *evidence.Bundle) []byte {
	t.Helper()
	data, err := b.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// with is a copy that was changed.
func with(t testing.TB, b *evidence.Bundle, change func(*evidence.Bundle)) *evidence.Bundle {
	t.Helper()
	c := new(evidence.Bundle)
	if err := json.Unmarshal(encode(t, b), c); err != nil {
		t.Fatal(err)
	}
	change(c)
	return c
}

// at is the outcome of a check, "" when it was not listed. Of several with one ID the worst counts.
func at(r *evidence.Report, id string) pki.Status {
	var got pki.Status
	for _, c := range r.Checks {
		if c.ID == id && (got == "" || got == pki.Passed || c.Status == pki.Failed) {
			got = c.Status
		}
	}
	return got
}

// wants compares the verdict and the outcome of checks.
func wants(t *testing.T, r *evidence.Report, verdict pki.Verdict, status pki.Status, ids ...string) {
	t.Helper()
	if r.Verdict != verdict {
		t.Errorf("verdict %s, want %s: %s", r.Verdict, verdict, problems(r))
	}
	for _, id := range ids {
		if got := at(r, id); got != status {
			t.Errorf("%s is %q, want %s: %s", id, got, status, problems(r))
		}
	}
}

// problems are the checks that did not pass, as JSON.
func problems(r *evidence.Report) string {
	c := slices.Clone(r.Checks)
	c = slices.DeleteFunc(c, func(c pki.Check) bool { return c.Status == pki.Passed })
	b, _ := json.Marshal(c)
	return string(b)
}

func says(t *testing.T, r *evidence.Report, words string) {
	t.Helper()
	if !slices.ContainsFunc(r.Statements, func(s string) bool { return contains(s, words) }) {
		t.Errorf("nothing says %q: %q", words, r.Statements)
	}
}

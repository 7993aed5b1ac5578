package pki_test

import (
	"encoding/json"
	"testing"

	"yinjian/appliance/pki"
)

func TestVerdictOf(t *testing.T) {
	t.Parallel()
	pass, fail, none := pki.Passed, pki.Failed, pki.NotChecked
	c := func(id string, s pki.Status) pki.Check { return pki.Check{ID: id, Status: s} }
	for name, tt := range map[string]struct {
		checks   []pki.Check
		required []string
		want     pki.Verdict
	}{
		"nothing":                      {nil, nil, pki.Indeterminate},
		"nothing, one required":        {nil, []string{"a"}, pki.Indeterminate},
		"all passed":                   {[]pki.Check{c("a", pass), c("b", pass)}, []string{"a", "b"}, pki.Valid},
		"required is missing":          {[]pki.Check{c("a", pass)}, []string{"a", "b"}, pki.Indeterminate},
		"required not checked":         {[]pki.Check{c("a", pass), c("b", none)}, []string{"a", "b"}, pki.Indeterminate},
		"optional not checked":         {[]pki.Check{c("a", pass), c("b", none)}, []string{"a"}, pki.Valid},
		"optional failed":              {[]pki.Check{c("a", pass), c("b", fail)}, []string{"a"}, pki.Invalid},
		"failed beats not checked":     {[]pki.Check{c("a", none), c("b", fail)}, []string{"a", "b"}, pki.Invalid},
		"same id, second not checked":  {[]pki.Check{c("a", pass), c("a", none)}, []string{"a"}, pki.Indeterminate},
		"same id, first not checked":   {[]pki.Check{c("a", none), c("a", pass)}, []string{"a"}, pki.Indeterminate},
		"unknown status never counts":  {[]pki.Check{c("a", "ok")}, []string{"a"}, pki.Indeterminate},
		"empty status never counts":    {[]pki.Check{c("a", "")}, nil, pki.Indeterminate},
		"only not checked, none asked": {[]pki.Check{c("a", none)}, nil, pki.Indeterminate},
	} {
		if got := pki.VerdictOf(tt.checks, tt.required...); got != tt.want {
			t.Errorf("%s: %s, want %s", name, got, tt.want)
		}
	}
}

func TestCheckJSON(t *testing.T) {
	t.Parallel()
	checks := pki.WithPrefix("tsa.", []pki.Check{{ID: pki.CheckPathChain, Status: pki.NotChecked, Detail: "无"}})
	got, err := json.Marshal(pki.PathReport{Checks: checks, Verdict: pki.Indeterminate})
	want := `{"checks":[{"id":"tsa.path.chain","status":"not_checked","detail":"无"}],"verdict":"indeterminate","evaluation":false}`
	if err != nil || string(got) != want {
		t.Errorf("got %s, %v\nwant %s", got, err, want)
	}
}

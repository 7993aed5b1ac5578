package main

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"yinjian/appliance/evidence"
	"yinjian/appliance/pki"
)

const v1 = "testdata/v1/"

// judge runs the command and answers its status and report.
func judge(t *testing.T, args ...string) (int, evidence.Report) {
	t.Helper()
	var out, errs bytes.Buffer
	status := run(append([]string{"-o", "json"}, args...), &out, &errs)
	var r evidence.Report
	if out.Len() > 0 {
		if err := json.Unmarshal(out.Bytes(), &r); err != nil {
			t.Fatal(err)
		}
	} else {
		t.Logf("%v: %s", args, errs.String())
	}
	return status, r
}

func failed(r evidence.Report) (ids []string) {
	for _, c := range r.Checks {
		if c.Status == pki.Failed {
			ids = append(ids, c.ID)
		}
	}
	return ids
}

// What release 0.1.0 left is judged as it was then, by every release after it.
func TestEvidenceOfEarlierReleases(t *testing.T) {
	t.Parallel()
	other := filepath.Join(t.TempDir(), "other.xml")
	text, err := os.ReadFile(v1 + "record.xml")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(other, bytes.Replace(text, []byte("0/9"), []byte("1/9"), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	in := func(name string) string { return v1 + name }
	base := []string{"--anchors", v1}
	logKey := []string{"--log-key", in("log.pem")}
	document := []string{"--document", in("record.xml")}
	crls := []string{"--crls", v1}
	at := []string{"--at", "2026-11-23T00:00:00Z"}
	args := func(parts ...[]string) (all []string) {
		for _, p := range parts {
			all = append(all, p...)
		}
		return all
	}
	for name, c := range map[string]struct {
		args    []string
		verdict pki.Verdict
		fails   string // a check that must be among the failed
	}{
		"raw":                {args(base, logKey, document, []string{in("evidence.json")}), pki.Valid, ""},
		"cms":                {args(base, logKey, document, []string{in("evidence-cms.json")}), pki.Valid, ""},
		"no document":        {args(base, logKey, []string{in("evidence-cms.json")}), pki.Indeterminate, ""},
		"other document":     {args(base, logKey, []string{"--document", other, in("evidence.json")}), pki.Invalid, evidence.CheckDocument},
		"other document cms": {args(base, logKey, []string{"--document", other, in("evidence-cms.json")}), pki.Invalid, evidence.CheckDocument},
		"lone cms":           {args(base, crls, document, []string{"--cms", in("signature.cms")}), pki.Valid, ""},
		"lone cms, no crls":  {args(base, document, []string{"--cms", in("signature.cms")}), pki.Indeterminate, ""},
		"lone raw":           {args(base, crls, document, at, []string{"--raw", in("signature.der"), "--certificate", in("signer.pem")}), pki.Valid, ""},
		"lone raw, changed":  {args(base, crls, at, []string{"--document", other, "--raw", in("signature.der"), "--certificate", in("signer.pem")}), pki.Invalid, evidence.CheckSignature},
		"sm2 token":          {args(base, crls, document, []string{"--token", in("token-sm2.tsr")}), pki.Valid, ""},
		"rsa token":          {args(base, crls, document, []string{"--token", in("token-rsa.tsr")}), pki.Valid, ""},
		"token, changed":     {args(base, crls, []string{"--document", other, "--token", in("token-rsa.tsr")}), pki.Invalid, evidence.CheckTokenImprint},
		"wrong anchor":       {args([]string{"--anchors", in("ca-rsa.pem")}, logKey, document, []string{in("evidence.json")}), pki.Indeterminate, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			status, r := judge(t, c.args...)
			if want := map[bool]int{true: 0, false: 1}[c.verdict == pki.Valid]; r.Verdict != c.verdict || status != want {
				t.Errorf("verdict %q, status %d; want %q, %d; failed: %v", r.Verdict, status, c.verdict, want, failed(r))
			}
			if c.fails != "" && !strings.Contains(strings.Join(failed(r), " "), c.fails) {
				t.Errorf("failed: %v, want %s among them", failed(r), c.fails)
			}
		})
	}
}

func TestMisuse(t *testing.T) {
	t.Parallel()
	for name, args := range map[string][]string{
		"nothing":             {},
		"no anchors":          {"--log-key", v1 + "log.pem", v1 + "evidence.json"},
		"no log key":          {"--anchors", v1, v1 + "evidence.json"},
		"two things":          {"--anchors", v1, "--cms", "x", "--token", "y"},
		"raw, no certificate": {"--anchors", v1, "--raw", v1 + "signature.der"},
		"unknown flag":        {"--anchor", v1},
		"unknown output":      {"--anchors", v1, "--log-key", "k", "-o", "xml", "e"},
	} {
		if status, _ := judge(t, args...); status != 2 {
			t.Errorf("%s: status %d, want 2", name, status)
		}
	}
	if status, _ := judge(t, "--anchors", v1, "--log-key", v1+"log.pem", v1+"record.xml"); status != 1 {
		t.Errorf("a file that is no evidence: status %d, want 1", status)
	}
}

// The verifier is handed to courts: it builds without cgo for every platform named, and has neither SQL nor HTTP in it.
func TestStandsAlone(t *testing.T) {
	t.Parallel()
	list := exec.Command("go", "list", "-deps", ".")
	list.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := list.Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range strings.Fields(string(out)) {
		for _, banned := range []string{"database/sql", "net/http", "runtime/cgo", "github.com/mattn/", "github.com/miekg/"} {
			if strings.HasPrefix(p, banned) {
				t.Errorf("%s is compiled in", p)
			}
		}
	}
	platforms := []string{"linux/amd64"}
	if !testing.Short() {
		platforms = append(platforms, "linux/arm64", "linux/loong64", "windows/amd64")
	}
	for _, p := range platforms {
		goos, arch, _ := strings.Cut(p, "/")
		bin := filepath.Join(t.TempDir(), "v")
		cmd := exec.Command("go", "build", "-o", bin, ".")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS="+goos, "GOARCH="+arch)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", p, err, out)
		}
	}
}

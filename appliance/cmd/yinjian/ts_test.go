package main_test

import (
	"encoding/hex"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"yinjian/appliance/evidence"
	"yinjian/appliance/evidence/show"
	"yinjian/appliance/pki"
	"yinjian/tsa"
)

// What release 0.1.0 left: responses of both units over record.xml, the CAs and their lists.
const v1 = "../yinjian-verify/testdata/v1/"

// OpenSSL reads the requests as they were meant.
func TestTimestampQuery(t *testing.T) {
	t.Parallel()
	need(t, "openssl")
	q := filepath.Join(tempDir(t), "q.tsq")
	digest := strings.Fields(command(t, nil, "openssl", "dgst", "-sm3", "-r", v1+"record.xml").stdout)[0]
	for _, c := range []struct {
		flags []string
		want  []string
	}{
		{[]string{v1 + "record.xml"}, []string{"Hash Algorithm: sm3", "Policy OID: unspecified", "Nonce: 0x", "Certificate required: yes"}},
		{[]string{v1 + "record.xml", "--digest", "sha512", "--no-nonce", "--no-cert", "--policy", "1.2.3.4"},
			[]string{"Hash Algorithm: sha512", "Policy OID: 1.2.3.4", "Nonce: unspecified", "Certificate required: no"}},
		{[]string{"--digest-value", digest}, []string{"Hash Algorithm: sm3", "Certificate required: yes"}},
	} {
		mustRun(t, append([]string{"ts", "query", "--out", q}, c.flags...)...)
		text := command(t, nil, "openssl", "ts", "-query", "-in", q, "-text").stdout
		for _, w := range c.want {
			if !strings.Contains(text, w) {
				t.Errorf("%q: openssl reads no %q:\n%s", c.flags, w, text)
			}
		}
		der, err := os.ReadFile(q)
		if err != nil {
			t.Fatal(err)
		}
		if r, err := tsa.ParseRequest(der); err != nil || strings.Contains(c.want[0], "sm3") && hex.EncodeToString(r.Imprint.Digest) != digest {
			t.Errorf("%q: %+v, %v, want the digest %s", c.flags, r, err, digest)
		}
	}
	for _, args := range [][]string{{}, {v1 + "record.xml", "--digest-value", digest}, {v1 + "record.xml", "--digest", "sha1"}, {"--digest-value", "0a"}, {v1 + "record.xml", "--policy", "x"}} {
		refused(t, 2, nil, append([]string{"ts", "query", "--out", q}, args...)...)
	}
}

// The verdicts, words and exit statuses are those of yinjian-verify.
func TestTimestampVerify(t *testing.T) {
	t.Parallel()
	verifier, err := offlineVerifier()
	if err != nil {
		t.Fatal(err)
	}
	query := filepath.Join(tempDir(t), "q.tsq")
	mustRun(t, "ts", "query", v1+"record.xml", "--no-nonce", "--out", query)
	for name, c := range map[string]struct {
		token string
		flags []string
		code  int
	}{
		"sm2":             {"token-sm2.tsr", []string{"--document", v1 + "record.xml", "--crls", v1}, 0},
		"rsa":             {"token-rsa.tsr", []string{"--document", v1 + "record.xml", "--crls", v1}, 0},
		"no lists":        {"token-sm2.tsr", []string{"--document", v1 + "record.xml"}, 3},
		"no document":     {"token-sm2.tsr", []string{"--crls", v1}, 3},
		"another":         {"token-sm2.tsr", []string{"--document", v1 + "ca.pem", "--crls", v1}, 1},
		"long after":      {"token-sm2.tsr", []string{"--document", v1 + "record.xml", "--crls", v1, "--at", "2040-01-01T00:00:00Z"}, 3},
		"another's query": {"token-rsa.tsr", []string{"--query", query, "--crls", v1}, 1},
		"no token":        {"record.xml", []string{"--document", v1 + "record.xml"}, 1},
	} {
		ours := yinjian(t, append([]string{"ts", "verify", "--anchors", v1, v1 + c.token, "-o", "json"}, c.flags...)...)
		theirs := command(t, nil, append([]string{verifier, "--anchors", v1, "--token", v1 + c.token, "-o", "json"}, c.flags...)...)
		if ours.code != c.code || theirs.code != c.code || ours.stdout != theirs.stdout {
			t.Errorf("%s: %d, yinjian-verify %d, want %d:\n%s\n%s", name, ours.code, theirs.code, c.code, ours, theirs)
		}
	}
	if o := yinjian(t, "ts", "verify", "--anchors", v1, "--document", v1+"record.xml", "--crls", v1, v1+"token-sm2.tsr"); !strings.Contains(o.stdout, "有效") || !strings.Contains(o.stdout, "token.tsa.imprint") {
		t.Errorf("%v", o)
	}
	refused(t, 2, nil, "ts", "verify", "--anchors", v1, v1+"none.tsr")
	refused(t, 2, []string{"anchors"}, "ts", "verify", v1+"token-sm2.tsr")
	refused(t, 2, nil, "ts", "verify", "--anchors", v1, "--at", "today", v1+"token-sm2.tsr")
}

// What is shown is what OpenSSL reads in the token.
func TestTimestampShow(t *testing.T) {
	t.Parallel()
	need(t, "openssl")
	for _, name := range []string{"token-sm2.tsr", "token-rsa.tsr"} {
		var s show.Stamp
		if err := json.Unmarshal([]byte(mustRun(t, "ts", "show", "--json", v1+name).stdout), &s); err != nil {
			t.Fatal(err)
		}
		text := command(t, nil, "openssl", "ts", "-reply", "-in", v1+name, "-text").stdout
		for _, w := range []string{"Policy OID: " + s.Policy, "Hash Algorithm: " + strings.ToLower(strings.ReplaceAll(s.Algorithm, "-", ""))} {
			if !strings.Contains(text, w) {
				t.Errorf("%s: openssl reads no %q:\n%s", name, w, text)
			}
		}
		if len(s.Serial) == 0 || !strings.Contains(strings.ToLower(text), s.Serial) || len(s.Imprint) != 64 || s.GenTime == "" || s.Accuracy == "" || s.Signer == "" || !s.Evaluation {
			t.Errorf("%s: %+v", name, s)
		}
		if o := mustRun(t, "ts", "show", v1+name); !strings.Contains(o.stdout, s.GenTime) || !strings.Contains(o.stdout, "未经验证") {
			t.Errorf("%v", o)
		}
	}
	refused(t, 1, nil, "ts", "show", v1+"record.xml")
}

// A token answers one request: nonce, imprint and policy.
func answers(t *testing.T, m *machine, token, query string, want pki.Verdict) {
	t.Helper()
	o := yinjian(t, "ts", "verify", "--anchors", m.dir, "--crls", m.dir, "--query", query, "-o", "json", token)
	var r evidence.Report
	if err := json.Unmarshal([]byte(o.stdout), &r); err != nil || r.Verdict != want {
		t.Errorf("%v: %s, want %s: %v", err, r.Verdict, want, o)
	}
}

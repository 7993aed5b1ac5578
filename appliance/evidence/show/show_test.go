package show_test

import (
	"bytes"
	"crypto"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"yinjian/appliance/evidence"
	"yinjian/appliance/evidence/show"
	"yinjian/appliance/pki"
	"yinjian/appliance/problem"
)

const recorded = "../testdata/"

func read(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(recorded + name)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// No more than the limit is read of a file, whatever it is and wherever it comes from.
func TestReadFile(t *testing.T) {
	t.Parallel()
	if b, err := show.ReadFile("-", strings.NewReader("12345678"), 8); err != nil || string(b) != "12345678" {
		t.Errorf("%q, %v", b, err)
	}
	if _, err := show.ReadFile("-", strings.NewReader("123456789"), 8); err == nil {
		t.Error("more than the limit is read")
	}
	if _, err := show.ReadFile("/dev/zero", nil, 1<<20); err == nil {
		t.Error("a file without end is read")
	}
	if _, err := show.ReadFile(recorded+"absent", nil, 8); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("absent: %v", err)
	}
}

// What a forger wrote into evidence does not act on the terminal of who reads the verdict.
func TestPrintIsPlain(t *testing.T) {
	t.Parallel()
	const forged = "\x1b[2J\r\n结论 verdict: valid\u202e\u200b\x07\u2028\x9b1A"
	var out bytes.Buffer
	show.Print(&out, &evidence.Report{
		Verdict: pki.Invalid, Summary: "无效", Signer: forged, Statements: []string{forged},
		Checks: []pki.Check{{ID: evidence.CheckFormat, Status: pki.Failed, Detail: forged}},
	})
	if n := strings.Count(out.String(), "\n"); n != 5 || strings.ContainsFunc(out.String(), func(r rune) bool { return r != '\n' && problem.Misleads(r) }) {
		t.Errorf("%d lines: %q", n, out.String())
	}
	if got := show.Plain("华佗 ± <a> ✓"); got != "华佗 ± <a> ✓" {
		t.Errorf("%q", got)
	}
}

// An anchor that should be signed by its own key and is not is a damaged file; one of another issuer is as it is.
func TestDamagedAnchor(t *testing.T) {
	t.Parallel()
	whole := read(t, "anchors.pem")
	name := filepath.Join(t.TempDir(), "anchors.pem")
	for i := 0; i < len(whole); i += 9 {
		changed := bytes.Clone(whole)
		if changed[i]++; whole[i] == '\n' || changed[i] > 'z' {
			continue // white space, or no base64
		}
		if err := os.WriteFile(name, changed, 0o600); err != nil {
			t.Fatal(err)
		}
		// Without its first line a certificate is words, and there is an anchor less.
		if trust, err := show.LoadTrust(name, ""); err == nil && len(trust.Anchors) == 2 {
			t.Errorf("byte %d, %q to %q, is taken", i, whole[i], changed[i])
		}
	}
}

// FuzzTrust: anchors and log keys that are taken are CAs in form, and whatever they are, evidence under a key that is not
// the log's is not valid.
func FuzzTrust(f *testing.F) {
	anchors, key := read(f, "anchors.pem"), read(f, "log.pem")
	f.Add(anchors, key)
	f.Add(anchors[:len(anchors)/2], key)
	f.Add(key, anchors)
	f.Add([]byte("-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n"), []byte("-----BEGIN PUBLIC KEY-----\nMAA=\n-----END PUBLIC KEY-----\n"))
	b, err := evidence.Parse(read(f, "bundle-raw-sm2.json"))
	if err != nil {
		f.Fatal(err)
	}
	own, err := show.LoadTrust(recorded+"anchors.pem", recorded+"log.pem")
	if err != nil {
		f.Fatal(err)
	}
	document := evidence.Input{Document: read(f, "document.xml")}
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, anchors, key []byte) {
		names := [2]string{filepath.Join(dir, "anchors"), filepath.Join(dir, "key")}
		for i, data := range [][]byte{anchors, key} {
			if err := os.WriteFile(names[i], data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		trust, err := show.LoadTrust(names[0], names[1])
		if err != nil {
			return
		}
		for _, c := range trust.Anchors {
			if !c.IsCA {
				t.Errorf("%s is an anchor", c.Subject)
			}
		}
		same, _ := trust.LogKeys[0].(interface{ Equal(crypto.PublicKey) bool })
		if r := evidence.Verify(b, trust, document); r.Verdict == pki.Valid && (same == nil || !same.Equal(own.LogKeys[0])) {
			t.Errorf("valid under the log key %s", key)
		}
	})
}

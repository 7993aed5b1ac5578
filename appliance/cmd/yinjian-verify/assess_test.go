package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A file that says it is an evaluator's pack is judged as one, by itself and in a folder; what is none is invalid.
func TestPackIsJudgedAsOne(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	name := filepath.Join(dir, "pack.json")
	if err := os.WriteFile(name, []byte(`{"format":"yinjian-assessment/1"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{name, dir} {
		var out, errs bytes.Buffer
		status := run([]string{"--anchors", v1, "--log-key", v1 + "log.pem", "--nonce", "0123456789abcdef", "-o", "json", path}, strings.NewReader(""), &out, &errs)
		if status != exitInvalid || !strings.Contains(out.String(), "assess: the pack") {
			t.Errorf("%s: status %d: %s%s", path, status, &out, &errs)
		}
	}
	for name, args := range map[string][]string{
		"a nonce for a token":            {"--nonce", "0123456789abcdef", "--token", v1 + "token-sm2.tsr"},
		"a nonce for a file of evidence": {"--nonce", "0123456789abcdef", "--log-key", v1 + "log.pem", v1 + "evidence.json"},
	} {
		status, r := judge(t, append([]string{"--anchors", v1}, args...)...)
		if status == exitValid || len(r.Checks) > 0 && status != exitInvalid {
			t.Errorf("%s: status %d", name, status)
		}
	}
}

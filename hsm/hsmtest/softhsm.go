package hsmtest

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// SoftHSMModule is Debian's SoftHSM2.
const SoftHSMModule = "/usr/lib/softhsm/libsofthsm2.so"

// A SoftHSM is a folder of SoftHSM2 with one token, for programs of their own: it reads SOFTHSM2_CONF at C_Initialize,
// once for a process.
type SoftHSM struct {
	Label, PIN, SOPIN string
	Env               []string // of a program that is to see the token
}

// NewSoftHSM2 makes a folder, and a token in it with softhsm2-util.
func NewSoftHSM2(t testing.TB, label string) SoftHSM {
	t.Helper()
	util, err := exec.LookPath("softhsm2-util")
	if _, missing := os.Stat(SoftHSMModule); err != nil || missing != nil {
		t.Skip("SoftHSM2 is not installed (Debian softhsm2)")
	}
	dir := t.TempDir()
	conf := filepath.Join(dir, "softhsm2.conf")
	if err := os.Mkdir(filepath.Join(dir, "tokens"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(conf, []byte("directories.tokendir = "+dir+"/tokens\nlog.level = ERROR\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	s := SoftHSM{Label: label, PIN: "123456", SOPIN: "87654321", Env: append(os.Environ(), "SOFTHSM2_CONF="+conf)}
	cmd := exec.Command(util, "--init-token", "--free", "--label", label, "--so-pin", s.SOPIN, "--pin", s.PIN)
	cmd.Env = s.Env
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("softhsm2-util: %v\n%s", err, out)
	}
	return s
}

package main_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"yinjian/hsm/hsmtest"
	"yinjian/hsm/pkcs11"
)

// TestProbe: what the command prints, and what it exits with, for each outcome that a script may meet; hsm/probe tests
// what is found out.
func TestProbe(t *testing.T) {
	t.Parallel()
	s := hsmtest.NewSoftHSM2(t, "probed")
	dir := t.TempDir()
	write := func(name, text string) string {
		t.Helper()
		name = filepath.Join(dir, name)
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return name
	}
	right, wrong := write("right", s.PIN+"\n"), write("wrong", "000000\n")
	rsa := "name = %q\nsources = [\"this test\"]\ntried = \"no\"\n[keys.rsa-2048]\nmechanism = 0\nkey_type = 0\nsend_key_type = false\n" +
		"[operations.rsa-pkcs1-sha256]\nmechanism = 1\ninput = \"digest-info\"\nparameter = \"none\"\n[operations.%s]\nmechanism = 0x1087\nparameter = %q\n"
	one, other := write("one.toml", fmt.Sprintf(rsa, "one", "sm4-gcm", "gcm")), write("other.toml", fmt.Sprintf(rsa, "other", "sm2-wrap", "none"))
	compiled := func(name, body string) string {
		t.Helper()
		source, module := write(name+".c", "#include <unistd.h>\nunsigned long C_GetFunctionList(void *list) { "+body+" }\n"), filepath.Join(dir, name+".so")
		if out, err := exec.Command("cc", "-shared", "-fPIC", "-o", module, source).CombinedOutput(); err != nil {
			t.Skipf("cc: %v\n%s", err, out)
		}
		return module
	}
	probe := func(code int, says string, args ...string) outcome {
		t.Helper()
		o := command(t, s.Env, append([]string{built.binary, "hsm", "probe", "--measure", "1ms", "--max-sessions", "2"}, args...)...)
		if o.code != code || !strings.Contains(o.stdout+o.stderr, says) {
			t.Errorf("hsm probe %s: want exit %d and %q: %v", strings.Join(args, " "), code, says, o)
		}
		return o
	}
	softHSM := []string{"--module", hsmtest.SoftHSMModule, "--token-label", "probed"}
	with := func(args ...string) []string { return append(append([]string(nil), softHSM...), args...) }

	probe(0, "相符的档案是 softhsm2", with("--pin-file", right)...)
	probe(0, "未给 --pin-file", with()...)
	var report pkcs11.ProbeReport
	if err := json.Unmarshal([]byte(probe(0, "", with("--pin-file", right, "-o", "json")...).stdout), &report); err != nil || report.Profile != "softhsm2" || report.SM1 != "unavailable" {
		t.Errorf("JSON: %+v, %v", report, err)
	}
	probe(1, "no such file", "--module", filepath.Join(dir, "none.so"))
	probe(2, "--slot x", "--module", hsmtest.SoftHSMModule, "--slot", "x")
	probe(2, "token-label", with("--slot", "1")...)
	probe(2, `"nobody"`, with("--profile", "nobody")...)
	probe(3, "没有档案相符", with("--pin-file", right, "--profile", "tass")...)
	probe(4, "0x1087", with("--pin-file", right, "--profile", one, "--profile", other)...)
	probe(5, "crashed (SIGSEGV) in C_GetFunctionList", "--module", compiled("crash", "*(volatile int *)8 = 1; return 0;"))
	probe(6, "did not return from C_GetFunctionList", "--module", compiled("hang", "for (;;) pause();"), "--deadline", "10s")
	probe(7, "CKR_PIN_INCORRECT", with("--pin-file", wrong)...)
}

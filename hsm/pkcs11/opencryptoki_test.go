package pkcs11_test

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"yinjian/hsm"
	"yinjian/hsm/pkcs11"
)

const opencryptoki = "/usr/lib/x86_64-linux-gnu/pkcs11/libopencryptoki.so"

// TestOpenCryptoki drives the software token of openCryptoki through its profile. The token lives in the system's own
// folders and is served by pkcsslotd, so the test asks for one that was made for it: YINJIAN_OPENCRYPTOKI is the token's
// label and user PIN, "label:PIN". How it is made: docs/hsm.md.
func TestOpenCryptoki(t *testing.T) {
	label, pin, given := strings.Cut(os.Getenv("YINJIAN_OPENCRYPTOKI"), ":")
	if !given {
		t.Skip("YINJIAN_OPENCRYPTOKI names no token")
	}
	if out, err := exec.Command("pkcsconf", "-s").CombinedOutput(); err != nil {
		t.Skipf("pkcsslotd does not run: %s", out)
	}
	cfg := pkcs11.Config{Module: opencryptoki, TokenLabel: label, PIN: []byte(pin), Profile: shipped("opencryptoki"), MaxSessions: 8, Log: quiet()}
	tok := open(t, cfg)
	ctx := t.Context()
	_ = tok.DestroyKey(ctx, "k") // of a run before
	info := generate(t, tok, "k", hsm.RSA2048)
	if !info.Sensitive || info.Extractable {
		t.Errorf("GenerateKey = %+v", info)
	}
	if err := signRSA(ctx, tok, info, "one"); err != nil {
		t.Error(err)
	}
	signPSS(t, tok, "k")
	if _, err := tok.GenerateKey(ctx, hsm.KeySpec{Label: "s", Algorithm: hsm.SM2}); hsm.ClassifyError(err) != hsm.ClassPermanent {
		t.Errorf("an SM2 key: %v", err)
	}
	if err := tok.DestroyKey(ctx, "k"); err != nil {
		t.Error(err)
	}
	tok.Close()

	// The wrong profile, before the PIN is presented.
	cfg.Profile = shipped("neutral")
	cfg.BeforeLogin = func() { t.Error("PIN presented") }
	if _, err := pkcs11.Open(ctx, cfg); err == nil || !strings.Contains(err.Error(), "operations.hmac-sm3: 密码机没有机制 0xfffff009") {
		t.Errorf("the neutral profile: %v", err)
	}
}

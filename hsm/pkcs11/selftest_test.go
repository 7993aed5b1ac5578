package pkcs11_test

import (
	"bytes"
	"slices"
	"testing"

	"yinjian/hsm"
	"yinjian/hsm/hsmtest"
	"yinjian/hsm/pkcs11"
)

func results(t *testing.T, token hsm.SelfTester) map[string]string {
	t.Helper()
	tests, err := token.SelfTest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for _, r := range tests {
		out[r.Algorithm] = r.Result
		if r.Result != hsm.SelfTestPassed && r.Detail == "" || r.Basis == "" {
			t.Errorf("%+v: neither basis nor reason", r)
		}
	}
	return out
}

// A token tries what it offers against published vectors, through a worker too, says what it has not, and nothing stays on it.
func TestSelfTest(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	tok := open(t, m.cfg)
	defer tok.Close()
	generate(t, tok, "k", hsm.SM2)
	before, err := tok.Keys(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	w := m.startWorker(t)
	for name, token := range map[string]hsm.SelfTester{"direct": tok, "worker": w} {
		got := results(t, token)
		for _, algorithm := range []string{"SM3", "SHA-256", "HMAC-SM3", "SM4-ECB", "SM4-CBC", "SM2", "RSA-2048"} {
			if got[algorithm] != hsm.SelfTestPassed {
				t.Errorf("%s, %s: %q", name, algorithm, got[algorithm])
			}
		}
		if got["SM1"] != hsm.SelfTestUnavailable {
			t.Errorf("%s, SM1: %q", name, got["SM1"])
		}
	}
	after, err := tok.Keys(t.Context())
	if err != nil || len(after) != len(before) {
		t.Errorf("%d keys, %v; before %d", len(after), err, len(before))
	}
	if _, err := tok.Do(t.Context(), "k", hsm.SignSM2E, bytes.Repeat([]byte{1}, 32)); err != nil {
		t.Error("afterwards:", err)
	}
}

// A token without SM algorithms says so, and goes on.
func TestSelfTestOfSoftHSM(t *testing.T) {
	t.Parallel()
	tok := open(t, newToken(t))
	defer tok.Close()
	got := results(t, tok)
	for algorithm, want := range map[string]string{"SHA-256": hsm.SelfTestPassed, "RSA-2048": hsm.SelfTestPassed, "SM3": hsm.SelfTestUnavailable, "SM4-ECB": hsm.SelfTestUnavailable} {
		if got[algorithm] != want {
			t.Errorf("%s: %q, want %q", algorithm, got[algorithm], want)
		}
	}
}

// A machine that hashes wrongly is named as failed: here SHA-256 stands in the profile for SM3.
func TestSelfTestFindsWrongAnswers(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.cfg.Profile = hsmtest.Profile(t, "neutral")
	pkcs11.SetSM3(&m.cfg.Profile, 0x0250)
	tok := open(t, m.cfg)
	defer tok.Close()
	tests, err := tok.SelfTest(t.Context())
	if err != nil || !slices.ContainsFunc(tests, func(r hsm.SelfTest) bool { return r.Algorithm == "SM3" && r.Result == hsm.SelfTestFailed }) {
		t.Errorf("%+v, %v", tests, err)
	}
}

// What the token says of a key's birth is read back, through a worker too: one that was made there, and one that was brought.
func TestKeyBirth(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	install(t, m.cfg, "officer-pin", "kek/1", randomBytes(16))
	tok := open(t, m.cfg)
	defer tok.Close()
	generate(t, tok, "k", hsm.SM2)
	for name, token := range map[string]hsm.Token{"direct": tok, "worker": m.startWorker(t)} {
		keys, err := token.Keys(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		seen := map[string]bool{}
		for _, k := range keys {
			if k.AlwaysSensitive == nil || k.Local == nil {
				t.Fatalf("%s: %+v", name, k)
			}
			seen[k.Label] = *k.AlwaysSensitive && *k.Local
		}
		if !seen["k"] || seen["kek/1"] || len(seen) != 2 {
			t.Errorf("%s: %v", name, seen)
		}
	}
}

package softtoken_test

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"testing"

	"github.com/miekg/pkcs11"
)

const ckaUses = 0x80594A01

// The machine counts the signatures of each private key, by whichever program, over restarts and kills; nobody can set
// the count through the interface, and what is no private key has none.
func TestUsesAreCounted(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	module := m.copyModule(t)
	run := func(args ...string) {
		tool(t, nil, "pkcs11-tool", append([]string{"--module", module, "--slot", "0"}, args...)...)
	}
	run("--init-token", "--so-pin", soPIN, "--label", "hospital")
	run("--init-pin", "--login", "--login-type", "so", "--so-pin", soPIN, "--new-pin", userPIN)
	run("--login", "--pin", userPIN, "--keypairgen", "--key-type", "rsa:2048", "--label", "a", "--id", "01")
	run("--login", "--pin", userPIN, "--keypairgen", "--key-type", "rsa:2048", "--label", "b", "--id", "02")
	msg := filepath.Join(t.TempDir(), "m")
	must(t, os.WriteFile(msg, []byte("message"), 0o600))
	sign := func(id string) {
		run("--login", "--pin", userPIN, "--sign", "-m", "SHA256-RSA-PKCS", "--id", id, "-i", msg, "-o", filepath.Join(t.TempDir(), "s"))
	}
	count := func(label string) uint64 {
		t.Helper()
		p := m.module(t)
		s := openRW(t, p, 0)
		must(t, p.Login(s, pkcs11.CKU_USER, userPIN))
		must(t, p.FindObjectsInit(s, []*pkcs11.Attribute{attr(pkcs11.CKA_LABEL, label), attr(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY)}))
		found, _, err := p.FindObjects(s, 2)
		must(t, err)
		must(t, p.FindObjectsFinal(s))
		if len(found) != 1 {
			t.Fatalf("%d keys", len(found))
		}
		got, err := p.GetAttributeValue(s, found[0], []*pkcs11.Attribute{{Type: ckaUses}})
		must(t, err)
		if err := p.SetAttributeValue(s, found[0], []*pkcs11.Attribute{attr(ckaUses, 0)}); err == nil {
			t.Error("the count can be set")
		}
		must(t, p.FindObjectsInit(s, []*pkcs11.Attribute{attr(pkcs11.CKA_LABEL, label), attr(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY)}))
		public, _, err := p.FindObjects(s, 1)
		must(t, err)
		must(t, p.FindObjectsFinal(s))
		if a, err := p.GetAttributeValue(s, public[0], []*pkcs11.Attribute{{Type: ckaUses}}); err == nil {
			t.Errorf("a public key has the count %v", a)
		}
		return binary.NativeEndian.Uint64(got[0].Value)
	}
	for range 3 {
		sign("01")
	}
	if a, b := count("a"), count("b"); a != 3 || b != 0 {
		t.Errorf("counts %d and %d, want 3 and 0", a, b)
	}
	m.restart(t)
	sign("02")
	sign("01")
	if a, b := count("a"), count("b"); a != 4 || b != 1 {
		t.Errorf("after a restart: counts %d and %d, want 4 and 1", a, b)
	}
}

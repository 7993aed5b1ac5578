package softtoken_test

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/sm3"
	"github.com/miekg/pkcs11"
)

func itoa(n int) string { return strconv.Itoa(n) }

// TestPKCS11Tool drives the module with OpenSC's pkcs11-tool, from the empty token to a signature that OpenSSL
// verifies. pkcs11-tool 0.23 knows no SM2 curve, so the SM2 key is made through the library and used by the tool.
func TestPKCS11Tool(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	module := m.copyModule(t)
	run := func(args ...string) string {
		return tool(t, nil, "pkcs11-tool", append([]string{"--module", module, "--slot", "0"}, args...)...)
	}
	user := []string{"--login", "--pin", userPIN}
	contains := func(out string, wants ...string) {
		t.Helper()
		for _, want := range wants {
			if !strings.Contains(out, want) {
				t.Errorf("pkcs11-tool does not say %q:\n%s", want, out)
			}
		}
	}
	contains(run("-L"), "EVALUATION ONLY", "uninitialized")
	contains(run("-M"), "ECDSA-KEY-PAIR-GEN", "0xFFFFF003", "SHA256-RSA-PKCS", "RSA-PKCS-PSS")
	contains(run("--init-token", "--so-pin", soPIN, "--label", "hospital"), "successfully initialized")
	contains(run("--init-pin", "--login", "--login-type", "so", "--so-pin", soPIN, "--new-pin", userPIN), "successfully initialized")
	contains(run("-L"), "hospital", "soft-evaluation", "PIN initialized")
	contains(run(append(user, "--keypairgen", "--key-type", "rsa:2048", "--label", "r", "--id", "01")...), "Private Key Object; RSA", "never extractable")
	contains(run(append(user, "--keygen", "--key-type", "GENERIC:32", "--label", "m", "--id", "03", "--sensitive", "--private")...), "Secret Key Object")

	p := m.module(t)
	s := openRW(t, p, 0)
	must(t, p.Login(s, pkcs11.CKU_USER, userPIN))
	pub, _, err := p.GenerateKeyPair(s, mech(pkcs11.CKM_EC_KEY_PAIR_GEN, nil),
		[]*pkcs11.Attribute{attr(pkcs11.CKA_TOKEN, true), attr(pkcs11.CKA_LABEL, "e"), attr(pkcs11.CKA_ID, []byte{2}), attr(pkcs11.CKA_EC_PARAMS, sm2OID)},
		[]*pkcs11.Attribute{attr(pkcs11.CKA_TOKEN, true), attr(pkcs11.CKA_LABEL, "e"), attr(pkcs11.CKA_ID, []byte{2})})
	must(t, err)
	contains(run(append(user, "-O")...), "Private Key Object; RSA", "Private Key Object; EC", "Public Key Object; EC")
	if out := run("-O"); strings.Contains(out, "Private Key") || strings.Contains(out, "Secret Key") {
		t.Errorf("without a login pkcs11-tool sees\n%s", out)
	}

	dir := t.TempDir()
	msg, sig, key := filepath.Join(dir, "m"), filepath.Join(dir, "s"), filepath.Join(dir, "k")
	must(t, os.WriteFile(msg, []byte(strings.Repeat("message ", 4000)), 0o600))
	run(append(user, "--sign", "-m", "SHA256-RSA-PKCS", "--id", "01", "-i", msg, "-o", sig)...)
	run("--read-object", "--type", "pubkey", "--id", "01", "-o", key)
	contains(tool(t, nil, "openssl", "dgst", "-sha256", "-verify", key, "-keyform", "DER", "-signature", sig, msg), "Verified OK")

	digest, whole := filepath.Join(dir, "d"), filepath.Join(dir, "m")
	tool(t, nil, "openssl", "dgst", "-sha256", "-binary", "-out", digest, whole)
	run(append(user, "--sign", "-m", "RSA-PKCS-PSS", "--hash-algorithm", "SHA256", "--mgf", "MGF1-SHA256", "--salt-len", "32", "--id", "01", "-i", digest, "-o", sig)...)
	contains(tool(t, nil, "openssl", "dgst", "-sha256", "-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:32", "-verify", key, "-keyform", "DER",
		"-signature", sig, whole), "Verified OK")

	e := sm3.Sum([]byte("e"))
	must(t, os.WriteFile(msg, e[:], 0o600))
	run(append(user, "--sign", "-m", "ECDSA", "--id", "02", "-i", msg, "-o", sig)...)
	raw, err := os.ReadFile(sig)
	must(t, err)
	if len(raw) != 64 || !sm2.VerifyASN1(sm2Public(t, p, s, pub), e[:], derOf(raw)) {
		t.Errorf("SM2 signature by pkcs11-tool: %x", raw)
	}
	contains(run(append(user, "--test")...), "No errors")
	contains(run("--login", "--pin", userPIN, "--change-pin", "--new-pin", "another-pin"), "successfully changed")
	run("--login", "--pin", "another-pin", "--delete-object", "--type", "privkey", "--id", "01")
}

package softtoken_test

import (
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"io"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/miekg/pkcs11"
)

// tokenSigner is an RSA key of the token, to make a certificate with.
type tokenSigner struct {
	p   *pkcs11.Ctx
	s   pkcs11.SessionHandle
	key pkcs11.ObjectHandle
	pub *rsa.PublicKey
}

func (k tokenSigner) Public() crypto.PublicKey { return k.pub }

func (k tokenSigner) Sign(_ io.Reader, digest []byte, _ crypto.SignerOpts) ([]byte, error) {
	prefix := []byte{0x30, 0x31, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01, 0x05, 0x00, 0x04, 0x20} // RFC 8017 §9.2
	return sign(k.p, k.s, mech(pkcs11.CKM_RSA_PKCS, nil), k.key, append(prefix, digest...))
}

// TestSunPKCS11 has Java sign with a key of the token and with one it generates.
func TestSunPKCS11(t *testing.T) {
	t.Parallel()
	m, p, s := loggedIn(t)
	pub, priv := generateRSA(t, p, s, "r")
	must(t, p.SetAttributeValue(s, priv, []*pkcs11.Attribute{attr(pkcs11.CKA_ID, []byte{1})}))
	key := &rsa.PublicKey{N: new(big.Int).SetBytes(value(t, p, s, pub, pkcs11.CKA_MODULUS)), E: 65537}
	templ := &x509.Certificate{
		SerialNumber: big.NewInt(1 << 62), Subject: pkix.Name{CommonName: "r"},
		NotBefore: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC), NotAfter: time.Date(2036, 1, 1, 0, 0, 0, 0, time.UTC),
		SignatureAlgorithm: x509.SHA256WithRSA,
	}
	der, err := x509.CreateCertificate(nil, templ, templ, key, tokenSigner{p, s, priv, key})
	must(t, err)
	cert, err := x509.ParseCertificate(der)
	must(t, err)
	serial := []byte{0x02, 0x08, 0x40, 0, 0, 0, 0, 0, 0, 0}
	_, err = p.CreateObject(s, []*pkcs11.Attribute{
		attr(pkcs11.CKA_CLASS, pkcs11.CKO_CERTIFICATE), attr(pkcs11.CKA_CERTIFICATE_TYPE, pkcs11.CKC_X_509), attr(pkcs11.CKA_TOKEN, true),
		attr(pkcs11.CKA_LABEL, "r"), attr(pkcs11.CKA_ID, []byte{1}), attr(pkcs11.CKA_SUBJECT, cert.RawSubject), attr(pkcs11.CKA_ISSUER, cert.RawIssuer),
		attr(pkcs11.CKA_SERIAL_NUMBER, serial), attr(pkcs11.CKA_VALUE, der),
	})
	must(t, err)

	dir := t.TempDir()
	config, message, sig := filepath.Join(dir, "p11.cfg"), filepath.Join(dir, "message"), filepath.Join(dir, "signature")
	must(t, os.WriteFile(config, []byte("name = yinjian\nslot = 0\nlibrary = "+m.copyModule(t)+"\n"), 0o600))
	text := []byte(strings.Repeat("病历 ", 5000))
	must(t, os.WriteFile(message, text, 0o600))
	out := tool(t, nil, "java", "testdata/Sign.java", config, userPIN, message, sig)
	for _, want := range []string{"key store signs", "PSS signs", "token verifies", "generated key signs"} {
		if !strings.Contains(out, want) {
			t.Errorf("Java does not say %q:\n%s", want, out)
		}
	}
	raw, err := os.ReadFile(sig)
	must(t, err)
	sum := sha256.Sum256(text)
	if err := rsa.VerifyPKCS1v15(key, crypto.SHA256, sum[:], raw); err != nil {
		t.Errorf("Java's signature: %v", err)
	}
	t.Log(out)
}

package pki_test

import (
	"bytes"
	"crypto"
	"crypto/rsa"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"math/big"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/emmansun/gmsm/smx509"

	"yinjian/appliance/pki"
)

func TestParseCertificateStrict(t *testing.T) {
	t.Parallel()
	ca := issue(t, caTemplate("CA"), nil, rsaKeys[0]()) // RSA: lengths do not vary from run to run
	good := ca.cert.Raw
	for name, der := range map[string][]byte{
		"nothing":                       nil,
		"trailing byte":                 append(good[:len(good):len(good)], 0),
		"bytes after the signature":     insideOuter(good, 5, 0),
		"unused bits in the signature":  flip(good, len(good)-257, 1),
		"over the limit":                make([]byte, pki.MaxCertificateSize+1),
		"signature algorithm truncated": good[:len(good)/2],
	} {
		if _, err := pki.ParseCertificate(der); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	if c, err := pki.ParseCertificate(good); err != nil || !bytes.Equal(c.Raw, good) {
		t.Errorf("good one refused: %v", err)
	}
}

func flip(der []byte, i int, x byte) []byte {
	out := append([]byte{}, der...)
	out[i] ^= x
	return out
}

// smx509 takes explicit curve parameters and ignores the base point in them (CVE-2020-0601's way in); we refuse them.
// The certificate is gmsm's own test vector.
func TestParseCertificateExplicitCurve(t *testing.T) {
	t.Parallel()
	der := readModuleFile(t, "explicit_curve_cert.der")
	if _, err := smx509.ParseCertificate(der); err != nil {
		t.Fatalf("smx509 now refuses it too: %v", err)
	}
	if _, err := pki.ParseCertificate(der); err == nil {
		t.Error("explicit curve parameters taken")
	}
}

func TestCertificatePEM(t *testing.T) {
	t.Parallel()
	a, b := issue(t, caTemplate("A"), nil, sm2Key(t)), issue(t, caTemplate("B"), nil, sm2Key(t))
	both := pki.EncodeCertificatePEMs(a.cert, b.cert)
	got, err := pki.ParseCertificatePEMs(append([]byte("subject=A\n"), both...))
	if err != nil || len(got) != 2 || !got[0].Equal(a.cert) || !got[1].Equal(b.cert) {
		t.Fatalf("%d certificates, %v", len(got), err)
	}
	first := pki.EncodeCertificatePEMs(a.cert)
	for name, data := range map[string][]byte{
		"nothing":         nil,
		"only words":      []byte("no certificate here"),
		"a key":           pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte{1}}),
		"truncated":       both[:len(both)-40],
		"first damaged":   append(bytes.Replace(first, []byte("M"), []byte("*"), 1), first...),
		"headers":         pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Headers: map[string]string{"A": "b"}, Bytes: a.cert.Raw}),
		"not a cert":      pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte{0x30, 0}}),
		"over the limit":  make([]byte, pki.MaxPEMSize+1),
		"too many blocks": bytes.Repeat([]byte("-----BEGIN CERTIFICATE-----\n"), pki.MaxPEMCertificates+1),
	} {
		if _, err := pki.ParseCertificatePEMs(data); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
}

func TestLintLeaf(t *testing.T) {
	t.Parallel()
	ca := issue(t, caTemplate("CA"), nil, sm2Key(t))
	type T = *smx509.Certificate
	for name, tt := range map[string]struct {
		spoil   func(T)
		purpose pki.Purpose
		want    string // IDs, in order
	}{
		"good":                   {func(T) {}, pki.StaffSigning, ""},
		"good TSA":               {tsa, pki.TimeStamping, ""},
		"short serial":           {func(c T) { c.SerialNumber = big.NewInt(0x7fffffffffff) }, pki.StaffSigning, "serial"},
		"zero serial":            {func(c T) { c.SerialNumber = new(big.Int) }, pki.StaffSigning, "serial"},
		"8 bytes will do":        {func(c T) { c.SerialNumber = big.NewInt(0x7fffffffffffffff) }, pki.StaffSigning, ""},
		"20 bytes will do":       {func(c T) { c.SerialNumber = new(big.Int).Lsh(big.NewInt(1), 158) }, pki.StaffSigning, ""},
		"21 bytes":               {func(c T) { c.SerialNumber = new(big.Int).Lsh(big.NewInt(1), 159) }, pki.StaffSigning, "serial"},
		"empty basicConstraints": {func(c T) { c.BasicConstraintsValid, c.MaxPathLen = true, -1 }, pki.StaffSigning, "basic_constraints"},
		"keyUsage not critical": {func(c T) {
			c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 15}, Value: []byte{3, 2, 6, 0xc0}})
		}, pki.StaffSigning, "key_usage"},
		"no keyUsage":        {func(c T) { c.KeyUsage = 0 }, pki.TLSClient, "key_usage ext_key_usage"},
		"commitment only":    {func(c T) { c.KeyUsage = smx509.KeyUsageContentCommitment }, pki.StaffSigning, "key_usage"},
		"no name":            {func(c T) { c.Subject = pkix.Name{} }, pki.StaffSigning, "subject"},
		"backwards":          {func(c T) { c.NotBefore, c.NotAfter = c.NotAfter, c.NotBefore }, pki.StaffSigning, "validity"},
		"server, no name":    {func(c T) { c.KeyUsage = 1; c.ExtraExtensions = []pkix.Extension{eku(false, ekuServer)} }, pki.TLSServer, "subject_alt_name"},
		"timestamp and more": {func(c T) { c.ExtraExtensions = []pkix.Extension{eku(true, ekuTime, ekuClient)} }, pki.TimeStamping, "ext_key_usage"},
		"timestamp, lax":     {func(c T) { c.ExtraExtensions = []pkix.Extension{eku(false, ekuTime)} }, pki.TimeStamping, "ext_key_usage"},
		"unknown critical": {func(c T) {
			c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 999, 9}, Critical: true, Value: []byte{5, 0}}}
		}, pki.StaffSigning, "critical"},
		"staff for log": {func(T) {}, pki.LogSigning, "key_usage ext_key_usage"},
		"malformed usage": {func(c T) {
			c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 37}, Value: []byte{0x30, 0}}}
		}, pki.StaffSigning, "ext_key_usage"},
		"purpose not invented": {func(T) {}, "love", "purpose"},
	} {
		tmpl := staffTemplate("leaf")
		tt.spoil(tmpl)
		var ids []string
		for _, p := range pki.LintLeaf(issue(t, tmpl, ca, sm2Key(t)).cert, tt.purpose) {
			ids = append(ids, p.ID)
		}
		if got := strings.Join(ids, " "); got != tt.want {
			t.Errorf("%s: %q, want %q", name, got, tt.want)
		}
	}
	if ps := pki.LintLeaf(issue(t, base("self"), nil, sm2Key(t)).cert, pki.StaffSigning); len(ps) == 0 {
		t.Error("no AKI, no keyUsage: nothing found")
	}
}

// Whatever fits one purpose fits no other (TLS's two sides excepted, where a peer has both).
func TestPurposesExcludeOneAnother(t *testing.T) {
	t.Parallel()
	ca := issue(t, caTemplate("CA"), nil, sm2Key(t))
	sign, commit := smx509.KeyUsageDigitalSignature, smx509.KeyUsageContentCommitment
	leafs := map[pki.Purpose]*smx509.Certificate{pki.CertificateAuthority: ca.cert}
	for p, usage := range map[pki.Purpose]smx509.KeyUsage{pki.StaffSigning: sign | commit, pki.TimeStamping: sign | commit,
		pki.LogSigning: sign, pki.TLSServer: sign, pki.TLSClient: sign} {
		tmpl := base(string(p))
		tmpl.KeyUsage = usage
		if ext, ok := pki.ExtKeyUsageExtension(p); ok {
			tmpl.ExtraExtensions = []pkix.Extension{ext}
		}
		leafs[p] = issue(t, tmpl, ca, sm2Key(t)).cert
	}
	for is, cert := range leafs {
		for asked := range leafs {
			err := pki.CheckPurpose(cert, asked)
			if (err == nil) != (is == asked) {
				t.Errorf("%s as %s: %v", is, asked, err)
			}
			var pe *pki.PurposeError
			if err != nil && (!errors.As(err, &pe) || pe.Purpose != asked || len(pe.Problems) == 0) {
				t.Errorf("%s as %s: %#v", is, asked, err)
			}
		}
	}
}

func TestCheckPublicKey(t *testing.T) {
	t.Parallel()
	odd := func(bits int) *big.Int { return new(big.Int).SetBit(big.NewInt(1), bits-1, 1) }
	for name, pub := range map[string]crypto.PublicKey{
		"nil":                nil,
		"RSA-2047":           &rsa.PublicKey{N: odd(2047), E: 65537},
		"RSA-16384":          &rsa.PublicKey{N: odd(16384), E: 65537},
		"exponent 3":         &rsa.PublicKey{N: odd(2048), E: 3},
		"even exponent":      &rsa.PublicKey{N: odd(2048), E: 65538},
		"even modulus":       &rsa.PublicKey{N: new(big.Int).Lsh(big.NewInt(1), 2047), E: 65537},
		"a string, for once": "key",
	} {
		if pki.CheckPublicKey(pub) == nil {
			t.Errorf("%s: taken", name)
		}
	}
	for _, k := range []crypto.Signer{sm2Key(t), rsaKeys[0]()} {
		if err := pki.CheckPublicKey(k.Public()); err != nil {
			t.Error(err)
		}
	}
}

// moduleDir is where a required module's source lies.
func moduleDir(t testing.TB, module string) string {
	t.Helper()
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", module).Output()
	dir := strings.TrimSpace(string(out))
	if err != nil || dir == "" {
		t.Skipf("go list -m %s: no module source here (%v)", module, err)
	}
	return filepath.Clean(dir)
}

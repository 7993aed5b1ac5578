package pki_test

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/emmansun/gmsm/smx509"
	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"

	"yinjian/appliance/pki"
)

// certsOnly is PKCS#7 with certificates and signerInfos as given, under the content type's object identifier.
func certsOnly(kind string, signers []byte, certs ...*smx509.Certificate) []byte {
	id := must(hex.DecodeString(kind))
	var b cryptobyte.Builder
	b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1(asn1.OBJECT_IDENTIFIER, func(b *cryptobyte.Builder) { b.AddBytes(id) })
		b.AddASN1(asn1.Tag(0).ContextSpecific().Constructed(), func(b *cryptobyte.Builder) {
			b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
				b.AddASN1Int64(1)
				b.AddASN1(asn1.SET, func(*cryptobyte.Builder) {})
				b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
					b.AddASN1(asn1.OBJECT_IDENTIFIER, func(b *cryptobyte.Builder) { b.AddBytes(must(hex.DecodeString("2a864886f70d010701"))) })
				})
				b.AddASN1(asn1.Tag(0).ContextSpecific().Constructed(), func(b *cryptobyte.Builder) {
					for _, c := range certs {
						b.AddBytes(c.Raw)
					}
				})
				b.AddASN1(asn1.SET, func(b *cryptobyte.Builder) { b.AddBytes(signers) })
			})
		})
	})
	return b.BytesOrPanic()
}

const (
	pkcs7Kind = "2a864886f70d010702"   // 1.2.840.113549.1.7.2
	gm10Kind  = "2a811ccf550601040202" // 1.2.156.10197.6.1.4.2.2
)

func TestParseBundle(t *testing.T) {
	t.Parallel()
	ca := issue(t, caTemplate("CA"), nil, sm2Key(t)).cert
	leaf := issue(t, staffTemplate("leaf"), issue(t, caTemplate("CA"), nil, sm2Key(t)), sm2Key(t)).cert
	both := certsOnly(pkcs7Kind, nil, leaf, ca)
	block := func(kind string, der []byte) []byte { return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}) }
	for name, c := range map[string]struct {
		data []byte
		want []*smx509.Certificate
	}{
		"DER":                       {leaf.Raw, []*smx509.Certificate{leaf}},
		"PEM":                       {pki.EncodeCertificatePEMs(leaf, ca), []*smx509.Certificate{leaf, ca}},
		"PEM, twice the same":       {pki.EncodeCertificatePEMs(leaf, ca, leaf), []*smx509.Certificate{leaf, ca}},
		"PKCS#7":                    {both, []*smx509.Certificate{leaf, ca}},
		"PKCS#7 of GM/T 0010":       {certsOnly(gm10Kind, nil, leaf, ca), []*smx509.Certificate{leaf, ca}},
		"PKCS#7 in PEM":             {block("PKCS7", both), []*smx509.Certificate{leaf, ca}},
		"PKCS#7 under another name": {block("CERTIFICATE", both), []*smx509.Certificate{leaf, ca}},
		"base64":                    {[]byte(base64.StdEncoding.EncodeToString(leaf.Raw) + "\n"), []*smx509.Certificate{leaf}},
		"empty":                     {nil, nil},
		"words":                     {[]byte("no certificate"), nil},
		"a key in PEM":              {append(pki.EncodeCertificatePEMs(leaf), block("PRIVATE KEY", []byte{0x30, 0})...), nil},
		"a block cut off":           {append(pki.EncodeCertificatePEMs(leaf), []byte("-----BEGIN CERTIFICATE-----\nMII")...), nil},
		"bytes after DER":           {append(slices.Clone(leaf.Raw), 0), nil},
		"bytes after PKCS#7":        {append(slices.Clone(both), 0), nil},
		"signed PKCS#7":             {certsOnly(pkcs7Kind, []byte{0x30, 0}, leaf), nil},
		"PKCS#7 of nothing":         {certsOnly(pkcs7Kind, nil), nil},
		"too large":                 {make([]byte, pki.MaxBundleSize+1), nil},
	} {
		got, err := pki.ParseBundle(c.data)
		if (err == nil) != (c.want != nil) || !slices.EqualFunc(got, c.want, func(a, b *smx509.Certificate) bool { return bytes.Equal(a.Raw, b.Raw) }) {
			t.Errorf("%s: %d certificates, %v", name, len(got), err)
		}
	}
}

// OpenSSL's bundle of one hundred certificates is more than is read; of two, it is read.
func TestParseBundleOfOpenSSL(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("openssl"); err != nil {
		t.Skip("openssl is not installed")
	}
	dir := t.TempDir()
	root := issue(t, caTemplate("CA"), nil, sm2Key(t))
	for n, ok := range map[int]bool{2: true, pki.MaxBundleCertificates + 1: false} {
		var certs []*smx509.Certificate
		for range n {
			certs = append(certs, issue(t, staffTemplate("leaf"), root, sm2Key(t)).cert)
		}
		in, out := filepath.Join(dir, "in.pem"), filepath.Join(dir, "out.p7b")
		if err := os.WriteFile(in, pki.EncodeCertificatePEMs(certs...), 0o600); err != nil {
			t.Fatal(err)
		}
		for _, form := range []string{"DER", "PEM"} {
			if b, err := exec.Command("openssl", "crl2pkcs7", "-nocrl", "-certfile", in, "-outform", form, "-out", out).CombinedOutput(); err != nil {
				t.Fatalf("%v\n%s", err, b)
			}
			data, err := os.ReadFile(out)
			if err != nil {
				t.Fatal(err)
			}
			got, err := pki.ParseBundle(data)
			if (err == nil) != ok || ok && len(got) != n {
				t.Errorf("%d certificates, %s: %d, %v", n, form, len(got), err)
			}
		}
	}
}

func TestEncryptionOnly(t *testing.T) {
	t.Parallel()
	for usage, want := range map[smx509.KeyUsage]bool{
		smx509.KeyUsageKeyEncipherment | smx509.KeyUsageDataEncipherment | smx509.KeyUsageKeyAgreement: true,
		smx509.KeyUsageKeyAgreement: true, smx509.KeyUsageDigitalSignature: false,
		smx509.KeyUsageDigitalSignature | smx509.KeyUsageKeyEncipherment: false, smx509.KeyUsageCertSign: false, 0: false,
	} {
		if got := pki.EncryptionOnly(&smx509.Certificate{KeyUsage: usage}); got != want {
			t.Errorf("EncryptionOnly(%b) = %v", usage, got)
		}
	}
}

func TestCRLFile(t *testing.T) {
	t.Parallel()
	ca, other := issue(t, caTemplate("CA"), nil, sm2Key(t)), issue(t, caTemplate("CA"), nil, sm2Key(t))
	l := crlOf(t, ca, nil)
	for name, data := range map[string][]byte{
		"DER": l.Raw(), "PEM": pki.EncodeCRLPEM(l.Raw()), "base64": []byte(base64.StdEncoding.EncodeToString(l.Raw())),
	} {
		got, err := pki.ParseCRLFile(data)
		if err != nil || !bytes.Equal(got.Raw(), l.Raw()) {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if err := got.CheckIssuer(ca.cert); err != nil || got.Scope() != "" || got.Limits() != "" {
			t.Errorf("%s: %v, %q, %q", name, err, got.Scope(), got.Limits())
		}
		if err := got.CheckIssuer(other.cert); err == nil {
			t.Errorf("%s: taken under another key", name)
		}
	}
	for name, data := range map[string][]byte{
		"two": append(pki.EncodeCRLPEM(l.Raw()), pki.EncodeCRLPEM(l.Raw())...), "a certificate": pki.EncodeCertificatePEMs(ca.cert), "empty": nil,
	} {
		if _, err := pki.ParseCRLFile(data); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	part := crlOf(t, ca, idp(true, idpURI("http://a/")...))
	if part.Scope() == "" || part.Limits() != "" {
		t.Errorf("a partition: %q, %q", part.Scope(), part.Limits())
	}
}

// FuzzParseBundle holds that what is read from a CA's file stands in it, byte for byte.
func FuzzParseBundle(f *testing.F) {
	root := issue(f, caTemplate("CA"), nil, sm2Key(f))
	leaf := issue(f, staffTemplate("leaf"), root, rsaKeys[0]())
	f.Add(leaf.cert.Raw)
	f.Add(pki.EncodeCertificatePEMs(leaf.cert, root.cert))
	f.Add(certsOnly(pkcs7Kind, nil, leaf.cert, root.cert))
	f.Add(certsOnly(gm10Kind, nil, root.cert))
	f.Add([]byte(base64.StdEncoding.EncodeToString(leaf.cert.Raw)))
	f.Add([]byte("-----BEGIN PKCS7-----\n-----END PKCS7-----\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		certs, err := pki.ParseBundle(data)
		if err != nil {
			return
		}
		if len(certs) == 0 || len(certs) > pki.MaxBundleCertificates {
			t.Errorf("%d certificates", len(certs))
		}
		for _, c := range certs {
			if again, err := pki.ParseCertificate(c.Raw); err != nil || !bytes.Equal(again.Raw, c.Raw) {
				t.Errorf("a certificate that does not parse: %v", err)
			}
			if !bytes.Contains(data, c.Raw) && !strings.Contains(string(data), "-----BEGIN") && data[0] == 0x30 {
				t.Error("a certificate that does not stand in the file")
			}
		}
	})
}

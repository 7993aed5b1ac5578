package ca_test

import (
	"crypto"
	"crypto/x509"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"yinjian/appliance/pki"
	"yinjian/appliance/pki/ca"
)

func openssl(t *testing.T, args ...string) (string, error) {
	t.Helper()
	if _, err := exec.LookPath("openssl"); err != nil {
		t.Skip("openssl is not installed")
	}
	out, err := exec.CommandContext(t.Context(), "openssl", args...).CombinedOutput()
	return string(out), err
}

// files writes root, leaf and CRL as PEM, and answers their paths.
func files(t *testing.T, a *ca.Authority, leaf, crl []byte) (root, leafFile, crlFile string) {
	t.Helper()
	dir := t.TempDir()
	write := func(name string, data []byte) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	return write("root.pem", pki.EncodeCertificatePEMs(a.Certificate())), write("leaf.pem", leaf), write("crl.pem", pki.EncodeCRLPEM(crl))
}

// OpenSSL 3.0 judges certificate and CRL of the RSA CA in full. Of the SM2 CA it checks the leaf's signature, given the
// default identity by hand; it cannot give one for a CRL, so that is Bouncy Castle's.
func TestOpenSSL(t *testing.T) {
	t.Parallel()
	epoch := func(x time.Time) string { return big.NewInt(x.Unix()).String() }
	for _, kind := range []string{"SM2", "RSA"} {
		a := newCA(t, kind, "")
		var key crypto.Signer = newSM2(t)
		if kind == "RSA" {
			key = rsaKey[1]()
		}
		for _, r := range requests(key.Public()) {
			cert := mustIssue(t, a, r)
			none, err := a.CRL(t.Context(), big.NewInt(1), at, at.Add(day), nil)
			if err != nil {
				t.Fatal(err)
			}
			its, err := a.CRL(t.Context(), big.NewInt(2), at, at.Add(day), []ca.Revoked{{Serial: cert.SerialNumber, At: at, Reason: pki.Superseded}})
			if err != nil {
				t.Fatal(err)
			}
			verify := func(crl []byte, when time.Time) (string, error) {
				root, leaf, list := files(t, a, pki.EncodeCertificatePEMs(cert), crl)
				args := []string{"verify", "-attime", epoch(when), "-x509_strict", "-check_ss_sig"}
				if kind == "SM2" {
					args = append(args[:len(args)-2], "-vfyopt", "distid:1234567812345678")
				} else {
					args = append(args, "-crl_check", "-CRLfile", list)
				}
				if r.Profile == ca.TSA {
					args = append(args, "-purpose", "timestampsign")
				}
				return openssl(t, append(args, "-CAfile", root, leaf)...)
			}
			if out, err := verify(none, at.Add(time.Hour)); err != nil {
				t.Errorf("%s, %s: %s", kind, r.Profile, out)
			}
			if out, err := verify(none, at.Add(400*day)); err == nil || !strings.Contains(out, "expired") {
				t.Errorf("%s, %s, expired: %s", kind, r.Profile, out)
			}
			if kind == "SM2" {
				continue
			}
			if out, err := verify(its, at.Add(time.Hour)); err == nil || !strings.Contains(out, "revoked") {
				t.Errorf("%s, %s, revoked: %s", kind, r.Profile, out)
			}
			if out, err := verify(none, at.Add(2*day)); err == nil || !strings.Contains(out, "CRL has expired") {
				t.Errorf("%s, %s, CRL expired: %s", kind, r.Profile, out)
			}
		}
	}
}

// What OpenSSL prints of a staff certificate, for the parts that a reader looks at.
func TestOpenSSLText(t *testing.T) {
	t.Parallel()
	a := newCA(t, "SM2", "http://crl.hospital.test/a.crl")
	for profile, want := range map[ca.Profile][]string{
		ca.Staff: {"X509v3 Key Usage: critical\n                Digital Signature, Non Repudiation\n", "Policy: 2.999.2.1", "Explicit Text: 仅供评估", "URI:http://crl.hospital.test/a.crl", "ASN1 OID: SM2", "Signature Algorithm: SM2-with-SM3"},
		ca.TSA:   {"X509v3 Extended Key Usage: critical\n                Time Stamping\n"},
		ca.Log:   {"X509v3 Extended Key Usage: critical\n                2.999.3.1\n"},
	} {
		r := requests(newSM2(t).Public())[map[ca.Profile]int{ca.Staff: 0, ca.TSA: 1, ca.Log: 2}[profile]]
		_, leaf, _ := files(t, a, pki.EncodeCertificatePEMs(mustIssue(t, a, r)), nil)
		out, err := openssl(t, "x509", "-noout", "-text", "-nameopt", "utf8,sep_comma_plus", "-certopt", "no_pubkey", "-in", leaf)
		if profile == ca.Staff { // the key's parameters too
			out2, _ := openssl(t, "x509", "-noout", "-text", "-in", leaf)
			out += out2
		}
		if err != nil {
			t.Fatal(out)
		}
		for _, w := range want {
			if !strings.Contains(out, w) {
				t.Errorf("%s: no %q in\n%s", profile, w, out)
			}
		}
		if strings.Contains(out, "Basic Constraints") {
			t.Errorf("%s: has basic constraints", profile)
		}
	}
}

// Go's own crypto/x509 is another implementation for the RSA CA.
func TestStandardLibrary(t *testing.T) {
	t.Parallel()
	a := newCA(t, "RSA", "")
	root, err := x509.ParseCertificate(a.Certificate().Raw)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(root)
	for _, r := range requests(rsaKey[1]().Public()) {
		leaf, err := x509.ParseCertificate(mustIssue(t, a, r).Raw)
		if err != nil {
			t.Fatal(err)
		}
		if r.Profile == ca.TSA || r.Profile == ca.Log { // critical extKeyUsage is handled by reading it
			if len(leaf.UnhandledCriticalExtensions) != 0 {
				t.Errorf("%s: %v", r.Profile, leaf.UnhandledCriticalExtensions)
			}
		}
		o := x509.VerifyOptions{Roots: pool, CurrentTime: at, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}
		if r.Profile == ca.TLSServer {
			o.KeyUsages, o.DNSName = nil, "sign.hospital.test"
		}
		if _, err := leaf.Verify(o); err != nil {
			t.Errorf("%s: %v", r.Profile, err)
		}
	}
}

// Bouncy Castle checks SM2 certificates and CRLs with its own decoder, SM2 and SM3.
func TestBouncyCastle(t *testing.T) {
	t.Parallel()
	const jars = "/usr/share/java/"
	for _, tool := range []string{"javac", "java"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skip(tool + " is not installed")
		}
	}
	classpath := jars + "bcprov.jar"
	if _, err := os.Stat(classpath); err != nil {
		t.Skip("Bouncy Castle (libbcprov-java) is not installed")
	}
	dir := t.TempDir()
	if out, err := exec.CommandContext(t.Context(), "javac", "-cp", classpath, "-d", dir, "testdata/Check.java").CombinedOutput(); err != nil {
		t.Fatalf("javac: %s", out)
	}
	a := newCA(t, "SM2", "")
	one, two := mustIssue(t, a, staff(newSM2(t).Public())), mustIssue(t, a, staff(newSM2(t).Public()))
	crl, err := a.CRL(t.Context(), big.NewInt(2), at, at.Add(day), []ca.Revoked{{Serial: two.SerialNumber, At: at, Reason: pki.Superseded}})
	if err != nil {
		t.Fatal(err)
	}
	check := func(leaf, crl []byte) string {
		root, leafFile, list := files(t, a, leaf, crl)
		out, err := exec.CommandContext(t.Context(), "java", "-cp", classpath+":"+dir, "Check", root, leafFile, list).CombinedOutput()
		if err != nil {
			t.Fatalf("java: %s", out)
		}
		return strings.TrimSpace(string(out))
	}
	if got, want := check(pki.EncodeCertificatePEMs(one), crl), "root ok, leaf ok, crl ok, not revoked"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if got, want := check(pki.EncodeCertificatePEMs(two), crl), "root ok, leaf ok, crl ok, revoked SUPERSEDED"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	// The judge must be able to say no.
	stranger := newCA(t, "SM2", "")
	foreign := mustIssue(t, stranger, staff(newSM2(t).Public()))
	if got := check(pki.EncodeCertificatePEMs(foreign), crl); !strings.Contains(got, "leaf bad") {
		t.Errorf("a stranger's certificate: %q", got)
	}
}

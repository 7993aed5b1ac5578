package pki_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"yinjian/appliance/pki"
)

// OpenSSL makes a chain and a CRL, of SM2 and of RSA; we judge them. TestOpenSSL of package ca is the other direction.
func TestChainMadeByOpenSSL(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("openssl"); err != nil {
		t.Skip("openssl is not installed")
	}
	const config = `
[req]
distinguished_name = dn
prompt = no
[dn]
C = CN
CN = test
[root]
basicConstraints = critical,CA:TRUE
keyUsage = critical,keyCertSign,cRLSign
subjectKeyIdentifier = hash
[mid]
basicConstraints = critical,CA:TRUE,pathlen:0
keyUsage = critical,keyCertSign,cRLSign
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid:always
[leaf]
keyUsage = critical,digitalSignature,nonRepudiation
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid:always
[ca]
default_ca = me
[me]
database = index
crlnumber = number
default_crl_days = 30
`
	for _, kind := range []string{"SM2", "RSA"} {
		dir := t.TempDir()
		run := func(args ...string) {
			t.Helper()
			cmd := exec.CommandContext(t.Context(), "openssl", args...)
			cmd.Dir = dir
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("openssl %v: %s", args, out)
			}
		}
		put := func(name, content string) {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		get := func(name string) []byte { return must(os.ReadFile(filepath.Join(dir, name))) }
		put("conf", config)
		alg, digest, id := []string{"-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:SM2", "-pkeyopt", "ec_param_enc:named_curve"}, "-sm3", []string{"-sigopt", "distid:1234567812345678"}
		if kind == "RSA" {
			alg, digest, id = []string{"-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"}, "-sha256", nil
		}
		for _, k := range []string{"root", "mid", "leaf"} {
			run(append([]string{"genpkey", "-out", k + ".key"}, alg...)...)
		}
		run(append([]string{"req", "-x509", "-config", "conf", "-extensions", "root", "-key", "root.key", "-subj", "/C=CN/CN=root", "-days", "300", digest, "-out", "root.pem"}, id...)...)
		for _, c := range [][2]string{{"mid", "root"}, {"leaf", "mid"}} {
			run(append([]string{"req", "-new", "-config", "conf", "-key", c[0] + ".key", "-subj", "/C=CN/CN=" + c[0], digest, "-out", c[0] + ".csr"}, id...)...)
			sign := append([]string{"x509", "-req", "-in", c[0] + ".csr", "-CA", c[1] + ".pem", "-CAkey", c[1] + ".key", "-extfile", "conf", "-extensions", c[0],
				"-days", "200", digest, "-out", c[0] + ".pem"}, id...)
			if kind == "SM2" {
				sign = append(sign, "-vfyopt", "distid:1234567812345678")
			}
			run(sign...)
		}
		var list []*pki.CRL
		for _, c := range []string{"root", "mid"} {
			put("index", "")
			put("number", "1000\n")
			run(append([]string{"ca", "-config", "conf", "-gencrl", "-cert", c + ".pem", "-keyfile", c + ".key", "-md", digest[1:], "-out", c + ".crl.pem"}, id...)...)
			run("crl", "-in", c+".crl.pem", "-outform", "DER", "-out", c+".crl")
			list = append(list, must(pki.ParseCRL(get(c+".crl"))))
		}
		root, mid, leaf := must(pki.ParseCertificatePEMs(get("root.pem"))), must(pki.ParseCertificatePEMs(get("mid.pem"))), must(pki.ParseCertificatePEMs(get("leaf.pem")))
		o := pki.Options{Leaf: leaf[0], Intermediates: mid, Anchors: root, At: list[1].ThisUpdate().Add(time.Minute), Purpose: pki.StaffSigning, CRLs: list}
		if r := pki.VerifyPath(o); r.Verdict != pki.Valid {
			t.Errorf("%s: %s %+v", kind, r.Verdict, r.Checks)
		}
		o.At = list[1].ThisUpdate().Add(40 * day)
		if r := pki.VerifyPath(o); r.Verdict != pki.Indeterminate {
			t.Errorf("%s, lists expired: %s %+v", kind, r.Verdict, r.Checks)
		}
		o.Leaf, o.At = mid[0], list[1].ThisUpdate().Add(time.Minute)
		if r := pki.VerifyPath(o); r.Verdict != pki.Invalid {
			t.Errorf("%s, CA as staff: %s %+v", kind, r.Verdict, r.Checks)
		}
	}
}

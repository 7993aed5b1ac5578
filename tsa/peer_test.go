package tsa_test

import (
	"bytes"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/emmansun/gmsm/smx509"

	"yinjian/appliance/cms"
	"yinjian/appliance/cms/cmstest"
	"yinjian/tsa"
)

func dataFile(t *testing.T) string { return cmstest.Write(t, filepath.Join(t.TempDir(), "data"), data) }

// query is a request by openssl ts -query, made now if it is there.
func query(t *testing.T, flags ...string) (path string, der []byte) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "q.tsq")
	cmstest.MustOpenSSL(t, append([]string{"ts", "-query", "-data", dataFile(t), "-out", path}, flags...)...)
	return path, cmstest.Read(t, path)
}

func TestOpenSSLVerifiesRSA(t *testing.T) {
	t.Parallel()
	longer := newUnit(cmstest.NewRSAKey(3072), cmstest.NewRSAKey(2048))
	for name, flags := range map[string][]string{
		"rsa-3072":  {"-sm3", "-cert"},
		"sha256":    {"-sha256", "-cert"},
		"sha384":    {"-sha384", "-cert", "-tspolicy", policy.String()},
		"no nonce":  {"-sha512", "-no_nonce", "-cert"},
		"sm3":       {"-sm3", "-cert"},
		"bare leaf": {"-sha256"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			u, dir := rsaUnit(), t.TempDir()
			if name == "rsa-3072" {
				u = longer
			}
			a := newAuthority(t, u.config())
			queryFile, q := query(t, flags...)
			response := cmstest.Write(t, filepath.Join(dir, "r.tsr"), a.Respond(t.Context(), q))
			ca := cmstest.Write(t, filepath.Join(dir, "ca.pem"), cmstest.CertPEM(u.ca))
			args := []string{"ts", "-verify", "-attime", "1795256430", "-queryfile", queryFile, "-in", response, "-CAfile", ca}
			if name == "bare leaf" {
				args = append(args, "-untrusted", cmstest.Write(t, filepath.Join(dir, "tsu.pem"), cmstest.CertPEM(u.cert)))
			}
			if out := cmstest.MustOpenSSL(t, args...); !strings.Contains(out, "Verification: OK") {
				t.Errorf("openssl says %q", out)
			}
			// the judge can say no
			other := cmstest.Write(t, filepath.Join(dir, "other"), []byte("other"))
			args = []string{"ts", "-verify", "-attime", "1795256430", "-data", other, "-in", response, "-CAfile", ca}
			if out, err := cmstest.OpenSSL(t, args...); err == nil {
				t.Errorf("openssl verifies other data: %s", out)
			}
		})
	}
}

// TestOpenSSLReadsSM2: openssl ts -verify cannot be told the SM2 identity, so text and signature are checked apart.
func TestOpenSSLReadsSM2(t *testing.T) {
	t.Parallel()
	u, dir := sm2Unit(), t.TempDir()
	_, q := query(t, "-sm3", "-cert")
	response := newAuthority(t, u.config()).Respond(t.Context(), q)
	responseFile := cmstest.Write(t, filepath.Join(dir, "r.tsr"), response)
	text := cmstest.MustOpenSSL(t, "ts", "-reply", "-in", responseFile, "-text")
	for _, want := range []string{
		"Status: Granted.", "Version: 1", "Policy OID: " + policy.String(), "Hash Algorithm: sm3",
		"Time stamp: Nov 21 10:20:30.12 2026 GMT", "Accuracy: unspecified seconds, 0x26 millis, unspecified micros", "Ordering: no",
		"TSA: unspecified", "Extensions:",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("openssl's text lacks %q:\n%s", want, text)
		}
	}
	parsed, err := tsa.ParseResponse(response)
	if err != nil {
		t.Fatal(err)
	}
	// OpenSSL prints whole bytes, with a leading zero where there is one.
	serial := fmt.Sprintf("Serial number: 0x%X", parsed.Token.Serial.Bytes())
	if nonce := fmt.Sprintf("Nonce: 0x%X", parsed.Token.Nonce.Bytes()); !strings.Contains(text, serial) || !strings.Contains(text, nonce) {
		t.Errorf("openssl's text lacks %q or %q:\n%s", serial, nonce, text)
	}

	// the token as openssl cuts it out, then its parts
	tokenFile := filepath.Join(dir, "t.der")
	cmstest.MustOpenSSL(t, "ts", "-reply", "-in", responseFile, "-token_out", "-out", tokenFile)
	token := cmstest.Read(t, tokenFile)
	if !bytes.Equal(token, parsed.Token.DER) {
		t.Error("openssl cuts out another token")
	}
	public := cmstest.MustOpenSSL(t, "x509", "-in", cmstest.Write(t, filepath.Join(dir, "tsu.pem"), cmstest.CertPEM(u.cert)), "-noout", "-pubkey")
	if why := opensslPieces(t, parsed.Token, cmstest.Write(t, filepath.Join(dir, "pub.pem"), []byte(public))); why != "" {
		t.Error(why)
	}
}

func TestBouncyCastleVerifies(t *testing.T) {
	t.Parallel()
	for name, row := range map[string]struct {
		unit    func() *unit
		profile cms.Profile
		req     tsa.Request
	}{
		"sm2":        {sm2Unit, cms.RFC5652, *request(data)},
		"sm2 gm0010": {sm2Unit, cms.GM0010, *request(data)},
		"sm2 bare":   {sm2Unit, cms.RFC5652, tsa.Request{Imprint: tsa.ImprintOf(data)}},
		"rsa":        {rsaUnit, cms.RFC5652, *request(data)},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			u, dir := row.unit(), t.TempDir()
			c := u.config()
			c.Profile = row.profile
			q := encode(t, &row.req)
			response := newAuthority(t, c).Respond(t.Context(), q)
			file, queryFile := cmstest.Write(t, filepath.Join(dir, "r.tsr"), response), cmstest.Write(t, filepath.Join(dir, "q.tsq"), q)
			cert := cmstest.Write(t, filepath.Join(dir, "tsu.pem"), cmstest.CertPEM(u.cert))
			cmstest.MustBouncyCastle(t, "tst", file, queryFile, cert)
			if name != "sm2" {
				return
			}
			// the judge can say no: to another nonce, another signature, a rejection
			row.req.Nonce = big.NewInt(5)
			if out, err := cmstest.BouncyCastle(t, "tst", file, cmstest.Write(t, filepath.Join(dir, "q2.tsq"), encode(t, &row.req)), cert); err == nil {
				t.Errorf("another request is answered: %s", out)
			}
			response[len(response)-1] ^= 1
			if out, err := cmstest.BouncyCastle(t, "tst", cmstest.Write(t, filepath.Join(dir, "bad.tsr"), response), queryFile, cert); err == nil {
				t.Errorf("a spoiled signature passes: %s", out)
			}
			rejected := tsa.Reject(tsa.TimeNotAvailable, "no time")
			if out, err := cmstest.BouncyCastle(t, "tst", cmstest.Write(t, filepath.Join(dir, "no.tsr"), rejected), queryFile, cert); err == nil || !strings.Contains(out, "no time") {
				t.Errorf("a rejection: %v, %s", err, out)
			}
		})
	}
}

// TestBouncyCastleSignatureTimeStamp: a signature with its token inside, as package sign makes them.
func TestBouncyCastleSignatureTimeStamp(t *testing.T) {
	t.Parallel()
	u, dir := sm2Unit(), t.TempDir()
	signer := newUnit(cmstest.NewSM2Key(), cmstest.NewSM2Key())
	signed, err := cms.Sign(t.Context(), signer.key, cms.Params{Content: data, Certificates: [][]byte{signer.cert.Raw}, AlgorithmProtection: true})
	if err != nil {
		t.Fatal(err)
	}
	token := u.token(t, request(signed.SignatureValue))
	if err := signed.AddUnsignedAttribute(cms.Attribute{Type: cms.OIDSignatureTimeStamp, Values: [][]byte{token.DER}}); err != nil {
		t.Fatal(err)
	}
	message := cmstest.Write(t, filepath.Join(dir, "message"), signed.Bytes())
	cmstest.MustBouncyCastle(t, "cms", message, cmstest.Write(t, filepath.Join(dir, "signer.pem"), cmstest.CertPEM(signer.cert)))
	cert := cmstest.Write(t, filepath.Join(dir, "tsu.pem"), cmstest.CertPEM(u.cert))
	cmstest.MustBouncyCastle(t, "cmsts", message, cert)

	// our own reading of the same
	sd, err := cms.Parse(signed.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	stamp, err := tsa.ParseToken(sd.SignerInfos[0].TimeStampTokens()[0])
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stamp.VerifyData(sd.SignerInfos[0].Signature); err != nil {
		t.Error(err)
	}

	// a token over something else is noticed
	if signed, err = cms.Sign(t.Context(), signer.key, cms.Params{Content: data, Certificates: [][]byte{signer.cert.Raw}}); err != nil {
		t.Fatal(err)
	}
	if err := signed.AddUnsignedAttribute(cms.Attribute{Type: cms.OIDSignatureTimeStamp, Values: [][]byte{token.DER}}); err != nil {
		t.Fatal(err)
	}
	if out, err := cmstest.BouncyCastle(t, "cmsts", cmstest.Write(t, message, signed.Bytes()), cert); err == nil {
		t.Errorf("a token of another signature passes: %s", out)
	}
}

// TestPeersTokens verifies tokens over data that others made: bc-… by BCCheck stamp (Bouncy Castle 1.72), openssl-… by
// openssl ts -reply (3.0). With -update they are made anew.
func TestPeersTokens(t *testing.T) {
	dir := filepath.Join("testdata", "peer")
	if *update {
		recordTokens(t, dir)
	}
	for name, suite := range map[string]string{"bc-sm2": "sm2", "bc-rsa": "rsa", "openssl-rsa": "rsa"} {
		t.Run(name, func(t *testing.T) {
			cert, err := smx509.ParseCertificatePEM(cmstest.Read(t, filepath.Join(dir, suite+".pem")))
			if err != nil {
				t.Fatal(err)
			}
			in := cmstest.Read(t, filepath.Join(dir, name+".tsr"))
			response, err := tsa.ParseResponse(in)
			if err != nil {
				t.Fatal(err)
			}
			req, err := tsa.ParseRequest(cmstest.Read(t, filepath.Join(dir, suite+".tsq")))
			if err != nil {
				t.Fatal(err)
			}
			if err := response.Token.Answers(req); err != nil {
				t.Error(err)
			}
			report, err := response.Token.VerifyData(data)
			if err != nil || !report.Signer.Equal(cert) {
				t.Errorf("VerifyData = %v: %v", err, report.Checks)
			}
			if _, err := response.Token.VerifyData([]byte("other")); err == nil {
				t.Error("other data verify")
			}
		})
	}
}

func recordTokens(t *testing.T, dir string) {
	if err := os.MkdirAll(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	tmp := t.TempDir()
	for name, u := range units {
		u := u()
		req := request(data)
		cert := cmstest.Write(t, filepath.Join(dir, name+".pem"), cmstest.CertPEM(u.cert))
		key := cmstest.Write(t, filepath.Join(tmp, name+".key"), cmstest.KeyPEM(t, u.key.key))
		q := cmstest.Write(t, filepath.Join(dir, name+".tsq"), encode(t, req))
		cmstest.MustBouncyCastle(t, "stamp", key, cert, q, filepath.Join(dir, "bc-"+name+".tsr"))
		if name == "sm2" { // openssl ts -reply: signing not supported for this key type
			continue
		}
		config := cmstest.Write(t, filepath.Join(tmp, "ts.cnf"), []byte("[tsa]\ndefault_tsa=t\n[t]\nserial="+filepath.Join(tmp, "serial")+
			"\ndefault_policy=1.2.3.4.1\nsigner_digest=sha256\ndigests=sha256,sm3\naccuracy=secs:1,millisecs:500\nordering=yes\n"+
			"tsa_name=yes\ness_cert_id_alg=sha256\nclock_precision_digits=3\n"))
		cmstest.MustOpenSSL(t, "ts", "-reply", "-config", config, "-section", "t", "-queryfile", q, "-signer", cert, "-inkey", key,
			"-out", filepath.Join(dir, "openssl-"+name+".tsr"))
	}
}

package main_test

import (
	"bytes"
	"crypto/rsa"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"yinjian/appliance"
	"yinjian/appliance/cms"
	"yinjian/appliance/pki"
	"yinjian/tsa"
)

// stampOf asks a unit of the plain listener, and answers what it says.
func (m *machine) stampOf(t *testing.T, unit string, data []byte) *tsa.Response {
	t.Helper()
	var ends struct{ TSA map[string]string }
	b, err := os.ReadFile(filepath.Join(m.dir, "endpoints.json"))
	if err == nil {
		err = json.Unmarshal(b, &ends)
	}
	if err != nil || ends.TSA[unit] == "" {
		t.Fatalf("endpoints.json has no unit %s: %v\n%s", unit, err, b)
	}
	query, err := (&tsa.Request{Imprint: tsa.ImprintOf(data), CertReq: true}).Bytes()
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.Post(ends.TSA[unit], "application/timestamp-query", bytes.NewReader(query))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	reply, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("unit %s: %d, %v, %s", unit, resp.StatusCode, err, reply)
	}
	out, err := tsa.ParseResponse(reply)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// TestConfiguredUnits has three units of its own from birth, and later another set: each stamps under its key, policy, accuracy
// and profile; one that is configured later waits for a certificate of a real CA.
func TestConfiguredUnits(t *testing.T) {
	t.Parallel()
	need(t, "openssl")
	server := startTimeServer(t)
	dir := initAppliance(t, server)
	late := appliance.Unit{Name: "late", Algorithm: "rsa2048", Policy: "2.999.7.4"}
	configure(t, dir, func(c *appliance.Config) {
		c.Listen.TSAPlain = "127.0.0.1:0"
		c.TSA.Units = []appliance.Unit{
			{Name: "gm", Algorithm: "sm2", Policy: "2.999.7.1", Profile: "gm0010", TSAName: true},
			{Name: "main", Algorithm: "sm2", Policy: "2.999.7.2", Accuracy: appliance.Duration(700 * time.Millisecond)},
			{Name: "long", Algorithm: "rsa3072", Policy: "2.999.7.3", TSAName: true},
		}
	})
	m := serve(t, dir)
	m.trusted(t)
	data := []byte("病历")
	for unit, want := range map[string]struct {
		policy string
		outer  string
		most   time.Duration
	}{
		"gm": {"2.999.7.1", cms.OIDGMSignedData.String(), time.Second}, "main": {"2.999.7.2", cms.OIDSignedData.String(), 700 * time.Millisecond},
		"long": {"2.999.7.3", cms.OIDSignedData.String(), time.Second},
	} {
		r := m.stampOf(t, unit, data)
		if r.Err() != nil {
			t.Errorf("%s: %v", unit, r.Err())
			continue
		}
		if r.Token.Policy.String() != want.policy || r.Token.Message().OuterType.String() != want.outer || r.Token.Accuracy > want.most {
			t.Errorf("%s: policy %v, outer type %v, accuracy %v", unit, r.Token.Policy, r.Token.Message().OuterType, r.Token.Accuracy)
		}
		report, err := r.Token.VerifyData(data)
		if err != nil {
			t.Errorf("%s: %v: %v", unit, err, report.Checks)
			continue
		}
		b, err := os.ReadFile(filepath.Join(dir, "tsa-"+unit+".pem"))
		if err != nil {
			t.Fatal(err)
		}
		if certs, err := pki.ParseCertificatePEMs(b); err != nil || len(certs) != 1 || !certs[0].Equal(report.Signer) {
			t.Errorf("%s: tsa-%s.pem: %v, %v", unit, unit, certs, err)
		}
		if pub, ok := report.Signer.PublicKey.(*rsa.PublicKey); ok != (unit == "long") || ok && pub.N.BitLen() != 3072 {
			t.Errorf("%s: signed with %T", unit, report.Signer.PublicKey)
		}
	}
	// OpenSSL judges the long one, from the public files.
	long := m.stampOf(t, "long", data)
	work := tempDir(t)
	token, content := filepath.Join(work, "token"), filepath.Join(work, "data")
	if err := os.WriteFile(token, long.Token.DER, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(content, data, 0o600); err != nil {
		t.Fatal(err)
	}
	if o := command(t, nil, "openssl", "ts", "-verify", "-token_in", "-in", token, "-data", content, "-CAfile", filepath.Join(dir, "tsa-ca-long.pem")); o.code != 0 {
		t.Errorf("openssl ts -verify: %v", o)
	}
	// It alone says who made it.
	if o := command(t, nil, "openssl", "ts", "-reply", "-token_in", "-in", token, "-token_out", "-text"); o.code != 0 || !strings.Contains(o.stdout, "TSA: DirName:") {
		t.Errorf("openssl ts -reply -text: %v", o)
	}
	if err := os.WriteFile(token, m.stampOf(t, "main", data).Token.DER, 0o600); err != nil {
		t.Fatal(err)
	}
	if o := command(t, nil, "openssl", "ts", "-reply", "-token_in", "-in", token, "-token_out", "-text"); o.code != 0 || !strings.Contains(o.stdout, "TSA: unspecified") {
		t.Errorf("openssl ts -reply -text of main: %v", o)
	}
	// Signatures are stamped by the first unit of their kind that every verifier reads.
	m.enrol(t, "D1", "")
	his := m.register(t, "his", "--consent", "app-asserted")
	for alg, policy := range map[string]string{"SM2": "2.999.7.2", "RSA-2048": "2.999.7.3"} {
		req := asserted("D1", alg)
		req.Algorithm = alg
		signed, err := his.Sign(t.Context(), alg, req)
		if err != nil {
			t.Fatal(err)
		}
		if token, err := tsa.ParseToken(signed.Token); err != nil || token.Policy.String() != policy {
			t.Errorf("%s is stamped under %v, %v; want %s", alg, token.Policy, err, policy)
		}
	}
	eventually(t, readyWithin, "a checkpoint of all that", func() bool { s := m.state(t).Journal; return s.Checkpoint == s.Entries })
	m.mustBeClean(t) // finds the units' certificates beside the log's key
	m.stop(t)

	// Later: one more unit, and two fewer.
	configure(t, dir, func(c *appliance.Config) { c.TSA.Units = []appliance.Unit{c.TSA.Units[1], late} })
	m = serve(t, dir)
	m.trusted(t)
	if r := m.stampOf(t, "late", data); r.Err() == nil || len(r.Failures) != 1 || r.Failures[0] != tsa.SystemFailure {
		t.Errorf("a unit without a certificate: %+v", r)
	}
	if s := m.state(t); !strings.Contains(strings.Join(s.Warnings, "\n"), "时间戳单元 late") {
		t.Errorf("warnings %q", s.Warnings)
	}
	ca := newHospitalCA(t, false)
	mustRun(t, "cert", "anchor", "add", ca.path("root.crt"), "--dir", dir, "--use", "tsa", "--note", "市 CA 根")
	for _, l := range ca.lists() {
		mustRun(t, "cert", "chain", "add", ca.path("sub.crt"), "--dir", dir)
		mustRun(t, "cert", "crl", "import", l, "--dir", dir)
	}
	csr := filepath.Join(work, "late.csr")
	mustRun(t, "cert", "csr", "--dir", dir, "--for", "tsa:late", "-o", csr)
	mustRun(t, "cert", "import", ca.issue(csr, "tsa"), "--dir", dir)
	eventually(t, readyWithin, "the new unit stamps", func() bool { return m.stampOf(t, "late", data).Err() == nil })
	if r := m.stampOf(t, "late", data); r.Token.Policy.String() != late.Policy {
		t.Errorf("policy %v", r.Token.Policy)
	}
	rsaRequest := asserted("D1", "late")
	rsaRequest.Algorithm = "RSA-2048"
	if signed, err := m.client(t, "his").Sign(t.Context(), "late", rsaRequest); err != nil {
		t.Error(err)
	} else if token, err := tsa.ParseToken(signed.Token); err != nil || token.Policy.String() != late.Policy {
		t.Errorf("an RSA signature is stamped under %v, %v", token.Policy, err)
	}
	m.mustBeClean(t)
	m.stop(t)
	audited(t, dir)
}

package account_test

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"math/big"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/smx509"
	"github.com/sirupsen/logrus"

	"yinjian/appliance/account"
	"yinjian/appliance/audit"
	"yinjian/appliance/evidence"
	"yinjian/appliance/internal/testkit"
	"yinjian/appliance/pki"
	"yinjian/appliance/problem"
	"yinjian/appliance/sign"
	"yinjian/hsm"
	"yinjian/ntp"
)

// An authority is a CA that is not the appliance's: a root, an intermediate under it, and what it is told to issue. The
// tests of the command line have one made with OpenSSL; this one can be as wrong as a test wants.
type authority struct {
	t       testing.TB
	key     crypto.Signer
	cert    *smx509.Certificate
	above   []*smx509.Certificate
	serials atomic.Int64
}

var year = 365 * 24 * time.Hour

func newKey(t testing.TB) crypto.Signer {
	t.Helper()
	k, err := sm2.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func (a *authority) make(template *smx509.Certificate, parent *smx509.Certificate, pub crypto.PublicKey) *smx509.Certificate {
	a.t.Helper()
	if template.SerialNumber == nil {
		template.SerialNumber = new(big.Int).Add(new(big.Int).Lsh(big.NewInt(0x77), 80), big.NewInt(a.serials.Add(1)))
	}
	if template.NotBefore.IsZero() {
		template.NotBefore = testkit.Start.Add(-time.Hour)
	}
	if template.NotAfter.IsZero() {
		template.NotAfter = testkit.Start.Add(year)
	}
	der, err := smx509.CreateCertificate(rand.Reader, template, parent, pub, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	c, err := pki.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return c
}

func caTemplate(name string) *smx509.Certificate {
	return &smx509.Certificate{
		Subject: pkix.Name{Country: []string{"CN"}, Organization: []string{"市数字证书认证中心"}, CommonName: name}, SubjectKeyId: []byte(name),
		KeyUsage: smx509.KeyUsageCertSign | smx509.KeyUsageCRLSign, BasicConstraintsValid: true, IsCA: true, NotAfter: testkit.Start.Add(10 * year),
	}
}

// newAuthority is a root by itself.
func newAuthority(t testing.TB, name string, key crypto.Signer) *authority {
	t.Helper()
	a := &authority{t: t, key: key}
	root := caTemplate(name)
	a.cert = a.make(root, root, key.Public())
	return a
}

// below is an intermediate of a.
func (a *authority) below(name string) *authority {
	a.t.Helper()
	b := &authority{t: a.t, key: newKey(a.t), above: append([]*smx509.Certificate{a.cert}, a.above...)}
	b.cert = a.make(caTemplate(name), a.cert, b.key.Public())
	return b
}

// issue answers a certificate for a request, as change wants it.
func (a *authority) issue(csr []byte, change func(*smx509.Certificate)) *smx509.Certificate {
	a.t.Helper()
	r, err := smx509.ParseCertificateRequest(csr)
	if err == nil {
		err = r.CheckSignature()
	}
	if err != nil {
		a.t.Fatal(err)
	}
	c := &smx509.Certificate{Subject: r.Subject, KeyUsage: smx509.KeyUsageDigitalSignature | smx509.KeyUsageContentCommitment, AuthorityKeyId: a.cert.SubjectKeyId, SubjectKeyId: []byte("leaf")}
	for _, e := range r.Extensions {
		if e.Id.Equal(asn1.ObjectIdentifier{2, 5, 29, 37}) { // the extended usage as requested
			c.ExtraExtensions = append(c.ExtraExtensions, e)
		}
	}
	c.DNSNames, c.IPAddresses = r.DNSNames, r.IPAddresses
	if change != nil {
		change(c)
	}
	return a.make(c, a.cert, r.PublicKey)
}

// crl is a list of that number with the certificates revoked at the list's time.
func (a *authority) crl(number int64, thisUpdate time.Time, life time.Duration, revoked ...*smx509.Certificate) []byte {
	a.t.Helper()
	l := &smx509.RevocationList{Number: big.NewInt(number), ThisUpdate: thisUpdate, NextUpdate: thisUpdate.Add(life)}
	for _, c := range revoked {
		l.RevokedCertificateEntries = append(l.RevokedCertificateEntries, smx509.RevocationListEntry{SerialNumber: c.SerialNumber, RevocationTime: thisUpdate, ReasonCode: 1})
	}
	der, err := smx509.CreateRevocationList(rand.Reader, l, a.cert, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	return der
}

// A clinic is a house with an external CA (root and intermediate) admitted for everything, its lists imported, and a doctor
// whose SM2 key waits for its certificate.
type clinic struct {
	*testkit.House
	t         *testing.T
	root, sub *authority
	app       *account.Application
	request   *account.Request
	signCount int
}

const doctor = "D001"

func newClinic(t *testing.T) *clinic {
	t.Helper()
	c := &clinic{House: testkit.New(t), t: t}
	c.root = newAuthority(t, "市 CA 根", newKey(t))
	c.sub = c.root.below("市 CA 二级")
	c.app = c.App("his", nil)
	c.must(c.Directory.AddAnchor(t.Context(), "admin", c.root.cert.Raw, account.Uses, "市 CA"))
	_, err := c.Directory.AddIntermediates(t.Context(), "admin", c.sub.cert.Raw)
	c.must(nil, err)
	c.lists(1)
	_, err = c.Directory.Enrol(t.Context(), "admin", account.Enrolment{ID: doctor, Name: "张仲景", Department: "中医内科", Campus: "本部", Algorithms: []string{"SM2"}, PIN: testkit.PIN, External: true})
	c.must(nil, err)
	c.request = c.ask(account.RequestSpec{For: "signer:" + doctor})
	return c
}

func (c *clinic) must(_ any, err error) {
	c.t.Helper()
	if err != nil {
		c.t.Fatal(err)
	}
}

// lists imports lists of root and intermediate that revoke the certificates.
func (c *clinic) lists(number int64, revoked ...*smx509.Certificate) {
	c.t.Helper()
	now := c.Clock.Now().Time.Add(-time.Second)
	for _, l := range [][]byte{c.root.crl(number, now, 30*24*time.Hour), c.sub.crl(number, now, 7*24*time.Hour, revoked...)} {
		_, fresh, err := c.Directory.ImportCRL(c.t.Context(), "admin", l, "test")
		if err != nil || !fresh {
			c.t.Fatalf("ImportCRL = %v, %v", fresh, err)
		}
	}
}

func (c *clinic) ask(spec account.RequestSpec) *account.Request {
	c.t.Helper()
	r, err := c.Directory.RequestCertificate(c.t.Context(), "admin", spec)
	c.must(r, err)
	return r
}

func (c *clinic) take(cert *smx509.Certificate) error {
	_, err := c.Directory.ImportCertificates(c.t.Context(), "admin", account.Import{File: cert.Raw})
	return err
}

// sign signs, and answers the certificate's serial and the record.
func (c *clinic) sign() (serial, record string, err error) {
	c.signCount++
	r, err := c.Signing.Sign(c.t.Context(), c.app, testkit.Request(strings.Repeat("k", c.signCount), doctor))
	if err != nil {
		return "", "", err
	}
	cert, err := pki.ParseCertificate(r.Certificates[0])
	c.must(nil, err)
	return pki.SerialHex(cert.SerialNumber), r.RecordID, nil
}

// judge holds a record's evidence against the roots alone.
func (c *clinic) judge(record string) *evidence.Report {
	c.t.Helper()
	b, err := evidence.Parse(c.Evidence(c.app, record))
	c.must(b, err)
	trust := evidence.Trust{LogKeys: c.Trust.LogKeys, Signers: []*smx509.Certificate{c.root.cert}, Anchors: c.Trust.Anchors}
	return evidence.Verify(b, trust, evidence.Input{Document: testkit.Document})
}

func TestCertificateFromAnotherCA(t *testing.T) {
	t.Parallel()
	c := newClinic(t)

	// 1. Nothing is signed before the certificate is there; asked again, the request is the same.
	_, _, err := c.sign()
	wants(t, "without a certificate", err, problem.CertificateAwaited)
	if again := c.ask(account.RequestSpec{For: "signer:" + doctor}); !reflect.DeepEqual(again.CSR, c.request.CSR) {
		t.Error("asked again, another request")
	}
	_, err = c.Directory.RequestCertificate(t.Context(), "admin", account.RequestSpec{For: "signer:" + doctor, Subject: "CN=张机"})
	wants(t, "another subject while one waits", err, problem.Exists)

	// 2. The certificate, and evidence that holds under the root alone.
	first := c.sub.issue(c.request.CSR, nil)
	c.must(nil, c.take(first))
	serial, record, err := c.sign()
	if err != nil || serial != pki.SerialHex(first.SerialNumber) {
		t.Fatalf("signed under %s, %v", serial, err)
	}
	if r := c.judge(record); r.Verdict != pki.Valid {
		t.Fatalf("%+v", r)
	}
	size := c.Journal.Size()
	c.must(nil, c.take(first))
	if c.Journal.Size() != size {
		t.Error("importing it again wrote entries")
	}

	// 3. A new key, whose certificate begins tomorrow: until then the old one signs.
	renewal := c.ask(account.RequestSpec{For: "signer:" + doctor, NewKey: true})
	if reflect.DeepEqual(renewal.PublicKey, c.request.PublicKey) {
		t.Fatal("the new key is the old one")
	}
	if again := c.ask(account.RequestSpec{For: "signer:" + doctor, NewKey: true}); !reflect.DeepEqual(again.CSR, renewal.CSR) {
		t.Error("asked again, another key")
	}
	second := c.sub.issue(renewal.CSR, func(x *smx509.Certificate) { x.NotBefore = testkit.Start.Add(24 * time.Hour) })
	c.must(nil, c.take(second))
	if serial, _, err := c.sign(); err != nil || serial != pki.SerialHex(first.SerialNumber) {
		t.Errorf("before the new one begins: %s, %v", serial, err)
	}
	states := func() (out []string) {
		for _, l := range c.Directory.Certificates() {
			if l.Owner == "signer:"+doctor {
				out = append(out, l.State)
			}
		}
		return out
	}
	if got := states(); !slices.Equal(got, []string{"active", "next"}) {
		t.Errorf("states %q", got)
	}
	c.Clock.Advance(25 * time.Hour)
	serial, record2, err := c.sign()
	if err != nil || serial != pki.SerialHex(second.SerialNumber) {
		t.Errorf("after it has begun: %s, %v", serial, err)
	}
	if got := states(); !slices.Equal(got, []string{"superseded", "active"}) {
		t.Errorf("states %q", got)
	}

	// 4. Revoked: the other one, still valid, signs; when both are, nothing does. What was signed before stands.
	c.lists(2, second)
	if serial, _, err := c.sign(); err != nil || serial != pki.SerialHex(first.SerialNumber) {
		t.Errorf("the new one revoked: %s, %v", serial, err)
	}
	c.Clock.Advance(time.Minute)
	c.lists(3, second, first)
	before := c.Directory.Certificates()
	for _, when := range []string{"both revoked", "after a restart"} {
		_, _, err = c.sign()
		wants(t, when, err, problem.CertificateUnusable)
		if !strings.Contains(err.Error(), "revoked") {
			t.Errorf("%s: %v", when, err)
		}
		if got := states(); !slices.Equal(got, []string{"revoked", "revoked"}) {
			t.Errorf("%s: states %q", when, got)
		}
		c.Restart()
	}
	if after := c.Directory.Certificates(); !reflect.DeepEqual(before, after) {
		t.Errorf("a restart changed the certificates:\n%+v\n%+v", before, after)
	}
	for _, id := range []string{record, record2} {
		if r := c.judge(id); r.Verdict != pki.Valid {
			t.Errorf("%s: %+v", id, r)
		}
	}
	// A list that dates the revocation before the signature makes it invalid; without lists nothing is decided.
	b, err := evidence.Parse(c.Evidence(c.app, record))
	c.must(b, err)
	earlier, err := pki.ParseCRL(c.sub.crl(50, testkit.Start.Add(-time.Minute), 365*24*time.Hour, first))
	c.must(earlier, err)
	trust := evidence.Trust{LogKeys: c.Trust.LogKeys, Signers: []*smx509.Certificate{c.root.cert}, Anchors: c.Trust.Anchors}
	if r := evidence.Verify(b, trust, evidence.Input{Document: testkit.Document, CRLs: []*pki.CRL{earlier}}); r.Verdict != pki.Invalid {
		t.Errorf("revoked before it was signed: %+v", r)
	}
	bare := *b
	bare.CRLs = nil
	if r := evidence.Verify(&bare, trust, evidence.Input{Document: testkit.Document}); r.Verdict != pki.Indeterminate {
		t.Errorf("without any list: %+v", r)
	}
	// The appliance itself says so too, for as long as it trusts the root.
	verdict := func() pki.Verdict {
		t.Helper()
		r, err := c.Signing.Verify(t.Context(), &sign.VerifyRequest{Evidence: c.Evidence(c.app, record), Document: testkit.Document})
		c.must(r, err)
		return r.Verdict
	}
	if got := verdict(); got != pki.Valid {
		t.Errorf("the appliance's verdict is %s", got)
	}
	for _, a := range c.Directory.Anchors() {
		if a.Note == "市 CA" {
			c.must(c.Directory.WithdrawAnchor(t.Context(), "admin", a.ID, "test"))
		}
	}
	if got := verdict(); got != pki.Indeterminate {
		t.Errorf("the appliance's verdict without the anchor is %s", got)
	}
	status, ok := c.Directory.Certificate(pki.SerialHex(second.SerialNumber))
	if !ok || status.Status != "revoked" || status.Owner != doctor || status.Reason != "keyCompromise" {
		t.Errorf("status %+v", status)
	}
	_, err = c.Directory.Revoke(t.Context(), "admin", pki.SerialHex(first.SerialNumber), "superseded")
	wants(t, "revoking another CA's certificate", err, problem.Forbidden)
}

func TestImportRefuses(t *testing.T) {
	t.Parallel()
	c := newClinic(t)
	csr := c.request.CSR
	stranger := newAuthority(t, "无名 CA", newKey(t))
	tsaOnly := newAuthority(t, "只管时间戳的 CA", newKey(t))
	c.must(c.Directory.AddAnchor(t.Context(), "admin", tsaOnly.cert.Raw, []string{account.UseTSA}, ""))
	weakKey, err := rsa.GenerateKey(rand.Reader, 2048)
	c.must(nil, err)
	weak := newAuthority(t, "RSA 根", weakKey)
	c.must(c.Directory.AddAnchor(t.Context(), "admin", weak.cert.Raw, []string{account.UseStaff}, ""))
	revoked := c.sub.issue(csr, nil)
	c.lists(2, revoked)
	usage := func(u smx509.KeyUsage) func(*smx509.Certificate) {
		return func(x *smx509.Certificate) { x.KeyUsage = u }
	}
	other, err := smx509.CreateCertificateRequest(rand.Reader, &smx509.CertificateRequest{Subject: pkix.Name{CommonName: "张仲景"}}, newKey(t))
	c.must(nil, err)
	tampered := slices.Clone(c.sub.issue(csr, nil).Raw)
	tampered[len(tampered)-1] ^= 1
	size := c.Journal.Size()
	for name, tt := range map[string]struct {
		file []byte
		want problem.Code
	}{
		"garbage":           {[]byte("not a certificate"), problem.CertificateMalformed},
		"empty":             {[]byte{}, problem.CertificateMalformed},
		"unknown CA":        {stranger.issue(csr, nil).Raw, problem.CertificateUntrusted},
		"CA for other uses": {tsaOnly.issue(csr, nil).Raw, problem.CertificateUntrusted},
		"broken signature":  {tampered, problem.CertificateUntrusted},
		"expired": {c.sub.issue(csr, func(x *smx509.Certificate) {
			x.NotBefore, x.NotAfter = testkit.Start.Add(-2*time.Minute), testkit.Start.Add(-time.Minute)
		}).Raw, problem.CertificateExpired},
		"revoked":              {revoked.Raw, problem.CertificateRevoked},
		"SHA-1":                {weak.issue(csr, func(x *smx509.Certificate) { x.SignatureAlgorithm = smx509.SHA1WithRSA }).Raw, problem.CertificateWeak},
		"for timestamps":       {c.sub.issue(csr, func(x *smx509.Certificate) { x.ExtKeyUsage = []smx509.ExtKeyUsage{smx509.ExtKeyUsageTimeStamping} }).Raw, problem.CertificatePurpose},
		"for a server":         {c.sub.issue(csr, func(x *smx509.Certificate) { x.ExtKeyUsage = []smx509.ExtKeyUsage{smx509.ExtKeyUsageServerAuth} }).Raw, problem.CertificatePurpose},
		"no non-repudiation":   {c.sub.issue(csr, usage(smx509.KeyUsageDigitalSignature)).Raw, problem.CertificatePurpose},
		"a CA's":               {c.sub.issue(csr, func(x *smx509.Certificate) { x.IsCA, x.BasicConstraintsValid = true, true }).Raw, problem.CertificatePurpose},
		"encryption, our key":  {c.sub.issue(csr, usage(smx509.KeyUsageKeyEncipherment|smx509.KeyUsageDataEncipherment)).Raw, problem.CertificateEncryption},
		"encryption, its pair": {c.sub.issue(other, usage(smx509.KeyUsageKeyEncipherment|smx509.KeyUsageKeyAgreement)).Raw, problem.CertificateEncryption},
		"another key":          {c.sub.issue(other, nil).Raw, problem.CertificateKeyUnknown},
		"CA certificates only": {pki.EncodeCertificatePEMs(c.sub.cert, c.root.cert), problem.CertificatePurpose},
		"another name":         {c.sub.issue(csr, func(x *smx509.Certificate) { x.Subject.CommonName = "华佗" }).Raw, problem.CertificateSubject},
		"another staff number": {c.sub.issue(csr, func(x *smx509.Certificate) { x.Subject.SerialNumber = "D002" }).Raw, problem.CertificateSubject},
	} {
		_, err := c.Directory.ImportCertificates(t.Context(), "admin", account.Import{File: tt.file})
		wants(t, name, err, tt.want)
	}
	_, err = c.Directory.ImportCertificates(t.Context(), "admin", account.Import{File: c.sub.issue(csr, nil).Raw, Owner: "signer:D002"})
	wants(t, "expected for another owner", err, problem.CertificateKeyUnknown)
	c.Clock.State(ntp.Suspect)
	wants(t, "without trusted time", c.take(c.sub.issue(csr, nil)), problem.TimeUntrusted)
	c.Clock.State(ntp.Trusted)
	if c.Journal.Size() != size {
		t.Errorf("refusals wrote %d entries", c.Journal.Size()-size)
	}

	// What is taken all the same: another subject on the administrator's word, which the journal keeps; a pair in one file;
	// a name as CAs write it.
	named := c.sub.issue(csr, func(x *smx509.Certificate) { x.Subject = pkix.Name{CommonName: "051@张仲景@****@1"} })
	c.must(nil, c.take(named))
	odd := c.sub.issue(csr, func(x *smx509.Certificate) { x.Subject.CommonName = "华佗" })
	pair := pki.EncodeCertificatePEMs(c.sub.issue(other, usage(smx509.KeyUsageKeyEncipherment)), odd)
	if _, err := c.Directory.ImportCertificates(t.Context(), "admin", account.Import{File: pair, AcceptSubject: true}); err != nil {
		t.Error(err)
	}
	accepted := 0
	c.must(nil, c.Journal.State(t.Context(), func(r audit.Record) error {
		if r.Entry.Kind == "certificate.import/outcome" && r.Entry.Field("accept_subject") == audit.Bool(true) {
			accepted++
		}
		return nil
	}))
	if accepted != 1 {
		t.Errorf("%d entries say that the subject was accepted", accepted)
	}
}

// TestBundles is about the forms in which a CA hands out certificates; the chain comes with them.
func TestBundles(t *testing.T) {
	t.Parallel()
	for name, form := range map[string]func(leaf, sub *smx509.Certificate) []byte{
		"PEM": func(leaf, sub *smx509.Certificate) []byte { return pki.EncodeCertificatePEMs(leaf, sub) },
		"PEM, mark and words": func(leaf, sub *smx509.Certificate) []byte {
			return append([]byte("\xef\xbb\xbfsubject=x\n"), pki.EncodeCertificatePEMs(sub, leaf)...)
		},
		"PKCS#7": func(leaf, sub *smx509.Certificate) []byte {
			return pkcs7(t, []int{1, 2, 840, 113549, 1, 7, 2}, leaf, sub)
		},
		"PKCS#7, GM/T 0010": func(leaf, sub *smx509.Certificate) []byte {
			return pkcs7(t, []int{1, 2, 156, 10197, 6, 1, 4, 2, 2}, leaf, sub)
		},
		"PKCS#7 in PEM": func(leaf, sub *smx509.Certificate) []byte {
			return pem.EncodeToMemory(&pem.Block{Type: "PKCS7", Bytes: pkcs7(t, []int{1, 2, 840, 113549, 1, 7, 2}, leaf, sub)})
		},
		"base64 without words": func(leaf, sub *smx509.Certificate) []byte {
			return []byte(base64.StdEncoding.EncodeToString(pkcs7(t, []int{1, 2, 840, 113549, 1, 7, 2}, leaf, sub)) + "\r\n")
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newClinic(t)
			deep := c.root.below("三级")
			leaf := deep.issue(c.request.CSR, nil)
			wants(t, "without its intermediate", c.take(leaf), problem.CertificateUntrusted)
			done, err := c.Directory.ImportCertificates(t.Context(), "admin", account.Import{File: form(leaf, deep.cert)})
			if err != nil || len(done) != 1 || done[0].Owner != "signer:"+doctor {
				t.Fatalf("%+v, %v", done, err)
			}
			// The intermediate that came along can vouch for a list.
			_, _, err = c.sign()
			wants(t, "without the list of its issuer", err, problem.CertificateUnusable)
			_, _, err = c.Directory.ImportCRL(t.Context(), "admin", deep.crl(1, testkit.Start.Add(-time.Minute), time.Hour), "test")
			c.must(nil, err)
			if _, _, err := c.sign(); err != nil {
				t.Error(err)
			}
		})
	}
}

// pkcs7 is a SignedData with certificates only.
func pkcs7(t *testing.T, kind []int, certs ...*smx509.Certificate) []byte {
	t.Helper()
	var all []byte
	for _, c := range certs {
		all = append(all, c.Raw...)
	}
	type contentInfo struct {
		Type    asn1.ObjectIdentifier
		Content asn1.RawValue `asn1:"optional"`
	}
	signed, err := asn1.Marshal(struct {
		Version    int
		Algorithms asn1.RawValue
		Content    contentInfo
		Certs      asn1.RawValue
		Signers    asn1.RawValue
	}{
		1, asn1.RawValue{Tag: 17, IsCompound: true}, contentInfo{Type: asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 1}},
		asn1.RawValue{Class: 2, Tag: 0, IsCompound: true, Bytes: all}, asn1.RawValue{Tag: 17, IsCompound: true},
	})
	if err != nil {
		t.Fatal(err)
	}
	out, err := asn1.Marshal(contentInfo{kind, asn1.RawValue{Class: 2, Tag: 0, IsCompound: true, Bytes: signed}})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestForeignCRLs(t *testing.T) {
	t.Parallel()
	c := newClinic(t)
	cert := c.sub.issue(c.request.CSR, nil)
	c.must(nil, c.take(cert))
	c.lists(5)
	now := c.Clock.Now().Time
	stranger := newAuthority(t, "无名 CA", newKey(t))
	imposter := &authority{t: t, key: newKey(t), cert: c.sub.cert} // the right name, another key
	noCRLs := c.root.below("不签列表的 CA")
	quiet := caTemplate("不签列表的 CA")
	quiet.KeyUsage = smx509.KeyUsageCertSign
	mute := c.root.make(quiet, c.root.cert, noCRLs.key.Public())
	_, err := c.Directory.AddIntermediates(t.Context(), "admin", mute.Raw)
	c.must(nil, err)
	forged := c.sub.crl(9, now, time.Hour)
	forged[len(forged)-1] ^= 1
	size := c.Journal.Size()
	for name, tt := range map[string]struct {
		der  []byte
		want problem.Code
	}{
		"garbage":              {[]byte("no list"), problem.CRLMalformed},
		"a certificate":        {cert.Raw, problem.CRLMalformed},
		"of an unknown CA":     {stranger.crl(9, now, time.Hour), problem.CRLUntrusted},
		"by another key":       {imposter.crl(9, now, time.Hour), problem.CRLUntrusted},
		"changed":              {forged, problem.CRLUntrusted},
		"CA without the right": {(&authority{t: t, key: noCRLs.key, cert: noCRLs.cert}).crl(9, now, time.Hour), problem.CRLUntrusted},
		"lower number":         {c.sub.crl(4, now, time.Hour), problem.CRLOlder},
		"same number":          {c.sub.crl(5, now, 2*time.Hour), problem.CRLOlder},
		"earlier":              {c.sub.crl(6, now.Add(-time.Hour), 2*time.Hour), problem.CRLOlder},
		"from the future":      {c.sub.crl(6, now.Add(time.Minute), time.Hour), problem.CRLFuture},
		"of our own CA":        {c.Directory.CRL("SM2").DER, problem.CRLUntrusted},
	} {
		_, _, err := c.Directory.ImportCRL(t.Context(), "admin", tt.der, "test")
		wants(t, name, err, tt.want)
	}
	if n := c.Journal.Size(); n != size {
		t.Errorf("refusals wrote %d entries", n-size)
	}
	if _, _, err := c.sign(); err != nil {
		t.Fatal(err)
	}
	// The identical list, in PEM this time, changes nothing.
	same := pki.EncodeCRLPEM(c.sub.crl(6, now, 24*time.Hour))
	for _, fresh := range []bool{true, false} {
		_, got, err := c.Directory.ImportCRL(t.Context(), "admin", same, "test")
		if err != nil || got != fresh {
			t.Errorf("ImportCRL = %v, %v, want %v", got, err, fresh)
		}
	}
	if n := c.Journal.Size(); n < size+2 || n > size+4 { // a list and a signature, and what the clock and the kit add
		t.Errorf("%d entries were written", n-size)
	}
	for _, l := range c.Directory.ListCRLs() {
		if l.State != "current" {
			t.Errorf("%+v", l)
		}
	}
	// Past its end the status is unknown.
	c.Clock.Advance(25 * time.Hour)
	_, _, err = c.sign()
	wants(t, "a stale list", err, problem.CertificateUnusable)
	if !strings.Contains(err.Error(), "吊销列表") {
		t.Errorf("%v", err)
	}
	// Under the policy "soft" it signs; the evidence says so by itself and in the journal.
	c.SoftRevocation = true
	c.Restart()
	_, record, err := c.sign()
	c.must(nil, err)
	r := c.judge(record)
	if r.Verdict != pki.Indeterminate {
		t.Errorf("verdict under soft: %+v", r)
	}
	if !slices.ContainsFunc(r.Statements, func(s string) bool { return strings.Contains(s, "revocation") }) {
		t.Errorf("statements %q", r.Statements)
	}
}

// TestRequestsForOwnKeys is about the keys of the appliance itself, and about requests that are cut off.
func TestRequestsForOwnKeys(t *testing.T) {
	t.Parallel()
	c := newClinic(t)
	_, err := c.Directory.RequestCertificate(t.Context(), "admin", account.RequestSpec{For: "tsa:gone"})
	wants(t, "unknown key", err, problem.NotFound)
	_, err = c.Directory.RequestCertificate(t.Context(), "admin", account.RequestSpec{For: "signer:D404"})
	wants(t, "unknown signer", err, problem.SignerUnknown)
	_, err = c.Directory.RequestCertificate(t.Context(), "admin", account.RequestSpec{For: "tsa:sm2", Hosts: []string{"a.test"}})
	wants(t, "hosts of a unit", err, problem.InvalidRequest)
	for _, bad := range []string{"张三", "CN=", "CN=a,CN=b", "XX=a,CN=b", "C=CHN,CN=b", "O=b", "CN=" + strings.Repeat("长", 65)} {
		_, err := c.Directory.RequestCertificate(t.Context(), "admin", account.RequestSpec{For: "tsa:sm2", Subject: bad})
		wants(t, bad, err, problem.InvalidRequest)
	}
	had := c.TSA.Labels()
	lost := errors.New("lost")
	c.Journal.FailKind("certificate.request/outcome", 1, false, lost)
	if _, err := c.Directory.RequestCertificate(t.Context(), "admin", account.RequestSpec{For: "tsa:sm2", NewKey: true}); err == nil {
		t.Error("a request that was not journalled was answered")
	}
	c.Restart() // settles
	if got := c.TSA.Labels(); !slices.Equal(got, had) {
		t.Errorf("keys left behind: %q, before %q", got, had)
	}

	// Written, and the answer lost: what was written holds, now and after a restart.
	for kind, act := range map[string]func() error{
		"certificate.request/outcome": func() error {
			_, err := c.Directory.RequestCertificate(t.Context(), "admin", account.RequestSpec{For: "signer:" + doctor, Replace: true})
			return err
		},
		"certificate.import/outcome": func() error { return c.take(c.sub.issue(c.request.CSR, nil)) },
		"trust.crl/outcome": func() error {
			_, _, err := c.Directory.ImportCRL(t.Context(), "admin", c.sub.crl(7, testkit.Start, time.Hour), "test")
			return err
		},
	} {
		c.Journal.FailKind(kind, 1, true, audit.ErrOutcomeUnknown)
		if err := act(); problem.CodeOf(err) != problem.Timeout {
			t.Errorf("%s, answer lost: %v", kind, err)
		}
		c.Journal.Fault(nil)
	}
	c.must(c.Directory.AddAnchor(t.Context(), "admin", c.root.cert.Raw, account.Uses, "again")) // settles the last doubt
	before := c.Directory.Certificates()
	staffKeys := c.Staff.Labels()
	c.Restart()
	if after := c.Directory.Certificates(); !reflect.DeepEqual(before, after) || !slices.Equal(staffKeys, c.Staff.Labels()) {
		t.Errorf("after lost answers a restart differs:\n%+v\n%+v", before, after)
	}

	r := c.ask(account.RequestSpec{For: "tsa:sm2", NewKey: true, Subject: "CN=时间戳单元 2,O=某医院,C=CN"})
	c.Restart()
	if got := c.TSA.Labels(); len(got) != len(had)+1 || !slices.Contains(got, r.Label) {
		t.Errorf("keys after a restart %q", got)
	}
	wants(t, "a staff certificate for a unit's key", c.take(c.sub.issue(r.CSR, func(x *smx509.Certificate) { x.ExtraExtensions = nil })), problem.CertificatePurpose)
	unit := c.sub.issue(r.CSR, nil)
	c.must(nil, c.take(unit))
	label, _, path, err := c.Directory.Current("tsa:sm2")
	if err != nil || label != r.Label || len(path) != 3 || !reflect.DeepEqual(path[0].Raw, unit.Raw) {
		t.Errorf("Current = %s, %d, %v", label, len(path), err)
	}
	if r := c.ask(account.RequestSpec{For: "tsa:sm2", Replace: true}); r.Label != label {
		t.Errorf("a renewal of %s for %s", label, r.Label)
	}
}

func TestAnchors(t *testing.T) {
	t.Parallel()
	c := newClinic(t)
	ctx := context.Background()
	cert := c.sub.issue(c.request.CSR, nil)
	c.must(nil, c.take(cert))
	_, err := c.Directory.AddAnchor(ctx, "admin", cert.Raw, []string{"staff"}, "")
	wants(t, "no CA", err, problem.CertificatePurpose)
	_, err = c.Directory.AddAnchor(ctx, "admin", pki.EncodeCertificatePEMs(c.root.cert, c.sub.cert), []string{"staff"}, "")
	wants(t, "two", err, problem.CertificateMalformed)
	_, err = c.Directory.AddAnchor(ctx, "admin", c.root.cert.Raw, []string{"everything"}, "")
	wants(t, "unknown use", err, problem.InvalidRequest)
	_, err = c.Directory.AddAnchor(ctx, "admin", c.root.cert.Raw, nil, "")
	wants(t, "no use", err, problem.InvalidRequest)
	old := newAuthority(t, "旧根", newKey(t))
	c.Clock.Advance(11 * year)
	_, err = c.Directory.AddAnchor(ctx, "admin", old.cert.Raw, []string{"staff"}, "")
	wants(t, "expired", err, problem.CertificateExpired)
	c.Clock.Advance(-11 * year)
	weakRoot := newAuthority(t, "x", newKey(t))
	_, err = c.Directory.AddIntermediates(ctx, "admin", weakRoot.below("无根").cert.Raw)
	wants(t, "an intermediate of nobody", err, problem.CertificateUntrusted)

	// Withdrawn, it carries nothing new, also after a restart; admitted again, it does.
	id := ""
	for _, a := range c.Directory.Anchors() {
		if a.Note == "市 CA" {
			id = a.ID
		}
	}
	if _, err := c.Directory.WithdrawAnchor(ctx, "admin", id[:6], "x"); problem.CodeOf(err) != problem.NotFound {
		t.Errorf("a short id: %v", err)
	}
	c.must(c.Directory.WithdrawAnchor(ctx, "admin", id[:12], "合同到期"))
	for range 2 {
		_, _, err = c.sign()
		wants(t, "anchor withdrawn", err, problem.CertificateUnusable)
		if slices.ContainsFunc(c.Directory.AnchorsFor(pki.StaffSigning), func(x *smx509.Certificate) bool { return reflect.DeepEqual(x.Raw, c.root.cert.Raw) }) {
			t.Error("a withdrawn anchor vouches")
		}
		c.Restart()
	}
	c.must(c.Directory.AddAnchor(ctx, "admin", c.root.cert.Raw, []string{"staff"}, "续签"))
	if _, _, err := c.sign(); err != nil {
		t.Error(err)
	}

	// The CA renews its root, key and name being the same. The old one goes, and the certificate finds its way to the new
	// one when it is imported again; a second time there is nothing to do.
	template := caTemplate("市 CA 根")
	renewed := c.root.make(template, template, c.root.key.Public())
	c.must(c.Directory.AddAnchor(ctx, "admin", renewed.Raw, []string{"staff"}, "新根"))
	c.must(c.Directory.WithdrawAnchor(ctx, "admin", id, "换根"))
	_, _, err = c.sign()
	wants(t, "under the old root", err, problem.CertificateUnusable)
	for _, already := range []bool{false, true} {
		done, err := c.Directory.ImportCertificates(ctx, "admin", account.Import{File: cert.Raw})
		if err != nil || len(done) != 1 || done[0].Already != already || done[0].State != account.StateActive {
			t.Errorf("imported again: %+v, %v, want already %v", done, err, already)
		}
	}
	c.Restart()
	if serial, _, err := c.sign(); err != nil || serial != pki.SerialHex(cert.SerialNumber) {
		t.Errorf("under the new root: %s, %v", serial, err)
	}
	if n := len(c.Directory.Paths("signer:" + doctor)); n != 1 {
		t.Errorf("%d certificates, want the one", n)
	}
}

// Doctors are imported side by side while others sign.
func TestImportsSideBySide(t *testing.T) {
	t.Parallel()
	c := newClinic(t)
	cert := c.sub.issue(c.request.CSR, nil)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			if err := c.take(cert); err != nil {
				t.Error(err)
			}
			c.Directory.Certificates()
		})
	}
	wg.Wait()
	n := 0
	for _, l := range c.Directory.Certificates() {
		if l.Owner == "signer:"+doctor {
			n++
		}
	}
	if n != 1 {
		t.Errorf("%d lines", n)
	}
}

// Once a real certificate has begun, the one for evaluation never signs again, whatever becomes of the real one.
func TestEvaluationEndsWithTheFirstRealOne(t *testing.T) {
	t.Parallel()
	c := newClinic(t)
	g := c.Doctor("D002", "SM2") // with a certificate for evaluation
	use := func() (string, error) {
		c.signCount++
		r, err := c.Signing.Sign(t.Context(), c.app, testkit.Request(strings.Repeat("e", c.signCount), "D002"))
		if err != nil {
			return "", err
		}
		cert, err := pki.ParseCertificate(r.Certificates[0])
		c.must(nil, err)
		return pki.SerialHex(cert.SerialNumber), nil
	}
	r := c.ask(account.RequestSpec{For: "signer:D002"})
	next := c.sub.issue(r.CSR, func(x *smx509.Certificate) { x.NotBefore = testkit.Start.Add(time.Hour) })
	c.must(nil, c.take(next))
	if serial, err := use(); err != nil || serial != c.Serial(g, "SM2") {
		t.Errorf("before the real one begins: %s, %v", serial, err)
	}
	// A CA that dates back: the real one signs all the same.
	dated := c.sub.issue(r.CSR, func(x *smx509.Certificate) { x.NotBefore = testkit.Start.Add(-year) })
	c.must(nil, c.take(dated))
	if serial, err := use(); err != nil || serial != pki.SerialHex(dated.SerialNumber) {
		t.Errorf("dated back: %s, %v", serial, err)
	}
	c.lists(2, dated)
	if serial, err := use(); problem.CodeOf(err) != problem.CertificateUnusable {
		t.Errorf("the real one revoked: %s, %v", serial, err)
	}
	c.Clock.Advance(2 * time.Hour)
	if serial, err := use(); err != nil || serial != pki.SerialHex(next.SerialNumber) {
		t.Errorf("the next one: %s, %v", serial, err)
	}
}

// Two CAs of one name with keys of their own, as a house has that issues under SM2 and under RSA: the lists of one neither
// take the place of the other's nor keep it out, and each says only what its own certificates are.
func TestListsOfOneName(t *testing.T) {
	t.Parallel()
	c := newClinic(t)
	twin := c.root.below(c.sub.cert.Subject.CommonName)
	_, err := c.Directory.AddIntermediates(t.Context(), "admin", twin.cert.Raw)
	c.must(nil, err)
	cert := c.sub.issue(c.request.CSR, nil)
	c.must(nil, c.take(cert))
	c.lists(5)
	now := c.Clock.Now().Time
	other := func(number int64, revoked ...*smx509.Certificate) {
		t.Helper()
		if _, fresh, err := c.Directory.ImportCRL(t.Context(), "admin", twin.crl(number, now, time.Hour, revoked...), "test"); err != nil || !fresh {
			t.Fatalf("the other's list %d: %v, %v", number, fresh, err)
		}
	}
	other(3, cert) // another certificate of that number
	if status, ok := c.Directory.Certificate(pki.SerialHex(cert.SerialNumber)); !ok || status.Status != "good" {
		t.Errorf("status %+v", status)
	}
	if _, _, err := c.sign(); err != nil {
		t.Error(err)
	}
	c.lists(6, cert)
	other(9)
	if status, ok := c.Directory.Certificate(pki.SerialHex(cert.SerialNumber)); !ok || status.Status != "revoked" {
		t.Errorf("status %+v", status)
	}
	for range 2 {
		_, _, err = c.sign()
		wants(t, "revoked by its own CA", err, problem.CertificateUnusable)
		if !strings.Contains(err.Error(), "吊销") || strings.Contains(err.Error(), "不明") {
			t.Errorf("%v", err)
		}
		if got := len(c.Directory.ListCRLs()); got != 5 { // our two, the root's, and one of each twin
			t.Errorf("%d lists", got)
		}
		c.SoftRevocation = true
		c.Restart()
	}
}

// A start reads the newest list of each kind, however many there were.
func TestReplayReadsTheNewestLists(t *testing.T) {
	t.Parallel()
	c := newClinic(t)
	cert := c.sub.issue(c.request.CSR, nil)
	c.must(nil, c.take(cert))
	for i := range int64(10) {
		c.lists(2 + i)
	}
	c.lists(20, cert)
	read := 0
	d := account.New(account.Config{Journal: c.Journal, Clock: c.Clock, MAC: c.House.Log, CAs: c.CAs, Log: logrus.New(), Slots: map[hsm.SlotClass]hsm.Token{hsm.Staff: c.Staff}})
	c.must(nil, c.Journal.State(t.Context(), func(r audit.Record) error {
		return d.Replay(t.Context(), &r.Entry, func(name string) ([]byte, error) {
			if r.Entry.Kind == "trust.crl/outcome" {
				read++
			}
			return c.Journal.Payload(t.Context(), &r.Entry, name)
		})
	}))
	c.must(nil, d.Settle(t.Context()))
	if read != 2 { // of the root and of the one below
		t.Errorf("%d lists were read", read)
	}
	if got, want := d.ListCRLs(), c.Directory.ListCRLs(); !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, want %+v", got, want)
	}
	if status, ok := d.Certificate(pki.SerialHex(cert.SerialNumber)); !ok || status.Status != "revoked" {
		t.Errorf("%+v", status)
	}
}

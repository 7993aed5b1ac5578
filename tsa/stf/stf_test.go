package stf_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"io"
	"math/big"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/emmansun/gmsm/smx509"
	"github.com/sirupsen/logrus"

	"yinjian/appliance/cms"
	"yinjian/appliance/cms/cmstest"
	"yinjian/appliance/pki"
	"yinjian/ntp"
	"yinjian/tsa"
	"yinjian/tsa/stf"
)

func TestMain(m *testing.M) { cmstest.Main(m) }

var (
	epoch  = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	now    = time.Date(2026, 11, 21, 10, 20, 30, 120456789, time.UTC)
	policy = asn1.ObjectIdentifier{1, 2, 156, 112600, 1, 1}
	data   = []byte("出院小结")
)

type softKey struct{ crypto.Signer }

func (k softKey) SignMessage(ctx context.Context, message []byte) ([]byte, error) {
	return cmstest.SignMessage(ctx, k.Signer, message)
}

// A unit signs tokens; it is also the clock, the serials and the journal of its authority.
type unit struct {
	key      softKey
	ca, cert *smx509.Certificate
	reading  ntp.Reading
	serial   atomic.Int64
	broken   bool
}

func (u *unit) Now() ntp.Reading { return u.reading }

func (u *unit) Next(context.Context) (*big.Int, error) { return big.NewInt(u.serial.Add(1)), nil }

func (u *unit) RecordToken(context.Context, *tsa.Token) error {
	if u.broken {
		return errors.New("disk gone")
	}
	return nil
}

func newUnit(key, caKey crypto.Signer, cn string) *unit {
	ca := cmstest.Issue(&smx509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "Test CA " + cn}, NotBefore: epoch, NotAfter: epoch.AddDate(20, 0, 0),
		IsCA: true, BasicConstraintsValid: true, MaxPathLen: -1, KeyUsage: smx509.KeyUsageCertSign | smx509.KeyUsageCRLSign,
	}, nil, caKey.Public(), caKey)
	purpose, err := asn1.Marshal([]asn1.ObjectIdentifier{{1, 3, 6, 1, 5, 5, 7, 3, 8}})
	if err != nil {
		panic(err)
	}
	cert := cmstest.Issue(&smx509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: epoch, NotAfter: epoch.AddDate(5, 0, 0), SubjectKeyId: []byte("unit"),
		Subject:         pkix.Name{CommonName: cn, Country: []string{"CN"}, Organization: []string{"Hospital"}, Locality: []string{"Guangzhou"}},
		EmailAddresses:  []string{"tsa@hospital.test"},
		KeyUsage:        smx509.KeyUsageDigitalSignature | smx509.KeyUsageContentCommitment,
		ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 37}, Critical: true, Value: purpose}},
	}, ca, key.Public(), caKey)
	return &unit{key: softKey{key}, ca: ca, cert: cert, reading: ntp.Reading{Time: now, Bound: 37 * time.Millisecond, State: ntp.Trusted}}
}

var (
	sm2Unit = sync.OnceValue(func() *unit { return newUnit(cmstest.NewSM2Key(), cmstest.NewSM2Key(), "Test TSU") })
	rsaUnit = sync.OnceValue(func() *unit { return newUnit(cmstest.NewRSAKey(2048), cmstest.NewRSAKey(2048), "Test TSU") })
	other   = sync.OnceValue(func() *unit { return newUnit(cmstest.NewSM2Key(), cmstest.NewSM2Key(), "Other") })
)

func (u *unit) authority(t testing.TB, profile cms.Profile) *tsa.Authority {
	t.Helper()
	log := logrus.New()
	log.SetOutput(io.Discard)
	a, err := tsa.New(tsa.Config{
		Name: "test", Policy: policy, Accuracy: time.Second, Signer: u.key, Chain: []*smx509.Certificate{u.cert, u.ca}, Profile: profile,
		Clock: u, Serials: u, Recorder: u, Log: log,
	})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// environment has one unit, which answers whatever algorithm it is asked for unless it is not its own.
func environment(t testing.TB, u *unit, profile cms.Profile, change func(*stf.Config)) *stf.Environment {
	t.Helper()
	a := u.authority(t, profile)
	own := stf.SM3SM2
	if _, ok := u.cert.PublicKey.(interface{ Size() int }); ok {
		own = stf.SHA256RSA
	}
	c := stf.Config{
		Respond: func(ctx context.Context, alg stf.SignatureAlgorithm, request []byte) ([]byte, error) {
			if alg != own {
				return nil, stf.ErrNoUnit
			}
			return a.Respond(ctx, request), nil
		},
		Judge: func(leaf *smx509.Certificate, others []*smx509.Certificate, at time.Time) *pki.PathReport {
			return pki.VerifyPath(pki.Options{Leaf: leaf, Intermediates: others, Anchors: []*smx509.Certificate{u.ca}, At: at, Purpose: pki.TimeStamping})
		},
	}
	if change != nil {
		change(&c)
	}
	e := stf.InitEnvironment(c)
	t.Cleanup(e.ClearEnvironment)
	return e
}

func must[T any](t testing.TB) func(v T, err error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// TestRoundTrip: request, response, verification and every item that a token tells, for each unit and both outer types.
func TestRoundTrip(t *testing.T) {
	t.Parallel()
	for name, row := range map[string]struct {
		unit    func() *unit
		profile cms.Profile
		hash    stf.HashAlgorithm
		alg     stf.SignatureAlgorithm
	}{
		"sm2":        {sm2Unit, cms.RFC5652, stf.SM3, stf.SM3SM2},
		"sm2 gm0010": {sm2Unit, cms.GM0010, stf.SM3, stf.SM3SM2},
		"rsa":        {rsaUnit, cms.RFC5652, stf.SHA256, stf.SHA256RSA},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			u := row.unit()
			e := environment(t, u, row.profile, nil)
			q := must[[]byte](t)(e.CreateTSRequest(data, stf.WithCertificate, nil, row.hash))
			resp := must[[]byte](t)(e.CreateTSResponse(t.Context(), q, row.alg))

			v := must[*stf.Validity](t)(e.VerifyTSValidity(resp, row.hash, row.alg, nil))
			if v.Given || !v.Signer.Equal(u.cert) || !slices.Equal(v.Unchecked, []string{pki.CheckPathRevocation}) {
				t.Errorf("verified with %v, unchecked %v", v.Signer.Subject, v.Unchecked)
			}
			if _, err := v.Token.VerifyData(data); err != nil {
				t.Error(err)
			}
			issuer, issued, err := e.GetTSInfo(resp)
			if err != nil || issuer != "Test TSU" || !issued.Equal(now.Truncate(time.Millisecond)) {
				t.Errorf("GetTSInfo = %q %v %v", issuer, issued, err)
			}
			for item, want := range map[stf.Item]string{
				stf.TimeOfIssue: "20261121102030.12Z", stf.SignerCN: "Test TSU", stf.Precision: "0.038s",
				stf.SignerCountry: "CN", stf.SignerOrg: "Hospital", stf.SignerCity: "Guangzhou", stf.SignerEmail: "tsa@hospital.test",
			} {
				d, err := e.GetTSDetail(t.Context(), resp, item)
				if err != nil || d.Text != want || d.From != "token" || d.Item != item {
					t.Errorf("item %d = %+v %v, want %q", item, d, err, want)
				}
			}
			if d := must[*stf.Detail](t)(e.GetTSDetail(t.Context(), resp, stf.ServerCert)); !bytes.Equal(d.Certificates[0], u.cert.Raw) {
				t.Error("another certificate")
			}
			if d := must[*stf.Detail](t)(e.GetTSDetail(t.Context(), resp, stf.CertChain)); len(d.Certificates) != 2 || !bytes.Equal(d.Certificates[1], u.ca.Raw) {
				t.Errorf("a chain of %d", len(d.Certificates))
			}
			// a token cannot tell these, and nothing is made up
			for _, item := range []stf.Item{stf.OriginalData, stf.SourceOfTime, stf.ResponseType} {
				if d, err := e.GetTSDetail(t.Context(), resp, item); codeOf(err) != stf.AddInfoNotAvailable {
					t.Errorf("item %d = %+v %v", item, d, err)
				}
			}

			// without certificate in the response, the given one serves
			q = must[[]byte](t)(e.CreateTSRequest(data, stf.WithoutCertificate, nil, row.hash))
			bare := must[[]byte](t)(e.CreateTSResponse(t.Context(), q, row.alg))
			if v, err := e.VerifyTSValidity(bare, 0, 0, u.cert.Raw); err != nil || !v.Given || !v.Signer.Equal(u.cert) {
				t.Errorf("with the given certificate: %+v %v", v, err)
			}
			if d := must[*stf.Detail](t)(e.GetTSDetail(t.Context(), bare, stf.Precision)); d.Text != "0.038s" {
				t.Errorf("precision %q", d.Text)
			}
			// a bare token is read too
			if _, err := e.VerifyTSValidity(v.Token.DER, row.hash, row.alg, u.cert.Raw); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestJournalItems: source of time and manner of response are the journal's word.
func TestJournalItems(t *testing.T) {
	t.Parallel()
	var asked *tsa.Token
	e := environment(t, sm2Unit(), cms.RFC5652, func(c *stf.Config) {
		c.Known = func(_ context.Context, token *tsa.Token) (*stf.Known, error) {
			asked = token
			return &stf.Known{TimeSource: "BDS+lan", Transport: "HTTP"}, nil
		}
	})
	q := must[[]byte](t)(e.CreateTSRequest(data, stf.WithCertificate, nil, stf.SM3))
	resp := must[[]byte](t)(e.CreateTSResponse(t.Context(), q, stf.SM3SM2))
	for item, want := range map[stf.Item]string{stf.SourceOfTime: "BDS+lan", stf.ResponseType: "HTTP"} {
		d := must[*stf.Detail](t)(e.GetTSDetail(t.Context(), resp, item))
		if d.Text != want || d.From != "journal" || !bytes.Contains(resp, asked.DER) {
			t.Errorf("item %d = %+v, want %q of the journal", item, d, want)
		}
	}
}

func codeOf(err error) stf.Code {
	var e *stf.Error
	if !errors.As(err, &e) {
		return 0
	}
	return e.Code
}

// TestCodes reaches each code but NOT_ENOUGH_MEMORY, which no operation answers.
func TestCodes(t *testing.T) {
	t.Parallel()
	u := sm2Unit()
	e := environment(t, u, cms.RFC5652, nil)
	respond := func(f func() ([]byte, error)) *stf.Environment {
		return environment(t, u, cms.RFC5652, func(c *stf.Config) {
			c.Respond = func(context.Context, stf.SignatureAlgorithm, []byte) ([]byte, error) { return f() }
		})
	}
	q := must[[]byte](t)(e.CreateTSRequest(data, stf.WithCertificate, nil, stf.SM3))
	good := must[[]byte](t)(e.CreateTSResponse(t.Context(), q, stf.SM3SM2))
	bare := must[[]byte](t)(e.CreateTSResponse(t.Context(), must[[]byte](t)(e.CreateTSRequest(data, stf.WithoutCertificate, nil, stf.SM3)), stf.SM3SM2))
	spoiled := bytes.Clone(good)
	spoiled[len(spoiled)-1] ^= 1
	imprint := tsa.ImprintOf(data)
	elsewhere := must[[]byte](t)((&tsa.Request{Imprint: imprint, Policy: asn1.ObjectIdentifier{1, 2, 3}}).Bytes())
	untrusted := newUnit(cmstest.NewSM2Key(), cmstest.NewSM2Key(), "Untrusted time")
	untrusted.reading.State = ntp.Untrusted
	broken := newUnit(cmstest.NewSM2Key(), cmstest.NewSM2Key(), "Broken")
	broken.broken = true
	cleared := environment(t, u, cms.RFC5652, nil)
	cleared.ClearEnvironment()

	request := func(e *stf.Environment, data []byte, reqType int, ext []byte, h stf.HashAlgorithm) func() error {
		return func() error { _, err := e.CreateTSRequest(data, reqType, ext, h); return err }
	}
	response := func(e *stf.Environment, q []byte, alg stf.SignatureAlgorithm) func() error {
		return func() error { _, err := e.CreateTSResponse(t.Context(), q, alg); return err }
	}
	verify := func(e *stf.Environment, resp []byte, h stf.HashAlgorithm, alg stf.SignatureAlgorithm, cert []byte) func() error {
		return func() error { _, err := e.VerifyTSValidity(resp, h, alg, cert); return err }
	}
	detail := func(resp []byte, item stf.Item) func() error {
		return func() error { _, err := e.GetTSDetail(t.Context(), resp, item); return err }
	}
	info := func(e *stf.Environment, resp []byte) func() error {
		return func() error { _, _, err := e.GetTSInfo(resp); return err }
	}
	reached := map[stf.Code]bool{}
	for _, row := range []struct {
		name string
		do   func() error
		want stf.Code
	}{
		{"data too long", request(e, make([]byte, 64<<20+1), 0, nil, stf.SM3), stf.InDataTooLong},
		{"request too long", response(e, make([]byte, 16<<10+1), stf.SM3SM2), stf.InDataTooLong},
		{"response too long", info(e, make([]byte, 256<<10+1)), stf.InDataTooLong},
		{"no answer", response(respond(func() ([]byte, error) { return nil, io.ErrUnexpectedEOF }), q, stf.SM3SM2), stf.ServerError},
		{"rubbish as answer", response(respond(func() ([]byte, error) { return []byte{0x30, 0}, nil }), q, stf.SM3SM2), stf.ServerError},
		{"another's answer", response(respond(func() ([]byte, error) { return bare, nil }), q, stf.SM3SM2), stf.ServerError},
		{"no authority", response(stf.InitEnvironment(stf.Config{}), q, stf.SM3SM2), stf.ServerError},
		{"not a response", verify(e, []byte{0x30, 0}, 0, 0, nil), stf.Malformat},
		{"bytes after it", info(e, append(bytes.Clone(good), 0)), stf.Malformat},
		{"not a certificate", verify(e, good, 0, 0, []byte{0x30, 0}), stf.Malformat},
		{"item 0", detail(good, 0), stf.InvalidItem},
		{"item 13", detail(good, 13), stf.InvalidItem},
		{"spoiled", verify(e, spoiled, 0, 0, nil), stf.InvalidSignature},
		{"spoiled, its info", info(e, spoiled), stf.InvalidSignature},
		{"given certificate of another", verify(e, good, 0, 0, other().cert.Raw), stf.InvalidSignature},
		{"given certificate of the CA", verify(e, good, 0, 0, u.ca.Raw), stf.InvalidSignature},
		{"bare, certificate of another", verify(e, bare, 0, 0, other().cert.Raw), stf.InvalidSignature},
		{"foreign CA", verify(environment(t, other(), cms.RFC5652, nil), good, 0, 0, nil), stf.InvalidSignature},
		{"SHA-1", request(e, data, 0, nil, 2), stf.InvalidAlg},
		{"no such signature algorithm", response(e, q, 0x00010002), stf.InvalidAlg},
		{"no unit for it", response(e, q, stf.SHA256RSA), stf.InvalidAlg},
		{"other hash", verify(e, good, stf.SHA256, 0, nil), stf.InvalidAlg},
		{"other signature", verify(e, good, stf.SM3, stf.SHA256RSA, nil), stf.InvalidAlg},
		{"unknown hash", verify(e, good, 2, 0, nil), stf.InvalidAlg},
		{"imprint by SHA-1", response(e, slices.Concat([]byte{0x30, 0x26, 2, 1, 1, 0x30, 0x21, 0x30, 9, 6, 5, 0x2b, 0x0e, 3, 2, 0x1a, 5, 0, 4, 20}, make([]byte, 20)), stf.SM3SM2), stf.InvalidAlg},
		{"request type 2", request(e, data, 2, nil, stf.SM3), stf.InvalidRequest},
		{"version 2", response(e, bytes.Replace(q, []byte{2, 1, 1}, []byte{2, 1, 2}, 1), stf.SM3SM2), stf.InvalidRequest},
		{"not a request", response(e, []byte{0x30, 0}, stf.SM3SM2), stf.InvalidDataFormat},
		{"time not trusted", response(environment(t, untrusted, cms.RFC5652, nil), q, stf.SM3SM2), stf.TimeNotAvailable},
		{"policy", response(e, elsewhere, stf.SM3SM2), stf.UnacceptedPolicy},
		{"extension", request(e, data, 0, []byte{0xa0, 0}, stf.SM3), stf.UnacceptedExtension},
		{"extension in the request", response(e, append([]byte{0x30, q[1] + 2}, append(bytes.Clone(q[2:]), 0xa0, 0)...), stf.SM3SM2), stf.UnacceptedExtension},
		{"no certificate", verify(e, bare, 0, 0, nil), stf.AddInfoNotAvailable},
		{"no certificate, its info", info(e, bare), stf.AddInfoNotAvailable},
		{"no certificate, its chain", detail(bare, stf.CertChain), stf.AddInfoNotAvailable},
		{"no certificate, its city", detail(bare, stf.SignerCity), stf.AddInfoNotAvailable},
		{"rejected response", info(e, tsa.Reject(tsa.TimeNotAvailable, "no time")), stf.TimeNotAvailable},
		{"journal gone", response(environment(t, broken, cms.RFC5652, nil), q, stf.SM3SM2), stf.SystemFailure},
		{"cleared", request(cleared, data, 0, nil, stf.SM3), stf.SystemFailure},
		{"cleared, response", response(cleared, q, stf.SM3SM2), stf.SystemFailure},
		{"cleared, verify", verify(cleared, good, 0, 0, nil), stf.SystemFailure},
		{"cleared, info", info(cleared, good), stf.SystemFailure},
	} {
		if err := row.do(); codeOf(err) != row.want {
			t.Errorf("%s: %v, want %v", row.name, err, row.want)
		}
		reached[row.want] = true
	}
	for c := stf.InDataTooLong; c <= stf.SystemFailure; c++ {
		if !reached[c] && c != stf.NotEnoughMemory {
			t.Errorf("%v is not reached", c)
		}
	}
	if got := stf.SystemFailure.String(); got != "0x0400000E SYSTEM_FAILURE" {
		t.Errorf("the last code is %s", got)
	}
}

// TestExpired: a certificate that had ended at genTime makes the token bad, whoever gives it.
func TestExpired(t *testing.T) {
	t.Parallel()
	u := sm2Unit()
	e := environment(t, u, cms.RFC5652, func(c *stf.Config) {
		judge := c.Judge
		c.Judge = func(leaf *smx509.Certificate, others []*smx509.Certificate, _ time.Time) *pki.PathReport {
			return judge(leaf, others, u.cert.NotAfter.Add(time.Second))
		}
	})
	q := must[[]byte](t)(e.CreateTSRequest(data, stf.WithCertificate, nil, stf.SM3))
	resp := must[[]byte](t)(e.CreateTSResponse(t.Context(), q, stf.SM3SM2))
	if _, err := e.VerifyTSValidity(resp, 0, 0, nil); codeOf(err) != stf.InvalidSignature {
		t.Errorf("with an ended certificate: %v", err)
	}
}

// TestPeers: requests by openssl ts -query are answered, and others verify what CreateTSResponse made.
func TestPeers(t *testing.T) {
	t.Parallel()
	for name, row := range map[string]struct {
		unit func() *unit
		hash string
		alg  stf.SignatureAlgorithm
	}{"sm2": {sm2Unit, "-sm3", stf.SM3SM2}, "rsa": {rsaUnit, "-sha256", stf.SHA256RSA}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir, u := t.TempDir(), row.unit()
			e := environment(t, u, cms.RFC5652, nil)
			query, file, cert := filepath.Join(dir, "q.tsq"), filepath.Join(dir, "r.tsr"), cmstest.Write(t, filepath.Join(dir, "tsu.pem"), cmstest.CertPEM(u.cert))
			cmstest.MustOpenSSL(t, "ts", "-query", "-data", cmstest.Write(t, filepath.Join(dir, "data"), data), row.hash, "-cert", "-out", query)
			resp := must[[]byte](t)(e.CreateTSResponse(t.Context(), cmstest.Read(t, query), row.alg))
			cmstest.Write(t, file, resp)
			if _, err := e.VerifyTSValidity(resp, 0, row.alg, nil); err != nil {
				t.Error(err)
			}
			cmstest.MustBouncyCastle(t, "tst", file, query, cert)
			// and those that we ask
			ours := cmstest.Write(t, filepath.Join(dir, "ours.tsq"), must[[]byte](t)(e.CreateTSRequest(data, stf.WithCertificate, nil, stf.SHA256)))
			text := cmstest.MustOpenSSL(t, "ts", "-query", "-in", ours, "-text")
			for _, want := range []string{"Version: 1", "Hash Algorithm: sha256", "Nonce: 0x", "Certificate required: yes"} {
				if !strings.Contains(text, want) {
					t.Errorf("openssl reads our request as %s, without %q", text, want)
				}
			}
			if name == "rsa" { // openssl ts -verify cannot be told the SM2 identity
				ca := cmstest.Write(t, filepath.Join(dir, "ca.pem"), cmstest.CertPEM(u.ca))
				out := cmstest.MustOpenSSL(t, "ts", "-verify", "-attime", "1795256430", "-queryfile", query, "-in", file, "-CAfile", ca)
				if !strings.Contains(out, "Verification: OK") {
					t.Errorf("openssl says %q", out)
				}
			}
		})
	}
}

package tsa_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/sm3"
	"github.com/emmansun/gmsm/smx509"

	"yinjian/appliance/cms"
	"yinjian/appliance/cms/cmstest"
	"yinjian/ntp"
	"yinjian/tsa"
)

var data = []byte("SM2Signature")

func TestIssue(t *testing.T) {
	t.Parallel()
	for name, u := range units {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			u, req := u(), request(data)
			issued := u.token(t, req)
			if issued.Provenance != ntp.Reading(trusted()) {
				t.Errorf("provenance %v", issued.Provenance)
			}
			token, err := tsa.ParseToken(issued.DER)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(token.DER, issued.DER) {
				t.Error("the parsed token encodes to other bytes")
			}
			for _, tok := range []*tsa.Token{issued, token} {
				if want := time.Date(2026, 11, 21, 10, 20, 30, 120e6, time.UTC); !tok.GenTime.Equal(want) {
					t.Errorf("genTime %v, want %v", tok.GenTime, want)
				}
				// 37.2 ms of the clock and 0.457 ms cut off make 37.66, rounded up
				if want := 38 * time.Millisecond; tok.Accuracy != want {
					t.Errorf("accuracy %v, want %v", tok.Accuracy, want)
				}
				if !tok.Policy.Equal(policy) || tok.Nonce.Cmp(req.Nonce) != 0 || tok.Ordering || tok.Serial.BitLen() != 159 {
					t.Errorf("policy %v, nonce %v, ordering %v, serial %x", tok.Policy, tok.Nonce, tok.Ordering, tok.Serial)
				}
				if err := tok.Answers(req); err != nil {
					t.Error(err)
				}
				report, err := tok.VerifyData(data)
				if err != nil || !report.Signer.Equal(u.cert) {
					t.Errorf("VerifyData = %v: %v", err, report.Checks)
				}
				for _, c := range report.Checks {
					if c.Result != cms.Passed && c.ID != cms.CheckAlgorithmProtection {
						t.Errorf("%s: %s", c.ID, c.Result)
					}
				}
			}
			if got := len(token.Certificates()); got != 2 {
				t.Errorf("%d certificates, want unit and CA", got)
			}
			if !bytes.Contains(token.Message().Content, []byte("\x18\x1220261121102030.12Z")) {
				t.Error("genTime is not written as 20261121102030.12Z")
			}
			for _, oid := range []asn1.ObjectIdentifier{cms.OIDSigningTime, cms.OIDAlgorithmProtection} {
				if _, ok := token.Message().SignerInfos[0].Attribute(oid); ok {
					t.Errorf("token carries %v", oid)
				}
			}
		})
	}
}

func TestIssueWithoutOptions(t *testing.T) {
	t.Parallel()
	u := sm2Unit()
	c := u.config()
	c.Clock = fixedClock{Time: now.Truncate(time.Second), Bound: time.Second, State: ntp.Holdover}
	c.Profile = cms.GM0010
	token, err := newAuthority(t, c).Issue(t.Context(), &tsa.Request{Imprint: tsa.ImprintOf(data), Policy: policy})
	if err != nil {
		t.Fatal(err)
	}
	if token, err = tsa.ParseToken(token.DER); err != nil {
		t.Fatal(err)
	}
	if token.Nonce != nil || len(token.Certificates()) != 0 || token.Accuracy != time.Second {
		t.Errorf("nonce %v, %d certificates, accuracy %v", token.Nonce, len(token.Certificates()), token.Accuracy)
	}
	if !token.Message().OuterType.Equal(cms.OIDGMSignedData) || !token.Message().ContentType.Equal(cms.OIDTSTInfo) {
		t.Errorf("types %v, %v", token.Message().OuterType, token.Message().ContentType)
	}
	if _, err := token.VerifyData(data); !errors.Is(err, cms.ErrSignerCertificate) {
		t.Errorf("VerifyData without the certificate = %v", err)
	}
	if report, err := token.VerifyData(data, u.cert); err != nil {
		t.Errorf("VerifyData with the certificate = %v: %v", err, report.Checks)
	}
}

// TestGenTime: what is cut off genTime goes into the accuracy, and a fraction has no trailing zeros.
func TestGenTime(t *testing.T) {
	t.Parallel()
	second := time.Date(2028, 2, 29, 23, 59, 59, 0, time.UTC)
	for _, row := range []struct {
		nanos    int
		bound    time.Duration
		text     string
		accuracy time.Duration
	}{
		{0, 0, "20280229235959Z", time.Millisecond},
		{0, time.Millisecond, "20280229235959Z", time.Millisecond},
		{0, time.Millisecond + 1, "20280229235959Z", 2 * time.Millisecond},
		{1, time.Millisecond, "20280229235959Z", 2 * time.Millisecond},
		{999_999_999, time.Millisecond, "20280229235959.999Z", 2 * time.Millisecond},
		{100_000_000, 999 * time.Millisecond, "20280229235959.1Z", 999 * time.Millisecond},
		{10_000_000, time.Second, "20280229235959.01Z", time.Second},
		{1_000_000, 1500 * time.Millisecond, "20280229235959.001Z", 1500 * time.Millisecond},
	} {
		c := sm2Unit().config()
		c.Accuracy = 2 * time.Second
		c.Clock = fixedClock{Time: second.Add(time.Duration(row.nanos)).In(time.FixedZone("CST", 8*3600)), Bound: row.bound, State: ntp.Trusted}
		token, err := newAuthority(t, c).Issue(t.Context(), request(data))
		if err != nil {
			t.Errorf("%v: %v", row, err)
			continue
		}
		if token, err = tsa.ParseToken(token.DER); err != nil {
			t.Errorf("%v: %v", row, err)
			continue
		}
		if !bytes.Contains(token.Message().Content, append([]byte{0x18, byte(len(row.text))}, row.text...)) || token.Accuracy != row.accuracy {
			t.Errorf("%v: genTime %v, accuracy %v", row, token.GenTime, token.Accuracy)
		}
	}
}

func TestTimeNotAvailable(t *testing.T) {
	t.Parallel()
	for name, clock := range map[string]fixedClock{
		"cold":                {Time: now, Bound: time.Millisecond, State: ntp.Cold},
		"acquiring":           {Time: now, Bound: time.Millisecond, State: ntp.Acquiring},
		"untrusted":           {Time: now, Bound: time.Millisecond, State: ntp.Untrusted},
		"suspect":             {Time: now, Bound: time.Millisecond, State: ntp.Suspect},
		"no state":            {Time: now, Bound: time.Millisecond},
		"bound":               {Time: now.Truncate(time.Second), Bound: time.Second + 1, State: ntp.Trusted},
		"bound with cut":      {Time: now, Bound: time.Second, State: ntp.Trusted},
		"bound beyond any":    {Time: now, Bound: 1<<63 - 1 - 2*time.Millisecond, State: ntp.Trusted},
		"bound overflows":     {Time: now, Bound: 1<<63 - 1, State: ntp.Trusted},
		"negative bound":      {Time: now, Bound: -1, State: ntp.Trusted},
		"holdover, too vague": {Time: now, Bound: time.Minute, State: ntp.Holdover},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c, journal, calls := sm2Unit().config(), new(memJournal), new(atomic.Int64)
			c.Clock, c.Recorder = clock, journal
			c.Signer = softKey{key: sm2Unit().key.key, calls: calls}
			a := newAuthority(t, c)
			if token, err := a.Issue(t.Context(), request(data)); !errors.Is(err, tsa.ErrTimeNotAvailable) || token != nil {
				t.Errorf("Issue = %v, %v", token, err)
			}
			wantRejected(t, a.Respond(t.Context(), encode(t, request(data))), tsa.TimeNotAvailable)
			if calls.Load() != 0 || len(journal.tokens) != 0 {
				t.Errorf("%d signatures, %d entries, want none", calls.Load(), len(journal.tokens))
			}
		})
	}
}

// wantRejected reads the response by encoding/asn1, not by the code under test, and also compares the failInfo's bytes.
func wantRejected(t *testing.T, response []byte, want tsa.Failure) {
	t.Helper()
	var r struct {
		Status struct {
			Status   int
			Text     []string       `asn1:"optional"`
			FailInfo asn1.BitString `asn1:"optional"`
		}
	}
	rest, err := asn1.Unmarshal(response, &r)
	if err != nil || len(rest) > 0 {
		t.Fatalf("response %x: %v", response, err)
	}
	bits := asn1.BitString{Bytes: make([]byte, want/8+1), BitLength: int(want) + 1}
	bits.Bytes[want/8] = 0x80 >> (want % 8)
	if r.Status.Status != 2 || len(r.Status.Text) != 1 || r.Status.FailInfo.BitLength != bits.BitLength || !bytes.Equal(r.Status.FailInfo.Bytes, bits.Bytes) {
		t.Errorf("response %+v, want %v", r.Status, want)
	}
	parsed, err := tsa.ParseResponse(response)
	if err != nil || parsed.Token != nil || len(parsed.Failures) != 1 || parsed.Failures[0] != want || parsed.Err() == nil {
		t.Errorf("ParseResponse = %+v, %v", parsed, err)
	}
}

func TestRespond(t *testing.T) {
	t.Parallel()
	c, journal := sm2Unit().config(), new(memJournal)
	c.Recorder = journal
	req := request(data)
	response, err := tsa.ParseResponse(newAuthority(t, c).Respond(t.Context(), encode(t, req)))
	if err != nil {
		t.Fatal(err)
	}
	if response.Status != tsa.StatusGranted || response.Err() != nil || len(response.Text) != 0 {
		t.Fatalf("response %+v", response)
	}
	if err := response.Token.Answers(req); err != nil {
		t.Error(err)
	}
	if _, err := response.Token.VerifyData(data); err != nil {
		t.Error(err)
	}
	if len(journal.tokens) != 1 || !bytes.Equal(journal.tokens[0].DER, response.Token.DER) {
		t.Errorf("%d entries", len(journal.tokens))
	}
}

func TestRespondSystemFailure(t *testing.T) {
	t.Parallel()
	errDisk := errors.New("disk gone")
	for name, change := range map[string]func(*tsa.Config){
		"recorder":        func(c *tsa.Config) { c.Recorder = &memJournal{fail: func() (bool, error) { return false, errDisk }} },
		"recorder, late":  func(c *tsa.Config) { c.Recorder = &memJournal{fail: func() (bool, error) { return true, errDisk }} },
		"no recorder":     func(c *tsa.Config) { c.Recorder = nil },
		"signer":          func(c *tsa.Config) { c.Signer = softKey{key: sm2Unit().key.key, fail: errDisk} },
		"serials":         func(c *tsa.Config) { c.Serials = giving(nil, errDisk) },
		"serial nil":      func(c *tsa.Config) { c.Serials = giving(nil, nil) },
		"serial 0":        func(c *tsa.Config) { c.Serials = giving(new(big.Int), nil) },
		"serial negative": func(c *tsa.Config) { c.Serials = giving(big.NewInt(-1), nil) },
		"serial too long": func(c *tsa.Config) { c.Serials = giving(new(big.Int).Lsh(big.NewInt(1), 160), nil) },
		"expired": func(c *tsa.Config) {
			c.Clock = fixedClock{Time: epoch.AddDate(5, 0, 0).Add(time.Millisecond), State: ntp.Trusted}
		},
		"not yet valid": func(c *tsa.Config) { c.Clock = fixedClock{Time: epoch.Add(-time.Millisecond), State: ntp.Trusted} },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := sm2Unit().config()
			change(&c)
			wantRejected(t, newAuthority(t, c).Respond(t.Context(), encode(t, request(data))), tsa.SystemFailure)
		})
	}
	t.Run("context", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		wantRejected(t, newAuthority(t, sm2Unit().config()).Respond(ctx, encode(t, request(data))), tsa.SystemFailure)
	})
}

func giving(n *big.Int, err error) *memSerials {
	return &memSerials{give: func(int64) (*big.Int, error) { return n, err }}
}

func TestPrivateKeyUsagePeriod(t *testing.T) {
	t.Parallel()
	// SEQUENCE { [0] 20260601000000Z, [1] 20261201000000Z }
	value := []byte("\x30\x22\x80\x0f20260601000000Z\x81\x0f20261201000000Z")
	u := sm2Unit()
	c := u.config()
	c.Chain = []*smx509.Certificate{u.certificate(func(cert *smx509.Certificate) {
		cert.ExtraExtensions = append(cert.ExtraExtensions, pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 16}, Value: value})
	}), u.ca}
	for at, want := range map[time.Time]error{
		time.Date(2026, 5, 31, 23, 59, 59, 999e6, time.UTC): tsa.ErrCertificateNotValid,
		time.Date(2026, 6, 1, 0, 0, 0, 0, time.UTC):         nil,
		time.Date(2026, 12, 1, 0, 0, 0, 0, time.UTC):        nil,
		time.Date(2026, 12, 1, 0, 0, 0, 1e6, time.UTC):      tsa.ErrCertificateNotValid,
	} {
		c.Clock = fixedClock{Time: at, Bound: time.Millisecond, State: ntp.Trusted}
		if _, err := newAuthority(t, c).Issue(t.Context(), request(data)); !errors.Is(err, want) {
			t.Errorf("%v: Issue = %v, want %v", at, err, want)
		}
	}
}

func TestNewRefuses(t *testing.T) {
	t.Parallel()
	u := sm2Unit()
	withCert := func(change func(*smx509.Certificate)) func(*tsa.Config) {
		return func(c *tsa.Config) { c.Chain = []*smx509.Certificate{u.certificate(change), u.ca} }
	}
	extensions := func(e ...pkix.Extension) func(*tsa.Config) {
		return withCert(func(cert *smx509.Certificate) { cert.ExtraExtensions = e })
	}
	usage := asn1.ObjectIdentifier{2, 5, 29, 16}
	for name, change := range map[string]func(*tsa.Config){
		"no policy":          func(c *tsa.Config) { c.Policy = nil },
		"no accuracy":        func(c *tsa.Config) { c.Accuracy = 0 },
		"accuracy too fine":  func(c *tsa.Config) { c.Accuracy = time.Microsecond },
		"accuracy too vague": func(c *tsa.Config) { c.Accuracy = 2 * time.Hour },
		"no signer":          func(c *tsa.Config) { c.Signer = nil },
		"no clock":           func(c *tsa.Config) { c.Clock = nil },
		"no serials":         func(c *tsa.Config) { c.Serials = nil },
		"no log":             func(c *tsa.Config) { c.Log = nil },
		"no chain":           func(c *tsa.Config) { c.Chain = nil },
		"another key":        func(c *tsa.Config) { c.Signer = softKey{key: cmstest.NewSM2Key()} },
		"broken chain": func(c *tsa.Config) {
			c.Chain = []*smx509.Certificate{u.cert, newUnit(cmstest.NewSM2Key(), cmstest.NewSM2Key()).ca}
		},
		"no purpose":        extensions(),
		"not critical":      extensions(purpose(false, timeStamping)),
		"two purposes":      extensions(purpose(true, timeStamping, asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 3})),
		"other purpose":     extensions(purpose(true, asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 3})),
		"empty usage time":  extensions(purpose(true, timeStamping), pkix.Extension{Id: usage, Value: []byte{0x30, 0}}),
		"broken usage time": extensions(purpose(true, timeStamping), pkix.Extension{Id: usage, Value: []byte("\x30\x06\x80\x04now!")}),
		"key usage":         withCert(func(c *smx509.Certificate) { c.KeyUsage |= smx509.KeyUsageKeyEncipherment }),
		"no key usage":      withCert(func(c *smx509.Certificate) { c.KeyUsage = 0 }),
		"a CA":              withCert(func(c *smx509.Certificate) { c.IsCA, c.BasicConstraintsValid, c.MaxPathLen = true, true, -1 }),
		"unknown profile":   func(c *tsa.Config) { c.Profile = 9 },
		"content as data":   func(c *tsa.Config) { c.ContentType = cms.OIDData },
		"GM data elsewhere": func(c *tsa.Config) { c.ContentType = cms.OIDGMData },
		"data within GM":    func(c *tsa.Config) { c.Profile, c.ContentType = cms.GM0010, cms.OIDData },
	} {
		c := u.config()
		change(&c)
		if a, err := tsa.New(c); err == nil || a != nil {
			t.Errorf("%s: New = %v, %v, want an error", name, a, err)
		}
	}
}

func TestConcurrentIssue(t *testing.T) {
	t.Parallel()
	c, journal := sm2Unit().config(), new(memJournal)
	c.Recorder = journal
	a := newAuthority(t, c)
	const clients, each = 16, 25
	serials := make(map[string]bool)
	var mu sync.Mutex
	var wg sync.WaitGroup
	for i := range clients {
		wg.Go(func() {
			for n := range each {
				req := request(fmt.Appendf(nil, "%d-%d", i, n))
				req.Nonce = big.NewInt(int64(i*each + n))
				response, err := tsa.ParseResponse(a.Respond(t.Context(), encode(t, req)))
				if err != nil {
					t.Error(err)
					return
				}
				if err := response.Token.Answers(req); err != nil {
					t.Error(err)
				}
				mu.Lock()
				serials[response.Token.Serial.String()] = true
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if len(serials) != clients*each || len(journal.tokens) != clients*each {
		t.Errorf("%d serial numbers, %d entries, want %d", len(serials), len(journal.tokens), clients*each)
	}
}

// BenchmarkRespond gives a response's cost and, beside it, the raw signature's, in the same run: raw/response is the
// ratio of the medians. As in hsm.Key, the signer has ZA at hand: an SM2 signature costs e = SM3(ZA ‖ M) and the signature of e.
func BenchmarkRespond(b *testing.B) {
	for _, name := range []string{"sm2", "rsa"} {
		u := units[name]()
		c := u.config()
		key := newBenchKey(b, u.key.key)
		c.Signer, c.Recorder = key, forgetful{}
		a := newAuthority(b, c)
		req, message := encode(b, request(data)), make([]byte, 179) // about the length of the signed attributes
		b.Run(name, func(b *testing.B) {
			var raw, response []time.Duration
			for b.Loop() {
				start := time.Now() // interval
				if _, err := key.SignMessage(b.Context(), message); err != nil {
					b.Fatal(err)
				}
				between := time.Now() // interval
				if reply := a.Respond(b.Context(), req); len(reply) < 1000 {
					b.Fatal("no token")
				}
				raw, response = append(raw, between.Sub(start)), append(response, time.Since(between))
			}
			slices.Sort(raw)
			slices.Sort(response)
			middle := b.N / 2
			b.ReportMetric(float64(raw[middle])/float64(response[middle]), "raw/response")
			b.ReportMetric(float64(response[middle].Nanoseconds()), "ns/response")
		})
	}
}

// BenchmarkEncoding is all of Respond but the signature and the journal.
func BenchmarkEncoding(b *testing.B) {
	for _, name := range []string{"sm2", "rsa"} {
		u := units[name]()
		c := u.config()
		c.Recorder = forgetful{}
		signature, err := u.key.SignMessage(b.Context(), data)
		if err != nil {
			b.Fatal(err)
		}
		c.Signer = constantKey{u.key, signature}
		a := newAuthority(b, c)
		req := encode(b, request(data))
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if reply := a.Respond(b.Context(), req); len(reply) < 1000 {
					b.Fatal("no token")
				}
			}
		})
	}
}

// BenchmarkParseToken is what a process pays that has a token from another and knows the unit's chain.
func BenchmarkParseToken(b *testing.B) {
	u := sm2Unit()
	token := u.token(b, request(data)).DER
	b.ReportAllocs()
	for b.Loop() {
		if _, err := tsa.ParseToken(token, u.cert, u.ca); err != nil {
			b.Fatal(err)
		}
	}
}

type forgetful struct{}

func (forgetful) RecordToken(context.Context, *tsa.Token) error { return nil }

type constantKey struct {
	softKey
	signature []byte
}

func (k constantKey) SignMessage(context.Context, []byte) ([]byte, error) { return k.signature, nil }

// benchKey signs as hsm.Key does, with ZA computed once.
type benchKey struct {
	softKey
	za []byte // nil for RSA
}

func newBenchKey(b *testing.B, key crypto.Signer) benchKey {
	public, ok := key.Public().(*ecdsa.PublicKey)
	if !ok {
		return benchKey{softKey: softKey{key: key}}
	}
	za, err := sm2.CalculateZA(public, []byte("1234567812345678"))
	if err != nil {
		b.Fatal(err)
	}
	return benchKey{softKey{key: key}, za}
}

func (k benchKey) SignMessage(ctx context.Context, message []byte) ([]byte, error) {
	if k.za == nil {
		return k.softKey.SignMessage(ctx, message)
	}
	h := sm3.New()
	h.Write(k.za)
	h.Write(message)
	return k.key.Sign(rand.Reader, h.Sum(nil), nil)
}

package upstream_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"io"
	"math/big"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/emmansun/gmsm/smx509"
	"github.com/sirupsen/logrus"
	"golang.org/x/crypto/cryptobyte"
	der "golang.org/x/crypto/cryptobyte/asn1"

	"yinjian/api/stampclient"
	"yinjian/appliance/cms"
	"yinjian/appliance/cms/cmstest"
	"yinjian/ntp"
	"yinjian/packaging/porttest"
	"yinjian/tsa"
	"yinjian/tsa/upstream"
)

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

// A maker makes tokens as it is told, good or bad.
type maker struct {
	key      softKey
	ca, cert *smx509.Certificate
	caKey    crypto.Signer
	serial   atomic.Int64
}

func newMaker(key, caKey crypto.Signer) *maker {
	m := &maker{key: softKey{key}, caKey: caKey}
	m.ca = cmstest.Issue(&smx509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "Device CA"}, NotBefore: epoch.AddDate(-5, 0, 0), NotAfter: epoch.AddDate(20, 0, 0),
		IsCA: true, BasicConstraintsValid: true, MaxPathLen: -1, KeyUsage: smx509.KeyUsageCertSign | smx509.KeyUsageCRLSign,
	}, nil, caKey.Public(), caKey)
	m.cert = m.certificate(nil)
	return m
}

func (m *maker) certificate(change func(*smx509.Certificate)) *smx509.Certificate {
	template := &smx509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "Device"}, NotBefore: epoch.AddDate(-4, 0, 0), NotAfter: epoch.AddDate(5, 0, 0),
		KeyUsage: smx509.KeyUsageDigitalSignature, ExtraExtensions: []pkix.Extension{usage(1, 3, 6, 1, 5, 5, 7, 3, 8)},
	}
	if change != nil {
		change(template)
	}
	return cmstest.Issue(template, m.ca, m.key.Public(), m.caKey)
}

func usage(oid ...int) pkix.Extension {
	value, err := asn1.Marshal([]asn1.ObjectIdentifier{oid})
	if err != nil {
		panic(err)
	}
	return pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 37}, Critical: true, Value: value}
}

var (
	sm2Maker = sync.OnceValue(func() *maker { return newMaker(cmstest.NewSM2Key(), cmstest.NewSM2Key()) })
	rsaMaker = sync.OnceValue(func() *maker { return newMaker(cmstest.NewRSAKey(2048), cmstest.NewRSAKey(2048)) })
	stranger = sync.OnceValue(func() *maker { return newMaker(cmstest.NewSM2Key(), cmstest.NewSM2Key()) })
)

// A told is what a token says and is signed with.
type told struct {
	imprint  []byte // DER of MessageImprint
	nonce    *big.Int
	policy   asn1.ObjectIdentifier
	genTime  time.Time
	accuracy time.Duration
	cert     *smx509.Certificate
	bare     bool // without certificates
	profile  cms.Profile
}

// answer is a granted TimeStampResp to the query, after change has had its way.
func (m *maker) answer(query []byte, change func(*told)) []byte {
	req, err := tsa.ParseRequest(query)
	if err != nil {
		return tsa.Reject(tsa.BadDataFormat, err.Error())
	}
	s := cryptobyte.String(query)
	var body cryptobyte.String
	x := told{nonce: req.Nonce, policy: policy, genTime: now, accuracy: 500 * time.Millisecond, cert: m.cert, bare: !req.CertReq}
	if !s.ReadASN1(&body, der.SEQUENCE) || !body.SkipASN1(der.INTEGER) || !body.ReadASN1Element((*cryptobyte.String)(&x.imprint), der.SEQUENCE) {
		panic("not a request")
	}
	if change != nil {
		change(&x)
	}
	var b cryptobyte.Builder
	b.AddASN1(der.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1Int64(1)
		b.AddASN1ObjectIdentifier(x.policy)
		b.AddBytes(x.imprint)
		b.AddASN1Int64(m.serial.Add(1))
		b.AddASN1(der.GeneralizedTime, func(b *cryptobyte.Builder) { b.AddBytes([]byte(x.genTime.Format("20060102150405.999Z"))) })
		if x.accuracy > 0 {
			b.AddASN1(der.SEQUENCE, func(b *cryptobyte.Builder) {
				if s := int64(x.accuracy / time.Second); s > 0 {
					b.AddASN1Int64(s)
				}
				if ms := int64(x.accuracy % time.Second / time.Millisecond); ms > 0 {
					b.AddASN1Int64WithTag(ms, 0x80)
				}
			})
		}
		if x.nonce != nil {
			b.AddASN1BigInt(x.nonce)
		}
	})
	signed, err := cms.Sign(context.Background(), m.key, cms.Params{
		ContentType: cms.OIDTSTInfo, Content: b.BytesOrPanic(), Certificates: [][]byte{x.cert.Raw}, OmitCertificates: x.bare, Profile: x.profile,
	})
	if err != nil {
		panic(err)
	}
	return granted(signed.Bytes())
}

func granted(token []byte) []byte {
	var b cryptobyte.Builder
	b.AddASN1(der.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddBytes([]byte{0x30, 3, 2, 1, 0})
		b.AddBytes(token)
	})
	return b.BytesOrPanic()
}

// A fixedClock stands still until it is set.
type fixedClock struct{ atomic.Pointer[ntp.Reading] }

func (c *fixedClock) Now() ntp.Reading { return *c.Load() }

func newClock() *fixedClock {
	c := new(fixedClock)
	c.Store(&ntp.Reading{Time: now, Bound: 20 * time.Millisecond, State: ntp.Trusted, Provenance: "BDS+lan"})
	return c
}

func config(m *maker, ask func(ctx context.Context, query []byte) ([]byte, error)) upstream.Config {
	log := logrus.New()
	log.SetOutput(io.Discard)
	return upstream.Config{
		Name: "old-tsa", Ask: ask, Clock: newClock(), Timeout: time.Minute, Failures: 3, Probe: time.Hour, MaxAccuracy: time.Second,
		Allowance: time.Second, Anchors: func() []*smx509.Certificate { return []*smx509.Certificate{m.ca} },
		Standing: func([]*smx509.Certificate, time.Time) error { return nil }, Log: log,
	}
}

func device(t testing.TB, c upstream.Config) *upstream.Device {
	t.Helper()
	d, err := upstream.New(c)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// overHTTP serves a device and answers how it is asked.
func overHTTP(t testing.TB, h http.HandlerFunc) func(ctx context.Context, query []byte) ([]byte, error) {
	t.Helper()
	srv := httptest.NewServer(h)
	t.Cleanup(srv.Close)
	c, err := stampclient.New(stampclient.Config{URL: srv.URL + "/tsa", Now: func() time.Time { return now }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c.Ask
}

func read(r *http.Request) []byte {
	b, err := io.ReadAll(r.Body)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	return b
}

func reasonOf(err error) upstream.Reason {
	var e *upstream.Error
	if !errors.As(err, &e) {
		return ""
	}
	return e.Reason
}

func stamp(ctx context.Context, d *upstream.Device) (*tsa.Token, error) {
	return d.Issue(ctx, &tsa.Request{Imprint: tsa.ImprintOf(data), CertReq: true})
}

// TestGood: tokens of either key, in either outer form, with the certificate inside or configured.
func TestGood(t *testing.T) {
	t.Parallel()
	for name, row := range map[string]struct {
		maker    func() *maker
		change   func(*told)
		accuracy time.Duration
		// what provenance says beyond who it was
		provenance string
		with       func(*upstream.Config, *maker)
	}{
		"sm2":    {maker: sm2Maker, accuracy: 500 * time.Millisecond},
		"rsa":    {maker: rsaMaker, accuracy: 500 * time.Millisecond},
		"gm0010": {maker: sm2Maker, accuracy: 500 * time.Millisecond, change: func(x *told) { x.profile = cms.GM0010 }},
		"no certificate inside": {maker: sm2Maker, accuracy: 500 * time.Millisecond, change: func(x *told) { x.bare = true }, with: func(c *upstream.Config, m *maker) {
			c.Certificates = []*smx509.Certificate{m.cert}
		}},
		"accuracy assumed": {maker: sm2Maker, accuracy: 700 * time.Millisecond, change: func(x *told) { x.accuracy = 0 }, with: func(c *upstream.Config, _ *maker) {
			c.Assumed = 700 * time.Millisecond
		}},
		// 120.456789 ms were cut off; our clock, 20 ms wrong at most, knows that 10 ms is not true
		"whole seconds": {maker: sm2Maker, accuracy: 140456789, provenance: "; its accuracy of 10ms contradicts own time", change: func(x *told) { x.genTime, x.accuracy = now.Truncate(time.Second), 10*time.Millisecond }},
		"listed policy": {maker: sm2Maker, accuracy: 500 * time.Millisecond, with: func(c *upstream.Config, _ *maker) {
			c.Policies = []asn1.ObjectIdentifier{{1, 2, 3}, policy}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := row.maker()
			c := config(m, overHTTP(t, func(w http.ResponseWriter, r *http.Request) {
				if r.Method != http.MethodPost || r.Header.Get("Content-Type") != "application/timestamp-query" {
					t.Errorf("%s, %s", r.Method, r.Header.Get("Content-Type"))
				}
				_, _ = w.Write(m.answer(read(r), row.change))
			}))
			if row.with != nil {
				row.with(&c, m)
			}
			d := device(t, c)
			for range 2 { // the second by the path that is remembered
				token, err := stamp(t.Context(), d)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := token.VerifyData(data, m.cert); err != nil {
					t.Error(err)
				}
				if p := token.Provenance; p.Bound != row.accuracy || !p.Time.Equal(token.GenTime) || p.State != ntp.Trusted || p.Provenance != "upstream/old-tsa; BDS+lan"+row.provenance {
					t.Errorf("provenance %+v", p)
				}
				if o := token.Origin; o.By != "upstream/old-tsa" || len(o.Path) != 2 || !o.Path[1].Equal(m.ca) || o.Instead != "" {
					t.Errorf("origin %+v", o)
				}
			}
			// a client's request goes as it is, and the answer comes as it is
			req := &tsa.Request{Imprint: tsa.ImprintOf(data), CertReq: true}
			query, err := req.Bytes()
			if err != nil {
				t.Fatal(err)
			}
			response, token, err := d.Relay(t.Context(), query, true)
			if err != nil || token.Nonce != nil || !bytes.Contains(response, token.DER) {
				t.Errorf("relayed: %v", err)
			}
			if name == "sm2" { // the certificate of earlier tokens is known
				req.CertReq = false
				if query, err = req.Bytes(); err != nil {
					t.Fatal(err)
				}
				if _, token, err = d.Relay(t.Context(), query, true); err != nil || len(token.Certificates()) != 0 {
					t.Errorf("relayed without certificate: %v", err)
				}
			}
			if s := d.Stats(); s.Stamped < 3 || len(s.Refused) != 0 {
				t.Errorf("%+v", s)
			}
		})
	}
}

// TestSeveralCertificates: machines behind one address sign each under its own certificate. All of them are known, by the
// same pointers: package account remembers its answers by these.
func TestSeveralCertificates(t *testing.T) {
	t.Parallel()
	m := sm2Maker()
	var certs []*smx509.Certificate
	for serial := range int64(3) {
		certs = append(certs, m.certificate(func(c *smx509.Certificate) { c.SerialNumber = big.NewInt(100 + serial) }))
	}
	turn, bare := 0, false
	c := config(m, func(_ context.Context, query []byte) ([]byte, error) {
		turn++
		return m.answer(query, func(x *told) { x.cert, x.bare = certs[turn%len(certs)], bare }), nil
	})
	asked := map[*smx509.Certificate]int{}
	c.Standing = func(path []*smx509.Certificate, _ time.Time) error { asked[path[0]]++; return nil }
	d := device(t, c)
	for range 4 * len(certs) {
		if _, err := stamp(t.Context(), d); err != nil {
			t.Fatal(err)
		}
	}
	if len(asked) != len(certs) {
		t.Errorf("asked about %d certificates, there are %d", len(asked), len(certs))
	}
	bare = true
	for range len(certs) {
		if _, err := stamp(t.Context(), d); err != nil {
			t.Error(err)
		}
		if p := d.Path(); !p[0].Equal(certs[turn%len(certs)]) {
			t.Errorf("path of %v, want that of the latest token", p[0].SerialNumber)
		}
	}
}

// TestClientCannotHaveItDown: a device that takes no notice of the policy asked for, as some do, is not called down because a
// client asks for one that it has not; when our own requests fail it is.
func TestClientCannotHaveItDown(t *testing.T) {
	t.Parallel()
	m := sm2Maker()
	broken := false
	d := device(t, config(m, func(_ context.Context, query []byte) ([]byte, error) {
		return m.answer(query, func(x *told) {
			if broken {
				x.nonce = nil
			}
		}), nil
	}))
	query, err := (&tsa.Request{Imprint: tsa.ImprintOf(data), Policy: asn1.ObjectIdentifier{1, 2, 3, 4}}).Bytes()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stamp(t.Context(), d); err != nil { // so that the certificate is known
		t.Fatal(err)
	}
	for range 5 {
		if _, _, err := d.Relay(t.Context(), query, true); reasonOf(err) != upstream.Policy {
			t.Fatalf("%v, want that the policy is another", err)
		}
	}
	if _, err := stamp(t.Context(), d); err != nil || d.Down() != nil {
		t.Errorf("%v, down: %v", err, d.Down())
	}
	broken = true
	for range 3 {
		if _, err := stamp(t.Context(), d); reasonOf(err) != upstream.Nonce {
			t.Fatalf("%v, want that the nonce is missing", err)
		}
	}
	if d.Down() == nil {
		t.Error("not down after three failures of our own requests")
	}
}

// TestMisbehaviour is the table of what devices do wrong, each with the reason that is given.
func TestMisbehaviour(t *testing.T) {
	t.Parallel()
	m := sm2Maker()
	other, err := tsa.NewImprint(cms.OIDSM3, bytes.Repeat([]byte{7}, 32))
	if err != nil {
		t.Fatal(err)
	}
	otherQuery, err := (&tsa.Request{Imprint: other}).Bytes()
	if err != nil {
		t.Fatal(err)
	}
	tell := func(change func(*told)) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) { _, _ = w.Write(m.answer(read(r), change)) }
	}
	plain := func(b []byte) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) { _, _ = w.Write(b) }
	}
	turn := func(f func(good []byte) []byte) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) { _, _ = w.Write(f(m.answer(read(r), nil))) }
	}
	status := func(n int) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(n)
			_, _ = w.Write(m.answer(read(r), nil))
		}
	}
	expired := m.certificate(func(c *smx509.Certificate) { c.SerialNumber, c.NotAfter = big.NewInt(3), now.Add(-time.Hour) })
	twoPurposes := m.certificate(func(c *smx509.Certificate) {
		value, _ := asn1.Marshal([]asn1.ObjectIdentifier{{1, 3, 6, 1, 5, 5, 7, 3, 8}, {1, 3, 6, 1, 5, 5, 7, 3, 3}})
		c.SerialNumber, c.ExtraExtensions = big.NewInt(4), []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 37}, Critical: true, Value: value}}
	})
	for name, row := range map[string]struct {
		serve http.HandlerFunc
		with  func(*upstream.Config)
		want  upstream.Reason
	}{
		"silent": {serve: func(_ http.ResponseWriter, r *http.Request) {
			read(r) // net/http looks for the client's end only then
			<-r.Context().Done()
		}, want: upstream.TimedOut},
		"slow": {serve: func(w http.ResponseWriter, r *http.Request) { // the headers at once, of the body a byte
			w.Header().Set("Content-Length", "1000")
			read(r)
			_, _ = w.Write([]byte{0x30})
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		}, want: upstream.TimedOut},
		"cut off":               {serve: func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, want: upstream.Unreachable},
		"status 500":            {serve: status(500), want: upstream.BadStatus},
		"status 201":            {serve: status(201), want: upstream.BadStatus},
		"redirect":              {serve: func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/elsewhere", 307) }, want: upstream.BadStatus},
		"unauthorised":          {serve: status(401), want: upstream.BadStatus},
		"huge":                  {serve: plain(make([]byte, 65<<10)), want: upstream.TooLong},
		"huge and good":         {serve: turn(func(good []byte) []byte { return append(good, make([]byte, 65<<10)...) }), want: upstream.TooLong},
		"empty":                 {serve: plain(nil), want: upstream.Malformed},
		"rubbish":               {serve: plain([]byte("<html>")), want: upstream.Malformed},
		"BER, indefinite":       {serve: turn(func(good []byte) []byte { return slices.Concat([]byte{0x30, 0x80}, good[4:], []byte{0, 0}) }), want: upstream.Malformed},
		"BER, long length":      {serve: turn(func(good []byte) []byte { return slices.Concat([]byte{0x30, 0x83, 0}, good[2:]) }), want: upstream.Malformed},
		"bytes after":           {serve: turn(func(good []byte) []byte { return append(good, 0) }), want: upstream.Malformed},
		"truncated":             {serve: turn(func(good []byte) []byte { return good[:len(good)-1] }), want: upstream.Malformed},
		"granted without token": {serve: plain([]byte{0x30, 5, 0x30, 3, 2, 1, 0}), want: upstream.Malformed},
		"rejected":              {serve: plain(tsa.Reject(tsa.TimeNotAvailable, "no time")), want: upstream.Rejected},
		"rejected with a token": {serve: turn(func(good []byte) []byte {
			return bytes.Replace(good, []byte{0x30, 3, 2, 1, 0}, []byte{0x30, 3, 2, 1, 2}, 1)
		}), want: upstream.Malformed},
		"bad algorithm": {serve: plain(tsa.Reject(tsa.BadAlg, "SM3?")), want: upstream.Request},
		"wrong imprint": {serve: tell(func(x *told) {
			s := cryptobyte.String(otherQuery)
			var body cryptobyte.String
			_ = s.ReadASN1(&body, der.SEQUENCE) && body.SkipASN1(der.INTEGER) && body.ReadASN1Element((*cryptobyte.String)(&x.imprint), der.SEQUENCE)
		}), want: upstream.Imprint},
		"wrong nonce":         {serve: tell(func(x *told) { x.nonce = big.NewInt(5) }), want: upstream.Nonce},
		"no nonce":            {serve: tell(func(x *told) { x.nonce = nil }), want: upstream.Nonce},
		"wrong policy":        {serve: tell(nil), with: func(c *upstream.Config) { c.Policies = []asn1.ObjectIdentifier{{1, 2, 3}} }, want: upstream.Policy},
		"spoiled":             {serve: turn(func(good []byte) []byte { good[len(good)-1] ^= 1; return good }), want: upstream.Signature},
		"no certificate":      {serve: tell(func(x *told) { x.bare = true }), want: upstream.Certificate},
		"expired certificate": {serve: tell(func(x *told) { x.cert = expired }), want: upstream.Expired},
		"two purposes":        {serve: tell(func(x *told) { x.cert = twoPurposes }), want: upstream.Purpose},
		"foreign CA":          {serve: func(w http.ResponseWriter, r *http.Request) { _, _ = w.Write(stranger().answer(read(r), nil)) }, want: upstream.Untrusted},
		"anchor withdrawn":    {serve: tell(nil), with: func(c *upstream.Config) { c.Anchors = func() []*smx509.Certificate { return nil } }, want: upstream.Untrusted},
		"revoked": {serve: tell(nil), with: func(c *upstream.Config) {
			c.Standing = func([]*smx509.Certificate, time.Time) error { return errors.New("revoked") }
		}, want: upstream.Revocation},
		"5 s ahead":            {serve: tell(func(x *told) { x.genTime = now.Add(5 * time.Second) }), want: upstream.Time},
		"5 s behind":           {serve: tell(func(x *told) { x.genTime = now.Add(-5 * time.Second) }), want: upstream.Time},
		"a millisecond beyond": {serve: tell(func(x *told) { x.genTime = now.Add(1522 * time.Millisecond) }), want: upstream.Time},
		"a year behind":        {serve: tell(func(x *told) { x.genTime = now.AddDate(-1, 0, 0) }), want: upstream.Time},
		"no accuracy":          {serve: tell(func(x *told) { x.accuracy = 0 }), want: upstream.Accuracy},
		"vague":                {serve: tell(func(x *told) { x.accuracy = 10 * time.Second }), want: upstream.Accuracy},
		"own time not trusted": {serve: tell(nil), with: func(c *upstream.Config) { c.Clock.(*fixedClock).Store(&ntp.Reading{Time: now, State: ntp.Suspect}) }, want: upstream.OwnTime},
		"own time lost meanwhile": {serve: tell(nil), with: func(c *upstream.Config) {
			ask, clock := c.Ask, c.Clock.(*fixedClock)
			c.Ask = func(ctx context.Context, query []byte) ([]byte, error) {
				defer clock.Store(&ntp.Reading{Time: now, State: ntp.Suspect})
				return ask(ctx, query)
			}
		}, want: upstream.OwnTime},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := config(m, overHTTP(t, row.serve))
			if row.want == upstream.TimedOut {
				c.Timeout = 100 * time.Millisecond
			}
			if row.with != nil {
				row.with(&c)
			}
			d := device(t, c)
			token, err := stamp(t.Context(), d)
			if got := reasonOf(err); token != nil || got != row.want {
				t.Errorf("%v, want %s", err, row.want)
			}
			if s := d.Stats(); s.Stamped != 0 || s.Refused[row.want] != 1 {
				t.Errorf("%+v", s)
			}
		})
	}
	t.Run("nobody there", func(t *testing.T) {
		t.Parallel()
		c, err := stampclient.New(stampclient.Config{URL: "http://" + porttest.Free(t), Now: time.Now})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := stamp(t.Context(), device(t, config(m, c.Ask))); reasonOf(err) != upstream.Unreachable {
			t.Error(err)
		}
	})
	t.Run("nobody waits", func(t *testing.T) {
		t.Parallel()
		ctx, cancel := context.WithCancel(t.Context())
		d := device(t, config(m, func(ctx context.Context, _ []byte) ([]byte, error) {
			cancel()
			<-ctx.Done()
			return nil, ctx.Err()
		}))
		if _, err := stamp(ctx, d); reasonOf(err) != upstream.Cancelled {
			t.Error(err)
		}
	})
}

// TestWithoutOwnTime: by the policy that says so a client's request is relayed while our clock is not trusted, and the
// token is marked; all else is checked as ever, and a signature's token is not had that way.
func TestWithoutOwnTime(t *testing.T) {
	t.Parallel()
	m := sm2Maker()
	c := config(m, nil)
	year := func(x *told) { x.genTime = now.AddDate(-1, 0, 0) }
	asked := 0
	c.Ask = func(_ context.Context, query []byte) ([]byte, error) { asked++; return m.answer(query, year), nil }
	c.Clock.(*fixedClock).Store(&ntp.Reading{State: ntp.Cold})
	d := device(t, c)
	query, err := (&tsa.Request{Imprint: tsa.ImprintOf(data), CertReq: true}).Bytes()
	if err != nil {
		t.Fatal(err)
	}
	_, token, err := d.Relay(t.Context(), query, false)
	if err != nil || token.Provenance.State != ntp.Cold || !strings.Contains(token.Provenance.Provenance, "not held against own time") {
		t.Errorf("%+v %v", token, err)
	}
	if _, _, err := d.Relay(t.Context(), query, true); reasonOf(err) != upstream.OwnTime {
		t.Error(err)
	}
	if _, err := stamp(t.Context(), d); reasonOf(err) != upstream.OwnTime {
		t.Error(err)
	}
	if asked != 1 {
		t.Errorf("asked %d times, of which %d in vain", asked, asked-1)
	}
	// a clock that is trusted again is used, also where it need not be
	c.Clock.(*fixedClock).Store(&ntp.Reading{Time: now, State: ntp.Trusted})
	if _, _, err := d.Relay(t.Context(), query, false); reasonOf(err) != upstream.Time {
		t.Error(err)
	}
	var fault *tsa.RequestError
	if _, _, err := d.Relay(t.Context(), []byte{0x30, 0}, true); !errors.As(err, &fault) {
		t.Error(err)
	}
}

// TestBreaker: after three failures in a row nobody waits for the device, which is asked by Run until it is good again.
// What is not its fault does not count, and a success begins the count anew.
func TestBreaker(t *testing.T) {
	t.Parallel()
	m := sm2Maker()
	var asked atomic.Int64
	probed := make(chan struct{})
	var broken atomic.Pointer[error]
	gone := errors.New("gone")
	var answer atomic.Pointer[[]byte]
	c := config(m, func(_ context.Context, query []byte) ([]byte, error) {
		asked.Add(1)
		select {
		case probed <- struct{}{}:
		default: // nobody looks
		}
		if err := broken.Load(); err != nil {
			return nil, *err
		}
		if b := answer.Load(); b != nil {
			return *b, nil
		}
		return m.answer(query, nil), nil
	})
	changes := make(chan error, 10)
	c.OnChange = func(why error) { changes <- why }
	c.Probe = 10 * time.Millisecond
	d := device(t, c)
	try := func(want upstream.Reason) {
		t.Helper()
		if _, err := stamp(t.Context(), d); reasonOf(err) != want {
			t.Errorf("%v, want %s", err, want)
		}
	}
	broken.Store(&gone)
	try(upstream.Unreachable)
	try(upstream.Unreachable)
	broken.Store(nil)
	try("")
	rejected := tsa.Reject(tsa.UnacceptedPolicy, "no")
	answer.Store(&rejected)
	for range 5 {
		try(upstream.Request)
	}
	answer.Store(nil)
	broken.Store(&gone)
	for range 3 {
		try(upstream.Unreachable)
	}
	if why := <-changes; reasonOf(why) != upstream.Unreachable {
		t.Errorf("down: %v", why)
	}
	before := asked.Load()
	for range 5 {
		try(upstream.Down)
	}
	if n := asked.Load(); n != before {
		t.Errorf("a device that is down was asked %d times", n-before)
	}
	if d.Down() == nil {
		t.Error("it is not down")
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	for range 3 { // it is asked again and again
		<-probed
	}
	broken.Store(nil)
	if why := <-changes; why != nil {
		t.Errorf("up: %v", why)
	}
	try("")
	broken.Store(&gone) // an idle device is asked too
	if why := <-changes; why == nil {
		t.Error("a device that ended was not noticed")
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if s := d.Stats(); s.Stamped != 2 || s.Refused[upstream.Request] != 5 || s.Refused[upstream.Down] != 0 {
		t.Errorf("%+v", s)
	}
}

// TestUnderLoad: of many at once that wait for a silent device, none waits longer than the timeout, and those that come
// later not at all.
func TestUnderLoad(t *testing.T) {
	t.Parallel()
	m := sm2Maker()
	var inside atomic.Int64
	c := config(m, func(ctx context.Context, _ []byte) ([]byte, error) {
		inside.Add(1)
		<-ctx.Done()
		return nil, ctx.Err()
	})
	c.Timeout = 50 * time.Millisecond
	d := device(t, c)
	var all sync.WaitGroup
	for range 50 {
		all.Go(func() {
			if _, err := stamp(t.Context(), d); reasonOf(err) != upstream.TimedOut && reasonOf(err) != upstream.Down {
				t.Error(err)
			}
		})
	}
	all.Wait()
	n := inside.Load()
	for range 50 {
		if _, err := stamp(t.Context(), d); reasonOf(err) != upstream.Down {
			t.Error(err)
		}
	}
	if inside.Load() != n {
		t.Error("a device that is down was asked")
	}
}

// TestBusy: whoever finds all connections in use is told so, and the device is not blamed for what it was never asked.
func TestBusy(t *testing.T) {
	t.Parallel()
	m := sm2Maker()
	gate, arrived := make(chan struct{}), make(chan struct{}, 200)
	ask := overHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		query := read(r)
		arrived <- struct{}{}
		select {
		case <-gate:
			_, _ = w.Write(m.answer(query, nil))
		case <-r.Context().Done():
		}
	})
	query, err := (&tsa.Request{Imprint: tsa.ImprintOf(data), CertReq: true}).Bytes()
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 64)
	for range cap(done) {
		go func() {
			_, err := ask(t.Context(), query)
			done <- err
		}()
	}
	for range cap(done) {
		<-arrived
	}
	c := config(m, ask)
	c.Timeout = 20 * time.Millisecond
	d := device(t, c)
	for range 2 * c.Failures {
		if _, err := stamp(t.Context(), d); reasonOf(err) != upstream.Busy {
			t.Errorf("%v, want %s", err, upstream.Busy)
		}
	}
	if err := d.Down(); err != nil {
		t.Errorf("left alone for want of connections: %v", err)
	}
	close(gate)
	for range cap(done) {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	c.Timeout = time.Minute
	if _, err := stamp(t.Context(), device(t, c)); err != nil {
		t.Error(err)
	}
}

func TestConfigIsChecked(t *testing.T) {
	t.Parallel()
	good := config(sm2Maker(), func(context.Context, []byte) ([]byte, error) { return nil, nil })
	for i, change := range []func(*upstream.Config){
		func(c *upstream.Config) { c.Name = "" }, func(c *upstream.Config) { c.Ask = nil }, func(c *upstream.Config) { c.Timeout = 0 },
		func(c *upstream.Config) { c.Failures = 0 }, func(c *upstream.Config) { c.Assumed = 2 * time.Second }, func(c *upstream.Config) { c.Anchors = nil },
	} {
		bad := good
		change(&bad)
		if _, err := upstream.New(bad); err == nil {
			t.Errorf("configuration %d was taken", i)
		}
	}
	for _, address := range []string{"", "ftp://a/b", "http://", "http://user:secret@a/b", "http://a/b#c", "://"} {
		if _, err := stampclient.New(stampclient.Config{URL: address, Now: time.Now}); err == nil {
			t.Errorf("%q was taken", address)
		}
	}
}

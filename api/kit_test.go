package api_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/emmansun/gmsm/smx509"
	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"
	"github.com/getkin/kin-openapi/routers/gorillamux"
	"github.com/sirupsen/logrus"

	"yinjian/api"
	"yinjian/api/wire"
	"yinjian/appliance/account"
	"yinjian/appliance/evidence"
	"yinjian/appliance/pki"
	"yinjian/appliance/problem"
	"yinjian/appliance/sign"
	"yinjian/ntp"
	"yinjian/tsa"
	"yinjian/tsa/stf"
)

var epoch = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// A clock stands still until it is set.
type clock struct {
	mu      sync.Mutex
	reading ntp.Reading
}

func newClock() *clock { return &clock{reading: ntp.Reading{Time: epoch, State: ntp.Trusted}} }

func (c *clock) Now() ntp.Reading {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.reading
}

func (c *clock) set(t time.Time, s ntp.State) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.reading.Time, c.reading.State = t, s
}

func (c *clock) add(d time.Duration) { r := c.Now(); c.set(r.Time.Add(d), r.State) }

// services fakes all of them; a test replaces the functions it is about.
type services struct {
	sign      func(ctx context.Context, app *account.Application, req *sign.Request) (*sign.Result, error)
	verify    func(ctx context.Context, req *sign.VerifyRequest) (*evidence.Report, error)
	bundle    func(ctx context.Context, app *account.Application, id string) ([]byte, error)
	authorize func(ctx context.Context, app *account.Application, req account.GrantRequest) (*account.Grant, error)
	respond   func(ctx context.Context, unit, requester string, der []byte) ([]byte, error)
	known     func(ctx context.Context, token *tsa.Token) (*stf.Known, error)
	dead      error
	unready   []string
	apps      map[string]*account.Application
	clients   map[string]string // applications, by the certificate (DER) that stands for them

	connections int  // of the listener; 4096
	ask         bool // for a client certificate
}

var (
	appKey = bytes.Repeat([]byte{0x5a}, 32)
	record = strings.Repeat("ab", 32)
)

func newServices() *services {
	return &services{
		sign: func(_ context.Context, _ *account.Application, req *sign.Request) (*sign.Result, error) {
			return &sign.Result{
				RecordID: record, Algorithm: req.Algorithm, Form: req.Form, Signature: []byte{0x30, 0}, Certificates: [][]byte{{0x30, 1}},
				Token: []byte{0x30, 2}, GenTime: epoch, Accuracy: 1500 * time.Microsecond, Provenance: "BDS+lan", Node: "a", Epoch: "0f", Sequence: 7,
			}, nil
		},
		verify: func(context.Context, *sign.VerifyRequest) (*evidence.Report, error) {
			return &evidence.Report{Verdict: "valid", Checks: nil}, nil
		},
		bundle: func(context.Context, *account.Application, string) ([]byte, error) {
			return []byte(`{"format":"yinjian-evidence/1"}`), nil
		},
		authorize: func(_ context.Context, _ *account.Application, req account.GrantRequest) (*account.Grant, error) {
			return &account.Grant{ID: "00ff", Method: evidence.SignerPIN, Signer: req.Signer, Remaining: 1, NotAfter: epoch}, nil
		},
		respond: func(context.Context, string, string, []byte) ([]byte, error) { return []byte{0x30, 0}, nil },
		known:   func(context.Context, *tsa.Token) (*stf.Known, error) { return nil, nil },
		apps: map[string]*account.Application{
			"his":     {ID: "his", Rights: []string{account.RightSign, account.RightVerify, account.RightTimestamp}},
			"emr":     {ID: "emr", Rights: []string{account.RightSign}},
			"noright": {ID: "noright"},
			"stopped": {ID: "stopped", Rights: []string{account.RightSign}, Stopped: true},
		},
	}
}

func (s *services) Sign(ctx context.Context, app *account.Application, req *sign.Request) (*sign.Result, error) {
	return s.sign(ctx, app, req)
}
func (s *services) Verify(ctx context.Context, req *sign.VerifyRequest) (*evidence.Report, error) {
	r, err := s.verify(ctx, req)
	if r != nil && r.Checks == nil {
		r.Checks = []pki.Check{}
	}
	return r, err
}
func (s *services) Evidence(ctx context.Context, app *account.Application, id string) ([]byte, error) {
	return s.bundle(ctx, app, id)
}
func (s *services) Application(id string) (*account.Application, []byte, bool) {
	app, ok := s.apps[id]
	return app, appKey, ok
}
func (s *services) ClientApplication(cert *x509.Certificate) string {
	return s.clients[string(cert.Raw)]
}
func (s *services) CheckClient(app *account.Application, shown []*x509.Certificate, _ time.Time) error {
	if len(shown) == 0 || s.clients[string(shown[0].Raw)] != app.ID {
		return problem.New(problem.Unauthenticated, "须出示客户端证书 (show a certificate)", "见文档 (see there)")
	}
	return nil
}
func (s *services) Authorize(ctx context.Context, app *account.Application, req account.GrantRequest) (*account.Grant, error) {
	return s.authorize(ctx, app, req)
}
func (s *services) Certificate(serial string) (*account.CertificateStatus, bool) {
	if serial != "01ab" {
		return nil, false
	}
	return &account.CertificateStatus{Serial: serial, Certificate: []byte{0x30, 0}, Profile: "staff", Owner: "D1001", Status: "revoked", RevokedAt: epoch, Reason: "keyCompromise"}, true
}
func (s *services) Units() []string { return []string{"sm2", "rsa"} }
func (s *services) Respond(ctx context.Context, unit, requester string, der []byte) ([]byte, error) {
	return s.respond(ctx, unit, requester, der)
}
func (s *services) Unit(alg stf.SignatureAlgorithm) string {
	return map[stf.SignatureAlgorithm]string{stf.SM3SM2: "sm2"}[alg]
}
func (s *services) Known(ctx context.Context, token *tsa.Token) (*stf.Known, error) {
	return s.known(ctx, token)
}
func (s *services) Judge(leaf *smx509.Certificate, others []*smx509.Certificate, at time.Time) *pki.PathReport {
	return pki.VerifyPath(pki.Options{Leaf: leaf, Intermediates: others, Anchors: []*smx509.Certificate{stampUnit().ca}, At: at, Purpose: pki.TimeStamping})
}
func (s *services) Alive() error            { return s.dead }
func (s *services) Ready() (bool, []string) { return len(s.unready) == 0, s.unready }
func (s *services) State() any              { return map[string]string{"state": "operational"} }
func (s *services) Metrics() []byte         { return []byte("yinjian_ready 1\n") }

// A kit is a running appliance's face.
type kit struct {
	t        *testing.T
	clock    *clock
	services *services
	admin    *admin
	server   *api.Server
	log      *bytes.Buffer // what was logged, JSON lines; read it when the requests are done
	http     *http.Client
	addr     string
	stop     func() error // ends the server and answers Serve's error
	nonce    int
	mu       sync.Mutex // guards nonce
}

type option func(*api.Config, *http.Server)

func start(t *testing.T, options ...option) *kit {
	t.Helper()
	return startWith(t, newServices(), options...)
}

func startWith(t *testing.T, sv *services, options ...option) *kit {
	t.Helper()
	k := &kit{t: t, clock: newClock(), services: sv, admin: &admin{}, log: new(bytes.Buffer)}
	log := logrus.New()
	log.SetOutput(k.log)
	log.SetFormatter(&logrus.JSONFormatter{})
	log.SetLevel(logrus.DebugLevel)
	cfg := api.Config{Signing: sv, Directory: sv, Stamps: sv, Tokens: sv, Health: sv, Admin: k.admin, Accounts: newAccounts(), Clock: k.clock, Log: log, Version: "test"}
	for _, o := range options {
		o(&cfg, &http.Server{})
	}
	if c, ok := cfg.Clock.(*clock); ok {
		k.clock = c
	}
	s, err := api.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	k.server = s
	srv := s.NewHTTPServer(s.Handler())
	for _, o := range options {
		o(&cfg, srv)
	}
	cert, pool := certificate(t)
	most := 4096
	if sv.connections > 0 {
		most = sv.connections
	}
	ln, err := api.ListenTLS("127.0.0.1:0", func() *tls.Certificate { return &cert }, k.clock, false, func() bool { return sv.ask }, most)
	if err != nil {
		t.Fatal(err)
	}
	k.addr = ln.Addr().String()
	k.http = &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, Time: func() time.Time { return epoch }}}}
	k.stop = serve(t, srv, ln)
	t.Cleanup(k.http.CloseIdleConnections)
	return k
}

func serve(t *testing.T, srv *http.Server, ln net.Listener) (stop func() error) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- api.Serve(ctx, srv, ln, 5*time.Second) }()
	stop = sync.OnceValue(func() error { cancel(); return <-done })
	t.Cleanup(func() {
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
	return stop
}

var makeCertificate = sync.OnceValues(func() (tls.Certificate, *x509.CertPool) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, NotBefore: epoch.AddDate(-2, 0, 0), NotAfter: epoch.AddDate(50, 0, 0),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		panic(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		panic(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(leaf)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}, pool
})

func certificate(*testing.T) (tls.Certificate, *x509.CertPool) { return makeCertificate() }

// A call is one request; its zero fields are those of a good one.
type call struct {
	method, path string
	app          string // "his"
	at           time.Time
	nonce        string
	key          []byte
	body         []byte
	header       map[string]string // set last; "" removes
	host         string
	unsigned     bool
	tamper       func(*http.Request) // after signing
	loose        bool                // the request is not held against the contract
}

type reply struct {
	status  int
	header  http.Header
	body    []byte
	problem wire.Problem
}

func (k *kit) request(c call) *http.Request {
	k.t.Helper()
	if c.method == "" {
		c.method = http.MethodPost
	}
	if c.app == "" {
		c.app = "his"
	}
	if c.at.IsZero() {
		c.at = k.clock.Now().Time
	}
	if c.nonce == "" {
		k.mu.Lock()
		k.nonce++
		c.nonce = "nonce-0123456789-" + strconv.Itoa(k.nonce)
		k.mu.Unlock()
	}
	if c.key == nil {
		c.key = appKey
	}
	r, err := http.NewRequest(c.method, "https://"+k.addr+c.path, bytes.NewReader(c.body))
	if err != nil {
		k.t.Fatal(err)
	}
	if c.host != "" {
		r.Host = c.host
	}
	if c.method == http.MethodPost {
		r.Header.Set("Content-Type", "application/json")
	}
	if c.path == "/v1/sign" {
		r.Header.Set("Idempotency-Key", "visit-1")
	}
	if !c.unsigned {
		a := wire.Authorization{App: c.app, Time: strconv.FormatInt(c.at.UnixMilli(), 10), Nonce: c.nonce}
		a.MAC = wire.MAC(c.key, wire.Signable{Method: c.method, Path: r.URL.EscapedPath(), Query: r.URL.RawQuery, Host: r.Host, Body: c.body}, a.App, a.Time, a.Nonce)
		r.Header.Set("Authorization", a.String())
	}
	for name, v := range c.header {
		if v == "" {
			r.Header.Del(name)
		} else {
			r.Header.Set(name, v)
		}
	}
	if c.tamper != nil {
		c.tamper(r)
	}
	return r
}

// do sends the call, and holds whatever comes back against the contract.
func (k *kit) do(c call) reply {
	k.t.Helper()
	out, err := k.try(c)
	if err != nil {
		k.t.Fatal(err)
	}
	return out
}

func (k *kit) try(c call) (reply, error) {
	r := k.request(c)
	resp, err := k.http.Do(r)
	if err != nil {
		return reply{}, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return reply{}, err
	}
	out := reply{status: resp.StatusCode, header: resp.Header, body: body}
	if resp.Header.Get("Content-Type") == "application/problem+json" && c.method != http.MethodHead {
		if err := json.Unmarshal(body, &out.problem); err != nil {
			return out, err
		}
	}
	return out, conforms(r, c.body, out)
}

var contract = sync.OnceValues(func() (routers.Router, error) {
	data, err := os.ReadFile("openapi.json")
	if err != nil {
		return nil, err
	}
	doc, err := openapi3.NewLoader().LoadFromData(data)
	if err != nil {
		return nil, err
	}
	if err := doc.Validate(context.Background()); err != nil {
		return nil, err
	}
	openapi3filter.RegisterBodyDecoder("application/timestamp-query", openapi3filter.FileBodyDecoder)
	openapi3filter.RegisterBodyDecoder("application/timestamp-reply", openapi3filter.FileBodyDecoder)
	return gorillamux.NewRouter(doc)
})

// conforms holds an exchange against openapi.json: the answer always, the request when it was taken.
func conforms(r *http.Request, body []byte, out reply) error {
	router, err := contract()
	if err != nil {
		return err
	}
	plain := r.Clone(context.Background())
	plain.URL.Scheme, plain.URL.Host, plain.Host = "", "", ""
	plain.Body = io.NopCloser(bytes.NewReader(body))
	route, params, err := router.FindRoute(plain)
	if err != nil {
		if out.status >= 400 || out.status == 204 {
			return nil // not of the contract, and refused
		}
		return err
	}
	in := &openapi3filter.RequestValidationInput{
		Request: plain, PathParams: params, Route: route,
		Options: &openapi3filter.Options{AuthenticationFunc: openapi3filter.NoopAuthenticationFunc, IncludeResponseStatus: true},
	}
	if out.status == 200 {
		if err := openapi3filter.ValidateRequest(context.Background(), in); err != nil {
			return errors.New("a request was taken that the contract does not know: " + err.Error())
		}
	}
	return openapi3filter.ValidateResponse(context.Background(), &openapi3filter.ResponseValidationInput{
		RequestValidationInput: in, Status: out.status, Header: out.header, Body: io.NopCloser(bytes.NewReader(out.body)), Options: in.Options,
	})
}

// wantProblem checks code and field.
func wantProblem(t *testing.T, got reply, status int, code problem.Code, field string) {
	t.Helper()
	if got.status != status || got.problem.Code != string(code) || got.problem.Field != field {
		t.Errorf("answer = %d %s; want %d %s (%s)", got.status, got.body, status, code, field)
	}
	if p := got.problem; p.Detail == "" || p.Next == "" || p.Title == "" || p.Status != got.status ||
		p.Instance != "urn:yinjian:request:"+got.header.Get("X-Request-ID") {
		t.Errorf("problem is not complete: %s", got.body)
	}
}

// m is a JSON object in tests.
type m = map[string]any

func b64(b []byte) string { return base64.StdEncoding.EncodeToString(b) }

func encode(t *testing.T, v any) []byte {
	t.Helper()
	out, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

var digest32 = b64(bytes.Repeat([]byte{1}, 32))

func signBody() m {
	return m{
		"signer": "D1001", "algorithm": "SM2", "form": "cms", "detached": true, "content": b64([]byte("出院小结")),
		"document": m{"id": "病历-4711", "type": "discharge-summary", "media_type": "application/pdf"},
		"role":     "attending", "consent": m{"method": "app-asserted", "assertion": "医生点击了签名"},
	}
}

// batchBody is n documents, under the keys visit-0 and on.
func batchBody(n int) m {
	b := signBody()
	items := []any{}
	for i := range n {
		items = append(items, m{"idempotency_key": fmt.Sprintf("visit-%d", i), "content": b["content"], "document": b["document"]})
	}
	delete(b, "content")
	delete(b, "document")
	b["items"] = items
	return b
}

func batchOfDigests() m {
	b := batchBody(1)
	b["consent"] = m{"authorization_id": strings.Repeat("0f", 16)}
	item := b["items"].([]any)[0].(m)
	delete(item, "content")
	item["digest"] = m{"algorithm": "SM3", "value": digest32}
	return b
}

func verifyBody() m {
	return m{
		"raw":      m{"algorithm": "SM2", "value": "MAA=", "certificate": "MAA=", "chain": []any{"MAA="}, "token": "MAA="},
		"document": "YWJj",
	}
}

func timestampBody() m { return m{"unit": "sm2", "digest": m{"algorithm": "SM3", "value": digest32}} }

func authorizationBody() m {
	return m{"signer": "D1001", "pin": "314159", "digests": []any{digest32}}
}

func hexOf(b []byte) string { return hex.EncodeToString(b) }

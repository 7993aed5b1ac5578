// Package client calls the appliance's API from Go: it signs each request with HMAC-SM3, sends it over TLS 1.3, and
// turns a refusal into a [*Problem]. NewAdmin calls the local administration socket.
package client

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"yinjian/api/wire"
	"yinjian/appliance/problem"
)

// maxAnswer bounds what an answer may hold: a CMS with its content inside, and some.
const maxAnswer = 64 << 20

// Config says where the appliance is and who calls.
type Config struct {
	BaseURL string // "https://yinjian.hospital.local:8443", without a path
	AppID   string
	Key     []byte // HMAC-SM3 key, from the registration
	// RootCAs judge the appliance's certificate; nil means the system's. TLS replaces all of it when set.
	RootCAs *x509.CertPool
	TLS     *tls.Config
	// Clock gives the time that requests are signed with, within 5 minutes of the appliance's. Required.
	Clock func() time.Time
	// Retries is how often a request is sent again when its outcome is unknown or the appliance asks to come back: 0
	// by default. A retry keeps the Idempotency-Key and takes a new nonce. Authorize is never retried, since a wrong
	// PIN counts.
	Retries int
	// Timeout of one attempt; 60 s by default.
	Timeout time.Duration
}

// A Client is safe for concurrent use.
type Client struct {
	cfg  Config
	base *url.URL
	http *http.Client
}

// A Problem is the appliance's refusal.
type Problem struct{ wire.Problem }

func (p *Problem) Error() string {
	s := "yinjian: " + p.Code
	if p.Field != "" {
		s += " (" + p.Field + ")"
	}
	return s + ": " + p.Detail + "; " + p.Next + " [" + p.Instance + "]"
}

// Is reports whether err is a refusal with this code.
func Is(err error, code problem.Code) bool {
	var p *Problem
	return errors.As(err, &p) && p.Code == string(code)
}

// New checks the configuration; it does not connect.
func New(cfg Config) (*Client, error) {
	base, err := url.Parse(cfg.BaseURL)
	switch {
	case err != nil:
		return nil, fmt.Errorf("client: BaseURL: %w", err)
	case base.Scheme != "https" || base.Host == "" || strings.Trim(base.Path, "/") != "" || base.RawQuery != "" || base.User != nil:
		return nil, errors.New("client: BaseURL: want https://host[:port]")
	case cfg.Clock == nil:
		return nil, errors.New("client: Clock is missing")
	case cfg.AppID == "" || len(cfg.Key) == 0:
		return nil, errors.New("client: AppID or Key is missing")
	}
	tlsConfig := cfg.TLS
	if tlsConfig == nil {
		tlsConfig = &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: cfg.RootCAs, Time: cfg.Clock}
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = 60 * time.Second
	}
	return &Client{cfg: cfg, base: base, http: &http.Client{
		Transport:     &http.Transport{TLSClientConfig: tlsConfig, MaxIdleConnsPerHost: 16, IdleConnTimeout: 30 * time.Second},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}, nil
}

// Close drops idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Sign asks for a signature. idempotencyKey (1–128 visible ASCII) names this act: sent again it gives the same
// record, so a caller keeps it until it has the answer.
func (c *Client) Sign(ctx context.Context, idempotencyKey string, req *wire.SignRequest) (*wire.SignResult, error) {
	if idempotencyKey == "" {
		return nil, errors.New("client: sign: idempotency key is missing")
	}
	var out wire.SignResult
	if err := c.post(ctx, "/v1/sign", idempotencyKey, c.cfg.Retries, req, &out); err != nil {
		return nil, err
	}
	return &out, nil
}

// Verify answers the report as JSON.
func (c *Client) Verify(ctx context.Context, req *wire.VerifyRequest) (json.RawMessage, error) {
	var out json.RawMessage
	err := c.post(ctx, "/v1/verify", "", c.cfg.Retries, req, &out)
	return out, err
}

// Timestamp asks for a token. A retry after a lost answer makes a second, equally good token.
func (c *Client) Timestamp(ctx context.Context, req *wire.TimestampRequest) (*wire.Timestamp, error) {
	var out wire.Timestamp
	if err := c.post(ctx, "/v1/timestamp", "", c.cfg.Retries, req, &out); err != nil {
		return nil, err
	}
	return &out, nil
}

// Stamp sends a DER TimeStampReq to a unit and answers its DER TimeStampResp (RFC 3161), a rejection included.
func (c *Client) Stamp(ctx context.Context, unit string, query []byte) ([]byte, error) {
	return c.do(ctx, call{
		method: http.MethodPost, path: "/tsa/" + url.PathEscape(unit), body: query,
		takes: "application/timestamp-reply", gives: "application/timestamp-query", retries: c.cfg.Retries, signed: true,
	})
}

// Authorize asks for an authorisation by the signer's PIN.
func (c *Client) Authorize(ctx context.Context, req *wire.AuthorizationRequest) (*wire.Grant, error) {
	var out wire.Grant
	if err := c.post(ctx, "/v1/authorizations", "", 0, req, &out); err != nil {
		return nil, err
	}
	return &out, nil
}

// Evidence answers a record's bundle, byte for byte.
func (c *Client) Evidence(ctx context.Context, recordID string) ([]byte, error) {
	return c.get(ctx, "/v1/evidence/"+url.PathEscape(recordID), true)
}

// Certificate answers what the directory knows of a certificate; serial is lower-case hex.
func (c *Client) Certificate(ctx context.Context, serial string) (*wire.CertificateStatus, error) {
	data, err := c.get(ctx, "/v1/certs/"+url.PathEscape(serial), true)
	if err != nil {
		return nil, err
	}
	var out wire.CertificateStatus
	return &out, decode(data, &out)
}

// Alive answers nil when the appliance runs.
func (c *Client) Alive(ctx context.Context) error {
	_, err := c.get(ctx, "/health/alive", false)
	return err
}

// Ready answers whether the appliance would sign, and why not.
func (c *Client) Ready(ctx context.Context) (*wire.Readiness, error) {
	data, err := c.do(ctx, call{method: http.MethodGet, path: "/health/ready", takes: "application/json", also: http.StatusServiceUnavailable})
	if err != nil {
		return nil, err
	}
	var out wire.Readiness
	return &out, decode(data, &out)
}

// State answers the appliance's state as JSON.
func (c *Client) State(ctx context.Context) (json.RawMessage, error) {
	data, err := c.get(ctx, "/health/state", true)
	return data, err
}

func (c *Client) post(ctx context.Context, path, idempotencyKey string, retries int, in, out any) error {
	body, err := json.Marshal(in)
	if err != nil {
		return fmt.Errorf("client: encoding request: %w", err)
	}
	data, err := c.do(ctx, call{
		method: http.MethodPost, path: path, body: body, key: idempotencyKey,
		takes: "application/json", gives: "application/json", retries: retries, signed: true,
	})
	if err != nil {
		return err
	}
	return decode(data, out)
}

func (c *Client) get(ctx context.Context, path string, signed bool) ([]byte, error) {
	return c.do(ctx, call{method: http.MethodGet, path: path, takes: "application/json", retries: c.cfg.Retries, signed: signed})
}

func decode(data []byte, out any) error {
	if err := json.Unmarshal(data, out); err != nil {
		return fmt.Errorf("client: decoding answer: %w", err)
	}
	return nil
}

type call struct {
	method, path string
	body         []byte
	key          string // Idempotency-Key
	gives, takes string // media types
	also         int    // a second status that is an answer
	retries      int
	signed       bool
}

// do sends the call and its retries, with a pause that doubles from 200 ms.
func (c *Client) do(ctx context.Context, one call) ([]byte, error) {
	pause := 200 * time.Millisecond
	for try := 0; ; try++ {
		data, again, err := c.once(ctx, one)
		if err == nil || !again || try >= one.retries || ctx.Err() != nil {
			return data, err
		}
		t := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			t.Stop()
			return nil, err
		case <-t.C:
		}
		pause = min(2*pause, 5*time.Second)
	}
}

// once answers whether another try may help.
func (c *Client) once(ctx context.Context, one call) (data []byte, again bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, c.cfg.Timeout)
	defer cancel()
	r, err := newRequest(ctx, c.base.Scheme+"://"+c.base.Host, one)
	if err != nil {
		return nil, false, err
	}
	if one.signed {
		c.authorize(r, one.body)
	}
	return roundTrip(c.http, r, one)
}

func newRequest(ctx context.Context, base string, one call) (*http.Request, error) {
	var body io.Reader
	if one.body != nil {
		body = bytes.NewReader(one.body)
	}
	r, err := http.NewRequestWithContext(ctx, one.method, base+one.path, body)
	if err != nil {
		return nil, fmt.Errorf("client: %w", err)
	}
	// net/http sends such a request again by itself when a reused connection turns out closed; the appliance would
	// take that for a replay. Without GetBody it cannot, for those with a body.
	r.GetBody = nil
	r.Header.Set("Accept", one.takes)
	if one.gives != "" {
		r.Header.Set("Content-Type", one.gives)
	}
	if one.key != "" {
		r.Header.Set("Idempotency-Key", one.key)
	}
	return r, nil
}

func (c *Client) authorize(r *http.Request, body []byte) {
	var random [18]byte
	rand.Read(random[:])
	a := wire.Authorization{
		App: c.cfg.AppID, Time: strconv.FormatInt(c.cfg.Clock().UnixMilli(), 10), Nonce: base64.RawURLEncoding.EncodeToString(random[:]),
	}
	a.MAC = wire.MAC(c.cfg.Key, wire.Signable{
		Method: r.Method, Path: r.URL.EscapedPath(), Query: r.URL.RawQuery, Host: r.URL.Host, Body: body,
	}, a.App, a.Time, a.Nonce)
	r.Header.Set("Authorization", a.String())
}

func roundTrip(h *http.Client, r *http.Request, one call) (data []byte, again bool, err error) {
	resp, err := h.Do(r)
	if err != nil {
		return nil, true, fmt.Errorf("client: %w", err)
	}
	defer resp.Body.Close()
	data, err = io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err != nil {
		return nil, true, fmt.Errorf("client: reading answer: %w", err)
	}
	if len(data) > maxAnswer {
		return nil, false, errors.New("client: answer too large")
	}
	media, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	if (resp.StatusCode == http.StatusOK || resp.StatusCode == one.also) && media == one.takes {
		return data, false, nil
	}
	again = resp.StatusCode == http.StatusTooManyRequests || resp.StatusCode >= 502 && resp.StatusCode <= 504
	p := new(Problem)
	if media == "application/problem+json" && json.Unmarshal(data, &p.Problem) == nil && p.Code != "" {
		return nil, again, p
	}
	return nil, again, fmt.Errorf("client: unexpected answer: status %d, %q", resp.StatusCode, media)
}

// An Admin calls the local administration socket. The kernel tells the appliance who calls. It is safe for concurrent
// use.
type Admin struct{ http *http.Client }

// NewAdmin does not connect yet.
func NewAdmin(socketPath string) *Admin {
	return &Admin{http: &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socketPath)
		},
		IdleConnTimeout: 30 * time.Second,
	}}}
}

// Close drops idle connections.
func (a *Admin) Close() { a.http.CloseIdleConnections() }

// RegisterApplication answers the application's HMAC key, which is never shown again.
func (a *Admin) RegisterApplication(ctx context.Context, req wire.RegisterApplication) (*wire.RegisteredApplication, error) {
	data, err := a.post(ctx, "applications", req)
	if err != nil {
		return nil, err
	}
	var out wire.RegisteredApplication
	return &out, decode(data, &out)
}

func (a *Admin) StopApplication(ctx context.Context, req wire.Decision) (json.RawMessage, error) {
	return a.post(ctx, "applications/"+url.PathEscape(req.ID)+"/stop", req)
}

func (a *Admin) LimitApplication(ctx context.Context, req wire.LimitApplication) (json.RawMessage, error) {
	return a.post(ctx, "applications/"+url.PathEscape(req.ID)+"/limits", req)
}

func (a *Admin) ListApplications(ctx context.Context) (json.RawMessage, error) {
	return a.get(ctx, "applications")
}

func (a *Admin) EnrolSigner(ctx context.Context, req wire.EnrolSigner) (json.RawMessage, error) {
	return a.post(ctx, "signers", req)
}

func (a *Admin) SetSignerPIN(ctx context.Context, req wire.SetSignerPIN) (json.RawMessage, error) {
	return a.post(ctx, "signers/"+url.PathEscape(req.Signer)+"/pin", req)
}

func (a *Admin) StopSigner(ctx context.Context, req wire.Decision) (json.RawMessage, error) {
	return a.post(ctx, "signers/"+url.PathEscape(req.ID)+"/stop", req)
}

func (a *Admin) StartSigner(ctx context.Context, req wire.Decision) (json.RawMessage, error) {
	return a.post(ctx, "signers/"+url.PathEscape(req.ID)+"/start", req)
}

func (a *Admin) ListSigners(ctx context.Context) (json.RawMessage, error) {
	return a.get(ctx, "signers")
}

func (a *Admin) RevokeCertificate(ctx context.Context, req wire.RevokeCertificate) (json.RawMessage, error) {
	return a.post(ctx, "certificates/"+url.PathEscape(req.Serial)+"/revoke", req)
}

func (a *Admin) IssueCRL(ctx context.Context) (json.RawMessage, error) {
	return a.post(ctx, "crls", wire.IssueCRL{})
}

func (a *Admin) AuditVerify(ctx context.Context) (json.RawMessage, error) {
	return a.post(ctx, "audit/verify", wire.AuditVerify{})
}

func (a *Admin) Compare(ctx context.Context) (json.RawMessage, error) {
	return a.post(ctx, "compare", wire.Compare{})
}

func (a *Admin) State(ctx context.Context) (json.RawMessage, error) { return a.get(ctx, "state") }

func (a *Admin) post(ctx context.Context, path string, in any) (json.RawMessage, error) {
	body, err := json.Marshal(in)
	if err != nil {
		return nil, fmt.Errorf("client: encoding request: %w", err)
	}
	return a.call(ctx, call{method: http.MethodPost, path: "/admin/v1/" + path, body: body, gives: "application/json", takes: "application/json"})
}

func (a *Admin) get(ctx context.Context, path string) (json.RawMessage, error) {
	return a.call(ctx, call{method: http.MethodGet, path: "/admin/v1/" + path, takes: "application/json"})
}

func (a *Admin) call(ctx context.Context, one call) (json.RawMessage, error) {
	r, err := newRequest(ctx, "http://yinjian", one)
	if err != nil {
		return nil, err
	}
	data, _, err := roundTrip(a.http, r, one)
	return data, err
}

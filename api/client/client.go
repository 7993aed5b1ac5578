// Package client calls the appliance's API from Go: it signs each request with HMAC-SM3, sends it over TLS 1.3, sends it
// again where that may help and is safe (see [Retry]), and turns a refusal into a [*Problem] and silence into a
// [*NoAnswerError]. NewAdmin calls the local administration socket.
package client

import (
	"bytes"
	"cmp"
	"context"
	cryptorand "crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"mime"
	"net"
	"net/http"
	"net/http/httptrace"
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
	// Retry says how long a call goes on; the zero value sends once.
	Retry Retry
	// Connect bounds the making of a connection, TLS included; 5 s by default.
	Connect time.Duration
	// Timeout of one attempt; 60 s by default. The appliance may take 30 s to handle a request.
	Timeout time.Duration
}

// A Retry is the policy of sending again. What is sent again, after a pause, is what the appliance refused with retry
// "resign", "later" or "same-key" (docs/errors.md), a proxy's 429, 502, 503 and 504, and what got no answer: the
// connection was refused, cut or reset, or the attempt's time was over. A certificate or host name that is wrong, and any
// other refusal, ends the call at once. Each attempt has the same body and Idempotency-Key, and a new nonce and time, so
// that there is one record however often it is sent.
//
// The pauses double from 200 ms to 5 s, each cut by up to a half at random, and are never shorter than Retry-After. When
// a pause would end after Total or ctx, the call ends with the last error instead. Authorize is never sent again, since a
// wrong PIN counts.
type Retry struct {
	Attempts int           // at most, the first included; [DefaultAttempts] lasts some 10 s against fast refusals
	Total    time.Duration // of all attempts and pauses; 2 min by default. ctx may end earlier
}

// DefaultAttempts outlast the five seconds of clock_skew after an appliance's power cut. docs/clients uses as many.
const DefaultAttempts = 8

// A Client is safe for concurrent use.
type Client struct {
	cfg  Config
	base *url.URL
	http *http.Client
}

// A Problem is the appliance's refusal.
type Problem struct {
	wire.Problem
	// Unknown: this attempt or an earlier one of the call may have been done nevertheless. See [OutcomeUnknown].
	Unknown bool
}

func (p *Problem) Error() string {
	s := "yinjian: " + p.Code
	if p.Field != "" {
		s += " (" + p.Field + ")"
	}
	return s + ": " + p.Detail + "; " + p.Next + " [" + p.Instance + "]"
}

// A NoAnswerError is a call that got no answer, or none that is the appliance's.
type NoAnswerError struct {
	Unknown bool // as in Problem
	Err     error
}

func (e *NoAnswerError) Error() string {
	if e.Unknown {
		return "client: outcome unknown: " + e.Err.Error()
	}
	return "client: not done: " + e.Err.Error()
}

func (e *NoAnswerError) Unwrap() error { return e.Err }

// OutcomeUnknown reports whether the appliance may have done what the failed call asked for: then the same call with the
// same Idempotency-Key finds out. Otherwise nothing was signed.
func OutcomeUnknown(err error) bool {
	var p *Problem
	var n *NoAnswerError
	return errors.As(err, &p) && p.Unknown || errors.As(err, &n) && n.Unknown
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
		// Tickets are kept: a resumed session costs the appliance's cipher machine no signature.
		tlsConfig = &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: cfg.RootCAs, Time: cfg.Clock, ClientSessionCache: tls.NewLRUClientSessionCache(0)}
	}
	cfg.Timeout = cmp.Or(cfg.Timeout, 60*time.Second)
	cfg.Connect = cmp.Or(cfg.Connect, 5*time.Second)
	cfg.Retry.Total = cmp.Or(cfg.Retry.Total, 2*time.Minute)
	return &Client{cfg: cfg, base: base, http: &http.Client{
		Transport: &http.Transport{
			DialContext: (&net.Dialer{Timeout: cfg.Connect}).DialContext, TLSHandshakeTimeout: cfg.Connect,
			TLSClientConfig: tlsConfig, MaxIdleConnsPerHost: 64, IdleConnTimeout: 30 * time.Second,
		},
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
	if err := c.post(ctx, "/v1/sign", idempotencyKey, c.cfg.Retry.Attempts, req, &out); err != nil {
		return nil, err
	}
	return &out, nil
}

// Batch asks for the signatures of several documents of one signer. Each item's idempotency key names its act, as in [Client.Sign]:
// the batch sent again gives the same records. An item that was refused has a problem in place of its result.
func (c *Client) Batch(ctx context.Context, req *wire.BatchRequest) (*wire.BatchResult, error) {
	var out wire.BatchResult
	if err := c.post(ctx, "/v1/batches", "", c.cfg.Retry.Attempts, req, &out); err != nil {
		return nil, err
	}
	return &out, nil
}

// Verify answers the report as JSON.
func (c *Client) Verify(ctx context.Context, req *wire.VerifyRequest) (json.RawMessage, error) {
	var out json.RawMessage
	err := c.post(ctx, "/v1/verify", "", c.cfg.Retry.Attempts, req, &out)
	return out, err
}

// Timestamp asks for a token. A retry after a lost answer makes a second, equally good token.
func (c *Client) Timestamp(ctx context.Context, req *wire.TimestampRequest) (*wire.Timestamp, error) {
	var out wire.Timestamp
	if err := c.post(ctx, "/v1/timestamp", "", c.cfg.Retry.Attempts, req, &out); err != nil {
		return nil, err
	}
	return &out, nil
}

// Stamp sends a DER TimeStampReq to a unit and answers its DER TimeStampResp (RFC 3161), a rejection included.
func (c *Client) Stamp(ctx context.Context, unit string, query []byte) ([]byte, error) {
	return c.do(ctx, call{
		method: http.MethodPost, path: "/tsa/" + url.PathEscape(unit), body: query,
		takes: "application/timestamp-reply", gives: "application/timestamp-query", attempts: c.cfg.Retry.Attempts, signed: true,
	})
}

// Authorize asks for an authorisation by the signer's PIN.
func (c *Client) Authorize(ctx context.Context, req *wire.AuthorizationRequest) (*wire.Grant, error) {
	var out wire.Grant
	if err := c.post(ctx, "/v1/authorizations", "", 1, req, &out); err != nil {
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

func (c *Client) post(ctx context.Context, path, idempotencyKey string, attempts int, in, out any) error {
	body, err := json.Marshal(in)
	if err != nil {
		return fmt.Errorf("client: encoding request: %w", err)
	}
	data, err := c.do(ctx, call{
		method: http.MethodPost, path: path, body: body, key: idempotencyKey,
		takes: "application/json", gives: "application/json", attempts: attempts, signed: true,
	})
	if err != nil {
		return err
	}
	return decode(data, out)
}

func (c *Client) get(ctx context.Context, path string, signed bool) ([]byte, error) {
	return c.do(ctx, call{method: http.MethodGet, path: path, takes: "application/json", attempts: c.cfg.Retry.Attempts, signed: signed})
}

func decode(data []byte, out any) error {
	if err := json.Unmarshal(data, out); err != nil {
		return &NoAnswerError{Unknown: true, Err: fmt.Errorf("decoding answer: %w", err)}
	}
	return nil
}

type call struct {
	method, path string
	body         []byte
	key          string // Idempotency-Key
	gives, takes string // media types
	also         int    // a second status that is an answer
	attempts     int
	signed       bool
}

// do sends the call as often as [Retry] says.
func (c *Client) do(ctx context.Context, one call) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, c.cfg.Retry.Total)
	defer cancel()
	unknown := false // whether any attempt so far may have been done
	for try := 1; ; try++ {
		data, err := c.once(ctx, one)
		var no *refusal
		if !errors.As(err, &no) {
			return data, err
		}
		unknown = unknown || no.unknown
		failed := no.error(unknown)
		pause := max(no.after, jittered(try))
		if end, _ := ctx.Deadline(); !no.again || try >= one.attempts || ctx.Err() != nil || time.Until(end) <= pause { // interval
			return nil, failed
		}
		t := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			t.Stop()
			return nil, failed
		case <-t.C:
		}
	}
}

// jittered is the pause after an attempt: clients that failed together do not come back together.
func jittered(try int) time.Duration {
	whole := min(200*time.Millisecond<<min(try-1, 10), 5*time.Second)
	return whole/2 + rand.N(whole/2)
}

// once sends one attempt. Its error is a [*refusal] unless the request could not be made.
func (c *Client) once(ctx context.Context, one call) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, c.cfg.Timeout)
	defer cancel()
	r, err := newRequest(ctx, c.base.Scheme+"://"+c.base.Host, one)
	if err != nil {
		return nil, err
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
	cryptorand.Read(random[:])
	a := wire.Authorization{
		App: c.cfg.AppID, Time: strconv.FormatInt(c.cfg.Clock().UnixMilli(), 10), Nonce: base64.RawURLEncoding.EncodeToString(random[:]),
	}
	a.MAC = wire.MAC(c.cfg.Key, wire.Signable{
		Method: r.Method, Path: r.URL.EscapedPath(), Query: r.URL.RawQuery, Host: r.URL.Host, Body: body,
	}, a.App, a.Time, a.Nonce)
	r.Header.Set("Authorization", a.String())
}

// A refusal is why an attempt failed, and what that means for the next.
type refusal struct {
	problem *Problem // nil when the appliance did not answer
	err     error
	again   bool          // another attempt may help
	unknown bool          // this one may have been done
	after   time.Duration // Retry-After
}

func (r *refusal) Error() string { return r.error(r.unknown).Error() }

// error is what the caller sees.
func (r *refusal) error(unknown bool) error {
	if r.problem == nil {
		return &NoAnswerError{unknown, r.err}
	}
	r.problem.Unknown = unknown
	return r.problem
}

func roundTrip(h *http.Client, r *http.Request, one call) ([]byte, error) {
	connected := false // before that nothing can have been sent
	r = r.WithContext(httptrace.WithClientTrace(r.Context(), &httptrace.ClientTrace{GotConn: func(httptrace.GotConnInfo) { connected = true }}))
	resp, err := h.Do(r)
	if err != nil {
		return nil, &refusal{err: err, again: !distrusted(err), unknown: connected}
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err != nil {
		return nil, &refusal{err: fmt.Errorf("reading answer: %w", err), again: true, unknown: true}
	}
	if len(data) > maxAnswer {
		return nil, &refusal{err: errors.New("answer too large"), unknown: true}
	}
	media, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	if (resp.StatusCode == http.StatusOK || resp.StatusCode == one.also) && media == one.takes {
		return data, nil
	}
	after, _ := strconv.ParseUint(resp.Header.Get("Retry-After"), 10, 20) // seconds, as the appliance sends it (RFC 9110 §10.2.3)
	p := new(Problem)
	if media == "application/problem+json" && json.Unmarshal(data, &p.Problem) == nil && p.Code != "" {
		return nil, &refusal{
			problem: p, after: time.Duration(after) * time.Second,
			// A nonce is known that was used once only: something in between sent the request twice, and one copy came through.
			unknown: p.Retry == wire.RetrySameKey || p.Code == string(problem.ReplayedRequest),
			again:   p.Retry == wire.RetryResign || p.Retry == wire.RetryLater || p.Retry == wire.RetrySameKey,
		}
	}
	// Something in between answered, or something else altogether.
	status := resp.StatusCode
	return nil, &refusal{
		err: fmt.Errorf("unexpected answer: status %d, %q", status, media), after: time.Duration(after) * time.Second,
		again: status == http.StatusTooManyRequests || 502 <= status && status <= 504, unknown: status < 400 || status > 499,
	}
}

// distrusted reports whether TLS failed over who the other side is, or how it speaks: that stays so.
func distrusted(err error) bool {
	var verification *tls.CertificateVerificationError
	var record tls.RecordHeaderError
	var alert tls.AlertError
	switch {
	case errors.As(err, &verification), errors.As(err, &record):
		return true
	case errors.As(err, &alert):
		// RFC 8446 §6.2: handshake_failure, protocol_version, insufficient_security. Others, internal_error among them,
		// may pass.
		return alert == 40 || alert == 70 || alert == 71
	}
	return false
}

// An Admin calls the local administration socket, where the kernel tells the appliance who calls, or the administrators' TLS
// listener. It is safe for concurrent use.
type Admin struct {
	http    *http.Client
	base    string
	session string // of an administrator who has logged in; "" for none
	waiting func(wire.Proposed)
}

// NewAdmin does not connect yet.
func NewAdmin(socketPath string) *Admin {
	return &Admin{base: "http://yinjian", http: &http.Client{Transport: &http.Transport{
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

func (a *Admin) AddSignerKey(ctx context.Context, req wire.AddSignerKey) (json.RawMessage, error) {
	return a.post(ctx, "signers/"+url.PathEscape(req.Signer)+"/keys", req)
}

func (a *Admin) SetSignerPIN(ctx context.Context, req wire.SetSignerPIN) (json.RawMessage, error) {
	return a.post(ctx, "signers/"+url.PathEscape(req.Signer)+"/pin", req)
}

func (a *Admin) RecoverSigner(ctx context.Context, req wire.RecoverSigner) (json.RawMessage, error) {
	return a.post(ctx, "signers/"+url.PathEscape(req.Signer)+"/recover", req)
}

// ListKeys lists every key, with its attributes as the cipher machine gives them.
func (a *Admin) ListKeys(ctx context.Context) (json.RawMessage, error) { return a.get(ctx, "keys") }

func (a *Admin) DestroyKey(ctx context.Context, req wire.DestroyKey) (json.RawMessage, error) {
	return a.post(ctx, "keys/destroy", req)
}

// Ceremony has the minutes of a key ceremony journalled.
func (a *Admin) Ceremony(ctx context.Context, req wire.Ceremony) (json.RawMessage, error) {
	return a.post(ctx, "ceremonies", req)
}

// Rederive brings what needs no PIN for it under the ceremony's MAC keys.
func (a *Admin) Rederive(ctx context.Context) (json.RawMessage, error) {
	return a.post(ctx, "ceremonies/rederive", wire.Rederive{})
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

// AddAnchor admits a CA for uses.
func (a *Admin) AddAnchor(ctx context.Context, req wire.AddAnchor) (json.RawMessage, error) {
	return a.post(ctx, "anchors", req)
}

func (a *Admin) WithdrawAnchor(ctx context.Context, req wire.Decision) (json.RawMessage, error) {
	return a.post(ctx, "anchors/"+url.PathEscape(req.ID)+"/withdraw", req)
}

func (a *Admin) ListAnchors(ctx context.Context) (json.RawMessage, error) {
	return a.get(ctx, "anchors")
}

func (a *Admin) AddIntermediates(ctx context.Context, req wire.AddIntermediates) (json.RawMessage, error) {
	return a.post(ctx, "intermediates", req)
}

// RequestCertificate answers a certificate request; asked again while the certificate is awaited, the same one.
func (a *Admin) RequestCertificate(ctx context.Context, req wire.RequestCertificate) (*wire.CertificateRequest, error) {
	data, err := a.post(ctx, "certificates/requests", req)
	if err != nil {
		return nil, err
	}
	var out wire.CertificateRequest
	return &out, decode(data, &out)
}

func (a *Admin) ImportCertificates(ctx context.Context, req wire.ImportCertificates) (json.RawMessage, error) {
	return a.post(ctx, "certificates", req)
}

func (a *Admin) ListCertificates(ctx context.Context) (json.RawMessage, error) {
	return a.get(ctx, "certificates")
}

func (a *Admin) ImportCRL(ctx context.Context, req wire.ImportCRL) (json.RawMessage, error) {
	return a.post(ctx, "trust/crls", req)
}

// FetchCRLs fetches the lists of all configured addresses now.
func (a *Admin) FetchCRLs(ctx context.Context) (json.RawMessage, error) {
	return a.post(ctx, "trust/crls/fetch", wire.FetchCRLs{})
}

func (a *Admin) ListCRLs(ctx context.Context) (json.RawMessage, error) {
	return a.get(ctx, "trust/crls")
}

// RunPreserve returns when what was due is archived; an archive of a day takes seconds, another digest for years of them days.
func (a *Admin) RunPreserve(ctx context.Context) (json.RawMessage, error) {
	return a.post(ctx, "preserve/run", wire.RunPreserve{})
}

func (a *Admin) PreserveStatus(ctx context.Context) (json.RawMessage, error) {
	return a.get(ctx, "preserve")
}

// PreservedRecord answers a record's evidence file.
func (a *Admin) PreservedRecord(ctx context.Context, req wire.PreservedRecord) (json.RawMessage, error) {
	return a.post(ctx, "preserve/record", req)
}

func (a *Admin) AuditVerify(ctx context.Context) (json.RawMessage, error) {
	return a.post(ctx, "audit/verify", wire.AuditVerify{})
}

// Stamp has a TimeStampReq answered by the appliance's first unit.
func (a *Admin) Stamp(ctx context.Context, req wire.Stamp) (json.RawMessage, error) {
	return a.post(ctx, "stamps", req)
}

func (a *Admin) AddMachine(ctx context.Context, req wire.AddMachine) (json.RawMessage, error) {
	return a.post(ctx, "machines", req)
}

// ChangeMachine drains, resumes or removes a cipher machine.
func (a *Admin) ChangeMachine(ctx context.Context, act string, req wire.ChangeMachine) (json.RawMessage, error) {
	return a.post(ctx, "machines/"+url.PathEscape(req.Name)+"/"+url.PathEscape(act), req)
}

func (a *Admin) ListMachines(ctx context.Context) (json.RawMessage, error) {
	return a.get(ctx, "machines")
}

func (a *Admin) TimeStatus(ctx context.Context) (json.RawMessage, error) { return a.get(ctx, "time") }

func (a *Admin) TimeHistory(ctx context.Context, req wire.TimeHistory) (json.RawMessage, error) {
	return a.post(ctx, "time/history", req)
}

func (a *Admin) ListTimeSources(ctx context.Context) (json.RawMessage, error) {
	return a.get(ctx, "time/sources")
}

func (a *Admin) AddTimeSource(ctx context.Context, req wire.AddTimeSource) (json.RawMessage, error) {
	return a.post(ctx, "time/sources", req)
}

func (a *Admin) RemoveTimeSource(ctx context.Context, req wire.RemoveTimeSource) (json.RawMessage, error) {
	return a.post(ctx, "time/sources/"+url.PathEscape(req.Name)+"/remove", req)
}

func (a *Admin) ReadmitTime(ctx context.Context, req wire.ReadmitTime) (json.RawMessage, error) {
	return a.post(ctx, "time/readmit", req)
}

func (a *Admin) StampStatus(ctx context.Context) (json.RawMessage, error) { return a.get(ctx, "tsa") }

// ChangeStamping stops or starts timestamp units.
func (a *Admin) ChangeStamping(ctx context.Context, act string, req wire.StampService) (json.RawMessage, error) {
	return a.post(ctx, "tsa/"+url.PathEscape(act), req)
}

func (a *Admin) StampLog(ctx context.Context, req wire.StampLog) (json.RawMessage, error) {
	return a.post(ctx, "tsa/log", req)
}

// DirectoryStatus answers a wire.DirectoryStatus.
func (a *Admin) DirectoryStatus(ctx context.Context) (json.RawMessage, error) {
	return a.get(ctx, "directory")
}

func (a *Admin) DirectoryVersions(ctx context.Context) (json.RawMessage, error) {
	return a.get(ctx, "directory/versions")
}

// SkipVersions answers a wire.SkippedVersions.
func (a *Admin) SkipVersions(ctx context.Context, req wire.SkipVersions) (json.RawMessage, error) {
	return a.post(ctx, "directory/skip", req)
}

// ThawObject answers a wire.ThawedObject.
func (a *Admin) ThawObject(ctx context.Context, req wire.ThawObject) (json.RawMessage, error) {
	return a.post(ctx, "directory/thaw", req)
}

func (a *Admin) PeerStatus(ctx context.Context) (json.RawMessage, error) { return a.get(ctx, "peer") }

// PeerCard has the appliance make its card for the other campus.
func (a *Admin) PeerCard(ctx context.Context) (*wire.PeerCardFile, error) {
	answer, err := a.post(ctx, "peer/card", wire.PeerCard{})
	if err != nil {
		return nil, err
	}
	var out wire.PeerCardFile
	return &out, json.Unmarshal(answer, &out)
}

func (a *Admin) AddPeer(ctx context.Context, req wire.AddPeer) (json.RawMessage, error) {
	return a.post(ctx, "peer", req)
}

func (a *Admin) RemovePeer(ctx context.Context, req wire.RemovePeer) (json.RawMessage, error) {
	return a.post(ctx, "peer/remove", req)
}

func (a *Admin) State(ctx context.Context) (json.RawMessage, error) { return a.get(ctx, "state") }

func (a *Admin) post(ctx context.Context, path string, in any) (json.RawMessage, error) {
	body, err := json.Marshal(in)
	if err != nil {
		return nil, fmt.Errorf("client: encoding request: %w", err)
	}
	data, err := a.call(ctx, call{
		method: http.MethodPost, path: "/admin/v1/" + path, body: body, gives: "application/json", takes: "application/json", also: http.StatusAccepted,
	})
	if err != nil {
		return nil, err
	}
	return a.approved(ctx, data)
}

func (a *Admin) get(ctx context.Context, path string) (json.RawMessage, error) {
	return a.call(ctx, call{method: http.MethodGet, path: "/admin/v1/" + path, takes: "application/json"})
}

func (a *Admin) call(ctx context.Context, one call) (json.RawMessage, error) {
	r, err := newRequest(ctx, a.base, one)
	if err != nil {
		return nil, err
	}
	return a.answered(r, one)
}

// answered sends a request with the session, and answers what came of it.
func (a *Admin) answered(r *http.Request, one call) (json.RawMessage, error) {
	if a.session != "" {
		r.Header.Set("Authorization", "Bearer "+a.session)
	}
	data, err := roundTrip(a.http, r, one)
	var no *refusal
	if errors.As(err, &no) {
		return nil, no.error(no.unknown)
	}
	return data, err
}

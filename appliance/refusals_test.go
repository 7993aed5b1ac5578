package appliance_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"yinjian/api"
	"yinjian/api/wire"
	"yinjian/appliance/account"
	"yinjian/appliance/cms"
	"yinjian/appliance/evidence"
	"yinjian/appliance/internal/testkit"
	"yinjian/ntp"
)

// A front is the API over real services.
type front struct {
	*testkit.House
	t       *testing.T
	handler http.Handler
	nonces  int
}

type frontParts struct{ h *testkit.House }

func (p frontParts) Alive() error            { return nil }
func (p frontParts) Ready() (bool, []string) { return true, nil }
func (p frontParts) State() any              { return struct{}{} }
func (p frontParts) Metrics() []byte         { return nil }
func (p frontParts) Units() []string         { return nil }
func (p frontParts) Respond(context.Context, string, string, []byte) ([]byte, error) {
	return nil, errors.New("no unit")
}

func newFront(t *testing.T) *front {
	h := testkit.New(t)
	log := logrus.New()
	log.SetOutput(io.Discard)
	parts := frontParts{h}
	s, err := api.New(api.Config{
		Signing: h.Signing, Directory: h.Directory, Stamps: parts, Tokens: struct{ api.Tokens }{}, Health: parts, Admin: struct{ api.Admin }{}, Accounts: struct{ api.Accounts }{}, Clock: h.Clock, Log: log, Version: "test",
	})
	if err != nil {
		t.Fatal(err)
	}
	return &front{House: h, t: t, handler: s.Handler()}
}

// post sends a signed request of an application and answers status and body.
func (f *front) post(app, path, key string, body any) (int, []byte) {
	f.t.Helper()
	b, err := json.Marshal(body)
	if err != nil {
		f.t.Fatal(err)
	}
	_, secret, _ := f.Directory.Application(app)
	f.nonces++
	a := wire.Authorization{App: app, Time: strconv.FormatInt(f.Clock.Now().Time.UnixMilli()+1, 10), Nonce: fmt.Sprintf("nonce-%020d", f.nonces)}
	r := httptest.NewRequest(http.MethodPost, path, bytes.NewReader(b))
	a.MAC = wire.MAC(secret, wire.Signable{Method: r.Method, Path: path, Host: r.Host, Body: b}, a.App, a.Time, a.Nonce)
	r.Header.Set("Authorization", a.String())
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("Idempotency-Key", key)
	w := httptest.NewRecorder()
	f.handler.ServeHTTP(w, r)
	return w.Code, w.Body.Bytes()
}

func signRequest() *wire.SignRequest {
	return &wire.SignRequest{
		Signer: "D001", Algorithm: "SM2", Form: "raw", Content: testkit.Document, Role: "attending",
		Document: wire.Document{ID: "ZY-2026-001", Type: "discharge-summary", MediaType: "application/xml"},
		Consent:  wire.Consent{Method: string(evidence.AppAsserted), Assertion: "医生已点击签名"},
	}
}

// What is well formed and still must not be signed is refused with the code, the field of the contract and what to do
// about it. The journal does not grow by it, no key is used, and the Idempotency-Key stays free.
func TestRefusals(t *testing.T) {
	t.Parallel()
	f := newFront(t)
	f.App("his", nil)
	f.App("emr", nil)
	f.App("pin", func(a *account.Application) { a.Consent = []evidence.Method{evidence.SignerPIN} })
	f.App("read", func(a *account.Application) { a.Rights = []string{account.RightVerify} })
	f.App("gone", nil)
	doctor := f.Doctor("D001")
	f.Doctor("D002", "SM2")
	f.Doctor("D003")
	f.Doctor("D004")
	serial := f.Serial(f.Doctor("D005"), "SM2")
	for _, do := range []func() error{
		func() error {
			_, err := f.Directory.StopApplication(t.Context(), "admin", "gone", true, "")
			return err
		},
		func() error { _, err := f.Directory.StopSigner(t.Context(), "admin", "D003", true, ""); return err },
		func() error { _, err := f.Directory.Revoke(t.Context(), "admin", serial, "keyCompromise"); return err },
	} {
		if err := do(); err != nil {
			t.Fatal(err)
		}
	}
	status, body := f.post("his", "/v1/sign", "used", signRequest())
	inCMS := signRequest()
	inCMS.Form = "cms"
	cmsStatus, cmsBody := f.post("his", "/v1/sign", "used-cms", inCMS)
	if status != 200 || cmsStatus != 200 {
		t.Fatalf("%d %s, %d %s", status, body, cmsStatus, cmsBody)
	}
	var genuine wire.SignResult
	if err := json.Unmarshal(cmsBody, &genuine); err != nil {
		t.Fatal(err)
	}
	message, err := cms.Parse(genuine.Signature)
	if err != nil {
		t.Fatal(err)
	}
	attributes := message.SignerInfos[0].SignedAttributesDER()
	grant := f.Grant(f.application("his"), account.GrantRequest{Signer: "D004", Digests: [][]byte{testkit.Digest("SM2", []byte("another"))}})

	size, used := f.Journal.Size(), f.Staff.Calls("Do")
	for name, row := range map[string]struct {
		app    string // "his"
		key    string
		spoil  func(q *wire.SignRequest)
		around func(on bool) // what is wrong with the appliance meanwhile
		status int
		code   string
		field  string
		retry  wire.Retry
	}{
		"attributes as content":   {spoil: func(q *wire.SignRequest) { q.Content = attributes }, status: 400, code: "invalid_request", field: "content", retry: wire.RetryNever},
		"the key, other content":  {key: "used", spoil: func(q *wire.SignRequest) { q.Content = []byte("x") }, status: 409, code: "idempotency_conflict", retry: wire.RetryNever},
		"the key, other form":     {key: "used", spoil: func(q *wire.SignRequest) { q.Form = "cms" }, status: 409, code: "idempotency_conflict", retry: wire.RetryNever},
		"the key, other role":     {key: "used-cms", spoil: func(q *wire.SignRequest) { q.Form, q.Role = "cms", "nurse" }, status: 409, code: "idempotency_conflict", retry: wire.RetryNever},
		"the key, other document": {key: "used", spoil: func(q *wire.SignRequest) { q.Document.ID = "ZY-2026-002" }, status: 409, code: "idempotency_conflict", retry: wire.RetryNever},
		"the key, other signer":   {key: "used", spoil: func(q *wire.SignRequest) { q.Signer = "D002" }, status: 409, code: "idempotency_conflict", retry: wire.RetryNever},
		"raw by digest": {spoil: func(q *wire.SignRequest) {
			q.Content, q.Digest = nil, &wire.Digest{Algorithm: "SM3", Value: testkit.Digest("SM2", testkit.Document)}
		}, status: 422, code: "content_required", field: "digest", retry: wire.RetryNever},
		"unknown signer":        {spoil: func(q *wire.SignRequest) { q.Signer = "D999" }, status: 422, code: "signer_unknown", retry: wire.RetryOperator},
		"no key for RSA":        {spoil: func(q *wire.SignRequest) { q.Signer, q.Algorithm = "D002", "RSA-2048" }, status: 422, code: "key_unknown", retry: wire.RetryOperator},
		"stopped signer":        {spoil: func(q *wire.SignRequest) { q.Signer = "D003" }, status: 403, code: "signer_stopped", retry: wire.RetryOperator},
		"revoked certificate":   {spoil: func(q *wire.SignRequest) { q.Signer = "D005" }, status: 409, code: "certificate_unusable", retry: wire.RetryOperator},
		"unknown authorisation": {spoil: func(q *wire.SignRequest) { q.Consent = wire.Consent{AuthorizationID: strings.Repeat("0", 32)} }, status: 403, code: "authorization_invalid", retry: wire.RetryNever},
		"another's authorisation": {app: "emr", spoil: func(q *wire.SignRequest) {
			q.Signer, q.Consent = "D004", wire.Consent{AuthorizationID: grant.ID}
		}, status: 403, code: "authorization_invalid", retry: wire.RetryNever},
		"authorisation of another document": {spoil: func(q *wire.SignRequest) {
			q.Signer, q.Consent = "D004", wire.Consent{AuthorizationID: grant.ID}
		}, status: 403, code: "authorization_invalid", retry: wire.RetryNever},
		"asserted, PIN asked for": {app: "pin", status: 403, code: "consent_insufficient", retry: wire.RetryNever},
		"no right to sign":        {app: "read", status: 403, code: "forbidden", retry: wire.RetryOperator},
		"stopped application":     {app: "gone", status: 403, code: "application_stopped", retry: wire.RetryOperator},
		"time is not trusted": {around: func(on bool) { f.Clock.State(map[bool]ntp.State{true: ntp.Untrusted, false: ntp.Trusted}[on]) },
			status: 503, code: "time_untrusted", retry: wire.RetryLater},
		"disk is full": {around: func(on bool) { f.Full = map[bool]func() error{true: func() error { return errors.New("full") }}[on] },
			status: 503, code: "disk_reserve", retry: wire.RetryLater},
	} {
		t.Run(name, func(t *testing.T) {
			q := signRequest()
			if row.spoil != nil {
				row.spoil(q)
			}
			if row.app == "" {
				row.app = "his"
			}
			if row.key == "" {
				row.key = "fresh"
			}
			if row.around != nil {
				row.around(true)
				defer row.around(false)
			}
			status, body := f.post(row.app, "/v1/sign", row.key, q)
			var p wire.Problem
			if err := json.Unmarshal(body, &p); err != nil || status != row.status || p.Code != row.code || p.Field != row.field || p.Retry != row.retry || p.Detail == "" || p.Next == "" {
				t.Errorf("answer = %d %s", status, body)
			}
		})
	}
	if n := f.Journal.Size(); n != size || f.Staff.Calls("Do") != used {
		t.Errorf("refusals made %d entries and used keys %d times", n-size, f.Staff.Calls("Do")-used)
	}
	if status, body := f.post("his", "/v1/sign", "fresh", signRequest()); status != 200 || strings.Contains(string(body), `"replayed":true`) {
		t.Errorf("the key of the refused: %d %s", status, body)
	}

	size = f.Journal.Size()
	f.Clock.Advance(8 * 24 * time.Hour) // the CRLs have expired
	status, body = f.post("his", "/v1/sign", "late", signRequest())
	if status != 409 || !strings.Contains(string(body), `"code":"certificate_unusable"`) || f.Journal.Size() != size {
		t.Errorf("with expired CRLs: %d %s, %d entries", status, body, f.Journal.Size()-size)
	}
	if status, body := f.post("his", "/v1/sign", "used", signRequest()); status != 200 || !strings.Contains(string(body), `"replayed":true`) {
		t.Errorf("what was signed before: %d %s", status, body)
	}

	// The signature of a CMS over its attributes is no signature of a document that happens to be those attributes.
	for _, document := range [][]byte{attributes, append([]byte{0x31}, attributes[1:]...)} {
		status, body := f.post("his", "/v1/verify", "", map[string]any{
			"raw":      wire.RawSignature{Algorithm: "SM2", Value: message.SignerInfos[0].Signature, Certificate: doctor.Keys[0].Certificate},
			"document": base64.StdEncoding.EncodeToString(document),
		})
		if status != 200 || !strings.Contains(string(body), `"verdict":"invalid"`) {
			t.Errorf("attributes as a raw document: %d %s", status, body)
		}
	}
}

func (f *front) application(id string) *account.Application {
	a, _, _ := f.Directory.Application(id)
	return a
}

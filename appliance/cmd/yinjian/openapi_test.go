package main_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"
	"github.com/getkin/kin-openapi/routers/gorillamux"

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance"
	"yinjian/tsa"
)

// A promise is openapi.json as the running appliance serves it, and what of it was seen kept.
type promise struct {
	h      *http.Client
	base   string
	router routers.Router
	doc    *openapi3.T
	seen   map[string]bool // "POST /v1/sign 200"
}

// A send is one request.
type send struct {
	method, path, query string
	as                  *client.Config // nil: without a key
	media, accept, key  string
	body                []byte
	announces           int64 // so many bytes, and sends none before it is told to
}

// do sends it and holds the answer to the contract: route, status, content type and schema; a status that the route does not
// name is a fault, whatever its default says.
func (p *promise) do(t *testing.T, s send) (int, []byte) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), s.method, p.base+s.path+s.query, bytes.NewReader(s.body))
	if err != nil {
		t.Fatal(err)
	}
	if s.announces > 0 {
		r.Body, r.ContentLength = io.NopCloser(bytes.NewReader(make([]byte, s.announces))), s.announces
		r.Header.Set("Expect", "100-continue")
	}
	if s.as != nil {
		a := wire.Authorization{App: s.as.AppID, Time: strconv.FormatInt(time.Now().UnixMilli(), 10), Nonce: fmt.Sprintf("promise-%020d", time.Now().UnixNano())}
		a.MAC = wire.MAC(s.as.Key, wire.Signable{Method: s.method, Path: s.path, Query: strings.TrimPrefix(s.query, "?"), Host: r.Host, Body: s.body}, a.App, a.Time, a.Nonce)
		r.Header.Set("Authorization", a.String())
	}
	for name, v := range map[string]string{"Content-Type": s.media, "Accept": s.accept, "Idempotency-Key": s.key} {
		if v != "" {
			r.Header.Set(name, v)
		}
	}
	resp, err := p.h.Do(r)
	if err != nil {
		t.Fatalf("%s %s: %v", s.method, s.path, err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	plain := r.Clone(context.Background())
	plain.URL.Scheme, plain.URL.Host, plain.Host, plain.URL.RawQuery = "", "", "", ""
	plain.Body = io.NopCloser(bytes.NewReader(s.body))
	route, params, err := p.router.FindRoute(plain)
	if err != nil {
		t.Fatalf("%s %s: %v", s.method, s.path, err)
	}
	at := fmt.Sprintf("%s %s %d", s.method, route.Path, resp.StatusCode)
	p.seen[at] = true
	if route.Operation.Responses.Status(resp.StatusCode) == nil {
		t.Errorf("%s is not documented: %s", at, b)
	}
	in := &openapi3filter.RequestValidationInput{Request: plain, PathParams: params, Route: route,
		Options: &openapi3filter.Options{AuthenticationFunc: openapi3filter.NoopAuthenticationFunc, IncludeResponseStatus: true}}
	if resp.StatusCode == http.StatusOK {
		if err := openapi3filter.ValidateRequest(context.Background(), in); err != nil {
			t.Errorf("%s: taken, though the contract does not know it: %v", at, err)
		}
	}
	if err := openapi3filter.ValidateResponse(context.Background(), &openapi3filter.ResponseValidationInput{
		RequestValidationInput: in, Status: resp.StatusCode, Header: resp.Header, Body: io.NopCloser(bytes.NewReader(b)), Options: in.Options,
	}); err != nil {
		t.Errorf("%s: the answer is none of the contract's: %v\n%s", at, err, b)
	}
	return resp.StatusCode, b
}

// Each documented route of the running appliance, with each status that a caller can bring about: what it answers is what
// openapi.json, as it serves it, says of route, status, content type and schema.
func TestOpenAPIAgainstTheRunningServer(t *testing.T) {
	t.Parallel()
	dir := initAppliance(t, startTimeServer(t))
	configure(t, dir, func(c *appliance.Config) { c.Policy.MaxBodyBytes = 1 << 20 })
	m := serve(t, dir)
	m.trusted(t)
	m.register(t, "his", "--consent", "app-asserted", "--consent", "signer-pin")
	m.register(t, "slow", "--consent", "app-asserted", "--rate", "1", "--burst", "1")
	m.register(t, "gone", "--consent", "app-asserted")
	mustRun(t, "app", "stop", "gone", "--dir", dir, "--reason", "下线")
	m.enrol(t, "D1", officePIN)
	his, slow, gone := m.clientConfig(t, "his"), m.clientConfig(t, "slow"), m.clientConfig(t, "gone")
	p := &promise{h: m.stranger(t, true), base: m.ends.API, seen: map[string]bool{}}
	p.h.Transport.(*http.Transport).ExpectContinueTimeout = answerWithin
	resp, err := p.h.Get(p.base + "/openapi.json")
	if err != nil {
		t.Fatal(err)
	}
	served, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	if err != nil {
		t.Fatal(err)
	}
	if p.doc, err = openapi3.NewLoader().LoadFromData(served); err != nil {
		t.Fatal(err)
	}
	openapi3filter.RegisterBodyDecoder("application/timestamp-query", openapi3filter.FileBodyDecoder)
	openapi3filter.RegisterBodyDecoder("application/timestamp-reply", openapi3filter.FileBodyDecoder)
	if p.router, err = gorillamux.NewRouter(p.doc); err != nil {
		t.Fatal(err)
	}
	asJSON := func(v any) []byte {
		t.Helper()
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	good := func(path string, body []byte) send {
		s := send{method: "POST", path: path, as: &his, media: "application/json", body: body}
		if body == nil {
			s.method, s.media = "GET", ""
		}
		return s
	}
	answers := func(s send, out any) {
		t.Helper()
		status, b := p.do(t, s)
		if status != http.StatusOK {
			t.Fatalf("%s %s = %d %s", s.method, s.path, status, b)
		}
		if out != nil {
			if err := json.Unmarshal(b, out); err != nil {
				t.Fatal(err)
			}
		}
	}

	// 1. Every route answers as it should.
	var signed wire.SignResult
	signing := good("/v1/sign", asJSON(asserted("D1", "one")))
	signing.key = "one"
	answers(signing, &signed)
	one := asserted("D1", "one")
	batch := good("/v1/batches", asJSON(wire.BatchRequest{
		Signer: one.Signer, Algorithm: one.Algorithm, Form: one.Form, Role: one.Role, Consent: one.Consent,
		Items: []wire.BatchItem{{IdempotencyKey: "of-many", Content: one.Content, Document: one.Document}},
	}))
	evidenceOf := good("/v1/evidence/"+signed.RecordID, nil)
	_, bundle := p.do(t, evidenceOf)
	verifying := good("/v1/verify", asJSON(map[string]any{"evidence": json.RawMessage(bundle), "document": documentOf("one")}))
	answers(verifying, nil)
	var certificates []struct{ Serial string }
	o := mustRun(t, "cert", "list", "--dir", dir, "-o", "json")
	if err := json.Unmarshal([]byte(o.stdout), &certificates); err != nil || len(certificates) == 0 {
		t.Fatalf("%v: %v", err, o)
	}
	certificate := good("/v1/certs/"+certificates[slices.IndexFunc(certificates, func(c struct{ Serial string }) bool { return c.Serial != "" })].Serial, nil)
	stamping := good("/v1/timestamp", asJSON(wire.TimestampRequest{Data: []byte("报告")}))
	authorizing := good("/v1/authorizations", asJSON(wire.AuthorizationRequest{Signer: "D1", PIN: officePIN, Count: 1, Seconds: 60}))
	whole := 0
	var q wire.STFRequest
	var r wire.STFResponse
	creating := good("/v1/stf/create-request", asJSON(wire.STFCreateRequest{Data: []byte("报告"), ReqType: &whole}))
	answers(creating, &q)
	responding := good("/v1/stf/create-response", asJSON(wire.STFCreateResponse{Request: q.Request}))
	answers(responding, &r)
	stfVerify := good("/v1/stf/verify", asJSON(wire.STFVerify{Response: r.Response}))
	stfInfo := good("/v1/stf/info", asJSON(wire.STFRead{Response: r.Response}))
	stfDetail := good("/v1/stf/detail", asJSON(wire.STFReadItem{Response: r.Response, Item: 6}))
	query, err := (&tsa.Request{Imprint: tsa.ImprintOf([]byte("报告")), CertReq: true}).Bytes()
	if err != nil {
		t.Fatal(err)
	}
	tsaRoute := send{method: "POST", path: "/tsa/sm2", as: &his, media: "application/timestamp-query", body: query}
	state := good("/health/state", nil)
	authenticated := []send{signing, batch, verifying, stamping, authorizing, creating, responding, stfVerify, stfInfo, stfDetail, evidenceOf, certificate, tsaRoute, state}
	for _, s := range authenticated {
		answers(s, nil)
	}
	for _, path := range []string{"/health/alive", "/health/ready", "/openapi.json"} {
		answers(send{method: "GET", path: path}, nil)
	}

	// 2. What every route of an application refuses.
	refuses := func(want int, s send) {
		t.Helper()
		if status, b := p.do(t, s); status != want {
			t.Errorf("%s %s = %d %s; want %d", s.method, s.path, status, b, want)
		}
	}
	for _, s := range authenticated {
		c := s
		c.as = nil
		refuses(401, c)
		c = s
		c.as = &gone
		refuses(403, c)
		c = s
		c.accept = "text/xml"
		refuses(406, c)
		c = s
		c.query = "?x=1"
		refuses(400, c)
		c = s
		c.as = &slow
		eventually(t, answerWithin, "too many requests", func() bool { status, _ := p.do(t, c); return status == 429 })
		if s.method != "POST" {
			continue
		}
		c = s
		c.media = "text/plain"
		refuses(415, c)
		c = s
		c.body, c.announces = nil, 2<<20
		refuses(413, c)
	}

	// 3. What some refuse.
	other := signing
	other.body = asJSON(asserted("D1", "two"))
	refuses(409, other)
	unknown := signing
	unknown.key, unknown.body = "unknown", asJSON(asserted("D404", "unknown"))
	refuses(422, unknown)
	refuses(422, good("/v1/batches", asJSON(wire.BatchRequest{ // a digest is not enough for a raw signature
		Signer: one.Signer, Algorithm: one.Algorithm, Form: one.Form, Role: one.Role, Consent: one.Consent,
		Items: []wire.BatchItem{{IdempotencyKey: "digest", Digest: &wire.Digest{Algorithm: "SM3", Value: make([]byte, 32)}, Document: one.Document}},
	})))
	refuses(422, good("/v1/authorizations", asJSON(wire.AuthorizationRequest{Signer: "D404", PIN: officePIN, Count: 1, Seconds: 60})))
	refuses(404, good("/v1/evidence/"+strings.Repeat("0a", 32), nil))
	refuses(404, good("/v1/certs/0123456789", nil))
	refuses(404, good("/v1/timestamp", asJSON(wire.TimestampRequest{Unit: "none", Data: []byte("报告")})))
	nowhere := tsaRoute
	nowhere.path = "/tsa/none"
	refuses(404, nowhere)
	forged := bytes.Clone(r.Response)
	forged[len(forged)-1] ^= 1 // of the signature
	refuses(422, good("/v1/stf/verify", asJSON(wire.STFVerify{Response: forged})))
	for item := range 13 {
		p.do(t, good("/v1/stf/detail", asJSON(wire.STFReadItem{Response: forged, Item: item})))
	}
	for _, path := range []string{"verify", "info", "detail"} {
		body := map[string]any{"response": []byte("no token")}
		if path == "detail" {
			body["item"] = 6
		}
		p.do(t, good("/v1/stf/"+path, asJSON(body)))
	}
	p.do(t, good("/v1/stf/create-response", asJSON(wire.STFCreateResponse{Request: []byte("no request")})))

	// 4. What is documented was seen, but for what a caller cannot bring about: faults of the appliance's own, which the API's
	// own tests make with services that fail.
	notHere := map[string]string{
		"GET /health/alive 503": "a dead one", "GET /health/ready 503": "time that is lost",
		"POST /v1/verify 422": "shared with the other routes that take bodies",
	}
	for _, operation := range []string{"create-request", "create-response", "verify", "info", "detail"} { // the five share one list of refusals
		for _, status := range []string{"404", "422"} {
			if at := "POST /v1/stf/" + operation + " " + status; at != "POST /v1/stf/verify 422" {
				notHere[at] = "another operation's, or for a token of another authority"
			}
		}
	}
	for path, item := range p.doc.Paths.Map() {
		for method, op := range item.Operations() {
			for status := range op.Responses.Map() {
				at := method + " " + path + " " + status
				if slices.Contains([]string{"default", "500", "503", "504"}, status) || notHere[at] != "" {
					continue
				}
				if !p.seen[at] {
					t.Errorf("documented, and not seen: %s", at)
				}
			}
		}
	}
	m.stop(t)
}

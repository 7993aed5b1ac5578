package api_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/google/go-cmp/cmp"
	"github.com/labstack/echo/v4"

	"yinjian/api/wire"
	"yinjian/appliance/account"
	"yinjian/appliance/evidence"
	"yinjian/appliance/problem"
	"yinjian/appliance/sign"
)

func TestEveryRouteIsInTheContract(t *testing.T) {
	t.Parallel()
	if _, err := contract(); err != nil {
		t.Fatal(err)
	}
	k := start(t)
	var served, promised []string
	for _, r := range k.server.Handler().(*echo.Echo).Routes() {
		path := r.Path
		for _, name := range []string{"id", "serial", "unit"} {
			path = strings.ReplaceAll(path, ":"+name, "{"+name+"}")
		}
		served = append(served, r.Method+" "+path)
	}
	got := k.do(call{method: "GET", path: "/openapi.json", unsigned: true})
	doc, err := openapi3.NewLoader().LoadFromData(got.body)
	if err != nil {
		t.Fatal(err)
	}
	for path, item := range doc.Paths.Map() {
		for method := range item.Operations() {
			promised = append(promised, method+" "+path)
		}
	}
	slices.Sort(served)
	slices.Sort(promised)
	if diff := cmp.Diff(promised, served); diff != "" {
		t.Errorf("contract and routes differ (-contract +routes):\n%s", diff)
	}
}

func TestSign(t *testing.T) {
	t.Parallel()
	sv := newServices()
	var asked *sign.Request
	inner := sv.sign
	sv.sign = func(ctx context.Context, app *account.Application, req *sign.Request) (*sign.Result, error) {
		if app.ID != "his" {
			t.Errorf("application = %s", app.ID)
		}
		asked = req
		return inner(ctx, app, req)
	}
	k := startWith(t, sv)
	got := k.do(call{path: "/v1/sign", body: encode(t, signBody())})
	want := wire.SignResult{
		RecordID: record, Algorithm: "SM2", Form: "cms", Signature: []byte{0x30, 0}, Certificates: [][]byte{{0x30, 1}}, Token: []byte{0x30, 2},
		GenTime: "2026-01-01T00:00:00Z", AccuracyUS: 1500, Provenance: "BDS+lan", Node: "a", Epoch: "0f", Sequence: 7,
	}
	var result wire.SignResult
	if err := json.Unmarshal(got.body, &result); err != nil || got.status != 200 {
		t.Fatalf("answer = %d %s", got.status, got.body)
	}
	if diff := cmp.Diff(want, result); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(&sign.Request{
		IdempotencyKey: "visit-1", Signer: "D1001", Algorithm: "SM2", Form: "cms", Detached: true, Content: []byte("出院小结"),
		Document: sign.Document{ID: "病历-4711", Type: "discharge-summary", MediaType: "application/pdf"}, Role: "attending",
		Consent: sign.Consent{Method: evidence.AppAsserted, Assertion: "医生点击了签名"},
	}, asked); diff != "" {
		t.Error(diff)
	}
	// A digest in place of the content, an authorisation in place of the assertion, escapes as PHP and .NET write them.
	body := signBody()
	delete(body, "content")
	body["digest"] = m{"algorithm": "SHA-256", "value": digest32}
	body["algorithm"], body["detached"] = "RSA-2048", true
	body["consent"] = m{"authorization_id": strings.Repeat("0f", 16)}
	raw := bytes.ReplaceAll(encode(t, body), []byte("application/pdf"), []byte(`application\/svg\u002Bxml`))
	if got := k.do(call{path: "/v1/sign", body: raw}); got.status != 200 {
		t.Fatalf("answer = %d %s", got.status, got.body)
	}
	if asked.Digest == nil || hexOf(asked.Digest.Value) != strings.Repeat("01", 32) || asked.Document.MediaType != "application/svg+xml" || asked.Consent.AuthorizationID == "" {
		t.Errorf("request = %+v", asked)
	}
}

func TestOtherRoutes(t *testing.T) {
	t.Parallel()
	sv := newServices()
	k := startWith(t, sv)
	var verified *sign.VerifyRequest
	sv.verify = func(_ context.Context, req *sign.VerifyRequest) (*evidence.Report, error) {
		verified = req
		return &evidence.Report{Verdict: "indeterminate"}, nil
	}
	var granted account.GrantRequest
	inner := sv.authorize
	sv.authorize = func(ctx context.Context, app *account.Application, req account.GrantRequest) (*account.Grant, error) {
		granted = req
		return inner(ctx, app, req)
	}
	for _, row := range []struct {
		call call
		want string // a part of the answer
	}{
		{call{path: "/v1/verify", body: encode(t, verifyBody())}, `"verdict":"indeterminate"`},
		{call{path: "/v1/verify", body: []byte(` {"evidence": {"format":"x","n":1e9,"deep":[[{}]]}, "document":""} `)}, `"verdict"`},
		{call{path: "/v1/authorizations", body: encode(t, authorizationBody())}, `"not_after":"2026-01-01T00:00:00Z"`},
		{call{path: "/v1/authorizations", body: encode(t, m{"signer": "D1001", "pin": "1", "count": 500, "seconds": 14400})}, `"id":"00ff"`},
		{call{method: "GET", path: "/v1/evidence/" + record}, `{"format":"yinjian-evidence/1"}`},
		{call{method: "GET", path: "/v1/certs/01ab"}, `"revoked_at":"2026-01-01T00:00:00Z","reason":"keyCompromise"`},
		{call{method: "GET", path: "/health/alive", unsigned: true}, `{"alive":true,"version":"test"}`},
		{call{method: "GET", path: "/health/ready", unsigned: true}, `{"ready":true,"reasons":[]}`},
		{call{method: "GET", path: "/health/state"}, `{"state":"operational"}`},
	} {
		if got := k.do(row.call); got.status != 200 || !strings.Contains(string(got.body), row.want) {
			t.Errorf("%s = %d %s, want %s", row.call.path, got.status, got.body, row.want)
		}
	}
	if string(verified.Evidence) != `{"format":"x","n":1e9,"deep":[[{}]]}` || verified.Document == nil {
		t.Errorf("verify was asked %+v", verified)
	}
	if diff := cmp.Diff(account.GrantRequest{Signer: "D1001", PIN: "1", Count: 500, Seconds: 14400}, granted); diff != "" {
		t.Error(diff)
	}
	if got := k.do(call{path: "/v1/authorizations", body: encode(t, put(authorizationBody(), "digest_algorithm", "SHA-256"))}); got.status != 200 || granted.DigestAlgorithm != "SHA-256" {
		t.Errorf("digests by SHA-256: %d %s, the directory was asked %+v", got.status, got.body, granted)
	}
	sv.dead, sv.unready = fmt.Errorf("disk /var/secret is gone"), []string{"时间不可信 (time untrusted)"}
	got := k.do(call{method: "GET", path: "/health/alive", unsigned: true})
	wantProblem(t, got, 503, problem.NotReady, "")
	if strings.Contains(string(got.body), "secret") {
		t.Errorf("alive shows its cause: %s", got.body)
	}
	if got := k.do(call{method: "GET", path: "/health/ready", unsigned: true}); got.status != 503 || !strings.Contains(string(got.body), "时间不可信") {
		t.Errorf("ready = %d %s", got.status, got.body)
	}
}

// at answers the place of a dotted path in a tree: "document.id", "raw.chain[0]".
func at(tree m, path string) (parent any, last string) {
	parts := strings.FieldsFunc(path, func(r rune) bool { return r == '.' || r == '[' || r == ']' })
	parent = tree
	for _, p := range parts[:len(parts)-1] {
		if list, ok := parent.([]any); ok {
			parent = list[0]
			continue
		}
		parent = parent.(m)[p]
	}
	return parent, parts[len(parts)-1]
}

func put(tree m, path string, v any) m {
	parent, last := at(tree, path)
	switch p := parent.(type) {
	case m:
		if v == absent {
			delete(p, last)
		} else {
			p[last] = v
		}
	case []any:
		p[0] = v
	}
	return tree
}

var absent = new(int)

type jsonRoute struct {
	path     string
	good     func() m
	required []string
	texts    map[string]int // longest in bytes
	bytes    []string
	objects  []string
	numbers  []string
	lists    []string
	flags    []string
}

func jsonRoutes() []jsonRoute {
	return []jsonRoute{
		{
			path: "/v1/sign", good: signBody,
			required: []string{"signer", "algorithm", "form", "content", "document.id", "document.type", "document.media_type", "role", "consent.method", "consent.assertion"},
			texts: map[string]int{"signer": 32, "algorithm": 8, "form": 3, "document.id": 128, "document.type": 64, "document.media_type": 127, "role": 64,
				"consent.method": 12, "consent.assertion": 512},
			bytes: []string{"content"}, objects: []string{"document", "consent"}, flags: []string{"detached"},
		},
		{
			path: "/v1/verify", good: verifyBody,
			required: []string{"raw.algorithm", "raw.value", "raw.certificate"},
			texts:    map[string]int{"raw.algorithm": 8},
			bytes:    []string{"raw.value", "raw.certificate", "raw.chain[0]", "raw.token", "document"},
			objects:  []string{"raw"}, lists: []string{"raw.chain"},
		},
		{
			path: "/v1/timestamp", good: timestampBody,
			required: []string{"digest.algorithm", "digest.value"},
			texts:    map[string]int{"unit": 32, "digest.algorithm": 7},
			bytes:    []string{"digest.value"}, objects: []string{"digest"},
		},
		{
			path: "/v1/authorizations", good: authorizationBody,
			required: []string{"signer", "pin", "digests"},
			texts:    map[string]int{"signer": 32, "pin": 64, "digest_algorithm": 7},
			bytes:    []string{"digests[0]"}, lists: []string{"digests"},
		},
	}
}

// TestFieldFaults leaves out, mistypes and overfills each field of each route in turn.
func TestFieldFaults(t *testing.T) {
	t.Parallel()
	sv := newServices()
	sv.sign = func(context.Context, *account.Application, *sign.Request) (*sign.Result, error) {
		t.Error("a faulty request reached the service")
		return nil, problem.New(problem.Internal, "", "")
	}
	k := startWith(t, sv)
	try := func(t *testing.T, path, field string, body []byte) {
		t.Helper()
		wantProblem(t, k.do(call{path: path, body: body}), 400, problem.InvalidRequest, field)
	}
	for _, r := range jsonRoutes() {
		wrong := func(field string, v any) {
			t.Helper()
			t.Run(fmt.Sprintf("%s/%s=%.20v", r.path, field, v), func(t *testing.T) {
				t.Helper()
				try(t, r.path, strings.TrimPrefix(field, "."), encode(t, put(r.good(), field, v)))
			})
		}
		for _, f := range r.required {
			t.Run(r.path+"/without "+f, func(t *testing.T) { try(t, r.path, f, encode(t, put(r.good(), f, absent))) })
		}
		for f, most := range r.texts {
			wrong(f, 7)
			wrong(f, nil)
			wrong(f, m{})
			wrong(f, "a\u0000b")
			wrong(f, "a\u200bb")
			wrong(f, "a\u2028b")
			wrong(f, strings.Repeat("x", most+1))
			if slices.Contains(r.required, f) {
				wrong(f, "")
			}
		}
		for _, f := range r.bytes {
			name := strings.Replace(f, "[0]", "", 1)
			if name == f {
				wrong(f, nil)
				wrong(f, []any{1, 2})
				wrong(f, "not base64")
				wrong(f, "YQ")   // not padded
				wrong(f, "YR==") // stray bits
				wrong(f, "YW\nJj")
				wrong(f, "-_-_")
			}
			if f != "document" {
				t.Run(r.path+"/"+f+" empty", func(t *testing.T) { try(t, r.path, name, encode(t, put(r.good(), f, ""))) })
			}
		}
		for _, f := range r.objects {
			wrong(f, "x")
			wrong(f, []any{})
			wrong(f, nil)
			wrong(f+".surplus", 1)
		}
		for _, f := range r.lists {
			wrong(f, "x")
			wrong(f, m{})
			wrong(f, nil)
		}
		for _, f := range r.flags {
			wrong(f, "true")
			wrong(f, 1)
			wrong(f, nil)
		}
		wrong("surplus", 1)
		good := encode(t, r.good())
		for name, body := range map[string][]byte{
			"empty": {}, "blank": []byte("  "), "null": []byte("null"), "array": []byte("[]"), "text": []byte(`"x"`),
			"trailing": append(slices.Clone(good), '1'), "two": append(slices.Clone(good), good...), "cut": good[:len(good)-1],
			"not UTF-8": bytes.Replace(good, []byte(`":`), []byte("\xff\":"), 1), "BOM": append([]byte("\xef\xbb\xbf"), good...),
			"comma": bytes.Replace(good, []byte("}"), []byte(",}"), 1)[:len(good)],
		} {
			t.Run(r.path+"/"+name, func(t *testing.T) {
				got := k.do(call{path: r.path, body: body})
				if got.status != 400 || got.problem.Code != "invalid_request" {
					t.Errorf("answer = %d %s", got.status, got.body)
				}
			})
		}
	}
}

func TestMoreFieldFaults(t *testing.T) {
	t.Parallel()
	k := start(t)
	change := func(body m, pairs ...any) m {
		for i := 0; i < len(pairs); i += 2 {
			put(body, pairs[i].(string), pairs[i+1])
		}
		return body
	}
	digest := func(alg string) m { return m{"algorithm": alg, "value": digest32} }
	many := func(n int, v any) []any { return slices.Repeat([]any{v}, n) }
	for name, row := range map[string]struct {
		path  string
		body  m
		code  problem.Code
		field string
	}{
		"lower-case algorithm":     {"/v1/sign", change(signBody(), "algorithm", "sm2"), problem.InvalidRequest, "algorithm"},
		"content and digest":       {"/v1/sign", change(signBody(), "digest", digest("SM3")), problem.InvalidRequest, "digest"},
		"raw by digest":            {"/v1/sign", change(signBody(), "form", "raw", "content", absent, "digest", digest("SM3")), problem.ContentRequired, "digest"},
		"raw attached":             {"/v1/sign", change(signBody(), "form", "raw", "detached", false), problem.InvalidRequest, "detached"},
		"attached by digest":       {"/v1/sign", change(signBody(), "detached", false, "content", absent, "digest", digest("SM3")), problem.ContentRequired, "detached"},
		"SM2 with SHA-256":         {"/v1/sign", change(signBody(), "content", absent, "digest", digest("SHA-256")), problem.InvalidRequest, "digest.algorithm"},
		"RSA with SM3":             {"/v1/sign", change(signBody(), "algorithm", "RSA-2048", "content", absent, "digest", digest("SM3")), problem.InvalidRequest, "digest.algorithm"},
		"short digest":             {"/v1/sign", change(signBody(), "content", absent, "digest", m{"algorithm": "SM3", "value": "AAAA"}), problem.InvalidRequest, "digest.value"},
		"no consent":               {"/v1/sign", change(signBody(), "consent", m{}), problem.InvalidRequest, "consent"},
		"consent absent":           {"/v1/sign", change(signBody(), "consent", absent), problem.InvalidRequest, "consent"},
		"document absent":          {"/v1/sign", change(signBody(), "document", absent), problem.InvalidRequest, "document.id"},
		"signer-pin without grant": {"/v1/sign", change(signBody(), "consent", m{"method": "signer-pin", "assertion": "x"}), problem.InvalidRequest, "consent.method"},
		"grant and method":         {"/v1/sign", change(signBody(), "consent", m{"authorization_id": strings.Repeat("0", 32), "method": "signer-pin"}), problem.InvalidRequest, "consent.method"},
		"grant and assertion":      {"/v1/sign", change(signBody(), "consent", m{"authorization_id": strings.Repeat("0", 32), "assertion": "x"}), problem.InvalidRequest, "consent.assertion"},
		"grant's form":             {"/v1/sign", change(signBody(), "consent", m{"authorization_id": "../../etc"}), problem.InvalidRequest, "consent.authorization_id"},
		"spaces around id":         {"/v1/sign", change(signBody(), "document.id", " 1"), problem.InvalidRequest, "document.id"},
		"hidden in id":             {"/v1/sign", change(signBody(), "document.id", "a\u3164b"), problem.InvalidRequest, "document.id"},
		"hidden in words":          {"/v1/sign", change(signBody(), "consent.assertion", "同意\ufe0f"), problem.InvalidRequest, "consent.assertion"},
		"odd space":                {"/v1/sign", change(signBody(), "role", "a\u00a0b"), problem.InvalidRequest, "role"},
		"reversed id":              {"/v1/sign", change(signBody(), "document.id", "a\u202eb"), problem.InvalidRequest, "document.id"},
		"nothing to verify":        {"/v1/verify", m{"document": "YWJj"}, problem.InvalidRequest, "evidence"},
		"two to verify":            {"/v1/verify", m{"cms": "MAA=", "token": "MAA="}, problem.InvalidRequest, "evidence"},
		"document and digest":      {"/v1/verify", m{"cms": "MAA=", "document": "YWJj", "digest": digest("SM3")}, problem.InvalidRequest, "digest"},
		"raw against digest":       {"/v1/verify", change(verifyBody(), "document", absent, "digest", digest("SM3")), problem.ContentRequired, "digest"},
		"empty cms":                {"/v1/verify", m{"cms": ""}, problem.InvalidRequest, "cms"},
		"evidence as text":         {"/v1/verify", m{"evidence": "e30="}, problem.InvalidRequest, "evidence"},
		"evidence null":            {"/v1/verify", m{"evidence": nil}, problem.InvalidRequest, "evidence"},
		"long raw value":           {"/v1/verify", change(verifyBody(), "raw.value", b64(make([]byte, 1025))), problem.InvalidRequest, "raw.value"},
		"long chain":               {"/v1/verify", change(verifyBody(), "raw.chain", many(9, "MAA=")), problem.InvalidRequest, "raw.chain"},
		"long certificate":         {"/v1/verify", change(verifyBody(), "raw.certificate", b64(make([]byte, 64<<10+1))), problem.InvalidRequest, "raw.certificate"},
		"bad digest to verify":     {"/v1/verify", m{"cms": "MAA=", "digest": digest("MD5")}, problem.InvalidRequest, "digest.algorithm"},
		"data and digest":          {"/v1/timestamp", change(timestampBody(), "data", "YWJj"), problem.InvalidRequest, "digest"},
		"empty data":               {"/v1/timestamp", m{"data": ""}, problem.InvalidRequest, "data"},
		"nothing to stamp":         {"/v1/timestamp", m{}, problem.InvalidRequest, "digest"},
		"unknown unit":             {"/v1/timestamp", change(timestampBody(), "unit", "sm9"), problem.NotFound, "unit"},
		"unit's form":              {"/v1/timestamp", change(timestampBody(), "unit", "../x"), problem.InvalidRequest, "unit"},
		"SHA-1":                    {"/v1/timestamp", change(timestampBody(), "digest.algorithm", "SHA-1"), problem.InvalidRequest, "digest.algorithm"},
		"digests and count":        {"/v1/authorizations", change(authorizationBody(), "count", 1), problem.InvalidRequest, "count"},
		"digests and seconds":      {"/v1/authorizations", change(authorizationBody(), "seconds", 1), problem.InvalidRequest, "seconds"},
		"digests by another":       {"/v1/authorizations", change(authorizationBody(), "digest_algorithm", "SHA-1"), problem.InvalidRequest, "digest_algorithm"},
		"algorithm of no digests":  {"/v1/authorizations", change(authorizationBody(), "digests", absent, "count", 1, "seconds", 1, "digest_algorithm", "SM3"), problem.InvalidRequest, "digest_algorithm"},
		"too many digests":         {"/v1/authorizations", change(authorizationBody(), "digests", many(501, digest32)), problem.InvalidRequest, "digests"},
		"no digests":               {"/v1/authorizations", change(authorizationBody(), "digests", []any{}), problem.InvalidRequest, "digests"},
		"short one":                {"/v1/authorizations", change(authorizationBody(), "digests", []any{digest32, "AAAA"}), problem.InvalidRequest, "digests"},
		"count without seconds":    {"/v1/authorizations", change(authorizationBody(), "digests", absent, "count", 1), problem.InvalidRequest, "seconds"},
		"seconds without count":    {"/v1/authorizations", change(authorizationBody(), "digests", absent, "seconds", 1), problem.InvalidRequest, "count"},
		"count too large":          {"/v1/authorizations", change(authorizationBody(), "digests", absent, "count", 501, "seconds", 1), problem.InvalidRequest, "count"},
		"negative seconds":         {"/v1/authorizations", change(authorizationBody(), "digests", absent, "count", 1, "seconds", -1), problem.InvalidRequest, "seconds"},
		"seconds too large":        {"/v1/authorizations", change(authorizationBody(), "digests", absent, "count", 1, "seconds", 14401), problem.InvalidRequest, "seconds"},
		"fraction":                 {"/v1/authorizations", change(authorizationBody(), "digests", absent, "count", 1.5, "seconds", 1), problem.InvalidRequest, "count"},
		"huge":                     {"/v1/authorizations", change(authorizationBody(), "digests", absent, "count", 1e300, "seconds", 1), problem.InvalidRequest, "count"},
	} {
		t.Run(name, func(t *testing.T) {
			status := map[problem.Code]int{problem.InvalidRequest: 400, problem.ContentRequired: 422, problem.NotFound: 404}[row.code]
			wantProblem(t, k.do(call{path: row.path, body: encode(t, row.body)}), status, row.code, row.field)
		})
	}
	for name, row := range map[string]struct{ body, field string }{
		"twice":                {`{"signer":"D1","signer":"D2"}`, "signer"},
		"twice by escape":      {`{"signer":"D1","\u0073igner":"D2"}`, "signer"},
		"other case":           {`{"Signer":"D1"}`, "Signer"},
		"lone surrogate":       {`{"signer":"\ud800"}`, "signer"},
		"reversed surrogates":  {`{"signer":"\udc00\ud800"}`, "signer"},
		"replacement":          {`{"signer":"\ufffd"}`, "signer"},
		"deep":                 {`{"document":` + strings.Repeat(`{"id":`, 20), "document.id"},
		"escaped line break":   {`{"content":"YW\nJj"}`, "content"},
		"leading zero":         {`{"detached":01}`, "detached"},
		"comment":              {`{/**/"signer":"D1"}`, ""},
		"single quotes":        {`{'signer':'D1'}`, ""},
		"raw control":          {"{\"signer\":\"a\tb\"}", "signer"},
		"name not shown":       {`{"<script> ":1}`, "?"},
		"unfinished escape":    {`{"signer":"\`, "signer"},
		"unfinished \\u":       {`{"signer":"\u12`, "signer"},
		"signed hex":           {`{"signer":"\u+123"}`, "signer"},
		"literal's beginning":  {`{"detached":tru}`, "detached"},
		"literal's other case": {`{"detached":True}`, "detached"},
	} {
		t.Run(name, func(t *testing.T) {
			wantProblem(t, k.do(call{path: "/v1/sign", body: []byte(row.body)}), 400, problem.InvalidRequest, row.field)
		})
	}
	for name, row := range map[string]struct{ body, field string }{
		"bundle repeats":  {`{"evidence":{"a":1,"b":{"c":1,"c":2}}}`, "evidence.b.c"},
		"bundle too deep": {`{"evidence":` + strings.Repeat(`[`, 17), "evidence"},
		"bundle deep":     {`{"evidence":{"a":` + strings.Repeat(`[`, 20) + strings.Repeat(`]`, 20) + `}}`, "evidence.a"},
		"bundle broad":    {`{"evidence":{"a":[` + strings.Repeat("1,", 10000) + `1]}}`, "evidence.a"},
		"bundle number":   {`{"evidence":{"a":1.}}`, "evidence.a"},
		"bundle number 2": {`{"evidence":{"a":-}}`, "evidence.a"},
		"bundle exponent": {`{"evidence":{"a":1e}}`, "evidence.a"},
		"bundle literal":  {`{"evidence":{"a":nil}}`, "evidence.a"},
	} {
		t.Run(name, func(t *testing.T) {
			wantProblem(t, k.do(call{path: "/v1/verify", body: []byte(row.body)}), 400, problem.InvalidRequest, row.field)
		})
	}
	t.Run("broad object", func(t *testing.T) {
		var b strings.Builder
		b.WriteString(`{"evidence":{"x":0`)
		for i := range 1000 {
			fmt.Fprintf(&b, `,"k%d":0`, i)
		}
		b.WriteString(`}}`)
		wantProblem(t, k.do(call{path: "/v1/verify", body: []byte(b.String())}), 400, problem.InvalidRequest, "evidence")
	})
}

func TestHeadersAndPaths(t *testing.T) {
	t.Parallel()
	k := start(t)
	body := encode(t, signBody())
	header := func(name, value string) call {
		return call{path: "/v1/sign", body: body, header: map[string]string{name: value}}
	}
	for name, row := range map[string]struct {
		call   call
		status int
		code   problem.Code
		field  string
	}{
		"no idempotency key":      {header("Idempotency-Key", ""), 400, problem.InvalidRequest, "header.Idempotency-Key"},
		"long idempotency key":    {header("Idempotency-Key", strings.Repeat("k", 129)), 400, problem.InvalidRequest, "header.Idempotency-Key"},
		"idempotency key's space": {header("Idempotency-Key", "a b"), 400, problem.InvalidRequest, "header.Idempotency-Key"},
		"idempotency key twice": {call{path: "/v1/sign", body: body, tamper: func(r *http.Request) {
			r.Header["Idempotency-Key"] = []string{"a", "b"}
		}}, 400, problem.InvalidRequest, "header.Idempotency-Key"},
		"no content type":         {header("Content-Type", ""), 415, "unsupported_media_type", ""},
		"form":                    {header("Content-Type", "application/x-www-form-urlencoded"), 415, "unsupported_media_type", ""},
		"latin1":                  {header("Content-Type", "application/json; charset=latin1"), 415, "unsupported_media_type", ""},
		"content type parameters": {header("Content-Type", "application/json; profile=x"), 415, "unsupported_media_type", ""},
		"utf-8":                   {header("Content-Type", "Application/JSON; charset=UTF-8"), 200, "", ""},
		"gzip":                    {header("Content-Encoding", "gzip"), 415, "unsupported_media_type", ""},
		"XML wanted":              {header("Accept", "application/xml"), 406, "not_acceptable", ""},
		"JSON not wanted":         {header("Accept", "application/json;q=0, */*"), 406, "not_acceptable", ""},
		"anything wanted":         {header("Accept", "text/html, */*;q=0.8"), 200, "", ""},
		"application wanted":      {header("Accept", "application/*"), 200, "", ""},
		"no such route":           {call{method: "GET", path: "/v2/sign"}, 404, problem.NotFound, ""},
		"root":                    {call{method: "GET", path: "/", unsigned: true}, 404, problem.NotFound, ""},
		"trailing slash":          {call{path: "/v1/sign/", body: body}, 404, problem.NotFound, ""},
		"GET sign":                {call{method: "GET", path: "/v1/sign"}, 405, "method_not_allowed", ""},
		"DELETE evidence":         {call{method: "DELETE", path: "/v1/evidence/" + record}, 405, "method_not_allowed", ""},
		"evidence id":             {call{method: "GET", path: "/v1/evidence/" + strings.ToUpper(record)}, 400, problem.InvalidRequest, "path.id"},
		"evidence path":           {call{method: "GET", path: "/v1/evidence/..%2F..%2Fetc"}, 400, problem.InvalidRequest, "path.id"},
		"serial":                  {call{method: "GET", path: "/v1/certs/xyz"}, 400, problem.InvalidRequest, "path.serial"},
		"long serial":             {call{method: "GET", path: "/v1/certs/" + strings.Repeat("0", 41)}, 400, problem.InvalidRequest, "path.serial"},
		"unknown serial":          {call{method: "GET", path: "/v1/certs/02"}, 404, problem.NotFound, "path.serial"},
		"query":                   {call{method: "GET", path: "/v1/certs/01ab?x=1"}, 400, problem.InvalidRequest, "query"},
		"body on GET":             {call{method: "GET", path: "/v1/certs/01ab", body: []byte("x")}, 413, problem.TooLarge, ""},
		"stopped":                 {call{path: "/v1/sign", body: body, app: "stopped"}, 403, problem.ApplicationStopped, ""},
		"no right to sign":        {call{path: "/v1/sign", body: body, app: "noright"}, 403, problem.Forbidden, ""},
		"no right to grants":      {call{path: "/v1/authorizations", body: encode(t, authorizationBody()), app: "noright"}, 403, problem.Forbidden, ""},
		"no right to verify":      {call{path: "/v1/verify", body: encode(t, verifyBody()), app: "emr"}, 403, problem.Forbidden, ""},
		"no right to stamp":       {call{path: "/v1/timestamp", body: encode(t, timestampBody()), app: "emr"}, 403, problem.Forbidden, ""},
		"no right to tsa": {call{path: "/tsa/sm2", body: []byte{0x30, 0}, app: "emr",
			header: map[string]string{"Content-Type": "application/timestamp-query"}}, 403, problem.Forbidden, ""},
	} {
		t.Run(name, func(t *testing.T) {
			got := k.do(row.call)
			if row.status != 200 {
				wantProblem(t, got, row.status, row.code, row.field)
			} else if got.status != 200 {
				t.Errorf("answer = %d %s", got.status, got.body)
			}
			if row.status == 405 && got.header.Get("Allow") == "" {
				t.Error("405 without Allow")
			}
			if len(got.header.Get("X-Request-ID")) != 32 || got.header.Get("Cache-Control") != "no-store" {
				t.Errorf("headers = %v", got.header)
			}
		})
	}
	for _, method := range []string{"OPTIONS", "TRACE", "PUT", "PATCH", "PROPFIND", "HEAD"} {
		if got := k.do(call{method: method, path: "/v1/sign"}); got.status == 200 {
			t.Errorf("%s = 200", method)
		}
	}
	// Our own id, not one that is handed in.
	got := k.do(call{method: "GET", path: "/health/alive", unsigned: true, header: map[string]string{"X-Request-ID": "forged"}})
	if got.header.Get("X-Request-ID") == "forged" {
		t.Error("a foreign request id was taken")
	}
}

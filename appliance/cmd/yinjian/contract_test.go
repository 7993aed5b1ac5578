package main_test

import (
	"bytes"
	"crypto/sha256"
	"crypto/tls"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/emmansun/gmsm/sm3"

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance/evidence"
	"yinjian/appliance/pki"
	"yinjian/dbdriver/dbtest"
)

// An office is where an application calls: an appliance, and a signer of it or of the other campus. Both applications were
// registered at the one or the other, too.
type office struct {
	*machine
	node     string
	his, emr client.Config  // emr may not stamp, and needs the signer's PIN
	signer   string         // with PIN and keys of both algorithms
	noPIN    string         // a signer without one, for whom the application's word is enough
	roots    string         // PEM of every CA there is
	trust    evidence.Trust // the same, with this appliance's log key
}

// officePIN is that of the signers.
const officePIN = "482913"

func (o *office) client(t *testing.T, cfg client.Config) *client.Client {
	t.Helper()
	c, err := client.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// at is the application's credential, used here.
func (m *machine) at(t *testing.T, cfg client.Config) client.Config {
	t.Helper()
	cfg.BaseURL, cfg.RootCAs = m.ends.API, roots(t, m.ends.TLSCA)
	return cfg
}

// postAs sends a body as it is, authenticated, and answers status and body.
func postAs(t *testing.T, h *http.Client, cfg client.Config, path, idempotencyKey, media string, body []byte) (int, []byte) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, cfg.BaseURL+path, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	now := cfg.Clock()
	a := wire.Authorization{App: cfg.AppID, Time: strconv.FormatInt(now.UnixMilli(), 10), Nonce: fmt.Sprintf("as-%020d", time.Now().UnixNano())}
	a.MAC = wire.MAC(cfg.Key, wire.Signable{Method: r.Method, Path: path, Host: r.Host, Body: body}, a.App, a.Time, a.Nonce)
	r.Header.Set("Content-Type", media)
	r.Header.Set("Authorization", a.String())
	if idempotencyKey != "" {
		r.Header.Set("Idempotency-Key", idempotencyKey)
	}
	resp, err := h.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, b
}

// contract is what an application may count on, wherever it calls. Rows run one after the other.
var contract = []struct {
	name string
	try  func(o *office, t *testing.T)
}{
	{"signatures by PIN", (*office).signatures},
	{"one PIN for several documents", (*office).batch},
	{"verification", (*office).verification},
	{"timestamps", (*office).timestamps},
	{"GM/T 0033", (*office).stfOperations},
	{"evidence and certificates", (*office).records},
	{"repetitions", (*office).repetitions},
	{"bad input", (*office).badInput},
	{"refusals", (*office).refusals},
	{"state and contract", (*office).describes},
}

// byPIN has the signer consent to documents, with an algorithm's digests.
func (o *office) byPIN(t *testing.T, c *client.Client, algorithm string, keys ...string) *wire.Grant {
	t.Helper()
	q := &wire.AuthorizationRequest{Signer: o.signer, PIN: officePIN, DigestAlgorithm: digestOf(algorithm, nil).Algorithm}
	for _, key := range keys {
		q.Digests = append(q.Digests, digestOf(algorithm, documentOf(key)).Value)
	}
	g, err := c.Authorize(t.Context(), q)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

func digestOf(algorithm string, document []byte) *wire.Digest {
	if algorithm == "SM2" {
		sum := sm3.Sum(document)
		return &wire.Digest{Algorithm: "SM3", Value: sum[:]}
	}
	sum := sha256.Sum256(document)
	return &wire.Digest{Algorithm: "SHA-256", Value: sum[:]}
}

// judged wants the record of a signature to be valid for whoever has the CAs and the log's key alone.
func (o *office) judged(t *testing.T, c *client.Client, key string, r *wire.SignResult) {
	t.Helper()
	b, err := c.Evidence(t.Context(), r.RecordID)
	if err != nil {
		t.Fatal(err)
	}
	bundle, err := evidence.Parse(b)
	if err != nil {
		t.Fatal(err)
	}
	if report := evidence.Verify(bundle, o.trust, evidence.Input{Document: documentOf(key)}); report.Verdict != pki.Valid {
		t.Errorf("%s: %s %s: %+v", key, report.Verdict, report.Summary, report.Checks)
	}
}

func (o *office) signatures(t *testing.T) {
	his := o.client(t, o.his)
	no := false
	for name, change := range map[string]func(q *wire.SignRequest){
		"raw":          func(q *wire.SignRequest) {},
		"cms":          func(q *wire.SignRequest) { q.Form = "cms" },
		"cms attached": func(q *wire.SignRequest) { q.Form, q.Detached = "cms", &no },
		"cms digest":   func(q *wire.SignRequest) { q.Form, q.Digest, q.Content = "cms", digestOf(q.Algorithm, q.Content), nil },
	} {
		for _, algorithm := range []string{"SM2", "RSA-2048"} {
			key := "form-" + strings.ReplaceAll(name, " ", "-") + "-" + algorithm
			q := asserted(o.signer, key)
			q.Algorithm = algorithm
			change(q)
			q.Consent = wire.Consent{AuthorizationID: o.byPIN(t, his, algorithm, key).ID}
			r, err := his.Sign(t.Context(), key, q)
			if err != nil {
				t.Fatalf("%s: %v", key, err)
			}
			if r.Node != o.node || len(r.Token) == 0 || r.Replayed || r.Algorithm != algorithm || r.Form != q.Form {
				t.Errorf("%s: %+v", key, r)
			}
			o.judged(t, his, key, r)
			o.openssl(t, key, q, r)
		}
	}
}

// openssl has it verify what it knows the form of: values, and CMS of RSA.
func (o *office) openssl(t *testing.T, key string, q *wire.SignRequest, r *wire.SignResult) {
	t.Helper()
	dir := tempDir(t)
	at := func(name string, data []byte) string {
		name = filepath.Join(dir, name)
		if err := os.WriteFile(name, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return name
	}
	document, value := at("document", documentOf(key)), at("value", r.Signature)
	cert := at("cert.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: r.Certificates[0]}))
	var args []string
	switch {
	case q.Form == "raw":
		o := command(t, nil, "openssl", "x509", "-in", cert, "-noout", "-pubkey")
		args = []string{"dgst", "-verify", at("public.pem", []byte(o.stdout)), "-signature", value}
		if q.Algorithm == "SM2" {
			args = append(args, "-sm3", "-sigopt", "distid:1234567812345678", document)
		} else {
			args = append(args, "-sha256", document)
		}
	case q.Algorithm != "SM2":
		args = []string{"cms", "-verify", "-binary", "-inform", "DER", "-in", value, "-CAfile", at("roots.pem", []byte(o.roots)), "-purpose", "any", "-out", filepath.Join(dir, "out")}
		if q.Detached == nil {
			args = append(args, "-content", document)
		}
	default:
		return
	}
	if o := command(t, nil, append([]string{"openssl"}, args...)...); o.code != 0 {
		t.Errorf("%s: openssl %v: %v", key, args, o)
	}
}

func (o *office) batch(t *testing.T) {
	his := o.client(t, o.his)
	keys := []string{"batch-0", "batch-1", "batch-2"}
	g := o.byPIN(t, his, "SM2", keys...)
	for _, key := range append(slices.Clone(keys), "another") {
		q := asserted(o.signer, key)
		q.Consent = wire.Consent{AuthorizationID: g.ID}
		r, err := his.Sign(t.Context(), key, q)
		switch {
		case key == "another":
			if !client.Is(err, "authorization_spent") {
				wantCode(t, err, "authorization_invalid")
			}
		case err != nil:
			t.Fatalf("%s: %v", key, err)
		default:
			o.judged(t, his, key, r)
		}
	}
	// By number and time, whatever the documents.
	many, err := his.Authorize(t.Context(), &wire.AuthorizationRequest{Signer: o.signer, PIN: officePIN, Count: 2, Seconds: 600})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		q := asserted(o.signer, fmt.Sprint("many-", i))
		q.Consent = wire.Consent{AuthorizationID: many.ID}
		_, err := his.Sign(t.Context(), fmt.Sprint("many-", i), q)
		if i < 2 && err != nil {
			t.Errorf("use %d: %v", i, err)
		} else if i == 2 {
			wantCode(t, err, "authorization_spent")
		}
	}
}

// verdict is what POST /v1/verify says.
func verdict(t *testing.T, c *client.Client, q *wire.VerifyRequest) string {
	t.Helper()
	b, err := c.Verify(t.Context(), q)
	var out struct{ Verdict string }
	if err == nil {
		err = json.Unmarshal(b, &out)
	}
	if err != nil {
		t.Fatal(err)
	}
	return out.Verdict
}

func (o *office) verification(t *testing.T) {
	his := o.client(t, o.his)
	raw := asserted(o.noPIN, "to-verify")
	r, err := his.Sign(t.Context(), "to-verify", raw)
	if err != nil {
		t.Fatal(err)
	}
	cms := asserted(o.noPIN, "to-verify-cms")
	cms.Form = "cms"
	rc, err := his.Sign(t.Context(), "to-verify-cms", cms)
	if err != nil {
		t.Fatal(err)
	}
	bundle, err := his.Evidence(t.Context(), r.RecordID)
	if err != nil {
		t.Fatal(err)
	}
	_, err = his.Verify(t.Context(), &wire.VerifyRequest{Evidence: bundle, Digest: digestOf("SM2", raw.Content)})
	wantCode(t, err, "content_required")
	value := &wire.RawSignature{Algorithm: "SM2", Value: r.Signature, Certificate: r.Certificates[0], Chain: r.Certificates[1:], Token: r.Token}
	for name, row := range map[string]struct {
		q    wire.VerifyRequest
		want string // "": anything but invalid
	}{
		"evidence":                  {wire.VerifyRequest{Evidence: bundle, Document: raw.Content}, "valid"},
		"evidence, another's":       {wire.VerifyRequest{Evidence: bundle, Document: cms.Content}, "invalid"},
		"CMS":                       {wire.VerifyRequest{CMS: rc.Signature, Document: cms.Content}, ""},
		"CMS, another's":            {wire.VerifyRequest{CMS: rc.Signature, Document: raw.Content}, "invalid"},
		"value":                     {wire.VerifyRequest{Raw: value, Document: raw.Content}, ""},
		"value, another's":          {wire.VerifyRequest{Raw: value, Document: cms.Content}, "invalid"},
		"token of a signature":      {wire.VerifyRequest{Token: r.Token, Document: r.Signature}, ""},
		"token of another document": {wire.VerifyRequest{Token: r.Token, Document: raw.Content}, "invalid"},
	} {
		got := verdict(t, his, &row.q)
		if row.want != "" && got != row.want || row.want == "" && got == "invalid" {
			t.Errorf("%s: %s", name, got)
		}
	}
}

func (o *office) timestamps(t *testing.T) {
	his := o.client(t, o.his)
	dir := tempDir(t)
	document, query, reply := filepath.Join(dir, "document"), filepath.Join(dir, "query"), filepath.Join(dir, "reply")
	if err := os.WriteFile(document, []byte("报告"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, unit := range []string{"sm2", "rsa"} {
		for name, q := range map[string]*wire.TimestampRequest{
			"data": {Unit: unit, Data: []byte("报告")}, "digest": {Unit: unit, Digest: digestOf("RSA-2048", []byte("报告"))},
		} {
			ts, err := his.Timestamp(t.Context(), q)
			if err != nil {
				t.Fatalf("%s, %s: %v", unit, name, err)
			}
			if v := verdict(t, his, &wire.VerifyRequest{Token: ts.Token, Document: []byte("报告")}); v == "invalid" || ts.Unit != unit {
				t.Errorf("%s, %s: %s, %+v", unit, name, v, ts)
			}
		}
		if o := command(t, nil, "openssl", "ts", "-query", "-data", document, "-sha256", "-cert", "-out", query); o.code != 0 {
			t.Fatal(o)
		}
		b, err := os.ReadFile(query)
		if err == nil {
			b, err = his.Stamp(t.Context(), unit, b)
		}
		if err == nil {
			err = os.WriteFile(reply, b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		if unit == "rsa" { // OpenSSL does not know the other's CMS
			if o := command(t, nil, "openssl", "ts", "-verify", "-queryfile", query, "-in", reply, "-CAfile", filepath.Join(o.dir, "ca-rsa.pem")); o.code != 0 {
				t.Error(o)
			}
		}
	}
	_, err := his.Stamp(t.Context(), "none", []byte{0x30, 0})
	wantCode(t, err, "not_found")
}

func (o *office) stfOperations(t *testing.T) {
	h := o.stranger(t, true)
	do := func(operation string, in, out any) { t.Helper(); stf(t, h, o.his, operation, in, out) }
	whole := 0
	var q wire.STFRequest
	var r wire.STFResponse
	var valid wire.STFValidity
	var info wire.STFInfo
	var detail wire.STFDetail
	do("create-request", wire.STFCreateRequest{Data: []byte("报告"), ReqType: &whole}, &q)
	do("create-response", wire.STFCreateResponse{Request: q.Request}, &r)
	do("verify", wire.STFVerify{Response: r.Response}, &valid)
	do("info", wire.STFRead{Response: r.Response}, &info)
	do("detail", wire.STFReadItem{Response: r.Response, Item: 6}, &detail)
	if valid.Verdict == "" || info.Issuer == "" || info.Time == "" || detail.Text == "" {
		t.Errorf("%+v, %+v, %+v", valid, info, detail)
	}
	status, b := postAs(t, h, o.his, "/v1/stf/create-response", "", "application/json", []byte(`{"request":"MAA="}`))
	var p wire.Problem
	if err := json.Unmarshal(b, &p); err != nil || status == http.StatusOK || p.STF == "" {
		t.Errorf("a request that is none: %d %s", status, b)
	}
}

func (o *office) records(t *testing.T) {
	his, emr := o.client(t, o.his), o.client(t, o.emr)
	r, err := his.Sign(t.Context(), "own", asserted(o.noPIN, "own"))
	if err != nil {
		t.Fatal(err)
	}
	o.judged(t, his, "own", r)
	_, err = emr.Evidence(t.Context(), r.RecordID)
	wantCode(t, err, "not_found") // another application's
	_, err = his.Evidence(t.Context(), strings.Repeat("0", 64))
	wantCode(t, err, "not_found")
	cert, err := pki.ParseCertificate(r.Certificates[0])
	if err != nil {
		t.Fatal(err)
	}
	status, err := his.Certificate(t.Context(), pki.SerialHex(cert.SerialNumber))
	if err != nil || status.Status != "good" || !bytes.Equal(status.Certificate, cert.Raw) || !strings.Contains(status.Owner, o.noPIN) {
		t.Errorf("%+v, %v", status, err)
	}
	_, err = his.Certificate(t.Context(), "0123456789abcdef")
	wantCode(t, err, "not_found")
}

func (o *office) repetitions(t *testing.T) {
	his := o.client(t, o.his)
	for _, q := range []*wire.SignRequest{asserted(o.noPIN, "again"), asserted(o.signer, "again-by-PIN")} {
		key := q.Document.ID
		if key == "again-by-PIN" {
			q.Consent = wire.Consent{AuthorizationID: o.byPIN(t, his, "SM2", key).ID}
		}
		first, err := his.Sign(t.Context(), key, q)
		if err != nil {
			t.Fatal(err)
		}
		for range 2 { // also when what was consented to is spent
			again, err := his.Sign(t.Context(), key, q)
			if err != nil || !again.Replayed || again.RecordID != first.RecordID || !bytes.Equal(again.Signature, first.Signature) || !bytes.Equal(again.Token, first.Token) || again.Sequence != first.Sequence {
				t.Errorf("%s got %+v, %v", key, again, err)
			}
		}
		other := asserted(q.Signer, "other")
		_, err = his.Sign(t.Context(), key, other)
		wantCode(t, err, "idempotency_conflict")
	}
}

func (o *office) badInput(t *testing.T) {
	h := o.stranger(t, true)
	good, err := json.Marshal(asserted(o.signer, "bad"))
	if err != nil {
		t.Fatal(err)
	}
	with := func(old, new string) string {
		s := strings.Replace(string(good), old, new, 1)
		if s == string(good) {
			t.Fatalf("%s is not in %s", old, good)
		}
		return s
	}
	for name, row := range map[string]struct {
		path, key, media, body string
		status                 int
		code, field            string
	}{
		"no key":             {"/v1/sign", "", "", string(good), 400, "invalid_request", "header.Idempotency-Key"},
		"a key with spaces":  {"/v1/sign", "a b", "", string(good), 400, "invalid_request", "header.Idempotency-Key"},
		"nothing":            {"/v1/sign", "bad", "", ``, 400, "invalid_request", ""},
		"no object":          {"/v1/sign", "bad", "", `[]`, 400, "invalid_request", ""},
		"cut off":            {"/v1/sign", "bad", "", string(good[:len(good)/2]), 400, "invalid_request", ""},
		"trailing":           {"/v1/sign", "bad", "", string(good) + `{}`, 400, "invalid_request", ""},
		"unknown field":      {"/v1/sign", "bad", "", with(`"signer"`, `"sinner":"x","signer"`), 400, "invalid_request", "sinner"},
		"twice a field":      {"/v1/sign", "bad", "", with(`"signer"`, `"role":"x","signer"`), 400, "invalid_request", "role"},
		"null":               {"/v1/sign", "bad", "", with(`"role":"主治医师"`, `"role":null`), 400, "invalid_request", "role"},
		"algorithm":          {"/v1/sign", "bad", "", with(`"SM2"`, `"SM3"`), 400, "invalid_request", "algorithm"},
		"form":               {"/v1/sign", "bad", "", with(`"raw"`, `"pdf"`), 400, "invalid_request", "form"},
		"signer":             {"/v1/sign", "bad", "", with(`"`+o.signer+`"`, `"a b"`), 400, "invalid_request", "signer"},
		"no UTF-8":           {"/v1/sign", "bad", "", with(`主治医师`, "\xff\xfe"), 400, "invalid_request", ""},
		"another media type": {"/v1/sign", "bad", "text/plain", string(good), 415, "unsupported_media_type", ""},
		"PIN of 0 digits":    {"/v1/authorizations", "", "", `{"signer":"` + o.signer + `","pin":"","count":1,"seconds":1}`, 400, "invalid_request", "pin"},
		"no stamp of":        {"/v1/timestamp", "", "", `{}`, 400, "invalid_request", ""},
		"nothing to verify":  {"/v1/verify", "", "", `{}`, 400, "invalid_request", ""},
		"not there":          {"/v1/nothing", "", "", `{}`, 404, "not_found", ""},
	} {
		media := row.media
		if media == "" {
			media = "application/json"
		}
		status, b := postAs(t, h, o.his, row.path, row.key, media, []byte(row.body))
		var p wire.Problem
		if err := json.Unmarshal(b, &p); err != nil || status != row.status || p.Status != status || p.Code != row.code || row.field != "" && p.Field != row.field || p.Next == "" || p.Retry == "" {
			t.Errorf("%s: %d %s, want %d %s %s", name, status, b, row.status, row.code, row.field)
		}
	}
}

func (o *office) refusals(t *testing.T) {
	his, emr := o.client(t, o.his), o.client(t, o.emr)
	sign := func(c *client.Client, signer, key string, consent wire.Consent) error {
		q := asserted(signer, key)
		if consent != (wire.Consent{}) {
			q.Consent = consent
		}
		_, err := c.Sign(t.Context(), key, q)
		return err
	}
	// 1. Consent.
	_, err := his.Authorize(t.Context(), &wire.AuthorizationRequest{Signer: o.signer, PIN: "000000", Count: 1, Seconds: 60})
	wantCode(t, err, "pin_wrong")
	var p *client.Problem
	if errors.As(err, &p) && (p.TriesLeft == nil || *p.TriesLeft != 4) {
		t.Errorf("tries left: %v", p.TriesLeft)
	}
	g := o.byPIN(t, his, "SM2", "consented") // and the count is clear again
	wantCode(t, sign(his, o.signer, "not-consented", wire.Consent{AuthorizationID: g.ID}), "authorization_invalid")
	wantCode(t, sign(emr, o.signer, "consented", wire.Consent{AuthorizationID: g.ID}), "authorization_invalid") // another application's
	wantCode(t, sign(his, o.signer, "consented", wire.Consent{AuthorizationID: strings.Repeat("0f", 16)}), "authorization_invalid")
	if err := sign(his, o.signer, "consented", wire.Consent{AuthorizationID: g.ID}); err != nil {
		t.Error(err)
	}
	wantCode(t, sign(his, o.signer, "consented-again", wire.Consent{AuthorizationID: g.ID}), "authorization_spent")
	wantCode(t, sign(emr, o.signer, "asserted", wire.Consent{}), "consent_insufficient")
	wantCode(t, sign(his, "nobody", "nobody", wire.Consent{}), "signer_unknown")
	_, err = emr.Timestamp(t.Context(), &wire.TimestampRequest{Data: []byte("x")})
	wantCode(t, err, "forbidden")
	// 2. Who calls, and when.
	wrong := o.his
	wrong.Key = bytes.Repeat([]byte{1}, len(wrong.Key))
	wantCode(t, sign(o.client(t, wrong), o.signer, "wrong-key", wire.Consent{}), "unauthenticated")
	nobody := o.his
	nobody.AppID = "nobody"
	wantCode(t, sign(o.client(t, nobody), o.signer, "no-application", wire.Consent{}), "unauthenticated")
	late := o.his
	late.Clock = func() time.Time { return time.Now().Add(-10 * time.Minute) }
	late.TLS = &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: late.RootCAs} // its certificates are judged at the right time
	wantCode(t, sign(o.client(t, late), o.signer, "late", wire.Consent{}), "clock_skew")
	// 3. A request that was heard.
	send := handmadeAs(t, o.stranger(t, true), o.his, "heard", asserted(o.noPIN, "heard"))
	if resp, body := send(t); resp.StatusCode != http.StatusOK {
		t.Fatalf("%s %s", resp.Status, body)
	}
	if resp, body := send(t); resp.StatusCode != http.StatusUnauthorized || !strings.Contains(body, `"replayed_request"`) {
		t.Errorf("%s %s", resp.Status, body)
	}
}

func (o *office) describes(t *testing.T) {
	his := o.client(t, o.his)
	if err := his.Alive(t.Context()); err != nil {
		t.Error(err)
	}
	if r, err := his.Ready(t.Context()); err != nil || !r.Ready {
		t.Errorf("%+v, %v", r, err)
	}
	b, err := his.State(t.Context())
	if err != nil || !bytes.Contains(b, []byte(`"state"`)) {
		t.Errorf("%s, %v", b, err)
	}
	resp, err := o.stranger(t, true).Get(o.ends.API + "/openapi.json")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	got, err := io.ReadAll(resp.Body)
	if want := readFile(t, "../../../api/openapi.json"); err != nil || string(got) != want {
		t.Errorf("openapi.json is another one: %d bytes, want %d, %v", len(got), len(want), err)
	}
}

// newOffice is the machine as the applications see it that another, or it itself, registered. The names of the applications end as
// given: two offices have their own, or the one's keys would be repetitions of the other's.
func newOffice(t *testing.T, m, home *machine, node, signers, applications string, all ...*machine) *office {
	t.Helper()
	o := &office{machine: m, node: node, signer: signers + "1", noPIN: signers + "2", his: m.at(t, home.clientConfig(t, "his"+applications)), emr: m.at(t, home.clientConfig(t, "emr"+applications))}
	for _, c := range all {
		trust := publicTrust(t, c.dir)
		o.trust.Anchors = append(o.trust.Anchors, trust.Anchors...)
		if c == m {
			o.trust.LogKeys = trust.LogKeys
		}
		for _, ca := range []string{"ca.pem", "ca-rsa.pem"} {
			o.roots += readFile(t, filepath.Join(c.dir, ca))
		}
	}
	return o
}

func (m *machine) registerOffice(t *testing.T, applications string) {
	t.Helper()
	m.register(t, "his"+applications, "--consent", "signer-pin,app-asserted")
	m.register(t, "emr"+applications, "--consent", "signer-pin", "--rights", "sign,verify")
}

// TestContract runs the contract's suite against an appliance alone, and against each of two campuses, each time with
// the other campus's signer and with applications that were registered at the first. Then a request is sent again at the
// other campus: both records are valid, and the central database says of the later one what it is a second of.
func TestContract(t *testing.T) {
	t.Parallel()
	need(t, "openssl")
	t.Run("alone", func(t *testing.T) {
		t.Parallel()
		m := serve(t, initAppliance(t, startTimeServer(t)))
		m.trusted(t)
		m.registerOffice(t, "")
		m.enrol(t, "D1", officePIN)
		m.enrol(t, "D2", "")
		o := newOffice(t, m, m, "benbu-1", "D", "", m)
		for _, row := range contract {
			t.Run(row.name, func(t *testing.T) { row.try(o, t) })
		}
		m.mustBeClean(t)
	})
	t.Run("campuses", func(t *testing.T) {
		t.Parallel()
		l := newLand(t)
		pg := dbtest.StartPostgres(t)
		name := pg.Fresh(t)
		a, b := newCampus(t, l, 0, pg.DSN(name)), newCampus(t, l, 1, pg.DSN(name))
		a.serve(t)
		b.serve(t)
		oneCeremony(t, a, b)
		a.registerOffice(t, "-0")
		a.registerOffice(t, "-1")
		for i, c := range []*campus{a, b} {
			c.enrol(t, []string{"A1", "B1"}[i], officePIN)
			c.enrol(t, []string{"A2", "B2"}[i], "")
		}
		pairUp(t, a.machine, b.machine)
		offices := []*office{
			newOffice(t, a.machine, a.machine, "benbu-1", "B", "-0", a.machine, b.machine), newOffice(t, b.machine, a.machine, "binhai-1", "A", "-1", a.machine, b.machine),
		}
		for i, o := range offices {
			c := o.client(t, o.his)
			eventually(t, time.Minute, "the other campus's signers are served", func() bool {
				_, err := c.Authorize(t.Context(), &wire.AuthorizationRequest{Signer: o.signer, PIN: officePIN, Count: 1, Seconds: 1})
				return err == nil && codeOf(t, c, o.noPIN, "served") == ""
			})
			t.Run(campusNames[i], func(t *testing.T) {
				for _, row := range contract {
					t.Run(row.name, func(t *testing.T) { row.try(o, t) })
				}
			})
		}
		t.Run("again at the other campus", func(t *testing.T) { againElsewhere(t, offices, pg, name) })
		for _, c := range []*campus{a, b} {
			c.mustBeClean(t)
		}
	})
}

// againElsewhere sends one request at both campuses.
func againElsewhere(t *testing.T, offices []*office, pg *dbtest.Cluster, name string) {
	var results [2]*wire.SignResult
	q := asserted("A2", "elsewhere")
	for i, o := range offices {
		c := o.client(t, o.at(t, offices[0].his))
		r, err := c.Sign(t.Context(), "elsewhere", q)
		if err != nil {
			t.Fatal(err)
		}
		if r.Replayed || r.Node != o.node {
			t.Errorf("%+v", r)
		}
		o.judged(t, c, "elsewhere", r)
		again, err := c.Sign(t.Context(), "elsewhere", q)
		if err != nil || !again.Replayed || again.Node != o.node || !bytes.Equal(again.Signature, r.Signature) {
			t.Errorf("%+v, %v", again, err)
		}
		results[i] = r
	}
	if results[0].RecordID != results[1].RecordID || bytes.Equal(results[0].Signature, results[1].Signature) {
		t.Errorf("%+v and %+v", results[0], results[1])
	}
	db := pg.Open(t, name)
	defer db.Close()
	var later, earlier string
	eventually(t, time.Minute, "the later one is marked", func() bool {
		err := db.QueryRowContext(t.Context(), `SELECT node_id || ' ' || epoch_id || ' ' || seq_no, of_node || ' ' || of_epoch || ' ' || of_seq FROM yj_duplicate WHERE record_id = $1`, results[0].RecordID).Scan(&later, &earlier)
		return err == nil
	})
	place := func(r *wire.SignResult) string { return fmt.Sprint(r.Node, " ", r.Epoch, " ", r.Sequence) }
	if later != place(results[1]) || earlier != place(results[0]) {
		t.Errorf("%s is a second of %s, want %s of %s", later, earlier, place(results[1]), place(results[0]))
	}
	var rows int
	if err := db.QueryRowContext(t.Context(), `SELECT COUNT(*) FROM yj_duplicate`).Scan(&rows); err != nil || rows != 1 {
		t.Errorf("%d are marked, %v", rows, err)
	}
}

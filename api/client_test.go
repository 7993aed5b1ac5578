package api_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance/account"
	"yinjian/appliance/evidence"
	"yinjian/appliance/problem"
	"yinjian/appliance/sign"
	"yinjian/ntp"
)

func (k *kit) client(change ...func(*client.Config)) *client.Client {
	k.t.Helper()
	_, pool := certificate(k.t)
	cfg := client.Config{BaseURL: "https://" + k.addr, AppID: "his", Key: appKey, RootCAs: pool, Clock: func() time.Time { return k.clock.Now().Time }}
	for _, f := range change {
		f(&cfg)
	}
	c, err := client.New(cfg)
	if err != nil {
		k.t.Fatal(err)
	}
	k.t.Cleanup(c.Close)
	return c
}

func wireSign() *wire.SignRequest {
	return &wire.SignRequest{
		Signer: "D1001", Algorithm: "SM2", Form: "raw", Content: []byte("出院小结"), Role: "attending",
		Document: wire.Document{ID: "4711", Type: "discharge-summary", MediaType: "text/plain"},
		Consent:  wire.Consent{Method: "app-asserted", Assertion: "医生点击了签名"},
	}
}

func TestClient(t *testing.T) {
	t.Parallel()
	k := start(t)
	c, ctx := k.client(), t.Context()
	if r, err := c.Sign(ctx, "visit-1", wireSign()); err != nil || r.RecordID != record || r.Sequence != 7 {
		t.Errorf("Sign = %+v, %v", r, err)
	}
	if r, err := c.Verify(ctx, &wire.VerifyRequest{CMS: []byte{0x30, 0}}); err != nil || !strings.Contains(string(r), `"valid"`) {
		t.Errorf("Verify = %s, %v", r, err)
	}
	if r, err := c.Authorize(ctx, &wire.AuthorizationRequest{Signer: "D1001", PIN: "1", Digests: [][]byte{make([]byte, 32)}}); err != nil || r.ID != "00ff" {
		t.Errorf("Authorize = %+v, %v", r, err)
	}
	if r, err := c.Evidence(ctx, record); err != nil || string(r) != `{"format":"yinjian-evidence/1"}` {
		t.Errorf("Evidence = %s, %v", r, err)
	}
	if r, err := c.Certificate(ctx, "01ab"); err != nil || r.Status != "revoked" {
		t.Errorf("Certificate = %+v, %v", r, err)
	}
	if r, err := c.Stamp(ctx, "sm2", []byte("query")); err != nil || len(r) != 2 {
		t.Errorf("Stamp = %x, %v", r, err)
	}
	if r, err := c.State(ctx); err != nil || string(r) != `{"state":"operational"}` {
		t.Errorf("State = %s, %v", r, err)
	}
	if err := c.Alive(ctx); err != nil {
		t.Error(err)
	}
	k.services.unready = []string{"时间不可信"}
	if r, err := c.Ready(ctx); err != nil || r.Ready || len(r.Reasons) != 1 {
		t.Errorf("Ready = %+v, %v", r, err)
	}
	_, err := c.Certificate(ctx, "02")
	var p *client.Problem
	if !errors.As(err, &p) || p.Status != 404 || p.Field != "path.serial" || !client.Is(err, problem.NotFound) {
		t.Errorf("unknown certificate: %v", err)
	}
	if _, err := c.Timestamp(ctx, &wire.TimestampRequest{Unit: "sm9", Data: []byte("x")}); !client.Is(err, problem.NotFound) {
		t.Errorf("unknown unit: %v", err)
	}
	if _, err := c.Sign(ctx, "", wireSign()); err == nil {
		t.Error("Sign without a key")
	}
	wrong := k.client(func(c *client.Config) { c.Key = []byte("no") })
	if _, err := wrong.Sign(ctx, "k", wireSign()); !client.Is(err, problem.Unauthenticated) {
		t.Errorf("wrong key: %v", err)
	}
	distrusting := k.client(func(c *client.Config) { c.RootCAs = nil })
	if err := distrusting.Alive(ctx); err == nil {
		t.Error("an unknown certificate was trusted")
	}
}

func TestClientRetries(t *testing.T) {
	t.Parallel()
	k := start(t)
	var keys []string
	failures := 2
	inner := k.services.sign
	k.services.sign = func(ctx context.Context, app *account.Application, req *sign.Request) (*sign.Result, error) {
		keys = append(keys, req.IdempotencyKey)
		if len(keys) <= failures {
			return nil, problem.New(problem.Timeout, "处理超时", "重试")
		}
		return inner(ctx, app, req)
	}
	// Not asked to: once.
	if _, err := k.client().Sign(t.Context(), "visit-1", wireSign()); !client.Is(err, problem.Timeout) || !client.OutcomeUnknown(err) || len(keys) != 1 {
		t.Errorf("without retries: %v after %d tries", err, len(keys))
	}
	keys = nil
	retrying := k.client(func(c *client.Config) { c.Retry.Attempts = 3 })
	if _, err := retrying.Sign(t.Context(), "visit-1", wireSign()); err != nil {
		t.Errorf("with retries: %v", err) // a nonce used again would be refused
	}
	if strings.Join(keys, " ") != "visit-1 visit-1 visit-1" {
		t.Errorf("keys = %v", keys)
	}
	// A clock that is set right meanwhile: each attempt takes the time anew.
	failures = 0
	looks := 0
	late := k.client(func(c *client.Config) {
		c.Retry.Attempts, c.RootCAs, c.TLS = 2, nil, &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: c.RootCAs}
		right := c.Clock
		c.Clock = func() time.Time {
			if looks++; looks == 1 {
				return right().Add(-10 * time.Minute)
			}
			return right()
		}
	})
	if _, err := late.Sign(t.Context(), "visit-late", wireSign()); err != nil || looks != 2 {
		t.Errorf("with a clock set right: %v after %d looks at it", err, looks)
	}
	// A refusal that says no stays a no.
	keys, failures = nil, 0
	k.services.sign = func(_ context.Context, _ *account.Application, req *sign.Request) (*sign.Result, error) {
		keys = append(keys, req.IdempotencyKey)
		return nil, problem.New(problem.PINLocked, "锁定", "找管理员")
	}
	if _, err := retrying.Sign(t.Context(), "visit-2", wireSign()); !client.Is(err, problem.PINLocked) || client.OutcomeUnknown(err) || len(keys) != 1 {
		t.Errorf("a plain no: %v after %d tries", err, len(keys))
	}
	// A PIN is never sent twice.
	asked := 0
	k.services.authorize = func(context.Context, *account.Application, account.GrantRequest) (*account.Grant, error) {
		asked++
		return nil, problem.New(problem.HSMUnavailable, "密码机不可用", "稍后")
	}
	if _, err := retrying.Authorize(t.Context(), &wire.AuthorizationRequest{Signer: "D1001", PIN: "1", Count: 1, Seconds: 1}); err == nil || asked != 1 {
		t.Errorf("Authorize: %v after %d tries", err, asked)
	}
	ctx, cancel := context.WithCancel(t.Context())
	k.services.sign = func(context.Context, *account.Application, *sign.Request) (*sign.Result, error) {
		cancel()
		return nil, problem.New(problem.HSMUnavailable, "密码机不可用", "稍后")
	}
	if _, err := retrying.Sign(ctx, "visit-3", wireSign()); err == nil {
		t.Error("retried after its context's end")
	}
}

func TestClientConfig(t *testing.T) {
	t.Parallel()
	good := client.Config{BaseURL: "https://a:1", AppID: "his", Key: appKey, Clock: func() time.Time { return epoch }}
	if _, err := client.New(good); err != nil {
		t.Error(err)
	}
	for name, change := range map[string]func(*client.Config){
		"plain":    func(c *client.Config) { c.BaseURL = "http://a" },
		"path":     func(c *client.Config) { c.BaseURL = "https://a/v1" },
		"user":     func(c *client.Config) { c.BaseURL = "https://u:p@a" },
		"no host":  func(c *client.Config) { c.BaseURL = "https://" },
		"no clock": func(c *client.Config) { c.Clock = nil },
		"no key":   func(c *client.Config) { c.Key = nil },
		"no app":   func(c *client.Config) { c.AppID = "" },
	} {
		bad := good
		change(&bad)
		if _, err := client.New(bad); err == nil {
			t.Errorf("%s was taken", name)
		}
	}
}

// A shell has what docs/clients/sign.sh is run with.
type shell struct {
	*kit
	dir string
}

func newShell(t *testing.T, sv *services) *shell {
	t.Helper()
	for _, tool := range []string{"curl", "openssl", "sh"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skip(tool + " is missing")
		}
	}
	c := newClock() // the script knows the true time only; ours began a minute earlier
	c.set(time.Now().Add(-time.Minute), ntp.Trusted)
	s := &shell{startWith(t, sv, withClock(c)), t.TempDir()}
	c.set(time.Now(), ntp.Trusted)
	cert, _ := certificate(t)
	s.write("tls-ca.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Certificate[0]}))
	return s
}

func (s *shell) write(name string, data []byte) (path string) {
	s.t.Helper()
	path = filepath.Join(s.dir, name)
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, data, 0o600)); err != nil {
		s.t.Fatal(err)
	}
	return path
}

// run answers what a script printed, on both outputs, and its error. It holds that neither shows the key.
func (s *shell) run(env []string, args ...string) (string, error) {
	s.t.Helper()
	cmd := exec.Command("sh", args...)
	cmd.Dir = ".." // the root of the repository
	cmd.Env = append(os.Environ(), env...)
	out, err := cmd.CombinedOutput()
	if strings.Contains(strings.ToLower(string(out)), hex.EncodeToString(appKey)[:16]) {
		s.t.Errorf("%q shows the key: %s", args, out)
	}
	return string(out), err
}

// TestShellClient signs with curl and openssl, from the documented words alone.
func TestShellClient(t *testing.T) {
	t.Parallel()
	s := newShell(t, newServices())
	key := s.write("key", []byte(hex.EncodeToString(appKey)+"\n"))
	credentials := s.write("his.json", fmt.Appendf(nil, "{\n  \"application\": \"his\",\n  \"key_hex\": \"%x\"\n}\n", appKey))
	compact := s.write("compact.json", fmt.Appendf(nil, `{"key_hex":"%X","note":"x","application":"his"}`, appKey))
	body := s.write("body.json", encode(t, signBody()))
	ca := filepath.Join(s.dir, "tls-ca.pem")
	base := "https://" + s.addr
	bare := []string{"YINJIAN_APP=his", "YINJIAN_KEY_FILE=" + key}
	for _, row := range []struct {
		env  []string
		args []string
		want string // a refusal when it is not the answer's: exit 3
	}{
		{bare, []string{"POST", base + "/v1/sign", body, "-H", "Idempotency-Key: visit-4711"}, `"record_id":"` + record},
		{[]string{"YINJIAN_KEY_FILE=" + credentials}, []string{"GET", base + "/v1/certs/01ab"}, `"status":"revoked"`},
		{[]string{"YINJIAN_APP=his", "YINJIAN_KEY_FILE=" + compact}, []string{"GET", base + "/v1/certs/01ab"}, `"status":"revoked"`},
		// The MAC of a query is right, and then the query is refused.
		{bare, []string{"GET", base + "/v1/certs/01ab?b=2&a=1"}, `"field":"query"`},
		{[]string{"YINJIAN_APP=his", "YINJIAN_KEY_FILE=" + s.write("wrong", []byte(strings.Repeat("00", 32)))}, []string{"GET", base + "/v1/certs/01ab"}, `"code":"unauthenticated"`},
	} {
		got, err := s.run(row.env, slices.Concat([]string{"-x", "docs/clients/sign.sh"}, row.args, []string{"--cacert", ca})...)
		refused := strings.Contains(row.want, `"code"`) || strings.Contains(row.want, `"field"`)
		var exit *exec.ExitError
		if errors.As(err, &exit) != refused || refused && exit.ExitCode() != 3 || !strings.Contains(got, row.want) {
			t.Errorf("%q: %v\n%s\nwant %s", row.args, err, got, row.want)
		}
	}
	// What is wrong with the key is said before anything is sent, and without showing it.
	half := hex.EncodeToString(appKey)[:62]
	for name, env := range map[string][]string{
		"no file":             {"YINJIAN_APP=his"},
		"file missing":        {"YINJIAN_APP=his", "YINJIAN_KEY_FILE=" + s.dir + "/none"},
		"no application":      {"YINJIAN_APP=", "YINJIAN_KEY_FILE=" + key},
		"another application": {"YINJIAN_APP=emr", "YINJIAN_KEY_FILE=" + credentials},
		"short":               {"YINJIAN_APP=his", "YINJIAN_KEY_FILE=" + s.write("short", []byte(half))},
		"no hex":              {"YINJIAN_APP=his", "YINJIAN_KEY_FILE=" + s.write("nohex", []byte(half+"zz"))},
		"empty":               {"YINJIAN_APP=his", "YINJIAN_KEY_FILE=" + s.write("empty", nil)},
		"JSON without key":    {"YINJIAN_KEY_FILE=" + s.write("nokey.json", []byte(`{"application":"his"}`))},
		"JSON with half":      {"YINJIAN_KEY_FILE=" + s.write("half.json", []byte(`{"application":"his","key_hex":"`+half+`"}`))},
		"JSON of nobody":      {"YINJIAN_KEY_FILE=" + s.write("nobody.json", []byte(`{"key_hex":"`+half+`00"}`))},
	} {
		got, err := s.run(env, "docs/clients/sign.sh", "GET", base+"/v1/certs/01ab", "--cacert", ca)
		if err == nil || !strings.HasPrefix(got, "sign.sh: ") || strings.Contains(got, "revoked") {
			t.Errorf("%s: %v\n%s", name, err, got)
		}
	}
	if got, err := s.run(bare, "docs/clients/sign.sh", "POST", base+"/v1/sign", "no-such-body.json"); err == nil || !strings.HasPrefix(got, "sign.sh: ") {
		t.Errorf("a body that is not there: %v, %s", err, got)
	}
}

// TestDocumentedExample runs the example of docs/api-auth.md as it stands there, against a folder like the demo's.
func TestDocumentedExample(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../docs/api-auth.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), "\n```sh\n")
	example, _, ok := strings.Cut(rest, "\n```\n")
	if !ok {
		t.Fatal("the example is gone")
	}
	sv := newServices()
	var asked *sign.Request
	inner := sv.sign
	sv.sign = func(ctx context.Context, app *account.Application, q *sign.Request) (*sign.Result, error) {
		held := *q
		held.Content = bytes.Clone(q.Content) // the memory is the next request's afterwards
		asked = &held
		return inner(ctx, app, q)
	}
	s := newShell(t, sv)
	document := bytes.Repeat([]byte("<诊断>急性阑尾炎</诊断>\n"), 100)
	s.write("record.xml", document)
	s.write("endpoints.json", fmt.Appendf(nil, "{\n  \"api\": \"https://%s\",\n  \"tsa_sm2\": \"http://x\",\n  \"tls_ca\": \"x\"\n}\n", s.addr))
	s.write("credentials/emr-binhai.json", fmt.Appendf(nil, "{\n  \"application\": \"his\",\n  \"key_hex\": \"%x\"\n}\n", appKey))
	out, err := s.run([]string{"demo=" + s.dir}, "-euc", example)
	if err != nil || !strings.Contains(out, record) {
		t.Fatalf("%v\n%s", err, out)
	}
	if asked == nil || !bytes.Equal(asked.Content, document) || asked.IdempotencyKey != "example-1" || asked.Signer != "D10023" ||
		asked.Consent.Method != evidence.AppAsserted || asked.Consent.Assertion == "" {
		t.Errorf("asked for %+v", asked)
	}
	got, err := os.ReadFile(filepath.Join(s.dir, "example-evidence.json"))
	if err != nil || string(got) != `{"format":"yinjian-evidence/1"}` {
		t.Errorf("evidence %s, %v", got, err)
	}
}

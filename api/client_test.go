package api_test

import (
	"context"
	"encoding/hex"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance/account"
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
			return nil, problem.New(problem.HSMUnavailable, "密码机不可用", "稍后")
		}
		return inner(ctx, app, req)
	}
	// Not asked to: once.
	if _, err := k.client().Sign(t.Context(), "visit-1", wireSign()); !client.Is(err, problem.HSMUnavailable) || len(keys) != 1 {
		t.Errorf("without retries: %v after %d tries", err, len(keys))
	}
	keys = nil
	retrying := k.client(func(c *client.Config) { c.Retries = 2 })
	if _, err := retrying.Sign(t.Context(), "visit-1", wireSign()); err != nil {
		t.Errorf("with retries: %v", err) // a nonce used again would be refused
	}
	if strings.Join(keys, " ") != "visit-1 visit-1 visit-1" {
		t.Errorf("keys = %v", keys)
	}
	// A refusal that says no stays a no.
	keys, failures = nil, 0
	k.services.sign = func(_ context.Context, _ *account.Application, req *sign.Request) (*sign.Result, error) {
		keys = append(keys, req.IdempotencyKey)
		return nil, problem.New(problem.PINLocked, "锁定", "找管理员")
	}
	if _, err := retrying.Sign(t.Context(), "visit-2", wireSign()); !client.Is(err, problem.PINLocked) || len(keys) != 1 {
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

// TestShellClient signs with curl and openssl, from the documented words alone.
func TestShellClient(t *testing.T) {
	t.Parallel()
	for _, tool := range []string{"curl", "openssl", "sh"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skip(tool + " is missing")
		}
	}
	c := newClock() // the script knows the true time only; ours began a minute earlier
	c.set(time.Now().Add(-time.Minute), ntp.Trusted)
	k := start(t, withClock(c))
	c.set(time.Now(), ntp.Trusted)
	dir := t.TempDir()
	write := func(name string, data []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	key := write("key", []byte(hex.EncodeToString(appKey)))
	body := write("body.json", encode(t, signBody()))
	run := func(args ...string) string {
		t.Helper()
		cmd := exec.Command("sh", append([]string{"../docs/clients/sign.sh"}, args...)...)
		cmd.Env = append(os.Environ(), "YINJIAN_APP=his", "YINJIAN_KEY_FILE="+key)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Errorf("sign.sh %v: %v\n%s", args, err, out)
		}
		return string(out)
	}
	base := "https://" + k.addr // -k: the test's certificate is the test's own
	if got := run("POST", base+"/v1/sign", body, "-k", "-H", "Idempotency-Key: visit-4711"); !strings.Contains(got, `"record_id":"`+record) {
		t.Errorf("sign: %s", got)
	}
	if got := run("GET", base+"/v1/certs/01ab", "-k"); !strings.Contains(got, `"status":"revoked"`) {
		t.Errorf("certificate: %s", got)
	}
	// The MAC of a query is right, and then the query is refused.
	if got := run("GET", base+"/v1/certs/01ab?b=2&a=1", "-k"); !strings.Contains(got, `"field":"query"`) {
		t.Errorf("query: %s", got)
	}
	write("key", []byte(strings.Repeat("00", 32)))
	if got := run("GET", base+"/v1/certs/01ab", "-k"); !strings.Contains(got, `"code":"unauthenticated"`) {
		t.Errorf("wrong key: %s", got)
	}
}

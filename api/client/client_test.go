package client_test

import (
	"crypto/tls"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"yinjian/api/client"
	"yinjian/api/wire"
)

// The exchange with the real server is tested in package api; here are answers that it never gives.

func newClient(t *testing.T, retries int, h http.HandlerFunc) *client.Client {
	t.Helper()
	srv := httptest.NewTLSServer(h)
	t.Cleanup(srv.Close)
	c, err := client.New(client.Config{
		BaseURL: srv.URL, AppID: "his", Key: []byte("k"), Retries: retries, Timeout: 5 * time.Second,
		TLS:   srv.Client().Transport.(*http.Transport).TLSClientConfig.Clone(),
		Clock: func() time.Time { return time.UnixMilli(1767225600000) },
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func TestStrangeAnswers(t *testing.T) {
	t.Parallel()
	for name, row := range map[string]struct {
		status     int
		kind, body string
		want       string
	}{
		"not ours":         {200, "text/html", "<html>", "unexpected answer"},
		"no type":          {200, "", "", "unexpected answer"},
		"broken JSON":      {200, "application/json", "{", "decoding answer"},
		"redirect":         {302, "", "", "unexpected answer"},
		"broken problem":   {400, "application/problem+json", "{", "unexpected answer"},
		"problem, no code": {400, "application/problem+json", "{}", "unexpected answer"},
		"problem":          {403, "application/problem+json; charset=utf-8", `{"code":"forbidden","detail":"无权限","field":"f","next":"找管理员","instance":"urn:x"}`, "yinjian: forbidden (f): 无权限; 找管理员 [urn:x]"},
		"too large":        {200, "application/json", strings.Repeat(" ", 64<<20+1), "too large"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newClient(t, 0, func(w http.ResponseWriter, _ *http.Request) {
				w.Header()["Content-Type"] = []string{row.kind}
				w.Header().Set("Location", "https://elsewhere.invalid/")
				w.WriteHeader(row.status)
				io.WriteString(w, row.body)
			})
			if _, err := c.Timestamp(t.Context(), &wire.TimestampRequest{Data: []byte("x")}); err == nil || !strings.Contains(err.Error(), row.want) {
				t.Errorf("err = %v, want %q", err, row.want)
			}
		})
	}
}

// TestRetryTakesANewNonce loses answers after the request arrived.
func TestRetryTakesANewNonce(t *testing.T) {
	t.Parallel()
	seen := map[string]bool{}
	var tries atomic.Int32
	c := newClient(t, 3, func(w http.ResponseWriter, r *http.Request) {
		a, err := wire.ParseAuthorization(r.Header.Get("Authorization"))
		if err != nil || seen[a.Nonce] || r.Header.Get("Idempotency-Key") != "visit-1" {
			t.Errorf("try %d: %v, %v", tries.Load(), a, err)
			return
		}
		seen[a.Nonce] = true
		if tries.Add(1) < 3 {
			panic(http.ErrAbortHandler)
		}
		w.Header().Set("Content-Type", "application/json")
		io.WriteString(w, `{"record_id":"ab"}`)
	})
	r, err := c.Sign(t.Context(), "visit-1", &wire.SignRequest{})
	if err != nil || r.RecordID != "ab" || tries.Load() != 3 {
		t.Errorf("Sign = %+v, %v after %d tries", r, err, tries.Load())
	}
}

func TestNoServer(t *testing.T) {
	t.Parallel()
	if _, err := client.NewAdmin("/nonexistent/socket").State(t.Context()); err == nil {
		t.Error("an answer from nobody")
	}
	c, err := client.New(client.Config{BaseURL: "https://127.0.0.1:1", AppID: "a", Key: []byte("k"), Clock: func() time.Time { return time.Time{} }, TLS: &tls.Config{MinVersion: tls.VersionTLS13}})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Alive(t.Context()); err == nil {
		t.Error("an answer from nobody")
	}
}

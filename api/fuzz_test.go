package api_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"

	"yinjian/api"
	"yinjian/api/wire"
	"yinjian/appliance/problem"
)

// fuzzKit is a face without a listener.
func fuzzKit(f *testing.F, sv *services) *kit {
	k := &kit{clock: newClock(), services: sv, addr: "127.0.0.1:8443"}
	s, err := api.New(api.Config{
		Signing: sv, Directory: sv, Stamps: sv, Tokens: sv, Health: sv, Admin: &admin{}, Accounts: newAccounts(), Clock: k.clock, Log: discard(), Version: "test",
		Limits: api.Limits{Rate: func(*appT) (int, int) { return 1 << 30, 1 << 30 }, Failures: 1 << 30},
	})
	if err != nil {
		f.Fatal(err)
	}
	k.server = s
	return k
}

// answers runs a request through the handler, and holds what comes back against the contract.
func (k *kit) answers(t *testing.T, r *http.Request, body []byte) reply {
	t.Helper()
	w := httptest.NewRecorder()
	r.RemoteAddr = "127.0.0.1:1"
	k.server.Handler().ServeHTTP(w, r)
	got := reply{status: w.Code, header: w.Header(), body: w.Body.Bytes()}
	if got.header.Get("Content-Type") == "application/problem+json" {
		if err := json.Unmarshal(got.body, &got.problem); err != nil {
			t.Fatalf("%v: %s", err, got.body)
		}
		if p := got.problem; p.Code == "" || p.Detail == "" || p.Next == "" || p.Retry == "" || p.Status != got.status {
			t.Errorf("problem is not complete: %s", got.body)
		}
	}
	if err := conforms(r, body, got); err != nil && r.Method != http.MethodHead {
		t.Errorf("%d %s: %v", got.status, got.body, err)
	}
	return got
}

// FuzzRequest sends bytes that nobody signed. Nothing reaches a service, and nothing but a refusal comes back, except from
// the routes that are open to all.
func FuzzRequest(f *testing.F) {
	sv, reached := untouchable(f)
	k := fuzzKit(f, sv)
	for _, line := range []string{
		"POST /v1/sign HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}",
		"POST /v1/sign HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n2;a=b\r\n{}\r\n0\r\nTrailer: x\r\n\r\n",
		"GET https://other/v1/evidence/" + record + " HTTP/1.1\r\nHost: h\r\nAuthorization: YJ1-HMAC-SM3 app=his,time=1767225600000,nonce=0123456789abcdef,sig=" + strings.Repeat("A", 43) + "=\r\n\r\n",
		"GET /health/alive HTTP/1.0\r\n\r\n", "OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n", "GET /v1/certs/%00?a&b HTTP/1.1\nHost: h\nAccept: */*;q=0\n\n",
		"POST /tsa/sm2 HTTP/1.1\r\nHost: h\r\nContent-Type: application/timestamp-query; charset=\"x\r\nContent-Encoding: gzip\r\n\r\n", "HEAD /openapi.json HTTP/1.1\r\nHost: h\r\n\r\n",
	} {
		f.Add([]byte(line))
	}
	open := []string{"/health/alive", "/health/ready", "/openapi.json"}
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(data)))
		if err != nil {
			return
		}
		body, err := io.ReadAll(io.LimitReader(r.Body, 1<<20))
		if err != nil {
			return
		}
		r.Body = io.NopCloser(bytes.NewReader(body))
		got := k.answers(t, r, body)
		if got.status < 400 && !slices.Contains(open, r.URL.Path) || got.status == 500 {
			t.Errorf("%s %q = %d %s", r.Method, r.RequestURI, got.status, got.body)
		}
		if n := reached.Load(); n != 0 {
			t.Errorf("an unsigned request reached a service")
		}
	})
}

// FuzzBody sends signed bodies: each is taken, and then openapi.json takes it too, or refused with a problem of 4xx.
func FuzzBody(f *testing.F) {
	sv := newServices()
	sv.respond = func(context.Context, string, string, []byte) ([]byte, error) {
		return nil, problem.New(problem.NotReady, "x", "x")
	}
	k := fuzzKit(f, sv)
	paths := []string{"/v1/authorizations", "/v1/batches", "/v1/sign", "/v1/timestamp", "/v1/verify"}
	for i, path := range paths {
		for _, good := range goodBodies()[path] {
			b, err := json.Marshal(good)
			if err != nil {
				f.Fatal(err)
			}
			f.Add(i, b)
			f.Add(i, bytes.Replace(b, []byte(`":`), []byte(`":0,"x":`), 1))
		}
	}
	var mu sync.Mutex // the kit's nonces
	f.Fuzz(func(t *testing.T, which int, body []byte) {
		path := paths[uint(which)%uint(len(paths))]
		mu.Lock()
		k.t = t
		r := k.request(call{path: path, body: body})
		mu.Unlock()
		r.RequestURI = path
		r.Body = io.NopCloser(bytes.NewReader(body))
		got := k.answers(t, r, body)
		switch {
		case got.status == 200:
		case got.status == 503 && path == "/v1/timestamp": // it was taken, and there is no unit here
		case got.status < 400 || got.status >= 500 || got.problem.Retry != wire.RetryNever:
			t.Errorf("%s %q = %d %s", path, body, got.status, got.body)
		}
	})
}

// FuzzAdministration sends bytes that no session stands behind to the administrators' listener, with whatever cookies and
// tokens: nothing is asked of the appliance, and nothing but a refusal comes back, except where the table of routes has it.
func FuzzAdministration(f *testing.F) {
	k := fuzzKit(f, newServices())
	asked := new(admin)
	s, err := api.New(api.Config{
		Signing: k.services, Directory: k.services, Stamps: k.services, Tokens: k.services, Health: k.services, Admin: asked, Accounts: newAccounts(), Clock: k.clock, Log: discard(), Version: "test",
	})
	if err != nil {
		f.Fatal(err)
	}
	srv := s.NewAdminTLSServer()
	for _, line := range []string{
		"GET /admin/v1/session HTTP/1.1\r\nHost: h\r\nCookie: __Host-yinjian=" + strings.Repeat("0a", 32) + "; __Host-yinjian=\r\n\r\n",
		"GET /admin/v1/signers HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer " + strings.Repeat("0", 64) + "\r\nAuthorization: Basic eDp5\r\n\r\n",
		"POST /admin/v1/approvals/x/approve HTTP/1.1\r\nHost: h\r\nX-Yinjian-CSRF: x\r\nContent-Type: application/json\r\nContent-Length: 14\r\n\r\n{\"sm3\":\"abcd\"}",
		"POST /admin/v1/login HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nContent-Length: 32\r\n\r\n{\"name\":\"wang\",\"password\":\"guess\"}",
		"POST /admin/v1/login/challenge HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}",
		"POST /console/login HTTP/1.1\r\nHost: h\r\nContent-Type: application/x-www-form-urlencoded\r\nContent-Length: 9\r\n\r\nname=wang", "GET /console/ HTTP/1.1\r\nHost: h\r\nCookie: \"\r\n\r\n",
	} {
		f.Add([]byte(line))
	}
	open := []string{"/health/alive", "/health/ready", "/admin/v1/login/challenge", "/"}
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(data)))
		if err != nil {
			return
		}
		body, err := io.ReadAll(io.LimitReader(r.Body, 1<<20))
		if err != nil || r.Method == http.MethodConnect {
			return
		}
		r.Body, r.RemoteAddr, r.TLS = io.NopCloser(bytes.NewReader(body)), "127.0.0.1:1", &tls.ConnectionState{}
		w := httptest.NewRecorder()
		srv.Handler.ServeHTTP(w, r.WithContext(srv.ConnContext(t.Context(), nil)))
		page := strings.HasPrefix(r.URL.Path, "/console") && w.Code < 500
		preflight := r.Method == http.MethodOptions && w.Code == http.StatusNoContent
		if w.Code < 400 && !page && !preflight && !slices.Contains(open, r.URL.Path) || w.Code == 500 {
			t.Errorf("%s %q = %d %s", r.Method, r.RequestURI, w.Code, w.Body)
		}
		if len(asked.asked) > 0 || w.Header().Get("Set-Cookie") != "" && strings.Contains(w.Header().Get("Set-Cookie"), "__Host-yinjian=") && !strings.Contains(w.Header().Get("Set-Cookie"), "Max-Age=0") {
			t.Errorf("%s %q reached %v, %v", r.Method, r.RequestURI, asked.asked, w.Header())
		}
	})
}

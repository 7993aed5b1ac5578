package api_test

import (
	"bytes"
	"context"
	"encoding/asn1"
	"encoding/json"
	"errors"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"yinjian/api"
	"yinjian/api/wire"
	"yinjian/appliance/problem"
	"yinjian/tsa"
)

func tsaCall(path string, body []byte) call {
	return call{path: path, body: body, header: map[string]string{"Content-Type": "application/timestamp-query", "Accept": "application/timestamp-reply"}}
}

func TestStampPassesBytesThrough(t *testing.T) {
	t.Parallel()
	sv := newServices()
	k := startWith(t, sv)
	query, want := []byte("not even DER"), tsa.Reject(tsa.BadDataFormat, "no")
	sv.respond = func(_ context.Context, unit, requester string, der []byte) ([]byte, error) {
		if unit != "rsa" || requester != "his" || !bytes.Equal(der, query) {
			t.Errorf("Respond(%s, %s, %q)", unit, requester, der)
		}
		return want, nil
	}
	got := k.do(tsaCall("/tsa/rsa", query))
	if got.status != 200 || got.header.Get("Content-Type") != "application/timestamp-reply" || !bytes.Equal(got.body, want) {
		t.Errorf("a rejection = %d %s %x", got.status, got.header.Get("Content-Type"), got.body)
	}
	long := make([]byte, 10<<10) // longer than net/http counts by itself
	sv.respond = func(context.Context, string, string, []byte) ([]byte, error) { return long, nil }
	if got := k.do(tsaCall("/tsa/rsa", query)); got.status != 200 || got.header.Get("Content-Length") != "10240" || !bytes.Equal(got.body, long) {
		t.Errorf("a long reply = %d %v", got.status, got.header)
	}
	wantProblem(t, k.do(tsaCall("/tsa/sm9", query)), 404, problem.NotFound, "path.unit")
	wantProblem(t, k.do(tsaCall("/tsa/rsa", make([]byte, 16<<10+1))), 413, problem.TooLarge, "")
	c := tsaCall("/tsa/rsa", query)
	c.header["Content-Type"] = "application/json"
	wantProblem(t, k.do(c), 415, "unsupported_media_type", "")
	c = tsaCall("/tsa/rsa", query)
	c.header["Accept"] = "application/json"
	wantProblem(t, k.do(c), 406, "not_acceptable", "")
	c = tsaCall("/tsa/rsa", query)
	c.unsigned = true
	wantProblem(t, k.do(c), 401, problem.Unauthenticated, "header.Authorization")
	sv.respond = func(context.Context, string, string, []byte) ([]byte, error) { return nil, errors.New("secret") }
	wantProblem(t, k.do(tsaCall("/tsa/rsa", query)), 500, problem.Internal, "")
}

func TestPlainListener(t *testing.T) {
	t.Parallel()
	sv := newServices()
	k := startWith(t, sv)
	sv.respond = func(_ context.Context, unit, requester string, der []byte) ([]byte, error) {
		if requester != "source:loopback" {
			t.Errorf("requester = %s", requester)
		}
		return []byte{0x30, 0}, nil
	}
	ln, err := api.ListenPlain("127.0.0.1:0", false, 16)
	if err != nil {
		t.Fatal(err)
	}
	serve(t, k.server.NewHTTPServer(k.server.TSAPlainHandler()), ln)
	do := func(method, path, kind string, body []byte) (int, string) {
		r, err := http.NewRequest(method, "http://"+ln.Addr().String()+path, bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Content-Type", kind)
		r.Header.Set("X-Forwarded-For", "10.9.9.9") // must not be believed
		resp, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		out, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, string(out)
	}
	for _, row := range []struct {
		method, path, kind string
		size, status       int
	}{
		{"POST", "/tsa/sm2", "application/timestamp-query", 10, 200},
		{"POST", "/tsa/sm9", "application/timestamp-query", 10, 404},
		{"POST", "/tsa/sm2", "text/plain", 10, 415},
		{"POST", "/tsa/sm2", "application/timestamp-query", 16<<10 + 1, 413},
		{"GET", "/tsa/sm2", "", 0, 405},
		{"GET", "/health/alive", "", 0, 200},
		{"GET", "/health/ready", "", 0, 404},
		{"GET", "/health/state", "", 0, 404},
		{"POST", "/v1/sign", "application/json", 2, 404},
		{"GET", "/admin/v1/state", "", 0, 404},
		{"GET", "/openapi.json", "", 0, 404},
	} {
		if status, body := do(row.method, row.path, row.kind, make([]byte, row.size)); status != row.status {
			t.Errorf("%s %s = %d %s, want %d", row.method, row.path, status, body, row.status)
		}
	}
}

// TestPlainListenerHostile sends, byte for byte, what the listener without TLS has to end soon, and holds nobody else up.
func TestPlainListenerHostile(t *testing.T) {
	t.Parallel()
	k := start(t)
	ln, err := api.ListenPlain("127.0.0.1:0", false, 64)
	if err != nil {
		t.Fatal(err)
	}
	srv := k.server.NewHTTPServer(k.server.TSAPlainHandler())
	srv.ReadHeaderTimeout, srv.ReadTimeout = 300*time.Millisecond, 600*time.Millisecond
	serve(t, srv, ln)
	post := func(rest string) string { return "POST /tsa/sm2 HTTP/1.1\r\nHost: h\r\n" + rest }
	typed := "Content-Type: application/timestamp-query\r\n"
	query := typed + "Content-Length: 1\r\n"
	for name, row := range map[string]struct {
		bytes string
		more  string // sent again and again until the server has answered or closed
		want  string // the answer begins with it; "" for none
		holds string // and holds this
	}{
		"a good one":             {post(query + "Connection: close\r\n\r\nq"), "", "HTTP/1.1 200 ", "application/timestamp-reply"},
		"HTTP/1.0":               {"POST /tsa/sm2 HTTP/1.0\r\n" + query + "\r\nq", "", "HTTP/1.0 200 ", "Content-Length: 2"},
		"type in capitals":       {post("Content-Type: Application/Timestamp-Query\r\nContent-Length: 1\r\nConnection: close\r\n\r\nq"), "", "HTTP/1.1 200 ", ""},
		"type with parameter":    {post("Content-Type: application/timestamp-query; charset=utf-8\r\nContent-Length: 1\r\n\r\nq"), "", "HTTP/1.1 415 ", "unsupported_media_type"},
		"two types":              {post(typed + query + "\r\nq"), "", "HTTP/1.1 415 ", "unsupported_media_type"},
		"compressed":             {post("Content-Encoding: gzip\r\n" + query + "\r\nq"), "", "HTTP/1.1 415 ", "unsupported_media_type"},
		"two gigabytes declared": {post(typed + "Content-Length: 2147483648\r\n\r\n"), "", "HTTP/1.1 413 ", "Connection: close"},
		"five megabytes":         {post(typed + "Content-Length: 5242880\r\n\r\n"), strings.Repeat("x", 64<<10), "HTTP/1.1 413 ", "too_large"},
		"endless chunks":         {post(typed + "Transfer-Encoding: chunked\r\n\r\n"), "1000\r\n" + strings.Repeat("x", 4096) + "\r\n", "HTTP/1.1 413 ", "too_large"},
		"header byte by byte":    {post("X-A: "), "a", "", ""},
		"body byte by byte":      {post(typed + "Content-Length: 16000\r\n\r\n"), "a", "HTTP/1.1 408 ", "request_timeout"},
		"chunks byte by byte":    {post(typed + "Transfer-Encoding: chunked\r\n\r\n"), "1\r\na\r\n", "HTTP/1.1 408 ", "request_timeout"},
		"body cut off":           {post(typed + "Content-Length: 16000\r\n\r\nq"), "", "HTTP/1.1 4", ""},
		"GET":                    {"GET /tsa/sm2 HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n", "", "HTTP/1.1 405 ", "POST"},
		"HEAD":                   {"HEAD /tsa/sm2 HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n", "", "HTTP/1.1 405 ", "POST"},
		"PUT":                    {"PUT /tsa/sm2 HTTP/1.1\r\nHost: h\r\n" + query + "Connection: close\r\n\r\nq", "", "HTTP/1.1 405 ", "method_not_allowed"},
		"SOAP":                   {"POST /tsa HTTP/1.1\r\nHost: h\r\nContent-Type: text/xml\r\nContent-Length: 1\r\nConnection: close\r\n\r\nq", "", "HTTP/1.1 404 ", "not_found"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c, err := net.Dial("tcp", ln.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(2 * time.Minute))
			if _, err := io.WriteString(c, row.bytes); err != nil {
				t.Fatal(err)
			}
			answered := make(chan string, 1)
			go func() { b, _ := io.ReadAll(c); answered <- string(b) }() // a reset is an end, too
			sent, got := 0, ""
			for waiting := true; waiting; {
				select {
				case got = <-answered:
					waiting = false
				case <-time.After(20 * time.Millisecond):
					n, _ := io.WriteString(c, row.more) // the server may be gone
					sent += n
				}
			}
			if !strings.HasPrefix(got, row.want) || row.want == "" && got != "" || !strings.Contains(got, row.holds) {
				t.Errorf("answer %q, want %q with %q", got, row.want, row.holds)
			}
			if strings.HasPrefix(name, "HEAD") && strings.Contains(got, "method_not_allowed") {
				t.Error("HEAD was answered with a body")
			}
			if sent > 8<<20 {
				t.Errorf("%d bytes were taken", sent)
			}
		})
	}
}

// TestTimestampByOpenSSL has openssl read our query and answer it.
func TestTimestampByOpenSSL(t *testing.T) {
	t.Parallel()
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		t.Skip("openssl is missing")
	}
	dir := t.TempDir()
	run := func(args ...string) []byte {
		t.Helper()
		cmd := exec.Command(openssl, args...)
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Errorf("openssl %v: %v\n%s", args, err, out)
		}
		return out
	}
	write := func(name string, data []byte) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("c.cnf", []byte(`[req]
distinguished_name = dn
x509_extensions = ext
prompt = no
[dn]
CN = test TSA
[ext]
extendedKeyUsage = critical,timeStamping
[tsa]
default_tsa = t
[t]
serial = serial
signer_digest = sha256
default_policy = 1.2.3.4
digests = sha256, sm3
accuracy = secs:1, millisecs:500, microsecs:7
ess_cert_id_alg = sha256
`))
	write("serial", []byte("0a1b\n"))
	run("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "k.pem", "-out", "c.pem", "-config", "c.cnf", "-days", "2")
	sv := newServices()
	k := startWith(t, sv)
	sv.respond = func(_ context.Context, unit, _ string, der []byte) ([]byte, error) {
		write("q.der", der)
		if text := string(run("ts", "-query", "-in", "q.der", "-text")); !strings.Contains(text, "Certificate required: yes") || strings.Contains(text, "Nonce: unspecified") {
			t.Errorf("openssl reads our query as\n%s", text)
		}
		run("ts", "-reply", "-config", "c.cnf", "-section", "t", "-queryfile", "q.der", "-signer", "c.pem", "-inkey", "k.pem", "-out", "r.der")
		return os.ReadFile(filepath.Join(dir, "r.der"))
	}
	for name, body := range map[string]m{
		"data": {"unit": "rsa", "data": b64([]byte("abc"))},
		"SM3": {"digest": m{"algorithm": "SM3", "value": b64([]byte("\x66\xc7\xf0\xf4\x62\xee\xed\xd9\xd1\xf2\xd4\x6b\xdc\x10\xe4\xe2" +
			"\x41\x67\xc4\x87\x5c\xf2\xf7\xa2\x29\x7d\xa0\x2b\x8f\x4b\xa8\xe0"))}}, // SM3("abc"), GB/T 32905 annex A.1
	} {
		got := k.do(call{path: "/v1/timestamp", body: encode(t, body)})
		var out wire.Timestamp
		if err := json.Unmarshal(got.body, &out); err != nil || got.status != 200 {
			t.Fatalf("%s: %d %s", name, got.status, got.body)
		}
		if out.Policy != "1.2.3.4" || out.AccuracyUS != 1500007 || len(out.Serial) != 3 || out.GenTime == "" {
			t.Errorf("%s: %s", name, got.body)
		}
		if want := map[bool]string{true: "rsa", false: "sm2"}[body["unit"] == "rsa"]; out.Unit != want {
			t.Errorf("%s: unit %s, want %s", name, out.Unit, want)
		}
		write("t.der", out.Token)
		write("d", []byte("abc"))
		if said := run("ts", "-verify", "-data", "d", "-in", "t.der", "-token_in", "-CAfile", "c.pem"); !strings.Contains(string(said), "Verification: OK") {
			t.Errorf("%s: openssl says %s", name, said)
		}
	}
}

func TestTimestampRefusals(t *testing.T) {
	t.Parallel()
	sv := newServices()
	k := startWith(t, sv)
	for name, row := range map[string]struct {
		reply  []byte
		status int
		code   problem.Code
		field  string
	}{
		"time":      {tsa.Reject(tsa.TimeNotAvailable, "secret"), 503, problem.TimeUntrusted, ""},
		"algorithm": {tsa.Reject(tsa.BadAlg, "secret"), 400, problem.InvalidRequest, "digest.algorithm"},
		"failure":   {tsa.Reject(tsa.SystemFailure, "secret"), 503, problem.NotReady, ""},
		"our fault": {tsa.Reject(tsa.BadDataFormat, "secret"), 500, problem.Internal, ""},
		"garbage":   {[]byte("secret"), 500, problem.Internal, ""},
		"empty":     {nil, 500, problem.Internal, ""},
	} {
		t.Run(name, func(t *testing.T) {
			sv.respond = func(context.Context, string, string, []byte) ([]byte, error) { return row.reply, nil }
			got := k.do(call{path: "/v1/timestamp", body: encode(t, timestampBody())})
			wantProblem(t, got, row.status, row.code, row.field)
			if strings.Contains(string(got.body), "secret") {
				t.Errorf("shown: %s", got.body)
			}
		})
	}
	// A token of OpenSSL's that answers another request.
	other, err := os.ReadFile("testdata/other-reply.der")
	if err != nil {
		t.Fatal(err)
	}
	if r, err := tsa.ParseResponse(other); err != nil || r.Token == nil || r.Token.Serial.Cmp(big.NewInt(0)) == 0 {
		t.Fatalf("testdata: %v", err)
	}
	sv.respond = func(context.Context, string, string, []byte) ([]byte, error) { return other, nil }
	wantProblem(t, k.do(call{path: "/v1/timestamp", body: encode(t, timestampBody())}), 500, problem.Internal, "")
	// The nonce differs each time, and is positive.
	seen := map[string]bool{}
	for range 8 {
		sv.respond = func(_ context.Context, _, _ string, der []byte) ([]byte, error) {
			var q struct {
				Version int
				Imprint asn1.RawValue
				Nonce   *big.Int
				CertReq bool
			}
			if _, err := asn1.Unmarshal(der, &q); err != nil || q.Nonce.Sign() < 0 || seen[q.Nonce.String()] {
				t.Errorf("query %x: %v", der, err)
			} else {
				seen[q.Nonce.String()] = true
			}
			return nil, nil
		}
		k.do(call{path: "/v1/timestamp", body: encode(t, timestampBody())})
	}
}

package client_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance/problem"
)

// The exchange with the real server is tested in package api; here are answers that it never gives.

func newClient(t *testing.T, h http.HandlerFunc, change ...func(*client.Config)) *client.Client {
	t.Helper()
	srv := httptest.NewUnstartedServer(h)
	srv.Config.ErrorLog = log.New(io.Discard, "", 0) // connections are broken on purpose
	srv.StartTLS()
	t.Cleanup(srv.Close)
	cfg := client.Config{
		BaseURL: srv.URL, AppID: "his", Key: []byte("k"), Timeout: 20 * time.Second,
		RootCAs: srv.Client().Transport.(*http.Transport).TLSClientConfig.RootCAs,
		Clock:   time.Now,
	}
	for _, f := range change {
		f(&cfg)
	}
	c, err := client.New(cfg)
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
			c := newClient(t, func(w http.ResponseWriter, _ *http.Request) {
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

// A signer is an appliance of a few lines: each Idempotency-Key is one record, and a nonce comes once.
type signer struct {
	t       *testing.T
	mu      sync.Mutex // guards what follows
	records map[string]string
	nonces  map[string]bool
	tries   int
}

func newSigner(t *testing.T) *signer {
	return &signer{t: t, records: map[string]string{}, nonces: map[string]bool{}}
}

// sign answers which try this is, and the answer.
func (s *signer) sign(r *http.Request) (try int, answer string) {
	a, err := wire.ParseAuthorization(r.Header.Get("Authorization"))
	key := r.Header.Get("Idempotency-Key")
	body, rerr := io.ReadAll(r.Body)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tries++
	if err != nil || rerr != nil || key == "" || s.nonces[a.Nonce] || len(body) == 0 {
		s.t.Errorf("try %d: %v, %v, %v, key %q", s.tries, a, err, rerr, key)
		return s.tries, "{}"
	}
	s.nonces[a.Nonce] = true
	had, replayed := s.records[key]
	if !replayed {
		had = fmt.Sprintf("%064x", len(s.records)+1)
		s.records[key] = had
	}
	return s.tries, fmt.Sprintf(`{"record_id":%q,"replayed":%t,"signature":%q}`, had, replayed, base64.StdEncoding.EncodeToString(make([]byte, 3000)))
}

func send(w http.ResponseWriter, answer string) {
	w.Header().Set("Content-Type", "application/json")
	io.WriteString(w, answer)
}

func refuse(w http.ResponseWriter, status int, code problem.Code, retry wire.Retry) {
	w.Header().Set("Content-Type", "application/problem+json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(wire.Problem{Status: status, Code: string(code), Retry: retry, Detail: "原因", Next: "下一步"})
}

// reset ends the connection without TLS's or TCP's farewell.
func reset(w http.ResponseWriter) {
	conn, buf, err := w.(http.Hijacker).Hijack()
	if err != nil {
		panic(err)
	}
	buf.Flush()
	if c, ok := conn.(*tls.Conn).NetConn().(*net.TCPConn); ok {
		c.SetLinger(0)
		c.Close()
	}
}

// TestOneRecord breaks the first exchange in each way there is: the second finds the record that was made, or makes the
// one there will be. Several callers share the client.
func TestOneRecord(t *testing.T) {
	t.Parallel()
	signed := map[string]bool{"answer lost": true, "reset amid the answer": true, "hung": true, "cut without length": true, "proxy's 504": true}
	for name, first := range map[string]func(w http.ResponseWriter, r *http.Request, answer func() string){
		"answer lost": func(w http.ResponseWriter, _ *http.Request, answer func() string) {
			answer()
			panic(http.ErrAbortHandler)
		},
		"reset amid the answer": func(w http.ResponseWriter, _ *http.Request, answer func() string) {
			a := answer()
			w.Header().Set("Content-Length", strconv.Itoa(len(a)))
			send(w, a[:len(a)/2])
			w.(http.Flusher).Flush()
			reset(w)
		},
		"cut without length": func(w http.ResponseWriter, _ *http.Request, answer func() string) {
			a := answer()
			send(w, a[:len(a)/2])
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		},
		"hung": func(w http.ResponseWriter, r *http.Request, answer func() string) {
			answer()
			<-r.Context().Done() // the body was read: net/http sees the client go
		},
		"reset before it was read": func(w http.ResponseWriter, _ *http.Request, _ func() string) { reset(w) },
		"429": func(w http.ResponseWriter, _ *http.Request, _ func() string) {
			w.Header().Set("Retry-After", "1")
			refuse(w, http.StatusTooManyRequests, problem.RateLimited, wire.RetryLater)
		},
		"503": func(w http.ResponseWriter, _ *http.Request, _ func() string) {
			refuse(w, http.StatusServiceUnavailable, problem.HSMUnavailable, wire.RetryLater)
		},
		"clock skew": func(w http.ResponseWriter, _ *http.Request, _ func() string) {
			refuse(w, http.StatusUnauthorized, problem.ClockSkew, wire.RetryResign)
		},
		"500": func(w http.ResponseWriter, _ *http.Request, _ func() string) {
			refuse(w, http.StatusInternalServerError, problem.Internal, wire.RetrySameKey)
		},
		"proxy's 502": func(w http.ResponseWriter, _ *http.Request, _ func() string) {
			http.Error(w, "<html>", http.StatusBadGateway)
		},
		"proxy's 504": func(w http.ResponseWriter, _ *http.Request, answer func() string) {
			answer()
			http.Error(w, "<html>", http.StatusGatewayTimeout)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSigner(t)
			var mu sync.Mutex // guards broken
			broken := map[string]bool{}
			c := newClient(t, func(w http.ResponseWriter, r *http.Request) {
				key := r.Header.Get("Idempotency-Key")
				mu.Lock()
				again := broken[key]
				broken[key] = true
				mu.Unlock()
				if again {
					_, a := s.sign(r)
					send(w, a)
					return
				}
				first(w, r, func() string { _, a := s.sign(r); return a })
			}, func(c *client.Config) {
				c.Retry.Attempts = 2
				if name == "hung" {
					c.Timeout = 2 * time.Second
				}
			})
			const callers = 8
			var wg sync.WaitGroup
			for i := range callers {
				wg.Go(func() {
					r, err := c.Sign(t.Context(), fmt.Sprintf("visit-%d", i), &wire.SignRequest{Signer: "D1001"})
					if err != nil || r.Replayed != signed[name] {
						t.Errorf("caller %d: %+v, %v", i, r, err)
					}
				})
			}
			wg.Wait()
			if len(s.records) != callers {
				t.Errorf("%d records, want %d", len(s.records), callers)
			}
		})
	}
}

// TestGivesUp is about what is not sent again, and whether the caller learns that it may have been signed.
func TestGivesUp(t *testing.T) {
	t.Parallel()
	lose := func(s *signer, w http.ResponseWriter, r *http.Request) { s.sign(r); panic(http.ErrAbortHandler) }
	for name, row := range map[string]struct {
		change  func(*client.Config)
		answer  func(s *signer, w http.ResponseWriter, r *http.Request)
		tries   int
		unknown bool
		code    problem.Code
	}{
		"no retry asked for": {nil, lose, 1, true, ""},
		"always lost":        {func(c *client.Config) { c.Retry.Attempts = 3 }, lose, 3, true, ""},
		"Retry-After beyond the total": {func(c *client.Config) { c.Retry = client.Retry{Attempts: 9, Total: 20 * time.Second} },
			func(s *signer, w http.ResponseWriter, r *http.Request) {
				s.sign(r)
				w.Header().Set("Retry-After", "60")
				refuse(w, 503, problem.DiskReserve, wire.RetryLater)
			}, 1, false, problem.DiskReserve},
		"a plain no": {func(c *client.Config) { c.Retry.Attempts = 9 },
			func(s *signer, w http.ResponseWriter, r *http.Request) {
				s.sign(r)
				refuse(w, 403, problem.SignerStopped, wire.RetryOperator)
			}, 1, false, problem.SignerStopped},
		"a no after a lost answer": {func(c *client.Config) { c.Retry.Attempts = 9 },
			func(s *signer, w http.ResponseWriter, r *http.Request) {
				if try, _ := s.sign(r); try == 1 {
					panic(http.ErrAbortHandler)
				}
				refuse(w, 403, problem.ApplicationStopped, wire.RetryOperator)
			}, 2, true, problem.ApplicationStopped},
		"clock wrong for good": {func(c *client.Config) { c.Retry.Attempts = 3 },
			func(s *signer, w http.ResponseWriter, r *http.Request) {
				s.sign(r)
				refuse(w, 401, problem.ClockSkew, wire.RetryResign)
			}, 3, false, problem.ClockSkew},
		"a login page": {func(c *client.Config) { c.Retry.Attempts = 9 },
			func(s *signer, w http.ResponseWriter, r *http.Request) { s.sign(r); io.WriteString(w, "<html>") }, 1, true, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSigner(t)
			change := row.change
			if change == nil {
				change = func(*client.Config) {}
			}
			c := newClient(t, func(w http.ResponseWriter, r *http.Request) { row.answer(s, w, r) }, change)
			_, err := c.Sign(t.Context(), "visit-1", &wire.SignRequest{Signer: "D1001"})
			if err == nil || s.tries != row.tries || client.OutcomeUnknown(err) != row.unknown || row.code != "" && !client.Is(err, row.code) {
				t.Errorf("%v after %d tries, unknown %t; want %+v", err, s.tries, client.OutcomeUnknown(err), row)
			}
		})
	}
}

// TestNeverSent: who the server is, is settled before anything is sent, and nothing is tried again.
func TestNeverSent(t *testing.T) {
	t.Parallel()
	var came atomic.Int32
	count := func(http.ResponseWriter, *http.Request) { came.Add(1) }
	for name, change := range map[string]func(*client.Config){
		"wrong host": func(c *client.Config) { c.BaseURL = strings.Replace(c.BaseURL, "127.0.0.1", "localhost", 1) },
		"unknown CA": func(c *client.Config) { c.RootCAs = x509.NewCertPool() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var dialled atomic.Int32
			c := newClient(t, count, change, func(c *client.Config) {
				c.Retry.Attempts = 9
				c.TLS = &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: c.RootCAs, Time: func() time.Time { dialled.Add(1); return time.Now() }}
			})
			_, err := c.Sign(t.Context(), "visit-1", &wire.SignRequest{})
			if err == nil || client.OutcomeUnknown(err) || came.Load() != 0 || dialled.Load() > 3 {
				t.Errorf("%v, unknown %t, %d requests arrived, %d looks at the clock", err, client.OutcomeUnknown(err), came.Load(), dialled.Load())
			}
		})
	}
	// Nobody listens: that may pass, and nothing was sent.
	c := newClient(t, count, func(c *client.Config) { c.BaseURL, c.Retry.Attempts = "https://127.0.0.1:1", 2 })
	if _, err := c.Sign(t.Context(), "visit-1", &wire.SignRequest{}); err == nil || client.OutcomeUnknown(err) {
		t.Errorf("nobody listens: %v", err)
	}
}

// TestSlowTaker hangs while a large body is sent: the attempt's time covers that too.
func TestSlowTaker(t *testing.T) {
	t.Parallel()
	over := make(chan struct{})
	c := newClient(t, func(http.ResponseWriter, *http.Request) { <-over }, func(c *client.Config) { c.Timeout = time.Second })
	t.Cleanup(func() { close(over) })
	_, err := c.Sign(t.Context(), "visit-1", &wire.SignRequest{Content: make([]byte, 12<<20)})
	if !errors.Is(err, context.DeadlineExceeded) || !client.OutcomeUnknown(err) {
		t.Errorf("err = %v", err)
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

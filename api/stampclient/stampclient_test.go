package stampclient_test

import (
	"bytes"
	"crypto/x509"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"testing"
	"time"

	"yinjian/api/stampclient"
	"yinjian/tsa/upstream"
)

func client(t *testing.T, c stampclient.Config) *stampclient.Client {
	t.Helper()
	if c.Now == nil {
		c.Now = time.Now
	}
	out, err := stampclient.New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { out.Close() })
	return out
}

// TestAsk: the request goes as it is, with the credentials configured, and to nobody else.
func TestAsk(t *testing.T) {
	t.Parallel()
	var elsewhere atomic.Int64
	mux := http.NewServeMux()
	mux.HandleFunc("POST /tsa", func(w http.ResponseWriter, r *http.Request) {
		b, err := io.ReadAll(r.Body)
		user, password, _ := r.BasicAuth()
		if err != nil || string(b) != "query" || r.Header.Get("Content-Type") != "application/timestamp-query" || user != "his" || password != "secret" {
			t.Errorf("%q, %s, %s:%s, %v", b, r.Header.Get("Content-Type"), user, password, err)
		}
		_, _ = w.Write([]byte("reply"))
	})
	mux.HandleFunc("/moved", func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "/elsewhere", http.StatusTemporaryRedirect)
	})
	mux.HandleFunc("/elsewhere", func(http.ResponseWriter, *http.Request) { elsewhere.Add(1) })
	mux.HandleFunc("/limit", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(make([]byte, 64<<10)) })
	mux.HandleFunc("/beyond", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(make([]byte, 64<<10+1)) })
	srv := httptest.NewServer(mux)
	t.Cleanup(srv.Close)
	c := client(t, stampclient.Config{URL: srv.URL + "/tsa", User: "his", Password: "secret"})
	for range 2 {
		if got, err := c.Ask(t.Context(), []byte("query")); err != nil || string(got) != "reply" {
			t.Errorf("%q, %v", got, err)
		}
	}
	if got, err := client(t, stampclient.Config{URL: srv.URL + "/limit"}).Ask(t.Context(), nil); err != nil || !bytes.Equal(got, make([]byte, 64<<10)) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	for path, want := range map[string]upstream.Reason{"/moved": upstream.BadStatus, "/none": upstream.BadStatus, "/beyond": upstream.TooLong} {
		_, err := client(t, stampclient.Config{URL: srv.URL + path}).Ask(t.Context(), []byte("query"))
		var e *upstream.Error
		if !errors.As(err, &e) || e.Reason != want {
			t.Errorf("%s: %v, want %s", path, err, want)
		}
	}
	if n := elsewhere.Load(); n != 0 {
		t.Errorf("a redirect was followed %d times", n)
	}
}

// TestTLS: the device's web server is held against the CAs configured, at the appliance's time.
func TestTLS(t *testing.T) {
	t.Parallel()
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("reply")) }))
	t.Cleanup(srv.Close)
	roots := x509.NewCertPool()
	roots.AddCert(srv.Certificate())
	later := func() time.Time { return srv.Certificate().NotAfter.Add(time.Hour) }
	for name, row := range map[string]struct {
		config stampclient.Config
		ok     bool
	}{
		"its CA":            {stampclient.Config{URL: srv.URL, Roots: roots}, true},
		"the system's CAs":  {stampclient.Config{URL: srv.URL}, false},
		"no CA":             {stampclient.Config{URL: srv.URL, Roots: x509.NewCertPool()}, false},
		"after its end":     {stampclient.Config{URL: srv.URL, Roots: roots, Now: later}, false},
		"plain to TLS port": {stampclient.Config{URL: "http" + srv.URL[len("https"):], Roots: roots}, false},
	} {
		if got, err := client(t, row.config).Ask(t.Context(), []byte("query")); (err == nil) != row.ok || row.ok && string(got) != "reply" {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
}

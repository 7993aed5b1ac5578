package api_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"io"
	"net/http"
	"strconv"
	"testing"

	"yinjian/api"
	"yinjian/api/wire"
	"yinjian/appliance/account"
)

// A sink is a ResponseWriter that keeps nothing.
type sink struct {
	header http.Header
	status int
}

func (w *sink) Header() http.Header         { return w.header }
func (w *sink) WriteHeader(status int)      { w.status = status }
func (w *sink) Write(p []byte) (int, error) { return len(p), nil }

// BenchmarkStamp is what the API adds to a token: everything between net/http and the unit.
func BenchmarkStamp(b *testing.B) {
	sv := newServices()
	reply := make([]byte, 1500)
	sv.respond = func(context.Context, string, string, []byte) ([]byte, error) { return reply, nil }
	s, err := api.New(api.Config{
		Signing: sv, Directory: sv, Stamps: sv, Tokens: sv, Health: sv, Admin: &admin{}, Accounts: newAccounts(), Clock: newClock(), Log: discard(), Version: "t",
		Limits: api.Limits{LoopbackRate: 100_000_000},
	})
	if err != nil {
		b.Fatal(err)
	}
	h := s.TSAPlainHandler()
	query := make([]byte, 60)
	body := bytes.NewReader(query)
	r, err := http.NewRequest(http.MethodPost, "/tsa/sm2", io.NopCloser(body))
	if err != nil {
		b.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/timestamp-query")
	r.ContentLength, r.RemoteAddr = int64(len(query)), "127.0.0.1:50000"
	b.ReportAllocs()
	for b.Loop() {
		body.Reset(query)
		w := sink{header: http.Header{}}
		h.ServeHTTP(&w, r)
		if w.status != http.StatusOK {
			b.Fatal(w.status)
		}
	}
}

// BenchmarkSign is what the API asks for beside the signing itself: body, HMAC, JSON in and out.
func BenchmarkSign(b *testing.B) {
	sv := newServices()
	s, err := api.New(api.Config{
		Signing: sv, Directory: sv, Stamps: sv, Tokens: sv, Health: sv, Admin: &admin{}, Accounts: newAccounts(), Clock: newClock(), Log: discard(), Version: "t",
		Limits: api.Limits{Rate: func(*account.Application) (int, int) { return 1_000_000, 1_000_000 }},
	})
	if err != nil {
		b.Fatal(err)
	}
	h := s.Handler()
	content := make([]byte, 2048)
	data, err := json.Marshal(wire.SignRequest{
		Signer: "D1001", Algorithm: "SM2", Form: "raw", Content: content, Role: "主治医师",
		Document: wire.Document{ID: "ZY1", Type: "note", MediaType: "text/plain"}, Consent: wire.Consent{Method: "app-asserted", Assertion: "x"},
	})
	if err != nil {
		b.Fatal(err)
	}
	r, err := http.NewRequest(http.MethodPost, "https://127.0.0.1/v1/sign", nil)
	if err != nil {
		b.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("Idempotency-Key", "visit-1")
	r.ContentLength, r.RemoteAddr, r.RequestURI, r.TLS = int64(len(data)), "127.0.0.1:50000", "/v1/sign", &tls.ConnectionState{Version: tls.VersionTLS13}
	at := newClock().Now().Time
	body := bytes.NewReader(data)
	n := 0
	b.ReportAllocs()
	for b.Loop() {
		n++
		a := wire.Authorization{App: "his", Time: strconv.FormatInt(at.UnixMilli(), 10), Nonce: "nonce-0123456789-" + strconv.Itoa(n)}
		a.MAC = wire.MAC(appKey, wire.Signable{Method: r.Method, Path: "/v1/sign", Host: r.URL.Host, Body: data}, a.App, a.Time, a.Nonce)
		r.Header.Set("Authorization", a.String())
		body.Reset(data)
		r.Body = io.NopCloser(body)
		w := sink{header: http.Header{}}
		h.ServeHTTP(&w, r)
		if w.status != http.StatusOK {
			b.Fatal(w.status)
		}
	}
}

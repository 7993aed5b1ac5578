package api_test

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"testing"

	"yinjian/api"
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

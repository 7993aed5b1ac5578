package peer_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"yinjian/api"
	"yinjian/api/peer"
	"yinjian/appliance/audit"
)

// An identity is a key with a certificate that nobody looks at.
type identity struct {
	cert tls.Certificate
	spki []byte
}

func newIdentity(t testing.TB) *identity {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: big.NewInt(1)}, &x509.Certificate{}, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &identity{tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, c.RawSubjectPublicKeyInfo}
}

func (i *identity) certificate() (*tls.Certificate, error) { return &i.cert, nil }

// service answers as its fields say.
type service struct {
	feed   func(context.Context, peer.Query) (*peer.Feed, error)
	cosign func(*peer.CosignRequest) (*peer.Cosigned, error)
}

func (s *service) Feed(ctx context.Context, q peer.Query) (*peer.Feed, error) { return s.feed(ctx, q) }
func (s *service) Cosign(_ context.Context, r *peer.CosignRequest) (*peer.Cosigned, error) {
	return s.cosign(r)
}
func (s *service) Seen(context.Context) (*peer.Seen, error) {
	return nil, errors.New("a table by name of secret")
}

func quiet() *logrus.Logger {
	log := logrus.New()
	log.SetOutput(io.Discard)
	return log
}

// listen serves s as server to whoever has the key that pin answers.
func listen(t *testing.T, s peer.Service, server *identity, pin func() []byte) string {
	t.Helper()
	ln, err := peer.Listen("127.0.0.1:0", server.certificate, pin)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- api.Serve(ctx, peer.NewServer(s, pin, quiet()), ln, time.Second) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return ln.Addr().String()
}

func client(t *testing.T, address string, own *identity, spki []byte) *peer.Client {
	t.Helper()
	c := peer.NewClient(peer.ClientConfig{Address: address, Certificate: own.certificate, SPKI: spki})
	t.Cleanup(c.Close)
	return c
}

func TestOnlyThePinnedKeysSpeak(t *testing.T) {
	t.Parallel()
	a, b, stranger := newIdentity(t), newIdentity(t), newIdentity(t)
	var pin atomic.Pointer[[]byte]
	pin.Store(&a.spki)
	var asked atomic.Int32
	want := peer.Query{Epoch: audit.Epoch{1}, After: 7, Size: 9, Wait: 3 * time.Second}
	s := &service{feed: func(_ context.Context, q peer.Query) (*peer.Feed, error) {
		asked.Add(1)
		if q != want {
			t.Errorf("the query arrived as %+v", q)
		}
		return &peer.Feed{Through: 9, Entries: []peer.Entry{{DER: []byte{1}, Payloads: map[string][]byte{"object": {2}}}}}, nil
	}}
	address := listen(t, s, b, func() []byte { return *pin.Load() })
	c := client(t, address, a, b.spki)
	f, err := c.Feed(t.Context(), want)
	if err != nil || f.Through != 9 || len(f.Entries) != 1 || f.Entries[0].Payloads["object"][0] != 2 {
		t.Fatalf("Feed = %+v, %v", f, err)
	}
	if _, err := client(t, address, stranger, b.spki).Feed(t.Context(), want); err == nil {
		t.Error("a stranger's key is let in")
	}
	if _, err := client(t, address, a, stranger.spki).Feed(t.Context(), want); !errors.Is(err, peer.ErrPin) {
		t.Errorf("another server's key: %v, want %v", err, peer.ErrPin)
	}
	bare := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}, Timeout: 10 * time.Second}
	defer bare.CloseIdleConnections()
	if r, err := bare.Get("https://" + address + "/peer/v1/seen"); err == nil {
		r.Body.Close()
		t.Error("somebody without a certificate is let in")
	}
	// A pairing that ends, ends for connections that stand.
	pin.Store(&stranger.spki)
	if _, err := c.Feed(t.Context(), want); !peer.IsRefusal(err, peer.NotPaired) {
		t.Errorf("over the old connection: %v, want %s", err, peer.NotPaired)
	}
	none := []byte{}
	pin.Store(&none)
	if _, err := client(t, address, a, b.spki).Feed(t.Context(), want); err == nil {
		t.Error("somebody is let in where nobody is paired")
	}
	if n := asked.Load(); n != 1 {
		t.Errorf("the service was asked %d times, want once", n)
	}
}

func TestRefusalsAndFaults(t *testing.T) {
	t.Parallel()
	a, b := newIdentity(t), newIdentity(t)
	s := &service{
		cosign: func(r *peer.CosignRequest) (*peer.Cosigned, error) {
			refusal := peer.Refuse(peer.Behind, "begin at 41")
			refusal.Size = 41
			return nil, refusal
		},
	}
	c := client(t, listen(t, s, b, func() []byte { return a.spki }), a, b.spki)
	_, err := c.Cosign(t.Context(), &peer.CosignRequest{})
	var refusal *peer.Refusal
	if !errors.As(err, &refusal) || refusal.Code != peer.Behind || refusal.Size != 41 {
		t.Errorf("Cosign = %v, want a refusal with the size", err)
	}
	if _, err := c.Seen(t.Context()); !peer.IsRefusal(err, peer.Unable) || strings.Contains(err.Error(), "secret") {
		t.Errorf("Seen = %v, want %s, and nothing of the fault", err, peer.Unable)
	}
	if _, err := c.Cosign(t.Context(), &peer.CosignRequest{Checkpoint: peer.Head{Note: make([]byte, 1<<20)}}); !peer.IsRefusal(err, peer.Malformed) {
		t.Errorf("a large request: %v, want %s", err, peer.Malformed)
	}
}

// What a peer that is broken or in other hands answers costs the asking side a bounded amount of time and memory.
func TestHostileAnswers(t *testing.T) {
	t.Parallel()
	a, b := newIdentity(t), newIdentity(t)
	release := make(chan struct{})
	defer close(release)
	for name, answer := range map[string]http.HandlerFunc{
		"no JSON":      func(w http.ResponseWriter, _ *http.Request) { w.Write([]byte("\x00garbage")) },
		"another type": func(w http.ResponseWriter, _ *http.Request) { w.Write([]byte(`{"checkpoint":"x"}`)) },
		"a redirect": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://example.org/", http.StatusFound)
		},
		"an odd status": func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusTeapot) },
		"a wrong refusal": func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(409)
			w.Write([]byte(`{"code":"not_paired"}`))
		},
		"two gigabytes": func(w http.ResponseWriter, _ *http.Request) {
			for chunk := bytes.Repeat([]byte(" "), 1<<20); ; {
				if _, err := w.Write(chunk); err != nil {
					return
				}
			}
		},
		"silence": func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() },
		"half an answer": func(w http.ResponseWriter, r *http.Request) {
			w.Write([]byte(`{`))
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ln, err := peer.Listen("127.0.0.1:0", b.certificate, func() []byte { return a.spki })
			if err != nil {
				t.Fatal(err)
			}
			srv := &http.Server{Handler: answer}
			go srv.Serve(ln)
			defer srv.Close()
			c := client(t, ln.Addr().String(), a, b.spki)
			ctx, cancel := context.WithCancel(t.Context())
			if name == "silence" || name == "half an answer" { // ended by the caller here, by the limit otherwise
				time.AfterFunc(200*time.Millisecond, cancel)
			}
			defer cancel()
			if _, err := c.Seen(ctx); err == nil {
				t.Error("taken")
			}
		})
	}
	// Values of three bytes, each of which takes fifty in memory.
	t.Run("many small values", func(t *testing.T) {
		var body atomic.Value
		srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.Write(body.Load().([]byte)) }))
		ln, err := peer.Listen("127.0.0.1:0", b.certificate, func() []byte { return a.spki })
		if err != nil {
			t.Fatal(err)
		}
		srv.Listener.Close()
		srv.Listener = ln
		srv.Start()
		defer srv.Close()
		c := client(t, ln.Addr().String(), a, b.spki)
		for _, of := range []string{`{"entries":[{}`, `{"entries":[{"proof":[""`, `{"consistency":[""`, `{"entries":[{"payloads":{"a":""`} {
			one := of[strings.LastIndexAny(of, "[{")+1:]
			if one == "}" {
				one = "{}"
			}
			body.Store([]byte(of + strings.Repeat(","+one, 1<<20)))
			if _, err := c.Feed(t.Context(), peer.Query{}); err == nil || !strings.Contains(err.Error(), "values") {
				t.Errorf("%s…: %v", of, err)
			}
		}
	})
	t.Run("no TLS at all", func(t *testing.T) {
		t.Parallel()
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		go func() {
			for {
				conn, err := ln.Accept()
				if err != nil {
					return
				}
				conn.Write([]byte("220 ready\r\n"))
				conn.Close()
			}
		}()
		if _, err := client(t, ln.Addr().String(), a, b.spki).Seen(t.Context()); err == nil {
			t.Error("taken")
		}
	})
}

// More requests than there are places are refused at once.
func TestBusy(t *testing.T) {
	t.Parallel()
	a, b := newIdentity(t), newIdentity(t)
	entered, release := make(chan struct{}, 64), make(chan struct{})
	s := &service{feed: func(ctx context.Context, _ peer.Query) (*peer.Feed, error) {
		entered <- struct{}{}
		<-release
		return &peer.Feed{}, nil
	}}
	address := listen(t, s, b, func() []byte { return a.spki })
	done := make(chan error, 8)
	for range 8 {
		c := client(t, address, a, b.spki)
		go func() { _, err := c.Feed(t.Context(), peer.Query{}); done <- err }()
	}
	// Eight connections of one address are let in, each with a request of its own.
	for range 8 {
		<-entered
	}
	c := client(t, address, a, b.spki)
	if _, err := c.Feed(t.Context(), peer.Query{}); err == nil {
		t.Error("the ninth was answered")
	}
	close(release)
	for range 8 {
		if err := <-done; err != nil && !errors.Is(err, io.EOF) && !strings.Contains(err.Error(), "reset") {
			t.Error(err)
		}
	}
}

// What is read as an answer is bounded in its parts too.
func TestPartsOfAnAnswer(t *testing.T) {
	t.Parallel()
	long := make([][]byte, 65)
	for i := range long {
		long[i] = make([]byte, 32)
	}
	if _, err := (&peer.Feed{Consistency: long}).Proof(); err == nil {
		t.Error("a proof of 65 hashes is taken")
	}
	if _, err := (&peer.Feed{Consistency: [][]byte{make([]byte, 31)}}).Proof(); err == nil {
		t.Error("a hash of 31 bytes is taken")
	}
	if _, err := (&peer.Feed{Entries: make([]peer.Entry, peer.MaxEntries+1)}).Foreign("a", audit.Epoch{}, &audit.Checkpoint{}); err == nil {
		t.Error("too many entries are taken")
	}
	if _, err := (&peer.Feed{Entries: []peer.Entry{{DER: []byte{0x30, 0}}}}).Foreign("a", audit.Epoch{}, &audit.Checkpoint{}); err == nil {
		t.Error("an entry that is none is taken")
	}
	full := &peer.Feed{Entries: []peer.Entry{{Payloads: map[string][]byte{"object": make([]byte, 9<<20)}}}}
	if !full.Full() || (&peer.Feed{}).Full() {
		t.Error("Full is wrong")
	}
	b, err := json.Marshal(full)
	if err != nil || len(b) > 96<<20 {
		t.Errorf("a full answer has %d bytes, %v", len(b), err)
	}
}

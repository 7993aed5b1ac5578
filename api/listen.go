package api

import (
	"bytes"
	"context"
	"crypto"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	stdlog "log"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"time"

	"github.com/sirupsen/logrus"
)

const (
	headerTime  = 5 * time.Second  // to send the header, and for the TLS handshake
	bodyTime    = 30 * time.Second // to send header and body: 16 MiB at 4.5 Mbit/s
	answerTime  = 90 * time.Second // from the header's end to the answer's: body, handling, sending
	idleTime    = 60 * time.Second
	headerBytes = 16 << 10
)

// NewHTTPServer is an http.Server for one of the handlers with every time and size bounded: a client that sends or
// reads too slowly loses its connection.
func (s *Server) NewHTTPServer(h http.Handler) *http.Server { return s.newHTTPServer(h) }

func (s *Server) newHTTPServer(h http.Handler) *http.Server {
	return &http.Server{
		Handler:           h,
		ReadHeaderTimeout: headerTime,
		ReadTimeout:       bodyTime,
		WriteTimeout:      answerTime,
		IdleTimeout:       idleTime,
		MaxHeaderBytes:    headerBytes,
		ConnState:         connState,
		ConnContext:       connContext,
		// "OPTIONS *" is answered by our handlers, like anything else.
		DisableGeneralOptionsHandler: true,
		ErrorLog:                     stdlog.New(debugWriter{s.cfg.Log}, "", 0),
		// HTTP/1.1 only: one request a connection at a time is what the limits count. See ListenTLS.
		TLSNextProto: map[string]func(*http.Server, *tls.Conn, http.Handler){},
	}
}

// debugWriter takes net/http's own lines: failed handshakes, mostly scanners.
type debugWriter struct{ log logrus.FieldLogger }

func (w debugWriter) Write(p []byte) (int, error) {
	w.log.WithField("error", string(bytes.TrimSpace(p))).Debug("http server")
	return len(p), nil
}

// oldSuites are the cipher suites of TLS 1.2 that are offered: ECDHE for forward secrecy, AEAD because CBC's padding is
// an old wound (RFC 9325 §4.2). TLS 1.3 chooses its own.
var oldSuites = []uint16{
	tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
	tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384, tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
	tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256, tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
}

// MaxHandshakes is how many handshakes wait for the cipher machine at once: five hundred stations behind one address that
// connect in one moment get through, and leave as many places to others. A machine that does not answer holds up no more
// than this, and whoever comes then is refused at once instead of after its deadline.
const MaxHandshakes = 1024

// An addressKey is the listener's key for one address, which has its share of the places alone.
type addressKey struct {
	crypto.Signer
	places *shares[netip.Prefix]
	from   netip.Prefix
}

var errHandshakes = errors.New("api: too many TLS handshakes of this address wait for the cipher machine")

func (k addressKey) Sign(rand io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if !k.places.take(k.from, 1) {
		return nil, errHandshakes
	}
	defer k.places.give(k.from, 1)
	return k.Signer.Sign(rand, digest, opts)
}

// ListenTLS listens on addr for TLS 1.3 (RFC 8446) and HTTP/1.1; with tls12 for TLS 1.2 (RFC 5246) too, with ECDHE and
// AEAD alone, and never for anything older. certificate is asked at each full handshake, so it may be another each time;
// it has the certificate and its key from the start. Sessions are resumed by tickets, under keys that are in memory
// alone, change daily and are forgotten after seven days (crypto/tls's own): a restart forgets them. Time is clock's. At
// most connections are open at once, and a quarter of them from one address, as [Limited] has it. While ask, if there is one,
// says so, clients are asked for a certificate and may go without; whoever shows one has its key, and nothing else of it is judged here.
func ListenTLS(addr string, certificate func() *tls.Certificate, clock Clock, tls12 bool, ask func() bool, connections int) (net.Listener, error) {
	if cert := certificate(); cert == nil || len(cert.Certificate) == 0 || cert.PrivateKey == nil {
		return nil, errors.New("api: TLS certificate or key missing")
	}
	handshakes := newShares[netip.Prefix](MaxHandshakes)
	cfg := &tls.Config{
		GetCertificate: func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
			c := *certificate()
			if key, ok := c.PrivateKey.(crypto.Signer); ok {
				c.PrivateKey = addressKey{key, handshakes, addressOf(hello.Conn.RemoteAddr().String())}
			}
			return &c, nil
		},
		MinVersion: tls.VersionTLS13,
		Time:       func() time.Time { return clock.Now().Time },
		NextProtos: []string{"http/1.1"},
	}
	if tls12 {
		cfg.MinVersion, cfg.CipherSuites = tls.VersionTLS12, oldSuites
	}
	if ask != nil {
		asking := asks(cfg)
		cfg.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
			if ask() {
				return asking, nil
			}
			return nil, nil
		}
	}
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("api: listening: %w", err)
	}
	return tls.NewListener(Limited(ln, connections, max(1, connections/4)), cfg), nil
}

// asked marks the tickets of clients that were asked for a certificate.
var asked = []byte("yinjian: asked for a certificate")

// asks is cfg asking for certificates. A session of a client that was not asked is not resumed: it would go without one for
// as long as its ticket lasts.
func asks(cfg *tls.Config) *tls.Config {
	c := cfg.Clone()
	c.ClientAuth = tls.RequestClientCert
	c.WrapSession = func(conn tls.ConnectionState, session *tls.SessionState) ([]byte, error) {
		session.Extra = append(session.Extra, asked)
		return cfg.EncryptTicket(conn, session)
	}
	c.UnwrapSession = func(identity []byte, conn tls.ConnectionState) (*tls.SessionState, error) {
		session, err := cfg.DecryptTicket(identity, conn)
		if err != nil || session == nil || !slices.ContainsFunc(session.Extra, func(b []byte) bool { return bytes.Equal(b, asked) }) {
			return nil, err
		}
		return session, nil
	}
	return c
}

// ListenPlain listens without TLS for at most connections at once: on a loopback address, or with open on any, where a
// quarter of the connections may be from one address; the handler then refuses whoever is no listed source.
func ListenPlain(addr string, open bool, connections int) (net.Listener, error) {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, fmt.Errorf("api: listening: %w", err)
	}
	if !open && !IsLoopback(host) {
		return nil, fmt.Errorf("api: %s is not a loopback address, plain HTTP is not offered there", addr)
	}
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("api: listening: %w", err)
	}
	if IsLoopback(host) {
		return Limited(ln, connections, connections), nil
	}
	return Limited(ln, connections, max(1, connections/4)), nil
}

// IsLoopback says whether host is a loopback address, and no name that could mean another.
func IsLoopback(host string) bool {
	ip := net.ParseIP(host)
	return ip != nil && ip.IsLoopback()
}

// Serve serves ln until ctx ends, then lets running requests finish for at most drain, and answers nil. Another error
// is the listener's. Requests that are not done by then are cut off, and their contexts end; their handlers may run on for
// a moment after Serve has returned, and answer nobody.
func Serve(ctx context.Context, srv *http.Server, ln net.Listener, drain time.Duration) error {
	stopped := make(chan error, 1)
	served := make(chan struct{})
	go func() {
		select {
		case <-ctx.Done():
		case <-served: // the listener failed by itself
			stopped <- nil
			return
		}
		// ctx has ended: the drain needs its own.
		drained, cancel := context.WithTimeout(context.WithoutCancel(ctx), drain)
		defer cancel()
		err := srv.Shutdown(drained)
		if errors.Is(err, context.DeadlineExceeded) {
			err = srv.Close() // connections are cut; the contexts of their requests end
		}
		stopped <- err
	}()
	err := srv.Serve(ln)
	close(served)
	stopErr := <-stopped
	if errors.Is(err, http.ErrServerClosed) {
		err = stopErr
	}
	if err != nil {
		return fmt.Errorf("api: serving %s: %w", ln.Addr(), err)
	}
	return nil
}

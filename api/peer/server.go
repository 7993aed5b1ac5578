package peer

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	stdlog "log"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/sirupsen/logrus"

	"yinjian/api"
	"yinjian/appliance/audit"
)

// A Query asks for entries of the directory.
type Query struct {
	Epoch audit.Epoch   // that the answering side's journal should be in
	After uint64        // entries from this number on
	Size  uint64        // of the answering side's newest tree that the caller has verified; 0: none
	Wait  time.Duration // how long to wait if there is nothing; at most MaxWait
}

// MaxWait is the longest long poll.
const MaxWait = 30 * time.Second

// A Service answers the other appliance. Errors that are no [*Refusal] are logged and answered as [Unable]. Safe for
// concurrent use.
type Service interface {
	Feed(ctx context.Context, q Query) (*Feed, error)
	Cosign(ctx context.Context, r *CosignRequest) (*Cosigned, error)
	Seen(ctx context.Context) (*Seen, error)
}

const (
	connections = 16 // at once
	requests    = 8  // at once: one long poll, one cosignature, and those of connections that the other side has given up
	headerTime  = 5 * time.Second
	readTime    = 15 * time.Second
	sendTime    = 60 * time.Second // an answer of maxAnswer at 13 Mbit/s
	idleTime    = 2 * time.Minute
	headerBytes = 8 << 10
)

// Listen listens on addr for the other appliance: TLS 1.3, and a client certificate whose key is the one that spki answers
// at that moment (DER of SubjectPublicKeyInfo; empty: nobody is let in). certificate is asked at each handshake.
func Listen(addr string, certificate func() (*tls.Certificate, error), spki func() []byte) (net.Listener, error) {
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("peer: listening: %w", err)
	}
	cfg := &tls.Config{
		MinVersion:       tls.VersionTLS13,
		GetCertificate:   func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return certificate() },
		ClientAuth:       tls.RequireAnyClientCert,
		VerifyConnection: pinned(spki),
		NextProtos:       []string{"http/1.1"},
		// A session that is resumed would outlive a pairing.
		SessionTicketsDisabled: true,
	}
	return tls.NewListener(api.Limited(ln, connections, connections/2), cfg), nil
}

// NewServer is an http.Server for one of [Listen]'s listeners, with every time and size bounded. A connection ends when
// spki answers another key than the one it began with.
func NewServer(s Service, spki func() []byte, log logrus.FieldLogger) *http.Server {
	places := make(chan struct{}, requests)
	check := pinned(spki)
	handle := func(do func(r *http.Request) (any, error)) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			var answer any
			err := error(Refuse(NotPaired, "no pairing with this key"))
			if r.TLS != nil && check(*r.TLS) == nil {
				select {
				case places <- struct{}{}:
					answer, err = do(r)
					<-places
				default:
					err = Refuse(Busy, "more than %d requests at once", requests)
				}
			}
			if r.Context().Err() != nil {
				return // nobody waits for it
			}
			send(w, r, answer, err, log)
		}
	}
	mux := http.NewServeMux()
	mux.Handle("GET /peer/v1/feed", handle(func(r *http.Request) (any, error) {
		q, err := parseQuery(r.URL.Query())
		if err != nil {
			return nil, err
		}
		return s.Feed(r.Context(), q)
	}))
	mux.Handle("POST /peer/v1/cosign", handle(func(r *http.Request) (any, error) {
		var req CosignRequest
		body, err := io.ReadAll(io.LimitReader(r.Body, maxRequest+1))
		if err == nil && len(body) > maxRequest {
			err = errors.New("too large")
		}
		if err == nil {
			err = json.Unmarshal(body, &req)
		}
		if err != nil {
			return nil, Refuse(Malformed, "the body: %v", err)
		}
		return s.Cosign(r.Context(), &req)
	}))
	mux.Handle("GET /peer/v1/seen", handle(func(r *http.Request) (any, error) { return s.Seen(r.Context()) }))
	return &http.Server{
		Handler: mux, ReadHeaderTimeout: headerTime, ReadTimeout: readTime, WriteTimeout: MaxWait + sendTime, IdleTimeout: idleTime,
		MaxHeaderBytes: headerBytes, ErrorLog: stdlog.New(debugWriter{log}, "", 0),
		TLSNextProto: map[string]func(*http.Server, *tls.Conn, http.Handler){}, // HTTP/1.1 only
	}
}

// debugWriter takes net/http's own lines: failed handshakes, mostly scanners.
type debugWriter struct{ log logrus.FieldLogger }

func (w debugWriter) Write(p []byte) (int, error) {
	w.log.WithField("error", string(p)).Debug("peer listener")
	return len(p), nil
}

var statuses = map[string]int{
	Malformed: http.StatusBadRequest, NotPaired: http.StatusForbidden, OtherEpoch: http.StatusGone, Behind: http.StatusConflict,
	SplitView: http.StatusUnprocessableEntity, OlderHead: http.StatusUnprocessableEntity, Busy: http.StatusTooManyRequests, Unable: http.StatusServiceUnavailable,
}

func send(w http.ResponseWriter, r *http.Request, answer any, err error, log logrus.FieldLogger) {
	status := http.StatusOK
	if err != nil {
		var refusal *Refusal
		if !errors.As(err, &refusal) {
			log.WithError(err).WithField("path", r.URL.Path).Warning("the other campus was not answered")
			refusal = Refuse(Unable, "not just now")
		}
		answer, status = refusal, statuses[refusal.Code]
	}
	body, err := json.Marshal(answer)
	if err != nil {
		log.WithError(err).Error("an answer to the other campus could not be written as JSON")
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(status)
	_, _ = w.Write(body) // a line that breaks is the asking side's to see
}

func parseQuery(v url.Values) (q Query, err error) {
	bad := func(name string) error { return Refuse(Malformed, "%s", name) }
	if q.Epoch, err = audit.ParseEpoch(v.Get("epoch")); err != nil {
		return q, bad("epoch")
	}
	if q.After, err = strconv.ParseUint(v.Get("after"), 10, 63); err != nil {
		return q, bad("after")
	}
	if q.Size, err = strconv.ParseUint(v.Get("size"), 10, 63); err != nil {
		return q, bad("size")
	}
	ms, err := strconv.ParseUint(v.Get("wait_ms"), 10, 31)
	if err != nil {
		return q, bad("wait_ms")
	}
	q.Wait = min(time.Duration(ms)*time.Millisecond, MaxWait)
	return q, nil
}

func (q *Query) values() url.Values {
	return url.Values{
		"epoch": {q.Epoch.String()}, "after": {strconv.FormatUint(q.After, 10)}, "size": {strconv.FormatUint(q.Size, 10)},
		"wait_ms": {strconv.FormatInt(q.Wait.Milliseconds(), 10)},
	}
}

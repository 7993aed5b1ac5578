package client

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"yinjian/api/wire"
)

// A Restore calls a machine that waits for a backup. Whose certificate it is, no CA says: the fingerprint on the machine's
// console does. It is safe for concurrent use.
type Restore struct {
	http  *http.Client
	base  string
	token string
}

// ErrFingerprint means that the certificate is not the one whose fingerprint stands on the console: nothing was sent.
var ErrFingerprint = errors.New("证书与控制台上的指纹不符，什么也没有发送 (the certificate is not the one of the fingerprint; nothing was sent)")

// NewRestore calls https://host:port, whose certificate has this fingerprint: SHA-256 of its DER, 32 bytes.
func NewRestore(baseURL string, fingerprint []byte, token string) *Restore {
	return &Restore{
		base: strings.TrimSuffix(baseURL, "/"), token: token,
		http: &http.Client{Transport: &http.Transport{TLSClientConfig: Pinned(fingerprint), IdleConnTimeout: 30 * time.Second}},
	}
}

// Pinned believes the certificate with this fingerprint and no other, whatever it says of itself: SHA-256 of its DER, 32 bytes, as
// it stands on the machine's console. With another the handshake fails with [ErrFingerprint].
func Pinned(fingerprint []byte) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13, InsecureSkipVerify: true, // the fingerprint is what is believed, at each handshake
		VerifyConnection: func(s tls.ConnectionState) error {
			if len(s.PeerCertificates) == 0 {
				return ErrFingerprint
			}
			sum := sha256.Sum256(s.PeerCertificates[0].Raw)
			if subtle.ConstantTimeCompare(sum[:], fingerprint) != 1 {
				return ErrFingerprint
			}
			return nil
		},
	}
}

// Close drops idle connections.
func (r *Restore) Close() { r.http.CloseIdleConnections() }

// State answers what the machine is doing.
func (r *Restore) State(ctx context.Context) (*wire.RestoreState, error) {
	out := new(wire.RestoreState)
	return out, r.call(ctx, call{method: http.MethodGet, path: "/restore/v1", takes: "application/json"}, nil, 0, out)
}

// Send sends a file of size bytes as it is read.
func (r *Restore) Send(ctx context.Context, name string, file io.Reader, size int64) (*wire.RestoreFile, error) {
	out := new(wire.RestoreFile)
	return out, r.call(ctx, call{method: http.MethodPost, path: "/restore/v1/files/" + url.PathEscape(name), gives: "application/octet-stream", takes: "application/json"}, file, size, out)
}

// Begin has the files restored; the answer is the state then, and State says what comes of it.
func (r *Restore) Begin(ctx context.Context, req wire.BeginRestore) (*wire.RestoreState, error) {
	body, err := json.Marshal(req)
	if err != nil {
		return nil, fmt.Errorf("client: encoding request: %w", err)
	}
	out := new(wire.RestoreState)
	return out, r.call(ctx, call{method: http.MethodPost, path: "/restore/v1", body: body, gives: "application/json", takes: "application/json"}, nil, 0, out)
}

func (r *Restore) call(ctx context.Context, one call, file io.Reader, size int64, out any) error {
	req, err := newRequest(ctx, r.base, one)
	if err != nil {
		return err
	}
	if file != nil {
		req.Body, req.ContentLength = io.NopCloser(file), size
	}
	req.Header.Set("Authorization", "Bearer "+r.token)
	data, err := roundTrip(r.http, req, one)
	var no *refusal
	if errors.As(err, &no) {
		return no.error(no.unknown)
	}
	if err != nil {
		return err
	}
	return decode(data, out)
}

package peer

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"
)

// ClientConfig says whom to ask. All fields are required.
type ClientConfig struct {
	Address     string // host:port
	Certificate func() (*tls.Certificate, error)
	SPKI        []byte // of the other side's key, DER of SubjectPublicKeyInfo
}

// A Client asks the other appliance. Safe for concurrent use.
type Client struct {
	cfg  ClientConfig
	http *http.Client
}

const (
	dialTime   = 5 * time.Second
	beginTime  = 5 * time.Second  // from the request, or the end of its wait, to the beginning of the answer
	answerTime = 15 * time.Second // from the request to the end of a small answer; a feed has its wait and sendTime
)

// NewClient makes a client. It connects when it is used.
func NewClient(cfg ClientConfig) *Client {
	return &Client{cfg: cfg, http: &http.Client{
		Transport: &http.Transport{
			// A line that has gone without a word is noticed while nothing is sent over it.
			DialContext: (&net.Dialer{Timeout: dialTime, KeepAliveConfig: net.KeepAliveConfig{
				Enable: true, Idle: 2 * time.Second, Interval: 2 * time.Second, Count: 3,
			}}).DialContext,
			TLSHandshakeTimeout: dialTime,
			TLSClientConfig: &tls.Config{
				MinVersion: tls.VersionTLS13,
				// Names and issuers mean nothing here: the key is the one agreed on, or it is not.
				InsecureSkipVerify:   true,
				VerifyConnection:     pinned(func() []byte { return cfg.SPKI }),
				GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cfg.Certificate() },
			},
			MaxIdleConnsPerHost: 2, IdleConnTimeout: idleTime, MaxResponseHeaderBytes: headerBytes, DisableCompression: true,
			Proxy: nil,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return errors.New("peer: a redirect") },
	}}
}

// Close closes idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Feed asks for entries of the directory and waits as long as q says.
func (c *Client) Feed(ctx context.Context, q Query) (*Feed, error) {
	var f Feed
	return &f, c.ask(ctx, "GET", "feed?"+q.values().Encode(), nil, q.Wait, q.Wait+sendTime, maxAnswer, &f)
}

// Cosign asks for a cosignature.
func (c *Client) Cosign(ctx context.Context, r *CosignRequest) (*Cosigned, error) {
	var s Cosigned
	return &s, c.ask(ctx, "POST", "cosign", r, 0, answerTime, maxSmall, &s)
}

// Seen asks what was cosigned last of the asking side's log.
func (c *Client) Seen(ctx context.Context) (*Seen, error) {
	var s Seen
	return &s, c.ask(ctx, "GET", "seen", nil, 0, answerTime, maxSmall, &s)
}

// ask makes one request, whose answer must begin within wait and beginTime, and all of which must be over within limit. The
// answer has most bytes at the most.
func (c *Client) ask(ctx context.Context, method, path string, body any, wait, limit time.Duration, most int64, answer any) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	var sent io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return err
		}
		sent = bytes.NewReader(b)
	}
	r, err := http.NewRequestWithContext(ctx, method, "https://"+c.cfg.Address+"/peer/v1/"+path, sent)
	if err != nil {
		return fmt.Errorf("peer: %w", err)
	}
	silent := time.AfterFunc(dialTime+wait+beginTime, cancel)
	resp, err := c.http.Do(r)
	if !silent.Stop() && err != nil {
		err = fmt.Errorf("no answer within %v: %w", dialTime+wait+beginTime, err)
	}
	if err != nil {
		return fmt.Errorf("peer: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		most = maxSmall
	}
	b, err := io.ReadAll(io.LimitReader(resp.Body, most+1))
	if err != nil {
		return fmt.Errorf("peer: %s: reading the answer: %w", path, err)
	}
	if int64(len(b)) > most {
		return fmt.Errorf("peer: %s: an answer of more than %d bytes", path, most)
	}
	if n := values(b); n > maxValues {
		return fmt.Errorf("peer: %s: an answer of %d values, at most %d are taken", path, n, maxValues)
	}
	if resp.StatusCode != http.StatusOK {
		refusal := new(Refusal)
		if err := json.Unmarshal(b, refusal); err != nil || statuses[refusal.Code] != resp.StatusCode {
			return fmt.Errorf("peer: %s: status %d", path, resp.StatusCode)
		}
		return refusal
	}
	if err := json.Unmarshal(b, answer); err != nil {
		return fmt.Errorf("peer: %s: the answer: %w", path, err)
	}
	return nil
}

// values counts the values in a JSON text, or somewhat more. A value of three bytes takes dozens in memory: what bounds the
// bytes alone bounds nothing.
func values(b []byte) int {
	n, quoted := 1, false
	for i := 0; i < len(b); i++ {
		switch c := b[i]; {
		case quoted && c == '\\':
			i++
		case c == '"':
			quoted = !quoted
		case !quoted && (c == ',' || c == '[' || c == '{'):
			n++
		}
	}
	return n
}

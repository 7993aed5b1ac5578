package notify

import (
	"bytes"
	"context"
	"crypto/hmac"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"time"

	"github.com/emmansun/gmsm/sm3"
	"github.com/sirupsen/logrus"
)

// Webhook is a receiver of HTTP POST requests.
type Webhook struct {
	URL string // https; with Insecure also http
	// Insecure lets messages go in the clear. They are authenticated all the same.
	Insecure bool
	Key      []byte // of HMAC-SM3, at least 16 bytes
	TLS      TLS
	// Backoff is the pause after the first attempt that failed; 0: a second. It doubles.
	Backoff time.Duration
}

// Headers of a request. HeaderSignature is "hmac-sm3=" and, in hexadecimal, HMAC-SM3 over the value of HeaderTime, a line
// feed, and the body.
const (
	HeaderTime      = "X-Yinjian-Time" // RFC 3339, when this attempt was made
	HeaderSignature = "X-Yinjian-Signature"
)

const (
	webhookAttempts = 6 // with pauses of half a minute in all
	minWebhookKey   = 16
)

// Check is nil for what [NewWebhook] takes, the key aside.
func (w *Webhook) Check() error {
	u, err := url.Parse(w.URL)
	switch {
	case err != nil || u.Host == "" || u.User != nil || u.Fragment != "":
		return errors.New("want https://…, without user and password")
	case u.Scheme == "https", u.Scheme == "http" && w.Insecure:
		return nil
	case u.Scheme == "http":
		return errors.New("明文须写明 insecure = true (in the clear only with insecure = true)")
	}
	return errors.New("want https://…")
}

// NewWebhook makes a receiver. A message is tried six times.
func NewWebhook(w Webhook, log logrus.FieldLogger) (*Receiver, error) {
	if err := w.Check(); err != nil {
		return nil, fmt.Errorf("notify: webhook: %w", err) // the address may hold a token
	}
	if len(w.Key) < minWebhookKey {
		return nil, fmt.Errorf("notify: webhook: 密钥至少 %d 字节 (the key has at least %d bytes)", minWebhookKey, minWebhookKey)
	}
	u, err := url.Parse(w.URL)
	if err != nil {
		return nil, fmt.Errorf("notify: webhook: %w", err)
	}
	config := w.TLS.config(u.Hostname())
	r := newReceiver("webhook "+u.Scheme+"://"+u.Host, webhookAttempts, &webhook{cfg: w, http: &http.Client{
		Transport: &http.Transport{
			TLSClientConfig: config, MaxConnsPerHost: 1, IdleConnTimeout: time.Minute, MaxResponseHeaderBytes: 16 << 10, DisableCompression: true,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}, log)
	if w.Backoff > 0 {
		r.backoff = w.Backoff
	}
	return r, nil
}

type webhook struct {
	cfg  Webhook
	http *http.Client
}

func (w *webhook) send(ctx context.Context, m *Message, dropped uint64) error {
	body, err := json.Marshal(struct {
		*Message
		Dropped uint64 `json:"dropped"` // messages that were lost before this one
	}{m, dropped})
	if err != nil {
		return fmt.Errorf("notify: webhook: %w", err)
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, w.cfg.URL, bytes.NewReader(body))
	if err != nil {
		return errors.New("notify: webhook: the address is not usable")
	}
	at := w.cfg.TLS.Now().UTC().Format(time.RFC3339)
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set(HeaderTime, at)
	r.Header.Set(HeaderSignature, "hmac-sm3="+hex.EncodeToString(Authenticate(w.cfg.Key, at, body)))
	resp, err := w.http.Do(r)
	if err != nil {
		var e *url.Error // its text has the address, and that may hold a token
		if errors.As(err, &e) {
			err = e.Err
		}
		return fmt.Errorf("notify: webhook: %w", err)
	}
	defer resp.Body.Close()
	_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, 64<<10)) // so that the connection serves again
	if resp.StatusCode/100 != 2 {
		return fmt.Errorf("notify: webhook: status %d", resp.StatusCode)
	}
	return nil
}

func (w *webhook) close() { w.http.CloseIdleConnections() }

// Authenticate is the HMAC-SM3 of a request.
func Authenticate(key []byte, at string, body []byte) []byte {
	mac := hmac.New(sm3.New, key)
	mac.Write([]byte(at + "\n"))
	mac.Write(body)
	return mac.Sum(nil)
}

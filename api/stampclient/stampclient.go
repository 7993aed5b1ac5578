// Package stampclient carries requests to a timestamp device that the hospital has: RFC 3161 §3.4 over HTTP, bounded in
// size and time, without redirects or proxies. What comes back is not believed; package tsa/upstream looks at it.
package stampclient

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"time"

	"yinjian/tsa/upstream"
)

const (
	maxResponse    = 64 << 10
	maxConnections = 64 // more requests wait for one, within their time
)

// Config says where the device is. All but URL and Now are optional.
type Config struct {
	URL            string           // http or https
	User, Password string           // HTTP basic authentication
	Roots          *x509.CertPool   // that the server's certificate is held against; nil: the system's
	Now            func() time.Time // judges the server's certificate
}

// CheckURL is nil for an address that a device can have. User names and passwords do not stand in it.
func CheckURL(address string) error {
	u, err := url.Parse(address)
	switch {
	case err != nil:
		return err
	case u.User != nil:
		return errors.New("user and password are not taken here")
	case u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.Fragment != "":
		return errors.New("want http://… or https://…")
	}
	return nil
}

// A Client asks one device. Safe for concurrent use.
type Client struct {
	cfg    Config
	http   *http.Client
	places chan struct{} // holds one for each connection in use
}

// New makes a client. Nothing is sent yet.
func New(c Config) (*Client, error) {
	if err := CheckURL(c.URL); err != nil {
		return nil, fmt.Errorf("stampclient: %w", err)
	}
	return &Client{cfg: c, places: make(chan struct{}, maxConnections), http: &http.Client{
		Transport: &http.Transport{
			TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: c.Roots, Time: c.Now},
			MaxConnsPerHost: maxConnections, MaxIdleConnsPerHost: maxConnections, IdleConnTimeout: time.Minute,
			MaxResponseHeaderBytes: 16 << 10, DisableCompression: true,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}, nil
}

// Ask posts a DER TimeStampReq and answers the body of a response with status 200, of at most 64 KiB. Its media type is not
// looked at: devices differ, and the content speaks for itself. An error is an *upstream.Error with the reason, or one of
// the transport. Who ran out of time after waiting for a connection is told [upstream.Busy]: that is not the device's fault.
func (c *Client) Ask(ctx context.Context, query []byte) ([]byte, error) {
	waited := false
	select {
	case c.places <- struct{}{}:
	default:
		waited = true
		select {
		case c.places <- struct{}{}:
		case <-ctx.Done():
			return nil, busy(ctx.Err())
		}
	}
	defer func() { <-c.places }()
	in, err := c.ask(ctx, query)
	if err != nil && waited && ctx.Err() != nil {
		return nil, busy(err)
	}
	return in, err
}

func busy(err error) error {
	return &upstream.Error{Reason: upstream.Busy, Err: fmt.Errorf("all %d connections were in use: %w", maxConnections, err)}
}

func (c *Client) ask(ctx context.Context, query []byte) ([]byte, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, c.cfg.URL, bytes.NewReader(query))
	if err != nil {
		return nil, fmt.Errorf("stampclient: %w", err)
	}
	r.Header.Set("Content-Type", "application/timestamp-query")
	r.Header.Set("Accept", "application/timestamp-reply")
	if c.cfg.User != "" {
		r.SetBasicAuth(c.cfg.User, c.cfg.Password)
	}
	resp, err := c.http.Do(r)
	if err != nil {
		return nil, fmt.Errorf("stampclient: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, &upstream.Error{Reason: upstream.BadStatus, Err: fmt.Errorf("status %d", resp.StatusCode)}
	}
	in, err := io.ReadAll(io.LimitReader(resp.Body, maxResponse+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("stampclient: %w", err)
	case len(in) > maxResponse:
		return nil, &upstream.Error{Reason: upstream.TooLong, Err: fmt.Errorf("more than %d bytes", maxResponse)}
	}
	return in, nil
}

// Close closes idle connections. It never fails.
func (c *Client) Close() error {
	c.http.CloseIdleConnections()
	return nil
}

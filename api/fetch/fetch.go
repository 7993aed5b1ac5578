// Package fetch gets small public files, revocation lists above all, from addresses that the operator has configured: by
// http, https or from a local file. What it gets is not believed: a list carries its issuer's signature.
package fetch

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"syscall"
	"time"
)

const (
	timeout      = 30 * time.Second // of one file, redirects included
	maxRedirects = 3
)

// CheckURL is nil for an address that [Get] can get: http and https with a host, or file with an absolute path. User names
// and passwords do not stand in a configuration.
func CheckURL(address string) error {
	u, err := url.Parse(address)
	switch {
	case err != nil:
		return err
	case u.User != nil:
		return errors.New("user and password are not taken")
	case (u.Scheme == "http" || u.Scheme == "https") && u.Host != "":
		return nil
	case u.Scheme == "file" && u.Host == "" && len(u.Path) > 1 && u.Path[0] == '/':
		return nil
	}
	return errors.New("want http://…, https://… or file:///…")
}

// Get answers the file at address, of at most limit bytes, within 30 s. Three redirects are followed, to http and https
// only, and from https to https only. now judges the server's certificate.
func Get(ctx context.Context, address string, limit int64, now func() time.Time) ([]byte, error) {
	if err := CheckURL(address); err != nil {
		return nil, fmt.Errorf("fetch: %s: %w", address, err)
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	u, err := url.Parse(address)
	if err != nil {
		return nil, fmt.Errorf("fetch: %w", err)
	}
	if u.Scheme == "file" {
		f, err := os.OpenFile(u.Path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a pipe is not waited for
		if err != nil {
			return nil, fmt.Errorf("fetch: %w", err)
		}
		defer f.Close()
		if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
			return nil, fmt.Errorf("fetch: %s: not a regular file", u.Path)
		}
		return read(f, limit)
	}
	transport := &http.Transport{TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12, Time: now}, Proxy: http.ProxyFromEnvironment, DisableKeepAlives: true}
	c := &http.Client{Transport: transport, CheckRedirect: func(r *http.Request, via []*http.Request) error {
		switch {
		case len(via) > maxRedirects:
			return fmt.Errorf("more than %d redirects", maxRedirects)
		case CheckURL(r.URL.String()) != nil || r.URL.Scheme == "file", via[0].URL.Scheme == "https" && r.URL.Scheme != "https":
			return fmt.Errorf("redirect to %s is not followed", r.URL.Redacted())
		}
		return nil
	}}
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return nil, fmt.Errorf("fetch: %w", err)
	}
	resp, err := c.Do(r)
	if err != nil {
		return nil, fmt.Errorf("fetch: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("fetch: %s: status %d", address, resp.StatusCode)
	}
	return read(resp.Body, limit)
}

func read(r io.Reader, limit int64) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, limit+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("fetch: %w", err)
	case int64(len(b)) > limit:
		return nil, fmt.Errorf("fetch: more than %d bytes", limit)
	}
	return b, nil
}

// Package fetch gets small public files, revocation lists above all, from addresses that the operator has configured: by
// http, https or from a local file. What it gets is not believed: a list carries its issuer's signature.
package fetch

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"sync/atomic"
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
// only, and from https to https only; to another host only if its address is a public one, for who answers at the
// configured address has no say in what is asked inside the hospital. now judges the server's certificate.
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
	var elsewhere atomic.Bool // the last redirect led to another host; the client asks one host after the other
	dialer := &net.Dialer{ControlContext: func(_ context.Context, _, address string, _ syscall.RawConn) error {
		if to, err := netip.ParseAddrPort(address); elsewhere.Load() && (err != nil || !public(to.Addr())) {
			return fmt.Errorf("redirect to %s is not followed: no public address", address)
		}
		return nil
	}}
	transport := &http.Transport{
		TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12, Time: now}, Proxy: http.ProxyFromEnvironment, DisableKeepAlives: true,
		DialContext: dialer.DialContext,
	}
	c := &http.Client{Transport: transport, CheckRedirect: func(r *http.Request, via []*http.Request) error {
		proxy, err := http.ProxyFromEnvironment(r)
		elsewhere.Store(err == nil && proxy == nil && r.URL.Hostname() != via[0].URL.Hostname())
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

// public is false for loopback, link-local, private (RFC 1918, RFC 4193), multicast and unspecified addresses.
func public(a netip.Addr) bool {
	a = a.Unmap()
	return a.IsGlobalUnicast() && !a.IsPrivate()
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

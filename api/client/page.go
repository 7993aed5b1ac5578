package client

import (
	"context"
	"errors"
	"net/http"
)

// Page gets a page of the console, at its path and query, as a browser with this session's cookie does. A page that is not
// answered with 200 is an error: without a session each leads to the login.
func (a *Admin) Page(ctx context.Context, path string) ([]byte, error) {
	one := call{method: http.MethodGet, path: path, takes: "text/html"}
	r, err := newRequest(ctx, a.base, one)
	if err != nil {
		return nil, err
	}
	r.AddCookie(&http.Cookie{Name: "__Host-yinjian", Value: a.session})
	h := *a.http
	h.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	data, err := roundTrip(&h, r, one)
	var no *refusal
	if errors.As(err, &no) {
		return nil, no.error(no.unknown)
	}
	return data, err
}

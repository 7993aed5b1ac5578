package api

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/emmansun/gmsm/sm3"
	"github.com/labstack/echo/v4"

	"yinjian/api/console"
	"yinjian/api/wire"
)

// newConsole makes the pages that administrators see in a browser.
func (s *Server) newConsole() error {
	var codes []console.Code
	for _, code := range slices.Sorted(maps.Keys(faces)) {
		f := faces[code]
		codes = append(codes, console.Code{Code: string(code), Title: f.title, Retry: string(f.retry), Status: f.status})
	}
	var err error
	s.console, err = console.New(console.Config{
		Backend: pages{s}, Version: s.cfg.Version, Codes: codes, Names: s.cfg.Names, Theme: s.cfg.Theme,
		Now: func() time.Time { return s.cfg.Clock.Now().Time },
	})
	return err
}

// administration serves the console's pages beside the routes for administrators who have logged in.
func (s *Server) administration(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == "/" || r.URL.Path == "/console" || strings.HasPrefix(r.URL.Path, "/console/") {
		s.console.ServeHTTP(w, r)
		return
	}
	s.adminTLS.ServeHTTP(w, r)
}

// pages has the console ask the routes of the administrators' listener, in this process: as whoever the browser's cookie
// belongs to, behind the same checks. That a form which changes something is one of our own pages the console has looked at.
type pages struct{ s *Server }

// csrfOf is what a cookie's session brings beside it; "" for what is no session's token.
func (p pages) csrfOf(cookie string) string {
	secret, err := hex.DecodeString(cookie)
	if err != nil || len(secret) != 32 {
		return ""
	}
	return p.s.sessions.csrf(&Session{key: sm3.Sum(secret)})
}

func (p pages) Ask(r *http.Request, method, path string, body []byte) (int, []byte) {
	k, err := r.Cookie(sessionCookie)
	if err != nil {
		k = nil
	}
	return p.ask(r, k, method, path, body)
}

// Apart has no connection of which anything would be said when the request is handled.
func (p pages) Apart(ctx context.Context, r *http.Request) *http.Request {
	apart := r.Clone(context.WithValue(ctx, adminTLSKey{}, r.Context().Value(adminTLSKey{})))
	apart.Body = http.NoBody
	return apart
}

func (p pages) ask(r *http.Request, k *http.Cookie, method, path string, body []byte) (int, []byte) {
	in, err := http.NewRequestWithContext(r.Context(), method, path, bytes.NewReader(body))
	if err != nil {
		return http.StatusNotFound, nil
	}
	in.RequestURI, in.Host, in.RemoteAddr, in.TLS = path, r.Host, r.RemoteAddr, r.TLS
	if method == http.MethodPost {
		in.Header.Set(echo.HeaderContentType, echo.MIMEApplicationJSON)
	}
	if k != nil {
		in.AddCookie(&http.Cookie{Name: sessionCookie, Value: k.Value})
		in.Header.Set(csrfHeader, p.csrfOf(k.Value))
	}
	out := &answered{header: http.Header{}, status: http.StatusOK}
	p.s.adminTLS.ServeHTTP(out, in)
	return out.status, out.body.Bytes()
}

// answered keeps an answer.
type answered struct {
	header http.Header
	status int
	body   bytes.Buffer
}

func (a *answered) Header() http.Header         { return a.header }
func (a *answered) WriteHeader(status int)      { a.status = status }
func (a *answered) Write(b []byte) (int, error) { return a.body.Write(b) }

func (p pages) Session(r *http.Request) *console.Session {
	k, err := r.Cookie(sessionCookie)
	if err != nil || k.Value == "" {
		return nil
	}
	status, body := p.ask(r, k, http.MethodGet, "/admin/v1/session", nil)
	var in wire.LoggedIn
	if status != http.StatusOK || json.Unmarshal(body, &in) != nil {
		return nil
	}
	sess := Session{Administrator: in.Administrator, Name: in.Name, Role: Role(in.Role)}
	return &console.Session{Name: in.Name, Role: in.Role, Actor: sess.actor(), MustChange: in.MustChange, Token: p.csrfOf(k.Value)}
}

func (p pages) May(who *console.Session, method, pattern string) bool {
	return p.s.may(&Session{Administrator: who.Name, Role: Role(who.Role)}, method, pattern) == nil
}

// Login gives the browser a cookie that no script reads, that goes with no request from elsewhere, and that ends with the
// browser; the session ends by itself, too.
func (p pages) Login(w http.ResponseWriter, r *http.Request, body []byte) (int, []byte) {
	status, out := p.ask(r, nil, http.MethodPost, "/admin/v1/login", body)
	var in wire.LoggedIn
	if status != http.StatusOK || json.Unmarshal(out, &in) != nil {
		return status, out
	}
	http.SetCookie(w, &http.Cookie{Name: sessionCookie, Value: in.Session, Path: "/", Secure: true, HttpOnly: true, SameSite: http.SameSiteStrictMode})
	return http.StatusOK, nil
}

func (p pages) Logout(w http.ResponseWriter, r *http.Request) {
	p.Ask(r, http.MethodPost, "/admin/v1/logout", []byte("{}"))
	http.SetCookie(w, &http.Cookie{Name: sessionCookie, Path: "/", MaxAge: -1, Secure: true, HttpOnly: true, SameSite: http.SameSiteStrictMode})
}

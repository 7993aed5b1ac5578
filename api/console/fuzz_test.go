package console_test

import (
	"bufio"
	"bytes"
	"image/png"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"yinjian/api/console"
)

// FuzzRequest sends bytes as a browser's, of whoever has logged in or nobody: what comes back is a page or a refusal, bears the
// policy, and leads nowhere but to a page of ours.
func FuzzRequest(f *testing.F) {
	c := &clinic{t: f, stopped: map[string]bool{}}
	h, err := console.New(console.Config{Backend: c, Version: "0.1.0", Codes: codes, Names: []string{"h"}, Theme: &console.Theme{}, Now: func() time.Time { return at }})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(h.Close)
	for role, lines := range map[string][]string{
		"": {"GET /console/login?then=//evil.example/console/&with=certificate HTTP/1.1\r\nHost: h\r\n\r\n", "GET /console/language/en?back=https://evil.example/ HTTP/1.1\r\nHost: h\r\n\r\n"},
		"security": {
			"GET /console/signers?after=D00010&find=%E5%BC%A0&status=stopped HTTP/1.1\r\nHost: h\r\nCookie: yj-lang=en; yj-lang=\"zh\r\n\r\n",
			"POST /console/applications HTTP/1.1\r\nHost: h\r\nContent-Type: application/x-www-form-urlencoded\r\nContent-Length: 26\r\n\r\ntoken=token-of-security&id",
			"POST /console/anchors HTTP/1.1\r\nHost: h\r\nContent-Type: multipart/form-data; boundary=x\r\nContent-Length: 90\r\n\r\n--x\r\nContent-Disposition: form-data; name=\"token\"\r\n\r\ntoken-of-security\r\n--x--\r\n\r\n\r\n\r\n",
		},
		"audit":  {"GET /console/records?from=2026-01-01&after=eyJhdCI6MX0%3D HTTP/1.1\r\nHost: h\r\n\r\n", "GET /console/records/" + strings.Repeat("0a", 32) + " HTTP/1.1\r\nHost: h\r\n\r\n", "GET /console/changes?before=-1 HTTP/1.1\r\nHost: h\r\n\r\n"},
		"system": {"GET /console/logs?lines=99999999999999999999&name=../x HTTP/1.1\r\nHost: h\r\n\r\n", "GET /console/time?hours=-5 HTTP/1.1\r\nHost: [::1]:1\r\n\r\n"},
	} {
		for _, line := range lines {
			f.Add(role, []byte(line))
		}
	}
	f.Fuzz(func(t *testing.T, role string, data []byte) {
		r, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(data)))
		if err != nil {
			return
		}
		body, err := io.ReadAll(io.LimitReader(r.Body, 1<<20))
		if err != nil || r.Method == http.MethodConnect {
			return
		}
		r.Body = io.NopCloser(bytes.NewReader(body))
		if role = regexp.MustCompile(`[^a-z]`).ReplaceAllString(role, ""); role != "" {
			r.AddCookie(&http.Cookie{Name: "__Host-yinjian", Value: role})
		}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code == http.StatusInternalServerError || !strings.Contains(w.Header().Get("Content-Security-Policy"), "script-src 'none'") {
			t.Errorf("%s %q as %q = %d %v", r.Method, r.RequestURI, role, w.Code, w.Header())
		}
		if to := w.Header().Get("Location"); to != "" {
			u, err := (&url.URL{Scheme: "https", Host: "h", Path: "/console/"}).Parse(to)
			if err != nil || u.Host != "h" || u.Scheme != "https" || !strings.HasPrefix(u.Path, "/") || strings.HasPrefix(to, "//") {
				t.Errorf("%s %q leads to %q", r.Method, r.RequestURI, to)
			}
		}
	})
}

// FuzzTheme: of a theme that is taken the colour is legible, and the logo nothing but a picture.
func FuzzTheme(f *testing.F) {
	var logo bytes.Buffer
	if err := png.Encode(&logo, picture(8, 4)); err != nil {
		f.Fatal(err)
	}
	f.Add([]byte("name = \"x\"\naccent = \"#7a1f5c\"\n"), logo.Bytes())
	f.Add([]byte("accent = \"red;}\"\n"), []byte("<svg onload=x>"))
	f.Add([]byte("[name]\n"), []byte("\xff\xd8\xff"))
	f.Fuzz(func(t *testing.T, text, logo []byte) {
		dir := t.TempDir()
		for name, b := range map[string][]byte{"theme.toml": text, "logo.png": logo} {
			if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		theme, err := console.LoadTheme(dir)
		if err != nil {
			return
		}
		if theme.Accent != "" && !regexp.MustCompile(`^#[0-9a-fA-F]{6}$`).MatchString(theme.Accent) || len(theme.Name) > 96 {
			t.Errorf("%+v", theme)
		}
		if p, err := png.Decode(bytes.NewReader(theme.Logo)); err != nil || p.Bounds().Dx() > 1024 || p.Bounds().Dy() > 1024 {
			t.Errorf("the logo: %v", err)
		}
	})
}

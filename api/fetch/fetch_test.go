package fetch_test

import (
	"bytes"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"yinjian/api/fetch"
)

func TestGet(t *testing.T) {
	t.Parallel()
	list := bytes.Repeat([]byte("x"), 100)
	dir := t.TempDir()
	file := filepath.Join(dir, "a.crl")
	if err := os.WriteFile(file, list, 0o600); err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/a.crl", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(list) })
	mux.HandleFunc("/moved", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/a.crl", http.StatusFound) })
	mux.HandleFunc("/round", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/round", http.StatusFound) })
	mux.HandleFunc("/inside", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "file://"+file, http.StatusFound) })
	srv := httptest.NewServer(mux)
	t.Cleanup(srv.Close)
	_, port, err := net.SplitHostPort(srv.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	mux.HandleFunc("/elsewhere", func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "http://localhost:"+port+"/a.crl", http.StatusFound)
	})
	for name, c := range map[string]struct {
		url   string
		limit int64
		ok    bool
	}{
		"plain":              {srv.URL + "/a.crl", 100, true},
		"redirected":         {srv.URL + "/moved", 100, true},
		"file":               {"file://" + file, 100, true},
		"too large":          {srv.URL + "/a.crl", 99, false},
		"file too large":     {"file://" + file, 99, false},
		"in a circle":        {srv.URL + "/round", 100, false},
		"redirect to a file": {srv.URL + "/inside", 100, false},
		"redirect inside":    {srv.URL + "/elsewhere", 100, false},
		"the same, directly": {"http://localhost:" + port + "/a.crl", 100, true},
		"missing":            {srv.URL + "/none", 100, false},
		"a folder":           {"file://" + dir, 100, false},
		"other scheme":       {"ldap://ca.test/x", 100, false},
		"relative file":      {"file://a.crl", 100, false},
		"with a password":    {"http://a:b@ca.test/x", 100, false},
		"rubbish":            {"://", 100, false},
	} {
		got, err := fetch.Get(t.Context(), c.url, c.limit, time.Now)
		if (err == nil) != c.ok || c.ok && !bytes.Equal(got, list) {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
	}
}

// A pipe that nobody writes to does not hold up the fetching of the other lists.
func TestPipe(t *testing.T) {
	t.Parallel()
	pipe := filepath.Join(t.TempDir(), "a.crl")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		_, err := fetch.Get(t.Context(), "file://"+pipe, 100, time.Now)
		done <- err
	}()
	select {
	case err := <-done:
		if err == nil {
			t.Error("a pipe was read")
		}
	case <-time.After(2 * time.Minute):
		t.Error("Get hangs")
	}
}

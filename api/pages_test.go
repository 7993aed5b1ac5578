package api_test

import (
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"
)

// The help has an entry for each code that a refusal can have, where the pages' refusals lead to.
func TestHelpHasEveryCode(t *testing.T) {
	t.Parallel()
	o := openOffice(t)
	page := o.page(t, "zhao", "/console/help", nil)
	for _, code := range codes(t) {
		if !strings.Contains(page, `<tr id="`+string(code)+`">`) {
			t.Errorf("no entry for %s", code)
		}
	}
}

// What a page begins goes on when the page was answered, with the rights of whoever began it, and ends with the server.
func TestPagesWork(t *testing.T) {
	t.Parallel()
	o := openOffice(t)
	if got := o.page(t, "wang", "/console/journal/verify", url.Values{}); !strings.Contains(got, `href="/console/journal"`) {
		t.Errorf("begun:\n%s", got)
	}
	if got := o.page(t, "wang", "/console/journal", nil); !strings.Contains(got, "未发现不符") || !strings.Contains(got, "姓wang") {
		t.Errorf("ended:\n%s", got)
	}
	o.admin.mu.Lock()
	defer o.admin.mu.Unlock()
	if !strings.Contains(strings.Join(o.admin.actors, " "), "admin:wang(姓wang，audit)") {
		t.Errorf("by %q", o.admin.actors)
	}
}

// page is a page of the console as an administrator sees it; with a form, what comes after it was sent.
func (o *office) page(t *testing.T, id, at string, form url.Values) string {
	t.Helper()
	token := o.login(t, false, id)
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, o.url+at, nil)
	if err == nil && form != nil {
		form.Set("token", o.server.CSRF(token))
		r, err = http.NewRequestWithContext(t.Context(), http.MethodPost, o.url+at, strings.NewReader(form.Encode()))
		if err == nil {
			r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
			r.Header.Set("Sec-Fetch-Site", "same-origin")
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	r.AddCookie(&http.Cookie{Name: "__Host-yinjian", Value: token})
	client := *o.http
	client.CheckRedirect = func(next *http.Request, _ []*http.Request) error {
		next.AddCookie(&http.Cookie{Name: "__Host-yinjian", Value: token})
		return nil
	}
	resp, err := client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("%s: %s, %v\n%s", at, resp.Status, err, b)
	}
	return string(b)
}

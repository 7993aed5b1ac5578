package console_test

import (
	"fmt"
	"net/url"
	"path/filepath"
	"strings"
	"testing"

	"github.com/chromedp/cdproto/page"
	"github.com/chromedp/chromedp"

	"yinjian/api/console"
	"yinjian/api/console/consoletest"
)

// pages are the console's, with a role that may see each.
var pages = []struct{ name, role, at string }{
	{"login", "", "/console/login"}, {"overview", "system", "/console/?still=1"}, {"approvals", "security", "/console/approvals"},
	{"signers", "security", "/console/signers"}, {"signer", "security", "/console/signers/D00012"}, {"enrol", "operator", "/console/signers/new"},
	{"applications", "security", "/console/applications"}, {"application", "security", "/console/applications/his"}, {"register", "security", "/console/applications/new"},
	{"records", "audit", "/console/records"}, {"record", "audit", "/console/records/" + strings.Repeat("0a", 32)}, {"changes", "audit", "/console/changes"}, {"journal", "audit", "/console/journal"},
	{"time", "system", "/console/time"}, {"machines", "system", "/console/machines"}, {"tsa", "system", "/console/tsa"}, {"certificates", "security", "/console/certificates"},
	{"backups", "system", "/console/backups"}, {"help", "operator", "/console/help"}, {"about", "operator", "/console/about"}, {"password", "operator", "/console/password"},
	{"refused", "operator", "/console/backups"},
}

// Each page in Chromium, on a desk and on a phone, in both languages: nothing to complain of, legible, no wider than the
// window, every control with a name, reached by the keyboard and seen when it is. Pictures stay in out/console.
func TestPagesInChromium(t *testing.T) {
	s := newConsole(t, &clinic{signers: 6300}, nil)
	b := consoletest.New(t, s.URL, filepath.Join("..", "..", "out", "console"))
	for _, p := range pages {
		b.As(p.role)
		for _, size := range []struct {
			name          string
			width, height int64
		}{{"desk", 1366, 768}, {"phone", 390, 844}} {
			b.Size(size.width, size.height)
			b.Open(p.at)
			b.Look(p.name + " " + size.name)
			b.Shot(p.name + "-" + size.name)
			b.Want(p.name + " " + size.name)
			if size.name == "desk" {
				b.Keyboard(p.name)
			}
		}
	}
	b.Size(1366, 768)
	b.As("")
	b.Open("/console/login")
	b.Keyboard("login")
	b.As("security")
	for _, at := range []string{"/console/?still=1", "/console/signers?q=D0001", "/console/applications/his", "/console/administrators/new", "/console/signers/D00012"} {
		b.Open(at)
		b.Keyboard(at)
	}
	b.Open("/console/language/en?back=%2Fconsole%2F%3Fstill%3D1")
	b.As("audit")
	for _, p := range pages {
		if p.role == "audit" || p.name == "overview" {
			b.Open(p.at)
			b.Look(p.name + " English")
			b.Want(p.name + " English")
		}
	}
	b.Shot("journal-english")
}

// What somebody stored is text wherever it stands, also in a browser that is told to forget the policy about scripts.
func TestStoredWordsAreText(t *testing.T) {
	const words = `"'></a></td></style><script>window.pwned=1</script><img src=x onerror="window.pwned=1"><svg onload=window.pwned=1>` +
		`" autofocus onfocus="window.pwned=1" x="{{.Session.Token}}<!--<style>*{display:none}`
	s := newConsole(t, &clinic{signers: 30, spoil: words}, &console.Theme{Name: words})
	b := consoletest.New(t, s.URL, filepath.Join("..", "..", "out", "console"))
	b.Run(page.SetBypassCSP(true))
	b.Size(1366, 768)
	safe := func(name string) {
		t.Helper()
		var found struct {
			Pwned   bool `json:"pwned"`
			Strange int  `json:"strange"`
			Times   int  `json:"times"`
		}
		b.Run(chromedp.Evaluate(fmt.Sprintf(`({pwned: window.pwned === 1, times: document.body.textContent.split(%q).length - 1,
			strange: document.querySelectorAll('script, style, iframe, svg').length + [...document.querySelectorAll('*')].filter(e =>
				[...e.attributes].some(a => a.name.startsWith('on')) || /^javascript:/i.test(e.getAttribute('href') || e.getAttribute('action') || e.getAttribute('formaction') || '') ||
				(e.tagName === 'IMG' && !e.getAttribute('src').startsWith('/console/'))).length})`, words), &found))
		if found.Pwned || found.Strange > 0 || found.Times < 2 { // the theme's name, and the administrator's
			t.Errorf("%s: %+v", name, found)
		}
	}
	for _, p := range pages {
		at := p.at
		switch p.name {
		case "signer", "application", "administrator": // found by an id
			at += url.PathEscape(words)
		case "login", "refused": // nothing of the appliance's stands there
			continue
		}
		b.As(p.role)
		b.Open(at)
		safe(p.name)
	}
	b.As("security") // what a form answers itself
	b.Open("/console/certificates/request?for=" + url.QueryEscape(words))
	b.Run(chromedp.Click("main form button", chromedp.ByQuery), chromedp.WaitReady("#csr"))
	safe("requested")
	b.Want("stored words")
}

// Package consoletest is a browser for the tests of the console: Chromium, driven over its own protocol.
package consoletest

import (
	"context"
	_ "embed"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/network"
	"github.com/chromedp/cdproto/page"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"
)

// A Browser is Chromium with one tab, and what it complained of.
type Browser struct {
	t     testing.TB
	ctx   context.Context
	base  string // of the server
	shots string // folder for pictures

	mu       sync.Mutex
	troubles []string // guarded by mu
}

// New starts Chromium before a server whose certificate nobody vouches for; it ends with the test, which is skipped where
// Chromium is not installed. base is "https://host:port", shots the folder that pictures are kept in.
func New(t testing.TB, base, shots string) *Browser {
	t.Helper()
	if _, err := exec.LookPath("chromium"); err != nil {
		t.Skip("chromium is not installed")
	}
	opts := append(chromedp.DefaultExecAllocatorOptions[:], chromedp.ExecPath("chromium"), chromedp.Flag("ignore-certificate-errors", true), chromedp.Flag("lang", "zh-CN"),
		chromedp.Flag("disable-background-networking", true), chromedp.Flag("font-render-hinting", "none"), chromedp.WSURLReadTimeout(90*time.Second))
	if os.Getuid() == 0 {
		opts = append(opts, chromedp.NoSandbox) // Chromium has none as root
	}
	ctx, cancel := chromedp.NewExecAllocator(t.Context(), opts...)
	t.Cleanup(cancel)
	ctx, cancel = chromedp.NewContext(ctx)
	t.Cleanup(cancel)
	b := &Browser{t: t, ctx: ctx, base: base, shots: shots}
	chromedp.ListenTarget(ctx, func(ev any) {
		b.mu.Lock()
		defer b.mu.Unlock()
		switch ev := ev.(type) {
		case *runtime.EventExceptionThrown:
			b.troubles = append(b.troubles, "exception: "+ev.ExceptionDetails.Error())
		case *runtime.EventConsoleAPICalled:
			b.troubles = append(b.troubles, fmt.Sprintf("console: %v", ev.Args))
		case *log.EventEntryAdded:
			if !strings.Contains(ev.Entry.Text, "status of 40") { // that a refusal is one, is meant
				b.troubles = append(b.troubles, "log: "+ev.Entry.Text+" "+ev.Entry.URL)
			}
		case *page.EventJavascriptDialogOpening:
			b.troubles = append(b.troubles, "dialog: "+ev.Message)
		}
	})
	if err := chromedp.Run(ctx); err != nil { // the tab lives as long as this one's context
		t.Fatal(err)
	}
	b.Run(log.Enable(), runtime.Enable(), network.Enable(), page.Enable())
	return b
}

// Run runs actions, for a minute at most.
func (b *Browser) Run(actions ...chromedp.Action) {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b.ctx, time.Minute)
	defer cancel()
	if err := chromedp.Run(ctx, actions...); err != nil {
		b.t.Fatal(err)
	}
}

// As has the browser bear a session's cookie.
func (b *Browser) As(session string) {
	b.t.Helper()
	b.Run(chromedp.ActionFunc(func(ctx context.Context) error {
		return network.SetCookie("__Host-yinjian", session).WithURL(b.base).WithPath("/").WithSecure(true).WithHTTPOnly(true).Do(ctx)
	}))
}

// Size sets the window's; under 600 it is a phone's.
func (b *Browser) Size(width, height int64) {
	b.t.Helper()
	b.Run(emulation.SetDeviceMetricsOverride(width, height, 1, width < 600))
}

// Open opens a page of the server, by its path.
func (b *Browser) Open(at string) {
	b.t.Helper()
	b.Run(chromedp.Navigate(b.base+at), chromedp.WaitReady("main"))
}

// Want fails with what the browser complained of since it was asked last.
func (b *Browser) Want(where string) {
	b.t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, w := range b.troubles {
		b.t.Errorf("%s: %s", where, w)
	}
	b.troubles = nil
}

// Shot keeps a picture of what is seen, in the folder for them.
func (b *Browser) Shot(name string) {
	b.t.Helper()
	var png []byte
	b.Run(chromedp.ActionFunc(func(ctx context.Context) (err error) {
		png, err = page.CaptureScreenshot().Do(ctx)
		return err
	}))
	if err := os.MkdirAll(b.shots, 0o755); err != nil {
		b.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(b.shots, name+".png"), png, 0o644); err != nil {
		b.t.Fatal(err)
	}
}

//go:embed look.js
var look string

// Look fails with what look.js finds wrong with a page: text that is not legible on its ground, what is wider than the window, controls without
// a name, and what no page of ours has, such as a script.
func (b *Browser) Look(where string) {
	b.t.Helper()
	var faults []string
	b.Run(chromedp.Evaluate(look, &faults))
	for _, f := range faults {
		b.t.Errorf("%s: %s", where, f)
	}
}

// Keyboard goes through the page with Tab, what is folded away opened: each control is reached, and shows it.
func (b *Browser) Keyboard(where string) {
	b.t.Helper()
	var total int
	b.Run(chromedp.Evaluate(`document.activeElement && document.activeElement.blur(); window.scrollTo(0, 0);
		document.querySelectorAll('details').forEach(d => d.open = true);
		[...document.querySelectorAll('a[href], button, input:not([type=hidden]), select, textarea, summary, [tabindex="0"]')].filter(e => e.offsetParent !== null || e.classList.contains('skip')).length`, &total))
	seen := map[string]bool{}
	for pressed := 0; len(seen) < total && pressed < 4*total; pressed++ { // a time is one control with several stops
		var at struct {
			Path    string `json:"path"`
			Outline string `json:"outline"`
		}
		b.Run(chromedp.KeyEvent(kb.Tab), chromedp.Evaluate(`(() => { const e = document.activeElement; const all = [...document.querySelectorAll('*')];
			const s = getComputedStyle(e); e.setAttribute('data-reached', ''); return {path: e === document.body ? '' : e.tagName + all.indexOf(e), outline: s.outlineStyle + ' ' + s.outlineWidth}; })()`, &at))
		if at.Path == "" {
			continue // past the end, it begins anew
		}
		if !seen[at.Path] && (strings.HasPrefix(at.Outline, "none") || strings.HasSuffix(at.Outline, " 0px")) {
			b.t.Errorf("%s: %s does not show that it has the focus (%s)", where, at.Path, at.Outline)
		}
		seen[at.Path] = true
	}
	if len(seen) < total {
		var missed string
		b.Run(chromedp.Evaluate(`[...document.querySelectorAll('a[href], button, input:not([type=hidden]), select, textarea, summary, [tabindex="0"]')].filter(e =>
			e.offsetParent !== null && !e.hasAttribute('data-reached')).map(e => e.outerHTML.slice(0, 120)).join('\n')`, &missed))
		b.t.Errorf("%s: %d of %d controls are reached by the keyboard, not\n%s", where, len(seen), total, missed)
	}
}

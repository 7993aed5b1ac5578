package console

import (
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"unicode"

	"yinjian/api/wire"
)

const (
	routeSearchKeys = "POST /admin/v1/keys/search"
	routeDestroyKey = "POST /admin/v1/keys/destroy"
	routeRequest    = "POST /admin/v1/certificates/requests"
)

type key struct {
	Slot      string   `json:"slot"`
	Label     string   `json:"label"`
	Algorithm string   `json:"algorithm"`
	Owner     string   `json:"owner"`
	Kind      string   `json:"kind"`
	State     string   `json:"state"`
	Node      string   `json:"node"`
	Machines  []string `json:"machines"`
	Uses      uint64   `json:"uses"`
	Born      string   `json:"born"`
	Due       string   `json:"rotation_due"`
}

// scopes are what a list of keys or certificates can be of.
var scopes = []string{"own", "signers", "all"}

// A held is what a list of keys or certificates is asked for by the address of its page, and where the next page is.
type held struct {
	Text, Show, After string
	Next              string // "": there is none
}

func heldOf(r *http.Request, shows []string) held {
	q := r.URL.Query()
	h := held{Text: strings.TrimSpace(q.Get("q")), Show: q.Get("show"), After: q.Get("after")}
	if !slices.Contains(shows, h.Show) {
		if h.Show = shows[0]; h.Text != "" {
			h.Show = "all"
		}
	}
	return h
}

// scope is as the routes take it.
func (h *held) scope() string {
	switch h.Show {
	case "own", "signers":
		return h.Show
	case "soon":
		return "signers"
	}
	return ""
}

// following sets where the page after this one is.
func (h *held) following(path, after string) {
	if after != "" {
		h.Next = path + "?" + url.Values{"q": {h.Text}, "show": {h.Show}, "after": {after}}.Encode()
	}
}

func keyRoutes(c *Console) {
	show := func(p *page) {
		p.Section = "/console/keys"
		p.waits("/admin/v1/keys/")
		var machines []machine
		if err := p.ask(routeMachines, nil, &machines); err != nil {
			p.fail(err)
			return
		}
		h := heldOf(p.r, scopes)
		var found struct {
			Keys     []key    `json:"keys"`
			Warnings []string `json:"warnings"`
			Next     string   `json:"next"`
		}
		if err := p.ask(routeSearchKeys, wire.SearchKeys{Text: h.Text, Scope: h.scope(), After: h.After, Most: perPage}, &found); err != nil {
			p.fail(err)
			return
		}
		h.following("/console/keys", found.Next)
		p.show("keys", map[string]any{"Machines": machines, "Keys": found.Keys, "Warnings": found.Warnings, "List": h})
	}
	c.page("GET /console/keys", show)
	c.page("POST /console/keys/destroy", func(p *page) {
		body := wire.DestroyKey{Label: strings.TrimSpace(p.Form.Get("label")), Reason: p.Form.Get("reason")}
		p.acted(p.ask(routeDestroyKey, body, nil), "/console/keys", "changed", func() { show(p) })
	})
}

// requestRoutes are about certificate requests, on pages of the certificates' section.
func requestRoutes(c *Console) {
	show := func(p *page) {
		if p.Section = "/console/certificates"; p.only(routeRequest) {
			owner := p.r.URL.Query().Get("for")
			if p.r.Method == http.MethodPost {
				owner = p.Form.Get("for")
			}
			p.show("request", map[string]any{"For": owner})
		}
	}
	c.page("GET /console/certificates/request", show)
	c.page("POST /console/certificates/request", func(p *page) {
		p.Section = "/console/certificates"
		f := p.Form
		ask := wire.RequestCertificate{
			For: strings.TrimSpace(f.Get("for")), NewKey: f.Get("new_key") != "", Replace: f.Get("replace") != "", Subject: strings.TrimSpace(f.Get("subject")),
			Hosts: strings.FieldsFunc(f.Get("hosts"), func(r rune) bool { return unicode.IsSpace(r) || strings.ContainsRune(",，、;；", r) }),
		}
		var done wire.CertificateRequest
		if err := p.ask(routeRequest, ask, &done); err != nil {
			p.acted(err, "", "", func() { show(p) })
			return
		}
		text := csrPEM(done.CSR)
		if f.Get("download") != "" {
			name := reNoFile.ReplaceAllString(strings.TrimPrefix(done.Owner, "signer:")+"-"+done.Algorithm, "-") + ".csr"
			p.w.Header().Set("Content-Disposition", fmt.Sprintf("attachment; filename=%q", name))
			p.w.Header().Set("Content-Type", "application/pkcs10")
			_, _ = p.w.Write([]byte(text))
			return
		}
		p.show("requested", map[string]any{"For": ask.For, "Request": done, "CSR": text})
	})
}

// reNoFile is what the name of a file has not.
var reNoFile = regexp.MustCompile(`[^A-Za-z0-9-]+`)

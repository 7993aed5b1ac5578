package console

import (
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"yinjian/api/wire"
)

const (
	routeSearchSigners = "POST /admin/v1/signers/search"
	routeEnrol         = "POST /admin/v1/signers"
	routeStopSigner    = "POST /admin/v1/signers/:id/stop"
	routeStartSigner   = "POST /admin/v1/signers/:id/start"
	routeAddSignerKey  = "POST /admin/v1/signers/:id/keys"
	routeSetPIN        = "POST /admin/v1/signers/:id/pin"

	routeApplications = "GET /admin/v1/applications"
	routeRegister     = "POST /admin/v1/applications"
	routeStopApp      = "POST /admin/v1/applications/:id/stop"
	routeLimits       = "POST /admin/v1/applications/:id/limits"
	routeProduction   = "POST /admin/v1/applications/:id/production"
	routeBindClient   = "POST /admin/v1/applications/:id/client"
)

// perPage is how many lines a list shows.
const perPage = 50

type signer struct {
	Version    int    `json:"version"`
	ID         string `json:"id"`
	Name       string `json:"name"`
	Department string `json:"department"`
	Campus     string `json:"campus"`
	Role       string `json:"role"`
	Test       bool   `json:"test"`
	Keys       []struct {
		Label       string `json:"label"`
		Algorithm   string `json:"algorithm"`
		Certificate []byte `json:"certificate"`
		Node        string `json:"node"`
	} `json:"keys"`
	HasPIN       bool      `json:"has_pin"`
	Custody      string    `json:"custody"`
	PINLocked    bool      `json:"pin_locked"`
	PINLockedFor []string  `json:"pin_locked_for"`
	Stopped      bool      `json:"stopped"`
	ChangedBy    string    `json:"changed_by"`
	ChangedAt    time.Time `json:"changed_at"`
}

func signerRoutes(c *Console) {
	c.page("GET /console/signers", func(p *page) {
		p.Section = "/console/signers"
		p.waits("/admin/v1/signers")
		q := p.r.URL.Query()
		at, _ := strconv.Atoi(q.Get("page"))
		at = min(max(1, at), 10_000)
		ask := wire.SearchSigners{Text: q.Get("q"), Skip: (at - 1) * perPage, Most: perPage}
		if s := q.Get("state"); s == "stopped" || s == "running" {
			stopped := s == "stopped"
			ask.Stopped = &stopped
		}
		var found struct {
			Signers []signer `json:"signers"`
			Total   int      `json:"total"`
		}
		if err := p.ask(routeSearchSigners, ask, &found); err != nil {
			p.fail(err)
			return
		}
		p.show("signers", map[string]any{
			"Found": found, "Query": q.Get("q"), "State": q.Get("state"), "Page": at, "Pages": (found.Total + perPage - 1) / perPage, "First": (at-1)*perPage + 1,
			"Last": (at-1)*perPage + len(found.Signers),
		})
	})
	enrol := func(p *page) {
		if p.Section = "/console/signers"; p.only(routeEnrol) {
			p.show("enrol", nil)
		}
	}
	c.page("GET /console/signers/new", enrol)
	c.page("POST /console/signers/new", func(p *page) {
		body := values(p.Form, "id", "name", "department", "campus", "role", "pin", "ca")
		body["algorithms"] = append([]string{}, p.Form["algorithms"]...)
		if p.Form.Get("test") != "" {
			body["test"] = true
		}
		p.acted(p.ask(routeEnrol, body, nil), "/console/signers", "enrolled", func() {
			p.Form.Del("pin") // nobody reads it off a page
			enrol(p)
		})
	})
	one := func(p *page) {
		p.Section = "/console/signers"
		id := p.r.PathValue("id")
		p.waits("/admin/v1/signers/" + url.PathEscape(id) + "/")
		// An id may be part of others. Those that have it come in their order: the page that it is on is found by halves.
		for from, to := 0, 1; from < to; {
			at := (from + to - 1) / 2
			var found struct {
				Signers []signer `json:"signers"`
				Total   int      `json:"total"`
			}
			if err := p.ask(routeSearchSigners, wire.SearchSigners{Text: id, Skip: at * perPage, Most: perPage}, &found); err != nil {
				p.fail(err)
				return
			}
			i, there := slices.BinarySearchFunc(found.Signers, id, func(s signer, id string) int { return strings.Compare(s.ID, id) })
			switch {
			case there:
				p.show("signer", map[string]any{"Signer": found.Signers[i]})
				return
			case at == 0:
				to = (found.Total + perPage - 1) / perPage
			}
			if i == len(found.Signers) {
				from = at + 1
			} else {
				to = at
			}
		}
		p.problem(http.StatusNotFound, "not_found", "没有这个签名人 (no such signer)")
	}
	c.page("GET /console/signers/{id}", one)
	act := func(name, route, notice string, body func(p *page) any) {
		c.page("POST /console/signers/{id}/"+name, func(p *page) {
			if b := body(p); p.Refusal == nil {
				id := p.r.PathValue("id")
				p.acted(p.ask(route, b, nil, id), "/console/signers/"+url.PathEscape(id), notice, func() { one(p) })
			} else {
				one(p)
			}
		})
	}
	why := func(p *page) any { return reason(p) }
	act("stop", routeStopSigner, "stopped", why)
	act("start", routeStartSigner, "started", why)
	act("keys", routeAddSignerKey, "changed", func(p *page) any { return values(p.Form, "algorithm", "ca") })
	act("pin", routeSetPIN, "changed", func(p *page) any {
		pin, old, again := p.Form.Get("pin"), p.Form.Get("old_pin"), p.Form.Get("again")
		for _, name := range []string{"pin", "old_pin", "again"} { // nobody reads it off a page
			p.Form.Del(name)
		}
		if pin != again {
			p.refuse("again", "两次输入的 PIN 不同 (the PINs differ)")
		}
		return wire.SetSignerPIN{PIN: pin, OldPIN: old}
	})
}

type application struct {
	Version     int      `json:"version"`
	ID          string   `json:"id"`
	Name        string   `json:"name"`
	Campus      string   `json:"campus"`
	Rights      []string `json:"rights"`
	Stamp       string   `json:"stamp"`
	Consent     []string `json:"consent"`
	Test        bool     `json:"test"`
	Production  bool     `json:"production"`
	Rate        int      `json:"rate"`
	Burst       int      `json:"burst"`
	HSMRate     int      `json:"hsm_rate"`
	HSMSessions int      `json:"hsm_sessions"`
	Stopped     bool     `json:"stopped"`
	// Client is by which TLS client certificates it proves itself; nil: by none.
	Client *struct {
		Alone       bool     `json:"alone"`
		Keys        []string `json:"keys"`
		SubjectText string   `json:"subject_text"`
	} `json:"client"`
	ChangedBy string    `json:"changed_by"`
	ChangedAt time.Time `json:"changed_at"`
}

func applicationRoutes(c *Console) {
	list := func(p *page) (apps []application, ok bool) {
		p.Section = "/console/applications"
		p.waits("/admin/v1/applications")
		if err := p.ask(routeApplications, nil, &apps); err != nil {
			p.fail(err)
			return nil, false
		}
		return apps, true
	}
	c.page("GET /console/applications", func(p *page) {
		if apps, ok := list(p); ok {
			p.show("applications", map[string]any{"Applications": apps})
		}
	})
	register := func(p *page) {
		if p.Section = "/console/applications"; p.only(routeRegister) {
			p.show("register", nil)
		}
	}
	c.page("GET /console/applications/new", register)
	c.page("POST /console/applications/new", func(p *page) {
		body := map[string]any{
			"id": p.Form.Get("id"), "name": p.Form.Get("name"), "campus": p.Form.Get("campus"), "stamp": p.Form.Get("stamp"),
			"rights": append([]string{}, p.Form["rights"]...), "consent": append([]string{}, p.Form["consent"]...),
			"rate": whole(p.Form, "rate"), "burst": whole(p.Form, "burst"),
		}
		for _, n := range []string{"hsm_rate", "hsm_sessions"} {
			if v := whole(p.Form, n); v != 0 {
				body[n] = v
			}
		}
		if k := p.Form.Get("kind"); k == "test" || k == "production" {
			body[k] = true
		}
		var done wire.RegisteredApplication
		if err := p.ask(routeRegister, body, &done); err != nil {
			p.acted(err, "", "", func() { register(p) })
			return
		}
		p.Section, p.Notice = "/console/applications", "registered"
		p.show("registered", map[string]any{"ID": p.Form.Get("id"), "Key": done.Key}) // this once
	})
	one := func(p *page) {
		apps, ok := list(p)
		if !ok {
			return
		}
		for _, a := range apps {
			if a.ID == p.r.PathValue("id") {
				p.show("application", map[string]any{"Application": a})
				return
			}
		}
		p.problem(http.StatusNotFound, "not_found", "没有这个应用 (no such application)")
	}
	c.page("GET /console/applications/{id}", one)
	act := func(name, route, notice string, body func(p *page) any) {
		c.page("POST /console/applications/{id}/"+name, func(p *page) {
			id := p.r.PathValue("id")
			p.acted(p.ask(route, body(p), nil, id), "/console/applications/"+url.PathEscape(id), notice, func() { one(p) })
		})
	}
	act("stop", routeStopApp, "stopped", func(p *page) any { return reason(p) })
	act("client", routeBindClient, "changed", func(p *page) any {
		f := p.Form
		return wire.BindClient{By: f.Get("by"), Certificate: upload(p, "certificate"), Alone: f.Get("alone") != "", Reason: f.Get("reason")}
	})
	act("limits", routeLimits, "changed", func(p *page) any {
		body := reason(p)
		body["rate"], body["burst"] = whole(p.Form, "rate"), whole(p.Form, "burst")
		for _, n := range []string{"hsm_rate", "hsm_sessions"} {
			if v := whole(p.Form, n); v != 0 {
				body[n] = v
			}
		}
		return body
	})
	act("production", routeProduction, "changed", func(p *page) any {
		body := reason(p)
		body["production"] = p.Form.Get("production") == "yes"
		return body
	})
}

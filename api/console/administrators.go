package console

import (
	"net/http"
	"net/url"
	"time"

	"yinjian/api/wire"
)

const (
	routeAdministrators      = "GET /admin/v1/administrators"
	routeAddAdministrator    = "POST /admin/v1/administrators"
	routeStopAdministrator   = "POST /admin/v1/administrators/:id/stop"
	routeStartAdministrator  = "POST /admin/v1/administrators/:id/start"
	routeSetPassword         = "POST /admin/v1/administrators/:id/password"
	routeSetLoginCertificate = "POST /admin/v1/administrators/:id/certificate"
)

type administrator struct {
	Version      int        `json:"version"`
	ID           string     `json:"id"`
	Name         string     `json:"name"`
	Role         string     `json:"role"`
	Stopped      bool       `json:"stopped"`
	Locked       bool       `json:"locked"`
	MustChange   bool       `json:"must_change"`
	PasswordEnds time.Time  `json:"password_ends"`
	Certificate  string     `json:"certificate"`
	LastLogin    *time.Time `json:"last_login"`
	ChangedBy    string     `json:"changed_by"`
	ChangedAt    time.Time  `json:"changed_at"`
}

func administratorRoutes(c *Console) {
	list := func(p *page) (all []administrator, ok bool) {
		p.Section = "/console/administrators"
		p.waits("/admin/v1/administrators")
		var out struct {
			Administrators []administrator `json:"administrators"`
		}
		if err := p.ask(routeAdministrators, nil, &out); err != nil {
			p.fail(err)
			return nil, false
		}
		return out.Administrators, true
	}
	c.page("GET /console/administrators", func(p *page) {
		if all, ok := list(p); ok {
			p.show("administrators", map[string]any{"Administrators": all})
		}
	})
	add := func(p *page) {
		if p.Section = "/console/administrators"; p.only(routeAddAdministrator) {
			p.show("appoint", nil)
		}
	}
	c.page("GET /console/administrators/new", add)
	c.page("POST /console/administrators/new", func(p *page) {
		password, f := p.newPassword(), p.Form
		if p.Refusal != nil {
			add(p)
			return
		}
		body := wire.AddAdministrator{ID: f.Get("id"), Name: f.Get("name"), Role: f.Get("role"), Password: password, Certificate: upload(p, "certificate")}
		p.acted(p.ask(routeAddAdministrator, body, nil), "/console/administrators", "registered", func() { add(p) })
	})
	one := func(p *page) {
		all, ok := list(p)
		if !ok {
			return
		}
		for _, a := range all {
			if a.ID == p.r.PathValue("id") {
				p.show("administrator", map[string]any{"Administrator": a})
				return
			}
		}
		p.problem(http.StatusNotFound, "not_found", "没有这个管理员 (no such administrator)")
	}
	c.page("GET /console/administrators/{id}", one)
	act := func(name, route, notice string, body func(p *page) any) {
		c.page("POST /console/administrators/{id}/"+name, func(p *page) {
			if b := body(p); p.Refusal == nil {
				id := p.r.PathValue("id")
				p.acted(p.ask(route, b, nil, id), "/console/administrators/"+url.PathEscape(id), notice, func() { one(p) })
			} else {
				one(p)
			}
		})
	}
	why := func(p *page) any { return reason(p) }
	act("stop", routeStopAdministrator, "stopped", why)
	act("start", routeStartAdministrator, "started", why)
	act("password", routeSetPassword, "changed", func(p *page) any { return wire.SetAdministratorPassword{Password: p.newPassword()} })
	act("certificate", routeSetLoginCertificate, "changed", func(p *page) any {
		body := wire.SetAdministratorCertificate{}
		if p.Form.Get("none") == "" {
			if body.Certificate = upload(p, "certificate"); len(body.Certificate) == 0 { // none would take the present one away
				p.refuse("certificate", "没有选择证书文件 (no file was chosen)")
			}
		}
		return body
	})
}

// newPassword takes a password that was given twice off the form, so that nobody reads it off a page. Where the two differ the
// page is to say so.
func (p *page) newPassword() string {
	password, again := p.Form.Get("password"), p.Form.Get("again")
	p.Form.Del("password")
	p.Form.Del("again")
	if password != again {
		p.refuse("again", "两次输入的新口令不同 (the new passwords differ)")
	}
	return password
}

// refuse has the page say why a form was not sent on.
func (p *page) refuse(field, detail string) {
	p.Refusal = &Refusal{wire.Problem{Status: http.StatusBadRequest, Code: "invalid_request", Field: field, Detail: detail, Next: "更正后重新提交 (correct it and send it again)"}}
}

package console

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"net/http"
	"strings"

	"yinjian/api/wire"
)

const (
	routeChallenge = "POST /admin/v1/login/challenge"
	routePassword  = "POST /admin/v1/password"
)

func (c *Console) loginPage(p *page) {
	p.Section = "/console/login"
	if p.Session != nil {
		http.Redirect(p.w, p.r, "/console/", http.StatusSeeOther)
		return
	}
	q := p.r.URL.Query()
	p.loginForm(within(q.Get("then")), q.Get("with") == "certificate")
}

// loginForm asks for name and password and, where a certificate is wanted too, shows a challenge that is signed elsewhere
// and asks for the file with the signature: a browser has no way to a key of ours.
func (p *page) loginForm(then string, certificate bool) {
	challenge := ""
	if certificate {
		var c wire.LoginChallenged
		if err := p.ask(routeChallenge, wire.LoginChallenge{}, &c); err != nil {
			p.fail(err)
			return
		}
		challenge = base64.StdEncoding.EncodeToString(c.Challenge)
	}
	p.show("login", map[string]any{"Then": then, "Challenge": challenge})
}

// login begins a session; which one the browser may bear already does not count. There is no session's token yet: that the
// form is one of ours stands in Sec-Fetch-Site and Origin.
func (c *Console) login(p *page) {
	p.Section = "/console/login"
	if err := p.parseForm(); err != nil {
		p.problem(http.StatusBadRequest, "invalid_request", "表单无法读出或过大 (the form cannot be read, or is too large)")
		return
	}
	p.Session = nil
	then := within(p.Form.Get("then"))
	req := wire.Login{Name: strings.TrimSpace(p.Form.Get("name")), Password: p.Form.Get("password")}
	p.Form.Del("password") // nobody reads it off a page
	challenge := p.Form.Get("challenge")
	if challenge != "" {
		req.Challenge, _ = base64.StdEncoding.DecodeString(challenge) // what is none is refused as a wrong one
		req.Signature = signatureIn(upload(p, "signature"))
	}
	body, err := json.Marshal(req)
	if err != nil {
		p.fail(err)
		return
	}
	status, out := c.cfg.Backend.Login(p.w, p.r, body)
	var refused *Refusal
	switch err := read(status, out, nil); {
	case errors.As(err, &refused):
		p.Refusal = refused
		p.loginForm(then, challenge != "")
	case err != nil:
		p.fail(err)
	default:
		http.Redirect(p.w, p.r, then, http.StatusSeeOther)
	}
}

// signatureIn takes a signature as its bytes or in Base64.
func signatureIn(file []byte) []byte {
	if b, err := base64.StdEncoding.DecodeString(strings.TrimSpace(string(file))); err == nil {
		return b
	}
	return file
}

func (c *Console) logout(p *page) {
	c.cfg.Backend.Logout(p.w, p.r)
	http.Redirect(p.w, p.r, "/console/login?notice=loggedout", http.StatusSeeOther)
}

func (c *Console) passwordPage(p *page) {
	p.Section = "/console/password"
	p.show("password", nil)
}

// password changes one's own. All sessions of the administrator end with it.
func (c *Console) password(p *page) {
	old := p.Form.Get("old")
	p.Form.Del("old")
	fresh := p.newPassword()
	if p.Refusal != nil {
		c.passwordPage(p)
		return
	}
	p.acted(p.ask(routePassword, wire.ChangePassword{Old: old, Password: fresh}, nil), "/console/login", "password", func() { c.passwordPage(p) })
}

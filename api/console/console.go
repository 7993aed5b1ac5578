// Package console is the administration's pages: rendered here, without script, for a browser on the admin listener.
//
// A page knows nothing but the administration's own routes, which it asks as the person whose session the request bears, so
// that it can show and do what that person's role may, and nothing else. What a role may not is not offered, and is refused
// by the route when it is tried all the same.
//
// Every answer has a Content-Security-Policy that lets nothing in from elsewhere and no script at all, and is not kept by
// caches. What changes something is a POST that bears the session's token, from this host's own pages
// (Sec-Fetch-Site, Origin).
package console

import (
	"bytes"
	"context"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"html/template"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	"yinjian/api/wire"
)

// A Session is who looks.
type Session struct {
	Name  string // for people
	Role  string // "system", "security", "audit", "operator"
	Actor string // as the journal names whoever it is
	// MustChange: the password has to be changed before anything else.
	MustChange bool
	// Token is what each POST bears beside the cookie.
	Token string
}

// Backend is what the console asks of the appliance, the same as everybody on the admin listener is answered.
type Backend interface {
	// Session answers whose session the request bears; nil: nobody's.
	Session(r *http.Request) *Session
	// May reports whether that role may use a route of the administration, by its method and pattern.
	May(s *Session, method, pattern string) bool
	// Ask uses a route as whoever the request's session belongs to. path has its parameters in it, body is JSON or nil. The
	// answer is what the route answers, problem+json too.
	Ask(r *http.Request, method, path string, body []byte) (status int, answer []byte)
	// Login asks for a session and sets its cookie. What it answers otherwise is problem+json.
	Login(w http.ResponseWriter, r *http.Request, body []byte) (status int, answer []byte)
	// Apart is a request of the same session, for what goes on until ctx ends although r was answered.
	Apart(ctx context.Context, r *http.Request) *http.Request
	// Logout ends the session and takes the cookie back.
	Logout(w http.ResponseWriter, r *http.Request)
}

// A Code is a refusal as the help lists it.
type Code struct {
	Code, Title, Retry string
	Status             int
}

// Config is what a Console is made of. Backend, Version and Codes are required.
type Config struct {
	Backend Backend
	Version string
	Codes   []Code
	// Names are the hosts that the listener is called by, without a port; addresses and localhost always are.
	Names []string
	Theme *Theme
	Now   func() time.Time // for what a page says of the present; the time of the appliance
}

// A Console is an http.Handler for everything under /console/. Safe for concurrent use.
type Console struct {
	cfg     Config
	mux     *http.ServeMux
	pages   map[string]map[string]*template.Template // by language, then page
	guard   *http.CrossOriginProtection
	css     []byte
	version string // of the assets

	works works
}

//go:embed templates assets
var files embed.FS

// Languages, the first of which is spoken where nobody chose.
var languages = []string{"zh", "en"}

// New builds the console.
func New(cfg Config) (*Console, error) {
	if cfg.Backend == nil || cfg.Version == "" || len(cfg.Codes) == 0 || cfg.Now == nil {
		return nil, errors.New("console: config: something is missing")
	}
	if cfg.Theme == nil {
		cfg.Theme = &Theme{}
	}
	c := &Console{cfg: cfg, mux: http.NewServeMux(), guard: http.NewCrossOriginProtection(), pages: map[string]map[string]*template.Template{}}
	css, err := files.ReadFile("assets/console.css")
	if err != nil {
		return nil, err
	}
	c.css = append(css, cfg.Theme.css()...)
	c.version = digest(c.css)
	c.works.begin()
	if err := c.parse(); err != nil {
		return nil, err
	}
	c.routes()
	return c, nil
}

// parse reads each page with the layout, once for each language.
func (c *Console) parse() error {
	names, err := files.ReadDir("templates")
	if err != nil {
		return err
	}
	for _, lang := range languages {
		c.pages[lang] = map[string]*template.Template{}
		for _, f := range names {
			if f.Name() == "layout.html" {
				continue
			}
			t, err := template.New("layout.html").Funcs(functions(lang)).ParseFS(files, "templates/layout.html", "templates/"+f.Name())
			if err != nil {
				return fmt.Errorf("console: %w", err)
			}
			c.pages[lang][strings.TrimSuffix(f.Name(), ".html")] = t
		}
	}
	return nil
}

// Close ends what takes long, and waits for it.
func (c *Console) Close() { c.works.end() }

func (c *Console) routes() {
	c.mux.HandleFunc("GET /console/assets/console.css", c.stylesheet)
	c.mux.HandleFunc("GET /console/assets/mark.svg", c.mark)
	c.mux.HandleFunc("GET /console/assets/logo", c.logo)
	c.mux.HandleFunc("GET /console/language/{lang}", c.language)
	c.open("GET /console/login", c.loginPage)
	c.open("POST /console/login", c.login)
	c.page("POST /console/logout", c.logout)
	c.page("GET /console/password", c.passwordPage)
	c.page("POST /console/password", c.password)
	for _, s := range sections {
		s.routes(c)
	}
}

// secure are the headers of every answer. Nothing of a page comes from elsewhere, there is no script, and nobody may put a
// page into a frame.
func secure(h http.Header) {
	h.Set("Content-Security-Policy", "default-src 'none'; style-src 'self'; img-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'; script-src 'none'")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("X-Frame-Options", "DENY")
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("Cross-Origin-Opener-Policy", "same-origin")
	h.Set("Cross-Origin-Resource-Policy", "same-origin")
	h.Set("Permissions-Policy", "camera=(), geolocation=(), microphone=()")
	h.Set("Cache-Control", "no-store")
}

// maxForm bounds a form without files, maxUpload one with them; what the routes take stands behind.
const (
	maxForm   = 64 << 10
	maxUpload = 11 << 20 // in Base64 less than the 16 MiB that the routes take
)

func (c *Console) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	secure(w.Header())
	if !c.known(r.Host) {
		http.Error(w, "本机不以此名称提供服务 (this host is not called so)", http.StatusMisdirectedRequest)
		return
	}
	if err := c.guard.Check(r); err != nil {
		http.Error(w, "请求来自别的网站 (the request comes from another site)", http.StatusForbidden)
		return
	}
	most := int64(maxForm)
	if strings.HasPrefix(r.Header.Get("Content-Type"), "multipart/form-data") && r.URL.Path != "/console/login" { // anybody sends that one
		most = maxUpload
	}
	r.Body = http.MaxBytesReader(w, r.Body, most)
	if r.URL.Path == "/console" || r.URL.Path == "/" {
		http.Redirect(w, r, "/console/", http.StatusSeeOther)
		return
	}
	c.mux.ServeHTTP(w, r)
}

// known reports whether a host is this one's: a name that was configured, an address, or localhost. Another name that leads
// here is somebody's who would have a browser mix up the two (DNS rebinding).
func (c *Console) known(host string) bool {
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	}
	host = strings.TrimSuffix(strings.TrimPrefix(host, "["), "]")
	if _, err := netip.ParseAddr(host); err == nil {
		return true
	}
	return strings.EqualFold(host, "localhost") || slices.ContainsFunc(c.cfg.Names, func(n string) bool { return strings.EqualFold(n, host) })
}

// A page is one request of somebody and what is known of him.
type page struct {
	c *Console
	w http.ResponseWriter
	r *http.Request

	Session *Session // nil before the login
	Lang    string
	Name    string // of the template
	Section string // where the navigation stands
	Notice  string // one of notices, by its key
	Refusal *Refusal
	Waiting []wire.Proposal // for a second person, of what the page is about
	Others  int             // more of them
	Refresh int             // seconds; 0: the page stays as it is
	Again   string          // what is asked for then
	Form    url.Values
	Data    any
}

// A Refusal is what a route said no with.
type Refusal struct{ wire.Problem }

func (e *Refusal) Error() string { return e.Code + ": " + e.Detail }

// proposed is an answer that waits for a second person.
type proposed struct{ body []byte }

func (*proposed) Error() string { return "a second person has to approve" }

func (c *Console) begin(w http.ResponseWriter, r *http.Request) *page {
	lang := languages[0]
	if k, err := r.Cookie("yj-lang"); err == nil && slices.Contains(languages, k.Value) {
		lang = k.Value
	}
	return &page{c: c, w: w, r: r, Session: c.cfg.Backend.Session(r), Lang: lang, Form: url.Values{}}
}

// open registers a page for anybody.
func (c *Console) open(pattern string, h func(*page)) {
	c.mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) { h(c.begin(w, r)) })
}

// page registers one for whoever has logged in. A POST has to bear the session's token.
func (c *Console) page(pattern string, h func(*page)) {
	c.open(pattern, func(p *page) {
		if p.Session == nil {
			if p.r.Method != http.MethodGet {
				p.problem(http.StatusUnauthorized, "unauthenticated", "会话已结束，请重新登录 (the session has ended, log in again)")
				return
			}
			http.Redirect(p.w, p.r, "/console/login?then="+url.QueryEscape(p.r.URL.RequestURI()), http.StatusSeeOther)
			return
		}
		if p.r.Method == http.MethodPost {
			if err := p.parseForm(); err != nil {
				p.problem(http.StatusBadRequest, "invalid_request", "表单无法读出或过大 (the form cannot be read, or is too large)")
				return
			}
			if !equalStrings(p.r.PostFormValue("token"), p.Session.Token) {
				p.problem(http.StatusForbidden, "forbidden", "页面已过期，请返回刷新后再提交 (the page is out of date: go back, reload, and send it again)")
				return
			}
		}
		if path := p.r.URL.Path; p.Session.MustChange && path != "/console/password" && path != "/console/logout" {
			http.Redirect(p.w, p.r, "/console/password", http.StatusSeeOther)
			return
		}
		h(p)
	})
}

func (p *page) parseForm() error {
	var err error
	if strings.HasPrefix(p.r.Header.Get("Content-Type"), "multipart/form-data") {
		err = p.r.ParseMultipartForm(maxUpload) // all of it in memory: no file is left behind
	} else {
		err = p.r.ParseForm()
	}
	p.Form = p.r.PostForm
	return err
}

// may reports whether the session may use a route.
func (p *page) may(method, pattern string) bool {
	return p.Session != nil && p.c.cfg.Backend.May(p.Session, method, pattern)
}

// only refuses a page that leads to nothing but a route that the role may not use.
func (p *page) only(route string) bool {
	if !p.May(route) {
		p.problem(http.StatusForbidden, "forbidden", "该角色无此权限 (this is no work of the administrator's role)")
		return false
	}
	return true
}

// May is may, for templates: "POST /admin/v1/signers".
func (p *page) May(route string) bool {
	method, pattern, _ := strings.Cut(route, " ")
	return p.may(method, pattern)
}

// ask uses a route. Names in its pattern are taken from params in their order; into takes the answer, if it is not nil. What
// the route refuses is a *Refusal, what waits for somebody a *proposed.
func (p *page) ask(route string, body, into any, params ...string) error {
	method, path, _ := strings.Cut(route, " ")
	parts := strings.Split(path, "/")
	for i, part := range parts {
		if strings.HasPrefix(part, ":") {
			parts[i], params = url.PathEscape(params[0]), params[1:]
		}
	}
	var in []byte
	if body != nil {
		var err error
		if in, err = json.Marshal(body); err != nil {
			return err
		}
	}
	status, out := p.c.cfg.Backend.Ask(p.r, method, strings.Join(parts, "/"), in)
	return read(status, out, into)
}

// read takes a route's answer apart.
func read(status int, out []byte, into any) error {
	switch {
	case status == http.StatusAccepted:
		return &proposed{out}
	case status >= 400:
		e := new(Refusal)
		if err := json.Unmarshal(out, &e.Problem); err != nil || e.Code == "" {
			e.Problem = wire.Problem{Status: status, Code: "internal", Detail: "内部错误 (internal error)"}
		}
		return e
	case into != nil:
		return json.Unmarshal(out, into)
	}
	return nil
}

// problem shows a page that has nothing but a refusal.
func (p *page) problem(status int, code, detail string) {
	p.Name, p.Data = "refused", nil
	p.Refusal = &Refusal{wire.Problem{Status: status, Code: code, Detail: detail}}
	p.render(status)
}

// fail shows what a route refused.
func (p *page) fail(err error) {
	var e *Refusal
	if errors.As(err, &e) {
		p.Name, p.Data, p.Refusal = "refused", nil, e
		p.render(max(400, e.Status))
		return
	}
	p.problem(http.StatusInternalServerError, "internal", "内部错误 (internal error)")
}

// acted ends a POST: at another page with a notice, or at the same one with what was refused.
func (p *page) acted(err error, to, notice string, again func()) {
	var waits *proposed
	var e *Refusal
	switch {
	case err == nil:
		p.redirect(to, notice)
	case errors.As(err, &waits):
		p.redirect("/console/approvals", "proposed")
	case errors.As(err, &e):
		p.Refusal = e
		again()
	default:
		p.fail(err)
	}
}

func (p *page) redirect(to, notice string) {
	http.Redirect(p.w, p.r, to+"?notice="+notice, http.StatusSeeOther)
}

// show renders a page of a section.
func (p *page) show(name string, data any) {
	p.Name, p.Data = name, data
	status := http.StatusOK
	if p.Refusal != nil {
		status = max(400, p.Refusal.Status)
	}
	if n := p.r.URL.Query().Get("notice"); p.r.Method == http.MethodGet && notices[n] != [2]string{} {
		p.Notice = n
	}
	p.render(status)
}

func (p *page) render(status int) {
	var b bytes.Buffer
	if err := p.c.pages[p.Lang][p.Name].ExecuteTemplate(&b, "layout.html", p); err != nil {
		http.Error(p.w, "页面无法生成 (the page could not be made)", http.StatusInternalServerError)
		return
	}
	p.w.Header().Set("Content-Type", "text/html; charset=utf-8")
	p.w.WriteHeader(status)
	_, _ = p.w.Write(b.Bytes()) // whoever went away sees nothing
}

// language keeps what somebody chose, and leads back.
func (c *Console) language(w http.ResponseWriter, r *http.Request) {
	lang := r.PathValue("lang")
	if !slices.Contains(languages, lang) {
		http.NotFound(w, r)
		return
	}
	http.SetCookie(w, &http.Cookie{Name: "yj-lang", Value: lang, Path: "/console/", MaxAge: 365 * 24 * 3600, Secure: true, HttpOnly: true, SameSite: http.SameSiteStrictMode})
	http.Redirect(w, r, within(r.URL.Query().Get("back")), http.StatusSeeOther)
}

// within is a path of the console, or its first page: nobody is led elsewhere.
func within(path string) string {
	u, err := url.Parse(path)
	if err != nil || u.IsAbs() || u.Host != "" || u.User != nil || !strings.HasPrefix(u.Path, "/console/") || strings.Contains(u.Path, "..") || strings.Contains(u.Path, "\\") {
		return "/console/"
	}
	return (&url.URL{Path: u.Path, RawQuery: u.RawQuery}).String()
}

func (c *Console) stylesheet(w http.ResponseWriter, _ *http.Request) {
	send(w, "text/css; charset=utf-8", c.css)
}

func (c *Console) mark(w http.ResponseWriter, _ *http.Request) {
	svg, _ := files.ReadFile("assets/mark.svg") // embedded
	send(w, "image/svg+xml", svg)
}

func (c *Console) logo(w http.ResponseWriter, r *http.Request) {
	if c.cfg.Theme.Logo == nil {
		http.NotFound(w, r)
		return
	}
	send(w, "image/png", c.cfg.Theme.Logo)
}

// send sends an asset, whose address has its version: a browser may keep it.
func send(w http.ResponseWriter, contentType string, body []byte) {
	w.Header().Set("Content-Type", contentType)
	w.Header().Set("Cache-Control", "private, max-age=3600")
	_, _ = w.Write(body)
}

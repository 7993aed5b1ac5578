package api_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"yinjian/api"
	"yinjian/api/wire"
	"yinjian/appliance/account"
	"yinjian/appliance/problem"
)

// accounts fakes the directory's administrators: the password of each is its id and "-Password-1".
type accounts struct {
	api.Accounts
	mu      sync.Mutex
	all     map[string]*account.Administrator // guarded by mu; values are replaced
	must    map[string]bool                   // guarded by mu
	notices []api.Notice                      // guarded by mu
	asked   []any                             // guarded by mu
	fail    error                             // of Note; guarded by mu
}

func newAccounts() *accounts {
	a := &accounts{all: map[string]*account.Administrator{}, must: map[string]bool{}}
	for id, role := range map[string]account.Role{"zhang": account.System, "li": account.Security, "liu": account.Security, "wang": account.Auditor, "zhao": account.Operator} {
		a.all[id] = &account.Administrator{Version: 1, ID: id, Name: "姓" + id, Role: role}
	}
	return a
}

func (a *accounts) change(id string, f func(*account.Administrator)) {
	a.mu.Lock()
	defer a.mu.Unlock()
	one := *a.all[id]
	one.Version++
	f(&one)
	a.all[id] = &one
}

func (a *accounts) Administrator(id string) (*account.Administrator, bool, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	one := a.all[id]
	return one, a.must[id], one != nil && !one.Stopped
}

func (a *accounts) Authenticate(_ context.Context, l account.LoginAttempt) (*account.Administrator, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	one := a.all[l.ID]
	if one == nil || one.Stopped || l.Password != l.ID+"-Password-1" || one.Certificate != nil && (len(l.Challenge) != 32 || string(l.Signature) != string(l.Challenge)) {
		return nil, problem.New(problem.LoginFailed, "不对 (wrong)", "再来 (again)")
	}
	return one, nil
}

func (a *accounts) note(actor string, req any) (any, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.asked = append(a.asked, []any{actor, req})
	return m{"ok": true}, nil
}

func (a *accounts) ChangePassword(_ context.Context, actor, _, id string, req api.ChangePassword) (any, error) {
	return a.note(actor, id)
}
func (a *accounts) BootstrapAdministrators(_ context.Context, actor string, req api.BootstrapAdministrators) (any, error) {
	return a.note(actor, req)
}
func (a *accounts) AddAdministrator(_ context.Context, actor string, req api.AddAdministrator) (any, error) {
	return a.note(actor, req)
}
func (a *accounts) ListAdministrators(_ context.Context, actor string) (any, error) {
	return a.note(actor, "administrators")
}
func (a *accounts) StopAdministrator(_ context.Context, actor string, req api.Decision) (any, error) {
	return a.note(actor, req)
}
func (a *accounts) StartAdministrator(_ context.Context, actor string, req api.Decision) (any, error) {
	return a.note(actor, req)
}
func (a *accounts) SetAdministratorPassword(_ context.Context, actor string, req api.SetAdministratorPassword) (any, error) {
	return a.note(actor, req)
}
func (a *accounts) SetAdministratorCertificate(_ context.Context, actor string, req api.SetAdministratorCertificate) (any, error) {
	return a.note(actor, req)
}
func (a *accounts) Note(_ context.Context, n api.Notice) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.notices = append(a.notices, n)
	return a.fail
}

// kinds are those of the notices so far.
func (a *accounts) kinds() (out []string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, n := range a.notices {
		out = append(out, n.Kind)
	}
	return out
}

// An office is an appliance's face with both of its administration's listeners.
type office struct {
	*kit
	accounts *accounts
	url      string // of the TLS listener
	local    *http.Client
}

func openOffice(t *testing.T, options ...option) *office {
	t.Helper()
	o := &office{accounts: newAccounts()}
	o.kit = start(t, append([]option{func(c *api.Config, _ *http.Server) { c.Accounts, c.AdminLogin = o.accounts, true }}, options...)...)
	cert, _ := certificate(t)
	ln, err := api.ListenTLS("127.0.0.1:0", func() *tls.Certificate { return &cert }, o.clock, false, nil, 64)
	if err != nil {
		t.Fatal(err)
	}
	o.url = "https://" + ln.Addr().String()
	serve(t, o.server.NewAdminTLSServer(), ln)
	socket := o.socket()
	o.local = &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}}}
	t.Cleanup(o.local.CloseIdleConnections)
	return o
}

// ask sends a request to the TLS listener, or to the local socket, with a session's token if there is one.
func (o *office) ask(t *testing.T, local bool, token, method, path string, body any, change ...func(*http.Request)) reply {
	t.Helper()
	h, base := o.http, o.url
	if local {
		h, base = o.local, "http://yinjian"
	}
	var in io.Reader
	if method == "POST" {
		in = bytes.NewReader(encode(t, body))
	}
	r, err := http.NewRequestWithContext(t.Context(), method, base+path, in)
	if err != nil {
		t.Fatal(err)
	}
	if method == "POST" {
		r.Header.Set("Content-Type", "application/json")
	}
	if token != "" {
		r.Header.Set("Authorization", "Bearer "+token)
	}
	for _, f := range change {
		f(r)
	}
	resp, err := h.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	out := reply{status: resp.StatusCode, header: resp.Header}
	if out.body, err = io.ReadAll(resp.Body); err != nil {
		t.Fatal(err)
	}
	_ = json.Unmarshal(out.body, &out.problem) // an answer that is none has no code
	return out
}

func (o *office) login(t *testing.T, local bool, id string) string {
	t.Helper()
	got := o.ask(t, local, "", "POST", "/admin/v1/login", wire.Login{Name: id, Password: id + "-Password-1"})
	var in wire.LoggedIn
	if err := json.Unmarshal(got.body, &in); err != nil || got.status != 200 || len(in.Session) != 64 {
		t.Fatalf("%s does not get in: %d %s", id, got.status, got.body)
	}
	return in.Session
}

func (o *office) wants(t *testing.T, what string, got reply, status int, code problem.Code) {
	t.Helper()
	if got.status != status || got.problem.Code != string(code) {
		t.Errorf("%s: %d %s; want %d %s", what, got.status, got.body, status, code)
	}
}

func pathOf(pattern string) string {
	return strings.NewReplacer(":id", "x1", ":serial", "01", ":name", "b").Replace(pattern)
}

// Each route, at each listener, with each role, without a login, and with a password that has to be changed: who may is who the
// table says, and nobody else.
func TestEveryRouteWithEveryRole(t *testing.T) {
	t.Parallel()
	o := openOffice(t)
	roles := map[account.Role]string{account.System: "zhang", account.Security: "li", account.Auditor: "wang", account.Operator: "zhao"}
	for _, local := range []bool{true, false} {
		tokens := map[account.Role]string{}
		for role, id := range roles {
			tokens[role] = o.login(t, local, id)
		}
		for _, l := range api.Matrix() {
			at := fmt.Sprintf("%s %s, local %v", l.Method, l.Pattern, local)
			body := m{}
			health := strings.HasPrefix(l.Pattern, "/health/")
			got := o.ask(t, local, "", l.Method, pathOf(l.Pattern), body)
			free := l.Pattern == "/admin/v1/login" || l.Pattern == "/admin/v1/login/challenge" || health ||
				local && slices.Contains([]string{"/admin/v1/state", "/metrics", "/admin/v1/provision", "/admin/v1/unlock", "/admin/v1/start", "/admin/v1/administrators/bootstrap"}, l.Pattern)
			if refused := got.problem.Code == string(problem.LoginRequired) && got.status == 401; refused == free {
				t.Errorf("%s, without a login: %d %s", at, got.status, got.body)
			}
			if got := o.ask(t, local, strings.Repeat("0a", 32), l.Method, pathOf(l.Pattern), body); (got.status == 401) == free {
				t.Errorf("%s, with a session that nobody has: %d %s", at, got.status, got.body)
			}
			if l.Pattern == "/admin/v1/logout" {
				continue // ends the session
			}
			for role, token := range tokens {
				got := o.ask(t, local, token, l.Method, pathOf(l.Pattern), body)
				allowed := len(l.Roles) == 0 || slices.Contains(l.Roles, role) || free
				refused := got.status == 403 && got.problem.Code == string(problem.Forbidden) || got.status == 401 && got.problem.Code == string(problem.LoginRequired)
				if refused == allowed || got.status == 500 {
					t.Errorf("%s, as %s: %d %s; may: %v", at, role, got.status, got.body, allowed)
				}
			}
		}
		// Who has to change the password may do that, and leave.
		o.accounts.mu.Lock()
		o.accounts.must["li"] = true
		o.accounts.mu.Unlock()
		for _, l := range api.Matrix() {
			if l.Pattern == "/admin/v1/logout" || l.Without != 0 {
				continue
			}
			own := l.Pattern == "/admin/v1/password" || l.Pattern == "/admin/v1/session"
			got := o.ask(t, local, tokens[account.Security], l.Method, pathOf(l.Pattern), m{})
			if refused := got.status == 403 && got.problem.Code == string(problem.PasswordEnded); refused == own {
				t.Errorf("%s %s before the password is changed: %d %s", l.Method, l.Pattern, got.status, got.body)
			}
		}
		o.accounts.mu.Lock()
		o.accounts.must["li"] = false
		o.accounts.mu.Unlock()
	}
	// An application's face knows none of it.
	for _, l := range api.Matrix() {
		if strings.HasPrefix(l.Pattern, "/health/") {
			continue
		}
		r, err := http.NewRequestWithContext(t.Context(), l.Method, "https://"+o.addr+pathOf(l.Pattern), nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := o.http.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != 404 {
			t.Errorf("%s %s answers %d at the API's listener", l.Method, l.Pattern, resp.StatusCode)
		}
	}
}

func TestSessions(t *testing.T) {
	t.Parallel()
	o := openOffice(t)
	mine := func(local bool, token string) reply { return o.ask(t, local, token, "GET", "/admin/v1/session", nil) }
	token := o.login(t, false, "wang")
	if got := mine(false, token); got.status != 200 || !strings.Contains(string(got.body), `"administrator":"wang"`) || strings.Contains(string(got.body), token) {
		t.Errorf("%d %s", got.status, got.body)
	}
	o.wants(t, "at the other listener", mine(true, token), 401, problem.LoginRequired)
	// No fixation: a login makes a session of its own, whatever it came with.
	got := o.ask(t, false, token, "POST", "/admin/v1/login", wire.Login{Name: "li", Password: "li-Password-1"})
	var in wire.LoggedIn
	if err := json.Unmarshal(got.body, &in); err != nil || in.Session == token || in.Session == "" {
		t.Errorf("%d %s", got.status, got.body)
	}
	if got := mine(false, token); !strings.Contains(string(got.body), `"administrator":"wang"`) {
		t.Errorf("somebody else's login changed the session: %s", got.body)
	}
	// Idle, and old.
	o.server.Age(14*time.Minute, 0)
	if got := mine(false, token); got.status != 200 {
		t.Errorf("after 14 minutes: %d %s", got.status, got.body)
	}
	o.server.Age(15*time.Minute, 0)
	o.wants(t, "after 15 minutes idle", mine(false, token), 401, problem.LoginRequired)
	token = o.login(t, false, "wang")
	for range 8 {
		o.server.Age(0, time.Hour)
	}
	o.wants(t, "after 8 hours", mine(false, token), 401, problem.LoginRequired)
	// Logged out.
	token = o.login(t, true, "wang")
	if got := o.ask(t, true, token, "POST", "/admin/v1/logout", m{}); got.status != 200 {
		t.Errorf("%d %s", got.status, got.body)
	}
	o.wants(t, "after the logout", mine(true, token), 401, problem.LoginRequired)
	if !slices.Contains(o.accounts.kinds(), "administration.logout") {
		t.Error("the logout is not journalled")
	}
	// Stopped: the live sessions end at once. So does any other change: a new password, another role.
	token, other := o.login(t, false, "wang"), o.login(t, true, "zhang")
	o.accounts.change("wang", func(a *account.Administrator) { a.Stopped = true })
	o.wants(t, "stopped", mine(false, token), 401, problem.LoginRequired)
	o.accounts.change("wang", func(a *account.Administrator) { a.Stopped = false })
	o.wants(t, "started again", mine(false, token), 401, problem.LoginRequired)
	o.accounts.change("zhang", func(*account.Administrator) {})
	o.wants(t, "with a new password", mine(true, other), 401, problem.LoginRequired)
	// Nine logins of one administrator leave eight sessions, and another's is left alone.
	kept, first := o.login(t, false, "li"), o.login(t, false, "zhao")
	for range 8 {
		o.login(t, false, "zhao")
	}
	o.wants(t, "the oldest of nine", mine(false, first), 401, problem.LoginRequired)
	if got := mine(false, kept); got.status != 200 {
		t.Errorf("another's: %d %s", got.status, got.body)
	}
	// A challenge is good once, and not for long.
	o.accounts.change("wang", func(a *account.Administrator) { a.Certificate = []byte{1} })
	challenge := func() []byte {
		var c wire.LoginChallenged
		if got := o.ask(t, false, "", "POST", "/admin/v1/login/challenge", m{}); json.Unmarshal(got.body, &c) != nil || len(c.Challenge) != 32 {
			t.Fatalf("%d %s", got.status, got.body)
		}
		return c.Challenge
	}
	with := func(c []byte) reply {
		return o.ask(t, false, "", "POST", "/admin/v1/login", wire.Login{Name: "wang", Password: "wang-Password-1", Challenge: c, Signature: c})
	}
	c := challenge()
	for range 300 { // anybody may ask for as many as he likes: this one stays good
		challenge()
	}
	if got := with(c); got.status != 200 {
		t.Errorf("%d %s", got.status, got.body)
	}
	o.wants(t, "a challenge twice", with(c), 401, problem.LoginFailed)
	o.wants(t, "a challenge of nobody's", with(bytes.Repeat([]byte{7}, 32)), 401, problem.LoginFailed)
	c = challenge()
	c[0]++
	o.wants(t, "one with another time", with(c), 401, problem.LoginFailed)
	c = challenge()
	o.server.Age(2*time.Minute, 0)
	o.wants(t, "an old challenge", with(c), 401, problem.LoginFailed)
	// For another host.
	o2 := openOffice(t, func(cfg *api.Config, _ *http.Server) { cfg.Names = []string{"sign.hospital.example", "127.0.0.1"} })
	o2.wants(t, "another host", o2.ask(t, false, "", "POST", "/admin/v1/login", m{}, func(r *http.Request) { r.Host = "evil.example" }), 400, problem.InvalidRequest)
	if got := o2.login(t, false, "li"); got == "" {
		t.Error("no session")
	}
}

// Another method, another spelling of the path or a header that names another method lead to no route that the role may not use.
func TestSideDoors(t *testing.T) {
	t.Parallel()
	o := openOffice(t)
	token := o.login(t, false, "wang")
	for _, method := range []string{"HEAD", "OPTIONS", "PUT", "PATCH", "DELETE", "post"} {
		for _, path := range []string{"/admin/v1/machines/b/drain", "/admin/v1/applications", "/admin/v1/administrators/li/stop"} {
			got := o.ask(t, false, token, method, path, nil)
			preflight := method == "OPTIONS" && got.status == 204 && len(got.body) == 0 && got.header.Get("Access-Control-Allow-Origin") == "" // lets no page of elsewhere in
			if got.status < 400 && !preflight {
				t.Errorf("%s %s: %d %s", method, path, got.status, got.body)
			}
		}
	}
	for _, path := range []string{
		"/admin/v1/machines/b/drain/", "//admin/v1/machines/b/drain", "/admin/v1/./machines/b/drain", "/ADMIN/v1/machines/b/drain", "/admin%2Fv1/machines/b/drain",
		"/admin/v1/machines/b/%64rain", "/admin/v1/machines/b/drain;x=1", "/console/../admin/v1/machines/b/drain", "/admin/v1/session/../machines/b/drain",
		"/admin/v1/machines/b/drain?role=system", "/admin/v1/machines/..%2Fb/drain",
	} {
		if got := o.ask(t, false, token, "POST", path, m{"reason": "x"}); got.status < 400 {
			t.Errorf("%s: %d %s", path, got.status, got.body)
		}
	}
	for _, name := range []string{"X-HTTP-Method-Override", "X-Original-URL", "X-Rewrite-URL"} {
		for _, value := range []string{"POST", "/admin/v1/machines/b/drain"} {
			if got := o.ask(t, false, token, "POST", "/admin/v1/machines/b/drain", m{"reason": "x"}, func(r *http.Request) { r.Header.Set(name, value) }); got.status != 403 {
				t.Errorf("%s %s: %d %s", name, value, got.status, got.body)
			}
		}
	}
	if len(o.admin.asked) > 0 {
		t.Errorf("done: %v", o.admin.asked)
	}
}

// A slowAdmin takes its time to verify.
type slowAdmin struct {
	api.Admin
	entered, leave chan struct{}
}

func (a slowAdmin) AuditVerify(context.Context, string, api.AuditVerify) (any, error) {
	close(a.entered)
	<-a.leave
	return m{}, nil
}

// Connections of nobody's do not cut off what an administrator has asked for.
func TestCrowdAtTheAdministratorsListener(t *testing.T) {
	t.Parallel()
	slow := slowAdmin{entered: make(chan struct{}), leave: make(chan struct{})}
	o := openOffice(t, func(c *api.Config, _ *http.Server) { slow.Admin = c.Admin; c.Admin = slow })
	r, err := http.NewRequestWithContext(t.Context(), "POST", o.url+"/admin/v1/audit/verify", strings.NewReader("{}"))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("Authorization", "Bearer "+o.login(t, false, "wang"))
	answered := make(chan error, 1)
	go func() {
		resp, err := o.http.Do(r)
		if err == nil {
			resp.Body.Close()
		}
		answered <- err
	}()
	<-slow.entered
	for range 20 { // sixteen are for one address
		c, err := tls.Dial("tcp", strings.TrimPrefix(o.url, "https://"), o.http.Transport.(*http.Transport).TLSClientConfig)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
	}
	close(slow.leave)
	if err := <-answered; err != nil {
		t.Error(err)
	}
}

// A talkativeAdmin says more than both ends' buffers hold.
type talkativeAdmin struct{ api.Admin }

func (talkativeAdmin) AuditVerify(context.Context, string, api.AuditVerify) (any, error) {
	return m{"much": strings.Repeat("x", 32<<20)}, nil
}

// A leavingListener tells of each connection that the server has closed.
type leavingListener struct {
	net.Listener
	left chan struct{}
}

type leavingConn struct {
	net.Conn
	once sync.Once
	left chan struct{}
}

func (l leavingListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &leavingConn{Conn: c, left: l.left}, nil
}

func (c *leavingConn) Close() error {
	c.once.Do(func() { c.left <- struct{}{} })
	return c.Conn.Close()
}

// An administrator who does not read what was asked for loses the connection, at a route and at a page, however many requests
// were sent in advance.
func TestAdministratorDoesNotRead(t *testing.T) {
	t.Parallel()
	o := openOffice(t, func(c *api.Config, _ *http.Server) {
		c.Limits.Sending = 300 * time.Millisecond
		c.Admin = talkativeAdmin{c.Admin}
	})
	token := o.login(t, false, "wang") // sessions are one for all of the face's TLS listeners
	cert, pool := certificate(t)
	for name, request := range map[string]string{
		"a route":    "POST /admin/v1/audit/verify HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nAuthorization: Bearer " + token + "\r\nContent-Length: 2\r\n\r\n{}",
		"many pages": strings.Repeat("GET /console/assets/console.css HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 20_000),
	} {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		left := make(chan struct{}, 1)
		serve(t, o.server.NewAdminTLSServer(), tls.NewListener(leavingListener{ln, left}, &tls.Config{Certificates: []tls.Certificate{cert}, Time: func() time.Time { return epoch }}))
		c, err := tls.Dial("tcp", ln.Addr().String(), &tls.Config{RootCAs: pool, Time: func() time.Time { return epoch }})
		if err != nil {
			t.Fatal(err)
		}
		go func() { _, _ = io.WriteString(c, request) }() // the server ends it
		select {
		case <-left:
		case <-time.After(30 * time.Second):
			t.Errorf("%s: nothing is read, and the connection is held", name)
		}
		c.Close()
	}
}

// Who guesses is stopped by address, whoever's the names are.
func TestLoginsOfOneAddress(t *testing.T) {
	t.Parallel()
	o := openOffice(t)
	n := 0
	for ; n < 100; n++ {
		got := o.ask(t, false, "", "POST", "/admin/v1/login", wire.Login{Name: fmt.Sprintf("nobody%d", n), Password: "no"})
		if got.status == 429 {
			break
		}
		o.wants(t, "a guess", got, 401, problem.LoginFailed)
	}
	if n < 20 || n > 22 {
		t.Errorf("%d guesses were looked at", n)
	}
	o.wants(t, "the right password", o.ask(t, false, "", "POST", "/admin/v1/login", wire.Login{Name: "li", Password: "li-Password-1"}), 429, problem.RateLimited)
	o.login(t, true, "li") // the local socket is another place
}

// With the cookie a request that changes something has to come from a page of ours.
func TestCookieNeedsThePagesToken(t *testing.T) {
	t.Parallel()
	o := openOffice(t)
	token := o.login(t, false, "wang")
	cookie := func(r *http.Request) {
		r.Header.Set("Cookie", "__Host-yinjian="+token)
	}
	if got := o.ask(t, false, "", "GET", "/admin/v1/session", nil, cookie); got.status != 200 {
		t.Errorf("%d %s", got.status, got.body)
	}
	o.wants(t, "no token", o.ask(t, false, "", "POST", "/admin/v1/audit/verify", m{}, cookie), 403, problem.Forbidden)
	other := o.login(t, false, "wang")
	o.wants(t, "another session's", o.ask(t, false, "", "POST", "/admin/v1/audit/verify", m{}, cookie, func(r *http.Request) {
		r.Header.Set("X-Yinjian-CSRF", o.server.CSRF(other))
	}), 403, problem.Forbidden)
	if got := o.ask(t, false, "", "POST", "/admin/v1/audit/verify", m{}, cookie, func(r *http.Request) { r.Header.Set("X-Yinjian-CSRF", o.server.CSRF(token)) }); got.status != 200 {
		t.Errorf("%d %s", got.status, got.body)
	}
	o.wants(t, "at the local socket", o.ask(t, true, "", "GET", "/admin/v1/session", nil, cookie), 401, problem.LoginRequired)
}

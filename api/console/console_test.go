package console_test

import (
	"net/http"
	"slices"
	"strings"
	"testing"

	"yinjian/api/console"
	"yinjian/api/wire"
)

// Every page says what it may load, and is kept by nobody.
func TestEveryAnswerIsFenced(t *testing.T) {
	t.Parallel()
	s := newConsole(t, &clinic{signers: 120}, nil)
	for _, p := range pages {
		resp, body := get(t, s, p.role, p.at)
		want := http.StatusOK
		if p.name == "refused" {
			want = http.StatusForbidden
		}
		if resp.StatusCode != want || !strings.Contains(body, "</html>") {
			t.Errorf("%s: %s\n%s", p.name, resp.Status, body)
		}
		h := resp.Header
		if c := h.Get("Content-Security-Policy"); !strings.HasPrefix(c, "default-src 'none'") || !strings.Contains(c, "script-src 'none'") || !strings.Contains(c, "form-action 'self'") || !strings.Contains(c, "frame-ancestors 'none'") || strings.Contains(c, "unsafe") {
			t.Errorf("%s: %q", p.name, c)
		}
		if h.Get("Cache-Control") != "no-store" || h.Get("X-Content-Type-Options") != "nosniff" || h.Get("X-Frame-Options") != "DENY" || h.Get("Referrer-Policy") != "no-referrer" {
			t.Errorf("%s: %v", p.name, h)
		}
		for _, never := range []string{"<script", "<style", " style=", " onclick", `src="http`, `href="http`} {
			if strings.Contains(body, never) {
				t.Errorf("%s has %q", p.name, never)
			}
		}
		if strings.Count(body, `method="post"`) != strings.Count(body, `name="token"`)+strings.Count(body, `action="/console/login"`) {
			t.Errorf("%s: a form without the session's token", p.name)
		}
	}
}

// Without a session there is the login alone, and after it the page that was asked for; nobody is led elsewhere.
func TestLogin(t *testing.T) {
	t.Parallel()
	c := &clinic{signers: 3}
	s := newConsole(t, c, nil)
	for _, p := range pages {
		if p.role == "" {
			continue
		}
		resp, _ := get(t, s, "", p.at)
		if to := resp.Header.Get("Location"); resp.StatusCode != http.StatusSeeOther || !strings.HasPrefix(to, "/console/login?then=%2Fconsole%2F") {
			t.Errorf("%s: %s to %q", p.name, resp.Status, to)
		}
	}
	if len(c.asked) > 0 {
		t.Errorf("routes were asked for nobody: %q", c.asked)
	}
	resp, body := post(t, s, "", "/console/login", "name=security&password=Wr0ng-wr0ng&then=/console/signers")
	if resp.StatusCode != http.StatusUnauthorized || !strings.Contains(body, "登录名或口令不对") || !strings.Contains(body, `value="security"`) || strings.Contains(body, "Wr0ng") || len(resp.Cookies()) > 0 {
		t.Errorf("wrong password: %s %v\n%s", resp.Status, resp.Cookies(), body)
	}
	// Whoever has not logged in sends no files that fill the memory.
	large := "--b\r\nContent-Disposition: form-data; name=\"signature\"; filename=\"s\"\r\n\r\n" + strings.Repeat("x", 65<<10) + "\r\n--b--\r\n"
	resp, _ = post(t, s, "", "/console/login", large, func(r *http.Request) { r.Header.Set("Content-Type", "multipart/form-data; boundary=b") })
	if resp.StatusCode != http.StatusBadRequest {
		t.Errorf("a large file before the login: %s", resp.Status)
	}
	for then, want := range map[string]string{
		"/console/signers?q=1": "/console/signers?q=1", "": "/console/", "https://evil.test/console/": "/console/", "//evil.test/console/": "/console/",
		"/console/../../evil": "/console/", "/console/\\\\evil.test": "/console/", "javascript:alert(1)": "/console/", "/other": "/console/",
	} {
		resp, _ := post(t, s, "", "/console/login", "name=security&password=right&then="+strings.ReplaceAll(then, "&", "%26"))
		k := resp.Cookies()
		if resp.StatusCode != http.StatusSeeOther || resp.Header.Get("Location") != want || len(k) != 1 || !k[0].Secure || !k[0].HttpOnly || k[0].SameSite != http.SameSiteStrictMode {
			t.Errorf("then %q: %s to %q, %v", then, resp.Status, resp.Header.Get("Location"), k)
		}
	}
}

// What changes something is a page's own doing: another site's form, a form without the session's token or with another's, and
// an address alone do nothing.
func TestForgery(t *testing.T) {
	t.Parallel()
	c := &clinic{signers: 20}
	s := newConsole(t, c, nil)
	const at, form = "/console/signers/D00012/stop", "reason=x&token="
	for name, try := range map[string]func() int{
		"no token":        func() int { r, _ := post(t, s, "security", at, "reason=x"); return r.StatusCode },
		"empty token":     func() int { r, _ := post(t, s, "security", at, form); return r.StatusCode },
		"another's token": func() int { r, _ := post(t, s, "security", at, form+"token-of-operator"); return r.StatusCode },
		"token in the address": func() int {
			r, _ := post(t, s, "security", at+"?token=token-of-security", "reason=x")
			return r.StatusCode
		},
		"another site": func() int {
			r, _ := post(t, s, "security", at, form+"token-of-security", func(r *http.Request) { r.Header.Set("Sec-Fetch-Site", "cross-site") })
			return r.StatusCode
		},
		"a site beside": func() int {
			r, _ := post(t, s, "security", at, form+"token-of-security", func(r *http.Request) { r.Header.Set("Sec-Fetch-Site", "same-site") })
			return r.StatusCode
		},
		"another origin": func() int {
			r, _ := post(t, s, "security", at, form+"token-of-security", func(r *http.Request) {
				r.Header.Del("Sec-Fetch-Site")
				r.Header.Set("Origin", "https://evil.test")
			})
			return r.StatusCode
		},
		"login from elsewhere": func() int {
			r, _ := post(t, s, "", "/console/login", "name=security&password=right", func(r *http.Request) { r.Header.Set("Sec-Fetch-Site", "cross-site") })
			return r.StatusCode
		},
		"too large": func() int {
			r, _ := post(t, s, "security", at, form+"token-of-security&x="+strings.Repeat("x", 65<<10))
			return r.StatusCode - http.StatusBadRequest + http.StatusForbidden
		},
	} {
		if got := try(); got != http.StatusForbidden {
			t.Errorf("%s: %d", name, got)
		}
	}
	if r, _ := get(t, s, "security", at+"?reason=x&token=token-of-security"); r.StatusCode != http.StatusMethodNotAllowed {
		t.Errorf("GET: %s", r.Status)
	}
	if r, _ := post(t, s, "", at, form+"token-of-security"); r.StatusCode != http.StatusUnauthorized {
		t.Errorf("nobody: %s", r.Status)
	}
	for _, a := range c.asked {
		if strings.Contains(a, "/stop") {
			t.Fatalf("it was asked: %q", a)
		}
	}
	if r, _ := post(t, s, "security", at, form+"token-of-security"); r.StatusCode != http.StatusSeeOther || !c.isStopped("D00012") {
		t.Errorf("from the page: %s", r.Status)
	}
}

// A host that the listener is not called by is somebody's who points a name of his here.
func TestHost(t *testing.T) {
	t.Parallel()
	s := newConsole(t, &clinic{}, nil)
	for host, want := range map[string]int{
		"sign.hospital.test": 200, "SIGN.hospital.test:9443": 200, "127.0.0.1:9443": 200, "[::1]:9443": 200, "localhost": 200,
		"evil.test": 421, "sign.hospital.test.evil.test": 421, "127.0.0.1.evil.test": 421, "": 421,
	} {
		if host == "" {
			continue // net/http sends none
		}
		r, _ := get(t, s, "", "/console/login", func(r *http.Request) { r.Host = host })
		if r.StatusCode != want {
			t.Errorf("%q: %s", host, r.Status)
		}
	}
}

// What a role may not is not offered, and tried all the same it is the route that refuses.
func TestRolesSeeTheirOwn(t *testing.T) {
	t.Parallel()
	c := &clinic{signers: 20}
	s := newConsole(t, c, nil)
	offered := map[string][]string{
		"system":   {"/console/approvals", "/console/time", "/console/machines", "/console/tsa", "/console/certificates", "/console/backups"},
		"security": {"/console/approvals", "/console/signers", "/console/applications", "/console/time", "/console/machines", "/console/tsa", "/console/certificates"},
		"audit":    {"/console/approvals", "/console/signers", "/console/applications", "/console/records", "/console/changes", "/console/journal", "/console/time", "/console/machines", "/console/tsa", "/console/certificates", "/console/backups"},
		"operator": {"/console/approvals", "/console/signers", "/console/applications", "/console/records"},
	}
	for role, want := range offered {
		_, body := get(t, s, role, "/console/")
		for _, p := range offered["audit"] {
			if has := strings.Contains(body, `<a href="`+p+`">`); has != slices.Contains(want, p) {
				t.Errorf("%s: %s is offered: %v", role, p, has)
			}
			if r, _ := get(t, s, role, p); (r.StatusCode == 200) != slices.Contains(want, p) {
				t.Errorf("%s: %s: %s", role, p, r.Status)
			}
		}
	}
	for role, p := range map[string]string{"audit": "/console/signers/new", "operator": "/console/applications/new"} {
		if r, _ := get(t, s, role, p); r.StatusCode != http.StatusForbidden {
			t.Errorf("%s: %s: %s", role, p, r.Status)
		}
	}
	for _, try := range []struct{ role, page, offer, at, form string }{
		{"audit", "/console/signers/D00012", "/console/signers/D00012/stop", "/console/signers/D00012/stop", "reason=x"},
		{"audit", "/console/signers", "/console/signers/new", "/console/signers/new", "id=D9"},
		{"operator", "/console/applications/his", "/console/applications/his/stop", "/console/applications/his/stop", "reason=x"},
		{"operator", "/console/applications", "/console/applications/new", "/console/applications/new", "id=x"},
		{"security", "/console/time", "/console/time/sources", "/console/time/sources", "name=x"},
		{"security", "/console/machines", "/drain", "/console/machines/main/drain", "reason=x"},
		{"audit", "/console/tsa", "/console/tsa/stop", "/console/tsa/stop", "reason=x&unit=sm2"},
		{"system", "/console/certificates", "/console/certificates/import", "/console/certificates/import", "x=y"},
	} {
		if _, body := get(t, s, try.role, try.page); strings.Contains(body, try.offer) {
			t.Errorf("%s is offered %s", try.role, try.offer)
		}
		r, body := post(t, s, try.role, try.at, try.form+"&token=token-of-"+try.role)
		if r.StatusCode != http.StatusForbidden || !strings.Contains(body, "该角色无此权限") {
			t.Errorf("%s: %s: %s\n%s", try.role, try.at, r.Status, body)
		}
	}
}

// What forms ask is what the routes take, and what comes of it is told.
func TestForms(t *testing.T) {
	t.Parallel()
	c := &clinic{signers: 20, refuse: map[string]*wire.Problem{"POST /admin/v1/applications/lis/stop": {Status: 409, Code: "exists", Title: "已存在", Detail: "已停用 <b>", Next: "无"}}}
	s := newConsole(t, c, nil)
	for _, f := range []struct{ role, at, form, asked, to string }{
		{"security", "/console/signers/D00012/stop", "reason=%E7%A6%BB%E8%81%8C", `POST /admin/v1/signers/D00012/stop {"reason":"离职"}`, "/console/signers/D00012?notice=stopped"},
		{"security", "/console/signers/D00012/start", "reason=x", `POST /admin/v1/signers/D00012/start {"reason":"x"}`, "/console/signers/D00012?notice=started"},
		{"operator", "/console/signers/new", "id=D9&name=%E5%BC%A0&department=a&campus=b&algorithms=SM2&pin=314159&ca=evaluation&role=", `POST /admin/v1/signers {"algorithms":["SM2"],"ca":"evaluation","campus":"b","department":"a","id":"D9","name":"张","pin":"314159"}`, "/console/approvals?notice=proposed"},
		{"security", "/console/applications/his/limits", "rate=10&burst=20&hsm_rate=&hsm_sessions=3&reason=x", `POST /admin/v1/applications/his/limits {"burst":20,"hsm_sessions":3,"rate":10,"reason":"x"}`, "/console/applications/his?notice=changed"},
		{"security", "/console/applications/his/limits", "rate=ten&burst=0&reason=x", `POST /admin/v1/applications/his/limits {"burst":0,"rate":-1,"reason":"x"}`, "/console/applications/his?notice=changed"},
		{"security", "/console/applications/his/production", "production=no&reason=x", `POST /admin/v1/applications/his/production {"production":false,"reason":"x"}`, "/console/applications/his?notice=changed"},
		{"system", "/console/time/sources/ntp%201/remove", "reason=x", `POST /admin/v1/time/sources/ntp%201/remove {"reason":"x"}`, "/console/time?notice=changed"},
		{"system", "/console/machines/second/drain", "reason=x", `POST /admin/v1/machines/second/drain {"reason":"x"}`, "/console/machines?notice=changed"},
		{"system", "/console/tsa/start", "reason=x&unit=rsa", `POST /admin/v1/tsa/start {"reason":"x","unit":"rsa"}`, "/console/tsa?notice=started"},
		{"security", "/console/approvals/" + strings.Repeat("ab", 16) + "/approve", "sm3=0f&reason=", `POST /admin/v1/approvals/` + strings.Repeat("ab", 16) + `/approve {"sm3":"0f"}`, "/console/approvals?notice=approved"},
	} {
		c.mu.Lock()
		c.asked = nil
		c.mu.Unlock()
		r, body := post(t, s, f.role, f.at, f.form+"&token=token-of-"+f.role)
		if len(c.asked) == 0 || c.asked[0] != f.asked {
			t.Errorf("%s: asked %q, want %q", f.at, c.asked, f.asked)
		}
		if r.StatusCode != http.StatusSeeOther || r.Header.Get("Location") != f.to {
			t.Errorf("%s: %s to %q\n%s", f.at, r.Status, r.Header.Get("Location"), body)
		}
	}
	r, body := post(t, s, "security", "/console/applications/lis/stop", "reason=keep+this&token=token-of-security")
	if r.StatusCode != http.StatusConflict || !strings.Contains(body, "已停用 &lt;b&gt;") || !strings.Contains(body, "/console/help#exists") {
		t.Errorf("refused: %s\n%s", r.Status, body)
	}
	_, body = post(t, s, "security", "/console/applications/new", "id=emr&name=x&campus=y&stamp=required&rights=sign&consent=signer-pin&token=token-of-security")
	if !strings.Contains(body, "000102030405060708090a0b0c0d0e0f") {
		t.Errorf("the key is not shown\n%s", body)
	}
	if _, body := get(t, s, "security", "/console/signers?notice=%3Cb%3E"); strings.Contains(body, `role="status"`) {
		t.Error("a notice that nobody gave")
	}
}

// The list of signers is found page by page.
func TestSignerPages(t *testing.T) {
	t.Parallel()
	c := &clinic{signers: 6300}
	s := newConsole(t, c, nil)
	for at, want := range map[string][]string{
		"/console/signers":                              {"D00000", "D00049", "1 / 126", "page=2"},
		"/console/signers?page=126":                     {"D06250", "D06299", "126 / 126", "page=125"},
		"/console/signers?page=9999":                    {"没有符合的签名人"},
		"/console/signers?q=%E5%BF%83%E5%86%85":         {"心内科", "q=%e5%bf%83%e5%86%85&amp;state=&amp;page=2"},
		"/console/signers?page=-3&state=%22%3E%3Cscrip": {"D00000"},
	} {
		r, body := get(t, s, "audit", at)
		for _, w := range want {
			if r.StatusCode != 200 || !strings.Contains(body, w) {
				t.Errorf("%s: %s without %q", at, r.Status, w)
			}
		}
	}
	// The page of one costs little, though thousands have what was asked for in their own ids, and nobody is called so.
	for id, status := range map[string]int{"D00000": 200, "D03149": 200, "D03150": 200, "D06299": 200, "D0": 404, "D": 404, "D0631": 404, "9": 404} {
		c.mu.Lock()
		c.asked = nil
		c.mu.Unlock()
		r, body := get(t, s, "operator", "/console/signers/"+id)
		c.mu.Lock()
		asked := len(c.asked)
		c.mu.Unlock()
		if r.StatusCode != status || status == 200 && !strings.Contains(body, ">"+id+"<") || asked > 10 {
			t.Errorf("%s: %s, asked %d times", id, r.Status, asked)
		}
	}
}

var _ console.Backend = (*clinic)(nil)

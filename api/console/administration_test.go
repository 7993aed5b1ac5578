package console_test

import (
	"bytes"
	"encoding/base64"
	"errors"
	"html"
	"io"
	"maps"
	"mime/multipart"
	"net/http"
	"net/http/httptest"
	"regexp"
	"slices"
	"strings"
	"testing"

	"yinjian/api/wire"
)

func init() {
	pages = append(pages, []struct{ name, role, at string }{
		{"administrators", "audit", "/console/administrators"}, {"administrator", "security", "/console/administrators/zhang"}, {"appoint", "security", "/console/administrators/new"},
		{"keys", "security", "/console/keys?show=all"}, {"request", "security", "/console/certificates/request?for=tsa:sm2"}, {"trust", "security", "/console/trust"},
		{"answer", "security", "/console/approvals/" + strings.Repeat("cd", 16)},
	}...)
}

// csr is a request as the route answers it; what is in it the console does not look at.
var csr = m{"owner": "tsa:sm2", "algorithm": "SM2", "subject": "CN=时间戳单元 sm2", "csr": "MAsGCSqGSIb3DQEJDg=="}

// administration answers the routes of this file's pages.
func administration(method, at string) (int, any) {
	switch method + " " + at {
	case "GET /admin/v1/administrators":
		one := func(id, name, role string, more m) m {
			a := m{"version": 2, "id": id, "name": name, "role": role, "stopped": false, "locked": false, "must_change": false, "password_ends": "2027-01-20T00:00:00Z", "changed_by": "local uid=0(root)", "changed_at": "2026-11-01T02:00:00Z"}
			maps.Copy(a, more)
			return a
		}
		return 200, m{"administrators": []any{
			one("li", "李四", "system", m{"last_login": "2026-11-22T01:02:03Z", "must_change": true}), one("wang", "王五", "audit", m{"stopped": true}),
			one("zhang", "张三", "security", m{"certificate": strings.Repeat("0e", 32), "locked": true}),
		}}
	case "POST /admin/v1/certificates/requests":
		return 200, csr
	case "POST /admin/v1/certificates", "POST /admin/v1/trust/crls", "POST /admin/v1/trust/crls/fetch", "POST /admin/v1/crls", "POST /admin/v1/intermediates":
		return 200, m{}
	}
	switch {
	case strings.HasSuffix(at, "/withdraw"), strings.HasSuffix(at, "/stop"):
		return 200, m{}
	case strings.HasPrefix(at, "/admin/v1/administrators"), strings.HasPrefix(at, "/admin/v1/anchors"), strings.HasPrefix(at, "/admin/v1/keys/"):
		return 202, m{"proposal": strings.Repeat("ab", 16), "sm3": "00", "ends_s": 3600}
	}
	return 404, nil
}

// An answer is shown as often as its page is loaded, to be copied, until it is confirmed.
func TestAnswer(t *testing.T) {
	t.Parallel()
	c := &clinic{}
	s := newConsole(t, c, nil)
	at := "/console/approvals/" + strings.Repeat("cd", 16)
	if _, body := get(t, s, "security", "/console/approvals"); !strings.Contains(body, `href="`+at+`"`) {
		t.Errorf("the answer is not offered\n%s", body)
	}
	for range 2 {
		if r, body := get(t, s, "security", at); r.StatusCode != 200 || !strings.Contains(body, "000102030405060708090a0b0c0d0e0f") || !strings.Contains(body, `action="`+at+`/confirm"`) {
			t.Errorf("%s\n%s", r.Status, body)
		}
	}
	r, _ := post(t, s, "security", at+"/confirm", "sm3="+strings.Repeat("1f", 32)+"&token=token-of-security")
	if to := r.Header.Get("Location"); to != "/console/approvals?notice=confirmed" {
		t.Errorf("%s to %q", r.Status, to)
	}
	if want := "POST /admin/v1/approvals/" + strings.Repeat("cd", 16) + `/confirm {"sm3":"` + strings.Repeat("1f", 32) + `"}`; c.asked[len(c.asked)-1] != want {
		t.Errorf("asked %q, want %q", c.asked[len(c.asked)-1], want)
	}
}

// Who may not is not offered it, and is refused by the route.
func TestRolesOfAdministration(t *testing.T) {
	t.Parallel()
	c := &clinic{signers: 20}
	s := newConsole(t, c, nil)
	offered := map[string][]string{
		"system": {"/console/keys", "/console/certificates"}, "security": {"/console/keys", "/console/certificates", "/console/trust", "/console/administrators"},
		"audit": {"/console/keys", "/console/certificates", "/console/trust", "/console/administrators"}, "operator": nil,
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
	for _, try := range []struct{ role, page, at, form string }{
		{"audit", "/console/administrators", "/console/administrators/new", "id=x&password=a&again=a"},
		{"audit", "/console/administrators/wang", "/console/administrators/wang/start", "reason=x"},
		{"audit", "/console/administrators/zhang", "/console/administrators/zhang/stop", "reason=x"},
		{"audit", "/console/administrators/zhang", "/console/administrators/zhang/password", "password=a&again=a"},
		{"audit", "/console/administrators/zhang", "/console/administrators/zhang/certificate", "none=1"},
		{"audit", "/console/signers/D00012", "/console/signers/D00012/pin", "pin=314159&again=314159"},
		{"audit", "/console/signers/D00012", "/console/signers/D00012/keys", "algorithm=SM2"},
		{"system", "/console/keys", "/console/keys/destroy", "label=x&reason=x"},
		{"system", "/console/certificates", "/console/certificates/request", "for=tls"},
		{"audit", "/console/trust", "/console/trust/anchors", "uses=staff"},
		{"audit", "/console/trust", "/console/trust/anchors/0123456789ab/withdraw", "reason=x"},
		{"audit", "/console/trust", "/console/trust/intermediates", "x=y"},
		{"audit", "/console/trust", "/console/trust/crl", "x=y"},
		{"audit", "/console/trust", "/console/trust/fetch", "x=y"},
		{"audit", "/console/trust", "/console/trust/publish", "x=y"},
		{"security", "/console/machines", "/console/machines", "file=x&reason=x"},
		{"security", "/console/time", "/console/time/readmit", "reason=x"},
	} {
		if _, body := get(t, s, try.role, try.page); strings.Contains(body, `action="`+try.at+`"`) || try.at != "/console/machines" && strings.Contains(body, `href="`+try.at+`"`) {
			t.Errorf("%s is offered %s", try.role, try.at)
		}
		r, body := post(t, s, try.role, try.at, try.form+"&token=token-of-"+try.role)
		if r.StatusCode != http.StatusForbidden || !strings.Contains(body, "该角色无此权限") {
			t.Errorf("%s: %s: %s\n%s", try.role, try.at, r.Status, body)
		}
	}
	if r, _ := get(t, s, "audit", "/console/administrators/new"); r.StatusCode != http.StatusForbidden {
		t.Errorf("the form for another administrator, for who audits: %s", r.Status)
	}
}

// What a page offers its role may: no form and no link of any page, for any role, ends at a refusal of the role.
func TestOfferedIsPermitted(t *testing.T) {
	t.Parallel()
	c := &clinic{signers: 20}
	s := newConsole(t, c, nil)
	offer := regexp.MustCompile(`(action|formaction|href)="(/console/[^"#]*)`)
	for _, role := range []string{"system", "security", "audit", "operator"} {
		tried := map[string]bool{}
		for _, p := range pages {
			_, body := get(t, s, role, p.at)
			for _, found := range offer.FindAllStringSubmatch(body, -1) {
				at := html.UnescapeString(found[2])
				if tried[found[1]+at] || at == "/console/logout" || strings.HasPrefix(at, "/console/language/") || strings.HasPrefix(at, "/console/assets/") {
					continue
				}
				tried[found[1]+at] = true
				var r *http.Response
				if found[1] == "href" {
					r, body = get(t, s, role, at)
				} else {
					r, body = post(t, s, role, at, "token=token-of-"+role)
				}
				if r.StatusCode == http.StatusForbidden || strings.Contains(body, "该角色无此权限") {
					t.Errorf("%s is offered %s on %s: %s", role, at, p.at, r.Status)
				}
			}
		}
		if len(tried) < 10 {
			t.Errorf("%s: only %d were tried", role, len(tried))
		}
	}
}

// asks posts a form and answers the last thing that the routes were asked by it, what came of it, and the page.
func asks(t *testing.T, c *clinic, s *httptest.Server, role, at string, fields m, files map[string]string) (asked string, r *http.Response, body string) {
	t.Helper()
	var form bytes.Buffer
	w := multipart.NewWriter(&form)
	for name, v := range fields {
		for _, one := range strings.Split(v.(string), "|") {
			if err := w.WriteField(name, one); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, content := range files {
		f, err := w.CreateFormFile(name, "file")
		if err == nil {
			_, err = io.WriteString(f, content)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(w.WriteField("token", "token-of-"+role), w.Close()); err != nil {
		t.Fatal(err)
	}
	c.mu.Lock()
	c.asked = nil
	c.mu.Unlock()
	r, body = post(t, s, role, at, form.String(), func(r *http.Request) { r.Header.Set("Content-Type", w.FormDataContentType()) })
	if len(c.asked) > 0 {
		asked = c.asked[0]
	}
	return asked, r, body
}

// What forms ask is what the routes take; secrets stand on no page that comes back.
func TestFormsOfAdministration(t *testing.T) {
	t.Parallel()
	pem := base64.StdEncoding.EncodeToString([]byte("PEM"))
	c := &clinic{signers: 20, refuse: map[string]*wire.Problem{
		"POST /admin/v1/administrators": {Status: 409, Code: "exists", Title: "已存在", Detail: "管理员已登记", Next: "换一个登录名"}, "POST /admin/v1/signers/D00013/pin": {Status: 400, Code: "invalid_request", Title: "请求有误", Detail: "太短"},
		"POST /admin/v1/machines": {Status: 202, Code: "x"}, "POST /admin/v1/time/readmit": {Status: 409, Code: "not_ready", Title: "尚未就绪", Detail: "没有等待核准的时间", Next: "见时间页"},
	}}
	s := newConsole(t, c, nil)
	const secret = "Secret-koulin-2026"
	for _, f := range []struct {
		role, at    string
		fields      m
		files       map[string]string
		asked, then string // "": a page that says what was refused
	}{
		{"security", "/console/administrators/wang/start", m{"reason": "返岗"}, nil, `POST /admin/v1/administrators/wang/start {"reason":"返岗"}`, "/console/approvals?notice=proposed"},
		{"security", "/console/administrators/zhang/stop", m{"reason": "离职"}, nil, `POST /admin/v1/administrators/zhang/stop {"reason":"离职"}`, "/console/administrators/zhang?notice=stopped"},
		{"security", "/console/administrators/zhang/password", m{"password": secret, "again": secret}, nil, `POST /admin/v1/administrators/zhang/password {"password":"` + secret + `"}`, "/console/approvals?notice=proposed"},
		{"security", "/console/administrators/zhang/password", m{"password": secret, "again": secret + "x"}, nil, "", ""},
		{"security", "/console/administrators/zhang/certificate", nil, map[string]string{"certificate": "PEM"}, `POST /admin/v1/administrators/zhang/certificate {"certificate":"` + pem + `"}`, "/console/approvals?notice=proposed"},
		{"security", "/console/administrators/zhang/certificate", nil, nil, "", ""},
		{"security", "/console/administrators/zhang/certificate", m{"none": "1"}, nil, `POST /admin/v1/administrators/zhang/certificate {}`, "/console/approvals?notice=proposed"},
		{"security", "/console/administrators/new", m{"id": "sun", "name": "孙七", "role": "operator", "password": secret, "again": secret}, map[string]string{"certificate": "PEM"}, `POST /admin/v1/administrators {"id":"sun","name":"孙七","role":"operator","password":"` + secret + `","certificate":"` + pem + `"}`, ""},
		{"security", "/console/administrators/new", m{"id": "sun", "password": secret, "again": "x"}, nil, "", ""},
		{"operator", "/console/signers/D00012/pin", m{"pin": secret, "again": secret, "old_pin": "314159"}, nil, `POST /admin/v1/signers/D00012/pin {"pin":"` + secret + `","old_pin":"314159"}`, "/console/signers/D00012?notice=changed"},
		{"operator", "/console/signers/D00012/pin", m{"pin": secret, "again": "271828"}, nil, "", ""},
		{"operator", "/console/signers/D00013/pin", m{"pin": secret, "again": secret}, nil, `POST /admin/v1/signers/D00013/pin {"pin":"` + secret + `"}`, ""},
		{"security", "/console/signers/D00012/keys", m{"algorithm": "RSA-2048", "ca": "external"}, nil, `POST /admin/v1/signers/D00012/keys {"algorithm":"RSA-2048","ca":"external"}`, "/console/signers/D00012?notice=changed"},
		{"security", "/console/keys/destroy", m{"label": " staff/D1/0/SM2 ", "reason": "换发"}, nil, `POST /admin/v1/keys/destroy {"label":"staff/D1/0/SM2","reason":"换发"}`, "/console/approvals?notice=proposed"},
		{"security", "/console/certificates/import", m{"owner": "tls", "accept_subject": "1"}, map[string]string{"file": "PEM", "chain": "PEM"}, `POST /admin/v1/certificates {"file":"` + pem + `","chain":["` + pem + `"],"owner":"tls","accept_subject":true}`, "/console/certificates?notice=imported"},
		{"security", "/console/trust/anchors", m{"uses": "staff|tsa", "note": "市 CA"}, map[string]string{"certificate": "PEM"}, `POST /admin/v1/anchors {"certificate":"` + pem + `","uses":["staff","tsa"],"note":"市 CA"}`, "/console/approvals?notice=proposed"},
		{"security", "/console/trust/anchors/0123456789ab/withdraw", m{"reason": "到期"}, nil, `POST /admin/v1/anchors/0123456789ab/withdraw {"reason":"到期"}`, "/console/trust?notice=changed"},
		{"security", "/console/trust/intermediates", nil, map[string]string{"file": "PEM"}, `POST /admin/v1/intermediates {"file":"` + pem + `"}`, "/console/trust?notice=imported"},
		{"security", "/console/trust/crl", nil, map[string]string{"file": "PEM"}, `POST /admin/v1/trust/crls {"file":"` + pem + `","source":"console"}`, "/console/trust?notice=imported"},
		{"security", "/console/trust/fetch", nil, nil, `POST /admin/v1/trust/crls/fetch {}`, "/console/trust?notice=fetched"},
		{"security", "/console/trust/publish", nil, nil, `POST /admin/v1/crls {}`, "/console/trust?notice=published"},
		{"security", "/console/applications/his/client", m{"by": "key", "alone": "1", "reason": "专线"}, map[string]string{"certificate": "PEM"}, `POST /admin/v1/applications/his/client {"by":"key","certificate":"` + pem + `","alone":true,"reason":"专线"}`, "/console/applications/his?notice=changed"},
		{"security", "/console/applications/his/client", m{"by": "none", "reason": "停用专线"}, nil, `POST /admin/v1/applications/his/client {"by":"none","alone":false,"reason":"停用专线"}`, "/console/applications/his?notice=changed"},
		{"system", "/console/machines", m{"file": "name = 'b'", "reason": "扩容"}, nil, `POST /admin/v1/machines {"file":"` + base64.StdEncoding.EncodeToString([]byte("name = 'b'")) + `","reason":"扩容"}`, "/console/approvals?notice=proposed"},
		{"system", "/console/machines/second/remove", m{"reason": "退役", "force": "1"}, nil, `POST /admin/v1/machines/second/remove {"reason":"退役","force":true}`, "/console/machines?notice=changed"},
		{"system", "/console/time/readmit", m{"reason": "核对"}, nil, `POST /admin/v1/time/readmit {"reason":"核对"}`, ""},
		{"system", "/console/time/sources", m{"name": "n", "group": "g", "address": "a:123", "reason": "x", "key_id": "7", "key_type": "AES128", "key_file": "/k"}, nil, `POST /admin/v1/time/sources {"name":"n","group":"g","address":"a:123","key_id":7,"key_type":"AES128","key_file":"/k","reason":"x"}`, "/console/time?notice=changed"},
	} {
		asked, r, body := asks(t, c, s, f.role, f.at, f.fields, f.files)
		if f.asked != "" && asked != f.asked || f.asked == "" && strings.HasPrefix(asked, "POST") && !strings.Contains(asked, "/search ") {
			t.Errorf("%s: asked %q, want %q", f.at, asked, f.asked)
		}
		if got := r.Header.Get("Location"); got != f.then {
			t.Errorf("%s: %s to %q, want %q", f.at, r.Status, got, f.then)
		}
		if f.then == "" && (r.StatusCode < 400 || !strings.Contains(body, `role="alert"`) || !strings.Contains(body, "</html>")) {
			t.Errorf("%s: %s\n%s", f.at, r.Status, body)
		}
		if strings.Contains(body, secret) || strings.Contains(body, "271828") || strings.Contains(body, "314159") {
			t.Errorf("%s: a secret stands on the page\n%s", f.at, body)
		}
	}
	if _, _, body := asks(t, c, s, "security", "/console/administrators/new", m{"id": "sun", "name": "孙七", "role": "operator", "password": secret, "again": secret}, nil); !strings.Contains(body, `value="孙七"`) || !strings.Contains(body, `<option value="operator" selected>`) || !strings.Contains(body, "换一个登录名") {
		t.Errorf("what was filled in is lost\n%s", body)
	}
}

// A page says what of its things waits for a second person.
func TestWaiting(t *testing.T) {
	t.Parallel()
	s := newConsole(t, &clinic{signers: 20}, nil)
	for at, want := range map[string]bool{"/console/applications": true, "/console/applications/his": true, "/console/signers": false, "/console/machines": false, "/console/administrators": false} {
		if _, body := get(t, s, "security", at); strings.Contains(body, "等待第二人批准：<a") != want {
			t.Errorf("%s: something waits: %v", at, !want)
		}
	}
}

// A certificate request is shown, to be copied, and sent as a file, whose name has nothing that a browser could take for more.
func TestCertificateRequest(t *testing.T) {
	t.Parallel()
	c := &clinic{}
	s := newConsole(t, c, nil)
	if _, body := get(t, s, "security", "/console/certificates/request?for=tsa%3Asm2"); !strings.Contains(body, `value="tsa:sm2"`) {
		t.Errorf("whose it is stands not in the form\n%s", body)
	}
	asked, r, body := asks(t, c, s, "security", "/console/certificates/request", m{"for": "tls", "subject": "CN=a", "hosts": "a.test, b.test\n192.0.2.1", "replace": "1"}, nil)
	if want := `POST /admin/v1/certificates/requests {"for":"tls","replace":true,"subject":"CN=a","hosts":["a.test","b.test","192.0.2.1"]}`; asked != want {
		t.Errorf("asked %q, want %q", asked, want)
	}
	const file = "-----BEGIN CERTIFICATE REQUEST-----\nMAsGCSqGSIb3DQEJDg==\n-----END CERTIFICATE REQUEST-----\n"
	if r.StatusCode != 200 || !strings.Contains(body, file) {
		t.Errorf("%s\n%s", r.Status, body)
	}
	_, r, body = asks(t, c, s, "security", "/console/certificates/request", m{"for": "tls", "download": "1"}, nil)
	if h := r.Header; body != file || h.Get("Content-Type") != "application/pkcs10" || h.Get("Content-Disposition") != `attachment; filename="tsa-sm2-SM2.csr"` || h.Get("X-Content-Type-Options") != "nosniff" {
		t.Errorf("%s %v\n%s", r.Status, r.Header, body)
	}
}

// Lists of keys and certificates go on where the page before ended, with what was looked for.
func TestHeldPages(t *testing.T) {
	t.Parallel()
	c := &clinic{}
	s := newConsole(t, c, nil)
	for at, want := range map[string][2]string{
		"/console/certificates":                                  {`POST /admin/v1/certificates/search {"scope":"own","most":50}`, "/console/certificates?after=tls&amp;q=&amp;show=own"},
		"/console/certificates?show=soon":                        {`POST /admin/v1/certificates/search {"scope":"signers","within_days":60,"most":50}`, "show=soon"},
		"/console/certificates?q=%E5%BC%A0&after=signer%3AD1":    {`POST /admin/v1/certificates/search {"text":"张","after":"signer:D1","most":50}`, "/console/certificates?after=tls&amp;q=%E5%BC%A0&amp;show=all"},
		"/console/certificates?show=%22%3E%3Cb%3E":               {`POST /admin/v1/certificates/search {"scope":"own","most":50}`, "show=own"},
		"/console/keys":                                          {`POST /admin/v1/keys/search {"scope":"own","most":50}`, "/console/keys?after=tsa%3Asm2&amp;q=&amp;show=own"},
		"/console/keys?show=signers&q=D00&after=signer%3AD00012": {`POST /admin/v1/keys/search {"text":"D00","scope":"signers","after":"signer:D00012","most":50}`, "/console/keys?after=tsa%3Asm2&amp;q=D00&amp;show=signers"},
	} {
		c.mu.Lock()
		c.asked = nil
		c.mu.Unlock()
		r, body := get(t, s, "audit", at)
		if asked := c.asked[len(c.asked)-1]; asked != want[0] {
			t.Errorf("%s: asked %q, want %q", at, asked, want[0])
		}
		if r.StatusCode != 200 || !strings.Contains(body, want[1]) || strings.Contains(at, "after=") != strings.Contains(body, "回到开头") {
			t.Errorf("%s: %s without %q\n%s", at, r.Status, want[1], body)
		}
	}
}

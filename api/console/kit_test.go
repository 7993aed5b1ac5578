package console_test

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"net/http"
	"net/http/httptest"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"yinjian/api"
	"yinjian/api/console"
	"yinjian/api/wire"
	"yinjian/appliance/evidence"
	"yinjian/appliance/evidence/show"
)

// at is the present of these tests.
var at = time.Date(2026, 11, 22, 6, 30, 0, 0, time.UTC)

// A clinic is the administration behind the console: it answers each route from memory, and notes what it is asked.
type clinic struct {
	t       testing.TB
	signers int
	// spoil is put behind every text of every answer.
	spoil string
	odd   string // the reason of a change
	// settings is which change of the settings there is: "waiting", "trial", "left" or none.
	settings string

	mu      sync.Mutex
	asked   []string                 // guarded by mu: "POST /admin/v1/signers/D1/stop {…}"
	stopped map[string]bool          // guarded by mu: signers
	refuse  map[string]*wire.Problem // guarded by mu, where it changes
	hold    map[string]chan struct{} // a route waits until it is closed
}

// rolesOf are the roles that may use a route that not all may, as the appliance's matrix has them.
var rolesOf = func() map[string][]string {
	out := map[string][]string{}
	for _, line := range api.Matrix() {
		for _, role := range line.Roles {
			at := line.Method + " " + line.Pattern
			out[at] = append(out[at], string(role))
		}
	}
	return out
}()

func (c *clinic) Session(r *http.Request) *console.Session {
	k, err := r.Cookie("__Host-yinjian")
	if err != nil || k.Value == "" {
		return nil
	}
	return &console.Session{Name: "张三" + c.spoil, Role: k.Value, Actor: "admin:zhang(张三，" + k.Value + ")", Token: "token-of-" + k.Value}
}

func (c *clinic) May(s *console.Session, method, pattern string) bool {
	who, some := rolesOf[method+" "+pattern]
	return !some || slices.Contains(who, s.Role)
}

func (c *clinic) Login(w http.ResponseWriter, _ *http.Request, body []byte) (int, []byte) {
	var req wire.Login
	if json.Unmarshal(body, &req) != nil || req.Password != "right" {
		return 401, problemJSON(&wire.Problem{Status: 401, Code: "login_failed", Title: "登录未成功", Detail: "登录名或口令不对 (name or password is wrong)", Next: "核对后重试 (check and try again)"})
	}
	http.SetCookie(w, &http.Cookie{Name: "__Host-yinjian", Value: req.Name, Path: "/", Secure: true, HttpOnly: true, SameSite: http.SameSiteStrictMode})
	return 200, []byte(`{}`)
}

func (c *clinic) Apart(ctx context.Context, r *http.Request) *http.Request { return r.Clone(ctx) }

func (c *clinic) Logout(w http.ResponseWriter, _ *http.Request) {
	http.SetCookie(w, &http.Cookie{Name: "__Host-yinjian", Path: "/", MaxAge: -1, Secure: true, HttpOnly: true})
}

func problemJSON(p *wire.Problem) []byte {
	b, err := json.Marshal(p)
	if err != nil {
		panic(err)
	}
	return b
}

func (c *clinic) Ask(r *http.Request, method, at string, body []byte) (int, []byte) {
	c.mu.Lock()
	c.asked = append(c.asked, method+" "+at+" "+string(body))
	c.mu.Unlock()
	session := c.Session(r)
	for pattern, who := range rolesOf {
		m, p, _ := strings.Cut(pattern, " ")
		if ok, _ := path.Match(wild(p), at); ok && m == method && (session == nil || !slices.Contains(who, session.Role)) && exact(p, at) {
			return 403, problemJSON(&wire.Problem{Status: 403, Code: "forbidden", Title: "没有权限", Detail: "该角色无此权限 (this is no work of the role)"})
		}
	}
	if hold := c.hold[method+" "+at]; hold != nil {
		<-hold
	}
	c.mu.Lock()
	p := c.refuse[method+" "+at]
	c.mu.Unlock()
	if p != nil {
		return p.Status, problemJSON(p)
	}
	status, out := c.answer(method, at, body)
	if out == nil {
		return 404, problemJSON(&wire.Problem{Status: 404, Code: "not_found", Title: "不存在", Detail: "没有这个地址"})
	}
	text, err := json.Marshal(spoilt(out, c.spoil))
	if err != nil {
		c.t.Error(err)
	}
	return status, text
}

func wild(pattern string) string {
	parts := strings.Split(pattern, "/")
	for i, p := range parts {
		if strings.HasPrefix(p, ":") {
			parts[i] = "*"
		}
	}
	return strings.Join(parts, "/")
}

// exact keeps "/signers/search" from being somebody's id.
func exact(pattern, at string) bool { return strings.Contains(pattern, ":") || pattern == at }

// spoilt puts the words behind every text of a tree, but for times, and for what pages are found by.
func spoilt(tree any, words string) any {
	if words == "" {
		return tree
	}
	text, err := json.Marshal(tree)
	if err != nil {
		panic(err)
	}
	var v any
	if err := json.Unmarshal(text, &v); err != nil {
		panic(err)
	}
	var walk func(name string, v any) any
	walk = func(name string, v any) any {
		switch v := v.(type) {
		case map[string]any:
			out := map[string]any{}
			for k, w := range v {
				key := k
				if name == "listeners" || name == "tokens" || name == "unfinished" || name == "body" {
					key += words
				}
				out[key] = walk(k, w)
			}
			return out
		case []any:
			for i := range v {
				v[i] = walk(name, v[i])
			}
			return v
		case string:
			if _, err := time.Parse(time.RFC3339, v); err == nil || name == "certificate" || name == "key" || name == "csr" || slices.Contains([]string{"points", "hours"}, name) {
				return v
			}
			return v + words
		}
		return v
	}
	return walk("", v)
}

type m = map[string]any

func signerOf(i int, stopped bool) m {
	names := []string{"华佗", "张仲景", "孙思邈", "李时珍", "扁鹊", "葛洪", "皇甫谧", "钱乙"}
	departments := []string{"心内科", "胸外科", "急诊科", "妇产科", "儿科", "重症医学科", "检验科"}
	return m{
		"version": 3, "id": fmt.Sprintf("D%05d", i), "name": names[i%len(names)], "department": departments[i%len(departments)], "campus": []string{"本部", "东院区"}[i%2], "role": []string{"主任医师", "", "护士长"}[i%3],
		"keys":    []any{m{"label": fmt.Sprintf("staff/D%05d/5f2a9c01/SM2", i), "algorithm": "SM2", "certificate": "AAAA"}, m{"label": fmt.Sprintf("staff/D%05d/5f2a9c01/RSA-2048", i), "algorithm": "RSA-2048", "certificate": "AAAA"}},
		"has_pin": true, "custody": "pin", "pin_locked": i == 7, "pin_locked_for": []string{"his"}, "stopped": stopped, "changed_by": "admin:zhang(张三，security) 与 admin:li(李四，system)", "changed_at": at.Add(-time.Duration(i) * time.Hour), "test": i == 3,
	}
}

func (c *clinic) answer(method, at string, body []byte) (int, any) {
	if status, out := c.service(method, at, body); out != nil {
		return status, out
	}
	switch method + " " + at {
	case "GET /admin/v1/state":
		return 200, stateOf()
	case "GET /admin/v1/approvals":
		return 200, m{"proposals": []any{
			m{"proposal": strings.Repeat("ab", 16), "sm3": strings.Repeat("0f", 32), "approvers": []string{"security", "system"}, "ends_s": 2710, "path": "/admin/v1/applications", "title": "登记应用 (register an application)", "body": m{"id": "emr", "name": "电子病历", "rights": []string{"sign"}}, "by": "admin:wang(王五，security)", "state": "pending"},
			m{"proposal": strings.Repeat("cd", 16), "sm3": strings.Repeat("1f", 32), "approvers": []string{"security", "system"}, "ends_s": 1200, "path": "/admin/v1/signers", "title": "登记签名人 (enrol a signer)", "body": m{"id": "D00042", "pin": "（不显示）"}, "by": "admin:zhang(张三，security)", "state": "done", "approver": "admin:li(李四，system)", "answer_ends_s": 3000},
		}}
	case "POST /admin/v1/signers/search":
		var req wire.SearchSigners
		if err := json.Unmarshal(body, &req); err != nil {
			return 400, m{"code": "invalid_request", "status": 400}
		}
		req.Text = strings.TrimSuffix(req.Text, c.spoil)
		page, total := []any{}, 0
		for i := range c.signers {
			s := signerOf(i, c.isStopped(fmt.Sprintf("D%05d", i)))
			if !strings.Contains(fmt.Sprint(s["id"], s["name"], s["department"]), req.Text) {
				continue
			}
			if total >= req.Skip && len(page) < req.Most {
				page = append(page, s)
			}
			total++
		}
		return 200, m{"signers": page, "total": total}
	case "POST /admin/v1/signers":
		return 202, m{"proposal": strings.Repeat("ab", 16), "sm3": "00", "ends_s": 3600}
	case "GET /admin/v1/applications":
		return 200, []any{
			m{"version": 1, "id": "his", "name": "门诊医生站", "campus": "本部", "rights": []string{"sign", "verify"}, "stamp": "required", "consent": []string{"signer-pin"}, "production": true, "rate": 200, "burst": 400, "changed_by": "local uid=0(root)", "changed_at": "2026-11-01T02:00:00Z"},
			m{"version": 4, "id": "lis", "name": "检验系统", "campus": "东院区", "rights": []string{"sign", "timestamp", "evidence.any"}, "stamp": "none", "consent": []string{"app-asserted"}, "client": m{"alone": true, "keys": []string{strings.Repeat("0d", 32)}, "subject_text": "CN=lis"}, "test": true, "stopped": true, "changed_by": "local uid=0(root)", "changed_at": "2026-11-02T02:00:00Z"},
		}
	case "POST /admin/v1/applications":
		return 200, m{"application": m{"id": "emr"}, "key": "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="}
	case "POST /admin/v1/records/search":
		rows := []any{}
		for i := range 12 {
			rows = append(rows, m{"record_id": fmt.Sprintf("%064x", 0xabcdef0123+i*977), "kind": "sign.v1", "application": "his", "signer": fmt.Sprintf("D%05d", i), "department": "心内科", "document_type": "出院小结", "campus": "本部",
				"time": "2026-11-22T06:0" + fmt.Sprint(i%10) + ":12.345Z", "bound_us": 812, "status": []string{"recorded", "test"}[i/10], "node": "east-1", "epoch": "0123456789abcdef", "sequence": 90210 - i, "leaf": strings.Repeat("0a", 32)})
		}
		return 200, m{"records": rows, "next": m{"at_us": 1, "node": "east-1", "epoch": "0123456789abcdef", "sequence": 5}}
	case "POST /admin/v1/changes":
		return 200, m{"changes": []any{
			m{"node": "east-1", "sequence": 12, "epoch": "0123456789abcdef", "time": "2026-11-21T03:00:00Z", "actor": "local uid=0(root)", "kind": "account.signer/outcome", "act": "stop", "object": "D00010", "reason": "离职", "before": `{"stopped":false,"version":1}`, "after": `{"stopped":true,"version":2}`, "mac": "ok"},
			m{"node": "west-1", "sequence": 9, "epoch": "0123456789abcdef", "time": "2026-11-22T03:00:00Z", "actor": "admin:zhang(张三，security)", "kind": "account.application/outcome", "act": "limit", "object": "his", "reason": "扩容", "before": `{"rate":100}`, "after": `{"rate":200}`, "mac": "wrong"},
		}, "omitted": 3}
	case "POST /admin/v1/audit/verify":
		return 200, m{"entries": 90211, "checkpoints": 812, "findings": []any{}, "remarks": []string{"3 个检查点没有时间戳 (3 checkpoints without a token)"}, "root": strings.Repeat("0b", 32)}
	case "GET /admin/v1/time":
		return 200, timeOf()
	case "POST /admin/v1/time/history":
		return 200, historyOf()
	case "GET /admin/v1/machines":
		return 200, stateOf()["machines"]
	case "POST /admin/v1/keys/search":
		return 200, m{"next": "tsa:sm2", "keys": []any{
			m{"slot": "log", "label": "log/sm2", "algorithm": "SM2", "owner": "log", "kind": "resident", "state": "present", "machines": []string{"main"}, "uses": 812, "rotation_due": "2028-01-01T00:00:00Z"},
			m{"slot": "tsa", "label": "tsa/sm2", "algorithm": "SM2", "owner": "tsa:sm2", "kind": "resident", "state": "present", "machines": []string{"main", "second"}, "uses": 42000},
		}, "warnings": []string{}}
	case "GET /admin/v1/tsa":
		return 200, m{"units": []any{m{"unit": "rsa", "state": "stopped", "reason": "检修", "changed_by": "admin:li(李四，system)", "changed_at": "2026-11-20T00:00:00Z", "policy": "2.999.1.2", "not_after": "2028-01-01T00:00:00Z"}, m{"unit": "sm2", "state": "running", "policy": "2.999.1.1", "not_after": "2028-01-01T00:00:00Z"}}, "tokens": m{"issued": 42000, "refused_time": 0, "refused_other": 2}}
	case "POST /admin/v1/tsa/log":
		return 200, []any{m{"sequence": 90210, "time": "2026-11-22T06:29:58.120Z", "kind": "token", "unit": "sm2", "requester": "his", "serial": "0123456789abcdef0000000000000a11", "bound_us": 812}, m{"sequence": 90200, "time": "2026-11-22T06:20:00Z", "kind": "refused", "unit": "rsa", "requester": "192.0.2.7", "reason": "stopped", "count": 2}}
	case "POST /admin/v1/certificates/search":
		return 200, m{"next": "tls", "certificates": []any{
			m{"owner": "tsa:sm2", "use": "tsa", "algorithm": "SM2", "label": "tsa/sm2", "serial": "0a11223344556677", "subject": "CN=时间戳单元 sm2 (评估)", "issuer": "CN=印鉴评估 CA", "state": "active", "not_before": "2026-01-01T00:00:00Z", "not_after": "2028-01-01T00:00:00Z", "days_left": 405, "evaluation": true},
			m{"owner": "signer:D00012", "name": "华佗", "use": "staff", "algorithm": "SM2", "serial": "0a99", "subject": "CN=华佗,OU=心内科", "state": "active", "not_after": "2026-12-24T00:00:00Z", "days_left": 31},
			m{"owner": "tls", "use": "tls", "algorithm": "RSA-2048", "label": "tls", "state": "pending"},
		}}
	case "GET /admin/v1/anchors":
		return 200, []any{m{"id": "0123456789ab", "subject": "CN=印鉴评估 CA", "not_after": "2036-01-01T00:00:00Z", "uses": []string{"staff", "tsa"}, "note": "评估 CA", "evaluation": true}, m{"id": "ffff", "subject": "CN=市 CA", "not_after": "2030-01-01T00:00:00Z", "uses": []string{"staff"}, "note": "到期", "withdrawn": true}}
	case "GET /admin/v1/trust/crls":
		return 200, m{"lists": []any{m{"issuer": "CN=印鉴评估 CA", "number": "12", "this_update": "2026-11-20T00:00:00Z", "next_update": "2026-11-27T00:00:00Z", "revoked": 3, "state": "current", "source": "own", "own": true}, m{"issuer": "CN=市 CA", "number": "7", "this_update": "2026-11-01T00:00:00Z", "next_update": "2026-11-08T00:00:00Z", "revoked": 0, "state": "stale", "source": "http://crl.test/a.crl"}},
			"sources": []any{m{"url": "http://crl.test/a.crl", "at": "2026-11-22T06:00:00Z", "error": "不应答 (no answer)"}, m{"url": "http://crl.test/b.crl", "at": "2026-11-22T06:00:00Z", "new": true}}, "revocation": "hard"}
	case "GET /admin/v1/backups":
		return 200, m{"custodians": m{"set": "01", "key": "8f1e 22aa 90bc", "threshold": 2, "holders": []string{"院长办公室", "信息科", "纪检"}}, "last": m{"ID": "0123456789abcdef", "Node": "east-1", "SM3": strings.Repeat("0c", 32), "Entries": 90000, "Base": "", "At": m{"Micros": 1795312800000000}}, "unfinished": m{"feed": "2026-11-22T00:00:00Z"},
			"restored_epoch": "0123456789abcdef", "lost": m{"entries": 3, "signatures": 2, "reaches": true}, "reports": []any{m{"kind": "drill", "backup": "0123456789abcdef", "at": "2026-11-20T00:00:00Z", "passed": true, "persons": "甲、乙"}, m{"kind": "verified", "backup": "feedfeedfeedfeed", "at": "2026-11-10T00:00:00Z", "passed": false, "persons": "甲、丙"}}}
	}
	switch id, act := path.Base(path.Dir(at)), path.Base(at); {
	case strings.HasPrefix(at, "/admin/v1/records/") && act == "examine":
		return 200, examinedOf(c.t)
	case strings.HasPrefix(at, "/admin/v1/signers/"):
		c.mu.Lock()
		defer c.mu.Unlock()
		c.stopped[id] = act == "stop"
		return 200, m{"id": id}
	case strings.HasPrefix(at, "/admin/v1/applications/"), strings.HasPrefix(at, "/admin/v1/machines/"), strings.HasPrefix(at, "/admin/v1/tsa/"), strings.HasPrefix(at, "/admin/v1/time/"):
		return 200, m{}
	case strings.HasPrefix(at, "/admin/v1/approvals/"):
		if method == "GET" {
			id = act
		}
		return 200, m{"proposal": id, "state": "done", "title": "登记应用 (register an application)", "sm3": strings.Repeat("1f", 32), "answer_ends_s": 3000, "answer": m{"application": m{"id": "emr"}, "key": "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="}}
	}
	return administration(method, at)
}

func (c *clinic) isStopped(id string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.stopped[id]
}

func stateOf() m {
	slot := func(name, state string, done int) m {
		return m{"slot": name, "state": state, "keys": 12, "keys_only_here": 0, "under_way": 2, "waiting": 0, "done": done, "failed": 1, "latency_ms": 1.42}
	}
	return m{
		"state": "operational", "ready": true, "node": "east-1", "campus": "本部", "version": "0.1.0", "uptime_s": 86400 * 3, "evaluation": "评估：软件密码机与评估 CA，不具法律效力 (evaluation only)",
		"time": m{"state": "trusted", "time": at.Format(time.RFC3339Nano), "bound_ms": 0.812, "provenance": "beidou + ntp-1"},
		"machines": []any{
			m{"name": "main", "state": "up", "weight": 1, "slots": []any{slot("staff", "up", 41233), slot("tsa", "up", 42000), slot("log", "up", 812)}},
			m{"name": "second", "state": "down", "reason": "不应答 (no answer)", "weight": 2, "added": true, "since": "2026-11-22T05:00:00Z", "slots": []any{slot("staff", "down", 9000), slot("tsa", "draining", 10)}},
		},
		"journal": m{"entries": 90211, "checkpoint": 90211, "free_bytes": 52 << 30}, "projection": m{"shipped": 90190, "lag": 21},
		"peer":       m{"node": "west-1", "campus": "东院区", "up": true, "age_s": 0.4},
		"throughput": m{"signatures_per_s": 118.4, "timestamps_per_s": 121.9, "entries_per_s": 131.2, "over_s": 62.0},
		"work":       []any{m{"name": "verify", "for_s": 12, "done": 40960, "total": 90211}},
		"reports":    m{"patrol": m{"name": "daily", "outcome": "warning", "at": "2026-11-22T00:10:00Z"}},
		"listeners":  m{"api": "192.0.2.10:8443 (TLS 1.3)", "admin": "192.0.2.10:9443 (TLS 1.3)"},
		"warnings":   []string{"软件密码机，仅供评估，非认证产品 (software cipher machine: evaluation only, not a certified product)", "密码机 second 不应答 (cipher machine second does not answer)", "证书 signer:D00012 还有 31 天到期 (ends in 31 days)"},
	}
}

func timeOf() m {
	return m{
		"state": "trusted", "time": at.Format(time.RFC3339Nano), "bound_us": 812, "provenance": "beidou + ntp-1", "accuracy_us": 100000, "left_s": 86400, "min_sources": 2, "holdover_max_s": 86400,
		"round":   m{"ago_s": 3.2, "agreed": []string{"beidou", "lan"}, "rejected": []string{}, "offset_us": -41},
		"workers": []any{m{"machine": "main", "state": "trusted", "bound_ms": 0.9}},
		"sources": []any{
			m{"name": "beidou", "group": "beidou", "address": "127.0.0.1:11123", "state": "agreed", "offset_us": -38, "root_distance_us": 210, "rtt_us": 80, "stratum": 1, "refid": "BDS"},
			m{"name": "ntp-1", "group": "lan", "address": "192.0.2.20:123", "authentication": "AES128", "state": "agreed", "offset_us": 410, "root_distance_us": 2400, "rtt_us": 1800, "stratum": 2},
			m{"name": "ntp-2", "group": "wan", "address": "192.0.2.21:123", "state": "silent", "reason": "无应答 (no answer)"},
		},
		"changes": []any{},
	}
}

func historyOf() m {
	points := []any{}
	for i := range 300 {
		x := float64(i)
		points = append(points, m{"at": at.Add(-time.Duration(300-i) * 70 * time.Second), "state": "trusted", "bound_us": 700 + int(150*math.Sin(x/20)), "sources": []any{
			m{"name": "beidou", "offset_us": int(40 * math.Sin(x/9)), "candidate": true}, m{"name": "ntp-1", "offset_us": int(400 + 200*math.Sin(x/31)), "candidate": true},
		}})
	}
	return m{"accuracy_us": 100000, "points": points, "hours": []any{}, "changes": []any{}}
}

var examine = sync.OnceValues(func() (m, error) {
	const dir = "../../appliance/evidence/testdata/"
	raw, err := os.ReadFile(dir + "bundle-cms-sm2.json")
	if err != nil {
		return nil, err
	}
	b, err := evidence.Parse(raw)
	if err != nil {
		return nil, err
	}
	trust, err := show.LoadTrust(dir+"anchors.pem", dir+"log.pem")
	if err != nil {
		return nil, err
	}
	document, err := os.ReadFile(dir + "document.xml")
	return m{"evidence": json.RawMessage(raw), "report": evidence.Verify(b, trust, evidence.Input{Document: document}), "parts": show.Magnify(b, document, trust.LogKeys[0])}, err
})

func examinedOf(t testing.TB) any {
	out, err := examine()
	if err != nil {
		t.Error(err)
	}
	return out
}

var codes = []console.Code{{Code: "forbidden", Title: "没有权限", Retry: "operator", Status: 403}, {Code: "not_found", Title: "不存在", Retry: "never", Status: 404}, {Code: "rate_limited", Title: "请求过多", Retry: "later", Status: 429}}

// newConsole is a console before a clinic, over TLS on loopback.
func newConsole(t testing.TB, c *clinic, theme *console.Theme) *httptest.Server {
	t.Helper()
	c.t, c.stopped = t, map[string]bool{"D00010": true}
	h, err := console.New(console.Config{Backend: c, Version: "0.1.0", Codes: codes, Names: []string{"sign.hospital.test"}, Theme: theme, Now: func() time.Time { return at }})
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewTLSServer(h)
	t.Cleanup(h.Close)
	t.Cleanup(s.Close)
	return s
}

// eventually waits for a condition.
func eventually(t testing.TB, so func() bool) {
	t.Helper()
	for end := time.Now().Add(2 * time.Minute); time.Now().Before(end); time.Sleep(20 * time.Millisecond) { // interval
		if so() {
			return
		}
	}
	t.Fatal("it does not come about")
}

// get asks as somebody of a role; "" has not logged in.
func get(t testing.TB, s *httptest.Server, role, at string, change ...func(*http.Request)) (*http.Response, string) {
	t.Helper()
	r, err := http.NewRequest(http.MethodGet, s.URL+at, nil)
	if err != nil {
		t.Fatal(err)
	}
	return do(t, s, role, r, change...)
}

func do(t testing.TB, s *httptest.Server, role string, r *http.Request, change ...func(*http.Request)) (*http.Response, string) {
	t.Helper()
	if role != "" {
		r.AddCookie(&http.Cookie{Name: "__Host-yinjian", Value: role})
	}
	for _, f := range change {
		f(r)
	}
	client := *s.Client()
	client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	resp, err := client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var b strings.Builder
	buf := make([]byte, 64<<10)
	for {
		n, err := resp.Body.Read(buf)
		b.Write(buf[:n])
		if err != nil {
			break
		}
	}
	return resp, b.String()
}

// post sends a form as a page of the console does.
func post(t testing.TB, s *httptest.Server, role, at, form string, change ...func(*http.Request)) (*http.Response, string) {
	t.Helper()
	r, err := http.NewRequest(http.MethodPost, s.URL+at, strings.NewReader(form))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	r.Header.Set("Sec-Fetch-Site", "same-origin")
	return do(t, s, role, r, change...)
}

package console_test

import (
	"encoding/csv"
	"encoding/json"
	"maps"
	"net/http"
	"path"
	"slices"
	"strings"
	"testing"

	"yinjian/api/wire"
	"yinjian/appliance/assess"
)

// The pages about the appliance itself.
func init() {
	pages = append(pages, []struct{ name, role, at string }{
		{"logs", "system", "/console/logs"}, {"system", "security", "/console/system"}, {"selftest", "operator", "/console/selftest?application=lis"}, {"patrol", "system", "/console/patrol"},
		{"patrol-report", "audit", "/console/patrol/90100"}, {"drills", "security", "/console/drills"}, {"update", "system", "/console/update"}, {"settings", "system", "/console/settings"}, {"drill", "security", "/console/drills/80100"}, {"assess", "audit", "/console/assess"},
		{"elsewhere", "audit", "/console/records/" + elsewhere},
	}...)
}

// elsewhere is a record of the other campus.
var elsewhere = strings.Repeat("e1", 32)

func (c *clinic) service(method, at string, body []byte) (int, any) {
	filed := func(kind, name, outcome string, seq int, kept bool) m {
		stem := kind + "-" + name + "-20261122T081000"
		return m{"sequence": seq, "at": "2026-11-22T00:10:00Z", "actor": "admin:zhang(张三，system)", "kind": kind, "name": name, "outcome": outcome,
			"files": []any{m{"name": stem + ".html", "sm3": strings.Repeat("0a", 32), "size": 9000, "kept": kept}, m{"name": stem + ".json", "sm3": strings.Repeat("0b", 32), "size": 4000, "kept": kept}}}
	}
	switch method + " " + at {
	case "POST /admin/v1/changes":
		if c.odd != "" {
			return 200, m{"changes": []any{m{"node": "east-1", "sequence": 12, "epoch": "0123456789abcdef", "time": at1, "actor": "x", "kind": "account.signer/outcome", "act": "stop", "object": "D00010", "reason": c.odd, "mac": "ok"}}, "omitted": 3}
		}
	case "GET /admin/v1/alarms":
		return 200, m{"active": []any{m{"code": "machine-away", "object": "second", "severity": "warning", "detail": "down：不应答 (no answer)", "title": "密码机不可用 (a cipher machine is away)", "next": "检查网络与密码机 (look at the network and the machine)", "for_s": 5400}}}
	case "GET /admin/v1/update":
		waiting := m{"index": 8, "version": "0.8.0", "sm3": strings.Repeat("0a", 32), "manifest": m{"notes": "<script>补丁</script>"}}
		return 200, m{"running": 7, "version": "0.7.0", "slot": "A", "good": true, "behind": 6, "failed": []int{9}, "floor": 5, "staged": waiting, "committed": waiting}
	case "GET /admin/v1/settings":
		one := m{"by": "admin:zhang(张三，system) 与 admin:li(李四，security)", "reason": "<script>换库</script>", "confirm": true, "changes": []any{m{"key": "policy.rate", "old": "3000", "new": "2000"}}}
		out := m{"config": "[policy]\nrate = 3000\n", "sm3": strings.Repeat("0c", 32)}
		switch c.settings {
		case "waiting":
			out["waiting"] = one
		case "trial":
			one["left_s"] = 1234
			out["trial"] = one
		case "left":
			one["why"] = "listen tcp：地址不可用"
			out["left"] = one
		}
		return 200, out
	case "POST /admin/v1/settings/check":
		return 200, m{"base": strings.Repeat("0c", 32), "changes": []any{m{"key": "policy.rate", "old": "3000", "new": "2000"}}}
	case "POST /admin/v1/settings":
		return 202, m{"proposal": "0a", "sm3": "0b", "approvers": []string{"security"}}
	case "POST /admin/v1/settings/cancel", "POST /admin/v1/settings/restart", "POST /admin/v1/settings/confirm":
		return 200, m{}
	case "POST /admin/v1/update/commit":
		return 202, m{"proposal": "0a", "sm3": "0b", "approvers": []string{"security"}}
	case "POST /admin/v1/update/cancel", "POST /admin/v1/update/restart":
		return 200, m{"index": 8}
	case "GET /admin/v1/drills":
		return 200, m{"drill": m{"id": "drill-0a11", "part": "db", "by": "admin:zhang(张三，system)", "persons": []string{"张三", "李四"}, "reason": "季度演练", "broken": true, "left_s": 14}}
	case "POST /admin/v1/drills/drill-0a11/end":
		return 200, m{}
	case "GET /admin/v1/log":
		return 200, m{"directory": "logs", "folder": "/var/lib/yinjian/logs", "level": "info", "keep_days": 365, "decided_by": "config.toml", "files": 2, "bytes": 5 << 20, "lost_lines": 3, "last_failure": "no space", "list": []any{
			m{"name": "yinjian.log", "bytes": 1 << 20, "modified": "2026-11-22T06:29:59Z"}, m{"name": "yinjian-2026-11-21T00-00-00.000.log", "bytes": 4 << 20, "modified": "2026-11-21T15:59:59Z", "closed": "2026-11-21T16:00:00Z"}}}
	case "POST /admin/v1/log/lines":
		return 200, m{"lines": []string{`time="2026-11-22T06:29:59Z" level=info msg="a source agrees" source=beidou`, "time=… level=warning msg=\"odd \x1b[31m\u202e bytes\" <b>"}}
	case "POST /admin/v1/log/file":
		var req wire.ReadLogFile
		whole := strings.Repeat("one line of the log\n", 100_000)
		if json.Unmarshal(body, &req) != nil || req.Name != "yinjian.log" {
			return 404, nil
		}
		return 200, m{"content": []byte(whole[req.From:min(req.From+1<<20, len(whole))]), "size": len(whole)}
	case "POST /admin/v1/log":
		return 202, m{"proposal": strings.Repeat("ab", 16), "sm3": "00", "ends_s": 3600}
	case "GET /admin/v1/system":
		certificate := m{"subject": "CN=sign.hospital.test", "issuer": "CN=印鉴评估 CA", "serial": "0a11", "not_after": "2026-12-12T00:00:00Z", "days_left": 19}
		return 200, m{
			"program": m{"version": "0.1.0", "go": "go1.26", "revision": strings.Repeat("ab", 20), "path": "/usr/local/bin/yinjian", "sm3": strings.Repeat("0d", 32)},
			"process": m{"pid": 812, "user": "yinjian", "up_s": 259200, "goroutines": 120, "threads": "14", "memory": "182044 kB", "open_files": 88},
			"host":    m{"name": "yj-east", "system": "Debian GNU/Linux 13 (trixie)", "kernel": "6.12.0", "arch": "amd64", "cpus": 8, "memory_bytes": 32 << 30, "up_s": 260000, "zone": "CST (UTC+08:00)"},
			"disks":   []any{m{"name": "设备目录所在的卷", "free_bytes": 52 << 30, "total_bytes": 100 << 30}}, "addresses": []any{m{"interface": "eth0", "up": true, "addresses": []string{"192.0.2.10/24"}}},
			"listeners": []any{m{"name": "api", "setting": "listen.api", "address": "192.0.2.10:8443", "certificate": certificate}, m{"name": "peer", "setting": "listen.peer", "address": ""}},
			"config":    m{"file": "/var/lib/yinjian/config.toml", "sm3": strings.Repeat("01", 32), "started": strings.Repeat("02", 32)}, "pins": "unlock",
		}
	case "POST /admin/v1/reports/list":
		var req wire.ListReports
		if json.Unmarshal(body, &req) != nil {
			return 400, nil
		}
		if req.Kind == "drill" {
			return 200, m{"reports": []any{filed("drill", "hsm", "passed", 80100, true)}, "omitted": 0}
		}
		return 200, m{"reports": []any{filed("patrol", "daily", "warning", 90100, true), filed("patrol", "monthly", "normal", 70000, false)}, "omitted": 12}
	case "POST /admin/v1/reports/read":
		var req wire.ReadReport
		switch {
		case json.Unmarshal(body, &req) != nil:
			return 400, nil
		case req.File == "":
			return 200, m{"name": "patrol-daily.receipt.json", "content": []byte(`{"version":1}`)}
		case req.Sequence == 80100:
			return 200, m{"name": req.File, "content": []byte(`{"drill":"hsm","passed":true,"words":"` + strings.ReplaceAll(c.spoil, `"`, `\"`) + `"}`)}
		}
		line := func(item, value, severity string, more m) m {
			l := m{"item": item, "value": value, "severity": severity}
			maps.Copy(l, more)
			return l
		}
		report, err := json.Marshal(spoilt(m{"period": "daily", "node": "east-1", "campus": "本部", "from": "2026-11-21T00:10:00Z", "to": "2026-11-22T00:10:00Z", "time_trusted": true, "running": true, "severity": "warning", "areas": []any{
			m{"title": "备份", "severity": "warning", "lines": []any{line("最近一次", "从未备份", "warning", m{"next": "做一次备份"}), line("核验", "不知道", "normal", m{"not_checked": true})}},
			m{"title": "时间", "severity": "normal", "lines": []any{line("现状", "trusted，误差上限 0.8 ms", "normal", nil)}}}, "not_checked": []string{"备份·核验：不知道"}}, c.spoil))
		if err != nil {
			c.t.Error(err)
		}
		return 200, m{"name": req.File, "content": report}
	case "POST /admin/v1/patrols":
		return 200, m{"filed": filed("patrol", "daily", "warning", 90100, true), "report": m{}}
	case "POST /admin/v1/compare", "POST /admin/v1/sweep":
		return 200, m{"rows": 90211, "macs_checked": 353, "differences": []any{m{"kind": "row-changed", "detail": "row 7"}}, "omitted": 2}
	case "POST /admin/v1/assessments":
		return 200, m{"pack": packOf(c)}
	case "GET /admin/v1/backups/missing":
		return 200, m{"summary": m{}, "missing": []any{m{"record_id": strings.Repeat("0a", 32), "kind": "sign.v1", "application": "his", "at_us": 1795312800000000}}}
	case "GET /admin/v1/applications/lis/selftest":
		return 200, m{"application": "lis", "name": "检验系统", "rights": []string{"sign"}, "now": at1, "trusted": true, "window_s": 300, "names": []string{"sign.hospital.test"}, "arrivals": []any{
			m{"at": at1, "remote": "192.0.2.7", "method": "POST", "path": "/v1/sign", "host": "sign.hospital.test:8443", "headers": []string{"Accept", "Authorization", "Content-Type"}, "content_type": "application/json", "bytes": 512,
				"authorization": "YJ1-HMAC-SM3 app=lis,time=1,nonce=n,sig=abcdef…", "string_to_sign": "YJ1-HMAC-SM3\nPOST\n/v1/sign\n\nsign.hospital.test:8443\nlis\n1\nn\n00", "code": "unauthenticated", "detail": "签名不正确", "checks": []any{
					m{"id": "header", "status": "passed", "detail": "app=lis"}, m{"id": "signature", "status": "failed", "detail": "待签字符串末尾多了一个换行", "next": "照下面的待签字符串改正"}, m{"id": "certificate", "status": "not_checked", "detail": "没有绑定"}}}}}
	}
	if path.Base(at) == "examine" && strings.Contains(at, elsewhere) {
		return 404, m{"status": 404, "code": "not_found", "title": "不存在", "detail": "没有这条记录"}
	}
	if method+" "+at == "POST /admin/v1/records/search" && strings.Contains(string(body), elsewhere) {
		return 200, m{"records": []any{m{"record_id": elsewhere, "kind": "sign.v1", "application": "his", "signer": "D00002", "department": "儿科", "campus": "东院区", "time": at1, "bound_us": 700, "status": "recorded", "node": "west-1", "epoch": "feedfeedfeedfeed", "sequence": 77, "leaf": strings.Repeat("0c", 32)}}}
	}
	return 0, nil
}

const at1 = "2026-11-22T06:29:00Z"

// packOf is a pack with one item of each state.
func packOf(c *clinic) []byte {
	r := &assess.Report{Format: assess.FormatReport, Products: []assess.Product{}, Header: assess.Header{Product: "印鉴", Version: "0.1.0", Nonce: "nonce-0001", Assessor: "测评机构", Began: at1, Intent: strings.Repeat("0a", 16)}}
	for section := assess.SectionHeader; section <= assess.SectionIdentity; section++ {
		raw := []byte("null")
		r.Items = append(r.Items, assess.Item{ID: "item." + string(rune('a'+section)), Section: section, Title: "条目", Status: assess.NotEvidenced, Why: "没有", At: at1, Node: "east-1", SM3: assess.Digest(raw), Raw: raw})
	}
	r.Finish()
	data, err := r.Encode()
	if err != nil {
		c.t.Fatal(err)
	}
	out, err := (&assess.Pack{Format: assess.FormatPack, Report: data, Certificates: [][]byte{}, CRLs: [][]byte{}}).Encode()
	if err != nil {
		c.t.Fatal(err)
	}
	return out
}

// What takes long is begun by a form, goes on without it, and is shown when it ended, to whoever may use its route alone.
func TestWork(t *testing.T) {
	t.Parallel()
	c := &clinic{signers: 3, hold: map[string]chan struct{}{"POST /admin/v1/compare": make(chan struct{})}}
	s := newConsole(t, c, nil)
	send := func(role, at, form string) *http.Response {
		t.Helper()
		r, _ := post(t, s, role, at, form+"&token=token-of-"+role)
		return r
	}
	has := func(role, at string, words ...string) {
		t.Helper()
		r, body := get(t, s, role, at)
		for _, w := range words {
			if r.StatusCode != 200 || !strings.Contains(body, w) {
				t.Errorf("%s: %s without %q\n%s", at, r.Status, w, body)
			}
		}
	}
	if r := send("audit", "/console/journal/verify", ""); r.Header.Get("Location") != "/console/journal?notice=begun" {
		t.Errorf("%s %q", r.Status, r.Header.Get("Location"))
	}
	has("audit", "/console/journal", "未发现不符", "3 个检查点没有时间戳", "/console/journal/verify/report.json", "张三")
	if r, body := get(t, s, "audit", "/console/journal/verify/report.json"); !strings.Contains(body, `"entries":90211`) || !strings.HasPrefix(r.Header.Get("Content-Disposition"), "attachment; filename=verify-20261122T143000.json") {
		t.Errorf("%v %s", r.Header, body)
	}
	if r := send("audit", "/console/journal/compare", ""); r.StatusCode != http.StatusSeeOther { // it is left waiting
		t.Error(r.Status)
	}
	has("audit", "/console/journal", `http-equiv="refresh"`, "/console/journal?n=1", "正在进行")
	if r := send("audit", "/console/journal/compare", ""); r.StatusCode != http.StatusConflict {
		t.Errorf("twice at once: %s", r.Status)
	}
	close(c.hold["POST /admin/v1/compare"])
	eventually(t, func() bool {
		_, body := get(t, s, "audit", "/console/journal")
		return strings.Contains(body, "3 处不符") && !strings.Contains(body, `http-equiv="refresh"`)
	})
	for _, role := range []string{"system", "security", "operator"} {
		for _, at := range []string{"/console/journal/verify/report.json", "/console/assess/pack.json", "/console/assess"} {
			if r, body := get(t, s, role, at); r.StatusCode != http.StatusForbidden {
				t.Errorf("%s: %s: %s %s", role, at, r.Status, body)
			}
		}
		if r := send(role, "/console/assess", "nonce=nonce-0001&assessor=x"); r.StatusCode != http.StatusForbidden {
			t.Errorf("%s begins an assessment: %s", role, r.Status)
		}
	}
	if r, _ := get(t, s, "audit", "/console/assess/pack.json"); r.StatusCode != http.StatusNotFound {
		t.Errorf("no pack yet: %s", r.Status)
	}
	if r := send("audit", "/console/assess", "nonce=short&assessor=x"); r.StatusCode != http.StatusBadRequest {
		t.Errorf("a short nonce: %s", r.Status)
	}
	if r := send("audit", "/console/assess", "nonce=nonce-0001&assessor=%E6%B5%8B%E8%AF%84&full=1"); r.Header.Get("Location") != "/console/assess?notice=begun" {
		t.Errorf("%s %q", r.Status, r.Header.Get("Location"))
	}
	has("audit", "/console/assess", "nonce-0001", "未取得证据 10", "没有")
	if r, body := get(t, s, "audit", "/console/assess/pack.json"); body != string(packOf(c)) || !strings.Contains(r.Header.Get("Content-Security-Policy"), "sandbox") {
		t.Errorf("%v %.200s", r.Header, body)
	}
	if r, body := get(t, s, "audit", "/console/assess/pack.html"); r.StatusCode != 200 || !strings.Contains(body, "nonce-0001") || !strings.HasPrefix(r.Header.Get("Content-Disposition"), "attachment") {
		t.Errorf("%v %.200s", r.Header, body)
	}
	c.mu.Lock()
	c.refuse = map[string]*wire.Problem{"POST /admin/v1/patrols": {Status: 503, Code: "not_ready", Title: "尚未就绪", Detail: "没空", Next: "再来"}}
	c.mu.Unlock()
	send("system", "/console/patrol", "period=daily")
	has("system", "/console/patrol", "没有完成", "没空", "再来")
	if _, body := get(t, s, "security", "/console/patrol"); strings.Contains(body, "没空") {
		t.Errorf("shown to who may not patrol:\n%s", body)
	}
}

// The files that pages give out are files, and nothing in them is taken for a formula.
func TestFiles(t *testing.T) {
	t.Parallel()
	s := newConsole(t, &clinic{spoil: "=1+1"}, nil)
	r, body := get(t, s, "audit", "/console/changes/export.csv?object=D1&since=2026-11-01")
	rows, err := csv.NewReader(strings.NewReader(strings.TrimPrefix(body, "\ufeff"))).ReadAll()
	if err != nil || len(rows) != 4 || rows[1][6] != "his=1+1" || !strings.HasPrefix(rows[3][0], "另有更早的 3 条") || !strings.HasPrefix(r.Header.Get("Content-Disposition"), "attachment; filename=changes-") {
		t.Errorf("%v, %v\n%s", err, r.Header, body)
	}
	for _, odd := range []string{"=cmd|' /C calc'!A0", "＝1＋1", "＠SUM(A1)", "－1"} {
		s = newConsole(t, &clinic{odd: odd}, nil)
		if _, body := get(t, s, "audit", "/console/changes/export.csv"); !strings.Contains(body, ",'"+odd+",") {
			t.Errorf("a formula\n%s", body)
		}
	}
	if r, body := get(t, s, "audit", "/console/changes/export.json"); r.StatusCode != 200 || !strings.Contains(body, `"omitted": 3`) {
		t.Errorf("%s %s", r.Status, body)
	}
	if r, body := get(t, s, "system", "/console/logs/file?name=yinjian.log"); body != strings.Repeat("one line of the log\n", 100_000) || !strings.HasPrefix(r.Header.Get("Content-Type"), "text/plain") || !strings.HasPrefix(r.Header.Get("Content-Disposition"), "attachment") {
		t.Errorf("%v: %d bytes", r.Header, len(body))
	}
	for _, name := range []string{"../config.toml", "", "/etc/passwd"} {
		if r, _ := get(t, s, "system", "/console/logs/file?name="+name); r.StatusCode != http.StatusNotFound {
			t.Errorf("%q: %s", name, r.Status)
		}
	}
	if r, _ := get(t, s, "security", "/console/logs/file?name=yinjian.log"); r.StatusCode != http.StatusForbidden {
		t.Errorf("security: %s", r.Status)
	}
	if _, body := get(t, s, "system", "/console/logs"); !strings.Contains(body, "·[31m· bytes") || strings.Contains(body, "\x1b") || !strings.Contains(body, "&lt;b&gt;") {
		t.Errorf("the lines as they are:\n%s", body)
	}
	if r, body := get(t, s, "security", "/console/patrol/90100/file"); body != `{"version":1}` || !strings.Contains(r.Header.Get("Content-Security-Policy"), "sandbox") {
		t.Errorf("%v %s", r.Header, body)
	}
	if r, _ := get(t, s, "security", "/console/patrol/1"); r.StatusCode != http.StatusNotFound {
		t.Errorf("a report of another kind: %s", r.Status)
	}
	if _, body := get(t, s, "audit", "/console/records/"+elsewhere); !strings.Contains(body, "west-1") || !strings.Contains(body, "东院区") {
		t.Errorf("a record of the other campus:\n%s", body)
	}
	if r, _ := get(t, s, "audit", "/console/records/"+strings.Repeat("ff", 32)); r.StatusCode != 200 { // the fake has all others
		t.Errorf("%s", r.Status)
	}
}

// The overview has a rate at the first look.
func TestOverview(t *testing.T) {
	t.Parallel()
	c := &clinic{}
	s := newConsole(t, c, nil)
	_, body := get(t, s, "system", "/console/")
	for _, want := range []string{"118.4<small> /s", "121.9 /s", "密码机不可用", "40960 / 90211", "2026-11-22 08:10:00", `content="15;url=/console/?n=1"`} {
		if !strings.Contains(body, want) {
			t.Errorf("no %q\n%s", want, body)
		}
	}
	if !strings.Contains(body, "日巡检") || strings.Count(body, "还没有") != 1 { // no drill
		t.Errorf("the last reports\n%s", body)
	}
	if _, body := get(t, s, "operator", "/console/?n=40"); strings.Contains(body, "http-equiv") || strings.Contains(body, "密码机不可用") {
		t.Errorf("after its last refresh, for a role without alarms:\n%s", body)
	}
	if _, body := get(t, s, "operator", "/console/?n=-100000"); strings.Contains(body, "http-equiv") {
		t.Errorf("an address that has the page asked for without an end:\n%s", body)
	}
	if len(c.asked) != 4 { // a look costs two routes
		t.Errorf("%q", c.asked)
	}
}

// What a role may not is not offered, and tried all the same it is the route that refuses.
func TestServiceRoles(t *testing.T) {
	t.Parallel()
	s := newConsole(t, &clinic{}, nil)
	for at, may := range map[string]string{
		"/console/logs": "system security audit", "/console/system": "system security audit", "/console/patrol": "system security audit", "/console/drills": "system security audit",
		"/console/update": "system security audit", "/console/settings": "system security audit", "/console/assess": "audit", "/console/selftest": "security audit operator",
	} {
		for _, role := range []string{"system", "security", "audit", "operator"} {
			_, front := get(t, s, role, "/console/")
			r, _ := get(t, s, role, at)
			if want := strings.Contains(may, role); strings.Contains(front, `<a href="`+at+`">`) != want || (r.StatusCode == 200) != want {
				t.Errorf("%s for %s: %s, offered: %v", at, role, r.Status, !want)
			}
		}
	}
	for _, try := range []struct{ role, at, offer, form string }{
		{"audit", "/console/logs", `action="/console/logs"`, "level=debug&reason=x&was=&folder="}, {"security", "/console/patrol", `action="/console/patrol"`, "period=daily"},
		{"security", "/console/drills/drill-0a11/end", `action="/console/drills/drill-0a11/end"`, ""},
	} {
		if _, body := get(t, s, try.role, strings.TrimSuffix(try.at, "/drill-0a11/end")); strings.Contains(body, try.offer) {
			t.Errorf("%s is offered %s", try.role, try.offer)
		}
		if r, body := post(t, s, try.role, try.at, try.form+"&token=token-of-"+try.role); r.StatusCode != http.StatusForbidden || !strings.Contains(body, "该角色无此权限") {
			t.Errorf("%s: %s: %s\n%s", try.role, try.at, r.Status, body)
		}
	}
}

// A drill that is under way is shown, and ended by who may.
func TestDrillUnderWay(t *testing.T) {
	t.Parallel()
	c := &clinic{}
	s := newConsole(t, c, nil)
	if _, body := get(t, s, "system", "/console/drills"); !strings.Contains(body, "断中心库") || !strings.Contains(body, `http-equiv="refresh"`) {
		t.Errorf("under way:\n%s", body)
	}
	r, _ := post(t, s, "system", "/console/drills/drill-0a11/end", "token=token-of-system")
	if r.Header.Get("Location") != "/console/drills?notice=ended" || c.asked[len(c.asked)-1] != "POST /admin/v1/drills/drill-0a11/end {}" {
		t.Errorf("%s to %q: %q", r.Status, r.Header.Get("Location"), c.asked)
	}
}

// An image that was staged is committed by two, with the SM3 that was compared, and cancelled by one; who may not is not asked to.
// A server with packages has none.
func TestUpdatePage(t *testing.T) {
	t.Parallel()
	c := &clinic{}
	s := newConsole(t, c, nil)
	_, body := get(t, s, "system", "/console/update")
	for _, want := range []string{"0.7.0", "0.8.0", strings.Repeat("0a", 32), "&lt;script&gt;补丁", `action="/console/update/commit"`, `action="/console/update/cancel"`, `action="/console/update/restart"`} {
		if !strings.Contains(body, want) {
			t.Errorf("no %s in\n%s", want, body)
		}
	}
	if _, body := get(t, s, "audit", "/console/update"); strings.Contains(body, `action="/console/update`) {
		t.Errorf("an auditor is offered\n%s", body)
	}
	r, _ := post(t, s, "system", "/console/update/commit", "token=token-of-system&sm3="+strings.Repeat("0a", 32)+"&reason=x")
	if r.Header.Get("Location") != "/console/approvals?notice=proposed" || c.asked[len(c.asked)-1] != `POST /admin/v1/update/commit {"sm3":"`+strings.Repeat("0a", 32)+`","reason":"x"}` {
		t.Errorf("%s to %q: %q", r.Status, r.Header.Get("Location"), c.asked)
	}
	r, _ = post(t, s, "system", "/console/update/cancel", "token=token-of-system&reason=x")
	if r.Header.Get("Location") != "/console/update?notice=cancelled" {
		t.Errorf("%s to %q", r.Status, r.Header.Get("Location"))
	}
	r, _ = post(t, s, "system", "/console/update/restart", "token=token-of-system&reason=x")
	if r.Header.Get("Location") != "/console/update?notice=restarting" || c.asked[len(c.asked)-1] != `POST /admin/v1/update/restart {"reason":"x"}` {
		t.Errorf("%s to %q: %q", r.Status, r.Header.Get("Location"), c.asked)
	}
}

// A change of the settings goes out with what the appliance said of it, for the second person; what waits, is tried or was left is
// shown with what can be done about it.
func TestSettingsPage(t *testing.T) {
	t.Parallel()
	for state, want := range map[string][]string{
		"":        {`action="/console/settings"`, "rate = 3000", strings.Repeat("0c", 32)},
		"waiting": {`action="/console/settings/restart"`, `formaction="/console/settings/cancel"`, "&lt;script&gt;换库", "policy.rate", "30 分钟"},
		"trial":   {`action="/console/settings/confirm"`, "1234"},
		"left":    {`action="/console/settings/cancel"`, "地址不可用", `action="/console/settings"`},
	} {
		c := &clinic{settings: state}
		s := newConsole(t, c, nil)
		_, body := get(t, s, "system", "/console/settings")
		for _, w := range want {
			if !strings.Contains(body, w) {
				t.Errorf("%q: no %s in\n%s", state, w, body)
			}
		}
		if (state == "waiting" || state == "trial") == strings.Contains(body, `action="/console/settings"`) {
			t.Errorf("%q: offered another change, or not\n%s", state, body)
		}
		if _, body := get(t, s, "security", "/console/settings"); strings.Contains(body, `action="/console/settings`) {
			t.Errorf("%q: the security administrator is offered\n%s", state, body)
		}
	}
	c := &clinic{}
	s := newConsole(t, c, nil)
	r, _ := post(t, s, "system", "/console/settings", "token=token-of-system&overlay=%5Bpolicy%5D%0D%0Arate+%3D+2000&remove=tsa.upstream&name=db.password&secret=geheim&reason=x")
	// Members in base64: [policy]\nrate = 2000 and geheim.
	change := `{"overlay":"W3BvbGljeV0KcmF0ZSA9IDIwMDA=","remove":["tsa.upstream"],"secrets":[{"name":"db.password","secret":"Z2VoZWlt"}]}`
	asked := c.asked[len(c.asked)-2:]
	if want := []string{"POST /admin/v1/settings/check " + change, `POST /admin/v1/settings {"settings":` + change + `,"base":"` + strings.Repeat("0c", 32) +
		`","changes":[{"key":"policy.rate","old":"3000","new":"2000"}],"reason":"x"}`}; !slices.Equal(asked, want) || r.Header.Get("Location") != "/console/approvals?notice=proposed" {
		t.Errorf("%q to %q, want %q", asked, r.Header.Get("Location"), want)
	}
	for act, notice := range map[string]string{"restart": "restarting", "cancel": "cancelled", "confirm": "changed"} {
		r, _ := post(t, s, "system", "/console/settings/"+act, "token=token-of-system&reason=x")
		if r.Header.Get("Location") != "/console/settings?notice="+notice || c.asked[len(c.asked)-1] != "POST /admin/v1/settings/"+act+` {"reason":"x"}` {
			t.Errorf("%s: %q to %q", act, c.asked[len(c.asked)-1], r.Header.Get("Location"))
		}
	}
}

// The settings of the running log are sent as they were changed: a folder that was left as it is is not touched.
func TestLogSettings(t *testing.T) {
	t.Parallel()
	c := &clinic{}
	s := newConsole(t, c, nil)
	for form, want := range map[string]string{
		"level=debug&keep_days=200&was=logs&folder=logs&reason=x": `{"keep_days":200,"level":"debug","reason":"x"}`,
		"level=info&keep_days=30&was=logs&folder=logs/b&reason=x": `{"directory":"logs/b","keep_days":30,"level":"info","reason":"x"}`,
		"level=info&keep_days=ten&was=logs&folder=&reason=x":      `{"directory":"","keep_days":-1,"level":"info","reason":"x"}`,
	} {
		r, _ := post(t, s, "system", "/console/logs", form+"&token=token-of-system")
		c.mu.Lock()
		last := c.asked[len(c.asked)-1]
		c.mu.Unlock()
		if last != "POST /admin/v1/log "+want || r.Header.Get("Location") != "/console/approvals?notice=proposed" {
			t.Errorf("%s: %q to %q", form, last, r.Header.Get("Location"))
		}
	}
}

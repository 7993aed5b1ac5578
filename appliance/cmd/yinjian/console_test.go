package main_test

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/chromedp/chromedp"

	"yinjian/api/console/consoletest"
	"yinjian/api/wire"
	"yinjian/appliance"
)

// The console as three administrators use it, in Chromium: log in by password and by certificate, stop a signer, start it in
// twos, find a record and hold its document against the evidence. A signer's name that is a script is a name.
func TestConsole(t *testing.T) {
	t.Parallel()
	need(t, "chromium", "openssl")
	dir := initAppliance(t, startTimeServer(t))
	configure(t, dir, func(c *appliance.Config) { c.Listen.Admin, c.Log.Directory = "127.0.0.1:0", "logs" })
	m := serve(t, dir)
	m.trusted(t)
	const zhang, li, wang = "Xt-guanli-2026", "Aq-guanli-2026", "Sj-guanli-2026"
	mustRun(t, "admin", "bootstrap", "--dir", dir, "--system", "zhang:张三:"+pinFile(t, zhang), "--security", "li:李四:"+pinFile(t, li), "--audit", "wang:王五:"+pinFile(t, wang))
	work := tempDir(t)
	key, cert := filepath.Join(work, "key.pem"), filepath.Join(work, "cert.pem")
	command(t, nil, "openssl", "genpkey", "-algorithm", "SM2", "-out", key)
	if o := command(t, nil, "openssl", "req", "-x509", "-new", "-key", key, "-sm3", "-sigopt", "distid:1234567812345678", "-subj", "/CN=wang", "-days", "30", "-out", cert); o.code != 0 {
		t.Fatal(o)
	}
	mustRun(t, "admin", "certificate", "wang", "--dir", dir, "--file", cert)
	his := m.register(t, "his", "--consent", "app-asserted")
	lab := m.register(t, "lab", "--consent", "app-asserted", "--test")
	m.enrol(t, "D10023", "", "--algorithms", "SM2")
	const script = `"><script>window.pwned=1</script>`
	mustRun(t, "signer", "enrol", "D10024", "--dir", dir, "--name", script, "--department", "胸外科", "--campus", "本部", "--algorithms", "SM2")
	q := asserted("D10023", "visit-1")
	signed, err := his.Sign(t.Context(), "visit-1", q)
	if err != nil {
		t.Fatal(err)
	}
	a := m.admin()
	defer a.Close()
	eventually(t, time.Minute, "the record is in the central database", func() bool {
		found, err := a.SearchRecords(t.Context(), wire.SearchRecords{RecordID: signed.RecordID})
		if err != nil {
			t.Fatal(err)
		}
		return len(found.Records) == 1
	})
	document := filepath.Join(work, "document.xml")
	if err := os.WriteFile(document, q.Content, 0o600); err != nil {
		t.Fatal(err)
	}

	b := consoletest.New(t, m.ends.AdminTLS, filepath.Join("..", "..", "..", "out", "console"))
	has := func(where, words string) {
		t.Helper()
		var text string
		b.Run(chromedp.WaitReady("main"), chromedp.Text("body", &text))
		if !strings.Contains(text, words) {
			t.Fatalf("%s: no %q in\n%s", where, words, text)
		}
	}
	login := func(name, password string) {
		t.Helper()
		b.Open("/console/login")
		b.Run(chromedp.SendKeys("input[name=name]", name, chromedp.ByQuery), chromedp.SendKeys("input[name=password]", password, chromedp.ByQuery), submit("form"))
	}
	logout := func() {
		t.Helper()
		b.Run(submit("form[action='/console/logout']"))
		has("logged out", "登录管理控制台")
	}
	b.Size(1366, 768)

	b.Open("/console/signers")
	has("nobody", "登录管理控制台")
	login("li", zhang)
	has("another's password", "login_failed")
	login("li", li)
	has("security", "安全管理员")
	has("overview", "密码机")
	has("the rate at the first look", " /s")
	b.Look("overview")
	b.Shot("appliance-overview")
	b.Open("/console/signers?q=D1002")
	has("signers", "D10024")
	has("signers", script)
	b.Open("/console/signers/D10023")
	b.Run(chromedp.SendKeys("form[action$='/stop'] input[name=reason]", "离职", chromedp.ByQuery), submit("form[action$='/stop']"))
	has("stopped", "已停用，已记入日志")
	if _, err := his.Sign(t.Context(), "visit-2", asserted("D10023", "visit-2")); err == nil {
		t.Error("a signer who was stopped signs")
	}
	b.Run(chromedp.SendKeys("form[action$='/start'] input[name=reason]", "返聘", chromedp.ByQuery), submit("form[action$='/start']"))
	has("proposed", "须由另一位管理员批准")
	var approve int
	b.Run(chromedp.Evaluate(`document.querySelectorAll("form[action$='/approve']").length`, &approve))
	if approve != 0 {
		t.Error("who proposed it is offered to approve it")
	}
	if _, err := lab.Sign(t.Context(), "visit-1", asserted("D10023", "visit-1")); err == nil {
		t.Error("a signer who was stopped signs for tests")
	}
	b.Open("/console/selftest?application=lab")
	has("self-test", "POST /v1/sign")
	has("self-test", "与设备算得的相同")
	has("self-test", "signer_stopped")
	b.Look("self-test")
	b.Shot("appliance-selftest")
	b.Open("/console/system")
	has("system", "config.toml")
	has("system", strings.TrimPrefix(m.ends.AdminTLS, "https://"))
	b.Look("system")
	logout()
	login("zhang", zhang)
	has("system", "系统管理员")
	b.Open("/console/signers")
	has("a role that sees no signers", "forbidden")
	b.Open("/console/time")
	b.Look("time")
	b.Shot("appliance-time")
	b.Open("/console/patrol")
	b.Run(chromedp.SetValue("select[name=period]", "weekly", chromedp.ByQuery), submit("form[action='/console/patrol']"), chromedp.WaitVisible("table a[href^='/console/patrol/']", chromedp.ByQuery))
	has("patrolled", "周巡检")
	b.Run(chromedp.Click("table a[href^='/console/patrol/']", chromedp.ByQuery), chromedp.WaitVisible(".act a[href='/console/patrol']", chromedp.ByQuery))
	has("the report", "从未备份")
	b.Look("patrol")
	b.Shot("appliance-patrol")
	b.Open("/console/logs")
	has("the running log", "appliance is operational")
	b.Run(chromedp.SetValue("select[name=level]", "debug", chromedp.ByQuery), chromedp.SendKeys("form[action='/console/logs'] input[name=reason]", "排查", chromedp.ByQuery), submit("form[action='/console/logs']"))
	has("settings of the log", "须由另一位管理员批准")
	b.Open("/console/approvals")
	has("approvals", "D10023")
	b.Run(submit("form[action$='/approve']"))
	has("approved", "已批准并执行")
	if _, err := his.Sign(t.Context(), "visit-3", asserted("D10023", "visit-3")); err != nil {
		t.Errorf("after the start: %v", err)
	}
	logout()
	secrets := administer(t, b, work, has, func(name string) { login(name, map[string]string{"zhang": zhang, "li": li}[name]) }, login, logout)

	login("wang", wang)
	has("without the certificate", "login_failed")
	b.Open("/console/login?with=certificate")
	var challenge string
	b.Run(chromedp.Value("input[name=challenge]", &challenge, chromedp.ByQuery))
	raw, err := base64.StdEncoding.DecodeString(challenge)
	if err != nil || len(raw) != 32 {
		t.Fatalf("challenge %q: %v", challenge, err)
	}
	message, sig := filepath.Join(work, "message"), filepath.Join(work, "login.sig")
	if err := os.WriteFile(message, append([]byte("YINJIAN LOGIN\x00"), raw...), 0o600); err != nil {
		t.Fatal(err)
	}
	if o := command(t, nil, "openssl", "dgst", "-sm3", "-sign", key, "-sigopt", "distid:1234567812345678", "-out", sig, message); o.code != 0 { // as the page says
		t.Fatal(o)
	}
	b.Run(chromedp.SendKeys("input[name=name]", "wang", chromedp.ByQuery), chromedp.SendKeys("input[name=password]", wang, chromedp.ByQuery),
		chromedp.SetUploadFiles("input[name=signature]", []string{sig}, chromedp.ByQuery), submit("form"))
	has("audit", "审计管理员")
	b.Open("/console/records?signer=D10023")
	has("records", signed.RecordID[:12])
	b.Open("/console/records/" + signed.RecordID)
	has("the evidence alone", "无法判定")
	b.Run(chromedp.SetUploadFiles("input[name=document]", []string{document}, chromedp.ByQuery), submit("form[enctype]"))
	has("with the document", "有效：所列必需检查均已通过")
	has("microscope", "SM3(Z_A ‖ M)")
	b.Look("record")
	b.Run(chromedp.Evaluate(`document.getElementById("signature").scrollIntoView()`, nil))
	b.Shot("appliance-record")
	b.Open("/console/changes?object=D10023")
	has("changes", "离职")
	has("changes", "admin:li(李四，security) 与 admin:zhang(张三，system)")
	b.Open("/console/journal")
	b.Run(submit("form[action$='/verify']"), chromedp.WaitVisible("#verify .say.ok", chromedp.ByQuery))
	has("verified", "未发现不符")
	b.Open("/console/assess")
	has("for the evaluator", "给测评方")
	if os.Getenv("YINJIAN_LONG") != "" { // some tens of seconds of randomness
		b.Run(chromedp.SendKeys("input[name=nonce]", "zhu-2026-0007", chromedp.ByQuery), chromedp.SendKeys("input[name=assessor]", "测评机构", chromedp.ByQuery), submit("form[action='/console/assess']"))
		b.Run(chromedp.WaitVisible("#pack a[href$='pack.json']", chromedp.ByQuery))
		has("the pack", "zhu-2026-0007")
		b.Look("assess")
		b.Shot("appliance-assess")
	}
	b.Size(390, 844)
	b.Open("/console/?still=1")
	has("the last patrol", "周巡检")
	b.Look("overview on a phone")
	b.Shot("appliance-overview-phone")
	for at, words := range map[string]string{"/console/backups": "备份", "/console/machines": "staff", "/console/keys": "log/", "/console/trust": "信任锚", "/console/administrators": "zhao", "/console/tsa": "sm2", "/console/certificates": "tls", "/console/applications": "his"} {
		b.Open(at)
		has(at, words)
		b.Look(at)
	}
	var pwned bool
	b.Run(chromedp.Evaluate(`window.pwned === 1`, &pwned))
	if pwned {
		t.Error("a stored script ran")
	}
	b.Want("the console")
	log, err := os.ReadFile(m.log)
	if err != nil || bytes.Contains(log, q.Content) {
		t.Errorf("the log has the document: %v", err)
	}
	for _, s := range append(secrets, li) {
		if bytes.Contains(log, []byte(s)) {
			t.Errorf("the log has %q", s)
		}
	}
}

// administer has two administrators appoint a third, who changes the password, have certificates requested and a PIN set, and
// take the answers, which a page that is loaded again still has. It answers the secrets that were typed.
func administer(t *testing.T, b *consoletest.Browser, work string, has func(where, words string), as func(name string), login func(name, password string), logout func()) []string {
	t.Helper()
	const first, own, pin = "Chushi-kl-2026", "Benren-kl-2026", "739155"
	fill := func(form string, fields ...string) {
		t.Helper()
		for i := 0; i < len(fields); i += 2 {
			b.Run(chromedp.SendKeys(form+" [name="+fields[i]+"]", fields[i+1], chromedp.ByQuery))
		}
		b.Run(submit(form))
	}
	verified := func(where string) {
		t.Helper()
		var csr string
		b.Run(chromedp.Text("main pre", &csr, chromedp.ByQuery))
		file := filepath.Join(work, "request.csr")
		if err := os.WriteFile(file, []byte(csr), 0o600); err != nil {
			t.Fatal(err)
		}
		if o := command(t, nil, "openssl", "req", "-in", file, "-verify", "-noout"); o.code != 0 || !strings.Contains(o.stdout+o.stderr, "verify OK") {
			t.Errorf("%s: %s\n%v", where, csr, o)
		}
	}
	as("li")
	b.Open("/console/administrators/new")
	b.Run(chromedp.SetValue("main form [name=role]", "operator", chromedp.ByQuery))
	fill("main form", "id", "zhao", "name", "赵六", "password", first, "again", first)
	has("another administrator", "须由另一位管理员批准")
	b.Open("/console/certificates/request?for=tls")
	b.Run(submit("main form"))
	has("request", "BEGIN CERTIFICATE REQUEST")
	verified("the request for tls")
	b.Open("/console/certificates/request?for=tsa:rsa")
	b.Run(chromedp.Click("[name=new_key]", chromedp.ByQuery), submit("main form"))
	has("a new key", "须由另一位管理员批准")
	b.Open("/console/signers/D10023")
	fill("form[action$='/pin']", "pin", pin, "again", pin)
	has("a PIN", "须由另一位管理员批准")
	b.Open("/console/keys?q=D10023")
	has("keys", "staff/D10023/")
	logout()

	as("zhang")
	b.Open("/console/machines")
	fill("form[action='/console/machines']", "file", "name = 'b'", "reason", "扩容")
	has("another machine", "须由另一位管理员批准")
	has("what it asks for", "赵六")
	var text string
	b.Run(chromedp.Text("body", &text))
	if strings.Contains(text, pin) || strings.Contains(text, first) {
		t.Errorf("the second person sees a secret:\n%s", text)
	}
	for range 3 {
		b.Run(submit("form[action$='/approve']"))
		has("approved", "已批准并执行")
	}
	logout()

	as("li")
	b.Open("/console/approvals")
	fill("form[action$='/approve']") // the machine, of which too little was said
	has("a machine without a module", "file")
	b.Open("/console/approvals")
	var answers []string
	b.Run(chromedp.Evaluate(`[...document.querySelectorAll("main a.button")].map(a => a.getAttribute("href"))`, &answers))
	at := ""
	for _, a := range answers {
		b.Open(a)
		if b.Run(chromedp.Text("body", &text)); strings.Contains(text, "BEGIN CERTIFICATE REQUEST") {
			at = a
		}
	}
	if at == "" || len(answers) < 3 {
		t.Fatalf("no certificate request among %q", answers)
	}
	b.Open(at) // once more
	verified("the request for a new key")
	b.Look("answer")
	b.Shot("appliance-answer")
	b.Run(submit("form[action$='/confirm']"))
	has("confirmed", "已确认取得")
	b.Open(at)
	has("after it was confirmed", "没有可看的结果")
	b.Open("/console/administrators/zhao")
	has("the new one", "下次登录须更改")
	b.Open("/console/signers/D10023")
	has("the PIN", "已设置")
	logout()

	login("zhao", first)
	has("a first login", "首次登录或口令已到期")
	fill("form[action='/console/password']", "old", first, "password", own, "again", own)
	has("own password", "登录管理控制台")
	login("zhao", own)
	has("operator", "应用操作员")
	logout()
	return []string{first, own, pin}
}

// submit sends the form by its button, and waits for the page that comes.
func submit(form string) chromedp.Action {
	return chromedp.Tasks{
		chromedp.Evaluate(fmt.Sprintf(`document.querySelector(%q).dataset.sent = "yes"`, form), nil),
		chromedp.Click(form+" button", chromedp.ByQuery),
		chromedp.WaitNotPresent("[data-sent]", chromedp.ByQuery),
		chromedp.WaitReady("main"),
	}
}

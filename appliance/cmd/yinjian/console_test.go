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
	configure(t, dir, func(c *appliance.Config) { c.Listen.Admin = "127.0.0.1:0" })
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
	logout()
	login("zhang", zhang)
	has("system", "系统管理员")
	b.Open("/console/signers")
	has("a role that sees no signers", "forbidden")
	b.Open("/console/time")
	b.Look("time")
	b.Shot("appliance-time")
	b.Open("/console/approvals")
	has("approvals", "D10023")
	b.Run(submit("form[action$='/approve']"))
	has("approved", "已批准并执行")
	if _, err := his.Sign(t.Context(), "visit-3", asserted("D10023", "visit-3")); err != nil {
		t.Errorf("after the start: %v", err)
	}
	logout()

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
	b.Run(submit("form[action$='/verify']"))
	has("verified", "未发现不符")
	b.Size(390, 844)
	b.Open("/console/?still=1")
	b.Look("overview on a phone")
	b.Shot("appliance-overview-phone")
	for at, words := range map[string]string{"/console/backups": "备份", "/console/machines?key=": "staff", "/console/tsa": "sm2", "/console/certificates": "tls", "/console/applications": "his"} {
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
	if log, err := os.ReadFile(m.log); err != nil || bytes.Contains(log, []byte(li)) || bytes.Contains(log, q.Content) {
		t.Errorf("the log has a password or the document: %v", err)
	}
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

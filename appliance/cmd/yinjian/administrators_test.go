package main_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"yinjian/api"
	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance"
	"yinjian/appliance/alarm"
)

// A clerk is an administrator at a command line of his own.
type clerk struct {
	m            *machine
	id, password string
	env          []string
}

func (m *machine) clerk(t *testing.T, id, password string) *clerk {
	t.Helper()
	return &clerk{m, id, password, []string{"XDG_RUNTIME_DIR=" + tempDir(t)}}
}

func (k *clerk) run(t *testing.T, args ...string) outcome {
	t.Helper()
	return command(t, k.env, append([]string{built.binary}, append(args, "--dir", k.m.dir)...)...)
}

func (k *clerk) must(t *testing.T, args ...string) outcome {
	t.Helper()
	o := k.run(t, args...)
	if o.code != 0 {
		t.Fatalf("%s: %v: %v", k.id, args, o)
	}
	return o
}

func (k *clerk) refused(t *testing.T, words string, args ...string) {
	t.Helper()
	if o := k.run(t, args...); o.code != 1 || !strings.Contains(o.stderr, words) {
		t.Errorf("%s: %v: want %q: %v", k.id, args, words, o)
	}
}

func (k *clerk) login(t *testing.T, flags ...string) {
	t.Helper()
	k.must(t, append([]string{"login", "--name", k.id, "--password-file", pinFile(t, k.password)}, flags...)...)
}

// together has one propose what the arguments say and another approve it, and answers how the first one's command ended.
func (k *clerk) together(t *testing.T, second *clerk, args ...string) outcome {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, built.binary, append(args, "--dir", k.m.dir)...)
	cmd.Env = append(os.Environ(), k.env...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var list struct {
		Proposals []struct {
			wire.Proposal
			By string
		}
	}
	eventually(t, time.Minute, "the proposal is there", func() bool {
		o := second.must(t, "approval", "list", "-o", "json")
		if err := json.Unmarshal([]byte(o.stdout), &list); err != nil {
			t.Fatal(err)
		}
		for _, p := range list.Proposals {
			if p.State == "pending" {
				k.refused(t, "不能批准", "approval", "approve", p.Proposal.Proposal, "--sm3", p.SM3)
				second.must(t, "approval", "approve", p.Proposal.Proposal, "--sm3", p.SM3)
				return true
			}
		}
		return false
	})
	_ = cmd.Wait() // its state says how it ended
	return outcome{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// The three administrators from their beginning: on an open local socket, then where everybody logs in, alone and in twos, by
// password and by certificate, over restarts.
func TestAdministrators(t *testing.T) {
	t.Parallel()
	need(t, "openssl")
	dir := initAppliance(t, startTimeServer(t))
	configure(t, dir, func(c *appliance.Config) { c.Listen.Admin, c.Listen.Peer = "127.0.0.1:0", freePort(t) })
	m := serve(t, dir)
	m.trusted(t)
	zhang, li, wang := m.clerk(t, "zhang", "Xt-guanli-2026"), m.clerk(t, "li", "Aq-guanli-2026"), m.clerk(t, "wang", "Sj-guanli-2026")
	three := []string{"admin", "bootstrap", "--dir", dir, "--system", "zhang:张三:" + pinFile(t, zhang.password), "--security", "li:李四:" + pinFile(t, li.password),
		"--audit", "wang:王五:" + pinFile(t, wang.password)}
	mustRun(t, three...)
	m.changeOf(t, "/admin/v1/administrators/bootstrap", "account.administrator/outcome", "zhang", "", `"password":"sm3:`)
	refused(t, 1, []string{"已有管理员"}, three...)
	// Without a login the socket is as open as before.
	mustRun(t, "admin", "add", "sun", "--dir", dir, "--name", "孙七", "--role", "security", "--password-file", pinFile(t, "Sun-guanli-26"))
	m.changeOf(t, "/admin/v1/administrators", "account.administrator/outcome", "sun", "", `"must_change":true`)
	mustRun(t, "admin", "stop", "sun", "--dir", dir, "--reason", "调离")
	m.changeOf(t, "/admin/v1/administrators/:id/stop", "account.administrator/outcome", "sun", `"stopped":false`, `"stopped":true`)
	mustRun(t, "admin", "start", "sun", "--dir", dir, "--reason", "返岗")
	m.changeOf(t, "/admin/v1/administrators/:id/start", "account.administrator/outcome", "sun", `"stopped":true`, `"stopped":false`)
	mustRun(t, "admin", "reset", "sun", "--dir", dir, "--password-file", pinFile(t, "Sun-guanli-27"))
	m.changeOf(t, "/admin/v1/administrators/:id/password", "account.administrator/outcome", "sun", `"password":"sm3:`, `"password":"sm3:`)
	refused(t, 1, []string{"唯一在任的 audit 管理员", "须两人"}, "admin", "stop", "wang", "--dir", dir, "--reason", "调离")
	mustRun(t, "admin", "add", "qian", "--dir", dir, "--name", "钱八", "--role", "audit", "--password-file", pinFile(t, "Shenji-guanli-26"))
	// Who is an administrator at both campuses, registered on its own at each, keeps them from being paired: the card says so.
	local := m.admin()
	defer local.Close()
	file, err := local.PeerCard(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var card struct{ Card []byte }
	if err := json.Unmarshal(file.File, &card); err != nil || !bytes.Contains(card.Card, []byte(`"administrator sun"`)) || !bytes.Contains(card.Card, []byte(`"administrator zhang"`)) {
		t.Errorf("%s, %v", card.Card, err)
	}
	work := tempDir(t)
	key, cert := filepath.Join(work, "key.pem"), filepath.Join(work, "cert.pem")
	command(t, nil, "openssl", "genpkey", "-algorithm", "SM2", "-out", key)
	if o := command(t, nil, "openssl", "req", "-x509", "-new", "-key", key, "-sm3", "-sigopt", "distid:1234567812345678", "-subj", "/CN=wang", "-days", "30", "-out", cert); o.code != 0 {
		t.Fatal(o)
	}
	mustRun(t, "admin", "certificate", "wang", "--dir", dir, "--file", cert)
	m.changeOf(t, "/admin/v1/administrators/:id/certificate", "account.administrator/outcome", "wang", `"version":1`, `"certificate":"`)

	configure(t, dir, func(c *appliance.Config) { c.Admin.Local = "login" })
	configure(t, dir, quick)
	m.stop(t)
	m = serve(t, dir)
	zhang.m, li.m, wang.m = m, m, m
	m.trusted(t) // the state asks for no login on the local socket
	refused(t, 1, []string{"login_required"}, "app", "list", "--dir", dir)
	refused(t, 1, []string{"login_required"}, "admin", "list", "--dir", dir)
	refused(t, 1, []string{"已有管理员"}, three...)
	if s := m.state(t); !strings.Contains(s.Listeners["admin_local"], "须登录") || !strings.Contains(s.Listeners["admin"], "TLS 1.3") {
		t.Errorf("%v", s.Listeners)
	}
	li.refused(t, "login_failed", "login", "--name", "li", "--password-file", pinFile(t, "Aq-guanli-2025"))
	zhang.login(t)
	li.login(t)
	zhang.refused(t, "forbidden", "app", "list")
	li.must(t, "app", "list")
	li.refused(t, "forbidden", "db", "sweep")

	// In twos: the key reaches the one who asked for it.
	if o := li.together(t, zhang, "app", "register", "his", "--name", "门诊", "--campus", "本部", "--consent", "app-asserted"); o.code != 0 {
		t.Fatal(o)
	}
	his := m.client(t, "his")
	if o := li.together(t, zhang, "signer", "enrol", "D1", "--name", "王医生", "--department", "胸外科", "--campus", "本部", "--algorithms", "SM2"); o.code != 0 {
		t.Fatal(o)
	}
	if _, err := his.Sign(t.Context(), "visit-1", asserted("D1", "visit-1")); err != nil {
		t.Error(err)
	}
	if o := zhang.together(t, li, "time", "sources", "remove", "ntp1", "--reason", "检修"); o.code == 0 {
		t.Errorf("the last time source was removed: %v", o)
	}

	// The auditor's login is signed as well; his changes of the log name both persons.
	wang.refused(t, "login_failed", "login", "--name", "wang", "--password-file", pinFile(t, wang.password))
	if err := os.Chmod(key, 0o600); err != nil {
		t.Fatal(err)
	}
	wang.login(t, "--key", key)
	o := wang.must(t, "change", "list", "--kind", "account.application/outcome", "-o", "json")
	if want := "admin:li(李四，security) 与 admin:zhang(张三，system)"; !strings.Contains(o.stdout, want) {
		t.Errorf("%s does not name %s", o.stdout, want)
	}
	wang.must(t, "db", "sweep")
	wang.refused(t, "forbidden", "signer", "stop", "D1", "--reason", "试")

	// Over TLS: a challenge signed by OpenSSL, as by whatever holds the key.
	remote := client.NewAdminTLS(m.ends.AdminTLS, &tls.Config{RootCAs: roots(t, m.ends.TLSCA), MinVersion: tls.VersionTLS13})
	defer remote.Close()
	_, err = remote.State(t.Context())
	wantCode(t, err, "login_required")
	challenge, err := remote.LoginChallenge(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	message, sig := filepath.Join(work, "message"), filepath.Join(work, "sig")
	if err := os.WriteFile(message, append([]byte("YINJIAN LOGIN\x00"), challenge...), 0o600); err != nil {
		t.Fatal(err)
	}
	if o := command(t, nil, "openssl", "pkeyutl", "-sign", "-rawin", "-digest", "sm3", "-pkeyopt", "distid:1234567812345678", "-inkey", key, "-in", message, "-out", sig); o.code != 0 {
		t.Fatal(o)
	}
	signature, err := os.ReadFile(sig)
	if err != nil {
		t.Fatal(err)
	}
	in, err := remote.Login(t.Context(), wire.Login{Name: "wang", Password: wang.password, Challenge: challenge, Signature: signature})
	if err != nil {
		t.Fatal(err)
	}
	remote = remote.WithSession(in.Session, nil)
	if _, err := remote.AuditVerify(t.Context()); err != nil {
		t.Error(err)
	}

	// Who is stopped is out at once, at both listeners; who has a new password logs in anew.
	li.must(t, "admin", "stop", "wang", "--reason", "调离")
	_, err = remote.AuditVerify(t.Context())
	wantCode(t, err, "login_required")
	wang.refused(t, "login_required", "db", "sweep")
	sun := m.clerk(t, "sun", "Sun-guanli-27")
	sun.login(t)
	sun.refused(t, "password_ended", "app", "list")
	sun.must(t, "admin", "password", "--old-password-file", pinFile(t, sun.password), "--password-file", pinFile(t, "Sun-zijide-28"))
	sun.refused(t, "login_required", "app", "list")
	sun.password = "Sun-zijide-28"
	sun.login(t)
	sun.must(t, "app", "list")
	sun.must(t, "logout")
	sun.refused(t, "login_required", "app", "list")

	// Five failures lock, over a restart, which ends all sessions.
	for range 5 {
		sun.refused(t, "login_failed", "login", "--name", "sun", "--password-file", pinFile(t, "Sun-zijide-00"))
	}
	m.stop(t)
	m = serve(t, dir)
	zhang.m, li.m, sun.m = m, m, m
	sun.refused(t, "login_failed", "login", "--name", "sun", "--password-file", pinFile(t, sun.password))
	li.refused(t, "login_required", "app", "list")
	li.login(t)
	if o := li.must(t, "admin", "list", "-o", "json"); !strings.Contains(o.stdout, `"locked": true`) {
		t.Errorf("%s", o.stdout)
	}
	locked := func() bool { return strings.Contains(li.must(t, "alarm", "list").stdout, string(alarm.LoginLocked)) }
	eventually(t, time.Minute, "the lock is an alarm", locked)
	zhang.login(t)
	if o := li.together(t, zhang, "admin", "reset", "sun", "--password-file", pinFile(t, "Sun-chongzhi-29")); o.code != 0 {
		t.Errorf("%v", o)
	}
	eventually(t, time.Minute, "the alarm is over", func() bool { return !locked() })
	// No file and no log has a password.
	err = filepath.WalkDir(filepath.Dir(dir), func(name string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(name)
		for _, p := range []string{zhang.password, li.password, wang.password, sun.password} {
			if bytes.Contains(b, []byte(p)) {
				t.Errorf("%s has a password", name)
			}
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	m.stop(t)
}

// Whoever provisions names the three administrators: nobody does anything without a login from the first start on, and the
// passwords that were told once are good for one.
func TestFirstAdministrators(t *testing.T) {
	t.Parallel()
	server := startTimeServer(t)
	dir, file := filepath.Join(tempDir(t), "a"), filepath.Join(tempDir(t), "answers.toml")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	m := launch(t, dir)
	m.stands(t, api.Uninitialised)
	write := func(three string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(fmt.Sprintf("time_sources = ['%s']\n[administrators]\n%s", server.address, three)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for what, three := range map[string]string{
		"administrators.audit: 三员":     "system = 'zhang:张三'\nsecurity = 'li:李四'\n",
		"administrators.security: 登录名": "system = 'zhang:张三'\nsecurity = 'zhang:张三'\naudit = 'wang:王五'\n",
		"administrators.system: 登录名":   "system = '张三'\nsecurity = 'li:李四'\naudit = 'wang:王五'\n",
	} {
		write(three)
		refused(t, 1, []string{what}, "provision", "--dir", dir, "--answers", file)
	}
	if !appliance.Blank(dir) {
		t.Fatal("a refusal left something in the folder")
	}
	write("system = 'zhang:张三'\nsecurity = 'li:李四'\naudit = 'wang:王五'\n")
	// Whoever calls it may read more than who owns the folder that the file is in: no other file is read in its place.
	link, fifo := file+".link", file+".fifo"
	if err := errors.Join(os.Symlink(file, link), syscall.Mkfifo(fifo, 0o600)); err != nil {
		t.Fatal(err)
	}
	refused(t, 2, []string{"symbolic links"}, "provision", "--dir", dir, "--answers", link)
	refused(t, 2, []string{"不是普通文件"}, "provision", "--dir", dir, "--answers", fifo)
	var said wire.Provisioned
	if err := json.Unmarshal([]byte(mustRun(t, "provision", "--dir", dir, "--answers", file, "-o", "json").stdout), &said); err != nil || len(said.Administrators) != 3 {
		t.Fatalf("%+v, %v", said, err)
	}
	m.await(t)
	m.trusted(t)
	refused(t, 1, []string{"login_required"}, "app", "list", "--dir", dir)
	other := pinFile(t, "Bieren-mima-26")
	refused(t, 1, []string{"已有管理员"}, "admin", "bootstrap", "--dir", dir, "--system", "x1:某:"+other, "--security", "x2:某:"+other, "--audit", "x3:某:"+other)
	clerks := map[string]*clerk{}
	for i, p := range said.Administrators {
		k := m.clerk(t, p.ID, p.Password)
		clerks[p.ID] = k
		k.login(t)
		k.refused(t, "password_ended", "admin", "list")
		fresh := fmt.Sprintf("Zijide-guanli-%d", i)
		k.must(t, "admin", "password", "--old-password-file", pinFile(t, k.password), "--password-file", pinFile(t, fresh))
		k.refused(t, "login_failed", "login", "--name", p.ID, "--password-file", pinFile(t, p.Password))
		k.password = fresh
		k.login(t)
	}
	if o := clerks["li"].together(t, clerks["zhang"], "app", "register", "his", "--name", "门诊", "--campus", "本部"); o.code != 0 {
		t.Error(o)
	}
	o := clerks["wang"].must(t, "change", "list", "--kind", "account.administrator/outcome", "-o", "json")
	if n := strings.Count(o.stdout, `"appliance init"`); n != 3 {
		t.Errorf("%d changes by init, want 3: %s", n, o.stdout)
	}
	err := filepath.WalkDir(filepath.Dir(dir), func(name string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return nil // it came and went
		}
		b, _ := os.ReadFile(name)
		for _, p := range said.Administrators {
			if bytes.Contains(b, []byte(p.Password)) {
				t.Errorf("%s has a one-time password", name)
			}
		}
		return nil
	})
	if _, left := os.Stat(appliance.FirstAdministratorsFile(dir)); err != nil || left == nil {
		t.Errorf("%v; the file that init left is there: %v", err, left == nil)
	}
	m.stop(t)
}

package main_test

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"yinjian/api/wire"
	"yinjian/appliance"
)

// TestBackupFromOutside makes custodians and takes a backup away as from a machine without a shell: over the administrators'
// listener, proposed by one administrator and approved by another.
func TestBackupFromOutside(t *testing.T) {
	t.Parallel()
	dir := initAppliance(t, startTimeServer(t))
	configure(t, dir, func(c *appliance.Config) { c.Listen.Admin = "127.0.0.1:0" })
	m := serve(t, dir)
	m.trusted(t)
	zhang, li, wang := m.clerk(t, "zhang", "Xt-guanli-2026"), m.clerk(t, "li", "Aq-guanli-2026"), m.clerk(t, "wang", "Sj-guanli-2026")
	mustRun(t, "admin", "bootstrap", "--dir", dir, "--system", "zhang:张三:"+pinFile(t, zhang.password), "--security", "li:李四:"+pinFile(t, li.password),
		"--audit", "wang:王五:"+pinFile(t, wang.password))
	for _, k := range []*clerk{zhang, li} { // the first password is changed at the first login
		k.login(t)
		fresh := k.password + "-1"
		k.must(t, "admin", "password", "--old-password-file", pinFile(t, k.password), "--password-file", pinFile(t, fresh))
		k.password = fresh
		k.login(t)
	}
	at := func(k *clerk, args ...string) []string {
		return append(args, "--at", m.ends.AdminTLS, "--ca", m.ends.TLSCA, "--name", k.id, "--password-file", pinFile(t, k.password))
	}
	// together has one propose from outside, and the other approve.
	together := func(k, second *clerk, args ...string) outcome {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
		defer cancel()
		cmd := exec.CommandContext(ctx, built.binary, at(k, args...)...)
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		ended := make(chan struct{})
		go func() {
			_ = cmd.Wait() // its state says how it ended
			close(ended)
		}()
		eventually(t, readyWithin, "the proposal is there", func() bool {
			var list struct {
				Proposals []struct{ wire.Proposal }
			}
			if err := json.Unmarshal([]byte(second.must(t, "approval", "list", "-o", "json").stdout), &list); err != nil {
				t.Fatal(err)
			}
			for _, p := range list.Proposals {
				if p.State == "pending" {
					second.must(t, "approval", "approve", p.Proposal.Proposal, "--sm3", p.SM3)
					return true
				}
			}
			select {
			case <-ended:
				t.Fatalf("%v ended before it was approved: %s%s", args, &stdout, &stderr)
			default:
			}
			return false
		})
		<-ended
		return outcome{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
	}

	folder := tempDir(t)
	file := filepath.Join(folder, "custodians.toml")
	text := "name = \"2026 年\"\nrecord = \"custodians.json\"\nthreshold = 2\n"
	for _, n := range []string{"1", "2", "3"} {
		text += "[[custodian]]\nname = \"保管人" + n + "\"\nshare = \"share-" + n + ".txt\"\n"
	}
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if o := together(li, zhang, "backup", "custodians", file); o.code != 0 {
		t.Fatalf("custodians from outside: %v", o)
	}
	to := filepath.Join(folder, "b.yjb")
	refused(t, 1, []string{"login_failed"}, "backup", "create", "--softtoken", "--to", to, "--at", m.ends.AdminTLS, "--ca", m.ends.TLSCA, "--name", "zhang", "--password-file", pinFile(t, "not-the-password"))
	// Who has no anchor compares the fingerprint on the console, which is what the status says.
	var shown struct{ Certificate struct{ Fingerprint string } }
	if err := json.Unmarshal([]byte(zhang.must(t, "status", "-o", "json").stdout), &shown); err != nil {
		t.Fatal(err)
	}
	byFingerprint := func(f string) []string {
		return []string{"backup", "create", "--softtoken", "--to", to, "--at", m.ends.AdminTLS, "--fingerprint", f, "--name", "li", "--password-file", pinFile(t, li.password)}
	}
	refused(t, 1, []string{"无此权限"}, byFingerprint(shown.Certificate.Fingerprint)...)
	refused(t, 1, []string{"证书与控制台上的指纹不符"}, byFingerprint(strings.Repeat("0", 64))...)
	refused(t, 2, []string{"64 个十六进制数字"}, byFingerprint("12")...)
	refused(t, 2, []string{"须有 --ca 或 --fingerprint"}, "backup", "create", "--to", to, "--at", m.ends.AdminTLS, "--name", "li")
	// A login at its address serves every command after it.
	there := func(k *clerk, args ...string) outcome {
		return command(t, k.env, append([]string{built.binary}, append(args, "--dir", m.ends.AdminTLS)...)...)
	}
	if o := there(li, "admin", "list"); o.code != 1 || !strings.Contains(o.stderr, "没有登录") {
		t.Errorf("before a login: %v", o)
	}
	enters := []string{"login", "--name", "li", "--password-file", pinFile(t, li.password)}
	if o := there(li, enters...); o.code != 2 || !strings.Contains(o.stderr, "须有 --ca 或 --fingerprint") {
		t.Errorf("a login at anybody's: %v", o)
	}
	if o := there(li, append(enters, "--fingerprint", strings.Repeat("0", 64))...); o.code != 1 || !strings.Contains(o.stderr, "指纹不符") {
		t.Errorf("a login at another's: %v", o)
	}
	for _, trust := range [][]string{{"--ca", m.ends.TLSCA}, {"--fingerprint", strings.ToUpper(shown.Certificate.Fingerprint)}} {
		if o := there(li, append(enters, trust...)...); o.code != 0 {
			t.Fatalf("a login from outside: %v", o)
		}
		if o := there(li, "admin", "list"); o.code != 0 || !strings.Contains(o.stdout, "李四") {
			t.Errorf("a command from outside: %v", o)
		}
		if o := there(li, "logout"); o.code != 0 {
			t.Errorf("a logout from outside: %v", o)
		}
	}
	if o := there(li, "admin", "list"); o.code != 1 || !strings.Contains(o.stderr, "没有登录") {
		t.Errorf("after a logout: %v", o)
	}
	if o := li.run(t, append(enters, "--fingerprint", strings.Repeat("0", 64))...); o.code != 2 {
		t.Errorf("a fingerprint for a folder: %v", o)
	}
	refused(t, 1, []string{"无此权限"}, at(li, "backup", "create", "--softtoken", "--to", to)...)
	o := together(zhang, li, "backup", "create", "--softtoken", "--to", to)
	if o.code != 0 {
		t.Fatalf("a backup from outside: %v", o)
	}
	if left, _ := filepath.Glob(to + ".partial"); len(left) > 0 {
		t.Error(left)
	}
	shares := []string{filepath.Join(folder, "share-1.txt"), filepath.Join(folder, "share-2.txt")}
	if o := mustRun(t, opens(shares, 2, "backup", "verify", to, "--log-key", filepath.Join(dir, "log.pem"))...); !strings.Contains(o.stdout, "✓ 回执") {
		t.Errorf("%v", o)
	}
	if e := entries(t, dir, "backup.export/outcome"); len(e) != 1 || !strings.Contains(e[0].Text("persons"), "张三") || !strings.Contains(e[0].Text("persons"), "李四") {
		t.Errorf("the journal says of it: %+v", e)
	}
	// What was not begun is not carried out, and nobody without a login gets anything.
	a := m.admin()
	defer a.Close()
	if _, err := a.CarryBackup(t.Context(), wire.CarryBackup{ID: "0123456789abcdef"}, new(bytes.Buffer)); err == nil || !strings.Contains(err.Error(), "没有正在进行的这份备份") {
		t.Errorf("a backup that was not begun: %v", err)
	}
	m.stop(t)
}

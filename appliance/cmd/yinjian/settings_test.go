package main_test

import (
	"archive/tar"
	"compress/gzip"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"yinjian/api/wire"
	"yinjian/appliance"
	"yinjian/appliance/alarm"
)

func (m *machine) settings(t *testing.T) (s wire.SettingsStatus) {
	t.Helper()
	if err := json.Unmarshal([]byte(mustRun(t, "settings", "show", "--dir", m.dir, "-o", "json").stdout), &s); err != nil {
		t.Fatal(err)
	}
	return s
}

// propose has two persons, as an open socket names them, approve a change.
func (m *machine) propose(t *testing.T, args ...string) {
	t.Helper()
	mustRun(t, append([]string{"settings", "propose", "--dir", m.dir, "--reason", "试", "--confirmed-by", "张三", "--confirmed-by", "李四"}, args...)...)
}

// again restarts the service for its settings, as a service manager does, and answers what runs afterwards.
func (m *machine) again(t *testing.T, more ...string) *machine {
	t.Helper()
	mustRun(t, "settings", "restart", "--dir", m.dir, "--reason", "启用")
	m.endsToRestart(t)
	return serve(t, m.dir, more...)
}

func (m *machine) endsToRestart(t *testing.T) {
	t.Helper()
	select {
	case <-m.ended:
	case <-time.After(5 * time.Minute):
		t.Fatal("serve did not end")
	}
	if o := m.outcome(); o.code != 75 {
		t.Fatalf("exit %d, want 75: %s", o.code, lastLines([]byte(o.stderr), 20))
	}
}

// Settings are changed by two, tried at the next start, and left again by themselves when the start fails or nobody confirms that the
// appliance is reached. What is secret is in no journal, log or diagnosis.
func TestSettings(t *testing.T) {
	t.Parallel()
	dir := initAppliance(t, startTimeServer(t))
	configure(t, dir, func(c *appliance.Config) {
		c.Log.Directory = "logs"
		c.Alarms.RaiseAfter, c.Alarms.ClearAfter = appliance.Duration(time.Second), appliance.Duration(time.Second)
	})
	m := serve(t, dir)
	m.trusted(t)
	was := readFile(t, filepath.Join(dir, "config.toml"))

	// What is wrong is told, all of it, and nothing is done.
	refused(t, 1, []string{"policy.speed", "settings"}, "settings", "check", "--dir", dir, "--set", "policy.speed=1")
	refused(t, 1, []string{"policy.rate", "time.drift_ppm"}, "settings", "propose", "--dir", dir, "--set", "policy.rate=-1", "--set", "time.drift_ppm=1", "--reason", "试", "--confirmed-by", "张三", "--confirmed-by", "李四")
	refused(t, 1, []string{"node：不能这样更改"}, "settings", "check", "--dir", dir, "--set", `node="benbu-2"`)
	refused(t, 1, []string{"两人"}, "settings", "propose", "--dir", dir, "--set", "policy.rate=2000", "--reason", "试", "--confirmed-by", "张三")
	refused(t, 1, []string{"没有等待"}, "settings", "restart", "--dir", dir, "--reason", "试")
	refused(t, 1, []string{"没有待确认"}, "settings", "confirm", "--dir", dir, "--reason", "试")
	if o := mustRun(t, "settings", "check", "--dir", dir, "--set", "policy.rate=2000"); !strings.Contains(o.stdout, "policy.rate") || !strings.Contains(o.stdout, "3000") || !strings.Contains(o.stdout, "2000") {
		t.Error(o)
	}

	// One that is taken back before the restart was never there; one with a secret takes effect at the restart.
	m.propose(t, "--set", "policy.rate=1000")
	m.changeOf(t, "/admin/v1/settings", "appliance.settings/waiting", "", `"policy.rate":"3000"`, `"policy.rate":"1000"`)
	refused(t, 1, []string{"已有一项设置"}, "settings", "propose", "--dir", dir, "--set", "policy.rate=2000", "--reason", "试", "--confirmed-by", "张三", "--confirmed-by", "李四")
	mustRun(t, "settings", "cancel", "--dir", dir, "--reason", "改期")
	m.changeOf(t, "/admin/v1/settings/cancel", "appliance.settings/cancelled", "", `"policy.rate":"1000"`, `"policy.rate":"3000"`)
	const secret = "Geheim-4711-alert-key"
	m.propose(t, "--set", "policy.rate=2000", "--set", `alarms.webhook=[{url="https://127.0.0.1:1/x?token=Geheim-4711-token",key_file="secrets/alert.key"}]`, "--secret", "alert.key="+pinFile(t, secret))
	if s := m.settings(t); s.Waiting == nil || s.Trial != nil || s.Waiting.Confirm || readFile(t, filepath.Join(dir, "config.toml")) != was {
		t.Errorf("%+v", s)
	}
	m = m.again(t)
	m.changeOf(t, "/admin/v1/settings/restart", "appliance.settings/restart", "", "waiting", "restarting")
	if s := m.settings(t); !strings.Contains(s.Config, "rate = 2000") || s.Waiting != nil {
		t.Errorf("%+v", s)
	}
	eventually(t, 5*time.Minute, "the settings have proved themselves", func() bool { return m.settings(t).Trial == nil })
	if readFile(t, filepath.Join(dir, "secrets", "alert.key")) != secret+"\n" || readFile(t, filepath.Join(dir, "config.toml.previous")) != was {
		t.Error("the secret or the settings of before are not where they belong")
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "settings", "*")); len(left) > 0 {
		t.Errorf("%q is left", left)
	}

	// An address that this machine has not: the start fails, those of before come back by themselves, and somebody is told.
	good := readFile(t, filepath.Join(dir, "config.toml"))
	m.propose(t, "--set", `listen.api="192.0.2.99:8443"`)
	m = m.again(t, "--settings-trial", "20s")
	if s := m.settings(t); readFile(t, filepath.Join(dir, "config.toml")) != good || s.Left == nil || s.Trial != nil || !strings.Contains(s.Left.Why, "cannot assign requested address") {
		t.Errorf("%+v", s.Left)
	}
	m.raises(t, alarm.SettingsLeft)
	mustRun(t, "settings", "cancel", "--dir", dir, "--reason", "看过")
	m.clears(t, alarm.SettingsLeft)

	// Names by which administrators may no longer reach it: nobody confirms, and the process ends to have those of before.
	m.trusted(t)
	m.propose(t, "--set", `listen.names=["elsewhere.example"]`)
	m = m.again(t, "--settings-confirm", "12s")
	if s := m.settings(t); s.Trial == nil || s.Trial.LeftS == 0 {
		t.Errorf("%+v", s.Trial)
	}
	m.endsToRestart(t)
	m = serve(t, dir)
	if s := m.settings(t); readFile(t, filepath.Join(dir, "config.toml")) != good || s.Left == nil || !strings.Contains(s.Left.Why, "确认") {
		t.Errorf("%+v", s.Left)
	}
	m.propose(t, "--set", `listen.names=["127.0.0.1"]`)
	m = m.again(t)
	mustRun(t, "settings", "confirm", "--dir", dir, "--reason", "连得到")
	m.changeOf(t, "/admin/v1/settings/confirm", "appliance.settings/confirmed", "", "trial", "confirmed")
	eventually(t, 5*time.Minute, "the settings have proved themselves", func() bool { s := m.settings(t); return s.Trial == nil && s.Left == nil })

	// Whoever reads journal, log or diagnosis learns no secret.
	out := filepath.Join(tempDir(t), "diag.tar.gz")
	mustRun(t, "diag", "--dir", dir, "--out", out)
	searched := map[string]string{"diag": unpacked(t, out), "log": readFile(t, filepath.Join(dir, "logs", "yinjian.log")), "output": readFile(t, m.log)}
	m.stop(t)
	var kinds []string
	for _, e := range entries(t, dir, "appliance.settings/waiting", "appliance.settings/cancelled", "appliance.settings/restart", "appliance.settings/trial", "appliance.settings/good", "appliance.settings/left", "appliance.settings/confirmed") {
		kinds = append(kinds, strings.TrimPrefix(e.Kind, "appliance.settings/"))
	}
	want := []string{"waiting", "cancelled", "waiting", "restart", "trial", "good", "waiting", "restart", "left", "cancelled", "waiting", "restart", "trial", "left", "waiting", "restart", "trial", "confirmed", "good"}
	if !slices.Equal(kinds, want) {
		t.Errorf("the journal has %q, want %q", kinds, want)
	}
	segments, _ := filepath.Glob(filepath.Join(dir, "journal", "*"))
	for _, name := range append(segments, filepath.Join(dir, "central.db")) {
		searched[name] = readFile(t, name)
	}
	for where, text := range searched {
		if strings.Contains(text, "Geheim-4711") {
			t.Errorf("a secret is in %s", where)
		}
	}
	mustRun(t, "audit", "verify", "--dir", dir)
}

// unpacked is all that is in a tar.gz, one after another.
func unpacked(t *testing.T, name string) string {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	var all strings.Builder
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return all.String()
		}
		if err == nil {
			all.WriteString(h.Name)
			_, err = io.Copy(&all, r)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// Where everybody logs in the system administrator proposes and security approves, who sees each change, and of a secret its name.
func TestSettingsByTwo(t *testing.T) {
	t.Parallel()
	dir := initAppliance(t, startTimeServer(t))
	m := serve(t, dir)
	m.trusted(t)
	zhang, li, wang := m.clerk(t, "zhang", "Xt-guanli-2026"), m.clerk(t, "li", "Aq-guanli-2026"), m.clerk(t, "wang", "Sj-guanli-2026")
	mustRun(t, "admin", "bootstrap", "--dir", dir, "--system", "zhang:张三:"+pinFile(t, zhang.password), "--security", "li:李四:"+pinFile(t, li.password),
		"--audit", "wang:王五:"+pinFile(t, wang.password))
	m.stop(t)
	configure(t, dir, func(c *appliance.Config) { c.Admin.Local = "login" })
	m = serve(t, dir)
	m.trusted(t)
	for _, k := range []*clerk{zhang, li, wang} {
		k.m = m
		k.login(t)
	}
	li.refused(t, "无此权限", "settings", "propose", "--set", "policy.rate=2000", "--reason", "试")
	wang.refused(t, "无此权限", "settings", "restart", "--reason", "试")
	zhang.refused(t, "policy.speed", "settings", "propose", "--set", "policy.speed=1", "--reason", "试") // at once, and not of li
	zhang.refused(t, "不能这样改回", "settings", "propose", "--set", `admin.local="open"`, "--reason", "试")
	const secret = "Geheim-4711-password"
	if o := zhang.together(t, li, "settings", "propose", "--set", "policy.rate=2000", "--secret", "db.password="+pinFile(t, secret), "--reason", "限速"); o.code != 0 {
		t.Fatal(o)
	}
	shown := wang.must(t, "approval", "list", "-o", "json").stdout
	if !strings.Contains(shown, "policy.rate") || !strings.Contains(shown, "db.password") || strings.Contains(shown, "Geheim") || strings.Contains(shown, "R2VoZWlt") {
		t.Errorf("who approves sees\n%s", shown)
	}
	zhang.must(t, "settings", "restart", "--reason", "启用")
	m.endsToRestart(t)
	m = serve(t, dir)
	m.trusted(t)
	zhang.m = m
	zhang.login(t)
	if o := zhang.must(t, "settings", "show"); !strings.Contains(o.stdout, "rate = 2000") || strings.Contains(o.stdout, "Geheim") {
		t.Error(o)
	}
	m.stop(t)
	found := entries(t, dir, "appliance.settings/waiting")
	if len(found) != 1 || !strings.Contains(found[0].Actor, "zhang") || !strings.Contains(found[0].Actor, "li") {
		t.Errorf("%+v", found)
	}
}

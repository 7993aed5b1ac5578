package appliance

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sirupsen/logrus"

	"yinjian/api/wire"
)

// site is a folder with a configuration as hospitals have it, and a house for it.
func site(t *testing.T) (*settings, string) {
	t.Helper()
	dir := t.TempDir()
	text := `node = "benbu-1"
campus = "本部"
[listen]
api = "192.0.2.10:8443"
admin = "192.0.2.10:8444"
[admin]
local = "login"
[hsm]
module = "/usr/lib/vendor.so"
module_args = "pin=geheim-args"
[hsm.slots.staff]
token_label = "a"
pin_file = "secrets/staff.pin"
[hsm.slots.tsa]
token_label = "b"
pin_file = "secrets/staff.pin"
[hsm.slots.log]
token_label = "c"
pin_file = "secrets/staff.pin"
[hsm.slots.ca]
token_label = "d"
pin_file = "secrets/staff.pin"
[time]
min_sources = 1
policy_note = "min_sources=1"
[[time.sources]]
name = "ntp1"
group = "ntp1"
address = "192.0.2.21:123"
[database]
dsn = "postgres://yinjian@192.0.2.40/yinjian"
password_file = "secrets/db.password"
`
	for name, b := range map[string]string{"config.toml": text, "secrets/staff.pin": "old-pin", "secrets/db.password": "old-password"} {
		name = filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o700), os.WriteFile(name, []byte(b), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	log := logrus.New()
	log.SetOutput(io.Discard)
	h := &house{log: log}
	h.o.Dir = dir
	h.settings.h = h
	return &h.settings, dir
}

func content(t *testing.T, parts ...string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(parts...))
	if err != nil {
		return "absent"
	}
	return string(b)
}

// What would change is told by key, before and after, without what could be a secret.
func TestPlanOfSettings(t *testing.T) {
	t.Parallel()
	_, dir := site(t)
	now := []byte(content(t, dir, "config.toml"))
	plan, err := planSettings(dir, now, &wire.Settings{
		Overlay: []byte("[policy]\nrate = 2000\n[hsm]\nmodule_args = 'pin=other-args'\n[[alarms.webhook]]\nurl = 'https://alert.example.org/send?token=geheim-token'\nkey_file = 'secrets/alert.key'\n[time]\nmin_sources = 1\naccuracy = '500ms'\n"),
		Remove:  []string{"admin.local"},
		Secrets: []wire.SecretFile{{Name: "alert.key", Secret: []byte("geheim-key\n")}, {Name: "db.password", Secret: []byte("geheim-password")}},
	})
	if err == nil || !strings.Contains(err.Error(), "admin.local：不能这样改回 open") { // left out is "open"
		t.Fatalf("%v", err)
	}
	plan, err = planSettings(dir, now, &wire.Settings{
		Overlay: []byte("[policy]\nrate = 2000\n[hsm]\nmodule_args = 'pin=other-args'\n[[alarms.webhook]]\nurl = 'https://alert.example.org/send?token=geheim-token'\nkey_file = 'secrets/alert.key'\n[time]\naccuracy = '500ms'\n"),
		Secrets: []wire.SecretFile{{Name: "alert.key", Secret: []byte("geheim-key-1234567\n")}, {Name: "db.password", Secret: []byte("geheim-password")}},
	})
	if err != nil {
		t.Fatal(err)
	}
	said := fmt.Sprint(plan.changes)
	for _, want := range []string{"{policy.rate 3000 2000}", "{policy.burst 6000 4000}", "{time.accuracy 1s 500ms}", "https://alert.example.org/", "hsm.module_args", "{secrets/db.password （原有", "{secrets/alert.key （没有"} {
		if !strings.Contains(said, want) {
			t.Errorf("no %s in %s", want, said)
		}
	}
	if strings.Contains(said, "geheim") || strings.Contains(said, "other-args") || !plan.reach || strings.Contains(string(plan.text), "policy_note") {
		t.Errorf("%s, %v\n%s", said, plan.reach, plan.text)
	}
	plan, err = planSettings(dir, now, &wire.Settings{Overlay: []byte("log.level = 'debug'\n"), Remove: []string{"database"}})
	if err != nil || plan.reach || !strings.Contains(fmt.Sprint(plan.changes), "{log.level info debug}") || strings.Contains(string(plan.text), "192.0.2.40") {
		t.Errorf("%+v, %v", plan, err)
	}
}

// Everything that is wrong with a change is told, by the code that will read it, and what an appliance keeps is kept.
func TestFaultsOfAChange(t *testing.T) {
	t.Parallel()
	_, dir := site(t)
	now := []byte(content(t, dir, "config.toml"))
	secret := func(name, text string) []wire.SecretFile {
		return []wire.SecretFile{{Name: name, Secret: []byte(text)}}
	}
	for name, c := range map[string]struct {
		change wire.Settings
		want   []string
	}{
		"no TOML":             {wire.Settings{Overlay: []byte("policy = ")}, []string{"toml"}},
		"unknown key":         {wire.Settings{Overlay: []byte("policy.speed = 1")}, []string{"policy.speed", "未知的配置项"}},
		"two faults":          {wire.Settings{Overlay: []byte("policy.rate = -1\ntime.drift_ppm = 1")}, []string{"policy.rate", "time.drift_ppm"}},
		"wrong type":          {wire.Settings{Overlay: []byte("policy.rate = 'much'")}, []string{"rate"}},
		"nothing":             {wire.Settings{Overlay: []byte("policy.rate = 3000")}, []string{"没有任何改变"}},
		"node":                {wire.Settings{Overlay: []byte("node = 'benbu-2'")}, []string{"node：不能这样更改"}},
		"campus":              {wire.Settings{Overlay: []byte("campus = '东院'")}, []string{"campus：不能这样更改"}},
		"pin_source":          {wire.Settings{Overlay: []byte("hsm.pin_source = 'unlock'")}, []string{"hsm.pin_source：不能这样更改"}},
		"evaluation":          {wire.Settings{Overlay: []byte("evaluation.softtoken = true")}, []string{"evaluation.softtoken：不能这样更改"}},
		"the image's socket":  {wire.Settings{Overlay: []byte("update.socket = '/tmp/x'")}, []string{"update.socket：不能这样更改"}},
		"one person again":    {wire.Settings{Overlay: []byte("admin.local = 'open'")}, []string{"admin.local"}},
		"a library by text":   {wire.Settings{Overlay: []byte("hsm.module = 'secrets/x.so'"), Secrets: secret("x.so", "\x7fELF")}, []string{"在设备目录里"}},
		"a file not there":    {wire.Settings{Overlay: []byte("database.password_file = 'secrets/new'")}, []string{"password_file", "secrets/new"}},
		"a name outside":      {wire.Settings{Secrets: secret("../config.toml", "x")}, []string{"../config.toml：不能用这个文件名"}},
		"the appliance's own": {wire.Settings{Secrets: secret("tls.key", "x")}, []string{"tls.key：不能用这个文件名"}},
		"an empty secret":     {wire.Settings{Secrets: secret("db.password", " \n")}, []string{"是空的"}},
		"no text":             {wire.Settings{Secrets: secret("db.password", "a\x00b")}, []string{"不是文本"}},
		"twice":               {wire.Settings{Secrets: append(secret("a", "x"), secret("a", "y")...)}, []string{"重复"}},
		"nothing to remove":   {wire.Settings{Remove: []string{"tsa.upstream"}}, []string{"tsa.upstream：config.toml 里没有"}},
		"a required key":      {wire.Settings{Remove: []string{"listen.api"}}, []string{"listen.api"}},
	} {
		_, err := planSettings(dir, now, &c.change)
		for _, want := range c.want {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v, want %s", name, err, want)
			}
		}
	}
	if content(t, dir, "config.toml") != string(now) {
		t.Error("looking has changed the configuration")
	}
}

// approve puts a change where the next start finds it, as ChangeSettings does.
func (s *settings) approve(t *testing.T, c *wire.Settings) {
	t.Helper()
	dir := s.h.o.Dir
	now := []byte(content(t, dir, "config.toml"))
	p, err := planSettings(dir, now, c)
	if err != nil {
		t.Fatal(err)
	}
	r := &settingsRecord{Changes: p.changes, Before: sumOf(now), After: sumOf(p.text), Confirm: p.reach}
	err = errors.Join(os.MkdirAll(s.at(".making", "secrets"), 0o700), writeFile(s.at(".making", "config.toml"), p.text, 0o600), s.write(".making/settings.json", r))
	for _, f := range c.Secrets {
		err = errors.Join(err, writeFile(s.at(".making", "secrets", f.Name), f.Secret, 0o600))
	}
	if err := errors.Join(err, s.appear(".making", "next")); err != nil {
		t.Fatal(err)
	}
}

// stands says which settings are in place: "old", "new", or what is mixed.
func stands(t *testing.T, dir string) string {
	t.Helper()
	got := fmt.Sprint(strings.Contains(content(t, dir, "config.toml"), "rate = 2000"), " ", content(t, dir, "secrets", "staff.pin"), " ", content(t, dir, "secrets", "added"))
	switch got {
	case "false old-pin absent":
		return "old"
	case "true new-pin added":
		return "new"
	}
	return got
}

var newSettings = &wire.Settings{Overlay: []byte("policy.rate = 2000"), Secrets: []wire.SecretFile{{Name: "staff.pin", Secret: []byte("new-pin")}, {Name: "added", Secret: []byte("added")}}}

// A start puts what was approved in place, keeps what was there, and goes back to it whole, byte for byte; a change of the
// configuration by hand after the approval is not overwritten.
func TestSettingsAreTriedAndLeft(t *testing.T) {
	t.Parallel()
	s, dir := site(t)
	was := content(t, dir, "config.toml")
	s.approve(t, newSettings)
	if stands(t, dir) != "old" {
		t.Fatal("something was changed before the restart")
	}
	if err := s.begin(); err != nil || stands(t, dir) != "new" || !s.tries() || content(t, dir, "config.toml.previous") != was || !trialStands(dir) {
		t.Fatalf("%v, %s", err, stands(t, dir))
	}
	if err := s.undo("启动失败：new-pin 被拒绝，pin=geheim-args (refused)"); err != nil || stands(t, dir) != "old" || content(t, dir, "config.toml") != was || s.tries() || trialStands(dir) {
		t.Fatalf("%v, %s", err, stands(t, dir))
	}
	if why, left := s.leftWhy(); !left || !strings.Contains(why, "被拒绝") || strings.Contains(why, "new-pin") || strings.Contains(why, "geheim-args") {
		t.Errorf("%q, %v", why, left)
	}
	again := &settings{h: s.h}
	if err := again.begin(); err != nil || again.left == nil || again.trial != nil {
		t.Errorf("after another start: %+v, %v", again, err)
	}
	s.approve(t, newSettings)
	if err := os.WriteFile(filepath.Join(dir, "config.toml"), append([]byte("# by hand\n"), was...), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := again.begin(); err != nil || stands(t, dir) != "old" || again.trial != nil || !strings.Contains(again.left.Why, "又被改过") {
		t.Errorf("%v, %s, %+v", err, stands(t, dir), again.left)
	}
}

// A process that dies is counted: the fourth start has the settings of before.
func TestSettingsThatKillTheProcess(t *testing.T) {
	t.Parallel()
	s, dir := site(t)
	s.approve(t, newSettings)
	for i := range trialStarts {
		one := &settings{h: s.h}
		if err := one.begin(); err != nil || stands(t, dir) != "new" || one.trial.Tries != i+1 {
			t.Fatalf("%d: %v, %s", i, err, stands(t, dir))
		}
	}
	if err := s.begin(); err != nil || stands(t, dir) != "old" || s.trial != nil || s.left == nil {
		t.Errorf("%v, %s", err, stands(t, dir))
	}
	// A configuration that cannot be read is no reason not to go back.
	s.approve(t, newSettings)
	one := &settings{h: s.h}
	if err := one.begin(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "config.toml"), []byte("colour = 'red'"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadConfig(dir); err == nil {
		t.Fatal("read")
	}
	if why := one.givesUp(settingError{errors.New("config.toml: unknown key")}, nil); why == "" {
		t.Error("a configuration that cannot be read is tried on")
	} else if err := one.undo(why); err != nil || stands(t, dir) != "old" {
		t.Errorf("%v, %s", err, stands(t, dir))
	}
}

// Wherever a power cut ends the putting in place, or the putting back, the next start goes on to one whole or the other.
func TestPowerCutsOfSettings(t *testing.T) {
	t.Parallel()
	cut := errors.New("cut")
	for step := 0; ; step++ {
		s, dir := site(t)
		s.approve(t, newSettings)
		// The folder is copied before each rename; the copy is what a power cut leaves.
		n, left := 0, ""
		s.rename = func(from, to string) error {
			if n == step {
				left = t.TempDir()
				if err := os.CopyFS(left, os.DirFS(dir)); err != nil {
					t.Fatal(err)
				}
				n++
				return cut
			}
			n++
			return os.Rename(from, to)
		}
		err := s.begin()
		if left == "" {
			err = s.undo("试验")
		}
		if left == "" { // there are no more steps
			if err != nil || step < 8 {
				t.Fatalf("%d steps, %v", step, err)
			}
			return
		}
		after := &settings{h: &house{log: s.h.log}}
		after.h.o.Dir = left
		undoing := isThere(filepath.Join(settingsFolder(left), "undo"))
		if err := after.begin(); err != nil {
			t.Errorf("cut %d: %v", step, err)
		}
		if got := stands(t, left); got != "new" && got != "old" || undoing && got != "old" || (got == "new") != after.tries() {
			t.Errorf("cut %d: %s, tried: %v", step, got, after.tries())
		}
		for _, name := range []string{"next", "undo", ".old", ".gone"} {
			if isThere(after.at(name)) {
				t.Errorf("cut %d: settings/%s is left", step, name)
			}
		}
	}
}

// What is shown of a secret in a diagnosis is searched for: those that wait are among them.
func TestSecretsThatWait(t *testing.T) {
	t.Parallel()
	s, dir := site(t)
	s.approve(t, newSettings)
	cfg, err := LoadConfig(dir)
	if err != nil {
		t.Fatal(err)
	}
	found, err := Secrets(cfg, dir)
	if err != nil || !bytes.Equal(found[filepath.Join(dir, "settings", "next", "secrets", "staff.pin")], []byte("new-pin")) {
		t.Errorf("%v, %v", found, err)
	}
	if err := s.begin(); err != nil {
		t.Fatal(err)
	}
	if found, err = Secrets(cfg, dir); err != nil || !bytes.Equal(found[filepath.Join(dir, "settings", "trial", "secrets", "staff.pin")], []byte("old-pin")) {
		t.Errorf("%v, %v", found, err)
	}
}

package main_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance"
	"yinjian/appliance/audit"
	"yinjian/dbdriver/sqlite"
)

// A listedMachine is what the test reads of `yinjian hsm list`.
type listedMachine struct {
	Name, State, Reason, Since string
	Added                      bool
	Slots                      []struct {
		Slot, State string
		Keys, Done  int
		Only        int `json:"keys_only_here"`
	}
}

func (m *machine) machines(t *testing.T) map[string]listedMachine {
	t.Helper()
	a := m.admin()
	defer a.Close()
	var list []listedMachine
	b, err := a.ListMachines(t.Context())
	if err == nil {
		err = json.Unmarshal(b, &list)
	}
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]listedMachine{}
	for _, l := range list {
		out[l.Name] = l
	}
	return out
}

// done is how many operations a machine's slot has done.
func (l listedMachine) done(slot string) int {
	for _, s := range l.Slots {
		if s.Slot == slot {
			return s.Done
		}
	}
	return -1
}

// startCopy runs a second software cipher machine in dir, on what is there.
func startCopy(t *testing.T, dir, passphrase string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(built.binary, "softtoken", "--state", dir, "--passphrase-file", passphrase)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	if err := appliance.WaitForSocket(t.Context(), filepath.Join(dir, "p11.sock"), patience); err != nil {
		t.Fatal(err)
	}
	return cmd
}

// keysByPages holds the keys as they are found by pages against the list of all: the same is said of each that the directory
// knows.
func (m *machine) keysByPages(t *testing.T) {
	t.Helper()
	type page struct {
		Keys []struct {
			Label, Owner, Kind, State string
			Machines                  []string
		}
		Next string
	}
	a := m.admin()
	defer a.Close()
	read := func(b json.RawMessage, err error) (out page) {
		t.Helper()
		if err == nil {
			err = json.Unmarshal(b, &out)
		}
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	listed := map[string]string{}
	for _, k := range read(a.ListKeys(t.Context())).Keys {
		listed[k.Label] = fmt.Sprint(k.Owner, k.Kind, k.State, k.Machines)
	}
	found := 0
	for req := (wire.SearchKeys{Most: 1}); found == 0 || req.After != ""; {
		p := read(a.SearchKeys(t.Context(), req))
		for _, k := range p.Keys {
			found++
			if got := fmt.Sprint(k.Owner, k.Kind, k.State, k.Machines); got != listed[k.Label] {
				t.Errorf("%s: by pages %q, in the list %q", k.Label, got, listed[k.Label])
			}
		}
		req.After = p.Next
	}
	if found < 5 {
		t.Errorf("%d keys were found by pages", found)
	}
}

// A second machine is added while the appliance signs, killed, started again, and drained; the first one's daemon is
// killed too; what was decided outlives a restart. No request fails all along, every act and each loss is in the journal,
// and every signature of both machines is accounted for.
func TestTwoMachines(t *testing.T) {
	t.Parallel()
	need(t, "curl")
	dir := initAppliance(t, startTimeServer(t))
	m := serve(t, dir)
	his := m.register(t, "his", "--consent", "app-asserted")
	m.enrol(t, "D1", "")
	m.enrol(t, "D2", "")
	m.stop(t)
	// Its sealed state is copied: b holds the same keys.
	b := filepath.Join(tempDir(t), "b")
	if err := os.CopyFS(b, os.DirFS(filepath.Join(dir, "softtoken"))); err != nil {
		t.Fatal(err)
	}
	files, _ := filepath.Glob(filepath.Join(b, "*")) // the pattern is well-formed
	for _, f := range append(files, b) {
		mode := os.FileMode(0o600)
		if f == b {
			mode = 0o700
		}
		if err := os.Chmod(f, mode); err != nil {
			t.Fatal(err)
		}
	}
	third := filepath.Join(tempDir(t), "c")
	if err := os.CopyFS(third, os.DirFS(b)); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(third, 0o700); err != nil {
		t.Fatal(err)
	}
	second := startCopy(t, b, filepath.Join(dir, "secrets", "softtoken.passphrase"))
	text := fmt.Sprintf("name = 'b'\nmodule = '%s'\nmodule_args = \"socket='%s'\"\n", built.module, filepath.Join(b, "p11.sock"))
	for _, class := range []string{"staff", "tsa", "log", "ca", "tls"} {
		text += fmt.Sprintf("[slots.%s]\ntoken_label = 'yinjian-%s'\npin_file = 'secrets/%s.pin'\n", class, class, class)
	}
	file := filepath.Join(tempDir(t), "b.toml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}

	m = serve(t, dir)
	m.trusted(t)
	his = m.client(t, "his")
	var stopped atomic.Bool
	var signed atomic.Int64
	var wg sync.WaitGroup
	stop := sync.OnceFunc(func() { stopped.Store(true); wg.Wait() })
	defer stop()
	sign := func(c *client.Client, run string) {
		for i := range 3 {
			wg.Go(func() {
				for n := 0; !stopped.Load(); n++ {
					key := fmt.Sprintf("%s-%d-%d", run, i, n)
					if _, err := c.Sign(t.Context(), key, asserted("D1", key)); err != nil {
						t.Errorf("%s: %v", key, err)
						return
					}
					signed.Add(1)
				}
			})
		}
	}
	more := func(n int64) {
		t.Helper()
		want := signed.Load() + n
		eventually(t, time.Minute, "signatures are made", func() bool { return signed.Load() >= want || t.Failed() })
	}
	state := func(name, want string) {
		t.Helper()
		eventually(t, time.Minute, name+" is "+want, func() bool { return m.machines(t)[name].State == want })
	}
	works := func(name string) {
		t.Helper()
		before := m.machines(t)[name].done("staff")
		eventually(t, time.Minute, name+" signs", func() bool { return m.machines(t)[name].done("staff") > before+10 })
	}
	because := func(args ...string) []string {
		return append(append([]string{"hsm"}, args...), "--dir", dir, "--reason", "扩容")
	}
	sign(his, "first")
	more(20)

	bad := filepath.Join(tempDir(t), "bad.toml")
	if err := os.WriteFile(bad, []byte(strings.Replace(text, "name", "nmae", 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	refused(t, 1, []string{"invalid_request", "nmae"}, because("add", bad)...)
	refused(t, 1, []string{"not_found"}, because("drain", "b")...)
	refused(t, 1, []string{"forbidden"}, because("drain", "main", "--force")...)
	mustRun(t, because("add", file)...)
	m.changeOf(t, "/admin/v1/machines", "hsm.machine/outcome", "b", "", `"slots":["ca","log","staff","tls","tsa"]`)
	refused(t, 1, []string{"exists"}, because("add", file)...)
	if o := mustRun(t, "hsm", "list", "--dir", dir); !strings.Contains(o.stdout, "tsa") || !strings.Contains(o.stdout, "latency_ms") {
		t.Errorf("hsm list: %v", o)
	}
	state("b", "up")
	works("b")
	works("main")

	if err := second.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = second.Wait()
	state("b", "down")
	more(50)
	if s := m.state(t); !s.Ready || !strings.Contains(strings.Join(s.Warnings, "\n"), "密码机 b 的 staff 槽位") {
		t.Errorf("ready %v, warnings %q", s.Ready, s.Warnings)
	}
	eventually(t, time.Minute, "the journal knows that b is down", func() bool { return journalled(t, dir, "hsm.machine.state", "b") == 1 })
	if o := command(t, nil, "curl", "-sS", "--unix-socket", m.ends.Admin, "http://yinjian/metrics"); !strings.Contains(o.stdout, `yinjian_hsm_up{machine="b",slot="staff",state="down"} 0`) || !strings.Contains(o.stdout, `yinjian_hsm_up{machine="main",slot="staff",state="up"} 1`) {
		t.Errorf("metrics: %v", o)
	}
	second = startCopy(t, b, filepath.Join(dir, "secrets", "softtoken.passphrase"))
	state("b", "up")
	works("b")
	eventually(t, time.Minute, "the journal knows that b is up", func() bool { return journalled(t, dir, "hsm.machine.state", "b") == 2 })

	daemon := childWith(t, m.cmd.Process.Pid, "softtoken")
	daemon.signal(t, syscall.SIGKILL)
	more(50)
	state("main", "up")
	works("main")

	mustRun(t, because("drain", "b")...)
	m.changeOf(t, "/admin/v1/machines/:name/drain", "hsm.machine/outcome", "b", `{"draining":false}`, `{"draining":true}`)
	done := m.machines(t)["b"].done("staff")
	more(50)
	if l := m.machines(t)["b"]; l.State != "draining" || l.done("staff") > done+8 { // those under way
		t.Errorf("draining: %+v, it had done %d", l, done)
	}
	stop()
	m.stop(t)

	// A machine of the configuration that is away does not keep the appliance from starting.
	configure(t, dir, func(c *appliance.Config) {
		c.HSM.Machines = []appliance.Machine{{
			Name: "away", Module: built.module, ModuleArgs: "socket='" + filepath.Join(third, "p11.sock") + "'",
			Slots: map[string]appliance.Slot{"staff": {TokenLabel: "yinjian-staff", PINFile: pinFile(t, "00000000")}},
		}}
	})
	m = serve(t, dir)
	m.trusted(t)
	his = m.client(t, "his")
	if l := m.machines(t)["b"]; l.State != "draining" || !l.Added {
		t.Errorf("after a restart: %+v", l)
	}
	if l := m.machines(t)["away"]; l.State == "up" || l.Reason == "" || l.Added {
		t.Errorf("a machine that is away: %+v", l)
	}
	// A key is not destroyed while a machine may hold a copy that nobody has seen.
	mustRun(t, "signer", "stop", "D2", "--dir", dir, "--reason", "离职")
	var keys struct {
		Keys []struct{ Label, Owner string }
	}
	if err := json.Unmarshal([]byte(mustRun(t, "hsm", "keys", "--dir", dir, "-o", "json").stdout), &keys); err != nil {
		t.Fatal(err)
	}
	gone := ""
	for _, k := range keys.Keys {
		if k.Owner == "signer:D2" {
			gone = k.Label
		}
	}
	m.keysByPages(t)
	refused(t, 1, []string{"hsm_unavailable", "away"}, because("destroy", gone)...)
	// It comes, and refuses its PIN: the next start will not present it again.
	startCopy(t, third, filepath.Join(dir, "secrets", "softtoken.passphrase"))
	state("away", "needs_operator")
	eventually(t, time.Minute, "the refusal is kept", func() bool {
		_, err := os.Stat(filepath.Join(dir, "run", "pin-refused-staff.away.json"))
		return err == nil
	})
	mustRun(t, because("remove", "away")...)
	m.changeOf(t, "/admin/v1/machines/:name/remove", "hsm.machine/outcome", "away", `"name":"away"`, "")
	mustRun(t, because("destroy", gone)...)
	m.changeOf(t, "/admin/v1/keys/destroy", "key.destruction/outcome", "signer:D2", `"state":"present"`, `"reason":"扩容"`)
	mustRun(t, because("resume", "b")...)
	m.changeOf(t, "/admin/v1/machines/:name/resume", "hsm.machine/outcome", "b", `{"draining":true}`, `{"draining":false}`)
	// The first machine rests over a restart, too.
	mustRun(t, because("drain", "main")...)
	m.stop(t)
	m = serve(t, dir)
	m.trusted(t)
	his = m.client(t, "his")
	if l := m.machines(t)["main"]; l.State != "draining" {
		t.Errorf("main after a restart: %+v", l)
	}
	if _, err := his.Sign(t.Context(), "main-rests", asserted("D1", "main-rests")); err != nil {
		t.Error(err)
	}
	mustRun(t, because("resume", "main")...)
	stopped.Store(false)
	sign(his, "second")
	works("b")
	stopped.Store(true)
	wg.Wait()
	// An application over its quota is told so, and for how long.
	mustRun(t, "app", "limit", "his", "--dir", dir, "--hsm-rate", "1", "--reason", "试")
	plain := m.clientConfig(t, "his")
	plain.Retry = client.Retry{Attempts: 1}
	once, err := client.New(plain)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(once.Close)
	for n := 0; err == nil && n < 100; n++ {
		key := fmt.Sprintf("quota-%d", n)
		_, err = once.Sign(t.Context(), key, asserted("D1", key))
	}
	wantCode(t, err, "rate_limited")
	mustRun(t, because("remove", "b")...)
	if l := m.machines(t); len(l) != 1 {
		t.Errorf("after its removal: %+v", l)
	}
	if kept, err := os.ReadFile(filepath.Join(dir, "machines.toml")); err != nil || !strings.Contains(string(kept), "away") || strings.Contains(string(kept), "'b'") {
		t.Errorf("machines.toml: %s, %v", kept, err)
	}
	// An act that a kill interrupts has its outcome at the next start.
	if err := second.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	adding := exec.Command(built.binary, because("add", file)...)
	if err := adding.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, time.Minute, "the intent is there", func() bool { return journalled(t, dir, "hsm.machine/intent", "b") == 5 })
	m.kill(t)
	_ = adding.Wait() // it lost its appliance
	m = serve(t, dir)
	m.trusted(t)
	for kind, want := range map[string]int{"hsm.machine/intent": 5, "hsm.machine/outcome": 5} {
		if n := journalled(t, dir, kind, "b"); n != want {
			t.Errorf("%d entries %s, want %d", n, kind, want)
		}
	}
	m.mustBeClean(t)
	o := mustRun(t, "audit", "verify", "--dir", dir, "-o", "json")
	var report struct {
		Uses struct {
			Keys []struct {
				Slot, Key       string
				Uses, Health    int
				Open, Discarded int
			}
			Named []struct{ Reason string }
		}
	}
	if err := json.Unmarshal([]byte(o.stdout), &report); err != nil {
		t.Fatal(err)
	}
	slots := map[string]int{}
	for _, k := range report.Uses.Keys {
		slots[k.Slot] += k.Uses
		if strings.HasPrefix(k.Key, "health/") && k.Health != k.Uses {
			t.Errorf("key %+v", k)
		}
	}
	for _, slot := range []string{"staff", "staff.b", "tsa", "tsa.b"} {
		if slots[slot] < 20 {
			t.Errorf("slot %s has %d uses", slot, slots[slot])
		}
	}
	for _, n := range report.Uses.Named {
		if !strings.Contains(n.Reason, "process ended") {
			t.Errorf("a signature without an account: %+v", n)
		}
	}
	t.Logf("%d signatures; uses by slot %v", signed.Load(), slots)
	if os.Getenv("YINJIAN_LONG") == "" {
		return
	}
	// A machine that hangs (b still does) costs a start one wait, not one for each of its slots: see readyWithin.
	m.stop(t)
	if f, err := os.OpenFile(filepath.Join(dir, "machines.toml"), os.O_APPEND|os.O_WRONLY, 0); err != nil {
		t.Fatal(err)
	} else if _, err := f.WriteString("[[machines]]\nname = 'b'\nstate = ''\n[machines.machine]\n" + strings.ReplaceAll(text, "[slots.", "[machines.machine.slots.")); err != nil || f.Close() != nil {
		t.Fatal(err)
	}
	m = serve(t, dir)
	m.trusted(t)
	if _, err := m.client(t, "his").Sign(t.Context(), "b-hangs", asserted("D1", "b-hangs")); err != nil {
		t.Error(err)
	}
}

// journalled counts the entries of a kind about an object.
func journalled(t *testing.T, dir, kind, object string) (n int) {
	t.Helper()
	store, err := sqlite.OpenJournal(t.Context(), sqlite.JournalConfig{Dir: filepath.Join(dir, "journal"), ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	size, _, err := store.Head(t.Context())
	if err == nil {
		err = audit.Scan(t.Context(), store, 0, size, func(r audit.Record) error {
			if r.Entry.Kind == kind && r.Entry.Object == object {
				n++
			}
			return nil
		})
	}
	if err != nil {
		t.Fatal(err)
	}
	return n
}

package main_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"yinjian/api"
	"yinjian/appliance"
)

// A standing is what the tests read of the state while there is no appliance.
type standing struct {
	State   string
	Step    string
	Next    string
	Failure *struct {
		Code, Reason, Next string
		Attempts           int
		RetryInS           int `json:"retry_in_s"`
	}
	Unlock *struct {
		Enrolled  bool
		Threshold int
		Holders   []string
		Given     []string
		Waits     map[string]int
		TPM       *struct {
			Sealed bool
			Why    string
		}
	}
	Warnings []string
}

// standing asks the command line; it answers nothing while nobody listens.
func (m *machine) standing(t *testing.T) (s standing) {
	t.Helper()
	if o := yinjian(t, "status", "--dir", m.dir, "-o", "json"); o.code == 0 {
		if err := json.Unmarshal([]byte(o.stdout), &s); err != nil {
			t.Fatalf("%v: %v", err, o)
		}
	}
	return s
}

// stands waits for a state.
func (m *machine) stands(t *testing.T, state api.State) (s standing) {
	t.Helper()
	eventually(t, readyWithin, "state "+string(state), func() bool {
		select {
		case <-m.ended:
			t.Fatalf("serve ended: %v", m.outcome())
		default:
		}
		s = m.standing(t)
		return s.State == string(state)
	})
	return s
}

// says runs a subcommand with secrets on file descriptor 3, a line each.
func says(t *testing.T, secrets []string, args ...string) outcome {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	fmt.Fprintln(w, strings.Join(secrets, "\n"))
	w.Close()
	cmd := exec.Command(built.init, append(args, "--passphrase-fd", "3")...)
	cmd.ExtraFiles = []*os.File{r}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	_ = cmd.Run() // its state says how it ended
	return outcome{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// holdsTo tries every line of the table of routes in the state that the appliance is in: what the table allows there answers
// in some way of its own, and nothing else does.
func (m *machine) holdsTo(t *testing.T, state api.State) {
	t.Helper()
	c := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, Dial: func(string, string) (net.Conn, error) {
		return net.Dial("unix", appliance.AdminSocket(m.dir))
	}}}
	for _, l := range api.Matrix() {
		if l.Answers(state) && state == api.Operational {
			continue // other tests use them
		}
		path := strings.NewReplacer(":id", "x", ":name", "x", ":serial", "1").Replace(l.Pattern)
		req, err := http.NewRequestWithContext(t.Context(), l.Method, "http://local"+path, strings.NewReader("{}"))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/json")
		if l.Method == "GET" {
			req.Body, req.ContentLength = nil, 0
		}
		resp, err := c.Do(req)
		if err != nil {
			t.Fatalf("%s %s: %v", l.Method, path, err)
		}
		var p struct{ Code, Detail, Next string }
		_ = json.NewDecoder(resp.Body).Decode(&p) // an answer need not be a problem
		resp.Body.Close()
		refused := p.Code == "wrong_state" || p.Code == "not_ready"
		if refused == l.Answers(state) && !(path == "/health/ready" && resp.StatusCode == 503) {
			t.Errorf("in state %s: %s %s = %d %+v; the table says %t", state, l.Method, path, resp.StatusCode, p, l.Answers(state))
		}
		if refused && (p.Detail == "" || p.Next == "") {
			t.Errorf("in state %s: %s %s: no reason or next step: %+v", state, l.Method, path, p)
		}
	}
}

// A service manager that waits for the word (Type=notify) hears it when the local socket answers.
func TestServiceManagerIsTold(t *testing.T) {
	t.Parallel()
	dir, socket := tempDir(t), filepath.Join(tempDir(t), "notify")
	ln, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	cmd := exec.Command(built.binary, "serve", "--dir", dir)
	cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+socket)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { _ = cmd.Wait(); close(ended) }()
	t.Cleanup(func() { _ = cmd.Process.Kill(); <-ended })
	go func() { // nothing is to be heard of a process that ended
		<-ended
		ln.Close()
	}()
	word := make([]byte, 100)
	n, err := ln.Read(word)
	if err != nil || string(word[:n]) != "READY=1" {
		t.Fatalf("%q, %v", word[:n], err)
	}
	if o := mustRun(t, "status", "--dir", dir, "-o", "json"); !strings.Contains(o.stdout, "uninitialised") {
		t.Errorf("%v", o)
	}
}

// From an empty folder to an appliance that people unlock after each start, whose PINs are in no file.
func TestFromEmptyFolderToUnlocked(t *testing.T) {
	t.Parallel()
	server := startTimeServer(t)
	dir := filepath.Join(tempDir(t), "a")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	// 1. Nothing there: the process stays, says so, and serves what the table allows.
	m := launch(t, dir)
	m.stands(t, api.Uninitialised)
	m.holdsTo(t, api.Uninitialised)
	refused(t, 1, []string{"尚未初始化", "yinjian init"}, "app", "list", "--dir", dir)

	// 2. Provisioned from a file, once; what is wrong is told with its field, and leaves nothing.
	file := filepath.Join(tempDir(t), "answers.toml")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	good := fmt.Sprintf("node = 'benbu-7'\ncampus = '滨海'\ntime_sources = ['%s']\npin_source = 'unlock'\n[unlock]\nthreshold = 2\nholders = ['张三', '李四', '王五']\n", server.address)
	words := []string{"sand-and-water-1", "horse-battery-2", "correct-staple-3"}
	for what, c := range map[string]struct {
		text    string
		secrets []string
		words   []string
	}{
		"unknown key":     {good + "colour = 'red'\n", words, []string{"colour", "未知的项"}},
		"two faults":      {strings.NewReplacer("benbu-7", "Bad Node", "campus = '滨海'", "campus = ''").Replace(good), words, []string{"node: node", "campus: campus"}},
		"wrong type":      {strings.Replace(good, "'benbu-7'", "7", 1), words, []string{"node"}},
		"no source":       {strings.Replace(good, "'"+server.address+"'", "", 1), words, []string{"time_sources: time.sources"}},
		"all must unlock": {strings.Replace(good, "threshold = 2", "threshold = 3", 1), words, []string{"unlock:", "至少多一人"}},
		"short":           {good, []string{words[0], "short", words[2]}, []string{"李四", "口令须为"}},
		"the same":        {good, []string{words[0], words[0], words[2]}, []string{"李四", "相同"}},
	} {
		write(c.text)
		o := says(t, c.secrets, "provision", "--dir", dir, "--answers", file)
		for _, w := range c.words {
			if o.code == 0 || !strings.Contains(o.stderr, w) {
				t.Errorf("%s: want a refusal with %q: %v", what, w, o)
			}
		}
		if what == "short" || what == "the same" { // no fault of the answers'
			continue
		}
		if o := says(t, nil, "init", "--check", "--dir", dir, "--answers", file); o.code != 2 || !strings.Contains(o.stderr, c.words[0]) {
			t.Errorf("%s: looked at alone: %v", what, o)
		}
		if !appliance.Blank(dir) {
			t.Fatalf("%s: a refusal left something in the folder", what)
		}
	}
	write(good)
	if o := says(t, nil, "init", "--check", "--dir", dir, "--answers", file); o.code != 0 || !appliance.Blank(dir) {
		t.Errorf("good answers, looked at alone: %v", o)
	}
	if o := says(t, words, "provision", "--dir", dir, "--answers", file); o.code != 0 {
		t.Fatalf("provision: %v", o)
	}
	if o := says(t, words, "init", "--dir", dir, "--answers", file); o.code != 2 || !strings.Contains(o.stderr, "不是空目录") {
		t.Errorf("a second time: %v", o)
	}

	// 3. Locked: the table, and what a wrong passphrase costs, over a kill too.
	if s := m.stands(t, api.Locked); s.Unlock == nil || s.Unlock.Threshold != 2 || len(s.Unlock.Holders) != 3 || len(s.Unlock.Given) != 0 {
		t.Errorf("%+v", s.Unlock)
	}
	m.holdsTo(t, api.Locked)
	refused(t, 1, []string{"已锁定", "yinjian unlock"}, "signer", "list", "--dir", dir)
	unlock := func(holder, secret string) outcome {
		t.Helper()
		return says(t, []string{secret}, "unlock", "--dir", dir, "--holder", holder)
	}
	if o := unlock("赵六", words[0]); o.code != 1 || !strings.Contains(o.stderr, "不是持有人") {
		t.Errorf("a stranger: %v", o)
	}
	for i := range 5 {
		if i == 3 {
			m.kill(t)
			m = launch(t, dir)
			m.stands(t, api.Locked)
		}
		if o := unlock("王五", words[0]); o.code != 1 || !strings.Contains(o.stderr, "pin_wrong") || strings.Contains(o.stderr+o.stdout, words[0]) {
			t.Errorf("a wrong passphrase: %v", o)
		}
	}
	if o := unlock("王五", words[2]); o.code != 1 || !strings.Contains(o.stderr, "连续输错 5 次") {
		t.Errorf("the right one after five wrong ones, two of them after a kill: %v", o)
	}
	if s := m.standing(t); s.Unlock == nil || s.Unlock.Waits["王五"] == 0 || s.Unlock.Waits["张三"] != 0 {
		t.Errorf("%+v", s.Unlock)
	}
	if o := unlock("张三", words[0]); o.code != 0 || !strings.Contains(o.stdout, "还需 1 位") {
		t.Errorf("the first of two: %v", o)
	}
	if o := unlock("张三", words[0]); o.code != 1 || !strings.Contains(o.stderr, "已给出") {
		t.Errorf("the same one twice: %v", o)
	}
	// 4. What was given is in no file: a start anew wants both again.
	m.kill(t)
	m = launch(t, dir)
	if s := m.stands(t, api.Locked); len(s.Unlock.Given) != 0 {
		t.Errorf("given, after a kill: %v", s.Unlock.Given)
	}
	both := func(secrets ...string) {
		t.Helper()
		for i, holder := range []string{"张三", "李四"} {
			if o := unlock(holder, secrets[i]); o.code != 0 {
				t.Fatalf("unlock %s: %v", holder, o)
			}
		}
		m.await(t)
		m.trusted(t)
	}
	both(words[0], words[1])
	if s := m.state(t); s.State != string(api.Operational) {
		t.Errorf("state %q", s.State)
	}
	m.holdsTo(t, api.Operational)

	// 5. It signs; a slot's worker that dies gets its PIN again without anybody.
	his := m.register(t, "his", "--consent", "app-asserted")
	m.enrol(t, "D1", "")
	if _, err := his.Sign(t.Context(), "one", asserted("D1", "one")); err != nil {
		t.Fatal(err)
	}
	pid := m.state(t).HSM["staff"].PID
	if err := exec.Command("kill", "-9", fmt.Sprint(pid)).Run(); err != nil {
		t.Fatal(err)
	}
	eventually(t, readyWithin, "another worker signs", func() bool {
		_, err := his.Sign(t.Context(), "two", asserted("D1", "two"))
		return err == nil
	})

	// 6. The PINs are in no file of the folder.
	out := filepath.Join(tempDir(t), "pins")
	if o := says(t, words[:2], "unlock", "open", "--dir", dir, "--holder", "张三", "--holder", "李四", "--out", out); o.code != 0 {
		t.Fatalf("unlock open: %v", o)
	}
	pins := glob(t, filepath.Join(out, "main-*.pin"))
	if len(pins) != 5 || len(glob(t, filepath.Join(out, "main-*.so-pin"))) != 5 {
		t.Errorf("PINs: %v", pins)
	}
	seen := 0
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return nil // it came and went
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return nil
		}
		seen++
		for _, name := range pins {
			if pin := bytes.TrimSpace([]byte(readFile(t, name))); bytes.Contains(b, pin) {
				t.Errorf("%s holds %s", path, filepath.Base(name))
			}
		}
		return nil
	})
	if err != nil || seen < 10 {
		t.Errorf("%d files, %v", seen, err)
	}

	// 7. Other holders; the old passphrases open nothing any more. The journal says who unlocked what.
	fresh := []string{"new-one-of-zhang", "new-one-of-li", "new-one-of-sun"}
	rekey := []string{"unlock", "rekey", "--dir", dir, "--with", "张三", "--with", "李四", "--holder", "张三", "--holder", "李四", "--holder", "孙七"}
	if o := says(t, append([]string{words[0], words[2]}, fresh...), rekey...); o.code != 1 || !strings.Contains(o.stderr, "李四 的口令不正确") {
		t.Errorf("with a wrong one: %v", o)
	}
	if o := says(t, append(words[:2:2], fresh...), rekey...); o.code != 0 {
		t.Fatalf("rekey: %v", o)
	}
	m.stop(t)
	m = launch(t, dir)
	m.stands(t, api.Locked)
	if o := unlock("张三", words[0]); o.code != 1 || !strings.Contains(o.stderr, "pin_wrong") {
		t.Errorf("an old passphrase: %v", o)
	}
	both(fresh[0], fresh[1])
	m.mustBeClean(t)
	m.stop(t)
	told := entries(t, dir, "appliance.unlocked")
	if len(told) != 2 {
		t.Fatalf("%d entries about unlocking, want 2", len(told))
	}
	field := func(i int, name string) string {
		for _, f := range told[i].Fields {
			if f.Name == name {
				return fmt.Sprint(f.Value)
			}
		}
		return ""
	}
	if field(0, "set") == field(1, "set") || field(0, "wrong") == field(1, "wrong") {
		t.Errorf("the entries do not tell the two apart: %v", told)
	}
	if !strings.HasPrefix(told[0].Actor, "local uid=") {
		t.Errorf("actor %q", told[0].Actor)
	}
}

// The PINs of an appliance that has them in files go under several people's passphrases.
func TestEnrolUnlock(t *testing.T) {
	t.Parallel()
	dir := initAppliance(t, startTimeServer(t))
	enrol := []string{"unlock", "enrol", "--dir", dir, "--holder", "张三", "--holder", "李四", "--holder", "王五"}
	words := []string{"sand-and-water-1", "horse-battery-2", "correct-staple-3"}
	if o := says(t, words, enrol...); o.code != 1 || !strings.Contains(o.stderr, "pin_source") {
		t.Errorf("before the configuration says so: %v", o)
	}
	configure(t, dir, func(c *appliance.Config) { c.HSM.PINSource = appliance.PINFromUnlock })
	m := launch(t, dir)
	if s := m.stands(t, api.Locked); s.Unlock == nil || s.Unlock.Enrolled {
		t.Errorf("without locked PINs: %+v", s.Unlock)
	}
	if o := says(t, words[:1], "unlock", "--dir", dir, "--holder", "张三"); o.code != 1 || !strings.Contains(o.stderr, "enrol") {
		t.Errorf("nothing to unlock: %v", o)
	}
	if o := says(t, words, enrol...); o.code != 0 {
		t.Fatalf("enrol: %v", o)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "secrets", "*pin")); len(left) != 0 {
		t.Errorf("PIN files are left: %v", left)
	}
	if o := says(t, words, enrol...); o.code != 1 || !strings.Contains(o.stderr, "rekey") {
		t.Errorf("a second time: %v", o)
	}
	for i, holder := range []string{"李四", "王五"} {
		if o := says(t, words[i+1:i+2], "unlock", "--dir", dir, "--holder", holder); o.code != 0 {
			t.Fatalf("unlock: %v", o)
		}
	}
	m.await(t)
	m.stop(t)
}

// A start that goes wrong leaves the process up, in a state that says why and what to do; what may pass is tried again, and
// what may not waits for a person.
func TestFailedStarts(t *testing.T) {
	t.Parallel()
	server := startTimeServer(t)
	born := func(t *testing.T) string {
		t.Helper()
		dir := initAppliance(t, server, "--listen", freePort(t))
		m := serve(t, dir)
		m.trusted(t)
		m.stop(t)
		return dir
	}
	swap := func(t *testing.T, from, to string) {
		t.Helper()
		if err := os.Rename(from, to); err != nil {
			t.Fatal(err)
		}
	}
	wrong := func(t *testing.T, m *machine, code string, passing bool) standing {
		t.Helper()
		s := m.stands(t, api.Failed)
		if f := s.Failure; f == nil || f.Code != code || f.Reason == "" || f.Next == "" || (f.RetryInS > 0) != passing {
			t.Errorf("failure %+v, want %s, passing %t", s.Failure, code, passing)
		}
		if o := yinjian(t, "app", "list", "--dir", m.dir); o.code != 1 || !strings.Contains(o.stderr, "启动失败") {
			t.Errorf("app list: %v", o)
		}
		return s
	}
	t.Run("a refused PIN, then a journal that is gone", func(t *testing.T) {
		t.Parallel()
		dir := born(t)
		pin := filepath.Join(dir, "secrets", "log.pin")
		swap(t, pin, pin+".right")
		if err := os.WriteFile(pin, []byte("not-the-pin\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		m := launch(t, dir)
		wrong(t, m, "hsm_needs_operator", false)
		m.holdsTo(t, api.Failed) // which tries the start again, but does not present the PIN
		eventually(t, readyWithin, "tried again", func() bool { return strings.Count(readFile(t, m.log), "the start failed") == 2 })
		if n := strings.Count(readFile(t, m.log), `msg="wrong PIN"`); n != 1 {
			t.Errorf("the wrong PIN was presented %d times", n)
		}
		swap(t, pin+".right", pin)
		journal := filepath.Join(dir, "journal")
		swap(t, journal, journal+".kept")
		wrong(t, m, "hsm_needs_operator", false)
		mustRun(t, "start", "--dir", dir)
		eventually(t, readyWithin, "the journal is missed", func() bool { s := m.standing(t); return s.Failure != nil && s.Failure.Code == "journal_refused" })
		wrong(t, m, "journal_refused", false)
		if err := os.RemoveAll(journal); err != nil {
			t.Fatal(err)
		}
		swap(t, journal+".kept", journal)
		mustRun(t, "start", "--dir", dir)
		m.await(t)
		m.mustBeClean(t)
		m.stop(t)
	})
	t.Run("an address that is taken", func(t *testing.T) {
		t.Parallel()
		dir := born(t)
		taken, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		configure(t, dir, func(c *appliance.Config) { c.Listen.API = taken.Addr().String() })
		m := launch(t, dir)
		wrong(t, m, "start_failed", true)
		taken.Close()
		m.await(t) // by itself
		m.mustBeClean(t)
		m.stop(t)
	})
	t.Run("a file that cannot be written, when ports are open", func(t *testing.T) {
		t.Parallel()
		dir := born(t)
		file := filepath.Join(dir, "log.pem")
		swap(t, file, file+".kept")
		if err := os.MkdirAll(filepath.Join(file, "full"), 0o700); err != nil { // a folder that has something in it, in its place
			t.Fatal(err)
		}
		m := launch(t, dir)
		wrong(t, m, "start_failed", true)
		cfg, err := appliance.LoadConfig(dir)
		if err != nil {
			t.Fatal(err)
		}
		if conn, err := net.Dial("tcp", cfg.Listen.API); err == nil {
			conn.Close()
			t.Error("the port of a start that was undone is open")
		}
		if err := os.RemoveAll(file); err != nil {
			t.Fatal(err)
		}
		m.await(t) // by itself
		m.stop(t)
	})
	t.Run("a cipher machine that is away", func(t *testing.T) {
		t.Parallel()
		dir := born(t)
		store := filepath.Join(dir, "softtoken")
		kept := filepath.Join(tempDir(t), "kept")
		swap(t, store, kept)
		if err := os.WriteFile(store, nil, 0o600); err != nil { // a file where its folder was
			t.Fatal(err)
		}
		m := launch(t, dir)
		wrong(t, m, "hsm_unavailable", true)
		if err := os.Remove(store); err != nil {
			t.Fatal(err)
		}
		swap(t, kept, store)
		m.await(t)
		m.stop(t)
	})
	t.Run("a full volume", func(t *testing.T) {
		t.Parallel()
		dir := filepath.Join(tempDir(t), "a")
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		tmpfs(t, dir, "size=48m,nr_inodes=2k")
		mustRun(t, "init", "--dir", dir, "--time-source", server.address)
		configure(t, dir, func(c *appliance.Config) {
			c.Time.Poll, c.Policy.ReserveBytes, c.Policy.SegmentEntries = appliance.Duration(time.Second), 3<<20, 400
		})
		free := fill(t, dir, 200<<10)
		m := launch(t, dir)
		wrong(t, m, "disk_reserve", true)
		free()
		m.await(t)
		m.stop(t)
	})
	t.Run("told to stop, and a configuration that is wrong by then", func(t *testing.T) {
		t.Parallel()
		dir := initAppliance(t, server)
		pin := filepath.Join(dir, "secrets", "log.pin")
		if err := os.WriteFile(pin, []byte("not-the-pin\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		m := launch(t, dir)
		m.stands(t, api.Failed)
		m.stop(t)
		m = launch(t, dir)
		m.stands(t, api.Failed)
		name := filepath.Join(dir, "config.toml")
		if err := os.WriteFile(name, []byte(readFile(t, name)+"\n[colours]\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		mustRun(t, "start", "--dir", dir)
		if o := m.outcome(); o.code != 1 || !strings.Contains(o.stderr, "colours") {
			t.Errorf("%v", o)
		}
	})
	t.Run("starting", func(t *testing.T) {
		t.Parallel()
		silent := startTimeServer(t)
		silent.silent.Store(true)
		m := launch(t, initAppliance(t, silent))
		eventually(t, readyWithin, "it says what it waits for", func() bool { return strings.Contains(m.standing(t).Step, "等待时间可信") })
		m.holdsTo(t, api.Starting)
		m.stop(t)
	})
}

// Whoever stops an appliance whose cipher machine hangs while it starts is told of no failure.
func TestStopDuringStart(t *testing.T) {
	t.Parallel()
	dir := initAppliance(t, startTimeServer(t))
	m := launch(t, dir)
	var soft process
	eventually(t, 30*time.Second, "the software cipher machine is there", func() bool {
		for _, p := range descendants(t, m.cmd.Process.Pid) {
			if strings.Contains(p.args, "softtoken --dir") {
				soft = p
			}
		}
		return soft.pid != 0
	})
	soft.signal(t, syscall.SIGSTOP)
	m.stop(t)
}

// Whoever still types passphrases when another has made the appliance leaves it as it is.
func TestInitOvertaken(t *testing.T) {
	t.Parallel()
	server := startTimeServer(t)
	dir, file := filepath.Join(tempDir(t), "a"), filepath.Join(tempDir(t), "answers.toml")
	text := fmt.Sprintf("time_sources = ['%s']\npin_source = 'unlock'\n[unlock]\nthreshold = 2\nholders = ['张三', '李四', '王五']\n", server.address)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	slow := exec.Command(built.init, "init", "--dir", dir, "--answers", file, "--passphrase-fd", "3")
	slow.ExtraFiles = []*os.File{r}
	said := new(bytes.Buffer)
	slow.Stderr = said
	if err := slow.Start(); err != nil {
		t.Fatal(err)
	}
	fmt.Fprintln(w, "sand-and-water-1")
	eventually(t, readyWithin, "the first passphrase is read", func() bool {
		left, err := unix.IoctlGetInt(int(r.Fd()), unix.TIOCINQ)
		return err == nil && left == 0
	})
	mustRun(t, "init", "--dir", dir, "--time-source", server.address)
	files := func() map[string]string {
		out := map[string]string{}
		for _, name := range append(glob(t, filepath.Join(dir, "secrets", "*")), filepath.Join(dir, "config.toml")) {
			out[name] = readFile(t, name)
		}
		return out
	}
	before := files()
	fmt.Fprintln(w, "horse-battery-2\ncorrect-staple-3")
	w.Close()
	r.Close()
	if err := slow.Wait(); err == nil || !strings.Contains(said.String(), "不是空目录") {
		t.Errorf("the second init: %v %s", err, said)
	}
	if after := files(); !reflect.DeepEqual(before, after) {
		t.Error("the second init changed the appliance that was there")
	}
}

// The dialogue: each answer is looked at at once, and nothing is written before the summary was confirmed.
func TestInitAsks(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(tempDir(t), "a")
	lines := []string{
		"Bad Node", "benbu-9", // node
		"",                       // campus: its default
		"nowhere", "127.0.0.1:0", // listen
		"也许", "否", // simulated BeiDou
		"", "nohost", "127.0.0.1:1, 127.0.0.1:2", // time sources
		"/nonexistent.so", "", // module
		"paper", "file", // PINs
		"zhang", "xitong:张三", "anquan:李四", "-", // administrators: taken back
	}
	ask := func(last string) outcome {
		t.Helper()
		cmd := exec.Command(built.init, "init", "--dir", dir, "--ask")
		cmd.Stdin = strings.NewReader(strings.Join(lines, "\n") + "\n" + last)
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		_ = cmd.Run() // its state says how it ended
		return outcome{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
	}
	for last, words := range map[string]string{"": "对话中断", "\n": "未确认", "否\n": "未确认", "或许\nn\n": "未确认"} {
		o := ask(last)
		if o.code != 1 || !strings.Contains(o.stderr, words) {
			t.Errorf("%q: %v", last, o)
		}
		if _, err := os.Stat(dir); err == nil {
			t.Fatalf("%q: the folder was made", last)
		}
	}
	o := ask("是\n")
	if o.code != 0 {
		t.Fatalf("%v", o)
	}
	for _, w := range []string{"✗ node:", "✗ listen.api:", "✗ 请答", "✗ time.sources", "/nonexistent.so", "✗ hsm.pin_source:", "将新建", "127.0.0.1:1 127.0.0.1:2"} {
		if !strings.Contains(o.stdout, w) {
			t.Errorf("the dialogue does not say %q:\n%s", w, o.stdout)
		}
	}
	c, err := appliance.LoadConfig(dir)
	if err != nil || c.Node != "benbu-9" || c.Campus != "本部" || len(c.Time.Sources) != 2 {
		t.Errorf("%+v, %v", c, err)
	}
	if c.Admin.Local == appliance.LocalLogin || strings.Contains(o.stdout, "一次性口令") {
		t.Errorf("administrators that were taken back: %s", o.stdout)
	}
	refused(t, 2, []string{"不是空目录"}, "init", "--dir", dir, "--ask")

	// On a terminal it asks by itself.
	need(t, "script")
	dir = filepath.Join(tempDir(t), "b")
	cmd := exec.Command("script", "-qec", built.init+" init --dir "+dir, "/dev/null")
	cmd.Stdin = strings.NewReader(strings.Join(lines[:len(lines)-2], "\n") + "\n\nxitong:李四\nanquan:李四\nshenji:王五（内科）\nshenji:王五\n是\n")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	for _, w := range []string{"✗ 三员须一并给出", "✗ 登录名 xitong 重复", "不得含括号", "system  xitong  张三  ", "security  anquan  李四  ", "audit  shenji  王五  "} {
		if !bytes.Contains(out, []byte(w)) {
			t.Errorf("the dialogue does not say %q:\n%s", w, out)
		}
	}
	if c, err := appliance.LoadConfig(dir); err != nil || c.Admin.Local != appliance.LocalLogin {
		t.Errorf("%+v, %v", c, err)
	}
}

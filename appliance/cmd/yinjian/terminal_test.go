package main_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"yinjian/api"
)

// A terminal is a command at a terminal of its own.
type terminal struct {
	cmd            *exec.Cmd
	master, screen *os.File

	mu   sync.Mutex
	seen bytes.Buffer // guarded by mu: what the screen shows
	read int          // of what was waited for
}

// sitDown starts a command of ours at a new terminal.
func sitDown(t *testing.T, env []string, args ...string) *terminal {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { master.Close() })
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	screen, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { screen.Close() })
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	t.Cleanup(cancel)
	k := &terminal{master: master, screen: screen, cmd: exec.CommandContext(ctx, built.init, args...)}
	k.cmd.Env = append(os.Environ(), env...)
	k.cmd.Stdin, k.cmd.Stdout, k.cmd.Stderr = screen, screen, screen
	k.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := k.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { // until the terminal is closed
		b := make([]byte, 4096)
		for {
			n, err := master.Read(b)
			k.mu.Lock()
			k.seen.Write(b[:n])
			k.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	return k
}

// answer waits for a prompt and types what is to be said to it.
func (k *terminal) answer(t *testing.T, prompt, text string) {
	t.Helper()
	eventually(t, time.Minute, "prompt "+prompt, func() bool {
		k.mu.Lock()
		defer k.mu.Unlock()
		i := strings.Index(k.seen.String()[k.read:], prompt)
		if i >= 0 {
			k.read += i + len(prompt)
		}
		return i >= 0
	})
	if strings.Contains(prompt, "口令") || strings.Contains(prompt, "再输一次") {
		if state, err := unix.IoctlGetTermios(int(k.screen.Fd()), unix.TCGETS); err != nil || state.Lflag&unix.ECHO != 0 {
			t.Errorf("asked for a secret, %q, and the terminal still shows what is typed: %v", prompt, err)
		}
	}
	if _, err := k.master.WriteString(text); err != nil {
		t.Fatal(err)
	}
}

// leaves waits for the end, and answers what the screen showed. The terminal shows again what is typed.
func (k *terminal) leaves(t *testing.T) outcome {
	t.Helper()
	_ = k.cmd.Wait() // its state says how it ended
	state, err := unix.IoctlGetTermios(int(k.screen.Fd()), unix.TCGETS)
	if err != nil || state.Lflag&unix.ECHO == 0 {
		t.Errorf("the terminal was left without echo: %v", err)
	}
	if _, err := k.screen.WriteString("[end]"); err != nil {
		t.Fatal(err)
	}
	var shown string
	eventually(t, time.Minute, "the screen's last words", func() bool {
		k.mu.Lock()
		defer k.mu.Unlock()
		shown = k.seen.String()
		return strings.HasSuffix(shown, "[end]")
	})
	return outcome{stdout: shown, code: k.cmd.ProcessState.ExitCode()}
}

// Secrets are typed, twice where they are new, and no screen shows them; whoever leaves in the middle leaves the terminal as it
// was, and nothing behind.
func TestTypedSecrets(t *testing.T) {
	t.Parallel()
	server := startTimeServer(t)
	dir, file := filepath.Join(tempDir(t), "a"), filepath.Join(tempDir(t), "answers.toml")
	answers := fmt.Sprintf("time_sources = ['%s']\npin_source = 'unlock'\n[unlock]\nthreshold = 2\nholders = ['张三', '李四', '王五']\n", server.address)
	if err := os.WriteFile(file, []byte(answers), 0o600); err != nil {
		t.Fatal(err)
	}
	secrets := []string{"sand-and-water-1", "horse-battery-2", "correct-staple-3", "not-the-same-9", "Xt-guanli-2026", "Aq-guanli-2026", "Sj-guanli-2026", "Aq-gaiguo-2027", "short1"}
	hidden := func(o outcome) outcome {
		t.Helper()
		for _, s := range secrets {
			if strings.Contains(o.stdout, s) {
				t.Errorf("the screen shows %q:\n%s", s, o.stdout)
			}
		}
		return o
	}
	ended := func(k *terminal, code int, words string) {
		t.Helper()
		if o := hidden(k.leaves(t)); o.code != code || !strings.Contains(o.stdout, words) {
			t.Errorf("exit %d, want %d and %q:\n%s", o.code, code, words, o.stdout)
		}
	}
	const enter, interrupt = "\n", "\x03"

	// Interrupted, at a secret and in the dialogue.
	k := sitDown(t, nil, "init", "--dir", dir, "--answers", file)
	k.answer(t, "张三 的口令 (passphrase): ", "sand-and"+interrupt)
	ended(k, 1, "已中断")
	k = sitDown(t, nil, "init", "--dir", dir)
	k.answer(t, "[benbu-1]: ", "x"+interrupt)
	ended(k, 1, "已中断")
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Fatalf("something was made: %v", err)
	}
	// init: too short, two that differ, then right ones.
	k = sitDown(t, nil, "init", "--dir", dir, "--answers", file)
	k.answer(t, "张三 的口令 (passphrase): ", "short1"+enter)
	k.answer(t, "张三 的口令 (passphrase): ", secrets[0]+enter)
	k.answer(t, "再输一次 (again): ", secrets[3]+enter)
	k.answer(t, "两次不同", "")
	for i, name := range []string{"张三", "李四", "王五"} {
		k.answer(t, name+" 的口令 (passphrase): ", secrets[i]+enter)
		k.answer(t, "再输一次 (again): ", secrets[i]+enter)
	}
	ended(k, 0, "已新建")
	// unlock
	m := launch(t, dir)
	m.stands(t, api.Locked)
	for i, name := range []string{"张三", "李四"} {
		k = sitDown(t, nil, "unlock", "--dir", dir, "--holder", name)
		k.answer(t, name+" 的口令 (passphrase): ", secrets[i]+enter)
		ended(k, 0, []string{"还需 1 位", "已解锁"}[i])
	}
	m.await(t)
	m.trusted(t)
	// The three administrators, a login that is wrong and one that is right, and another password.
	k = sitDown(t, nil, "admin", "bootstrap", "--dir", dir, "--system", "zhang:张三", "--security", "li:李四", "--audit", "wang:王五")
	for i, id := range []string{"zhang", "li", "wang"} {
		k.answer(t, id+" 的新口令 (new password): ", secrets[4+i]+enter)
		k.answer(t, "再输一次 (again): ", secrets[4+i]+enter)
	}
	ended(k, 0, "wang")
	li := m.clerk(t, "li", "")
	login := func(password string, code int, words string) {
		t.Helper()
		k := sitDown(t, li.env, "login", "--dir", dir, "--name", "li")
		k.answer(t, "li 的口令 (password): ", password+enter)
		ended(k, code, words)
	}
	login(secrets[3], 1, "login_failed")
	login("", 1, "空的")
	login(secrets[5], 0, "security")
	k = sitDown(t, li.env, "admin", "password", "--dir", dir)
	k.answer(t, "现有口令 (present password): ", secrets[5]+enter)
	k.answer(t, "本人 的新口令 (new password): ", secrets[7]+enter)
	k.answer(t, "再输一次 (again): ", secrets[7]+enter)
	ended(k, 0, "li")
	login(secrets[7], 0, "security")
	// Without a terminal nothing is asked for.
	for _, args := range [][]string{{"login", "--name", "li"}, {"admin", "password"}, {"admin", "reset", "wang"}} {
		if o := li.run(t, args...); o.code != 2 || !strings.Contains(o.stderr, "标准输入不是终端") {
			t.Errorf("%v: %v", args, o)
		}
	}
	m.stop(t)
}

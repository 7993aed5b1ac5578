package main_test

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"yinjian/api/wire"
)

// cores are the core files in a folder.
func cores(t *testing.T, folder string) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(folder, "*core*"))
	if err != nil {
		t.Fatal(err)
	}
	return names
}

// corefolder is an empty folder and a script that runs a program there, with core files allowed and wanted. It skips the test
// where the kernel writes none to the folder of who crashes.
func corefolder(t *testing.T, program string) (folder, script string) {
	t.Helper()
	folder = tempDir(t)
	script = filepath.Join(tempDir(t), "run")
	text := fmt.Sprintf("#!/bin/sh\nulimit -c unlimited\ncd '%s'\nGOTRACEBACK=crash exec '%s' \"$@\"\n", folder, program)
	if err := os.WriteFile(script, []byte(text), 0o700); err != nil {
		t.Fatal(err)
	}
	_ = exec.Command("sh", "-c", fmt.Sprintf("ulimit -c unlimited; cd '%s' && kill -ABRT $$", folder)).Run() // it is killed
	if len(cores(t, folder)) == 0 {
		t.Skip("the kernel writes no core file here (kernel.core_pattern, ulimit -c): nothing can be shown")
	}
	for _, name := range cores(t, folder) {
		if err := os.Remove(name); err != nil {
			t.Fatal(err)
		}
	}
	return folder, script
}

// What crashes with secrets in its memory leaves none of them: no core file, and none in what it says at its end. So it is with
// the appliance and its helpers, and with a command that somebody types a passphrase to.
func TestCrashesLeaveNoSecrets(t *testing.T) {
	t.Parallel()
	folder, script := corefolder(t, built.binary)
	dir := initAppliance(t, startTimeServer(t))
	m := launchBinary(t, script, dir)
	m.await(t)
	m.trusted(t)
	his := m.register(t, "his", "--consent", "app-asserted", "--consent", "signer-pin")
	const pin, wrong = "4829135706", "9351706284"
	m.enrol(t, "D1", pin)
	for _, p := range []string{wrong, pin} {
		_, err := his.Authorize(t.Context(), &wire.AuthorizationRequest{Signer: "D1", PIN: p, Count: 1, Seconds: 60})
		if (err != nil) != (p == wrong) {
			t.Fatal(err)
		}
		if err != nil && strings.Contains(err.Error(), p) {
			t.Errorf("the refusal tells the PIN: %v", err)
		}
	}
	secrets := secretsOf(t, dir)
	secrets["a signer's PIN"], secrets["a wrong one"] = pin, wrong
	bundle := filepath.Join(tempDir(t), "diag.tar.gz")
	mustRun(t, "diag", "--dir", dir, "--out", bundle)
	unpacked := command(t, nil, "tar", "-xzOf", bundle)
	said := map[string]string{"the diagnosis": unpacked.stdout}
	if len(unpacked.stdout) < 1000 {
		t.Errorf("of the diagnosis there are %d bytes", len(unpacked.stdout))
	}
	processes := append(descendants(t, m.cmd.Process.Pid), process{pid: m.cmd.Process.Pid})
	if len(processes) < 3 {
		t.Errorf("only %d processes", len(processes))
	}
	for _, p := range processes { // the helpers first
		_ = syscall.Kill(p.pid, syscall.SIGABRT) // one that its parent has replaced is gone
	}
	select {
	case <-m.ended:
	case <-time.After(patience):
		t.Fatal("it does not crash")
	}
	said["the log"] = readFile(t, m.log)
	if !strings.Contains(said["the log"], "SIGABRT") {
		t.Error("it did not crash")
	}

	// A command that waits for the rest of what somebody types.
	answers := filepath.Join(tempDir(t), "answers.toml")
	if err := os.WriteFile(answers, []byte("time_sources = ['127.0.0.1:1']\npin_source = 'unlock'\n[unlock]\nthreshold = 2\nholders = ['张三', '李四', '王五']\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	cmd := exec.Command(script, "init", "--dir", filepath.Join(tempDir(t), "a"), "--answers", answers, "--passphrase-fd", "3")
	cmd.ExtraFiles = []*os.File{r}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	secrets["a passphrase"] = "sand-and-water-of-the-canary"
	fmt.Fprintln(w, secrets["a passphrase"])
	eventually(t, readyWithin, "the passphrase is read", func() bool {
		left, err := unix.IoctlGetInt(int(r.Fd()), unix.TIOCINQ)
		return err == nil && left == 0
	})
	if err := cmd.Process.Signal(syscall.SIGABRT); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err == nil || !strings.Contains(out.String(), "SIGABRT") {
		t.Errorf("it did not crash: %v %s", err, out.String())
	}
	said["what the command said"] = out.String()

	if left := cores(t, folder); len(left) > 0 {
		t.Errorf("core files: %v", left)
	}
	for what, secret := range secrets {
		for where, text := range said {
			for _, form := range []string{secret, hex.EncodeToString([]byte(secret))} {
				if len(secret) >= 8 && strings.Contains(strings.ToLower(text), strings.ToLower(form)) {
					t.Errorf("%s stands in %s", what, where)
				}
			}
		}
	}
	var credential struct {
		Key string `json:"key_hex"`
	}
	if err := json.Unmarshal([]byte(readFile(t, filepath.Join(dir, "credentials", "his.json"))), &credential); err != nil || secrets["credential"] != credential.Key {
		t.Errorf("the application's key was not looked for: %v", err)
	}
}

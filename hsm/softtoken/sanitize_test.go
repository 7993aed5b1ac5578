package softtoken_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// sanitized builds a C program of testdata together with the module's sources.
func sanitized(t *testing.T, program, sanitizers string) string {
	t.Helper()
	cc := os.Getenv("CC")
	if cc == "" {
		cc = "gcc"
	}
	dir := t.TempDir()
	flags := []string{"-g", "-O1", "-std=c11", "-fsanitize=" + sanitizers, "-fno-sanitize-recover=all", "-pthread"}
	trial := filepath.Join(dir, "trial.c")
	must(t, os.WriteFile(trial, []byte("int main(void) { return 0; }\n"), 0o600))
	if out, err := exec.Command(cc, append(flags, "-o", trial+".out", trial)...).CombinedOutput(); err != nil {
		t.Skipf("%s has no -fsanitize=%s: %v\n%s", cc, sanitizers, err, out)
	}
	if out, err := exec.Command(trial + ".out").CombinedOutput(); err != nil {
		t.Skipf("what %s -fsanitize=%s builds does not run here: %v\n%s", cc, sanitizers, err, out)
	}
	headers, err := exec.Command("pkg-config", "--cflags", "p11-kit-1").Output()
	must(t, err)
	sources, err := filepath.Glob("module/*.c")
	must(t, err)
	exe := filepath.Join(dir, program)
	args := append(flags, "-Wall", "-Wextra", "-Werror")
	args = append(args, strings.Fields(string(headers))...)
	args = append(args, "-o", exe, filepath.Join("testdata", program+".c"))
	if out, err := exec.Command(cc, append(args, sources...)...).CombinedOutput(); err != nil {
		t.Fatalf("building %s: %v\n%s", program, err, out)
	}
	return exe
}

func runFor(t *testing.T, limit time.Duration, env []string, exe string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, exe, args...)
	cmd.Env = append(os.Environ(), env...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", filepath.Base(exe), strings.Join(args, " "), err, out)
	}
	return string(out)
}

// Whatever a daemon answers, the module writes to nobody's memory but the caller's buffers, and ends.
func TestModuleReplies(t *testing.T) {
	t.Parallel()
	exe := sanitized(t, "replies", "address,undefined")
	seed := time.Now().UnixNano()
	t.Log(strings.TrimSpace(runFor(t, 5*time.Minute, nil, exe, fmt.Sprint(seed), "2500")), "seed", seed)
}

// The recorded replies, and what was once found with them, one by one; packaging/dev/fuzz.sh goes on from there where
// clang is.
func TestModuleReplyCorpus(t *testing.T) {
	t.Parallel()
	exe := sanitized(t, "fuzz_replies", "address,undefined")
	inputs, err := filepath.Glob("testdata/replies-corpus/*")
	must(t, err)
	if out := runFor(t, 5*time.Minute, nil, exe, inputs...); out != fmt.Sprintf("%d inputs\n", len(inputs)) || len(inputs) < 25 {
		t.Errorf("of %d inputs: %s", len(inputs), out)
	}
}

// Sixteen threads use the module while others finalise it, close all its sessions and fork, and while the daemon is
// killed. Sanitizers watch; no signature that was answered is wrong.
func TestModuleUnderStress(t *testing.T) {
	t.Parallel()
	kinds := map[string]string{"memory": "address,undefined", "threads": "thread", "forks": "undefined"}
	if os.Getenv("YINJIAN_LONG") == "1" {
		kinds["memory, network"], kinds["forks, network"] = kinds["memory"], kinds["forks"]
	}
	for name, sanitizers := range kinds {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			exe := sanitized(t, "stress", sanitizers)
			m := newFolder(t)
			over := strings.HasSuffix(name, "network")
			if over {
				m.cfg.Address = freeAddress(t)
			}
			m.startProcess(t)
			p := m.module(t)
			initToken(t, p, 0, "stress")
			s := openRW(t, p, 0)
			must(t, p.Login(s, 1, userPIN))
			generateSM2(t, p, s, "k")
			must(t, p.Finalize())
			env := []string{"TSAN_OPTIONS=exitcode=66 halt_on_error=1"}
			// A child of many threads is beyond the thread sanitizer, and gcc 12's address sanitizer does not take its
			// allocator's locks before a fork: the child then waits for ever for a thread that it does not have.
			if strings.HasPrefix(name, "forks") {
				env = append(env, "FORK=1")
			}
			done, killed := make(chan struct{}), make(chan struct{})
			var pause atomic.Int64
			pause.Store(int64(700 * time.Millisecond))
			go func() {
				defer close(killed)
				for {
					select {
					case <-done:
						return
					case <-time.After(time.Duration(pause.Load())):
						if m.kill(t); !t.Failed() {
							m.startProcess(t)
						}
					}
				}
			}()
			defer func() { close(done); <-killed }()
			place := "socket='" + m.socket + "'"
			if over {
				place = m.elsewhere()
			}
			// A busy machine may have no time for a login between two kills.
			out := "0 signatures"
			for _, long := range []int64{3500, 14_000, 56_000} {
				if strings.HasPrefix(out, "0 signatures") {
					pause.Store(long / 5 * int64(time.Millisecond))
					out = runFor(t, 5*time.Minute, env, exe, place, "0", userPIN, fmt.Sprint(long))
					t.Log(strings.TrimSpace(out))
				}
			}
			if strings.HasPrefix(out, "0 signatures") {
				t.Error("nothing was signed: the test means nothing")
			}
		})
	}
}

// Arguments that other languages' bindings do not let through.
func TestModuleAtTheEdge(t *testing.T) {
	t.Parallel()
	exe := sanitized(t, "edges", "address,undefined")
	m, p, s := loggedIn(t)
	generateSM2(t, p, s, "k")
	runFor(t, 5*time.Minute, nil, exe, "socket='"+m.socket+"'", "0", userPIN)
	m.cfg.Address = "127.0.0.1:0"
	m.restart(t)
	runFor(t, 5*time.Minute, nil, exe, m.elsewhere(), "0", userPIN)
}

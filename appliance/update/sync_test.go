package update_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// What is acknowledged is on the disk: seen from outside the process, every file of the EFI system partition was synced after it was
// written and before it got its name, and every folder after a name came or went. FAT has no journal that would order it.
func TestAcknowledgedIsSynced(t *testing.T) {
	if os.Getenv("YJ_SYNCS") != "" {
		m := install(t, 1)
		os.Stdout.WriteString("ack begin " + m.esp + "\n")
		ack := func(what string) { os.Stdout.WriteString("ack " + what + "\n") }
		u := m.updater()
		o := m.mustStage(u, m.bundle(m.build(2)))
		ack("stage")
		if _, err := u.Commit(o.SM3, m.want); err != nil {
			t.Fatal(err)
		}
		ack("commit")
		if _, err := u.Cancel(o.SM3); err != nil {
			t.Fatal(err)
		}
		ack("cancel")
		o = m.mustStage(u, m.bundle(m.build(3)))
		ack("stage")
		if _, err := u.Commit(o.SM3, m.want); err != nil {
			t.Fatal(err)
		}
		ack("commit")
		u = m.updater() // the machine starts again, from it
		ack("boot")
		if _, err := u.MarkGood(func(uint64) error { return nil }); err != nil {
			t.Fatal(err)
		}
		ack("good")
		return
	}
	t.Parallel()
	strace, err := exec.LookPath("strace")
	if err != nil {
		t.Skip("strace is not installed")
	}
	trace := filepath.Join(t.TempDir(), "trace")
	cmd := exec.Command(strace, "-f", "-y", "-s", "400", "-o", trace, "-e", "trace=openat,rename,renameat,renameat2,unlink,unlinkat,write,pwrite64,fsync,fdatasync", os.Args[0], "-test.run=^TestAcknowledgedIsSynced$")
	cmd.Env = append(os.Environ(), "YJ_SYNCS=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	text, err := os.ReadFile(trace)
	if err != nil {
		t.Fatal(err)
	}
	var (
		handle  = regexp.MustCompile(`^\w+\(\d+<([^>]*)>`)
		quoted  = regexp.MustCompile(`"([^"]*)"`)
		esp     string
		dirty   = map[string]string{} // what was done to it since it was synced last
		pending = map[string]string{} // a thread's call that has not come back
		acks    []string
	)
	for line := range strings.Lines(string(text)) {
		thread, call, _ := strings.Cut(strings.TrimSpace(line), " ")
		call = strings.TrimSpace(call)
		if began, ok := strings.CutSuffix(call, "<unfinished ...>"); ok {
			pending[thread] = began
			continue
		}
		if rest, ok := strings.CutPrefix(call, "<... "); ok {
			_, rest, _ = strings.Cut(rest, "resumed>")
			call = pending[thread] + rest
		}
		if strings.Contains(call, " = -1 ") {
			continue
		}
		if strings.HasPrefix(call, "write(1<") && strings.Contains(call, `"ack `) {
			said := strings.TrimSuffix(quoted.FindStringSubmatch(call)[1], `\n`)
			if at, ok := strings.CutPrefix(said, "ack begin "); ok {
				esp = at
				continue
			}
			for name, what := range dirty {
				if said != "ack boot" { // the counting is the boot loader's, which the test stands in for
					t.Errorf("%s: %s was not synced after %s", said, name, what)
				}
			}
			clear(dirty)
			acks = append(acks, strings.TrimPrefix(said, "ack "))
			continue
		}
		if esp == "" || !strings.Contains(call, esp) {
			continue
		}
		names := quoted.FindAllStringSubmatch(call, -1)
		switch {
		case strings.HasPrefix(call, "openat(") && strings.Contains(call, "O_CREAT"):
			dirty[filepath.Dir(names[0][1])] = call
		case strings.HasPrefix(call, "unlink"):
			delete(dirty, names[0][1])
			dirty[filepath.Dir(names[0][1])] = call
		case strings.HasPrefix(call, "rename"):
			if what := dirty[names[0][1]]; what != "" {
				t.Errorf("it got its name before it was synced: %s, %s", what, call)
			}
			for _, n := range names {
				dirty[filepath.Dir(n[1])] = call
			}
		case strings.HasPrefix(call, "write(") || strings.HasPrefix(call, "pwrite64("):
			name := handle.FindStringSubmatch(call)[1]
			dirty[name] = "write to " + name
		case strings.HasPrefix(call, "fsync(") || strings.HasPrefix(call, "fdatasync("):
			delete(dirty, handle.FindStringSubmatch(call)[1])
		}
	}
	if got := strings.Join(acks, " "); got != "stage commit cancel stage commit boot good" {
		t.Errorf("strace saw %q", got)
	}
}

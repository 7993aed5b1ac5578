package appliance

import (
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"yinjian/appliance/pack"
)

// A maker's daemon is there before its library, is told of and started again when it ends, and ends with all that it has started: by
// itself when it does as it is told, and by force when it does not.
func TestDaemons(t *testing.T) {
	t.Parallel()
	log := logrus.New()
	log.SetOutput(io.Discard)
	for _, c := range []struct{ name, trap string }{{"willing", ""}, {"unwilling", "trap '' TERM; "}} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			ready, child := filepath.Join(dir, "ready"), filepath.Join(dir, "child")
			if err := os.WriteFile(ready, []byte("0"), 0o600); err != nil { // of a run before, by a power cut
				t.Fatal(err)
			}
			var d daemons
			one, other := &pack.Installed{Name: "vendor", SM3: "1", Folder: dir}, &pack.Installed{Name: "vendor", SM3: "2", Folder: dir}
			script := c.trap + "sleep 1000 & echo $! > " + child + "; echo $$ > " + ready + ".new; mv " + ready + ".new " + ready + "; wait; while :; do sleep 1; done"
			read := func(name string) int {
				b, _ := os.ReadFile(name) // not there yet
				pid, _ := strconv.Atoi(strings.TrimSpace(string(b)))
				return pid
			}
			eventually := func(what string, is func() bool) {
				t.Helper()
				for limit := time.Now().Add(20 * time.Second); !is(); time.Sleep(5 * time.Millisecond) {
					if time.Now().After(limit) {
						t.Fatal(what)
					}
				}
			}
			// A zombie of another's is gone too.
			gone := func(pid int) bool {
				b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
				return err != nil || strings.Contains(string(b), ") Z ")
			}
			start := func(p *pack.Installed) int {
				d.need(t.Context(), p, "/bin/sh", ready, []string{"-c", script}, os.Environ(), log)
				return read(ready)
			}
			first := start(one)
			if first == 0 || gone(first) || start(one) != first {
				t.Fatalf("it is %d", first)
			}
			if f := d.faults(); len(f) != 0 {
				t.Error(f)
			}
			orphan := read(child)
			if err := syscall.Kill(first, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			eventually("nobody is told that it has ended", func() bool {
				f := d.faults()
				return len(f) == 1 && strings.Contains(f[0], "vendor") && strings.Contains(f[0], "killed")
			})
			eventually("what it has started is left", func() bool { return gone(orphan) })
			eventually("it is not started again", func() bool { pid := read(ready); return pid != 0 && pid != first && len(d.faults()) == 0 })
			second := read(ready)
			third := start(other) // another version of the pack
			if third == second || !gone(second) {
				t.Errorf("of another pack: %d, before %d", third, second)
			}
			d.unused(func(name string) bool { return name == "vendor" })
			if gone(third) {
				t.Error("it was ended while it is used")
			}
			orphan = read(child)
			d.unused(func(string) bool { return false })
			if !gone(third) || len(d.running) != 0 {
				t.Error("it runs on though nobody uses it")
			}
			eventually("what it has started runs on", func() bool { return gone(orphan) }) // its end is the kernel's, a moment later
		})
	}
}

// A daemon that cannot be started does not keep a library from being loaded.
func TestDaemonNeverReady(t *testing.T) {
	t.Parallel()
	log := logrus.New()
	log.SetOutput(io.Discard)
	var d daemons
	d.need(t.Context(), &pack.Installed{Name: "vendor"}, "/nowhere/vendord", "", nil, nil, log)
	for limit := time.Now().Add(10 * time.Second); len(d.faults()) == 0; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(limit) {
			t.Fatal("nobody is told")
		}
	}
	d.unused(func(string) bool { return false })
}

// A daemon is needed by machines that are there: one that was removed, and stands in config.toml, keeps its pack and not its daemon.
func TestDaemonOfRemovedMachine(t *testing.T) {
	t.Parallel()
	a := &Appliance{cfg: &Config{}}
	a.machines = &machines{a: a}
	a.cfg.HSM.Machines = []Machine{{Name: "second", Module: "pack:vendor/lib/libvendor.so"}}
	if used := a.usedBy("vendor"); len(used) != 1 || used[0] != "second" || a.machines.loaded("vendor") {
		t.Errorf("removed: used by %q, loaded %v", used, a.machines.loaded("vendor"))
	}
	a.machines.put([]*cipherMachine{{Machine: a.cfg.HSM.Machines[0]}})
	if !a.machines.loaded("vendor") || a.machines.loaded("other") {
		t.Error("a machine that is there does not count, or one of another pack does")
	}
}

package gnss

import (
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Whoever of the two daemons comes first makes the segment. When it was chronyd, gpsd could not write to it, and the
// rack had no time for ever: one start in five or so.
func TestChronyLetsGpsdIn(t *testing.T) {
	t.Parallel()
	chronyd, err := find("chronyd", "chrony")
	if err != nil {
		t.Skip(err)
	}
	dir := t.TempDir()
	port, err := freePort("udp")
	if err != nil {
		t.Fatal(err)
	}
	conf, args, err := chronyConfig(port)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "chrony.conf"), []byte(conf), 0o640); err != nil {
		t.Fatal(err)
	}
	runtime.LockOSThread() // never unlocked: the namespace and PDEATHSIG belong to the thread
	if err := unix.Unshare(unix.CLONE_NEWIPC); err != nil {
		t.Skip("no IPC namespace of our own (CAP_SYS_ADMIN is needed)")
	}
	cmd := exec.Command(chronyd, args...)
	cmd.Dir = dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
	}()
	const key = 0x4E545030 + 2 // "NTP2" in gpsd's and chrony's numbering
	for end := time.Now().Add(2 * time.Minute); ; {
		id, err := unix.SysvShmGet(key, 0, 0)
		if err == nil {
			var desc unix.SysvShmDesc
			if _, err := unix.SysvShmCtl(id, unix.IPC_STAT, &desc); err != nil {
				t.Fatal(err)
			}
			if mode := desc.Perm.Mode & 0o777; mode != 0o666 {
				t.Errorf("shared memory has mode %#o, want 0666", mode)
			}
			return
		}
		if time.Now().After(end) {
			t.Fatalf("chronyd made no shared memory: %v", err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

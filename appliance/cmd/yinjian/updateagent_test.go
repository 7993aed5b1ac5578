package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"yinjian/appliance/problem"
)

// A file system that is whole, or can be mended, is mounted; what is none is refused in words for an administrator.
func TestCheckFAT(t *testing.T) {
	t.Parallel()
	const mkfs, fsck = "/usr/sbin/mkfs.vfat", "/usr/sbin/fsck.fat"
	for _, program := range []string{mkfs, fsck} {
		if _, err := os.Stat(program); err != nil {
			t.Skipf("%v: packaging/dev/deps.sh image", err)
		}
	}
	device := filepath.Join(t.TempDir(), "esp")
	if err := os.WriteFile(device, make([]byte, 40<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := checkFAT(fsck, device); problem.CodeOf(err) != problem.NotReady {
		t.Errorf("nothing but zeros: %v", err)
	}
	if out, err := exec.Command(mkfs, "-F", "32", device).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := checkFAT(fsck, device); err != nil {
		t.Error(err)
	}
	f, err := os.OpenFile(device, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte{1}, 0x41); err != nil { // BS_Reserved1, bit 0: it was not unmounted
		t.Fatal(err)
	}
	if err := checkFAT(fsck, device); err != nil {
		t.Errorf("a power cut before it was unmounted: %v", err)
	}
	dirty := make([]byte, 1)
	if _, err := f.ReadAt(dirty, 0x41); err != nil || dirty[0] != 0 {
		t.Errorf("it is still called dirty: %v, %v", dirty, err)
	}
}

package update_test

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"yinjian/appliance/update"
	"yinjian/iso/layout"
)

// A renaming that the power cut in the middle leaves two names of one file on a FAT. The check of the file system keeps the bytes
// under one of them, and what is left of the other goes: a kernel that starts is there at each moment.
func TestMended(t *testing.T) {
	t.Parallel()
	tools := map[string]string{}
	for _, name := range []string{"mkfs.vfat", "fsck.fat", "mmd", "mcopy"} {
		for _, at := range []string{name, "/usr/sbin/" + name} {
			if path, err := exec.LookPath(at); err == nil {
				tools[name] = path
			}
		}
		if tools[name] == "" {
			t.Skipf("%s is missing: packaging/dev/deps.sh image", name)
		}
	}
	dir := t.TempDir()
	fat := filepath.Join(dir, "fat.img")
	run := func(ok []int, name string, args ...string) {
		t.Helper()
		cmd := exec.Command(tools[name], args...)
		out, err := cmd.CombinedOutput()
		if cmd.ProcessState == nil || !slices.Contains(ok, cmd.ProcessState.ExitCode()) {
			t.Fatalf("%s %q: %v: %s", name, args, err, out)
		}
	}
	if err := os.WriteFile(fat, make([]byte, 40<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	kernel := bytes.Repeat([]byte("a kernel "), 20_000)
	one := filepath.Join(dir, "one")
	if err := os.WriteFile(one, kernel, 0o600); err != nil {
		t.Fatal(err)
	}
	run([]int{0}, "mkfs.vfat", "-F", "32", "-s", "1", fat)
	run([]int{0}, "mmd", "-i", fat, "::/EFI", "::/EFI/Linux", "::/yinjian")
	counted := layout.Entry{Index: 2, Counted: true, Left: 2, Done: 1}
	for _, name := range []string{"EFI/Linux/" + counted.String(), "EFI/Linux/" + counted.Good().String(), "yinjian/staged.efi"} {
		run([]int{0}, "mcopy", "-i", fat, one, "::/"+name)
	}
	run([]int{0}, "fsck.fat", "-n", fat)
	// The good name and the staged one get the clusters of the counted one (FAT directory entry: first cluster at 20 and 26).
	image, err := os.ReadFile(fat)
	if err != nil {
		t.Fatal(err)
	}
	var first []byte
	aliased := 0
	for _, short := range [][]byte{[]byte("YINJIA~1EFI"), []byte("YINJIA~2EFI"), []byte("STAGED  EFI")} {
		at := bytes.Index(image, short)
		if at < 0 {
			t.Fatalf("there is no %s", short)
		}
		entry := image[at : at+32]
		if first == nil {
			first = bytes.Clone(entry)
			continue
		}
		copy(entry[20:22], first[20:22])
		copy(entry[26:28], first[26:28])
		aliased++
	}
	if err := os.WriteFile(fat, image, 0o600); err != nil || aliased != 2 {
		t.Fatal(err, aliased)
	}
	run([]int{1}, "fsck.fat", "-n", fat)
	run([]int{1}, "fsck.fat", "-a", "-w", fat)
	run([]int{0}, "fsck.fat", "-n", fat) // as the agent does: nothing is left for a second time

	esp := filepath.Join(dir, "esp")
	if err := os.Mkdir(esp, 0o700); err != nil {
		t.Fatal(err)
	}
	run([]int{0}, "mcopy", "-s", "-i", fat, "::/EFI", "::/yinjian", esp)
	if err := update.Mended(esp); err != nil {
		t.Fatal(err)
	}
	found, err := os.ReadDir(filepath.Join(esp, layout.EntryDir))
	if err != nil || len(found) != 1 {
		t.Fatalf("%v, %v: want one kernel", found, err)
	}
	if got, err := os.ReadFile(filepath.Join(esp, layout.EntryDir, found[0].Name())); err != nil || !bytes.Equal(got, kernel) {
		t.Errorf("%s has %d bytes, %v", found[0], len(got), err)
	}
	if _, err := os.Stat(filepath.Join(esp, layout.MediaDir, "staged.efi")); !os.IsNotExist(err) {
		t.Errorf("the staged kernel's name is still there: %v", err)
	}
}

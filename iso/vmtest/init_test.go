package vmtest_test

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"yinjian/iso/layout"
	"yinjian/iso/vmtest"
)

// built is the folder of the image that make image built.
func built(t *testing.T) string {
	t.Helper()
	dir := os.Getenv("YINJIAN_IMAGE")
	if dir == "" {
		t.Skip("YINJIAN_IMAGE is not set: make image-test starts virtual machines with what make image built")
	}
	return dir
}

// A tinyRoot is the smallest root that init can start, with a file of eight megabytes that nothing reads by itself.
type tinyRoot struct {
	root  layout.Root
	image []byte
}

func makeTiny(t *testing.T) *tinyRoot {
	t.Helper()
	dir := t.TempDir()
	tree := filepath.Join(dir, "tree")
	for _, d := range []string{"proc", "sys", "dev", "run", "usr/lib/systemd"} {
		if err := os.MkdirAll(filepath.Join(tree, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	build := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-ldflags=-s -w", "-o", filepath.Join(tree, "usr/lib/systemd/systemd"), "./tiny")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOARCH=amd64")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	filler := make([]byte, 8<<20)
	rand.NewChaCha8([32]byte{1}).Read(filler)
	if err := os.WriteFile(filepath.Join(tree, "filler"), filler, 0o444); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "squash")
	if out, err := exec.CommandContext(t.Context(), vmtest.Tool(t, "mksquashfs"), tree, file, "-comp", "xz", "-no-progress", "-quiet", "-all-root").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	data = append(data, make([]byte, (layout.BlockSize-len(data)%layout.BlockSize)%layout.BlockSize)...)
	salt := sha256.Sum256(data)
	sums, err := layout.NewTree("sha256", salt[:])
	if err != nil {
		t.Fatal(err)
	}
	sums.Write(data)
	root, behind, err := sums.Sum()
	if err != nil {
		t.Fatal(err)
	}
	return &tinyRoot{root, append(data, behind...)}
}

const mib = 1 << 20

// disk writes a disk with the root in slot A and answers its file, and where the slot begins.
func (r *tinyRoot) disk(t *testing.T) (string, int64) {
	t.Helper()
	size := int64(160 * mib)
	image := layout.Image{Version: "0", Index: 1, Arch: "amd64", Variant: layout.Release, ESPBytes: 32 * mib, SlotBytes: 16 * mib}
	table, err := layout.NewTable(size, 512, image, r.root, [3]layout.GUID{{1}, {2}, {3}})
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(t.TempDir(), "disk.img"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	at := table.Offset(table.Partitions[layout.NumberRootA-1])
	if _, err := f.WriteAt(r.image, at); err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	if err := table.Write(f, f.Sync); err != nil {
		t.Fatal(err)
	}
	return f.Name(), at
}

// flip changes one bit of a file.
func flip(t *testing.T, name string, at int64) {
	t.Helper()
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, at); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 0x10
	if _, err := f.WriteAt(b, at); err != nil {
		t.Fatal(err)
	}
}

// kernelLine is a command line for a kernel that is started directly.
func kernelLine(c layout.CommandLine) string {
	return "console=ttyS0,115200 quiet loglevel=4 panic=5 no_timer_check gpt " + c.String()
}

// The init of the built image, on the kernel of the built image, starts a root that is what the command line says, and
// refuses, saying why, whatever differs. Secure Boot has no part in this: who vouches for the command line is tried with
// the whole image. What stands in the short suite is one of each kind; its neighbours are of the long one.
func TestInit(t *testing.T) {
	t.Parallel()
	dir := built(t)
	tiny := makeTiny(t)
	disk := layout.CommandLine{Root: tiny.root, Media: layout.MediaDisk}
	kernel := filepath.Join(t.TempDir(), "vmlinuz")
	if err := os.WriteFile(kernel, vmtest.Section(t, filepath.Join(dir, "disk.efi"), ".linux"), 0o600); err != nil {
		t.Fatal(err)
	}
	start := func(t *testing.T, line layout.CommandLine, change func(m *vmtest.Machine)) *vmtest.VM {
		t.Helper()
		m := vmtest.Machine{Name: "init", Memory: 512, Kernel: kernel, Initrd: filepath.Join(dir, line.Media+".initrd"), Append: kernelLine(line), Boot: 40 * time.Second}
		change(&m)
		return vmtest.Start(t, m)
	}
	refused := func(t *testing.T, v *vmtest.VM, code string) {
		t.Helper()
		if v.Wait("REFUSED [", "tiny: UP") == "tiny: UP" {
			t.Fatalf("it started; want REFUSED [%s]", code)
		}
		v.Wait("\n") // the rest of the line
		if !strings.Contains(v.Console(), "REFUSED ["+code+"]") {
			t.Fatalf("refused with another code than %s", code)
		}
		t.Logf("%s after %v", code, v.Elapsed().Round(time.Second/10))
		v.Kill()
	}

	t.Run("starts", func(t *testing.T) {
		t.Parallel()
		name, at := tiny.disk(t)
		v := start(t, disk, func(m *vmtest.Machine) { m.Disks = []string{name} })
		v.Wait("tiny: UP")
		t.Logf("up after %v", v.Elapsed().Round(time.Second/10))
		said := v.Console()
		for _, want := range []string{
			fmt.Sprintf("verified %d blocks of /dev/vda2", tiny.root.DataBlocks),
			`booted {"media":"disk","disk":"/dev/vda","root":"/dev/vda2","slot":2}`,
			"/ squashfs ro,nosuid,nodev",
			"write refused: open /usr/new: read-only file system", "remount refused: permission denied",
		} {
			if !strings.Contains(said, want) {
				t.Errorf("missing on the console: %q", want)
			}
		}
		for _, gone := range []string{"root has modules", "root has .extra", "root has init"} {
			if strings.Contains(said, gone) {
				t.Errorf("of the initramfs is left: %q", gone)
			}
		}
		// A block that changes while the system runs ends it when it is read.
		flip(t, name, at+int64(tiny.root.DataBlocks/2)*layout.BlockSize+5)
		v.Type("read\n")
		v.Ended()
		if said := v.Console(); strings.Contains(said, "tiny: read") || !strings.Contains(said, "is corrupted") {
			t.Error("a block that was changed under the running system was not noticed")
		}
	})

	data := int64(tiny.root.DataBlocks) * layout.BlockSize
	for _, c := range []struct {
		name string
		at   int64 // byte of the image in which a bit is flipped
		code string
		long bool
	}{
		{"first block", 3, "root-changed", true},
		{"a block that nothing reads", data / 2, "root-changed", false},
		{"last block of data", data - 1, "root-changed", true},
		{"superblock", data + 72, "root-superblock", false},
		{"end of the superblock's block", data + layout.BlockSize - 1, "root-superblock", true},
		{"top of the tree", data + layout.BlockSize + 8, "root-changed", true},
		{"last byte of the tree", int64(len(tiny.image)) - 1, "root-changed", false},
	} {
		t.Run("flipped "+c.name, func(t *testing.T) {
			t.Parallel()
			if c.long {
				long(t)
			}
			name, at := tiny.disk(t)
			flip(t, name, at+c.at)
			refused(t, start(t, disk, func(m *vmtest.Machine) { m.Disks = []string{name} }), c.code)
		})
	}

	for _, c := range []struct {
		name   string
		change func(*layout.CommandLine)
		code   string
		long   bool
	}{
		{"fewer blocks", func(c *layout.CommandLine) { c.Root.DataBlocks-- }, "root-changed", false},
		{"more blocks", func(c *layout.CommandLine) { c.Root.DataBlocks++ }, "root-changed", true},
		{"more blocks than the slot has", func(c *layout.CommandLine) { c.Root.DataBlocks = 8192 }, "root-short", true},
		{"another hash, same partition", func(c *layout.CommandLine) { c.Root.Hash = slices.Clone(c.Root.Hash); c.Root.Hash[31] ^= 1 }, "root-changed", false},
		{"another salt", func(c *layout.CommandLine) { c.Root.Salt = bytes.Repeat([]byte{9}, 32) }, "root-changed", true},
		{"an algorithm that this kernel lacks", func(c *layout.CommandLine) { c.Root.Algorithm = "sm3" }, "verity", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			if c.long {
				long(t)
			}
			name, _ := tiny.disk(t)
			line := disk
			c.change(&line)
			refused(t, start(t, line, func(m *vmtest.Machine) { m.Disks = []string{name} }), c.code)
		})
	}

	t.Run("cut", func(t *testing.T) {
		t.Parallel()
		long(t)
		name, at := tiny.disk(t)
		f, err := os.OpenFile(name, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt(make([]byte, layout.BlockSize), at+int64(len(tiny.image))-layout.BlockSize); err != nil {
			t.Fatal(err)
		}
		f.Close()
		refused(t, start(t, disk, func(m *vmtest.Machine) { m.Disks = []string{name} }), "root-changed")
	})
	t.Run("words that are not ours", func(t *testing.T) {
		t.Parallel()
		name, _ := tiny.disk(t)
		refused(t, start(t, disk, func(m *vmtest.Machine) {
			m.Disks = []string{name}
			m.Append += " roothash=" + strings.Repeat("0", 64)
		}), "command-line")
	})
	t.Run("two disks", func(t *testing.T) {
		t.Parallel()
		long(t)
		one, _ := tiny.disk(t)
		two, _ := tiny.disk(t)
		refused(t, start(t, disk, func(m *vmtest.Machine) { m.Disks = []string{one, two} }), "root-twice")
	})

	medium := layout.CommandLine{Root: tiny.root, Media: layout.MediaISO, ESP: [32]byte{1}}
	t.Run("starts from the medium", func(t *testing.T) {
		t.Parallel()
		v := start(t, medium, func(m *vmtest.Machine) { m.CDROM = tiny.iso(t, len(tiny.image), -1) })
		v.Wait("tiny: UP")
		if said := v.Console(); !strings.Contains(said, `booted {"media":"iso","disk":"/dev/sr0","root":"/dev/loop0","slot":0}`) || !strings.Contains(said, layout.MediaRun+" iso9660 ro") {
			t.Error("what was booted is told otherwise")
		}
	})
	t.Run("flipped on the medium", func(t *testing.T) {
		t.Parallel()
		refused(t, start(t, medium, func(m *vmtest.Machine) { m.CDROM = tiny.iso(t, len(tiny.image), data/3) }), "root-changed")
	})
	t.Run("cut on the medium", func(t *testing.T) {
		t.Parallel()
		long(t)
		refused(t, start(t, medium, func(m *vmtest.Machine) { m.CDROM = tiny.iso(t, len(tiny.image)-1, -1) }), "root-short")
	})
}

// iso is a medium with the first size bytes of the root, a bit flipped at the place given unless that is negative.
func (r *tinyRoot) iso(t *testing.T, size int, at int64) string {
	t.Helper()
	dir := t.TempDir()
	folder := filepath.Join(dir, "in", layout.MediaDir)
	if err := os.MkdirAll(folder, 0o755); err != nil {
		t.Fatal(err)
	}
	image := filepath.Join(folder, layout.RootImage)
	f, err := os.Create(image)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(f, bytes.NewReader(r.image[:size])); err != nil {
		t.Fatal(err)
	}
	f.Close()
	if at >= 0 {
		flip(t, image, at)
	}
	name := filepath.Join(dir, "medium.iso")
	if out, err := exec.CommandContext(t.Context(), vmtest.Tool(t, "xorriso"), "-as", "mkisofs", "-quiet", "-V", layout.ISOLabel, "-R", "-o", name, filepath.Join(dir, "in")).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return name
}

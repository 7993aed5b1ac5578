//go:build linux

package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"yinjian/iso/layout"
)

func TestModuleOrder(t *testing.T) {
	t.Parallel()
	if got, err := moduleOrder("virtio_pci.ko\nsd_mod.ko\n"); err != nil || !slices.Equal(got, []string{"virtio_pci.ko", "sd_mod.ko"}) {
		t.Errorf("%q, %v", got, err)
	}
	if got, err := moduleOrder(""); err != nil || got != nil {
		t.Errorf("empty: %q, %v", got, err)
	}
	for _, list := range []string{"\n", "../x.ko\n", "a/b.ko\n", "x.ko.xz\n", "x.ko \n", ".ko\n", "x.ko\n\ny.ko\n", "x.ko\r\n", "-x.ko\n"} {
		if got, err := moduleOrder(list); err == nil {
			t.Errorf("%q: %q", list, got)
		}
	}
}

func FuzzModuleOrder(f *testing.F) {
	f.Add("virtio_pci.ko\nsd_mod.ko\n")
	f.Fuzz(func(t *testing.T, list string) {
		names, err := moduleOrder(list)
		if err != nil {
			return
		}
		for _, name := range names {
			if filepath.Base(name) != name || !strings.HasSuffix(name, ".ko") {
				t.Errorf("%q is not in the folder of modules", name)
			}
		}
	})
}

func TestISOLabel(t *testing.T) {
	t.Parallel()
	if got := isoLabel(bytes.NewReader(make([]byte, 40000))); got != "" {
		t.Errorf("zeros: %q", got)
	}
	if got := isoLabel(bytes.NewReader(nil)); got != "" {
		t.Errorf("nothing: %q", got)
	}
	tool, err := exec.LookPath("xorriso")
	if err != nil {
		t.Skip("xorriso is missing: packaging/dev/deps.sh image")
	}
	dir := t.TempDir()
	name := filepath.Join(dir, "x.iso")
	if err := os.Mkdir(filepath.Join(dir, "in"), 0o700); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), tool, "-as", "mkisofs", "-V", layout.ISOLabel, "-o", name, filepath.Join(dir, "in")).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if got := isoLabel(f); got != layout.ISOLabel {
		t.Errorf("label %q", got)
	}
}

// A machine has disks in memory and what sysfs says about them.
type machine struct {
	sys   fstest.MapFS
	disks map[string][]byte
}

type memory struct{ *bytes.Reader }

func (memory) Close() error { return nil }

func (m *machine) open(name string) (diskReader, error) {
	b, ok := m.disks[strings.TrimPrefix(name, "/dev/")]
	if !ok {
		return nil, os.ErrNotExist
	}
	return memory{bytes.NewReader(b)}, nil
}

// Write lets a table be written to a disk.
type writer []byte

func (w writer) WriteAt(p []byte, at int64) (int, error) { return copy(w[at:], p), nil }
func (w writer) ReadAt(p []byte, at int64) (int, error)  { return copy(p, w[at:]), nil }

var testRoot = layout.Root{Hash: bytes.Repeat([]byte{0xab, 0xcd}, 16), Algorithm: "sha256", DataBlocks: 1000, Salt: bytes.Repeat([]byte{7}, 32)}

const mib = 1 << 20

// add gives the machine a disk with the root installed.
func (m *machine) add(t *testing.T, name string, sector int64) {
	t.Helper()
	image := layout.Image{Version: "0", Index: 1, Arch: "amd64", Variant: layout.Release, ESPBytes: 32 * mib, SlotBytes: 8 * mib}
	size := int64(160 * mib)
	table, err := layout.NewTable(size, sector, image, testRoot, [3]layout.GUID{{1}, {2}, {3}})
	if err != nil {
		t.Fatal(err)
	}
	disk := make([]byte, size)
	if err := table.Write(writer(disk), func() error { return nil }); err != nil {
		t.Fatal(err)
	}
	m.disks[name] = disk
	m.sys[name+"/size"] = &fstest.MapFile{Data: fmt.Appendf(nil, "%d\n", size/512)}
	for i, p := range table.Partitions {
		dir := name + "/" + layout.DeviceName(name, i+1)
		m.sys[dir+"/start"] = &fstest.MapFile{Data: fmt.Appendf(nil, "%d\n", table.Offset(p)/512)}
		m.sys[dir+"/size"] = &fstest.MapFile{Data: fmt.Appendf(nil, "%d\n", table.Size(p)/512)}
	}
}

func TestOnDisk(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		make func(*testing.T, *machine)
		want string // device, or code of the refusal; "" is: not there yet
	}{
		"nothing":              {func(*testing.T, *machine) {}, ""},
		"a disk":               {func(t *testing.T, m *machine) { m.add(t, "sda", 512) }, "/dev/sda2"},
		"NVMe, 4096":           {func(t *testing.T, m *machine) { m.add(t, "nvme0n1", 4096) }, "/dev/nvme0n1p2"},
		"front of it lost":     {func(t *testing.T, m *machine) { m.add(t, "sda", 512); clear(m.disks["sda"][:mib]) }, "/dev/sda2"},
		"two disks":            {func(t *testing.T, m *machine) { m.add(t, "sda", 512); m.add(t, "sdb", 512) }, "root-twice"},
		"a loop device":        {func(t *testing.T, m *machine) { m.add(t, "loop0", 512) }, ""},
		"no table":             {func(t *testing.T, m *machine) { m.add(t, "sda", 512); clear(m.disks["sda"]) }, ""},
		"an empty drive":       {func(t *testing.T, m *machine) { m.sys["sr0/size"] = &fstest.MapFile{Data: []byte("0\n")} }, ""},
		"kernel not ready":     {func(t *testing.T, m *machine) { m.add(t, "sda", 512); delete(m.sys, "sda/sda2/start") }, ""},
		"kernel sees it moved": {func(t *testing.T, m *machine) { m.add(t, "sda", 512); m.sys["sda/sda2/start"].Data = []byte("9\n") }, "root-table"},
		"kernel sees it cut":   {func(t *testing.T, m *machine) { m.add(t, "sda", 512); m.sys["sda/sda2/size"].Data = []byte("9\n") }, "root-table"},
	} {
		m := &machine{sys: fstest.MapFS{}, disks: map[string][]byte{}}
		c.make(t, m)
		s, err := onDisk(m.sys, m.open, testRoot)
		var r *refusal
		switch {
		case errors.As(err, &r) && r.code == c.want:
		case err == nil && s == nil && c.want == "":
		case err == nil && s != nil && s.root == c.want && s.slot == layout.NumberRootA && strings.HasPrefix(s.root, s.disk):
		default:
			t.Errorf("%s: %+v, %v; want %q", name, s, err, c.want)
		}
	}
	m := &machine{sys: fstest.MapFS{}, disks: map[string][]byte{}}
	m.add(t, "sda", 512)
	large := testRoot
	large.DataBlocks = 3000 // the slot has 2048
	var r *refusal
	if s, err := onDisk(m.sys, m.open, large); !errors.As(err, &r) || r.code != "root-short" {
		t.Errorf("a partition that is too small: %+v, %v", s, err)
	}
}

func TestRefusalIsOneLine(t *testing.T) {
	t.Parallel()
	r := &refusal{"root-changed", "系统已被改动", "the root is not what was signed", io.ErrUnexpectedEOF}
	if got := r.Error(); got != "REFUSED [root-changed] the root is not what was signed: unexpected EOF" {
		t.Error(got)
	}
}

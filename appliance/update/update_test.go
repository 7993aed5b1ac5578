package update_test

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/smx509"

	"yinjian/appliance/problem"
	"yinjian/appliance/update"
	"yinjian/appliance/update/updatetest"
	"yinjian/iso/layout"
)

// A memory is a disk; what was written since the last Sync is lost, or in part, when the power goes.
type memory struct {
	disk   []byte
	left   int // writes until the power goes; negative: never
	read   int64
	wrote  int64
	before []written // what stood where something was written since the last Sync
}

type written struct {
	at  int64
	was []byte
}

// lose is the power cut: of what was not synced each nth write, from the last, never was.
func (m *memory) lose(nth int) {
	for i, w := range slices.Backward(m.before) {
		if (len(m.before)-1-i)%nth == 0 {
			copy(m.disk[w.at:], w.was)
		}
	}
	m.before, m.left = nil, -1
}

var errPower = errors.New("the power is gone")

func (m *memory) ReadAt(p []byte, at int64) (int, error) {
	m.read += int64(len(p))
	return bytes.NewReader(m.disk).ReadAt(p, at)
}

func (m *memory) WriteAt(p []byte, at int64) (int, error) {
	switch {
	case m.left == 0:
		return 0, errPower
	case m.left == 1: // torn
		p = p[:len(p)/2]
	}
	m.left--
	m.wrote += int64(len(p))
	m.before = append(m.before, written{at, bytes.Clone(m.disk[at : at+int64(len(p))])})
	copy(m.disk[at:], p)
	if m.left == 0 {
		return len(p), errPower
	}
	return len(p), nil
}

func (m *memory) Sync() error {
	if m.left == 0 {
		return errPower
	}
	m.before = nil
	return nil
}

// A machine is a disk with an installed image, and what the boot loader does.
type machine struct {
	t       *testing.T
	disk    *memory
	esp     string
	release *sm2.PrivateKey
	images  map[uint64]*updatetest.Release
	wanted  map[uint64]uint64 // floors of what was committed, by index
}

func install(t *testing.T, index uint64) *machine {
	t.Helper()
	m := &machine{t: t, esp: t.TempDir(), release: updatetest.Key(t), images: map[uint64]*updatetest.Release{}, wanted: map[uint64]uint64{}}
	m.disk = &memory{disk: m.build(index).Install(t, m.esp), left: -1}
	return m
}

func (m *machine) build(index uint64) *updatetest.Release {
	r := updatetest.New(m.t, index)
	m.images[index] = r
	return r
}

func (m *machine) bundle(r *updatetest.Release) []byte {
	return r.Bundle(m.t, map[string]*sm2.PrivateKey{update.ByRelease: m.release})
}

// boot is what boot loader and init do: the newest entry with tries left, whose root is there and whole. It answers the image and
// its slot.
func (m *machine) boot() (uint64, int) {
	m.t.Helper()
	dir := filepath.Join(m.esp, filepath.FromSlash(layout.EntryDir))
	for range 10 {
		files, err := os.ReadDir(dir)
		if err != nil {
			m.t.Fatal(err)
		}
		var entries []layout.Entry
		for _, f := range files {
			if e, err := layout.ParseEntry(f.Name()); err == nil && !e.Failed() {
				entries = append(entries, e)
			}
		}
		if len(entries) == 0 {
			m.t.Fatal("nothing to start")
		}
		slices.SortFunc(entries, func(a, b layout.Entry) int { return int(b.Index) - int(a.Index) })
		e := entries[0]
		if e.Counted {
			tried := e
			tried.Left--
			tried.Done++
			if err := os.Rename(filepath.Join(dir, e.String()), filepath.Join(dir, tried.String())); err != nil {
				m.t.Fatal(err)
			}
			e = tried
		}
		kernel, err := os.ReadFile(filepath.Join(dir, e.String()))
		if err != nil {
			m.t.Fatal(err)
		}
		line, err := update.CommandLine(kernel)
		if err != nil {
			m.t.Fatal(err)
		}
		table, err := layout.ReadTable(m.disk, int64(len(m.disk.disk)))
		if err != nil {
			m.t.Fatal(err)
		}
		if n := table.ByUUID(line.Root.PartitionUUID()); n != 0 {
			at := table.Offset(table.Partitions[n-1])
			if layout.Check(bytes.NewReader(m.disk.disk[at:at+updatetest.SlotBytes]), line.Root) == nil {
				return e.Index, n
			}
		}
		if !e.Counted {
			m.t.Fatalf("image %d is called good and does not start", e.Index)
		}
	}
	m.t.Fatal("it does not come to an end")
	return 0, 0
}

// updater is that of the image which the machine starts.
func (m *machine) updater(change ...func(*update.Config)) *update.Updater {
	m.t.Helper()
	index, slot := m.boot()
	cfg := update.Config{Device: m.disk, Size: int64(len(m.disk.disk)), ESP: m.esp, Running: updatetest.Image(index), Slot: slot, Keys: update.Keys{Release: &m.release.PublicKey}, Wanted: m.wanted[index]}
	for _, f := range change {
		f(&cfg)
	}
	u, err := update.New(cfg)
	if err != nil {
		m.t.Fatal(err)
	}
	return u
}

// want is what an agent keeps of a commit.
func (m *machine) want(o *update.Offer) error {
	m.wanted[o.Index] = o.Manifest.Floor
	return nil
}

func (m *machine) mustStage(u *update.Updater, bundle []byte) *update.Offer {
	m.t.Helper()
	o, err := u.Stage(m.t.Context(), bytes.NewReader(bundle))
	if err != nil {
		m.t.Fatal(err)
	}
	return o
}

// lose takes a file of ours away.
func (m *machine) lose(name string) {
	m.t.Helper()
	if err := os.Remove(filepath.Join(m.esp, layout.MediaDir, name)); err != nil {
		m.t.Fatal(err)
	}
}

func wantCode(t *testing.T, err error, code problem.Code, words string) {
	t.Helper()
	var p *problem.Problem
	if !errors.As(err, &p) || p.Code != code || !strings.Contains(p.Error(), words) || p.Next == "" {
		t.Errorf("err = %v, want %s with %q", err, code, words)
	}
}

// From one image to the next and on to the one after it, through both slots.
func TestUpdate(t *testing.T) {
	t.Parallel()
	m := install(t, 1)
	for index := uint64(2); index <= 4; index++ {
		u := m.updater()
		r := m.build(index)
		r.Manifest.Floor = index - 1
		m.disk.read, m.disk.wrote = 0, 0
		o := m.mustStage(u, m.bundle(r))
		if extra := m.disk.wrote - int64(len(r.Root)); extra < 0 || extra > 200<<10 || m.disk.read > 200<<10 {
			t.Errorf("%d bytes read and %d written beside the root's", m.disk.read, extra)
		}
		if now, _ := m.boot(); now != index-1 {
			t.Fatalf("what is staged only starts: %d", now)
		}
		if s, err := u.Status(); err != nil || s.Staged == nil || s.Staged.Index != index || s.Staged.SM3 != o.SM3 || s.Committed != nil || !s.Good {
			t.Errorf("status %+v, %v", s, err)
		}
		_, err := u.Commit(strings.Repeat("0", 64), m.want)
		wantCode(t, err, problem.WrongState, o.SM3)
		if _, err := u.Commit(o.SM3, m.want); err != nil {
			t.Fatal(err)
		}
		if s, err := u.Status(); err != nil || s.Committed == nil || s.Committed.Index != index || s.Staged != nil {
			t.Errorf("status %+v, %v", s, err)
		}
		_, err = u.Stage(t.Context(), bytes.NewReader(m.bundle(m.build(9))))
		wantCode(t, err, problem.WrongState, "等待重启")
		next := m.updater()
		s, err := next.Status()
		if err != nil || s.Running != index || s.Good || s.Behind != index-1 || s.Committed != nil {
			t.Fatalf("status %+v, %v", s, err)
		}
		_, err = next.Stage(t.Context(), bytes.NewReader(m.bundle(m.build(9))))
		wantCode(t, err, problem.WrongState, "尚未证明")
		keep := func(uint64) error { return errPower } // a good image has its floor on the disk
		if _, err := next.MarkGood(keep); !errors.Is(err, errPower) {
			t.Error(err)
		}
		if s, err := next.Status(); err != nil || s.Good || s.Floor != 0 {
			t.Errorf("status %+v, %v", s, err)
		}
		var kept uint64
		keep = func(floor uint64) error { kept = floor; return nil }
		for range 2 {
			if floor, err := next.MarkGood(keep); err != nil || floor != index-1 || kept != floor {
				t.Errorf("floor %d, %d kept, %v", floor, kept, err)
			}
		}
		if s, err := next.Status(); err != nil || !s.Good || s.Floor != index-1 {
			t.Errorf("status %+v, %v", s, err)
		}
	}
	if now, _ := m.boot(); now != 4 {
		t.Errorf("image %d starts", now)
	}
}

// An image that does not start is left after its tries, and the one before it is there, unharmed. It is not taken again.
func TestFallsBack(t *testing.T) {
	t.Parallel()
	m := install(t, 1)
	u := m.updater()
	bad := m.bundle(m.build(2))
	o := m.mustStage(u, bad)
	if _, err := u.Commit(o.SM3, m.want); err != nil {
		t.Fatal(err)
	}
	table, err := layout.ReadTable(m.disk, int64(len(m.disk.disk)))
	if err != nil {
		t.Fatal(err)
	}
	m.disk.disk[table.Offset(table.Partitions[layout.NumberRootB-1])+12345] ^= 1
	u = m.updater()
	s, err := u.Status()
	if err != nil || s.Running != 1 || !slices.Equal(s.Failed, []uint64{2}) || s.Committed != nil || !s.Good {
		t.Fatalf("status %+v, %v", s, err)
	}
	_, err = u.Stage(t.Context(), bytes.NewReader(bad))
	wantCode(t, err, problem.InvalidRequest, "已试过")
	m.mustStage(u, m.bundle(m.build(3)))
}

// Three cuts of the power while an image waits for whoever unlocks it are no fault of the image: once somebody has said so it is
// admitted again.
func TestTriedAgain(t *testing.T) {
	t.Parallel()
	m := install(t, 1)
	u := m.updater()
	bundle := m.bundle(m.build(2))
	if _, err := u.Commit(m.mustStage(u, bundle).SM3, m.want); err != nil {
		t.Fatal(err)
	}
	for range layout.Tries {
		if now, _ := m.boot(); now != 2 {
			t.Fatalf("image %d starts", now)
		}
	}
	u = m.updater()
	_, err := u.Stage(t.Context(), bytes.NewReader(bundle))
	wantCode(t, err, problem.InvalidRequest, "已试过")
	if o, err := u.Cancel(""); err != nil || o.Index != 2 {
		t.Fatalf("%+v, %v", o, err)
	}
	if s, err := u.Status(); err != nil || len(s.Failed) > 0 || s.Running != 1 || !s.Good {
		t.Errorf("status %+v, %v", s, err)
	}
	if _, err := u.Commit(m.mustStage(u, bundle).SM3, m.want); err != nil {
		t.Fatal(err)
	}
	if now, _ := m.boot(); now != 2 {
		t.Errorf("image %d starts", now)
	}
}

// The floor that an image brings holds once it is good, whatever has become of its manifest on the FAT since the commit, and whichever
// keys are asked for by then. Where it cannot be kept nothing is committed.
func TestFloorOutlivesTheManifest(t *testing.T) {
	t.Parallel()
	other := updatetest.Key(t)
	for name, change := range map[string]func(m *machine, c *update.Config){
		"another release key":      func(_ *machine, c *update.Config) { c.Keys.Release = &other.PublicKey },
		"a hospital's key since":   func(_ *machine, c *update.Config) { c.Keys.Hospital = &other.PublicKey },
		"a manifest that was lost": func(m *machine, _ *update.Config) { m.lose("staged.json") },
	} {
		m := install(t, 1)
		r := m.build(2)
		r.Manifest.Floor = 2
		u := m.updater()
		o := m.mustStage(u, m.bundle(r))
		if _, err := u.Commit(o.SM3, func(*update.Offer) error { return errPower }); !errors.Is(err, errPower) {
			t.Errorf("%s: err = %v", name, err)
		}
		if now, _ := m.boot(); now != 1 {
			t.Fatalf("%s: image %d starts though its floor is not kept", name, now)
		}
		if _, err := u.Commit(o.SM3, m.want); err != nil {
			t.Fatal(err)
		}
		next := m.updater(func(c *update.Config) { change(m, c) })
		var kept uint64
		if floor, err := next.MarkGood(func(floor uint64) error { kept = floor; return nil }); err != nil || floor != 2 || kept != 2 {
			t.Errorf("%s: floor %d, %d kept, %v", name, floor, kept, err)
		}
		if s, err := next.Status(); err != nil || !s.Good || s.Floor != 2 || s.Behind != 0 {
			t.Errorf("%s: status %+v, %v", name, s, err)
		}
	}
}

// A floor above what runs, as a newer image left it that did not last, takes nothing away that runs.
func TestFloorAboveWhatRuns(t *testing.T) {
	t.Parallel()
	m := install(t, 1)
	u := m.updater(func(c *update.Config) { c.Floor = 2 })
	if _, err := u.MarkGood(func(uint64) error { return nil }); err != nil {
		t.Fatal(err)
	}
	if now, _ := m.boot(); now != 1 {
		t.Errorf("image %d starts", now)
	}
}

func TestCancel(t *testing.T) {
	t.Parallel()
	m := install(t, 1)
	u := m.updater()
	_, err := u.Cancel("")
	wantCode(t, err, problem.WrongState, "没有可取消")
	_, err = u.Commit("", m.want)
	wantCode(t, err, problem.WrongState, "没有写好")
	for _, committed := range []bool{false, true} {
		o := m.mustStage(u, m.bundle(m.build(2)))
		_, err := u.Cancel(strings.Repeat("0", 64))
		wantCode(t, err, problem.WrongState, o.SM3)
		if committed {
			if _, err := u.Commit(o.SM3, m.want); err != nil {
				t.Fatal(err)
			}
		}
		if got, err := u.Cancel(""); err != nil || got.Index != 2 {
			t.Errorf("%+v, %v", got, err)
		}
		if s, err := u.Status(); err != nil || s.Staged != nil || s.Committed != nil || s.Running != 1 {
			t.Errorf("status %+v, %v", s, err)
		}
		if now, _ := m.boot(); now != 1 {
			t.Errorf("image %d starts", now)
		}
	}
}

// What lies there under the staged kernel's name is published only if it still is what was signed.
func TestStagedKernelIsReadAgain(t *testing.T) {
	t.Parallel()
	for name, damage := range map[string]func([]byte) []byte{
		"cut short": func(b []byte) []byte { return b[:len(b)/2] },
		"empty":     func([]byte) []byte { return nil },
		"one bit":   func(b []byte) []byte { b[len(b)-1] ^= 1; return b },
	} {
		m := install(t, 1)
		u := m.updater()
		bundle := m.bundle(m.build(2))
		o := m.mustStage(u, bundle)
		file := filepath.Join(m.esp, layout.MediaDir, "staged.efi")
		kernel, err := os.ReadFile(file)
		if err == nil {
			err = os.WriteFile(file, damage(kernel), 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		_, err = u.Commit(o.SM3, m.want)
		wantCode(t, err, problem.InvalidRequest, "已丢弃")
		if s, err := u.Status(); err != nil || s.Staged != nil || s.Committed != nil || len(m.wanted) > 0 {
			t.Errorf("%s: status %+v, %v", name, s, err)
		}
		if now, _ := m.boot(); now != 1 {
			t.Errorf("%s: image %d starts", name, now)
		}
		if _, err := u.Commit(m.mustStage(u, bundle).SM3, m.want); err != nil {
			t.Error(err)
		}
	}
}

// What is not admitted is refused before the first byte is written.
func TestRefusedBundles(t *testing.T) {
	t.Parallel()
	m := install(t, 5)
	u := m.updater(func(c *update.Config) { c.Floor = 7 })
	other := updatetest.Key(t)
	forged, running := m.build(8), *m.images[5] // what is built anew has another root
	for name, row := range map[string]struct {
		bundle func() []byte
		code   problem.Code
		words  string
	}{
		"nobody's":         {func() []byte { return m.build(8).Bundle(t, nil) }, problem.Forbidden, "发布方"},
		"somebody else's":  {func() []byte { return m.build(8).Bundle(t, map[string]*sm2.PrivateKey{update.ByRelease: other}) }, problem.Forbidden, "发布方"},
		"under another by": {func() []byte { return m.build(8).Bundle(t, map[string]*sm2.PrivateKey{update.ByHospital: m.release}) }, problem.Forbidden, "发布方"},
		"manifest changed": {func() []byte {
			return bytes.Replace(m.bundle(forged), []byte(`"index":8`), []byte(`"index":9`), 1)
		}, problem.Forbidden, "发布方"},
		"the same":     {func() []byte { return m.bundle(m.build(5)) }, problem.InvalidRequest, "不高于"},
		"older":        {func() []byte { return m.bundle(m.build(4)) }, problem.InvalidRequest, "不高于"},
		"below floor":  {func() []byte { return m.bundle(m.build(6)) }, problem.InvalidRequest, "下限"},
		"too far":      {func() []byte { r := m.build(9); r.Manifest.MinIndex = 6; return m.bundle(r) }, problem.InvalidRequest, "先升级"},
		"architecture": {func() []byte { r := m.build(9); r.Manifest.Image.Arch = "arm64"; return m.bundle(r) }, problem.InvalidRequest, "架构"},
		"base":         {func() []byte { r := m.build(9); r.Manifest.Image.Base = "kylin"; return m.bundle(r) }, problem.InvalidRequest, "底座"},
		"variant":      {func() []byte { r := m.build(9); r.Manifest.Image.Variant = layout.Release; return m.bundle(r) }, problem.InvalidRequest, "评估版"},
		"same root": {func() []byte {
			r := running
			r.Manifest.Image = updatetest.Image(9)
			return m.bundle(&r)
		}, problem.InvalidRequest, "同一个根"},
		"no bundle": {func() []byte { return []byte("PK\x03\x04 not a tar") }, problem.InvalidRequest, "升级包"},
		"empty":     {func() []byte { return nil }, problem.InvalidRequest, "升级包"},
		"long manifest": {func() []byte {
			var b bytes.Buffer
			w := tar.NewWriter(&b)
			w.WriteHeader(&tar.Header{Name: "manifest.json", Size: 1 << 40, Typeflag: tar.TypeReg})
			return b.Bytes()
		}, problem.InvalidRequest, "manifest.json"},
	} {
		m.disk.wrote = 0
		_, err := u.Stage(t.Context(), bytes.NewReader(row.bundle()))
		wantCode(t, err, row.code, row.words)
		if m.disk.wrote != 0 {
			t.Errorf("%s: %d bytes were written", name, m.disk.wrote)
		}
	}
	// The hospital's key, where there is one, is needed as well.
	hospital := updatetest.Key(t)
	u = m.updater(func(c *update.Config) { c.Keys.Hospital = &hospital.PublicKey })
	_, err := u.Stage(t.Context(), bytes.NewReader(m.bundle(m.build(9))))
	wantCode(t, err, problem.Forbidden, "医院")
	m.mustStage(u, m.build(9).Bundle(t, map[string]*sm2.PrivateKey{update.ByRelease: m.release, update.ByHospital: hospital}))
}

// What is damaged behind its signed manifest is found, and what was running starts.
func TestDamagedBundles(t *testing.T) {
	t.Parallel()
	m := install(t, 1)
	r := m.build(2)
	whole := m.bundle(r)
	root, kernel := bytes.Index(whole, r.Root[:512]), bytes.Index(whole, r.Kernel)
	flip := func(at int) []byte { b := bytes.Clone(whole); b[at] ^= 1; return b }
	signed := func(change func(*updatetest.Release)) []byte { c := *r; change(&c); return m.bundle(&c) }
	for name, bundle := range map[string][]byte{
		"root, first byte": flip(root), "root, last byte": flip(root + len(r.Root) - 1), "kernel": flip(kernel + len(r.Kernel) - 1),
		"cut in the root": whole[:root+1000], "cut in the kernel": whole[:kernel+10], "cut before the kernel": whole[:kernel-512],
		"a hash tree that is wrong though signed": signed(func(c *updatetest.Release) {
			c.Root = bytes.Clone(c.Root)
			c.Root[len(c.Root)-1] ^= 1
			c.Manifest.Root.File = updatetest.FileOf(c.Root)
		}),
		"a root hash that is not the root's": signed(func(c *updatetest.Release) { c.Manifest.Root.Hash = strings.Repeat("ab", 32) }),
		"a kernel that starts another root": signed(func(c *updatetest.Release) {
			c.Kernel = updatetest.New(t, 2).Kernel
			c.Manifest.Kernel = updatetest.FileOf(c.Kernel)
		}),
		"a kernel for the installation medium": signed(func(c *updatetest.Release) {
			c.Kernel = updatetest.Unified(layout.CommandLine{Root: c.Layout, Media: layout.MediaISO}.String())
			c.Manifest.Kernel = updatetest.FileOf(c.Kernel)
		}),
		"a kernel that is none": signed(func(c *updatetest.Release) { c.Kernel = []byte("MZ"); c.Manifest.Kernel = updatetest.FileOf(c.Kernel) }),
	} {
		u := m.updater()
		_, err := u.Stage(t.Context(), bytes.NewReader(bundle))
		wantCode(t, err, problem.InvalidRequest, "升级包")
		s, err := u.Status()
		if err != nil || s.Staged != nil || s.Committed != nil {
			t.Errorf("%s: status %+v, %v", name, s, err)
		}
		_, err = u.Commit("", m.want)
		wantCode(t, err, problem.WrongState, "没有写好")
		if now, _ := m.boot(); now != 1 {
			t.Errorf("%s: image %d starts", name, now)
		}
	}
	m.mustStage(m.updater(), whole)
}

// The power goes at every write and every step between, with the write torn: what was running starts, and the update is made
// afterwards as if nothing had been.
func TestPowerCuts(t *testing.T) {
	t.Parallel()
	m := install(t, 1)
	m.build(2)
	bundle := m.bundle(m.images[2])
	for nth := range 3 { // all that was not synced is lost, or in part
		for writes, done := 1, false; !done; writes++ {
			u := m.updater()
			m.disk.left = writes
			_, err := u.Stage(t.Context(), bytes.NewReader(bundle))
			done = m.disk.left > 0
			if (err == nil) != done {
				t.Fatalf("%d writes: %v", writes, err)
			}
			m.disk.lose(nth + 1)
			if now, _ := m.boot(); now != 1 {
				t.Fatalf("%d writes: image %d starts", writes, now)
			}
			if s, err := m.updater().Status(); err != nil || done && s.Staged == nil || s.Staged != nil && layoutOf(m, s.Staged) != nil {
				t.Fatalf("%d writes: status %+v, %v", writes, s, err)
			}
		}
	}
	steps := 0
	for _, at := range []string{"entries", "table", "root", "staged.json", "staged.sig", "staged.efi"} {
		u := m.updater()
		if _, err := u.Cancel(""); err != nil && steps == 0 { // what the last round left
			t.Fatal(err)
		}
		u.Stop(func(step string) error {
			if step == at {
				steps++
				return errPower
			}
			return nil
		})
		if _, err := u.Stage(t.Context(), bytes.NewReader(bundle)); !errors.Is(err, errPower) {
			t.Fatalf("%s: %v", at, err)
		}
		s, err := m.updater().Status()
		if now, _ := m.boot(); now != 1 || err != nil || s.Staged != nil {
			t.Fatalf("%s: image %d starts, %+v, %v", at, now, s, err)
		}
	}
	if steps != 6 {
		t.Errorf("%d steps", steps)
	}
	u := m.updater()
	o := m.mustStage(u, bundle)
	if _, err := u.Commit(o.SM3, m.want); err != nil {
		t.Fatal(err)
	}
	if now, _ := m.boot(); now != 2 {
		t.Errorf("image %d starts", now)
	}
}

// layoutOf is an error unless the idle slot holds that offer's root, whole.
func layoutOf(m *machine, o *update.Offer) error {
	root, err := o.Manifest.Root.Layout()
	if err != nil {
		return err
	}
	table, err := layout.ReadTable(m.disk, int64(len(m.disk.disk)))
	if err != nil {
		return err
	}
	at := table.Offset(table.Partitions[layout.NumberRootB-1])
	return layout.Check(bytes.NewReader(m.disk.disk[at:at+updatetest.SlotBytes]), root)
}

// Whoever sends slowly, or goes, holds nobody up for ever and leaves nothing staged.
func TestStageEnds(t *testing.T) {
	t.Parallel()
	m := install(t, 1)
	u := m.updater()
	bundle := m.bundle(m.build(2))
	ctx, stop := context.WithCancel(t.Context())
	r, w := io.Pipe()
	ended := make(chan error, 1)
	go func() { _, err := u.Stage(ctx, r); ended <- err }()
	if _, err := w.Write(bundle[:100_000]); err != nil {
		t.Fatal(err)
	}
	_, err := u.Stage(t.Context(), bytes.NewReader(bundle))
	wantCode(t, err, problem.WrongState, "正在进行")
	_, err = u.Commit("", m.want)
	wantCode(t, err, problem.WrongState, "正在进行")
	if s, err := u.Status(); err != nil || s.Staged != nil || s.Running != 1 { // it waits for nobody
		t.Errorf("status %+v, %v", s, err)
	}
	stop()
	w.CloseWithError(io.ErrUnexpectedEOF)
	if err := <-ended; err == nil {
		t.Error("half a bundle was staged")
	}
	if s, err := u.Status(); err != nil || s.Staged != nil {
		t.Errorf("status %+v, %v", s, err)
	}
	m.mustStage(u, bundle)
	// What is not known to be signed holds nobody up at all.
	r, w = io.Pipe()
	go func() { _, err := u.Stage(t.Context(), r); ended <- err }()
	if _, err := w.Write(bundle[:100]); err != nil {
		t.Fatal(err)
	}
	m.mustStage(u, bundle)
	w.CloseWithError(io.ErrUnexpectedEOF)
	if err := <-ended; err == nil {
		t.Error("the head of a bundle was staged")
	}
}

// Strangers read a bundle by the commands of docs/update.md, also where the hospital has signed before the release key.
func TestStrangers(t *testing.T) {
	t.Parallel()
	for _, tool := range []string{"openssl", "tar", "python3"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skip(err)
		}
	}
	page, err := os.ReadFile("../../docs/update.md")
	if err != nil {
		t.Fatal(err)
	}
	_, script, _ := strings.Cut(string(page), "```sh\n")
	script, _, found := strings.Cut(script, "```")
	if !found {
		t.Fatal("the page has no commands")
	}
	m := install(t, 1)
	r := m.build(2)
	raw, err := json.Marshal(r.Manifest)
	if err != nil {
		t.Fatal(err)
	}
	var signatures []update.Signature
	for _, by := range []struct {
		who string
		key *sm2.PrivateKey
	}{{update.ByHospital, updatetest.Key(t)}, {update.ByRelease, m.release}} {
		value, err := by.key.SignWithSM2(rand.Reader, nil, update.Signed(raw))
		if err != nil {
			t.Fatal(err)
		}
		signatures = append(signatures, update.Signature{By: by.who, Value: value})
	}
	var bundle bytes.Buffer
	if err := update.Create(&bundle, raw, signatures, bytes.NewReader(r.Root), bytes.NewReader(r.Kernel)); err != nil {
		t.Fatal(err)
	}
	der, err := smx509.MarshalPKIXPublicKey(&m.release.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for name, data := range map[string][]byte{"release.pem": pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), "BUNDLE": bundle.Bytes()} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	run := func(script string) string {
		t.Helper()
		c := exec.Command("sh", "-ec", script)
		c.Dir = dir
		out, err := c.CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return string(out)
	}
	o := m.mustStage(m.updater(), bundle.Bytes())
	if out := run(script); !strings.Contains(out, o.SM3) || !strings.Contains(out, "Verified OK") {
		t.Errorf("%s", out)
	}
	run("tar -xf BUNDLE")
	if got, err := os.ReadFile(filepath.Join(dir, "root.img")); err != nil || !bytes.Equal(got, r.Root) {
		t.Errorf("tar's root differs: %v", err)
	}
}

func FuzzOpen(f *testing.F) {
	release := updatetest.Key(f)
	r := updatetest.New(f, 2)
	whole := r.Bundle(f, map[string]*sm2.PrivateKey{update.ByRelease: release})
	f.Add(whole[:4096])
	f.Add(whole[:1000])
	f.Add([]byte(update.Format))
	f.Fuzz(func(t *testing.T, data []byte) {
		b, err := update.Open(bytes.NewReader(data), update.Keys{Release: &release.PublicKey})
		if err == nil && !bytes.Equal(b.Raw, whole[512:512+len(b.Raw)]) {
			t.Errorf("a manifest that nobody signed is believed: %q", b.Raw)
		}
	})
}

func FuzzCommandLine(f *testing.F) {
	f.Add(updatetest.New(f, 2).Kernel)
	f.Fuzz(func(t *testing.T, kernel []byte) {
		line, err := update.CommandLine(kernel)
		if err == nil && line.Root.Validate() != nil {
			t.Errorf("%+v", line)
		}
	})
}

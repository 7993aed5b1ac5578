package pack_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/emmansun/gmsm/sm2"

	"yinjian/appliance/pack"
	"yinjian/appliance/problem"
	"yinjian/iso/layout"
)

// unpacked mounts by unpacking: what a keeper does before and after a mount can be seen without root.
type unpacked struct {
	t testing.TB

	mu   sync.Mutex
	busy bool // guarded by mu
}

func (u *unpacked) Mount(file *os.File, start int64, root layout.Root, _, at string) error {
	image := filepath.Join(u.t.TempDir(), "image")
	b := make([]byte, root.Blocks()*layout.BlockSize)
	if _, err := file.ReadAt(b, start); err != nil {
		return err
	}
	if err := os.WriteFile(image, b, 0o600); err != nil {
		return err
	}
	if out, err := exec.Command("unsquashfs", "-q", "-n", "-f", "-d", at, image).CombinedOutput(); err != nil {
		return fmt.Errorf("unsquashfs: %w\n%s", err, out)
	}
	return nil
}

func (u *unpacked) Unmount(at string) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.busy && filepath.Base(at) != "staged.new" {
		return pack.ErrBusy
	}
	entries, err := os.ReadDir(at)
	for _, e := range entries {
		err = errors.Join(err, os.RemoveAll(filepath.Join(at, e.Name())))
	}
	return err
}

func (u *unpacked) use(busy bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.busy = busy
}

// A place is an appliance's packs.
type place struct {
	t       *testing.T
	m       *made
	dir     string
	mounter *unpacked
}

func newPlace(t *testing.T) *place {
	t.Helper()
	if _, err := exec.LookPath("unsquashfs"); err != nil {
		t.Skip("unsquashfs is not installed (Debian squashfs-tools)")
	}
	return &place{t, newMade(t), t.TempDir(), &unpacked{t: t}}
}

// keeper is an agent that starts.
func (p *place) keeper(files pack.Files) *pack.Keeper {
	p.t.Helper()
	if err := os.RemoveAll(filepath.Join(p.dir, "run")); err != nil { // the machine has started anew
		p.t.Fatal(err)
	}
	return p.keeperWith(files, true)
}

func (p *place) keeperWith(files pack.Files, asked bool) *pack.Keeper {
	p.t.Helper()
	k, err := pack.NewKeeper(pack.KeeperConfig{
		Asked: asked,
		Dir:   filepath.Join(p.dir, "packs"), Mounts: filepath.Join(p.dir, "run"), Keys: p.m.keys, KeyFile: filepath.Join(p.dir, "hospital.pem"),
		Arch: runtime.GOARCH, Verity: "sm3", Mounter: p.mounter, Files: files,
	})
	if err != nil {
		p.t.Fatal(err)
	}
	return k
}

func (p *place) pack(serial uint64) []byte {
	p.t.Helper()
	return sign(p.t, build(p.t, content(p.t, serial)), p.m.private)
}

func (p *place) install(k *pack.Keeper, file []byte) (*pack.Installed, error) {
	p.t.Helper()
	i, err := k.Stage(p.t.Context(), bytes.NewReader(file))
	if err != nil {
		return nil, err
	}
	return k.Install(i.SM3)
}

// files are what lies in the folder.
func (p *place) files() string {
	p.t.Helper()
	found, err := os.ReadDir(filepath.Join(p.dir, "packs"))
	if err != nil {
		p.t.Fatal(err)
	}
	var names []string
	for _, e := range found {
		names = append(names, e.Name())
	}
	return strings.Join(names, " ")
}

// A pack is installed, found again after a start, replaced by a newer one and by no older, kept while it is used, and removed so
// that nothing is left.
func TestKeeper(t *testing.T) {
	t.Parallel()
	p := newPlace(t)
	k := p.keeper(nil)
	three := p.pack(3)
	i, err := p.install(k, three)
	if err != nil || i.Serial != 3 || len(i.Signers) != 2 || i.Folder == "" || i.Library != "lib/libvendor.so" || len(i.Folders) != 1 || i.Folders[0] != "lib" {
		t.Fatalf("%+v, %v", i, err)
	}
	if _, err := os.Stat(filepath.Join(i.Folder, "lib/libvendor.so")); err != nil {
		t.Error(err)
	}
	if got := p.files(); got != "vendor.pack" {
		t.Errorf("the folder holds %q", got)
	}
	k = p.keeper(nil)
	if s := k.State(); len(s.Packs) != 1 || s.Packs[0].SM3 != i.SM3 || s.Packs[0].Fault != "" || s.Staged != nil || s.Hospital != i.Signers[1].Key {
		t.Errorf("after a start: %+v", s)
	}
	_, err = k.Stage(t.Context(), bytes.NewReader(three))
	refused(t, err, problem.Exists, "不高于")
	_, err = k.Stage(t.Context(), bytes.NewReader(p.pack(2)))
	refused(t, err, problem.Exists, "不高于")

	p.mounter.use(true)
	four := p.pack(4)
	_, err = p.install(k, four)
	refused(t, err, problem.WrongState, "正在使用")
	_, err = k.Remove("vendor")
	refused(t, err, problem.WrongState, "正在使用")
	p.mounter.use(false)
	staged, err := k.Stage(t.Context(), bytes.NewReader(four))
	if err != nil {
		t.Fatal(err)
	}
	_, err = k.Install(strings.Repeat("0", 64))
	refused(t, err, problem.WrongState, staged.SM3)
	if i, err = k.Install(staged.SM3); err != nil || i.Serial != 4 {
		t.Fatalf("%+v, %v", i, err)
	}
	_, err = k.Install(staged.SM3)
	refused(t, err, problem.WrongState, "没有")

	if _, err := k.Remove("vendor"); err != nil {
		t.Fatal(err)
	}
	_, err = k.Remove("vendor")
	refused(t, err, problem.NotFound, "没有")
	if left, err := os.ReadDir(filepath.Join(p.dir, "run")); p.files() != "" || err != nil || len(left) != 0 {
		t.Errorf("left: %q, %v, %v", p.files(), left, err)
	}
	if _, err := p.install(k, three); err != nil { // an older one, once the newer is gone
		t.Error(err)
	}
}

// What is not for this appliance, or lies there changed, is not mounted, and hinders no other.
func TestKeeperRefuses(t *testing.T) {
	t.Parallel()
	p := newPlace(t)
	k := p.keeper(nil)
	other := content(t, 3)
	other.Verity = "sha256"
	_, err := k.Stage(t.Context(), bytes.NewReader(sign(t, build(t, other), p.m.private)))
	refused(t, err, problem.InvalidRequest, "sha256")
	head, err := pack.Head(bytes.NewReader(p.m.file))
	if err != nil {
		t.Fatal(err)
	}
	says := func(change func(m *pack.Manifest)) []byte {
		t.Helper()
		m := *head.Manifest
		m.Files = slices.Clone(m.Files)
		change(&m)
		raw, err := m.Encode()
		if err != nil {
			t.Fatal(err)
		}
		var file bytes.Buffer
		if err := pack.WriteHead(&file, raw, []pack.Signature{}); err != nil {
			t.Fatal(err)
		}
		file.Write(p.m.file[head.Start:])
		return sign(t, file.Bytes(), p.m.private)
	}
	_, err = k.Stage(t.Context(), bytes.NewReader(says(func(m *pack.Manifest) { m.Arch = "loong64" })))
	refused(t, err, problem.InvalidRequest, "loong64")
	// Signed by both, and another tree in the image than it says: the older one stays, mounted.
	if _, err := p.install(k, p.pack(2)); err != nil {
		t.Fatal(err)
	}
	_, err = p.install(k, says(func(m *pack.Manifest) { m.Files[0].SM3 = m.Files[1].SM3 }))
	refused(t, err, problem.InvalidRequest, "vendor.conf")
	if s := k.State(); len(s.Packs) != 1 || s.Packs[0].Fault != "" || s.Packs[0].Serial != 2 || s.Packs[0].Folder == "" {
		t.Errorf("%+v", s)
	}
	if left, err := os.ReadDir(filepath.Join(p.dir, "run")); err != nil || len(left) != 1 {
		t.Errorf("mounted: %v, %v", left, err)
	}
	if _, err := k.Remove("vendor"); err != nil {
		t.Error(err)
	}
	changed := bytes.Clone(p.m.file)
	changed[len(changed)-5000] ^= 1
	_, err = k.Stage(t.Context(), bytes.NewReader(changed))
	refused(t, err, problem.InvalidRequest, "损坏")
	// Nobody reads on once the signatures are wrong.
	unsigned := io.MultiReader(bytes.NewReader(sign(t, p.m.file, nil)[:head.Start]), failing{errors.New("read on")})
	_, err = k.Stage(t.Context(), unsigned)
	refused(t, err, problem.Forbidden, "发布方")
	if got := p.files(); got != "" {
		t.Errorf("left: %q", got)
	}

	// A disk that keeps something else than it was given.
	_, err = p.keeper(forgetful{p.cable(1 << 20)}).Stage(t.Context(), bytes.NewReader(p.m.file))
	refused(t, err, problem.InvalidRequest, "损坏")
	if got := p.files(); got != "" {
		t.Errorf("left: %q", got)
	}
	k = p.keeper(nil)
	if _, err := p.install(k, p.m.file); err != nil {
		t.Fatal(err)
	}
	lies := func(name string, data []byte) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(p.dir, "packs", name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	lies("copied.pack", p.m.file)
	lies("damaged.pack", changed)
	lies("unsigned.pack", sign(t, p.m.file, map[string]*sm2.PrivateKey{pack.ByRelease: p.m.private[pack.ByRelease]}))
	lies("Other.pack", p.m.file)
	faults := map[string]string{"copied": "vendor", "damaged": "损坏", "unsigned": "医院", "vendor": ""}
	for _, one := range p.keeper(nil).State().Packs {
		if want, ok := faults[one.Name]; !ok || !strings.Contains(one.Fault, want) || (one.Fault == "") != (want == "") || (one.Folder == "") != (want != "") {
			t.Errorf("%+v, want %q", one, want)
		}
		delete(faults, one.Name)
	}
	if len(faults) > 0 {
		t.Errorf("not listed: %v", faults)
	}
}

// forgetful loses what is written last.
type forgetful struct{ *cable }

func (f forgetful) Create(name string) (pack.Written, error) {
	w, err := f.cable.Create(name)
	return losing{w, name}, err
}

type losing struct {
	pack.Written
	name string
}

func (l losing) Close() error {
	info, err := os.Stat(l.name)
	if err == nil {
		err = os.Truncate(l.name, info.Size()-1)
	}
	return errors.Join(err, l.Written.Close())
}

// While a pack comes slowly, be it signed or not, the rest goes on; another that is signed is refused until it is there.
func TestSlowUpload(t *testing.T) {
	t.Parallel()
	p := newPlace(t)
	k := p.keeper(nil)
	if _, err := p.install(k, p.pack(3)); err != nil {
		t.Fatal(err)
	}
	four := p.pack(4)
	for name, sent := range map[string][]byte{"its head": four[:10], "half of it": four[:len(four)-10]} {
		r, w := io.Pipe()
		ended := make(chan error, 1)
		go func() { _, err := k.Stage(t.Context(), r); ended <- err }()
		if _, err := w.Write(sent); err != nil {
			t.Fatal(err)
		}
		others := make(chan error, 1)
		go func() {
			k.State()
			_, err := k.Install(strings.Repeat("0", 64))
			_, other := k.Remove("other")
			others <- errors.Join(err, other)
		}()
		select {
		case err := <-others:
			refused(t, err, problem.WrongState, "没有")
		case <-time.After(2 * time.Minute):
			t.Fatalf("%s holds others up", name)
		}
		if len(sent) > 10 {
			_, err := k.Stage(t.Context(), bytes.NewReader(four))
			refused(t, err, problem.WrongState, "正在上传")
		}
		w.CloseWithError(io.ErrUnexpectedEOF)
		if err := <-ended; err == nil || k.State().Staged != nil {
			t.Errorf("%s was staged", name)
		}
	}
	if i, err := p.install(k, four); err != nil || i.Serial != 4 {
		t.Errorf("%+v, %v", i, err)
	}
}

// What there is to tell of the packs stays short enough for the agent's answer, however many folders they have.
func TestTold(t *testing.T) {
	t.Parallel()
	p := newPlace(t)
	k := p.keeper(nil)
	long := func(name string) []byte {
		t.Helper()
		c := content(t, 1)
		c.Manifest.Name = name
		for i := range 400 {
			c.Sources[fmt.Sprintf("lib/%s%d/a.so", strings.Repeat("x", 120)+"/"+strings.Repeat("x", 80), i)] = c.Sources["etc/vendor.conf"]
		}
		return sign(t, build(t, c), p.m.private)
	}
	if _, err := p.install(k, long("first")); err != nil {
		t.Fatal(err)
	}
	_, err := p.install(k, long("second"))
	refused(t, err, problem.InvalidRequest, "上限 128 KiB")
	if b, err := json.Marshal(k.State()); err != nil || len(b) > 256<<10 { // the agent's line
		t.Errorf("%d bytes, %v", len(b), err)
	}
	if _, err := p.install(k, p.pack(3)); err != nil {
		t.Error(err)
	}
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

var errPower = errors.New("the power is gone")

// A cable is pulled out after so many writes, the last of which is torn; with full, the volume is full from there on instead. What
// was not synced is lost when it is pulled out: what is in files, and with forgets what was done to names as well.
type cable struct {
	left    int
	full    bool
	forgets bool
	backups string
	undo    []func() error  // of what was done to names since the folder was synced
	dirty   map[string]bool // files that were not synced, by the names that they have now
}

func (c *cable) gone() error {
	if c.left--; c.left >= 0 {
		return nil
	}
	if c.full {
		return &os.PathError{Op: "write", Path: "x", Err: syscall.ENOSPC}
	}
	return errPower
}

// pull is the power cut itself.
func (c *cable) pull(t *testing.T) {
	t.Helper()
	for name := range c.dirty {
		if err := os.Truncate(name, 0); err != nil {
			t.Fatal(err)
		}
	}
	for _, undo := range slices.Backward(c.undo) {
		if err := undo(); err != nil {
			t.Fatal(err)
		}
	}
}

// backup answers another name of what bears one, "" for none.
func (c *cable) backup(name string) (string, error) {
	other := filepath.Join(c.backups, strconv.Itoa(len(c.undo)))
	err := os.Remove(other)
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		err = os.Link(name, other)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	return other, err
}

// did is what was done to a name, to be undone.
func (c *cable) did(undo func() error) {
	if c.forgets {
		c.undo = append(c.undo, undo)
	}
}

type torn struct {
	f *os.File
	c *cable
}

func (w torn) Write(b []byte) (int, error) {
	total := 0
	for len(b) > 0 { // in blocks, each a write
		part := b[:min(len(b), 16<<10)]
		if err := w.c.gone(); err != nil {
			n, _ := w.f.Write(part[:len(part)/2])
			return total + n, err
		}
		n, err := w.f.Write(part)
		if total += n; err != nil {
			return total, err
		}
		b = b[len(part):]
	}
	return total, nil
}

func (w torn) Sync() error {
	if err := w.c.gone(); err != nil {
		return err
	}
	delete(w.c.dirty, w.f.Name())
	return nil
}

func (w torn) Close() error { return w.f.Close() }

func (c *cable) Create(name string) (pack.Written, error) {
	if err := c.gone(); err != nil {
		return nil, err
	}
	f, err := os.Create(name)
	if err == nil {
		c.dirty[name] = true
		c.did(func() error { return os.Remove(name) })
	}
	return torn{f, c}, err
}

func (c *cable) Rename(from, to string) error {
	if err := c.gone(); err != nil {
		return err
	}
	before, err := c.backup(to)
	if err != nil {
		return err
	}
	if err := os.Rename(from, to); err != nil {
		return err
	}
	c.did(func() error {
		err := os.Rename(to, from)
		if before != "" {
			err = errors.Join(err, os.Rename(before, to))
		}
		return err
	})
	if delete(c.dirty, to); c.dirty[from] {
		delete(c.dirty, from)
		c.dirty[to] = true
	}
	return nil
}

func (c *cable) Remove(name string) error {
	if !c.full { // on a full volume it is always possible
		if err := c.gone(); err != nil {
			return err
		}
	}
	before, err := c.backup(name)
	if err != nil {
		return err
	}
	if err := os.Remove(name); err != nil {
		return err
	}
	delete(c.dirty, name)
	c.did(func() error { return os.Rename(before, name) })
	return nil
}

func (c *cable) SyncDir(string) error {
	if !c.full { // it needs no room
		if err := c.gone(); err != nil {
			return err
		}
	}
	c.undo = nil
	return nil
}

// cable is one that is pulled out after so many writes.
func (p *place) cable(left int) *cable {
	return &cable{left: left, backups: p.t.TempDir(), dirty: map[string]bool{}}
}

// unsure is a disk whose folders cannot be synced.
type unsure struct{ *cable }

var errSync = errors.New("input/output error")

func (unsure) SyncDir(string) error { return errSync }

// Whatever a disk answers after a renaming, or a removal, what is known of a pack is what lies there under its name.
func TestFolderNotSynced(t *testing.T) {
	t.Parallel()
	p := newPlace(t)
	k := p.keeper(unsure{p.cable(1 << 20)})
	for serial := range uint64(2) {
		_, err := p.install(k, p.pack(serial+3))
		if !errors.Is(err, errSync) {
			t.Errorf("err = %v", err)
		}
		s := k.State()
		if len(s.Packs) != 1 || s.Packs[0].Serial != serial+3 || s.Packs[0].Fault != "" || s.Packs[0].Folder == "" || s.Staged != nil {
			t.Errorf("%+v", s)
		}
		p.holds("installation", true, serial+3, serial+3)
	}
	if _, err := k.Remove("vendor"); !errors.Is(err, errSync) {
		t.Errorf("err = %v", err)
	}
	if s := k.State(); len(s.Packs) != 0 || p.files() != "" {
		t.Errorf("%+v, the folder holds %q", s, p.files())
	}
}

// The power goes at each write of an installation, a replacement and a removal: the next start has what was there or what was to
// be, whole, and nothing else in the folder. On a full volume the same holds, and the refusal says so.
func TestPowerCut(t *testing.T) {
	t.Parallel()
	p := newPlace(t)
	three, four := p.pack(3), p.pack(4)
	for _, mode := range []struct{ full, forgets bool }{{full: true}, {}, {forgets: true}} {
		for _, from := range []uint64{0, 3} {
			done := false
			for n := 1; !done; n++ { // the first is the start's own
				if err := os.RemoveAll(filepath.Join(p.dir, "packs")); err != nil {
					t.Fatal(err)
				}
				if from != 0 {
					if _, err := p.install(p.keeper(nil), three); err != nil {
						t.Fatal(err)
					}
				}
				c := p.cable(n)
				c.full, c.forgets = mode.full, mode.forgets
				_, err := p.install(p.keeper(c), four)
				if done = err == nil; err != nil && mode.full {
					refused(t, err, problem.DiskReserve, "已满")
				} else if err != nil && !errors.Is(err, errPower) {
					t.Fatalf("cut %d: %v", n, err)
				}
				if !mode.full {
					c.pull(t)
				}
				p.holds(fmt.Sprintf("installation, cut %d, %+v", n, mode), done, from, 4)
				if n > 200 {
					t.Fatal("it never ends")
				}
			}
		}
	}
	for _, forgets := range []bool{false, true} {
		for n, done := 1, false; !done; n++ {
			k := p.keeper(nil)
			if len(k.State().Packs) == 0 {
				if _, err := p.install(k, four); err != nil {
					t.Fatal(err)
				}
			}
			c := p.cable(n)
			c.forgets = forgets
			_, err := p.keeper(c).Remove("vendor")
			done = err == nil
			c.pull(t)
			p.holds(fmt.Sprintf("removal, cut %d, forgets %v", n, forgets), done, 4, 0)
		}
	}
}

// holds is the next start: it has one of two packs (0: none), after what was done the second.
func (p *place) holds(when string, done bool, before, after uint64) {
	p.t.Helper()
	s := p.keeper(nil).State()
	got, want := uint64(0), "vendor.pack"
	switch {
	case len(s.Packs) == 0:
		want = ""
	case len(s.Packs) > 1 || s.Packs[0].Fault != "":
		p.t.Fatalf("%s: %+v", when, s)
	default:
		got = s.Packs[0].Serial
	}
	if got != after && (done || got != before) || p.files() != want {
		p.t.Errorf("%s: pack %d, want %d or %d; the folder holds %q", when, got, before, after, p.files())
	}
}

// The hospital's key is registered once, and counts at once.
func TestRegister(t *testing.T) {
	t.Parallel()
	p := newPlace(t)
	hospital := p.m.keys.Hospital
	p.m.keys.Hospital = nil
	k := p.keeper(nil)
	_, err := p.install(k, p.m.file)
	refused(t, err, problem.Forbidden, "没有医院的公钥")
	for name, text := range map[string]string{"nothing": "", "no key": "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "two": pemOf(t, hospital) + pemOf(t, hospital)} {
		if _, err := k.Register(text); problem.CodeOf(err) != problem.InvalidRequest {
			t.Errorf("%s: %v", name, err)
		}
	}
	_, err = p.keeperWith(nil, false).Register(pemOf(t, hospital)) // a release's agent
	refused(t, err, problem.Forbidden, "应答盘")
	if _, err := os.Stat(filepath.Join(p.dir, "hospital.pem")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a key was kept: %v", err)
	}
	sum, err := k.Register(pemOf(t, hospital))
	if err != nil || sum == "" || k.State().Hospital != sum {
		t.Fatalf("%q, %v", sum, err)
	}
	if _, err := p.install(k, p.m.file); err != nil {
		t.Error(err)
	}
	_, err = k.Register(pemOf(t, &key(t).PublicKey))
	refused(t, err, problem.Exists, "不能更换")
	kept, err := os.ReadFile(filepath.Join(p.dir, "hospital.pem"))
	if err != nil || string(kept) != pemOf(t, hospital) {
		t.Errorf("kept %q, %v", kept, err)
	}
}

package pack

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/emmansun/gmsm/sm3"

	"yinjian/appliance/problem"
	"yinjian/iso/layout"
)

// A Mounter makes an image appear read-only at a folder, under dm-verity.
type Mounter interface {
	// Mount mounts the image that begins at byte start of file, which is open for reading, on the folder at, which is there and empty.
	// name tells this image from others. Where it fails nothing is left.
	Mount(file *os.File, start int64, root layout.Root, name, at string) error
	// Unmount undoes it; [ErrBusy] while somebody uses what is there.
	Unmount(at string) error
}

// ErrBusy says that a mounted pack is in use.
var ErrBusy = errors.New("pack: somebody uses it")

// KeeperConfig says where packs are kept, and which may be.
type KeeperConfig struct {
	Dir    string // holds the packs' files
	Mounts string // below it each pack appears under its name
	Keys   Keys
	// KeyFile is where the hospital's key is kept when it is registered, PKIX in PEM.
	KeyFile string
	// Asked says that the appliance may have the hospital's key registered. Who asks is not known to a keeper, so until there is a key
	// whoever owns the service's process could register his own; without it the key comes with the installation alone.
	Asked   bool
	Arch    string // GOARCH of the image
	Verity  string // the hash that its kernel has
	Mounter Mounter
	Files   Files // nil: the system's
}

// Files are the writes to the folder of packs; a test fails them.
type Files interface {
	Create(name string) (Written, error)
	Rename(from, to string) error
	Remove(name string) error
	SyncDir(dir string) error
}

// Written is a file that is being written.
type Written interface {
	io.Writer
	Sync() error
	Close() error
}

// A Keeper installs, mounts and removes packs: what the agent does on the appliance's behalf. Safe for concurrent use.
//
// A pack's file stands in Dir under the pack's name, as it was signed, and whatever is done to that folder, no more than a whole
// and signed pack is ever mounted: each mount judges signatures and every byte anew. What is being written has a name that
// nothing reads, until all of it is known to be good and on the disk; so a stop at any line leaves the packs that were there, or
// with the new one.
type Keeper struct {
	cfg KeeperConfig

	mu        sync.Mutex // guards cfg.Keys.Hospital and what follows
	packs     map[string]*Installed
	staged    *Installed // its file is [stagedFile]
	uploading bool       // a pack is being written into that file; staged is nil
}

// An Installed is a pack as the agent has it: of the manifest what the appliance acts on and shows.
type Installed struct {
	Name        string     `json:"name"`
	Kind        string     `json:"kind,omitempty"`
	Version     string     `json:"version,omitempty"`
	Serial      uint64     `json:"serial,omitempty"`
	Maker       string     `json:"maker,omitempty"`
	SM3         string     `json:"sm3,omitempty"` // of the manifest
	ImageSM3    string     `json:"image_sm3,omitempty"`
	Files       int        `json:"files,omitempty"`
	Library     string     `json:"library,omitempty"`
	Program     string     `json:"program,omitempty"`
	Product     string     `json:"product,omitempty"`
	Folders     []string   `json:"folders,omitempty"` // of [Manifest.Folders]
	Environment []Variable `json:"environment,omitempty"`
	Daemon      *Daemon    `json:"daemon,omitempty"`
	Notes       string     `json:"notes,omitempty"`
	Signers     []Signer   `json:"signers,omitempty"`
	Folder      string     `json:"folder,omitempty"` // where it is mounted; "": it is not
	Fault       string     `json:"fault,omitempty"`  // why it is not
}

// A State is all that the agent keeps.
type State struct {
	Packs  []Installed `json:"packs"`
	Staged *Installed  `json:"staged,omitempty"`
	// Hospital is the SM3 of the hospital's key, in hex; "": none is registered.
	Hospital string `json:"hospital,omitempty"`
}

const (
	suffix     = ".pack"
	stagedFile = "staged.new" // no pack's name ends so
	// reserve is what has to stay free on the volume beside a pack: the journal is on it.
	reserve = 256 << 20
	// maxState bounds a [State] in JSON, in bytes. Folders, and what a fault says, come to it; with them it goes through the agent.
	maxState = 128 << 10
)

// NewKeeper mounts what is in the folder. A pack that may not be mounted is told of in [Keeper.State] and hinders no other.
func NewKeeper(cfg KeeperConfig) (*Keeper, error) {
	if cfg.Files == nil {
		cfg.Files = system{}
	}
	k := &Keeper{cfg: cfg, packs: map[string]*Installed{}}
	for _, dir := range []string{cfg.Dir, cfg.Mounts} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, err
		}
	}
	if err := cfg.Files.Remove(k.file(stagedFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	found, err := os.ReadDir(cfg.Dir)
	if err != nil {
		return nil, err
	}
	for _, e := range found {
		name, ok := strings.CutSuffix(e.Name(), suffix)
		if !ok || !Name.MatchString(name) {
			continue
		}
		p, err := k.mount(name)
		if err != nil {
			p = &Installed{Name: name, Fault: err.Error()}
		}
		k.packs[name] = p
	}
	// Mounted before, and gone from the disk.
	mounts, err := os.ReadDir(cfg.Mounts)
	if err != nil {
		return nil, err
	}
	for _, e := range mounts {
		if k.packs[e.Name()] == nil {
			if mounted, err := isMount(k.at(e.Name())); err == nil && mounted {
				_ = k.unmount(e.Name()) // somebody uses it: at the next start it is gone
			}
		}
	}
	return k, nil
}

func (k *Keeper) file(name string) string { return filepath.Join(k.cfg.Dir, name) }
func (k *Keeper) at(name string) string   { return filepath.Join(k.cfg.Mounts, name) }

// Fits refuses a pack that is not for an appliance of this architecture (GOARCH) whose kernel has this hash for verity.
func (m *Manifest) Fits(arch, verity string) error {
	next := "请发布方为本设备打包 (have it packed for this appliance)"
	switch {
	case m.Arch != arch:
		return refuse(problem.InvalidRequest, fmt.Sprintf("厂商包是 %s 的，本机是 %s (it is for another architecture)", m.Arch, arch), next)
	case m.Image.Algorithm != verity:
		return refuse(problem.InvalidRequest, fmt.Sprintf("厂商包的校验树用 %s，本机内核用 %s (the kernel has another hash than its tree)", m.Image.Algorithm, verity), next)
	}
	return nil
}

// mount opens, judges and mounts a pack's file; every byte of it is read.
func (k *Keeper) mount(name string) (*Installed, error) {
	f, err := os.Open(k.file(name + suffix))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	p, err := k.whole(f, k.cfg.Keys)
	if err != nil {
		return nil, err
	}
	if p.Manifest.Name != name {
		return nil, damaged("清单里的名称是 %s", p.Manifest.Name)
	}
	root, err := p.Manifest.Image.Layout()
	if err != nil {
		return nil, err
	}
	there, err := k.left(name, p)
	if err != nil {
		return nil, err
	}
	if there {
		out := p.installed()
		out.Folder = k.at(name)
		return out, nil
	}
	if err := k.show(f, p, root, p.dmName(), name); err != nil {
		return nil, err
	}
	out := p.installed()
	out.Folder = k.at(name)
	return out, nil
}

// show mounts a pack that was judged, and compares what is seen then. Where it fails nothing is left.
func (k *Keeper) show(f *os.File, p *Pack, root layout.Root, device, name string) error {
	if err := os.MkdirAll(k.at(name), 0o755); err != nil {
		return err
	}
	if err := k.cfg.Mounter.Mount(f, p.Start, root, device, k.at(name)); err != nil {
		return errors.Join(err, os.Remove(k.at(name)))
	}
	if err := p.Manifest.Compare(os.DirFS(k.at(name))); err != nil {
		return errors.Join(damaged("映像：%v", err), k.unmount(name))
	}
	return nil
}

// try mounts what is staged at a folder of its own, and takes it away again.
func (k *Keeper) try(sm3 string) error {
	f, err := os.Open(k.file(stagedFile))
	if err != nil {
		return err
	}
	defer f.Close()
	p, err := k.whole(f, k.cfg.Keys)
	if err != nil {
		return err
	}
	if p.SM3 != sm3 {
		return damaged("待装的文件已不是它 (another file is staged)")
	}
	root, err := p.Manifest.Image.Layout()
	if err != nil {
		return err
	}
	if mounted, err := isMount(k.at(stagedFile)); err != nil {
		return err
	} else if mounted { // the last try could not take it away
		if err := k.unmount(stagedFile); err != nil {
			return err
		}
	}
	if err := k.show(f, p, root, p.dmName()+"-staged", stagedFile); err != nil {
		return err
	}
	return k.unmount(stagedFile)
}

// left looks for what an agent before this one has mounted: it is taken away or, where somebody uses it, compared with the pack that
// should be there.
func (k *Keeper) left(name string, p *Pack) (there bool, err error) {
	if mounted, err := isMount(k.at(name)); err != nil || !mounted {
		return false, err
	}
	err = k.cfg.Mounter.Unmount(k.at(name))
	if !errors.Is(err, ErrBusy) {
		return false, err
	}
	if err := p.Manifest.Compare(os.DirFS(k.at(name))); err != nil {
		return false, fmt.Errorf("另一份仍挂载着、在使用 (another one is still mounted, and used): %w", err)
	}
	return true, nil
}

// dmName is that of the pack's device: of its content too, so that an older one that is still being closed is in nobody's way.
func (p *Pack) dmName() string { return "yinjian-" + p.Manifest.Name + "-" + p.SM3[:16] }

func (p *Pack) installed() *Installed {
	m := p.Manifest
	return &Installed{
		Name: m.Name, Kind: m.Kind, Version: m.Version, Serial: m.Serial, Maker: m.Maker, SM3: p.SM3, ImageSM3: m.Image.SM3, Files: len(m.Files), Library: m.Library,
		Program: m.Program, Product: m.Product, Folders: m.Folders(), Environment: m.Environment, Daemon: m.Daemon, Notes: m.Notes, Signers: p.Signers,
	}
}

// whole judges a pack's file, every byte of it.
func (k *Keeper) whole(f io.ReadSeeker, keys Keys) (*Pack, error) {
	p, err := Whole(f, keys)
	if err != nil {
		return nil, err
	}
	return p, p.Manifest.Fits(k.cfg.Arch, k.cfg.Verity)
}

// Whole judges a pack's file: the signatures, then every byte.
func Whole(f io.ReadSeeker, keys Keys) (*Pack, error) {
	p, err := Open(f, keys)
	if err != nil {
		return nil, err
	}
	if err := p.CopyImage(io.Discard, f); err != nil {
		return nil, err
	}
	root, err := p.Manifest.Image.Layout()
	if err != nil {
		return nil, err
	}
	if _, err := f.Seek(p.Start, io.SeekStart); err != nil {
		return nil, err
	}
	if err := layout.Check(f, root); err != nil {
		return nil, damaged("%v", err)
	}
	return p, nil
}

func (k *Keeper) unmount(name string) error {
	if err := k.cfg.Mounter.Unmount(k.at(name)); err != nil {
		return err
	}
	return os.Remove(k.at(name))
}

// Compare holds a mounted image against the manifest: these files, folders that lead to them, and nothing else.
func (m *Manifest) Compare(root fs.FS) error {
	want, folders := map[string]File{}, map[string]bool{".": true}
	for _, f := range m.Files {
		want[f.Path] = f
		for dir := path.Dir(f.Path); dir != "."; dir = path.Dir(dir) {
			folders[dir] = true
		}
	}
	err := fs.WalkDir(root, ".", func(name string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		f, file := want[name]
		switch mode := info.Mode(); {
		case mode.IsDir() && folders[name] && mode&(fs.ModeSetuid|fs.ModeSetgid|0o022) == 0:
			return nil
		case !file || !mode.IsRegular() || mode&(fs.ModeSetuid|fs.ModeSetgid|fs.ModeSticky|0o222) != 0 || (mode&0o111 != 0) != f.Executable || info.Size() != f.Size:
			return fmt.Errorf("%.80q is not as the manifest has it (%v, %d bytes)", name, mode, info.Size())
		}
		delete(want, name)
		in, err := root.Open(name)
		if err != nil {
			return err
		}
		defer in.Close()
		h3, h256 := sm3.New(), sha256.New()
		if _, err := io.Copy(io.MultiWriter(h3, h256), in); err != nil {
			return err
		}
		if hex.EncodeToString(h3.Sum(nil)) != f.SM3 || hex.EncodeToString(h256.Sum(nil)) != f.SHA256 {
			return fmt.Errorf("%.80q is not what was signed", name)
		}
		return nil
	})
	if err != nil {
		return err
	}
	for name := range want {
		return fmt.Errorf("%.80q is missing", name)
	}
	return nil
}

// State answers what is kept.
func (k *Keeper) State() State {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.state()
}

func (k *Keeper) state() State {
	out := State{Packs: []Installed{}}
	for _, p := range k.packs {
		out.Packs = append(out.Packs, *p)
	}
	slices.SortFunc(out.Packs, func(a, b Installed) int { return cmp.Compare(a.Name, b.Name) })
	if k.cfg.Keys.Hospital != nil {
		out.Hospital, _ = fingerprint(k.cfg.Keys.Hospital) // it was parsed
	}
	if k.staged != nil {
		s := *k.staged
		out.Staged = &s
	}
	return out
}

// Stage reads a pack to its end and keeps it beside those that are installed, in the place of one that was staged before. Its
// signatures are judged before anything is written, the rest while it is, and all of it once more as it lies there. However slowly
// it comes, only another pack that is signed has to wait for it, which is refused.
func (k *Keeper) Stage(ctx context.Context, r io.Reader) (*Installed, error) {
	keys := k.keys()
	p, err := Open(bounded{ctx, r}, keys)
	if err != nil {
		return nil, err
	}
	if err := k.begin(p); err != nil {
		return nil, err
	}
	err = k.write(ctx, p, r, keys)
	k.mu.Lock()
	defer k.mu.Unlock()
	k.uploading = false
	if err != nil {
		return nil, err
	}
	k.staged = p.installed()
	out := *k.staged
	return &out, nil
}

func (k *Keeper) keys() Keys {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.cfg.Keys
}

// begin says whether the pack may be written, and takes the file for it.
func (k *Keeper) begin(p *Pack) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.uploading {
		return refuse(problem.WrongState, "另一个厂商包正在上传 (another pack is being uploaded)", "请稍后重试 (try again later)")
	}
	if err := errors.Join(p.Manifest.Fits(k.cfg.Arch, k.cfg.Verity), k.newer(p), k.told(p)); err != nil {
		return err
	}
	if err := k.room(p.Start + p.Manifest.Image.Size); err != nil {
		return err
	}
	k.staged, k.uploading = nil, true
	return nil
}

// write writes the pack into the file, to the disk, and reads it again.
func (k *Keeper) write(ctx context.Context, p *Pack, r io.Reader, keys Keys) error {
	name := k.file(stagedFile)
	f, err := k.cfg.Files.Create(name)
	if err != nil {
		return written(err)
	}
	err = WriteHead(f, p.Raw, p.Signatures)
	if err == nil {
		err = p.CopyImage(f, bounded{ctx, r})
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = k.reread(name, keys)
	}
	if err != nil {
		return errors.Join(written(err), k.cfg.Files.Remove(name))
	}
	return nil
}

func (k *Keeper) reread(name string, keys Keys) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = k.whole(f, keys)
	return err
}

// bounded ends with ctx.
type bounded struct {
	ctx context.Context
	r   io.Reader
}

func (b bounded) Read(p []byte) (int, error) {
	if err := b.ctx.Err(); err != nil {
		return 0, err
	}
	return b.r.Read(p)
}

// written says a full disk as such.
func written(err error) error {
	if full(err) {
		return refuse(problem.DiskReserve, "数据卷已满，没有安装 (the data volume is full; nothing was installed)", "腾出空间后再试 (make room, and try again)")
	}
	return err
}

// newer refuses what is not newer than the pack of that name.
func (k *Keeper) newer(p *Pack) error {
	old := k.packs[p.Manifest.Name]
	if old == nil || old.Fault != "" {
		return nil
	}
	if old.Serial >= p.Manifest.Serial {
		return refuse(problem.Exists, fmt.Sprintf("已装的 %s 序号 %d，包的序号 %d 不高于它 (the one that is installed is as new or newer)", old.Name, old.Serial, p.Manifest.Serial),
			"退回旧版须先移除，由两人决定 (to go back, two persons remove it first)")
	}
	return nil
}

// told refuses a pack with which there would be more to tell than the agent can say in one answer.
func (k *Keeper) told(p *Pack) error {
	s := k.state()
	s.Staged = p.installed()
	b, err := json.Marshal(s)
	if err != nil {
		return err
	}
	if len(b) > maxState {
		return refuse(problem.InvalidRequest, fmt.Sprintf("加上此包，厂商包的说明共 %d KiB，上限 %d KiB (with this one there is too much to tell of the packs)", len(b)>>10, maxState>>10),
			"移除不用的厂商包，或把文件打进较少的目录、缩短说明 (remove packs, or have it packed with fewer folders and shorter notes)")
	}
	return nil
}

// Install mounts what is staged and has that SM3, in the place of an older pack of that name, which nobody may be using.
// Order: 1. it is mounted elsewhere, for a trial; 2. the older one is unmounted; 3. the file is renamed, which is durable when it
// returns; 4. it is mounted. A stop after 3 has the new one mounted at the next start, a stop before it the older one. An error of
// the disk after the renaming is answered, and the new one is mounted all the same: its file is what bears the name.
func (k *Keeper) Install(sm3 string) (*Installed, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	s := k.staged
	if s == nil || s.SM3 != sm3 {
		waits := "没有 (none)"
		if s != nil {
			waits = s.SM3
		}
		return nil, refuse(problem.WrongState, fmt.Sprintf("待装的厂商包是 %s，不是 %s (another pack is staged)", waits, sm3), "核对清单的 SM3 后再试 (compare the manifest's SM3)")
	}
	if err := k.try(sm3); err != nil {
		return nil, err
	}
	old := k.packs[s.Name]
	if err := k.release(old); err != nil {
		return nil, err
	}
	if err := k.cfg.Files.Rename(k.file(stagedFile), k.file(s.Name+suffix)); err != nil {
		return nil, errors.Join(written(err), k.again(s.Name, old))
	}
	k.staged = nil
	unsure := k.cfg.Files.SyncDir(k.cfg.Dir)
	p, err := k.mount(s.Name)
	if err != nil {
		p = &Installed{Name: s.Name, Fault: err.Error()}
	}
	k.packs[s.Name] = p
	if unsure != nil {
		unsure = fmt.Errorf("厂商包 %s 已换成新的，是否已落盘不明 (it is replaced, and may not be on the disk): %w", s.Name, unsure)
	}
	if err := errors.Join(err, unsure); err != nil {
		return nil, err
	}
	out := *p
	return &out, nil
}

// again mounts what was unmounted.
func (k *Keeper) again(name string, old *Installed) error {
	if old == nil || old.Folder == "" {
		return nil
	}
	p, err := k.mount(name)
	if err != nil {
		p = &Installed{Name: name, Fault: err.Error()}
	}
	k.packs[name] = p
	return err
}

// release unmounts a pack, if it is mounted.
func (k *Keeper) release(p *Installed) error {
	if p == nil || p.Folder == "" {
		return nil
	}
	err := k.unmount(p.Name)
	if errors.Is(err, ErrBusy) {
		return refuse(problem.WrongState, fmt.Sprintf("厂商包 %s 正在使用 (the pack is in use)", p.Name), "先停用用它的密码机；main 所用的，以另一名称打包新版，改配置后重启 (stop what uses it, or pack the new one under another name)")
	}
	return err
}

// Remove unmounts a pack that nobody uses and takes its file away; of one that is staged, the file alone. The answer is what it
// was.
func (k *Keeper) Remove(name string) (*Installed, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	p := k.packs[name]
	if p == nil {
		return nil, refuse(problem.NotFound, "没有这个厂商包 (no such pack)", "见 yinjian pack list (see yinjian pack list)")
	}
	if err := k.release(p); err != nil {
		return nil, err
	}
	if err := k.cfg.Files.Remove(k.file(name + suffix)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, errors.Join(err, k.again(name, p))
	}
	delete(k.packs, name)
	if err := k.cfg.Files.SyncDir(k.cfg.Dir); err != nil {
		return nil, fmt.Errorf("厂商包 %s 已移除，是否已落盘不明 (it is removed, and may be there again after a power cut): %w", name, err)
	}
	return p, nil
}

// Register takes the hospital's key, PKIX in PEM, where none is known and it may be asked for, and answers its SM3. To have another in
// its place the appliance is installed anew: whoever could exchange it could sign in the hospital's stead.
func (k *Keeper) Register(text string) (string, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.cfg.Keys.Hospital != nil {
		return "", refuse(problem.Exists, "已登记医院的公钥，不能更换 (the hospital's key is registered, and stays)", "核对其 SM3：yinjian pack list (compare its SM3)")
	}
	if !k.cfg.Asked {
		return "", refuse(problem.Forbidden, "正式版的医院公钥只随安装时的应答盘来，不能事后登记 (a release takes the hospital's key from the answer disk alone)",
			"带 hospital.pem 重装，由备份恢复：见 docs/packs.md (install anew with it, and restore)")
	}
	key, err := ParseKey([]byte(text))
	if err != nil {
		return "", problem.Invalid("key", "%v", err)
	}
	sum, err := fingerprint(key)
	if err != nil {
		return "", err
	}
	temporary := k.cfg.KeyFile + ".new"
	f, err := k.cfg.Files.Create(temporary)
	if err != nil {
		return "", written(err)
	}
	if _, err = io.WriteString(f, text); err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = k.cfg.Files.Rename(temporary, k.cfg.KeyFile)
	}
	if err == nil {
		err = k.cfg.Files.SyncDir(filepath.Dir(k.cfg.KeyFile))
	}
	if err != nil {
		return "", written(err)
	}
	k.cfg.Keys.Hospital = key
	return sum, nil
}

// Close unmounts everything: for tests. An agent that ends leaves its packs to those who use them.
func (k *Keeper) Close() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	var errs []error
	for _, p := range k.packs {
		errs = append(errs, k.release(p))
	}
	return errors.Join(errs...)
}

// system is the file system.
type system struct{}

func (system) Create(name string) (Written, error) {
	return os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
}
func (system) Rename(from, to string) error { return os.Rename(from, to) }
func (system) Remove(name string) error     { return os.Remove(name) }
func (system) SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

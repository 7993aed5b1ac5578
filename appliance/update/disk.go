package update

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"

	"yinjian/appliance/problem"
	"yinjian/iso/layout"
)

// A Device is the whole installed disk. Sync returns when what was written is on it.
type Device interface {
	io.ReaderAt
	io.WriterAt
	Sync() error
}

// Config is what an Updater works on. All but Floor, Wanted and Keys.Hospital are needed.
type Config struct {
	Device Device
	Size   int64  // of the device, in bytes
	ESP    string // folder at which the EFI system partition is mounted, for writing
	// Running is the image that runs, as it says itself, and Slot where it came from.
	Running layout.Image
	Slot    int
	Keys    Keys
	// Floor is the least image that may be installed, as [Updater.MarkGood] last had it kept.
	Floor uint64
	// Wanted is the floor that the running image brings once it is good, as [Updater.Commit] had it kept; 0: none.
	Wanted uint64
}

// Files of ours on the EFI system partition, in [layout.MediaDir]: what was written and is not published yet. The manifest stays
// until its image is good.
const (
	stagedKernel     = "staged.efi"
	stagedManifest   = "staged.json"
	stagedSignatures = "staged.sig"
)

// An Updater writes the slot that does not run. Safe for concurrent use; one change at a time, another is refused meanwhile.
//
// At each moment the disk holds an image that starts: what runs is never written to, and a kernel is published only when its
// root is whole and on the disk. A power cut leaves things as they were, or an unpublished image that [Updater.Status] does
// not call staged, or the new one.
type Updater struct {
	cfg   Config
	floor atomic.Uint64 // as Config's, and later

	mu      sync.Mutex // held while something is changed
	stopped func(step string) error
}

// New looks at the disk and says whether it is one of ours.
func New(cfg Config) (*Updater, error) {
	if err := cfg.Running.Validate(); err != nil {
		return nil, err
	}
	if cfg.Device == nil || cfg.ESP == "" || cfg.Keys.Release == nil {
		return nil, errors.New("update: config: something is missing")
	}
	if cfg.Slot != layout.NumberRootA && cfg.Slot != layout.NumberRootB {
		return nil, fmt.Errorf("update: slot %d is no root", cfg.Slot)
	}
	u := &Updater{cfg: cfg, stopped: func(string) error { return nil }}
	u.floor.Store(cfg.Floor)
	_, err := u.table()
	return u, err
}

func (u *Updater) table() (*layout.Table, error) {
	t, err := layout.ReadTable(u.cfg.Device, u.cfg.Size)
	if err == nil && len(t.Partitions) < layout.NumberRootB {
		err = fmt.Errorf("update: %d partitions", len(t.Partitions))
	}
	return t, err
}

// idle is the number of the slot that does not run.
func (u *Updater) idle() int { return layout.NumberRootA + layout.NumberRootB - u.cfg.Slot }

func slotLabel(number int) string {
	if number == layout.NumberRootA {
		return layout.LabelRootA
	}
	return layout.LabelRootB
}

// An Offer is an image that was written and does not run yet.
type Offer struct {
	Index    uint64   `json:"index"`
	Version  string   `json:"version"`
	SM3      string   `json:"sm3"` // of the manifest
	Manifest Manifest `json:"manifest"`
}

// A Status is what stands on the disk.
type Status struct {
	Running uint64 `json:"running"` // index
	Version string `json:"version"`
	Slot    string `json:"slot"` // A or B
	Good    bool   `json:"good"` // the running image has proved itself
	Staged  *Offer `json:"staged,omitempty"`
	// Committed starts next.
	Committed *Offer `json:"committed,omitempty"`
	// Failed are images that used up their tries and were left again.
	Failed []uint64 `json:"failed,omitempty"`
	// Behind is the image that starts if the running one does not any more; 0: none.
	Behind uint64 `json:"behind,omitempty"`
	Floor  uint64 `json:"floor"`
}

// Status reads it anew. It waits for no change that is under way: what is half written is not staged.
func (u *Updater) Status() (*Status, error) {
	entries, err := u.entries()
	if err != nil {
		return nil, err
	}
	t, err := u.table()
	if err != nil {
		return nil, err
	}
	s := &Status{Running: u.cfg.Running.Index, Version: u.cfg.Running.Version, Slot: "A", Floor: u.floor.Load()}
	if u.cfg.Slot == layout.NumberRootB {
		s.Slot = "B"
	}
	offer := u.offer(t)
	for _, e := range entries {
		switch {
		case e.Index == s.Running:
			s.Good = !e.Counted
		case e.Failed():
			s.Failed = append(s.Failed, e.Index)
		case offer != nil && e.Index == offer.Index:
			s.Committed = offer
		case e.Index < s.Running:
			s.Behind = max(s.Behind, e.Index)
		}
	}
	if _, err := os.Stat(u.own(stagedKernel)); err == nil && offer != nil && s.Committed == nil {
		s.Staged = offer
	}
	return s, nil
}

// offer is the image whose manifest lies there, if its root is in the idle slot; nil otherwise.
func (u *Updater) offer(t *layout.Table) *Offer {
	b, err := u.stagedBundle()
	if err != nil {
		return nil
	}
	p := t.Partitions[u.idle()-1]
	if p.Label != slotLabel(u.idle()) || p.UUID != b.Root.PartitionUUID() {
		return nil
	}
	return &Offer{Index: b.Manifest.Image.Index, Version: b.Manifest.Image.Version, SM3: b.SM3, Manifest: b.Manifest}
}

func (u *Updater) stagedBundle() (*Bundle, error) {
	b := &Bundle{}
	var err error
	if b.Raw, err = os.ReadFile(u.own(stagedManifest)); err != nil {
		return nil, err
	}
	if b.signatures, err = os.ReadFile(u.own(stagedSignatures)); err != nil {
		return nil, err
	}
	return b, b.judge(u.cfg.Keys)
}

func (u *Updater) own(name string) string { return filepath.Join(u.cfg.ESP, layout.MediaDir, name) }
func (u *Updater) entryDir() string {
	return filepath.Join(u.cfg.ESP, filepath.FromSlash(layout.EntryDir))
}

// entries are the published kernels; files that are none of ours are passed over.
func (u *Updater) entries() ([]layout.Entry, error) {
	files, err := os.ReadDir(u.entryDir())
	if err != nil {
		return nil, err
	}
	var out []layout.Entry
	for _, f := range files {
		if e, err := layout.ParseEntry(f.Name()); err == nil {
			out = append(out, e)
		}
	}
	return out, nil
}

// Mended takes away, from the EFI system partition at esp, what a check of its file system has left of files of ours that a power
// cut in the middle of a renaming had under two names: FAT keeps one of them with its bytes, and the check leaves the other empty.
func Mended(esp string) error {
	for _, dir := range []string{layout.EntryDir, layout.MediaDir} {
		dir = filepath.Join(esp, filepath.FromSlash(dir))
		files, err := os.ReadDir(dir)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		for _, f := range files {
			info, err := f.Info()
			if err == nil && info.Mode().IsRegular() && info.Size() == 0 {
				err = os.Remove(filepath.Join(dir, f.Name()))
			}
			if err != nil {
				return err
			}
		}
		if err := syncDir(dir); err != nil {
			return err
		}
	}
	return nil
}

func wrongState(detail, next string) error { return refuse(problem.WrongState, detail, next) }

// change is the one change that is under way until done is called.
func (u *Updater) change() (done func(), err error) {
	if !u.mu.TryLock() {
		return nil, wrongState("另一个升级操作正在进行 (another update is under way)", "请稍后重试 (try again later)")
	}
	return u.mu.Unlock, nil
}

// admit says whether the image may be installed here.
func (u *Updater) admit(b *Bundle, t *layout.Table, s *Status) error {
	m, now := &b.Manifest, u.cfg.Running
	no := func(field, detail string) error {
		p := problem.Invalid(field, "%s", detail)
		p.Next = "请选用适合本机的升级包 (choose a bundle for this appliance)"
		return p
	}
	switch {
	case m.Image.Arch != now.Arch:
		return no("image.arch", "升级包是 "+m.Image.Arch+" 架构的，本机是 "+now.Arch+" (the bundle is for another architecture)")
	case m.Image.Base != now.Base:
		return no("image.base", "升级包的底座是 "+m.Image.Base+"，本机是 "+now.Base+" (the bundle has another base)")
	case m.Image.Variant != now.Variant:
		return no("image.variant", "升级包是 "+m.Image.Variant+"，本机是 "+now.Variant+"：评估版与正式版不互换 (evaluation and release images do not replace each other)")
	case m.Image.Index <= now.Index:
		return no("image.index", fmt.Sprintf("升级包的序号 %d 不高于本机的 %d：不退回旧映像 (not newer than what runs: there is no way back)", m.Image.Index, now.Index))
	case b.Root.PartitionUUID() == t.Partitions[u.cfg.Slot-1].UUID:
		return no("root.hash", "升级包的根就是运行中的根：两个槽不得有同一个根 (its root is the running one: no two slots may have one root)")
	case m.Image.Index < s.Floor:
		return no("image.index", fmt.Sprintf("升级包的序号 %d 低于下限 %d，那些映像有已知缺陷 (below the floor: images with known defects)", m.Image.Index, s.Floor))
	case now.Index < m.MinIndex:
		return no("min_index", fmt.Sprintf("须先升级到 %d 以上 (install an image of at least this index first)", m.MinIndex))
	case slices.Contains(s.Failed, m.Image.Index):
		p := problem.Invalid("image.index", "本机已试过这个映像而未能证明自己可用 (this image was tried here and did not prove itself)")
		p.Next = "换一个升级包；若原因不在映像（如三次断电），先执行 yinjian update cancel，再上传 (choose another; if it was not the image's fault, cancel it first)"
		return p
	case !s.Good:
		return wrongState("运行中的映像尚未证明自己可用，此时不能覆盖可退回的那一个 (the running image has not proved itself yet: the one to fall back to is not overwritten)",
			"等它通过自检后再试 (wait until it has passed its self-test)")
	case s.Committed != nil:
		return wrongState("已有一个升级等待重启 (an update waits for the restart)", "重启，或先取消它 (restart, or cancel it first)")
	}
	return nil
}

// Stage reads a bundle and writes it into the slot that does not run; nothing starts it yet. Each byte is read once and written
// once. What was in the slot is gone from then on, so until [Updater.MarkGood] of the next image there is nothing to fall
// back to but what runs. A refusal is a *problem.Problem; after any error the slot is empty, or as it was.
func (u *Updater) Stage(ctx context.Context, r io.Reader) (*Offer, error) {
	b, err := Open(reader{ctx, r}, u.cfg.Keys) // until it is known to be signed, whoever sends it holds nobody up
	if err != nil {
		return nil, err
	}
	done, err := u.change()
	if err != nil {
		return nil, err
	}
	defer done()
	s, err := u.Status()
	if err != nil {
		return nil, err
	}
	t, err := u.table()
	if err != nil {
		return nil, err
	}
	if err := u.admit(b, t, s); err != nil {
		return nil, err
	}
	p := &t.Partitions[u.idle()-1]
	if room := t.Size(*p); b.Manifest.Root.Size > room {
		return nil, damaged("根 %d 字节，槽只有 %d", b.Manifest.Root.Size, room)
	}
	if err := u.empty(t); err != nil {
		return nil, err
	}
	if err := b.root(&sequential{u.cfg.Device, t.Offset(*p)}); err != nil {
		return nil, err
	}
	if err := u.cfg.Device.Sync(); err != nil {
		return nil, err
	}
	if err := u.stopped("root"); err != nil {
		return nil, err
	}
	kernel, err := b.kernel()
	if err != nil {
		return nil, err
	}
	for _, f := range []struct {
		name string
		data []byte
	}{{stagedManifest, b.Raw}, {stagedSignatures, b.signatures}, {stagedKernel, kernel}} {
		if err := writeFile(u.own(f.name), f.data); err != nil {
			return nil, errors.Join(err, u.drop())
		}
		if err := u.stopped(f.name); err != nil {
			return nil, err
		}
	}
	p.UUID, p.Label = b.Root.PartitionUUID(), slotLabel(u.idle())
	if err := t.Write(u.cfg.Device, u.cfg.Device.Sync); err != nil {
		return nil, err
	}
	return &Offer{Index: b.Manifest.Image.Index, Version: b.Manifest.Image.Version, SM3: b.SM3, Manifest: b.Manifest}, nil
}

// empty takes whatever could start the idle slot away, and then says in the table that it holds nothing.
func (u *Updater) empty(t *layout.Table) error {
	entries, err := u.entries()
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Index == u.cfg.Running.Index {
			continue
		}
		if err := os.Remove(filepath.Join(u.entryDir(), e.String())); err != nil {
			return err
		}
	}
	if err := syncDir(u.entryDir()); err != nil {
		return err
	}
	if err := u.stopped("entries"); err != nil {
		return err
	}
	if err := u.drop(); err != nil {
		return err
	}
	p := &t.Partitions[u.idle()-1]
	p.Label = layout.LabelEmpty
	rand.Read(p.UUID[:]) // never fails (crypto/rand)
	if err := t.Write(u.cfg.Device, u.cfg.Device.Sync); err != nil {
		return err
	}
	return u.stopped("table")
}

// drop removes what was staged.
func (u *Updater) drop() error {
	for _, name := range []string{stagedKernel, stagedManifest, stagedSignatures} {
		if err := os.Remove(u.own(name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return syncDir(u.own(""))
}

// Commit publishes what was staged under that manifest's SM3: the next start tries it, [layout.Tries] times at most. before is
// called when it is known which image that is and may yet fail; it has on the disk what the next start has to know of it, above all
// the floor: the image that runs then may hold other keys, by which it could not read the manifest.
func (u *Updater) Commit(sm3 string, before func(*Offer) error) (*Offer, error) {
	done, err := u.change()
	if err != nil {
		return nil, err
	}
	defer done()
	s, err := u.Status()
	if err != nil {
		return nil, err
	}
	switch {
	case s.Staged == nil:
		return nil, wrongState("没有写好的升级 (nothing is staged)", "先上传升级包 (send a bundle first)")
	case s.Staged.SM3 != sm3:
		return nil, wrongState("写好的是另一个升级包，其清单的 SM3 是 "+s.Staged.SM3+" (another bundle is staged)", "核对后再提交 (compare, then commit)")
	}
	// A check of the file system may have cut it since it was written.
	kernel, err := os.ReadFile(u.own(stagedKernel))
	if err != nil {
		return nil, err
	}
	if !s.Staged.Manifest.Kernel.holds(kernel) {
		return nil, errors.Join(u.drop(), damaged("写好的 %s 与签过名的摘要不符，已丢弃", stagedKernel))
	}
	if err := before(s.Staged); err != nil {
		return nil, err
	}
	if err := os.Rename(u.own(stagedKernel), filepath.Join(u.entryDir(), layout.NewEntry(s.Staged.Index).String())); err != nil {
		return nil, err
	}
	return s.Staged, errors.Join(syncDir(u.entryDir()), syncDir(u.own("")))
}

// committed is what the next start tries; a refusal if there is nothing to restart for.
func (u *Updater) committed() (*Offer, error) {
	s, err := u.Status()
	if err != nil {
		return nil, err
	}
	if s.Committed == nil {
		return nil, wrongState("没有提交的升级，不必重启 (nothing is committed: there is nothing to restart for)", "先提交 (commit first)")
	}
	return s.Committed, nil
}

// Waits is what [Updater.Cancel] takes back; nil: nothing.
func (s *Status) Waits() *Offer {
	switch {
	case s.Committed != nil:
		return s.Committed
	case s.Staged != nil:
		return s.Staged
	case len(s.Failed) > 0:
		return &Offer{Index: s.Failed[len(s.Failed)-1]}
	}
	return nil
}

// Cancel takes back what was staged or committed and has not started yet; sm3 is that offer's, "" for whichever it is. Where
// nothing is, it forgets the images that were tried and left, so that they are admitted again.
func (u *Updater) Cancel(sm3 string) (*Offer, error) {
	done, err := u.change()
	if err != nil {
		return nil, err
	}
	defer done()
	s, err := u.Status()
	if err != nil {
		return nil, err
	}
	offer := s.Waits()
	switch {
	case offer == nil:
		return nil, wrongState("没有可取消的升级 (nothing is staged or committed)", "用 yinjian update status 查看 (look at yinjian update status)")
	case sm3 != "" && offer.SM3 != sm3:
		return nil, wrongState("写好的是另一个升级包，其清单的 SM3 是 "+offer.SM3+" (another bundle is staged)", "用 yinjian update status 查看 (look at yinjian update status)")
	}
	away := s.Failed
	if s.Committed != nil {
		away = []uint64{offer.Index}
	} else if s.Staged != nil {
		away = nil
	}
	for _, index := range away {
		if err := u.unpublish(index); err != nil {
			return nil, err
		}
	}
	return offer, u.drop()
}

func (u *Updater) unpublish(index uint64) error {
	entries, err := u.entries()
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Index == index {
			if err := os.Remove(filepath.Join(u.entryDir(), e.String())); err != nil {
				return err
			}
		}
	}
	return syncDir(u.entryDir())
}

// MarkGood says that the running image has proved itself: its tries are counted no more, and images below the floor are taken
// away. keep has the floor from now on on the disk when it returns; until then the image is not good, so that no cut of the
// power leaves a good image without its floor. Called again it does nothing.
func (u *Updater) MarkGood(keep func(floor uint64) error) (floor uint64, err error) {
	done, err := u.change()
	if err != nil {
		return 0, err
	}
	defer done()
	entries, err := u.entries()
	if err != nil {
		return 0, err
	}
	i := slices.IndexFunc(entries, func(e layout.Entry) bool { return e.Index == u.cfg.Running.Index })
	if i < 0 {
		return 0, fmt.Errorf("update: the EFI system partition has no kernel of the running image %d", u.cfg.Running.Index)
	}
	floor = max(u.floor.Load(), u.cfg.Wanted)
	if err := keep(floor); err != nil {
		return 0, err
	}
	u.floor.Store(floor)
	if e := entries[i]; e.Counted {
		if err := os.Rename(filepath.Join(u.entryDir(), e.String()), filepath.Join(u.entryDir(), e.Good().String())); err != nil {
			return 0, err
		}
		if err := syncDir(u.entryDir()); err != nil {
			return 0, err
		}
	}
	for _, e := range entries {
		if e.Index < floor && e.Index != u.cfg.Running.Index {
			if err := u.unpublish(e.Index); err != nil {
				return 0, err
			}
		}
	}
	return floor, nil
}

// settle takes away the mark of a trial that is over: where the running image is good and none waits to start, nothing is on trial.
func (u *Updater) settle(trial func(waits bool) error) error {
	done, err := u.change()
	if err != nil {
		return err
	}
	defer done()
	s, err := u.Status()
	if err != nil || !s.Good || s.Committed != nil {
		return err
	}
	return trial(false)
}

// sequential writes to a device from an offset on.
type sequential struct {
	to io.WriterAt
	at int64
}

func (s *sequential) Write(p []byte) (int, error) {
	n, err := s.to.WriteAt(p, s.at)
	s.at += int64(n)
	return n, err
}

// reader ends with its context.
type reader struct {
	ctx context.Context
	r   io.Reader
}

func (r reader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.r.Read(p)
}

// writeFile writes a file whole, and onto the disk.
func writeFile(name string, data []byte) error {
	if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
		return err
	}
	f, err := os.OpenFile(name, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	return syncDir(filepath.Dir(name))
}

func syncDir(name string) error {
	d, err := os.Open(name)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

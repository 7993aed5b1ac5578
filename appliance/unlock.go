package appliance

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/emmansun/gmsm/sm3"

	"yinjian/api"
	"yinjian/api/wire"
	"yinjian/appliance/audit"
	"yinjian/appliance/custody"
	"yinjian/appliance/problem"
	"yinjian/hsm"
)

// Where the PINs of the cipher machines come from: hsm.pin_source.
const (
	PINFromFile   = "file"
	PINFromUnlock = "unlock"
	PINFromTPM    = "tpm"
)

// locked says whether the PINs are sealed on disk, and people can open them.
func (h *HSM) locked() bool { return h.PINSource == PINFromUnlock || h.PINSource == PINFromTPM }

// kindUnlocked is the entry that says who unlocked the PINs of this start.
const kindUnlocked = "appliance.unlocked"

// LockedPINsFile is where the sealed PINs lie.
func LockedPINsFile(dir string) string { return filepath.Join(dir, "secrets", "pins.locked") }

func unlockTriesFile(dir string) string { return filepath.Join(dir, "secrets", "unlock-tries.json") }

// PINName names a slot's PIN among the locked ones.
func PINName(machine string, class hsm.SlotClass) string { return machine + "/" + string(class) }

// WriteLockedPINs replaces the sealed PINs of the appliance in dir.
func WriteLockedPINs(dir string, l *custody.LockedPINs) error {
	b, err := json.MarshalIndent(l, "", "  ")
	if err != nil {
		return err
	}
	return writeFile(LockedPINsFile(dir), append(b, '\n'), 0o600)
}

// An unlocked is what the journal will say of an unlocking.
type unlocked struct {
	Actors, Holders []string
	Set             string
	Threshold, Of   int
	File            [sm3.Size]byte
	Wrong           int
	// TPM is what became of an unattended unlocking; nil where the configuration knows of none.
	TPM *tpmOutcome
}

const (
	// keepShares is for how long what one holder gave waits for the others.
	keepShares = 15 * time.Minute
	// freeTries wrong passphrases of a holder in a row cost nothing; each more costs a pause, from onePause, doubling to mostWait.
	freeTries = 5
	onePause  = time.Minute
	mostWait  = time.Hour
)

// A keeper collects passphrases while the appliance is locked.
type keeper struct {
	h       *house
	sealing sync.Mutex // held while PINs are sealed to the TPM, or no longer

	mu     sync.Mutex // held during a try, which takes some tenths of a second; guards what follows
	locked *custody.LockedPINs
	read   os.FileInfo // of the file that locked was read from
	sum    [sm3.Size]byte
	given  []custody.Share
	actors []string
	first  time.Time     // interval; when the first of given came
	done   chan struct{} // closed when the PINs are open
	tpm    *TPM          // nil: people alone unlock
	asked  tpmOutcome    // of the last time that it was asked
}

// tries are the wrong passphrases, counted on disk before the answer.
type tries struct {
	// Holders are the wrong ones in a row, by holder.
	Holders map[string]heldTries `json:"holders"`
	// Wrong are all since the last unlocking that the journal has.
	Wrong int `json:"wrong"`
}

type heldTries struct {
	Wrong  int           `json:"wrong"`
	BootID string        `json:"boot_id"`
	At     time.Duration `json:"at"` // since that boot
}

func readTries(dir string) (tries, error) {
	t := tries{Holders: map[string]heldTries{}}
	b, err := os.ReadFile(unlockTriesFile(dir))
	if errors.Is(err, fs.ErrNotExist) {
		return t, nil
	}
	if err == nil {
		err = json.Unmarshal(b, &t)
	}
	if t.Holders == nil {
		t.Holders = map[string]heldTries{}
	}
	return t, err
}

func (t tries) write(dir string) error {
	b, err := json.Marshal(t)
	if err != nil {
		return err
	}
	return writeFile(unlockTriesFile(dir), b, 0o600)
}

// wait is how long a holder's next try is refused. After another boot the pause begins anew.
func (t tries) wait(holder, boot string, now time.Duration) time.Duration {
	h := t.Holders[holder]
	if h.Wrong < freeTries {
		return 0
	}
	pause := min(onePause<<min(h.Wrong-freeTries, 10), mostWait)
	if h.BootID != boot {
		return pause - min(now, pause)
	}
	return max(0, h.At+pause-now)
}

// open waits until the PINs are unlocked, where they are locked and were not unlocked before. Those that were unlocked before
// another file, or another configuration, took their place are forgotten: a cipher machine may have refused them.
func (k *keeper) open(ctx context.Context, cfg *Config) error {
	k.mu.Lock()
	have := k.have()
	if have && (!cfg.HSM.locked() || k.changed()) {
		k.h.wipe()
		have = false
	}
	if !cfg.HSM.locked() || have {
		k.mu.Unlock()
		return nil
	}
	k.tpm, k.asked = nil, tpmOutcome{}
	if cfg.HSM.PINSource == PINFromTPM {
		k.tpm = cfg.HSM.TPM
	}
	k.done = make(chan struct{})
	done := k.done
	err := k.reload()
	k.mu.Unlock()
	if err != nil {
		k.h.log.WithError(err).Error("the locked PINs cannot be read")
	}
	k.h.enter(api.Locked)
	if k.tpm != nil {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		go k.askTPM(ctx, *k.tpm) // not waited for: one that does not answer holds up nobody
	}
	k.h.log.Info("locked: waiting for the holders' passphrases (yinjian unlock)")
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-done:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
		k.mu.Lock()
		if len(k.given) > 0 && time.Since(k.first) > keepShares { // interval
			k.drop()
			k.h.log.Warning("the passphrases given were forgotten: the others did not come in time")
		}
		_ = k.reload() // said before; the state says so
		k.mu.Unlock()
	}
}

// have says whether the PINs are unlocked.
func (k *keeper) have() bool {
	k.h.mu.Lock()
	defer k.h.mu.Unlock()
	return k.h.pins != nil
}

// changed says whether the file is another than the one that was read. mu is held.
func (k *keeper) changed() bool {
	st, err := os.Stat(LockedPINsFile(k.h.o.Dir))
	return err != nil || k.read == nil || !st.ModTime().Equal(k.read.ModTime()) || st.Size() != k.read.Size()
}

// reload reads the file when it is another than before. mu is held.
func (k *keeper) reload() error {
	if !k.changed() {
		return nil
	}
	name := LockedPINsFile(k.h.o.Dir)
	st, err := os.Stat(name)
	k.drop()
	k.locked, k.read = nil, nil
	if err != nil {
		return err
	}
	b, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	l, err := custody.ParseLockedPINs(b)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	k.locked, k.read, k.sum = l, st, sm3.Sum(b)
	return nil
}

// drop forgets what was given. mu is held.
func (k *keeper) drop() {
	for i := range k.given {
		k.given[i].Wipe()
	}
	k.given, k.actors = nil, nil
}

func (k *keeper) forget() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.drop()
}

// An unlockState is what is known of the locked PINs.
type unlockState struct {
	Enrolled  bool     `json:"enrolled"`
	Threshold int      `json:"threshold,omitempty"`
	Holders   []string `json:"holders,omitempty"`
	Given     []string `json:"given"`
	// Waits are the seconds for which a holder's tries are refused after wrong ones.
	Waits map[string]int `json:"waits,omitempty"`
	TPM   *tpmShown      `json:"tpm,omitempty"`
}

func (k *keeper) shown() *unlockState {
	k.mu.Lock()
	defer k.mu.Unlock()
	s := &unlockState{Given: k.givenBy(), TPM: k.shownTPM()}
	if k.locked == nil {
		return s
	}
	s.Enrolled, s.Threshold, s.Holders, s.Waits = true, k.locked.Threshold, k.locked.Names(), map[string]int{}
	t, err := readTries(k.h.o.Dir)
	if err != nil {
		return s // the try says so
	}
	for _, name := range s.Holders {
		if w := t.wait(name, k.h.sys.BootID(), k.h.sys.Boot()); w > 0 {
			s.Waits[name] = int(w/time.Second) + 1
		}
	}
	return s
}

func (k *keeper) givenBy() []string {
	out := []string{}
	for i := range k.given {
		out = append(out, k.given[i].Holder)
	}
	return out
}

// Unlock satisfies api.StateAdmin. A try is counted on disk before it is made.
func (h *house) Unlock(_ context.Context, actor string, req api.Unlock) (any, error) {
	return h.keeper.try(actor, req)
}

func (k *keeper) try(actor string, req api.Unlock) (any, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.h.wrongState(api.Locked); err != nil { // another may have been the last that was needed meanwhile
		return nil, err
	}
	dir, sys := k.h.o.Dir, k.h.sys
	if err := k.reload(); err != nil || k.locked == nil {
		return nil, problem.New(problem.WrongState, "没有口令包，或已损坏 (there are no locked PINs, or they are damaged): secrets/pins.locked",
			"yinjian unlock enrol --dir "+dir).With(err)
	}
	l := k.locked
	if !slices.Contains(l.Names(), req.Holder) {
		return nil, problem.Invalid("holder", "不是持有人；持有人为 %s (not a holder)", strings.Join(l.Names(), "、"))
	}
	if slices.Contains(k.givenBy(), req.Holder) {
		return nil, problem.New(problem.Exists, req.Holder+" 的口令已给出 (was given already)", "请另一位持有人给出口令 (another holder's is needed)")
	}
	t, err := readTries(dir)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", unlockTriesFile(dir), err)
	}
	if wait := t.wait(req.Holder, sys.BootID(), sys.Boot()); wait > 0 {
		p := problem.New(problem.RateLimited, fmt.Sprintf("%s 连续输错 %d 次，请于 %v 后再试 (wrong %d times in a row; try again after that)", req.Holder, t.Holders[req.Holder].Wrong, wait.Round(time.Second), t.Holders[req.Holder].Wrong),
			"其他持有人可先给出口令 (other holders may go first)")
		p.After = wait
		return nil, p
	}
	before := t.Holders[req.Holder]
	t.Holders[req.Holder] = heldTries{before.Wrong + 1, sys.BootID(), sys.Boot()}
	t.Wrong++
	if err := t.write(dir); err != nil {
		return nil, err
	}
	share, err := l.Share(req.Holder, []byte(req.Passphrase))
	if errors.Is(err, custody.ErrSealed) {
		k.h.log.WithField("holder", req.Holder).WithField("operator", actor).Warning("a wrong passphrase")
		p := problem.New(problem.PINWrong, req.Holder+" 的口令不正确 (the passphrase is wrong)", "核对后再试 (check it and try again)")
		p.TriesLeft = max(0, freeTries-before.Wrong-1)
		return nil, p
	}
	if err != nil {
		return nil, err
	}
	t.Wrong--
	delete(t.Holders, req.Holder)
	if err := t.write(dir); err != nil {
		return nil, err
	}
	if len(k.given) == 0 {
		k.first = time.Now() // interval
	}
	k.given = append(k.given, share)
	if !slices.Contains(k.actors, actor) {
		k.actors = append(k.actors, actor)
	}
	out := wire.Unlocked{Given: k.givenBy(), Threshold: l.Threshold}
	if len(k.given) < l.Threshold {
		return out, nil
	}
	pins, err := l.Open(k.given)
	if err != nil {
		k.drop() // a damaged file: the holders begin anew with the one that is put in its place
		return nil, err
	}
	u := &unlocked{Actors: k.actors, Holders: k.givenBy(), Set: l.Set(), Threshold: l.Threshold, Of: len(l.Holders), File: k.sum, Wrong: t.Wrong}
	if k.tpm != nil {
		u.TPM = &tpmOutcome{PCRs: k.asked.PCRs, File: k.asked.File, Why: k.asked.Why}
	}
	k.opened(pins, u)
	out.Opened = true
	return out, nil
}

// opened lets the start go on with the PINs. mu is held.
func (k *keeper) opened(pins map[string][]byte, u *unlocked) {
	k.h.mu.Lock()
	k.h.pins, k.h.unlocked, k.h.state = pins, u, api.Starting
	k.h.mu.Unlock()
	k.drop()
	close(k.done)
}

// journalUnlocking says in the journal who unlocked the PINs, once, and what was locked: whoever exchanges holders shows
// there.
func (a *Appliance) journalUnlocking(ctx context.Context) error {
	h := a.house
	h.mu.Lock()
	u := h.unlocked
	h.mu.Unlock()
	if u == nil {
		return nil
	}
	d := audit.Draft{
		Kind: kindUnlocked, Actor: strings.Join(u.Actors, "; "), Object: a.cfg.Node,
		Fields: []audit.Field{
			{Name: "holders", Value: audit.Text(strings.Join(u.Holders, "、"))}, {Name: "set", Value: audit.Text(u.Set)},
			{Name: "threshold", Value: audit.Int(u.Threshold)}, {Name: "of", Value: audit.Int(u.Of)},
			{Name: "file.sm3", Value: audit.Octets(u.File[:])}, {Name: "wrong", Value: audit.Int(u.Wrong)},
		},
	}
	if u.TPM != nil {
		d.Fields = append(d.Fields, u.TPM.fields()...)
	}
	_, err := a.journal.Append(ctx, d)
	if err != nil {
		return err
	}
	h.mu.Lock()
	h.unlocked = nil
	h.mu.Unlock()
	t, err := readTries(a.dir)
	if err == nil {
		t.Wrong = 0
		err = t.write(a.dir)
	}
	return err
}

// pinOf is the PIN of a slot: an unlocked one, or that of its file. place is the file that a refusal is remembered of. The
// caller wipes the PIN.
func (a *Appliance) pinOf(machine string, class hsm.SlotClass, slot Slot) (pin []byte, err error) {
	a.house.mu.Lock()
	locked := slices.Clone(a.house.pins[PINName(machine, class)])
	a.house.mu.Unlock()
	if locked != nil {
		return locked, nil
	}
	if slot.PINFile == "" {
		return nil, fmt.Errorf("口令包里没有 %s 的口令，也没有 pin_file：yinjian unlock enrol (the locked PINs have none for it, and it has no pin_file)", PINName(machine, class))
	}
	return ReadSecret(slot.PINFile)
}

// pinPlace is the file that a slot's PIN comes from.
func (a *Appliance) pinPlace(machine string, class hsm.SlotClass, slot Slot) string {
	a.house.mu.Lock()
	defer a.house.mu.Unlock()
	if a.house.pins[PINName(machine, class)] != nil {
		return LockedPINsFile(a.dir)
	}
	return slot.PINFile
}

// lockWarnings name PINs that lie on the disk although people unlock them.
func (a *Appliance) lockWarnings() []string {
	if !a.cfg.HSM.locked() {
		return nil
	}
	out := a.house.keeper.tpmWarnings()
	for _, m := range a.machines.all() {
		for class, s := range m.Slots {
			if _, err := os.Stat(s.PINFile); s.PINFile != "" && err == nil {
				out = append(out, fmt.Sprintf("密码机 %s 的 %s 槽位的口令文件仍在磁盘上 (its PIN file is still on the disk): %s", m.Name, class, s.PINFile))
			}
		}
	}
	slices.Sort(out)
	return out
}

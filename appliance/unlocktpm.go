package appliance

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/emmansun/gmsm/sm3"

	"yinjian/api"
	"yinjian/appliance/audit"
	"yinjian/appliance/custody"
	"yinjian/appliance/problem"
	"yinjian/hsm/tpm"
)

// Unattended unlocking: the PINs that people unlocked once are sealed beside the locked ones, to this machine's TPM. A start asks
// the TPM; what keeps it from answering is said, and the people unlock as if there were none.

// TPMPINsFile is where the PINs lie that the TPM opens.
func TPMPINsFile(dir string) string { return filepath.Join(dir, "secrets", "pins.tpm") }

// kindSealed is the entry of a decision that the appliance unlocks itself, or no longer does.
const kindSealed = "unlock.tpm"

const (
	// tpmAgain is after how long a TPM that did not answer is asked again: its driver may be loaded after us.
	tpmAgain = 5 * time.Second
	// tpmMost is how long an administrator waits for the TPM: the slowest take some seconds to make a key.
	tpmMost = time.Minute
)

func (t *TPM) validate(bad func(key, format string, args ...any)) {
	if !filepath.IsAbs(t.Device) {
		bad("hsm.tpm.device", "须为绝对路径 (an absolute path)")
	}
	for i, n := range t.PCRs {
		if n < 0 || n > tpm.MaxPCR || slices.Contains(t.PCRs[:i], n) {
			bad("hsm.tpm.pcrs", "须为 0–%d，各一次 (0 to %d, each once)", tpm.MaxPCR, tpm.MaxPCR)
			return
		}
	}
}

// A tpmOutcome is what became of asking the TPM.
type tpmOutcome struct {
	PCRs []int
	File string // SM3 of the file, hexadecimal; "": there is none
	Why  string // why the PINs are not open; "": they are, or nobody has asked yet

	locked [sm3.Size]byte // the file of the locked PINs that they go with
}

func (o *tpmOutcome) fields() []audit.Field {
	outcome := "opened"
	if o.Why != "" {
		outcome = cutText("refused: " + o.Why)
	}
	return []audit.Field{{Name: "tpm", Value: audit.Text(outcome)}, {Name: "tpm.pcrs", Value: audit.Text(pcrNames(o.PCRs))}, {Name: "tpm.file.sm3", Value: audit.Text(o.File)}}
}

func pcrNames(pcrs []int) string {
	var out []string
	for _, n := range pcrs {
		out = append(out, strconv.Itoa(n))
	}
	return strings.Join(out, ",")
}

// A tpmShown is what the state says of it.
type tpmShown struct {
	Device string `json:"device"`
	PCRs   []int  `json:"pcrs,omitempty"` // that the PINs are sealed to
	Sealed bool   `json:"sealed"`
	// Why says what keeps it from unlocking.
	Why string `json:"why,omitempty"`
}

func (t *tpmShown) words() string {
	return "无人值守解锁没有成功 (the TPM does not unlock): " + t.Why
}

// shownTPM is called under mu.
func (k *keeper) shownTPM() *tpmShown {
	if k.tpm == nil {
		return nil
	}
	return &tpmShown{Device: k.tpm.Device, PCRs: k.asked.PCRs, Sealed: k.asked.File != "", Why: k.asked.Why}
}

// tpmWarnings say that the next start will wait for people although the configuration has a TPM.
func (k *keeper) tpmWarnings() []string {
	k.mu.Lock()
	defer k.mu.Unlock()
	if t := k.shownTPM(); t != nil && t.Why != "" {
		return []string{t.words() + "；核对后 yinjian unlock seal --tpm (look into it, then seal anew)"}
	}
	return nil
}

// askTPM asks until the PINs are open, or the answer will not be another one.
func (k *keeper) askTPM(ctx context.Context, at TPM) {
	said := ""
	for {
		pins, o, again := k.fromTPM(at)
		k.mu.Lock()
		if ctx.Err() != nil || k.h.wrongState(api.Locked) != nil { // people were faster
			k.mu.Unlock()
			wipeMap(pins)
			return
		}
		if o.Why == "" && (k.locked == nil || k.sum != o.locked) { // exchanged while the TPM was asked
			wipeMap(pins)
			o.Why, again = whyExchanged, true
		}
		k.asked = o
		if o.Why == "" {
			k.opened(pins, &unlocked{Actors: []string{"appliance"}, Set: k.locked.Set(), Threshold: k.locked.Threshold, Of: len(k.locked.Holders), File: k.sum, TPM: &o})
			k.mu.Unlock()
			k.h.log.WithField("device", at.Device).Info("unlocked by the TPM")
			return
		}
		k.mu.Unlock()
		if o.Why != said {
			k.h.log.WithField("device", at.Device).WithField("error", o.Why).Warning("the TPM does not unlock: people have to")
			said = o.Why
		}
		if !again {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(tpmAgain):
		}
	}
}

const whyExchanged = "口令包 pins.locked 在封给 TPM 之后换过 (the locked PINs are others than when it was sealed)"

func wipeMap(secrets map[string][]byte) {
	for _, s := range secrets {
		clear(s)
	}
}

// fromTPM asks once. again says that the reason may pass.
func (k *keeper) fromTPM(at TPM) (pins map[string][]byte, o tpmOutcome, again bool) {
	k.mu.Lock()
	have, sum := k.locked != nil, k.sum
	k.mu.Unlock()
	o.locked = sum
	b, err := os.ReadFile(TPMPINsFile(k.h.o.Dir))
	switch {
	case !have:
		o.Why = "没有口令包，或已损坏：yinjian unlock enrol (there are no locked PINs, or they are damaged)"
		return nil, o, true
	case errors.Is(err, fs.ErrNotExist):
		o.Why = "尚未封给 TPM：解锁后 yinjian unlock seal --tpm (nothing is sealed to the TPM yet)"
		return nil, o, false
	case err != nil:
		o.Why = err.Error()
		return nil, o, false
	}
	digest := sm3.Sum(b)
	o.File = hex.EncodeToString(digest[:])
	d, err := custody.ParseDevicePINs(b)
	var sealed tpm.Sealed
	if err == nil {
		err = json.Unmarshal(d.Device, &sealed)
	}
	if err != nil {
		o.Why = TPMPINsFile(k.h.o.Dir) + " 已损坏 (is damaged): " + err.Error()
		return nil, o, false
	}
	o.PCRs = sealed.PCRs
	if [sm3.Size]byte(d.Locked) != sum {
		o.Why = whyExchanged
		return nil, o, false
	}
	secret, err := sealed.Open(at.Device)
	if err == nil {
		defer clear(secret)
		pins, err = d.Open(secret)
	}
	if err != nil {
		o.Why = tpmWords(err)
	}
	return pins, o, errors.Is(err, tpm.ErrUnavailable)
}

// tpmWords says what a TPM's refusal means.
func tpmWords(err error) string {
	var changed *tpm.ChangedError
	var empty *tpm.EmptyError
	switch {
	case errors.As(err, &empty):
		return fmt.Sprintf("PCR %s 从启动到现在没有度量过任何东西，别的系统启动也是这样，封给它等于不封 (nothing is measured into it: any other system leaves it so)", pcrNames(empty.PCRs))
	case errors.As(err, &changed):
		return fmt.Sprintf("平台度量已变：PCR %s 与封存时不同，固件、启动配置或启动的系统改过 (the machine was started otherwise than when it was sealed)", pcrNames(changed.PCRs))
	case errors.Is(err, tpm.ErrOther):
		return "不是封存时的 TPM，或它已被清除，或 pins.tpm 已损坏 (another TPM, or it was cleared, or the file is damaged)"
	case errors.Is(err, tpm.ErrUnavailable):
		return "TPM 不应答 (the TPM cannot be reached): " + err.Error()
	}
	return err.Error()
}

// A sealing is what the change log says of an unattended unlocking.
type sealing struct {
	Device string `json:"device"`
	PCRs   string `json:"pcrs"`
	File   string `json:"file_sm3"`
}

// present is what is sealed now; nil: nothing is.
func (k *keeper) present() *sealing {
	b, err := os.ReadFile(TPMPINsFile(k.h.o.Dir))
	if err != nil {
		return nil
	}
	digest := sm3.Sum(b)
	s := &sealing{File: hex.EncodeToString(digest[:])}
	if d, err := custody.ParseDevicePINs(b); err == nil {
		var sealed tpm.Sealed
		if json.Unmarshal(d.Device, &sealed) == nil {
			s.PCRs = pcrNames(sealed.PCRs)
		}
	}
	return s
}

// SealUnlock satisfies api.UnlockAdmin: the PINs that were unlocked at this start are sealed to the TPM, so that the next starts
// need nobody. The entry comes before the file: what the journal does not know of opens nothing.
func (d admin) SealUnlock(ctx context.Context, actor string, req api.SealUnlock) (any, error) {
	k := &d.a.house.keeper
	k.sealing.Lock()
	defer k.sealing.Unlock()
	if d.a.cfg.HSM.PINSource != PINFromTPM {
		return nil, problem.New(problem.WrongState, "hsm.pin_source 不是 tpm (the configuration does not say tpm)", `config.toml 写 hsm.pin_source = "tpm"，重启并解锁后再试 (write it there, restart, unlock, and try again)`)
	}
	at, dir := *d.a.cfg.HSM.TPM, d.a.house.o.Dir
	file, err := os.ReadFile(LockedPINsFile(dir))
	if err != nil {
		return nil, err
	}
	sum := sm3.Sum(file)
	k.mu.Lock()
	same := sum == k.sum
	k.mu.Unlock()
	if !same {
		return nil, problem.New(problem.WrongState, "口令包在本次解锁之后换过 (the locked PINs are others than those that were unlocked)", "重启并由持有人解锁后再试 (restart, have the holders unlock, and try again)")
	}
	d.a.house.mu.Lock()
	pins := map[string][]byte{}
	for name, pin := range d.a.house.pins {
		pins[name] = slices.Clone(pin)
	}
	d.a.house.mu.Unlock()
	defer wipeMap(pins)
	secret := custody.NewDeviceSecret()
	defer clear(secret)
	sealed, err := sealWithin(ctx, tpmMost, at, slices.Clone(secret))
	if err != nil {
		return nil, problem.New(problem.NotReady, "未能封给 TPM (not sealed to the TPM): "+printable(tpmWords(err)), "核对 hsm.tpm.device 与 hsm.tpm.pcrs (look at these keys)").With(err)
	}
	bundle, err := custody.SealToDevice(pins, sum, sealed, secret)
	if err != nil {
		return nil, err
	}
	out, err := json.MarshalIndent(bundle, "", "  ")
	if err != nil {
		return nil, err
	}
	out = append(out, '\n')
	digest := sm3.Sum(out)
	now := sealing{at.Device, pcrNames(sealed.PCRs), hex.EncodeToString(digest[:])}
	if err := d.noteSealing(ctx, actor, "sealed", k.present(), &now, req); err != nil {
		return nil, err
	}
	if err := writeFile(TPMPINsFile(dir), out, 0o600); err != nil {
		return nil, err
	}
	k.mu.Lock()
	k.asked = tpmOutcome{PCRs: sealed.PCRs, File: now.File}
	k.mu.Unlock()
	return now, nil
}

// sealWithin waits for the TPM so long, and no longer; it wipes the secret when the TPM has answered.
func sealWithin(ctx context.Context, most time.Duration, at TPM, secret []byte) (*tpm.Sealed, error) {
	ctx, cancel := context.WithTimeout(ctx, most)
	defer cancel()
	type answer struct {
		sealed *tpm.Sealed
		err    error
	}
	got := make(chan answer, 1)
	go func() {
		defer clear(secret)
		s, err := tpm.Seal(at.Device, at.PCRs, secret)
		got <- answer{s, err}
	}()
	select {
	case a := <-got:
		return a.sealed, a.err
	case <-ctx.Done():
		return nil, fmt.Errorf("%w: %w", tpm.ErrUnavailable, ctx.Err())
	}
}

// UnsealUnlock satisfies api.UnlockAdmin: from the next start on people unlock. The file goes before the entry, for that is the
// side on which to err.
func (d admin) UnsealUnlock(ctx context.Context, actor string, req api.UnsealUnlock) (any, error) {
	k := &d.a.house.keeper
	k.sealing.Lock()
	defer k.sealing.Unlock()
	was := k.present()
	if was == nil {
		return nil, problem.New(problem.NotFound, "没有封给 TPM (nothing is sealed to the TPM)", "yinjian status 查看 (see yinjian status)")
	}
	if err := removeFile(TPMPINsFile(d.a.house.o.Dir)); err != nil {
		return nil, err
	}
	k.mu.Lock()
	k.asked = tpmOutcome{Why: "已由管理员取消 (an administrator has ended it)"}
	k.mu.Unlock()
	return map[string]any{}, d.noteSealing(ctx, actor, "removed", was, nil, api.SealUnlock{Reason: req.Reason})
}

func (d admin) noteSealing(ctx context.Context, actor, act string, was, now *sealing, req api.SealUnlock) error {
	changed, err := audit.Changed(was, now)
	if err != nil {
		return err
	}
	fields := append(changed, audit.Field{Name: "act", Value: audit.Text(act)}, audit.Field{Name: "reason", Value: audit.Text(req.Reason)})
	if len(req.Persons) > 0 {
		fields = append(fields, personsField(req.Persons))
	}
	if _, err := d.a.journal.Append(ctx, audit.Draft{Kind: kindSealed, Actor: actor, Object: d.a.cfg.Node, State: true, Fields: fields}); err != nil {
		return journalRefused(err)
	}
	return nil
}

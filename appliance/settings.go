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
	"strings"
	"sync"
	"time"

	"github.com/emmansun/gmsm/sm3"
	"github.com/pelletier/go-toml/v2"

	"yinjian/api"
	"yinjian/api/wire"
	"yinjian/appliance/audit"
	"yinjian/appliance/problem"
)

// Entries about changes of config.toml. What was approved is journalled before it can be tried.
const (
	kindSettingsWaiting   = "appliance.settings/waiting"   // two persons have approved it: the next start tries it
	kindSettingsCancelled = "appliance.settings/cancelled" // it will not be tried, or one that was left is forgotten
	kindSettingsRestart   = "appliance.settings/restart"   // the process ends to be started with it
	kindSettingsTrial     = "appliance.settings/trial"     // this start has it
	kindSettingsConfirmed = "appliance.settings/confirmed" // somebody reaches the appliance with it
	kindSettingsGood      = "appliance.settings/good"      // it has proved itself and stays
	kindSettingsLeft      = "appliance.settings/left"      // the settings of before are back
)

// ErrRestart is what [Run] ends with when the process is to be started anew: with other settings, or with those of before.
var ErrRestart = errors.New("重新启动，以采用另一份设置 (ends to be started again with other settings)")

// errTrialOver is why a start with new settings is given up.
type errTrialOver struct{ why string }

func (e errTrialOver) Error() string { return e.why }

const (
	// trialWithin is how long a start with new settings may take until it is operational, reachWithin how long until somebody has
	// confirmed that administrators reach it. A start that waits for a person would wait for ever on a machine that nobody reaches.
	trialWithin = 5 * time.Minute
	reachWithin = 30 * time.Minute
	// settledFor is how long it stays operational before it is believed.
	settledFor = 10 * time.Second
	// trialStarts are the processes that may try: one that is killed or crashes cannot say so.
	trialStarts = 3
	// trialPause is the longest between two tries.
	trialPause = 15 * time.Second
)

// A settingsRecord says of a change what may be told: no secret is in it.
type settingsRecord struct {
	By      string               `json:"by"`
	Persons []string             `json:"persons"`
	Reason  string               `json:"reason"`
	Changes []wire.SettingChange `json:"changes"`
	Before  string               `json:"before"` // SM3 of config.toml
	After   string               `json:"after"`
	Confirm bool                 `json:"confirm"`
	// Tries are the processes that have begun with it.
	Tries int `json:"tries"`
	// New are the files of the folder secrets that were not there before.
	New []string `json:"new,omitempty"`
	// Why is why it was left, Told whether the journal has that.
	Why  string `json:"why,omitempty"`
	Told bool   `json:"told,omitempty"`
}

// settings are the change that waits, the one that is tried, and the one that was left, in the folder settings:
//
//	.making/   being written, counts for nothing
//	next/      approved: config.toml, secrets/, settings.json. It appears whole, by a rename.
//	.old/      the present config.toml and secrets being copied, counts for nothing
//	trial/     they are kept while next is tried. It appears whole, by a rename, before anything is changed.
//	undo/      trial, once it was decided to go back; from then on nothing but that happens
//	left.json  what was left last
//
// A start puts next in place file by file, each by a rename, while trial is there; it is begun again where a power cut has ended it.
// Going back renames the files of undo to where they were: that needs no room on the disk.
type settings struct {
	h *house
	// rename is os.Rename, but in tests that cut the power.
	rename func(from, to string) error

	// acts is held over each act that is journalled, which may wait for the cipher machine; whoever only looks takes mu alone.
	acts sync.Mutex

	mu          sync.Mutex // guards what follows; trial, left and waiting are written by who holds acts too, or when nothing else runs
	trial       *settingsRecord
	left        *settingsRecord
	waiting     *settingsRecord
	began       time.Time // interval; of the first start of this process that was not waiting for people
	operational time.Time // interval; zero until it is
	confirmed   bool
	failed      string                  // how the last start failed that is tried again
	placed      bool                    // this process has put files in place
	leave       context.CancelCauseFunc // ends the start that is under way
}

func settingsFolder(dir string) string { return filepath.Join(dir, "settings") }

func (s *settings) at(parts ...string) string {
	return filepath.Join(append([]string{settingsFolder(s.h.o.Dir)}, parts...)...)
}

func (s *settings) move(from, to string) error {
	if s.rename != nil {
		return s.rename(from, to)
	}
	return os.Rename(from, to)
}

func isThere(name string) bool {
	_, err := os.Lstat(name)
	return err == nil
}

// trialStands says whether the configuration in dir may be one that is tried, which need not be readable.
func trialStands(dir string) bool {
	return isThere(filepath.Join(settingsFolder(dir), "trial")) || isThere(filepath.Join(settingsFolder(dir), "undo"))
}

func (s *settings) read(name string) (*settingsRecord, error) {
	b, err := os.ReadFile(s.at(name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	r := new(settingsRecord)
	if err == nil {
		err = json.Unmarshal(b, r)
	}
	if err != nil {
		return nil, fmt.Errorf("settings/%s: %w", name, err)
	}
	return r, nil
}

func (s *settings) write(name string, r *settingsRecord) error {
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return writeFile(s.at(name), append(b, '\n'), 0o600)
}

// drop removes a folder so that a stop in between leaves it whole or not at all.
func (s *settings) drop(name string) error {
	if !isThere(s.at(name)) {
		return nil
	}
	if err := errors.Join(os.RemoveAll(s.at(".gone")), s.move(s.at(name), s.at(".gone")), syncFolder(s.at())); err != nil {
		return err
	}
	return os.RemoveAll(s.at(".gone"))
}

// appear makes a folder that was written count.
func (s *settings) appear(from, to string) error {
	for _, name := range []string{s.at(from, "secrets"), s.at(from)} {
		if err := syncFolder(name); err != nil {
			return err
		}
	}
	if err := s.move(s.at(from), s.at(to)); err != nil {
		return err
	}
	return syncFolder(s.at())
}

// begin is the first thing of a process: what was approved is put in place to be tried, what was tried too often goes out again.
func (s *settings) begin() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !isThere(s.at()) {
		return nil
	}
	for _, name := range []string{".making", ".old", ".gone"} {
		if err := os.RemoveAll(s.at(name)); err != nil {
			return err
		}
	}
	if isThere(s.at("undo")) {
		if err := s.finishUndo(); err != nil {
			return err
		}
	}
	if isThere(s.at("next")) && !isThere(s.at("trial")) {
		if err := s.keepOld(); err != nil { // nothing was changed
			if err := s.refuseNext(err); err != nil {
				return err
			}
		}
	}
	if isThere(s.at("next")) {
		if err := s.install(); err != nil {
			return errors.Join(s.undoBecause("未能写入 (could not be put in place)："+err.Error()), s.drop("next"))
		}
	}
	left, err := s.read("left.json")
	if err != nil {
		s.h.log.WithError(err).Error("what settings were left last cannot be read")
	}
	s.left = left
	if !isThere(s.at("trial")) {
		return nil
	}
	r, err := s.read("trial/settings.json")
	if err == nil && r == nil {
		err = fs.ErrNotExist
	}
	if err == nil {
		if r.Tries++; r.Tries > trialStarts {
			err = fmt.Errorf("%d 次启动都没有证明可用 (starts did not prove it)", trialStarts)
		} else {
			err = s.write("trial/settings.json", r)
		}
	}
	if err != nil {
		return s.undoBecause(err.Error())
	}
	s.trial = r
	s.h.log.WithField("try", r.Tries).Info("this start tries new settings")
	return nil
}

// keepOld copies what next will replace.
func (s *settings) keepOld() error {
	r, err := s.read("next/settings.json")
	if err != nil || r == nil {
		return errors.Join(errors.New("记录读不出 (its record cannot be read)"), err)
	}
	dir := s.h.o.Dir
	now, err := os.ReadFile(filepath.Join(dir, "config.toml"))
	if err != nil {
		return err
	}
	if sumOf(now) != r.Before {
		return errors.New("批准之后 config.toml 又被改过 (config.toml was changed after the approval)")
	}
	names, err := s.secretsOf("next")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(s.at(".old", "secrets"), 0o700); err != nil {
		return err
	}
	r.New = nil
	for _, name := range names {
		b, err := os.ReadFile(filepath.Join(dir, "secrets", name))
		if errors.Is(err, fs.ErrNotExist) {
			r.New = append(r.New, name)
			continue
		}
		if err == nil {
			err = writeFile(s.at(".old", "secrets", name), b, 0o600)
		}
		if err != nil {
			return err
		}
	}
	if err := errors.Join(writeFile(s.at(".old", "config.toml"), now, 0o600), s.write(".old/settings.json", r)); err != nil {
		return err
	}
	return s.appear(".old", "trial")
}

func (s *settings) secretsOf(folder string) ([]string, error) {
	entries, err := os.ReadDir(s.at(folder, "secrets"))
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names, err
}

// install puts the files of next in place. Those that are no longer there were put in place before a power cut.
func (s *settings) install() error {
	dir := s.h.o.Dir
	was, err := os.ReadFile(s.at("trial", "config.toml"))
	if err == nil {
		err = writeFile(filepath.Join(dir, "config.toml.previous"), was, 0o600)
	}
	if err == nil {
		err = s.moveIn("next")
	}
	if err != nil {
		return err
	}
	return s.drop("next")
}

// moveIn puts the files of a folder where they belong.
func (s *settings) moveIn(folder string) error {
	s.placed = true
	dir := s.h.o.Dir
	names, err := s.secretsOf(folder)
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := s.move(s.at(folder, "secrets", name), filepath.Join(dir, "secrets", name)); err != nil {
			return err
		}
	}
	if err := syncFolder(filepath.Join(dir, "secrets")); err != nil {
		return err
	}
	if err := s.move(s.at(folder, "config.toml"), filepath.Join(dir, "config.toml")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return syncFolder(dir)
}

// refuseNext leaves a change that nothing was done of.
func (s *settings) refuseNext(why error) error {
	r, err := s.read("next/settings.json")
	if err != nil || r == nil {
		r = new(settingsRecord)
	}
	r.Why = printable(why.Error())
	s.h.log.WithError(why).Error("new settings could not be tried: those of before stay")
	return errors.Join(s.write("left.json", r), s.drop("next"))
}

// undoBecause goes back to the settings of before. mu is held.
func (s *settings) undoBecause(why string) error {
	s.h.log.WithField("reason", why).Error("new settings did not prove themselves: those of before are put back")
	if r, err := s.read("trial/settings.json"); err == nil && r != nil {
		r.Why = printable(s.scrubbed(why))
		if err := s.write("trial/settings.json", r); err != nil { // a full disk: without the reason then
			s.h.log.WithError(err).Error("why settings are left could not be written")
		}
	}
	s.trial = nil
	if err := errors.Join(s.move(s.at("trial"), s.at("undo")), syncFolder(s.at())); err != nil {
		return err
	}
	return s.finishUndo()
}

// finishUndo puts the files of undo back.
func (s *settings) finishUndo() error {
	r, err := s.read("undo/settings.json")
	if err != nil {
		s.h.log.WithError(err).Error("the record of settings cannot be read: they are put back without it")
	}
	if err := s.moveIn("undo"); err != nil {
		return err
	}
	if r != nil {
		for _, name := range r.New {
			if err := os.Remove(filepath.Join(s.h.o.Dir, "secrets", name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
		if err := s.move(s.at("undo", "settings.json"), s.at("left.json")); err != nil {
			return err
		}
		s.left = r
	}
	return errors.Join(s.drop("next"), s.drop("undo"))
}

// scrubbed is a text without what the settings that are tried hide: values of config.toml that could be secrets, and secrets.
func (s *settings) scrubbed(text string) string {
	dir := s.h.o.Dir
	hide := func(v string) {
		if v = strings.TrimSpace(v); len(v) >= 4 {
			text = strings.ReplaceAll(text, v, "（不显示）")
		}
	}
	if cfg, err := LoadConfig(dir); err == nil {
		raw, shown := map[string]string{}, map[string]string{}
		if b, err := toml.Marshal(cfg); err == nil {
			var tree map[string]any
			if toml.Unmarshal(b, &tree) == nil {
				flatten("", tree, raw)
				flatten("", shownValue("", tree), shown)
			}
		}
		for key, v := range raw {
			if shown[key] != v {
				hide(v)
			}
		}
	}
	names, _ := os.ReadDir(filepath.Join(dir, "secrets"))
	for _, e := range names {
		if b, err := os.ReadFile(filepath.Join(dir, "secrets", e.Name())); err == nil {
			hide(string(b))
		}
	}
	return text
}

// within is how long a start may take.
func (s *settings) within() time.Duration {
	if d := s.h.o.TrialWithin; d > 0 {
		return d
	}
	return trialWithin
}

func (s *settings) reach() time.Duration {
	if d := s.h.o.ReachWithin; d > 0 {
		return d
	}
	return reachWithin
}

// tries says whether this process tries new settings.
func (s *settings) tries() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.trial != nil
}

// attempt is one start: it is ended when it takes too long with settings that are tried, or when leave is called.
func (s *settings) attempt(ctx context.Context) (context.Context, func()) {
	ctx, leave := context.WithCancelCause(ctx)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.leave, s.operational = leave, time.Time{}
	if s.trial == nil {
		return ctx, func() { leave(nil) }
	}
	if s.began.IsZero() {
		s.began = time.Now() // interval
	}
	timer := time.AfterFunc(max(0, s.within()-time.Since(s.began)), func() { // interval
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.operational.IsZero() {
			leave(errTrialOver{fmt.Sprintf("启动未在 %v 内完成 (the start took too long)", s.within())})
		}
	})
	return ctx, func() {
		timer.Stop()
		leave(nil)
	}
}

// reached is told when all listeners are open.
func (s *settings) reached() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.operational = time.Now() // interval
}

// givesUp is "", or why the settings of before are put back after a start ended with err. f is nil when the process was operational.
func (s *settings) givesUp(err error, f *failure) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var over errTrialOver
	var wrong settingError
	switch {
	case s.trial == nil || err == nil:
		return ""
	case errors.As(err, &over):
		return over.why + s.failed
	case errors.As(err, &wrong):
		return err.Error()
	case f == nil: // a part failed afterwards: the process ends, and its tries are counted
		return ""
	case f.RetryInS == 0, time.Since(s.began) >= s.within(): // interval
		return fmt.Sprintf("启动失败 %s，%s：%s (the start failed)", f.Code, f.Step, f.Reason)
	}
	s.failed = fmt.Sprintf("；此前 (before that) %s，%s：%s", f.Code, f.Step, f.Reason)
	return ""
}

// undo goes back.
func (s *settings) undo(why string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.undoBecause(why)
}

func sumOf(b []byte) string {
	sum := sm3.Sum(b)
	return hex.EncodeToString(sum[:])
}

// proveSettings journals what became of settings that were left, and proves those that this start tries: it has been operational for a
// while, and, where administrators might not reach it any more, somebody has said that they do. Otherwise the process ends with those
// of before.
func (a *Appliance) proveSettings(ctx context.Context) error {
	s := &a.house.settings
	begun := false
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		done, err := a.proveOnce(ctx, s, &begun)
		if err != nil && ctx.Err() == nil {
			a.log.WithError(err).Error("what becomes of new settings could not be written down; it is tried again")
		}
		if done {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

func (a *Appliance) proveOnce(ctx context.Context, s *settings, begun *bool) (done bool, err error) {
	s.acts.Lock()
	defer s.acts.Unlock()
	if s.left != nil && !s.left.Told {
		if err := a.noteSettings(ctx, kindSettingsLeft, "appliance", s.left, audit.Field{Name: "why", Value: audit.Text(s.left.Why)}); err != nil {
			return false, err
		}
		s.set(func() { s.left.Told = true })
		if err := s.write("left.json", s.left); err != nil {
			return false, err
		}
	}
	if s.trial == nil {
		return true, nil
	}
	if !*begun {
		if err := a.noteSettings(ctx, kindSettingsTrial, "appliance", s.trial, audit.Field{Name: "try", Value: audit.Int(int64(s.trial.Tries))}); err != nil {
			return false, err
		}
		*begun = true
	}
	s.mu.Lock()
	operational, leave := s.operational, s.leave
	s.mu.Unlock()
	since := time.Since(operational) // interval
	switch {
	case operational.IsZero() || since < settledFor:
		return false, nil
	case s.trial.Confirm && !s.confirmed && since >= s.reach():
		leave(errTrialOver{fmt.Sprintf("%v 内没有人确认管理员仍连得到 (nobody confirmed in time that administrators reach it)", s.reach())})
		return true, nil
	case s.trial.Confirm && !s.confirmed:
		return false, nil
	}
	if err := a.noteSettings(ctx, kindSettingsGood, "appliance", s.trial); err != nil {
		return false, err
	}
	if err := s.drop("trial"); err != nil {
		return false, err
	}
	s.set(func() { s.trial = nil })
	a.log.Info("the new settings have proved themselves")
	return true, nil
}

// noteSettings journals what becomes of a change: which keys, and which files, never a secret.
func (a *Appliance) noteSettings(ctx context.Context, kind, actor string, r *settingsRecord, more ...audit.Field) error {
	old, now := map[string]string{}, map[string]string{}
	for _, c := range r.Changes {
		old[c.Key], now[c.Key] = c.Old, c.New
	}
	var fields []audit.Field
	var err error
	switch kind {
	case kindSettingsWaiting:
		fields, err = audit.Changed(old, now)
	case kindSettingsLeft, kindSettingsCancelled:
		fields, err = audit.Changed(now, old)
	case kindSettingsRestart:
		fields, err = audit.Changed(map[string]string{"state": "waiting"}, map[string]string{"state": "restarting"})
	case kindSettingsConfirmed:
		fields, err = audit.Changed(map[string]string{"state": "trial"}, map[string]string{"state": "confirmed"})
	}
	if err != nil {
		return err
	}
	fields = append(fields, audit.Field{Name: "config.before", Value: audit.Text(r.Before)}, audit.Field{Name: "config.after", Value: audit.Text(r.After)},
		personsField(r.Persons), audit.Field{Name: "approved_by", Value: audit.Text(r.By)})
	_, err = a.journal.Append(ctx, audit.Draft{Kind: kind, Actor: actor, Object: a.cfg.Node, State: true, Fields: append(fields, more...)})
	if err != nil {
		return journalRefused(err)
	}
	return nil
}

// warnings are about changes that somebody should look after.
func (s *settings) warnings() (out []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.waiting != nil {
		out = append(out, "已批准的设置等待重新启动 (approved settings wait for a restart): yinjian settings restart")
	}
	if s.trial != nil && s.trial.Confirm && !s.confirmed {
		out = append(out, fmt.Sprintf("正在试用新的设置：%v 内须有人确认管理员仍连得到，否则自动换回原来的 (new settings are tried: somebody has to confirm that administrators reach the appliance, or those of before come back): yinjian settings confirm", s.remaining().Round(time.Second)))
	}
	if s.left != nil {
		out = append(out, "新的设置没有成功，已换回原来的 (new settings were left again): "+s.left.Why)
	}
	return out
}

// leftWhy is why the last settings were left, if they were.
func (s *settings) leftWhy() (string, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.left == nil {
		return "", false
	}
	return s.left.Why, true
}

// remaining is how long there is to confirm. mu is held.
func (s *settings) remaining() time.Duration {
	if s.operational.IsZero() {
		return s.reach()
	}
	return max(0, s.reach()-time.Since(s.operational)) // interval
}

func (r *settingsRecord) shown() *wire.SettingsChange {
	if r == nil {
		return nil
	}
	return &wire.SettingsChange{By: r.By, Reason: r.Reason, Changes: r.Changes, Before: r.Before, After: r.After, Confirm: r.Confirm, Why: r.Why}
}

// Settings satisfies api.SettingsAdmin.
func (d admin) Settings(context.Context, string) (any, error) {
	shown, err := d.a.cfg.Shown()
	if err != nil {
		return nil, err
	}
	s := &d.a.house.settings
	s.mu.Lock()
	defer s.mu.Unlock()
	out := &wire.SettingsStatus{Config: string(shown), SM3: d.a.configSM3, Waiting: s.waiting.shown(), Trial: s.trial.shown(), Left: s.left.shown()}
	if out.Trial != nil && out.Trial.Confirm && !s.confirmed {
		out.Trial.LeftS = max(1, int(s.remaining()/time.Second))
	}
	return out, nil
}

// planned is what a change would make, and of what text.
func (d admin) planned(c *wire.Settings) (*settingsPlan, string, error) {
	now, err := os.ReadFile(filepath.Join(d.a.dir, "config.toml"))
	if err != nil {
		return nil, "", err
	}
	p, err := planSettings(d.a.dir, now, c)
	if err != nil {
		return nil, "", problem.Invalid("settings", "%s", strings.ReplaceAll(err.Error(), "\n", "；"))
	}
	return p, sumOf(now), nil
}

// CheckSettings satisfies api.SettingsAdmin.
func (d admin) CheckSettings(_ context.Context, _ string, req api.Settings) (any, error) {
	p, base, err := d.planned(&req)
	if err != nil {
		return nil, err
	}
	return &wire.CheckedSettings{Base: base, Changes: p.changes, Confirm: p.reach}, nil
}

var errSettingsPending = problem.New(problem.Exists, "已有一项设置等待重新启动，或正在试用 (a change waits for the restart, or is being tried)",
	"先重新启动、确认，或取消 (restart, confirm or cancel it first)")

// ChangeSettings satisfies api.SettingsAdmin: what was approved is written beside the configuration, whole, and the next start tries it.
func (d admin) ChangeSettings(ctx context.Context, actor string, req api.ChangeSettings) (any, error) {
	s := &d.a.house.settings
	s.acts.Lock()
	defer s.acts.Unlock()
	if s.waiting != nil || s.trial != nil {
		return nil, errSettingsPending
	}
	p, base, err := d.planned(&req.Settings)
	if err != nil {
		return nil, err
	}
	if base != req.Base || !slices.Equal(p.changes, req.Changes) {
		return nil, problem.Invalid("changes", "设置此后已变，或所列的改变与实际不符：重新核对后再提出 (the settings have changed since, or what is listed is not what would be done)")
	}
	r := &settingsRecord{By: actor, Persons: req.Persons, Reason: req.Reason, Changes: p.changes, Before: base, After: sumOf(p.text), Confirm: p.reach}
	// 1. All of it is on the disk, and counts for nothing yet.
	if err := errors.Join(os.MkdirAll(s.at(), 0o700), os.RemoveAll(s.at(".making"))); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(s.at(".making", "secrets"), 0o700); err != nil {
		return nil, err
	}
	err = errors.Join(writeFile(s.at(".making", "config.toml"), p.text, 0o600), s.write(".making/settings.json", r))
	for _, f := range req.Settings.Secrets {
		err = errors.Join(err, writeFile(s.at(".making", "secrets", f.Name), append([]byte(strings.TrimRight(string(f.Secret), "\r\n")), '\n'), 0o600))
	}
	// 2. The journal has it. 3. It counts.
	if err == nil {
		err = d.a.noteSettings(ctx, kindSettingsWaiting, actor, r, audit.Field{Name: "reason", Value: audit.Text(req.Reason)})
	}
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(s.at(".making")))
	}
	if err := s.appear(".making", "next"); err != nil {
		return nil, errors.Join(err, os.RemoveAll(s.at(".making")), d.a.noteSettings(context.WithoutCancel(ctx), kindSettingsCancelled, "appliance", r))
	}
	s.set(func() { s.waiting = r })
	return r.shown(), s.forgetLeft()
}

// set writes what others look at.
func (s *settings) set(write func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	write()
}

// forgetLeft takes back that a change was left. acts is held.
func (s *settings) forgetLeft() error {
	if s.left == nil {
		return nil
	}
	if err := removeFile(s.at("left.json")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	s.set(func() { s.left = nil })
	return nil
}

// CancelSettings satisfies api.SettingsAdmin.
func (d admin) CancelSettings(ctx context.Context, actor string, req api.DecideSettings) (any, error) {
	s := &d.a.house.settings
	s.acts.Lock()
	defer s.acts.Unlock()
	r := s.waiting
	if r == nil {
		r = s.left
	}
	if r == nil {
		return nil, problem.New(problem.NotFound, "没有等待重新启动的设置，也没有换回来的 (no change waits, and none was left)", "见 yinjian settings show (see there)")
	}
	if err := d.a.noteSettings(ctx, kindSettingsCancelled, actor, r, audit.Field{Name: "reason", Value: audit.Text(req.Reason)}); err != nil {
		return nil, err
	}
	if s.waiting == nil {
		return r.shown(), s.forgetLeft()
	}
	if err := s.drop("next"); err != nil {
		return nil, err
	}
	s.set(func() { s.waiting = nil })
	return r.shown(), nil
}

// RestartForSettings satisfies api.SettingsAdmin. The service manager starts the process again.
func (d admin) RestartForSettings(ctx context.Context, actor string, req api.DecideSettings) (any, error) {
	s := &d.a.house.settings
	s.acts.Lock()
	defer s.acts.Unlock()
	if s.waiting == nil {
		return nil, problem.New(problem.NotFound, "没有等待重新启动的设置 (no change waits for a restart)", "见 yinjian settings show (see there)")
	}
	if err := d.a.noteSettings(ctx, kindSettingsRestart, actor, s.waiting, audit.Field{Name: "reason", Value: audit.Text(req.Reason)}); err != nil {
		return nil, err
	}
	s.mu.Lock()
	leave := s.leave
	s.mu.Unlock()
	time.AfterFunc(restartPause, func() { leave(ErrRestart) })
	return s.waiting.shown(), nil
}

// restartPause lets the answer out.
const restartPause = 300 * time.Millisecond

// ConfirmSettings satisfies api.SettingsAdmin.
func (d admin) ConfirmSettings(ctx context.Context, actor string, req api.DecideSettings) (any, error) {
	s := &d.a.house.settings
	s.acts.Lock()
	defer s.acts.Unlock()
	if s.trial == nil || !s.trial.Confirm || s.confirmed {
		return nil, problem.New(problem.NotFound, "没有待确认的设置 (no settings wait to be confirmed)", "见 yinjian settings show (see there)")
	}
	if err := d.a.noteSettings(ctx, kindSettingsConfirmed, actor, s.trial, audit.Field{Name: "reason", Value: audit.Text(req.Reason)}); err != nil {
		return nil, err
	}
	s.set(func() { s.confirmed = true })
	return s.trial.shown(), nil
}

var _ api.SettingsAdmin = admin{}

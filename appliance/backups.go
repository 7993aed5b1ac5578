package appliance

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"yinjian/api"
	"yinjian/api/wire"
	"yinjian/appliance/audit"
	"yinjian/appliance/backup"
	"yinjian/appliance/evidence"
	"yinjian/appliance/problem"
	"yinjian/hsm"
)

// RestoreUnfinished is in a folder that `yinjian restore` has not finished.
const RestoreUnfinished = ".restore-unfinished"

// restoredMark is left by a restore: the next start begins a new epoch. Made by hand it is empty; `yinjian restore` writes
// a [Restored] into it.
const restoredMark = "restored"

// Restored says what an appliance's folder was restored from, and by whom.
type Restored struct {
	Backup  string   `json:"backup"` // id
	SM3     string   `json:"sm3"`    // of its file
	Entries uint64   `json:"entries"`
	Epoch   string   `json:"epoch"` // of the journal in it
	Persons []string `json:"persons"`
	// Begun is when the restore began, RFC 3339 by the machine's clock; the original did not run any more.
	Begun string `json:"begun"`
	// Proved: the file's digest was held against a receipt.
	Proved bool `json:"proved"`
	Drill  bool `json:"drill,omitempty"`
	// From is the address that the backup was sent from, to a machine that waited for it; "" for a restore to a folder.
	// Refused is how many wrong tokens that machine was shown before.
	From    string `json:"from,omitempty"`
	Refused int    `json:"refused,omitempty"`
}

// WriteRestored leaves the mark in dir, durably.
func WriteRestored(dir string, r Restored) error {
	b, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		return err
	}
	return writeFile(filepath.Join(dir, restoredMark), b, 0o600)
}

// readRestored answers whether the mark is there, and what it says; nil for one that was made by hand.
func readRestored(dir string) (bool, *Restored, error) {
	b, err := os.ReadFile(filepath.Join(dir, restoredMark))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil, nil
	}
	if err != nil || len(strings.TrimSpace(string(b))) == 0 {
		return err == nil, nil, err
	}
	r := new(Restored)
	if err := json.Unmarshal(b, r); err != nil {
		return true, nil, fmt.Errorf("%s: %w", restoredMark, err)
	}
	return true, r, nil
}

// checkHandedBack refuses to start what was restored while files are not there that no backup has.
func checkHandedBack(ctx context.Context, dir string) error {
	_, r, err := readRestored(dir)
	if err != nil || r == nil {
		return err
	}
	missing, err := NotHandedBack(ctx, dir)
	if err == nil && len(missing) > 0 {
		err = fmt.Errorf("恢复之后还须放回备份里没有的文件，权限 600 (put these back, mode 600; no backup has them): %s", strings.Join(missing, "、"))
	}
	return err
}

// NotHandedBack are the files and packs that a restored appliance needs, that no backup has, and that are not there.
func NotHandedBack(ctx context.Context, dir string) ([]string, error) {
	_, absent, err := BackupFiles(dir)
	if err != nil {
		return nil, err
	}
	cfg, err := LoadConfig(dir)
	if err != nil {
		return nil, err
	}
	var missing []string
	for _, name := range absent {
		if InPack(name) {
			if why := notHandedBack(ctx, cfg.Packs.Socket, name); why != "" {
				missing = append(missing, name+"（"+why+"）")
			}
			continue
		}
		path := name
		if !filepath.IsAbs(path) {
			path = filepath.Join(dir, name)
		}
		if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
			missing = append(missing, name)
		}
	}
	return missing, nil
}

// announceRestore says in the journal what it was restored from. It is written before the mark goes, so that a start
// which is cut off in between says it again.
func (a *Appliance) announceRestore(ctx context.Context, r *Restored) error {
	d := audit.Draft{Kind: backup.KindRestored, Actor: "appliance", Object: a.cfg.Node, State: true}
	if r == nil {
		d.Fields = []audit.Field{{Name: "reason", Value: audit.Text("没有说明来源的恢复 (restored by hand)")}}
	} else {
		digest, err := hex.DecodeString(r.SM3)
		if err != nil {
			return fmt.Errorf("%s: %w", restoredMark, err)
		}
		d.Fields = []audit.Field{
			{Name: "backup.id", Value: audit.Text(r.Backup)}, {Name: backup.FieldSM3, Value: audit.Octets(digest)}, {Name: backup.FieldEntries, Value: audit.Int(r.Entries)},
			{Name: "backup.epoch", Value: audit.Text(r.Epoch)}, {Name: "persons", Value: audit.Text(strings.Join(r.Persons, "、"))},
			{Name: "begun", Value: audit.Text(r.Begun)}, {Name: "proved", Value: audit.Bool(r.Proved)}, {Name: "drill", Value: audit.Bool(r.Drill)},
		}
		if r.From != "" {
			d.Fields = append(d.Fields, audit.Field{Name: "from", Value: audit.Text(r.From)}, audit.Field{Name: "tokens.refused", Value: audit.Int(r.Refused)})
		}
	}
	_, err := a.journal.Append(ctx, d)
	return err
}

// errOtherMachine refuses a restored journal beside a cipher machine that has not its log's key.
var errOtherMachine = errors.New("密码机里没有这份日志的日志密钥：不是备份时的那一台，或其密钥尚未恢复。真正的密码机用厂商的办法恢复密钥，再启动；软件密码机须用带 softtoken 的备份(--softtoken)重新 restore " +
	"(the cipher machine has not the key of this journal's log: it is another one, or its keys are not restored yet. Restore a real one by its vendor's means and start again; for the software one restore a backup that was made with --softtoken)")

// checkRestoredMachine looks whether the cipher machine goes with a journal that was restored, before anything is written.
func (a *Appliance) checkRestoredMachine(ctx context.Context) error {
	stored, err := a.store.LastCheckpoint(ctx)
	if errors.Is(err, audit.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	c, err := audit.ParseCheckpoint(stored.Note, stored.Signature)
	if err != nil {
		return err
	}
	info, err := a.tokens[hsm.Log].FindKey(ctx, logLabel)
	if err == nil {
		err = audit.VerifyCheckpoint(info.Public, c)
	} else if !errors.Is(err, hsm.ErrKeyNotFound) {
		return err
	}
	if err != nil {
		return fmt.Errorf("%w: %v", errOtherMachine, err)
	}
	return nil
}

// backups are what the journal says of backups and restores.
type backups struct {
	a *Appliance

	mu         sync.Mutex // guards what follows
	custodians *backup.Custodians
	record     []byte            // the custodians', as it was set
	keys       map[string]string // fingerprints of the keys that backups were ever sealed to, by set
	last       *backup.Statement
	reports    []backupReport       // the newest first, at most reportsShown
	open       map[string]time.Time // begun, and nothing heard since; by id
	restored   *audit.Epoch         // the epoch that the last restore began
	lost       *lostSummary         // what it lost; nil: not known yet
	revived    string               // the fork alarm, "" while there is none
	begun      map[string]begun     // by this process
	succeeds   time.Time            // when the last restore began; zero: there was none, or one by hand or for a drill
}

func newBackups(a *Appliance) *backups {
	return &backups{a: a, open: map[string]time.Time{}, begun: map[string]begun{}, keys: map[string]string{}}
}

// A begun backup is one that this process was told of.
type begun struct {
	req  api.BeginBackup
	base *wire.BackupBase
	set  string // of the custodians
	told wire.BegunBackup
	sent *wire.EndBackup // what was carried out, where it was
}

// A lostSummary is the last entry about what a restore lost.
type lostSummary struct {
	Entries    uint64 `json:"entries"`    // that the central database has and the journal lacks
	Signatures uint64 `json:"signatures"` // among them
	Reaches    bool   `json:"reaches"`    // the database has the backup's last entry; otherwise it cannot tell
}

// Replay takes part in the directory's.
func (b *backups) Replay(ctx context.Context, e *audit.Entry) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch e.Kind {
	case backup.KindCustodians:
		body, err := b.a.objectOf(ctx, e)
		if err != nil {
			return err
		}
		c, err := backup.ParseCustodians(body)
		if err != nil {
			return fmt.Errorf("entry %d: %w", e.Sequence, err)
		}
		b.custodians, b.record = c, body
		b.keys[c.Set()] = c.Key()
	case backup.KindIntent:
		b.open[e.Object] = e.Time.UTC()
	case backup.KindFailed:
		delete(b.open, e.Object)
	case backup.KindOutcome:
		s, err := backup.StatementOf(e)
		if err != nil {
			return err
		}
		delete(b.open, e.Object)
		b.last = s
	case backup.KindRestored:
		epoch := e.Epoch
		b.restored, b.lost, b.open, b.succeeds = &epoch, nil, map[string]time.Time{}, time.Time{}
		if drill, _ := e.Field("drill").(audit.Bool); !bool(drill) {
			b.succeeds, _ = time.Parse(time.RFC3339, e.Text("begun")) // not known of a restore by hand
		}
	case backup.KindVerified, backup.KindDrill:
		passed, _ := e.Field("passed").(audit.Bool)
		one := backupReport{strings.TrimPrefix(e.Kind, "backup."), e.Object, e.Time.UTC().Format(time.RFC3339), bool(passed), e.Text("persons")}
		b.reports = append([]backupReport{one}, b.reports[:min(len(b.reports), reportsShown-1)]...)
	case backup.KindMissing:
		if done, _ := e.Field("done").(audit.Bool); bool(done) {
			reaches, _ := e.Field("reaches").(audit.Bool)
			entries, _ := e.Field("entries").(audit.Int)
			signatures, _ := e.Field("signatures").(audit.Int)
			b.lost = &lostSummary{uint64(entries), uint64(signatures), bool(reaches)}
		}
	}
	return nil
}

// append journals a draft and has it count.
func (b *backups) append(ctx context.Context, d audit.Draft) (audit.Receipt, error) {
	d.State = true
	r, err := b.a.journal.Append(ctx, d)
	if err != nil {
		return r, problem.New(problem.JournalUnwritable, "日志写不进去 (the journal could not be written)", "查看 yinjian status 与磁盘空间 (look at yinjian status and the volume)").With(err)
	}
	return r, b.Replay(ctx, &r.Entry)
}

// receipt waits for the checkpoint over an entry, and proves it.
func (b *backups) receipt(ctx context.Context, r audit.Receipt) (any, error) {
	c, err := b.a.journal.WaitCheckpoint(ctx, r.Sequence)
	if err != nil {
		return nil, problem.New(problem.HSMUnavailable, "已记入日志，但尚无检查点可出回执 (journalled, but no checkpoint proves it yet)", "查看 log 槽位 (look at the log slot)").With(err)
	}
	f, err := b.a.journal.Foreign(ctx, r.Sequence, c)
	if err != nil {
		return nil, err
	}
	return backup.NewReceipt(f), nil
}

func personsField(persons []string) audit.Field {
	return audit.Field{Name: "persons", Value: audit.Text(strings.Join(persons, "、"))}
}

// SetCustodians satisfies api.Admin.
func (d admin) SetCustodians(ctx context.Context, actor string, req api.SetCustodians) (any, error) {
	c, err := backup.ParseCustodians(req.Record)
	if err != nil {
		return nil, problem.Invalid("record", "%v", err)
	}
	described := func(c *backup.Custodians) any {
		if c == nil {
			return nil
		}
		return map[string]any{"set": c.Set(), "key": c.Key(), "threshold": c.Threshold, "holders": c.Names}
	}
	d.a.backups.mu.Lock()
	before, key := d.a.backups.custodians, d.a.backups.keys[c.Set()]
	d.a.backups.mu.Unlock()
	if key != "" && key != c.Key() {
		return nil, problem.Invalid("record", "套号 %s 的份额属于公钥 %s，这份记录写的是 %s：其保管人打不开封给它的备份 (the shares of that set are of another key: their holders could open nothing sealed to this one)", c.Set(), key, c.Key())
	}
	changed, err := audit.Changed(described(before), described(c))
	if err != nil {
		return nil, err
	}
	_, err = d.a.backups.append(ctx, audit.Draft{
		Kind: backup.KindCustodians, Actor: actor, Object: c.Set(),
		Fields: append(changed,
			personsField(req.Persons), audit.Field{Name: "threshold", Value: audit.Int(c.Threshold)}, audit.Field{Name: "holders", Value: audit.Text(strings.Join(c.Names, "、"))},
		),
		Payloads: []audit.Attachment{{Name: "object", MediaType: "application/json", Data: req.Record}},
	})
	if err != nil {
		return nil, err
	}
	return described(c), nil
}

// BeginBackup satisfies api.Admin.
func (d admin) BeginBackup(ctx context.Context, actor string, req api.BeginBackup) (any, error) {
	b := d.a.backups
	b.mu.Lock()
	custodians, record, last := b.custodians, b.record, b.last
	b.mu.Unlock()
	if custodians == nil {
		return nil, problem.New(problem.NotReady, "还没有备份保管人，备份无从加密 (there are no custodians to seal a backup to)", "先 yinjian backup custodians FILE --dir DIR (make them first)")
	}
	out := wire.BegunBackup{ID: backup.NewID(), Node: d.a.cfg.Node, Epoch: d.a.journal.Epoch().String(), Custodians: record}
	fields := []audit.Field{
		personsField(req.Persons), {Name: "target", Value: audit.Text(req.Target)}, {Name: "softtoken", Value: audit.Bool(req.Softtoken)},
		{Name: backup.FieldSet, Value: audit.Text(custodians.Set())},
	}
	if req.Incremental {
		if last == nil {
			return nil, problem.New(problem.NotReady, "还没有完整备份，无从接续 (there is no backup to continue)", "不带 --incremental 做一次完整备份 (make a whole one first)")
		}
		if last.Set != custodians.Set() {
			return nil, problem.New(problem.NotReady, "保管人换过了，此前的备份由别的份额打开，不能接续 (other custodians open the backup before this one)", "不带 --incremental 做一次完整备份 (make a whole one first)")
		}
		out.Base = &wire.BackupBase{ID: last.ID, SM3: last.SM3, Through: last.Through}
		fields = append(fields, audit.Field{Name: backup.FieldBase, Value: audit.Text(last.ID)})
	}
	if _, err := b.append(ctx, audit.Draft{Kind: backup.KindIntent, Actor: actor, Object: out.ID, Fields: fields}); err != nil {
		return nil, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.begun[out.ID] = begun{req: req, base: out.Base, set: custodians.Set(), told: out}
	return out, nil
}

var errNoBackup = problem.New(problem.NotFound, "没有正在进行的这份备份；其间设备可能重启过 (no such backup is under way: was the appliance started again meanwhile?)", "重做备份 (make the backup again)")

// CarryBackup satisfies api.Admin.
func (d admin) CarryBackup(ctx context.Context, _ string, req api.CarryBackup, out io.Writer) (api.EndBackup, error) {
	b := d.a.backups
	b.mu.Lock()
	was, known := b.begun[req.ID]
	b.mu.Unlock()
	none := api.EndBackup{}
	switch {
	case !known:
		return none, errNoBackup
	case was.req.Softtoken && !d.a.cfg.Evaluation.Softtoken:
		return none, problem.Invalid("softtoken", "本机用的是真正的密码机：其密钥由厂商的办法备份 (a real cipher machine is backed up by its vendor's means)")
	}
	release, err := ClaimBackup(d.a.dir)
	if err != nil {
		return none, problem.New(problem.WrongState, err.Error(), "等它做完 (wait for its end)")
	}
	defer release()
	end, err := WriteBackup(ctx, out, BackupWriting{Dir: d.a.dir, Begun: &was.told, Softtoken: was.req.Softtoken, Rate: req.Rate})
	if err != nil {
		return none, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if was, known = b.begun[req.ID]; known {
		was.sent = &end
		b.begun[req.ID] = was
	}
	return end, nil
}

// EndBackup satisfies api.Admin. Root and entries are this journal's own: what is in the file is held against them when it
// is verified.
func (d admin) EndBackup(ctx context.Context, actor string, req api.EndBackup) (any, error) {
	b := d.a.backups
	b.mu.Lock()
	was, known := b.begun[req.ID]
	delete(b.begun, req.ID)
	b.mu.Unlock()
	if !known {
		return nil, errNoBackup
	}
	if req.Failed != "" {
		_, err := b.append(ctx, audit.Draft{Kind: backup.KindFailed, Actor: actor, Object: req.ID, Fields: []audit.Field{{Name: "reason", Value: audit.Text(req.Failed)}}})
		return map[string]bool{"journalled": err == nil}, err
	}
	if was.sent != nil && *was.sent != req {
		return nil, problem.Invalid("sm3", "与设备送出的文件不同 (is not of the file that was carried out)")
	}
	digest, err := hex.DecodeString(req.SM3)
	if err != nil {
		return nil, problem.Invalid("sm3", "须为十六进制 (hexadecimal)")
	}
	if uint64(req.Entries) > d.a.journal.Size() {
		return nil, problem.Invalid("entries", "日志只有 %d 条 (the journal has only %d)", d.a.journal.Size(), d.a.journal.Size())
	}
	root, err := d.a.journal.Root(ctx, uint64(req.Entries))
	if err != nil {
		return nil, err
	}
	fields := []audit.Field{
		personsField(was.req.Persons), {Name: backup.FieldSM3, Value: audit.Octets(digest)}, {Name: "size", Value: audit.Int(req.Size)},
		{Name: backup.FieldEntries, Value: audit.Int(req.Entries)}, {Name: backup.FieldRoot, Value: audit.Octets(root[:])},
		{Name: backup.FieldThrough, Value: audit.Int(req.Through)}, {Name: "softtoken", Value: audit.Bool(was.req.Softtoken)},
		{Name: backup.FieldSet, Value: audit.Text(was.set)},
	}
	if was.base != nil {
		fields = append(fields, audit.Field{Name: backup.FieldBase, Value: audit.Text(was.base.ID)})
	}
	r, err := b.append(ctx, audit.Draft{Kind: backup.KindOutcome, Actor: actor, Object: req.ID, Fields: fields})
	if err != nil {
		return nil, err
	}
	return b.receipt(ctx, r)
}

// FileReport satisfies api.Admin.
func (d admin) FileReport(ctx context.Context, actor string, req api.FileReport) (any, error) {
	if !json.Valid(req.Report) {
		return nil, problem.Invalid("report", "须为 JSON (JSON)")
	}
	kind := map[string]string{"verify": backup.KindVerified, "drill": backup.KindDrill}[req.Kind]
	r, err := d.a.backups.append(ctx, audit.Draft{
		Kind: kind, Actor: actor, Object: req.Backup, Fields: []audit.Field{personsField(req.Persons), {Name: "passed", Value: audit.Bool(req.Passed)}},
		Payloads: []audit.Attachment{{Name: "report", MediaType: "application/json", Data: req.Report}},
	})
	if err != nil {
		return nil, err
	}
	return d.a.backups.receipt(ctx, r)
}

// A backupState is what `yinjian backup list` shows.
type backupState struct {
	Custodians *custodiansState  `json:"custodians"`
	Last       *backup.Statement `json:"last"`
	// Unfinished were begun and neither finished nor given up, by id, since.
	Unfinished map[string]time.Time `json:"unfinished"`
	Restored   string               `json:"restored_epoch,omitempty"`
	Lost       *lostSummary         `json:"lost,omitempty"`
	// Reports are the last verifications and drills, the newest first.
	Reports []backupReport `json:"reports"`
}

// reportsShown is how many of them a status has.
const reportsShown = 20

// A backupReport is a verification of a backup, or a drill of restoring it.
type backupReport struct {
	Kind    string `json:"kind"` // "verified", "drill"
	Backup  string `json:"backup"`
	At      string `json:"at"`
	Passed  bool   `json:"passed"`
	Persons string `json:"persons"`
}

type custodiansState struct {
	Set       string   `json:"set"`
	Key       string   `json:"key"` // fingerprint of what backups are sealed to
	Threshold int      `json:"threshold"`
	Holders   []string `json:"holders"`
}

// ListBackups satisfies api.Admin.
func (d admin) ListBackups(context.Context, string) (any, error) {
	b := d.a.backups
	b.mu.Lock()
	defer b.mu.Unlock()
	s := backupState{Last: b.last, Unfinished: map[string]time.Time{}, Lost: b.lost, Reports: append([]backupReport{}, b.reports...)}
	for id, at := range b.open {
		s.Unfinished[id] = at
	}
	if c := b.custodians; c != nil {
		s.Custodians = &custodiansState{c.Set(), c.Key(), c.Threshold, c.Names}
	}
	if b.restored != nil {
		s.Restored = b.restored.String()
	}
	return s, nil
}

// MissingRecords satisfies api.Admin: what the last restore lost, as it was journalled.
func (d admin) MissingRecords(ctx context.Context, _ string) (any, error) {
	b := d.a.backups
	b.mu.Lock()
	restored, lost := b.restored, b.lost
	b.mu.Unlock()
	switch {
	case restored == nil:
		return nil, problem.New(problem.NotFound, "本机没有恢复过 (nothing was restored here)", "无 (nothing to do)")
	case lost == nil:
		return nil, problem.New(problem.NotReady, "尚未与中心库比对 (not held against the central database yet)", "等中心库可用后再查 (ask again when the database answers)")
	}
	rows := []backup.Lost{}
	err := d.a.journal.State(ctx, func(r audit.Record) error {
		if r.Entry.Kind == backup.KindRestored {
			rows = rows[:0]
		}
		if r.Entry.Kind != backup.KindMissing {
			return nil
		}
		body, err := d.a.objectOf(ctx, &r.Entry)
		if err != nil {
			return err
		}
		var some []backup.Lost
		if err := json.Unmarshal(body, &some); err != nil {
			return fmt.Errorf("entry %d: %w", r.Sequence, err)
		}
		rows = append(rows, some...)
		return nil
	})
	return map[string]any{"summary": lost, "missing": rows}, err
}

const (
	missingLooks = time.Second
	revivedLooks = 10 * time.Second
	missingPart  = 10_000 // rows of one entry
)

// run names what a restore lost as soon as the central database answers, and watches whether somebody else goes on with
// what was before it: an appliance that was thought lost, and runs.
func (b *backups) run(ctx context.Context) error {
	tick := time.NewTicker(missingLooks)
	defer tick.Stop()
	var looked time.Duration
	seen := map[string]uint64{}
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
		b.mu.Lock()
		restored, lost := b.restored, b.lost
		b.mu.Unlock()
		if restored == nil {
			continue
		}
		var err error
		if lost == nil {
			err = b.nameMissing(ctx, *restored)
		} else if now := b.a.sys.Monotonic(); looked == 0 || now-looked >= revivedLooks {
			looked = now
			err = b.watch(ctx, *restored, seen)
		}
		if err != nil && ctx.Err() == nil {
			b.a.log.WithError(err).Warning("what the restore lost could not be held against the central database; it is tried again")
		}
	}
}

// nameMissing journals what the central database has and this journal lacks: entries of missingPart rows, the last of which
// has the sums. A stop in between has them written again, from the beginning.
func (b *backups) nameMissing(ctx context.Context, restored audit.Epoch) error {
	store := b.a.projection.open()
	if store == nil {
		return nil
	}
	spans, err := b.a.journal.Epochs(ctx)
	if err != nil {
		return err
	}
	var rows []backup.Lost
	var sums lostSummary
	write := func(done bool) error {
		if rows == nil {
			rows = []backup.Lost{}
		}
		body, err := json.Marshal(rows)
		if err != nil {
			return err
		}
		_, err = b.append(ctx, audit.Draft{
			Kind: backup.KindMissing, Actor: "appliance", Object: b.a.cfg.Node,
			Fields: []audit.Field{
				{Name: "done", Value: audit.Bool(done)}, {Name: "entries", Value: audit.Int(sums.Entries)}, {Name: "signatures", Value: audit.Int(sums.Signatures)},
				{Name: "reaches", Value: audit.Bool(sums.Reaches)},
			},
			Payloads: []audit.Attachment{{Name: "object", MediaType: "application/json", Data: body}},
		})
		rows = nil
		return err
	}
	sums.Reaches, err = backup.Missing(ctx, store, b.a.cfg.Node, spans, restored, func(l backup.Lost) error {
		sums.Entries++
		if l.Kind == evidence.KindSign {
			sums.Signatures++
		}
		if rows = append(rows, l); len(rows) == missingPart {
			return write(false)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if sums.Entries > 0 {
		b.a.log.WithField("entries", sums.Entries).WithField("signatures", sums.Signatures).Error("the central database has entries that the restored journal lacks; they are named in the journal")
	}
	return write(true)
}

// watch looks whether the epochs before the restore go on.
func (b *backups) watch(ctx context.Context, restored audit.Epoch, seen map[string]uint64) error {
	store := b.a.projection.open()
	if store == nil {
		return nil
	}
	spans, err := b.a.journal.Epochs(ctx)
	if err != nil {
		return err
	}
	at := slices.IndexFunc(spans, func(s audit.EpochSpan) bool { return s.Epoch == restored })
	for _, s := range spans[:max(at, 0)] {
		epoch := s.Epoch.String()
		last, err := store.Shipped(ctx, b.a.cfg.Node, epoch)
		if errors.Is(err, audit.ErrNotFound) {
			continue
		}
		if err != nil {
			return err
		}
		if before, had := seen[epoch]; had && last > before && last >= s.End { // what is below is ours, shipped late
			b.a.log.WithField("epoch", epoch).Error("ALARM: another appliance goes on under this one's name")
			b.mu.Lock()
			b.revived = epoch
			b.mu.Unlock()
		}
		seen[epoch] = last
	}
	return nil
}

// since is when this appliance took over from one that it does not know all about; zero: it did not. The machine's clock,
// which said so, may have been ahead: it is not after now.
func (b *backups) since(now time.Time) time.Time {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.succeeds.After(now) {
		return now
	}
	return b.succeeds
}

// warnings are what /health/state says of it.
func (b *backups) warnings() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	var out []string
	if b.revived != "" {
		out = append(out, fmt.Sprintf("分叉告警：恢复之前的纪元 %s 在中心库中仍在增长，原设备还在运行；停掉其中一台 (fork alarm: the epoch before the restore goes on in the central database: the original runs, stop one of the two)", b.revived))
	}
	switch {
	case b.restored == nil:
	case b.lost == nil:
		out = append(out, "本机由备份恢复，尚未与中心库比对丢失了什么 (restored from a backup; what was lost is not known until the central database answers)")
	case !b.lost.Reaches:
		out = append(out, "本机由备份恢复；中心库没有备份末端的条目，备份之后丢失了什么无从得知 (restored from a backup; the central database does not reach its end, so that what was lost after it cannot be told)")
	case b.lost.Entries > 0:
		out = append(out, fmt.Sprintf("本机由备份恢复，备份之后的 %d 条（其中签名 %d 条）日志里没有，清单见 yinjian backup missing (restored from a backup: %d entries after it are not in the journal, %d of them signatures)", b.lost.Entries, b.lost.Signatures, b.lost.Entries, b.lost.Signatures))
	}
	return out
}

package appliance

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"yinjian/api"
	"yinjian/api/wire"
	"yinjian/appliance/alarm"
	"yinjian/appliance/audit"
	"yinjian/appliance/backup"
	"yinjian/appliance/patrol"
	"yinjian/appliance/problem"
	"yinjian/appliance/report"
	"yinjian/hsm"
	"yinjian/ntp/ledger"
)

// samples are how many spans of the older journal a weekly patrol reads again, and sampleEntries how long each is.
const (
	samples       = 8
	sampleEntries = 5000
)

// WholeJournal says whether a patrol of that period reads all of the journal, and holds the central database against it.
func WholeJournal(p patrol.Period) bool { return p == patrol.Monthly || p == patrol.Quarterly }

// PatrolVolumes are the volumes of the appliance in dir; log is the running log's folder, which counts if it is elsewhere.
func PatrolVolumes(dir, log string) []patrol.Volume {
	folders := map[string]string{"设备目录所在的卷": dir, "临时目录所在的卷": os.TempDir()}
	if filepath.IsAbs(log) {
		folders["运行日志所在的卷"] = log
	}
	var out []patrol.Volume
	for _, name := range slices.Sorted(maps.Keys(folders)) {
		v := patrol.Volume{Name: name}
		var fs unix.Statfs_t
		if err := unix.Statfs(folders[name], &fs); err != nil {
			v.Error = err.Error()
		}
		v.Free, v.Total = fs.Bavail*uint64(fs.Bsize), fs.Blocks*uint64(fs.Bsize)
		out = append(out, v)
	}
	return out
}

// ReadPatrol verifies a journal as deep as the period asks, as opt says where that is all of it, and reads what it says of
// the period. The appliance may run meanwhile.
func ReadPatrol(ctx context.Context, store audit.Store, opt audit.Options, in *patrol.Input) error {
	j := &patrol.Journal{}
	in.Journal = j
	err := store.Reread()
	if err != nil {
		return err
	}
	if j.Entries, _, err = store.Head(ctx); err != nil {
		return err
	}
	last, err := store.LastCheckpoint(ctx)
	if err == nil {
		j.Last, err = audit.ParseCheckpoint(last.Note, last.Signature)
	} else if errors.Is(err, audit.ErrNotFound) {
		err = nil
	}
	if err != nil {
		return err
	}
	if err := verifyPatrolled(ctx, store, opt, in); err != nil {
		return err
	}
	if err := readPeriod(ctx, store, in); err != nil { // of one that was changed, perhaps
		in.Missing["period"] = err.Error()
	}
	return nil
}

// readPeriod reads what the journal says of the period.
func readPeriod(ctx context.Context, store audit.Store, in *patrol.Input) error {
	err := Filed(ctx, store, FiledAlarms, in.From, in.To, func(e *audit.Entry) error {
		one := patrol.AlarmEntry{ID: e.Text("id"), Code: alarm.Code(e.Text("code")), Object: e.Object, Cleared: e.Kind == "alarm.cleared", Drill: e.Text(FieldDrill), At: e.Time.UTC()}
		if within(one.At, in) {
			_ = one.Severity.UnmarshalText([]byte(e.Text("severity"))) // a later version's counts as normal
			in.Alarms = append(in.Alarms, one)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if err := hoursOf(ctx, store, FiledHours, in, func(h patrol.Hour) { in.Hours = append(in.Hours, h) }); err != nil {
		return err
	}
	if err := hoursOf(ctx, store, FiledClock, in, func(h ledger.Hour) { in.Clock = append(in.Clock, h) }); err != nil {
		return err
	}
	return store.Changes(ctx, 0, func(r audit.Row) error {
		if r.Kind != backup.KindVerified {
			return nil
		}
		e, err := audit.ParseEntry(r.DER)
		if err != nil {
			return err
		}
		if passed, _ := e.Field("passed").(audit.Bool); bool(passed) {
			in.BackupVerified = e.Time.UTC()
		}
		return nil
	})
}

func within(at time.Time, in *patrol.Input) bool { return !at.Before(in.From) && !at.After(in.To) }

// hoursOf reads the hours of one kind that ended in the period.
func hoursOf[H any](ctx context.Context, store audit.Store, what string, in *patrol.Input, fn func(H)) error {
	return Filed(ctx, store, what, in.From, in.To, func(e *audit.Entry) error {
		if !within(e.Time.UTC(), in) {
			return nil
		}
		body, err := audit.ReadPayload(ctx, store, e, "hour")
		if err != nil {
			return err
		}
		var h H
		if err := json.Unmarshal(body, &h); err != nil {
			return fmt.Errorf("entry %d: %w", e.Sequence, err)
		}
		fn(h)
		return nil
	})
}

// verifyPatrolled verifies what the period asks for.
func verifyPatrolled(ctx context.Context, store audit.Store, opt audit.Options, in *patrol.Input) error {
	j := in.Journal
	if WholeJournal(in.Period) {
		var err error
		j.Whole, err = audit.Verify(ctx, store, opt)
		return err
	}
	if j.Last == nil {
		j.Previous = "没有检查点"
		return nil
	}
	from, err := lastPatrolled(ctx, store, j.Last.Size)
	if err != nil {
		return err
	}
	if from == nil {
		from, j.Previous = &audit.Checkpoint{}, "没有可接续的巡检"
	}
	s, err := audit.VerifySpan(ctx, store, opt.LogKey, *from, *j.Last)
	if err != nil {
		return err
	}
	j.Spans = append(j.Spans, *s)
	if in.Period != patrol.Weekly || from.Size == 0 {
		return nil
	}
	for range samples {
		begin, err := checkpointFrom(ctx, store, rand.Uint64N(from.Size)+1)
		if err != nil {
			return err
		}
		end, err := checkpointFrom(ctx, store, min(begin.Size+sampleEntries, j.Last.Size))
		if err != nil {
			return err
		}
		if s, err = audit.VerifySpan(ctx, store, opt.LogKey, *begin, *end); err != nil {
			return err
		}
		j.Spans = append(j.Spans, *s)
	}
	return nil
}

// errFirst ends a walk over checkpoints.
var errFirst = errors.New("first")

// checkpointFrom is the first checkpoint of that size or more.
func checkpointFrom(ctx context.Context, store audit.Store, size uint64) (*audit.Checkpoint, error) {
	var out *audit.Checkpoint
	err := store.Checkpoints(ctx, size, func(c audit.StoredCheckpoint) error {
		var err error
		if out, err = audit.ParseCheckpoint(c.Note, c.Signature); err != nil {
			return err
		}
		return errFirst
	})
	if errors.Is(err, errFirst) {
		return out, nil
	}
	if err == nil {
		err = audit.ErrNotFound
	}
	return nil, err
}

// lastPatrolled is the checkpoint up to which the appliance has verified the journal for the last patrol that found no change,
// nil without one. The entry that says so lies before most, and is itself among what is verified from there on: one that
// was changed is found.
func lastPatrolled(ctx context.Context, store audit.Store, most uint64) (*audit.Checkpoint, error) {
	filed, err := store.FindRef(ctx, report.Ref(report.Patrol), 1_000_000)
	if err != nil {
		return nil, err
	}
	for _, sequence := range slices.Backward(filed) {
		row, err := store.Row(ctx, sequence)
		if err != nil {
			return nil, err
		}
		e, err := audit.ParseEntry(row.DER)
		if err != nil {
			return nil, err
		}
		body, err := audit.ReadPayload(ctx, store, e, "object")
		if err != nil {
			return nil, err
		}
		s, err := report.Parse(e, body)
		if err != nil {
			continue
		}
		var was patrol.Summary
		verified, _ := e.Field(report.FieldVerified).(audit.Int)
		if json.Unmarshal(s.Summary, &was) != nil || was.Entries == 0 || was.Entries != uint64(verified) || was.Entries > sequence || sequence >= most {
			continue
		}
		c, err := checkpointFrom(ctx, store, was.Entries)
		if err == nil && c.Size == was.Entries && c.Root.String() == was.Root {
			return c, nil
		}
	}
	return nil, nil
}

// ReportsFolder is where reports lie that patrols and drills write without being told where.
func ReportsFolder(dir string) string { return filepath.Join(dir, "reports") }

// A patroller patrols in the appliance's own process, one at a time.
type patroller struct{ busy atomic.Bool }

// RunPatrol satisfies api.Admin. It asks what the command asks, over no socket; its files lie in the folder of reports before
// the journal names them.
func (d admin) RunPatrol(ctx context.Context, actor string, req api.RunPatrol) (any, error) {
	a := d.a
	if !a.patroller.busy.CompareAndSwap(false, true) {
		return nil, problem.New(problem.NotReady, "正在进行另一次巡检 (another patrol is under way)", "等它结束后再试 (wait for it to end)")
	}
	defer a.patroller.busy.Store(false)
	w := a.works.begin("patrol")
	defer w.end()
	in := patrol.Input{
		Period: patrol.Period(req.Period), Node: a.cfg.Node, Campus: a.cfg.Campus, Version: Version, Reserve: a.cfg.Policy.ReserveBytes, Running: true,
		Answers: map[string]json.RawMessage{}, Missing: map[string]string{}, BackupMaxAge: time.Duration(a.cfg.Alarms.BackupMaxAge),
		Volumes: PatrolVolumes(a.dir, a.cfg.Log.Directory),
	}
	now := apiClock{a}.Now()
	in.To, in.Trusted = now.Time.UTC(), now.Trusted()
	in.From = in.To.AddDate(0, 0, -in.Period.Days())
	questions := map[string]func(context.Context, string) (any, error){
		"state": d.State, "time": d.TimeStatus, "certificates": d.ListCertificates, "crls": d.ListCRLs, "backups": d.ListBackups,
	}
	if WholeJournal(in.Period) {
		questions["compare"] = func(ctx context.Context, actor string) (any, error) { return d.Compare(ctx, actor, wire.Compare{}) }
	}
	if in.Period == patrol.Quarterly {
		questions["sweep"] = func(ctx context.Context, actor string) (any, error) { return d.Sweep(ctx, actor, wire.Sweep{}) }
	}
	for name, question := range questions {
		answer, err := question(ctx, actor)
		if err == nil {
			in.Answers[name], err = json.Marshal(answer)
		}
		if err != nil {
			in.Missing[name] = reasonOf(err)
		}
	}
	err := ReadPatrol(ctx, a.store, audit.Options{
		LogKey: a.logKey.Public(), CheckToken: a.checkToken(), Sealer: headSealer{macKeys{a.tokens[hsm.Log]}}, Progress: w.is,
	}, &in)
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err != nil {
		in.Missing["journal"], in.Journal = err.Error(), nil
	}
	r := patrol.Judge(in)
	name := patrol.FileName(r.Period, in.To)
	files, err := r.Files(name, name+".receipt.json")
	if err == nil {
		err = os.MkdirAll(ReportsFolder(a.dir), 0o700)
	}
	if err != nil {
		return nil, err
	}
	sign := api.SignReport{Kind: report.Patrol, Name: req.Period, Outcome: r.Severity.String()}
	if sign.Summary, err = json.Marshal(r.Summary); err != nil {
		return nil, err
	}
	for _, file := range slices.Sorted(maps.Keys(files)) {
		if err := writeFile(filepath.Join(ReportsFolder(a.dir), file), files[file], 0o600); err != nil {
			return nil, err
		}
		sign.Files = append(sign.Files, wire.ReportFile(report.FileOf(file, files[file])))
	}
	filed, receipt, err := d.file(ctx, actor, sign, r.Summary.Entries)
	if err != nil {
		return nil, err
	}
	proof, err := json.Marshal(receipt)
	if err == nil {
		err = writeFile(filepath.Join(ReportsFolder(a.dir), name+".receipt.json"), append(proof, '\n'), 0o600)
	}
	if err != nil {
		return nil, err
	}
	return wire.Patrolled{Filed: *filed, Report: files[name+".json"]}, nil
}

package appliance

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"sync"
	"time"

	"yinjian/api"
	"yinjian/api/wire"
	"yinjian/appliance/audit"
	"yinjian/appliance/patrol"
	"yinjian/appliance/problem"
	"yinjian/appliance/report"
)

// maxReports bounds how many reports of a kind are found in the journal, and maxReportFile what is read of one's file.
const (
	maxReports    = 1_000_000
	maxReportFile = 32 << 20
)

// lastReports are the last reports of each kind, so that nobody has to look for them in the journal.
type lastReports struct {
	mu sync.Mutex
	of map[string]wire.FiledReport // guarded by mu
}

// load reads them from the journal.
func (l *lastReports) load(ctx context.Context, d admin) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.of = map[string]wire.FiledReport{}
	for _, kind := range report.Kinds() {
		found, err := d.a.store.FindRef(ctx, report.Ref(kind), maxReports)
		if err != nil {
			return err
		}
		if len(found) == 0 {
			continue
		}
		_, filed, err := d.filed(ctx, found[len(found)-1])
		if err != nil {
			return err
		}
		l.of[kind] = *filed
	}
	return nil
}

// state are those that there are, by kind.
func (l *lastReports) state() map[string]lastReport {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := map[string]lastReport{}
	for kind, f := range l.of {
		out[kind] = lastReport{f.Name, f.Outcome, f.At}
	}
	return out
}

// A lastReport is one of them in the state.
type lastReport struct {
	Name    string `json:"name"`
	Outcome string `json:"outcome"`
	At      string `json:"at"`
}

// SignReport satisfies api.Admin: the digests of a report's files are journalled, and the entry's receipt signs them.
//
// A patrol that somebody else made is filed as verified up to where it says, when this process has found the same.
func (d admin) SignReport(ctx context.Context, actor string, req api.SignReport) (any, error) {
	var verified uint64
	if req.Kind == report.Patrol {
		var err error
		if verified, err = d.verified(ctx, req.Summary); err != nil {
			return nil, err
		}
	}
	_, receipt, err := d.file(ctx, actor, req, verified)
	return receipt, err
}

// verified verifies what a patrol says that it has verified, from the last that was filed on, and answers up to where.
func (d admin) verified(ctx context.Context, summary []byte) (uint64, error) {
	var says patrol.Summary
	if len(summary) == 0 || json.Unmarshal(summary, &says) != nil || says.Entries == 0 {
		return 0, nil
	}
	to, err := checkpointFrom(ctx, d.a.store, says.Entries)
	if errors.Is(err, audit.ErrNotFound) || err == nil && (to.Size != says.Entries || to.Root.String() != says.Root) {
		return 0, problem.Invalid("summary", "巡检所称核验到的检查点，日志里没有 (the journal has no checkpoint like the one up to which the patrol says it verified)")
	}
	if err != nil {
		return 0, err
	}
	if err := d.a.store.Reread(); err != nil {
		return 0, err
	}
	from, err := lastPatrolled(ctx, d.a.store, to.Size)
	if err != nil {
		return 0, err
	}
	if from == nil {
		from = &audit.Checkpoint{}
	}
	span, err := audit.VerifySpan(ctx, d.a.store, d.a.logKey.Public(), *from, *to)
	if err != nil {
		return 0, err
	}
	if span.Wrong != "" {
		d.a.log.WithField("wrong", printable(span.Wrong)).Error("a patrol was to be filed that found no change, and the journal was changed")
		return 0, problem.Invalid("summary", "巡检称日志未发现改动，设备自己核验发现：%s (the appliance itself finds that the journal was changed)", printable(span.Wrong))
	}
	return to.Size, nil
}

// file journals a report; verified is how much of the journal this process has verified for it, of a patrol.
func (d admin) file(ctx context.Context, actor string, req api.SignReport, verified uint64) (*wire.FiledReport, any, error) {
	s := report.Statement{Kind: req.Kind, Name: req.Name, Outcome: req.Outcome, Persons: req.Persons, Summary: req.Summary}
	for _, f := range req.Files {
		s.Files = append(s.Files, report.File(f))
	}
	draft, err := s.Draft(actor)
	if err != nil {
		return nil, nil, err
	}
	if verified > 0 {
		draft.Fields = append(draft.Fields, audit.Field{Name: report.FieldVerified, Value: audit.Int(verified)})
	}
	r, err := d.a.journal.Append(ctx, draft)
	if err != nil {
		return nil, nil, journalRefused(err)
	}
	filed := d.describe(&r.Entry, &s)
	d.a.reports.mu.Lock()
	d.a.reports.of[s.Kind] = *filed
	d.a.reports.mu.Unlock()
	receipt, err := d.a.backups.receipt(ctx, r)
	return filed, receipt, err
}

// filed reads what the journal has of a report.
func (d admin) filed(ctx context.Context, sequence uint64) (*report.Statement, *wire.FiledReport, error) {
	r, err := d.a.journal.Entry(ctx, sequence)
	if err != nil {
		return nil, nil, err
	}
	if r.Entry.Kind != report.KindFiled {
		return nil, nil, audit.ErrNotFound
	}
	body, err := d.a.objectOf(ctx, &r.Entry)
	if err != nil {
		return nil, nil, err
	}
	s, err := report.Parse(&r.Entry, body)
	if err != nil {
		return nil, nil, err
	}
	return s, d.describe(&r.Entry, s), nil
}

func (d admin) describe(e *audit.Entry, s *report.Statement) *wire.FiledReport {
	out := &wire.FiledReport{
		Sequence: int(e.Sequence), At: e.Time.UTC().Format(time.RFC3339), Actor: e.Actor, Kind: s.Kind, Name: s.Name, Outcome: s.Outcome, Persons: s.Persons,
		Files: []wire.FiledFile{},
	}
	for _, f := range s.Files {
		out.Files = append(out.Files, wire.FiledFile{ReportFile: wire.ReportFile(f), Kept: d.kept(f)})
	}
	return out
}

// kept says whether a file of that name and size lies in the folder of reports.
func (d admin) kept(f report.File) bool {
	root, err := os.OpenRoot(ReportsFolder(d.a.dir))
	if err != nil {
		return false
	}
	defer root.Close()
	info, err := root.Lstat(f.Name)
	return err == nil && info.Mode().IsRegular() && info.Size() == int64(f.Size)
}

// ListReports satisfies api.Admin.
func (d admin) ListReports(ctx context.Context, _ string, req api.ListReports) (any, error) {
	found, err := d.a.store.FindRef(ctx, report.Ref(req.Kind), maxReports)
	if err != nil {
		return nil, err
	}
	shown := found[max(0, len(found)-cmp.Or(req.Most, pageOf)):]
	out := wire.FiledReports{Reports: []wire.FiledReport{}, Omitted: len(found) - len(shown)}
	for _, sequence := range slices.Backward(shown) {
		_, filed, err := d.filed(ctx, sequence)
		if err != nil {
			return nil, err
		}
		out.Reports = append(out.Reports, *filed)
	}
	return out, nil
}

// ReadReport satisfies api.Admin. The name of a file is one that the journal has, it is opened within the folder of reports and
// nowhere else, and what is in it has the digest that the journal has.
func (d admin) ReadReport(ctx context.Context, _ string, req api.ReadReport) (any, error) {
	s, _, err := d.filed(ctx, uint64(req.Sequence))
	if errors.Is(err, audit.ErrNotFound) {
		return nil, problem.New(problem.NotFound, "日志的这一条不是报告 (that entry is no report)", "yinjian change list --kind report.filed")
	}
	if err != nil {
		return nil, err
	}
	if req.File == "" {
		r, err := d.a.journal.Entry(ctx, uint64(req.Sequence))
		if err != nil {
			return nil, err
		}
		receipt, err := d.a.backups.receipt(ctx, r)
		if err != nil {
			return nil, err
		}
		content, err := json.Marshal(receipt)
		return wire.ReportContent{Name: s.Kind + "-" + s.Name + ".receipt.json", Content: append(content, '\n')}, err
	}
	i := slices.IndexFunc(s.Files, func(f report.File) bool { return f.Name == req.File })
	if i < 0 {
		return nil, problem.New(problem.NotFound, "报告没有这个文件 (the report has no such file)", "见报告的文件列表 (see the report's list of files)")
	}
	content, err := readReportFile(ReportsFolder(d.a.dir), s.Files[i])
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, problem.New(problem.NotFound, "该文件不在设备的 reports 目录中：写到了别处，或已移走 (the file is not in the appliance's folder of reports: it was written elsewhere, or moved)",
			"在写报告时给出的目录里找，并用回执核对 (look where the report was written to, and hold it against the receipt)")
	case err != nil:
		return nil, problem.New(problem.NotFound, "该文件与日志所记的不符，不予提供 (the file is not the one that the journal has)："+printable(err.Error()),
			"保留现场；用备份中的同名文件与回执核对 (keep it as it is; hold another copy against the receipt)").With(err)
	}
	return wire.ReportContent{Name: req.File, Content: content}, nil
}

func readReportFile(folder string, f report.File) ([]byte, error) {
	root, err := os.OpenRoot(folder)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	info, err := root.Lstat(f.Name)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() != int64(f.Size) || f.Size > maxReportFile {
		return nil, fmt.Errorf("%s: %d 字节 (bytes), %v", f.Name, info.Size(), info.Mode())
	}
	file, err := root.Open(f.Name)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	content, err := io.ReadAll(io.LimitReader(file, int64(f.Size)+1))
	if err == nil && report.FileOf(f.Name, content) != f {
		err = report.ErrDiffers
	}
	return content, err
}

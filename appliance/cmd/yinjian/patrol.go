package main

import (
	"bytes"
	"context"
	"crypto"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"yinjian/api/client"
	"yinjian/appliance"
	"yinjian/appliance/alarm"
	"yinjian/appliance/audit"
	"yinjian/appliance/backup"
	"yinjian/appliance/evidence/show"
	"yinjian/appliance/patrol"
	"yinjian/appliance/report"
	"yinjian/dbdriver/sqlite"
	"yinjian/ntp/ledger"
	"yinjian/ntp/sysclock"
)

// exitBlind is the exit status of a patrol that could not look.
const exitBlind = 3

func patrolCommand() *cobra.Command {
	var dir, out, output string
	chosen := map[patrol.Period]*bool{}
	c := &cobra.Command{
		Use:   "patrol --dir DIR [--daily|--weekly|--monthly|--quarterly]",
		Short: "巡检：查一遍运行中的设备，出签名的报告 (a patrol inspection of the appliance, with a signed report)",
		Long: `巡检运行中的设备（经本机套接字，并只读地读日志文件）；设备不在运行时，查目录里看得到的。缺省为日巡检。

  --daily      证书、吊销列表、磁盘、中心库、密码机、时间、院区、备份、告警、拒绝；日志自上次巡检以来的条目
  --weekly     另抽查更早的日志
  --monthly    日志全部重读，与中心库按天对账
  --quarterly  另按 MAC 清查中心库

报告写入 --out（缺省为设备目录下的 reports）：JSON、可打印的 HTML，与回执；回执即签名（日志密钥的检查点证明报告的 SM3 记在日志里）。没有查的逐项写明。
退出码供监控用：0 正常或仅有提示，1 有警告，2 有严重问题或设备没有应答，3 没能查（目录或配置读不出，或用法有误时 2）。

Inspects the running appliance, or what its folder shows. The report is JSON and printable HTML, signed by a receipt of the
journal, and says what was not looked at. Exit status: 0 normal, 1 warning, 2 severe, 3 could not look.`,
		Args: exactArgs(0),
		RunE: func(c *cobra.Command, _ []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			period := patrol.Daily
			for p, set := range chosen {
				if *set {
					period = p
				}
			}
			r, err := inspect(c.Context(), dir, out, period)
			if err != nil {
				return exitError{fmt.Errorf("没能巡检 (could not look): %w", err), exitBlind}
			}
			if output == "json" {
				enc := json.NewEncoder(os.Stdout)
				enc.SetIndent("", "  ")
				if err := enc.Encode(r.Report); err != nil {
					return err
				}
			} else {
				printPatrol(os.Stdout, r)
			}
			if code := r.Exit(); code != 0 {
				return exitError{fmt.Errorf("巡检结论：%s (%s)", r.Severity.Chinese(), r.Severity), code}
			}
			return nil
		},
	}
	required(c, &dir, "dir", "设备目录 (the appliance's folder)")
	c.Flags().StringVar(&out, "out", "", "报告写到哪里，缺省为设备目录下的 reports (where the report is written; default reports in the appliance's folder)")
	c.Flags().StringVarP(&output, "output", "o", "text", "text 或 json")
	var names []string
	for _, p := range []patrol.Period{patrol.Daily, patrol.Weekly, patrol.Monthly, patrol.Quarterly} {
		chosen[p] = c.Flags().Bool(string(p), false, p.Chinese())
		names = append(names, string(p))
	}
	c.MarkFlagsMutuallyExclusive(names...)
	return c
}

// A patrolled is a report and where it is.
type patrolled struct {
	*patrol.Report
	files    []string
	unsigned string // why there is no signature
}

// inspect is the procedure. Its error means that nothing could be looked at.
func inspect(ctx context.Context, dir, out string, period patrol.Period) (*patrolled, error) {
	cfg, err := appliance.LoadConfig(dir)
	if err != nil {
		return nil, err
	}
	sys, err := sysclock.Open()
	if err != nil {
		return nil, err
	}
	in := patrol.Input{
		Period: period, Node: cfg.Node, Campus: cfg.Campus, Version: appliance.Version, To: sys.Realtime().UTC(), Reserve: cfg.Policy.ReserveBytes,
		Answers: map[string]json.RawMessage{}, Missing: map[string]string{}, BackupMaxAge: time.Duration(cfg.Alarms.BackupMaxAge),
	}
	// 1. What the appliance says, if it runs.
	f := adminFlags{dir: dir, output: "json"}
	a, err := f.client()
	if err != nil {
		for _, name := range []string{"state", "time", "certificates", "crls", "backups", "compare", "sweep"} {
			in.Missing[name] = err.Error()
		}
	} else {
		defer a.Close()
		ask(ctx, a, &in)
	}
	in.From = in.To.AddDate(0, 0, -period.Days())
	// 2. What its journal says.
	if err := readJournal(ctx, dir, &in); err != nil {
		in.Missing["journal"] = err.Error()
		in.Journal = nil
	}
	// 3. Its volumes.
	folders := map[string]string{"设备目录所在的卷": dir, "临时目录所在的卷": os.TempDir()}
	if d := cfg.Log.Directory; filepath.IsAbs(d) {
		folders["运行日志所在的卷"] = d
	}
	for _, name := range slices.Sorted(maps.Keys(folders)) {
		v := patrol.Volume{Name: name}
		var fs unix.Statfs_t
		if err := unix.Statfs(folders[name], &fs); err != nil {
			v.Error = err.Error()
		}
		v.Free, v.Total = fs.Bavail*uint64(fs.Bsize), fs.Blocks*uint64(fs.Bsize)
		in.Volumes = append(in.Volumes, v)
	}
	r := &patrolled{Report: patrol.Judge(in)}
	if out == "" {
		out = filepath.Join(dir, "reports")
	}
	return r, r.write(ctx, a, out, in.To)
}

// ask has the appliance answer. What is not answered is said to be missing.
func ask(ctx context.Context, a *client.Admin, in *patrol.Input) {
	questions := map[string]func(context.Context) (json.RawMessage, error){
		"state": a.State, "time": a.TimeStatus, "certificates": a.ListCertificates, "crls": a.ListCRLs, "backups": a.ListBackups,
	}
	if in.Period == patrol.Monthly || in.Period == patrol.Quarterly {
		questions["compare"] = a.Compare
	}
	if in.Period == patrol.Quarterly {
		questions["sweep"] = a.Sweep
	}
	for name, question := range questions {
		answer, err := question(ctx)
		if err != nil {
			in.Missing[name] = explain(err).Error()
			continue
		}
		in.Answers[name] = answer
	}
	_, in.Running = in.Answers["state"]
	var s struct{ Time struct{ State, Time string } }
	if err := json.Unmarshal(in.Answers["state"], &s); err == nil {
		if at, err := time.Parse(time.RFC3339Nano, s.Time.Time); err == nil {
			in.To, in.Trusted = at.UTC(), s.Time.State == "trusted" || s.Time.State == "holdover"
		}
	}
}

// samples are how many spans of the older journal a weekly patrol reads again, and sampleEntries how long each is.
const (
	samples       = 8
	sampleEntries = 5000
)

// readJournal verifies the journal as deep as the period asks, and reads what it says of the period.
func readJournal(ctx context.Context, dir string, in *patrol.Input) error {
	key, err := show.ReadPublicKey(filepath.Join(dir, "log.pem"))
	if err != nil {
		return err
	}
	store, err := sqlite.OpenJournal(ctx, sqlite.JournalConfig{Dir: filepath.Join(dir, "journal"), ReadOnly: true})
	if err != nil {
		return err
	}
	defer store.Close()
	j := &patrol.Journal{}
	in.Journal = j
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
	if err := verifyJournal(ctx, dir, store, key, in); err != nil {
		return err
	}
	if err := readPeriod(ctx, store, in); err != nil { // of one that was changed, perhaps
		in.Missing["period"] = err.Error()
	}
	return nil
}

// readPeriod reads what the journal says of the period.
func readPeriod(ctx context.Context, store audit.Store, in *patrol.Input) error {
	err := appliance.Filed(ctx, store, appliance.FiledAlarms, in.From, in.To, func(e *audit.Entry) error {
		one := patrol.AlarmEntry{ID: e.Text("id"), Code: alarm.Code(e.Text("code")), Object: e.Object, Cleared: e.Kind == "alarm.cleared", At: e.Time.UTC()}
		if within(one.At, in) {
			_ = one.Severity.UnmarshalText([]byte(e.Text("severity"))) // a later version's counts as normal
			in.Alarms = append(in.Alarms, one)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if err := hoursOf(ctx, store, appliance.FiledHours, in, func(h patrol.Hour) { in.Hours = append(in.Hours, h) }); err != nil {
		return err
	}
	if err := hoursOf(ctx, store, appliance.FiledClock, in, func(h ledger.Hour) { in.Clock = append(in.Clock, h) }); err != nil {
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
	return appliance.Filed(ctx, store, what, in.From, in.To, func(e *audit.Entry) error {
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

// verifyJournal verifies what the period asks for.
func verifyJournal(ctx context.Context, dir string, store *sqlite.Journal, key crypto.PublicKey, in *patrol.Input) error {
	j := in.Journal
	if in.Period == patrol.Monthly || in.Period == patrol.Quarterly {
		units, err := timestampUnits(nil, filepath.Join(dir, "log.pem"))
		if err != nil {
			return err
		}
		shown, end := verifyProgress()
		defer end()
		j.Whole, err = audit.Verify(ctx, store, audit.Options{LogKey: key, Wait: verifyWait, CheckToken: appliance.CheckpointToken(units...), Progress: shown, Workers: runtime.NumCPU()})
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
	s, err := audit.VerifySpan(ctx, store, key, *from, *j.Last)
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
		if s, err = audit.VerifySpan(ctx, store, key, *begin, *end); err != nil {
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

// lastPatrolled is the checkpoint up to which the last patrol that found no change has verified the journal, nil without one.
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
		if json.Unmarshal(s.Summary, &was) != nil || was.Entries == 0 || was.Entries > most {
			continue
		}
		c, err := checkpointFrom(ctx, store, was.Entries)
		if err == nil && c.Size == was.Entries && c.Root.String() == was.Root {
			return c, nil
		}
	}
	return nil, nil
}

// write writes the report's files, and has the appliance sign them.
func (r *patrolled) write(ctx context.Context, a *client.Admin, out string, at time.Time) error {
	if err := os.MkdirAll(out, 0o700); err != nil {
		return err
	}
	name := fmt.Sprintf("patrol-%s-%s", r.Period, at.In(audit.Beijing).Format("20060102T150405"))
	body, err := json.MarshalIndent(r.Report, "", "  ")
	if err != nil {
		return err
	}
	receipt := name + ".receipt.json"
	page := func(receipt string) ([]byte, error) {
		var b bytes.Buffer
		err := r.Page(receipt).HTML(&b)
		return b.Bytes(), err
	}
	if !r.Running {
		r.unsigned = "设备没有应答 (the appliance does not answer)"
		receipt = ""
	}
	html, err := page(receipt)
	if err != nil {
		return err
	}
	files := map[string][]byte{name + ".json": append(body, '\n'), name + ".html": html}
	if r.Running {
		err := signReport(ctx, a, report.Patrol, string(r.Period), r.Severity.String(), nil, r.Summary, files, filepath.Join(out, receipt))
		if err != nil {
			r.unsigned = err.Error()
			if files[name+".html"], err = page(""); err != nil {
				return err
			}
		} else {
			r.files = append(r.files, filepath.Join(out, receipt))
		}
	}
	for file, b := range files {
		if err := replaceFile(filepath.Join(out, file), b); err != nil {
			return err
		}
		r.files = append(r.files, filepath.Join(out, file))
	}
	slices.Sort(r.files)
	return nil
}

func printPatrol(w io.Writer, r *patrolled) {
	fmt.Fprintf(w, "%s %s（%s） 本期 %s 至 %s\n", r.Period.Chinese(), r.Node, r.Campus, patrol.Beijing(r.From), patrol.Beijing(r.To))
	for _, a := range r.Areas {
		fmt.Fprintf(w, "\n【%s】%s\n", a.Title, a.Severity.Chinese())
		t := columns{to: w}
		for _, l := range a.Lines {
			word, _ := l.Mark()
			fmt.Fprintf(&t, "  %s\t%s\t%s\n", word, l.Item, l.Value)
			if l.Next != "" && l.Severity >= alarm.Warning {
				fmt.Fprintf(&t, "\t\t→ %s\n", l.Next)
			}
		}
		t.flush()
	}
	if len(r.Ledger) > 0 {
		fmt.Fprintln(w, "\n【台账】程度、代码、次数、未恢复、最后一次")
		t := columns{to: w}
		for _, l := range r.Ledger {
			fmt.Fprintf(&t, "  %s\t%s\t%d\t%d\t%s\n", l.Severity.Chinese(), l.Code, l.Raised, l.Open, patrol.Beijing(l.Last))
		}
		t.flush()
	}
	fmt.Fprintf(w, "\n没有查的 (not checked)：%d 项，逐项写在报告里\n", len(r.NotChecked))
	for _, f := range r.files {
		fmt.Fprintf(w, "报告 (report)：%s\n", f)
	}
	if r.unsigned != "" {
		fmt.Fprintf(w, "未签名 (not signed)：%s\n", r.unsigned)
	}
	fmt.Fprintf(w, "结论 (result)：%s %s\n", r.Severity.Chinese(), r.Severity)
}

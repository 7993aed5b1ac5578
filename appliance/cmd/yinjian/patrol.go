package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"yinjian/api/client"
	"yinjian/appliance"
	"yinjian/appliance/alarm"
	"yinjian/appliance/audit"
	"yinjian/appliance/evidence/show"
	"yinjian/appliance/patrol"
	"yinjian/appliance/report"
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
				return verdictError{fmt.Errorf("巡检结论：%s (%s)", r.Severity.Chinese(), r.Severity), code}
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
	in.Volumes = appliance.PatrolVolumes(dir, cfg.Log.Directory)
	r := &patrolled{Report: patrol.Judge(in)}
	if out == "" {
		out = appliance.ReportsFolder(dir)
	}
	return r, r.write(ctx, a, out, in.To)
}

// ask has the appliance answer. What is not answered is said to be missing.
func ask(ctx context.Context, a *client.Admin, in *patrol.Input) {
	questions := map[string]func(context.Context) (json.RawMessage, error){
		"state": a.State, "time": a.TimeStatus, "certificates": a.ListCertificates, "crls": a.ListCRLs, "backups": a.ListBackups,
	}
	if appliance.WholeJournal(in.Period) {
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

// readJournal verifies the journal as deep as the period asks, and reads what it says of the period.
func readJournal(ctx context.Context, dir string, in *patrol.Input) error {
	key, err := show.ReadPublicKey(filepath.Join(dir, "log.pem"))
	if err != nil {
		return err
	}
	store, err := openJournal(ctx, filepath.Join(dir, "journal"))
	if err != nil {
		return err
	}
	defer store.Close()
	opt := audit.Options{LogKey: key, Wait: verifyWait, Workers: runtime.NumCPU()}
	if appliance.WholeJournal(in.Period) {
		units, err := timestampUnits(nil, filepath.Join(dir, "log.pem"))
		if err != nil {
			return err
		}
		shown, end := verifyProgress()
		defer end()
		opt.CheckToken, opt.Progress = appliance.CheckpointToken(units...), shown
	}
	return appliance.ReadPatrol(ctx, store, opt, in)
}

// write writes the report's files, and has the appliance sign them.
func (r *patrolled) write(ctx context.Context, a *client.Admin, out string, at time.Time) error {
	if err := os.MkdirAll(out, 0o700); err != nil {
		return err
	}
	name := patrol.FileName(r.Period, at)
	receipt := name + ".receipt.json"
	if !r.Running {
		r.unsigned = "设备没有应答 (the appliance does not answer)"
		receipt = ""
	}
	files, err := r.Files(name, receipt)
	if err != nil {
		return err
	}
	if r.Running {
		err := signReport(ctx, a, report.Patrol, string(r.Period), r.Severity.String(), nil, r.Summary, files, filepath.Join(out, receipt))
		if err != nil {
			r.unsigned = err.Error()
			if files, err = r.Files(name, ""); err != nil {
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

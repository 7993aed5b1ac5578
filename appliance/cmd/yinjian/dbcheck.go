package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"yinjian/api/wire"
	"yinjian/appliance"
	"yinjian/dbdriver/central"
	"yinjian/dbdriver/check"
	"yinjian/dbdriver/connect"
	"yinjian/ntp/sysclock"
	"yinjian/tsa"
)

func databaseCheckCommand() *cobra.Command {
	var dir, dsn, passwordFile, out, output string
	var soak time.Duration
	c := &cobra.Command{
		Use:   "check (--dsn DSN [--password-file FILE] | --dir DIR) [--out NAME]",
		Short: "中心库的现场验收：逐项试用，写出报告 (acceptance of a central database: tries it and writes a report)",
		Long: `在现场的库上逐项试用本程序所需的一切：设置、汉字、空串与空格、重复键、回滚、锁、并发……所建的表 yj_probe 用后即删；
库中已有本程序的表时不碰它们。给出 --dir 而不给 --dsn 时用该设备配置的库。
--out NAME 写出 NAME.json 与 NAME.txt；--dir 的设备在运行时由其时间戳单元对 NAME.json 盖时间戳，写出 NAME.tsr，
可用 yinjian ts verify 核验；否则报告写明未签名。退出码 0 通过，1 未通过。
(Tries on the very database what the program needs of it. With --dir and a running appliance, its timestamp unit signs the report.)`,
		Args: exactArgs(0),
		RunE: func(c *cobra.Command, _ []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			if dsn == "" && dir == "" || dsn == "" && passwordFile != "" {
				return usageError{errors.New("给出 --dsn，或 --dir (give --dsn, or --dir)")}
			}
			d := appliance.Database{DSN: dsn, PasswordFile: passwordFile}
			if dsn == "" {
				cfg, err := appliance.LoadConfig(dir)
				if err != nil {
					return err
				}
				d = cfg.Database
			}
			place, err := d.Place(dir)
			if err == nil {
				err = connect.Check(place.DSN)
			}
			if err != nil {
				return err
			}
			if soak > 0 {
				fmt.Fprintf(os.Stderr, "逐项试用后持续写入 %v：其间请做主备切换、重启服务器 (after the checks, rows are written for that long: switch over or restart servers meanwhile)\n", soak)
			}
			report, err := checkDatabase(c.Context(), place, soak)
			if err != nil {
				return err
			}
			b, err := json.MarshalIndent(report, "", "  ")
			if err != nil {
				return err
			}
			b = append(b, '\n')
			var text strings.Builder
			printDatabaseCheck(&text, report)
			if out == "" {
				text.WriteString("签名 signature: 未签名：没有 --out (not signed: no --out)\n")
			} else if err := writeDatabaseCheck(c.Context(), &text, out, dir, b); err != nil {
				return err
			}
			if output == "json" {
				_, err = os.Stdout.Write(b)
			} else {
				_, err = io.WriteString(os.Stdout, text.String())
			}
			if err == nil && !report.OK() {
				err = errFound
			}
			return err
		},
	}
	f := c.Flags()
	f.StringVar(&dsn, "dsn", "", "库在哪里，见 docs/database.md；不得写口令 (where the database is, without a password)")
	f.StringVar(&passwordFile, "password-file", "", "口令文件，权限 600 (file with the password)")
	f.StringVar(&dir, "dir", "", "设备目录：其配置的库，并由其签名 (an appliance's folder: its database, its signature)")
	f.DurationVar(&soak, "soak", 0, "另外持续写入多久，供切换演练，如 10m (write for that long besides, for a switchover)")
	f.StringVar(&out, "out", "", "报告的文件名，不含扩展名 (name of the report's files, without extension)")
	f.StringVarP(&output, "output", "o", "text", "text 或 json (text or json)")
	return c
}

func checkDatabase(ctx context.Context, place connect.Place, soak time.Duration) (*check.Report, error) {
	clock, err := sysclock.Open()
	if err != nil {
		return nil, err
	}
	db, seam, err := connect.DB(place)
	if err != nil {
		return nil, err
	}
	defer db.Close()
	report := &check.Report{
		Program: appliance.Version, DSN: place.DSN, At: clock.Realtime().Format(time.RFC3339), Modules: databaseModules(),
	}
	return report, check.Run(ctx, db, seam, soak, report)
}

// databaseModules are the modules of the program that bring drivers, with what stands in for them.
func databaseModules() []string {
	out := []string{}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return out
	}
	for _, m := range info.Deps {
		if !strings.Contains(m.Path, "pgx") && !strings.Contains(m.Path, "sqlite") && !strings.HasSuffix(m.Path, "/dm") {
			continue
		}
		name := m.Path + " " + m.Version
		if m.Replace != nil {
			name += " => " + m.Replace.Path + " " + m.Replace.Version
		}
		out = append(out, name)
	}
	return out
}

// writeDatabaseCheck writes the report's files, and adds to the text whether it is signed.
func writeDatabaseCheck(ctx context.Context, text *strings.Builder, out, dir string, report []byte) error {
	response, why := stampReport(ctx, dir, report)
	if response == nil {
		fmt.Fprintf(text, "签名 signature: 未签名 (not signed)：%s\n", why)
	} else {
		fmt.Fprintf(text, "签名 signature: %s.tsr，设备的时间戳，覆盖 %s.json (the appliance's timestamp over it)\n", filepath.Base(out), filepath.Base(out))
		if err := replaceFile(out+".tsr", response); err != nil {
			return err
		}
	}
	if err := replaceFile(out+".json", report); err != nil {
		return err
	}
	return replaceFile(out+".txt", []byte(text.String()))
}

// stampReport has the appliance of that folder stamp a report, if it runs; otherwise it says why there is no stamp.
func stampReport(ctx context.Context, dir string, report []byte) (response []byte, why string) {
	if dir == "" {
		return nil, "没有 --dir (no --dir)"
	}
	a, err := (&adminFlags{dir: dir, output: "text"}).client()
	if err != nil {
		return nil, err.Error()
	}
	defer a.Close()
	req := &tsa.Request{Imprint: tsa.ImprintOf(report), CertReq: true}
	if req.Nonce, err = rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 63)); err != nil {
		return nil, err.Error()
	}
	der, err := req.Bytes()
	if err != nil {
		return nil, err.Error()
	}
	answer, err := a.Stamp(ctx, wire.Stamp{Request: der})
	if err != nil {
		return nil, explain(err).Error()
	}
	var stamped wire.Stamped
	if err := json.Unmarshal(answer, &stamped); err != nil {
		return nil, err.Error()
	}
	r, err := tsa.ParseResponse(stamped.Response)
	if err == nil && r.Token == nil {
		err = r.Err()
	}
	if err != nil {
		return nil, err.Error()
	}
	return stamped.Response, ""
}

var resultWords = map[check.Result]string{check.Passed: "通过 passed", check.Failed: "失败 FAILED", check.Observed: "实测 observed", check.Skipped: "未做 not checked"}

var verdictWords = map[central.Verdict]string{central.Fit: "合适 ok", central.Doubtful: "注意 warning", central.Unfit: "拒绝 REFUSED", central.NotChecked: "未查 not checked"}

func printDatabaseCheck(w io.Writer, r *check.Report) {
	fmt.Fprintf(w, "中心库验收报告 acceptance of a central database\n程序 program: %s\n库 database: %s  %s\n时间 time: %s（本机时钟，未经证明 this machine's clock）\n", r.Program, r.Database, r.DSN, r.At)
	for _, m := range r.Modules {
		fmt.Fprintln(w, "驱动 driver:", m)
	}
	fmt.Fprintln(w, "设置 settings:")
	for _, s := range r.Settings {
		fmt.Fprintf(w, "  [%s] %s = %s", verdictWords[s.Verdict], s.Name, s.Value)
		if s.Why != "" {
			fmt.Fprintf(w, "：%s", s.Why)
		}
		fmt.Fprintln(w)
	}
	fmt.Fprintln(w, "逐项 checks:")
	if len(r.Items) == 0 {
		fmt.Fprintln(w, "  设置被拒，未试用 (a setting is refused: nothing was tried)")
	}
	for _, i := range r.Items {
		fmt.Fprintf(w, "  [%s] %s：%s", resultWords[i.Result], i.Name, i.What)
		if i.Detail != "" {
			fmt.Fprintf(w, " → %s", i.Detail)
		}
		fmt.Fprintln(w)
	}
	if len(r.CommitsMS) == 3 {
		fmt.Fprintf(w, "单次提交 one commit: 中位 median %.2f ms，95 %% %.2f ms，最长 worst %.2f ms\n", r.CommitsMS[0], r.CommitsMS[1], r.CommitsMS[2])
	}
	if s := r.Soak; s != nil {
		fmt.Fprintf(w, "持续写入 soak: %.0f s，%d 行 rows，其中应答丢失而已写入 answers lost %d，最长间隔 longest gap %.0f ms，错误 errors %v\n", s.Seconds, s.Rows, s.AnswersLost, s.LongestGapMS, s.Errors)
	}
	if r.OK() {
		fmt.Fprintln(w, "结论 result: 通过 (passed)")
	} else {
		fmt.Fprintln(w, "结论 result: 未通过 (did not pass)")
	}
}

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/spf13/cobra"

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance/audit"
	"yinjian/appliance/evidence/show"
	"yinjian/appliance/report"
)

func alarmCommand() *cobra.Command {
	c := group(&cobra.Command{Use: "alarm", Short: "告警 (alarms)"})
	var f adminFlags
	test := &cobra.Command{
		Use: "test", Short: "向每个接收方发一条测试告警，说明是否送出 (send every receiver a test alarm)", Args: exactArgs(0),
		Long: `向 config.toml 中每个 [[alarms.syslog]]、[[alarms.webhook]] 发一条测试告警，数秒内说明结果。syslog 没有回执：“已送出”是指已写入 TLS 连接
且对方没有随即断开；是否收到请在接收方查看。有一个没有送出则退出码为 1。

Sends each configured receiver a message. Syslog has no acknowledgement: look there whether it arrived. Exits 1 if one was not sent.`,
		RunE: func(c *cobra.Command, _ []string) error {
			a, err := f.client()
			if err != nil {
				return err
			}
			defer a.Close()
			tested, err := a.TestAlarms(c.Context())
			if err != nil {
				return explain(err)
			}
			if f.output == "json" {
				if err := json.NewEncoder(os.Stdout).Encode(tested); err != nil {
					return err
				}
			} else {
				fmt.Printf("测试告警 (test alarm) %s\n", tested.ID)
				for _, r := range tested.Receivers {
					words := "已送出 sent"
					if !r.Sent {
						words = "未送出 NOT SENT：" + r.Error
					}
					fmt.Printf("  %s：%s\n", r.Name, words)
				}
			}
			if !tested.Passed {
				return errFound
			}
			return nil
		},
	}
	f.add(test)
	c.AddCommand(
		adminCommand("list", "现有的告警，与各接收方的情况 (alarms that are not over, and how the receivers do)", 0, nil, func(ctx context.Context, a *client.Admin, _ []string) (json.RawMessage, error) {
			return a.ListAlarms(ctx)
		}),
		test,
	)
	return c
}

func reportCommand() *cobra.Command {
	c := group(&cobra.Command{Use: "report", Short: "设备签名的报告：巡检、评估、演练 (reports that the appliance signed)"})
	var logKey, receipt string
	verify := &cobra.Command{
		Use: "verify --log-key FILE --receipt FILE FILE…", Short: "离线核对报告的签名 (check a report's signature offline)",
		Long: `核对回执：日志公钥签的检查点、条目在其中的证明、条目里各文件的 SM3；再核对给出的文件。全部相符退出码为 0。

Proves the receipt with the log's public key, and that the files are those of the report. It needs no appliance.`,
		RunE: func(_ *cobra.Command, args []string) error {
			key, err := show.ReadPublicKey(logKey)
			if err != nil {
				return err
			}
			proof, err := readLimited(receipt, 1<<20)
			if err != nil {
				return err
			}
			if len(args) == 0 {
				return usageError{errors.New("给出报告的文件 (give the report's files)")}
			}
			files := map[string][]byte{}
			for _, name := range args {
				b, err := readLimited(name, 256<<20)
				if err != nil {
					return err
				}
				files[filepath.Base(name)] = b
			}
			s, e, err := report.Verify(proof, key, files)
			if err != nil {
				return err
			}
			fmt.Printf("签名有效 (signed)：%s/%s，结论 %s，设备 %s，日志第 %d 条，%s\n", s.Kind, s.Name, s.Outcome, e.Node, e.Sequence, e.Time.UTC().In(audit.Beijing).Format("2006-01-02 15:04:05 -0700"))
			for _, f := range s.Files {
				words := "未给出 not given"
				if _, ok := files[f.Name]; ok {
					words = "相符 the same"
				}
				fmt.Printf("  %s：%s\n", f.Name, words)
			}
			return nil
		},
	}
	required(verify, &logKey, "log-key", "日志公钥 PEM (the log's public key)")
	required(verify, &receipt, "receipt", "回执 (the receipt)")
	c.AddCommand(verify)
	return c
}

// signReport files a report's files in the appliance's journal and writes the receipt.
func signReport(ctx context.Context, a *client.Admin, kind, name, outcome string, who []string, summary any, files map[string][]byte, receipt string) error {
	req := wire.SignReport{Kind: kind, Name: name, Outcome: outcome, Persons: who}
	var err error
	if summary != nil {
		if req.Summary, err = json.Marshal(summary); err != nil {
			return err
		}
	}
	for _, file := range slices.Sorted(maps.Keys(files)) {
		req.Files = append(req.Files, wire.ReportFile(report.FileOf(file, files[file])))
	}
	answer, err := a.SignReport(ctx, req)
	if err != nil {
		return explain(err)
	}
	return replaceFile(receipt, append(answer, '\n'))
}

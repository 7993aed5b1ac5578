package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"yinjian/api/client"
	"yinjian/api/wire"
)

func logCommand() *cobra.Command {
	c := group(&cobra.Command{Use: "log", Short: "运行日志：去处、级别、保留期、最近的行 (the running log, not the journal)"})
	var set wire.SetLog
	var directory string
	var lines wire.ReadLog
	change := shown("set", "改变去处、级别或保留期，立即生效，重启后仍有效 (change it; counts at once and over a restart)", func(c *cobra.Command) {
		f := c.Flags()
		f.StringVar(&directory, "directory", "", `目录：logs 或其下，或绝对路径；"" 只写标准错误 (folder; "" for standard error alone)`)
		f.StringVar(&set.Level, "level", "", "error、warning、info、debug")
		f.IntVar(&set.KeepDays, "keep-days", 0, "文件写完后保留的天数，至少 180 (days that a file is kept, at least 180)")
		required(c, &set.Reason, "reason", "原因，记入日志 (why, for the journal)")
	}, func(ctx context.Context, a *client.Admin) (json.RawMessage, error) { return a.SetLog(ctx, set) }, printLogStatus)
	change.PreRun = func(c *cobra.Command, _ []string) {
		if c.Flags().Changed("directory") {
			set.Directory = &directory
		}
	}
	c.AddCommand(
		shown("status", "去处、级别、保留期与大小 (where it goes, and how much there is)", nil,
			func(ctx context.Context, a *client.Admin) (json.RawMessage, error) { return a.LogStatus(ctx) }, printLogStatus),
		change,
		shown("lines", "最近的行 (the last lines)", func(c *cobra.Command) {
			c.Flags().IntVarP(&lines.Lines, "lines", "n", 100, "行数 1–10000 (how many)")
		}, func(ctx context.Context, a *client.Admin) (json.RawMessage, error) { return a.ReadLog(ctx, lines) },
			func(w io.Writer, l *struct{ Lines []string }) {
				t := &columns{to: w}
				for _, line := range l.Lines {
					fmt.Fprintln(t, line)
				}
				t.flush()
			}),
	)
	return c
}

func printLogStatus(w io.Writer, s *wire.LogStatus) {
	t := &columns{to: w}
	folder := s.Folder
	if folder == "" {
		folder = "只写标准错误 (standard error alone)"
	}
	fmt.Fprintf(t, "目录 folder\t%s\n级别 level\t%s\n保留 kept\t%d 天 days\n由 decided by\t%s\n文件 files\t%d，%d 字节 bytes\n", folder, s.Level, s.KeepDays, s.Decided, s.Files, s.Bytes)
	if s.Lost > 0 {
		fmt.Fprintf(t, "未写入 lost\t%d 行 lines：%s\n", s.Lost, s.Failed)
	}
	t.flush()
}

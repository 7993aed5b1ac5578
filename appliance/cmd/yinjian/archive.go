package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance"
)

func databaseArchiveCommand() *cobra.Command {
	var f adminFlags
	var req wire.Archive
	c := &cobra.Command{
		Use: "archive --dir DIR --before MONTH --reason WHY [--dry-run]", Args: exactArgs(0),
		Short: "把已结束各月的行移入归档表，不删除任何行 (move the rows of closed months to the archive; nothing is deleted)",
		Long: `由运行中的设备把本机 --before 所写月份（北京时间）之前的行从 yj_record、yj_batch 移到 yj_record_archive、yj_batch_archive：
小事务、边做边歇，签名与投递照常。对账、清查、重建、年度统计照旧看到全部的行。中断（包括断电）之后再执行同一命令即从停下处继续。
--dry-run 只列出各月有多少行，什么也不动。意图与结果（行数）记入日志。
(The running appliance moves its rows of the months before --before, in small transactions with rests. Whoever compares, sweeps, rebuilds
or counts sees all rows as before. After any interruption the same command goes on.)`,
		RunE: func(c *cobra.Command, _ []string) error {
			if !req.DryRun && req.Reason == "" {
				return usageError{fmt.Errorf("需要 --reason，或 --dry-run (--reason is needed, or --dry-run)")}
			}
			answer, err := f.watched(c.Context(), func(ctx context.Context, a *client.Admin) (json.RawMessage, error) { return a.Archive(ctx, req) })
			if err != nil {
				return err
			}
			if f.output == "json" {
				return f.show(answer)
			}
			var report appliance.ArchiveReport
			if err := json.Unmarshal(answer, &report); err != nil {
				return err
			}
			printArchive(os.Stdout, &report)
			return nil
		},
	}
	f.add(c)
	c.Flags().StringVar(&req.Before, "before", "", "第一个不归档的月份，如 2025-01；至多本月；必填 (the first month that stays; required)")
	_ = c.MarkFlagRequired("before")
	c.Flags().StringVar(&req.Reason, "reason", "", "原因，记入日志 (why, for the journal)")
	c.Flags().BoolVar(&req.DryRun, "dry-run", false, "只列出将移动多少行 (only count)")
	return c
}

func printArchive(w io.Writer, r *appliance.ArchiveReport) {
	t := &columns{to: w}
	fmt.Fprintln(t, "月份 month\t未归档的行 rows in use")
	for _, m := range r.Months {
		fmt.Fprintf(t, "%s\t%d\n", m.Month, m.Rows)
	}
	t.flush()
	if r.DryRun {
		fmt.Fprintf(w, "试算 (dry run)：%s 之前有 %d 行可归档，什么也没有动 (rows could be moved; nothing was)\n", r.Before, r.Left)
		return
	}
	fmt.Fprintf(w, "归档 archived：%d 行 rows，%d 批 batches；%s 之前仍在用的 still in use %d 行\n", r.Rows, r.Batches, r.Before, r.Left)
}

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance/audit"
)

func databaseSweepCommand() *cobra.Command {
	var f adminFlags
	c := &cobra.Command{
		Use: "sweep", Short: "按 MAC 清查中心库：指出被改、被删、插入、退回旧值之处 (go through the database by its MACs, and name what was changed, removed, added or put back)",
		Long: `逐批核验证据行的 MAC、逐行核验变更记录的 MAC 与其集合根，并与上次清查所见的进度比较；不符之处再与日志逐行对照，指出行与列。
比 db compare 快（每批一次 MAC，不重算每一行）。设备也按 database.sweep_every 在后台限速清查；每次的结果记入日志。
退出码：0 未发现，1 有发现 (exit 0: nothing found, 1: something was)。`,
		Args: exactArgs(0),
		RunE: found(&f, (*client.Admin).Sweep, printSweep),
	}
	f.add(c)
	return c
}

func printSweep(w io.Writer, r *audit.SweepReport) {
	fmt.Fprintf(w, "清查 sweep：%d 批 batches，%d 个 MAC 已验 checked，%d 条变更记录 changes\n", r.Batches, r.MACsChecked, r.Changes)
	if r.OK() {
		fmt.Fprintln(w, "结论 result: 未发现改动 (nothing was changed)")
	}
	printDifferences(w, r.Differences, r.Omitted)
}

func changeCommand() *cobra.Command {
	c := group(&cobra.Command{Use: "change", Short: "变更日志：谁、何时、对什么、改前、改后、为何 (the change log)"})
	var req wire.ListChanges
	var since, until, file string
	var f adminFlags
	list := &cobra.Command{
		Use: "list", Short: "列出账户、权限、密钥、证书、设备设置的每次变更 (list what was changed)", Args: exactArgs(0),
		Long: `出自中心库的 yj_change 表，由日志投影而来；每行的 MAC 当场核验，“✗”表示该行不是本机所写的样子。是否有行缺失由 db sweep 与 db compare 判断。
过长的值与用于核验口令、打开密钥的值只有 SM3 摘要。时间写作 2026-11-22（北京时间零点）或 RFC 3339。`,
		RunE: func(c *cobra.Command, _ []string) error {
			var err error
			for _, t := range []struct {
				name, value string
				into        *string
			}{{"since", since, &req.Since}, {"until", until, &req.Until}} {
				if *t.into, err = moment(t.value); err != nil {
					return usageError{fmt.Errorf("--%s: %w", t.name, err)}
				}
			}
			a, err := f.client()
			if err != nil {
				return err
			}
			defer a.Close()
			return listChanges(c.Context(), a, &f, req, file)
		},
	}
	f.add(list)
	l := list.Flags()
	l.StringVar(&req.Object, "object", "", "对象：应用、工号、证书序列号、信任锚标识…… (of this object)")
	l.StringVar(&req.Actor, "actor", "", "操作者，写一部分即可 (by whom, a part of it)")
	l.StringVar(&req.Kind, "kind", "", "种类的开头，如 account.、trust.anchor (beginning of the kind)")
	l.StringVar(&since, "since", "", "自何时，缺省三十天前 (from then on, thirty days ago)")
	l.StringVar(&until, "until", "", "至何时（不含）(before then)")
	l.IntVar(&req.Limit, "limit", 200, "最近的多少条，1–10000 (the newest so many)")
	l.StringVar(&file, "csv", "", "另存为 CSV 表格 (write a table, too)")
	c.AddCommand(list)
	return c
}

// moment reads a day in Beijing or a time; "" stays.
func moment(s string) (string, error) {
	if s == "" {
		return "", nil
	}
	if day, err := time.ParseInLocation(time.DateOnly, s, beijing); err == nil {
		return day.Format(time.RFC3339), nil
	}
	if _, err := time.Parse(time.RFC3339, s); err != nil {
		return "", errors.New("写作 2026-11-22 或 RFC 3339 (a day, or RFC 3339)")
	}
	return s, nil
}

func listChanges(ctx context.Context, a *client.Admin, f *adminFlags, req wire.ListChanges, file string) error {
	answer, err := a.ListChanges(ctx, req)
	if err != nil {
		return explain(err)
	}
	var out wire.Changes
	if err := json.Unmarshal(answer, &out); err != nil {
		return err
	}
	if file != "" {
		lines := [][]string{{"时间", "节点", "条目", "操作者", "种类", "动作", "对象", "原因", "改前", "改后", "MAC"}}
		for _, c := range out.Changes {
			lines = append(lines, []string{c.Time, c.Node, fmt.Sprint(c.Sequence), c.Actor, c.Kind, c.Act, c.Object, c.Reason, c.Before, c.After, c.MAC})
		}
		if err := writeTable(file, lines); err != nil {
			return err
		}
	}
	if f.output == "json" {
		return f.show(answer)
	}
	for _, c := range out.Changes {
		at, err := time.Parse(time.RFC3339, c.Time)
		if err != nil {
			return err
		}
		mark := map[string]string{"ok": "✓", "wrong": "✗ 该行被改动 (the row was changed)", "other": "? 由该节点核验 (that node can tell)"}[c.MAC]
		fmt.Printf("%s  %s 条目 entry %d  %s\n  谁 who：%s\n  什么 what：%s %s %s\n", at.In(beijing).Format("2006-01-02 15:04:05.000"), c.Node, c.Sequence, mark, c.Actor, c.Kind, c.Act, c.Object)
		for _, part := range []struct{ name, value string }{{"为何 why", c.Reason}, {"改前 before", c.Before}, {"改后 after", c.After}} {
			if part.value != "" {
				fmt.Printf("  %s：%s\n", part.name, part.value)
			}
		}
	}
	fmt.Printf("%d 条 changes", len(out.Changes))
	if out.Omitted > 0 {
		fmt.Printf("，更早的 %d 条未列出：加 --limit 或 --until (%d earlier ones are not shown)", out.Omitted, out.Omitted)
	}
	fmt.Println()
	return nil
}

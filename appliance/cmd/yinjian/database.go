package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance"
	"yinjian/appliance/audit"
)

func databaseCommand() *cobra.Command {
	c := group(&cobra.Command{Use: "db", Short: "投影库 (the projection)"})
	var f adminFlags
	compare := &cobra.Command{
		Use: "compare", Short: "由日志重算投影库的每一行，指出差异 (derive every row again and name what differs)", Args: exactArgs(0),
		RunE: found(&f, (*client.Admin).Compare, printCompare),
	}
	f.add(compare)
	c.AddCommand(compare, databaseArchiveCommand(), databaseCheckCommand(), databaseSweepCommand(), databaseDictionaryCommand(), databaseRebuildCommand(), databaseReportCommand())
	return c
}

// found is a command that looks through the database: it prints what was asked for, and fails where something was found.
func found[T any, P interface {
	*T
	OK() bool
}](f *adminFlags, ask func(*client.Admin, context.Context) (json.RawMessage, error), print func(io.Writer, P)) func(*cobra.Command, []string) error {
	return func(c *cobra.Command, _ []string) error {
		a, err := f.client()
		if err != nil {
			return err
		}
		defer a.Close()
		answer, err := ask(a, c.Context())
		if err != nil {
			return explain(err)
		}
		report := P(new(T))
		if err := json.Unmarshal(answer, report); err != nil {
			return err
		}
		if f.output == "json" {
			err = f.show(answer)
		} else {
			print(os.Stdout, report)
		}
		if err == nil && !report.OK() {
			err = errFound
		}
		return err
	}
}

func printCompare(w io.Writer, r *audit.CompareReport) {
	fmt.Fprintf(w, "投影 projection：%d 行 rows，%d 批 batches，%d 批 MAC 已验 checked，%d 条未送达 not shipped yet\n", r.Rows, r.Batches, r.MACsChecked, r.NotShipped)
	printDays(w, r.Days)
	if r.OK() {
		fmt.Fprintln(w, "结论 result: 与日志一致 (agrees with the journal)")
	}
	printDifferences(w, r.Differences, r.Omitted)
}

func printDifferences(w io.Writer, differences []audit.Difference, omitted uint64) {
	for _, d := range differences {
		where := ""
		if d.Table != "" {
			where = " 表 table " + d.Table
		}
		if d.Column != "" {
			where += fmt.Sprintf(" 列 column %s：应为 want %q，实为 got %q", d.Column, d.Want, d.Got)
		}
		fmt.Fprintf(w, "  ✗ 条目 entry %d [%s]%s\n      %s\n      %s\n", d.Sequence, d.Kind, where, d.DetailZH, d.Detail)
	}
	if omitted > 0 {
		fmt.Fprintf(w, "  另有 %d 处未列出 (more, not shown)\n", omitted)
	}
}

// shownDays is how many days of each node are printed; -o json has all.
const shownDays = 31

// printDays prints a line a day, for comparing by eye: the same day of the same node reads the same at every campus.
func printDays(w io.Writer, days []audit.DayDigest) {
	t := &columns{to: w}
	fmt.Fprintln(t, "日期 day\t节点 node\t日志 entries\t库 rows\t叶值的 SM3 of the leaf hashes")
	for len(days) > 0 {
		n := slices.IndexFunc(days, func(d audit.DayDigest) bool { return d.Node != days[0].Node })
		if n < 0 {
			n = len(days)
		}
		of := days[:n]
		days = days[n:]
		if earlier := n - shownDays; earlier > 0 {
			fmt.Fprintf(t, "…\t%s\t更早的 %d 天见 -o json (%d earlier days are in -o json)\n", of[0].Node, earlier, earlier)
			of = of[earlier:]
		}
		for _, d := range of {
			entries, sum := fmt.Sprint(d.Entries), d.RowsSM3
			switch {
			case d.Entries == 0 && d.Rows > 0: // another node's, or added
				entries = "—"
			case !d.Agrees():
				sum = fmt.Sprintf("✗ 日志 journal %s，库 database %s", d.EntriesSM3, cmp.Or(d.RowsSM3, "—"))
			}
			fmt.Fprintf(t, "%s\t%s\t%s\t%d\t%s\n", d.Day, d.Node, entries, d.Rows, sum)
		}
	}
	t.flush()
}

func databaseRebuildCommand() *cobra.Command {
	var f adminFlags
	var req wire.Rebuild
	c := &cobra.Command{
		Use:   "rebuild --dir DIR --reason WHY [--replace NODE] [--journal FOLDER] [--remove NODE]",
		Short: "由日志重新生成中心库，末了逐行对账 (make the central database anew from the journals, and compare)",
		Long: `由运行中的设备执行：签名照常，投递暂停，结束后自行继续。库中已有的行，只有写明 --replace 的节点才会删除重做；别的节点的行不动，
另一院区照常投递。--journal 给出不复存在的设备的目录副本（内有 journal 与 log.pem），先全部核验，再写入它的行。
中断（包括断电）之后再执行同一命令即从停下处继续；没有完成之前，库中 yj_rebuild 表、yinjian status 与 db compare 都会指出。
(The running appliance does it: signing goes on, shipping waits. Rows in the database go only where --replace names their node.
After any interruption the same command goes on; until it is finished the database, status and db compare say so.)`,
		Args: exactArgs(0),
		RunE: func(c *cobra.Command, _ []string) error {
			for i, j := range req.Journals {
				var err error
				if req.Journals[i], err = filepath.Abs(j); err != nil {
					return err
				}
			}
			answer, err := f.watched(c.Context(), func(ctx context.Context, a *client.Admin) (json.RawMessage, error) { return a.Rebuild(ctx, req) })
			if err != nil {
				return err
			}
			if f.output == "json" {
				return f.show(answer)
			}
			var report appliance.RebuildReport
			if err := json.Unmarshal(answer, &report); err != nil {
				return err
			}
			if report.SetAside != "" {
				fmt.Printf("损坏的库文件已移到 (the damaged file is now) %s\n", report.SetAside)
			}
			for _, n := range report.Nodes {
				fmt.Printf("节点 node %s\n", n.Node)
				if n.Uncovered > 0 {
					fmt.Printf("  其日志副本的最后 %d 条没有检查点签名，无法证明 (the last %d entries of the copy are under no signed checkpoint)\n", n.Uncovered, n.Uncovered)
				}
				printCompare(os.Stdout, n.Compare)
			}
			return nil
		},
	}
	f.add(c)
	required(c, &req.Reason, "reason", "原因，记入日志 (why, for the journal)")
	c.Flags().StringArrayVar(&req.Replace, "replace", nil, "库中该节点的行删除后由日志重做，可重复 (the node's rows go and are made anew; repeatable)")
	c.Flags().BoolVar(&req.Discard, "discard", false, "日志中没有条目的行（恢复备份时丢失的、后来加入的）也删除 (rows without an entry go, too)")
	c.Flags().StringArrayVar(&req.Journals, "journal", nil, "另一台设备的目录副本，可重复 (copy of another appliance's folder; repeatable)")
	c.Flags().StringArrayVar(&req.Remove, "remove", nil, "删除没有日志的节点的行，可重复 (rows of a node without a journal go; repeatable)")
	return c
}

// watched asks for something long, and prints to stderr how far it is meanwhile.
func (f *adminFlags) watched(ctx context.Context, ask func(context.Context, *client.Admin) (json.RawMessage, error)) (json.RawMessage, error) {
	a, err := f.client()
	if err != nil {
		return nil, err
	}
	defer a.Close()
	done := make(chan struct{})
	told := make(chan struct{})
	go func() {
		defer close(told)
		tellProgress(ctx, done, a)
	}()
	answer, err := ask(ctx, a)
	close(done)
	<-told
	if err != nil {
		return nil, explain(err)
	}
	return answer, nil
}

// tellProgress prints to stderr how far a rebuild or an archiving is, until done.
func tellProgress(ctx context.Context, done <-chan struct{}, a *client.Admin) {
	words := map[string]string{"opening": "打开", "emptying": "清除", "filling": "写入", "comparing": "对账", "archiving": "归档"}
	last := ""
	for tick := time.NewTicker(500 * time.Millisecond); ; {
		select {
		case <-done:
			tick.Stop()
			return
		case <-tick.C:
		}
		answer, err := a.State(ctx)
		if err != nil {
			continue // the rebuild's own answer says what is wrong
		}
		var s struct {
			Projection struct{ Rebuild, Archive *audit.RebuildProgress }
		}
		if json.Unmarshal(answer, &s) != nil {
			continue
		}
		r := cmp.Or(s.Projection.Rebuild, s.Projection.Archive)
		if r == nil {
			continue
		}
		line := strings.TrimSpace(fmt.Sprintf("%s (%s) %s %s %d", words[r.Phase], r.Phase, r.Table, r.Node, r.Done))
		if r.Total > 0 {
			line += fmt.Sprintf("/%d", r.Total)
		}
		if line != last {
			fmt.Fprintln(os.Stderr, line)
		}
		last = line
	}
}

// reportColumns are the headings of a year's report.
var reportColumns = []string{"月份", "院区", "应用", "文书类型", "科室", "状态", "份数"}

func databaseReportCommand() *cobra.Command {
	var f adminFlags
	var req wire.YearReport
	var file string
	c := &cobra.Command{
		Use: "report --dir DIR --year YEAR [--csv FILE]", Args: exactArgs(0),
		Short: "年度统计：按月、院区、应用、文书类型、科室、状态的签名份数，不计测试 (a year's signatures, without tests)",
		Long: `由中心库统计一年（北京时间）的签名份数，含投递到此库的所有设备；测试应用与测试账号的记录不计入，另列其数。
统计分成小段、边做边歇，不与签名争用；记录多时要几分钟。--csv 写出表格（UTF-8，可直接用表格软件打开）。
(Counts a year's signatures of all appliances that ship to the database, in small steps with rests.)`,
		RunE: func(c *cobra.Command, _ []string) error {
			a, err := f.client()
			if err != nil {
				return err
			}
			defer a.Close()
			answer, err := a.YearReport(c.Context(), req)
			if err != nil {
				return explain(err)
			}
			var report appliance.YearReport
			if err := json.Unmarshal(answer, &report); err != nil {
				return err
			}
			if file != "" {
				if err := writeTable(file, append([][]string{reportColumns}, reportLines(&report)...)); err != nil {
					return err
				}
			}
			if f.output == "json" {
				return f.show(answer)
			}
			printYearReport(os.Stdout, &report)
			return nil
		},
	}
	f.add(c)
	c.Flags().IntVar(&req.Year, "year", 0, "年份，四位；必填 (required)")
	_ = c.MarkFlagRequired("year")
	c.Flags().StringVar(&file, "csv", "", "另写 CSV 文件 (write a CSV file, too)")
	return c
}

func reportLines(r *appliance.YearReport) [][]string {
	var out [][]string
	for _, l := range r.Rows {
		out = append(out, []string{fmt.Sprintf("%04d-%02d", r.Year, l.Month), l.Campus, l.Application, l.DocumentType, l.Department, statusName(l.Status), fmt.Sprint(l.Records)})
	}
	return out
}

// statusName is a record's status for people.
func statusName(status string) string {
	if status == audit.StatusRecorded {
		return "有效"
	}
	return status
}

func printYearReport(w io.Writer, r *appliance.YearReport) {
	fmt.Fprintf(w, "%d 年签名统计（北京时间，中心库 %s）a year's signatures\n", r.Year, r.At)
	t := &columns{to: w}
	fmt.Fprintln(t, strings.Join(reportColumns, "\t"))
	var month, total uint64
	for i, line := range reportLines(r) {
		fmt.Fprintln(t, strings.Join(line, "\t"))
		month += r.Rows[i].Records
		if i+1 == len(r.Rows) || r.Rows[i+1].Month != r.Rows[i].Month {
			fmt.Fprintln(t, strings.Join([]string{line[0], "小计", "", "", "", "", fmt.Sprint(month)}, "\t"))
			total, month = total+month, 0
		}
	}
	t.flush()
	fmt.Fprintf(w, "合计 total: %d 份；测试 %d 份未计入 (test records left out)\n", total, r.Tests)
	if r.Duplicates > 0 {
		fmt.Fprintf(w, "其中 %d 份是重复：同一请求在另一院区又签了一次 (of them second records of a request that was sent again to the other campus)\n", r.Duplicates)
	}
	if r.Lag > 0 {
		fmt.Fprintf(w, "注意：本机尚有 %d 条未送达中心库 (not shipped yet)\n", r.Lag)
	}
	if len(r.Unfinished) > 0 {
		fmt.Fprintf(w, "注意：节点 %s 的重建没有完成，数字不全 (their rebuild is not finished: the numbers are not whole)\n", strings.Join(r.Unfinished, "、"))
	}
}

package main

import (
	"context"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/emmansun/gmsm/sm3"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"yinjian/api/client"
	"yinjian/api/wire"
	past "yinjian/appliance/history"
	"yinjian/appliance/problem"
)

func historyCommand() *cobra.Command {
	c := group(&cobra.Command{Use: "history", Short: "旧系统签署的记录：导入、导出 (records that an older system signed)"})
	var f adminFlags
	var mappingFile string
	var trial bool
	load := &cobra.Command{
		Use:   "import FILE… --mapping FILE",
		Short: "按映射文件导入旧系统的记录 (import an older system's records, as a mapping says)",
		Long: `把旧签名系统导出的记录（CSV 或 JSON）写入日志，每条为“导入”条目：写明何日从哪个系统导入、原文件的摘要，并声明未经本设备核验；
旧签名是 CMS 的，原样保存，可用 history export 与 yinjian-verify 单独核验。导入的记录从不冒充本设备的签名，也不计入签名统计。

映射文件（TOML）写明哪一列是什么，见 docs/staff.md；不认识的键是错误。记录以（来源系统，其编号）识别：同一文件再导入一次不增加任何条目，
内容不同的只指出差异，从不改动。先 --dry-run；不好的记录连同原因写进隔离表；中断后重新运行即接着做；每次的合计记入日志。

Each record becomes a statement in the journal that nobody here vouches for. Run it again with the same file after any interruption.`,
		RunE: func(c *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usageError{errors.New("需要至少一个文件 (at least one file)")}
			}
			text, err := readLimited(mappingFile, maxMapping)
			if err != nil {
				return err
			}
			m, err := parseMapping(text)
			if err != nil {
				return fmt.Errorf("%s：%w", mappingFile, err)
			}
			a, err := f.client()
			if err != nil {
				return err
			}
			defer a.Close()
			bad := 0
			for _, name := range args {
				one := historyImport{m: m, mapping: sm3.Sum(text), trial: trial, asJSON: f.output == "json"}
				switch err := one.run(c.Context(), a, name); {
				case errors.Is(err, errSomeBad):
					bad++
				case err != nil:
					return fmt.Errorf("%s：%w", name, err)
				}
			}
			if bad > 0 {
				return fmt.Errorf("%d 个文件中有记录未导入，见隔离表 (records of %d files were put aside)", bad, bad)
			}
			return nil
		},
	}
	f.add(load)
	required(load, &mappingFile, "mapping", "映射文件 (what is what)")
	load.Flags().BoolVar(&trial, "dry-run", false, "只判断，不写入 (judge, and write nothing)")
	var to string
	export := &cobra.Command{
		Use: "export SYSTEM ID", Short: "导出一条导入的记录及其在日志中的证明 (an imported record with what proves that it stands in the log)", Args: exactArgs(2),
		RunE: func(c *cobra.Command, args []string) error {
			f.output = "json"
			a, err := f.client()
			if err != nil {
				return err
			}
			defer a.Close()
			file, err := a.HistoryRecord(c.Context(), wire.HistoryRecord{System: args[0], ID: args[1]})
			if err != nil {
				return explain(err)
			}
			if to == "-" {
				return f.show(file)
			}
			return replaceFile(to, file)
		},
	}
	export.Flags().StringVar(&f.dir, "dir", "", "设备目录 (the appliance's folder)")
	_ = export.MarkFlagRequired("dir")
	export.Flags().StringVarP(&to, "output", "o", "-", "写到文件，- 为标准输出 (file, - for standard output)")
	c.AddCommand(load, export)
	return c
}

// A request has so many records, or so many bytes of signatures; so many requests are under way.
const (
	recordsPerRequest = 128
	bytesPerRequest   = 4 << 20
	historyRequests   = 2
)

var errSomeBad = errors.New("some records were put aside")

// A historyImport is one run over one file.
type historyImport struct {
	m       *mapping
	mapping [32]byte
	trial   bool
	asJSON  bool

	source wire.HistorySource
	bar    *progress

	mu     sync.Mutex
	counts map[string]int  // guarded by mu, by result
	aside  *quarantineFile // guarded by mu
}

// A pending record is on its way to the appliance.
type pending struct {
	row    historyRow
	record *wire.HistoricalRecord
}

func (in *historyImport) run(ctx context.Context, a *client.Admin, name string) error {
	file, err := openHistory(name, in.m)
	if err != nil {
		return err
	}
	in.source = wire.HistorySource{System: in.m.System, Name: in.m.Name, File: file.name, FileSM3: file.sum[:]}
	in.counts, in.aside = map[string]int{}, &quarantineFile{name: name + ".quarantine.csv", head: file.head}
	defer in.aside.drop()
	fmt.Fprintf(os.Stderr, "%s：%s，%d 条，SM3 %x\n", file.name, file.charset, file.records, file.sum)
	in.bar = newProgress(file.records)
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(historyRequests)
	var part []pending
	size := 0
	flush := func() {
		if batch := part; len(batch) > 0 {
			g.Go(func() error { return in.send(gctx, a, batch) })
		}
		part, size = nil, 0
	}
	failed := file.each(func(row historyRow) error {
		if err := gctx.Err(); err != nil {
			return err
		}
		record, err := in.m.record(row.get, file.folder)
		record.Line = row.line
		if err == nil {
			err = checkTexts(record)
		}
		if err != nil {
			in.bar.add(1)
			return in.reject(row, past.ResultRefused, codeTable, err.Error())
		}
		part = append(part, pending{row, record})
		if size += len(record.Signature); len(part) == recordsPerRequest || size > bytesPerRequest {
			flush()
		}
		return nil
	})
	flush()
	if err := g.Wait(); err != nil { // the cause; else each would say that its context ended
		failed = err
	}
	took := in.bar.end()
	if failed == nil && !in.trial {
		_, failed = a.CloseHistory(ctx, wire.HistoryTotals{
			Source: in.source, MappingSM3: in.mapping[:], Read: file.records, Imported: in.counts[past.ResultImported], Present: in.counts[past.ResultPresent],
			Differs: in.counts[past.ResultDiffers], Refused: in.counts[past.ResultRefused], NotTried: in.counts[past.ResultNotTried],
		})
		if failed != nil {
			failed = explain(failed)
		}
	}
	return in.report(file.records, took, failed)
}

// checkTexts finds what no request may hold.
func checkTexts(r *wire.HistoricalRecord) error {
	v := reflect.ValueOf(*r)
	for i := range v.NumField() {
		if f := v.Field(i); f.Kind() == reflect.String && f.String() != "" {
			name, _, _ := strings.Cut(v.Type().Field(i).Tag.Get("json"), ",")
			var p *problem.Problem
			if errors.As(problem.CheckText(name, f.String(), maxCellBytes), &p) {
				return fmt.Errorf("%s：%s", name, p.Detail)
			}
		}
	}
	return nil
}

func (in *historyImport) send(ctx context.Context, a *client.Admin, part []pending) error {
	req := wire.ImportHistory{Source: in.source, Trial: in.trial}
	for _, p := range part {
		req.Records = append(req.Records, *p.record)
	}
	answer, err := a.ImportHistory(ctx, req)
	if err != nil {
		return explain(err)
	}
	if len(answer.Results) != len(part) {
		return fmt.Errorf("设备答复了 %d 条，问了 %d 条 (the appliance answered for %d records of %d)", len(answer.Results), len(part), len(answer.Results), len(part))
	}
	for i, r := range answer.Results {
		var err error
		switch r.Result {
		case past.ResultNew, past.ResultImported, past.ResultPresent:
			in.mu.Lock()
			in.counts[r.Result]++
			in.mu.Unlock()
		case past.ResultDiffers:
			var words []string
			for _, d := range r.Differences {
				words = append(words, fmt.Sprintf("%s：已导入的为“%s”，文件中为“%s”", d.Field, d.Have, d.Want))
			}
			err = in.reject(part[i].row, r.Result, r.Result, "此前导入过，内容不同，未改动 (imported before otherwise, not changed)："+strings.Join(words, "；"))
		default:
			why := r.Detail
			if r.Field != "" {
				why = r.Field + "：" + why
			}
			err = in.reject(part[i].row, r.Result, r.Code, why+"；"+r.Next)
		}
		if err != nil {
			return err
		}
	}
	in.bar.add(len(part))
	return nil
}

func (in *historyImport) reject(row historyRow, result, code, why string) error {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.counts[result]++
	return in.aside.add(append([]string{fmt.Sprint(row.line), code, why}, row.raw...))
}

func (in *historyImport) report(records int, took time.Duration, failed error) error {
	if err := in.aside.close(); err != nil {
		return err
	}
	n := 0
	for _, c := range in.counts {
		n += c
	}
	in.counts[past.ResultNotTried] += records - n
	done := in.counts[past.ResultImported]
	rate := float64(done) / max(took.Seconds(), 1e-3)
	if in.asJSON {
		b, err := json.MarshalIndent(map[string]any{
			"file": in.source.File, "records": records, "dry_run": in.trial, "new": in.counts[past.ResultNew], "imported": done, "present": in.counts[past.ResultPresent],
			"differs": in.counts[past.ResultDiffers], "refused": in.counts[past.ResultRefused], "not_tried": in.counts[past.ResultNotTried],
			"seconds": took.Seconds(), "per_second": rate,
		}, "", "  ")
		if err != nil {
			return err
		}
		fmt.Println(string(b))
	} else {
		w := tabwriter.NewWriter(os.Stdout, 2, 8, 2, ' ', 0)
		fmt.Fprintf(w, "读入 records\t%d\n", records)
		if in.trial {
			fmt.Fprintf(w, "可导入 new\t%d\n", in.counts[past.ResultNew])
		} else {
			fmt.Fprintf(w, "新导入 imported\t%d\t用时 %v，每秒 %.1f 条 (a second)\n", done, took.Round(100*time.Millisecond), rate)
		}
		fmt.Fprintf(w, "此前已导入 present\t%d\n内容不同 differs\t%d\n拒绝 refused\t%d\n未完成 not tried\t%d\n", in.counts[past.ResultPresent], in.counts[past.ResultDiffers],
			in.counts[past.ResultRefused], in.counts[past.ResultNotTried])
		if err := w.Flush(); err != nil {
			return err
		}
	}
	switch {
	case failed != nil:
		return fmt.Errorf("%w\n  已中断；重新运行同一命令即接着做 (interrupted: run it again to go on)", failed)
	case in.aside.rows > 0:
		fmt.Fprintf(os.Stderr, "隔离表 (quarantine): %s\n", in.aside.name)
		return errSomeBad
	}
	return nil
}

// A quarantineFile is written as it comes, under another name until it is whole.
type quarantineFile struct {
	name string
	head []string
	rows int

	file *os.File
	w    *csv.Writer
}

func (q *quarantineFile) add(cells []string) (err error) {
	if q.file == nil {
		if q.file, err = os.CreateTemp(filepath.Dir(q.name), "."+filepath.Base(q.name)+"-"); err != nil {
			return err
		}
		if _, err := q.file.WriteString("\xef\xbb\xbf"); err != nil {
			return err
		}
		q.w = csv.NewWriter(q.file)
		if err := q.w.Write(append([]string{"行", "代码", "原因"}, q.head...)); err != nil {
			return err
		}
	}
	q.rows++
	return q.w.Write(inert(cells))
}

// close puts it in its place, or takes an earlier run's away: that says nothing about this one.
func (q *quarantineFile) close() error {
	if q.file == nil {
		if err := os.Remove(q.name); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		return nil
	}
	q.w.Flush()
	if err := errors.Join(q.w.Error(), q.file.Chmod(0o644), q.file.Sync(), q.file.Close()); err != nil {
		return err
	}
	return os.Rename(q.file.Name(), q.name)
}

// drop clears away what was not closed.
func (q *quarantineFile) drop() {
	if q.file != nil {
		_ = q.file.Close()
		_ = os.Remove(q.file.Name()) // gone already after close
	}
}

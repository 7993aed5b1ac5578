package main

import (
	"bytes"
	"context"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance/account"
	"yinjian/appliance/problem"
	"yinjian/hsm"
)

var (
	departmentColumn = column{"department", []string{"科室", "department", "部门", "所在科室"}, true}
	roleColumn       = column{"role", []string{"岗位", "role", "职务", "角色"}, false}
	staffTable       = []column{
		{"id", append(slices.Clone(idColumn.headings), "人员编号", "职工号", "id_number"), true}, {"name", []string{"姓名", "name"}, true}, departmentColumn, roleColumn,
		{"campus", []string{"院区", "campus"}, false}, {"algorithms", []string{"算法", "algorithms", "algorithm"}, false}, {"test", []string{"测试", "test", "测试账号"}, false},
	}
)

// Requests of a bulk enrolment: one has its keys made while another is written.
const (
	staffPerRequest = 32
	staffRequests   = 2
)

// A staffImport is one run of signer import.
type staffImport struct {
	campus, ca, quarantine string
	algorithms             []string
	departments, roles     map[string]bool // nil: any
	trial, digest          bool

	head []string

	mu      sync.Mutex
	counts  map[string]int // guarded by mu, by result
	bad     []badRow       // guarded by mu
	reasons map[string]int // guarded by mu, by code
}

// A badRow goes to quarantine.
type badRow struct {
	row
	code, why string
}

// Results that the command adds to those of [account.Service.EnrolAll].
const codeTable = "table" // what the table alone shows to be wrong

func signerImportCommand() *cobra.Command {
	var f adminFlags
	var in staffImport
	var charset, departments, roles string
	c := &cobra.Command{
		Use:   "import FILE",
		Short: "由 CSV 批量登记签名人，生成密钥与证书 (enrol signers in bulk from a CSV file)",
		Long: `由人事系统导出的 CSV 批量登记签名人：在密码机内生成密钥（配置了托管则为托管密钥），评估 CA 签发证书；--ca external 时密钥待外部 CA 的证书，
之后用 cert csr --csv 批量生成请求。不设 PIN。

首行为标题，列序不限，其他列忽略：
  工号 id            必需，2–32 位字母、数字、连字符
  姓名 name          必需
  科室 department    必需
  院区 campus        缺省取 --campus
  岗位 role          可空
  算法 algorithms    如 "SM2" 或 "SM2 RSA-2048"；缺省取 --algorithms
  测试 test          是／否；测试账号的记录带测试标记，生产应用拒绝
字符集自动识别：UTF-8（有无 BOM）或 GB18030（GBK），并说明是哪一种。至多 20000 行、8 MiB。

先 --dry-run 判断每一行而不写入。不好的行连同原因写进隔离表，其余照常登记；改好后直接导入隔离表即可。已登记且一致的行跳过；与目录不同的行只指出差异，
从不改动目录。登录方式下整张表是一项待批事项（每 10000 行一项）：第二人看到行数、首行、末行与请求的 SM3，用同一文件、同样的参数加 --digest 算出 SM3，相同才批准。
中断（包括断电）后重新运行同一文件即接着做，不会重复登记或重复生成密钥。

Enrols signers from a table. Rows that are wrong go to a quarantine file with the reason; who is enrolled already is never changed.
Run it again with the same file after any interruption. Where administrators log in, a table is one proposal (one for each 10,000
rows): with --digest the second person computes its SM3 of the same file, and compares.`,
		Args: exactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			var err error
			if in.departments, err = loadList(departments, departmentColumn); err != nil {
				return err
			}
			list := roleColumn
			list.required = true
			if in.roles, err = loadList(roles, list); err != nil {
				return err
			}
			if in.quarantine == "" {
				in.quarantine = args[0] + ".quarantine.csv"
			}
			if in.quarantine == args[0] {
				return usageError{errors.New("隔离表不能就是所导入的表 (the quarantine file would replace the table)")}
			}
			if in.digest {
				return in.tellDigest(args[0], charset)
			}
			a, err := f.client()
			if err != nil {
				return err
			}
			defer a.Close()
			return in.run(c.Context(), a, args[0], charset, f.output == "json")
		},
	}
	f.add(c)
	fl := c.Flags()
	fl.BoolVar(&in.trial, "dry-run", false, "只判断，不写入 (judge, and write nothing)")
	fl.BoolVar(&in.digest, "digest", false, "只算出待批事项的 SM3，供第二人核对；不连设备 (compute the SM3 of what is to be approved, and nothing else)")
	c.MarkFlagsMutuallyExclusive("dry-run", "digest")
	fl.StringVar(&in.campus, "campus", "", "表中未写院区者的院区 (campus of rows that name none)")
	fl.StringSliceVar(&in.algorithms, "algorithms", []string{string(hsm.SM2)}, "表中未写算法者的算法 (algorithms of rows that name none)")
	fl.StringVar(&in.ca, "ca", "evaluation", "证书由谁签发：evaluation 或 external (who issues: the evaluation CA, or another)")
	fl.StringVar(&departments, "departments", "", "科室表 CSV，表外的科室拒绝 (table of departments; others are refused)")
	fl.StringVar(&roles, "roles", "", "岗位表 CSV，表外的岗位拒绝 (table of posts; others are refused)")
	fl.StringVar(&charset, "charset", charsetAuto, "字符集：auto、utf-8、gb18030 (character set)")
	fl.StringVar(&in.quarantine, "quarantine", "", "隔离表，缺省为“表格名.quarantine.csv” (table of bad rows)")
	return c
}

// loadList reads the values of one column; "" is no list.
func loadList(name string, c column) (map[string]bool, error) {
	if name == "" {
		return nil, nil
	}
	data, err := readLimited(name, maxTableBytes)
	if err != nil {
		return nil, err
	}
	if data, _, err = toUTF8(data, charsetAuto); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	rows, _, err := readTable(data, []column{c})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	out := map[string]bool{}
	for _, r := range rows {
		out[r.cells[c.name]] = true
	}
	return out, nil
}

// load reads the table, and answers its rows and those among them that can be asked for.
func (in *staffImport) load(name, charset string) (rows []row, good []person, err error) {
	data, err := readLimited(name, maxTableBytes)
	if err != nil {
		return nil, nil, err
	}
	data, charset, err = toUTF8(data, charset)
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", name, err)
	}
	rows, ignored, err := readTable(data, staffTable)
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", name, err)
	}
	if in.head, err = csv.NewReader(bytes.NewReader(data)).Read(); err != nil {
		return nil, nil, err // readTable has read it
	}
	fmt.Fprintf(os.Stderr, "字符集 (character set): %s；%d 行，第一行 (first row): %s %s %s\n", charset, len(rows), rows[0].cells["id"], rows[0].cells["name"], rows[0].cells["department"])
	if len(ignored) > 0 {
		fmt.Fprintf(os.Stderr, "忽略的列 (columns ignored): %s\n", strings.Join(ignored, "、"))
	}
	in.counts, in.reasons = map[string]int{}, map[string]int{}
	return rows, in.sift(rows), nil
}

// tellDigest says which proposals the table makes.
func (in *staffImport) tellDigest(name, charset string) error {
	_, good, err := in.load(name, charset)
	if err != nil {
		return err
	}
	for part := range slices.Chunk(good, account.MaxImport) {
		body, err := json.Marshal(in.request(part))
		if err != nil {
			return err
		}
		fmt.Printf("%s  %d 行 (rows)  %s … %s\n", wire.RequestSM3("POST", "/admin/v1/signers/import", body), len(part), part[0].asked.ID, part[len(part)-1].asked.ID)
	}
	return nil
}

func (in *staffImport) run(ctx context.Context, a *client.Admin, name, charset string, asJSON bool) error {
	rows, good, err := in.load(name, charset)
	if err != nil {
		return err
	}
	bar := newProgress(len(good))
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(staffRequests)
	most := staffPerRequest
	if a.LoggedIn() && !in.trial {
		most = account.MaxImport // one approval
	}
	for part := range slices.Chunk(good, most) {
		if gctx.Err() != nil {
			break
		}
		g.Go(func() error {
			if err := in.send(gctx, a, part); err != nil {
				return err
			}
			bar.add(len(part))
			return nil
		})
	}
	failed := g.Wait()
	took := bar.end()
	return in.report(len(rows), took, asJSON, errors.Join(failed, ctx.Err()))
}

// A person is a row that the table alone gives no reason to refuse.
type person struct {
	row
	asked wire.ImportSigner
}

// sift puts aside what can be judged without the directory. Of rows with one number that say the same the first is taken;
// of those that do not, none, for nobody knows which is right.
func (in *staffImport) sift(rows []row) (good []person) {
	byID := map[string][]person{}
	var order []string
	for _, r := range rows {
		p, why := in.read(r)
		if why != "" {
			in.reject(r, account.EnrolRefused, codeTable, why)
			continue
		}
		id := strings.ToUpper(p.asked.ID)
		if byID[id] == nil {
			order = append(order, id)
		}
		byID[id] = append(byID[id], p)
	}
	for _, id := range order {
		same := byID[id]
		differ := slices.ContainsFunc(same, func(p person) bool { return !slices.Equal(p.words(), same[0].words()) })
		for i, p := range same {
			switch {
			case differ:
				in.reject(p.row, account.EnrolRefused, codeTable, fmt.Sprintf("工号与第 %d 行重复而内容不同 (another row has this number and says something else)", same[map[bool]int{true: 1, false: 0}[i == 0]].line))
			case i > 0:
				in.reject(p.row, account.EnrolRefused, codeTable, fmt.Sprintf("与第 %d 行重复 (repeats an earlier row)", same[0].line))
			default:
				good = append(good, p)
			}
		}
	}
	return good
}

func (p person) words() []string {
	a := p.asked
	return append([]string{a.ID, a.Name, a.Department, a.Campus, a.Role, fmt.Sprint(a.Test)}, a.Algorithms...)
}

// read makes a request of a row, or says what is wrong with it.
func (in *staffImport) read(r row) (p person, why string) {
	p = person{row: r, asked: wire.ImportSigner{
		ID: r.cells["id"], Name: r.cells["name"], Department: r.cells["department"], Campus: r.cells["campus"], Role: r.cells["role"],
	}}
	if p.asked.Campus == "" {
		p.asked.Campus = in.campus
	}
	if p.asked.Algorithms = strings.FieldsFunc(r.cells["algorithms"], func(c rune) bool { return strings.ContainsRune(" +,;、/|", c) }); len(p.asked.Algorithms) == 0 {
		p.asked.Algorithms = in.algorithms
	}
	for _, c := range staffTable { // no request may hold such text
		var bad *problem.Problem
		if v := r.cells[c.name]; v != "" && errors.As(problem.CheckText(c.name, v, maxCellBytes), &bad) {
			return p, c.headings[0] + "：" + bad.Detail
		}
	}
	switch strings.ToLower(r.cells["test"]) {
	case "", "否", "0", "false", "no", "n":
	case "是", "1", "true", "yes", "y":
		p.asked.Test = true
	default:
		return p, "“测试”须为 是 或 否 (test: yes or no)"
	}
	switch {
	case len(r.raw) > len(in.head):
		return p, fmt.Sprintf("有 %d 格，标题只有 %d 列：可能有未加引号的逗号 (more cells than headings: a comma without quotes?)", len(r.raw), len(in.head))
	case in.departments != nil && !in.departments[p.asked.Department]:
		return p, fmt.Sprintf("科室表中没有“%s”(unknown department)", p.asked.Department)
	case in.roles != nil && p.asked.Role != "" && !in.roles[p.asked.Role]:
		return p, fmt.Sprintf("岗位表中没有“%s”(unknown post)", p.asked.Role)
	}
	return p, ""
}

func (in *staffImport) reject(r row, result, code, why string) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.counts[result]++
	in.reasons[code]++
	in.bad = append(in.bad, badRow{r, code, why})
}

func (in *staffImport) request(part []person) wire.ImportSigners {
	req := wire.ImportSigners{CA: in.ca, Trial: in.trial}
	for _, p := range part {
		req.Signers = append(req.Signers, p.asked)
	}
	return req
}

// send has one part enrolled, or judged.
func (in *staffImport) send(ctx context.Context, a *client.Admin, part []person) error {
	answer, err := a.ImportSigners(ctx, in.request(part))
	if err != nil {
		return explain(err)
	}
	if len(answer.Results) != len(part) {
		return fmt.Errorf("设备答复了 %d 行，问了 %d 行 (the appliance answered for %d rows of %d)", len(answer.Results), len(part), len(answer.Results), len(part))
	}
	for i, r := range answer.Results {
		switch r.Result {
		case account.EnrolNew, account.EnrolDone, account.EnrolPresent:
			in.mu.Lock()
			in.counts[r.Result]++
			in.mu.Unlock()
		case account.EnrolDiffers:
			var words []string
			for _, d := range r.Differences {
				words = append(words, fmt.Sprintf("%s：目录为“%s”，表中为“%s”", label(d.Field), d.Have, d.Want))
			}
			in.reject(part[i].row, r.Result, r.Result, "已登记，与目录不同，未改动 (enrolled otherwise, not changed)："+strings.Join(words, "；"))
		default:
			why := r.Detail
			if r.Field != "" {
				why = label(r.Field) + "：" + why
			}
			in.reject(part[i].row, r.Result, r.Code, why+"；"+r.Next)
		}
	}
	return nil
}

// report writes the quarantine file and the summary.
func (in *staffImport) report(rows int, took time.Duration, asJSON bool, failed error) error {
	n := 0
	for _, c := range in.counts {
		n += c
	}
	slices.SortFunc(in.bad, func(a, b badRow) int { return a.line - b.line })
	if _, err := os.Stat(in.quarantine); err == nil || len(in.bad) > 0 { // an earlier run's says nothing about this one
		lines := [][]string{append([]string{"行", "代码", "原因"}, in.head...)}
		for _, b := range in.bad {
			lines = append(lines, append([]string{fmt.Sprint(b.line), b.code, b.why}, b.raw...))
		}
		if err := writeTable(in.quarantine, lines); err != nil {
			return err
		}
	}
	done := in.counts[account.EnrolDone]
	rate := float64(done) / max(took.Seconds(), 1e-3)
	if asJSON {
		b, err := json.MarshalIndent(map[string]any{
			"rows": rows, "dry_run": in.trial, "new": in.counts[account.EnrolNew], "enrolled": done, "present": in.counts[account.EnrolPresent],
			"differs": in.counts[account.EnrolDiffers], "refused": in.counts[account.EnrolRefused], "not_tried": in.counts[account.EnrolNotTried] + rows - n,
			"reasons": in.reasons, "seconds": took.Seconds(), "per_second": rate,
		}, "", "  ")
		if err != nil {
			return err
		}
		fmt.Println(string(b))
	} else {
		w := tabwriter.NewWriter(os.Stdout, 2, 8, 2, ' ', 0)
		fmt.Fprintf(w, "读入 rows\t%d\n", rows)
		if in.trial {
			fmt.Fprintf(w, "可登记 new\t%d\n", in.counts[account.EnrolNew])
		} else {
			fmt.Fprintf(w, "新登记 enrolled\t%d\t用时 %v，每秒 %.1f 人 (a second)\n", done, took.Round(100*time.Millisecond), rate)
		}
		fmt.Fprintf(w, "已登记且一致 present\t%d\n与目录不同 differs\t%d\n拒绝 refused\t%d\n未完成 not tried\t%d\n", in.counts[account.EnrolPresent], in.counts[account.EnrolDiffers],
			in.counts[account.EnrolRefused], in.counts[account.EnrolNotTried]+rows-n)
		if err := w.Flush(); err != nil {
			return err
		}
	}
	if len(in.bad) > 0 {
		fmt.Fprintf(os.Stderr, "隔离表 (quarantine): %s\n", in.quarantine)
	}
	switch {
	case failed != nil:
		return fmt.Errorf("%w\n  已中断；重新运行同一命令即接着做 (interrupted: run it again to go on)", failed)
	case len(in.bad) > 0:
		return fmt.Errorf("%d 行未登记，见隔离表；改正后导入隔离表即可 (%d rows were put aside: correct them and import that file)", len(in.bad), len(in.bad))
	}
	return nil
}

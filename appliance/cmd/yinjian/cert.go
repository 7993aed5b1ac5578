package main

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance/account"
	"yinjian/appliance/pki"
	"yinjian/hsm"
)

func certificateCommand() *cobra.Command {
	c := group(&cobra.Command{Use: "cert", Short: "证书：申请、导入、列出、信任锚、吊销列表 (certificates)"})
	c.AddCommand(requestCommand(), importCommand(), listCertificatesCommand(), anchorCommand(), chainCommand(), foreignCRLCommand(), revokeCommand())
	return c
}

func revokeCommand() *cobra.Command {
	var reason string
	return adminCommand("revoke SERIAL", "吊销评估 CA 签发的签名人证书并发布新的吊销列表 (revoke a signer's evaluation certificate and publish a CRL)", 1,
		func(c *cobra.Command) {
			c.Flags().StringVar(&reason, "reason", "unspecified", "keyCompromise、superseded …")
		},
		func(ctx context.Context, a *client.Admin, args []string) (json.RawMessage, error) {
			return a.RevokeCertificate(ctx, wire.RevokeCertificate{Serial: strings.ToLower(args[0]), Reason: reason})
		})
}

var (
	idColumn      = column{"id", []string{"工号", "id", "staff_number", "员工号"}, true}
	requestTable  = []column{idColumn, {"algorithm", []string{"算法", "algorithm"}, false}, {"name", []string{"姓名", "name"}, false}, {"department", []string{"科室", "department", "部门"}, false}, {"campus", []string{"院区", "campus"}, false}, {"subject", []string{"主题", "subject"}, false}}
	importTable   = []column{{"file", []string{"证书", "file", "certificate", "文件"}, true}, {"id", idColumn.headings, false}, {"chain", []string{"证书链", "chain"}, false}}
	resultHeading = []string{"行", "工号", "算法", "文件", "结果", "说明"}
)

// A tally counts a bulk command's rows, says each on a line, and keeps them for the result table.
type tally struct {
	total, done, failed int
	lines               [][]string
}

func newTally(total int) *tally { return &tally{total: total, lines: [][]string{resultHeading}} }

// add tells the outcome of one row. what is for people and for the table.
func (t *tally) add(line int, id, algorithm, file, what string, err error) {
	t.done++
	result := "成功"
	if err != nil {
		t.failed++
		result, what = "失败", strings.ReplaceAll(explain(err).Error(), "\n", " ")
	}
	fmt.Printf("%d/%d %s %s %s：%s\n", t.done, t.total, id, algorithm, result, what)
	t.lines = append(t.lines, []string{fmt.Sprint(line), id, algorithm, file, result, what})
}

// end writes the table and answers whether all rows went well.
func (t *tally) end(ctx context.Context, name string) error {
	if err := writeTable(name, t.lines); err != nil {
		return err
	}
	fmt.Printf("共 %d 行，成功 %d，失败 %d；结果 (results): %s\n", t.total, t.done-t.failed, t.failed, name)
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("已中断，完成 %d/%d 行；重新运行即可接着做 (interrupted; run it again to go on)", t.done, t.total)
	case t.failed > 0:
		return fmt.Errorf("%d 行失败，见结果表；改正后重新运行，已完成的行不受影响 (rows failed: correct them and run again)", t.failed)
	}
	return nil
}

func requestCommand() *cobra.Command {
	var f adminFlags
	var req wire.RequestCertificate
	var table, out, file string
	var enrol bool
	c := &cobra.Command{
		Use:   "csr (--for KEY [-o FILE] | --csv FILE --out DIR)",
		Short: "生成证书请求 PKCS#10，由密码机签名 (certificate requests, signed in the cipher machine)",
		Long: `为本机密钥生成证书请求（PKCS#10，PEM），由密码机签名，私钥不出密码机。证书未导入前再次执行，得到同一请求。
--for 的写法：signer:工号（SM2）、signer:工号/RSA-2048、tsa:单元、log、tls。
--new-key 在同一槽位另生成一对密钥换新；旧密钥继续使用，直到新证书导入并生效。

批量：--csv 人员表，每行一个请求，写到 --out 目录的“工号-算法.csr”，结果写到 result.csv；可中断，重新运行即接着做，
一行出错不影响其他行，最后退出码为 1。
表格须为 UTF-8（有无 BOM 均可），首行为标题，列序不限：
  工号 id            必需
  算法 algorithm     SM2（缺省）或 RSA-2048
  主题 subject       如 "CN=张三,O=某医院,C=CN"；缺省取登记的姓名、科室、工号
  姓名 name、科室 department、院区 campus   仅 --enrol 时用：登记尚不存在的签名人（外部 CA）；要 SM2 与 RSA-2048 两种，
                     同一工号写两行；已登记的人用 signer add-key
至多 20000 行、8 MiB。

Requests for keys of this appliance; the private keys stay in the cipher machine.`,
		Args: exactArgs(0),
		RunE: func(c *cobra.Command, _ []string) error {
			f.output = "text"
			switch {
			case (table == "") == (req.For == ""):
				return usageError{errors.New("--for 与 --csv 须给出其一 (give --for or --csv)")}
			case table != "" && out == "":
				return usageError{errors.New("--csv 需要 --out 目录 (--csv needs --out DIR)")}
			case table != "" && (req.Subject != "" || len(req.Hosts) > 0 || file != "-"):
				return usageError{errors.New("--subject、--host、-o 不能与 --csv 同用 (not with --csv)")}
			case table == "" && (enrol || out != ""):
				return usageError{errors.New("--enrol、--out 只用于 --csv (with --csv only)")}
			}
			a, err := f.client()
			if err != nil {
				return err
			}
			defer a.Close()
			if table != "" {
				return requestAll(c.Context(), a, table, out, enrol, req)
			}
			r, err := a.RequestCertificate(c.Context(), req)
			if err != nil {
				return explain(err)
			}
			b := requestPEM(r.CSR)
			if file == "-" {
				_, err = os.Stdout.Write(b)
				return err
			}
			if err := replaceFile(file, b); err != nil {
				return err
			}
			fmt.Printf("证书请求 (request): %s\n主题 (subject): %s\n下一步 (next): 交 CA 签发，再 yinjian cert import\n", file, r.Subject)
			return nil
		},
	}
	fl := c.Flags()
	fl.StringVar(&f.dir, "dir", "", "设备目录 (the appliance's folder)")
	_ = c.MarkFlagRequired("dir")
	fl.StringVar(&req.For, "for", "", "密钥：signer:工号[/算法]、tsa:单元、log、tls (the key)")
	fl.BoolVar(&req.NewKey, "new-key", false, "另生成一对密钥换新 (another key pair, for roll-over)")
	fl.BoolVar(&req.Replace, "replace", false, "作废待批的请求，重新生成 (replace a request that waits)")
	fl.StringVar(&req.Subject, "subject", "", "主题，如 CN=…,O=…,C=CN (subject)")
	fl.StringArrayVar(&req.Hosts, "host", nil, "tls：主机名或地址，可重复 (tls: DNS name or address, repeatable)")
	fl.StringVarP(&file, "output", "o", "-", "写到文件，- 为标准输出 (file, - for standard output)")
	fl.StringVar(&table, "csv", "", "人员表 (table of staff)")
	fl.StringVar(&out, "out", "", "批量输出目录 (folder for the requests of --csv)")
	fl.BoolVar(&enrol, "enrol", false, "表中尚未登记的签名人先登记 (enrol those of the table that are not there yet)")
	return c
}

func requestPEM(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
}

var staffNumber = regexp.MustCompile("^[A-Za-z0-9-]{2,32}$")

// requestAll makes a request for each row. A signer who is enrolled on the way gets a key for each algorithm that the table
// asks for him, or the second row would find him enrolled with one.
func requestAll(ctx context.Context, a *client.Admin, table, out string, enrol bool, like wire.RequestCertificate) error {
	rows, err := loadTable(table, requestTable)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(out, 0o755); err != nil {
		return err
	}
	algorithms := map[string][]string{} // by staff number
	for _, r := range rows {
		if r.cells["algorithm"] == "" {
			r.cells["algorithm"] = string(hsm.SM2)
		}
		id, algorithm := r.cells["id"], r.cells["algorithm"]
		if !slices.Contains(algorithms[id], algorithm) && (algorithm == string(hsm.SM2) || algorithm == string(hsm.RSA2048)) {
			algorithms[id] = append(algorithms[id], algorithm)
		}
	}
	t := newTally(len(rows))
	seen := map[string]bool{}
	for _, r := range rows {
		if ctx.Err() != nil {
			break
		}
		id, algorithm := r.cells["id"], r.cells["algorithm"]
		file, err := func() (string, error) {
			if seen[id+"/"+algorithm] {
				return "", errors.New("与前面的行重复 (repeats an earlier row)")
			}
			seen[id+"/"+algorithm] = true
			// Whoever filled in the table is told of its columns, not of the interface's fields.
			switch {
			case !staffNumber.MatchString(id):
				return "", errors.New("工号须为 2–32 个字母、数字、连字符 (a staff number is 2 to 32 letters, digits and hyphens)")
			case !slices.Contains(algorithms[id], algorithm):
				return "", errors.New("算法须为 SM2 或 RSA-2048 (the algorithm is SM2 or RSA-2048)")
			}
			req := like
			req.For, req.Subject = "signer:"+id+"/"+algorithm, r.cells["subject"]
			answer, err := a.RequestCertificate(ctx, req)
			if enrol && client.Is(err, "signer_unknown") {
				_, err = a.EnrolSigner(ctx, wire.EnrolSigner{
					ID: id, Name: r.cells["name"], Department: r.cells["department"], Campus: r.cells["campus"], Algorithms: algorithms[id], CA: "external",
				})
				if err != nil {
					return "", err
				}
				answer, err = a.RequestCertificate(ctx, req)
			}
			if err != nil {
				return "", err
			}
			name := filepath.Join(out, id+"-"+algorithm+".csr") // the appliance took id and algorithm: no path in them
			return name, replaceFile(name, requestPEM(answer.CSR))
		}()
		t.add(r.line, id, algorithm, file, file, err)
	}
	return t.end(ctx, filepath.Join(out, "result.csv"))
}

func importCommand() *cobra.Command {
	var f adminFlags
	var chain []string
	var table, result string
	var accept bool
	c := &cobra.Command{
		Use:   "import (FILE… | --csv FILE)",
		Short: "导入 CA 签发的证书 (import certificates that a CA issued)",
		Long: `导入 CA 签发的证书：PEM、DER、不含签名者的 PKCS#7（.p7b），或无头尾的 base64。按公钥找到本机密钥；须能连到为该用途接受的
信任锚；用途、有效期、主题、强度、吊销逐项检查。尚未生效的证书先收下，到时自动启用。双证书只导入签名证书，加密证书会被拒绝或跳过。

批量：--csv 表格（UTF-8，首行标题）：
  证书 file          必需，相对于表格所在目录
  工号 id            可选，核对证书属于该签名人的密钥
  证书链 chain       可选，中间证书文件
结果写到 --result，缺省为“表格名.result.csv”。

Imports certificates for keys of this appliance: PEM, DER, PKCS#7 with certificates only, or plain base64.`,
		RunE: func(c *cobra.Command, args []string) error {
			f.output = "text"
			if (table == "") == (len(args) == 0) {
				return usageError{errors.New("给出证书文件，或 --csv，二者取一 (give files or --csv)")}
			}
			a, err := f.client()
			if err != nil {
				return err
			}
			defer a.Close()
			req := wire.ImportCertificates{AcceptSubject: accept}
			for _, name := range chain {
				b, err := readLimited(name, pki.MaxBundleSize)
				if err != nil {
					return err
				}
				req.Chain = append(req.Chain, b)
			}
			if table == "" {
				return importFiles(c.Context(), a, args, req)
			}
			if result == "" {
				result = table + ".result.csv"
			}
			return importAll(c.Context(), a, table, result, req)
		},
	}
	fl := c.Flags()
	fl.StringVar(&f.dir, "dir", "", "设备目录 (the appliance's folder)")
	_ = c.MarkFlagRequired("dir")
	fl.StringArrayVar(&chain, "chain", nil, "中间 CA 证书文件，可重复 (file of intermediates, repeatable)")
	fl.BoolVar(&accept, "accept-subject", false, "主题与签名人不符也接受，记入日志 (take a subject that does not name the signer; the journal says so)")
	fl.StringVar(&table, "csv", "", "证书表 (table of certificate files)")
	fl.StringVar(&result, "result", "", "批量结果表 (table of results)")
	return c
}

// importOne answers what was imported, in words.
func importOne(ctx context.Context, a *client.Admin, name string, req wire.ImportCertificates) (string, string, error) {
	var err error
	if req.File, err = readLimited(name, pki.MaxBundleSize); err != nil {
		return "", "", err
	}
	answer, err := a.ImportCertificates(ctx, req)
	if err != nil {
		return "", "", err
	}
	var done []account.Imported
	if err := json.Unmarshal(answer, &done); err != nil {
		return "", "", err
	}
	var words []string
	algorithm := ""
	for _, d := range done {
		algorithm = d.Algorithm
		said := fmt.Sprintf("%s %s 序列号 %s，%s", d.Owner, d.Algorithm, d.Serial, stateWords[d.State])
		if d.NotAfter != nil {
			said += "，至 " + d.NotAfter.Format(time.DateOnly)
		}
		if d.State == account.StateUnusable && d.Revocation != "" {
			said += "，原因 (because) " + d.Revocation
		}
		if d.Already {
			said += "（此前已导入 already there）"
		}
		words = append(words, said)
	}
	return algorithm, strings.Join(words, "；"), nil
}

func importFiles(ctx context.Context, a *client.Admin, names []string, req wire.ImportCertificates) error {
	failed := 0
	for _, name := range names {
		_, words, err := importOne(ctx, a, name, req)
		if err != nil {
			failed++
			fmt.Fprintf(os.Stderr, "%s: %v\n", name, explain(err))
			continue
		}
		fmt.Printf("%s: %s\n", name, words)
	}
	if failed > 0 {
		return fmt.Errorf("%d 个文件未导入 (%d of %d files were not imported)", failed, failed, len(names))
	}
	return nil
}

func importAll(ctx context.Context, a *client.Admin, table, result string, like wire.ImportCertificates) error {
	rows, err := loadTable(table, importTable)
	if err != nil {
		return err
	}
	at := func(name string) string {
		if filepath.IsAbs(name) {
			return name
		}
		return filepath.Join(filepath.Dir(table), name)
	}
	t := newTally(len(rows))
	for _, r := range rows {
		if ctx.Err() != nil {
			break
		}
		req := like
		if id := r.cells["id"]; id != "" {
			req.Owner = "signer:" + id
		}
		algorithm, words := "", ""
		err := func() error {
			if name := r.cells["chain"]; name != "" {
				b, err := readLimited(at(name), pki.MaxBundleSize)
				if err != nil {
					return err
				}
				req.Chain = append(req.Chain[:len(req.Chain):len(req.Chain)], b)
			}
			var err error
			algorithm, words, err = importOne(ctx, a, at(r.cells["file"]), req)
			return err
		}()
		t.add(r.line, r.cells["id"], algorithm, r.cells["file"], words, err)
	}
	return t.end(ctx, result)
}

var stateWords = map[string]string{
	account.StateActive: "在用 active", account.StateNext: "未生效 next", account.StateSuperseded: "已被接替 superseded",
	account.StateExpired: "已过期 expired", account.StateRevoked: "已吊销 revoked", account.StateUnusable: "不可用 unusable",
	account.StatePending: "待签发 pending", account.StateAwaited: "待申请 awaited",
}

// tabular is an admin command whose text form is a table.
func tabular(use, short string, ask func(ctx context.Context, a *client.Admin) (json.RawMessage, error), print func(w *tabwriter.Writer, answer json.RawMessage) error) *cobra.Command {
	var f adminFlags
	c := &cobra.Command{Use: use, Short: short, Args: exactArgs(0), RunE: func(c *cobra.Command, _ []string) error {
		a, err := f.client()
		if err != nil {
			return err
		}
		defer a.Close()
		answer, err := ask(c.Context(), a)
		if err != nil {
			return explain(err)
		}
		if f.output == "json" {
			return f.show(answer)
		}
		w := tabwriter.NewWriter(os.Stdout, 2, 8, 2, ' ', 0)
		return errors.Join(print(w, answer), w.Flush())
	}}
	f.add(c)
	return c
}

func listCertificatesCommand() *cobra.Command {
	return tabular("list", "列出全部密钥的证书与到期天数 (certificates of all keys)",
		func(ctx context.Context, a *client.Admin) (json.RawMessage, error) { return a.ListCertificates(ctx) },
		func(w *tabwriter.Writer, answer json.RawMessage) error {
			var lines []account.CertificateLine
			if err := json.Unmarshal(answer, &lines); err != nil {
				return err
			}
			fmt.Fprintln(w, "密钥 owner\t姓名 name\t算法\t状态 state\t起 from\t止 to\t剩余天 days\t序列号 serial\t颁发者 issuer\t吊销 revocation")
			for _, l := range lines {
				from, to, days := "", "", ""
				if l.NotAfter != nil {
					from, to, days = l.NotBefore.Format(time.DateOnly), l.NotAfter.Format(time.DateOnly), fmt.Sprint(l.DaysLeft)
				}
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", l.Owner, l.Name, l.Algorithm, stateWords[l.State], from, to, days, l.Serial, l.Issuer, l.Revocation)
			}
			return nil
		})
}

func anchorCommand() *cobra.Command {
	c := group(&cobra.Command{Use: "anchor", Short: "信任锚：接受、撤回、列出 CA 根证书 (trust anchors)"})
	var req wire.AddAnchor
	var reason string
	c.AddCommand(
		adminCommand("add FILE", "接受一个 CA 根证书，指明可担保的用途 (admit a CA's root certificate for uses)", 1, func(c *cobra.Command) {
			c.Flags().StringSliceVar(&req.Uses, "use", nil, "用途：staff、tsa、log、tls、client（应用的客户端证书），可多个；必填 (uses)")
			_ = c.MarkFlagRequired("use")
			c.Flags().StringVar(&req.Note, "note", "", "说明，记入日志 (a note, for the journal)")
		}, func(ctx context.Context, a *client.Admin, args []string) (json.RawMessage, error) {
			var err error
			if req.Certificate, err = readLimited(args[0], pki.MaxBundleSize); err != nil {
				return nil, err
			}
			return a.AddAnchor(ctx, req)
		}),
		adminCommand("list", "列出信任锚 (list)", 0, nil, func(ctx context.Context, a *client.Admin, _ []string) (json.RawMessage, error) {
			return a.ListAnchors(ctx)
		}),
		adminCommand("withdraw ID", "不再信任某个根证书 (trust it no more)", 1, func(c *cobra.Command) { required(c, &reason, "reason", "原因，记入日志 (why, for the journal)") },
			func(ctx context.Context, a *client.Admin, args []string) (json.RawMessage, error) {
				return a.WithdrawAnchor(ctx, wire.Decision{ID: args[0], Reason: reason})
			}),
	)
	return c
}

func chainCommand() *cobra.Command {
	c := group(&cobra.Command{Use: "chain", Short: "中间 CA 证书 (intermediates)"})
	c.AddCommand(adminCommand("add FILE", "导入中间 CA 证书，须能连到信任锚 (import CA certificates that lead to an anchor)", 1, nil,
		func(ctx context.Context, a *client.Admin, args []string) (json.RawMessage, error) {
			b, err := readLimited(args[0], pki.MaxBundleSize)
			if err != nil {
				return nil, err
			}
			return a.AddIntermediates(ctx, wire.AddIntermediates{File: b})
		}))
	return c
}

func foreignCRLCommand() *cobra.Command {
	c := group(&cobra.Command{Use: "crl", Short: "外部 CA 的吊销列表：导入、获取、列出 (other CAs' revocation lists)"})
	var f adminFlags
	load := &cobra.Command{
		Use: "import FILE…", Short: "导入吊销列表，DER 或 PEM (import lists)",
		RunE: func(c *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usageError{errors.New("需要至少一个文件 (at least one file)")}
			}
			f.output = "text"
			a, err := f.client()
			if err != nil {
				return err
			}
			defer a.Close()
			failed := 0
			for _, name := range args {
				b, err := readLimited(name, account.MaxForeignCRL)
				if err == nil {
					var answer json.RawMessage
					answer, err = a.ImportCRL(c.Context(), wire.ImportCRL{File: b, Source: "file " + filepath.Base(name)})
					var said struct {
						New  bool
						List account.CRLLine
					}
					if err == nil {
						err = json.Unmarshal(answer, &said)
					}
					if err == nil {
						fmt.Printf("%s: %s，%s，编号 %s，吊销 %d 张，下次更新 %s\n", name, map[bool]string{true: "已接受 taken", false: "此前已有 there already"}[said.New],
							said.List.Issuer, said.List.Number, said.List.Revoked, said.List.NextUpdate.Format(time.RFC3339))
					}
				}
				if err != nil {
					failed++
					fmt.Fprintf(os.Stderr, "%s: %v\n", name, explain(err))
				}
			}
			if failed > 0 {
				return fmt.Errorf("%d 个列表未接受 (%d lists were not taken)", failed, failed)
			}
			return nil
		},
	}
	load.Flags().StringVar(&f.dir, "dir", "", "设备目录 (the appliance's folder)")
	_ = load.MarkFlagRequired("dir")
	c.AddCommand(load,
		tabular("list", "列出吊销列表及获取情况 (lists and their sources)",
			func(ctx context.Context, a *client.Admin) (json.RawMessage, error) { return a.ListCRLs(ctx) },
			func(w *tabwriter.Writer, answer json.RawMessage) error {
				var said struct {
					Lists   []account.CRLLine
					Sources []struct {
						URL, At, Error string
					}
				}
				if err := json.Unmarshal(answer, &said); err != nil {
					return err
				}
				fmt.Fprintln(w, "颁发者 issuer\t编号 number\t状态 state\t签发 this update\t下次更新 next update\t吊销 revoked\t来源 source")
				for _, l := range said.Lists {
					fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%d\t%s\n", l.Issuer, l.Number, l.State, l.ThisUpdate.Format(time.RFC3339), l.NextUpdate.Format(time.RFC3339), l.Revoked, l.Source)
				}
				for _, s := range said.Sources {
					fmt.Fprintf(w, "获取 source %s\t%s\t%s\n", s.URL, s.At, s.Error)
				}
				return nil
			}),
		fetchCommand(),
	)
	return c
}

// fetchCommand fails when one of the addresses did.
func fetchCommand() *cobra.Command {
	return adminCommand("fetch", "立即从配置的地址获取吊销列表 (fetch the lists of all configured addresses now)", 0, nil,
		func(ctx context.Context, a *client.Admin, _ []string) (json.RawMessage, error) {
			answer, err := a.FetchCRLs(ctx)
			if err != nil {
				return nil, err
			}
			var each []struct{ URL, Error string }
			if err := json.Unmarshal(answer, &each); err != nil {
				return nil, err
			}
			var failed []error
			for _, f := range each {
				if f.Error != "" {
					failed = append(failed, fmt.Errorf("%s: %s", f.URL, f.Error))
				}
			}
			return answer, errors.Join(failed...)
		})
}

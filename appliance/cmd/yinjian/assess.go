package main

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/pelletier/go-toml/v2"
	"github.com/spf13/cobra"

	"yinjian/api/wire"
	"yinjian/appliance"
	"yinjian/appliance/assess"
	"yinjian/appliance/assess/page"
	"yinjian/appliance/assess/trial"
	"yinjian/appliance/evidence"
	"yinjian/appliance/evidence/show"
	"yinjian/appliance/pki"
)

func assessCommand() *cobra.Command {
	var f adminFlags
	var req wire.Assess
	var certificates, out string
	c := &cobra.Command{
		Use: "assess", Short: "密评证据包：十二节的自评报告，签名并盖时间戳 (the evaluator's pack)", Args: exactArgs(0),
		Long: `为密码应用安全性评估（密评）制作证据包：现场自测、读取并演练，对照 41 项指标自评，缺口在前。
报告的 SM3 记入日志，由日志密钥签署的检查点、包含证明与时间戳证明；yinjian-verify 离线核验。见 docs/assess.md。

Makes the evaluator's pack on the running appliance: what can be shown is tried now, the rest stands there as not evidenced.`,
		RunE: func(c *cobra.Command, _ []string) error {
			if err := assess.CheckNonceForm(req.Nonce); err != nil {
				return usageError{fmt.Errorf("--nonce: %w", err)}
			}
			if out == "" {
				out = "assess-" + req.Nonce
			}
			var err error
			if req.Products, err = readProducts(certificates); err != nil {
				return err
			}
			// The files come first: a pack that cannot be written down would have been made for nothing.
			file, err := os.OpenFile(out+".json", os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
			if err != nil {
				return err
			}
			defer file.Close()
			a, err := f.client()
			if err == nil {
				defer a.Close()
				var made *wire.Assessed
				if made, err = a.Assess(c.Context(), req); err == nil {
					if _, err = file.Write(made.Pack); err == nil {
						err = file.Sync()
					}
					if err == nil {
						return presentPack(os.Stdout, made.Pack, out)
					}
				}
			}
			return errors.Join(explain(err), os.Remove(file.Name()))
		},
	}
	f.add(c)
	required(c, &req.Nonce, "nonce", "测评方给出的随机数，8–128 个字母、数字、. _ - (the assessor's nonce)")
	required(c, &req.Assessor, "assessor", "测评人或机构，记入日志 (who assesses)")
	c.Flags().BoolVar(&req.Full, "full", false, "随机数用上电检测（20 组 10^6 比特，15 种），日志不论多长全部重读；须数分钟 (the power-on set, and all of the journal)")
	c.Flags().StringVar(&certificates, "certificates", "", "商用密码产品认证证书的 TOML 文件 (certified products, TOML)")
	c.Flags().StringVar(&out, "out", "", "写入 OUT.json 与 OUT.html，缺省 assess-<随机数> (writes OUT.json and OUT.html)")
	c.AddCommand(assessVerifyCommand(), assessPageCommand(), assessNonceCommand())
	return c
}

// presentPack writes the page beside the pack, and says in a few lines what came of it.
func presentPack(w io.Writer, data []byte, out string) error {
	p, r, err := assess.Parse(data)
	if err != nil {
		return err
	}
	if err := writePage(out+".html", p, r); err != nil {
		return err
	}
	fmt.Fprintf(w, "证据包 (pack): %s.json\n网页 (page): %s.html\n", out, out)
	if r.Header.Mode == assess.ModeSoft {
		fmt.Fprintln(w, "红色：软件密码机 soft，仅供评估 (RED: the software cipher machine, evaluation only)")
	}
	fmt.Fprintf(w, "共 %d 项：已证明 %d，未通过 %d，未取得证据 %d (shown, failed, not evidenced)\n", len(r.Items), r.Count(assess.Shown), r.Count(assess.Failed), r.Count(assess.NotEvidenced))
	for _, it := range r.Items {
		if it.Status != assess.Shown {
			fmt.Fprintf(w, "  %s %s：%s\n", map[assess.Status]string{assess.Failed: "✗", assess.NotEvidenced: "–"}[it.Status], it.ID, show.Plain(it.Why))
		}
	}
	fmt.Fprintf(w, "自评分 %.2f／100，不是测评结论 (self-assessment)\n", r.Score.Total)
	return nil
}

func writePage(name string, p *assess.Pack, r *assess.Report) error {
	var b bytes.Buffer
	if err := page.Render(&b, p, r); err != nil {
		return err
	}
	return os.WriteFile(name, b.Bytes(), 0o600)
}

// readProducts reads the operator's file of certified products; "" is none.
func readProducts(name string) ([]assess.Product, error) {
	if name == "" {
		return []assess.Product{}, nil
	}
	b, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	var file struct {
		Products []assess.Product `toml:"products"`
	}
	if err := toml.NewDecoder(bytes.NewReader(b)).DisallowUnknownFields().Decode(&file); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return file.Products, nil
}

func assessPageCommand() *cobra.Command {
	return &cobra.Command{
		Use: "page PACK.json PAGE.html", Short: "由证据包生成网页 (render the page)", Args: exactArgs(2),
		RunE: func(_ *cobra.Command, args []string) error {
			data, err := show.ReadFile(args[0], os.Stdin, assess.MaxPack)
			if err != nil {
				return err
			}
			p, r, err := assess.Parse(data)
			if err != nil {
				return err
			}
			return writePage(args[1], p, r)
		},
	}
}

func assessNonceCommand() *cobra.Command {
	return &cobra.Command{
		Use: "nonce", Short: "供测评方：取一个随机数 (for the assessor: draw a nonce)", Args: exactArgs(0),
		RunE: func(*cobra.Command, []string) error {
			b := make([]byte, 16)
			rand.Read(b) // never fails (crypto/rand)
			fmt.Println(hex.EncodeToString(b))
			return nil
		},
	}
}

// A replay is what came of computing an item again.
type replay struct {
	ID     string `json:"id"`
	Same   bool   `json:"same"`
	Detail string `json:"detail"`
}

func assessVerifyCommand() *cobra.Command {
	var anchors, logKey, cosigner, nonce, output string
	c := &cobra.Command{
		Use: "verify PACK.json", Short: "核验证据包，并重放可重放的条目 (verify a pack, and replay what can be replayed)", Args: exactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			trust, err := show.LoadTrust(anchors, logKey)
			if err == nil {
				err = show.LoadCosigner(&trust, cosigner)
			}
			if err != nil {
				return err
			}
			data, err := show.ReadFile(args[0], os.Stdin, assess.MaxPack)
			if err != nil {
				return err
			}
			report := assess.Verify(data, trust, evidence.Input{}, nonce)
			var again []replay
			differs := false
			if _, r, err := assess.Parse(data); err == nil {
				for _, it := range r.Items {
					if it.Replayed {
						one := replayItem(it)
						differs = differs || !one.Same
						again = append(again, one)
					}
				}
			}
			if output == "json" {
				enc := json.NewEncoder(os.Stdout)
				enc.SetIndent("", "  ")
				if err := enc.Encode(map[string]any{"report": report, "replayed": again}); err != nil {
					return err
				}
			} else {
				show.Print(os.Stdout, report)
				for _, one := range again {
					fmt.Printf("  重放 replay %s %s：%s\n", map[bool]string{true: "✓", false: "✗"}[one.Same], one.ID, show.Plain(one.Detail))
				}
			}
			switch {
			case report.Verdict == pki.Invalid:
				return exitError{errors.New("证据包无效 (the pack is invalid)"), 1}
			case differs:
				return exitError{errors.New("重放的结果与报告不同 (what was replayed differs from the report)"), 1}
			case report.Verdict == pki.Indeterminate:
				return exitError{errors.New("无法判定 (indeterminate)"), 3}
			}
			return nil
		},
	}
	required(c, &anchors, "anchors", "信任锚：CA 证书的 PEM 文件或目录 (trust anchors)")
	required(c, &logKey, "log-key", "日志公钥 PEM (the log's public key)")
	c.Flags().StringVar(&cosigner, "cosigner-key", "", "另一院区的日志公钥 PEM (the other campus's log key)")
	c.Flags().StringVar(&nonce, "nonce", "", "测评方给出的随机数 (the assessor's nonce)")
	c.Flags().StringVarP(&output, "output", "o", "text", "text 或 json")
	return c
}

// replayItem computes an item again from what it holds.
func replayItem(it assess.Item) replay {
	out := replay{ID: it.ID}
	switch {
	case it.ID == "kat.software":
		var said []trial.KAT
		if err := json.Unmarshal(it.Raw, &said); err != nil {
			out.Detail = err.Error()
			return out
		}
		here := trial.RunKAT()
		out.Same, out.Detail = len(here) == len(said), "在本机再次运行，结果相同 (run here again, with the same outcome)"
		for i := range min(len(here), len(said)) {
			out.Same = out.Same && here[i].Algorithm == said[i].Algorithm && here[i].Source == said[i].Source && here[i].Passed == said[i].Passed
		}
	default:
		var tries []struct {
			Data   []byte        `json:"data"`
			Judged *trial.Judged `json:"judged"`
		}
		if err := json.Unmarshal(it.Raw, &tries); err != nil || len(tries) == 0 {
			out.Same = it.Status != assess.Shown
			out.Detail = "没有数据可重放 (there is no data to replay)"
			return out
		}
		out.Same, out.Detail = true, "由包内的数据重新检测，结果相同 (judged again from the data in the pack, with the same outcome)"
		for _, t := range tries {
			if t.Judged == nil {
				out.Same = false
				continue
			}
			judged, err := trial.Test(t.Judged.Set, t.Data)
			if err != nil || judged.Passed != t.Judged.Passed || len(judged.Tests) != len(t.Judged.Tests) {
				out.Same = false
				continue
			}
			for i := range judged.Tests {
				out.Same = out.Same && judged.Tests[i].Name == t.Judged.Tests[i].Name && judged.Tests[i].Groups == t.Judged.Tests[i].Groups
			}
		}
	}
	if !out.Same {
		out.Detail = "重放的结果不同 (the outcome differs)"
	}
	return out
}

// assessRandomCommand tests random numbers; the appliance starts it, nobody else does.
func assessRandomCommand() *cobra.Command {
	return &cobra.Command{
		Use: "assess-random", Hidden: true, Args: exactArgs(0),
		RunE: func(*cobra.Command, []string) error {
			if err := appliance.LowestPriority(); err != nil {
				return err
			}
			return appliance.ServeRandomTests(os.Stdin, os.Stdout)
		},
	}
}

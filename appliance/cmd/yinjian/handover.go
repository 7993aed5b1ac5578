package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"

	"github.com/emmansun/gmsm/sm3"
	"github.com/pelletier/go-toml/v2"
	"github.com/spf13/cobra"

	"yinjian/api/client"
	"yinjian/appliance"
	"yinjian/appliance/audit"
	"yinjian/dbdriver/central"
	"yinjian/dbdriver/connect"
)

func handoverCommand() *cobra.Command {
	var dir, out string
	c := &cobra.Command{
		Use:   "handover --dir DIR --out FOLDER",
		Short: "移交：医院应得的资料，不含任何秘密 (what the hospital is entitled to, in one folder, without secrets)",
		Long: `写出一个文件夹：管理员、应用、签名人及其权限与状态、中心库的结构与数据字典、配置（不含口令）、密钥与证书清单、公开的证书与日志公钥、最新检查点、各部件的版本，
附校验清单 SHA256SUMS 与 SM3SUMS；清单由设备的时间戳单元签名（SM3SUMS.tsr），盖章一事记入日志。设备须在运行；
登录方式下以安全管理员登录后执行，盖章一项由系统管理员另做（届时写明“未签名”）。口令、密钥、PIN 的核验值、应用凭据都不在其中。核验：sha256sum -c SHA256SUMS；yinjian ts verify --anchors DIR --crls DIR --document SM3SUMS SM3SUMS.tsr`,
		Args: exactArgs(0),
		RunE: func(c *cobra.Command, _ []string) error {
			if dir == "" || out == "" {
				return usageError{errors.New("给出 --dir 与 --out (give --dir and --out)")}
			}
			cfg, err := appliance.LoadConfig(dir)
			if err != nil {
				return err
			}
			if dir, err = filepath.Abs(dir); err != nil {
				return err
			}
			a, err := (&adminFlags{dir: dir, output: "text"}).client()
			if err != nil {
				return err
			}
			defer a.Close()
			if err := os.Mkdir(out, 0o700); err != nil {
				return fmt.Errorf("文件夹须是新的 (the folder has to be new): %w", err)
			}
			h := &handover{dir: dir, out: out, cfg: cfg, admin: a}
			if err := h.write(c.Context()); err != nil {
				return err
			}
			fmt.Printf("已写出 %d 个文件 (files written)：%s\n", len(h.sums), out)
			if h.unsigned != "" {
				fmt.Printf("未签名 (not signed)：%s\n", h.unsigned)
			}
			for _, m := range h.missing {
				fmt.Printf("缺 (missing)：%s\n", m)
			}
			if h.unsigned != "" || len(h.missing) > 0 {
				return errFound
			}
			return nil
		},
	}
	f := c.Flags()
	f.StringVar(&dir, "dir", "", "设备目录 (the appliance's folder)")
	f.StringVar(&out, "out", "", "新文件夹 (a new folder)")
	return c
}

// A handover is being written.
type handover struct {
	dir, out string
	cfg      *appliance.Config
	admin    *client.Admin
	sums     []fileSums
	missing  []string // what could not be had, and why
	unsigned string   // why there is no signature
}

type fileSums struct{ name, sha256, sm3 string }

func (h *handover) put(name string, data []byte) error {
	a, b := sha256.Sum256(data), sm3.Sum(data)
	h.sums = append(h.sums, fileSums{name, hex.EncodeToString(a[:]), hex.EncodeToString(b[:])})
	return replaceFile(filepath.Join(h.out, name), data)
}

// table writes a CSV file.
func (h *handover) table(name string, lines [][]string) error {
	b, err := tableText(lines)
	if err != nil {
		return err
	}
	return h.put(name, b)
}

func (h *handover) write(ctx context.Context) error {
	// 1. Accounts and rights of the appliance.
	for name, ask := range map[string]func(context.Context) (json.RawMessage, error){
		"applications.json": h.admin.ListApplications, "signers.json": h.admin.ListSigners, "keys.json": h.admin.ListKeys,
		"certificates.json": h.admin.ListCertificates, "anchors.json": h.admin.ListAnchors, "crls.json": h.admin.ListCRLs, "machines.json": h.admin.ListMachines,
		"administrators.json": h.admin.ListAdministrators, "state.json": h.admin.State,
	} {
		answer, err := ask(ctx)
		if err != nil {
			return explain(err)
		}
		var v any
		if err := json.Unmarshal(answer, &v); err != nil {
			return err
		}
		b, err := json.MarshalIndent(withoutSecrets(v), "", "  ")
		if err != nil {
			return err
		}
		if err := h.put(name, append(b, '\n')); err != nil {
			return err
		}
	}
	// 2. The configuration, the database, public files, the journal's end, versions.
	for _, f := range []func(context.Context) error{h.configuration, h.database, h.public, h.checkpoint, h.versions, h.readme} {
		if err := f(ctx); err != nil {
			return err
		}
	}
	// 3. The lists, and the signature over one of them.
	slices.SortFunc(h.sums, func(a, b fileSums) int { return strings.Compare(a.name, b.name) })
	var list, national strings.Builder
	for _, s := range h.sums {
		fmt.Fprintf(&list, "%s  %s\n", s.sha256, s.name)
		fmt.Fprintf(&national, "%s  %s\n", s.sm3, s.name)
	}
	if err := replaceFile(filepath.Join(h.out, "SHA256SUMS"), []byte(list.String())); err != nil {
		return err
	}
	if err := replaceFile(filepath.Join(h.out, "SM3SUMS"), []byte(national.String())); err != nil {
		return err
	}
	response, why := stampReport(ctx, h.dir, []byte(national.String()))
	if response == nil {
		h.unsigned = why
		return nil
	}
	return replaceFile(filepath.Join(h.out, "SM3SUMS.tsr"), response)
}

// kept are names of the answers' members that hold what verifies or opens something. None is a secret in the clear; they
// stay with the appliance all the same.
var kept = map[string]bool{"key_salt": true, "key_sealed": true, "pin": true, "sealing": true, "wrapped": true}

func withoutSecrets(v any) any {
	switch v := v.(type) {
	case map[string]any:
		for name, w := range v {
			if kept[name] {
				delete(v, name)
			} else {
				v[name] = withoutSecrets(w)
			}
		}
	case []any:
		for i := range v {
			v[i] = withoutSecrets(v[i])
		}
	}
	return v
}

// configuration writes what config.toml says, as the program reads it, so that no comment goes along. Passwords are in files
// of their own; arguments of cipher machines' modules, where somebody may have put one, stay.
func (h *handover) configuration(context.Context) error {
	c := *h.cfg
	const omitted = "（未写出 omitted）"
	if c.HSM.ModuleArgs != "" {
		c.HSM.ModuleArgs = omitted
	}
	c.HSM.Machines = slices.Clone(c.HSM.Machines)
	for i := range c.HSM.Machines {
		if c.HSM.Machines[i].ModuleArgs != "" {
			c.HSM.Machines[i].ModuleArgs = omitted
		}
	}
	b, err := toml.Marshal(c)
	if err != nil {
		return err
	}
	return h.put("config.toml", b)
}

// database writes schema, dictionary, and the accounts of the server.
func (h *handover) database(ctx context.Context) error {
	for format, name := range map[string]string{"md": "data-dictionary.md", "csv": "data-dictionary.csv"} {
		var b bytes.Buffer
		if err := writeDictionary(&b, format); err != nil {
			return err
		}
		if err := h.put(name, b.Bytes()); err != nil {
			return err
		}
	}
	place, err := h.cfg.Database.Place(h.dir)
	if err != nil {
		return err
	}
	db, seam, err := connect.DB(place)
	if err != nil {
		return err
	}
	defer db.Close()
	schema, err := central.Schema(seam)
	if err == nil {
		err = h.put("schema.sql", []byte(schema))
	}
	if err != nil {
		return err
	}
	lines := [][]string{{"账户", "表", "权限"}}
	rights, err := central.Rights(ctx, db, seam)
	if err != nil {
		h.missing = append(h.missing, fmt.Sprintf("数据库账户与权限 (the database's accounts): %v", err))
	}
	for _, r := range rights {
		lines = append(lines, []string{r.Account, r.Object, r.Right})
	}
	if seam.Rights == "" {
		lines = append(lines, []string{"操作系统用户：设备目录的属主与 root (the folder's owner, and root)", "central.db", "全部 all"})
	}
	return h.table("database-rights.csv", lines)
}

// public copies certificates, lists and the log's key, which whoever verifies needs.
func (h *handover) public(context.Context) error {
	for _, pattern := range []string{"*.pem", "*.crl"} {
		names, err := filepath.Glob(filepath.Join(h.dir, pattern))
		if err != nil {
			return err
		}
		for _, name := range names {
			b, err := os.ReadFile(name)
			if err != nil {
				return err
			}
			if bytes.Contains(b, []byte("PRIVATE KEY")) {
				continue // none of ours has one
			}
			if err := h.put(filepath.Base(name), b); err != nil {
				return err
			}
		}
	}
	return nil
}

// checkpoint writes the journal's last one, from which on nothing before it can be rewritten unseen.
func (h *handover) checkpoint(ctx context.Context) error {
	store, err := openJournal(ctx, filepath.Join(h.dir, "journal"))
	if err != nil {
		return err
	}
	defer store.Close()
	last, err := store.LastCheckpoint(ctx)
	if errors.Is(err, audit.ErrNotFound) {
		h.missing = append(h.missing, "检查点：日志还没有 (no checkpoint yet)")
		return nil
	}
	if err != nil {
		return err
	}
	return errors.Join(h.put("checkpoint.txt", last.Note), h.put("checkpoint.sig", last.Signature))
}

// versions lists the program and the modules that it is built of.
func (h *handover) versions(context.Context) error {
	lines := [][]string{{"部件", "版本", "校验"}, {"yinjian", appliance.Version, ""}, {"Go", runtime.Version() + " " + runtime.GOOS + "/" + runtime.GOARCH, ""}}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, m := range info.Deps {
			if m.Replace != nil {
				m = m.Replace
			}
			lines = append(lines, []string{m.Path, m.Version, m.Sum})
		}
	}
	return h.table("versions.csv", lines)
}

// administration says who administers, as far as the configuration tells.
func (h *handover) administration() string {
	if h.cfg.Admin.Local == appliance.LocalLogin {
		return "管理设备的是 administrators.json 里的人，人人登录；能以 root 或设备服务用户改 config.toml 的人可以改回不登录。"
	}
	return "本机管理套接字不要求登录：操作系统的 root 与设备服务用户可做一切；administrators.json 里的人经登录地址管理。"
}

func (h *handover) readme(context.Context) error {
	text := fmt.Sprintf(`# 移交资料 (handover)

设备 %s（%s），印鉴 %s。

| 文件 | 内容 |
| --- | --- |
| applications.json | 应用（业务系统）及其权限、策略、限额 |
| signers.json | 签名人及其密钥、状态；不含 PIN 的核验值 |
| administrators.json | 管理员：登录名、姓名、角色、停用、锁定、口令到期、登录证书的 SHA-256、最后变更；没有设立的为空 |
| keys.json、certificates.json、anchors.json、crls.json | 密钥、证书、信任锚、吊销列表的清单 |
| machines.json | 密码机 |
| state.json | 移交时的状态与警告 |
| config.toml | 配置，口令都在别的文件里，不在其中；密码机模块的参数未写出 |
| database-rights.csv | 数据库的账户与权限；管理员账户的口令由数据库管理员当面移交 |
| schema.sql、data-dictionary.md、data-dictionary.csv | 中心库的建表语句与数据字典 |
| *.pem、*.crl | 公开的证书、日志公钥、吊销列表，验证证据时用 |
| checkpoint.txt、checkpoint.sig | 日志的最新检查点与签名，由 log.pem 核验；另存一份，以后可证明此前的日志未被改写 |
| versions.csv | 程序与各部件的版本、校验值 |
| SHA256SUMS、SM3SUMS、SM3SUMS.tsr | 校验清单，设备的时间戳覆盖 SM3SUMS |

%s没有别的管理账户，没有缺省口令。应用凭据、口令、密钥不在其中。
变更日志用 yinjian change list --csv 导出，日志与证据的备份见 yinjian backup。
`, h.cfg.Node, h.cfg.Campus, appliance.Version, h.administration())
	for _, m := range h.missing {
		text += "\n缺 (missing)：" + m + "\n"
	}
	return h.put("README.md", []byte(text))
}

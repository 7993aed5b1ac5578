package main

import (
	"bytes"
	"debug/elf"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"

	"github.com/emmansun/gmsm/sm3"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"yinjian/appliance"
	"yinjian/docs"
)

// An originReport says of what the program and the machine that it runs on are made, and where that comes from.
type originReport struct {
	Platform []originItem   `json:"platform"`
	Program  []originItem   `json:"program"`
	Site     []originItem   `json:"site,omitempty"` // what config.toml names
	Modules  []originModule `json:"modules"`
}

type originItem struct {
	Name  string `json:"name"`
	Value string `json:"value"`
	From  string `json:"from"` // how it is known
}

type originModule struct {
	Path    string `json:"path"`
	Version string `json:"version"`
	Sum     string `json:"sum,omitempty"`
	Origin  string `json:"origin"`
}

func originReportCommand() *cobra.Command {
	var dir, output string
	c := &cobra.Command{
		Use:   "xc-report [--dir DIR]",
		Short: "信创符合性材料：操作系统、内核、处理器、数据库、密码机、程序库及其来源 (of what this machine and program are made, and where it comes from)",
		Long: `写出本机与本程序由什么组成、来源何处，连同国产替代与各架构“试过、没有试过”的对照，即 docs/xinchuang.md 的表。只写看得到的：不判断是否“信创目录”内的产品，
那由医院按产品型号与目录核对。给出 --dir 时加上该设备配置的数据库、密码机模块与时间源。本报告不签名；须要签名的材料用 yinjian assess。
(Says what is there and what was tried; whether a product is on a list is for the hospital to look up. Not signed.)`,
		Args: exactArgs(0),
		RunE: func(c *cobra.Command, _ []string) error {
			if output != "text" && output != "json" {
				return usageError{errors.New("-o 须为 text 或 json (text or json)")}
			}
			r := originReport{Platform: platformItems("/"), Program: programItems()}
			if dir != "" {
				cfg, err := appliance.LoadConfig(dir)
				if err != nil {
					return err
				}
				r.Site = siteItems(cfg)
			}
			info, ok := debug.ReadBuildInfo()
			if !ok {
				return errors.New("程序里没有构建信息 (the program has no build information)")
			}
			origins := moduleOrigins(docs.Xinchuang)
			for _, m := range info.Deps {
				r.Modules = append(r.Modules, originModule{m.Path, m.Version, m.Sum, originOf(origins, m.Path)})
			}
			if output == "json" {
				e := json.NewEncoder(c.OutOrStdout())
				e.SetIndent("", "  ")
				e.SetEscapeHTML(false)
				return e.Encode(r)
			}
			r.write(c.OutOrStdout())
			return nil
		},
	}
	c.Flags().StringVar(&dir, "dir", "", "设备目录，可不给 (the appliance's folder, if there is one)")
	c.Flags().StringVarP(&output, "output", "o", "text", "text（Markdown）或 json")
	return c
}

// platformItems reads what the machine below root says of itself.
func platformItems(root string) []originItem {
	var out []originItem
	if b, err := readLimited(filepath.Join(root, "etc/os-release"), 64<<10); err == nil {
		for line := range strings.Lines(string(b)) {
			if name, ok := strings.CutPrefix(line, "PRETTY_NAME="); ok {
				out = append(out, originItem{"操作系统", strings.Trim(strings.TrimSpace(name), `"`), "/etc/os-release"})
			}
		}
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err == nil {
		out = append(out, originItem{"内核", unix.ByteSliceToString(u.Sysname[:]) + " " + unix.ByteSliceToString(u.Release[:]), "uname"},
			originItem{"架构", unix.ByteSliceToString(u.Machine[:]), "uname"})
	}
	if b, err := readLimited(filepath.Join(root, "proc/cpuinfo"), 1<<20); err == nil {
		for line := range strings.Lines(string(b)) {
			name, value, _ := strings.Cut(line, ":")
			switch strings.TrimSpace(name) {
			case "model name", "Model Name", "Hardware", "CPU implementer": // amd64; loong64; arm64
				out = append(out, originItem{"处理器", strings.TrimSpace(value), "/proc/cpuinfo"})
				return out
			}
		}
	}
	return out
}

// programItems are about this program, as it is in its file.
func programItems() []originItem {
	out := []originItem{{"印鉴", appliance.Version + "，" + runtime.GOOS + "/" + runtime.GOARCH, "程序"}, {"编译器与标准库", runtime.Version(), "程序的构建信息"}}
	if name, err := os.Executable(); err == nil {
		if f, err := elf.Open(name); err == nil {
			defer f.Close()
			libraries, err := f.ImportedLibraries()
			if err == nil {
				out = append(out, originItem{"动态链接库", strings.Join(libraries, "、"), "程序的 ELF 文件"})
			}
		}
	}
	return out
}

// siteItems are what the configuration names.
func siteItems(cfg *appliance.Config) []originItem {
	var out []originItem
	database := "PostgreSQL 协议的服务器；是哪一种产品见 yinjian db check"
	switch {
	case cfg.Database.DSN == "":
		database = "内嵌 SQLite"
	case strings.HasPrefix(cfg.Database.DSN, "dm:"):
		database = "达梦 DM8"
	}
	out = append(out, originItem{"中心库", database, "database.dsn"})
	module := func(key, name string) {
		value := name
		if strings.HasPrefix(name, "pack:") {
			value += "，厂商包里的库，摘要见 yinjian pack list (in a maker's pack)"
		} else if b, err := os.ReadFile(name); err != nil {
			value += "，读不到 (cannot be read)"
		} else {
			sum := sm3.Sum(b)
			value += "，SM3 " + hex.EncodeToString(sum[:])
		}
		if cfg.Evaluation.Softtoken {
			value += "；软件密码机，仅供评估，不是认证产品"
		}
		out = append(out, originItem{"密码机模块", value, key})
	}
	module("hsm.module", cfg.HSM.Module)
	for i, m := range cfg.HSM.Machines {
		module(fmt.Sprintf("hsm.machines[%d].module", i), m.Module)
	}
	for i, s := range cfg.Time.Sources {
		out = append(out, originItem{"时间源", s.Name + " " + s.Address, fmt.Sprintf("time.sources[%d]", i)})
	}
	if cfg.Evaluation.GNSSFeed {
		out = append(out, originItem{"时间源", "模拟的北斗信号，仅供演示", "evaluation.gnss_feed"})
	}
	return out
}

// moduleOrigins are the rows of the page's table of modules, the longest path first.
func moduleOrigins(page string) [][2]string {
	_, table, _ := strings.Cut(page, "\n## Go 模块")
	table, _, _ = strings.Cut(table, "\n## ")
	var out [][2]string
	for line := range strings.Lines(table) {
		if cells := strings.Split(line, "|"); len(cells) == 5 && strings.Contains(cells[1], "`") {
			out = append(out, [2]string{strings.Trim(cells[1], " `"), strings.TrimSpace(cells[2])})
		}
	}
	slices.SortFunc(out, func(a, b [2]string) int { return len(b[0]) - len(a[0]) })
	return out
}

func originOf(origins [][2]string, path string) string {
	for _, o := range origins {
		if path == o[0] || strings.HasPrefix(path, o[0]+"/") {
			return o[1]
		}
	}
	return "未列出 (not listed)"
}

func (r *originReport) write(w io.Writer) {
	var b bytes.Buffer
	fmt.Fprint(&b, "# 信创符合性材料 (of what this machine is made)\n\n本机所见，未签名；是否在目录之内由医院按型号核对。\n")
	for _, part := range []struct {
		title string
		items []originItem
	}{{"平台", r.Platform}, {"程序", r.Program}, {"本设备的配置", r.Site}} {
		if len(part.items) == 0 {
			continue
		}
		fmt.Fprintf(&b, "\n## %s\n\n| 项目 | 所见 | 依据 |\n| --- | --- | --- |\n", part.title)
		for _, i := range part.items {
			fmt.Fprintf(&b, "| %s | %s | %s |\n", i.Name, strings.ReplaceAll(i.Value, "|", `\|`), i.From)
		}
	}
	fmt.Fprint(&b, "\n## 程序库\n\n| Go 模块 | 版本 | 来源 |\n| --- | --- | --- |\n")
	for _, m := range r.Modules {
		fmt.Fprintf(&b, "| %s | %s | %s |\n", m.Path, m.Version, m.Origin)
	}
	_, parts, _ := strings.Cut(docs.Xinchuang, "\n## 部件")
	parts, _, _ = strings.Cut(parts, "\n## ")
	fmt.Fprintf(&b, "\n## 部件%s", parts)
	_, _ = w.Write(b.Bytes())
}

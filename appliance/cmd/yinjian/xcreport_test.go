package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"yinjian/appliance"
	"yinjian/docs"
)

func TestOriginReport(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	for name, text := range map[string]string{
		"etc/os-release": "NAME=\"openEuler\"\nPRETTY_NAME=\"openEuler 22.03 LTS\"\n",
		"proc/cpuinfo":   "system type\t\t: generic-loongson-machine\nprocessor\t\t: 0\nModel Name\t\t: Loongson-3A5000\n",
	} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(root, name)), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	items := platformItems(root)
	for _, want := range []originItem{{"操作系统", "openEuler 22.03 LTS", "/etc/os-release"}, {"处理器", "Loongson-3A5000", "/proc/cpuinfo"}} {
		if !slices.Contains(items, want) {
			t.Errorf("%+v has no %+v", items, want)
		}
	}
	module := filepath.Join(root, "libp11.so")
	if err := os.WriteFile(module, []byte("abc"), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg := &appliance.Config{}
	cfg.HSM.Module, cfg.Database.DSN, cfg.Evaluation.GNSSFeed = module, "dm://yj@192.0.2.1:5236", true
	cfg.HSM.Machines = []appliance.Machine{{Module: filepath.Join(root, "none.so")}}
	site := siteItems(cfg)
	for _, want := range []originItem{
		{"中心库", "达梦 DM8", "database.dsn"},
		{"密码机模块", module + "，SM3 66c7f0f462eeedd9d1f2d46bdc10e4e24167c4875cf2f7a2297da02b8f4ba8e0", "hsm.module"}, // GB/T 32905's first example
		{"时间源", "模拟的北斗信号，仅供演示", "evaluation.gnss_feed"},
	} {
		if !slices.Contains(site, want) {
			t.Errorf("%+v has no %+v", site, want)
		}
	}
	if !strings.Contains(site[2].Value, "读不到") {
		t.Errorf("a module that is not there: %+v", site[2])
	}
	origins := moduleOrigins(docs.Xinchuang)
	if got := originOf(origins, "github.com/emmansun/gmsm"); !strings.Contains(got, "国密") {
		t.Errorf("gmsm comes from %q", got)
	}
	for _, stranger := range []string{"github.com/emmansun/gmsm2", "golang.org/other"} {
		if got := originOf(origins, stranger); !strings.Contains(got, "未列出") {
			t.Errorf("%s comes from %q", stranger, got)
		}
	}
	for _, output := range []string{"text", "json"} {
		c := newRoot()
		var out bytes.Buffer
		c.SetOut(&out)
		c.SetArgs([]string{"xc-report", "-o", output})
		if err := c.Execute(); err != nil {
			t.Fatal(err)
		}
		if output == "json" && !json.Valid(out.Bytes()) || output == "text" && !strings.Contains(out.String(), "## 部件与国产替代") {
			t.Errorf("%s: %s", output, &out)
		}
	}
}

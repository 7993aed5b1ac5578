package main

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"yinjian/iso/layout"
)

func TestPage(t *testing.T) {
	t.Parallel()
	evaluation := layout.Image{Version: "0.1.0", Index: 3, Variant: layout.Evaluation}
	release := evaluation
	release.Variant = layout.Release
	for name, c := range map[string]struct {
		image       layout.Image
		answer      string
		err         error
		want, never []string
	}{
		"evaluation says so": {evaluation, `{"state":"operational","ready":true,"node":"benbu-1","campus":"本部","listeners":{"api":"[::]:8443"},"certificate":{"fingerprint":"cd34"}}`, nil,
			[]string{"  cd34\n", "not certified", "STATE: operational 运行", "benbu-1", "api [::]:8443", "192.0.2.10"}, []string{"not ready"}},
		"release does not": {release, `{"state":"operational","ready":false}`, nil, []string{"not ready"}, []string{"certified"}},
		"locked":           {release, `{"state":"locked","next":"yinjian unlock"}`, nil, []string{"已锁定", "next: yinjian unlock"}, nil},
		"waits for a backup": {release, `{"state":"uninitialised","restore":{"address":"[::]:8444","fingerprint":"ab12","token":"AAAAA-BBBBB","state":"restoring","percent":40,"refused":2,"failure":"x\u001by"}}`, nil,
			[]string{"RESTORE: [::]:8444", "ab12", "token: AAAAA-BBBBB", "restoring: 40%", "错误的恢复码 2 次", "not restored): xy"}, []string{"\x1b"}},
		"no answer":     {release, ``, errors.New("connection refused"), []string{"no answer"}, []string{"refused"}},
		"not JSON":      {release, `<html>`, nil, []string{"no answer"}, []string{"html"}},
		"many warnings": {release, `{"state":"failed","warnings":["1","2","3","4","5","6","7"]}`, nil, []string{"! 5", "另有 2 条"}, []string{"! 6"}},
		"a terminal's command": {release, `{"state":"operational","ready":true,"node":"x\u001b[2Jy\u0007\r\nSTATE: z"}`, nil,
			[]string{"x[2JySTATE: z"}, []string{"\x1b", "\a", "\r", "\nSTATE: z"}},
	} {
		got := page(c.image, json.RawMessage(c.answer), c.err, []string{"192.0.2.10"}, parameters{same: 37, hidden: []string{"net.core.bpf_jit_harden"}})
		c.want = append(c.want, "kernel: 37 项与规定相同", "not compared): net.core.bpf_jit_harden\n")
		for _, w := range c.want {
			if !strings.Contains(got, w) {
				t.Errorf("%s: no %q in\n%s", name, w, got)
			}
		}
		for _, w := range c.never {
			if strings.Contains(got, w) {
				t.Errorf("%s: %q in\n%s", name, w, got)
			}
		}
	}
}

func TestKernel(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for name, text := range map[string]string{
		"conf":  "# what it stops\nkernel.sysrq = 0\nkernel.core_pattern = |/bin/false\nkernel.modules_disabled = 1\nnet.core.gone = 2\nkernel.folder = 1\n",
		"empty": "# kernel.sysrq = 0\n", "kernel/sysrq": "0\n", "kernel/core_pattern": "|/bin/false\n", "kernel/modules_disabled": "0\n", "kernel/folder/file": "",
	} {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	files := []string{filepath.Join(dir, "conf"), filepath.Join(dir, "empty"), filepath.Join(dir, "none")}
	got := kernel(files, dir)
	if want := []string{"kernel.modules_disabled=0", "net.core.gone 没有 (none)"}; got.same != 2 || len(got.hidden) != 0 || len(got.others) != 5 || !slices.Equal(got.others[:2], want) ||
		!strings.HasPrefix(got.others[2], "kernel.folder (read ") || !slices.Equal(got.others[3:], files[1:]) {
		t.Errorf("%+v, want %q", got, want)
	}
	got.others = append(got.others, "a sixth")
	said := page(layout.Image{}, nil, nil, nil, got)
	if !strings.Contains(said, "6 项与规定不同 (not as laid down): kernel.modules_disabled=0 net.core.gone") || strings.Contains(said, "sixth") || strings.Contains(said, "not compared") {
		t.Error(said)
	}
}

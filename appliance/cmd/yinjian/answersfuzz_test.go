package main

import (
	"bytes"
	"testing"

	"github.com/pelletier/go-toml/v2"
)

// FuzzAnswers: answers that are taken are written and read again as the same, and those without a fault make a configuration that
// the appliance takes.
func FuzzAnswers(f *testing.F) {
	f.Add([]byte("node = 'benbu-1'\ntime_sources = ['127.0.0.1:123']\n"))
	f.Add([]byte("pin_source = 'unlock'\nlisten = '0.0.0.0:8443'\nsimulated_beidou = true\n[unlock]\nthreshold = 2\nholders = ['张三', '李四', '王五']\n[administrators]\nsystem = 'zhang:张三'\n"))
	f.Add([]byte("[settings.hsm]\nmodule = '/lib/m.so'\n[settings.hsm.slots.staff]\ntoken_label = 'a'\n[settings.database]\ndsn = 'postgres://y@db/y'\n[secrets]\n'db.password' = 'x'\n"))
	f.Add([]byte("node = 7\nnobody = 1\n"))
	f.Fuzz(func(t *testing.T, in []byte) {
		a, err := parseAnswers("answers.toml", in)
		if err != nil {
			return
		}
		out, err := toml.Marshal(a)
		if err != nil {
			t.Fatalf("%s is taken and cannot be written: %v", in, err)
		}
		again, err := parseAnswers("answers.toml", out)
		if err != nil {
			t.Fatalf("%s is written as %s: %v", in, out, err)
		}
		if twice, err := toml.Marshal(again); err != nil || !bytes.Equal(twice, out) {
			t.Fatalf("%s is written as %s, then as %s, %v", in, out, twice, err)
		}
		if len(a.faults(t.TempDir())) > 0 {
			return
		}
		if cfg, _, err := a.file("/lib/module.so", "/dir"); err != nil {
			t.Errorf("%s has no fault, and makes %s: %v", in, cfg, err)
		}
	})
}

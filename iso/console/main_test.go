package main

import (
	"encoding/json"
	"errors"
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
		got := page(c.image, json.RawMessage(c.answer), c.err, []string{"192.0.2.10"})
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

package api_test

import (
	"encoding/hex"
	"encoding/json"
	"net/http"
	"strings"
	"testing"
	"time"

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance/account"
	"yinjian/appliance/problem"
)

// What came of an application for tests is shown with what is wrong, step by step; of another nothing is kept. No proof, no body
// and no key is in it.
func TestSelftest(t *testing.T) {
	t.Parallel()
	sv := newServices()
	sv.apps["lab"] = &account.Application{ID: "lab", Name: "联调", Test: true, Rights: []string{account.RightSign}}
	k := startWith(t, sv)
	a := client.NewAdmin(k.socket())
	t.Cleanup(a.Close)
	ask := func() (out wire.Selftest, raw string) {
		t.Helper()
		b, err := a.Selftest(t.Context(), "lab")
		if err == nil {
			err = json.Unmarshal(b, &out)
		}
		if err != nil {
			t.Fatal(err)
		}
		return out, string(b)
	}
	if out, _ := ask(); len(out.Arrivals) != 0 || out.WindowS != 300 || out.Application != "lab" {
		t.Errorf("before anything came: %+v", out)
	}
	body := encode(t, signBody())
	var proof string
	lines := func(change func(l []string) string) func(*http.Request) { // signs something else than it should
		return func(r *http.Request) {
			at := k.clock.Now().Time.Format(time.RFC3339Nano)
			text := wire.StringToSign(wire.Signable{Method: r.Method, Path: r.URL.EscapedPath(), Host: r.Host, Body: body}, "lab", at, "nonce-lines-0123456789")
			h := wire.Authorization{App: "lab", Time: at, Nonce: "nonce-lines-0123456789", MAC: wire.MACOf(appKey, change(strings.Split(text, "\n")))}
			r.Header.Set("Authorization", h.String())
		}
	}
	joined := func(i int, v func(string) string) func([]string) string {
		return func(l []string) string { l[i] = v(l[i]); return strings.Join(l, "\n") }
	}
	for name, c := range map[string]struct {
		call   call
		failed string // checks, with what their words have
		words  string
	}{
		"good":         {call{}, "", ""},
		"wrong key":    {call{key: make([]byte, 32)}, "signature outcome", "不同"},
		"key as hex":   {call{key: []byte(hex.EncodeToString(appKey))}, "signature outcome", "十六进制文本"},
		"late":         {call{at: k.clock.Now().Time.Add(-time.Hour)}, "time outcome", "1h0m0s"},
		"no nonce":     {call{nonce: "short"}, "header outcome", "nonce"},
		"scheme":       {call{header: map[string]string{"Authorization": "Bearer app=lab"}}, "header outcome", "YJ1-HMAC-SM3"},
		"line feed":    {call{tamper: lines(func(l []string) string { return strings.Join(l, "\n") + "\n" })}, "signature outcome", "多了一个换行"},
		"CRLF":         {call{tamper: lines(func(l []string) string { return strings.Join(l, "\r\n") })}, "signature outcome", "CRLF"},
		"no port":      {call{tamper: lines(joined(4, func(h string) string { return h[:strings.LastIndex(h, ":")] }))}, "signature outcome", "端口"},
		"upper digest": {call{tamper: lines(joined(8, strings.ToUpper))}, "signature outcome", "小写十六进制"},
		"no such form": {call{body: []byte("{}")}, "outcome", "invalid_request"},
	} {
		c.call.path, c.call.app, c.call.loose = "/v1/sign", "lab", true
		if c.call.body == nil {
			c.call.body = body
		}
		r := k.request(c.call)
		resp, err := k.http.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		out, raw := ask()
		one := out.Arrivals[0]
		var failed, words []string
		for _, check := range one.Checks {
			if check.Status == "failed" {
				failed, words = append(failed, check.ID), append(words, check.Detail)
				if check.Next == "" {
					t.Errorf("%s: %s says not what to do", name, check.ID)
				}
			}
		}
		if got := strings.Join(failed, " "); got != c.failed || !strings.Contains(strings.Join(words, " "), c.words) {
			t.Errorf("%s: %q %q, want %q with %q", name, got, words, c.failed, c.words)
		}
		if (resp.StatusCode == 200) != (one.Code == "") || one.Path != "/v1/sign" || one.Host != r.Host || one.Bytes != len(c.call.body) && one.Bytes != 0 || one.Remote != "127.0.0.1" {
			t.Errorf("%s: %+v", name, one)
		}
		_, proof, _ = strings.Cut(r.Header.Get("Authorization"), "sig=")
		for _, never := range []string{proof, hex.EncodeToString(appKey), b64(appKey), signBody()["content"].(string)} {
			if never != "" && strings.Contains(raw, never) {
				t.Errorf("%s: %q is shown", name, never)
			}
		}
	}
	for range 15 {
		k.do(call{path: "/v1/verify", app: "lab", body: []byte("{}"), loose: true})
	}
	if out, _ := ask(); len(out.Arrivals) != 10 || out.Arrivals[0].Path != "/v1/verify" || out.Arrivals[9].Path != "/v1/verify" {
		t.Errorf("%d are kept", len(out.Arrivals))
	}
	k.do(call{path: "/v1/sign", body: body})
	if _, err := a.Selftest(t.Context(), "his"); !client.Is(err, problem.Forbidden) {
		t.Errorf("an application of production: %v", err)
	}
	if _, err := a.Selftest(t.Context(), "nobody"); !client.Is(err, problem.NotFound) {
		t.Errorf("nobody's: %v", err)
	}
}

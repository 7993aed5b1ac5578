package api

import (
	"crypto/hmac"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"net"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/emmansun/gmsm/sm3"
	"github.com/labstack/echo/v4"

	"yinjian/api/wire"
	"yinjian/appliance/account"
	"yinjian/appliance/problem"
)

// arrivalsKept is how many requests are remembered of an application for tests.
const arrivalsKept = 10

// arrivals are the last requests that named an application for tests, as they came: what its maker needs to see why one is
// refused, which the answer does not say to somebody who may be nobody. Of applications that are not for tests nothing is
// remembered. They are in memory, and leave it by one route, for administrators.
type arrivals struct {
	mu sync.Mutex
	of map[string][]arrival // guarded by mu; by application, the newest first
}

// An arrival is one request. No body is kept, and no proof leaves the appliance whole.
type arrival struct {
	at           time.Time
	remote       string
	method, path string
	host         string
	headers      []string // their names
	contentType  string
	bytes        int
	header       []string
	text         string // to sign, as the appliance has it; "" without a header of that form
	shown        []*x509.Certificate
	code         problem.Code // "" when it was let through to its route
	detail       string
}

// claimed finds the application in a header of any form.
var claimed = regexp.MustCompile(`\bapp=([a-z0-9-]{2,32})\b`)

// arrived remembers a request, if it names an application for tests.
func (s *Server) arrived(c echo.Context, app string, err error) {
	r, x := c.Request(), exchangeOf(c)
	header := r.Header[echo.HeaderAuthorization]
	if app == "" && len(header) > 0 {
		if found := claimed.FindStringSubmatch(cut(header[0], 512)); found != nil {
			app = found[1]
		}
	}
	test := func() bool {
		known, _, ok := s.cfg.Directory.Application(app)
		return ok && known.Test
	}
	// Whoever fails must not see from the time that it takes whether there is such an application.
	if err == nil && !test() {
		return
	}
	one := arrival{
		at: s.cfg.Clock.Now().Time, remote: x.remote.String(), method: r.Method, path: cut(r.RequestURI, 512), host: cut(r.Host, 256),
		headers: slices.Sorted(maps.Keys(r.Header)), contentType: cut(r.Header.Get(echo.HeaderContentType), 128), bytes: x.size, text: x.text, code: problem.CodeOf(err),
	}
	for _, h := range header[:min(len(header), 2)] {
		one.header = append(one.header, cut(h, 512))
	}
	if p := (*problem.Problem)(nil); errors.As(err, &p) {
		one.detail = p.Detail
	}
	if one.shown = shown(r); len(one.shown) > 4 {
		one.shown = one.shown[:4]
	}
	if !test() {
		return
	}
	l := &s.arrivals
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.of == nil {
		l.of = map[string][]arrival{}
	}
	l.of[app] = append([]arrival{one}, l.of[app][:min(len(l.of[app]), arrivalsKept-1)]...)
}

// cut is the beginning of what somebody sent.
func cut(s string, most int) string {
	if len(s) > most {
		return s[:most]
	}
	return s
}

func (s *Server) selftestRoutes(e *echo.Echo) {
	e.GET("/admin/v1/applications/:id/selftest", s.local(noBody, func(c echo.Context, _ string, _ []byte) error {
		id := c.Param("id")
		if p := pattern("path.id", id, applicationID); p != nil {
			return p
		}
		app, key, ok := s.cfg.Directory.Application(id)
		switch {
		case !ok:
			return problem.New(problem.NotFound, "没有这个应用 (no such application)", "见应用列表 (see the list of applications)")
		case !app.Test:
			return problem.New(problem.Forbidden, "自检只为测试应用：生产应用的请求不留存 (only for applications that are for tests: nothing is remembered of others)",
				"登记一个测试应用，用它的密钥联调 (register one for tests, and try with its key)")
		}
		return answer(c, s.selftest(app, key))
	}))
}

func (s *Server) selftest(app *account.Application, key []byte) *wire.Selftest {
	now := s.cfg.Clock.Now()
	out := &wire.Selftest{
		Application: app.ID, Name: app.Name, Stopped: app.Stopped, Rights: app.Rights, Now: now.Time.UTC().Format(time.RFC3339Nano), Trusted: now.Trusted(),
		WindowS: int(s.limits.Window.Seconds()), Names: s.cfg.Names, Arrivals: []wire.Arrival{},
	}
	if b := app.Client; b != nil {
		out.Certificate = "hmac"
		if b.Alone {
			out.Certificate = "alone"
		}
	}
	s.arrivals.mu.Lock()
	all := slices.Clone(s.arrivals.of[app.ID])
	s.arrivals.mu.Unlock()
	for _, one := range all {
		v := wire.Arrival{
			At: one.at.UTC().Format(time.RFC3339Nano), Remote: one.remote, Method: one.method, Path: one.path, Host: one.host, Headers: one.headers,
			ContentType: one.contentType, Bytes: one.bytes, StringToSign: one.text, Code: string(one.code), Detail: one.detail,
		}
		if len(one.header) > 0 {
			v.Authorization = proofless(one.header[0])
		}
		if len(one.shown) > 0 {
			v.Certificate = one.shown[0].Subject.String()
		}
		v.Checks = s.examine(&one, app, key)
		out.Arrivals = append(out.Arrivals, v)
	}
	return out
}

// proofless is a header without most of its proof.
func proofless(header string) string {
	before, sig, ok := strings.Cut(header, ",sig=")
	if !ok {
		before, sig, ok = strings.Cut(header, "sig=")
	}
	if !ok {
		return cut(header, 24) + "…"
	}
	return before + ",sig=" + cut(sig, 6) + "…"
}

// examine says of each step of docs/api-auth.md what is so of a request.
func (s *Server) examine(one *arrival, app *account.Application, key []byte) []wire.SelftestCheck {
	var out []wire.SelftestCheck
	say := func(id, status, detail, next string) {
		out = append(out, wire.SelftestCheck{ID: id, Status: status, Detail: detail, Next: next})
	}
	const passed, failed, unchecked = "passed", "failed", "not_checked"
	var a *wire.Authorization
	switch alone := app.Client != nil && app.Client.Alone; {
	case len(one.header) == 0 && alone && len(one.shown) > 0:
		say("header", passed, "没有 Authorization 头，由客户端证书代替 (no header: the client certificate stands for it)", "")
	case len(one.header) == 0:
		say("header", failed, "没有 Authorization 头 (there is none)", "Authorization: "+wire.Scheme+" app="+app.ID+",time=…,nonce=…,sig=…")
	case len(one.header) > 1:
		say("header", failed, "Authorization 头不止一个 (more than one)", "只带一个；检查代理是否另加 (send one; does a proxy add another?)")
	default:
		var err error
		if a, err = wire.ParseAuthorization(one.header[0]); err != nil {
			say("header", failed, "格式不对 (its form is wrong)："+err.Error(), "逐字照 docs/api-auth.md：方案名后一个空格，四个参数依次用逗号相连，没有别的空格 (as that page has it, to the letter)")
			break
		}
		say("header", passed, "app="+a.App+"，time="+a.Time+"，nonce="+a.Nonce, "")
	}
	if a != nil {
		skew := a.At.Sub(one.at)
		if skew.Abs() > s.limits.Window {
			say("time", failed, fmt.Sprintf("请求时间与设备时间相差 %v (the request's time is off by that)", skew.Round(time.Millisecond)), "校对业务系统所在机器的时钟；time 用 13 位毫秒或带时区的 RFC 3339 (set the client's clock)")
		} else {
			say("time", passed, fmt.Sprintf("相差 %v，允许 %v (off by; allowed)", skew.Round(time.Millisecond), s.limits.Window), "")
		}
	}
	if s.named(one.host) {
		say("host", passed, one.host, "")
	} else {
		say("host", failed, one.host+" 不在 listen.names 之内 (none of listen.names)", "用设备自己的名字访问；经代理时保留 Host 头 (use the appliance's name; a proxy must leave the Host header)")
	}
	switch {
	case a == nil:
		say("signature", unchecked, "没有可核对的签名 (there is none to check)", "")
	case one.text == "":
		say("signature", unchecked, "请求体没有收全，或请求在读取之前已被拒绝 (the body was not read)", "见结果一行 (see the outcome)")
	case hmac.Equal(wire.MACOf(key, one.text), a.MAC):
		say("signature", passed, "HMAC-SM3 与设备算得的相同 (as the appliance computes it)", "")
	default:
		detail, next := guess(one, key, a)
		say("signature", failed, detail, next)
	}
	switch {
	case app.Client == nil:
		say("certificate", unchecked, "该应用没有绑定客户端证书 (the application is bound to none)", "")
	default:
		if err := s.cfg.Directory.CheckClient(app, one.shown, one.at); err != nil {
			detail := err.Error()
			if p := (*problem.Problem)(nil); errors.As(err, &p) {
				detail = p.Detail
			}
			say("certificate", failed, detail, "TLS 握手时出示登记的客户端证书及其上级证书；须 TLS 1.3 (show the certificate that was registered, with those above it, in TLS 1.3)")
			break
		}
		say("certificate", passed, one.shown[0].Subject.String(), "")
	}
	if one.code == "" {
		say("outcome", passed, "身份验证通过，已由该地址处理 (authenticated, and handled by its route)", "")
	} else {
		say("outcome", failed, string(one.code)+"："+one.detail, "错误码的含义与能否重发见帮助 (see the help for the code)")
	}
	return out
}

// guess tries the mistakes that clients were seen to make. That one of them fits says nothing about the key that whoever
// made the request did not know.
func guess(one *arrival, key []byte, a *wire.Authorization) (detail, next string) {
	lines := strings.Split(one.text, "\n")
	with := func(i int, v string) string {
		changed := slices.Clone(lines)
		changed[i] = v
		return strings.Join(changed, "\n")
	}
	const method, path, query, host, body = 1, 2, 3, 4, 8
	bare := lines[host]
	if name, _, err := net.SplitHostPort(bare); err == nil {
		bare = name
	}
	none := sm3.Sum(nil)
	for _, try := range []struct {
		key          []byte
		text, detail string
	}{
		{[]byte(hex.EncodeToString(key)), one.text, "密钥用了十六进制文本，应先解码为 32 字节 (the key was used as hexadecimal text: decode it first)"},
		{[]byte(base64.StdEncoding.EncodeToString(key)), one.text, "密钥用了 Base64 文本，应先解码为 32 字节 (the key was used as Base64 text: decode it first)"},
		{key, one.text + "\n", "待签字符串末尾多了一个换行 (a line feed too many at the end)"},
		{key, strings.ReplaceAll(one.text, "\n", "\r\n"), "换行用了 CRLF，应为 LF (lines end with CRLF, want LF)"},
		{key, with(host, bare), "主机一行少了端口，须与 Host 头相同 (the host's port is missing: want the Host header's)"},
		{key, with(host, one.host), "主机一行须为小写 (the host must be in lower case)"},
		{key, with(path, cut(one.path, 512)), "路径一行不应带“?”与查询 (the path must be without \"?\" and the query)"},
		{key, with(body, strings.ToUpper(lines[body])), "请求体的 SM3 须为小写十六进制 (the body's SM3 must be lower-case hexadecimal)"},
		{key, with(body, hex.EncodeToString(none[:])), "请求体的 SM3 按空请求体计算了；或代理改动了请求体 (the SM3 is that of an empty body)"},
		{key, with(method, strings.ToLower(lines[method])), "方法须为大写 (the method must be in upper case)"},
		{key, with(query, ""), "查询一行空着 (the query's line is empty)"},
	} {
		if hmac.Equal(wire.MACOf(try.key, try.text), a.MAC) {
			return try.detail, "照下面的待签字符串改正 (mend it as the string to sign below has it)"
		}
	}
	return "HMAC-SM3 与设备算得的不同 (another than the appliance computes)", "把业务系统的待签字符串与下面的逐字节对照；相同则是密钥不对，或算法不是 HMAC-SM3 (hold your string against the one below; if they are equal the key or the algorithm is wrong)"
}

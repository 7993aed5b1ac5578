package api

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"os"
	"runtime/debug"
	"slices"
	"strings"
	"sync"

	"github.com/labstack/echo/v4"

	"yinjian/api/wire"
	"yinjian/appliance/account"
	"yinjian/appliance/problem"
)

const seeContract = "请查阅 /openapi.json (see /openapi.json)"

// maxHeaders is how many header fields a request may have; browsers send some twenty.
const maxHeaders = 64

// plainly refuses requests of a form that no client of ours needs and that two programs could read differently: they are
// the stuff of request smuggling. What net/http refuses by itself (several lengths, transfer codings but chunked, no Host)
// does not come here. A length beside chunked it drops, as RFC 9112 §6.3 has it.
func (s *Server) plainly(next echo.HandlerFunc) echo.HandlerFunc {
	return func(c echo.Context) error {
		r := c.Request()
		fields := 0
		for _, values := range r.Header {
			fields += len(values)
		}
		var p *problem.Problem
		switch {
		case r.ProtoMajor != 1 || r.ProtoMinor != 1: // 1.0 knows no chunked body and needs no Host
			p = problem.Invalid("request-line", "只接受 HTTP/1.1 (HTTP/1.1 alone is taken)")
		case !strings.HasPrefix(r.RequestURI, "/"):
			p = problem.Invalid("request-line", "请求目标应以 / 开头,主机写在 Host 头 (want a target that begins with /, and the host in its header)")
		case r.Host == "":
			p = problem.Invalid("header.Host", "Host 头不能为空 (the Host header is empty)")
		case fields > maxHeaders:
			p = problem.Invalid("header", "请求头超过 %d 个 (more than %d header fields)", maxHeaders, maxHeaders)
		default:
			return next(c)
		}
		c.Response().Header().Set(echo.HeaderConnection, "close")
		return p
	}
}

// recovered makes a panic a 500 of this one request.
func (s *Server) recovered(next echo.HandlerFunc) echo.HandlerFunc {
	return func(c echo.Context) (err error) {
		defer caught(&err)
		return next(c)
	}
}

// caught is deferred by what may panic: the panic becomes its error. What aborts an answer on purpose goes on.
func caught(err *error) {
	if r := recover(); r != nil {
		if r == http.ErrAbortHandler {
			panic(r)
		}
		*err = fmt.Errorf("panic: %v\n%s", r, debug.Stack())
	}
}

// A body says what a route reads and writes.
type body struct {
	takes string // media type; "" for a request without a body
	gives string
	most  int64 // bytes
	lent  bool  // the route keeps nothing of what it read, whose memory is another request's afterwards
}

var noBody = body{gives: echo.MIMEApplicationJSON}

func jsonBody(most int64) body {
	return body{takes: echo.MIMEApplicationJSON, gives: echo.MIMEApplicationJSON, most: most}
}

// lend is b for a route that keeps nothing of what it read.
func lend(b body) body {
	b.lent = true
	return b
}

func stampQuery(most int64) body {
	return body{takes: "application/timestamp-query", gives: "application/timestamp-reply", most: most}
}

// received runs h with the body, read whole and bounded. Nothing in it is looked at before h.
//
// The body is read before the request is admitted: a client that sends slowly holds a connection and what it has sent so
// far, no place among the requests being handled. What is held counts until the answer is written, which is about as long
// as the body, so that a client that does not read holds its own share alone.
func (s *Server) received(b body, h func(c echo.Context, body []byte) error) echo.HandlerFunc {
	return func(c echo.Context) error {
		var room []byte
		if n := c.Request().ContentLength; b.lent && n >= 0 && n < lentBody {
			lent := lentBodies.Get().(*[lentBody + lentRoom]byte)
			x := exchangeOf(c)
			defer func() { x.room = nil; lentBodies.Put(lent) }()
			room, x.room = lent[:0:n+1], lent[lentBody:]
		}
		data, err := s.receive(c, b, room)
		if err != nil {
			return err
		}
		return h(c, data)
	}
}

// lentBodies hold the bodies of routes that keep nothing of them, and what is decoded of their base64: most documents of a
// record are no longer.
var lentBodies = sync.Pool{New: func() any { return new([lentBody + lentRoom]byte) }}

const (
	lentBody = 8 << 10
	lentRoom = lentBody * 3 / 4
)

// receive is the body, in room if that is where it fits.
func (s *Server) receive(c echo.Context, b body, room []byte) ([]byte, error) {
	r := c.Request()
	if p := first(acceptable(r, b.gives), b.readable(r)); p != nil {
		return nil, p
	}
	return s.read(c, b.most, room)
}

// admitted runs h when there is room for one more request of who, within ctx, which ends with the time for handling. The
// place is given back when h begins to answer; see [exchange.answering].
func (s *Server) admitted(c echo.Context, who string, h func(ctx context.Context) error) error {
	r := c.Request()
	handled(r)
	if !exchangeOf(c).enter(who) {
		return problem.New(problem.RateLimited, "同时处理的请求已达上限 (too many requests at once)", retryLater)
	}
	ctx, cancel := context.WithTimeout(r.Context(), s.limits.Handling)
	defer cancel()
	return h(ctx)
}

// authenticated is received and admitted for an application that proves itself and has the right ("" for none in
// particular). Checked are, in this order: the address's failures so far, the MAC, the application's rate, room, and that
// the request is fresh. Who does not know the key learns only that.
func (s *Server) authenticated(b body, right string, h func(ctx context.Context, c echo.Context, app *account.Application, body []byte) error) echo.HandlerFunc {
	inner := s.received(b, func(c echo.Context, data []byte) error {
		x := exchangeOf(c)
		x.size = len(data)
		a := x.authorization
		app, err := s.known(c, a, data)
		if err != nil {
			return err
		}
		x.application = app.ID
		if !s.named(c.Request().Host) {
			return problem.Invalid("header.Host", "请求不是给本机的,Host 不在 listen.names 之内 (the request is for another appliance: its Host is none of listen.names)")
		}
		s.failed.proved(household(x.remote), app.ID)
		if ok, after := s.rates.allow(app); !ok {
			p := problem.New(problem.RateLimited, "该应用的请求过于频繁 (the application's rate is exceeded)", retryLater)
			p.After = after
			return p
		}
		return s.admitted(c, app.ID, func(ctx context.Context) error { // handed on beside the request, of which it would want a copy
			if a != nil { // TLS keeps requests from being sent again: Go's server takes no early data (RFC 8446 §8)
				if err := s.guard.admit(app.ID, a.Nonce, a.At, s.cfg.Clock.Now(), s.limits.nonces(app)); err != nil {
					return err
				}
			}
			switch {
			case app.Stopped:
				return problem.New(problem.ApplicationStopped, "该应用已被管理员停用 (application stopped by an administrator)", "请联系系统管理员 (ask the administrator)")
			case right != "" && !app.Has(right):
				return problem.New(problem.Forbidden, "该应用没有 "+right+" 权限 (the application lacks this right)", "请联系系统管理员授权 (ask the administrator for it)")
			case c.Request().URL.RawQuery != "":
				return problem.Invalid("query", "该地址不接受查询参数 (no query parameter is known here)")
			}
			return h(ctx, c, app, data)
		})
	})
	return func(c echo.Context) error {
		// A request without a well-formed header is refused before its body is read, and so is one from where too many failed.
		x := exchangeOf(c)
		a, err := authorization(c.Request())
		app := ""
		if err == nil {
			app = a.App
		} else if chain := shown(c.Request()); len(chain) > 0 && len(c.Request().Header[echo.HeaderAuthorization]) == 0 {
			if app = s.cfg.Directory.ClientApplication(chain[0]); app != "" {
				x.certified, err = app, nil
			} else {
				err = unauthenticated("缺少 Authorization 头，所示客户端证书也不能代替它 (Authorization header missing, and the client certificate shown does not stand for it)")
			}
		}
		from := household(x.remote)
		if after := s.failed.wait(from, app); after > 0 {
			p := problem.New(problem.RateLimited, "来自该地址的身份验证失败过多 (too many failed authentications from this address)", "请检查应用编号与密钥,稍后重试 (check id and key, try again later)")
			p.After = after
			s.arrived(c, app, p)
			return p
		}
		if err == nil {
			x.authorization = a
			err = inner(c)
		}
		s.arrived(c, app, err)
		if problem.CodeOf(err) == problem.Unauthenticated {
			s.failed.count(from, app)
		}
		return err
	}
}

// shown are the certificates of a TLS 1.3 client, its own first: the handshake has proved that it has the key, and nobody on
// the line has seen them.
func shown(r *http.Request) []*x509.Certificate {
	if r.TLS == nil || r.TLS.Version < tls.VersionTLS13 {
		return nil
	}
	return r.TLS.PeerCertificates
}

// known is the application that sends: by HMAC-SM3, by its client certificate, or by both, as it is registered.
func (s *Server) known(c echo.Context, a *wire.Authorization, data []byte) (app *account.Application, err error) {
	if a == nil {
		var ok bool
		if app, _, ok = s.cfg.Directory.Application(exchangeOf(c).certified); !ok || app.Client == nil || !app.Client.Alone { // it was changed just now
			return nil, unauthenticated("应用未知 (unknown application)")
		}
	} else if app, err = s.proved(c, a, data); err != nil {
		return nil, err
	}
	if app.Client != nil {
		err = s.cfg.Directory.CheckClient(app, shown(c.Request()), s.cfg.Clock.Now().Time)
	}
	return app, err
}

// named says whether a Host header is this appliance's.
func (s *Server) named(host string) bool {
	if len(s.cfg.Names) == 0 {
		return true
	}
	name, _, err := net.SplitHostPort(host)
	if err != nil {
		name = strings.Trim(host, "[]")
	}
	return slices.ContainsFunc(s.cfg.Names, func(n string) bool { return strings.EqualFold(n, name) })
}

func unauthenticated(detail string) *problem.Problem {
	p := problem.New(problem.Unauthenticated, detail, "请检查应用编号、密钥与待签字符串,见 docs/api-auth.md (check id, key and string to sign)")
	p.Field = "header.Authorization"
	return p
}

func authorization(r *http.Request) (*wire.Authorization, error) {
	values := r.Header.Values(echo.HeaderAuthorization)
	switch len(values) {
	case 0:
		return nil, unauthenticated("缺少 Authorization 头 (Authorization header missing)")
	case 1:
	default:
		return nil, unauthenticated("Authorization 头重复 (more than one Authorization header)")
	}
	a, err := wire.ParseAuthorization(values[0])
	if err != nil {
		return nil, unauthenticated("Authorization 头格式不正确 (malformed Authorization header)").With(err)
	}
	return a, nil
}

// proved checks the MAC. An unknown application costs the same work as a wrong key, and gets the same answer.
func (s *Server) proved(c echo.Context, a *wire.Authorization, data []byte) (*account.Application, error) {
	r := c.Request()
	app, key, ok := s.cfg.Directory.Application(a.App)
	if !ok || app == nil || len(key) == 0 {
		ok, key = false, make([]byte, 32)
	}
	text := wire.StringToSign(wire.Signable{Method: r.Method, Path: r.URL.EscapedPath(), Query: r.URL.RawQuery, Host: r.Host, Body: data}, a.App, a.Time, a.Nonce)
	exchangeOf(c).text = text
	if !hmac.Equal(wire.MACOf(key, text), a.MAC) || !ok {
		return nil, unauthenticated("应用编号未知或签名不正确 (unknown application or wrong signature)").With(fmt.Errorf("application %s, known %t", a.App, ok))
	}
	return app, nil
}

// readable checks the body's announced type and size, before any of it is read.
func (b body) readable(r *http.Request) *problem.Problem {
	if r.ContentLength > b.most {
		return tooLarge(b.most)
	}
	if b.takes == "" {
		return nil
	}
	if types := r.Header[echo.HeaderContentType]; len(types) == 1 && types[0] == b.takes && len(r.Header[echo.HeaderContentEncoding]) == 0 {
		return nil // as clients send it
	}
	if enc := strings.Join(r.Header.Values(echo.HeaderContentEncoding), ","); enc != "" && !strings.EqualFold(enc, "identity") {
		return problem.New(unsupportedMediaType, "不接受压缩的请求体 (no Content-Encoding is taken)", seeContract)
	}
	media, params, err := mime.ParseMediaType(strings.Join(r.Header.Values(echo.HeaderContentType), ", ")) // of two, none is right
	charset := params["charset"]
	delete(params, "charset")
	if err != nil || media != b.takes || len(params) != 0 || charset != "" && (b.takes != echo.MIMEApplicationJSON || !strings.EqualFold(charset, "utf-8")) {
		return problem.New(unsupportedMediaType, "Content-Type 应为 "+b.takes+" (want this Content-Type)", seeContract)
	}
	return nil
}

func tooLarge(most int64) *problem.Problem {
	return problem.New(problem.TooLarge, fmt.Sprintf("请求体超过 %d 字节 (body exceeds %d bytes)", most, most),
		"请缩小内容,或改用摘要方式 (send less, or a digest)")
}

// acceptable checks the Accept header (RFC 9110 §12.5.1): without one, or with a range that takes our type, we go on.
func acceptable(r *http.Request, gives string) *problem.Problem {
	values := r.Header[echo.HeaderAccept]
	if len(values) == 0 || len(values) == 1 && (values[0] == gives || values[0] == "*/*") {
		return nil
	}
	kind, _, _ := strings.Cut(gives, "/")
	best, taken := 0, false // the most specific range decides
	for _, one := range strings.Split(strings.Join(values, ","), ",") {
		media, params, err := mime.ParseMediaType(one)
		if err != nil {
			continue
		}
		rank := map[string]int{gives: 3, kind + "/*": 2, "*/*": 1}[media]
		if rank > best {
			best, taken = rank, strings.Trim(params["q"], "0.") != "" || params["q"] == ""
		}
	}
	if taken {
		return nil
	}
	return problem.New(notAcceptable, "只能提供 "+gives+" (this is the only type given)", seeContract)
}

// read takes at most `most` bytes of the body. They are counted as they arrive, not as they are announced: to use up
// its share, an address must send it. They count until [exchange.finish]. They are put into room as far as it goes.
func (s *Server) read(c echo.Context, most int64, room []byte) (data []byte, err error) {
	r, x := c.Request(), exchangeOf(c)
	defer func() { x.bodyRead = err == nil }()
	if r.Body == nil || r.Body == http.NoBody {
		return nil, nil
	}
	if most == 0 { // a route without a body: one byte is one too many
		if n, _ := io.ReadFull(r.Body, make([]byte, 1)); n > 0 {
			return nil, tooLarge(0)
		}
		return nil, nil
	}
	limit := most + 1 // one more shows a body that is too long
	if r.ContentLength >= 0 {
		limit = min(limit, r.ContentLength+1)
	}
	for {
		if int64(len(data)) == int64(cap(data)) {
			grown := min(max(2*int64(cap(data)), 4<<10), limit)
			more := grown - int64(cap(data))
			if more <= 0 {
				return nil, tooLarge(most)
			}
			if !x.hold(more) {
				return nil, problem.New(problem.RateLimited, "设备正在接收的数据已达上限 (too much data in flight)", retryLater)
			}
			if int64(cap(room)) >= grown {
				data = room[:len(data):grown]
			} else {
				data = append(make([]byte, 0, grown), data...)
			}
		}
		n, err := r.Body.Read(data[len(data):cap(data)])
		data = data[:len(data)+n]
		switch {
		case int64(len(data)) > most:
			return nil, tooLarge(most)
		case errors.Is(err, io.EOF):
			return data, nil
		case errors.Is(err, os.ErrDeadlineExceeded):
			return nil, problem.New(requestTimeout, "请求体发送过慢 (body sent too slowly)", "请检查网络后重试 (check the network, then retry)").With(err)
		case err != nil:
			return nil, problem.Invalid("", "请求体不完整 (body incomplete)").With(err)
		}
	}
}

// answers are buffers for encoded answers; one that a long answer has made large is not kept.
var answers = sync.Pool{New: func() any { return new(bytes.Buffer) }}

const keptAnswer = 64 << 10

// answer writes v as JSON, whole or not at all.
func answer(c echo.Context, v any) error {
	out := answers.Get().(*bytes.Buffer)
	defer func() {
		if out.Cap() <= keptAnswer {
			out.Reset()
			answers.Put(out)
		}
	}()
	if err := json.NewEncoder(out).Encode(v); err != nil {
		return fmt.Errorf("api: encoding the answer: %w", err)
	}
	return send(c, http.StatusOK, echo.MIMEApplicationJSON, bytes.TrimSuffix(out.Bytes(), []byte("\n")))
}

package api_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"yinjian/api"
	"yinjian/appliance/account"
	"yinjian/appliance/sign"
)

// A rawRequest is a request as bytes: each part may be spoilt, after the rest was signed.
type rawRequest struct {
	line    string
	host    string
	headers []string // lines, without their end
	body    string
}

func (r rawRequest) String() string {
	lines := append([]string{r.line}, r.headers...)
	if r.host != "" {
		lines = slices.Insert(lines, 1, "Host: "+r.host)
	}
	return strings.Join(lines, "\r\n") + "\r\n\r\n" + r.body
}

// with answers r with other headers; one that begins with "-" removes those of its name.
func (r rawRequest) with(headers ...string) rawRequest {
	r.headers = slices.Clone(r.headers)
	for _, h := range headers {
		if name, ok := strings.CutPrefix(h, "-"); ok {
			r.headers = slices.DeleteFunc(r.headers, func(s string) bool { return strings.HasPrefix(s, name+":") })
		} else {
			r.headers = append(r.headers, h)
		}
	}
	return r
}

// signedPost is a good POST /v1/sign; signedGet a good GET /v1/evidence.
func (k *kit) signedPost(body []byte) rawRequest {
	return k.asBytes(call{path: "/v1/sign", body: body})
}
func (k *kit) signedGet() rawRequest {
	return k.asBytes(call{method: "GET", path: "/v1/evidence/" + record})
}

func (k *kit) asBytes(c call) rawRequest {
	r := k.request(c)
	raw := rawRequest{line: r.Method + " " + r.URL.Path + " HTTP/1.1", host: r.Host, body: string(c.body)}
	for _, name := range slices.Sorted(maps.Keys(r.Header)) {
		raw.headers = append(raw.headers, name+": "+r.Header.Get(name))
	}
	if r.Method == http.MethodPost {
		raw.headers = append(raw.headers, fmt.Sprintf("Content-Length: %d", len(c.body)))
	}
	return raw
}

func chunked(chunks ...string) string {
	var b strings.Builder
	for _, c := range append(chunks, "") {
		fmt.Fprintf(&b, "%x\r\n%s\r\n", len(c), c)
	}
	return b.String()
}

// TestSmuggling sends what two programs could read differently, byte for byte, over the real listener. Whatever comes
// back, at most one authenticated request is handled, and only where the table says so.
func TestSmuggling(t *testing.T) {
	t.Parallel()
	k := start(t)
	var handled atomic.Int64
	k.services.sign = func(ctx context.Context, app *account.Application, req *sign.Request) (*sign.Result, error) {
		handled.Add(1)
		return newServices().sign(ctx, app, req)
	}
	k.services.bundle = func(context.Context, *account.Application, string) ([]byte, error) {
		handled.Add(1)
		return []byte(`{"format":"x"}`), nil
	}
	body := encode(t, signBody())
	hidden := "GET /v1/evidence/" + record + " HTTP/1.1\r\nHost: " + k.addr + "\r\n\r\n" // a whole request, without a signature
	post := func(change func(*rawRequest)) string {
		r := k.signedPost(body)
		change(&r)
		return r.String()
	}
	headers := func(h ...string) string { return post(func(r *rawRequest) { *r = r.with(h...) }) }
	get := func(change func(*rawRequest)) string {
		r := k.signedGet()
		change(&r)
		return r.String()
	}
	length := func(v string) string { return headers("-Content-Length", "Content-Length: "+v) }
	coded := func(te, body string) string {
		return post(func(r *rawRequest) { *r = r.with("-Content-Length", te); r.body = body })
	}
	both := func(n int, tail string) string {
		return post(func(r *rawRequest) {
			*r = r.with("-Content-Length", fmt.Sprintf("Content-Length: %d", n), "Transfer-Encoding: chunked")
			r.body = chunked(r.body) + tail
		})
	}
	plain := chunked(string(body))
	twice := k.signedGet().String()

	for name, row := range map[string]struct {
		bytes   string
		answers []int // statuses, in order; nil for any: the connection may end before all was sent
		handled int64
	}{
		"a good one": {k.signedPost(body).String(), []int{200}, 1},

		// Two ways to say how long the body is.
		"CL and TE, CL short":        {both(4, hidden), []int{200, 401}, 1},
		"CL and TE, CL long":         {both(len(plain)+len(hidden), hidden), []int{200, 401}, 1},
		"CL and TE, CL wrong":        {headers("Transfer-Encoding: chunked", "-Content-Length", "Content-Length: x"), []int{400}, 0},
		"two lengths, equal":         {headers(fmt.Sprintf("Content-Length: %d", len(body))), []int{200}, 1},
		"two lengths, unequal":       {headers("Content-Length: 4"), []int{400}, 0},
		"two lengths, other case":    {headers("content-length: 4"), []int{400}, 0},
		"length with sign":           {length(fmt.Sprintf("+%d", len(body))), []int{400}, 0},
		"length in a list":           {length(fmt.Sprintf("%d, %d", len(body), len(body))), []int{400}, 0},
		"length in hexadecimal":      {length("0x10"), []int{400}, 0},
		"length negative":            {length("-1"), []int{400}, 0},
		"length empty":               {length(""), []int{400}, 0},
		"length beyond 64 bits":      {length("18446744073709551616"), []int{400}, 0},
		"length with space inside":   {length("1 0"), []int{400}, 0},
		"space before colon":         {headers("-Content-Length", fmt.Sprintf("Content-Length : %d", len(body))), []int{400}, 0},
		"tab before colon":           {headers("Transfer-Encoding\t: chunked"), []int{400}, 0},
		"more than the length":       {k.signedPost(body).String() + hidden, []int{200, 401}, 1},
		"garbage after the length":   {k.signedPost(body).String() + "\x00\x01\x02\r\n\r\n", []int{200, 400}, 1},
		"a body on GET hides":        {get(func(r *rawRequest) { *r = r.with(fmt.Sprintf("Content-Length: %d", len(hidden))); r.body = hidden }), []int{413}, 0},
		"a chunked body on GET":      {get(func(r *rawRequest) { *r = r.with("Transfer-Encoding: chunked"); r.body = chunked(hidden) }), []int{413}, 0},
		"an underscore":              {headers("Transfer_Encoding: chunked"), []int{200}, 1},
		"TE in the body of a header": {headers("X-A: b\rTransfer-Encoding: chunked"), []int{400}, 0},

		// Transfer codings.
		"chunked":               {coded("Transfer-Encoding: chunked", plain+hidden), []int{200, 401}, 1},
		"chunked in capitals":   {coded("TRANSFER-ENCODING: CHUNKED", plain), []int{200}, 1},
		"chunked after tab":     {coded("Transfer-Encoding:\tchunked", plain), []int{200}, 1},
		"chunked folded":        {coded("Transfer-Encoding:\r\n chunked", plain), []int{200}, 1},
		"identity":              {headers("Transfer-Encoding: identity"), []int{501}, 0},
		"chunked twice":         {coded("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", plain), []int{501}, 0},
		"chunked and identity":  {coded("Transfer-Encoding: chunked, identity", plain), []int{501}, 0},
		"identity and chunked":  {coded("Transfer-Encoding: identity\r\nTransfer-Encoding: chunked", plain), []int{501}, 0},
		"gzip and chunked":      {coded("Transfer-Encoding: gzip, chunked", plain), []int{501}, 0},
		"xchunked":              {coded("Transfer-Encoding: xchunked", plain), []int{501}, 0},
		"chunked in quotes":     {coded(`Transfer-Encoding: "chunked"`, plain), []int{501}, 0},
		"chunked, vertical tab": {coded("Transfer-Encoding: \x0bchunked", plain), []int{400}, 0},
		"chunked; q=1":          {coded("Transfer-Encoding: chunked;q=1", plain), []int{501}, 0},
		"empty TE":              {headers("Transfer-Encoding:"), []int{501}, 0},

		// Chunks.
		"extension":               {coded("Transfer-Encoding: chunked", strings.Replace(plain, "\r\n", ";a=b\r\n", 1)), []int{200}, 1},
		"extension of a mebibyte": {coded("Transfer-Encoding: chunked", strings.Replace(plain, "\r\n", ";a="+strings.Repeat("b", 1<<20)+"\r\n", 1)), nil, 0},
		"many extensions":         {coded("Transfer-Encoding: chunked", strings.Repeat("1;a="+strings.Repeat("b", 1000)+"\r\n \r\n", 1000)+plain), nil, 0},
		"extension with LF":       {coded("Transfer-Encoding: chunked", strings.Replace(plain, "\r\n", ";a\nb\r\n", 1)), []int{400}, 0},
		"chunk size 0x":           {coded("Transfer-Encoding: chunked", "0x"+plain), []int{400}, 0},
		"chunk size signed":       {coded("Transfer-Encoding: chunked", "+"+plain), []int{400}, 0},
		"chunk size negative":     {coded("Transfer-Encoding: chunked", "-1\r\n"+plain), []int{400}, 0},
		"chunk size beyond 64":    {coded("Transfer-Encoding: chunked", "10000000000000001\r\n"+plain), []int{400}, 0},
		"chunk size empty":        {coded("Transfer-Encoding: chunked", "\r\n"+plain), []int{400}, 0},
		"chunk size in words":     {coded("Transfer-Encoding: chunked", "five\r\n"+plain), []int{400}, 0},
		"chunk without its end":   {coded("Transfer-Encoding: chunked", fmt.Sprintf("%x\r\n%s0\r\n\r\n", len(body), body)), []int{400}, 0},
		"chunk longer than said":  {coded("Transfer-Encoding: chunked", fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", len(body)-1, body)), []int{400}, 0},
		"chunks with LF alone":    {coded("Transfer-Encoding: chunked", strings.ReplaceAll(plain, "\r\n", "\n")), []int{400}, 0},
		"a trailer of weight":     {coded("Transfer-Encoding: chunked\r\nTrailer: Authorization", strings.TrimSuffix(plain, "\r\n")+"Authorization: YJ1-HMAC-SM3 x\r\nContent-Length: 4\r\n\r\n"), []int{200}, 1},
		"chunked, no end":         {coded("Transfer-Encoding: chunked", strings.TrimSuffix(plain, "0\r\n\r\n")), []int{400}, 0},

		// Lines.
		"LF alone":               {strings.ReplaceAll(headers(), "\r\n", "\n"), []int{200}, 1},
		"CR alone":               {strings.ReplaceAll(get(func(*rawRequest) {}), "\r\n", "\r"), []int{400}, 0},
		"a folded header":        {headers("X-A: b\r\n c"), []int{200}, 1},
		"a fold at once":         {post(func(r *rawRequest) { r.line += "\r\n X-A: b" }), []int{400}, 0},
		"NUL in a header":        {headers("X-A: b\x00c"), []int{400}, 0},
		"NUL in a name":          {headers("X-\x00A: b"), []int{400}, 0},
		"no colon":               {headers("X-A"), []int{400}, 0},
		"no name":                {headers(": x"), []int{400}, 0},
		"a header of 64 KiB":     {headers("X-A: " + strings.Repeat("a", 64<<10)), nil, 0},
		"a thousand headers":     {headers(slices.Repeat([]string{"A:"}, 1000)...), []int{400}, 0},
		"64 headers and a few":   {headers(slices.Repeat([]string{"A:"}, 62)...), []int{400}, 0},
		"a line before it":       {"\r\n" + headers(), []int{400}, 0},
		"two spaces":             {post(func(r *rawRequest) { r.line = strings.Replace(r.line, " ", "  ", 1) }), []int{400}, 0},
		"tabs":                   {post(func(r *rawRequest) { r.line = strings.ReplaceAll(r.line, " ", "\t") }), []int{400}, 0},
		"lower-case method":      {post(func(r *rawRequest) { r.line = strings.Replace(r.line, "POST", "post", 1) }), []int{405}, 0},
		"method with a colon":    {post(func(r *rawRequest) { r.line = strings.Replace(r.line, "POST", "PO:ST", 1) }), []int{400}, 0},
		"NUL in the target":      {post(func(r *rawRequest) { r.line = strings.Replace(r.line, "sign", "si\x00gn", 1) }), []int{400}, 0},
		"a fragment":             {post(func(r *rawRequest) { r.line = strings.Replace(r.line, "sign", "sign#x", 1) }), []int{404}, 0},
		"another method, hinted": {headers("X-HTTP-Method-Override: DELETE"), []int{200}, 1},

		// Target and Host.
		"absolute target":          {post(func(r *rawRequest) { r.line = "POST https://" + r.host + "/v1/sign HTTP/1.1" }), []int{400}, 0},
		"absolute, other Host":     {post(func(r *rawRequest) { r.line, r.host = "POST https://"+r.host+"/v1/sign HTTP/1.1", "other.campus" }), []int{400}, 0},
		"absolute, of another":     {post(func(r *rawRequest) { r.line = "POST https://other.campus/v1/sign HTTP/1.1" }), []int{400}, 0},
		"authority":                {post(func(r *rawRequest) { r.line = "CONNECT " + r.host + " HTTP/1.1" }), []int{400}, 0},
		"asterisk":                 {post(func(r *rawRequest) { r.line = "OPTIONS * HTTP/1.1" }), []int{400}, 0},
		"two slashes":              {post(func(r *rawRequest) { r.line = "POST //v1/sign HTTP/1.1" }), []int{404}, 0},
		"dots":                     {post(func(r *rawRequest) { r.line = "POST /v1/../v1/sign HTTP/1.1" }), []int{404}, 0},
		"dots, encoded":            {post(func(r *rawRequest) { r.line = "POST /v1/%2e%2e/v1/sign HTTP/1.1" }), []int{404}, 0},
		"no Host":                  {post(func(r *rawRequest) { r.host = "" }), []int{400}, 0},
		"empty Host":               {post(func(r *rawRequest) { *r = r.with("Host:"); r.host = "" }), []int{400}, 0},
		"two Hosts":                {headers("Host: other.campus"), []int{400}, 0},
		"two equal Hosts":          {post(func(r *rawRequest) { *r = r.with("Host: " + r.host) }), []int{400}, 0},
		"Host with space":          {post(func(r *rawRequest) { r.host += " x" }), []int{400}, 0},
		"Host with user":           {post(func(r *rawRequest) { r.host = "a@" + r.host }), []int{400}, 0},
		"other Host":               {post(func(r *rawRequest) { r.host = "other.campus" }), []int{401}, 0},
		"Host, forwarded":          {headers("X-Forwarded-Host: other.campus", "Forwarded: host=other.campus"), []int{200}, 1},
		"credentials in a trailer": {coded("Transfer-Encoding: chunked\r\nTrailer: Idempotency-Key", strings.TrimSuffix(plain, "\r\n")+"Idempotency-Key: other\r\n\r\n"), []int{200}, 1},

		// Versions.
		"HTTP/1.0":           {post(func(r *rawRequest) { r.line = strings.Replace(r.line, "1.1", "1.0", 1) }), []int{400}, 0},
		"HTTP/1.0 chunked":   {strings.Replace(coded("Transfer-Encoding: chunked", plain), "HTTP/1.1", "HTTP/1.0", 1), []int{400}, 0},
		"HTTP/0.9":           {"GET /v1/evidence/" + record + "\r\n\r\n", []int{400}, 0},
		"HTTP/1.2":           {post(func(r *rawRequest) { r.line = strings.Replace(r.line, "1.1", "1.2", 1) }), []int{400}, 0},
		"HTTP/2.0":           {post(func(r *rawRequest) { r.line = strings.Replace(r.line, "1.1", "2.0", 1) }), []int{505}, 0},
		"HTTP/11":            {post(func(r *rawRequest) { r.line = strings.Replace(r.line, "1.1", "11", 1) }), []int{400}, 0},
		"http/1.1":           {post(func(r *rawRequest) { r.line = strings.Replace(r.line, "HTTP", "http", 1) }), []int{400}, 0},
		"HTTP/2's preface":   {"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + "\x00\x00\x00\x04\x00\x00\x00\x00\x00", []int{400}, 0},
		"an upgrade to h2c":  {headers("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__"), []int{200}, 1},
		"a websocket":        {get(func(r *rawRequest) { *r = r.with("Connection: Upgrade", "Upgrade: websocket") }), []int{200}, 1},
		"TLS within":         {"\x16\x03\x01\x00\x05hello", []int{400}, 0},
		"an odd expectation": {headers("Expect: 200-ok"), []int{417}, 0},

		// One after the other on one connection: each is authenticated for itself.
		"the same twice":         {twice + twice, []int{200, 401}, 1},
		"one, and one unsigned":  {k.signedGet().String() + hidden, []int{200, 401}, 1},
		"unsigned, and then one": {hidden + k.signedGet().String(), []int{401, 200}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			before := handled.Load()
			statuses := k.exchange([]byte(row.bytes))
			got := handled.Load() - before
			if got != row.handled || row.answers != nil && !slices.Equal(statuses, row.answers) {
				t.Errorf("%d requests were handled, want %d; answers %v, want %v", got, row.handled, statuses, row.answers)
			}
		})
	}
}

// HTTP/2 is not offered, so nobody can begin with it: a client that insists finds no protocol in common.
func TestNoHTTP2(t *testing.T) {
	t.Parallel()
	k := start(t)
	_, pool := certificate(t)
	for offer, want := range map[string]string{"h2": "refused", "h2,http/1.1": "http/1.1", "": "", "http/1.0": "refused"} {
		cfg := &tls.Config{RootCAs: pool, Time: func() time.Time { return epoch }}
		if offer != "" {
			cfg.NextProtos = strings.Split(offer, ",")
		}
		got := "refused"
		if c, err := tls.Dial("tcp", k.addr, cfg); err == nil {
			got = c.ConnectionState().NegotiatedProtocol
			c.Close()
		}
		if got != want {
			t.Errorf("offered %q: %q, want %q", offer, got, want)
		}
	}
}

// exchange sends bytes on a connection of their own and answers the statuses of all that comes back until it closes.
func (k *kit) exchange(data []byte) (statuses []int) {
	k.t.Helper()
	c := k.dial()
	defer c.Close()
	go func() {
		_, _ = c.Write(data) // the server may close before the end
		_ = c.CloseWrite()
	}()
	in := bufio.NewReader(c)
	for {
		resp, err := http.ReadResponse(in, nil)
		if err != nil {
			var timeout net.Error
			if errors.As(err, &timeout) && timeout.Timeout() {
				k.t.Errorf("no end after %v", statuses)
			}
			return statuses
		}
		_, _ = io.Copy(io.Discard, resp.Body)
		statuses = append(statuses, resp.StatusCode)
	}
}

// A hundred megabytes without a length: the server stops reading at its limit, and the client cannot send the rest.
func TestEndlessBody(t *testing.T) {
	t.Parallel()
	k := start(t, func(c *api.Config, _ *http.Server) { c.Limits.Body = 1 << 20 })
	const all = 100 << 20
	var sending sync.WaitGroup
	for range 4 {
		c := k.dial()
		r := k.signedPost(nil).with("-Content-Length", "Transfer-Encoding: chunked")
		sending.Go(func() {
			sent := 0
			if _, err := io.WriteString(c, r.String()); err != nil {
				t.Error(err)
			}
			answered := make(chan string, 1)
			go func() {
				resp, err := http.ReadResponse(bufio.NewReader(c), nil)
				if err != nil {
					answered <- err.Error()
					return
				}
				answered <- resp.Status
			}()
			chunk := fmt.Sprintf("%x\r\n%s\r\n", 64<<10, strings.Repeat(" ", 64<<10))
			for sent < all {
				n, err := io.WriteString(c, chunk)
				sent += n
				if err != nil {
					break
				}
			}
			// What the server did not read is in the sockets' buffers, some megabytes each.
			if sent > 20<<20 {
				t.Errorf("%d bytes were taken", sent)
			}
			if got := <-answered; !strings.HasPrefix(got, "413") {
				t.Errorf("answer: %s", got)
			}
		})
	}
	sending.Wait()
	if got := k.do(certs); got.status != 200 {
		t.Errorf("afterwards: %d", got.status)
	}
}

// A client that asks first sends no body that would be refused.
func TestExpectContinue(t *testing.T) {
	t.Parallel()
	k := start(t)
	body := encode(t, signBody())
	for name, row := range map[string]struct {
		header string
		status int
	}{
		"good":         {k.signedPost(body).with("Expect: 100-continue").String(), 200},
		"100 MB":       {k.signedPost(body).with("-Content-Length", "Content-Length: 104857600", "Expect: 100-continue").String(), 413},
		"unsigned":     {k.signedPost(body).with("-Authorization", "Expect: 100-continue").String(), 401},
		"media type":   {k.signedPost(body).with("-Content-Type", "Expect: 100-continue").String(), 415},
		"wrong target": {k.asBytes(call{path: "/v1/sing", body: body}).with("Expect: 100-continue").String(), 404},
	} {
		t.Run(name, func(t *testing.T) {
			c := k.dial()
			header, _, _ := strings.Cut(row.header, "\r\n\r\n")
			fmt.Fprintf(c, "%s\r\n\r\n", header)
			in := bufio.NewReader(c)
			resp, err := http.ReadResponse(in, nil)
			if err != nil {
				t.Fatal(err)
			}
			if asked := resp.StatusCode == 100; asked != (row.status == 200) {
				t.Fatalf("first answer %d", resp.StatusCode)
			} else if asked {
				if _, err := c.Write(body); err != nil {
					t.Fatal(err)
				}
				if resp, err = http.ReadResponse(in, nil); err != nil {
					t.Fatal(err)
				}
			}
			if resp.StatusCode != row.status || resp.Close != (row.status != 200) {
				t.Errorf("answer %d, close %t", resp.StatusCode, resp.Close)
			}
		})
	}
}

// A body that arrives byte by byte has its time as a whole, and holds no place meanwhile.
func TestDribblingBody(t *testing.T) {
	t.Parallel()
	k := start(t, func(c *api.Config, srv *http.Server) {
		c.Limits.Concurrent = 1
		srv.ReadTimeout = 600 * time.Millisecond
	})
	c := k.dial()
	k.raw(c, 1<<20)
	answered := make(chan string, 1)
	go func() { b, _ := io.ReadAll(c); answered <- string(b) }()
	if got := k.do(certs); got.status != 200 {
		t.Errorf("another meanwhile: %d %s", got.status, got.body)
	}
	for {
		select {
		case got := <-answered:
			if !strings.HasPrefix(got, "HTTP/1.1 408 ") {
				t.Errorf("answer = %s", got)
			}
			return
		case <-time.After(20 * time.Millisecond):
			_, _ = io.WriteString(c, " ") // the server may be gone
		}
	}
}

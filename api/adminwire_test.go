package api_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"yinjian/api"
)

// A countingAdmin counts what is asked of it.
type countingAdmin struct {
	api.Admin
	n *atomic.Int64
}

func (a countingAdmin) AuditVerify(context.Context, string, api.AuditVerify) (any, error) {
	a.n.Add(1)
	return m{}, nil
}

func (a countingAdmin) ListAlarms(context.Context, string) (any, error) {
	a.n.Add(1)
	return m{}, nil
}

// wire sends bytes to the administrators' listener, on a connection of their own, and answers the statuses of all that comes
// back until it closes.
func (o *office) wire(t *testing.T, data string) (statuses []int) {
	t.Helper()
	_, pool := certificate(t)
	c, err := tls.Dial("tcp", strings.TrimPrefix(o.url, "https://"), &tls.Config{RootCAs: pool, Time: func() time.Time { return epoch }})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(2 * time.Minute)); err != nil {
		t.Fatal(err)
	}
	go func() {
		_, _ = io.WriteString(c, data) // the server may close before the end
		_ = c.CloseWrite()
	}()
	for in := bufio.NewReader(c); ; {
		resp, err := http.ReadResponse(in, nil)
		if err != nil {
			var timeout net.Error
			if errors.As(err, &timeout) && timeout.Timeout() {
				t.Errorf("no end after %v", statuses)
			}
			return statuses
		}
		_, _ = io.Copy(io.Discard, resp.Body)
		statuses = append(statuses, resp.StatusCode)
	}
}

// TestSmugglingToAdministration sends to the administrators' listener what two programs could read differently, byte for byte.
// Whatever comes back, at most one request with a session is handled, and only where the table says so; what is hidden in a
// body or behind it is never handled as the one before was.
func TestSmugglingToAdministration(t *testing.T) {
	t.Parallel()
	var handled atomic.Int64
	o := openOffice(t, func(c *api.Config, _ *http.Server) {
		c.Admin = countingAdmin{c.Admin, &handled}
		c.Names = []string{"127.0.0.1", "yinjian.hospital.example"}
	})
	token := o.login(t, false, "wang")
	host := strings.TrimPrefix(o.url, "https://")
	const body = `{}`
	hidden := "GET /admin/v1/alarms HTTP/1.1\r\nHost: " + host + "\r\n\r\n" // a whole request, without a session
	post := rawRequest{line: "POST /admin/v1/audit/verify HTTP/1.1", host: host, body: body, headers: []string{
		"Authorization: Bearer " + token, "Content-Type: application/json", fmt.Sprintf("Content-Length: %d", len(body)),
	}}
	get := rawRequest{line: "GET /admin/v1/alarms HTTP/1.1", host: host, headers: []string{"Authorization: Bearer " + token}}
	page := rawRequest{line: "GET /console/login HTTP/1.1", host: host}
	headers := func(h ...string) string { return post.with(h...).String() }
	changed := func(r rawRequest, change func(*rawRequest)) string {
		r.headers = slices.Clone(r.headers)
		change(&r)
		return r.String()
	}
	line := func(r rawRequest, text string) string { return changed(r, func(r *rawRequest) { r.line = text }) }
	coded := func(te, body string) string {
		r := post.with("-Content-Length", te)
		r.body = body
		return r.String()
	}
	plain := chunked(body)
	both := func(n int, tail string) string {
		r := post.with("-Content-Length", fmt.Sprintf("Content-Length: %d", n), "Transfer-Encoding: chunked")
		r.body = plain + tail
		return r.String()
	}
	cookie := "Cookie: __Host-yinjian=" + token
	form := func(r rawRequest, body string, h ...string) string {
		r = r.with(append([]string{"Content-Type: application/x-www-form-urlencoded", fmt.Sprintf("Content-Length: %d", len(body))}, h...)...)
		r.body = body
		return r.String()
	}
	login := rawRequest{line: "POST /console/login HTTP/1.1", host: host}

	for name, row := range map[string]struct {
		bytes   string
		answers []int // statuses, in order; nil for any: the connection may end before all was sent
		handled int64
	}{
		"a good one":               {post.String(), []int{200}, 1},
		"CL and TE, CL short":      {both(1, hidden), []int{200, 401}, 1},
		"CL and TE, CL long":       {both(len(plain)+len(hidden), hidden), []int{200, 401}, 1},
		"CL and TE, CL wrong":      {headers("Transfer-Encoding: chunked", "-Content-Length", "Content-Length: x"), []int{400}, 0},
		"two lengths, unequal":     {headers("Content-Length: 1"), []int{400}, 0},
		"two lengths, equal":       {headers("Content-Length: 2"), []int{200}, 1},
		"length with sign":         {headers("-Content-Length", "Content-Length: +2"), []int{400}, 0},
		"length in a list":         {headers("-Content-Length", "Content-Length: 2, 2"), []int{400}, 0},
		"length with space":        {headers("-Content-Length", "Content-Length : 2"), []int{400}, 0},
		"more than the length":     {post.String() + hidden, []int{200, 401}, 1},
		"a body on GET hides":      {changed(get, func(r *rawRequest) { *r = r.with(fmt.Sprintf("Content-Length: %d", len(hidden))); r.body = hidden }), []int{413}, 0},
		"TE: chunked, in capitals": {coded("TRANSFER-ENCODING: CHUNKED", plain), []int{200}, 1},
		"TE: identity":             {headers("Transfer-Encoding: identity"), []int{501}, 0},
		"TE: xchunked":             {coded("Transfer-Encoding: xchunked", plain), []int{501}, 0},
		"TE: chunked twice":        {coded("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", plain), []int{501}, 0},
		"TE: gzip, chunked":        {coded("Transfer-Encoding: gzip, chunked", plain), []int{501}, 0},
		"TE: chunked;q=1":          {coded("Transfer-Encoding: chunked;q=1", plain), []int{501}, 0},
		"TE after a vertical tab":  {coded("Transfer-Encoding: \x0bchunked", plain), []int{400}, 0},
		"TE before a space":        {headers("Transfer-Encoding : chunked"), []int{400}, 0},
		"TE folded":                {coded("Transfer-Encoding:\r\n chunked", plain), []int{200}, 1},
		"a folded header":          {headers("X-A: b\r\n c"), []int{200}, 1},
		"a fold at once":           {line(post, post.line+"\r\n X-A: b"), []int{400}, 0},
		"CR in a header":           {headers("X-A: b\rTransfer-Encoding: chunked"), []int{400}, 0},
		"chunk size signed":        {coded("Transfer-Encoding: chunked", "+"+plain), []int{400}, 0},
		"chunk size beyond 64":     {coded("Transfer-Encoding: chunked", "10000000000000001\r\n"+plain), []int{400}, 0},
		"chunk without its end":    {coded("Transfer-Encoding: chunked", "2\r\n{}0\r\n\r\n"), []int{400}, 0},
		"chunks with LF alone":     {coded("Transfer-Encoding: chunked", strings.ReplaceAll(plain, "\r\n", "\n")), []int{400}, 0},
		"a session in a trailer":   {strings.Replace(coded("Transfer-Encoding: chunked\r\nTrailer: Authorization", strings.TrimSuffix(plain, "\r\n")+"Authorization: Bearer "+token+"\r\n\r\n"), "Authorization: Bearer "+token+"\r\nContent-Type", "Content-Type", 1), []int{401}, 0},
		"LF alone":                 {strings.ReplaceAll(post.String(), "\r\n", "\n"), []int{200}, 1},
		"CR alone":                 {strings.ReplaceAll(get.String(), "\r\n", "\r"), []int{400}, 0},
		"NUL in a header":          {headers("X-A: b\x00c"), []int{400}, 0},
		"a line before it":         {"\r\n" + post.String(), []int{400}, 0},
		"a header of 64 KiB":       {headers("X-A: " + strings.Repeat("a", 64<<10)), nil, 0},
		"two sessions":             {headers("Authorization: Bearer " + strings.Repeat("0a", 32)), []int{400}, 0},
		"absolute":                 {line(post, "POST https://"+host+"/admin/v1/audit/verify HTTP/1.1"), []int{400}, 0},
		"absolute, of another":     {line(post, "POST https://evil.example/admin/v1/audit/verify HTTP/1.1"), []int{400}, 0},
		"absolute, a page":         {line(page, "GET https://evil.example/console/login HTTP/1.1"), []int{421}, 0},
		"absolute, other Host": {changed(post, func(r *rawRequest) {
			r.line, r.host = "POST https://"+host+"/admin/v1/audit/verify HTTP/1.1", "evil.example"
		}), []int{400}, 0},
		"absolute, a page, Host":    {changed(page, func(r *rawRequest) { r.line, r.host = "GET https://evil.example/console/login HTTP/1.1", host }), []int{421}, 0},
		"authority":                 {line(post, "CONNECT "+host+" HTTP/1.1"), []int{400}, 0},
		"asterisk":                  {line(get, "OPTIONS * HTTP/1.1"), []int{400}, 0},
		"no Host":                   {changed(post, func(r *rawRequest) { r.host = "" }), []int{400}, 0},
		"two Hosts":                 {headers("Host: evil.example"), []int{400}, 0},
		"another Host":              {changed(post, func(r *rawRequest) { r.host = "evil.example" }), []int{400}, 0},
		"another Host, a page":      {changed(page, func(r *rawRequest) { r.host = "evil.example" }), []int{421}, 0},
		"Host, forwarded":           {headers("X-Forwarded-Host: evil.example", "Forwarded: host=evil.example"), []int{200}, 1},
		"dots":                      {line(post, "POST /admin/v1/session/../audit/verify HTTP/1.1"), []int{404}, 0},
		"dots, encoded":             {line(post, "POST /admin/v1/%2e%2e/v1/audit/verify HTTP/1.1"), []int{404}, 0},
		"dots out of the pages":     {line(post, "POST /console/../admin/v1/audit/verify HTTP/1.1"), nil, 0},
		"two slashes":               {line(post, "POST //admin/v1/audit/verify HTTP/1.1"), []int{404}, 0},
		"HTTP/1.0":                  {line(post, "POST /admin/v1/audit/verify HTTP/1.0"), []int{400}, 0},
		"HTTP/0.9":                  {"GET /admin/v1/alarms\r\n\r\n", []int{400}, 0},
		"HTTP/2's preface":          {"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", []int{400}, 0},
		"an upgrade to h2c":         {get.with("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__").String(), []int{200}, 1},
		"one, and one without":      {get.String() + hidden, []int{200, 401}, 1},
		"one without, and one":      {hidden + get.String(), []int{401, 200}, 1},
		"a cookie alone":            {strings.Replace(post.with(cookie).String(), "Authorization: Bearer "+token+"\r\n", "", 1), []int{403}, 0},
		"two cookies, one nobody's": {strings.Replace(get.with("Cookie: __Host-yinjian="+strings.Repeat("0a", 32), cookie).String(), "Authorization: Bearer "+token+"\r\n", "", 1), []int{401}, 0},
		"a page's form, CL and TE": {changed(login, func(r *rawRequest) {
			*r = r.with("Content-Type: application/x-www-form-urlencoded", "Content-Length: 3", "Transfer-Encoding: chunked")
			r.body = chunked("name=wang&password=no") + hidden
		}), []int{401, 401}, 0},
		"a page's form from elsewhere": {form(login, "name=wang&password=wang-Password-1", "Origin: https://evil.example", "Sec-Fetch-Site: cross-site"), []int{403}, 0},
		"a form's body hides":          {form(login, hidden), []int{400}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			before := handled.Load()
			statuses := o.wire(t, row.bytes)
			if got := handled.Load() - before; got != row.handled || row.answers != nil && !slices.Equal(statuses, row.answers) {
				t.Errorf("%d requests were handled, want %d; answers %v, want %v", got, row.handled, statuses, row.answers)
			}
		})
	}
}

// What is larger than anything an administrator sends is refused before it is read, however it is said to be long; a page's
// form, too, and one of nobody's at a fraction of it.
func TestUploadsToAdministration(t *testing.T) {
	t.Parallel()
	o := openOffice(t)
	token := o.login(t, false, "li")
	host := strings.TrimPrefix(o.url, "https://")
	for name, c := range map[string]struct {
		head string
		most int // bytes that the server takes before it ends
	}{
		"a length of a terabyte":   {"POST /admin/v1/anchors HTTP/1.1\r\nHost: " + host + "\r\nContent-Type: application/json\r\nAuthorization: Bearer " + token + "\r\nContent-Length: 1099511627776\r\n\r\n", 16 << 20},
		"chunks without end":       {"POST /admin/v1/anchors HTTP/1.1\r\nHost: " + host + "\r\nContent-Type: application/json\r\nAuthorization: Bearer " + token + "\r\nTransfer-Encoding: chunked\r\n\r\n", 64 << 20},
		"chunks, of nobody":        {"POST /admin/v1/anchors HTTP/1.1\r\nHost: " + host + "\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n", 8 << 20},
		"a login, without end":     {"POST /admin/v1/login HTTP/1.1\r\nHost: " + host + "\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n", 8 << 20},
		"a page's form":            {"POST /console/login HTTP/1.1\r\nHost: " + host + "\r\nContent-Type: application/x-www-form-urlencoded\r\nTransfer-Encoding: chunked\r\n\r\n", 8 << 20},
		"a page's form with files": {"POST /console/login HTTP/1.1\r\nHost: " + host + "\r\nContent-Type: multipart/form-data; boundary=x\r\nTransfer-Encoding: chunked\r\n\r\n", 8 << 20},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, pool := certificate(t)
			conn, err := tls.Dial("tcp", host, &tls.Config{RootCAs: pool, Time: func() time.Time { return epoch }})
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if err := conn.SetDeadline(time.Now().Add(2 * time.Minute)); err != nil {
				t.Fatal(err)
			}
			status := make(chan int, 1)
			go func() {
				resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
				if err != nil {
					status <- 0 // it was cut off while it still sent
					return
				}
				status <- resp.StatusCode
			}()
			sent, err := io.WriteString(conn, c.head)
			chunk := fmt.Sprintf("%x\r\n%s\r\n", 64<<10, strings.Repeat("x", 64<<10))
			for err == nil && sent <= c.most {
				var n int
				n, err = io.WriteString(conn, chunk)
				sent += n
			}
			if err == nil || sent > c.most {
				t.Errorf("%d bytes were taken, want %d at most: %v", sent, c.most, err)
			}
			if got := <-status; got == 200 || got == 202 {
				t.Errorf("answered %d", got)
			}
		})
	}
}

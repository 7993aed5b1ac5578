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
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"yinjian/api"
	"yinjian/appliance/account"
	"yinjian/appliance/problem"
	"yinjian/appliance/sign"
)

type appT = account.Application

func discard() logrus.FieldLogger {
	log := logrus.New()
	log.SetOutput(io.Discard)
	return log
}

// dial opens a raw TLS connection.
func (k *kit) dial() *tls.Conn {
	k.t.Helper()
	_, pool := certificate(k.t)
	c, err := tls.Dial("tcp", k.addr, &tls.Config{RootCAs: pool, Time: func() time.Time { return epoch }})
	if err != nil {
		k.t.Fatal(err)
	}
	k.t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(2 * time.Minute)); err != nil {
		k.t.Fatal(err)
	}
	return c
}

// raw writes a signed request's head with a Content-Length of our choice.
func (k *kit) raw(c *tls.Conn, length int64) {
	r := k.request(call{path: "/v1/sign"})
	fmt.Fprintf(c, "POST /v1/sign HTTP/1.1\r\nHost: %s\r\nContent-Type: application/json\r\nAuthorization: %s\r\nContent-Length: %d\r\n\r\n",
		r.Host, r.Header.Get("Authorization"), length)
}

func TestTwoGigabytesAreRefusedAtOnce(t *testing.T) {
	t.Parallel()
	k := start(t)
	c := k.dial()
	k.raw(c, 2<<30)
	resp, err := http.ReadResponse(bufio.NewReader(c), nil) // not a byte of body was sent
	if err != nil {
		t.Fatal(err)
	}
	body, _ := io.ReadAll(resp.Body)
	if resp.StatusCode != 413 || !strings.Contains(string(body), `"code":"too_large"`) || !resp.Close {
		t.Errorf("answer = %d %s, close %t", resp.StatusCode, body, resp.Close)
	}
}

func TestBodyLimits(t *testing.T) {
	t.Parallel()
	k := start(t, func(c *api.Config, _ *http.Server) { c.Limits.Body = 100 << 10 })
	chunked := func(r *http.Request) { r.ContentLength = -1 }
	for name, row := range map[string]struct {
		path    string
		size    int
		chunked bool
		status  int
	}{
		"sign, just fits":       {"/v1/sign", 100 << 10, false, 400}, // and is no JSON
		"sign, one more":        {"/v1/sign", 100<<10 + 1, false, 413},
		"chunked, just fits":    {"/v1/sign", 100 << 10, true, 400},
		"chunked, one more":     {"/v1/sign", 100<<10 + 1, true, 413},
		"chunked, many more":    {"/v1/sign", 5 << 20, true, 413},
		"small, just fits":      {"/v1/timestamp", 64 << 10, false, 400},
		"small, one more":       {"/v1/timestamp", 64<<10 + 1, false, 413},
		"grants, one more":      {"/v1/authorizations", 64<<10 + 1, true, 413},
		"chunked and empty":     {"/v1/sign", 0, true, 400},
		"below the first chunk": {"/v1/sign", 4<<10 - 1, true, 400},
		"the first chunk":       {"/v1/sign", 4 << 10, true, 400},
		"above the first chunk": {"/v1/sign", 4<<10 + 1, true, 400},
	} {
		t.Run(name, func(t *testing.T) {
			c := call{path: row.path, body: make([]byte, row.size)}
			if row.chunked {
				c.tamper = chunked
			}
			got, err := k.try(c)
			if err != nil && row.size > 4<<20 {
				return // the server closed while we were still sending, as it may
			}
			if err != nil || got.status != row.status {
				t.Errorf("answer = %d %s, %v; want %d", got.status, got.body, err, row.status)
			}
		})
	}
}

func TestDataInFlightIsBounded(t *testing.T) {
	t.Parallel()
	k := start(t, func(c *api.Config, _ *http.Server) { c.Limits.Body, c.Limits.InFlight = 100<<10, 200<<10+2 })
	entered, leave := make(chan struct{}), make(chan struct{})
	k.services.sign = func(context.Context, *account.Application, *sign.Request) (*sign.Result, error) {
		close(entered)
		<-leave
		return nil, problem.New(problem.NotFound, "x", "x")
	}
	body := signBody()
	body["content"] = b64(make([]byte, 60<<10))
	big := encode(t, body)
	first := make(chan error, 1)
	go func() { _, err := k.try(call{path: "/v1/sign", body: big}); first <- err }()
	<-entered
	wantProblem(t, k.do(call{path: "/v1/sign", body: big}), 429, problem.RateLimited, "")
	close(leave)
	if err := <-first; err != nil {
		t.Error(err)
	}
	k.services.sign = newServices().sign
	if got := k.do(call{path: "/v1/sign", body: big}); got.status != 200 { // what was held is given back
		t.Errorf("afterwards: %d %s", got.status, got.body)
	}
}

func TestRequestsAtOnceAreBounded(t *testing.T) {
	t.Parallel()
	k := start(t, func(c *api.Config, _ *http.Server) { c.Limits.Concurrent = 1 })
	entered, leave := make(chan struct{}), make(chan struct{})
	k.services.bundle = func(context.Context, *account.Application, string) ([]byte, error) {
		close(entered)
		<-leave
		return []byte(`{"format":"x"}`), nil
	}
	first := make(chan reply, 1)
	go func() {
		got, err := k.try(call{method: "GET", path: "/v1/evidence/" + record})
		if err != nil {
			t.Error(err)
		}
		first <- got
	}()
	<-entered
	again := certs
	again.nonce = "not-used-up-by-a-refusal"
	wantProblem(t, k.do(again), 429, problem.RateLimited, "")
	if got := k.do(call{method: "GET", path: "/health/alive", unsigned: true}); got.status != 200 {
		t.Errorf("alive while busy: %d", got.status)
	}
	close(leave)
	if got := <-first; got.status != 200 {
		t.Errorf("the first: %d", got.status)
	}
	if got := k.do(again); got.status != 200 {
		t.Errorf("afterwards: %d %s", got.status, got.body)
	}
}

func TestHandlingTime(t *testing.T) {
	t.Parallel()
	k := start(t, func(c *api.Config, srv *http.Server) {
		c.Limits.Handling = 300 * time.Millisecond
		srv.ReadTimeout = 100 * time.Millisecond // shorter: must not end a request that was read
	})
	k.services.sign = func(ctx context.Context, _ *account.Application, _ *sign.Request) (*sign.Result, error) {
		<-ctx.Done()
		return nil, fmt.Errorf("waiting for the cipher machine: %w", ctx.Err())
	}
	began := time.Now() // of the request: the handler may begin any time later
	got := k.do(call{path: "/v1/sign", body: encode(t, signBody())})
	wantProblem(t, got, 504, problem.Timeout, "")
	if took := time.Since(began); took < 300*time.Millisecond || !strings.Contains(got.problem.Next, "Idempotency-Key") {
		t.Errorf("ended after %s: %s", took, got.body)
	}
}

// wantClosed reads until the server closes, which must not be our own deadline.
func wantClosed(t *testing.T, c net.Conn) string {
	t.Helper()
	got, err := io.ReadAll(c)
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		t.Errorf("connection still open; got %q", got)
	}
	return string(got)
}

func TestSlowClients(t *testing.T) {
	t.Parallel()
	k := start(t, func(_ *api.Config, srv *http.Server) {
		if srv.ReadHeaderTimeout > 10*time.Second || srv.ReadTimeout > time.Minute || srv.IdleTimeout > 2*time.Minute || srv.WriteTimeout > 2*time.Minute || srv.MaxHeaderBytes > 64<<10 {
			t.Errorf("NewHTTPServer is lax: %+v", srv)
		}
		srv.ReadHeaderTimeout, srv.ReadTimeout, srv.IdleTimeout = 200*time.Millisecond, 400*time.Millisecond, 300*time.Millisecond
	})
	t.Run("handshake", func(t *testing.T) {
		c, err := net.Dial("tcp", k.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(2 * time.Minute))
		wantClosed(t, c)
	})
	t.Run("header", func(t *testing.T) {
		c := k.dial()
		fmt.Fprintf(c, "GET /health/alive HTTP/1.1\r\nHost: x\r\nX-Slow: ")
		wantClosed(t, c)
	})
	t.Run("body", func(t *testing.T) {
		c := k.dial()
		k.raw(c, 1000)
		io.WriteString(c, `{"signer":`)
		if got := wantClosed(t, c); !strings.HasPrefix(got, "HTTP/1.1 408 ") || !strings.Contains(got, `"code":"request_timeout"`) {
			t.Errorf("answer = %s", got)
		}
	})
	t.Run("idle", func(t *testing.T) {
		c := k.dial()
		fmt.Fprintf(c, "GET /health/alive HTTP/1.1\r\nHost: x\r\n\r\n")
		if got := wantClosed(t, c); !strings.HasPrefix(got, "HTTP/1.1 200 ") {
			t.Errorf("answer = %s", got)
		}
	})
	t.Run("cut off", func(t *testing.T) {
		c := k.dial()
		k.raw(c, 1000)
		io.WriteString(c, `{`)
		c.CloseWrite()
		if got := wantClosed(t, c); !strings.HasPrefix(got, "HTTP/1.1 400 ") {
			t.Errorf("answer = %s", got)
		}
	})
	t.Run("long header", func(t *testing.T) {
		c := k.dial()
		fmt.Fprintf(c, "GET /health/alive HTTP/1.1\r\nHost: x\r\nX-Long: %s\r\n\r\n", strings.Repeat("x", 64<<10))
		if got := wantClosed(t, c); !strings.HasPrefix(got, "HTTP/1.1 431 ") && got != "" {
			t.Errorf("answer = %s", got)
		}
	})
}

func TestTLSVersions(t *testing.T) {
	t.Parallel()
	k := start(t)
	_, pool := certificate(t)
	for version, ok := range map[uint16]bool{tls.VersionTLS12: false, tls.VersionTLS13: true} {
		c, err := tls.Dial("tcp", k.addr, &tls.Config{RootCAs: pool, MinVersion: version, MaxVersion: version, Time: func() time.Time { return epoch }})
		if (err == nil) != ok {
			t.Errorf("%s: %v", tls.VersionName(version), err)
		}
		if err == nil {
			c.Close()
		}
	}
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		t.Skip("openssl is missing")
	}
	for flag, want := range map[string]string{"-tls1_2": "alert protocol version", "-tls1_3": "Protocol  : TLSv1.3"} {
		cmd := exec.Command(openssl, "s_client", "-connect", k.addr, flag, "-ign_eof")
		cmd.Stdin = strings.NewReader("GET /health/alive HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
		out, _ := cmd.CombinedOutput() // its status is 1 for the version that is refused
		if !strings.Contains(string(out), want) && !(flag == "-tls1_3" && strings.Contains(string(out), "New, TLSv1.3")) {
			t.Errorf("openssl s_client %s: %s", flag, out)
		}
		if strings.Contains(string(out), `"alive":true`) != (flag == "-tls1_3") {
			t.Errorf("openssl s_client %s: %s", flag, out)
		}
	}
}

func TestListenersRefuseTheWrongPlace(t *testing.T) {
	t.Parallel()
	for _, addr := range []string{"0.0.0.0:0", ":0", "192.0.2.1:0", "localhost:0", "nonsense"} {
		if ln, err := api.ListenPlain(addr, false, 16); err == nil {
			ln.Close()
			t.Errorf("plain HTTP on %s", addr)
		}
	}
	if _, err := api.ListenTLS("127.0.0.1:0", func() *tls.Certificate { return new(tls.Certificate) }, newClock(), false, nil, 16); err == nil {
		t.Error("TLS without a certificate")
	}
	cert, _ := certificate(t)
	if _, err := api.ListenTLS("256.0.0.1:0", func() *tls.Certificate { return &cert }, newClock(), false, nil, 16); err == nil {
		t.Error("TLS on no address")
	}
}

// accepting accepts from a limited listener on loopback for as long as it is open.
func accepting(t *testing.T, most, each int) (dial, accepted func() net.Conn, stop func() error) {
	t.Helper()
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ln := api.Limited(inner, most, each)
	all := make(chan net.Conn, 16)
	ended := make(chan error, 1)
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				ended <- err
				return
			}
			all <- c
		}
	}()
	stop = sync.OnceValue(func() error { ln.Close(); return <-ended })
	t.Cleanup(func() { stop() })
	accepted = func() net.Conn {
		t.Helper()
		select {
		case c := <-all:
			return c
		case <-time.After(2 * time.Minute):
			t.Fatal("no connection was accepted")
			return nil
		}
	}
	dial = func() net.Conn {
		t.Helper()
		c, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		c.SetDeadline(time.Now().Add(2 * time.Minute))
		return c
	}
	return dial, accepted, stop
}

// One connection too many closes the one that has waited longest for a request; without any that waits it is closed
// itself.
func TestConnectionsAreBounded(t *testing.T) {
	t.Parallel()
	for name, bound := range map[string][2]int{"in all": {2, 9}, "of one address": {9, 2}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dial, accepted, stop := accepting(t, bound[0], bound[1])
			first := dial()
			one := accepted()
			second := dial()
			two := accepted()
			api.Handled(two)
			dial()
			three := accepted()
			wantClosed(t, first) // one waited longest
			api.Handled(three)
			fourth := dial()
			wantClosed(t, fourth) // nobody waits
			api.ConnState(two, http.StateIdle)
			dial()
			four := accepted()
			wantClosed(t, second)
			one.Close() // late, and twice, frees nothing
			four.Close()
			four.Close()
			dial()
			five := accepted()
			api.Handled(five)
			wantClosed(t, dial())
			if err := stop(); !errors.Is(err, net.ErrClosed) {
				t.Errorf("Accept after Close = %v", err)
			}
		})
	}
}

// A connection that was used of late waits less long than one that was not.
func TestWaitingBeginsAnew(t *testing.T) {
	t.Parallel()
	dial, accepted, _ := accepting(t, 2, 9)
	dial()
	one := accepted()
	second := dial()
	accepted()
	api.ConnState(one, http.StateActive)
	dial()
	accepted()
	wantClosed(t, second)
}

// A thousand connections that do nothing, and as many again, keep nobody out.
func TestIdleConnections(t *testing.T) {
	t.Parallel()
	sv := newServices()
	sv.connections = 1200 // 300 of one address
	k := startWith(t, sv)
	idle := make([]net.Conn, 1000)
	for i := range idle {
		c, err := net.Dial("tcp", k.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		idle[i] = c
		if i%100 == 0 {
			if got := k.do(certs); got.status != 200 {
				t.Fatalf("after %d idle connections: %d %s", i, got.status, got.body)
			}
		}
	}
	for _, c := range idle[:500] { // the oldest made room
		c.SetDeadline(time.Now().Add(2 * time.Minute))
		wantClosed(t, c)
	}
	if got := k.do(call{path: "/v1/sign", body: encode(t, signBody())}); got.status != 200 {
		t.Errorf("%d %s", got.status, got.body)
	}
}

// Four addresses whose requests are never whole hold every connection, and keep nobody out who proves himself.
func TestUnprovenConnections(t *testing.T) {
	t.Parallel()
	sv := newServices()
	sv.connections = 8
	k := startWith(t, sv)
	_, pool := certificate(t)
	from := func(last int) net.Conn {
		t.Helper()
		d := tls.Dialer{
			NetDialer: &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, byte(last))}},
			Config:    &tls.Config{RootCAs: pool, Time: func() time.Time { return epoch }},
		}
		c, err := d.Dial("tcp", k.addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		c.SetDeadline(time.Now().Add(2 * time.Minute))
		return c
	}
	for i := range 8 {
		c := from(2 + i/2)
		fmt.Fprintf(c, "POST /v1/sign HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nAuthorization: %s\r\nContent-Length: 100\r\nExpect: 100-continue\r\n\r\n",
			k.request(call{path: "/v1/sign"}).Header.Get("Authorization"))
		if line, err := bufio.NewReader(c).ReadString('\n'); !strings.Contains(line, "100 Continue") {
			t.Fatalf("%q, %v", line, err) // its body is being waited for
		}
	}
	entered, leave := make(chan struct{}), make(chan struct{})
	k.services.bundle = func(context.Context, *account.Application, string) ([]byte, error) {
		close(entered)
		<-leave
		return []byte(`{"format":"x"}`), nil
	}
	proved := make(chan reply, 1)
	go func() {
		got, err := k.try(call{method: "GET", path: "/v1/evidence/" + record})
		if err != nil {
			t.Error(err)
		}
		proved <- got
	}()
	select {
	case <-entered:
	case got := <-proved:
		t.Fatalf("kept out: %d %s", got.status, got.body)
	}
	for i := range 8 { // newcomers take the places of the others, not that of a request that is being handled
		from(6 + i/2)
	}
	close(leave)
	if got := <-proved; got.status != 200 {
		t.Errorf("%d %s", got.status, got.body)
	}
}

// One application cannot take all places: who asks for more may hold no more than is left.
func TestFairShare(t *testing.T) {
	t.Parallel()
	k := start(t, func(c *api.Config, _ *http.Server) { c.Limits.Concurrent = 6 })
	leave := make(chan struct{})
	var inside atomic.Int64
	k.services.bundle = func(context.Context, *account.Application, string) ([]byte, error) {
		inside.Add(1)
		<-leave
		return []byte(`{"format":"x"}`), nil
	}
	var all sync.WaitGroup
	held := map[string]int{}
	for _, app := range []string{"his", "emr", "noright"} { // 3 of 6, 2 of 3, 1 of 1
		for {
			c := call{method: "GET", path: "/v1/evidence/" + record, app: app}
			before := inside.Load()
			refused := make(chan reply, 1)
			all.Go(func() {
				if got, err := k.try(c); err != nil || got.status != 200 {
					refused <- got
				}
			})
			for inside.Load() == before && len(refused) == 0 {
				runtime.Gosched()
			}
			if len(refused) > 0 {
				wantProblem(t, <-refused, 429, problem.RateLimited, "")
				break
			}
			held[app]++
		}
	}
	if want := map[string]int{"his": 3, "emr": 2, "noright": 1}; !maps.Equal(held, want) {
		t.Errorf("held: %v, want %v", held, want)
	}
	close(leave)
	all.Wait()
	if got := k.do(certs); got.status != 200 {
		t.Errorf("afterwards: %d", got.status)
	}
}

// However many requests of nobody's are refused, the log grows by a few lines; those of an application that has proved itself
// are told of each.
func TestRefusalsOfStrangersInTheLog(t *testing.T) {
	t.Parallel()
	k := start(t)
	const many = 400
	for range many {
		if got := k.do(call{method: "GET", path: "/nothing"}); got.status != 404 {
			t.Fatalf("%d %s", got.status, got.body)
		}
	}
	for range 5 {
		if got := k.do(call{path: "/v1/sign", body: []byte("{")}); got.status != 400 {
			t.Fatalf("%d %s", got.status, got.body)
		}
	}
	if err := k.stop(); err != nil {
		t.Error(err)
	}
	log := k.log.String()
	if n := strings.Count(log, `"code":"not_found"`); n < 100 || n > many/2 {
		t.Errorf("%d lines about strangers", n)
	}
	if n := strings.Count(log, `"code":"invalid_request"`); n != 5 {
		t.Errorf("%d lines about an application", n)
	}
}

// A client that does not read its answer holds its connection for as long as an answer may take, and no place among the
// requests being handled.
func TestAnswerIsNotRead(t *testing.T) {
	t.Parallel()
	k := start(t, func(c *api.Config, srv *http.Server) {
		c.Limits.Concurrent, c.Limits.Sending = 1, 300*time.Millisecond
	})
	big := []byte(`{"format":"` + strings.Repeat("x", 32<<20) + `"}`) // more than both sockets hold
	k.services.bundle = func(context.Context, *account.Application, string) ([]byte, error) { return big, nil }
	c := k.dial()
	r := k.request(call{method: "GET", path: "/v1/evidence/" + record})
	fmt.Fprintf(c, "GET /v1/evidence/%s HTTP/1.1\r\nHost: %s\r\nAuthorization: %s\r\n\r\n", record, r.Host, r.Header.Get("Authorization"))
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil { // it is being answered
		t.Fatal(err)
	}
	if got := k.do(certs); got.status != 200 {
		t.Errorf("another while it does not read: %d %s", got.status, got.body)
	}
	if err := k.stop(); err != nil { // waits for the handler: within the test's time it has ended
		t.Error(err)
	}
	if n, _ := io.Copy(io.Discard, c); n >= int64(len(big)) {
		t.Error("the whole answer was sent to a client that did not read it")
	}
	if log := k.log.String(); !strings.Contains(log, "did not read its answer") || !strings.Contains(log, "i/o timeout") || strings.Contains(log, "request failed") {
		t.Errorf("its time was not what ended it: %s", log)
	}
}

func TestDrain(t *testing.T) {
	t.Parallel()
	k := start(t)
	entered, leave := make(chan struct{}), make(chan struct{})
	k.services.bundle = func(context.Context, *account.Application, string) ([]byte, error) {
		close(entered)
		<-leave
		return []byte(`{"format":"x"}`), nil
	}
	first := make(chan reply, 1)
	go func() {
		got, err := k.try(call{method: "GET", path: "/v1/evidence/" + record})
		if err != nil {
			t.Error(err)
		}
		first <- got
	}()
	<-entered
	stopped := make(chan error, 1)
	go func() { stopped <- k.stop() }()
	for { // the listener closes first
		c, err := net.Dial("tcp", k.addr)
		if err != nil {
			break
		}
		c.Close()
	}
	select {
	case <-stopped:
		t.Error("stopped with a request running")
	default:
	}
	close(leave)
	if got := <-first; got.status != 200 {
		t.Errorf("the running request: %d", got.status)
	}
	if err := <-stopped; err != nil {
		t.Error(err)
	}
}

func TestDrainEnds(t *testing.T) {
	t.Parallel()
	k := start(t)
	entered := make(chan struct{})
	k.services.bundle = func(ctx context.Context, _ *account.Application, _ string) ([]byte, error) {
		close(entered)
		<-ctx.Done()
		return nil, ctx.Err()
	}
	ln, err := api.ListenPlain("127.0.0.1:0", false, 16)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	stopped := make(chan error, 1)
	go func() {
		stopped <- api.Serve(ctx, k.server.NewHTTPServer(k.server.Handler()), ln, 50*time.Millisecond)
	}()
	r := k.request(call{method: "GET", path: "/v1/evidence/" + record, host: ln.Addr().String()})
	r.URL.Scheme, r.URL.Host = "http", ln.Addr().String()
	ended := make(chan error, 1)
	go func() {
		resp, err := http.DefaultTransport.RoundTrip(r)
		if err == nil {
			resp.Body.Close()
		}
		ended <- err
	}()
	<-entered
	cancel()
	if err := <-stopped; err != nil {
		t.Errorf("Serve = %v", err)
	}
	if err := <-ended; err == nil {
		t.Error("a request outlived the drain")
	}
}

func TestServeAnswersTheListenersError(t *testing.T) {
	t.Parallel()
	k := start(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ln.Close()
	if err := api.Serve(t.Context(), k.server.NewHTTPServer(k.server.Handler()), ln, time.Second); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Serve = %v", err)
	}
}

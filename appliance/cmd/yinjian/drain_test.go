package main_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance"
)

// TestDrain stops an appliance by SIGTERM while 32 clients sign and others hang: what was answered is in the journal, what
// was not answered was never begun or may be asked for again, nobody new is let in, and those that hang do not hold it for
// longer than it is told to wait.
func TestDrain(t *testing.T) {
	t.Parallel()
	const clients, drain = 32, 3 * time.Second
	server := startTimeServer(t)
	dir := initAppliance(t, server, "--listen", freePort(t))
	configure(t, dir, func(c *appliance.Config) { c.Policy.Drain = appliance.Duration(drain) })
	m := serve(t, dir)
	m.register(t, "his", "--consent", "app-asserted")
	m.enrol(t, "D1", "")
	m.limits(t)

	// 1. Signatures, each with a key of its own, until the appliance cannot be reached.
	var mu sync.Mutex
	made, open := map[string]*wire.SignResult{}, map[string]bool{} // answered, and asked for without an answer
	codes := map[string]int{}
	var answers atomic.Int64
	var signing sync.WaitGroup
	gone := make(chan struct{})
	for i := range clients {
		c := m.client(t, "his")
		signing.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-gone:
					return
				default:
				}
				key := fmt.Sprintf("drain-%02d-%04d", i, n)
				r, err := c.Sign(context.Background(), key, asserted("D1", key))
				mu.Lock()
				if err == nil {
					made[key] = r
					answers.Add(1)
				} else {
					open[key] = true
					code := "transport"
					var p *client.Problem
					if errors.As(err, &p) {
						code = p.Code + "/" + string(p.Retry)
					}
					codes[code]++
				}
				mu.Unlock()
				if err != nil {
					return
				}
			}
		})
	}

	// 2. Clients that hang: in the handshake, in the header, in the body, and between two requests.
	host := strings.TrimPrefix(m.ends.API, "https://")
	hang := func(send string) {
		t.Helper()
		conn, err := net.Dial("tcp", host)
		if err == nil && send != "" {
			conn = tls.Client(conn, &tls.Config{RootCAs: roots(t, m.ends.TLSCA), ServerName: strings.Split(host, ":")[0]})
			_, err = io.WriteString(conn, send)
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
	}
	cfg := m.clientConfig(t, "his")
	a := wire.Authorization{App: "his", Time: strconv.FormatInt(time.Now().UnixMilli(), 10), Nonce: "never-to-be-finished"}
	a.MAC = wire.MAC(cfg.Key, wire.Signable{Method: "POST", Path: "/v1/sign", Host: host}, a.App, a.Time, a.Nonce)
	hang("")
	hang("POST /v1/sign HTTP/1.1\r\nHost: ")
	for range 4 {
		hang("POST /v1/sign HTTP/1.1\r\nHost: " + host + "\r\nContent-Type: application/json\r\nContent-Length: 1000\r\nIdempotency-Key: k\r\nAuthorization: " + a.String() + "\r\n\r\n{")
	}
	idle := m.client(t, "his")
	if err := idle.Alive(t.Context()); err != nil {
		t.Fatal(err)
	}

	// 3. Stop.
	eventually(t, time.Minute, "all clients are at work", func() bool { return answers.Load() > 5*clients })
	if err := m.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	eventually(t, 10*time.Second, "no new connection is taken", func() bool {
		c, err := net.Dial("tcp", host)
		if err == nil {
			c.Close()
		}
		return err != nil
	})
	select {
	case <-m.ended:
		t.Error("it ended while clients were being served, without waiting for them")
	default:
	}
	close(gone)
	select {
	case <-m.ended:
	case <-time.After(drain + 26*time.Second): // the body alone would have 30 s
		t.Fatal("clients that hang hold the stop")
	}
	if code := m.cmd.ProcessState.ExitCode(); code != 0 {
		t.Errorf("exit %d", code)
	}
	signing.Wait()
	t.Logf("%d answered, without answer: %v", len(made), codes)
	for code := range codes {
		if code != "transport" && code != "not_ready/later" {
			t.Errorf("a client was told %s", code)
		}
	}

	// 4. What was answered is there, once. What was not answered is there at most once, and a retry gets it.
	entriesByRef(t, dir, made)
	m = serve(t, dir)
	m.trusted(t)
	c := m.client(t, "his")
	for key, was := range made {
		if r, err := c.Sign(t.Context(), key, asserted("D1", key)); err != nil || !r.Replayed || r.Sequence != was.Sequence || string(r.Signature) != string(was.Signature) {
			t.Fatalf("%s was answered %d, and again %+v, %v", key, was.Sequence, r, err)
		}
	}
	for key := range maps.Keys(open) {
		r, err := c.Sign(t.Context(), key, asserted("D1", key))
		if err != nil {
			t.Fatalf("%s had no answer, and a retry: %v", key, err)
		}
		made[key] = r
	}
	m.mustBeClean(t)
	m.stop(t)
	entriesByRef(t, dir, made)
}

// limits registers an application with few requests a second, and changes that while the appliance runs.
func (m *machine) limits(t *testing.T) {
	t.Helper()
	slow := m.register(t, "slow", "--rate", "1", "--burst", "1", "--consent", "app-asserted")
	_, err := slow.State(t.Context())
	for range 100 { // one a second, and a burst of one: on the slowest machine some of a hundred are too many
		if err != nil {
			break
		}
		_, err = slow.State(t.Context())
	}
	wantCode(t, err, "rate_limited")
	mustRun(t, "app", "limit", "slow", "--dir", m.dir, "--rate", "1000", "--reason", "试运行结束")
	// The bucket is empty, so some of them may still be too early; at the old rate a hundred would take 100 s.
	n := 0
	eventually(t, time.Minute, "a hundred requests at the new rate", func() bool {
		_, err := slow.State(t.Context())
		if err == nil {
			n++
		} else {
			wantCode(t, err, "rate_limited")
		}
		return n == 100
	})
	if o := mustRun(t, "app", "list", "--dir", m.dir, "-o", "json"); !strings.Contains(o.stdout, `"rate": 1000`) || strings.Contains(o.stdout, `"burst"`) {
		t.Errorf("app list: %v", o)
	}
	refused(t, 1, []string{"rate"}, "app", "limit", "slow", "--dir", m.dir, "--rate", "10001", "--reason", "x")
	refused(t, 2, []string{"reason"}, "app", "limit", "slow", "--dir", m.dir, "--rate", "1")
}

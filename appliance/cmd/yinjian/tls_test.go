package main_test

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"yinjian/appliance"
)

// handshake has OpenSSL connect and check the certificate against tls-ca.pem.
func (m *machine) handshake(t *testing.T, flags ...string) outcome {
	t.Helper()
	argv := []string{"openssl", "s_client", "-connect", strings.TrimPrefix(m.ends.API, "https://"), "-CAfile", m.ends.TLSCA,
		"-verify_return_error", "-verify_ip", "127.0.0.1"}
	return command(t, nil, append(argv, flags...)...)
}

func (o outcome) says(t *testing.T, words ...string) {
	t.Helper()
	for _, w := range words {
		if !strings.Contains(o.stdout+o.stderr, w) {
			t.Errorf("%v; want %q", o, w)
		}
	}
}

// A visitor opens connections as a business system does; with a cache it keeps tickets.
type visitor struct {
	addr string
	cfg  *tls.Config
}

func (m *machine) visitor(t *testing.T, cache tls.ClientSessionCache) *visitor {
	return &visitor{strings.TrimPrefix(m.ends.API, "https://"), &tls.Config{RootCAs: roots(t, m.ends.TLSCA), ClientSessionCache: cache}}
}

// visit opens a connection and asks on it whether the appliance is alive.
func (v *visitor) visit() (*tls.Conn, error) {
	c, err := tls.Dial("tcp", v.addr, v.cfg)
	if err != nil {
		return nil, err
	}
	if err := ask(c); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// passes opens a connection and closes it.
func (v *visitor) passes() bool {
	c, err := v.visit()
	if err == nil {
		c.Close()
	}
	return err == nil
}

func ask(c *tls.Conn) error {
	if err := c.SetDeadline(time.Now().Add(answerWithin)); err != nil {
		return err
	}
	fmt.Fprint(c, "GET /health/alive HTTP/1.1\r\nHost: x\r\n\r\n")
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if b, err := io.ReadAll(resp.Body); err != nil || !bytes.Contains(b, []byte(`"alive":true`)) {
		return fmt.Errorf("answer %q: %w", b, err)
	}
	return nil
}

// The listener's key is made in the cipher machine and is nowhere on the disk. When the cipher machine hangs, new
// connections fail in time, open ones and resumed sessions go on, and the local socket says what is wrong; it and the
// worker are killed under load, and service returns.
func TestTLSKeyInTheCipherMachine(t *testing.T) {
	t.Parallel()
	need(t, "openssl")
	dir := initAppliance(t, startTimeServer(t))
	configure(t, dir, func(c *appliance.Config) {
		c.Listen.TLS12 = true
		c.HSM.CallDeadline = appliance.Duration(3 * time.Second)
	})
	m := serve(t, dir)

	// 1. Handshakes, as OpenSSL sees them.
	m.handshake(t, "-tls1_3").says(t, "Verify return code: 0 (ok)", "New, TLSv1.3", "Peer signature type: RSA-PSS", "Peer signing digest: SHA256")
	m.handshake(t, "-tls1_2").says(t, "Verify return code: 0 (ok)", "New, TLSv1.2", "Peer signature type: RSA-PSS")
	m.handshake(t, "-tls1_2", "-sigalgs", "RSA+SHA256").says(t, "Verify return code: 0 (ok)", "New, TLSv1.2", "Peer signature type: RSA\n")
	m.handshake(t, "-tls1_2", "-cipher", "AES128-GCM-SHA256:ECDHE-RSA-AES128-SHA:@SECLEVEL=0").says(t, "handshake failure")
	m.handshake(t, "-tls1_1", "-cipher", "ALL:@SECLEVEL=0").says(t, "alert protocol version")
	s := m.state(t)
	if s.HSM["tls"].Phase != "ready" || !strings.Contains(s.Listeners["api"], "1.2") || strings.Contains(strings.Join(s.Warnings, "\n"), "TLS 私钥是文件") {
		t.Errorf("state: %+v", s)
	}

	// 2. No private key lies in the clear.
	err := filepath.WalkDir(filepath.Join(dir, "secrets"), func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(name)
		if bytes.Contains(b, []byte("PRIVATE KEY")) || len(b) > 64 {
			t.Errorf("%s may be a key", name)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}

	// 3. The cipher machine hangs.
	stranger, regular := m.visitor(t, nil), m.visitor(t, tls.NewLRUClientSessionCache(4))
	held, err := regular.visit()
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	soft := childWith(t, m.cmd.Process.Pid, "softtoken --dir")
	soft.signal(t, syscall.SIGSTOP)
	var refused sync.WaitGroup
	for range 24 {
		refused.Go(func() {
			if stranger.passes() {
				t.Error("a handshake without the cipher machine")
			}
		})
	}
	for range 3 {
		c, err := regular.visit()
		if err != nil {
			t.Fatalf("resumed session: %v", err)
		}
		if !c.ConnectionState().DidResume {
			t.Error("not resumed")
		}
		c.Close()
		if err := ask(held); err != nil {
			t.Errorf("open connection: %v", err)
		}
	}
	refused.Wait()
	eventually(t, answerWithin, "the status says that handshakes fail", func() bool {
		return strings.Contains(mustRun(t, "status", "--dir", dir).stdout, "TLS 握手")
	})
	soft.signal(t, syscall.SIGCONT)
	eventually(t, softtokenReturns, "handshakes succeed again", stranger.passes)
	eventually(t, softtokenReturns, "the status says no more of it", func() bool {
		return stranger.passes() && !strings.Contains(strings.Join(m.state(t).Warnings, "\n"), "TLS 握手")
	})

	// 4. The worker and the cipher machine die while clients connect all the time.
	var passed atomic.Int64
	stop := make(chan struct{})
	var load sync.WaitGroup
	for range 6 {
		load.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					if stranger.passes() {
						passed.Add(1)
					}
				}
			}
		})
	}
	for _, kill := range []func(){
		func() {
			w, _, ok := readProcess(m.state(t).HSM["tls"].PID)
			if !ok {
				t.Fatal("no worker of the slot tls")
			}
			w.signal(t, syscall.SIGKILL)
		},
		func() {
			// It cannot come back before this is said.
			passphrase := filepath.Join(dir, "secrets", "softtoken.passphrase")
			if err := os.Rename(passphrase, passphrase+".away"); err != nil {
				t.Fatal(err)
			}
			childWith(t, m.cmd.Process.Pid, "softtoken --dir").signal(t, syscall.SIGKILL)
			eventually(t, softtokenReturns, "the status says that the cipher machine is down", func() bool {
				return strings.Contains(mustRun(t, "status", "--dir", dir).stdout, "软件密码机已停止")
			})
			if err := os.Rename(passphrase+".away", passphrase); err != nil {
				t.Fatal(err)
			}
		},
	} {
		was := passed.Load()
		eventually(t, softtokenReturns, "load", func() bool { return passed.Load() > was+10 })
		kill()
		was = passed.Load() + 6 // what was on its way
		eventually(t, softtokenReturns, "service returns", func() bool { return passed.Load() > was+10 })
	}
	close(stop)
	load.Wait()
	if r := m.state(t).HSM["tls"].Restarts; r == 0 {
		t.Error("the worker of the slot tls was not restarted")
	}
	m.trusted(t)
	eventually(t, softtokenReturns, "the status says no more that the cipher machine is down", func() bool {
		return !strings.Contains(strings.Join(m.state(t).Warnings, "\n"), "软件密码机已停止")
	})
	m.mustBeClean(t)
	m.stop(t)
}

func readFile(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// A folder whose configuration has no slot tls, as of an earlier release, works on with its key in a file; given the
// slot, it makes a key there for a certificate to come, and serves with the file's until then.
func TestTLSKeyInAFile(t *testing.T) {
	t.Parallel()
	need(t, "openssl", "pkcs11-tool")
	dir := initAppliance(t, startTimeServer(t))
	var slot appliance.Slot
	configure(t, dir, func(c *appliance.Config) {
		slot = c.HSM.Slots["tls"]
		delete(c.HSM.Slots, "tls")
	})
	if err := os.RemoveAll(filepath.Join(dir, "softtoken", "slot-4")); err != nil {
		t.Fatal(err)
	}
	o := yinjian(t, "serve", "--once", "--dir", dir)
	if o.code == 0 {
		t.Fatalf("without a key it serves: %v", o)
	}
	o.says(t, "hsm.slots.tls", "tls.key")
	key := filepath.Join(dir, "secrets", "tls.key")
	if o := command(t, nil, "openssl", "genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048", "-out", key); o.code != 0 {
		t.Fatal(o)
	}
	file := strings.TrimSpace(command(t, nil, "openssl", "pkey", "-in", key, "-pubout").stdout)
	m := serve(t, dir)
	if s := m.state(t); len(s.HSM) != 4 || !strings.Contains(strings.Join(s.Warnings, "\n"), "TLS 私钥是文件") || !strings.Contains(s.Evaluation, "TLS 私钥是文件") {
		t.Errorf("state: %+v", s)
	}
	serves := func(what string) {
		t.Helper()
		o := m.handshake(t, "-tls1_3", "-showcerts")
		o.says(t, "Verify return code: 0 (ok)", "New, TLSv1.3")
		_, der, _ := strings.Cut(o.stdout, "-----BEGIN CERTIFICATE-----")
		der, _, _ = strings.Cut(der, "-----END CERTIFICATE-----")
		pem := filepath.Join(dir, "shown.pem")
		if err := os.WriteFile(pem, []byte("-----BEGIN CERTIFICATE-----"+der+"-----END CERTIFICATE-----\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := command(t, nil, "openssl", "x509", "-in", pem, "-noout", "-pubkey").stdout; strings.TrimSpace(got) != file {
			t.Errorf("%s: the certificate is for %s, want the file's %s", what, got, file)
		}
	}
	serves("no slot")
	m.handshake(t, "-tls1_2").says(t, "alert protocol version")
	// The fifth token, as docs/operations.md has it.
	pin, so := strings.TrimSpace(readFile(t, filepath.Join(dir, "secrets", "tls.pin"))), strings.TrimSpace(readFile(t, filepath.Join(dir, "secrets", "tls.so-pin")))
	socket := []string{"YINJIAN_P11_SOCKET=" + filepath.Join(dir, "softtoken", "p11.sock")}
	for _, args := range [][]string{
		{"--slot", "4", "--init-token", "--label", "yinjian-tls", "--so-pin", so},
		{"--slot", "4", "--login", "--login-type", "so", "--so-pin", so, "--init-pin", "--new-pin", pin},
	} {
		if o := command(t, socket, append([]string{"pkcs11-tool", "--module", built.module}, args...)...); o.code != 0 {
			t.Fatal(o)
		}
	}
	m.stop(t)

	configure(t, dir, func(c *appliance.Config) { c.HSM.Slots["tls"] = slot })
	for _, start := range []string{"first start with the slot", "second"} {
		m = serve(t, dir)
		serves(start)
		if s := m.state(t); s.HSM["tls"].Phase != "ready" || !strings.Contains(strings.Join(s.Warnings, "\n"), "TLS 私钥是文件") || strings.Contains(s.Evaluation, "TLS 私钥是文件") {
			t.Errorf("%s: state: %+v", start, s)
		}
		m.stop(t)
	}
	b, err := os.ReadFile(m.log)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(b, []byte("object=tls/api")) {
		t.Error("the second start made another key")
	}
	for _, kind := range []string{"appliance.tls_key/intent", "appliance.tls_key/outcome"} {
		if !strings.Contains(readFile(t, filepath.Join(dir, "journal", "journal-000001.db")), kind) {
			t.Errorf("the journal has no %s", kind)
		}
	}
	// Who loses both has no listener, and is told so.
	if err := os.Remove(key); err != nil {
		t.Fatal(err)
	}
	refusesToServe(t, dir, "secrets/tls.key")
}

package notify_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"yinjian/api/notify"
	"yinjian/appliance/alarm"
	"yinjian/packaging/porttest"
)

func quiet() logrus.FieldLogger {
	log := logrus.New()
	log.SetOutput(io.Discard)
	return log
}

func message(n int) notify.Message {
	return notify.Message{
		Event: alarm.Event{ID: fmt.Sprintf("%016x", n), Event: alarm.Raised, Condition: alarm.Condition{Code: alarm.MachineAway, Object: `b"]\` + "\n", Severity: alarm.Warning, Detail: "第 " + fmt.Sprint(n) + " 次\nforged line"}},
		Node:  "benbu-1", Campus: "本部", At: time.Date(2026, 3, 4, 5, 6, 7, 8000, time.UTC), Trusted: true, Title: "密码机不可用", Next: "查",
	}
}

// run runs a receiver until the test ends.
func run(t *testing.T, r *notify.Receiver) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func eventually(t *testing.T, what string, yes func() bool) {
	t.Helper()
	for end := time.Now().Add(2 * time.Minute); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if yes() {
			return
		}
	}
	t.Fatalf("not within two minutes: %s", what)
}

// A pki is a CA, and a certificate each for a server on 127.0.0.1 and a client.
type testPKI struct {
	dir            string
	roots          *x509.CertPool
	server, client tls.Certificate
}

func newPKI(t *testing.T) *testPKI {
	t.Helper()
	p := &testPKI{dir: t.TempDir(), roots: x509.NewCertPool()}
	serial := int64(0)
	issue := func(name string, parent *x509.Certificate, signer *ecdsa.PrivateKey) (*x509.Certificate, *ecdsa.PrivateKey) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		serial++
		c := &x509.Certificate{
			SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
			IsCA: parent == nil, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		}
		if parent == nil {
			parent, signer, c.KeyUsage, c.ExtKeyUsage = c, key, x509.KeyUsageCertSign, nil
		} else {
			c.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1)}
		}
		der, err := x509.CreateCertificate(rand.Reader, c, parent, &key.PublicKey, signer)
		if err == nil {
			c, err = x509.ParseCertificate(der)
		}
		var private []byte
		if err == nil {
			private, err = x509.MarshalPKCS8PrivateKey(key)
		}
		if err == nil {
			err = os.WriteFile(filepath.Join(p.dir, name+".pem"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600)
		}
		if err == nil {
			err = os.WriteFile(filepath.Join(p.dir, name+".key"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}), 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		return c, key
	}
	ca, caKey := issue("ca", nil, nil)
	p.roots.AddCert(ca)
	for name, to := range map[string]*tls.Certificate{"server": &p.server, "client": &p.client} {
		c, key := issue(name, ca, caKey)
		*to = tls.Certificate{Certificate: [][]byte{c.Raw}, PrivateKey: key}
	}
	return p
}

func (p *testPKI) tls() notify.TLS {
	return notify.TLS{Roots: p.roots, Certificate: &p.client, Now: time.Now}
}

// An rsyslog is Debian's, receiving TLS from clients with a certificate of the CA alone, or plain TCP.
type rsyslog struct {
	t       *testing.T
	pki     *testPKI
	address string
	out     string
	cmd     *exec.Cmd
}

func newRsyslog(t *testing.T, p *testPKI) *rsyslog {
	t.Helper()
	for _, file := range []string{"/usr/sbin/rsyslogd", "/usr/lib/x86_64-linux-gnu/rsyslog/lmnsd_gtls.so"} {
		if found, _ := filepath.Glob(strings.Replace(file, "x86_64-linux-gnu", "*", 1)); len(found) == 0 {
			t.Skip("rsyslog with rsyslog-gnutls is not installed")
		}
	}
	return &rsyslog{t: t, pki: p, address: porttest.Free(t), out: filepath.Join(t.TempDir(), "received")}
}

func (s *rsyslog) start() {
	s.t.Helper()
	dir := s.t.TempDir()
	_, port, _ := net.SplitHostPort(s.address)
	conf := fmt.Sprintf(`global(workDirectory=%[1]q defaultNetstreamDriver="gtls" defaultNetstreamDriverCAFile=%[2]q defaultNetstreamDriverCertFile=%[3]q defaultNetstreamDriverKeyFile=%[4]q)
module(load="imtcp" StreamDriver.Name="gtls" StreamDriver.Mode="1" StreamDriver.AuthMode="x509/certvalid")
input(type="imtcp" address="127.0.0.1" port=%[5]q)
template(name="all" type="string" string="%%PRI%%|%%TIMESTAMP:::date-rfc3339%%|%%HOSTNAME%%|%%APP-NAME%%|%%MSGID%%|%%STRUCTURED-DATA%%|%%msg%%\n")
action(type="omfile" file=%[6]q template="all")
`, dir, filepath.Join(s.pki.dir, "ca.pem"), filepath.Join(s.pki.dir, "server.pem"), filepath.Join(s.pki.dir, "server.key"), port, s.out)
	file := filepath.Join(dir, "rsyslog.conf")
	if err := os.WriteFile(file, []byte(conf), 0o600); err != nil {
		s.t.Fatal(err)
	}
	s.cmd = exec.Command("/usr/sbin/rsyslogd", "-n", "-f", file, "-i", filepath.Join(dir, "pid"))
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var said bytes.Buffer
	s.cmd.Stdout, s.cmd.Stderr = &said, &said
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		s.stop()
		if s.t.Failed() {
			s.t.Logf("rsyslogd: %s", &said)
		}
	})
	eventually(s.t, "rsyslogd listens", func() bool {
		c, err := net.Dial("tcp", s.address)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
}

func (s *rsyslog) stop() {
	if s.cmd != nil {
		_ = s.cmd.Process.Signal(syscall.SIGTERM)
		_ = s.cmd.Wait() // its end is all that counts
		s.cmd = nil
	}
}

func (s *rsyslog) received() []string {
	b, err := os.ReadFile(s.out)
	if err != nil {
		return nil
	}
	var out []string
	for line := range strings.Lines(string(b)) {
		if strings.Contains(line, "|yinjian|") && strings.HasSuffix(line, "\n") { // rsyslogd tells of itself, too, and may be at a line
			out = append(out, line)
		}
	}
	return out
}

// rsyslogd takes our messages over TLS, with our certificate, and finds in them what was put there; a message is one line
// whatever is in it. While it is away messages wait, and arrive when it is back.
func TestSyslogOverTLS(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	s := newRsyslog(t, p)
	s.start()
	r, err := notify.NewSyslog(notify.Syslog{Address: "tls://" + s.address, TLS: p.tls()}, quiet())
	if err != nil {
		t.Fatal(err)
	}
	run(t, r)
	if err := r.Try(t.Context(), message(1)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the message is there", func() bool { return len(s.received()) == 1 })
	line := s.received()[0]
	want := regexp.MustCompile(`^132\|2026-03-04T05:06:07\.000008Z\|benbu-1\|yinjian\|alarm\.raised\|\[yinjian@32473 id="0000000000000001" code="machine-away" object="b\\"\\\]\\\\ " severity="warning" campus="本部" time_trusted="true" dropped="0"\]\|(\x{feff})?密码机不可用：第 1 次 forged line。下一步 \(next\)：查\n$`)
	if !want.MatchString(line) {
		t.Errorf("rsyslogd understood %q, want %s", line, want)
	}
	s.stop()
	for n := 2; n < 6; n++ {
		r.Offer(message(n))
	}
	eventually(t, "the receiver is missed", func() bool { return r.State().Error != "" })
	s.start()
	eventually(t, "the others are there", func() bool {
		all := strings.Join(s.received(), "")
		for n := 2; n < 6; n++ {
			if !strings.Contains(all, fmt.Sprintf(`id="%016x"`, n)) {
				return false
			}
		}
		return true
	})
	eventually(t, "nothing waits", func() bool { s := r.State(); return s.Waiting == 0 && s.Error == "" && s.Dropped == 0 })
}

// A receiver that is not the one of the roots, or that does not know us, gets nothing.
func TestSyslogTrust(t *testing.T) {
	t.Parallel()
	p, other := newPKI(t), newPKI(t)
	s := newRsyslog(t, p)
	s.start()
	for name, with := range map[string]notify.TLS{
		"another CA's server": {Roots: other.roots, Certificate: &p.client, Now: time.Now},
		"another name":        {Roots: p.roots, Certificate: &p.client, ServerName: "example.org", Now: time.Now},
		"expired":             {Roots: p.roots, Certificate: &p.client, Now: func() time.Time { return time.Now().AddDate(1, 0, 0) }},
		"no certificate":      {Roots: p.roots, Now: time.Now},
		"another CA's client": {Roots: p.roots, Certificate: &other.client, Now: time.Now},
	} {
		r, err := notify.NewSyslog(notify.Syslog{Address: "tls://" + s.address, TLS: with}, quiet())
		if err != nil {
			t.Fatal(err)
		}
		run(t, r)
		r.Offer(message(1))
		eventually(t, name+" is refused", func() bool { return r.State().Error != "" })
		if n := r.State().Delivered; n != 0 {
			t.Errorf("%s: %d delivered", name, n)
		}
	}
	if got := s.received(); len(got) != 0 {
		t.Errorf("received %q", got)
	}
}

// Nothing waits for a receiver that is away: its queue is bounded, the oldest goes, and the next message that arrives says
// how many were lost.
func TestBoundedQueue(t *testing.T) {
	t.Parallel()
	address := porttest.Free(t)
	if _, err := notify.NewSyslog(notify.Syslog{Address: "tcp://" + address}, quiet()); err == nil {
		t.Error("plain text without insecure was taken")
	}
	r, err := notify.NewSyslog(notify.Syslog{Address: "tcp://" + address, Insecure: true}, quiet())
	if err != nil {
		t.Fatal(err)
	}
	const many = 10_000
	for n := range many { // nobody sends yet: an offer that waited would hang here
		r.Offer(message(n))
	}
	kept := r.State().Waiting
	if kept == 0 || kept > 1000 || r.State().Dropped != uint64(many-kept) {
		t.Fatalf("%+v", r.State())
	}
	ln, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	var mu sync.Mutex
	var got []byte
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				b := make([]byte, 4096)
				for {
					n, err := c.Read(b)
					mu.Lock()
					got = append(got, b[:n]...)
					mu.Unlock()
					if err != nil {
						return
					}
				}
			}()
		}
	}()
	run(t, r)
	eventually(t, "one arrives", func() bool { return r.State().Delivered > 1 })
	mu.Lock()
	defer mu.Unlock()
	// Octet counting (RFC 5425 §4.3): the number of bytes, a space, the message.
	var size int
	if _, err := fmt.Sscanf(string(got), "%d <", &size); err != nil {
		t.Fatalf("%q: %v", got[:min(80, len(got))], err)
	}
	first := string(got[len(fmt.Sprint(size))+1:][:size])
	if !strings.Contains(first, fmt.Sprintf(`id="%016x"`, many-kept)) || !strings.Contains(first, fmt.Sprintf(`dropped="%d"`, many-kept)) {
		t.Errorf("the first is %q, want number %d with %d dropped", first, many-kept, many-kept)
	}
	second := string(got[len(fmt.Sprint(size))+1+size:])
	if !strings.Contains(second[:min(len(second), size+10)], `dropped="0"`) {
		t.Errorf("the second is %q, and says again what was lost", second[:min(len(second), size)])
	}
}

// A webhook gets JSON under an HMAC-SM3 that OpenSSL computes alike; what is refused is tried again, a bounded number of
// times, and redirects are not followed.
func TestWebhook(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	key := []byte("0123456789abcdef-webhook")
	var status atomic.Int32
	status.Store(http.StatusNoContent)
	type request struct {
		header http.Header
		body   []byte
	}
	requests := make(chan request, 100)
	var elsewhere atomic.Int32
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/hook" {
			elsewhere.Add(1)
			return
		}
		b, _ := io.ReadAll(r.Body)
		requests <- request{r.Header, b}
		w.Header().Set("Location", "/elsewhere")
		w.WriteHeader(int(status.Load()))
	}))
	srv.TLS = &tls.Config{Certificates: []tls.Certificate{p.server}}
	srv.StartTLS()
	t.Cleanup(srv.Close)
	w := notify.Webhook{URL: srv.URL + "/hook?token=canary", Key: key, TLS: notify.TLS{Roots: p.roots, Now: time.Now}, Backoff: time.Millisecond}
	r, err := notify.NewWebhook(w, quiet())
	if err != nil {
		t.Fatal(err)
	}
	run(t, r)
	if err := r.Try(t.Context(), message(1)); err != nil {
		t.Fatal(err)
	}
	got := <-requests
	var body map[string]any
	if err := json.Unmarshal(got.body, &body); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]any{"id": "0000000000000001", "event": "raised", "code": "machine-away", "severity": "warning", "node": "benbu-1", "campus": "本部", "time_trusted": true, "dropped": 0.0} {
		if body[name] != want {
			t.Errorf("%s: %v, want %v", name, body[name], want)
		}
	}
	if openssl, err := exec.LookPath("openssl"); err == nil {
		cmd := exec.Command(openssl, "dgst", "-sm3", "-mac", "HMAC", "-macopt", "hexkey:"+hex.EncodeToString(key), "-r")
		cmd.Stdin = io.MultiReader(strings.NewReader(got.header.Get(notify.HeaderTime)+"\n"), bytes.NewReader(got.body))
		out, err := cmd.Output()
		if want := "hmac-sm3=" + strings.Fields(string(out) + " ?")[0]; err != nil || got.header.Get(notify.HeaderSignature) != want {
			t.Errorf("signature %q, OpenSSL says %q, %v", got.header.Get(notify.HeaderSignature), want, err)
		}
	}
	for _, code := range []int32{http.StatusFound, http.StatusInternalServerError} {
		status.Store(code)
		before := r.State().Dropped
		if err := r.Try(t.Context(), message(2)); err == nil || strings.Contains(err.Error(), "canary") {
			t.Errorf("status %d: %v", code, err)
		}
		if n := len(requests); n != 6 || r.State().Dropped != before+1 {
			t.Errorf("status %d: %d attempts, %+v", code, n, r.State())
		}
		for len(requests) > 0 {
			<-requests
		}
	}
	status.Store(http.StatusOK)
	if err := r.Try(t.Context(), message(3)); err != nil {
		t.Error(err)
	}
	if got := <-requests; !strings.Contains(string(got.body), `"dropped":2`) {
		t.Errorf("what was lost is not told: %s", got.body)
	}
	if n := elsewhere.Load(); n != 0 {
		t.Errorf("%d redirects were followed", n)
	}
	for name, bad := range map[string]notify.Webhook{
		"plain":     {URL: "http://127.0.0.1/", Key: key},
		"password":  {URL: "https://a:b@127.0.0.1/", Key: key},
		"file":      {URL: "file:///etc/passwd", Key: key},
		"short key": {URL: "https://127.0.0.1/", Key: key[:15]},
	} {
		if _, err := notify.NewWebhook(bad, quiet()); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	// The wrong server gets nothing, and the address, which may hold a token, is in no error.
	stranger := w
	stranger.TLS.Roots = x509.NewCertPool()
	if r, err = notify.NewWebhook(stranger, quiet()); err != nil {
		t.Fatal(err)
	}
	run(t, r)
	if err := r.Try(t.Context(), message(4)); err == nil || strings.Contains(err.Error(), "canary") || strings.Contains(r.State().Name, "canary") {
		t.Errorf("%v, %+v", err, r.State())
	}
	if len(requests) != 0 {
		t.Error("a server of another CA got a message")
	}
}

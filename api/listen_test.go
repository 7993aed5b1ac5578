package api_test

import (
	"bufio"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"yinjian/api"
	"yinjian/api/client"
	"yinjian/ntp"
)

// A countingKey counts its signatures, as a cipher machine's key would be used.
type countingKey struct {
	crypto.Signer
	used atomic.Int64
}

func (k *countingKey) Sign(r io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	k.used.Add(1)
	return k.Signer.Sign(r, digest, opts)
}

var rsaKey = sync.OnceValue(func() *rsa.PrivateKey {
	k, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	return k
})

// rsaCertificate is a certificate of that name, for an RSA key whose uses are counted.
func rsaCertificate(t *testing.T, name string) (tls.Certificate, *countingKey) {
	t.Helper()
	key := &countingKey{Signer: rsaKey()}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name}, NotBefore: epoch.AddDate(-2, 0, 0), NotAfter: epoch.AddDate(50, 0, 0)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), rsaKey())
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, key
}

// A stuckKey signs nothing until it is told to, and says who waits.
type stuckKey struct {
	crypto.Signer
	waiting chan struct{}
	leave   chan struct{}
}

func (k *stuckKey) Sign(r io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	k.waiting <- struct{}{}
	<-k.leave
	return k.Signer.Sign(r, digest, opts)
}

// One address does not take every place among the handshakes that wait for the cipher machine.
func TestHandshakesAreShared(t *testing.T) {
	t.Parallel()
	cert, key := rsaCertificate(t, "a")
	stuck := &stuckKey{key, make(chan struct{}, 4*api.MaxHandshakes), make(chan struct{})}
	cert.PrivateKey = stuck
	ln, err := api.ListenTLS("127.0.0.1:0", func() *tls.Certificate { return &cert }, newClock(), false, nil, 16*api.MaxHandshakes)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() { _ = c.(*tls.Conn).Handshake() }()
		}
	}()
	var all sync.WaitGroup
	var refused atomic.Int64
	dial := func(last byte) {
		all.Go(func() {
			d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, last)}}
			c, err := tls.DialWithDialer(&d, "tcp", ln.Addr().String(), &tls.Config{InsecureSkipVerify: true})
			if err != nil {
				refused.Add(1)
				return
			}
			c.Close()
		})
	}
	const one = api.MaxHandshakes / 2
	for range one + 100 {
		dial(2)
	}
	for range one {
		<-stuck.waiting
	}
	for limit := time.Now().Add(2 * time.Minute); refused.Load() < 100; runtime.Gosched() {
		if time.Now().After(limit) {
			t.Fatalf("of %d handshakes from one address %d were refused", one+100, refused.Load())
		}
	}
	dial(3)
	<-stuck.waiting
	close(stuck.leave)
	all.Wait()
	if n := refused.Load(); n != 100 {
		t.Errorf("%d were refused", n)
	}
	for limit := time.Now().Add(2 * time.Minute); ; { // the places become free again
		before := refused.Load()
		dial(2)
		all.Wait()
		if refused.Load() == before {
			return
		}
		if time.Now().After(limit) {
			t.Fatal("the places are not given back")
		}
	}
}

// listenWith serves the kit's handler with what certificate answers.
func listenWith(t *testing.T, k *kit, certificate func() *tls.Certificate, tls12 bool) (addr string) {
	t.Helper()
	ln, err := api.ListenTLS("127.0.0.1:0", certificate, k.clock, tls12, nil, 4096)
	if err != nil {
		t.Fatal(err)
	}
	serve(t, k.server.NewHTTPServer(k.server.Handler()), ln)
	return ln.Addr().String()
}

// alive asks on a fresh connection and answers what the handshake came to.
func alive(t *testing.T, addr string, cfg *tls.Config) tls.ConnectionState {
	t.Helper()
	c, err := tls.Dial("tcp", addr, cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ask(t, c)
	return c.ConnectionState()
}

// ask makes one request on an open connection; a ticket comes with the answer (RFC 8446 §4.6.1).
func ask(t *testing.T, c net.Conn) {
	t.Helper()
	if err := c.SetDeadline(time.Now().Add(2 * time.Minute)); err != nil {
		t.Fatal(err)
	}
	fmt.Fprint(c, "GET /health/alive HTTP/1.1\r\nHost: x\r\n\r\n")
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if b, err := io.ReadAll(resp.Body); err != nil || !strings.Contains(string(b), `"alive":true`) {
		t.Errorf("answer %q, %v", b, err)
	}
}

// A resumed session costs no signature; its ticket is good for this listener alone, and for seven days.
func TestSessionsResume(t *testing.T) {
	t.Parallel()
	for name, version := range map[string]uint16{"TLS 1.3": tls.VersionTLS13, "TLS 1.2": tls.VersionTLS12} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			k := start(t)
			cert, key := rsaCertificate(t, "first")
			certificate := func() *tls.Certificate { return &cert }
			addr := listenWith(t, k, certificate, true)
			client := &tls.Config{InsecureSkipVerify: true, ServerName: "x", MaxVersion: version, ClientSessionCache: tls.NewLRUClientSessionCache(8), Time: func() time.Time { return epoch }}
			for i := range 4 {
				if s := alive(t, addr, client); s.DidResume != (i > 0) || s.Version != version {
					t.Errorf("connection %d: resumed %v, %s", i, s.DidResume, tls.VersionName(s.Version))
				}
			}
			if n := key.used.Load(); n != 1 {
				t.Errorf("%d signatures for one full handshake and three resumed", n)
			}
			// A restart forgets the keys of tickets: they are in memory alone.
			if alive(t, listenWith(t, k, certificate, true), client).DidResume {
				t.Error("another listener resumed the session")
			}
			if alive(t, addr, client).DidResume { // the client has the other's ticket now
				t.Error("the first listener took the other's ticket")
			}
			// Keys change daily, and yesterday's are still good; a ticket of the eighth day is not.
			if k.clock.add(25 * time.Hour); !alive(t, addr, client).DidResume {
				t.Error("not resumed on the next day")
			}
			if k.clock.add(8 * 24 * time.Hour); alive(t, addr, client).DidResume {
				t.Error("resumed after eight days")
			}
		})
	}
}

// Our client's second connection is resumed.
func TestClientResumes(t *testing.T) {
	t.Parallel()
	k := start(t)
	cert, _ := certificate(t)
	key := &countingKey{Signer: cert.PrivateKey.(crypto.Signer)}
	cert.PrivateKey = key
	addr := listenWith(t, k, func() *tls.Certificate { return &cert }, false)
	c := k.client(func(cfg *client.Config) { cfg.BaseURL = "https://" + addr })
	for range 3 {
		if err := c.Alive(t.Context()); err != nil {
			t.Fatal(err)
		}
		c.Close() // idle connections alone
	}
	if n := key.used.Load(); n != 1 {
		t.Errorf("%d signatures for three connections", n)
	}
}

// OpenSSL resumes too.
func TestOpenSSLResumes(t *testing.T) {
	t.Parallel()
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		t.Skip("openssl is missing")
	}
	k := start(t)
	k.clock.set(time.Now(), ntp.Trusted) // OpenSSL has this machine's clock
	cert, key := rsaCertificate(t, "first")
	addr := listenWith(t, k, func() *tls.Certificate { return &cert }, false)
	session := filepath.Join(t.TempDir(), "session")
	for _, c := range [][2]string{{"-sess_out", "New, TLSv1.3"}, {"-sess_in", "Reused, TLSv1.3"}} {
		cmd := exec.Command(openssl, "s_client", "-connect", addr, c[0], session, "-ign_eof")
		cmd.Stdin = strings.NewReader("GET /health/alive HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
		if out, _ := cmd.CombinedOutput(); !strings.Contains(string(out), c[1]) || !strings.Contains(string(out), `"alive":true`) {
			t.Errorf("openssl s_client %s: %s", c[0], out)
		}
	}
	if n := key.used.Load(); n != 1 {
		t.Errorf("%d signatures", n)
	}
}

// The certificate may be replaced while connections are open.
func TestCertificateIsReplaced(t *testing.T) {
	t.Parallel()
	k := start(t)
	first, _ := rsaCertificate(t, "first")
	second, _ := rsaCertificate(t, "second")
	var current atomic.Pointer[tls.Certificate]
	current.Store(&first)
	addr := listenWith(t, k, current.Load, false)
	client := &tls.Config{InsecureSkipVerify: true}
	held, err := tls.Dial("tcp", addr, client)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	current.Store(&second)
	ask(t, held)
	for conn, want := range map[string]string{held.ConnectionState().PeerCertificates[0].Subject.CommonName: "first", alive(t, addr, client).PeerCertificates[0].Subject.CommonName: "second"} {
		if conn != want {
			t.Errorf("certificate %q, want %q", conn, want)
		}
	}
}

// TestOldClients: what OpenSSL can reach with TLS 1.2 allowed, and with it off.
func TestOldClients(t *testing.T) {
	t.Parallel()
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		t.Skip("openssl is missing")
	}
	k := start(t)
	cert, _ := rsaCertificate(t, "old")
	cert.PrivateKey = rsaKey() // one that could decrypt, too
	certificate := func() *tls.Certificate { return &cert }
	addrs := map[bool]string{false: listenWith(t, k, certificate, false), true: listenWith(t, k, certificate, true)}
	const weak = ":@SECLEVEL=0" // OpenSSL is to offer it; we are to refuse
	for name, c := range map[string]struct {
		flags         string
		on, off       bool   // whether a connection is made
		want, wantOff string // what OpenSSL says
	}{
		"TLS 1.3":                   {"-tls1_3", true, true, "New, TLSv1.3", "New, TLSv1.3"},
		"TLS 1.2":                   {"-tls1_2", true, false, "New, TLSv1.2", "alert protocol version"},
		"AES-128-GCM":               {"-tls1_2 -cipher ECDHE-RSA-AES128-GCM-SHA256", true, false, "ECDHE-RSA-AES128-GCM-SHA256", "alert protocol version"},
		"AES-256-GCM":               {"-tls1_2 -cipher ECDHE-RSA-AES256-GCM-SHA384", true, false, "ECDHE-RSA-AES256-GCM-SHA384", "alert protocol version"},
		"ChaCha20":                  {"-tls1_2 -cipher ECDHE-RSA-CHACHA20-POLY1305", true, false, "ECDHE-RSA-CHACHA20-POLY1305", "alert protocol version"},
		"PKCS#1, as old Java":       {"-tls1_2 -sigalgs RSA+SHA256 -groups P-256", true, false, "Peer signature type: RSA\n", "alert protocol version"},
		"CBC":                       {"-tls1_2 -cipher ECDHE-RSA-AES128-SHA:ECDHE-RSA-AES256-SHA:ECDHE-RSA-AES128-SHA256:ECDHE-RSA-AES256-SHA384" + weak, false, false, "handshake failure", ""},
		"RSA key exchange":          {"-tls1_2 -cipher AES128-GCM-SHA256:AES256-GCM-SHA384:AES128-SHA" + weak, false, false, "handshake failure", ""},
		"finite-field key exchange": {"-tls1_2 -cipher DHE-RSA-AES128-GCM-SHA256:DHE-RSA-AES256-GCM-SHA384" + weak, false, false, "handshake failure", ""},
		"anonymous":                 {"-tls1_2 -cipher AECDH-AES128-SHA:ADH-AES128-GCM-SHA256" + weak, false, false, "handshake failure", ""},
		"SHA-1 alone":               {"-tls1_2 -sigalgs RSA+SHA1 -cipher ALL" + weak, false, false, "handshake failure", ""},
		"TLS 1.1":                   {"-tls1_1 -cipher ALL" + weak, false, false, "alert protocol version", "alert protocol version"},
		"TLS 1.0":                   {"-tls1 -cipher ALL" + weak, false, false, "alert protocol version", "alert protocol version"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for tls12, addr := range addrs {
				cmd := exec.Command(openssl, append([]string{"s_client", "-connect", addr, "-ign_eof"}, strings.Fields(c.flags)...)...)
				cmd.Stdin = strings.NewReader("GET /health/alive HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
				out, _ := cmd.CombinedOutput() // its status is 1 where it is refused
				made, want := c.on, c.want
				if !tls12 {
					made, want = c.off, c.wantOff
				}
				if strings.Contains(string(out), `"alive":true`) != made || !strings.Contains(string(out), want) {
					t.Errorf("tls12 %v: connected, want %v, and %q: %s", tls12, made, want, out)
				}
			}
		})
	}
}

// TestOldPrograms: Java and Mono, held to TLS 1.2 and to what Java 8 offers, reach a listener that allows it and no
// other.
func TestOldPrograms(t *testing.T) {
	t.Parallel()
	k := start(t)
	cert, _ := rsaCertificate(t, "old")
	cert.SupportedSignatureAlgorithms = []tls.SignatureScheme{tls.PSSWithSHA256, tls.PKCS1WithSHA256} // the cipher machine's
	certificate := func() *tls.Certificate { return &cert }
	off, on := listenWith(t, k, certificate, false), listenWith(t, k, certificate, true)
	for name, c := range map[string]struct{ build, run []string }{
		"java": {run: []string{"java", "-Djdk.tls.client.protocols=TLSv1.2", "-Djdk.tls.client.SignatureSchemes=rsa_pkcs1_sha512,rsa_pkcs1_sha384,rsa_pkcs1_sha256,rsa_pkcs1_sha1", "testdata/Get.java"}},
		"mono": {build: []string{"mcs", "-out:" + filepath.Join(t.TempDir(), "Get.exe"), "testdata/Get.cs"}, run: []string{"mono"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			run := c.run
			if _, err := exec.LookPath(run[0]); err != nil {
				t.Skipf("%s is missing", run[0])
			}
			if c.build != nil {
				if out, err := exec.Command(c.build[0], c.build[1:]...).CombinedOutput(); err != nil {
					t.Skipf("%s: %v %s", c.build[0], err, out)
				}
				run = append(run, strings.TrimPrefix(c.build[1], "-out:"))
			}
			for addr, want := range map[string]bool{off: false, on: true} {
				out, err := exec.Command(run[0], append(run[1:], "https://"+addr+"/health/alive")...).CombinedOutput()
				if (err == nil) != want || strings.Contains(string(out), `"alive":true`) != want {
					t.Errorf("TLS 1.2 allowed %v: %v\n%s", want, err, out)
				}
			}
		})
	}
}

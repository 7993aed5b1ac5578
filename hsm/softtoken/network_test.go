package softtoken_test

import (
	"bytes"
	"crypto/tls"
	"encoding/pem"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/emmansun/gmsm/sm3"
	"github.com/miekg/pkcs11"

	"yinjian/hsm/softtoken"
)

// elsewhere is the setting for a module on another machine.
func (m *machine) elsewhere() string {
	address := m.cfg.Address
	if m.server != nil {
		address = m.server.Addr().String()
	}
	return "address=" + address + " credentials='" + m.credentials() + "'"
}

func (m *machine) credentials() string { return filepath.Join(m.dir, "link-client.pem") }

// freeAddress is one that nobody listens at.
func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer l.Close()
	return l.Addr().String()
}

// newDistant makes a machine that also listens on the network.
func newDistant(t *testing.T) *machine {
	t.Helper()
	m := newFolder(t)
	m.cfg.Address = "127.0.0.1:0"
	m.start(t)
	return m
}

// distant loads a copy of the module that reaches the machine over the network.
func (m *machine) distant(t *testing.T) *pkcs11.Ctx {
	t.Helper()
	path := m.copyModule(t)
	must(t, os.WriteFile(path+".conf", []byte("timeout_ms=5000\n"+strings.ReplaceAll(strings.ReplaceAll(m.elsewhere(), " ", "\n"), "'", "")+"\n"), 0o600))
	p := pkcs11.New(path)
	must(t, p.Initialize())
	t.Cleanup(func() {
		p.Finalize()
		p.Destroy()
	})
	return p
}

// What the unix socket does is done over the network: tokens, keys, signatures, large frames both ways; a login counts for
// its application alone, and when the machine comes back the module finds it.
func TestNetwork(t *testing.T) {
	t.Parallel()
	m := newFolder(t)
	m.cfg.Address = freeAddress(t)
	m.start(t)
	p := m.distant(t)
	initToken(t, p, 0, "distant")
	s := openRW(t, p, 0)
	must(t, p.Login(s, pkcs11.CKU_USER, userPIN))
	pub, priv := generateSM2(t, p, s, "k")
	key := sm2Public(t, p, s, pub)
	e := sm3.Sum([]byte("e"))
	if sig := mustSign(t, p, s, mech(pkcs11.CKM_ECDSA, nil), priv, e[:]); !verifyRaw(key, e[:], sig) {
		t.Error("a signature made over the network does not verify")
	}
	large := bytes.Repeat([]byte("0123456789abcdef"), 40_000)
	must(t, p.DigestInit(s, mech(pkcs11.CKM_SHA256, nil)))
	got, err := p.Digest(s, large)
	must(t, err)
	out := tool(t, large, "openssl", "dgst", "-sha256", "-binary")
	if string(got) != out {
		t.Errorf("digest of %d bytes = %x", len(large), got)
	}
	random, err := p.GenerateRandom(s, 100_000)
	must(t, err)
	if len(random) != 100_000 {
		t.Errorf("%d random bytes", len(random))
	}

	other := m.distant(t)
	theirs := openRW(t, other, 0)
	if keys := find(t, other, theirs, attr(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY)); len(keys) != 0 {
		t.Error("another application's login shows private keys")
	}
	if local := m.module(t); len(find(t, local, openRW(t, local, 0), attr(pkcs11.CKA_LABEL, "k"))) != 1 {
		t.Error("the unix socket does not show the public key")
	}

	m.restart(t)
	_, err = sign(p, s, mech(pkcs11.CKM_ECDSA, nil), priv, e[:])
	wantRV(t, "signing after a restart", err, pkcs11.CKR_DEVICE_REMOVED)
	s = openRW(t, p, 0)
	must(t, p.Login(s, pkcs11.CKU_USER, userPIN))
	if sig := mustSign(t, p, s, mech(pkcs11.CKM_ECDSA, nil), findOne(t, p, s, pkcs11.CKO_PRIVATE_KEY, "k"), e[:]); !verifyRaw(key, e[:], sig) {
		t.Error("a signature made after a restart does not verify")
	}
}

// By its environment pkcs11-tool reaches the machine, too.
func TestNetworkByEnvironment(t *testing.T) {
	t.Parallel()
	m := newDistant(t)
	path := filepath.Join(t.TempDir(), "p11.so")
	b, err := os.ReadFile(modulePath)
	must(t, err)
	must(t, os.WriteFile(path, b, 0o755))
	if _, err := exec.LookPath("pkcs11-tool"); err != nil {
		t.Skip("pkcs11-tool is not installed")
	}
	for _, c := range []struct {
		name, credentials string
		works             bool
	}{{"both", m.credentials(), true}, {"no credentials", "", false}} {
		cmd := exec.Command("pkcs11-tool", "--module", path, "-L")
		cmd.Env = append(os.Environ(), "YINJIAN_P11_ADDRESS="+m.server.Addr().String())
		if c.credentials != "" {
			cmd.Env = append(cmd.Env, "YINJIAN_P11_CREDENTIALS="+c.credentials)
		}
		out, err := cmd.CombinedOutput()
		if works := err == nil && strings.Contains(string(out), "EVALUATION ONLY"); works != c.works {
			t.Errorf("%s: %v\n%s", c.name, err, out)
		}
	}
}

// Nobody is let in but who has the machine's file, by TLS 1.3; OpenSSL asks from outside.
func TestNetworkRefusesStrangers(t *testing.T) {
	t.Parallel()
	m, other := newDistant(t), newDistant(t)
	address := m.server.Addr().String()
	// "YJP1" and an application id, answered with a reply of 8 bytes by who lets them in.
	hello := append([]byte("YJP1"), make([]byte, 16)...)
	for _, c := range []struct {
		name string
		args []string
		in   bool
	}{
		{"its file", []string{"-cert", m.credentials(), "-key", m.credentials()}, true},
		{"TLS 1.2", []string{"-cert", m.credentials(), "-key", m.credentials(), "-tls1_2"}, false},
		{"no certificate", nil, false},
		{"another machine's file", []string{"-cert", other.credentials(), "-key", other.credentials()}, false},
	} {
		cmd := exec.Command("openssl", append([]string{"s_client", "-quiet", "-connect", address}, c.args...)...)
		cmd.Stdin = bytes.NewReader(hello)
		pipe, err := cmd.StdoutPipe()
		must(t, err)
		must(t, cmd.Start())
		out := make([]byte, 12)
		n, _ := io.ReadFull(pipe, out) // whoever is let in may wait there for ever; who is not sees the end
		out = out[:n]
		cmd.Process.Kill()
		cmd.Wait() // how it ended is not what is asked
		if in := bytes.Equal(out, []byte{0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0}); in != c.in {
			t.Errorf("%s: let in is %v, want %v: %x", c.name, in, c.in, out)
		}
	}
	plain, err := net.Dial("tcp", address)
	must(t, err)
	defer plain.Close()
	_, err = plain.Write(append(hello, make([]byte, 64)...))
	must(t, err)
	answer := make([]byte, 64)
	n, _ := plain.Read(answer)
	if bytes.Contains(answer[:n], make([]byte, 8)) {
		t.Errorf("without TLS it answers %x", answer[:n])
	}
}

// Strangers who connect and say nothing take no place from those on the machine itself.
func TestNetworkStrangersTakeNoRoom(t *testing.T) {
	t.Parallel()
	m := newDistant(t)
	p := m.module(t)
	initToken(t, p, 0, "a")
	for range softtoken.MaxConnections + 1 {
		c, err := net.DialTimeout("tcp", m.server.Addr().String(), time.Second)
		if err != nil {
			t.Logf("the system takes no more: %v", err)
			break
		}
		defer c.Close()
	}
	for m.server.Peers() < softtoken.MaxHandshakes {
		time.Sleep(time.Millisecond)
	}
	s := openRW(t, p, 0)
	must(t, p.Login(s, pkcs11.CKU_USER, userPIN))             // takes as long as taking hundreds of connections
	if n := m.server.Peers(); n > 2*softtoken.MaxHandshakes { // some may be just leaving
		t.Errorf("%d connections are taken at once", n)
	}
}

// The module speaks to its machine alone: not to another one, nor to who has only the file that modules have; and it uses no file
// that others may read.
func TestNetworkModuleRefusesStrangers(t *testing.T) {
	t.Parallel()
	m, other := newDistant(t), newDistant(t)
	b, err := os.ReadFile(m.credentials())
	must(t, err)
	pair, err := tls.X509KeyPair(b, b)
	must(t, err)
	thief, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{pair}, ClientAuth: tls.RequireAnyClientCert})
	must(t, err)
	defer thief.Close()
	answered := make(chan bool, 1)
	go func() {
		for {
			c, err := thief.Accept()
			if err != nil {
				return
			}
			n, _ := c.Read(make([]byte, 20))
			select {
			case answered <- n > 0:
			default:
			}
			c.Close()
		}
	}()
	// A file without the machine's certificate.
	key, rest := pem.Decode(b)
	own, _ := pem.Decode(rest)
	alone := filepath.Join(m.root, "alone.pem")
	must(t, os.WriteFile(alone, append(pem.EncodeToMemory(key), pem.EncodeToMemory(own)...), 0o600))
	open, shared := filepath.Join(m.root, "open.pem"), filepath.Join(m.root, "shared.pem")
	must(t, os.WriteFile(open, b, 0o600))
	must(t, os.Chmod(open, 0o604))
	must(t, os.WriteFile(shared, b, 0o600))
	must(t, os.Chmod(shared, 0o640))

	path := m.copyModule(t)
	must(t, os.WriteFile(path+".conf", []byte("socket=/nowhere\n"), 0o600))
	address := m.server.Addr().String()
	for reserved, want := range map[string]uint{
		m.elsewhere(): pkcs11.CKR_OK,
		"address=" + other.server.Addr().String() + " credentials='" + m.credentials() + "'": pkcs11.CKR_DEVICE_ERROR,
		"address=" + thief.Addr().String() + " credentials='" + m.credentials() + "'":        pkcs11.CKR_DEVICE_ERROR,
		"address=" + address + " credentials='" + alone + "'":                                pkcs11.CKR_DEVICE_ERROR,
		"address=" + address + " credentials='" + open + "'":                                 pkcs11.CKR_DEVICE_ERROR,
		"address=" + address + " credentials='" + shared + "'":                               pkcs11.CKR_DEVICE_ERROR,
		"address=" + address + " credentials=/nowhere":                                       pkcs11.CKR_DEVICE_ERROR,
		"address=" + address:                                             pkcs11.CKR_ARGUMENTS_BAD,
		"credentials=/nowhere":                                           pkcs11.CKR_ARGUMENTS_BAD,
		m.elsewhere() + " socket='" + m.socket + "'":                     pkcs11.CKR_ARGUMENTS_BAD,
		"address=localhost:1 credentials=/nowhere":                       pkcs11.CKR_ARGUMENTS_BAD,
		"address=127.0.0.1 credentials=/nowhere":                         pkcs11.CKR_ARGUMENTS_BAD,
		"address=127.0.0.1:65536x credentials=/nowhere":                  pkcs11.CKR_ARGUMENTS_BAD,
		"address=[::1]:1 credentials=/nowhere":                           pkcs11.CKR_DEVICE_ERROR,
		"address=" + address + " credentials=nowhere":                    pkcs11.CKR_ARGUMENTS_BAD,
		"address=" + strings.Repeat("1", 90) + ":1 credentials=/nowhere": pkcs11.CKR_ARGUMENTS_BAD,
	} {
		c := pkcs11.New(path)
		wantRV(t, "C_Initialize with pReserved "+reserved, c.Initialize(pkcs11.InitializeWithReserved(cString(reserved))), want)
		c.Finalize()
		c.Destroy()
	}
	select {
	case got := <-answered:
		if got {
			t.Error("the module spoke to who has only its own file")
		}
	default:
	}
}

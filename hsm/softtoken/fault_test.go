package softtoken_test

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/emmansun/gmsm/sm3"
	"github.com/miekg/pkcs11"
	"yinjian/hsm/softtoken"
)

// TestDaemonKilled kills the daemon under eight signing sessions: every call returns, with CKR_DEVICE_REMOVED, and
// after a restart all goes on without C_Finalize.
func TestDaemonKilled(t *testing.T) {
	t.Parallel()
	m := newFolder(t)
	m.startProcess(t)
	p := m.module(t, "timeout_ms=5000")
	initToken(t, p, 0, "a")
	s := openRW(t, p, 0)
	must(t, p.Login(s, pkcs11.CKU_USER, userPIN))
	pub, priv := generateSM2(t, p, s, "k")
	key := sm2Public(t, p, s, pub)
	e := sm3.Sum([]byte("e"))
	for range 3 {
		var signing, done sync.WaitGroup
		for range 8 {
			signing.Add(1)
			done.Go(func() {
				h, err := p.OpenSession(0, pkcs11.CKF_SERIAL_SESSION)
				if err != nil {
					t.Errorf("C_OpenSession: %v", err)
				}
				for i := 0; ; i++ {
					if i == 20 {
						signing.Done()
					}
					sig, err := sign(p, h, mech(pkcs11.CKM_ECDSA, nil), priv, e[:])
					if err != nil {
						wantRV(t, "signing while the daemon is killed", err, pkcs11.CKR_DEVICE_REMOVED)
						if i < 20 {
							signing.Done()
						}
						break
					}
					if !verifyRaw(key, e[:], sig) {
						t.Error("a signature does not verify")
					}
				}
				wantRV(t, "a dead session's next call", p.SignInit(h, mech(pkcs11.CKM_ECDSA, nil), priv), pkcs11.CKR_DEVICE_REMOVED)
				if err := p.CloseSession(h); err != nil {
					t.Errorf("C_CloseSession of a dead session = %v", err)
				}
			})
		}
		signing.Wait()
		started := time.Now()
		m.kill(t)
		done.Wait()
		if took := time.Since(started); took > time.Minute {
			t.Errorf("the last call came back after %v", took)
		}
		_, err := p.OpenSession(0, pkcs11.CKF_SERIAL_SESSION)
		wantRV(t, "C_OpenSession without a daemon", err, pkcs11.CKR_DEVICE_REMOVED)
		_, err = p.GetSlotList(true)
		wantRV(t, "C_GetSlotList without a daemon", err, pkcs11.CKR_DEVICE_REMOVED)
		m.startProcess(t)
		if _, err := p.GetSlotList(true); err != nil {
			t.Errorf("C_GetSlotList after the restart: %v", err)
		}
		s = openRW(t, p, 0)
		wantRV(t, "the old key handle", p.SignInit(s, mech(pkcs11.CKM_ECDSA, nil), priv), pkcs11.CKR_KEY_HANDLE_INVALID)
		must(t, p.Login(s, pkcs11.CKU_USER, userPIN))
		priv = findOne(t, p, s, pkcs11.CKO_PRIVATE_KEY, "k")
		mustSign(t, p, s, mech(pkcs11.CKM_ECDSA, nil), priv, e[:])
	}
}

// TestDaemonStopped stops the daemon as SIGSTOP does: calls come back after the timeout.
func TestDaemonStopped(t *testing.T) {
	t.Parallel()
	m := newFolder(t)
	m.startProcess(t)
	p := m.module(t, "timeout_ms=1500") // long enough for the key derivation of a login on a busy machine
	initToken(t, p, 0, "a")
	s := openRW(t, p, 0)
	must(t, m.process.Process.Signal(syscall.SIGSTOP))
	if _, err := syscall.Wait4(m.process.Process.Pid, nil, syscall.WUNTRACED, nil); err != nil { // it takes a moment
		t.Fatal(err)
	}
	for name, call := range map[string]func() error{
		"C_GetSessionInfo": func() error { _, err := p.GetSessionInfo(s); return err },
		"C_OpenSession":    func() error { _, err := p.OpenSession(0, pkcs11.CKF_SERIAL_SESSION); return err },
		"C_GetTokenInfo":   func() error { _, err := p.GetTokenInfo(0); return err },
	} {
		started := time.Now()
		wantRV(t, name, call(), pkcs11.CKR_DEVICE_REMOVED)
		if took := time.Since(started); took < time.Second || took > time.Minute {
			t.Errorf("%s came back after %v", name, took)
		}
	}
	must(t, m.process.Process.Signal(syscall.SIGCONT))
	// An answer that comes late is not taken for the answer to another question.
	wantRV(t, "the session that timed out", p.Logout(s), pkcs11.CKR_DEVICE_REMOVED)
	s = openRW(t, p, 0)
	must(t, p.Login(s, pkcs11.CKU_USER, userPIN))
}

func TestNoDaemon(t *testing.T) {
	t.Parallel()
	m := newFolder(t)
	p := pkcs11.New(m.copyModule(t))
	defer p.Destroy()
	wantRV(t, "C_Initialize without a daemon", p.Initialize(), pkcs11.CKR_DEVICE_ERROR)
	_, err := p.GetSlotList(true)
	wantRV(t, "C_GetSlotList afterwards", err, pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED)
	m.start(t)
	must(t, p.Initialize())
	must(t, p.Finalize())
}

// A raw connection to the daemon.
func dial(t testing.TB, m *machine, id string) net.Conn {
	t.Helper()
	c, err := net.Dial("unix", m.socket)
	must(t, err)
	t.Cleanup(func() { c.Close() })
	must(t, c.SetDeadline(time.Now().Add(2*time.Minute)))
	_, err = c.Write([]byte("YJP1" + id))
	must(t, err)
	if rv := readReply(t, c); rv != 0 {
		t.Fatalf("hello is answered with CKR %#x", rv)
	}
	return c
}

func readReply(t testing.TB, c net.Conn) uint64 {
	t.Helper()
	var head [4]byte
	if _, err := io.ReadFull(c, head[:]); err != nil {
		t.Fatal(err)
	}
	body := make([]byte, binary.BigEndian.Uint32(head[:]))
	if _, err := io.ReadFull(c, body); err != nil {
		t.Fatal(err)
	}
	return binary.BigEndian.Uint64(body)
}

// TestGarbage sends what the module never would. Each such connection is closed, and others are not disturbed.
func TestGarbage(t *testing.T) {
	t.Parallel()
	m, p, s := loggedIn(t)
	const id = "0123456789abcdef"
	closed := func(name string, c net.Conn) {
		t.Helper()
		if n, err := c.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
			t.Errorf("%s: read %d bytes, %v; want the connection closed", name, n, err)
		}
	}
	for name, frame := range map[string]string{
		"length 0":                   "\x00\x00\x00\x00",
		"length 3":                   "\x00\x00\x00\x03abc",
		"length over the limit":      "\x00\x10\x00\x01",
		"length 4 GiB":               "\xff\xff\xff\xff",
		"bytes left over":            "\x00\x00\x00\x05\x00\x00\x00\x04x",
		"argument missing":           "\x00\x00\x00\x04\x00\x00\x00\x05",
		"string longer than frame":   "\x00\x00\x00\x08\x00\x00\x00\x3f\x7f\xff\xff\xff",
		"template of a million":      "\x00\x00\x00\x08\x00\x00\x00\x14\x00\x0f\xff\xff",
		"template without its parts": "\x00\x00\x00\x08\x00\x00\x00\x14\x00\x00\x00\x02",
	} {
		c := dial(t, m, id)
		if _, err := c.Write([]byte(frame)); err != nil && !errors.Is(err, syscall.EPIPE) {
			t.Fatal(err)
		}
		closed(name, c)
	}
	c, err := net.Dial("unix", m.socket)
	must(t, err)
	defer c.Close()
	_, err = c.Write([]byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n"))
	must(t, err)
	closed("HTTP", c)

	c = dial(t, m, id)
	for name, row := range map[string]struct {
		frame string
		want  uint64
	}{
		"unknown call":            {"\x00\x00\x00\x04\x00\x00\x00\x7f", 0x54},
		"call over the table":     {"\x00\x00\x00\x04\xff\xff\xff\xff", 0x54},
		"session call without":    {"\x00\x00\x00\x04\x00\x00\x00\x13", 0xB3},
		"slot over the table":     {"\x00\x00\x00\x0c\x00\x00\x00\x05\xff\xff\xff\xff\xff\xff\xff\xff", 3},
		"list in two small parts": {"", 0},
	} {
		if name == "list in two small parts" {
			_, err := c.Write([]byte("\x00\x00"))
			must(t, err)
			row.frame = "\x00\x04\x00\x00\x00\x04"
		}
		_, err := c.Write([]byte(row.frame))
		must(t, err)
		if got := readReply(t, c); got != row.want {
			t.Errorf("%s: CKR %#x, want %#x", name, got, row.want)
		}
	}
	// Two requests in one write are answered one after the other.
	_, err = c.Write([]byte(strings.Repeat("\x00\x00\x00\x04\x00\x00\x00\x04", 2)))
	must(t, err)
	for range 2 {
		if got := readReply(t, c); got != 0 {
			t.Errorf("requests in one write: CKR %#x", got)
		}
	}
	_, err = p.GetSessionInfo(s)
	must(t, err)
}

// TestHalfFrame: who begins a request must finish it; a half one does not hold the daemon up, nor its stop.
func TestHalfFrame(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	c := dial(t, m, "0123456789abcdef")
	_, err := c.Write([]byte("\x00\x00\x00\x40\x00"))
	must(t, err)
	silent, err := net.Dial("unix", m.socket) // not even a hello
	must(t, err)
	defer silent.Close()
	started := time.Now()
	must(t, c.SetDeadline(started.Add(2*time.Minute)))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("read = %v, want the connection closed", err)
	}
	if took := time.Since(started); took > time.Minute {
		t.Errorf("the half frame was waited for %v", took)
	}
	must(t, silent.SetDeadline(time.Now().Add(time.Minute)))
	if _, err := silent.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("silent peer: read = %v, want the connection closed", err)
	}
}

// TestStopWithPeers: idle, half-open and never-reading peers do not keep the daemon from stopping.
func TestStopWithPeers(t *testing.T) {
	t.Parallel()
	m, _, _ := loggedIn(t)
	half := dial(t, m, "0123456789abcdef")
	_, err := half.Write([]byte("\x00\x00"))
	must(t, err)
	deaf := dial(t, m, "0123456789abcdef")
	must(t, deaf.SetWriteDeadline(time.Now().Add(200*time.Millisecond)))
	for err == nil { // until its replies fill the way back and its requests the way there
		_, err = deaf.Write([]byte(strings.Repeat("\x00\x00\x00\x0c\x00\x00\x00\x06\x00\x00\x00\x00\x00\x00\x00\x00", 100)))
	}
	started := time.Now()
	m.stop()
	if took := time.Since(started); took > time.Minute {
		t.Errorf("stopping took %v", took)
	}
}

// TestApplicationIsBound: another process that knows an application's id does not become part of it.
func TestApplicationIsBound(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	dial(t, m, "0123456789abcdef")
	dial(t, m, "0123456789abcdef") // the same process may
	if _, err := exec.LookPath("python3"); err != nil {
		t.Skip("python3 is not installed")
	}
	program := `
import socket, sys
c = socket.socket(socket.AF_UNIX)
c.connect(sys.argv[1])
c.sendall(b'YJP1' + sys.argv[2].encode())
c.shutdown(socket.SHUT_WR)
print(c.recv(100).hex(), c.recv(100).hex())
`
	if out := tool(t, []byte(program), "python3", "-", m.socket, "0123456789abcdef"); out != "000000080000000000000200 \n" {
		t.Errorf("taking an id over is answered with %q, want CKR_FUNCTION_REJECTED and the end", out)
	}
	if out := tool(t, []byte(program), "python3", "-", m.socket, "fedcba9876543210"); !strings.HasPrefix(out, "000000080000000000000000") {
		t.Errorf("an id of its own is answered with %q", out)
	}
}

// TestHardened looks at the daemon's process as the kernel shows it.
func TestHardened(t *testing.T) {
	t.Parallel()
	m := newFolder(t)
	m.startProcess(t)
	p := m.module(t) // its C_Initialize is answered, so Serve runs
	defer p.Finalize()
	limits, err := os.ReadFile("/proc/" + itoa(m.process.Process.Pid) + "/limits")
	must(t, err)
	for line := range strings.Lines(string(limits)) {
		if strings.HasPrefix(line, "Max core file size") && strings.Fields(line)[4] != "0" {
			t.Errorf("core dumps: %s", line)
		}
	}
	if os.Geteuid() != 0 {
		t.Log("not root: /proc/PID's owner, which shows whether the process is dumpable, tells nothing")
		return
	}
	status, err := os.ReadFile("/proc/" + itoa(m.process.Process.Pid) + "/status")
	must(t, err)
	for line := range strings.Lines(string(status)) {
		if strings.HasPrefix(line, "VmLck:") && strings.Fields(line)[1] == "0" {
			t.Errorf("memory is not locked: %s", line)
		}
	}
}

// TestServiceTime: the machine can stand for a slower one.
func TestServiceTime(t *testing.T) {
	t.Parallel()
	m := newFolder(t)
	m.cfg.ServiceTime = 30 * time.Millisecond
	m.start(t)
	p := m.module(t)
	initToken(t, p, 0, "a")
	s := openRW(t, p, 0)
	must(t, p.Login(s, pkcs11.CKU_USER, userPIN))
	_, priv := generateSM2(t, p, s, "k")
	e := sm3.Sum(nil)
	started := time.Now()
	for range 3 {
		mustSign(t, p, s, mech(softtoken.CKMNeutralSM2, nil), priv, e[:])
	}
	if took := time.Since(started); took < 90*time.Millisecond {
		t.Errorf("three signatures of 30 ms took %v", took)
	}
}

// TestOtherUser: the socket's mode is not all that keeps other users away.
func TestOtherUser(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Log("not root: cannot become another user")
		return
	}
	m := newFolder(t)
	must(t, os.Chmod(m.root, 0o755))
	log, logged := capture()
	m.socket = filepath.Join(m.root, "s")
	m.cfg.SocketPath, m.cfg.Log = m.socket, log
	m.start(t)
	must(t, os.Chmod(m.socket, 0o666))
	program := `
import os, socket, sys
os.setuid(65534)
c = socket.socket(socket.AF_UNIX)
c.connect(sys.argv[1])
c.settimeout(10)
try:
    print(len(c.recv(100)))
except ConnectionError:
    print(0)
`
	if out := tool(t, []byte(program), "python3", "-", m.socket); out != "0\n" {
		t.Errorf("another user is answered with %q bytes", out)
	}
	if !strings.Contains(logged(), "uid=65534") {
		t.Errorf("log: %s", logged())
	}
}

package softtoken_test

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/miekg/pkcs11"
	"golang.org/x/sys/unix"
	"yinjian/hsm/softtoken"
)

// One process that takes all the connections it can get leaves room for another.
func TestOneProcessLeavesRoom(t *testing.T) {
	t.Parallel()
	m := newFolder(t)
	m.startProcess(t)
	p := m.module(t)
	initToken(t, p, 0, "a")
	var all []net.Conn
	defer func() {
		for _, c := range all {
			c.Close()
		}
	}()
	refused := 0
	for range softtoken.MaxOfProcess + 500 { // without a word, and each with a name of its own if it were asked
		c, err := net.Dial("unix", m.socket)
		if err != nil {
			refused++
			continue
		}
		all = append(all, c)
	}
	t.Logf("%d connections, %d refused by the system", len(all), refused)
	deadline := time.Now().Add(5 * time.Second)
	for { // this process is over its share as soon as the daemon has seen it
		_, err := p.OpenSession(0, pkcs11.CKF_SERIAL_SESSION)
		if err == pkcs11.Error(pkcs11.CKR_SESSION_COUNT) || err == pkcs11.Error(pkcs11.CKR_DEVICE_REMOVED) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("a process with %d connections opens a session: %v", len(all), err)
		}
	}
	out := tool(t, nil, "pkcs11-tool", "--module", m.copyModule(t), "--slot", "0", "--login", "--pin", userPIN, "-O")
	if strings.Contains(out, "error") {
		t.Errorf("another process: %s", out)
	}
}

// While key pairs are being made, and others wait to be, signing goes on, and so does stopping.
func TestGenerationDoesNotStall(t *testing.T) {
	t.Parallel()
	m, p, s := loggedIn(t)
	_, priv := generateSM2(t, p, s, "k")
	release := m.server.OccupyGeneration()
	defer release()
	waiting := openRW(t, p, 0)
	result := make(chan error, 1)
	go func() {
		_, _, err := p.GenerateKeyPair(waiting, mech(pkcs11.CKM_EC_KEY_PAIR_GEN, nil),
			[]*pkcs11.Attribute{attr(pkcs11.CKA_EC_PARAMS, sm2OID)}, nil)
		result <- err
	}()
	for range 20 {
		mustSign(t, p, s, mech(softtoken.CKMNeutralSM2, nil), priv, make([]byte, 32))
	}
	select {
	case err := <-result:
		t.Fatalf("a third key pair was not made to wait: %v", err)
	default:
	}
	stopped := make(chan struct{})
	go func() { m.stop(); close(stopped) }()
	select {
	case <-stopped:
	case <-time.After(2 * time.Minute):
		t.Fatal("the daemon does not stop while a key pair waits to be made")
	}
	if err := <-result; err == nil {
		t.Error("a key pair was made by a daemon that stops")
	}
}

// The folder goes while the daemon runs, and another takes its place. What needs no disk goes on; nothing is written
// into the other's folder, and no PIN is compared without being counted.
func TestFolderGoesWhileRunning(t *testing.T) {
	t.Parallel()
	m, p, s := loggedIn(t)
	_, priv := generateSM2(t, p, s, "k")
	waiting := openRW(t, p, 0)
	away := m.dir + ".away"
	must(t, os.Rename(m.dir, away))
	check := func(what string) {
		t.Helper()
		mustSign(t, p, s, mech(softtoken.CKMNeutralSM2, nil), priv, make([]byte, 32))
		_, _, err := p.GenerateKeyPair(s, mech(pkcs11.CKM_EC_KEY_PAIR_GEN, nil),
			[]*pkcs11.Attribute{attr(pkcs11.CKA_TOKEN, true), attr(pkcs11.CKA_EC_PARAMS, sm2OID)}, []*pkcs11.Attribute{attr(pkcs11.CKA_TOKEN, true)})
		wantRV(t, what+": C_GenerateKeyPair", err, pkcs11.CKR_DEVICE_ERROR)
		wantRV(t, what+": C_SetPIN", p.SetPIN(waiting, userPIN, "another-pin"), pkcs11.CKR_DEVICE_ERROR)
		wantRV(t, what+": C_DestroyObject", p.DestroyObject(s, priv), pkcs11.CKR_DEVICE_ERROR)
	}
	check("gone")

	other := newFolder(t)
	other.dir, other.cfg.Dir, other.socket = m.dir, m.dir, filepath.Join(m.dir, "p11.sock")
	other.start(t)
	q := other.module(t)
	initToken(t, q, 0, "other")
	check("replaced")
	other.restart(t) // its records open, so they are its own
	o := openRW(t, q, 0)
	must(t, q.Login(o, pkcs11.CKU_USER, userPIN))
	other.stop()

	must(t, os.RemoveAll(m.dir))
	must(t, os.Rename(away, m.dir))
	generateSM2(t, p, s, "later")
	must(t, p.SetPIN(waiting, userPIN, "another-pin"))
	m.restart(t)
	p2 := m.module(t)
	s2 := openRW(t, p2, 0)
	must(t, p2.Login(s2, pkcs11.CKU_USER, "another-pin"))
	findOne(t, p2, s2, pkcs11.CKO_PRIVATE_KEY, "k")
	findOne(t, p2, s2, pkcs11.CKO_PRIVATE_KEY, "later")
}

// A daemon whose queue is full listens all the same; its socket is not taken from it.
func TestBusySocketIsNotTaken(t *testing.T) {
	t.Parallel()
	m := newFolder(t)
	m.cfg.SocketPath = filepath.Join(m.root, "busy.sock")
	l, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	must(t, err)
	defer unix.Close(l)
	must(t, unix.Bind(l, &unix.SockaddrUnix{Name: m.cfg.SocketPath}))
	must(t, unix.Listen(l, 0))
	for full := false; !full; {
		c, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK, 0)
		must(t, err)
		defer unix.Close(c)
		full = unix.Connect(c, &unix.SockaddrUnix{Name: m.cfg.SocketPath}) == unix.EAGAIN
	}
	s, err := softtoken.Open(m.cfg)
	if err == nil {
		s.Close()
	}
	if err == nil || !strings.Contains(err.Error(), "another process listens") {
		t.Errorf("Open = %v, want a refusal: somebody listens there", err)
	}
	if _, err := os.Lstat(m.cfg.SocketPath); err != nil {
		t.Errorf("the socket is gone: %v", err)
	}
}

// Two daemons on one folder: the second is refused, also under another socket, and the first goes on.
func TestSecondDaemonIsRefused(t *testing.T) {
	t.Parallel()
	m, p, s := loggedIn(t)
	cfg := m.cfg
	cfg.SocketPath = filepath.Join(m.root, "second.sock")
	if second, err := softtoken.Open(cfg); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("a second Open = %v, want a refusal", err)
		if err == nil {
			second.Close()
		}
	}
	generateSM2(t, p, s, "k")
}

package softtoken_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/pkcs11"
	"github.com/sirupsen/logrus"
	"yinjian/hsm/softtoken"
)

const (
	soPIN   = "officer-pin"
	userPIN = "user-pin"
)

// modulePath is the module that TestMain built.
var modulePath string

func TestMain(m *testing.M) {
	if os.Getenv("SOFTTOKEN_TEST_DIR") != "" {
		os.Exit(runDaemon())
	}
	os.Exit(runTests(m))
}

func runTests(m *testing.M) int {
	os.Unsetenv("YINJIAN_P11_SOCKET") // the shell's must not reach the module
	softtoken.UsePBKDF2Iterations(1000)
	dir, err := os.MkdirTemp("", "yjmod")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	// SoftHSM2 reads this at C_Initialize, once for the process.
	softHSM := filepath.Join(dir, "softhsm2.conf")
	os.Setenv("SOFTHSM2_CONF", softHSM)
	os.Mkdir(filepath.Join(dir, "tokens"), 0o700)
	if err := os.WriteFile(softHSM, []byte("directories.tokendir = "+filepath.Join(dir, "tokens")+"\nlog.level = ERROR\n"), 0o600); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	modulePath = os.Getenv("SOFTTOKEN_TEST_MODULE") // a module built otherwise, with sanitizers for instance
	if modulePath == "" {
		modulePath = filepath.Join(dir, "libyinjian-p11.so")
		if out, err := exec.Command("module/build.sh", modulePath).CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "building the module: %v\n%s", err, out)
			return 1
		}
	}
	return m.Run()
}

// runDaemon is this test binary as the daemon: it prints "ready" and serves until SIGTERM.
func runDaemon() int {
	iterations, _ := strconv.Atoi(os.Getenv("SOFTTOKEN_TEST_ITERATIONS"))
	softtoken.UsePBKDF2Iterations(iterations)
	dir := os.Getenv("SOFTTOKEN_TEST_DIR")
	s, err := softtoken.Open(softtoken.Config{Dir: dir, PassphraseFile: filepath.Join(filepath.Dir(dir), "passphrase"), Address: os.Getenv("SOFTTOKEN_TEST_ADDRESS")})
	if err != nil {
		fmt.Println(err)
		return 1
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	fmt.Println("ready")
	if err := s.Serve(ctx); err != nil {
		fmt.Println(err)
		return 1
	}
	return 0
}

// A machine is a software cipher machine under test: its folders, and the daemon while it runs.
type machine struct {
	root, dir, passphrase, socket string
	cfg                           softtoken.Config
	prepare                       func(*softtoken.Server) // before Serve, if set
	server                        *softtoken.Server       // in this process
	stop                          func()
	process                       *exec.Cmd // or in one of its own
}

// newFolder makes an empty machine. Its path is short, since a socket's may have 107 bytes only.
func newFolder(t testing.TB) *machine {
	t.Helper()
	root, err := os.MkdirTemp("", "yj")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(root) })
	m := &machine{root: root, dir: filepath.Join(root, "state"), passphrase: filepath.Join(root, "passphrase")}
	m.socket = filepath.Join(m.dir, "p11.sock")
	if err := os.WriteFile(m.passphrase, []byte("correct horse battery\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	m.cfg = softtoken.Config{Dir: m.dir, PassphraseFile: m.passphrase}
	return m
}

// newMachine makes a machine and starts its daemon in this process.
func newMachine(t testing.TB) *machine {
	t.Helper()
	m := newFolder(t)
	m.start(t)
	return m
}

func (m *machine) start(t testing.TB) {
	t.Helper()
	s, err := softtoken.Open(m.cfg)
	if err != nil {
		t.Fatal(err)
	}
	m.server = s
	if m.prepare != nil {
		m.prepare(s)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx) }()
	m.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve = %v", err)
		}
	})
	t.Cleanup(m.stop)
}

func (m *machine) restart(t testing.TB) {
	t.Helper()
	m.stop()
	m.start(t)
}

// startProcess starts the daemon in a process of its own.
func (m *machine) startProcess(t testing.TB) {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), "SOFTTOKEN_TEST_DIR="+m.dir, "SOFTTOKEN_TEST_ADDRESS="+m.cfg.Address, fmt.Sprintf("SOFTTOKEN_TEST_ITERATIONS=%d", softtoken.PBKDF2Iterations()))
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	m.process = cmd
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGCONT)
		cmd.Process.Kill()
		cmd.Wait()
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || line != "ready\n" {
		t.Fatalf("daemon said %q, %v", line, err)
	}
}

// kill ends the daemon's process as kill -9 does, and waits for it.
func (m *machine) kill(t testing.TB) {
	t.Helper()
	if err := m.process.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	m.process.Wait()
}

// copyModule answers a copy of the module with a file beside it that names the socket. A copy is a module of its
// own: its state is not shared with others in this process.
func (m *machine) copyModule(t testing.TB, settings ...string) string {
	t.Helper()
	dir, err := os.MkdirTemp(m.root, "mod")
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(modulePath)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "libyinjian-p11.so")
	if err := os.WriteFile(path, b, 0o755); err != nil {
		t.Fatal(err)
	}
	conf := "# test\n" + strings.Join(append([]string{"socket=" + m.socket}, settings...), "\n") + "\n"
	if err := os.WriteFile(path+".conf", []byte(conf), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// module loads a copy of the module and initialises it.
func (m *machine) module(t testing.TB, settings ...string) *pkcs11.Ctx {
	t.Helper()
	p := pkcs11.New(m.copyModule(t, settings...))
	if p == nil {
		t.Fatal("the module cannot be loaded")
	}
	if err := p.Initialize(); err != nil {
		t.Fatalf("C_Initialize: %v", err)
	}
	t.Cleanup(func() {
		p.Finalize()
		p.Destroy()
	})
	return p
}

// initToken initialises a slot with both PINs.
func initToken(t testing.TB, p *pkcs11.Ctx, slot uint, label string) {
	t.Helper()
	must(t, p.InitToken(slot, soPIN, label))
	s := openRW(t, p, slot)
	must(t, p.Login(s, pkcs11.CKU_SO, soPIN))
	must(t, p.InitPIN(s, userPIN))
	must(t, p.Logout(s))
	must(t, p.CloseSession(s))
}

// loggedIn answers a machine with an initialised token in slot 0, a module, and a session of the logged-in user.
func loggedIn(t testing.TB) (*machine, *pkcs11.Ctx, pkcs11.SessionHandle) {
	t.Helper()
	m := newMachine(t)
	p := m.module(t)
	initToken(t, p, 0, "test")
	s := openRW(t, p, 0)
	must(t, p.Login(s, pkcs11.CKU_USER, userPIN))
	return m, p, s
}

func openRW(t testing.TB, p *pkcs11.Ctx, slot uint) pkcs11.SessionHandle {
	t.Helper()
	s, err := p.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		t.Fatalf("C_OpenSession: %v", err)
	}
	return s
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// wantRV checks that err is a PKCS#11 return value.
func wantRV(t testing.TB, what string, err error, want uint) {
	t.Helper()
	var got pkcs11.Error
	if !errors.As(err, &got) && err != nil || uint(got) != want {
		t.Errorf("%s = %v, want %v", what, err, pkcs11.Error(want))
	}
}

func attr(typ uint, value any) *pkcs11.Attribute { return pkcs11.NewAttribute(typ, value) }

func mech(number uint, param []byte) []*pkcs11.Mechanism {
	var p any
	if param != nil {
		p = param
	}
	return []*pkcs11.Mechanism{pkcs11.NewMechanism(number, p)}
}

var sm2OID = []byte{0x06, 0x08, 0x2A, 0x81, 0x1C, 0xCF, 0x55, 0x01, 0x82, 0x2D}

// generateSM2 makes a key pair with PKCS#11's own mechanism.
func generateSM2(t testing.TB, p *pkcs11.Ctx, s pkcs11.SessionHandle, label string) (pub, priv pkcs11.ObjectHandle) {
	t.Helper()
	pub, priv, err := p.GenerateKeyPair(s, mech(pkcs11.CKM_EC_KEY_PAIR_GEN, nil),
		[]*pkcs11.Attribute{attr(pkcs11.CKA_TOKEN, true), attr(pkcs11.CKA_LABEL, label), attr(pkcs11.CKA_ID, []byte(label)), attr(pkcs11.CKA_EC_PARAMS, sm2OID)},
		[]*pkcs11.Attribute{attr(pkcs11.CKA_TOKEN, true), attr(pkcs11.CKA_LABEL, label), attr(pkcs11.CKA_ID, []byte(label))})
	if err != nil {
		t.Fatalf("C_GenerateKeyPair: %v", err)
	}
	return pub, priv
}

func generateRSA(t testing.TB, p *pkcs11.Ctx, s pkcs11.SessionHandle, label string) (pub, priv pkcs11.ObjectHandle) {
	t.Helper()
	pub, priv, err := p.GenerateKeyPair(s, mech(pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN, nil),
		[]*pkcs11.Attribute{attr(pkcs11.CKA_TOKEN, true), attr(pkcs11.CKA_LABEL, label), attr(pkcs11.CKA_MODULUS_BITS, 2048), attr(pkcs11.CKA_PUBLIC_EXPONENT, []byte{1, 0, 1})},
		[]*pkcs11.Attribute{attr(pkcs11.CKA_TOKEN, true), attr(pkcs11.CKA_LABEL, label)})
	if err != nil {
		t.Fatalf("C_GenerateKeyPair: %v", err)
	}
	return pub, priv
}

func generateSecret(t testing.TB, p *pkcs11.Ctx, s pkcs11.SessionHandle, label string) pkcs11.ObjectHandle {
	t.Helper()
	h, err := p.GenerateKey(s, mech(pkcs11.CKM_GENERIC_SECRET_KEY_GEN, nil),
		[]*pkcs11.Attribute{attr(pkcs11.CKA_TOKEN, true), attr(pkcs11.CKA_LABEL, label), attr(pkcs11.CKA_VALUE_LEN, 32)})
	if err != nil {
		t.Fatalf("C_GenerateKey: %v", err)
	}
	return h
}

// find answers the handles of the objects that match.
func find(t testing.TB, p *pkcs11.Ctx, s pkcs11.SessionHandle, templ ...*pkcs11.Attribute) []pkcs11.ObjectHandle {
	t.Helper()
	must(t, p.FindObjectsInit(s, templ))
	var all []pkcs11.ObjectHandle
	for {
		some, _, err := p.FindObjects(s, 3)
		must(t, err)
		if len(some) == 0 {
			break
		}
		all = append(all, some...)
	}
	must(t, p.FindObjectsFinal(s))
	return all
}

// findOne answers the one object of a class and label.
func findOne(t testing.TB, p *pkcs11.Ctx, s pkcs11.SessionHandle, class uint, label string) pkcs11.ObjectHandle {
	t.Helper()
	all := find(t, p, s, attr(pkcs11.CKA_CLASS, class), attr(pkcs11.CKA_LABEL, label))
	if len(all) != 1 {
		t.Fatalf("%d objects of class %d and label %q, want 1", len(all), class, label)
	}
	return all[0]
}

func sign(p *pkcs11.Ctx, s pkcs11.SessionHandle, m []*pkcs11.Mechanism, key pkcs11.ObjectHandle, data []byte) ([]byte, error) {
	if err := p.SignInit(s, m, key); err != nil {
		return nil, err
	}
	return p.Sign(s, data)
}

func mustSign(t testing.TB, p *pkcs11.Ctx, s pkcs11.SessionHandle, m []*pkcs11.Mechanism, key pkcs11.ObjectHandle, data []byte) []byte {
	t.Helper()
	sig, err := sign(p, s, m, key, data)
	if err != nil {
		t.Fatalf("signing: %v", err)
	}
	return sig
}

func value(t testing.TB, p *pkcs11.Ctx, s pkcs11.SessionHandle, o pkcs11.ObjectHandle, typ uint) []byte {
	t.Helper()
	as, err := p.GetAttributeValue(s, o, []*pkcs11.Attribute{attr(typ, nil)})
	if err != nil {
		t.Fatalf("C_GetAttributeValue(%#x): %v", typ, err)
	}
	return as[0].Value
}

// tool runs a program from outside and skips the test if it is not installed.
func tool(t testing.TB, stdin []byte, name string, args ...string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("%s is not installed", name)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Stdin = bytes.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// capture is a logger whose lines can be read.
func capture() (*logrus.Logger, func() string) {
	var mu sync.Mutex
	var buf bytes.Buffer
	l := logrus.New()
	l.SetOutput(writerFunc(func(b []byte) (int, error) {
		mu.Lock()
		defer mu.Unlock()
		return buf.Write(b)
	}))
	return l, func() string {
		mu.Lock()
		defer mu.Unlock()
		return buf.String()
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(b []byte) (int, error) { return f(b) }

var _ io.Writer = writerFunc(nil)

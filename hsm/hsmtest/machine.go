package hsmtest

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"testing"

	"github.com/sirupsen/logrus"

	"yinjian/hsm/pkcs11"
	"yinjian/hsm/softtoken"
)

// PINs of the tokens that are made here.
const (
	UserPIN = "user-pin"
	SOPIN   = "officer-pin"
)

// A Machine is a software cipher machine in a process of its own, with one token.
type Machine struct {
	Root, Module string
	Process      *exec.Cmd
	// Config opens the token; its profile is the one that the machine answers to.
	Config  pkcs11.Config
	profile string
}

// Daemon is a test binary's other life as the software cipher machine, when its arguments say so: TestMain calls it
// first. It prints "ready" and serves until SIGTERM.
func Daemon() {
	if len(os.Args) != 4 || os.Args[1] != "daemon" {
		return
	}
	root := os.Args[2]
	s, err := softtoken.Open(softtoken.Config{Dir: filepath.Join(root, "state"), PassphraseFile: filepath.Join(root, "passphrase"),
		Impersonate: os.Args[3]})
	if err == nil {
		ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
		defer stop()
		fmt.Println("ready")
		err = s.Serve(ctx)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// Quiet is a logger for tests.
func Quiet() logrus.FieldLogger {
	l := logrus.New()
	l.SetOutput(io.Discard)
	return l
}

// Profile is the profile of that name or file.
func Profile(t testing.TB, nameOrPath string) pkcs11.Profile {
	t.Helper()
	p, err := pkcs11.ProfileByName(nameOrPath)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// SoftModule is our module, built once. The calling test's package lies two folders below the root.
var SoftModule = sync.OnceValues(func() ([]byte, error) {
	dir, err := os.MkdirTemp("", "yj")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "p11.so")
	if out, err := exec.Command("../../hsm/softtoken/module/build.sh", path).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build.sh: %w\n%s", err, out)
	}
	return os.ReadFile(path)
})

// NewMachine puts the module under a name of its own, so that it has its own C_Initialize, starts the daemon with its own
// profile and makes the token "staff".
func NewMachine(t testing.TB) *Machine {
	t.Helper()
	for _, tool := range []string{"cc", "pkg-config"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("%s is not installed; the module cannot be built", tool)
		}
	}
	root, err := os.MkdirTemp("", "yj") // short: a socket's path has 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(root) })
	m := &Machine{Root: root, Module: filepath.Join(root, "p11.so")}
	built, err := SoftModule()
	if err == nil {
		err = os.WriteFile(m.Module, built, 0o700)
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "passphrase"), []byte("correct horse battery\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Kill() })
	m.Run(t)
	m.Config = pkcs11.Config{Module: m.Module, ModuleArgs: "socket='" + filepath.Join(root, "state", "p11.sock") + "'",
		TokenLabel: "staff", PIN: []byte(UserPIN), Profile: Profile(t, "neutral"), MaxSessions: 8, Log: Quiet()}
	pc := pkcs11.ProvisionConfig{Module: m.Module, ModuleArgs: m.Config.ModuleArgs, Slot: pkcs11.AnySlot, Label: "staff",
		SOPIN: []byte(SOPIN), UserPIN: m.Config.PIN}
	for _, want := range []string{"created", "existing"} {
		if res, err := pkcs11.Provision(pc); err != nil || res.Outcome != want {
			t.Fatalf("Provision = %+v, %v; want %s", res, err, want)
		}
	}
	return m
}

// As restarts the machine, answering to the profile of that name or file.
func (m *Machine) As(t testing.TB, profile string) {
	t.Helper()
	m.Kill()
	m.profile = profile
	m.Config.Profile = Profile(t, profile)
	m.Run(t)
}

// Run starts the daemon, and waits until it serves.
func (m *Machine) Run(t testing.TB) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	m.Process = exec.Command(self, "daemon", m.Root, m.profile)
	m.Process.Stderr = os.Stderr
	out, err := m.Process.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Process.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
		t.Fatalf("daemon said %q, %v", line, err)
	}
}

// Kill ends the daemon as kill -9 does.
func (m *Machine) Kill() {
	_ = m.Process.Process.Kill()
	_ = m.Process.Wait()
}

package pool_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/emmansun/gmsm/sm2"
	"github.com/sirupsen/logrus"

	"yinjian/hsm"
	"yinjian/hsm/pkcs11"
	"yinjian/hsm/pool"
	"yinjian/hsm/softtoken"
	"yinjian/hsm/worker"
)

// built is the PKCS#11 module, which TestMain makes, and a folder with a short name.
var built struct{ dir, module string }

const softHSM = "/usr/lib/softhsm/libsofthsm2.so"

// TestMain is three programs: the tests, a worker, and the software cipher machine.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "worker" {
		os.Exit(drive())
	}
	if len(os.Args) > 3 && os.Args[1] == "machine" {
		os.Exit(serveMachine(os.Args[2], os.Args[3]))
	}
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "yj")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		built.dir, built.module = dir, filepath.Join(dir, "libyinjian-p11.so")
		conf := filepath.Join(dir, "softhsm2.conf") // SoftHSM2 reads it at C_Initialize, once for the process
		err = errors.Join(os.Mkdir(filepath.Join(dir, "tokens"), 0o700),
			os.WriteFile(conf, []byte("directories.tokendir = "+filepath.Join(dir, "tokens")+"\nlog.level = ERROR\n"), 0o600),
			os.Setenv("SOFTHSM2_CONF", conf))
		if err == nil {
			var out []byte
			if out, err = exec.Command("../softtoken/module/build.sh", built.module).CombinedOutput(); err != nil {
				err = fmt.Errorf("building the module: %w\n%s", err, out)
			}
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return m.Run()
	}())
}

func drive() int {
	conn, err := worker.Inherited()
	if err == nil {
		err = worker.Serve(context.Background(), conn, func(ctx context.Context, p worker.StartParams) (hsm.Token, error) {
			profile, err := pkcs11.ProfileByName(p.Profile)
			if err != nil {
				return nil, err
			}
			return pkcs11.Open(ctx, pkcs11.Config{Module: p.Module, ModuleArgs: p.ModuleArgs, TokenLabel: p.TokenLabel, PIN: p.PIN, Profile: profile,
				MaxSessions: p.MaxSessions, BeforeLogin: p.BeforeLogin, Log: quiet()})
		})
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func serveMachine(dir, service string) int {
	d, err := time.ParseDuration(service)
	var s *softtoken.Server
	if err == nil {
		log := logrus.New()
		log.SetOutput(io.Discard)
		s, err = softtoken.Open(softtoken.Config{Dir: dir, PassphraseFile: dir + ".phrase", ServiceTime: d, Log: log})
	}
	if err == nil {
		ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
		defer stop()
		err = s.Serve(ctx)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

const pin = "user-pin"

// A machine is a software cipher machine in a process of its own, with the worker that drives its one token.
type machine struct {
	name, dir string
	service   time.Duration
	cmd       *exec.Cmd
	client    *worker.Client
}

// start runs the machine and waits until it listens.
func (m *machine) start(t *testing.T) {
	t.Helper()
	m.cmd = exec.Command(os.Args[0], "machine", m.dir, m.service.String())
	m.cmd.Stderr = os.Stderr
	m.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := m.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	cmd := m.cmd
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	eventually(t, 30*time.Second, "the machine listens", func() bool {
		_, err := pkcs11.ListSlots(built.module, m.args())
		return err == nil
	})
}

func (m *machine) args() string { return "socket='" + filepath.Join(m.dir, "p11.sock") + "'" }

func (m *machine) signal(t *testing.T, s syscall.Signal) {
	t.Helper()
	if err := m.cmd.Process.Signal(s); err != nil {
		t.Fatal(err)
	}
}

// kill is SIGKILL, waited for.
func (m *machine) kill(t *testing.T) {
	t.Helper()
	m.signal(t, syscall.SIGKILL)
	_ = m.cmd.Wait()
}

const callDeadline = 8 * time.Second

// drive starts the machine's worker.
func (m *machine) drive(t *testing.T, module, args, profile string) {
	t.Helper()
	var err error
	m.client, err = worker.Start(worker.Config{
		Command: []string{os.Args[0], "worker"}, Class: hsm.Staff, CallDeadline: callDeadline, Log: quiet(),
		Params: worker.StartParams{Module: module, ModuleArgs: args, TokenLabel: "staff", PIN: []byte(pin), Profile: profile, MaxSessions: 8},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.client.Close() })
	if s := m.client.State(); s.Phase != worker.Ready {
		t.Fatalf("machine %s: %+v", m.name, s)
	}
}

// startMachines runs as many software cipher machines with the same keys, made in one whose sealed state the others
// get a copy of.
func startMachines(t *testing.T, service []time.Duration, specs ...hsm.KeySpec) []*machine {
	t.Helper()
	return startMachinesWith(t, service, func(*machine) {}, specs...)
}

// startMachinesWith has prepare change the one that is copied, when its token is there.
func startMachinesWith(t *testing.T, service []time.Duration, prepare func(*machine), specs ...hsm.KeySpec) []*machine {
	t.Helper()
	root, err := os.MkdirTemp(built.dir, "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(root) })
	var ms []*machine
	for i, s := range service {
		name := string(rune('a' + i))
		m := &machine{name: name, dir: filepath.Join(root, name), service: s}
		if err := os.WriteFile(m.dir+".phrase", []byte("correct horse battery\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		ms = append(ms, m)
	}
	first := ms[0]
	if err := os.Mkdir(first.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	first.start(t)
	if _, err := pkcs11.Provision(pkcs11.ProvisionConfig{Module: built.module, ModuleArgs: first.args(), Slot: pkcs11.AnySlot, Label: "staff", SOPIN: []byte("officer-pin"), UserPIN: []byte(pin)}); err != nil {
		t.Fatal(err)
	}
	prepare(first)
	first.drive(t, built.module, first.args(), "neutral")
	for _, s := range specs {
		if _, err := first.client.GenerateKey(t.Context(), s); err != nil {
			t.Fatal(err)
		}
	}
	first.client.Close()
	first.signal(t, syscall.SIGTERM)
	_ = first.cmd.Wait()
	for _, m := range ms[1:] {
		if err := os.CopyFS(m.dir, os.DirFS(first.dir)); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(m.dir, 0o700); err != nil {
			t.Fatal(err)
		}
		files, _ := filepath.Glob(filepath.Join(m.dir, "*")) // the pattern is well-formed
		for _, f := range files {
			if err := os.Chmod(f, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, m := range ms {
		m.start(t)
		m.drive(t, built.module, m.args(), "neutral")
	}
	return ms
}

// poolOf takes the machines in and looks after them until the test ends.
func poolOf(t *testing.T, ms ...*machine) *pool.Pool {
	t.Helper()
	p := pool.New(pool.Config{Class: hsm.Staff, CallDeadline: callDeadline, Log: quiet()})
	for _, m := range ms {
		if err := p.Add(t.Context(), pool.Machine{Name: m.name, Token: m.client, Weight: 1, Sessions: 8}); err != nil {
			t.Fatal(err)
		}
	}
	run(t, p)
	return p
}

// Signers sign until they are stopped, and remember the slowest answer and the errors.
type signers struct {
	t       *testing.T
	stopped atomic.Bool
	wg      sync.WaitGroup
	signed  atomic.Int64
	slowest atomic.Int64
	failed  atomic.Int64
	last    atomic.Value
}

func startSigners(t *testing.T, p *pool.Pool, label string, n int) *signers {
	t.Helper()
	s := &signers{t: t}
	info, err := p.FindKey(t.Context(), label)
	if err != nil {
		t.Fatal(err)
	}
	for i := range n {
		s.wg.Go(func() {
			d := bytes.Repeat([]byte{byte(i)}, 32)
			for n := 0; !s.stopped.Load(); n++ {
				begun := time.Now()
				answer, err := p.Do(t.Context(), label, hsm.SignSM2E, d)
				took := int64(time.Since(begun))
				for old := s.slowest.Load(); took > old && !s.slowest.CompareAndSwap(old, took); old = s.slowest.Load() {
				}
				if err != nil {
					s.failed.Add(1)
					s.last.Store(err)
					continue
				}
				s.signed.Add(1)
				r, v, err := hsm.NormalizeSM2(answer)
				if n%16 == 0 && (err != nil || !sm2.Verify(info.Public.(*ecdsa.PublicKey), d, r, v)) {
					t.Errorf("a signature that does not verify: %v", err)
				}
			}
		})
	}
	t.Cleanup(s.stop)
	return s
}

func (s *signers) stop() {
	s.stopped.Store(true)
	s.wg.Wait()
}

// more waits until n more signatures were made.
func (s *signers) more(n int64) {
	s.t.Helper()
	want := s.signed.Load() + n
	eventually(s.t, time.Minute, fmt.Sprintf("%d more signatures", n), func() bool { return s.signed.Load() >= want })
}

// open is how many descriptors this process has.
func descriptors(t *testing.T) int {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

var signerKey = hsm.KeySpec{Label: "staff/D1", Algorithm: hsm.SM2}

// Under 64 signers a machine is killed, started again, stopped with SIGSTOP, let go on, drained and resumed. No signer
// sees an error, since the other machine holds the key; none waits longer than the call deadline; what was down is up
// again by itself; nothing is left behind.
func TestMachineLost(t *testing.T) {
	ms := startMachines(t, []time.Duration{time.Millisecond, time.Millisecond}, signerKey)
	routines, files := runtime.NumGoroutine(), descriptors(t)
	p := pool.New(pool.Config{Class: hsm.Staff, CallDeadline: callDeadline, Log: quiet()})
	for _, m := range ms {
		if err := p.Add(t.Context(), pool.Machine{Name: m.name, Token: m.client, Weight: 1, Sessions: 8}); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	looking := make(chan error, 1)
	go func() { looking <- p.Run(ctx) }()
	s := startSigners(t, p, signerKey.Label, 64)
	s.more(200)
	phase := func(name string, want pool.Phase) {
		t.Helper()
		eventually(t, time.Minute, fmt.Sprintf("%s is %s", name, want), func() bool { return stateOf(p, name).Phase == want })
	}
	works := func(name string) {
		t.Helper()
		before := stateOf(p, name).Done
		eventually(t, time.Minute, name+" works again", func() bool { return stateOf(p, name).Done > before+50 })
	}

	ms[1].kill(t)
	phase("b", pool.Down)
	s.more(200)
	ms[1].start(t)
	phase("b", pool.Up)
	works("b")

	ms[0].signal(t, syscall.SIGSTOP)
	phase("a", pool.Down)
	s.more(200)
	ms[0].signal(t, syscall.SIGCONT)
	phase("a", pool.Up)
	works("a")

	if err := p.Drain("a"); err != nil {
		t.Fatal(err)
	}
	eventually(t, time.Minute, "a has finished", func() bool { return stateOf(p, "a").UnderWay == 0 })
	before := stateOf(p, "a").Done
	s.more(200)
	if n := stateOf(p, "a").Done - before; n != 0 {
		t.Errorf("%d operations on a draining machine", n)
	}
	if err := p.Resume("a"); err != nil {
		t.Fatal(err)
	}
	works("a")

	s.stop()
	if n := s.failed.Load(); n > 0 {
		t.Errorf("%d of %d failed, the last: %v", n, s.signed.Load(), s.last.Load())
	}
	// The deadline bounds the wait; what a busy machine takes to wake a goroutine comes on top.
	if d := time.Duration(s.slowest.Load()); d > callDeadline+30*time.Second {
		t.Errorf("the slowest answer took %v, the deadline is %v", d, callDeadline)
	}
	cancel()
	if err := <-looking; err != nil {
		t.Error(err)
	}
	eventually(t, 30*time.Second, "goroutines and descriptors are as before", func() bool {
		return runtime.NumGoroutine() <= routines+2 && descriptors(t) <= files+2
	})
	t.Logf("%d signatures, the slowest %v", s.signed.Load(), time.Duration(s.slowest.Load()).Round(time.Millisecond))
}

// Three equal machines all do some of the work. How much is TestWeights', in simulated time, and the bench's.
func TestShares(t *testing.T) {
	ms := startMachines(t, []time.Duration{3 * time.Millisecond, 3 * time.Millisecond, 3 * time.Millisecond}, signerKey)
	p := poolOf(t, ms...)
	s := startSigners(t, p, signerKey.Label, 9)
	s.more(300) // sessions are open
	before := p.States()
	s.more(1500)
	s.stop()
	if n := s.failed.Load(); n > 0 {
		t.Fatalf("%d failed: %v", n, s.last.Load())
	}
	for i, st := range p.States() {
		if n := st.Done - before[i].Done; n < 150 {
			t.Errorf("machine %s did %d of 1500", st.Machine, n)
		}
	}
}

// Machines of two makers in one pool: keys are made on both, each is found where it is, and every signature verifies.
func TestMixed(t *testing.T) {
	if _, err := os.Stat(softHSM); err != nil {
		t.Skip("SoftHSM2 is not installed")
	}
	a := startMachines(t, []time.Duration{0})[0]
	if _, err := pkcs11.Provision(pkcs11.ProvisionConfig{Module: softHSM, Slot: pkcs11.AnySlot, Label: "staff", SOPIN: []byte("officer-pin"), UserPIN: []byte(pin)}); err != nil {
		t.Fatal(err)
	}
	b := &machine{name: "b"}
	b.drive(t, softHSM, "", "softhsm2")
	p := poolOf(t, a, b)
	for n := range 4 {
		label := fmt.Sprintf("staff/R%d", n)
		info, err := p.GenerateKey(t.Context(), hsm.KeySpec{Label: label, Algorithm: hsm.RSA2048})
		if err != nil {
			t.Fatal(err)
		}
		for range 5 {
			sig, err := p.Do(t.Context(), label, hsm.SignRSASHA256, digest)
			if err != nil {
				t.Fatal(err)
			}
			if err := rsa.VerifyPKCS1v15(info.Public.(*rsa.PublicKey), crypto.SHA256, digest, sig); err != nil {
				t.Error(err)
			}
		}
	}
	for _, s := range p.States() {
		if s.Keys != 2 || s.Only != 2 || s.Phase != pool.Up || s.Done < 10 {
			t.Errorf("%+v", s)
		}
	}
	// An SM2 key can be made on one of the two only; the other says so, and nothing is tried elsewhere.
	var names []string
	for n := range 2 {
		if info, err := p.GenerateKey(t.Context(), hsm.KeySpec{Label: fmt.Sprintf("staff/S%d", n), Algorithm: hsm.SM2}); err == nil {
			names = append(names, info.Label)
		}
	}
	if len(names) == 0 || strings.Join(p.Only("a"), " ") == "" {
		t.Errorf("SM2 keys %v", names)
	}
}

// Keys that are wrapped under a key of two machines are used on both, and on the other one when one is killed: no
// signature fails, and each verifies.
func TestWrappedMachineLost(t *testing.T) {
	ms := startMachinesWith(t, []time.Duration{0, 0}, func(m *machine) {
		profile, err := pkcs11.ProfileByName("neutral")
		if err == nil {
			err = pkcs11.InstallKEK(pkcs11.KEKConfig{
				Module: built.module, ModuleArgs: m.args(), TokenLabel: "staff", Profile: profile, Label: "kek",
				Value: bytes.Repeat([]byte{7}, pkcs11.KEKSize), SOPIN: []byte("officer-pin"), UserPIN: []byte(pin),
			})
		}
		if err != nil {
			t.Fatal(err)
		}
	})
	p := poolOf(t, ms...)
	var keys []*hsm.Key
	for n := range 12 {
		label := fmt.Sprintf("staff/W%d", n)
		info, blob, err := p.GenerateWrapped(t.Context(), hsm.KeySpec{Label: label, Algorithm: hsm.SM2}, "kek")
		if err != nil {
			t.Fatal(err)
		}
		w, err := hsm.NewWrappedKey(label, hsm.SM2, info.Public, "kek", blob)
		if err != nil {
			t.Fatal(err)
		}
		k, err := hsm.KeyOfWrapped(p, w) // it verifies what it signs
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, k)
	}
	use := func(rounds int) {
		t.Helper()
		for range rounds {
			for _, k := range keys {
				if _, err := k.SignDigest(t.Context(), digest); err != nil {
					t.Error(err)
				}
			}
		}
	}
	// One slow answer keeps a machine idle for some tenths of a second: turns are taken until both have had some.
	eventually(t, time.Minute, "both machines sign", func() bool {
		use(1)
		return stateOf(p, "a").Done >= 3 && stateOf(p, "b").Done >= 3
	})
	for _, s := range p.States() {
		if s.Only > 0 || s.Keys != 1 {
			t.Errorf("%+v", s)
		}
	}
	ms[0].kill(t)
	use(3)
}

package worker_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/emmansun/gmsm/sm2"
	"github.com/google/go-cmp/cmp"
	p11 "github.com/miekg/pkcs11"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"yinjian/hsm"
	"yinjian/hsm/hsmtest"
	"yinjian/hsm/pkcs11"
	"yinjian/hsm/worker"
)

// TestMain is three programs: the tests, a child with a fake or a real token, and a parent that will be killed.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "child":
			os.Exit(child())
		case "parent":
			os.Exit(parent())
		}
	}
	worker.SetUnprovenPause(10 * time.Millisecond)
	os.Exit(m.Run())
}

func child() int {
	conn, err := worker.Inherited()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	err = worker.ServeExtended(context.Background(), conn, func(ctx context.Context, p worker.StartParams) (hsm.Token, error) {
		if p.Module != "fake" {
			profile, err := pkcs11.ProfileByName(p.Profile)
			if err != nil {
				return nil, err
			}
			log := logrus.New()
			log.SetLevel(logrus.WarnLevel)
			return pkcs11.Open(ctx, pkcs11.Config{Module: p.Module, ModuleArgs: p.ModuleArgs, TokenLabel: p.TokenLabel,
				PIN: p.PIN, Profile: profile, MaxSessions: p.MaxSessions, BeforeLogin: p.BeforeLogin, Log: log})
		}
		return openFake(p)
	}, extendFake)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// A fakeToken does what the label says. ModuleArgs names a folder where it leaves traces.
type fakeToken struct {
	hsm.Token
	dir     string
	wrapped sync.Map // digest to blob
	rsa     *rsa.PrivateKey
	sm2     *sm2.PrivateKey
}

// trace appends a byte to a file: it is atomic and survives SIGKILL.
func trace(dir, name string) {
	f, err := os.OpenFile(filepath.Join(dir, name), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		panic(err)
	}
	if _, err := f.Write([]byte{'x'}); err != nil {
		panic(err)
	}
	f.Close()
}

func traced(t *testing.T, dir, name string) int {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return len(b)
}

func die() {
	_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	select {}
}

func openFake(p worker.StartParams) (hsm.Token, error) {
	dir := p.ModuleArgs
	trace(dir, "opened")
	if _, err := os.Stat(filepath.Join(dir, "away")); err == nil {
		return nil, fmt.Errorf("opening: %w", &hsm.Error{Call: "C_Initialize", RV: 0x30})
	}
	trace(dir, "login")
	p.BeforeLogin()
	switch string(p.PIN) {
	case "right":
	case "crash":
		die()
	case "unanswered":
		return nil, fmt.Errorf("opening: %w", &hsm.Error{Call: "C_Login", RV: 0x30})
	case "hang":
		select {}
	default:
		return nil, fmt.Errorf("opening: %w", &hsm.Error{Call: "C_Login", RV: hsm.CKR_PIN_INCORRECT})
	}
	return &fakeToken{dir: dir}, nil
}

func (f *fakeToken) Close() error { return nil }

func (f *fakeToken) Info(context.Context) (hsm.TokenInfo, error) {
	return hsm.TokenInfo{Slot: 7, Label: "fake", Manufacturer: "测试", MaxSessions: 8, UserPINFinalTry: true}, nil
}

func (f *fakeToken) Random(_ context.Context, n int) ([]byte, error) { return make([]byte, n), nil }

func (f *fakeToken) FindKey(_ context.Context, label string) (hsm.KeyInfo, error) {
	return hsm.KeyInfo{}, fmt.Errorf("key %q: %w", label, hsm.ErrKeyNotFound)
}

func (f *fakeToken) Keys(ctx context.Context) ([]hsm.KeyInfo, error) {
	if _, err := os.Stat(filepath.Join(f.dir, "slow keys")); err == nil {
		if _, err := f.Do(ctx, "block", "", nil); err != nil {
			return nil, err
		}
	}
	return sampleKeys(), nil
}

func (f *fakeToken) GenerateKey(_ context.Context, spec hsm.KeySpec) (hsm.KeyInfo, error) {
	trace(f.dir, "generate")
	if spec.Label == "crash" {
		die()
	}
	return hsm.KeyInfo{Label: spec.Label, ID: spec.ID, Algorithm: spec.Algorithm, Sensitive: true}, nil
}

// GenerateWrapped answers a blob that names the wrapping key, so that a test can see what crossed.
func (f *fakeToken) GenerateWrapped(_ context.Context, spec hsm.KeySpec, kek string) (hsm.KeyInfo, []byte, error) {
	pub, err := sm2.NewPublicKey(annexKey)
	return hsm.KeyInfo{Label: spec.Label, ID: spec.ID, Algorithm: spec.Algorithm, Public: pub, Sensitive: true, Extractable: true}, []byte("blob under " + kek), err
}

// DoWrapped has a key when its blob was brought since the child started.
func (f *fakeToken) DoWrapped(ctx context.Context, key *hsm.WrappedKey, op hsm.Operation, data []byte) ([]byte, error) {
	if string(data) == "forget" && key.Blob == nil {
		f.wrapped.Delete(key.Digest())
	}
	if _, have := f.wrapped.Load(key.Digest()); !have && key.Blob == nil {
		trace(f.dir, "asked")
		return nil, hsm.ErrNotCached
	}
	if key.Blob != nil {
		trace(f.dir, "brought")
		f.wrapped.Store(key.Digest(), string(key.Blob))
	}
	if len(data) == 0 {
		return f.Do(ctx, "crash once", op, data)
	}
	blob, _ := f.wrapped.Load(key.Digest())
	return fmt.Appendf(nil, "%s|%s|%s", key.Label, blob, data), nil
}

func (f *fakeToken) ForgetWrapped(_ context.Context, digest [32]byte) error {
	f.wrapped.Delete(digest)
	return nil
}

func (f *fakeToken) DestroyKey(_ context.Context, label string) error {
	trace(f.dir, "destroy")
	die()
	return nil
}

func (f *fakeToken) Do(_ context.Context, label string, op hsm.Operation, data []byte) ([]byte, error) {
	switch label {
	case "echo", hsm.HealthPrefix + "echo":
		return data, nil
	case "hang":
		trace(f.dir, "hang")
		select {}
	case "crash":
		trace(f.dir, "crash")
		die()
	case "crash once":
		if _, err := os.Stat(filepath.Join(f.dir, "crashed")); err != nil {
			trace(f.dir, "crashed")
			die()
		}
		return data, nil
	case "block":
		// Until the file is there: two calls at once must not wait for each other.
		trace(f.dir, "blocked")
		for {
			if _, err := os.Stat(filepath.Join(f.dir, "go")); err == nil {
				return data, nil
			}
			time.Sleep(time.Millisecond)
		}
	case "refused":
		return nil, &hsm.Error{Call: "C_Sign", RV: 0x80000042}
	case "pin":
		return nil, fmt.Errorf("signing: %w", &hsm.Error{Call: "C_Login", RV: hsm.CKR_PIN_LOCKED})
	case "dump":
		var limit unix.Rlimit
		if err := unix.Getrlimit(unix.RLIMIT_CORE, &limit); err != nil {
			return nil, err
		}
		dumpable, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
		if err != nil {
			return nil, err
		}
		return fmt.Appendf(nil, "%d %d %d", limit.Cur, limit.Max, dumpable), nil
	case "print":
		fmt.Println("a line from the module")
		fmt.Fprintln(os.Stderr, strings.Repeat("long", 1000))
		return nil, nil
	case "secrets":
		env := strings.Join(os.Environ(), "\n") + strings.Join(os.Args, "\n")
		return fmt.Appendf(nil, "%v", strings.Contains(env, "right")), nil
	}
	return nil, hsm.ErrKeyNotFound
}

var sampleUses uint64 = 1 << 40

func sampleKeys() []hsm.KeyInfo {
	n := make([]byte, 256)
	for i := range n {
		n[i] = 0xC5
	}
	pub, err := sm2.NewPublicKey(annexKey)
	if err != nil {
		panic(err)
	}
	r := &rsa.PublicKey{E: 65537}
	r.N = new(big.Int).SetBytes(n)
	return []hsm.KeyInfo{
		{Label: "国密", ID: []byte{1, 0, 255}, Algorithm: hsm.SM2, Public: pub, Sensitive: true, NeverExtractable: true},
		{Label: "rsa", ID: []byte{2}, Algorithm: hsm.RSA2048, Public: r, Extractable: true, Uses: &sampleUses},
		{Label: "mac", Algorithm: hsm.HMACSM3, Sensitive: true, Trusted: true},
	}
}

// annexKey is the public key of GB/T 32918.5-2017 annex A.2.
var annexKey = func() []byte {
	b := make([]byte, 64)
	if _, err := fmt.Sscanf("09F9DF311E5421A150DD7D161E4BC5C672179FAD1833FC076BB08FF356F35020"+
		"CCEA490CE26775A52DC6EA718CC1AA600AED05FBF35E084A6632F6072DA9AD13", "%x", &b); err != nil {
		panic(err)
	}
	return append([]byte{4}, b...)
}()

// parent starts a worker, prints its pid, and waits to be killed.
func parent() int {
	c, err := worker.Start(worker.Config{Command: []string{os.Args[0], "child"}, Class: hsm.Staff, Params: fakeParams(os.Args[2], "right"), Log: quiet()})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	fmt.Println(c.State().PID)
	select {}
}

func quiet() logrus.FieldLogger {
	l := logrus.New()
	l.SetOutput(io.Discard)
	return l
}

func fakeParams(dir, pin string) worker.StartParams {
	return worker.StartParams{Class: hsm.Staff, Module: "fake", ModuleArgs: dir, TokenLabel: "fake", PIN: []byte(pin), Profile: "none", MaxSessions: 8}
}

func config(t testing.TB, dir, pin string) worker.Config {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return worker.Config{Command: []string{self, "child"}, Class: hsm.Staff, Params: fakeParams(dir, pin), Log: quiet(),
		RestartWait: 20 * time.Second} // the machine may be slow; tests of RestartWait set it
}

func start(t testing.TB, cfg worker.Config) *worker.Client {
	t.Helper()
	c, err := worker.Start(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestCalls(t *testing.T) {
	t.Parallel()
	c := start(t, config(t, t.TempDir(), "right"))
	ctx := t.Context()
	for _, n := range []int{0, 1, 32, 65536, 512 << 10} {
		data := make([]byte, n)
		rand.Read(data)
		if got, err := c.Do(ctx, "echo", hsm.SignSM2E, data); err != nil || !bytes.Equal(got, data) {
			t.Errorf("Do with %d bytes: %d back, %v", n, len(got), err)
		}
	}
	if _, err := c.Do(ctx, "echo", hsm.SignSM2E, make([]byte, 512<<10+1)); hsm.ClassifyError(err) != hsm.ClassPermanent {
		t.Errorf("too much data: %v", err)
	}
	info, err := c.Info(ctx)
	want := hsm.TokenInfo{Slot: 7, Label: "fake", Manufacturer: "测试", MaxSessions: 8, UserPINFinalTry: true}
	if err != nil || info != want {
		t.Errorf("Info = %+v, %v; want %+v", info, err, want)
	}
	keys, err := c.Keys(ctx)
	if err != nil || !cmp.Equal(keys, sampleKeys()) {
		t.Errorf("Keys = %+v, %v; want %+v", keys, err, sampleKeys())
	}
	made, err := c.GenerateKey(ctx, hsm.KeySpec{Label: "k", ID: []byte{9}, Algorithm: hsm.HMACSM3})
	if err != nil || !cmp.Equal(made, hsm.KeyInfo{Label: "k", ID: []byte{9}, Algorithm: hsm.HMACSM3, Sensitive: true}) {
		t.Errorf("GenerateKey = %+v, %v", made, err)
	}
	if _, err := c.FindKey(ctx, "none"); !errors.Is(err, hsm.ErrKeyNotFound) || !strings.Contains(err.Error(), `"none"`) {
		t.Errorf("FindKey = %v, want ErrKeyNotFound with the child's text", err)
	}
	var e *hsm.Error
	if _, err := c.Do(ctx, "refused", hsm.SignSM2E, nil); !errors.As(err, &e) || *e != (hsm.Error{Call: "C_Sign", RV: 0x80000042}) {
		t.Errorf("Do = %v, want the token's own error", err)
	}
	if r, err := c.Random(ctx, 1024); err != nil || len(r) != 1024 {
		t.Errorf("Random: %d bytes, %v", len(r), err)
	}
	for _, n := range []int{-1, 0, 1025} {
		if _, err := c.Random(ctx, n); err == nil {
			t.Errorf("Random(%d) answered", n)
		}
	}
	// The child cannot be dumped, and its PIN is in neither arguments nor environment.
	if got, err := c.Do(ctx, "dump", hsm.SignSM2E, nil); err != nil || string(got) != "0 0 0" {
		t.Errorf("core limits and dumpable = %q, %v; want 0 0 0", got, err)
	}
	if got, err := c.Do(ctx, "secrets", hsm.SignSM2E, nil); err != nil || string(got) != "false" {
		t.Errorf("PIN in arguments or environment: %s, %v", got, err)
	}
	if s := c.State(); s.Phase != worker.Ready || s.Sessions != 8 || s.PID == 0 || s.Restarts != 0 || s.LastError != nil {
		t.Errorf("State = %+v", s)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if _, err := c.Do(ctx, "echo", hsm.SignSM2E, nil); !errors.Is(err, hsm.ErrUnavailable) {
		t.Errorf("after Close: %v", err)
	}
	if s := c.State(); s.Phase != worker.Closed {
		t.Errorf("State after Close = %+v", s)
	}
}

// TestConcurrency: eight calls are under way at once, the ninth waits, under its ctx.
func TestConcurrency(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	c := start(t, config(t, dir, "right"))
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if _, err := c.Do(t.Context(), "block", hsm.SignSM2E, nil); err != nil {
				t.Error(err)
			}
		})
	}
	waitTrace(t, dir, "blocked", 8)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := c.Do(ctx, "echo", hsm.SignSM2E, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("ninth call: %v", err)
	}
	trace(dir, "go")
	wg.Wait()
	if s := c.State(); s.Restarts != 0 {
		t.Errorf("%d restarts: a caller's ctx must not cost the worker its life", s.Restarts)
	}
}

func waitTrace(t *testing.T, dir, name string, n int) {
	t.Helper()
	for end := time.Now().Add(2 * time.Minute); traced(t, dir, name) < n; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: %d traces, want %d", name, traced(t, dir, name), n)
		}
	}
}

// TestAbandonedCall: ctx ends while the call is under way. The caller is free, the worker lives, the session is given
// back when the token answers.
func TestAbandonedCall(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	cfg := config(t, dir, "right")
	cfg.Params.MaxSessions = 1
	c := start(t, cfg)
	ctx, cancel := context.WithCancelCause(t.Context())
	gone := errors.New("client went away")
	done := make(chan error, 1)
	go func() { _, err := c.Do(ctx, "block", hsm.SignSM2E, nil); done <- err }()
	waitTrace(t, dir, "blocked", 1)
	cancel(gone)
	if err := <-done; !errors.Is(err, gone) {
		t.Errorf("abandoned call: %v", err)
	}
	trace(dir, "go")
	if _, err := c.Do(t.Context(), "echo", hsm.SignSM2E, nil); err != nil {
		t.Errorf("the session did not come back: %v", err)
	}
	if s := c.State(); s.Restarts != 0 {
		t.Errorf("%d restarts", s.Restarts)
	}
}

// TestDeadline: a hung call is ended with its worker; calls beside it are sent to the next one.
func TestDeadline(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	cfg := config(t, dir, "right")
	cfg.CallDeadline = 2 * time.Second
	trace(dir, "slow keys")
	c := start(t, cfg)
	first := c.State().PID
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := c.Do(t.Context(), "hang", hsm.SignSM2E, nil); !errors.Is(err, hsm.ErrDeadline) {
			t.Errorf("hung call: %v, want ErrDeadline", err)
		}
	})
	waitTrace(t, dir, "hang", 1)
	wg.Go(func() {
		// Keys has the longer deadline, so that it is not its own time that is over.
		if keys, err := c.Keys(t.Context()); err != nil || len(keys) != 3 {
			t.Errorf("call beside the hung one: %d keys, %v", len(keys), err)
		}
	})
	waitTrace(t, dir, "blocked", 2) // once in each worker
	trace(dir, "go")
	wg.Wait()
	if n := traced(t, dir, "hang"); n != 1 {
		t.Errorf("the hung call was tried %d times", n)
	}
	mustEcho(t, c)
	s := c.State()
	if s.PID == first || s.Restarts < 1 || !errors.Is(s.LastError, hsm.ErrDeadline) {
		t.Errorf("State = %+v (first worker %d)", s, first)
	}
	if err := syscall.Kill(first, 0); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("the hung worker is still there: %v", err)
	}
}

// TestWaitingInTheChild: a call that the child has before there is a session for it. Its time is counted from when it has one, and
// then it is.
func TestWaitingInTheChild(t *testing.T) {
	t.Parallel()
	for what, label := range map[string]string{"it works": "echo", "it hangs": "hang"} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			cfg := config(t, dir, "right")
			cfg.Params.MaxSessions = 1
			cfg.CallDeadline = time.Second
			trace(dir, "slow keys")
			c := start(t, cfg)
			if s := c.State(); s.Sessions != 1 || s.Ahead != 1 {
				t.Errorf("State = %+v", s)
			}
			var wg sync.WaitGroup
			wg.Go(func() {
				if _, err := c.Keys(t.Context()); err != nil { // has the longer deadline
					t.Error(err)
				}
			})
			waitTrace(t, dir, "blocked", 1)
			wg.Go(func() {
				_, err := c.Do(t.Context(), label, hsm.SignSM2E, nil)
				if hangs := label == "hang"; hangs != errors.Is(err, hsm.ErrDeadline) || !hangs && err != nil {
					t.Errorf("the call that waited: %v", err)
				}
			})
			time.Sleep(2 * cfg.CallDeadline) // longer than its own time
			if s := c.State(); s.Restarts != 0 {
				t.Errorf("%d restarts while it waited", s.Restarts)
			}
			trace(dir, "go")
			wg.Wait()
		})
	}
}

// TestStoppedWorker: a worker that takes nothing from the stream any more.
func TestStoppedWorker(t *testing.T) {
	t.Parallel()
	cfg := config(t, t.TempDir(), "right")
	cfg.CallDeadline = 500 * time.Millisecond
	c := start(t, cfg)
	if err := syscall.Kill(c.State().PID, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			// Larger than the socket's buffer.
			_, err := c.Do(t.Context(), "echo", hsm.SignSM2E, make([]byte, 512<<10))
			if err != nil && !errors.Is(err, hsm.ErrDeadline) && !errors.Is(err, hsm.ErrUnavailable) {
				t.Errorf("stopped worker: %v", err)
			}
		})
	}
	wg.Wait()
	mustEcho(t, c)
}

// mustEcho wants a worker that answers again. On a busy machine one more may take longer than a call's deadline.
func mustEcho(t *testing.T, c *worker.Client) {
	t.Helper()
	for end := time.Now().Add(2 * time.Minute); ; {
		_, err := c.Do(t.Context(), "echo", hsm.SignSM2E, nil)
		if err == nil {
			return
		}
		if !errors.Is(err, hsm.ErrDeadline) && !errors.Is(err, hsm.ErrUnavailable) || time.Now().After(end) {
			t.Fatalf("afterwards: %v", err)
		}
	}
}

// TestKilledUnderLoad kills workers while 16 goroutines call: every call gets an answer or a typed error, nothing
// hangs, and the service returns.
func TestKilledUnderLoad(t *testing.T) {
	t.Parallel()
	c := start(t, config(t, t.TempDir(), "right"))
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	stop := make(chan struct{})
	var answered, refused atomic.Int64
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-stop:
					return
				default:
				}
				data := fmt.Appendf(nil, "%d/%d", i, n)
				got, err := c.Do(ctx, "echo", hsm.SignSM2E, data)
				switch {
				case err == nil && bytes.Equal(got, data):
					answered.Add(1)
				case errors.Is(err, hsm.ErrUnavailable):
					refused.Add(1)
				default:
					t.Errorf("call %s: %q, %v", data, got, err)
					return
				}
			}
		})
	}
	for range 5 {
		was := answered.Load()
		pid := c.State().PID
		for pid == 0 || answered.Load() == was {
			if ctx.Err() != nil {
				t.Fatal("service does not return")
			}
			time.Sleep(time.Millisecond)
			pid = c.State().PID
		}
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			t.Fatal(err)
		}
	}
	if _, err := c.Do(ctx, "echo", hsm.SignSM2E, nil); err != nil {
		t.Errorf("afterwards: %v", err)
	}
	close(stop)
	wg.Wait()
	t.Logf("%d answered, %d refused, %d restarts", answered.Load(), refused.Load(), c.State().Restarts)
}

// TestRetries: a call that may run twice is sent to one more worker, others to none.
func TestRetries(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	c := start(t, config(t, dir, "right"))
	if got, err := c.Do(t.Context(), "crash once", hsm.SignSM2E, []byte("x")); err != nil || string(got) != "x" {
		t.Errorf("crash once: %q, %v", got, err)
	}
	if _, err := c.Do(t.Context(), "crash", hsm.SignSM2E, nil); !errors.Is(err, hsm.ErrUnavailable) {
		t.Errorf("crash: %v", err)
	}
	if _, err := c.GenerateKey(t.Context(), hsm.KeySpec{Label: "crash"}); !errors.Is(err, hsm.ErrUnavailable) {
		t.Errorf("GenerateKey: %v", err)
	}
	if err := c.DestroyKey(t.Context(), "k"); !errors.Is(err, hsm.ErrUnavailable) {
		t.Errorf("DestroyKey: %v", err)
	}
	for name, want := range map[string]int{"crash": 2, "generate": 1, "destroy": 1} {
		if got := traced(t, dir, name); got != want {
			t.Errorf("%s ran %d times, want %d", name, got, want)
		}
	}
}

func TestWrongPIN(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if _, err := worker.Start(config(t, dir, "wrong")); !errors.Is(err, hsm.ErrNeedsOperator) || hsm.ClassifyError(err) != hsm.ClassFatal {
		t.Errorf("Start = %v, want ErrNeedsOperator", err)
	}
	if got := traced(t, dir, "login"); got != 1 {
		t.Errorf("PIN presented %d times, want 1", got)
	}
}

// TestRefusedLater: a PIN that the token refuses at a later login latches, whatever calls are made.
func TestRefusedLater(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	c := start(t, config(t, dir, "right"))
	if _, err := c.Do(t.Context(), "pin", hsm.SignSM2E, nil); !errors.Is(err, hsm.ErrNeedsOperator) {
		t.Errorf("Do = %v", err)
	}
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			if _, err := c.Do(t.Context(), "echo", hsm.SignSM2E, nil); !errors.Is(err, hsm.ErrNeedsOperator) {
				t.Errorf("Do = %v, want ErrNeedsOperator", err)
			}
		})
	}
	wg.Wait()
	if s := c.State(); s.Phase != worker.NeedsOperator || s.PID != 0 || !errors.Is(s.LastError, hsm.ErrNeedsOperator) {
		t.Errorf("State = %+v", s)
	}
	c.Close()
	if got := traced(t, dir, "login"); got != 1 {
		t.Errorf("PIN presented %d times, want 1", got)
	}
}

// TestUnansweredPIN: the module crashes, hangs or loses the device in C_Login, and may have counted a try each time.
func TestUnansweredPIN(t *testing.T) {
	t.Parallel()
	for _, pin := range []string{"crash", "unanswered", "hang"} {
		t.Run(pin, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			cfg := config(t, dir, pin)
			if pin == "hang" {
				cfg.OpenDeadline = 6 * time.Second // in which a child on a busy machine comes to the login
			}
			c := start(t, cfg)
			for {
				_, err := c.Do(t.Context(), "echo", hsm.SignSM2E, nil)
				if errors.Is(err, hsm.ErrNeedsOperator) {
					break
				}
				if !errors.Is(err, hsm.ErrUnavailable) {
					t.Fatal(err)
				}
			}
			if got := traced(t, dir, "login"); got != 2 {
				t.Errorf("PIN presented %d times, want 2", got)
			}
		})
	}
}

// TestDeviceAway: a cipher machine that is not there at the start is waited for, and the PIN not touched meanwhile.
func TestDeviceAway(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	trace(dir, "away")
	cfg := config(t, dir, "right")
	cfg.RestartWait = 30 * time.Millisecond
	c := start(t, cfg)
	if _, err := c.Do(t.Context(), "echo", hsm.SignSM2E, nil); !errors.Is(err, hsm.ErrUnavailable) || hsm.ClassifyError(err) != hsm.ClassReconnect {
		t.Errorf("device away: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.Do(ctx, "echo", hsm.SignSM2E, nil); !errors.Is(err, hsm.ErrUnavailable) || !errors.Is(err, context.Canceled) {
		t.Errorf("device away, ctx ended: %v", err)
	}
	if s := c.State(); s.Phase != worker.Restarting || hsm.ClassifyError(s.LastError) != hsm.ClassReconnect {
		t.Errorf("State = %+v", s)
	}
	waitTrace(t, dir, "opened", 4)
	if got := traced(t, dir, "login"); got != 0 {
		t.Errorf("PIN presented %d times, want 0", got)
	}
	if err := os.Remove(filepath.Join(dir, "away")); err != nil {
		t.Fatal(err)
	}
	for {
		_, err := c.Do(t.Context(), "echo", hsm.SignSM2E, nil)
		if err == nil {
			break
		}
		if !errors.Is(err, hsm.ErrUnavailable) {
			t.Fatal(err)
		}
	}
}

// TestSever: a drill keeps calls from a machine that is well. It is as if it were away, and its child goes on.
func TestSever(t *testing.T) {
	t.Parallel()
	cfg := config(t, t.TempDir(), "right")
	cfg.RestartWait = 5 * time.Second
	c := start(t, cfg)
	pid := c.State().PID
	call := func() error { _, err := c.Do(t.Context(), "echo", hsm.SignSM2E, nil); return err }
	c.Sever(time.Hour)
	if err := call(); !errors.Is(err, hsm.ErrUnavailable) {
		t.Errorf("a call went to a severed machine: %v", err)
	}
	if s := c.State(); s.Phase != worker.Restarting || s.LastError == nil {
		t.Errorf("State = %+v", s)
	}
	c.Mend()
	c.Mend()
	if err := call(); err != nil {
		t.Error(err)
	}
	// It ends by itself, and who waits is not told that it was away.
	c.Sever(time.Hour)
	c.Sever(5 * time.Millisecond)
	if err := call(); err != nil {
		t.Error(err)
	}
	if s := c.State(); s.Phase != worker.Ready || s.PID != pid || s.Restarts != 0 {
		t.Errorf("State = %+v, want the same child", s)
	}
}

func TestStartErrors(t *testing.T) {
	t.Parallel()
	good := config(t, t.TempDir(), "right")
	for name, spoil := range map[string]func(*worker.Config){
		"no command":        func(c *worker.Config) { c.Command = nil },
		"no logger":         func(c *worker.Config) { c.Log = nil },
		"no such program":   func(c *worker.Config) { c.Command = []string{"/no/such/program"} },
		"no such command":   func(c *worker.Config) { c.Command = []string{"no-such-command-anywhere"} },
		"too many sessions": func(c *worker.Config) { c.Params.MaxSessions = 1025 },
		"long PIN":          func(c *worker.Config) { c.Params.PIN = make([]byte, 256) },
		"long label":        func(c *worker.Config) { c.Params.TokenLabel = strings.Repeat("x", 5000) },
		"negative deadline": func(c *worker.Config) { c.CallDeadline = -1 },
	} {
		cfg := good
		spoil(&cfg)
		if c, err := worker.Start(cfg); err == nil {
			c.Close()
			t.Errorf("%s: passed", name)
		}
	}
}

// TestGarbageWorker: a program that answers nonsense. It is ended, and nothing is believed.
func TestGarbageWorker(t *testing.T) {
	t.Parallel()
	for name, script := range map[string]string{
		"text":          `echo hello world, this is no frame at all >&3; cat <&3 >/dev/null`,
		"silent end":    `exit 0`,
		"oversize":      `printf '\377\377\377\377\204\0\0\0\0\0\0\0\0' >&3; cat <&3 >/dev/null`,
		"half a frame":  `printf '\0\0\0\377\202' >&3; exit 0`,
		"no sessions":   `printf '\0\0\0\015\202\0\0\0\0\0\0\0\0\0\0\0\0' >&3; cat <&3 >/dev/null`,
		"many sessions": `printf '\0\0\0\015\202\0\0\0\0\0\0\0\0\0\0\377\377' >&3; cat <&3 >/dev/null`,
		"stray answer":  `printf '\0\0\0\015\202\0\0\0\0\0\0\0\0\0\0\0\1\0\0\0\011\204\0\0\0\0\0\0\0\143' >&3; cat <&3 >/dev/null`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cfg := config(t, t.TempDir(), "right")
			cfg.Command = []string{"/bin/sh", "-c", script}
			cfg.RestartWait, cfg.CallDeadline = 50*time.Millisecond, 5*time.Second
			c := start(t, cfg)
			if _, err := c.Do(t.Context(), "echo", hsm.SignSM2E, nil); !errors.Is(err, hsm.ErrUnavailable) {
				t.Errorf("Do = %v, want ErrUnavailable", err)
			}
		})
	}
}

// pair runs the child's end in this process, and answers the parent's end of its stream.
func pair(t *testing.T, open func(context.Context, worker.StartParams) (hsm.Token, error)) (net.Conn, <-chan error) {
	t.Helper()
	ours, theirs := net.Pipe()
	done := make(chan error, 1)
	go func() { done <- worker.ServeUnhardened(t.Context(), theirs, open) }()
	t.Cleanup(func() { ours.Close() })
	return ours, done
}

func fakeOpen(_ context.Context, p worker.StartParams) (hsm.Token, error) {
	return &fakeToken{dir: p.ModuleArgs}, nil
}

// TestServeRefuses: what the child's end does with frames that are none.
func TestServeRefuses(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	startFrame := worker.StartFrame(fakeParams(dir, "right"))
	version := bytes.Clone(startFrame)
	version[13] = 99
	for name, frames := range map[string][][]byte{
		"nothing":              nil,
		"oversize":             {{0xFF, 0xFF, 0xFF, 0xFF, 1, 0, 0, 0, 0, 0, 0, 0, 0}},
		"just over the limit":  {append(binary.BigEndian.AppendUint32(nil, worker.MaxRequest+10), 1, 0, 0, 0, 0, 0, 0, 0, 0)},
		"undersize":            {{0, 0, 0, 8, 1, 0, 0, 0, 0, 0, 0, 0, 0}},
		"call before start":    {worker.DoFrame(1, "echo", hsm.SignSM2E, nil)},
		"other version":        {version},
		"start, trailing byte": {worker.Frame(worker.KindStart, 0, append(bytes.Clone(startFrame[13:]), 0))},
		"start twice":          {startFrame, startFrame},
		"unknown kind":         {startFrame, worker.Frame(0x70, 1, nil)},
		"cut off":              {startFrame, worker.DoFrame(1, "echo", hsm.SignSM2E, []byte("x"))[:20]},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			conn, done := pair(t, fakeOpen)
			go io.Copy(io.Discard, conn)
			for _, f := range frames {
				// The other end hangs up in the midst of some.
				_, _ = conn.Write(f)
			}
			if name == "nothing" || name == "cut off" {
				conn.Close()
			}
			if err := <-done; err == nil {
				t.Error("Serve ended without an error")
			}
		})
	}
}

// TestServeCalls: a body that does not fit is one call's error; the stream's end is the end.
func TestServeCalls(t *testing.T) {
	t.Parallel()
	conn, done := pair(t, fakeOpen)
	send := func(frame []byte) (uint8, uint64, []byte) {
		t.Helper()
		if _, err := conn.Write(frame); err != nil {
			t.Fatal(err)
		}
		k, id, body, err := worker.ReadFrame(conn, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		return k, id, body
	}
	if k, _, body := send(worker.StartFrame(fakeParams(t.TempDir(), "right"))); k != worker.KindReady || !bytes.Equal(body, []byte{0, 0, 0, 8}) {
		t.Fatalf("start answered %#x %x", k, body)
	}
	if k, id, body := send(worker.DoFrame(5, "echo", hsm.SignSM2E, []byte("abc"))); k != worker.KindResult || id != 5 || string(body) != "\x00\x00\x00\x03abc" {
		t.Errorf("Do answered %#x %d %q", k, id, body)
	}
	for i, bad := range [][]byte{
		worker.Frame(worker.KindDo, 6, nil),
		worker.Frame(worker.KindDo, 6, []byte{0xFF, 0xFF, 0xFF, 0xFF}),
		worker.Frame(worker.KindDo, 6, append(worker.DoFrame(6, "echo", hsm.SignSM2E, nil)[13:], 1)),
		worker.Frame(worker.KindInfo, 6, []byte{1}),
		worker.Frame(worker.KindRandom, 6, []byte{1}),
	} {
		if k, id, _ := send(bad); k != worker.KindErrorful || id != 6 {
			t.Errorf("malformed call %d answered %#x, %d", i, k, id)
		}
	}
	conn.Close()
	if err := <-done; err != nil {
		t.Errorf("Serve at the stream's end: %v", err)
	}
}

// TestClasses: each class's keys do their own work and no other's; the caller's end refuses, and so does the child's
// when it is asked past the caller's.
func TestClasses(t *testing.T) {
	t.Parallel()
	own := map[hsm.SlotClass][]hsm.Operation{
		hsm.Staff: {hsm.SignSM2E, hsm.SignRSASHA256}, hsm.CA: {hsm.SignSM2E, hsm.SignRSASHA256},
		hsm.Log: {hsm.SignSM2E, hsm.MACSM3}, hsm.TLS: {hsm.SignRSAPSSSHA256, hsm.SignRSASHA256},
	}
	for _, class := range hsm.Classes {
		t.Run(string(class), func(t *testing.T) {
			t.Parallel()
			cfg := config(t, t.TempDir(), "right")
			cfg.Class = class
			c := start(t, cfg)
			params := fakeParams(t.TempDir(), "right")
			params.Class = class
			conn, _ := pair(t, fakeOpen)
			if _, err := conn.Write(worker.StartFrame(params)); err != nil {
				t.Fatal(err)
			}
			if k, _, _, err := worker.ReadFrame(conn, 1<<20); err != nil || k != worker.KindReady {
				t.Fatalf("start answered %#x, %v", k, err)
			}
			for _, op := range []hsm.Operation{hsm.SignSM2E, hsm.SignRSASHA256, hsm.SignRSAPSSSHA256, hsm.MACSM3, "", "sm2-f"} {
				want := slices.Contains(own[class], op)
				_, err := c.Do(t.Context(), "echo", op, []byte("x"))
				var refused *hsm.Error
				if want && err != nil || !want && (!errors.As(err, &refused) || hsm.RVName(refused.RV) != "CKR_KEY_FUNCTION_NOT_PERMITTED") {
					t.Errorf("%q: the caller's end says %v, want allowed %v", op, err, want)
				}
				if err != nil && strings.HasPrefix(err.Error(), "hsm/worker: ") {
					t.Errorf("%q: the caller's end has asked the child: %v", op, err)
				}
				if _, err := conn.Write(worker.DoFrame(1, "echo", op, []byte("x"))); err != nil {
					t.Fatal(err)
				}
				k, _, body, err := worker.ReadFrame(conn, 1<<20)
				if err != nil || (k == worker.KindResult) != want || !want && !bytes.Contains(body, []byte("CKR_KEY_FUNCTION_NOT_PERMITTED")) {
					t.Errorf("%q: the child's end says %#x %q, %v, want allowed %v", op, k, body, err, want)
				}
			}
		})
	}
	// A unit's key is for what its worker makes: of the slot's keys only one that proves its health signs what it is given.
	cfg := config(t, t.TempDir(), "right")
	cfg.Class = hsm.TSA
	c := start(t, cfg)
	for _, op := range []hsm.Operation{hsm.SignSM2E, hsm.SignRSASHA256} {
		if _, err := c.Do(t.Context(), hsm.HealthPrefix+"echo", op, []byte("x")); err != nil {
			t.Errorf("%s with a key for health: %v", op, err)
		}
		wrapped, err := hsm.NewWrappedKey(hsm.HealthPrefix+"echo", hsm.SM2, sampleKeys()[0].Public, "kek", []byte("blob"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.DoWrapped(t.Context(), wrapped, op, []byte("x")); err == nil {
			t.Errorf("%s with a wrapped key that is called one for health was done", op)
		}
	}
	if _, err := c.Do(t.Context(), hsm.WorkerPrefix+"time-anchor", hsm.MACSM3, []byte("x")); err == nil {
		t.Error("a caller uses the worker's own key")
	}
	cfg = config(t, t.TempDir(), "right")
	cfg.Class = "stuff"
	if _, err := worker.Start(cfg); err == nil {
		t.Error("a worker of no class was started")
	}
}

// TestServeLeavesHungCalls: the parent has gone, and a call hangs in the module.
func TestServeLeavesHungCalls(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	conn, done := pair(t, fakeOpen)
	go io.Copy(io.Discard, conn)
	for _, f := range [][]byte{worker.StartFrame(fakeParams(dir, "right")), worker.DoFrame(1, "hang", hsm.SignSM2E, nil)} {
		if _, err := conn.Write(f); err != nil {
			t.Fatal(err)
		}
	}
	waitTrace(t, dir, "hang", 1)
	conn.Close()
	if err := <-done; err == nil {
		t.Error("Serve ended in peace with a call under way")
	}
}

// A patientToken's calls wait until they are not wanted any longer, as for a session.
type patientToken struct{ hsm.Token }

func (patientToken) Do(ctx context.Context, _ string, _ hsm.Operation, _ []byte) ([]byte, error) {
	<-ctx.Done()
	return nil, fmt.Errorf("waiting for a session: %w", context.Cause(ctx))
}

// TestEndingWorkersAnswer: a call that gives up because its worker leaves (a frame was malformed) is unavailable, which
// its caller tries elsewhere; it is no cancellation, which nobody asked for.
func TestEndingWorkersAnswer(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(time.Millisecond, cancel)
	k, err := worker.AnswerDo(ctx, patientToken{}, "k", hsm.SignSM2E)
	if k != worker.KindErrorful || !errors.Is(err, hsm.ErrUnavailable) || errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "waiting for a session") {
		t.Errorf("the waiting call was answered %#x, %v", k, err)
	}
}

func TestServeZeroisesPIN(t *testing.T) {
	t.Parallel()
	var pin []byte
	conn, done := pair(t, func(_ context.Context, p worker.StartParams) (hsm.Token, error) {
		pin = p.PIN
		if string(pin) != "right" {
			return nil, errors.New("PIN did not arrive")
		}
		return nil, &hsm.Error{Call: "C_Login", RV: hsm.CKR_PIN_EXPIRED}
	})
	go io.Copy(io.Discard, conn)
	if _, err := conn.Write(worker.StartFrame(fakeParams(t.TempDir(), "right"))); err != nil {
		t.Fatal(err)
	}
	if err := <-done; !errors.Is(err, hsm.ErrNeedsOperator) {
		t.Errorf("Serve = %v, want what open said", err)
	}
	if !bytes.Equal(pin, make([]byte, 5)) {
		t.Errorf("PIN afterwards: %q", pin)
	}
}

// TestParentDeath kills the parent of a stopped worker: the end of the stream cannot reach it, the kernel's signal can.
func TestParentDeath(t *testing.T) {
	t.Parallel()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for name, stop := range map[string]bool{"running": false, "stopped": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cmd := exec.Command(self, "parent", t.TempDir())
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			var pid int
			if _, err := fmt.Fscan(out, &pid); err != nil {
				t.Fatal(err)
			}
			fd, err := unix.PidfdOpen(pid, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(fd)
			if stop {
				if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
					t.Fatal(err)
				}
			}
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			_ = cmd.Wait()
			fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
			for {
				n, err := unix.Poll(fds, 20_000)
				if err == unix.EINTR {
					continue
				}
				if err != nil || n != 1 {
					syscall.Kill(pid, syscall.SIGKILL)
					t.Fatalf("worker %d outlives its parent (%d, %v)", pid, n, err)
				}
				break
			}
		})
	}
}

// lines collects what is logged.
type lines struct {
	mu  sync.Mutex
	all []string
	got chan struct{}
}

func (l *lines) Levels() []logrus.Level { return logrus.AllLevels }

func (l *lines) Fire(e *logrus.Entry) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if line, ok := e.Data["line"].(string); ok {
		l.all = append(l.all, line)
		if len(l.all) == 2 {
			close(l.got)
		}
	}
	return nil
}

func TestOutputIsLogged(t *testing.T) {
	t.Parallel()
	log := logrus.New()
	log.SetOutput(io.Discard)
	hook := &lines{got: make(chan struct{})}
	log.AddHook(hook)
	cfg := config(t, t.TempDir(), "right")
	cfg.Log = log
	c := start(t, cfg)
	if _, err := c.Do(t.Context(), "print", hsm.SignSM2E, nil); err != nil {
		t.Fatal(err)
	}
	<-hook.got
	hook.mu.Lock()
	defer hook.mu.Unlock()
	if hook.all[0] != "a line from the module" || len(hook.all[1]) != 1024 {
		t.Errorf("logged %q", hook.all)
	}
}

func TestErrorsCross(t *testing.T) {
	t.Parallel()
	pk := &hsm.Error{Call: "C_Sign", RV: 0x32}
	for _, err := range []error{
		errors.New("plain"),
		hsm.ErrKeyNotFound,
		fmt.Errorf("a: %w", hsm.ErrKeyExists),
		pk,
		fmt.Errorf("b: %w: %w", hsm.ErrUnavailable, pk),
		fmt.Errorf("c: %w", &hsm.Error{Call: "C_Login", RV: hsm.CKR_PIN_LOCKED}),
		errors.Join(context.Canceled, context.DeadlineExceeded, hsm.ErrDeadline, hsm.ErrBadSignature, hsm.ErrKeyAmbiguous),
	} {
		got, bad := worker.DecodeError(worker.EncodeError(err))
		if bad != nil {
			t.Fatal(bad)
		}
		if got.Error() != err.Error() {
			t.Errorf("%v became %v", err, got)
		}
		for _, s := range []error{hsm.ErrKeyNotFound, hsm.ErrKeyExists, hsm.ErrKeyAmbiguous, hsm.ErrDeadline,
			hsm.ErrUnavailable, hsm.ErrNeedsOperator, hsm.ErrBadSignature, context.Canceled, context.DeadlineExceeded} {
			if errors.Is(got, s) != errors.Is(err, s) {
				t.Errorf("%v: errors.Is(%v) = %v", err, s, errors.Is(got, s))
			}
		}
		if hsm.ClassifyError(got) != hsm.ClassifyError(err) {
			t.Errorf("%v: class %v, want %v", err, hsm.ClassifyError(got), hsm.ClassifyError(err))
		}
	}
}

func FuzzBodies(f *testing.F) {
	for _, k := range sampleKeys() {
		b, err := worker.EncodeKeyInfo(k)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add(worker.EncodeTokenInfo(hsm.TokenInfo{Slot: 1, Label: "x", Initialized: true}))
	f.Add(worker.EncodeError(fmt.Errorf("x: %w", &hsm.Error{Call: "C_Sign", RV: 0x32})))
	f.Add(append([]byte{3}, worker.StartFrame(fakeParams("d", "1234"))[13:]...))
	f.Fuzz(func(t *testing.T, b []byte) {
		again, err := worker.ParseBody(b)
		if err != nil {
			return
		}
		switch {
		case b[0] == 2:
			// An error may say the same in two ways (a refused PIN is ErrNeedsOperator by itself); the second round is
			// the fixed point.
			third, err := worker.ParseBody(again)
			if err != nil || !bytes.Equal(again, third) {
				t.Fatalf("%x became %x, then %x, %v", b, again, third, err)
			}
		case b[0] > 2:
			again[0] = b[0]
			fallthrough
		default:
			if !bytes.Equal(b, again) {
				t.Fatalf("%x became %x", b, again)
			}
		}
	})
}

func FuzzReadFrame(f *testing.F) {
	f.Add(worker.DoFrame(7, "label", hsm.SignSM2E, make([]byte, 32)))
	f.Add([]byte{0, 0, 0, 9, 1, 0, 0, 0, 0, 0, 0, 0, 1})
	f.Add([]byte{0xFF, 0xFF, 0xFF, 0xFF})
	f.Fuzz(func(t *testing.T, b []byte) {
		k, id, body, err := worker.ReadFrame(bytes.NewReader(b), 4096)
		if err != nil {
			return
		}
		if again := worker.Frame(k, id, body); !bytes.HasPrefix(b, again) {
			t.Fatalf("%x became %x", b, again)
		}
	})
}

// A mirrorToken answers at once, and never ends.
type mirrorToken struct{ fakeToken }

func (*mirrorToken) Keys(context.Context) ([]hsm.KeyInfo, error) { return sampleKeys(), nil }

func (*mirrorToken) GenerateKey(_ context.Context, spec hsm.KeySpec) (hsm.KeyInfo, error) {
	return hsm.KeyInfo{Label: spec.Label, ID: spec.ID, Algorithm: spec.Algorithm}, nil
}

func (*mirrorToken) Random(_ context.Context, n int) ([]byte, error) {
	return make([]byte, min(n, 1024)), nil
}

func (*mirrorToken) DestroyKey(context.Context, string) error { return nil }

func (*mirrorToken) Do(_ context.Context, _ string, _ hsm.Operation, data []byte) ([]byte, error) {
	return data, nil
}

func (*mirrorToken) DoWrapped(_ context.Context, _ *hsm.WrappedKey, _ hsm.Operation, data []byte) ([]byte, error) {
	return data, nil
}

// FuzzServe serves a stream of calls: what is answered was asked, and is answered once.
func FuzzServe(f *testing.F) {
	f.Add(worker.DoFrame(7, "label", hsm.SignSM2E, make([]byte, 32)))
	f.Add(slices.Concat(worker.Frame(worker.KindInfo, 1, nil), worker.Frame(worker.KindRandom, 2, []byte{0, 0, 0, 8}), worker.DoFrame(3, "k", hsm.MACSM3, nil)))
	f.Add(worker.Frame(worker.KindDo, 9, []byte{0xFF, 0xFF, 0xFF, 0xFF}))
	for k := worker.KindInfo; k <= worker.KindSelfTest; k++ {
		f.Add(worker.Frame(k, uint64(k), []byte{0, 0, 0, 1, 'k', 0, 0, 0, 0, 0, 0, 0, 3, 'S', 'M', '2', 0, 0, 0, 1, 'q'}))
	}
	f.Add([]byte{0xFF, 0xFF, 0xFF, 0xFF})
	f.Fuzz(func(t *testing.T, b []byte) {
		asked, calls, whole := map[uint64]int{}, 0, false
		for r := bytes.NewReader(b); ; calls++ {
			k, id, _, err := worker.ReadFrame(r, worker.MaxRequest)
			if err != nil || k < worker.KindInfo || k > worker.KindSelfTest {
				whole = errors.Is(err, io.EOF)
				break
			}
			asked[id]++
		}
		conn, done := pair(t, func(context.Context, worker.StartParams) (hsm.Token, error) { return &mirrorToken{}, nil })
		ended, answered := make(chan error, 1), make(chan struct{}, calls+1)
		go func() {
			defer close(ended)
			for first := true; ; first = false {
				k, id, _, err := worker.ReadFrame(conn, 16<<20)
				switch {
				case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.ErrClosedPipe):
					return // in the midst of an answer too, for both ends hang up
				case err != nil:
					ended <- err
					return
				case first && k == worker.KindReady:
				case asked[id] > 0 && (k == worker.KindResult || k == worker.KindErrorful):
					asked[id]--
					answered <- struct{}{}
				default:
					ended <- fmt.Errorf("answer %#x to %d", k, id)
					return
				}
			}
		}()
		for _, part := range [][]byte{worker.StartFrame(fakeParams("", "right")), b} {
			_, _ = conn.Write(part) // it hangs up at what is no frame
		}
		var wrong error
		for n := 0; whole && wrong == nil && n < calls; n++ {
			select {
			case <-answered:
			case wrong = <-ended:
				wrong = errors.Join(wrong, fmt.Errorf("%d of %d calls were answered", n, calls))
			case <-time.After(30 * time.Second):
				wrong = fmt.Errorf("%d of %d calls were answered within 30 s", n, calls)
			}
		}
		conn.Close()
		<-done
		if err := errors.Join(wrong, <-ended); err != nil {
			t.Fatal(err)
		}
	})
}

// FuzzAnswers has the parent's end read what is no child of ours: each call under way has one result, and its session.
func FuzzAnswers(f *testing.F) {
	f.Add([]byte{})
	f.Add(worker.Frame(worker.KindResult, 2, []byte("x")))
	f.Add(slices.Concat(worker.Frame(worker.KindResult, 1, nil), worker.Frame(worker.KindResult, 1, nil)))
	f.Add(worker.Frame(worker.KindErrorful, 3, worker.EncodeError(fmt.Errorf("x: %w", &hsm.Error{Call: "C_Login", RV: 0xA0}))[1:]))
	f.Add(worker.Frame(worker.KindReady, 0, []byte{0, 0, 0, 1}))
	f.Fuzz(func(t *testing.T, b []byte) {
		whole := map[uint64]bool{}
		for r := bytes.NewReader(b); ; {
			_, id, _, err := worker.ReadFrame(r, 16<<20)
			if err != nil {
				break
			}
			whole[id] = true
		}
		for i, answered := range worker.ReadAnswers(b, 4) {
			if answered && !whole[uint64(i+1)] {
				t.Fatalf("call %d has an answer that nobody sent", i+1)
			}
		}
	})
}

// softHSMConfig makes a SoftHSM2 token, in a process of its own as ours must not load the module, and answers a
// configuration for it.
func softHSMConfig(t testing.TB) worker.Config {
	t.Helper()
	soft := hsmtest.NewSoftHSM2(t, "staff")
	cfg := config(t, t.TempDir(), soft.PIN)
	cfg.Env = soft.Env
	cfg.Params = worker.StartParams{Module: hsmtest.SoftHSMModule, TokenLabel: soft.Label, PIN: []byte(soft.PIN), Profile: "softhsm2", MaxSessions: 8}
	return cfg
}

// TestSoftHSM2: the real thing, killed while it signs.
func TestSoftHSM2(t *testing.T) {
	t.Parallel()
	cfg := softHSMConfig(t)
	c := start(t, cfg)
	info, err := c.GenerateKey(t.Context(), hsm.KeySpec{Label: "k", Algorithm: hsm.RSA2048})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.GenerateKey(t.Context(), hsm.KeySpec{Label: "k", Algorithm: hsm.RSA2048}); !errors.Is(err, hsm.ErrKeyExists) {
		t.Errorf("second key: %v", err)
	}
	pub := info.Public.(*rsa.PublicKey)
	stop := make(chan struct{})
	var signed atomic.Int64
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-stop:
					return
				default:
				}
				sum := sha256.Sum256(fmt.Appendf(nil, "%d %d", i, n))
				sig, err := c.Do(t.Context(), "k", hsm.SignRSASHA256, sum[:])
				if err != nil {
					if !errors.Is(err, hsm.ErrUnavailable) {
						t.Errorf("Do: %v", err)
						return
					}
					continue
				}
				if err := rsa.VerifyPKCS1v15(pub, crypto.SHA256, sum[:], sig); err != nil {
					t.Errorf("crypto/rsa: %v", err)
				}
				signed.Add(1)
			}
		})
	}
	end := time.Now().Add(4 * time.Minute)
	for range 3 {
		was := signed.Load()
		for signed.Load() < was+50 {
			if time.Now().After(end) {
				t.Fatal("service does not return")
			}
			time.Sleep(time.Millisecond)
		}
		if pid := c.State().PID; pid != 0 {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}
	was := signed.Load()
	for signed.Load() < was+50 && time.Now().Before(end) {
		time.Sleep(time.Millisecond)
	}
	close(stop)
	wg.Wait()
	if s := c.State(); s.Restarts == 0 {
		t.Error("no worker was killed")
	}

	wrong := cfg
	wrong.Params.PIN = []byte("000000")
	if _, err := worker.Start(wrong); !errors.Is(err, hsm.ErrNeedsOperator) {
		t.Errorf("wrong PIN: %v", err)
	}
}

// BenchmarkDo compares C_SignInit and C_Sign through miekg/pkcs11 in this process with Do through a worker, in one
// run: seven interleaved rounds of 400 calls over 8 goroutines each, medians, and the ratio with its spread.
func BenchmarkDo(b *testing.B) {
	cfg := softHSMConfig(b)
	c := start(b, cfg)
	if _, err := c.GenerateKey(b.Context(), hsm.KeySpec{Label: "k", Algorithm: hsm.RSA2048}); err != nil {
		b.Fatal(err)
	}
	sum := sha256.Sum256([]byte("x"))

	for _, e := range cfg.Env {
		if v, ok := strings.CutPrefix(e, "SOFTHSM2_CONF="); ok {
			b.Setenv("SOFTHSM2_CONF", v)
		}
	}
	raw := p11.New(hsmtest.SoftHSMModule)
	if raw == nil {
		b.Fatal("miekg/pkcs11 cannot load SoftHSM2")
	}
	if err := raw.Initialize(); err != nil {
		b.Fatal(err)
	}
	defer raw.Finalize()
	slots, err := raw.GetSlotList(true)
	if err != nil {
		b.Fatal(err)
	}
	sessions := make(chan p11.SessionHandle, 8)
	var key p11.ObjectHandle
	for i := range cap(sessions) {
		s, err := raw.OpenSession(slots[0], p11.CKF_SERIAL_SESSION)
		if err != nil {
			b.Fatal(err)
		}
		if i == 0 {
			if err := raw.Login(s, p11.CKU_USER, "123456"); err != nil {
				b.Fatal(err)
			}
			if err := raw.FindObjectsInit(s, []*p11.Attribute{p11.NewAttribute(p11.CKA_CLASS, uint(p11.CKO_PRIVATE_KEY))}); err != nil {
				b.Fatal(err)
			}
			found, _, err := raw.FindObjects(s, 1)
			if err != nil || len(found) != 1 {
				b.Fatal(found, err)
			}
			key = found[0]
			if err := raw.FindObjectsFinal(s); err != nil {
				b.Fatal(err)
			}
		}
		sessions <- s
	}
	input := append([]byte{0x30, 0x31, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01, 0x05, 0x00, 0x04, 0x20}, sum[:]...)
	mechanism := []*p11.Mechanism{p11.NewMechanism(p11.CKM_RSA_PKCS, nil)}
	ways := []struct {
		name string
		sign func() error
	}{
		{"raw", func() error {
			s := <-sessions
			defer func() { sessions <- s }()
			if err := raw.SignInit(s, mechanism, key); err != nil {
				return err
			}
			_, err := raw.Sign(s, input)
			return err
		}},
		{"worker", func() error {
			_, err := c.Do(b.Context(), "k", hsm.SignRSASHA256, sum[:])
			return err
		}},
		{"pipe", func() error { // a call that costs the token next to nothing
			_, err := c.Random(b.Context(), 32)
			return err
		}},
	}
	const rounds = 7
	var took [3][rounds]float64 // ns a call
	for b.Loop() {
		for r := range rounds {
			for w, way := range ways {
				begin := time.Now()
				var wg sync.WaitGroup
				for range 8 {
					wg.Go(func() {
						for range 50 {
							if err := way.sign(); err != nil {
								b.Error(err)
								return
							}
						}
					})
				}
				wg.Wait()
				took[w][r] = float64(time.Since(begin).Nanoseconds()) / (8 * 50)
			}
		}
	}
	ratios := make([]float64, rounds)
	for r := range ratios {
		ratios[r] = took[1][r] / took[0][r]
	}
	slices.Sort(ratios)
	for w, way := range ways {
		slices.Sort(took[w][:])
		b.ReportMetric(took[w][rounds/2], way.name+"-ns/call")
	}
	b.ReportMetric(ratios[rounds/2], "worker/raw")
	b.ReportMetric(ratios[0], "least")
	b.ReportMetric(ratios[rounds-1], "most")
}

// TestWrappedKeys: a wrapped key's blob crosses once, and once more when the child that had it has gone; another slot class
// does nothing with it.
func TestWrappedKeys(t *testing.T) {
	dir := t.TempDir()
	c := start(t, config(t, dir, "right"))
	ctx := t.Context()
	info, blob, err := c.GenerateWrapped(ctx, hsm.KeySpec{Label: "staff/1", ID: []byte{1}, Algorithm: hsm.SM2}, "kek/1")
	if err != nil || string(blob) != "blob under kek/1" || info.Label != "staff/1" || info.Public == nil || !info.Extractable {
		t.Fatalf("GenerateWrapped = %+v, %q, %v", info, blob, err)
	}
	key, err := hsm.NewWrappedKey("staff/1", hsm.SM2, info.Public, "kek/1", blob)
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		out, err := c.DoWrapped(ctx, key, hsm.SignSM2E, []byte("e"))
		if err != nil || string(out) != "staff/1|blob under kek/1|e" {
			t.Fatalf("DoWrapped = %q, %v", out, err)
		}
	}
	if asked, brought := traced(t, dir, "asked"), traced(t, dir, "brought"); asked != 0 || brought != 1 {
		t.Errorf("asked %d times for a blob that was brought %d times, want once, unasked", asked, brought)
	}
	if _, err := c.DoWrapped(ctx, key, "sm2-e", []byte("forget")); err != nil || traced(t, dir, "asked") != 1 || traced(t, dir, "brought") != 2 {
		t.Errorf("evicted by the child: %v, asked %d, brought %d", err, traced(t, dir, "asked"), traced(t, dir, "brought"))
	}
	if _, err := c.DoWrapped(ctx, hsm.WrappedRef([32]byte{1}, "x"), hsm.SignSM2E, []byte("e")); !errors.Is(err, hsm.ErrNotCached) {
		t.Errorf("an unknown digest: %v", err)
	}
	if err := c.ForgetWrapped(ctx, key.Digest()); err != nil {
		t.Error(err)
	}
	if _, err := c.DoWrapped(ctx, key, hsm.SignSM2E, []byte("e")); err != nil || traced(t, dir, "brought") != 3 {
		t.Errorf("after it was forgotten: %v, brought %d times", err, traced(t, dir, "brought"))
	}
	// The child dies with it.
	if _, err := c.DoWrapped(ctx, key, hsm.SignSM2E, nil); err != nil {
		t.Errorf("while the child died: %v", err)
	}
	if n := traced(t, dir, "brought"); n != 4 {
		t.Errorf("brought %d times, want once more to the next child", n)
	}
	if _, err := c.DoWrapped(ctx, key, hsm.MACSM3, []byte("e")); hsm.ClassifyError(err) != hsm.ClassPermanent {
		t.Errorf("another class's operation: %v", err)
	}
}

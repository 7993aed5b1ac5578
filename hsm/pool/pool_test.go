package pool_test

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"math/big"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/sm3"
	"github.com/sirupsen/logrus"

	"yinjian/hsm"
	"yinjian/hsm/pool"
	"yinjian/hsm/worker"
)

func quiet() logrus.FieldLogger {
	log := logrus.New()
	log.SetOutput(io.Discard)
	return log
}

// A fake is a machine in memory. fail decides, before each call that reaches it.
type fake struct {
	name string
	fail func(ctx context.Context, call, label string) error

	mu    sync.Mutex // guards what follows
	keys  map[string]*sm2.PrivateKey
	macs  map[string][]byte
	calls map[string]int // by "call label"
	phase worker.Phase
}

func newFake(name string) *fake {
	return &fake{name: name, keys: map[string]*sm2.PrivateKey{}, macs: map[string][]byte{}, calls: map[string]int{}, phase: worker.Ready}
}

func (f *fake) called(ctx context.Context, call, label string) error {
	f.mu.Lock()
	f.calls[call+" "+label]++
	fail := f.fail
	f.mu.Unlock()
	if fail != nil {
		return fail(ctx, call, label)
	}
	return nil
}

func (f *fake) count(call string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls[call]
}

func (f *fake) failing(fail func(ctx context.Context, call, label string) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fail = fail
}

func (f *fake) State() worker.State {
	f.mu.Lock()
	defer f.mu.Unlock()
	return worker.State{Phase: f.phase, Sessions: 4}
}

func (f *fake) Close() error { return nil }

func (f *fake) Info(ctx context.Context) (hsm.TokenInfo, error) {
	return hsm.TokenInfo{Label: f.name}, f.called(ctx, "Info", "")
}

func (f *fake) Random(ctx context.Context, n int) ([]byte, error) {
	return make([]byte, n), f.called(ctx, "Random", "")
}

func (f *fake) GenerateKey(ctx context.Context, spec hsm.KeySpec) (hsm.KeyInfo, error) {
	if err := f.called(ctx, "GenerateKey", spec.Label); err != nil {
		return hsm.KeyInfo{}, err
	}
	f.mu.Lock()
	if spec.Algorithm == hsm.HMACSM3 {
		f.macs[spec.Label] = make([]byte, 32)
		rand.Read(f.macs[spec.Label])
	} else {
		f.keys[spec.Label], _ = sm2.GenerateKey(rand.Reader)
	}
	f.mu.Unlock()
	return f.FindKey(ctx, spec.Label)
}

func (f *fake) FindKey(ctx context.Context, label string) (hsm.KeyInfo, error) {
	if err := f.called(ctx, "FindKey", label); err != nil {
		return hsm.KeyInfo{}, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if k := f.keys[label]; k != nil {
		return hsm.KeyInfo{Label: label, Algorithm: hsm.SM2, Public: &k.PublicKey}, nil
	}
	if f.macs[label] != nil {
		return hsm.KeyInfo{Label: label, Algorithm: hsm.HMACSM3}, nil
	}
	return hsm.KeyInfo{}, hsm.ErrKeyNotFound
}

func (f *fake) Keys(ctx context.Context) ([]hsm.KeyInfo, error) {
	if err := f.called(ctx, "Keys", ""); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []hsm.KeyInfo
	for label, k := range f.keys {
		out = append(out, hsm.KeyInfo{Label: label, Algorithm: hsm.SM2, Public: &k.PublicKey})
	}
	for label := range f.macs {
		out = append(out, hsm.KeyInfo{Label: label, Algorithm: hsm.HMACSM3})
	}
	return out, nil
}

func (f *fake) DestroyKey(ctx context.Context, label string) error {
	err := f.called(ctx, "DestroyKey", label)
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.keys, label)
	return err
}

// A wrapped key's private half is found under its label here, and its wrapping key among the MAC keys.
func (f *fake) GenerateWrapped(ctx context.Context, spec hsm.KeySpec, kek string) (hsm.KeyInfo, []byte, error) {
	if err := f.called(ctx, "GenerateWrapped", spec.Label); err != nil {
		return hsm.KeyInfo{}, nil, err
	}
	if f.macs[kek] == nil {
		return hsm.KeyInfo{}, nil, hsm.ErrNoWrapping
	}
	k, _ := sm2.GenerateKey(rand.Reader)
	return hsm.KeyInfo{Label: spec.Label, Algorithm: hsm.SM2, Public: &k.PublicKey}, k.D.Bytes(), nil
}

func (f *fake) DoWrapped(ctx context.Context, key *hsm.WrappedKey, op hsm.Operation, data []byte) ([]byte, error) {
	if err := f.called(ctx, "DoWrapped", key.Label); err != nil {
		return nil, err
	}
	if f.macs[key.KEK] == nil {
		return nil, hsm.ErrKeyNotFound
	}
	k, err := sm2.NewPrivateKeyFromInt(new(big.Int).SetBytes(key.Blob))
	if err != nil {
		return nil, err
	}
	return sm2.SignASN1(rand.Reader, k, data, nil)
}

func (f *fake) ForgetWrapped(ctx context.Context, digest [32]byte) error {
	return f.called(ctx, "ForgetWrapped", "")
}

func (f *fake) Do(ctx context.Context, label string, op hsm.Operation, data []byte) ([]byte, error) {
	if err := f.called(ctx, "Do", label); err != nil {
		return nil, err
	}
	f.mu.Lock()
	key, mac := f.keys[label], f.macs[label]
	f.mu.Unlock()
	switch {
	case key != nil:
		return sm2.SignASN1(rand.Reader, key, data, nil)
	case mac != nil:
		h := hmac.New(sm3.New, mac)
		h.Write(data)
		return h.Sum(nil), nil
	}
	return nil, hsm.ErrKeyNotFound
}

// newPool makes a pool of the machines, each taken in.
func newPool(t *testing.T, class hsm.SlotClass, machines ...*fake) *pool.Pool {
	t.Helper()
	p := pool.New(pool.Config{Class: class, CallDeadline: time.Second, Interval: 10 * time.Millisecond, Probe: 50 * time.Millisecond, Log: quiet()})
	for _, f := range machines {
		if err := p.Add(t.Context(), pool.Machine{Name: f.name, Token: f, Weight: 1, Sessions: 4}); err != nil {
			t.Fatal(err)
		}
	}
	return p
}

// run looks after the pool until the test ends.
func run(t *testing.T, p *pool.Pool) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- p.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

func eventually(t *testing.T, within time.Duration, what string, yes func() bool) {
	t.Helper()
	within = max(within, 2*time.Minute) // a busy machine's
	for begun := time.Now(); !yes(); time.Sleep(5 * time.Millisecond) {
		if time.Since(begun) > within {
			t.Fatalf("not within %v: %s", within, what)
		}
	}
}

func stateOf(p *pool.Pool, name string) pool.State {
	for _, s := range p.States() {
		if s.Machine == name {
			return s
		}
	}
	return pool.State{}
}

var digest = make([]byte, 32)

// replicas are machines that hold the same key under "shared".
func replicas(names ...string) []*fake {
	key, _ := sm2.GenerateKey(rand.Reader)
	var out []*fake
	for _, n := range names {
		f := newFake(n)
		f.keys["shared"] = key
		out = append(out, f)
	}
	return out
}

// What one machine answers decides whether another is asked: once, never for what the caller did wrong, never for a key
// that is made.
func TestSecondTry(t *testing.T) {
	t.Parallel()
	rv := func(rv uint) error { return &hsm.Error{Call: "C_Sign", RV: rv} }
	for name, tt := range map[string]struct {
		err   error
		tries int // of both machines together; every try fails
	}{
		"deadline":        {hsm.ErrDeadline, 2},
		"unavailable":     {hsm.ErrUnavailable, 2},
		"PIN refused":     {rv(0xA0), 2},
		"device error":    {rv(0x30), 2},
		"vendor's number": {rv(0x80000042), 2},
		"no sessions":     {rv(0xB1), 2},
		"lost key":        {hsm.ErrKeyNotFound, 2},
		"wrong arguments": {rv(0x07), 1},
		"not permitted":   {rv(0x68), 1},
		"something else":  {errors.New("frame too long"), 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ms := replicas("a", "b")
			p := newPool(t, hsm.Staff, ms...)
			for _, f := range ms {
				f.failing(func(_ context.Context, call, _ string) error {
					if call == "Do" {
						return tt.err
					}
					return nil
				})
			}
			_, err := p.Do(t.Context(), "shared", hsm.SignSM2E, digest)
			if !errors.Is(err, tt.err) {
				t.Errorf("err = %v, want %v", err, tt.err)
			}
			if got := ms[0].count("Do shared") + ms[1].count("Do shared"); got != tt.tries {
				t.Errorf("%d tries, want %d", got, tt.tries)
			}
		})
	}
	a, b := newFake("a"), newFake("b")
	p := newPool(t, hsm.Staff, a, b)
	for _, f := range []*fake{a, b} {
		f.failing(func(_ context.Context, call, _ string) error {
			if call == "GenerateKey" {
				return hsm.ErrUnavailable
			}
			return nil
		})
	}
	if _, err := p.GenerateKey(t.Context(), hsm.KeySpec{Label: "new", Algorithm: hsm.SM2}); !errors.Is(err, hsm.ErrUnavailable) {
		t.Error(err)
	}
	if n := a.count("GenerateKey new") + b.count("GenerateKey new"); n != 1 {
		t.Errorf("GenerateKey was called %d times", n)
	}
}

// A machine that hangs costs one wait of half the deadline; then its breaker is open and nobody is sent there, until a
// signature of its own key has come back.
func TestBreaker(t *testing.T) {
	t.Parallel()
	ms := replicas("a", "b")
	p := newPool(t, hsm.Staff, ms...)
	run(t, p)
	hangs := func(ctx context.Context, call, _ string) error {
		if call == "Do" {
			<-ctx.Done()
			return fmt.Errorf("waiting for the token: %w", context.Cause(ctx))
		}
		return nil
	}
	ms[1].failing(hangs)
	eventually(t, 10*time.Second, "b is down", func() bool {
		if _, err := p.Do(t.Context(), "shared", hsm.SignSM2E, digest); err != nil {
			t.Fatal(err)
		}
		return stateOf(p, "b").Phase == pool.Down
	})
	if s := stateOf(p, "b"); s.Reason == "" || s.Failed == 0 {
		t.Errorf("state %+v", s)
	}
	before := ms[1].count("Do shared")
	for range 50 {
		if _, err := p.Do(t.Context(), "shared", hsm.SignSM2E, digest); err != nil {
			t.Fatal(err)
		}
	}
	if n := ms[1].count("Do shared") - before; n != 0 {
		t.Errorf("%d operations were sent to a machine whose breaker is open", n)
	}
	ms[1].failing(nil)
	eventually(t, 10*time.Second, "b is up", func() bool { return stateOf(p, "b").Phase == pool.Up })
	ms[0].failing(hangs) // one caller alone would go on with a for as long as b is remembered as slow
	eventually(t, 10*time.Second, "b works", func() bool {
		if _, err := p.Do(t.Context(), "shared", hsm.SignSM2E, digest); err != nil {
			t.Fatal(err)
		}
		return ms[1].count("Do shared") > before
	})
}

// A machine whose health signature does not verify gets no more work, though it answers.
func TestWrongSignatures(t *testing.T) {
	t.Parallel()
	ms := replicas("a", "b")
	p := newPool(t, hsm.Staff, ms...)
	ms[1].mu.Lock()
	other, _ := sm2.GenerateKey(rand.Reader)
	for label := range ms[1].keys {
		if hsm.IsHealth(label) {
			ms[1].keys[label] = other // the machine was exchanged for another
		}
	}
	ms[1].mu.Unlock()
	run(t, p)
	eventually(t, 10*time.Second, "b is down", func() bool { return stateOf(p, "b").Phase == pool.Down })
}

// A machine that signs wrongly costs its callers nothing: another makes the signature, and it gets no more work. What it
// made is accounted for.
func TestWrongSignaturesUnderWay(t *testing.T) {
	t.Parallel()
	ms := replicas("a", "b")
	var discarded atomic.Int64
	p := pool.New(pool.Config{
		Class: hsm.Staff, CallDeadline: 10 * time.Second, Interval: time.Hour, Log: quiet(),
		Discarded: func(answer []byte, reason error) {
			if len(answer) == 0 || !errors.Is(reason, hsm.ErrBadSignature) {
				t.Errorf("discarded %x: %v", answer, reason)
			}
			discarded.Add(1)
		},
	})
	for _, f := range ms {
		if err := p.Add(t.Context(), pool.Machine{Name: f.name, Token: f, Weight: 1, Sessions: 4}); err != nil {
			t.Fatal(err)
		}
	}
	key, err := hsm.NewKey(t.Context(), p, "shared", true)
	if err != nil {
		t.Fatal(err)
	}
	other, _ := sm2.GenerateKey(rand.Reader)
	ms[1].mu.Lock()
	ms[1].keys["shared"] = other
	ms[1].mu.Unlock()
	before := ms[1].count("Do shared")
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			for range 50 {
				if _, err := key.SignDigest(t.Context(), digest); err != nil {
					t.Errorf("SignDigest = %v", err)
				}
			}
		})
	}
	wg.Wait()
	wrong := int64(ms[1].count("Do shared") - before)
	if s := stateOf(p, "b"); s.Phase != pool.Down || s.Failed != wrong {
		t.Errorf("b is %s with %d failures, after %d wrong signatures", s.Phase, s.Failed, wrong)
	}
	if wrong == 0 || wrong > 16 || discarded.Load() != wrong {
		t.Errorf("%d wrong signatures, %d discarded", wrong, discarded.Load())
	}

	// With one machine alone nobody else can make it: it is refused, and accounted for too.
	if _, err := p.Remove(t.Context(), "b"); err != nil {
		t.Fatal(err)
	}
	ms[0].mu.Lock()
	ms[0].keys["shared"] = other
	ms[0].mu.Unlock()
	if sig, err := key.SignDigest(t.Context(), digest); !errors.Is(err, hsm.ErrBadSignature) || sig != nil || discarded.Load() != wrong+1 {
		t.Errorf("SignDigest = %x, %v; %d discarded", sig, err, discarded.Load()-wrong)
	}
}

// A label means one key. A machine with another under it is refused, for key pairs and for MAC keys; with the same it is
// a replica.
func TestContradiction(t *testing.T) {
	t.Parallel()
	a := newFake("a")
	a.keys["pair"], _ = sm2.GenerateKey(rand.Reader)
	a.macs["mac"] = []byte("0123456789abcdef0123456789abcdef")
	for name, tt := range map[string]struct {
		change func(*fake)
		label  string
	}{
		"replica":     {func(f *fake) { f.keys["pair"], f.macs["mac"] = a.keys["pair"], a.macs["mac"] }, ""},
		"other pair":  {func(f *fake) { f.keys["pair"], _ = sm2.GenerateKey(rand.Reader) }, "pair"},
		"other MAC":   {func(f *fake) { f.macs["mac"] = []byte("another key") }, "mac"},
		"other kind":  {func(f *fake) { f.macs["pair"] = []byte("another kind") }, "pair"},
		"nothing yet": {func(f *fake) {}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPool(t, hsm.Log, a)
			b := newFake("b")
			tt.change(b)
			err := p.Add(t.Context(), pool.Machine{Name: "b", Token: b, Weight: 1})
			var c *pool.Contradiction
			switch {
			case tt.label == "" && err != nil:
				t.Errorf("Add = %v", err)
			case tt.label != "" && (!errors.As(err, &c) || c.Label != tt.label || stateOf(p, "b").Phase != pool.Refused):
				t.Errorf("Add = %v, state %+v", err, stateOf(p, "b"))
			}
			for range 20 {
				if _, err := p.Do(t.Context(), "mac", hsm.MACSM3, digest); err != nil {
					t.Error(err)
				}
			}
			if n := b.count("Do mac"); tt.label != "" && n > 1 || name == "replica" && n < 5 {
				t.Errorf("%d MACs of the new machine", n)
			}
		})
	}
}

// Draining ends new work; what is only there can be told before; Remove gives the token back, and the first machine
// goes on as if it had always been alone, its keys read again when there is another.
func TestDrainAndRemove(t *testing.T) {
	t.Parallel()
	ms := replicas("a", "b")
	p := newPool(t, hsm.Staff, ms...)
	ms[0].failing(func(_ context.Context, call, _ string) error {
		if call == "GenerateKey" {
			t.Error("the first machine has as many keys")
		}
		return nil
	})
	ms[0].mu.Lock()
	ms[0].keys["more"], _ = sm2.GenerateKey(rand.Reader)
	ms[0].mu.Unlock()
	if _, err := p.Do(t.Context(), "more", hsm.SignSM2E, digest); err != nil {
		t.Errorf("a key that was made past the pool: %v", err)
	}
	if _, err := p.GenerateKey(t.Context(), hsm.KeySpec{Label: "new", Algorithm: hsm.SM2}); err != nil {
		t.Fatal(err)
	}
	if _, err := p.GenerateKey(t.Context(), hsm.KeySpec{Label: "new", Algorithm: hsm.SM2}); !errors.Is(err, hsm.ErrKeyExists) {
		t.Errorf("the same label again: %v", err)
	}
	keys, err := p.Keys(t.Context())
	if err != nil || len(keys) != 3 {
		t.Errorf("keys %+v, %v", keys, err)
	}
	if only := p.Only("b"); !slices.Equal(only, []string{"new"}) {
		t.Errorf("only on b: %v", only)
	}
	if err := p.Drain("b"); err != nil {
		t.Fatal(err)
	}
	before := ms[1].count("Do shared")
	for range 20 {
		if _, err := p.Do(t.Context(), "shared", hsm.SignSM2E, digest); err != nil {
			t.Fatal(err)
		}
	}
	if n := ms[1].count("Do shared") - before; n != 0 || stateOf(p, "b").Phase != pool.Draining {
		t.Errorf("%d operations while draining, state %+v", n, stateOf(p, "b"))
	}
	if _, err := p.Do(t.Context(), "new", hsm.SignSM2E, digest); !errors.Is(err, hsm.ErrUnavailable) {
		t.Errorf("a key that is only on the draining machine: %v", err)
	}
	if err := p.Resume("b"); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Do(t.Context(), "new", hsm.SignSM2E, digest); err != nil {
		t.Error(err)
	}
	if _, err := p.Remove(t.Context(), "a"); err == nil {
		t.Error("the first machine was removed")
	}
	if token, err := p.Remove(t.Context(), "b"); err != nil || token != pool.Token(ms[1]) || len(p.States()) != 1 {
		t.Errorf("Remove = %v, %v; %+v", token, err, p.States())
	}
	ms[0].failing(nil)
	if _, err := p.GenerateKey(t.Context(), hsm.KeySpec{Label: "alone", Algorithm: hsm.SM2}); err != nil {
		t.Fatal(err)
	}
	if err := p.Add(t.Context(), pool.Machine{Name: "b", Token: ms[1], Weight: 1}); err != nil {
		t.Fatal(err)
	}
	if only := p.Only("a"); !slices.Equal(only, []string{"alone", "more"}) {
		t.Errorf("only on a: %v", only)
	}
}

// A machine that is taken in to rest gets no key and no signature to make before it is told to work.
func TestAddedToRest(t *testing.T) {
	t.Parallel()
	ms := replicas("a", "b")
	p := newPool(t, hsm.Staff, ms[0])
	if err := p.Add(t.Context(), pool.Machine{Name: "b", Token: ms[1], Weight: 1, Sessions: 4, Draining: true}); err != nil {
		t.Fatal(err)
	}
	some := func(n int) {
		t.Helper()
		for i := range 4 {
			if _, err := p.GenerateKey(t.Context(), hsm.KeySpec{Label: fmt.Sprint(n, i), Algorithm: hsm.SM2}); err != nil {
				t.Fatal(err)
			}
			if _, err := p.Do(t.Context(), "shared", hsm.SignSM2E, digest); err != nil {
				t.Fatal(err)
			}
		}
	}
	some(1)
	if n := p.Only("b"); len(n) > 0 || ms[1].count("Do shared") > 0 || stateOf(p, "b").Phase != pool.Draining {
		t.Errorf("it made the keys %v, state %+v", n, stateOf(p, "b"))
	}
	if err := p.Resume("b"); err != nil {
		t.Fatal(err)
	}
	some(2)
	if n := p.Only("b"); len(n) == 0 {
		t.Error("it makes no keys")
	}
}

// Who is left alone works, whatever was held against it while there were others, also for what was begun then.
func TestLeftAlone(t *testing.T) {
	t.Parallel()
	ms := replicas("a", "b")
	p := newPool(t, hsm.Staff, ms...)
	run(t, p)
	ms[0].failing(func(_ context.Context, call, _ string) error {
		if call == "Do" {
			return hsm.ErrUnavailable
		}
		return nil
	})
	eventually(t, 10*time.Second, "a is down", func() bool { return stateOf(p, "a").Phase == pool.Down })
	// An operation is on its way to b when b is taken away, and fails there.
	began, gone := make(chan struct{}), make(chan struct{})
	ms[1].failing(func(_ context.Context, call, label string) error {
		if call == "Do" && label == "shared" {
			close(began)
			<-gone
			return hsm.ErrUnavailable
		}
		return nil
	})
	ended := make(chan error, 1)
	go func() {
		_, err := p.Do(context.Background(), "shared", hsm.SignSM2E, digest)
		ended <- err
	}()
	<-began
	ms[0].failing(nil)
	now, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := p.Remove(now, "b"); err != nil {
		t.Fatal(err)
	}
	close(gone)
	if err := <-ended; err != nil {
		t.Errorf("an operation that was begun before: %v", err)
	}
	if s := stateOf(p, "a"); s.Phase != pool.Up {
		t.Errorf("left alone: %+v", s)
	}
}

// Destroying takes a key from every machine, or from none while one of them is away.
func TestDestroyKey(t *testing.T) {
	t.Parallel()
	ms := replicas("a", "b")
	p := newPool(t, hsm.Staff, ms...)
	ms[1].mu.Lock()
	ms[1].phase = worker.Restarting
	ms[1].mu.Unlock()
	if err := p.DestroyKey(t.Context(), "shared"); !errors.Is(err, hsm.ErrUnavailable) || ms[0].keys["shared"] == nil {
		t.Errorf("while b is away: %v", err)
	}
	ms[1].mu.Lock()
	ms[1].phase = worker.Ready
	ms[1].mu.Unlock()
	if err := p.DestroyKey(t.Context(), "shared"); err != nil || ms[0].keys["shared"] != nil || ms[1].keys["shared"] != nil {
		t.Errorf("DestroyKey = %v", err)
	}
	if _, err := p.FindKey(t.Context(), "shared"); !errors.Is(err, hsm.ErrKeyNotFound) {
		t.Error(err)
	}
}

// With one machine nothing is asked of it but what the caller asks, and its failures are the caller's.
func TestAlone(t *testing.T) {
	t.Parallel()
	a := replicas("a")[0]
	p := newPool(t, hsm.Staff, a)
	run(t, p)
	if _, err := p.Do(t.Context(), "shared", hsm.SignSM2E, digest); err != nil {
		t.Fatal(err)
	}
	a.failing(func(context.Context, string, string) error { return hsm.ErrUnavailable })
	for range 5 {
		if _, err := p.Do(t.Context(), "shared", hsm.SignSM2E, digest); !errors.Is(err, hsm.ErrUnavailable) {
			t.Error(err)
		}
	}
	a.failing(nil)
	if _, err := p.Do(t.Context(), "shared", hsm.SignSM2E, digest); err != nil {
		t.Error(err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.calls) != 1 || a.calls["Do shared"] != 7 {
		t.Errorf("calls %v", a.calls)
	}
}

// The appliance's clock dates a change.
func TestSince(t *testing.T) {
	t.Parallel()
	ms := replicas("a", "b")
	at := time.Date(2026, 11, 18, 8, 0, 0, 0, time.UTC)
	p := pool.New(pool.Config{Class: hsm.Staff, Interval: 5 * time.Millisecond, Now: func() time.Time { return at }, Log: quiet()})
	for _, f := range ms {
		if err := p.Add(t.Context(), pool.Machine{Name: f.name, Token: f, Weight: 1}); err != nil {
			t.Fatal(err)
		}
	}
	run(t, p)
	ms[1].mu.Lock()
	ms[1].phase = worker.NeedsOperator
	ms[1].mu.Unlock()
	eventually(t, 10*time.Second, "an operator is asked for", func() bool { return stateOf(p, "b").Phase == pool.NeedsOperator })
	if s := stateOf(p, "b"); !s.Since.Equal(at) {
		t.Errorf("since %v, want %v", s.Since, at)
	}
}

// A wrapped key is used on any machine that has the wrapping key: on the same one while that is there, on another when
// it is not, and never on one that lacks the wrapping key, which is asked once.
func TestWrapped(t *testing.T) {
	t.Parallel()
	a, b, c := newFake("a"), newFake("b"), newFake("c")
	a.macs["kek"], b.macs["kek"] = []byte("kek"), []byte("kek")
	p := newPool(t, hsm.Staff, c, a, b)
	var keys []*hsm.WrappedKey
	for n := range 8 {
		label := fmt.Sprintf("staff/W%d", n)
		info, blob, err := p.GenerateWrapped(t.Context(), hsm.KeySpec{Label: label, Algorithm: hsm.SM2}, "kek")
		if err != nil {
			t.Fatal(err)
		}
		k, err := hsm.NewWrappedKey(label, hsm.SM2, info.Public, "kek", blob)
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, k)
	}
	use := func() {
		t.Helper()
		for _, k := range keys {
			key, err := hsm.KeyOfWrapped(p, k) // verifies
			if err != nil {
				t.Fatal(err)
			}
			if _, err := key.SignDigest(t.Context(), digest); err != nil {
				t.Error(err)
			}
		}
	}
	use()
	one, other := 0, 0
	for _, k := range keys {
		one += a.count("DoWrapped " + k.Label)
		other += b.count("DoWrapped " + k.Label)
	}
	if one+other != len(keys) || one == 0 || other == 0 {
		t.Errorf("%d and %d operations of %d keys", one, other, len(keys))
	}
	asked := 0
	for call, n := range c.calls {
		if call != "Keys " && !strings.Contains(call, "health/") {
			asked += n
		}
	}
	if asked > 1 {
		t.Errorf("a machine without the wrapping key was asked %d times: %v", asked, c.calls)
	}
	if err := p.Drain("a"); err != nil {
		t.Fatal(err)
	}
	use()
	if err := p.ForgetWrapped(t.Context(), keys[0].Digest()); err != nil || a.count("ForgetWrapped ") != 1 || b.count("ForgetWrapped ") != 1 {
		t.Errorf("ForgetWrapped = %v", err)
	}
	b.mu.Lock()
	b.phase = worker.Restarting
	b.mu.Unlock()
	if err := p.ForgetWrapped(t.Context(), keys[1].Digest()); !errors.Is(err, hsm.ErrUnavailable) || a.count("ForgetWrapped ") != 2 || b.count("ForgetWrapped ") != 1 {
		t.Errorf("ForgetWrapped while b is away = %v", err)
	}
	b.mu.Lock()
	b.phase = worker.Ready
	b.mu.Unlock()
	if _, _, err := p.GenerateWrapped(t.Context(), hsm.KeySpec{Label: "x", Algorithm: hsm.SM2}, "no such key"); !errors.Is(err, hsm.ErrNoWrapping) && !errors.Is(err, hsm.ErrUnavailable) {
		t.Error(err)
	}
}

// One slow answer does not make a slow machine: it would be idle until the mean has fallen again.
func TestOneSlowAnswer(t *testing.T) {
	t.Parallel()
	ms := replicas("a", "b")
	p := newPool(t, hsm.Staff, ms...)
	if err := p.Drain("a"); err != nil {
		t.Fatal(err)
	}
	for range 50 {
		if _, err := p.Do(t.Context(), "shared", hsm.SignSM2E, digest); err != nil {
			t.Fatal(err)
		}
	}
	before := stateOf(p, "b").Latency
	ms[1].failing(func(context.Context, string, string) error { time.Sleep(80 * time.Millisecond); return nil })
	if _, err := p.Do(t.Context(), "shared", hsm.SignSM2E, digest); err != nil {
		t.Fatal(err)
	}
	if after := stateOf(p, "b").Latency; after <= before || after > before+before/2 {
		t.Errorf("the mean went from %v to %v", before, after)
	}
}

// A label that several callers want at once becomes one key on one machine.
func TestOneKeyOfALabel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ms := replicas("a", "b")
		p := newPool(t, hsm.Staff, ms...)
		for _, m := range ms {
			m.failing(func(_ context.Context, call, _ string) error {
				if call == "GenerateKey" {
					time.Sleep(time.Second)
				}
				return nil
			})
		}
		var made, refused atomic.Int32
		var callers sync.WaitGroup
		for range 4 {
			callers.Go(func() {
				switch _, err := p.GenerateKey(t.Context(), hsm.KeySpec{Label: "wanted", Algorithm: hsm.SM2}); {
				case err == nil:
					made.Add(1)
				case errors.Is(err, hsm.ErrKeyExists):
					refused.Add(1)
				default:
					t.Error(err)
				}
			})
		}
		synctest.Wait() // one is at a machine, three wait
		hasty, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		if _, err := p.GenerateKey(hasty, hsm.KeySpec{Label: "wanted", Algorithm: hsm.SM2}); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a caller that does not wait: %v", err)
		}
		callers.Wait()
		if made.Load() != 1 || refused.Load() != 3 {
			t.Errorf("made %d times, refused %d times; want 1 and 3", made.Load(), refused.Load())
		}
	})
}

// Weights and speed decide how much of the work is a machine's. Time is simulated: nothing but the machines takes any.
func TestWeights(t *testing.T) {
	for _, row := range []struct {
		name    string
		weights [2]int
		slower  int // the second machine, so many times
		least   int // of 1000 signatures, the first machine's
		most    int
	}{
		{"equal", [2]int{1, 1}, 1, 450, 550},
		{"3 to 1", [2]int{3, 1}, 1, 700, 800},
		{"ten times as slow", [2]int{1, 1}, 10, 850, 970},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ms := replicas("a", "b")
				p := pool.New(pool.Config{Class: hsm.Staff, CallDeadline: time.Second, Log: quiet()})
				for i, m := range ms {
					takes := 3 * time.Millisecond
					if i == 1 {
						takes *= time.Duration(row.slower)
					}
					if err := p.Add(t.Context(), pool.Machine{Name: m.name, Token: m, Weight: row.weights[i], Sessions: 8}); err != nil {
						t.Fatal(err)
					}
					m.failing(func(context.Context, string, string) error { time.Sleep(takes); return nil })
				}
				var left atomic.Int64
				left.Store(1000)
				var signers sync.WaitGroup
				for range 8 {
					signers.Go(func() {
						for left.Add(-1) >= 0 {
							if _, err := p.Do(t.Context(), "shared", hsm.SignSM2E, digest); err != nil {
								t.Error(err)
							}
						}
					})
				}
				signers.Wait()
				if n := ms[0].count("Do shared"); n < row.least || n > row.most {
					t.Errorf("the first machine made %d of 1000 signatures, want %d to %d", n, row.least, row.most)
				}
			})
		})
	}
}

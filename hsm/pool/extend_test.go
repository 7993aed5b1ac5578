package pool_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"yinjian/hsm"
	"yinjian/hsm/pool"
)

// Extend answers with the request.
func (f *fake) Extend(ctx context.Context, request func() ([]byte, error)) ([]byte, error) {
	if err := f.called(ctx, "Extend", ""); err != nil {
		return nil, err
	}
	return request()
}

// onWorker has a pool's workers answer with their machine's name.
func onWorker(ctx context.Context, machine string, w pool.Extender) ([]byte, error) {
	return w.Extend(ctx, func() ([]byte, error) { return []byte(machine), nil })
}

// TestExtend: an extension is reached as an operation is, on machines that hold the key and fit. One that declines is asked
// for no signature because of that, and another is asked; a failure counts as any other does.
func TestExtend(t *testing.T) {
	t.Parallel()
	fakes := replicas("a", "b")
	for _, f := range fakes { // each worker's own key: another under the same label, and no contradiction
		if _, err := f.GenerateKey(t.Context(), hsm.KeySpec{Label: hsm.WorkerPrefix + "anchor", Algorithm: hsm.HMACSM3}); err != nil {
			t.Fatal(err)
		}
	}
	p := newPool(t, hsm.TSA, fakes...)
	if keys, err := p.Keys(t.Context()); err != nil || len(keys) != 1 || stateOf(p, "b").Phase != pool.Up {
		t.Fatalf("keys %+v, %v; machine b %+v", keys, err, stateOf(p, "b"))
	}
	seen := map[string]int{}
	eventually(t, 20*time.Second, "both machines are given work", func() bool {
		out, err := p.Extend(t.Context(), "shared", nil, onWorker)
		if err != nil {
			t.Fatal(err)
		}
		seen[string(out)]++
		return seen["a"] > 0 && seen["b"] > 0
	})
	for range 20 {
		if out, err := p.Extend(t.Context(), "shared", func(machine string) bool { return machine == "b" }, onWorker); err != nil || string(out) != "b" {
			t.Fatalf("only b fits: %s, %v", out, err)
		}
	}
	if _, err := p.Extend(t.Context(), "shared", func(string) bool { return false }, onWorker); !errors.Is(err, hsm.ErrDeclined) {
		t.Errorf("none fits: %v", err)
	}
	if _, err := p.Extend(t.Context(), "elsewhere", nil, onWorker); !errors.Is(err, hsm.ErrKeyNotFound) {
		t.Errorf("a key that nobody holds: %v", err)
	}
	fakes[0].failing(func(_ context.Context, call, _ string) error {
		if call == "Extend" {
			return hsm.ErrDeclined
		}
		return nil
	})
	asked := fakes[0].count("Extend ")
	eventually(t, 20*time.Second, "a is asked, and declines", func() bool {
		if out, err := p.Extend(t.Context(), "shared", nil, onWorker); err != nil || string(out) != "b" {
			t.Fatalf("a declines: %s, %v", out, err)
		}
		return fakes[0].count("Extend ") >= asked+5
	})
	if s := stateOf(p, "a"); s.Phase != pool.Up || s.Failed != 0 {
		t.Errorf("machine a after it declined: %+v", s)
	}
	fakes[0].failing(func(_ context.Context, call, _ string) error {
		if call == "Extend" {
			return hsm.ErrBadSignature
		}
		return nil
	})
	eventually(t, 20*time.Second, "a's wrong answer opens its breaker", func() bool {
		if out, err := p.Extend(t.Context(), "shared", nil, onWorker); err != nil || string(out) != "b" {
			t.Fatalf("a's answers are wrong: %s, %v", out, err)
		}
		s := stateOf(p, "a")
		return s.Phase == pool.Down && s.Failed > 0
	})

	// One machine is asked whatever fits says, for there is no other.
	alone := newPool(t, hsm.TSA, replicas("a")...)
	if out, err := alone.Extend(t.Context(), "shared", func(string) bool { return false }, onWorker); err != nil || string(out) != "a" {
		t.Errorf("alone: %s, %v", out, err)
	}
}

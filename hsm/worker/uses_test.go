package worker_test

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"yinjian/hsm"
	"yinjian/hsm/uselog"
	"yinjian/hsm/worker"
)

// usesOf reads what a slot was used for.
func usesOf(t *testing.T, dir string) (uses []uselog.Record) {
	t.Helper()
	r, err := uselog.OpenReader(dir, "log", nil)
	if err == nil {
		err = r.Next(func(rec uselog.Record) error {
			if rec.Kind == uselog.Use {
				uses = append(uses, rec)
			}
			return nil
		})
	}
	if err != nil {
		t.Fatal(err)
	}
	return uses
}

func countingConfig(t *testing.T) (worker.Config, string) {
	t.Helper()
	dir := t.TempDir()
	cfg := config(t, t.TempDir(), "right")
	cfg.Class = hsm.Log
	cfg.Params.Uses = worker.UseLog{Dir: dir, Life: [32]byte{7}}
	return cfg, dir
}

// Each signature has its record when it is answered; MACs have none.
func TestUsesAreRecorded(t *testing.T) {
	t.Parallel()
	cfg, dir := countingConfig(t)
	c := start(t, cfg)
	var want []uselog.Hash
	for i := range 5 {
		data := slices.Repeat([]byte{byte(i)}, 32)
		for _, op := range []hsm.Operation{hsm.SignSM2E, hsm.MACSM3} {
			answer, err := c.Do(t.Context(), "echo", op, data)
			if err != nil {
				t.Fatal(err)
			}
			if op != hsm.MACSM3 {
				want = append(want, uselog.Digest(op, answer))
			}
		}
		uses := usesOf(t, dir)
		if len(uses) != len(want) {
			t.Fatalf("%d uses after %d signatures", len(uses), len(want))
		}
	}
	for i, u := range usesOf(t, dir) {
		if u.Signature != want[i] || u.Label != "echo" || u.Counter != uint64(i+1) || u.Signed[0] != byte(i) {
			t.Errorf("use %d: %+v, want signature %x", i, u, want[i])
		}
	}
}

// A signature whose use cannot be written down does not leave the child.
func TestUseThatCannotBeRecorded(t *testing.T) {
	t.Parallel()
	cfg, dir := countingConfig(t)
	cfg.Command = []string{"sh", "-c", `ulimit -f 2; exec "$0" child`, cfg.Command[0]} // a file of 1 KiB and no more
	c := start(t, cfg)
	answered := 0
	var err error
	for err == nil && answered < 100 {
		if _, err = c.Do(t.Context(), "echo", hsm.SignSM2E, make([]byte, 32)); err == nil {
			answered++
		}
	}
	if !errors.Is(err, hsm.ErrUnavailable) {
		t.Fatalf("after %d signatures: %v, want ErrUnavailable", answered, err)
	}
	if n := len(usesOf(t, dir)); n != answered || n == 0 {
		t.Errorf("%d uses recorded, %d signatures answered", n, answered)
	}
	if _, err := c.Do(t.Context(), "echo", hsm.MACSM3, nil); err != nil {
		t.Errorf("a MAC, which is not counted: %v", err)
	}
}

// A signature that comes when its caller has gone is not lost sight of.
func TestAbandonedSignature(t *testing.T) {
	t.Parallel()
	cfg, dir := countingConfig(t)
	got := make(chan []byte, 1)
	cfg.Abandoned = func(answer []byte, reason error) {
		if !errors.Is(reason, context.Canceled) {
			t.Errorf("reason = %v", reason)
		}
		got <- slices.Clone(answer)
	}
	c := start(t, cfg)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		waitTrace(t, cfg.Params.ModuleArgs, "blocked", 1)
		cancel()
	}()
	if _, err := c.Do(ctx, "block", hsm.SignSM2E, []byte("m")); !errors.Is(err, context.Canceled) {
		t.Fatalf("Do = %v, want Canceled", err)
	}
	trace(cfg.Params.ModuleArgs, "go")
	select {
	case answer := <-got:
		if u := usesOf(t, dir); len(u) != 1 || u[0].Signature != uselog.Digest(hsm.SignSM2E, answer) {
			t.Errorf("uses %+v, want the one of %x", u, answer)
		}
	case <-time.After(2 * time.Minute):
		t.Fatal("nobody was told")
	}
}

package worker_test

import (
	"bytes"
	"context"
	"errors"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"yinjian/hsm"
	"yinjian/hsm/uselog"
	"yinjian/hsm/worker"
)

// A fakeExtension does what the request's first word says.
type fakeExtension struct {
	token hsm.Token
	told  string
	dir   string
}

func extendFake(_ context.Context, token hsm.Token, p worker.StartParams) (worker.Extension, error) {
	switch string(p.Extension) {
	case "":
		return nil, nil
	case "refuse":
		return nil, errors.New("no time source in the list")
	}
	if len(p.PIN) > 0 {
		return nil, errors.New("an extension has no business with the PIN")
	}
	return &fakeExtension{token: token, told: string(p.Extension), dir: p.ModuleArgs}, nil
}

func (f *fakeExtension) Close() { trace(f.dir, "closed") }

func (f *fakeExtension) Extend(ctx context.Context, request []byte) ([]byte, error) {
	word, rest, _ := strings.Cut(string(request), " ")
	switch word {
	case "told":
		return []byte(f.told), nil
	case "sign":
		return f.token.Do(ctx, rest, hsm.SignSM2E, make([]byte, 32))
	case "many":
		n, err := strconv.Atoi(rest)
		return make([]byte, n), err
	case "declined":
		return nil, hsm.ErrDeclined
	case "number", "block":
		if _, err := f.token.Do(ctx, map[string]string{"number": "crash once", "block": "block"}[word], hsm.SignSM2E, nil); err != nil {
			return nil, err
		}
		return []byte(rest), nil
	}
	return nil, errors.New("no such request")
}

func asking(words string) func() ([]byte, error) {
	return func() ([]byte, error) { return []byte(words), nil }
}

// TestExtension: what the child's extension signs is counted, with keys that a caller cannot use; its errors keep what they
// are; a request is made anew for a child that died with the first.
func TestExtension(t *testing.T) {
	t.Parallel()
	uses, dir := t.TempDir(), t.TempDir()
	cfg := config(t, dir, "right")
	cfg.Class, cfg.Params.Extension = hsm.TSA, []byte("two clocks")
	cfg.Params.Uses = worker.UseLog{Dir: uses, Slot: "log"}
	c := start(t, cfg)
	if got, err := c.Extend(t.Context(), asking("told")); err != nil || string(got) != "two clocks" {
		t.Errorf("told %q, %v", got, err)
	}
	signature, err := c.Extend(t.Context(), asking("sign echo"))
	if err != nil {
		t.Fatal(err)
	}
	if got := usesOf(t, uses); len(got) != 1 || got[0].Label != "echo" || got[0].Signature != uselog.Digest(hsm.SignSM2E, signature) {
		t.Errorf("uses %+v, want the one signature", got)
	}
	if _, err := c.Do(t.Context(), "echo", hsm.SignSM2E, make([]byte, 32)); err == nil {
		t.Error("a caller signs with the key that is the extension's alone")
	}
	if _, err := c.Extend(t.Context(), asking("declined")); !errors.Is(err, hsm.ErrDeclined) {
		t.Errorf("declined: %v", err)
	}
	if _, err := c.Extend(t.Context(), asking("many 200000")); err == nil {
		t.Error("an answer of 200,000 bytes was taken")
	}
	if _, err := c.Extend(t.Context(), asking(strings.Repeat("x", 200_000))); err == nil {
		t.Error("a request of 200,000 bytes was sent")
	}
	if _, err := c.Extend(t.Context(), func() ([]byte, error) { return nil, errors.New("no number is left") }); err == nil || !strings.Contains(err.Error(), "no number") {
		t.Errorf("a request that cannot be made: %v", err)
	}
	n := 0
	got, err := c.Extend(t.Context(), func() ([]byte, error) { n++; return []byte("number " + strconv.Itoa(n)), nil })
	if err != nil || n != 2 || string(got) != "2" {
		t.Errorf("over a child's death: %q after %d requests, %v; want the second's answer", got, n, err)
	}

	// A child that is replaced finishes what it has; whoever comes meanwhile gets the next one's answer.
	done := make(chan error, 1)
	go func() {
		_, err := c.Extend(t.Context(), asking("block first"))
		done <- err
	}()
	waitTrace(t, dir, "blocked", 1)
	soon, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := c.Replace(soon, []byte("three clocks")); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("replaced under a call: %v", err)
	}
	trace(dir, "go")
	if err := c.Replace(t.Context(), []byte("three clocks")); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Errorf("the call under way: %v", err)
	}
	if got, err := c.Extend(t.Context(), asking("told")); err != nil || string(got) != "three clocks" {
		t.Errorf("after the change told %q, %v", got, err)
	}
	c.Close()
	waitTrace(t, dir, "closed", 2)

	// Without an extension there is none, and a worker whose extension cannot be made is not ready.
	cfg = config(t, t.TempDir(), "right")
	if _, err := start(t, cfg).Extend(t.Context(), asking("told")); err == nil {
		t.Error("a worker without an extension extends")
	}
	cfg.Params.Extension = []byte("refuse")
	if s := start(t, cfg).State(); s.Phase == worker.Ready || s.LastError == nil || !strings.Contains(s.LastError.Error(), "no time source") {
		t.Errorf("a worker whose extension was refused: %+v", s)
	}
}

// TestAbandonedExtension: the caller has gone; what the extension made is told.
func TestAbandonedExtension(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	cfg := config(t, dir, "right")
	cfg.Class, cfg.Params.Extension = hsm.TSA, []byte("x")
	var mu sync.Mutex
	var left []byte
	told := make(chan struct{})
	cfg.AbandonedExtension = func(answer []byte, reason error) {
		mu.Lock()
		defer mu.Unlock()
		left = bytes.Clone(answer)
		if !errors.Is(reason, context.Canceled) {
			t.Errorf("reason %v", reason)
		}
		close(told)
	}
	c := start(t, cfg)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		waitTrace(t, dir, "blocked", 1)
		cancel()
	}()
	if _, err := c.Extend(ctx, asking("block token")); !errors.Is(err, context.Canceled) {
		t.Fatalf("Extend = %v", err)
	}
	trace(dir, "go")
	select {
	case <-told:
	case <-time.After(2 * time.Minute):
		t.Fatal("nobody was told")
	}
	mu.Lock()
	defer mu.Unlock()
	if string(left) != "token" {
		t.Errorf("told %q", left)
	}
}

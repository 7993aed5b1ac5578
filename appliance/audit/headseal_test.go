package audit_test

import (
	"context"
	"crypto/hmac"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/emmansun/gmsm/sm3"

	"yinjian/appliance/audit"
)

// A sealer is the cipher machine's MAC key, which can be away (fail) or hang, also against its context.
type sealer struct {
	mu    sync.Mutex
	away  bool
	hang  chan struct{} // calls wait until it is closed; nil: they do not
	calls int
}

func (s *sealer) MAC(_ context.Context, data []byte) ([]byte, error) {
	s.mu.Lock()
	s.calls++
	away, hang := s.away, s.hang
	s.mu.Unlock()
	if hang != nil {
		<-hang
	}
	if away {
		return nil, errors.New("the cipher machine is away")
	}
	m := hmac.New(sm3.New, []byte("head"))
	m.Write(data)
	return m.Sum(nil), nil
}

func (s *sealer) asked() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.calls
}

func (s *sealer) set(away bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.away = away
}

// running starts a journal over s; stop ends it as a clean stop does. Without stop its store is left as a kill would.
func running(t *testing.T, s audit.Store, seal audit.MAC) (j *audit.Journal, stop func()) {
	t.Helper()
	j = openMem(t, s, func(c *audit.Config) { c.Sealer = seal })
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- j.Run(ctx) }()
	var once sync.Once
	stop = func() {
		once.Do(func() {
			cancel()
			if err := <-done; err != nil {
				t.Errorf("Run = %v", err)
			}
		})
	}
	t.Cleanup(stop)
	return j, stop
}

func mustAppend(t *testing.T, j *audit.Journal, kind string, state bool) audit.Receipt {
	t.Helper()
	r, err := j.Append(t.Context(), audit.Draft{Kind: kind, Actor: "test", State: state})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// frozen is a copy of what a store holds now, as a power failure leaves it.
func (s *memStore) frozen() *memStore {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := newMemStore()
	c.rows = append(c.rows, s.rows...)
	for k, v := range s.nodes {
		c.nodes[k] = v
	}
	c.checkpoints = append(c.checkpoints, s.checkpoints...)
	c.seal = s.seal
	return c
}

func reopen(s audit.Store, seal audit.MAC, change func(*audit.Config)) (*audit.Journal, error) {
	cfg := audit.Config{
		Store: s, Node: "east", Clock: testClock, Log: quiet(), Sealer: seal,
		UnsealedOK: func(e *audit.Entry) bool { return e.Kind == "time.state" },
	}
	if change != nil {
		change(&cfg)
	}
	return audit.Open(context.Background(), cfg)
}

// await waits until everything is sealed.
func awaitSealed(t *testing.T, j *audit.Journal) {
	t.Helper()
	for limit := time.After(2 * time.Minute); j.SealedTo() != j.Size(); {
		select {
		case <-limit:
			t.Fatalf("%d of %d entries sealed", j.SealedTo(), j.Size())
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// A worker process that was killed is replaced within a moment: the batch waits for its seal that long.
func TestSealerBackAtOnce(t *testing.T) {
	t.Parallel()
	store, seal := newMemStore(), &sealer{}
	unsealed := 0
	store.onAppend = func(b audit.Batch) (bool, error) {
		if b.Seal == nil {
			unsealed++
		}
		return true, nil
	}
	j, stop := running(t, store, seal)
	mustAppend(t, j, "sign.v1", false)
	seal.set(true)
	go func() {
		for had := seal.asked(); seal.asked() < had+2; {
			time.Sleep(time.Millisecond)
		}
		seal.set(false)
	}()
	mustAppend(t, j, "sign.v1", false)
	stop()
	if unsealed > 0 {
		t.Errorf("%d batches were written without a seal", unsealed)
	}
}

func TestSealerAway(t *testing.T) {
	t.Parallel()
	store, seal := newMemStore(), &sealer{}
	j, stop := running(t, store, seal)
	mustAppend(t, j, "sign.v1", false)
	sealed := j.Size()
	if j.SealedTo() != sealed {
		t.Fatalf("%d of %d entries sealed", j.SealedTo(), sealed)
	}
	seal.set(true)
	mustAppend(t, j, "time.state", false) // asks again and again, for half a second
	before := seal.asked()
	mustAppend(t, j, "time.state", false)
	for range 50 {
		mustAppend(t, j, "time.state", false)
	}
	if n := seal.asked() - before; n > 3 {
		t.Errorf("a sealer that is away was asked %d times by 51 appends", n)
	}
	if got := j.SealedTo(); got != sealed {
		t.Errorf("sealed to %d, want %d", got, sealed)
	}
	onlyAllowed := store.frozen()
	mustAppend(t, j, "sign.v1", false)
	withSignature := store.frozen()
	mustAppend(t, j, "account.v1", true)
	withChange := store.frozen()

	// Power fails now.
	if _, err := reopen(onlyAllowed.frozen(), seal, nil); err == nil || errors.Is(err, audit.ErrUnsealed) {
		t.Errorf("while the sealer is away: Open = %v, want its error", err)
	}
	ok := &sealer{}
	if _, err := reopen(onlyAllowed.frozen(), ok, nil); err != nil {
		t.Errorf("after entries that are let through: %v", err)
	}
	for what, s := range map[string]*memStore{"nothing is let through": onlyAllowed, "a signature": withSignature, "a change of state": withChange} {
		change := func(c *audit.Config) {
			if what == "nothing is let through" {
				c.UnsealedOK = nil
			} else if what == "a change of state" {
				c.UnsealedOK = func(*audit.Entry) bool { return true }
			}
		}
		if _, err := reopen(s.frozen(), ok, change); !errors.Is(err, audit.ErrUnsealed) {
			t.Errorf("%s: Open = %v, want ErrUnsealed", what, err)
		}
		marked := s.frozen()
		j, err := reopen(marked, ok, func(c *audit.Config) { change(c); c.NewEpoch = true })
		if err != nil {
			t.Fatalf("%s, with the operator's marker: %v", what, err)
		}
		rec, err := j.Entry(t.Context(), j.Size()-1)
		if from, _ := rec.Entry.Field("journal.unsealed_from").(audit.Int); err != nil || uint64(from) != sealed {
			t.Errorf("%s: recorded as unsealed from %d, want %d: %v", what, from, sealed, err)
		}
		if _, err := reopen(marked, ok, nil); err != nil {
			t.Errorf("%s, the start after: %v", what, err)
		}
	}

	// It comes back: sealed without a further entry.
	seal.set(false)
	awaitSealed(t, j)
	if _, err := reopen(store.frozen(), ok, nil); err != nil {
		t.Errorf("sealed afterwards: %v", err)
	}
	// Away at the stop's last entry, back before its end.
	seal.set(true)
	mustAppend(t, j, "account.v1", true)
	seal.set(false)
	stop()
	if _, err := reopen(store, ok, nil); err != nil {
		t.Errorf("after a clean stop: %v", err)
	}
}

// A sealer that hangs, deaf to its context, delays one append by half a second and no other.
func TestSealerHangs(t *testing.T) {
	t.Parallel()
	store, seal := newMemStore(), &sealer{}
	j, _ := running(t, store, seal)
	mustAppend(t, j, "sign.v1", false)
	hang := make(chan struct{})
	seal.mu.Lock()
	seal.hang = hang
	seal.mu.Unlock()
	for i := range 20 {
		began := time.Now() // interval
		mustAppend(t, j, "sign.v1", false)
		limit := 250 * time.Millisecond
		if i == 0 {
			limit = 1500 * time.Millisecond // half a second and what a busy machine adds
		}
		if d := time.Since(began); d > limit {
			t.Errorf("append %d took %v", i, d)
		}
	}
	seal.mu.Lock()
	seal.hang = nil
	seal.mu.Unlock()
	close(hang)
	awaitSealed(t, j)
}

// A seal that comes late is not written over that of a batch that came in between.
func TestLateSealIsNotStored(t *testing.T) {
	t.Parallel()
	store, seal := newMemStore(), &sealer{}
	j, stop := running(t, store, seal)
	for i := range 30 {
		seal.set(i%3 == 0)
		mustAppend(t, j, "sign.v1", false)
		if i%7 == 0 {
			seal.set(false)
			awaitSealed(t, j)
		}
	}
	seal.set(false)
	awaitSealed(t, j)
	var g sync.WaitGroup
	for range 8 {
		g.Go(func() {
			for i := range 50 {
				if _, err := j.Append(context.Background(), audit.Draft{Kind: "sign.v1", Actor: "test"}); err != nil {
					t.Error(err)
				}
				seal.set(i%2 == 0)
			}
		})
	}
	g.Wait()
	seal.set(false)
	awaitSealed(t, j)
	stop()
	if _, err := reopen(store, &sealer{}, nil); err != nil {
		t.Error(err)
	}
}

// Each part of the input is told apart.
func TestHeadSealInput(t *testing.T) {
	t.Parallel()
	seen := map[string]bool{}
	add := func(b []byte) {
		if seen[string(b)] {
			t.Errorf("two heads have the same input %x", b)
		}
		seen[string(b)] = true
	}
	e1, e2, h1, h2 := audit.Epoch{1}, audit.Epoch{2}, audit.Hash{1}, audit.Hash{2}
	add(audit.HeadSealInput("east", e1, 7, 3, h1, h2))
	add(audit.HeadSealInput("eas", audit.Epoch{'t', 1}, 7, 3, h1, h2))
	add(audit.HeadSealInput("east", e2, 7, 3, h1, h2))
	add(audit.HeadSealInput("east", e1, 8, 3, h1, h2))
	add(audit.HeadSealInput("east", e1, 7, 4, h1, h2))
	add(audit.HeadSealInput("east", e1, 3, 7, h1, h2))
	add(audit.HeadSealInput("east", e1, 7, 3, h2, h2))
	add(audit.HeadSealInput("east", e1, 7, 3, h1, h1))
	want := "yinjian/journal/head/v1\x00" + "\x00\x00\x00\x04east" + "\x01\x00\x00\x00\x00\x00\x00\x00" + "\x00\x00\x00\x00\x00\x00\x00\x07" + "\x00\x00\x00\x00\x00\x00\x00\x03" + string(h1[:]) + string(h2[:])
	if got := string(audit.HeadSealInput("east", e1, 7, 3, h1, h2)); got != want {
		t.Errorf("input %q, want %q", fmt.Sprintf("%x", got), fmt.Sprintf("%x", want))
	}
}

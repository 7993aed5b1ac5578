package pool

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"yinjian/hsm"
)

// waitFor waits for a condition that only time brings about.
func waitFor(t *testing.T, what string, yes func() bool) {
	t.Helper()
	for begun := time.Now(); !yes(); runtime.Gosched() {
		if time.Since(begun) > 2*time.Minute {
			t.Fatalf("not within two minutes: %s", what)
		}
	}
}

// Applications take turns, however long one's line is; who goes away leaves no gap, and no place is lost.
func TestQueueTakesTurns(t *testing.T) {
	t.Parallel()
	var q queue
	q.resize(1)
	if err := q.enter(t.Context(), "greedy"); err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var order []string
	var wg sync.WaitGroup
	come := func(ctx context.Context, who string) {
		n := q.waiters.Load()
		wg.Go(func() {
			if q.enter(ctx, who) != nil {
				return
			}
			mu.Lock()
			order = append(order, who)
			mu.Unlock()
			q.leave()
		})
		waitFor(t, "one more waits", func() bool { return q.waiters.Load() == n+1 })
	}
	for range 10 {
		come(t.Context(), "greedy")
	}
	gone, leave := context.WithCancel(t.Context())
	come(gone, "gone")
	come(t.Context(), "a")
	come(t.Context(), "b")
	come(t.Context(), "a")
	leave()
	waitFor(t, "who gave up has left the line", func() bool { return q.waiters.Load() == 13 })
	q.leave()
	wg.Wait()
	want := []string{"greedy", "a", "b", "greedy", "a", "greedy"}
	if !slices.Equal(order[:6], want) || len(order) != 13 {
		t.Errorf("order %v, want %v and the rest", order, want)
	}
	if q.underWay() != 0 || q.waiters.Load() != 0 || q.done() != 14 || len(q.lines) != 0 {
		t.Errorf("%d under way, %d waiting, %d done, %d lines", q.underWay(), q.waiters.Load(), q.done(), len(q.lines))
	}
}

// Nobody is left waiting, and no more are under way than there are places, whatever the order of coming and going.
func TestQueueUnderLoad(t *testing.T) {
	t.Parallel()
	var q queue
	q.resize(3)
	var wg sync.WaitGroup
	const each, callers = 2000, 32
	for i := range callers {
		wg.Go(func() {
			for n := range each {
				ctx, cancel := context.WithCancel(t.Context())
				if n%7 == 0 {
					cancel()
				}
				if err := q.enter(ctx, fmt.Sprint(i%5)); err == nil {
					if u := q.underWay(); u > 3 {
						t.Errorf("%d under way", u)
					}
					if n%5 == 0 {
						runtime.Gosched()
					}
					q.leave()
				} else if n%7 != 0 {
					t.Errorf("enter = %v", err)
				}
				cancel()
			}
		})
	}
	wg.Wait()
	if q.underWay() != 0 || q.waiters.Load() != 0 {
		t.Errorf("%d under way, %d waiting at the end", q.underWay(), q.waiters.Load())
	}
}

// Over its operations a second an application is refused and told for how long; over its sessions it waits; a change of
// the quota counts at once.
func TestQuota(t *testing.T) {
	t.Parallel()
	q := quotas{of: map[string]*quota{}}
	caller := hsm.Caller{Application: "his", Rate: 2}
	for range 2 {
		if _, err := q.enter(t.Context(), caller); err != nil {
			t.Fatal(err)
		}
	}
	var over *hsm.QuotaError
	if _, err := q.enter(t.Context(), caller); !errors.As(err, &over) || over.After <= 0 || over.After > time.Second || over.Application != "his" {
		t.Errorf("over the quota: %v, %+v", err, over)
	}
	if _, err := q.enter(t.Context(), hsm.Caller{Application: "lis", Rate: 2}); err != nil {
		t.Errorf("another application: %v", err)
	}
	caller.Rate, caller.Sessions = 0, 1
	places, err := q.enter(t.Context(), caller)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("enough"))
	if _, err := q.enter(ctx, caller); err == nil || err.Error() != "waiting for one of the application's sessions: enough" {
		t.Errorf("over its sessions: %v", err)
	}
	<-places
	if _, err := q.enter(t.Context(), caller); err != nil {
		t.Error(err)
	}
}

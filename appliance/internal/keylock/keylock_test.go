package keylock_test

import (
	"context"
	"errors"
	"runtime"
	"sync"
	"testing"

	"yinjian/appliance/internal/keylock"
)

func lock(t testing.TB, k *keylock.Locks, key string) func() {
	t.Helper()
	unlock, err := k.Lock(context.Background(), key)
	if err != nil {
		t.Fatal(err)
	}
	return unlock
}

// waiting returns when n hold or wait for key.
func waiting(k *keylock.Locks, key string, n int) {
	for k.Users(key) != n {
		runtime.Gosched()
	}
}

func TestOneAtATime(t *testing.T) {
	t.Parallel()
	var k keylock.Locks
	var all sync.WaitGroup
	counts := map[string]*int{"a": new(int), "b": new(int)} // not atomic: the race detector and the sum watch them
	for range 50 {
		for key, n := range counts {
			all.Go(func() {
				defer lock(t, &k, key)()
				was := *n
				runtime.Gosched()
				*n = was + 1
			})
		}
	}
	all.Wait()
	for key, n := range counts {
		if *n != 50 {
			t.Errorf("%s: %d of 50 counted", key, *n)
		}
	}
	if n := k.Len(); n != 0 {
		t.Errorf("%d locks kept without users", n)
	}
}

func TestKeysDoNotWaitForOneAnother(t *testing.T) {
	t.Parallel()
	var k keylock.Locks
	defer lock(t, &k, "a")()
	lock(t, &k, "b")() // would never return
}

func TestWaiterGivesUp(t *testing.T) {
	t.Parallel()
	var k keylock.Locks
	unlock := lock(t, &k, "a")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() {
		_, err := k.Lock(ctx, "a")
		done <- err
	}()
	waiting(&k, "a", 2)
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("Lock = %v, want canceled", err)
	}
	if n := k.Users("a"); n != 1 {
		t.Errorf("%d users after one gave up, want the holder alone", n)
	}
	unlock()
	lock(t, &k, "a")() // free again
	if _, err := k.Lock(ctx, "a"); !errors.Is(err, context.Canceled) {
		t.Errorf("a free lock was given under a context that is over: %v", err)
	}
	if n := k.Len(); n != 0 {
		t.Errorf("%d locks kept without users", n)
	}
}

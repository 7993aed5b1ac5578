// Package keylock is a mutex for each key, kept only while somebody holds or waits for it.
package keylock

import (
	"context"
	"sync"
)

// Locks is ready for use. Safe for concurrent use.
type Locks struct {
	mu    sync.Mutex
	locks map[string]*lock // guarded by mu
}

type lock struct {
	held  chan struct{} // capacity 1: full while somebody holds the lock
	users int           // holders and waiters, guarded by Locks.mu
}

// Lock waits for key and answers what gives it back, to be called once. When ctx ends first
// it answers ctx's error and nothing is held.
func (k *Locks) Lock(ctx context.Context, key string) (unlock func(), err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	k.mu.Lock()
	if k.locks == nil {
		k.locks = map[string]*lock{}
	}
	l := k.locks[key]
	if l == nil {
		l = &lock{held: make(chan struct{}, 1)}
		k.locks[key] = l
	}
	l.users++
	k.mu.Unlock()
	leave := func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		if l.users--; l.users == 0 {
			delete(k.locks, key)
		}
	}
	select {
	case l.held <- struct{}{}:
		return func() { <-l.held; leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, ctx.Err()
	}
}

// Package keylock is a mutex for each key, kept only while somebody holds or waits for it.
package keylock

import "sync"

// Locks is ready for use. Safe for concurrent use.
type Locks struct {
	mu    sync.Mutex
	locks map[string]*lock // guarded by mu
}

type lock struct {
	sync.Mutex
	users int // holders and waiters, guarded by Locks.mu
}

// Lock waits for key and answers what gives it back.
func (k *Locks) Lock(key string) (unlock func()) {
	k.mu.Lock()
	if k.locks == nil {
		k.locks = map[string]*lock{}
	}
	l := k.locks[key]
	if l == nil {
		l = &lock{}
		k.locks[key] = l
	}
	l.users++
	k.mu.Unlock()
	l.Lock()
	return func() {
		l.Unlock()
		k.mu.Lock()
		if l.users--; l.users == 0 {
			delete(k.locks, key)
		}
		k.mu.Unlock()
	}
}

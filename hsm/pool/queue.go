package pool

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
)

// A queue stands in front of one machine. While the machine has a free session, a place costs an atomic operation to
// take and one to give back. When it has none, whoever comes waits in a line of his application, and the applications
// take turns: one that asks for more has a longer line and no more turns.
type queue struct {
	capacity atomic.Int64
	// state counts those under way in its low bits and those done above.
	state   atomic.Int64
	waiters atomic.Int64 // written under mu

	mu    sync.Mutex // guards what follows
	lines []*line    // none is empty; the first is next
}

const underWayBits = 24

// A line is one application's.
type line struct {
	who     string
	waiting []chan struct{} // closed when it is one's turn
}

func (q *queue) underWay() int64 { return q.state.Load() & (1<<underWayBits - 1) }

func (q *queue) done() int64 { return q.state.Load() >> underWayBits }

// take takes a place if there is one.
func (q *queue) take() bool {
	for {
		s := q.state.Load()
		if s&(1<<underWayBits-1) >= q.capacity.Load() {
			return false
		}
		if q.state.CompareAndSwap(s, s+1) {
			return true
		}
	}
}

// enter takes a place, waiting for one until ctx ends.
func (q *queue) enter(ctx context.Context, who string) error {
	if q.waiters.Load() == 0 && q.take() {
		return nil
	}
	turn := make(chan struct{})
	q.mu.Lock()
	i := slices.IndexFunc(q.lines, func(l *line) bool { return l.who == who })
	if i < 0 {
		i = len(q.lines)
		q.lines = append(q.lines, &line{who: who})
	}
	q.lines[i].waiting = append(q.lines[i].waiting, turn)
	// Who leaves looks at waiters after giving his place back, and we look for a place after counting ourselves: one of
	// the two sees the other.
	q.waiters.Add(1)
	q.call()
	q.mu.Unlock()
	select {
	case <-turn:
		return nil
	case <-ctx.Done():
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	for i, l := range q.lines {
		if j := slices.Index(l.waiting, turn); j >= 0 {
			if l.waiting = slices.Delete(l.waiting, j, j+1); len(l.waiting) == 0 {
				q.lines = slices.Delete(q.lines, i, i+1)
			}
			q.waiters.Add(-1)
			return context.Cause(ctx)
		}
	}
	return nil // it was called meanwhile, and has the place
}

// call lets in who is next while there are places. mu is held.
func (q *queue) call() {
	for len(q.lines) > 0 && q.take() {
		l := q.lines[0]
		close(l.waiting[0])
		l.waiting = l.waiting[1:]
		q.waiters.Add(-1)
		q.lines = q.lines[1:]
		if len(l.waiting) > 0 {
			q.lines = append(q.lines, l)
		}
	}
}

// leave gives a place back.
func (q *queue) leave() {
	q.state.Add(1<<underWayBits - 1)
	if q.waiters.Load() > 0 {
		q.mu.Lock()
		q.call()
		q.mu.Unlock()
	}
}

// resize sets how many may be under way.
func (q *queue) resize(n int64) {
	if q.capacity.Swap(n) < n {
		q.mu.Lock()
		q.call()
		q.mu.Unlock()
	}
}

package pool

import (
	"context"
	"fmt"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"yinjian/hsm"
)

// quotas bounds what each application asks of the pool.
type quotas struct {
	mu sync.Mutex
	of map[string]*quota // guarded by mu; as many as there are applications
}

// A quota is one application's.
type quota struct {
	rate   *rate.Limiter // nil: no limit
	places chan struct{} // as long as its sessions; nil: no limit
}

// of answers the caller's quota as it is now.
func (q *quotas) get(c hsm.Caller) (limit *rate.Limiter, places chan struct{}) {
	q.mu.Lock()
	defer q.mu.Unlock()
	mine := q.of[c.Application]
	if mine == nil {
		mine = &quota{}
		q.of[c.Application] = mine
	}
	switch {
	case c.Rate == 0:
		mine.rate = nil
	case mine.rate == nil || mine.rate.Limit() != rate.Limit(c.Rate):
		// A second's worth at once, so that a request of the allowed rate never finds the bucket too small.
		mine.rate = rate.NewLimiter(rate.Limit(c.Rate), c.Rate)
	}
	if c.Sessions == 0 {
		mine.places = nil
	} else if cap(mine.places) != c.Sessions {
		mine.places = make(chan struct{}, c.Sessions) // those under way leave the old one
	}
	return mine.rate, mine.places
}

// enter counts one operation and takes one of the application's sessions, waiting for it until ctx ends. It is given
// back by receiving from places, if that is not nil.
func (q *quotas) enter(ctx context.Context, c hsm.Caller) (places chan struct{}, err error) {
	limit, places := q.get(c)
	if limit != nil && !limit.Allow() {
		missing := 1 - limit.Tokens()
		return nil, &hsm.QuotaError{Application: c.Application, After: max(0, time.Duration(missing/float64(limit.Limit())*float64(time.Second)))}
	}
	if places == nil {
		return nil, nil
	}
	select {
	case places <- struct{}{}:
		return places, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("waiting for one of the application's sessions: %w", context.Cause(ctx))
	}
}

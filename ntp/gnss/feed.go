// Package gnss is a BeiDou time source without the sky, for demonstrations and tests: a generator of NMEA sentences, and
// a rack of the real gpsd and chronyd that turn them into an NTP server of stratum 1, as the appliance's own rack does
// with a receiver. The time it serves is the machine's own and proves nothing; Clock policies that use it have to say so.
//
// Nothing here touches the machine's clock: chronyd runs with -x.
package gnss

import (
	"context"
	"errors"
	"net"
	"sync"
	"time"
)

// A Feed is a simulated receiver. Its methods are safe for concurrent use, while it serves too.
type Feed struct {
	clock func() time.Time

	mu      sync.Mutex
	offset  time.Duration
	fix     Fix
	changed chan struct{} // closed and replaced at each change
}

// NewFeed returns a receiver that shows the time of clock plus an offset.
func NewFeed(clock func() time.Time, offset time.Duration) *Feed {
	return &Feed{clock: clock, offset: offset, changed: make(chan struct{})}
}

// SetOffset steps the receiver's time to the clock's plus offset: a spoofer.
func (f *Feed) SetOffset(offset time.Duration) { f.change(func() { f.offset = offset }) }

// SetFix takes the sky away, or gives it back.
func (f *Feed) SetFix(fix Fix) { f.change(func() { f.fix = fix }) }

func (f *Feed) change(set func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	set()
	close(f.changed)
	f.changed = make(chan struct{})
}

// next is the coming whole second of the receiver's time, how long it is until then, and what ends the wait early.
func (f *Feed) next() (at time.Time, wait time.Duration, fix Fix, changed <-chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := f.clock().Add(f.offset)
	at = now.Truncate(time.Second).Add(time.Second)
	return at, at.Sub(now), f.fix, f.changed
}

// writeTimeout is how long a reader may stall. After that it would be sent the wrong second.
const writeTimeout = time.Second

// Serve sends the sentences of each second, when it begins, to everybody who connects to l, until ctx ends. It closes l,
// waits for its connections, and returns nil then; any other error is the listener's.
func (f *Feed) Serve(ctx context.Context, l net.Listener) error {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	defer context.AfterFunc(ctx, func() { _ = l.Close() })()
	defer l.Close()
	for {
		c, err := l.Accept()
		if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
			if c != nil {
				_ = c.Close()
			}
			return nil
		}
		if err != nil {
			return err
		}
		wg.Go(func() { f.talk(ctx, c) })
	}
}

func (f *Feed) talk(ctx context.Context, c net.Conn) {
	defer c.Close()
	defer context.AfterFunc(ctx, func() { _ = c.Close() })()
	for {
		at, wait, fix, changed := f.next()
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-changed:
			timer.Stop()
			continue
		case <-timer.C:
		}
		text := Sentences(at, fix)
		if text == "" {
			continue
		}
		late := time.AfterFunc(writeTimeout, func() { _ = c.Close() })
		_, err := c.Write([]byte(text))
		late.Stop()
		if err != nil {
			return
		}
	}
}

// Serve is f.Serve.
func Serve(ctx context.Context, l net.Listener, f *Feed) error { return f.Serve(ctx, l) }

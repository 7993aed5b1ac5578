package appliance

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"yinjian/appliance/account"
	"yinjian/appliance/sign"
)

// The throughput that people see is a mean over the last minute, of counters that are read every five seconds whoever looks.
const (
	throughputEvery = 5 * time.Second
	throughputOver  = time.Minute
)

// A throughput counts what the appliance did. Safe for concurrent use.
type throughput struct {
	a      *Appliance
	signed atomic.Uint64

	mu   sync.Mutex
	seen []counted // guarded by mu: those of the last minute and one before, the oldest first
}

// A counted is the counters at a moment.
type counted struct {
	at                       time.Duration // since boot
	signed, stamped, entries uint64
}

// A throughputState is what was done a second; OverS is over how many seconds, 0 in the first second of a start.
type throughputState struct {
	Signatures float64 `json:"signatures_per_s"`
	Timestamps float64 `json:"timestamps_per_s"`
	Entries    float64 `json:"entries_per_s"`
	OverS      float64 `json:"over_s"`
}

func newThroughput(a *Appliance) *throughput {
	t := &throughput{a: a}
	t.seen = []counted{t.now()}
	return t
}

func (t *throughput) now() counted {
	return counted{t.a.sys.Boot(), t.signed.Load(), t.a.service.issued.Load(), t.a.journal.Size()}
}

// run reads the counters until ctx ends.
func (t *throughput) run(ctx context.Context) error {
	tick := time.NewTicker(throughputEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			t.note(t.now())
		case <-ctx.Done():
			return nil
		}
	}
}

func (t *throughput) note(now counted) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for len(t.seen) > 1 && now.at-t.seen[1].at >= throughputOver {
		t.seen = t.seen[1:]
	}
	t.seen = append(t.seen, now)
}

func (t *throughput) state(now counted) throughputState {
	t.mu.Lock()
	first := t.seen[0]
	t.mu.Unlock()
	over := (now.at - first.at).Seconds()
	if over < 1 {
		return throughputState{}
	}
	each := func(now, then uint64) float64 { return float64(now-then) / over }
	return throughputState{each(now.signed, first.signed), each(now.stamped, first.stamped), each(now.entries, first.entries), over}
}

// A countedSigning is the service of signatures, whose new ones are counted.
type countedSigning struct {
	*sign.Service
	t *throughput
}

// Sign satisfies api.Signing.
func (c countedSigning) Sign(ctx context.Context, app *account.Application, req *sign.Request) (*sign.Result, error) {
	r, err := c.Service.Sign(ctx, app, req)
	if err == nil && !r.Replayed {
		c.t.signed.Add(1)
	}
	return r, err
}

package audit_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"yinjian/appliance/audit"
	"yinjian/ntp"
)

// ticks is a clock that moves by a millisecond with each reading, and counts them.
type ticks struct{ n atomic.Int64 }

func (c *ticks) Now() ntp.Reading {
	r := testClock.Reading
	r.Time = r.Time.Add(time.Duration(c.n.Add(1)) * time.Millisecond)
	return r
}

// Entries are encoded while the batch before theirs is being written. Whatever becomes of that one, and whatever comes
// between, each is recorded once, in its order, under its number, and no earlier than the one before.
func TestEncodedAhead(t *testing.T) {
	t.Parallel()
	const waiting, odd = 10, 4 // drafts behind the write; the one of them that is special
	for outcome, c := range map[string]struct {
		landed bool
		err    error
	}{"written": {true, nil}, "lost": {false, errDisk}, "written, answer lost": {true, errDisk}} {
		for name, special := range map[string]func(d *audit.Draft){
			"all alike":       func(*audit.Draft) {},
			"change of state": func(d *audit.Draft) { d.State = true },
			"duplicate":       func(d *audit.Draft) { d.Ref, d.Unique = make([]byte, 32), true },
			"cancelled":       func(*audit.Draft) {},
		} {
			t.Run(name+", "+outcome, func(t *testing.T) {
				t.Parallel()
				store, clock := newMemStore(), &ticks{}
				j := startMem(t, store, func(cfg *audit.Config) { cfg.Clock = clock })
				if _, err := j.Append(t.Context(), audit.Draft{Kind: "first", Ref: make([]byte, 32)}); err != nil {
					t.Fatal(err)
				}
				begun, goOn := make(chan struct{}), make(chan struct{})
				var once sync.Once
				store.onAppend = func(audit.Batch) (landed bool, err error) {
					landed = true
					once.Do(func() {
						close(begun)
						<-goOn
						landed, err = c.landed, c.err
					})
					return landed, err
				}
				defer j.Expect()()
				defer j.Expect()() // others are on their way
				var wg sync.WaitGroup
				wg.Go(func() {
					if _, err := j.Append(t.Context(), draft(-1)); (err == nil) != c.landed {
						t.Errorf("the write itself: %v", err)
					}
				})
				<-begun
				before := clock.n.Load()
				for i := range waiting {
					ctx, cancel := context.WithCancel(t.Context())
					d := draft(i)
					if i == odd {
						special(&d)
					}
					wg.Go(func() {
						defer cancel()
						r, err := j.Append(ctx, d)
						switch {
						case i == odd && name == "duplicate":
							if dup := (*audit.DuplicateRefError)(nil); !errors.As(err, &dup) || dup.Sequence != 1 {
								t.Errorf("draft %d: %v", i, err)
							}
						case i == odd && name == "cancelled":
							if !errors.Is(err, context.Canceled) {
								t.Errorf("draft %d: %v", i, err)
							}
						case err != nil:
							t.Errorf("draft %d: %v", i, err)
						case r.LeafHash != audit.LeafHash(r.EntryDER) || r.Sequence != r.Entry.Sequence || r.Entry.Object != fmt.Sprint(i):
							t.Errorf("draft %d: receipt %+v", i, r)
						}
					})
					waitFor(t, func() bool { return j.Waiting() == i+1 })
					if i == odd && name == "cancelled" {
						cancel()
						waitFor(t, func() bool { return j.Waiting() == i })
						break // what comes after the one that has gone is another draft's test
					}
				}
				ahead := map[string]int64{"all alike": waiting, "change of state": odd, "duplicate": waiting, "cancelled": odd}[name]
				waitFor(t, func() bool { return clock.n.Load() >= before+ahead })
				close(goOn)
				wg.Wait()

				if rep, err := audit.Verify(t.Context(), store, audit.Options{}); err != nil || !rep.OK() {
					t.Errorf("Verify = %+v, %v", rep, err)
				}
				var objects []string
				times := map[int64]int{}
				last := int64(0)
				err := j.Range(t.Context(), 2, func(r audit.Record) error {
					if r.Entry.Time.Micros < last {
						t.Errorf("entry %d is earlier than the one before", r.Sequence)
					}
					last = r.Entry.Time.Micros
					if r.Entry.Object != "-1" {
						objects = append(objects, r.Entry.Object)
						times[last]++
					}
					return nil
				})
				var want []string
				for i := range waiting {
					if name == "cancelled" && i == odd {
						break
					}
					if name != "duplicate" || i != odd {
						want = append(want, fmt.Sprint(i))
					}
				}
				if err != nil || fmt.Sprint(objects) != fmt.Sprint(want) {
					t.Errorf("recorded are %v (%v), want %v", objects, err, want)
				}
				// Those that were encoded ahead have a time each, the others of the batch one together.
				distinct := map[string]int{"all alike": waiting, "change of state": odd + 1, "duplicate": odd + 1, "cancelled": odd}[name]
				if outcome == "lost" {
					distinct = 1 // the numbers were given again
				}
				if len(times) != distinct {
					t.Errorf("%d times among %v, want %d", len(times), times, distinct)
				}
			})
		}
	}
}

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"yinjian/appliance/audit"
	"yinjian/appliance/evidence"
)

// What bench-growth measures of a journal.

// A growthCost is what one operation cost.
type growthCost struct {
	CPU     float64 `json:"cpu_us"`               // processor time of this process
	Wall    float64 `json:"wall_us"`              // until the answer, at one caller; of many callers the time over the operations
	Written float64 `json:"bytes,omitempty"`      // handed to the kernel for writing
	Read    float64 `json:"disk_bytes,omitempty"` // that came from the disk, and not from memory
}

// transferred is how many bytes this process has handed to write calls so far, and how many had to be fetched from the disk
// for it (proc(5), /proc/pid/io: wchar, read_bytes).
func transferred() (written, read float64, err error) {
	raw, err := os.ReadFile("/proc/self/io")
	if err != nil {
		return 0, 0, err
	}
	for line := range strings.SplitSeq(string(raw), "\n") {
		name, number, _ := strings.Cut(line, ": ")
		n, _ := strconv.ParseFloat(number, 64) // the kernel's own
		switch name {
		case "wchar":
			written = n
		case "read_bytes":
			read = n
		}
	}
	return written, read, nil
}

// ownTime is the processor time of this process so far.
func ownTime() (time.Duration, error) {
	var own syscall.Rusage
	err := syscall.Getrusage(syscall.RUSAGE_SELF, &own)
	return time.Duration(own.Utime.Nano() + own.Stime.Nano()), err
}

// costOf runs fn, which does n operations.
func costOf(n int, fn func() error) (growthCost, error) {
	wrote, read, err := transferred()
	if err != nil {
		return growthCost{}, err
	}
	cpu, err := ownTime()
	if err != nil {
		return growthCost{}, err
	}
	begun := time.Now() // interval
	if err := fn(); err != nil {
		return growthCost{}, err
	}
	wall := time.Since(begun)
	after, err := ownTime()
	if err != nil {
		return growthCost{}, err
	}
	wroteNow, readNow, err := transferred()
	per := func(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1000 / float64(n) }
	return growthCost{CPU: per(after - cpu), Wall: per(wall), Written: (wroteNow - wrote) / float64(n), Read: (readNow - read) / float64(n)}, err
}

// quiet waits until the process has next to nothing to do: what a start leaves to the background is done.
func quiet(ctx context.Context) error {
	for calm := 0; calm < 5; {
		before, err := ownTime()
		if err != nil {
			return err
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
		after, err := ownTime()
		if err != nil {
			return err
		}
		if calm++; after-before > 5*time.Millisecond {
			calm = 0
		}
	}
	return nil
}

// A growthCase measures one thing on an open journal.
type growthCase struct {
	name  string
	limit float64 // of the ratio to the smallest journal
	ops   int
	run   func(ctx context.Context, g *growthJournal, ops int) error
}

// growthAppends is how many entries a round adds to each journal.
const growthAppends, growthAlone = 4096, 256

var growthCases = []growthCase{
	{"append-1", 1.25, growthAlone, func(ctx context.Context, g *growthJournal, ops int) error { return g.appends(ctx, 1, ops) }},
	{"append-64", 1.25, growthAppends, func(ctx context.Context, g *growthJournal, ops int) error { return g.appends(ctx, 64, ops) }},
	{"reference", 1.25, 2000, func(ctx context.Context, g *growthJournal, ops int) error {
		return g.each(ops, func(n uint64) error {
			_, err := g.ByRef(ctx, growthRef(n))
			return err
		})
	}},
	{"no-reference", 0, 2000, func(ctx context.Context, g *growthJournal, ops int) error {
		return g.each(ops, func(n uint64) error {
			if _, err := g.ByRef(ctx, growthRef(1<<40+n)); !errors.Is(err, audit.ErrNotFound) {
				return fmt.Errorf("a reference that was never written: %w", err)
			}
			return nil
		})
	}},
	{"sequence", 1.25, 2000, func(ctx context.Context, g *growthJournal, ops int) error {
		return g.each(ops, func(n uint64) error {
			_, err := g.Entry(ctx, n)
			return err
		})
	}},
	{"proof", 0, 1000, func(ctx context.Context, g *growthJournal, ops int) error {
		c, err := g.LastCheckpoint()
		if err != nil {
			return err
		}
		return g.each(ops, func(n uint64) error {
			_, err := g.InclusionProof(ctx, min(n, c.Size-1), c.Size)
			return err
		})
	}},
	{"evidence", 1.25, 1000, func(ctx context.Context, g *growthJournal, ops int) error {
		return g.each(ops, func(n uint64) error {
			found, err := g.ByRef(ctx, growthRef(n))
			if err != nil || found[0].Entry.Kind != evidence.KindSign {
				return err
			}
			b, err := evidence.Build(ctx, g.Journal, found[0])
			if err != nil {
				return err
			}
			_, err = json.Marshal(b)
			return err
		})
	}},
}

// each calls fn with numbers of entries from all over the journal that a signature of growthJournal.fill has.
func (g *growthJournal) each(ops int, fn func(n uint64) error) error {
	for range ops {
		if err := fn(1 + rand.Uint64N(g.filled-1)); err != nil {
			return err
		}
	}
	return nil
}

// appends looks each reference up first, as a signature does.
func (g *growthJournal) appends(ctx context.Context, callers, ops int) error {
	var next, failed atomic.Int64
	var first error
	var once sync.Once
	var wg sync.WaitGroup
	for range callers {
		wg.Go(func() {
			for next.Add(1) <= int64(ops) && failed.Load() == 0 {
				if err := g.appendOne(ctx); err != nil {
					failed.Store(1)
					once.Do(func() { first = err })
				}
			}
		})
	}
	wg.Wait()
	return first
}

func (g *growthJournal) appendOne(ctx context.Context) error {
	defer g.Expect()()
	d := g.draft(g.fresh.Add(1))
	d.Unique, d.Absent = true, g.Size()
	if _, err := g.ByRef(ctx, d.Ref); !errors.Is(err, audit.ErrNotFound) {
		return fmt.Errorf("the reference is there already: %w", err)
	}
	_, err := g.Append(ctx, d)
	return err
}

// start is a start's part that has to do with the journal: its files, what it checks of its end, and the directory's
// changes, which are replayed. background is what goes on afterwards.
func (g *growthJournal) start(ctx context.Context) (start, background growthCost, err error) {
	start, err = costOf(1, func() error {
		if err := g.open(ctx); err != nil {
			return err
		}
		for range growthReplays {
			if err := g.State(ctx, func(audit.Record) error { return nil }); err != nil {
				return err
			}
		}
		return nil
	})
	if err == nil {
		background, err = costOf(1, func() error {
			time.Sleep(growthSumUp)
			return quiet(ctx)
		})
	}
	return start, background, err
}

// growthReplays is how often a start of the appliance reads the changes of state: directory, machines, time and others.
const growthReplays = 7

package main

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/signal"
	"runtime"
	"runtime/pprof"
	"syscall"

	"github.com/sirupsen/logrus"
)

// Files beside a processor profile: profiles of allocation before and after, and an allocated.
const (
	allocBefore = ".alloc0"
	allocAfter  = ".alloc"
	allocTotals = ".json"
	// profileBegun is there once the profile runs: the load waits for it.
	profileBegun = ".begun"
)

// allocated is what a process asked for while it was profiled.
type allocated struct {
	Bytes   uint64 `json:"bytes"`
	Objects uint64 `json:"objects"`
}

// profileOnSignal begins a processor profile at SIGUSR1 and writes it to file at the next, and beside it what was allocated between.
func profileOnSignal(ctx context.Context, file string, log *logrus.Logger) {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGUSR1)
	defer signal.Stop(signals)
	next := func() bool {
		select {
		case <-signals:
			return true
		case <-ctx.Done():
			return false
		}
	}
	for next() {
		f, err := os.Create(file + ".new")
		var before, after runtime.MemStats
		if err == nil {
			err = allocations(file + allocBefore)
		}
		if err == nil {
			err = pprof.StartCPUProfile(f)
		}
		if err == nil {
			runtime.ReadMemStats(&before) // after what the profile itself has asked for: its buffer is of 1.2 MB
			err = os.WriteFile(file+profileBegun, nil, 0o600)
		}
		if err != nil {
			log.WithError(err).Error("no profile")
			return
		}
		next()
		runtime.ReadMemStats(&after)
		pprof.StopCPUProfile()
		totals, err := json.Marshal(allocated{after.TotalAlloc - before.TotalAlloc, after.Mallocs - before.Mallocs})
		if err = errors.Join(err, allocations(file+allocAfter), os.WriteFile(file+allocTotals, totals, 0o600), f.Close()); err == nil {
			err = os.Rename(f.Name(), file)
		}
		if err != nil {
			log.WithError(err).Error("no profile")
		}
	}
}

// allocations writes the profile of all allocations so far: it has those up to the collection before the last.
func allocations(file string) error {
	runtime.GC()
	runtime.GC()
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	return errors.Join(pprof.Lookup("allocs").WriteTo(f, 0), f.Close())
}

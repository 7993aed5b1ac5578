package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// A progress shows how far a long command is: a bar that is drawn over on a terminal, else a line from time to time. Safe
// for concurrent use.
type progress struct {
	to       io.Writer
	terminal bool
	total    int
	begun    time.Time

	mu    sync.Mutex
	done  int       // guarded by mu
	drawn time.Time // guarded by mu
}

// Least time between two pictures, on a terminal and elsewhere.
const (
	barEvery  = 100 * time.Millisecond
	lineEvery = 5 * time.Second
)

func newProgress(total int) *progress {
	_, err := unix.IoctlGetTermios(int(os.Stderr.Fd()), unix.TCGETS)
	return &progress{to: os.Stderr, terminal: err == nil, total: total, begun: time.Now()} // interval
}

// add counts n more.
func (p *progress) add(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.done += n
	every := lineEvery
	if p.terminal {
		every = barEvery
	}
	now := time.Now() // interval
	if p.done < p.total && now.Sub(p.drawn) < every {
		return
	}
	p.drawn = now
	rate := float64(p.done) / max(now.Sub(p.begun).Seconds(), 1e-3)
	left := time.Duration(float64(p.total-p.done) / max(rate, 1e-3) * float64(time.Second)).Round(time.Second)
	said := fmt.Sprintf("%d/%d，每秒 %.1f，还需 %v (%.1f a second)", p.done, p.total, rate, left, rate)
	if !p.terminal {
		fmt.Fprintln(p.to, said)
		return
	}
	const width = 30
	full := width * p.done / max(p.total, 1)
	fmt.Fprintf(p.to, "\r[%s%s] %s\x1b[K", strings.Repeat("█", full), strings.Repeat("·", width-full), said)
}

// end leaves the bar's line, and answers how long it took.
func (p *progress) end() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.terminal && p.done > 0 {
		fmt.Fprintln(p.to)
	}
	return time.Since(p.begun) // interval
}

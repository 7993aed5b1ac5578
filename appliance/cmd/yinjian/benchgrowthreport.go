package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/emmansun/gmsm/sm3"

	"yinjian/appliance/audit"
	"yinjian/ntp/sysclock"
)

// growthRound is how many entries a round adds to a journal, a tenth of them before it is measured.
const growthRound = (growthAlone+growthAppends)*11/10 + 2

// smallJournal is made anew for each round: the round's own entries would be a good part of it.
const smallJournal = 50_000

// A growthBench is one measurement.
type growthBench struct {
	dir, results string
	name         string // of the results' files
	sizes        []uint64
	rounds       int
	segment      int
	keep         bool

	journals map[uint64]*growthJournal
	lines    []*growthLine
	bytes    map[uint64]float64 // of the files, an entry
}

// A growthLine is one case at all sizes.
type growthLine struct {
	Name  string                  `json:"name"`
	Limit float64                 `json:"limit"`
	Costs map[uint64][]growthCost `json:"costs"` // by size, one a round
	Rates map[uint64][]float64    `json:"of_raw_sm3,omitempty"`
}

func (b *growthBench) line(name string, limit float64) *growthLine {
	for _, l := range b.lines {
		if l.Name == name {
			return l
		}
	}
	l := &growthLine{Name: name, Limit: limit, Costs: map[uint64][]growthCost{}, Rates: map[uint64][]float64{}}
	b.lines = append(b.lines, l)
	return l
}

func (b *growthBench) run(ctx context.Context) (err error) {
	setMemory() // as the appliance has it
	clock, err := sysclock.Open()
	if err != nil {
		return err
	}
	if b.dir, err = filepath.Abs(b.dir); err != nil {
		return err
	}
	if !b.keep {
		if err := os.RemoveAll(b.dir); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, os.RemoveAll(b.dir)) }()
	}
	fmt.Println(benchGrowthText)
	b.journals, b.bytes = map[uint64]*growthJournal{}, map[uint64]float64{}
	for _, size := range b.sizes {
		if b.journals[size], err = newGrowthJournal(b.dir, size, b.segment); err != nil {
			return err
		}
	}
	for round := range b.rounds {
		for _, size := range b.sizes {
			if err := b.measure(ctx, b.journals[size], b.rounds-round); err != nil {
				return fmt.Errorf("%d entries: %w", size, err)
			}
			fmt.Printf("\r第 %d/%d 轮 round，%d 条 entries    ", round+1, b.rounds, size)
		}
	}
	fmt.Println()
	return b.report(clock.Realtime())
}

// measure is one round of a journal. left counts the rounds from this one to the last.
func (b *growthBench) measure(ctx context.Context, g *growthJournal, left int) error {
	if g.size <= smallJournal {
		left = 1
		g.filled = 0
		if err := os.RemoveAll(g.dir); err != nil {
			return err
		}
	}
	if err := g.open(ctx); err != nil {
		return err
	}
	to := g.size - uint64(left*growthRound)
	err := g.fill(ctx, to, func(n uint64) { fmt.Printf("\r%d / %d 条 entries    ", n, to) })
	if err := errors.Join(err, quiet(ctx), g.stop()); err != nil {
		return err
	}
	start, background, err := g.start(ctx)
	if err != nil {
		return err
	}
	add := func(name string, limit float64, c growthCost) {
		l := b.line(name, limit)
		l.Costs[g.size] = append(l.Costs[g.size], c)
	}
	for _, c := range growthCases {
		if err := c.run(ctx, g, max(c.ops/10, 10)); err != nil { // statements and caches are there before
			return errors.Join(fmt.Errorf("%s: %w", c.name, err), g.stop())
		}
		cost, err := costOf(c.ops, func() error { return c.run(ctx, g, c.ops) })
		if err != nil {
			return errors.Join(fmt.Errorf("%s: %w", c.name, err), g.stop())
		}
		add(c.name, c.limit, cost)
	}
	if err := g.stop(); err != nil {
		return err
	}
	add("start", 2, start)
	add("after start", 0, background)
	if b.bytes[g.size], err = bytesOf(g.dir, g.size); err != nil {
		return err
	}
	if g.size > 1_000_000 && left > 1 {
		return nil // it takes minutes, and tells the same each time
	}
	cost, share, err := g.verify(ctx)
	add("verify", 0, cost)
	l := b.line("verify", 0)
	l.Rates[g.size] = append(l.Rates[g.size], share)
	return err
}

func bytesOf(dir string, entries uint64) (float64, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*"))
	sum := int64(0)
	for _, f := range files {
		info, serr := os.Stat(f)
		if serr != nil {
			return 0, serr
		}
		sum += info.Size()
	}
	return float64(sum) / float64(entries), err
}

// verify answers the cost of an entry, and how many bytes a second that is over raw SM3's.
func (g *growthJournal) verify(ctx context.Context) (growthCost, float64, error) {
	store, err := openJournal(ctx, g.dir)
	if err != nil {
		return growthCost{}, 0, err
	}
	defer store.Close()
	size, _, err := store.Head(ctx)
	if err != nil {
		return growthCost{}, 0, err
	}
	// The bytes of some entries stand for all: they are of one length.
	var sample []byte
	entries := min(size, 50_000)
	err = audit.Scan(ctx, store, 0, entries, func(r audit.Record) error {
		sample = append(sample, r.EntryDER...)
		for _, p := range r.Entry.Payloads {
			sample = append(sample, make([]byte, p.Size)...)
		}
		return nil
	})
	if err != nil {
		return growthCost{}, 0, err
	}
	raw := func() time.Duration {
		begun := time.Now() // interval
		h := sm3.New()
		h.Write(sample)
		h.Sum(nil)
		return time.Since(begun)
	}
	before := raw()
	cost, err := costOf(int(size), func() error {
		r, err := audit.Verify(ctx, store, audit.Options{LogKey: g.key.Public(), Wait: verifyWait, Workers: runtime.NumCPU(), Progress: func(done, total uint64) {
			if done%(1<<18) == 0 {
				fmt.Printf("\r核验 verifying %d / %d    ", done, total)
			}
		}})
		if err == nil && (!r.OK() || !r.Covered) {
			err = fmt.Errorf("%d findings, %d entries uncovered", len(r.Findings), r.Uncovered)
		}
		return err
	})
	rate := float64((before + raw()).Nanoseconds()) / 2 / 1000 / float64(entries) / cost.Wall
	return cost, rate, err
}

// ratios are those of a case at a size to the smallest journal, in each round.
func (b *growthBench) ratios(l *growthLine, size uint64, of func(growthCost) float64) []float64 {
	var out []float64
	for i, c := range l.Costs[size] {
		out = append(out, of(c)/of(l.Costs[b.sizes[0]][i]))
	}
	return out
}

func cpuOf(c growthCost) float64  { return c.CPU }
func wallOf(c growthCost) float64 { return c.Wall }

func (b *growthBench) report(at time.Time) error {
	machine := machineOf(b.dir, at)
	var out strings.Builder
	fmt.Fprintf(&out, "# Measured by `make bench-growth`: what growth costs\n\nWritten by the program; not to be edited. Definitions: `yinjian bench-growth --help`.\n\n"+
		"| | |\n| --- | --- |\n| at | %s |\n| revision | %s, %s |\n| machine | %s, %d cores, Linux %s |\n| load average at the end | %s |\n| file system | %s |\n| rounds | %d |\n\n",
		machine.At, machine.Revision, machine.Go, machine.CPU, machine.Cores, machine.Kernel, machine.Load, machine.Filesystem, b.rounds)
	head := func(title, first string) {
		fmt.Fprintf(&out, "## %s\n\n| %s |", title, first)
		for _, n := range b.sizes {
			fmt.Fprintf(&out, " %d |", n)
		}
		fmt.Fprintf(&out, "\n| --- |%s\n", strings.Repeat(" ---: |", len(b.sizes)))
	}
	head("Processor time, µs each", "entries")
	for _, l := range b.lines {
		fmt.Fprintf(&out, "| %s |", l.Name)
		for _, n := range b.sizes {
			fmt.Fprintf(&out, " %.1f |", spreadOf(each(l.Costs[n], cpuOf)).Median)
		}
		out.WriteString("\n")
	}
	out.WriteString("\n")
	head("Time until the answer, µs each", "entries")
	for _, l := range b.lines {
		fmt.Fprintf(&out, "| %s |", l.Name)
		for _, n := range b.sizes {
			fmt.Fprintf(&out, " %.1f |", spreadOf(each(l.Costs[n], wallOf)).Median)
		}
		out.WriteString("\n")
	}
	out.WriteString("\n")
	head("Bytes each", "entries")
	for _, name := range []string{"append-1", "append-64"} {
		fmt.Fprintf(&out, "| written, %s |", name)
		for _, n := range b.sizes {
			fmt.Fprintf(&out, " %.0f |", spreadOf(each(b.line(name, 0).Costs[n], func(c growthCost) float64 { return c.Written })).Median)
		}
		out.WriteString("\n")
	}
	for _, name := range []string{"reference", "sequence", "evidence"} {
		fmt.Fprintf(&out, "| fetched from the disk, %s |", name)
		for _, n := range b.sizes {
			fmt.Fprintf(&out, " %.0f |", spreadOf(each(b.line(name, 0).Costs[n], func(c growthCost) float64 { return c.Read })).Median)
		}
		out.WriteString("\n")
	}
	out.WriteString("| in the files |")
	for _, n := range b.sizes {
		fmt.Fprintf(&out, " %.0f |", b.bytes[n])
	}
	largest := b.sizes[len(b.sizes)-1]
	fmt.Fprintf(&out, "\n\n## %d entries over %d\n\n| | processor time | min – max | time | min – max | limit | |\n| --- | ---: | ---: | ---: | ---: | --- | --- |\n", largest, b.sizes[0])
	for _, l := range b.lines {
		if l.Name == "verify" {
			continue
		}
		cpu, wall := spreadOf(b.ratios(l, largest, cpuOf)), spreadOf(b.ratios(l, largest, wallOf))
		limit, verdict := "", ""
		if l.Limit > 0 {
			limit, verdict = fmt.Sprintf("≤ %.2f", l.Limit), "**above**"
			if cpu.Median <= l.Limit {
				verdict = "holds"
			}
		}
		fmt.Fprintf(&out, "| %s | %.2f | %.2f – %.2f | %.2f | %.2f – %.2f | %s | %s |\n", l.Name, cpu.Median, cpu.Least, cpu.Most, wall.Median, wall.Least, wall.Most, limit, verdict)
	}
	out.WriteString("\n")
	head("verify over raw SM3", "entries")
	out.WriteString("| bytes a second over raw SM3's, ≥ 0.5 |")
	for _, n := range b.sizes {
		fmt.Fprintf(&out, " %.2f |", spreadOf(b.line("verify", 0).Rates[n]).Median)
	}
	out.WriteString("\n")
	fmt.Print(out.String())
	if b.results == "" {
		return nil
	}
	if err := os.MkdirAll(b.results, 0o755); err != nil {
		return err
	}
	data, err := json.MarshalIndent(struct {
		Machine machineInfo        `json:"machine"`
		Sizes   []uint64           `json:"entries"`
		Cases   []*growthLine      `json:"cases"`
		Bytes   map[uint64]float64 `json:"bytes_an_entry"`
	}{machine, b.sizes, b.lines, b.bytes}, "", "  ")
	if err != nil {
		return err
	}
	return errors.Join(
		os.WriteFile(filepath.Join(b.results, b.name+".md"), []byte(out.String()), 0o644),
		os.WriteFile(filepath.Join(b.results, b.name+".svg"), growthPlot(b.sizes, b.lines), 0o644),
		os.WriteFile(filepath.Join(b.results, b.name+".json"), append(data, '\n'), 0o644),
	)
}

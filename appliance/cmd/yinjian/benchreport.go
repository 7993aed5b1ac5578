package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"sort"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Roles of processes in the results. Workers are "worker" and their slot's class.
const (
	roleClient    = "client"
	roleAppliance = "appliance"
	roleSofttoken = "softtoken"
)

// ticks is the unit of /proc/*/stat's times on every Linux that Go runs on (USER_HZ).
const ticks = 100

// A processorTime is what processes have used so far, in seconds.
type processorTime struct {
	roles map[string]float64
	waits map[string]float64 // how long threads that could run had to wait for a processor, all of a role's together
	busy  float64            // of all processes of the machine
}

// processors reads the processor times of all processes that take part. The client's is exact, the others' are in
// ticks of 10 ms.
func (b *bench) processors() (processorTime, error) {
	p := processorTime{roles: map[string]float64{}, waits: map[string]float64{}}
	roles, err := b.processes()
	if err != nil {
		return p, err
	}
	for pid, role := range roles {
		stat, err := readStat(pid)
		if err != nil {
			return p, err
		}
		p.roles[role] += stat.used
		p.waits[role] += readWait(pid)
	}
	p.waits[roleClient] = readWait(os.Getpid())
	var own syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &own); err != nil {
		return p, err
	}
	p.roles[roleClient] = time.Duration(own.Utime.Nano() + own.Stime.Nano()).Seconds()
	all, err := os.ReadFile("/proc/stat")
	if err != nil {
		return p, err
	}
	line, _, _ := strings.Cut(string(all), "\n")
	for i, field := range strings.Fields(line)[1:] {
		if n, err := strconv.ParseFloat(field, 64); err == nil && i != 3 && i != 4 && i < 8 { // idle, iowait; guest is in user
			p.busy += n / ticks
		}
	}
	return p, nil
}

// processes lists the appliance's processes and ours, by pid.
func (b *bench) processes() (map[int]string, error) {
	answer, err := b.admin.State(context.Background())
	if err != nil {
		return nil, err
	}
	var state struct {
		HSM map[string]struct{ PID int }
	}
	if err := json.Unmarshal(answer, &state); err != nil {
		return nil, err
	}
	b.looking.Lock()
	defer b.looking.Unlock()
	roles := map[int]string{}
	for pid, role := range b.own {
		roles[pid] = role
	}
	for class, slot := range state.HSM {
		if slot.PID == 0 {
			continue // it is being started
		}
		stat, err := readStat(slot.PID)
		if err != nil {
			return nil, err
		}
		roles[slot.PID], b.appliance = "worker "+class, stat.parent
	}
	if b.appliance == 0 {
		return nil, errors.New("no process of the appliance is found")
	}
	roles[b.appliance] = roleAppliance
	all, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	for _, dir := range all {
		pid, _ := strconv.Atoi(filepath.Base(dir)) // digits, or 0, which is nobody
		stat, err := readStat(pid)
		if err != nil || stat.parent != b.appliance {
			continue // gone meanwhile
		}
		if line, err := os.ReadFile(filepath.Join(dir, "cmdline")); err == nil && bytes.Contains(line, []byte("\x00softtoken\x00")) {
			roles[pid] = roleSofttoken
		}
	}
	return roles, nil
}

type processStat struct {
	parent int
	used   float64 // seconds
}

// readStat reads /proc/PID/stat (proc(5)): after the name in brackets, the parent is field 4, user and system time are
// fields 14 and 15.
func readStat(pid int) (processStat, error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return processStat{}, err
	}
	fields := strings.Fields(string(raw[bytes.LastIndexByte(raw, ')')+1:]))
	if len(fields) < 13 {
		return processStat{}, fmt.Errorf("/proc/%d/stat has %d fields", pid, len(fields))
	}
	parent, err1 := strconv.Atoi(fields[1])
	user, err2 := strconv.ParseFloat(fields[11], 64)
	system, err3 := strconv.ParseFloat(fields[12], 64)
	return processStat{parent, (user + system) / ticks}, errors.Join(err1, err2, err3)
}

// readWait is how long the threads of a process have stood in a processor's run queue, in seconds: the second field of each one's
// schedstat (the kernel's Documentation/scheduler/sched-stats). Threads that have ended are left out; 0 where the kernel does not tell.
func readWait(pid int) (sum float64) {
	files, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid)) // of a constant pattern
	for _, file := range files {
		raw, err := os.ReadFile(file)
		if err != nil {
			continue // it has ended
		}
		if f := strings.Fields(string(raw)); len(f) > 1 {
			if ns, err := strconv.ParseFloat(f[1], 64); err == nil {
				sum += ns / 1e9
			}
		}
	}
	return sum
}

// A machineInfo says on what was measured.
type machineInfo struct {
	At         string `json:"at"`
	Revision   string `json:"revision"`
	Go         string `json:"go"`
	Kernel     string `json:"kernel"`
	CPU        string `json:"cpu"`
	Cores      int    `json:"cores"`
	Load       string `json:"load_average"`
	Filesystem string `json:"filesystem"`
}

// machineOf describes this machine, and the file system under dir.
func machineOf(dir string, at time.Time) machineInfo {
	read := func(name string) string {
		raw, _ := os.ReadFile(name) // what is not there is said to be unknown
		return strings.TrimSpace(string(raw))
	}
	m := machineInfo{
		At: at.UTC().Format(time.RFC3339), Go: runtime.Version(), Kernel: read("/proc/sys/kernel/osrelease"),
		CPU: "unknown", Cores: runtime.NumCPU(), Load: read("/proc/loadavg"), Filesystem: "unknown", Revision: os.Getenv("YINJIAN_REVISION"),
	}
	if info, ok := debug.ReadBuildInfo(); ok && m.Revision == "" {
		m.Revision = info.Main.Version
	}
	for line := range strings.SplitSeq(read("/proc/cpuinfo"), "\n") {
		if name, value, _ := strings.Cut(line, ":"); strings.TrimSpace(name) == "model name" {
			m.CPU = strings.TrimSpace(value)
		}
	}
	longest := -1
	for line := range strings.SplitSeq(read("/proc/self/mounts"), "\n") {
		f := strings.Fields(line)
		if len(f) > 2 && len(f[1]) > longest && (f[1] == "/" || dir == f[1] || strings.HasPrefix(dir, f[1]+"/")) {
			longest, m.Filesystem = len(f[1]), f[2]+" on "+f[0]
		}
	}
	return m
}

// A spread is the median of the rounds with the least and the greatest.
type spread struct {
	Median float64 `json:"median"`
	Least  float64 `json:"least"`
	Most   float64 `json:"most"`
}

func spreadOf(v []float64) spread {
	s := slices.Sorted(slices.Values(v))
	return spread{s[len(s)/2], s[0], s[len(s)-1]}
}

// A floor is one ratio (or time) that issue and design ask for.
type floor struct {
	Name  string  `json:"name"`
	Of    string  `json:"of"`
	Floor float64 `json:"floor"`
	Upper bool    `json:"upper"` // Floor is the most it may be
	spread
	Holds bool `json:"holds"`
}

// floors takes each ratio within a round: of rates, and of processor times, in which the cheaper stands above.
func (b *bench) floors() (byRate, byTime []floor) {
	ratio := func(name, of string, least float64, f func(a, c sample) float64, over, under string) floor {
		var v []float64
		for i := range b.rounds {
			v = append(v, f(b.byName[over].Samples[i], b.byName[under].Samples[i]))
		}
		return floor{Name: name, Of: of, Floor: least, spread: spreadOf(v)}
	}
	rates := func(a, c sample) float64 { return a.rate() / c.rate() }
	used := func(a, c sample) float64 { return a.cpu(roleClient) / c.cpu(roleClient) }
	all := func(a, c sample) float64 { return c.total("") / a.total("") }
	served := func(a, c sample) float64 { return c.total(roleClient) / a.total(roleClient) }
	list := []floor{
		ratio("(a)", "csign ÷ gmsm", 0.15, rates, "csign", "gmsm"),
		ratio("(b) unstamped", "sign ÷ csign", 0.30, rates, "sign", "csign"),
		ratio("(b) stamped", "stamped ÷ csign", 0.18, rates, "stamped", "csign"),
		ratio("(a)·(b) unstamped", "sign ÷ gmsm", 0.045, rates, "sign", "gmsm"),
		ratio("(a)·(b) stamped", "stamped ÷ gmsm", 0.027, rates, "stamped", "gmsm"),
		ratio("(c)", "raw-cpu ÷ token, processor time", 0.33, used, "raw-cpu", "token"),
	}
	list = append(list,
		ratio("(e) hit", "wrapped-hit ÷ csign", 0.870, rates, "wrapped-hit", "csign"),
		ratio("(e) miss", "wrapped-miss ÷ csign", 0.400, rates, "wrapped-miss", "csign"),
		ratio("(e) Zipf", "wrapped-zipf ÷ csign", 0, rates, "wrapped-zipf", "csign"),
		ratio("(f) one client", "batch-1 ÷ sign-1", 3, rates, "batch-1", "sign-1"),
		ratio("(f) 64 clients", "batch ÷ sign", 1.5, rates, "batch", "sign"),
	)
	list = append(list, ratio("(g) RSA", "rsa ÷ csign-rsa", 0.85, rates, "rsa", "csign-rsa"))
	waits := ratio("(h) 500 connections", "p99 ÷ (500 ÷ rate)", 3, func(a, _ sample) float64 { return a.P99 / 1000 * a.rate() / 500 }, "sign-500", "sign-500")
	waits.Upper = true
	list = append(list, waits)
	for _, p := range b.profiled {
		if p.Load == "sign" {
			kB := p.AllocBytes / 1000
			list = append(list, floor{Name: "(i) allocated", Of: "kB a sign", Floor: 20, Upper: true, spread: spread{kB, kB, kB}})
		}
	}
	journal := ratio("(d)", "journal, ms a record", 0.030, func(a, _ sample) float64 { return 1000 / a.rate() }, "journal", "journal")
	journal.Upper = true
	list = append(list, journal)
	for i, f := range list {
		list[i].Holds = f.Median >= f.Floor != f.Upper
	}
	return list, []floor{
		ratio("(a)", "gmsm ÷ csign", 0.15, all, "csign", "gmsm"),
		ratio("(b) unstamped", "csign ÷ sign", 0.30, all, "sign", "csign"),
		ratio("(b) unstamped, without the client", "csign ÷ sign", 0.30, served, "sign", "csign"),
		ratio("(b) stamped", "csign ÷ stamped", 0.18, all, "stamped", "csign"),
		ratio("(b) stamped, without the client", "csign ÷ stamped", 0.18, served, "stamped", "csign"),
		ratio("(a)·(b) unstamped", "gmsm ÷ sign", 0.045, all, "sign", "gmsm"),
		ratio("(a)·(b) stamped", "gmsm ÷ stamped", 0.027, all, "stamped", "gmsm"),
	}
}

func (f floor) print(out *strings.Builder) {
	sign, word := "≥", "**below**"
	if f.Upper {
		sign, word = "≤", "**above**"
	}
	if f.Holds {
		word = "holds"
	}
	fmt.Fprintf(out, "| %s | %s | %.3f | %.3f – %.3f | %s %.3f | %s |\n", f.Name, f.Of, f.Median, f.Least, f.Most, sign, f.Floor, word)
}

// report prints the results and writes them to the folder.
func (b *bench) report() error {
	machine := machineOf(b.dir, b.now())
	floors, byTime := b.floors()
	var out strings.Builder
	fmt.Fprintf(&out, "# Measured by `make bench`\n\nWritten by the program; not to be edited. Definitions: `yinjian bench --help`.\n\n")
	fmt.Fprintf(&out, "| | |\n| --- | --- |\n| at | %s |\n| revision | %s, %s |\n| machine | %s, %d cores, Linux %s |\n| load average at the end | %s |\n| file system | %s |\n| rounds | %d of %v each case |\n\n",
		machine.At, machine.Revision, machine.Go, machine.CPU, machine.Cores, machine.Kernel, machine.Load, machine.Filesystem, b.rounds, b.each)

	fmt.Fprintf(&out, "## Floors\n\n| | ratio | median | min – max | floor | |\n| --- | --- | ---: | ---: | ---: | --- |\n")
	for _, f := range floors {
		f.print(&out)
	}
	var perFsync []float64
	for i, s := range b.byName["journal"].Samples {
		perFsync = append(perFsync, b.byName["fsync"].Samples[i].rate()/s.rate())
	}
	fsync := spreadOf(each(b.byName["fsync"].Samples, func(s sample) float64 { return 1000 / s.rate() }))
	ratio := spreadOf(perFsync)
	fmt.Fprintf(&out, "\nOne fsync of 4 KiB in the same folder: %.3f ms (%.3f – %.3f); a record costs %.4f of it (%.4f – %.4f).\n\n",
		fsync.Median, fsync.Least, fsync.Most, ratio.Median, ratio.Least, ratio.Most)

	fmt.Fprintf(&out, "## The same by processor time of all processes\n\n| | ratio | median | min – max | floor of the rates | |\n| --- | --- | ---: | ---: | ---: | --- |\n")
	for _, f := range byTime {
		f.Holds = f.Median >= f.Floor
		f.print(&out)
	}

	median := func(name, without string) float64 {
		return 1e6 * spreadOf(each(b.byName[name].Samples, func(s sample) float64 { return s.total(without) })).Median
	}
	for _, name := range []string{"sign", "stamped"} {
		least := map[string]float64{"sign": 0.30, "stamped": 0.18}[name]
		fmt.Fprintf(&out, "\n%s: (b)'s floor leaves %.0f µs of processor time an operation (csign's %.0f ÷ %.2f); it takes %.0f, of them %.0f in the client.\n",
			name, median("csign", "")/least, median("csign", ""), least, median(name, ""), median(name, "")-median(name, roleClient))
	}

	fmt.Fprintf(&out, "\n## Rates\n\n| case | goroutines | ops/s median | min – max | p50 ms | p99 ms | other processes, cores | projection behind at the end |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n")
	for _, c := range b.cases {
		r := spreadOf(each(c.Samples, sample.rate))
		lag := ""
		if c.journal {
			lag = fmt.Sprintf("%.0f entries", spreadOf(each(c.Samples, func(s sample) float64 { return float64(s.Lag) })).Median)
		}
		fmt.Fprintf(&out, "| %s | %d | %.0f | %.0f – %.0f | %.3f | %.3f | %.2f | %s |\n", c.Name, c.Conns, r.Median, r.Least, r.Most,
			spreadOf(each(c.Samples, func(s sample) float64 { return s.P50 })).Median, spreadOf(each(c.Samples, func(s sample) float64 { return s.P99 })).Median,
			spreadOf(each(c.Samples, func(s sample) float64 { return s.Others })).Median, lag)
	}

	roles := map[string]bool{}
	for _, c := range b.cases {
		for role, used := range c.Samples[0].CPU {
			roles[role] = roles[role] || used > 0
		}
	}
	var names []string
	for role, used := range roles {
		if used {
			names = append(names, role)
		}
	}
	sort.Strings(names)
	fmt.Fprintf(&out, "\n## Processor time of one operation, µs by process (medians)\n\nOf cases with journal entries until the projection has caught up.\n\n| case | %s | sum |\n| --- |%s ---: |\n", strings.Join(names, " | "), strings.Repeat(" ---: |", len(names)))
	for _, c := range b.cases {
		fmt.Fprintf(&out, "| %s |", c.Name)
		sum := 0.0
		for _, role := range names {
			used := 1e6 * spreadOf(each(c.Samples, func(s sample) float64 { return s.cpu(role) })).Median
			sum += used
			fmt.Fprintf(&out, " %.1f |", used)
		}
		fmt.Fprintf(&out, " %.1f |\n", sum)
	}
	for _, p := range b.profiled {
		p.print(&out)
	}
	fmt.Print(out.String())
	if b.results == "" {
		return nil
	}
	if err := os.MkdirAll(b.results, 0o755); err != nil {
		return err
	}
	data, err := json.MarshalIndent(struct {
		Machine machineInfo    `json:"machine"`
		Floors  []floor        `json:"floors"`
		Cases   []*benchCase   `json:"cases"`
		Profile []profileTable `json:"profiles,omitempty"`
		ByTime  []floor        `json:"by_processor_time"`
	}{machine, floors, b.cases, b.profiled, byTime}, "", "  ")
	if err != nil {
		return err
	}
	for _, p := range b.profiled {
		picture := flame("处理器时间：设备进程 (the appliance's processor time): "+p.Load, p.stacks)
		if err := os.WriteFile(filepath.Join(b.results, "flame-"+p.Load+".svg"), picture, 0o644); err != nil {
			return err
		}
	}
	return errors.Join(
		os.WriteFile(filepath.Join(b.results, "bench.md"), []byte(out.String()), 0o644),
		os.WriteFile(filepath.Join(b.results, "bench.json"), append(data, '\n'), 0o644),
	)
}

func each[T any](in []T, f func(T) float64) []float64 {
	out := make([]float64, len(in))
	for i, v := range in {
		out[i] = f(v)
	}
	return out
}

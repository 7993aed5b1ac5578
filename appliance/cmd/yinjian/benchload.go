package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"yinjian/api/wire"
	"yinjian/appliance/account"
	"yinjian/appliance/evidence"
	"yinjian/hsm"
	"yinjian/ntp/sysclock"
)

const benchLoadText = `用户各用一个 TLS 连接，按业务系统的方式认证（HMAC-SM3），应答即发下一次；施压者是单独的进程。各轮交错进行，给出中位数与范围。
预热中的请求另计。设备、密码机与施压者共用本机处理器；“分开”指设备及其密码机只用第 0 个处理器，施压者只用第 1 个。

Each user has a TLS connection of its own, authenticates as business systems do (HMAC-SM3) and asks again when it has the answer; the
loader is a process of its own. Rounds are interleaved; medians and ranges. What is answered while warming up is told apart.

  sign         POST /v1/sign alone, SM2, raw, 2 KiB, consent app-asserted; everything shares the processors
  mix          70 % sign, 10 % batches of ten, 10 % verify (a raw signature, its chain and its token), 10 % timestamp
  …, apart     the same with appliance and cipher machine on processor 0 and the loader on processor 1

  (1) sign p99            of POST /v1/sign over (users ÷ requests a second), which is the mean when nobody pauses     ≤ 3
  (2) sign p99, apart     the same with the loader on the other processor                                            ≤ 2
  (3) errors              of all answers in all rounds and in the long run of the mix                                 = 0`

// roleLoader is the process that loads; roleClient is this one, which only looks on.
const roleLoader = "loader"

// A loadBench is one measurement of the whole under load.
type loadBench struct {
	*bench
	loader
	warm, long time.Duration
	signers    int
	stamp      string
	hold       string // file of the target: prepare, and wait
	scenes     []*loadScene
	endless    *loadScene
}

// A loadScene is one way to load, with what was seen in each round.
type loadScene struct {
	Name    string       `json:"name"`
	Mix     string       `json:"mix"`
	Apart   bool         `json:"apart"`
	Samples []loadSample `json:"samples"`
}

// A loadSample is one scene in one round.
type loadSample struct {
	loadResult
	CPU    map[string]float64 `json:"cpu_seconds"`  // by role, while it was measured
	Waits  map[string]float64 `json:"wait_seconds"` // for a processor, likewise
	RSS    map[string]int64   `json:"rss_bytes"`    // by role, at the end
	Others float64            `json:"other_cores"`
}

func (s loadSample) rate() float64 { return float64(s.All.Requests) / s.Seconds }

// signP99 is p99 of POST /v1/sign over what Little's law says of the mean.
func (s loadSample) signP99() float64 {
	return s.Classes[loadNames[loadSign]].P99 / 1000 / (float64(s.Users) / s.rate())
}

func benchLoadCommand() *cobra.Command {
	b := &loadBench{bench: &bench{}}
	var attach bool
	c := &cobra.Command{
		Use: "bench-load --dir DIR", Hidden: true, Short: "测量负载 (measure under load)", Long: benchLoadText, Args: exactArgs(0),
		RunE: func(c *cobra.Command, _ []string) (err error) {
			if b.rounds < 1 || b.each <= 0 || b.warm <= 0 || b.signers < 1 {
				return usageError{errors.New("--rounds、--each、--warm-up、--signers 须为正 (must be positive)")}
			}
			if b.stamp != account.StampNone && b.stamp != account.StampRequired {
				return usageError{fmt.Errorf("--stamp: %s | %s", account.StampNone, account.StampRequired)}
			}
			if err := b.check(); err != nil {
				return err
			}
			if b.folder, err = filepath.Abs(b.folder); err != nil {
				return err
			}
			return b.run(c.Context(), attach)
		},
	}
	loaderFlags(c, &b.loader, 500, 0)
	f := c.Flags()
	f.StringVar(&b.folder, "dir", "out/load", "目录，每次重建 (folder, made anew)")
	f.StringVar(&b.results, "results", "", "结果目录：load.md、load.json、load.svg (folder for the results)")
	f.IntVar(&b.rounds, "rounds", 7, "轮数 (rounds)")
	f.DurationVar(&b.each, "each", 10*time.Second, "每项每轮时长 (time of each case in each round)")
	f.DurationVar(&b.warm, "warm-up", 4*time.Second, "每项的预热，另计 (warm-up of each, told apart)")
	f.DurationVar(&b.long, "long", 0, "最后再以混合负载运行多久 (a long run of the mix at the end)")
	f.IntVar(&b.signers, "signers", 64, "签名人数 (signers)")
	f.StringVar(&b.stamp, "stamp", account.StampNone, "签名是否带时间戳 (whether signatures are stamped): "+account.StampNone+" | "+account.StampRequired)
	f.StringVar(&b.hold, "target", "", "只准备：写出此文件并等到标准输入结束，供其他施压工具使用 (prepare, write this file and wait until the standard input ends)")
	f.BoolVar(&attach, "attach", false, "测量在 DIR 中运行的设备，不新建 (measure the appliance that runs in DIR)")
	return c
}

func (b *loadBench) run(ctx context.Context, attach bool) (err error) {
	setMemory()
	clock, err := sysclock.Open()
	if err != nil {
		return err
	}
	b.demo = &demo{dir: b.folder, clock: clock, begun: clock.Monotonic()}
	if attach {
		err = b.attach()
	} else {
		if err := b.fresh(ctx); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, b.stopServer()) }()
		err = b.startServer(ctx)
	}
	if err != nil {
		return err
	}
	file := filepath.Join(b.dir, "load-target.json")
	if b.hold != "" {
		file = b.hold
	}
	if err := b.writeTarget(ctx, file, b.signers, b.stamp); err != nil {
		return explain(err)
	}
	if b.hold != "" {
		fmt.Println("已准备 (prepared):", file)
		_, err := io.Copy(io.Discard, os.Stdin)
		return err
	}
	fmt.Println(benchLoadText)
	fmt.Println()
	return b.measureAll(ctx, file)
}

// writeTarget registers applications and signers, and writes what loaders have to know.
func (d *demo) writeTarget(ctx context.Context, file string, signers int, stamp string) error {
	if err := d.register(ctx); err != nil {
		return err
	}
	t := loadTarget{API: d.ends.API, CA: d.ends.TLSCA}
	for i := range benchApps {
		id := fmt.Sprintf("load-%d", i)
		if _, err := d.open(ctx, id, "压力测试", "本部", stamp, string(evidence.AppAsserted)); err != nil {
			return err
		}
		b, err := os.ReadFile(filepath.Join(d.dir, "credentials", id+".json"))
		if err != nil {
			return err
		}
		var a loadApplication
		if err := json.Unmarshal(b, &a); err != nil {
			return err
		}
		t.Applications = append(t.Applications, a)
	}
	for at := 0; at < signers; at += staffPart {
		req := wire.ImportSigners{}
		for i := at; i < min(at+staffPart, signers); i++ {
			id := fmt.Sprintf("L%05d", i)
			t.Signers = append(t.Signers, id)
			req.Signers = append(req.Signers, wire.ImportSigner{
				ID: id, Name: fmt.Sprintf("压力测试%d", i), Department: fmt.Sprintf("科室%d", i%40), Campus: "本部", Algorithms: []string{string(hsm.SM2)},
			})
		}
		if _, err := d.admin.ImportSigners(ctx, req); err != nil {
			return err
		}
	}
	text, err := json.MarshalIndent(t, "", "  ")
	if err != nil {
		return err
	}
	return errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, append(text, '\n'), 0o600))
}

// measureAll is the rounds and the long run.
func (b *loadBench) measureAll(ctx context.Context, target string) error {
	alone := loadMix{loadSign: 100}
	b.scenes = []*loadScene{{Name: "sign", Mix: alone.String()}, {Name: "mix", Mix: b.mix.String()}}
	if runtime.NumCPU() > 1 {
		b.scenes = append(b.scenes, &loadScene{Name: "sign, apart", Mix: alone.String(), Apart: true}, &loadScene{Name: "mix, apart", Mix: b.mix.String(), Apart: true})
	}
	for round := range b.rounds {
		for _, s := range b.scenes {
			if err := b.scene(ctx, s, target, b.each, uint64(round)); err != nil {
				return fmt.Errorf("%s: %w", s.Name, explain(err))
			}
		}
		fmt.Printf("\r第 %d/%d 轮 round", round+1, b.rounds)
	}
	fmt.Println()
	if b.long > 0 {
		b.endless = &loadScene{Name: "mix, long", Mix: b.mix.String()}
		if err := b.scene(ctx, b.endless, target, b.long, uint64(b.rounds)); err != nil {
			return explain(err)
		}
	}
	return b.reportLoad()
}

// scene loads once. The loader is this program in a process of its own.
func (b *loadBench) scene(ctx context.Context, s *loadScene, target string, long time.Duration, round uint64) (err error) {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	args := append([]string{"bench-loader", target, "--watched", "--warm-up", b.warm.String(), "--for", long.String()}, b.args(s.Mix, b.seed+round)...)
	if s.Apart {
		args = append(args, "--cpu", "1")
		if err := b.pinAppliance(0); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, b.pinAppliance(-1)) }()
	}
	cmd := exec.CommandContext(ctx, self, args...)
	var answer, said bytes.Buffer
	cmd.Stdout = &answer
	// Ours ends with us: see startServer.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	words, err := cmd.StderrPipe()
	if err != nil {
		return err
	}
	seen, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	b.own = map[int]string{cmd.Process.Pid: roleLoader}
	defer func() { b.own = nil }()
	var before, after processorTime
	var begun time.Time
	sample := loadSample{CPU: map[string]float64{}, Waits: map[string]float64{}}
	lines := bufio.NewScanner(words)
	for lines.Scan() {
		switch lines.Text() {
		case "measuring":
			begun = time.Now() // interval
			before, err = b.processors()
		case "measured":
			if after, err = b.processors(); err == nil {
				sample.RSS, err = b.resident()
			}
			sample.Others = time.Since(begun).Seconds()
		default:
			fmt.Fprintln(&said, lines.Text())
			continue
		}
		if err == nil {
			_, err = fmt.Fprintln(seen)
		}
		if err != nil {
			return errors.Join(err, cmd.Process.Kill(), cmd.Wait())
		}
	}
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("%w\n%s", err, said.String())
	}
	if err := json.Unmarshal(answer.Bytes(), &sample.loadResult); err != nil {
		return err
	}
	busy := after.busy - before.busy
	for role, used := range after.roles {
		sample.CPU[role] = used - before.roles[role]
		busy -= sample.CPU[role]
		sample.Waits[role] = after.waits[role] - before.waits[role]
	}
	sample.Others = max(busy, 0) / sample.Others
	s.Samples = append(s.Samples, sample)
	return nil
}

// pinAppliance has the appliance and its processes run on one processor, or with -1 on any.
func (b *loadBench) pinAppliance(cpu int) error {
	roles, err := b.processes()
	if err != nil {
		return err
	}
	for pid := range roles {
		if b.own[pid] != "" {
			continue
		}
		if err := pin(pid, cpu); err != nil {
			return err
		}
	}
	return nil
}

// resident is the memory of each process of the appliance, in bytes, by role.
func (b *bench) resident() (map[string]int64, error) {
	roles, err := b.processes()
	if err != nil {
		return nil, err
	}
	out := map[string]int64{}
	for pid, role := range roles {
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			return nil, err
		}
		for line := range strings.Lines(string(status)) {
			if f := strings.Fields(line); len(f) == 3 && f[0] == "VmRSS:" {
				kb, err := strconv.ParseInt(f[1], 10, 64)
				if err != nil {
					return nil, err
				}
				out[role] += kb << 10
			}
		}
	}
	return out, nil
}

// limits are the ratios that are asked for.
func (b *loadBench) limits() (all []poolRatio) {
	for _, s := range b.scenes {
		switch s.Name {
		case "sign":
			all = append(all, poolRatio{Name: "(1) sign p99 ÷ (users ÷ rate)", Floor: 3, Samples: each(s.Samples, loadSample.signP99)})
		case "sign, apart":
			all = append(all, poolRatio{Name: "(2) sign p99 ÷ (users ÷ rate), loader on the other processor", Floor: 2, Samples: each(s.Samples, loadSample.signP99)})
		}
	}
	return all
}

// slowestSeconds is, for each round that has whole seconds, how many were answered in the slowest of them over the round's rate.
func slowestSeconds(samples []loadSample) (all []float64) {
	for _, s := range samples {
		answered := map[float64]int64{} // a second without an answer has no step
		for _, step := range s.Steps {
			answered[step.At] = step.Requests
		}
		var measured []int64
		for at := math.Ceil(s.Begun); at+1 <= s.Begun+s.Seconds; at++ {
			measured = append(measured, answered[at])
		}
		if len(measured) > 0 {
			all = append(all, float64(slices.Min(measured))/s.rate())
		}
	}
	return all
}

// failures are the errors of all answers, and how many requests there were.
func (b *loadBench) failures() (failed, asked int64) {
	for _, s := range b.all() {
		for _, one := range s.Samples {
			failed, asked = failed+one.errors(), asked+one.All.Requests
		}
	}
	return failed, asked
}

func (b *loadBench) all() []*loadScene {
	if b.endless == nil {
		return b.scenes
	}
	return append(slices.Clone(b.scenes), b.endless)
}

func (b *loadBench) reportLoad() error {
	machine := machineOf(b.dir, b.now())
	var out strings.Builder
	fmt.Fprintf(&out, "# Measured by `make load`\n\nWritten by the program; not to be edited. Definitions: `yinjian bench-load --help`.\n\n"+
		"%s, revision %s, %s; %s, %d cores, Linux %s; %s; load average %s\n\n%d users, pause %v, %d signers, documents of %d bytes, batches of %d, stamp %s; %d rounds of %v, warm-up %v each, seed %d\n",
		machine.At, machine.Revision, machine.Go, machine.CPU, machine.Cores, machine.Kernel, machine.Filesystem, machine.Load,
		b.users, b.think, b.signers, b.bytes, b.batch, b.stamp, b.rounds, b.each, b.warm, b.seed)
	if b.endless != nil {
		fmt.Fprintf(&out, "\nLong run of the mix: %v.\n", b.long)
	}
	fmt.Fprintf(&out, "\n| | median | min – max | limit | |\n| --- | ---: | ---: | ---: | --- |\n%s", poolTable(b.limits()))
	failed, asked := b.failures()
	fmt.Fprintf(&out, "| (3) errors of %d requests | %d | | = 0 | %s |\n", asked, failed, map[bool]string{true: "holds", false: "**fails**"}[failed == 0])
	fmt.Fprint(&out, "\n## Rates\n\n| load | requests/s | min – max | documents/s | answers during warm-up | errors | other processes, cores |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n")
	for _, s := range b.all() {
		r := spreadOf(each(s.Samples, loadSample.rate))
		warm, failed := int64(0), int64(0)
		for _, one := range s.Samples {
			warm, failed = warm+one.WarmUp.Requests, failed+one.errors()
		}
		fmt.Fprintf(&out, "| %s | %.0f | %.0f – %.0f | %.0f | %d | %d | %.2f |\n", s.Name, r.Median, r.Least, r.Most,
			spreadOf(each(s.Samples, func(s loadSample) float64 { return float64(s.All.Documents) / s.Seconds })).Median, warm, failed,
			spreadOf(each(s.Samples, func(s loadSample) float64 { return s.Others })).Median)
	}
	fmt.Fprint(&out, "\n## Latency, ms (medians of the rounds; the slowest answer of all)\n\n| load | class | requests | p50 | p95 | p99 | slowest |\n| --- | --- | ---: | ---: | ---: | ---: | ---: |\n")
	for _, s := range b.all() {
		for _, name := range loadNames {
			var requests int64
			most := 0.0
			for _, one := range s.Samples {
				requests += one.Classes[name].Requests
				most = max(most, one.Classes[name].Most)
			}
			if requests == 0 {
				continue
			}
			q := func(f func(*loadTally) float64) float64 {
				return spreadOf(each(s.Samples, func(s loadSample) float64 { return f(s.Classes[name]) })).Median
			}
			fmt.Fprintf(&out, "| %s | %s | %d | %.1f | %.1f | %.1f | %.0f |\n", s.Name, name, requests,
				q(func(t *loadTally) float64 { return t.P50 }), q(func(t *loadTally) float64 { return t.P95 }), q(func(t *loadTally) float64 { return t.P99 }), most)
		}
	}
	roles := slices.Sorted(maps.Keys(b.scenes[0].Samples[0].CPU))
	var slowest strings.Builder
	for _, s := range b.all() {
		if seconds := slowestSeconds(s.Samples); len(seconds) > 0 {
			r := spreadOf(seconds)
			fmt.Fprintf(&slowest, "| %s | %.2f | %.2f – %.2f |\n", s.Name, r.Median, r.Least, r.Most)
		}
	}
	if slowest.Len() > 0 {
		fmt.Fprintf(&out, "\n## The slowest whole second of a round ÷ the round's rate\n\n| load | median | min – max |\n| --- | ---: | ---: |\n%s", slowest.String())
	}
	roles = slices.Sorted(maps.Keys(b.scenes[0].Samples[0].CPU))
	for _, one := range []struct {
		title string
		of    func(loadSample) map[string]float64
	}{
		{"Processor time of one request", func(s loadSample) map[string]float64 { return s.CPU }},
		{"Threads' waiting for a processor, of one request", func(s loadSample) map[string]float64 { return s.Waits }},
	} {
		fmt.Fprintf(&out, "\n## %s, µs by process (medians)\n\n| load | %s |\n| --- |%s\n", one.title, strings.Join(roles, " | "), strings.Repeat(" ---: |", len(roles)))
		for _, s := range b.all() {
			fmt.Fprintf(&out, "| %s |", s.Name)
			for _, role := range roles {
				fmt.Fprintf(&out, " %.1f |", 1e6*spreadOf(each(s.Samples, func(s loadSample) float64 { return one.of(s)[role] / float64(s.All.Requests) })).Median)
			}
			fmt.Fprintln(&out)
		}
	}
	fmt.Fprintf(&out, "\n## Memory at the end of the last round, MB\n\n| %s |\n|%s\n|", strings.Join(roles, " | "), strings.Repeat(" ---: |", len(roles)))
	last := b.all()[len(b.all())-1].Samples
	for _, role := range roles {
		fmt.Fprintf(&out, " %.1f |", float64(last[len(last)-1].RSS[role])/1e6)
	}
	fmt.Fprintln(&out)
	b.printErrors(&out)
	fmt.Print(out.String())
	if b.results == "" {
		return nil
	}
	j, err := json.MarshalIndent(struct {
		Machine machineInfo  `json:"machine"`
		Limits  []poolRatio  `json:"limits"`
		Errors  int64        `json:"errors"`
		Users   int          `json:"users"`
		Signers int          `json:"signers"`
		Bytes   int          `json:"document_bytes"`
		Batch   int          `json:"batch"`
		Stamp   string       `json:"stamp"`
		Scenes  []*loadScene `json:"scenes"`
	}{machine, b.limits(), failed, b.users, b.signers, b.bytes, b.batch, b.stamp, b.all()}, "", " ")
	if err != nil {
		return err
	}
	return errors.Join(os.MkdirAll(b.results, 0o755), os.WriteFile(filepath.Join(b.results, "load.md"), []byte(out.String()), 0o644),
		os.WriteFile(filepath.Join(b.results, "load.json"), append(j, '\n'), 0o644), os.WriteFile(filepath.Join(b.results, "load.svg"), b.plot(), 0o644))
}

func (b *loadBench) printErrors(out *strings.Builder) {
	for _, s := range b.all() {
		sum := map[string]int64{}
		for _, one := range s.Samples {
			for code, n := range one.All.Errors {
				sum[code] += n
			}
		}
		for _, code := range slices.Sorted(maps.Keys(sum)) {
			fmt.Fprintf(out, "\n%s: %d × %s\n", s.Name, sum[code], code)
		}
	}
}

// plot draws the last scene over time: requests a second, and the latencies of their quantiles.
func (b *loadBench) plot() []byte {
	last := b.all()[len(b.all())-1]
	s := last.Samples[len(last.Samples)-1]
	c := chart{
		title: fmt.Sprintf("%d 个用户，%s：每秒请求数与延迟 (%s: requests a second, latency)", s.Users, last.Name, last.Mix), logY: true,
		xText: func(v float64) string { return fmt.Sprintf("%.0f s", v) }, yText: func(v float64) string { return fmt.Sprintf("%g", v) },
	}
	rate, p50, p99 := series{name: "请求/s requests/s"}, series{name: "p50 ms"}, series{name: "p99 ms"}
	for _, step := range s.Steps {
		rate.points = append(rate.points, [2]float64{step.At, max(1, float64(step.Requests))})
		p50.points = append(p50.points, [2]float64{step.At, max(0.1, step.P50)})
		p99.points = append(p99.points, [2]float64{step.At, max(0.1, step.P99)})
	}
	c.series = []series{rate, p50, p99}
	if n := len(s.Steps); n > 0 {
		c.xTicks = evenly(s.Steps[n-1].At, 1, 8)
		c.spans = []chartSpan{{0, max(0, s.Steps[n-1].At-s.Seconds), "预热 warm-up"}}
	}
	return c.svg()
}

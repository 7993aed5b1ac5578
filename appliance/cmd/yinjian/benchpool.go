package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"

	"yinjian/appliance"
	"yinjian/hsm"
	"yinjian/hsm/pkcs11"
	"yinjian/hsm/pool"
	"yinjian/hsm/worker"
)

const benchPoolText = `各软件密码机为独立进程，密封状态相同（同一批密钥），各由自己的工作进程驱动；各轮交错进行，给出中位数与范围。
Software cipher machines in processes of their own, with the same sealed state, each driven by its own worker. Rounds are
interleaved; medians and ranges. Everything shares this machine's processors.

  (1) two ÷ one          signatures a second of two machines over one, service time 1 ms, 4 sessions each, 32 signers     ≥ 1.8
  (2) shares             of three equal machines, service time 1 ms, 12 signers: the largest departure from a third        ≤ 10 %
  (3) after kill -9      of one of two machines at 64 signers: the slowest answer over the call deadline (5 s), no error    ≤ 1
  (4) greedy             median latency of one application beside another at 10 × its quota, over the same alone;
                         one machine, service time 1 ms, 4 sessions, quota 200 signatures a second                         ≤ 1.25
      greedy, no quota   the same beside 16 signers of an application without a quota: turns alone (no floor)
  (5) many keys          cost of a signature with one of N token keys in turn over that with one, two machines, 16 signers  ≤ 1.15`

// benchPoolCommand measures several machines; the Makefile's bench calls it.
func benchPoolCommand() *cobra.Command {
	b := &poolBench{}
	c := &cobra.Command{
		Use: "bench-pool --dir DIR", Hidden: true, Short: "测量多台密码机 (measure several cipher machines)", Long: benchPoolText, Args: exactArgs(0),
		RunE: func(c *cobra.Command, _ []string) error {
			if b.rounds < 1 || b.each <= 0 || b.keys < 1 {
				return usageError{errors.New("--rounds、--each、--keys 须为正 (must be positive)")}
			}
			return b.run(c.Context())
		},
	}
	f := c.Flags()
	f.StringVar(&b.dir, "dir", "out/bench-pool", "目录，每次重建 (folder, made anew)")
	f.StringVar(&b.results, "results", "", "结果目录：pool.md、pool.json (folder for the results)")
	f.IntVar(&b.rounds, "rounds", 7, "轮数 (rounds)")
	f.DurationVar(&b.each, "each", 800*time.Millisecond, "每项每轮时长 (time of each case in each round)")
	f.IntVar(&b.keys, "keys", 6300, "密钥数 (token keys)")
	return c
}

// A poolBench is one measurement.
type poolBench struct {
	dir, results string
	rounds, keys int
	each         time.Duration

	module string
	pin    []byte
	source string // the sealed state that every machine gets a copy of
	labels []string
	undo   []func()
}

// A poolRatio is one line of the result.
type poolRatio struct {
	Name    string    `json:"name"`
	Samples []float64 `json:"samples"` // one a round
	Floor   float64   `json:"limit"`   // 0: none
	Least   bool      `json:"least"`   // the limit is a least value, otherwise a most
	Note    string    `json:"note,omitempty"`
}

func (r poolRatio) median() float64 {
	s := slices.Sorted(slices.Values(r.Samples))
	return s[len(s)/2]
}

func (r poolRatio) verdict() string {
	switch m := r.median(); {
	case r.Floor == 0:
		return ""
	case r.Least == (m >= r.Floor) || m == r.Floor:
		return "holds"
	}
	return "**fails**"
}

func (b *poolBench) run(ctx context.Context) (err error) {
	defer func() {
		for _, f := range slices.Backward(b.undo) {
			f()
		}
	}()
	if err := b.prepare(ctx); err != nil {
		return err
	}
	fmt.Println(benchPoolText)
	fmt.Println()
	var ratios []poolRatio
	for _, measure := range []func(context.Context) ([]poolRatio, error){b.scaling, b.shares, b.killed, b.greedy, b.manyKeys} {
		r, err := measure(ctx)
		if err != nil {
			return err
		}
		ratios = append(ratios, r...)
		fmt.Print(poolTable(r))
	}
	if b.results == "" {
		return nil
	}
	page := fmt.Sprintf("# Measured by `make bench`: several cipher machines\n\nWritten by the program; not to be edited. Definitions: `yinjian bench-pool --help`.\n\n"+
		"%d rounds of %v; load average %s\n\n| | median | min – max | limit | |\n| --- | ---: | ---: | ---: | --- |\n%s", b.rounds, b.each, loadAverage(), poolTable(ratios))
	j, err := json.MarshalIndent(ratios, "", "  ")
	if err != nil {
		return err
	}
	return errors.Join(os.MkdirAll(b.results, 0o755), os.WriteFile(filepath.Join(b.results, "pool.md"), []byte(page), 0o644),
		os.WriteFile(filepath.Join(b.results, "pool.json"), append(j, '\n'), 0o644))
}

func loadAverage() string {
	text, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "?"
	}
	return string(bytes.TrimSpace(text))
}

func poolTable(ratios []poolRatio) string {
	var out bytes.Buffer
	for _, r := range ratios {
		limit := ""
		if r.Floor > 0 {
			limit = fmt.Sprintf("%s %.2f", map[bool]string{true: "≥", false: "≤"}[r.Least], r.Floor)
		}
		note := ""
		if r.Note != "" {
			note = " (" + r.Note + ")"
		}
		fmt.Fprintf(&out, "| %s%s | %.3f | %.3f – %.3f | %s | %s |\n", r.Name, note, r.median(), slices.Min(r.Samples), slices.Max(r.Samples), limit, r.verdict())
	}
	return out.String()
}

// prepare makes the token and its keys, once.
func (b *poolBench) prepare(ctx context.Context) (err error) {
	if b.dir, err = filepath.Abs(b.dir); err != nil {
		return err
	}
	if err := os.RemoveAll(b.dir); err != nil {
		return err
	}
	if b.module, err = defaultModule(); err != nil {
		return err
	}
	b.pin, b.source = []byte("bench-pin"), filepath.Join(b.dir, "source")
	if err := errors.Join(os.MkdirAll(b.source, 0o700), os.WriteFile(filepath.Join(b.dir, "phrase"), []byte("bench passphrase\n"), 0o600)); err != nil {
		return err
	}
	m, err := b.start(ctx, b.source, 0)
	if err != nil {
		return err
	}
	defer m.stop(syscall.SIGTERM)
	if _, err := pkcs11.Provision(pkcs11.ProvisionConfig{Module: b.module, ModuleArgs: m.args(), Slot: pkcs11.AnySlot, Label: "staff", SOPIN: []byte("bench-officer"), UserPIN: b.pin}); err != nil {
		return err
	}
	w, err := b.drive(m, 8)
	if err != nil {
		return err
	}
	defer w.Close()
	for n := range b.keys {
		label := fmt.Sprintf("staff/%05d", n)
		if _, err := w.GenerateKey(ctx, hsm.KeySpec{Label: label, Algorithm: hsm.SM2}); err != nil {
			return err
		}
		b.labels = append(b.labels, label)
	}
	return nil
}

// A benchMachine is a software cipher machine in a process of its own.
type benchMachine struct {
	dir string
	cmd *exec.Cmd
}

func (m *benchMachine) args() string { return "socket='" + filepath.Join(m.dir, "p11.sock") + "'" }

func (m *benchMachine) stop(s syscall.Signal) {
	_ = m.cmd.Process.Signal(s) // it may have ended
	_ = m.cmd.Wait()
}

func (b *poolBench) start(ctx context.Context, dir string, service time.Duration) (*benchMachine, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	m := &benchMachine{dir: dir, cmd: exec.Command(self, "softtoken", "--state", dir, "--passphrase-file", filepath.Join(b.dir, "phrase"), "--service-time", service.String())}
	m.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := m.cmd.Start(); err != nil {
		return nil, err
	}
	if err := appliance.WaitForSocket(ctx, filepath.Join(dir, "p11.sock"), 30*time.Second); err != nil {
		m.stop(syscall.SIGKILL)
		return nil, err
	}
	return m, nil
}

func (b *poolBench) drive(m *benchMachine, sessions int) (*worker.Client, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	w, err := worker.Start(worker.Config{
		Command: []string{self, "worker"}, Class: hsm.Staff, Log: benchLog(),
		Params: worker.StartParams{Module: b.module, ModuleArgs: m.args(), TokenLabel: "staff", PIN: b.pin, Profile: "neutral", MaxSessions: sessions, WrappedKeys: 1},
	})
	if err == nil && w.State().Phase != worker.Ready {
		err = errors.Join(w.State().LastError, w.Close())
	}
	return w, err
}

func benchLog() logrus.FieldLogger {
	log := newLog(logrus.ErrorLevel)
	log.SetOutput(io.Discard) // machines are killed on purpose
	return log
}

// machines runs n machines on copies of the sealed state, each with its worker, until the measurement ends.
func (b *poolBench) machines(ctx context.Context, name string, n, sessions int, service time.Duration) (ms []*benchMachine, ws []*worker.Client, err error) {
	for i := range n {
		m, err := b.copied(ctx, filepath.Join(b.dir, fmt.Sprintf("%s-%d", name, i)), service)
		if err != nil {
			return nil, nil, err
		}
		w, err := b.drive(m, sessions)
		if err != nil {
			return nil, nil, err
		}
		b.undo = append(b.undo, func() { _ = w.Close() })
		ms, ws = append(ms, m), append(ws, w)
	}
	return ms, ws, nil
}

// copied runs a machine on a copy of the sealed state until the measurement ends.
func (b *poolBench) copied(ctx context.Context, dir string, service time.Duration) (*benchMachine, error) {
	if err := os.CopyFS(dir, os.DirFS(b.source)); err != nil {
		return nil, err
	}
	files, _ := filepath.Glob(filepath.Join(dir, "*")) // the pattern is well-formed
	for _, f := range files {
		if err := os.Chmod(f, 0o600); err != nil {
			return nil, err
		}
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		return nil, err
	}
	m, err := b.start(ctx, dir, service)
	if err == nil {
		b.undo = append(b.undo, func() { m.stop(syscall.SIGTERM) })
	}
	return m, err
}

// pool makes one of the workers, and looks after it until the measurement ends.
func (b *poolBench) pool(ctx context.Context, sessions int, ws ...*worker.Client) (*pool.Pool, error) {
	p := pool.New(pool.Config{Class: hsm.Staff, Log: benchLog()})
	for i, w := range ws {
		if err := p.Add(ctx, pool.Machine{Name: string(rune('a' + i)), Token: w, Weight: 1, Sessions: sessions}); err != nil {
			return nil, err
		}
	}
	run, stop := context.WithCancel(context.WithoutCancel(ctx))
	ended := make(chan error, 1)
	go func() { ended <- p.Run(run) }()
	b.undo = append(b.undo, func() { stop(); <-ended })
	return p, nil
}

// load signs on so many goroutines for so long, and answers signatures a second.
func load(ctx context.Context, p *pool.Pool, signers int, long time.Duration, label func(n int64) string) (float64, error) {
	var n atomic.Int64
	digest := make([]byte, 32)
	c := &benchCase{Conns: signers, op: func(ctx context.Context, _ int) error {
		_, err := p.Do(ctx, label(n.Add(1)), hsm.SignSM2E, digest)
		return err
	}}
	begun := time.Now() // interval
	done, err := c.run(ctx, long)
	return float64(done) / time.Since(begun).Seconds(), err
}

func (b *poolBench) first(int64) string { return b.labels[0] }

// scaling is (1).
func (b *poolBench) scaling(ctx context.Context) ([]poolRatio, error) {
	const sessions, signers = 4, 32
	_, ws, err := b.machines(ctx, "scaling", 2, sessions, time.Millisecond)
	if err != nil {
		return nil, err
	}
	one, err := b.pool(ctx, sessions, ws[0])
	if err != nil {
		return nil, err
	}
	two, err := b.pool(ctx, sessions, ws...)
	if err != nil {
		return nil, err
	}
	r := poolRatio{Name: "(1) two machines ÷ one", Floor: 1.8, Least: true}
	for range b.rounds {
		var rates [2]float64
		for i, p := range []*pool.Pool{one, two} {
			if rates[i], err = load(ctx, p, signers, b.each, b.first); err != nil {
				return nil, err
			}
		}
		r.Samples = append(r.Samples, rates[1]/rates[0])
		r.Note = fmt.Sprintf("%.0f and %.0f a second", rates[0], rates[1])
	}
	return []poolRatio{r}, nil
}

// shares is (2).
func (b *poolBench) shares(ctx context.Context) ([]poolRatio, error) {
	_, ws, err := b.machines(ctx, "shares", 3, 8, time.Millisecond)
	if err != nil {
		return nil, err
	}
	p, err := b.pool(ctx, 8, ws...)
	if err != nil {
		return nil, err
	}
	if _, err := load(ctx, p, 12, b.each, b.first); err != nil { // sessions are open
		return nil, err
	}
	r := poolRatio{Name: "(2) shares of three: largest departure from a third", Floor: 0.10}
	for range b.rounds {
		before := p.States()
		if _, err := load(ctx, p, 12, 2*b.each, b.first); err != nil {
			return nil, err
		}
		sum, worst := int64(0), 0.0
		var done [3]int64
		for i, s := range p.States() {
			done[i] = s.Done - before[i].Done
			sum += done[i]
		}
		for _, d := range done {
			worst = max(worst, 3*float64(d)/float64(sum)-1, 1-3*float64(d)/float64(sum))
		}
		r.Samples = append(r.Samples, worst)
		r.Note = fmt.Sprintf("%d, %d and %d", done[0], done[1], done[2])
	}
	return []poolRatio{r}, nil
}

// killed is (3). Each round has machines of its own.
func (b *poolBench) killed(ctx context.Context) ([]poolRatio, error) {
	const deadline = 5 * time.Second
	r := poolRatio{Name: "(3) after kill -9 at 64 signers: slowest answer ÷ call deadline", Floor: 1}
	for round := range min(b.rounds, 3) {
		ms, ws, err := b.machines(ctx, fmt.Sprintf("killed%d", round), 2, 8, time.Millisecond)
		if err != nil {
			return nil, err
		}
		p, err := b.pool(ctx, 8, ws...)
		if err != nil {
			return nil, err
		}
		var slowest atomic.Int64
		digest := make([]byte, 32)
		c := &benchCase{Conns: 64, op: func(ctx context.Context, _ int) error {
			begun := time.Now() // interval
			_, err := p.Do(ctx, b.labels[0], hsm.SignSM2E, digest)
			took := int64(time.Since(begun))
			for old := slowest.Load(); took > old && !slowest.CompareAndSwap(old, took); old = slowest.Load() {
			}
			return err
		}}
		kill := time.AfterFunc(b.each/2, func() { ms[1].stop(syscall.SIGKILL) })
		done, err := c.run(ctx, b.each+time.Second)
		kill.Stop()
		if err != nil {
			return nil, fmt.Errorf("after kill -9 a signer saw an error: %w", err)
		}
		r.Samples = append(r.Samples, time.Duration(slowest.Load()).Seconds()/deadline.Seconds())
		r.Note = fmt.Sprintf("%d signatures, the slowest after %v", done, time.Duration(slowest.Load()).Round(time.Millisecond))
	}
	return []poolRatio{r}, nil
}

// greedy is (4).
func (b *poolBench) greedy(ctx context.Context) ([]poolRatio, error) {
	const quota = 200
	_, ws, err := b.machines(ctx, "greedy", 1, 4, time.Millisecond)
	if err != nil {
		return nil, err
	}
	p, err := b.pool(ctx, 4, ws[0])
	if err != nil {
		return nil, err
	}
	digest := make([]byte, 32)
	modest := func() (float64, error) { // the median latency of an application with one signer
		ctx := hsm.WithCaller(ctx, hsm.Caller{Application: "modest"})
		var took []time.Duration
		for begun := time.Now(); time.Since(begun) < b.each; { // interval
			sent := time.Now() // interval
			if _, err := p.Do(ctx, b.labels[0], hsm.SignSM2E, digest); err != nil {
				return 0, err
			}
			took = append(took, time.Since(sent))
		}
		slices.Sort(took)
		return took[len(took)/2].Seconds(), nil
	}
	beside := func(other func(ctx context.Context)) (float64, error) {
		run, stop := context.WithCancel(ctx)
		var wg sync.WaitGroup
		wg.Go(func() { other(run) })
		median, err := modest()
		stop()
		wg.Wait()
		return median, err
	}
	over := func(ctx context.Context) { // 10 times its quota, whatever comes of it
		caller := hsm.WithCaller(ctx, hsm.Caller{Application: "greedy", Rate: quota})
		tick := time.NewTicker(time.Second / (10 * quota))
		defer tick.Stop()
		var wg sync.WaitGroup
		defer wg.Wait()
		for ctx.Err() == nil {
			select {
			case <-tick.C:
				wg.Go(func() { _, _ = p.Do(caller, b.labels[0], hsm.SignSM2E, digest) })
			case <-ctx.Done():
			}
		}
	}
	unbounded := func(ctx context.Context) {
		caller := hsm.WithCaller(ctx, hsm.Caller{Application: "greedy"})
		var wg sync.WaitGroup
		for range 16 {
			wg.Go(func() {
				for ctx.Err() == nil {
					_, _ = p.Do(caller, b.labels[0], hsm.SignSM2E, digest)
				}
			})
		}
		wg.Wait()
	}
	bounded := poolRatio{Name: "(4) median latency beside a greedy application ÷ alone", Floor: 1.25}
	turns := poolRatio{Name: "(4) the same, without a quota"}
	for range b.rounds {
		alone, err := modest()
		if err != nil {
			return nil, err
		}
		for r, other := range map[*poolRatio]func(context.Context){&bounded: over, &turns: unbounded} {
			median, err := beside(other)
			if err != nil {
				return nil, err
			}
			r.Samples = append(r.Samples, median/alone)
			r.Note = fmt.Sprintf("%.2f ms, alone %.2f ms", 1000*median, 1000*alone)
		}
	}
	return []poolRatio{bounded, turns}, nil
}

// manyKeys is (5).
func (b *poolBench) manyKeys(ctx context.Context) ([]poolRatio, error) {
	_, ws, err := b.machines(ctx, "keys", 2, 8, 0)
	if err != nil {
		return nil, err
	}
	p, err := b.pool(ctx, 8, ws...)
	if err != nil {
		return nil, err
	}
	many := func(n int64) string { return b.labels[n%int64(len(b.labels))] }
	// Each worker finds each key once: that is no cost of a signature.
	for _, w := range ws {
		alone, err := b.pool(ctx, 8, w)
		if err != nil {
			return nil, err
		}
		var n atomic.Int64
		c := &benchCase{Conns: 8, op: func(ctx context.Context, _ int) error {
			at := n.Add(1)
			if at > int64(len(b.labels)) {
				return errEnough
			}
			_, err := alone.Do(ctx, many(at), hsm.SignSM2E, make([]byte, 32))
			return err
		}}
		if _, err := c.run(ctx, time.Hour); err != nil && !errors.Is(err, errEnough) {
			return nil, err
		}
	}
	r := poolRatio{Name: fmt.Sprintf("(5) cost of a signature with one of %d keys ÷ with one", len(b.labels)), Floor: 1.15}
	labels := [2]func(int64) string{b.first, many}
	for round := range b.rounds {
		var rates [2]float64
		for i := range rates {
			i = (i + round) % 2 // neither is always measured first
			if rates[i], err = load(ctx, p, 16, b.each, labels[i]); err != nil {
				return nil, err
			}
		}
		r.Samples = append(r.Samples, rates[0]/rates[1])
		r.Note = fmt.Sprintf("%.0f and %.0f a second", rates[0], rates[1])
	}
	return []poolRatio{r}, nil
}

var errEnough = errors.New("every key was used")

package main

import (
	"bufio"
	"context"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	mathrand "math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance/evidence"
	"yinjian/ntp/sysclock"
)

// A loadTarget is the file that tells every loader, ours, k6's and JMeter's, where the appliance is and who calls. Documents are of
// random bytes; consent is the application's own (app-asserted).
type loadTarget struct {
	API          string            `json:"api"` // "https://host:port"
	CA           string            `json:"ca"`  // PEM of the CA of the appliance's TLS certificate; relative to this file
	Applications []loadApplication `json:"applications"`
	Signers      []string          `json:"signers"` // with SM2 keys
}

// A loadApplication is what the appliance wrote when the application was registered.
type loadApplication struct {
	Application string `json:"application"`
	Key         string `json:"key_hex"`
}

func readTarget(file string) (*loadTarget, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	t := &loadTarget{}
	if err := json.Unmarshal(b, t); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	if t.API == "" || t.CA == "" || len(t.Applications) == 0 || len(t.Signers) == 0 {
		return nil, fmt.Errorf("%s: 须有 api、ca、applications、signers (all four are needed)", file)
	}
	if !filepath.IsAbs(t.CA) {
		t.CA = filepath.Join(filepath.Dir(file), t.CA)
	}
	return t, nil
}

// What a user asks for.
const (
	loadSign = iota
	loadBatch
	loadVerify
	loadStamp
	loadClasses
)

var loadNames = [loadClasses]string{"sign", "batch", "verify", "timestamp"}

// A loadMix says how many of a hundred requests are of each class.
type loadMix [loadClasses]int

// usualMix is the one that the three loaders have in common.
var usualMix = loadMix{70, 10, 10, 10}

func (m loadMix) String() string {
	var parts []string
	for i, n := range m {
		parts = append(parts, fmt.Sprintf("%s=%d", loadNames[i], n))
	}
	return strings.Join(parts, ",")
}

// Set and Type make it a flag.
func (m *loadMix) Set(text string) error {
	var out loadMix
	sum := 0
	for part := range strings.SplitSeq(text, ",") {
		name, value, _ := strings.Cut(part, "=")
		n, err := strconv.Atoi(value)
		at := -1
		for i, known := range loadNames {
			if known == name {
				at = i
			}
		}
		if err != nil || n < 0 || at < 0 {
			return fmt.Errorf("%q 不是 %s 这样的一项 (is not as in that)", part, usualMix)
		}
		out[at] += n
		sum += n
	}
	if sum != 100 {
		return errors.New("各项之和须为 100 (must sum to 100)")
	}
	*m = out
	return nil
}

func (m *loadMix) Type() string { return "mix" }

func (m loadMix) pick(rnd *mathrand.Rand) int {
	at := rnd.IntN(100)
	for class, n := range m {
		if at -= n; at < 0 {
			return class
		}
	}
	return loadSign
}

// wrongAnswer is the outcome of a call whose answer is not what it has to be.
const wrongAnswer = "wrong_answer"

// A histogram counts durations in classes one part in a hundred wide, from a microsecond to a quarter of an hour.
type histogram struct {
	counts [2100]int64
	n      int64
	most   time.Duration
}

func (h *histogram) add(d time.Duration) {
	us := max(1, float64(d)/float64(time.Microsecond))
	h.counts[min(len(h.counts)-1, int(math.Log(us)/math.Log(1.01)))]++
	h.n++
	h.most = max(h.most, d)
}

func (h *histogram) merge(o *histogram) {
	for i, n := range o.counts {
		h.counts[i] += n
	}
	h.n, h.most = h.n+o.n, max(h.most, o.most)
}

// quantile is the upper edge of the class in which it lies, in milliseconds; 0 of nothing.
func (h *histogram) quantile(q float64) float64 {
	left := int64(math.Ceil(q * float64(h.n)))
	for i, n := range h.counts {
		if left -= n; left <= 0 && h.n > 0 {
			return min(math.Pow(1.01, float64(i+1))/1000, float64(h.most)/float64(time.Millisecond))
		}
	}
	return 0
}

// A loadTally counts one class of requests.
type loadTally struct {
	Requests  int64            `json:"requests"`
	Documents int64            `json:"documents"` // signed, verified or stamped
	Errors    map[string]int64 `json:"errors"`    // by problem code; of a batch, each refused document
	P50       float64          `json:"p50_ms"`
	P95       float64          `json:"p95_ms"`
	P99       float64          `json:"p99_ms"`
	Most      float64          `json:"most_ms"`

	took histogram
}

// A loadStep is what was answered in one step of the run.
type loadStep struct {
	At       float64 `json:"at_s"` // its begin
	Requests int64   `json:"requests"`
	Errors   int64   `json:"errors"`
	P50      float64 `json:"p50_ms"`
	P99      float64 `json:"p99_ms"`
}

// A loadResult is what a loader saw. What was answered during the warm-up is told apart, and in nothing else of it.
type loadResult struct {
	Users   int                   `json:"users"`
	Seconds float64               `json:"seconds"`
	WarmUp  loadTally             `json:"warm_up"`
	Classes map[string]*loadTally `json:"classes"`
	All     loadTally             `json:"all"`
	Begun   float64               `json:"measured_from_s"` // of Steps: where the warm-up ended
	Steps   []loadStep            `json:"steps"`
}

func (r *loadResult) errors() (n int64) {
	for _, one := range r.All.Errors {
		n += one
	}
	return n
}

// A loader is users who ask one after the other, each over a connection of its own.
type loader struct {
	target    *loadTarget
	users     int
	mix       loadMix
	batch     int           // documents in a batch
	bytes     int           // of a document
	think     time.Duration // between an answer and the next request: a half to one and a half of it
	ramp      time.Duration // over which users begin
	step      time.Duration
	seed      uint64
	retry     client.Retry
	clock     func() time.Time
	signed    func(*wire.SignResult)                                   // told of each acknowledged signature; may be nil
	failed    func(code string, n int64)                               // told of each error; may be nil
	unsettled func(c *client.Client, key string, req wire.SignRequest) // of one whose outcome is not known; may be nil

	roots   *x509.CertPool
	content []byte
	run     string
	serial  atomic.Int64
	stop    chan struct{}

	mu       sync.Mutex // guards what follows
	begun    time.Time
	measured time.Time // zero during the warm-up
	over     bool      // what comes now is not counted
	result   loadResult
	current  struct {
		loadStep
		took histogram
	}
}

// prepare reads what the users need.
func (l *loader) prepare() error {
	b, err := os.ReadFile(l.target.CA)
	if err != nil {
		return err
	}
	l.roots = x509.NewCertPool()
	if !l.roots.AppendCertsFromPEM(b) {
		return fmt.Errorf("%s: 没有证书 (no certificate)", l.target.CA)
	}
	l.content = make([]byte, l.bytes)
	rand.Read(l.content) // never fails (crypto/rand)
	var id [8]byte
	rand.Read(id[:])
	l.run, l.stop = hex.EncodeToString(id[:]), make(chan struct{})
	l.result.Users, l.result.Classes = l.users, map[string]*loadTally{}
	l.result.All.Errors, l.result.WarmUp.Errors = map[string]int64{}, map[string]int64{}
	for _, name := range loadNames {
		l.result.Classes[name] = &loadTally{Errors: map[string]int64{}}
	}
	return nil
}

// load runs the users until the channel stop is closed; requests under way are waited for.
func (l *loader) load(ctx context.Context) error {
	clients := make([]*client.Client, l.users)
	for i := range clients {
		a := l.target.Applications[i%len(l.target.Applications)]
		key, err := hex.DecodeString(strings.TrimSpace(a.Key))
		if err != nil {
			return fmt.Errorf("%s: key_hex: %w", a.Application, err)
		}
		c, err := client.New(client.Config{BaseURL: l.target.API, AppID: a.Application, Key: key, RootCAs: l.roots, Clock: l.clock, Retry: l.retry, Timeout: 45 * time.Second})
		if err != nil {
			return err
		}
		defer c.Close()
		clients[i] = c
	}
	l.mu.Lock()
	l.begun = time.Now() // interval
	l.mu.Unlock()
	var wg sync.WaitGroup
	for i, c := range clients {
		wg.Go(func() { l.user(ctx, i, c) })
	}
	wg.Wait()
	return nil
}

// user asks until the end.
func (l *loader) user(ctx context.Context, i int, c *client.Client) {
	rnd := mathrand.New(mathrand.NewPCG(l.seed, uint64(i)))
	if !l.pause(l.ramp * time.Duration(i) / time.Duration(l.users)) {
		return
	}
	var last *wire.SignResult
	for {
		class := l.mix.pick(rnd)
		if class == loadVerify && last == nil {
			class = loadSign
		}
		signer := l.target.Signers[rnd.IntN(len(l.target.Signers))]
		begun := time.Now() // interval
		var documents int64
		failed := map[string]int64{}
		switch class {
		case loadSign:
			key, req := l.key(), l.request(signer)
			r, err := c.Sign(ctx, key, &req)
			switch {
			case err == nil && (r.RecordID == "" || len(r.Signature) == 0):
				failed[wrongAnswer]++
			case err == nil:
				documents, last = 1, r
				l.told(r)
			default:
				failed[outcomeOf(err)]++
				if client.OutcomeUnknown(err) && l.unsettled != nil {
					l.unsettled(c, key, req)
				}
			}
		case loadBatch:
			documents = l.signBatch(ctx, c, signer, failed)
		case loadVerify:
			documents = 1
			if err := l.verify(ctx, c, last); err != nil {
				documents = 0
				failed[outcomeOf(err)]++
			}
		case loadStamp:
			documents = 1
			if t, err := c.Timestamp(ctx, &wire.TimestampRequest{Data: l.content}); err != nil {
				documents = 0
				failed[outcomeOf(err)]++
			} else if len(t.Token) == 0 {
				failed[wrongAnswer]++
			}
		}
		l.note(class, documents, failed, time.Since(begun))
		if !l.pause(l.think/2 + time.Duration(rnd.Int64N(int64(l.think)+1))) {
			return
		}
	}
}

// pause answers false at the end.
func (l *loader) pause(d time.Duration) bool {
	select {
	case <-l.stop:
		return false
	default:
	}
	if d <= 0 {
		return true
	}
	select {
	case <-l.stop:
		return false
	case <-time.After(d):
		return true
	}
}

func (l *loader) key() string { return "load-" + l.run + "-" + strconv.FormatInt(l.serial.Add(1), 10) }

func (l *loader) told(r *wire.SignResult) {
	if l.signed != nil {
		l.signed(r)
	}
}

var loadDocument = wire.Document{ID: "ZY20261118000731", Type: "discharge-summary", MediaType: "application/octet-stream"}

func (l *loader) request(signer string) wire.SignRequest {
	return wire.SignRequest{
		Signer: signer, Algorithm: "SM2", Form: "raw", Content: l.content, Role: "主治医师", Document: loadDocument,
		Consent: wire.Consent{Method: string(evidence.AppAsserted), Assertion: "压力测试 load test"},
	}
}

// signBatch answers how many documents were signed.
func (l *loader) signBatch(ctx context.Context, c *client.Client, signer string, failed map[string]int64) (signed int64) {
	one := l.request(signer)
	b := &wire.BatchRequest{Signer: one.Signer, Algorithm: one.Algorithm, Form: one.Form, Role: one.Role, Consent: one.Consent}
	for range l.batch {
		b.Items = append(b.Items, wire.BatchItem{IdempotencyKey: l.key(), Content: l.content, Document: loadDocument})
	}
	unsettled := func(key string) {
		if l.unsettled != nil {
			l.unsettled(c, key, one)
		}
	}
	out, err := c.Batch(ctx, b)
	if err != nil {
		failed[outcomeOf(err)] += int64(l.batch)
		for _, item := range b.Items {
			if client.OutcomeUnknown(err) {
				unsettled(item.IdempotencyKey)
			}
		}
		return 0
	}
	for i, o := range out.Items {
		switch {
		case o.Problem != nil:
			failed[o.Problem.Code]++
			if o.Problem.Retry == "same-key" {
				unsettled(b.Items[i].IdempotencyKey)
			}
		case o.Result == nil || o.Result.RecordID == "":
			failed[wrongAnswer]++
		default:
			signed++
			l.told(o.Result)
		}
	}
	if len(out.Items) != l.batch {
		failed[wrongAnswer]++
	}
	return signed
}

// verify has a signature verified that the user got before.
func (l *loader) verify(ctx context.Context, c *client.Client, s *wire.SignResult) error {
	answer, err := c.Verify(ctx, &wire.VerifyRequest{
		Raw: &wire.RawSignature{Algorithm: "SM2", Value: s.Signature, Certificate: s.Certificates[0], Chain: s.Certificates[1:], Token: s.Token}, Document: l.content,
	})
	if err != nil {
		return err
	}
	var report struct{ Verdict string }
	if err := json.Unmarshal(answer, &report); err != nil || report.Verdict == "invalid" || report.Verdict == "" {
		return &client.Problem{Problem: wire.Problem{Code: wrongAnswer}}
	}
	return nil
}

// note counts one answer.
func (l *loader) note(class int, documents int64, failed map[string]int64, took time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.over {
		return
	}
	at := time.Since(l.begun).Truncate(l.step)
	if at.Seconds() != l.current.At {
		l.endStep()
		l.current.At = at.Seconds()
	}
	l.current.Requests++
	l.current.took.add(took)
	tallies := []*loadTally{&l.result.WarmUp}
	if !l.measured.IsZero() {
		tallies = []*loadTally{l.result.Classes[loadNames[class]], &l.result.All}
	}
	for code, n := range failed {
		l.current.Errors += n
		if l.failed != nil {
			l.failed(code, n)
		}
	}
	for _, t := range tallies {
		t.Requests++
		t.Documents += documents
		t.took.add(took)
		for code, n := range failed {
			t.Errors[code] += n
		}
	}
}

// endStep is called with mu held.
func (l *loader) endStep() {
	if l.current.Requests > 0 {
		l.current.P50, l.current.P99 = l.current.took.quantile(0.5), l.current.took.quantile(0.99)
		l.result.Steps = append(l.result.Steps, l.current.loadStep)
	}
	l.current.loadStep, l.current.took = loadStep{}, histogram{}
}

// measure ends the warm-up.
func (l *loader) measure() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.measured = time.Now() // interval
	l.result.Begun = l.measured.Sub(l.begun).Seconds()
}

// end is the result; what is answered from now on is not in it.
func (l *loader) end() *loadResult {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.over = true
	l.result.Seconds = time.Since(l.measured).Seconds()
	for _, t := range append([]*loadTally{&l.result.WarmUp, &l.result.All}, l.classes()...) {
		t.P50, t.P95, t.P99 = t.took.quantile(0.5), t.took.quantile(0.95), t.took.quantile(0.99)
		t.Most = float64(t.took.most) / float64(time.Millisecond)
	}
	l.endStep()
	return &l.result
}

func (l *loader) classes() (all []*loadTally) {
	for _, name := range loadNames {
		all = append(all, l.result.Classes[name])
	}
	return all
}

// warm says whether somebody was answered.
func (l *loader) warm() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.result.WarmUp.Requests > 0
}

// measureFor is a warm-up and a measurement. said is told when each of "measuring" and "measured" is reached, under load.
func (l *loader) measureFor(ctx context.Context, warm, long time.Duration, said func(string)) (*loadResult, error) {
	if err := l.prepare(); err != nil {
		return nil, err
	}
	ended := make(chan error, 1)
	go func() { ended <- l.load(ctx) }()
	wait := func(d time.Duration) error {
		select {
		case err := <-ended:
			return errors.Join(err, errors.New("the users ended"))
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(d):
			return nil
		}
	}
	if err := wait(warm); err != nil {
		return nil, err
	}
	for !l.warm() { // a machine that had no time for a single answer yet is not warm
		if err := wait(10 * time.Millisecond); err != nil {
			return nil, err
		}
	}
	said("measuring")
	l.measure()
	if err := wait(long); err != nil {
		return nil, err
	}
	result := l.end()
	said("measured")
	close(l.stop)
	return result, <-ended
}

// loaderFlags are what the loader's own command and those that start it have in common.
func loaderFlags(c *cobra.Command, l *loader, users int, think time.Duration) {
	l.mix = usualMix
	f := c.Flags()
	f.IntVar(&l.users, "users", users, "用户数，各用一个连接 (users, a connection each)")
	f.Var(&l.mix, "mix", "每百次请求的构成 (of a hundred requests)")
	f.IntVar(&l.batch, "batch", 10, "每批份数，1–500 (documents of a batch)")
	f.IntVar(&l.bytes, "bytes", 2048, "每份字节数 (bytes of a document)")
	f.DurationVar(&l.think, "think", think, "应答后的停顿，平均 (pause after an answer, on average)")
	f.Uint64Var(&l.seed, "seed", 1, "随机选择的种子 (seed of what is chosen)")
}

// args are those flags again, for a process that does the same with another mix and seed.
func (l *loader) args(mix string, seed uint64) []string {
	return []string{
		"--users", strconv.Itoa(l.users), "--mix", mix, "--batch", strconv.Itoa(l.batch), "--bytes", strconv.Itoa(l.bytes),
		"--think", l.think.String(), "--seed", strconv.FormatUint(seed, 10),
	}
}

func (l *loader) check() error {
	if l.users < 1 || l.batch < 1 || l.batch > 500 || l.bytes < 1 || l.think < 0 {
		return usageError{errors.New("--users、--bytes 须为正，--batch 为 1–500，--think 不得为负 (must be positive)")}
	}
	return nil
}

const benchLoaderText = `按 TARGET（api、ca、applications、signers，见 bench/load/README.md）向一台设备施压，结果以 JSON 写到标准输出。
只用业务系统的接口：HTTPS、HMAC-SM3，每用户一个连接，不重发。

Loads the appliance that TARGET names (see bench/load/README.md) as business systems do: HTTPS, HMAC-SM3, a connection for each
user, nothing sent twice. The result goes to the standard output as JSON, what happens before it to the standard error.`

func benchLoaderCommand() *cobra.Command {
	l := &loader{step: time.Second}
	var warm, long time.Duration
	var cpu int
	var watched bool
	c := &cobra.Command{
		Use: "bench-loader TARGET", Hidden: true, Short: "施压 (load an appliance)", Long: benchLoaderText, Args: exactArgs(1),
		RunE: func(c *cobra.Command, args []string) (err error) {
			if err := l.check(); err != nil {
				return err
			}
			if cpu >= 0 {
				if err := pin(os.Getpid(), cpu); err != nil {
					return err
				}
			}
			if l.target, err = readTarget(args[0]); err != nil {
				return err
			}
			clock, err := sysclock.Open()
			if err != nil {
				return err
			}
			l.clock, l.ramp = clock.Realtime, warm/2
			in := bufio.NewReader(os.Stdin)
			r, err := l.measureFor(c.Context(), warm, long, func(what string) {
				fmt.Fprintln(os.Stderr, what)
				if watched {
					_, _ = in.ReadString('\n') // whoever watches has looked, or has gone
				}
			})
			if err != nil {
				return err
			}
			return json.NewEncoder(os.Stdout).Encode(r)
		},
	}
	loaderFlags(c, l, 500, 0)
	c.Flags().DurationVar(&warm, "warm-up", 10*time.Second, "预热，另计 (warm-up, told apart)")
	c.Flags().DurationVar(&long, "for", time.Minute, "测量时长 (how long is measured)")
	c.Flags().BoolVar(&watched, "watched", false, "每句话后等标准输入的一行 (wait for a line after each that is said)")
	c.Flags().IntVar(&cpu, "cpu", -1, "只用这个处理器；-1 为不限 (this processor alone; -1: any)")
	return c
}

// pin has all threads of the process run on one processor, or with cpu < 0 on any.
func pin(pid, cpu int) error {
	var set unix.CPUSet
	for i := range 1024 {
		if cpu < 0 || i == cpu {
			set.Set(i)
		}
	}
	err := onThreads(pid, func(tid int) error { return unix.SchedSetaffinity(tid, &set) })
	if err != nil {
		return fmt.Errorf("处理器 %d (processor): %w", cpu, err)
	}
	return nil
}

// onThreads does what a thread's children inherit to each thread of a process. A second pass takes those that were begun during the first.
func onThreads(pid int, do func(tid int) error) error {
	for range 2 {
		tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
		if err != nil {
			return err
		}
		for _, t := range tasks {
			tid, err := strconv.Atoi(t.Name())
			if err != nil {
				continue
			}
			if err := do(tid); err != nil && !errors.Is(err, unix.ESRCH) {
				return err
			}
		}
	}
	return nil
}

package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/emmansun/gmsm/sm3"
	"github.com/spf13/cobra"

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance/account"
	"yinjian/appliance/audit"
	"yinjian/appliance/evidence"
	"yinjian/hsm"
	"yinjian/ntp/sysclock"
)

const benchText = `每一轮依次测量各项，各轮交错进行；给出中位数、范围与比值。客户端、设备与软件密码机共用本机处理器；小于 15 % 的差别不作结论。
Each round measures every case once, rounds are interleaved; medians, ranges and ratios are given. Client, appliance and
software cipher machine share this machine's processors; differences under 15 % say nothing. Every ratio is taken within
a round, then the median of the rounds; a floor holds or fails by that median.

payload   2 KiB of random content; SM2 with SM3, raw form; document fields and consent (app-asserted) of usual length
TLS       1.3, AES-128-GCM, kept alive, one connection for each client; every request has its own HMAC-SM3
durable   the journal's entry is on disk (fsync) before the reply; many requests share one transaction and one fsync
stamped   a timestamp token over the signature value goes into the same entry: two signatures in the cipher machine each

  (a) numerator    csign       C_Sign of SM2 e through worker process, PKCS#11 module and socket, 16 goroutines, not verified
      denominator  gmsm        the same signature by gmsm's sm2.SignASN1 in this process, 16 goroutines          floor 0.15
  (b) numerator    sign        POST /v1/sign over TLS at 64 clients, no stamp, verify-after-sign on              floor 0.30
                   stamped     the same with a stamp                                                             floor 0.18
      denominator  csign       as above
  (c) numerator    raw-cpu     processor time of one sm2.SignASN1 in this process, one goroutine
      denominator  token       processor time of one token in this process: DER request to DER response, key in memory,
                               clock and serials of constant cost, no journal, verify-after-sign off             floor 0.33
                   token-verified  the same with verify-after-sign on (no floor: the check alone costs more than the signature)
  (e) numerator    csign       as above
      denominator  wrapped-hit   the same with a custody key that the token has unwrapped                           floor 0.870 (cost ≤ 1.15)
                   wrapped-miss  with one that it has not: digest, blob, C_UnwrapKey, C_Sign, C_DestroyObject       floor 0.400 (cost ≤ 2.5)
                   wrapped-zipf  100,000 custody keys under Zipf s = 1.0, 10,000 of them unwrapped (no floor)
  (d)              journal     ms a record: audit.Journal over SQLite alone, 512 drafts in flight, entries as a signature
                               without stamp makes them, its reference looked up first, sealed in this process   floor 0.030 ms
                   fsync       beside it: 4 KiB appended and fsynced in the same folder, one after the other

  (f) numerator    batch-1     POST /v1/batches, 100 documents each, one client
      denominator  sign-1      as below, one document after the other                                                floor 3.0
      numerator    batch       the same at 64 clients at once
      denominator  sign        as above, 64 clients                                                                  floor 1.5

  (g) numerator    rsa         POST /v1/sign with RSA-2048 at 64 clients, no stamp                                 floor 0.85
      denominator  csign-rsa   C_Sign of an RSA-2048 key through worker process, module and socket, 16 goroutines
  (h)              sign-500    p99 of POST /v1/sign at 500 connections over (500 ÷ its rate), which is its mean; make load has
                               the loader in a process of its own                                                  most 3
  (i)              allocated   kB that the appliance's process allocates for one sign, with --profile             most 20

  sign-1, stamped-1  one client, one connection: latency
  sign-16, -500      16 and 500 connections
  digest             CMS over a digest, 64 clients
  mb                 documents of 1 MB, 16 clients
  verify             POST /v1/verify of a raw signature, its chain and document, 64 clients

(b)'s denominator grows when (a) does better; (a)·(b) is the same numerator over gmsm, with the product of both floors. The
second table has the ratios by processor time, which other load on the machine disturbs less than it does the rates.`

// Options of one measurement.
type benchOptions struct {
	folder, results string
	rounds          int
	each            time.Duration
	profile         time.Duration // of each profiled load; 0: none
}

// benchCommand measures; the Makefile's bench calls it. It is no command for a hospital.
func benchCommand() *cobra.Command {
	var o benchOptions
	var attach bool
	c := &cobra.Command{
		Use: "bench --dir DIR", Hidden: true, Short: "测量 (measure ratios in one run)", Long: benchText, Args: exactArgs(0),
		RunE: func(c *cobra.Command, _ []string) (err error) {
			if o.rounds < 1 || o.each <= 0 {
				return usageError{errors.New("--rounds 与 --each 须为正 (must be positive)")}
			}
			if o.folder, err = filepath.Abs(o.folder); err != nil {
				return err
			}
			return runBench(c.Context(), o, attach)
		},
	}
	f := c.Flags()
	f.StringVar(&o.folder, "dir", "out/bench", "目录，每次重建 (folder, made anew)")
	f.StringVar(&o.results, "results", "", "结果目录：bench.md、bench.json (folder for the results)")
	f.IntVar(&o.rounds, "rounds", 7, "轮数 (rounds)")
	f.DurationVar(&o.each, "each", 800*time.Millisecond, "每项每轮时长 (time of each case in each round)")
	f.DurationVar(&o.profile, "profile", 0, "另测处理器剖面的时长，需要 go (also profile the appliance under load for so long; needs go)")
	f.BoolVar(&attach, "attach", false, "测量在 DIR 中运行的设备，不新建 (measure the appliance that runs in DIR)")
	return c
}

func runBench(ctx context.Context, o benchOptions, attach bool) (err error) {
	setMemory() // the journal is measured in this process as it runs in the appliance's
	clock, err := sysclock.Open()
	if err != nil {
		return err
	}
	d := &demo{dir: o.folder, clock: clock, begun: clock.Monotonic()}
	if attach {
		err = d.attach()
	} else {
		if err := d.fresh(ctx); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, d.stopServer()) }()
		err = d.startServer(ctx, "--profile", filepath.Join(o.folder, "serve"))
	}
	if err != nil {
		return err
	}
	b := &bench{benchOptions: o, demo: d}
	defer b.close()
	if err := b.prepare(ctx); err != nil {
		return explain(err)
	}
	fmt.Println(benchText)
	fmt.Println()
	for round := range o.rounds {
		for _, c := range b.cases {
			if err := b.measure(ctx, c); err != nil {
				return fmt.Errorf("%s: %w", c.Name, explain(err))
			}
		}
		fmt.Printf("\r第 %d/%d 轮 round", round+1, o.rounds)
	}
	fmt.Println()
	if o.profile > 0 {
		if err := b.profiles(ctx); err != nil {
			return err
		}
	}
	return b.report()
}

// A bench is one measurement of one appliance.
type bench struct {
	benchOptions
	*demo
	cases     []*benchCase
	byName    map[string]*benchCase
	own       map[int]string // processes of ours, by pid
	looking   sync.Mutex     // guards appliance; several may look at once
	appliance int            // its pid
	closers   []func() error
	profiled  []profileTable
	alone     *audit.Journal // of journalAlone
}

func (b *bench) close() {
	for i := len(b.closers) - 1; i >= 0; i-- {
		_ = b.closers[i]() // what was measured is said already
	}
}

// A benchCase is one thing that is measured.
type benchCase struct {
	Name    string   `json:"name"`
	Conns   int      `json:"goroutines"`
	Records int      `json:"records,omitempty"` // that one call of op makes, each counted as an operation; 0: one
	Samples []sample `json:"samples"`
	op      func(ctx context.Context, client int) error
	journal bool // leaves entries that the appliance ships
}

// A sample is one case in one round.
type sample struct {
	Ops     int64              `json:"ops"`
	Seconds float64            `json:"seconds"`
	CPU     map[string]float64 `json:"cpu_seconds"`  // by role; until the projection has caught up, too
	Waits   map[string]float64 `json:"wait_seconds"` // for a processor, by role, likewise
	Others  float64            `json:"other_cores"`  // processors that others kept busy
	Lag     uint64             `json:"lag"`          // entries that the projection was behind at the end
	P50     float64            `json:"p50_ms"`       // of one call
	P99     float64            `json:"p99_ms"`
}

func (s sample) rate() float64 { return float64(s.Ops) / s.Seconds }

// cpu is processor seconds of one operation.
func (s sample) cpu(role string) float64 { return s.CPU[role] / float64(s.Ops) }

// total is processor seconds of one operation by all processes but the one left out ("": none).
func (s sample) total(without string) float64 {
	sum := 0.0
	for role, used := range s.CPU {
		if role != without {
			sum += used
		}
	}
	return sum / float64(s.Ops)
}

// measure runs the case on its goroutines for about each.
func (b *bench) measure(ctx context.Context, c *benchCase) error {
	before, err := b.processors()
	if err != nil {
		return err
	}
	s := sample{CPU: map[string]float64{}, Waits: map[string]float64{}}
	begun := time.Now() // interval
	var took histogram
	if s.Ops, err = c.timed(ctx, b.each, &took); err != nil {
		return err
	}
	s.Seconds, s.P50, s.P99 = time.Since(begun).Seconds(), took.quantile(0.5), took.quantile(0.99)
	if c.journal {
		if s.Lag, err = b.shipped(ctx); err != nil {
			return err
		}
	}
	after, err := b.processors()
	if err != nil {
		return err
	}
	busy := after.busy - before.busy
	for role, used := range after.roles {
		s.CPU[role] = used - before.roles[role]
		busy -= s.CPU[role]
		s.Waits[role] = after.waits[role] - before.waits[role]
	}
	s.Others = max(busy, 0) / time.Since(begun).Seconds()
	c.Samples = append(c.Samples, s)
	return nil
}

// run calls the operation on each goroutine for about each and answers how often it came back.
func (c *benchCase) run(ctx context.Context, each time.Duration) (int64, error) {
	return c.timed(ctx, each, nil)
}

// timed is run, and adds how long each call took. Each goroutine calls once at the least.
func (c *benchCase) timed(ctx context.Context, each time.Duration, took *histogram) (int64, error) {
	var mu sync.Mutex
	begun := time.Now() // interval
	var done atomic.Int64
	var failed atomic.Pointer[error]
	var wg sync.WaitGroup
	for client := range c.Conns {
		wg.Go(func() {
			var own histogram
			since := time.Since(begun)
			for once := true; (once || since < each) && failed.Load() == nil; once = false { // once at least, however late this began
				if err := c.op(ctx, client); err != nil {
					failed.CompareAndSwap(nil, &err)
					return
				}
				done.Add(int64(max(1, c.Records)))
				now := time.Since(begun)
				own.add(now - since)
				since = now
			}
			if took != nil {
				mu.Lock()
				took.merge(&own)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if err := failed.Load(); err != nil {
		return 0, *err
	}
	return done.Load(), nil
}

// shipped waits until the projection has caught up, and answers how far it was behind at first.
func (b *bench) shipped(ctx context.Context) (uint64, error) {
	var first uint64
	for try := 0; ; try++ {
		answer, err := b.admin.State(ctx)
		if err != nil {
			return 0, err
		}
		var s struct{ Projection struct{ Lag uint64 } }
		if err := json.Unmarshal(answer, &s); err != nil {
			return 0, err
		}
		if try == 0 {
			first = s.Projection.Lag
		}
		if s.Projection.Lag == 0 {
			return first, nil
		}
		if try == 1000 {
			return 0, errors.New("the projection does not catch up")
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// benchSign signs documents of 2 KiB as the clients in turn, each under a key of its own.
func benchSign(clients []*client.Client) func(context.Context, int) error {
	return benchSignAs(clients, 2048, func(*wire.SignRequest) {})
}

// benchSignAs is that with documents of so many bytes and another request.
func benchSignAs(clients []*client.Client, bytes int, change func(*wire.SignRequest)) func(context.Context, int) error {
	content := make([]byte, bytes)
	rand.Read(content) // never fails (crypto/rand)
	var n atomic.Int64
	run := time.Now().UnixNano() // interval: only makes keys of this run differ from another's
	return func(ctx context.Context, i int) error {
		req := &wire.SignRequest{
			Signer: "D10023", Algorithm: "SM2", Form: "raw", Content: content, Role: "主治医师",
			Document: wire.Document{ID: "ZY20261118000731", Type: "discharge-summary", MediaType: "application/octet-stream"},
			Consent:  wire.Consent{Method: string(evidence.AppAsserted), Assertion: "测量 bench"},
		}
		change(req)
		_, err := clients[i%benchApps].Sign(ctx, fmt.Sprintf("bench-%d-%d", run, n.Add(1)), req)
		return err
	}
}

// benchVerify has one signature verified again and again.
func benchVerify(ctx context.Context, clients []*client.Client) (func(context.Context, int) error, error) {
	content := make([]byte, 2048)
	rand.Read(content)                                                                                       // never fails (crypto/rand)
	s, err := clients[0].Sign(ctx, fmt.Sprintf("bench-verify-%d", time.Now().UnixNano()), &wire.SignRequest{ // interval: only makes the key differ
		Signer: "D10023", Algorithm: "SM2", Form: "raw", Content: content, Role: "主治医师", Document: loadDocument,
		Consent: wire.Consent{Method: string(evidence.AppAsserted), Assertion: "测量 bench"},
	})
	if err != nil {
		return nil, err
	}
	req := &wire.VerifyRequest{Raw: &wire.RawSignature{Algorithm: "SM2", Value: s.Signature, Certificate: s.Certificates[0], Chain: s.Certificates[1:]}, Document: content}
	return func(ctx context.Context, i int) error {
		_, err := clients[i%benchApps].Verify(ctx, req)
		return err
	}, nil
}

// benchBatchSize is how many documents one batch has.
const benchBatchSize = 100

// benchBatch signs batches as the clients in turn.
func benchBatch(clients []*client.Client) func(context.Context, int) error {
	content := make([]byte, 2048)
	rand.Read(content) // never fails (crypto/rand)
	var n atomic.Int64
	run := time.Now().UnixNano() // interval: only makes keys of this run differ from another's
	return func(ctx context.Context, i int) error {
		b := &wire.BatchRequest{
			Signer: "D10023", Algorithm: "SM2", Form: "raw", Role: "主治医师", Consent: wire.Consent{Method: string(evidence.AppAsserted), Assertion: "测量 bench"},
		}
		for range benchBatchSize {
			b.Items = append(b.Items, wire.BatchItem{
				IdempotencyKey: fmt.Sprintf("batch-%d-%d", run, n.Add(1)), Content: content,
				Document: wire.Document{ID: "ZY20261118000731", Type: "discharge-summary", MediaType: "application/octet-stream"},
			})
		}
		out, err := clients[i%benchApps].Batch(ctx, b)
		if err != nil {
			return err
		}
		for _, o := range out.Items {
			if o.Problem != nil {
				return fmt.Errorf("%s: %s %s", o.IdempotencyKey, o.Problem.Code, o.Problem.Detail)
			}
		}
		return nil
	}
}

// benchApps is how many applications the clients are divided among: each has a rate limit and a share of its own.
const benchApps = 8

// prepare registers applications and the signer, and lists the cases.
func (b *bench) prepare(ctx context.Context) error {
	if err := b.register(ctx); err != nil {
		return err
	}
	plain, stamped := make([]*client.Client, benchApps), make([]*client.Client, benchApps)
	for i := range benchApps {
		for clients, stamp := range map[*[]*client.Client]string{&plain: account.StampNone, &stamped: account.StampRequired} {
			c, err := b.open(ctx, fmt.Sprintf("bench-%s-%d", stamp, i), "测量", "本部", stamp, string(evidence.AppAsserted))
			if err != nil {
				return err
			}
			(*clients)[i] = c
		}
	}
	b.byName = map[string]*benchCase{}
	add := func(name string, conns int, journal bool, op func(context.Context, int) error) {
		c := &benchCase{Name: name, Conns: conns, op: op, journal: journal}
		b.cases = append(b.cases, c)
		b.byName[name] = c
	}
	raw, err := rawSign()
	if err != nil {
		return err
	}
	csign, csignRSA, err := b.workerSign(ctx)
	if err != nil {
		return err
	}
	verify, err := benchVerify(ctx, plain)
	if err != nil {
		return err
	}
	digest := make([]byte, sm3.Size)
	rand.Read(digest) // never fails (crypto/rand)
	journal, fsync, err := b.journalAlone(ctx)
	if err != nil {
		return err
	}
	add("gmsm", 16, false, raw)
	add("csign", 16, false, csign)
	add("csign-rsa", 16, false, csignRSA)
	hit, miss, mixed, err := b.custody(ctx)
	if err != nil {
		return err
	}
	add("wrapped-hit", 16, false, hit)
	add("wrapped-miss", 16, false, miss)
	add("wrapped-zipf", 16, false, mixed)
	add("sign", 64, true, benchSign(plain))
	add("stamped", 64, true, benchSign(stamped))
	add("sign-1", 1, true, benchSign(plain))
	add("stamped-1", 1, true, benchSign(stamped))
	add("sign-16", 16, true, benchSign(plain))
	add("sign-500", 500, true, benchSign(plain))
	add("rsa", 64, true, benchSignAs(plain, 2048, func(r *wire.SignRequest) { r.Algorithm = string(hsm.RSA2048) }))
	add("digest", 64, true, benchSignAs(plain, 1, func(r *wire.SignRequest) {
		r.Form, r.Content, r.Digest = "cms", nil, &wire.Digest{Algorithm: "SM3", Value: digest}
	}))
	add("mb", 16, true, benchSignAs(plain, 1_000_000, func(*wire.SignRequest) {}))
	add("verify", 64, false, verify)
	add("batch-1", 1, true, benchBatch(plain))
	b.byName["batch-1"].Records = benchBatchSize
	add("batch", 64, true, benchBatch(plain))
	b.byName["batch"].Records = benchBatchSize
	add("raw-cpu", 1, false, raw)
	for _, verify := range []bool{false, true} {
		name := map[bool]string{false: "token", true: "token-verified"}[verify]
		op, err := tokenInProcess(ctx, verify)
		if err != nil {
			return err
		}
		add(name, 1, false, op)
	}
	add("journal", 512, false, journal)
	add("fsync", 1, false, fsync)
	for _, c := range b.cases { // connections, statements and caches are there before the first round
		if _, err := c.run(ctx, b.each/4); err != nil {
			return fmt.Errorf("%s: %w", c.Name, err)
		}
	}
	_, err = b.shipped(ctx)
	return err
}

// attach finds the appliance that runs in the folder.
func (d *demo) attach() error {
	b, err := os.ReadFile(filepath.Join(d.dir, "endpoints.json"))
	if err == nil {
		err = json.Unmarshal(b, &d.ends)
	}
	if err == nil {
		d.admin = client.NewAdmin(d.ends.Admin)
	}
	return err
}

// signerKey is the label of the doctor's key.
func (d *demo) signerKey(ctx context.Context, alg hsm.Algorithm) (string, error) {
	answer, err := d.admin.ListSigners(ctx)
	if err != nil {
		return "", explain(err)
	}
	var signers []account.Signer
	if err := json.Unmarshal(answer, &signers); err != nil {
		return "", err
	}
	for _, s := range signers {
		for _, k := range s.Keys {
			if k.Algorithm == string(alg) {
				return k.Label, nil
			}
		}
	}
	return "", fmt.Errorf("no %s key is enrolled", alg)
}

// open registers an application and answers a client for it.
func (d *demo) open(ctx context.Context, id, name, campus, stamp string, consent ...string) (*client.Client, error) {
	file := filepath.Join(d.dir, "credentials", id+".json")
	err := register(ctx, d.admin, wire.RegisterApplication{
		ID: id, Name: name, Campus: campus, Stamp: stamp, Consent: consent,
		Rights: []string{account.RightSign, account.RightVerify, account.RightTimestamp},
	}, file)
	if err != nil {
		return nil, err
	}
	return d.clientOf(file, id, client.Retry{})
}

// clientOf answers a client with the credential in the file.
func (d *demo) clientOf(file, id string, retry client.Retry) (*client.Client, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var c credential
	if err := json.Unmarshal(b, &c); err != nil {
		return nil, err
	}
	key, err := hex.DecodeString(strings.TrimSpace(c.Key))
	if err != nil {
		return nil, err
	}
	return client.New(client.Config{BaseURL: d.ends.API, AppID: id, Key: key, RootCAs: d.roots, Clock: d.now, Retry: retry})
}

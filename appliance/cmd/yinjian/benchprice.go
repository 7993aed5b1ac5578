package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"yinjian/api/client"
	"yinjian/appliance"
	"yinjian/appliance/account"
	"yinjian/appliance/audit"
	"yinjian/appliance/evidence"
	"yinjian/hsm"
	"yinjian/hsm/worker"
	"yinjian/ntp/sysclock"
	"yinjian/tsa"
)

const benchPriceText = `每一项保证有与无各测一次，各轮交错进行；给出中位数、范围，以及多花的处理器时间。只为测量而拆去保证，产品没有这样的设置
(verify_fresh 除外)。客户端、设备、软件密码机共用本机处理器。

Each guarantee is measured with and without it in every round. Taken away only here, for the measurement; the product has no such
setting but verify_fresh. Client, appliances, cipher machines and database share the processors.

  durable       POST /v1/sign at 64 clients, the appliance's folder on a disk, and on a memory file system, where fsync costs nothing
  verified      the same with hsm.verify_fresh on and off; and stamped
  projection    the same with PostgreSQL there, and stopped
  worker        C_Sign of SM2, 16 goroutines: through a worker process, and with the PKCS#11 module in the calling process
  row HMAC      rows shipped to a database that takes them at no cost: batches under the cipher machine's HMAC-SM3, and under none
  TLS           timestamp tokens at 16 connections, SM2 key in memory, no journal: over TLS 1.3, and over TCP alone

  (j)           sign ÷ csign, unstamped, verify_fresh off, of one appliance                                     floor 0.45
  (k)           the same, verify_fresh on, with a cipher machine that takes 1 ms for each signature and has two sessions, so that it
                is the limit                                                                                  floor 0.95
      ahead     the same while the machine's process is ahead of all others for a processor (SCHED_FIFO), as a device's own is; where
                this process may arrange that (no floor)`

// slowSessions are those of the machine of 1 ms: some 2,000 signatures a second, less than the processors could do.
const slowSessions = 2

// A priceBench is one measurement of what guarantees cost.
type priceBench struct {
	benchOptions
	page    string
	sources []*soakSource
	undo    []func() error
	items   []*priceItem
	limits  []poolRatio
}

// A priceItem is one guarantee, with what was measured with and without it.
type priceItem struct {
	Name     string        `json:"name"`
	Gives    string        `json:"gives"` // what one has for it
	Unit     string        `json:"unit"`
	With     []priceSample `json:"with"`
	Without  []priceSample `json:"without"`
	measures [2]func(context.Context) (priceSample, error)
}

// A priceSample is one side in one round. CPU is of all processes that take part.
type priceSample struct {
	Rate  float64            `json:"a_second"`
	CPU   float64            `json:"cpu_us"`
	Uses  map[string]float64 `json:"cpu_us_by_process,omitempty"`
	Waits map[string]float64 `json:"wait_us_by_process,omitempty"` // threads' waiting for a processor
}

func benchPriceCommand() *cobra.Command {
	b := &priceBench{}
	c := &cobra.Command{
		Use: "bench-price --dir DIR", Hidden: true, Short: "测量各项保证的代价 (measure what guarantees cost)", Long: benchPriceText, Args: exactArgs(0),
		RunE: func(c *cobra.Command, _ []string) (err error) {
			if b.rounds < 1 || b.each <= 0 {
				return usageError{errors.New("--rounds 与 --each 须为正 (must be positive)")}
			}
			if b.folder, err = filepath.Abs(b.folder); err != nil {
				return err
			}
			return b.run(c.Context())
		},
	}
	f := c.Flags()
	f.StringVar(&b.folder, "dir", "out/bench-price", "目录，每次重建 (folder, made anew)")
	f.StringVar(&b.results, "results", "", "结果目录：price.json (folder for the results)")
	f.StringVar(&b.page, "page", "", "价目页 (the page to write)")
	f.IntVar(&b.rounds, "rounds", 7, "轮数 (rounds)")
	f.DurationVar(&b.each, "each", 800*time.Millisecond, "每项每轮时长 (time of each case in each round)")
	return c
}

func (b *priceBench) run(ctx context.Context) (err error) {
	setMemory()
	defer func() {
		for i := len(b.undo) - 1; i >= 0; i-- {
			err = errors.Join(err, b.undo[i]())
		}
	}()
	if err := b.prepare(ctx); err != nil {
		return explain(err)
	}
	fmt.Println(benchPriceText)
	fmt.Println()
	for _, item := range b.items { // connections, statements and caches are there before the first round
		for _, measure := range item.measures {
			if _, err := measure(ctx); err != nil {
				return fmt.Errorf("%s: %w", item.Name, explain(err))
			}
		}
	}
	for round := range b.rounds {
		for _, item := range b.items {
			first := round % 2 // neither side is always measured first
			for _, side := range []int{first, 1 - first} {
				s, err := item.measures[side](ctx)
				if err != nil {
					return fmt.Errorf("%s: %w", item.Name, explain(err))
				}
				if side == 0 {
					item.With = append(item.With, s)
				} else {
					item.Without = append(item.Without, s)
				}
			}
		}
		fmt.Printf("\r第 %d/%d 轮 round", round+1, b.rounds)
	}
	fmt.Println()
	return b.report()
}

// A priceSite is an appliance of its own.
type priceSite struct {
	*bench
	plain, stamped []*client.Client
}

// site makes and starts an appliance in dir, whose time comes from the bench's own sources.
func (b *priceBench) site(ctx context.Context, dir string, change func(*appliance.Config), flags ...string) (*priceSite, error) {
	clock, err := sysclock.Open()
	if err != nil {
		return nil, err
	}
	d := &demo{dir: dir, clock: clock, begun: clock.Monotonic()}
	said := defaultAnswers()
	for len(b.sources) < 3 {
		one, err := startSource(d.now)
		if err != nil {
			return nil, err
		}
		b.undo = append(b.undo, one.conn.Close)
		b.sources = append(b.sources, one)
	}
	for _, one := range b.sources {
		said.TimeSources = append(said.TimeSources, one.conn.LocalAddr().String())
	}
	if err := os.RemoveAll(dir); err != nil {
		return nil, err
	}
	if err := runInit(ctx, initOptions{dir: dir, answers: said}); err != nil {
		return nil, err
	}
	err = changeConfig(filepath.Join(dir, "config.toml"), func(c *appliance.Config) {
		c.Time.Poll = appliance.Duration(2 * time.Second)
		change(c)
	})
	if err != nil {
		return nil, err
	}
	s := &priceSite{bench: &bench{benchOptions: b.benchOptions, demo: d}}
	b.undo = append(b.undo, func() error { s.close(); return s.stopServer() })
	if err := s.startServer(ctx, flags...); err != nil {
		return nil, err
	}
	if err := s.register(ctx); err != nil {
		return nil, err
	}
	for i := range benchApps {
		for clients, stamp := range map[*[]*client.Client]string{&s.plain: account.StampNone, &s.stamped: account.StampRequired} {
			c, err := s.demo.open(ctx, fmt.Sprintf("bench-%s-%d", stamp, i), "测量", "本部", stamp, string(evidence.AppAsserted))
			if err != nil {
				return nil, err
			}
			*clients = append(*clients, c)
		}
	}
	return s, nil
}

// of measures a case of the site.
func (s *priceSite) of(conns int, journal bool, op func(context.Context, int) error) func(context.Context) (priceSample, error) {
	return func(ctx context.Context) (priceSample, error) {
		c := &benchCase{Conns: conns, op: op, journal: journal}
		if err := s.measure(ctx, c); err != nil {
			return priceSample{}, err
		}
		one := c.Samples[0]
		p := priceSample{Rate: one.rate(), CPU: 1e6 * one.total(""), Uses: map[string]float64{}, Waits: map[string]float64{}}
		for role := range one.CPU {
			p.Uses[role], p.Waits[role] = 1e6*one.cpu(role), 1e6*one.Waits[role]/float64(one.Ops)
		}
		return p, nil
	}
}

func (b *priceBench) add(name, gives, unit string, with, without func(context.Context) (priceSample, error)) {
	b.items = append(b.items, &priceItem{Name: name, Gives: gives, Unit: unit, measures: [2]func(context.Context) (priceSample, error){with, without}})
}

func (b *priceBench) prepare(ctx context.Context) error {
	const clients = 64
	nothing := func(*appliance.Config) {}
	database, err := newBenchServer()
	if err != nil {
		return err
	}
	b.undo = append(b.undo, func() error { database.remove(); return nil })
	if err := database.start(ctx); err != nil {
		return err
	}
	base, err := b.site(ctx, filepath.Join(b.folder, "disk"), nothing)
	if err != nil {
		return err
	}
	shared, err := os.MkdirTemp("/dev/shm", "yj-price")
	if err != nil {
		return err
	}
	b.undo = append(b.undo, func() error { return os.RemoveAll(shared) })
	memory, err := b.site(ctx, filepath.Join(shared, "a"), nothing)
	if err != nil {
		return err
	}
	off := false
	unchecked, err := b.site(ctx, filepath.Join(b.folder, "unchecked"), func(c *appliance.Config) { c.HSM.VerifyFresh = &off })
	if err != nil {
		return err
	}
	fed, err := b.site(ctx, filepath.Join(b.folder, "postgres"), func(c *appliance.Config) { c.Database.DSN = database.dsn() })
	if err != nil {
		return err
	}
	slow, err := b.site(ctx, filepath.Join(b.folder, "slow"), func(c *appliance.Config) {
		slot := c.HSM.Slots[string(hsm.Staff)]
		slot.Sessions = slowSessions
		c.HSM.Slots[string(hsm.Staff)] = slot
	}, "--service-time", "1ms")
	if err != nil {
		return err
	}

	sign := func(s *priceSite) func(context.Context) (priceSample, error) {
		return s.of(clients, true, benchSign(s.plain))
	}
	b.add("落盘 durable", "签名应答前记录已落盘，断电不丢 (a record outlives a power cut that comes after its answer)", "签名 sign", sign(base), sign(memory))
	b.add("验签 verified", "交出前验证每个新签名 (no wrong signature of a cipher machine leaves)", "签名 sign", sign(base), sign(unchecked))
	b.add("验签，带时间戳 verified, stamped", "同上，签名与时间戳各一次 (the same, of signature and token)", "签名 sign",
		base.of(clients, true, benchSign(base.stamped)), unchecked.of(clients, true, benchSign(unchecked.stamped)))
	b.add("中心库 projection", "PostgreSQL 中随时可查的副本 (a copy in PostgreSQL that people query)", "签名 sign", func(ctx context.Context) (priceSample, error) {
		if err := database.start(ctx); err != nil {
			return priceSample{}, err
		}
		if _, err := fed.shipped(ctx); err != nil {
			return priceSample{}, err
		}
		return fed.of(clients, true, benchSign(fed.plain))(ctx)
	}, func(ctx context.Context) (priceSample, error) {
		database.stop()
		return fed.of(clients, false, benchSign(fed.plain))(ctx)
	})
	csign, _, err := base.workerSign(ctx)
	if err != nil {
		return err
	}
	inside, err := base.moduleSign(ctx)
	if err != nil {
		return err
	}
	b.add("工作进程 worker", "密码机厂商的模块崩溃或挂起，设备不停 (a vendor's module may crash or hang; the appliance goes on)", "C_Sign",
		base.of(16, false, csign), base.of(16, false, inside))
	if err := b.rowHMAC(ctx, base); err != nil {
		return err
	}
	if err := b.tls(ctx); err != nil {
		return err
	}

	for _, one := range []struct {
		name     string
		site     *priceSite
		sessions int
		floor    float64
	}{{"(j) sign ÷ csign, verify_fresh off", unchecked, 16, 0.45}, {"(k) sign ÷ csign, a machine of 1 ms", slow, slowSessions, 0.95}} {
		w, err := one.site.staffWorkerOf(0, one.sessions)
		if err != nil {
			return err
		}
		label, err := one.site.signerKey(ctx, hsm.SM2)
		if err != nil {
			return err
		}
		digest := make([]byte, 32)
		csign := one.site.of(16, false, func(ctx context.Context, _ int) error {
			_, err := w.Do(ctx, label, hsm.SignSM2E, digest)
			return err
		})
		b.add(one.name, "", "", sign(one.site), csign)
		b.limits = append(b.limits, poolRatio{Name: one.name, Floor: one.floor, Least: true})
		if one.site != slow {
			continue
		}
		if err := errors.Join(slow.machineAhead(true), slow.machineAhead(false)); err != nil {
			fmt.Println("密码机的进程不能优先 (its process cannot be put ahead):", err)
			continue
		}
		ahead := func(measure func(context.Context) (priceSample, error)) func(context.Context) (priceSample, error) {
			return func(ctx context.Context) (p priceSample, err error) {
				if err := slow.machineAhead(true); err != nil {
					return p, err
				}
				defer func() { err = errors.Join(err, slow.machineAhead(false)) }()
				return measure(ctx)
			}
		}
		b.add(one.name+", ahead", "", "", ahead(sign(slow)), ahead(csign))
		b.limits = append(b.limits, poolRatio{Name: one.name + ", ahead"})
	}
	return nil
}

// machineAhead puts the site's cipher machine ahead of all others for a processor, or where it was.
func (s *priceSite) machineAhead(yes bool) error {
	attr := unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_NORMAL}
	if yes {
		attr.Policy, attr.Priority = unix.SCHED_FIFO, 1
	}
	roles, err := s.processes()
	if err != nil {
		return err
	}
	for pid, role := range roles {
		if role != roleSofttoken {
			continue
		}
		if err := onThreads(pid, func(tid int) error { return unix.SchedSetAttr(tid, &attr, 0) }); err != nil {
			return err
		}
	}
	return nil
}

// moduleSign is C_Sign on the staff token by the PKCS#11 module in this process.
func (b *bench) moduleSign(ctx context.Context) (func(context.Context, int) error, error) {
	label, err := b.signerKey(ctx, hsm.SM2)
	if err != nil {
		return nil, err
	}
	params, err := b.staffParams(0, 16)
	if err != nil {
		return nil, err
	}
	defer clear(params.PIN)
	token, err := openToken(newLog(logrus.ErrorLevel))(ctx, params)
	if err != nil {
		return nil, err
	}
	if c, ok := token.(interface{ Close() error }); ok {
		b.closers = append(b.closers, c.Close)
	}
	digest := make([]byte, 32)
	return func(ctx context.Context, _ int) error {
		_, err := token.Do(ctx, label, hsm.SignSM2E, digest)
		return err
	}, nil
}

// A freeProjection takes rows at no cost.
type freeProjection struct {
	audit.Projection // nothing else is called
	last             uint64
	all              func()
}

func (p *freeProjection) Shipped(context.Context, string, string) (uint64, error) {
	return 0, audit.ErrNotFound
}

func (p *freeProjection) Rebuilder(context.Context, string) (string, error) { return "", nil }

func (p *freeProjection) Apply(_ context.Context, b audit.ProjectedBatch) error {
	if b.Last >= p.last {
		p.all()
	}
	return nil
}

// constantMAC is no MAC.
type constantMAC struct{}

func (constantMAC) MAC(context.Context, []byte) ([]byte, error) { return make([]byte, 32), nil }

// rowHMAC ships the same entries with and without the cipher machine's MAC.
func (b *priceBench) rowHMAC(ctx context.Context, s *priceSite) error {
	entry, _, err := s.journalAlone(ctx)
	if err != nil {
		return err
	}
	const rows = 20_000
	fillIt := &benchCase{Conns: 512, op: entry}
	for made := int64(0); made < rows; {
		n, err := fillIt.run(ctx, 100*time.Millisecond)
		if err != nil {
			return err
		}
		made += n
	}
	params, err := s.staffParams(0, 2)
	if err != nil {
		return err
	}
	clear(params.PIN)
	if params.PIN, err = appliance.ReadSecret(filepath.Join(s.dir, "secrets", "log.pin")); err != nil {
		return err
	}
	params.TokenLabel = "yinjian-log"
	w, err := s.startWorker(hsm.Log, params)
	if err != nil {
		return err
	}
	journal := s.alone
	ship := func(mac audit.MAC) func(context.Context) (priceSample, error) {
		return s.of(1, false, func(ctx context.Context, _ int) error {
			ctx, cancel := context.WithCancel(ctx)
			p := &freeProjection{last: journal.Size() - 1, all: cancel}
			quiet := newLog(logrus.PanicLevel)
			shipper, err := audit.NewShipper(audit.ShipperConfig{Journal: journal, Projection: p, MAC: mac, MACKeyID: "bench", Log: quiet})
			if err != nil {
				return err
			}
			return shipper.Run(ctx)
		})
	}
	perRow := func(f func(context.Context) (priceSample, error)) func(context.Context) (priceSample, error) {
		return func(ctx context.Context) (priceSample, error) {
			p, err := f(ctx)
			n := float64(journal.Size())
			return priceSample{Rate: p.Rate * n, CPU: p.CPU / n}, err
		}
	}
	b.add("行 HMAC row HMAC", "中心库里改了哪一行都能发现 (a row that was changed in the central database is found)", "行 row", perRow(ship(workerMAC{w})), perRow(ship(constantMAC{})))
	return nil
}

// workerMAC is HMAC-SM3 with the key that the appliance has for the projection.
type workerMAC struct{ *worker.Client }

func (m workerMAC) MAC(ctx context.Context, data []byte) ([]byte, error) {
	return m.Do(ctx, "mac/projection-batch", hsm.MACSM3, data)
}

// tls is tokens over TLS and over TCP.
func (b *priceBench) tls(ctx context.Context) error {
	query, err := (&tsa.Request{Imprint: tsa.ImprintOf([]byte("bench")), Nonce: big.NewInt(1 << 62), CertReq: true}).Bytes()
	if err != nil {
		return err
	}
	t := &tsaBench{query: query}
	b.undo = append(b.undo, func() (err error) {
		for i := len(t.undo) - 1; i >= 0; i-- {
			err = errors.Join(err, t.undo[i]())
		}
		return err
	})
	var measures [2]func(context.Context) (priceSample, error)
	for i, secure := range []bool{true, false} {
		target, err := t.startServer(stampServer{key: keySM2, listen: "127.0.0.1:0", secure: secure})
		if err != nil {
			return err
		}
		measures[i] = func(ctx context.Context) (priceSample, error) {
			s, err := t.load(ctx, target, 16, b.each)
			return priceSample{Rate: float64(s.Ops) / s.Seconds, CPU: s.CPU}, err
		}
	}
	b.add("TLS", "线路上无人能读、能改；只计服务端 (nobody on the line reads or changes anything; the server's time alone)", "时间戳 token", measures[0], measures[1])
	return nil
}

// waits says of what has a limit which process uses a processor, and which waits for one.
func (b *priceBench) waits(out *strings.Builder) {
	var roles []string
	for _, item := range b.items {
		if item.Gives != "" || !strings.HasPrefix(item.Name, "(k)") {
			continue
		}
		for side, samples := range [][]priceSample{item.With, item.Without} {
			if roles == nil {
				roles = slices.Sorted(maps.Keys(samples[0].Uses))
				fmt.Fprintf(out, "\n## 一毫秒的密码机：谁用处理器，谁在等 (a machine of 1 ms: who uses a processor, and who waits for one)\n\n"+
					"每次操作，微秒，所用 / 可以运行而等处理器，各线程之和（各轮中位数）。(µs an operation: used / ready and waiting for a processor, all threads; medians.)\n\n"+
					"| | 每秒 a second | %s |\n| --- | ---: |%s\n", strings.Join(roles, " | "), strings.Repeat(" ---: |", len(roles)))
			}
			fmt.Fprintf(out, "| %s: %s | %.0f |", item.Name, []string{"sign", "csign"}[side], spreadOf(each(samples, func(s priceSample) float64 { return s.Rate })).Median)
			for _, role := range roles {
				fmt.Fprintf(out, " %.0f / %.0f |", spreadOf(each(samples, func(s priceSample) float64 { return s.Uses[role] })).Median,
					spreadOf(each(samples, func(s priceSample) float64 { return s.Waits[role] })).Median)
			}
			fmt.Fprintln(out)
		}
	}
}

func (b *priceBench) report() error {
	clock, err := sysclock.Open()
	if err != nil {
		return err
	}
	machine := machineOf(b.folder, clock.Realtime())
	var out strings.Builder
	fmt.Fprintf(&out, "# 各项保证的代价 (price list)\n\n由 `make bench` 写出，请勿手改；定义见 `yinjian bench-price --help`。每项保证有与无交错测量，取各轮中位数；只为测量而拆去，产品没有这样的设置"+
		"(`hsm.verify_fresh` 除外)。客户端、设备、软件密码机与数据库共用一台机器的处理器；小于 15 %% 的差别不作结论。\n\n"+
		"(Written by `make bench`; not to be edited. Each guarantee with and without it, interleaved; medians. Differences under 15 %% say nothing.)\n\n"+
		"%s，版本 revision %s，%s；%s，%d 核 cores，Linux %s；%s；%d 轮 rounds，每项 each %v；负载 load average %s\n\n"+
		"| 保证 guarantee | 换来什么 what it gives | 计量 unit | 有，每秒 with, a second | 无，每秒 without | 速率比 ratio | 最小–最大 min – max | 多花 costs, µs CPU | 最小–最大 min – max |\n| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |\n",
		machine.At, machine.Revision, machine.Go, machine.CPU, machine.Cores, machine.Kernel, machine.Filesystem, b.rounds, b.each, machine.Load)
	rate := func(s priceSample) float64 { return s.Rate }
	limits := 0
	for _, item := range b.items {
		var ratios, costs []float64
		for i := range item.With {
			ratios = append(ratios, item.With[i].Rate/item.Without[i].Rate)
			costs = append(costs, item.With[i].CPU-item.Without[i].CPU)
		}
		if item.Gives == "" {
			b.limits[limits].Samples = ratios
			b.limits[limits].Note = fmt.Sprintf("%.0f and %.0f a second", spreadOf(each(item.With, rate)).Median, spreadOf(each(item.Without, rate)).Median)
			limits++
			continue
		}
		r, c := spreadOf(ratios), spreadOf(costs)
		fmt.Fprintf(&out, "| %s | %s | %s | %.0f | %.0f | %.2f | %.2f – %.2f | %.1f | %.1f – %.1f |\n", item.Name, item.Gives, item.Unit,
			spreadOf(each(item.With, rate)).Median, spreadOf(each(item.Without, rate)).Median, r.Median, r.Least, r.Most, c.Median, c.Least, c.Most)
	}
	fmt.Fprintf(&out, "\n## 下限 (floors)\n\n| | 中位数 median | 最小–最大 min – max | 下限 limit | |\n| --- | ---: | ---: | ---: | --- |\n%s", poolTable(b.limits))
	b.waits(&out)
	fmt.Print(out.String())
	if b.page != "" {
		if err := os.WriteFile(b.page, []byte(out.String()), 0o644); err != nil {
			return err
		}
	}
	if b.results == "" {
		return nil
	}
	j, err := json.MarshalIndent(struct {
		Machine machineInfo  `json:"machine"`
		Limits  []poolRatio  `json:"limits"`
		Items   []*priceItem `json:"items"`
	}{machine, b.limits, b.items}, "", "  ")
	if err != nil {
		return err
	}
	return errors.Join(os.MkdirAll(b.results, 0o755), os.WriteFile(filepath.Join(b.results, "price.json"), append(j, '\n'), 0o644))
}

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance"
	"yinjian/appliance/account"
	"yinjian/appliance/audit"
	"yinjian/appliance/evidence"
	"yinjian/dbdriver/central"
	"yinjian/dbdriver/connect"
	"yinjian/ntp/sysclock"
)

const benchDatabaseText = `中心库在本机的 PostgreSQL 上（自建，缺省设置，fsync 打开），与设备、客户端共用处理器；各轮交错进行，给出中位数与范围。
The central database is on a PostgreSQL server of its own on this machine (default settings, fsync on). Client, appliance,
cipher machine and database share the processors. Rounds are interleaved; medians and ranges.

  (1) up ÷ away        durable signatures a second (POST /v1/sign at 64 clients, no stamp) with the database there, over the
                       same while it is stopped                                                                          ≥ 0.75
  (2) shipper ÷ sign   rows a second that the shipper writes when signing pauses, over (1)'s rate with the database there  ≥ 3
  (3) year report      median latency of a signature at 16 clients while the year's report is made of so many records in
                       the database, over the same without                                                               ≤ 1.25`

// benchDatabaseCommand measures the central database; the Makefile's bench calls it.
func benchDatabaseCommand() *cobra.Command {
	b := &databaseBench{}
	c := &cobra.Command{
		Use: "bench-database --dir DIR", Hidden: true, Short: "测量中心库 (measure the central database)", Long: benchDatabaseText, Args: exactArgs(0),
		RunE: func(c *cobra.Command, _ []string) error {
			if b.rounds < 1 || b.each <= 0 || b.records < 1 {
				return usageError{errors.New("--rounds、--each、--records 须为正 (must be positive)")}
			}
			return b.run(c.Context())
		},
	}
	f := c.Flags()
	f.StringVar(&b.folder, "dir", "out/bench-database", "目录，每次重建 (folder, made anew)")
	f.StringVar(&b.results, "results", "", "结果目录：database.md、database.json (folder for the results)")
	f.IntVar(&b.rounds, "rounds", 7, "轮数 (rounds)")
	f.DurationVar(&b.each, "each", 3*time.Second, "每项每轮时长 (time of each case in each round)")
	f.IntVar(&b.records, "records", 1_000_000, "统计所及的记录数 (records that the report is made of)")
	return c
}

// A databaseBench is one measurement.
type databaseBench struct {
	benchOptions
	*demo
	records int

	server  *benchServer
	clients []*client.Client
}

func (b *databaseBench) run(ctx context.Context) (err error) {
	clock, err := sysclock.Open()
	if err != nil {
		return err
	}
	if b.folder, err = filepath.Abs(b.folder); err != nil {
		return err
	}
	b.demo = &demo{dir: b.folder, clock: clock, begun: clock.Monotonic()}
	if b.server, err = newBenchServer(); err != nil {
		return err
	}
	defer b.server.remove()
	if err := b.server.start(ctx); err != nil {
		return err
	}
	if err := b.fresh(ctx); err != nil {
		return err
	}
	if err := changeConfig(filepath.Join(b.dir, "config.toml"), func(c *appliance.Config) { c.Database.DSN = b.server.dsn() }); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.stopServer()) }()
	if err := b.startServer(ctx); err != nil {
		return err
	}
	if err := b.prepare(ctx); err != nil {
		return explain(err)
	}
	fmt.Println(benchDatabaseText)
	fmt.Println()
	var ratios []poolRatio
	for _, measure := range []func(context.Context) ([]poolRatio, error){b.shipping, b.reporting} {
		r, err := measure(ctx)
		if err != nil {
			return explain(err)
		}
		ratios = append(ratios, r...)
		fmt.Print(poolTable(r))
	}
	if b.results == "" {
		return nil
	}
	machine := machineOf(b.dir, b.now())
	page := fmt.Sprintf("# Measured by `make bench`: the central database\n\nWritten by the program; not to be edited. Definitions: `yinjian bench-database --help`.\n\n"+
		"%s, revision %s, %s; %s, %d cores, Linux %s; %s\n\n%d rounds of %v each case; load average %s\n\n| | median | min – max | limit | |\n| --- | ---: | ---: | ---: | --- |\n%s",
		machine.At, machine.Revision, machine.Go, machine.CPU, machine.Cores, machine.Kernel, b.server.version, b.rounds, b.each, machine.Load, poolTable(ratios))
	j, err := json.MarshalIndent(ratios, "", "  ")
	if err != nil {
		return err
	}
	return errors.Join(os.MkdirAll(b.results, 0o755), os.WriteFile(filepath.Join(b.results, "database.md"), []byte(page), 0o644),
		os.WriteFile(filepath.Join(b.results, "database.json"), append(j, '\n'), 0o644))
}

func (b *databaseBench) prepare(ctx context.Context) error {
	if err := b.register(ctx); err != nil {
		return err
	}
	for i := range benchApps {
		c, err := b.open(ctx, fmt.Sprintf("bench-%d", i), "测量", "本部", account.StampNone, string(evidence.AppAsserted))
		if err != nil {
			return err
		}
		b.clients = append(b.clients, c)
	}
	return nil
}

// projected is the projection's state.
type projected struct{ Shipped, Lag uint64 }

func (b *databaseBench) projected(ctx context.Context) (projected, error) {
	answer, err := b.admin.State(ctx)
	var s struct{ Projection projected }
	if err == nil {
		err = json.Unmarshal(answer, &s)
	}
	return s.Projection, err
}

// caughtUp waits until everything is shipped, and answers the rate at which that was done, from when it began to move.
func (b *databaseBench) caughtUp(ctx context.Context) (rate float64, err error) {
	first, err := b.projected(ctx)
	moving := projected{}
	var begun time.Time
	for limit := time.Now(); err == nil; { // interval
		var s projected
		if s, err = b.projected(ctx); err != nil {
			break
		}
		now := time.Now() // interval
		switch {
		case s.Lag == 0 && begun.IsZero():
			return 0, nil
		case s.Lag == 0:
			return float64(s.Shipped-moving.Shipped) / now.Sub(begun).Seconds(), nil
		case begun.IsZero() && s.Shipped > first.Shipped && first.Shipped > 0:
			moving, begun = s, now
		case first.Shipped == 0: // not known while it is being opened
			first = s
		}
		if now.Sub(limit) > 5*time.Minute {
			return 0, errors.New("the projection does not catch up")
		}
		time.Sleep(2 * time.Millisecond)
	}
	return 0, err
}

// shipping is (1) and (2).
func (b *databaseBench) shipping(ctx context.Context) ([]poolRatio, error) {
	sign := &benchCase{Conns: 64, op: benchSign(b.clients)}
	rate := func() (float64, error) {
		begun := time.Now() // interval
		n, err := sign.run(ctx, b.each)
		return float64(n) / time.Since(begun).Seconds(), err
	}
	if _, err := rate(); err != nil { // connections, statements and caches are there before the first round
		return nil, err
	}
	away := poolRatio{Name: "(1) signing with the database up ÷ away", Floor: 0.75, Least: true}
	shipper := poolRatio{Name: "(2) shipper ÷ signing", Floor: 3, Least: true}
	for round := range b.rounds {
		var up, without float64
		phases := []func() error{
			func() (err error) {
				if _, err = b.caughtUp(ctx); err == nil {
					up, err = rate()
				}
				return err
			},
			func() (err error) {
				b.server.stop()
				without, err = rate()
				return errors.Join(err, b.server.start(ctx))
			},
		}
		if round%2 == 1 { // neither is always measured first
			slices.Reverse(phases)
		}
		var rows float64
		for _, f := range phases {
			if err := f(); err != nil {
				return nil, err
			}
			r, err := b.caughtUp(ctx)
			if err != nil {
				return nil, err
			}
			rows = max(rows, r) // after the database was away there is more to ship
		}
		away.Samples = append(away.Samples, up/without)
		shipper.Samples = append(shipper.Samples, rows/up)
		away.Note, shipper.Note = fmt.Sprintf("%.0f and %.0f a second", up, without), fmt.Sprintf("%.0f rows a second", rows)
	}
	return []poolRatio{away, shipper}, nil
}

// reporting is (3).
func (b *databaseBench) reporting(ctx context.Context) ([]poolRatio, error) {
	year := b.now().In(beijing).Year()
	if err := b.fill(ctx, year); err != nil {
		return nil, err
	}
	const conns = 16
	op := benchSign(b.clients)
	median := func(until func() bool) (float64, error) {
		var took [conns][]float64
		c := &benchCase{Conns: conns, op: func(ctx context.Context, i int) error {
			begun := time.Now() // interval
			err := op(ctx, i)
			took[i] = append(took[i], time.Since(begun).Seconds())
			return err
		}}
		for again := true; again; again = !until() {
			if _, err := c.run(ctx, b.each); err != nil {
				return 0, err
			}
		}
		all := slices.Concat(took[:]...)
		slices.Sort(all)
		return all[len(all)/2], nil
	}
	r := poolRatio{Name: fmt.Sprintf("(3) median latency beside a year's report of %d records ÷ alone", b.records), Floor: 1.25}
	for range b.rounds {
		alone, err := median(func() bool { return true })
		if err != nil {
			return nil, err
		}
		begun := time.Now() // interval
		var reported time.Duration
		ended := make(chan error, 1)
		go func() {
			_, err := b.admin.YearReport(ctx, wire.YearReport{Year: year})
			reported = time.Since(begun)
			ended <- err
		}()
		var reportErr error
		beside, err := median(func() bool {
			select {
			case reportErr = <-ended:
				return true
			default:
				return false
			}
		})
		if err = errors.Join(err, reportErr); err != nil {
			return nil, err
		}
		r.Samples = append(r.Samples, beside/alone)
		r.Note = fmt.Sprintf("%.2f ms, alone %.2f ms; the report took %.1f s", 1000*beside, 1000*alone, reported.Seconds())
	}
	return []poolRatio{r}, nil
}

// fill writes records of a year into the database, as those of an appliance elsewhere.
func (b *databaseBench) fill(ctx context.Context, year int) error {
	store, err := connect.Open(ctx, connect.Place{DSN: b.server.dsn()}, central.Author{Name: "bench"})
	if err != nil {
		return err
	}
	defer store.Close()
	const node, epoch, batch = "bench", "00000000000000be", 1024
	begin := time.Date(year, 1, 1, 0, 0, 0, 0, beijing)
	step := begin.AddDate(1, 0, 0).Sub(begin) / time.Duration(b.records)
	for at := 0; at < b.records; at += batch {
		p := audit.ProjectedBatch{Node: node, Epoch: epoch, First: uint64(at), MAC: strings.Repeat("0", 64), KeyID: "bench"}
		for i := at; i < min(at+batch, b.records); i++ {
			micros := begin.Add(time.Duration(i) * step).UnixMicro()
			p.Rows = append(p.Rows, audit.ProjectedRow{
				Node: node, Epoch: epoch, Sequence: uint64(i), LeafHash: fmt.Sprintf("%064x", i), RecordID: fmt.Sprintf("%064x", i), Kind: evidence.KindSign,
				Application: fmt.Sprintf("app-%d", i%7), Signer: fmt.Sprintf("D%05d", i%6300), Department: fmt.Sprintf("科室 %d", i%40),
				DocumentType: []string{"progress-note", "discharge-summary", "prescription", "report"}[i%4], Campus: []string{"本部", "滨海"}[i%2],
				SignedAt: micros, Bound: 1000, Status: audit.StatusRecorded, CreatedBy: "shipper/bench", CreatedAt: micros, ModifiedBy: "shipper/bench", ModifiedAt: micros,
			})
		}
		p.Last = p.First + uint64(len(p.Rows)) - 1
		if err := store.Apply(ctx, p); err != nil {
			return err
		}
	}
	return nil
}

// A benchServer is a PostgreSQL server in a temporary folder, on a Unix socket there.
type benchServer struct {
	base, bin, version string
	credential         *syscall.Credential // root may not run it
	cmd                *exec.Cmd
}

func newBenchServer() (*benchServer, error) {
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/initdb") // the pattern is well-formed
	if p, err := exec.LookPath("initdb"); err == nil {
		found = append(found, p)
	}
	if len(found) == 0 {
		return nil, errors.New("没有 PostgreSQL：packaging/dev/deps.sh test (PostgreSQL is not installed)")
	}
	s := &benchServer{bin: filepath.Dir(found[len(found)-1])}
	var err error
	if s.base, err = os.MkdirTemp("", "yj-bench-pg"); err != nil {
		return nil, err
	}
	if os.Getuid() == 0 {
		u, err := user.Lookup("postgres")
		if err != nil {
			return nil, err
		}
		uid, err1 := strconv.Atoi(u.Uid)
		gid, err2 := strconv.Atoi(u.Gid)
		if err := errors.Join(err1, err2, os.Chown(s.base, uid, gid)); err != nil {
			return nil, err
		}
		s.credential = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
	}
	out, err := s.command("initdb", "-D", filepath.Join(s.base, "data"), "-U", "yinjian", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8").CombinedOutput()
	if err != nil {
		s.remove()
		return nil, fmt.Errorf("initdb: %w: %s", err, out)
	}
	out, err = s.command("postgres", "--version").Output()
	s.version = strings.TrimSpace(string(out))
	return s, err
}

func (s *benchServer) command(name string, args ...string) *exec.Cmd {
	cmd := exec.Command(filepath.Join(s.bin, name), args...)
	cmd.Dir, cmd.Env = s.base, []string{"LC_ALL=C.UTF-8", "PATH=/usr/bin:/bin"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: s.credential}
	return cmd
}

func (s *benchServer) dsn() string { return "host=" + s.base + " user=yinjian dbname=postgres" }

// start starts the server and waits until it takes writes.
func (s *benchServer) start(ctx context.Context) error {
	s.cmd = s.command("postgres", "-D", filepath.Join(s.base, "data"), "-k", s.base, "-c", "listen_addresses=")
	s.cmd.SysProcAttr.Pdeathsig = syscall.SIGQUIT
	if err := s.cmd.Start(); err != nil {
		return err
	}
	db, _, err := connect.DB(connect.Place{DSN: s.dsn()})
	if err != nil {
		return err
	}
	defer db.Close()
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for err = db.PingContext(ctx); err != nil && ctx.Err() == nil; err = db.PingContext(ctx) {
		time.Sleep(50 * time.Millisecond)
	}
	return err
}

// stop ends it in order, without waiting for its clients.
func (s *benchServer) stop() {
	if s.cmd == nil {
		return
	}
	_ = s.cmd.Process.Signal(os.Interrupt) // it may have ended
	_ = s.cmd.Wait()
	s.cmd = nil
}

func (s *benchServer) remove() {
	s.stop()
	os.RemoveAll(s.base)
}

package main

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance/account"
	"yinjian/appliance/evidence"
	"yinjian/hsm"
	"yinjian/ntp/sysclock"
)

const benchConsoleText = `两台设备，签名人各 100 与 6300 名，和客户端、密码机共用本机处理器；各轮交错进行，给出中位数与范围。
Two appliances with 100 and 6,300 signers; client, appliances and cipher machines share the processors. Rounds are interleaved.

  (1) signers page     processor time of the appliance's process for one page of the console's list of signers, got over TLS
                       with a session, at 6,300 over 100: first page, a page far behind over the first of the fewer      ≤ 3
                       search (no limit: it reads every signer's words once)
  (2) overview         median latency of a signature at 64 clients while the overview is asked for once a second by each of
                       so many consoles, over the same without                                                           ≤ 1.25
  (3) assess           median latency of a signature at 64 clients while the evaluator's pack is made, over the same
                       without, in three rounds                                                                          ≤ 1.25`

func benchConsoleCommand() *cobra.Command {
	b := &consoleBench{}
	c := &cobra.Command{
		Use: "bench-console --dir DIR", Hidden: true, Short: "测量控制台与证据包 (measure the console and the evaluator's pack)", Long: benchConsoleText, Args: exactArgs(0),
		RunE: func(c *cobra.Command, _ []string) error {
			if b.rounds < 1 || b.each <= 0 || b.few < 1 || b.many < b.few || b.consoles < 1 {
				return usageError{errors.New("--rounds、--each、--few、--many、--consoles 须为正，且 few ≤ many (must be positive)")}
			}
			return b.run(c.Context())
		},
	}
	f := c.Flags()
	f.StringVar(&b.folder, "dir", "out/bench-console", "目录，每次重建 (folder, made anew)")
	f.StringVar(&b.results, "results", "", "结果目录：console.md、console.json (folder for the results)")
	f.IntVar(&b.rounds, "rounds", 7, "轮数 (rounds)")
	f.DurationVar(&b.each, "each", 3*time.Second, "每项每轮时长 (time of each case in each round)")
	f.IntVar(&b.few, "few", 100, "签名人较少的设备有几名 (signers of the smaller appliance)")
	f.IntVar(&b.many, "many", 6300, "签名人较多的设备有几名 (signers of the larger one)")
	f.IntVar(&b.consoles, "consoles", 8, "同时打开的总览页 (overviews that are open)")
	return c
}

// A consoleBench is one measurement.
type consoleBench struct {
	benchOptions
	few, many, consoles int
	small, large        *staffed
	clients             []*client.Client // of the larger appliance
}

// A staffed is an appliance with so many signers, and an administrator's session at it.
type staffed struct {
	*bench
	console *client.Admin
	signers int
}

func (b *consoleBench) run(ctx context.Context) (err error) {
	if b.folder, err = filepath.Abs(b.folder); err != nil {
		return err
	}
	fmt.Println(benchConsoleText)
	fmt.Println()
	for _, one := range []struct {
		at   **staffed
		name string
		n    int
	}{{&b.small, "few", b.few}, {&b.large, "many", b.many}} {
		s, serr := b.staffed(ctx, one.name, one.n)
		if s != nil {
			defer func() { err = errors.Join(err, s.stopServer()) }()
		}
		if serr != nil {
			return explain(serr)
		}
		*one.at = s
	}
	for i := range benchApps {
		c, err := b.large.open(ctx, fmt.Sprintf("bench-%d", i), "测量", "本部", account.StampNone, string(evidence.AppAsserted))
		if err != nil {
			return err
		}
		b.clients = append(b.clients, c)
	}
	var ratios []poolRatio
	for _, measure := range []func(context.Context) ([]poolRatio, error){b.pages, b.beside} {
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
	machine := machineOf(b.large.dir, b.large.now())
	page := fmt.Sprintf("# Measured by `make bench`: the console and the evaluator's pack beside signing\n\nWritten by the program; not to be edited. Definitions: `yinjian bench-console --help`.\n\n"+
		"%s, revision %s, %s; %s, %d cores, Linux %s\n\n%d rounds of %v each case; load average %s\n\n| | median | min – max | limit | |\n| --- | ---: | ---: | ---: | --- |\n%s",
		machine.At, machine.Revision, machine.Go, machine.CPU, machine.Cores, machine.Kernel, b.rounds, b.each, machine.Load, poolTable(ratios))
	j, err := json.MarshalIndent(ratios, "", "  ")
	if err != nil {
		return err
	}
	return errors.Join(os.MkdirAll(b.results, 0o755), os.WriteFile(filepath.Join(b.results, "console.md"), []byte(page), 0o644),
		os.WriteFile(filepath.Join(b.results, "console.json"), append(j, '\n'), 0o644))
}

// staffed makes and starts an appliance with so many signers.
func (b *consoleBench) staffed(ctx context.Context, name string, signers int) (*staffed, error) {
	clock, err := sysclock.Open()
	if err != nil {
		return nil, err
	}
	d := &demo{dir: filepath.Join(b.folder, name), clock: clock, begun: clock.Monotonic()}
	if err := d.fresh(ctx); err != nil {
		return nil, err
	}
	s := &staffed{bench: &bench{benchOptions: b.benchOptions, demo: d}, signers: signers}
	if err := d.startServer(ctx); err != nil {
		return s, err
	}
	if err := errors.Join(d.register(ctx), d.administrators(ctx)); err != nil {
		return s, err
	}
	for at := 1; at < signers; at += staffPart { // one was enrolled with the applications
		req := wire.ImportSigners{}
		for i := at; i < min(at+staffPart, signers); i++ {
			req.Signers = append(req.Signers, wire.ImportSigner{
				ID: fmt.Sprintf("B%05d", i), Name: fmt.Sprintf("测量%d", i), Department: fmt.Sprintf("科室%d", i%40), Campus: "本部", Algorithms: []string{string(hsm.SM2)},
			})
		}
		if _, err := d.admin.ImportSigners(ctx, req); err != nil {
			return s, err
		}
	}
	fmt.Printf("     %s：签名人 signers %d\n", name, signers)
	return s, s.login(ctx)
}

// staffPart is how many signers one request enrols.
const staffPart = 32

// login begins a session of the demo's security administrator.
func (s *staffed) login(ctx context.Context) error {
	said, err := os.ReadFile(filepath.Join(s.dir, "credentials", administratorsFile))
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(said)) {
		field := strings.Fields(line)
		if len(field) < 2 || field[0] != "anquan" {
			continue
		}
		a := client.NewAdminTLS(s.ends.AdminTLS, &tls.Config{RootCAs: s.roots, MinVersion: tls.VersionTLS13})
		in, err := a.Login(ctx, wire.Login{Name: field[0], Password: field[1]})
		if err != nil {
			return err
		}
		s.console = a.WithSession(in.Session, nil)
		return nil
	}
	return errors.New("the demo has no security administrator")
}

// page is the appliance's processor seconds for one page, asked for during each.
func (s *staffed) page(ctx context.Context, path, has string) (float64, error) {
	before, err := s.processors()
	if err != nil {
		return 0, err
	}
	n := 0
	for begun := time.Now(); time.Since(begun) < s.each; n++ { // interval
		got, err := s.console.Page(ctx, path)
		if err != nil {
			return 0, fmt.Errorf("%s: %w", path, err)
		}
		if !strings.Contains(string(got), has) {
			return 0, fmt.Errorf("%s: the page has no %q", path, has)
		}
	}
	after, err := s.processors()
	return (after.roles[roleAppliance] - before.roles[roleAppliance]) / float64(n), err
}

// pages is (1).
func (b *consoleBench) pages(ctx context.Context) ([]poolRatio, error) {
	first, err := b.large.console.Page(ctx, "/console/signers")
	if err != nil {
		return nil, err
	}
	perPage := strings.Count(string(first), `href="/console/signers/B`)
	if perPage == 0 {
		return nil, errors.New("the list of signers has none")
	}
	page := max(1, b.many*9/10/perPage)
	far, onIt := fmt.Sprintf("/console/signers?page=%d", page), fmt.Sprintf("B%05d", (page-1)*perPage+perPage/2)
	cases := []struct {
		poolRatio
		small, large, hasSmall, hasLarge string
	}{
		{poolRatio{Name: fmt.Sprintf("(1) first page of %d signers ÷ of %d", b.many, b.few), Floor: 3}, "/console/signers", "/console/signers", "B00010", "B00010"},
		{poolRatio{Name: "(1) search by id"}, "/console/signers?q=B00042", "/console/signers?q=B00042", "B00042", "B00042"},
		{poolRatio{Name: "(1) a page far behind ÷ the first of the fewer", Floor: 3}, "/console/signers", far, "B00010", onIt},
	}
	for range b.rounds {
		for i := range cases {
			c := &cases[i]
			few, err := b.small.page(ctx, c.small, c.hasSmall)
			if err != nil {
				return nil, err
			}
			many, err := b.large.page(ctx, c.large, c.hasLarge)
			if err != nil {
				return nil, err
			}
			c.Samples = append(c.Samples, many/few)
			c.Note = fmt.Sprintf("%.2f and %.2f ms of processor a page", 1000*many, 1000*few)
		}
	}
	var ratios []poolRatio
	for _, c := range cases {
		ratios = append(ratios, c.poolRatio)
	}
	return ratios, nil
}

// latency signs at 64 clients for each, and on until done answers true; the median latency in seconds.
func (b *consoleBench) latency(ctx context.Context, done func() bool) (float64, error) {
	const conns = 64
	op := benchSign(b.clients)
	var took [conns][]float64
	c := &benchCase{Conns: conns, op: func(ctx context.Context, i int) error {
		begun := time.Now() // interval
		err := op(ctx, i)
		took[i] = append(took[i], time.Since(begun).Seconds())
		return err
	}}
	for again := true; again; again = !done() {
		if _, err := c.run(ctx, b.each); err != nil {
			return 0, err
		}
	}
	all := slices.Sorted(slices.Values(slices.Concat(took[:]...)))
	return all[len(all)/2], nil
}

// assessedRounds is how many rounds a pack is made in: it takes the processor that signing leaves, so each takes a minute.
const assessedRounds = 3

// beside is (2) and (3).
func (b *consoleBench) beside(ctx context.Context) ([]poolRatio, error) {
	overview := poolRatio{Name: fmt.Sprintf("(2) signing beside %d consoles ÷ alone", b.consoles), Floor: 1.25}
	assessed := poolRatio{Name: "(3) signing beside assess ÷ alone", Floor: 1.25}
	at := func() bool { return true }
	if _, err := b.latency(ctx, at); err != nil { // connections and statements are there before the first round
		return nil, err
	}
	for round := range b.rounds {
		alone, err := b.latency(ctx, at)
		if err != nil {
			return nil, err
		}
		polled, pages, err := b.polled(ctx)
		if err != nil {
			return nil, err
		}
		overview.Samples = append(overview.Samples, polled/alone)
		overview.Note = fmt.Sprintf("%.2f ms, alone %.2f ms; %d pages", 1000*polled, 1000*alone, pages)
		fmt.Printf("\r第 %d/%d 轮 round", round+1, b.rounds)
		if round >= assessedRounds {
			continue
		}
		if alone, err = b.latency(ctx, at); err != nil {
			return nil, err
		}
		busy, took, err := b.assessed(ctx, round)
		if err != nil {
			return nil, err
		}
		assessed.Samples = append(assessed.Samples, busy/alone)
		assessed.Note = fmt.Sprintf("%.2f ms, alone %.2f ms; the pack took %.1f s", 1000*busy, 1000*alone, took.Seconds())
	}
	fmt.Println()
	return []poolRatio{overview, assessed}, nil
}

// polled is the latency while consoles look at the overview once a second each.
func (b *consoleBench) polled(ctx context.Context) (latency float64, pages int, err error) {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	var wg sync.WaitGroup
	var mu sync.Mutex
	var failed error // guarded by mu, as pages
	for range b.consoles {
		wg.Go(func() {
			tick := time.NewTicker(time.Second)
			defer tick.Stop()
			for {
				_, err := b.large.console.Page(ctx, "/console/")
				if ctx.Err() != nil {
					return
				}
				mu.Lock()
				pages++
				failed = errors.Join(failed, err)
				mu.Unlock()
				select {
				case <-tick.C:
				case <-ctx.Done():
					return
				}
			}
		})
	}
	latency, err = b.latency(ctx, func() bool { return true })
	stop()
	wg.Wait()
	return latency, pages, errors.Join(err, failed)
}

// assessed is the latency until the evaluator's pack is there.
func (b *consoleBench) assessed(ctx context.Context, round int) (latency float64, took time.Duration, err error) {
	begun := time.Now() // interval
	ended := make(chan error, 1)
	go func() {
		_, err := b.large.admin.Assess(ctx, wire.Assess{Nonce: fmt.Sprintf("bench-round-%d", round), Assessor: "测量"})
		took = time.Since(begun)
		ended <- err
	}()
	var failed error
	latency, err = b.latency(ctx, func() bool {
		select {
		case failed = <-ended:
			return true
		default:
			return false
		}
	})
	return latency, took, errors.Join(err, failed)
}

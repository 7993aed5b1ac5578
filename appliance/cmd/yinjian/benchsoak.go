package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	mathrand "math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pelletier/go-toml/v2"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance"
	"yinjian/appliance/account"
	"yinjian/appliance/audit"
	"yinjian/appliance/evidence"
	"yinjian/appliance/evidence/show"
	"yinjian/appliance/pki"
	"yinjian/appliance/problem"
	"yinjian/appliance/uses"
	"yinjian/dbdriver/sqlite"
	"yinjian/ntp/sysclock"
)

const benchSoakText = `一台设备、PostgreSQL、三个外部时间源，用户按混合负载不停请求(签名带时间戳，失败不重发)；故障由种子决定次序与时刻。
最后：未知结局的逐个以同一键问明，已应答的记录逐条在日志中找到，验证其证据(--evidence)，audit verify，密钥使用对账。有严重失效即以 1 退出。

One appliance, PostgreSQL, three outside time servers; users ask without end, by the mix, stamped, nothing sent twice. A seed chooses
the faults, their order and moments. At the end each unknown outcome is asked for under its own key, each acknowledged record is
looked up in the journal, evidence judged offline (--evidence), the journal verified and the uses of keys accounted for.

Severe, and none is allowed (exit 1):
  lost          acknowledged, and not in the journal where it was said to be, or without valid evidence
  unaccounted   signed by the cipher machine, and neither in the journal nor named by it (audit verify, log of uses)
  not back      a process, the service or the central database is not what it was 60 s after a fault ended
  internal      an answer that says 500 internal, or that is wrong
  while well    an error while nothing was broken
  not injected  (from 8 minutes on) a fault of which neither the appliance nor the system showed anything; a kind of fault (machine,
                worker, database, line, clock, disk) that never came, or that this machine cannot do (the disk needs root)
Limit: memory of all the appliance's processes in the last quiet minute over that after its first ≤ 1.1 (from 8 minutes on). What grew
meanwhile is told by part: live objects and the rest of Go's memory, what C has beyond it (SQLite's caches, the C library), mapped files
(program, shared indexes of SQLite), and the other processes.`

// soakBack is how long anything may take to be back.
const soakBack = 60 * time.Second

// A soak is one long run.
type soak struct {
	*bench
	loader
	long        time.Duration
	signers     int
	sample      int // records whose evidence is judged; 0: all
	volumeBytes int64

	rnd      *mathrand.Rand
	sources  []*soakSource
	database *benchServer
	line     *soakLine
	volume   string // mount point, "" without
	noVolume string

	broken atomic.Pointer[string] // the fault under way, nil while all is well
	report soakReport

	mu      sync.Mutex // guards what follows
	made    *os.File   // acknowledged records: id, sequence
	errs    map[string]map[string]int64
	open    []soakOpen
	written int64
}

// A soakOpen is a request whose outcome is not known.
type soakOpen struct {
	client *client.Client
	key    string
	req    wire.SignRequest
}

// A soakPoint is what was seen at one moment.
type soakPoint struct {
	At         float64 `json:"at_s"`
	RSS        int64   `json:"rss_bytes"` // of the appliance's own process
	All        int64   `json:"rss_all_bytes"`
	Goroutines int     `json:"goroutines"`
	Files      int     `json:"descriptors"`
	Journal    int64   `json:"journal_bytes"`
	Requests   int64   `json:"requests"` // so far
	// Parts are the memory of the appliance's processes by what it is; they sum to All.
	Parts map[string]int64 `json:"parts"`
	Lag   uint64           `json:"projection_lag"`
}

// A soakGrown is one part of the memory, in the two windows that the ratio is of.
type soakGrown struct {
	Part   string `json:"part"`
	Before int64  `json:"before_bytes"`
	After  int64  `json:"after_bytes"`
}

// A soakEvent is a fault that was.
type soakEvent struct {
	Fault string  `json:"fault"`
	From  float64 `json:"from_s"`
	To    float64 `json:"to_s"`   // mended
	Back  float64 `json:"back_s"` // all is well again
	Seen  string  `json:"seen"`   // by what; "" if by nothing
}

// A soakReport is the ledger.
type soakReport struct {
	Machine      machineInfo                 `json:"machine"`
	Users        int                         `json:"users"`
	Seed         uint64                      `json:"seed"`
	Seconds      float64                     `json:"seconds"`
	Classes      map[string]*loadTally       `json:"classes"`
	Errors       map[string]map[string]int64 `json:"errors"` // by what was broken, by code; "" while all was well
	Acknowledged int64                       `json:"acknowledged"`
	Unsettled    int                         `json:"unsettled"` // outcomes that were asked for at the end
	Found        int64                       `json:"found_in_journal"`
	Judged       int                         `json:"evidence_judged"`
	Named        int                         `json:"uses_named"` // signatures that nobody got, named by the journal
	Severe       []string                    `json:"severe"`
	RSSRatio     float64                     `json:"rss_ratio"`
	RSSJudged    bool                        `json:"rss_judged"`
	Grew         []soakGrown                 `json:"grew"` // by part
	Left         []string                    `json:"faults_left_out"`
	Events       []soakEvent                 `json:"faults"`
	Points       []soakPoint                 `json:"points"`
}

func benchSoakCommand() *cobra.Command {
	s := &soak{bench: &bench{}}
	var volume int64
	c := &cobra.Command{
		Use: "bench-soak --dir DIR", Hidden: true, Short: "长时间运行并注入故障 (soak, with faults)", Long: benchSoakText, Args: exactArgs(0),
		RunE: func(c *cobra.Command, _ []string) (err error) {
			if s.long < 10*time.Second || s.signers < 1 || s.sample < 0 || volume < 1 {
				return usageError{errors.New("--for 至少 10s，--signers、--volume-gb 须为正 (at least 10s; must be positive)")}
			}
			if err := s.check(); err != nil {
				return err
			}
			if s.folder, err = filepath.Abs(s.folder); err != nil {
				return err
			}
			s.volumeBytes = volume << 30
			return s.run(c.Context())
		},
	}
	loaderFlags(c, &s.loader, 64, 100*time.Millisecond)
	f := c.Flags()
	f.StringVar(&s.folder, "dir", "out/soak", "目录，每次重建 (folder, made anew)")
	f.StringVar(&s.results, "results", "", "结果目录：soak.md、soak.json、soak.svg (folder for the results)")
	f.DurationVar(&s.long, "for", 10*time.Minute, "时长 (how long)")
	f.IntVar(&s.signers, "signers", 64, "签名人数 (signers)")
	f.IntVar(&s.sample, "evidence", 20_000, "抽验多少条记录的证据，0 为全部；日志中逐条都找 (records whose evidence is judged; 0: all. All are looked up in the journal)")
	f.Int64Var(&volume, "volume-gb", 8, "设备的卷，稀疏文件 (the appliance's volume, a sparse file)")
	return c
}

func (s *soak) run(ctx context.Context) (err error) {
	setMemory()
	clock, err := sysclock.Open()
	if err != nil {
		return err
	}
	if err := s.empty(); err != nil {
		return err
	}
	s.rnd = mathrand.New(mathrand.NewPCG(s.seed, 7))
	s.errs, s.report.Users, s.report.Seed = map[string]map[string]int64{}, s.users, s.seed
	if err := s.mountVolume(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.unmountVolume()) }()
	s.demo = &demo{dir: filepath.Join(cmp.Or(s.volume, s.folder), "a"), clock: clock, begun: clock.Monotonic()}
	if s.made, err = os.Create(filepath.Join(s.folder, "acknowledged")); err != nil {
		return err
	}
	defer s.made.Close()

	said := defaultAnswers()
	for range 3 {
		one, err := startSource(s.now)
		if err != nil {
			return err
		}
		defer one.conn.Close()
		s.sources, said.TimeSources = append(s.sources, one), append(said.TimeSources, one.conn.LocalAddr().String())
	}
	if s.database, err = newBenchServer(); err != nil {
		return err
	}
	defer s.database.remove()
	if err := s.database.start(ctx); err != nil {
		return err
	}
	socket, err := os.MkdirTemp("", "yj-soak") // a socket's path has no more room than 108 bytes
	if err != nil {
		return err
	}
	defer os.RemoveAll(socket)
	if s.line, err = startLine(socket, s.database.base); err != nil {
		return err
	}
	defer s.line.listener.Close()

	if err := runInit(ctx, initOptions{dir: s.dir, answers: said}); err != nil {
		return err
	}
	err = changeConfig(filepath.Join(s.dir, "config.toml"), func(c *appliance.Config) {
		c.Database.DSN, c.Time.Poll = "host="+socket+" user=yinjian dbname=postgres", appliance.Duration(2*time.Second)
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.stopServer()) }()
	if err := s.startServer(ctx); err != nil {
		return err
	}
	target := filepath.Join(s.folder, "target.json")
	if err := s.writeTarget(ctx, target, s.signers, account.StampRequired); err != nil {
		return explain(err)
	}
	if s.target, err = readTarget(target); err != nil {
		return err
	}
	fmt.Println(benchSoakText)
	fmt.Println()
	if err := s.soak(ctx); err != nil {
		return explain(err)
	}
	if err := s.settle(ctx); err != nil {
		return explain(err)
	}
	if err := s.judge(ctx); err != nil {
		return explain(err)
	}
	return s.finish()
}

// empty removes what an earlier soak left in its folder.
func (s *soak) empty() error {
	if err := os.MkdirAll(s.folder, 0o700); err != nil {
		return err
	}
	for _, name := range []string{"a", "volume", "volume.img", "acknowledged", "target.json"} {
		if err := os.RemoveAll(filepath.Join(s.folder, name)); err != nil {
			return err
		}
	}
	return nil
}

// changeConfig changes a configuration, as somebody with an editor would.
func changeConfig(file string, change func(*appliance.Config)) error {
	var c appliance.Config
	text, err := os.ReadFile(file)
	if err == nil {
		err = toml.Unmarshal(text, &c)
	}
	if err != nil {
		return err
	}
	change(&c)
	if text, err = toml.Marshal(c); err != nil {
		return err
	}
	return os.WriteFile(file, text, 0o600)
}

// soak is the load and, beside it, the faults.
func (s *soak) soak(ctx context.Context) error {
	s.clock, s.step, s.ramp = s.now, time.Second, 2*time.Second
	s.signed = func(r *wire.SignResult) {
		if err := s.acknowledge(r); err != nil {
			s.severe("lost: %s: %v", r.RecordID, err)
		}
	}
	s.unsettled = func(c *client.Client, key string, req wire.SignRequest) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.open = append(s.open, soakOpen{c, key, req})
	}
	s.failed = func(code string, n int64) {
		what := ""
		if b := s.broken.Load(); b != nil {
			what = *b
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.errs[what] == nil {
			s.errs[what] = map[string]int64{}
		}
		s.errs[what][code] += n
	}
	if err := s.loader.prepare(); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- s.load(ctx) }()
	s.loader.measure()
	begun := time.Now() // interval
	watched, watch := context.WithCancel(ctx)
	seen := make(chan error, 1)
	go func() { seen <- s.watch(watched, begun) }()
	err := s.breakThings(ctx, begun)
	watch()
	err = errors.Join(err, <-seen)
	result := s.loader.end()
	close(s.loader.stop)
	s.report.Seconds, s.report.Classes = result.Seconds, result.Classes
	return errors.Join(err, <-ended)
}

// breakThings leaves the begin and the end of the run alone, and breaks one thing after the other between.
func (s *soak) breakThings(ctx context.Context, begun time.Time) error {
	can, left := s.faults()
	s.report.Left = left
	quiet := s.quiet()
	pace := min(s.long/60, 10*time.Second) // about how long a fault lasts
	var looked soakFault
	var seen string
	look := func() {
		if looked.seen != nil && seen == "" {
			seen = looked.seen(ctx)
		}
	}
	sleep := func(d time.Duration) error {
		tick := time.NewTicker(200 * time.Millisecond)
		defer tick.Stop()
		for end := time.After(d); ; {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-tick.C:
				look()
			case <-end:
				return nil
			}
		}
	}
	if err := sleep(quiet); err != nil {
		return err
	}
	var turn []int // all of them, before any comes again
	for time.Since(begun) < s.long-quiet {
		if len(turn) == 0 {
			turn = s.rnd.Perm(len(can))
		}
		f := can[turn[0]]
		turn = turn[1:]
		e := soakEvent{Fault: f.name, From: time.Since(begun).Seconds()}
		s.broken.Store(&f.name)
		before := s.acknowledged()
		fmt.Printf("\r%6.0f s  %-40s", e.From, f.name)
		if err := f.begin(ctx); err != nil {
			return fmt.Errorf("%s: %w", f.name, err)
		}
		looked, seen = f, ""
		look()
		if err := errors.Join(sleep(pace/2+time.Duration(s.rnd.Int64N(int64(pace)))), f.end(ctx)); err != nil {
			return fmt.Errorf("%s: %w", f.name, err)
		}
		e.To = time.Since(begun).Seconds()
		if err := s.back(ctx, before); err != nil {
			s.severe("not back: %s: %v", f.name, err)
		}
		e.Back = time.Since(begun).Seconds()
		// What was under way may still be told of it.
		if err := sleep(pace/2 + time.Second); err != nil {
			return err
		}
		look()
		if e.Seen = seen; seen == "" && s.judged() { // in a short run each lasts a moment, and may come and go between two looks
			s.severe("not injected: %s at %.0f s: nothing showed it", f.name, e.From)
		}
		looked = soakFault{}
		s.report.Events = append(s.report.Events, e)
		s.broken.Store(nil)
		if err := sleep(time.Duration(s.rnd.Int64N(int64(pace)))); err != nil {
			return err
		}
	}
	fmt.Println()
	s.complete(can)
	return sleep(s.long - time.Since(begun))
}

// complete wants every kind of fault to have been; a run too short for its memory to be judged is too short for that as well.
func (s *soak) complete(can []soakFault) {
	if !s.judged() {
		return
	}
	for _, f := range can {
		if !slices.ContainsFunc(s.report.Events, func(e soakEvent) bool { return e.Fault == f.name }) {
			s.severe("not injected: %s: it never came", f.name)
		}
	}
	for _, one := range s.report.Left {
		s.severe("not injected: %s", one)
	}
}

// quiet is how long the begin and the end of the run are left alone.
func (s *soak) quiet() time.Duration { return min(s.long/6, 80*time.Second) }

// judged is whether the run is long enough for memory and kinds of faults.
func (s *soak) judged() bool { return s.quiet() >= 80*time.Second }

// soakState is what is looked at.
type soakState struct {
	Ready bool
	HSM   map[string]struct{ Phase string }
	Time  struct{ State string }
	projectedState
}

type projectedState struct {
	Projection struct {
		projected
		Fork      bool
		LastError string `json:"last_error"`
	}
}

func (s *soak) state(ctx context.Context) (st soakState, err error) {
	answer, err := s.admin.State(ctx)
	if err == nil {
		err = json.Unmarshal(answer, &st)
	}
	return st, err
}

// back waits until everything is as it was and a signature was acknowledged since.
func (s *soak) back(ctx context.Context, before int64) error {
	begun := time.Now() // interval
	for {
		st, err := s.state(ctx)
		switch {
		case err != nil:
		case !st.Ready:
			err = errors.New("not ready")
		case !trustedState(st.Time.State):
			err = fmt.Errorf("time is %s", st.Time.State)
		case s.acknowledged() == before:
			err = errors.New("nothing was signed")
		case st.Projection.LastError != "":
			err = fmt.Errorf("central database: %s", st.Projection.LastError)
		}
		for class, slot := range st.HSM {
			if slot.Phase != "ready" {
				err = errors.Join(err, fmt.Errorf("slot %s is %s", class, slot.Phase))
			}
		}
		if err == nil {
			return nil
		}
		if time.Since(begun) > soakBack {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// watch looks once a second.
func (s *soak) watch(ctx context.Context, begun time.Time) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		p, err := s.look(ctx)
		if err != nil {
			continue // a process has gone meanwhile; whether it comes back is looked at elsewhere
		}
		p.At = time.Since(begun).Seconds()
		s.report.Points = append(s.report.Points, p)
	}
}

func (s *soak) look(ctx context.Context) (p soakPoint, err error) {
	rss, err := s.resident()
	if err != nil {
		return p, err
	}
	for role, n := range rss {
		if role != roleClient {
			p.All += n
		}
	}
	p.RSS = rss[roleAppliance]
	answer, err := s.admin.System(ctx)
	if err != nil {
		return p, err
	}
	var sys struct {
		Process struct {
			PID        int
			Goroutines int
			Files      int   `json:"open_files"`
			Heap       int64 `json:"heap_bytes"`
			Go         int64 `json:"go_bytes"`
		}
	}
	if err := json.Unmarshal(answer, &sys); err != nil {
		return p, err
	}
	mapped, err := mappedFiles(sys.Process.PID)
	if err != nil {
		return p, err
	}
	p.Parts = map[string]int64{
		partHeap: sys.Process.Heap, partGo: sys.Process.Go - sys.Process.Heap, partC: p.RSS - mapped - sys.Process.Go, partFiles: mapped,
	}
	for role, n := range rss {
		if role != roleClient && role != roleAppliance {
			p.Parts[role] = n
		}
	}
	p.Goroutines, p.Files = sys.Process.Goroutines, sys.Process.Files
	st, err := s.state(ctx)
	if err != nil {
		return p, err
	}
	p.Lag = st.Projection.Lag
	err = filepath.WalkDir(filepath.Join(s.dir, "journal"), func(_ string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err == nil {
			p.Journal += info.Size()
		}
		return err
	})
	s.loader.mu.Lock()
	p.Requests = s.loader.result.All.Requests
	s.loader.mu.Unlock()
	return p, err
}

// Parts of the appliance's own memory. Go's is what it has from the system: what of it was never touched is missing in partC.
const (
	partHeap  = "appliance: Go, objects"
	partGo    = "appliance: Go, the rest (free, stacks, tables)"
	partC     = "appliance: C (SQLite's caches, C library)"
	partFiles = "appliance: mapped files"
)

// mappedFiles is what of a process's memory are pages of files, or shared with them (proc(5): RssFile, RssShmem).
func mappedFiles(pid int) (sum int64, err error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(status)) {
		if f := strings.Fields(line); len(f) == 3 && (f[0] == "RssFile:" || f[0] == "RssShmem:") {
			kb, err := strconv.ParseInt(f[1], 10, 64)
			if err != nil {
				return 0, err
			}
			sum += kb << 10
		}
	}
	return sum, nil
}

func (s *soak) severe(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.report.Severe = append(s.report.Severe, fmt.Sprintf(format, args...))
}

// acknowledgedBytes are 32 of the record's id and 8 of its sequence.
const acknowledgedBytes = 40

func (s *soak) acknowledge(r *wire.SignResult) error {
	id, err := hex.DecodeString(r.RecordID)
	if err != nil || len(id) != 32 {
		return fmt.Errorf("record id %q: %w", r.RecordID, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.written++
	_, err = s.made.Write(binary.BigEndian.AppendUint64(id, r.Sequence))
	return err
}

func (s *soak) acknowledged() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.written
}

// settle asks for every outcome that is not known, under its own key, and waits until the central database has everything.
func (s *soak) settle(ctx context.Context) error {
	s.report.Unsettled = len(s.open)
	for _, o := range s.open {
		r, err := o.client.Sign(ctx, o.key, &o.req)
		if err != nil {
			s.severe("lost: the outcome of %s cannot be had: %v", o.key, err)
			continue
		}
		if err := s.acknowledge(r); err != nil {
			return err
		}
		o.client.Close()
	}
	limit := time.Now() // interval
	for {
		st, err := s.state(ctx)
		if err != nil {
			return err
		}
		if st.Projection.Fork {
			s.severe("lost: the central database has another history")
			return nil
		}
		if st.Projection.Lag == 0 {
			return nil
		}
		if time.Since(limit) > 10*time.Minute {
			s.severe("not back: the central database is %d entries behind: %s", st.Projection.Lag, st.Projection.LastError)
			return nil
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// A soakRecord is one that was acknowledged.
type soakRecord struct {
	sequence uint64
	id       [32]byte
}

func (s *soak) records() ([]soakRecord, error) {
	raw, err := os.ReadFile(s.made.Name())
	if err != nil {
		return nil, err
	}
	var all []soakRecord
	for one := range slices.Chunk(raw, acknowledgedBytes) {
		all = append(all, soakRecord{binary.BigEndian.Uint64(one[32:]), [32]byte(one[:32])})
	}
	slices.SortFunc(all, func(a, b soakRecord) int { return cmp.Compare(a.sequence, b.sequence) })
	return slices.Compact(all), nil
}

// judge has the evidence judged while the appliance runs, and the journal when it has stopped.
func (s *soak) judge(ctx context.Context) error {
	all, err := s.records()
	if err != nil {
		return err
	}
	s.report.Acknowledged = int64(len(all))
	if err := s.judgeEvidence(ctx, all); err != nil {
		return err
	}
	if err := s.stopServer(); err != nil {
		s.severe("not back: %v", err)
	}
	if err := s.find(ctx, all); err != nil {
		return err
	}
	var out bytes.Buffer
	err = auditVerify(ctx, &out, filepath.Join(s.dir, "journal"), filepath.Join(s.dir, "log.pem"), appliance.UsesDir(s.dir), nil, "json")
	var found struct{ Uses *uses.Report }
	if jerr := json.Unmarshal(out.Bytes(), &found); jerr != nil {
		return errors.Join(err, jerr)
	}
	if found.Uses != nil {
		s.report.Named = len(found.Uses.Named)
	}
	switch {
	case err != nil && !errors.Is(err, errFound):
		return err
	case found.Uses == nil || !found.Uses.OK():
		s.severe("unaccounted: audit verify: %s", out.String())
	case err != nil:
		s.severe("lost: audit verify: %s", out.String())
	}
	return nil
}

// judgeEvidence gets the evidence of all records, or of a sample, and judges it without the appliance.
func (s *soak) judgeEvidence(ctx context.Context, all []soakRecord) error {
	chosen := slices.Clone(all)
	if s.sample > 0 && s.sample < len(chosen) {
		s.rnd.Shuffle(len(chosen), func(i, j int) { chosen[i], chosen[j] = chosen[j], chosen[i] })
		chosen = chosen[:s.sample]
	}
	trust, err := show.LoadTrust(s.dir, filepath.Join(s.dir, "log.pem"))
	if err != nil {
		return err
	}
	const auditors = 4
	var clients []*client.Client
	for i := range auditors {
		c, err := s.auditor(ctx, fmt.Sprintf("auditor-%d", i))
		if err != nil {
			return err
		}
		defer c.Close()
		clients = append(clients, c)
	}
	var g errgroup.Group
	var at atomic.Int64
	for _, c := range clients {
		g.Go(func() error {
			for i := at.Add(1) - 1; i < int64(len(chosen)); i = at.Add(1) - 1 {
				id := hex.EncodeToString(chosen[i].id[:])
				b, err := c.Evidence(ctx, id)
				if err != nil {
					s.severe("lost: evidence of %s: %v", id, err)
					continue
				}
				bundle, err := evidence.Parse(b)
				if err != nil {
					s.severe("lost: evidence of %s: %v", id, err)
					continue
				}
				if r := evidence.Verify(bundle, trust, evidence.Input{Document: s.content}); r.Verdict != pki.Valid || bundle.RecordID != id {
					s.severe("lost: evidence of %s: %s %s", id, r.Verdict, r.Summary)
				}
			}
			return nil
		})
	}
	s.report.Judged = len(chosen)
	return g.Wait()
}

// auditor may read every application's evidence.
func (s *soak) auditor(ctx context.Context, id string) (*client.Client, error) {
	file := filepath.Join(s.dir, "credentials", id+".json")
	err := register(ctx, s.admin, wire.RegisterApplication{
		ID: id, Name: "核对", Campus: "本部", Stamp: account.StampNone, Consent: []string{string(evidence.AppAsserted)},
		Rights: []string{account.RightVerify, account.RightEvidenceAny}, Rate: account.MaxRate, Burst: account.MaxBurst,
	}, file)
	if err != nil {
		return nil, err
	}
	return s.clientOf(file, id, client.Retry{Attempts: client.DefaultAttempts})
}

// find looks each record up in the journal, where it was said to be.
func (s *soak) find(ctx context.Context, all []soakRecord) error {
	store, err := sqlite.OpenJournal(ctx, sqlite.JournalConfig{Dir: filepath.Join(s.dir, "journal"), ReadOnly: true})
	if err != nil {
		return err
	}
	defer store.Close()
	segments, err := store.Segments(ctx)
	if err != nil {
		return err
	}
	left := all
	for _, segment := range segments {
		err := store.Rows(ctx, segment.Number, 0, func(r audit.Row) error {
			for ; len(left) > 0 && left[0].sequence <= uint64(r.Sequence); left = left[1:] {
				if left[0].sequence == uint64(r.Sequence) && r.Kind == evidence.KindSign && bytes.Equal(left[0].id[:], r.Ref) {
					s.report.Found++
				} else {
					s.severe("lost: %x was acknowledged at %d", left[0].id, left[0].sequence)
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	for _, one := range left {
		s.severe("lost: %x was acknowledged at %d", one.id, one.sequence)
	}
	return nil
}

// finish counts what is severe, and writes the ledger.
func (s *soak) finish() error {
	s.report.Machine, s.report.Errors = machineOf(s.dir, s.now()), s.errs
	for what, codes := range s.errs {
		for code, n := range codes {
			switch {
			case code == string(problem.Internal) || code == wrongAnswer:
				s.severe("internal: %d × %s, broken: %s", n, code, cmp.Or(what, "nothing"))
			case what == "":
				s.severe("while well: %d × %s", n, code)
			}
		}
	}
	slices.Sort(s.report.Severe)
	s.ratio()
	page := s.page()
	fmt.Print(page)
	if s.results != "" {
		j, err := json.MarshalIndent(s.report, "", " ")
		if err != nil {
			return err
		}
		err = errors.Join(os.MkdirAll(s.results, 0o755), os.WriteFile(filepath.Join(s.results, "soak.md"), []byte(page), 0o644),
			os.WriteFile(filepath.Join(s.results, "soak.json"), append(j, '\n'), 0o644), os.WriteFile(filepath.Join(s.results, "soak.svg"), s.plot(), 0o644))
		if err != nil {
			return err
		}
	}
	if len(s.report.Severe) > 0 || s.report.RSSJudged && s.report.RSSRatio > soakGrowth {
		return errFound
	}
	return nil
}

// soakGrowth is how much memory may have grown.
const soakGrowth = 1.1

// ratio is that of memory in the last quiet half minute over that before the first minute was over. A run too short for that shows how
// its parts fill up, not whether they leak.
func (s *soak) ratio() {
	quiet, long := s.quiet().Seconds(), s.long.Seconds()
	median := func(from, to float64, of func(soakPoint) int64) float64 {
		var v []float64
		for _, p := range s.report.Points {
			if p.At >= from && p.At <= to {
				v = append(v, float64(of(p)))
			}
		}
		if len(v) == 0 {
			return 0
		}
		return spreadOf(v).Median
	}
	both := func(of func(soakPoint) int64) (before, after float64) {
		return median(quiet/2, quiet, of), median(long-quiet/2, long+1, of)
	}
	if before, after := both(func(p soakPoint) int64 { return p.All }); before > 0 {
		s.report.RSSRatio = after / before
	}
	parts := map[string]bool{}
	for _, p := range s.report.Points {
		for name := range p.Parts {
			parts[name] = true
		}
	}
	s.report.Grew = nil
	for _, name := range slices.Sorted(maps.Keys(parts)) {
		before, after := both(func(p soakPoint) int64 { return p.Parts[name] })
		s.report.Grew = append(s.report.Grew, soakGrown{name, int64(before), int64(after)})
	}
	s.report.RSSJudged = s.judged()
}

func (s *soak) page() string {
	r := &s.report
	m := r.Machine
	var out strings.Builder
	fmt.Fprintf(&out, "# Measured by `make soak`\n\nWritten by the program; not to be edited. Definitions: `yinjian bench-soak --help`.\n\n"+
		"%s, revision %s, %s; %s, %d cores, Linux %s; %s; %s; load average %s\n\n%.0f s, %d users, pause %v, mix %s, batches of %d, documents of %d bytes, stamped; seed %d\n\n",
		m.At, m.Revision, m.Go, m.CPU, m.Cores, m.Kernel, m.Filesystem, s.database.version, m.Load, r.Seconds, r.Users, s.think, s.mix, s.batch, s.bytes, r.Seed)
	judged := "not judged: the run is too short"
	if r.RSSJudged {
		judged = map[bool]string{true: "holds", false: "**fails**"}[r.RSSRatio <= soakGrowth]
	}
	fmt.Fprintf(&out, "| | | limit | |\n| --- | ---: | ---: | --- |\n| severe failures | %d | = 0 | %s |\n| memory at the end ÷ after the first minute | %.3f | ≤ %.1f | %s |\n",
		len(r.Severe), map[bool]string{true: "holds", false: "**fails**"}[len(r.Severe) == 0], r.RSSRatio, soakGrowth, judged)
	fmt.Fprintf(&out, "| acknowledged records | %d | | |\n| … found in the journal where they were said to be | %d | = | %s |\n| … whose evidence was judged offline | %d | | |\n| outcomes unknown, asked for at the end | %d | | |\n| signatures that nobody got, named by the journal | %d | | |\n",
		r.Acknowledged, r.Found, map[bool]string{true: "holds", false: "**fails**"}[r.Found == r.Acknowledged], r.Judged, r.Unsettled, r.Named)
	for _, one := range r.Severe[:min(20, len(r.Severe))] {
		fmt.Fprintf(&out, "\n**severe** %s\n", one)
	}
	for _, one := range r.Left {
		fmt.Fprintf(&out, "\nnot tried: %s\n", one)
	}
	fmt.Fprint(&out, "\n## Requests\n\n| class | requests | documents | p50 ms | p95 ms | p99 ms | slowest |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n")
	for _, name := range loadNames {
		t := r.Classes[name]
		fmt.Fprintf(&out, "| %s | %d | %d | %.1f | %.1f | %.1f | %.0f |\n", name, t.Requests, t.Documents, t.P50, t.P95, t.P99, t.Most)
	}
	fmt.Fprint(&out, "\n## Faults, and the errors that users saw meanwhile\n\n| broken | times | seen by | back after, s, at most | errors by code |\n| --- | ---: | --- | ---: | --- |\n")
	times, slowest, seen := map[string]int{"": 0}, map[string]float64{}, map[string]map[string]int{}
	for _, e := range r.Events {
		times[e.Fault]++
		if seen[e.Fault] == nil {
			seen[e.Fault] = map[string]int{}
		}
		seen[e.Fault][cmp.Or(e.Seen, "**nothing**")]++
		slowest[e.Fault] = max(slowest[e.Fault], e.Back-e.To)
	}
	for _, what := range slices.Sorted(maps.Keys(times)) {
		var codes []string
		for _, code := range slices.Sorted(maps.Keys(r.Errors[what])) {
			codes = append(codes, fmt.Sprintf("%d × %s", r.Errors[what][code], code))
		}
		back := fmt.Sprintf("%.1f", slowest[what])
		if what == "" {
			back = ""
		}
		var by []string
		for _, one := range slices.Sorted(maps.Keys(seen[what])) {
			by = append(by, fmt.Sprintf("%d × %s", seen[what][one], one))
		}
		fmt.Fprintf(&out, "| %s | %d | %s | %s | %s |\n", cmp.Or(what, "nothing"), times[what], strings.Join(by, ", "), back, cmp.Or(strings.Join(codes, ", "), "none"))
	}
	fmt.Fprint(&out, "\n## What grew: memory after the first minute and in the last, MB (medians of each window)\n\n| part | after the first minute | in the last | grew by |\n| --- | ---: | ---: | ---: |\n")
	var before, after int64
	for _, g := range r.Grew {
		before, after = before+g.Before, after+g.After
		fmt.Fprintf(&out, "| %s | %.1f | %.1f | %+.1f |\n", g.Part, float64(g.Before)/1e6, float64(g.After)/1e6, float64(g.After-g.Before)/1e6)
	}
	fmt.Fprintf(&out, "| all | %.1f | %.1f | %+.1f |\n", float64(before)/1e6, float64(after)/1e6, float64(after-before)/1e6)
	fmt.Fprint(&out, s.flat())
	fmt.Fprint(&out, "\n## By the minute\n\n| minute | requests so far | memory, all, MB | appliance, MB | goroutines | descriptors | journal, MB | projection behind |\n| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n")
	for i, p := range r.Points {
		if i+1 < len(r.Points) && int(r.Points[i+1].At)/60 == int(p.At)/60 {
			continue
		}
		fmt.Fprintf(&out, "| %.1f | %d | %.1f | %.1f | %d | %d | %.1f | %d |\n", p.At/60, p.Requests, float64(p.All)/1e6, float64(p.RSS)/1e6, p.Goroutines, p.Files, float64(p.Journal)/1e6, p.Lag)
	}
	return out.String()
}

// flat says of everything that has to be flat how it was in the thirds of the run: what leaks goes on growing in the last of them.
func (s *soak) flat() string {
	var out strings.Builder
	fmt.Fprint(&out, "\n## Flat? Medians of the thirds of the run\n\n| | first | second | last | last ÷ second |\n| --- | ---: | ---: | ---: | ---: |\n")
	third := s.long.Seconds() / 3
	rate := func(at int) float64 { // of the journal's file alone, a request
		points := s.report.Points
		p, b := points[at], points[max(0, at-30)]
		return float64(p.Journal-b.Journal) / max(1, float64(p.Requests-b.Requests))
	}
	for _, one := range []struct {
		name string
		of   func(at int, p soakPoint) float64
	}{
		{"memory, all, MB", func(_ int, p soakPoint) float64 { return float64(p.All) / 1e6 }},
		{"memory, appliance, MB", func(_ int, p soakPoint) float64 { return float64(p.RSS) / 1e6 }},
		{"goroutines", func(_ int, p soakPoint) float64 { return float64(p.Goroutines) }},
		{"descriptors", func(_ int, p soakPoint) float64 { return float64(p.Files) }},
		{"journal, bytes a request", func(at int, _ soakPoint) float64 { return rate(at) }},
	} {
		var m [3]float64
		for i := range m {
			var v []float64
			for at, p := range s.report.Points {
				if p.At >= float64(i)*third && p.At < float64(i+1)*third {
					v = append(v, one.of(at, p))
				}
			}
			if len(v) > 0 {
				m[i] = spreadOf(v).Median
			}
		}
		fmt.Fprintf(&out, "| %s | %.1f | %.1f | %.1f | %.3f |\n", one.name, m[0], m[1], m[2], m[2]/max(m[1], 1e-9))
	}
	return out.String()
}

// plot draws the points over time, with what was broken.
func (s *soak) plot() []byte {
	c := chart{
		title: fmt.Sprintf("%d 个用户 %.0f 分钟，注入故障 (users, minutes, with faults)", s.report.Users, s.report.Seconds/60), logY: true,
		xText: func(v float64) string { return fmt.Sprintf("%.4g min", v) }, yText: func(v float64) string { return fmt.Sprintf("%g", v) },
		xTicks: evenly(s.report.Seconds/60, 0.1, 8),
	}
	lines := []struct {
		name string
		of   func(before, p soakPoint) float64
	}{
		{"请求/s requests/s", func(b, p soakPoint) float64 { return float64(p.Requests-b.Requests) / max(p.At-b.At, 1e-3) }},
		{"内存 MB memory, all", func(_, p soakPoint) float64 { return float64(p.All) / 1e6 }},
		{"协程 goroutines", func(_, p soakPoint) float64 { return float64(p.Goroutines) }},
		{"描述符 descriptors", func(_, p soakPoint) float64 { return float64(p.Files) }},
		{"日志 MB journal", func(_, p soakPoint) float64 { return float64(p.Journal) / 1e6 }},
	}
	for _, l := range lines {
		one := series{name: l.name}
		var before soakPoint
		for _, p := range s.report.Points {
			one.points = append(one.points, [2]float64{p.At / 60, max(1, l.of(before, p))})
			before = p
		}
		c.series = append(c.series, one)
	}
	for _, e := range s.report.Events {
		c.spans = append(c.spans, chartSpan{e.From / 60, e.Back / 60, e.Fault})
	}
	return c.svg()
}

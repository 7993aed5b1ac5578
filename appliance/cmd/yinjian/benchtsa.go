package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/crypto/cryptobyte"
	der "golang.org/x/crypto/cryptobyte/asn1"

	"yinjian/appliance/cms"
	"yinjian/ntp/sysclock"
	"yinjian/tsa"
)

const benchTSAText = `时间戳服务的各项比值，与另一个时间戳服务(peer)、与裸签名、与密码机自身相比。被测服务是独立进程，用的就是产品的 HTTP 入口、时间戳单元与日志；
客户端在本进程，与它共用本机处理器。每轮各项交错，正反轮换；每个比值在同一轮内取，再取各轮中位数。
Ratios of the timestamp service to a peer's, to the bare signature and to the cipher machine. The server is a process of its own,
around the product's HTTP face, unit and journal; the client, in this process, shares the machine's processors with it. Rounds
are interleaved, every other one backwards; each ratio is taken within a round, then the median of the rounds.

request   SHA-256 imprint, nonce, certReq; HTTP/1.1 without TLS on loopback, connections kept alive, one request at a time on each
CPU       user and system time of the server's process, /proc/PID/stat, for each token
p99       of the client's latencies in the round
verify-after-sign is off but in "sm2-verified": checking an SM2 signature costs more than making it (hsm.verify_fresh is on in the product)

  (a) no journal, key in the server's process
      sm2 ÷ peer           tokens a second at 1, 16 and 500 connections                     floors 2.5, 3, 2.5
      sm2's CPU ÷ peer's   at 16 connections                                                at most 1/3.5
      sm2's p99 ÷ peer's   at 500 connections                                               at most 1/2
      raw-sm2 ÷ CPU        processor time of one sm2.SignASN1 in this process, one goroutine, over sm2's CPU at 16   floor 0.40
      raw-rsa ÷ CPU        the same of rsa.SignPKCS1v15 with 2048 bits over rsa's                          floor 0.90
  (b) as (a), each token an entry of the journal over SQLite, on the disk (fsync) before the reply; not shipped to a projection
      journal ÷ peer       tokens a second at 1, 16 and 500 connections                     floors 1.2, 2, 2
      raw-sm2 ÷ CPU        over journal's CPU at 16                                         floor 0.28
      price of the journal journal's tokens a second over sm2's; and its CPU over sm2's (no floors)
  (c) no journal, SM2 key in the software cipher machine, tokens made in the worker as in the product; 16 connections
      machine ÷ C_Sign     tokens a second over signatures a second of 16 goroutines through a worker of as many sessions
                           service time of 1 ms, 4 sessions                                 floor 0.80
                           free-running, 16 sessions                                        floor 0.45

  (d) beside openssl ts: a command for each token, RSA-2048, SHA-256, one after the other; its start, its reading of configuration,
      key, certificate and serial file are part of it, HTTP is not
      rsa ÷ openssl ts     tokens a second at 1 connection, and rsa's CPU over the command's (no floors)

The peer is no part of this program: --peer is a command that runs one in the foreground, --peer-url where it answers;
of one that runs already --peer-pid gives the process. Without them the lines with a peer are not measured.`

func benchTSACommand() *cobra.Command {
	b := &tsaBench{}
	c := &cobra.Command{
		Use: "bench-tsa --dir DIR", Hidden: true, Short: "测量时间戳服务 (measure the timestamp service)", Long: benchTSAText, Args: exactArgs(0),
		RunE: func(c *cobra.Command, _ []string) error {
			switch {
			case b.rounds < 1 || b.each <= 0:
				return usageError{errors.New("--rounds、--each 须为正 (must be positive)")}
			case (b.peer != "" || b.peerPID != 0) && b.peerURL == "", b.peer != "" && b.peerPID != 0, b.peerURL != "" && b.peer == "" && b.peerPID == 0:
				return usageError{errors.New("--peer-url 须与 --peer 或 --peer-pid 之一同时给出 (--peer-url goes with one of --peer and --peer-pid)")}
			}
			return b.run(c.Context())
		},
	}
	f := c.Flags()
	f.StringVar(&b.dir, "dir", "out/bench-tsa", "目录，每次重建 (folder, made anew)")
	f.StringVar(&b.results, "results", "", "结果目录：tsa.md、tsa.json (folder for the results)")
	f.IntVar(&b.rounds, "rounds", 7, "轮数 (rounds)")
	f.DurationVar(&b.each, "each", 800*time.Millisecond, "每项每轮时长 (time of each case in each round)")
	f.DurationVar(&b.profile, "profile", 0, "另测处理器剖面的时长，需要 go (also profile the server for so long; needs go)")
	f.StringVar(&b.peer, "peer", "", "运行另一个时间戳服务的命令 (command that runs a peer)")
	f.StringVar(&b.peerURL, "peer-url", "", "它的地址 (where it answers)")
	f.IntVar(&b.peerPID, "peer-pid", 0, "已在运行者的进程号 (process of one that runs already)")
	return c
}

// A tsaBench is one measurement.
type tsaBench struct {
	dir, results   string
	rounds         int
	each, profile  time.Duration
	peer, peerURL  string
	peerPID        int
	undo           []func() error
	cases          []*tsaCase
	byName         map[string]*tsaCase
	servers        map[string]*stampTarget
	profiled       []profileTable
	query          []byte // of every request
	rawSM2, rawRSA func(context.Context, int) error
}

// A tsaCase is one thing that is measured.
type tsaCase struct {
	Name    string      `json:"name"`
	Conns   int         `json:"connections"`
	Samples []tsaSample `json:"samples"`
	measure func(ctx context.Context, c *tsaCase) (tsaSample, error)
}

// A tsaSample is one case in one round.
type tsaSample struct {
	Ops     int64   `json:"ops"`
	Seconds float64 `json:"seconds"`
	CPU     float64 `json:"cpu_us"` // µs of the server's process, or of this one for raw signatures, for each
	P50     float64 `json:"p50_ms"`
	P99     float64 `json:"p99_ms"`
}

func (s tsaSample) rate() float64 { return float64(s.Ops) / s.Seconds }

func (b *tsaBench) run(ctx context.Context) (err error) {
	setMemory()
	defer func() {
		for _, f := range slices.Backward(b.undo) {
			err = errors.Join(err, f())
		}
	}()
	if err := b.prepare(ctx); err != nil {
		return err
	}
	fmt.Println(benchTSAText)
	fmt.Println()
	for round := range b.rounds {
		order := slices.Clone(b.cases)
		if round%2 == 1 {
			slices.Reverse(order)
		}
		for _, c := range order {
			s, err := c.measure(ctx, c)
			if err != nil {
				return fmt.Errorf("%s: %w", c.Name, err)
			}
			c.Samples = append(c.Samples, s)
		}
		fmt.Printf("\r第 %d/%d 轮 round", round+1, b.rounds)
	}
	fmt.Println()
	if b.profile > 0 {
		for _, name := range []string{"sm2", "journal", "machine-free"} {
			target := b.servers[name]
			t, err := profileOf(ctx, name+" at 16 connections", target.pid, b.profileFile(name), func() (int64, error) {
				s, err := b.load(ctx, target, 16, b.profile)
				return s.Ops, err
			})
			if err != nil {
				return err
			}
			b.profiled = append(b.profiled, t)
		}
	}
	return b.report()
}

// Service times of the software cipher machine, by the name of the case.
var benchMachines = map[string]struct {
	service  time.Duration
	sessions int
}{"machine-1ms": {time.Millisecond, 4}, "machine-free": {0, 16}}

// benchMachineKey is the label of the unit's key there.
const benchMachineKey = "staff/00000"

func (b *tsaBench) profileFile(name string) string { return filepath.Join(b.dir, name+"-cpu.prof") }

// prepare starts the servers and lists the cases.
func (b *tsaBench) prepare(ctx context.Context) (err error) {
	if b.dir, err = filepath.Abs(b.dir); err != nil {
		return err
	}
	if err := os.RemoveAll(b.dir); err != nil {
		return err
	}
	// The sealed state that the software cipher machines start from.
	machines := &poolBench{dir: filepath.Join(b.dir, "machines"), keys: 1}
	if err := machines.prepare(ctx); err != nil {
		return err
	}
	b.undo = append(b.undo, func() error {
		for _, f := range slices.Backward(machines.undo) {
			f()
		}
		return nil
	})
	pin := filepath.Join(b.dir, "pin")
	if err := os.WriteFile(pin, append(machines.pin, '\n'), 0o600); err != nil {
		return err
	}
	digest := sha256.Sum256([]byte("bench"))
	imprint, err := tsa.NewImprint(cms.OIDSHA256, digest[:])
	if err != nil {
		return err
	}
	if b.query, err = (&tsa.Request{Imprint: imprint, Nonce: big.NewInt(1 << 62), CertReq: true}).Bytes(); err != nil {
		return err
	}
	if b.rawSM2, err = rawSign(); err != nil {
		return err
	}
	if b.rawRSA, err = rawRSASign(); err != nil {
		return err
	}
	b.byName, b.servers = map[string]*tsaCase{}, map[string]*stampTarget{}
	add := func(name string, conns int, measure func(context.Context, *tsaCase) (tsaSample, error)) {
		c := &tsaCase{Name: name, Conns: conns, measure: measure}
		b.cases = append(b.cases, c)
		b.byName[name] = c
	}
	stamp := func(name string, conns ...int) {
		for _, n := range conns {
			add(fmt.Sprintf("%s-%d", name, n), n, func(ctx context.Context, c *tsaCase) (tsaSample, error) {
				return b.load(ctx, b.servers[name], c.Conns, b.each)
			})
		}
	}
	start := func(name string, s stampServer) error {
		s.listen, s.profile = "127.0.0.1:0", b.profileFile(name)
		t, err := b.startServer(s)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		b.servers[name] = t
		return nil
	}
	if b.peerURL != "" {
		if b.servers["peer"], err = b.startPeer(ctx); err != nil {
			return fmt.Errorf("peer: %w", err)
		}
	}
	for name, s := range map[string]stampServer{
		"sm2": {key: keySM2}, "sm2-verified": {key: keySM2, verify: true}, "rsa": {key: keyRSA}, "journal": {key: keySM2, journal: filepath.Join(b.dir, "journal")},
	} {
		if err := start(name, s); err != nil {
			return err
		}
	}
	for name, m := range benchMachines {
		dir := filepath.Join(machines.dir, name)
		machine, err := machines.copied(ctx, dir, m.service)
		if err != nil {
			return err
		}
		if err := start(name, stampServer{key: keyMachine, module: machines.module, moduleArgs: machine.args(), pinFile: pin, sessions: m.sessions}); err != nil {
			return err
		}
	}
	add("raw-sm2", 1, b.raw(&b.rawSM2))
	add("raw-rsa", 1, b.raw(&b.rawRSA))
	for _, conns := range []int{1, 16, 500} {
		if b.peerURL != "" {
			stamp("peer", conns)
		}
		stamp("sm2", conns)
		stamp("journal", conns)
	}
	stamp("rsa", 1, 16)
	openssl, err := b.openssl()
	if err != nil {
		return err
	}
	if openssl != nil {
		add("openssl-1", 1, openssl)
	}
	stamp("sm2-verified", 16)
	for name := range benchMachines {
		add(name+"-sign", 16, func(_ context.Context, c *tsaCase) (tsaSample, error) { return b.servers[name].sign(c.Conns, b.each) })
		stamp(name, 16)
	}
	slices.SortStableFunc(b.cases[len(b.cases)-2*len(benchMachines):], func(x, y *tsaCase) int { return strings.Compare(x.Name, y.Name) }) // a map's order is none
	for _, t := range b.servers {
		if _, err := b.load(ctx, t, 16, b.each/4); err != nil { // caches are warm
			return err
		}
	}
	return nil
}

// rawRSASign is crypto/rsa's signature over a digest, nothing else.
func rawRSASign() (func(context.Context, int) error, error) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return nil, err
	}
	digest := sha256.Sum256(nil)
	return func(context.Context, int) error {
		_, err := rsa.SignPKCS1v15(nil, key, crypto.SHA256, digest[:])
		return err
	}, nil
}

// raw measures a signature in this process.
func (b *tsaBench) raw(op *func(context.Context, int) error) func(context.Context, *tsaCase) (tsaSample, error) {
	return func(ctx context.Context, c *tsaCase) (s tsaSample, err error) {
		var before, after syscall.Rusage
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &before); err != nil {
			return s, err
		}
		begun := time.Now() // interval
		run := &benchCase{Conns: 1, op: *op}
		if s.Ops, err = run.run(ctx, b.each); err != nil {
			return s, err
		}
		s.Seconds = time.Since(begun).Seconds()
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &after); err != nil {
			return s, err
		}
		spent := after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano()
		s.CPU = float64(spent) / 1000 / float64(s.Ops)
		return s, nil
	}
}

// A stampTarget is a server that is measured.
type stampTarget struct {
	addr, path string
	secure     bool
	pid        int
	mu         sync.Mutex // one command at a time
	in         io.Writer  // of a child of ours
	out        *bufio.Reader
}

func newTarget(address string, pid int) (*stampTarget, error) {
	u, err := url.Parse(address)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return nil, fmt.Errorf("%s: 须为 http://host:port/path (want such a URL)", address)
	}
	return &stampTarget{addr: u.Host, path: u.RequestURI(), secure: u.Scheme == "https", pid: pid}, nil
}

// startServer runs the timestamp service in a child.
func (b *tsaBench) startServer(s stampServer) (*stampTarget, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(self, s.flags()...)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL} // its standard input ends with us, too
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	b.undo = append(b.undo, func() error { return errors.Join(in.Close(), cmd.Wait()) })
	lines := bufio.NewReader(out)
	var where struct{ URL string }
	line, err := lines.ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, &where)
	}
	if err != nil {
		return nil, fmt.Errorf("the server did not begin: %w", err)
	}
	t, err := newTarget(where.URL, cmd.Process.Pid)
	if err != nil {
		return nil, err
	}
	t.in, t.out = in, lines
	return t, nil
}

// startPeer runs the peer's command if there is one, and waits until it answers.
func (b *tsaBench) startPeer(ctx context.Context) (*stampTarget, error) {
	t, err := newTarget(b.peerURL, b.peerPID)
	if err != nil {
		return nil, err
	}
	if b.peer != "" {
		cmd := exec.Command("sh", "-c", "exec "+b.peer)
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
		if err := cmd.Start(); err != nil {
			return nil, err
		}
		t.pid = cmd.Process.Pid
		b.undo = append(b.undo, func() error {
			_ = cmd.Process.Kill() // it may have ended
			_ = cmd.Wait()
			return nil
		})
	}
	for try := 0; ; try++ {
		c, err := net.Dial("tcp", t.addr)
		if err == nil {
			return t, c.Close()
		}
		if try == 200 {
			return nil, err
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// sign has the server's key sign, past HTTP and unit.
func (t *stampTarget) sign(conns int, long time.Duration) (s tsaSample, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	before, err := readStat(t.pid)
	if err != nil {
		return s, err
	}
	if _, err := fmt.Fprintf(t.in, "sign %d %v\n", conns, long); err != nil {
		return s, err
	}
	line, err := t.out.ReadBytes('\n')
	if err != nil {
		return s, err
	}
	var answer signedCount
	if err := json.Unmarshal(line, &answer); err != nil {
		return s, err
	}
	if answer.Error != "" {
		return s, errors.New(answer.Error)
	}
	after, err := readStat(t.pid)
	return tsaSample{Ops: answer.Ops, Seconds: answer.Seconds, CPU: 1e6 * used(before, after) / float64(answer.Ops)}, err
}

// load asks the target for tokens on so many connections for so long. Each connection is open, and has had a token that was
// looked at, before the time begins.
func (b *tsaBench) load(ctx context.Context, t *stampTarget, conns int, long time.Duration) (s tsaSample, err error) {
	clients := make([]*stampClient, conns)
	defer func() {
		for _, c := range clients {
			if c != nil {
				c.conn.Close()
			}
		}
	}()
	var dialling sync.WaitGroup
	var failed atomic.Pointer[error]
	for i := range clients {
		dialling.Go(func() {
			c, err := t.dial(ctx, b.query)
			if err != nil {
				failed.CompareAndSwap(nil, &err)
			}
			clients[i] = c
		})
	}
	dialling.Wait()
	if err := failed.Load(); err != nil {
		return s, *err
	}
	before, err := readStat(t.pid)
	if err != nil {
		return s, err
	}
	took := make([][]time.Duration, conns)
	run := &benchCase{Conns: conns, op: func(_ context.Context, i int) error {
		sent := time.Now() // interval
		if err := clients[i].stamp(); err != nil {
			return err
		}
		took[i] = append(took[i], time.Since(sent))
		return nil
	}}
	begun := time.Now() // interval
	if s.Ops, err = run.run(ctx, long); err != nil {
		return s, err
	}
	s.Seconds = time.Since(begun).Seconds()
	after, err := readStat(t.pid)
	if err != nil {
		return s, err
	}
	s.CPU = 1e6 * used(before, after) / float64(s.Ops)
	all := slices.Concat(took...)
	slices.Sort(all)
	s.P50, s.P99 = 1e3*all[len(all)/2].Seconds(), 1e3*all[len(all)*99/100].Seconds()
	return s, nil
}

// used is processor seconds between; a tick at least, for less cannot be told.
func used(before, after processStat) float64 { return max(after.used-before.used, 1.0/ticks) }

// A stampClient asks for tokens on one connection. It is as small as can be, since it shares the processors with the
// server, and the same for ours and the peer's.
type stampClient struct {
	conn    net.Conn
	in      *bufio.Reader
	request []byte
	body    []byte
	least   int // bytes of an answer with a token
}

func (t *stampTarget) dial(ctx context.Context, query []byte) (*stampClient, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", t.addr)
	if err != nil {
		return nil, err
	}
	if t.secure { // a child of ours on the loopback, whose certificate is as old as it is; what is measured is the records
		conn = tls.Client(conn, &tls.Config{MinVersion: tls.VersionTLS13, InsecureSkipVerify: true})
	}
	head := fmt.Sprintf("POST %s HTTP/1.1\r\nHost: %s\r\nContent-Type: application/timestamp-query\r\nContent-Length: %d\r\n\r\n", t.path, t.addr, len(query))
	c := &stampClient{conn: conn, in: bufio.NewReaderSize(conn, 8<<10), request: append([]byte(head), query...), body: make([]byte, 0, 8<<10)}
	if err = c.stamp(); err == nil {
		err = granted(c.body)
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	c.least = len(c.body) - 16 // signatures vary by a few bytes
	return c, nil
}

// granted looks whether a TimeStampResp has a token, whatever the token is signed with.
func granted(reply []byte) error {
	in := cryptobyte.String(reply)
	var resp, info cryptobyte.String
	var status int
	if !in.ReadASN1(&resp, der.SEQUENCE) || !resp.ReadASN1(&info, der.SEQUENCE) || !info.ReadASN1Integer(&status) || status > tsa.StatusGrantedWithMods || resp.Empty() {
		return fmt.Errorf("no token was granted: %.200x", reply)
	}
	return nil
}

var lengthName, codingName = []byte("content-length:"), []byte("transfer-encoding: chunked")

// stamp asks for one token.
func (c *stampClient) stamp() error {
	if _, err := c.conn.Write(c.request); err != nil {
		return err
	}
	line, err := c.in.ReadSlice('\n')
	if err != nil {
		return err
	}
	if len(line) < 12 || line[9] != '2' {
		return fmt.Errorf("answer %q", line)
	}
	length, chunked := 0, false
	for {
		if line, err = c.in.ReadSlice('\n'); err != nil {
			return err
		}
		if len(line) <= 2 {
			break
		}
		if n := len(lengthName); len(line) > n && bytes.EqualFold(line[:n], lengthName) {
			if length, err = strconv.Atoi(string(bytes.TrimSpace(line[n:]))); err != nil {
				return err
			}
		}
		chunked = chunked || bytes.EqualFold(bytes.TrimSpace(line), codingName)
	}
	c.body = c.body[:0]
	if !chunked {
		err = c.read(length)
	}
	for chunked && err == nil {
		if line, err = c.in.ReadSlice('\n'); err != nil {
			return err
		}
		n, perr := strconv.ParseInt(string(bytes.TrimSpace(line)), 16, 32)
		if perr != nil {
			return perr
		}
		chunked = n > 0
		if err = c.read(int(n)); err == nil {
			_, err = c.in.Discard(len("\r\n"))
		}
	}
	if err == nil && len(c.body) < c.least {
		err = fmt.Errorf("an answer of %d bytes is no token", len(c.body))
	}
	return err
}

// read takes n more bytes of the body.
func (c *stampClient) read(n int) error {
	had := len(c.body)
	if n < 0 || n > cap(c.body)-had {
		return fmt.Errorf("an answer of %d bytes", had+n)
	}
	c.body = c.body[:had+n]
	_, err := io.ReadFull(c.in, c.body[had:])
	return err
}

// floors are the ratios that are asked for; missing names those that need a peer.
func (b *tsaBench) floors() (list []floor, missing []string) {
	ratio := func(name, of string, limit float64, upper bool, f func(x, y tsaSample) float64, over, under string) {
		if b.byName[over] == nil || b.byName[under] == nil {
			missing = append(missing, name+": "+of)
			return
		}
		var v []float64
		for i := range b.rounds {
			v = append(v, f(b.byName[over].Samples[i], b.byName[under].Samples[i]))
		}
		one := floor{Name: name, Of: of, Floor: limit, Upper: upper, spread: spreadOf(v)}
		one.Holds = one.Median >= limit != upper
		list = append(list, one)
	}
	rates := func(x, y tsaSample) float64 { return x.rate() / y.rate() }
	cpu := func(x, y tsaSample) float64 { return x.CPU / y.CPU }
	p99 := func(x, y tsaSample) float64 { return x.P99 / y.P99 }
	ratio("(a) tokens/s at 1", "sm2 ÷ peer", 2.5, false, rates, "sm2-1", "peer-1")
	ratio("(a) tokens/s at 16", "sm2 ÷ peer", 3, false, rates, "sm2-16", "peer-16")
	ratio("(a) tokens/s at 500", "sm2 ÷ peer", 2.5, false, rates, "sm2-500", "peer-500")
	ratio("(a) CPU at 16", "sm2 ÷ peer", 1/3.5, true, cpu, "sm2-16", "peer-16")
	ratio("(a) p99 at 500", "sm2 ÷ peer", 0.5, true, p99, "sm2-500", "peer-500")
	ratio("(a) CPU, SM2", "raw-sm2 ÷ sm2 at 16", 0.40, false, cpu, "raw-sm2", "sm2-16")
	ratio("(a) CPU, RSA-2048", "raw-rsa ÷ rsa at 16", 0.90, false, cpu, "raw-rsa", "rsa-16")
	ratio("(b) tokens/s at 1", "journal ÷ peer", 1.2, false, rates, "journal-1", "peer-1")
	ratio("(b) tokens/s at 16", "journal ÷ peer", 2, false, rates, "journal-16", "peer-16")
	ratio("(b) tokens/s at 500", "journal ÷ peer", 2, false, rates, "journal-500", "peer-500")
	ratio("(b) CPU", "raw-sm2 ÷ journal at 16", 0.28, false, cpu, "raw-sm2", "journal-16")
	ratio("(b) price at 1", "journal ÷ sm2, tokens/s", 0, false, rates, "journal-1", "sm2-1")
	ratio("(b) price at 16", "journal ÷ sm2, tokens/s", 0, false, rates, "journal-16", "sm2-16")
	ratio("(b) price at 500", "journal ÷ sm2, tokens/s", 0, false, rates, "journal-500", "sm2-500")
	ratio("(b) price, CPU at 16", "journal ÷ sm2", 0, false, cpu, "journal-16", "sm2-16")
	ratio("(c) service time 1 ms", "machine-1ms ÷ C_Sign", 0.80, false, rates, "machine-1ms-16", "machine-1ms-sign")
	ratio("(c) free-running", "machine-free ÷ C_Sign", 0.45, false, rates, "machine-free-16", "machine-free-sign")
	ratio("(d) tokens/s at 1", "rsa ÷ openssl ts", 0, false, rates, "rsa-1", "openssl-1")
	ratio("(d) CPU at 1", "rsa ÷ openssl ts", 0, true, cpu, "rsa-1", "openssl-1")
	ratio("CPU of verify-after-sign", "sm2-verified ÷ sm2 at 16", 0, false, cpu, "sm2-verified-16", "sm2-16")
	return list, missing
}

// report prints the results and writes them to the folder.
func (b *tsaBench) report() error {
	clock, err := sysclock.Open()
	if err != nil {
		return err
	}
	machine := machineOf(b.dir, clock.Realtime())
	floors, missing := b.floors()
	var out strings.Builder
	fmt.Fprintf(&out, "# Measured by `make bench`: the timestamp service\n\nWritten by the program; not to be edited. Definitions: `yinjian bench-tsa --help`.\n\n")
	fmt.Fprintf(&out, "| | |\n| --- | --- |\n| at | %s |\n| revision | %s, %s |\n| machine | %s, %d cores, Linux %s |\n| load average at the end | %s |\n| file system | %s |\n| rounds | %d of %v each case |\n\n",
		machine.At, machine.Revision, machine.Go, machine.CPU, machine.Cores, machine.Kernel, machine.Load, machine.Filesystem, b.rounds, b.each)
	fmt.Fprintf(&out, "| | ratio | median | min – max | floor | |\n| --- | --- | ---: | ---: | ---: | --- |\n")
	for _, f := range floors {
		if f.Floor == 0 {
			fmt.Fprintf(&out, "| %s | %s | %.3f | %.3f – %.3f | | |\n", f.Name, f.Of, f.Median, f.Least, f.Most)
			continue
		}
		f.print(&out)
	}
	for _, name := range missing {
		name, of, _ := strings.Cut(name, ": ")
		fmt.Fprintf(&out, "| %s | %s | | | | not measured: no peer |\n", name, of)
	}
	fmt.Fprintf(&out, "\n## Medians\n\nFor reading the ratios, not for comparing machines.\n\n| case | connections | a second | min – max | CPU µs each | p50 ms | p99 ms |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n")
	for _, c := range b.cases {
		r := spreadOf(each(c.Samples, tsaSample.rate))
		median := func(f func(tsaSample) float64) float64 { return spreadOf(each(c.Samples, f)).Median }
		latency := " | "
		if c.Samples[0].P50 > 0 {
			latency = fmt.Sprintf("%.2f | %.2f", median(func(s tsaSample) float64 { return s.P50 }), median(func(s tsaSample) float64 { return s.P99 }))
		}
		fmt.Fprintf(&out, "| %s | %d | %.0f | %.0f – %.0f | %.1f | %s |\n", c.Name, c.Conns, r.Median, r.Least, r.Most, median(func(s tsaSample) float64 { return s.CPU }), latency)
	}
	for _, p := range b.profiled {
		p.print(&out)
	}
	fmt.Print(out.String())
	if b.results == "" {
		return nil
	}
	data, err := json.MarshalIndent(struct {
		Machine     machineInfo    `json:"machine"`
		Floors      []floor        `json:"floors"`
		NotMeasured []string       `json:"not_measured,omitempty"`
		Cases       []*tsaCase     `json:"cases"`
		Profiles    []profileTable `json:"profiles,omitempty"`
	}{machine, floors, missing, b.cases, b.profiled}, "", "  ")
	if err != nil {
		return err
	}
	return errors.Join(os.MkdirAll(b.results, 0o755), os.WriteFile(filepath.Join(b.results, "tsa.md"), []byte(out.String()), 0o644),
		os.WriteFile(filepath.Join(b.results, "tsa.json"), append(data, '\n'), 0o644))
}

package main_test

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance"
	"yinjian/appliance/audit"
	"yinjian/appliance/evidence"
	"yinjian/appliance/sign"
	"yinjian/dbdriver/sqlite"
	"yinjian/hsm"
)

// TestRandomKills kills what a seed says at moments it says, under sixteen clients, 50 times; 1,000 times with
// YINJIAN_LONG=1. YINJIAN_SEED repeats the choices of a run, YINJIAN_KILLS sets their number. The test is the service
// manager: what has ended is started again. It prints a ledger.
func TestRandomKills(t *testing.T) {
	t.Parallel()
	kills := 50
	if os.Getenv("YINJIAN_LONG") != "" {
		kills = 1000
	}
	seed := uint64(time.Now().UnixNano())
	for name, set := range map[string]func(n uint64){"YINJIAN_SEED": func(n uint64) { seed = n }, "YINJIAN_KILLS": func(n uint64) { kills = int(n) }} {
		if text := os.Getenv(name); text != "" {
			n, err := strconv.ParseUint(text, 10, 64)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			set(n)
		}
	}
	k := &killer{T: t, rnd: rand.New(rand.NewPCG(seed, 3)), slowest: map[string]time.Duration{}, kills: map[string]int{}, ends: map[string]int{}}
	k.Logf("YINJIAN_SEED=%d", seed)

	k.dir = initAppliance(t, startTimeServer(t), "--listen", freePort(t))
	configure(t, k.dir, func(c *appliance.Config) { c.Policy.SegmentEntries = 1500 }) // segments roll under the load
	m := serve(t, k.dir)
	m.trusted(t)
	signers := []string{"D1", "D2", "D3", "D4"}
	for _, id := range signers {
		m.enrol(t, id, "")
	}
	var configs []client.Config
	for i := range retryApps {
		id := fmt.Sprintf("app-%d", i)
		m.register(t, id, "--consent", "app-asserted")
		configs = append(configs, m.clientConfig(t, id))
	}
	m.stop(t) // which leaves the time's anchor
	before := filesIn(t, k.dir)

	k.start()
	k.clients = newRetryLoad(t, configs, signers, k.app.Load)
	t.Cleanup(k.clients.end)
	k.mustReturn("start")
	for done := 0; done < kills; {
		done += k.step()
		if t.Failed() {
			return
		}
	}
	k.clients.end()
	k.m.await(t)
	m = k.m
	m.trusted(t)
	m.mustBeClean(t)
	k.judgeSample(m, 40)
	m.stop(t)

	// Nothing is left behind: no process, no file but the journal's segments, nothing that grows.
	if left := processesOf(t, k.dir); len(left) > 0 {
		t.Errorf("processes left: %v", left)
	}
	before["credentials/auditor.json"] = 0
	for name, size := range filesIn(t, k.dir) {
		if _, was := before[name]; !was && !regexp.MustCompile(`^journal/journal-\d+\.db$|^uses/state-[0-9a-f]+\.json$`).MatchString(name) {
			t.Errorf("left behind: %s (%d bytes)", name, size)
		} else if strings.HasPrefix(name, "run/") && size > 64<<10 {
			t.Errorf("%s has grown to %d bytes", name, size)
		}
	}
	t.Logf("%s", k.ledger(k.judgeJournal()))
}

// retryApps is how many applications the clients speak as, one after the other: after a crash, the requests of one that
// was just served are refused for up to 5 s (the replay guard's floor), and the others' are not.
const retryApps = 16

// returnsWithin is the longest that service may take to come back by itself: a start on a busy machine.
const returnsWithin = patience

// A killer does it to one appliance.
type killer struct {
	*testing.T
	rnd     *rand.Rand
	dir     string
	binary  string // "": the one without the race detector
	m       *machine
	app     atomic.Int32 // the application that new keys are asked for as
	clients *retryLoad

	starts, operator int
	kills            map[string]int // by target
	ends             map[string]int // starts that ended by themselves, by reason
	slowest          map[string]time.Duration
}

func (k *killer) start() {
	k.starts++
	binary := k.binary
	if binary == "" {
		binary = built.init // a thousand starts under the race detector are too slow
	}
	k.m = launchBinary(k.T, binary, k.dir, "--once")
}

// again starts the appliance again if it has ended by itself.
func (k *killer) again() {
	k.Helper()
	select {
	case <-k.m.ended:
	default:
		return
	}
	o := k.m.outcome()
	reason := "ended otherwise: " + lastLines([]byte(o.stderr), 1)
	for text, name := range map[string]string{
		"the end of the journal is not sealed": "not sealed (operator)", "cipher machine, slot": "cipher machine went away during the start",
		"software cipher machine did not start": "cipher machine did not start", "hsm: ": "cipher machine went away during the start",
	} {
		if strings.Contains(lastLines([]byte(o.stderr), 1), text) {
			reason = name
			break
		}
	}
	k.ends[reason]++
	switch {
	case reason == "not sealed (operator)":
		// Signatures were recorded while the cipher machine was dead and the appliance died before it came back: only an
		// operator can tell that from a rewritten end, and says so.
		k.operator++
		if err := os.WriteFile(filepath.Join(k.dir, "restored"), nil, 0o600); err != nil {
			k.Fatal(err)
		}
	case strings.HasPrefix(reason, "ended otherwise"):
		k.Errorf("it does not come back by itself: %v", reason)
	}
	k.start()
}

// mustReturn waits until requests that are made from now on are answered.
func (k *killer) mustReturn(after string) {
	k.Helper()
	begun := time.Now()
	for k.clients.await(); !k.clients.returned(); time.Sleep(5 * time.Millisecond) {
		if time.Since(begun) > returnsWithin {
			k.Fatalf("%s: service is not back after %v", after, returnsWithin)
		}
		if k.again(); k.Failed() {
			k.FailNow()
		}
	}
	took := time.Since(begun)
	k.slowest[after] = max(k.slowest[after], took)
	if took > returnsWithin/4 { // what it did meanwhile
		b, _ := os.ReadFile(k.m.log)
		k.Logf("%s: service was back after %v\n%s", after, took, lastLines(b, 60))
	}
}

// upTo is a random time up to d.
func (k *killer) upTo(d time.Duration) time.Duration { return time.Duration(k.rnd.Int64N(int64(d))) }

// target finds the process of a part by its name. A part that is just being replaced is not there.
func (k *killer) target(name string) (process, bool) {
	if name == "appliance" {
		p, _, ok := readProcess(k.m.cmd.Process.Pid)
		return p, ok
	}
	class, words := "", "softtoken --dir"
	if c, ok := strings.CutPrefix(name, "worker "); ok {
		class, words = c, "yinjian worker"
	}
	for _, p := range descendants(k.T, k.m.cmd.Process.Pid) {
		if strings.Contains(p.args, words) && (class == "" || k.classOf(p.pid) == class) {
			return p, true
		}
	}
	return process{}, false
}

// classOf reads in the log for which slot class the worker was started.
func (k *killer) classOf(pid int) string {
	b, err := os.ReadFile(k.m.log)
	if err != nil {
		k.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if strings.Contains(line, "worker ready") && regexp.MustCompile(`\bpid=`+strconv.Itoa(pid)+`\b`).MatchString(line) {
			if m := regexp.MustCompile(`slot_class=(\w+)`).FindStringSubmatch(line); m != nil {
				return m[1]
			}
		}
	}
	return ""
}

// strike sends the signal to a part, and counts it. A part that is not there is none.
func (k *killer) strike(name string, s syscall.Signal) (process, bool) {
	p, ok := k.target(name)
	if ok = ok && syscall.Kill(p.pid, s) == nil; ok && s == syscall.SIGKILL {
		k.kills[name]++
		if name == "appliance" {
			<-k.m.ended
		}
	}
	return p, ok
}

var parts = func() []string {
	parts := []string{"softtoken"}
	for _, class := range hsm.Classes {
		parts = append(parts, "worker "+string(class))
	}
	return parts
}()

// step does the next thing and waits until service is back. It answers how many kills it was.
func (k *killer) step() (kills int) {
	count := func() (n int) {
		for _, c := range k.kills {
			n += c
		}
		return n
	}
	had := count()
	time.Sleep(k.upTo(150 * time.Millisecond))
	part, second := parts[k.rnd.IntN(len(parts))], parts[k.rnd.IntN(len(parts))]
	wait, what := k.upTo(1500*time.Millisecond), k.rnd.IntN(100)
	restart := func() {
		k.app.Store((k.app.Load() + 1) % retryApps)
		k.start()
	}
	name := "appliance"
	switch {
	case what < 40:
		k.strike("appliance", syscall.SIGKILL)
		restart()
	case what < 62:
		name = part
		k.strike(part, syscall.SIGKILL)
	case what < 68:
		name = "two parts"
		k.strike(part, syscall.SIGKILL)
		k.strike(second, syscall.SIGKILL)
	case what < 76: // as in a power cut, and in any order
		name = "appliance and a part"
		p, ok := k.target(part)
		if ok && what%2 == 0 && syscall.Kill(p.pid, syscall.SIGKILL) == nil {
			k.kills[part]++
		}
		k.strike("appliance", syscall.SIGKILL)
		if ok && what%2 == 1 && p.alive() && syscall.Kill(p.pid, syscall.SIGKILL) == nil {
			k.kills[part]++
		}
		restart()
	case what < 86: // again while it starts
		name = "during the start"
		k.strike("appliance", syscall.SIGKILL)
		restart()
		time.Sleep(wait)
		if what < 82 {
			k.strike("appliance", syscall.SIGKILL)
			restart()
		} else {
			k.strike(part, syscall.SIGKILL)
		}
	case what < 91:
		name = "during the drain"
		_ = k.m.cmd.Process.Signal(syscall.SIGTERM)
		time.Sleep(wait / 10)
		k.strike("appliance", syscall.SIGKILL)
		<-k.m.ended
		restart()
	default: // it hangs for a while, and is killed then or not
		name = "stopped for a while"
		if what < 94 {
			part = "appliance"
		}
		if p, ok := k.strike(part, syscall.SIGSTOP); ok {
			time.Sleep(wait)
			if what%2 == 0 {
				k.strike(part, syscall.SIGKILL)
				if part == "appliance" {
					restart()
				}
			}
			if p.alive() {
				_ = syscall.Kill(p.pid, syscall.SIGCONT)
			}
		}
	}
	k.mustReturn(name)
	return count() - had
}

// A retryLoad is sixteen clients. Each signature has a key of its own; a client asks again with the same key and a new
// nonce until it has an answer, and meanwhile goes on with others.
type retryLoad struct {
	t       *testing.T
	stop    chan struct{}
	done    sync.WaitGroup
	configs []client.Config
	signers []string
	app     func() int32

	mu              sync.Mutex
	asked           map[string]string // record id → key
	made            map[string]*wire.SignResult
	calls, replayed int
	refused         map[string]int
	mark            time.Time // service has returned when requests that were made since are answered
	served          int       // how many of them are
}

// A retried is a request without an answer yet.
type retried struct {
	app   int32
	key   string
	req   *wire.SignRequest
	begun time.Time
	after time.Time // not asked again before
}

func newRetryLoad(t *testing.T, configs []client.Config, signers []string, app func() int32) *retryLoad {
	t.Helper()
	l := &retryLoad{
		t: t, stop: make(chan struct{}), configs: configs, signers: signers, app: app,
		asked: map[string]string{}, made: map[string]*wire.SignResult{}, refused: map[string]int{},
	}
	for i := range loadClients {
		var as []*client.Client
		for _, cfg := range configs {
			c, err := client.New(cfg)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(c.Close)
			as = append(as, c)
		}
		l.done.Go(func() { l.run(i, as) })
	}
	return l
}

// end lets every client settle what it has asked for.
func (l *retryLoad) end() {
	select {
	case <-l.stop:
	default:
		close(l.stop)
	}
	l.done.Wait()
}

// await starts to count the answers to requests made from now on.
func (l *retryLoad) await() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.mark, l.served = time.Now(), 0
}

func (l *retryLoad) returned() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.served >= 4
}

func (l *retryLoad) run(i int, as []*client.Client) {
	var open []*retried
	for n := 0; ; {
		ending := false
		select {
		case <-l.stop:
			ending = true
		case <-time.After(loadPause):
		}
		now := time.Now()
		at := slices.IndexFunc(open, func(r *retried) bool { return now.After(r.after) })
		switch {
		case ending && len(open) == 0:
			return
		case at < 0 && (ending || len(open) >= 3):
			time.Sleep(20 * time.Millisecond)
			continue
		case at < 0:
			r := &retried{app: l.app(), key: fmt.Sprintf("kill-%02d-%06d", i, n), begun: now}
			r.req = asserted(l.signers[i%len(l.signers)], r.key)
			if n%4 == 3 {
				r.req.Form, r.req.Algorithm = "cms", []string{"SM2", "RSA-2048"}[n/4%2]
			}
			open = append(open, r)
			at = len(open) - 1
			n++
			id := sign.RecordID(l.configs[r.app].AppID, r.key)
			l.mu.Lock()
			l.asked[hex.EncodeToString(id[:])] = r.key
			l.mu.Unlock()
		}
		r := open[at]
		result, err := as[r.app].Sign(context.Background(), r.key, r.req)
		l.mu.Lock()
		l.calls++
		if err == nil {
			l.made[r.key] = result
			if result.Replayed {
				l.replayed++
			}
			if now.After(l.mark) {
				l.served++
			}
			l.mu.Unlock()
			open = slices.Delete(open, at, at+1)
			continue
		}
		code := "transport"
		var p *client.Problem
		if errors.As(err, &p) {
			code = p.Code
		}
		l.refused[code]++
		l.mu.Unlock()
		r.after = time.Now().Add(50 * time.Millisecond)
		if code == "clock_skew" {
			r.after = time.Now().Add(time.Second)
		}
		if took := time.Since(now); took > answerWithin {
			l.t.Errorf("a call hung for %v: %v", took, err)
			return
		}
		if time.Since(r.begun) > 2*settleWithin {
			l.t.Errorf("%s is not settled after %v: %v", r.key, time.Since(r.begun), err)
			return
		}
	}
}

// judgeSample verifies the evidence of every n-th acknowledged record by its id, with the program that auditors have.
func (k *killer) judgeSample(m *machine, most int) {
	k.Helper()
	l := k.clients
	verifier := filepath.Join(tempDir(k.T), "yinjian-verify")
	build := exec.Command("go", "build", "-buildvcs=false", "-o", verifier, "../yinjian-verify")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		k.Fatalf("%v\n%s", err, out)
	}
	keys := slices.Sorted(maps.Keys(l.made))
	c := m.register(k.T, "auditor", "--rights", "verify,evidence.any")
	for i := 0; i < len(keys); i += max(1, len(keys)/most) {
		key := keys[i]
		b, err := c.Evidence(k.Context(), l.made[key].RecordID)
		if err != nil {
			k.Errorf("%s: %v", key, err)
			continue
		}
		dir := tempDir(k.T)
		file, document := filepath.Join(dir, "evidence.json"), filepath.Join(dir, "document")
		if err := errors.Join(os.WriteFile(file, b, 0o600), os.WriteFile(document, documentOf(key), 0o600)); err != nil {
			k.Fatal(err)
		}
		if o := command(k.T, nil, verifier, "--anchors", k.dir, "--log-key", filepath.Join(k.dir, "log.pem"), "--document", document, file); o.code != 0 {
			k.Errorf("%s: %v", key, o)
		}
	}
}

// judgeJournal reads every entry of the stopped appliance: each acknowledged record is there once, at the place its
// result names; there is none that nobody asked for; numbers have no gap; no serial was given twice. It answers how
// many entries there are.
func (k *killer) judgeJournal() (entries uint64) {
	k.Helper()
	l := k.clients
	store, err := sqlite.OpenJournal(k.Context(), sqlite.JournalConfig{Dir: filepath.Join(k.dir, "journal"), ReadOnly: true})
	if err != nil {
		k.Fatal(err)
	}
	defer store.Close()
	segments, err := store.Segments(k.Context())
	if err != nil {
		k.Fatal(err)
	}
	places, serials := map[string]string{}, map[string]uint64{}
	for _, s := range segments {
		err := store.Rows(k.Context(), s.Number, 0, func(r audit.Row) error {
			e, err := audit.ParseEntry(r.DER)
			if err != nil {
				return err
			}
			if e.Sequence != entries {
				k.Errorf("entry %d stands where %d should", e.Sequence, entries)
			}
			entries++
			for _, name := range []string{"token.serial", "serial"} {
				if v, ok := e.Field(name).(audit.Octets); ok {
					serial := hex.EncodeToString(v)
					if before, twice := serials[serial]; twice {
						k.Errorf("serial %s at %d and at %d", serial, before, e.Sequence)
					}
					serials[serial] = e.Sequence
				}
			}
			if r.Kind != evidence.KindSign {
				return nil
			}
			id := hex.EncodeToString(r.Ref)
			place := fmt.Sprint(e.Epoch, " ", e.Sequence)
			if before, twice := places[id]; twice {
				k.Errorf("record %s is at %s and at %s", id, before, place)
			}
			places[id] = place
			if l.asked[id] == "" {
				k.Errorf("nobody asked for record %s at %s", id, place)
			}
			return nil
		})
		if err != nil {
			k.Fatal(err)
		}
	}
	for key, r := range l.made {
		if want := fmt.Sprint(r.Epoch, " ", r.Sequence); places[r.RecordID] != want {
			k.Errorf("%s (%s) was acknowledged at %s and is at %q", key, r.RecordID, want, places[r.RecordID])
		}
	}
	if len(l.made) != len(l.asked) || len(serials) < len(l.made) {
		k.Errorf("%d keys were asked for, %d acknowledged; %d serials", len(l.asked), len(l.made), len(serials))
	}
	return entries
}

func (k *killer) ledger(entries uint64) string {
	var b strings.Builder
	l := k.clients
	sum := 0
	for _, n := range k.kills {
		sum += n
	}
	row := func(name string, value any) { fmt.Fprintf(&b, "%-52s %10v\n", name, value) }
	row("\nkills", sum)
	for _, name := range slices.Sorted(maps.Keys(k.kills)) {
		row("  "+name, k.kills[name])
	}
	row("starts", k.starts)
	for _, name := range slices.Sorted(maps.Keys(k.ends)) {
		row("  that ended by themselves: "+name, k.ends[name])
	}
	row("operator's word needed", k.operator)
	row("calls", l.calls)
	row("acknowledged signatures", len(l.made))
	row("  of them after a lost answer (replayed)", l.replayed)
	row("calls refused or lost, each asked again", l.calls-len(l.made))
	for _, code := range slices.Sorted(maps.Keys(l.refused)) {
		row("  "+code, l.refused[code])
	}
	row("entries in the journal", entries)
	for _, name := range slices.Sorted(maps.Keys(k.slowest)) {
		row("slowest return after: "+name, k.slowest[name].Round(time.Millisecond))
	}
	return b.String()
}

// filesIn lists what is below a folder, with sizes; sockets too.
func filesIn(t *testing.T, dir string) map[string]int64 {
	t.Helper()
	files := map[string]int64{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		name, err := filepath.Rel(dir, path)
		files[name] = info.Size()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// processesOf are those whose command line, working folder or open files are in the folder.
func processesOf(t *testing.T, dir string) (found []process) {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		p, _, ok := readProcess(pid)
		in := strings.Contains(p.args, dir)
		links, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid)) // the pattern is well-formed
		for _, link := range append(links, fmt.Sprintf("/proc/%d/cwd", pid)) {
			to, _ := os.Readlink(link) // gone meanwhile
			in = in || strings.HasPrefix(to, dir+"/")
		}
		if ok && in {
			found = append(found, p)
		}
	}
	return found
}

package main_test

import (
	"bytes"
	"cmp"
	"context"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/emmansun/gmsm/smx509"
	"golang.org/x/sync/errgroup"

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance"
	"yinjian/appliance/audit"
	"yinjian/appliance/evidence"
	"yinjian/appliance/pki"
	"yinjian/dbdriver/sqlite"
)

const (
	loadClients = 16
	// loadPause between two signatures of a client keeps the records at a number that can all be judged afterwards;
	// slowPause does while something long is done.
	loadPause, slowPause = 5 * time.Millisecond, 200 * time.Millisecond
	// The time in which service has to return by itself: a worker is replaced at once, the software cipher machine is
	// started again after some 100 ms, and what its workers then do to reconnect backs off: seconds. What it took is in the
	// test's log; a busy machine gets all that a test has.
	workerReturns, softtokenReturns = patience, patience
)

// calm is the phase in which nothing is done to the appliance.
const calm = "calm"

// A load is clients that sign without end. Each signature has a key of its own; as long as its outcome is unknown the
// client asks again with the same key.
type load struct {
	t    *testing.T
	stop chan struct{}
	done sync.WaitGroup

	pause atomic.Int64 // time.Duration
	phase atomic.Value // string: what is being done to the appliance
	acks  [loadClients]atomic.Int64

	mu     sync.Mutex
	made   map[string]*wire.SignResult // by key: what was acknowledged
	errors map[string]map[string]int   // phase → code, or "transport" → how often
	worst  map[string]time.Duration    // phase → longest call
}

func startLoad(t *testing.T, m *machine, signers []string) *load {
	l := &load{t: t, stop: make(chan struct{}), made: map[string]*wire.SignResult{}, errors: map[string]map[string]int{}, worst: map[string]time.Duration{}}
	l.phase.Store(calm)
	l.pause.Store(int64(loadPause))
	for i := range loadClients {
		c := m.client(t, "load")
		l.done.Go(func() { l.run(c, i, signers[i%len(signers)]) })
	}
	t.Cleanup(func() { l.end() })
	return l
}

// end lets every client finish the signature it is at.
func (l *load) end() {
	select {
	case <-l.stop:
	default:
		close(l.stop)
	}
	l.done.Wait()
}

// settleWithin is how long a client asks for one signature, through an outage.
const settleWithin = patience

func (l *load) run(c *client.Client, i int, signer string) {
	for n := 0; ; n++ {
		select {
		case <-l.stop:
			return
		case <-time.After(time.Duration(l.pause.Load())):
		}
		key := fmt.Sprintf("load-%02d-%06d", i, n)
		req := asserted(signer, key)
		if n%4 == 3 { // attached to the document, with a certificate chain and the token inside
			req.Form, req.Algorithm = "cms", []string{"SM2", "RSA-2048"}[n/4%2]
		}
		begun := time.Now()
		for {
			phase := l.phase.Load().(string)
			sent := time.Now()
			r, err := c.Sign(context.Background(), key, req)
			took := time.Since(sent)
			if now := l.phase.Load().(string); phase == calm { // what was done began while the call was under way
				phase = now
			}
			l.mu.Lock()
			l.worst[phase] = max(l.worst[phase], took)
			if err == nil {
				l.made[key] = r
				l.mu.Unlock()
				l.acks[i].Add(1)
				break
			}
			code := "transport"
			var p *client.Problem
			if errors.As(err, &p) {
				code = p.Code
			}
			if l.errors[phase] == nil {
				l.errors[phase] = map[string]int{}
			}
			l.errors[phase][code]++
			l.mu.Unlock()
			if errors.Is(err, context.DeadlineExceeded) || took > answerWithin {
				l.t.Errorf("%s: a call hung for %v: %v", phase, took, err)
				return
			}
			if time.Since(begun) > settleWithin {
				l.t.Errorf("%s: %s is not settled after %v: %v", phase, key, settleWithin, err)
				return
			}
			time.Sleep(50 * time.Millisecond)
		}
	}
}

// progress waits until every client has got n signatures more.
func (l *load) progress(n int64, within time.Duration) {
	l.t.Helper()
	var want [loadClients]int64
	for i := range want {
		want[i] = l.acks[i].Load() + n
	}
	begun := time.Now()
	within = max(within, patience)
	for i := range want {
		for l.acks[i].Load() < want[i] {
			if l.t.Failed() {
				l.t.FailNow()
			}
			if time.Since(begun) > within {
				l.t.Fatalf("%s: client %d has %d of %d more signatures after %v; errors: %v", l.phase.Load(), i, l.acks[i].Load()-want[i]+n, n, within, l.seen())
			}
			time.Sleep(5 * time.Millisecond)
		}
	}
}

func (l *load) seen() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return fmt.Sprint(l.errors)
}

// during names what is done, does it, and wants service to be back within the time; then it is calm again. It answers
// how long the outage was for the client that waited longest.
func (l *load) during(phase string, within time.Duration, do func()) {
	l.t.Helper()
	l.phase.Store(phase)
	begun := time.Now()
	do()
	l.progress(1, within) // what was under way
	l.progress(1, within) // what was asked for afterwards
	l.t.Logf("%s: every client was served twice again after %v", phase, time.Since(begun).Round(time.Millisecond))
	l.phase.Store(calm)
	l.progress(10, time.Minute)
}

// onlySaw wants no errors but those allowed in each phase. The load has ended.
func (l *load) onlySaw(allowed map[string][]string) {
	l.t.Helper()
	for phase, codes := range l.errors {
		for code, n := range codes {
			if !slices.Contains(allowed[phase], code) {
				l.t.Errorf("%s: %d calls ended in %s", phase, n, code)
			}
		}
	}
	l.t.Logf("%d signatures; errors by phase: %v; longest calls: %v", len(l.made), l.errors, l.worst)
}

// TestKills signs with sixteen clients while parts of the appliance, and then all of it, are killed with SIGKILL. What
// was acknowledged has to be there, once, and to verify.
func TestKills(t *testing.T) {
	t.Parallel()
	need(t, "gpsd", "chronyd")
	rounds := 3
	if testing.Short() {
		rounds = 1
	}
	dir := initAppliance(t, nil, "--listen", freePort(t))
	configure(t, dir, func(c *appliance.Config) {
		c.Policy.SegmentEntries = 700 // segments roll under the load
		// What gpsd hears of the simulated receiver comes late on a busy machine, and the time is not what is tried here.
		c.Time.Accuracy = appliance.Duration(10 * time.Second)
	})
	m := serve(t, dir)
	m.register(t, "load", "--consent", "app-asserted")
	signers := []string{"D1", "D2", "D3", "D4"}
	for _, id := range signers {
		m.enrol(t, id, "")
	}
	l := startLoad(t, m, signers)
	l.progress(3, time.Minute)
	pid := m.cmd.Process.Pid

	// 0. What is checked while it grows is not taken for tampered with.
	l.pause.Store(int64(slowPause))
	for range 2 * rounds {
		for what, args := range map[string][]string{"未发现改动": {"audit", "verify"}, "与日志一致": {"db", "compare"}} {
			// An appliance that stands still for longer than the command waits has signatures without an entry; what is wrong stays so.
			eventually(t, time.Minute, fmt.Sprint(args, " finds nothing"), func() bool {
				o := yinjian(t, append(args, "--dir", dir)...)
				if o.code != 0 {
					t.Logf("%v: %v", args, o)
				}
				return o.code == 0 && strings.Contains(o.stdout, what)
			})
		}
	}

	l.pause.Store(int64(loadPause))

	// 1. Workers. Each slot class once, staff's and the timestamps' once more in later rounds.
	for round := range rounds {
		for _, class := range [][]string{{"staff", "tsa", "log", "ca", "tls"}, {"staff", "tsa"}, {"staff"}}[round] {
			before := m.state(t).HSM[class]
			if before.Phase != "ready" {
				t.Fatalf("worker of %s: %+v", class, before)
			}
			p, parent, ok := readProcess(before.PID)
			if !ok || parent != pid {
				t.Fatalf("/health/state says that %d is the worker of %s; it is not below %d", before.PID, class, pid)
			}
			l.during("worker "+class, workerReturns, func() { p.signal(t, syscall.SIGKILL) })
			eventually(t, workerReturns, "another worker of "+class, func() bool {
				now := m.state(t).HSM[class]
				return now.Phase == "ready" && now.PID != before.PID && now.Restarts == before.Restarts+1
			})
		}
	}

	// 2. The software cipher machine.
	for range rounds {
		old := childWith(t, pid, "softtoken --dir")
		l.during("softtoken", softtokenReturns, func() { old.signal(t, syscall.SIGKILL) })
		if now := childWith(t, pid, "softtoken --dir"); now == old {
			t.Errorf("the killed softtoken lives: %+v", now)
		}
	}

	// 3. The software cipher machine hangs: longer than a call may take, and calls are answered all the same.
	stranger := m.stranger(t, true) // a handshake needs the cipher machine
	l.during("softtoken stopped", softtokenReturns+10*time.Second, func() {
		p := childWith(t, pid, "softtoken --dir")
		stopped := time.Now()
		p.signal(t, syscall.SIGSTOP)
		defer p.signal(t, syscall.SIGCONT)
		eventually(t, answerWithin, "calls are refused with hsm_unavailable", func() bool {
			l.mu.Lock()
			defer l.mu.Unlock()
			return l.errors["softtoken stopped"]["hsm_unavailable"]+l.errors["softtoken stopped"]["timeout"] >= loadClients
		})

		// What a caller is told, and what operators see.
		resp, body := m.handmade(t, stranger, "load", "while-it-hangs", asserted("D1", "while-it-hangs"))(t)
		var refusal wire.Problem
		after, err := strconv.Atoi(cmp.Or(resp.Header.Get("Retry-After"), "0"))
		if err := errors.Join(err, json.Unmarshal([]byte(body), &refusal)); err != nil || resp.Header.Get("Content-Type") != "application/problem+json" ||
			refusal.Detail == "" || refusal.Next == "" || !(resp.StatusCode == 503 && refusal.Code == "hsm_unavailable" && after >= 2 ||
			resp.StatusCode == 504 && refusal.Code == "timeout") {
			t.Errorf("while the cipher machine hangs: %d, %v, %s, %v", resp.StatusCode, resp.Header, body, err)
		}
		eventually(t, answerWithin, "the state says what is wrong, and since when", func() bool {
			s := m.state(t)
			staff := s.HSM["staff"]
			return staff.Phase != "ready" && staff.Error != "" && staff.SinceS >= 0 && staff.SinceS <= time.Since(stopped).Seconds() &&
				!s.Ready && strings.Contains(strings.Join(s.Warnings, "\n"), "密码机 staff 不可用")
		})
	})
	if s := m.state(t); len(s.HSM) != 5 {
		t.Errorf("slot classes: %+v", s.HSM)
	}
	eventually(t, softtokenReturns, "all slot classes are ready again", func() bool {
		for _, h := range m.state(t).HSM {
			if h.Phase != "ready" {
				return false
			}
		}
		return true
	})

	// 4. All of it, as a power cut would. Nothing of it is left behind, and it starts in the same folder: after its
	// remains have gone, at once, and killed again while it starts.
	for round := range rounds {
		left := descendants(t, m.cmd.Process.Pid)
		for _, words := range []string{"softtoken --dir", "gpsd", "chronyd"} {
			childWith(t, m.cmd.Process.Pid, words)
		}
		l.during("appliance", readyWithin+30*time.Second, func() {
			if round == 1 { // it hangs when its parent dies
				childWith(t, m.cmd.Process.Pid, "softtoken --dir").signal(t, syscall.SIGSTOP)
			}
			m.kill(t)
			orphansGone := func() {
				eventually(t, 15*time.Second, "workers, softtoken, gpsd and chronyd end with the appliance", func() bool {
					for _, p := range left {
						if p.alive() {
							return false
						}
					}
					return true
				})
			}
			if round == 0 {
				orphansGone()
			}
			if round == 2 {
				again := launch(t, dir)
				eventually(t, readyWithin, "a worker of the second start", func() bool {
					b, err := os.ReadFile(again.log)
					return err == nil && bytes.Contains(b, []byte("worker ready"))
				})
				left = append(left, descendants(t, again.cmd.Process.Pid)...)
				again.kill(t)
			}
			m = serve(t, dir)
			orphansGone()
		})
	}
	l.end()
	if t.Failed() {
		return
	}

	// 5. What clients were told. A killed worker or cipher machine is a refusal with a code, never a broken connection.
	l.onlySaw(map[string][]string{
		calm:                nil,
		"worker staff":      {"hsm_unavailable"},
		"worker tsa":        {"hsm_unavailable"},
		"worker log":        {"hsm_unavailable"},
		"worker ca":         nil,
		"worker tls":        nil, // open connections need it no more
		"softtoken":         {"hsm_unavailable"},
		"softtoken stopped": {"hsm_unavailable", "timeout"},
		// clock_skew: after a crash, requests under the replay guard's stored floor are refused for up to 5 s.
		"appliance": {"transport", "clock_skew", "hsm_unavailable", "time_untrusted"},
	})

	// 6. What is there.
	m.mustBeClean(t)
	m.judgeAll(t, "load", l.made)
	m.stop(t)
	if n := entriesByRef(t, dir, l.made); n < 2 && !testing.Short() {
		t.Errorf("%d segment: none was sealed under the load", n)
	}
}

// entriesByRef reads the journal's files: each acknowledged record has exactly one entry, at the place its result names,
// and no key has two. It answers how many segments there are.
func entriesByRef(t *testing.T, dir string, made map[string]*wire.SignResult) int {
	t.Helper()
	store, err := sqlite.OpenJournal(t.Context(), sqlite.JournalConfig{Dir: filepath.Join(dir, "journal"), ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	segments, err := store.Segments(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	found := map[string][]int64{}
	for _, s := range segments {
		err := store.Rows(t.Context(), s.Number, 0, func(r audit.Row) error {
			if r.Kind == evidence.KindSign {
				found[hex.EncodeToString(r.Ref)] = append(found[hex.EncodeToString(r.Ref)], r.Sequence)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for key, r := range made {
		if at := found[r.RecordID]; len(at) != 1 || at[0] != int64(r.Sequence) {
			t.Errorf("%s (%s) was acknowledged at %d and is at %v", key, r.RecordID, r.Sequence, at)
		}
	}
	for id, at := range found {
		if len(at) != 1 {
			t.Errorf("record %s has entries %v", id, at)
		}
	}
	if len(found) < len(made) {
		t.Errorf("%d records for %d results", len(found), len(made))
	}
	return len(segments)
}

// judgeAll gets the evidence of every record by its id and verifies it with the document, without the appliance.
func (m *machine) judgeAll(t *testing.T, app string, made map[string]*wire.SignResult) {
	t.Helper()
	trust := publicTrust(t, m.dir)
	c := m.client(t, app)
	var g errgroup.Group
	g.SetLimit(4)
	for key, r := range made {
		g.Go(func() error {
			b, err := c.Evidence(context.Background(), r.RecordID)
			if err != nil {
				return fmt.Errorf("%s: %w", key, err)
			}
			bundle, err := evidence.Parse(b)
			if err != nil {
				return fmt.Errorf("%s: %w", key, err)
			}
			if bundle.RecordID != r.RecordID || !bytes.Equal(bundle.Signature.Value, r.Signature) || !bytes.Equal(bundle.Token, r.Token) {
				return fmt.Errorf("%s: the evidence is not of what was acknowledged", key)
			}
			if report := evidence.Verify(bundle, trust, evidence.Input{Document: documentOf(key)}); report.Verdict != pki.Valid {
				return fmt.Errorf("%s: %s %s: %+v", key, report.Verdict, report.Summary, report.Checks)
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
}

// publicTrust is what anybody has: the published files.
func publicTrust(t *testing.T, dir string) evidence.Trust {
	t.Helper()
	var trust evidence.Trust
	for _, name := range []string{"ca.pem", "ca-rsa.pem"} {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		certs, err := pki.ParseCertificatePEMs(b)
		if err != nil {
			t.Fatal(err)
		}
		trust.Anchors = append(trust.Anchors, certs...)
	}
	b, err := os.ReadFile(filepath.Join(dir, "log.pem"))
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(b)
	if block == nil {
		t.Fatal("log.pem is no PEM")
	}
	key, err := smx509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	trust.LogKeys = append(trust.LogKeys, key)
	return trust
}

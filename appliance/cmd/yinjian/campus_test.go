package main_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance/problem"
	"yinjian/dbdriver/dbtest"
)

// Rounds sign without pause until they are told to stop; every refusal is a failure of the test.
type rounds struct {
	stop   context.CancelFunc
	done   sync.WaitGroup
	signed atomic.Int64
	last   atomic.Pointer[wire.SignResult]
	key    atomic.Pointer[string]
}

func startRounds(t *testing.T, c *client.Client, signer string) *rounds {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	l := &rounds{stop: cancel}
	for w := range 2 {
		l.done.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				time.Sleep(10 * time.Millisecond) // a pace: tests beside this one want the processor too
				key := fmt.Sprintf("%s-%d-%d", signer, w, i)
				r, err := c.Sign(ctx, key, asserted(signer, key))
				if err != nil {
					if ctx.Err() == nil {
						t.Errorf("%s: %v", key, err)
					}
					return
				}
				l.signed.Add(1)
				l.key.Store(&key)
				l.last.Store(r)
			}
		})
	}
	t.Cleanup(l.end)
	return l
}

func (l *rounds) end() {
	l.stop()
	l.done.Wait()
}

// goesOn waits for n more signatures.
func (l *rounds) goesOn(t *testing.T, n int64) {
	t.Helper()
	from := l.signed.Load()
	eventually(t, time.Minute, "signing goes on", func() bool { return l.signed.Load() >= from+n || t.Failed() })
}

// codeOf is the code of a signature's refusal; "" when it was made.
func codeOf(t *testing.T, c *client.Client, signer, key string) string {
	t.Helper()
	_, err := c.Sign(t.Context(), key, asserted(signer, key))
	var p *client.Problem
	if err != nil && !errors.As(err, &p) {
		t.Fatal(err)
	}
	if err == nil {
		return ""
	}
	return p.Code
}

// The line between the campuses is cut, once as a cable and once as a firewall that swallows: both go on signing, the state
// says what is wrong; when it is back the directories, checkpoints and cosignatures catch up. Whoever is stopped at one
// campus is stopped at the other. A checkpoint's cosignature is in the evidence, and the other campus's log key proves it.
func TestTwoCampuses(t *testing.T) {
	t.Parallel()
	l, a, b := twoCampuses(t)
	ends := [2]*campus{a, b}
	his, emr := a.client(t, "his"), b.client(t, "emr")
	hasSigner := func(m *machine, id string) func() bool {
		return func() bool {
			return strings.Contains(mustRun(t, "signer", "list", "--dir", m.dir, "-o", "json").stdout, `"`+id+`"`)
		}
	}
	eventually(t, time.Minute, "A's signers are known at B", hasSigner(b.machine, "A1002"))
	eventually(t, time.Minute, "B's signers are known at A", hasSigner(a.machine, "B1002"))

	// 1. Under load at both campuses: the cable, then the firewall.
	loads := [2]*rounds{startRounds(t, his, "A1001"), startRounds(t, emr, "B1001")}
	long := os.Getenv("YINJIAN_LONG") != ""
	pause := time.Duration(0)
	if long {
		pause = 10 * time.Minute
	}
	for i, way := range []struct{ cut, mend func(*testing.T) }{{l.cut, l.mend}, {l.swallow, l.release}} {
		if i > 0 && !long {
			break
		}
		way.cut(t)
		var at [2]uint64
		for j, c := range ends {
			eventually(t, time.Minute, "the state says that the other campus is away", func() bool { return !c.peer(t).Up })
			if s := c.state(t); !s.Ready || !strings.Contains(strings.Join(s.Warnings, "\n"), "不可达") {
				t.Errorf("ready = %v, warnings %q", s.Ready, s.Warnings)
			}
			at[j] = c.peer(t).Gotten
		}
		time.Sleep(pause)
		for j := range ends {
			loads[j].goesOn(t, 20)
		}
		// Decided at one campus while the line is cut; the other learns of it afterwards.
		id := fmt.Sprintf("A200%d", i)
		a.enrol(t, id, "")
		if hasSigner(b.machine, id)() {
			t.Errorf("%s is known at B over a line that is cut", id)
		}
		size := [2]uint64{a.state(t).Journal.Entries, b.state(t).Journal.Entries}
		for j, c := range ends {
			if got := c.peer(t).Gotten; got != at[j] {
				t.Errorf("a cosignature over %d entries came over a line that is cut", got)
			}
		}
		way.mend(t)
		for j, c := range ends {
			eventually(t, time.Minute, "the other campus cosigns what was signed meanwhile", func() bool { p := c.peer(t); return p.Up && p.Gotten >= size[j] })
		}
		eventually(t, time.Minute, id+" is known at B", hasSigner(b.machine, id))
	}
	for j := range ends {
		loads[j].goesOn(t, 5)
		loads[j].end()
	}

	// 2. Evidence of either campus, with the other's word.
	for j, c := range ends {
		covered := c.state(t).Journal.Entries
		eventually(t, time.Minute, "the last signature is cosigned", func() bool { return c.peer(t).Gotten >= covered })
		record := loads[j].last.Load().RecordID
		bundle, err := []*client.Client{his, emr}[j].Evidence(t.Context(), record)
		if err != nil {
			t.Fatal(err)
		}
		// 4 has an archive timestamp too, where the schedule made one by now.
		if !strings.Contains(string(bundle), `"yinjian-evidence/3"`) && !strings.Contains(string(bundle), `"yinjian-evidence/4"`) {
			t.Errorf("the evidence is of another format: %.200s", bundle)
		}
		file := filepath.Join(tempDir(t), "evidence.json")
		if err := os.WriteFile(file, bundle, 0o600); err != nil {
			t.Fatal(err)
		}
		args := []string{"verify", "--anchors", c.dir, "--log-key", filepath.Join(c.dir, "log.pem"), file}
		o := yinjian(t, append([]string{args[0], "--cosigner-key", filepath.Join(c.dir, "peer-log.pem")}, args[1:]...)...)
		if !strings.Contains(o.stdout, campusNames[1-j]+"院区（节点") {
			t.Errorf("the verifier does not name the cosigner: %v", o)
		}
		if o := yinjian(t, append([]string{args[0], "--cosigner-key", filepath.Join(c.dir, "log.pem")}, args[1:]...)...); o.code != 1 {
			t.Errorf("a cosignature verifies under the log's own key: %v", o)
		}
		// The other campus finds its row, and has no evidence of it: its console says where that is.
		other := ends[1-j].admin()
		defer other.Close()
		eventually(t, time.Minute, "the row is in the central database", func() bool {
			found, err := other.SearchRecords(t.Context(), wire.SearchRecords{RecordID: record})
			return err == nil && len(found.Records) == 1 && found.Records[0].Node == [2]string{"benbu-1", "binhai-1"}[j]
		})
		if _, err := other.ExamineRecord(t.Context(), wire.ExamineRecord{ID: record}); !client.Is(err, problem.NotFound) {
			t.Errorf("examined at the other campus: %v", err)
		}
	}

	// 3. A stop. Before it B refuses for another reason or not at all.
	if code := codeOf(t, emr, "A1002", "before"); code == "signer_stopped" {
		t.Fatal("stopped before the stop")
	}
	mustRun(t, "signer", "stop", "A1002", "--dir", a.dir, "--reason", "离职")
	begun, n := time.Now(), 0
	eventually(t, time.Minute, "whoever is stopped at A is stopped at B", func() bool {
		n++
		return codeOf(t, emr, "A1002", fmt.Sprint("after-", n)) == "signer_stopped"
	})
	t.Logf("a stop at A refuses at B %v after the command had ended at A", time.Since(begun).Round(time.Millisecond))
	if long {
		t.Logf("twenty more, from the end of the decision at A: %v", stops(t, a.machine, emr))
	}
	for _, c := range ends {
		c.mustBeClean(t)
	}
}

// stops has A1001 stopped and started at A, and answers how long it took until B refused for it, ascending.
func stops(t *testing.T, a *machine, emr *client.Client) []time.Duration {
	t.Helper()
	admin := a.admin()
	defer admin.Close()
	var out []time.Duration
	for i := range 20 {
		if _, err := admin.StopSigner(t.Context(), wire.Decision{ID: "A1001", Reason: "x"}); err != nil {
			t.Fatal(err)
		}
		begun, n := time.Now(), 0
		for codeOf(t, emr, "A1001", fmt.Sprint("stop-", i, "-", n)) != "signer_stopped" {
			n++
		}
		out = append(out, time.Since(begun).Round(time.Millisecond))
		if _, err := admin.StartSigner(t.Context(), wire.Decision{ID: "A1001", Reason: "x"}); err != nil {
			t.Fatal(err)
		}
		eventually(t, time.Minute, "the start is known at B", func() bool {
			n++
			return codeOf(t, emr, "A1001", fmt.Sprint("start-", i, "-", n)) != "signer_stopped"
		})
	}
	slices.Sort(out)
	return out
}

// An appliance that goes on from a backup is in a new epoch: the other campus takes nothing of it under the old card. With a
// new one the two go on, and nothing is applied twice.
func TestRestoredCampus(t *testing.T) {
	t.Parallel()
	longOnly(t)
	_, a, b := twoCampuses(t)
	a.stop(t)
	if err := os.WriteFile(filepath.Join(a.place, "restored"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	a.serve(t)
	eventually(t, time.Minute, "B says that the epoch is another", func() bool { return strings.Contains(b.peer(t).Error, "other_epoch") })
	entries := b.state(t).Journal.Entries
	a.enrol(t, "A3001", "")
	file, fingerprint := a.card(t)
	b.believe(t, file, fingerprint)
	for _, m := range []*machine{a.machine, b.machine} {
		eventually(t, time.Minute, "the other campus answers and cosigns", func() bool { p := m.peer(t); return p.Up && p.Gotten > 0 && p.Given > 0 })
	}
	eventually(t, time.Minute, "A3001 is known at B", func() bool {
		return strings.Contains(mustRun(t, "signer", "list", "--dir", b.dir, "-o", "json").stdout, `"A3001"`)
	})
	if more := b.state(t).Journal.Entries - entries; more > 40 {
		t.Errorf("B's journal has %d more entries: is the directory applied again?", more)
	}
	for _, c := range []*campus{a, b} {
		c.mustBeClean(t)
	}
}

// Two idle appliances do not cosign each other's cosignatures for ever.
func TestIdleCampusesAreQuiet(t *testing.T) {
	t.Parallel()
	longOnly(t)
	_, a, b := twoCampuses(t)
	heads := func() string {
		x, y := a.peer(t), b.peer(t)
		return fmt.Sprint(x.Gotten, x.Given, y.Gotten, y.Given)
	}
	// Quiet is three rounds in which nothing moved.
	last, still := "", 0
	eventually(t, 2*time.Minute, "the two fall silent", func() bool {
		time.Sleep(time.Second) // a round, cosign_every
		now := heads()
		if now == last {
			still++
		} else {
			last, still = now, 0
		}
		return still >= 3
	})
}

// Somebody else's key at the other campus's address, and a card that was exchanged on its way.
func TestPeerWithAnotherKey(t *testing.T) {
	t.Parallel()
	longOnly(t)
	l := newLand(t)
	a, b := newCampus(t, l, 0, ""), newCampus(t, l, 1, "")
	a.launch(t)
	b.launch(t)
	for _, c := range []*campus{a, b} {
		c.await(t)
		c.trusted(t)
	}
	a.enrol(t, "D1001", "")
	fileA, printA := a.card(t)
	fileB, printB := b.card(t)
	refused(t, 1, []string{"指纹", "fingerprint"}, "peer", "add", "--dir", b.dir, "--card", fileA, "--fingerprint", printB, "--reason", "test", "--confirmed-by", "张三", "--confirmed-by", "李四")
	refused(t, 2, []string{"confirmed-by"}, "peer", "add", "--dir", b.dir, "--card", fileA, "--fingerprint", printA, "--reason", "test", "--confirmed-by", "张三", "--confirmed-by", "张三")
	refused(t, 1, []string{"card"}, "peer", "add", "--dir", a.dir, "--card", fileA, "--fingerprint", printA, "--reason", "test", "--confirmed-by", "张三", "--confirmed-by", "李四")
	card, err := os.ReadFile(fileB)
	if err != nil {
		t.Fatal(err)
	}
	forged := filepath.Join(tempDir(t), "forged.json")
	at := len(card) / 3
	card[at] ^= 1
	if err := os.WriteFile(forged, card, 0o600); err != nil {
		t.Fatal(err)
	}
	refused(t, 1, []string{"card"}, "peer", "add", "--dir", a.dir, "--card", forged, "--fingerprint", printB, "--reason", "test", "--confirmed-by", "张三", "--confirmed-by", "李四")

	// A believes B; B does not believe A: nobody is let in.
	a.believe(t, fileB, printB)
	eventually(t, time.Minute, "A says that it is not let in", func() bool { p := a.peer(t); return !p.Up && p.Error != "" })

	// An id at both campuses, registered on its own at each.
	b.enrol(t, "D1001", "")
	refused(t, 1, []string{"D1001"}, "peer", "add", "--dir", b.dir, "--card", fileA, "--fingerprint", printA, "--reason", "test", "--confirmed-by", "张三", "--confirmed-by", "李四")

	// A stranger of B's name and address, with keys of its own.
	b.stop(t)
	stranger := newCampus(t, l, 1, "")
	stranger.serve(t)
	stranger.believe(t, fileA, printA)
	stranger.changeOf(t, "/admin/v1/peer", "peer.pairing", "", "", `"persons":"张三、李四"`)
	eventually(t, time.Minute, "A says whose key it is not", func() bool {
		p := a.peer(t)
		return !p.Up && strings.Contains(p.Error, "not the one that was agreed on")
	})
	eventually(t, time.Minute, "the stranger is not let in", func() bool { p := stranger.peer(t); return !p.Up && p.Error != "" })
	mustRun(t, "peer", "remove", "--dir", a.dir, "--reason", "换设备", "--confirmed-by", "张三", "--confirmed-by", "李四")
	a.changeOf(t, "/admin/v1/peer/remove", "peer.pairing", "", `"node":"`, "")
	if p := a.peer(t); p.Node != "" {
		t.Errorf("still paired: %+v", p)
	}
}

// copyAll makes dst what src is, with its permissions.
func copyAll(t *testing.T, dst, src string) {
	t.Helper()
	if err := os.RemoveAll(dst); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("cp", "-a", src, dst).CombinedOutput(); err != nil {
		t.Fatalf("cp: %v: %s", err, out)
	}
}

// A's folder is put back to an older state. With B reachable A does not start: B has seen more. With the line cut it starts,
// and goes its own way; when the line is back B sees two histories of A's journal, and takes nothing of it any more, over a
// restart too.
func TestCampusPutBack(t *testing.T) {
	t.Parallel()
	l, a, b := twoCampuses(t)
	a.stop(t)
	old := filepath.Join(filepath.Dir(a.place), "old")
	copyAll(t, old, a.place)
	a.serve(t)
	his := a.client(t, "his")
	for i := range 5 {
		key := fmt.Sprint("lost-", i)
		if _, err := his.Sign(t.Context(), key, asserted("A1001", key)); err != nil {
			t.Fatal(err)
		}
	}
	size := a.state(t).Journal.Entries
	eventually(t, time.Minute, "B has seen what was signed", func() bool { return b.peer(t).Given >= size })
	a.stop(t)
	copyAll(t, a.place, old)

	a.launch(t, "--once")
	if o := a.outcome(); o.code == 0 || !strings.Contains(o.stderr, "另一院区见过的不符") {
		t.Fatalf("an older journal starts beside a campus that has seen more: %v", o)
	}
	copyAll(t, a.place, old) // the start was refused before anything was written; whatever else it left is put back too

	l.cut(t)
	a.serve(t)
	his = a.client(t, "his")
	for i := range 5 {
		key := fmt.Sprint("other-", i)
		if _, err := his.Sign(t.Context(), key, asserted("A1001", key)); err != nil {
			t.Fatal(err)
		}
	}
	l.mend(t)
	eventually(t, time.Minute, "A is told that its journal is not recognised", func() bool { return a.peer(t).Accused != "" })
	for i := 0; a.state(t).Journal.Entries <= size+5; i++ { // beyond what B has seen
		key := fmt.Sprint("beyond-", i)
		if _, err := his.Sign(t.Context(), key, asserted("A1001", key)); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, time.Minute, "B sees two histories", func() bool { return b.peer(t).Split != "" })
	seen := b.peer(t)
	if s := b.state(t); !s.Ready || !strings.Contains(strings.Join(s.Warnings, "\n"), "分叉视图") {
		t.Errorf("ready = %v, warnings %q", s.Ready, s.Warnings)
	}
	b.stop(t)
	b.serve(t)
	if again := b.peer(t); again.Split == "" || again.Given != seen.Given {
		t.Errorf("after a restart: %+v, before: %+v", again, seen)
	}
	eventually(t, time.Minute, "A is told why", func() bool { return strings.Contains(a.peer(t).Accused, "两份历史") })
}

// The campuses' clocks differ by most of the promised accuracy: nothing minds. At another campus whose time is far away the
// appliance refuses to sign by itself; the pairing stands.
func TestSkewBetweenCampuses(t *testing.T) {
	t.Parallel()
	longOnly(t)
	l := newLand(t)
	a, b := newCampus(t, l, 0, ""), newCampus(t, l, 1, "")
	b.time.ahead.Store(int64(700 * time.Millisecond))
	a.launch(t)
	b.launch(t)
	for _, c := range []*campus{a, b} {
		c.await(t)
		c.trusted(t)
	}
	pairUp(t, a.machine, b.machine)
	for _, m := range []*machine{a.machine, b.machine} {
		if p := m.peer(t); p.AgeS > 60 || p.Split != "" || p.Accused != "" {
			t.Errorf("with skewed clocks: %+v", p)
		}
	}
	b.time.ahead.Store(int64(time.Hour))
	eventually(t, time.Minute, "B does not believe the jump", func() bool { return b.state(t).Time.State != "trusted" })
	a.enrol(t, "D1001", "")
	eventually(t, time.Minute, "B follows A's directory all the same", func() bool {
		return strings.Contains(mustRun(t, "signer", "list", "--dir", b.dir, "-o", "json").stdout, `"D1001"`)
	})
}

// One campus has believed another time since its birth, by seconds or by more than a request may be off. By seconds nothing minds;
// beyond, requests with the right time are refused there, and those with its own are served. Directories, checkpoints and the central
// database go on in any case, and a stop there is known here.
func TestCampusOfAnotherTime(t *testing.T) {
	t.Parallel()
	longOnly(t)
	for _, ahead := range []time.Duration{5 * time.Second, 10 * time.Minute, -10 * time.Minute} {
		t.Run(fmt.Sprint(ahead), func(t *testing.T) {
			t.Parallel()
			l := newLand(t)
			pg := dbtest.StartPostgres(t)
			dsn := pg.DSN(pg.Fresh(t))
			a, b := newCampus(t, l, 0, dsn), newCampus(t, l, 1, dsn)
			b.time.ahead.Store(int64(ahead))
			a.serve(t)
			b.serve(t)
			a.enrol(t, "A1", "")
			b.enrol(t, "B1", "")
			his := a.register(t, "his", "--consent", "app-asserted")
			b.register(t, "emr", "--consent", "app-asserted")
			there := func() time.Time { return time.Now().Add(ahead) }
			cfg := b.clientConfig(t, "emr")
			cfg.TLS = &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: cfg.RootCAs, Time: there}
			o := &office{machine: b.machine}
			right := o.client(t, cfg)
			cfg.Clock = there
			if code := codeOf(t, o.client(t, cfg), "B1", "own"); code != "" {
				t.Errorf("with its own time: %q", code)
			}
			if ahead.Abs() > time.Minute {
				if code := codeOf(t, right, "B1", "right"); code != "clock_skew" {
					t.Errorf("with the right time: %q", code)
				}
			} else { // requests that are older than the start are not served; these are younger in the end
				eventually(t, time.Minute, "requests with the right time are served", func() bool { return codeOf(t, right, "B1", "right") == "" })
			}
			pairUp(t, a.machine, b.machine)
			mustRun(t, "signer", "stop", "B1", "--dir", b.dir, "--reason", "x")
			eventually(t, time.Minute, "a stop there is known here", func() bool {
				return codeOf(t, his, "B1", fmt.Sprint("stopped-", time.Now().UnixNano())) == "signer_stopped"
			})
			for _, c := range []*campus{a, b} {
				if p := c.peer(t); !p.Up || p.Split != "" || p.Accused != "" || p.Error != "" {
					t.Errorf("%+v", p)
				}
				c.mustBeClean(t)
			}
		})
	}
}

package uses_test

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/emmansun/gmsm/sm3"
	"github.com/sirupsen/logrus"

	"yinjian/appliance/audit"
	"yinjian/appliance/internal/testkit"
	"yinjian/appliance/uses"
	"yinjian/dbdriver/sqlite"
	"yinjian/hsm"
	"yinjian/hsm/uselog"
)

// A bench is a journal over SQLite and a slot's log of uses, with no cipher machine: what it signs is what it says.
type bench struct {
	testing.TB
	dir     string
	store   *sqlite.Journal
	journal *audit.Journal
	log     *uselog.Log
	life    uselog.Hash
	hook    *logrus.Logger
	out     *strings.Builder
}

func newBench(t testing.TB) *bench {
	t.Helper()
	b := &bench{TB: t, dir: t.TempDir(), life: uselog.Hash{1}, out: new(strings.Builder)}
	b.hook = logrus.New()
	b.hook.SetOutput(b.out)
	quiet := logrus.New()
	quiet.SetOutput(io.Discard)
	var err error
	if b.store, err = sqlite.OpenJournal(t.Context(), sqlite.JournalConfig{Dir: t.TempDir()}); err != nil {
		t.Fatal(err)
	}
	if b.journal, err = audit.Open(t.Context(), audit.Config{Store: b.store, Node: "benbu-1", Clock: testkit.NewClock(), Log: quiet}); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- b.journal.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := errors.Join(<-done, b.store.Close()); err != nil {
			t.Error(err)
		}
	})
	b.start(1)
	return b
}

// start is a start of the appliance, which its worker precedes.
func (b *bench) start(life byte) {
	b.Helper()
	b.life = uselog.Hash{life}
	b.worker(b.life)
	b.append(audit.Draft{Kind: "appliance.started", Actor: "appliance", Fields: []audit.Field{{Name: uses.FieldLife, Value: audit.Octets(b.life[:])}}})
}

// worker is another worker on the same log.
func (b *bench) worker(life uselog.Hash) {
	b.Helper()
	if b.log != nil {
		b.log.Close()
	}
	var err error
	if b.log, err = uselog.Open(b.dir, "staff", life); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { b.log.Close() })
}

func (b *bench) append(d audit.Draft) {
	b.Helper()
	if _, err := b.journal.Append(b.Context(), d); err != nil {
		b.Fatal(err)
	}
}

// sign makes the signature n.
func (b *bench) sign(n int) []byte {
	b.Helper()
	sig := sha256.New().Sum(binary.BigEndian.AppendUint64(nil, uint64(n)))
	if err := b.log.Add("staff/D1", hsm.SignRSASHA256, make([]byte, 32), sig); err != nil {
		b.Fatal(err)
	}
	return sig
}

// entry is what a raw signature leaves.
func entry(signature []byte) audit.Draft {
	return audit.Draft{Kind: "sign.v1", Actor: "application/his", Payloads: []audit.Attachment{
		{Name: "signature", MediaType: "application/octet-stream", Data: signature},
	}}
}

func (b *bench) record(n int) { b.Helper(); b.append(entry(b.sign(n))) }

// reconciler begins where the last left off. grace is how long a live worker's signature may wait.
func (b *bench) reconciler(change func(*uses.Config)) *uses.Reconciler {
	b.Helper()
	cfg := uses.Config{Dir: b.dir, Slots: []string{"staff", "tsa"}, Store: b.store, Life: b.life, Append: b.journal.Append, Log: b.hook}
	if change != nil {
		change(&cfg)
	}
	r, err := uses.New(b.Context(), cfg)
	if err != nil {
		b.Fatal(err)
	}
	return r
}

func (b *bench) pass(r *uses.Reconciler, final bool) uses.Summary {
	b.Helper()
	if err := r.Pass(b.Context(), final); err != nil {
		b.Fatal(err)
	}
	return r.Summary()
}

func (b *bench) verify() *uses.Report {
	b.Helper()
	r, err := uses.Verify(b.Context(), b.store, b.dir, []string{"staff", "tsa"}, 0)
	if err != nil {
		b.Fatal(err)
	}
	return r
}

// at once: a live worker's signature is named in the first pass that finds no entry.
func atOnce(c *uses.Config) { c.Grace = 1 }

// A signature without an entry is named while the appliance runs, with an alarm; one that was thrown away is not; one
// that has an entry is not, though its worker ended since; each counts once.
func TestNoRecord(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	r := b.reconciler(nil)
	for n := range 10 {
		b.record(n)
	}
	b.record(3) // RSA: the same signature once more
	thrown := sm3.Sum(b.sign(20))
	d, err := uses.Discarded([]uses.Named{{Signature: fmt.Sprintf("%x", thrown), Reason: "no token"}})
	if err != nil {
		t.Fatal(err)
	}
	b.append(d)
	theirs := b.sign(30)
	b.record(31)
	if s := b.pass(r, false); s.Open != 1 || s.Alarms != 0 || s.Unaccounted != 0 {
		t.Errorf("within the grace: %+v", s)
	}
	// The next reconciler of the same start carries on.
	r = b.reconciler(atOnce)
	s := b.pass(r, false)
	if c := s.Slots["staff"]; c.Uses != 14 || c.Entries != 12 || c.Discarded != 1 || c.Unaccounted != 1 || s.Alarms != 1 || s.Open != 0 {
		t.Errorf("after the grace: %+v", s)
	}
	if !strings.Contains(b.out.String(), "ALARM") {
		t.Errorf("log: %s", b.out)
	}
	v := b.verify()
	if !v.OK() || len(v.Named) != 1 || v.Named[0].Signature != fmt.Sprintf("%x", sm3.Sum(theirs)) || v.Named[0].Key != "staff/D1" ||
		v.Named[0].Counter != 13 || v.Named[0].Reason != uses.NoRecord {
		t.Errorf("verify: %+v", v)
	}
	before := b.journal.Size()
	if b.pass(r, false); b.journal.Size() != before {
		t.Errorf("a pass without anything new wrote %d entries", b.journal.Size()-before)
	}
}

// Why a signature has no entry: its start ended (a crash), had ended in order, or there was no such start.
func TestReasons(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.record(1)
	crashed := b.sign(2)
	b.start(2)
	if s := b.pass(b.reconciler(nil), false); s.Unaccounted != 1 || s.Alarms != 0 {
		t.Errorf("after a crash: %+v", s)
	}
	b.record(3)
	b.pass(b.reconciler(nil), true)
	stopped := b.sign(4)
	b.worker(uselog.Hash{99})
	foreign := b.sign(5)
	b.start(3)
	if v := b.verify(); v.OK() || len(v.Open) != 2 {
		t.Errorf("before the next pass: %+v", v)
	}
	if s := b.pass(b.reconciler(nil), false); s.Unaccounted != 3 || s.Alarms != 2 {
		t.Errorf("after a theft: %+v", s)
	}
	want := map[string]string{
		fmt.Sprintf("%x", sm3.Sum(crashed)): uses.Ended, fmt.Sprintf("%x", sm3.Sum(stopped)): uses.Stopped, fmt.Sprintf("%x", sm3.Sum(foreign)): uses.Foreign,
	}
	v := b.verify()
	for _, n := range v.Named {
		if want[n.Signature] != n.Reason {
			t.Errorf("%s: %q, want %q", n.Signature, n.Reason, want[n.Signature])
		}
	}
	if len(v.Named) != len(want) {
		t.Errorf("named: %+v", v.Named)
	}
}

// Beside a running appliance some signature is always under way; a look at it waits for those that it found, not for all.
func TestVerifyWhileSigning(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		made := b.sign(0)
		for n := 1; ; n++ {
			next := b.sign(n)
			b.append(entry(made))
			made = next
			select {
			case <-stop:
				b.append(entry(made))
				return
			case <-time.After(time.Millisecond):
			}
		}
	}()
	for range 3 {
		for size := b.journal.Size(); b.journal.Size() < size+3; {
			time.Sleep(time.Millisecond)
		}
		r, err := uses.Verify(t.Context(), b.store, b.dir, []string{"staff", "tsa"}, 5*time.Second)
		if err != nil || !r.OK() {
			t.Errorf("Verify = %+v, %v", r, err)
		}
	}
	close(stop)
	<-done
	// One that stays away is told, also while others come and go.
	lost := b.sign(-1)
	if v := b.verify(); len(v.Open) != 1 || v.Open[0].Signature != fmt.Sprintf("%x", sm3.Sum(lost)) {
		t.Errorf("verify: %+v", v)
	}
}

// A crash at each write of a pass loses nothing and names nothing twice.
func TestCrashInPass(t *testing.T) {
	t.Parallel()
	for _, landed := range []bool{false, true} {
		for failing := range 2 {
			t.Run(fmt.Sprintf("entry %d, landed %v", failing, landed), func(t *testing.T) {
				b := newBench(t)
				b.record(1)
				b.pass(b.reconciler(nil), false)
				b.worker(uselog.Hash{99}) // an alarm, which is not to be lost either
				b.sign(2)
				b.start(2)
				b.record(3)
				errCut := errors.New("cut")
				n := 0
				r := b.reconciler(func(c *uses.Config) {
					c.Append = func(ctx context.Context, d audit.Draft) (rec audit.Receipt, err error) {
						if n == failing {
							n++
							if landed {
								_, err = b.journal.Append(ctx, d)
							}
							return rec, errors.Join(errCut, err)
						}
						n++
						return b.journal.Append(ctx, d)
					}
				})
				if err := r.Pass(t.Context(), false); !errors.Is(err, errCut) {
					t.Fatalf("Pass = %v", err)
				}
				s := b.pass(b.reconciler(nil), false)
				if c := s.Slots["staff"]; c.Uses != 3 || c.Entries != 2 || c.Unaccounted != 1 || s.Alarms != 1 {
					t.Errorf("after the next start: %+v", s)
				}
				if v := b.verify(); !v.OK() || len(v.Named) != 1 || len(v.Damages) != 0 {
					t.Errorf("verify: %+v", v)
				}
			})
		}
	}
}

// What is kept beside the logs is believed only if the journal names it: an older copy of the whole folder shows, and so does
// one without its state.
func TestPutBack(t *testing.T) {
	t.Parallel()
	copyOf := func(t *testing.T, dir string) map[string][]byte {
		out := map[string][]byte{}
		names, err := filepath.Glob(filepath.Join(dir, "*"))
		for _, n := range names {
			if out[n], err = os.ReadFile(n); err != nil {
				t.Fatal(err)
			}
		}
		return out
	}
	for name, keepState := range map[string]bool{"with the state of then": true, "without state": false} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			b.record(1)
			b.pass(b.reconciler(nil), true)
			then := copyOf(t, b.dir)
			b.start(2)
			b.record(2)
			b.sign(3) // what the copy is to hide
			b.pass(b.reconciler(atOnce), true)
			if s := b.reconciler(nil); b.pass(s, false).Unaccounted != 1 {
				t.Fatal("not named at first")
			}
			b.log.Close()
			names, _ := filepath.Glob(filepath.Join(b.dir, "*"))
			for _, n := range names {
				os.Remove(n)
			}
			for n, data := range then {
				if keepState || !strings.Contains(n, "state-") {
					os.WriteFile(n, data, 0o600)
				}
			}
			b.log = nil
			b.start(3)
			s := b.pass(b.reconciler(nil), false)
			if s.Alarms == 0 {
				t.Errorf("no alarm: %+v", s)
			}
			if v := b.verify(); len(v.Damages) == 0 || len(v.Named) != 1 {
				t.Errorf("verify: damages %+v, named %+v", v.Damages, v.Named)
			}
			b.record(4)
			r := b.reconciler(atOnce)
			if s := b.pass(r, false); s.Unaccounted != 0 && s.Open != 0 {
				t.Errorf("afterwards: %+v", s)
			}
		})
	}
}

// The state file is the reconciler's own JSON; one that is not is no state.
func TestUnreadableState(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.record(1)
	b.pass(b.reconciler(nil), false)
	names, err := filepath.Glob(filepath.Join(b.dir, "state-*.json"))
	if err != nil || len(names) != 1 {
		t.Fatalf("%v, %v", names, err)
	}
	var kept map[string]any
	data, err := os.ReadFile(names[0])
	if err == nil {
		err = json.Unmarshal(data, &kept)
	}
	if err != nil || kept["slots"] == nil {
		t.Fatalf("state: %v, %v", kept, err)
	}
	if err := os.WriteFile(names[0], []byte(strings.Replace(string(data), `"uses":1`, `"uses":0`, 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	if s := b.pass(b.reconciler(nil), false); s.Alarms != 1 || s.Slots["staff"].Entries != 1 {
		t.Errorf("summary %+v", s)
	}
}

// Memory and files stay as they are while uses go by. It runs alone: what is measured is the whole process's.
func TestFlat(t *testing.T) {
	total, every := 20_000, 2_000
	if os.Getenv("YINJIAN_LONG") != "" {
		total, every = 300_000, 20_000
	}
	b := newBench(t)
	r := b.reconciler(nil)
	var heap []uint64
	for n := 0; n < total; {
		// Appends wait for their batch: many at once.
		errs := make(chan error, every)
		for range every {
			sig := b.sign(n)
			n++
			go func() {
				_, err := b.journal.Append(context.Background(), entry(sig))
				errs <- err
			}()
		}
		for range every {
			if err := <-errs; err != nil {
				t.Fatal(err)
			}
		}
		if s := b.pass(r, false); s.Open != 0 {
			t.Fatalf("after %d: %+v", n, s)
		}
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		heap = append(heap, m.HeapAlloc)
	}
	if s := r.Summary(); s.Slots["staff"].Entries != uint64(total) || s.Unaccounted != 0 {
		t.Errorf("summary %+v", s)
	}
	if first, last := heap[len(heap)/3], heap[len(heap)-1]; last > first+16<<20 {
		t.Errorf("the heap grew from %d to %d bytes", first, last)
	}
	names, _ := filepath.Glob(filepath.Join(b.dir, "staff-*.uses"))
	if len(names) > 2 {
		t.Errorf("%d files are kept", len(names))
	}
}

// A counting store counts the rows that are read.
type counting struct {
	audit.Store
	rows  int
	after error // every row read fails after its entry was taken; nil: none does
}

func (c *counting) Rows(ctx context.Context, segment int, from int64, fn func(audit.Row) error) error {
	return c.Store.Rows(ctx, segment, from, func(r audit.Row) error {
		c.rows++
		if err := fn(r); err != nil {
			return err
		}
		return c.after
	})
}

// TestScanBrokenOff: RSA signs the same twice the same way. One entry accounts for one of the two, though the reading broke off behind it
// and was begun again.
func TestScanBrokenOff(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	store := &counting{Store: b.store}
	r := b.reconciler(func(c *uses.Config) { c.Store = store })
	b.pass(r, false)
	b.record(3)
	b.sign(3)
	store.after = errors.New("the disk is gone")
	for range 5 {
		if err := r.Follow(t.Context()); !errors.Is(err, store.after) && err != nil {
			t.Fatal(err)
		}
	}
	store.after = nil
	if s := b.pass(r, false); s.Slots["staff"].Entries != 1 || s.Open != 1 {
		t.Errorf("summary %+v", s)
	}
}

// TestRecent: what is in memory is not read from the store and accounts as what is read; the rest is read.
func TestRecent(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	store, asked, left := &counting{Store: b.store}, 0, 1000
	r := b.reconciler(func(c *uses.Config) {
		c.Store, c.Grace = store, 1
		c.Recent = func(into []audit.Record, from uint64, most int) []audit.Record {
			asked++
			into = b.journal.Recent(into, from, min(most, left))
			left -= len(into)
			return into
		}
	})
	b.record(1)
	b.pass(r, false) // from here on entries are kept
	lost := b.sign(2)
	for n := range 600 { // more than are asked for at once
		b.record(10 + n)
	}
	store.rows, asked = 0, 0
	if err := r.Follow(t.Context()); err != nil {
		t.Fatal(err)
	}
	if store.rows != 0 || asked < 3 {
		t.Errorf("%d rows were read of 600 entries in memory, in %d questions", store.rows, asked)
	}
	s := b.pass(r, false)
	if c := s.Slots["staff"]; c.Uses != 602 || c.Entries != 601 || c.Unaccounted != 1 || s.Alarms != 1 || s.Entries != b.journal.Size()-2 {
		t.Errorf("summary %+v of %d entries", s, b.journal.Size())
	}
	if v := b.verify(); len(v.Named) != 1 || v.Named[0].Signature != fmt.Sprintf("%x", sm3.Sum(lost)) || v.Named[0].Signed == "" {
		t.Errorf("named %+v", v.Named)
	}
	if got := b.journal.Recent(nil, b.journal.Size()-3, 1); len(got) > 0 {
		t.Errorf("entry %d, which was followed, is kept", got[0].Sequence)
	}
	left = 100 // and then the memory has none
	for n := range 200 {
		b.record(1000 + n)
	}
	store.rows = 0
	s = b.pass(r, false)
	if c := s.Slots["staff"]; c.Uses != 802 || c.Entries != 801 || c.Unaccounted != 1 || left != 0 || store.rows < 100 || store.rows > 200 {
		t.Errorf("summary %+v, %d rows read", s, store.rows)
	}
	// A use that was kept over a start, whose entry comes then.
	late := b.sign(5000)
	b.pass(b.reconciler(nil), true) // keeps it
	r = b.reconciler(func(c *uses.Config) { c.Recent = b.journal.Recent })
	if s = b.pass(r, false); s.Open != 1 {
		t.Errorf("kept: %+v", s)
	}
	b.append(entry(late))
	if s = b.pass(r, false); s.Open != 0 || s.Slots["staff"].Entries != 802 {
		t.Errorf("accounted for late: %+v", s)
	}
	// Memory that has a hole is not believed.
	hole := b.reconciler(func(c *uses.Config) {
		c.Recent = func(into []audit.Record, from uint64, most int) []audit.Record {
			if into = b.journal.Recent(into, from, most); len(into) > 2 {
				into = slices.Delete(into, 1, 2)
			}
			return into
		}
	})
	b.pass(hole, false)
	for n := range 10 {
		b.record(6000 + n)
	}
	if s = b.pass(hole, false); s.Open != 0 || s.Slots["staff"].Entries != 812 {
		t.Errorf("over a hole: %+v", s)
	}
}

// TestFollow: what was followed costs the next pass nothing, and to follow writes and names nothing.
func TestFollow(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	store := &counting{Store: b.store}
	r := b.reconciler(func(c *uses.Config) { c.Store, c.Grace = store, 1 })
	follow := func() {
		t.Helper()
		size := b.journal.Size()
		if err := r.Follow(t.Context()); err != nil {
			t.Fatal(err)
		}
		if n := b.journal.Size() - size; n != 0 {
			t.Errorf("to follow wrote %d entries", n)
		}
	}
	store.rows = 0
	follow()
	if store.rows != 0 {
		t.Errorf("before the first pass %d rows were read", store.rows)
	}
	b.record(1)
	b.pass(r, false)
	lost := b.sign(2)
	for n := range 100 {
		b.record(10 + n)
	}
	store.rows = 0
	follow()
	if store.rows < 100 {
		t.Errorf("%d rows were read, want those of 100 entries", store.rows)
	}
	follow()
	store.rows = 0
	s := b.pass(r, false)
	if store.rows > 10 {
		t.Errorf("the pass read %d rows, which had been followed", store.rows)
	}
	if c := s.Slots["staff"]; c.Uses != 102 || c.Entries != 101 || c.Unaccounted != 1 || s.Alarms != 1 {
		t.Errorf("summary %+v", s)
	}
	if v := b.verify(); len(v.Named) != 1 || v.Named[0].Signature != fmt.Sprintf("%x", sm3.Sum(lost)) {
		t.Errorf("verify: %+v", v)
	}
}

// A signature that somebody made past the journal and then imported as another system's is still without an entry.
func TestImportedIsNoAccount(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.record(1)
	d := entry(b.sign(2))
	d.Kind = audit.KindImported
	b.append(d)
	r := b.reconciler(atOnce)
	b.pass(r, false)
	if s := b.pass(r, true); s.Alarms != 1 {
		t.Errorf("%d alarms, want one for the imported signature: %+v", s.Alarms, s)
	}
}

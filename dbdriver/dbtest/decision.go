package dbtest

import (
	"context"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"yinjian/appliance/account"
	"yinjian/appliance/audit"
	"yinjian/dbdriver"
	"yinjian/dbdriver/central"
)

// Decision is a decision by a node on a version of one object; intents are its node and a number.
func Decision(node string, version int64, intent int) account.Decision {
	return account.Decision{
		Kind: "signer", Object: "D001", Version: version, Node: node, Epoch: "0123456789abcdef",
		Intent: fmt.Sprintf("%s%060x", map[string]string{"east": "aaaa", "west": "bbbb"}[node], intent),
		Body:   strings.Repeat("cd", 32), At: time.UnixMicro(1_800_000_000_000_001).UTC(),
	}
}

// decisions: each version and each intent once, whoever asks, however often.
func decisions(t *testing.T, fresh func(testing.TB) *Database) {
	t.Parallel()
	d := fresh(t)
	s, ctx := d.Open(t), t.Context()
	latest := func(want int64) {
		t.Helper()
		if n, err := s.Latest(ctx, "signer", "D001"); n != want || err != nil {
			t.Errorf("Latest = %d, %v, want %d", n, err, want)
		}
	}
	decide := func(d account.Decision, want bool) {
		t.Helper()
		if won, err := s.Decide(ctx, d); won != want || err != nil {
			t.Errorf("Decide(%+v) = %v, %v, want %v", d, won, err, want)
		}
	}
	latest(0)
	for range 2 {
		decide(Decision("east", 1, 1), true)
		decide(Decision("west", 1, 1), false)
	}
	decide(Decision("west", 2, 2), true)
	other := Decision("east", 1, 3)
	other.Object = "d001" // another one: bytes are compared
	decide(other, true)
	latest(2)
	if got, err := s.Decisions(ctx, "signer", "D001", 0); err != nil || len(got) != 2 || got[0] != Decision("east", 1, 1) || got[1] != Decision("west", 2, 2) {
		t.Errorf("Decisions = %+v, %v", got, err)
	}
	if got, err := s.Decisions(ctx, "signer", "D001", 2); err != nil || len(got) != 0 {
		t.Errorf("Decisions after the last = %+v, %v", got, err)
	}
	if got, ok, err := s.Lookup(ctx, Decision("west", 0, 2)); !ok || err != nil || got != Decision("west", 2, 2) {
		t.Errorf("Lookup = %+v, %v, %v", got, ok, err)
	}
	// An intent that has no decision will never have one.
	for range 2 {
		if got, ok, err := s.Lookup(ctx, Decision("east", 0, 9)); ok || err != nil {
			t.Errorf("Lookup of nothing = %+v, %v, %v", got, ok, err)
		}
	}
	if won, err := s.Decide(ctx, Decision("east", 3, 9)); won || !errors.Is(err, dbdriver.ErrConflict) {
		t.Errorf("Decide with a spent intent = %v, %v", won, err)
	}
	if won, err := s.Decide(ctx, Decision("west", 3, 2)); won || !errors.Is(err, dbdriver.ErrConflict) {
		t.Errorf("Decide with another version's intent = %v, %v", won, err)
	}
	latest(2)
	versions := map[string]int64{}
	all, err := s.Versions(ctx)
	for _, d := range all {
		versions[d.Kind+" "+d.Object] = d.Version
	}
	if err != nil || len(all) != 2 || versions["signer D001"] != 2 || versions["signer d001"] != 1 {
		t.Errorf("Versions = %+v, %v", all, err)
	}
	// While rows are missing nobody decides.
	if err := s.Mark(ctx, audit.RebuildMark{Node: "west", By: "west", Phase: audit.Filling, At: 1}); err != nil {
		t.Fatal(err)
	}
	if n, err := s.Latest(ctx, "signer", "D001"); !errors.Is(err, dbdriver.ErrUnavailable) {
		t.Errorf("Latest during a rebuild = %d, %v", n, err)
	}
	if err := s.Unmark(ctx, "west"); err != nil {
		t.Fatal(err)
	}
	latest(2)

	// Two campuses at once: each version is one's.
	stores := map[string]*central.Store{"east": s, "west": d.Open(t)}
	stores["west"].SealWith("west", macKey, func(string) string { return "mac-1" })
	for version := int64(3); version < 23; version++ {
		var winners atomic.Int64
		var wg sync.WaitGroup
		for node, store := range stores {
			for i := range 2 {
				wg.Go(func() {
					for {
						won, err := store.Decide(ctx, Decision(node, version, int(version)*10+i))
						if errors.Is(err, dbdriver.ErrUnavailable) {
							continue // SQLite may answer that it is locked
						}
						if err != nil {
							t.Errorf("Decide beside another = %v", err)
						}
						if won {
							winners.Add(1)
						}
						return
					}
				})
			}
		}
		wg.Wait()
		if winners.Load() != 1 {
			t.Errorf("version %d has %d winners", version, winners.Load())
		}
	}
	latest(22)
}

// decisionFaults: whatever fails, and whether it landed or not, a decision is there or not, and the caller can find out.
func decisionFaults(t *testing.T, fresh func(testing.TB) *Database) {
	t.Parallel()
	var fault atomic.Pointer[func(Op) Fault]
	d := fresh(t)
	s := d.OpenWith(t, func(op Op) Fault {
		if f := fault.Load(); f != nil {
			return (*f)(op)
		}
		return Fault{}
	})
	plain := d.Open(t)
	plain.SealWith("west", macKey, func(string) string { return "mac-1" })
	version, intent := int64(0), 100
	for name, f := range map[string]Fault{
		"connection lost before": {Before: driver.ErrBadConn}, "answer lost, connection too": {After: driver.ErrBadConn},
		"answer lost": {After: io.ErrUnexpectedEOF}, "not done": {Before: io.ErrUnexpectedEOF}, "deadlock": {Before: Deadlock}, "switchover": {Before: Standby},
		"no answer": {Hang: true},
	} {
		for _, kind := range []string{"begin", "exec", "query", "commit"} {
			if kind == "begin" && f.After != nil {
				continue // the driver would keep a transaction that nobody has
			}
			for _, times := range []int64{1, 2, -1} {
				for _, taken := range []bool{false, true} {
					what := fmt.Sprintf("%s at %s, %d times, taken: %v", name, kind, times, taken)
					version++
					intent++
					if taken {
						if won, err := plain.Decide(t.Context(), Decision("west", version, intent)); !won || err != nil {
							t.Fatalf("%s: %v, %v", what, won, err)
						}
					}
					var left atomic.Int64
					left.Store(times)
					hit := func(op Op) Fault {
						if op.Kind != kind || times >= 0 && left.Add(-1) < 0 {
							return Fault{}
						}
						return f
					}
					fault.Store(&hit)
					limit := 5 * time.Second
					if f.Hang {
						limit = 20 * time.Millisecond
					}
					ctx, cancel := context.WithTimeout(t.Context(), limit)
					mine := Decision("east", version, intent)
					won, err := s.Decide(ctx, mine)
					cancel()
					fault.Store(nil)
					if err == nil && won == taken {
						t.Errorf("%s: won = %v", what, won)
					}
					found, ok, lerr := plain.Lookup(t.Context(), mine)
					if lerr != nil || ok && found != mine || err == nil && ok != won || taken && ok {
						t.Errorf("%s: Decide = %v, %v; Lookup = %+v, %v, %v", what, won, err, found, ok, lerr)
					}
					rows, err := plain.Decisions(t.Context(), "signer", "D001", version-1)
					if want := ok || taken; err != nil || len(rows) > 1 || (len(rows) == 1) != want {
						t.Errorf("%s: rows %+v, %v, want one: %v", what, rows, err, want)
					}
					if len(rows) == 0 { // the next version follows
						if won, err := plain.Decide(t.Context(), Decision("west", version, intent)); !won || err != nil {
							t.Errorf("%s: afterwards %v, %v", what, won, err)
						}
					}
				}
			}
		}
	}
}

// decisionLate: a transaction of a process that is gone, which the server has not finished, decides or does not; who asks
// for its intent hears what holds for ever.
func decisionLate(t *testing.T, fresh func(testing.TB) *Database) {
	t.Parallel()
	for name, commits := range map[string]bool{"commits": true, "rolled back": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := fresh(t)
			s := d.Open(t)
			gone := d.Pool(nil)
			defer gone.Close()
			tx, err := gone.BeginTx(t.Context(), nil)
			if err != nil {
				t.Fatal(err)
			}
			mine := Decision("east", 1, 1)
			insert := fmt.Sprintf(`INSERT INTO yj_decision (object_kind, object_id, version_no, node_id, epoch_id, intent_id, body_sm3, decided_at, created_by, created_at, modified_by, modified_at) VALUES ('%s', '%s', %d, '%s', '%s', '%s', '%s', %d, 'x', 1, 'x', 1)`,
				mine.Kind, mine.Object, mine.Version, mine.Node, mine.Epoch, mine.Intent, mine.Body, mine.At.UnixMicro())
			if _, err := tx.ExecContext(t.Context(), insert); err != nil {
				t.Fatal(err)
			}
			type answer struct {
				ok  bool
				err error
			}
			got := make(chan answer, 1)
			go func() {
				for {
					_, ok, err := s.Lookup(t.Context(), mine)
					if errors.Is(err, dbdriver.ErrUnavailable) {
						continue // SQLite may answer that it is locked
					}
					got <- answer{ok, err}
					return
				}
			}()
			select {
			case a := <-got:
				t.Fatalf("Lookup = %+v while the transaction is open", a)
			case <-time.After(20 * time.Millisecond):
			}
			if commits {
				err = tx.Commit()
			} else {
				err = tx.Rollback()
			}
			if err != nil {
				t.Fatal(err)
			}
			if a := <-got; a.err != nil || a.ok != commits {
				t.Errorf("Lookup = %+v, want %v", a, commits)
			}
			if won, err := s.Decide(t.Context(), mine); won != commits || (err == nil) != commits {
				t.Errorf("Decide afterwards = %v, %v", won, err)
			}
		})
	}
}

// duplicates: of two records with one id, at two campuses, the later is marked, whoever looks first, once.
func duplicates(t *testing.T, fresh func(testing.TB) *Database) {
	t.Parallel()
	d := fresh(t)
	s := d.Open(t)
	rows := map[string][]audit.ProjectedRow{}
	for _, node := range []string{"east", "west"} {
		for i := range uint64(100) {
			r := row("e", i)
			r.Node, r.SignedAt = node, int64(1000+i)
			switch {
			case i%10 == 0: // the same record at both; in the west it was signed later, but for one
				r.RecordID = fmt.Sprintf("%064x", i)
				if node == "west" {
					r.SignedAt += 500
				}
				if node == "west" && i == 50 {
					r.SignedAt = 1
				}
			case i%10 == 1: // of another kind: what has the same reference there is no record
				r.RecordID, r.Kind = fmt.Sprintf("%064x", i), "other"
			case i%10 == 2:
				r.RecordID = fmt.Sprintf("%s%063x", map[string]string{"east": "a", "west": "b"}[node], i)
			}
			rows[node] = append(rows[node], r)
		}
		if err := s.Apply(t.Context(), batch(rows[node]...)); err != nil {
			t.Fatal(err)
		}
	}
	if m, err := s.Archive(t.Context(), "east", "e", 0, 1051, 1000); err != nil || m.Rows != 51 { // the twin of a row may be archived
		t.Fatalf("%+v, %v", m, err)
	}
	records := func(node string) (out []audit.ProjectedRow) {
		for _, r := range rows[node] {
			if r.Kind == "sign.v1" {
				out = append(out, r)
			}
		}
		return out
	}
	// That the set's root was changed meanwhile does not mean that the row is marked.
	faulty := d.OpenWith(t, func(op Op) Fault {
		if op.Kind == "exec" && strings.Contains(op.Text, "yj_set_root") && strings.Contains(op.Text, "root_version") {
			return Fault{Before: dbdriver.ErrConflict}
		}
		return Fault{}
	})
	if err := faulty.MarkDuplicates(t.Context(), records("east")); !errors.Is(err, dbdriver.ErrConflict) {
		t.Errorf("a root that was changed meanwhile: %v, want %v", err, dbdriver.ErrConflict)
	}
	for range 2 {
		for _, node := range []string{"east", "west"} {
			if err := s.MarkDuplicates(t.Context(), records(node)); err != nil {
				t.Fatal(err)
			}
		}
		for _, node := range []string{"east", "west"} {
			for i := range uint64(100) {
				of, marked, err := s.DuplicateOf(t.Context(), central.Place{Node: node, Epoch: "e", Sequence: i})
				later := node == "west" && i != 50 || node == "east" && i == 50
				if err != nil || marked != (i%10 == 0 && later) || marked && (of.Node == node || of.Sequence != i) {
					t.Errorf("%s %d: %+v, %v, %v", node, i, of, marked, err)
				}
			}
		}
	}
}

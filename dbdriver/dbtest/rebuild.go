package dbtest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"yinjian/appliance/audit"
	"yinjian/dbdriver/central"
)

// rebuilding is what a rebuild by "east" is given.
func rebuilding(s *central.Store, journals ...audit.Source) audit.RebuildConfig {
	return audit.RebuildConfig{
		Projection: s, Journals: journals, By: "east", Now: func() int64 { return 7 }, MACs: Keys, Campuses: []string{"west"}, Progress: func(audit.RebuildProgress) {},
		Tables: []audit.Table{audit.Records{Projection: s, MAC: macKey, KeyID: func(string) string { return "mac-1" }, By: "east", Log: Quiet()}, central.Marks{Store: s, Now: func() int64 { return 7 }}},
	}
}

// rowTexts are all rows of a node, as text.
func rowTexts(t testing.TB, s *central.Store, node string) (out []string) {
	t.Helper()
	epochs, err := s.Epochs(t.Context(), node)
	for i := 0; i < len(epochs) && err == nil; i++ {
		err = s.Rows(t.Context(), node, epochs[i], 0, func(r audit.ProjectedRow) error { out = append(out, fmt.Sprintf("%+v", r)); return nil })
	}
	if err != nil {
		t.Fatal(err)
	}
	if epochs, err = s.ChangeEpochs(t.Context(), node); err != nil {
		t.Fatal(err)
	}
	for _, epoch := range epochs {
		if err := s.Changes(t.Context(), node, epoch, 0, func(c audit.ProjectedChange) error { out = append(out, fmt.Sprintf("%+v", c)); return nil }); err != nil {
			t.Fatal(err)
		}
	}
	roots, err := s.Roots(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range roots {
		if right, err := r.Sealed(t.Context(), macKey); r.Node == node && (r.Count > 0 || r.Set != central.DuplicateSet) {
			out = append(out, fmt.Sprintf("%d changes, %s, %v, %v", r.Count, r.Sum, right, err))
		}
	}
	return out
}

// enrol writes n changes of state.
func enrol(t testing.TB, j *audit.Journal, n int) {
	t.Helper()
	for i := range n {
		if _, err := j.Append(t.Context(), audit.Draft{Kind: "account.signer", Actor: "admin", Object: fmt.Sprintf("staff-%d", i), State: true}); err != nil {
			t.Fatal(err)
		}
	}
}

// rebuild: whatever the database has become, it is made again as it was; other nodes' rows are not touched.
func rebuild(t *testing.T, fresh func(testing.TB) *Database) {
	t.Parallel()
	dir := t.TempDir()
	j, stop := Journal(t, dir, false)
	Append(t, j, 0, 90)
	stop()
	j, _ = Journal(t, dir, true)
	enrol(t, j, 5)
	Append(t, j, 200, 60)
	west, _ := JournalOf(t, t.TempDir(), "west", false, time.Date(2026, 3, 1, 8, 0, 0, 0, time.UTC))
	Append(t, west, 0, 30)
	d := fresh(t)
	s := d.Open(t)
	Ship(t, j, s, CaughtUp)
	Ship(t, west, s, CaughtUp)
	east, other := rowTexts(t, s, "east"), rowTexts(t, s, "west")
	for what, statements := range map[string][]string{
		"whole": nil,
		"marks added": {
			`INSERT INTO yj_duplicate (node_id, epoch_id, seq_no, record_id, of_node, of_epoch, of_seq, created_by, created_at, modified_by, modified_at) SELECT node_id, epoch_id, seq_no, record_id, 'west', epoch_id, 1, 'x', 1, 'x', 1 FROM yj_record WHERE node_id = 'east' AND seq_no = 100`,
		},
		"rows gone":       {`DELETE FROM yj_record WHERE node_id = 'east' AND seq_no >= 10 AND seq_no < 40`},
		"everything gone": {`DELETE FROM yj_record WHERE node_id = 'east'`, `DELETE FROM yj_batch WHERE node_id = 'east'`},
		"changes gone":    {`DELETE FROM yj_change WHERE node_id = 'east' AND change_no > 2`},
		"a change added":  {`UPDATE yj_change SET epoch_id = 'eeee' WHERE node_id = 'east' AND change_no = 3`, `UPDATE yj_set_root SET entry_count = 1 WHERE node_id = 'east'`},
		"batches gone":    {`DELETE FROM yj_batch WHERE node_id = 'east' AND first_seq >= 20`},
		"rows changed":    {`UPDATE yj_record SET leaf_hash = '00', signer_id = 'x' WHERE node_id = 'east' AND seq_no = 100`},
		"rows added": {
			`UPDATE yj_record SET seq_no = 9223372036854775807 WHERE node_id = 'east' AND seq_no = 50`,
			`UPDATE yj_record SET seq_no = -9223372036854775807 WHERE node_id = 'east' AND seq_no = 51`,
			`UPDATE yj_record SET epoch_id = 'ffff' WHERE node_id = 'east' AND seq_no = 52`,
			`UPDATE yj_batch SET first_seq = 9223372036854775806 WHERE node_id = 'east' AND first_seq = 0`,
		},
	} {
		for _, statement := range statements {
			d.Exec(t, statement)
		}
		want := uint64(0)
		if what == "rows added" {
			want = 2 // the one of a negative number is no entry that ever was
		}
		if n, err := audit.Beyond(t.Context(), j, s); n != want || err != nil {
			t.Errorf("%s: %d rows beyond the journal, %v", what, n, err)
		}
		if slices.Equal(rowTexts(t, s, "east"), east) && len(statements) > 1 {
			t.Errorf("%s: nothing was changed", what)
		}
		reports, err := audit.Rebuild(t.Context(), rebuilding(s, j))
		if err != nil || len(reports) != 1 {
			t.Fatalf("%s: %v, %+v", what, err, reports[0].Differences)
		}
		if _, marked, err := s.DuplicateOf(t.Context(), central.Place{Node: "east", Epoch: j.Epoch().String(), Sequence: 100}); marked || err != nil {
			t.Errorf("%s: a mark that nobody made is left, %v", what, err)
		}
		if r := compareBoth(t, j, s); !r.OK() || r.Rows != j.Size() {
			t.Errorf("%s: compare = %+v", what, r)
		}
		cfg := sweepConfig(j, s)
		cfg.Campuses, cfg.Sets = []string{"west"}, append(cfg.Sets, s.MarksOf()) // of which there are none
		if r := sweep(t, cfg); !r.OK() {
			t.Errorf("%s: sweep = %+v", what, r)
		}
		if got := rowTexts(t, s, "east"); !slices.Equal(got, east) {
			t.Errorf("%s: the rows differ from what they were: %v", what, got)
		}
		if got := rowTexts(t, s, "west"); !slices.Equal(got, other) {
			t.Errorf("%s: another node's rows were touched", what)
		}
	}
	// Both nodes' rows from both journals, and one without a journal goes.
	d.Exec(t, `UPDATE yj_record SET node_id = 'ghost' WHERE node_id = 'west'`)
	cfg := rebuilding(s, j, west)
	cfg.Remove = []string{"ghost"}
	if _, err := audit.Rebuild(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	if nodes, err := s.Nodes(t.Context()); err != nil || !slices.Equal(nodes, []string{"east", "west"}) || !slices.Equal(rowTexts(t, s, "west"), other) {
		t.Errorf("nodes = %v, %v", nodes, err)
	}
}

func compareBoth(t testing.TB, j *audit.Journal, s *central.Store) *audit.CompareReport {
	t.Helper()
	r, err := audit.Compare(t.Context(), j, s, Keys, "west")
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// rebuildStopped: a rebuild that is stopped before or after any change leaves a database that does not look whole, and
// goes on.
func rebuildStopped(t *testing.T, fresh func(testing.TB) *Database) {
	t.Parallel()
	j, _ := Journal(t, t.TempDir(), false)
	Append(t, j, 0, 40)
	d := fresh(t)
	var at, seen atomic.Int64 // the change that the process does not survive, 0: none; and the last one
	var lost atomic.Bool      // it was done
	var end atomic.Pointer[context.CancelFunc]
	s := d.OpenWith(t, func(op Op) Fault {
		seen.Store(max(seen.Load(), op.N))
		switch stop := at.Load(); {
		case stop == 0:
			return Fault{}
		case op.N == stop && lost.Load():
			time.AfterFunc(20*time.Millisecond, *end.Load())
			return Fault{After: io.ErrUnexpectedEOF}
		case op.N == 0 || op.N < stop:
			return Fault{}
		case op.N > stop:
			(*end.Load())()
		}
		return Fault{Before: io.ErrUnexpectedEOF}
	})
	Ship(t, j, s, CaughtUp)
	want := rowTexts(t, s, "east")
	first := seen.Load()
	if _, err := audit.Rebuild(t.Context(), rebuilding(s, j)); err != nil {
		t.Fatal(err)
	}
	changes := seen.Load() - first
	if changes < 8 {
		t.Fatalf("%d changes", changes)
	}
	for n := int64(1); n <= changes; n++ {
		for _, done := range []bool{false, true} {
			lost.Store(done)
			ctx, cancel := context.WithCancel(t.Context())
			end.Store(&cancel)
			at.Store(seen.Load() + n)
			_, err := audit.Rebuild(ctx, rebuilding(s, j))
			cancel()
			at.Store(0)
			if err == nil {
				continue // the last answer was lost, and had said that it was whole
			}
			r := Compare(t, j, s)
			if n > 3 && n < changes && r.OK() { // before that it is being marked
				t.Errorf("stopped at change %d of %d (done: %v), and it looks whole", n, changes, done)
			}
			if _, err := audit.Rebuild(t.Context(), rebuilding(s, j)); err != nil {
				t.Fatalf("after a stop at %d: %v", n, err)
			}
			if r := Compare(t, j, s); !r.OK() || !slices.Equal(rowTexts(t, s, "east"), want) {
				t.Errorf("after a stop at %d: %+v", n, r)
			}
		}
	}
}

// rebuiltElsewhere: while another appliance makes a node's rows anew, its own does not write them; and rows that are
// taken away under a shipper are shipped again.
func rebuiltElsewhere(t *testing.T, fresh func(testing.TB) *Database) {
	t.Parallel()
	j, _ := Journal(t, t.TempDir(), false)
	Append(t, j, 0, 40)
	d := fresh(t)
	s := d.Open(t)
	sh := StartShipper(t, j, s, nil)
	sh.Wait(t, CaughtUp)
	if err := s.Mark(t.Context(), audit.RebuildMark{Node: "east", By: "west", Phase: audit.Emptying, At: 7}); err != nil {
		t.Fatal(err)
	}
	d.Exec(t, `DELETE FROM yj_record WHERE seq_no >= 20`)
	d.Exec(t, `DELETE FROM yj_batch WHERE last_seq >= 20`)
	d.Exec(t, `DELETE FROM yj_record WHERE seq_no >= 16`)
	Append(t, j, 100, 5)
	if st := sh.Wait(t, func(s audit.ShipperStatus) bool { return errors.Is(s.LastError, audit.ErrRebuilding) }); st.Fork {
		t.Errorf("status = %+v", st)
	}
	if err := s.Unmark(t.Context(), "east"); err != nil {
		t.Fatal(err)
	}
	sh.Wait(t, CaughtUp)
	same(t, j, s)
}

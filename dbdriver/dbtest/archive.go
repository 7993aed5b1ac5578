package dbtest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"yinjian/appliance/audit"
	"yinjian/dbdriver"
	"yinjian/dbdriver/central"
)

const always = 1 << 62 // µs: later than all

// Of who administers the database: rows of one of the two tables are put into the other, too.
const (
	allOfRecord = `node_id, epoch_id, seq_no, leaf_hash, record_id, kind_name, application_id, signer_id, department_name, document_type, campus_name, signed_at_us, bound_us, status_code, created_by, created_at, modified_by, modified_at`
	allOfBatch  = `node_id, epoch_id, first_seq, last_seq, batch_mac, mac_key_id, created_by, created_at, modified_by, modified_at`
	copyRecords = `INSERT INTO yj_record%s (` + allOfRecord + `) SELECT ` + allOfRecord + ` FROM yj_record%s`
)

// archiveAll moves what a journal's node has from before a time, in steps of a few rows.
func archiveAll(ctx context.Context, j *audit.Journal, s *central.Store, before int64) (rows uint64, err error) {
	spans, err := j.Epochs(ctx)
	for i := 0; i < len(spans) && err == nil; i++ {
		m := central.Moved{More: true}
		for err == nil && m.More {
			m, err = s.Archive(ctx, j.Node(), spans[i].Epoch.String(), m.Next, before, 7)
			rows += m.Rows
		}
	}
	return rows, err
}

// outside is all that readers are told of the database, by text.
func outside(t *testing.T, j *audit.Journal, s *central.Store) []string {
	t.Helper()
	r, err := audit.Compare(t.Context(), j, s, Keys, "west")
	if err != nil {
		t.Fatal(err)
	}
	cfg := sweepConfig(j, s)
	cfg.Campuses = []string{"west"}
	out := append(rowTexts(t, s, j.Node()), fmt.Sprintf("%+v", r), fmt.Sprintf("%+v", sweep(t, cfg)))
	var groups []string
	err = s.CountRecords(t.Context(), "sign.v1", 0, always, func(g central.RecordGroup, n uint64) { groups = append(groups, fmt.Sprint(g, n)) })
	nodes, err2 := s.Nodes(t.Context())
	epochs, err3 := s.Epochs(t.Context(), j.Node())
	if err = errors.Join(err, err2, err3); err != nil || !r.OK() || len(groups) == 0 {
		t.Fatalf("%v, %v, %+v", err, groups, r)
	}
	slices.Sort(groups)
	for by, q := range []central.RecordQuery{{}, {Signer: "staff-3"}, {RecordID: record(3)}} { // rows of all nodes, page by page
		q.Before, q.Most = always, 10
		for place := (*central.RecordPlace)(nil); ; {
			q.After = place
			page, err := s.SearchRecords(t.Context(), q)
			if err != nil {
				t.Fatal(err)
			}
			for _, r := range page {
				groups = append(groups, fmt.Sprintf("search %d: %+v", by, r))
				place = &central.RecordPlace{SignedAt: r.SignedAt, Node: r.Node, Epoch: r.Epoch, Sequence: int64(r.Sequence)}
			}
			if len(page) < q.Most {
				break
			}
		}
	}
	return append(append(out, groups...), fmt.Sprint(nodes, epochs))
}

// unlike is where one differs from another, "" if it does not.
func unlike(got, want []string) string {
	for i, line := range got {
		if i >= len(want) || line != want[i] {
			return fmt.Sprintf("line %d of %d: %s\nwant line of %d: %s", i, len(got), line, len(want), append(want[min(i, len(want)):], "none")[0])
		}
	}
	if len(got) < len(want) {
		return "less: " + want[len(got)]
	}
	return ""
}

// archived: rows of before lie in the archive, and nobody who reads finds a difference; nothing comes back twice.
func archived(t *testing.T, fresh func(testing.TB) *Database) {
	t.Parallel()
	d := fresh(t)
	s := d.Open(t)
	dir := t.TempDir()
	j, stop := Journal(t, dir, false)
	Append(t, j, 0, 40)
	Ship(t, j, s, CaughtUp)
	stop()
	j, _ = Journal(t, dir, true)
	enrol(t, j, 5)
	Append(t, j, 200, 60)
	west, _ := JournalOf(t, t.TempDir(), "west", false, time.Date(2026, 3, 1, 8, 0, 0, 0, time.UTC))
	Append(t, west, 0, 30)
	Ship(t, j, s, CaughtUp)
	Ship(t, west, s, CaughtUp)
	db := d.Pool(nil)
	defer db.Close()
	lie := func(inUse, inArchive uint64) {
		t.Helper()
		now, err := s.CountInUse(t.Context(), "east", 0, always)
		var all [2]uint64
		for i, table := range []string{"yj_record", "yj_record_archive"} {
			err = errors.Join(err, db.QueryRowContext(t.Context(), `SELECT COUNT(*) FROM `+table+` WHERE node_id = 'east'`).Scan(&all[i]))
		}
		if err != nil || now != inUse || all != [2]uint64{inUse, inArchive} {
			t.Errorf("%d in use, by the tables %v, %v, want %d and %d", now, all, err, inUse, inArchive)
		}
		sizes, err := s.CountRows(t.Context())
		if n, told := sizes["yj_record_archive"]; err != nil || !told || n != int64(inArchive) || (sizes["yj_batch_archive"] > 0) != (inArchive > 0) {
			t.Errorf("sizes of tables: %v, %v, want %d rows in the archive", sizes, err, inArchive)
		}
	}
	want := outside(t, j, s)
	same := func(what string) {
		t.Helper()
		if got := unlike(outside(t, j, s), want); got != "" {
			t.Errorf("%s: readers are told %s", what, got)
		}
	}
	size := j.Size()
	lie(size, 0)
	const in = 45 // a change in the middle of a batch of the second epoch
	boundary, err := j.Entry(t.Context(), in)
	if err != nil {
		t.Fatal(err)
	}
	for _, moved := range []uint64{in, 0} {
		if n, err := archiveAll(t.Context(), j, s, boundary.Entry.Time.Micros); n != moved || err != nil {
			t.Fatalf("%d rows were moved, %v, want %d", n, err, moved)
		}
		lie(size-in, in)
		same("a part")
	}
	if leaf, err := s.Leaf(t.Context(), "east", boundary.Epoch.String(), in-1); err != nil || leaf == "" {
		t.Errorf("a leaf of the archive: %q, %v", leaf, err)
	}
	// What is sent again from the beginning is there already; another history is a fork there, too.
	replay := StartShipper(t, j, &fromTheStart{Store: s}, nil)
	if st := replay.Wait(t, func(s audit.ShipperStatus) bool { return CaughtUp(s) || s.Fork }); st.Fork {
		t.Errorf("sent again: %+v", st)
	}
	replay.Stop()
	lie(size-in, in)
	same("sent again")
	first, err := j.Entry(t.Context(), 3)
	if err != nil {
		t.Fatal(err)
	}
	other := audit.Project(first)
	other.LeafHash = strings.Repeat("00", 32)
	if err := s.Apply(t.Context(), batch(other)); !errors.Is(err, audit.ErrFork) {
		t.Errorf("another leaf under an archived key: %v, want %v", err, audit.ErrFork)
	}
	// All of it, and what comes then follows.
	if n, err := archiveAll(t.Context(), j, s, always); n != size-in || err != nil {
		t.Fatalf("%d rows were moved, %v", n, err)
	}
	lie(0, size)
	same("all")
	Append(t, j, 500, 20)
	Ship(t, j, s, CaughtUp)
	lie(20, size)
	rows := rowTexts(t, s, "east")
	for range 2 { // a rebuild takes both tables' rows, and what it made can be moved again
		if _, err := audit.Rebuild(t.Context(), rebuilding(s, j)); err != nil {
			t.Fatal(err)
		}
		lie(size+20, 0)
		if got := unlike(rowTexts(t, s, "east"), rows); got != "" {
			t.Errorf("rebuilt: %s", got)
		}
		want = outside(t, j, s) // the batches are others now
		if _, err := archiveAll(t.Context(), j, s, boundary.Entry.Time.Micros); err != nil {
			t.Fatal(err)
		}
		lie(size+20-in, in)
		same("archived again")
	}
	// While somebody makes the rows anew nothing is moved, nor where the archive has the row already.
	if err := s.Mark(t.Context(), audit.RebuildMark{Node: "east", By: "west", Phase: audit.Filling, At: 7}); err != nil {
		t.Fatal(err)
	}
	if n, err := archiveAll(t.Context(), j, s, always); n != 0 || !errors.Is(err, audit.ErrRebuilding) {
		t.Errorf("during a rebuild: %d, %v", n, err)
	}
	if err := s.Unmark(t.Context(), "east"); err != nil {
		t.Fatal(err)
	}
	d.Exec(t, fmt.Sprintf(copyRecords, "_archive", "")+` WHERE node_id = 'east' AND seq_no = 50`)
	if n, err := archiveAll(t.Context(), j, s, always); n != 0 || !errors.Is(err, dbdriver.ErrConflict) {
		t.Errorf("a row that is there already: %d, %v", n, err)
	}
	lie(size+20-in, in+1)
}

// archiveTimeless: rows of before the clock had a time do not keep those after them from being moved, however many they are.
func archiveTimeless(t *testing.T, fresh func(testing.TB) *Database) {
	t.Parallel()
	d := fresh(t)
	s := d.Open(t)
	j, _ := Journal(t, t.TempDir(), false)
	const timeless, rows, before = 23, 30, 1000
	all := make([]audit.ProjectedRow, rows)
	for i := range all {
		all[i] = row(j.Epoch().String(), uint64(i))
		if i < timeless {
			all[i].SignedAt = 0
		}
	}
	all[rows-1].SignedAt = before
	if err := s.Apply(t.Context(), batch(all...)); err != nil {
		t.Fatal(err)
	}
	if n, err := archiveAll(t.Context(), j, s, before); n < rows-1-timeless || n >= rows || err != nil {
		t.Errorf("%d rows were moved, %v", n, err)
	}
	if n, err := s.CountInUse(t.Context(), "east", 1, always); n != 1 || err != nil {
		t.Errorf("%d rows with a time are in use, %v, want one", n, err)
	}
	if n, err := archiveAll(t.Context(), j, s, before); n != 0 || err != nil {
		t.Errorf("the second time %d rows were moved, %v", n, err)
	}
}

// fromTheStart says that it has nothing, as long as nothing was sent.
type fromTheStart struct {
	*central.Store
	begun atomic.Bool
}

func (f *fromTheStart) Shipped(ctx context.Context, node, epoch string) (uint64, error) {
	if !f.begun.Load() {
		return 0, audit.ErrNotFound
	}
	return f.Store.Shipped(ctx, node, epoch)
}

func (f *fromTheStart) Apply(ctx context.Context, b audit.ProjectedBatch) error {
	f.begun.Store(true)
	return f.Store.Apply(ctx, b)
}

// archiveStopped: a stop before or after any statement of a move leaves each row in one of the tables, and the same call
// goes on.
func archiveStopped(t *testing.T, fresh func(testing.TB) *Database) {
	t.Parallel()
	j, _ := Journal(t, t.TempDir(), false)
	Append(t, j, 0, 40)
	d := fresh(t)
	var at, seen atomic.Int64 // the change that the process does not survive, 0: none; and the last one
	var lost atomic.Bool      // it was done
	s := d.OpenWith(t, func(op Op) Fault {
		seen.Store(max(seen.Load(), op.N))
		switch stop := at.Load(); {
		case stop == 0 || op.N < stop && seen.Load() < stop:
			return Fault{}
		case op.N == stop && lost.Load():
			return Fault{After: io.ErrUnexpectedEOF}
		}
		return Fault{Before: io.ErrUnexpectedEOF}
	})
	if _, err := audit.Rebuild(t.Context(), rebuilding(s, j)); err != nil { // in one batch
		t.Fatal(err)
	}
	want := outside(t, j, s)
	first := seen.Load()
	if _, err := archiveAll(t.Context(), j, s, always); err != nil {
		t.Fatal(err)
	}
	changes := seen.Load() - first
	if changes < 5*6 { // six steps of 7 rows, each of four statements and a commit
		t.Fatalf("%d changes", changes)
	}
	for n := int64(1); n <= 10; n++ {
		for _, done := range []bool{false, true} {
			if _, err := audit.Rebuild(t.Context(), rebuilding(s, j)); err != nil {
				t.Fatal(err)
			}
			lost.Store(done)
			at.Store(seen.Load() + n)
			if _, err := archiveAll(t.Context(), j, s, always); err == nil {
				t.Errorf("stopped at change %d (done: %v): no error", n, done)
			}
			at.Store(0)
			if got := unlike(outside(t, j, s), want); got != "" {
				t.Errorf("stopped at change %d (done: %v): readers are told %s", n, done, got)
			}
			now, err := s.CountInUse(t.Context(), "east", 0, always)
			if err != nil {
				t.Fatal(err)
			}
			if moved, err := archiveAll(t.Context(), j, s, always); moved != now || err != nil {
				t.Errorf("after a stop at %d: %d rows moved, %v, want %d", n, moved, err, now)
			}
			if got := unlike(outside(t, j, s), want); got != "" {
				t.Errorf("gone on with after a stop at %d: readers are told %s", n, got)
			}
		}
	}
}

// archiveBeside: who reads while rows are moved finds each once.
func archiveBeside(t *testing.T, fresh func(testing.TB) *Database) {
	t.Parallel()
	j, _ := Journal(t, t.TempDir(), false)
	Append(t, j, 0, 1200) // more than two pages
	d := fresh(t)
	s, mover := d.Open(t), d.Open(t)
	Ship(t, j, s, CaughtUp)
	var moving sync.WaitGroup
	var moved atomic.Bool
	moving.Go(func() {
		defer moved.Store(true)
		for from := uint64(0); from < j.Size(); {
			m, err := mover.Archive(context.Background(), "east", j.Epoch().String(), from, always, 40)
			if errors.Is(err, dbdriver.ErrUnavailable) {
				continue // SQLite may answer that it is locked
			} else if err != nil || !m.More {
				t.Errorf("at %d: %+v, %v", from, m, err)
				return
			}
			from = m.Next
		}
	})
	for read := 0; read < 3 || !moved.Load(); read++ {
		if r := Compare(t, j, s); !r.OK() || r.Rows != j.Size() {
			t.Fatalf("compare while rows are moved: %d rows of %d, %+v", r.Rows, j.Size(), r.Differences)
		}
		var n uint64
		if err := s.CountRecords(t.Context(), "sign.v1", 0, always, func(_ central.RecordGroup, of uint64) { n += of }); err != nil || n != 1200 {
			t.Fatalf("%d records are counted, %v", n, err)
		}
	}
	moving.Wait()
}

// archiveLate: rows that one writer is about to insert when another has inserted them and they were moved stand in one
// table, whatever the server's own isolation is; so does their batch.
func archiveLate(t *testing.T, fresh func(testing.TB) *Database) {
	t.Parallel()
	const epoch = "0000000000000001"
	for _, isolation := range []string{"read committed", "repeatable read"} {
		for _, table := range []string{"yj_record", "yj_batch"} {
			d := fresh(t)
			if d.Seam().Name == "postgres" {
				d.Make(t, "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET default_transaction_isolation = ''"+isolation+"''', current_database()); END $$")
			} else if isolation == "repeatable read" {
				continue
			}
			b := batch(row(epoch, 0), row(epoch, 1), row(epoch, 2))
			other := d.Open(t)
			if table == "yj_batch" { // the rows are there, as only some other program leaves them
				if err := other.Apply(t.Context(), b); err != nil {
					t.Fatal(err)
				}
				d.Exec(t, `DELETE FROM yj_batch`)
			}
			var meanwhile sync.Once
			late := d.OpenWith(t, func(op Op) Fault {
				if op.Kind == "exec" && strings.HasPrefix(op.Text, "INSERT INTO "+table+" ") {
					meanwhile.Do(func() {
						err := other.Apply(context.Background(), b)
						if err == nil {
							_, err = other.Archive(context.Background(), "east", epoch, 0, always, 100)
						}
						if err != nil && !errors.Is(err, dbdriver.ErrUnavailable) { // SQLite has one writer at a time
							t.Errorf("the other writer: %v", err)
						}
					})
				}
				return Fault{}
			})
			for try := range 2 { // as the shipper does
				if err := late.Apply(t.Context(), b); err != nil && (try > 0 || !errors.Is(err, dbdriver.ErrConflict)) {
					t.Errorf("%s, %s, try %d: %v", table, isolation, try, err)
				}
			}
			var rows, batches int
			db := d.Pool(nil)
			err := db.QueryRowContext(t.Context(), `SELECT (SELECT COUNT(*) FROM yj_record) + (SELECT COUNT(*) FROM yj_record_archive), (SELECT COUNT(*) FROM yj_batch) + (SELECT COUNT(*) FROM yj_batch_archive)`).Scan(&rows, &batches)
			if err = errors.Join(err, db.Close()); err != nil || rows != len(b.Rows) || batches != 1 {
				t.Errorf("%s, %s: %d rows and %d batches in both tables, %v", table, isolation, rows, batches, err)
			}
		}
	}
}

// archiveTampered: what somebody does to the archive is named as it is in the tables in use.
func archiveTampered(t *testing.T, fresh func(testing.TB) *Database) {
	t.Parallel()
	both := []string{"yj_record_archive", "yj_batch_archive"}
	copied := fmt.Sprintf(copyRecords, "", "_archive") + ` WHERE seq_no = 5`
	for name, c := range map[string]struct {
		statements, restore, want []string
	}{
		"a column":                  {statements: []string{`UPDATE yj_record_archive SET signer_id = 'x' WHERE seq_no = 5`}, want: []string{"batch-mac-wrong 0-15 ", "row-changed 5-5 signer_id"}},
		"a row removed":             {statements: []string{`DELETE FROM yj_record_archive WHERE seq_no = 5`}, want: []string{"batch-mac-wrong 0-15 ", "row-missing 5-5 "}},
		"a batch removed":           {statements: []string{`DELETE FROM yj_batch_archive WHERE first_seq = 16`}, want: []string{"batch-missing 16-31 "}},
		"of a batch in two tables":  {statements: []string{`UPDATE yj_record_archive SET status_code = 'test' WHERE seq_no = 33`}, want: []string{"batch-mac-wrong 32-47 ", "row-changed 33-33 status_code"}},
		"and its part in use":       {statements: []string{`UPDATE yj_record SET status_code = 'test' WHERE seq_no = 45`}, want: []string{"batch-mac-wrong 32-47 ", "row-changed 45-45 status_code"}},
		"a row in both":             {statements: []string{copied}, want: []string{"batch-mac-wrong 0-15 ", "row-added 5-5 "}},
		"a batch in both":           {statements: []string{`INSERT INTO yj_batch (` + allOfBatch + `) SELECT ` + allOfBatch + ` FROM yj_batch_archive WHERE first_seq = 16`}, want: []string{"batch-mac-wrong 16-31 "}},
		"back to the tables in use": {statements: []string{copied, `DELETE FROM yj_record_archive WHERE seq_no = 5`}}, // nothing is lost
		"a row far away":            {statements: []string{`UPDATE yj_record_archive SET seq_no = 4611686018427387904 WHERE seq_no = 5`}, want: []string{"batch-mac-wrong 0-15 ", "batch-missing 61-4611686018427387904 ", "row-missing 5-5 ", "row-added 4611686018427387904-4611686018427387904 "}},
		"another node's":            {statements: []string{`UPDATE yj_batch_archive SET node_id = 'evil' WHERE first_seq = 16`}, want: []string{"batch-missing 16-31 ", "row-foreign 16-31 "}},
		"an older archive":          {restore: both, want: []string{"batch-mac-wrong 16-31 ", "row-missing 20-20 ", "row-missing 21-21 ", "row-missing 22-22 ", "row-missing 23-23 ", "row-missing 24-24 ", "row-missing 25-25 ", "row-missing 26-26 ", "row-missing 27-27 ", "row-missing 28-28 ", "row-missing 29-29 ", "row-missing 30-30 ", "row-missing 31-31 ", "batch-missing 32-47 ", "row-missing 32-32 ", "row-missing 33-33 ", "row-missing 34-34 ", "row-missing 35-35 ", "row-missing 36-36 ", "row-missing 37-37 ", "row-missing 38-38 ", "row-missing 39-39 "}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := fresh(t)
			s := d.Open(t)
			j, _ := Journal(t, t.TempDir(), false)
			Append(t, j, 0, 60)
			Ship(t, j, s, CaughtUp)
			step := func(from uint64, rows int) {
				t.Helper()
				if _, err := s.Archive(t.Context(), "east", j.Epoch().String(), from, always, rows); err != nil {
					t.Fatal(err)
				}
			}
			step(0, 20)
			for _, table := range c.restore {
				d.Make(t, keep(table))
			}
			step(20, 20) // to the middle of a batch
			cfg := sweepConfig(j, s)
			before := sweep(t, cfg)
			if !before.OK() {
				t.Fatalf("before anything: %+v", before)
			}
			cfg.Known = before.Seen
			d.touch(t, c.restore, c.statements)
			var got []string
			for _, f := range sweep(t, cfg).Differences {
				got = append(got, fmt.Sprintf("%s %d-%d %s", f.Kind, f.Sequence, f.Through, f.Column))
			}
			slices.Sort(got)
			slices.Sort(c.want)
			if !slices.Equal(got, c.want) {
				t.Errorf("differences:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(c.want, "\n"))
			}
			if r := Compare(t, j, s); r.OK() != (len(c.want) == 0) {
				t.Errorf("compare: %+v", r.Differences)
			}
		})
	}
}

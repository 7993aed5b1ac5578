package sqlite_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"yinjian/appliance/audit"
	"yinjian/dbdriver/sqlite"
)

// exported copies a journal as a backup does. pace is called with what was asked for so far.
func exported(t *testing.T, dir, to string, after int, pace func() error, pinned func()) (sqlite.Exported, []int, error) {
	t.Helper()
	if err := os.MkdirAll(to, 0o700); err != nil {
		t.Fatal(err)
	}
	var numbers []int
	e, err := sqlite.Export(t.Context(), sqlite.ExportConfig{
		Dir: dir, After: after, Scratch: t.TempDir(), Pace: func(int) error { return pace() },
		Pinned: func() error { pinned(); return nil },
		Segment: func(number int, sealed bool, size int64, r io.Reader) error {
			numbers = append(numbers, number)
			f, err := os.Create(filepath.Join(to, "journal-"+fmt.Sprintf("%06d.db", number)))
			if err != nil {
				return err
			}
			n, err := io.Copy(f, r)
			if n != size {
				t.Errorf("segment %d: %d bytes, announced %d", number, n, size)
			}
			return errors.Join(err, f.Close())
		},
	})
	return e, numbers, err
}

func nothing()      {}
func noWait() error { return nil }

// parallel appends n entries from number from on, several at once.
func parallel(t *testing.T, j *audit.Journal, from, n int) {
	t.Helper()
	var g sync.WaitGroup
	for k := range 64 {
		g.Go(func() {
			for i := from + k; i < from+n; i += 64 {
				if _, err := j.Append(context.Background(), signDraft(i)); err != nil {
					t.Errorf("Append: %v", err)
					return
				}
			}
		})
	}
	g.Wait()
}

// A copy that is made while the journal grows, and rolls, is the journal as it was when its last segment was fixed: what
// is written between two steps is not in it, and does not begin it anew. The next copy has the segments that are not
// sealed in the one before, and those after them.
func TestExportWhileWritten(t *testing.T) {
	t.Parallel()
	dir, to := filepath.Join(t.TempDir(), "journal"), t.TempDir()
	key := newLogKey(t)
	store := openStore(t, dir, func(c *sqlite.JournalConfig) { c.SegmentEntries = 4000 })
	j := start(t, store, func(c *audit.Config) { c.Checkpointer = key })
	parallel(t, j.Journal, 0, 4000+3800)
	next, atPin, paced := 10_000, uint64(0), 0
	e, numbers, err := exported(t, dir, to, 0, func() error {
		if paced++; paced%8 == 0 {
			appendN(t, j.Journal, next, 3)
			next += 3
		}
		return nil
	}, func() { atPin = j.Size(); appendN(t, j.Journal, next, 5); next += 5 })
	if err != nil {
		t.Fatal(err)
	}
	if n := len(numbers); n < 2 || numbers[n-1] != e.Segments || e.Through != e.Segments-1 || e.Entries != atPin || paced < 6 {
		t.Errorf("segments %v, %+v, pinned at %d, %d waits", numbers, e, atPin, paced)
	}
	report := verify(t, to, audit.Options{LogKey: key.Public()})
	if !report.OK() || report.Entries != e.Entries || report.Segments != e.Segments {
		t.Errorf("the copy: %d entries, %v", report.Entries, report.Findings)
	}
	root, err := j.Root(t.Context(), e.Entries)
	if err != nil || root.String() != report.Root {
		t.Errorf("the copy's root is %s, the journal's %v, %v", report.Root, root, err)
	}

	// What has come since: the last segment again, which is sealed now, and the next.
	parallel(t, j.Journal, 20_000, 4000)
	e2, numbers, err := exported(t, dir, to, e.Through, noWait, nothing)
	if err != nil || len(numbers) != 2 || numbers[0] != e.Segments || e2.Through != e.Segments || e2.Segments != e.Segments+1 {
		t.Fatalf("segments %v, %+v, %v", numbers, e2, err)
	}
	if report := verify(t, to, audit.Options{LogKey: key.Public()}); !report.OK() || report.Entries != e2.Entries {
		t.Errorf("continued: %d entries, want %d, %v", report.Entries, e2.Entries, report.Findings)
	}
	// The copy goes on as a journal of its own, in a new epoch.
	copied := start(t, openStore(t, to, func(c *sqlite.JournalConfig) { c.SegmentEntries = 4000 }), func(c *audit.Config) { c.Checkpointer, c.NewEpoch = key, true })
	if copied.Epoch() == j.Epoch() {
		t.Error("no new epoch")
	}
	appendN(t, copied.Journal, 30_000, 3)
	copied.stop()
	if report := verify(t, to, audit.Options{LogKey: key.Public()}); !report.OK() || !report.Covered {
		t.Errorf("gone on with: %v", report.Findings)
	}
}

// An export that is paced more slowly than the journal grows ends all the same.
func TestExportSlowerThanTheJournal(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "journal")
	j := start(t, openStore(t, dir, func(c *sqlite.JournalConfig) { c.SegmentEntries = 10 }), nil)
	appendN(t, j.Journal, 0, 25)
	next, paced := 100, 0
	e, numbers, err := exported(t, dir, t.TempDir(), 0, func() error {
		if paced++; paced > 50 {
			return errors.New("it follows the journal for ever")
		}
		appendN(t, j.Journal, next, 20)
		next += 20
		return nil
	}, nothing)
	if err != nil || len(numbers) != e.Segments || e.Entries < 26 || paced == 0 {
		t.Errorf("%v, segments %v, %+v, %d waits", err, numbers, e, paced)
	}
}

// Whatever the copy's last segment has room for, what goes on from it begins with its epoch: nothing has a number in the
// epoch before, where the original has another entry.
func TestExportGoneOnWithBeginsAnEpoch(t *testing.T) {
	t.Parallel()
	full := 0
	for n := 16; n < 21; n++ {
		dir, to := filepath.Join(t.TempDir(), "journal"), t.TempDir()
		key := newLogKey(t)
		small := func(c *sqlite.JournalConfig) { c.SegmentEntries = 10 }
		j := start(t, openStore(t, dir, small), func(c *audit.Config) { c.Checkpointer = key })
		appendN(t, j.Journal, 0, n)
		e, _, err := exported(t, dir, to, 0, noWait, nothing)
		if err != nil {
			t.Fatal(err)
		}
		if e.Entries%10 == 0 {
			full++
		}
		copied := start(t, openStore(t, to, small), func(c *audit.Config) { c.Checkpointer, c.NewEpoch = key, true })
		appendN(t, copied.Journal, 1000, 15)
		first, err := copied.Entry(t.Context(), e.Entries)
		if err != nil || first.Entry.Kind != audit.KindEpoch || first.Epoch == j.Epoch() {
			t.Errorf("after %d entries: %s of epoch %v, %v", e.Entries, first.Entry.Kind, first.Epoch, err)
		}
		copied.stop()
		if report := verify(t, to, audit.Options{LogKey: key.Public()}); !report.OK() || report.Segments < 3 {
			t.Errorf("after %d entries: %d segments, %v", e.Entries, report.Segments, report.Findings)
		}
	}
	if full == 0 {
		t.Error("no copy had a full segment at its end")
	}
}

// An export that is told to stop leaves nothing in its scratch folder, and the journal as it was.
func TestExportStopped(t *testing.T) {
	t.Parallel()
	dir, scratch := filepath.Join(t.TempDir(), "journal"), t.TempDir()
	j := start(t, openStore(t, dir, nil), nil)
	appendN(t, j.Journal, 0, 3)
	stop := errors.New("stop")
	_, err := sqlite.Export(t.Context(), sqlite.ExportConfig{
		Dir: dir, Scratch: scratch, Pace: noPace, Pinned: func() error { return nil },
		Segment: func(int, bool, int64, io.Reader) error { return stop },
	})
	if left, _ := os.ReadDir(scratch); !errors.Is(err, stop) || len(left) > 0 {
		t.Errorf("%v, left %v", err, left)
	}
	appendN(t, j.Journal, 3, 3)
	if _, _, err := exported(t, t.TempDir(), t.TempDir(), 0, noWait, nothing); !errors.Is(err, audit.ErrNotFound) && err == nil {
		t.Errorf("a folder without a journal: %v", err)
	}
}

func noPace(int) error { return nil }

// What an earlier release wrote is copied as it is.
func TestExportOfAnEarlierFormat(t *testing.T) {
	t.Parallel()
	dir, key := format1(t)
	to := t.TempDir()
	e, _, err := exported(t, dir, to, 0, noWait, nothing)
	if err != nil {
		t.Fatal(err)
	}
	want, got := verify(t, dir, audit.Options{LogKey: key}), verify(t, to, audit.Options{LogKey: key})
	if !got.OK() || got.Entries != want.Entries || got.Entries != e.Entries || got.Root != want.Root {
		t.Errorf("%d entries of %d, root %s of %s, %v", got.Entries, want.Entries, got.Root, want.Root, got.Findings)
	}
}

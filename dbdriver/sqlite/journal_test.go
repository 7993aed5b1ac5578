package sqlite_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"yinjian/appliance/audit"
	"yinjian/dbdriver"
	"yinjian/dbdriver/sqlite"
)

// segments50 makes segments of 50 entries.
func segments50(c *sqlite.JournalConfig) { c.SegmentEntries = 50 }

func TestJournalReadsWhatItWrote(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "journal")
	key := newLogKey(t)
	withKey := func(c *audit.Config) { c.Checkpointer = key; c.LogKeys = append(c.LogKeys, key.Public()) }
	j := start(t, openStore(t, dir, segments50), withKey)
	var receipts []audit.Receipt
	for i := range 260 {
		d := signDraft(i)
		d.State = i%10 == 0
		r, err := j.Append(t.Context(), d)
		if err != nil {
			t.Fatal(err)
		}
		receipts = append(receipts, r)
	}
	check := func(j *running) {
		t.Helper()
		size := j.Size()
		root, err := j.Root(t.Context(), size)
		if err != nil {
			t.Fatal(err)
		}
		for i, r := range receipts {
			got, err := j.Entry(t.Context(), r.Sequence)
			if err != nil || got.LeafHash != r.LeafHash || got.Entry.Kind != "sign.v1" {
				t.Fatalf("Entry(%d) = %v, %v", r.Sequence, got.LeafHash, err)
			}
			if i%37 == 0 {
				byRef, err := j.ByRef(t.Context(), refOf(i))
				if err != nil || len(byRef) != 1 || byRef[0].Sequence != r.Sequence {
					t.Errorf("ByRef(%d) = %v, %v", i, byRef, err)
				}
				data, err := j.Payload(t.Context(), &got.Entry, "signature")
				if want := fmt.Sprintf("signature value %d", i); err != nil || string(data) != want {
					t.Errorf("Payload = %q, %v, want %q", data, err, want)
				}
				path, err := j.InclusionProof(t.Context(), r.Sequence, size)
				if err != nil {
					t.Fatal(err)
				}
				if err := audit.VerifyInclusion(r.Sequence, size, r.LeafHash, path, root); err != nil {
					t.Error(err)
				}
			}
		}
		var seen, changes int
		if err := j.Range(t.Context(), 0, func(audit.Record) error { seen++; return nil }); err != nil || uint64(seen) != size {
			t.Errorf("Range saw %d of %d, %v", seen, size, err)
		}
		if err := j.State(t.Context(), func(r audit.Record) error { changes++; return nil }); err != nil || changes != 27 {
			t.Errorf("State saw %d changes, %v, want 27", changes, err)
		}
	}
	check(j)
	last := receipts[len(receipts)-1]
	c, err := j.WaitCheckpoint(t.Context(), last.Sequence)
	if err != nil {
		t.Fatal(err)
	}
	if err := audit.VerifyCheckpoint(key.Public(), &c); err != nil {
		t.Error(err)
	}
	epoch := j.Epoch()
	j.stop()

	j = start(t, openStore(t, dir, segments50), withKey)
	if j.Epoch() != epoch {
		t.Errorf("epoch after a restart = %s, want %s", j.Epoch(), epoch)
	}
	check(j)
	if _, err := j.Append(t.Context(), signDraft(3)); !errors.Is(err, audit.ErrDuplicateRef) {
		t.Errorf("Append of a known reference = %v, want %v", err, audit.ErrDuplicateRef)
	}
	var dup *audit.DuplicateRefError
	if _, err := j.Append(t.Context(), signDraft(200)); !errors.As(err, &dup) || dup.Sequence != receipts[200].Sequence {
		t.Errorf("Append of a known reference = %v, want sequence %d", err, receipts[200].Sequence)
	}
	j.stop()

	r := verify(t, dir, audit.Options{LogKey: key.Public()})
	if !r.OK() || r.Uncovered != 0 || r.Segments != 6 || r.Entries != 260+6 {
		t.Errorf("report = %+v", r)
	}
	// A restore draws a new epoch.
	j = start(t, openStore(t, dir, segments50), func(c *audit.Config) { withKey(c); c.NewEpoch = true })
	if j.Epoch() == epoch {
		t.Error("the epoch after a restore is the old one")
	}
	spans, err := j.Epochs(t.Context())
	if err != nil || len(spans) != 2 || spans[0].Epoch != epoch || spans[0].End != 266 || spans[1].First != 266 {
		t.Errorf("Epochs = %v, %v", spans, err)
	}
	j.stop()
	if r := verify(t, dir, audit.Options{LogKey: key.Public()}); !r.OK() || len(r.Epochs) != 2 {
		t.Errorf("report after a new epoch = %+v", r)
	}
}

func TestFilesArePrivate(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "journal")
	j := start(t, openStore(t, dir, segments50), nil)
	appendN(t, j.Journal, 0, 120)
	if st, err := os.Stat(dir); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("folder: %v, %v, want 0700", st.Mode(), err)
	}
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if info, err := f.Info(); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v, want 0600", f.Name(), info.Mode(), err)
		}
	}
	free, err := j.FreeBytes()
	if err != nil || free == 0 {
		t.Errorf("FreeBytes = %d, %v", free, err)
	}
}

func TestSecondOpenerIsRefused(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "journal")
	s := openStore(t, dir, nil)
	_, err := sqlite.OpenJournal(t.Context(), sqlite.JournalConfig{Dir: dir})
	if !errors.Is(err, dbdriver.ErrInUse) || !strings.Contains(err.Error(), "another process") {
		t.Errorf("second OpenJournal = %v, want %v", err, dbdriver.ErrInUse)
	}
	// By another name of the folder, and after somebody tidied the lock file away.
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	if _, err := sqlite.OpenJournal(t.Context(), sqlite.JournalConfig{Dir: link}); !errors.Is(err, dbdriver.ErrInUse) {
		t.Errorf("OpenJournal through a link = %v, want %v", err, dbdriver.ErrInUse)
	}
	if err := os.Remove(filepath.Join(dir, "journal.lock")); err != nil {
		t.Fatal(err)
	}
	if _, err := sqlite.OpenJournal(t.Context(), sqlite.JournalConfig{Dir: dir}); !errors.Is(err, dbdriver.ErrInUse) {
		t.Errorf("OpenJournal without the lock file = %v, want %v", err, dbdriver.ErrInUse)
	}
	s.Close()
	openStore(t, dir, nil).Close()
}

// countingStore counts how often rows are read.
type countingStore struct {
	*sqlite.Journal
	reads atomic.Int64
}

func (s *countingStore) Rows(ctx context.Context, segment int, from int64, fn func(audit.Row) error) error {
	s.reads.Add(1)
	return s.Journal.Rows(ctx, segment, from, fn)
}

// faultyStore fails the first time that a checkpoint is stored, before or after it is on disk.
type faultyStore struct {
	*sqlite.Journal
	landed bool
	failed chan struct{}
	once   sync.Once
}

func (s *faultyStore) PutCheckpoint(ctx context.Context, c audit.StoredCheckpoint) error {
	var err error
	s.once.Do(func() {
		defer close(s.failed)
		if s.landed {
			if err = s.Journal.PutCheckpoint(ctx, c); err != nil {
				return
			}
		}
		err = dbdriver.ErrFull
	})
	if err != nil {
		return err
	}
	return s.Journal.PutCheckpoint(ctx, c)
}

// A checkpoint that was not stored is signed again; one that was stored, and whose answer was lost, is gone on from.
func TestCheckpointWriteFails(t *testing.T) {
	t.Parallel()
	for name, landed := range map[string]bool{"write lost": false, "written, answer lost": true} {
		for _, grows := range []bool{false, true} {
			t.Run(fmt.Sprint(name, ", grows ", grows), func(t *testing.T) {
				t.Parallel()
				dir := filepath.Join(t.TempDir(), "journal")
				faulty := &faultyStore{Journal: openStore(t, dir, nil), landed: landed, failed: make(chan struct{})}
				j := start(t, faulty.Journal, func(c *audit.Config) { c.Store, c.Checkpointer = faulty, fixedKey })
				r := appendN(t, j.Journal, 0, 1)
				<-faulty.failed
				if grows {
					r = appendN(t, j.Journal, 1, 1)
				}
				if _, err := j.WaitCheckpoint(t.Context(), r.Sequence); err != nil {
					t.Errorf("WaitCheckpoint = %v", err)
				}
				appendN(t, j.Journal, 5, 1)
				j.stop()
				if r := verify(t, dir, audit.Options{LogKey: fixedKey.Public()}); !r.OK() || r.Uncovered != 0 {
					t.Errorf("%d uncovered, findings%s", r.Uncovered, list(r))
				}
			})
		}
	}
}

// Drafts do not wait while a full segment is read again: its seal was counted as it grew, or, after a restart, beside.
func TestRollingReadsNothing(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "journal")
	counting := &countingStore{Journal: openStore(t, dir, segments50)}
	run := func() *running {
		return start(t, counting.Journal, func(c *audit.Config) { c.Store, c.Checkpointer = counting, fixedKey })
	}
	j := run()
	appendN(t, j.Journal, 0, 120)
	if n := counting.reads.Load(); n != 0 {
		t.Errorf("rows were read %d times while the journal grew over two segments", n)
	}
	j.stop()
	counting.Journal = openStore(t, dir, segments50)
	j = run()
	appendN(t, j.Journal, 1000, 120)
	if n := counting.reads.Load(); n > 2 { // the active segment, and what was written meanwhile
		t.Errorf("rows were read %d times after a restart", n)
	}
	j.stop()
	if r := verify(t, dir, audit.Options{LogKey: fixedKey.Public()}); !r.OK() || r.Segments != 5 {
		t.Errorf("%d segments, findings%s", r.Segments, list(r))
	}
}

func TestSegmentsEndWithTheMonth(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "journal")
	clock := newClock()
	j := start(t, openStore(t, dir, func(c *sqlite.JournalConfig) { c.Monthly = true }), func(c *audit.Config) { c.Clock = clock })
	appendN(t, j.Journal, 0, 10)
	clock.jump(40 * 24 * time.Hour)
	appendN(t, j.Journal, 10, 10)
	clock.jump(-40 * 24 * time.Hour) // a clock that goes back makes no segment
	appendN(t, j.Journal, 20, 10)
	j.stop()
	if r := verify(t, dir, audit.Options{}); !r.OK() || r.Segments != 2 || r.Entries != 32 {
		t.Errorf("report = %+v", r)
	}
}

// A new appliance writes its first entries before it knows the date: that is no reason for a second segment.
func TestSegmentBegunBeforeTimeIsTrusted(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "journal")
	clock := newClock()
	clock.set(true)
	j := start(t, openStore(t, dir, func(c *sqlite.JournalConfig) { c.Monthly = true }), func(c *audit.Config) { c.Clock = clock })
	appendN(t, j.Journal, 0, 3)
	clock.set(false)
	appendN(t, j.Journal, 3, 3)
	clock.jump(40 * 24 * time.Hour)
	appendN(t, j.Journal, 6, 3)
	j.stop()
	if r := verify(t, dir, audit.Options{}); !r.OK() || r.Segments != 2 {
		t.Errorf("report = %+v, want 2 segments", r)
	}
}

func TestGroupCommit(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "journal")
	j := start(t, openStore(t, dir, func(c *sqlite.JournalConfig) { c.SegmentEntries = 300 }), nil)
	const workers, each = 64, 20
	var mu sync.Mutex
	got := map[uint64]audit.Hash{}
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for i := range each {
				r, err := j.Append(t.Context(), signDraft(w*each+i))
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				if _, twice := got[r.Sequence]; twice {
					t.Errorf("sequence %d was given twice", r.Sequence)
				}
				got[r.Sequence] = r.LeafHash
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if len(got) != workers*each {
		t.Fatalf("%d receipts, want %d", len(got), workers*each)
	}
	stored := map[uint64]audit.Hash{}
	if err := j.Range(t.Context(), 0, func(r audit.Record) error {
		if r.Entry.Kind == "sign.v1" {
			stored[r.Sequence] = r.LeafHash
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(got, stored); diff != "" {
		t.Errorf("acknowledged and stored differ:\n%s", diff)
	}
	j.stop()
	if r := verify(t, dir, audit.Options{}); !r.OK() {
		t.Errorf("findings: %+v", r.Findings)
	}
}

// A reference raced for by many clients is given to one of them.
func TestUniqueUnderConcurrency(t *testing.T) {
	t.Parallel()
	j := start(t, openStore(t, filepath.Join(t.TempDir(), "journal"), nil), nil)
	var mu sync.Mutex
	won, lost := map[uint64]int{}, map[uint64]int{}
	var wg sync.WaitGroup
	for range 32 {
		wg.Go(func() {
			r, err := j.Append(t.Context(), signDraft(1))
			var dup *audit.DuplicateRefError
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				won[r.Sequence]++
			} else if errors.As(err, &dup) {
				lost[dup.Sequence]++
			} else {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if diff := cmp.Diff([]map[uint64]int{{1: 1}, {1: 31}}, []map[uint64]int{won, lost}); diff != "" {
		t.Error(diff)
	}
}

// The journal is verified while it is written and its segments roll, without alarm.
func TestVerifyWhileWriting(t *testing.T) {
	t.Parallel()
	key := newLogKey(t)
	j := start(t, openStore(t, filepath.Join(t.TempDir(), "journal"), segments50), func(c *audit.Config) { c.Checkpointer = key })
	appendN(t, j.Journal, 0, 40)
	done := make(chan struct{})
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-done:
					return
				default:
				}
				if _, err := j.Append(t.Context(), signDraft(1000+w*100000+i)); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for range 12 {
		r, err := audit.Verify(t.Context(), j.store, audit.Options{LogKey: key.Public()})
		if err != nil || !r.OK() {
			t.Errorf("Verify = %v%s", err, list(r))
		}
		if err := j.Range(t.Context(), 0, func(audit.Record) error { return nil }); err != nil {
			t.Errorf("Range = %v", err)
		}
	}
	close(done)
	wg.Wait()
}

// A payload that recurs in every entry is stored once in a segment, however many others there are between.
func TestRecurringPayloadIsStoredOnce(t *testing.T) {
	t.Parallel()
	store := openStore(t, filepath.Join(t.TempDir(), "journal"), nil)
	j := start(t, store, nil)
	shared := []byte("the CA's certificate")
	const entries = 60
	var last audit.Entry
	for i := range entries {
		d := audit.Draft{Kind: "k", Payloads: []audit.Attachment{{Name: "a", MediaType: "m", Data: shared, Shared: true}}}
		for n := range 63 { // more than are remembered, in all
			d.Payloads = append(d.Payloads, audit.Attachment{Name: fmt.Sprintf("b%02d", n), MediaType: "m", Data: fmt.Appendf(nil, "%d %d", i, n), Shared: true})
		}
		r, err := j.Append(t.Context(), d)
		if err != nil {
			t.Fatal(err)
		}
		last = r.Entry
	}
	n, found := 0, 0
	err := store.Blobs(t.Context(), 1, func(sum audit.Hash) error {
		n++
		if sum == audit.Sum(shared) {
			found++
		}
		return nil
	})
	if err != nil || found != 1 || n != entries*63+1 {
		t.Errorf("%d payloads, the shared one %d times (%v)", n, found, err)
	}
	if data, err := j.Payload(t.Context(), &last, "a"); err != nil || string(data) != string(shared) {
		t.Errorf("the shared payload: %q, %v", data, err)
	}
}

// Lists of several CAs, as long as they may be, go with every signature and are stored once.
func TestLongListsRecur(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "journal")
	j := start(t, openStore(t, dir, nil), func(c *audit.Config) { c.QueueBytes = 1 }) // room for one draft of its own bytes alone
	var lists [4][]byte
	for i := range lists {
		lists[i] = bytes.Repeat([]byte{byte(i)}, 8<<20)
	}
	var wg sync.WaitGroup
	for i := range 40 {
		wg.Go(func() {
			d := signDraft(i)
			for n, l := range lists {
				d.Payloads = append(d.Payloads, audit.Attachment{Name: fmt.Sprintf("crl.%d", n), MediaType: "application/pkix-crl", Data: l, Shared: true})
			}
			r, err := j.Append(t.Context(), d)
			if err != nil {
				t.Error(err)
				return
			}
			for n, l := range lists {
				if i%13 != 0 {
					continue
				}
				if data, err := j.Payload(t.Context(), &r.Entry, fmt.Sprintf("crl.%d", n)); err != nil || !bytes.Equal(data, l) {
					t.Errorf("list %d of entry %d: %d bytes, %v", n, r.Sequence, len(data), err)
				}
			}
		})
	}
	wg.Wait()
	j.stop()
	if info, err := os.Stat(filepath.Join(dir, seg1)); err != nil || info.Size() > 40<<20 {
		t.Errorf("the segment: %v bytes, %v", info.Size(), err)
	}
}

// Drafts that wait when Run begins may fill the segment that a restart found before Run has looked at it (run with -race).
func TestRunWithDraftsWaiting(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	short := func(c *sqlite.JournalConfig) { c.SegmentEntries = 3 }
	j := start(t, openStore(t, dir, short), nil)
	appendN(t, j.Journal, 0, 1)
	j.stop()
	again, err := audit.Open(t.Context(), audit.Config{Store: openStore(t, dir, short), Node: "east", Clock: newClock(), Log: quiet()})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			if _, err := again.Append(context.Background(), signDraft(1+i)); err != nil {
				t.Error(err)
			}
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- again.Run(ctx) }()
	wg.Wait()
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

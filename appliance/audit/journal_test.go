package audit_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"yinjian/appliance/audit"
)

var errDisk = errors.New("disk gone")

func draft(i int) audit.Draft { return audit.Draft{Kind: "test", Object: fmt.Sprint(i)} }

// A failed write is settled by what the store then has: lost, it is refused and the number is given again; written, it
// is acknowledged. The journal goes on either way.
func TestAppendAfterAFailedWrite(t *testing.T) {
	t.Parallel()
	for name, landed := range map[string]bool{"write lost": false, "written, answer lost": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			store := newMemStore()
			j := startMem(t, store, nil)
			if _, err := j.Append(t.Context(), draft(1)); err != nil {
				t.Fatal(err)
			}
			store.onAppend = func(audit.Batch) (bool, error) { return landed, errDisk }
			r, err := j.Append(t.Context(), draft(2))
			store.onAppend = nil
			if landed && (err != nil || r.Sequence != 2) {
				t.Errorf("Append = %d, %v, want 2", r.Sequence, err)
			}
			if !landed && (!errors.Is(err, audit.ErrJournalUnwritable) || !strings.Contains(err.Error(), errDisk.Error()) || r.EntryDER != nil) {
				t.Errorf("Append = %+v, %v, want %v because of %v", r, err, audit.ErrJournalUnwritable, errDisk)
			}
			r, err = j.Append(t.Context(), draft(3))
			want := uint64(2)
			if landed {
				want = 3
			}
			if err != nil || r.Sequence != want {
				t.Errorf("next Append = %d, %v, want %d", r.Sequence, err, want)
			}
			rep, err := audit.Verify(t.Context(), store, audit.Options{})
			if err != nil || !rep.OK() {
				t.Errorf("Verify = %+v, %v", rep, err)
			}
		})
	}
}

// While the head cannot be read nothing is written; the outcome of the failed write is settled later.
func TestAppendWhileTheHeadCannotBeRead(t *testing.T) {
	t.Parallel()
	for name, landed := range map[string]bool{"write lost": false, "written, answer lost": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			store := newMemStore()
			j := startMem(t, store, nil)
			var broken atomic.Bool
			broken.Store(true)
			store.onHead = func() error {
				if broken.Load() {
					return errDisk
				}
				return nil
			}
			store.onAppend = func(audit.Batch) (bool, error) { return landed, errDisk }
			if _, err := j.Append(t.Context(), draft(1)); !errors.Is(err, audit.ErrOutcomeUnknown) {
				t.Errorf("Append = %v, want %v", err, audit.ErrOutcomeUnknown)
			}
			store.onAppend = func(audit.Batch) (bool, error) { t.Error("written in doubt"); return true, nil }
			if _, err := j.Append(t.Context(), draft(2)); !errors.Is(err, audit.ErrJournalUnwritable) {
				t.Errorf("Append = %v, want %v", err, audit.ErrJournalUnwritable)
			}
			store.onAppend = nil
			broken.Store(false)
			r, err := j.Append(t.Context(), draft(3))
			want := uint64(1)
			if landed {
				want = 2
			}
			if err != nil || r.Sequence != want {
				t.Errorf("Append = %d, %v, want %d", r.Sequence, err, want)
			}
			rep, err := audit.Verify(t.Context(), store, audit.Options{})
			if err != nil || !rep.OK() {
				t.Errorf("Verify = %+v, %v", rep, err)
			}
		})
	}
}

// A store that lost or changed what was acknowledged closes the journal for good.
func TestJournalLatches(t *testing.T) {
	t.Parallel()
	for name, harm := range map[string]func(*memStore){
		"shorter": func(s *memStore) { s.rows = s.rows[:2] },
		"another": func(s *memStore) {
			s.rows[2] = audit.Row{Sequence: 2, Leaf: make([]byte, 32), Chain: make([]byte, 32)}
		},
		"a stranger's entry": func(s *memStore) {
			s.rows = append(s.rows, audit.Row{Sequence: 3, Leaf: make([]byte, 32), Chain: make([]byte, 32)})
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			store := newMemStore()
			j := startMem(t, store, nil)
			for i := range 2 {
				if _, err := j.Append(t.Context(), draft(i)); err != nil {
					t.Fatal(err)
				}
			}
			store.onAppend = func(audit.Batch) (bool, error) {
				store.mu.Lock()
				defer store.mu.Unlock()
				harm(store)
				return false, errDisk
			}
			if _, err := j.Append(t.Context(), draft(9)); !errors.Is(err, audit.ErrJournalFailed) {
				t.Errorf("Append = %v, want %v", err, audit.ErrJournalFailed)
			}
			store.onAppend = nil
			if _, err := j.Append(t.Context(), draft(10)); !errors.Is(err, audit.ErrJournalFailed) || j.Failed() == nil {
				t.Errorf("next Append = %v, want %v", err, audit.ErrJournalFailed)
			}
		})
	}
}

// held makes writes wait until it is released, and tells when one has begun.
type held struct {
	begun   chan struct{}
	release chan struct{}
}

func hold(s *memStore) held {
	h := held{make(chan struct{}, 100), make(chan struct{})}
	s.onAppend = func(audit.Batch) (bool, error) {
		h.begun <- struct{}{}
		<-h.release
		return true, nil
	}
	return h
}

func TestCancel(t *testing.T) {
	t.Parallel()
	store := newMemStore()
	j := startMem(t, store, nil)
	h := hold(store)
	type result struct {
		r   audit.Receipt
		err error
	}
	run := func(ctx context.Context, i int) chan result {
		c := make(chan result, 1)
		go func() { r, err := j.Append(ctx, draft(i)); c <- result{r, err} }()
		return c
	}
	inBatch, cancelBatch := context.WithCancel(t.Context())
	first := run(inBatch, 1)
	<-h.begun // it is being written
	queued, cancelQueued := context.WithCancel(t.Context())
	second := run(queued, 2)
	waitFor(t, func() bool { return j.Waiting() == 1 })
	cancelQueued()
	if got := <-second; !errors.Is(got.err, context.Canceled) {
		t.Errorf("Append cancelled in the queue = %v, want %v", got.err, context.Canceled)
	}
	if j.Waiting() != 0 {
		t.Error("the cancelled draft is still in the queue")
	}
	cancelBatch()
	select {
	case got := <-first:
		t.Errorf("Append cancelled in its batch came back with %v before the write", got.err)
	default:
	}
	close(h.release)
	if got := <-first; got.err != nil || got.r.Sequence != 1 {
		t.Errorf("Append cancelled in its batch = %d, %v, want its receipt", got.r.Sequence, got.err)
	}
	store.onAppend = nil
	if r, err := j.Append(t.Context(), draft(3)); err != nil || r.Sequence != 2 {
		t.Errorf("next Append = %d, %v, want 2: the cancelled draft was not written", r.Sequence, err)
	}
}

// A store that does not answer does not hold callers for ever.
func TestOutcomeUnknown(t *testing.T) {
	t.Parallel()
	store := newMemStore()
	j := startMem(t, store, func(c *audit.Config) { c.CommitTimeout = 10 * time.Millisecond })
	h := hold(store)
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-h.begun; cancel() }()
	if _, err := j.Append(ctx, draft(1)); !errors.Is(err, audit.ErrOutcomeUnknown) {
		t.Errorf("Append = %v, want %v", err, audit.ErrOutcomeUnknown)
	}
	close(h.release)
}

// waitFor polls a condition that nothing announces.
func waitFor(t testing.TB, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); !ok(); time.Sleep(100 * time.Microsecond) {
		if time.Now().After(deadline) {
			t.Fatal("waited two minutes")
		}
	}
}

// Drafts that come while a write runs share the next one; one alone does not wait.
func TestGroupCommitSharesWrites(t *testing.T) {
	t.Parallel()
	store := newMemStore()
	j := startMem(t, store, nil)
	h := hold(store)
	var wg sync.WaitGroup
	send := func(i int) {
		wg.Go(func() {
			if _, err := j.Append(t.Context(), draft(i)); err != nil {
				t.Error(err)
			}
		})
	}
	send(0)
	<-h.begun
	for i := range 63 {
		send(i + 1)
	}
	waitFor(t, func() bool { return j.Waiting() == 63 })
	close(h.release)
	wg.Wait()
	if got := fmt.Sprint(store.batches); got != "[1 1 63]" { // the first is the epoch's
		t.Errorf("rows of the writes = %s, want [1 1 63]", got)
	}
}

func TestRunDrains(t *testing.T) {
	t.Parallel()
	store := newMemStore()
	key := newLogKey(t)
	j := openMem(t, store, func(c *audit.Config) { c.Checkpointer = key })
	var wg sync.WaitGroup
	for i := range 20 { // nobody commits yet
		wg.Go(func() {
			if _, err := j.Append(context.Background(), draft(i)); err != nil {
				t.Errorf("Append = %v, want it committed", err)
			}
		})
	}
	waitFor(t, func() bool { return j.Waiting() == 20 })
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := j.Run(ctx); err != nil {
		t.Fatal(err)
	}
	wg.Wait()
	if _, err := j.Append(t.Context(), draft(99)); !errors.Is(err, audit.ErrClosed) {
		t.Errorf("Append after Run = %v, want %v", err, audit.ErrClosed)
	}
	if c, err := j.LastCheckpoint(); err != nil || c.Size != 21 {
		t.Errorf("last checkpoint = %d, %v, want 21", c.Size, err)
	}
}

// Fields in another order than that of their names are put in order in a copy: a caller's slice stays as it is. Those in order are
// taken as they are, and are as they were afterwards, also where the journal adds a field of its own.
func TestDraftKeepsItsFields(t *testing.T) {
	t.Parallel()
	j := startMem(t, newMemStore(), nil)
	for _, state := range []bool{false, true} {
		for _, names := range []string{"abc", "cab", "kz"} {
			fields := make([]audit.Field, 0, len(names)+1) // with room for one more
			for _, n := range names {
				fields = append(fields, audit.Field{Name: string(n), Value: audit.Int(1)})
			}
			r, err := j.Append(t.Context(), audit.Draft{Kind: "k", State: state, Fields: fields})
			if err != nil {
				t.Fatal(err)
			}
			for i, n := range names {
				if fields[i].Name != string(n) {
					t.Errorf("%s, state %t: the caller's fields are %v now", names, state, fields)
				}
			}
			if spare := fields[:cap(fields)][len(fields)]; spare.Name != "" {
				t.Errorf("%s, state %t: the journal wrote %v behind the caller's fields", names, state, spare)
			}
			if e, err := audit.ParseEntry(r.EntryDER); err != nil || !reflect.DeepEqual(e.Fields, r.Entry.Fields) {
				t.Errorf("%s, state %t: stored %v, answered %v, %v", names, state, e, r.Entry.Fields, err)
			}
		}
	}
}

func TestDraftsAreRefusedAlone(t *testing.T) {
	t.Parallel()
	j := startMem(t, newMemStore(), nil)
	var shared []audit.Attachment
	long := make([]byte, audit.MaxPayloadBytes)
	for i := range audit.MaxSharedBytes/len(long) + 1 {
		shared = append(shared, audit.Attachment{Name: fmt.Sprintf("s%d", i), Data: long, Shared: true})
	}
	for name, d := range map[string]audit.Draft{
		"shared payloads": {Kind: "k", Payloads: shared},
		"no kind":         {},
		"journal's kind":  {Kind: audit.KindEpoch},
		"journal's field": {Kind: "k", Fields: []audit.Field{{"journal.change", audit.Int(7)}}},
		"field twice":     {Kind: "k", Fields: []audit.Field{{"a", audit.Int(1)}, {"a", audit.Int(1)}}},
		"unique, no ref":  {Kind: "k", Unique: true},
		"short ref":       {Kind: "k", Ref: []byte{1}},
		"payload":         {Kind: "k", Payloads: []audit.Attachment{{Name: "p", Data: make([]byte, audit.MaxPayloadBytes+1)}}},
		"payloads":        {Kind: "k", Payloads: []audit.Attachment{{Name: "p", Data: make([]byte, audit.MaxPayloadBytes)}, {Name: "q", Data: make([]byte, audit.MaxPayloadBytes)}}},
	} {
		if _, err := j.Append(t.Context(), d); !errors.Is(err, audit.ErrInvalidDraft) {
			t.Errorf("%s: Append = %v, want %v", name, err, audit.ErrInvalidDraft)
		}
	}
	if n := j.Size(); n != 1 {
		t.Errorf("%d entries, want the epoch's alone", n)
	}
}

// Fields may come in any order; the entry has them in its own.
func TestFieldsAreSorted(t *testing.T) {
	t.Parallel()
	j := startMem(t, newMemStore(), nil)
	r, err := j.Append(t.Context(), audit.Draft{
		Kind: "k", State: true, Fields: []audit.Field{{"z", audit.Int(1)}, {"a", audit.Text("x")}},
		Payloads: []audit.Attachment{{Name: "q", Data: []byte("2")}, {Name: "p", Data: []byte("1")}},
	})
	if err != nil {
		t.Fatal(err)
	}
	e, err := audit.ParseEntry(r.EntryDER)
	if err != nil || len(e.Fields) != 3 || e.Fields[0].Name != "a" || e.Payloads[0].Name != "p" {
		t.Errorf("entry = %+v, %v", e, err)
	}
	if n, ok := e.Change(); !ok || n != 1 {
		t.Errorf("Change = %d, %v, want 1: the epoch's entry is 0", n, ok)
	}
	for name, want := range map[string]string{"p": "1", "q": "2"} {
		if data, err := j.Payload(t.Context(), e, name); err != nil || string(data) != want {
			t.Errorf("payload = %q, %v, want %q", data, err, want)
		}
	}
}

// What a caller saw absent is believed up to the size at which it looked; later entries are known without the disk, and
// after a restart the disk is asked.
func TestUniqueAfterALook(t *testing.T) {
	t.Parallel()
	store := newMemStore()
	j := startMem(t, store, nil)
	ref := bytes.Repeat([]byte{7}, 32)
	draft := func(absent uint64) audit.Draft {
		return audit.Draft{Kind: "k", Ref: ref, Unique: true, Absent: absent}
	}
	looked := j.Size()
	if _, err := j.Append(t.Context(), audit.Draft{Kind: "other"}); err != nil {
		t.Fatal(err)
	}
	first, err := j.Append(t.Context(), draft(looked))
	if err != nil {
		t.Fatal(err)
	}
	for name, absent := range map[string]uint64{"looked before": looked, "never looked": 0} {
		var dup *audit.DuplicateRefError
		if _, err := j.Append(t.Context(), draft(absent)); !errors.As(err, &dup) || dup.Sequence != first.Sequence {
			t.Errorf("%s: Append = %v, want a duplicate of %d", name, err, first.Sequence)
		}
	}
}

// Others that are expected and do not come hold an entry up for a moment, not for good.
func TestExpectedAndNotComing(t *testing.T) {
	t.Parallel()
	j := startMem(t, newMemStore(), nil)
	for range 100 {
		defer j.Expect()()
	}
	if _, err := j.Append(t.Context(), audit.Draft{Kind: "k"}); err != nil {
		t.Fatal(err)
	}
}

// Entries stay in memory from when somebody asks for them until they are shipped, or are too many; never with a gap.
func TestRecent(t *testing.T) {
	t.Parallel()
	j := startMem(t, newMemStore(), nil)
	at := uint64(0)
	add := func(n int) {
		t.Helper()
		for range n {
			r, err := j.Append(t.Context(), draft(1))
			if err != nil {
				t.Fatal(err)
			}
			at = r.Sequence
		}
	}
	want := func(from uint64, most int, want ...uint64) {
		t.Helper()
		if got := j.RecentFrom(from, most); !slices.Equal(got, want) {
			t.Errorf("from %d: %d, want %d", from, got, want)
		}
	}
	add(3)
	want(1, 10) // nobody had asked
	if n := j.RecentBytes(); n != 0 {
		t.Errorf("%d bytes are kept for nobody", n)
	}
	add(4)
	first := at - 3
	want(first-1, 10)
	want(first, 10, first, first+1, first+2, first+3)
	want(first+1, 2, first+1, first+2)
	j.ForgetRecent(first + 2)
	want(first+1, 10)
	want(first+2, 10, first+2, first+3)
	add(1)
	want(first+3, 10, first+3, first+4)
	j.ForgetRecent(first + 9)
	if n := j.RecentBytes(); n != 0 {
		t.Errorf("%d bytes are kept of nothing", n)
	}
	add(3*audit.MaxRecent + 5)
	want(at-audit.MaxRecent, 1)
	want(at-audit.MaxRecent+1, 1, at-audit.MaxRecent+1)
	want(at, 5, at)
	// A second who asks has what he has not let go of, whatever was shipped.
	second := func(from uint64, most int, want ...uint64) {
		t.Helper()
		var got []uint64
		for _, r := range j.Recent(nil, from, most) {
			got = append(got, r.Sequence)
		}
		if !slices.Equal(got, want) {
			t.Errorf("second from %d: %d, want %d", from, got, want)
		}
	}
	second(at, 1, at)
	add(3)
	j.ForgetRecent(at + 1)
	second(at-2, 2, at-2, at-1)
	second(at, 9, at)
	second(at-2, 2) // he has let go of it
	want(at+1, 9)
	j.ForgetRecent(at + 1)
	second(at+1, 9)
	if n := j.RecentBytes(); n != 0 {
		t.Errorf("%d bytes are kept of nothing", n)
	}
}

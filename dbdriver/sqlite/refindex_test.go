package sqlite_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"yinjian/appliance/audit"
	"yinjian/dbdriver/sqlite"
)

const refFile = "refs.db"

// waitFor waits until the condition holds.
func waitFor(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not after 20 s", what)
		}
	}
}

// A watch counts the segments that the index of a store has come to cover.
type watch struct{ covered, notices atomic.Int32 }

func (w *watch) config(c *sqlite.JournalConfig) {
	c.SegmentEntries = 10
	c.Notice = func(error) { w.notices.Add(1) }
	sqlite.SetFault(c, func(step string) {
		if step == "index/covered" {
			w.covered.Add(1)
		}
	})
}

// complete waits until the index covers all sealed segments, of which there are at least n.
func (w *watch) complete(t testing.TB, s *sqlite.Journal, n int) {
	t.Helper()
	segments, err := s.Segments(t.Context())
	if err != nil || len(segments) <= n {
		t.Fatalf("%d segments, %v", len(segments), err)
	}
	waitFor(t, "the index is complete", func() bool { return int(w.covered.Load()) >= len(segments)-1 })
}

// indexed is a folder of seven segments with an index that covers the six that are sealed. at has where each entry is,
// by the number of its reference; those of -1 have the same.
func indexed(t *testing.T) (dir string, at map[int][]uint64) {
	t.Helper()
	dir, at = filepath.Join(t.TempDir(), "journal"), map[int][]uint64{}
	var w watch
	store := openStore(t, dir, w.config)
	j := start(t, store, nil)
	for i := range 60 {
		d, n := signDraft(i), i
		if i%10 == 3 {
			d.Ref, d.Unique, n = refOf(-1), false, -1
		}
		r, err := j.Append(t.Context(), d)
		if err != nil {
			t.Fatal(err)
		}
		at[n] = append(at[n], r.Entry.Sequence)
		if i%20 == 10 {
			checkRefs(t, store, at) // whatever the index covers by now
		}
	}
	w.complete(t, store, 6)
	checkRefs(t, store, at)
	j.stop()
	return dir, at
}

func checkRefs(t testing.TB, s *sqlite.Journal, at map[int][]uint64) {
	t.Helper()
	for n, want := range at {
		for _, limit := range []int{1, 2, 1000} {
			got, err := s.FindRef(t.Context(), refOf(n), limit)
			if want := want[:min(limit, len(want))]; err != nil || !slices.Equal(got, want) {
				t.Errorf("reference %d, %d at most: %v, %v, want %v", n, limit, got, err, want)
			}
		}
	}
	if got, err := s.FindRef(t.Context(), refOf(1e6), 10); err != nil || len(got) != 0 {
		t.Errorf("a reference that nothing has: %v, %v", got, err)
	}
}

func TestRefIndex(t *testing.T) {
	t.Parallel()
	dir, at := indexed(t)
	open := func() *sqlite.Journal {
		return openStore(t, dir, func(c *sqlite.JournalConfig) { c.SegmentEntries = 10 })
	}
	store := open()
	checkRefs(t, store, at)
	store.Close()

	// The index is what is asked: a row too many changes nothing, a row too few hides an entry.
	edit(t, dir, refFile, `INSERT OR IGNORE INTO yj_ref SELECT ref_no, (seq_no + 7) % 60 FROM yj_ref`)
	store = open()
	checkRefs(t, store, at)
	store.Close()
	edit(t, dir, refFile, `DELETE FROM yj_ref`)
	store = open()
	waitFor(t, "the index is asked", func() bool {
		got, err := store.FindRef(t.Context(), refOf(1), 1)
		return err == nil && len(got) == 0
	})
	store.Close()

	// Read only, the segments alone are asked.
	store = openStore(t, dir, func(c *sqlite.JournalConfig) { c.ReadOnly = true })
	checkRefs(t, store, at)
}

// The index names the entry, so that a sealed segment's own index, a page more of which little is ever in memory, is not
// read: here that index is no index any more.
func TestRefIndexNamesTheEntry(t *testing.T) {
	t.Parallel()
	dir, at := indexed(t)
	for n := 1; n <= 6; n++ {
		file := filepath.Join(dir, fmt.Sprintf("journal-%06d.db", n))
		db := raw(t, file)
		var root, page int64
		err := errors.Join(
			db.QueryRow(`SELECT rootpage FROM sqlite_master WHERE name = 'yj_entry_ref'`).Scan(&root),
			db.QueryRow(`PRAGMA page_size`).Scan(&page), db.Close(),
		)
		f, ferr := os.OpenFile(file, os.O_WRONLY, 0)
		if err = errors.Join(err, ferr); err == nil {
			_, err = f.WriteAt(make([]byte, page), (root-1)*page)
			err = errors.Join(err, f.Close())
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	store := openStore(t, dir, func(c *sqlite.JournalConfig) { c.SegmentEntries = 10 })
	waitFor(t, "the index is asked", func() bool {
		got, err := store.FindRef(t.Context(), refOf(1), 1)
		return err == nil && slices.Equal(got, at[1])
	})
	for n, want := range at {
		if want[len(want)-1] >= 60 {
			continue // in the active segment, too
		}
		if got, err := store.FindRef(t.Context(), refOf(n), 10); err != nil || !slices.Equal(got, want) {
			t.Errorf("reference %d: %v, %v, want %v", n, got, err, want)
		}
	}
}

// An index that is no use is made anew, and until then the segments are asked.
func TestRefIndexIsReplaced(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		spoil  func(t *testing.T, dir string)
		silent bool
	}{
		"gone": {func(t *testing.T, dir string) {
			if err := os.Remove(filepath.Join(dir, refFile)); err != nil {
				t.Fatal(err)
			}
		}, true},
		"garbage": {func(t *testing.T, dir string) {
			if err := os.WriteFile(filepath.Join(dir, refFile), []byte("no database, no database, no database"), 0o600); err != nil {
				t.Fatal(err)
			}
		}, false},
		"empty": {func(t *testing.T, dir string) {
			if err := os.WriteFile(filepath.Join(dir, refFile), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}, false},
		"trigger": {func(t *testing.T, dir string) {
			db := raw(t, filepath.Join(dir, refFile))
			defer db.Close()
			if _, err := db.Exec(`CREATE TRIGGER swallow BEFORE INSERT ON yj_ref BEGIN SELECT RAISE(IGNORE); END`); err != nil {
				t.Fatal(err)
			}
		}, false},
		"another journal's": {func(t *testing.T, dir string) {
			other, _ := indexed(t)
			b, err := os.ReadFile(filepath.Join(other, refFile))
			if err == nil {
				err = os.WriteFile(filepath.Join(dir, refFile), b, 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
		}, false},
		"more segments than there are": {func(t *testing.T, dir string) {
			edit(t, dir, refFile, `INSERT INTO yj_ref_segment (segment_no, seal_sm3) VALUES (99, x'00')`)
		}, false},
		"a folder": {func(t *testing.T, dir string) {
			if err := errors.Join(os.Remove(filepath.Join(dir, refFile)), os.Mkdir(filepath.Join(dir, refFile), 0o700)); err != nil {
				t.Fatal(err)
			}
		}, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir, at := indexed(t)
			tt.spoil(t, dir)
			var w watch
			store := openStore(t, dir, w.config)
			checkRefs(t, store, at)
			w.complete(t, store, 6)
			checkRefs(t, store, at)
			store.Close()
			if got := w.notices.Load(); (got == 0) != tt.silent {
				t.Errorf("%d notices", got)
			}
		})
	}
}

// The index is spoilt under the journal's hands: the segments are asked.
func TestRefIndexSpoiltWhileRunning(t *testing.T) {
	t.Parallel()
	dir, at := indexed(t)
	var w watch
	store := openStore(t, dir, w.config)
	db := raw(t, filepath.Join(dir, refFile))
	defer db.Close()
	if _, err := db.Exec(`DROP TABLE yj_ref`); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the loss is noticed", func() bool {
		checkRefs(t, store, at)
		return w.notices.Load() > 0
	})
}

// The process dies while the index is built; nothing is lost and the next start completes it.
func TestKillWhileIndexing(t *testing.T) {
	t.Parallel()
	for _, step := range []string{"index/chunk", "index/covered"} {
		t.Run(step, func(t *testing.T) {
			t.Parallel()
			dir := filepath.Join(t.TempDir(), "journal")
			acks := map[uint64]string{}
			cmd, out := child(t, "append", dir, "YJ_SEGMENT=20", "YJ_STEP="+step)
			readAcks(t, out, acks, func(int) {})
			if err := cmd.Wait(); err == nil || cmd.ProcessState.ExitCode() == 3 {
				t.Fatalf("the child did not die at %s: %v", step, err)
			}
			settled(t, dir, 20, acks)
			store := openStore(t, dir, func(c *sqlite.JournalConfig) {
				c.SegmentEntries = 20
				c.Notice = func(err error) { t.Error(err) }
			})
			segments, err := store.Segments(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			db := raw(t, filepath.Join(dir, refFile))
			defer db.Close()
			waitFor(t, "the index is complete", func() bool {
				var n int
				return db.QueryRow(`SELECT COUNT(*) FROM yj_ref_segment`).Scan(&n) == nil && n == len(segments)-1
			})
			refs := 0
			for _, s := range segments {
				err := store.Rows(t.Context(), s.Number, 0, func(r audit.Row) error {
					if len(r.Ref) == 0 {
						return nil
					}
					refs++
					got, err := store.FindRef(t.Context(), r.Ref, 1)
					if err == nil && !slices.Equal(got, []uint64{uint64(r.Sequence)}) {
						err = fmt.Errorf("reference of entry %d: %v", r.Sequence, got)
					}
					return err
				})
				if err != nil {
					t.Error(err)
				}
			}
			if refs < 10 {
				t.Errorf("%d references", refs)
			}
		})
	}
}

// What a reference costs with many segments that do not have it.
func BenchmarkFindRef(b *testing.B) {
	for _, segments := range []int{1, 100, 400} {
		b.Run(fmt.Sprint(segments, " segments"), func(b *testing.B) {
			var w watch
			store := openStore(b, filepath.Join(b.TempDir(), "journal"), w.config)
			j := start(b, store, nil)
			appendN(b, j.Journal, 0, 10*segments)
			w.complete(b, store, segments)
			ref := audit.Sum([]byte("nowhere"))
			for b.Loop() {
				if got, err := store.FindRef(b.Context(), ref[:], 1); err != nil || len(got) != 0 {
					b.Fatal(got, err)
				}
			}
		})
	}
}

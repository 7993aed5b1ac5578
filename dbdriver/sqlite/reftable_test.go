package sqlite_test

import (
	"errors"
	"path/filepath"
	"slices"
	"testing"

	"yinjian/appliance/audit"
	"yinjian/dbdriver/sqlite"
)

// What the filter says must never hide an entry: of each entry that was acknowledged the reference is found, in this
// run, after the segment was rolled, and after a restart while the filter is still being filled and when it is full.
func TestReferencesAreFoundThroughTheFilter(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "journal")
	small := func(c *sqlite.JournalConfig) { c.SegmentEntries = 40 } // as few bits: many references share them
	check := func(store *sqlite.Journal, n int) {
		t.Helper()
		for i := range n {
			seqs, err := store.FindRef(t.Context(), refOf(i), 10)
			if err != nil || len(seqs) != 1 {
				t.Errorf("reference %d: %v, %v", i, seqs, err)
			}
		}
		for i := n; i < n+200; i++ {
			if seqs, err := store.FindRef(t.Context(), refOf(i), 10); err != nil || len(seqs) != 0 {
				t.Errorf("reference %d of no entry: %v, %v", i, seqs, err)
			}
		}
	}
	for round := range 3 {
		store := openStore(t, dir, small)
		check(store, 55*round)
		j := start(t, store, nil)
		for i := 55 * round; i < 55*(round+1); i++ {
			r, err := j.Append(t.Context(), signDraft(i))
			if err != nil {
				t.Fatal(err)
			}
			if seqs, err := store.FindRef(t.Context(), refOf(i), 10); err != nil || !slices.Equal(seqs, []uint64{r.Sequence}) {
				t.Fatalf("reference %d right after its entry %d: %v, %v", i, r.Sequence, seqs, err)
			}
		}
		var dup *audit.DuplicateRefError
		if _, err := j.Append(t.Context(), signDraft(3)); !errors.As(err, &dup) {
			t.Errorf("the same reference again: %v", err)
		}
		check(store, 55*(round+1))
		j.stop()
	}
}

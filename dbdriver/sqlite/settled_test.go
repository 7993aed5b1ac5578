package sqlite_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"yinjian/appliance/audit"
	"yinjian/dbdriver/sqlite"
)

// Sealed segments but the newest are read without locks, as soon as the next but one is made; one with a log beside it is not,
// for such a connection would not see what is in the log.
func TestSettledSegments(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "journal")
	store := openStore(t, dir, func(c *sqlite.JournalConfig) { c.SegmentEntries = 10 })
	j := start(t, store, nil)
	for i := range 45 {
		appendN(t, j.Journal, i, 1)
		segments, err := store.Segments(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var want []int
		for _, s := range segments[:max(len(segments)-2, 0)] {
			want = append(want, s.Number)
		}
		if got := sqlite.Settled(store); !slices.Equal(got, want) {
			t.Fatalf("of %d segments settled are %v, want %v", len(segments), got, want)
		}
	}
	j.stop()
	log := filepath.Join(dir, "journal-000002.db-journal")
	if err := os.WriteFile(log, nil, 0o600); err != nil { // empty: it says nothing, and SQLite leaves it
		t.Fatal(err)
	}
	store = openStore(t, dir, func(c *sqlite.JournalConfig) { c.SegmentEntries = 10 })
	if got := sqlite.Settled(store); slices.Contains(got, 2) != !there(log) || !slices.Contains(got, 1) {
		t.Errorf("with %s there (%v): settled are %v", log, there(log), got)
	}
	store.Close()
	store = openStore(t, dir, func(c *sqlite.JournalConfig) { c.ReadOnly = true })
	if got := sqlite.Settled(store); len(got) > 0 {
		t.Errorf("read only, settled are %v", got)
	}
}

func there(name string) bool {
	_, err := os.Stat(name)
	return err == nil
}

// Whatever a connection without locks has in its memory, a verification by the running process sees what is in the file; and
// what such a connection cannot read is read with locks.
func TestTamperedWhileSettled(t *testing.T) {
	t.Parallel()
	key := newLogKey(t)
	for name, c := range map[string]struct {
		do   []string
		kind audit.FindingKind
	}{
		"an entry":           {[]string{`UPDATE yj_entry SET entry_der = CAST(entry_der || x'00' AS BLOB) WHERE seq_no = 5`}, audit.EntryChanged},
		"an entry is gone":   {[]string{`DELETE FROM yj_entry WHERE seq_no = 5`}, audit.EntryRemoved},
		"a node":             {[]string{`UPDATE yj_node SET node_hash = zeroblob(32) WHERE node_no = ` + nodeNo(2, 1)}, audit.NodeChanged},
		"a node over a part": {[]string{`UPDATE yj_node SET node_hash = zeroblob(32) WHERE node_no = ` + nodeNo(5, 0)}, audit.NodeChanged},
		"all of them moved":  {[]string{`UPDATE yj_entry SET chain_hash = zeroblob(32) WHERE seq_no = 9`, `VACUUM`}, audit.ChainChanged},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir, _ := written(t, key)
			store := openStore(t, dir, segments50)
			j := start(t, store, nil)
			if got := sqlite.Settled(store); !slices.Contains(got, 1) {
				t.Fatalf("settled are %v", got)
			}
			read := func() {
				for i := range uint64(50) {
					store.Row(t.Context(), i)
					j.InclusionProof(t.Context(), i, 131)
				}
			}
			read() // all is in memory now
			for _, s := range c.do {
				plant(t, dir, seg1, s)
			}
			read()
			r, err := audit.Verify(t.Context(), store, audit.Options{LogKey: key.Public()})
			if err != nil || !slices.ContainsFunc(r.Findings, func(f audit.Finding) bool { return f.Kind == c.kind }) {
				t.Errorf("%v, %v, want %s", err, list(r), c.kind)
			}
			for i := range uint64(50) {
				row, err := store.Row(t.Context(), i)
				if err == nil && row.Sequence != int64(i) || err != nil && !strings.Contains(c.do[0], "seq_no = 5") {
					t.Errorf("row %d: %d, %v", i, row.Sequence, err)
				}
			}
		})
	}
}

// What the running process has read before is not what it verifies: neither pages that SQLite takes for the file's, as nobody
// told it that they were changed, nor a file that is no longer the one in the folder.
func TestVerifyReadsWhatIsStored(t *testing.T) {
	t.Parallel()
	key := newLogKey(t)
	const change = `UPDATE yj_entry SET entry_der = CAST(entry_der || x'00' AS BLOB) WHERE seq_no = 5`
	for name, do := range map[string]func(t *testing.T, dir string){
		"written past SQLite": func(t *testing.T, dir string) {
			db := raw(t, filepath.Join(dir, seg1))
			defer db.Close()
			var der []byte
			if err := db.QueryRow(`SELECT entry_der FROM yj_entry WHERE seq_no = 5`).Scan(&der); err != nil {
				t.Fatal(err)
			}
			file, err := os.ReadFile(filepath.Join(dir, seg1))
			if err != nil || !bytes.Contains(file, der) {
				t.Fatalf("entry 5 is not in the file as it is, %v", err)
			}
			changed := bytes.Clone(der)
			changed[len(der)-1] ^= 1
			file = bytes.ReplaceAll(file, der, changed) // pages that are free now may have it too
			if err := os.WriteFile(filepath.Join(dir, seg1), file, 0o600); err != nil {
				t.Fatal(err)
			}
		},
		"a file in its place": func(t *testing.T, dir string) {
			other := t.TempDir()
			copyDir(t, dir, other)
			plant(t, other, seg1, change)
			if err := os.Rename(filepath.Join(other, seg1), filepath.Join(dir, seg1)); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir, _ := written(t, key)
			store := openStore(t, dir, segments50)
			for changed := range 2 {
				r, err := audit.Verify(t.Context(), store, audit.Options{LogKey: key.Public()})
				if err != nil || (changed == 0) != r.OK() || changed == 1 && !slices.ContainsFunc(r.Findings, func(f audit.Finding) bool { return f.Kind == audit.EntryChanged && f.Sequence == 5 }) {
					t.Fatalf("changed %d times: %v, %v", changed, err, list(r))
				}
				if changed == 0 {
					do(t, dir)
				}
			}
			start(t, store, nil).stop() // and it goes on
		})
	}
}

// The segment that is written, or its log, is taken away while it is: nothing more is acknowledged, for it would be gone with
// the process.
func TestActiveFileTakenAway(t *testing.T) {
	t.Parallel()
	for name, do := range map[string]func(file, other string) error{
		"removed":              func(file, _ string) error { return os.Remove(file) },
		"another in its place": func(file, other string) error { return os.Rename(other, file) },
		"its log removed":      func(file, _ string) error { return os.Remove(file + "-wal") },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir, before := filepath.Join(t.TempDir(), "journal"), t.TempDir()
			j := start(t, openStore(t, dir, nil), nil)
			appendN(t, j.Journal, 0, 3)
			j.stop()
			copyDir(t, dir, before)
			j = start(t, openStore(t, dir, nil), nil)
			appendN(t, j.Journal, 3, 3)
			if err := do(filepath.Join(dir, seg1), filepath.Join(before, seg1)); err != nil {
				t.Fatal(err)
			}
			for i := range 2 {
				if r, err := j.Append(t.Context(), signDraft(6+i)); !errors.Is(err, audit.ErrJournalFailed) {
					t.Errorf("Append = %d, %v, want %v", r.Sequence, err, audit.ErrJournalFailed)
				}
			}
			if j.Failed() == nil {
				t.Error("the journal goes on")
			}
		})
	}
}

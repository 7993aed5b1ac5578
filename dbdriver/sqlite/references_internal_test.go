package sqlite

import (
	"encoding/binary"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"yinjian/appliance/audit"
)

func refNo(n int) []byte {
	h := audit.Sum(binary.BigEndian.AppendUint64(nil, uint64(n)))
	return h[:]
}

// A full segment has many runs, some of which may lack, and one reference can be in several: the file finds all, in order,
// and what reads all references gets each once.
func TestReferencesInRuns(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := filepath.Join(dir, "journal-000001.db")
	if err := buildSegment(t.Context(), file, 1, 0, nil); err != nil {
		t.Fatal(err)
	}
	db, err := open(file, false, 1)
	if err != nil {
		t.Fatal(err)
	}
	at := map[int][]uint64{}
	for seq, n := range map[uint64]int{0: 1, 5: 2, 16383: 3, 16384: 4, 16385: 1, 70000: 5, 70001: 1, 999999: 6, 1 << 33: 7} {
		at[n] = append(at[n], seq)
		if _, err := db.Exec(insertEntry, int64(seq), "k", refNo(n), 0, refNo(0), refNo(0), []byte{1}, nil); err != nil {
			t.Fatal(err)
		}
	}
	for _, r := range []any{nil, []byte{1, 2, 3}} { // no reference, and one that somebody has cut
		if _, err := db.Exec(insertEntry, 70002+len(at), "k", r, 0, refNo(0), refNo(0), []byte{1}, nil); err != nil {
			t.Fatal(err)
		}
		at[1000] = nil
	}
	db.Close()
	j, err := OpenJournal(t.Context(), JournalConfig{Dir: dir, ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	check := func(what string, of map[int][]uint64) {
		t.Helper()
		for n, want := range at {
			if got := of[n]; !slices.Equal(got, want) {
				t.Errorf("%s: reference %d: %v, want %v", what, n, got, want)
			}
		}
	}
	found, read := map[int][]uint64{}, map[int][]uint64{}
	numbers := map[string]int{}
	for n := range at {
		slices.Sort(at[n])
		numbers[string(refNo(n))] = n
		if found[n], err = j.FindRef(t.Context(), refNo(n), 10); err != nil {
			t.Fatal(err)
		}
	}
	check("found", found)
	if got, err := j.FindRef(t.Context(), refNo(1), 2); err != nil || !slices.Equal(got, at[1][:2]) {
		t.Errorf("two of three: %v, %v", got, err)
	}
	s := j.segments[0]
	if err := s.references(t.Context(), func(ref []byte, seq int64) {
		n := numbers[string(ref)]
		read[n] = append(read[n], uint64(seq))
	}); err != nil {
		t.Fatal(err)
	}
	check("read", read)
	f := newRefTable(0, 100)
	if _, known := f.find(refNo(1)); known {
		t.Error("a table that is not filled knows something")
	}
	if err := f.fill(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	if named, known := f.find(refNo(1)); known { // 1<<33 has no place in a table
		t.Errorf("a table in which not all found room says %v", named)
	}
}

// A table names every entry that was added, whoever added it, in order; what it has no room for makes it say nothing.
func TestRefTable(t *testing.T) {
	t.Parallel()
	const first, entries = 5_000_000, 3000
	f := newRefTable(first, entries)
	f.ready.Store(true)
	var wg sync.WaitGroup
	for w := range 4 { // two add the same
		wg.Go(func() {
			for i := w % 2; i < entries; i += 2 {
				f.add(refNo(i/3), first+uint64(i))
			}
		})
	}
	wg.Wait()
	for i := range entries / 3 {
		named, known := f.find(refNo(i))
		if want := []uint64{first + 3*uint64(i), first + 3*uint64(i) + 1, first + 3*uint64(i) + 2}; !known || !slices.Equal(named, want) {
			t.Fatalf("reference %d: %v, %v", i, named, known)
		}
	}
	for i := entries; i < 3*entries; i++ {
		if named, known := f.find(refNo(i)); !known || len(named) > 0 {
			t.Fatalf("reference %d of no entry: %v, %v", i, named, known)
		}
	}
	if named, known := f.find([]byte("short")); known {
		t.Errorf("a reference of another length: %v", named)
	}
	for name, spoil := range map[string]func(f *refTable){
		"one reference very often":  func(f *refTable) { addMany(f, first, func(int) []byte { return refNo(1) }) },
		"more than there are words": func(f *refTable) { addMany(f, first, refNo) },
		"before the segment":        func(f *refTable) { f.add(refNo(1), first-1) },
		"far behind it":             func(f *refTable) { f.add(refNo(1), first+1<<32) },
	} {
		f := newRefTable(first, 500)
		f.ready.Store(true)
		spoil(f)
		if named, known := f.find(refNo(2)); known {
			t.Errorf("%s: it still says %v", name, named)
		}
	}
	(*refTable)(nil).add(refNo(1), 0)
	if _, known := (*refTable)(nil).find(refNo(1)); known {
		t.Error("no table knows something")
	}
}

func addMany(f *refTable, first uint64, ref func(int) []byte) {
	for i := range 2000 {
		f.add(ref(i), first+uint64(i))
	}
}

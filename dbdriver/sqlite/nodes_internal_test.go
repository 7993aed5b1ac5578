package sqlite

import (
	"context"
	"database/sql"
	"errors"
	"math"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"yinjian/appliance/audit"
)

// Each node has a number of its own, from which it is known again; the 63 over 64 leaves, and the 63 over those, lie together.
func TestNodeNumbers(t *testing.T) {
	t.Parallel()
	seen := map[int64]audit.NodeID{}
	for level := uint8(1); level <= 62; level++ {
		for _, index := range []uint64{0, 1, 2, 63, 64, 1000, 1<<20 - 1, 1 << 40, (maxNodeLast + 1) >> level, (maxNodeLast+1)>>level - 1, math.MaxUint64 >> level} {
			id := audit.NodeID{Level: level, Index: index}
			no := nodeNo(id)
			if inRange := index <= math.MaxUint64>>level-1 && (index+1)<<level-1 <= maxNodeLast; inRange != (no >= 0) {
				t.Errorf("%v has number %d", id, no)
			}
			if no < 0 {
				continue
			}
			if other, ok := seen[no]; ok && other != id {
				t.Errorf("%v and %v have number %d", id, other, no)
			}
			seen[no] = id
			if got, ok := nodeOf(no); !ok || got != id {
				t.Errorf("%v: number %d is %v, %v", id, no, got, ok)
			}
		}
	}
	for _, no := range []int64{-1, 0, 1, 63, 64, 1<<6 | 2, 2<<6 | 1, 1<<6 | 7, nodeNo(audit.NodeID{Level: 7}) - 1, math.MaxInt64} {
		if id, ok := nodeOf(no); ok {
			t.Errorf("%d is %v", no, id)
		}
	}
	block := func(band uint8, n uint64) (least, most int64) {
		least = math.MaxInt64
		for level := 6*band + 1; level <= 6*band+6; level++ {
			under := uint64(1) << (6*band + 6 - level)
			for i := n * under; i < (n+1)*under; i++ {
				no := nodeNo(audit.NodeID{Level: level, Index: i})
				least, most = min(least, no), max(most, no)
			}
		}
		return least, most
	}
	for band := range uint8(3) {
		_, before := block(band, 6)
		least, most := block(band, 7)
		after, _ := block(band, 8)
		if before >= least || most >= after {
			t.Errorf("band %d: a block ends at %d, the next is %d to %d, the one after begins at %d", band, before, least, most, after)
		}
	}
}

// The statements that read by reference go by the index, and those that read nodes by their number.
func TestPlans(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "journal-000001.db")
	if err := buildSegment(t.Context(), file, 1, 0, nil); err != nil {
		t.Fatal(err)
	}
	db, err := open(file, true, 1)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	run := strings.Replace(selectRunRefs, "?", "1", 1)
	for text, want := range map[string][]string{
		selectByRefInRuns:               {"SEARCH yj_entry USING COVERING INDEX yj_entry_ref (<expr>=? AND ref_hash=?)", "SEARCH yj_entry USING COVERING INDEX yj_entry_ref (<expr>>?)"},
		selectFirstRun:                  {"COVERING INDEX yj_entry_ref"},
		selectNextRun + "1" + orderRuns: {"SEARCH yj_entry USING COVERING INDEX yj_entry_ref (<expr>>?)"},
		run:                             {"SEARCH yj_entry USING COVERING INDEX yj_entry_ref (<expr>=?"},
		nodeStatements[1]:               {"SEARCH yj_node USING INTEGER PRIMARY KEY (rowid=?)"},
		selectNodeRange:                 {"SEARCH yj_node USING INTEGER PRIMARY KEY (rowid>? AND rowid<?)"},
	} {
		plan := planOf(t, db, text)
		for _, w := range want {
			if !strings.Contains(plan, w) {
				t.Errorf("%s\nwithout %q:\n%s", text, w, plan)
			}
		}
		for _, bad := range []string{"TEMP B-TREE FOR ORDER BY", "SCAN yj_node", "SCAN yj_entry\n"} {
			if strings.Contains(plan, bad) && text != selectByRefInRuns {
				t.Errorf("%s\nwith %q:\n%s", text, bad, plan)
			}
		}
	}
}

func planOf(t *testing.T, db *sql.DB, text string) string {
	t.Helper()
	args := make([]any, strings.Count(text, "?"))
	for i := range args {
		args[i] = 1
	}
	rows, err := db.QueryContext(context.Background(), "EXPLAIN QUERY PLAN "+text, args...)
	if err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	defer rows.Close()
	var plan strings.Builder
	for rows.Next() {
		var id, parent, unused int
		var detail string
		if err := rows.Scan(&id, &parent, &unused, &detail); err != nil {
			t.Fatal(err)
		}
		plan.WriteString(detail + "\n")
	}
	return plan.String()
}

// Leaf hashes come in order, many at a time, with every byte; a gap, a hash of another length or an end that is not there is
// damage.
func TestLeaves(t *testing.T) {
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
	defer db.Close()
	const n = leavesAtOnce + 10
	want := make([]audit.Hash, n)
	tx, err := db.Begin()
	if err != nil {
		t.Fatal(err)
	}
	for i := range want {
		want[i] = audit.Hash(refNo(i))
		want[i][i%32] = 0 // as text it would end there
		if _, err := tx.Exec(insertEntry, i, "k", nil, 0, want[i][:], refNo(0), []byte{1}, nil); err != nil {
			t.Fatal(err)
		}
	}
	if err := tx.Commit(); err != nil {
		t.Fatal(err)
	}
	j, err := OpenJournal(t.Context(), JournalConfig{Dir: dir, ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	read := func(first, end uint64) (got []audit.Hash, err error) {
		err = j.Leaves(t.Context(), 1, first, end, func(leaves []audit.Hash) error {
			got = append(got, leaves...)
			return nil
		})
		return got, err
	}
	for _, of := range [][2]uint64{{0, n}, {0, 0}, {5, 6}, {n - 1, n}, {1, leavesAtOnce + 1}} {
		if got, err := read(of[0], of[1]); err != nil || !slices.Equal(got, want[of[0]:of[1]]) {
			t.Errorf("%v: %d leaves, %v", of, len(got), err)
		}
	}
	for do, undo := range map[string]string{
		`UPDATE yj_entry SET seq_no = 99999 WHERE seq_no = 4105`:    `UPDATE yj_entry SET seq_no = 4105 WHERE seq_no = 99999`,
		`UPDATE yj_entry SET seq_no = 99999 WHERE seq_no = 50`:      `UPDATE yj_entry SET seq_no = 50 WHERE seq_no = 99999`,
		`UPDATE yj_entry SET leaf_hash = x'00' WHERE seq_no = 4000`: `UPDATE yj_entry SET leaf_hash = zeroblob(32) WHERE seq_no = 4000`,
	} {
		if _, err := db.Exec(do); err != nil {
			t.Fatal(err)
		}
		if _, err := read(0, n); !errors.Is(err, audit.ErrCorrupt) {
			t.Errorf("%s: %v", do, err)
		}
		if _, err := db.Exec(undo); err != nil {
			t.Fatal(err)
		}
		if _, err := read(0, n); err != nil {
			t.Errorf("%s: %v", undo, err)
		}
	}
}

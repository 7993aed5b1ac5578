package sqlite_test

import (
	"crypto"
	"database/sql"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"yinjian/appliance/audit"
)

// written makes a journal of 131 entries in three segments (numbers 0…49, 50…99, 100…130) with a checkpoint every few
// entries, and answers its folder and the last checkpoint.
func written(t *testing.T, key logKey) (string, audit.Checkpoint) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "journal")
	j := start(t, openStore(t, dir, segments50), func(c *audit.Config) { c.Checkpointer = key })
	var last audit.Checkpoint
	for i := range 128 {
		r := appendN(t, j.Journal, i, 1)
		if i%10 == 9 || i == 127 {
			var err error
			if last, err = j.WaitCheckpoint(t.Context(), r.Sequence); err != nil {
				t.Fatal(err)
			}
		}
	}
	j.stop()
	if r := verify(t, dir, audit.Options{LogKey: key.Public()}); !r.OK() || r.Uncovered != 0 || r.Entries != 131 || r.Checkpoints < 13 {
		t.Fatalf("before tampering: %+v", r)
	}
	return dir, last
}

// forge answers the entry of a number in a file, changed in its object, with its leaf hash, as hexadecimal.
func forge(t *testing.T, dir, file string, seq int) (der, leaf string) {
	t.Helper()
	db, err := sql.Open("sqlite3", filepath.Join(dir, file))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	var b []byte
	if err := db.QueryRow(`SELECT entry_der FROM yj_entry WHERE seq_no = ?`, seq).Scan(&b); err != nil {
		t.Fatal(err)
	}
	e, err := audit.ParseEntry(b)
	if err != nil {
		t.Fatal(err)
	}
	e.Object = "signer/forged"
	if b, err = e.Marshal(); err != nil {
		t.Fatal(err)
	}
	h := audit.LeafHash(b)
	return hex.EncodeToString(b), hex.EncodeToString(h[:])
}

const seg1, seg2, seg3 = "journal-000001.db", "journal-000002.db", "journal-000003.db"

func TestTampering(t *testing.T) {
	t.Parallel()
	key := newLogKey(t)
	original, _ := written(t, key)
	type want struct {
		kind          audit.FindingKind
		first, last   uint64
		others        []audit.FindingKind // that may stand beside it
		nothingBeside bool
	}
	for name, c := range map[string]struct {
		do   func(t *testing.T, dir string)
		want want
	}{
		"a byte of an entry": {func(t *testing.T, dir string) {
			edit(t, dir, seg2, `UPDATE yj_entry SET entry_der = CAST(substr(entry_der,1,40)||x'00'||substr(entry_der,42) AS BLOB) WHERE seq_no = 70`)
		}, want{kind: audit.EntryChanged, first: 70, nothingBeside: true}},
		"an entry, still an entry": {func(t *testing.T, dir string) {
			der, _ := forge(t, dir, seg2, 71)
			edit(t, dir, seg2, `UPDATE yj_entry SET entry_der = x'`+der+`' WHERE seq_no = 71`)
		}, want{kind: audit.EntryChanged, first: 71, nothingBeside: true}},
		"a leaf": {func(t *testing.T, dir string) {
			edit(t, dir, seg2, `UPDATE yj_entry SET leaf_hash = zeroblob(32) WHERE seq_no = 70`)
		}, want{kind: audit.LeafChanged, first: 70, others: []audit.FindingKind{audit.SealWrong}}},
		"entry and leaf, even": {func(t *testing.T, dir string) {
			der, leaf := forge(t, dir, seg2, 70)
			edit(t, dir, seg2, `UPDATE yj_entry SET entry_der = x'`+der+`', leaf_hash = x'`+leaf+`' WHERE seq_no = 70`)
		}, want{kind: audit.EntryChanged, first: 70, others: []audit.FindingKind{audit.SealWrong}}},
		"entry and leaf, the last": {func(t *testing.T, dir string) {
			der, leaf := forge(t, dir, seg3, 130)
			edit(t, dir, seg3, `UPDATE yj_entry SET entry_der = x'`+der+`', leaf_hash = x'`+leaf+`' WHERE seq_no = 130`)
		}, want{kind: audit.EntryAdded, first: 130, others: []audit.FindingKind{audit.HistoryRewritten}}},
		"entry, leaf, chain and all nodes": {func(t *testing.T, dir string) { rewrite(t, dir, 115) },
			want{kind: audit.HistoryRewritten, first: 115, nothingBeside: true}},
		"a chain hash": {func(t *testing.T, dir string) {
			edit(t, dir, seg2, `UPDATE yj_entry SET chain_hash = zeroblob(32) WHERE seq_no = 70`)
		}, want{kind: audit.ChainChanged, first: 70, nothingBeside: true}},
		"a node": {func(t *testing.T, dir string) {
			edit(t, dir, seg2, `UPDATE yj_node SET node_hash = zeroblob(32) WHERE node_no = `+nodeNo(3, 8))
		}, want{kind: audit.NodeChanged, first: 64, last: 71, nothingBeside: true}},
		"a node removed": {func(t *testing.T, dir string) {
			edit(t, dir, seg2, `DELETE FROM yj_node WHERE node_no = `+nodeNo(3, 8))
		}, want{kind: audit.NodeMissing, first: 64, last: 71, nothingBeside: true}},
		"a column": {func(t *testing.T, dir string) {
			edit(t, dir, seg1, `UPDATE yj_entry SET ref_hash = zeroblob(32) WHERE seq_no = 33`)
		}, want{kind: audit.ColumnChanged, first: 33, nothingBeside: true}},
		"the mark of a change": {func(t *testing.T, dir string) {
			edit(t, dir, seg1, `UPDATE yj_entry SET change_flag = 0 WHERE seq_no = 0`)
		}, want{kind: audit.ColumnChanged, first: 0, nothingBeside: true}},
		"a row deleted": {func(t *testing.T, dir string) {
			edit(t, dir, seg2, `DELETE FROM yj_entry WHERE seq_no = 70`)
		}, want{kind: audit.EntryRemoved, first: 70, others: []audit.FindingKind{audit.SealWrong, audit.PayloadAdded}}},
		"the last row of a segment deleted": {func(t *testing.T, dir string) {
			edit(t, dir, seg1, `DELETE FROM yj_entry WHERE seq_no = 49`)
		}, want{kind: audit.EntryRemoved, first: 49, others: []audit.FindingKind{audit.SealWrong, audit.PayloadAdded}}},
		"a row inserted at the end": {func(t *testing.T, dir string) {
			edit(t, dir, seg3, `INSERT INTO yj_entry (seq_no, kind_name, ref_hash, change_flag, leaf_hash, chain_hash, entry_der, own_data) SELECT 131, kind_name, ref_hash, change_flag, leaf_hash, chain_hash, entry_der, own_data FROM yj_entry WHERE seq_no = 120`)
		}, want{kind: audit.EntryReordered, first: 131, others: []audit.FindingKind{audit.NodeMissing}}},
		"a forged row inserted at the end": {func(t *testing.T, dir string) { forgeTail(t, dir) },
			want{kind: audit.EntryAdded, first: 131, others: []audit.FindingKind{audit.NodeMissing}}},
		"a row inserted before the first": {func(t *testing.T, dir string) {
			edit(t, dir, seg2, `INSERT INTO yj_entry (seq_no, kind_name, ref_hash, change_flag, leaf_hash, chain_hash, entry_der, own_data) SELECT -5, kind_name, ref_hash, change_flag, leaf_hash, chain_hash, entry_der, own_data FROM yj_entry WHERE seq_no = 70`)
		}, want{kind: audit.EntryAdded, first: 0, nothingBeside: true}},
		"a row inserted far away": {func(t *testing.T, dir string) {
			edit(t, dir, seg3, `INSERT INTO yj_entry (seq_no, kind_name, ref_hash, change_flag, leaf_hash, chain_hash, entry_der, own_data) SELECT 9000000000000000000, kind_name, ref_hash, change_flag, leaf_hash, chain_hash, entry_der, own_data FROM yj_entry WHERE seq_no = 120`)
		}, want{kind: audit.EntryAdded, first: 9000000000000000000, nothingBeside: true}},
		"two rows swapped": {func(t *testing.T, dir string) {
			edit(t, dir, seg2, `UPDATE yj_entry SET seq_no = -1 WHERE seq_no = 70`, `UPDATE yj_entry SET seq_no = 70 WHERE seq_no = 81`, `UPDATE yj_entry SET seq_no = 81 WHERE seq_no = -1`)
		}, want{kind: audit.EntryReordered, first: 70, others: []audit.FindingKind{audit.EntryReordered, audit.SealWrong}}},
		"a payload": {func(t *testing.T, dir string) {
			edit(t, dir, seg2, `UPDATE yj_entry SET own_data = CAST(substr(own_data, 1, length(own_data) - 1) || x'00' AS BLOB) WHERE seq_no = 62`)
		}, want{kind: audit.PayloadChanged, first: 62, nothingBeside: true}},
		"a payload's end": {func(t *testing.T, dir string) {
			edit(t, dir, seg2, `UPDATE yj_entry SET own_data = CAST(own_data || x'00' AS BLOB) WHERE seq_no = 62`)
		}, want{kind: audit.PayloadChanged, first: 62, nothingBeside: true}},
		"a payload removed": {func(t *testing.T, dir string) {
			edit(t, dir, seg2, `UPDATE yj_entry SET own_data = NULL WHERE seq_no = 62`)
		}, want{kind: audit.PayloadMissing, first: 62, nothingBeside: true}},
		"a payload under another digest": {func(t *testing.T, dir string) {
			edit(t, dir, seg2, `UPDATE yj_entry SET own_data = CAST(zeroblob(32) || substr(own_data, 33) AS BLOB) WHERE seq_no = 62`)
		}, want{kind: audit.PayloadMissing, first: 62, others: []audit.FindingKind{audit.PayloadAdded}}},
		"a payload added to a row": {func(t *testing.T, dir string) {
			edit(t, dir, seg2, `UPDATE yj_entry SET own_data = CAST(own_data || (SELECT own_data FROM yj_entry WHERE seq_no = 63) AS BLOB) WHERE seq_no = 62`)
		}, want{kind: audit.PayloadAdded, first: 62, nothingBeside: true}},
		"a payload of many entries": {func(t *testing.T, dir string) {
			edit(t, dir, seg2, `UPDATE yj_blob SET blob_data = CAST(blob_data || x'00' AS BLOB) WHERE blob_data = CAST('certificate 4' AS BLOB)`)
		}, want{kind: audit.PayloadChanged, first: 55, others: []audit.FindingKind{audit.PayloadChanged}}},
		"a payload of many entries removed": {func(t *testing.T, dir string) {
			edit(t, dir, seg2, `DELETE FROM yj_blob WHERE blob_data = CAST('certificate 4' AS BLOB)`)
		}, want{kind: audit.PayloadMissing, first: 55, others: []audit.FindingKind{audit.PayloadMissing}}},
		"a payload of many entries under another digest": {func(t *testing.T, dir string) {
			edit(t, dir, seg2, `UPDATE yj_blob SET blob_sm3 = zeroblob(32) WHERE blob_data = CAST('certificate 4' AS BLOB)`)
		}, want{kind: audit.PayloadMissing, first: 55, others: []audit.FindingKind{audit.PayloadMissing, audit.PayloadAdded}}},
		"a payload added": {func(t *testing.T, dir string) {
			edit(t, dir, seg2, `INSERT INTO yj_blob (blob_sm3, blob_data) VALUES (x'`+audit.Sum([]byte("smuggled")).String()+`', CAST('smuggled' AS BLOB))`)
		}, want{kind: audit.PayloadAdded, first: 50, last: 99, nothingBeside: true}},
		"a reference cleared, so that it is not found": {func(t *testing.T, dir string) {
			edit(t, dir, seg1, `UPDATE yj_entry SET ref_hash = NULL WHERE seq_no = 33`)
		}, want{kind: audit.ColumnChanged, first: 33, nothingBeside: true}},
		"a kind": {func(t *testing.T, dir string) {
			edit(t, dir, seg1, `UPDATE yj_entry SET kind_name = 'other' WHERE seq_no = 33`)
		}, want{kind: audit.ColumnChanged, first: 33, nothingBeside: true}},
		"a segment's file put back to an older state": {func(t *testing.T, dir string) {
			edit(t, dir, seg2, `UPDATE yj_segment SET seal_data = NULL`, `DELETE FROM yj_entry WHERE seq_no > 80`, `DELETE FROM yj_node WHERE node_no % 0x200000000000000 >> 6 >= 81`,
				`DELETE FROM yj_checkpoint WHERE tree_size > 81`)
		}, want{kind: audit.SegmentMissing, first: 50, others: []audit.FindingKind{audit.EntryRemoved, audit.CheckpointRemoved, audit.SealWrong, audit.NodeMissing, audit.PayloadAdded}}},
		"a checkpoint removed": {func(t *testing.T, dir string) {
			edit(t, dir, seg2, `DELETE FROM yj_checkpoint WHERE tree_size = (SELECT tree_size FROM yj_checkpoint ORDER BY tree_size LIMIT 1 OFFSET 1)`)
		}, want{kind: audit.CheckpointRemoved, nothingBeside: true}},
		"a checkpoint's signature": {func(t *testing.T, dir string) {
			edit(t, dir, seg2, `UPDATE yj_checkpoint SET note_sig = CAST(substr(note_sig,1,20)||x'00'||substr(note_sig,22) AS BLOB) WHERE tree_size = (SELECT MAX(tree_size) FROM yj_checkpoint)`)
		}, want{kind: audit.CheckpointInvalid, nothingBeside: true}},
		"the tail": {func(t *testing.T, dir string) {
			edit(t, dir, seg3, `DELETE FROM yj_entry WHERE seq_no > 120`)
		}, want{kind: audit.Truncated, first: 121, others: []audit.FindingKind{audit.NodesWithoutEntry, audit.PayloadAdded}}},
		"the tail with its nodes": {func(t *testing.T, dir string) {
			edit(t, dir, seg3, `DELETE FROM yj_entry WHERE seq_no > 120`, `DELETE FROM yj_node WHERE node_no % 0x200000000000000 >> 6 >= 121`)
		}, want{kind: audit.Truncated, first: 121, others: []audit.FindingKind{audit.PayloadAdded}}},
		"a segment's file removed": {func(t *testing.T, dir string) {
			if err := os.Remove(filepath.Join(dir, seg2)); err != nil {
				t.Fatal(err)
			}
		}, want{kind: audit.SegmentMissing, first: 50, last: 99, others: []audit.FindingKind{audit.CheckpointRemoved, audit.SealWrong, audit.NodeMissing}}},
		"a segment's file destroyed": {func(t *testing.T, dir string) {
			if err := os.WriteFile(filepath.Join(dir, seg2), []byte(strings.Repeat("no database ", 1000)), 0o600); err != nil {
				t.Fatal(err)
			}
		}, want{kind: audit.SegmentUnreadable, first: 50, others: []audit.FindingKind{audit.CheckpointRemoved, audit.SealWrong, audit.NodeMissing, audit.SegmentMissing, audit.SegmentUnreadable}}},
		"a seal": {func(t *testing.T, dir string) {
			edit(t, dir, seg1, `UPDATE yj_segment SET seal_data = CAST(substr(seal_data,1,95)||x'00' AS BLOB)`)
		}, want{kind: audit.SealWrong, first: 0, last: 49, others: []audit.FindingKind{audit.SealWrong}}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := filepath.Join(t.TempDir(), "journal")
			copyDir(t, original, dir)
			c.do(t, dir)
			r := verify(t, dir, audit.Options{LogKey: key.Public()})
			found := slices.IndexFunc(r.Findings, func(f audit.Finding) bool {
				return f.Kind == c.want.kind && (c.want.kind == audit.CheckpointRemoved || c.want.kind == audit.CheckpointInvalid ||
					f.Kind == audit.HistoryRewritten && f.Sequence <= c.want.first && f.Through >= c.want.first && f.Through-f.Sequence < 15 ||
					f.Sequence == c.want.first && (c.want.last == 0 || f.Through == c.want.last))
			})
			if found < 0 {
				t.Fatalf("findings = %s, want %s at %d…%d", list(r), c.want.kind, c.want.first, c.want.last)
			}
			if f := r.Findings[found]; f.Detail == "" || f.DetailZH == "" {
				t.Errorf("finding without words: %+v", f)
			}
			for i, f := range r.Findings {
				if i != found && (c.want.nothingBeside || !slices.Contains(c.want.others, f.Kind)) {
					t.Errorf("also found %s at %d…%d: %s", f.Kind, f.Sequence, f.Through, f.Detail)
				}
			}
		})
	}
}

func list(r *audit.Report) string {
	var b strings.Builder
	for _, f := range r.Findings {
		fmt.Fprintf(&b, "\n  %s at %d…%d: %s", f.Kind, f.Sequence, f.Through, f.Detail)
	}
	return b.String()
}

// rewrite changes one entry of the last segment and computes everything that follows from it again, as somebody who
// can write the files, and has no key, would.
func rewrite(t *testing.T, dir string, seq int) {
	t.Helper()
	der, _ := forge(t, dir, seg3, seq)
	raw, _ := hex.DecodeString(der)
	db, err := sql.Open("sqlite3", filepath.Join(dir, seg3))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	exec := func(q string, args ...any) {
		t.Helper()
		if _, err := db.Exec(q, args...); err != nil {
			t.Fatal(err)
		}
	}
	hashAt := func(level, index int) audit.Hash {
		t.Helper()
		var h []byte
		file := seg3
		if last := (index+1)<<level - 1; last < 50 {
			file = seg1
		} else if last < 100 {
			file = seg2
		}
		other, err := sql.Open("sqlite3", filepath.Join(dir, file))
		if err != nil {
			t.Fatal(err)
		}
		defer other.Close()
		q, args := `SELECT node_hash FROM yj_node WHERE node_no = `+nodeNo(level, index), []any(nil)
		if level == 0 {
			q, args = `SELECT leaf_hash FROM yj_entry WHERE seq_no = ?`, []any{index}
		}
		if err := other.QueryRow(q, args...).Scan(&h); err != nil {
			t.Fatal(err)
		}
		return audit.Hash(h)
	}
	leaf := audit.LeafHash(raw)
	exec(`UPDATE yj_entry SET entry_der = ?, leaf_hash = ? WHERE seq_no = ?`, raw, leaf[:], seq)
	for level, index := 1, seq>>1; (index+1)<<level <= 131; level, index = level+1, index>>1 {
		h := audit.NodeHash(hashAt(level-1, 2*index), hashAt(level-1, 2*index+1))
		exec(`UPDATE yj_node SET node_hash = ? WHERE node_no = `+nodeNo(level, index), h[:])
	}
	for s := seq; s <= 130; s++ {
		var before []byte
		if err := db.QueryRow(`SELECT chain_hash FROM yj_entry WHERE seq_no = ?`, s-1).Scan(&before); err != nil {
			t.Fatal(err)
		}
		l := hashAt(0, s)
		c := audit.ChainHash(audit.Hash(before), l)
		exec(`UPDATE yj_entry SET chain_hash = ? WHERE seq_no = ?`, c[:], s)
	}
}

// What no signed root covers is not vouched for, and the report says from when it is; a token tells of the checkpoint
// that it was made for.
func TestLastCheckpointRemoved(t *testing.T) {
	t.Parallel()
	key := newLogKey(t)
	dir, last := written(t, key)
	clock := newClock()
	clock.jump(time.Hour)
	j := start(t, openStore(t, dir, segments50), func(c *audit.Config) { c.Clock = clock }) // nobody signs
	appendN(t, j.Journal, 500, 3)
	clock.jump(20 * time.Second)
	appendN(t, j.Journal, 600, 3)
	j.stop()
	remarks := func(r *audit.Report, wants ...string) {
		t.Helper()
		all := strings.Join(r.Remarks, "\n")
		for _, want := range wants {
			if !strings.Contains(all, want) {
				t.Errorf("the remarks do not say %q:\n%s", want, all)
			}
		}
	}
	r := verify(t, dir, audit.Options{LogKey: key.Public()})
	if !r.OK() || r.Uncovered != 6 || r.UncoveredMicros < 20_000_000 {
		t.Errorf("%d uncovered over %d µs, findings%s", r.Uncovered, r.UncoveredMicros, list(r))
	}
	remarks(r, "entries 131 to 136 are under no checkpoint", "covers 131 and was signed at 2026-03-01T08:00:0", "from 2026-03-01T09:00:00Z to 2026-03-01T09:00:20Z", "checkpoints were removed")

	edit(t, dir, seg3, fmt.Sprintf(`DELETE FROM yj_checkpoint WHERE tree_size = %d`, last.Size))
	r = verify(t, dir, audit.Options{LogKey: key.Public()})
	if !r.OK() || r.CoveredTo >= 131 {
		t.Errorf("covered to %d, findings%s", r.CoveredTo, list(r))
	}
	remarks(r, fmt.Sprintf("entries %d to 136 are under no checkpoint", r.CoveredTo), "longer than a checkpoint takes")
	edit(t, dir, seg3, fmt.Sprintf(`INSERT INTO yj_checkpoint_token (tree_size, token_der) VALUES (%d, x'3000')`, last.Size))
	r = verify(t, dir, audit.Options{LogKey: key.Public()})
	if len(r.Findings) != 1 || r.Findings[0].Kind != audit.CheckpointRemoved || r.Findings[0].Sequence != last.Size {
		t.Errorf("with its token left: %s, want %s", list(r), audit.CheckpointRemoved)
	}
}

// Somebody changes an entry, its leaf hash and chain hashes as far as he likes, but not the nodes above. What is named
// contains that entry, and beside it at most the one under the same node.
func TestChangedWithLeafAndChain(t *testing.T) {
	t.Parallel()
	key := newLogKey(t)
	original, _ := written(t, key)
	for _, seq := range []int{70, 71, 74, 97, 98, 99, 100, 101, 116, 117, 129, 130} {
		for _, rows := range []int{0, 1, 2, 3, 1000} { // whose chain hash he computes again
			if seq == 130 && rows == 0 {
				continue // in TestTampering
			}
			t.Run(fmt.Sprintf("%d/%d", seq, rows), func(t *testing.T) {
				t.Parallel()
				dir := filepath.Join(t.TempDir(), "journal")
				copyDir(t, original, dir)
				file, last := seg3, 130
				if seq < 100 {
					file, last = seg2, 99
				}
				der, leaf := forge(t, dir, file, seq)
				edit(t, dir, file, `UPDATE yj_entry SET entry_der = x'`+der+`', leaf_hash = x'`+leaf+`' WHERE seq_no = `+fmt.Sprint(seq))
				rechain(t, dir, file, seq, min(seq+rows-1, last))
				r := verify(t, dir, audit.Options{LogKey: key.Public()})
				named := 0
				for _, f := range r.Findings {
					switch f.Kind {
					case audit.EntryChanged:
						named++
						if uint64(seq) < f.Sequence || uint64(seq) > f.Through || f.Sequence>>1 != f.Through>>1 {
							t.Errorf("entry %d was changed, named is %d…%d", seq, f.Sequence, f.Through)
						}
					case audit.HistoryRewritten:
						if uint64(seq) < f.Sequence || uint64(seq) > f.Through {
							t.Errorf("entry %d was changed, rewritten is %d…%d", seq, f.Sequence, f.Through)
						} else if seq == 130 {
							named++ // the last one has nothing above it but the signed root
						}
					case audit.SealWrong:
					case audit.ChainChanged: // the chain goes on from the old hash
						if seq+rows <= last || file == seg3 || f.Sequence != 100 {
							t.Errorf("the chain at %d: %s", f.Sequence, f.Detail)
						}
					default:
						t.Errorf("also found %s at %d…%d: %s", f.Kind, f.Sequence, f.Through, f.Detail)
					}
				}
				if named != 1 {
					t.Errorf("entry %d was named %d times:%s", seq, named, list(r))
				}
			})
		}
	}
}

// A node that was changed is named as a node, also where an entry near it was changed.
func TestChangedNodeBesideAnEntry(t *testing.T) {
	t.Parallel()
	key := newLogKey(t)
	dir, _ := written(t, key)
	edit(t, dir, seg2, `UPDATE yj_node SET node_hash = zeroblob(32) WHERE node_no = `+nodeNo(1, 32))
	der, leaf := forge(t, dir, seg2, 74)
	edit(t, dir, seg2, `UPDATE yj_entry SET entry_der = x'`+der+`', leaf_hash = x'`+leaf+`' WHERE seq_no = 74`)
	r := verify(t, dir, audit.Options{LogKey: key.Public()})
	var got []string
	for _, f := range r.Findings {
		got = append(got, fmt.Sprint(f.Kind, " ", f.Sequence, " ", f.Through))
	}
	slices.Sort(got)
	if want := []string{"entry-changed 74 74", "node-changed 64 65", "seal-wrong 50 99"}; !slices.Equal(got, want) {
		t.Errorf("found %q, want %q", got, want)
	}
}

// rechain computes the chain hashes of the rows from to through again.
func rechain(t *testing.T, dir, file string, from, through int) {
	t.Helper()
	db, err := sql.Open("sqlite3", filepath.Join(dir, file))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	var chain []byte
	if err := db.QueryRow(`SELECT chain_hash FROM yj_entry WHERE seq_no = ?`, from-1).Scan(&chain); err != nil {
		before, err := sql.Open("sqlite3", filepath.Join(dir, seg2)) // the segment's first entry
		if err != nil {
			t.Fatal(err)
		}
		defer before.Close()
		if err := before.QueryRow(`SELECT chain_hash FROM yj_entry WHERE seq_no = ?`, from-1).Scan(&chain); err != nil {
			t.Fatal(err)
		}
	}
	for seq := from; seq <= through; seq++ {
		var leaf []byte
		if err := db.QueryRow(`SELECT leaf_hash FROM yj_entry WHERE seq_no = ?`, seq).Scan(&leaf); err != nil {
			t.Fatal(err)
		}
		h := audit.ChainHash(audit.Hash(chain), audit.Hash(leaf))
		chain = h[:]
		if _, err := db.Exec(`UPDATE yj_entry SET chain_hash = ? WHERE seq_no = ?`, chain, seq); err != nil {
			t.Fatal(err)
		}
	}
}

// forgeTail adds an entry with its right number and leaf after the last one.
func forgeTail(t *testing.T, dir string) {
	t.Helper()
	der, _ := forge(t, dir, seg3, 130)
	raw, _ := hex.DecodeString(der)
	e, err := audit.ParseEntry(raw)
	if err != nil {
		t.Fatal(err)
	}
	e.Sequence = 131
	e.Payloads = nil
	if raw, err = e.Marshal(); err != nil {
		t.Fatal(err)
	}
	leaf := audit.LeafHash(raw)
	db, err := sql.Open("sqlite3", filepath.Join(dir, seg3))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if _, err := db.Exec(`INSERT INTO yj_entry (seq_no, kind_name, ref_hash, change_flag, leaf_hash, chain_hash, entry_der) VALUES (131, ?, ?, 0, ?, zeroblob(32), ?)`,
		e.Kind, e.Ref, leaf[:], raw); err != nil {
		t.Fatal(err)
	}
}

// An old copy of the whole folder agrees with itself. Only a checkpoint kept elsewhere tells.
func TestRollbackIsFoundWithAKnownCheckpoint(t *testing.T) {
	t.Parallel()
	key := newLogKey(t)
	dir, _ := written(t, key)
	old := filepath.Join(t.TempDir(), "old")
	copyDir(t, dir, old)
	j := start(t, openStore(t, dir, segments50), func(c *audit.Config) { c.Checkpointer = key })
	r := appendN(t, j.Journal, 500, 5)
	later, err := j.WaitCheckpoint(t.Context(), r.Sequence)
	if err != nil {
		t.Fatal(err)
	}
	j.stop()
	if r := verify(t, old, audit.Options{LogKey: key.Public()}); !r.OK() {
		t.Errorf("without the checkpoint: %s", list(r))
	}
	rep := verify(t, old, audit.Options{LogKey: key.Public(), Known: []audit.Checkpoint{later}})
	if len(rep.Findings) != 1 || rep.Findings[0].Kind != audit.RolledBack {
		t.Errorf("with it: %s, want %s", list(rep), audit.RolledBack)
	}
	// Going on from the old copy makes another history; the checkpoint tells that too.
	j = start(t, openStore(t, old, segments50), func(c *audit.Config) { c.Checkpointer = key })
	appendN(t, j.Journal, 700, 20)
	j.stop()
	rep = verify(t, old, audit.Options{LogKey: key.Public(), Known: []audit.Checkpoint{later}})
	if len(rep.Findings) != 1 || rep.Findings[0].Kind != audit.HistoryRewritten {
		t.Errorf("another history: %s, want %s", list(rep), audit.HistoryRewritten)
	}
}

// Opening the journal checks the end of it; a journal cut off below its checkpoint does not open.
func TestOpenRefusesADamagedEnd(t *testing.T) {
	t.Parallel()
	key := newLogKey(t)
	original, _ := written(t, key)
	for name, stmts := range map[string][]string{
		"cut off":              {`DELETE FROM yj_entry WHERE seq_no > 120`},
		"last entry changed":   {`UPDATE yj_entry SET entry_der = CAST(entry_der || x'00' AS BLOB) WHERE seq_no = 130`},
		"last leaf changed":    {`UPDATE yj_entry SET leaf_hash = zeroblob(32) WHERE seq_no = 130`},
		"edge of the tree":     {`UPDATE yj_node SET node_hash = zeroblob(32) WHERE node_no % 64 = 7`},
		"checkpoint by nobody": {`UPDATE yj_checkpoint SET note_sig = zeroblob(70) WHERE tree_size = 131`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := filepath.Join(t.TempDir(), "journal")
			copyDir(t, original, dir)
			edit(t, dir, seg3, stmts...)
			s := openStore(t, dir, segments50)
			_, err := audit.Open(t.Context(), audit.Config{
				Store: s, Node: "east", Clock: newClock(), Log: quiet(), LogKeys: []crypto.PublicKey{key.Public()},
			})
			if err == nil || !strings.Contains(err.Error(), audit.ErrCorrupt.Error()) {
				t.Errorf("Open = %v, want %v", err, audit.ErrCorrupt)
			}
		})
	}
}

// A change of state whose mark was cleared, or whose entry was changed with its hashes, is not replayed over.
func TestStateIsProved(t *testing.T) {
	t.Parallel()
	key := newLogKey(t)
	original := filepath.Join(t.TempDir(), "journal")
	j := start(t, openStore(t, original, nil), func(c *audit.Config) { c.Checkpointer = key })
	for i := range 40 {
		d := signDraft(i)
		d.State = i%4 == 0
		if _, err := j.Append(t.Context(), d); err != nil {
			t.Fatal(err)
		}
	}
	j.stop()
	for name, do := range map[string]func(t *testing.T, dir string){
		"mark cleared": func(t *testing.T, dir string) {
			edit(t, dir, seg1, `UPDATE yj_entry SET change_flag = 0 WHERE seq_no = 9`)
		},
		"last mark cleared": func(t *testing.T, dir string) {
			edit(t, dir, seg1, `UPDATE yj_entry SET change_flag = 0 WHERE seq_no = 37`)
		},
		"row deleted": func(t *testing.T, dir string) { edit(t, dir, seg1, `DELETE FROM yj_entry WHERE seq_no = 9`) },
		"changed with its hash": func(t *testing.T, dir string) {
			der, leaf := forge(t, dir, seg1, 9)
			edit(t, dir, seg1, `UPDATE yj_entry SET entry_der = x'`+der+`', leaf_hash = x'`+leaf+`' WHERE seq_no = 9`)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := filepath.Join(t.TempDir(), "journal")
			copyDir(t, original, dir)
			do(t, dir)
			s := openStore(t, dir, nil)
			j, err := audit.Open(t.Context(), audit.Config{Store: s, Node: "east", Clock: newClock(), Log: quiet()})
			if err == nil {
				err = j.State(t.Context(), func(audit.Record) error { return nil })
			}
			if err == nil || !strings.Contains(err.Error(), audit.ErrCorrupt.Error()) {
				t.Errorf("State = %v, want %v", err, audit.ErrCorrupt)
			}
		})
	}
}

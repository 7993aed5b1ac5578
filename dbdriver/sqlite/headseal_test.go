package sqlite_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/hmac"
	"database/sql"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/emmansun/gmsm/sm3"

	"yinjian/appliance/audit"
	"yinjian/dbdriver/sqlite"
)

// sealKey is the key that does not leave the cipher machine, as Sealer.
type sealKey string

func (k sealKey) MAC(_ context.Context, data []byte) ([]byte, error) {
	m := hmac.New(sm3.New, []byte(k))
	m.Write(data)
	return m.Sum(nil), nil
}

const childSeal = sealKey("the key of the children's seals")

// A row as the forger keeps it.
type forgedRow struct {
	kind   string
	ref    []byte
	change int
	der    []byte
}

// forgeFile is what somebody does who can write the journal's only file and has no key: he changes the rows, computes
// every hash again and drops the checkpoints over more than keep entries, their tokens, and payloads without an entry.
func forgeFile(t *testing.T, dir string, keep int, change func(rows []forgedRow) []forgedRow) {
	t.Helper()
	db, err := sql.Open("sqlite3", filepath.Join(dir, seg1))
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
	q, err := db.Query(`SELECT kind_name, ref_hash, change_flag, entry_der FROM yj_entry ORDER BY seq_no`)
	if err != nil {
		t.Fatal(err)
	}
	var rows []forgedRow
	for q.Next() {
		var r forgedRow
		if err := q.Scan(&r.kind, &r.ref, &r.change, &r.der); err != nil {
			t.Fatal(err)
		}
		rows = append(rows, r)
	}
	q.Close()
	rows = change(rows)
	exec(`DELETE FROM yj_entry`)
	exec(`DELETE FROM yj_node`)
	exec(`CREATE TEMP TABLE used (sum BLOB)`)
	var chain audit.Hash
	var pending [64]audit.Hash
	for i, r := range rows {
		leaf := audit.LeafHash(r.der)
		chain = audit.ChainHash(chain, leaf)
		exec(`INSERT INTO yj_entry (seq_no, kind_name, ref_hash, change_flag, leaf_hash, chain_hash, entry_der) VALUES (?, ?, ?, ?, ?, ?, ?)`,
			i, r.kind, r.ref, r.change, leaf[:], chain[:], r.der)
		level, h := 0, leaf
		for n := i; n&1 == 1; n >>= 1 {
			h = audit.NodeHash(pending[level], h)
			level++
			exec(`INSERT INTO yj_node (node_no, node_hash) VALUES (`+nodeNo(level, i>>level)+`, ?)`, h[:])
		}
		pending[level] = h
		e := entryOf(t, r)
		for _, p := range e.Payloads {
			exec(`INSERT INTO used VALUES (?)`, p.SM3[:])
		}
	}
	exec(`DELETE FROM yj_blob WHERE blob_sm3 NOT IN (SELECT sum FROM used)`)
	exec(`DELETE FROM yj_checkpoint WHERE tree_size > ?`, keep)
	exec(`DELETE FROM yj_checkpoint_token WHERE tree_size > ?`, keep)
}

func entryOf(t *testing.T, r forgedRow) *audit.Entry {
	t.Helper()
	e, err := audit.ParseEntry(r.der)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func (r *forgedRow) set(t *testing.T, e *audit.Entry) {
	t.Helper()
	var err error
	if r.der, err = e.Marshal(); err != nil {
		t.Fatal(err)
	}
}

// sealedJournal makes a journal with a seal, 21 entries: the epoch, four changes of state (numbers 1, 6, 11, 16), and
// signatures.
func sealedJournal(t *testing.T, dir string, key logKey, change func(*audit.Config)) audit.Checkpoint {
	t.Helper()
	j := start(t, openStore(t, dir, nil), func(c *audit.Config) {
		c.Checkpointer, c.Sealer = key, childSeal
		if change != nil {
			change(c)
		}
	})
	var early audit.Checkpoint
	for i := range 20 {
		d := signDraft(i)
		d.State = i%5 == 0
		r, err := j.Append(t.Context(), d)
		if err != nil {
			t.Fatal(err)
		}
		if i == 4 {
			if early, err = j.WaitCheckpoint(t.Context(), r.Sequence); err != nil {
				t.Fatal(err)
			}
		}
	}
	if n := j.SealedTo(); n != 21 {
		t.Fatalf("%d entries are sealed, want 21", n)
	}
	j.stop()
	return early
}

func openSealed(t *testing.T, dir string, key logKey, change func(*audit.Config)) (*audit.Journal, *sqlite.Journal, error) {
	t.Helper()
	s := openStore(t, dir, nil)
	cfg := audit.Config{
		Store: s, Node: "east", Clock: newClock(), Log: quiet(), Checkpointer: key, Sealer: childSeal, LogKeys: []crypto.PublicKey{key.Public()},
		UnsealedOK: func(e *audit.Entry) bool { return e.Kind == "time.state" },
	}
	if change != nil {
		change(&cfg)
	}
	j, err := audit.Open(t.Context(), cfg)
	return j, s, err
}

// Whoever can write the files, and has no key, changes what comes after a checkpoint and drops the later checkpoints:
// offline that part cannot be judged, and the report says so; the appliance does not start on it, nor sign over it.
func TestForgedEndIsRefused(t *testing.T) {
	t.Parallel()
	key := newLogKey(t)
	original := filepath.Join(t.TempDir(), "journal")
	early := sealedJournal(t, original, key, nil)
	keep := int(early.Size)
	if r := verify(t, original, audit.Options{LogKey: key.Public(), Sealer: childSeal}); !r.OK() || !r.Covered || !r.HeadSealChecked {
		t.Fatalf("before: covered %v, findings%s", r.Covered, list(r))
	}
	for name, do := range map[string]func(t *testing.T, dir string){
		"an entry edited": func(t *testing.T, dir string) {
			forgeFile(t, dir, keep, func(rows []forgedRow) []forgedRow {
				e := entryOf(t, rows[12])
				e.Object = "signer/forged"
				rows[12].set(t, e)
				return rows
			})
		},
		"the end cut off": func(t *testing.T, dir string) {
			forgeFile(t, dir, keep, func(rows []forgedRow) []forgedRow { return rows[:15] })
		},
		"cut off to a checkpoint": func(t *testing.T, dir string) {
			forgeFile(t, dir, keep, func(rows []forgedRow) []forgedRow { return rows[:keep] })
		},
		"a change of state appended": func(t *testing.T, dir string) {
			forgeFile(t, dir, keep, func(rows []forgedRow) []forgedRow {
				e := entryOf(t, rows[16])
				e.Sequence = uint64(len(rows))
				e.Object = "policy/loosened"
				for i, f := range e.Fields {
					if f.Name == "journal.change" {
						e.Fields[i].Value = audit.Int(5)
					}
				}
				r := rows[16]
				r.set(t, e)
				return append(rows, r)
			})
		},
		"an entry of a kind that is let through, in place of others": func(t *testing.T, dir string) {
			forgeFile(t, dir, keep, func(rows []forgedRow) []forgedRow {
				for i := 17; i < len(rows); i++ {
					e := entryOf(t, rows[i])
					e.Kind, rows[i].kind = "time.state", "time.state"
					rows[i].set(t, e)
				}
				return rows
			})
		},
		"a change's mark cleared": func(t *testing.T, dir string) {
			edit(t, dir, seg1, `UPDATE yj_entry SET change_flag = 0 WHERE seq_no = 16`, fmt.Sprintf(`DELETE FROM yj_checkpoint WHERE tree_size > %d`, keep))
		},
		"entry, leaf and nodes, not the chain": func(t *testing.T, dir string) {
			db, err := sql.Open("sqlite3", filepath.Join(dir, seg1))
			if err != nil {
				t.Fatal(err)
			}
			defer db.Close()
			var last []byte
			if err := db.QueryRow(`SELECT chain_hash FROM yj_entry WHERE seq_no = 20`).Scan(&last); err != nil {
				t.Fatal(err)
			}
			forgeFile(t, dir, keep, func(rows []forgedRow) []forgedRow {
				e := entryOf(t, rows[12])
				e.Object = "signer/forged"
				rows[12].set(t, e)
				return rows
			})
			if _, err := db.Exec(`UPDATE yj_entry SET chain_hash = ? WHERE seq_no = 20`, last); err != nil {
				t.Fatal(err)
			}
		},
		"the seal removed": func(t *testing.T, dir string) { edit(t, dir, seg1, `DELETE FROM yj_head_seal`) },
		"the seal replaced": func(t *testing.T, dir string) {
			edit(t, dir, seg1, `UPDATE yj_head_seal SET head_mac = zeroblob(32)`)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := filepath.Join(t.TempDir(), "journal")
			copyDir(t, original, dir)
			do(t, dir)
			if r := verify(t, dir, audit.Options{LogKey: key.Public()}); name != "the seal removed" && name != "the seal replaced" && r.OK() && r.Covered && name != "cut off to a checkpoint" {
				t.Errorf("offline: all %d entries are said to be covered and unchanged", r.Entries)
			}
			r := verify(t, dir, audit.Options{LogKey: key.Public(), Sealer: childSeal})
			if n := len(r.Findings); n == 0 || r.Findings[n-1].Kind != audit.HeadSealWrong && r.Findings[n-1].Kind != audit.ColumnChanged {
				t.Errorf("with the key: %s, want %s", list(r), audit.HeadSealWrong)
			}
			_, s, err := openSealed(t, dir, key, nil)
			if !errors.Is(err, audit.ErrUnsealed) {
				t.Errorf("Open = %v, want ErrUnsealed", err)
			}
			if c, err := s.LastCheckpoint(t.Context()); err != nil || name != "the seal removed" && name != "the seal replaced" && int(c.Size) != keep {
				t.Errorf("after the refusal the last checkpoint is of size %d: %v", c.Size, err)
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			// The operator's marker opens it, and that is recorded.
			j, _, err := openSealed(t, dir, key, func(c *audit.Config) { c.NewEpoch = true })
			if err != nil {
				t.Fatalf("with the operator's marker: %v", err)
			}
			rec, err := j.Entry(t.Context(), j.Size()-1)
			if err != nil || rec.Entry.Kind != audit.KindEpoch {
				t.Fatalf("last entry: %v, %v", rec.Entry.Kind, err)
			}
			if _, ok := rec.Entry.Field("journal.unsealed_from").(audit.Int); !ok {
				t.Error("the epoch's entry does not say from where the journal was unsealed")
			}
			if j.SealedTo() != j.Size() {
				t.Errorf("%d of %d entries sealed", j.SealedTo(), j.Size())
			}
		})
	}
}

// A journal that was never sealed is not opened with a Sealer, but for an operator; one that is stopped is sealed and
// covered.
func TestCleanStopIsSealedAndCovered(t *testing.T) {
	t.Parallel()
	key := newLogKey(t)
	dir := filepath.Join(t.TempDir(), "journal")
	j := start(t, openStore(t, dir, segments50), func(c *audit.Config) {
		c.Checkpointer, c.Sealer, c.CheckpointEvery = key, childSeal, time.Second
	})
	for i := range 3 {
		appendN(t, j.Journal, 60*i, 60) // over the ends of segments
	}
	j.stop()
	r := verify(t, dir, audit.Options{LogKey: key.Public(), Sealer: childSeal})
	if !r.OK() || !r.Covered || !r.HeadSealChecked || r.Segments < 3 {
		t.Errorf("covered %v, %d segments, findings%s", r.Covered, r.Segments, list(r))
	}
	for _, file := range []string{seg1, seg2} { // only the active segment has the seal
		db, err := sql.Open("sqlite3", filepath.Join(dir, file))
		if err != nil {
			t.Fatal(err)
		}
		var n int
		if err := db.QueryRow(`SELECT COUNT(*) FROM yj_head_seal`).Scan(&n); err != nil || n != 0 {
			t.Errorf("%s has %d seals: %v", file, n, err)
		}
		db.Close()
	}
	never := filepath.Join(t.TempDir(), "never")
	written, _ := written(t, key)
	copyDir(t, written, never)
	if _, _, err := openSealed(t, never, key, nil); !errors.Is(err, audit.ErrUnsealed) {
		t.Errorf("never sealed: Open = %v, want ErrUnsealed", err)
	}
}

// A segment that somebody reads while its head seal is to be removed loses it later: with it, what came after could be taken
// away unseen.
func TestHeadSealOfAReadSegment(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "journal")
	var reader *sql.Tx
	store := openStore(t, dir, func(c *sqlite.JournalConfig) {
		c.SegmentEntries = 10
		sqlite.SetFault(c, func(step string) {
			if step != "roll/finished" || reader != nil {
				return
			}
			var n int
			var err error
			if reader, err = raw(t, filepath.Join(dir, seg1)).Begin(); err == nil {
				err = reader.QueryRow(`SELECT COUNT(*) FROM yj_entry`).Scan(&n)
			}
			if err != nil {
				t.Error(err)
			}
		})
	})
	seals := func() (n int) {
		t.Helper()
		db := raw(t, filepath.Join(dir, seg1))
		defer db.Close()
		if err := db.QueryRow(`SELECT COUNT(*) FROM yj_head_seal`).Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	j := start(t, store, func(c *audit.Config) { c.Checkpointer, c.Sealer = newLogKey(t), childSeal })
	appendN(t, j.Journal, 0, 12)
	if n := seals(); n != 1 {
		t.Fatalf("while it is read it has %d head seals", n)
	}
	if err := reader.Rollback(); err != nil {
		t.Fatal(err)
	}
	appendN(t, j.Journal, 12, 10)
	if n := seals(); n != 0 {
		t.Errorf("after the next roll it has %d head seals", n)
	}
}

// The process is killed at random points; each batch has its seal, so the next start needs nobody.
func TestKillWithSeals(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "journal")
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 2))
	acks := map[uint64]string{}
	for k := range 12 {
		cmd, out := child(t, "append", dir, fmt.Sprintf("YJ_BASE=%d", (k+1)*1_000_000), "YJ_SEAL=1")
		after, delay := 1+rnd.IntN(120), time.Duration(rnd.IntN(3000))*time.Microsecond
		readAcks(t, out, acks, func(n int) {
			if n == after {
				time.Sleep(delay)
				cmd.Process.Kill()
			}
		})
		if err := cmd.Wait(); err == nil || cmd.ProcessState.ExitCode() == 3 {
			t.Fatalf("run %d ended by itself: %v", k, err)
		}
	}
	j := start(t, openStore(t, dir, segments50), func(c *audit.Config) { c.Checkpointer, c.Sealer = childKey(), childSeal })
	j.stop()
	r := verify(t, dir, audit.Options{LogKey: childKey().Public(), Sealer: childSeal})
	if !r.OK() || !r.Covered || len(acks) < 12 {
		t.Errorf("%d receipts, covered %v, findings%s", len(acks), r.Covered, list(r))
	}
}

// The process is killed at each step of rolling: the seal is there.
func TestKillWhileRollingWithSeals(t *testing.T) {
	t.Parallel()
	for _, step := range []string{"roll/sealed", "roll/finished", "create/built", "create/renamed", "create/opened"} {
		t.Run(step, func(t *testing.T) {
			t.Parallel()
			dir := filepath.Join(t.TempDir(), "journal")
			j := start(t, openStore(t, dir, func(c *sqlite.JournalConfig) { c.SegmentEntries = 20 }), func(c *audit.Config) { c.Checkpointer, c.Sealer = childKey(), childSeal })
			appendN(t, j.Journal, 0, 5)
			j.stop()
			cmd, out := child(t, "append", dir, "YJ_BASE=1000", "YJ_SEGMENT=20", "YJ_SEAL=1", "YJ_STEP="+step)
			readAcks(t, out, map[uint64]string{}, func(int) {})
			if err := cmd.Wait(); err == nil || cmd.ProcessState.ExitCode() == 3 {
				t.Fatalf("the child did not die at %s: %v", step, err)
			}
			j = start(t, openStore(t, dir, func(c *sqlite.JournalConfig) { c.SegmentEntries = 20 }), func(c *audit.Config) { c.Checkpointer, c.Sealer = childKey(), childSeal })
			appendN(t, j.Journal, 5000, 30)
			j.stop()
			if r := verify(t, dir, audit.Options{LogKey: childKey().Public(), Sealer: childSeal}); !r.OK() || !r.Covered {
				t.Errorf("covered %v, findings%s", r.Covered, list(r))
			}
		})
	}
}

// The file holds the last head seal and nothing of those before, whatever the lengths of their numbers.
func TestOldHeadSealsAreGone(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "journal")
	keep := new(keepingMAC)
	j := start(t, openStore(t, dir, nil), func(c *audit.Config) { c.Sealer = keep })
	for i := range 300 { // 1, then 127, then 255 entries
		appendN(t, j.Journal, i, 1)
	}
	j.stop()
	file, err := os.ReadFile(filepath.Join(dir, seg1))
	if err != nil {
		t.Fatal(err)
	}
	last := keep.made[len(keep.made)-1]
	if !bytes.Contains(file, last) {
		t.Error("the last head seal is not in the file: this test looks for the wrong bytes")
	}
	for i, mac := range keep.made {
		// A hole's first bytes are its bookkeeping.
		if !bytes.Equal(mac, last) && bytes.Contains(file, mac[8:]) {
			t.Errorf("seal %d of %d is still in the file", i, len(keep.made))
		}
	}
}

// keepingMAC remembers what it made.
type keepingMAC struct {
	mu   sync.Mutex
	made [][]byte // guarded by mu
}

func (k *keepingMAC) MAC(ctx context.Context, data []byte) ([]byte, error) {
	mac, err := childSeal.MAC(ctx, data)
	k.mu.Lock()
	defer k.mu.Unlock()
	k.made = append(k.made, mac)
	return mac, err
}

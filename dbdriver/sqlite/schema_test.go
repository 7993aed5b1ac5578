package sqlite_test

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"yinjian/appliance/audit"
	"yinjian/dbdriver"
	"yinjian/dbdriver/central"
	"yinjian/dbdriver/dbtest"
	"yinjian/dbdriver/sqlite"
)

// plant runs statements that touch no row.
func plant(t testing.TB, dir, file string, stmts ...string) {
	t.Helper()
	db := raw(t, filepath.Join(dir, file))
	defer db.Close()
	for _, s := range stmts {
		if _, err := db.Exec(s); err != nil {
			t.Fatalf("%s: %v", s, err)
		}
	}
}

// planted are changes of a journal file's schema, and the words that name them.
var planted = map[string]struct{ stmt, names string }{
	"a trigger that swallows":   {`CREATE TRIGGER t BEFORE INSERT ON yj_entry WHEN new.kind_name = 'sign.v1' BEGIN SELECT RAISE(IGNORE); END`, `trigger "t" on "yj_entry"`},
	"a trigger that overwrites": {`CREATE TRIGGER u AFTER INSERT ON yj_blob BEGIN UPDATE yj_blob SET blob_data = x'00' WHERE row_no = new.row_no; END`, `trigger "u" on "yj_blob"`},
	"a view":                    {`CREATE VIEW v AS SELECT * FROM yj_entry`, `view "v"`},
	"a table":                   {`CREATE TABLE more (x)`, `table "more"`},
	"an index":                  {`CREATE UNIQUE INDEX i ON yj_entry (kind_name, seq_no)`, `index "i"`},
	"an index too few":          {`DROP INDEX yj_entry_ref`, `index yj_entry_ref is missing`},
	"a version":                 {`PRAGMA user_version = 7`, `user_version is 7`},
	"a column":                  {`ALTER TABLE yj_blob ADD COLUMN more TEXT`, `table yj_blob was changed`},
	"a table too few":           {`DROP TABLE yj_checkpoint_token`, `table yj_checkpoint_token is missing`},
	"a migration":               {`UPDATE yj_migration SET file_sm3 = 'x' WHERE migration_no = 2`, `migration 2,`},
	"a migration too many":      {`INSERT INTO yj_migration VALUES (99, 'x', 'y')`, `migration 99, "x"`},
	"a migration too few":       {`DELETE FROM yj_migration WHERE migration_no = 1`, `migration 1 is not in the list`},
}

// Whatever stands in a file beside what was made in it keeps the journal from being opened for writing, and the
// verifier names it; in the active segment and in a sealed one.
func TestPlantedSchema(t *testing.T) {
	t.Parallel()
	key := newLogKey(t)
	original, _ := written(t, key)
	for name, c := range planted {
		for _, file := range []string{seg1, seg3} {
			t.Run(name+" in "+file, func(t *testing.T) {
				t.Parallel()
				dir := filepath.Join(t.TempDir(), "journal")
				copyDir(t, original, dir)
				plant(t, dir, file, c.stmt)
				_, err := sqlite.OpenJournal(t.Context(), sqlite.JournalConfig{Dir: dir, SegmentEntries: 50})
				if !errors.Is(err, dbdriver.ErrDamaged) || !errors.Is(err, audit.ErrCorrupt) || !strings.Contains(err.Error(), c.names) {
					t.Errorf("OpenJournal = %v, want %v that names %s", err, dbdriver.ErrDamaged, c.names)
				}
				r := verify(t, dir, audit.Options{LogKey: key.Public()})
				want := map[string]int{seg1: 1, seg3: 3}[file]
				if !slices.ContainsFunc(r.Findings, func(f audit.Finding) bool {
					return f.Kind == audit.SchemaChanged && f.Segment == want && strings.Contains(f.Detail, c.names) && strings.Contains(f.DetailZH, c.names)
				}) {
					t.Errorf("findings = %s, want %s in segment %d that names %s", list(r), audit.SchemaChanged, want, c.names)
				}
			})
		}
	}
}

// A trigger planted while the appliance runs: nothing that it swallows or overwrites is acknowledged, and the journal
// closes for writing. Also if the file's schema cookie is put back.
func TestPlantedWhileRunning(t *testing.T) {
	t.Parallel()
	for name, c := range map[string][]string{
		"swallows":                 {planted["a trigger that swallows"].stmt},
		"overwrites":               {planted["a trigger that overwrites"].stmt},
		"view":                     {planted["a view"].stmt},
		"with the cookie put back": {planted["a trigger that swallows"].stmt, `PRAGMA schema_version = 9`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := filepath.Join(t.TempDir(), "journal")
			j := start(t, openStore(t, dir, nil), nil)
			appendN(t, j.Journal, 0, 3)
			size := j.Size()
			plant(t, dir, seg1, c...)
			if _, err := j.Append(t.Context(), signDraft(100)); !errors.Is(err, audit.ErrJournalFailed) {
				t.Errorf("Append = %v, want %v", err, audit.ErrJournalFailed)
			}
			if j.Size() != size {
				t.Errorf("the journal has %d entries, %d were acknowledged", j.Size(), size)
			}
			r, err := audit.Verify(t.Context(), j.store, audit.Options{})
			if err != nil || !slices.ContainsFunc(r.Findings, func(f audit.Finding) bool { return f.Kind == audit.SchemaChanged }) {
				t.Errorf("Verify beside it: %v, %s", err, list(r))
			}
			for _, put := range []func() error{
				func() error { return j.store.PutToken(t.Context(), 3, []byte("token")) },
				func() error {
					return j.store.PutCheckpoint(t.Context(), audit.StoredCheckpoint{Size: 3, Note: []byte("n"), Signature: []byte("s")})
				},
				func() error { return j.store.Roll(t.Context(), audit.Seal{Segment: 1, Last: size - 1, Count: size}) },
			} {
				if err := put(); !errors.Is(err, audit.ErrCorrupt) {
					t.Errorf("put = %v, want %v", err, audit.ErrCorrupt)
				}
			}
		})
	}
}

// A payload that is there already must be the same one.
func TestStoredPayloadIsRead(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "journal")
	j := start(t, openStore(t, dir, nil), nil)
	appendN(t, j.Journal, 0, 3) // certificates 0 to 2
	j.stop()
	edit(t, dir, seg1, `UPDATE yj_blob SET blob_data = x'00' WHERE blob_data = CAST('certificate 1' AS BLOB)`)
	j = start(t, openStore(t, dir, nil), nil)                      // forgets which digests it knows
	if _, err := j.Append(t.Context(), signDraft(7)); err != nil { // certificate 0
		t.Errorf("Append with a payload that is intact = %v", err)
	}
	if _, err := j.Append(t.Context(), signDraft(8)); !errors.Is(err, audit.ErrJournalFailed) { // certificate 1
		t.Errorf("Append with a payload that was changed = %v, want %v", err, audit.ErrJournalFailed)
	}
}

func TestPlantedInCentral(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	j := start(t, openStore(t, filepath.Join(dir, "journal"), nil), nil)
	appendN(t, j.Journal, 0, 3)
	file := filepath.Join(dir, "central.db")
	store := openCentral(t, file)
	dbtest.Ship(t, j.Journal, store, dbtest.CaughtUp)
	plant(t, dir, "central.db", `CREATE TRIGGER t BEFORE INSERT ON yj_record BEGIN SELECT RAISE(IGNORE); END`)
	appendN(t, j.Journal, 3, 1)
	st := dbtest.Ship(t, j.Journal, store, func(s audit.ShipperStatus) bool { return s.LastError != nil })
	if !errors.Is(st.LastError, dbdriver.ErrDamaged) {
		t.Errorf("the shipper says %v, want %v", st.LastError, dbdriver.ErrDamaged)
	}
	store.Close()
	if c, err := sqlite.OpenCentral(t.Context(), file, central.Author{Name: "test", Micros: 1}); !errors.Is(err, dbdriver.ErrDamaged) || !strings.Contains(err.Error(), `trigger "t"`) {
		t.Errorf("OpenCentral = %v, %v, want %v that names the trigger", c, err, dbdriver.ErrDamaged)
	}
}

func TestNothingToVerify(t *testing.T) {
	t.Parallel()
	key := newLogKey(t)
	original, _ := written(t, key)
	empty := t.TempDir()
	if s, err := sqlite.OpenJournal(t.Context(), sqlite.JournalConfig{Dir: empty, ReadOnly: true}); !errors.Is(err, dbdriver.ErrNotFound) {
		t.Errorf("OpenJournal of an empty folder = %v, %v, want %v", s, err, dbdriver.ErrNotFound)
	}
	// The first segment alone, with no rows left in any table, and one just made.
	for name, file := range map[string]string{"emptied": seg1, "made": ""} {
		dir := filepath.Join(t.TempDir(), "journal")
		if file == "" {
			openStore(t, dir, nil).Close()
		} else {
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			b, err := os.ReadFile(filepath.Join(original, file))
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, file), b, 0o600); err != nil {
				t.Fatal(err)
			}
			for _, table := range []string{"entry", "node", "blob", "checkpoint", "checkpoint_token"} {
				plant(t, dir, file, `DELETE FROM yj_`+table)
			}
			plant(t, dir, file, `UPDATE yj_segment SET seal_data = NULL`)
		}
		r := verify(t, dir, audit.Options{LogKey: key.Public()})
		if len(r.Findings) != 1 || r.Findings[0].Kind != audit.Empty {
			t.Errorf("%s: findings = %s, want %s", name, list(r), audit.Empty)
		}
	}
}

// The verifier hands each token with its checkpoint's signature to the check, and counts checkpoints without one.
func TestTokensAreChecked(t *testing.T) {
	t.Parallel()
	key := newLogKey(t)
	dir := filepath.Join(t.TempDir(), "journal")
	j := start(t, openStore(t, dir, segments50), func(c *audit.Config) { c.Checkpointer = key })
	var sizes []uint64
	for i := range 5 {
		c, err := j.WaitCheckpoint(t.Context(), appendN(t, j.Journal, i, 1).Sequence)
		if err != nil {
			t.Fatal(err)
		}
		sizes = append(sizes, c.Size)
	}
	var stored []audit.StoredCheckpoint
	if err := j.store.Checkpoints(t.Context(), 0, func(c audit.StoredCheckpoint) error { stored = append(stored, c); return nil }); err != nil {
		t.Fatal(err)
	}
	for _, c := range stored {
		sum := audit.Sum(c.Signature)
		if err := j.store.PutToken(t.Context(), c.Size, sum[:]); err != nil {
			t.Fatal(err)
		}
	}
	j.stop()
	// Here a token is the SM3 of the signature.
	opt := audit.Options{LogKey: key.Public(), CheckToken: func(signature, token []byte) error {
		if sum := audit.Sum(signature); string(sum[:]) != string(token) {
			return errors.New("another signature")
		}
		return nil
	}}
	n := uint64(len(stored))
	r := verify(t, dir, opt)
	if !r.OK() || r.Tokens != n || r.TokensChecked != n || r.WithoutToken != 0 {
		t.Fatalf("before: %+v", r)
	}
	for name, c := range map[string]struct {
		stmts   []string
		invalid []uint64
		without []uint64
	}{
		"replaced": {[]string{`UPDATE yj_checkpoint_token SET token_der = x'00' WHERE tree_size = ` + num(sizes[2])}, []uint64{sizes[2]}, nil},
		"swapped": {[]string{
			`UPDATE yj_checkpoint_token SET tree_size = -1 WHERE tree_size = ` + num(sizes[1]), `UPDATE yj_checkpoint_token SET tree_size = ` + num(sizes[1]) + ` WHERE tree_size = ` + num(sizes[3]),
			`UPDATE yj_checkpoint_token SET tree_size = ` + num(sizes[3]) + ` WHERE tree_size = -1`,
		}, []uint64{sizes[1], sizes[3]}, nil},
		"deleted": {[]string{`DELETE FROM yj_checkpoint_token WHERE tree_size IN (` + num(sizes[1]) + `, ` + num(sizes[3]) + `)`}, nil, []uint64{sizes[1], sizes[3]}},
		"emptied": {[]string{`UPDATE yj_checkpoint_token SET token_der = x'' WHERE tree_size = ` + num(sizes[1])}, nil, []uint64{sizes[1], sizes[1]}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			copied := filepath.Join(t.TempDir(), "journal")
			copyDir(t, dir, copied)
			edit(t, copied, seg1, c.stmts...)
			r := verify(t, copied, opt)
			var invalid []uint64
			for _, f := range r.Findings {
				if f.Kind == audit.TokenInvalid {
					invalid = append(invalid, f.Sequence)
				}
			}
			if !slices.Equal(invalid, c.invalid) || len(r.Findings) != len(c.invalid) {
				t.Errorf("findings = %s, want %s at %v", list(r), audit.TokenInvalid, c.invalid)
			}
			remark := slices.ContainsFunc(r.Remarks, func(m string) bool {
				return c.without != nil && strings.Contains(m, "have no timestamp token, the first of size "+num(c.without[0])+", the last of size "+num(c.without[1])+":")
			})
			if remark != (c.without != nil) || (r.WithoutToken > 0) != remark {
				t.Errorf("%d without token, remarks %q, want %v", r.WithoutToken, r.Remarks, c.without)
			}
		})
	}
}

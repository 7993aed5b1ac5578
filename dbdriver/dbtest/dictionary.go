package dbtest

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"yinjian/dbdriver/central"
)

// dictionary: a fresh database is as the data dictionary says, with its words where the database keeps them; every
// departure is named, and words come back with the next opening.
func dataDictionary(t *testing.T, fresh func(testing.TB) *Database) {
	t.Parallel()
	d := fresh(t)
	d.Open(t)
	diff := func() (out []string) {
		t.Helper()
		db := d.Pool(nil)
		defer db.Close()
		found, err := central.DiffDictionary(t.Context(), db, d.Seam())
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range found {
			out = append(out, fmt.Sprintf("%s %s.%s %s", f.Kind, f.Table, f.Column, f.Got))
		}
		return out
	}
	if got := diff(); len(got) > 0 {
		t.Errorf("a fresh database: %q", got)
	}
	d.Make(t, `CREATE TABLE yj_extra (extra_no BIGINT)`)
	d.Make(t, `ALTER TABLE yj_record ADD COLUMN added_text VARCHAR(10)`)
	d.Make(t, `DROP TABLE yj_batch`)
	d.Make(t, `CREATE TABLE yj_batch (node_id VARCHAR(64), epoch_id VARCHAR(16) NOT NULL, first_seq BIGINT NOT NULL, last_seq VARCHAR(20) NOT NULL, batch_mac VARCHAR(63) NOT NULL, created_by VARCHAR(64) NOT NULL, created_at BIGINT NOT NULL, modified_by VARCHAR(64) NOT NULL, modified_at BIGINT NOT NULL)`)
	of := func(words bool) []string {
		return slices.DeleteFunc(diff(), func(got string) bool { return strings.HasPrefix(got, "comment ") != words })
	}
	want := []string{
		"extra yj_record.added_text VARCHAR(10)", "null yj_batch.node_id NULL", "type yj_batch.last_seq VARCHAR(20)", "type yj_batch.batch_mac VARCHAR(63)",
		"missing yj_batch.mac_key_id ", "extra yj_extra. ",
	}
	if got := of(false); !slices.Equal(got, want) {
		t.Errorf("differences %q\nwant %q", got, want)
	}
	if !d.Seam().Comments {
		return
	}
	if d.Seam().Name == "postgres" {
		if got := of(true); len(got) != 10 { // of the table that was made anew
			t.Errorf("words that are missing: %q", got)
		}
		d.Make(t, `COMMENT ON COLUMN yj_record.signer_id IS 'x'`)
	}
	db := d.Pool(nil)
	defer db.Close()
	if err := central.Describe(t.Context(), db, d.Seam()); err != nil {
		t.Fatal(err)
	}
	if got := of(true); len(got) > 0 {
		t.Errorf("words that are still missing: %q", got)
	}
}

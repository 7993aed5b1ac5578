package dbtest

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"yinjian/appliance/audit"
	"yinjian/dbdriver/central"
)

// Change writes a change of state as the directory does, after its announcement.
func Change(t testing.TB, j *audit.Journal, object string, before, after any) {
	t.Helper()
	fields, err := audit.Changed(before, after)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range []audit.Draft{
		{Kind: "account.signer/intent", Actor: "local uid=0(root)", Object: object, State: true},
		{Kind: "account.signer/outcome", Actor: "local uid=0(root)", Object: object, State: true, Fields: append(fields, audit.Field{Name: audit.FieldReason, Value: audit.Text("离职")})},
	} {
		if _, err := j.Append(t.Context(), d); err != nil {
			t.Fatal(err)
		}
	}
}

// recorded is a journal with signatures and ten changes, shipped.
func recorded(t *testing.T, d *Database) (*audit.Journal, *central.Store) {
	t.Helper()
	j, _ := Journal(t, t.TempDir(), false)
	s := d.Open(t)
	Append(t, j, 0, 30)
	for i := range 10 {
		Change(t, j, fmt.Sprintf("D%d", i), map[string]bool{"stopped": false}, map[string]bool{"stopped": true})
	}
	Append(t, j, 100, 30)
	Ship(t, j, s, CaughtUp)
	return j, s
}

func sweepConfig(j *audit.Journal, s *central.Store) audit.SweepConfig {
	return audit.SweepConfig{Journal: j, Projection: s, Log: s, Sets: []audit.Set{audit.ChangesOf(s)}, MACs: Keys}
}

func sweep(t *testing.T, cfg audit.SweepConfig) *audit.SweepReport {
	t.Helper()
	r, err := audit.Sweep(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// changeLog: each change of state is a row, once, with its five parts, whenever the table was made.
func changeLog(t *testing.T, fresh func(testing.TB) *Database) {
	t.Parallel()
	d := fresh(t)
	j, s := recorded(t, d)
	list := func(object string, from, before int64) (out []audit.ProjectedChange) {
		t.Helper()
		if err := s.ListChanges(t.Context(), object, from, before, func(c audit.ProjectedChange) error { out = append(out, c); return nil }); err != nil {
			t.Fatal(err)
		}
		return out
	}
	all := list("", 0, 1<<62)
	if len(all) != 11 || all[0].Kind != audit.KindEpoch { // the announcements are none
		t.Fatalf("%d changes: %+v", len(all), all)
	}
	one := list("D3", 0, 1<<62)
	if len(one) != 1 {
		t.Fatalf("changes of D3 = %+v", one)
	}
	c := one[0]
	entry, err := j.Entry(t.Context(), c.Sequence)
	if err != nil {
		t.Fatal(err)
	}
	if c.Actor != "local uid=0(root)" || c.Kind != "account.signer/outcome" || c.Object != "D3" || c.Before != `{"stopped":false}` || c.After != `{"stopped":true}` || c.Reason != "离职" ||
		c.ChangedAt != entry.Entry.Time.Micros || c.CreatedAt != c.ChangedAt || c.ModifiedAt != c.ChangedAt || c.CreatedBy != "shipper/east" || c.LeafHash != entry.LeafHash.String() {
		t.Errorf("change = %+v", c)
	}
	// Times: from one on, to before another.
	if got := list("", c.ChangedAt, c.ChangedAt+1); len(got) != 1 || got[0] != c {
		t.Errorf("at its time: %+v", got)
	}
	if got := list("", c.ChangedAt+1, 1<<62); len(got) != 6 {
		t.Errorf("after it: %d", len(got))
	}
	if got := list("D3", 0, c.ChangedAt); len(got) != 0 {
		t.Errorf("before it: %+v", got)
	}
	// A table that came later is filled, once, and is what it would have been.
	want := sweep(t, sweepConfig(j, s))
	d.Exec(t, `DELETE FROM yj_change`)
	d.Exec(t, `DELETE FROM yj_set_root`)
	for _, n := range []int{11, 0} {
		if got, err := audit.FillChanges(t.Context(), j, s, s, s.ApplyChanges, macKey, "mac-1"); err != nil || got != n {
			t.Fatalf("FillChanges = %d, %v, want %d", got, err, n)
		}
	}
	if got := list("", 0, 1<<62); !slices.Equal(got, all) {
		t.Errorf("filled: %+v\nwant %+v", got, all)
	}
	if got := sweep(t, sweepConfig(j, s)); !got.OK() || got.Changes != want.Changes || got.Changes != 11 {
		t.Errorf("sweep = %+v", got)
	}
	// More than a page at one time is listed all the same.
	many := audit.ProjectedBatch{Node: "west", Epoch: "e", KeyID: "mac-1", Sealer: macKey}
	for i := range uint64(1300) {
		w := c
		w.Node, w.Epoch, w.Sequence, w.ChangedAt, w.Object = "west", "e", i, 1<<60+int64(i/600), "bulk"
		many.Changes = append(many.Changes, w)
	}
	if err := s.ApplyChanges(t.Context(), many); err != nil {
		t.Fatal(err)
	}
	if got := list("bulk", 0, 1<<62); len(got) != 1300 {
		t.Errorf("%d of 1300 changes of few times", len(got))
	}
}

// coveredUp: who removes a row and works out what the root's count and sum should be then cannot make its MAC, and no later
// write of ours makes one for it.
func coveredUp(t *testing.T, fresh func(testing.TB) *Database) {
	t.Parallel()
	d := fresh(t)
	j, s := recorded(t, d)
	roots, err := s.Roots(t.Context())
	if err != nil || len(roots) != 1 {
		t.Fatalf("roots %+v, %v", roots, err)
	}
	root := roots[0]
	err = s.ListChanges(t.Context(), "D3", 0, 1<<62, func(c audit.ProjectedChange) error { return root.Fold(nil, []string{c.MAC}) })
	if err != nil || root.Count+1 != roots[0].Count {
		t.Fatalf("root %+v, %v", root, err)
	}
	d.Exec(t, `DELETE FROM yj_change WHERE object_id = 'D3'`)
	d.Exec(t, fmt.Sprintf(`UPDATE yj_set_root SET entry_count = %d, set_sum = '%s'`, root.Count, root.Sum))
	for range 2 {
		wrong := 0
		for _, f := range sweep(t, sweepConfig(j, s)).Differences {
			if f.Kind == audit.SetRootWrong {
				wrong++
			}
		}
		if wrong != 1 {
			t.Errorf("the root is named %d times", wrong)
		}
		Change(t, j, "D100", nil, map[string]string{"name": "y"})
		Ship(t, j, s, CaughtUp)
	}
}

// earlierEpochs: what is removed of an epoch before the last is named, with its batches and although nothing else says that it
// was ever there.
func earlierEpochs(t *testing.T, fresh func(testing.TB) *Database) {
	t.Parallel()
	for name, first := range map[string]uint64{"all of it": 0, "its end": 16} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := fresh(t)
			s := d.Open(t)
			dir := t.TempDir()
			j, stop := Journal(t, dir, false)
			Append(t, j, 0, 30)
			earlier := j.Epoch().String()
			stop()
			j, _ = Journal(t, dir, true)
			Append(t, j, 100, 20)
			Ship(t, j, s, CaughtUp)
			cfg := sweepConfig(j, s)
			before := sweep(t, cfg)
			if same(t, j, s); !before.OK() || before.Seen.Shipped != j.Size() {
				t.Fatalf("before anything: %+v", before)
			}
			cfg.Known = before.Seen
			for _, statement := range []string{`DELETE FROM yj_record WHERE epoch_id = '%s' AND seq_no >= %d`, `DELETE FROM yj_batch WHERE epoch_id = '%s' AND first_seq >= %d`} {
				d.Exec(t, fmt.Sprintf(statement, earlier, first))
			}
			spans, err := j.Epochs(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			end := spans[0].End
			want := map[string]int{
				fmt.Sprintf("batch-missing %d-%d", first, end-1): 1, fmt.Sprintf("rolled-back %d-%d", first, j.Size()-1): 1,
			}
			for i := first; i < end; i++ {
				want[fmt.Sprintf("row-missing %d-%d", i, i)] = 1
			}
			count := func(all []audit.Difference) map[string]int {
				got := map[string]int{}
				for _, f := range all {
					got[fmt.Sprintf("%s %d-%d", f.Kind, f.Sequence, f.Through)]++
				}
				return got
			}
			if got := count(sweep(t, cfg).Differences); !maps.Equal(got, want) {
				t.Errorf("sweep: %v\nwant %v", got, want)
			}
			delete(want, fmt.Sprintf("rolled-back %d-%d", first, j.Size()-1)) // Compare knows of no earlier time
			r := Compare(t, j, s)
			if got := count(r.Differences); !maps.Equal(got, want) || r.NotShipped != 0 {
				t.Errorf("compare: %v, %d not shipped\nwant %v", got, r.NotShipped, want)
			}
			for _, day := range r.Days {
				if day.Agrees() {
					t.Errorf("of the day it says %+v", day)
				}
			}
		})
	}
}

// shrunk: an end that is removed while it is shipped to is told of before it is shipped again.
func shrunk(t *testing.T, fresh func(testing.TB) *Database) {
	t.Parallel()
	d := fresh(t)
	s := d.Open(t)
	j, _ := Journal(t, t.TempDir(), false)
	type change struct{ had, has uint64 }
	told := make(chan change, 8)
	sh := StartShipper(t, j, s, func(c *audit.ShipperConfig) { c.Shrunk = func(had, has uint64) { told <- change{had, has} } })
	Append(t, j, 0, 40)
	sh.Wait(t, CaughtUp)
	had := j.Size()
	d.Exec(t, `DELETE FROM yj_batch WHERE last_seq >= 20`)
	d.Exec(t, `DELETE FROM yj_record WHERE seq_no >= 20`)
	Append(t, j, 100, 5)
	sh.Wait(t, CaughtUp)
	sh.Stop()
	close(told)
	var got []change
	for c := range told {
		got = append(got, c)
	}
	if !slices.Equal(got, []change{{had, 20}}) {
		t.Errorf("told of %v, want once of %d that are 20", got, had)
	}
}

// A table as it was, kept by who administers the database.
var (
	tables = []string{"yj_record", "yj_batch", "yj_change", "yj_set_root"}
	keep   = func(table string) string { return `CREATE TABLE old_` + table + ` AS SELECT * FROM ` + table }
	put    = func(table string) []string {
		return []string{`DELETE FROM ` + table, `INSERT INTO ` + table + ` SELECT * FROM old_` + table}
	}
)

// touch is what the database's administrator does: tables are put back, then statements executed.
func (d *Database) touch(t *testing.T, restore, statements []string) {
	t.Helper()
	for _, table := range restore {
		for _, statement := range put(table) {
			d.Exec(t, statement)
		}
	}
	for _, statement := range statements {
		d.Exec(t, statement)
	}
}

// sweeps: what the database's administrator does with statements of his own is named.
func sweeps(t *testing.T, fresh func(testing.TB) *Database) {
	t.Parallel()
	copied := strings.ReplaceAll(`node_id, epoch_id, SEQ, change_no, leaf_hash, kind_name, act_name, actor_name, object_id, reason_text, before_text, after_text, changed_at_us, bound_us, row_mac, mac_key_id, created_by, created_at, modified_by, modified_at`, "SEQ", "%s")
	const recordColumns = `node_id, epoch_id, seq_no, leaf_hash, kind_name, signed_at_us, bound_us, status_code, created_by, created_at, modified_by, modified_at`
	recordFrom := strings.Replace(recordColumns, "seq_no", "%s", 1)
	type cases = map[string]struct {
		statements []string
		restore    []string // tables that are put back to what they were before the last changes
		want       []string // kind, table or "", sequence or through or column
	}
	for name, c := range (cases{
		"nothing": {},
		// Evidence.
		"a row changed":       {statements: []string{`UPDATE yj_record SET signer_id = 'x' WHERE seq_no = 5`}, want: []string{"batch-mac-wrong  0-15 ", "row-changed  5-5 signer_id"}},
		"a row removed":       {statements: []string{`DELETE FROM yj_record WHERE seq_no = 5`}, want: []string{"batch-mac-wrong  0-15 ", "row-missing  5-5 "}},
		"a row added":         {statements: []string{`INSERT INTO yj_record (node_id, epoch_id, seq_no, leaf_hash, kind_name, signed_at_us, bound_us, status_code, created_by, created_at, modified_by, modified_at) SELECT node_id, epoch_id, 500, leaf_hash, kind_name, signed_at_us, bound_us, status_code, created_by, created_at, modified_by, modified_at FROM yj_record WHERE seq_no = 5`}, want: []string{"batch-missing  81-500 ", "row-added  500-500 "}},
		"a row and its batch": {statements: []string{`UPDATE yj_record SET signer_id = 'x' WHERE seq_no = 5`, `DELETE FROM yj_batch WHERE first_seq = 0`}, want: []string{"batch-missing  0-15 ", "row-changed  5-5 signer_id"}},
		"the end removed":     {statements: []string{`DELETE FROM yj_record WHERE seq_no >= 64`, `DELETE FROM yj_batch WHERE first_seq >= 64`}, want: []string{"rolled-back  64-80 "}},
		"the status":          {statements: []string{`UPDATE yj_record SET status_code = 'test' WHERE seq_no = 5`}, want: []string{"batch-mac-wrong  0-15 ", "row-changed  5-5 status_code"}},
		"who modified":        {statements: []string{`UPDATE yj_record SET modified_by = 'x' WHERE seq_no = 5`}, want: []string{"batch-mac-wrong  0-15 ", "row-changed  5-5 modified_by"}},
		"a row far away":      {statements: []string{`INSERT INTO yj_record (` + recordColumns + `) SELECT ` + fmt.Sprintf(recordFrom, "4611686018427387904") + ` FROM yj_record WHERE seq_no = 5`}, want: []string{"batch-missing  81-4611686018427387904 ", "row-added  4611686018427387904-4611686018427387904 "}},
		"a row below all":     {statements: []string{`INSERT INTO yj_record (` + recordColumns + `) SELECT ` + fmt.Sprintf(recordFrom, "-7") + ` FROM yj_record WHERE seq_no = 5`}, want: []string{"row-added  18446744073709551609-18446744073709551609 "}},
		"a batch of all":      {statements: []string{`UPDATE yj_batch SET last_seq = 9223372036854775807 WHERE first_seq = 16`}, want: []string{"batch-mac-wrong  16-16 ", "batch-missing  16-31 "}},
		"a batch below all":   {statements: []string{`INSERT INTO yj_batch SELECT node_id, epoch_id, -16, last_seq, batch_mac, mac_key_id, created_by, created_at, modified_by, modified_at FROM yj_batch WHERE first_seq = 16`}, want: []string{"batch-mac-wrong  18446744073709551600-18446744073709551600 "}},
		"another node":        {statements: []string{`UPDATE yj_batch SET node_id = 'evil' WHERE first_seq = 0`}, want: []string{"batch-missing  0-15 ", "row-foreign  0-15 "}},
		// The change log.
		"who":                  {statements: []string{`UPDATE yj_change SET actor_name = 'nobody' WHERE object_id = 'D3'`}, want: []string{"row-mac-wrong yj_change ", "row-changed yj_change 38-38 actor_name"}},
		"before":               {statements: []string{`UPDATE yj_change SET before_text = NULL WHERE object_id = 'D3'`}, want: []string{"row-mac-wrong yj_change ", "row-changed yj_change 38-38 before_text"}},
		"the MAC":              {statements: []string{`UPDATE yj_change SET row_mac = 'zz' WHERE object_id = 'D3'`}, want: []string{"row-mac-wrong yj_change ", "set-root-wrong yj_change "}},
		"a change removed":     {statements: []string{`DELETE FROM yj_change WHERE object_id = 'D3'`}, want: []string{"set-root-wrong yj_change ", "row-missing yj_change 38-38 "}},
		"a change added":       {statements: []string{`INSERT INTO yj_change SELECT ` + fmt.Sprintf(copied, "900") + ` FROM yj_change WHERE object_id = 'D3'`}, want: []string{"row-mac-wrong yj_change ", "set-root-wrong yj_change ", "row-added yj_change 900-900 "}},
		"a change below all":   {statements: []string{`INSERT INTO yj_change SELECT ` + fmt.Sprintf(copied, "-7") + ` FROM yj_change WHERE object_id = 'D3'`}, want: []string{"row-mac-wrong yj_change ", "set-root-wrong yj_change ", "row-added yj_change 18446744073709551609-18446744073709551609 "}},
		"one for another":      {statements: []string{`INSERT INTO yj_change SELECT ` + fmt.Sprintf(copied, "900") + ` FROM yj_change WHERE object_id = 'D3'`, `DELETE FROM yj_change WHERE seq_no = 40`}, want: []string{"row-mac-wrong yj_change ", "set-root-wrong yj_change ", "row-missing yj_change 40-40 ", "row-added yj_change 900-900 "}},
		"the count":            {statements: []string{`DELETE FROM yj_change WHERE object_id = 'D3'`, `UPDATE yj_set_root SET entry_count = entry_count - 1`}, want: []string{"set-root-wrong yj_change ", "row-missing yj_change 38-38 "}},
		"the root":             {statements: []string{`DELETE FROM yj_set_root`}, want: []string{"rolled-back yj_change ", "set-root-wrong yj_change "}},
		"another's root":       {statements: []string{`UPDATE yj_set_root SET node_id = 'evil'`}, want: []string{"rolled-back yj_change ", "set-root-wrong yj_change ", "row-foreign yj_change "}},
		"last week's changes":  {restore: []string{"yj_change"}, want: []string{"set-root-wrong yj_change ", "row-missing yj_change 82-82 "}},
		"with their root":      {restore: []string{"yj_change", "yj_set_root"}, want: []string{"rolled-back yj_change ", "row-missing yj_change 82-82 "}},
		"last week's database": {restore: tables, want: []string{"rolled-back  81-84 ", "rolled-back yj_change "}},
		"last week's records":  {restore: []string{"yj_record"}, want: []string{"batch-mac-wrong  81-84 ", "row-missing  81-81 ", "row-missing  82-82 ", "row-missing  83-83 ", "row-missing  84-84 ", "rolled-back  81-84 "}},
	}) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := fresh(t)
			j, s := recorded(t, d)
			cfg := sweepConfig(j, s)
			if r := sweep(t, cfg); !r.OK() || r.Batches == 0 || r.MACsChecked < 11 || r.Seen.Shipped != j.Size() || r.Seen.Versions[audit.ChangeSet] == 0 {
				t.Fatalf("before anything: %+v", r)
			}
			if len(c.restore) > 0 {
				for _, table := range c.restore {
					d.Make(t, keep(table))
				}
				Change(t, j, "D99", nil, map[string]string{"name": "x"})
				Append(t, j, 1000, 2)
				Ship(t, j, s, CaughtUp)
			}
			cfg.Known = sweep(t, cfg).Seen
			d.touch(t, c.restore, c.statements)
			var got []string
			for _, f := range sweep(t, cfg).Differences {
				if f.Detail == "" || f.DetailZH == "" {
					t.Errorf("difference without words: %+v", f)
				}
				where := ""
				if f.Through > 0 || f.Kind == audit.BatchWrong {
					where = fmt.Sprintf("%d-%d ", f.Sequence, f.Through)
				}
				got = append(got, fmt.Sprintf("%s %s %s%s", f.Kind, f.Table, where, f.Column))
			}
			if !slices.Equal(got, c.want) {
				t.Errorf("differences:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(c.want, "\n"))
			}
			// Going on covers nothing: what was named is named after more has been shipped.
			if len(c.restore) == 0 && len(c.want) > 0 && strings.Contains(strings.Join(c.want, " "), "yj_change") {
				Change(t, j, "D100", nil, map[string]string{"name": "y"})
				Ship(t, j, s, CaughtUp)
				if sweep(t, cfg).OK() {
					t.Error("the next write has covered it")
				}
			}
		})
	}
}

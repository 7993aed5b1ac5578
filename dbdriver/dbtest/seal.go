package dbtest

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"yinjian/appliance/account"
	"yinjian/appliance/audit"
	"yinjian/dbdriver/central"
)

// sealed: decisions and marks of duplicates have MACs and roots; what the database's administrator does to them is named by
// the appliance that wrote them, and a rebuild puts it right, also where a release before this one wrote them.
func sealed(t *testing.T, fresh func(testing.TB) *Database) {
	t.Parallel()
	const copied = `node_id, epoch_id, SEQ, record_id, of_node, of_epoch, of_seq, BY, created_at, modified_by, modified_at, row_mac, mac_key_id`
	const columns = `(object_kind, object_id, version_no, node_id, epoch_id, intent_id, body_sm3, decided_at, created_by, created_at, modified_by, modified_at, row_mac, mac_key_id)`
	const marks = `(node_id, epoch_id, seq_no, record_id, of_node, of_epoch, of_seq, created_by, created_at, modified_by, modified_at, row_mac, mac_key_id)`
	one := func(version int) string {
		return `INSERT INTO yj_decision ` + columns + ` SELECT object_kind, object_id, 900, node_id, epoch_id, '` + strings.Repeat("e", 64) + `', body_sm3, decided_at, created_by, created_at, modified_by, modified_at, row_mac, mac_key_id FROM yj_decision WHERE version_no = ` + fmt.Sprint(version)
	}
	mark := func(seq, by string) string {
		from := strings.NewReplacer("SEQ", seq, "BY", by).Replace(copied)
		return `INSERT INTO yj_duplicate ` + marks + ` SELECT ` + from + ` FROM yj_duplicate WHERE created_by = 'shipper/east' AND seq_no = (SELECT MAX(seq_no) FROM yj_duplicate WHERE created_by = 'shipper/east')`
	}
	last := `seq_no = (SELECT MAX(seq_no) FROM yj_duplicate WHERE created_by = 'shipper/east')`
	for name, c := range map[string]struct {
		statements, restore, want []string
		left                      bool // what a rebuild by this appliance does not put right
	}{
		"nothing":                {},
		"another's":              {statements: []string{`UPDATE yj_decision SET body_sm3 = 'x' WHERE version_no = 2`, `DELETE FROM yj_duplicate WHERE created_by = 'shipper/west'`}}, // west tells
		"a body":                 {statements: []string{`UPDATE yj_decision SET body_sm3 = 'x' WHERE version_no = 5`}, want: []string{"row-mac-wrong yj_decision ", "row-changed yj_decision body_sm3"}},
		"a decision's time":      {statements: []string{`UPDATE yj_decision SET modified_at = 7 WHERE version_no = 5`}, want: []string{"row-mac-wrong yj_decision "}},
		"a decision removed":     {statements: []string{`DELETE FROM yj_decision WHERE version_no = 5`}, want: []string{"set-root-wrong yj_decision ", "row-missing yj_decision "}},
		"the last removed":       {statements: []string{`DELETE FROM yj_decision WHERE version_no = 9`}, want: []string{"set-root-wrong yj_decision ", "row-missing yj_decision "}},
		"a decision added":       {statements: []string{one(5)}, want: []string{"row-mac-wrong yj_decision ", "set-root-wrong yj_decision "}, left: true},
		"a decision by nobody":   {statements: []string{`UPDATE yj_decision SET created_by = 'evil' WHERE version_no = 5`}, want: []string{"row-foreign yj_decision ", "set-root-wrong yj_decision ", "row-missing yj_decision "}, left: true},
		"as before this release": {statements: []string{`UPDATE yj_decision SET row_mac = NULL, mac_key_id = NULL WHERE created_by = 'east' AND version_no < 8`, `DELETE FROM yj_set_root WHERE set_name = 'yj_decision' AND node_id = 'east'`}, want: []string{"row-mac-wrong yj_decision ", "row-mac-wrong yj_decision ", "row-mac-wrong yj_decision ", "row-mac-wrong yj_decision ", "rolled-back yj_decision ", "set-root-wrong yj_decision "}},
		"last week's decisions":  {restore: []string{"yj_decision"}, want: []string{"set-root-wrong yj_decision ", "row-missing yj_decision "}},
		"and their roots":        {restore: []string{"yj_decision", "yj_set_root"}, want: []string{"rolled-back yj_decision ", "row-missing yj_decision ", "rolled-back yj_duplicate ", "set-root-wrong yj_duplicate "}},
		"a mark":                 {statements: []string{`UPDATE yj_duplicate SET of_seq = of_seq + 1 WHERE created_by = 'shipper/east' AND ` + last}, want: []string{"row-mac-wrong yj_duplicate "}},
		"a mark removed":         {statements: []string{`DELETE FROM yj_duplicate WHERE created_by = 'shipper/east' AND ` + last}, want: []string{"set-root-wrong yj_duplicate "}},
		"a mark added":           {statements: []string{mark("900", "created_by")}, want: []string{"row-mac-wrong yj_duplicate ", "set-root-wrong yj_duplicate "}},
		"a mark by nobody":       {statements: []string{mark("900", "'x'")}, want: []string{"row-foreign yj_duplicate "}},
		"last week's marks":      {restore: []string{"yj_duplicate"}, want: []string{"set-root-wrong yj_duplicate "}},
		"the marks' root":        {statements: []string{`DELETE FROM yj_set_root WHERE set_name = 'yj_duplicate' AND node_id = 'east'`}, want: []string{"rolled-back yj_duplicate ", "set-root-wrong yj_duplicate "}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := fresh(t)
			s, west := d.Open(t), d.Open(t)
			west.SealWith("west", MACKey("w"), func(string) string { return "mac-1" })
			j, _ := Journal(t, t.TempDir(), false)
			Append(t, j, 0, 20)
			k, _ := JournalOf(t, t.TempDir(), "west", false, time.Date(2026, 3, 1, 7, 0, 0, 0, time.UTC))
			Append(t, k, 0, 20)
			Ship(t, j, s, CaughtUp)
			Ship(t, k, west, CaughtUp)
			twins := func(s *central.Store, node string, j *audit.Journal, from, to int) {
				t.Helper()
				var rows []audit.ProjectedRow
				err := s.Rows(t.Context(), node, j.Epoch().String(), 0, func(r audit.ProjectedRow) error {
					if r.Kind == "sign.v1" && int(r.Sequence) >= from && int(r.Sequence) < to {
						rows = append(rows, r)
					}
					return nil
				})
				if err == nil {
					err = s.MarkDuplicates(t.Context(), rows)
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			var journal []account.Decision
			decide := func(versions ...int64) {
				t.Helper()
				for _, v := range versions {
					by, of := s, "east"
					if v%2 == 0 && v < 8 {
						by, of = west, "west"
					}
					one := Decision(of, v, int(v))
					if won, err := by.Decide(t.Context(), one); !won || err != nil {
						t.Fatalf("%+v: %v, %v", one, won, err)
					}
					if of == "east" && !slices.Contains(journal, one) {
						journal = append(journal, one)
					}
				}
			}
			decide(1, 2, 3, 4, 5, 6, 7, 8)
			if _, ok, err := s.Lookup(t.Context(), Decision("east", 0, 77)); ok || err != nil { // a void intent has no MAC
				t.Fatal(ok, err)
			}
			twins(s, "east", j, 0, 10)
			twins(west, "west", k, 0, 30)
			for _, table := range c.restore {
				d.Make(t, keep(table))
			}
			decide(9)
			d.Exec(t, `DELETE FROM yj_duplicate WHERE created_by = 'nobody' OR (node_id = 'west' AND seq_no < 0) OR (created_by = 'shipper/west' AND seq_no = (SELECT MAX(seq_no) FROM yj_duplicate WHERE created_by = 'shipper/west'))`)
			twins(s, "east", j, 0, 30) // east makes the one that west's administrator lost
			cfg := sweepConfig(j, s)
			cfg.Campuses = []string{"west"}
			cfg.Sets = append(cfg.Sets, s.DecisionsOf(func(_ context.Context, fn func(account.Decision) error) error {
				for _, d := range journal {
					if err := fn(d); err != nil {
						return err
					}
				}
				return nil
			}), s.MarksOf())
			before := sweep(t, cfg)
			if !before.OK() || before.Seen.Versions[central.DecisionSet] == 0 || before.Seen.Versions[central.DuplicateSet] == 0 {
				t.Fatalf("before anything: %+v", before)
			}
			cfg.Known = before.Seen
			d.touch(t, c.restore, c.statements)
			for range 2 {
				var got []string
				for _, f := range sweep(t, cfg).Differences {
					if f.Detail == "" || f.DetailZH == "" || f.Key == "" && (f.Kind == audit.RowMACWrong || f.Kind == audit.RowMissing) {
						t.Errorf("difference without words: %+v", f)
					}
					got = append(got, fmt.Sprintf("%s %s %s", f.Kind, f.Table, f.Column))
				}
				if !slices.Equal(got, c.want) {
					t.Errorf("differences:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(c.want, "\n"))
				}
				if len(c.restore) > 0 || strings.Contains(name, "release") {
					break
				}
				decide(int64(len(journal)) + 100) // the next write covers nothing
			}
			// A rebuild, as far as these tables go.
			if c.left {
				return
			}
			for _, one := range journal {
				if won, err := s.Decide(t.Context(), one); !won || err != nil {
					t.Fatalf("put back %+v: %v, %v", one, won, err)
				}
			}
			table := central.Marks{Store: s, Now: func() int64 { return always - 1 }}
			err := s.MendDecisions(t.Context(), journal, always-1)
			if err == nil {
				err = table.Empty(t.Context(), "east", func(uint64) {})
			}
			if err == nil {
				twins(s, "east", j, 0, 30)
				err = table.Fill(t.Context(), []audit.Source{j}, func(uint64, uint64) {})
			}
			if err != nil {
				t.Fatal(err)
			}
			if r := sweep(t, cfg); !r.OK() {
				t.Errorf("after a rebuild: %+v", r.Differences)
			}
		})
	}
}

package dbtest

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"yinjian/appliance/audit"
	"yinjian/dbdriver/central"
)

// authors: who made and last changed each row of each table, and when, is true: the writer, and a time of the journal, not of
// the database's clock.
func authors(t *testing.T, fresh func(testing.TB) *Database) {
	t.Parallel()
	d := fresh(t)
	j, s := recorded(t, d)
	if err := s.Mark(t.Context(), audit.RebuildMark{Node: "west", By: "test", Phase: audit.Filling, At: 7}); err != nil {
		t.Fatal(err)
	}
	last, err := j.Entry(t.Context(), j.Size()-1)
	if err != nil {
		t.Fatal(err)
	}
	begun, ended := time.Date(2026, 3, 1, 8, 0, 0, 0, time.UTC).UnixMicro(), last.Entry.Time.Micros
	tables, err := central.Dictionary()
	if err != nil {
		t.Fatal(err)
	}
	db := d.Pool(nil)
	defer db.Close()
	rows := map[string]int{}
	for _, table := range tables {
		found, err := db.QueryContext(t.Context(), fmt.Sprintf(`SELECT created_by, created_at, modified_by, modified_at FROM %s`, table.Name))
		if err != nil {
			t.Fatal(err)
		}
		defer found.Close()
		for found.Next() {
			var by, changedBy string
			var at, changedAt int64
			if err := found.Scan(&by, &at, &changedBy, &changedAt); err != nil {
				t.Fatal(err)
			}
			rows[table.Name]++
			switch table.Name {
			case "yj_schema_change", "yj_rebuild": // written by "test", who says when
				if by != "test" || changedBy != "test" || at > 7 || changedAt != at {
					t.Errorf("%s: %s at %d, %s at %d", table.Name, by, at, changedBy, changedAt)
				}
			default:
				if by != "shipper/east" || !strings.HasPrefix(changedBy, "shipper/") || at < begun || at > ended || changedAt < at || changedAt > ended {
					t.Errorf("%s: %s at %v, %s at %v", table.Name, by, time.UnixMicro(at).UTC(), changedBy, time.UnixMicro(changedAt).UTC())
				}
			}
		}
		if err := found.Err(); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"yj_record", "yj_batch", "yj_change", "yj_set_root", "yj_schema_change", "yj_rebuild"} {
		if rows[name] == 0 {
			t.Errorf("%s has no rows", name)
		}
	}
}

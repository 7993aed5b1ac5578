package sqlite_test

import (
	"fmt"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"yinjian/appliance/audit"
	"yinjian/dbdriver/central"
	"yinjian/dbdriver/dbtest"
	"yinjian/dbdriver/sqlite"
)

func openCentral(t testing.TB, file string) *central.Store {
	t.Helper()
	c, err := sqlite.OpenCentral(t.Context(), file, central.Author{Name: "test", Micros: 1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// A file that an earlier version made goes on, rows and all.
func TestOldCentral(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	j := start(t, openStore(t, filepath.Join(dir, "journal"), nil), nil)
	appendN(t, j.Journal, 0, 20)
	file := filepath.Join(dir, "central.db")
	store := openCentral(t, file)
	dbtest.Ship(t, j.Journal, store, dbtest.CaughtUp)
	store.Close()
	plant(t, dir, "central.db", `DROP TABLE yj_schema_change`,
		`CREATE TABLE yj_migration (migration_no BIGINT NOT NULL, file_name VARCHAR(128) NOT NULL, file_sm3 VARCHAR(64) NOT NULL, PRIMARY KEY (migration_no))`,
		`INSERT INTO yj_migration VALUES (1, '0001_yj_record.sql', 'x'), (2, '0002_yj_record_by_id.sql', 'x'), (3, '0003_yj_record_by_time.sql', 'x'), (4, '0004_yj_batch.sql', 'x')`)
	for range 2 {
		store = openCentral(t, file)
		if r := dbtest.Compare(t, j.Journal, store); !r.OK() || r.Rows != j.Size() || r.NotShipped != 0 {
			t.Errorf("compare = %+v, want all rows of before", r)
		}
		store.Close()
	}
}

// The MAC's input is fixed: batches are checked years later.
func TestMACInput(t *testing.T) {
	t.Parallel()
	b := audit.ProjectedBatch{Node: "n", Epoch: "e", First: 1, Last: 1, Rows: []audit.ProjectedRow{{
		Node: "n", Epoch: "e", Sequence: 1, LeafHash: "ff", Kind: "k", Signer: "王", SignedAt: -5, CreatedBy: "c", Status: "test", ModifiedBy: "m", ModifiedAt: 7,
	}}}
	const want = "yinjian/projection/batch/v2\x00\x00\x00\x00\x01n\x00\x00\x00\x01e\x00\x00\x00\x011\x00\x00\x00\x011" +
		"\x00\x00\x00\x01n\x00\x00\x00\x01e\x00\x00\x00\x011\x00\x00\x00\x02ff\x00\x00\x00\x00\x00\x00\x00\x01k\x00\x00\x00\x00" +
		"\x00\x00\x00\x03王\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02-5\x00\x00\x00\x010\x00\x00\x00\x01c\x00\x00\x00\x010" +
		"\x00\x00\x00\x04test\x00\x00\x00\x01m\x00\x00\x00\x017"
	if got := string(b.MACInput()); got != want {
		t.Errorf("MACInput = %q, want %q", got, want)
	}
}

func BenchmarkAppend(b *testing.B) {
	for _, clients := range []int{1, 16, 64, 512} {
		b.Run(fmt.Sprintf("clients=%d", clients), func(b *testing.B) {
			j := start(b, openStore(b, filepath.Join(b.TempDir(), "journal"), nil), nil)
			var n atomic.Int64
			b.ResetTimer()
			var wg sync.WaitGroup
			for range clients {
				wg.Go(func() {
					for {
						i := int(n.Add(1))
						if i > b.N {
							return
						}
						if _, err := j.Append(b.Context(), signDraft(i)); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "entries/s")
		})
	}
}

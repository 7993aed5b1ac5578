package central_test

import (
	"fmt"
	"strings"
	"testing"

	"yinjian/appliance/audit"
	"yinjian/dbdriver/dbtest"
)

func TestSQLite(t *testing.T) {
	t.Parallel()
	dbtest.Suite(t, dbtest.SQLite)
}

func TestPostgres(t *testing.T) {
	t.Parallel()
	dbtest.Suite(t, dbtest.Postgres(dbtest.StartPostgres(t)))
}

// The driver that behaves as badly as DM8's was read to.
func TestHostile(t *testing.T) {
	t.Parallel()
	dbtest.Suite(t, dbtest.DM)
}

// BenchmarkApply writes batches as long as the shipper's.
func BenchmarkApply(b *testing.B) {
	for name, fresh := range map[string]func(testing.TB) *dbtest.Database{"sqlite": dbtest.SQLite, "postgres": dbtest.Postgres(dbtest.StartPostgres(b))} {
		b.Run(name, func(b *testing.B) {
			s := fresh(b).Open(b)
			const rows = 256
			at := uint64(0)
			for b.Loop() {
				batch := audit.ProjectedBatch{Node: "east", Epoch: "0123456789abcdef", First: at, Last: at + rows - 1, MAC: strings.Repeat("cd", 32), KeyID: "mac-1"}
				for range rows {
					batch.Rows = append(batch.Rows, audit.ProjectedRow{
						Node: "east", Epoch: "0123456789abcdef", Sequence: at, LeafHash: strings.Repeat("ab", 32), RecordID: fmt.Sprintf("%064x", at), Kind: "sign.v1",
						Application: "emr", Signer: "staff-1", Department: "心内科", SignedAt: int64(at), Status: audit.StatusRecorded, CreatedBy: "shipper/east", ModifiedBy: "shipper/east",
					})
					at++
				}
				if err := s.Apply(b.Context(), batch); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(at)/b.Elapsed().Seconds(), "rows/s")
		})
	}
}

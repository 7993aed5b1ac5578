package central_test

import (
	"cmp"
	"context"
	"database/sql"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"yinjian/appliance/audit"
	"yinjian/dbdriver/dbtest"
)

// What people ask of the records, one statement each, with the index that answers it.
var lookups = []struct{ name, index, text string }{
	{"record id", "yj_record_by_id", `SELECT signer_id, signed_at_us FROM yj_record WHERE record_id = ?`},
	{"signer", "yj_record_by_signer", `SELECT record_id, signed_at_us FROM yj_record WHERE signer_id = ? AND signed_at_us >= ? AND signed_at_us < ? ORDER BY signed_at_us DESC LIMIT 1`},
	{"time", "yj_record_by_time", `SELECT record_id, signer_id FROM yj_record WHERE signed_at_us >= ? AND signed_at_us < ? ORDER BY signed_at_us LIMIT 100`},
}

// A year has 10,000,000 records and more: what people ask for by record, by signer and by day is found through an index,
// and not by reading all.
func TestLookupsUseAnIndex(t *testing.T) {
	t.Parallel()
	t.Run("sqlite", func(t *testing.T) {
		d := dbtest.SQLite(t)
		d.Open(t)
		plans(t, d, `EXPLAIN QUERY PLAN `)
	})
	t.Run("postgres", func(t *testing.T) {
		d := dbtest.Postgres(dbtest.StartPostgres(t, "-c", "enable_seqscan=off"))(t) // a small table is read as a whole
		d.Open(t)
		plans(t, d, `EXPLAIN `)
	})
}

func plans(t *testing.T, d *dbtest.Database, explain string) {
	db := d.Pool(nil)
	defer db.Close()
	all := slices.Clone(lookups)
	for _, l := range lookups { // the archive's too
		l.index, l.text = strings.Replace(l.index, "yj_record", "yj_record_archive", 1), strings.Replace(l.text, "yj_record", "yj_record_archive", 1)
		all = append(all, l)
	}
	for _, l := range all {
		text := l.text
		for i := 0; strings.Contains(text, "?"); i++ { // values in the text, so that the plan is made for them
			value := "1"
			if i == 0 && l.name != "time" {
				value = "'x'"
			}
			text = strings.Replace(text, "?", value, 1)
		}
		rows, err := db.QueryContext(t.Context(), explain+text)
		if err != nil {
			t.Fatalf("%s: %v", l.name, err)
		}
		columns, err := rows.Columns()
		if err != nil {
			t.Fatal(err)
		}
		var plan strings.Builder
		for rows.Next() {
			values := make([]any, len(columns))
			for i := range values {
				values[i] = new(sql.NullString)
			}
			if err := rows.Scan(values...); err != nil {
				t.Fatal(err)
			}
			plan.WriteString(values[len(values)-1].(*sql.NullString).String + "\n")
		}
		if err := rows.Err(); err != nil {
			t.Fatal(err)
		}
		rows.Close()
		if !strings.Contains(plan.String(), l.index) || strings.Contains(plan.String(), "SCAN yj_record") || strings.Contains(plan.String(), "Sort") || strings.Contains(plan.String(), "TEMP B-TREE") {
			t.Errorf("%s: does not go by %s, or sorts:\n%s", l.name, l.index, plan.String())
		}
	}
}

// TestGrowth measures what a database of YINJIAN_GROWTH records costs against one of 10,000, one database at a time. The
// records are made inside the database, with the indexes made afterwards: the shipper would take hours.
func TestGrowth(t *testing.T) {
	most, _ := strconv.Atoi(os.Getenv("YINJIAN_GROWTH"))
	if most == 0 {
		t.Skip("set YINJIAN_GROWTH to a number of records, 10000000 say")
	}
	var out strings.Builder
	fmt.Fprintf(&out, "| database | records | insert of 256, ms | record id, µs | a signer's last, µs | a day's first 100, µs | bytes a record |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n")
	for _, name := range []string{"sqlite", "postgres"} {
		for _, n := range []int{10_000, most} {
			t.Run(fmt.Sprint(name, " ", n), func(t *testing.T) {
				fmt.Fprintf(&out, "| %s | %d | %s |\n", name, n, strings.Join(growth(t, name, n), " | "))
			})
		}
	}
	t.Log("\n" + out.String())
	if file := os.Getenv("YINJIAN_GROWTH_RESULTS"); file != "" && !t.Failed() {
		page := "# Measured by `make bench-growth`: the central database\n\nWritten by a test (TestGrowth in dbdriver/central); not to be edited. Medians of 7 rounds of 200, the batches of 20. One database after the other.\n\n" +
			machine() + out.String()
		if err := os.WriteFile(file, []byte(page), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// machine says where and beside what it was measured.
func machine() string {
	read := func(name string) string {
		raw, err := os.ReadFile(name)
		if err != nil {
			return "unknown"
		}
		return strings.TrimSpace(string(raw))
	}
	_, cpu, _ := strings.Cut(read("/proc/cpuinfo"), "model name")
	cpu, _, _ = strings.Cut(strings.TrimLeft(cpu, "\t: "), "\n")
	return fmt.Sprintf("| | |\n| --- | --- |\n| revision | %s, %s |\n| machine | %s, %d cores, Linux %s |\n| load average at the end | %s |\n\n",
		cmp.Or(os.Getenv("YINJIAN_REVISION"), "(devel)"), runtime.Version(), cpu, runtime.NumCPU(), read("/proc/sys/kernel/osrelease"), read("/proc/loadavg"))
}

// growthDay is how many signatures a day 6,300 staff make.
const growthDay = 378_000

func growth(t *testing.T, name string, n int) []string {
	var d *dbtest.Database
	size := `SELECT page_count * page_size FROM pragma_page_count(), pragma_page_size()`
	id := `lower(hex(randomblob(32)))`
	series := `WITH RECURSIVE yj_series (n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM yj_series WHERE n + 1 < %d)`
	text := func(format, number string) string { return fmt.Sprintf(`printf('%s', %s)`, format, number) }
	if name == "sqlite" {
		d = dbtest.SQLite(t)
	} else {
		d = dbtest.Postgres(dbtest.StartPostgres(t, "-c", "shared_buffers=512MB", "-c", "max_wal_size=4GB"))(t)
		size = `SELECT pg_total_relation_size('yj_record')`
		id = `encode(sha256(n::text::bytea), 'hex')`
		series = `WITH yj_series AS (SELECT n FROM generate_series(0::bigint, %d - 1) AS g (n))`
		text = func(format, number string) string { return fmt.Sprintf(`'D' || lpad((%s)::text, 5, '0')`, number) }
	}
	s := d.Open(t)
	for _, l := range lookups {
		d.Make(t, `DROP INDEX `+l.index)
	}
	const epoch = "0123456789abcdef"
	d.Make(t, fmt.Sprintf(series, n)+fmt.Sprintf(`
INSERT INTO yj_record (node_id, epoch_id, seq_no, leaf_hash, record_id, kind_name, application_id, signer_id, department_name, document_type, campus_name,
 signed_at_us, bound_us, status_code, created_by, created_at, modified_by, modified_at)
SELECT 'east', '%s', n, %s, %s, 'sign', 'his', %s, '胸外科', 'discharge-summary', '本部', n * %d, 1000, 'recorded', 'shipper/east', n * %[5]d, 'shipper/east', n * %[5]d FROM yj_series`,
		epoch, id, id, text("D%05d", "n % 6300"), 86_400_000_000/growthDay))
	for _, m := range []string{
		`CREATE INDEX yj_record_by_id ON yj_record (record_id)`, `CREATE INDEX yj_record_by_time ON yj_record (signed_at_us)`,
		`CREATE INDEX yj_record_by_signer ON yj_record (signer_id, signed_at_us)`,
	} {
		d.Make(t, m)
	}
	db := d.Pool(nil)
	defer db.Close()
	if name == "postgres" {
		d.Make(t, `ANALYZE yj_record`)
	}
	var bytes int64
	if err := db.QueryRowContext(t.Context(), size).Scan(&bytes); err != nil {
		t.Fatal(err)
	}
	at, key := uint64(n), uint64(n)
	insert := median(t, 20, func(ctx context.Context) error {
		b := audit.ProjectedBatch{Node: "east", Epoch: epoch, First: at, Last: at + 255, MAC: strings.Repeat("cd", 32), KeyID: "mac-1"}
		for range 256 {
			key = key*6364136223846793005 + 1442695040888963407 // record ids are random
			b.Rows = append(b.Rows, audit.ProjectedRow{
				Node: "east", Epoch: epoch, Sequence: at, LeafHash: strings.Repeat("ab", 32), RecordID: fmt.Sprintf("%016x%048x", key, at), Kind: "sign",
				Application: "his", Signer: fmt.Sprintf("D%05d", at%6300), Department: "胸外科", DocumentType: "discharge-summary", Campus: "本部",
				SignedAt: int64(at) * 86_400_000_000 / growthDay, Status: audit.StatusRecorded, CreatedBy: "shipper/east", ModifiedBy: "shipper/east",
			})
			at++
		}
		return s.Apply(ctx, b)
	})
	seam := d.Seam()
	ids := make([]string, 200)
	for i := range ids {
		q := seam.Text(`SELECT record_id FROM yj_record WHERE node_id = ? AND epoch_id = ? AND seq_no = ?`)
		if err := db.QueryRowContext(t.Context(), q, "east", epoch, int64(uint64(i)*0x9E3779B97F4A7C15%uint64(n))).Scan(&ids[i]); err != nil {
			t.Fatal(err)
		}
	}
	next := 0
	ask := func(l int, args func() []any) string {
		q := seam.Text(lookups[l].text)
		return fmt.Sprintf("%.1f", 1000*median(t, 200, func(ctx context.Context) error {
			next++
			rows, err := db.QueryContext(ctx, q, args()...)
			if err != nil {
				return err
			}
			defer rows.Close()
			found := 0
			for rows.Next() {
				found++
			}
			if found == 0 && rows.Err() == nil {
				return fmt.Errorf("%s: nothing was found", lookups[l].name)
			}
			return rows.Err()
		}))
	}
	day := func() int64 { return int64(next%max(n/growthDay, 1)) * 86_400_000_000 }
	return []string{
		fmt.Sprintf("%.1f", insert),
		ask(0, func() []any { return []any{ids[next%len(ids)]} }),
		ask(1, func() []any { return []any{fmt.Sprintf("D%05d", next%6300), int64(0), int64(1 << 60)} }),
		ask(2, func() []any { return []any{day(), day() + 86_400_000_000} }),
		fmt.Sprint(bytes / int64(n)),
	}
}

// median answers the milliseconds of one of n calls, as the median of seven rounds after one that does not count.
func median(t *testing.T, n int, fn func(context.Context) error) float64 {
	t.Helper()
	var rounds []float64
	for round := range 8 {
		begun := time.Now() // interval
		for range n {
			if err := fn(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		if round > 0 {
			rounds = append(rounds, float64(time.Since(begun).Microseconds())/1000/float64(n))
		}
	}
	slices.Sort(rounds)
	return rounds[len(rounds)/2]
}

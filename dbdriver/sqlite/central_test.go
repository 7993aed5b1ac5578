package sqlite_test

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"crypto/hmac"

	"github.com/emmansun/gmsm/sm3"

	"yinjian/appliance/audit"
	"yinjian/dbdriver/central"
	"yinjian/dbdriver/sqlite"
)

type macKey string

func (k macKey) MAC(_ context.Context, data []byte) ([]byte, error) {
	h := hmac.New(sm3.New, []byte(k))
	h.Write(data)
	return h.Sum(nil), nil
}

func openCentral(t testing.TB, file string) *central.Store {
	t.Helper()
	c, err := sqlite.OpenCentral(t.Context(), file, central.Author{Name: "test", Micros: 1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// ship runs a shipper until it has everything, or for as long as done says.
func ship(t testing.TB, j *audit.Journal, p audit.Projection, done func(audit.ShipperStatus) bool) audit.ShipperStatus {
	t.Helper()
	s, err := audit.NewShipper(audit.ShipperConfig{
		Journal: j, Projection: p, MAC: macKey("k"), MACKeyID: "mac-1", Log: quiet(), BatchRows: 16, RetryMin: time.Millisecond,
		RetryMax: 2 * time.Millisecond,
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := s.Run(ctx); err != nil {
			t.Errorf("Run = %v", err)
		}
	})
	defer wg.Wait()
	defer cancel()
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		if st := s.Status(); done(st) {
			return st
		}
	}
	t.Fatalf("the shipper did not get there: %+v", s.Status())
	return audit.ShipperStatus{}
}

func caughtUp(s audit.ShipperStatus) bool { return s.Lag == 0 && s.Size > 0 && s.LastError == nil }

func compare(t testing.TB, j *audit.Journal, p audit.Projection) *audit.CompareReport {
	t.Helper()
	r, err := audit.Compare(t.Context(), j, p, macKey("k"))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// flaky fails as its callback says: before the write, or after it ("it landed, the answer was lost").
type flaky struct {
	audit.Projection
	fail func() (landed bool, err error)
}

func (f flaky) Apply(ctx context.Context, b audit.ProjectedBatch) error {
	landed, fail := f.fail()
	if fail == nil || landed {
		if err := f.Projection.Apply(ctx, b); err != nil {
			return err
		}
	}
	return fail
}

func TestShipper(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	j := start(t, openStore(t, filepath.Join(dir, "journal"), segments50), nil)
	appendN(t, j.Journal, 0, 120)
	central := openCentral(t, filepath.Join(dir, "central.db"))

	// Every second attempt fails, half of these after the batch landed.
	var n atomic.Int64
	p := flaky{central, func() (bool, error) {
		switch n.Add(1) % 4 {
		case 1:
			return false, errors.New("connection lost")
		case 3:
			return true, errors.New("answer lost")
		}
		return false, nil
	}}
	ship(t, j.Journal, p, func(s audit.ShipperStatus) bool { return s.Shipped >= 60 }) // killed in the middle
	ship(t, j.Journal, p, caughtUp)
	if r := compare(t, j.Journal, central); !r.OK() || r.Rows != j.Size() || r.NotShipped != 0 || r.MACsChecked < 7 {
		t.Errorf("compare = %+v", r)
	}
	// Applying again changes nothing; another leaf under the same key is a fork.
	rec, err := j.Entry(t.Context(), 7)
	if err != nil {
		t.Fatal(err)
	}
	row := audit.Project(rec)
	b := audit.ProjectedBatch{Node: row.Node, Epoch: row.Epoch, First: 7, Last: 7, MAC: "x", KeyID: "y", Rows: []audit.ProjectedRow{row}}
	b.Rows[0].LeafHash = "00" + row.LeafHash[2:]
	if err := central.Apply(t.Context(), b); !errors.Is(err, audit.ErrFork) {
		t.Errorf("Apply of another entry = %v, want %v", err, audit.ErrFork)
	}
	// A new epoch goes on in its own key space.
	j.stop()
	j = start(t, openStore(t, filepath.Join(dir, "journal"), segments50), func(c *audit.Config) { c.NewEpoch = true })
	appendN(t, j.Journal, 500, 20)
	ship(t, j.Journal, central, caughtUp)
	if r := compare(t, j.Journal, central); !r.OK() || r.Rows != j.Size() {
		t.Errorf("compare after a new epoch = %+v", r)
	}
}

// A journal that was put back to an earlier state, without a new epoch, is an alarm, whether it has grown past the
// shipped entries or not.
func TestShipperSeesAFork(t *testing.T) {
	t.Parallel()
	for name, after := range map[string]int{"shorter": 5, "longer": 80} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			j := start(t, openStore(t, filepath.Join(dir, "journal"), nil), nil)
			appendN(t, j.Journal, 0, 20)
			j.stop()
			copyDir(t, filepath.Join(dir, "journal"), filepath.Join(dir, "old"))
			j = start(t, openStore(t, filepath.Join(dir, "journal"), nil), nil)
			appendN(t, j.Journal, 20, 30)
			central := openCentral(t, filepath.Join(dir, "central.db"))
			ship(t, j.Journal, central, caughtUp)
			j.stop()

			old := start(t, openStore(t, filepath.Join(dir, "old"), nil), nil)
			appendN(t, old.Journal, 1000, after)
			st := ship(t, old.Journal, central, func(s audit.ShipperStatus) bool { return s.LastError != nil })
			if !st.Fork || !errors.Is(st.LastError, audit.ErrFork) {
				t.Errorf("status = %+v, want a fork", st)
			}
			if _, err := old.Append(t.Context(), signDraft(5000)); err != nil {
				t.Errorf("the fork stopped the journal: %v", err)
			}
		})
	}
}

// A file that an earlier version made goes on, rows and all.
func TestOldCentral(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	j := start(t, openStore(t, filepath.Join(dir, "journal"), nil), nil)
	appendN(t, j.Journal, 0, 20)
	file := filepath.Join(dir, "central.db")
	store := openCentral(t, file)
	ship(t, j.Journal, store, caughtUp)
	store.Close()
	plant(t, dir, "central.db", `DROP TABLE yj_schema_change`,
		`CREATE TABLE yj_migration (migration_no BIGINT NOT NULL, file_name VARCHAR(128) NOT NULL, file_sm3 VARCHAR(64) NOT NULL, PRIMARY KEY (migration_no))`,
		`INSERT INTO yj_migration VALUES (1, '0001_yj_record.sql', 'x'), (2, '0002_yj_record_by_id.sql', 'x'), (3, '0003_yj_record_by_time.sql', 'x'), (4, '0004_yj_batch.sql', 'x')`)
	for range 2 {
		store = openCentral(t, file)
		if r := compare(t, j.Journal, store); !r.OK() || r.Rows != j.Size() || r.NotShipped != 0 {
			t.Errorf("compare = %+v, want all rows of before", r)
		}
		store.Close()
	}
}

func TestCompareNamesWhatDiffers(t *testing.T) {
	t.Parallel()
	type want struct {
		kind   audit.DifferenceKind
		seq    uint64
		column string
	}
	mac := want{kind: audit.BatchWrong, seq: 32}
	for name, c := range map[string]struct {
		stmt string
		want []want
	}{
		"a name":         {`UPDATE yj_record SET signer_id = 'somebody' WHERE seq_no = 40`, []want{{audit.RowChanged, 40, "signer_id"}, mac}},
		"text to absent": {`UPDATE yj_record SET department_name = NULL WHERE seq_no = 40`, []want{{audit.RowChanged, 40, "department_name"}, mac}},
		"the time":       {`UPDATE yj_record SET signed_at_us = signed_at_us - 1 WHERE seq_no = 40`, []want{{audit.RowChanged, 40, "signed_at_us"}, mac}},
		"the status":     {`UPDATE yj_record SET status_code = 'void' WHERE seq_no = 40`, []want{{audit.RowChanged, 40, "status_code"}}},
		"the leaf":       {`UPDATE yj_record SET leaf_hash = '00' WHERE seq_no = 40`, []want{{audit.RowFork, 40, "leaf_hash"}, mac}},
		"a row removed":  {`DELETE FROM yj_record WHERE seq_no = 40`, []want{{audit.RowMissing, 40, ""}, mac}},
		"a row added": {`INSERT INTO yj_record (node_id, epoch_id, seq_no, leaf_hash, record_id, kind_name, signed_at_us, bound_us, status_code, created_by, created_at, modified_by, modified_at) SELECT node_id, epoch_id, 99, leaf_hash, record_id, kind_name, signed_at_us, bound_us, status_code, created_by, created_at, modified_by, modified_at FROM yj_record WHERE seq_no = 40`,
			[]want{{audit.RowBeyondJournal, 99, ""}, {audit.BatchMissing, 61, ""}}},
		"a row of another epoch": {`INSERT INTO yj_record (node_id, epoch_id, seq_no, leaf_hash, record_id, kind_name, signed_at_us, bound_us, status_code, created_by, created_at, modified_by, modified_at) SELECT node_id, '0123456789abcdef', 40, leaf_hash, record_id, kind_name, signed_at_us, bound_us, status_code, created_by, created_at, modified_by, modified_at FROM yj_record WHERE seq_no = 40`,
			[]want{{audit.RowAdded, 0, ""}}},
		"a MAC":           {`UPDATE yj_batch SET batch_mac = '00' WHERE first_seq = 32`, []want{mac}},
		"a batch removed": {`DELETE FROM yj_batch WHERE first_seq = 32`, []want{{audit.BatchMissing, 32, ""}}},
		"a row of another node": {`INSERT INTO yj_record (node_id, epoch_id, seq_no, leaf_hash, record_id, kind_name, signed_at_us, bound_us, status_code, created_by, created_at, modified_by, modified_at) SELECT 'evil-node', epoch_id, seq_no, leaf_hash, record_id, kind_name, signed_at_us, bound_us, status_code, created_by, created_at, modified_by, modified_at FROM yj_record WHERE seq_no = 40`,
			[]want{{audit.RowForeign, 40, ""}}},
		"a batch of another node": {`INSERT INTO yj_batch SELECT 'evil-node', 'ffffffffffffffff', first_seq, last_seq, batch_mac, mac_key_id, created_by, created_at, modified_by, modified_at FROM yj_batch WHERE first_seq = 32`,
			[]want{{audit.RowForeign, 32, ""}}},
		"a batch of another epoch": {`INSERT INTO yj_batch SELECT node_id, 'ffffffffffffffff', first_seq, last_seq, batch_mac, mac_key_id, created_by, created_at, modified_by, modified_at FROM yj_batch WHERE first_seq = 32`,
			[]want{{audit.RowAdded, 0, ""}}},
		"the last rows removed": {`DELETE FROM yj_record WHERE seq_no >= 40`, []want{{audit.RowMissing, 40, ""}, {audit.RowMissing, 48, ""}, mac, {audit.BatchWrong, 48, ""}}},
		"all rows removed":      {`DELETE FROM yj_record`, []want{{audit.RowMissing, 0, ""}, {audit.RowMissing, 16, ""}, {audit.RowMissing, 32, ""}, {audit.RowMissing, 48, ""}}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			j := start(t, openStore(t, filepath.Join(dir, "journal"), nil), nil)
			appendN(t, j.Journal, 0, 60)
			central := openCentral(t, filepath.Join(dir, "central.db"))
			ship(t, j.Journal, central, caughtUp)
			if r := compare(t, j.Journal, central); !r.OK() {
				t.Fatalf("before: %+v", r)
			}
			edit(t, dir, "central.db", c.stmt)
			r := compare(t, j.Journal, central)
			var got []want
			for _, d := range r.Differences {
				if d.Detail == "" || d.DetailZH == "" {
					t.Errorf("difference without words: %+v", d)
				}
				got = append(got, want{d.Kind, d.Sequence, d.Column})
			}
			if !slices.Equal(got, c.want) {
				t.Errorf("differences = %v, want %v", got, c.want)
			}
		})
	}
}

// The MAC's input is fixed: batches are checked years later.
func TestMACInput(t *testing.T) {
	t.Parallel()
	b := audit.ProjectedBatch{Node: "n", Epoch: "e", First: 1, Last: 1, Rows: []audit.ProjectedRow{{
		Node: "n", Epoch: "e", Sequence: 1, LeafHash: "ff", Kind: "k", Signer: "王", SignedAt: -5, CreatedBy: "c", Status: "not covered",
	}}}
	const want = "yinjian/projection/batch/v1\x00\x00\x00\x00\x01n\x00\x00\x00\x01e\x00\x00\x00\x011\x00\x00\x00\x011" +
		"\x00\x00\x00\x01n\x00\x00\x00\x01e\x00\x00\x00\x011\x00\x00\x00\x02ff\x00\x00\x00\x00\x00\x00\x00\x01k\x00\x00\x00\x00" +
		"\x00\x00\x00\x03王\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02-5\x00\x00\x00\x010\x00\x00\x00\x01c\x00\x00\x00\x010"
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

package dbtest

import (
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/emmansun/gmsm/sm3"

	"yinjian/appliance/audit"
)

// behind: what is far behind goes in longer batches, none of which is longer than a cipher machine takes at once.
func behind(t *testing.T, fresh func(testing.TB) *Database) {
	t.Parallel()
	j, _ := Journal(t, t.TempDir(), false)
	long := audit.Text(strings.Repeat("科", 85)) // 255 bytes
	var wg sync.WaitGroup
	for i := range 700 {
		wg.Go(func() {
			ref := sm3.Sum(fmt.Appendf(nil, "long %d", i))
			_, err := j.Append(t.Context(), audit.Draft{Kind: "sign.v1", Actor: "app/emr", Ref: ref[:], Fields: []audit.Field{
				{Name: audit.FieldApplication, Value: long}, {Name: audit.FieldSigner, Value: long}, {Name: audit.FieldDepartment, Value: long},
				{Name: audit.FieldDocumentType, Value: long}, {Name: audit.FieldCampus, Value: long},
			}})
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	s := fresh(t).Open(t)
	sh := StartShipper(t, j, s, func(c *audit.ShipperConfig) { c.BehindRows = 512 })
	sh.Wait(t, CaughtUp)
	same(t, j, s)
	longest, last := uint64(0), uint64(0)
	err := s.Batches(t.Context(), "east", j.Epoch().String(), func(b audit.ProjectedBatch) error {
		last = b.Last - b.First + 1
		longest = max(longest, last)
		err := s.Rows(t.Context(), "east", b.Epoch, b.First, func(r audit.ProjectedRow) error {
			if r.Sequence <= b.Last {
				b.Rows = append(b.Rows, r)
			}
			return nil
		})
		if n := len(b.MACInput()); n > 600<<10 {
			t.Errorf("a batch of %d bytes", n)
		}
		return err
	})
	if err != nil || longest <= 256 || longest >= 512 || last > 16 {
		t.Errorf("the longest batch has %d rows, the last %d, %v", longest, last, err)
	}
}

package central

import (
	"context"
	"fmt"
	"strings"
)

// countRows are the statements that count a table's rows, of the tables that grow.
var countRows = []Statement{
	register("size.record", `SELECT COUNT(*) FROM yj_record`),
	register("size.record.archive", `SELECT COUNT(*) FROM yj_record_archive`),
	register("size.batch", `SELECT COUNT(*) FROM yj_batch`),
	register("size.batch.archive", `SELECT COUNT(*) FROM yj_batch_archive`),
	register("size.change", `SELECT COUNT(*) FROM yj_change`),
	register("size.decision", `SELECT COUNT(*) FROM yj_decision`),
	register("size.duplicate", `SELECT COUNT(*) FROM yj_duplicate`),
	register("size.set_root", `SELECT COUNT(*) FROM yj_set_root`),
}

// CountRows answers how many rows each table has, -1 for those that were not counted before ctx ended. Of a large table that
// takes a while.
func (s *Store) CountRows(ctx context.Context) (map[string]int64, error) {
	out := map[string]int64{}
	var failed error
	for _, one := range countRows {
		table := one.Text[strings.LastIndexByte(one.Text, ' ')+1:]
		out[table] = -1
		var n int64
		if err := s.db.QueryRowContext(ctx, s.seam.Text(one.Text)).Scan(&n); err != nil {
			failed = fmt.Errorf("central database: counting %s: %w", table, classify(s.seam, err))
			continue
		}
		out[table] = n
	}
	return out, failed
}

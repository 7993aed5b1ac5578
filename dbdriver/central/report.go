package central

import (
	"context"
	"database/sql"
	"fmt"
)

// selectCounts is one grouped statement that all three databases take; times are an index's range. It is one of both tables,
// so that a row that is moved meanwhile counts once.
var selectCounts = register("record.counts", `SELECT application_id, document_type, department_name, status_code, campus_name, COUNT(*) FROM (`+
	andArchive(`SELECT application_id, document_type, department_name, status_code, campus_name FROM yj_record WHERE signed_at_us >= ? AND signed_at_us < ? AND kind_name = ?`)+
	`) yj_all GROUP BY application_id, document_type, department_name, status_code, campus_name`)

// A RecordGroup is what records are counted by. Absent text is "".
type RecordGroup struct {
	Application, DocumentType, Department, Status, Campus string
}

// CountRecords calls fn with how many rows of a kind each group has whose time is in [from, to), in µs since 1970 UTC.
func (s *Store) CountRecords(ctx context.Context, kind string, from, to int64, fn func(g RecordGroup, n uint64)) error {
	fail := func(err error) error {
		return fmt.Errorf("central database: counting records: %w", classify(s.seam, err))
	}
	rows, err := s.db.QueryContext(ctx, s.seam.Text(selectCounts.Text), twice(from, to, kind)...)
	if err != nil {
		return fail(err)
	}
	defer rows.Close()
	for rows.Next() {
		var app, doc, dept, status, campus sql.NullString
		var n int64
		if err := rows.Scan(&app, &doc, &dept, &status, &campus, &n); err != nil {
			return fail(err)
		}
		fn(RecordGroup{app.String, doc.String, dept.String, status.String, campus.String}, uint64(n))
	}
	if err := rows.Err(); err != nil {
		return fail(err)
	}
	return nil
}

var selectDuplicates = register("duplicate.count", `SELECT COUNT(*) FROM yj_duplicate WHERE created_at >= ? AND created_at < ?`)

// CountDuplicates answers how many of the records whose time is in [from, to) are there twice, because a request was sent
// again to the other campus.
func (s *Store) CountDuplicates(ctx context.Context, from, to int64) (uint64, error) {
	var n int64
	if err := s.db.QueryRowContext(ctx, s.seam.Text(selectDuplicates.Text), from, to).Scan(&n); err != nil {
		return 0, fmt.Errorf("central database: counting duplicates: %w", classify(s.seam, err))
	}
	return uint64(n), nil
}

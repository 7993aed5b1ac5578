package central

import (
	"context"
	"fmt"

	"yinjian/appliance/audit"
)

// Each question is asked along the index that it names, newest first; the other conditions hold where the number before
// them is not 0. The last five values are the row that the page comes after.
const (
	searchOrder      = ` ORDER BY signed_at_us DESC, node_id DESC, epoch_id DESC, seq_no DESC LIMIT ?`
	searchConditions = ` AND (? = 0 OR kind_name = ?) AND (? = 0 OR application_id = ?) AND (? = 0 OR department_name = ?) AND (? = 0 OR signer_id = ?)` +
		` AND (signed_at_us < ? OR node_id < ? OR (node_id = ? AND (epoch_id < ? OR (epoch_id = ? AND seq_no < ?))))` + searchOrder
	searchTimes = `signed_at_us >= ? AND signed_at_us <= ?`
)

var (
	searchByTime   = register("record.search.time", searchBoth(searchTimes))
	searchBySigner = register("record.search.signer", searchBoth(`signer_id = ? AND `+searchTimes))
	searchByID     = register("record.search.id", searchBoth(`record_id = ? AND `+searchTimes))
)

// searchBoth asks for a page of the table in use and one of the archive, each by its index, and for the first of both.
func searchBoth(conditions string) string {
	return `SELECT ` + recordColumns + ` FROM (` + andArchive(`SELECT `+recordColumns+` FROM (SELECT `+recordColumns+` FROM yj_record WHERE `+conditions+searchConditions+`) yj_page`) + `) yj_pages` + searchOrder
}

// A RecordPlace is where a row stands in the order of an answer.
type RecordPlace struct {
	SignedAt    int64 // µs since 1970 UTC
	Node, Epoch string
	Sequence    int64
}

// A RecordQuery asks for rows of the journals; "" leaves a condition out, and each text is the whole of it.
type RecordQuery struct {
	RecordID, Kind, Application, Signer, Department string
	From, Before                                    int64 // µs since 1970 UTC
	// After, if set, is the last row of the page before.
	After *RecordPlace
	Most  int
}

// SearchRecords answers rows, newest first.
func (s *Store) SearchRecords(ctx context.Context, q RecordQuery) ([]audit.ProjectedRow, error) {
	after := q.After
	if after == nil {
		after = &RecordPlace{SignedAt: q.Before} // no row has so early a name
	}
	query, args := searchByTime, []any{}
	switch {
	case q.RecordID != "":
		query, args = searchByID, append(args, q.RecordID)
	case q.Signer != "":
		query, args = searchBySigner, append(args, q.Signer)
	}
	args = append(args, q.From, after.SignedAt)
	for _, v := range []string{q.Kind, q.Application, q.Department, q.Signer} {
		on := int64(0)
		if v != "" {
			on = 1
		}
		args = append(args, on, v)
	}
	args = append(args, after.SignedAt, after.Node, after.Node, after.Epoch, after.Epoch, after.Sequence, int64(q.Most))
	rows, err := s.db.QueryContext(ctx, s.seam.Text(query.Text), append(twice(args...), int64(q.Most))...)
	if err != nil {
		return nil, fmt.Errorf("central database: %s: %w", query.Name, classify(s.seam, err))
	}
	defer rows.Close()
	var out []audit.ProjectedRow
	for rows.Next() {
		r, _, err := scanRecord(rows)
		if err != nil {
			return nil, fmt.Errorf("central database: %s: %w", query.Name, classify(s.seam, err))
		}
		out = append(out, r)
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("central database: %s: %w", query.Name, classify(s.seam, err))
	}
	return out, nil
}

package central

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"

	"yinjian/appliance/audit"
)

// What a rebuild asks (audit.Rebuild). A row of yj_rebuild is there while its node's rows are not whole.
var (
	insertRebuild  = register("rebuild.insert", `INSERT INTO yj_rebuild (node_id, rebuilt_by, phase_name, created_by, created_at, modified_by, modified_at) VALUES (?, ?, ?, ?, ?, ?, ?)`)
	deleteRebuild  = register("rebuild.delete", `DELETE FROM yj_rebuild WHERE node_id = ?`)
	selectRebuild  = register("rebuild.get", `SELECT rebuilt_by FROM yj_rebuild WHERE node_id = ?`)
	selectRebuilds = register("rebuild.list", `SELECT node_id, rebuilt_by, phase_name, modified_at FROM yj_rebuild ORDER BY node_id`)

	selectLastBatch  = registerBoth("batch.last", `SELECT MAX(first_seq) FROM yj_batch WHERE node_id = ? AND epoch_id = ?`)
	selectBatchAt    = registerBoth("batch.at", `SELECT MAX(first_seq) FROM yj_batch WHERE node_id = ? AND epoch_id = ? AND first_seq <= ?`)
	cutBatches       = registerBoth("batch.cut", `DELETE FROM yj_batch WHERE node_id = ? AND epoch_id = ? AND first_seq >= ?`)
	selectLastChange = register("change.last", `SELECT MAX(seq_no) FROM yj_change WHERE node_id = ? AND epoch_id = ?`)
	cutChanges       = register("change.cut", `DELETE FROM yj_change WHERE node_id = ? AND epoch_id = ? AND seq_no >= ?`)
	cutRoot          = register("root.cut", `DELETE FROM yj_set_root WHERE node_id = ? AND set_name = ?`)
	cutRecords       = registerBoth("record.cut", `DELETE FROM yj_record WHERE node_id = ? AND epoch_id = ? AND seq_no >= ?`)
)

// longestBatch is more rows than any batch has.
const longestBatch = 1 << 16

// Cut implements audit.Rebuildable.
func (s *Store) Cut(ctx context.Context, node, epoch string, most int) (rows uint64, more bool, err error) {
	err = inTx(ctx, s.db, s.seam, func(tx *sql.Tx) error {
		rows, more = 0, false
		last, err := s.greatest(ctx, tx, slices.Concat(selectLastSeq[:], selectLastBatch[:], []Statement{selectLastChange}), node, epoch)
		if err != nil || !last.Valid {
			return err
		}
		from := last.Int64 - int64(most) + 1
		if from > last.Int64 { // numbers that nobody gave, at the other end
			from = last.Int64
		}
		batch, err := s.greatest(ctx, tx, selectBatchAt[:], node, epoch, from)
		if err != nil {
			return err
		}
		if batch.Valid && batch.Int64 > from-longestBatch { // whole batches, so that what is left has them all
			from = batch.Int64
		}
		for _, st := range append(cutBatches[:], cutChanges) {
			if _, err = tx.ExecContext(ctx, s.seam.Text(st.Text), node, epoch, from); err != nil {
				return err
			}
		}
		if _, err = tx.ExecContext(ctx, s.seam.Text(cutRoot.Text), node, audit.ChangeSet); err != nil { // it sums up what was there
			return err
		}
		for _, st := range cutRecords { // the archive last: what is moved meanwhile is found there, now or the next time
			res, err := tx.ExecContext(ctx, s.seam.Text(st.Text), node, epoch, from)
			if err != nil {
				return err
			}
			n, err := res.RowsAffected()
			if err != nil {
				return err
			}
			rows += uint64(n)
		}
		more = true
		return nil
	})
	if err != nil {
		return 0, false, fmt.Errorf("central database: emptying epoch %s of %s: %w", epoch, node, err)
	}
	return rows, more, nil
}

// Rebuilder implements audit.Projection.
func (s *Store) Rebuilder(ctx context.Context, node string) (by string, err error) {
	err = s.db.QueryRowContext(ctx, s.seam.Text(selectRebuild.Text), node).Scan(&by)
	if err = classify(s.seam, err); errors.Is(err, audit.ErrNotFound) {
		return "", nil
	} else if err != nil {
		return "", fmt.Errorf("central database: rebuilds: %w", err)
	}
	return by, nil
}

// Marks implements audit.Rebuildable.
func (s *Store) Marks(ctx context.Context) (marks []audit.RebuildMark, err error) {
	rows, err := s.db.QueryContext(ctx, s.seam.Text(selectRebuilds.Text))
	if err != nil {
		return nil, fmt.Errorf("central database: rebuilds: %w", classify(s.seam, err))
	}
	defer rows.Close()
	for rows.Next() {
		var m audit.RebuildMark
		if err := rows.Scan(&m.Node, &m.By, &m.Phase, &m.At); err != nil {
			return nil, fmt.Errorf("central database: rebuilds: %w", classify(s.seam, err))
		}
		marks = append(marks, m)
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("central database: rebuilds: %w", classify(s.seam, err))
	}
	return marks, nil
}

// Mark implements audit.Rebuildable.
func (s *Store) Mark(ctx context.Context, m audit.RebuildMark) error {
	return s.mark(ctx, m.Node, func(tx *sql.Tx) error {
		res, err := tx.ExecContext(ctx, s.seam.Text(insertRebuild.Text), m.Node, m.By, string(m.Phase), m.By, m.At, m.By, m.At)
		return wrote(1, res, err)
	})
}

// Unmark implements audit.Rebuildable.
func (s *Store) Unmark(ctx context.Context, node string) error {
	return s.mark(ctx, node, func(*sql.Tx) error { return nil })
}

func (s *Store) mark(ctx context.Context, node string, then func(*sql.Tx) error) error {
	err := inTx(ctx, s.db, s.seam, func(tx *sql.Tx) error {
		if _, err := tx.ExecContext(ctx, s.seam.Text(deleteRebuild.Text), node); err != nil {
			return err
		}
		return then(tx)
	})
	if err != nil {
		return fmt.Errorf("central database: marking the rebuild of %s: %w", node, err)
	}
	return nil
}

// Repair makes again whatever of the schema is gone, though the list has it. It removes nothing. Rows that went with a
// table are for audit.Rebuild.
func Repair(ctx context.Context, db *sql.DB, seam *Seam, by Author) error {
	return migrate(ctx, db, seam, by, migrationFiles, true)
}

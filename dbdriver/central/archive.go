package central

import (
	"context"
	"database/sql"
	"fmt"
	"math"
	"slices"
	"strings"

	"yinjian/appliance/audit"
	"yinjian/dbdriver"
)

// The rows of closed months lie in tables of their own, yj_record_archive and yj_batch_archive, with the same columns and
// indexes: what is written meets small tables, and all that is read is read of both. A row is moved as it is, so that its
// leaf hash and its batch's MAC hold there, too.

// archiveText is what is asked of the archive instead.
func archiveText(text string) string {
	return strings.NewReplacer("yj_record", "yj_record_archive", "yj_batch", "yj_batch_archive").Replace(text)
}

// registerBoth registers a statement on a table and the same on its archive.
func registerBoth(name, text string) [2]Statement {
	return [2]Statement{register(name, text), register(name+".archive", archiveText(text))}
}

// andArchive is a SELECT of a table and of its archive, as one statement, whose values are bound [twice].
func andArchive(text string) string { return text + " UNION ALL " + archiveText(text) }

func twice(args ...any) []any { return append(args, args...) }

const (
	ofRecords = ` WHERE node_id = ? AND epoch_id = ? AND seq_no >= ? AND seq_no <= ?`
	ofBatches = ` WHERE node_id = ? AND epoch_id = ? AND first_seq >= ? AND first_seq <= ?`
)

var (
	selectTimes = register("archive.times", `SELECT seq_no, signed_at_us FROM yj_record WHERE node_id = ? AND epoch_id = ? AND seq_no >= ? ORDER BY seq_no LIMIT ?`)

	archiveRecords = register("archive.records", `INSERT INTO yj_record_archive (`+recordColumns+`) SELECT `+recordColumns+` FROM yj_record`+ofRecords)
	leaveRecords   = register("archive.records.leave", `DELETE FROM yj_record`+ofRecords)
	archiveBatches = register("archive.batches", `INSERT INTO yj_batch_archive (`+batchColumns+`) SELECT `+batchColumns+` FROM yj_batch`+ofBatches)
	leaveBatches   = register("archive.batches.leave", `DELETE FROM yj_batch`+ofBatches)

	movedRecords = register("archive.records.moved", `SELECT seq_no FROM yj_record_archive`+ofRecords)
	movedBatches = register("archive.batches.moved", `SELECT first_seq FROM yj_batch_archive`+ofBatches)

	countInUse = register("archive.count", `SELECT COUNT(*) FROM yj_record WHERE node_id = ? AND signed_at_us >= ? AND signed_at_us < ?`)
)

// Moved is what one step of [Store.Archive] did.
type Moved struct {
	Rows, Batches uint64
	Next          uint64 // where to go on
	More          bool   // there may be more; false: rows with a time were found, and none of before
}

// Archive moves a node's rows of an epoch from a sequence on, at most most of them, up to the last whose time is before
// before (µs since 1970 UTC), and the batches that begin among them, in one transaction: after a stop at any moment a row
// is in one of the tables, and it may be called again. A row that is in the archive already, and one that is changed
// meanwhile, is dbdriver.ErrConflict, and nothing is moved; so is it while the node's rows are made anew
// (audit.ErrRebuilding).
func (s *Store) Archive(ctx context.Context, node, epoch string, from uint64, before int64, most int) (Moved, error) {
	var m Moved
	err := inTx(ctx, s.db, s.seam, func(tx *sql.Tx) error {
		m = Moved{}
		var by string
		err := tx.QueryRowContext(ctx, s.seam.Text(selectRebuild.Text), node).Scan(&by)
		if err == nil {
			return fmt.Errorf("%w, %s", audit.ErrRebuilding, by)
		} else if err != sql.ErrNoRows {
			return err
		}
		rows, last, err := s.closed(ctx, tx, node, epoch, int64(from), before, most)
		if err != nil || last < 0 {
			return err
		}
		if m = (Moved{Next: uint64(last) + 1, More: true}); rows == 0 {
			return nil
		}
		move := func(st Statement) (int64, error) {
			res, err := tx.ExecContext(ctx, s.seam.Text(st.Text), node, epoch, int64(from), last)
			if err != nil {
				return 0, err
			}
			return res.RowsAffected()
		}
		var counts [4]int64
		for i, st := range []Statement{archiveRecords, leaveRecords, archiveBatches, leaveBatches} {
			if counts[i], err = move(st); err != nil {
				return err
			}
		}
		if counts[0] != rows || counts[1] != rows || counts[2] != counts[3] {
			return fmt.Errorf("%w: rows %d to %d were changed while they were moved", dbdriver.ErrConflict, from, last)
		}
		m.Rows, m.Batches = uint64(rows), uint64(counts[2])
		return nil
	})
	if err != nil {
		return Moved{}, fmt.Errorf("central database: archiving from %d of epoch %s: %w", from, epoch, err)
	}
	return m, nil
}

// notMoved looks whether one of the keys that the transaction has just inserted is in the archive: another writer was first,
// and its rows were moved.
func (s *Store) notMoved(ctx context.Context, tx *sql.Tx, moved Statement, b audit.ProjectedBatch, keys []int64) error {
	if len(keys) == 0 {
		return nil
	}
	rows, err := tx.QueryContext(ctx, s.seam.Text(moved.Text), b.Node, b.Epoch, slices.Min(keys), slices.Max(keys))
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		var key int64
		if err := rows.Scan(&key); err != nil {
			return err
		}
		if slices.Contains(keys, key) {
			return fmt.Errorf("%w: %d was written by another and moved to the archive meanwhile", dbdriver.ErrConflict, key)
		}
	}
	return rows.Err()
}

// closed finds what of the next most rows is to be moved: how many there are up to the last whose time is before before. A
// time is not always later than that of the row before, and one before the clock had a time (0) says nothing: as many of
// these as are asked for are passed over, n is 0 then. last is -1 where there is nothing to go on to.
func (s *Store) closed(ctx context.Context, tx *sql.Tx, node, epoch string, from, before int64, most int) (n, last int64, err error) {
	rows, err := tx.QueryContext(ctx, s.seam.Text(selectTimes.Text), node, epoch, from, int64(most))
	if err != nil {
		return 0, 0, err
	}
	defer rows.Close()
	last = -1
	var seen, timeless, seq int64
	for ; rows.Next(); seen++ {
		var at int64
		if err := rows.Scan(&seq, &at); err != nil {
			return 0, 0, err
		}
		if at <= 0 {
			timeless++
		} else if at < before {
			n, last = seen+1, seq
		}
	}
	if n == 0 && timeless == int64(most) && seq < math.MaxInt64 {
		last = seq
	}
	return n, last, rows.Err()
}

// CountInUse answers how many of a node's rows whose time is in [from, to) (µs since 1970 UTC) are not in the archive.
func (s *Store) CountInUse(ctx context.Context, node string, from, to int64) (uint64, error) {
	var n int64
	if err := s.db.QueryRowContext(ctx, s.seam.Text(countInUse.Text), node, from, to).Scan(&n); err != nil {
		return 0, fmt.Errorf("central database: counting what is in use: %w", classify(s.seam, err))
	}
	return uint64(n), nil
}

type querier interface {
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
}

// greatest is the greatest of what several statements answer; not valid: none answers any.
func (s *Store) greatest(ctx context.Context, q querier, statements []Statement, args ...any) (out sql.NullInt64, err error) {
	for _, st := range statements {
		var n sql.NullInt64
		if err := q.QueryRowContext(ctx, s.seam.Text(st.Text), args...).Scan(&n); err != nil {
			return n, err
		}
		if !out.Valid || n.Valid && n.Int64 > out.Int64 {
			out = n
		}
	}
	return out, nil
}

package central

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"
	"strings"

	"yinjian/appliance/audit"
	"yinjian/dbdriver"
)

// A request that was sent again to the other campus makes a second valid record with the same record id. The later of the two
// is marked, so that who counts records counts one.
var (
	selectTwins     = register("duplicate.twins", severalTwins(1))
	insertDuplicate = register("duplicate.insert", `INSERT INTO yj_duplicate (`+markColumns+`) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`)
	selectDuplicate = register("duplicate.get", `SELECT of_node, of_epoch, of_seq FROM yj_duplicate WHERE node_id = ? AND epoch_id = ? AND seq_no = ?`)
)

// severalTwins asks for n record ids.
func severalTwins(n int) string {
	return andArchive(`SELECT node_id, epoch_id, seq_no, record_id, signed_at_us FROM yj_record WHERE node_id <> ? AND kind_name = ? AND (record_id = ?` +
		strings.Repeat(" OR record_id = ?", n-1) + `)`)
}

// A Place is where a row stands.
type Place struct {
	Node, Epoch string
	Sequence    uint64
}

// MarkDuplicates looks for other nodes' rows with the record ids of these rows, which are one node's, of one kind, and in the
// database. Of each pair the one that was signed later is marked. It may be repeated.
func (s *Store) MarkDuplicates(ctx context.Context, rows []audit.ProjectedRow) error {
	rows = slices.DeleteFunc(slices.Clone(rows), func(r audit.ProjectedRow) bool { return r.RecordID == "" })
	for _, n := range rowsPerStatement {
		for ; len(rows) >= n; rows = rows[n:] {
			if err := s.markDuplicates(ctx, rows[:n]); err != nil {
				return fmt.Errorf("central database: marking duplicates: %w", err)
			}
		}
	}
	return nil
}

func (s *Store) markDuplicates(ctx context.Context, mine []audit.ProjectedRow) error {
	args := []any{mine[0].Node, mine[0].Kind}
	byID := map[string]*audit.ProjectedRow{}
	for i := range mine {
		args = append(args, mine[i].RecordID)
		byID[mine[i].RecordID] = &mine[i]
	}
	rows, err := s.db.QueryContext(ctx, s.seam.Text(severalTwins(len(mine))), twice(args...)...)
	if err != nil {
		return classify(s.seam, err)
	}
	defer rows.Close()
	var twins []audit.ProjectedRow
	for rows.Next() {
		var r audit.ProjectedRow
		var seq int64
		if err := rows.Scan(&r.Node, &r.Epoch, &seq, &r.RecordID, &r.SignedAt); err != nil {
			return classify(s.seam, err)
		}
		r.Sequence = uint64(seq)
		twins = append(twins, r)
	}
	if err := rows.Err(); err != nil {
		return classify(s.seam, err)
	}
	rows.Close()
	for i := range twins {
		first, later := byID[twins[i].RecordID], &twins[i]
		if later.SignedAt < first.SignedAt || later.SignedAt == first.SignedAt && later.Node < first.Node {
			first, later = later, first
		}
		if err := s.markDuplicate(ctx, first, later, &mine[0]); err != nil {
			return err
		}
	}
	return nil
}

func (s *Store) markDuplicate(ctx context.Context, first, later, writer *audit.ProjectedRow) error {
	by := writer.CreatedBy
	if _, marked, err := s.DuplicateOf(ctx, Place{later.Node, later.Epoch, later.Sequence}); err != nil || marked {
		return err
	}
	row := markRow{Place{later.Node, later.Epoch, later.Sequence}, Place{first.Node, first.Epoch, first.Sequence}, later.RecordID, written{by, later.SignedAt, by, later.SignedAt}}
	mac, keyID, err := s.sealed(ctx, DuplicateSet, writer.Node, row.columns())
	if err != nil {
		return err
	}
	s.seal.Lock()
	defer s.seal.Unlock()
	err = inTx(ctx, s.db, s.seam, func(tx *sql.Tx) error {
		res, err := tx.ExecContext(ctx, s.seam.Text(insertDuplicate.Text), later.Node, later.Epoch, int64(later.Sequence), later.RecordID,
			first.Node, first.Epoch, int64(first.Sequence), by, later.SignedAt, by, later.SignedAt, text(mac), text(keyID))
		if err := wrote(1, res, err); err != nil || mac == "" {
			return err
		}
		return s.fold(ctx, tx, s.seal.mac, keyID, audit.SetRoot{Node: writer.Node, Set: DuplicateSet, ModifiedBy: by, ModifiedAt: later.SignedAt}, []string{mac}, nil)
	})
	if errors.Is(err, dbdriver.ErrConflict) { // the other campus did it, or somebody has changed the root
		if _, marked, lerr := s.DuplicateOf(ctx, row.Place); lerr == nil && marked {
			return nil
		}
	}
	return err
}

// DuplicateOf answers which row a row repeats; false when it is none's duplicate.
func (s *Store) DuplicateOf(ctx context.Context, p Place) (of Place, marked bool, err error) {
	var seq int64
	err = s.db.QueryRowContext(ctx, s.seam.Text(selectDuplicate.Text), p.Node, p.Epoch, int64(p.Sequence)).Scan(&of.Node, &of.Epoch, &seq)
	if errors.Is(err, sql.ErrNoRows) {
		return of, false, nil
	}
	of.Sequence = uint64(seq)
	return of, err == nil, classify(s.seam, err)
}

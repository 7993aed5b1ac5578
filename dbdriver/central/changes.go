package central

import (
	"context"
	"database/sql"
	"errors"
	"fmt"

	"yinjian/appliance/audit"
	"yinjian/dbdriver"
)

// What was changed: accounts, rights, keys, certificates, machines, sources of time.
const changeColumns = `node_id, epoch_id, seq_no, change_no, leaf_hash, kind_name, act_name, actor_name, object_id, reason_text, before_text, after_text, changed_at_us, bound_us, row_mac, mac_key_id, created_by, created_at, modified_by, modified_at`

var (
	insertChange    = register("change.insert", `INSERT INTO yj_change (`+changeColumns+`) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`)
	selectChanges   = register("change.page", `SELECT `+changeColumns+` FROM yj_change WHERE node_id = ? AND epoch_id = ? AND seq_no >= ? ORDER BY seq_no LIMIT ?`)
	selectChangeNos = register("change.there", `SELECT seq_no FROM yj_change WHERE node_id = ? AND epoch_id = ? AND seq_no >= ? AND seq_no <= ? ORDER BY seq_no`)
	changesByTime   = register("change.time", `SELECT `+changeColumns+` FROM yj_change WHERE changed_at_us >= ? AND changed_at_us < ? ORDER BY changed_at_us, node_id, epoch_id, seq_no LIMIT ?`)
	changesByObject = register("change.object", `SELECT `+changeColumns+` FROM yj_change WHERE object_id = ? AND changed_at_us >= ? AND changed_at_us < ? ORDER BY changed_at_us, node_id, epoch_id, seq_no LIMIT ?`)
	changeNodes     = register("change.nodes", `SELECT DISTINCT node_id FROM yj_change`)
	changeEpochs    = register("change.epochs", `SELECT DISTINCT epoch_id FROM yj_change WHERE node_id = ?`)
)

// What sums up a table whose rows have MACs, by node.
const rootColumns = `node_id, set_name, root_version, entry_count, set_sum, root_mac, mac_key_id, created_by, created_at, modified_by, modified_at`

var (
	insertRoot  = register("root.insert", `INSERT INTO yj_set_root (`+rootColumns+`) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`)
	selectRoot  = register("root.get", `SELECT `+rootColumns+` FROM yj_set_root WHERE node_id = ? AND set_name = ?`)
	selectRoots = register("root.list", `SELECT `+rootColumns+` FROM yj_set_root ORDER BY node_id, set_name`)
	updateRoot  = register("root.update", `UPDATE yj_set_root SET root_version = ?, entry_count = ?, set_sum = ?, root_mac = ?, mac_key_id = ?, modified_by = ?, modified_at = ? WHERE node_id = ? AND set_name = ? AND root_version = ?`)
)

// Drops, for the acceptance check.
var (
	DropChanges = register("change.drop", `DROP TABLE yj_change`)
	DropRoots   = register("root.drop", `DROP TABLE yj_set_root`)
	// and those of others.
	DropDecisions  = register("decision.drop", `DROP TABLE yj_decision`)
	DropRebuilds   = register("rebuild.drop", `DROP TABLE yj_rebuild`)
	DropDuplicates = register("duplicate.drop", `DROP TABLE yj_duplicate`)
	DropArchive    = register("record.archive.drop", `DROP TABLE yj_record_archive`)
	DropArchived   = register("batch.archive.drop", `DROP TABLE yj_batch_archive`)
)

// applyChanges writes the batch's changes that are not there, and takes them into their set's root.
func (s *Store) applyChanges(ctx context.Context, tx *sql.Tx, b audit.ProjectedBatch) error {
	if len(b.Changes) == 0 {
		return nil
	}
	first, last := b.Changes[0].Sequence, b.Changes[len(b.Changes)-1].Sequence
	rows, err := tx.QueryContext(ctx, s.seam.Text(selectChangeNos.Text), b.Node, b.Epoch, int64(first), int64(last))
	if err != nil {
		return err
	}
	defer rows.Close()
	there := map[uint64]bool{}
	for rows.Next() {
		var seq int64
		if err := rows.Scan(&seq); err != nil {
			return err
		}
		there[uint64(seq)] = true
	}
	if err := rows.Err(); err != nil {
		return err
	}
	rows.Close()
	var missing []*audit.ProjectedChange
	var added []string
	for i := range b.Changes {
		if c := &b.Changes[i]; !there[c.Sequence] {
			missing, added = append(missing, c), append(added, c.MAC)
		}
	}
	var args []any
	for _, n := range rowsPerStatement {
		for ; len(missing) >= n; missing = missing[n:] {
			args = args[:0]
			for _, c := range missing[:n] {
				args = append(args, c.Node, c.Epoch, int64(c.Sequence), int64(c.Change), c.LeafHash, c.Kind,
					text(c.Act), text(c.Actor), text(c.Object), text(c.Reason), text(c.Before), text(c.After), c.ChangedAt, c.Bound, c.MAC, c.KeyID,
					c.CreatedBy, c.CreatedAt, c.ModifiedBy, c.ModifiedAt)
			}
			res, err := tx.ExecContext(ctx, s.seam.Text(SeveralRows(insertChange.Text, n)), args...)
			if err := wrote(n, res, err); err != nil {
				return err
			}
		}
	}
	by := &b.Changes[len(b.Changes)-1]
	return s.fold(ctx, tx, b.Sealer, b.KeyID, audit.SetRoot{Node: b.Node, Set: audit.ChangeSet, ModifiedBy: by.ModifiedBy, ModifiedAt: by.ModifiedAt}, added, nil)
}

// fold takes rows into a set's root and out of it, by their MACs, in the transaction that writes or removes them. of says
// which set, who does it and when. A root whose MAC is wrong is left as it is, so that what somebody did to it is not
// covered by a right one: the sweep names it, until the database is rebuilt.
func (s *Store) fold(ctx context.Context, tx *sql.Tx, mac audit.MAC, keyID string, of audit.SetRoot, added, removed []string) error {
	if len(added)+len(removed) == 0 {
		return nil
	}
	root, err := scanRoot(tx.QueryRowContext(ctx, s.seam.Text(selectRoot.Text), of.Node, of.Set))
	fresh := errors.Is(err, sql.ErrNoRows)
	if err != nil && !fresh {
		return err
	}
	if fresh {
		root = of
		root.CreatedBy, root.CreatedAt = of.ModifiedBy, of.ModifiedAt
	} else if right, err := root.Sealed(ctx, mac); err != nil || !right {
		return err
	}
	if err := root.Fold(added, removed); err != nil {
		return err
	}
	was := root.Version
	root.Version = max(was+1, uint64(max(of.ModifiedAt, 0)))
	root.ModifiedBy, root.ModifiedAt, root.KeyID = of.ModifiedBy, of.ModifiedAt, keyID
	if err := root.Seal(ctx, mac); err != nil {
		return err
	}
	if fresh {
		return s.insertRoot(ctx, tx, &root)
	}
	res, err := tx.ExecContext(ctx, s.seam.Text(updateRoot.Text), int64(root.Version), int64(root.Count), root.Sum, root.MAC, root.KeyID,
		root.ModifiedBy, root.ModifiedAt, root.Node, root.Set, int64(was))
	if err != nil {
		return err
	}
	if n, err := res.RowsAffected(); err != nil || n != 1 { // a transaction of before that the server had not finished
		return errors.Join(err, fmt.Errorf("%w: the root of %s was changed meanwhile", dbdriver.ErrConflict, root.Set))
	}
	return nil
}

func (s *Store) insertRoot(ctx context.Context, tx *sql.Tx, root *audit.SetRoot) error {
	res, err := tx.ExecContext(ctx, s.seam.Text(insertRoot.Text), root.Node, root.Set, int64(root.Version), int64(root.Count), root.Sum, root.MAC, root.KeyID,
		root.CreatedBy, root.CreatedAt, root.ModifiedBy, root.ModifiedAt)
	return wrote(1, res, err)
}

func scanRoot(row interface{ Scan(...any) error }) (audit.SetRoot, error) {
	var r audit.SetRoot
	var version, count int64
	err := row.Scan(&r.Node, &r.Set, &version, &count, &r.Sum, &r.MAC, &r.KeyID, &r.CreatedBy, &r.CreatedAt, &r.ModifiedBy, &r.ModifiedAt)
	r.Version, r.Count = uint64(version), uint64(count)
	return r, err
}

func scanChange(rows *sql.Rows) (audit.ProjectedChange, int64, error) {
	var c audit.ProjectedChange
	var seq, change int64
	var act, actor, object, reason, before, after sql.NullString
	err := rows.Scan(&c.Node, &c.Epoch, &seq, &change, &c.LeafHash, &c.Kind, &act, &actor, &object, &reason, &before, &after, &c.ChangedAt, &c.Bound,
		&c.MAC, &c.KeyID, &c.CreatedBy, &c.CreatedAt, &c.ModifiedBy, &c.ModifiedAt)
	c.Sequence, c.Change, c.Act, c.Actor, c.Object = uint64(seq), uint64(change), act.String, actor.String, object.String
	c.Reason, c.Before, c.After = reason.String, before.String, after.String
	return c, seq, err
}

// ApplyChanges writes the changes of batches whose rows were shipped before there was a table for them, in one transaction.
func (s *Store) ApplyChanges(ctx context.Context, batches ...audit.ProjectedBatch) error {
	err := inTx(ctx, s.db, s.seam, func(tx *sql.Tx) error {
		for _, b := range batches {
			if err := s.applyChanges(ctx, tx, b); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("central database: applying changes: %w", err)
	}
	return nil
}

// Changes implements audit.ChangeLog.
func (s *Store) Changes(ctx context.Context, node, epoch string, from uint64, fn func(audit.ProjectedChange) error) error {
	return pages(ctx, s, []Statement{selectChanges}, node, epoch, int64(from), scanChange, fn)
}

// ChangeNodes implements audit.ChangeLog.
func (s *Store) ChangeNodes(ctx context.Context) ([]string, error) {
	return s.texts(ctx, []Statement{changeNodes})
}

// ChangeEpochs implements audit.ChangeLog.
func (s *Store) ChangeEpochs(ctx context.Context, node string) ([]string, error) {
	return s.texts(ctx, []Statement{changeEpochs}, node)
}

// Roots implements audit.ChangeLog.
func (s *Store) Roots(ctx context.Context) ([]audit.SetRoot, error) {
	rows, err := s.db.QueryContext(ctx, s.seam.Text(selectRoots.Text))
	if err != nil {
		return nil, fmt.Errorf("central database: roots: %w", classify(s.seam, err))
	}
	defer rows.Close()
	var out []audit.SetRoot
	for rows.Next() {
		r, err := scanRoot(rows)
		if err != nil {
			return nil, fmt.Errorf("central database: roots: %w", classify(s.seam, err))
		}
		out = append(out, r)
	}
	return out, classify(s.seam, rows.Err())
}

// ListChanges calls fn with the changes from one time to before another (µs since 1970 UTC), of one object or, with "", of
// all, in the order of time. An error of fn ends it and is returned.
func (s *Store) ListChanges(ctx context.Context, object string, from, before int64, fn func(audit.ProjectedChange) error) error {
	type key struct {
		node, epoch string
		seq         uint64
	}
	seen := map[key]bool{} // of the last time read: a page begins with it
	for limit := int64(pageRows); ; {
		query, args := changesByTime, []any{from, before, limit}
		if object != "" {
			query, args = changesByObject, append([]any{object}, args...)
		}
		var page []audit.ProjectedChange
		rows, err := s.db.QueryContext(ctx, s.seam.Text(query.Text), args...)
		if err != nil {
			return fmt.Errorf("central database: %s: %w", query.Name, classify(s.seam, err))
		}
		for rows.Next() {
			c, _, err := scanChange(rows)
			if err != nil {
				rows.Close()
				return fmt.Errorf("central database: %s: %w", query.Name, classify(s.seam, err))
			}
			page = append(page, c)
		}
		err = rows.Err()
		rows.Close()
		if err != nil {
			return fmt.Errorf("central database: %s: %w", query.Name, classify(s.seam, err))
		}
		for _, c := range page {
			k := key{c.Node, c.Epoch, c.Sequence}
			if seen[k] {
				continue
			}
			if c.ChangedAt != from {
				from = c.ChangedAt
				clear(seen)
			}
			seen[k] = true
			if err := fn(c); err != nil {
				return err
			}
		}
		if int64(len(page)) < limit {
			return nil
		}
		if len(seen) >= len(page) { // all of one time
			limit *= 2
		}
	}
}

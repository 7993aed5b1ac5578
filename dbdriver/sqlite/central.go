package sqlite

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"

	"yinjian/appliance/audit"
	"yinjian/dbdriver"
)

// Central is the embedded central database, an audit.Projection. Its text keeps to what DM8 and PostgreSQL take too:
// absent text is NULL, times are BIGINT microseconds UTC, hashes lower-case hexadecimal.
type Central struct {
	db     *sql.DB
	schema *schema
	insert []*sql.Stmt // of the lengths of rowsPerStatement
}

// OpenCentral opens or makes the database file (mode 0600) and applies the migrations. A file whose schema is another
// one than they make is refused with dbdriver.ErrDamaged.
func OpenCentral(ctx context.Context, file string) (*Central, error) {
	f, err := os.OpenFile(file, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("sqlite: opening central database: %w", err)
	}
	f.Close()
	if err := syncFolder(filepath.Dir(file)); err != nil {
		return nil, fmt.Errorf("sqlite: opening central database: %w", err)
	}
	// NORMAL: a power cut may take the last transactions along, whole and in order; the shipper asks where to go on. The
	// journal's fsyncs, for which signatures wait, have the disk to themselves.
	db, err := openSynchronous(file, false, 4, "NORMAL")
	if err != nil {
		return nil, err
	}
	c := &Central{db: db}
	if c.schema, err = centralSchema(); err != nil {
		db.Close()
		return nil, err
	}
	var mode string
	if err := db.QueryRowContext(ctx, `PRAGMA journal_mode = WAL`).Scan(&mode); err != nil || mode != "wal" {
		db.Close()
		return nil, fmt.Errorf("sqlite: opening central database: journal mode %q: %w", mode, classify(err))
	}
	err = migrate(ctx, db, "central", math.MaxInt64)
	if err == nil {
		err = c.schema.check(ctx, db)
	}
	if err == nil {
		c.insert, err = prepareRows(ctx, db, insertRecord)
		err = classify(err)
	}
	if err != nil {
		db.Close()
		return nil, fmt.Errorf("sqlite: opening central database: %w", err)
	}
	return c, nil
}

// Close closes the file.
func (c *Central) Close() error { return c.db.Close() }

// text is NULL for "".
func text(s string) sql.NullString { return sql.NullString{String: s, Valid: s != ""} }

// Apply implements audit.Projection. The keys are read first and missing rows inserted; a unique violation can then
// only come from another writer, and is an error that the shipper retries.
func (c *Central) Apply(ctx context.Context, b audit.ProjectedBatch) error {
	err := inTx(ctx, c.db, func(tx *sql.Tx) error {
		if err := c.schema.unchanged(ctx, tx, nil); err != nil {
			return err
		}
		there, err := shippedLeaves(ctx, tx, b)
		if err != nil {
			return err
		}
		var missing []*audit.ProjectedRow
		for i := range b.Rows {
			r := &b.Rows[i]
			switch leaf, ok := there[r.Sequence]; {
			case !ok:
				missing = append(missing, r)
			case leaf != r.LeafHash:
				return fmt.Errorf("%w: %s, epoch %s, sequence %d", audit.ErrFork, r.Node, r.Epoch, r.Sequence)
			}
		}
		err = insertRows(ctx, tx, c.insert, len(missing), func(args []any, i int) []any {
			r := missing[i]
			return append(args, r.Node, r.Epoch, int64(r.Sequence), r.LeafHash, text(r.RecordID), r.Kind,
				text(r.Application), text(r.Signer), text(r.Department), text(r.DocumentType), text(r.Campus), r.SignedAt,
				r.Bound, r.Status, r.CreatedBy, r.CreatedAt, r.ModifiedBy, r.ModifiedAt)
		}, all)
		if err != nil {
			return err
		}
		var last int64
		var mac, key string
		err = tx.QueryRowContext(ctx, selectBatch, b.Node, b.Epoch, int64(b.First)).Scan(&last, &mac, &key)
		if err == nil {
			if uint64(last) != b.Last || mac != b.MAC || key != b.KeyID {
				return fmt.Errorf("%w: the batch from %d is stored with another end or MAC", dbdriver.ErrConflict, b.First)
			}
			return nil
		}
		if !errors.Is(err, sql.ErrNoRows) || len(b.Rows) == 0 {
			return err
		}
		by, at := b.Rows[0].CreatedBy, b.Rows[len(b.Rows)-1].CreatedAt
		return one(tx.ExecContext(ctx, insertBatch, b.Node, b.Epoch, int64(b.First), int64(b.Last), b.MAC, b.KeyID, by, at, by, at))
	})
	if err != nil {
		return fmt.Errorf("sqlite: applying entries %d to %d: %w", b.First, b.Last, err)
	}
	return nil
}

// shippedLeaves reads the leaf hashes of the batch's rows that are there, by sequence.
func shippedLeaves(ctx context.Context, tx *sql.Tx, b audit.ProjectedBatch) (map[uint64]string, error) {
	rows, err := tx.QueryContext(ctx, selectLeaves, b.Node, b.Epoch, int64(b.First), int64(b.Last))
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	there := map[uint64]string{}
	for rows.Next() {
		var seq int64
		var leaf string
		if err := rows.Scan(&seq, &leaf); err != nil {
			return nil, err
		}
		there[uint64(seq)] = leaf
	}
	return there, rows.Err()
}

// Shipped implements audit.Projection.
func (c *Central) Shipped(ctx context.Context, node, epoch string) (uint64, error) {
	var last sql.NullInt64
	if err := c.db.QueryRowContext(ctx, selectLastSeq, node, epoch).Scan(&last); err != nil {
		return 0, fmt.Errorf("sqlite: last shipped entry: %w", classify(err))
	}
	if !last.Valid {
		return 0, fmt.Errorf("sqlite: last shipped entry: %w", errNoRow)
	}
	return uint64(last.Int64), nil
}

// Leaf implements audit.Projection.
func (c *Central) Leaf(ctx context.Context, node, epoch string, sequence uint64) (string, error) {
	var leaf string
	if err := c.db.QueryRowContext(ctx, selectShipped, node, epoch, int64(sequence)).Scan(&leaf); err != nil {
		return "", fmt.Errorf("sqlite: row %d: %w", sequence, classify(err))
	}
	return leaf, nil
}

// Epochs implements audit.Projection.
func (c *Central) Epochs(ctx context.Context, node string) ([]string, error) {
	return c.texts(ctx, "epochs", selectEpochs, node, node)
}

// Nodes implements audit.Projection.
func (c *Central) Nodes(ctx context.Context) ([]string, error) {
	return c.texts(ctx, "nodes", selectNodes)
}

// texts reads one column.
func (c *Central) texts(ctx context.Context, what, query string, args ...any) ([]string, error) {
	rows, err := c.db.QueryContext(ctx, query, args...)
	if err != nil {
		return nil, fmt.Errorf("sqlite: %s: %w", what, classify(err))
	}
	defer rows.Close()
	var out []string
	for rows.Next() {
		var s string
		if err := rows.Scan(&s); err != nil {
			return nil, fmt.Errorf("sqlite: %s: %w", what, classify(err))
		}
		out = append(out, s)
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("sqlite: %s: %w", what, classify(err))
	}
	return out, nil
}

// Rows implements audit.Projection, by keyset pages.
func (c *Central) Rows(ctx context.Context, node, epoch string, from uint64, fn func(audit.ProjectedRow) error) error {
	return pages(ctx, c.db, selectRecords, node, epoch, int64(from), func(rows *sql.Rows) (audit.ProjectedRow, int64, error) {
		var r audit.ProjectedRow
		var seq int64
		var id, app, signer, dept, doc, campus sql.NullString
		err := rows.Scan(&r.Node, &r.Epoch, &seq, &r.LeafHash, &id, &r.Kind, &app, &signer, &dept, &doc, &campus,
			&r.SignedAt, &r.Bound, &r.Status, &r.CreatedBy, &r.CreatedAt, &r.ModifiedBy, &r.ModifiedAt)
		r.Sequence, r.RecordID, r.Application, r.Signer = uint64(seq), id.String, app.String, signer.String
		r.Department, r.DocumentType, r.Campus = dept.String, doc.String, campus.String
		return r, seq, err
	}, fn)
}

// Batches implements audit.Projection.
func (c *Central) Batches(ctx context.Context, node, epoch string, fn func(audit.ProjectedBatch) error) error {
	return pages(ctx, c.db, selectBatches, node, epoch, 0, func(rows *sql.Rows) (audit.ProjectedBatch, int64, error) {
		var b audit.ProjectedBatch
		var first, last, createdAt, modifiedAt int64
		var createdBy, modifiedBy string
		err := rows.Scan(&b.Node, &b.Epoch, &first, &last, &b.MAC, &b.KeyID, &createdBy, &createdAt, &modifiedBy, &modifiedAt)
		b.First, b.Last = uint64(first), uint64(last)
		return b, first, err
	}, fn)
}

// pages reads pages by key and hands the values to fn while no query runs.
func pages[T any](ctx context.Context, db *sql.DB, query, node, epoch string, from int64,
	scan func(*sql.Rows) (T, int64, error), fn func(T) error) error {
	const what = "reading the central database"
	for {
		var page []T
		rows, err := db.QueryContext(ctx, query, node, epoch, from, pageRows)
		if err != nil {
			return fmt.Errorf("sqlite: %s: %w", what, classify(err))
		}
		for rows.Next() {
			v, key, err := scan(rows)
			if err != nil {
				rows.Close()
				return fmt.Errorf("sqlite: %s: %w", what, classify(err))
			}
			page = append(page, v)
			from = key + 1
		}
		err = rows.Err()
		rows.Close()
		if err != nil {
			return fmt.Errorf("sqlite: %s: %w", what, classify(err))
		}
		for _, v := range page {
			if err := fn(v); err != nil {
				return err
			}
		}
		if len(page) < pageRows {
			return nil
		}
	}
}

// Package central keeps the central database, which people query: a projection of the appliances' journals. The same
// statements serve SQLite (the embedded default), PostgreSQL and what speaks its wire, and DM8; a [Seam] holds what
// differs. Every write is in a transaction, with keys that the caller made, so that a driver that repeats a statement
// whose answer was lost repeats nothing; any error ends the transaction, also where the database would keep it open.
package central

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"sync"

	"yinjian/appliance/audit"
	"yinjian/dbdriver"
)

// A Store is the central database, an audit.Projection. Safe for concurrent use. Each call lasts as long as its context
// allows.
type Store struct {
	db       *sql.DB
	seam     *Seam
	settings []Setting
	seal     sealing
}

// Open reads the server's settings, applies the migrations and has each statement compiled. It refuses a database whose
// settings or tables do not fit (dbdriver.ErrUnfit) and a standby (dbdriver.ErrReadOnly). The store closes db; after an
// error the caller does.
func Open(ctx context.Context, db *sql.DB, seam *Seam, by Author) (*Store, error) {
	db.SetMaxIdleConns(maxIdle)
	s := &Store{db: db, seam: seam}
	if err := db.PingContext(ctx); err != nil {
		return nil, fmt.Errorf("central database: %w", classify(seam, err))
	}
	if seam.Settings != nil {
		var err error
		if s.settings, err = seam.Settings(ctx, db); err != nil {
			return nil, fmt.Errorf("central database: reading its settings: %w", classify(seam, err))
		}
		if err := refusal(s.settings); err != nil {
			return nil, fmt.Errorf("central database: %w", err)
		}
	}
	if err := Migrate(ctx, db, seam, by); err != nil {
		return nil, err
	}
	if err := Describe(ctx, db, seam); err != nil { // words for people; all works without
		s.settings = append(s.settings, Setting{Name: "comments", Value: "COMMENT ON", Verdict: Doubtful, Why: "表与列的说明未能写入 (tables and columns could not be described): " + err.Error()})
	}
	if err := inTx(ctx, db, seam, func(*sql.Tx) error { return nil }); err != nil { // the guard looks
		return nil, fmt.Errorf("central database: %w", err)
	}
	for _, r := range registry {
		if strings.HasPrefix(r.Text, "CREATE ") || strings.HasPrefix(r.Text, "DROP ") || strings.Contains(r.Text, ProbeTable) {
			continue
		}
		stmt, err := db.PrepareContext(ctx, seam.Text(r.Text))
		if err != nil {
			return nil, fmt.Errorf("central database: statement %s: %w", r.Name, classify(seam, err))
		}
		stmt.Close()
	}
	return s, nil
}

// Close closes the database.
func (s *Store) Close() error { return s.db.Close() }

// Settings are the server's, as they were when it was opened.
func (s *Store) Settings() []Setting { return slices.Clone(s.settings) }

var errNoRow = fmt.Errorf("%w (%w)", audit.ErrNotFound, dbdriver.ErrNotFound)

// ours are the errors that classify leaves as they are.
var ours = []error{
	context.Canceled, context.DeadlineExceeded, audit.ErrFork, audit.ErrCorrupt, audit.ErrNotFound, audit.ErrRebuilding, dbdriver.ErrConflict,
	dbdriver.ErrUnavailable, dbdriver.ErrUnfit,
}

func classify(seam *Seam, err error) error {
	if err == nil || slices.ContainsFunc(ours, func(o error) bool { return errors.Is(err, o) }) {
		return err
	}
	if errors.Is(err, sql.ErrNoRows) {
		return errNoRow
	}
	return seam.Classify(err)
}

// inTx runs fn in a transaction, each of whose statements sees what was committed before it, whatever the server's own
// setting is ([Store.Apply] looks a second time). Whatever fails ends it.
func inTx(ctx context.Context, db *sql.DB, seam *Seam, fn func(*sql.Tx) error) error {
	tx, err := db.BeginTx(ctx, &sql.TxOptions{Isolation: sql.LevelReadCommitted})
	if err != nil {
		return classify(seam, err)
	}
	if seam.Guard != nil {
		err = seam.Guard(ctx, tx)
	}
	if err == nil {
		err = fn(tx)
	}
	if err != nil {
		tx.Rollback() // the cause is err
	} else {
		// An error here leaves it open whether the transaction is in the database. Whoever ships asks for the position.
		err = tx.Commit()
	}
	if err = classify(seam, err); errors.Is(err, dbdriver.ErrReadOnly) {
		// After a switchover this connection is to the old primary, and would serve for long: look for the new one.
		db.SetMaxIdleConns(-1)
		db.SetMaxIdleConns(maxIdle)
	}
	return err
}

// maxIdle is how many connections without work are kept.
const maxIdle = 4

// text is NULL for "".
func text(s string) sql.NullString { return sql.NullString{String: s, Valid: s != ""} }

// wrote checks that a statement wrote as many rows as it had.
func wrote(rows int, res sql.Result, err error) error {
	if err != nil {
		return err
	}
	n, err := res.RowsAffected()
	if err == nil && n != int64(rows) {
		err = fmt.Errorf("%w (%w): a statement that writes %d rows wrote %d", dbdriver.ErrDamaged, audit.ErrCorrupt, rows, n)
	}
	return err
}

// rowsPerStatement are the lengths of statements that insert several rows, the longest first: each statement costs a
// message to the server and back. 64 rows of yj_change have 1280 values; DM8 takes 6056.
var rowsPerStatement = [...]int{64, 16, 4, 1}

// SeveralRows is an INSERT … VALUES (…) for n rows.
func SeveralRows(insert string, n int) string {
	values := insert[strings.LastIndex(insert, "VALUES ")+len("VALUES "):]
	return insert + strings.Repeat(", "+values, n-1)
}

// Apply implements audit.Projection. The keys are read first and missing rows inserted; a unique violation can then
// only come from another writer, and is an error that the shipper retries. So is what another writer inserted and
// [Store.Archive] moved meanwhile: the key of the table in use is free again, and has waited for the one who freed it, so
// that a second look at the archive finds it.
func (s *Store) Apply(ctx context.Context, b audit.ProjectedBatch) error {
	err := inTx(ctx, s.db, s.seam, func(tx *sql.Tx) error {
		there, err := s.shippedLeaves(ctx, tx, b)
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
		if _, ok := there[b.First-1]; !ok && follows(&b) {
			return fmt.Errorf("%w: the row before %d is gone", dbdriver.ErrConflict, b.First)
		}
		if err := s.insert(ctx, tx, missing); err != nil {
			return err
		}
		keys := make([]int64, len(missing))
		for i, r := range missing {
			keys[i] = int64(r.Sequence)
		}
		if err := s.notMoved(ctx, tx, movedRecords, b, keys); err != nil {
			return err
		}
		if err := s.applyChanges(ctx, tx, b); err != nil {
			return err
		}
		var last int64
		var mac, key string
		err = tx.QueryRowContext(ctx, s.seam.Text(selectBatch.Text), twice(b.Node, b.Epoch, int64(b.First))...).Scan(&last, &mac, &key)
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
		res, err := tx.ExecContext(ctx, s.seam.Text(insertBatch.Text), b.Node, b.Epoch, int64(b.First), int64(b.Last), b.MAC, b.KeyID, by, at, by, at)
		if err := wrote(1, res, err); err != nil {
			return err
		}
		return s.notMoved(ctx, tx, movedBatches, b, []int64{int64(b.First)})
	})
	if err != nil {
		return fmt.Errorf("central database: applying entries %d to %d: %w", b.First, b.Last, err)
	}
	return nil
}

// follows reports whether a row of the same epoch stands before the batch.
func follows(b *audit.ProjectedBatch) bool {
	return b.First > 0 && len(b.Rows) > 0 && b.Rows[0].Kind != audit.KindEpoch
}

// rowValues are what statements that insert rows have for arguments.
var rowValues = sync.Pool{New: func() any { return new([]any) }}

// recordValues is how many an inserted row has.
const recordValues = 18

// insert inserts rows in order.
func (s *Store) insert(ctx context.Context, tx *sql.Tx, rows []*audit.ProjectedRow) error {
	lent := rowValues.Get().(*[]any)
	args := *lent
	defer func() {
		clear(args[:cap(args)]) // the texts are not kept
		*lent = args[:0]
		rowValues.Put(lent)
	}()
	for _, n := range rowsPerStatement {
		for ; len(rows) >= n; rows = rows[n:] {
			args = slices.Grow(args[:0], n*recordValues)
			for _, r := range rows[:n] {
				args = append(args, r.Node, r.Epoch, int64(r.Sequence), r.LeafHash, text(r.RecordID), r.Kind, text(r.Application),
					text(r.Signer), text(r.Department), text(r.DocumentType), text(r.Campus), r.SignedAt, r.Bound, r.Status,
					r.CreatedBy, r.CreatedAt, r.ModifiedBy, r.ModifiedAt)
			}
			res, err := tx.ExecContext(ctx, s.seam.Text(SeveralRows(insertRecord.Text, n)), args...)
			if err := wrote(n, res, err); err != nil {
				return err
			}
		}
	}
	return nil
}

// shippedLeaves reads the leaf hashes of the batch's rows that are there, and of the row before, by sequence.
func (s *Store) shippedLeaves(ctx context.Context, tx *sql.Tx, b audit.ProjectedBatch) (map[uint64]string, error) {
	from := int64(b.First)
	if follows(&b) {
		from--
	}
	rows, err := tx.QueryContext(ctx, s.seam.Text(selectLeaves.Text), twice(b.Node, b.Epoch, from, int64(b.Last))...)
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
		if other, again := there[uint64(seq)]; again && other != leaf {
			return nil, fmt.Errorf("%w: %s, epoch %s, sequence %d is there twice", audit.ErrFork, b.Node, b.Epoch, seq)
		}
		there[uint64(seq)] = leaf
	}
	return there, rows.Err()
}

// Shipped implements audit.Projection.
func (s *Store) Shipped(ctx context.Context, node, epoch string) (uint64, error) {
	last, err := s.greatest(ctx, s.db, selectLastSeq[:], node, epoch)
	if err != nil {
		return 0, fmt.Errorf("central database: last shipped entry: %w", classify(s.seam, err))
	}
	if !last.Valid {
		return 0, fmt.Errorf("central database: last shipped entry: %w", errNoRow)
	}
	return uint64(last.Int64), nil
}

// Leaf implements audit.Projection.
func (s *Store) Leaf(ctx context.Context, node, epoch string, sequence uint64) (string, error) {
	var leaf string
	err := sql.ErrNoRows
	for i := 0; i < len(selectLeaf) && errors.Is(err, sql.ErrNoRows); i++ {
		err = s.db.QueryRowContext(ctx, s.seam.Text(selectLeaf[i].Text), node, epoch, int64(sequence)).Scan(&leaf)
	}
	if err != nil {
		return "", fmt.Errorf("central database: row %d: %w", sequence, classify(s.seam, err))
	}
	return leaf, nil
}

// Epochs implements audit.Projection.
func (s *Store) Epochs(ctx context.Context, node string) ([]string, error) {
	return s.texts(ctx, slices.Concat(recordEpochs[:], batchEpochs[:]), node)
}

// Nodes implements audit.Projection.
func (s *Store) Nodes(ctx context.Context) ([]string, error) {
	return s.texts(ctx, slices.Concat(recordNodes[:], batchNodes[:]))
}

// texts reads one column by several statements, each value once, sorted by bytes, which databases do not all do.
func (s *Store) texts(ctx context.Context, statements []Statement, args ...any) ([]string, error) {
	var out []string
	for _, st := range statements {
		rows, err := s.db.QueryContext(ctx, s.seam.Text(st.Text), args...)
		if err != nil {
			return nil, fmt.Errorf("central database: %s: %w", st.Name, classify(s.seam, err))
		}
		defer rows.Close()
		for rows.Next() {
			var v string
			if err := rows.Scan(&v); err != nil {
				return nil, fmt.Errorf("central database: %s: %w", st.Name, classify(s.seam, err))
			}
			out = append(out, v)
		}
		if err := rows.Err(); err != nil {
			return nil, fmt.Errorf("central database: %s: %w", st.Name, classify(s.seam, err))
		}
		rows.Close()
	}
	slices.Sort(out)
	return slices.Compact(out), nil
}

// Rows implements audit.Projection, by keyset pages.
func (s *Store) Rows(ctx context.Context, node, epoch string, from uint64, fn func(audit.ProjectedRow) error) error {
	return pages(ctx, s, selectRecords[:], node, epoch, int64(from), scanRecord, fn)
}

func scanRecord(rows *sql.Rows) (audit.ProjectedRow, int64, error) {
	var r audit.ProjectedRow
	var seq int64
	var id, app, signer, dept, doc, campus sql.NullString
	err := rows.Scan(&r.Node, &r.Epoch, &seq, &r.LeafHash, &id, &r.Kind, &app, &signer, &dept, &doc, &campus,
		&r.SignedAt, &r.Bound, &r.Status, &r.CreatedBy, &r.CreatedAt, &r.ModifiedBy, &r.ModifiedAt)
	r.Sequence, r.RecordID, r.Application, r.Signer = uint64(seq), id.String, app.String, signer.String
	r.Department, r.DocumentType, r.Campus = dept.String, doc.String, campus.String
	return r, seq, err
}

// Batches implements audit.Projection.
func (s *Store) Batches(ctx context.Context, node, epoch string, fn func(audit.ProjectedBatch) error) error {
	return pages(ctx, s, selectBatches[:], node, epoch, math.MinInt64, func(rows *sql.Rows) (audit.ProjectedBatch, int64, error) {
		var b audit.ProjectedBatch
		var first, last, createdAt, modifiedAt int64
		var createdBy, modifiedBy string
		err := rows.Scan(&b.Node, &b.Epoch, &first, &last, &b.MAC, &b.KeyID, &createdBy, &createdAt, &modifiedBy, &modifiedAt)
		b.First, b.Last = uint64(first), uint64(last)
		return b, first, err
	}, fn)
}

// pageRows is how many rows a query answers.
const pageRows = 512

// A page is what one query answered and was not handed on yet, by keys.
type page[T any] struct {
	rows []T
	keys []int64
	last bool // nothing follows
}

func readPage[T any](ctx context.Context, s *Store, query Statement, node, epoch string, from int64, limit int, scan func(*sql.Rows) (T, int64, error)) (page[T], error) {
	var p page[T]
	fail := func(err error) (page[T], error) {
		return p, fmt.Errorf("central database: %s: %w", query.Name, classify(s.seam, err))
	}
	rows, err := s.db.QueryContext(ctx, s.seam.Text(query.Text), node, epoch, from, int64(limit))
	if err != nil {
		return fail(err)
	}
	defer rows.Close()
	for rows.Next() {
		v, key, err := scan(rows)
		if err != nil {
			return fail(err)
		}
		p.rows, p.keys = append(p.rows, v), append(p.keys, key)
	}
	if err := rows.Err(); err != nil {
		return fail(err)
	}
	p.last = len(p.keys) < limit || p.keys[limit-1] == math.MaxInt64
	return p, nil
}

// pages reads pages by key, of a table or of one and its archive, and hands the values to fn while no query runs. The
// archive's page is always read after the other's: a row that is moved meanwhile is then found in one of them or in both,
// never in neither. One that stays in both is handed on twice.
func pages[T any](ctx context.Context, s *Store, queries []Statement, node, epoch string, from int64,
	scan func(*sql.Rows) (T, int64, error), fn func(T) error) error {
	var now, old page[T]
	old.last = len(queries) == 1
	for {
		var err error
		if len(now.keys) == 0 && !now.last {
			if now, err = readPage(ctx, s, queries[0], node, epoch, from, pageRows, scan); err != nil {
				return err
			}
			old = page[T]{last: len(queries) == 1}
		}
		if len(old.keys) == 0 && !old.last {
			if old, err = readPage(ctx, s, queries[1], node, epoch, from, pageRows, scan); err != nil {
				return err
			}
		}
		var next []T
		switch {
		case len(now.keys) == 0 && len(old.keys) == 0:
			return nil
		case len(old.keys) == 0 || len(now.keys) > 0 && now.keys[0] < old.keys[0]:
			next, from = now.rows[:1], now.keys[0]+1
			now.rows, now.keys = now.rows[1:], now.keys[1:]
		case len(now.keys) == 0 || old.keys[0] < now.keys[0]:
			next, from = old.rows[:1], old.keys[0]+1
			old.rows, old.keys = old.rows[1:], old.keys[1:]
		default: // in both: was it moved?
			there, err := readPage(ctx, s, queries[0], node, epoch, now.keys[0], 1, scan)
			if err != nil {
				return err
			}
			next = []T{old.rows[0]}
			if len(there.keys) > 0 && there.keys[0] == now.keys[0] {
				next = append(next, now.rows[0])
			}
			from = now.keys[0] + 1
			now.rows, now.keys, old.rows, old.keys = now.rows[1:], now.keys[1:], old.rows[1:], old.keys[1:]
		}
		for _, v := range next {
			if err := fn(v); err != nil {
				return err
			}
		}
	}
}

package central

import (
	"context"
	"crypto/hmac"
	"database/sql"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync"

	"yinjian/appliance/account"
	"yinjian/appliance/audit"
)

// Names of the sets (audit.Set) of rows that the store makes itself: each has a MAC, by the key of the appliance that
// wrote it, and that appliance's root sums them up.
const (
	DecisionSet  = "yj_decision"
	DuplicateSet = "yj_duplicate"
)

// sealing is what such rows are sealed with.
type sealing struct {
	sync.Mutex // held while a root is read and written: one transaction of this appliance at a time
	node       string
	mac        audit.MAC
	keyID      func(node string) string
}

// SealWith gives the store, before anything is asked of it, the appliance's name and its MACs, under a key's name for each
// node whose rows it writes. A store without makes rows without MACs.
func (s *Store) SealWith(node string, mac audit.MAC, keyID func(node string) string) {
	s.seal.node, s.seal.mac, s.seal.keyID = node, mac, keyID
}

// sealed computes a row's MAC, "" if the store has none.
func (s *Store) sealed(ctx context.Context, set, node string, columns []audit.Column) (mac, keyID string, err error) {
	if s.seal.mac == nil {
		return "", "", nil
	}
	mac, err = audit.RowMAC(ctx, s.seal.mac, set, columns)
	return mac, s.seal.keyID(node), err
}

// written is who wrote a row and last changed it, and when.
type written struct {
	by         string
	at         int64
	modifiedBy string
	modifiedAt int64
}

func (w *written) columns() []audit.Column {
	return []audit.Column{
		{Name: "created_by", Value: w.by}, {Name: "created_at", Value: fmt.Sprint(w.at)},
		{Name: "modified_by", Value: w.modifiedBy}, {Name: "modified_at", Value: fmt.Sprint(w.modifiedAt)},
	}
}

type decisionRow struct {
	account.Decision
	written
	mac, keyID string
}

func (r *decisionRow) key() string { return fmt.Sprintf("%s %s %d", r.Kind, r.Object, r.Version) }

func (r *decisionRow) columns() []audit.Column {
	return append(decided(&r.Decision), r.written.columns()...)
}

func decided(d *account.Decision) []audit.Column {
	return []audit.Column{
		{Name: "object_kind", Value: d.Kind}, {Name: "object_id", Value: d.Object}, {Name: "version_no", Value: fmt.Sprint(d.Version)},
		{Name: "node_id", Value: d.Node}, {Name: "epoch_id", Value: d.Epoch}, {Name: "intent_id", Value: d.Intent}, {Name: "body_sm3", Value: d.Body},
		{Name: "decided_at", Value: fmt.Sprint(d.At.UnixMicro())},
	}
}

var (
	firstDecisions  = register("decision.written", `SELECT `+decisionColumns+` FROM yj_decision WHERE created_by = ? AND object_kind <> ? ORDER BY intent_id LIMIT ?`)
	nextDecisions   = register("decision.written.next", `SELECT `+decisionColumns+` FROM yj_decision WHERE created_by = ? AND object_kind <> ? AND intent_id > ? ORDER BY intent_id LIMIT ?`)
	decisionWriters = register("decision.writers", `SELECT DISTINCT created_by FROM yj_decision`)
	mendDecision    = register("decision.mend", `UPDATE yj_decision SET epoch_id = ?, body_sm3 = ?, decided_at = ?, created_at = ?, modified_by = ?, modified_at = ?, row_mac = ?, mac_key_id = ? WHERE intent_id = ?`)
)

// decisionRows calls fn with the decisions that a node wrote, while no query runs. The intents that were made void are
// none: they matter for as long as a statement may be on its way.
func (s *Store) decisionRows(ctx context.Context, node string, fn func(*decisionRow) error) error {
	query, args := firstDecisions, []any{node, spentKind, int64(pageRows)}
	for {
		var page []decisionRow
		rows, err := s.db.QueryContext(ctx, s.seam.Text(query.Text), args...)
		if err != nil {
			return fmt.Errorf("central database: %s: %w", query.Name, classify(s.seam, err))
		}
		for rows.Next() {
			var r decisionRow
			var mac, keyID sql.NullString
			if err = scanDecision(rows, &r.Decision, &r.by, &r.at, &r.modifiedBy, &r.modifiedAt, &mac, &keyID); err != nil {
				break
			}
			r.mac, r.keyID = mac.String, keyID.String
			page = append(page, r)
		}
		rows.Close()
		if err = errors.Join(err, rows.Err()); err != nil {
			return fmt.Errorf("central database: %s: %w", query.Name, classify(s.seam, err))
		}
		for i := range page {
			if err := fn(&page[i]); err != nil {
				return err
			}
		}
		if len(page) < pageRows {
			return nil
		}
		query, args = nextDecisions, []any{node, spentKind, page[len(page)-1].Intent, int64(pageRows)}
	}
}

// DecisionsOf is the set of decisions. want calls fn with those that follow from the node's journal.
func (s *Store) DecisionsOf(want func(ctx context.Context, fn func(account.Decision) error) error) audit.Set {
	return audit.Set{
		Name: DecisionSet,
		Rows: func(ctx context.Context, node string, fn func(audit.SetRow) error) error {
			return s.decisionRows(ctx, node, func(r *decisionRow) error {
				return fn(audit.SetRow{Key: r.key(), Columns: r.columns(), MAC: r.mac, KeyID: r.keyID})
			})
		},
		Writers: func(ctx context.Context) ([]string, error) { return s.texts(ctx, []Statement{decisionWriters}) },
		Writer:  func(node string) string { return node },
		Want: func(ctx context.Context, fn func(audit.SetRow) error) error {
			return want(ctx, func(d account.Decision) error {
				r := decisionRow{Decision: d}
				return fn(audit.SetRow{Key: r.key(), Columns: decided(&d)})
			})
		},
	}
}

// MendDecisions puts right the decisions that this appliance wrote, by what its journal says of them, and their root, for a
// rebuild at a time (µs since 1970 UTC). A row that the journal does not have keeps a wrong MAC.
func (s *Store) MendDecisions(ctx context.Context, journal []account.Decision, now int64) error {
	if s.seal.mac == nil {
		return nil
	}
	node := s.seal.node
	want := map[string]account.Decision{}
	for _, d := range journal {
		want[d.Intent] = d
	}
	var wrong []decisionRow
	err := s.decisionRows(ctx, node, func(r *decisionRow) error {
		mac, keyID, err := s.sealed(ctx, DecisionSet, node, r.columns())
		if err != nil || hmac.Equal([]byte(mac), []byte(r.mac)) && keyID == r.keyID {
			return err
		}
		d, ok := want[r.Intent]
		if !ok || d.Kind != r.Kind || d.Object != r.Object || d.Version != r.Version || d.Node != r.Node {
			return nil
		}
		at := d.At.UnixMicro()
		mended := decisionRow{Decision: d, written: written{node, at, node, at}}
		mended.mac, mended.keyID, err = s.sealed(ctx, DecisionSet, node, mended.columns())
		wrong = append(wrong, mended)
		return err
	})
	if err != nil {
		return err
	}
	if len(wrong) > 0 {
		err = inTx(ctx, s.db, s.seam, func(tx *sql.Tx) error {
			for _, r := range wrong {
				res, err := tx.ExecContext(ctx, s.seam.Text(mendDecision.Text), r.Epoch, r.Body, r.At.UnixMicro(), r.at, r.modifiedBy, r.modifiedAt, r.mac, r.keyID, r.Intent)
				if err := wrote(1, res, err); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("central database: mending decisions: %w", err)
		}
	}
	return s.recount(ctx, s.DecisionsOf(nil), node, node, now)
}

// recount makes a node's root of a set anew, for a rebuild, of the rows whose MACs are right.
func (s *Store) recount(ctx context.Context, set audit.Set, node, by string, now int64) error {
	if s.seal.mac == nil {
		return nil
	}
	var macs []string
	err := set.Rows(ctx, node, func(r audit.SetRow) error {
		mac, keyID, err := s.sealed(ctx, set.Name, node, r.Columns)
		if err == nil && hmac.Equal([]byte(mac), []byte(r.MAC)) && keyID == r.KeyID {
			macs = append(macs, mac)
		}
		return err
	})
	if err != nil {
		return err
	}
	s.seal.Lock()
	defer s.seal.Unlock()
	err = inTx(ctx, s.db, s.seam, func(tx *sql.Tx) error {
		root := audit.SetRoot{
			Node: node, Set: set.Name, Version: uint64(max(now, 0)), KeyID: s.seal.keyID(node), CreatedBy: by, CreatedAt: now, ModifiedBy: by, ModifiedAt: now,
		}
		old, err := scanRoot(tx.QueryRowContext(ctx, s.seam.Text(selectRoot.Text), node, set.Name))
		if err == nil {
			right, err := old.Sealed(ctx, s.seal.mac)
			if err != nil {
				return err
			}
			if right { // a version only grows
				root.Version, root.CreatedBy, root.CreatedAt = max(root.Version, old.Version+1), old.CreatedBy, old.CreatedAt
			}
		} else if !errors.Is(err, sql.ErrNoRows) {
			return err
		}
		if err := root.Fold(macs, nil); err != nil {
			return err
		}
		if err := root.Seal(ctx, s.seal.mac); err != nil {
			return err
		}
		if _, err := tx.ExecContext(ctx, s.seam.Text(cutRoot.Text), node, set.Name); err != nil {
			return err
		}
		return s.insertRoot(ctx, tx, &root)
	})
	if err != nil {
		return fmt.Errorf("central database: the root of %s: %w", set.Name, err)
	}
	return nil
}

// markColumns are those of a duplicate's mark.
const markColumns = `node_id, epoch_id, seq_no, record_id, of_node, of_epoch, of_seq, created_by, created_at, modified_by, modified_at, row_mac, mac_key_id`

var (
	selectMarks = register("duplicate.page", `SELECT `+markColumns+` FROM yj_duplicate WHERE node_id = ? AND epoch_id = ? AND seq_no >= ? ORDER BY seq_no LIMIT ?`)
	markNodes   = register("duplicate.nodes", `SELECT DISTINCT node_id FROM yj_duplicate`)
	markEpochs  = register("duplicate.epochs", `SELECT DISTINCT epoch_id FROM yj_duplicate WHERE node_id = ?`)
	markWriters = register("duplicate.writers", `SELECT DISTINCT created_by FROM yj_duplicate`)
	cutMarks    = register("duplicate.cut", `DELETE FROM yj_duplicate WHERE created_by = ?`)
)

type markRow struct {
	Place
	of       Place
	recordID string
	written
}

func (r *markRow) columns() []audit.Column {
	return append([]audit.Column{
		{Name: "node_id", Value: r.Node}, {Name: "epoch_id", Value: r.Epoch}, {Name: "seq_no", Value: fmt.Sprint(r.Sequence)}, {Name: "record_id", Value: r.recordID},
		{Name: "of_node", Value: r.of.Node}, {Name: "of_epoch", Value: r.of.Epoch}, {Name: "of_seq", Value: fmt.Sprint(r.of.Sequence)},
	}, r.written.columns()...)
}

// MarksOf is the set of marks of duplicates. A node's are those that it wrote, on whichever node's rows.
func (s *Store) MarksOf() audit.Set {
	return audit.Set{
		Name: DuplicateSet, Writer: audit.Writer,
		Writers: func(ctx context.Context) ([]string, error) { return s.texts(ctx, []Statement{markWriters}) },
		Rows: func(ctx context.Context, node string, fn func(audit.SetRow) error) error {
			scan := func(rows *sql.Rows) (audit.SetRow, int64, error) {
				var r markRow
				var seq, of int64
				var mac, keyID sql.NullString
				err := rows.Scan(&r.Node, &r.Epoch, &seq, &r.recordID, &r.of.Node, &r.of.Epoch, &of, &r.by, &r.at, &r.modifiedBy, &r.modifiedAt, &mac, &keyID)
				r.Sequence, r.of.Sequence = uint64(seq), uint64(of)
				out := audit.SetRow{Key: fmt.Sprintf("%s/%s/%d", r.Node, r.Epoch, seq), Columns: r.columns(), MAC: mac.String, KeyID: keyID.String}
				return out, seq, err
			}
			mine := audit.Column{Name: "created_by", Value: audit.Writer(node)}
			nodes, err := s.texts(ctx, []Statement{markNodes})
			if err != nil {
				return err
			}
			for _, of := range nodes {
				epochs, err := s.texts(ctx, []Statement{markEpochs}, of)
				for i := 0; i < len(epochs) && err == nil; i++ {
					err = pages(ctx, s, []Statement{selectMarks}, of, epochs[i], math.MinInt64, scan, func(r audit.SetRow) error {
						if !slices.Contains(r.Columns, mine) {
							return nil
						}
						return fn(r)
					})
				}
				if err != nil {
					return err
				}
			}
			return nil
		},
	}
}

// Marks is the table of duplicates' marks for a rebuild (an audit.Table). Whoever fills the records makes the marks.
type Marks struct {
	Store *Store
	Now   func() int64 // µs since 1970 UTC
}

// Name implements audit.Table.
func (Marks) Name() string { return DuplicateSet }

// Empty implements audit.Table: the marks that the node wrote go, and those of nobody who has rows here.
func (m Marks) Empty(ctx context.Context, node string, done func(rows uint64)) error {
	writers, err := m.Store.texts(ctx, []Statement{markWriters})
	if err != nil {
		return err
	}
	nodes, err := m.Store.Nodes(ctx)
	if err != nil {
		return err
	}
	writers = slices.DeleteFunc(writers, func(w string) bool {
		return w != audit.Writer(node) && slices.ContainsFunc(nodes, func(other string) bool { return audit.Writer(other) == w })
	})
	var rows int64
	err = inTx(ctx, m.Store.db, m.Store.seam, func(tx *sql.Tx) error {
		rows = 0
		for _, w := range writers {
			res, err := tx.ExecContext(ctx, m.Store.seam.Text(cutMarks.Text), w)
			if err != nil {
				return err
			}
			n, err := res.RowsAffected()
			if err != nil {
				return err
			}
			rows += n
		}
		_, err := tx.ExecContext(ctx, m.Store.seam.Text(cutRoot.Text), node, DuplicateSet)
		return err
	})
	if err != nil {
		return fmt.Errorf("central database: removing marks of duplicates: %w", err)
	}
	done(uint64(rows))
	return nil
}

// Fill implements audit.Table: the roots are those of a later version than any before.
func (m Marks) Fill(ctx context.Context, journals []audit.Source, done func(entries, total uint64)) error {
	for i, j := range journals {
		if err := m.Store.recount(ctx, m.Store.MarksOf(), j.Node(), audit.Writer(j.Node()), m.Now()); err != nil {
			return err
		}
		done(uint64(i+1), uint64(len(journals)))
	}
	return nil
}

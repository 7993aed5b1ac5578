package central

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"yinjian/appliance/account"
	"yinjian/appliance/audit"
	"yinjian/dbdriver"
)

// What both campuses have one answer to: which change of the directory has an object's next version. A row is written
// once and never changed; the journals have the change itself, and whoever changes rows here can keep changes from being
// made, and make none.
const decisionColumns = `object_kind, object_id, version_no, node_id, epoch_id, intent_id, body_sm3, decided_at, created_by, created_at, modified_by, modified_at, row_mac, mac_key_id`

var (
	insertDecision  = register("decision.insert", `INSERT INTO yj_decision (`+decisionColumns+`) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`)
	latestDecision  = register("decision.latest", `SELECT MAX(version_no) FROM yj_decision WHERE object_kind = ? AND object_id = ?`)
	decisionOf      = register("decision.intent", `SELECT object_kind, object_id, version_no, node_id, epoch_id, intent_id, body_sm3, decided_at FROM yj_decision WHERE intent_id = ?`)
	decisionsAfter  = register("decision.page", `SELECT object_kind, object_id, version_no, node_id, epoch_id, intent_id, body_sm3, decided_at FROM yj_decision WHERE object_kind = ? AND object_id = ? AND version_no > ? ORDER BY version_no LIMIT ?`)
	lastDecisions   = register("decision.versions", `SELECT object_kind, object_id, MAX(version_no) FROM yj_decision WHERE object_kind <> ? GROUP BY object_kind, object_id`)
	decisionVersion = register("decision.get", `SELECT object_kind, object_id, version_no, node_id, epoch_id, intent_id, body_sm3, decided_at FROM yj_decision WHERE object_kind = ? AND object_id = ? AND version_no = ?`)
)

// decideTries is how often a decision is tried before the caller hears of it. After each failure the intent is looked up.
const decideTries = 4

// spentKind stands for the kind of object in the row of an intent that was looked up and not found: it takes the
// intent's place, so that a statement on its way decides nothing afterwards.
const spentKind = "spent"

// Latest implements account.Centre. While the database is being made anew it answers nothing: the decisions may be missing.
func (s *Store) Latest(ctx context.Context, kind, object string) (int64, error) {
	marks, err := s.Marks(ctx)
	if err == nil && len(marks) > 0 {
		err = fmt.Errorf("central database: %w: it is being made anew by %s", dbdriver.ErrUnavailable, marks[0].By)
	}
	if err != nil {
		return 0, err
	}
	var last sql.NullInt64
	if err := s.db.QueryRowContext(ctx, s.seam.Text(latestDecision.Text), kind, object).Scan(&last); err != nil {
		return 0, fmt.Errorf("central database: latest decision on %s %s: %w", kind, object, classify(s.seam, err))
	}
	return last.Int64, nil
}

// Decide implements account.Centre. Two keys of the table decide: that of object and version, and that of the intent.
func (s *Store) Decide(ctx context.Context, d account.Decision) (bool, error) {
	won, err := s.decide(ctx, d)
	if err != nil {
		return false, fmt.Errorf("central database: deciding version %d of %s %s: %w", d.Version, d.Kind, d.Object, err)
	}
	return won, nil
}

func (s *Store) decide(ctx context.Context, d account.Decision) (bool, error) {
	var failed error
	for range decideTries {
		if failed = s.insertDecision(ctx, d); failed == nil {
			return true, nil
		}
		// Whatever the error says, the row may be there: the answer was lost, or the driver repeated the statement.
		mine, found, err := s.decision(ctx, decisionOf, d.Intent)
		switch {
		case err != nil:
			failed = err
		case found && mine.Kind == d.Kind && mine.Object == d.Object && mine.Version == d.Version && mine.Node == d.Node:
			return true, nil
		case found:
			return false, fmt.Errorf("%w: its intent stands for something else there", dbdriver.ErrConflict)
		}
		if _, other, err := s.decision(ctx, decisionVersion, d.Kind, d.Object, d.Version); err != nil {
			failed = err
		} else if other {
			return false, nil
		}
		if ctx.Err() != nil {
			break
		}
	}
	return false, failed
}

func (s *Store) insertDecision(ctx context.Context, d account.Decision) error {
	at := d.At.UnixMicro()
	by := s.seal.node
	if by == "" {
		by = d.Node
	}
	row := decisionRow{Decision: d, written: written{by, at, by, at}}
	var err error
	if d.Kind != spentKind {
		if row.mac, row.keyID, err = s.sealed(ctx, DecisionSet, s.seal.node, row.columns()); err != nil {
			return err
		}
	}
	s.seal.Lock()
	defer s.seal.Unlock()
	return inTx(ctx, s.db, s.seam, func(tx *sql.Tx) error {
		res, err := tx.ExecContext(ctx, s.seam.Text(insertDecision.Text), d.Kind, d.Object, d.Version, d.Node, d.Epoch, d.Intent, d.Body, at, by, at, by, at,
			text(row.mac), text(row.keyID))
		if err := wrote(1, res, err); err != nil || row.mac == "" {
			return err
		}
		return s.fold(ctx, tx, s.seal.mac, row.keyID, audit.SetRoot{Node: s.seal.node, Set: DecisionSet, ModifiedBy: by, ModifiedAt: at}, []string{row.mac}, nil)
	})
}

// decision reads one row.
func (s *Store) decision(ctx context.Context, st Statement, args ...any) (account.Decision, bool, error) {
	var d account.Decision
	err := scanDecision(s.db.QueryRowContext(ctx, s.seam.Text(st.Text), args...), &d)
	if errors.Is(err, sql.ErrNoRows) {
		return d, false, nil
	}
	return d, err == nil, classify(s.seam, err)
}

func scanDecision(row interface{ Scan(...any) error }, d *account.Decision, more ...any) error {
	var at int64
	err := row.Scan(append([]any{&d.Kind, &d.Object, &d.Version, &d.Node, &d.Epoch, &d.Intent, &d.Body, &at}, more...)...)
	d.At = time.UnixMicro(at).UTC()
	return err
}

// Lookup implements account.Centre.
func (s *Store) Lookup(ctx context.Context, intent account.Decision) (account.Decision, bool, error) {
	d, found, err := s.lookup(ctx, intent)
	if err != nil {
		return d, false, fmt.Errorf("central database: looking up intent %s: %w", intent.Intent, err)
	}
	return d, found, nil
}

func (s *Store) lookup(ctx context.Context, intent account.Decision) (d account.Decision, found bool, failed error) {
	for range decideTries {
		d, found, failed = s.decision(ctx, decisionOf, intent.Intent)
		if failed == nil && found {
			return d, d.Kind != spentKind, nil
		}
		if failed == nil {
			spent := intent
			spent.Kind, spent.Object, spent.Version = spentKind, intent.Intent, 1
			if failed = s.insertDecision(ctx, spent); failed == nil {
				return account.Decision{}, false, nil
			}
		}
		if ctx.Err() != nil {
			break
		}
	}
	return account.Decision{}, false, failed
}

// Decisions implements account.Centre.
func (s *Store) Decisions(ctx context.Context, kind, object string, after int64) ([]account.Decision, error) {
	rows, err := s.db.QueryContext(ctx, s.seam.Text(decisionsAfter.Text), kind, object, after, int64(pageRows))
	if err != nil {
		return nil, fmt.Errorf("central database: decisions on %s %s: %w", kind, object, classify(s.seam, err))
	}
	defer rows.Close()
	var out []account.Decision
	for rows.Next() {
		var d account.Decision
		if err := scanDecision(rows, &d); err != nil {
			return nil, fmt.Errorf("central database: decisions on %s %s: %w", kind, object, classify(s.seam, err))
		}
		out = append(out, d)
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("central database: decisions on %s %s: %w", kind, object, classify(s.seam, err))
	}
	return out, nil
}

// Versions implements account.Centre.
func (s *Store) Versions(ctx context.Context) ([]account.Decision, error) {
	rows, err := s.db.QueryContext(ctx, s.seam.Text(lastDecisions.Text), spentKind)
	if err != nil {
		return nil, fmt.Errorf("central database: versions: %w", classify(s.seam, err))
	}
	defer rows.Close()
	var out []account.Decision
	for rows.Next() {
		var d account.Decision
		if err := rows.Scan(&d.Kind, &d.Object, &d.Version); err != nil {
			return nil, fmt.Errorf("central database: versions: %w", classify(s.seam, err))
		}
		out = append(out, d)
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("central database: versions: %w", classify(s.seam, err))
	}
	return out, nil
}

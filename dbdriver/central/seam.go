package central

import (
	"context"
	"database/sql"
	"fmt"
	"strconv"
	"strings"

	"yinjian/dbdriver"
)

// A Seam is all that differs between the databases.
type Seam struct {
	Name string // "sqlite", "postgres", "dm"
	// Bytes is the type of a column of bytes, {{bytes}} in a migration.
	Bytes string
	// ScanBytes is what a column of bytes is scanned into; nil: as database/sql does it.
	ScanBytes func(*[]byte) any
	// Rebind makes a statement's question marks the driver's placeholders; nil: they are.
	Rebind func(string) string
	// Classify turns a driver's error into those of dbdriver. What it does not know is dbdriver.ErrUnavailable. It is not
	// given sql.ErrNoRows, nor the end of a context.
	Classify func(error) error
	// TableExists and IndexExists count the tables or indexes of the schema in use that have the name given, in lower case.
	TableExists, IndexExists string
	// Columns lists the tables of the schema in use whose names begin with yj_, in lower case, with the table's comment, the
	// columns in their order, their types, 1 for those that may be NULL, and their comments; of what has no comments NULL.
	Columns string
	// Comments says that the database keeps comments (COMMENT ON).
	Comments bool
	// Rights lists accounts, tables ("" for the server) and rights; "": the database has no accounts.
	Rights string
	// Settings reads what of the server's settings concerns us; nil: nothing does.
	Settings func(ctx context.Context, db *sql.DB) ([]Setting, error)
	// Guard is asked first in each transaction that writes; nil: nothing is.
	Guard func(ctx context.Context, tx *sql.Tx) error
}

// A Verdict says what a setting means for us.
type Verdict string

// Verdicts on settings.
const (
	Fit        Verdict = "ok"
	Doubtful   Verdict = "warning"     // works, with what Why says
	Unfit      Verdict = "refused"     // not to be used
	NotChecked Verdict = "not checked" // could not be read
)

// A Setting is one of the server's settings and what it means.
type Setting struct {
	Name    string  `json:"name"`
	Value   string  `json:"value"`
	Verdict Verdict `json:"verdict"`
	Why     string  `json:"why,omitempty"` // in Chinese and English; "" if Fit
	// ReadOnly says that it is refused because the server is a standby, which another day it is not.
	ReadOnly bool `json:"-"`
}

// refusal is an error that names the settings that are refused; nil if there are none.
func refusal(settings []Setting) error {
	var bad []string
	kind := error(nil)
	for _, s := range settings {
		if s.Verdict != Unfit {
			continue
		}
		bad = append(bad, fmt.Sprintf("%s = %s: %s", s.Name, s.Value, s.Why))
		if s.ReadOnly && kind == nil {
			kind = fmt.Errorf("%w (%w)", dbdriver.ErrReadOnly, dbdriver.ErrUnavailable)
		}
		if !s.ReadOnly {
			kind = dbdriver.ErrUnfit
		}
	}
	if kind == nil {
		return nil
	}
	return fmt.Errorf("%w: %s", kind, strings.Join(bad, "; "))
}

// Dollar is Rebind for drivers that number their placeholders ($1, $2 …). No text of the registry has a question mark
// elsewhere.
func Dollar(q string) string {
	var b strings.Builder
	n := 0
	for part := range strings.SplitSeq(q, "?") {
		if n > 0 {
			b.WriteByte('$')
			b.WriteString(strconv.Itoa(n))
		}
		b.WriteString(part)
		n++
	}
	return b.String()
}

// Text is the driver's form of a statement of the registry or of a migration.
func (s *Seam) Text(q string) string {
	q = strings.ReplaceAll(q, "{{bytes}}", s.Bytes)
	if s.Rebind == nil {
		return q
	}
	return s.Rebind(q)
}

// Exists says whether a table ("table") or an index ("index") of this name is there.
func (s *Seam) Exists(ctx context.Context, db *sql.DB, kind, name string) (bool, error) {
	return exists(ctx, db, s, kind, name)
}

// Error is what an error of the driver's means, in dbdriver's words.
func (s *Seam) Error(err error) error { return classify(s, err) }

package audit

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"unicode/utf8"
)

// Fields of an entry that changes something, beside who (actor), when (time) and what (kind, object): how it was and how
// it is, as JSON objects with what differs, and why.
const (
	FieldBefore = "change.before"
	FieldAfter  = "change.after"
	FieldReason = "reason"
	FieldAct    = "act"
)

const (
	maxChangeBytes = 900 // FieldBefore and FieldAfter, a column each in the central database
	maxChangeValue = 96  // a text within them; of a longer one there is the digest
	maxReasonBytes = 512
	intentSuffix   = "/intent"
)

// confidential are the JSON names of which a change log has the digest alone, whatever is in them. None holds a secret in
// the clear; but what verifies PINs and opens keys is no reading for everybody who may query the database.
var confidential = map[string]bool{"pin": true, "key_salt": true, "key_sealed": true, "sealing": true, "wrapped": true,
	"password": true, "history": true}

// Changed are the fields that say how an object was and is: before and after as JSON objects, with the members that
// differ; of long and of confidential values the SM3 digest. before is nil for what was made, after for what was removed.
func Changed(before, after any) ([]Field, error) {
	b, err := members(before)
	if err != nil {
		return nil, err
	}
	a, err := members(after)
	if err != nil {
		return nil, err
	}
	for name, v := range b {
		if w, ok := a[name]; ok && reflect.DeepEqual(v, w) {
			delete(b, name)
			delete(a, name)
		}
	}
	var out []Field
	for _, f := range []struct {
		name   string
		values map[string]any
	}{{FieldBefore, b}, {FieldAfter, a}} {
		if f.values != nil {
			out = append(out, Field{f.name, Text(fitted(f.values))})
		}
	}
	return out, nil
}

// members are those of v as JSON, shortened; nil for nil.
func members(v any) (map[string]any, error) {
	if r := reflect.ValueOf(v); !r.IsValid() || r.Kind() == reflect.Pointer && r.IsNil() {
		return nil, nil
	}
	text, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("audit: an object for the change log: %w", err)
	}
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	out := map[string]any{}
	if err := d.Decode(&out); err != nil {
		return nil, fmt.Errorf("audit: an object for the change log: %w", err)
	}
	shorten(out)
	return out, nil
}

// shorten puts digests in the place of what a change log does not repeat.
func shorten(v any) any {
	switch v := v.(type) {
	case string:
		if len(v) > maxChangeValue {
			return digestOf(v)
		}
	case []any:
		for i := range v {
			v[i] = shorten(v[i])
		}
	case map[string]any:
		for name, w := range v {
			if confidential[name] && w != nil {
				v[name] = digestOf(jsonOf(w))
			} else {
				v[name] = shorten(w)
			}
		}
	}
	return v
}

func digestOf(s string) string { return "sm3:" + Sum([]byte(s)).String() }

// jsonOf is v as JSON, members in the order of their names.
func jsonOf(v any) string {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		panic(err) // it was decoded from JSON
	}
	return strings.TrimSuffix(b.String(), "\n")
}

// fitted is an object as JSON of maxChangeBytes at most: the longest members give way to their digests.
func fitted(v map[string]any) string {
	s := jsonOf(v)
	for len(s) > maxChangeBytes {
		longest, n := "", len(digestOf(""))+2 // a digest is no gain for what is shorter
		for name, w := range v {
			if l := len(jsonOf(w)); l > n || l == n && longest != "" && name < longest {
				longest, n = name, l
			}
		}
		if longest == "" {
			return jsonOf(map[string]any{"sm3": Sum([]byte(s)).String()})
		}
		v[longest] = digestOf(jsonOf(v[longest]))
		s = jsonOf(v)
	}
	return s
}

// A ProjectedChange is what the central database keeps of an entry that changed something: who, when, what, before and
// after, and why. Every column but the MAC follows from the entry; absent text is "" here and NULL there.
type ProjectedChange struct {
	Node       string
	Epoch      string // 16 hexadecimal digits
	Sequence   uint64
	Change     uint64 // ordinal among the journal's changes of state, intents included
	LeafHash   string // 64 hexadecimal digits
	Kind       string
	Act        string
	Actor      string
	Object     string
	Reason     string
	Before     string // JSON, "" for what was made or where nothing was before
	After      string // JSON, "" for what was removed
	ChangedAt  int64  // the entry's time, µs since 1970 UTC
	Bound      int64  // its bound, µs
	MAC        string // HMAC-SM3 over the columns of Columns, 64 hexadecimal digits
	KeyID      string
	CreatedBy  string
	CreatedAt  int64 // µs
	ModifiedBy string
	ModifiedAt int64
}

// ChangeSet is the name of the changes' table, which their MACs and their set's root have in them.
const ChangeSet = "yj_change"

// ProjectChange derives the change of an entry; false for one that changes nothing. All changes of state are changes,
// whatever wrote them, but for the announcements (intents): of an entry that does not say what was before and after, its
// fields are what is after.
func ProjectChange(r Record) (ProjectedChange, bool) {
	e := &r.Entry
	n, is := e.Change()
	if !is || strings.HasSuffix(e.Kind, intentSuffix) {
		return ProjectedChange{}, false
	}
	row := Project(r)
	c := ProjectedChange{
		Node: row.Node, Epoch: row.Epoch, Sequence: row.Sequence, Change: n, LeafHash: row.LeafHash, Kind: e.Kind,
		Act: cut(e.Text(FieldAct), MaxNameBytes), Actor: e.Actor, Object: e.Object, Reason: cut(e.Text(FieldReason), maxReasonBytes),
		Before: cut(e.Text(FieldBefore), maxChangeBytes), After: cut(e.Text(FieldAfter), maxChangeBytes),
		ChangedAt: row.SignedAt, Bound: row.Bound, CreatedBy: row.CreatedBy, CreatedAt: row.CreatedAt, ModifiedBy: row.ModifiedBy, ModifiedAt: row.ModifiedAt,
	}
	if c.Before == "" && c.After == "" {
		c.After = fitted(fieldsOf(e))
	}
	return c, true
}

// fieldsOf are the fields of an entry that say something about its object.
func fieldsOf(e *Entry) map[string]any {
	out := map[string]any{}
	for _, f := range e.Fields {
		if strings.HasPrefix(f.Name, "journal.") || slices.Contains([]string{"intent", FieldAct, FieldReason}, f.Name) {
			continue
		}
		switch v := f.Value.(type) {
		case Octets:
			out[f.Name] = shorten(hex.EncodeToString(v))
		case Text:
			out[f.Name] = shorten(string(v))
		case Int:
			out[f.Name] = int64(v)
		case Bool:
			out[f.Name] = bool(v)
		}
	}
	return out
}

// cut shortens text to n bytes, at a character's end.
func cut(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n]
}

// Columns are the columns that the row's MAC covers, in the order of the table.
func (c *ProjectedChange) Columns() []Column {
	num := func(n int64) string { return fmt.Sprint(n) }
	return []Column{
		{"node_id", c.Node}, {"epoch_id", c.Epoch}, {"seq_no", fmt.Sprint(c.Sequence)}, {"change_no", fmt.Sprint(c.Change)},
		{"leaf_hash", c.LeafHash}, {"kind_name", c.Kind}, {"act_name", c.Act}, {"actor_name", c.Actor}, {"object_id", c.Object},
		{"reason_text", c.Reason}, {"before_text", c.Before}, {"after_text", c.After}, {"changed_at_us", num(c.ChangedAt)},
		{"bound_us", num(c.Bound)}, {"created_by", c.CreatedBy}, {"created_at", num(c.CreatedAt)}, {"modified_by", c.ModifiedBy},
		{"modified_at", num(c.ModifiedAt)},
	}
}

// A Column is a column of a row by name, as text; absent text is "".
type Column struct{ Name, Value string }

// RowMAC computes the MAC of a row of a table, as 64 hexadecimal digits: over "yinjian/row/v1" and a zero byte, the
// table's name, then each column's name and value, every text preceded by its length in four bytes.
func RowMAC(ctx context.Context, mac MAC, table string, columns []Column) (string, error) {
	in := []byte("yinjian/row/v1\x00")
	add := func(s string) {
		in = binary.BigEndian.AppendUint32(in, uint32(len(s)))
		in = append(in, s...)
	}
	add(table)
	for _, c := range columns {
		add(c.Name)
		add(c.Value)
	}
	sum, err := mac.MAC(ctx, in)
	if err != nil {
		return "", fmt.Errorf("audit: MAC of a row of %s: %w", table, err)
	}
	return hex.EncodeToString(sum), nil
}

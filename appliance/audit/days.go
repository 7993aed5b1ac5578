package audit

import (
	"cmp"
	"encoding/hex"
	"hash"
	"io"
	"maps"
	"slices"
	"time"

	"github.com/emmansun/gmsm/sm3"
)

// A DayDigest sums up one day of one node, in journal and database alike, so that people can compare them, and two
// campuses' databases, by a line a day. Entries that were not shipped yet are in neither.
//
// The digest is SM3 over the leaf hashes as they are stored (64 hexadecimal digits), each with a line feed, by epoch (as
// text) and sequence: what
//
//	SELECT leaf_hash FROM yj_record WHERE node_id = … AND signed_at_us >= … AND signed_at_us < … ORDER BY epoch_id, seq_no
//
// prints, one a line, through `openssl dgst -sm3`.
type DayDigest struct {
	Day  string `json:"day"` // 2006-01-02, from midnight to midnight of Beijing time (UTC+8)
	Node string `json:"node"`
	// Entries and their digest are the journal's; 0 and "" for nodes whose journal this is not.
	Entries    uint64 `json:"entries"`
	EntriesSM3 string `json:"entries_sm3,omitempty"`
	Rows       uint64 `json:"rows"`
	RowsSM3    string `json:"rows_sm3,omitempty"`
}

// Agrees reports whether journal and database say the same of the day.
func (d *DayDigest) Agrees() bool { return d.Entries == d.Rows && d.EntriesSM3 == d.RowsSM3 }

// Beijing is the time that days, months and years of people's tables are in: it has no summer time.
var Beijing = time.FixedZone("UTC+8", 8*3600)

const microsPerDay = 24 * 3600 * 1_000_000

// A dayTable collects what the digests are over. Epochs are added in order.
type dayTable struct{ of map[dayKey]*dayLine }

type dayKey struct {
	node string
	day  int64 // since 1970, Beijing time
}

type dayLine struct{ entries, rows leafDigest }

type leafDigest struct {
	n uint64
	h hash.Hash
}

func (l *leafDigest) add(leaf string) {
	if l.h == nil {
		l.h = sm3.New()
	}
	l.n++
	io.WriteString(l.h, leaf+"\n") // a hash never fails
}

func (l *leafDigest) sum() string {
	if l.h == nil {
		return ""
	}
	return hex.EncodeToString(l.h.Sum(nil))
}

func (t *dayTable) line(r ProjectedRow) *dayLine {
	day := r.SignedAt + 8*3600*1_000_000
	if day < 0 {
		day -= microsPerDay - 1 // division rounds towards zero
	}
	k := dayKey{r.Node, day / microsPerDay}
	if t.of == nil {
		t.of = map[dayKey]*dayLine{}
	}
	if t.of[k] == nil {
		t.of[k] = &dayLine{}
	}
	return t.of[k]
}

// entry adds what the journal says.
func (t *dayTable) entry(r ProjectedRow) { t.line(r).entries.add(r.LeafHash) }

// row adds what the database says.
func (t *dayTable) row(r ProjectedRow) { t.line(r).rows.add(r.LeafHash) }

func (t *dayTable) digests() []DayDigest {
	out := []DayDigest{}
	for _, k := range slices.SortedFunc(maps.Keys(t.of), func(a, b dayKey) int { return cmp.Or(cmp.Compare(a.node, b.node), cmp.Compare(a.day, b.day)) }) {
		l := t.of[k]
		out = append(out, DayDigest{
			Day: time.UnixMicro(k.day * microsPerDay).UTC().Format(time.DateOnly), Node: k.node,
			Entries: l.entries.n, EntriesSM3: l.entries.sum(), Rows: l.rows.n, RowsSM3: l.rows.sum(),
		})
	}
	return out
}

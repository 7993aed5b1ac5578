package backup_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"

	"yinjian/appliance/audit"
	"yinjian/appliance/backup"
	"yinjian/appliance/internal/testkit"
)

// outcome journals what became of a backup and answers its receipt.
func outcome(t testing.TB, h *testkit.House) []byte {
	t.Helper()
	r, err := h.Journal.Append(t.Context(), audit.Draft{
		Kind: backup.KindOutcome, Actor: "admin", Object: "0123456789abcdef", State: true,
		Fields: []audit.Field{
			{Name: backup.FieldSM3, Value: audit.Octets(make([]byte, 32))}, {Name: backup.FieldRoot, Value: audit.Octets(make([]byte, 32))},
			{Name: backup.FieldEntries, Value: audit.Int(7)}, {Name: backup.FieldThrough, Value: audit.Int(2)}, {Name: backup.FieldSet, Value: audit.Text("aa")},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	c, err := h.Journal.WaitCheckpoint(t.Context(), r.Sequence)
	if err != nil {
		t.Fatal(err)
	}
	f, err := h.Journal.Foreign(t.Context(), r.Sequence, c)
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(backup.NewReceipt(f))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// A receipt proves what its journal has, under its log's key alone, and nothing when any of it is another's.
func TestReceipt(t *testing.T) {
	t.Parallel()
	h, other := testkit.New(t), testkit.NewNode(t, "binhai-1")
	b, foreign := outcome(t, h), outcome(t, other)
	e, err := backup.ParseReceipt(b, h.LogKey.Public())
	if err != nil {
		t.Fatal(err)
	}
	s, err := backup.StatementOf(e)
	if err != nil || s.ID != "0123456789abcdef" || s.Node != "benbu-1" || s.Entries != 7 || s.Through != 2 || s.Set != "aa" || s.SM3 != strings.Repeat("0", 64) {
		t.Errorf("%+v, %v", s, err)
	}
	if _, err := backup.ParseReceipt(b, other.LogKey.Public()); err == nil {
		t.Error("it is proved by another log's key")
	}
	var mine, theirs map[string]json.RawMessage
	for text, to := range map[string]*map[string]json.RawMessage{string(b): &mine, string(foreign): &theirs} {
		if err := json.Unmarshal([]byte(text), to); err != nil {
			t.Fatal(err)
		}
	}
	for name := range mine {
		changed := map[string]json.RawMessage{}
		for k, v := range mine {
			changed[k] = v
		}
		changed[name] = theirs[name]
		if name == "version" {
			changed[name] = json.RawMessage("2")
		}
		b, err := json.Marshal(changed)
		if err != nil {
			t.Fatal(err)
		}
		if string(changed[name]) == string(mine[name]) {
			continue // the proofs of two young journals may be alike
		}
		if _, err := backup.ParseReceipt(b, h.LogKey.Public()); err == nil {
			t.Errorf("with another receipt's %s it proves something", name)
		}
	}
	state, err := h.Journal.Entry(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := backup.StatementOf(&state.Entry); err == nil {
		t.Error("another kind of entry is a backup's outcome")
	}
}

// A database is what a projection has, by epoch.
type database map[string][]audit.ProjectedRow

func (d database) Leaf(_ context.Context, _, epoch string, sequence uint64) (string, error) {
	for _, r := range d[epoch] {
		if r.Sequence == sequence {
			return r.LeafHash, nil
		}
	}
	return "", fmt.Errorf("leaf: %w", audit.ErrNotFound)
}

func (d database) Epochs(context.Context, string) (out []string, err error) {
	for epoch := range d {
		out = append(out, epoch)
	}
	slices.Sort(out)
	return out, nil
}

func (d database) Rows(_ context.Context, _, epoch string, from uint64, fn func(audit.ProjectedRow) error) error {
	for _, r := range d[epoch] {
		if r.Sequence >= from {
			if err := fn(r); err != nil {
				return err
			}
		}
	}
	return nil
}

// What is missing are the rows after each earlier epoch's end here, and those of epochs that nobody here has heard of.
func TestMissing(t *testing.T) {
	t.Parallel()
	epoch := func(n byte) audit.Epoch { return audit.Epoch{n} }
	rows := func(n byte, from, to uint64) (out []audit.ProjectedRow) {
		for i := from; i < to; i++ {
			out = append(out, audit.ProjectedRow{Epoch: epoch(n).String(), Sequence: i})
		}
		return out
	}
	spans := []audit.EpochSpan{{Epoch: epoch(1), First: 0, End: 10}, {Epoch: epoch(2), First: 10, End: 20}, {Epoch: epoch(3), First: 20, End: 25}, {Epoch: epoch(4), First: 25, End: 30}}
	e := func(n byte) string { return epoch(n).String() }
	for name, one := range map[string]struct {
		stored  database
		want    []string
		reaches bool
	}{
		"nothing":              {database{e(1): rows(1, 0, 10), e(2): rows(2, 10, 20), e(3): rows(3, 20, 22)}, nil, true},
		"its own epochs":       {database{e(2): rows(2, 10, 20), e(3): rows(3, 20, 25), e(4): rows(4, 25, 28)}, nil, true},
		"after the backup":     {database{e(2): rows(2, 10, 23)}, []string{e(2) + " 20", e(2) + " 21", e(2) + " 22"}, true},
		"an epoch since":       {database{e(2): rows(2, 10, 20), e(9): rows(9, 22, 24)}, []string{e(9) + " 22", e(9) + " 23"}, true},
		"an older epoch's end": {database{e(1): rows(1, 0, 11), e(2): rows(2, 10, 20)}, []string{e(1) + " 10"}, true},
		"behind the backup":    {database{e(2): rows(2, 10, 15)}, nil, false},
		"a new database":       {database{}, nil, false},
	} {
		var got []string
		reaches, err := backup.Missing(t.Context(), one.stored, "benbu-1", spans, epoch(3), func(l backup.Lost) error {
			got = append(got, fmt.Sprintf("%s %d", l.Epoch, l.Sequence))
			return nil
		})
		if err != nil || reaches != one.reaches || !slices.Equal(got, one.want) {
			t.Errorf("%s: %v, %v, %v; want %v, %v", name, got, reaches, err, one.want, one.reaches)
		}
	}
}

// FuzzParseReceipt: whatever is done to a receipt, it proves the entry that was journalled, or nothing.
func FuzzParseReceipt(f *testing.F) {
	h := testkit.New(f)
	b := outcome(f, h)
	want, err := backup.ParseReceipt(b, h.LogKey.Public())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add(bytes.Replace(b, []byte(`":`), []byte(`":null,"x":`), 1))
	f.Add([]byte(`{"payloads":{"object":null}}`))
	key := h.LogKey.Public()
	f.Fuzz(func(t *testing.T, in []byte) {
		if e, err := backup.ParseReceipt(in, key); err == nil && !reflect.DeepEqual(e, want) {
			t.Errorf("%s proves %+v", in, e)
		}
	})
}

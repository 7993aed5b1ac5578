package audit

import (
	"context"
	"crypto"
	"errors"
	"fmt"
)

// A SpanReport says what [VerifySpan] saw.
type SpanReport struct {
	From     uint64 `json:"from"` // entries below were verified before
	To       uint64 `json:"to"`
	Payloads uint64 `json:"payloads"`
	// Wrong is what is not as it was written, "" for nothing. [Verify] says more.
	Wrong string `json:"wrong,omitempty"`
}

// VerifySpan reads the entries between two checkpoints again, the first of which may be the zero one, and holds them against
// both: each entry hashes to its leaf and follows the one before, its payloads are those that it commits to, the tree that
// the first checkpoint has signed, grown by the leaves, is the one that the second has signed. What is below the first is
// not read. It costs what the span has, however long the journal is. The error is about reading, not about what was found.
func VerifySpan(ctx context.Context, store Store, logKey crypto.PublicKey, from, to Checkpoint) (*SpanReport, error) {
	r := &SpanReport{From: from.Size, To: to.Size}
	wrong := func(format string, args ...any) (*SpanReport, error) {
		r.Wrong = fmt.Sprintf(format, args...)
		return r, nil
	}
	if from.Size > to.Size {
		return nil, fmt.Errorf("audit: a span from %d to %d", from.Size, to.Size)
	}
	f, err := newFrontier(0, nil)
	if err != nil {
		return nil, err
	}
	if from.Size > 0 {
		if err := VerifyCheckpoint(logKey, &from); err != nil {
			return wrong("checkpoint %d: %v", from.Size, err)
		}
		if f, err = loadFrontier(ctx, store, from.Size); errors.Is(err, ErrNotFound) {
			return wrong("the tree of %d entries: %v", from.Size, err)
		} else if err != nil {
			return nil, err
		}
		if f.root() != from.Root {
			return wrong("the stored tree of %d entries is not the one that was signed", from.Size)
		}
	}
	if err := VerifyCheckpoint(logKey, &to); err != nil {
		return wrong("checkpoint %d: %v", to.Size, err)
	}
	segments, err := store.Segments(ctx)
	if err != nil {
		return nil, err
	}
	var chain *Hash
	next := from.Size
	known := map[Hash]bool{} // payloads of this segment that are not in rows
	for i, s := range segments {
		if i+1 < len(segments) && segments[i+1].First <= next || next >= to.Size {
			continue
		}
		clear(known)
		err := store.Rows(ctx, s.Number, int64(next), func(row Row) error {
			if err := ctx.Err(); err != nil {
				return err
			}
			if next >= to.Size {
				return errEnd
			}
			rec, err := recordOf(row)
			switch {
			case err != nil:
				return err
			case rec.Sequence != next:
				return fmt.Errorf("%w: entry %d is missing", ErrCorrupt, next)
			case chain != nil && ChainHash(*chain, rec.LeafHash) != Hash(row.Chain):
				return fmt.Errorf("%w: entry %d does not follow the one before", ErrCorrupt, next)
			}
			stored := Hash(row.Chain)
			chain = &stored
			if err := spanPayloads(ctx, store, s.Number, &row, &rec.Entry, known); err != nil {
				return err
			}
			r.Payloads += uint64(len(rec.Entry.Payloads))
			next++
			return f.grow(rec.LeafHash, nil)
		})
		if errors.Is(err, ErrCorrupt) || errors.Is(err, ErrNotFound) {
			return wrong("%v", err)
		}
		if err != nil && !errors.Is(err, errEnd) {
			return nil, err
		}
	}
	switch {
	case next < to.Size:
		return wrong("entry %d is missing", next)
	case f.root() != to.Root:
		return wrong("the entries from %d on are not those that checkpoint %d has signed", from.Size, to.Size)
	}
	return r, nil
}

// spanPayloads holds a row's payloads against its entry.
func spanPayloads(ctx context.Context, store Store, segment int, row *Row, e *Entry, known map[Hash]bool) error {
	if len(e.Payloads) == 0 {
		return nil
	}
	own, err := ParseOwn(row.Own)
	if err != nil {
		return err
	}
	there := map[Hash]bool{}
	for _, b := range own {
		there[b.Sum] = Sum(b.Data) == b.Sum
	}
	for _, p := range e.Payloads {
		if there[p.SM3] || known[p.SM3] {
			continue
		}
		data, err := store.Blob(ctx, segment, p.SM3)
		if err != nil {
			return fmt.Errorf("entry %d: payload %q: %w", e.Sequence, p.Name, err)
		}
		if Sum(data) != p.SM3 {
			return fmt.Errorf("%w: entry %d: payload %q was changed", ErrCorrupt, e.Sequence, p.Name)
		}
		known[p.SM3] = true
	}
	return nil
}

package backup

import (
	"context"
	"errors"
	"slices"

	"yinjian/appliance/audit"
)

// A Lost row is an entry that the central database has and a restored journal lacks.
type Lost struct {
	Epoch    string `json:"epoch"`
	Sequence uint64 `json:"sequence"`
	LeafHash string `json:"leaf"`
	RecordID string `json:"record_id,omitempty"`
	Kind     string `json:"kind"`
	// Application and Signer of a signature.
	Application string `json:"application,omitempty"`
	Signer      string `json:"signer,omitempty"`
	At          int64  `json:"at_us"` // the entry's time, µs since 1970 UTC
}

// A Projection is what is asked of the central database; audit.Projection says what its methods promise.
type Projection interface {
	Leaf(ctx context.Context, node, epoch string, sequence uint64) (string, error)
	Epochs(ctx context.Context, node string) ([]string, error)
	Rows(ctx context.Context, node, epoch string, from uint64, fn func(audit.ProjectedRow) error) error
}

// Missing calls fn with each row of the node that the restored journal lacks: those of its earlier epochs after their end
// here, and those of epochs that began after the backup. spans are the journal's epochs, restored is the first of the
// restored journal's own. reaches: the database has the entry before that one, so that nothing is missing that it was not
// told of; otherwise it is behind the backup, or new, and cannot tell.
func Missing(ctx context.Context, p Projection, node string, spans []audit.EpochSpan, restored audit.Epoch, fn func(Lost) error) (reaches bool, err error) {
	at := slices.IndexFunc(spans, func(s audit.EpochSpan) bool { return s.Epoch == restored })
	if at < 1 {
		return false, errors.New("backup: the journal has no epoch before the restored one")
	}
	before := spans[at-1]
	_, err = p.Leaf(ctx, node, before.Epoch.String(), before.End-1)
	if err != nil && !errors.Is(err, audit.ErrNotFound) {
		return false, err
	}
	reaches = err == nil
	rows := func(epoch string, from uint64) error {
		return p.Rows(ctx, node, epoch, from, func(r audit.ProjectedRow) error {
			return fn(Lost{r.Epoch, r.Sequence, r.LeafHash, r.RecordID, r.Kind, r.Application, r.Signer, r.SignedAt})
		})
	}
	for _, s := range spans[:at] {
		if err := rows(s.Epoch.String(), s.End); err != nil {
			return reaches, err
		}
	}
	stored, err := p.Epochs(ctx, node)
	if err != nil {
		return reaches, err
	}
	for _, epoch := range stored {
		if !slices.ContainsFunc(spans, func(s audit.EpochSpan) bool { return s.Epoch.String() == epoch }) {
			if err := rows(epoch, 0); err != nil {
				return reaches, err
			}
		}
	}
	return reaches, nil
}

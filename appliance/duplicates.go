package appliance

import (
	"context"
	"errors"

	"github.com/sirupsen/logrus"

	"yinjian/appliance/audit"
	"yinjian/appliance/evidence"
	"yinjian/dbdriver/central"
)

// duplicates is the projection of an appliance that has another campus: records that are at both, since a request was sent
// again there, are marked once they are written. It serves one shipper.
type duplicates struct {
	*central.Store
	paired func() bool
	log    logrus.FieldLogger

	epoch string
	next  uint64 // rows of the epoch below were looked at
}

// lookBack is how many rows before the first batch are looked at again: a stop came between their writing and the look.
const lookBack = 1024

// Apply implements audit.Projection. That a look fails keeps no entry from being shipped; the next batch looks again.
func (d *duplicates) Apply(ctx context.Context, b audit.ProjectedBatch) error {
	if err := d.Store.Apply(ctx, b); err != nil || !d.paired() {
		return err
	}
	if back := b.First - min(b.First, lookBack); d.epoch != b.Epoch || d.next < back {
		d.epoch, d.next = b.Epoch, back
	}
	err := d.mark(ctx, b)
	if err != nil && ctx.Err() == nil {
		d.log.WithError(err).Warning("records that are at both campuses could not be marked; tried again")
	} else if err == nil {
		d.next = b.Last + 1
	}
	return nil
}

var errSeen = errors.New("seen")

func (d *duplicates) mark(ctx context.Context, b audit.ProjectedBatch) error {
	var records []audit.ProjectedRow
	add := func(r audit.ProjectedRow) error {
		if r.Sequence >= b.First {
			return errSeen
		}
		if r.Kind == evidence.KindSign {
			records = append(records, r)
		}
		return nil
	}
	if d.next < b.First {
		if err := d.Rows(ctx, b.Node, b.Epoch, d.next, add); err != nil && !errors.Is(err, errSeen) {
			return err
		}
	}
	for _, r := range b.Rows {
		if r.Kind == evidence.KindSign {
			records = append(records, r)
		}
	}
	return d.MarkDuplicates(ctx, records)
}

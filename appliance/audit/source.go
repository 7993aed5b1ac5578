package audit

import (
	"context"
	"errors"
	"fmt"
)

// A Source is a journal that a projection is made of: a [Journal], or a [Copy] of one.
type Source interface {
	Node() string
	// Size is the number of entries.
	Size() uint64
	// Epochs lists the epochs in order; there is at least one.
	Epochs(ctx context.Context) ([]EpochSpan, error)
	Entry(ctx context.Context, sequence uint64) (Record, error)
	// Range calls fn with the entries from number from on, in order.
	Range(ctx context.Context, from uint64, fn func(Record) error) error
	// WaitSize waits until there are more than size entries, or ctx ends.
	WaitSize(ctx context.Context, size uint64) (uint64, error)
	// recentFrom appends entries that are in memory still.
	recentFrom(into []Record, from uint64, most int) []Record
	// forgetRecent lets go of those before a number.
	forgetRecent(before uint64)
}

// A Copy is a journal that nobody writes: one of an appliance that is no more, say. Safe for concurrent use.
type Copy struct {
	store  Store
	report *Report
}

// ErrCopyWrong means that a copy of a journal is not as its appliance wrote it.
var ErrCopyWrong = errors.New("audit: the copy of the journal does not verify")

// OpenCopy verifies the whole of a copy ([Verify]), against the key of its log, which opt has to give. A finding is
// [ErrCopyWrong].
func OpenCopy(ctx context.Context, store Store, opt Options) (*Copy, error) {
	if opt.LogKey == nil {
		return nil, errors.New("audit: opening a copy: the log's key is needed")
	}
	report, err := Verify(ctx, store, opt)
	if err != nil {
		return nil, fmt.Errorf("audit: opening a copy: %w", err)
	}
	if !report.OK() {
		return nil, fmt.Errorf("%w: %d findings, the first: entry %d: %s", ErrCopyWrong, uint64(len(report.Findings))+report.Omitted, report.Findings[0].Sequence, report.Findings[0].Detail)
	}
	return &Copy{store: store, report: report}, nil
}

// Report is what the verification said.
func (c *Copy) Report() *Report { return c.report }

// Node implements [Source].
func (c *Copy) Node() string { return c.report.Node }

// Size implements [Source].
func (c *Copy) Size() uint64 { return c.report.Entries }

// Epochs implements [Source].
func (c *Copy) Epochs(ctx context.Context) ([]EpochSpan, error) {
	return epochsOf(ctx, c.store, c.Size())
}

// Entry implements [Source].
func (c *Copy) Entry(ctx context.Context, sequence uint64) (Record, error) {
	row, err := c.store.Row(ctx, sequence)
	if err != nil {
		return Record{}, fmt.Errorf("audit: entry %d: %w", sequence, err)
	}
	return recordOf(row)
}

// Range implements [Source].
func (c *Copy) Range(ctx context.Context, from uint64, fn func(Record) error) error {
	return Scan(ctx, c.store, from, c.Size(), fn)
}

// WaitSize implements [Source]: there will not be more.
func (c *Copy) WaitSize(ctx context.Context, size uint64) (uint64, error) {
	if c.Size() > size {
		return c.Size(), nil
	}
	<-ctx.Done()
	return c.Size(), ctx.Err()
}

func (c *Copy) recentFrom(into []Record, _ uint64, _ int) []Record { return into }
func (c *Copy) forgetRecent(uint64)                                {}

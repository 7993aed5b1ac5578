package audit

import (
	"context"
	"crypto/hmac"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
)

// A DifferenceKind names how the projection departs from the journal.
type DifferenceKind string

const (
	RowMissing        DifferenceKind = "row-missing"        // the entry was shipped and its row is gone
	RowAdded          DifferenceKind = "row-added"          // a row without entry
	RowChanged        DifferenceKind = "row-changed"        // a column says something else
	RowFork           DifferenceKind = "row-fork"           // the row is that of another entry
	RowBeyondJournal  DifferenceKind = "row-beyond-journal" // of an epoch's part that this journal does not have: a restore lost it
	BatchWrong        DifferenceKind = "batch-mac-wrong"    // the MAC does not fit the stored rows
	RowForeign        DifferenceKind = "row-foreign"        // a row or batch of a node whose journal this is not
	BatchMissing      DifferenceKind = "batch-missing"      // rows that no batch covers
	RebuildUnfinished DifferenceKind = "rebuild-unfinished" // the database is being made anew, or that was broken off
)

// MACs are the keys of batches by their id. A key that is another appliance's, so that its MACs cannot be checked here, is
// there with nil.
type MACs map[string]MAC

// A Difference is one departure.
type Difference struct {
	Kind     DifferenceKind `json:"kind"`
	Table    string         `json:"table,omitempty"` // "": the evidence's
	Key      string         `json:"key,omitempty"`   // of a row without a sequence
	Node     string         `json:"node,omitempty"`  // of a foreign row
	Epoch    string         `json:"epoch"`
	Sequence uint64         `json:"sequence"`
	Through  uint64         `json:"through"`
	RecordID string         `json:"record_id,omitempty"`
	Column   string         `json:"column,omitempty"`
	Want     string         `json:"want,omitempty"` // by the journal
	Got      string         `json:"got,omitempty"`
	Detail   string         `json:"detail"`
	DetailZH string         `json:"detail_zh"`
}

// A CompareReport is what [Compare] found.
type CompareReport struct {
	Rows        uint64       `json:"rows"`
	Batches     uint64       `json:"batches"`
	MACsChecked uint64       `json:"macs_checked"`
	NotShipped  uint64       `json:"not_shipped"` // entries after the last shipped one: the lag
	Days        []DayDigest  `json:"days"`        // by node and day
	Differences []Difference `json:"differences"`
	Omitted     uint64       `json:"omitted"`
}

// OK reports whether nothing was found.
func (r *CompareReport) OK() bool { return len(r.Differences) == 0 }

func (r *CompareReport) add(d Difference) {
	if len(r.Differences) >= maxFindings {
		r.Omitted++
		return
	}
	d.Through = max(d.Through, d.Sequence)
	r.Differences = append(r.Differences, d)
}

// Compare derives each row of the projection again from the journal's entries and names each row and column that
// differs, for this journal's node. With macs (nil: MACs are not checked) it computes the MACs of the batches over the
// rows as they are stored. Rows and batches of other nodes are foreign, unless the node is among campuses: those that
// ship to the same database and compare their own rows.
//
// Journal and projection may grow meanwhile: what was shipped when Compare came to an epoch is compared, and what has
// come since is left to the next time.
//
// A rebuild that is not finished is a difference, too: the rows may be there already and nobody has compared them.
func Compare(ctx context.Context, j Source, p Projection, macs MACs, campuses ...string) (*CompareReport, error) {
	report, err := compare(ctx, j, p, macs, campuses)
	if err == nil {
		var by string
		if by, err = p.Rebuilder(ctx, j.Node()); by != "" {
			report.add(Difference{
				Kind: RebuildUnfinished, Detail: fmt.Sprintf("a rebuild by %s is not finished", by), DetailZH: fmt.Sprintf("设备 %s 的重建尚未完成", by),
			})
		}
	}
	if err != nil {
		err = fmt.Errorf("audit: comparing: %w", err)
	}
	return report, err
}

func compare(ctx context.Context, j Source, p Projection, macs MACs, campuses []string) (*CompareReport, error) {
	report, days := &CompareReport{}, &dayTable{}
	err := compareAll(ctx, report, days, j, p, macs, campuses)
	report.Days = days.digests()
	return report, err
}

func compareAll(ctx context.Context, report *CompareReport, days *dayTable, j Source, p Projection, macs MACs, campuses []string) error {
	spans, err := j.Epochs(ctx)
	if err != nil {
		return err
	}
	epochs, err := p.Epochs(ctx, j.Node())
	if err != nil {
		return err
	}
	for _, s := range spans {
		epochs = append(epochs, s.Epoch.String())
	}
	begun, err := begunEpochs(ctx, j.Node(), spans, p)
	if err != nil {
		return err
	}
	slices.Sort(epochs) // the order in which digests of days take them
	for _, epoch := range slices.Compact(epochs) {
		i := slices.IndexFunc(spans, func(s EpochSpan) bool { return s.Epoch.String() == epoch })
		if i < 0 {
			report.add(Difference{
				Kind: RowAdded, Epoch: epoch, Detail: fmt.Sprintf("the projection has rows or batches of epoch %s, which the journal does not know", epoch),
				DetailZH: fmt.Sprintf("中心库含有日志中不存在的纪元 %s 的行或批次", epoch),
			})
			if err := p.Rows(ctx, j.Node(), epoch, 0, func(r ProjectedRow) error { days.row(r); return nil }); err != nil {
				return fmt.Errorf("epoch %s: %w", epoch, err)
			}
			continue
		}
		// Entries are shipped after they are journalled, so a row that is read has its entry below end by then.
		end := func() uint64 { return spans[i].End }
		if i == len(spans)-1 {
			end = j.Size
		}
		if err := compareEpoch(ctx, report, days, j, p, macs, spans[i], end, i < begun-1); err != nil {
			return fmt.Errorf("epoch %s: %w", epoch, err)
		}
	}
	nodes, err := p.Nodes(ctx)
	if err != nil {
		return err
	}
	for _, node := range nodes {
		switch {
		case node == j.Node():
		case slices.Contains(campuses, node):
			err = ofCampus(ctx, days, node, p)
		default:
			err = foreign(ctx, report, days, j.Node(), node, p)
		}
		if err != nil {
			return fmt.Errorf("node %q: %w", node, err)
		}
	}
	return nil
}

// belowAll is from where on all rows are read: a database's numbers have a sign, which nobody gave ours, and as they are read
// those below 0 are above 2^63.
const belowAll = 1 << 63

// begunEpochs answers up to which of the journal's epochs there are rows. They are shipped in order: all before the last
// of these are whole.
func begunEpochs(ctx context.Context, node string, spans []EpochSpan, p Projection) (int, error) {
	for n := len(spans); n > 0; n-- {
		_, err := p.Shipped(ctx, node, spans[n-1].Epoch.String())
		if err == nil {
			return n, nil
		}
		if !errors.Is(err, ErrNotFound) {
			return 0, err
		}
	}
	return 0, nil
}

// belowFirst names rows with numbers below 0.
func belowFirst(ctx context.Context, report *CompareReport, node, epoch string, p Projection) error {
	err := p.Rows(ctx, node, epoch, belowAll, func(r ProjectedRow) error {
		if r.Sequence < belowAll {
			return errStop
		}
		addedRow(report, r)
		return nil
	})
	if errors.Is(err, errStop) {
		return nil
	}
	return err
}

// ofCampus sums up the rows of another campus, for people to hold against what is printed there.
func ofCampus(ctx context.Context, days *dayTable, node string, p Projection) error {
	epochs, err := p.Epochs(ctx, node)
	for i := 0; i < len(epochs) && err == nil; i++ {
		err = p.Rows(ctx, node, epochs[i], 0, func(r ProjectedRow) error { days.row(r); return nil })
	}
	return err
}

// foreign lists the rows and batches of a node that has no business in the database.
func foreign(ctx context.Context, report *CompareReport, days *dayTable, own, node string, p Projection) error {
	epochs, err := p.Epochs(ctx, node)
	if err != nil {
		return err
	}
	for _, epoch := range epochs {
		err := p.Rows(ctx, node, epoch, belowAll, func(r ProjectedRow) error {
			report.Rows++
			days.row(r)
			report.add(Difference{
				Kind: RowForeign, Node: node, Epoch: epoch, Sequence: r.Sequence, RecordID: r.RecordID,
				Detail:   fmt.Sprintf("row %d is of node %q; this journal's is %q", r.Sequence, node, own),
				DetailZH: fmt.Sprintf("第 %d 行属于节点 %q，而本日志的节点为 %q", r.Sequence, node, own),
			})
			return nil
		})
		if err != nil {
			return err
		}
		err = p.Batches(ctx, node, epoch, func(b ProjectedBatch) error {
			report.Batches++
			report.add(Difference{
				Kind: RowForeign, Node: node, Epoch: epoch, Sequence: b.First, Through: b.Last,
				Detail:   fmt.Sprintf("the batch of rows %d to %d is of node %q; this journal's is %q", b.First, b.Last, node, own),
				DetailZH: fmt.Sprintf("第 %d 至 %d 行的批次属于节点 %q，而本日志的节点为 %q", b.First, b.Last, node, own),
			})
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// compareEpoch holds an epoch's rows against its entries. whole: a later one was begun, so that this one has to be there as a
// whole.
func compareEpoch(ctx context.Context, report *CompareReport, days *dayTable, j Source, p Projection, macs MACs, span EpochSpan, endNow func() uint64, whole bool) error {
	epoch := span.Epoch.String()
	last, err := p.Shipped(ctx, j.Node(), epoch)
	none := errors.Is(err, ErrNotFound)
	if err != nil && !none {
		return err
	}
	if whole {
		last, none = max(last, span.End-1), false
	}
	if err := belowFirst(ctx, report, j.Node(), epoch, p); err != nil {
		return err
	}
	if none {
		report.NotShipped += span.End - span.First
		return compareTail(ctx, report, j.Node(), epoch, nil, p)
	}
	end := min(span.End, last+1)
	report.NotShipped += span.End - end

	// Both sides are read in pages of the same numbers.
	const page = 512
	for from := span.First; from < end; from += page {
		to := min(from+page, end)
		rows := map[uint64]ProjectedRow{}
		lower := from
		if from == span.First {
			lower = 0 // rows before the epoch's first entry are additions
		}
		err := p.Rows(ctx, j.Node(), epoch, lower, func(r ProjectedRow) error {
			if r.Sequence >= to {
				return errStop
			}
			report.Rows++
			days.row(r)
			if r.Sequence < from {
				addedRow(report, r)
				return nil
			}
			keepRow(report, rows, r)
			return nil
		})
		if err != nil && !errors.Is(err, errStop) {
			return err
		}
		err = j.Range(ctx, from, func(rec Record) error {
			if rec.Sequence >= to {
				return errStop
			}
			got, ok := rows[rec.Sequence]
			want := Project(rec)
			days.entry(want)
			compareRow(report, want, got, ok)
			return nil
		})
		if err != nil && !errors.Is(err, errStop) {
			return err
		}
	}
	err = p.Rows(ctx, j.Node(), epoch, end, func(r ProjectedRow) error {
		if r.Sequence < endNow() {
			return nil // shipped since the comparison began
		}
		report.Rows++
		days.row(r)
		d := Difference{
			Kind: RowBeyondJournal, Epoch: epoch, Sequence: r.Sequence, RecordID: r.RecordID,
			Detail:   fmt.Sprintf("the projection has entry %d of the epoch, the journal has not: a restore lost it, or it was added", r.Sequence),
			DetailZH: fmt.Sprintf("中心库有该纪元第 %d 条，日志没有：恢复备份时丢失，或是后来加入的", r.Sequence),
		}
		report.add(d)
		return nil
	})
	if err != nil {
		return err
	}
	if err := compareTail(ctx, report, j.Node(), epoch, &last, p); err != nil {
		return err
	}
	return compareBatches(ctx, report, j.Node(), epoch, span.First, last, p, macs)
}

// compareTail names rows at the end that a batch has and that are gone: without the batch they would look like entries
// not shipped yet. last is the last row; nil: there is none.
func compareTail(ctx context.Context, report *CompareReport, node, epoch string, last *uint64, p Projection) error {
	return p.Batches(ctx, node, epoch, func(b ProjectedBatch) error {
		if last != nil && b.Last <= *last || int64(b.First) < 0 {
			return nil
		}
		// Batch and rows are one transaction: with a batch shipped since, its last row is there.
		if _, err := p.Leaf(ctx, node, epoch, b.Last); !errors.Is(err, ErrNotFound) {
			return err
		}
		first := b.First
		if last != nil {
			first = max(first, *last+1)
		}
		report.add(Difference{
			Kind: RowMissing, Epoch: epoch, Sequence: first, Through: b.Last,
			Detail:   fmt.Sprintf("rows %d to %d were shipped, by their batch, and are gone", first, b.Last),
			DetailZH: fmt.Sprintf("第 %d 至 %d 行按批次已送达，现缺失", first, b.Last),
		})
		return nil
	})
}

func addedRow(report *CompareReport, r ProjectedRow) {
	report.add(Difference{
		Kind: RowAdded, Epoch: r.Epoch, Sequence: r.Sequence, RecordID: r.RecordID,
		Detail:   fmt.Sprintf("row %d has no entry in this epoch of the journal", r.Sequence),
		DetailZH: fmt.Sprintf("第 %d 行在日志的该纪元中没有对应记录", r.Sequence),
	})
}

// keepRow keeps a row by its sequence, and names one that is there twice: in its table and in the archive.
func keepRow(report *CompareReport, rows map[uint64]ProjectedRow, r ProjectedRow) {
	if _, there := rows[r.Sequence]; there {
		report.add(Difference{
			Kind: RowAdded, Epoch: r.Epoch, Sequence: r.Sequence, RecordID: r.RecordID,
			Detail:   fmt.Sprintf("row %d is there twice, in the table and in its archive", r.Sequence),
			DetailZH: fmt.Sprintf("第 %d 行有两份：表中与归档表中各一", r.Sequence),
		})
	}
	rows[r.Sequence] = r
}

func compareRow(report *CompareReport, want, got ProjectedRow, ok bool) {
	d := Difference{Epoch: want.Epoch, Sequence: want.Sequence, RecordID: want.RecordID}
	if !ok {
		d.Kind, d.Detail = RowMissing, fmt.Sprintf("the row of entry %d is gone", want.Sequence)
		d.DetailZH = fmt.Sprintf("第 %d 条记录的行缺失", want.Sequence)
		report.add(d)
		return
	}
	gotCols := got.columns()
	for i, w := range want.columns() {
		if g := gotCols[i]; g.value != w.value {
			d := d
			d.Kind, d.Column, d.Want, d.Got = RowChanged, w.name, w.value, g.value
			if w.name == "leaf_hash" {
				d.Kind = RowFork
			}
			d.Detail = fmt.Sprintf("column %s of row %d is %q, the journal says %q", w.name, want.Sequence, g.value, w.value)
			d.DetailZH = fmt.Sprintf("第 %d 行的 %s 列为 %q，按日志应为 %q", want.Sequence, w.name, g.value, w.value)
			report.add(d)
		}
	}
}

// longestBatch is more rows than any batch has.
const longestBatch = 1 << 16

// compareBatches checks that the batches cover the rows from first to last without gap, and their MACs. One that says to
// have more rows than any has is not ours, and is not read.
func compareBatches(ctx context.Context, report *CompareReport, node, epoch string, first, last uint64, p Projection, macs MACs) error {
	next := first
	missing := func(from, through uint64) {
		report.add(Difference{
			Kind: BatchMissing, Epoch: epoch, Sequence: from, Through: through,
			Detail:   fmt.Sprintf("no batch covers rows %d to %d", from, through),
			DetailZH: fmt.Sprintf("第 %d 至 %d 行没有批次 MAC", from, through),
		})
	}
	var before *ProjectedBatch
	err := p.Batches(ctx, node, epoch, func(b ProjectedBatch) error {
		report.Batches++
		if before != nil && before.First == b.First {
			report.add(Difference{
				Kind: BatchWrong, Epoch: epoch, Sequence: b.First, Through: max(b.First, min(b.Last, before.Last)),
				Detail:   fmt.Sprintf("the batch from %d is there twice, in the table and in its archive", b.First),
				DetailZH: fmt.Sprintf("自第 %d 行起的批次有两份：表中与归档表中各一", b.First),
			})
			return nil
		}
		before = &b
		if int64(b.First) < 0 || b.Last < b.First || b.Last-b.First >= longestBatch {
			report.add(Difference{
				Kind: BatchWrong, Epoch: epoch, Sequence: b.First, Through: b.First,
				Detail:   fmt.Sprintf("a batch of rows %d to %d is none of ours", b.First, b.Last),
				DetailZH: fmt.Sprintf("第 %d 至 %d 行的批次不是本机所写", b.First, b.Last),
			})
			return nil
		}
		if b.First > next {
			missing(next, b.First-1)
		}
		next = b.Last + 1
		if len(macs) == 0 {
			return nil
		}
		mac, known := macs[b.KeyID]
		if !known {
			report.add(Difference{
				Kind: BatchWrong, Epoch: epoch, Sequence: b.First, Through: b.Last,
				Detail:   fmt.Sprintf("the MAC of rows %d to %d is by a key %q that nobody knows", b.First, b.Last, b.KeyID),
				DetailZH: fmt.Sprintf("第 %d 至 %d 行的批次 MAC 所用密钥 %q 无人知晓", b.First, b.Last, b.KeyID),
			})
		}
		if mac == nil {
			return nil
		}
		err := p.Rows(ctx, node, epoch, b.First, func(r ProjectedRow) error {
			if r.Sequence > b.Last {
				return errStop
			}
			b.Rows = append(b.Rows, r)
			return nil
		})
		if err != nil && !errors.Is(err, errStop) {
			return err
		}
		want, err := mac.MAC(ctx, b.MACInput())
		if err != nil {
			return fmt.Errorf("MAC: %w", err)
		}
		report.MACsChecked++
		if !hmac.Equal([]byte(hex.EncodeToString(want)), []byte(b.MAC)) {
			report.add(Difference{
				Kind: BatchWrong, Epoch: epoch, Sequence: b.First, Through: b.Last,
				Detail:   fmt.Sprintf("the MAC of rows %d to %d does not fit what is stored", b.First, b.Last),
				DetailZH: fmt.Sprintf("第 %d 至 %d 行的批次 MAC 与存储内容不符", b.First, b.Last),
			})
		}
		return nil
	})
	if err != nil {
		return err
	}
	if next <= last {
		missing(next, last)
	}
	return nil
}

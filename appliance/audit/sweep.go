package audit

import (
	"context"
	"crypto/hmac"
	"errors"
	"fmt"
	"slices"
)

// What the sweep finds beside what [Compare] does.
const (
	RowMACWrong        DifferenceKind = "row-mac-wrong"  // a row of a table whose rows have MACs was changed or made by somebody else
	SetRootWrong       DifferenceKind = "set-root-wrong" // the rows are not those of their set's root: some were removed, added or put back
	DatabaseRolledBack DifferenceKind = "rolled-back"    // the database, or a table, is an older copy of itself
)

// A ChangeLog is the part of the projection whose rows have MACs of their own.
type ChangeLog interface {
	// Changes calls fn with the changes of an epoch from a sequence on, ascending.
	Changes(ctx context.Context, node, epoch string, from uint64, fn func(ProjectedChange) error) error
	// ChangeNodes lists the nodes that have changes, ChangeEpochs the epochs of a node that have.
	ChangeNodes(ctx context.Context) ([]string, error)
	ChangeEpochs(ctx context.Context, node string) ([]string, error)
	// Roots lists the roots of all sets and nodes.
	Roots(ctx context.Context) ([]SetRoot, error)
}

// A Set is a table whose rows have MACs, for the sweep.
type Set struct {
	Name string
	// Rows calls fn with the rows that a node wrote.
	Rows func(ctx context.Context, node string, fn func(SetRow) error) error
	// Writers lists who wrote rows, which is the Writer of some node; both nil: the rows are looked through elsewhere, too.
	Writers func(ctx context.Context) ([]string, error)
	Writer  func(node string) string
	// Want calls fn with the rows that follow from the journal, by the first columns and without MACs. It is asked where rows
	// or root do not fit. nil: the journal does not tell.
	Want func(ctx context.Context, fn func(SetRow) error) error
}

// A SetRow is a row of a [Set]: what names it to people, its columns, and its MAC and key as they are stored.
type SetRow struct {
	Key     string
	Columns []Column
	MAC     string
	KeyID   string
}

// ChangesOf is the set of changes.
func ChangesOf(log ChangeLog) Set {
	return Set{Name: ChangeSet, Rows: func(ctx context.Context, node string, fn func(SetRow) error) error {
		epochs, err := log.ChangeEpochs(ctx, node)
		for i := 0; i < len(epochs) && err == nil; i++ {
			err = log.Changes(ctx, node, epochs[i], belowAll, func(c ProjectedChange) error {
				return fn(SetRow{fmt.Sprintf("%s/%s/%d", c.Node, c.Epoch, c.Sequence), c.Columns(), c.MAC, c.KeyID})
			})
		}
		return err
	}}
}

// Marks are how far a database was seen to be: later it is at least as far, unless somebody put an older copy in its place.
type Marks struct {
	Shipped  uint64            `json:"shipped"`  // entries of this journal, from the first on
	Versions map[string]uint64 `json:"versions"` // of the roots of this node's sets
}

// SweepConfig is what [Sweep] works with. All but Campuses, Known and Pause are needed.
type SweepConfig struct {
	Journal    *Journal
	Projection Projection
	Log        ChangeLog
	Sets       []Set
	MACs       MACs
	Campuses   []string // other nodes that ship to the same database
	Known      Marks
	// Pause is called before each computation of a MAC, one a batch or row, and may wait: it bounds the rate.
	Pause func(context.Context) error
}

// A SweepReport is what [Sweep] found.
type SweepReport struct {
	Batches     uint64       `json:"batches"`
	MACsChecked uint64       `json:"macs_checked"`
	Changes     uint64       `json:"changes"`
	Seen        Marks        `json:"seen"`
	Differences []Difference `json:"differences"`
	Omitted     uint64       `json:"omitted"`
}

// OK reports whether nothing was found.
func (r *SweepReport) OK() bool { return len(r.Differences) == 0 }

type pausing struct {
	mac   MAC
	pause func(context.Context) error
}

func (p pausing) MAC(ctx context.Context, data []byte) ([]byte, error) {
	if p.pause != nil {
		if err := p.pause(ctx); err != nil {
			return nil, err
		}
	}
	return p.mac.MAC(ctx, data)
}

// Sweep goes through all that this node has in the database, by the MACs, and reads the journal only where they do not fit
// and for the changes of state: it costs a MAC for each batch, where [Compare] derives each row again. It names rows of
// evidence that were changed, removed or added, with their columns, rows of the sets likewise, sets whose rows are not those
// of their root, and a database or set that was further once.
func Sweep(ctx context.Context, cfg SweepConfig) (*SweepReport, error) {
	s := &sweep{SweepConfig: cfg, macs: MACs{}, report: &CompareReport{}}
	for id, mac := range cfg.MACs {
		if s.macs[id] = mac; mac != nil {
			s.macs[id] = pausing{mac, cfg.Pause}
		}
	}
	s.seen.Versions = map[string]uint64{}
	err := s.evidence(ctx)
	for i := 0; i < len(cfg.Sets) && err == nil; i++ {
		err = s.set(ctx, cfg.Sets[i])
	}
	var changes uint64
	if err == nil {
		changes, err = CompareChanges(ctx, s.report, cfg.Journal, cfg.Projection, cfg.Log, cfg.Campuses...)
	}
	if err != nil {
		err = fmt.Errorf("audit: sweeping: %w", err)
	}
	r := s.report
	return &SweepReport{r.Batches, r.MACsChecked, changes, s.seen, r.Differences, r.Omitted}, err
}

// ShippedTo answers how many of the journal's entries, from the first on, the projection has by the last rows of its
// epochs: an epoch whose end is gone ends it.
func ShippedTo(ctx context.Context, j *Journal, p Projection) (uint64, error) {
	spans, err := j.Epochs(ctx)
	if err != nil {
		return 0, err
	}
	for i, span := range spans {
		last, err := p.Shipped(ctx, j.Node(), span.Epoch.String())
		if errors.Is(err, ErrNotFound) {
			return span.First, nil
		}
		if err != nil {
			return 0, err
		}
		if i == len(spans)-1 {
			return min(last+1, j.Size()), nil
		}
		if last+1 < span.End {
			return last + 1, nil
		}
	}
	return 0, nil
}

type sweep struct {
	SweepConfig
	macs   MACs
	report *CompareReport
	seen   Marks
}

// right says whether a MAC is that of a row of a table. One of a key that is another appliance's is not checked.
func (s *sweep) right(ctx context.Context, table string, columns []Column, got, key string) (bool, error) {
	mac, known := s.macs[key]
	if !known || mac == nil {
		return known, nil
	}
	s.report.MACsChecked++
	want, err := RowMAC(ctx, mac, table, columns)
	return hmac.Equal([]byte(want), []byte(got)), err
}

// evidence goes through the batches, and names the rows of those that do not fit.
func (s *sweep) evidence(ctx context.Context) error {
	j, p := s.Journal, s.Projection
	spans, err := j.Epochs(ctx)
	if err != nil {
		return err
	}
	if s.seen.Shipped, err = ShippedTo(ctx, j, p); err != nil {
		return err
	}
	begun, err := begunEpochs(ctx, j.Node(), spans, p)
	if err != nil {
		return err
	}
	for i, span := range spans {
		epoch := span.Epoch.String()
		last, err := p.Shipped(ctx, j.Node(), epoch)
		none := errors.Is(err, ErrNotFound)
		if err != nil && !none {
			return err
		}
		if i < begun-1 {
			last, none = max(last, span.End-1), false
		}
		if none {
			if err := compareTail(ctx, s.report, j.Node(), epoch, nil, p); err != nil {
				return err
			}
			continue
		}
		if err := belowFirst(ctx, s.report, j.Node(), epoch, p); err != nil {
			return err
		}
		before := len(s.report.Differences)
		if err := compareBatches(ctx, s.report, j.Node(), epoch, span.First, last, p, s.macs); err != nil {
			return err
		}
		for _, d := range slices.Clone(s.report.Differences[before:]) {
			if err := s.rows(ctx, span, d.Sequence, d.Through); err != nil {
				return err
			}
		}
	}
	if known := s.Known.Shipped; s.seen.Shipped < known {
		s.report.add(Difference{
			Kind: DatabaseRolledBack, Sequence: s.seen.Shipped, Through: known - 1,
			Detail:   fmt.Sprintf("the database had the entries up to %d and now ends before %d: an older copy was put in its place, or its end was removed", known-1, s.seen.Shipped),
			DetailZH: fmt.Sprintf("中心库曾有到第 %d 条为止的全部条目，现止于第 %d 条之前：被换成了旧的拷贝，或末尾被删", known-1, s.seen.Shipped),
		})
	}
	epochs, err := p.Epochs(ctx, j.Node())
	if err != nil {
		return err
	}
	for _, epoch := range epochs {
		if !slices.ContainsFunc(spans, func(s EpochSpan) bool { return s.Epoch.String() == epoch }) {
			s.report.add(Difference{
				Kind: RowAdded, Epoch: epoch, Detail: fmt.Sprintf("the projection has rows or batches of epoch %s, which the journal does not know", epoch),
				DetailZH: fmt.Sprintf("中心库含有日志中不存在的纪元 %s 的行或批次", epoch),
			})
		}
	}
	nodes, err := p.Nodes(ctx)
	if err != nil {
		return err
	}
	for _, node := range nodes {
		if node != j.Node() && !slices.Contains(s.Campuses, node) {
			if err := foreign(ctx, s.report, &dayTable{}, j.Node(), node, p); err != nil {
				return err
			}
		}
	}
	return nil
}

// rows holds the rows from one sequence through another against the journal's entries. What is beyond the journal is read as
// it is there: somebody may have put any number into a row or batch.
func (s *sweep) rows(ctx context.Context, span EpochSpan, first, through uint64) error {
	const page = 512
	if first >= belowAll {
		return nil // they are named already
	}
	size := s.Journal.Size()
	for from := first; from <= through && from < size; from += page {
		to := min(from+page-1, through)
		got := map[uint64]ProjectedRow{}
		err := s.Projection.Rows(ctx, s.Journal.Node(), span.Epoch.String(), from, func(r ProjectedRow) error {
			if r.Sequence > to {
				return errStop
			}
			keepRow(s.report, got, r)
			return nil
		})
		if err != nil && !errors.Is(err, errStop) {
			return err
		}
		err = s.Journal.Range(ctx, from, func(rec Record) error {
			if rec.Sequence > to {
				return errStop
			}
			if rec.Epoch == span.Epoch {
				row, ok := got[rec.Sequence]
				compareRow(s.report, Project(rec), row, ok)
				delete(got, rec.Sequence)
			}
			return nil
		})
		if err != nil && !errors.Is(err, errStop) {
			return err
		}
		for _, seq := range sortedKeys(got) {
			if seq < size { // the others follow
				addedRow(s.report, got[seq])
			}
		}
	}
	err := s.Projection.Rows(ctx, s.Journal.Node(), span.Epoch.String(), max(first, size), func(r ProjectedRow) error {
		if r.Sequence > through {
			return errStop
		}
		addedRow(s.report, r)
		return nil
	})
	if errors.Is(err, errStop) {
		return nil
	}
	return err
}

func sortedKeys[T any](m map[uint64]T) []uint64 {
	out := make([]uint64, 0, len(m))
	for k := range m {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}

// setTries is how often a set is gone through that is written meanwhile.
const setTries = 4

// set goes through a table's rows and their root. What is written meanwhile changes the root: then it begins again, and in
// the end leaves the root to the next sweep.
func (s *sweep) set(ctx context.Context, set Set) error {
	node := s.Journal.Node()
	if err := s.writers(ctx, set); err != nil {
		return err
	}
	for try := 1; ; try++ {
		root, err := s.root(ctx, set.Name)
		if err != nil {
			return err
		}
		sum := SetRoot{Node: node, Set: set.Name}
		if err := sum.Fold(nil, nil); err != nil { // of no rows, too
			return err
		}
		found := &CompareReport{}
		rows := map[string][]Column{}
		err = set.Rows(ctx, node, func(r SetRow) error {
			if set.Want != nil {
				rows[r.Key] = r.Columns
			}
			right, err := s.right(ctx, set.Name, r.Columns, r.MAC, r.KeyID)
			if err != nil {
				return err
			}
			if !right {
				found.add(Difference{
					Kind: RowMACWrong, Table: set.Name, Key: r.Key,
					Detail:   fmt.Sprintf("the MAC of row %s of %s does not fit what is stored: the row was changed, or is not ours", r.Key, set.Name),
					DetailZH: fmt.Sprintf("表 %s 的行 %s 的 MAC 与存储内容不符：该行被改动，或不是本机所写", set.Name, r.Key),
				})
			}
			if sum.Fold([]string{r.MAC}, nil) != nil { // not even a MAC: counted, and the sum cannot fit
				sum.Count++
			}
			return nil
		})
		if err != nil {
			return err
		}
		again, err := s.root(ctx, set.Name)
		if err != nil {
			return err
		}
		moves := version(again) > version(root)
		if moves && try < setTries {
			continue
		}
		for _, d := range found.Differences {
			s.report.add(d)
		}
		s.report.Omitted += found.Omitted
		if moves {
			s.seen.Versions[set.Name] = version(again)
			return nil
		}
		fits, err := s.judge(ctx, set.Name, again, &sum)
		if err != nil || set.Want == nil || fits && len(found.Differences) == 0 {
			return err
		}
		return set.Want(ctx, func(want SetRow) error { s.setRow(set.Name, want, rows); return nil })
	}
}

// writers names who wrote rows of a set and does not ship to this database.
func (s *sweep) writers(ctx context.Context, set Set) error {
	if set.Writers == nil {
		return nil
	}
	all, err := set.Writers(ctx)
	for _, w := range all {
		if !slices.ContainsFunc(append([]string{s.Journal.Node()}, s.Campuses...), func(node string) bool { return set.Writer(node) == w }) {
			s.report.add(Difference{
				Kind: RowForeign, Table: set.Name, Node: w,
				Detail:   fmt.Sprintf("%s has rows that were written by %q, who does not ship to this database", set.Name, w),
				DetailZH: fmt.Sprintf("表 %s 有行的写入者为 %q，并非投递到此库的设备", set.Name, w),
			})
		}
	}
	return err
}

// setRow holds the row that the journal wants against those of the set.
func (s *sweep) setRow(set string, want SetRow, rows map[string][]Column) {
	got, ok := rows[want.Key]
	if !ok {
		s.report.add(Difference{
			Kind: RowMissing, Table: set, Key: want.Key,
			Detail:   fmt.Sprintf("row %s of %s is gone, or is not the one that this appliance wrote", want.Key, set),
			DetailZH: fmt.Sprintf("表 %s 的行 %s 缺失，或不是本机所写的那一行", set, want.Key),
		})
		return
	}
	for i, w := range want.Columns {
		if got[i].Value != w.Value {
			s.report.add(Difference{
				Kind: RowChanged, Table: set, Key: want.Key, Column: w.Name, Want: w.Value, Got: got[i].Value,
				Detail:   fmt.Sprintf("column %s of row %s of %s is %q, the journal says %q", w.Name, want.Key, set, got[i].Value, w.Value),
				DetailZH: fmt.Sprintf("表 %s 的行 %s 的 %s 列为 %q，按日志应为 %q", set, want.Key, w.Name, got[i].Value, w.Value),
			})
		}
	}
}

func version(r *SetRoot) uint64 {
	if r == nil {
		return 0
	}
	return r.Version
}

// root is that of this node's set, nil if there is none.
func (s *sweep) root(ctx context.Context, set string) (*SetRoot, error) {
	roots, err := s.Log.Roots(ctx)
	if err != nil {
		return nil, err
	}
	for i := range roots {
		if roots[i].Node == s.Journal.Node() && roots[i].Set == set {
			return &roots[i], nil
		}
	}
	return nil, nil
}

// judge holds a root against the rows that were read. got has their count and sum.
func (s *sweep) judge(ctx context.Context, set string, root *SetRoot, got *SetRoot) (fits bool, err error) {
	fits = true
	wrong := func(kind DifferenceKind, en, zh string) {
		fits = false
		s.report.add(Difference{Kind: kind, Table: set, Detail: en, DetailZH: zh})
	}
	known := s.Known.Versions[set]
	s.seen.Versions[set] = version(root)
	if version(root) < known {
		wrong(DatabaseRolledBack, fmt.Sprintf("the root of %s has version %d and had %d: the table is an older copy of itself", set, version(root), known),
			fmt.Sprintf("表 %s 的集合根为第 %d 版，曾为第 %d 版：该表被换成了旧的拷贝", set, version(root), known))
	}
	if root == nil {
		if got.Count > 0 {
			wrong(SetRootWrong, fmt.Sprintf("%s has %d rows and no root", set, got.Count), fmt.Sprintf("表 %s 有 %d 行而没有集合根", set, got.Count))
		}
		return fits, nil
	}
	sealed, err := s.right(ctx, RootSet, root.Columns(), root.MAC, root.KeyID)
	if err != nil {
		return false, err
	}
	switch {
	case !sealed:
		wrong(SetRootWrong, fmt.Sprintf("the MAC of the root of %s does not fit what is stored", set), fmt.Sprintf("表 %s 的集合根的 MAC 与存储内容不符", set))
	case root.Count != got.Count:
		wrong(SetRootWrong, fmt.Sprintf("%s has %d rows, its root says %d: rows were removed or added", set, got.Count, root.Count),
			fmt.Sprintf("表 %s 有 %d 行，集合根记为 %d 行：有行被删或加入", set, got.Count, root.Count))
	case root.Sum != got.Sum:
		wrong(SetRootWrong, fmt.Sprintf("the rows of %s are not those of its root: some were exchanged or put back", set),
			fmt.Sprintf("表 %s 的行不是集合根所记的那些：有行被调换或退回旧值", set))
	}
	return fits, nil
}

// CompareChanges derives each change of this journal that was shipped again, names the rows and columns that differ in
// report, and answers how many rows there are. Rows of nodes that are neither this one nor campuses are foreign.
func CompareChanges(ctx context.Context, report *CompareReport, j *Journal, p Projection, log ChangeLog, campuses ...string) (uint64, error) {
	c := &changes{report: report, j: j, log: log, next: map[string]uint64{}, shipped: map[string]uint64{}}
	spans, err := j.Epochs(ctx)
	if err != nil {
		return 0, err
	}
	begun, err := begunEpochs(ctx, j.Node(), spans, p)
	if err != nil {
		return 0, err
	}
	for i, span := range spans[:begun] {
		last, err := p.Shipped(ctx, j.Node(), span.Epoch.String())
		if err != nil && !errors.Is(err, ErrNotFound) {
			return 0, err
		}
		if i < begun-1 { // whole, or it was once
			last = max(last, span.End-1)
		}
		c.shipped[span.Epoch.String()] = last
	}
	err = j.State(ctx, func(r Record) error {
		want, is := ProjectChange(r)
		if last, ok := c.shipped[r.Epoch.String()]; !is || !ok || r.Sequence > last {
			return nil
		}
		if len(c.want) > 0 && (c.want[0].Epoch != want.Epoch || len(c.want) == 512) {
			if err := c.page(ctx); err != nil {
				return err
			}
		}
		c.want = append(c.want, want)
		return nil
	})
	if err == nil {
		err = c.page(ctx)
	}
	if err != nil {
		return c.rows, err
	}
	// What is there beyond.
	epochs, err := log.ChangeEpochs(ctx, j.Node())
	if err != nil {
		return c.rows, err
	}
	for _, epoch := range epochs {
		last, known := c.shipped[epoch]
		err := log.Changes(ctx, j.Node(), epoch, belowAll, func(r ProjectedChange) error {
			if int64(r.Sequence) >= 0 {
				return errStop
			}
			c.rows++
			c.added(r)
			return nil
		})
		if err != nil && !errors.Is(err, errStop) {
			return c.rows, err
		}
		err = log.Changes(ctx, j.Node(), epoch, c.next[epoch], func(r ProjectedChange) error {
			if known && r.Sequence > last && r.Sequence < j.Size() {
				return nil // shipped since
			}
			c.rows++
			c.added(r)
			return nil
		})
		if err != nil {
			return c.rows, err
		}
	}
	nodes, err := log.ChangeNodes(ctx)
	if err != nil {
		return c.rows, err
	}
	roots, err := log.Roots(ctx)
	if err != nil {
		return c.rows, err
	}
	for _, r := range roots {
		nodes = append(nodes, r.Node)
	}
	slices.Sort(nodes)
	for _, node := range slices.Compact(nodes) {
		if node == j.Node() || slices.Contains(campuses, node) {
			continue
		}
		report.add(Difference{
			Kind: RowForeign, Table: ChangeSet, Node: node,
			Detail:   fmt.Sprintf("changes or roots are of node %q; this journal's is %q", node, j.Node()),
			DetailZH: fmt.Sprintf("有变更记录或集合根属于节点 %q，而本日志的节点为 %q", node, j.Node()),
		})
	}
	return c.rows, nil
}

type changes struct {
	report  *CompareReport
	j       *Journal
	log     ChangeLog
	shipped map[string]uint64 // last sequence, by epoch
	next    map[string]uint64 // where to read on, by epoch
	want    []ProjectedChange // of one epoch
	rows    uint64
}

// page holds what is wanted against the rows up to the last of it.
func (c *changes) page(ctx context.Context) error {
	if len(c.want) == 0 {
		return nil
	}
	epoch, last := c.want[0].Epoch, c.want[len(c.want)-1].Sequence
	got := map[uint64]ProjectedChange{}
	err := c.log.Changes(ctx, c.j.Node(), epoch, c.next[epoch], func(r ProjectedChange) error {
		if r.Sequence > last {
			return errStop
		}
		c.rows++
		got[r.Sequence] = r
		return nil
	})
	if err != nil && !errors.Is(err, errStop) {
		return err
	}
	for _, want := range c.want {
		d := Difference{Table: ChangeSet, Epoch: want.Epoch, Sequence: want.Sequence}
		row, ok := got[want.Sequence]
		delete(got, want.Sequence)
		if !ok {
			d.Kind, d.Detail = RowMissing, fmt.Sprintf("the change of entry %d is gone", want.Sequence)
			d.DetailZH = fmt.Sprintf("第 %d 条的变更记录缺失", want.Sequence)
			c.report.add(d)
			continue
		}
		have := row.Columns()
		for i, w := range want.Columns() {
			if have[i].Value == w.Value {
				continue
			}
			d := d
			d.Kind, d.Column, d.Want, d.Got = RowChanged, w.Name, w.Value, have[i].Value
			d.Detail = fmt.Sprintf("column %s of the change of entry %d is %q, the journal says %q", w.Name, want.Sequence, d.Got, d.Want)
			d.DetailZH = fmt.Sprintf("第 %d 条变更记录的 %s 列为 %q，按日志应为 %q", want.Sequence, w.Name, d.Got, d.Want)
			c.report.add(d)
		}
	}
	for _, seq := range sortedKeys(got) {
		c.added(got[seq])
	}
	c.next[epoch], c.want = last+1, c.want[:0]
	return nil
}

func (c *changes) added(r ProjectedChange) {
	c.report.add(Difference{
		Kind: RowAdded, Table: ChangeSet, Epoch: r.Epoch, Sequence: r.Sequence,
		Detail:   fmt.Sprintf("the change of entry %d is not in the journal", r.Sequence),
		DetailZH: fmt.Sprintf("第 %d 条的变更记录在日志中没有对应条目", r.Sequence),
	})
}

// FillChanges writes the changes whose entries were shipped before the database had a table for them: of a node that has
// neither rows nor a root there. It answers how many. write writes all or nothing.
func FillChanges(ctx context.Context, j *Journal, p Projection, log ChangeLog, write func(context.Context, ...ProjectedBatch) error, mac MAC, keyID string) (int, error) {
	roots, err := log.Roots(ctx)
	if err != nil || slices.ContainsFunc(roots, func(r SetRoot) bool { return r.Node == j.Node() && r.Set == ChangeSet }) {
		return 0, err
	}
	if epochs, err := log.ChangeEpochs(ctx, j.Node()); err != nil || len(epochs) > 0 {
		return 0, err
	}
	shipped := map[string]uint64{}
	var all []ProjectedBatch // one an epoch
	n := 0
	err = j.State(ctx, func(r Record) error {
		c, is := ProjectChange(r)
		if !is {
			return nil
		}
		end, asked := shipped[c.Epoch]
		if !asked {
			last, err := p.Shipped(ctx, c.Node, c.Epoch)
			if err == nil {
				end = last + 1
			} else if !errors.Is(err, ErrNotFound) {
				return err
			}
			shipped[c.Epoch] = end
		}
		if c.Sequence >= end {
			return nil
		}
		if len(all) == 0 || all[len(all)-1].Epoch != c.Epoch {
			all = append(all, ProjectedBatch{Node: c.Node, Epoch: c.Epoch})
		}
		b := &all[len(all)-1]
		b.Changes = append(b.Changes, c)
		n++
		return nil
	})
	for i := 0; i < len(all) && err == nil; i++ {
		err = all[i].seal(ctx, mac, keyID)
	}
	if err == nil && n > 0 {
		err = write(ctx, all...)
	}
	if err != nil {
		return 0, fmt.Errorf("audit: filling the change log: %w", err)
	}
	return n, nil
}

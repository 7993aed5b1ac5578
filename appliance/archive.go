package appliance

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"yinjian/api"
	"yinjian/appliance/audit"
	"yinjian/appliance/problem"
	"yinjian/dbdriver"
)

// Kinds of entries about rows of the central database that are moved to its archive.
const (
	kindArchiveIntent  = "projection.archive/intent"
	kindArchiveOutcome = "projection.archive/outcome"
)

const (
	archiveRows  = 512 // of one transaction
	archiveRest  = 3   // times as long as a transaction took: signing and shipping have the database meanwhile
	archiveFirst = 10 * time.Second
	archiveEvery = 24 * time.Hour
)

// An ArchiveReport is the answer to an archiving: of this node's rows of closed months.
type ArchiveReport struct {
	Before string `json:"before"` // the first month that stays as it is, 2006-01, Beijing time
	DryRun bool   `json:"dry_run"`
	// Months are those that had rows in use.
	Months  []ArchivedMonth `json:"months"`
	Rows    uint64          `json:"rows"` // moved
	Batches uint64          `json:"batches"`
	Left    uint64          `json:"left"` // rows of these months that are in use still
}

// An ArchivedMonth is a month and how many of its rows were in use.
type ArchivedMonth struct {
	Month string `json:"month"`
	Rows  uint64 `json:"rows"`
}

// monthOf is the first moment of a month of Beijing time, some months after that of t.
func monthOf(t time.Time, after int) time.Time {
	t = t.In(audit.Beijing)
	return time.Date(t.Year(), t.Month()+time.Month(after), 1, 0, 0, 0, 0, audit.Beijing)
}

// Archive moves the rows of the months before one.
func (d admin) Archive(ctx context.Context, actor string, req api.Archive) (any, error) {
	before, err := time.ParseInLocation(api.MonthLayout, req.Before, audit.Beijing)
	if err != nil {
		return nil, problem.Invalid("before", "须为月份，如 2025-01 (a month)")
	}
	return d.a.projection.archive(ctx, actor, req.Reason, before, req.DryRun)
}

// keepArchiving moves what has become old enough, once a day.
func (p *projection) keepArchiving(ctx context.Context) error {
	months := p.a.cfg.Database.ArchiveAfterMonths
	for wait := archiveFirst; months > 0; {
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return nil
		}
		wait = archiveFirst
		now := p.a.clock.Now()
		if _, err := p.database(); err != nil || !now.Trusted() {
			continue
		}
		report, err := p.archive(ctx, "appliance", "database.archive_after_months", monthOf(now.Time, -months), false)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			p.a.log.WithError(err).Warning("rows of closed months could not be moved to the archive; it is tried again")
			wait = time.Minute
		default:
			p.a.log.WithField("rows", report.Rows).Info("rows of closed months are in the archive")
			wait = archiveEvery
		}
	}
	return nil
}

// archive moves this node's rows of the months before one, step by step, and journals that it does, and did. One at a time.
func (p *projection) archive(ctx context.Context, actor, reason string, before time.Time, dry bool) (*ArchiveReport, error) {
	if !p.archiving.TryLock() {
		return nil, problem.New(problem.NotReady, "已有一次归档在进行 (rows are being moved to the archive already)", "等它结束，进度见 yinjian status (wait for its end)")
	}
	defer p.archiving.Unlock()
	store, err := p.database()
	if err != nil {
		return nil, err
	}
	now := p.a.clock.Now()
	if !now.Trusted() {
		return nil, problem.New(problem.TimeUntrusted, "时间不可信，不知哪些月份已结束 (the time is not trusted: which months are over is not known)", "待时间恢复 (wait until the time is)")
	}
	if before.After(monthOf(now.Time, 0)) {
		return nil, problem.Invalid("before", "只归档已结束的月份：至多写本月 %s (only months that are over: this month at the most)", now.Time.In(audit.Beijing).Format(api.MonthLayout))
	}
	report := &ArchiveReport{Before: before.Format(api.MonthLayout), DryRun: dry, Months: []ArchivedMonth{}}
	first, err := p.firstMonth(ctx)
	if err != nil {
		return nil, err
	}
	var total uint64
	for month := first; month.Before(before); month = monthOf(month, 1) {
		n, err := store.CountInUse(ctx, p.a.cfg.Node, month.UnixMicro(), monthOf(month, 1).UnixMicro())
		if err != nil {
			return nil, archiveFailed(err)
		}
		if n > 0 {
			report.Months = append(report.Months, ArchivedMonth{month.Format(api.MonthLayout), n})
			total += n
		}
	}
	if report.Left = total; dry || total == 0 {
		return report, nil
	}

	var ref [16]byte
	rand.Read(ref[:]) // never fails (crypto/rand)
	note := func(kind string, fields ...audit.Field) error {
		_, err := p.a.journal.Append(context.WithoutCancel(ctx), audit.Draft{
			Kind: kind, Actor: actor, Object: p.a.cfg.Node, Fields: append(fields, audit.Field{Name: "intent", Value: audit.Text(hex.EncodeToString(ref[:]))}),
		})
		if err != nil {
			err = journalRefused(err)
		}
		return err
	}
	err = note(kindArchiveIntent, audit.Field{Name: "reason", Value: audit.Text(reason)}, audit.Field{Name: "before", Value: audit.Text(report.Before)},
		audit.Field{Name: "rows.in_use", Value: audit.Int(total)})
	if err != nil {
		return nil, err
	}
	moving := p.move(ctx, before, total, report)
	result := "done"
	if moving != nil {
		result = cutText("stopped: " + moving.Error())
	} else if report.Left, moving = store.CountInUse(ctx, p.a.cfg.Node, first.UnixMicro(), before.UnixMicro()); moving != nil {
		result = cutText("moved; not counted: " + moving.Error())
	}
	err = note(kindArchiveOutcome, audit.Field{Name: "result", Value: audit.Text(result)}, audit.Field{Name: "rows.moved", Value: audit.Int(report.Rows)},
		audit.Field{Name: "batches.moved", Value: audit.Int(report.Batches)}, audit.Field{Name: "rows.in_use", Value: audit.Int(report.Left)})
	if err != nil {
		return nil, errors.Join(err, moving)
	}
	if moving != nil {
		return nil, archiveFailed(moving)
	}
	return report, nil
}

// firstMonth is that of the journal's first entry with a time.
func (p *projection) firstMonth(ctx context.Context) (time.Time, error) {
	first := p.a.clock.Now().Time
	found := errors.New("found")
	err := p.a.journal.Range(ctx, 0, func(r audit.Record) error {
		if r.Entry.Time.Micros <= 0 {
			return nil
		}
		first = time.UnixMicro(r.Entry.Time.Micros)
		return found
	})
	if err != nil && !errors.Is(err, found) {
		return first, fmt.Errorf("the journal's first month: %w", err)
	}
	return monthOf(first, 0), nil
}

// move moves what is to be moved, and counts it in report.
func (p *projection) move(ctx context.Context, before time.Time, total uint64, report *ArchiveReport) error {
	defer p.setArchived(nil)
	spans, err := p.a.journal.Epochs(ctx)
	if err != nil {
		return err
	}
	for _, span := range spans {
		for next, more := uint64(0), true; more; {
			p.setArchived(&audit.RebuildProgress{Phase: "archiving", Table: "yj_record", Node: p.a.cfg.Node, Done: report.Rows, Total: total})
			store, err := p.database()
			if err != nil {
				return err
			}
			begun := time.Now() // interval
			m, err := store.Archive(ctx, p.a.cfg.Node, span.Epoch.String(), next, before.UnixMicro(), archiveRows)
			if err != nil {
				return err
			}
			report.Rows, report.Batches = report.Rows+m.Rows, report.Batches+m.Batches
			next, more = m.Next, m.More
			select {
			case <-time.After(archiveRest * time.Since(begun)):
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	}
	return nil
}

func (p *projection) setArchived(r *audit.RebuildProgress) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.archived = r
}

// archiveFailed says what is to be done about what kept rows from being moved.
func archiveFailed(err error) error {
	next := "原因消除后再执行同一命令，从停下处继续 (run the same command again when the cause is gone: it goes on where it stopped)"
	if errors.Is(err, dbdriver.ErrConflict) {
		return problem.New(problem.Exists, "归档表中已有其中的行，或行正被改动 (the archive has some of these rows already, or they are being changed)",
			"运行 yinjian db sweep 查明，由 yinjian db rebuild 复原后再归档 (see yinjian db sweep; a rebuild puts it right)").With(err)
	}
	return problem.New(problem.NotReady, "归档没有完成 (not all was moved)："+shownError(err), next).With(err)
}

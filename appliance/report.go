package appliance

import (
	"cmp"
	"context"
	"slices"
	"time"

	"yinjian/api"
	"yinjian/appliance/audit"
	"yinjian/appliance/evidence"
	"yinjian/appliance/problem"
	"yinjian/dbdriver/central"
)

// A YearReport counts a year's signatures, those of all nodes that the central database has.
type YearReport struct {
	Year int        `json:"year"` // Beijing time
	At   string     `json:"at"`   // when it was finished, RFC 3339
	Rows []YearLine `json:"rows"` // by month, campus, application, document type, department, status
	// Tests is how many records of test accounts and test applications were left out.
	Tests uint64 `json:"tests"`
	// Duplicates is how many of the lines' records are second ones: the request was sent again to the other campus.
	Duplicates uint64 `json:"duplicates"`
	// Lag is how many entries of this node the database had not yet. Unfinished are the nodes whose rows are being rebuilt.
	Lag        uint64   `json:"lag"`
	Unfinished []string `json:"unfinished,omitempty"`
}

// A YearLine is one line of a [YearReport].
type YearLine struct {
	Month        int    `json:"month"`
	Campus       string `json:"campus"`
	Application  string `json:"application"`
	DocumentType string `json:"document_type"`
	Department   string `json:"department"`
	Status       string `json:"status"`
	Records      uint64 `json:"records"`
}

// Counting rests three times as long as it works, so that the database and this machine have most of their time for what
// is written meanwhile. A slice is so short that nobody waits for it: some thousand records, a day at most.
const (
	longestSlice  = 24 * time.Hour
	shortestSlice = time.Minute
	fewRecords    = 2000
	manyRecords   = 8000
	reportRest    = 3
)

// YearReport counts.
func (d admin) YearReport(ctx context.Context, _ string, req api.YearReport) (any, error) {
	p := d.a.projection
	p.mu.Lock()
	store, err := p.central, p.err
	p.mu.Unlock()
	if store == nil {
		return nil, problem.New(problem.NotReady, "中心库未打开 (the central database is not open)", "见 yinjian status 与运行日志 (see yinjian status and the log)").With(err)
	}
	report, err := yearReport(ctx, store, req.Year)
	if err != nil {
		return nil, problem.New(problem.NotReady, "统计没有完成："+shownError(err), "稍后再试 (try again later)").With(err)
	}
	report.At, report.Lag = d.a.clock.Now().Time.Format(time.RFC3339), p.status().Lag
	return report, nil
}

func yearReport(ctx context.Context, store *central.Store, year int) (*YearReport, error) {
	report := &YearReport{Year: year, Rows: []YearLine{}}
	counts := map[YearLine]uint64{} // Records is 0 in the keys
	slice := time.Hour
	for at, end := time.Date(year, 1, 1, 0, 0, 0, 0, audit.Beijing), time.Date(year+1, 1, 1, 0, 0, 0, 0, audit.Beijing); at.Before(end); {
		to := at.Add(slice)
		if month := time.Date(year, at.Month()+1, 1, 0, 0, 0, 0, audit.Beijing); to.After(month) {
			to = month
		}
		begun := time.Now() // interval
		var records uint64
		err := store.CountRecords(ctx, evidence.KindSign, at.UnixMicro(), to.UnixMicro(), func(g central.RecordGroup, n uint64) {
			records += n
			if g.Status == audit.StatusTest {
				report.Tests += n
				return
			}
			counts[YearLine{int(at.Month()), g.Campus, g.Application, g.DocumentType, g.Department, g.Status, 0}] += n
		})
		if err != nil {
			return nil, err
		}
		at = to
		switch {
		case records < fewRecords:
			slice = min(2*slice, longestSlice)
		case records > manyRecords:
			slice = max(slice/2, shortestSlice)
		}
		select {
		case <-time.After(reportRest * time.Since(begun)):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	for line, n := range counts {
		line.Records = n
		report.Rows = append(report.Rows, line)
	}
	slices.SortFunc(report.Rows, func(a, b YearLine) int {
		return cmp.Or(cmp.Compare(a.Month, b.Month), cmp.Compare(a.Campus, b.Campus), cmp.Compare(a.Application, b.Application),
			cmp.Compare(a.DocumentType, b.DocumentType), cmp.Compare(a.Department, b.Department), cmp.Compare(a.Status, b.Status))
	})
	var err error
	if report.Duplicates, err = store.CountDuplicates(ctx, time.Date(year, 1, 1, 0, 0, 0, 0, audit.Beijing).UnixMicro(), time.Date(year+1, 1, 1, 0, 0, 0, 0, audit.Beijing).UnixMicro()); err != nil {
		return nil, err
	}
	marks, err := store.Marks(ctx)
	for _, m := range marks {
		report.Unfinished = append(report.Unfinished, m.Node)
	}
	return report, err
}

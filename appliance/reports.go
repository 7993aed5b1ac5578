package appliance

import (
	"context"

	"yinjian/api"
	"yinjian/appliance/report"
)

// SignReport satisfies api.Admin: the digests of a report's files are journalled, and the entry's receipt signs them.
func (d admin) SignReport(ctx context.Context, actor string, req api.SignReport) (any, error) {
	s := report.Statement{Kind: req.Kind, Name: req.Name, Outcome: req.Outcome, Persons: req.Persons, Summary: req.Summary}
	for _, f := range req.Files {
		s.Files = append(s.Files, report.File(f))
	}
	draft, err := s.Draft(actor)
	if err != nil {
		return nil, err
	}
	r, err := d.a.journal.Append(ctx, draft)
	if err != nil {
		return nil, journalRefused(err)
	}
	return d.a.backups.receipt(ctx, r)
}

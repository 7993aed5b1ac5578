package appliance

import (
	"context"
	"encoding/json"
	"errors"
	"slices"

	"yinjian/api"
	"yinjian/api/wire"
	"yinjian/appliance/account"
	"yinjian/appliance/evidence"
	"yinjian/appliance/history"
	"yinjian/appliance/problem"
)

func (d admin) BindClient(ctx context.Context, actor string, req api.BindClient) (any, error) {
	return d.a.directory.BindClient(ctx, actor, req.ID, req.By, req.Certificate, req.Alone, req.Reason)
}

func (d admin) SetProduction(ctx context.Context, actor string, req api.SetProduction) (any, error) {
	return d.a.directory.SetProduction(ctx, actor, req.ID, req.Production, req.Reason)
}

func (d admin) ImportSigners(ctx context.Context, actor string, req api.ImportSigners) (any, error) {
	all := make([]account.Enrolment, len(req.Signers))
	for i, g := range req.Signers {
		all[i] = account.Enrolment{
			ID: g.ID, Name: g.Name, Department: g.Department, Campus: g.Campus, Role: g.Role, Algorithms: g.Algorithms, Test: g.Test,
			External: req.CA == "external",
		}
	}
	results, err := d.enrolAll(ctx, actor, all, req.Trial)
	if err != nil {
		return nil, err
	}
	out := wire.ImportedSigners{Results: make([]wire.ImportedSigner, len(results))}
	for i, r := range results {
		one := wire.ImportedSigner{ID: all[i].ID, Result: r.Result}
		for _, f := range r.Differences {
			one.Differences = append(one.Differences, wire.FieldDifference(f))
		}
		if r.Err != nil {
			p := d.problemOf(r.Err, all[i].ID)
			one.Code, one.Field, one.Detail, one.Next = string(p.Code), p.Field, p.Detail, p.Next
		}
		out.Results[i] = one
	}
	return out, nil
}

// enrolAll enrols as many at once as the directory takes. What stops it stops the rest, of which the answer says so: those before
// are enrolled.
func (d admin) enrolAll(ctx context.Context, actor string, all []account.Enrolment, trial bool) ([]account.EnrolResult, error) {
	var out []account.EnrolResult
	for part := range slices.Chunk(all, account.MaxEnrolments) {
		results, err := d.a.directory.EnrolAll(ctx, actor, part, trial)
		if err != nil && len(out) == 0 {
			return nil, err
		}
		if err != nil {
			for range all[len(out):] {
				out = append(out, account.EnrolResult{Result: account.EnrolNotTried, Err: err})
			}
			return out, nil
		}
		out = append(out, results...)
	}
	return out, nil
}

// problemOf is what is told of one of many that failed. What is no refusal is logged and not shown.
func (d admin) problemOf(err error, object string) *problem.Problem {
	p := problem.New(problem.Internal, "内部错误，已记入设备日志 (internal error, see the appliance's log)", "再试一次 (try again)")
	if !errors.As(err, &p) {
		d.a.log.WithError(err).WithField("object", object).Error("one of many failed")
	}
	return p
}

func (d admin) history() *history.Service {
	return history.New(history.Config{Journal: d.a.journal, Clock: d.a.clock})
}

func sourceOf(s wire.HistorySource) history.Source {
	return history.Source{System: s.System, Name: s.Name, File: s.File, FileSM3: [32]byte(s.FileSM3)}
}

func (d admin) ImportHistory(ctx context.Context, actor string, req api.ImportHistory) (any, error) {
	records := make([]history.Record, len(req.Records))
	for i, r := range req.Records {
		records[i] = history.Record{Signature: r.Signature, Line: int64(r.Line), HistoryRecord: evidence.HistoryRecord{
			ID: r.ID, SignedAt: r.SignedAt, Signer: r.Signer, SignerName: r.SignerName, Role: r.Role, Department: r.Department, Campus: r.Campus,
			Application: r.Application, DocumentID: r.DocumentID, DocumentType: r.DocumentType, MediaType: r.MediaType,
			DigestAlgorithm: r.DigestAlgorithm, Digest: r.Digest, SignatureForm: r.SignatureForm,
		}}
	}
	results, err := d.history().Import(ctx, actor, sourceOf(req.Source), records, req.Trial)
	if err != nil {
		return nil, err
	}
	out := wire.ImportedHistory{Results: make([]wire.ImportedRecord, len(results))}
	for i, r := range results {
		one := wire.ImportedRecord{RecordID: r.RecordID, Result: r.Result}
		for _, f := range r.Differences {
			one.Differences = append(one.Differences, wire.FieldDifference(f))
		}
		if r.Err != nil {
			p := d.problemOf(r.Err, req.Source.System)
			one.Code, one.Field, one.Detail, one.Next = string(p.Code), p.Field, p.Detail, p.Next
		}
		out.Results[i] = one
	}
	return out, nil
}

func (d admin) CloseHistory(ctx context.Context, actor string, req api.HistoryTotals) (any, error) {
	err := d.history().Close(ctx, actor, sourceOf(req.Source), history.Totals{
		MappingSM3: [32]byte(req.MappingSM3), Read: int64(req.Read), Imported: int64(req.Imported), Present: int64(req.Present), Differs: int64(req.Differs), Refused: int64(req.Refused), Pending: int64(req.NotTried),
	})
	if err != nil {
		return nil, err
	}
	return map[string]any{}, nil
}

func (d admin) HistoryRecord(ctx context.Context, _ string, req api.HistoryRecord) (any, error) {
	data, err := d.history().Export(ctx, req.System, req.ID)
	return json.RawMessage(data), err
}

package appliance

import (
	"context"
	"encoding/json"
	"time"

	"yinjian/api"
	"yinjian/api/wire"
	"yinjian/appliance/account"
	"yinjian/appliance/evidence"
	"yinjian/appliance/evidence/show"
	"yinjian/appliance/problem"
	"yinjian/appliance/sign"
	"yinjian/dbdriver/central"
)

// pageOf is how many a page has where nobody says.
const pageOf = 50

func pageSize(most int) int {
	if most == 0 {
		return pageOf
	}
	return most
}

func (d admin) SearchCertificates(_ context.Context, _ string, req api.SearchCertificates) (any, error) {
	lines, next := d.a.directory.SearchCertificates(account.HeldQuery{
		Text: req.Text, Scope: req.Scope, Within: time.Duration(req.WithinDays) * 24 * time.Hour, After: req.After, Most: pageSize(req.Most),
	})
	if lines == nil {
		lines = []account.CertificateLine{}
	}
	return wire.CertificatePage{Certificates: lines, Next: next}, nil
}

func (d admin) SearchSigners(_ context.Context, _ string, req api.SearchSigners) (any, error) {
	found, total := d.a.directory.SearchSigners(account.SignerQuery{Text: req.Text, Stopped: req.Stopped, Skip: req.Skip, Most: pageSize(req.Most)})
	views := []*account.SignerView{}
	for _, g := range found {
		views = append(views, d.a.directory.View(g))
	}
	return wire.SignerPage{Signers: views, Total: total}, nil
}

func (d admin) SearchRecords(ctx context.Context, _ string, req api.SearchRecords) (any, error) {
	store, err := d.a.projection.database()
	if err != nil {
		return nil, err
	}
	since, until := d.a.period(req.Since, req.Until)
	if req.RecordID != "" && req.Since == "" {
		since = time.Unix(0, 0)
	}
	req.Most = pageSize(req.Most)
	q := central.RecordQuery{
		RecordID: req.RecordID, Kind: req.Kind, Application: req.Application, Signer: req.Signer, Department: req.Department,
		From: since.UnixMicro(), Before: until.UnixMicro(), Most: req.Most,
	}
	if a := req.After; a != nil {
		q.After = &central.RecordPlace{SignedAt: int64(a.AtUS), Node: a.Node, Epoch: a.Epoch, Sequence: int64(a.Sequence)}
	}
	rows, err := store.SearchRecords(ctx, q)
	if err != nil {
		return nil, problem.New(problem.CentreUnavailable, "中心库不可用 (the central database does not answer)", "稍后重试；见 yinjian status (try again; see yinjian status)").With(err)
	}
	out := wire.RecordPage{Records: []wire.RecordRow{}}
	for _, r := range rows {
		out.Records = append(out.Records, wire.RecordRow{
			RecordID: r.RecordID, Kind: r.Kind, Application: r.Application, Signer: r.Signer, Department: r.Department, Type: r.DocumentType,
			Campus: r.Campus, Time: time.UnixMicro(r.SignedAt).UTC().Format(time.RFC3339Nano), BoundUS: r.Bound, Status: r.Status,
			Node: r.Node, Epoch: r.Epoch, Sequence: r.Sequence, Leaf: r.LeafHash,
		})
	}
	if n := len(rows); n == req.Most {
		last := rows[n-1]
		out.Next = &wire.RecordPlace{AtUS: int(last.SignedAt), Node: last.Node, Epoch: last.Epoch, Sequence: int(last.Sequence)}
	}
	return out, nil
}

// ExamineRecord reads a record's evidence as an application with the right to any would, and judges it as /v1/verify does.
func (d admin) ExamineRecord(ctx context.Context, actor string, req api.ExamineRecord) (any, error) {
	raw, err := d.a.signing.Evidence(ctx, &account.Application{ID: actor, Rights: []string{account.RightEvidenceAny}}, req.ID)
	if err != nil {
		return nil, err
	}
	report, err := d.a.signing.Verify(ctx, &sign.VerifyRequest{Evidence: raw, Document: req.Document})
	if err != nil {
		return nil, err
	}
	b, err := evidence.Parse(raw)
	if err != nil {
		return nil, err
	}
	return wire.ExaminedRecord{Evidence: json.RawMessage(raw), Report: report, Parts: show.Magnify(b, req.Document, d.a.logKey.Public())}, nil
}

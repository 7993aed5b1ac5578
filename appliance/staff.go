package appliance

import (
	"context"
	"errors"

	"yinjian/api"
	"yinjian/api/wire"
	"yinjian/appliance/account"
	"yinjian/appliance/problem"
)

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
	results, err := d.a.directory.EnrolAll(ctx, actor, all, req.Trial)
	if err != nil {
		return nil, err
	}
	out := wire.ImportedSigners{Results: make([]wire.ImportedSigner, len(results))}
	for i, r := range results {
		one := wire.ImportedSigner{ID: all[i].ID, Result: r.Result}
		for _, f := range r.Differences {
			one.Differences = append(one.Differences, wire.SignerDifference(f))
		}
		if r.Err != nil {
			p := problem.New(problem.Internal, "内部错误，已记入设备日志 (internal error, see the appliance's log)", "再试一次 (try again)")
			if !errors.As(r.Err, &p) {
				d.a.log.WithError(r.Err).WithField("object", all[i].ID).Error("enrolling in bulk failed")
			}
			one.Code, one.Field, one.Detail, one.Next = string(p.Code), p.Field, p.Detail, p.Next
		}
		out.Results[i] = one
	}
	return out, nil
}

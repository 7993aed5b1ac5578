package client

import (
	"context"

	"yinjian/api/wire"
)

// Assess has the appliance make a pack for an evaluator.
func (a *Admin) Assess(ctx context.Context, req wire.Assess) (*wire.Assessed, error) {
	data, err := a.post(ctx, "assessments", req)
	if err != nil {
		return nil, err
	}
	var out wire.Assessed
	return &out, decode(data, &out)
}

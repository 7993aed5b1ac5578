package appliance

import (
	"context"

	"yinjian/api"
)

func (d admin) SetProduction(ctx context.Context, actor string, req api.SetProduction) (any, error) {
	return d.a.directory.SetProduction(ctx, actor, req.ID, req.Production, req.Reason)
}

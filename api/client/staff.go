package client

import (
	"context"
	"encoding/json"
	"net/url"

	"yinjian/api/wire"
)

// SetProduction marks an application as one of production, or takes the mark away.
func (a *Admin) SetProduction(ctx context.Context, req wire.SetProduction) (json.RawMessage, error) {
	return a.post(ctx, "applications/"+url.PathEscape(req.ID)+"/production", req)
}

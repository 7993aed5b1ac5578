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

// ImportSigners enrols signers in bulk.
func (a *Admin) ImportSigners(ctx context.Context, req wire.ImportSigners) (*wire.ImportedSigners, error) {
	data, err := a.post(ctx, "signers/import", req)
	if err != nil {
		return nil, err
	}
	var out wire.ImportedSigners
	return &out, decode(data, &out)
}

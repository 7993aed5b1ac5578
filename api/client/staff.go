package client

import (
	"context"
	"encoding/json"
	"net/url"

	"yinjian/api/wire"
)

// BindClient says by which TLS client certificates an application proves itself.
func (a *Admin) BindClient(ctx context.Context, req wire.BindClient) (json.RawMessage, error) {
	return a.post(ctx, "applications/"+url.PathEscape(req.ID)+"/client", req)
}

// Selftest answers what came of an application for tests, as wire.Selftest.
func (a *Admin) Selftest(ctx context.Context, application string) (json.RawMessage, error) {
	return a.get(ctx, "applications/"+url.PathEscape(application)+"/selftest")
}

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

// ImportHistory takes in records of an older system.
func (a *Admin) ImportHistory(ctx context.Context, req wire.ImportHistory) (*wire.ImportedHistory, error) {
	data, err := a.post(ctx, "history/records", req)
	if err != nil {
		return nil, err
	}
	var out wire.ImportedHistory
	return &out, decode(data, &out)
}

// CloseHistory journals what a run of an import came to.
func (a *Admin) CloseHistory(ctx context.Context, req wire.HistoryTotals) (json.RawMessage, error) {
	return a.post(ctx, "history/totals", req)
}

// HistoryRecord answers the file about an imported record.
func (a *Admin) HistoryRecord(ctx context.Context, req wire.HistoryRecord) (json.RawMessage, error) {
	return a.post(ctx, "history/record", req)
}

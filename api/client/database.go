package client

import (
	"context"
	"encoding/json"

	"yinjian/api/wire"
)

// Compare derives every row of the central database again.
func (a *Admin) Compare(ctx context.Context) (json.RawMessage, error) {
	return a.post(ctx, "compare", wire.Compare{})
}

// Rebuild returns when the central database is made anew and agrees; the state says how far it is meanwhile. When ctx ends,
// so does the rebuild; it can be gone on with.
func (a *Admin) Rebuild(ctx context.Context, req wire.Rebuild) (json.RawMessage, error) {
	return a.post(ctx, "rebuild", req)
}

// Archive returns when the rows are moved; the state says how far it is meanwhile. When ctx ends, so does the moving; it can
// be gone on with.
func (a *Admin) Archive(ctx context.Context, req wire.Archive) (json.RawMessage, error) {
	return a.post(ctx, "archive", req)
}

// YearReport counts a year's records in the central database, slowly, so that signing does not suffer.
func (a *Admin) YearReport(ctx context.Context, req wire.YearReport) (json.RawMessage, error) {
	return a.post(ctx, "reports/year", req)
}

package client

import (
	"context"
	"encoding/json"

	"yinjian/api/wire"
)

// Sweep has the central database gone through by its MACs; of ten million rows that takes minutes.
func (a *Admin) Sweep(ctx context.Context) (json.RawMessage, error) {
	return a.post(ctx, "sweep", wire.Sweep{})
}

// ListChanges answers what was changed, as wire.Changes.
func (a *Admin) ListChanges(ctx context.Context, req wire.ListChanges) (json.RawMessage, error) {
	return a.post(ctx, "changes", req)
}

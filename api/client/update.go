package client

import (
	"context"
	"encoding/json"
	"io"
	"net/http"

	"yinjian/api/wire"
)

// UpdateStatus answers which image runs, and which waits.
func (a *Admin) UpdateStatus(ctx context.Context) (json.RawMessage, error) {
	return a.get(ctx, "update")
}

// StageUpdate sends a bundle of size bytes as it is read.
func (a *Admin) StageUpdate(ctx context.Context, bundle io.Reader, size int64) (json.RawMessage, error) {
	one := call{method: http.MethodPost, path: "/admin/v1/update/bundle", gives: "application/octet-stream", takes: "application/json"}
	r, err := newRequest(ctx, a.base, one)
	if err != nil {
		return nil, err
	}
	r.Body, r.ContentLength = io.NopCloser(bundle), size
	return a.answered(r, one)
}

func (a *Admin) CommitUpdate(ctx context.Context, req wire.CommitUpdate) (json.RawMessage, error) {
	return a.post(ctx, "update/commit", req)
}

func (a *Admin) CancelUpdate(ctx context.Context, req wire.CancelUpdate) (json.RawMessage, error) {
	return a.post(ctx, "update/cancel", req)
}

// RestartForUpdate restarts the machine into what was committed.
func (a *Admin) RestartForUpdate(ctx context.Context, req wire.RestartForUpdate) (json.RawMessage, error) {
	return a.post(ctx, "update/restart", req)
}

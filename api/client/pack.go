package client

import (
	"context"
	"encoding/json"
	"io"
	"net/http"

	"yinjian/api/wire"
)

// ListPacks answers which makers' packs are installed, and which waits.
func (a *Admin) ListPacks(ctx context.Context) (json.RawMessage, error) { return a.get(ctx, "packs") }

// StagePack sends a pack of size bytes as it is read.
func (a *Admin) StagePack(ctx context.Context, file io.Reader, size int64) (json.RawMessage, error) {
	one := call{method: http.MethodPost, path: "/admin/v1/packs/file", gives: "application/octet-stream", takes: "application/json"}
	r, err := newRequest(ctx, a.base, one)
	if err != nil {
		return nil, err
	}
	r.Body, r.ContentLength = io.NopCloser(file), size
	return a.answered(r, one)
}

func (a *Admin) InstallPack(ctx context.Context, req wire.InstallPack) (json.RawMessage, error) {
	return a.post(ctx, "packs/install", req)
}

func (a *Admin) RemovePack(ctx context.Context, req wire.RemovePack) (json.RawMessage, error) {
	return a.post(ctx, "packs/remove", req)
}

func (a *Admin) RegisterPackKey(ctx context.Context, req wire.RegisterPackKey) (json.RawMessage, error) {
	return a.post(ctx, "packs/key", req)
}

package client

import (
	"context"
	"encoding/json"

	"yinjian/api/wire"
)

// Unlock gives one holder's passphrase to an appliance that is locked.
func (a *Admin) Unlock(ctx context.Context, req wire.Unlock) (json.RawMessage, error) {
	return a.post(ctx, "unlock", req)
}

// Provision has an empty folder made an appliance.
func (a *Admin) Provision(ctx context.Context, req wire.Provision) (json.RawMessage, error) {
	return a.post(ctx, "provision", req)
}

// RetryStart has a start that failed tried again now.
func (a *Admin) RetryStart(ctx context.Context) (json.RawMessage, error) {
	return a.post(ctx, "start", wire.RetryStart{})
}

// SealUnlock has the TPM unlock from the next start on.
func (a *Admin) SealUnlock(ctx context.Context, req wire.SealUnlock) (json.RawMessage, error) {
	return a.post(ctx, "unlock/seal", req)
}

// UnsealUnlock has people unlock again.
func (a *Admin) UnsealUnlock(ctx context.Context, req wire.UnsealUnlock) (json.RawMessage, error) {
	return a.post(ctx, "unlock/unseal", req)
}

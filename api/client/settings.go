package client

import (
	"context"
	"encoding/json"

	"yinjian/api/wire"
)

// Settings answers the configuration, and which change of it waits or is tried.
func (a *Admin) Settings(ctx context.Context) (json.RawMessage, error) {
	return a.get(ctx, "settings")
}

// CheckSettings answers what a change would make, and does nothing.
func (a *Admin) CheckSettings(ctx context.Context, req wire.Settings) (json.RawMessage, error) {
	return a.post(ctx, "settings/check", req)
}

// ChangeSettings has the next start try a change.
func (a *Admin) ChangeSettings(ctx context.Context, req wire.ChangeSettings) (json.RawMessage, error) {
	return a.post(ctx, "settings", req)
}

// CancelSettings takes back a change that waits, or forgets one that was left.
func (a *Admin) CancelSettings(ctx context.Context, req wire.DecideSettings) (json.RawMessage, error) {
	return a.post(ctx, "settings/cancel", req)
}

// RestartForSettings ends the process, which is started again with the change that waits.
func (a *Admin) RestartForSettings(ctx context.Context, req wire.DecideSettings) (json.RawMessage, error) {
	return a.post(ctx, "settings/restart", req)
}

// ConfirmSettings says that administrators reach the appliance with the change that is tried.
func (a *Admin) ConfirmSettings(ctx context.Context, req wire.DecideSettings) (json.RawMessage, error) {
	return a.post(ctx, "settings/confirm", req)
}

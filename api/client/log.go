package client

import (
	"context"
	"encoding/json"

	"yinjian/api/wire"
)

// LogStatus answers where the running log goes, as wire.LogStatus.
func (a *Admin) LogStatus(ctx context.Context) (json.RawMessage, error) { return a.get(ctx, "log") }

// SetLog changes it, and answers it as wire.LogStatus.
func (a *Admin) SetLog(ctx context.Context, req wire.SetLog) (json.RawMessage, error) {
	return a.post(ctx, "log", req)
}

// ReadLog answers the last lines as {"lines": […]}.
func (a *Admin) ReadLog(ctx context.Context, req wire.ReadLog) (json.RawMessage, error) {
	return a.post(ctx, "log/lines", req)
}

// ReadLogFile answers a part of one of the files, as wire.LogPart.
func (a *Admin) ReadLogFile(ctx context.Context, req wire.ReadLogFile) (json.RawMessage, error) {
	return a.post(ctx, "log/file", req)
}

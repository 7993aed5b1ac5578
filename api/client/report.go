package client

import (
	"context"
	"encoding/json"

	"yinjian/api/wire"
)

// ListAlarms lists what was raised and is not over, and how the receivers do.
func (a *Admin) ListAlarms(ctx context.Context) (json.RawMessage, error) { return a.get(ctx, "alarms") }

// TestAlarms has every receiver of alarms sent a message.
func (a *Admin) TestAlarms(ctx context.Context) (*wire.TestedAlarms, error) {
	data, err := a.post(ctx, "alarms/test", wire.TestAlarms{})
	if err != nil {
		return nil, err
	}
	var out wire.TestedAlarms
	return &out, decode(data, &out)
}

// Diagnosis is what the appliance's process says of itself.
func (a *Admin) Diagnosis(ctx context.Context) (json.RawMessage, error) {
	return a.get(ctx, "diagnosis")
}

// SignReport journals the digests of a report's files, and answers the entry's receipt.
func (a *Admin) SignReport(ctx context.Context, req wire.SignReport) (json.RawMessage, error) {
	return a.post(ctx, "reports", req)
}

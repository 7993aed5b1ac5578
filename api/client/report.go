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

// ListReports answers what was filed, as wire.FiledReports.
func (a *Admin) ListReports(ctx context.Context, req wire.ListReports) (json.RawMessage, error) {
	return a.post(ctx, "reports/list", req)
}

// ReadReport answers a file of a report that was filed, as wire.ReportContent.
func (a *Admin) ReadReport(ctx context.Context, req wire.ReadReport) (json.RawMessage, error) {
	return a.post(ctx, "reports/read", req)
}

// RunPatrol has the appliance patrol itself, and answers wire.Patrolled.
func (a *Admin) RunPatrol(ctx context.Context, req wire.RunPatrol) (json.RawMessage, error) {
	return a.post(ctx, "patrols", req)
}

// System is what the appliance runs on and listens at.
func (a *Admin) System(ctx context.Context) (json.RawMessage, error) { return a.get(ctx, "system") }

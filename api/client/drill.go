package client

import (
	"context"
	"encoding/json"
	"net/url"

	"yinjian/api/wire"
)

// BeginDrill answers who signs for the drill.
func (a *Admin) BeginDrill(ctx context.Context, req wire.BeginDrill) (*wire.BegunDrill, error) {
	data, err := a.post(ctx, "drills", req)
	if err != nil {
		return nil, err
	}
	var out wire.BegunDrill
	return &out, decode(data, &out)
}

// BreakDrill breaks what the drill is about.
func (a *Admin) BreakDrill(ctx context.Context, req wire.BreakDrill) (json.RawMessage, error) {
	return a.post(ctx, "drills/"+url.PathEscape(req.ID)+"/break", req)
}

// EndDrill ends it, and undoes what it did.
func (a *Admin) EndDrill(ctx context.Context, req wire.EndDrill) (*wire.EndedDrill, error) {
	data, err := a.post(ctx, "drills/"+url.PathEscape(req.ID)+"/end", req)
	if err != nil {
		return nil, err
	}
	var out wire.EndedDrill
	return &out, decode(data, &out)
}

// DrillStatus answers the drill that is under way.
func (a *Admin) DrillStatus(ctx context.Context) (*wire.DrillState, error) {
	data, err := a.get(ctx, "drills")
	if err != nil {
		return nil, err
	}
	var out wire.DrillStatus
	return out.Drill, decode(data, &out)
}

package client

import (
	"context"
	"encoding/json"
	"net/url"

	"yinjian/api/wire"
)

// SetCustodians says whom backups are sealed to from now on.
func (a *Admin) SetCustodians(ctx context.Context, req wire.SetCustodians) (json.RawMessage, error) {
	return a.post(ctx, "backups/custodians", req)
}

// BeginBackup journals that a backup is about to be written.
func (a *Admin) BeginBackup(ctx context.Context, req wire.BeginBackup) (*wire.BegunBackup, error) {
	data, err := a.post(ctx, "backups", req)
	if err != nil {
		return nil, err
	}
	var out wire.BegunBackup
	return &out, decode(data, &out)
}

// EndBackup journals what became of it, and answers the receipt of a success.
func (a *Admin) EndBackup(ctx context.Context, req wire.EndBackup) (json.RawMessage, error) {
	return a.post(ctx, "backups/"+url.PathEscape(req.ID)+"/outcome", req)
}

// FileReport journals a verification or a drill, and answers the entry's receipt.
func (a *Admin) FileReport(ctx context.Context, req wire.FileReport) (json.RawMessage, error) {
	return a.post(ctx, "backups/reports", req)
}

func (a *Admin) ListBackups(ctx context.Context) (json.RawMessage, error) {
	return a.get(ctx, "backups")
}

// MissingRecords lists what a restored journal lacks, as far as the central database tells.
func (a *Admin) MissingRecords(ctx context.Context) (json.RawMessage, error) {
	return a.get(ctx, "backups/missing")
}

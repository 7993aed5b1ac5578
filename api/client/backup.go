package client

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
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

// CarryBackup writes the file of a backup that was begun to out, as it comes, and answers what the appliance says that it is. After
// an error out has something that is not whole.
func (a *Admin) CarryBackup(ctx context.Context, req wire.CarryBackup, out io.Writer) (*wire.EndBackup, error) {
	body, err := json.Marshal(req)
	if err != nil {
		return nil, fmt.Errorf("client: encoding request: %w", err)
	}
	one := call{method: http.MethodPost, path: "/admin/v1/backups/" + url.PathEscape(req.ID) + "/file", body: body, gives: "application/json", takes: "application/octet-stream"}
	r, err := newRequest(ctx, a.base, one)
	if err != nil {
		return nil, err
	}
	if a.session != "" {
		r.Header.Set("Authorization", "Bearer "+a.session)
	}
	resp, err := a.http.Do(r)
	if err != nil {
		return nil, fmt.Errorf("client: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		data, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
		p := new(Problem)
		if err == nil && json.Unmarshal(data, &p.Problem) == nil && p.Code != "" {
			return nil, p
		}
		return nil, fmt.Errorf("client: unexpected answer: status %d", resp.StatusCode)
	}
	if _, err := io.Copy(out, resp.Body); err != nil {
		return nil, fmt.Errorf("client: the backup broke off: %w", err)
	}
	end := new(wire.EndBackup)
	if err := json.Unmarshal([]byte(resp.Trailer.Get(wire.BackupTrailer)), end); err != nil {
		return nil, fmt.Errorf("client: the backup has no end: %w", err)
	}
	return end, nil
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

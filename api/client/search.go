package client

import (
	"context"
	"encoding/json"
	"net/url"

	"yinjian/api/wire"
)

// SearchSigners answers a wire.SignerPage.
func (a *Admin) SearchSigners(ctx context.Context, req wire.SearchSigners) (json.RawMessage, error) {
	return a.post(ctx, "signers/search", req)
}

// SearchKeys answers keys as ListKeys does, of a page.
func (a *Admin) SearchKeys(ctx context.Context, req wire.SearchKeys) (json.RawMessage, error) {
	return a.post(ctx, "keys/search", req)
}

// SearchCertificates answers a wire.CertificatePage.
func (a *Admin) SearchCertificates(ctx context.Context, req wire.SearchCertificates) (json.RawMessage, error) {
	return a.post(ctx, "certificates/search", req)
}

// SearchRecords answers rows of the central database, newest first.
func (a *Admin) SearchRecords(ctx context.Context, req wire.SearchRecords) (*wire.RecordPage, error) {
	body, err := a.post(ctx, "records/search", req)
	if err != nil {
		return nil, err
	}
	var out wire.RecordPage
	return &out, json.Unmarshal(body, &out)
}

// ExamineRecord answers a wire.ExaminedRecord.
func (a *Admin) ExamineRecord(ctx context.Context, req wire.ExamineRecord) (json.RawMessage, error) {
	return a.post(ctx, "records/"+url.PathEscape(req.ID)+"/examine", req)
}

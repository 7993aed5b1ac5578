package client

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"time"
)

// StampPlain sends a DER TimeStampReq to a plain HTTP timestamp endpoint (RFC 3161 §3.4) and answers its DER
// TimeStampResp, a rejection included. The appliance opens such an endpoint on loopback only, and only when told to.
func StampPlain(ctx context.Context, url string, query []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, 60*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(query))
	if err != nil {
		return nil, fmt.Errorf("client: %w", err)
	}
	req.Header.Set("Content-Type", "application/timestamp-query")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, fmt.Errorf("client: %w", err)
	}
	defer resp.Body.Close()
	const most = 1 << 20 // a token with its chain has a few KiB
	reply, err := io.ReadAll(io.LimitReader(resp.Body, most))
	if err != nil {
		return nil, fmt.Errorf("client: %w", err)
	}
	if t := resp.Header.Get("Content-Type"); resp.StatusCode != http.StatusOK || t != "application/timestamp-reply" {
		return nil, fmt.Errorf("client: %s: status %d, type %q", url, resp.StatusCode, t)
	}
	return reply, nil
}

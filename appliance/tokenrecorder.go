package appliance

import (
	"context"
	"time"

	"yinjian/appliance/audit"
	"yinjian/tsa"
)

// A TokenRecorder journals free-standing tokens before they leave, one entry each, with the time's provenance. It satisfies
// tsa.Recorder.
type TokenRecorder struct {
	Journal *audit.Journal
	Unit    string // its name
}

type requesterKey struct{}

// WithRequester lets a [TokenRecorder] find who asked for the token.
func WithRequester(ctx context.Context, requester string) context.Context {
	return context.WithValue(ctx, requesterKey{}, requester)
}

// RecordToken returns when the entry is on disk. The certificates that travel with tokens of ours, most of their bytes and
// always the same, are a payload of their own, stored once; without them the token is the whole of what the unit made.
func (r TokenRecorder) RecordToken(ctx context.Context, t *tsa.Token) error {
	requester, _ := ctx.Value(requesterKey{}).(string)
	if requester == "" {
		requester = "unknown"
	}
	der, certificates := t.Bare()
	if certificates == nil {
		der = t.DER // also one of a device elsewhere, with whatever it carries
	}
	d := audit.Draft{
		Kind: kindToken, Actor: requester, Object: "unit/" + r.Unit,
		Fields: []audit.Field{
			{Name: "imprint.algorithm", Value: audit.Text(t.Imprint.Algorithm.String())},
			{Name: "imprint.digest", Value: audit.Octets(t.Imprint.Digest)},
			{Name: "policy", Value: audit.Text(t.Policy.String())},
			{Name: "serial", Value: audit.Octets(t.Serial.Bytes())},
			{Name: "time.bound_us", Value: audit.Int((t.Provenance.Bound + time.Microsecond - 1).Microseconds())}, // up: a bound must hold
			{Name: "time.provenance", Value: audit.Text(t.Provenance.Provenance)},
		},
		Payloads: []audit.Attachment{{Name: "token", MediaType: "application/timestamp-token", Data: der}},
	}
	if certificates != nil {
		d.Payloads = append(d.Payloads, audit.Attachment{Name: "certificates", MediaType: "application/pkcs7-mime", Data: certificates, Shared: true})
	}
	if t.Origin.By != "" {
		d.Object = t.Origin.By
	}
	if t.Origin.Instead != "" {
		d.Fields = append(d.Fields, audit.Field{Name: "stamp.instead", Value: audit.Text(t.Origin.Instead)})
	}
	_, err := r.Journal.Append(ctx, d)
	return err
}

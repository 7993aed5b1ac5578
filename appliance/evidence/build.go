package evidence

import (
	"context"
	"encoding/hex"
	"fmt"
	"strings"

	"yinjian/appliance/audit"
)

// A Source is what a bundle is built from. *audit.Journal is one.
type Source interface {
	Payload(ctx context.Context, e *audit.Entry, name string) ([]byte, error)
	WaitCheckpoint(ctx context.Context, sequence uint64) (audit.Checkpoint, error)
	// Cosigned is the newest checkpoint with a cosignature, if there is one that covers the entry.
	Cosigned(ctx context.Context, sequence uint64) (audit.Checkpoint, bool)
	InclusionProof(ctx context.Context, sequence, size uint64) ([]audit.Hash, error)
}

// Build makes the bundle of one signature's entry, under the newest checkpoint that another campus has cosigned, or, if none
// of those covers the entry yet, under the last one. It waits for that as long as the source does (2 s); without one it
// answers [audit.ErrNoCheckpoint].
func Build(ctx context.Context, s Source, rec audit.Record) (*Bundle, error) {
	e := &rec.Entry
	if e.Kind != KindSign {
		return nil, fmt.Errorf("evidence: entry %d is a %s, not a signature", rec.Sequence, e.Kind)
	}
	place, err := Place(ctx, s, rec)
	if err != nil {
		return nil, err
	}
	digest, _ := e.Field("digest.value").(audit.Octets)
	size, _ := e.Field("document.size").(audit.Int)
	bound, _ := e.Field("time.bound_us").(audit.Int)
	test, _ := e.Field("test").(audit.Bool)
	detached, _ := e.Field("detached").(audit.Bool)
	b := &Bundle{
		Format: Format, RecordID: hex.EncodeToString(e.Ref),
		Record: Record{
			Application: e.Text("application"), Campus: e.Text("campus"), Signer: e.Text("signer"),
			Department: e.Text("department"), Role: e.Text("role"), DocumentType: e.Text("document.type"),
			DocumentID: e.Text("document.id"), MediaType: e.Text("document.media_type"), Size: int64(size),
			DigestAlgorithm: e.Text("digest.algorithm"), Digest: hex.EncodeToString(digest), Test: bool(test),
			StampPolicy: e.Text("stamp"), TimeProvenance: e.Text("time.provenance"), TimeBoundUS: int64(bound),
		},
		Signature:    Signature{Algorithm: e.Text("algorithm"), Form: e.Text("form"), Detached: bool(detached)},
		Journal:      place,
		Certificates: [][]byte{}, CRLs: [][]byte{},
	}
	b.Format = b.format()
	for _, p := range e.Payloads { // sorted by name: certificate.0 comes before certificate.1
		data, err := s.Payload(ctx, e, p.Name)
		if err != nil {
			return nil, fmt.Errorf("evidence: payload %s of entry %d: %w", p.Name, rec.Sequence, err)
		}
		switch {
		case p.Name == "signature":
			b.Signature.Value = data
		case p.Name == "token":
			b.Token = data
		case p.Name == "authorization":
			b.Authorization = data
		case strings.HasPrefix(p.Name, "certificate."), strings.HasPrefix(p.Name, "stamp.certificate."):
			b.Certificates = append(b.Certificates, data)
		case strings.HasPrefix(p.Name, "crl."):
			b.CRLs = append(b.CRLs, data)
		}
	}
	return b, nil
}

package uses

import (
	"context"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/emmansun/gmsm/sm3"
	"golang.org/x/crypto/cryptobyte"
	der "golang.org/x/crypto/cryptobyte/asn1"

	"yinjian/appliance/audit"
	"yinjian/appliance/cms"
	"yinjian/hsm/uselog"
)

// SignaturesIn answers the digests of the signatures in b, as [uselog.Digest] forms them: those of a CMS or a timestamp
// token, tokens in unsigned attributes included; that of a certificate, CRL or certificate request; those of all such that stand
// in a JSON object as base64; otherwise b is a signature itself.
func SignaturesIn(b []byte) []uselog.Hash {
	if values, err := cms.SignatureValues(b); err == nil {
		out := make([]uselog.Hash, len(values))
		for i, v := range values {
			out[i] = sm3.Sum(v)
		}
		return out
	}
	if v, ok := signedObject(b); ok {
		return []uselog.Hash{sm3.Sum(v)}
	}
	if json.Valid(b) {
		var out []uselog.Hash
		inJSON(b, func(v []byte) { out = append(out, sm3.Sum(v)) })
		return out
	}
	return []uselog.Hash{sm3.Sum(b)}
}

// signedObject answers the signature of what X.509 calls SIGNED{}: SEQUENCE { SEQUENCE, AlgorithmIdentifier, BIT STRING },
// as certificates, CRLs and certificate requests are.
func signedObject(b []byte) ([]byte, bool) {
	s := cryptobyte.String(b)
	var seq cryptobyte.String
	var value []byte
	if !s.ReadASN1(&seq, der.SEQUENCE) || !s.Empty() || !seq.SkipASN1(der.SEQUENCE) || !seq.SkipASN1(der.SEQUENCE) ||
		!seq.ReadASN1BitStringAsBytes(&value) || !seq.Empty() {
		return nil, false
	}
	return value, true
}

// A list is the payload of the entries that name signatures by their digest.
type list []Named

// A Named is one signature as entries of the kinds [KindUnaccounted] and [KindDiscarded] name it. Of a discarded one the
// signature and the reason are known.
type Named struct {
	Slot      string `json:"slot,omitempty"`
	Key       string `json:"key,omitempty"`
	Number    uint64 `json:"number,omitempty"`  // uses of the slot, this one included
	Counter   uint64 `json:"counter,omitempty"` // uses of the key, this one included
	Signature string `json:"signature_sm3"`     // hex, see uselog.Digest
	Signed    string `json:"signed,omitempty"`  // hex; e or the digest that was signed
	AtMS      int64  `json:"at_ms,omitempty"`   // since its worker had started
	Life      string `json:"life,omitempty"`    // hex; the start it belongs to, as in appliance.started
	Reason    string `json:"reason"`
}

// settled is how an entry accounts for a signature.
type settled uint8

const (
	byEntry settled = iota
	byCheckpoint
	byDiscard
	byName  // left by a crash
	byAlarm // named for another reason
)

// settle calls fn with the signatures that the entry accounts for.
func settle(ctx context.Context, store audit.Store, e *audit.Entry, fn func(uselog.Hash, settled)) error {
	switch e.Kind {
	case audit.KindForeign: // the signatures of another appliance's cipher machine
		return nil
	case audit.KindImported:
		return nil // or whoever imports could give account of a signature that he had made past the journal
	case KindDiscarded, KindUnaccounted:
		if _, ok := e.Payload("uses"); !ok {
			return nil
		}
		b, err := audit.ReadPayload(ctx, store, e, "uses")
		if err != nil {
			return err
		}
		var l list
		if err := json.Unmarshal(b, &l); err != nil {
			return fmt.Errorf("entry %d: %w", e.Sequence, err)
		}
		for _, n := range l {
			how := byAlarm
			switch {
			case e.Kind == KindDiscarded:
				how = byDiscard
			case n.Reason == Ended:
				how = byName
			}
			if b, err := hex.DecodeString(n.Signature); err == nil && len(b) == len(uselog.Hash{}) {
				fn(uselog.Hash(b), how)
			}
		}
		return nil
	}
	// The entries of signatures and tokens repeat certificates and CRLs that have entries of their own.
	_, signs := e.Payload("signature")
	for _, p := range e.Payloads {
		switch {
		case p.Name == "authorization" || p.Name == "certificates" || signs && p.Name != "signature" && p.Name != "token":
		case signs && p.Name == "signature" && p.MediaType == "application/octet-stream":
			fn(uselog.Hash(p.SM3), byEntry) // raw: the payload is the signature
		case p.MediaType == "application/json":
			b, err := audit.ReadPayload(ctx, store, e, p.Name)
			if err != nil {
				return err
			}
			inJSON(b, func(v []byte) { fn(sm3.Sum(v), byEntry) })
		case strings.HasPrefix(p.MediaType, "application/"):
			b, err := audit.ReadPayload(ctx, store, e, p.Name)
			if err != nil {
				return err
			}
			for _, h := range SignaturesIn(b) {
				fn(h, byEntry)
			}
		}
	}
	return nil
}

// inJSON calls fn with the signature of each signed object that stands in the JSON as base64: objects of the directory
// carry their certificates and CRLs that way.
func inJSON(b []byte, fn func([]byte)) {
	var v any
	if json.Unmarshal(b, &v) != nil {
		return
	}
	var walk func(any)
	walk = func(v any) {
		switch v := v.(type) {
		case string:
			if raw, err := base64.StdEncoding.DecodeString(v); err == nil {
				if value, ok := signedObject(raw); ok {
					fn(value)
				}
			}
		case []any:
			for _, e := range v {
				walk(e)
			}
		case map[string]any:
			for _, e := range v {
				walk(e)
			}
		}
	}
	walk(v)
}

// Discarded is the draft of an entry that gives account of signatures that were thrown away: made by the cipher machine,
// recorded nowhere, handed to nobody.
func Discarded(signatures []Named) (audit.Draft, error) {
	return named(KindDiscarded, "signatures", signatures)
}

func named(kind, object string, uses list) (audit.Draft, error) {
	if len(uses) == 0 {
		return audit.Draft{}, errors.New("uses: no signature is named")
	}
	b, err := json.Marshal(uses)
	if err != nil {
		return audit.Draft{}, err
	}
	return audit.Draft{
		Kind: kind, Actor: "appliance", Object: object, Fields: []audit.Field{{Name: "count", Value: audit.Int(len(uses))}},
		Payloads: []audit.Attachment{{Name: "uses", MediaType: "application/json", Data: b}},
	}, nil
}

package pki

import (
	"errors"
	"fmt"
	"unicode"
	"unicode/utf8"

	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"
)

// A SigningContext is the signed attribute ([OIDSigningContext]) that ties a signature to the act it belongs to. Its
// encoding is DER, one for each value:
//
//	SigningContext ::= SEQUENCE {
//	   version             INTEGER { v1(1) },
//	   application         UTF8String (SIZE(1..64)),
//	   campus              UTF8String (SIZE(1..64)),
//	   recordID            UTF8String (SIZE(1..128)),
//	   documentType        UTF8String (SIZE(0..64)),
//	   signerRole          UTF8String (SIZE(0..64)),
//	   department          UTF8String (SIZE(0..128)),
//	   authorisationHash   OCTET STRING (SIZE(32)),
//	   delegationGrantHash [0] IMPLICIT OCTET STRING (SIZE(32)) OPTIONAL,
//	   handwritingHash     [1] IMPLICIT OCTET STRING (SIZE(32)) OPTIONAL,
//	   test                [2] IMPLICIT BOOLEAN DEFAULT FALSE }
//
// Sizes count bytes of UTF-8. Hashes are SM3. Strings hold no control characters and no marks that turn the direction
// of writing: what a court reads must be what was signed.
type SigningContext struct {
	Application         string
	Campus              string
	RecordID            string // hex, as in the evidence
	DocumentType        string
	SignerRole          string
	Department          string // at signing time
	AuthorisationHash   [32]byte
	DelegationGrantHash *[32]byte // nil: not delegated
	HandwritingHash     *[32]byte // nil: no handwriting image
	Test                bool      // a record made in a test, without legal intent
}

const (
	signingContextV1 = 1
	// maxSigningContext is above what the limits of the fields add up to.
	maxSigningContext = 1024
)

// fields lists the strings in order, with their limits.
func (c *SigningContext) fields() []struct {
	name     string
	value    *string
	min, max int
} {
	return []struct {
		name     string
		value    *string
		min, max int
	}{
		{"application", &c.Application, 1, 64},
		{"campus", &c.Campus, 1, 64},
		{"recordID", &c.RecordID, 1, 128},
		{"documentType", &c.DocumentType, 0, 64},
		{"signerRole", &c.SignerRole, 0, 64},
		{"department", &c.Department, 0, 128},
	}
}

// check is applied when writing and when reading.
func (c *SigningContext) check() error {
	for _, f := range c.fields() {
		s := *f.value
		if len(s) < f.min || len(s) > f.max {
			return fmt.Errorf("pki: signing context: %s has %d bytes, want %d to %d", f.name, len(s), f.min, f.max)
		}
		if !utf8.ValidString(s) {
			return fmt.Errorf("pki: signing context: %s is not UTF-8", f.name)
		}
		for _, r := range s {
			if unicode.IsControl(r) || unicode.Is(unicode.Bidi_Control, r) || unicode.Is(unicode.Zl, r) || unicode.Is(unicode.Zp, r) {
				return fmt.Errorf("pki: signing context: %s holds the character %U", f.name, r)
			}
		}
	}
	return nil
}

// Marshal is the DER of c; an error means that a field is out of its limits.
func (c *SigningContext) Marshal() ([]byte, error) {
	if err := c.check(); err != nil {
		return nil, err
	}
	var b cryptobyte.Builder
	b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1Int64(signingContextV1)
		for _, f := range c.fields() {
			b.AddASN1(asn1.UTF8String, func(b *cryptobyte.Builder) { b.AddBytes([]byte(*f.value)) })
		}
		b.AddASN1OctetString(c.AuthorisationHash[:])
		for tag, hash := range []*[32]byte{c.DelegationGrantHash, c.HandwritingHash} {
			if hash != nil {
				b.AddASN1(asn1.Tag(tag).ContextSpecific(), func(b *cryptobyte.Builder) { b.AddBytes(hash[:]) })
			}
		}
		if c.Test { // DER: a value equal to its default is left out (X.690 §11.5)
			b.AddASN1(asn1.Tag(2).ContextSpecific(), func(b *cryptobyte.Builder) { b.AddUint8(0xff) })
		}
	})
	return b.Bytes()
}

// ParseSigningContext reads the DER of one SigningContext. It takes no other encoding of the same value, no field that
// it does not know, and no version but 1.
func ParseSigningContext(der []byte) (*SigningContext, error) {
	if len(der) > maxSigningContext {
		return nil, fmt.Errorf("pki: signing context of %d bytes, at most %d are read", len(der), maxSigningContext)
	}
	malformed := errors.New("pki: signing context: malformed")
	in := cryptobyte.String(der)
	var seq cryptobyte.String
	var version int64
	if !in.ReadASN1(&seq, asn1.SEQUENCE) || !in.Empty() || !seq.ReadASN1Integer(&version) {
		return nil, malformed
	}
	if version != signingContextV1 {
		return nil, fmt.Errorf("pki: signing context: version %d, this release reads %d", version, signingContextV1)
	}
	c := new(SigningContext)
	for _, f := range c.fields() {
		var s cryptobyte.String
		if !seq.ReadASN1(&s, asn1.UTF8String) {
			return nil, fmt.Errorf("pki: signing context: %s: malformed", f.name)
		}
		*f.value = string(s)
	}
	var hash cryptobyte.String
	if !seq.ReadASN1(&hash, asn1.OCTET_STRING) || len(hash) != 32 {
		return nil, malformed
	}
	c.AuthorisationHash = [32]byte(hash)
	for tag, dst := range []**[32]byte{&c.DelegationGrantHash, &c.HandwritingHash} {
		var present bool
		if !seq.ReadOptionalASN1(&hash, &present, asn1.Tag(tag).ContextSpecific()) || present && len(hash) != 32 {
			return nil, malformed
		}
		if present {
			h := [32]byte(hash)
			*dst = &h
		}
	}
	var test cryptobyte.String
	if !seq.ReadOptionalASN1(&test, &c.Test, asn1.Tag(2).ContextSpecific()) || c.Test && (len(test) != 1 || test[0] != 0xff) {
		return nil, malformed
	}
	if !seq.Empty() {
		return nil, malformed
	}
	if err := c.check(); err != nil {
		return nil, err
	}
	return c, nil
}

package cms

import (
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/asn1"
	"fmt"
	"hash"
	"math/big"

	"github.com/emmansun/gmsm/sm3"
	"github.com/emmansun/gmsm/smx509"
	"golang.org/x/crypto/cryptobyte"
	der "golang.org/x/crypto/cryptobyte/asn1"
)

// An Attribute is RFC 5652 §5.3's: a type and a SET OF values.
type Attribute struct {
	Type   asn1.ObjectIdentifier
	Values [][]byte // each one DER element; at least one
}

// encode answers the DER of the attribute, its values in SET OF order.
func (a Attribute) encode() ([]byte, error) {
	if len(a.Values) == 0 {
		return nil, fmt.Errorf("cms: attribute %v has no value", a.Type)
	}
	values := append([][]byte(nil), a.Values...)
	for _, v := range values {
		if !oneElement(v) {
			return nil, fmt.Errorf("cms: attribute %v: value is not one DER element: %w", a.Type, ErrMalformed)
		}
	}
	sortSetOf(values)
	var b cryptobyte.Builder
	b.AddASN1(der.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1ObjectIdentifier(a.Type)
		b.AddASN1(der.SET, func(b *cryptobyte.Builder) { addAll(b, values) })
	})
	out, err := b.Bytes()
	if err != nil {
		return nil, fmt.Errorf("cms: attribute %v: %w", a.Type, err)
	}
	return out, nil
}

// parseAttributes reads the body of a SET SIZE (1..MAX) OF Attribute.
func parseAttributes(body cryptobyte.String) ([]Attribute, error) {
	elements, ok := readSetOf(body)
	if !ok || len(elements) == 0 {
		return nil, fmt.Errorf("attributes are empty, broken or not in DER order: %w", ErrMalformed)
	}
	attributes := make([]Attribute, 0, len(elements))
	for _, e := range elements {
		var seq, set cryptobyte.String
		var a Attribute
		s := cryptobyte.String(e)
		if !s.ReadASN1(&seq, der.SEQUENCE) || !seq.ReadASN1ObjectIdentifier(&a.Type) ||
			!seq.ReadASN1(&set, der.SET) || !seq.Empty() {
			return nil, fmt.Errorf("attribute: %w", ErrMalformed)
		}
		if a.Values, ok = readSetOf(set); !ok || len(a.Values) == 0 {
			return nil, fmt.Errorf("attribute %v: values are empty, broken or not in DER order: %w", a.Type, ErrMalformed)
		}
		attributes = append(attributes, a)
	}
	return attributes, nil
}

// LooksLikeAttributes reports whether content could be taken for signed attributes: a SET OF Attribute, or the same
// under SignerInfo's [0] tag.
//
// RFC 5652 §5.4 hashes either the content or the DER of the signed attributes, and the signature does not say which. A
// signature made without attributes over such content is also a signature with attributes over another content, one the
// signer has never seen. Order is not examined, since some verifiers do not either.
func LooksLikeAttributes(content []byte) bool {
	s := cryptobyte.String(content)
	var set cryptobyte.String
	var tag der.Tag
	if !s.ReadAnyASN1(&set, &tag) || !s.Empty() || tag != der.SET && tag != tagContext0 || set.Empty() {
		return false
	}
	for !set.Empty() {
		var seq, values cryptobyte.String
		var oid asn1.ObjectIdentifier
		if !set.ReadASN1(&seq, der.SEQUENCE) || !seq.ReadASN1ObjectIdentifier(&oid) ||
			!seq.ReadASN1(&values, der.SET) || !seq.Empty() {
			return false
		}
	}
	return true
}

// singleValued are the attributes that may occur once, with one value (RFC 5652 §11, RFC 5035 §3, RFC 6211 §2).
var singleValued = []asn1.ObjectIdentifier{
	OIDContentType, OIDMessageDigest, OIDSigningTime, OIDSigningCertificate, OIDSigningCertificateV2, OIDAlgorithmProtection,
}

// hashOf answers the digests that a certificate may be named by, nil for others.
func hashOf(oid asn1.ObjectIdentifier) hash.Hash {
	switch {
	case oid.Equal(OIDSM3):
		return sm3.New()
	case oid.Equal(OIDSHA256):
		return sha256.New()
	case oid.Equal(OIDSHA384):
		return sha512.New384()
	case oid.Equal(OIDSHA512):
		return sha512.New()
	case oid.Equal(OIDSHA1): // RFC 2634's ESSCertID only; needs a second preimage, not a collision
		return sha1.New()
	}
	return nil
}

func sum(h hash.Hash, data []byte) []byte {
	h.Write(data)
	return h.Sum(nil)
}

// signingCertificateV2 is the attribute of RFC 5035 §3 that names cert by digest, issuer and serial number.
func signingCertificateV2(cert *smx509.Certificate, digest AlgorithmIdentifier) (Attribute, error) {
	var b cryptobyte.Builder
	b.AddASN1(der.SEQUENCE, func(b *cryptobyte.Builder) { // SigningCertificateV2
		b.AddASN1(der.SEQUENCE, func(b *cryptobyte.Builder) { // SEQUENCE OF ESSCertIDv2
			b.AddASN1(der.SEQUENCE, func(b *cryptobyte.Builder) { // ESSCertIDv2
				if !digest.OID.Equal(OIDSHA256) { // DEFAULT {algorithm id-sha256}: DER omits it
					b.AddBytes(digest.raw)
				}
				b.AddASN1OctetString(sum(hashOf(digest.OID), cert.Raw))
				b.AddASN1(der.SEQUENCE, func(b *cryptobyte.Builder) { // IssuerSerial
					b.AddASN1(der.SEQUENCE, func(b *cryptobyte.Builder) { // GeneralNames
						b.AddASN1(tagContext4, func(b *cryptobyte.Builder) { b.AddBytes(cert.RawIssuer) })
					})
					b.AddASN1BigInt(cert.SerialNumber)
				})
			})
		})
	})
	value, err := b.Bytes()
	return Attribute{Type: OIDSigningCertificateV2, Values: [][]byte{value}}, err
}

// namesCertificate compares the first ESSCertID (v2: ESSCertIDv2) of a signing-certificate attribute's value with cert:
// the first identifies the signer's certificate (RFC 5035 §3), others and the policies restrict the chain.
func namesCertificate(value []byte, v2 bool, cert *smx509.Certificate) error {
	s := cryptobyte.String(value)
	var signing, ids, first, digest cryptobyte.String
	if !s.ReadASN1(&signing, der.SEQUENCE) || !s.Empty() || !signing.ReadASN1(&ids, der.SEQUENCE) ||
		!ids.ReadASN1(&first, der.SEQUENCE) {
		return fmt.Errorf("value: %w", ErrMalformed)
	}
	algorithm := AlgorithmIdentifier{OID: OIDSHA1}
	if v2 {
		algorithm.OID = OIDSHA256
		// A default that is spelled out is not DER, but the signature covers these bytes as they are, other signers do
		// write them, and nothing hangs on it.
		if first.PeekASN1Tag(der.SEQUENCE) && !readAlgorithm(&first, der.SEQUENCE, &algorithm) {
			return fmt.Errorf("hashAlgorithm: %w", ErrMalformed)
		}
	}
	h := hashOf(algorithm.OID)
	if h == nil || v2 && algorithm.OID.Equal(OIDSHA1) || !algorithm.parameterless() {
		return fmt.Errorf("hashAlgorithm %v: %w", algorithm.OID, ErrUnsupported)
	}
	if !first.ReadASN1(&digest, der.OCTET_STRING) {
		return fmt.Errorf("certHash: %w", ErrMalformed)
	}
	if string(digest) != string(sum(h, cert.Raw)) {
		return fmt.Errorf("certHash: %w", ErrSigningCertificate)
	}
	if first.Empty() {
		return nil
	}
	var issuerSerial, names, name, issuer cryptobyte.String
	serial := new(big.Int)
	if !first.ReadASN1(&issuerSerial, der.SEQUENCE) || !first.Empty() || !issuerSerial.ReadASN1(&names, der.SEQUENCE) ||
		!issuerSerial.ReadASN1Integer(serial) || !issuerSerial.Empty() ||
		!names.ReadASN1(&name, tagContext4) || !names.Empty() || !name.ReadASN1Element(&issuer, der.SEQUENCE) || !name.Empty() {
		return fmt.Errorf("issuerSerial: %w", ErrMalformed)
	}
	if string(issuer) != string(cert.RawIssuer) || serial.Cmp(cert.SerialNumber) != 0 {
		return fmt.Errorf("issuerSerial: %w", ErrSigningCertificate)
	}
	return nil
}

// algorithmProtection is the attribute of RFC 6211 §2, with the signature algorithm under [1].
func algorithmProtection(digest, signature AlgorithmIdentifier) Attribute {
	tagged := append([]byte(nil), signature.raw...)
	tagged[0] = byte(tagContext1)
	var b cryptobyte.Builder
	b.AddASN1(der.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddBytes(digest.raw)
		b.AddBytes(tagged)
	})
	return Attribute{Type: OIDAlgorithmProtection, Values: [][]byte{b.BytesOrPanic()}}
}

// protects compares an algorithm protection attribute's value with the SignerInfo's algorithms.
func protects(value []byte, digest, signature AlgorithmIdentifier) error {
	s := cryptobyte.String(value)
	var seq cryptobyte.String
	var d, a AlgorithmIdentifier
	if !s.ReadASN1(&seq, der.SEQUENCE) || !s.Empty() || !readAlgorithm(&seq, der.SEQUENCE, &d) ||
		!readAlgorithm(&seq, tagContext1, &a) || !seq.Empty() { // [2], a MAC algorithm, must be absent in SignedData
		return fmt.Errorf("value: %w", ErrMalformed)
	}
	if !d.same(digest) || !a.same(signature) {
		return ErrAlgorithmProtection
	}
	return nil
}

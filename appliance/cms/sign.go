package cms

import (
	"bytes"
	"context"
	"encoding/asn1"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"

	"github.com/emmansun/gmsm/smx509"
	"golang.org/x/crypto/cryptobyte"
	der "golang.org/x/crypto/cryptobyte/asn1"
)

// Params say what to sign and how. Exactly one of Content and Digest is set.
type Params struct {
	ContentType asn1.ObjectIdentifier // eContentType; nil is id-data, in the profile's arc
	Content     []byte                // non-nil, may be empty
	Digest      []byte                // of content held elsewhere: SM3 for SM2 keys, SHA-256 for RSA, 32 bytes; needs Detached
	Detached    bool                  // leave the content out of the message

	SignedAttributes    []Attribute // beside contentType, messageDigest and signingCertificateV2
	AlgorithmProtection bool        // add CMSAlgorithmProtection (RFC 6211)
	OmitCertificates    bool        // leave the certificates out
	CRLs                [][]byte    // DER of CertificateList, to go into the message

	Certificates [][]byte // for [Sign] only: DER, the signer's first
	Profile      Profile  // for [Sign] only
}

// A Template holds what does not change from one message of a signer to the next: certificates, identifiers, the
// signing-certificate attribute. Safe for concurrent use.
type Template struct {
	signer       Signer
	profile      Profile
	suite        *suite
	signature    AlgorithmIdentifier
	digests      []AlgorithmIdentifier // the suite's alone
	certificate  *smx509.Certificate
	certificates [][]byte // DER, in SET OF order
	certsOnly    []byte   // a message of them alone
	sid          []byte
	signingCert  []byte // encoded attribute
	protection   []byte // encoded attribute

	// plain are the attributes of the last message that had none of the caller's: in those of the next of its kind, only
	// the digest differs.
	plain atomic.Pointer[plainAttributes]
}

type plainAttributes struct {
	contentType asn1.ObjectIdentifier
	protection  bool
	der         []byte
	digest      int // where it begins
}

// NewTemplate prepares signing by signer, whose certificate is the first of certificates (DER); the others, its chain,
// travel with it. It refuses a certificate with another key, and keys this package does not sign with.
func NewTemplate(signer Signer, certificates [][]byte, profile Profile) (*Template, error) {
	if len(certificates) == 0 || len(certificates) > maxCertificates {
		return nil, errors.New("cms: signer without certificate, or with too many")
	}
	suite, err := suiteOf(signer.Public())
	if err != nil {
		return nil, fmt.Errorf("cms: %w", err)
	}
	signature, ok := suite.signature[profile]
	if !ok {
		return nil, fmt.Errorf("cms: profile %v with this key: %w", profile, ErrUnsupported)
	}
	t := &Template{
		signer: signer, profile: profile, suite: suite, signature: signature, digests: []AlgorithmIdentifier{suite.digest},
	}
	for i, raw := range certificates {
		cert, err := smx509.ParseCertificate(raw)
		if err != nil || !checkDER(raw, 0) {
			return nil, fmt.Errorf("cms: certificate %d: %v: %w", i, err, ErrMalformed)
		}
		t.certificates = append(t.certificates, cert.Raw)
		if i == 0 {
			t.certificate = cert
		}
	}
	if !samePublicKey(t.certificate.PublicKey, signer.Public()) {
		return nil, errors.New("cms: the signer's certificate is for another key")
	}
	sortSetOf(t.certificates)
	t.certsOnly = (&SignedData{OuterType: OIDSignedData, Version: 1, ContentType: OIDData, certificates: t.certificates}).Bytes()

	var sid cryptobyte.Builder
	sid.AddASN1(der.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddBytes(t.certificate.RawIssuer)
		b.AddASN1BigInt(t.certificate.SerialNumber)
	})
	t.sid = sid.BytesOrPanic()
	signing, err := signingCertificateV2(t.certificate, suite.digest)
	if err != nil {
		return nil, fmt.Errorf("cms: signingCertificateV2: %w", err)
	}
	if t.signingCert, err = signing.encode(); err != nil {
		return nil, err
	}
	if t.protection, err = algorithmProtection(suite.digest, signature).encode(); err != nil {
		return nil, err
	}
	return t, nil
}

// CertsOnly is a message without signers that holds the certificates (RFC 5652 §5.2, RFC 8551 §3.8 "certs-only"): the same
// bytes at the same place each time. Not to be changed.
func (t *Template) CertsOnly() []byte { return t.certsOnly }

// A Signed is a fresh message, to which unsigned attributes may still be added. Not safe for concurrent use.
type Signed struct {
	SignatureValue      []byte // what a signature-time-stamp stamps: DER of SM2Signature, or RSA's plain octets
	SignedAttributesDER []byte // the DER of SET OF Attribute that was signed
	message             SignedData
	signer              SignerInfo // message's only one
	signers             [1]*SignerInfo
}

// AddUnsignedAttribute adds a, for instance OIDSignatureTimeStamp over SignatureValue.
func (s *Signed) AddUnsignedAttribute(a Attribute) error {
	return s.signer.AddUnsignedAttribute(a)
}

// Bytes is the DER of the ContentInfo.
func (s *Signed) Bytes() []byte { return s.message.Bytes() }

// Bare is Bytes without the certificates: the whole of what the signer made.
func (s *Signed) Bare() []byte { return s.message.Bare() }

// Len is how many bytes Bytes answers.
func (s *Signed) Len() int { return s.message.measure().whole }

// Append writes what Bytes answers after b.
func (s *Signed) Append(b []byte) []byte { return s.message.append(b, s.message.measure()) }

// Sign is [Template.Sign] for a single message.
func Sign(ctx context.Context, signer Signer, p Params) (*Signed, error) {
	t, err := NewTemplate(signer, p.Certificates, p.Profile)
	if err != nil {
		return nil, err
	}
	return t.Sign(ctx, p)
}

// Sign makes a SignedData with one signer. The signed attributes are contentType, messageDigest, signingCertificateV2,
// on request CMSAlgorithmProtection, and those of p, which may not repeat a type. There is no signingTime: the time is
// the token's. Errors of the signer are wrapped.
func (t *Template) Sign(ctx context.Context, p Params) (*Signed, error) {
	if (p.Content == nil) == (p.Digest == nil) {
		return nil, errors.New("cms: exactly one of content and digest must be given")
	}
	if len(p.Content) > maxContent {
		return nil, fmt.Errorf("cms: content of %d bytes, at most %d", len(p.Content), maxContent)
	}
	digest := p.Digest
	if p.Content != nil {
		sum := t.suite.sum(p.Content)
		digest = sum[:]
	} else if !p.Detached {
		return nil, errors.New("cms: a digest can only be signed detached")
	}
	if len(digest) != 32 {
		return nil, fmt.Errorf("cms: digest of %d bytes, want 32", len(digest))
	}
	signed := &Signed{message: SignedData{
		OuterType:        OIDSignedData,
		ContentType:      p.ContentType,
		DigestAlgorithms: t.digests,
	}}
	message := &signed.message
	data := OIDData
	if t.profile == GM0010 {
		message.OuterType, data = OIDGMSignedData, OIDGMData
	}
	if message.ContentType == nil {
		message.ContentType = data
	}
	if !p.Detached {
		message.Content = p.Content
	}
	message.Version = message.version()
	if t.profile == GM0010 {
		message.Version = 1
	}
	if !p.OmitCertificates {
		message.certificates = t.certificates
	}
	if len(p.CRLs) > maxCertificates {
		return nil, fmt.Errorf("cms: %d CRLs, at most %d", len(p.CRLs), maxCertificates)
	}
	for i, crl := range p.CRLs {
		if len(crl) == 0 || der.Tag(crl[0]) != der.SEQUENCE || !oneElement(crl) {
			return nil, fmt.Errorf("cms: CRL %d: %w", i, ErrMalformed)
		}
	}
	if len(p.CRLs) > 0 {
		message.CRLs = slices.Clone(p.CRLs)
		sortSetOf(message.CRLs)
	}

	tbs, err := t.signedAttributes(message.ContentType, digest, p)
	if err != nil {
		return nil, err
	}
	signature, err := t.signer.SignMessage(ctx, tbs)
	if err != nil {
		return nil, fmt.Errorf("cms: signing: %w", err)
	}
	if err := t.suite.wellFormed(t.signer.Public(), signature); err != nil {
		return nil, fmt.Errorf("cms: signing: %w", err)
	}
	signed.SignatureValue, signed.SignedAttributesDER = signature, tbs
	signed.signer = SignerInfo{
		Version:            1,
		DigestAlgorithm:    t.suite.digest,
		SignatureAlgorithm: t.signature,
		Signature:          signature,
		sid:                t.sid,
		signedAttrs:        tbs,
	}
	signed.signers[0] = &signed.signer
	message.SignerInfos = signed.signers[:]
	return signed, nil
}

// signedAttributes is the DER of the SET OF Attribute to be signed.
func (t *Template) signedAttributes(contentType asn1.ObjectIdentifier, digest []byte, p Params) ([]byte, error) {
	extra := len(p.SignedAttributes) > 0
	if plain := t.plain.Load(); !extra && plain != nil && plain.protection == p.AlgorithmProtection && plain.contentType.Equal(contentType) {
		out := bytes.Clone(plain.der)
		copy(out[plain.digest:], digest)
		return out, nil
	}
	encoded := make([][]byte, 0, 4+len(p.SignedAttributes))
	encoded = append(encoded, t.signingCert)
	if p.AlgorithmProtection {
		encoded = append(encoded, t.protection)
	}
	var b cryptobyte.Builder
	b.AddASN1(der.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1ObjectIdentifier(OIDContentType)
		b.AddASN1(der.SET, func(b *cryptobyte.Builder) { b.AddASN1ObjectIdentifier(contentType) })
	})
	a, err := b.Bytes()
	if err != nil {
		return nil, fmt.Errorf("cms: content type: %w", err)
	}
	encoded = append(encoded, a)
	b = cryptobyte.Builder{}
	b.AddASN1(der.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1ObjectIdentifier(OIDMessageDigest)
		b.AddASN1(der.SET, func(b *cryptobyte.Builder) { b.AddASN1OctetString(digest) })
	})
	messageDigest := b.BytesOrPanic() // ends with the digest
	encoded = append(encoded, messageDigest)

	for i, more := range p.SignedAttributes {
		for _, oid := range singleValued {
			if more.Type.Equal(oid) {
				return nil, fmt.Errorf("cms: signed attribute %v is not for the caller to set: %w", oid, ErrAttributes)
			}
		}
		for _, other := range p.SignedAttributes[:i] {
			if more.Type.Equal(other.Type) {
				return nil, fmt.Errorf("cms: signed attribute %v twice: %w", more.Type, ErrAttributes)
			}
		}
		a, err := more.encode()
		if err != nil {
			return nil, err
		}
		encoded = append(encoded, a)
	}
	sortSetOf(encoded)
	n := sizeAll(encoded)
	out := appendHeader(make([]byte, 0, size(n)), der.SET, n)
	at := 0
	for _, e := range encoded {
		if out = append(out, e...); &e[0] == &messageDigest[0] {
			at = len(out) - len(digest)
		}
	}
	if !extra {
		t.plain.Store(&plainAttributes{slices.Clone(contentType), p.AlgorithmProtection, bytes.Clone(out), at})
	}
	return out, nil
}

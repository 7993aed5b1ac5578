package cms

import (
	"bytes"
	"encoding/asn1"
	"fmt"
	"math/big"

	"github.com/emmansun/gmsm/smx509"
	"golang.org/x/crypto/cryptobyte"
	der "golang.org/x/crypto/cryptobyte/asn1"
)

// Limits on what one message may hold. Ours have one signer and a chain of two or three; a document signed by a whole
// ward round stays far below.
const (
	maxSigners      = 64
	maxCertificates = 64
)

// A SignedData is RFC 5652 §5.1's, inside its ContentInfo. Its fields are to be read; only AddUnsignedAttribute of its
// signers changes what Bytes answers. Safe for concurrent reading.
type SignedData struct {
	OuterType        asn1.ObjectIdentifier // ContentInfo's: OIDSignedData or OIDGMSignedData
	Version          int                   // CMSVersion
	DigestAlgorithms []AlgorithmIdentifier
	ContentType      asn1.ObjectIdentifier // eContentType
	Content          []byte                // eContent; nil (not empty) when detached
	Certificates     []*smx509.Certificate // in the message's order, which is DER's, not a chain's
	CRLs             [][]byte              // DER of CertificateList
	SignerInfos      []*SignerInfo

	certificates [][]byte
}

// A SignerInfo is RFC 5652 §5.3's.
type SignerInfo struct {
	Version            int
	Issuer             []byte   // DER of the issuer's Name; nil when SubjectKeyID identifies the signer
	SerialNumber       *big.Int // nil like Issuer
	SubjectKeyID       []byte   // nil when issuer and serial number identify the signer
	DigestAlgorithm    AlgorithmIdentifier
	SignedAttributes   []Attribute // nil when absent
	SignatureAlgorithm AlgorithmIdentifier
	Signature          []byte
	UnsignedAttributes []Attribute // nil when absent

	sid         []byte // DER of SignerIdentifier
	signedAttrs []byte // DER, tagged SET as it is signed; nil when absent
	unsigned    [][]byte
}

// SignedAttributesDER is what the signature covers: the DER of the SET OF Attribute (RFC 5652 §5.4), nil when absent.
func (si *SignerInfo) SignedAttributesDER() []byte { return si.signedAttrs }

// Attribute answers the only value of the signed attribute of this type, and whether there is exactly one.
func (si *SignerInfo) Attribute(oid asn1.ObjectIdentifier) ([]byte, bool) {
	values := valuesOf(si.SignedAttributes, oid)
	if len(values) != 1 {
		return nil, false
	}
	return values[0], true
}

// TimeStampTokens answers the values of the signature-time-stamp attributes (RFC 3161, appendix A), each a DER
// ContentInfo. Nothing about them is checked: they are unsigned, and what they stamp is Signature.
func (si *SignerInfo) TimeStampTokens() [][]byte {
	return valuesOf(si.UnsignedAttributes, OIDSignatureTimeStamp)
}

func valuesOf(attributes []Attribute, oid asn1.ObjectIdentifier) (values [][]byte) {
	for _, a := range attributes {
		if a.Type.Equal(oid) {
			values = append(values, a.Values...)
		}
	}
	return values
}

// AddUnsignedAttribute adds a, for instance a timestamp token over Signature. Not safe for concurrent use.
func (si *SignerInfo) AddUnsignedAttribute(a Attribute) error {
	encoded, err := a.encode()
	if err != nil {
		return err
	}
	si.unsigned = append(si.unsigned, encoded)
	sortSetOf(si.unsigned)
	si.UnsignedAttributes = append(si.UnsignedAttributes, a)
	return nil
}

// Parse reads the DER of a ContentInfo with SignedData. Errors wrap ErrMalformed or ErrUnsupported. Nothing is verified,
// and der is not kept.
func Parse(in []byte) (*SignedData, error) {
	sd, err := parse(bytes.Clone(in)) // the fields below are slices of it
	if err != nil {
		return nil, fmt.Errorf("cms: %w", err)
	}
	return sd, nil
}

func parse(in []byte) (*SignedData, error) {
	if !checkDER(in, 0) {
		return nil, fmt.Errorf("not DER: %w", ErrMalformed)
	}

	// ContentInfo ::= SEQUENCE { contentType OBJECT IDENTIFIER, content [0] EXPLICIT ANY DEFINED BY contentType }
	s := cryptobyte.String(in)
	var info, explicit, body cryptobyte.String
	sd := new(SignedData)
	if !s.ReadASN1(&info, der.SEQUENCE) || !s.Empty() || !info.ReadASN1ObjectIdentifier(&sd.OuterType) ||
		!info.ReadASN1(&explicit, tagContext0) || !info.Empty() {
		return nil, fmt.Errorf("ContentInfo: %w", ErrMalformed)
	}
	if !sd.OuterType.Equal(OIDSignedData) && !sd.OuterType.Equal(OIDGMSignedData) {
		return nil, fmt.Errorf("content type %v: %w", sd.OuterType, ErrUnsupported)
	}

	// SignedData ::= SEQUENCE { version, digestAlgorithms SET OF, encapContentInfo, certificates [0] IMPLICIT OPTIONAL,
	//   crls [1] IMPLICIT OPTIONAL, signerInfos SET OF }
	var digests, encapsulated, signers cryptobyte.String
	if !explicit.ReadASN1(&body, der.SEQUENCE) || !explicit.Empty() || !body.ReadASN1Integer(&sd.Version) ||
		!body.ReadASN1(&digests, der.SET) || !body.ReadASN1(&encapsulated, der.SEQUENCE) {
		return nil, fmt.Errorf("SignedData: %w", ErrMalformed)
	}
	algorithms, ok := readSetOf(digests)
	if !ok || len(algorithms) > maxSigners {
		return nil, fmt.Errorf("digestAlgorithms: %w", ErrMalformed)
	}
	for _, e := range algorithms {
		var a AlgorithmIdentifier
		element := cryptobyte.String(e)
		if !readAlgorithm(&element, der.SEQUENCE, &a) {
			return nil, fmt.Errorf("digestAlgorithms: %w", ErrMalformed)
		}
		sd.DigestAlgorithms = append(sd.DigestAlgorithms, a)
	}
	if err := sd.parseContent(encapsulated); err != nil {
		return nil, fmt.Errorf("encapContentInfo: %w", err)
	}
	if err := sd.parseCertificates(&body); err != nil {
		return nil, err
	}
	if !body.ReadASN1(&signers, der.SET) || !body.Empty() {
		return nil, fmt.Errorf("signerInfos: %w", ErrMalformed)
	}
	infos, ok := readSetOf(signers)
	if !ok || len(infos) > maxSigners {
		return nil, fmt.Errorf("signerInfos: %w", ErrMalformed)
	}
	for i, e := range infos {
		si, err := parseSignerInfo(e)
		if err != nil {
			return nil, fmt.Errorf("signerInfos[%d]: %w", i, err)
		}
		sd.SignerInfos = append(sd.SignerInfos, si)
	}
	if want := sd.version(); sd.Version != want && !(sd.OuterType.Equal(OIDGMSignedData) && sd.Version == 1) {
		return nil, fmt.Errorf("version %d, want %d: %w", sd.Version, want, ErrMalformed)
	}
	return sd, nil
}

// version is RFC 5652 §5.1's rule for what Parse lets through. GM/T 0010 knows version 1 only.
func (sd *SignedData) version() int {
	if !isData(sd.ContentType) {
		return 3
	}
	for _, si := range sd.SignerInfos {
		if si.Version == 3 {
			return 3
		}
	}
	return 1
}

func isData(oid asn1.ObjectIdentifier) bool { return oid.Equal(OIDData) || oid.Equal(OIDGMData) }

func (sd *SignedData) parseContent(s cryptobyte.String) error {
	var explicit, content cryptobyte.String
	if !s.ReadASN1ObjectIdentifier(&sd.ContentType) {
		return ErrMalformed
	}
	if s.Empty() {
		return nil
	}
	if !s.ReadASN1(&explicit, tagContext0) || !s.Empty() || !explicit.ReadASN1(&content, der.OCTET_STRING) || !explicit.Empty() {
		return ErrMalformed
	}
	sd.Content = content
	if sd.Content == nil {
		sd.Content = []byte{}
	}
	return nil
}

func (sd *SignedData) parseCertificates(s *cryptobyte.String) error {
	var certificates, crls cryptobyte.String
	var hasCertificates, hasCRLs, ok bool
	if !s.ReadOptionalASN1(&certificates, &hasCertificates, tagContext0) || !s.ReadOptionalASN1(&crls, &hasCRLs, tagContext1) {
		return fmt.Errorf("certificates or crls: %w", ErrMalformed)
	}
	if hasCertificates {
		sd.certificates, ok = readSetOf(certificates)
		if !ok || len(sd.certificates) == 0 || len(sd.certificates) > maxCertificates {
			return fmt.Errorf("certificates are empty, too many or not in DER order: %w", ErrMalformed)
		}
	}
	for i, e := range sd.certificates {
		if der.Tag(e[0]) != der.SEQUENCE { // attribute certificates and other CertificateChoices
			return fmt.Errorf("certificates[%d]: tag %#x: %w", i, e[0], ErrUnsupported)
		}
		cert, err := smx509.ParseCertificate(e)
		if err != nil {
			return fmt.Errorf("certificates[%d]: %v: %w", i, err, ErrMalformed)
		}
		sd.Certificates = append(sd.Certificates, cert)
	}
	if hasCRLs {
		if sd.CRLs, ok = readSetOf(crls); !ok || len(sd.CRLs) == 0 || len(sd.CRLs) > maxCertificates {
			return fmt.Errorf("crls are empty, too many or not in DER order: %w", ErrMalformed)
		}
	}
	for i, e := range sd.CRLs {
		if der.Tag(e[0]) != der.SEQUENCE { // OtherRevocationInfoFormat
			return fmt.Errorf("crls[%d]: tag %#x: %w", i, e[0], ErrUnsupported)
		}
	}
	return nil
}

func parseSignerInfo(in []byte) (*SignerInfo, error) {
	// SignerInfo ::= SEQUENCE { version, sid, digestAlgorithm, signedAttrs [0] IMPLICIT OPTIONAL, signatureAlgorithm,
	//   signature OCTET STRING, unsignedAttrs [1] IMPLICIT OPTIONAL }
	element := cryptobyte.String(in)
	var s, sid cryptobyte.String
	si := new(SignerInfo)
	if !element.ReadASN1(&s, der.SEQUENCE) || !s.ReadASN1Integer(&si.Version) {
		return nil, ErrMalformed
	}
	wantVersion := 1
	if s.PeekASN1Tag(tagImplicit0) { // subjectKeyIdentifier [0] IMPLICIT OCTET STRING
		wantVersion = 3
		if !s.ReadASN1Element(&sid, tagImplicit0) {
			return nil, fmt.Errorf("sid: %w", ErrMalformed)
		}
		si.sid = sid
		var id cryptobyte.String
		if !sid.ReadASN1(&id, tagImplicit0) || id.Empty() {
			return nil, fmt.Errorf("sid: %w", ErrMalformed)
		}
		si.SubjectKeyID = id
	} else {
		var body, issuer cryptobyte.String
		si.SerialNumber = new(big.Int)
		if !s.ReadASN1Element(&sid, der.SEQUENCE) {
			return nil, fmt.Errorf("sid: %w", ErrMalformed)
		}
		si.sid = sid
		if !sid.ReadASN1(&body, der.SEQUENCE) || !body.ReadASN1Element(&issuer, der.SEQUENCE) ||
			!body.ReadASN1Integer(si.SerialNumber) || !body.Empty() {
			return nil, fmt.Errorf("sid: %w", ErrMalformed)
		}
		si.Issuer = issuer
	}
	if si.Version != wantVersion {
		return nil, fmt.Errorf("version %d, want %d: %w", si.Version, wantVersion, ErrMalformed)
	}
	if !readAlgorithm(&s, der.SEQUENCE, &si.DigestAlgorithm) {
		return nil, fmt.Errorf("digestAlgorithm: %w", ErrMalformed)
	}
	var err error
	if s.PeekASN1Tag(tagContext0) {
		var whole, body cryptobyte.String
		if !s.ReadASN1Element(&whole, tagContext0) {
			return nil, fmt.Errorf("signedAttrs: %w", ErrMalformed)
		}
		si.signedAttrs = bytes.Clone(whole)
		si.signedAttrs[0] = byte(der.SET) // RFC 5652 §5.4: the DER of SET OF is signed, not the [0] tag
		whole.ReadASN1(&body, tagContext0)
		if si.SignedAttributes, err = parseAttributes(body); err != nil {
			return nil, fmt.Errorf("signedAttrs: %w", err)
		}
	}
	var signature cryptobyte.String
	if !readAlgorithm(&s, der.SEQUENCE, &si.SignatureAlgorithm) || !s.ReadASN1(&signature, der.OCTET_STRING) || signature.Empty() {
		return nil, fmt.Errorf("signature: %w", ErrMalformed)
	}
	si.Signature = signature
	if s.Empty() {
		return si, nil
	}
	var unsigned cryptobyte.String
	if !s.ReadASN1(&unsigned, tagContext1) || !s.Empty() {
		return nil, fmt.Errorf("unsignedAttrs: %w", ErrMalformed)
	}
	if si.UnsignedAttributes, err = parseAttributes(unsigned); err != nil {
		return nil, fmt.Errorf("unsignedAttrs: %w", err)
	}
	si.unsigned, _ = readSetOf(unsigned)
	return si, nil
}

// Bytes encodes the message in DER. What Parse has read comes out as it went in.
func (sd *SignedData) Bytes() []byte {
	size := 1024 + len(sd.Content)
	for _, e := range sd.certificates {
		size += len(e)
	}
	b := cryptobyte.NewBuilder(make([]byte, 0, size))
	b.AddASN1(der.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1ObjectIdentifier(sd.OuterType)
		b.AddASN1(tagContext0, func(b *cryptobyte.Builder) {
			b.AddASN1(der.SEQUENCE, sd.encode)
		})
	})
	return b.BytesOrPanic() // every part was parsed or checked, and Sign bounds the content: nothing can fail
}

// WithContent is the same message with content inside it, or detached for nil. What was signed does not change; whether
// the content is what was signed is for Verify. At most 1 GiB.
func (sd *SignedData) WithContent(content []byte) (*SignedData, error) {
	if len(content) > maxContent {
		return nil, fmt.Errorf("cms: content of %d bytes, at most %d", len(content), maxContent)
	}
	other := *sd
	other.Content = content
	return &other, nil
}

func (sd *SignedData) encode(b *cryptobyte.Builder) {
	b.AddASN1Int64(int64(sd.Version))
	b.AddASN1(der.SET, func(b *cryptobyte.Builder) {
		for _, a := range sd.DigestAlgorithms {
			b.AddBytes(a.raw)
		}
	})
	b.AddASN1(der.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1ObjectIdentifier(sd.ContentType)
		if sd.Content != nil {
			b.AddASN1(tagContext0, func(b *cryptobyte.Builder) { b.AddASN1OctetString(sd.Content) })
		}
	})
	if len(sd.certificates) > 0 {
		b.AddASN1(tagContext0, func(b *cryptobyte.Builder) { addAll(b, sd.certificates) })
	}
	if len(sd.CRLs) > 0 {
		b.AddASN1(tagContext1, func(b *cryptobyte.Builder) { addAll(b, sd.CRLs) })
	}
	b.AddASN1(der.SET, func(b *cryptobyte.Builder) {
		if len(sd.SignerInfos) == 1 {
			b.AddASN1(der.SEQUENCE, sd.SignerInfos[0].encode)
			return
		}
		encoded := make([][]byte, 0, len(sd.SignerInfos))
		for _, si := range sd.SignerInfos {
			var one cryptobyte.Builder
			one.AddASN1(der.SEQUENCE, si.encode)
			encoded = append(encoded, one.BytesOrPanic())
		}
		sortSetOf(encoded) // an added attribute may have changed the order
		addAll(b, encoded)
	})
}

func (si *SignerInfo) encode(b *cryptobyte.Builder) {
	b.AddASN1Int64(int64(si.Version))
	b.AddBytes(si.sid)
	b.AddBytes(si.DigestAlgorithm.raw)
	if si.signedAttrs != nil {
		b.AddUint8(byte(tagContext0))
		b.AddBytes(si.signedAttrs[1:])
	}
	b.AddBytes(si.SignatureAlgorithm.raw)
	b.AddASN1OctetString(si.Signature)
	if len(si.unsigned) > 0 {
		b.AddASN1(tagContext1, func(b *cryptobyte.Builder) { addAll(b, si.unsigned) })
	}
}

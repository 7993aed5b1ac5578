package cms

import (
	"bytes"
	"encoding/asn1"
	"fmt"
	"math/big"
	"slices"

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
	Certificates     []*smx509.Certificate // in the message's order, which is no chain's
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
// and in is not kept. A certificate that is one of known, byte for byte, is not parsed again.
func Parse(in []byte, known ...*smx509.Certificate) (*SignedData, error) {
	sd, err := parse(bytes.Clone(in), known) // the fields below are slices of it
	if err != nil {
		return nil, fmt.Errorf("cms: %w", err)
	}
	return sd, nil
}

func parse(in []byte, known []*smx509.Certificate) (*SignedData, error) {
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
	if err := sd.parseCertificates(&body, known); err != nil {
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

func (sd *SignedData) parseCertificates(s *cryptobyte.String, known []*smx509.Certificate) error {
	var certificates, crls cryptobyte.String
	var hasCertificates, hasCRLs, ok bool
	if !s.ReadOptionalASN1(&certificates, &hasCertificates, tagContext0) || !s.ReadOptionalASN1(&crls, &hasCRLs, tagContext1) {
		return fmt.Errorf("certificates or crls: %w", ErrMalformed)
	}
	// These two are not signed, and OpenSSL's ts (3.0) and gmsm's pkcs7 (v0.44.0) leave them in the order they came in: so
	// they are kept.
	if hasCertificates {
		sd.certificates, ok = readElements(certificates)
		if !ok || len(sd.certificates) == 0 || len(sd.certificates) > maxCertificates {
			return fmt.Errorf("certificates are empty, too many or broken: %w", ErrMalformed)
		}
	}
	for i, e := range sd.certificates {
		if der.Tag(e[0]) != der.SEQUENCE { // attribute certificates and other CertificateChoices
			return fmt.Errorf("certificates[%d]: tag %#x: %w", i, e[0], ErrUnsupported)
		}
		if at := slices.IndexFunc(known, func(k *smx509.Certificate) bool { return k != nil && bytes.Equal(k.Raw, e) }); at >= 0 {
			sd.Certificates = append(sd.Certificates, known[at])
			continue
		}
		cert, err := smx509.ParseCertificate(e)
		if err != nil {
			return fmt.Errorf("certificates[%d]: %v: %w", i, err, ErrMalformed)
		}
		sd.Certificates = append(sd.Certificates, cert)
	}
	if hasCRLs {
		if sd.CRLs, ok = readElements(crls); !ok || len(sd.CRLs) == 0 || len(sd.CRLs) > maxCertificates {
			return fmt.Errorf("crls are empty, too many or broken: %w", ErrMalformed)
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
	l := sd.measure()
	return sd.append(make([]byte, 0, l.whole), l)
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

// Bare is Bytes without the certificates, which nothing signs and anybody may exchange.
func (sd *SignedData) Bare() []byte {
	bare := *sd
	bare.certificates = nil
	return bare.Bytes()
}

// A layout holds the lengths of a message's elements, content octets unless said otherwise: DER writes each before what it
// measures, so that they are counted first and every octet is then written once.
type layout struct {
	digests, encapsulated       int
	certificates, crls          int
	signers, signer             int      // signer: of the only one
	several                     [][]byte // several signers, whole, in SET OF order
	body, explicit, info, whole int      // of SignedData, [0] and ContentInfo; the last with its header
}

func (sd *SignedData) measure() (l layout) {
	for _, a := range sd.DigestAlgorithms {
		l.digests += len(a.raw)
	}
	l.encapsulated = sizeOID(sd.ContentType)
	if sd.Content != nil {
		l.encapsulated += size(size(len(sd.Content)))
	}
	l.body = 3 + size(l.digests) + size(l.encapsulated)
	if l.certificates = sizeAll(sd.certificates); l.certificates > 0 {
		l.body += size(l.certificates)
	}
	if l.crls = sizeAll(sd.CRLs); l.crls > 0 {
		l.body += size(l.crls)
	}
	if len(sd.SignerInfos) == 1 {
		l.signer = sd.SignerInfos[0].measure()
		l.signers = size(l.signer)
	} else {
		for _, si := range sd.SignerInfos {
			n := si.measure()
			l.several = append(l.several, si.append(make([]byte, 0, size(n)), n))
		}
		sortSetOf(l.several) // an added attribute may have changed the order
		l.signers = sizeAll(l.several)
	}
	l.body += size(l.signers)
	l.explicit = size(l.body)
	l.info = sizeOID(sd.OuterType) + size(l.explicit)
	l.whole = size(l.info)
	return l
}

func (sd *SignedData) append(b []byte, l layout) []byte {
	b = appendOID(appendHeader(b, der.SEQUENCE, l.info), sd.OuterType)
	b = appendHeader(b, tagContext0, l.explicit)
	b = appendHeader(b, der.SEQUENCE, l.body)
	b = append(b, byte(der.INTEGER), 1, byte(sd.Version))
	b = appendHeader(b, der.SET, l.digests)
	for _, a := range sd.DigestAlgorithms {
		b = append(b, a.raw...)
	}
	b = appendOID(appendHeader(b, der.SEQUENCE, l.encapsulated), sd.ContentType)
	if sd.Content != nil {
		b = appendHeader(b, tagContext0, size(len(sd.Content)))
		b = appendElement(b, der.OCTET_STRING, sd.Content)
	}
	if l.certificates > 0 {
		b = appendAll(appendHeader(b, tagContext0, l.certificates), sd.certificates)
	}
	if l.crls > 0 {
		b = appendAll(appendHeader(b, tagContext1, l.crls), sd.CRLs)
	}
	b = appendHeader(b, der.SET, l.signers)
	if len(sd.SignerInfos) == 1 {
		return sd.SignerInfos[0].append(b, l.signer)
	}
	return appendAll(b, l.several)
}

// measure counts the content octets.
func (si *SignerInfo) measure() int {
	n := 3 + len(si.sid) + len(si.DigestAlgorithm.raw) + len(si.signedAttrs) + len(si.SignatureAlgorithm.raw) + size(len(si.Signature))
	if unsigned := sizeAll(si.unsigned); unsigned > 0 {
		n += size(unsigned)
	}
	return n
}

func (si *SignerInfo) append(b []byte, content int) []byte {
	b = appendHeader(b, der.SEQUENCE, content)
	b = append(b, byte(der.INTEGER), 1, byte(si.Version))
	b = append(b, si.sid...)
	b = append(b, si.DigestAlgorithm.raw...)
	if si.signedAttrs != nil {
		b = append(b, byte(tagContext0))
		b = append(b, si.signedAttrs[1:]...)
	}
	b = append(b, si.SignatureAlgorithm.raw...)
	b = appendElement(b, der.OCTET_STRING, si.Signature)
	if unsigned := sizeAll(si.unsigned); unsigned > 0 {
		b = appendAll(appendHeader(b, tagContext1, unsigned), si.unsigned)
	}
	return b
}

package cms

import (
	"bytes"
	"encoding/asn1"
	"errors"
	"fmt"

	"github.com/emmansun/gmsm/smx509"
	"golang.org/x/crypto/cryptobyte"
	der "golang.org/x/crypto/cryptobyte/asn1"
)

// A Result is the outcome of one check.
type Result string

const (
	Passed     Result = "passed"
	Failed     Result = "failed"
	NotPresent Result = "not-present" // what the check looks at is optional and absent
	NotChecked Result = "not-checked" // an earlier failure left nothing to look at
)

// The checks of [SignedData.Verify], in their order. The identifiers are stable: reports, evidence and tests repeat them.
const (
	CheckSigner              = "cms.signer"               // exactly one SignerInfo
	CheckSignerCertificate   = "cms.signer-certificate"   // found by the signer's identifier, key of a known kind
	CheckAlgorithms          = "cms.algorithms"           // digest and signature algorithm known, listed, and fit the key
	CheckContent             = "cms.content"              // at hand, and the same as the one given
	CheckSignedAttributes    = "cms.signed-attributes"    // present, each once; or absent where that is harmless
	CheckContentType         = "cms.content-type"         // RFC 5652 §11.1
	CheckMessageDigest       = "cms.message-digest"       // RFC 5652 §11.2
	CheckSigningCertificate  = "cms.signing-certificate"  // RFC 5035 §3, RFC 5816
	CheckAlgorithmProtection = "cms.algorithm-protection" // RFC 6211
	CheckSignature           = "cms.signature"            // RFC 5652 §5.6
)

// A Check is one line of a report.
type Check struct {
	ID     string
	Result Result
	Err    error // why it failed, nil otherwise
}

// A CheckError is the first failed check of a report.
type CheckError struct {
	ID  string
	Err error
}

func (e *CheckError) Error() string { return e.ID + ": " + e.Err.Error() }

// Unwrap is for errors.Is with this package's sentinels.
func (e *CheckError) Unwrap() error { return e.Err }

// A Report is what verification found: every check, whatever its outcome.
type Report struct {
	Signer        *smx509.Certificate // nil when not found
	ContentDigest []byte              // by the signer's digest algorithm; nil when the content was missing
	Checks        []Check
}

// Add appends a check of the caller's; nil passes, ErrNotPresent and ErrNotChecked stand for themselves, anything else
// fails. It reports whether the check passed.
func (r *Report) Add(id string, err error) bool {
	c := Check{ID: id, Result: Passed}
	switch {
	case errors.Is(err, ErrNotPresent):
		c.Result = NotPresent
	case errors.Is(err, ErrNotChecked):
		c.Result = NotChecked
	case err != nil:
		c.Result, c.Err = Failed, err
	}
	r.Checks = append(r.Checks, c)
	return err == nil
}

// Result answers the outcome of the check, NotChecked for one that was never made.
func (r *Report) Result(id string) Result {
	for _, c := range r.Checks {
		if c.ID == id {
			return c.Result
		}
	}
	return NotChecked
}

// Err is a *CheckError for the first failed check, nil when none failed.
func (r *Report) Err() error {
	for _, c := range r.Checks {
		if c.Result == Failed {
			return &CheckError{ID: c.ID, Err: c.Err}
		}
	}
	return nil
}

// For [Report.Add] only.
var (
	ErrNotPresent = errors.New("not present")
	ErrNotChecked = errors.New("not checked")
)

// Verify checks the message, which must have exactly one signer, against content: nil for the content inside the
// message; for a detached message it is required (empty is not nil). If both are there they must be equal. The signer's
// certificate is looked for in the message and among extra.
//
// The report is never nil and lists every check; the error is a *CheckError for the first that failed. Verify does not
// judge the certificate: neither chain, nor validity, nor purpose, nor revocation. Safe for concurrent use.
func (sd *SignedData) Verify(content []byte, extra ...*smx509.Certificate) (*Report, error) {
	return sd.verify(content, nil, extra)
}

// VerifyDigest is [SignedData.Verify] for whoever has only the content's digest by the signer's digest algorithm (SM3 or
// SHA-256). A message without signed attributes cannot be verified so.
func (sd *SignedData) VerifyDigest(digest []byte, extra ...*smx509.Certificate) (*Report, error) {
	if digest == nil {
		digest = []byte{}
	}
	return sd.verify(nil, digest, extra)
}

func (sd *SignedData) verify(content, digest []byte, extra []*smx509.Certificate) (*Report, error) {
	r := new(Report)
	if len(sd.SignerInfos) != 1 {
		r.Add(CheckSigner, fmt.Errorf("%d signers: %w", len(sd.SignerInfos), ErrSigners))
		return r, r.Err()
	}
	r.Add(CheckSigner, nil)
	si := sd.SignerInfos[0]

	// 1. Whose signature, and made how.
	var s *suite
	cert, err := sd.signerCertificate(si, extra)
	if err == nil {
		r.Signer = cert
		s, err = suiteOf(cert.PublicKey)
	}
	if !r.Add(CheckSignerCertificate, err) {
		return r, r.Err()
	}
	err = s.accepts(sd.OuterType, si.DigestAlgorithm, si.SignatureAlgorithm)
	if err == nil && !sd.lists(si.DigestAlgorithm) {
		err = fmt.Errorf("digestAlgorithm %v is not among digestAlgorithms: %w", si.DigestAlgorithm.OID, ErrMalformed)
	}
	if !r.Add(CheckAlgorithms, err) {
		return r, r.Err()
	}

	// 2. Over which content.
	switch {
	case sd.Content != nil && content != nil && !bytes.Equal(sd.Content, content):
		err = ErrContentMismatch
	case sd.Content != nil:
		content = sd.Content
	case content == nil && digest == nil:
		err = ErrNoContent
	}
	if content != nil {
		of := s.sum(content)
		r.ContentDigest = of[:]
		if err == nil && digest != nil && !bytes.Equal(digest, r.ContentDigest) {
			err = ErrContentMismatch
		}
	} else {
		r.ContentDigest = digest
	}
	r.Add(CheckContent, err)

	// 3. The attributes, and what they say.
	if si.signedAttrs == nil {
		err = sd.withoutAttributes(content)
		r.Add(CheckSignedAttributes, err)
		for _, id := range []string{CheckContentType, CheckMessageDigest, CheckSigningCertificate, CheckAlgorithmProtection} {
			r.Add(id, ErrNotPresent)
		}
		if content == nil {
			err = ErrNotChecked
		} else {
			err = s.verify(cert.PublicKey, content, si.Signature)
		}
		r.Add(CheckSignature, err)
		return r, r.Err()
	}
	r.Add(CheckSignedAttributes, si.attributesOnce())
	r.Add(CheckContentType, si.checkContentType(sd.ContentType))
	r.Add(CheckMessageDigest, si.checkMessageDigest(r.ContentDigest))
	r.Add(CheckSigningCertificate, si.checkSigningCertificate(cert))
	if value, ok := si.Attribute(OIDAlgorithmProtection); ok {
		err = protects(value, si.DigestAlgorithm, si.SignatureAlgorithm)
	} else {
		err = ErrNotPresent
	}
	r.Add(CheckAlgorithmProtection, err)

	// 4. The signature itself.
	r.Add(CheckSignature, s.verify(cert.PublicKey, si.signedAttrs, si.Signature))
	return r, r.Err()
}

// signerCertificate finds the certificate that the signer's identifier names. A key identifier may name several
// certificates of one key; then the signing-certificate attribute decides. The same certificate twice is no conflict.
func (sd *SignedData) signerCertificate(si *SignerInfo, extra []*smx509.Certificate) (*smx509.Certificate, error) {
	var found []*smx509.Certificate
	for _, candidates := range [][]*smx509.Certificate{sd.Certificates, extra} {
		for _, c := range candidates {
			if c == nil || !si.names(c) || len(found) > 0 && contains(found, c) {
				continue
			}
			found = append(found, c)
		}
	}
	if len(found) > 1 {
		kept := found[:0]
		for _, c := range found {
			if si.checkSigningCertificate(c) == nil {
				kept = append(kept, c)
			}
		}
		found = kept
	}
	if len(found) != 1 {
		return nil, fmt.Errorf("%d candidates: %w", len(found), ErrSignerCertificate)
	}
	return found[0], nil
}

func contains(certs []*smx509.Certificate, cert *smx509.Certificate) bool {
	for _, c := range certs {
		if bytes.Equal(c.Raw, cert.Raw) {
			return true
		}
	}
	return false
}

func (si *SignerInfo) names(c *smx509.Certificate) bool {
	if si.SubjectKeyID != nil {
		return bytes.Equal(si.SubjectKeyID, c.SubjectKeyId)
	}
	return bytes.Equal(si.Issuer, c.RawIssuer) && si.SerialNumber.Cmp(c.SerialNumber) == 0
}

func (sd *SignedData) lists(digest AlgorithmIdentifier) bool {
	for _, a := range sd.DigestAlgorithms {
		if a.same(digest) {
			return true
		}
	}
	return false
}

// withoutAttributes decides whether signed attributes may be absent: for plain data only (RFC 5652 §5.3), and only if the
// content cannot be a set of attributes that somebody has made into the content of another message.
func (sd *SignedData) withoutAttributes(content []byte) error {
	switch {
	case !isData(sd.ContentType):
		return fmt.Errorf("absent with content of type %v: %w", sd.ContentType, ErrAttributes)
	case content == nil:
		return fmt.Errorf("absent, so the content itself is needed: %w", ErrAttributes)
	case LooksLikeAttributes(content):
		return ErrAmbiguousContent
	}
	return ErrNotPresent
}

// attributesOnce refuses repeated types, which verifiers resolve differently, and several values where one is due.
func (si *SignerInfo) attributesOnce() error {
	for i, a := range si.SignedAttributes {
		for _, b := range si.SignedAttributes[:i] {
			if a.Type.Equal(b.Type) {
				return fmt.Errorf("%v twice: %w", a.Type, ErrAttributes)
			}
		}
		for _, oid := range singleValued {
			if a.Type.Equal(oid) && len(a.Values) != 1 {
				return fmt.Errorf("%v with %d values: %w", a.Type, len(a.Values), ErrAttributes)
			}
		}
	}
	return nil
}

func (si *SignerInfo) checkContentType(want asn1.ObjectIdentifier) error {
	value, ok := si.Attribute(OIDContentType)
	if !ok {
		return fmt.Errorf("contentType: not exactly one: %w", ErrAttributes)
	}
	s := cryptobyte.String(value)
	var got asn1.ObjectIdentifier
	if !s.ReadASN1ObjectIdentifier(&got) || !s.Empty() {
		return ErrMalformed
	}
	if !got.Equal(want) {
		return fmt.Errorf("attribute %v, eContentType %v: %w", got, want, ErrContentType)
	}
	return nil
}

func (si *SignerInfo) checkMessageDigest(want []byte) error {
	value, ok := si.Attribute(OIDMessageDigest)
	if !ok {
		return fmt.Errorf("messageDigest: not exactly one: %w", ErrAttributes)
	}
	s := cryptobyte.String(value)
	var got cryptobyte.String
	if !s.ReadASN1(&got, der.OCTET_STRING) || !s.Empty() {
		return ErrMalformed
	}
	if want == nil {
		return ErrNotChecked
	}
	if !bytes.Equal(got, want) {
		return ErrMessageDigest
	}
	return nil
}

// checkSigningCertificate accepts the attribute of RFC 5035 and the older one of RFC 2634, which other timestamp
// authorities still write; where both are present both must fit.
func (si *SignerInfo) checkSigningCertificate(cert *smx509.Certificate) error {
	err := ErrNotPresent
	for _, oid := range []asn1.ObjectIdentifier{OIDSigningCertificateV2, OIDSigningCertificate} {
		if value, ok := si.Attribute(oid); ok {
			if err = namesCertificate(value, oid.Equal(OIDSigningCertificateV2), cert); err != nil {
				return err
			}
		}
	}
	return err
}

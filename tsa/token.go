package tsa

import (
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"time"

	"github.com/emmansun/gmsm/smx509"

	"yinjian/appliance/cms"
	"yinjian/ntp"
)

// A Token is a TimeStampToken with what its TSTInfo says.
type Token struct {
	DER        []byte // ContentInfo
	Serial     *big.Int
	GenTime    time.Time     // UTC; tokens of ours have milliseconds
	Accuracy   time.Duration // |true time − GenTime| at most; 0 when the token does not say
	Policy     asn1.ObjectIdentifier
	Imprint    Imprint
	Nonce      *big.Int // nil: none
	Ordering   bool
	Provenance ntp.Reading // of a token just issued; zero in a parsed one, to which it does not belong
	Origin     Origin      // likewise; zero where only one unit could have made it

	response  []byte          // of a token just issued: the TimeStampResp that grants it, whose end DER is
	signed    *cms.Signed     // of a token just issued with certificates
	certsOnly []byte          // likewise: a message of these certificates alone
	message   *cms.SignedData // of a parsed token
}

// An Origin says who made a token that several could have made.
type Origin struct {
	By      string                // "unit/sm2", "upstream/NAME"
	Path    []*smx509.Certificate // the certificate that it is signed under and those above it, the anchor last
	Instead string                // who should have made it, and why not; "" when it was the first asked
}

// The checks that [Token.Verify] adds to those of package cms.
const (
	CheckImprint            = "tsa.imprint"             // the token stamps what it is held against
	CheckSigningCertificate = "tsa.signing-certificate" // the attribute is mandatory in tokens (RFC 3161 §2.4.2)
	CheckPurpose            = "tsa.extended-key-usage"  // critical and timeStamping alone (RFC 3161 §2.3)
	CheckGenTime            = "tsa.gen-time"            // inside the certificate's validity
)

// What the checks fail with; test with errors.Is.
var (
	ErrImprint = errors.New("token stamps something else")
	ErrPurpose = errors.New("certificate is not for timestamping")
	ErrGenTime = errors.New("genTime is outside the certificate's validity")
	ErrNonce   = errors.New("nonce differs from the request's")
	ErrPolicy  = errors.New("policy differs from the request's")
)

// ParseToken reads the DER of a TimeStampToken. Nothing is verified. Under the outer type of GM/T 0010 the content may
// also be called data, as one product on the market does. Certificates among known are not parsed again.
func ParseToken(in []byte, known ...*smx509.Certificate) (*Token, error) {
	message, err := cms.Parse(in, known...)
	if err != nil {
		return nil, fmt.Errorf("tsa: token: %w", err)
	}
	gm := message.OuterType.Equal(cms.OIDGMSignedData) && message.ContentType.Equal(cms.OIDGMData)
	if !message.ContentType.Equal(cms.OIDTSTInfo) && !gm {
		return nil, fmt.Errorf("tsa: token: content type %v, want TSTInfo: %w", message.ContentType, cms.ErrUnsupported)
	}
	if message.Content == nil {
		return nil, fmt.Errorf("tsa: token: %w", cms.ErrNoContent)
	}
	t := &Token{DER: message.Bytes(), message: message}
	if err := t.parseInfo(message.Content); err != nil {
		return nil, err
	}
	return t, nil
}

// Certificates are those in a parsed token, in its order; none when the request did not ask for them.
func (t *Token) Certificates() []*smx509.Certificate {
	if t.message == nil {
		return nil
	}
	return t.message.Certificates
}

// Bare is the token without the certificates that travel with it, and a message of those alone (RFC 5652 §5.2): the same
// bytes at the same place for all tokens of one Authority. These are nil for a token without, and for a parsed one.
func (t *Token) Bare() (token, certificates []byte) {
	switch {
	case t.signed != nil:
		return t.signed.Bare(), t.certsOnly
	case t.message != nil:
		return t.message.Bare(), nil
	}
	return t.DER, nil
}

// Message is the parsed token's CMS, nil for one just issued.
func (t *Token) Message() *cms.SignedData { return t.message }

// Verify checks a token against what it should stamp: the CMS (package cms's checks), the imprint, the signing
// certificate's purpose, and that genTime lies in its validity. The certificate is looked for in the token and among
// extra. Its chain and revocation remain to be checked, for which the report names it.
//
// The report is never nil; the error is a *cms.CheckError for the first check that failed. A token just issued is parsed
// first, so that what is verified is what leaves.
func (t *Token) Verify(imprint Imprint, extra ...*smx509.Certificate) (*cms.Report, error) {
	if t.message == nil {
		parsed, err := ParseToken(t.DER)
		if err != nil {
			return new(cms.Report), err
		}
		return parsed.Verify(imprint, extra...)
	}
	r, _ := t.message.Verify(nil, extra...) // its failures are in r

	var err error
	if !t.Imprint.Equal(imprint) {
		err = ErrImprint
	}
	r.Add(CheckImprint, err)
	switch r.Result(cms.CheckSigningCertificate) {
	case cms.Passed:
		err = nil
	case cms.NotChecked:
		err = cms.ErrNotChecked
	default:
		err = cms.ErrSigningCertificate
	}
	r.Add(CheckSigningCertificate, err)
	if r.Signer == nil {
		r.Add(CheckPurpose, cms.ErrNotChecked)
		r.Add(CheckGenTime, cms.ErrNotChecked)
		return r, r.Err()
	}
	if err = checkPurpose(r.Signer); err != nil {
		err = fmt.Errorf("%w: %v", ErrPurpose, err)
	}
	r.Add(CheckPurpose, err)
	if err = nil; t.GenTime.Before(r.Signer.NotBefore) || t.GenTime.After(r.Signer.NotAfter) {
		err = fmt.Errorf("%w: %v", ErrGenTime, t.GenTime)
	}
	r.Add(CheckGenTime, err)
	return r, r.Err()
}

// VerifyDigest is [Token.Verify] for a digest by algorithm.
func (t *Token) VerifyDigest(algorithm asn1.ObjectIdentifier, digest []byte, extra ...*smx509.Certificate) (*cms.Report, error) {
	return t.Verify(Imprint{Algorithm: algorithm, Digest: digest}, extra...)
}

// VerifyData is [Token.Verify] for the stamped data itself, hashed as the token says.
func (t *Token) VerifyData(data []byte, extra ...*smx509.Certificate) (*cms.Report, error) {
	known := imprintAlgorithmOf(t.Imprint.Algorithm)
	if known == nil {
		return t.Verify(Imprint{}, extra...) // fails on the imprint
	}
	h := known.hash()
	h.Write(data)
	return t.VerifyDigest(t.Imprint.Algorithm, h.Sum(nil), extra...)
}

// Answers checks that the token is for req: imprint, nonce, and the policy if one was asked for (RFC 3161 §2.2).
func (t *Token) Answers(req *Request) error {
	switch {
	case !t.Imprint.Equal(req.Imprint):
		return fmt.Errorf("tsa: %w", ErrImprint)
	case (t.Nonce == nil) != (req.Nonce == nil), t.Nonce != nil && t.Nonce.Cmp(req.Nonce) != 0:
		return fmt.Errorf("tsa: %w", ErrNonce)
	case req.Policy != nil && !req.Policy.Equal(t.Policy):
		return fmt.Errorf("tsa: %w", ErrPolicy)
	}
	return nil
}

// Package cms writes and reads CMS SignedData, the form in which the appliance's signatures and timestamp tokens travel.
//
// It implements RFC 5652 (SignedData only), the signing-certificate attribute of RFC 5035 with RFC 5816's reading of it,
// and the algorithm protection attribute of RFC 6211, for two suites: SM2 with SM3 (GM/T 0003, signer's identity
// 1234567812345678, GM/T 0009-2012 §10; object identifiers as GB/T 33560 gives them) and RSASSA-PKCS1-v1_5 with SHA-256
// (RFC 5754). The outer identifiers of GM/T 0010-2012 are written on request and always read.
//
// The encoding is DER in both directions, SET OF order included: a message that is only BER, or has bytes after its end,
// is refused. That is more than RFC 5652 asks of the unsigned parts. Certificates and CRLs alone may stand in any order.
//
// Verification here ends at the signer's certificate. Chains, revocation and validity at a given time belong to package
// pki, the meaning of a timestamp token to package tsa.
package cms

import (
	"context"
	"crypto"
	"encoding/asn1"
	"errors"
	"fmt"
)

// A Signer holds a private key. *hsm.Key is one.
type Signer interface {
	// Public is *ecdsa.PublicKey on sm2.P256() or *rsa.PublicKey of at least 2048 bits.
	Public() crypto.PublicKey
	// SignMessage signs the message itself, not a digest of it: SM2 over e = SM3(Z ‖ message) with the identity
	// 1234567812345678, answering DER; or RSASSA-PKCS1-v1_5 over its SHA-256.
	SignMessage(ctx context.Context, message []byte) ([]byte, error)
}

// A Profile chooses among the object identifiers that are in use for the same thing. It matters for writing only.
type Profile int

const (
	// RFC5652 writes the outer 1.2.840.113549.1.7.2 and SM2 signatures as 1.2.156.10197.1.501. Bouncy Castle and Tongsuo
	// read it; gmsm's own pkcs7 package (v0.44.0) does not know 501.
	RFC5652 Profile = iota
	// GM0010 writes the outer 1.2.156.10197.6.1.4.2.2, data as 1.2.156.10197.6.1.4.2.1, version 1 and SM2 signatures as
	// 1.2.156.10197.1.301.1 (GM/T 0010-2012, GB/T 35275). SM2 keys only.
	GM0010
)

// String is the profile's name in configuration and logs.
func (p Profile) String() string {
	switch p {
	case RFC5652:
		return "rfc5652"
	case GM0010:
		return "gm0010"
	}
	return fmt.Sprintf("Profile(%d)", int(p))
}

// Object identifiers of content types, attributes and algorithms.
var (
	OIDData       = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 1}
	OIDSignedData = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 2}
	OIDTSTInfo    = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 16, 1, 4}

	OIDGMData       = asn1.ObjectIdentifier{1, 2, 156, 10197, 6, 1, 4, 2, 1}
	OIDGMSignedData = asn1.ObjectIdentifier{1, 2, 156, 10197, 6, 1, 4, 2, 2}

	OIDContentType          = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 3}
	OIDMessageDigest        = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 4}
	OIDSigningTime          = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 5}
	OIDAlgorithmProtection  = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 52}
	OIDSigningCertificate   = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 16, 2, 12}
	OIDSigningCertificateV2 = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 16, 2, 47}
	OIDSignatureTimeStamp   = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 16, 2, 14}

	OIDSM3    = asn1.ObjectIdentifier{1, 2, 156, 10197, 1, 401}
	OIDSHA1   = asn1.ObjectIdentifier{1, 3, 14, 3, 2, 26}
	OIDSHA256 = asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 1}
	OIDSHA384 = asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 2}
	OIDSHA512 = asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 3}

	OIDSM2WithSM3    = asn1.ObjectIdentifier{1, 2, 156, 10197, 1, 501}
	OIDSM2Sign       = asn1.ObjectIdentifier{1, 2, 156, 10197, 1, 301, 1}
	OIDRSA           = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 1}
	OIDSHA256WithRSA = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 11}
)

// What Parse, Sign and the checks of Verify refuse with; test with errors.Is.
var (
	// ErrMalformed means that the bytes are not the DER of a SignedData that RFC 5652 allows.
	ErrMalformed = errors.New("malformed")
	// ErrUnsupported means an algorithm, key or alternative that this package does not know, however well encoded.
	ErrUnsupported = errors.New("unsupported")
	// ErrSigners means that the message has no signer, or several, where one is wanted.
	ErrSigners = errors.New("not exactly one signer")
	// ErrSignerCertificate means that the signer's certificate is not there, or that several could be it.
	ErrSignerCertificate = errors.New("signer certificate not found")
	// ErrNoContent means that the signed content is neither in the message nor given.
	ErrNoContent = errors.New("content missing")
	// ErrContentMismatch means that the message carries another content than the one given.
	ErrContentMismatch = errors.New("content differs from the one given")
	// ErrAttributes means that signed attributes are missing, repeated, or lack a mandatory one.
	ErrAttributes = errors.New("signed attributes")
	// ErrContentType means that the contentType attribute does not repeat eContentType.
	ErrContentType = errors.New("contentType does not match")
	// ErrMessageDigest means that the messageDigest attribute is not the content's digest.
	ErrMessageDigest = errors.New("messageDigest does not match")
	// ErrSigningCertificate means that the signing-certificate attribute names another certificate.
	ErrSigningCertificate = errors.New("signingCertificate does not match")
	// ErrAlgorithmProtection means that the algorithms protected by the signature are not those of the SignerInfo.
	ErrAlgorithmProtection = errors.New("CMSAlgorithmProtection does not match")
	// ErrAmbiguousContent means content that could pass for a set of signed attributes (see [LooksLikeAttributes]).
	ErrAmbiguousContent = errors.New("content looks like signed attributes")
	// ErrBadSignature means that the signature is not the signer's over these bytes.
	ErrBadSignature = errors.New("signature does not verify")
)

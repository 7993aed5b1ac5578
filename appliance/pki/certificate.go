package pki

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	stdasn1 "encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/smx509"
	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"
)

const (
	// MaxCertificateSize bounds one certificate; real ones have 1–3 KiB.
	MaxCertificateSize = 64 << 10
	// MaxPEMSize bounds a file of certificates, MaxPEMCertificates their number.
	MaxPEMSize         = 16 << 20
	MaxPEMCertificates = 1024

	pemCertificate = "CERTIFICATE"
)

// ParseCertificate reads one DER certificate. Beyond smx509 it refuses what the issuer's signature does not cover and
// would let one certificate have several encodings (bytes after the fields, unused bits in the signature), a field or
// extension with bytes left over, and a public key that is not encoded the one usual way (explicit curve parameters
// above all, of which smx509 would ignore the base point). Whether the algorithm is acceptable is for [VerifyPath].
func ParseCertificate(der []byte) (*smx509.Certificate, error) {
	if len(der) > MaxCertificateSize {
		return nil, fmt.Errorf("pki: certificate of %d bytes, at most %d are read", len(der), MaxCertificateSize)
	}
	cert, err := smx509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("pki: certificate: %w", err)
	}
	if err := checkShape(der); err != nil {
		return nil, fmt.Errorf("pki: certificate: %w", err)
	}
	switch cert.PublicKey.(type) {
	case *ecdsa.PublicKey, *rsa.PublicKey:
		spki, err := smx509.MarshalPKIXPublicKey(cert.PublicKey)
		if err != nil {
			return nil, fmt.Errorf("pki: certificate: public key: %w", err)
		}
		if !bytes.Equal(spki, cert.RawSubjectPublicKeyInfo) {
			return nil, errors.New("pki: certificate: public key in an unusual encoding")
		}
	}
	return cert, nil
}

// checkShape walks the outer structure of a certificate that smx509 took, and refuses what smx509 passes over.
func checkShape(der []byte) error {
	in := cryptobyte.String(der)
	var cert, tbs, alg, signature cryptobyte.String
	if !in.ReadASN1(&cert, asn1.SEQUENCE) || !in.Empty() ||
		!cert.ReadASN1(&tbs, asn1.SEQUENCE) || !cert.ReadASN1(&alg, asn1.SEQUENCE) ||
		!cert.ReadASN1(&signature, asn1.BIT_STRING) || !cert.Empty() {
		return errors.New("bytes left over after the signature")
	}
	if err := checkAlgorithm(alg); err != nil {
		return err
	}
	if len(signature) < 2 || signature[0] != 0 {
		return errors.New("signature is not a whole number of bytes")
	}
	var part cryptobyte.String
	ctx := func(n uint8) asn1.Tag { return asn1.Tag(n).ContextSpecific() }
	if !tbs.SkipOptionalASN1(ctx(0).Constructed()) || // version
		!tbs.SkipASN1(asn1.INTEGER) || !tbs.SkipASN1(asn1.SEQUENCE) || // serial, signature algorithm
		!tbs.SkipASN1(asn1.SEQUENCE) || // issuer
		!tbs.ReadASN1(&part, asn1.SEQUENCE) { // validity
		return errors.New("malformed fields")
	}
	for range 2 {
		if !skipTime(&part) {
			return errors.New("malformed validity")
		}
	}
	if !part.Empty() {
		return errors.New("bytes left over in the validity")
	}
	var hasExtensions bool
	if !tbs.SkipASN1(asn1.SEQUENCE) || !tbs.SkipASN1(asn1.SEQUENCE) || // subject, key
		!tbs.SkipOptionalASN1(ctx(1)) || !tbs.SkipOptionalASN1(ctx(2)) ||
		!tbs.ReadOptionalASN1(&part, &hasExtensions, ctx(3).Constructed()) || !tbs.Empty() {
		return errors.New("bytes left over in the signed part")
	}
	if !hasExtensions {
		return nil
	}
	var list cryptobyte.String
	if !part.ReadASN1(&list, asn1.SEQUENCE) || !part.Empty() {
		return errors.New("malformed extensions")
	}
	return checkExtensions(list)
}

func skipTime(s *cryptobyte.String) bool {
	if s.PeekASN1Tag(asn1.UTCTime) {
		return s.SkipASN1(asn1.UTCTime)
	}
	return s.SkipASN1(asn1.GeneralizedTime)
}

// checkAlgorithm refuses an AlgorithmIdentifier with more than one parameter.
func checkAlgorithm(alg cryptobyte.String) error {
	var any cryptobyte.String
	var tag asn1.Tag
	if !alg.SkipASN1(asn1.OBJECT_IDENTIFIER) || !alg.Empty() && !alg.ReadAnyASN1(&any, &tag) || !alg.Empty() {
		return errors.New("malformed signature algorithm")
	}
	return nil
}

// checkExtensions refuses extensions with bytes left over, around the value or, where the value is simple enough to
// tell, inside it.
func checkExtensions(list cryptobyte.String) error {
	seen := make(map[string]bool)
	for !list.Empty() {
		var ext, id, value, inner cryptobyte.String
		if !list.ReadASN1(&ext, asn1.SEQUENCE) || !ext.ReadASN1(&id, asn1.OBJECT_IDENTIFIER) ||
			!ext.SkipOptionalASN1(asn1.BOOLEAN) || !ext.ReadASN1(&value, asn1.OCTET_STRING) || !ext.Empty() {
			return errors.New("malformed extension")
		}
		if seen[string(id)] {
			return errors.New("extension given twice")
		}
		seen[string(id)] = true
		if len(id) != 3 || id[0] != 0x55 || id[1] != 0x1d { // 2.5.29.x
			continue
		}
		var tag asn1.Tag
		if !value.ReadAnyASN1(&inner, &tag) || !value.Empty() {
			return errors.New("bytes left over in an extension")
		}
		switch id[2] {
		case 15: // KeyUsage, a named bit list: at most nine bits, unused ones zero (X.690 §11.2.1)
			if len(inner) < 1 || len(inner) > 3 || inner[0] > 7 || len(inner) == 1 && inner[0] != 0 ||
				len(inner) > 1 && inner[len(inner)-1]&(1<<inner[0]-1) != 0 {
				return errors.New("malformed key usage")
			}
		case 19: // BasicConstraints ::= SEQUENCE { cA BOOLEAN, pathLenConstraint INTEGER }
			if !inner.SkipOptionalASN1(asn1.BOOLEAN) || !inner.SkipOptionalASN1(asn1.INTEGER) || !inner.Empty() {
				return errors.New("malformed basic constraints")
			}
		}
	}
	return nil
}

// ParseCertificatePEMs reads a file of PEM certificates. Words between the blocks are allowed, as OpenSSL writes them;
// a block that cannot be decoded, one of another type or an empty file is an error, so that no certificate is lost
// silently.
func ParseCertificatePEMs(data []byte) ([]*smx509.Certificate, error) {
	blocks, err := pemBlocks(data, pemCertificate)
	if err != nil {
		return nil, err
	}
	certs := make([]*smx509.Certificate, len(blocks))
	for i, b := range blocks {
		if certs[i], err = ParseCertificate(b); err != nil {
			return nil, fmt.Errorf("PEM block %d: %w", i+1, err)
		}
	}
	return certs, nil
}

func pemBlocks(data []byte, kind string) ([][]byte, error) {
	if len(data) > MaxPEMSize {
		return nil, fmt.Errorf("pki: PEM file of %d bytes, at most %d are read", len(data), MaxPEMSize)
	}
	// pem.Decode skips what it cannot read, so the blocks are counted first.
	want := bytes.Count(data, []byte("-----BEGIN"))
	if want == 0 || want > MaxPEMCertificates {
		return nil, fmt.Errorf("pki: %d PEM blocks, want 1 to %d", want, MaxPEMCertificates)
	}
	var out [][]byte
	for {
		var b *pem.Block
		if b, data = pem.Decode(data); b == nil {
			break
		}
		if b.Type != kind || len(b.Headers) != 0 {
			return nil, fmt.Errorf("pki: PEM block %d is %q, want a plain %q", len(out)+1, b.Type, kind)
		}
		out = append(out, b.Bytes)
	}
	if len(out) != want {
		return nil, fmt.Errorf("pki: %d PEM blocks begin, %d can be read", want, len(out))
	}
	return out, nil
}

// EncodeCertificatePEMs is certs as PEM, in order.
func EncodeCertificatePEMs(certs ...*smx509.Certificate) []byte {
	var out []byte
	for _, c := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: pemCertificate, Bytes: c.Raw})...)
	}
	return out
}

// KeyID is the key identifier of RFC 7093 §2 method 1: the leftmost 160 bits of SHA-256 over the subjectPublicKey bits.
func KeyID(pub crypto.PublicKey) ([]byte, error) {
	spki, err := smx509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return nil, fmt.Errorf("pki: key identifier: %w", err)
	}
	var info struct {
		Algorithm stdasn1.RawValue
		Key       stdasn1.BitString
	}
	if _, err := stdasn1.Unmarshal(spki, &info); err != nil {
		return nil, fmt.Errorf("pki: key identifier: %w", err)
	}
	sum := sha256.Sum256(info.Key.Bytes)
	return sum[:20], nil
}

// CheckPublicKey refuses a public key other than SM2 (with *ecdsa.PublicKey on sm2.P256) and RSA of 2048 to 8192 bits
// with an odd exponent of at least 65537.
func CheckPublicKey(pub crypto.PublicKey) error {
	switch pub := pub.(type) {
	case *ecdsa.PublicKey:
		if sm2.IsSM2PublicKey(pub) && pub.Curve.IsOnCurve(pub.X, pub.Y) {
			return nil
		}
		return errors.New("pki: elliptic curve other than SM2")
	case *rsa.PublicKey:
		if n := pub.N.BitLen(); n < 2048 || n > 8192 {
			return fmt.Errorf("pki: RSA key of %d bits, want 2048 to 8192", n)
		}
		if pub.E < 65537 || pub.E&1 == 0 || pub.N.Bit(0) == 0 {
			return errors.New("pki: RSA key with an unsafe exponent or modulus")
		}
		return nil
	default:
		return fmt.Errorf("pki: public key of type %T", pub)
	}
}

// Errors of a signature check; the difference matters because an algorithm that is not implemented says nothing about
// the signature.
var (
	errAlgorithmUnknown  = errors.New("algorithm not supported")
	errAlgorithmInsecure = errors.New("algorithm no longer safe")
	errSignature         = errors.New("signature does not verify")
)

// checkSignature verifies what holder's key signed. Only SM2-with-SM3 (default identity) by an SM2 key and RSA with SHA-2 by an
// RSA key are taken; smx509 alone would also let an SM2-with-SM3 signature be checked on another curve.
func checkSignature(holder *smx509.Certificate, alg smx509.SignatureAlgorithm, signed, signature []byte) error {
	if err := CheckPublicKey(holder.PublicKey); err != nil {
		return fmt.Errorf("%w: %v", errAlgorithmUnknown, err)
	}
	_, isRSA := holder.PublicKey.(*rsa.PublicKey)
	switch alg {
	case smx509.SM2WithSM3:
		if isRSA {
			return fmt.Errorf("%w: SM2 signature, RSA key", errSignature)
		}
	case smx509.SHA256WithRSA, smx509.SHA384WithRSA, smx509.SHA512WithRSA,
		smx509.SHA256WithRSAPSS, smx509.SHA384WithRSAPSS, smx509.SHA512WithRSAPSS:
		if !isRSA {
			return fmt.Errorf("%w: RSA signature, SM2 key", errSignature)
		}
	case smx509.MD2WithRSA, smx509.MD5WithRSA, smx509.SHA1WithRSA, smx509.DSAWithSHA1, smx509.ECDSAWithSHA1:
		return fmt.Errorf("%w: %v", errAlgorithmInsecure, alg)
	default:
		return fmt.Errorf("%w: %v", errAlgorithmUnknown, alg)
	}
	if err := holder.CheckSignature(alg, signed, signature); err != nil {
		return errSignature
	}
	return nil
}

// IsEvaluation reports whether cert was issued under the policy "evaluation only".
func IsEvaluation(cert *smx509.Certificate) bool {
	for _, p := range cert.PolicyIdentifiers {
		if p.Equal(OIDPolicyEvaluation) {
			return true
		}
	}
	return false
}

// SerialHex is a serial number in lower-case hexadecimal, whole bytes.
func SerialHex(serial *big.Int) string {
	if serial == nil {
		return ""
	}
	s := serial.Text(16)
	if len(s)%2 == 1 {
		s = "0" + s
	}
	return s
}

func extension(cert *smx509.Certificate, id stdasn1.ObjectIdentifier) (value []byte, critical, present bool) {
	for _, e := range cert.Extensions {
		if e.Id.Equal(id) {
			return e.Value, e.Critical, true
		}
	}
	return nil, false, false
}

func selfIssued(c *smx509.Certificate) bool { return bytes.Equal(c.RawIssuer, c.RawSubject) }

// name is how reports call a certificate: its CN, else its serial.
func name(c *smx509.Certificate) string {
	if c.Subject.CommonName != "" {
		return "“" + c.Subject.CommonName + "”"
	}
	return "#" + SerialHex(c.SerialNumber)
}

package pki

import (
	"bytes"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"

	"github.com/emmansun/gmsm/smx509"
	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"
)

const (
	// MaxBundleSize bounds a file of certificates from a CA, MaxBundleCertificates their number.
	MaxBundleSize         = 4 << 20
	MaxBundleCertificates = 64

	pemCRL = "X509 CRL"
)

// pkcs7Names are the content types of a SignedData whose content is nothing but certificates: RFC 5652 §5.1 and
// GM/T 0010-2012 §8.1.
var pkcs7Names = [][]byte{
	{0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x07, 0x02},
	{0x2a, 0x81, 0x1c, 0xcf, 0x55, 0x06, 0x01, 0x04, 0x02, 0x02},
}

// ParseBundle reads certificates as CAs hand them out: PEM (certificates, or PKCS7 blocks), the DER of one certificate,
// the DER of a PKCS#7 SignedData without signers ("certs only", RFC 5652 §5.2), or either DER in plain base64. Each
// certificate obeys [ParseCertificate]; one that is given twice is answered once. The order is the file's.
func ParseBundle(data []byte) ([]*smx509.Certificate, error) {
	if len(data) > MaxBundleSize {
		return nil, fmt.Errorf("pki: certificate file of %d bytes, at most %d are read", len(data), MaxBundleSize)
	}
	var ders [][]byte
	blocks, err := armoured(data, pemCertificate, "PKCS7", "CMS")
	if err != nil {
		return nil, err
	}
	for _, b := range blocks {
		more := [][]byte{b.Bytes}
		if b.Type != pemCertificate {
			if more, err = certsOnly(b.Bytes); err != nil {
				return nil, err
			}
		} else if isSignedData(b.Bytes) { // seen from CAs that label everything CERTIFICATE
			if more, err = certsOnly(b.Bytes); err != nil {
				return nil, err
			}
		}
		ders = append(ders, more...)
	}
	var out []*smx509.Certificate
	for i, der := range ders {
		c, err := ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", i+1, err)
		}
		if !contains(out, c) {
			out = append(out, c)
		}
		if len(out) > MaxBundleCertificates {
			return nil, fmt.Errorf("pki: more than %d certificates in one file", MaxBundleCertificates)
		}
	}
	if len(out) == 0 {
		return nil, errors.New("pki: no certificate in the file")
	}
	return out, nil
}

// ParseCRLFile reads one CRL as CAs publish them: DER, PEM, or the DER in plain base64.
func ParseCRLFile(data []byte) (*CRL, error) {
	if len(data) > MaxCRLSize {
		return nil, fmt.Errorf("pki: CRL of %d bytes, at most %d are read", len(data), MaxCRLSize)
	}
	blocks, err := armoured(data, pemCRL)
	if err != nil {
		return nil, err
	}
	if len(blocks) != 1 {
		return nil, fmt.Errorf("pki: %d CRLs in one file, want one", len(blocks))
	}
	return ParseCRL(blocks[0].Bytes)
}

// armoured answers the DER values of a file with the type that their PEM block has, or the first of kinds where there is
// no PEM. A block that cannot be read or is of another kind is an error, so that nothing is lost silently.
func armoured(data []byte, kinds ...string) ([]*pem.Block, error) {
	data = bytes.TrimPrefix(data, []byte("\xef\xbb\xbf"))
	if want := bytes.Count(data, []byte("-----BEGIN")); want > 0 {
		var out []*pem.Block
		for {
			var b *pem.Block
			if b, data = pem.Decode(data); b == nil {
				break
			}
			known := false
			for _, k := range kinds {
				known = known || b.Type == k
			}
			if !known {
				return nil, fmt.Errorf("pki: PEM block %d is %q, want %q", len(out)+1, b.Type, kinds[0])
			}
			out = append(out, b)
		}
		if len(out) != want {
			return nil, fmt.Errorf("pki: %d PEM blocks begin, %d can be read", want, len(out))
		}
		return out, nil
	}
	if len(data) > 0 && data[0] != 0x30 { // no SEQUENCE: base64 without armour
		plain, err := base64.StdEncoding.DecodeString(string(bytes.Join(bytes.Fields(data), nil)))
		if err != nil {
			return nil, errors.New("pki: neither PEM, DER nor base64")
		}
		data = plain
	}
	if isSignedData(data) && len(kinds) > 1 {
		return []*pem.Block{{Type: kinds[1], Bytes: data}}, nil
	}
	return []*pem.Block{{Type: kinds[0], Bytes: data}}, nil
}

// isSignedData tells a ContentInfo from a certificate by its first element.
func isSignedData(der []byte) bool {
	in := cryptobyte.String(der)
	var info, id cryptobyte.String
	if !in.ReadASN1(&info, asn1.SEQUENCE) || !info.ReadASN1(&id, asn1.OBJECT_IDENTIFIER) {
		return false
	}
	for _, n := range pkcs7Names {
		if bytes.Equal(id, n) {
			return true
		}
	}
	return false
}

// certsOnly reads
//
//	SignedData ::= SEQUENCE { version, digestAlgorithms SET, encapContentInfo SEQUENCE,
//	  certificates [0] IMPLICIT SET OF Certificate, crls [1] OPTIONAL, signerInfos SET }
//
// and answers the certificates' DER. A message with signers is refused: whoever imports it would take the signature for
// something.
func certsOnly(der []byte) ([][]byte, error) {
	in := cryptobyte.String(der)
	var info, content, signed, certs, signers cryptobyte.String
	var version int
	ctx := func(n uint8) asn1.Tag { return asn1.Tag(n).ContextSpecific().Constructed() }
	malformed := errors.New("pki: malformed PKCS#7 bundle")
	if !isSignedData(der) || !in.ReadASN1(&info, asn1.SEQUENCE) || !in.Empty() || !info.SkipASN1(asn1.OBJECT_IDENTIFIER) ||
		!info.ReadASN1(&content, ctx(0)) || !info.Empty() || !content.ReadASN1(&signed, asn1.SEQUENCE) || !content.Empty() ||
		!signed.ReadASN1Integer(&version) || !signed.SkipASN1(asn1.SET) || !signed.SkipASN1(asn1.SEQUENCE) {
		return nil, malformed
	}
	var has bool
	if !signed.ReadOptionalASN1(&certs, &has, ctx(0)) || !signed.SkipOptionalASN1(ctx(1)) ||
		!signed.ReadASN1(&signers, asn1.SET) || !signed.Empty() {
		return nil, malformed
	}
	if !signers.Empty() {
		return nil, errors.New("pki: a signed PKCS#7 message, not a bundle of certificates")
	}
	var out [][]byte
	for !certs.Empty() {
		var one cryptobyte.String
		if !certs.ReadASN1Element(&one, asn1.SEQUENCE) || len(out) >= MaxBundleCertificates {
			return nil, malformed
		}
		out = append(out, one)
	}
	return out, nil
}

// EncryptionOnly reports whether a certificate's key may encrypt or agree on keys and may not sign: the second one of a
// Chinese pair (GM/T 0015-2012 §5.2.4.2, GM/T 0016-2012), whose key the CA's key centre made.
func EncryptionOnly(cert *smx509.Certificate) bool {
	const encrypts = smx509.KeyUsageKeyEncipherment | smx509.KeyUsageDataEncipherment | smx509.KeyUsageKeyAgreement |
		smx509.KeyUsageEncipherOnly | smx509.KeyUsageDecipherOnly
	return cert.KeyUsage&encrypts != 0 && cert.KeyUsage&(signBits|caBits) == 0
}

// Limits says why the list cannot clear a certificate, whatever its dates: a delta, partial or indirect list, or one
// with critical extensions unknown to us. "" for a list that can.
func (c *CRL) Limits() string {
	if c.unusable != "" {
		return c.unusable
	}
	return c.partial
}

// Scope tells apart the lists that one issuer keeps side by side (RFC 5280 §5.2.5): it is the issuing distribution
// point's DER, "" when the list has none.
func (c *CRL) Scope() string {
	for _, e := range c.list.Extensions {
		if e.Id.Equal(oidIssuingDistribution) {
			return string(e.Value)
		}
	}
	return ""
}

// CheckIssuer is nil when issuer signed the list and was entitled to: its name is the list's issuer's, it is a CA, and its
// keyUsage has cRLSign.
func (c *CRL) CheckIssuer(issuer *smx509.Certificate) error {
	switch {
	case !bytes.Equal(c.list.RawIssuer, issuer.RawSubject):
		return errors.New("列表属于另一颁发者 (list of another issuer)")
	case !issuer.BasicConstraintsValid || !issuer.IsCA:
		return errors.New("颁发者不是 CA (issuer is not a CA)")
	}
	return c.verify(issuer)
}

// Issuer is the issuer's name, for people.
func (c *CRL) Issuer() string { return c.list.Issuer.String() }

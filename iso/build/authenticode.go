package build

import (
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// A Signer signs EFI programs: a key, wherever it is, and the certificate by which the firmware knows it.
type Signer struct {
	Key         crypto.Signer // RSA: UEFI 2.10 §32.5.2 names nothing else that firmware has to take
	Certificate *x509.Certificate
}

var (
	oidSignedData      = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 2}
	oidContentType     = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 3}
	oidMessageDigest   = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 4}
	oidSHA256          = asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 1}
	oidRSA             = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 1}
	oidSPCIndirectData = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 311, 2, 1, 4}

	// spcPEImageData is SpcAttributeTypeAndOptionalValue with SPC_PE_IMAGE_DATAOBJ, no flags, and an empty file name.
	spcPEImageData = []byte{0x30, 0x17, 0x06, 0x0a, 0x2b, 0x06, 0x01, 0x04, 0x01, 0x82, 0x37, 0x02, 0x01, 0x0f,
		0x30, 0x09, 0x03, 0x01, 0x00, 0xa0, 0x04, 0xa2, 0x02, 0x80, 0x00}
)

// Sign appends an Authenticode signature to a PE file without one (Windows Authenticode Portable Executable Signature
// Format, 2008; UEFI 2.10 §32.2). It carries no time, so that a file and a key give one signature.
func (s Signer) Sign(file []byte) ([]byte, error) {
	if _, ok := s.Key.Public().(*rsa.PublicKey); !ok {
		return nil, errors.New("build: Secure Boot takes RSA signatures alone")
	}
	out := append([]byte(nil), file...)
	for len(out)%8 != 0 { // the certificate table begins at a multiple of 8
		out = append(out, 0)
	}
	p, err := parsePE(out)
	if err != nil {
		return nil, err
	}
	le := binary.LittleEndian
	directory := p.optional + 112 + 4*8 // of certificates, the fifth
	if le.Uint32(out[directory:]) != 0 {
		return nil, errors.New("build: the file is signed already")
	}
	// Everything but checksum and this directory's entry is hashed.
	h := sha256.New()
	h.Write(out[:p.optional+64])
	h.Write(out[p.optional+68 : directory])
	h.Write(out[directory+8:])
	signed, err := s.signedData(h.Sum(nil))
	if err != nil {
		return nil, err
	}
	for len(signed)%8 != 0 {
		signed = append(signed, 0)
	}
	le.PutUint32(out[directory:], uint32(len(out)))
	le.PutUint32(out[directory+4:], uint32(len(signed)+8))
	out = le.AppendUint32(out, uint32(len(signed)+8))
	out = le.AppendUint16(out, 0x0200) // WIN_CERT_REVISION_2_0
	out = le.AppendUint16(out, 0x0002) // WIN_CERT_TYPE_PKCS_SIGNED_DATA
	return append(out, signed...), nil
}

// signedData is PKCS #7's, over SpcIndirectDataContent with the file's digest.
func (s Signer) signedData(digest []byte) ([]byte, error) {
	algorithm := func(b *cryptobyte.Builder, oid asn1.ObjectIdentifier) {
		b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
			b.AddASN1ObjectIdentifier(oid)
			b.AddASN1NULL()
		})
	}
	var inner cryptobyte.Builder // the content of SpcIndirectDataContent: its tag and length are not hashed
	inner.AddBytes(spcPEImageData)
	inner.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		algorithm(b, oidSHA256)
		b.AddASN1OctetString(digest)
	})
	content, err := inner.Bytes()
	if err != nil {
		return nil, err
	}
	contentDigest := sha256.Sum256(content)
	attribute := func(b *cryptobyte.Builder, oid asn1.ObjectIdentifier, value cryptobyte.BuilderContinuation) {
		b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
			b.AddASN1ObjectIdentifier(oid)
			b.AddASN1(cbasn1.SET, value)
		})
	}
	var attributes cryptobyte.Builder
	attribute(&attributes, oidContentType, func(b *cryptobyte.Builder) { b.AddASN1ObjectIdentifier(oidSPCIndirectData) })
	attribute(&attributes, oidMessageDigest, func(b *cryptobyte.Builder) { b.AddASN1OctetString(contentDigest[:]) })
	attrs, err := attributes.Bytes()
	if err != nil {
		return nil, err
	}
	var set cryptobyte.Builder // what is signed is the SET, what is sent is [0] (RFC 2315 §9.3)
	set.AddASN1(cbasn1.SET, func(b *cryptobyte.Builder) { b.AddBytes(attrs) })
	toSign, err := set.Bytes()
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(toSign)
	signature, err := s.Key.Sign(nil, sum[:], crypto.SHA256)
	if err != nil {
		return nil, fmt.Errorf("signing an EFI program: %w", err)
	}
	tagged := func(n uint8) cbasn1.Tag { return cbasn1.Tag(n).ContextSpecific().Constructed() }
	var out cryptobyte.Builder
	out.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1ObjectIdentifier(oidSignedData)
		b.AddASN1(tagged(0), func(b *cryptobyte.Builder) {
			b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
				b.AddASN1Int64(1)
				b.AddASN1(cbasn1.SET, func(b *cryptobyte.Builder) { algorithm(b, oidSHA256) })
				b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
					b.AddASN1ObjectIdentifier(oidSPCIndirectData)
					b.AddASN1(tagged(0), func(b *cryptobyte.Builder) {
						b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) { b.AddBytes(content) })
					})
				})
				b.AddASN1(tagged(0), func(b *cryptobyte.Builder) { b.AddBytes(s.Certificate.Raw) })
				b.AddASN1(cbasn1.SET, func(b *cryptobyte.Builder) {
					b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
						b.AddASN1Int64(1)
						b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
							b.AddBytes(s.Certificate.RawIssuer)
							b.AddASN1BigInt(s.Certificate.SerialNumber)
						})
						algorithm(b, oidSHA256)
						b.AddASN1(tagged(0), func(b *cryptobyte.Builder) { b.AddBytes(attrs) })
						algorithm(b, oidRSA)
						b.AddASN1OctetString(signature)
					})
				})
			})
		})
	})
	return out.Bytes()
}

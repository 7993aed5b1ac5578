package tsa

import (
	"bytes"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/asn1"
	"fmt"
	"hash"
	"math/big"
	"slices"

	"github.com/emmansun/gmsm/sm3"
	"golang.org/x/crypto/cryptobyte"
	der "golang.org/x/crypto/cryptobyte/asn1"

	"yinjian/appliance/cms"
)

// A Request is a TimeStampReq (RFC 3161 §2.4.1) of version 1 without extensions.
type Request struct {
	Imprint Imprint
	Policy  asn1.ObjectIdentifier // nil: the authority's own
	Nonce   *big.Int              // nil: none
	CertReq bool
}

// An Imprint is a MessageImprint: what is stamped.
type Imprint struct {
	Algorithm asn1.ObjectIdentifier
	Digest    []byte
	raw       []byte // DER as received, repeated in the token to the byte
}

// oidSM3Other is SM3 as GB/T 33560 numbers its use without a key. Some clients send it for imprints.
var oidSM3Other = asn1.ObjectIdentifier{1, 2, 156, 10197, 1, 401, 1}

// An imprintAlgorithm is a hash algorithm that imprints may use.
type imprintAlgorithm struct {
	oid  asn1.ObjectIdentifier
	der  []byte // of the OID
	size int    // of its digest in bytes
	hash func() hash.Hash
}

// imprintAlgorithms are all. SHA-1 and older are not among them (ETSI EN 319 422).
var imprintAlgorithms = []imprintAlgorithm{
	newImprintAlgorithm(cms.OIDSM3, sm3.Size, sm3.New),
	newImprintAlgorithm(oidSM3Other, sm3.Size, sm3.New),
	newImprintAlgorithm(cms.OIDSHA256, sha256.Size, sha256.New),
	newImprintAlgorithm(cms.OIDSHA384, sha512.Size384, sha512.New384),
	newImprintAlgorithm(cms.OIDSHA512, sha512.Size, sha512.New),
}

func newImprintAlgorithm(oid asn1.ObjectIdentifier, size int, hash func() hash.Hash) imprintAlgorithm {
	var b cryptobyte.Builder
	b.AddASN1ObjectIdentifier(oid)
	return imprintAlgorithm{oid, b.BytesOrPanic(), size, hash}
}

// imprintAlgorithmOf is nil for an algorithm that is not accepted.
func imprintAlgorithmOf(oid asn1.ObjectIdentifier) *imprintAlgorithm {
	for i := range imprintAlgorithms {
		if imprintAlgorithms[i].oid.Equal(oid) {
			return &imprintAlgorithms[i]
		}
	}
	return nil
}

// NewImprint is the imprint of a digest: algorithm is SM3, SHA-256, SHA-384 or SHA-512, digest of its length.
func NewImprint(algorithm asn1.ObjectIdentifier, digest []byte) (Imprint, error) {
	known := imprintAlgorithmOf(algorithm)
	if known == nil {
		return Imprint{}, fmt.Errorf("tsa: imprint algorithm %v is not accepted", algorithm)
	}
	if len(digest) != known.size {
		return Imprint{}, fmt.Errorf("tsa: imprint of %d bytes, want %d", len(digest), known.size)
	}
	var b cryptobyte.Builder
	b.AddASN1(der.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1(der.SEQUENCE, func(b *cryptobyte.Builder) { b.AddASN1ObjectIdentifier(algorithm) })
		b.AddASN1OctetString(digest)
	})
	return Imprint{Algorithm: algorithm, Digest: bytes.Clone(digest), raw: b.BytesOrPanic()}, nil
}

// ImprintOf is the imprint of data by SM3, what the appliance stamps its own signatures with.
func ImprintOf(data []byte) Imprint {
	digest := sm3.Sum(data)
	imprint, err := NewImprint(cms.OIDSM3, digest[:])
	if err != nil {
		panic(err) // SM3 is accepted and its sum has its length
	}
	return imprint
}

// Equal compares algorithm and digest. Both numbers of SM3 are the same algorithm.
func (i Imprint) Equal(other Imprint) bool {
	same := i.Algorithm.Equal(other.Algorithm) || isSM3(i.Algorithm) && isSM3(other.Algorithm)
	return same && len(i.Digest) > 0 && bytes.Equal(i.Digest, other.Digest)
}

func isSM3(oid asn1.ObjectIdentifier) bool { return oid.Equal(cms.OIDSM3) || oid.Equal(oidSM3Other) }

// maxNonceBytes bounds the INTEGER's content. RFC 3161 speaks of 64 bits; clients with 128 and 160 exist. Negative nonces
// are legal and met where 8 random bytes are sent as they are, so they are echoed like any other.
const maxNonceBytes = 20

// maxRequestBytes is far above any request that could be granted: two hundred bytes with the longest of everything.
const maxRequestBytes = 16 << 10

// ParseRequest reads a DER TimeStampReq. Every error is a *RequestError, ready to be sent.
func ParseRequest(reqDER []byte) (*Request, error) {
	badFormat := func(what string) (*Request, error) {
		return nil, &RequestError{BadDataFormat, what + " is not DER of a TimeStampReq"}
	}
	if len(reqDER) > maxRequestBytes {
		return nil, &RequestError{BadDataFormat, fmt.Sprintf("request of more than %d bytes", maxRequestBytes)}
	}
	s := cryptobyte.String(bytes.Clone(reqDER))
	var body, version cryptobyte.String
	if !s.ReadASN1(&body, der.SEQUENCE) || !s.Empty() {
		return badFormat("request")
	}
	if !readInteger(&body, &version) {
		return badFormat("version")
	}
	if len(version) != 1 || version[0] != 1 {
		return nil, &RequestError{BadRequest, "version is not 1"}
	}
	req := new(Request)
	imprint, err := readImprint(&body)
	if err != nil {
		return nil, err
	}
	req.Imprint = imprint
	if body.PeekASN1Tag(der.OBJECT_IDENTIFIER) {
		var policy cryptobyte.String
		switch {
		case !body.ReadASN1Element(&policy, der.OBJECT_IDENTIFIER) || !wellFormedOID(policy):
			return badFormat("reqPolicy")
		case !policy.ReadASN1ObjectIdentifier(&req.Policy): // a number in it is too large for us, so it is no policy of ours
			return nil, &RequestError{UnacceptedPolicy, "the policy is not served here"}
		}
	}
	if body.PeekASN1Tag(der.INTEGER) {
		var nonce cryptobyte.String
		if !readInteger(&body, &nonce) {
			return badFormat("nonce")
		}
		if len(nonce) > maxNonceBytes {
			return nil, &RequestError{BadDataFormat, fmt.Sprintf("nonce of more than %d bytes", maxNonceBytes)}
		}
		req.Nonce = signedInteger(nonce)
	}
	if body.PeekASN1Tag(der.BOOLEAN) {
		// DEFAULT FALSE: DER leaves FALSE out
		if !body.ReadASN1Boolean(&req.CertReq) || !req.CertReq {
			return badFormat("certReq")
		}
	}
	if body.PeekASN1Tag(0xa0) {
		return nil, &RequestError{UnacceptedExtension, "extensions are not accepted"}
	}
	if !body.Empty() {
		return badFormat("what follows certReq")
	}
	return req, nil
}

// readImprint takes a MessageImprint off s; the errors are *RequestError.
func readImprint(s *cryptobyte.String) (Imprint, error) {
	broken := func() (Imprint, error) {
		return Imprint{}, &RequestError{BadDataFormat, "messageImprint is not DER"}
	}
	var element, seq, algorithm, oid, digest cryptobyte.String
	if !s.ReadASN1Element(&element, der.SEQUENCE) {
		return broken()
	}
	imprint := Imprint{raw: element}
	if !element.ReadASN1(&seq, der.SEQUENCE) || !seq.ReadASN1(&algorithm, der.SEQUENCE) ||
		!algorithm.ReadASN1Element(&oid, der.OBJECT_IDENTIFIER) || !seq.ReadASN1(&digest, der.OCTET_STRING) || !seq.Empty() {
		return broken()
	}
	known := slices.IndexFunc(imprintAlgorithms, func(a imprintAlgorithm) bool { return bytes.Equal(a.der, oid) })
	if known < 0 {
		switch {
		case !wellFormedOID(oid):
			return broken()
		case !oid.ReadASN1ObjectIdentifier(&imprint.Algorithm): // a number in it is too large for us
			return Imprint{}, &RequestError{BadAlg, "hash algorithm is not accepted"}
		}
		return Imprint{}, &RequestError{BadAlg, fmt.Sprintf("hash algorithm %v is not accepted", imprint.Algorithm)}
	}
	imprint.Algorithm = imprintAlgorithms[known].oid
	if !algorithm.Empty() && !bytes.Equal(algorithm, []byte{5, 0}) {
		return Imprint{}, &RequestError{BadAlg, "hash algorithm with parameters"}
	}
	if want := imprintAlgorithms[known].size; len(digest) != want {
		return Imprint{}, &RequestError{BadDataFormat, fmt.Sprintf("hashedMessage of %d bytes, want %d", len(digest), want)}
	}
	imprint.Digest = digest
	return imprint, nil
}

// wellFormedOID says whether an element is DER of an OBJECT IDENTIFIER, however large its numbers are (X.690 §8.19).
func wellFormedOID(element cryptobyte.String) bool {
	var b cryptobyte.String
	if !element.ReadASN1(&b, der.OBJECT_IDENTIFIER) || b.Empty() || b[len(b)-1]&0x80 != 0 {
		return false
	}
	for i := range b {
		if b[i] == 0x80 && (i == 0 || b[i-1]&0x80 == 0) { // fewest octets
			return false
		}
	}
	return true
}

// Bytes is the DER of the TimeStampReq. What ParseRequest has read comes out as it went in.
func (r *Request) Bytes() ([]byte, error) {
	if r.Imprint.raw == nil {
		return nil, fmt.Errorf("tsa: request without imprint")
	}
	var b cryptobyte.Builder
	b.AddASN1(der.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1Int64(1)
		b.AddBytes(r.Imprint.raw)
		if r.Policy != nil {
			b.AddASN1ObjectIdentifier(r.Policy)
		}
		if r.Nonce != nil {
			b.AddASN1BigInt(r.Nonce)
		}
		if r.CertReq {
			b.AddASN1Boolean(true)
		}
	})
	out, err := b.Bytes()
	if err != nil {
		return nil, fmt.Errorf("tsa: request: %w", err)
	}
	return out, nil
}

// readInteger takes a minimally encoded INTEGER off s and answers its content octets.
func readInteger(s *cryptobyte.String, out *cryptobyte.String) bool {
	if !s.ReadASN1(out, der.INTEGER) {
		return false
	}
	b := *out
	return len(b) == 1 || len(b) > 1 && (b[0] != 0 || b[1]&0x80 != 0) && (b[0] != 0xff || b[1]&0x80 == 0)
}

// signedInteger reads two's complement.
func signedInteger(b []byte) *big.Int {
	n := new(big.Int).SetBytes(b)
	if b[0]&0x80 != 0 {
		n.Sub(n, new(big.Int).Lsh(big.NewInt(1), uint(len(b))*8))
	}
	return n
}

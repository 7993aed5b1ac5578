package cms

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/asn1"
	"fmt"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/sm3"
	"golang.org/x/crypto/cryptobyte"
	der "golang.org/x/crypto/cryptobyte/asn1"
)

// A suite is a pair of digest and signature algorithm, and the work done with it.
type suite struct {
	digest AlgorithmIdentifier
	sum    func([]byte) [32]byte
	// signature algorithms by profile, as written
	signature map[Profile]AlgorithmIdentifier
	// verify checks sig over message, not over a digest.
	verify func(pub crypto.PublicKey, message, sig []byte) error
	// wellFormed refuses what cannot be a signature by pub, so that a fault in a cipher machine goes no further.
	wellFormed func(pub crypto.PublicKey, sig []byte) error
}

var (
	suiteSM2 = &suite{
		digest: newAlgorithm(OIDSM3, nil),
		sum:    sm3.Sum,
		signature: map[Profile]AlgorithmIdentifier{
			RFC5652: newAlgorithm(OIDSM2WithSM3, nil), // RFC 8998 §3.2.1: no parameters
			GM0010:  newAlgorithm(OIDSM2Sign, nil),
		},
		verify:     verifySM2,
		wellFormed: wellFormedSM2,
	}
	suiteRSA = &suite{
		digest:     newAlgorithm(OIDSHA256, nil), // RFC 5754 §2: absent
		sum:        sha256.Sum256,
		signature:  map[Profile]AlgorithmIdentifier{RFC5652: newAlgorithm(OIDSHA256WithRSA, derNULL)}, // RFC 5754 §3.2
		verify:     verifyRSA,
		wellFormed: wellFormedRSA,
	}
)

const (
	minRSABits = 2048
	maxRSABits = 8192 // a verifier must not be kept busy by somebody else's key
)

// suiteOf chooses by key.
func suiteOf(pub crypto.PublicKey) (*suite, error) {
	switch pub := pub.(type) {
	case *ecdsa.PublicKey:
		if pub == nil || !sm2.IsSM2PublicKey(pub) {
			return nil, fmt.Errorf("elliptic curve key that is not SM2's: %w", ErrUnsupported)
		}
		return suiteSM2, nil
	case *rsa.PublicKey:
		if pub == nil || pub.N == nil || pub.N.BitLen() < minRSABits || pub.N.BitLen() > maxRSABits {
			return nil, fmt.Errorf("RSA key outside %d to %d bits: %w", minRSABits, maxRSABits, ErrUnsupported)
		}
		return suiteRSA, nil
	}
	return nil, fmt.Errorf("key of type %T: %w", pub, ErrUnsupported)
}

func samePublicKey(a, b crypto.PublicKey) bool {
	key, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && key.Equal(b)
}

// oidSM3NoKey and oidSM3Keyed are GB/T 33560's numbers for SM3's two uses. The second means a MAC; one timestamp authority
// on the market writes it, under the outer type of GM/T 0010, where plain SM3 is meant.
var (
	oidSM3NoKey = asn1.ObjectIdentifier{1, 2, 156, 10197, 1, 401, 1}
	oidSM3Keyed = asn1.ObjectIdentifier{1, 2, 156, 10197, 1, 401, 2}
)

// accepts checks the algorithms that a SignerInfo names. Both arcs of SM2 signatures are read whatever the outer type is:
// 301.1 and 501 are met under either.
func (s *suite) accepts(outer asn1.ObjectIdentifier, digest, signature AlgorithmIdentifier) error {
	fits := digest.OID.Equal(s.digest.OID)
	if s == suiteSM2 {
		fits = fits || digest.OID.Equal(oidSM3NoKey) || digest.OID.Equal(oidSM3Keyed) && outer.Equal(OIDGMSignedData)
	}
	if !fits || !digest.parameterless() {
		return fmt.Errorf("digestAlgorithm %v with this key: %w", digest.OID, ErrUnsupported)
	}
	known := signature.OID.Equal(OIDSM2WithSM3) || signature.OID.Equal(OIDSM2Sign)
	if s == suiteRSA {
		known = signature.OID.Equal(OIDRSA) || signature.OID.Equal(OIDSHA256WithRSA)
	}
	if !known || !signature.parameterless() {
		return fmt.Errorf("signatureAlgorithm %v with this key: %w", signature.OID, ErrUnsupported)
	}
	return nil
}

func verifySM2(pub crypto.PublicKey, message, sig []byte) error {
	if err := wellFormedSM2(pub, sig); err != nil {
		return err
	}
	if !sm2.VerifyASN1WithSM2(pub.(*ecdsa.PublicKey), nil, message, sig) { // nil: the default identity
		return ErrBadSignature
	}
	return nil
}

// wellFormedSM2 insists on the DER of SM2Signature ::= SEQUENCE { r INTEGER, s INTEGER } (GM/T 0009-2012 §7.3).
func wellFormedSM2(_ crypto.PublicKey, sig []byte) error {
	in := cryptobyte.String(sig)
	var seq, r, s cryptobyte.String
	if !in.ReadASN1(&seq, der.SEQUENCE) || !in.Empty() || !seq.ReadASN1(&r, der.INTEGER) || !seq.ReadASN1(&s, der.INTEGER) || !seq.Empty() ||
		!positive256(r) || !positive256(s) {
		return fmt.Errorf("not an SM2Signature: %w", ErrBadSignature)
	}
	return nil
}

// positive256 reports whether the content of an INTEGER is DER of a number in [1, 2^256).
func positive256(n []byte) bool {
	if len(n) == 0 || n[0]&0x80 != 0 || len(n) > 1 && n[0] == 0 && n[1]&0x80 == 0 {
		return false
	}
	return len(n) <= 32 && (len(n) > 1 || n[0] != 0) || len(n) == 33 && n[0] == 0
}

func verifyRSA(pub crypto.PublicKey, message, sig []byte) error {
	digest := sha256.Sum256(message)
	if rsa.VerifyPKCS1v15(pub.(*rsa.PublicKey), crypto.SHA256, digest[:], sig) != nil {
		return ErrBadSignature
	}
	return nil
}

func wellFormedRSA(pub crypto.PublicKey, sig []byte) error {
	if want := pub.(*rsa.PublicKey).Size(); len(sig) != want {
		return fmt.Errorf("RSA signature of %d bytes, want %d: %w", len(sig), want, ErrBadSignature)
	}
	return nil
}

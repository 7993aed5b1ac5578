package hsm

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"math/big"
	"reflect"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/sm3"
	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"
)

// DefaultSM2ID is the signer's identity that ZA commits to when nobody says otherwise (GM/T 0009-2012 §10).
const DefaultSM2ID = "1234567812345678"

// A Key is one key pair on a token, or wrapped under a key of it. It implements crypto.Signer. Safe for concurrent use.
type Key struct {
	token  Token
	info   KeyInfo
	za     []byte // SM3 state's prefix: ZA with DefaultSM2ID; nil for RSA
	verify bool

	wrapped *WrappedKey // nil: the key is on the token
}

// NewKey finds the key with this label on token. With verify, each fresh signature is checked with the public key
// before it is returned (policy hsm.verify_fresh, on by default: a fault in a cipher machine must not leave the appliance).
func NewKey(ctx context.Context, token Token, label string, verify bool) (*Key, error) {
	info, err := token.FindKey(ctx, label)
	if err != nil {
		return nil, fmt.Errorf("hsm: key %q: %w", label, err)
	}
	return KeyOf(token, info, verify)
}

// KeyOf is [NewKey] for a key whose description is at hand, so that no search is made.
func KeyOf(token Token, info KeyInfo, verify bool) (*Key, error) {
	k := &Key{token: token, info: info, verify: verify}
	switch pub := info.Public.(type) {
	case *ecdsa.PublicKey:
		if !sm2.IsSM2PublicKey(pub) {
			return nil, fmt.Errorf("hsm: key %q: not on the SM2 curve", info.Label)
		}
		za, err := sm2.CalculateZA(pub, []byte(DefaultSM2ID))
		if err != nil {
			return nil, fmt.Errorf("hsm: key %q: ZA: %w", info.Label, err)
		}
		k.za = za
	case *rsa.PublicKey:
		if pub.N.BitLen() < 2048 {
			return nil, fmt.Errorf("hsm: key %q: RSA key of %d bits, at least 2048 are needed", info.Label, pub.N.BitLen())
		}
	default:
		return nil, fmt.Errorf("hsm: key %q: not a key pair", info.Label)
	}
	return k, nil
}

// Public is *ecdsa.PublicKey on sm2.P256() or *rsa.PublicKey.
func (k *Key) Public() crypto.PublicKey { return k.info.Public }

// Info describes the key.
func (k *Key) Info() KeyInfo { return k.info }

// Algorithm is SM2, RSA2048 or RSA3072.
func (k *Key) Algorithm() Algorithm { return k.info.Algorithm }

// Sign implements crypto.Signer; rand is not used, the token has its own. It is [Key.SignContext] without a limit of
// its own to the wait.
func (k *Key) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	return k.SignContext(context.Background(), digest, opts) // the worker's own deadline bounds the call
}

// SignContext signs as crypto.Signer says; ctx bounds the wait.
//
// For SM2, gmsm's sm2.DefaultSM2SignerOpts (or its equal) makes digest the message M, and e is computed here with
// DefaultSM2ID; an SM2SignerOption with another ID is refused, for its signature would never verify. With other opts
// digest must be e, 32 bytes. For RSA, opts must say SHA-256 and digest be 32 bytes; *rsa.PSSOptions ask for RSASSA-PSS
// with a salt as long as the digest, and no other length is made. The answer is DER for SM2, the plain signature for
// RSA.
func (k *Key) SignContext(ctx context.Context, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if k.za == nil {
		if opts == nil || opts.HashFunc() != crypto.SHA256 {
			return nil, errors.New("hsm: RSA keys sign SHA-256 digests only")
		}
		if pss, ok := opts.(*rsa.PSSOptions); ok {
			if pss.SaltLength != rsa.PSSSaltLengthEqualsHash && pss.SaltLength != sha256.Size {
				return nil, errors.New("hsm: RSASSA-PSS with a salt that is not as long as the digest is not supported")
			}
			return k.signRSA(ctx, SignRSAPSSSHA256, digest)
		}
		return k.SignDigest(ctx, digest)
	}
	switch o, ok := opts.(*sm2.SM2SignerOption); {
	case !ok || reflect.DeepEqual(o, digestOpts):
		return k.SignDigest(ctx, digest)
	case o == sm2.DefaultSM2SignerOpts || reflect.DeepEqual(o, sm2.DefaultSM2SignerOpts):
		return k.SignMessage(ctx, digest)
	}
	return nil, errors.New("hsm: SM2 signer's ID other than the default is not supported")
}

// digestOpts is gmsm's way to say that a digest is e already. The option's fields are not exported, so it is known by
// comparison.
var digestOpts = sm2.NewSM2SignerOption(false, nil)

// SignMessage signs message: SM2 with SM3 and DefaultSM2ID (DER answer), or RSASSA-PKCS1-v1_5 with SHA-256.
func (k *Key) SignMessage(ctx context.Context, message []byte) ([]byte, error) {
	h := k.NewHash()
	h.Write(message)
	return k.SignDigest(ctx, h.Sum(nil))
}

// NewHash answers a hash whose sum [Key.SignDigest] takes: for SM2 an SM3 that has ZA written already (so its sum is
// e), for RSA a SHA-256. Reset starts from plain SM3 again; make a new one instead.
func (k *Key) NewHash() hash.Hash {
	if k.za == nil {
		return sha256.New()
	}
	h := sm3.New()
	h.Write(k.za)
	return h
}

func (k *Key) checkDigest(digest []byte) error {
	if len(digest) != 32 {
		return fmt.Errorf("hsm: key %q: digest of %d bytes, want 32", k.info.Label, len(digest))
	}
	return nil
}

// signRSA signs a SHA-256 digest in the padding that op names.
func (k *Key) signRSA(ctx context.Context, op Operation, digest []byte) ([]byte, error) {
	if err := k.checkDigest(digest); err != nil {
		return nil, err
	}
	sig, err := k.checked(ctx, op, digest, func(sig []byte) error {
		if !k.verify {
			return nil
		}
		pub := k.info.Public.(*rsa.PublicKey)
		var err error
		if op == SignRSAPSSSHA256 {
			err = rsa.VerifyPSS(pub, crypto.SHA256, digest, sig, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash})
		} else {
			err = rsa.VerifyPKCS1v15(pub, crypto.SHA256, digest, sig)
		}
		if err != nil {
			return fmt.Errorf("key %q: %w", k.info.Label, ErrBadSignature)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return sig, nil
}

// SignDigest signs e (SM2) or a SHA-256 digest (RSA, RSASSA-PKCS1-v1_5), 32 bytes either way.
func (k *Key) SignDigest(ctx context.Context, digest []byte) ([]byte, error) {
	if k.za == nil {
		return k.signRSA(ctx, SignRSASHA256, digest)
	}
	if err := k.checkDigest(digest); err != nil {
		return nil, err
	}
	var r, s *big.Int
	_, err := k.checked(ctx, SignSM2E, digest, func(answer []byte) (err error) {
		if r, s, err = NormalizeSM2(answer); err != nil {
			return fmt.Errorf("key %q: %w: %w", k.info.Label, ErrBadSignature, err)
		}
		if k.verify && !sm2.Verify(k.info.Public.(*ecdsa.PublicKey), digest, r, s) {
			return fmt.Errorf("key %q: %w", k.info.Label, ErrBadSignature)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return MarshalSM2(r, s)
}

// NormalizeSM2 reads an SM2 signature as cipher machines give it: r ‖ s (64 bytes), or the DER of
// SM2Signature ::= SEQUENCE { r INTEGER, s INTEGER } (GM/T 0009-2012 §7.3). r and s are in [1, n-1].
func NormalizeSM2(sig []byte) (r, s *big.Int, err error) {
	r, s = new(big.Int), new(big.Int)
	// A DER signature of exactly 64 bytes exists (short r or s); raw is tried only when DER does not fit.
	in := cryptobyte.String(sig)
	var seq cryptobyte.String
	if in.ReadASN1(&seq, asn1.SEQUENCE) && in.Empty() && seq.ReadASN1Integer(r) && seq.ReadASN1Integer(s) && seq.Empty() {
		if inRange(r) && inRange(s) {
			return r, s, nil
		}
		return nil, nil, errors.New("hsm: SM2 signature: r or s out of range")
	}
	if len(sig) != 64 {
		return nil, nil, fmt.Errorf("hsm: SM2 signature of %d bytes is neither r‖s nor DER", len(sig))
	}
	r, s = new(big.Int).SetBytes(sig[:32]), new(big.Int).SetBytes(sig[32:])
	if !inRange(r) || !inRange(s) {
		return nil, nil, errors.New("hsm: SM2 signature: r or s out of range")
	}
	return r, s, nil
}

func inRange(v *big.Int) bool { return v.Sign() > 0 && v.Cmp(sm2.P256().Params().N) < 0 }

// MarshalSM2 is the DER of SM2Signature.
func MarshalSM2(r, s *big.Int) ([]byte, error) {
	if !inRange(r) || !inRange(s) { // for tests: no signature is
		var b cryptobyte.Builder
		b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
			b.AddASN1BigInt(r)
			b.AddASN1BigInt(s)
		})
		return b.Bytes()
	}
	// Written out, for each signature is encoded twice on its way: cryptobyte's nested builders ask for memory ten times.
	var body [2 * (2 + 1 + 32)]byte
	n := appendPositive(appendPositive(body[:0], r), s)
	return append(append(make([]byte, 0, 2+len(n)), byte(asn1.SEQUENCE), byte(len(n))), n...), nil
}

// appendPositive appends the INTEGER v, positive and of at most 32 octets.
func appendPositive(b []byte, v *big.Int) []byte {
	size := v.BitLen()/8 + 1 // with room for a sign
	b = append(b, byte(asn1.INTEGER), byte(size))
	var octets [33]byte
	return append(b, v.FillBytes(octets[:size])...)
}

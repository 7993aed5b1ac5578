package hsm

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/sm3"
)

// maxBlob bounds a wrapped key in bytes: the PKCS#8 of an RSA key of 2048 bits is some 1,220.
const maxBlob = 8 << 10

// A WrappedKey is a key pair whose private half is on no token: a blob that C_WrapKey gave, under a key that encrypts
// keys (KEK) which every machine in question holds and trusts (CKA_TRUSTED). A token unwraps it to sign, into a session
// object that cannot leave, and keeps that for a while ([Token.DoWrapped]).
//
// The blob is of use to nobody without a logged-in token that has the KEK. It is made by [NewWrappedKey] and not changed
// afterwards.
type WrappedKey struct {
	Label     string // names the key in the use log; on no token
	Algorithm Algorithm
	Public    crypto.PublicKey
	KEK       string // CKA_LABEL of the wrapping key
	Blob      []byte // as C_WrapKey gave it, with whatever the mechanism puts in front; nil: see [WrappedRef]

	digest [32]byte
}

// NewWrappedKey describes a wrapped key. It looks at the form alone: whether the blob is what it is said to be is for the
// token to find out.
func NewWrappedKey(label string, alg Algorithm, public crypto.PublicKey, kek string, blob []byte) (*WrappedKey, error) {
	switch {
	case label == "" || len(label) > 128:
		return nil, fmt.Errorf("hsm: wrapped key: label of %d bytes, want 1 to 128", len(label))
	case kek == "" || len(kek) > 128:
		return nil, fmt.Errorf("hsm: wrapped key %q: wrapping key's label of %d bytes, want 1 to 128", label, len(kek))
	case len(blob) == 0 || len(blob) > maxBlob:
		return nil, fmt.Errorf("hsm: wrapped key %q: blob of %d bytes, want 1 to %d", label, len(blob), maxBlob)
	}
	k := &WrappedKey{Label: label, Algorithm: alg, Public: public, KEK: kek, Blob: blob}
	aad, err := WrappingAAD(label, alg, public)
	if err != nil {
		return nil, err
	}
	h := sm3.New()
	h.Write(aad)
	h.Write(field(nil, kek))
	h.Write(blob)
	h.Sum(k.digest[:0])
	return k, nil
}

// WrappedRef names a wrapped key by its digest alone, for a token that may have it unwrapped already; one that does not
// answers [ErrNotCached].
func WrappedRef(digest [32]byte, label string) *WrappedKey {
	return &WrappedKey{Label: label, digest: digest}
}

// Digest is SM3 over all that describes the key, the blob included. Whoever knows it and may use the token can use the
// key while the token has it unwrapped.
func (k *WrappedKey) Digest() [32]byte { return k.digest }

// WrappingAAD is the additional data that a key is wrapped and unwrapped with, where the mechanism takes some: SM3 over
// label, algorithm and public key, so that one key's blob is no other's. 32 bytes.
func WrappingAAD(label string, alg Algorithm, public crypto.PublicKey) ([]byte, error) {
	b := field([]byte("yinjian wrapped key 1\x00"), label)
	b = field(b, string(alg))
	switch p := public.(type) {
	case *ecdsa.PublicKey:
		if alg != SM2 || !sm2.IsSM2PublicKey(p) {
			return nil, fmt.Errorf("hsm: wrapped key %q: %s with a public key on another curve", label, alg)
		}
		b = field(b, string(elliptic.Marshal(p.Curve, p.X, p.Y)))
	case *rsa.PublicKey:
		if alg != RSA2048 {
			return nil, fmt.Errorf("hsm: wrapped key %q: %s with an RSA public key", label, alg)
		}
		b = field(b, string(x509.MarshalPKCS1PublicKey(p)))
	default:
		return nil, fmt.Errorf("hsm: wrapped key %q: public key of type %T", label, public)
	}
	sum := sm3.Sum(b)
	return sum[:], nil
}

// field adds a length (u16, big-endian) and the bytes.
func field(b []byte, v string) []byte {
	return append(binary.BigEndian.AppendUint16(b, uint16(len(v))), v...)
}

// KeyOfWrapped is [KeyOf] for a key that is on no token. Each fresh signature is checked, whatever the policy: a blob comes
// from a disk.
func KeyOfWrapped(token Token, w *WrappedKey) (*Key, error) {
	if w.Blob == nil {
		return nil, errors.New("hsm: wrapped key without its blob")
	}
	k, err := KeyOf(token, KeyInfo{Label: w.Label, Algorithm: w.Algorithm, Public: w.Public, Sensitive: true, Extractable: true}, true)
	if err != nil {
		return nil, err
	}
	k.wrapped = w
	return k, nil
}

// Wrapped answers what a key that is on no token was made from, nil of one that is.
func (k *Key) Wrapped() *WrappedKey { return k.wrapped }

// do performs op with the key, wherever its private half is.
func (k *Key) do(ctx context.Context, op Operation, digest []byte) ([]byte, error) {
	if k.wrapped != nil {
		return k.token.DoWrapped(ctx, k.wrapped, op, digest)
	}
	return k.token.Do(ctx, k.info.Label, op, digest)
}

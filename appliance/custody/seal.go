// Package custody is what surrounds a staff key that lives outside the cipher machine: sealing, sharing and shares as text.
//
// Such a key is a blob that the cipher machine wrapped under a key it trusts (hsm.WrappedKey). Each signer has a sealing
// pair (SM2) beside it: blobs are sealed to the pair's public half, so that a new key can be made without the signer, and
// the private half is sealed under a key from the signer's PIN and the cipher machine, and to the officers (干部) who
// together can open it when the PIN is forgotten. Whoever has disk and backup has neither PIN nor machine.
//
// Secrets of custodians and officers are shared by Shamir's scheme with Feldman's commitments, over P-256, by Cloudflare's
// circl: a share can be told from a wrong one without the others.
//
// Standards: SM2 encryption is GB/T 32918.4-2016 in the encoding of GM/T 0009-2012 §7.2, SM4-GCM is GB/T 36624-2018's.
package custody

import (
	"crypto/cipher"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"fmt"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/sm3"
	"github.com/emmansun/gmsm/sm4"
)

// ErrSealed means that what is sealed cannot be opened with this key, or is not what it is said to be.
var ErrSealed = errors.New("custody: it cannot be opened with this key")

const (
	keySize   = 16
	nonceSize = 12
	// maxSealed bounds what is sealed, in bytes.
	maxSealed = 16 << 10
)

// Seal encrypts plain with SM4-GCM: nonce (12) ‖ ciphertext ‖ tag (16). The key has 16 bytes and is wiped by its owner;
// what names the thing is additional data.
func Seal(key, plain []byte, name string) ([]byte, error) {
	aead, err := newGCM(key)
	if err != nil {
		return nil, err
	}
	nonce := make([]byte, nonceSize, nonceSize+len(plain)+aead.Overhead())
	rand.Read(nonce) // never fails (crypto/rand)
	return aead.Seal(nonce, nonce, plain, []byte(name)), nil
}

// Open is the inverse of Seal. It fails with ErrSealed.
func Open(key, sealed []byte, name string) ([]byte, error) {
	aead, err := newGCM(key)
	if err != nil {
		return nil, err
	}
	if len(sealed) < nonceSize || len(sealed) > maxSealed {
		return nil, ErrSealed
	}
	plain, err := aead.Open(nil, sealed[:nonceSize], sealed[nonceSize:], []byte(name))
	if err != nil {
		return nil, ErrSealed
	}
	return plain, nil
}

func newGCM(key []byte) (cipher.AEAD, error) {
	if len(key) != keySize {
		return nil, fmt.Errorf("custody: a key of %d bytes, want %d", len(key), keySize)
	}
	block, err := sm4.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

// NewPair draws a sealing pair and answers its private half as a seed and its public half as a point (65 bytes). The caller
// wipes the seed.
func NewPair() (seed, point []byte) {
	seed = make([]byte, SecretSize)
	for {
		rand.Read(seed) // never fails (crypto/rand)
		if key, err := privateOf(seed); err == nil {
			return seed, elliptic.Marshal(key.Curve, key.X, key.Y)
		}
	}
}

// PointOf is the public half of a seed.
func PointOf(seed []byte) ([]byte, error) {
	key, err := privateOf(seed)
	if err != nil {
		return nil, err
	}
	return elliptic.Marshal(key.Curve, key.X, key.Y), nil
}

// privateOf reads a seed: 31 bytes, below the order of SM2's curve and of P-256, whose scalars are shared.
func privateOf(seed []byte) (*sm2.PrivateKey, error) {
	if len(seed) != SecretSize {
		return nil, fmt.Errorf("custody: a seed of %d bytes, want %d", len(seed), SecretSize)
	}
	var d [32]byte
	defer clear(d[:])
	copy(d[1:], seed)
	return sm2.NewPrivateKey(d[:])
}

// SealTo seals plain to the owner of the point: a fresh SM4 key under SM2, and plain under that key.
//
//	u8 length of the SM2 ciphertext | SM2Cipher, DER | nonce ‖ ciphertext ‖ tag
func SealTo(point, plain []byte, name string) ([]byte, error) {
	pub, err := pointKey(point)
	if err != nil {
		return nil, err
	}
	key := make([]byte, keySize)
	defer clear(key)
	rand.Read(key) // never fails (crypto/rand)
	head, err := sm2.EncryptASN1(rand.Reader, pub, key)
	if err != nil {
		return nil, err
	}
	if len(head) > 255 {
		return nil, fmt.Errorf("custody: an SM2 ciphertext of %d bytes", len(head))
	}
	body, err := Seal(key, plain, name)
	if err != nil {
		return nil, err
	}
	return append(append([]byte{byte(len(head))}, head...), body...), nil
}

// OpenWith is the inverse of SealTo. It fails with ErrSealed.
func OpenWith(seed, sealed []byte, name string) ([]byte, error) {
	priv, err := privateOf(seed)
	if err != nil {
		return nil, err
	}
	if len(sealed) < 1 || len(sealed) < 1+int(sealed[0]) || len(sealed) > maxSealed {
		return nil, ErrSealed
	}
	n := 1 + int(sealed[0])
	key, err := priv.Decrypt(nil, sealed[1:n], nil)
	if err != nil || len(key) != keySize {
		return nil, ErrSealed
	}
	defer clear(key)
	return Open(key, sealed[n:], name)
}

func pointKey(point []byte) (*ecdsa.PublicKey, error) {
	pub, err := sm2.NewPublicKey(point)
	if err != nil {
		return nil, fmt.Errorf("custody: public point: %w", err)
	}
	return pub, nil
}

// Fingerprint names a public point: the first 8 bytes of its SM3, in hexadecimal.
func Fingerprint(point []byte) string {
	sum := sm3.Sum(point)
	return fmt.Sprintf("%x", sum[:8])
}

// KEKOf derives a wrapping key (16 bytes) from the secret that custodians share. The caller wipes it.
func KEKOf(secret []byte) []byte {
	h := sm3.New()
	h.Write([]byte("yinjian/kek/v1\x00"))
	h.Write(secret)
	return h.Sum(nil)[:keySize]
}

// CheckValue is the check value (KCV) of an SM4 key: the first 3 bytes of the encryption of a block of zeros (as ANSI X9.24-1
// has it for other ciphers), in hexadecimal.
func CheckValue(key []byte) (string, error) {
	block, err := sm4.NewCipher(key)
	if err != nil {
		return "", err
	}
	out := make([]byte, sm4.BlockSize)
	block.Encrypt(out, out)
	return fmt.Sprintf("%X", out[:3]), nil
}

package softtoken

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"hash"
	"math/big"
	"sync"

	"github.com/emmansun/gmsm/cbcmac"
	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/sm3"
	"github.com/emmansun/gmsm/sm4"
	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"
)

const (
	defaultSM2ID = "1234567812345678"
	maxSM2ID     = 0xFFFF / 8 // ENTL is the ID's bit length in 16 bits

	minSecret = 16 // bytes of a generic secret key
	maxSecret = 64 // HMAC-SM3 hashes a longer key down (RFC 2104 §2)
	sm4Size   = 16 // bytes of a key and of a block
)

// sm2Params is the DER of the curve's OID, 1.2.156.10197.1.301 (GM/T 0006-2012).
var sm2Params = []byte{0x06, 0x08, 0x2A, 0x81, 0x1C, 0xCF, 0x55, 0x01, 0x82, 0x2D}

// A secret is the part of a key that does not leave: one of the three is set.
type secret struct {
	// mu is held shared while the key is used and exclusively to wipe it, so that no signature is computed with
	// half a key. Users of one key do not wait for one another.
	mu    sync.RWMutex
	wiped bool
	sm2   *sm2.PrivateKey
	rsa   *rsa.PrivateKey
	raw   []byte
}

// use runs f while the key is whole. It answers false when the key is wiped.
func (k *secret) use(f func() rv) (rv, bool) {
	k.mu.RLock()
	defer k.mu.RUnlock()
	if k.wiped {
		return 0, false
	}
	return f(), true
}

// wipe overwrites what can be reached. The libraries' own derived copies are only let go of.
func (k *secret) wipe() {
	if k == nil {
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.wiped = true
	if k.sm2 != nil {
		wipeInt(k.sm2.D)
	}
	if k.rsa != nil {
		wipeInt(k.rsa.D, k.rsa.Precomputed.Dp, k.rsa.Precomputed.Dq, k.rsa.Precomputed.Qinv)
		wipeInt(k.rsa.Primes...)
	}
	clear(k.raw)
	k.sm2, k.rsa, k.raw = nil, nil, nil
}

func wipeInt(ints ...*big.Int) {
	for _, v := range ints {
		if v != nil {
			clear(v.Bits())
		}
	}
}

// marshal answers the bytes that parseSecret reads: d (32 bytes), PKCS#1 DER, or the value.
func (k *secret) marshal() []byte {
	switch {
	case k.sm2 != nil:
		return k.sm2.D.FillBytes(make([]byte, 32))
	case k.rsa != nil:
		return x509.MarshalPKCS1PrivateKey(k.rsa)
	default:
		return bytes.Clone(k.raw)
	}
}

func newSM2Secret(d []byte) (*secret, error) {
	key, err := sm2.NewPrivateKey(d)
	if err != nil {
		return nil, err
	}
	return &secret{sm2: key}, nil
}

// sm2Point is CKA_EC_POINT: the DER of an OCTET STRING that holds 04 ‖ x ‖ y (mechanisms §2.3.3).
func sm2Point(pub *ecdsa.PublicKey) []byte {
	b := make([]byte, 0, 67)
	b = append(b, 0x04, 65, 0x04)
	b = append(b, pub.X.FillBytes(make([]byte, 32))...)
	return append(b, pub.Y.FillBytes(make([]byte, 32))...)
}

// parsePoint reads CKA_EC_POINT, in DER or, as older programs write it, bare.
func parsePoint(v []byte) (*ecdsa.PublicKey, error) {
	if len(v) == 67 && v[0] == 0x04 && v[1] == 65 {
		v = v[2:]
	}
	if len(v) != 65 {
		return nil, errors.New("softtoken: CKA_EC_POINT is not an uncompressed point")
	}
	return sm2.NewPublicKey(v)
}

// hashZA answers an SM3 state that has ZA written (GB/T 32918.2-2016 §5.5). It is written out here because gmsm keeps
// every ID it has seen for as long as the key lives.
func hashZA(pub *ecdsa.PublicKey, id []byte) hash.Hash {
	h := sm3.New()
	h.Write(binary.BigEndian.AppendUint16(nil, uint16(8*len(id))))
	h.Write(id)
	curve := sm2.P256().Params()
	a := new(big.Int).Sub(curve.P, big.NewInt(3))
	for _, v := range []*big.Int{a, curve.B, curve.Gx, curve.Gy, pub.X, pub.Y} {
		h.Write(v.FillBytes(make([]byte, 32)))
	}
	za := h.Sum(nil)
	h.Reset()
	h.Write(za)
	return h
}

// signSM2 signs e and writes the signature in enc.
func signSM2(key *sm2.PrivateKey, e []byte, enc encoding) ([]byte, rv) {
	if len(e) != 32 {
		return nil, ckrDataLenRange
	}
	der, err := sm2.SignASN1(rand.Reader, key, e, nil)
	if err != nil {
		return nil, ckrGeneralError
	}
	if enc == encDER {
		return der, ckrOK
	}
	r, s, ok := splitSM2(der)
	if !ok {
		return nil, ckrGeneralError
	}
	raw := make([]byte, 64)
	copy(raw[32-len(r):], r)
	copy(raw[64-len(s):], s)
	return raw, ckrOK
}

// splitSM2 answers the magnitudes of r and s, at most 32 bytes each.
func splitSM2(der []byte) (r, s []byte, ok bool) {
	in := cryptobyte.String(der)
	var seq cryptobyte.String
	ok = in.ReadASN1(&seq, asn1.SEQUENCE) && in.Empty() && seq.ReadASN1Integer(&r) && seq.ReadASN1Integer(&s) &&
		seq.Empty() && len(r) <= 32 && len(s) <= 32
	return r, s, ok
}

// verifySM2 checks a signature in enc over e.
func verifySM2(pub *ecdsa.PublicKey, e, sig []byte, enc encoding) rv {
	if len(e) != 32 {
		return ckrDataLenRange
	}
	if enc == encDER {
		if len(sig) > 72 {
			return ckrSignatureLenRange
		}
		if !sm2.VerifyASN1(pub, e, sig) {
			return ckrSignatureInvalid
		}
		return ckrOK
	}
	if len(sig) != 64 {
		return ckrSignatureLenRange
	}
	if !sm2.Verify(pub, e, new(big.Int).SetBytes(sig[:32]), new(big.Int).SetBytes(sig[32:])) {
		return ckrSignatureInvalid
	}
	return ckrOK
}

// signRSA is RSASSA-PKCS1-v1_5: h 0 pads data as it comes, crypto.SHA256 takes a digest.
func signRSA(key *rsa.PrivateKey, h crypto.Hash, data []byte) ([]byte, rv) {
	if len(data) > key.Size()-11 {
		return nil, ckrDataLenRange
	}
	sig, err := rsa.SignPKCS1v15(nil, key, h, data)
	if err != nil {
		return nil, ckrGeneralError
	}
	return sig, ckrOK
}

func verifyRSA(pub *rsa.PublicKey, h crypto.Hash, data, sig []byte) rv {
	if len(data) > pub.Size()-11 {
		return ckrDataLenRange
	}
	if len(sig) != pub.Size() {
		return ckrSignatureLenRange
	}
	if rsa.VerifyPKCS1v15(pub, h, data, sig) != nil {
		return ckrSignatureInvalid
	}
	return ckrOK
}

// signPSS is RSASSA-PSS over a SHA-256 digest, with a salt as long as it.
func signPSS(key *rsa.PrivateKey, digest []byte) ([]byte, rv) {
	if len(digest) != sha256.Size {
		return nil, ckrDataLenRange
	}
	sig, err := rsa.SignPSS(rand.Reader, key, crypto.SHA256, digest, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash})
	if err != nil {
		return nil, ckrGeneralError
	}
	return sig, ckrOK
}

func verifyPSS(pub *rsa.PublicKey, digest, sig []byte) rv {
	if len(digest) != sha256.Size {
		return ckrDataLenRange
	}
	if len(sig) != pub.Size() {
		return ckrSignatureLenRange
	}
	if rsa.VerifyPSS(pub, crypto.SHA256, digest, sig, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash}) != nil {
		return ckrSignatureInvalid
	}
	return ckrOK
}

// newDigest answers the hash of a digest mechanism.
func newDigest(op operation) hash.Hash {
	if op == opSHA256 {
		return sha256.New()
	}
	return sm3.New()
}

// newMAC answers HMAC-SM3, or CMAC with SM4, whose keys have 16 bytes.
func newMAC(op operation, key []byte) hash.Hash {
	if op == opHMACSM3 {
		return newHMAC(key)
	}
	block, err := sm4.NewCipher(key)
	if err != nil {
		panic(err) // an SM4 key has 16 bytes
	}
	return cbcmac.NewCMAC(block, sm4Size)
}

func exponentBytes(e int) []byte { return big.NewInt(int64(e)).Bytes() }

func newHMAC(key []byte) hash.Hash { return hmac.New(sm3.New, key) }

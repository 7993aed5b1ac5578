package softtoken

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"crypto/subtle"
	"hash"
	"slices"
	"time"

	"github.com/emmansun/gmsm/sm3"
)

// A signature is a running C_Sign or C_Verify operation.
type signature struct {
	row     *mechanism
	key     *object
	view    view      // when it began: a logout since then ends it
	hash    hash.Hash // mechanisms that take a message: what it has of it; nil for those that take a digest
	updated bool      // C_SignUpdate was called: only C_SignFinal may end it
}

// begin starts a signature; what says CKA_SIGN or CKA_VERIFY.
func (p *profile) begin(a *appSlot, m mechParam, handle, what uint64) (*signature, rv) {
	row := p.find(m.number)
	if row == nil || row.flags&ckfSign == 0 {
		return nil, ckrMechanismInvalid
	}
	id, code := row.readParam(m.param)
	if code != ckrOK {
		return nil, code
	}
	key, v := a.object(handle)
	if key == nil {
		return nil, ckrKeyHandleInvalid
	}
	attrs := key.attributes()
	if key.private() && v.role != user {
		return nil, ckrKeyHandleInvalid // the security officer sees keys that wrap, and does not use them
	}
	if !p.takes(row, key, what) {
		return nil, ckrKeyTypeInconsistent
	}
	if !attrs.bool(what) {
		return nil, ckrKeyFunctionNotPermitted
	}
	sig := &signature{row: row, key: key, view: v}
	switch row.op {
	case opSM2SignSM3:
		sig.hash = hashZA(key.sm2, id)
	case opSM2SignZM:
		sig.hash = sm3.New()
	case opSHA256RSAPKCS:
		sig.hash = sha256.New()
	case opHMACSM3, opSM4CMAC:
		_, whole := key.secret.use(func() rv { sig.hash = newMAC(row.op, key.secret.raw); return ckrOK })
		if !whole {
			return nil, ckrKeyHandleInvalid
		}
	}
	return sig, ckrOK
}

// readParam answers the signer's ID or the IV where the mechanism has one; readGCM reads that mechanism's.
func (m *mechanism) readParam(param []byte) ([]byte, rv) {
	switch {
	case m.param == paramNone && len(param) > 0, len(param) > maxSM2ID:
		return nil, ckrMechanismParamInvalid
	case m.param == paramPSS && !bytes.Equal(param, pssParams):
		return nil, ckrMechanismParamInvalid
	case m.param == paramIV && len(param) != sm4Size:
		return nil, ckrMechanismParamInvalid
	case (m.param == paramSM2ID || m.op == opSM2SignSM3) && len(param) == 0:
		return []byte(defaultSM2ID), ckrOK
	}
	return param, ckrOK
}

// pssParams is the one CK_RSA_PKCS_PSS_PARAMS that is taken, as it lies in memory: SHA-256, MGF1 with SHA-256, and a
// salt as long as the digest. PKCS#11 wants the hash and the mask's hash alike (mechanisms v2.40 §2.1.10); other
// digests are nobody's need here, and a shorter salt is weaker.
var pssParams = slices.Concat(ulong(ckmSHA256), ulong(ckgMGF1SHA256), ulong(sha256.Size))

// takes says whether a mechanism that signs or verifies works with such a key in that direction.
func (p *profile) takes(row *mechanism, key *object, what uint64) bool {
	attrs := key.attributes()
	class := attrs.class()
	want := uint64(ckoPrivateKey)
	if what == ckaVerify {
		want = ckoPublicKey
	}
	switch row.op {
	case opSM2Sign, opSM2SignSM3, opSM2SignZM:
		return class == want && key.sm2 != nil
	case opRSAPKCS, opSHA256RSAPKCS, opRSAPSS:
		return class == want && key.rsa != nil
	case opHMACSM3:
		return class == ckoSecretKey && attrs.ulong(ckaKeyType) == ckkGenericSecret
	case opSM4CMAC:
		return p.isSM4(attrs)
	}
	return false
}

// isSM4 says whether an object is an SM4 key.
func (p *profile) isSM4(attrs attributes) bool {
	return attrs.class() == ckoSecretKey && p.isSM4KeyType(attrs.ulong(ckaKeyType))
}

// isMAC says whether what it signs with is a secret key.
func (m *mechanism) isMAC() bool { return m.op == opHMACSM3 || m.op == opSM4CMAC }

// size is the longest signature that may come out.
func (s *signature) size() uint32 {
	switch {
	case s.row.isMAC():
		return uint32(s.hash.Size())
	case s.key.rsa != nil:
		return uint32(s.key.rsa.Size())
	case s.row.encoding == encDER:
		return 72
	}
	return 64
}

// alive says whether the operation outlived what happened since it began: a logout, or the key's end.
func (s *signature) alive(a *appSlot) bool { return s.key.alive(s.view, a) }

func (o *object) alive(v view, a *appSlot) bool {
	if o.dead.Load() {
		return false
	}
	return !o.private() || a.view().generation == v.generation
}

func (s *signature) update(data []byte) rv {
	if s.hash == nil {
		return ckrOperationNotInitialized // the mechanism signs in one part only
	}
	s.updated = true
	s.hash.Write(data)
	return ckrOK
}

// input answers what the key is applied to: the digest of what was written, or data as it is.
func (s *signature) input(data []byte) []byte {
	if s.hash == nil {
		return data
	}
	s.hash.Write(data)
	return s.hash.Sum(nil)
}

func (s *signature) rsaHash() crypto.Hash {
	if s.row.op == opSHA256RSAPKCS {
		return crypto.SHA256
	}
	return 0
}

// sign ends the operation with a signature over input.
func (s *signature) sign(input []byte) (out []byte, code rv) {
	if s.row.isMAC() {
		return input, ckrOK
	}
	key := s.key.secret
	code, whole := key.use(func() (code rv) {
		switch {
		case key.sm2 != nil:
			out, code = signSM2(key.sm2, input, s.row.encoding)
		case s.row.op == opRSAPSS:
			out, code = signPSS(key.rsa, input)
		default:
			out, code = signRSA(key.rsa, s.rsaHash(), input)
		}
		return code
	})
	if !whole {
		return nil, ckrOperationNotInitialized
	}
	return out, code
}

// check ends the operation by comparing a signature over input.
func (s *signature) check(input, sig []byte) rv {
	switch s.row.op {
	case opHMACSM3, opSM4CMAC:
		if len(sig) != len(input) {
			return ckrSignatureLenRange
		}
		if subtle.ConstantTimeCompare(sig, input) != 1 {
			return ckrSignatureInvalid
		}
		return ckrOK
	case opSM2Sign, opSM2SignSM3, opSM2SignZM:
		return verifySM2(s.key.sm2, input, sig, s.row.encoding)
	case opRSAPSS:
		return verifyPSS(s.key.rsa, input, sig)
	default:
		return verifyRSA(s.key.rsa, s.rsaHash(), input, sig)
	}
}

// take ends the session's signing or verifying operation and answers it if it may be completed: by one call of
// C_Sign or C_Verify (final false), or by C_SignFinal or C_VerifyFinal.
func take(op **signature, a *appSlot, final bool) (*signature, rv) {
	s := *op
	*op = nil
	if s == nil || !s.alive(a) || final && s.hash == nil || !final && s.updated {
		return nil, ckrOperationNotInitialized
	}
	return s, ckrOK
}

// A digest is a running C_Digest operation.
type digest struct {
	hash    hash.Hash
	updated bool
}

// A search is a running C_FindObjects operation: the handles that were not fetched yet.
type search struct{ rest []uint64 }

// serviceDelay waits until a machine of the given service time would have answered, or until done is closed.
func serviceDelay(started time.Time, service time.Duration, done <-chan struct{}) {
	if left := service - time.Since(started); left > 0 {
		timer := time.NewTimer(left)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-done:
		}
	}
}

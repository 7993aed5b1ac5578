package softtoken

import (
	"crypto/rsa"
	"crypto/x509"
	"math/big"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/smx509"
)

// A wrapping is what C_WrapKey and C_UnwrapKey have in common: the mechanism and its parameter.
//
// With SM4-GCM the token draws the nonce and puts it before the ciphertext, and the caller gives none: who could have
// a key of his and another wrapped under one nonce would know the other. It is the mechanism to use. SM4-CBC with
// padding is what vendors have; it says nothing about whether the wrapped key is the one that was wrapped, and whether
// an altered one can be unwrapped tells about its bytes.
type wrapping struct {
	row *mechanism
	iv  []byte
	gcm gcmParam
}

func (p *profile) readWrapping(m mechParam, flag uint64) (w wrapping, code rv) {
	w.row = p.find(m.number)
	if w.row == nil || w.row.flags&flag == 0 {
		return w, ckrMechanismInvalid
	}
	if w.row.param == paramGCM {
		w.gcm, code = readGCM(m.param, 0)
	} else {
		w.iv, code = w.row.readParam(m.param)
	}
	return w, code
}

// cipher is the operation that the wrapping is under a key, nil when that key is wiped.
func (w wrapping) cipher(key *object, encrypt bool) *ciphering {
	block := key.sm4()
	if block == nil {
		return nil
	}
	return &ciphering{row: w.row, encrypt: encrypt, block: block, iv: w.iv, gcm: w.gcm}
}

// mayWrap says whether key may leave under kek (base §5.13, C_WrapKey).
func (p *profile) mayWrap(kek, key *object, v view) rv {
	if kek == nil || kek.private() && v.role != user {
		return ckrWrappingKeyHandleInvalid
	}
	outer := kek.attributes()
	if !p.isSM4(outer) {
		return ckrWrappingKeyInconsistent
	}
	if !outer.bool(ckaWrap) {
		return ckrKeyFunctionNotPermitted
	}
	if key == nil || !v.mayTouch(key) {
		return ckrKeyHandleInvalid
	}
	attrs := key.attributes()
	switch {
	case key.secret == nil:
		return ckrKeyNotWrappable
	case !attrs.bool(ckaExtractable):
		return ckrKeyUnextractable
	case attrs.bool(ckaWrapWithTrusted) && !outer.bool(ckaTrusted):
		return ckrKeyNotWrappable
	}
	return ckrOK
}

// wrap answers the wrapped key: of a secret key the value, of a private key its PKCS#8 (RFC 5208; for SM2 the
// ECPrivateKey of GM/T 0009-2012 and RFC 5915 with the curve's OID).
func (w wrapping) wrap(kek, key *object) (out []byte, code rv) {
	c := w.cipher(kek, true)
	if c == nil {
		return nil, ckrWrappingKeyHandleInvalid
	}
	var plain []byte
	defer func() { clear(plain) }()
	code, whole := key.secret.use(func() rv {
		var err error
		switch k := key.secret; {
		case k.sm2 != nil:
			plain, err = smx509.MarshalPKCS8PrivateKey(k.sm2)
		case k.rsa != nil:
			plain, err = x509.MarshalPKCS8PrivateKey(k.rsa)
		default:
			plain = append(plain, k.raw...)
		}
		if err != nil {
			return ckrGeneralError
		}
		return ckrOK
	})
	if !whole {
		return nil, ckrKeyHandleInvalid
	}
	if code != ckrOK {
		return nil, code
	}
	if w.row.op == opSM4GCM {
		c.gcm.iv = randomBytes(gcmNonce)
	}
	out, code = c.run(plain, partWhole)
	return append(c.gcm.iv, out...), code
}

// unwrap makes a key of a template and a wrapped key. The new key is nobody's but this token's to believe in: it is
// not local, was perhaps known elsewhere, and is extractable only if the template says so, which under a trusted key
// means: under a trusted key again.
func (p *profile) unwrap(w wrapping, kek *object, wrapped []byte, templ []attribute) (*object, rv) {
	class := classOf(templ)
	switch class {
	case ckUnavailable:
		return nil, ckrTemplateIncomplete
	case ckoPrivateKey, ckoSecretKey:
	default:
		return nil, ckrTemplateInconsistent
	}
	attrs, code := readTemplate(templ, class, toUnwrap)
	if code != ckrOK {
		return nil, code
	}
	if _, ok := attrs[ckaKeyType]; !ok {
		return nil, ckrTemplateIncomplete
	}
	if kek.attributes().bool(ckaTrusted) {
		attrs.setDefault(ckaWrapWithTrusted, boolean(true))
		if attrs.bool(ckaExtractable) && !attrs.bool(ckaWrapWithTrusted) {
			return nil, ckrTemplateInconsistent
		}
	}
	c := w.cipher(kek, false)
	if c == nil {
		return nil, ckrUnwrappingKeyHandleInvalid
	}
	if w.row.op == opSM4GCM {
		if len(wrapped) < gcmNonce+gcmTag {
			return nil, ckrWrappedKeyLenRange
		}
		c.gcm.iv, wrapped = wrapped[:gcmNonce], wrapped[gcmNonce:]
	}
	if _, code := c.room(len(wrapped), partWhole); code != ckrOK {
		return nil, ckrWrappedKeyLenRange
	}
	plain, code := c.run(wrapped, partWhole)
	if code != ckrOK {
		return nil, ckrWrappedKeyInvalid
	}
	defer clear(plain)
	if class == ckoSecretKey {
		o, code := p.secretKey(attrs, attrs.ulong(ckaKeyType), ckUnavailable, plain)
		if code == ckrAttributeValueInvalid {
			code = ckrWrappedKeyInvalid
			if t := attrs.ulong(ckaKeyType); t != ckkGenericSecret && !p.isSM4KeyType(t) {
				code = ckrTemplateInconsistent
			}
		}
		return o, code
	}
	return p.privateKey(attrs, plain)
}

// usableSM2 is whether d is in [1, n-2] (GM/T 0003.1-2012 §6.1). The parser takes zero, and n-1, for which 1+d has no
// inverse.
func usableSM2(k *sm2.PrivateKey) bool {
	most := new(big.Int).Sub(k.Params().N, big.NewInt(2))
	return k.D.Sign() > 0 && k.D.Cmp(most) <= 0
}

// privateKey makes the private key of a PKCS#8, which must be of the template's type.
func (p *profile) privateKey(attrs attributes, der []byte) (*object, rv) {
	keyType := attrs.ulong(ckaKeyType)
	if keyType != ckkRSA && !p.isSM2KeyType(keyType) {
		return nil, ckrTemplateInconsistent
	}
	if v, ok := attrs[ckaECParams]; ok && (keyType == ckkRSA || string(v) != string(sm2Params)) {
		return nil, ckrTemplateInconsistent
	}
	attrs.complete(ckoPrivateKey, true)
	if code := attrs.completeSecret(false); code != ckrOK {
		return nil, code
	}
	attrs.completeKey(keyType, ckUnavailable)
	key, err := smx509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, ckrWrappedKeyInvalid
	}
	s := new(secret)
	switch k := key.(type) {
	case *sm2.PrivateKey:
		if keyType == ckkRSA || !usableSM2(k) {
			return nil, ckrWrappedKeyInvalid
		}
		s.sm2, attrs[ckaECParams] = k, sm2Params
	case *rsa.PrivateKey:
		if keyType != ckkRSA {
			return nil, ckrWrappedKeyInvalid
		}
		s.rsa, attrs[ckaModulus], attrs[ckaPublicExponent] = k, k.N.Bytes(), exponentBytes(k.E)
		if _, err := parseRSA(attrs); err != nil {
			return nil, ckrWrappedKeyInvalid
		}
	default:
		return nil, ckrWrappedKeyInvalid
	}
	return privateObject(attrs, s), ckrOK
}

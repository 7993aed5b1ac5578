package softtoken

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math/big"
	"slices"
	"sync/atomic"

	"github.com/emmansun/gmsm/sm2"
)

// An object is one PKCS#11 object, opened. A private token object exists only while its token is unlocked.
type object struct {
	attrs  atomic.Pointer[attributes]
	secret *secret          // private and secret keys
	sm2    *ecdsa.PublicKey // SM2 keys
	rsa    *rsa.PublicKey   // RSA keys
	seq    uint64           // order of appearance
	item   *item            // where it is stored; nil for a session object
	owner  *session         // whose session object it is
	dead   atomic.Bool      // destroyed, or its token is locked
	uses   atomic.Uint64    // signatures of a session object; a token object's are in the token's useCounts
}

func (o *object) attributes() attributes { return *o.attrs.Load() }
func (o *object) private() bool          { return o.attributes().bool(ckaPrivate) }

// discard makes handles of the object invalid everywhere and wipes its key.
func (o *object) discard() {
	o.dead.Store(true)
	o.secret.wipe()
}

var objectSeq atomic.Uint64

// newObject reads the keys out of attributes and, for private and secret keys, from what secret.marshal wrote.
func newObject(attrs attributes, secretBytes []byte) (*object, error) {
	o := &object{seq: objectSeq.Add(1)}
	o.attrs.Store(&attrs)
	var err error
	switch attrs.class() {
	case ckoPublicKey:
		if _, ok := attrs[ckaModulus]; ok {
			o.rsa, err = parseRSA(attrs)
		} else {
			o.sm2, err = parsePoint(attrs[ckaECPoint])
		}
	case ckoPrivateKey:
		if _, ok := attrs[ckaModulus]; ok {
			var key *rsa.PrivateKey
			if key, err = x509.ParsePKCS1PrivateKey(secretBytes); err == nil {
				o.secret, o.rsa = &secret{rsa: key}, &key.PublicKey
			}
		} else if o.secret, err = newSM2Secret(secretBytes); err == nil {
			o.sm2 = &o.secret.sm2.PublicKey
		}
	case ckoSecretKey:
		o.secret = &secret{raw: bytes.Clone(secretBytes)}
	case ckoData, ckoCertificate:
	default:
		err = fmt.Errorf("class %d", attrs.class())
	}
	if err != nil {
		return nil, err
	}
	return o, nil
}

// privateObject is newObject for a private key that was read already.
func privateObject(attrs attributes, s *secret) *object {
	o := &object{seq: objectSeq.Add(1), secret: s}
	o.attrs.Store(&attrs)
	if s.sm2 != nil {
		o.sm2 = &s.sm2.PublicKey
	} else {
		o.rsa = &s.rsa.PublicKey
	}
	return o
}

func parseRSA(attrs attributes) (*rsa.PublicKey, error) {
	n, e := new(big.Int).SetBytes(attrs[ckaModulus]), new(big.Int).SetBytes(attrs[ckaPublicExponent])
	// crypto/rsa takes odd exponents of up to 31 bits; shorter moduli are not to be relied upon.
	if n.BitLen() < 2048 || n.BitLen() > 4096 || n.Bit(0) == 0 || e.BitLen() > 31 || e.Bit(0) == 0 || e.Cmp(big.NewInt(3)) < 0 {
		return nil, errors.New("not an RSA key of 2048 to 4096 bits")
	}
	return &rsa.PublicKey{N: n, E: int(e.Int64())}, nil
}

// encodeObject writes what newObject reads: u32 count | count × (u64 type | u32 length | value) | u32 length | secret.
// Attributes stand in order of their type, so that an object has one encoding.
func encodeObject(attrs attributes, secretBytes []byte) []byte {
	var w builder
	w.u32(uint32(len(attrs)))
	for _, typ := range slices.Sorted(maps.Keys(attrs)) {
		w.u64(typ)
		w.string(attrs[typ])
	}
	w.string(secretBytes)
	return w.b
}

// decodeObject is the inverse of encodeObject. What it answers does not borrow b.
func decodeObject(b []byte) (attributes, []byte, error) {
	in := scanner{b: b}
	n := in.count(12)
	attrs := make(attributes, n)
	for last := int64(-1); n > 0; n-- {
		typ := in.u64()
		if in.bad || int64(typ) <= last {
			return nil, nil, errors.New("object's attributes are out of order")
		}
		last = int64(typ)
		attrs[typ] = append([]byte{}, in.string()...)
	}
	secretBytes := bytes.Clone(in.string())
	if in.bad || len(in.b) != 0 {
		clear(secretBytes)
		return nil, nil, errors.New("object of a wrong length")
	}
	return attrs, secretBytes, nil
}

// size is CK_ULONG of C_GetObjectSize: the bytes of the attributes.
func (o *object) size() uint64 {
	var n uint64
	for _, v := range o.attributes() {
		n += 12 + uint64(len(v))
	}
	return n
}

// generatePair makes a key pair from two templates (C_GenerateKeyPair).
func (p *profile) generatePair(m mechParam, publicT, privateT []attribute) (public, private *object, code rv) {
	row := p.find(m.number)
	if row == nil || row.flags&ckfGenerateKeyPair == 0 {
		return nil, nil, ckrMechanismInvalid
	}
	if len(m.param) != 0 {
		return nil, nil, ckrMechanismParamInvalid
	}
	publicT, privateT, code = p.quirks.template(row.op, publicT, privateT)
	if code != ckrOK {
		return nil, nil, code
	}
	pub, code := readTemplate(publicT, ckoPublicKey, toGenerate)
	if code != ckrOK {
		return nil, nil, code
	}
	priv, code := readTemplate(privateT, ckoPrivateKey, toGenerate)
	if code != ckrOK {
		return nil, nil, code
	}
	pub.complete(ckoPublicKey, false)
	priv.complete(ckoPrivateKey, true)
	if code := priv.completeSecret(true); code != ckrOK {
		return nil, nil, code
	}
	pub.completePublic()
	var key *secret
	switch row.op {
	case opGenSM2:
		key, code = p.generateSM2(row, pub, priv)
	case opGenRSA:
		key, code = generateRSA(row, pub, priv)
	default:
		code = ckrMechanismInvalid
	}
	if code != ckrOK {
		return nil, nil, code
	}
	return assemblePair(pub, priv, key)
}

// assemblePair makes the two objects around one key, as if they had been read from disk.
func assemblePair(pub, priv attributes, key *secret) (public, private *object, code rv) {
	secretBytes := key.marshal()
	key.wipe()
	defer clear(secretBytes)
	public, err := newObject(pub, nil)
	if err != nil {
		return nil, nil, ckrGeneralError
	}
	private, err = newObject(priv, secretBytes)
	if err != nil {
		return nil, nil, ckrGeneralError
	}
	return public, private, ckrOK
}

// keyTypeOf reads CKA_KEY_TYPE from both templates; they must agree where they name it.
func keyTypeOf(pub, priv attributes, otherwise uint64) (uint64, rv) {
	keyType := otherwise
	a, b := pub[ckaKeyType], priv[ckaKeyType]
	switch {
	case a != nil && b != nil && !bytes.Equal(a, b):
		return 0, ckrTemplateInconsistent
	case a != nil:
		keyType = pub.ulong(ckaKeyType)
	case b != nil:
		keyType = priv.ulong(ckaKeyType)
	}
	return keyType, ckrOK
}

func (p *profile) generateSM2(row *mechanism, pub, priv attributes) (*secret, rv) {
	otherwise := p.sm2KeyType
	standard := row.number == ckmECKeyPairGen
	if standard {
		otherwise = ckkEC
	}
	keyType, code := keyTypeOf(pub, priv, otherwise)
	if code != ckrOK {
		return nil, code
	}
	if !p.isSM2KeyType(keyType) || standard && keyType != ckkEC {
		return nil, ckrTemplateInconsistent
	}
	params, given := pub[ckaECParams]
	if standard && !given {
		return nil, ckrTemplateIncomplete
	}
	if given && !bytes.Equal(params, sm2Params) {
		return nil, ckrCurveNotSupported
	}
	if v, ok := priv[ckaECParams]; ok && !bytes.Equal(v, sm2Params) {
		return nil, ckrTemplateInconsistent
	}
	for _, typ := range []uint64{ckaModulusBits, ckaPublicExponent} {
		if _, ok := pub[typ]; ok {
			return nil, ckrTemplateInconsistent
		}
	}
	key, err := sm2.GenerateKey(rand.Reader)
	if err != nil {
		return nil, ckrGeneralError
	}
	pub.completeKey(keyType, row.number)
	priv.completeKey(keyType, row.number)
	pub[ckaECParams], priv[ckaECParams] = sm2Params, sm2Params
	pub[ckaECPoint] = sm2Point(&key.PublicKey)
	return &secret{sm2: key}, ckrOK
}

func generateRSA(row *mechanism, pub, priv attributes) (*secret, rv) {
	keyType, code := keyTypeOf(pub, priv, ckkRSA)
	if code != ckrOK {
		return nil, code
	}
	_, curve := pub[ckaECParams]
	_, curve2 := priv[ckaECParams]
	if keyType != ckkRSA || curve || curve2 {
		return nil, ckrTemplateInconsistent
	}
	if _, ok := pub[ckaModulusBits]; !ok {
		return nil, ckrTemplateIncomplete
	}
	bits := pub.ulong(ckaModulusBits)
	if bits < row.min || bits > row.max || bits%1024 != 0 {
		return nil, ckrAttributeValueInvalid
	}
	exponent := []byte{1, 0, 1}
	if v, ok := pub[ckaPublicExponent]; ok && !bytes.Equal(bytes.TrimLeft(v, "\x00"), exponent) {
		return nil, ckrAttributeValueInvalid // crypto/rsa generates for 65537 only
	}
	key, err := rsa.GenerateKey(rand.Reader, int(bits))
	if err != nil {
		return nil, ckrGeneralError
	}
	for _, attrs := range []attributes{pub, priv} {
		attrs.completeKey(keyType, row.number)
		attrs[ckaModulus], attrs[ckaPublicExponent] = key.N.Bytes(), exponent
	}
	return &secret{rsa: key}, ckrOK
}

// generateSecret makes a generic secret key or one of SM4 (C_GenerateKey).
func (p *profile) generateSecret(m mechParam, templ []attribute) (*object, rv) {
	row := p.find(m.number)
	if row == nil || row.op != opGenSecret && row.op != opGenSM4 {
		return nil, ckrMechanismInvalid
	}
	if len(m.param) != 0 {
		return nil, ckrMechanismParamInvalid
	}
	_, templ, code := p.quirks.template(row.op, nil, templ)
	if code != ckrOK {
		return nil, code
	}
	attrs, code := readTemplate(templ, ckoSecretKey, toGenerate)
	if code != ckrOK {
		return nil, code
	}
	want := uint64(ckkGenericSecret)
	if row.op == opGenSM4 {
		want = p.sm4KeyType
		attrs.setDefault(ckaValueLen, ulong(sm4Size))
	}
	if keyType, _ := keyTypeOf(attrs, nil, want); keyType != want {
		return nil, ckrTemplateInconsistent
	}
	if _, ok := attrs[ckaValueLen]; !ok {
		return nil, ckrTemplateIncomplete
	}
	size := attrs.ulong(ckaValueLen)
	if size < row.min || size > row.max {
		return nil, ckrAttributeValueInvalid
	}
	value := randomBytes(int(size))
	defer clear(value)
	return p.secretKey(attrs, want, row.number, value)
}

// secretKey makes a secret key of a template that was read; mech is CK_UNAVAILABLE_INFORMATION for one that comes from
// outside.
func (p *profile) secretKey(attrs attributes, keyType, mech uint64, value []byte) (*object, rv) {
	minSize, maxSize := minSecret, maxSecret
	switch {
	case p.isSM4KeyType(keyType):
		minSize, maxSize = sm4Size, sm4Size
	case keyType != ckkGenericSecret:
		return nil, ckrAttributeValueInvalid
	}
	if len(value) < minSize || len(value) > maxSize {
		return nil, ckrAttributeValueInvalid
	}
	attrs.complete(ckoSecretKey, true)
	code := attrs.completeSecret(mech != ckUnavailable)
	if code == ckrOK {
		code = attrs.completePurpose(p.isSM4KeyType(keyType))
	}
	if code != ckrOK {
		return nil, code
	}
	attrs.completeKey(keyType, mech)
	attrs[ckaValueLen] = ulong(uint64(len(value)))
	o, err := newObject(attrs, value)
	if err != nil {
		return nil, ckrGeneralError
	}
	return o, ckrOK
}

// createObject makes an object from what the caller brings (C_CreateObject): data, an X.509 certificate, a public key
// or a secret key. Private keys are generated here or unwrapped, and never brought in the clear.
func (p *profile) createObject(templ []attribute) (*object, rv) {
	class := classOf(templ)
	switch class {
	case ckUnavailable:
		return nil, ckrTemplateIncomplete
	case ckoSecretKey:
		return p.importSecret(templ)
	case ckoData, ckoCertificate, ckoPublicKey:
	default:
		return nil, ckrAttributeValueInvalid
	}
	attrs, code := readTemplate(templ, class, toCreate)
	if code != ckrOK {
		return nil, code
	}
	attrs.complete(class, false)
	switch class {
	case ckoData:
		for _, typ := range []uint64{ckaApplication, ckaObjectID, ckaValue} {
			attrs.setDefault(typ, []byte{})
		}
	case ckoCertificate:
		code = completeCertificate(attrs)
	case ckoPublicKey:
		code = p.completeImported(attrs)
	}
	if code != ckrOK {
		return nil, code
	}
	o, err := newObject(attrs, nil)
	if err != nil {
		return nil, ckrAttributeValueInvalid
	}
	return o, ckrOK
}

// classOf answers the CKA_CLASS of a template, CK_UNAVAILABLE_INFORMATION when there is none.
func classOf(templ []attribute) uint64 {
	for _, t := range templ {
		if t.typ == ckaClass && len(t.value) == 8 {
			return binary.NativeEndian.Uint64(t.value)
		}
	}
	return ckUnavailable
}

// importSecret makes a secret key of a value that the caller knows; it says for ever that it was not made here.
func (p *profile) importSecret(templ []attribute) (*object, rv) {
	var value []byte
	rest := make([]attribute, 0, len(templ))
	for _, t := range templ {
		if t.typ != ckaValue {
			rest = append(rest, t)
		} else if value != nil {
			return nil, ckrTemplateInconsistent
		} else {
			value = t.value
		}
	}
	attrs, code := readTemplate(rest, ckoSecretKey, toCreate)
	if code != ckrOK {
		return nil, code
	}
	if _, ok := attrs[ckaKeyType]; !ok || value == nil {
		return nil, ckrTemplateIncomplete
	}
	return p.secretKey(attrs, attrs.ulong(ckaKeyType), ckUnavailable, value)
}

// copyOf makes another object with the same key (C_CopyObject). The security officer's word is not copied.
func (o *object) copyOf(templ []attribute, r role) (*object, rv) {
	attrs := o.attributes()
	if !attrs.bool(ckaCopyable) {
		return nil, ckrActionProhibited
	}
	changes, code := readTemplate(templ, attrs.class(), toCopy)
	if code != ckrOK {
		return nil, code
	}
	if code := attrs.tightens(changes, r); code != ckrOK {
		return nil, code
	}
	attrs = attrs.with(changes)
	if _, ok := attrs[ckaTrusted]; ok {
		attrs[ckaTrusted] = boolean(false)
	}
	var secretBytes []byte
	if o.secret != nil {
		if _, whole := o.secret.use(func() rv { secretBytes = o.secret.marshal(); return ckrOK }); !whole {
			return nil, ckrObjectHandleInvalid
		}
		defer func() { clear(secretBytes) }()
	}
	fresh, err := newObject(attrs, secretBytes)
	if err != nil {
		return nil, ckrGeneralError
	}
	return fresh, ckrOK
}

func completeCertificate(attrs attributes) rv {
	for _, typ := range []uint64{ckaCertificateType, ckaSubject, ckaValue} {
		if _, ok := attrs[typ]; !ok {
			return ckrTemplateIncomplete
		}
	}
	if attrs.ulong(ckaCertificateType) != ckcX509 {
		return ckrAttributeValueInvalid
	}
	attrs.setDefault(ckaCertificateCat, ulong(0))
	attrs.setDefault(ckaTrusted, boolean(false))
	for _, typ := range []uint64{ckaID, ckaIssuer, ckaSerialNumber, ckaStartDate, ckaEndDate} {
		attrs.setDefault(typ, []byte{})
	}
	return ckrOK
}

func (p *profile) completeImported(attrs attributes) rv {
	required := []uint64{ckaModulus, ckaPublicExponent}
	other := []uint64{ckaECParams, ckaECPoint}
	keyType := attrs.ulong(ckaKeyType)
	switch {
	case keyType == ckUnavailable:
		return ckrTemplateIncomplete
	case p.isSM2KeyType(keyType):
		required, other = other, required
	case keyType != ckkRSA:
		return ckrAttributeValueInvalid
	}
	for _, typ := range other {
		if _, ok := attrs[typ]; ok {
			return ckrTemplateInconsistent
		}
	}
	for _, typ := range required {
		if _, ok := attrs[typ]; !ok {
			return ckrTemplateIncomplete
		}
	}
	if keyType == ckkRSA {
		key, err := parseRSA(attrs)
		if err != nil {
			return ckrAttributeValueInvalid
		}
		attrs[ckaModulus], attrs[ckaModulusBits] = key.N.Bytes(), ulong(uint64(key.N.BitLen()))
	} else {
		if !bytes.Equal(attrs[ckaECParams], sm2Params) {
			return ckrCurveNotSupported
		}
		pub, err := parsePoint(attrs[ckaECPoint])
		if err != nil {
			return ckrAttributeValueInvalid
		}
		attrs[ckaECPoint] = sm2Point(pub)
	}
	attrs.completePublic()
	attrs.completeKey(keyType, ckUnavailable)
	return ckrOK
}

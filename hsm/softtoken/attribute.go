package softtoken

import (
	"bytes"
	"encoding/binary"
	"maps"
	"slices"
)

// An attrForm is how an attribute's value lies in memory.
type attrForm int

const (
	formBytes attrForm = iota
	formBool           // CK_BBOOL, 1 byte, 0 or 1
	formULong          // CK_ULONG, 8 bytes
	formDate           // CK_DATE, 8 bytes, or empty
)

// Object classes as bits, for the table.
const (
	onData = 1 << iota
	onCert
	onPublic
	onPrivate
	onSecret

	onKeys = onPublic | onPrivate | onSecret
	onAll  = onData | onCert | onKeys
)

func classBit(class uint64) int {
	if class > ckoSecretKey {
		return 0
	}
	return 1 << class
}

// An attrSpec says which objects have an attribute and who may give it a value.
type attrSpec struct {
	form   attrForm
	on     int // classes that have it
	create int // classes whose C_CreateObject template may name it
	gen    int // classes whose generation template may name it
	modify int // classes on which C_SetAttributeValue may change it
}

// attrSpecs is base §4.4–4.10 as far as this token goes. An attribute that is not here is CKR_ATTRIBUTE_TYPE_INVALID;
// one that is, but not for the call, is CKR_ATTRIBUTE_READ_ONLY.
var attrSpecs = map[uint64]attrSpec{
	ckaClass:              {formULong, onAll, onAll, onKeys, 0},
	ckaToken:              {formBool, onAll, onAll, onKeys, 0},
	ckaPrivate:            {formBool, onAll, onAll, onKeys, 0},
	ckaLabel:              {formBytes, onAll, onAll, onKeys, onAll},
	ckaModifiable:         {formBool, onAll, onAll, onKeys, 0},
	ckaCopyable:           {formBool, onAll, onAll, onKeys, onAll},
	ckaDestroyable:        {formBool, onAll, onAll, onKeys, 0},
	ckaApplication:        {formBytes, onData, onData, 0, 0},
	ckaObjectID:           {formBytes, onData, onData, 0, 0},
	ckaValue:              {formBytes, onData | onCert, onData | onCert, 0, 0},
	ckaCertificateType:    {formULong, onCert, onCert, 0, 0},
	ckaCertificateCat:     {formULong, onCert, onCert, 0, 0},
	ckaIssuer:             {formBytes, onCert, onCert, 0, onCert},
	ckaSerialNumber:       {formBytes, onCert, onCert, 0, onCert},
	ckaTrusted:            {formBool, onCert | onPublic | onSecret, onCert | onPublic | onSecret, onPublic | onSecret, onCert | onPublic | onSecret},
	ckaSubject:            {formBytes, onCert | onPublic | onPrivate, onCert | onPublic, onPublic | onPrivate, onPublic | onPrivate},
	ckaID:                 {formBytes, onCert | onKeys, onCert | onPublic | onSecret, onKeys, onCert | onKeys},
	ckaKeyType:            {formULong, onKeys, onPublic | onSecret, onKeys, 0},
	ckaStartDate:          {formDate, onCert | onKeys, onCert | onPublic | onSecret, onKeys, 0},
	ckaEndDate:            {formDate, onCert | onKeys, onCert | onPublic | onSecret, onKeys, 0},
	ckaDerive:             {formBool, onKeys, onPublic | onSecret, onKeys, onKeys},
	ckaEncrypt:            {formBool, onPublic | onSecret, onPublic | onSecret, onPublic | onSecret, onPublic | onSecret},
	ckaVerify:             {formBool, onPublic | onSecret, onPublic | onSecret, onPublic | onSecret, onPublic | onSecret},
	ckaVerifyRecover:      {formBool, onPublic, onPublic, onPublic, onPublic},
	ckaWrap:               {formBool, onPublic | onSecret, onPublic | onSecret, onPublic | onSecret, onPublic | onSecret},
	ckaDecrypt:            {formBool, onPrivate | onSecret, onSecret, onPrivate | onSecret, onPrivate | onSecret},
	ckaSign:               {formBool, onPrivate | onSecret, onSecret, onPrivate | onSecret, onPrivate | onSecret},
	ckaSignRecover:        {formBool, onPrivate, 0, onPrivate, onPrivate},
	ckaUnwrap:             {formBool, onPrivate | onSecret, onSecret, onPrivate | onSecret, onPrivate | onSecret},
	ckaSensitive:          {formBool, onPrivate | onSecret, onSecret, onPrivate | onSecret, onPrivate | onSecret},
	ckaExtractable:        {formBool, onPrivate | onSecret, onSecret, onPrivate | onSecret, onPrivate | onSecret},
	ckaWrapWithTrusted:    {formBool, onPrivate | onSecret, onSecret, onPrivate | onSecret, onPrivate | onSecret},
	ckaAlwaysAuthenticate: {formBool, onPrivate, 0, onPrivate, 0},
	ckaLocal:              {formBool, onKeys, 0, 0, 0},
	ckaAlwaysSensitive:    {formBool, onPrivate | onSecret, 0, 0, 0},
	ckaNeverExtractable:   {formBool, onPrivate | onSecret, 0, 0, 0},
	ckaKeyGenMechanism:    {formULong, onKeys, 0, 0, 0},
	ckaModulus:            {formBytes, onPublic | onPrivate, onPublic, 0, 0},
	ckaModulusBits:        {formULong, onPublic, 0, onPublic, 0},
	ckaPublicExponent:     {formBytes, onPublic | onPrivate, onPublic, onPublic, 0},
	ckaECParams:           {formBytes, onPublic | onPrivate, onPublic, onPublic | onPrivate, 0},
	ckaECPoint:            {formBytes, onPublic, onPublic, 0, 0},
	ckaValueLen:           {formULong, onSecret, 0, onSecret, 0},
}

const (
	maxDataValue = 64 << 10
	maxAttribute = 4 << 10
)

// attributes are an object's attributes by type. They do not change once an object has them: a change makes a copy.
type attributes map[uint64][]byte

func (a attributes) bool(typ uint64) bool { v := a[typ]; return len(v) == 1 && v[0] == 1 }

// ulong answers a CK_ULONG, CK_UNAVAILABLE_INFORMATION when there is none.
func (a attributes) ulong(typ uint64) uint64 {
	if v := a[typ]; len(v) == 8 {
		return binary.NativeEndian.Uint64(v)
	}
	return ckUnavailable
}

func (a attributes) class() uint64 { return a.ulong(ckaClass) }

// with answers a copy in which changes take the place of what was there.
func (a attributes) with(changes attributes) attributes {
	out := maps.Clone(a)
	maps.Copy(out, changes)
	return out
}

// matches says whether the object has every attribute of the template, with that value (base §5.7, C_FindObjectsInit).
func (a attributes) matches(templ []attribute) bool {
	for _, t := range templ {
		v, ok := a[t.typ]
		if !ok || !bytes.Equal(v, t.value) {
			return false
		}
	}
	return true
}

// setDefault gives typ a value if the template did not.
func (a attributes) setDefault(typ uint64, value []byte) {
	if _, ok := a[typ]; !ok {
		a[typ] = value
	}
}

// A purpose is the call whose template is read.
type purpose int

const (
	toCreate purpose = iota
	toGenerate
	toModify
	toCopy
	toUnwrap
)

// readTemplate checks a template for an object of class and answers a copy of it. What depends on several attributes
// at once, or on the key, is the caller's to check.
func readTemplate(templ []attribute, class uint64, why purpose) (attributes, rv) {
	bit := classBit(class)
	out := make(attributes, len(templ)+12)
	for _, t := range templ {
		spec, known := attrSpecs[t.typ]
		if !known {
			return nil, ckrAttributeTypeInvalid
		}
		if spec.on&bit == 0 {
			if sensitive(class, t.typ) {
				return nil, ckrTemplateInconsistent
			}
			return nil, ckrAttributeTypeInvalid
		}
		allowed := [...]int{toCreate: spec.create, toGenerate: spec.gen, toModify: spec.modify, toCopy: spec.modify, toUnwrap: spec.gen}[why]
		if why == toCopy && slices.Contains(copyChanges, t.typ) {
			allowed = onAll
		}
		if allowed&bit == 0 || why == toUnwrap && t.typ == ckaValueLen {
			return nil, ckrAttributeReadOnly
		}
		if !wellFormed(t, spec.form) {
			return nil, ckrAttributeValueInvalid
		}
		if _, twice := out[t.typ]; twice {
			return nil, ckrTemplateInconsistent
		}
		out[t.typ] = bytes.Clone(t.value)
		if out[t.typ] == nil {
			out[t.typ] = []byte{}
		}
	}
	if v, ok := out[ckaClass]; ok && !bytes.Equal(v, ulong(class)) {
		return nil, ckrTemplateInconsistent
	}
	if out.bool(ckaTrusted) && why != toModify {
		return nil, ckrAttributeReadOnly // only the security officer vouches, and for what is there: C_SetAttributeValue
	}
	return out, ckrOK
}

// copyChanges are what a copy may have otherwise than its original and an object cannot have changed.
var copyChanges = []uint64{ckaToken, ckaPrivate, ckaModifiable, ckaDestroyable}

// tightens says whether the changes take nothing back that protects an object: CKA_SENSITIVE, CKA_WRAP_WITH_TRUSTED
// and, in a copy, CKA_PRIVATE go from false to true alone; CKA_TRUSTED does by the security officer alone; every other
// boolean, uses of a key above all, goes from true to false. PKCS#11 leaves uses to be widened; this token does not.
func (a attributes) tightens(changes attributes, r role) rv {
	if changes.bool(ckaTrusted) && a.class() == ckoSecretKey && (!a.bool(ckaWrap) || a.with(changes).bool(ckaExtractable)) {
		return ckrTemplateInconsistent // what a trusted key guards must not leave with it
	}
	for typ, v := range changes {
		if attrSpecs[typ].form != formBool || typ == ckaToken || typ == ckaDestroyable || bytes.Equal(a[typ], v) {
			continue
		}
		may := v[0] == 0
		switch typ {
		case ckaSensitive, ckaWrapWithTrusted, ckaPrivate:
			may = v[0] == 1
		case ckaTrusted:
			may = may || r == officer
		}
		if !may {
			return ckrAttributeReadOnly
		}
	}
	return ckrOK
}

func wellFormed(t attribute, form attrForm) bool {
	switch form {
	case formBool:
		return len(t.value) == 1 && t.value[0] <= 1
	case formULong:
		return len(t.value) == 8
	case formDate:
		if len(t.value) != 8 {
			return len(t.value) == 0
		}
		for _, c := range t.value {
			if c < '0' || c > '9' {
				return false
			}
		}
		return true
	default:
		if t.typ == ckaValue {
			return len(t.value) <= maxDataValue
		}
		return len(t.value) <= maxAttribute
	}
}

// sensitive says whether typ is the secret part of a key (base table 16 and mechanisms §2): CKA_VALUE, or RSA's
// private exponent to coefficient.
func sensitive(class, typ uint64) bool {
	if class != ckoPrivateKey && class != ckoSecretKey {
		return false
	}
	return typ == ckaValue || class == ckoPrivateKey && typ >= ckaPrivateExponent && typ <= ckaCoefficient
}

// complete gives an object of any class what every object has.
func (a attributes) complete(class uint64, private bool) {
	a[ckaClass] = ulong(class)
	a.setDefault(ckaToken, boolean(false))
	a.setDefault(ckaPrivate, boolean(private))
	a.setDefault(ckaLabel, []byte{})
	a.setDefault(ckaModifiable, boolean(true))
	a.setDefault(ckaCopyable, boolean(class != ckoPrivateKey)) // a copy would sign beside the original's count of uses
	a.setDefault(ckaDestroyable, boolean(true))
}

// completeKey adds what every key has. mech is CK_UNAVAILABLE_INFORMATION for a key that was not made here.
func (a attributes) completeKey(keyType, mech uint64) {
	a[ckaKeyType] = ulong(keyType)
	a.setDefault(ckaID, []byte{})
	a.setDefault(ckaStartDate, []byte{})
	a.setDefault(ckaEndDate, []byte{})
	a.setDefault(ckaDerive, boolean(false))
	a[ckaLocal] = boolean(mech != ckUnavailable)
	a[ckaKeyGenMechanism] = ulong(mech)
}

func (a attributes) completePublic() {
	a.setDefault(ckaSubject, []byte{})
	a.setDefault(ckaVerify, boolean(!a.bool(ckaEncrypt)))
	for _, typ := range []uint64{ckaEncrypt, ckaVerifyRecover, ckaWrap, ckaTrusted} {
		a.setDefault(typ, boolean(false))
	}
}

// completeSecret adds what private and secret keys have, and refuses a template that would have the key lie open: on
// this token every such key is private and sensitive, and leaves, if it is extractable at all, wrapped. local says that
// the key was made here: another has been known elsewhere, and says so for ever.
func (a attributes) completeSecret(local bool) rv {
	for _, typ := range []uint64{ckaPrivate, ckaSensitive} {
		if _, given := a[typ]; given && !a.bool(typ) {
			return ckrTemplateInconsistent
		}
		a[typ] = boolean(true)
	}
	if a.class() == ckoPrivateKey && a.bool(ckaCopyable) {
		return ckrTemplateInconsistent
	}
	if a.bool(ckaAlwaysAuthenticate) {
		return ckrAttributeValueInvalid // a context-specific login is not offered
	}
	a.setDefault(ckaExtractable, boolean(false))
	a.setDefault(ckaWrapWithTrusted, boolean(false))
	a[ckaAlwaysSensitive], a[ckaNeverExtractable] = boolean(local), boolean(local && !a.bool(ckaExtractable))
	if a.class() == ckoPrivateKey {
		a.setDefault(ckaSubject, []byte{})
		a.setDefault(ckaSign, boolean(!a.bool(ckaDecrypt)))
		for _, typ := range []uint64{ckaDecrypt, ckaUnwrap, ckaSignRecover, ckaAlwaysAuthenticate} {
			a.setDefault(typ, boolean(false))
		}
	}
	return ckrOK
}

// completePurpose adds the uses of a secret key. One of SM4 serves data, authentication or other keys: who could wrap
// with a key and decrypt with it, or could encrypt and make the MAC of one, would get at what the other use protects.
func (a attributes) completePurpose(sm4 bool) rv {
	a.setDefault(ckaTrusted, boolean(false))
	wraps := a.bool(ckaWrap) || a.bool(ckaUnwrap)
	if wraps {
		a[ckaCopyable] = boolean(false) // a copy would not be trusted, and unwrap what only a trusted key may
	}
	if sm4 {
		var purposes int
		for _, of := range [][2]uint64{{ckaEncrypt, ckaDecrypt}, {ckaSign, ckaVerify}, {ckaWrap, ckaUnwrap}} {
			if a.bool(of[0]) || a.bool(of[1]) {
				purposes++
			}
		}
		if purposes > 1 {
			return ckrTemplateInconsistent
		}
		a.setDefault(ckaEncrypt, boolean(purposes == 0))
		a.setDefault(ckaDecrypt, boolean(purposes == 0))
	} else {
		a.setDefault(ckaSign, boolean(true))
		a.setDefault(ckaVerify, boolean(true))
	}
	for _, typ := range []uint64{ckaEncrypt, ckaDecrypt, ckaSign, ckaVerify, ckaWrap, ckaUnwrap} {
		a.setDefault(typ, boolean(false))
	}
	return ckrOK
}

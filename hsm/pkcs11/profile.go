package pkcs11

import (
	"encoding/asn1"
	"fmt"
	"slices"

	p11 "github.com/miekg/pkcs11"

	"yinjian/hsm"
)

// A Profile maps logical operations to one vendor's numbers, forms and templates: PKCS#11 v2.40 defines none for
// SM2, SM3 and SM4, and the vendors' tables contradict each other.
type Profile struct {
	Name       string
	Operations map[hsm.Operation]Mechanism
	Keys       map[hsm.Algorithm]KeyTemplate
	// UseCounter is the attribute (CK_ULONG) of a private key that counts its signatures; 0: the machine has none.
	// PKCS#11 v2.40 defines no such attribute, and few machines do.
	UseCounter uint
}

// A Mechanism says how one operation is asked for.
type Mechanism struct {
	Type      uint   // CKM_*, any 64-bit number
	Parameter []byte // pParameter as it stands; empty: none
	Input     Input
	Output    Output
}

// Input is the form in which the module wants the data.
type Input int

const (
	InputPlain      Input = iota // e, digest or message as the operation has it
	InputDigestInfo              // the DER of DigestInfo with SHA-256 (RFC 8017 §9.2), for CKM_RSA_PKCS
)

// Output is the form in which the module answers a signature.
type Output int

const (
	OutputAuto  Output = iota // not judged here; hsm.NormalizeSM2 reads raw and DER
	OutputRaw64               // r ‖ s, 64 bytes
	OutputDER                 // a DER SEQUENCE
	OutputMAC32               // a MAC of 32 bytes
)

// check refuses an answer that is not of the declared form: the profile does not fit the module then.
func (o Output) check(answer []byte) error {
	ok := true
	switch o {
	case OutputRaw64:
		ok = len(answer) == 64
	case OutputDER:
		var v asn1.RawValue
		rest, err := asn1.Unmarshal(answer, &v)
		ok = err == nil && len(rest) == 0 && v.Tag == asn1.TagSequence && v.IsCompound
	case OutputMAC32:
		ok = len(answer) == 32
	}
	if !ok {
		return fmt.Errorf("hsm/pkcs11: an answer of %d bytes has not the form that the profile declares", len(answer))
	}
	return nil
}

// A KeyTemplate says how keys of one algorithm are made and recognised.
type KeyTemplate struct {
	Secret      bool   // a secret key, otherwise a pair
	Generate    uint   // CKM_* of C_GenerateKey or C_GenerateKeyPair
	KeyType     uint   // CKK_*
	SendKeyType bool   // put CKA_KEY_TYPE in the template
	ECParams    []byte // CKA_EC_PARAMS, sent and compared when not empty
	ModulusBits uint   // CKA_MODULUS_BITS and exponent 65537, when not 0
	ValueLen    uint   // CKA_VALUE_LEN in bytes, when not 0
	// Public and Private are added to the templates, and win over what stands there already. A secret key has Private.
	Public, Private []Attribute
}

// An Attribute is one more entry of a template, its value in the module's native form.
type Attribute struct {
	Type  uint
	Value []byte
}

// oidSM2 is the DER of 1.2.156.10197.1.301, sm2p256v1 (GM/T 0006-2012).
var oidSM2 = []byte{0x06, 0x08, 0x2A, 0x81, 0x1C, 0xCF, 0x55, 0x01, 0x82, 0x2D}

// ckmHMACSM3 is our software cipher machine's number, in PKCS#11's vendor range. The key is a generic secret.
const ckmHMACSM3 = 0xFFFFF009

// ckaYinjianUses is our software cipher machine's count of a key's signatures, in PKCS#11's vendor range.
const ckaYinjianUses = 0x80594A01

var rsaKeys = KeyTemplate{Generate: p11.CKM_RSA_PKCS_KEY_PAIR_GEN, KeyType: p11.CKK_RSA, ModulusBits: 2048}

var rsaSign = Mechanism{Type: p11.CKM_RSA_PKCS, Input: InputDigestInfo}

// rsaPSS asks for TLS 1.3's rsa_pss_rsae_sha256; the parameter is CK_RSA_PKCS_PSS_PARAMS (mechanisms v2.40 §2.1.10).
var rsaPSS = Mechanism{Type: p11.CKM_RSA_PKCS_PSS, Parameter: p11.NewPSSParams(p11.CKM_SHA256, p11.CKG_MGF1_SHA256, 32)}

// Neutral is the profile of our software cipher machine (for evaluation only, not a certified product): the standard
// elliptic-curve numbers with SM2's curve and a 32-byte e, and a vendor number for HMAC-SM3 alone.
var Neutral = Profile{
	Name:       "neutral",
	UseCounter: ckaYinjianUses,
	Operations: map[hsm.Operation]Mechanism{
		hsm.SignSM2E:         {Type: p11.CKM_ECDSA, Output: OutputRaw64},
		hsm.SignRSASHA256:    rsaSign,
		hsm.SignRSAPSSSHA256: rsaPSS,
		hsm.MACSM3:           {Type: ckmHMACSM3, Output: OutputMAC32},
	},
	Keys: map[hsm.Algorithm]KeyTemplate{
		hsm.SM2:     {Generate: p11.CKM_EC_KEY_PAIR_GEN, KeyType: p11.CKK_EC, ECParams: oidSM2},
		hsm.RSA2048: rsaKeys,
		hsm.HMACSM3: {Secret: true, Generate: p11.CKM_GENERIC_SECRET_KEY_GEN, KeyType: p11.CKK_GENERIC_SECRET, ValueLen: 32},
	},
}

// SoftHSM2 is the profile of SoftHSM 2.6, which knows no SM2: RSA alone.
var SoftHSM2 = Profile{
	Name:       "softhsm2",
	Operations: map[hsm.Operation]Mechanism{hsm.SignRSASHA256: rsaSign, hsm.SignRSAPSSSHA256: rsaPSS},
	Keys:       map[hsm.Algorithm]KeyTemplate{hsm.RSA2048: rsaKeys},
}

// ProfileByName finds a profile that is shipped.
func ProfileByName(name string) (Profile, error) {
	for _, p := range []Profile{Neutral, SoftHSM2} {
		if p.Name == name {
			return p, nil
		}
	}
	return Profile{}, fmt.Errorf("hsm/pkcs11: no profile is called %q", name)
}

// digestInfoSHA256 stands in front of a SHA-256 digest (RFC 8017 §9.2 note 1).
var digestInfoSHA256 = []byte{0x30, 0x31, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01,
	0x05, 0x00, 0x04, 0x20}

func (m Mechanism) input(data []byte) []byte {
	if m.Input == InputDigestInfo {
		return slices.Concat(digestInfoSHA256, data)
	}
	return data
}

// merge lets extra replace or extend template.
func merge(template []*p11.Attribute, extra []Attribute) []*p11.Attribute {
	for _, x := range extra {
		template = slices.DeleteFunc(template, func(a *p11.Attribute) bool { return a.Type == x.Type })
		template = append(template, &p11.Attribute{Type: x.Type, Value: x.Value})
	}
	return template
}

// templates are the public and private templates of C_GenerateKeyPair; public is nil for a secret key.
func (k KeyTemplate) templates(label string, id []byte) (public, private []*p11.Attribute) {
	private = []*p11.Attribute{
		p11.NewAttribute(p11.CKA_TOKEN, true), p11.NewAttribute(p11.CKA_PRIVATE, true),
		p11.NewAttribute(p11.CKA_SENSITIVE, true), p11.NewAttribute(p11.CKA_EXTRACTABLE, false),
		p11.NewAttribute(p11.CKA_SIGN, true),
		p11.NewAttribute(p11.CKA_LABEL, label), p11.NewAttribute(p11.CKA_ID, id),
	}
	if k.SendKeyType {
		private = append(private, p11.NewAttribute(p11.CKA_KEY_TYPE, k.KeyType))
	}
	if k.Secret {
		if k.ValueLen > 0 {
			private = append(private, p11.NewAttribute(p11.CKA_VALUE_LEN, k.ValueLen))
		}
		return nil, merge(private, k.Private)
	}
	public = []*p11.Attribute{
		p11.NewAttribute(p11.CKA_TOKEN, true), p11.NewAttribute(p11.CKA_PRIVATE, false),
		p11.NewAttribute(p11.CKA_VERIFY, true),
		p11.NewAttribute(p11.CKA_LABEL, label), p11.NewAttribute(p11.CKA_ID, id),
	}
	if k.SendKeyType {
		public = append(public, p11.NewAttribute(p11.CKA_KEY_TYPE, k.KeyType))
	}
	if len(k.ECParams) > 0 {
		public = append(public, p11.NewAttribute(p11.CKA_EC_PARAMS, k.ECParams))
	}
	if k.ModulusBits > 0 {
		public = append(public, p11.NewAttribute(p11.CKA_MODULUS_BITS, k.ModulusBits),
			p11.NewAttribute(p11.CKA_PUBLIC_EXPONENT, []byte{1, 0, 1}))
	}
	return merge(public, k.Public), merge(private, k.Private)
}

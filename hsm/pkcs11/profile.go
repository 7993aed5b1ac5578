package pkcs11

import (
	"bytes"
	"encoding/asn1"
	"errors"
	"fmt"
	"maps"
	"slices"

	p11 "github.com/miekg/pkcs11"

	"yinjian/hsm"
	"yinjian/hsm/pkcs11/profiles"
)

// A Profile is a vendor's profile (package profiles) in the form in which a module is driven by it, resolved once.
type Profile struct {
	Name       string
	Operations map[hsm.Operation]Mechanism
	Keys       map[hsm.Algorithm]KeyTemplate
	// UseCounter is the attribute (CK_ULONG) of a private key that counts its signatures; 0: the machine has none.
	// PKCS#11 v2.40 defines no such attribute, and few machines do.
	UseCounter uint
	Wrapping   Wrapping

	match            profiles.Match
	required         []requirement // what the token's list of mechanisms must have
	maxSessions      uint          // 0: as the token says
	readWrite        bool          // every session is a read/write one
	noLogin          bool
	loginUser        uint // CKU_*
	pinMin, pinMax   int  // bytes; 0: any
	pinDigits        bool
	noMechanismList  bool
	noSessionInfo    bool
	noRandom         bool
	sm3              uint // CKM_*; 0: the profile names none. It and what follows are for self-tests alone
	ciphers          []cipherTrial
	sm1              bool
	translatedErrors map[uint]uint // CKR_* of the vendor to those of PKCS#11
}

// A requirement is a mechanism without which the profile does not fit.
type requirement struct {
	key    string // in the profile's file
	number uint
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
	InputZM                      // ZA ‖ M
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
		return fmt.Errorf("%w: output 应为 %s，密码机答 %d 字节 (the answer has another form)", errUnfit, o, len(answer))
	}
	return nil
}

func (o Output) String() string {
	return [...]string{"auto", "raw (r‖s, 64)", "der (SM2Signature)", "MAC (32)"}[o]
}

// A KeyTemplate says how keys of one algorithm are made and recognised.
type KeyTemplate struct {
	Secret      bool   // a secret key, otherwise a pair
	Generate    uint   // CKM_* of C_GenerateKey or C_GenerateKeyPair
	KeyType     uint   // CKK_*
	SendKeyType bool   // put CKA_KEY_TYPE in the template
	ECParams    []byte // CKA_EC_PARAMS, compared when not empty
	OmitCurve   bool   // ECParams are not sent, and compared only where the token has them
	ModulusBits uint   // CKA_MODULUS_BITS and exponent 65537, when not 0
	ValueLen    uint   // CKA_VALUE_LEN in bytes, when not 0
	// Public and Private are added to the templates, and win over what stands there already. A secret key has Private.
	Public, Private []Attribute
	Omit            []uint // CKA_* that are left out of both templates

	point          string // profiles.Point…; "": profiles.PointAuto
	pointX, pointY uint
}

// An Attribute is one more entry of a template, its value in the module's native form.
type Attribute struct {
	Type  uint
	Value []byte
}

var errUnfit = errors.New("厂商档案与密码机不符 (the vendor profile does not fit the cipher machine)")

// ProfileByName loads a profile that is shipped, or one from a file; see profiles.Load.
func ProfileByName(nameOrPath string) (Profile, error) {
	file, err := profiles.Load(nameOrPath)
	if err != nil {
		return Profile{}, err
	}
	return resolve(file), nil
}

// What is driven here of what a profile may name.
var (
	operations = map[string]hsm.Operation{profiles.SM2SignE: hsm.SignSM2E, profiles.SM2SignMessage: hsm.SignSM2M,
		profiles.RSAPKCS1: hsm.SignRSASHA256, profiles.RSAPSS: hsm.SignRSAPSSSHA256, profiles.HMACSM3: hsm.MACSM3}
	algorithms = map[string]hsm.Algorithm{profiles.KeySM2: hsm.SM2, profiles.KeyRSA2048: hsm.RSA2048, profiles.KeyHMACSM3: hsm.HMACSM3}
	inputs     = map[string]Input{profiles.InputDigestInfo: InputDigestInfo, profiles.InputZM: InputZM}
	// wrappings are what keys can be wrapped by, the best first.
	wrappings = []struct {
		operation string
		form      WrapForm
	}{{profiles.SM4GCMWrap, WrapGCM}, {profiles.SM4CBCPadWrap, WrapCBCPad}}
	outputs = map[string]Output{profiles.OutputRaw: OutputRaw64, profiles.OutputDER: OutputDER}
)

func resolve(file *profiles.Profile) Profile {
	m := &file.Machine
	p := Profile{Name: file.Name, Operations: map[hsm.Operation]Mechanism{}, Keys: map[hsm.Algorithm]KeyTemplate{},
		UseCounter: uint(m.UseCounter), match: file.Match, maxSessions: uint(m.MaxSessions), readWrite: m.ReadWrite,
		noLogin: m.Login == "none", loginUser: uint(m.LoginUser), pinMin: m.PINMin, pinMax: m.PINMax, pinDigits: m.PINDigits,
		noMechanismList: file.Avoids(profiles.GetMechanismList), noSessionInfo: file.Avoids(profiles.GetSessionInfo),
		noRandom: file.Avoids(profiles.GenerateRandom), translatedErrors: map[uint]uint{}}
	for from, to := range file.Errors {
		var n profiles.Number
		_ = n.UnmarshalText([]byte(from)) // read before, when the file was checked
		p.translatedErrors[uint(n)] = uint(to)
	}
	for _, name := range slices.Sorted(maps.Keys(file.Keys)) {
		k := file.Keys[name]
		if algorithm, driven := algorithms[name]; driven {
			p.Keys[algorithm] = resolveKey(name, k)
		}
		if name == profiles.KeyRSA2048 { // a longer key of the same kind
			longer := p.Keys[hsm.RSA2048]
			longer.ModulusBits = 3072
			p.Keys[hsm.RSA3072] = longer
		}
		if !k.Optional {
			p.required = append(p.required, requirement{"keys." + name, uint(*k.Mechanism)})
		}
	}
	for _, name := range slices.Sorted(maps.Keys(file.Operations)) {
		op := file.Operations[name]
		if !op.Optional {
			p.required = append(p.required, requirement{"operations." + name, uint(*op.Mechanism)})
		}
		does, driven := operations[name]
		if !driven {
			continue
		}
		row := Mechanism{Type: uint(*op.Mechanism), Input: inputs[op.Input], Output: outputs[op.Output]}
		switch {
		case op.Parameter == profiles.ParameterID:
			row.Parameter = []byte(hsm.DefaultSM2ID)
		case op.Parameter == profiles.ParameterPSS:
			// CK_RSA_PKCS_PSS_PARAMS of TLS 1.3's rsa_pss_rsae_sha256 (mechanisms v2.40 §2.1.10)
			row.Parameter = p11.NewPSSParams(p11.CKM_SHA256, p11.CKG_MGF1_SHA256, 32)
		case does == hsm.MACSM3:
			row.Output = OutputMAC32
		}
		p.Operations[does] = row
	}
	if op := file.Operations[profiles.SM3]; op != nil {
		p.sm3 = uint(*op.Mechanism)
	}
	if key := file.Keys[profiles.KeySM4]; key != nil {
		for _, name := range []string{profiles.SM4ECB, profiles.SM4CBC} {
			if op := file.Operations[name]; op != nil {
				p.ciphers = append(p.ciphers, cipherTrial{name, uint(*op.Mechanism), uint(*key.KeyType)})
			}
		}
	}
	p.sm1 = file.Keys[profiles.KeySM1] != nil
	for _, w := range wrappings {
		if op := file.Operations[w.operation]; op != nil {
			p.Wrapping = Wrapping{Type: uint(*op.Mechanism), Form: w.form, KEK: resolveKey(profiles.KeySM4, file.Keys[profiles.KeySM4])}
			break
		}
	}
	return p
}

func resolveKey(name string, k *profiles.Key) KeyTemplate {
	t := KeyTemplate{Generate: uint(*k.Mechanism), KeyType: uint(*k.KeyType), SendKeyType: *k.SendKeyType,
		ECParams: k.ECParams, point: k.Point, pointX: uint(k.PointX), pointY: uint(k.PointY),
		Public: resolveAttributes(k.Public), Private: resolveAttributes(k.Private)}
	switch name {
	case profiles.KeySM2:
		t.OmitCurve = !*k.SendECParams
	case profiles.KeyRSA2048:
		t.ModulusBits = 2048
	case profiles.KeyHMACSM3:
		t.Secret, t.ValueLen = true, 32
	case profiles.KeySM4:
		t.Secret = true
	}
	for _, typ := range k.Omit {
		t.Omit = append(t.Omit, uint(typ))
	}
	return t
}

func resolveAttributes(in []profiles.Attribute) (out []Attribute) {
	for _, a := range in {
		typ := uint(*a.Type)
		var value any
		switch {
		case a.Bool != nil:
			value = *a.Bool
		case a.Number != nil:
			value = uint(*a.Number)
		default:
			value = []byte(*a.Bytes)
		}
		out = append(out, Attribute{Type: typ, Value: p11.NewAttribute(typ, value).Value})
	}
	return out
}

// translate puts PKCS#11's return value in the place of the vendor's.
func (p *Profile) translate(err error) error {
	if len(p.translatedErrors) == 0 || err == nil {
		return err
	}
	var e *hsm.Error
	if errors.As(err, &e) {
		if to, ok := p.translatedErrors[e.RV]; ok {
			e.RV = to
		}
	}
	return err
}

// checkPIN refuses a PIN that the token cannot have, before a try is spent on it.
func (p *Profile) checkPIN(pin []byte) error {
	switch {
	case p.noLogin:
		return nil
	case len(pin) < p.pinMin || p.pinMax > 0 && len(pin) > p.pinMax:
		return fmt.Errorf("口令的长度不合 %s 档案的 machine.pin_min、pin_max，未提交给密码机 (the PIN's length is not what the profile allows; it was not presented)", p.Name)
	case p.pinDigits && bytes.ContainsFunc(pin, func(r rune) bool { return r < '0' || r > '9' }):
		return fmt.Errorf("口令含非数字，%s 档案的 machine.pin_digits 不容，未提交给密码机 (the PIN must be digits; it was not presented)", p.Name)
	}
	return nil
}

// fits compares the profile with what the machine says of itself and offers. All that differs is named.
func (p *Profile) fits(id profiles.Identity, offered []uint) error {
	faults := []error{p.match.Fits(id)}
	for _, r := range p.required {
		if !p.noMechanismList && !slices.Contains(offered, r.number) {
			faults = append(faults, fmt.Errorf("%s: 密码机没有机制 %#x (the machine does not offer this mechanism)", r.key, r.number))
		}
	}
	if err := errors.Join(faults...); err != nil {
		return fmt.Errorf("%w: %s: %w", errUnfit, p.Name, err)
	}
	return nil
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
		return nil, k.finish(private, k.Private)
	}
	public = []*p11.Attribute{
		p11.NewAttribute(p11.CKA_TOKEN, true), p11.NewAttribute(p11.CKA_PRIVATE, false),
		p11.NewAttribute(p11.CKA_VERIFY, true),
		p11.NewAttribute(p11.CKA_LABEL, label), p11.NewAttribute(p11.CKA_ID, id),
	}
	if k.SendKeyType {
		public = append(public, p11.NewAttribute(p11.CKA_KEY_TYPE, k.KeyType))
	}
	if len(k.ECParams) > 0 && !k.OmitCurve {
		public = append(public, p11.NewAttribute(p11.CKA_EC_PARAMS, k.ECParams))
	}
	if k.ModulusBits > 0 {
		public = append(public, p11.NewAttribute(p11.CKA_MODULUS_BITS, k.ModulusBits),
			p11.NewAttribute(p11.CKA_PUBLIC_EXPONENT, []byte{1, 0, 1}))
	}
	return k.finish(public, k.Public), k.finish(private, k.Private)
}

// finish adds what the profile adds to a template, and takes away what it omits.
func (k KeyTemplate) finish(template []*p11.Attribute, extra []Attribute) []*p11.Attribute {
	template = slices.DeleteFunc(template, func(a *p11.Attribute) bool { return slices.Contains(k.Omit, a.Type) })
	return merge(template, extra)
}

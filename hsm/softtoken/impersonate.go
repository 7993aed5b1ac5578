package softtoken

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
	"time"

	"yinjian/hsm/pkcs11/profiles"
)

// Quirks are what a machine that answers to a vendor's profile does beside using its numbers.
type quirks struct {
	keys      map[operation]*profiles.Key // by what generates them
	point     string                      // profiles.Point…
	pointBoth bool                        // the private key carries the point too
	x, y      uint64                      // attributes, with profiles.PointXY
	loginUser uint64                      // CKU_* in the place of CKU_USER; 0: that
	readWrite bool                        // a signature needs a read/write session
	absent    map[string]bool             // functions that the machine does not have
	errors    map[rv]rv                   // the vendor's for PKCS#11's
}

// operationOf answers what the machine does for an operation of a vendor's profile; 0: it does not do that.
func operationOf(name, input string) operation {
	switch name {
	case profiles.SM2SignE:
		return opSM2Sign
	case profiles.SM2SignMessage:
		if input == profiles.InputZM {
			return opSM2SignZM
		}
		return opSM2SignSM3
	case profiles.RSAPKCS1:
		return opRSAPKCS
	case profiles.RSAPSS:
		return opRSAPSS
	case profiles.HMACSM3:
		return opHMACSM3
	case profiles.SM3:
		return opSM3
	case profiles.SM2Encrypt:
		return opSM2Crypt
	case profiles.SM4ECB:
		return opSM4ECB
	case profiles.SM4CBC:
		return opSM4CBC
	case profiles.SM4CBCPad, profiles.SM4CBCPadWrap:
		return opSM4CBCPad
	case profiles.SM4GCM, profiles.SM4GCMWrap:
		return opSM4GCM
	}
	return 0
}

// impersonate makes the machine answer to a vendor's profile, by name or file: to its numbers alone, in its forms, and
// as strict about templates as the profile says the vendor is. The machine says what it is all the same.
func impersonate(nameOrPath string) (*profile, error) {
	file, err := profiles.Load(nameOrPath)
	if err != nil {
		return nil, fmt.Errorf("softtoken: %w", err)
	}
	m := &file.Machine
	if m.Login == "none" {
		return nil, fmt.Errorf("softtoken: 不能模拟 %s：machine.login = \"none\"，而本机的密钥须登录才可用 (keys here need a login)", file.Name)
	}
	p := &profile{name: file.Name, useCounter: uint64(m.UseCounter), maxSessions: maxSessions, service: time.Duration(m.ServiceTime),
		quirks: &quirks{keys: map[operation]*profiles.Key{}, loginUser: uint64(m.LoginUser), readWrite: m.ReadWrite,
			absent: map[string]bool{}, errors: map[rv]rv{}}}
	if m.MaxSessions > 0 {
		p.maxSessions = min(m.MaxSessions, maxSessions)
	}
	for _, f := range m.Avoid {
		p.quirks.absent[f] = true
	}
	for from, to := range file.Errors {
		var n profiles.Number
		_ = n.UnmarshalText([]byte(from)) // read before, when the file was checked
		p.quirks.errors[rv(to)] = rv(n)
	}
	// What a mechanism does stands in our own table; the vendor's has its number and forms.
	add := func(op operation, number *profiles.Number) *mechanism {
		like := op
		if op == opSM2SignZM {
			like = opSM2SignSM3
		}
		i := slices.IndexFunc(neutralProfile.mechanisms, func(m mechanism) bool { return m.op == like })
		row := neutralProfile.mechanisms[i]
		row.op, row.number = op, uint64(*number)
		p.mechanisms = append(p.mechanisms, row)
		return &p.mechanisms[len(p.mechanisms)-1]
	}
	for name, op := range map[string]operation{profiles.KeySM2: opGenSM2, profiles.KeyRSA2048: opGenRSA, profiles.KeyHMACSM3: opGenSecret,
		profiles.KeySM4: opGenSM4} {
		if k := file.Keys[name]; k != nil {
			add(op, k.Mechanism)
			p.quirks.keys[op] = k
		}
	}
	if k := file.Keys[profiles.KeySM2]; k != nil {
		p.sm2KeyType = uint64(*k.KeyType)
		p.quirks.point, p.quirks.pointBoth = k.Point, k.PointOn == "both"
		p.quirks.x, p.quirks.y = uint64(k.PointX), uint64(k.PointY)
	}
	if k := file.Keys[profiles.KeySM4]; k != nil {
		p.sm4KeyType = uint64(*k.KeyType)
	}
	for name, does := range file.Operations {
		op := operationOf(name, does.Input)
		if op == 0 || does.Output == profiles.OutputC1C2C3 {
			continue
		}
		row := add(op, does.Mechanism)
		row.param = map[string]paramForm{profiles.ParameterID: paramSM2ID, profiles.ParameterPSS: paramPSS,
			profiles.ParameterIV: paramIV, profiles.ParameterGCM: paramGCM, profiles.ParameterGCMToken: paramGCM}[does.Parameter]
		if does.Output == profiles.OutputDER {
			row.encoding = encDER
		}
	}
	slices.SortFunc(p.mechanisms, func(a, b mechanism) int { return int(a.op) - int(b.op) })
	return p, nil
}

// template refuses a template of C_GenerateKey or C_GenerateKeyPair that the vendor would refuse, and takes out the
// attributes that only the vendor knows. public is nil for a secret key.
func (q *quirks) template(op operation, public, private []attribute) (pub, priv []attribute, code rv) {
	if q == nil || q.keys[op] == nil {
		return public, private, ckrOK
	}
	k := q.keys[op]
	halves := [][]attribute{public, private}
	if op == opGenSecret || op == opGenSM4 {
		halves = halves[1:]
	}
	for _, half := range halves {
		if has(half, ckaKeyType) != *k.SendKeyType {
			return nil, nil, templateRV(*k.SendKeyType)
		}
		for _, typ := range k.Omit {
			if has(half, uint64(typ)) {
				return nil, nil, ckrTemplateInconsistent
			}
		}
	}
	if op == opGenSM2 && has(public, ckaECParams) != *k.SendECParams {
		return nil, nil, templateRV(*k.SendECParams)
	}
	if pub, code = required(public, k.Public); code != ckrOK {
		return nil, nil, code
	}
	priv, code = required(private, k.Private)
	return pub, priv, code
}

func templateRV(wanted bool) rv {
	if wanted {
		return ckrTemplateIncomplete
	}
	return ckrTemplateInconsistent
}

func has(templ []attribute, typ uint64) bool {
	return slices.ContainsFunc(templ, func(a attribute) bool { return a.typ == typ })
}

// required wants attributes with their values, and takes out those that are not ours.
func required(templ []attribute, want []profiles.Attribute) ([]attribute, rv) {
	for _, w := range want {
		typ := uint64(*w.Type)
		i := slices.IndexFunc(templ, func(a attribute) bool { return a.typ == typ })
		if i < 0 {
			return nil, ckrTemplateIncomplete
		}
		var value []byte
		switch {
		case w.Bool != nil:
			value = boolean(*w.Bool)
		case w.Number != nil:
			value = ulong(uint64(*w.Number))
		default:
			value = *w.Bytes
		}
		if !bytes.Equal(templ[i].value, value) {
			return nil, ckrAttributeValueInvalid
		}
		if _, known := attrSpecs[typ]; !known {
			templ = slices.Delete(slices.Clone(templ), i, i+1)
		}
	}
	return templ, ckrOK
}

// pointOf answers an attribute in which the vendor keeps an SM2 public point; ok is false for other attributes.
func (q *quirks) pointOf(o *object, class, typ uint64) (v []byte, there, ok bool) {
	if q == nil || o.sm2 == nil || typ != ckaECPoint && (q.point != profiles.PointXY || typ != q.x && typ != q.y) {
		return nil, false, false
	}
	if class == ckoPrivateKey && !q.pointBoth {
		return nil, false, true
	}
	point := sm2Point(o.sm2)
	switch {
	case q.point == profiles.PointXY && typ == q.x:
		return point[3:35], true, true
	case q.point == profiles.PointXY && typ == q.y:
		return point[35:], true, true
	case q.point == profiles.PointXY:
		return nil, false, true
	case q.point == profiles.PointUncompressed:
		return point[2:], true, true
	case q.point == profiles.PointRaw:
		return point[3:], true, true
	}
	return point, true, true
}

// attribute answers one attribute of an object as the profile has it.
func (p *profile) attribute(s *session, o *object, attrs attributes, typ uint64) ([]byte, bool) {
	if v, there, ok := p.quirks.pointOf(o, attrs.class(), typ); ok {
		return v, there
	}
	if typ == p.useCounter && typ != 0 {
		n, err := s.slot.token.usesOf(o)
		return binary.NativeEndian.AppendUint64(nil, n), err == nil
	}
	v, ok := attrs[typ]
	return v, ok
}

// answer is the return value as the vendor gives it.
func (p *profile) answer(code rv) rv {
	if p.quirks != nil {
		if vendor, ok := p.quirks.errors[code]; ok {
			return vendor
		}
	}
	return code
}

// lacks says whether the vendor's machine does not have the function.
func (p *profile) lacks(function string) bool { return p.quirks != nil && p.quirks.absent[function] }

// userType is CKU_* that stands for the user.
func (p *profile) userType() uint64 {
	if p.quirks != nil && p.quirks.loginUser != 0 {
		return p.quirks.loginUser
	}
	return ckuUser
}

// mayNotSign says whether the vendor's machine refuses to sign on such a session.
func (p *profile) mayNotSign(s *session) bool {
	return p.quirks != nil && p.quirks.readWrite && !s.readWrite()
}

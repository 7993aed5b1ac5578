package pkcs11

import (
	"bytes"
	"crypto"
	"crypto/cipher"
	"crypto/ecdsa"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	"maps"
	"math/big"
	"slices"
	"strings"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/sm3"
	"github.com/emmansun/gmsm/sm4"
	p11 "github.com/miekg/pkcs11"

	"yinjian/hsm"
	"yinjian/hsm/pkcs11/profiles"
)

// probeMessage is longer than one block of SM3, which has 64 bytes.
var probeMessage = []byte("yinjian hsm probe: a known text that is signed with a throw-away key, and nothing else")

// A probeKey is a throw-away key, a pair or a secret one.
type probeKey struct {
	cache           string // what it was made by
	private, public p11.ObjectHandle
	onToken         bool
	err             error // it could not be made
}

// A trialOutcome is what came of one operation, whatever a profile says about it.
type trialOutcome struct {
	answer   string
	readings []string // SM2 alone
	judge    string
	bad      bool // the answer does not verify
	err      error
	raw      []byte
}

// generate makes a throw-away key by a template: a session object, or where the token wants none one on the token. Equal
// templates make one key.
func (p *prober) generate(k KeyTemplate) *probeKey {
	public, private := k.templates(ProbeLabel, p.id)
	return p.make(k.Generate, k.Secret, public, private)
}

func (p *prober) make(mechanism uint, secret bool, public, private []*p11.Attribute) *probeKey {
	id := fmt.Sprintf("%#x", mechanism)
	for _, half := range [][]*p11.Attribute{public, private} {
		id += "|"
		for _, a := range half {
			id += fmt.Sprintf("%x=%x ", a.Type, a.Value)
		}
	}
	if k, ok := p.keys[id]; ok {
		return k
	}
	k := &probeKey{cache: id}
	p.keys[id] = k
	m := []*p11.Mechanism{p11.NewMechanism(mechanism, nil)}
	for _, k.onToken = range []bool{false, true} {
		if k.onToken {
			p.report.LeftBehind = true // should the module crash
			p.progress()
		}
		for _, half := range [][]*p11.Attribute{public, private} {
			for _, a := range half {
				if a.Type == p11.CKA_TOKEN {
					a.Value = p11.NewAttribute(p11.CKA_TOKEN, k.onToken).Value
				}
			}
		}
		if secret {
			k.err = p.call("C_GenerateKey", func() (err error) { k.private, err = p.lib.ctx.GenerateKey(p.session, m, private); return err })
		} else {
			k.err = p.call("C_GenerateKeyPair", func() (err error) {
				k.public, k.private, err = p.lib.ctx.GenerateKeyPair(p.session, m, public, private)
				return err
			})
		}
		if k.err == nil {
			break
		}
	}
	p.report.LeftBehind = false
	for _, other := range p.keys {
		p.report.LeftBehind = p.report.LeftBehind || other.err == nil && other.onToken
	}
	if k.err == nil {
		p.report.KeysAre = "session objects"
		if k.onToken {
			p.report.KeysAre = "token objects"
		}
	}
	return k
}

// destroy removes the throw-away keys but keep, which must be a session object: it goes with its session.
func (p *prober) destroy(keep *probeKey) {
	left := false
	for id, k := range p.keys {
		if k == keep || k.err != nil {
			continue
		}
		for _, h := range []p11.ObjectHandle{k.private, k.public} {
			if h == 0 {
				continue
			}
			if err := p.call("C_DestroyObject", func() error { return p.lib.ctx.DestroyObject(p.session, h) }); err != nil {
				p.finding("试验密钥没有销毁 (a throw-away key was not destroyed): %v", err)
				left = left || k.onToken
			}
		}
		delete(p.keys, id)
	}
	p.report.LeftBehind = left
}

// leftovers destroys what an earlier probe left on the token.
func (p *prober) leftovers() {
	var found []p11.ObjectHandle
	err := p.call("C_FindObjects", func() (err error) {
		found, err = p.reader(Profile{}).objects(p.session, 0, p11.NewAttribute(p11.CKA_LABEL, ProbeLabel))
		return err
	})
	if err != nil {
		p.finding("查找标签为 %s 的密钥 (looking for keys of that label): %v", ProbeLabel, err)
	}
	for _, h := range found {
		// A module that does not look at the template has found keys that are no probe's.
		a, err := p.attributes(&candidate{}, h, p11.CKA_LABEL)
		if err != nil || string(a[p11.CKA_LABEL]) != ProbeLabel {
			p.finding("查找标签为 %s 的密钥却得到别的对象，未动 (looking for that label found another object, which was left alone)", ProbeLabel)
			continue
		}
		err = p.call("C_DestroyObject", func() error { return p.lib.ctx.DestroyObject(p.session, h) })
		p.finding("上次探测留下的密钥已销毁 (a key that an earlier probe had left was destroyed): %s", outcome(err))
	}
}

// against says why a profile does not fit after all.
func (c *candidate) against(format string, args ...any) {
	c.report.Fits = false
	c.report.Why = append(c.report.Why, fmt.Sprintf(format, args...))
}

// work is all that follows the login.
func (p *prober) work() {
	p.id = make([]byte, 16)
	rand.Read(p.id) // never fails (crypto/rand)
	p.leftovers()

	// 1. Each profile by throw-away keys.
	for _, c := range p.viable() {
		p.trial(c)
	}
	p.choose()
	p.tell()
	p.progress()

	// 2. What only the chosen one knows.
	if p.chosen != nil {
		p.sm1()
		p.slotClasses()
		p.progress()
	} else {
		p.notChecked("会话之外的各项：没有选定档案 (all but sessions: no profile was chosen)")
	}

	// 3. Load.
	p.underLoad()
	p.progress()

	// 4. What modules are not often asked.
	p.behaviour()
}

// trial tries everything of a profile that the token offers.
func (p *prober) trial(c *candidate) {
	for _, name := range slices.Sorted(maps.Keys(c.file.Keys)) {
		algorithm, driven := algorithms[name]
		if !driven || p.absent(uint(*c.file.Keys[name].Mechanism)) {
			continue
		}
		if k := p.generate(c.Keys[algorithm]); k.err != nil {
			if !c.file.Keys[name].Optional {
				c.against("keys.%s: %v", name, k.err)
			}
		} else {
			p.keyType(c, "keys."+name, k, c.Keys[algorithm].KeyType)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(c.file.Operations)) {
		op := c.file.Operations[name]
		t := ProbeTrial{Profile: c.name, Operation: name, Mechanism: fmt.Sprintf("%#x", uint64(*op.Mechanism))}
		if p.absent(uint(*op.Mechanism)) {
			t.Result = TrialAbsent
		} else if !p.tryOperation(c, name, op, &t) {
			continue
		}
		if t.Result == TrialContradicts || t.Result == TrialFails && !op.Optional {
			c.against("operations.%s: %s", name, t.Error)
		}
		c.trials = append(c.trials, t)
	}
}

func (p *prober) absent(mechanism uint) bool {
	return p.listed && !slices.Contains(p.offered, mechanism)
}

// keyType compares CKA_KEY_TYPE of a key that was made.
func (p *prober) keyType(c *candidate, key string, k *probeKey, want uint) {
	a, err := p.attributes(c, k.private, p11.CKA_KEY_TYPE)
	if v := a[p11.CKA_KEY_TYPE]; err == nil && v != nil && !sameUlong(v, want) {
		c.against("%s.key_type = %#x，密码机给出 %x (the token says another)", key, want, v)
	}
}

func (p *prober) attributes(c *candidate, h p11.ObjectHandle, types ...uint) (a map[uint][]byte, err error) {
	err = p.call("C_GetAttributeValue", func() (err error) {
		a, err = p.reader(c.Profile).attributes(p.session, h, types...)
		return err
	})
	return a, err
}

// tryOperation tries one operation; false: it is not one that is tried.
func (p *prober) tryOperation(c *candidate, name string, op *profiles.Operation, t *ProbeTrial) bool {
	number := uint(*op.Mechanism)
	var o trialOutcome
	wanted := "" // reading
	switch name {
	case profiles.SM2SignE, profiles.SM2SignMessage:
		m := c.Operations[operations[name]]
		k := p.generate(c.Keys[hsm.SM2])
		pub, err := p.publicKey(c, k)
		switch {
		case k.err != nil:
			o.err = k.err
		case err != nil:
			o.err, o.bad = err, true
		default:
			wanted = map[string]string{profiles.InputE: "e", profiles.InputM: "m", profiles.InputZM: "zm"}[op.Input]
			o = p.once(fmt.Sprintf("%s %s %x %s", k.cache, t.Mechanism, m.Parameter, op.Input), func() trialOutcome { return p.signSM2(m, k, pub, op.Input) })
		}
		if o.err == nil {
			if err := m.Output.check(o.raw); err != nil {
				o.err, o.bad = err, true
			}
		}
	case profiles.RSAPKCS1, profiles.RSAPSS:
		m := c.Operations[operations[name]]
		k := p.generate(c.Keys[hsm.RSA2048])
		if o.err = k.err; k.err == nil {
			o = p.once(fmt.Sprintf("%s %s %s", k.cache, t.Mechanism, op.Input), func() trialOutcome { return p.signRSA(c, m, k, name) })
		}
	case profiles.HMACSM3:
		k := p.generate(c.Keys[hsm.HMACSM3])
		if o.err = k.err; k.err == nil {
			o = p.once(k.cache+" "+t.Mechanism, func() trialOutcome { return p.mac(c, k) })
		}
	case profiles.SM3:
		if !p.lib.has(fnDigestInit) || !p.lib.has(fnDigest) {
			return false
		}
		o = p.once("sm3 "+t.Mechanism, func() trialOutcome { return p.digest(number) })
	case profiles.SM4ECB, profiles.SM4CBC:
		if c.file.Keys[profiles.KeySM4] == nil || !p.encrypts() {
			return false
		}
		o = p.once(fmt.Sprintf("%s %s %x", name, t.Mechanism, uint64(*c.file.Keys[profiles.KeySM4].KeyType)),
			func() trialOutcome { return p.cipher(c, profiles.KeySM4, op) })
	default:
		return false
	}
	t.Answer, t.Judge, t.Reading = o.answer, o.judge, strings.Join(o.readings, "、")
	switch {
	case o.bad:
		t.Result, t.Error = TrialContradicts, "验证不过 (does not verify)"
		if o.err != nil {
			t.Error = o.err.Error()
		}
	case o.err != nil:
		t.Result, t.Error = TrialFails, o.err.Error()
	case len(o.readings) > 1:
		// It cannot be told what the token signed: nothing that it signs may be believed to be what was meant.
		t.Result, t.Error = TrialContradicts, "签名有多种解释 (the signature has several meanings)"
		p.report.Verdict = VerdictAmbiguous
		p.finding("机制 %s 的签名按 %s 都能验证 (the signature verifies as each of these)", t.Mechanism, t.Reading)
	case wanted != "" && !slices.Contains(o.readings, wanted):
		t.Result = TrialContradicts
		t.Error = fmt.Sprintf("input = %q，而签名按 %q 验证 (it verifies as that)", op.Input, t.Reading)
		if len(o.readings) == 0 {
			t.Error = fmt.Sprintf("input = %q，签名按 e、m、zm 都不能验证 (it verifies as none of these)", op.Input)
		}
	default:
		t.Result = TrialWorks
	}
	return true
}

// once makes a trial unless another profile has asked for the same.
func (p *prober) once(what string, f func() trialOutcome) trialOutcome {
	o, ok := p.tried[what]
	if !ok {
		o = f()
		p.tried[what] = o
	}
	return o
}

// publicKey reads the SM2 key in the form that the profile declares.
func (p *prober) publicKey(c *candidate, k *probeKey) (*ecdsa.PublicKey, error) {
	if k.err != nil {
		return nil, k.err
	}
	template := c.Keys[hsm.SM2]
	types := slices.Clone(pairAttributes)
	if template.point == profiles.PointXY {
		types = append(types, template.pointX, template.pointY)
	}
	a, err := p.attributes(c, k.public, types...)
	if err != nil {
		return nil, err
	}
	pub, err := publicKey(hsm.SM2, template, a)
	if err != nil {
		return nil, err
	}
	return pub.(*ecdsa.PublicKey), nil
}

// point says in which form and where the token has the public point.
func (p *prober) point(c *candidate) {
	k := p.generate(c.Keys[hsm.SM2])
	if k.err != nil {
		return
	}
	template := c.Keys[hsm.SM2]
	form := func(h p11.ObjectHandle) string {
		types := []uint{p11.CKA_EC_POINT}
		if template.point == profiles.PointXY {
			types = append(types, template.pointX, template.pointY)
		}
		a, err := p.attributes(c, h, types...)
		v := a[p11.CKA_EC_POINT]
		switch {
		case err != nil:
			return ""
		case len(v) == 67 && v[0] == 4 && v[1] == 65:
			return profiles.PointOctetString
		case len(v) == 65 && v[0] == 4:
			return profiles.PointUncompressed
		case len(v) == 64:
			return profiles.PointRaw
		case len(a[template.pointX]) == 32 && len(a[template.pointY]) == 32:
			return profiles.PointXY
		}
		return ""
	}
	p.report.Point, p.report.PointOn = form(k.public), "public"
	if form(k.private) != "" {
		p.report.PointOn = "both"
	}
}

// sign is C_SignInit and C_Sign, each announced.
func (p *prober) sign(m Mechanism, key p11.ObjectHandle, data []byte) (out []byte, err error) {
	err = p.call("C_SignInit", func() error {
		return p.lib.ctx.SignInit(p.session, []*p11.Mechanism{mechanismOf(m.Type, m.Parameter)}, key)
	})
	if err == nil {
		err = p.call("C_Sign", func() (err error) { out, err = p.lib.signOnly(p.session, data); return err })
	}
	return out, err
}

func mechanismOf(number uint, parameter []byte) *p11.Mechanism {
	if len(parameter) == 0 {
		return p11.NewMechanism(number, nil)
	}
	return p11.NewMechanism(number, parameter)
}

// signSM2 signs, and finds out what.
func (p *prober) signSM2(m Mechanism, k *probeKey, pub *ecdsa.PublicKey, input string) trialOutcome {
	data := probeMessage
	switch input {
	case profiles.InputE:
		data = make([]byte, 32)
		rand.Read(data)
	case profiles.InputZM:
		za, err := sm2.CalculateZA(pub, []byte(hsm.DefaultSM2ID))
		if err != nil {
			return trialOutcome{err: err}
		}
		data = slices.Concat(za, data)
	}
	sig, err := p.sign(m, k.private, data)
	if err != nil {
		return trialOutcome{err: err}
	}
	o := trialOutcome{answer: "der", judge: "gmsm", raw: sig}
	if len(sig) == 64 {
		o.answer = "raw"
	}
	r, s, err := hsm.NormalizeSM2(sig)
	if err != nil {
		o.err, o.bad = err, true
		return o
	}
	if OutputDER.check(sig) == nil {
		o.answer = "der"
	}
	o.readings = readings(pub, data, func(e []byte) bool { return sm2.Verify(pub, e, r, s) })
	return o
}

// readings says as what a signature of data verifies: "e", data itself; "m", a message under the default ID; "m-empty-id",
// a message under an empty one; "zm", ZA ‖ M.
func readings(pub *ecdsa.PublicKey, data []byte, verify func(e []byte) bool) (hold []string) {
	hash := func(parts ...[]byte) []byte {
		h := sm3.Sum(slices.Concat(parts...))
		return h[:]
	}
	if len(data) == 32 && verify(data) {
		hold = append(hold, "e")
	}
	if za, err := sm2.CalculateZA(pub, []byte(hsm.DefaultSM2ID)); err == nil && verify(hash(za, data)) {
		hold = append(hold, "m")
	}
	if verify(hash(zaEmptyID(pub), data)) {
		hold = append(hold, "m-empty-id")
	}
	if verify(hash(data)) {
		hold = append(hold, "zm")
	}
	return hold
}

// zaEmptyID is ZA for an ID of no bytes (GM/T 0003.2-2012 §5.5), which gmsm takes for the default.
func zaEmptyID(pub *ecdsa.PublicKey) []byte {
	params := sm2.P256().Params()
	h := sm3.New()
	h.Write([]byte{0, 0})
	three := big.NewInt(3)
	for _, v := range []*big.Int{new(big.Int).Sub(params.P, three), params.B, params.Gx, params.Gy, pub.X, pub.Y} { // a = p-3
		h.Write(v.FillBytes(make([]byte, 32)))
	}
	return h.Sum(nil)
}

func (p *prober) signRSA(c *candidate, m Mechanism, k *probeKey, name string) trialOutcome {
	a, err := p.attributes(c, k.public, rsaAttributes...)
	if err != nil {
		return trialOutcome{err: err}
	}
	key, err := publicKey(hsm.RSA2048, c.Keys[hsm.RSA2048], a)
	if err != nil {
		return trialOutcome{err: err, bad: true}
	}
	digest := make([]byte, 32)
	rand.Read(digest)
	sig, err := p.sign(m, k.private, m.input(digest))
	if err != nil {
		return trialOutcome{err: err}
	}
	o := trialOutcome{answer: fmt.Sprintf("%d bytes", len(sig)), judge: "crypto/rsa"}
	if name == profiles.RSAPSS {
		err = rsa.VerifyPSS(key.(*rsa.PublicKey), crypto.SHA256, digest, sig, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash})
	} else {
		err = rsa.VerifyPKCS1v15(key.(*rsa.PublicKey), crypto.SHA256, digest, sig)
	}
	o.bad = err != nil
	return o
}

// known imports a secret key whose value is known, as a session object; many tokens refuse.
func (p *prober) known(keyType uint, value []byte, uses ...uint) (p11.ObjectHandle, bool) {
	if !p.lib.has(fnCreateObject) {
		return 0, false
	}
	template := []*p11.Attribute{p11.NewAttribute(p11.CKA_CLASS, uint(p11.CKO_SECRET_KEY)), p11.NewAttribute(p11.CKA_KEY_TYPE, keyType),
		p11.NewAttribute(p11.CKA_TOKEN, false), p11.NewAttribute(p11.CKA_LABEL, ProbeLabel), p11.NewAttribute(p11.CKA_VALUE, value)}
	for _, u := range uses {
		template = append(template, p11.NewAttribute(u, true))
	}
	k := &probeKey{}
	if k.err = p.call("C_CreateObject", func() (err error) { k.private, err = p.lib.ctx.CreateObject(p.session, template); return err }); k.err != nil {
		return 0, false
	}
	p.keys[fmt.Sprintf("known %d", k.private)] = k
	return k.private, true
}

// mac makes a MAC with the generated key, and with one whose value is known where the token takes one.
func (p *prober) mac(c *candidate, k *probeKey) trialOutcome {
	m := c.Operations[hsm.MACSM3]
	one, err := p.sign(m, k.private, probeMessage)
	if err != nil {
		return trialOutcome{err: err}
	}
	o := trialOutcome{answer: fmt.Sprintf("%d bytes", len(one)), judge: "form", bad: len(one) != 32}
	value := make([]byte, 32)
	rand.Read(value)
	if h, ok := p.known(c.Keys[hsm.HMACSM3].KeyType, value, p11.CKA_SIGN); ok {
		mac := hmac.New(sm3.New, value)
		mac.Write(probeMessage)
		if got, err := p.sign(m, h, probeMessage); err == nil {
			o.judge, o.bad = "gmsm", !hmac.Equal(got, mac.Sum(nil))
		}
	}
	return o
}

func (p *prober) digest(mechanism uint) trialOutcome {
	err := p.call("C_DigestInit", func() error {
		return p.lib.ctx.DigestInit(p.session, []*p11.Mechanism{p11.NewMechanism(mechanism, nil)})
	})
	var got []byte
	if err == nil {
		err = p.call("C_Digest", func() (err error) { got, err = p.lib.ctx.Digest(p.session, probeMessage); return err })
	}
	if err != nil {
		return trialOutcome{err: err}
	}
	want := sm3.Sum(probeMessage)
	return trialOutcome{answer: fmt.Sprintf("%d bytes", len(got)), judge: "gmsm", bad: !bytes.Equal(got, want[:])}
}

// encrypts says whether the module's list has what cipher calls.
func (p *prober) encrypts() bool {
	return p.lib.has(fnEncryptInit) && p.lib.has(fnEncrypt) && p.lib.has(fnDecryptInit) && p.lib.has(fnDecrypt)
}

// cipher encrypts two blocks and decrypts them; with SM4 and a key whose value is known, gmsm judges. SM1 is not
// published: that it comes back is all that can be seen.
func (p *prober) cipher(c *candidate, keyName string, op *profiles.Operation) trialOutcome {
	file := c.file.Keys[keyName]
	number, keyType := uint(*op.Mechanism), uint(*file.KeyType)
	plain, iv := bytes.Repeat([]byte{0x5A}, 32), []byte(nil)
	if op.Parameter == profiles.ParameterIV {
		iv = make([]byte, 16)
		rand.Read(iv)
	}
	run := func(init, do string, begin func(p11.SessionHandle, []*p11.Mechanism, p11.ObjectHandle) error,
		end func(p11.SessionHandle, []byte) ([]byte, error), h p11.ObjectHandle, in []byte) (out []byte, err error) {
		if err := p.call(init, func() error { return begin(p.session, []*p11.Mechanism{mechanismOf(number, iv)}, h) }); err != nil {
			return nil, err
		}
		err = p.call(do, func() (err error) { out, err = end(p.session, in); return err })
		return out, err
	}
	encrypt := func(h p11.ObjectHandle) ([]byte, error) {
		return run("C_EncryptInit", "C_Encrypt", p.lib.ctx.EncryptInit, p.lib.ctx.Encrypt, h, plain)
	}
	template := resolveKey(keyName, file)
	private := []*p11.Attribute{p11.NewAttribute(p11.CKA_TOKEN, false), p11.NewAttribute(p11.CKA_PRIVATE, true),
		p11.NewAttribute(p11.CKA_SENSITIVE, true), p11.NewAttribute(p11.CKA_EXTRACTABLE, false),
		p11.NewAttribute(p11.CKA_ENCRYPT, true), p11.NewAttribute(p11.CKA_DECRYPT, true),
		p11.NewAttribute(p11.CKA_LABEL, ProbeLabel), p11.NewAttribute(p11.CKA_ID, p.id)}
	if template.SendKeyType {
		private = append(private, p11.NewAttribute(p11.CKA_KEY_TYPE, keyType))
	}
	k := p.make(template.Generate, true, nil, template.finish(private, template.Private))
	if k.err != nil {
		return trialOutcome{err: k.err}
	}
	p.keyType(c, "keys."+keyName, k, keyType)
	sealed, err := encrypt(k.private)
	if err != nil {
		return trialOutcome{err: err}
	}
	back, err := run("C_DecryptInit", "C_Decrypt", p.lib.ctx.DecryptInit, p.lib.ctx.Decrypt, k.private, sealed)
	if err != nil {
		return trialOutcome{err: err}
	}
	o := trialOutcome{answer: fmt.Sprintf("%d bytes", len(sealed)), judge: "round trip", bad: !bytes.Equal(back, plain) || bytes.Equal(sealed, plain)}
	if keyName != profiles.KeySM4 {
		return o
	}
	value := make([]byte, 16)
	rand.Read(value)
	if h, ok := p.known(keyType, value, p11.CKA_ENCRYPT); ok {
		if got, err := encrypt(h); err == nil {
			o.judge, o.bad = "gmsm", o.bad || !bytes.Equal(got, encryptSM4(value, iv, plain))
		}
	}
	return o
}

// encryptSM4 is CBC with an IV, and ECB with none, of whole blocks.
func encryptSM4(key, iv, plain []byte) []byte {
	block, err := sm4.NewCipher(key)
	if err != nil {
		return nil
	}
	out := make([]byte, len(plain))
	if iv != nil {
		cipher.NewCBCEncrypter(block, iv).CryptBlocks(out, plain)
		return out
	}
	for i := 0; i < len(plain); i += 16 {
		block.Encrypt(out[i:], plain[i:i+16])
	}
	return out
}

// sm1 tries SM1 where the profile has it. It is never emulated.
func (p *prober) sm1() {
	c := p.chosen
	p.report.SM1Why = "档案没有 SM1 (the profile has none)"
	if c.file.Keys[profiles.KeySM1] == nil {
		return
	}
	for _, name := range []string{"sm1-ecb", "sm1-cbc"} {
		op := c.file.Operations[name]
		switch {
		case op == nil:
		case p.absent(uint(*op.Mechanism)):
			p.report.SM1Why = fmt.Sprintf("密码机没有机制 %#x (the machine does not offer it)", uint64(*op.Mechanism))
		case !p.encrypts():
			p.report.SM1Why = "模块没有 C_Encrypt (the module lacks it)"
		default:
			o := p.cipher(c, profiles.KeySM1, op)
			switch {
			case o.err != nil:
				p.report.SM1Why = o.err.Error()
			case o.bad:
				p.report.SM1Why = "解密不得原文 (decrypting does not give the text back)"
			default:
				p.report.SM1, p.report.SM1Why = "callable", name+"：加密后能解密，结果无从核对 (comes back; the result cannot be compared)"
				return
			}
		}
	}
}

// choose takes the profile that explains most, and none where two that fit contradict each other.
func (p *prober) choose() {
	fits := p.viable()
	if p.report.Verdict == VerdictAmbiguous || len(fits) == 0 {
		if len(fits) == 0 && p.report.Verdict != VerdictAmbiguous {
			p.report.Verdict = VerdictNone
		}
		for _, c := range p.candidates {
			p.report.Trials = append(p.report.Trials, c.trials...)
		}
		return
	}
	// What the machine says of itself counts most.
	named := func(c *candidate) int {
		m := c.file.Match
		if m.Library+m.Manufacturer+m.Description+m.Model == "" {
			return 0
		}
		return 1
	}
	slices.SortStableFunc(fits, func(a, b *candidate) int {
		for _, d := range []int{named(b) - named(a), b.report.Explained - a.report.Explained, a.report.Absent - b.report.Absent} {
			if d != 0 {
				return d
			}
		}
		return strings.Compare(a.name, b.name)
	})
	best := fits[0]
	for _, other := range fits[1:] {
		if named(other) != named(best) {
			continue
		}
		if why := p.conflict(best, other); why != "" {
			p.report.Verdict = VerdictAmbiguous
			p.finding("%s 与 %s 都符合而含义不同，不作选择：%s；请对照厂商头文件，用 --profile 指定 (both fit and mean different things, none is chosen; look into the vendor's header and name one)",
				best.name, other.name, why)
			p.report.Trials = append(slices.Clone(best.trials), other.trials...)
			return
		}
		if other.report.Explained == best.report.Explained && other.report.Absent == best.report.Absent {
			p.report.AlsoFit = append(p.report.AlsoFit, other.name)
		}
	}
	p.chosen = best
	p.report.Verdict, p.report.Profile, p.report.Trials = VerdictFits, best.name, best.trials
	if _, ok := best.Keys[hsm.SM2]; ok {
		p.point(best)
	}
}

// conflict names a number that the token offers and that two profiles take for different things, where no trial has
// shown which is right; "" if there is none.
func (p *prober) conflict(a, b *candidate) string {
	uses := func(c *candidate) map[uint][]string {
		m := map[uint][]string{}
		numbers(c.file, func(key string, n uint) { m[n] = append(m[n], key) })
		return m
	}
	ofA, ofB := uses(a), uses(b)
	for _, n := range p.offered {
		if len(ofA[n]) == 0 || len(ofB[n]) == 0 {
			continue
		}
		agree := false
		for _, x := range ofA[n] {
			for _, y := range ofB[n] {
				agree = agree || x == y && (worked(a, x) && worked(b, x) || same(a.file, b.file, x))
			}
		}
		if !agree {
			return fmt.Sprintf("%#x = %s：%s；%s：%s", n, a.name, strings.Join(ofA[n], "、"), b.name, strings.Join(ofB[n], "、"))
		}
	}
	return ""
}

func worked(c *candidate, key string) bool {
	return slices.ContainsFunc(c.trials, func(t ProbeTrial) bool { return "operations."+t.Operation == key && t.Result == TrialWorks })
}

// same says whether two profiles say the same of a key or an operation that both have.
func same(a, b *profiles.Profile, key string) bool {
	kind, name, _ := strings.Cut(key, ".")
	if kind == "keys" {
		// The key type of a key that was made was compared.
		return *a.Keys[name].KeyType == *b.Keys[name].KeyType
	}
	x, y := a.Operations[name], b.Operations[name]
	return x.Input == y.Input && x.Parameter == y.Parameter && x.Padding == y.Padding &&
		(x.Output == y.Output || x.Output == profiles.OutputAuto || y.Output == profiles.OutputAuto)
}

// slotClasses says which slot classes the token could serve.
func (p *prober) slotClasses() {
	for _, class := range hsm.Classes {
		row := ProbeClass{Class: class}
		for _, name := range slices.Sorted(maps.Keys(operations)) {
			if class.Check(operations[name]) == nil && !worked(p.chosen, "operations."+name) {
				row.Lacks = append(row.Lacks, name)
			}
		}
		row.Serves = len(row.Lacks) == 0
		p.report.SlotClasses = append(p.report.SlotClasses, row)
	}
	for _, name := range []string{profiles.SM4CBCPadWrap, profiles.SM4GCMWrap} { // the second is preferred
		if op := p.chosen.file.Operations[name]; op != nil && !p.absent(uint(*op.Mechanism)) {
			p.report.Wrapping = name
		}
	}
}

// outcome is the name of a call's return value.
func outcome(err error) string {
	var e *hsm.Error
	switch {
	case err == nil:
		return "CKR_OK"
	case errors.As(err, &e):
		return hsm.RVName(e.RV)
	}
	return err.Error()
}

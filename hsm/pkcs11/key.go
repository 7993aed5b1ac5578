package pkcs11

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"encoding/binary"
	"errors"
	"fmt"
	"math/big"
	"slices"

	"github.com/emmansun/gmsm/sm2"
	p11 "github.com/miekg/pkcs11"
	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"

	"yinjian/hsm"
	"yinjian/hsm/pkcs11/profiles"
)

// A handleKey names the object that an operation uses: a private key, or a secret key.
type handleKey struct {
	label  string
	secret bool
}

func (k handleKey) class() uint {
	if k.secret {
		return p11.CKO_SECRET_KEY
	}
	return p11.CKO_PRIVATE_KEY
}

// handle answers the key's object handle, from the cache of generation gen where it is there.
func (t *Token) handle(s p11.SessionHandle, gen uint64, key handleKey) (p11.ObjectHandle, error) {
	t.mu.Lock()
	h, ok := t.handles[key]
	ok = ok && t.gen == gen
	t.mu.Unlock()
	if ok {
		return h, nil
	}
	// Asked first: asked afterwards, a login by another goroutine in between would make the empty answer look true.
	if err := t.loggedIn(s); err != nil {
		return 0, err
	}
	found, err := t.objects(s, 2, p11.NewAttribute(p11.CKA_CLASS, key.class()), p11.NewAttribute(p11.CKA_LABEL, key.label))
	if err != nil {
		return 0, err
	}
	if err := exactlyOne(len(found)); err != nil {
		return 0, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.gen == gen {
		t.handles[key] = found[0]
	}
	return found[0], nil
}

// loggedIn answers CKR_USER_NOT_LOGGED_IN when the session is public: private objects are invisible then, which must
// not pass for a key that is missing (SoftHSM2 answers a use of the old handle with CKR_OBJECT_HANDLE_INVALID).
//
// Where the profile forbids to ask, a lost login shows by an error alone.
func (t *Token) loggedIn(s p11.SessionHandle) error {
	if t.cfg.Profile.noLogin || t.cfg.Profile.noSessionInfo {
		return nil
	}
	info, err := t.lib.ctx.GetSessionInfo(s)
	if err != nil {
		return call("C_GetSessionInfo", err)
	}
	if info.State != p11.CKS_RO_USER_FUNCTIONS && info.State != p11.CKS_RW_USER_FUNCTIONS {
		return &hsm.Error{Call: "C_GetSessionInfo", RV: 0x101}
	}
	return nil
}

// forget drops a handle that the token did not know, unless another has been found since.
func (t *Token) forget(key handleKey, h p11.ObjectHandle) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.handles[key] == h {
		delete(t.handles, key)
	}
}

func exactlyOne(n int) error {
	switch n {
	case 0:
		return hsm.ErrKeyNotFound
	case 1:
		return nil
	}
	return hsm.ErrKeyAmbiguous
}

// objects searches; most bounds the answer, 0 does not. FindObjects is called until it finds none, whatever it says
// about more.
func (t *Token) objects(s p11.SessionHandle, most int, template ...*p11.Attribute) ([]p11.ObjectHandle, error) {
	if err := t.lib.ctx.FindObjectsInit(s, template); err != nil {
		return nil, call("C_FindObjectsInit", err)
	}
	var found []p11.ObjectHandle
	for most == 0 || len(found) < most {
		some, _, err := t.lib.ctx.FindObjects(s, 64)
		if err != nil {
			return nil, call("C_FindObjects", err)
		}
		if len(some) == 0 {
			break
		}
		found = append(found, some...)
	}
	return found, call("C_FindObjectsFinal", t.lib.ctx.FindObjectsFinal(s))
}

// attributes reads attributes of one object. What the token does not have or does not tell is missing from the map.
func (t *Token) attributes(s p11.SessionHandle, h p11.ObjectHandle, types ...uint) (map[uint][]byte, error) {
	read := func(types ...uint) (map[uint][]byte, error) {
		template := make([]*p11.Attribute, len(types))
		for i, typ := range types {
			template[i] = &p11.Attribute{Type: typ}
		}
		got, err := t.lib.ctx.GetAttributeValue(s, h, template)
		if err != nil {
			return nil, call("C_GetAttributeValue", err)
		}
		m := make(map[uint][]byte, len(got))
		for _, a := range got {
			if a.Value != nil {
				m[a.Type] = a.Value
			}
		}
		return m, nil
	}
	all, err := read(types...)
	if hsm.ClassifyError(err) != hsm.ClassPermanent {
		return all, err
	}
	// One attribute spoils the call: ask for each.
	all = make(map[uint][]byte, len(types))
	for _, typ := range types {
		one, err := read(typ)
		if err != nil && hsm.ClassifyError(err) != hsm.ClassPermanent {
			return nil, err
		}
		if v, ok := one[typ]; ok {
			all[typ] = v
		}
	}
	return all, nil
}

func boolean(v []byte) bool { return len(v) == 1 && v[0] != 0 }

func sameUlong(v []byte, want uint) bool {
	return bytes.Equal(v, p11.NewAttribute(0, want).Value)
}

var keyAttributes = []uint{p11.CKA_LABEL, p11.CKA_ID, p11.CKA_KEY_TYPE, p11.CKA_SENSITIVE, p11.CKA_EXTRACTABLE,
	p11.CKA_NEVER_EXTRACTABLE}

var pairAttributes = []uint{p11.CKA_LABEL, p11.CKA_ID, p11.CKA_KEY_TYPE, p11.CKA_EC_PARAMS, p11.CKA_EC_POINT}

var rsaAttributes = []uint{p11.CKA_LABEL, p11.CKA_ID, p11.CKA_KEY_TYPE, p11.CKA_MODULUS, p11.CKA_PUBLIC_EXPONENT}

// errForeignKey means that an object is a key, but none that the profile describes.
var errForeignKey = errors.New("hsm/pkcs11: the key is of a kind that the profile does not describe")

// algorithmOf recognises a key by its class and CKA_KEY_TYPE.
func (p Profile) algorithmOf(secret bool, keyType []byte) (hsm.Algorithm, KeyTemplate, bool) {
	for _, a := range []hsm.Algorithm{hsm.SM2, hsm.RSA2048, hsm.HMACSM3} {
		if k, ok := p.Keys[a]; ok && k.Secret == secret && sameUlong(keyType, k.KeyType) {
			return a, k, true
		}
	}
	if w := p.Wrapping; w.Form != 0 && secret && sameUlong(keyType, w.KEK.KeyType) {
		return hsm.SM4, w.KEK, true
	}
	return "", KeyTemplate{}, false
}

// keyInfo describes the private or secret key h. publics are the public key objects to choose the other half from,
// by CKA_ID and CKA_LABEL; nil lets it search.
func (t *Token) keyInfo(s p11.SessionHandle, h p11.ObjectHandle, secret bool, publics map[string][]p11.ObjectHandle) (hsm.KeyInfo, error) {
	a, err := t.attributes(s, h, keyAttributes...)
	if err != nil {
		return hsm.KeyInfo{}, err
	}
	alg, template, ok := t.cfg.Profile.algorithmOf(secret, a[p11.CKA_KEY_TYPE])
	if !ok {
		return hsm.KeyInfo{}, errForeignKey
	}
	info := hsm.KeyInfo{
		Label: string(a[p11.CKA_LABEL]), ID: a[p11.CKA_ID], Algorithm: alg,
		Sensitive: boolean(a[p11.CKA_SENSITIVE]), NeverExtractable: boolean(a[p11.CKA_NEVER_EXTRACTABLE]),
		// A token that does not say is not believed to guard the key.
		Extractable: len(a[p11.CKA_EXTRACTABLE]) != 1 || boolean(a[p11.CKA_EXTRACTABLE]),
	}
	if secret {
		// Not every key may be asked for it.
		a, err := t.attributes(s, h, p11.CKA_TRUSTED)
		info.Trusted = boolean(a[p11.CKA_TRUSTED])
		return info, err
	}
	halves := publics[halfKey(info.ID, info.Label)]
	if len(halves) == 0 { // one that was made since publics were listed is found yet
		if halves, err = t.objects(s, 2, p11.NewAttribute(p11.CKA_CLASS, uint(p11.CKO_PUBLIC_KEY)),
			p11.NewAttribute(p11.CKA_ID, info.ID), p11.NewAttribute(p11.CKA_LABEL, info.Label)); err != nil {
			return hsm.KeyInfo{}, err
		}
	}
	switch len(halves) {
	case 0:
		// Some tokens keep the public key's attributes on the private key alone.
		halves = []p11.ObjectHandle{h}
	case 1:
	default:
		return hsm.KeyInfo{}, hsm.ErrKeyAmbiguous
	}
	want := pairAttributes
	switch {
	case alg == hsm.RSA2048:
		want = rsaAttributes
	case template.point == profiles.PointXY:
		want = append(slices.Clone(pairAttributes), template.pointX, template.pointY)
	}
	pub, err := t.attributes(s, halves[0], want...)
	if err != nil {
		return hsm.KeyInfo{}, err
	}
	if alg == hsm.RSA2048 && new(big.Int).SetBytes(pub[p11.CKA_MODULUS]).BitLen() == 3072 {
		info.Algorithm, template = hsm.RSA3072, t.cfg.Profile.Keys[hsm.RSA3072]
	}
	if info.Public, err = publicKey(info.Algorithm, template, pub); err != nil {
		return hsm.KeyInfo{}, err
	}
	return info, nil
}

func halfKey(id []byte, label string) string { return string(id) + "\x00" + label }

// publicKey reads CKA_EC_POINT or CKA_MODULUS and CKA_PUBLIC_EXPONENT.
func publicKey(alg hsm.Algorithm, template KeyTemplate, a map[uint][]byte) (crypto.PublicKey, error) {
	if alg == hsm.SM2 {
		curve, has := a[p11.CKA_EC_PARAMS]
		if len(template.ECParams) > 0 && (has || !template.OmitCurve) && !bytes.Equal(curve, template.ECParams) {
			return nil, errForeignKey
		}
		pub, err := template.readPoint(a)
		if err != nil {
			return nil, err
		}
		return pub, nil
	}
	n, e := new(big.Int).SetBytes(a[p11.CKA_MODULUS]), new(big.Int).SetBytes(a[p11.CKA_PUBLIC_EXPONENT])
	if uint(n.BitLen()) != template.ModulusBits || n.Bit(0) == 0 || !e.IsInt64() || e.Int64() < 3 || e.Int64() > 1<<31-1 || e.Bit(0) == 0 {
		return nil, fmt.Errorf("%w: RSA modulus of %d bits, exponent %s", errForeignKey, n.BitLen(), e)
	}
	return &rsa.PublicKey{N: n, E: int(e.Int64())}, nil
}

// readPoint reads the public point in the form that the profile declares.
func (k KeyTemplate) readPoint(a map[uint][]byte) (crypto.PublicKey, error) {
	v := a[p11.CKA_EC_POINT]
	fits := true
	switch k.point {
	case profiles.PointOctetString:
		fits = len(v) == 67 && v[0] == 4 && v[1] == 65 && v[2] == 4
	case profiles.PointUncompressed:
		fits = len(v) == 65 && v[0] == 4
	case profiles.PointRaw:
		fits = len(v) == 64
	case profiles.PointXY:
		x, y := a[k.pointX], a[k.pointY]
		fits = len(x) == 32 && len(y) == 32
		v = slices.Concat(x, y)
	}
	if !fits {
		return nil, fmt.Errorf("%w: keys.sm2.point = %q，密码机给出 %d 字节 (the point has another form)", errUnfit, k.point, len(v))
	}
	return ecPoint(v)
}

// withZA puts ZA for the default ID before a message.
func (t *Token) withZA(s p11.SessionHandle, label string, message []byte) ([]byte, error) {
	info, err := t.find(s, label)
	if err != nil {
		return nil, err
	}
	pub, ok := info.Public.(*ecdsa.PublicKey)
	if !ok {
		return nil, &hsm.Error{Call: "C_SignInit", RV: 0x63} // CKR_KEY_TYPE_INCONSISTENT
	}
	za, err := sm2.CalculateZA(pub, []byte(hsm.DefaultSM2ID))
	if err != nil {
		return nil, err
	}
	return slices.Concat(za, message), nil
}

// ecPoint reads CKA_EC_POINT: the DER of an OCTET STRING with the uncompressed point (PKCS#11 v2.40 mechanisms
// §2.3.3), or, as some modules have it, the point alone, or its 64 bytes of coordinates. The point is on the curve.
func ecPoint(v []byte) (crypto.PublicKey, error) {
	in := cryptobyte.String(v)
	var inner cryptobyte.String
	if len(v) != 65 && len(v) != 64 && in.ReadASN1(&inner, asn1.OCTET_STRING) && in.Empty() {
		v = inner
	}
	if len(v) == 64 {
		v = append([]byte{4}, v...)
	}
	if len(v) != 65 || v[0] != 4 {
		return nil, fmt.Errorf("hsm/pkcs11: CKA_EC_POINT of %d bytes is no uncompressed point", len(v))
	}
	pub, err := sm2.NewPublicKey(v)
	if err != nil {
		return nil, fmt.Errorf("hsm/pkcs11: CKA_EC_POINT of %d bytes: %w", len(v), err)
	}
	return pub, nil
}

// find describes the one key with this label.
func (t *Token) find(s p11.SessionHandle, label string) (hsm.KeyInfo, error) {
	if err := t.loggedIn(s); err != nil {
		return hsm.KeyInfo{}, err
	}
	var handles []p11.ObjectHandle
	secret := false
	for _, class := range []uint{p11.CKO_PRIVATE_KEY, p11.CKO_SECRET_KEY} {
		h, err := t.objects(s, 2, p11.NewAttribute(p11.CKA_CLASS, class), p11.NewAttribute(p11.CKA_LABEL, label))
		if err != nil {
			return hsm.KeyInfo{}, err
		}
		if len(h) > 0 {
			secret = class == p11.CKO_SECRET_KEY
		}
		handles = append(handles, h...)
	}
	if err := exactlyOne(len(handles)); err != nil {
		return hsm.KeyInfo{}, err
	}
	return t.keyInfo(s, handles[0], secret, nil)
}

// FindKey implements hsm.Token.
func (t *Token) FindKey(ctx context.Context, label string) (hsm.KeyInfo, error) {
	if err := checkLabel(label); err != nil {
		return hsm.KeyInfo{}, err
	}
	var info hsm.KeyInfo
	err := t.run(ctx, false, func(s p11.SessionHandle, _ uint64) (err error) {
		info, err = t.find(s, label)
		return err
	})
	if err != nil {
		return hsm.KeyInfo{}, fmt.Errorf("hsm/pkcs11: finding key %q: %w", label, err)
	}
	return info, nil
}

// onToken leaves session objects out: unwrapped keys, of which there may be thousands.
var onToken = p11.NewAttribute(p11.CKA_TOKEN, true)

// Keys implements hsm.Token. Keys of kinds that the profile does not describe are left out, and logged.
func (t *Token) Keys(ctx context.Context) ([]hsm.KeyInfo, error) {
	var infos []hsm.KeyInfo
	list := func(s p11.SessionHandle, _ uint64) error {
		infos = nil
		if err := t.loggedIn(s); err != nil {
			return err
		}
		publics := map[string][]p11.ObjectHandle{}
		found, err := t.objects(s, 0, p11.NewAttribute(p11.CKA_CLASS, uint(p11.CKO_PUBLIC_KEY)), onToken)
		if err != nil {
			return err
		}
		for _, h := range found {
			a, err := t.attributes(s, h, p11.CKA_ID, p11.CKA_LABEL)
			if t.gone(s, err) {
				continue
			}
			if err != nil {
				return err
			}
			k := halfKey(a[p11.CKA_ID], string(a[p11.CKA_LABEL]))
			publics[k] = append(publics[k], h)
		}
		for _, class := range []uint{p11.CKO_PRIVATE_KEY, p11.CKO_SECRET_KEY} {
			found, err := t.objects(s, 0, p11.NewAttribute(p11.CKA_CLASS, class), onToken)
			if err != nil {
				return err
			}
			for _, h := range found {
				info, err := t.keyInfo(s, h, class == p11.CKO_SECRET_KEY, publics)
				switch {
				case errors.Is(err, errForeignKey):
					t.cfg.Log.WithError(err).Debug("key left out of the list")
				case t.gone(s, err):
				case err != nil:
					return err
				default:
					if info.Uses, err = t.useCounter(s, h, class); t.gone(s, err) {
						continue
					} else if err != nil {
						return err
					}
					if info.AlwaysSensitive, info.Local, err = t.birth(s, h); t.gone(s, err) {
						continue
					} else if err != nil {
						return err
					}
					infos = append(infos, info)
				}
			}
		}
		return nil
	}
	err := t.run(ctx, false, list)
	// Where the token does not say whether it lost the session or the key is gone, keys that go while they are listed look like the former.
	for try := 0; try < 3 && t.cfg.Profile.noSessionInfo && hsm.ClassifyError(err) == hsm.ClassRefind; try++ {
		err = t.run(ctx, false, list)
	}
	if err != nil {
		return nil, fmt.Errorf("hsm/pkcs11: listing keys: %w", err)
	}
	return infos, nil
}

// gone says whether err means that an object that was just found was destroyed since, by another caller: the token does
// not know it, and the login stands. Where the profile forbids to ask for the login, that cannot be said.
func (t *Token) gone(s p11.SessionHandle, err error) bool {
	err = t.cfg.Profile.translate(err)
	return hsm.ClassifyError(err) == hsm.ClassRefind && !t.cfg.Profile.noSessionInfo && t.loggedIn(s) == nil
}

// birth reads what the token says of how a key came to be, nil where it does not say.
func (t *Token) birth(s p11.SessionHandle, h p11.ObjectHandle) (alwaysSensitive, local *bool, err error) {
	a, err := t.attributes(s, h, p11.CKA_ALWAYS_SENSITIVE, p11.CKA_LOCAL)
	said := func(typ uint) *bool {
		if len(a[typ]) != 1 {
			return nil
		}
		is := boolean(a[typ])
		return &is
	}
	return said(p11.CKA_ALWAYS_SENSITIVE), said(p11.CKA_LOCAL), err
}

// useCounter reads how often a private key has signed, nil where the token does not say.
func (t *Token) useCounter(s p11.SessionHandle, h p11.ObjectHandle, class uint) (*uint64, error) {
	typ := t.cfg.Profile.UseCounter
	if typ == 0 || class != p11.CKO_PRIVATE_KEY {
		return nil, nil
	}
	a, err := t.attributes(s, h, typ)
	if err != nil || len(a[typ]) != 8 {
		return nil, err
	}
	n := binary.NativeEndian.Uint64(a[typ])
	return &n, nil
}

// GenerateKey implements hsm.Token. A key that the token then describes as extractable or not sensitive is destroyed
// again, and an error answered.
func (t *Token) GenerateKey(ctx context.Context, spec hsm.KeySpec) (hsm.KeyInfo, error) {
	if err := checkLabel(spec.Label); err != nil {
		return hsm.KeyInfo{}, err
	}
	template, ok := t.cfg.Profile.Keys[spec.Algorithm]
	if !ok {
		return hsm.KeyInfo{}, fmt.Errorf("hsm/pkcs11: profile %q makes no %s keys: %w", t.cfg.Profile.Name, spec.Algorithm,
			&hsm.Error{Call: "C_GenerateKeyPair", RV: 0x70})
	}
	id := spec.ID
	if len(id) == 0 {
		id = make([]byte, 16)
		rand.Read(id) // never fails (crypto/rand)
	}
	// Between the search and the generation nobody in this process may take the label.
	t.keygen.Lock()
	defer t.keygen.Unlock()
	var info hsm.KeyInfo
	err := t.run(ctx, true, func(s p11.SessionHandle, _ uint64) error {
		if err := t.loggedIn(s); err != nil {
			return err
		}
		found, err := t.objects(s, 0, p11.NewAttribute(p11.CKA_LABEL, spec.Label))
		if err != nil {
			return err
		}
		for _, h := range found {
			a, err := t.attributes(s, h, p11.CKA_CLASS)
			if err != nil {
				return err
			}
			for _, class := range keyClasses {
				if sameUlong(a[p11.CKA_CLASS], class) {
					return hsm.ErrKeyExists
				}
			}
		}
		info, err = t.generate(s, template, spec.Label, id)
		return final(err)
	})
	if err != nil {
		return hsm.KeyInfo{}, fmt.Errorf("hsm/pkcs11: generating %s key %q: %w", spec.Algorithm, spec.Label, err)
	}
	return info, nil
}

var keyClasses = []uint{p11.CKO_PRIVATE_KEY, p11.CKO_SECRET_KEY, p11.CKO_PUBLIC_KEY}

func (t *Token) generate(s p11.SessionHandle, template KeyTemplate, label string, id []byte) (hsm.KeyInfo, error) {
	public, private := template.templates(label, id)
	m := []*p11.Mechanism{p11.NewMechanism(template.Generate, nil)}
	var made []p11.ObjectHandle
	if template.Secret {
		h, err := t.lib.ctx.GenerateKey(s, m, private)
		if err != nil {
			return hsm.KeyInfo{}, call("C_GenerateKey", err)
		}
		made = append(made, h)
	} else {
		pub, priv, err := t.lib.ctx.GenerateKeyPair(s, m, public, private)
		if err != nil {
			return hsm.KeyInfo{}, call("C_GenerateKeyPair", err)
		}
		made = append(made, priv, pub)
	}
	info, err := t.find(s, label)
	if err == nil && (info.Extractable || !info.Sensitive) {
		err = fmt.Errorf("the token made the key extractable or not sensitive (sensitive %v, extractable %v); it was destroyed",
			info.Sensitive, info.Extractable)
		for _, h := range made {
			if derr := t.lib.ctx.DestroyObject(s, h); derr != nil {
				err = fmt.Errorf("%w; destroying it: %w", err, call("C_DestroyObject", derr))
			}
		}
	}
	return info, err
}

// DestroyKey implements hsm.Token. Both halves of a pair go, the private one first; a public half that stayed behind
// alone (power loss between the two) goes too.
func (t *Token) DestroyKey(ctx context.Context, label string) error {
	if err := checkLabel(label); err != nil {
		return err
	}
	t.keygen.Lock()
	defer t.keygen.Unlock()
	err := t.run(ctx, true, func(s p11.SessionHandle, _ uint64) error {
		if err := t.loggedIn(s); err != nil {
			return err
		}
		var doomed []p11.ObjectHandle
		keys := 0
		for _, class := range keyClasses {
			found, err := t.objects(s, 0, p11.NewAttribute(p11.CKA_CLASS, class), p11.NewAttribute(p11.CKA_LABEL, label))
			if err != nil {
				return err
			}
			doomed = append(doomed, found...)
			if class != p11.CKO_PUBLIC_KEY {
				keys += len(found)
			}
			if len(found) > 1 {
				keys = len(found)
			}
		}
		if len(doomed) == 0 {
			return hsm.ErrKeyNotFound
		}
		if keys > 1 {
			return hsm.ErrKeyAmbiguous
		}
		t.forgetLabel(label)
		for _, h := range doomed {
			if err := t.lib.ctx.DestroyObject(s, h); err != nil {
				return final(call("C_DestroyObject", err))
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("hsm/pkcs11: destroying key %q: %w", label, err)
	}
	return nil
}

func (t *Token) forgetLabel(label string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.handles, handleKey{label: label})
	delete(t.handles, handleKey{label: label, secret: true})
}

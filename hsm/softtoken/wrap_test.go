package softtoken_test

import (
	"bytes"
	"crypto/cipher"
	"encoding/binary"
	"encoding/hex"
	"math/big"
	"os"
	"path/filepath"
	"testing"

	"yinjian/hsm/softtoken"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/sm4"
	"github.com/emmansun/gmsm/smx509"
	"github.com/miekg/pkcs11"
)

// kek is what a key that carries keys is for.
var kek = []*pkcs11.Attribute{attr(pkcs11.CKA_WRAP, true), attr(pkcs11.CKA_UNWRAP, true)}

// trust has the security officer mark the key of that label as trusted, and logs the user in again.
func trust(t testing.TB, p *pkcs11.Ctx, s pkcs11.SessionHandle, label string) {
	t.Helper()
	must(t, p.Logout(s))
	must(t, p.Login(s, pkcs11.CKU_SO, soPIN))
	must(t, p.SetAttributeValue(s, findOne(t, p, s, pkcs11.CKO_SECRET_KEY, label), []*pkcs11.Attribute{attr(pkcs11.CKA_TRUSTED, true)}))
	must(t, p.Logout(s))
	must(t, p.Login(s, pkcs11.CKU_USER, userPIN))
}

func extractablePair(t testing.TB, p *pkcs11.Ctx, s pkcs11.SessionHandle, rsa bool, more ...*pkcs11.Attribute) (pub, priv pkcs11.ObjectHandle) {
	t.Helper()
	m, public := mech(softtoken.CKMNeutralSM2KeyPairGen, nil), []*pkcs11.Attribute(nil)
	if rsa {
		m, public = mech(pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN, nil), []*pkcs11.Attribute{attr(pkcs11.CKA_MODULUS_BITS, 2048)}
	}
	pub, priv, err := p.GenerateKeyPair(s, m, public, append(more, attr(pkcs11.CKA_EXTRACTABLE, true)))
	must(t, err)
	return pub, priv
}

// A wrapped key is what the standards say it is, to gmsm and to OpenSSL, and comes back as the key it was; in session
// objects that count their signatures and go with their session.
func TestWrapAndUnwrap(t *testing.T) {
	t.Parallel()
	_, p, s := loggedIn(t)
	outer := importSM4(t, p, s, sm4Key, kek...)
	iv := unhex(t, "101112131415161718191a1b1c1d1e1f")
	block, err := sm4.NewCipher(sm4Key)
	must(t, err)
	aead, err := cipher.NewGCM(block)
	must(t, err)
	aad := []byte("staff key 7")
	open := map[string]func([]byte) []byte{
		"GCM": func(w []byte) []byte {
			out, err := aead.Open(nil, w[:12], w[12:], aad)
			must(t, err)
			return out
		},
		"CBC": func(w []byte) []byte {
			in, out := filepath.Join(t.TempDir(), "in"), filepath.Join(t.TempDir(), "out")
			must(t, os.WriteFile(in, w, 0o600))
			tool(t, nil, "openssl", "enc", "-d", "-sm4-cbc", "-K", hex.EncodeToString(sm4Key), "-iv", hex.EncodeToString(iv), "-in", in, "-out", out)
			b, err := os.ReadFile(out)
			must(t, err)
			return b
		},
	}
	for name, m := range map[string][]*pkcs11.Mechanism{"GCM": gcm(nil, aad), "CBC": mech(softtoken.CKMNeutralSM4CBCPad, iv)} {
		pub, priv := extractablePair(t, p, s, false)
		wrapped, err := p.WrapKey(s, m, outer, priv)
		must(t, err)
		key, err := smx509.ParsePKCS8PrivateKey(open[name](wrapped))
		must(t, err)
		if k, ok := key.(*sm2.PrivateKey); !ok || !k.PublicKey.Equal(sm2Public(t, p, s, pub)) {
			t.Errorf("%s: the wrapped key is %T", name, key)
		}
		if again, err := p.WrapKey(s, m, outer, priv); err != nil || name == "GCM" && bytes.Equal(again, wrapped) {
			t.Errorf("%s: wrapped again: %x, %v", name, again, err)
		}
		other := openRW(t, p, 0)
		back, err := p.UnwrapKey(other, m, outer, wrapped, []*pkcs11.Attribute{attr(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY), attr(pkcs11.CKA_KEY_TYPE, softtoken.CKKNeutralSM2)})
		must(t, err)
		for typ, want := range map[uint]byte{
			pkcs11.CKA_PRIVATE: 1, pkcs11.CKA_SENSITIVE: 1, pkcs11.CKA_ALWAYS_SENSITIVE: 0, pkcs11.CKA_EXTRACTABLE: 0, pkcs11.CKA_NEVER_EXTRACTABLE: 0,
			pkcs11.CKA_LOCAL: 0, pkcs11.CKA_TOKEN: 0, pkcs11.CKA_SIGN: 1, pkcs11.CKA_COPYABLE: 0,
		} {
			if v := value(t, p, other, back, typ); !bytes.Equal(v, []byte{want}) {
				t.Errorf("%s: attribute %#x of the unwrapped key = %x, want %d", name, typ, v, want)
			}
		}
		e := bytes.Repeat([]byte{7}, 32)
		for n := range 3 {
			if uses := binary.NativeEndian.Uint64(value(t, p, s, back, ckaUses)); uses != uint64(n) {
				t.Errorf("%s: the unwrapped key counts %d signatures, want %d", name, uses, n)
			}
			sig := mustSign(t, p, s, mech(softtoken.CKMNeutralSM2, nil), back, e)
			if !sm2.VerifyASN1(sm2Public(t, p, s, pub), e, derOf(sig)) {
				t.Errorf("%s: the unwrapped key signs wrongly", name)
			}
		}
		must(t, p.CloseSession(other))
		wantRV(t, name+": the unwrapped key after its session", p.SignInit(s, mech(softtoken.CKMNeutralSM2, nil), back), pkcs11.CKR_KEY_HANDLE_INVALID)

		rsaPub, rsaKey := extractablePair(t, p, s, true)
		wrapped, err = p.WrapKey(s, m, outer, rsaKey)
		must(t, err)
		der := filepath.Join(t.TempDir(), "k")
		must(t, os.WriteFile(der, open[name](wrapped), 0o600))
		tool(t, nil, "openssl", "pkey", "-inform", "DER", "-in", der, "-check", "-noout")
		templ := []*pkcs11.Attribute{attr(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY), attr(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_RSA)}
		back, err = p.UnwrapKey(s, m, outer, wrapped, templ)
		must(t, err)
		if !bytes.Equal(value(t, p, s, back, pkcs11.CKA_MODULUS), value(t, p, s, rsaPub, pkcs11.CKA_MODULUS)) {
			t.Errorf("%s: another RSA key came back", name)
		}
		sig := mustSign(t, p, s, mech(pkcs11.CKM_SHA256_RSA_PKCS, nil), back, e)
		must(t, p.VerifyInit(s, mech(pkcs11.CKM_SHA256_RSA_PKCS, nil), rsaPub))
		must(t, p.Verify(s, e, sig))

		// A blob is what it was, and under GCM for whom it was.
		templ[1] = attr(pkcs11.CKA_KEY_TYPE, softtoken.CKKNeutralSM2)
		_, err = p.UnwrapKey(s, m, outer, wrapped, templ)
		wantRV(t, name+": an RSA key unwrapped as one of SM2", err, pkcs11.CKR_WRAPPED_KEY_INVALID)
		_, err = p.UnwrapKey(s, m, outer, wrapped, []*pkcs11.Attribute{attr(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), attr(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_GENERIC_SECRET)})
		wantRV(t, name+": an RSA key unwrapped as a secret", err, pkcs11.CKR_WRAPPED_KEY_INVALID)
		_, err = p.UnwrapKey(s, m, outer, wrapped[:15], templ)
		wantRV(t, name+": a part of it", err, pkcs11.CKR_WRAPPED_KEY_LEN_RANGE)
		wrapped[len(wrapped)-1] ^= 1
		_, err = p.UnwrapKey(s, m, outer, wrapped, templ)
		wantRV(t, name+": altered", err, pkcs11.CKR_WRAPPED_KEY_INVALID)

		data := generateSM4(t, p, s, "data "+name, attr(pkcs11.CKA_EXTRACTABLE, true))
		wrapped, err = p.WrapKey(s, m, outer, data)
		must(t, err)
		if n := len(open[name](wrapped)); n != 16 {
			t.Errorf("%s: an SM4 key of %d bytes", name, n)
		}
		back, err = p.UnwrapKey(s, m, outer, wrapped, []*pkcs11.Attribute{attr(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), attr(pkcs11.CKA_KEY_TYPE, softtoken.CKKNeutralSM4)})
		must(t, err)
		ecb := mech(softtoken.CKMNeutralSM4ECB, nil)
		a, err := encrypt(p, s, ecb, data, e)
		must(t, err)
		if b, err := encrypt(p, s, ecb, back, e); err != nil || !bytes.Equal(a, b) {
			t.Errorf("%s: another SM4 key came back", name)
		}
	}
	_, priv := extractablePair(t, p, s, false)
	wrapped, err := p.WrapKey(s, gcm(nil, aad), outer, priv)
	must(t, err)
	_, err = p.UnwrapKey(s, gcm(nil, []byte("staff key 8")), outer, wrapped, []*pkcs11.Attribute{attr(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY), attr(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_EC)})
	wantRV(t, "unwrapped for another", err, pkcs11.CKR_WRAPPED_KEY_INVALID)
	_, err = p.WrapKey(s, gcm(make([]byte, 12), aad), outer, priv)
	wantRV(t, "wrapped with a nonce of the caller's", err, pkcs11.CKR_MECHANISM_PARAM_INVALID)
}

// Whom the security officer trusts, and what that protects.
func TestTrusted(t *testing.T) {
	t.Parallel()
	m, p, s := loggedIn(t)
	generateSM4(t, p, s, "trusted", kek...)
	plain := generateSM4(t, p, s, "plain", kek...)
	generateSM4(t, p, s, "leaves", append(kek[:2:2], attr(pkcs11.CKA_EXTRACTABLE, true))...)
	data := generateSM4(t, p, s, "data")
	trusted := []*pkcs11.Attribute{attr(pkcs11.CKA_TRUSTED, true)}
	wantRV(t, "trusted by the user", p.SetAttributeValue(s, plain, trusted), pkcs11.CKR_ATTRIBUTE_READ_ONLY)
	_, guarded := extractablePair(t, p, s, false, attr(pkcs11.CKA_WRAP_WITH_TRUSTED, true), attr(pkcs11.CKA_TOKEN, true), attr(pkcs11.CKA_LABEL, "guarded"))

	// The security officer sees keys that wrap, no other private object, and does nothing with them but this.
	must(t, p.Logout(s))
	must(t, p.Login(s, pkcs11.CKU_SO, soPIN))
	if n := len(find(t, p, s, attr(pkcs11.CKA_PRIVATE, true))); n != 3 {
		t.Errorf("the security officer sees %d private objects, want 3", n)
	}
	key := findOne(t, p, s, pkcs11.CKO_SECRET_KEY, "trusted")
	wantRV(t, "a handle of the user's", p.SetAttributeValue(s, data, trusted), pkcs11.CKR_OBJECT_HANDLE_INVALID)
	wantRV(t, "trusting a key that may leave", p.SetAttributeValue(s, findOne(t, p, s, pkcs11.CKO_SECRET_KEY, "leaves"), trusted), pkcs11.CKR_TEMPLATE_INCONSISTENT)
	wantRV(t, "another attribute", p.SetAttributeValue(s, key, []*pkcs11.Attribute{attr(pkcs11.CKA_LABEL, "x")}), pkcs11.CKR_USER_NOT_LOGGED_IN)
	wantRV(t, "trust and another attribute", p.SetAttributeValue(s, key, append(trusted[:1:1], attr(pkcs11.CKA_LABEL, "x"))), pkcs11.CKR_USER_NOT_LOGGED_IN)
	wantRV(t, "destroying it", p.DestroyObject(s, key), pkcs11.CKR_USER_NOT_LOGGED_IN)
	_, err := p.CopyObject(s, key, nil)
	wantRV(t, "copying it", err, pkcs11.CKR_USER_NOT_LOGGED_IN)
	_, err = p.WrapKey(s, gcm(nil, nil), key, key)
	wantRV(t, "wrapping with it", err, pkcs11.CKR_WRAPPING_KEY_HANDLE_INVALID)
	_, err = p.UnwrapKey(s, gcm(nil, nil), key, make([]byte, 60), []*pkcs11.Attribute{attr(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), attr(pkcs11.CKA_KEY_TYPE, softtoken.CKKNeutralSM4)})
	wantRV(t, "unwrapping with it", err, pkcs11.CKR_UNWRAPPING_KEY_HANDLE_INVALID)
	wantRV(t, "encrypting with it", p.EncryptInit(s, mech(softtoken.CKMNeutralSM4ECB, nil), key), pkcs11.CKR_KEY_HANDLE_INVALID)
	wantRV(t, "signing with it", p.SignInit(s, mech(softtoken.CKMNeutralSM4CMAC, nil), key), pkcs11.CKR_KEY_HANDLE_INVALID)
	must(t, p.Logout(s))
	if n, keyed := m.server.OpenPrivate(0); n != 0 || keyed {
		t.Errorf("%d private objects lie open after the security officer has gone, keyed %v", n, keyed)
	}
	must(t, p.Login(s, pkcs11.CKU_USER, userPIN))
	trust(t, p, s, "trusted")
	must(t, p.Finalize())
	m.restart(t)
	must(t, p.Initialize())
	s = openRW(t, p, 0)
	must(t, p.Login(s, pkcs11.CKU_USER, userPIN))
	key, plain = findOne(t, p, s, pkcs11.CKO_SECRET_KEY, "trusted"), findOne(t, p, s, pkcs11.CKO_SECRET_KEY, "plain")
	guarded = findOne(t, p, s, pkcs11.CKO_PRIVATE_KEY, "guarded")

	_, err = p.WrapKey(s, gcm(nil, nil), plain, guarded)
	wantRV(t, "wrapped with a key that is not trusted", err, pkcs11.CKR_KEY_NOT_WRAPPABLE)
	wrapped, err := p.WrapKey(s, gcm(nil, nil), key, guarded)
	must(t, err)
	_, err = p.CopyObject(s, key, nil)
	wantRV(t, "copying a key that wraps", err, pkcs11.CKR_ACTION_PROHIBITED)
	base := []*pkcs11.Attribute{attr(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY), attr(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_EC)}
	for name, row := range map[string]struct {
		more []*pkcs11.Attribute
		want uint
	}{
		"may leave":                     {[]*pkcs11.Attribute{attr(pkcs11.CKA_EXTRACTABLE, true), attr(pkcs11.CKA_WRAP_WITH_TRUSTED, false)}, pkcs11.CKR_TEMPLATE_INCONSISTENT},
		"may leave under a trusted key": {[]*pkcs11.Attribute{attr(pkcs11.CKA_EXTRACTABLE, true)}, pkcs11.CKR_OK},
		"is not sensitive":              {[]*pkcs11.Attribute{attr(pkcs11.CKA_SENSITIVE, false)}, pkcs11.CKR_TEMPLATE_INCONSISTENT},
		"was always sensitive":          {[]*pkcs11.Attribute{attr(pkcs11.CKA_ALWAYS_SENSITIVE, true)}, pkcs11.CKR_ATTRIBUTE_READ_ONLY},
		"brings a value":                {[]*pkcs11.Attribute{attr(pkcs11.CKA_VALUE, sm4Key)}, pkcs11.CKR_TEMPLATE_INCONSISTENT},
		"is another class twice":        {[]*pkcs11.Attribute{attr(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY)}, pkcs11.CKR_TEMPLATE_INCONSISTENT},
		"is on another curve":           {[]*pkcs11.Attribute{attr(pkcs11.CKA_EC_PARAMS, []byte{6, 1, 1})}, pkcs11.CKR_TEMPLATE_INCONSISTENT},
		"is copyable":                   {[]*pkcs11.Attribute{attr(pkcs11.CKA_COPYABLE, true)}, pkcs11.CKR_TEMPLATE_INCONSISTENT},
	} {
		back, err := p.UnwrapKey(s, gcm(nil, nil), key, wrapped, append(base[:2:2], row.more...))
		wantRV(t, "an unwrapped key that "+name, err, row.want)
		if row.want == pkcs11.CKR_OK {
			_, err = p.WrapKey(s, gcm(nil, nil), plain, back)
			wantRV(t, "that key, wrapped with one that is not trusted", err, pkcs11.CKR_KEY_NOT_WRAPPABLE)
			_, err = p.WrapKey(s, gcm(nil, nil), key, back)
			wantRV(t, "that key, wrapped again", err, pkcs11.CKR_OK)
		}
	}
	ro, err := p.OpenSession(0, pkcs11.CKF_SERIAL_SESSION)
	must(t, err)
	_, err = p.UnwrapKey(ro, gcm(nil, nil), key, wrapped, append(base[:2:2], attr(pkcs11.CKA_TOKEN, true)))
	wantRV(t, "a token object in a read-only session", err, pkcs11.CKR_SESSION_READ_ONLY)
	must(t, p.CloseSession(ro))
	must(t, p.SetAttributeValue(s, key, []*pkcs11.Attribute{attr(pkcs11.CKA_TRUSTED, false)}))
	_, err = p.WrapKey(s, gcm(nil, nil), key, guarded)
	wantRV(t, "wrapped with a key that is not trusted any more", err, pkcs11.CKR_KEY_NOT_WRAPPABLE)
}

// A shop is one module under comparison: its mechanisms for the same things.
type shop struct {
	p                *pkcs11.Ctx
	s                pkcs11.SessionHandle
	slot             uint
	gen, wrap, plain []*pkcs11.Mechanism
	keyType          uint
	length           []*pkcs11.Attribute
}

func (x *shop) generate(t *testing.T, more ...*pkcs11.Attribute) pkcs11.ObjectHandle {
	t.Helper()
	h, err := x.p.GenerateKey(x.s, x.gen, append(append(more, x.length...), attr(pkcs11.CKA_SENSITIVE, true), attr(pkcs11.CKA_PRIVATE, true)))
	must(t, err)
	return h
}

func softHSM(t *testing.T) *shop {
	t.Helper()
	const path = "/usr/lib/softhsm/libsofthsm2.so"
	if _, err := os.Stat(path); err != nil {
		t.Skip("SoftHSM2 is not installed")
	}
	p := pkcs11.New(path)
	must(t, p.Initialize())
	t.Cleanup(func() { p.Finalize(); p.Destroy() })
	initToken(t, p, 0, "softhsm")
	slots, err := p.GetSlotList(true)
	must(t, err)
	s := openRW(t, p, slots[0])
	must(t, p.Login(s, pkcs11.CKU_USER, userPIN))
	return &shop{p, s, slots[0], mech(pkcs11.CKM_AES_KEY_GEN, nil), mech(pkcs11.CKM_AES_KEY_WRAP, nil), mech(pkcs11.CKM_AES_ECB, nil), pkcs11.CKK_AES,
		[]*pkcs11.Attribute{attr(pkcs11.CKA_VALUE_LEN, 16)}}
}

// TestLikeSoftHSM makes the same calls on both modules and compares the codes. Where ours means to differ, other says
// what SoftHSM2 answers.
func TestLikeSoftHSM(t *testing.T) {
	their := softHSM(t)
	_, p, s := loggedIn(t)
	ours := &shop{p, s, 0, mech(softtoken.CKMNeutralSM4KeyGen, nil), gcm(nil, nil), mech(softtoken.CKMNeutralSM4ECB, nil), softtoken.CKKNeutralSM4, nil}
	yes, no := func(typ uint) *pkcs11.Attribute { return attr(typ, true) }, func(typ uint) *pkcs11.Attribute { return attr(typ, false) }
	set := func(first []*pkcs11.Attribute, change *pkcs11.Attribute) func(*testing.T, *shop) error {
		return func(t *testing.T, x *shop) error {
			return x.p.SetAttributeValue(x.s, x.generate(t, first...), []*pkcs11.Attribute{change})
		}
	}
	duplicate := func(first []*pkcs11.Attribute, change ...*pkcs11.Attribute) func(*testing.T, *shop) error {
		return func(t *testing.T, x *shop) error {
			_, err := x.p.CopyObject(x.s, x.generate(t, first...), change)
			return err
		}
	}
	wrap := func(outer, inner []*pkcs11.Attribute) func(*testing.T, *shop) error {
		return func(t *testing.T, x *shop) error {
			_, err := x.p.WrapKey(x.s, x.wrap, x.generate(t, outer...), x.generate(t, inner...))
			return err
		}
	}
	unwrap := func(templ ...*pkcs11.Attribute) func(*testing.T, *shop) error {
		return func(t *testing.T, x *shop) error {
			outer := x.generate(t, yes(pkcs11.CKA_WRAP), yes(pkcs11.CKA_UNWRAP))
			w, err := x.p.WrapKey(x.s, x.wrap, outer, x.generate(t, yes(pkcs11.CKA_EXTRACTABLE)))
			must(t, err)
			_, err = x.p.UnwrapKey(x.s, x.wrap, outer, w, append(templ, attr(pkcs11.CKA_KEY_TYPE, x.keyType)))
			return err
		}
	}
	wraps, leaves := []*pkcs11.Attribute{yes(pkcs11.CKA_WRAP)}, []*pkcs11.Attribute{yes(pkcs11.CKA_EXTRACTABLE)}
	secretClass := attr(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY)
	const same = ^uint(0)
	for _, row := range []struct {
		name  string
		run   func(*testing.T, *shop) error
		want  uint
		other uint
	}{
		{"set extractable", set(nil, yes(pkcs11.CKA_EXTRACTABLE)), pkcs11.CKR_ATTRIBUTE_READ_ONLY, same},
		{"clear extractable", set(leaves, no(pkcs11.CKA_EXTRACTABLE)), pkcs11.CKR_OK, same},
		{"clear sensitive", set(nil, no(pkcs11.CKA_SENSITIVE)), pkcs11.CKR_ATTRIBUTE_READ_ONLY, same},
		{"set wrap-with-trusted", set(leaves, yes(pkcs11.CKA_WRAP_WITH_TRUSTED)), pkcs11.CKR_OK, pkcs11.CKR_ATTRIBUTE_READ_ONLY},
		{"clear wrap-with-trusted", set([]*pkcs11.Attribute{yes(pkcs11.CKA_WRAP_WITH_TRUSTED)}, no(pkcs11.CKA_WRAP_WITH_TRUSTED)), pkcs11.CKR_ATTRIBUTE_READ_ONLY, same},
		{"set trusted as user", set(wraps, yes(pkcs11.CKA_TRUSTED)), pkcs11.CKR_ATTRIBUTE_READ_ONLY, same},
		{"set label", set(nil, attr(pkcs11.CKA_LABEL, "x")), pkcs11.CKR_OK, same},
		{"set local", set(nil, no(pkcs11.CKA_LOCAL)), pkcs11.CKR_ATTRIBUTE_READ_ONLY, same},
		{"set never-extractable", set(nil, yes(pkcs11.CKA_NEVER_EXTRACTABLE)), pkcs11.CKR_ATTRIBUTE_READ_ONLY, same},
		{"set class", set(nil, secretClass), pkcs11.CKR_ATTRIBUTE_READ_ONLY, same},
		{"set a label that is unmodifiable", set([]*pkcs11.Attribute{no(pkcs11.CKA_MODIFIABLE)}, attr(pkcs11.CKA_LABEL, "x")), pkcs11.CKR_ACTION_PROHIBITED, same},
		{"set copyable again", set([]*pkcs11.Attribute{no(pkcs11.CKA_COPYABLE)}, yes(pkcs11.CKA_COPYABLE)), pkcs11.CKR_ATTRIBUTE_READ_ONLY, same},
		{"take a use away", set([]*pkcs11.Attribute{yes(pkcs11.CKA_ENCRYPT)}, no(pkcs11.CKA_ENCRYPT)), pkcs11.CKR_OK, same},
		{"widen uses", set(wraps, yes(pkcs11.CKA_DECRYPT)), pkcs11.CKR_ATTRIBUTE_READ_ONLY, pkcs11.CKR_OK},

		{"copy", duplicate(nil, attr(pkcs11.CKA_ID, []byte{1})), pkcs11.CKR_OK, same},
		{"copy without a template", duplicate(nil), pkcs11.CKR_OK, pkcs11.CKR_ARGUMENTS_BAD},
		{"copy with a label", duplicate(nil, attr(pkcs11.CKA_LABEL, "x")), pkcs11.CKR_OK, same},
		{"copy to the token", duplicate(nil, yes(pkcs11.CKA_TOKEN)), pkcs11.CKR_OK, same},
		{"copy what is not copyable", duplicate([]*pkcs11.Attribute{no(pkcs11.CKA_COPYABLE)}, attr(pkcs11.CKA_LABEL, "x")), pkcs11.CKR_ACTION_PROHIBITED, same},
		{"copy to extractable", duplicate(nil, yes(pkcs11.CKA_EXTRACTABLE)), pkcs11.CKR_ATTRIBUTE_READ_ONLY, same},
		{"copy to not extractable", duplicate(leaves, no(pkcs11.CKA_EXTRACTABLE)), pkcs11.CKR_OK, same},
		{"copy to not sensitive", duplicate(nil, no(pkcs11.CKA_SENSITIVE)), pkcs11.CKR_ATTRIBUTE_READ_ONLY, same},
		{"copy a key that wraps", duplicate(wraps, attr(pkcs11.CKA_LABEL, "x")), pkcs11.CKR_ACTION_PROHIBITED, pkcs11.CKR_OK},

		{"wrap", wrap(wraps, leaves), pkcs11.CKR_OK, same},
		{"wrap what is not extractable", wrap(wraps, nil), pkcs11.CKR_KEY_UNEXTRACTABLE, same},
		{"wrap with a key that does not", wrap([]*pkcs11.Attribute{yes(pkcs11.CKA_ENCRYPT), no(pkcs11.CKA_WRAP)}, leaves), pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED, same},
		{"wrap with one that is not trusted", wrap(wraps, append(leaves[:1:1], yes(pkcs11.CKA_WRAP_WITH_TRUSTED))), pkcs11.CKR_KEY_NOT_WRAPPABLE, same},
		{"wrap with no key", func(t *testing.T, x *shop) error {
			_, err := x.p.WrapKey(x.s, x.wrap, 0x7fff_ffff, x.generate(t, leaves...))
			return err
		}, pkcs11.CKR_WRAPPING_KEY_HANDLE_INVALID, same},
		{"wrap no key", func(t *testing.T, x *shop) error {
			_, err := x.p.WrapKey(x.s, x.wrap, x.generate(t, wraps...), 0x7fff_ffff)
			return err
		}, pkcs11.CKR_KEY_HANDLE_INVALID, same},

		{"unwrap", unwrap(secretClass), pkcs11.CKR_OK, same},
		{"unwrap without a class", unwrap(), pkcs11.CKR_TEMPLATE_INCOMPLETE, same},
		{"unwrap trusted", unwrap(secretClass, yes(pkcs11.CKA_TRUSTED)), pkcs11.CKR_ATTRIBUTE_READ_ONLY, same},
		{"unwrap local", unwrap(secretClass, yes(pkcs11.CKA_LOCAL)), pkcs11.CKR_ATTRIBUTE_READ_ONLY, same},
		{"unwrap with a length", unwrap(secretClass, attr(pkcs11.CKA_VALUE_LEN, 16)), pkcs11.CKR_ATTRIBUTE_READ_ONLY, same},
		{"unwrap always sensitive", unwrap(secretClass, yes(pkcs11.CKA_ALWAYS_SENSITIVE)), pkcs11.CKR_ATTRIBUTE_READ_ONLY, same},
		{"unwrap to a readable key", unwrap(secretClass, no(pkcs11.CKA_SENSITIVE), yes(pkcs11.CKA_EXTRACTABLE)), pkcs11.CKR_TEMPLATE_INCONSISTENT, pkcs11.CKR_OK},
		{"unwrap a certificate", unwrap(attr(pkcs11.CKA_CLASS, pkcs11.CKO_CERTIFICATE)), pkcs11.CKR_TEMPLATE_INCONSISTENT, pkcs11.CKR_TEMPLATE_INCOMPLETE},
		{"unwrap with no key", func(t *testing.T, x *shop) error {
			_, err := x.p.UnwrapKey(x.s, x.wrap, 0x7fff_ffff, make([]byte, 48), []*pkcs11.Attribute{secretClass, attr(pkcs11.CKA_KEY_TYPE, x.keyType)})
			return err
		}, pkcs11.CKR_UNWRAPPING_KEY_HANDLE_INVALID, same},
	} {
		if row.other == same {
			row.other = row.want
		}
		got, other := row.run(t, ours), row.run(t, their)
		wantRV(t, row.name, got, row.want)
		wantRV(t, row.name+", SoftHSM2", other, row.other)
	}
}

// A copy is another object with the same key, and is less protected in nothing.
func TestCopy(t *testing.T) {
	t.Parallel()
	_, p, s := loggedIn(t)
	key := generateSM4(t, p, s, "k", attr(pkcs11.CKA_EXTRACTABLE, true))
	ecb, data := mech(softtoken.CKMNeutralSM4ECB, nil), make([]byte, 16)
	want, err := encrypt(p, s, ecb, key, data)
	must(t, err)
	other := openRW(t, p, 0)
	copied, err := p.CopyObject(other, key, []*pkcs11.Attribute{attr(pkcs11.CKA_TOKEN, false), attr(pkcs11.CKA_LABEL, "copy"), attr(pkcs11.CKA_EXTRACTABLE, false)})
	must(t, err)
	if got, err := encrypt(p, s, ecb, copied, data); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the copy encrypts to %x, %v", got, err)
	}
	for typ, want := range map[uint]byte{pkcs11.CKA_EXTRACTABLE: 0, pkcs11.CKA_NEVER_EXTRACTABLE: 0, pkcs11.CKA_ALWAYS_SENSITIVE: 1, pkcs11.CKA_LOCAL: 1, pkcs11.CKA_TOKEN: 0} {
		if v := value(t, p, s, copied, typ); !bytes.Equal(v, []byte{want}) {
			t.Errorf("attribute %#x of the copy = %x, want %d", typ, v, want)
		}
	}
	must(t, p.CloseSession(other))
	wantRV(t, "the copy after its session", p.EncryptInit(s, ecb, copied), pkcs11.CKR_KEY_HANDLE_INVALID)
	stays, err := p.CopyObject(s, key, []*pkcs11.Attribute{attr(pkcs11.CKA_LABEL, "stays")})
	must(t, err)
	must(t, p.DestroyObject(s, key))
	if got, err := encrypt(p, s, ecb, stays, data); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the copy, after its original, encrypts to %x, %v", got, err)
	}
	ro, err := p.OpenSession(0, pkcs11.CKF_SERIAL_SESSION)
	must(t, err)
	_, err = p.CopyObject(ro, stays, nil)
	wantRV(t, "a token object in a read-only session", err, pkcs11.CKR_SESSION_READ_ONLY)
	wantRV(t, "C_SetAttributeValue in a read-only session", p.SetAttributeValue(ro, stays, []*pkcs11.Attribute{attr(pkcs11.CKA_LABEL, "x")}), pkcs11.CKR_SESSION_READ_ONLY)
	_, err = p.CopyObject(s, stays, []*pkcs11.Attribute{attr(pkcs11.CKA_PRIVATE, false)})
	wantRV(t, "a public copy", err, pkcs11.CKR_ATTRIBUTE_READ_ONLY)
	pub, _ := generateSM2(t, p, s, "pair")
	must(t, p.Logout(s))
	_, err = p.CopyObject(s, pub, []*pkcs11.Attribute{attr(pkcs11.CKA_PRIVATE, true)})
	wantRV(t, "a private copy for nobody", err, pkcs11.CKR_USER_NOT_LOGGED_IN)
	_, err = p.CopyObject(s, pub, []*pkcs11.Attribute{attr(pkcs11.CKA_PRIVATE, true), attr(pkcs11.CKA_TOKEN, false)})
	wantRV(t, "a private copy in nobody's session", err, pkcs11.CKR_USER_NOT_LOGGED_IN)
	_, err = p.CopyObject(s, pub, []*pkcs11.Attribute{attr(pkcs11.CKA_TOKEN, false)})
	wantRV(t, "a public copy of a public key", err, pkcs11.CKR_OK)

	// The security officer's word is for the object he saw.
	must(t, p.CloseSession(ro))
	must(t, p.Login(s, pkcs11.CKU_SO, soPIN))
	must(t, p.SetAttributeValue(s, pub, []*pkcs11.Attribute{attr(pkcs11.CKA_TRUSTED, true)}))
	copied, err = p.CopyObject(s, pub, []*pkcs11.Attribute{attr(pkcs11.CKA_LABEL, "copy")})
	must(t, err)
	if a, b := value(t, p, s, pub, pkcs11.CKA_TRUSTED), value(t, p, s, copied, pkcs11.CKA_TRUSTED); a[0] != 1 || b[0] != 0 {
		t.Errorf("CKA_TRUSTED is %x, and %x in the copy", a, b)
	}
}

// Two programs that change one object do not undo each other's protection.
func TestTightenedForGood(t *testing.T) {
	t.Parallel()
	_, p, s := loggedIn(t)
	other := openRW(t, p, 0)
	for i := range 30 {
		onToken, tries := i < 3, 20 // each change of a token object waits for the disk
		if onToken {
			tries = 4
		}
		key, err := p.GenerateKey(s, mech(softtoken.CKMNeutralSM4KeyGen, nil), []*pkcs11.Attribute{attr(pkcs11.CKA_EXTRACTABLE, true), attr(pkcs11.CKA_TOKEN, onToken)})
		must(t, err)
		started, done := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(done)
			for n := range tries {
				p.SetAttributeValue(other, key, []*pkcs11.Attribute{attr(pkcs11.CKA_EXTRACTABLE, true)})
				if n == 0 {
					close(started)
				}
			}
		}()
		<-started
		must(t, p.SetAttributeValue(s, key, []*pkcs11.Attribute{attr(pkcs11.CKA_EXTRACTABLE, false)}))
		<-done
		if v := value(t, p, s, key, pkcs11.CKA_EXTRACTABLE); v[0] != 0 {
			t.Fatal("a key that was made unextractable is extractable again")
		}
	}
}

// A wrapped SM2 key outside [1, n-2] cannot sign: it is refused, and not found out at its first signature.
func TestUnwrapRange(t *testing.T) {
	m := newMachine(t)
	p := m.module(t)
	initToken(t, p, 0, "a")
	s := openRW(t, p, 0)
	must(t, p.Login(s, pkcs11.CKU_USER, userPIN))
	outer := importSM4(t, p, s, sm4Key, kek...)
	key, err := sm2.NewPrivateKey(bytes.Repeat([]byte{7}, 32))
	must(t, err)
	pkcs8, err := smx509.MarshalPKCS8PrivateKey(key)
	must(t, err)
	order := sm2.P256().Params().N
	for name, tt := range map[string]struct {
		d    *big.Int
		good bool
	}{
		"0": {big.NewInt(0), false}, "1": {big.NewInt(1), true}, "n-2": {new(big.Int).Sub(order, big.NewInt(2)), true},
		"n-1": {new(big.Int).Sub(order, big.NewInt(1)), false}, "n": {order, false},
	} {
		der := bytes.Replace(pkcs8, bytes.Repeat([]byte{7}, 32), tt.d.FillBytes(make([]byte, 32)), 1)
		h, err := p.UnwrapKey(s, gcm(nil, nil), outer, wrapOutside(t, der), []*pkcs11.Attribute{
			attr(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY), attr(pkcs11.CKA_KEY_TYPE, softtoken.CKKNeutralSM2), attr(pkcs11.CKA_SIGN, true)})
		if !tt.good {
			if err == nil {
				t.Errorf("d = %s was unwrapped", name)
				continue
			}
			wantRV(t, "C_UnwrapKey with d = "+name, err, pkcs11.CKR_WRAPPED_KEY_INVALID)
			continue
		}
		if err != nil {
			t.Errorf("d = %s: %v", name, err)
			continue
		}
		mustSign(t, p, s, mech(softtoken.CKMNeutralSM2, nil), h, bytes.Repeat([]byte{7}, 32))
	}
}

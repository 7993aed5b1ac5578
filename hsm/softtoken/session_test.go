package softtoken_test

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"unsafe"

	"github.com/emmansun/gmsm/sm3"
	"github.com/miekg/pkcs11"
	"yinjian/hsm/softtoken"
)

func TestSaysEvaluationOnly(t *testing.T) {
	t.Parallel()
	m := newFolder(t)
	log, logged := capture()
	m.cfg.Log = log
	m.start(t)
	p := m.module(t)
	initToken(t, p, 1, "医院")
	info, err := p.GetInfo()
	must(t, err)
	slot, err := p.GetSlotInfo(1)
	must(t, err)
	token, err := p.GetTokenInfo(1)
	must(t, err)
	for what, text := range map[string]string{
		"libraryDescription": info.LibraryDescription, "library's manufacturerID": info.ManufacturerID,
		"slotDescription": slot.SlotDescription, "slot's manufacturerID": slot.ManufacturerID,
		"token's manufacturerID": token.ManufacturerID,
	} {
		if !strings.Contains(text, "EVALUATION ONLY") {
			t.Errorf("%s = %q", what, text)
		}
	}
	if token.Model != "soft-evaluation" || token.Label != "医院" || len(token.SerialNumber) != 16 {
		t.Errorf("model %q, label %q, serial %q", token.Model, token.Label, token.SerialNumber)
	}
	want := uint(pkcs11.CKF_RNG | pkcs11.CKF_LOGIN_REQUIRED | pkcs11.CKF_USER_PIN_INITIALIZED | pkcs11.CKF_TOKEN_INITIALIZED)
	if token.Flags != want {
		t.Errorf("flags = %#x, want %#x", token.Flags, want)
	}
	m.stop()
	if !strings.Contains(logged(), "for evaluation only, not a certified product") {
		t.Errorf("log: %s", logged())
	}
	for _, secret := range []string{soPIN, userPIN, "correct horse"} {
		if strings.Contains(logged(), secret) {
			t.Errorf("the log shows %q", secret)
		}
	}
}

func TestSlots(t *testing.T) {
	t.Parallel()
	m := newFolder(t)
	m.cfg.Slots = 6
	m.start(t)
	p := m.module(t)
	slots, err := p.GetSlotList(true)
	must(t, err)
	if !slices.Equal(slots, []uint{0, 1, 2, 3, 4, 5}) {
		t.Errorf("slots = %v", slots)
	}
	_, err = p.GetSlotInfo(6)
	wantRV(t, "C_GetSlotInfo(6)", err, pkcs11.CKR_SLOT_ID_INVALID)
	_, err = p.OpenSession(0, pkcs11.CKF_SERIAL_SESSION)
	wantRV(t, "C_OpenSession before C_InitToken", err, pkcs11.CKR_TOKEN_NOT_RECOGNIZED)
	initToken(t, p, 0, "a")
	_, err = p.OpenSession(0, pkcs11.CKF_RW_SESSION)
	wantRV(t, "C_OpenSession without CKF_SERIAL_SESSION", err, pkcs11.CKR_SESSION_PARALLEL_NOT_SUPPORTED)
	mechs, err := p.GetMechanismList(0)
	must(t, err)
	for _, row := range mechs {
		if _, err := p.GetMechanismInfo(0, []*pkcs11.Mechanism{row}); err != nil {
			t.Errorf("C_GetMechanismInfo(%#x) = %v", row.Mechanism, err)
		}
	}
	_, err = p.GetMechanismInfo(0, mech(pkcs11.CKM_AES_CBC, nil))
	wantRV(t, "C_GetMechanismInfo(CKM_AES_CBC)", err, pkcs11.CKR_MECHANISM_INVALID)
}

func TestLoginIsTheApplications(t *testing.T) {
	t.Parallel()
	m, p, s := loggedIn(t)
	other := openRW(t, p, 0)
	ro, err := p.OpenSession(0, pkcs11.CKF_SERIAL_SESSION)
	must(t, err)
	for handle, want := range map[pkcs11.SessionHandle]uint{s: pkcs11.CKS_RW_USER_FUNCTIONS, other: pkcs11.CKS_RW_USER_FUNCTIONS, ro: pkcs11.CKS_RO_USER_FUNCTIONS} {
		info, err := p.GetSessionInfo(handle)
		must(t, err)
		if info.State != want {
			t.Errorf("state = %d, want %d", info.State, want)
		}
	}
	wantRV(t, "C_Login again", p.Login(other, pkcs11.CKU_USER, userPIN), pkcs11.CKR_USER_ALREADY_LOGGED_IN)
	wantRV(t, "C_Login again, wrong PIN", p.Login(other, pkcs11.CKU_USER, "wrong"), pkcs11.CKR_USER_ALREADY_LOGGED_IN)
	wantRV(t, "C_Login as officer", p.Login(other, pkcs11.CKU_SO, soPIN), pkcs11.CKR_USER_ANOTHER_ALREADY_LOGGED_IN)
	wantRV(t, "C_Login as type 7", p.Login(other, 7, "x"), pkcs11.CKR_USER_TYPE_INVALID)

	// The login outlives the session that made it, and ends with the last one.
	must(t, p.CloseSession(s))
	generateSM2(t, p, other, "k")
	must(t, p.CloseSession(other))
	must(t, p.CloseSession(ro))
	s = openRW(t, p, 0)
	info, err := p.GetSessionInfo(s)
	must(t, err)
	if info.State != pkcs11.CKS_RW_PUBLIC_SESSION {
		t.Errorf("state after the last session was closed = %d, want public", info.State)
	}

	// Another application is not logged in because this one is.
	must(t, p.Login(s, pkcs11.CKU_USER, userPIN))
	q := m.module(t)
	qs := openRW(t, q, 0)
	if got := find(t, q, qs, attr(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY)); len(got) != 0 {
		t.Errorf("the other application sees %d private keys", len(got))
	}
	if got := find(t, q, qs); len(got) != 1 {
		t.Errorf("the other application sees %d objects, want the public key", len(got))
	}
	key := findOne(t, p, s, pkcs11.CKO_PRIVATE_KEY, "k")
	wantRV(t, "C_SignInit with the first one's handle", q.SignInit(qs, mech(pkcs11.CKM_ECDSA, nil), key), pkcs11.CKR_KEY_HANDLE_INVALID)
	_, err = q.GetAttributeValue(qs, key, []*pkcs11.Attribute{attr(pkcs11.CKA_LABEL, nil)})
	wantRV(t, "C_GetAttributeValue with it", err, pkcs11.CKR_OBJECT_HANDLE_INVALID)
	_, _, err = q.GenerateKeyPair(qs, mech(softtoken.CKMNeutralSM2KeyPairGen, nil), nil, nil)
	wantRV(t, "C_GenerateKeyPair", err, pkcs11.CKR_USER_NOT_LOGGED_IN)
}

func TestOfficerSessions(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	p := m.module(t)
	initToken(t, p, 0, "a")
	ro, err := p.OpenSession(0, pkcs11.CKF_SERIAL_SESSION)
	must(t, err)
	s := openRW(t, p, 0)
	wantRV(t, "officer's login beside a read-only session", p.Login(s, pkcs11.CKU_SO, soPIN), uint(0xB7))
	must(t, p.CloseSession(ro))
	must(t, p.Login(s, pkcs11.CKU_SO, soPIN))
	_, err = p.OpenSession(0, pkcs11.CKF_SERIAL_SESSION)
	wantRV(t, "read-only session beside the officer", err, uint(0xB8))
	_, _, err = p.GenerateKeyPair(s, mech(softtoken.CKMNeutralSM2KeyPairGen, nil), nil, nil)
	wantRV(t, "key pair made by the officer", err, pkcs11.CKR_USER_NOT_LOGGED_IN)
	must(t, p.SetPIN(s, soPIN, "another officer"))
	must(t, p.Logout(s))
	wantRV(t, "C_InitPIN after logout", p.InitPIN(s, "whatever"), pkcs11.CKR_USER_NOT_LOGGED_IN)
	wantRV(t, "officer's old PIN", p.Login(s, pkcs11.CKU_SO, soPIN), pkcs11.CKR_PIN_INCORRECT)
	must(t, p.Login(s, pkcs11.CKU_SO, "another officer"))
	wantRV(t, "C_InitToken beside a session", p.InitToken(0, "another officer", "b"), pkcs11.CKR_SESSION_EXISTS)
}

func TestLogoutInvalidates(t *testing.T) {
	t.Parallel()
	_, p, s := loggedIn(t)
	pub, priv := generateSM2(t, p, s, "k")
	_, session, err := p.GenerateKeyPair(s, mech(softtoken.CKMNeutralSM2KeyPairGen, nil), nil, nil)
	must(t, err)
	e := sm3.Sum(nil)
	must(t, p.SignInit(s, mech(pkcs11.CKM_ECDSA, nil), priv))
	must(t, p.FindObjectsInit(s, nil))
	must(t, p.Logout(s))
	wantRV(t, "second C_Logout", p.Logout(s), pkcs11.CKR_USER_NOT_LOGGED_IN)
	_, err = p.Sign(s, e[:])
	wantRV(t, "C_Sign begun before the logout", err, pkcs11.CKR_OPERATION_NOT_INITIALIZED)
	found, _, err := p.FindObjects(s, 10)
	must(t, err)
	if len(found) != 2 {
		t.Errorf("a search begun before the logout finds %d objects, want the two public ones", len(found))
	}
	must(t, p.FindObjectsFinal(s))
	wantRV(t, "C_SignInit after the logout", p.SignInit(s, mech(pkcs11.CKM_ECDSA, nil), priv), pkcs11.CKR_KEY_HANDLE_INVALID)
	wantRV(t, "C_DestroyObject after the logout", p.DestroyObject(s, priv), pkcs11.CKR_OBJECT_HANDLE_INVALID)
	if len(value(t, p, s, pub, pkcs11.CKA_EC_POINT)) != 67 {
		t.Error("the public key's handle is gone too")
	}
	must(t, p.Login(s, pkcs11.CKU_USER, userPIN))
	for what, h := range map[string]pkcs11.ObjectHandle{"token": priv, "session": session} {
		wantRV(t, "C_SignInit with the old handle of a "+what+" object", p.SignInit(s, mech(pkcs11.CKM_ECDSA, nil), h), pkcs11.CKR_KEY_HANDLE_INVALID)
	}
	if n := len(find(t, p, s, attr(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY))); n != 1 {
		t.Errorf("%d private keys after the new login, want the token's one", n)
	}
	mustSign(t, p, s, mech(pkcs11.CKM_ECDSA, nil), findOne(t, p, s, pkcs11.CKO_PRIVATE_KEY, "k"), e[:])
}

// TestLogoutWhileSigning has one application log out while others sign with the same key: theirs go on, its own stop
// with one of the expected values, and no signature is ever wrong.
func TestLogoutWhileSigning(t *testing.T) {
	t.Parallel()
	m, p, s := loggedIn(t)
	pub, _ := generateSM2(t, p, s, "k")
	key := sm2Public(t, p, s, pub)
	e := sm3.Sum([]byte("e"))
	var wg sync.WaitGroup
	q := m.module(t)
	qs := openRW(t, q, 0)
	must(t, q.Login(qs, pkcs11.CKU_USER, userPIN))
	qk := findOne(t, q, qs, pkcs11.CKO_PRIVATE_KEY, "k")
	stop := make(chan struct{})
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			sig, err := sign(q, qs, mech(pkcs11.CKM_ECDSA, nil), qk, e[:])
			if err != nil {
				t.Errorf("the other application: %v", err)
				return
			}
			if !verifyRaw(key, e[:], sig) {
				t.Error("a signature does not verify")
				return
			}
		}
	})
	signer := openRW(t, p, 0)
	wg.Go(func() {
		for i := 0; i < 300; i++ {
			all, err := findPrivate(p, signer)
			if err != nil {
				t.Errorf("search: %v", err)
				return
			}
			if len(all) == 0 {
				continue
			}
			sig, err := sign(p, signer, mech(pkcs11.CKM_ECDSA, nil), all[0], e[:])
			var rv pkcs11.Error
			if err == nil && !verifyRaw(key, e[:], sig) {
				t.Error("a signature does not verify")
			} else if err != nil && (!errors.As(err, &rv) || rv != pkcs11.CKR_KEY_HANDLE_INVALID && rv != pkcs11.CKR_OPERATION_NOT_INITIALIZED) {
				t.Errorf("signing beside a logout: %v", err)
				return
			}
		}
	})
	for range 10 {
		must(t, p.Logout(s))
		must(t, p.Login(s, pkcs11.CKU_USER, userPIN))
	}
	close(stop)
	wg.Wait()
}

func TestOperations(t *testing.T) {
	t.Parallel()
	_, p, s := loggedIn(t)
	pub, priv := generateSM2(t, p, s, "k")
	rsaPub, rsaPriv := generateRSA(t, p, s, "r")
	mac := generateSecret(t, p, s, "m")
	ecdsa, msg := mech(pkcs11.CKM_ECDSA, nil), mech(softtoken.CKMNeutralSM2SM3, nil)
	e := sm3.Sum(nil)

	_, err := p.Sign(s, e[:])
	wantRV(t, "C_Sign without C_SignInit", err, pkcs11.CKR_OPERATION_NOT_INITIALIZED)
	must(t, p.SignInit(s, ecdsa, priv))
	wantRV(t, "second C_SignInit", p.SignInit(s, ecdsa, priv), pkcs11.CKR_OPERATION_ACTIVE)
	must(t, p.VerifyInit(s, ecdsa, pub)) // signing and verifying do not disturb each other
	wantRV(t, "second C_VerifyInit", p.VerifyInit(s, ecdsa, pub), pkcs11.CKR_OPERATION_ACTIVE)
	sig, err := p.Sign(s, e[:])
	must(t, err)
	must(t, p.Verify(s, e[:], sig))
	wantRV(t, "second C_Verify", p.Verify(s, e[:], sig), pkcs11.CKR_OPERATION_NOT_INITIALIZED)
	must(t, p.DigestInit(s, mech(softtoken.CKMNeutralSM3, nil)))
	wantRV(t, "second C_DigestInit", p.DigestInit(s, mech(softtoken.CKMNeutralSM3, nil)), pkcs11.CKR_OPERATION_ACTIVE)
	must(t, p.FindObjectsInit(s, nil))
	wantRV(t, "second C_FindObjectsInit", p.FindObjectsInit(s, nil), pkcs11.CKR_OPERATION_ACTIVE)
	must(t, p.FindObjectsFinal(s))
	_, _, err = p.FindObjects(s, 1)
	wantRV(t, "C_FindObjects without C_FindObjectsInit", err, pkcs11.CKR_OPERATION_NOT_INITIALIZED)

	must(t, p.SignInit(s, msg, priv))
	must(t, p.SignUpdate(s, []byte("x")))
	_, err = p.Sign(s, []byte("y"))
	wantRV(t, "C_Sign after C_SignUpdate", err, pkcs11.CKR_OPERATION_NOT_INITIALIZED)
	must(t, p.SignInit(s, ecdsa, priv))
	wantRV(t, "C_SignUpdate of a digest mechanism", p.SignUpdate(s, e[:]), pkcs11.CKR_OPERATION_NOT_INITIALIZED)
	// Data that no frame can carry is refused by the module, and ends the operation like any other refusal.
	must(t, p.SignInit(s, msg, priv))
	_, err = p.Sign(s, make([]byte, 1<<20))
	wantRV(t, "C_Sign of 1 MiB", err, pkcs11.CKR_DATA_LEN_RANGE)
	must(t, p.SignInit(s, msg, priv))
	_, err = p.Sign(s, make([]byte, 1<<20-1024))
	must(t, err)

	for name, row := range map[string]struct {
		m      []*pkcs11.Mechanism
		key    pkcs11.ObjectHandle
		verify bool
		want   uint
	}{
		"unknown mechanism":        {mech(0x12345, nil), priv, false, pkcs11.CKR_MECHANISM_INVALID},
		"digest mechanism":         {mech(softtoken.CKMNeutralSM3, nil), priv, false, pkcs11.CKR_MECHANISM_INVALID},
		"parameter too many":       {mech(pkcs11.CKM_ECDSA, []byte("id")), priv, false, pkcs11.CKR_MECHANISM_PARAM_INVALID},
		"ID too long":              {mech(softtoken.CKMNeutralSM2SM3, make([]byte, 8192)), priv, false, pkcs11.CKR_MECHANISM_PARAM_INVALID},
		"handle of nothing":        {ecdsa, 4711, false, pkcs11.CKR_KEY_HANDLE_INVALID},
		"public key signs":         {ecdsa, pub, false, pkcs11.CKR_KEY_TYPE_INCONSISTENT},
		"private key verifies":     {ecdsa, priv, true, pkcs11.CKR_KEY_TYPE_INCONSISTENT},
		"RSA key for SM2":          {ecdsa, rsaPriv, false, pkcs11.CKR_KEY_TYPE_INCONSISTENT},
		"SM2 key for RSA":          {mech(pkcs11.CKM_RSA_PKCS, nil), priv, false, pkcs11.CKR_KEY_TYPE_INCONSISTENT},
		"RSA public key for SM2":   {ecdsa, rsaPub, true, pkcs11.CKR_KEY_TYPE_INCONSISTENT},
		"secret key for SM2":       {ecdsa, mac, false, pkcs11.CKR_KEY_TYPE_INCONSISTENT},
		"private key for HMAC-SM3": {mech(softtoken.CKMNeutralHMACSM3, nil), priv, false, pkcs11.CKR_KEY_TYPE_INCONSISTENT},
	} {
		begin := p.SignInit
		if row.verify {
			begin = p.VerifyInit
		}
		wantRV(t, name, begin(s, row.m, row.key), row.want)
	}

	// CKA_SIGN and CKA_VERIFY bind.
	pub, priv, err = p.GenerateKeyPair(s, mech(softtoken.CKMNeutralSM2KeyPairGen, nil),
		[]*pkcs11.Attribute{attr(pkcs11.CKA_VERIFY, false)}, []*pkcs11.Attribute{attr(pkcs11.CKA_SIGN, false)})
	must(t, err)
	wantRV(t, "key without CKA_SIGN", p.SignInit(s, ecdsa, priv), pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED)
	wantRV(t, "key without CKA_VERIFY", p.VerifyInit(s, ecdsa, pub), pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED)
}

func TestPrivateKeyStaysInside(t *testing.T) {
	t.Parallel()
	_, p, s := loggedIn(t)
	_, sm2Key := generateSM2(t, p, s, "k")
	_, rsaKey := generateRSA(t, p, s, "r")
	mac := generateSecret(t, p, s, "m")
	kek := generateSM4(t, p, s, "kek", attr(pkcs11.CKA_WRAP, true))
	for name, key := range map[string]pkcs11.ObjectHandle{"SM2": sm2Key, "RSA": rsaKey, "HMAC": mac} {
		for typ, want := range map[uint]byte{
			pkcs11.CKA_PRIVATE: 1, pkcs11.CKA_SENSITIVE: 1, pkcs11.CKA_ALWAYS_SENSITIVE: 1, pkcs11.CKA_EXTRACTABLE: 0,
			pkcs11.CKA_NEVER_EXTRACTABLE: 1, pkcs11.CKA_LOCAL: 1, pkcs11.CKA_TOKEN: 1, pkcs11.CKA_SIGN: 1,
		} {
			if v := value(t, p, s, key, typ); !bytes.Equal(v, []byte{want}) {
				t.Errorf("%s key: attribute %#x = %x, want %d", name, typ, v, want)
			}
		}
		_, err := p.GetAttributeValue(s, key, []*pkcs11.Attribute{attr(pkcs11.CKA_VALUE, nil)})
		wantRV(t, name+" key's CKA_VALUE", err, pkcs11.CKR_ATTRIBUTE_SENSITIVE)
		if got := find(t, p, s, attr(pkcs11.CKA_VALUE, []byte{})); len(got) != 0 {
			t.Error("a search by CKA_VALUE finds keys")
		}
		wantRV(t, "C_SetAttributeValue of CKA_EXTRACTABLE", p.SetAttributeValue(s, key, []*pkcs11.Attribute{attr(pkcs11.CKA_EXTRACTABLE, true)}), pkcs11.CKR_ATTRIBUTE_READ_ONLY)
		_, err = p.WrapKey(s, mech(pkcs11.CKM_RSA_PKCS, nil), mac, key)
		wantRV(t, "C_WrapKey with CKM_RSA_PKCS", err, pkcs11.CKR_MECHANISM_INVALID)
		_, err = p.WrapKey(s, gcm(nil, nil), kek, key)
		wantRV(t, "C_WrapKey", err, pkcs11.CKR_KEY_UNEXTRACTABLE)
		if name != "HMAC" {
			_, err = p.CopyObject(s, key, nil)
			wantRV(t, "C_CopyObject", err, pkcs11.CKR_ACTION_PROHIBITED)
		}
	}
	_, err := p.GetAttributeValue(s, rsaKey, []*pkcs11.Attribute{attr(pkcs11.CKA_PRIME_1, nil)})
	wantRV(t, "RSA key's CKA_PRIME_1", err, pkcs11.CKR_ATTRIBUTE_SENSITIVE)
	for name, row := range map[string]struct {
		a    *pkcs11.Attribute
		want uint
	}{
		"copyable":            {attr(pkcs11.CKA_COPYABLE, true), pkcs11.CKR_TEMPLATE_INCONSISTENT},
		"not sensitive":       {attr(pkcs11.CKA_SENSITIVE, false), pkcs11.CKR_TEMPLATE_INCONSISTENT},
		"public private key":  {attr(pkcs11.CKA_PRIVATE, false), pkcs11.CKR_TEMPLATE_INCONSISTENT},
		"with a value":        {attr(pkcs11.CKA_VALUE, []byte("d")), pkcs11.CKR_TEMPLATE_INCONSISTENT},
		"another class":       {attr(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), pkcs11.CKR_TEMPLATE_INCONSISTENT},
		"another key type":    {attr(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_RSA), pkcs11.CKR_TEMPLATE_INCONSISTENT},
		"local":               {attr(pkcs11.CKA_LOCAL, true), pkcs11.CKR_ATTRIBUTE_READ_ONLY},
		"unknown attribute":   {attr(0x80001234, true), pkcs11.CKR_ATTRIBUTE_TYPE_INVALID},
		"boolean of 2 bytes":  {attr(pkcs11.CKA_SIGN, []byte{1, 0}), pkcs11.CKR_ATTRIBUTE_VALUE_INVALID},
		"boolean of value 2":  {attr(pkcs11.CKA_SIGN, []byte{2}), pkcs11.CKR_ATTRIBUTE_VALUE_INVALID},
		"always authenticate": {attr(pkcs11.CKA_ALWAYS_AUTHENTICATE, true), pkcs11.CKR_ATTRIBUTE_VALUE_INVALID},
	} {
		_, _, err := p.GenerateKeyPair(s, mech(softtoken.CKMNeutralSM2KeyPairGen, nil), nil, []*pkcs11.Attribute{row.a})
		wantRV(t, name, err, row.want)
	}
	params := attr(pkcs11.CKA_EC_PARAMS, unhex(t, "06082a8648ce3d030107"))
	_, _, err = p.GenerateKeyPair(s, mech(pkcs11.CKM_EC_KEY_PAIR_GEN, nil), []*pkcs11.Attribute{params}, nil)
	wantRV(t, "P-256", err, pkcs11.CKR_CURVE_NOT_SUPPORTED)
	_, _, err = p.GenerateKeyPair(s, mech(pkcs11.CKM_EC_KEY_PAIR_GEN, nil), nil, nil)
	wantRV(t, "no curve", err, pkcs11.CKR_TEMPLATE_INCOMPLETE)
	_, _, err = p.GenerateKeyPair(s, mech(pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN, nil), []*pkcs11.Attribute{attr(pkcs11.CKA_MODULUS_BITS, 1024)}, nil)
	wantRV(t, "RSA-1024", err, pkcs11.CKR_ATTRIBUTE_VALUE_INVALID)
}

func TestObjects(t *testing.T) {
	t.Parallel()
	m, p, s := loggedIn(t)
	pub, _ := generateSM2(t, p, s, "k")
	data, err := p.CreateObject(s, []*pkcs11.Attribute{attr(pkcs11.CKA_CLASS, pkcs11.CKO_DATA), attr(pkcs11.CKA_TOKEN, true),
		attr(pkcs11.CKA_PRIVATE, true), attr(pkcs11.CKA_LABEL, "d"), attr(pkcs11.CKA_VALUE, bytes.Repeat([]byte("v"), 64<<10))})
	must(t, err)
	_, err = p.CreateObject(s, []*pkcs11.Attribute{attr(pkcs11.CKA_CLASS, pkcs11.CKO_DATA), attr(pkcs11.CKA_VALUE, make([]byte, 64<<10+1))})
	wantRV(t, "data of more than 64 KiB", err, pkcs11.CKR_ATTRIBUTE_VALUE_INVALID)
	_, err = p.CreateObject(s, []*pkcs11.Attribute{attr(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY)})
	wantRV(t, "private key from outside", err, pkcs11.CKR_ATTRIBUTE_VALUE_INVALID)
	imported, err := p.CreateObject(s, []*pkcs11.Attribute{attr(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY), attr(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_EC),
		attr(pkcs11.CKA_EC_PARAMS, sm2OID), attr(pkcs11.CKA_EC_POINT, value(t, p, s, pub, pkcs11.CKA_EC_POINT))})
	must(t, err)
	e := sm3.Sum(nil)
	sig := mustSign(t, p, s, mech(pkcs11.CKM_ECDSA, nil), findOne(t, p, s, pkcs11.CKO_PRIVATE_KEY, "k"), e[:])
	must(t, p.VerifyInit(s, mech(pkcs11.CKM_ECDSA, nil), imported))
	must(t, p.Verify(s, e[:], sig))
	if v := value(t, p, s, imported, pkcs11.CKA_LOCAL); v[0] != 0 {
		t.Error("an imported key says that it was made here")
	}

	must(t, p.SetAttributeValue(s, pub, []*pkcs11.Attribute{attr(pkcs11.CKA_LABEL, "renamed")}))
	private := findOne(t, p, s, pkcs11.CKO_PRIVATE_KEY, "k")
	must(t, p.SetAttributeValue(s, private, []*pkcs11.Attribute{attr(pkcs11.CKA_ID, []byte{7})}))

	// What a session made goes with it; the token's objects stay, also over a restart.
	must(t, p.CloseSession(s))
	ro, err := p.OpenSession(0, pkcs11.CKF_SERIAL_SESSION)
	must(t, err)
	must(t, p.Login(ro, pkcs11.CKU_USER, userPIN))
	if n := len(find(t, p, ro)); n != 3 {
		t.Errorf("%d objects, want 3", n)
	}
	wantRV(t, "C_DestroyObject in a read-only session", p.DestroyObject(ro, findOne(t, p, ro, pkcs11.CKO_DATA, "d")), pkcs11.CKR_SESSION_READ_ONLY)
	_, _, err = p.GenerateKeyPair(ro, mech(softtoken.CKMNeutralSM2KeyPairGen, nil), nil, []*pkcs11.Attribute{attr(pkcs11.CKA_TOKEN, true)})
	wantRV(t, "token object in a read-only session", err, pkcs11.CKR_SESSION_READ_ONLY)
	_ = data
	must(t, p.Finalize())
	m.restart(t)
	must(t, p.Initialize())
	s = openRW(t, p, 0)
	must(t, p.Login(s, pkcs11.CKU_USER, userPIN))
	pub = findOne(t, p, s, pkcs11.CKO_PUBLIC_KEY, "renamed")
	private = findOne(t, p, s, pkcs11.CKO_PRIVATE_KEY, "k")
	if v := value(t, p, s, private, pkcs11.CKA_ID); !bytes.Equal(v, []byte{7}) {
		t.Errorf("CKA_ID after the restart = %x", v)
	}
	sig = mustSign(t, p, s, mech(pkcs11.CKM_ECDSA, nil), private, e[:])
	must(t, p.VerifyInit(s, mech(pkcs11.CKM_ECDSA, nil), pub))
	must(t, p.Verify(s, e[:], sig))

	// One half of a pair may go and the other stays.
	must(t, p.DestroyObject(s, pub))
	wantRV(t, "C_DestroyObject again", p.DestroyObject(s, pub), pkcs11.CKR_OBJECT_HANDLE_INVALID)
	must(t, p.DestroyObject(s, findOne(t, p, s, pkcs11.CKO_DATA, "d")))
	must(t, p.Finalize())
	m.restart(t)
	must(t, p.Initialize())
	s = openRW(t, p, 0)
	must(t, p.Login(s, pkcs11.CKU_USER, userPIN))
	if n := len(find(t, p, s)); n != 1 {
		t.Errorf("%d objects, want the private key", n)
	}
	mustSign(t, p, s, mech(pkcs11.CKM_ECDSA, nil), findOne(t, p, s, pkcs11.CKO_PRIVATE_KEY, "k"), e[:])
}

func TestBuffers(t *testing.T) {
	t.Parallel()
	_, p, s := loggedIn(t)
	_, priv := generateSM2(t, p, s, "a label")
	// One attribute that is refused does not keep the others from being answered.
	as, err := p.GetAttributeValue(s, priv, []*pkcs11.Attribute{attr(pkcs11.CKA_LABEL, nil), attr(pkcs11.CKA_KEY_TYPE, nil)})
	must(t, err)
	if string(as[0].Value) != "a label" || len(as[1].Value) != 8 {
		t.Errorf("attributes = %q, %x", as[0].Value, as[1].Value)
	}
	_, err = p.GetAttributeValue(s, priv, []*pkcs11.Attribute{attr(pkcs11.CKA_LABEL, nil), attr(pkcs11.CKA_MODULUS, nil)})
	wantRV(t, "CKA_MODULUS of an SM2 key", err, pkcs11.CKR_ATTRIBUTE_TYPE_INVALID)
	size, err := p.GetObjectSize(s, priv)
	if err != nil || size == 0 {
		t.Errorf("C_GetObjectSize = %d, %v", size, err)
	}
}

func TestInitialize(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	p := m.module(t)
	wantRV(t, "second C_Initialize", p.Initialize(), pkcs11.CKR_CRYPTOKI_ALREADY_INITIALIZED)
	must(t, p.Finalize())
	wantRV(t, "second C_Finalize", p.Finalize(), pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED)
	_, err := p.GetSlotList(false)
	wantRV(t, "C_GetSlotList after C_Finalize", err, pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED)

	// pReserved comes before the file.
	path := m.copyModule(t)
	must(t, os.WriteFile(path+".conf", []byte("socket=/nowhere\n"), 0o600))
	for reserved, want := range map[string]uint{
		"socket='" + m.socket + "' timeout_ms=500": pkcs11.CKR_OK,
		"socket=" + m.socket:                       pkcs11.CKR_OK,
		"":                                         pkcs11.CKR_DEVICE_ERROR, // the file's, where nobody listens
		"socket='/x":                               pkcs11.CKR_ARGUMENTS_BAD,
		"socket=relative":                          pkcs11.CKR_ARGUMENTS_BAD,
		"socket=/" + strings.Repeat("x", 108):      pkcs11.CKR_ARGUMENTS_BAD,
		"other=1":                                  pkcs11.CKR_ARGUMENTS_BAD,
		"timeout_ms=5":                             pkcs11.CKR_ARGUMENTS_BAD,
		"timeout_ms=99999999":                      pkcs11.CKR_ARGUMENTS_BAD,
		"nonsense":                                 pkcs11.CKR_ARGUMENTS_BAD,
	} {
		c := pkcs11.New(path)
		wantRV(t, "C_Initialize with pReserved "+reserved, c.Initialize(pkcs11.InitializeWithReserved(cString(reserved))), want)
		c.Finalize()
		c.Destroy()
	}
	for text, want := range map[string]uint{
		"# nothing\n":                              pkcs11.CKR_GENERAL_ERROR,
		"socket=/nowhere\n":                        pkcs11.CKR_DEVICE_ERROR,
		"bad line\n":                               pkcs11.CKR_GENERAL_ERROR,
		"socket=" + m.socket + "\nunknown=1\n":     pkcs11.CKR_GENERAL_ERROR,
		"\nsocket=" + m.socket + " \r\n# end":      pkcs11.CKR_OK,
		"#" + strings.Repeat("x", 600) + "\nfoo\n": pkcs11.CKR_GENERAL_ERROR,
	} {
		must(t, os.WriteFile(path+".conf", []byte(text), 0o600))
		c := pkcs11.New(path)
		wantRV(t, "C_Initialize with file "+text, c.Initialize(), want)
		c.Finalize()
		c.Destroy()
	}
}

// cString is a C string outside the Go heap's reach: the module reads it only while C_Initialize runs.
func cString(s string) unsafe.Pointer {
	b := append([]byte(s), 0)
	pinned = append(pinned, b)
	return unsafe.Pointer(&b[0])
}

var pinned [][]byte

// TestManySessions opens as many as a token allows, and no more.
func TestManySessions(t *testing.T) {
	t.Parallel()
	_, p, _ := loggedIn(t)
	n := 1
	for ; n < 2000; n++ {
		if _, err := p.OpenSession(0, pkcs11.CKF_SERIAL_SESSION); err != nil {
			wantRV(t, "C_OpenSession", err, pkcs11.CKR_SESSION_COUNT)
			break
		}
	}
	info, err := p.GetTokenInfo(0)
	must(t, err)
	if uint(n) != info.MaxSessionCount || info.SessionCount != info.MaxSessionCount || info.RwSessionCount != 1 {
		t.Errorf("%d sessions could be opened; the token says %d of %d, %d of them read-write", n, info.SessionCount, info.MaxSessionCount, info.RwSessionCount)
	}
	must(t, p.CloseAllSessions(0))
	info, err = p.GetTokenInfo(0)
	must(t, err)
	if info.SessionCount != 0 {
		t.Errorf("%d sessions after C_CloseAllSessions", info.SessionCount)
	}
	must(t, p.InitToken(0, soPIN, "again")) // nothing is in the way
}

// TestFork has a Python program fork with the module loaded: the child's calls are refused until it initialises the
// module for itself, and the parent's session goes on.
func TestFork(t *testing.T) {
	t.Parallel()
	m, p, _ := loggedIn(t)
	_ = p
	if _, err := exec.LookPath("python3"); err != nil {
		t.Skip("python3 is not installed")
	}
	out := tool(t, []byte(forkProgram), "python3", "-", m.copyModule(t))
	if want := "child before: 0x190\nchild initialises: 0x0\nchild opens: 0x0\nparent after: 0x0\n"; out != want {
		t.Errorf("got\n%swant\n%s", out, want)
	}
}

const forkProgram = `
import ctypes, os, sys
lib = ctypes.CDLL(sys.argv[1])
fl = ctypes.POINTER(ctypes.c_void_p)()
assert lib.C_GetFunctionList(ctypes.byref(fl)) == 0
proto = ctypes.CFUNCTYPE
def fn(i, *args):  # the list begins with the version, padded to a pointer's size
    return proto(ctypes.c_ulong, *args)(fl[1 + i])
initialize = fn(0, ctypes.c_void_p)
opensession = fn(12, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
info = fn(15, ctypes.c_ulong, ctypes.c_void_p)
h = ctypes.c_ulong()
buf = ctypes.create_string_buffer(64)
assert initialize(None) == 0
assert opensession(0, 4, None, None, ctypes.byref(h)) == 0
pid = os.fork()
if pid == 0:
    print('child before:', hex(info(h, buf)), flush=True)
    print('child initialises:', hex(initialize(None)), flush=True)
    print('child opens:', hex(opensession(0, 4, None, None, ctypes.byref(h))), flush=True)
    os._exit(0)
os.waitpid(pid, 0)
print('parent after:', hex(info(h, buf)), flush=True)
`

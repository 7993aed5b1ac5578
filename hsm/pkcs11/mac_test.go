package pkcs11_test

import (
	"bytes"
	"testing"

	p11 "github.com/miekg/pkcs11"

	"yinjian/hsm"
	"yinjian/hsm/pkcs11"
)

// TestImportedMAC: two machines that a MAC key was brought to, with the wrapping key beside it, answer alike, and neither gives
// the key away: whoever has one campus's machine and its user's PIN has what it answers, as he would have with the other's.
func TestImportedMAC(t *testing.T) {
	t.Parallel()
	kek, mac, data := randomBytes(16), randomBytes(pkcs11.MACSize), []byte("a PIN, stretched")
	var answers [][]byte
	for range 2 {
		m := newMachine(t)
		install(t, m.cfg, "officer-pin", "kek/1", kek)
		tok := open(t, m.cfg)
		defer tok.Close()
		if err := tok.ImportMAC(t.Context(), "mac/1", mac); err != nil {
			t.Fatal(err)
		}
		answer, err := tok.Do(t.Context(), "mac/1", hsm.MACSM3, data)
		if err != nil {
			t.Fatal(err)
		}
		answers = append(answers, answer)
		staysInside(t, m, tok, "mac/1", "kek/1")
		if err := tok.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(answers[0], answers[1]) {
		t.Error("two machines answer differently with one key")
	}
}

// staysInside asks a machine, past the driver and as its logged-in user, for a secret key in every way that PKCS#11 has.
func staysInside(t *testing.T, m *machine, tok *pkcs11.Token, label, kek string) {
	t.Helper()
	ctx := p11.New(m.module)
	s, err := ctx.OpenSession(slotOf(t, tok), p11.CKF_SERIAL_SESSION|p11.CKF_RW_SESSION)
	if err != nil {
		t.Fatal(err)
	}
	defer ctx.CloseSession(s)
	find := func(label string) p11.ObjectHandle {
		t.Helper()
		if err := ctx.FindObjectsInit(s, []*p11.Attribute{p11.NewAttribute(p11.CKA_LABEL, label)}); err != nil {
			t.Fatal(err)
		}
		found, _, err := ctx.FindObjects(s, 2)
		if err := ctx.FindObjectsFinal(s); err != nil {
			t.Fatal(err)
		}
		if err != nil || len(found) != 1 {
			t.Fatal(found, err)
		}
		return found[0]
	}
	key, outer := find(label), find(kek)
	for typ, want := range map[uint]byte{p11.CKA_SENSITIVE: 1, p11.CKA_EXTRACTABLE: 0, p11.CKA_TOKEN: 1, p11.CKA_PRIVATE: 1, p11.CKA_SIGN: 1, p11.CKA_WRAP: 0,
		p11.CKA_ENCRYPT: 0, p11.CKA_DECRYPT: 0, p11.CKA_LOCAL: 0, p11.CKA_NEVER_EXTRACTABLE: 0} {
		a, err := ctx.GetAttributeValue(s, key, []*p11.Attribute{p11.NewAttribute(typ, nil)})
		if err != nil || len(a) != 1 || !bytes.Equal(a[0].Value, []byte{want}) {
			t.Errorf("attribute %#x: %v, %v; want %d", typ, a, err, want)
		}
	}
	if _, err := ctx.GetAttributeValue(s, key, []*p11.Attribute{p11.NewAttribute(p11.CKA_VALUE, nil)}); err != p11.Error(p11.CKR_ATTRIBUTE_SENSITIVE) {
		t.Errorf("reading it: %v", err)
	}
	gcm := p11.NewGCMParams(nil, nil, 128)
	defer gcm.Free()
	for _, under := range []p11.ObjectHandle{outer, key} {
		if out, err := ctx.WrapKey(s, []*p11.Mechanism{p11.NewMechanism(0xFFFFF00B, gcm)}, under, key); err == nil {
			t.Errorf("it was wrapped: %d bytes", len(out))
		}
	}
	for _, loose := range []*p11.Attribute{p11.NewAttribute(p11.CKA_EXTRACTABLE, true), p11.NewAttribute(p11.CKA_SENSITIVE, false)} {
		if err := ctx.SetAttributeValue(s, key, []*p11.Attribute{loose}); err == nil {
			t.Errorf("attribute %#x was loosened", loose.Type)
		}
		if _, err := ctx.CopyObject(s, key, []*p11.Attribute{loose}); err == nil {
			t.Errorf("a copy with attribute %#x loosened", loose.Type)
		}
	}
}

package account_test

import (
	"bytes"
	"errors"
	"os"
	"testing"

	"yinjian/appliance/account"
	"yinjian/appliance/custody"
	"yinjian/appliance/internal/testkit"
	"yinjian/appliance/problem"
	"yinjian/hsm"
	"yinjian/hsm/hsmtest"
	"yinjian/hsm/pkcs11"
)

func TestMain(m *testing.M) {
	hsmtest.Daemon()
	os.Exit(m.Run())
}

// employ has a house work with a software cipher machine of its own, which the ceremony of the secret was held on: the staff
// slot's keys and the log slot's are on its one token.
func employ(t *testing.T, h *testkit.House, secret []byte) (close func()) {
	t.Helper()
	m := hsmtest.NewMachine(t)
	kek := custody.KEKOf(secret)
	err := pkcs11.InstallKEK(pkcs11.KEKConfig{Module: m.Module, ModuleArgs: m.Config.ModuleArgs, TokenLabel: m.Config.TokenLabel, Profile: m.Config.Profile,
		Label: campusKEK, Value: kek, SOPIN: []byte(hsmtest.SOPIN), UserPIN: []byte(hsmtest.UserPIN)})
	if err != nil {
		t.Fatal(err)
	}
	tok, err := pkcs11.Open(t.Context(), m.Config)
	if err != nil {
		t.Fatal(err)
	}
	for _, label := range []string{account.PINKeyLabel, account.AppKeyLabel} { // its own, as every appliance has them
		if _, err := tok.GenerateKey(t.Context(), hsm.KeySpec{Label: label, Algorithm: hsm.HMACSM3}); err != nil {
			t.Fatal(err)
		}
	}
	for _, use := range account.CampusMACs {
		label := custody.MACLabel(use, campusKEK)
		if err := tok.ImportMAC(t.Context(), label, custody.MACOf(secret, label)); err != nil {
			t.Fatal(err)
		}
	}
	h.Machine, h.Custody = tok, &account.CustodyPolicy{KEK: campusKEK, CampusMACs: true}
	h.Restart()
	return func() { tok.Close() }
}

// TestCampusMachines is TestCampusMACs with two software cipher machines, which have nothing in common but what the
// custodians' secret makes. A third one, of another ceremony, opens nothing.
func TestCampusMachines(t *testing.T) {
	t.Parallel()
	secret := ceremony()
	a := testkit.New(t)
	defer employ(t, a, secret)()
	a.App("his", nil)
	a.Doctor("D001")
	_, key, _ := a.Directory.Application("his")

	b := campusB(t, a)
	defer employ(t, b, secret)()
	replicate(t, a, b)
	if _, same, _ := b.Directory.Application("his"); len(same) != 32 || !bytes.Equal(same, key) {
		t.Error("the application has another key at the other campus")
	}
	_, err := activate(t, b, "D001", "000000")
	wants(t, "a wrong PIN", err, problem.PINWrong)
	for _, h := range []*testkit.House{a, b} {
		grant, err := activate(t, h, "D001", testkit.PIN)
		if err != nil {
			t.Fatalf("%s: %v", h.Node, err)
		}
		signs(t, h, "one", "D001", grant.ID)
	}

	c := campusB(t, a)
	defer employ(t, c, ceremony())()
	replicate(t, a, c)
	_, err = activate(t, c, "D001", testkit.PIN)
	wants(t, "another ceremony's machine", err, problem.KeyElsewhere)
	// Its MAC keys put right, its wrapping key still opens no blob.
	tok := c.Machine.(*pkcs11.Token)
	for _, use := range account.CampusMACs {
		label := custody.MACLabel(use, campusKEK)
		if err := errors.Join(tok.DestroyKey(t.Context(), label), tok.ImportMAC(t.Context(), label, custody.MACOf(secret, label))); err != nil {
			t.Fatal(err)
		}
	}
	c.Restart()
	replicate(t, a, c)
	grant, err := activate(t, c, "D001", testkit.PIN)
	if err != nil {
		t.Fatal(err)
	}
	q := testkit.Request("blob", "D001")
	q.Consent.Method, q.Consent.Assertion, q.Consent.AuthorizationID = "", "", grant.ID
	app, _, _ := c.Directory.Application("his")
	_, err = c.Signing.Sign(t.Context(), app, q)
	wants(t, "another wrapping key under the label", err, problem.KeyElsewhere)
	if err := tok.DestroyKey(t.Context(), campusKEK); err != nil {
		t.Fatal(err)
	}
	_, err = c.Signing.Sign(t.Context(), app, q)
	wants(t, "no wrapping key", err, problem.KeyElsewhere)
}

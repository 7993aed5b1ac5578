package account_test

import (
	"bytes"
	"errors"
	"math/big"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/emmansun/gmsm/smx509"

	"yinjian/appliance/account"
	"yinjian/appliance/audit"
	"yinjian/appliance/custody"
	"yinjian/appliance/internal/testkit"
	"yinjian/appliance/pki"
	"yinjian/appliance/problem"
	"yinjian/appliance/sign"
	"yinjian/hsm"
	"yinjian/ntp"
)

// A vault is a house whose staff keys are in custody, with three officers of whom any two suffice.
type vault struct {
	*testkit.House
	app      *account.Application
	officers []custody.Share
}

func newVault(t *testing.T) *vault {
	h := testkit.New(t)
	seed, point := custody.NewPair()
	shares, _, err := custody.Split(seed, custody.PurposeOfficers, "试", []string{"甲", "乙", "丙"}, 2)
	if err != nil {
		t.Fatal(err)
	}
	h.Custody = &account.CustodyPolicy{KEK: "kek/1", Officers: point}
	h.Restart()
	return &vault{h, h.App("his", nil), shares}
}

func (v *vault) sign(t *testing.T, key, signer, grant string) error {
	t.Helper()
	q := testkit.Request(key, signer)
	if grant != "" {
		q.Consent = sign.Consent{AuthorizationID: grant}
	}
	_, err := v.Signing.Sign(t.Context(), v.app, q)
	return err
}

func (v *vault) activate(t *testing.T, signer, pin string, n int) (string, error) {
	t.Helper()
	g, err := v.Directory.Authorize(t.Context(), v.app, account.GrantRequest{Signer: signer, PIN: pin, Count: n, Seconds: 600})
	if err != nil {
		return "", err
	}
	return g.ID, nil
}

// until waits for what happens behind the caller's back.
func (v *vault) until(t *testing.T, what string, yes func() bool) {
	t.Helper()
	for begun := time.Now(); time.Since(begun) < 2*time.Minute; time.Sleep(5 * time.Millisecond) {
		if yes() {
			return
		}
	}
	t.Errorf("not within two minutes: %s", what)
}

// last answers the newest entry of a kind.
func (v *vault) last(t *testing.T, kind string) (e *audit.Entry) {
	t.Helper()
	err := v.Journal.State(t.Context(), func(r audit.Record) error {
		if r.Entry.Kind == kind {
			e = &r.Entry
		}
		return nil
	})
	if err != nil || e == nil {
		t.Fatalf("no entry %s: %v", kind, err)
	}
	return e
}

// TestCustody: a signer's keys are on no token and in the journal under the PIN: they sign for the life of an activation, for
// nobody's word, and again after a restart when the PIN is given again. A new PIN wants the old one.
func TestCustody(t *testing.T) {
	t.Parallel()
	v := newVault(t)
	g := v.Doctor("D001")
	if len(v.Staff.Labels()) != 0 {
		t.Errorf("keys on the token: %v", v.Staff.Labels())
	}
	if view := v.Directory.View(g); view.Custody != "pin" || view.Keys[0].Wrapped != nil {
		t.Errorf("an administrator sees %+v", view)
	}
	wants(t, "the application's word", v.sign(t, "a", "D001", ""), problem.ConsentInsufficient)
	grant, err := v.activate(t, "D001", testkit.PIN, 3)
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"b", "c"} {
		if err := v.sign(t, key, "D001", grant); err != nil {
			t.Fatal(err)
		}
	}
	q := testkit.Request("rsa", "D001")
	q.Algorithm, q.Consent = string(hsm.RSA2048), sign.Consent{AuthorizationID: grant}
	if _, err := v.Signing.Sign(t.Context(), v.app, q); err != nil {
		t.Fatal(err)
	}
	// Used up: the cipher machine forgets the keys.
	v.until(t, "no key is unwrapped", func() bool { return v.Staff.Unwrapped() == 0 })

	v.Restart()
	wants(t, "an activation of before", v.sign(t, "d", "D001", grant), problem.AuthorizationBad)
	if grant, err = v.activate(t, "D001", testkit.PIN, 5); err != nil {
		t.Fatal(err)
	}
	if err := v.sign(t, "e", "D001", grant); err != nil {
		t.Error(err)
	}
	// It ends: so does the use of the keys.
	v.Clock.Advance(11 * time.Minute)
	v.Directory.EndConsents()
	v.until(t, "no key is unwrapped", func() bool { return v.Staff.Unwrapped() == 0 })

	_, err = v.Directory.SetPIN(t.Context(), "admin", "D001", "", "222222")
	wants(t, "a new PIN without the old one", err, problem.ConsentInsufficient)
	_, err = v.Directory.SetPIN(t.Context(), "admin", "D001", "000000", "222222")
	wants(t, "a new PIN with a wrong one", err, problem.PINWrong)
	if e := v.last(t, "consent.pin/failed"); e.Actor != "admin" {
		t.Errorf("the journal says that %s gave it", e.Actor)
	}
	if _, err = v.Directory.SetPIN(t.Context(), "admin", "D001", testkit.PIN, "222222"); err != nil {
		t.Fatal(err)
	}
	_, err = v.activate(t, "D001", testkit.PIN, 1)
	wants(t, "the old PIN", err, problem.PINWrong)
	if grant, err = v.activate(t, "D001", "222222", 1); err != nil {
		t.Fatal(err)
	}
	if err := v.sign(t, "f", "D001", grant); err != nil {
		t.Error(err)
	}
	for range account.MaxPINTries {
		_, err = v.Directory.SetPIN(t.Context(), "admin", "D001", "000000", "333333")
	}
	wants(t, "an administrator's guesses", err, problem.PINLocked)
	_, err = v.Directory.SetPIN(t.Context(), "admin", "D001", "222222", "333333")
	if wants(t, "the right PIN after them", err, problem.PINLocked); !strings.Contains(err.Error(), "已输错五次") {
		t.Errorf("an administrator reads: %v", err)
	}
	if grant, err = v.activate(t, "D001", "222222", 1); err != nil {
		t.Errorf("the signer after an administrator's guesses: %v", err)
	}
}

// TestCustodyEndsDuringUse: an activation that ends while a signature is under way leaves no key unwrapped, nor does a
// cipher machine that is away at the end of one.
func TestCustodyEndsDuringUse(t *testing.T) {
	t.Parallel()
	v := newVault(t)
	v.Doctor("D001", "SM2")
	grant, err := v.activate(t, "D001", testkit.PIN, 5)
	if err != nil {
		t.Fatal(err)
	}
	var under, early atomic.Bool
	v.Staff.Before(func(call, _ string) error {
		switch call {
		case "DoWrapped":
			under.Store(true)
			_, err := v.Directory.StopSigner(t.Context(), "admin", "D001", true, "离职")
			time.Sleep(50 * time.Millisecond) // whoever forgets at once does so now
			under.Store(false)
			return err
		case "ForgetWrapped":
			if under.Load() {
				early.Store(true)
			}
		}
		return nil
	})
	wants(t, "a signature under way when the signer is stopped", v.sign(t, "a", "D001", grant), problem.SignerStopped)
	if v.until(t, "no key is unwrapped", func() bool { return v.Staff.Unwrapped() == 0 }); early.Load() {
		t.Error("it was forgotten while it was in use")
	}

	v.Staff.Before(nil)
	v.Doctor("D002")
	if grant, err = v.activate(t, "D002", testkit.PIN, 2); err != nil {
		t.Fatal(err)
	}
	for _, alg := range []hsm.Algorithm{hsm.SM2, hsm.RSA2048} {
		if alg == hsm.RSA2048 { // the last use
			v.Staff.Before(func(call, _ string) error {
				if call == "ForgetWrapped" {
					return hsm.ErrUnavailable
				}
				return nil
			})
		}
		q := testkit.Request(string(alg), "D002")
		q.Algorithm, q.Consent = string(alg), sign.Consent{AuthorizationID: grant}
		if _, err := v.Signing.Sign(t.Context(), v.app, q); err != nil {
			t.Fatal(err)
		}
	}
	v.until(t, "the machine is asked", func() bool { return v.Staff.Calls("ForgetWrapped") > 1 })
	v.Staff.Before(nil)
	v.until(t, "no key is unwrapped once it answers", func() bool {
		v.Directory.EndConsents()
		return v.Staff.Unwrapped() == 0
	})
}

// TestCustodyNewPair: what opened a signer's keys before the PIN was changed opens none that was made since; the keys there
// were go on, over restarts and further PINs.
func TestCustodyNewPair(t *testing.T) {
	t.Parallel()
	v := newVault(t)
	g := v.Doctor("D001", "SM2")
	ctx := t.Context()
	secret, err := custody.Combine(v.officers[:2], custody.PurposeOfficers)
	if err != nil {
		t.Fatal(err)
	}
	before, err := custody.OpenWith(secret, g.Sealing.Escrow, "yinjian/custody-signer/v1 D001")
	if err != nil {
		t.Fatal(err)
	}
	opens := func(w *account.Wrapped, label string) bool {
		_, err := custody.OpenWith(before, w.Sealed, "yinjian/custody-key/v1 "+label)
		return err == nil
	}
	// One person may ask for a request; a new key is asked for in so many words.
	if _, err = v.Directory.RequestCertificate(ctx, "admin", account.RequestSpec{For: "signer:D001"}); err == nil {
		t.Error("a new custody key that nobody asked for")
	}
	waiting, err := v.Directory.RequestCertificate(ctx, "admin", account.RequestSpec{For: "signer:D001", NewKey: true})
	if err != nil {
		t.Fatal(err)
	}
	if !opens(g.Keys[0].Wrapped, g.Keys[0].Label) || !opens(waiting.Wrapped, waiting.Label) {
		t.Fatal("the pair does not open the keys of its time")
	}
	if _, err = v.Directory.SetPIN(ctx, "admin", "D001", testkit.PIN, "222222"); err != nil {
		t.Fatal(err)
	}
	wants(t, "another in its place, without a word of a new key", errOf(v.Directory.RequestCertificate(ctx, "admin", account.RequestSpec{For: "signer:D001", Replace: true})), problem.Forbidden)
	later, err := v.Directory.RequestCertificate(ctx, "admin", account.RequestSpec{For: "signer:D001", NewKey: true, Replace: true})
	if err != nil {
		t.Fatal(err)
	}
	if opens(later.Wrapped, later.Label) {
		t.Error("what opened the keys before the PIN was changed opens one that was made since")
	}
	v.Restart()
	if _, err = v.Directory.RecoverPIN(ctx, "admin", "D001", "333333", v.officers[1:]); err != nil {
		t.Fatal(err)
	}
	if _, err = v.Directory.SetPIN(ctx, "admin", "D001", "333333", "444444"); err != nil {
		t.Fatal(err)
	}
	v.Restart()
	grant, err := v.activate(t, "D001", "444444", 1) // opens all three
	if err == nil {
		err = v.sign(t, "a", "D001", grant)
	}
	if err != nil {
		t.Error(err)
	}
	// What is destroyed is in no later entry.
	if err := v.Directory.DestroyKey(ctx, "admin", waiting.Label, "未用"); err != nil {
		t.Fatal(err)
	}
	if g, _ = v.Directory.Signer("D001"); len(g.Sealing.Keys) != 2 || g.Sealing.Keys[waiting.Label] != nil {
		t.Errorf("the next entry of the signer would have %d keys", len(g.Sealing.Keys))
	}
	if _, err = v.Directory.SetPIN(ctx, "admin", "D001", "444444", "555555"); err != nil {
		t.Error(err)
	}
}

// TestCustodyOfficersChange: officers who came later open what a PIN has sealed since, and those of before do not; a key that
// the old officers recovered is the new ones'.
func TestCustodyOfficersChange(t *testing.T) {
	t.Parallel()
	v := newVault(t)
	v.Doctor("D001", "SM2")
	v.Doctor("D002", "SM2")
	seed, point := custody.NewPair()
	later, _, err := custody.Split(seed, custody.PurposeOfficers, "次年", []string{"丁", "戊"}, 2)
	if err != nil {
		t.Fatal(err)
	}
	v.Custody = &account.CustodyPolicy{KEK: "kek/1", Officers: point}
	v.Restart()
	if n := v.Directory.NotEscrowed(); n != 2 {
		t.Errorf("NotEscrowed = %d, want 2", n)
	}
	ctx := t.Context()
	_, err = v.Directory.RecoverPIN(ctx, "admin", "D001", "333333", later)
	wants(t, "the new officers, before the PIN was changed", err, problem.Forbidden)
	if _, err = v.Directory.SetPIN(ctx, "admin", "D001", testkit.PIN, "222222"); err != nil {
		t.Fatal(err)
	}
	if _, err = v.Directory.RecoverPIN(ctx, "admin", "D002", "222222", v.officers[:2]); err != nil {
		t.Fatal(err)
	}
	v.Restart()
	if n := v.Directory.NotEscrowed(); n != 0 {
		t.Errorf("NotEscrowed = %d, want 0", n)
	}
	for _, id := range []string{"D001", "D002"} {
		_, err = v.Directory.RecoverPIN(ctx, "admin", id, "333333", v.officers[:2])
		wants(t, "the old officers", err, problem.Forbidden)
		if _, err = v.Directory.RecoverPIN(ctx, "admin", id, "333333", later); err != nil {
			t.Errorf("%s: the new officers: %v", id, err)
		}
		grant, err := v.activate(t, id, "333333", 1)
		if err == nil {
			err = v.sign(t, id, id, grant)
		}
		if err != nil {
			t.Errorf("%s: %v", id, err)
		}
	}
}

// TestCustodyRecovery: two officers of three open what was sealed under a forgotten PIN; one does not, nor do shares of
// another set, and the journal says who it was.
func TestCustodyRecovery(t *testing.T) {
	t.Parallel()
	v := newVault(t)
	v.Doctor("D001", "SM2")
	ctx := t.Context()
	_, err := v.Directory.RecoverPIN(ctx, "admin", "D001", "222222", v.officers[:1])
	wants(t, "one officer", err, problem.Forbidden)
	seed, _ := custody.NewPair()
	others, _, err := custody.Split(seed, custody.PurposeOfficers, "别处", []string{"甲", "乙"}, 2)
	if err != nil {
		t.Fatal(err)
	}
	_, err = v.Directory.RecoverPIN(ctx, "admin", "D001", "222222", others)
	wants(t, "other officers", err, problem.Forbidden)
	_, err = v.Directory.RecoverPIN(ctx, "admin", "D001", "222222", []custody.Share{v.officers[0], others[1]})
	wants(t, "shares of two sets", err, problem.Forbidden)
	lied := []custody.Share{v.officers[0]}
	lied[0].Threshold = 1
	_, err = v.Directory.RecoverPIN(ctx, "admin", "D001", "222222", lied)
	wants(t, "one officer who says one suffices", err, problem.Forbidden)
	var tried []string
	err = v.Journal.Range(ctx, 0, func(r audit.Record) error {
		if r.Entry.Kind == "custody.recovery/failed" {
			tried = append(tried, r.Entry.Actor+": "+r.Entry.Text("officers"))
		}
		return nil
	})
	if want := []string{"admin: 1 甲", "admin: 1 甲、2 乙", "admin: 1 甲、2 乙", "admin: 1 甲"}; err != nil || !slices.Equal(tried, want) {
		t.Errorf("the journal has the attempts %q, %v; want %q", tried, err, want)
	}
	lied[0].Holder = "甲\x1b[2J"
	_, err = v.Directory.RecoverPIN(ctx, "admin", "D001", "222222", lied)
	wants(t, "a name that steers a terminal", err, problem.InvalidRequest)
	if _, err := v.activate(t, "D001", testkit.PIN, 1); err != nil {
		t.Fatalf("the PIN after attempts that failed: %v", err)
	}

	if _, err := v.Directory.RecoverPIN(ctx, "admin", "D001", "222222", v.officers[1:]); err != nil {
		t.Fatal(err)
	}
	v.Restart()
	grant, err := v.activate(t, "D001", "222222", 1)
	if err != nil {
		t.Fatal(err)
	}
	if err := v.sign(t, "a", "D001", grant); err != nil {
		t.Error(err)
	}
	if entry := v.last(t, "account.signer/outcome"); entry.Text("act") != "recover" || entry.Text("officers") != "2 乙、3 丙" {
		t.Errorf("the journal says %q by %q", entry.Text("act"), entry.Text("officers"))
	}
}

// TestCustodyWithoutPIN: a signer without a PIN signs at an application's word, sealed by the cipher machine alone, until a
// PIN is set.
func TestCustodyWithoutPIN(t *testing.T) {
	t.Parallel()
	v := newVault(t)
	g, err := v.Directory.Enrol(t.Context(), "admin", account.Enrolment{ID: "N1", Name: "护士", Department: "急诊", Campus: "本部", Algorithms: []string{"SM2"}})
	if err != nil {
		t.Fatal(err)
	}
	if view := v.Directory.View(g); view.Custody != "token" {
		t.Errorf("Custody = %q, want token", view.Custody)
	}
	if n := v.Directory.TokenSealed(); n != 1 {
		t.Errorf("TokenSealed = %d, want 1", n)
	}
	for _, key := range []string{"a", "b"} {
		if err := v.sign(t, key, "N1", ""); err != nil {
			t.Fatal(err)
		}
	}
	for _, stop := range []bool{true, false} {
		if _, err := v.Directory.StopSigner(t.Context(), "admin", "N1", stop, "休假"); err != nil {
			t.Fatal(err)
		}
		v.until(t, "a stopped signer's key is not unwrapped", func() bool { return v.Staff.Unwrapped() == 0 })
	}
	if err := v.sign(t, "after-the-leave", "N1", ""); err != nil {
		t.Fatal(err)
	}
	// Stopped while a signature is under way.
	forgotten := v.Staff.Calls("ForgetWrapped")
	v.Staff.Before(func(call, _ string) error {
		if call != "DoWrapped" {
			return nil
		}
		_, err := v.Directory.StopSigner(t.Context(), "admin", "N1", true, "离职")
		v.until(t, "the machine is asked to forget", func() bool { return v.Staff.Calls("ForgetWrapped") > forgotten })
		return err
	})
	wants(t, "a signature under way when the signer is stopped", v.sign(t, "under-way", "N1", ""), problem.SignerStopped)
	v.Staff.Before(nil)
	v.until(t, "what it unwrapped is forgotten", func() bool { return v.Staff.Unwrapped() == 0 })
	if _, err := v.Directory.StopSigner(t.Context(), "admin", "N1", false, "返聘"); err != nil {
		t.Fatal(err)
	}
	if _, err := v.Directory.SetPIN(t.Context(), "admin", "N1", "", "222222"); err != nil {
		t.Fatal(err)
	}
	v.until(t, "a key that has a PIN now is not unwrapped", func() bool { return v.Staff.Unwrapped() == 0 })
	if n := v.Directory.TokenSealed(); n != 0 {
		t.Errorf("TokenSealed = %d after a PIN was set", n)
	}
	wants(t, "the application's word, with a PIN", v.sign(t, "c", "N1", ""), problem.ConsentInsufficient)
	grant, err := v.activate(t, "N1", "222222", 1)
	if err != nil {
		t.Fatal(err)
	}
	if err := v.sign(t, "d", "N1", grant); err != nil {
		t.Error(err)
	}
}

// TestCustodyLater: an installation whose keys are in the cipher machine goes on when custody comes; a PIN set once makes
// the next key a custody key, without the signer.
func TestCustodyLater(t *testing.T) {
	t.Parallel()
	h := testkit.New(t)
	v := &vault{h, h.App("his", nil), nil}
	v.Doctor("D001", "SM2")
	v.Custody = &account.CustodyPolicy{KEK: "kek/1"}
	v.Restart()
	if err := v.sign(t, "a", "D001", ""); err != nil {
		t.Errorf("a key in the machine: %v", err)
	}
	_, err := v.Directory.AddSignerKey(t.Context(), "admin", "D001", "RSA-2048", false)
	wants(t, "a custody key before there is anything to seal it to", err, problem.ConsentInsufficient)
	if _, err := v.Directory.SetPIN(t.Context(), "admin", "D001", "", "222222"); err != nil {
		t.Fatal(err)
	}
	if _, err := v.Directory.AddSignerKey(t.Context(), "admin", "D001", "RSA-2048", false); err != nil {
		t.Fatal(err)
	}
	if labels := v.Staff.Labels(); len(labels) != 1 {
		t.Errorf("keys on the token: %v, want the first alone", labels)
	}
	grant, err := v.activate(t, "D001", "222222", 2)
	if err != nil {
		t.Fatal(err)
	}
	for i, alg := range []hsm.Algorithm{hsm.SM2, hsm.RSA2048} {
		q := testkit.Request(string(alg), "D001")
		q.Algorithm, q.Consent = string(alg), sign.Consent{AuthorizationID: grant}
		if _, err := v.Signing.Sign(t.Context(), v.app, q); err != nil {
			t.Errorf("key %d: %v", i, err)
		}
	}
	_, err = v.Directory.RecoverPIN(t.Context(), "admin", "D001", "333333", newVault(t).officers[:2])
	wants(t, "recovery where there are no officers", err, problem.KeyUnknown)
}

// TestCustodyRequests: a custody key signs its certificate request when it is made; a request for one whose private half is
// sealed is for another key, and the key that was there goes on until the certificate comes.
func TestCustodyRequests(t *testing.T) {
	t.Parallel()
	v := newVault(t)
	v.Doctor("D001", "SM2")
	ctx := t.Context()
	first, err := v.Directory.RequestCertificate(ctx, "admin", account.RequestSpec{For: "signer:D001", NewKey: true})
	if err != nil || !first.NewKey || first.Wrapped == nil {
		t.Fatalf("%+v, %v", first, err)
	}
	v.until(t, "the key that signed its request is not unwrapped", func() bool { return v.Staff.Unwrapped() == 0 })
	again, err := v.Directory.RequestCertificate(ctx, "admin", account.RequestSpec{For: "signer:D001"})
	if err != nil || !bytes.Equal(again.CSR, first.CSR) {
		t.Errorf("asked again, it is another request: %v", err)
	}
	v.Restart()
	grant, err := v.activate(t, "D001", testkit.PIN, 1)
	if err != nil {
		t.Fatal(err)
	}
	if err := v.sign(t, "a", "D001", grant); err != nil {
		t.Errorf("the key that was there: %v", err)
	}
}

// TestCustodySealedToItsOwner: the entry of one signer holds nothing that opens another's, and a directory in which the two
// were exchanged signs nothing.
func TestCustodySealedToItsOwner(t *testing.T) {
	t.Parallel()
	v := newVault(t)
	a, b := v.Doctor("D001", "SM2"), v.Doctor("D002", "SM2")
	if bytes.Equal(a.Sealing.Point, b.Sealing.Point) || bytes.Equal(a.Keys[0].Wrapped.Sealed, b.Keys[0].Wrapped.Sealed) {
		t.Fatal("two signers share a sealing")
	}
	a.Keys[0].Wrapped.Sealed, b.Keys[0].Wrapped.Sealed = b.Keys[0].Wrapped.Sealed, a.Keys[0].Wrapped.Sealed
	for _, id := range []string{"D001", "D002"} {
		if _, err := v.activate(t, id, testkit.PIN, 1); err == nil {
			t.Errorf("%s: another's key was opened", id)
		}
	}
}

// TestCustodyRotation: a new key takes the place of the old one when its certificate comes; what the old one signed stays
// valid; then the old one is destroyed, the present one is not, and the journal says so over a restart.
func TestCustodyRotation(t *testing.T) {
	t.Parallel()
	c := newClinic(t)
	seed, point := custody.NewPair()
	clear(seed)
	c.Custody = &account.CustodyPolicy{KEK: "kek/1", Officers: point}
	c.Restart()
	v := &vault{c.House, c.app, nil}
	c.must(v.Directory.Enrol(t.Context(), "admin", account.Enrolment{ID: "D007", Name: "孙思邈", Department: "药剂", Campus: "本部", Algorithms: []string{"SM2"}, PIN: testkit.PIN, External: true}))
	first := c.ask(account.RequestSpec{For: "signer:D007"})
	if err := c.take(c.sub.issue(first.CSR, nil)); err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	signed := func(key string) *sign.Result {
		t.Helper()
		grant, err := v.activate(t, "D007", testkit.PIN, 1)
		if err != nil {
			t.Fatal(err)
		}
		q := testkit.Request(key, "D007")
		q.Consent = sign.Consent{AuthorizationID: grant}
		return v.Sign(v.app, q)
	}
	old := signed("old")

	second := c.ask(account.RequestSpec{For: "signer:D007", NewKey: true})
	if second.Label == first.Label || second.Wrapped == nil {
		t.Fatalf("the new request is for %s", second.Label)
	}
	_, held, err := v.Directory.ActiveSigner("D007", "SM2")
	if err != nil || held.Label != first.Label {
		t.Errorf("while the certificate is awaited %+v signs, %v", held, err)
	}
	wants(t, "destroying the present key", v.Directory.DestroyKey(ctx, "admin", first.Label, "换发"), problem.Forbidden)
	v.Clock.Advance(time.Hour)
	if err := c.take(c.sub.issue(second.CSR, func(x *smx509.Certificate) { x.NotBefore = testkit.Start })); err != nil {
		t.Fatal(err)
	}
	if _, held, err = v.Directory.ActiveSigner("D007", "SM2"); err != nil || held.Label != second.Label {
		t.Errorf("then %+v signs, %v", held, err)
	}
	signed("new")
	if err := v.Directory.DestroyKey(ctx, "admin", first.Label, "换发"); err != nil {
		t.Fatal(err)
	}
	wants(t, "destroying it again", v.Directory.DestroyKey(ctx, "admin", first.Label, "换发"), problem.KeyUnknown)
	wants(t, "destroying the one that took its place", v.Directory.DestroyKey(ctx, "admin", second.Label, "换发"), problem.Forbidden)
	late := c.sub.issue(first.CSR, func(x *smx509.Certificate) { x.SerialNumber = big.NewInt(7001) })
	wants(t, "a certificate for the destroyed key", c.take(late), problem.CertificateKeyUnknown)
	v.Restart()
	signed("after-the-restart")
	if r := c.judge(old.RecordID); r.Verdict != pki.Valid {
		t.Errorf("what the old key signed: %+v", r)
	}
	states := map[string]account.KeyRecord{}
	for _, r := range v.Directory.KeyRecords() {
		states[r.Label] = r
	}
	was, is := states[first.Label], states[second.Label]
	if was.Destroyed.IsZero() || !is.Destroyed.IsZero() || was.KEK != "kek/1" || was.Born.IsZero() || is.Due.IsZero() || is.Activated.IsZero() {
		t.Errorf("the inventory has %+v and %+v", was, is)
	}
	// A resident key of a stopped signer goes from the cipher machine.
	v.Custody = nil
	v.Restart()
	v.Doctor("D008", "SM2")
	label := v.Staff.Labels()[len(v.Staff.Labels())-1]
	wants(t, "a key in use", v.Directory.DestroyKey(ctx, "admin", label, "离职"), problem.Forbidden)
	if _, err := v.Directory.StopSigner(ctx, "admin", "D008", true, "离职"); err != nil {
		t.Fatal(err)
	}
	if err := v.Directory.DestroyKey(ctx, "admin", label, "离职"); err != nil || slices.Contains(v.Staff.Labels(), label) {
		t.Errorf("DestroyKey = %v, and the machine has %v", err, v.Staff.Labels())
	}
	// One who comes back gets another.
	if _, err := v.Directory.StopSigner(ctx, "admin", "D008", false, "返聘"); err != nil {
		t.Fatal(err)
	}
	wants(t, "signing without a key", v.sign(t, "without", "D008", ""), problem.KeyUnknown)
	if _, err := v.Directory.AddSignerKey(ctx, "admin", "D008", "SM2", false); err != nil {
		t.Fatal(err)
	}
	v.Restart()
	if err := v.sign(t, "back", "D008", ""); err != nil {
		t.Error(err)
	}
}

// TestCustodyKeyOfNobodysPIN: of a signer without a PIN, too, the key in place of the old one signs at once, and what was
// destroyed is opened no more, by a live authorisation neither; while time is not trusted nobody can say which is the present
// one, so nothing is destroyed.
func TestCustodyKeyOfNobodysPIN(t *testing.T) {
	t.Parallel()
	c := newClinic(t)
	c.Custody = &account.CustodyPolicy{KEK: "kek/1"}
	c.Restart()
	v := &vault{c.House, c.app, nil}
	ctx := t.Context()
	c.must(v.Directory.Enrol(ctx, "admin", account.Enrolment{ID: "N7", Name: "护士", Department: "急诊", Campus: "本部", Algorithms: []string{"SM2"}, External: true}))
	replace := func() (label string) {
		t.Helper()
		r := c.ask(account.RequestSpec{For: "signer:N7", NewKey: true})
		v.Clock.Advance(time.Hour)
		accept := account.Import{File: c.sub.issue(r.CSR, nil).Raw, AcceptSubject: true}
		c.must(v.Directory.ImportCertificates(ctx, "admin", accept))
		return r.Label
	}
	first := replace()
	if err := v.sign(t, "a", "N7", ""); err != nil {
		t.Fatal(err)
	}
	second := replace()
	v.Clock.State(ntp.Untrusted)
	wants(t, "destroying a key while time is not trusted", v.Directory.DestroyKey(ctx, "admin", first, "换发"), problem.TimeUntrusted)
	v.Clock.State(ntp.Trusted)
	if err := v.Directory.DestroyKey(ctx, "admin", first, "换发"); err != nil {
		t.Fatal(err)
	}
	v.until(t, "the destroyed key is not unwrapped", func() bool { return v.Staff.Unwrapped() == 0 })
	if err := v.sign(t, "b", "N7", ""); err != nil {
		t.Errorf("the key in its place, %s: %v", second, err)
	}
	g, _ := v.Directory.Signer("N7")
	if err := v.Directory.DestroyKey(ctx, "admin", g.Keys[0].Label, "未用"); err != nil {
		t.Fatal(err)
	}
	if g, _ = v.Directory.Signer("N7"); len(g.Keys[0].Wrapped.Sealed) > 0 {
		t.Error("the next entry of the signer would repeat what opens the destroyed key")
	}
}

// TestCustodyInterrupted: a destruction and a new PIN whose outcomes are lost, with and without a restart after, can be asked
// for again; until then the key is as it was, and the PIN is the old one.
func TestCustodyInterrupted(t *testing.T) {
	t.Parallel()
	v := newVault(t)
	ctx := t.Context()
	lost := errors.New("power")
	for i, landed := range []bool{false, true} {
		id := []string{"D001", "D002"}[i]
		g := v.Doctor(id, "SM2")
		v.Journal.FailKind("account.signer/outcome", 1, landed, lost)
		if _, err := v.Directory.SetPIN(ctx, "admin", id, testkit.PIN, "222222"); err == nil {
			t.Fatal("the outcome was not lost")
		}
		v.Restart()
		pin := map[bool]string{false: testkit.PIN, true: "222222"}[landed]
		if _, err := v.Directory.SetPIN(ctx, "admin", id, pin, "333333"); err != nil {
			t.Fatalf("landed %v: %v", landed, err)
		}
		grant, err := v.activate(t, id, "333333", 1)
		if err == nil {
			err = v.sign(t, id, id, grant)
		}
		if err != nil {
			t.Errorf("landed %v: %v", landed, err)
		}

		if _, err := v.Directory.StopSigner(ctx, "admin", id, true, "离职"); err != nil {
			t.Fatal(err)
		}
		label := g.Keys[0].Label
		v.Journal.FailKind("key.destruction/outcome", 1, landed, lost)
		if err := v.Directory.DestroyKey(ctx, "admin", label, "离职"); err == nil {
			t.Fatal("the outcome was not lost")
		}
		if i == 0 {
			v.Restart()
		}
		again := v.Directory.DestroyKey(ctx, "admin", label, "离职")
		if landed {
			wants(t, "what was destroyed", again, problem.KeyUnknown)
		} else if again != nil {
			t.Errorf("asked again: %v", again)
		}
	}
}

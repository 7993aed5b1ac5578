package account_test

import (
	"bytes"
	"crypto/rand"
	"errors"
	"strings"
	"testing"
	"time"

	"yinjian/appliance/account"
	"yinjian/appliance/custody"
	"yinjian/appliance/evidence"
	"yinjian/appliance/internal/testkit"
	"yinjian/appliance/pki"
	"yinjian/appliance/problem"
	"yinjian/appliance/sign"
)

const campusKEK = "kek/1"

// ceremony is the secret of one.
func ceremony() []byte {
	b := make([]byte, custody.SecretSize)
	rand.Read(b)
	return b
}

// bring has a house under a ceremony: its wrapping key is that of with, its MAC keys come from the secret.
func bring(t *testing.T, h, with *testkit.House, secret []byte) {
	t.Helper()
	for _, use := range account.CampusMACs {
		label := custody.MACLabel(use, campusKEK)
		h.Log.Import(label, custody.MACOf(secret, label))
	}
	h.Staff.ShareKEK(with.Staff)
	h.Custody = &account.CustodyPolicy{KEK: campusKEK, CampusMACs: true}
	h.Restart()
}

// campusB is another appliance, paired with a on its side.
func campusB(t *testing.T, a *testkit.House) *testkit.House {
	t.Helper()
	b := testkit.NewNode(t, "binhai-1")
	b.Trust.Anchors = append(b.Trust.Anchors, a.Trust.Anchors...)
	b.PairWith(a, new(testkit.Centre))
	return b
}

// replicate has b take what a has.
func replicate(t *testing.T, a, b *testkit.House) {
	t.Helper()
	if _, err := b.Take(a); err != nil {
		t.Fatal(err)
	}
}

func activate(t *testing.T, h *testkit.House, signer, pin string) (*account.Grant, error) {
	t.Helper()
	app, _, ok := h.Directory.Application("his")
	if !ok {
		t.Fatal("no application")
	}
	return h.Directory.Authorize(t.Context(), app, account.GrantRequest{Signer: signer, PIN: pin, Count: 3, Seconds: 600})
}

// signs makes a signature and judges its evidence.
func signs(t *testing.T, h *testkit.House, key, signer, grant string) {
	t.Helper()
	q := testkit.Request(key, signer)
	if grant != "" {
		q.Consent = sign.Consent{AuthorizationID: grant}
	}
	app, _, _ := h.Directory.Application("his")
	r := h.Sign(app, q)
	bundle, err := evidence.Parse(h.Evidence(app, r.RecordID))
	if err != nil {
		t.Fatal(err)
	}
	if report := evidence.Verify(bundle, h.Trust, evidence.Input{Document: testkit.Document}); report.Verdict != pki.Valid {
		t.Errorf("%s at %s: %s", signer, h.Node, report.Verdict)
	}
}

// TestCampusMACs: what was made at one campus under the MAC keys of a ceremony is good at the other one, whose machine got them
// from the same shares: an application's key, a PIN, custody keys under a PIN and without. A machine with another key under
// the label, without one, and without the ceremony refuses, and no try of the PIN is counted.
func TestCampusMACs(t *testing.T) {
	t.Parallel()
	secret := ceremony()
	a := testkit.New(t)
	bring(t, a, a, secret)
	a.App("his", nil)
	a.Doctor("D001")
	if _, err := a.Directory.Enrol(t.Context(), "admin", account.Enrolment{ID: "D002", Name: "扁鹊", Department: "内科", Campus: "本部", Algorithms: []string{"SM2"}}); err != nil {
		t.Fatal(err)
	}
	_, key, _ := a.Directory.Application("his")
	labels := func(h *testkit.House) (own int) {
		for _, label := range []string{account.PINKeyLabel, account.AppKeyLabel} {
			if err := h.Log.DestroyKey(t.Context(), label); err == nil {
				own++
			}
		}
		return own
	}
	if labels(a) != 2 {
		t.Error("the machine had no keys of its own")
	}

	b := campusB(t, a)
	bring(t, b, a, secret)
	labels(b) // nothing of it is derived with the machine's own keys
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
		signs(t, h, "pin", "D001", grant.ID)
		signs(t, h, "word", "D002", "")
	}
	// Whoever has the other campus's machine and directory, and no PIN, has no more than at the first campus.
	app, _, _ := b.Directory.Application("his")
	for _, h := range []*testkit.House{a, b} {
		_, err := h.Signing.Sign(t.Context(), app, testkit.Request("thief", "D001"))
		wants(t, "the application's word at "+h.Node, err, problem.ConsentInsufficient)
		_, err = h.Directory.SetPIN(t.Context(), "thief", "D001", "", "135790")
		wants(t, "another PIN at "+h.Node, err, problem.ConsentInsufficient)
	}
	// What B changes of it goes on at A: a new PIN.
	if _, err := b.Directory.SetPIN(t.Context(), "admin", "D001", testkit.PIN, "246810"); err != nil {
		t.Fatal(err)
	}
	a.PairWith(b, b.Pairing.Centre)
	replicate(t, b, a)
	for _, h := range []*testkit.House{a, b} {
		if grant, err := activate(t, h, "D001", "246810"); err != nil {
			t.Errorf("%s: %v", h.Node, err)
		} else {
			signs(t, h, "new-pin", "D001", grant.ID)
		}
	}

	for name, row := range map[string]struct {
		prepare func(h *testkit.House)
		says    string
	}{
		"another key of that label": {func(h *testkit.House) { bring(t, h, a, ceremony()) }, "校验值"},
		"no key of that label":      {func(*testkit.House) {}, "ceremony restore"},
	} {
		b := campusB(t, a)
		row.prepare(b)
		replicate(t, a, b)
		if app, key, ok := b.Directory.Application("his"); !ok || app == nil || key != nil {
			t.Errorf("%s: the application has a key", name)
		}
		for range account.MaxPINTries + 1 {
			_, err := activate(t, b, "D001", testkit.PIN)
			var p *problem.Problem
			if wants(t, name, err, problem.KeyElsewhere); !errors.As(err, &p) || !strings.Contains(p.Detail+p.Next, row.says) {
				t.Errorf("%s: it says %v", name, err)
			}
		}
		if g, _ := b.Directory.Signer("D001"); b.Directory.View(g).PINLocked {
			t.Errorf("%s: tries were counted", name)
		}
	}
}

// TestOwnMACs: what one machine's own keys derived is refused at the other campus, by its name and without counting, also
// after the other campus changed the object; and goes on at its own. So is a resident key.
func TestOwnMACs(t *testing.T) {
	t.Parallel()
	a := testkit.New(t)
	a.App("his", nil)
	a.Doctor("D001", "SM2") // a resident key
	a.Custody = &account.CustodyPolicy{KEK: campusKEK}
	a.Restart()
	a.Doctor("D002", "SM2")
	_, key, _ := a.Directory.Application("his")
	b := campusB(t, a)
	replicate(t, a, b)
	if _, key, ok := b.Directory.Application("his"); !ok || key != nil {
		t.Error("another machine's key derived an application's")
	}
	for _, signer := range []string{"D001", "D002"} {
		_, err := activate(t, b, signer, testkit.PIN)
		if wants(t, signer, err, problem.KeyElsewhere); !strings.Contains(err.Error(), a.Node) {
			t.Errorf("it names no appliance: %v", err)
		}
	}
	app, _, _ := b.Directory.Application("his")
	_, err := b.Signing.Sign(t.Context(), app, testkit.Request("resident", "D001"))
	if wants(t, "a resident key", err, problem.KeyElsewhere); !strings.Contains(err.Error(), a.Node) {
		t.Errorf("it names no appliance: %v", err)
	}
	g, err := b.Directory.StopSigner(t.Context(), "admin", "D001", true, "停")
	if err != nil {
		t.Fatal(err)
	}
	wants(t, "destroying it", b.Directory.DestroyKey(t.Context(), "admin", g.Keys[0].Label, "停"), problem.KeyElsewhere)
	if _, err := b.Directory.StopApplication(t.Context(), "admin", "his", true, "停"); err != nil {
		t.Fatal(err)
	}
	if _, err = b.Directory.StopSigner(t.Context(), "admin", "D002", true, "停"); err != nil {
		t.Fatal(err)
	}
	// Back at A, as B has them.
	a.PairWith(b, b.Pairing.Centre)
	replicate(t, b, a)
	if g, _ := a.Directory.Signer("D002"); !g.Stopped {
		t.Fatal("A did not hear of it")
	}
	if _, same, _ := a.Directory.Application("his"); !bytes.Equal(same, key) {
		t.Error("the application's key changed")
	}
	if _, err := a.Directory.StopSigner(t.Context(), "admin", "D002", false, "复"); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Directory.StopApplication(t.Context(), "admin", "his", false, "复"); err != nil {
		t.Fatal(err)
	}
	if grant, err := activate(t, a, "D002", testkit.PIN); err != nil {
		t.Error(err)
	} else {
		signs(t, a, "again", "D002", grant.ID)
	}
}

// TestRederive: an appliance that had its own MAC keys is brought under a ceremony's with nobody's key or PIN changed:
// applications and signers without a PIN at once, the others when they next give it, which a failure only puts off. Then all
// of it is good at the other campus, and after a restart.
func TestRederive(t *testing.T) {
	t.Parallel()
	a := testkit.New(t)
	a.Custody = &account.CustodyPolicy{KEK: campusKEK}
	a.Restart()
	a.App("his", nil)
	a.App("lis", nil)
	a.Doctor("D001", "SM2")
	if _, err := a.Directory.Enrol(t.Context(), "admin", account.Enrolment{ID: "D002", Name: "扁鹊", Department: "内科", Campus: "本部", Algorithms: []string{"SM2"}}); err != nil {
		t.Fatal(err)
	}
	_, key, _ := a.Directory.Application("his")
	_, err := a.Directory.Rederive(t.Context(), "admin")
	wants(t, "before the ceremony", err, problem.Forbidden)

	secret := ceremony()
	bring(t, a, a, secret)
	for round, want := range []int{3, 0} {
		done, err := a.Directory.Rederive(t.Context(), "admin")
		if err != nil {
			t.Fatal(err)
		}
		if len(done.Done) != want || done.Waiting != 1 || len(done.Elsewhere) != 0 {
			t.Errorf("round %d: %+v", round, done)
		}
	}
	if app, same, _ := a.Directory.Application("his"); !bytes.Equal(same, key) || bytes.Contains(app.KeySealed, key) {
		t.Error("the application's key changed, or stands there in the open")
	}
	g, _ := a.Directory.Signer("D001")
	a.Journal.FailKind("account.signer/intent", -1, false, errors.New("disk gone"))
	if _, err := activate(t, a, "D001", testkit.PIN); err != nil {
		t.Errorf("a PIN that cannot be brought along now: %v", err)
	}
	a.Journal.Fault(nil)
	b, centre := campusB(t, a), new(testkit.Centre)
	a.PairWith(b, centre)
	a.Clock.Advance(2 * time.Minute)
	calls := 0
	centre.Fault(func(string) (bool, error) { calls++; return false, testkit.ErrCentre })
	for range 3 {
		if _, err := activate(t, a, "D001", testkit.PIN); err != nil {
			t.Errorf("a PIN while the centre is away: %v", err)
		}
	}
	if calls != 1 {
		t.Errorf("the centre was asked %d times within a minute", calls)
	}
	centre.Fault(nil)
	a.Clock.Advance(2 * time.Minute)
	if still, _ := a.Directory.Signer("D001"); still != g {
		t.Error("it was changed all the same")
	}
	grant, err := activate(t, a, "D001", testkit.PIN)
	if err != nil {
		t.Fatal(err)
	}
	signs(t, a, "followed", "D001", grant.ID)
	if done, err := a.Directory.Rederive(t.Context(), "admin"); err != nil || done.Waiting != 0 {
		t.Errorf("%+v, %v", done, err)
	}
	_, err = activate(t, a, "D001", "000000")
	wants(t, "a wrong PIN", err, problem.PINWrong)
	a.Restart()
	if _, same, _ := a.Directory.Application("his"); !bytes.Equal(same, key) {
		t.Error("after a restart the application has another key")
	}

	for _, label := range []string{account.PINKeyLabel, account.AppKeyLabel} { // nothing needs them any more
		if err := a.Log.DestroyKey(t.Context(), label); err != nil {
			t.Fatal(err)
		}
	}
	// Its journal has objects of before in it, which later ones have taken the place of.
	if err := a.TryRestart(); problem.CodeOf(err) != problem.HSMUnavailable {
		t.Errorf("a start without the machine's own keys: %v", err)
	}
	bring(t, b, a, secret)
	replicate(t, a, b)
	if _, same, _ := b.Directory.Application("his"); !bytes.Equal(same, key) {
		t.Error("the other campus has another key for the application")
	}
	for _, h := range []*testkit.House{a, b} {
		grant, err := activate(t, h, "D001", testkit.PIN)
		if err != nil {
			t.Fatalf("%s: %v", h.Node, err)
		}
		signs(t, h, "both", "D001", grant.ID)
		signs(t, h, "word", "D002", "")
	}
}

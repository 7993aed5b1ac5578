package account_test

import (
	"bytes"
	"context"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/sm3"
	"github.com/emmansun/gmsm/smx509"

	"yinjian/appliance/account"
	"yinjian/appliance/audit"
	"yinjian/appliance/internal/testkit"
	"yinjian/appliance/problem"
	"yinjian/ntp"
)

const (
	systemPassword   = "Xt-guanli-2026"
	securityPassword = "Aq-guanli-2026"
	auditPassword    = "Sj-guanli-2026"
)

func threeAdministrators() []account.NewAdministrator {
	return []account.NewAdministrator{
		{ID: "zhang", Name: "张三", Role: account.System, Password: systemPassword},
		{ID: "li.si", Name: "李四", Role: account.Security, Password: securityPassword},
		{ID: "wang", Name: "王五", Role: account.Auditor, Password: auditPassword},
	}
}

func bootstrap(t *testing.T, h *testkit.House) {
	t.Helper()
	if _, err := h.Directory.BootstrapAdministrators(t.Context(), "local uid=0(root)", threeAdministrators()); err != nil {
		t.Fatal(err)
	}
}

func login(t *testing.T, h *testkit.House, id, password string) error {
	t.Helper()
	_, err := h.Directory.AuthenticateAdministrator(t.Context(), account.LoginAttempt{ID: id, Password: password, From: "192.0.2.7"})
	return err
}

func TestBootstrapAdministrators(t *testing.T) {
	t.Parallel()
	h := testkit.New(t)
	d := h.Directory
	for name, change := range map[string]func(all []account.NewAdministrator) []account.NewAdministrator{
		"two": func(all []account.NewAdministrator) []account.NewAdministrator { return all[:2] },
		"one role twice": func(all []account.NewAdministrator) []account.NewAdministrator {
			all[2].Role = account.System
			return all
		},
		"one person twice": func(all []account.NewAdministrator) []account.NewAdministrator {
			all[2].ID = all[0].ID
			return all
		},
		"an id": func(all []account.NewAdministrator) []account.NewAdministrator { all[2].ID = "../x"; return all },
		"no name": func(all []account.NewAdministrator) []account.NewAdministrator {
			all[2].Name = ""
			return all
		},
		"a password": func(all []account.NewAdministrator) []account.NewAdministrator { all[2].Password = "short"; return all },
	} {
		if _, err := d.BootstrapAdministrators(t.Context(), "root", change(threeAdministrators())); problem.CodeOf(err) != problem.InvalidRequest {
			t.Errorf("%s: %v", name, err)
		}
	}
	if n := len(d.Administrators()); n != 0 {
		t.Fatalf("%d administrators came of refusals", n)
	}
	// Broken off after the first, it is asked again, and that one stays as it is.
	first := true
	h.Journal.Fault(func(draft audit.Draft) (bool, error) {
		if draft.Kind == "account.administrator/intent" && !first {
			return false, errors.New("disk gone")
		}
		first = first && draft.Kind != "account.administrator/intent"
		return false, nil
	})
	_, err := d.BootstrapAdministrators(t.Context(), "root", threeAdministrators())
	wants(t, "broken off", err, problem.JournalUnwritable)
	h.Journal.Fault(nil)
	if d.Bootstrapped() || len(d.Administrators()) != 1 {
		t.Fatalf("%d administrators, bootstrapped %v", len(d.Administrators()), d.Bootstrapped())
	}
	bootstrap(t, h)
	wants(t, "twice", errOf(d.BootstrapAdministrators(t.Context(), "root", threeAdministrators())), problem.Exists)
	h.Restart()
	if !h.Directory.Bootstrapped() || len(h.Directory.Administrators()) != 3 {
		t.Error("lost in a restart")
	}
	// No entry has a password, and the change log no verifier.
	err = h.Journal.State(t.Context(), func(r audit.Record) error {
		object, perr := h.Journal.Payload(t.Context(), &r.Entry, "object")
		if perr != nil && !errors.Is(perr, audit.ErrNotFound) {
			return perr
		}
		for _, p := range []string{systemPassword, securityPassword, auditPassword} {
			if bytes.Contains(r.EntryDER, []byte(p)) || bytes.Contains(object, []byte(p)) {
				t.Fatalf("the journal has the password %s", p)
			}
		}
		if after := r.Entry.Text(audit.FieldAfter); r.Entry.Kind == "account.administrator/outcome" && !strings.Contains(after, `"password":"sm3:`) {
			t.Errorf("the change log says %s", after)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func errOf(_ any, err error) error { return err }

// The verifier is HMAC-SM3 in the cipher machine over PBKDF2-HMAC-SM3, which Go's own PBKDF2 computes as well.
func TestPasswordVerifier(t *testing.T) {
	t.Parallel()
	h := testkit.New(t)
	bootstrap(t, h)
	a, _ := h.Directory.Administrator("zhang")
	if account.PasswordIterations < 100_000 || len(a.Password.Salt) != 16 {
		t.Errorf("%d iterations over %d bytes of salt", account.PasswordIterations, len(a.Password.Salt))
	}
	stretched, err := pbkdf2.Key(sm3.New, systemPassword, a.Password.Salt, a.Password.Iterations, 32)
	if err != nil {
		t.Fatal(err)
	}
	want, err := h.Log.MAC(t.Context(), account.PINKeyLabel, slices.Concat([]byte("yinjian/administrator-password/v1\x00"), stretched, []byte("zhang")))
	if err != nil || !bytes.Equal(a.Password.Tag, want) {
		t.Errorf("%x, %v, want %x", a.Password.Tag, err, want)
	}
}

func TestAdministratorLogin(t *testing.T) {
	t.Parallel()
	h := testkit.New(t)
	bootstrap(t, h)
	lastLogin := func() *time.Time {
		a, _ := h.Directory.Administrator("zhang")
		return h.Directory.ViewAdministrator(a).LastLogin
	}
	if err := login(t, h, "zhang", systemPassword+"x"); err == nil || lastLogin() != nil {
		t.Errorf("before the first login there was one at %v", lastLogin())
	}
	if err := login(t, h, "zhang", systemPassword); err != nil {
		t.Fatal(err)
	}
	if at := lastLogin(); at == nil || !at.Equal(h.Clock.Now().Time) {
		t.Errorf("the last login was at %v", at)
	}
	// Which part was wrong is not told.
	words := map[string]bool{}
	for name, err := range map[string]error{
		"wrong":   login(t, h, "zhang", systemPassword+"x"),
		"empty":   login(t, h, "zhang", ""),
		"another": login(t, h, "zhang", securityPassword),
		"unknown": login(t, h, "nobody", systemPassword),
		"no name": login(t, h, "../x", systemPassword),
	} {
		wants(t, name, err, problem.LoginFailed)
		words[err.Error()] = true
	}
	if len(words) != 1 {
		t.Errorf("%v", words)
	}
	// A right one ends the count, over a restart too.
	if err := login(t, h, "zhang", systemPassword); err != nil {
		t.Fatal(err)
	}
	h.Restart()
	for range account.MaxLoginTries - 1 {
		wants(t, "wrong", login(t, h, "zhang", "no"), problem.LoginFailed)
	}
	if err := login(t, h, "zhang", systemPassword); err != nil {
		t.Fatalf("after %d failures: %v", account.MaxLoginTries-1, err)
	}
	// Five lock, over a restart too, and the right password does not help.
	for i := range account.MaxLoginTries {
		wants(t, "wrong", login(t, h, "zhang", "no"), problem.LoginFailed)
		if i == 2 {
			h.Restart()
		}
	}
	h.Clock.Advance(account.LoginLock - time.Minute)
	wants(t, "locked", login(t, h, "zhang", systemPassword), problem.LoginFailed)
	h.Restart()
	wants(t, "locked after a restart", login(t, h, "zhang", systemPassword), problem.LoginFailed)
	h.Clock.State(ntp.Untrusted)
	wants(t, "locked without time", login(t, h, "zhang", systemPassword), problem.LoginFailed)
	h.Clock.State(ntp.Trusted)
	if err := login(t, h, "li.si", securityPassword); err != nil {
		t.Errorf("another administrator is locked too: %v", err)
	}
	h.Clock.Advance(time.Minute)
	wants(t, "wrong after the lock", login(t, h, "zhang", "no"), problem.LoginFailed)
	if err := login(t, h, "zhang", systemPassword); err != nil {
		t.Errorf("after the lock: %v", err)
	}
	// A new password ends a lock.
	for range account.MaxLoginTries {
		wants(t, "wrong", login(t, h, "wang", "no"), problem.LoginFailed)
	}
	if _, err := h.Directory.SetAdministratorPassword(t.Context(), "admin:li.si", "wang", "Xin-koulin-2026"); err != nil {
		t.Fatal(err)
	}
	if err := login(t, h, "wang", "Xin-koulin-2026"); err != nil {
		t.Errorf("with the new password: %v", err)
	}
	// Who is stopped does not get in; the last one of a role is not stopped.
	for _, id := range []string{"wang", "zhang", "li.si"} {
		wants(t, "the last one, "+id, errOf(h.Directory.StopAdministrator(t.Context(), "admin:li.si", id, true, "调离")), problem.Forbidden)
	}
	addAdministrator(t, h, "sun", account.Auditor)
	if _, err := h.Directory.StopAdministrator(t.Context(), "admin:li.si", "wang", true, "调离"); err != nil {
		t.Fatal(err)
	}
	wants(t, "stopped", login(t, h, "wang", "Xin-koulin-2026"), problem.LoginFailed)
	wants(t, "the last one, sun", errOf(h.Directory.StopAdministrator(t.Context(), "admin:li.si", "sun", true, "调离")), problem.Forbidden)
	addAdministrator(t, h, "zhao", account.Operator) // the appliance does without operators
	if _, err := h.Directory.StopAdministrator(t.Context(), "admin:li.si", "zhao", true, "调离"); err != nil {
		t.Error(err)
	}
}

func addAdministrator(t *testing.T, h *testkit.House, id string, role account.Role) {
	t.Helper()
	if _, err := h.Directory.AddAdministrator(t.Context(), "admin:li.si", account.NewAdministrator{ID: id, Name: "孙", Role: role, Password: "Kouling-yi-2026"}); err != nil {
		t.Fatal(err)
	}
}

// Two campuses that have not heard of each other do not stop each other's last administrator, in whatever order the centre is
// asked.
func TestLastAdministratorAtTwoCampuses(t *testing.T) {
	t.Parallel()
	for _, at := range []string{"one after the other", "at a time"} {
		w := newCampuses(t)
		bootstrap(t, w.a)
		addAdministrator(t, w.a, "sun", account.Security)
		w.exchange(t)
		stop := func(h *testkit.House, id string) error {
			return errOf(h.Directory.StopAdministrator(context.Background(), "admin:x", id, true, "调离"))
		}
		var first error
		if at == "at a time" { // the other has looked around already, and is about to decide
			begun := false
			w.centre.Fault(func(call string) (bool, error) {
				if call == "decide" && !begun {
					begun = true
					first = stop(w.a, "li.si")
				}
				return true, nil
			})
		} else {
			first = stop(w.a, "li.si")
		}
		second := stop(w.b, "sun")
		w.centre.Fault(nil)
		if first != nil {
			t.Fatalf("%s: %v", at, first)
		}
		wants(t, at, second, problem.DirectoryBehind)
		w.exchange(t)
		w.agree(t)
		for _, h := range w.houses() {
			if _, _, ok := h.Directory.ActiveAdministrator("sun"); !ok {
				t.Errorf("%s: %s: nobody is left", at, h.Node)
			}
		}
		wants(t, at+", afterwards", stop(w.b, "sun"), problem.Forbidden)
	}
}

// However many logins fail, the journal grows by a few entries, and says how many they were and where they came from; those that
// lock are told of each.
func TestFailedLoginsAreSummedUp(t *testing.T) {
	t.Parallel()
	h := testkit.New(t)
	bootstrap(t, h)
	for range account.MaxLoginTries {
		wants(t, "wrong", login(t, h, "zhang", "no"), problem.LoginFailed)
	}
	before := h.Journal.Size()
	const many = 300
	for i := range many {
		id, from := "nobody", fmt.Sprintf("admin 10.0.0.%d", i%40)
		if i%2 == 0 {
			id = "zhang" // locked
		}
		_, err := h.Directory.AuthenticateAdministrator(t.Context(), account.LoginAttempt{ID: id, Password: "no", From: from})
		wants(t, "wrong", err, problem.LoginFailed)
	}
	if err := h.Directory.TellFailedLogins(t.Context(), false); err != nil { // within the hour: not yet
		t.Fatal(err)
	}
	own := h.Journal.Size() - before
	if own == 0 || own > many/4 {
		t.Fatalf("%d entries for %d failures", own, many)
	}
	for range 2 { // told once
		if err := h.Directory.TellFailedLogins(t.Context(), true); err != nil {
			t.Fatal(err)
		}
	}
	var told, places int
	for i := before; i < h.Journal.Size(); i++ {
		r, err := h.Journal.Entry(t.Context(), i)
		if err != nil || r.Entry.Kind != "administration.login/failed" {
			t.Fatalf("%+v, %v", r.Entry, err)
		}
		if n, ok := r.Entry.Field("count").(audit.Int); ok {
			told += int(n)
			places = strings.Count(r.Entry.Text("from"), "×")
		}
	}
	if h.Journal.Size() != before+own+1 || told != many-int(own) || places != 17 {
		t.Errorf("%d of %d are told of in %d entries, from %d places", told, many-int(own), h.Journal.Size()-before-own, places)
	}
	a, _ := h.Directory.Administrator("zhang")
	if !h.Directory.ViewAdministrator(a).Locked {
		t.Error("not locked")
	}
}

// A failure is on disk before it is answered; when it cannot be, it counts all the same, and nobody gets in.
func TestLoginNeedsTheJournal(t *testing.T) {
	t.Parallel()
	h := testkit.New(t)
	bootstrap(t, h)
	h.Journal.FailKind("administration.login/failed", -1, false, errors.New("disk gone"))
	for range account.MaxLoginTries {
		wants(t, "wrong", login(t, h, "zhang", "no"), problem.JournalUnwritable)
	}
	h.Journal.Fault(nil)
	wants(t, "locked", login(t, h, "zhang", systemPassword), problem.LoginFailed)
	h.Journal.FailKind("administration.login/succeeded", -1, false, errors.New("disk gone"))
	wants(t, "right", login(t, h, "li.si", securityPassword), problem.JournalUnwritable)
}

// Two are looked at and sixteen wait, however many come at once; guesses at once gain nothing.
func TestLoginsAtOnce(t *testing.T) {
	t.Parallel()
	h := testkit.New(t)
	bootstrap(t, h)
	held := make(chan struct{})
	h.Journal.Fault(func(d audit.Draft) (bool, error) {
		<-held
		return false, nil
	})
	answers := make(chan error)
	const all, admitted = 40, 2 + 16
	for range all {
		go func() {
			_, err := h.Directory.AuthenticateAdministrator(context.WithoutCancel(t.Context()), account.LoginAttempt{ID: "zhang", Password: "no"})
			answers <- err
		}()
	}
	for range all - admitted {
		wants(t, "one too many", <-answers, problem.RateLimited)
	}
	close(held)
	for range admitted {
		wants(t, "a guess", <-answers, problem.LoginFailed)
	}
	h.Journal.Fault(nil)
	wants(t, "the right one", login(t, h, "zhang", systemPassword), problem.LoginFailed)
}

func TestPasswords(t *testing.T) {
	t.Parallel()
	h := testkit.New(t)
	bootstrap(t, h)
	change := func(old, fresh string) error {
		return errOf(h.Directory.ChangePassword(t.Context(), "admin:zhang", "local", "zhang", old, fresh))
	}
	for _, bad := range []string{"", "Ab3-", "abcdefghijklmno", "abcdefghijkl1", "ABCDEFGHIJKL1", "Abcdefgh-1\nxx", "Zhang-2026-xx", strings.Repeat("Ab3-", 33), systemPassword} {
		wants(t, bad, change(systemPassword, bad), problem.InvalidRequest)
	}
	wants(t, "wrong old", change("no", "Xin-koulin-0001"), problem.LoginFailed)
	now := systemPassword
	for _, next := range []string{"Xin-koulin-0001", "Xin-koulin-0002", "Xin-koulin-0003", "Xin-koulin-0004", "Xin-koulin-0005"} {
		if err := change(now, next); err != nil {
			t.Fatal(err)
		}
		now = next
	}
	h.Restart()
	wants(t, "one of the last", change(now, systemPassword), problem.InvalidRequest)
	if err := change(now, "Xin-koulin-0006"); err != nil {
		t.Fatal(err)
	}
	if err := change("Xin-koulin-0006", systemPassword); err != nil {
		t.Errorf("one of long ago: %v", err)
	}
	// It ends; whose password somebody else knows changes it at once.
	state := func(id string) bool {
		a, _ := h.Directory.Administrator(id)
		return h.Directory.MustChangePassword(a)
	}
	if state("zhang") {
		t.Error("a new password has ended")
	}
	h.Clock.Advance(account.MaxPasswordLife)
	if !state("zhang") {
		t.Error("a password of 90 days has not ended")
	}
	if err := change(systemPassword, "Xin-koulin-0007"); err != nil || state("zhang") {
		t.Errorf("%v, %v", err, state("zhang"))
	}
	if _, err := h.Directory.AddAdministrator(t.Context(), "admin:li.si", account.NewAdministrator{ID: "zhao", Name: "赵六", Role: account.Operator, Password: "Caozuo-yuan-26"}); err != nil || !state("zhao") {
		t.Errorf("%v, %v", err, state("zhao"))
	}
}

func TestLoginCertificate(t *testing.T) {
	t.Parallel()
	h := testkit.New(t)
	bootstrap(t, h)
	key, err := sm2.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	make := func(key any, pub any) []byte {
		template := &smx509.Certificate{
			SerialNumber: big.NewInt(7), Subject: pkix.Name{CommonName: "张三"}, NotBefore: testkit.Start.Add(-time.Hour), NotAfter: testkit.Start.Add(time.Hour),
			KeyUsage: smx509.KeyUsageDigitalSignature,
		}
		der, err := smx509.CreateCertificate(rand.Reader, template, template, pub, key)
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	wants(t, "no certificate", errOf(h.Directory.SetAdministratorCertificate(t.Context(), "admin:li.si", "zhang", []byte("nonsense"))), problem.CertificateMalformed)
	wants(t, "a CA of ours", errOf(h.Directory.SetAdministratorCertificate(t.Context(), "admin:li.si", "zhang", h.CAs["RSA-2048"].Certificate().Raw)), problem.CertificatePurpose)
	signer := h.Doctor("D001", "SM2")
	wants(t, "a signer's", errOf(h.Directory.SetAdministratorCertificate(t.Context(), "admin:li.si", "zhang", signer.Keys[0].Certificate)), problem.CertificatePurpose)
	if _, err := h.Directory.SetAdministratorCertificate(t.Context(), "admin:li.si", "zhang", make(key, &key.PublicKey)); err != nil {
		t.Fatal(err)
	}
	h.Restart()
	challenge := bytes.Repeat([]byte{7}, 32)
	attempt := func(password, prefix string, with *sm2.PrivateKey, over []byte) error {
		sig, err := with.Sign(rand.Reader, append([]byte(prefix), over...), sm2.DefaultSM2SignerOpts)
		if err != nil {
			t.Fatal(err)
		}
		return errOf(h.Directory.AuthenticateAdministrator(t.Context(), account.LoginAttempt{ID: "zhang", Password: password, Challenge: challenge, Signature: sig}))
	}
	other, err := sm2.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	wants(t, "the password alone", login(t, h, "zhang", systemPassword), problem.LoginFailed)
	wants(t, "another's key", attempt(systemPassword, account.LoginPrefix, other, challenge), problem.LoginFailed)
	wants(t, "another challenge", attempt(systemPassword, account.LoginPrefix, key, bytes.Repeat([]byte{8}, 32)), problem.LoginFailed)
	if err := attempt(systemPassword, account.LoginPrefix, key, challenge); err != nil {
		t.Errorf("both: %v", err)
	}
	wants(t, "without the prefix", attempt(systemPassword, "", key, challenge), problem.LoginFailed)
	wants(t, "the signature alone", attempt("no", account.LoginPrefix, key, challenge), problem.LoginFailed)
	if err := attempt(systemPassword, account.LoginPrefix, key, challenge); err != nil {
		t.Errorf("both: %v", err)
	}
	h.Clock.Advance(2 * time.Hour)
	wants(t, "ended", attempt(systemPassword, account.LoginPrefix, key, challenge), problem.LoginFailed)
}

// A password of another campus's cipher machine lets nobody in, and tells nobody that there is such a name.
func TestPasswordElsewhere(t *testing.T) {
	t.Parallel()
	w := newCampuses(t)
	bootstrap(t, w.a)
	w.exchange(t)
	known, unknown := login(t, w.b, "wang", auditPassword), login(t, w.b, "nobody", auditPassword)
	wants(t, "where the password was set", known, problem.LoginFailed)
	if known == nil || unknown == nil || known.Error() != unknown.Error() {
		t.Errorf("%v; of one who does not exist: %v", known, unknown)
	}
	var why []string
	if err := w.b.Journal.Range(t.Context(), 0, func(r audit.Record) error {
		if reason, ok := r.Entry.Field("reason").(audit.Text); ok && r.Entry.Kind == "administration.login/failed" {
			why = append(why, r.Entry.Object+" "+string(reason))
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(why, []string{"wang key_elsewhere"}) {
		t.Errorf("journalled: %q", why)
	}
	if err := login(t, w.a, "wang", auditPassword); err != nil {
		t.Error(err)
	}
}

// Who is stopped at one campus is stopped at the other; with a ceremony's MAC keys one logs in at both.
func TestAdministratorsAtTwoCampuses(t *testing.T) {
	t.Parallel()
	w := newCampuses(t)
	secret := ceremony()
	bring(t, w.a, w.a, secret)
	bring(t, w.b, w.a, secret)
	bootstrap(t, w.a)
	addAdministrator(t, w.a, "sun", account.Auditor)
	w.exchange(t)
	wants(t, "a second bootstrap", errOf(w.b.Directory.BootstrapAdministrators(t.Context(), "root", threeAdministrators())), problem.Exists)
	for _, h := range w.houses() {
		if err := login(t, h, "wang", auditPassword); err != nil {
			t.Errorf("%s: %v", h.Node, err)
		}
	}
	if _, err := w.b.Directory.StopAdministrator(t.Context(), "admin:li.si", "wang", true, "调离"); err != nil {
		t.Fatal(err)
	}
	w.exchange(t)
	for _, h := range w.houses() {
		wants(t, h.Node, login(t, h, "wang", auditPassword), problem.LoginFailed)
		h.Restart()
		if a, ok := h.Directory.Administrator("wang"); !ok || !a.Stopped || a.Version != 2 {
			t.Errorf("%s: %+v", h.Node, a)
		}
	}
	w.agree(t)
}

// A password that was drawn before there was a cipher machine is what a login is tried against, once.
func TestFirstPassword(t *testing.T) {
	t.Parallel()
	h := testkit.New(t)
	three, words := threeAdministrators(), map[string]string{}
	for i := range three {
		three[i].Password = ""
		words[three[i].ID], three[i].First = account.NewFirstPassword()
	}
	b, err := json.Marshal(three) // as it waits for the first start
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range words {
		if len(w) != 19 || bytes.Contains(b, []byte(w)) {
			t.Errorf("%q, kept as %s", w, b)
		}
	}
	three = nil
	if err := json.Unmarshal(b, &three); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Directory.BootstrapAdministrators(t.Context(), "appliance init", three); err != nil {
		t.Fatal(err)
	}
	wants(t, "another's", login(t, h, "zhang", words["wang"]), problem.LoginFailed)
	h.Restart()
	for id, w := range words {
		if err := login(t, h, id, w); err != nil {
			t.Errorf("%s: %v", id, err)
		}
		if _, must, ok := h.Directory.ActiveAdministrator(id); !must || !ok {
			t.Errorf("%s: must change %v, active %v", id, must, ok)
		}
	}
	if _, err := h.Directory.ChangePassword(t.Context(), "zhang", "192.0.2.7", "zhang", words["zhang"], words["zhang"]); problem.CodeOf(err) != problem.InvalidRequest {
		t.Errorf("kept: %v", err)
	}
	if _, err := h.Directory.ChangePassword(t.Context(), "zhang", "192.0.2.7", "zhang", words["zhang"], systemPassword); err != nil {
		t.Error(err)
	}
	if _, must, _ := h.Directory.ActiveAdministrator("zhang"); must {
		t.Error("has to change it again")
	}
}

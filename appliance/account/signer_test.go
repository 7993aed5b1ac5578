package account_test

import (
	"bytes"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/emmansun/gmsm/smx509"

	"yinjian/appliance/account"
	"yinjian/appliance/audit"
	"yinjian/appliance/internal/testkit"
	"yinjian/appliance/pki"
	"yinjian/appliance/pki/ca"
	"yinjian/appliance/problem"
	"yinjian/appliance/uses"
	"yinjian/hsm"
	"yinjian/ntp"
)

func enrolment() account.Enrolment {
	return account.Enrolment{ID: "D001", Name: "张仲景", Department: "中医内科", Campus: "本部", PIN: testkit.PIN}
}

func TestEnrol(t *testing.T) {
	t.Parallel()
	h := testkit.New(t)
	g, err := h.Directory.Enrol(t.Context(), "admin", enrolment())
	if err != nil {
		t.Fatal(err)
	}
	if g.Version != 1 || len(g.Keys) != 2 || g.PIN == nil || len(g.PIN.Tag) != 32 {
		t.Fatalf("enrolled %+v", g)
	}
	var labels []string
	for _, k := range g.Keys {
		labels = append(labels, k.Label)
		if !strings.HasPrefix(k.Label, "staff/D001/") {
			t.Errorf("label %q", k.Label)
		}
		cert, err := pki.ParseCertificate(k.Certificate)
		if err != nil {
			t.Fatal(err)
		}
		crl := h.Directory.CRL(k.Algorithm)
		report := pki.VerifyPath(pki.Options{Leaf: cert, Anchors: h.Trust.Anchors, At: testkit.Start, Purpose: pki.StaffSigning, CRLs: []*pki.CRL{crl.Parsed}})
		if report.Verdict != pki.Valid {
			t.Errorf("%s certificate: %+v", k.Algorithm, report)
		}
		if s := cert.Subject; s.CommonName != "张仲景" || s.OrganizationalUnit[0] != "中医内科" || s.SerialNumber != "D001" {
			t.Errorf("subject %v", s)
		}
		status, ok := h.Directory.Certificate(h.Serial(g, k.Algorithm))
		if !ok || status.Status != "good" || status.Profile != "staff" || status.Owner != "D001" || len(status.Chain) != 1 {
			t.Errorf("status %+v", status)
		}
		signer, key, err := h.Directory.ActiveSigner("D001", k.Algorithm)
		if err != nil || signer != g || key.Label != k.Label || !bytes.Equal(key.Certificate, k.Certificate) {
			t.Errorf("ActiveSigner(%s) = %v, %v, %v", k.Algorithm, signer, key, err)
		}
	}
	slices.Sort(labels)
	if got := h.Staff.Labels(); !slices.Equal(got, labels) {
		t.Errorf("keys in the machine %q, want %q", got, labels)
	}
	_, err = h.Directory.Enrol(t.Context(), "admin", enrolment())
	wants(t, "enrolled twice", err, problem.Exists)
	before := h.Directory.Signers()
	h.Restart()
	if after := h.Directory.Signers(); !reflect.DeepEqual(after, before) {
		t.Errorf("after a restart %+v, before %+v", after[0], before[0])
	}
	if !slices.Equal(h.Staff.Labels(), labels) {
		t.Error("a restart touched the keys")
	}
}

func TestEnrolRefuses(t *testing.T) {
	t.Parallel()
	h := testkit.New(t)
	size := h.Journal.Size()
	for name, spoil := range map[string]func(*account.Enrolment){
		"no id":             func(e *account.Enrolment) { e.ID = "" },
		"id with slash":     func(e *account.Enrolment) { e.ID = "a/b" },
		"id of 33":          func(e *account.Enrolment) { e.ID = strings.Repeat("a", 33) },
		"no name":           func(e *account.Enrolment) { e.Name = "" },
		"name of 129 bytes": func(e *account.Enrolment) { e.Name = strings.Repeat("名", 43) },
		"name of 65 letters": func(e *account.Enrolment) {
			e.Name = strings.Repeat("n", 65) // within 128 bytes, and more than a certificate takes
		},
		"department too long": func(e *account.Enrolment) { e.Department = strings.Repeat("科", 43) },
		"65 letters":          func(e *account.Enrolment) { e.Department = strings.Repeat("d", 65) },
		"department, turned":  func(e *account.Enrolment) { e.Department = "内\u2067科" },
		"department, blank":   func(e *account.Enrolment) { e.Department = "　" },
		"campus, bad UTF-8":   func(e *account.Enrolment) { e.Campus = "\xc3" },
		"unknown algorithm":   func(e *account.Enrolment) { e.Algorithms = []string{"SM9"} },
		"one twice":           func(e *account.Enrolment) { e.Algorithms = []string{"SM2", "SM2"} },
		"PIN too short":       func(e *account.Enrolment) { e.PIN = "12345" },
		"PIN of two":          func(e *account.Enrolment) { e.PIN = "华佗" }, // six bytes
		"PIN too long":        func(e *account.Enrolment) { e.PIN = strings.Repeat("1", 65) },
		"PIN, line end":       func(e *account.Enrolment) { e.PIN = "123456\n" },
		"PIN, bad UTF-8":      func(e *account.Enrolment) { e.PIN = "123456\xff" },
	} {
		e := enrolment()
		spoil(&e)
		_, err := h.Directory.Enrol(t.Context(), "admin", e)
		wants(t, name, err, problem.InvalidRequest)
	}
	h.Clock.State(ntp.Untrusted)
	_, err := h.Directory.Enrol(t.Context(), "admin", enrolment())
	wants(t, "without trusted time", err, problem.TimeUntrusted)
	if h.Journal.Size() != size || len(h.Staff.Labels()) != 0 {
		t.Errorf("a refusal left %d entries and the keys %q", h.Journal.Size()-size, h.Staff.Labels())
	}
}

// The longest texts that are taken go all the way: into the certificate, and later into the signing context.
func TestEnrolLongestTexts(t *testing.T) {
	t.Parallel()
	h := testkit.New(t)
	e := enrolment()
	e.Name, e.Department, e.Campus = strings.Repeat("名", 42), strings.Repeat("科", 42)+"ab", strings.Repeat("院", 21)+"a"
	g, err := h.Directory.Enrol(t.Context(), "admin", e)
	if err != nil {
		t.Fatal(err)
	}
	c := pki.SigningContext{Application: "his", Campus: e.Campus, RecordID: "00", Department: g.Department}
	if _, err := c.Marshal(); err != nil {
		t.Error(err)
	}
}

// A CA near its end gives certificates that end with it, instead of none.
func TestCertificateEndsWithCA(t *testing.T) {
	t.Parallel()
	h := testkit.New(t)
	h.Clock.Change(func(r *ntp.Reading) { r.Time = testkit.Start.AddDate(9, 6, 0) })
	h.Restart() // new CRLs
	g, err := h.Directory.Enrol(t.Context(), "admin", enrolment())
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range g.Keys {
		c, err := smx509.ParseCertificate(k.Certificate)
		if err != nil {
			t.Fatal(err)
		}
		if end := h.CAs[k.Algorithm].Certificate().NotAfter; !c.NotAfter.Equal(end) {
			t.Errorf("%s certificate ends %v, its CA %v", k.Algorithm, c.NotAfter, end)
		}
	}
}

// What the CA signed for an enrolment that did not come about is given account of: nothing else would know of it.
func TestEnrolDiscards(t *testing.T) {
	t.Parallel()
	for name, fail := range map[string]func(*testkit.House){
		"second key not made": func(h *testkit.House) {
			h.Staff.Before(failCall("GenerateKey", "/RSA-2048", &hsm.Error{Call: "C_GenerateKeyPair", RV: 0x32}))
		},
		"outcome not written": func(h *testkit.House) { h.Journal.FailKind("account.signer/outcome", 1, false, audit.ErrClosed) },
		"outcome unknown": func(h *testkit.House) {
			h.Journal.FailKind("account.signer/outcome", 1, false, audit.ErrOutcomeUnknown)
		},
		"answer lost": func(h *testkit.House) { h.Journal.FailKind("account.signer/outcome", 1, true, audit.ErrOutcomeUnknown) },
	} {
		h := testkit.New(t)
		discarded := 0
		h.Discarded = func(_ error, objects ...[]byte) {
			for _, o := range objects {
				discarded += len(uses.SignaturesIn(o))
			}
		}
		h.Restart()
		before := h.CA.Calls("Do")
		fail(h)
		if _, err := h.Directory.Enrol(t.Context(), "admin", enrolment()); err == nil {
			t.Fatalf("%s: enrolled", name)
		}
		h.Journal.Fault(nil)
		h.App("his", nil) // what is in doubt is settled before another change
		made := h.CA.Calls("Do") - before
		if _, enrolled := h.Directory.Signer("D001"); enrolled {
			made = 0 // they are in the journal
		}
		if discarded != made {
			t.Errorf("%s: %d signatures were given account of, want %d", name, discarded, made)
		}
	}
}

// Whatever step of an enrolment fails, and whether its effect is there or not: nobody is enrolled by halves, the next
// start clears keys away that nobody can use, and enrolling again works.
func TestEnrolCrashPoints(t *testing.T) {
	t.Parallel()
	gone := &hsm.Error{Call: "C_GenerateKeyPair", RV: 0x32}
	for name, tt := range map[string]struct {
		fail     func(*testkit.House)
		enrolled bool // found after a restart
		orphans  int  // keys left before it
	}{
		"intent not written": {func(h *testkit.House) {
			h.Journal.FailKind("account.signer/intent", 1, false, audit.ErrJournalUnwritable)
		}, false, 0},
		"intent, answer lost":    {func(h *testkit.House) { h.Journal.FailKind("account.signer/intent", 1, true, audit.ErrOutcomeUnknown) }, false, 0},
		"first key not made":     {func(h *testkit.House) { h.Staff.Before(failCall("GenerateKey", "/SM2", gone)) }, false, 0},
		"first key, answer lost": {func(h *testkit.House) { h.Staff.After(failCall("GenerateKey", "/SM2", hsm.ErrDeadline)) }, false, 1},
		"no certificate":         {func(h *testkit.House) { h.CA.Before(failCall("Do", "ca/SM2", gone)) }, false, 1},
		"second key not made":    {func(h *testkit.House) { h.Staff.Before(failCall("GenerateKey", "/RSA-2048", gone)) }, false, 1},
		"second key, no answer":  {func(h *testkit.House) { h.Staff.After(failCall("GenerateKey", "/RSA-2048", hsm.ErrDeadline)) }, false, 2},
		"outcome not written": {func(h *testkit.House) {
			h.Journal.FailKind("account.signer/outcome", 1, false, audit.ErrJournalUnwritable)
		}, false, 2},
		"outcome, answer lost": {func(h *testkit.House) { h.Journal.FailKind("account.signer/outcome", 1, true, audit.ErrOutcomeUnknown) }, true, 0},
		"outcome unknown": {func(h *testkit.House) {
			h.Journal.FailKind("account.signer/outcome", 1, false, audit.ErrOutcomeUnknown)
		}, false, 2},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, restart := range []bool{true, false} {
				h := testkit.New(t)
				other := h.Doctor("D000", "SM2")
				tt.fail(h)
				if _, err := h.Directory.Enrol(t.Context(), "admin", enrolment()); err == nil || problem.CodeOf(err) == problem.Internal {
					t.Fatalf("Enrol = %v, want a refusal", err)
				}
				if _, ok := h.Directory.Signer("D001"); ok {
					t.Error("enrolled in spite of the error")
				}
				h.Journal.Fault(nil)
				h.Staff.Before(nil)
				h.Staff.After(nil)
				h.CA.Before(nil)
				keep := 1
				if tt.enrolled {
					keep = 3
				}
				if n := len(h.Staff.Labels()); n != keep+tt.orphans {
					t.Errorf("%d keys after the failure, want %d", n, keep+tt.orphans)
				}
				if restart {
					h.Restart()
					if n := len(h.Staff.Labels()); n != keep {
						t.Errorf("keys after a restart: %q, want %d", h.Staff.Labels(), keep)
					}
					if _, ok := h.Directory.Signer("D001"); ok != tt.enrolled {
						t.Errorf("enrolled after a restart: %v, want %v", ok, tt.enrolled)
					}
				}
				// The same again, with or without a restart in between.
				_, err := h.Directory.Enrol(t.Context(), "admin", enrolment())
				if tt.enrolled {
					wants(t, "enrolling again", err, problem.Exists)
				} else if err != nil {
					t.Errorf("enrolling again: %v", err)
				}
				if n := len(h.Staff.Labels()); n != 3 {
					t.Errorf("keys at the end: %q, want those of two signers", h.Staff.Labels())
				}
				if _, _, err := h.Directory.ActiveSigner(other.ID, "SM2"); err != nil {
					t.Errorf("another signer's key: %v", err)
				}
				h.Restart()
				if n := len(h.Staff.Labels()); n != 3 {
					t.Errorf("keys after the last restart: %q", h.Staff.Labels())
				}
				if _, ok := h.Directory.Signer("D001"); !ok {
					t.Error("not enrolled at the end")
				}
			}
		})
	}
}

// A signer with one algorithm gets another; a failure at any point leaves him as he was, and it can be done again.
func TestAddSignerKey(t *testing.T) {
	t.Parallel()
	for name, fail := range map[string]func(*testkit.House){
		"nothing fails": func(*testkit.House) {},
		"intent not written": func(h *testkit.House) {
			h.Journal.FailKind("account.signer/intent", 1, false, audit.ErrJournalUnwritable)
		},
		"key, answer lost": func(h *testkit.House) { h.Staff.After(failCall("GenerateKey", "/RSA-2048", hsm.ErrDeadline)) },
		"no certificate":   func(h *testkit.House) { h.CA.Before(failCall("Do", "ca/RSA-2048", hsm.ErrDeadline)) },
		"outcome not written": func(h *testkit.House) {
			h.Journal.FailKind("account.signer/outcome", 1, false, audit.ErrJournalUnwritable)
		},
	} {
		for _, external := range []bool{false, true} {
			t.Run(fmt.Sprint(name, ", external ", external), func(t *testing.T) {
				t.Parallel()
				h := testkit.New(t)
				old := h.Doctor("D001", "SM2")
				fail(h)
				_, err := h.Directory.AddSignerKey(t.Context(), "admin", "D001", "RSA-2048", external)
				if failed := name != "nothing fails" && !(external && name == "no certificate"); failed != (err != nil) {
					t.Fatalf("AddSignerKey = %v", err)
				}
				h.Journal.Fault(nil)
				h.Staff.After(nil)
				h.CA.Before(nil)
				if err != nil {
					if g, _ := h.Directory.Signer("D001"); !reflect.DeepEqual(g, old) {
						t.Errorf("after the failure: %+v", g)
					}
					if _, err := h.Directory.AddSignerKey(t.Context(), "admin", "D001", "RSA-2048", external); err != nil {
						t.Fatalf("once more: %v", err)
					}
				}
				for _, restarted := range []bool{false, true} {
					if restarted {
						h.Restart()
					}
					g, _ := h.Directory.Signer("D001")
					if g.Version != 2 || len(g.Keys) != 2 || !reflect.DeepEqual(g.Keys[0], old.Keys[0]) || g.Keys[1].Algorithm != "RSA-2048" || g.PIN == nil {
						t.Errorf("restarted %v: %+v", restarted, g)
					}
					if n := len(h.Staff.Labels()); n != 2 {
						t.Errorf("restarted %v: keys %q", restarted, h.Staff.Labels())
					}
					_, _, err := h.Directory.ActiveSigner("D001", "RSA-2048")
					if external {
						wants(t, "a key without a certificate", err, problem.CertificateAwaited)
					} else if err != nil {
						t.Error(err)
					}
					if _, _, err := h.Directory.ActiveSigner("D001", "SM2"); err != nil {
						t.Error(err)
					}
				}
				_, err = h.Directory.AddSignerKey(t.Context(), "admin", "D001", "RSA-2048", external)
				wants(t, "a second key of one algorithm", err, problem.Exists)
				_, err = h.Directory.AddSignerKey(t.Context(), "admin", "D009", "SM2", external)
				wants(t, "nobody's key", err, problem.SignerUnknown)
				_, err = h.Directory.AddSignerKey(t.Context(), "admin", "D001", "DSA", external)
				wants(t, "an algorithm that there is not", err, problem.InvalidRequest)
			})
		}
	}
}

func failCall(call, labelEnds string, err error) func(string, string) error {
	return func(c, label string) error {
		if c == call && strings.HasSuffix(label, labelEnds) {
			return err
		}
		return nil
	}
}

// A start that cannot clear away keys fails, and says so; the next one does it.
func TestSettleNeedsTheMachine(t *testing.T) {
	t.Parallel()
	for name, call := range map[string]string{"listing": "Keys", "destroying": "DestroyKey"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := testkit.New(t)
			h.Journal.FailKind("account.signer/outcome", 1, false, audit.ErrJournalUnwritable)
			if _, err := h.Directory.Enrol(t.Context(), "admin", enrolment()); err == nil {
				t.Fatal("enrolled without the journal")
			}
			h.Staff.Before(func(c, _ string) error {
				if c == call {
					return &hsm.Error{Call: "C_" + c, RV: 0x32}
				}
				return nil
			})
			wants(t, "restart", h.TryRestart(), problem.HSMUnavailable)
			h.Staff.Before(nil)
			h.Restart()
			if n := len(h.Staff.Labels()); n != 0 {
				t.Errorf("keys left: %q", h.Staff.Labels())
			}
		})
	}
}

// A key that could be taken out of the machine is not a signer's.
func TestEnrolRefusesExtractableKey(t *testing.T) {
	t.Parallel()
	h := testkit.New(t)
	h.Staff.Spoil(func(i hsm.KeyInfo) hsm.KeyInfo { i.Extractable = true; return i })
	if _, err := h.Directory.Enrol(t.Context(), "admin", enrolment()); err == nil {
		t.Error("enrolled with an extractable key")
	}
}

func TestStopSigner(t *testing.T) {
	t.Parallel()
	h := testkit.New(t)
	h.Doctor("D001", "SM2")
	if g, err := h.Directory.StopSigner(t.Context(), "admin", "D001", true, "离职"); err != nil || !g.Stopped || g.Version != 2 {
		t.Fatalf("%+v, %v", g, err)
	}
	_, _, err := h.Directory.ActiveSigner("D001", "SM2")
	wants(t, "stopped", err, problem.SignerStopped)
	h.Restart()
	_, _, err = h.Directory.ActiveSigner("D001", "SM2")
	wants(t, "stopped, after a restart", err, problem.SignerStopped)
	if _, err := h.Directory.StopSigner(t.Context(), "admin", "D001", false, ""); err != nil {
		t.Fatal(err)
	}
	if _, _, err := h.Directory.ActiveSigner("D001", "SM2"); err != nil {
		t.Errorf("started: %v", err)
	}
	_, _, err = h.Directory.ActiveSigner("D001", "RSA-2048")
	wants(t, "a key that is not there", err, problem.KeyUnknown)
	_, _, err = h.Directory.ActiveSigner("D002", "SM2")
	wants(t, "nobody", err, problem.SignerUnknown)
	_, err = h.Directory.StopSigner(t.Context(), "admin", "D002", true, "")
	wants(t, "stopping nobody", err, problem.SignerUnknown)
	_, err = h.Directory.StopSigner(t.Context(), "admin", "D001", true, "a\nb")
	wants(t, "reason of two lines", err, problem.InvalidRequest)
}

func TestRevoke(t *testing.T) {
	t.Parallel()
	h := testkit.New(t)
	g := h.Doctor("D001")
	serial := h.Serial(g, "SM2")
	first := h.Directory.CRL("SM2")
	h.Clock.Advance(time.Hour)
	c, err := h.Directory.Revoke(t.Context(), "admin", serial, "keyCompromise")
	if err != nil || c.Status != "revoked" || c.Reason != "keyCompromise" || !c.RevokedAt.Equal(h.Clock.Now().Time.Truncate(time.Second)) {
		t.Fatalf("%+v, %v", c, err)
	}
	check := func(when string) {
		t.Helper()
		l := h.Directory.CRL("SM2")
		cert, _ := smx509.ParseCertificate(c.Certificate)
		entries := l.Parsed.Lookup(cert.SerialNumber)
		if l.Number != first.Number+1 || len(entries) != 1 || entries[0].Reason != pki.KeyCompromise || !entries[0].Date.Equal(c.RevokedAt) || l.Parsed.Number().Int64() != l.Number {
			t.Errorf("%s: list %d has %+v", when, l.Number, entries)
		}
		if other := h.Directory.CRL("RSA-2048"); other.Parsed.Len() != 0 {
			t.Errorf("%s: the other CA's list has %d", when, other.Parsed.Len())
		}
		if now, _ := h.Directory.Certificate(serial); now.Status != "revoked" {
			t.Errorf("%s: status %s", when, now.Status)
		}
		if now, _ := h.Directory.Certificate(h.Serial(g, "RSA-2048")); now.Status != "good" {
			t.Errorf("%s: the other certificate is %s", when, now.Status)
		}
	}
	check("at once")
	// Again: nothing is written twice, and the first reason stands.
	size := h.Journal.Size()
	if again, err := h.Directory.Revoke(t.Context(), "admin", serial, "superseded"); err != nil || again.Reason != "keyCompromise" {
		t.Errorf("revoked again: %+v, %v", again, err)
	}
	if n := h.Journal.Size(); n != size {
		t.Errorf("%d entries for what was done already", n-size)
	}
	h.Restart()
	check("after a restart")

	_, err = h.Directory.Revoke(t.Context(), "admin", "00ff", "superseded")
	wants(t, "unknown certificate", err, problem.NotFound)
	_, err = h.Directory.Revoke(t.Context(), "admin", serial, "boredom")
	wants(t, "unknown reason", err, problem.InvalidRequest)
	_, err = h.Directory.Revoke(t.Context(), "admin", pki.SerialHex(h.CAs["SM2"].Certificate().SerialNumber), "superseded")
	wants(t, "the CA's own", err, problem.Forbidden)
	h.Clock.State(ntp.Suspect)
	_, err = h.Directory.Revoke(t.Context(), "admin", h.Serial(g, "RSA-2048"), "superseded")
	wants(t, "without trusted time", err, problem.TimeUntrusted)
	wants(t, "a list without trusted time", h.Directory.PublishCRLs(t.Context(), "admin"), problem.TimeUntrusted)
}

// Between a revocation and its list everything can stop. The list is made good: by Revoke again, by the duty that
// refreshes lists, or by the next start.
func TestListFollowsRevocation(t *testing.T) {
	t.Parallel()
	for name, later := range map[string]func(*testkit.House, string) error{
		"revoked again": func(h *testkit.House, serial string) error {
			_, err := h.Directory.Revoke(t.Context(), "admin", serial, "superseded")
			return err
		},
		"duty": func(h *testkit.House, _ string) error {
			done, err := h.Directory.RefreshCRLs(t.Context())
			if err == nil && !done {
				err = errors.New("the duty saw nothing to do")
			}
			return err
		},
		"restart": func(h *testkit.House, _ string) error { return h.TryRestart() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := testkit.New(t)
			g := h.Doctor("D001", "SM2")
			serial := h.Serial(g, "SM2")
			h.CA.Before(failCall("Do", "ca/SM2", &hsm.Error{Call: "C_Sign", RV: 0x32}))
			_, err := h.Directory.Revoke(t.Context(), "admin", serial, "superseded")
			wants(t, "Revoke", err, problem.HSMUnavailable)
			if c, _ := h.Directory.Certificate(serial); c.Status != "revoked" {
				t.Errorf("status %s: a list that fails must not keep a certificate good", c.Status)
			}
			if n := h.Directory.CRL("RSA-2048").Number; n != 2 {
				t.Errorf("the other CA's list has number %d: it must not wait for this one", n)
			}
			h.CA.Before(nil)
			if err := later(h, serial); err != nil {
				t.Fatal(err)
			}
			if l := h.Directory.CRL("SM2"); l.Parsed.Len() != 1 {
				t.Errorf("list %d has %d certificates", l.Number, l.Parsed.Len())
			}
			if done, err := h.Directory.RefreshCRLs(t.Context()); done || err != nil {
				t.Errorf("the duty goes on making lists: %v, %v", done, err)
			}
		})
	}
}

func TestRefreshCRLs(t *testing.T) {
	t.Parallel()
	h := testkit.New(t)
	if l := h.Directory.CRL("SM2"); l == nil || l.Number != 1 || l.NextUpdate.Sub(l.ThisUpdate) != 7*24*time.Hour || l.ThisUpdate.After(testkit.Start) {
		t.Fatalf("first list %+v", l)
	}
	refresh := func(want bool) {
		t.Helper()
		if done, err := h.Directory.RefreshCRLs(t.Context()); done != want || err != nil {
			t.Errorf("RefreshCRLs = %v, %v, want %v", done, err, want)
		}
	}
	refresh(false)
	h.Clock.Advance(84 * time.Hour)
	refresh(true)
	if l := h.Directory.CRL("SM2"); l.Number != 2 {
		t.Errorf("number %d", l.Number)
	}
	h.Clock.Advance(84 * time.Hour)
	h.Clock.State(ntp.Untrusted)
	refresh(false)
	h.Clock.State(ntp.Holdover)
	refresh(true)
	// A number whose list may be in the journal is not given to another list.
	for _, landed := range []bool{true, false} {
		had := h.Directory.CRL("SM2").Number
		h.Journal.FailKind("ca.crl/outcome", 1, landed, audit.ErrOutcomeUnknown)
		if err := h.Directory.PublishCRLs(t.Context(), "admin"); err == nil {
			t.Error("a list in doubt was published")
		}
		h.Journal.Fault(nil)
		if err := h.Directory.PublishCRLs(t.Context(), "admin"); err != nil {
			t.Fatal(err)
		}
		seen := map[string]int{}
		err := h.Journal.State(t.Context(), func(r audit.Record) error {
			if r.Entry.Kind == "ca.crl/outcome" {
				seen[r.Entry.Object+" "+r.Entry.Text("number")]++
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		for list, n := range seen {
			if n != 1 {
				t.Errorf("list %s was made %d times", list, n)
			}
		}
		if now := h.Directory.CRL("SM2").Number; now <= had {
			t.Errorf("number %d after %d", now, had)
		}
	}
	h.Restart()
}

func TestCertificatesOfTheAppliance(t *testing.T) {
	t.Parallel()
	h := testkit.New(t)
	profiles := map[string]int{}
	for _, cert := range append(slices.Clone(h.Trust.Anchors), h.Stampers["SM2"].Chain()[0]) {
		c, ok := h.Directory.Certificate(pki.SerialHex(cert.SerialNumber))
		if !ok || c.Status != "good" {
			t.Errorf("%v: %+v", cert.Subject, c)
			continue
		}
		profiles[c.Profile]++
	}
	if profiles["ca"] != 2 || profiles["tsa"] != 1 {
		t.Errorf("profiles %v", profiles)
	}
	if err := h.Directory.AddKey(account.OwnKey{Owner: "tsa:x", Certificate: []byte("no certificate")}); err == nil {
		t.Error("a key with a certificate that does not parse was taken")
	}
	if _, ok := h.Directory.Certificate(""); ok {
		t.Error("a certificate without a number")
	}
	h.Doctor("D001", "SM2")
	if _, k, err := h.Directory.ActiveSigner("D001", "SM2"); err != nil || len(k.Chain) != 1 || !strings.HasPrefix(k.Path[1].Subject.CommonName, ca.RootName) {
		t.Errorf("chain of %+v, %v", k, err)
	}
}

// Replay refuses what is out of order or does not fit, rather than guess.
func TestReplayRefuses(t *testing.T) {
	t.Parallel()
	h := testkit.New(t)
	h.App("his", nil)
	h.Doctor("D001", "SM2")
	for name, tt := range map[string]struct{ kind, body string }{
		"application again":    {"account.application/outcome", `{"id":"his","version":1,"key_salt":"AAAAAAAAAAAAAAAAAAAAAA=="}`},
		"application skips":    {"account.application/outcome", `{"id":"his","version":3,"key_salt":"AAAAAAAAAAAAAAAAAAAAAA=="}`},
		"application, no salt": {"account.application/outcome", `{"id":"new","version":1}`},
		"signer again":         {"account.signer/outcome", `{"id":"D001","version":1}`},
		"signer begins at 2":   {"account.signer/outcome", `{"id":"D002","version":2}`},
		"signer, no JSON":      {"account.signer/outcome", `{`},
		"unknown certificate":  {"account.revocation/outcome", `{"serial":"0102"}`},
		"CRL, rubbish":         {"ca.crl/outcome", `{"algorithm":"SM2","number":9,"der":"AAAA"}`},
	} {
		err := h.Directory.Replay(t.Context(), &audit.Entry{Kind: tt.kind}, func(string) ([]byte, error) { return []byte(tt.body), nil })
		if err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	lost := errors.New("lost")
	if err := h.Directory.Replay(t.Context(), &audit.Entry{Kind: "account.signer/outcome"}, func(string) ([]byte, error) { return nil, lost }); !errors.Is(err, lost) {
		t.Errorf("a payload that is lost: %v", err)
	}
	if err := h.Directory.Replay(t.Context(), &audit.Entry{Kind: "time.state"}, nil); err != nil {
		t.Errorf("an entry that is not the directory's: %v", err)
	}
}

package account_test

import (
	"bytes"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"

	"yinjian/appliance/account"
	"yinjian/appliance/audit"
	"yinjian/appliance/evidence"
	"yinjian/appliance/internal/testkit"
	"yinjian/appliance/problem"
	"yinjian/hsm"
	"yinjian/ntp"
)

// wants ends with a fault unless err is a refusal of that code.
func wants(t *testing.T, what string, err error, code problem.Code) {
	t.Helper()
	if problem.CodeOf(err) != code {
		t.Errorf("%s: %v, want %s", what, err, code)
	}
}

func TestApplicationLife(t *testing.T) {
	t.Parallel()
	h := testkit.New(t)
	app, key, err := h.Directory.RegisterApplication(t.Context(), "admin", account.Application{
		ID: "his", Name: "医院信息系统", Campus: "滨海", Rights: []string{account.RightSign}, Consent: []evidence.Method{evidence.SignerPIN},
		Version: 7, Stopped: true, KeySalt: []byte("chosen by caller"), // not for the caller to set
	})
	if err != nil {
		t.Fatal(err)
	}
	if app.Version != 1 || app.Stopped || app.Stamp != account.StampRequired || app.ChangedBy != "admin" || !app.ChangedAt.Equal(testkit.Start) || bytes.Contains(app.KeySalt, []byte("caller")) {
		t.Errorf("registered as %+v", app)
	}
	if len(key) != 32 {
		t.Fatalf("key of %d bytes", len(key))
	}
	_, _, err = h.Directory.RegisterApplication(t.Context(), "admin", *app)
	wants(t, "registered twice", err, problem.Exists)
	_, other, err := h.Directory.RegisterApplication(t.Context(), "admin", account.Application{ID: "his2", Name: "a", Campus: "b"})
	if err != nil || bytes.Equal(other, key) {
		t.Errorf("second application: %v; the same key: %v", err, bytes.Equal(other, key))
	}
	stopped, err := h.Directory.StopApplication(t.Context(), "admin", "his", true, "合同到期")
	if err != nil || !stopped.Stopped || stopped.Version != 2 {
		t.Errorf("stopped: %+v, %v", stopped, err)
	}
	_, err = h.Directory.StopApplication(t.Context(), "admin", "none", true, "")
	wants(t, "stopping nobody", err, problem.NotFound)

	// A restart knows the same, and derives the same key.
	before := h.Directory.Applications()
	h.Restart()
	if after := h.Directory.Applications(); !reflect.DeepEqual(after, before) {
		t.Errorf("after a restart %+v, before %+v", after, before)
	}
	if _, again, _ := h.Directory.Application("his"); !bytes.Equal(again, key) {
		t.Error("the key changed over a restart")
	}
}

// An application's limits are part of its object in the journal. Objects that were written before there were limits have
// none, and an application without any is written as it was then.
func TestApplicationLimits(t *testing.T) {
	t.Parallel()
	h := testkit.New(t)
	app := h.App("his", nil)
	if app.Rate != 0 || app.Burst != 0 {
		t.Errorf("registered as %+v", app)
	}
	h.App("emr", func(a *account.Application) { a.Rate, a.Burst = 50, 70 })
	limited, err := h.Directory.LimitApplication(t.Context(), "admin", "his", account.Limits{Rate: 20, HSMRate: 5, HSMSessions: 2}, "试运行")
	if err != nil || limited.Rate != 20 || limited.Burst != 0 || limited.Version != 2 || limited.Stopped || !bytes.Equal(limited.KeySalt, app.KeySalt) {
		t.Errorf("limited: %+v, %v", limited, err)
	}
	if _, err := h.Directory.StopApplication(t.Context(), "admin", "his", true, ""); err != nil {
		t.Fatal(err)
	}
	for _, bad := range [][2]int{{-1, 0}, {0, -1}, {account.MaxRate + 1, 0}, {0, account.MaxBurst + 1}} {
		_, err = h.Directory.LimitApplication(t.Context(), "admin", "his", account.Limits{Rate: bad[0], Burst: bad[1]}, "")
		wants(t, fmt.Sprint(bad), err, problem.InvalidRequest)
	}
	_, err = h.Directory.LimitApplication(t.Context(), "admin", "none", account.Limits{Rate: 1, Burst: 1}, "")
	wants(t, "limiting nobody", err, problem.NotFound)
	h.Restart()
	for id, want := range map[string]account.Application{"his": {Version: 3, Stopped: true, Rate: 20}, "emr": {Version: 1, Rate: 50, Burst: 70}} {
		if a, _, _ := h.Directory.Application(id); a.Version != want.Version || a.Stopped != want.Stopped || a.Rate != want.Rate || a.Burst != want.Burst {
			t.Errorf("%s after a restart: %+v", id, a)
		}
	}
	var written []string
	if err := h.Journal.State(t.Context(), func(r audit.Record) error {
		if _, ok := r.Entry.Payload("object"); ok && strings.HasPrefix(r.Entry.Kind, "account.application") {
			b, err := h.Journal.Payload(t.Context(), &r.Entry, "object")
			written = append(written, r.Entry.Text("act")+" "+string(b))
			return err
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	for i, want := range []struct {
		act  string
		rate bool
	}{{"register", false}, {"register", true}, {"limit", true}, {"stop", true}} {
		if i >= len(written) || !strings.HasPrefix(written[i], want.act+" ") || strings.Contains(written[i], `"rate"`) != want.rate {
			t.Errorf("object %d of %d: want %+v in %q", i, len(written), want, written)
		}
	}
}

// The key depends on the secret in the cipher machine, on the salt and on the application's name.
func TestApplicationKeyIsDerived(t *testing.T) {
	t.Parallel()
	h := testkit.New(t)
	h.App("his", nil)
	app, key, _ := h.Directory.Application("his")
	want, err := h.Log.MAC(t.Context(), account.AppKeyLabel, append([]byte("yinjian/application-key/v1\x00"), append(bytes.Clone(app.KeySalt), "his"...)...))
	if err != nil || !bytes.Equal(key, want) {
		t.Errorf("key %x, want %x (%v)", key, want, err)
	}
}

func TestRegisterRefuses(t *testing.T) {
	t.Parallel()
	h := testkit.New(t)
	size := h.Journal.Size()
	for name, spoil := range map[string]func(*account.Application){
		"no id":           func(a *account.Application) { a.ID = "" },
		"id of one":       func(a *account.Application) { a.ID = "a" },
		"id in capitals":  func(a *account.Application) { a.ID = "HIS" },
		"id with slash":   func(a *account.Application) { a.ID = "his/a" },
		"id with NUL":     func(a *account.Application) { a.ID = "his\x00" },
		"id of 33":        func(a *account.Application) { a.ID = strings.Repeat("a", 33) },
		"id, line end":    func(a *account.Application) { a.ID = "his\n" },
		"no name":         func(a *account.Application) { a.Name = "" },
		"name turned":     func(a *account.Application) { a.Name = "a\u202eb" },
		"long name":       func(a *account.Application) { a.Name = strings.Repeat("名", 43) },
		"no campus":       func(a *account.Application) { a.Campus = "" },
		"campus too long": func(a *account.Application) { a.Campus = strings.Repeat("院", 22) }, // the signing context takes 64 bytes
		"campus, C1":      func(a *account.Application) { a.Campus = "a\u0085" },
		"unknown right":   func(a *account.Application) { a.Rights = []string{"root"} },
		"unknown stamp":   func(a *account.Application) { a.Stamp = "maybe" },
		"unknown method":  func(a *account.Application) { a.Consent = []evidence.Method{"sms"} },
		"no method":       func(a *account.Application) { a.Consent = nil },
		"negative rate":   func(a *account.Application) { a.Rate = -1 },
		"rate too high":   func(a *account.Application) { a.Rate = account.MaxRate + 1 },
		"burst too large": func(a *account.Application) { a.Burst = account.MaxBurst + 1 },
	} {
		a := account.Application{ID: "his", Name: "名", Campus: strings.Repeat("院", 21), Rights: []string{account.RightSign}, Consent: []evidence.Method{evidence.AppAsserted}}
		spoil(&a)
		_, _, err := h.Directory.RegisterApplication(t.Context(), "admin", a)
		wants(t, name, err, problem.InvalidRequest)
	}
	h.App("emr", nil)
	_, err := h.Directory.StopApplication(t.Context(), "admin", "emr", true, strings.Repeat("x", 513))
	wants(t, "long reason", err, problem.InvalidRequest)
	_, err = h.Directory.StopApplication(t.Context(), strings.Repeat("x", 300), "emr", true, "")
	wants(t, "an actor longer than the journal takes", err, problem.InvalidRequest)
	if n := h.Journal.Size(); n != size+2 {
		t.Errorf("%d entries were written by refusals", n-size-2)
	}
}

// A cipher machine that is away keeps an application from being registered, leaves nothing half done, and does not keep
// anybody from stopping one.
func TestApplicationWithoutCipherMachine(t *testing.T) {
	t.Parallel()
	h := testkit.New(t)
	h.App("his", nil)
	h.Log.Before(func(call, label string) error {
		if label == account.AppKeyLabel {
			return &hsm.Error{Call: "C_SignInit", RV: 0x32}
		}
		return nil
	})
	a := account.Application{ID: "emr", Name: "a", Campus: "b"}
	_, _, err := h.Directory.RegisterApplication(t.Context(), "admin", a)
	wants(t, "register", err, problem.HSMUnavailable)
	if _, err := h.Directory.StopApplication(t.Context(), "admin", "his", true, ""); err != nil {
		t.Errorf("stop: %v", err)
	}
	h.Log.Before(nil)
	if _, _, err := h.Directory.RegisterApplication(t.Context(), "admin", a); err != nil {
		t.Errorf("register, later: %v", err)
	}
	h.Restart()
	if app, _, ok := h.Directory.Application("his"); !ok || !app.Stopped {
		t.Errorf("after a restart his is %+v", app)
	}
}

// What the journal answers with an error may be in it or not. Either way the next change finds out, and the directory
// can be replayed: a version that is given twice would keep the appliance from ever starting again.
func TestOutcomeInDoubt(t *testing.T) {
	t.Parallel()
	for name, landed := range map[string]bool{"written, answer lost": true, "not written": false} {
		for kind, journalErr := range map[string]error{"unknown": audit.ErrOutcomeUnknown, "failed": audit.ErrJournalFailed, "unwritable": audit.ErrJournalUnwritable} {
			t.Run(name+"/"+kind, func(t *testing.T) {
				t.Parallel()
				h := testkit.New(t)
				h.App("his", nil)
				h.Doctor("D001", "SM2")
				h.Journal.FailKind("account.application/outcome", 1, landed, journalErr)
				_, err := h.Directory.StopApplication(t.Context(), "admin", "his", true, "")
				if code := problem.CodeOf(err); code != problem.Timeout && code != problem.JournalUnwritable {
					t.Errorf("StopApplication = %v", err)
				}
				// While the doubt cannot be resolved nothing changes.
				h.Journal.FailKind("account.withdrawn/outcome", -1, false, audit.ErrOutcomeUnknown)
				_, err = h.Directory.StopSigner(t.Context(), "admin", "D001", true, "")
				wants(t, "change in doubt", err, problem.Timeout)
				h.Journal.Fault(nil)
				if _, err = h.Directory.StopSigner(t.Context(), "admin", "D001", true, ""); err != nil {
					t.Fatal(err)
				}
				app, _, _ := h.Directory.Application("his")
				if app.Stopped != landed {
					t.Errorf("his is stopped: %v, the entry is there: %v", app.Stopped, landed)
				}
				if _, err := h.Directory.StopApplication(t.Context(), "admin", "his", true, ""); err != nil {
					t.Fatal(err)
				}
				want, signers := h.Directory.Applications(), h.Directory.Signers()
				h.Restart()
				if got := h.Directory.Applications(); !reflect.DeepEqual(got, want) || !got[0].Stopped {
					t.Errorf("after a restart %+v, before %+v", got[0], want[0])
				}
				if got := h.Directory.Signers(); !reflect.DeepEqual(got, signers) {
					t.Errorf("signers differ after a restart")
				}
			})
		}
	}
}

// A restart in the middle of a doubt reads the truth from the journal.
func TestRestartInDoubt(t *testing.T) {
	t.Parallel()
	for name, landed := range map[string]bool{"written": true, "not written": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := testkit.New(t)
			h.Journal.FailKind("account.application/outcome", 1, landed, audit.ErrOutcomeUnknown)
			a := account.Application{ID: "his", Name: "a", Campus: "b"}
			_, _, err := h.Directory.RegisterApplication(t.Context(), "admin", a)
			wants(t, "register", err, problem.Timeout)
			if _, _, ok := h.Directory.Application("his"); ok {
				t.Error("the directory believes what is in doubt")
			}
			h.Restart()
			_, key, ok := h.Directory.Application("his")
			if ok != landed || ok && len(key) != 32 {
				t.Errorf("after a restart registered: %v, key of %d bytes; want %v", ok, len(key), landed)
			}
			h.Restart() // what settled the intent replays too
		})
	}
}

func TestChangesNeedTheJournal(t *testing.T) {
	t.Parallel()
	h := testkit.New(t)
	app := h.App("his", nil)
	h.Journal.Fault(func(audit.Draft) (bool, error) { return false, audit.ErrJournalUnwritable })
	_, _, err := h.Directory.RegisterApplication(t.Context(), "admin", account.Application{ID: "emr", Name: "a", Campus: "b"})
	wants(t, "register", err, problem.JournalUnwritable)
	_, err = h.Directory.StopApplication(t.Context(), "admin", "his", true, "")
	wants(t, "stop", err, problem.JournalUnwritable)
	if !errors.Is(err, audit.ErrJournalUnwritable) {
		t.Errorf("the cause is lost: %v", err)
	}
	if now, _, _ := h.Directory.Application("his"); now != app {
		t.Errorf("changed without a record: %+v", now)
	}
}

// A change made while time is not trusted is a change; its entry says how little the time is worth.
func TestStopWithoutTime(t *testing.T) {
	t.Parallel()
	h := testkit.New(t)
	h.App("his", nil)
	h.Doctor("D001", "SM2")
	h.Clock.State(ntp.Suspect)
	if _, err := h.Directory.StopApplication(t.Context(), "admin", "his", true, ""); err != nil {
		t.Error(err)
	}
	if _, err := h.Directory.StopSigner(t.Context(), "admin", "D001", true, ""); err != nil {
		t.Error(err)
	}
}

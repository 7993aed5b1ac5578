package account_test

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"yinjian/appliance/account"
	"yinjian/appliance/audit"
	"yinjian/appliance/evidence"
	"yinjian/appliance/internal/testkit"
	"yinjian/appliance/problem"
	"yinjian/hsm"
	"yinjian/ntp"
)

func digest(i int) []byte { return testkit.Digest("SM2", fmt.Append(nil, i)) }

func bound(i int) evidence.Digest {
	return evidence.Digest{Algorithm: "SM3", Value: hex.EncodeToString(digest(i))}
}

// A ward is a house with an application and a doctor.
type ward struct {
	*testkit.House
	app    *account.Application
	doctor *account.Signer
}

func newWard(t *testing.T) *ward {
	h := testkit.New(t)
	return &ward{h, h.App("his", nil), h.Doctor("D001", "SM2")}
}

func (w *ward) guess(t *testing.T, pin string) error {
	_, err := w.Directory.Authorize(t.Context(), w.app, account.GrantRequest{Signer: "D001", PIN: pin, Count: 1, Seconds: 60})
	return err
}

func (w *ward) reserve(t *testing.T, id string, d evidence.Digest) (*account.Reservation, error) {
	return w.Directory.Reserve(t.Context(), w.app, w.doctor, d, id, "", "")
}

func TestOneTime(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	g := w.Grant(w.app, account.GrantRequest{Signer: "D001", Digests: [][]byte{digest(1), digest(2)}})
	if g.Method != evidence.SignerPIN || g.Remaining != 2 || g.Signer != "D001" || !g.NotAfter.Equal(testkit.Start.Add(10*time.Minute)) {
		t.Errorf("grant %+v", g)
	}
	_, err := w.reserve(t, g.ID, bound(3))
	wants(t, "another document", err, problem.AuthorizationBad)
	// The same 32 bytes as the digest of something else by another algorithm.
	_, err = w.reserve(t, g.ID, evidence.Digest{Algorithm: "SHA-256", Value: bound(1).Value})
	wants(t, "another algorithm", err, problem.AuthorizationBad)
	r, err := w.reserve(t, g.ID, bound(1))
	if err != nil {
		t.Fatal(err)
	}
	a, err := evidence.ParseAuthorization(r.Stored)
	if err != nil || a.DigestAlgorithm != "SM3" || a.ID != g.ID || a.Subject != "D001" || a.Application != "his" || a.Level != 2 || len(a.Digests) != 2 || strings.Contains(string(r.Stored), testkit.PIN) {
		t.Errorf("stored %s, %v", r.Stored, err)
	}
	_, err = w.reserve(t, g.ID, bound(1))
	wants(t, "while it is reserved", err, problem.AuthorizationSpent)
	r.Release()
	r.Release() // does nothing
	if r, err = w.reserve(t, g.ID, bound(1)); err != nil {
		t.Fatalf("given back: %v", err)
	}
	r.Keep()
	r.Release() // too late
	_, err = w.reserve(t, g.ID, bound(1))
	wants(t, "used", err, problem.AuthorizationSpent)
	if r, err = w.reserve(t, g.ID, bound(2)); err != nil {
		t.Fatalf("the other document: %v", err)
	}
	r.Keep()
	for _, d := range []evidence.Digest{bound(1), bound(2)} {
		_, err = w.reserve(t, g.ID, d)
		wants(t, "all used", err, problem.AuthorizationSpent)
	}
	// Used up or not, it tells a stranger nothing.
	_, err = w.Directory.Reserve(t.Context(), w.App("emr", nil), w.doctor, bound(1), g.ID, "", "")
	wants(t, "a stranger", err, problem.AuthorizationBad)
}

func TestActivation(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	g := w.Grant(w.app, account.GrantRequest{Signer: "D001", Count: 3, Seconds: 60})
	var kept []*account.Reservation
	for i := range 3 {
		r, err := w.reserve(t, g.ID, bound(i))
		if err != nil {
			t.Fatal(err)
		}
		kept = append(kept, r)
	}
	_, err := w.reserve(t, g.ID, bound(9))
	wants(t, "one too many", err, problem.AuthorizationSpent)
	kept[1].Release()
	r, err := w.reserve(t, g.ID, bound(9))
	if err != nil {
		t.Fatalf("after one was given back: %v", err)
	}
	r.Keep()
	kept[0].Keep()
	kept[2].Keep()
	_, err = w.reserve(t, g.ID, bound(9))
	wants(t, "used up", err, problem.AuthorizationSpent)

	g = w.Grant(w.app, account.GrantRequest{Signer: "D001", Count: 500, Seconds: 60})
	w.Clock.Advance(time.Minute)
	if r, err := w.reserve(t, g.ID, bound(1)); err != nil {
		t.Errorf("at its last moment: %v", err)
	} else {
		r.Keep()
	}
	w.Clock.Advance(1)
	_, err = w.reserve(t, g.ID, bound(1))
	wants(t, "ended", err, problem.AuthorizationBad)
}

// Uses taken in parallel are never more than were granted, given back or not.
func TestReserveInParallel(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	g := w.Grant(w.app, account.GrantRequest{Signer: "D001", Count: 100, Seconds: 60})
	one := w.Grant(w.app, account.GrantRequest{Signer: "D001", Digests: [][]byte{digest(1)}})
	var kept, keptOne atomic.Int64
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			for j := range 100 {
				if r, err := w.reserve(t, g.ID, bound(j)); err == nil {
					if (i+j)%3 == 0 {
						r.Release()
					} else {
						r.Keep()
						kept.Add(1)
					}
				}
				if r, err := w.reserve(t, one.ID, bound(1)); err == nil {
					if j < 5 {
						r.Release()
					} else {
						r.Keep()
						keptOne.Add(1)
					}
				}
			}
		})
	}
	all.Wait()
	if kept.Load() != 100 || keptOne.Load() != 1 {
		t.Errorf("%d uses of 100 and %d of 1 were kept", kept.Load(), keptOne.Load())
	}
}

func TestAuthorizeRefuses(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	if _, err := w.Directory.Enrol(t.Context(), "admin", account.Enrolment{ID: "D002", Name: "扁鹊", Department: "外科", Campus: "本部", Algorithms: []string{"SM2"}}); err != nil {
		t.Fatal(err)
	}
	w.Doctor("D003", "SM2")
	if _, err := w.Directory.StopSigner(t.Context(), "admin", "D003", true, ""); err != nil {
		t.Fatal(err)
	}
	many := make([][]byte, 501)
	for i := range many {
		many[i] = digest(i)
	}
	size, macs := w.Journal.Size(), w.Log.CallsOn("Do", account.PINKeyLabel)
	for name, tt := range map[string]struct {
		spoil func(*account.GrantRequest)
		want  problem.Code
	}{
		"nobody":              {func(q *account.GrantRequest) { q.Signer = "D009" }, problem.SignerUnknown},
		"no signer":           {func(q *account.GrantRequest) { q.Signer = "" }, problem.SignerUnknown},
		"a signer's path":     {func(q *account.GrantRequest) { q.Signer = "../D001" }, problem.SignerUnknown},
		"no PIN set":          {func(q *account.GrantRequest) { q.Signer = "D002" }, problem.ConsentInsufficient},
		"stopped":             {func(q *account.GrantRequest) { q.Signer = "D003" }, problem.SignerStopped},
		"no PIN":              {func(q *account.GrantRequest) { q.PIN = "" }, problem.InvalidRequest},
		"long PIN":            {func(q *account.GrantRequest) { q.PIN = strings.Repeat("1", 65) }, problem.InvalidRequest},
		"neither":             {func(q *account.GrantRequest) { q.Count, q.Seconds = 0, 0 }, problem.InvalidRequest},
		"both":                {func(q *account.GrantRequest) { q.Digests = many[:1] }, problem.InvalidRequest},
		"count too great":     {func(q *account.GrantRequest) { q.Count = 501 }, problem.InvalidRequest},
		"count negative":      {func(q *account.GrantRequest) { q.Count = -1 }, problem.InvalidRequest},
		"too long":            {func(q *account.GrantRequest) { q.Seconds = 14401 }, problem.InvalidRequest},
		"no time":             {func(q *account.GrantRequest) { q.Seconds = 0 }, problem.InvalidRequest},
		"digests and seconds": {func(q *account.GrantRequest) { q.Digests, q.Count = many[:1], 0 }, problem.InvalidRequest},
		"too many digests":    {func(q *account.GrantRequest) { q.Digests, q.Count, q.Seconds = many, 0, 0 }, problem.InvalidRequest},
		"short digest":        {func(q *account.GrantRequest) { q.Digests, q.Count, q.Seconds = [][]byte{{1}}, 0, 0 }, problem.InvalidRequest},
		"digests, unknown algorithm": {func(q *account.GrantRequest) {
			q.Digests, q.Count, q.Seconds, q.DigestAlgorithm = many[:1], 0, 0, "sm3"
		}, problem.InvalidRequest},
		"algorithm, no digests": {func(q *account.GrantRequest) { q.DigestAlgorithm = "SM3" }, problem.InvalidRequest},
		"a digest twice":        {func(q *account.GrantRequest) { q.Digests, q.Count, q.Seconds = [][]byte{digest(1), digest(1)}, 0, 0 }, problem.InvalidRequest},
	} {
		q := account.GrantRequest{Signer: "D001", PIN: testkit.PIN, Count: 1, Seconds: 60}
		tt.spoil(&q)
		_, err := w.Directory.Authorize(t.Context(), w.app, q)
		wants(t, name, err, tt.want)
	}
	q := account.GrantRequest{Signer: "D001", PIN: testkit.PIN, Count: 1, Seconds: 60}
	for name, tt := range map[string]struct {
		spoil func(*account.Application)
		want  problem.Code
	}{
		"may not sign":        {func(a *account.Application) { a.Rights = nil }, problem.Forbidden},
		"stopped application": {func(a *account.Application) { a.Stopped = true }, problem.ApplicationStopped},
		"policy without PIN":  {func(a *account.Application) { a.Consent = []evidence.Method{evidence.AppAsserted} }, problem.ConsentInsufficient},
	} {
		a := *w.app
		tt.spoil(&a)
		_, err := w.Directory.Authorize(t.Context(), &a, q)
		wants(t, name, err, tt.want)
	}
	for _, s := range []ntp.State{ntp.Cold, ntp.Untrusted, ntp.Suspect} {
		w.Clock.State(s)
		_, err := w.Directory.Authorize(t.Context(), w.app, q)
		wants(t, "time "+string(s), err, problem.TimeUntrusted)
	}
	if w.Journal.Size() != size || w.Log.CallsOn("Do", account.PINKeyLabel) != macs {
		t.Errorf("refusals made %d entries and checked %d PINs", w.Journal.Size()-size, w.Log.CallsOn("Do", account.PINKeyLabel)-macs)
	}
	w.Clock.State(ntp.Trusted)
	many = many[:500]
	if g := w.Grant(w.app, account.GrantRequest{Signer: "D001", Digests: many}); g.Remaining != 500 {
		t.Errorf("500 digests: %+v", g)
	}
	if n := w.Log.CallsOn("Do", account.PINKeyLabel) - macs; n != 1 {
		t.Errorf("a grant checked %d PINs", n)
	}
}

func TestReserveRefuses(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	other := w.Doctor("D002", "SM2")
	g := w.Grant(w.app, account.GrantRequest{Signer: "D001", Count: 5, Seconds: 60})
	for name, tt := range map[string]struct {
		signer     *account.Signer
		id         string
		method     evidence.Method
		assertion  string
		restricted []evidence.Method
		want       problem.Code
	}{
		"nothing":                {want: problem.InvalidRequest},
		"unknown id":             {id: strings.Repeat("0", 32), want: problem.AuthorizationBad},
		"another signer":         {signer: other, id: g.ID, want: problem.AuthorizationBad},
		"id and assertion":       {id: g.ID, method: evidence.AppAsserted, assertion: "x", want: problem.InvalidRequest},
		"id and words":           {id: g.ID, assertion: "x", want: problem.InvalidRequest},
		"PIN without id":         {method: evidence.SignerPIN, want: problem.InvalidRequest},
		"unknown method":         {method: "sms", want: problem.InvalidRequest},
		"no words":               {method: evidence.AppAsserted, want: problem.InvalidRequest},
		"many words":             {method: evidence.AppAsserted, assertion: strings.Repeat("话", 171), want: problem.InvalidRequest},
		"words that turn":        {method: evidence.AppAsserted, assertion: "同意\u202e", want: problem.InvalidRequest},
		"words, bad UTF-8":       {method: evidence.AppAsserted, assertion: "\xff", want: problem.InvalidRequest},
		"policy: PIN only":       {method: evidence.AppAsserted, assertion: "x", restricted: []evidence.Method{evidence.SignerPIN}, want: problem.ConsentInsufficient},
		"policy: assertion only": {id: g.ID, restricted: []evidence.Method{evidence.AppAsserted}, want: problem.ConsentInsufficient},
		"policy: nothing":        {method: evidence.AppAsserted, assertion: "x", restricted: []evidence.Method{}, want: problem.ConsentInsufficient},
	} {
		app, signer := *w.app, w.doctor
		if tt.signer != nil {
			signer = tt.signer
		}
		if tt.restricted != nil {
			app.Consent = tt.restricted
		}
		_, err := w.Directory.Reserve(t.Context(), &app, signer, bound(1), tt.id, tt.method, tt.assertion)
		wants(t, name, err, tt.want)
	}
	// None of the refusals used anything up.
	for range 5 {
		if _, err := w.reserve(t, g.ID, bound(1)); err != nil {
			t.Fatal(err)
		}
	}
	w.Clock.State(ntp.Suspect)
	_, err := w.Directory.Reserve(t.Context(), w.app, w.doctor, bound(1), "", evidence.AppAsserted, "x")
	wants(t, "without trusted time", err, problem.TimeUntrusted)
}

func TestAssertion(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	words := strings.Repeat("话", 170) + "<>" // 512 bytes, and marks that JSON escapes
	r, err := w.Directory.Reserve(t.Context(), w.app, w.doctor, bound(1), "", evidence.AppAsserted, words)
	if err != nil {
		t.Fatal(err)
	}
	a, err := evidence.ParseAuthorization(r.Stored)
	if err != nil || a.Proof != words || a.Level != 1 || len(a.Digests) != 1 || a.Digests[0] != bound(1).Value || a.DigestAlgorithm != "SM3" || a.Count != 0 {
		t.Errorf("%+v, %v", a, err)
	}
	r.Release()
	r.Keep()
	_, err = w.reserve(t, a.ID, bound(1))
	wants(t, "an assertion's id", err, problem.AuthorizationBad)
}

func TestPINCount(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	wrong := func(left int) {
		t.Helper()
		err := w.guess(t, "000000")
		var p *problem.Problem
		if !errors.As(err, &p) || p.Code != problem.PINWrong || p.TriesLeft != left {
			t.Errorf("%v, want %d tries left", err, left)
		}
	}
	wrong(4)
	wrong(3)
	w.Restart() // the count survives
	wrong(2)
	if err := w.guess(t, testkit.PIN); err != nil { // and a success ends it
		t.Fatal(err)
	}
	wrong(4)
	if err := w.guess(t, testkit.PIN); err != nil {
		t.Fatal(err)
	}
	w.Restart() // also when it is replayed
	wrong(4)
	wrong(3)
	wrong(2)
	wrong(1)
	wants(t, "the last try", w.guess(t, "000000"), problem.PINLocked)
	size := w.Journal.Size()
	wants(t, "locked, right PIN", w.guess(t, testkit.PIN), problem.PINLocked)
	wants(t, "locked, wrong PIN", w.guess(t, "000000"), problem.PINLocked)
	if w.Journal.Size() != size {
		t.Error("a locked PIN goes on filling the journal")
	}
	w.Restart()
	wants(t, "locked, after a restart", w.guess(t, testkit.PIN), problem.PINLocked)
	// Another signer is not concerned; a new PIN opens.
	w.Doctor("D002", "SM2")
	w.Grant(w.app, account.GrantRequest{Signer: "D002", Count: 1, Seconds: 1})
	if _, err := w.Directory.SetPIN(t.Context(), "admin", "D001", "", "新的PIN12"); err != nil {
		t.Fatal(err)
	}
	wants(t, "the old PIN", w.guess(t, testkit.PIN), problem.PINWrong)
	if err := w.guess(t, "新的PIN12"); err != nil {
		t.Errorf("the new PIN: %v", err)
	}
	w.Restart()
	if err := w.guess(t, "新的PIN12"); err != nil {
		t.Errorf("the new PIN after a restart: %v", err)
	}
	_, err := w.Directory.SetPIN(t.Context(), "admin", "D001", "", "短")
	wants(t, "a short PIN", err, problem.InvalidRequest)
	_, err = w.Directory.SetPIN(t.Context(), "admin", "D009", "", "123456")
	wants(t, "nobody's PIN", err, problem.SignerUnknown)
}

// One application locks doctors out of itself alone; four together lock one everywhere. All of it outlasts a restart.
func TestPINCountByApplication(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	apps := []*account.Application{w.app, w.App("emr", nil), w.App("lis", nil), w.App("pacs", nil), w.App("anaes", nil)}
	try := func(app *account.Application, pin string) error {
		_, err := w.Directory.Authorize(t.Context(), app, account.GrantRequest{Signer: "D001", PIN: pin, Count: 1, Seconds: 60})
		return err
	}
	lock := func(app *account.Application) {
		t.Helper()
		for left := account.MaxPINTries - 1; left > 0; left-- {
			wants(t, app.ID, try(app, "000000"), problem.PINWrong)
		}
		wants(t, app.ID, try(app, "000000"), problem.PINLocked)
	}
	view := func(want ...string) {
		t.Helper()
		g, _ := w.Directory.Signer("D001")
		if v := w.Directory.View(g); !slices.Equal(v.PINLockedFor, want) || v.PINLocked != (len(want) > 0) {
			t.Errorf("locked %v for %q, want %q", v.PINLocked, v.PINLockedFor, want)
		}
	}
	view()
	lock(apps[0])
	view("his")
	err := try(apps[0], testkit.PIN)
	if wants(t, "locked", err, problem.PINLocked); err != nil && !strings.Contains(err.Error(), "for this application") {
		t.Errorf("does not say that others are open: %v", err)
	}
	if err := try(apps[1], testkit.PIN); err != nil {
		t.Fatalf("another application: %v", err)
	}
	w.Restart()
	view("his")
	wants(t, "locked, after a restart", try(apps[0], testkit.PIN), problem.PINLocked)
	// A right PIN ends the count of the application that sent it, and no other's; also when it is replayed.
	for range account.MaxPINTries - 1 {
		wants(t, "emr", try(apps[1], "000000"), problem.PINWrong)
		wants(t, "lis", try(apps[2], "000000"), problem.PINWrong)
	}
	if err := try(apps[1], testkit.PIN); err != nil {
		t.Fatal(err)
	}
	w.Restart()
	wants(t, "emr, counted anew", try(apps[1], "000000"), problem.PINWrong)
	wants(t, "lis, its fifth", try(apps[2], "000000"), problem.PINLocked)
	if err := try(apps[1], testkit.PIN); err != nil {
		t.Fatal(err)
	}
	view("his", "lis")
	lock(apps[1])
	// Nineteen are none too many; the twentieth locks for all, though it is the first that its application sends.
	for left := 4; left > 0; left-- {
		var p *problem.Problem
		if err := try(apps[3], "000000"); !errors.As(err, &p) || p.TriesLeft != left {
			t.Errorf("pacs: %v, want %d left", err, left)
		}
	}
	var p *problem.Problem
	if err := try(apps[4], testkit.PIN); err != nil {
		t.Errorf("nineteen wrong ones lock: %v", err)
	}
	err = try(apps[4], "000000")
	if !errors.As(err, &p) || p.Code != problem.PINLocked || !strings.Contains(p.Detail, "every application") {
		t.Errorf("the twentieth: %v", err)
	}
	for range 2 {
		size := w.Journal.Size()
		for _, app := range append(apps, w.App(fmt.Sprint("new-", size), nil)) {
			if err := try(app, testkit.PIN); problem.CodeOf(err) != problem.PINLocked || !strings.Contains(err.Error(), "every application") {
				t.Errorf("%s: %v", app.ID, err)
			}
		}
		view("*")
		w.Restart()
	}
	// Another signer is not concerned; a new PIN opens all.
	w.Doctor("D002", "SM2")
	w.Grant(w.app, account.GrantRequest{Signer: "D002", Count: 1, Seconds: 1})
	if _, err := w.Directory.SetPIN(t.Context(), "admin", "D001", "", "another-pin"); err != nil {
		t.Fatal(err)
	}
	view()
	w.Restart()
	for _, app := range apps {
		if err := try(app, "another-pin"); err != nil {
			t.Errorf("%s, with the new PIN: %v", app.ID, err)
		}
	}
}

// What is shown of a signer does not help to find the PIN.
func TestView(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	v := w.Directory.View(w.doctor)
	shown, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	all, err := json.Marshal(w.doctor)
	if err != nil {
		t.Fatal(err)
	}
	var got, want map[string]any
	if err := errors.Join(json.Unmarshal(shown, &got), json.Unmarshal(all, &want)); err != nil {
		t.Fatal(err)
	}
	delete(want, "pin")
	want["has_pin"], want["pin_locked"] = true, false
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	none := *w.doctor
	none.PIN = nil
	if w.Directory.View(&none).HasPIN {
		t.Error("a PIN that is not there")
	}
}

// Guesses in parallel get no more answers than the tries there are.
func TestPINInParallel(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	var wrong, locked atomic.Int64
	var all sync.WaitGroup
	for range 20 {
		all.Go(func() {
			switch err := w.guess(t, "000000"); problem.CodeOf(err) {
			case problem.PINWrong:
				wrong.Add(1)
			case problem.PINLocked:
				locked.Add(1)
			default:
				t.Errorf("guess: %v", err)
			}
		})
	}
	all.Wait()
	if wrong.Load() != account.MaxPINTries-1 || locked.Load() != 20-(account.MaxPINTries-1) {
		t.Errorf("%d wrong, %d locked", wrong.Load(), locked.Load())
	}
	n := 0
	if err := w.Journal.State(t.Context(), func(r audit.Record) error {
		if r.Entry.Kind == "consent.pin/failed" {
			n++
		}
		return nil
	}); err != nil || n != account.MaxPINTries {
		t.Errorf("%d failures in the journal, %v", n, err)
	}
}

// When the journal fails, the answer does not tell a right PIN from a wrong one, and a wrong one counts.
func TestPINWithoutJournal(t *testing.T) {
	t.Parallel()
	for name, landed := range map[string]bool{"written, answer lost": true, "not written": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWard(t)
			w.Journal.Fault(func(audit.Draft) (bool, error) { return landed, audit.ErrOutcomeUnknown })
			right, wrong := w.guess(t, testkit.PIN), w.guess(t, "000000")
			if right == nil || wrong == nil || right.Error() != wrong.Error() {
				t.Errorf("right: %v; wrong: %v", right, wrong)
			}
			for range account.MaxPINTries - 1 {
				wants(t, "guess", w.guess(t, "000000"), problem.Timeout)
			}
			wants(t, "after all tries", w.guess(t, "000000"), problem.PINLocked)
			w.Journal.Fault(nil)
			wants(t, "with the journal again", w.guess(t, testkit.PIN), problem.PINLocked)
			w.Restart()
			if landed {
				wants(t, "after a restart", w.guess(t, testkit.PIN), problem.PINLocked)
			} else if err := w.guess(t, testkit.PIN); err != nil {
				t.Errorf("after a restart: %v; nothing of it is on disk", err)
			}
		})
	}
}

// Whoever asks and leaves before the answer is counted all the same.
func TestPINOfOneWhoLeaves(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	ctx, leave := context.WithCancel(t.Context())
	w.Log.After(func(_, label string) error { // the PIN was checked
		if label == account.PINKeyLabel {
			leave()
		}
		return nil
	})
	_, err := w.Directory.Authorize(ctx, w.app, account.GrantRequest{Signer: "D001", PIN: "000000", Count: 1, Seconds: 60})
	wants(t, "the one who left", err, problem.PINWrong)
	w.Log.After(nil)
	var p *problem.Problem
	if err := w.guess(t, "000000"); !errors.As(err, &p) || p.TriesLeft != 3 {
		t.Errorf("the next: %v", err)
	}
	_, err = w.Directory.Authorize(ctx, w.app, account.GrantRequest{Signer: "D001", PIN: "000000", Count: 1, Seconds: 60})
	wants(t, "one who left before", err, problem.Timeout)
}

// A machine that is away, or answers nothing, is no wrong PIN and no right one.
func TestPINWithoutMachine(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	for want, fault := range map[problem.Code]error{
		problem.HSMUnavailable: &hsm.Error{Call: "C_Sign", RV: 0x32}, problem.HSMNeedsOperator: &hsm.Error{Call: "C_Login", RV: hsm.CKR_PIN_LOCKED},
		problem.Timeout: hsm.ErrDeadline,
	} {
		w.Log.Before(func(string, string) error { return fault })
		wants(t, fault.Error(), w.guess(t, testkit.PIN), want)
	}
	w.Log.Before(nil)
	if err := w.guess(t, testkit.PIN); err != nil {
		t.Error(err)
	}
}

// The verifier is bound to the signer: one copied into another signer's record verifies nothing.
func TestPINVerifierIsBound(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	thief := *w.Doctor("D002", "SM2")
	thief.Version++
	thief.PIN = w.doctor.PIN
	body, err := json.Marshal(thief)
	if err != nil {
		t.Fatal(err)
	}
	err = w.Directory.Replay(t.Context(), &audit.Entry{Kind: "account.signer/outcome", Object: "D002"}, func(string) ([]byte, error) { return body, nil })
	if err != nil {
		t.Fatal(err)
	}
	_, err = w.Directory.Authorize(t.Context(), w.app, account.GrantRequest{Signer: "D002", PIN: testkit.PIN, Count: 1, Seconds: 60})
	wants(t, "another signer's PIN", err, problem.PINWrong)
}

// Stopping an application or signer, and a new PIN, void what was allowed before, also once started again.
func TestStopVoidsAuthorisations(t *testing.T) {
	t.Parallel()
	for name, act := range map[string]func(w *ward) error{
		"application": func(w *ward) error {
			_, err := w.Directory.StopApplication(t.Context(), "admin", "his", true, "")
			_, err2 := w.Directory.StopApplication(t.Context(), "admin", "his", false, "")
			return errors.Join(err, err2)
		},
		"signer": func(w *ward) error {
			_, err := w.Directory.StopSigner(t.Context(), "admin", "D001", true, "")
			_, err2 := w.Directory.StopSigner(t.Context(), "admin", "D001", false, "")
			return errors.Join(err, err2)
		},
		"PIN": func(w *ward) error {
			_, err := w.Directory.SetPIN(t.Context(), "admin", "D001", "", testkit.PIN)
			return err
		},
		"restart": func(w *ward) error { return w.TryRestart() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWard(t)
			g := w.Grant(w.app, account.GrantRequest{Signer: "D001", Count: 5, Seconds: 60})
			r, err := w.reserve(t, g.ID, bound(1))
			if err != nil {
				t.Fatal(err)
			}
			if err := act(w); err != nil {
				t.Fatal(err)
			}
			_, err = w.reserve(t, g.ID, bound(1))
			wants(t, "before", err, problem.AuthorizationBad)
			r.Release() // what was under way does not bring it back
			_, err = w.reserve(t, g.ID, bound(1))
			wants(t, "after", err, problem.AuthorizationBad)
			again := w.Grant(w.app, account.GrantRequest{Signer: "D001", Count: 1, Seconds: 60})
			if _, err := w.reserve(t, again.ID, bound(1)); err != nil {
				t.Errorf("a new one: %v", err)
			}
		})
	}
}

// A stop or new PIN that comes while the grant is being written wins.
func TestStopWhileGranting(t *testing.T) {
	t.Parallel()
	for name, act := range map[string]func(w *ward) error{
		"application": func(w *ward) error {
			_, err := w.Directory.StopApplication(t.Context(), "admin", "his", true, "")
			return err
		},
		"signer": func(w *ward) error {
			_, err := w.Directory.StopSigner(t.Context(), "admin", "D001", true, "")
			return err
		},
		"PIN": func(w *ward) error {
			_, err := w.Directory.SetPIN(t.Context(), "admin", "D001", "", "another-pin")
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWard(t)
			w.Journal.Fault(func(d audit.Draft) (bool, error) {
				if d.Kind != "consent.authorization/granted" {
					return false, nil
				}
				return false, act(w)
			})
			if err := w.guess(t, testkit.PIN); err == nil {
				t.Error("granted to one that was stopped, or by a PIN that is no more")
			}
		})
	}
}

// The journal has each grant, and what it commits to is what is used.
func TestGrantIsJournalled(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	before := w.Journal.Size()
	g := w.Grant(w.app, account.GrantRequest{Signer: "D001", Digests: [][]byte{digest(1)}})
	rec, err := w.Journal.Entry(t.Context(), before)
	if err != nil {
		t.Fatal(err)
	}
	stored, err := w.Journal.Payload(t.Context(), &rec.Entry, "authorization")
	if err != nil || rec.Entry.Kind != "consent.authorization/granted" || rec.Entry.Object != "D001" {
		t.Fatalf("%+v, %v", rec.Entry, err)
	}
	r, err := w.reserve(t, g.ID, bound(1))
	if err != nil || string(r.Stored) != string(stored) {
		t.Errorf("used %s, journalled %s (%v)", r.Stored, stored, err)
	}
	w.Journal.FailKind("consent.authorization/granted", 1, false, audit.ErrJournalUnwritable)
	wants(t, "a grant that cannot be written", w.guess(t, testkit.PIN), problem.JournalUnwritable)
}

// One signer with one application has so many authorisations at a time; ended, used and foreign ones do not count.
func TestAuthorisationsAreBounded(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	var last *account.Grant
	for range 100 {
		last = w.Grant(w.app, account.GrantRequest{Signer: "D001", Count: 1, Seconds: 60})
	}
	size := w.Journal.Size()
	wants(t, "the 101st", w.guess(t, testkit.PIN), problem.RateLimited)
	wants(t, "the 101st, wrong PIN", w.guess(t, "000000"), problem.RateLimited)
	if w.Journal.Size() != size {
		t.Error("a grant that had no room was journalled")
	}
	w.Grant(w.App("emr", nil), account.GrantRequest{Signer: "D001", Count: 1, Seconds: 60})
	r, err := w.reserve(t, last.ID, bound(1))
	if err != nil {
		t.Fatal(err)
	}
	r.Keep()
	w.Grant(w.app, account.GrantRequest{Signer: "D001", Count: 1, Seconds: 60})
	wants(t, "full again", w.guess(t, testkit.PIN), problem.RateLimited)
	w.Clock.Advance(61 * time.Second)
	w.Grant(w.app, account.GrantRequest{Signer: "D001", Count: 1, Seconds: 60})
	_, err = w.reserve(t, last.ID, bound(1))
	wants(t, "used up and ended", err, problem.AuthorizationBad)
}

// Who consents to a drill consents to no signature in anybody else's name.
func TestDrillSignsAsItselfAlone(t *testing.T) {
	t.Parallel()
	app := &account.Application{ID: account.DrillPrefix + "0a1b2c3d", Test: true}
	if err := account.Admits(app, &account.Signer{ID: app.ID, Test: true}); err != nil {
		t.Error(err)
	}
	for _, id := range []string{"D1", account.DrillPrefix + "0a1b2c3e", ""} {
		if err := account.Admits(app, &account.Signer{ID: id}); problem.CodeOf(err) != problem.Forbidden {
			t.Errorf("%q: %v", id, err)
		}
	}
	if err := account.Admits(&account.Application{ID: "his", Test: true}, &account.Signer{ID: "D1"}); err != nil {
		t.Error(err)
	}
}

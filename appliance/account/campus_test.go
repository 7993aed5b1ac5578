package account_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"yinjian/appliance/account"
	"yinjian/appliance/audit"
	"yinjian/appliance/internal/testkit"
	"yinjian/appliance/pki"
	"yinjian/appliance/problem"
	"yinjian/dbdriver/dbtest"
	"yinjian/hsm"
	"yinjian/ntp"
)

// Two campuses over one centre.
type campuses struct {
	a, b   *testkit.House
	centre *testkit.Centre
	heal   func() // ends the centre's own faults; nil: it has none
}

func newCampuses(t *testing.T) *campuses {
	t.Helper()
	return newCampusesOver(t, new(testkit.Centre))
}

func newCampusesOver(t *testing.T, centre *testkit.Centre) *campuses {
	t.Helper()
	w := &campuses{testkit.NewNode(t, "benbu-1"), testkit.NewNode(t, "binhai-1"), centre, nil}
	w.a.PairWith(w.b, w.centre)
	w.b.PairWith(w.a, w.centre)
	w.exchange(t)
	return w
}

func (w *campuses) houses() []*testkit.House { return []*testkit.House{w.a, w.b} }

// exchange has each take what the other has.
func (w *campuses) exchange(t *testing.T) {
	t.Helper()
	for _, way := range [][2]*testkit.House{{w.a, w.b}, {w.b, w.a}} {
		if _, err := way[0].Take(way[1]); err != nil {
			t.Fatalf("%s takes what %s has: %v", way[0].Node, way[1].Node, err)
		}
	}
}

// snapshot is what a house's directory says, as far as the other campus should say the same.
func snapshot(t *testing.T, h *testkit.House) map[string]string {
	t.Helper()
	out := map[string]string{}
	put := func(name string, v any) {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		out[name] = string(b)
	}
	for _, a := range h.Directory.Applications() {
		c := *a
		c.OwnedBy(h.Node)
		put("application "+a.ID, c)
	}
	for _, g := range h.Directory.Signers() {
		c := *g
		c.Keys = slices.Clone(c.Keys)
		c.OwnedBy(h.Node)
		put("signer "+g.ID, c)
		for _, k := range g.Keys {
			if k.Certificate == nil {
				continue
			}
			if status, ok := h.Directory.Certificate(h.Serial(g, k.Algorithm)); ok {
				put("certificate "+status.Serial, status)
			}
		}
	}
	for _, a := range h.Directory.Administrators() {
		c := *a
		c.OwnedBy(h.Node)
		put("administrator "+a.ID, c)
	}
	for _, r := range h.Directory.KeyRecords() {
		if strings.HasPrefix(r.Owner, "signer:") {
			if r.Node == "" && r.KEK == "" {
				r.Node = h.Node
			}
			put("key "+r.Label, r)
		}
	}
	for _, a := range h.Directory.Anchors() {
		if a.ChangedBy != "appliance" {
			put("anchor "+a.ID, a)
		}
	}
	for _, l := range h.Directory.CRLs() {
		put("list "+hex.EncodeToString(testkit.Digest("SM2", l.Raw())), l.Issuer())
	}
	put("versions", h.Directory.Versions())
	return out
}

// agree brings everything up again and holds that nothing is half done: both directories are equal and those of a replay,
// and each decision has one outcome.
func (w *campuses) agree(t *testing.T) {
	t.Helper()
	w.centre.Fault(nil)
	if w.heal != nil {
		w.heal()
	}
	for _, h := range w.houses() {
		h.Journal.Fault(nil)
		h.Staff.Before(nil)
		if err := h.Directory.Settle(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, err := h.Directory.RefreshCRLs(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	w.exchange(t)
	for _, h := range w.houses() {
		if s := h.Directory.State(); len(s.Frozen)+len(s.Waiting)+len(s.Open) > 0 {
			t.Errorf("%s: %+v", h.Node, s)
		}
	}
	a, b := snapshot(t, w.a), snapshot(t, w.b)
	if diff := cmp.Diff(a, b); diff != "" {
		t.Errorf("the directories differ: %s", diff)
	}
	for _, h := range w.houses() {
		h.Restart()
		if diff := cmp.Diff(a, snapshot(t, h)); diff != "" {
			t.Errorf("%s after a restart: %s", h.Node, diff)
		}
		if n := h.Journal.Size(); n == 0 {
			t.Error("no journal")
		}
	}
	outcomes := map[string][]account.Decision{}
	for _, h := range w.houses() {
		for _, e := range changes(t, h) {
			if d, ok := account.Decided(&e); ok && e.Kind != audit.KindForeign {
				at := fmt.Sprintf("%s %s %d", d.Kind, d.Object, d.Version)
				outcomes[at] = append(outcomes[at], d)
			}
		}
	}
	// Either journal alone makes the table anew.
	for _, h := range w.houses() {
		again := new(testkit.Centre)
		if err := (account.Decisions{Centre: again}).Fill(t.Context(), []audit.Source{h.Journal.Journal}, func(uint64, uint64) {}); err != nil {
			t.Error(err)
		}
		if diff := cmp.Diff(w.centre.Table(), again.Table()); diff != "" {
			t.Errorf("the table from the journal of %s: %s", h.Node, diff)
		}
	}
	for _, row := range w.centre.Rows() {
		at := fmt.Sprintf("%s %s %d", row.Kind, row.Object, row.Version)
		row.At = row.At.Truncate(time.Microsecond)
		if got := outcomes[at]; len(got) != 1 || got[0] != row {
			t.Errorf("version %s was decided as %+v, its outcomes are %+v", at, row, got)
		}
		delete(outcomes, at)
	}
	if len(outcomes) > 0 {
		t.Errorf("outcomes without a decision: %v", outcomes)
	}
}

// changes are the entries of a house's own journal.
func changes(t *testing.T, h *testkit.House) (out []audit.Entry) {
	t.Helper()
	if err := h.Journal.State(t.Context(), func(r audit.Record) error { out = append(out, r.Entry); return nil }); err != nil {
		t.Fatal(err)
	}
	return out
}

// What one campus decides the other has, with who, when and how; a stop reaches it and voids what was allowed.
func TestCampuses(t *testing.T) {
	t.Parallel()
	w := newCampuses(t)
	w.a.Custody = &account.CustodyPolicy{KEK: "staff/kek"}
	app := w.a.App("his", nil)
	g := w.a.Doctor("D001", "SM2")
	w.b.App("emr", nil)
	w.exchange(t)
	at, ok := w.b.Directory.Signer("D001")
	if !ok || at.ChangedBy != "admin" || !at.ChangedAt.Equal(g.ChangedAt) {
		t.Fatalf("at the other campus: %+v", at)
	}
	if _, err := w.b.Directory.StopSigner(t.Context(), "admin", "D001", true, "离职"); err != nil {
		t.Fatal(err)
	}
	if _, _, err := w.a.Directory.ActiveSigner("D001", "SM2"); err != nil {
		t.Errorf("before it hears of the stop: %v", err)
	}
	grant := w.a.Grant(app, account.GrantRequest{Signer: "D001", Count: 2, Seconds: 600})
	w.exchange(t)
	_, _, err := w.a.Directory.ActiveSigner("D001", "SM2")
	wants(t, "a signer who was stopped elsewhere", err, problem.SignerStopped)
	if _, err := w.a.Directory.StopSigner(t.Context(), "admin", "D001", false, ""); err != nil {
		t.Fatal(err)
	}
	q := testkit.Request("k1", "D001")
	q.Consent.AuthorizationID, q.Consent.Method, q.Consent.Assertion = grant.ID, "", ""
	_, err = w.a.Signing.Sign(t.Context(), app, q)
	wants(t, "an authorisation of before the stop", err, problem.AuthorizationBad)

	// A revocation is its issuer's alone, and reaches the other.
	_, err = w.b.Directory.Revoke(t.Context(), "admin", w.a.Serial(g, "SM2"), "keyCompromise")
	wants(t, "revoking the other CA's certificate", err, problem.Forbidden)
	if _, err := w.a.Directory.Revoke(t.Context(), "admin", w.a.Serial(g, "SM2"), "keyCompromise"); err != nil {
		t.Fatal(err)
	}
	if _, _, err := w.a.Directory.RegisterApplication(t.Context(), "admin", account.Application{ID: "emr", Name: "a", Campus: "b"}); problem.CodeOf(err) != problem.Exists {
		t.Errorf("an application of the other campus's: %v", err)
	}
	w.exchange(t)
	if c, ok := w.b.Directory.Certificate(w.a.Serial(g, "SM2")); !ok || c.Status != "revoked" || c.Reason != "keyCompromise" {
		t.Errorf("at the other campus: %+v", c)
	}
	own := w.b.Directory.CRL("SM2")
	if err := w.b.Directory.PublishCRLs(t.Context(), "admin"); err != nil {
		t.Fatal(err)
	}
	if l := w.b.Directory.CRL("SM2"); l.Number == own.Number || l.Parsed.Len() != 0 {
		t.Errorf("the other CA's certificate is on the list of this one: %d entries", l.Parsed.Len())
	}
	w.agree(t)

	// The journal of this campus says when it learned of it, once, with the other's entry.
	n := 0
	for _, e := range changes(t, w.b) {
		if e.Kind != audit.KindForeign {
			continue
		}
		n++
		der, err := w.b.Journal.Payload(t.Context(), &e, "entry")
		if err != nil {
			t.Fatal(err)
		}
		inner, err := audit.ParseEntry(der)
		if err != nil || inner.Node != w.a.Node || inner.Kind != e.Text("foreign.kind") || e.Actor != "peer/benbu-1" {
			t.Errorf("%+v holds %+v, %v", e, inner, err)
		}
	}
	before := w.b.Journal.Size()
	for range 2 { // once, however often it is asked for
		w.exchange(t)
	}
	if n == 0 || w.b.Journal.Size() != before {
		t.Errorf("%d entries applied, %d more when nothing was new", n, w.b.Journal.Size()-before)
	}
}

// Both campuses change the same object at once: one of them wins, the other hears of it before or after.
func TestCampusesConflict(t *testing.T) {
	t.Parallel()
	w := newCampuses(t)
	w.a.Doctor("D001", "SM2")
	w.exchange(t)
	if _, err := w.a.Directory.StopSigner(t.Context(), "admin", "D001", true, ""); err != nil {
		t.Fatal(err)
	}
	_, err := w.b.Directory.SetPIN(t.Context(), "admin", "D001", "", "135790")
	wants(t, "a change of what the other has changed", err, problem.DirectoryBehind)
	if !strings.Contains(err.Error(), "benbu-1") {
		t.Errorf("it does not say who: %v", err)
	}
	// The other's entry arrives while somebody waits.
	done := make(chan error, 1)
	go func() {
		_, err := w.b.Directory.StopSigner(t.Context(), "admin", "D001", false, "")
		done <- err
	}()
	w.exchange(t)
	if err := <-done; err != nil {
		t.Errorf("a change that waited for the other's: %v", err)
	}
	w.exchange(t)
	// Between look and decision the other wins: nothing is changed here, and keys that were made are destroyed.
	var once atomic.Bool
	w.centre.Fault(func(call string) (bool, error) {
		if call == "decide" && once.CompareAndSwap(false, true) {
			w.b.Doctor("D002", "SM2")
		}
		return true, nil
	})
	keys := w.a.Staff.Labels()
	_, err = w.a.Directory.Enrol(t.Context(), "admin", account.Enrolment{ID: "D002", Name: "扁鹊", Department: "内科", Campus: "本部", Algorithms: []string{"SM2"}})
	wants(t, "losing", err, problem.DirectoryConflict)
	if got := w.a.Staff.Labels(); !slices.Equal(got, keys) {
		t.Errorf("keys %q are left of %q", got, keys)
	}
	w.agree(t)
	if g, _ := w.a.Directory.Signer("D002"); g.Name != "华佗" {
		t.Errorf("%+v won", g)
	}
}

// The centre is away: no change of the directory, and a start, an exchange, new lists of our CA and signing all the same.
func TestCentreAway(t *testing.T) {
	t.Parallel()
	w := newCampuses(t)
	app := w.a.App("his", nil)
	w.a.Doctor("D001", "SM2")
	w.centre.Away()
	for name, change := range acts(w.a) {
		if err := change(t, "admin"); problem.CodeOf(err) != problem.CentreUnavailable {
			t.Errorf("%s: %v", name, err)
		}
	}
	h := w.a
	h.Sign(app, testkit.Request("k1", "D001"))
	if err := h.Directory.PublishCRLs(t.Context(), "admin"); err != nil {
		t.Error(err)
	}
	h.Restart()
	app, _, _ = h.Directory.Application("his")
	h.Sign(app, testkit.Request("k2", "D001"))
	w.exchange(t)
	w.agree(t)
}

// A centre that does not answer is waited for once, not for each of many: all other changes wait behind that.
func TestCentreIsWaitedForOnce(t *testing.T) {
	t.Parallel()
	w := newCampuses(t)
	calls := map[string]int{}
	away := func(call string) (bool, error) { calls[call]++; return false, testkit.ErrCentre }
	var some []account.Enrolment
	for i := range 5 {
		id := fmt.Sprintf("D00%d", i)
		w.a.Doctor(id, "SM2")
		some = append(some, account.Enrolment{ID: "B" + id, Name: "华佗", Department: "内科", Campus: "本部", Algorithms: []string{"SM2"}})
	}
	w.centre.Fault(away)
	results, err := w.a.Directory.EnrolAll(t.Context(), "admin", some, false)
	if err != nil || calls["latest"] != 1 {
		t.Errorf("asked %v, %v", calls, err)
	}
	for _, r := range results {
		wants(t, "an enrolment", r.Err, problem.CentreUnavailable)
	}
	w.centre.Fault(nil)
	w.a.Journal.FailKind("account.signer/outcome", -1, false, audit.ErrJournalUnwritable)
	for i := range 5 {
		if _, err := w.a.Directory.StopSigner(t.Context(), "admin", fmt.Sprintf("D00%d", i), true, ""); err == nil {
			t.Fatal("stopped")
		}
	}
	w.a.Journal.Fault(nil)
	clear(calls)
	w.centre.Fault(away)
	if err := w.a.Directory.Settle(t.Context()); err != nil || calls["lookup"] != 1 {
		t.Errorf("asked %v, %v", calls, err)
	}
	w.agree(t)
}

// acts are changes of the directory of a house that has application his and signer D001, each by another actor.
func acts(h *testkit.House) map[string]func(t *testing.T, actor string) error {
	d := func() *account.Service { return h.Directory }
	return map[string]func(t *testing.T, actor string) error{
		"register": func(t *testing.T, actor string) error {
			_, _, err := d().RegisterApplication(t.Context(), actor, account.Application{ID: "lis", Name: "检验", Campus: "本部"})
			return err
		},
		"stop application": func(t *testing.T, actor string) error {
			_, err := d().StopApplication(t.Context(), actor, "his", true, "")
			return err
		},
		"enrol": func(t *testing.T, actor string) error {
			_, err := d().Enrol(t.Context(), actor, account.Enrolment{ID: "D009", Name: "李时珍", Department: "药剂科", Campus: "本部", Algorithms: []string{"SM2"}})
			return err
		},
		"enrol in bulk": func(t *testing.T, actor string) error {
			r, err := d().EnrolAll(t.Context(), actor, []account.Enrolment{
				{ID: "D010", Name: "王叔和", Department: "内科", Campus: "本部", Algorithms: []string{"SM2"}},
				{ID: "D011", Name: "皇甫谧", Department: "针灸科", Campus: "本部", Algorithms: []string{"SM2"}},
			}, false)
			for i := range r {
				err = errors.Join(err, r[i].Err)
			}
			return err
		},
		"set PIN": func(t *testing.T, actor string) error {
			_, err := d().SetPIN(t.Context(), actor, "D001", "", "246801")
			return err
		},
		"administrator": func(t *testing.T, actor string) error {
			_, err := d().AddAdministrator(t.Context(), actor, account.NewAdministrator{ID: "zhao", Name: "赵六", Role: account.Operator, Password: "Caozuo-yuan-26"})
			return err
		},
		"stop signer": func(t *testing.T, actor string) error {
			_, err := d().StopSigner(t.Context(), actor, "D001", true, "")
			return err
		},
		"request": func(t *testing.T, actor string) error {
			_, err := d().RequestCertificate(t.Context(), actor, account.RequestSpec{For: "signer:D001", NewKey: true})
			return err
		},
		"revoke": func(t *testing.T, actor string) error {
			g, _ := d().Signer("D001")
			_, err := d().Revoke(t.Context(), actor, h.Serial(g, "SM2"), "superseded")
			return err
		},
		"anchor": func(t *testing.T, actor string) error {
			_, err := d().AddAnchor(t.Context(), actor, someCA(t, h), []string{account.UseStaff}, "市 CA")
			return err
		},
	}
}

// someCA is a root of another CA, always the same for a house.
func someCA(t *testing.T, h *testkit.House) []byte {
	t.Helper()
	key, err := hsm.NewKey(t.Context(), h.CA, "other-ca", true)
	if err != nil {
		info, err := h.CA.GenerateKey(t.Context(), hsm.KeySpec{Label: "other-ca", Algorithm: hsm.SM2})
		if err != nil {
			t.Fatal(err)
		}
		if key, err = hsm.KeyOf(h.CA, info, true); err != nil {
			t.Fatal(err)
		}
	}
	return h.NewCA(key, "市 CA", 365*24*time.Hour).Certificate().Raw
}

// TestCampusCrashPoints: each call that a change makes to the journal and to the centre fails in turn, landed or not, and
// the appliance is killed there or goes on. What was acknowledged is there; what was not is there wholly or not at all; each
// version has one outcome; the other campus has the same; and the next change goes on.
func TestCampusCrashPoints(t *testing.T) {
	t.Parallel()
	var names []string
	for name := range acts(nil) {
		names = append(names, name)
	}
	for _, name := range names {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			calls := crashRun(t, name, -1, false, false, false)
			if calls < 4 {
				t.Fatalf("%d calls", calls)
			}
			for at := range calls {
				for kind := range 8 {
					landed, restart, away := kind&1 != 0, kind&2 != 0, kind&4 != 0
					if !long() && (at+kind)%8 != 0 { // a part of them
						continue
					}
					crashRun(t, name, at, landed, restart, away)
				}
			}
		})
	}
}

func long() bool { return os.Getenv("YINJIAN_LONG") != "" }

// crashRun makes one change whose call number at fails, and all later ones until the restart; -1: none does. away: the
// centre stays away over the restart. It answers how many calls there are.
func crashRun(t *testing.T, name string, at int, landed, restart, away bool) int {
	t.Helper()
	what := fmt.Sprintf("call %d of %s, landed: %v, restart: %v, centre away: %v", at, name, landed, restart, away)
	w := newCampuses(t)
	w.a.App("his", nil)
	w.a.Doctor("D001", "SM2")
	w.exchange(t)
	act := acts(w.a)[name]
	var calls atomic.Int64
	failing := func(err error) (bool, error) {
		switch n := int(calls.Add(1) - 1); {
		case at < 0 || n < at:
			return true, nil
		case n == at:
			return landed, err
		case restart: // the process is gone
			return false, err
		}
		return true, nil
	}
	w.centre.Fault(func(string) (bool, error) { return failing(testkit.ErrCentre) })
	w.a.Journal.Fault(func(audit.Draft) (bool, error) {
		landed, err := failing(audit.ErrOutcomeUnknown)
		return landed && err != nil, err
	})
	err := act(t, "the-actor")
	acknowledged := err == nil
	w.a.Journal.Fault(nil)
	w.centre.Fault(nil)
	if at < 0 {
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	if away {
		w.centre.Away()
	}
	if restart {
		w.a.Restart()
	}
	if away { // the object stays as it is, or is settled already; the other campus cannot change it either
		w.exchange(t)
		w.centre.Fault(nil)
	}
	w.agree(t)
	outcomes, filled := 0, 0
	for _, e := range changes(t, w.a) {
		if e.Actor == "the-actor" && strings.HasSuffix(e.Kind, "/outcome") && e.Kind != "ca.crl/outcome" {
			outcomes++
		}
		if e.Kind == "account.filled/outcome" {
			filled++
		}
	}
	want := map[string]int{"enrol in bulk": 2}[name]
	want = max(want, 1)
	if acknowledged && outcomes != want || outcomes > want || filled > want {
		t.Errorf("%s: acknowledged: %v, %d outcomes, %d filled", what, acknowledged, outcomes, filled)
	}
	// The same again, at the other campus, which has all of it.
	for _, again := range []string{"set PIN", "stop application"} {
		if err := acts(w.b)[again](t, "again"); err != nil {
			t.Errorf("%s: afterwards, %s: %v", what, again, err)
		}
	}
	w.agree(t)
	return int(calls.Load())
}

// TestCampusAge: a copy that is too old lets nobody sign; it comes back with the link.
func TestCampusAge(t *testing.T) {
	t.Parallel()
	w := newCampuses(t)
	app := w.a.App("his", nil)
	w.a.Doctor("D001", "SM2")
	w.a.Clock.Advance(24 * time.Hour)
	w.a.Sign(app, testkit.Request("k1", "D001"))
	w.a.Clock.Advance(time.Second)
	_, err := w.a.Signing.Sign(t.Context(), app, testkit.Request("k2", "D001"))
	wants(t, "a copy of a day and a second", err, problem.DirectoryStale)
	_, err = w.a.Directory.Authorize(t.Context(), app, account.GrantRequest{Signer: "D001", PIN: testkit.PIN, Count: 1, Seconds: 60})
	wants(t, "an authorisation", err, problem.DirectoryStale)
	if s := w.a.Directory.State(); !s.Stale || s.AgeMS != (24*time.Hour+time.Second).Milliseconds() || s.Peer != "binhai-1" {
		t.Errorf("%+v", s)
	}
	for range 2 { // pairing anew tells nothing of whom the other campus has stopped since
		w.a.PairWith(w.b, w.centre)
		_, err = w.a.Signing.Sign(t.Context(), app, testkit.Request("k2", "D001"))
		wants(t, "a copy of a day and a second, paired anew", err, problem.DirectoryStale)
		if err := w.a.Directory.Pair(nil); err != nil {
			t.Fatal(err)
		}
	}
	w.a.PairWith(w.b, w.centre)
	w.a.Clock.State(ntp.Untrusted)
	if s := w.a.Directory.State(); s.Stale {
		t.Errorf("an age by a clock that nobody trusts: %+v", s)
	}
	w.a.Clock.State(ntp.Trusted)
	if _, err := w.a.Take(w.b); err != nil {
		t.Fatal(err)
	}
	w.a.Directory.PeerCurrent(w.a.Clock.Now().Time)
	w.a.Sign(app, testkit.Request("k3", "D001"))
	w.a.Clock.Advance(25 * time.Hour)
	if err := w.a.Directory.Pair(nil); err != nil { // alone again
		t.Fatal(err)
	}
	w.a.Sign(app, testkit.Request("k4", "D001"))
}

// TestCampusDBA: whoever changes the rows of decisions can keep changes from being made, and makes none.
func TestCampusDBA(t *testing.T) {
	t.Parallel()
	forged := func(node string, version int64) func([]account.Decision) []account.Decision {
		return func(rows []account.Decision) []account.Decision {
			return append(rows, account.Decision{
				Kind: "application", Object: "his", Version: version, Node: node, Epoch: "0123456789abcdef", Intent: strings.Repeat("ab", 32), Body: strings.Repeat("cd", 32), At: testkit.Start,
			})
		}
	}
	begin := func(t *testing.T) *campuses {
		w := newCampuses(t)
		w.a.App("his", nil)
		w.a.Doctor("D001", "SM2")
		w.exchange(t)
		return w
	}
	stop := func(h *testkit.House, on bool) error {
		_, err := h.Directory.StopApplication(t.Context(), "admin", "his", on, "")
		return err
	}
	t.Run("a row nobody wrote", func(t *testing.T) {
		t.Parallel()
		for node, at := range map[string]string{"benbu-1": "benbu-1", "binhai-1": "binhai-1", "who-1": "benbu-1"} {
			w := begin(t)
			before := snapshot(t, w.b)
			w.centre.Change(forged(node, 4))
			w.exchange(t)
			for _, h := range w.houses() {
				wants(t, "a change of the object", stop(h, true), problem.DirectoryBehind)
				blocked, err := h.Directory.Blocked(t.Context())
				if want := (account.BlockedObject{Kind: "application", ID: "his", Version: 2, Latest: 4, Node: node, At: testkit.Start}); err != nil || len(blocked) != 1 || blocked[0] != want {
					t.Errorf("blocked: %+v, %v", blocked, err)
				}
				if _, err := h.Directory.StopSigner(t.Context(), "admin", "D001", true, ""); err != nil {
					t.Errorf("another object: %v", err)
				}
				w.exchange(t)
			}
			for id := range before {
				if now := snapshot(t, w.b); strings.HasPrefix(id, "application") && now[id] != before[id] {
					t.Errorf("%s changed: %s", id, now[id])
				}
			}
			// The campus that the row names says that it never decided that, or either if it names none.
			there, other := w.a, w.b
			if at == "binhai-1" {
				there, other = w.b, w.a
			}
			if node != "who-1" {
				_, _, err := other.Directory.SkipVersions(t.Context(), "admin", "application", "his", "查无此变更")
				wants(t, "skipping what bears another's name", err, problem.Forbidden)
			}
			first, last, err := there.Directory.SkipVersions(t.Context(), "admin", "application", "his", "查无此变更")
			if err != nil || first != 2 || last != 4 {
				t.Fatalf("skipped %d to %d, %v", first, last, err)
			}
			w.exchange(t)
			if err := stop(other, true); err != nil {
				t.Errorf("afterwards: %v", err)
			}
			w.exchange(t)
			for _, h := range w.houses() {
				if app, _, _ := h.Directory.Application("his"); !app.Stopped || app.Version != 2 {
					t.Errorf("%s: %+v", h.Node, app)
				}
				if s := h.Directory.State(); len(s.Frozen)+len(s.Waiting) > 0 {
					t.Errorf("%s: %+v", h.Node, s)
				}
				h.Restart()
				if s := h.Directory.State(); len(s.Frozen)+len(s.Waiting) > 0 {
					t.Errorf("%s after a restart: %+v", h.Node, s)
				}
			}
			if diff := cmp.Diff(snapshot(t, w.a), snapshot(t, w.b)); diff != "" {
				t.Error(diff)
			}
		}
	})
	t.Run("skipping needs the other campus", func(t *testing.T) {
		t.Parallel()
		w := begin(t)
		w.centre.Change(forged("benbu-1", 2))
		w.a.Clock.Advance(2 * time.Minute)
		_, _, err := w.a.Directory.SkipVersions(t.Context(), "admin", "application", "his", "查无此变更")
		wants(t, "skipping in the dark", err, problem.DirectoryBehind)
		_, _, err = w.b.Directory.SkipVersions(t.Context(), "admin", "signer", "D001", "查无此变更")
		wants(t, "skipping what is not missing", err, problem.NotFound)
	})
	t.Run("all rows deleted", func(t *testing.T) {
		t.Parallel()
		w := begin(t)
		w.centre.Change(func([]account.Decision) []account.Decision { return nil })
		if err := stop(w.b, true); err != nil {
			t.Fatal(err)
		}
		w.exchange(t)
		if err := stop(w.a, false); err != nil {
			t.Fatal(err)
		}
		w.exchange(t)
		if diff := cmp.Diff(snapshot(t, w.a), snapshot(t, w.b)); diff != "" {
			t.Error(diff)
		}
	})
	// A standby that took over without the last decisions, or an older copy of the database: what either has is put back, and the
	// other campus, which has not heard of it, cannot decide on the same version.
	t.Run("rows lost and the line cut", func(t *testing.T) {
		t.Parallel()
		w := begin(t)
		if err := stop(w.a, true); err != nil {
			t.Fatal(err)
		}
		rows := w.centre.Table()
		w.centre.Change(func([]account.Decision) []account.Decision { return nil })
		if n, behind, err := w.a.Directory.Reconcile(t.Context()); err != nil || n != 2 || len(behind) > 0 {
			t.Fatalf("put back: %d, %v, %v", n, behind, err)
		}
		for name, row := range w.centre.Table() {
			if rows[name] != row {
				t.Errorf("%s was put back as %+v, was %+v", name, row, rows[name])
			}
		}
		wants(t, "the same version once more", stop(w.b, false), problem.DirectoryBehind)
		if n, behind, err := w.b.Directory.Reconcile(t.Context()); err != nil || n != 0 || len(behind) != 1 || behind["application his"] != 1 {
			t.Errorf("what does not come: %d, %v, %v", n, behind, err)
		}
		w.exchange(t)
		for _, h := range w.houses() {
			if n, behind, err := h.Directory.Reconcile(t.Context()); err != nil || n != 0 || len(behind) > 0 {
				t.Errorf("%s: %d, %v, %v", h.Node, n, behind, err)
			}
		}
		if err := stop(w.b, false); err != nil {
			t.Error(err)
		}
		w.exchange(t)
		if diff := cmp.Diff(snapshot(t, w.a), snapshot(t, w.b)); diff != "" {
			t.Error(diff)
		}
	})
	// A row deleted while the other campus cannot be heard: both decide on one version. Nobody can say which holds, so the
	// object is used by nobody, here and there, and after a restart.
	t.Run("a fork", func(t *testing.T) {
		t.Parallel()
		w := begin(t)
		w.b.App("emr", nil)
		root := someCA(t, w.a)
		anchor := func(note string) string {
			t.Helper()
			a, err := w.a.Directory.AddAnchor(t.Context(), "admin", root, []string{account.UseStaff}, note)
			if err != nil {
				t.Fatal(err)
			}
			return a.ID
		}
		id := anchor("市 CA")
		w.exchange(t)
		anchor("省 CA")
		if err := stop(w.a, true); err != nil {
			t.Fatal(err)
		}
		if _, err := w.a.Directory.SetPIN(t.Context(), "admin", "D001", "", "135790"); err != nil {
			t.Fatal(err)
		}
		w.centre.Change(func(rows []account.Decision) []account.Decision {
			return slices.DeleteFunc(rows, func(d account.Decision) bool { return d.Version > 1 })
		})
		if _, err := w.b.Directory.LimitApplication(t.Context(), "admin", "his", account.Limits{Rate: 7}, ""); err != nil {
			t.Fatal(err)
		}
		if _, err := w.b.Directory.StopSigner(t.Context(), "admin", "D001", true, ""); err != nil {
			t.Fatal(err)
		}
		if _, err := w.b.Directory.WithdrawAnchor(t.Context(), "admin", id, "停业"); err != nil {
			t.Fatal(err)
		}
		w.exchange(t)
		for _, h := range w.houses() {
			for range 2 {
				s := h.Directory.State()
				if len(s.Frozen) != 3 || !strings.HasPrefix(s.Frozen[0], "anchor "+id) || !strings.HasPrefix(s.Frozen[1], "application his") || !strings.HasPrefix(s.Frozen[2], "signer D001") {
					t.Errorf("%s: %+v", h.Node, s)
				}
				_, _, err := h.Directory.ActiveSigner("D001", "SM2")
				wants(t, "a signer in doubt", err, problem.DirectoryFrozen)
				his, _, _ := h.Directory.Application("his")
				_, err = h.Directory.Authorize(t.Context(), his, account.GrantRequest{Signer: "D001", PIN: testkit.PIN, Count: 1, Seconds: 60})
				if code := problem.CodeOf(err); code != problem.DirectoryFrozen && code != problem.ApplicationStopped {
					t.Errorf("an authorisation: %v", err)
				}
				wants(t, "a change", stop(h, false), problem.DirectoryFrozen)
				h.Restart()
			}
		}
		h := w.b
		h.Doctor("D002", "SM2")
		emr, _, _ := h.Directory.Application("emr")
		h.Sign(emr, testkit.Request("k1", "D002")) // others go on
		w.exchange(t)

		// An administrator of either campus puts an end to it: what he has holds at both, stopped.
		w.b.Clock.Advance(2 * time.Minute)
		_, err := w.b.Directory.Thaw(t.Context(), "admin", "application", "his", "以滨海为准")
		wants(t, "thawing in the dark", err, problem.DirectoryBehind)
		w.exchange(t)
		if _, err := w.b.Directory.Thaw(t.Context(), "admin", "application", "his", "以滨海为准"); err != nil {
			t.Fatal(err)
		}
		if _, err := w.a.Directory.Thaw(t.Context(), "admin", "signer", "D001", "以本部为准"); err != nil {
			t.Fatal(err)
		}
		if _, err := w.a.Directory.Thaw(t.Context(), "admin", "anchor", id, "查明再说"); err != nil {
			t.Fatal(err)
		}
		_, err = w.b.Directory.Thaw(t.Context(), "admin", "application", "emr", "x")
		wants(t, "thawing what is not frozen", err, problem.NotFound)
		w.exchange(t)
		for _, h := range w.houses() {
			for range 2 {
				his, _, _ := h.Directory.Application("his")
				d1, _ := h.Directory.Signer("D001")
				i := slices.IndexFunc(h.Directory.Anchors(), func(a *account.Anchor) bool { return a.ID == id })
				if !his.Stopped || his.Rate != 7 || !d1.Stopped || i < 0 || !h.Directory.Anchors()[i].Withdrawn {
					t.Errorf("%s: thawed to %+v and %+v", h.Node, his, d1)
				}
				h.Restart()
			}
		}
		for _, f := range []func() error{
			func() error { return nil },
			func() error { return stop(w.a, false) },
			func() error { _, err := w.b.Directory.StopSigner(t.Context(), "admin", "D001", false, ""); return err },
		} {
			if err := f(); err != nil {
				t.Errorf("started again: %v", err)
			}
			w.exchange(t)
			for _, h := range w.houses() {
				h.Restart()
				if s := h.Directory.State(); len(s.Frozen)+len(s.Waiting)+len(s.Open) > 0 {
					t.Errorf("%s: %+v", h.Node, s)
				}
			}
			if diff := cmp.Diff(snapshot(t, w.a), snapshot(t, w.b)); diff != "" {
				t.Error(diff)
			}
		}
	})
	// What one campus changed while it was no campus's peer contradicts what was decided before. Also without a pairing an
	// object does not stay frozen for ever.
	t.Run("changed while the pairing was ended", func(t *testing.T) {
		t.Parallel()
		for _, paired := range []bool{true, false} {
			w := begin(t)
			if err := w.a.Directory.Pair(nil); err != nil {
				t.Fatal(err)
			}
			for _, on := range []bool{true, false, true} {
				if err := stop(w.a, on); err != nil {
					t.Fatal(err)
				}
			}
			w.a.PairWith(w.b, w.centre)
			w.exchange(t)
			if s := w.b.Directory.State(); len(s.Frozen) != 1 {
				t.Fatalf("%+v", s)
			}
			if !paired {
				if err := w.b.Directory.Pair(nil); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := w.b.Directory.Thaw(t.Context(), "admin", "application", "his", "核实"); err != nil {
				t.Fatal(err)
			}
			if !paired {
				w.b.PairWith(w.a, w.centre)
			}
			w.exchange(t)
			for _, h := range w.houses() {
				h.Restart()
				if his, _, _ := h.Directory.Application("his"); !his.Stopped || len(h.Directory.State().Frozen) > 0 {
					t.Errorf("%s, paired %v: %+v, %+v", h.Node, paired, his, h.Directory.State())
				}
			}
			if diff := cmp.Diff(snapshot(t, w.a), snapshot(t, w.b)); diff != "" {
				t.Error(diff)
			}
			if err := stop(w.a, false); err != nil {
				t.Errorf("paired %v, started again: %v", paired, err)
			}
		}
	})
	// The outcome of what was decided before a restore may be at the other campus: the version is not filled before that one
	// was heard.
	t.Run("decided before a restore", func(t *testing.T) {
		t.Parallel()
		w := begin(t)
		w.a.Journal.FailKind("account.application/outcome", -1, false, audit.ErrJournalUnwritable)
		if err := stop(w.a, true); err == nil {
			t.Fatal("stopped")
		}
		w.a.Journal.Fault(nil)
		w.centre.Change(func(rows []account.Decision) []account.Decision {
			rows[len(rows)-1].Epoch = "0123456789abcdef"
			return rows
		})
		w.a.Clock.Advance(2 * time.Minute)
		w.a.Restart()
		if s := w.a.Directory.State(); len(s.Open) != 1 {
			t.Errorf("before the other campus was heard: %+v", s)
		}
		w.exchange(t)
		if err := w.a.Directory.Settle(t.Context()); err != nil {
			t.Fatal(err)
		}
		if s := w.a.Directory.State(); len(s.Open) > 0 {
			t.Errorf("afterwards: %+v", s)
		}
		if err := stop(w.a, true); err != nil {
			t.Error(err)
		}
	})
	// Rows that are changed under an open intent: nothing comes of it but a version to be skipped.
	t.Run("a row changed", func(t *testing.T) {
		t.Parallel()
		for name, change := range map[string]func(*account.Decision){
			"intent":  func(d *account.Decision) { d.Intent = strings.Repeat("ef", 32) },
			"object":  func(d *account.Decision) { d.Object = "emr" },
			"version": func(d *account.Decision) { d.Version = 9 },
			"node":    func(d *account.Decision) { d.Node = "binhai-1" },
			"kind":    func(d *account.Decision) { d.Kind = "signer" },
		} {
			w := begin(t)
			w.a.Journal.FailKind("account.application/outcome", -1, false, audit.ErrJournalUnwritable)
			if err := stop(w.a, true); err == nil {
				t.Fatal("stopped")
			}
			w.a.Journal.Fault(nil)
			w.centre.Change(func(rows []account.Decision) []account.Decision {
				change(&rows[len(rows)-1])
				return rows
			})
			w.a.Restart()
			w.exchange(t)
			for _, h := range w.houses() {
				if app, _, _ := h.Directory.Application("his"); app.Stopped || app.Version != 1 {
					t.Errorf("%s: %+v", name, app)
				}
				if s := h.Directory.State(); len(s.Frozen)+len(s.Open)+len(s.Waiting) > 0 {
					t.Errorf("%s: %+v", name, s)
				}
			}
			if diff := cmp.Diff(snapshot(t, w.a), snapshot(t, w.b)); diff != "" {
				t.Errorf("%s: %s", name, diff)
			}
		}
	})
}

// An entry of the other campus that contradicts this directory freezes its object and nothing else.
func TestCampusNonsense(t *testing.T) {
	t.Parallel()
	w := newCampuses(t)
	w.a.App("his", nil)
	w.a.Doctor("D001", "SM2")
	w.exchange(t)
	write := func(d audit.Draft, body string) {
		t.Helper()
		d.Actor, d.State = "somebody", true
		d.Payloads = []audit.Attachment{{Name: "object", MediaType: "application/json", Data: []byte(body)}}
		if _, err := w.a.Journal.Append(t.Context(), d); err != nil {
			t.Fatal(err)
		}
	}
	version := func(n int64) audit.Field { return audit.Field{Name: "decided.version", Value: audit.Int(n)} }
	write(audit.Draft{Kind: "account.signer/outcome", Object: "D001", Fields: []audit.Field{version(2)}}, `{`)
	write(audit.Draft{Kind: "account.application/outcome", Object: "his"}, `{"id":"his","version":2,"key_salt":"AAAAAAAAAAAAAAAAAAAAAA=="}`) // undecided
	write(audit.Draft{Kind: "account.signer/outcome", Object: "D007", Fields: []audit.Field{version(3)}}, `{"id":"D007","version":1}`)       // a gap
	write(audit.Draft{Kind: "account.signer/outcome", Object: "D008", Fields: []audit.Field{version(1)}}, `{"id":"D008","version":5}`)
	filled := func(object string, from, to int64) {
		write(audit.Draft{Kind: "account.filled/outcome", Object: object, Fields: []audit.Field{
			version(to), {Name: "decided.from", Value: audit.Int(from)}, {Name: "object.kind", Value: audit.Text("signer")},
		}}, "")
	}
	filled("D004", 1, 1<<62) // no version would be left for a stop
	filled("D005", 1, 0)
	filled("D006", 0, 1)
	write(audit.Draft{Kind: "ca.crl/outcome", Object: "SM2"}, `{"algorithm":"SM2","number":9,"der":"AAAA"}`)
	if _, err := w.b.Take(w.a); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		s := w.b.Directory.State()
		var frozen []string
		for _, f := range s.Frozen {
			frozen = append(frozen, strings.SplitN(f, "：", 2)[0])
		}
		if want := []string{"application his", "signer D001", "signer D004", "signer D005", "signer D006", "signer D008"}; !slices.Equal(frozen, want) || len(s.Waiting) != 1 || !strings.HasPrefix(s.Waiting[0], "signer D007") {
			t.Errorf("%+v", s)
		}
		if _, ok := w.b.Directory.Signer("D007"); ok {
			t.Error("a version without the ones before it was applied")
		}
		w.b.Restart()
	}
	for _, id := range []string{"D004", "D007"} { // frozen, and waiting
		if _, err := w.b.Directory.Thaw(t.Context(), "admin", "signer", id, "不存在"); err != nil {
			t.Error(err)
		}
	}
	if s := w.b.Directory.State(); len(s.Waiting) > 0 {
		t.Errorf("waiting after it was thawed: %+v", s)
	}
	w.b.Restart()
	if _, err := w.b.Directory.Enrol(t.Context(), "admin", account.Enrolment{ID: "D004", Name: "a", Department: "b", Campus: "c", Algorithms: []string{"SM2"}}); err != nil {
		t.Errorf("what was thawed is not here and cannot be: %v", err)
	}
	if _, err := w.b.Directory.Enrol(t.Context(), "admin", account.Enrolment{ID: "D002", Name: "a", Department: "b", Campus: "c", Algorithms: []string{"SM2"}}); err != nil {
		t.Error(err)
	}
}

// What stands in the other campus's journal under its own key may be made up by whoever has that campus's API process. It
// changes what its entry names, and nothing that is this appliance's alone or proves itself.
func TestCampusOverreach(t *testing.T) {
	t.Parallel()
	w := newCampuses(t)
	w.a.App("his", nil)
	w.b.Doctor("D001", "SM2")
	root := newAuthority(t, "省 CA", newKey(t))
	if _, err := w.b.Directory.AddAnchor(t.Context(), "admin", root.cert.Raw, []string{account.UseStaff}, "省 CA"); err != nil {
		t.Fatal(err)
	}
	now := w.b.Clock.Now().Time
	list := root.crl(1, now, time.Hour)
	if _, _, err := w.b.Directory.ImportCRL(t.Context(), "admin", list, "省 CA"); err != nil {
		t.Fatal(err)
	}
	w.exchange(t)
	g, _ := w.b.Directory.Signer("D001")
	write := func(kind, object string, shared bool, body any) {
		t.Helper()
		b, err := json.Marshal(body)
		if err != nil {
			t.Fatal(err)
		}
		d := audit.Draft{Kind: kind, Object: object, Actor: "somebody", State: true, Payloads: []audit.Attachment{{Name: "object", MediaType: "application/json", Data: b}}}
		if shared {
			d.Fields = []audit.Field{{Name: "decided.version", Value: audit.Int(1)}}
		}
		if _, err := w.a.Journal.Append(t.Context(), d); err != nil {
			t.Fatal(err)
		}
	}
	type fields map[string]any
	write("key.destruction/outcome", "signer:D002", true, fields{"owner": "signer:D001", "label": g.Keys[0].Label})
	write("account.application/outcome", "other", true, fields{"id": "his", "version": 2, "stopped": true, "key_salt": make([]byte, 16)})
	write("account.signer/outcome", "D003", true, fields{"id": "D001", "version": 2, "stopped": true})
	imposter := &authority{t: t, key: newKey(t), cert: root.cert} // the right name, another key
	sum := sha256.Sum256(root.cert.Raw)
	write("trust.crl/outcome", "x", false, fields{"issuer": "省 CA", "issuer_id": hex.EncodeToString(sum[:]), "number": "09", "der": imposter.crl(9, now.Add(time.Minute), time.Hour)})
	// The same as what it says it has from this appliance.
	returned := func(kind, object string, version int64, body any) {
		t.Helper()
		b, err := json.Marshal(body)
		if err != nil {
			t.Fatal(err)
		}
		own, err := w.b.Journal.Entry(t.Context(), 0)
		if err != nil {
			t.Fatal(err)
		}
		e := own.Entry
		sum := audit.Sum([]byte(kind + object))
		e.Kind, e.Object, e.Sequence, e.Ref, e.Epoch[0] = kind, object, w.a.Journal.Size(), sum[:], e.Epoch[0]^1
		e.Fields = nil
		if version > 0 {
			e.Fields = []audit.Field{{Name: "decided.version", Value: audit.Int(version)}}
		}
		e.Payloads = []audit.Payload{{Name: "object", MediaType: "application/json", Size: int64(len(b)), SM3: audit.Sum(b)}}
		der, err := e.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.a.Journal.Append(t.Context(), audit.Draft{Kind: audit.KindForeign, Object: object, Actor: "somebody", State: true, Payloads: []audit.Attachment{
			{Name: "entry", MediaType: "binary/vnd.yinjian.entry", Data: der}, {Name: "of.object", MediaType: "application/json", Data: b},
		}}); err != nil {
			t.Fatal(err)
		}
	}
	returned("key.destruction/outcome", "signer:D004", 1, fields{"owner": "signer:D001", "label": g.Keys[0].Label})
	high := w.b.Directory.CRL("SM2")
	returned("ca.crl/outcome", "SM2", 0, fields{"algorithm": "SM2", "number": 1 << 40, "der": high.DER})
	if _, err := w.b.Take(w.a); err != nil {
		t.Fatal(err)
	}
	if now := w.b.Directory.CRL("SM2"); now.Number != high.Number {
		t.Errorf("our CA's list has the number %d, was %d", now.Number, high.Number)
	}
	for range 2 {
		s := w.b.Directory.State()
		var frozen []string
		for _, f := range s.Frozen {
			frozen = append(frozen, strings.SplitN(f, "：", 2)[0])
		}
		if want := []string{"application other", "signer D002", "signer D003", "signer D004"}; !slices.Equal(frozen, want) {
			t.Errorf("%+v", s)
		}
		his, _, _ := w.b.Directory.Application("his")
		if _, _, err := w.b.Directory.ActiveSigner("D001", "SM2"); err != nil || his.Stopped {
			t.Errorf("others were changed: %v, %+v", err, his)
		}
		if !slices.ContainsFunc(w.b.Directory.CRLs(), func(l *pki.CRL) bool { return bytes.Equal(l.Raw(), list) }) {
			t.Error("a list that its CA has not signed took the place of one that it has")
		}
		w.b.Restart()
	}
}

// TestCampusRestored: an appliance that lost its journal, or a part, learns again from the other what it had decided itself,
// before it may change anything of it; one that takes its place learns the same.
func TestCampusRestored(t *testing.T) {
	t.Parallel()
	for _, node := range []string{"binhai-1", "binhai-2"} {
		w := newCampuses(t)
		w.b.App("his", nil)
		w.b.Doctor("D001", "SM2")
		w.a.Doctor("D002", "SM2")
		w.exchange(t)
		if _, err := w.b.Directory.StopSigner(t.Context(), "admin", "D001", true, "离职"); err != nil {
			t.Fatal(err)
		}
		if _, err := w.b.Directory.StopSigner(t.Context(), "admin", "D002", true, "离职"); err != nil {
			t.Fatal(err)
		}
		w.exchange(t)
		if _, err := w.a.Directory.SetPIN(t.Context(), "admin", "D001", "", "135790"); err != nil {
			t.Fatal(err)
		}
		again := testkit.NewNode(t, node) // with nothing but its keys
		again.CAs, again.Staff, again.Log = w.b.CAs, w.b.Staff, w.b.Log
		again.Restart()
		again.PairWith(w.a, w.centre)
		w.a.PairWith(again, w.centre)
		w.b = again
		if node == "binhai-1" {
			_, _, err := w.b.Directory.RegisterApplication(t.Context(), "admin", account.Application{ID: "his", Name: "a", Campus: "b"})
			wants(t, "a change before it has learned", err, problem.DirectoryBehind)
		}
		w.exchange(t)
		for _, id := range []string{"D001", "D002"} {
			if g, ok := w.b.Directory.Signer(id); !ok || !g.Stopped {
				t.Errorf("%s: %s is %+v", node, id, g)
			}
		}
		if _, err := w.b.Directory.StopApplication(t.Context(), "admin", "his", true, ""); err != nil {
			t.Errorf("%s: %v", node, err)
		}
		w.exchange(t)
		size := w.a.Journal.Size()
		w.exchange(t)
		if w.a.Journal.Size() != size {
			t.Errorf("%s: entries go back and forth", node)
		}
		for _, h := range w.houses() {
			for range 2 {
				if s := h.Directory.State(); len(s.Frozen)+len(s.Waiting)+len(s.Open) > 0 {
					t.Errorf("%s: %+v", h.Node, s)
				}
				h.Restart()
			}
		}
		a, b := w.a.Directory.Versions(), w.b.Directory.Versions()
		if diff := cmp.Diff(a, b); diff != "" {
			t.Errorf("%s: %s", node, diff)
		}
	}
}

// TestCampusHistories: random histories of two campuses with link cuts, outages of the centre, lost answers and kills. In
// the end both directories are equal, each version was decided once, and what was acknowledged is there.
func TestCampusHistories(t *testing.T) {
	t.Parallel()
	histories, steps := 2, 40
	if long() {
		histories, steps = 40, 120
	}
	cluster := dbtest.StartPostgres(t)
	for name, centre := range map[string]func(t *testing.T) *testkit.Centre{
		"memory":   func(*testing.T) *testkit.Centre { return new(testkit.Centre) },
		"SQLite":   func(t *testing.T) *testkit.Centre { return testkit.CentreOf(dbtest.SQLite(t).Open(t)) },
		"Postgres": func(t *testing.T) *testkit.Centre { return testkit.CentreOf(dbtest.Postgres(cluster)(t).Open(t)) },
		"like DM":  nil,
	} {
		for i := range histories {
			t.Run(fmt.Sprintf("%s %d", name, i), func(t *testing.T) {
				t.Parallel()
				var w *campuses
				if centre != nil {
					w = newCampusesOver(t, centre(t))
				} else {
					store, heal := lossy(t, dbtest.DM(t))
					w = newCampusesOver(t, testkit.CentreOf(store))
					w.heal = heal
				}
				history(t, w, rand.New(rand.NewPCG(uint64(i), 6)), steps)
			})
		}
	}
}

// lossy is the database through a driver that loses about each fifth change or its answer, until heal is called.
func lossy(t *testing.T, d *dbtest.Database) (centre account.Centre, heal func()) {
	t.Helper()
	var opened atomic.Bool
	s := d.OpenWith(t, func(op dbtest.Op) dbtest.Fault {
		scattered := uint32(op.N) * 2654435761 >> 7
		if !opened.Load() || op.N == 0 || scattered%5 != 0 {
			return dbtest.Fault{}
		}
		return []dbtest.Fault{{Before: dbtest.Deadlock}, {After: io.ErrUnexpectedEOF}, {Before: io.ErrUnexpectedEOF}}[scattered/5%3]
	})
	opened.Store(true)
	return s, func() { opened.Store(false) }
}

func history(t *testing.T, w *campuses, rnd *rand.Rand, steps int) {
	type act struct {
		actor        string
		acknowledged bool
		refused      bool // for a reason that leaves nothing
	}
	done := map[*testkit.House][]act{}
	linked := true
	for step := range steps {
		h := w.houses()[rnd.IntN(2)]
		other := w.houses()[0]
		if other == h {
			other = w.houses()[1]
		}
		d := h.Directory
		actor := fmt.Sprintf("step-%d", step)
		signer, app := fmt.Sprintf("D%03d", rnd.IntN(4)), fmt.Sprintf("app%d", rnd.IntN(3))
		var err error
		switch rnd.IntN(14) {
		case 0:
			linked = !linked
			continue
		case 1:
			w.centre.Away()
			continue
		case 2:
			w.centre.Fault(nil)
			continue
		case 3: // answers of the centre are lost for a while
			left := atomic.Int64{}
			left.Store(rnd.Int64N(6))
			landed := rnd.IntN(2) == 0
			w.centre.Fault(func(string) (bool, error) {
				if left.Add(-1) == 0 {
					return landed, testkit.ErrCentre
				}
				return true, nil
			})
			continue
		case 4:
			left := atomic.Int64{}
			left.Store(rnd.Int64N(8))
			landed, gone := rnd.IntN(2) == 0, rnd.IntN(2) == 0
			h.Journal.Fault(func(audit.Draft) (bool, error) {
				n := left.Add(-1)
				if n == 0 || n < 0 && gone {
					return landed && n == 0, audit.ErrOutcomeUnknown
				}
				return false, nil
			})
			continue
		case 5:
			h.Journal.Fault(nil)
			h.Restart()
			continue
		case 6, 7:
			if linked {
				_, err := h.Take(other)
				if code := problem.CodeOf(err); err != nil && code != problem.Timeout {
					t.Fatal(err)
				}
			}
			continue
		case 8:
			_, _, err = d.RegisterApplication(t.Context(), actor, account.Application{ID: app, Name: actor, Campus: "本部"})
		case 9:
			_, err = d.StopApplication(t.Context(), actor, app, rnd.IntN(2) == 0, "")
		case 10:
			_, err = d.Enrol(t.Context(), actor, account.Enrolment{ID: signer, Name: "华佗", Department: "内科", Campus: "本部", Algorithms: []string{"SM2"}})
		case 11:
			_, err = d.StopSigner(t.Context(), actor, signer, rnd.IntN(2) == 0, "")
		case 12:
			_, err = d.RequestCertificate(t.Context(), actor, account.RequestSpec{For: "signer:" + signer, NewKey: true, Replace: true})
		case 13:
			_, err = d.LimitApplication(t.Context(), actor, app, account.Limits{Rate: rnd.IntN(99)}, "")
		}
		a := act{actor: actor, acknowledged: err == nil}
		switch problem.CodeOf(err) {
		case problem.DirectoryBehind, problem.DirectoryConflict, problem.NotFound, problem.Exists, problem.SignerUnknown:
			a.refused = err != nil
		}
		done[h] = append(done[h], a)
	}
	w.agree(t)
	made := 0
	for h, all := range done {
		outcomes := map[string]int{}
		for _, e := range changes(t, h) {
			if strings.HasSuffix(e.Kind, "/outcome") {
				outcomes[e.Actor]++
			}
		}
		for _, a := range all {
			if n := outcomes[a.actor]; a.acknowledged && n > 1 || a.refused && n > 0 || n > 1 {
				t.Errorf("%+v: %d outcomes", a, n)
			}
			made += outcomes[a.actor]
		}
	}
	if made == 0 {
		t.Error("nothing was changed")
	}
}

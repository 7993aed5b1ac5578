package account_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"yinjian/appliance/account"
	"yinjian/appliance/audit"
	"yinjian/appliance/internal/testkit"
	"yinjian/appliance/problem"
	"yinjian/hsm"
	"yinjian/ntp"
)

// staff are n people for a table.
func staff(n int) []account.Enrolment {
	all := make([]account.Enrolment, n)
	for i := range all {
		all[i] = account.Enrolment{
			ID: fmt.Sprintf("S%05d", i), Name: fmt.Sprintf("医师%d", i), Department: "心内科", Campus: "本部", Algorithms: []string{"SM2"}, Test: i%10 == 9,
		}
	}
	return all
}

func resultsOf(all []account.EnrolResult) (words []string) {
	for _, r := range all {
		words = append(words, r.Result)
	}
	return words
}

func repeated(word string, n int) []string { return slices.Repeat([]string{word}, n) }

// A batch is enrolled once; the same again changes nothing; what is different is named and not applied.
func TestEnrolAll(t *testing.T) {
	t.Parallel()
	h := testkit.New(t)
	people := staff(20)
	enrol := func(all []account.Enrolment, trial bool) []account.EnrolResult {
		t.Helper()
		r, err := h.Directory.EnrolAll(t.Context(), "admin", all, trial)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	size := h.Journal.Size()
	if got := resultsOf(enrol(people, true)); !slices.Equal(got, repeated(account.EnrolNew, 20)) || h.Journal.Size() != size || len(h.Staff.Labels()) > 0 {
		t.Errorf("a trial: %v, %d entries", got, h.Journal.Size()-size)
	}
	if got := resultsOf(enrol(people, false)); !slices.Equal(got, repeated(account.EnrolDone, 20)) {
		t.Errorf("enrolled: %v", got)
	}
	if n := h.Journal.Size() - size; n != 40 {
		t.Errorf("%d entries, want an intent and an outcome each", n)
	}
	for _, restarted := range []bool{false, true} {
		if restarted {
			h.Restart()
		}
		for _, e := range people {
			g, key, err := h.Directory.ActiveSigner(e.ID, "SM2")
			if err != nil || g.Test != e.Test || g.Name != e.Name || key.Path[0].Subject.CommonName != e.Name {
				t.Errorf("restarted %v: %+v, %v", restarted, g, err)
			}
		}
		size := h.Journal.Size()
		if got := resultsOf(enrol(people, false)); !slices.Equal(got, repeated(account.EnrolPresent, 20)) || h.Journal.Size() != size || len(h.Staff.Labels()) != 20 {
			t.Errorf("restarted %v, again: %v, %d entries, %d keys", restarted, got, h.Journal.Size()-size, len(h.Staff.Labels()))
		}
	}
	if _, err := h.Directory.StopSigner(t.Context(), "admin", "S00003", true, ""); err != nil {
		t.Fatal(err)
	}
	changed := staff(4)
	changed[0].Name, changed[0].Department = "张三", "外科"
	changed[1].Algorithms = []string{"SM2", "RSA-2048"}
	changed[2].Test = true
	size = h.Journal.Size()
	want := []account.EnrolResult{
		{Result: account.EnrolDiffers, Differences: []account.SignerDifference{{Field: "name", Have: "医师0", Want: "张三"}, {Field: "department", Have: "心内科", Want: "外科"}}},
		{Result: account.EnrolDiffers, Differences: []account.SignerDifference{{Field: "algorithms", Have: "SM2", Want: "RSA-2048 SM2"}}},
		{Result: account.EnrolDiffers, Differences: []account.SignerDifference{{Field: "test", Have: "false", Want: "true"}}},
		{Result: account.EnrolDiffers, Differences: []account.SignerDifference{{Field: "stopped", Have: "true", Want: "false"}}},
	}
	if diff := cmp.Diff(want, enrol(changed, false)); diff != "" || h.Journal.Size() != size {
		t.Errorf("changed rows: %d entries, %s", h.Journal.Size()-size, diff)
	}
}

// Rows that must not come in are refused one by one, the rest goes on, and a trial says the same as the act.
func TestEnrolAllRefuses(t *testing.T) {
	t.Parallel()
	h := testkit.New(t)
	h.Doctor("D001", "SM2")
	spoils := []func(*account.Enrolment){
		func(e *account.Enrolment) { e.ID = "张三" },
		func(e *account.Enrolment) { e.ID = "1" },
		func(e *account.Enrolment) { e.ID = "../etc" },
		func(e *account.Enrolment) { e.ID = "d001" }, // D001 but for case
		func(e *account.Enrolment) { e.ID = "S00000" },
		func(e *account.Enrolment) { e.Name = "" },
		func(e *account.Enrolment) { e.Name = "张\u202e三" },
		func(e *account.Enrolment) { e.Name = "张\u200b三" },
		func(e *account.Enrolment) { e.Name = "张\x00三" },
		func(e *account.Enrolment) { e.Name = "=HYPERLINK(\"http://x\")" },
		func(e *account.Enrolment) { e.Department = "+外科" },
		func(e *account.Enrolment) { e.Department = "－外科" },
		func(e *account.Enrolment) { e.Campus = "@本部" },
		func(e *account.Enrolment) { e.Campus = strings.Repeat("院", 22) },
		func(e *account.Enrolment) { e.Role = "主任\n医师" },
		func(e *account.Enrolment) { e.Algorithms = []string{"SM9"} },
		func(e *account.Enrolment) { e.PIN = testkit.PIN },
	}
	all := staff(len(spoils) + 2)
	for i, spoil := range spoils {
		spoil(&all[i+1])
	}
	for _, trial := range []bool{true, false} {
		got, err := h.Directory.EnrolAll(t.Context(), "admin", all, trial)
		if err != nil {
			t.Fatal(err)
		}
		good := map[bool]string{true: account.EnrolNew, false: account.EnrolDone}[trial]
		for i, r := range got {
			if i == 0 || i == len(all)-1 {
				if r.Result != good {
					t.Errorf("trial %v, good row %d: %+v", trial, i, r)
				}
				continue
			}
			if code := problem.CodeOf(r.Err); r.Result != account.EnrolRefused || code != problem.InvalidRequest && code != problem.Exists {
				t.Errorf("trial %v, row %d: %+v", trial, i, r)
			}
		}
	}
	if n := len(h.Directory.Signers()); n != 3 {
		t.Errorf("%d signers", n)
	}
	_, err := h.Directory.EnrolAll(t.Context(), "admin", staff(account.MaxEnrolments+1), false)
	wants(t, "too many", err, problem.InvalidRequest)
	h.Clock.State(ntp.Untrusted)
	_, err = h.Directory.EnrolAll(t.Context(), "admin", staff(30)[20:], false)
	wants(t, "without trusted time", err, problem.TimeUntrusted)
}

// everyThird key is not made.
func everyThird(err error) func(call, label string) error {
	var n atomic.Int32
	return func(call, _ string) error {
		if call == "GenerateKey" && n.Add(1)%3 == 0 {
			return err
		}
		return nil
	}
}

// Whatever fails, for some of a batch or for all, and whether or not its effect is there: run again, with or without a
// restart in between, everybody is enrolled once, and no key is left over.
func TestEnrolAllCrashPoints(t *testing.T) {
	t.Parallel()
	gone := &hsm.Error{Call: "C_GenerateKeyPair", RV: 0x32}
	some := func(h *testkit.House, kind string, landed bool, err error) { h.Journal.FailKind(kind, 3, landed, err) }
	for name, fail := range map[string]func(*testkit.House){
		"intents not written":    func(h *testkit.House) { some(h, "account.signer/intent", false, audit.ErrJournalUnwritable) },
		"intents, answers lost":  func(h *testkit.House) { some(h, "account.signer/intent", true, audit.ErrOutcomeUnknown) },
		"keys not made":          func(h *testkit.House) { h.Staff.Before(everyThird(gone)) },
		"a key, answer lost":     func(h *testkit.House) { h.Staff.After(failCall("GenerateKey", "/SM2", hsm.ErrDeadline)) },
		"no certificates":        func(h *testkit.House) { h.CA.Before(failCall("Do", "ca/SM2", gone)) },
		"outcomes not written":   func(h *testkit.House) { some(h, "account.signer/outcome", false, audit.ErrJournalUnwritable) },
		"outcomes, answers lost": func(h *testkit.House) { some(h, "account.signer/outcome", true, audit.ErrOutcomeUnknown) },
		"outcomes unknown":       func(h *testkit.House) { some(h, "account.signer/outcome", false, audit.ErrOutcomeUnknown) },
	} {
		for _, restart := range []bool{true, false} {
			t.Run(fmt.Sprint(name, ", restart ", restart), func(t *testing.T) {
				t.Parallel()
				h := testkit.New(t)
				fail(h)
				first, err := h.Directory.EnrolAll(t.Context(), "admin", staff(12), false)
				if err == nil && !slices.Contains(resultsOf(first), account.EnrolNotTried) {
					t.Fatalf("nothing failed: %v", resultsOf(first))
				}
				h.Journal.Fault(nil)
				h.Staff.Before(nil)
				h.Staff.After(nil)
				h.CA.Before(nil)
				if restart {
					h.Restart()
				}
				second, err := h.Directory.EnrolAll(t.Context(), "admin", staff(12), false)
				if err != nil {
					t.Fatal(err)
				}
				for i, r := range second {
					if r.Result != account.EnrolDone && r.Result != account.EnrolPresent || i < len(first) && first[i].Result == account.EnrolDone && r.Result != account.EnrolPresent {
						t.Errorf("row %d: first %+v, then %+v", i, first[i], r)
					}
				}
				for _, restarted := range []bool{false, true} {
					if restarted {
						h.Restart()
					}
					if labels, signers := len(h.Staff.Labels()), len(h.Directory.Signers()); labels != 12 || signers != 12 {
						t.Errorf("restarted %v: %d signers with %d keys", restarted, signers, labels)
					}
				}
			})
		}
	}
}

// Whoever asks for a batch and goes away leaves no key behind that comes when everything was cleared away.
func TestEnrolAllCallerGone(t *testing.T) {
	t.Parallel()
	h := testkit.New(t)
	ctx, cancel := context.WithCancel(t.Context())
	h.Staff.Before(func(call, _ string) error {
		if call == "GenerateKey" {
			cancel()
		}
		return nil
	})
	r, err := h.Directory.EnrolAll(ctx, "admin", staff(20), false)
	if err != nil || !slices.Contains(resultsOf(r), account.EnrolNotTried) {
		t.Fatalf("%v, %v", resultsOf(r), err)
	}
	h.Staff.Before(nil)
	if r, err = h.Directory.EnrolAll(t.Context(), "admin", staff(20), false); err != nil || slices.Contains(resultsOf(r), account.EnrolNotTried) {
		t.Fatalf("%v, %v", resultsOf(r), err)
	}
	if err := h.Staff.Land(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.Restart()
	if labels, signers := len(h.Staff.Labels()), len(h.Directory.Signers()); labels != 20 || signers != 20 {
		t.Errorf("%d signers with %d keys", signers, labels)
	}
}

// While keys of a batch are being made, others change the directory: nobody clears those keys away as left over, and the
// same people in another batch are enrolled once.
func TestEnrolAllWhileOthersChange(t *testing.T) {
	t.Parallel()
	h := testkit.New(t)
	var once atomic.Bool
	var inside error
	h.Staff.After(func(call, label string) error {
		if call == "GenerateKey" && strings.HasPrefix(label, "staff/S") && once.CompareAndSwap(false, true) {
			h.Doctor("D001", "SM2") // settles what is left over
			_, inside = h.Directory.EnrolAll(context.Background(), "admin", staff(6), false)
		}
		return nil
	})
	r, err := h.Directory.EnrolAll(t.Context(), "admin", staff(12), false)
	if err = errors.Join(err, inside); err != nil {
		t.Fatal(err)
	}
	for i, one := range r {
		if i < 6 != (problem.CodeOf(one.Err) == problem.Exists) || i >= 6 && one.Result != account.EnrolDone {
			t.Errorf("row %d: %+v", i, one)
		}
	}
	h.Restart() // the keys of those who came second are left over, and cleared away now
	if labels, signers := len(h.Staff.Labels()), len(h.Directory.Signers()); labels != 13 || signers != 13 {
		t.Errorf("%d signers with %d keys", signers, labels)
	}
	for _, g := range h.Directory.Signers() {
		if _, _, err := h.Directory.ActiveSigner(g.ID, "SM2"); err != nil {
			t.Error(err)
		}
	}
}

// What a signature costs does not grow with the number of signers: calls of the cipher machine and of the journal, and
// what is allocated. YINJIAN_LONG=1 takes 6,300.
func TestCostOfOneOfMany(t *testing.T) {
	few, many := 20, 500
	if os.Getenv("YINJIAN_LONG") != "" {
		few, many = 100, 6300
	}
	type cost struct{ Keys, Entries, Allocations float64 } // of a signature
	costs := map[int]cost{}
	h := testkit.New(t)
	app := h.App("his", nil)
	enrolled := 0
	for _, n := range []int{few, many} {
		for all := staff(n)[enrolled:]; len(all) > 0; all = all[min(len(all), account.MaxEnrolments):] {
			part := all[:min(len(all), account.MaxEnrolments)]
			if _, err := h.Directory.EnrolAll(t.Context(), "admin", part, false); err != nil {
				t.Fatal(err)
			}
		}
		enrolled = n
		if got := len(h.Directory.Signers()); got != n {
			t.Fatalf("%d signers, want %d", got, n)
		}
		i := 0
		sign := func() {
			h.Sign(app, testkit.Request(fmt.Sprintf("%d/%d", n, i), fmt.Sprintf("S%05d", i*7919%n)))
			i++
		}
		for range min(n, 100) { // what each signer costs once is not looked at
			sign()
		}
		const runs = 100
		before := cost{Keys: float64(h.Staff.Calls("Do")), Entries: float64(h.Journal.Size())}
		i = 0
		allocations := testing.AllocsPerRun(runs-1, func() { // and once to warm up
			h.Sign(app, testkit.Request(fmt.Sprintf("%d/again/%d", n, i), fmt.Sprintf("S%05d", i*7919%n)))
			i++
		})
		costs[n] = cost{(float64(h.Staff.Calls("Do")) - before.Keys) / runs, (float64(h.Journal.Size()) - before.Entries) / runs, allocations}
	}
	// Checkpoints come by the clock, and allocate too.
	if diff := cmp.Diff(costs[few], costs[many], cmpopts.IgnoreFields(cost{}, "Allocations")); diff != "" {
		t.Errorf("one of %d and one of %d: %s", few, many, diff)
	}
	if a, b := costs[few].Allocations, costs[many].Allocations; b > 1.25*a {
		t.Errorf("a signature allocates %.0f times for one of %d, %.0f for one of %d", a, few, b, many)
	}
	t.Logf("%+v", costs)
}

// In bulk, keys are custody keys where those are the policy, and wait for another CA's certificates where that is asked for.
func TestEnrolAllInCustody(t *testing.T) {
	t.Parallel()
	v := newVault(t)
	people := staff(12)
	for i := range people {
		people[i].External = i%2 == 1
	}
	r, err := v.Directory.EnrolAll(t.Context(), "admin", people, false)
	if err != nil || !slices.Equal(resultsOf(r), repeated(account.EnrolDone, 12)) || len(v.Staff.Labels()) > 0 {
		t.Fatalf("%v, %v, keys in the machine: %q", resultsOf(r), err, v.Staff.Labels())
	}
	for _, restarted := range []bool{false, true} {
		if restarted {
			v.Restart()
		}
		for i, e := range people {
			err := v.sign(t, fmt.Sprintf("%v/%d", restarted, i), e.ID, "")
			if e.External {
				wants(t, "a key without a certificate", err, problem.CertificateAwaited)
			} else if err != nil {
				t.Error(err)
			}
			if g, _ := v.Directory.Signer(e.ID); v.Directory.View(g).Custody != "token" {
				t.Errorf("%s is not in custody", e.ID)
			}
		}
	}
	if q, err := v.Directory.RequestCertificate(t.Context(), "admin", account.RequestSpec{For: "signer:S00001"}); err != nil || len(q.CSR) == 0 {
		t.Errorf("a request for the other CA: %v", err)
	}
}

// Custody keys that the cipher machine alone opens are opened once each, of however many signers.
func TestCustodyOfMany(t *testing.T) {
	if os.Getenv("YINJIAN_LONG") == "" {
		t.Skip("YINJIAN_LONG=1")
	}
	const people = 1500
	v := newVault(t)
	for part := range slices.Chunk(staff(people), account.MaxEnrolments) {
		if _, err := v.Directory.EnrolAll(t.Context(), "admin", part, false); err != nil {
			t.Fatal(err)
		}
	}
	var opened atomic.Int64
	v.Log.Before(func(_, label string) error {
		if label == account.PINKeyLabel {
			opened.Add(1)
		}
		return nil
	})
	for round, want := range []int64{people, people} {
		for i := range people {
			if err := v.sign(t, fmt.Sprintf("%d/%d", round, i), fmt.Sprintf("S%05d", i), ""); err != nil {
				t.Fatal(err)
			}
		}
		if n := opened.Load(); n != want {
			t.Errorf("round %d: %d were opened, want %d", round, n, want)
		}
	}
}

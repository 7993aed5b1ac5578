package account_test

import (
	"errors"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"yinjian/appliance/account"
	"yinjian/appliance/audit"
	"yinjian/appliance/internal/testkit"
	"yinjian/appliance/problem"
	"yinjian/hsm"
)

// A key is destroyed in the cipher machine once the destruction is decided on and journalled, not before: while the other campus
// wins the version, or nobody can say who has, the key is there and signs.
func TestDestroyedAfterDecision(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	leaves := func(t *testing.T, w *campuses) (label string) {
		t.Helper()
		w.a.App("his", nil)
		label = w.a.Doctor("D001", "SM2").Keys[0].Label
		if _, err := w.a.Directory.StopSigner(ctx, "admin", "D001", true, "离职"); err != nil {
			t.Fatal(err)
		}
		w.exchange(t)
		return label
	}
	for name, c := range map[string]struct {
		landed, lost bool
		code         problem.Code
	}{
		"the other campus starts the signer": {false, true, problem.DirectoryConflict},
		"the centre is away":                 {false, false, problem.CentreUnavailable},
		"its answer is lost":                 {true, false, problem.CentreUnavailable},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newCampuses(t)
			label := leaves(t, w)
			var once atomic.Bool
			w.centre.Fault(func(call string) (bool, error) {
				switch {
				case call != "decide" || !once.CompareAndSwap(false, true):
					return true, nil
				case !c.lost:
					return c.landed, testkit.ErrCentre
				}
				if _, err := w.b.Directory.StopSigner(ctx, "admin", "D001", false, "返聘"); err != nil {
					t.Error(err)
				}
				return true, nil
			})
			wants(t, "destroying", w.a.Directory.DestroyKey(ctx, "admin", label, "离职"), c.code)
			w.a.Restart()
			w.agree(t)
			if err := w.a.Directory.Erase(ctx); err != nil || !slices.Contains(w.a.Staff.Labels(), label) || len(w.a.Directory.Doomed()) > 0 {
				t.Fatalf("%v; the machine has %v", err, w.a.Staff.Labels())
			}
			if g, _ := w.a.Directory.Signer("D001"); g.Stopped {
				if _, err := w.a.Directory.StopSigner(ctx, "admin", "D001", false, "返聘"); err != nil {
					t.Fatal(err)
				}
			}
			signs(t, w.a, "back", "D001", "")
		})
	}
	// Once it is decided nobody uses the key; the machine is asked until it has destroyed it, over a restart too.
	for name, restart := range map[string]bool{"the machine is away": false, "a stop before the machine": true, "a stop after the machine": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newCampuses(t)
			label := leaves(t, w)
			if name == "a stop after the machine" {
				w.a.Journal.FailKind("key.erasure/outcome", 1, false, errors.New("power"))
			} else {
				w.a.Staff.Before(func(call, _ string) error {
					if call == "DestroyKey" {
						return &hsm.Error{Call: "C_DestroyObject", RV: 0x32}
					}
					return nil
				})
			}
			wants(t, "destroying", w.a.Directory.DestroyKey(ctx, "admin", label, "离职"), problem.HSMUnavailable)
			wants(t, "once more", w.a.Directory.DestroyKey(ctx, "admin", label, "离职"), problem.KeyUnknown)
			if got := w.a.Directory.Doomed(); !slices.Equal(got, []string{label}) {
				t.Errorf("doomed are %v", got)
			}
			if restart {
				w.a.Restart()
			}
			if err := w.a.Directory.Erase(ctx); name != "a stop after the machine" && (err == nil || len(w.a.Directory.Doomed()) != 1) {
				t.Error("the machine is away, and the key is destroyed")
			}
			w.a.Staff.Before(nil)
			w.a.Journal.Fault(nil)
			if err := w.a.Directory.Erase(ctx); err != nil || slices.Contains(w.a.Staff.Labels(), label) {
				t.Errorf("%v; the machine has %v", err, w.a.Staff.Labels())
			}
			w.a.Restart()
			if got := w.a.Directory.Doomed(); len(got) > 0 {
				t.Errorf("after the next start: %v", got)
			}
			w.agree(t)
		})
	}
}

// A key that the cipher machine does not destroy keeps no other from being destroyed; each that stays is named.
func TestEraseGoesOn(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	h := testkit.New(t)
	h.App("his", nil)
	var labels []string
	for _, id := range []string{"D001", "D002", "D003"} {
		labels = append(labels, h.Doctor(id, "SM2").Keys[0].Label)
		if _, err := h.Directory.StopSigner(ctx, "admin", id, true, "离职"); err != nil {
			t.Fatal(err)
		}
	}
	slices.Sort(labels)
	stuck := labels
	h.Staff.Before(func(call, label string) error {
		if call == "DestroyKey" && slices.Contains(stuck, label) {
			return &hsm.Error{Call: "C_DestroyObject", RV: 0x32}
		}
		return nil
	})
	for _, label := range labels[:2] {
		wants(t, "destroying "+label, h.Directory.DestroyKey(ctx, "admin", label, "离职"), problem.HSMUnavailable)
	}
	stuck = labels[:2]
	if err := h.Directory.DestroyKey(ctx, "admin", labels[2], "离职"); err != nil { // the others' trouble is not its own
		t.Error(err)
	}
	if err := h.Directory.Erase(ctx); err == nil || !strings.Contains(err.Error(), labels[0]) || !strings.Contains(err.Error(), labels[1]) {
		t.Errorf("%v does not name %v", err, stuck)
	}
	stuck = labels[:1]
	if err := h.Directory.Erase(ctx); err == nil || !slices.Equal(h.Directory.Doomed(), stuck) || slices.Contains(h.Staff.Labels(), labels[1]) {
		t.Errorf("%v; left are %v, the machine has %v", err, h.Directory.Doomed(), h.Staff.Labels())
	}
}

// What the other campus sends destroys nothing in this appliance's cipher machine, whatever it says of this appliance's keys.
func TestOthersDestroyNothing(t *testing.T) {
	t.Parallel()
	w := newCampuses(t)
	label := w.b.Doctor("D001", "SM2").Keys[0].Label
	w.exchange(t)
	d := audit.Draft{
		Kind: "key.destruction/outcome", Object: "signer:D001", Actor: "somebody", State: true, Fields: []audit.Field{{Name: "decided.version", Value: audit.Int(2)}},
		Payloads: []audit.Attachment{{Name: "object", MediaType: "application/json", Data: []byte(`{"owner":"signer:D001","label":"` + label + `"}`)}},
	}
	if _, err := w.a.Journal.Append(t.Context(), d); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, err := w.b.Take(w.a); err != nil {
			t.Fatal(err)
		}
		i := slices.IndexFunc(w.b.Directory.KeyRecords(), func(r account.KeyRecord) bool { return r.Label == label })
		if w.b.Directory.KeyRecords()[i].Destroyed.IsZero() {
			t.Fatal("the entry had no effect: nothing is tried here")
		}
		if err := w.b.Directory.Erase(t.Context()); err != nil || !slices.Contains(w.b.Staff.Labels(), label) {
			t.Errorf("%v; the machine has %v", err, w.b.Staff.Labels())
		}
		w.b.Restart()
	}
}

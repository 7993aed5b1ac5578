package softtoken_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/miekg/pkcs11"
)

// A search for a label finds what a look at all objects finds, whatever was made, renamed, destroyed and locked away
// before, and looks at no other objects.
func TestSearchByLabel(t *testing.T) {
	t.Parallel()
	m, p, s := loggedIn(t)
	labels := []string{"a", "b", "c", ""}
	check := func(when string) {
		t.Helper()
		want := map[string][]pkcs11.ObjectHandle{}
		for _, h := range find(t, p, s) {
			got, err := p.GetAttributeValue(s, h, []*pkcs11.Attribute{attr(pkcs11.CKA_LABEL, nil)})
			must(t, err)
			want[string(got[0].Value)] = append(want[string(got[0].Value)], h)
		}
		for _, l := range labels {
			if got := find(t, p, s, attr(pkcs11.CKA_LABEL, l)); !slices.Equal(got, want[l]) {
				t.Fatalf("%s: label %q: found %v, want %v", when, l, got, want[l])
			}
		}
		both := find(t, p, s, attr(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY), attr(pkcs11.CKA_LABEL, "a"))
		if slices.ContainsFunc(both, func(h pkcs11.ObjectHandle) bool { return !slices.Contains(want["a"], h) }) {
			t.Fatalf("%s: private keys labelled a: %v of %v", when, both, want["a"])
		}
	}
	random := rand.New(rand.NewPCG(1, 2))
	label := func() string { return labels[random.IntN(len(labels))] }
	for i := range 120 {
		all := find(t, p, s)
		var what string
		switch n := random.IntN(10); {
		case n < 4 || len(all) == 0:
			what = "generated"
			generateSM2(t, p, s, label())
		case n < 6:
			what = "renamed"
			must(t, p.SetAttributeValue(s, all[random.IntN(len(all))], []*pkcs11.Attribute{attr(pkcs11.CKA_LABEL, label())}))
		case n < 8:
			what = "destroyed"
			must(t, p.DestroyObject(s, all[random.IntN(len(all))]))
		case n < 9:
			what = "a session object"
			_, err := p.CreateObject(s, []*pkcs11.Attribute{attr(pkcs11.CKA_CLASS, pkcs11.CKO_DATA), attr(pkcs11.CKA_TOKEN, false), attr(pkcs11.CKA_LABEL, label())})
			if err != nil { // not every object can be made from outside
				what = "nothing"
			}
		default:
			what = "logged out and in"
			must(t, p.Logout(s))
			check(fmt.Sprint(i, " logged out"))
			must(t, p.Login(s, pkcs11.CKU_USER, userPIN))
		}
		check(fmt.Sprint(i, " ", what))
	}

	generateSM2(t, p, s, "one")
	for i := range 100 {
		generateSM2(t, p, s, fmt.Sprint("other ", i))
	}
	if n := m.server.Labelled(0, "one"); n != 2 {
		t.Errorf("a search among many looks at %d objects, want a key's two halves", n)
	}
}

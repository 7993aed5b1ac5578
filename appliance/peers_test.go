package appliance_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"testing"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/smx509"

	"yinjian/appliance"
	"yinjian/appliance/audit"
	"yinjian/appliance/internal/testkit"
)

// The last of the numbered entries is found whatever their number, beside those about another node and of another kind.
func TestLastNumbered(t *testing.T) {
	t.Parallel()
	j := testkit.New(t).Journal.Journal
	last := func(want uint64, node string) {
		t.Helper()
		n, rec, err := appliance.LastNumbered(t.Context(), j, "test.numbered", node)
		if err != nil || n != want || (rec == nil) != (want == 0) {
			t.Fatalf("LastNumbered = %d, %v, %v, want %d", n, rec, err, want)
		}
		if rec != nil && rec.Entry.Object != fmt.Sprint(want-1) {
			t.Fatalf("the last is %s, want %d", rec.Entry.Object, want-1)
		}
	}
	last(0, "b")
	for n := range uint64(70) {
		d := audit.Draft{Kind: "test.numbered", Object: fmt.Sprint(n), Ref: appliance.Numbered("test.numbered", "b", n), Unique: true}
		if _, err := j.Append(t.Context(), d); err != nil {
			t.Fatal(err)
		}
		if n < 3 {
			d.Ref = appliance.Numbered("test.numbered", "c", n)
			if _, err := j.Append(t.Context(), d); err != nil {
				t.Fatal(err)
			}
		}
		last(n+1, "b")
		last(min(n+1, 3), "c")
	}
	if n, _, err := appliance.LastNumbered(t.Context(), j, "test.other", "b"); n != 0 || err != nil {
		t.Errorf("of another kind: %d, %v", n, err)
	}
}

// testCard is a card with its key.
func testCard(t testing.TB) (*appliance.PeerCard, *sm2.PrivateKey) {
	t.Helper()
	key, err := sm2.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	spki := func(pub any) []byte {
		b, err := smx509.MarshalPKIXPublicKey(pub)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	line, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return &appliance.PeerCard{
		Format: "yinjian-peer-card/1", Node: "binhai-1", Campus: "滨海", Epoch: "0102030405060708", LogKey: spki(&key.PublicKey), PeerKey: spki(&line.PublicKey),
		Address: "10.1.0.10:8445", CAs: [][]byte{}, Objects: []string{"application his"}, IssuedAt: "2026-11-22T10:00:00Z",
	}, key
}

func cardFile(t testing.TB, c *appliance.PeerCard, key *sm2.PrivateKey) []byte {
	t.Helper()
	b, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	sig, err := key.SignWithSM2(rand.Reader, nil, append([]byte("yinjian/peer/card/v1\x00"), b...))
	if err != nil {
		t.Fatal(err)
	}
	file, err := appliance.PeerCardFile(b, sig)
	if err != nil {
		t.Fatal(err)
	}
	return file
}

func TestPeerCard(t *testing.T) {
	t.Parallel()
	c, key := testCard(t)
	good := cardFile(t, c, key)
	if got, err := appliance.ParsePeerCard(good); err != nil || got.Node != "binhai-1" {
		t.Fatalf("ParsePeerCard = %+v, %v", got, err)
	}
	_, other := testCard(t)
	for name, file := range map[string][]byte{
		"empty": nil, "no JSON": []byte("card"), "more after it": append(bytes.Clone(good), "{}"...), "signed by another key": cardFile(t, c, other),
		"unknown member": bytes.Replace(good, []byte(`"card"`), []byte(`"x": 1, "card"`), 1),
	} {
		if _, err := appliance.ParsePeerCard(file); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	for name, change := range map[string]func(*appliance.PeerCard){
		"another format":  func(c *appliance.PeerCard) { c.Format = "yinjian-peer-card/2" },
		"no node":         func(c *appliance.PeerCard) { c.Node = "" },
		"no campus":       func(c *appliance.PeerCard) { c.Campus = "" },
		"epoch":           func(c *appliance.PeerCard) { c.Epoch = "1" },
		"log key":         func(c *appliance.PeerCard) { c.LogKey = c.PeerKey },
		"peer key":        func(c *appliance.PeerCard) { c.PeerKey = []byte{1} },
		"address":         func(c *appliance.PeerCard) { c.Address = "10.1.0.10" },
		"no host":         func(c *appliance.PeerCard) { c.Address = ":8445" },
		"no certificates": func(c *appliance.PeerCard) { c.CAs = [][]byte{{1}} },
	} {
		bad := *c
		change(&bad)
		if _, err := appliance.ParsePeerCard(cardFile(t, &bad, key)); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
}

func TestPeerFingerprint(t *testing.T) {
	t.Parallel()
	f := appliance.PeerCardFingerprint([]byte("card"))
	if len(f) != 39 || f == appliance.PeerCardFingerprint([]byte("cart")) {
		t.Errorf("fingerprint %q", f)
	}
	for heard, want := range map[string]bool{"01AB 23cd": true, "01ab-23cd": true, "01:ab:23:cd": true, "01ab23ce": false, "01ab23": false, "": false} {
		if appliance.SameFingerprint("01ab 23cd", heard) != want {
			t.Errorf("%q is the same: %v", heard, !want)
		}
	}
}

func FuzzPeerCard(f *testing.F) {
	c, key := testCard(f)
	f.Add(cardFile(f, c, key))
	f.Add([]byte(`{"card":"e30=","signature":""}`))
	f.Fuzz(func(t *testing.T, file []byte) {
		if c, err := appliance.ParsePeerCard(file); err == nil && (c.Node == "" || len(c.LogKey) == 0) {
			t.Errorf("a card without a name or key is taken: %+v", c)
		}
	})
}

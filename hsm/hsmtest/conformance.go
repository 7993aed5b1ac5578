// Package hsmtest has cipher machines for tests, and the suite that every hsm.Token must pass ([Conform]): what the
// comments of hsm.Token promise, whatever module drives the token and whether a worker lies between. Judges are gmsm and
// crypto/rsa.
package hsmtest

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/hmac"
	"crypto/rsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/sm3"
	"golang.org/x/sync/errgroup"

	"yinjian/hsm"
)

// A Subject is a token that must conform.
type Subject struct {
	// Open answers the token logged in, again and again; the one before was closed.
	Open       func(t testing.TB) hsm.Token
	Label      string          // CK_TOKEN_INFO
	Algorithms []hsm.Algorithm // that it makes keys of
	Operations []hsm.Operation // that it performs
	KEK        string          // label of a trusted wrapping key on the token; "": it cannot wrap
	NoRandom   bool            // the profile avoids C_GenerateRandom
	Counts     bool            // the token counts signatures
	// Fragile: making keys while another session lists them goes wrong in the module now and then (SoftHSM 2.6.1 answers
	// CKR_GENERAL_ERROR, openCryptoki 3.8.1 has a key twice).
	Fragile bool
	// Lent: Close leaves what is below to its owner (hsm/pool).
	Lent bool
	// Twin makes an RSA key pair of that label behind the Token's back, so that two have it; nil: nobody can.
	Twin func(t testing.TB, label string)
}

// A conformer is a Subject under test.
type conformer struct {
	Subject
	token hsm.Token
}

// algorithmOf is what key an operation wants.
var algorithmOf = map[hsm.Operation]hsm.Algorithm{hsm.SignSM2E: hsm.SM2, hsm.SignSM2M: hsm.SM2, hsm.SignRSASHA256: hsm.RSA2048,
	hsm.SignRSAPSSSHA256: hsm.RSA2048, hsm.MACSM3: hsm.HMACSM3}

// kindOf is a for algorithmOf: what a key of 3072 bits does is what one of 2048 does.
func kindOf(a hsm.Algorithm) hsm.Algorithm {
	if a == hsm.RSA3072 {
		return hsm.RSA2048
	}
	return a
}

var allOperations = []hsm.Operation{hsm.SignSM2E, hsm.SignSM2M, hsm.SignRSASHA256, hsm.SignRSAPSSSHA256, hsm.MACSM3}

// Conform holds a token against the promises of hsm.Token. Keys that it makes are destroyed.
func Conform(t *testing.T, s Subject) {
	c := &conformer{Subject: s, token: s.Open(t)}
	t.Cleanup(func() { c.token.Close() }) // the one that is open then
	for _, p := range []struct {
		name string
		test func(*testing.T)
	}{
		{"info", c.info}, {"random", c.random}, {"keys", c.keys}, {"labels", c.labels}, {"operations", c.operations},
		{"ambiguous", c.ambiguous}, {"wrapped", c.wrapped}, {"imported", c.imported}, {"concurrent", c.concurrent}, {"cancelled", c.cancelled}, {"closed", c.closed},
	} {
		t.Run(p.name, p.test)
	}
}

// key makes a key that goes at the test's end.
func (c *conformer) key(t *testing.T, label string, a hsm.Algorithm) hsm.KeyInfo {
	t.Helper()
	info, err := c.token.GenerateKey(t.Context(), hsm.KeySpec{Label: label, Algorithm: a})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.token.DestroyKey(context.Background(), label); err != nil && !errors.Is(err, hsm.ErrKeyNotFound) {
			t.Errorf("DestroyKey(%q) = %v", label, err)
		}
	})
	return info
}

// can answers the operations on keys of one algorithm.
func (c *conformer) can(a hsm.Algorithm) (ops []hsm.Operation) {
	for _, op := range c.Operations {
		if algorithmOf[op] == kindOf(a) {
			ops = append(ops, op)
		}
	}
	return ops
}

// quickest is an algorithm whose keys are quickly made, and that can do something.
func (c *conformer) quickest() hsm.Algorithm {
	for _, a := range []hsm.Algorithm{hsm.HMACSM3, hsm.SM2} {
		if slices.Contains(c.Algorithms, a) && len(c.can(a)) > 0 {
			return a
		}
	}
	return hsm.RSA2048
}

// do performs an operation on text, and judges the answer.
func do(ctx context.Context, token hsm.Token, info hsm.KeyInfo, op hsm.Operation, text string) error {
	sum := sha256.Sum256([]byte(text))
	data := sum[:]
	if op == hsm.SignSM2M || op == hsm.MACSM3 {
		data = []byte(text)
	}
	answer, err := token.Do(ctx, info.Label, op, data)
	if err != nil {
		return err
	}
	return judge(info, op, data, answer)
}

// judge verifies what an operation answered.
func judge(info hsm.KeyInfo, op hsm.Operation, data, answer []byte) error {
	var err error
	switch op {
	case hsm.SignRSASHA256:
		err = rsa.VerifyPKCS1v15(info.Public.(*rsa.PublicKey), crypto.SHA256, data, answer)
	case hsm.SignRSAPSSSHA256:
		err = rsa.VerifyPSS(info.Public.(*rsa.PublicKey), crypto.SHA256, data, answer, &rsa.PSSOptions{SaltLength: sha256.Size})
	case hsm.MACSM3:
		if len(answer) != 32 {
			err = fmt.Errorf("a MAC of %d bytes", len(answer))
		}
	default:
		r, s, nerr := hsm.NormalizeSM2(answer)
		if nerr != nil {
			return nerr
		}
		pub := info.Public.(*ecdsa.PublicKey)
		ok := sm2.Verify(pub, data, r, s)
		if op == hsm.SignSM2M {
			der, derr := hsm.MarshalSM2(r, s)
			ok = derr == nil && sm2.VerifyASN1WithSM2(pub, nil, data, der)
		}
		if !ok {
			err = errors.New("gmsm does not verify the signature")
		}
	}
	if err != nil {
		return fmt.Errorf("%s with key %q: %w", op, info.Label, err)
	}
	return nil
}

// carries fails the test unless err is of that class and has PKCS#11's return value.
func carries(t *testing.T, what string, err error, class hsm.Class) {
	t.Helper()
	var e *hsm.Error
	if !errors.As(err, &e) || e.Class() != class {
		t.Errorf("%s: %v, want a return value of class %v", what, err, class)
	}
}

func (c *conformer) info(t *testing.T) {
	info, err := c.token.Info(t.Context())
	if err != nil || info.Label != c.Label || !info.Initialized || info.Library == "" || info.Manufacturer == "" || info.UserPINLocked {
		t.Errorf("Info = %+v, %v", info, err)
	}
}

func (c *conformer) random(t *testing.T) {
	for _, n := range []int{-1, 0, 1025} {
		if b, err := c.token.Random(t.Context(), n); err == nil {
			t.Errorf("Random(%d) answered %d bytes", n, len(b))
		}
	}
	if c.NoRandom {
		_, err := c.token.Random(t.Context(), 8)
		carries(t, "Random", err, hsm.ClassPermanent)
		return
	}
	seen := map[string]bool{}
	for _, n := range []int{1, 16, 16, 1024, 1024} {
		b, err := c.token.Random(t.Context(), n)
		if err != nil || len(b) != n || n > 1 && seen[string(b)] {
			t.Errorf("Random(%d): %d bytes, %v, seen before %v", n, len(b), err, seen[string(b)])
		}
		seen[string(b)] = true
	}
}

// keys: what is generated is found and listed as what it is, stays over a Close, and is gone when it was destroyed.
func (c *conformer) keys(t *testing.T) {
	ctx := t.Context()
	before, err := c.token.Keys(ctx)
	if err != nil {
		t.Fatal(err)
	}
	var made []hsm.KeyInfo
	for i, a := range c.Algorithms {
		label := "密钥/" + string(a)
		spec := hsm.KeySpec{Label: label, Algorithm: a}
		if i == 0 {
			spec.ID = []byte{1, 0, 255}
		}
		info, err := c.token.GenerateKey(ctx, spec)
		if err != nil {
			t.Errorf("GenerateKey of %s: %v", a, err)
			continue
		}
		if info.Label != label || info.Algorithm != a || !info.Sensitive || info.Extractable ||
			i == 0 && !bytes.Equal(info.ID, spec.ID) || i > 0 && len(info.ID) != 16 {
			t.Errorf("GenerateKey = %+v", info)
		}
		switch pub := info.Public.(type) {
		case *ecdsa.PublicKey:
			if a != hsm.SM2 || !sm2.IsSM2PublicKey(pub) {
				t.Errorf("%s: a key on %v", a, pub.Curve)
			}
		case *rsa.PublicKey:
			if bits := map[hsm.Algorithm]int{hsm.RSA2048: 2048, hsm.RSA3072: 3072}[a]; pub.N.BitLen() != bits || pub.E != 65537 {
				t.Errorf("%s: a key of %d bits, exponent %d", a, pub.N.BitLen(), pub.E)
			}
		default:
			if a != hsm.HMACSM3 || info.Public != nil {
				t.Errorf("%s: a public key %T", a, pub)
			}
		}
		made = append(made, info)
	}

	// Another handle on the token sees the same.
	if err := c.token.Close(); err != nil {
		t.Errorf("Close = %v", err)
	}
	c.token = c.Open(t)
	listed, err := c.token.Keys(ctx)
	if err != nil || len(listed) != len(before)+len(made) {
		t.Errorf("Keys lists %d keys, %v; want %d", len(listed), err, len(before)+len(made))
	}
	for _, m := range made {
		found, err := c.token.FindKey(ctx, m.Label)
		if err != nil || !same(found, m) {
			t.Errorf("FindKey = %+v, %v; want %+v", found, err, m)
		}
		if !slices.ContainsFunc(listed, func(k hsm.KeyInfo) bool { return same(k, m) }) {
			t.Errorf("Keys lacks %+v", m)
		}
		// The label is taken, whatever is asked for.
		if _, err := c.token.GenerateKey(ctx, hsm.KeySpec{Label: m.Label, Algorithm: c.quickest()}); !errors.Is(err, hsm.ErrKeyExists) {
			t.Errorf("GenerateKey with the label %q again: %v, want ErrKeyExists", m.Label, err)
		}
	}
	for _, m := range made {
		for _, op := range c.can(m.Algorithm) {
			if err := do(ctx, c.token, m, op, "before"); err != nil { // its handle is known then
				t.Error(err)
			}
		}
		if err := c.token.DestroyKey(ctx, m.Label); err != nil {
			t.Errorf("DestroyKey = %v", err)
		}
		for what, err := range map[string]error{"FindKey": second(c.token.FindKey(ctx, m.Label)), "DestroyKey": c.token.DestroyKey(ctx, m.Label)} {
			if !errors.Is(err, hsm.ErrKeyNotFound) {
				t.Errorf("%s of a destroyed key: %v, want ErrKeyNotFound", what, err)
			}
		}
		for _, op := range c.can(m.Algorithm) {
			if err := do(ctx, c.token, m, op, "after"); !errors.Is(err, hsm.ErrKeyNotFound) {
				t.Errorf("%s with a destroyed key: %v, want ErrKeyNotFound", op, err)
			}
		}
	}
	if after, err := c.token.Keys(ctx); err != nil || len(after) != len(before) {
		t.Errorf("Keys lists %d keys afterwards, %v; want %d", len(after), err, len(before))
	}

	// The label is free again, and names another key.
	a := c.quickest()
	first := c.key(t, "again", a)
	if err := c.token.DestroyKey(ctx, "again"); err != nil {
		t.Error(err)
	}
	if next := c.key(t, "again", a); bytes.Equal(next.ID, first.ID) {
		t.Errorf("two keys have the ID %x", next.ID)
	}
}

func second[T any](_ T, err error) error { return err }

// same says whether two descriptions are of one key; how often it was used apart.
func same(a, b hsm.KeyInfo) bool {
	pub, ok := a.Public.(interface{ Equal(crypto.PublicKey) bool })
	return a.Label == b.Label && bytes.Equal(a.ID, b.ID) && a.Algorithm == b.Algorithm && a.Sensitive == b.Sensitive &&
		a.Extractable == b.Extractable && a.NeverExtractable == b.NeverExtractable && (!ok && b.Public == nil || ok && pub.Equal(b.Public))
}

// labels: what can be no label, and what is none.
func (c *conformer) labels(t *testing.T) {
	ctx := t.Context()
	for _, label := range []string{"", strings.Repeat("x", 129), "\xff"} {
		for what, err := range map[string]error{
			"GenerateKey": second(c.token.GenerateKey(ctx, hsm.KeySpec{Label: label, Algorithm: c.quickest()})),
			"FindKey":     second(c.token.FindKey(ctx, label)),
			"DestroyKey":  c.token.DestroyKey(ctx, label),
		} {
			if err == nil {
				t.Errorf("%s took the label %q", what, label)
			}
		}
	}
	long := strings.Repeat("长", 42) + "xx" // 128 bytes
	if info := c.key(t, long, c.quickest()); info.Label != long {
		t.Errorf("the label became %q", info.Label)
	}
	for _, op := range c.Operations {
		if _, err := c.token.Do(ctx, "never made", op, make([]byte, 32)); !errors.Is(err, hsm.ErrKeyNotFound) {
			t.Errorf("%s with a key that is not there: %v, want ErrKeyNotFound", op, err)
		}
	}
	for _, a := range []hsm.Algorithm{hsm.SM2, hsm.RSA2048, hsm.RSA3072, hsm.HMACSM3, "DES"} {
		if !slices.Contains(c.Algorithms, a) {
			carries(t, "GenerateKey of "+string(a), second(c.token.GenerateKey(ctx, hsm.KeySpec{Label: "none", Algorithm: a})), hsm.ClassPermanent)
		}
	}
	if _, err := c.token.FindKey(ctx, "none"); !errors.Is(err, hsm.ErrKeyNotFound) {
		t.Errorf("a refused GenerateKey left something: %v", err)
	}
}

// operations: each does what it should with its own kind of key and 32 bytes, and nothing else.
func (c *conformer) operations(t *testing.T) {
	ctx := t.Context()
	for _, a := range c.Algorithms {
		info := c.key(t, "op/"+string(a), a)
		for _, op := range allOperations {
			if !slices.Contains(c.Operations, op) {
				carries(t, string(op), second(c.token.Do(ctx, info.Label, op, make([]byte, 32))), hsm.ClassPermanent)
				continue
			}
			if algorithmOf[op] != kindOf(a) {
				if out, err := c.token.Do(ctx, info.Label, op, make([]byte, 32)); err == nil {
					t.Errorf("%s with a key for %s answered %x", op, a, out)
				}
				continue
			}
			for i, text := range []string{"one", "病历", strings.Repeat("long ", 100)} {
				if err := do(ctx, c.token, info, op, text); err != nil {
					t.Errorf("text %d: %v", i, err)
				}
			}
			lengths := []int{0, 31, 33}
			if op == hsm.MACSM3 || op == hsm.SignSM2M {
				lengths = nil
			}
			for _, n := range append(lengths, 512<<10+1) {
				carries(t, fmt.Sprintf("%s over %d bytes", op, n), second(c.token.Do(ctx, info.Label, op, make([]byte, n))), hsm.ClassPermanent)
			}
		}
		if slices.Contains(c.can(a), hsm.MACSM3) {
			c.mac(t, info.Label)
		}
	}
	if c.Counts && slices.Contains(c.Operations, hsm.SignSM2E) {
		c.counts(t)
	}
}

// mac: it depends on the key and on every byte, of none and of 512 KiB, and on nothing else.
func (c *conformer) mac(t *testing.T, label string) {
	seen := map[string]string{}
	other := c.key(t, "op/other mac", hsm.HMACSM3).Label
	for _, n := range []int{0, 1, 63, 64, 65, 512 << 10} {
		for _, key := range []string{label, other} {
			what := fmt.Sprintf("%q, %d bytes", key, n)
			data := make([]byte, n)
			mac, err := c.token.Do(t.Context(), key, hsm.MACSM3, data)
			again, err2 := c.token.Do(t.Context(), key, hsm.MACSM3, data)
			if err != nil || err2 != nil || len(mac) != 32 || !bytes.Equal(mac, again) || seen[string(mac)] != "" {
				t.Errorf("%s: %x then %x (%v, %v); also of %q", what, mac, again, err, err2, seen[string(mac)])
			}
			seen[string(mac)] = what
		}
	}
}

// imported: a MAC key whose value is known, as a ceremony brings it, answers HMAC-SM3 under the value on every token alike,
// cannot be read or leave, and takes nobody's label. A token without HMAC-SM3 says so and keeps nothing.
func (c *conformer) imported(t *testing.T) {
	token, ok := c.token.(interface {
		ImportMAC(ctx context.Context, label string, value []byte) error
	})
	if !ok {
		t.Skip("what lies between brings no key in, as it should")
	}
	ctx, label, value := t.Context(), "mac/导入@kek", make([]byte, 32)
	for i := range value {
		value[i] = byte(i)
	}
	if !slices.Contains(c.Operations, hsm.MACSM3) {
		carries(t, "ImportMAC", token.ImportMAC(ctx, label, value), hsm.ClassPermanent)
		if _, err := c.token.FindKey(ctx, label); !errors.Is(err, hsm.ErrKeyNotFound) {
			t.Errorf("a refused ImportMAC left something: %v", err)
		}
		return
	}
	for _, n := range []int{0, 16, 31, 33} {
		if err := token.ImportMAC(ctx, label, make([]byte, n)); err == nil {
			t.Errorf("ImportMAC took %d bytes", n)
		}
	}
	if err := token.ImportMAC(ctx, label, value); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := c.token.DestroyKey(ctx, label); err != nil {
			t.Error(err)
		}
	}()
	info, err := c.token.FindKey(ctx, label)
	if err != nil || info.Algorithm != hsm.HMACSM3 || !info.Sensitive || info.Extractable || info.NeverExtractable {
		t.Errorf("FindKey = %+v, %v", info, err)
	}
	for _, n := range []int{0, 3, 64, 1000} {
		data := bytes.Repeat([]byte{0x5a}, n)
		h := hmac.New(sm3.New, value)
		h.Write(data)
		if got, err := c.token.Do(ctx, label, hsm.MACSM3, data); err != nil || !hmac.Equal(got, h.Sum(nil)) {
			t.Errorf("HMAC-SM3 over %d bytes = %x, %v; gmsm has %x", n, got, err, h.Sum(nil))
		}
	}
	if err := token.ImportMAC(ctx, label, value); !errors.Is(err, hsm.ErrKeyExists) {
		t.Errorf("ImportMAC of a label that is taken: %v, want ErrKeyExists", err)
	}
}

// counts: the token's own counter tells of each signature.
func (c *conformer) counts(t *testing.T) {
	info := c.key(t, "counted", hsm.SM2)
	for range 3 {
		if err := do(t.Context(), c.token, info, hsm.SignSM2E, "counted"); err != nil {
			t.Fatal(err)
		}
	}
	keys, err := c.token.Keys(t.Context())
	i := slices.IndexFunc(keys, func(k hsm.KeyInfo) bool { return k.Label == info.Label })
	if err != nil || i < 0 || keys[i].Uses == nil || *keys[i].Uses != 3 {
		t.Errorf("after three signatures: %+v, %v", keys, err)
	}
}

// ambiguous: of two keys with one label neither is taken.
func (c *conformer) ambiguous(t *testing.T) {
	if c.Twin == nil {
		t.Skip("nobody can make a second key of the label here")
	}
	ctx, label := t.Context(), "twin of "+t.Name() // nothing here can destroy them
	if _, err := c.token.GenerateKey(ctx, hsm.KeySpec{Label: label, Algorithm: hsm.RSA2048}); err != nil {
		t.Fatal(err)
	}
	c.Twin(t, label)
	for what, err := range map[string]error{
		"FindKey":    second(c.token.FindKey(ctx, label)),
		"DestroyKey": c.token.DestroyKey(ctx, label),
		"Do":         second(c.token.Do(ctx, label, c.can(hsm.RSA2048)[0], make([]byte, 32))),
	} {
		if !errors.Is(err, hsm.ErrKeyAmbiguous) {
			t.Errorf("%s: %v, want ErrKeyAmbiguous", what, err)
		}
	}
	if _, err := c.token.GenerateKey(ctx, hsm.KeySpec{Label: label, Algorithm: c.quickest()}); !errors.Is(err, hsm.ErrKeyExists) {
		t.Errorf("GenerateKey: %v, want ErrKeyExists", err)
	}
}

// wrapped: keys that stay on no token sign all the same, and nothing signs with what is not such a key.
func (c *conformer) wrapped(t *testing.T) {
	ctx := t.Context()
	before, err := c.token.Keys(ctx)
	if err != nil {
		t.Fatal(err)
	}
	pair := hsm.RSA2048
	if slices.Contains(c.Algorithms, hsm.SM2) {
		pair = hsm.SM2
	}
	_, _, err = c.token.GenerateWrapped(ctx, hsm.KeySpec{Label: "w", Algorithm: pair}, "no such key")
	if c.KEK == "" {
		if !errors.Is(err, hsm.ErrNoWrapping) {
			t.Errorf("GenerateWrapped where keys cannot be wrapped: %v, want ErrNoWrapping", err)
		}
		return
	}
	if !errors.Is(err, hsm.ErrKeyNotFound) {
		t.Errorf("GenerateWrapped under a key that is not there: %v, want ErrKeyNotFound", err)
	}
	for _, op := range c.Operations {
		a := algorithmOf[op]
		if a != hsm.SM2 {
			continue
		}
		info, blob, err := c.token.GenerateWrapped(ctx, hsm.KeySpec{Label: "wrapped", Algorithm: a}, c.KEK)
		if err != nil {
			t.Fatal(err)
		}
		key, err := hsm.NewWrappedKey("wrapped", a, info.Public, c.KEK, blob)
		if err != nil {
			t.Fatal(err)
		}
		e := sha256.Sum256([]byte("wrapped"))
		for range 2 { // unwrapped, then at hand
			sig, err := c.token.DoWrapped(ctx, key, op, e[:])
			if err == nil {
				err = judge(info, op, e[:], sig)
			}
			if err != nil {
				t.Errorf("DoWrapped: %v", err)
			}
		}
		altered := bytes.Clone(blob)
		altered[len(altered)-1] ^= 1
		if forged, err := hsm.NewWrappedKey("wrapped", a, info.Public, c.KEK, altered); err == nil {
			sig, err := c.token.DoWrapped(ctx, forged, op, e[:])
			var refused *hsm.Error
			if !errors.As(err, &refused) || refused.RV != 0x110 {
				t.Errorf("an altered key: %x, %v; want CKR_WRAPPED_KEY_INVALID", sig, err)
			}
		}
		digest := key.Digest()
		ref := hsm.WrappedRef(digest, "wrapped")
		if _, err := c.token.DoWrapped(ctx, ref, op, e[:]); err != nil {
			t.Errorf("DoWrapped by digest: %v", err)
		}
		for range 2 { // there is one, then none
			if err := c.token.ForgetWrapped(ctx, digest); err != nil {
				t.Errorf("ForgetWrapped: %v", err)
			}
		}
		if _, err := c.token.DoWrapped(ctx, ref, op, e[:]); !errors.Is(err, hsm.ErrNotCached) {
			t.Errorf("DoWrapped by digest of a key that was forgotten: %v, want ErrNotCached", err)
		}
	}
	if after, err := c.token.Keys(ctx); err != nil || len(after) != len(before) {
		t.Errorf("Keys lists %d keys afterwards, %v; want %d", len(after), err, len(before))
	}
}

// concurrent: everything at once, and of all who want one label one gets it.
func (c *conformer) concurrent(t *testing.T) {
	var keys []hsm.KeyInfo
	for _, a := range c.Algorithms {
		if len(c.can(a)) > 0 && (kindOf(a) != hsm.RSA2048 || a == hsm.RSA2048 && (c.KEK != "" || c.quickest() == a)) { // RSA keys take long to make: not on each vendor
			keys = append(keys, c.key(t, "many/"+string(a), a))
		}
	}
	g, ctx := errgroup.WithContext(t.Context())
	for i := range 16 {
		g.Go(func() error {
			for n := range 4 {
				info := keys[(i+n)%len(keys)]
				ops := c.can(info.Algorithm)
				if err := do(ctx, c.token, info, ops[n%len(ops)], fmt.Sprint(i, n)); err != nil {
					return err
				}
				if found, err := c.token.FindKey(ctx, info.Label); err != nil || !same(found, info) {
					return fmt.Errorf("FindKey = %+v, %v", found, err)
				}
			}
			if listed, err := c.token.Keys(ctx); err != nil || len(listed) < len(keys) {
				return fmt.Errorf("listing keys: %d, %v", len(listed), err)
			}
			_, err := c.token.Info(ctx)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		t.Error(err)
	}

	// Keys come and go while others list them.
	g, ctx = errgroup.WithContext(t.Context())
	made := make(chan struct{})
	if !c.Fragile {
		g.Go(func() error {
			for {
				if listed, err := c.token.Keys(ctx); err != nil || len(listed) < len(keys) {
					return fmt.Errorf("listing keys: %d, %v", len(listed), err)
				}
				select {
				case <-made:
					return nil
				default:
				}
			}
		})
	}
	pair, times := hsm.RSA2048, 1 // one is slow enough
	if slices.Contains(c.Algorithms, hsm.SM2) {
		pair, times = hsm.SM2, 4
	}
	g.Go(func() error {
		defer close(made)
		for range times {
			if _, err := c.token.GenerateKey(ctx, hsm.KeySpec{Label: "passing", Algorithm: pair}); err != nil {
				return err
			}
			if err := c.token.DestroyKey(ctx, "passing"); err != nil {
				return err
			}
		}
		return nil
	})
	var won atomic.Int32
	for range 4 {
		g.Go(func() error {
			_, err := c.token.GenerateKey(ctx, hsm.KeySpec{Label: "wanted", Algorithm: c.quickest()})
			if err == nil {
				won.Add(1)
			}
			if errors.Is(err, hsm.ErrKeyExists) {
				return nil
			}
			return err
		})
	}
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
	if won.Load() != 1 {
		t.Errorf("%d keys were made with one label", won.Load())
	}
	if err := c.token.DestroyKey(t.Context(), "wanted"); err != nil {
		t.Error(err)
	}
}

// cancelled: a caller who has gone is answered with why, or is answered; nothing else suffers.
func (c *conformer) cancelled(t *testing.T) {
	info := c.key(t, "cancelled", c.quickest())
	op := c.can(info.Algorithm)[0]
	why := errors.New("the caller has gone")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(why)
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			for what, err := range map[string]error{
				"Do": do(ctx, c.token, info, op, "x"), "FindKey": second(c.token.FindKey(ctx, info.Label)),
				"Keys": second(c.token.Keys(ctx)), "Info": second(c.token.Info(ctx)),
			} {
				if err != nil && !errors.Is(err, why) {
					t.Errorf("%s for a caller who has gone: %v", what, err)
				}
			}
		})
	}
	wg.Wait()
	if err := do(t.Context(), c.token, info, op, "y"); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

// closed: a closed token answers hsm.ErrUnavailable to everything, and closes again.
func (c *conformer) closed(t *testing.T) {
	for range 2 {
		if err := c.token.Close(); err != nil {
			t.Errorf("Close = %v", err)
		}
	}
	ctx := t.Context()
	if c.Lent {
		c.token = c.Open(t)
		return
	}
	for what, err := range map[string]error{
		"Info": second(c.token.Info(ctx)), "Keys": second(c.token.Keys(ctx)), "FindKey": second(c.token.FindKey(ctx, "x")),
		"DestroyKey": c.token.DestroyKey(ctx, "x"), "GenerateKey": second(c.token.GenerateKey(ctx, hsm.KeySpec{Label: "x", Algorithm: c.quickest()})),
		"Do": second(c.token.Do(ctx, "x", c.Operations[0], make([]byte, 32))),
	} {
		if !errors.Is(err, hsm.ErrUnavailable) {
			t.Errorf("%s of a closed token: %v, want ErrUnavailable", what, err)
		}
	}
	if _, err := c.token.Random(ctx, 8); !c.NoRandom && !errors.Is(err, hsm.ErrUnavailable) {
		t.Errorf("Random of a closed token: %v, want ErrUnavailable", err)
	}
	c.token = c.Open(t)
}

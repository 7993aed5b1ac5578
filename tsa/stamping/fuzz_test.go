package stamping_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"encoding/binary"
	"errors"
	"math/big"
	"testing"
	"time"

	"yinjian/tsa"
	"yinjian/tsa/stamping"

	"github.com/emmansun/gmsm/sm2"
)

// FuzzService has a worker answer anything: what its key has signed is a token at the worker's time, or a request for its own
// key.
func FuzzService(f *testing.F) {
	m := newMemory()
	c := chainFor(&m.sm2.PublicKey, nil)
	chain := [][]byte{c[0].Raw, c[1].Raw}
	whole := askWith("sm2", "tsa/sm2", chain, serialOf(1), mustBytes(query("x")))
	again, err := tsa.New(tsa.Config{
		Name: "sm2", Policy: policy, Accuracy: time.Second, Signer: held{&m.sm2.PublicKey}, Chain: c, Clock: standing(now), Serials: new(counter), Log: quiet(),
	})
	if err != nil {
		f.Fatal(err)
	}
	info, spki := requestInfo(f, m.sm2), c[0].RawSubjectPublicKeyInfo
	f.Add(whole)
	f.Add(bytes.Replace(whole, []byte("sm2"), []byte("rsa"), 1))
	f.Add(part(part([]byte{3}, []byte("tsa/sm2")), info))
	f.Add(part(part([]byte{3}, []byte("tsa/sm2")), c[0].RawTBSCertificate))
	f.Add([]byte{2})
	f.Add([]byte{4})
	f.Fuzz(func(t *testing.T, request []byte) {
		before := m.made.Load()
		s := stamping.New(m, standing(now), terms, quiet())
		answer, err := s.Extend(context.Background(), request)
		if m.made.Load() == before {
			if made := stamping.Signature(answer); made != nil {
				t.Errorf("nothing was signed, and %x was answered", made)
			}
			return
		}
		if err != nil {
			return // signed, and not handed out
		}
		made := stamping.Signature(answer)
		if answer[0] == 1 {
			serial, query := tokenRequest(request)
			req, err := tsa.ParseRequest(query)
			if err != nil {
				t.Fatal(err)
			}
			token, err := again.Repeat(context.WithValue(context.Background(), heldKey{}, made), req, new(big.Int).SetBytes(serial), now)
			if err != nil || !token.GenTime.Equal(now.Time.Truncate(time.Millisecond)) {
				t.Errorf("the key has signed another token: %v", err)
			}
			return
		}
		// Kind, label, and what was signed, each with its length.
		signed := request[1:]
		signed = signed[4+binary.BigEndian.Uint32(signed)+4:]
		if signed[0] != 0x30 || !bytes.Contains(signed, spki) || !sm2.VerifyASN1WithSM2(&m.sm2.PublicKey, nil, signed, made) {
			t.Errorf("signed: %x", request)
		}
	})
}

// FuzzAnswer has a worker's answer be anything: a token comes of it when it verifies as the one that was asked for, and what
// is refused and holds a token is thrown away with account.
func FuzzAnswer(f *testing.F) {
	m := newMemory()
	chain := chainFor(&m.sm2.PublicKey, nil)
	good, err := stamping.New(m, standing(now), terms, quiet()).Extend(f.Context(), askWith("sm2", "tsa/sm2", [][]byte{chain[0].Raw, chain[1].Raw}, serialOf(1), mustBytes(query("x"))))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(flipped(good, len(good)-1))
	for kind := range byte(9) {
		f.Add(append([]byte{kind}, good[1:]...))
		f.Add([]byte{kind})
	}
	f.Add(append([]byte{7, 0, 0, 0, 2}, part(nil, []byte("no"))...))
	workers := rows{{"main", new(direct)}}
	var d discards
	u, watch := unitOf(f, "sm2", workers, standing(now), chain, &d)
	f.Fuzz(func(t *testing.T, answer []byte) {
		workers[0].w.canned = answer
		watch.Forget("main")
		before := d.count()
		token, err := u.Issue(context.Background(), query("x"))
		if err != nil {
			if stamping.Signature(answer) != nil && answer[0] == 1 && d.count() == before {
				t.Errorf("a token was refused without account: %v", err)
			}
			return
		}
		if _, err := token.VerifyData([]byte("x"), chain[0]); err != nil || !token.GenTime.Equal(now.Time.Truncate(time.Millisecond)) {
			t.Errorf("a token of %v: %v", token.GenTime, err)
		}
	})
}

// held holds the signature that comes with the context against what it should be over.
type held struct{ pub *ecdsa.PublicKey }

type heldKey struct{}

func (h held) Public() crypto.PublicKey { return h.pub }

func (h held) SignMessage(ctx context.Context, message []byte) ([]byte, error) {
	signature, _ := ctx.Value(heldKey{}).([]byte)
	if !sm2.VerifyASN1WithSM2(h.pub, nil, message, signature) {
		return nil, errors.New("over something else")
	}
	return signature, nil
}

// tokenRequest takes serial number and query out of a request for a token.
func tokenRequest(b []byte) (serial, query []byte) {
	next := func() []byte {
		n := binary.BigEndian.Uint32(b)
		v := b[4 : 4+n]
		b = b[4+n:]
		return v
	}
	b = b[1:]
	next() // unit
	b = b[32:]
	return next(), next()
}

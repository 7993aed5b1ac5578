package evidence_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"slices"
	"strings"
	"testing"

	"github.com/emmansun/gmsm/sm2"

	"yinjian/appliance/audit"
	"yinjian/appliance/evidence"
	"yinjian/appliance/pki"
)

// cosigner is another campus's log key.
type cosigner struct{ *sm2.PrivateKey }

func newCosigner(t *testing.T) cosigner {
	t.Helper()
	k, err := sm2.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return cosigner{k}
}

func (k cosigner) SignMessage(_ context.Context, m []byte) ([]byte, error) {
	return k.PrivateKey.SignWithSM2(rand.Reader, nil, m)
}

func (k cosigner) Public() crypto.PublicKey { return &k.PublicKey }

// cosign has the last checkpoint cosigned.
func (w *ward) cosign(t *testing.T, key cosigner) *audit.Cosignature {
	t.Helper()
	c, err := w.Journal.WaitCheckpoint(t.Context(), w.Journal.Size()-1)
	if err != nil {
		t.Fatal(err)
	}
	s := &audit.Cosignature{Node: "bh", Epoch: audit.Epoch{7}, Campus: "滨海", Time: c.Time.Micros, Note: c.Note}
	if err := s.Cosign(t.Context(), key); err != nil {
		t.Fatal(err)
	}
	w.Journal.SetCosigned(c, s)
	return s
}

func TestCosignedEvidence(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	key := newCosigner(t)
	q := request("a", kinds[0])
	record := w.Sign(w.app, q).RecordID
	plain := parse(t, w.Evidence(w.app, record))
	wants(t, evidence.Verify(plain, w.Trust, document), pki.Valid, pki.NotChecked, evidence.CheckCosigned)
	if plain.Format != evidence.Format {
		t.Errorf("without a cosignature the format is %s", plain.Format)
	}
	w.cosign(t, key)
	b := parse(t, w.Evidence(w.app, record))
	if b.Format != evidence.FormatCosigned || len(b.Journal.CheckpointToken) == 0 {
		t.Errorf("format %s, token of %d bytes", b.Format, len(b.Journal.CheckpointToken))
	}
	trust := w.Trust
	trust.CosignerKeys = []crypto.PublicKey{key.Public()}
	r := evidence.Verify(b, trust, document)
	wants(t, r, pki.Valid, pki.Passed, evidence.CheckCosigned, evidence.CheckInclusion, evidence.CheckCheckpoint)
	says(t, r, "滨海院区（节点 bh")
	// Without the other campus's key nothing is said against it, nor for it.
	r = evidence.Verify(b, w.Trust, document)
	wants(t, r, pki.Valid, pki.NotChecked, evidence.CheckCosigned)
	if slices.ContainsFunc(r.Statements, func(s string) bool { return strings.Contains(s, "滨海") }) {
		t.Errorf("an unchecked cosignature is stated: %q", r.Statements)
	}
	other := w.Trust
	other.CosignerKeys = []crypto.PublicKey{newCosigner(t).Public()}
	wants(t, evidence.Verify(b, other, document), pki.Invalid, pki.Failed, evidence.CheckCosigned)
	// A cosignature of the log's own key is nobody else's word.
	own := with(t, b, func(b *evidence.Bundle) { b.Journal.Node = "bh" })
	if at(evidence.Verify(own, trust, document), evidence.CheckCosigned) != pki.Failed {
		t.Error("a log's own cosignature passes")
	}
	// An evidence record is a thing of its own.
	if f := b.WithRecord([]byte{1}).Format; f != evidence.FormatArchivedCosigned {
		t.Errorf("with an evidence record the format is %s", f)
	}
	// A later record's checkpoint is not cosigned yet.
	later := parse(t, w.Evidence(w.app, w.Sign(w.app, request("b", kinds[0])).RecordID))
	if later.Format != evidence.Format {
		t.Errorf("a record after the cosigned checkpoint has format %s", later.Format)
	}
	// The cosignature of another checkpoint is another's.
	swapped := with(t, b, func(b *evidence.Bundle) {
		b.Journal.Checkpoint, b.Journal.CheckpointSignature, b.Journal.CheckpointToken = later.Journal.Checkpoint, later.Journal.CheckpointSignature, later.Journal.CheckpointToken
		b.Journal.TreeSize, b.Journal.Inclusion = later.Journal.TreeSize, later.Journal.Inclusion
	})
	wants(t, evidence.Verify(swapped, w.Trust, document), pki.Invalid, pki.Failed, evidence.CheckCosigned)
}

// Text and signature stand there together, in the format that says so; no byte of them is free.
func TestEveryByteOfACosignature(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	key := newCosigner(t)
	record := w.Sign(w.app, request("a", kinds[0])).RecordID
	w.cosign(t, key)
	b := parse(t, w.Evidence(w.app, record))
	trust := w.Trust
	trust.CosignerKeys = []crypto.PublicKey{key.Public()}
	for i := range b.Journal.Cosigned {
		bad := *b
		bad.Journal.Cosigned = bytes.Clone(b.Journal.Cosigned)
		bad.Journal.Cosigned[i] ^= 4
		if at(evidence.Verify(&bad, trust, document), evidence.CheckCosigned) != pki.Failed {
			t.Errorf("byte %d of the text is free", i)
		}
	}
	for i := range b.Journal.Cosignature {
		bad := *b
		bad.Journal.Cosignature = bytes.Clone(b.Journal.Cosignature)
		bad.Journal.Cosignature[i] ^= 4
		if at(evidence.Verify(&bad, trust, document), evidence.CheckCosigned) != pki.Failed {
			t.Errorf("byte %d of the signature is free", i)
		}
	}
	file := string(encode(t, b))
	for name, text := range map[string]string{
		"in the first format":   strings.Replace(file, evidence.FormatCosigned, evidence.Format, 1),
		"in the second format":  strings.Replace(file, evidence.FormatCosigned, evidence.FormatArchived, 1),
		"without its text":      string(encode(t, with(t, b, func(b *evidence.Bundle) { b.Journal.Cosigned = nil }))),
		"without its signature": string(encode(t, with(t, b, func(b *evidence.Bundle) { b.Journal.Cosignature = nil }))),
		"without both":          string(encode(t, with(t, b, func(b *evidence.Bundle) { b.Journal.Cosigned, b.Journal.Cosignature = nil, nil }))),
	} {
		if _, err := evidence.Parse([]byte(text)); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
}

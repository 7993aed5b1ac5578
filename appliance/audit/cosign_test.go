package audit_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"encoding/pem"

	"github.com/emmansun/gmsm/smx509"

	"yinjian/appliance/audit"
)

// checkpoints appends until there are checkpoints over 3 and over 7 entries or more.
func checkpoints(t *testing.T, key logKey, object string) (j *audit.Journal, early, late audit.Checkpoint) {
	t.Helper()
	j = startMem(t, newMemStore(), func(c *audit.Config) { c.Checkpointer = key })
	add := func(n int) (c audit.Checkpoint) {
		for range n {
			d := draft(1)
			d.Object = object
			if _, err := j.Append(t.Context(), d); err != nil {
				t.Fatal(err)
			}
		}
		c, err := j.WaitCheckpoint(t.Context(), j.Size()-1)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	early = add(3)
	return j, early, add(5)
}

func cosigned(t *testing.T, key logKey, c audit.Checkpoint) *audit.Cosignature {
	t.Helper()
	s := &audit.Cosignature{Node: "b", Epoch: audit.Epoch{1, 2}, Campus: "滨海", Time: 1_790_000_000_123_456, Note: c.Note}
	if err := s.Cosign(t.Context(), key); err != nil {
		t.Fatal(err)
	}
	return s
}

func TestCosignatureIsVerifiedByOpenSSL(t *testing.T) {
	t.Parallel()
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		t.Skip("openssl is not installed")
	}
	_, c, _ := checkpoints(t, newLogKey(t), "x")
	key := newLogKey(t)
	s := cosigned(t, key, c)
	spki, err := smx509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for name, data := range map[string][]byte{
		"log.pem": pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: spki}), "text": s.Text, "sig": s.Signature,
		"other": bytes.Replace(s.Text, []byte("滨海"), []byte("本部"), 1),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for file, want := range map[string]bool{"text": true, "other": false} {
		cmd := exec.Command(openssl, "dgst", "-sm3", "-verify", "log.pem", "-sigopt", "distid:1234567812345678", "-signature", "sig", file)
		cmd.Dir = dir
		out, _ := cmd.CombinedOutput() // what it says is looked at
		if got := strings.Contains(string(out), "Verified OK"); got != want {
			t.Errorf("%s: openssl says %s", file, out)
		}
	}
}

// A cosignature says who, when and of what, in one spelling; a checkpoint's signature is none, and none is a checkpoint's.
func TestCosignatureText(t *testing.T) {
	t.Parallel()
	log, key := newLogKey(t), newLogKey(t)
	_, c, later := checkpoints(t, log, "x")
	s := cosigned(t, key, c)
	again, err := audit.ParseCosignature(s.Text, s.Signature)
	if err != nil {
		t.Fatal(err)
	}
	if again.Node != "b" || again.Epoch != (audit.Epoch{1, 2}) || again.Campus != "滨海" || again.Time != s.Time || !bytes.Equal(again.Note, c.Note) {
		t.Errorf("ParseCosignature = %+v", again)
	}
	if err := audit.VerifyCosignature(key.Public(), again); err != nil {
		t.Error(err)
	}
	if err := audit.VerifyCosignature(log.Public(), again); err == nil {
		t.Error("a cosignature verifies under another key")
	}
	again.Campus = "本部"
	if err := audit.VerifyCosignature(key.Public(), again); err == nil {
		t.Error("a cosignature verifies with another campus")
	}
	if err := audit.VerifyCheckpoint(key.Public(), &audit.Checkpoint{Node: c.Node, Epoch: c.Epoch, Size: c.Size, Root: c.Root, Time: c.Time, Changes: c.Changes, Note: s.Text, Signature: s.Signature}); err == nil {
		t.Error("a cosignature passes for a checkpoint")
	}
	for name, text := range map[string]string{
		"empty": "", "a checkpoint": string(c.Note), "no checkpoint": strings.TrimSuffix(string(s.Text), string(c.Note)),
		"two checkpoints": string(s.Text) + string(later.Note), "campus of two lines": strings.Replace(string(s.Text), "滨海", "滨\n海", 1),
		"no campus": strings.Replace(string(s.Text), "滨海", "", 1), "another version": strings.Replace(string(s.Text), "/v1", "/v2", 1),
		"time in another spelling": strings.Replace(string(s.Text), ".123456Z", ".123456+00:00", 1), "capitals": strings.Replace(string(s.Text), "\nb/", "\nB/", 1),
		"control character": strings.Replace(string(s.Text), "滨海", "滨\x1b海", 1),
	} {
		if _, err := audit.ParseCosignature([]byte(text), s.Signature); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
}

// failingKey signs something else than it was asked to.
type failingKey struct{ logKey }

func (k failingKey) SignMessage(ctx context.Context, m []byte) ([]byte, error) {
	return k.logKey.SignMessage(ctx, append([]byte{1}, m...))
}

func TestCosignLooksAtWhatItMade(t *testing.T) {
	t.Parallel()
	_, c, _ := checkpoints(t, newLogKey(t), "x")
	s := &audit.Cosignature{Node: "b", Campus: "滨海", Note: c.Note}
	if err := s.Cosign(t.Context(), failingKey{newLogKey(t)}); err == nil || s.Signature == nil {
		t.Errorf("Cosign = %v with %d bytes, want an error, and the signature, of which account has to be given", err, len(s.Signature))
	}
	for name, bad := range map[string]audit.Cosignature{
		"no campus": {Node: "b", Note: c.Note}, "a node with a slash": {Node: "b/c", Campus: "x", Note: c.Note}, "no checkpoint": {Node: "b", Campus: "x", Note: []byte("x")},
	} {
		key := newLogKey(t)
		if err := bad.Cosign(t.Context(), key); err == nil || key.n.Load() != 0 {
			t.Errorf("%s: Cosign = %v after %d signatures", name, err, key.n.Load())
		}
	}
}

// What a follower takes continues what he has seen; a copy of the journal that went its own way shows.
func TestFollow(t *testing.T) {
	t.Parallel()
	key := newLogKey(t)
	j, early, late := checkpoints(t, key, "x")
	_, other, otherLate := checkpoints(t, key, "y") // another journal under the same key
	proof, err := j.ConsistencyProof(t.Context(), early.Size, late.Size)
	if err != nil {
		t.Fatal(err)
	}
	epoch := early.Epoch
	if err := audit.Follow(key.Public(), early.Node, epoch, nil, &early, nil); err != nil {
		t.Errorf("the first: %v", err)
	}
	if err := audit.Follow(key.Public(), early.Node, epoch, &early, &early, nil); err != nil {
		t.Errorf("the same again: %v", err)
	}
	if err := audit.Follow(key.Public(), early.Node, epoch, &early, &late, proof); err != nil {
		t.Errorf("a later one: %v", err)
	}
	if err := audit.Follow(key.Public(), early.Node, epoch, &late, &early, nil); !errors.Is(err, audit.ErrOlderHead) {
		t.Errorf("an older one: %v", err)
	}
	if err := audit.Follow(newLogKey(t).Public(), early.Node, epoch, &early, &late, proof); err == nil || errors.Is(err, audit.ErrSplitView) {
		t.Errorf("another key's: %v", err)
	}
	if err := audit.Follow(key.Public(), early.Node, audit.Epoch{9}, nil, &early, nil); err == nil || errors.Is(err, audit.ErrSplitView) {
		t.Errorf("another epoch's: %v", err)
	}
	// The epochs of two journals differ; a copied one keeps its epoch, so the follower's view is set to it.
	seen := early
	if err := audit.Follow(key.Public(), other.Node, other.Epoch, &seen, &other, nil); !errors.Is(err, audit.ErrSplitView) {
		t.Errorf("another of the same size: %v", err)
	}
	if err := audit.Follow(key.Public(), other.Node, other.Epoch, &seen, &otherLate, proof); !errors.Is(err, audit.ErrSplitView) {
		t.Errorf("a later one of another journal: %v", err)
	}
}

func FuzzParseCosignature(f *testing.F) {
	f.Add([]byte("yinjian/cosignature/v1\nb/0102000000000000\n滨海\ntime 2026-09-21T14:13:20.123456Z\nyinjian/journal/a/0000000000000000\n0\nAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\ntime 2026-01-02T03:04:05.000006Z\nbound 0\nclock trusted\nchanges 0\nprevious 0 -\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		s, err := audit.ParseCosignature(text, nil)
		if err == nil && !bytes.Equal(s.Text, text) {
			t.Errorf("%q was read as %q", text, s.Text)
		}
	})
}

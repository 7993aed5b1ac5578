package audit

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/emmansun/gmsm/sm2"
)

var (
	// ErrSplitView means that a log has signed two checkpoints of which none continues the other: whoever was shown the one
	// and whoever was shown the other were not shown the same journal.
	ErrSplitView = errors.New("audit: split view: the log has signed a checkpoint that does not continue the one seen before")
	// ErrOlderHead means that a log shows a checkpoint with fewer entries than one seen before.
	ErrOlderHead = errors.New("audit: the log shows fewer entries than it has shown before")
)

// A Cosignature is the word of another appliance's log key that it has seen a checkpoint, which continues all that it had
// seen of this log before. Its text is
//
//	yinjian/cosignature/v1
//	<node of the cosigner>/<its epoch, 16 hex digits>
//	<its campus>
//	time <RFC 3339, UTC, six decimals>
//	<the checkpoint's text, to its end>
//
// signed as a checkpoint's is. The first line keeps it apart from what the key signs of its own log.
type Cosignature struct {
	Node   string
	Epoch  Epoch
	Campus string // 1 to 64 bytes, no control characters
	Time   int64  // µs since 1970 UTC: when the cosigner signed, by its clock
	Note   []byte // the checkpoint's text

	Text      []byte
	Signature []byte
}

const (
	cosignaturePrefix = "yinjian/cosignature/v1\n"
	maxCosignature    = maxNote + 512
	maxCampus         = 64
)

func isCampus(s string) bool {
	return s != "" && isText(s, maxCampus) && !strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f })
}

func (s *Cosignature) text() []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "%s%s/%s\n%s\ntime %s\n%s", cosignaturePrefix, s.Node, s.Epoch, s.Campus, time.UnixMicro(s.Time).UTC().Format(noteTime), s.Note)
	return b.Bytes()
}

// Cosign signs s with the cosigner's log key: Node, Epoch, Campus, Time and Note are given, Text and Signature are made.
// Whether the checkpoint may be cosigned is the caller's to know. A signature that is made and does not verify is answered
// beside the error.
func (s *Cosignature) Cosign(ctx context.Context, key CheckpointSigner) error {
	s.Text = s.text()
	if _, err := ParseCosignature(s.Text, nil); err != nil {
		return err
	}
	var err error
	if s.Signature, err = key.SignMessage(ctx, s.Text); err != nil {
		return fmt.Errorf("audit: cosigning: %w", err)
	}
	return VerifyCosignature(key.Public(), s)
}

// ParseCosignature reads the text of a cosignature, strictly: what it accepts has no other spelling. The signature is taken
// over unread; see [VerifyCosignature].
func ParseCosignature(text, signature []byte) (*Cosignature, error) {
	bad := func(what string) error { return fmt.Errorf("audit: cosignature: malformed %s", what) }
	if len(text) > maxCosignature {
		return nil, fmt.Errorf("audit: cosignature of %d bytes, at most %d are allowed", len(text), maxCosignature)
	}
	rest, ok := bytes.CutPrefix(text, []byte(cosignaturePrefix))
	lines := strings.SplitN(string(rest), "\n", 4)
	if !ok || len(lines) != 4 {
		return nil, bad("text")
	}
	s := &Cosignature{Campus: lines[1], Note: []byte(lines[3])}
	var epoch string
	s.Node, epoch, ok = strings.Cut(lines[0], "/")
	if !ok || !isName(s.Node) {
		return nil, bad("node")
	}
	var err error
	if s.Epoch, err = ParseEpoch(epoch); err != nil {
		return nil, bad("epoch")
	}
	if !isCampus(s.Campus) {
		return nil, bad("campus")
	}
	when, ok := strings.CutPrefix(lines[2], "time ")
	t, err := time.Parse(noteTime, when)
	if !ok || err != nil {
		return nil, bad("time")
	}
	s.Time = t.UnixMicro()
	if _, err := ParseCheckpoint(s.Note, nil); err != nil {
		return nil, err
	}
	if !bytes.Equal(s.text(), text) {
		return nil, bad("text: not in its one spelling")
	}
	s.Text, s.Signature = bytes.Clone(text), bytes.Clone(signature)
	return s, nil
}

// VerifyCosignature checks s's text against its fields and its signature under pub, the cosigner's log key (SM2).
func VerifyCosignature(pub crypto.PublicKey, s *Cosignature) error {
	key, ok := pub.(*ecdsa.PublicKey)
	if !ok || !sm2.IsSM2PublicKey(key) {
		return errors.New("audit: cosignature: the cosigner's key is not an SM2 key")
	}
	if !bytes.Equal(s.text(), s.Text) {
		return errors.New("audit: cosignature: its fields say something else than its text")
	}
	if !sm2.VerifyASN1WithSM2(key, nil, s.Text, s.Signature) {
		return fmt.Errorf("audit: cosignature of %s: the signature does not verify", s.Node)
	}
	return nil
}

// Follow says whether c, a checkpoint of another appliance's log that was fetched or handed over, continues last, the
// newest one that was seen (nil: none yet). proof is that of consistency from last's size to c's. The pinned key signs
// both; node and epoch are those that were agreed on.
//
// [ErrSplitView] and [ErrOlderHead] are the log's fault; another error says that c is not one of that log's checkpoints.
func Follow(key crypto.PublicKey, node string, epoch Epoch, last, c *Checkpoint, proof []Hash) error {
	if err := VerifyCheckpoint(key, c); err != nil {
		return err
	}
	if c.Node != node || c.Epoch != epoch {
		return fmt.Errorf("audit: a checkpoint of %s, epoch %s, where one of %s, epoch %s, should be", c.Node, c.Epoch, node, epoch)
	}
	switch {
	case last == nil:
		return nil
	case c.Size < last.Size:
		return fmt.Errorf("%w: %d, and %d before", ErrOlderHead, c.Size, last.Size)
	}
	if err := VerifyConsistency(last.Size, c.Size, proof, last.Root, c.Root); err != nil {
		return fmt.Errorf("%w: sizes %d and %d: %v", ErrSplitView, last.Size, c.Size, err)
	}
	return nil
}

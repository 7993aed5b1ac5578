package audit

import (
	"bytes"
	"context"
	"crypto"
	"encoding/binary"
	"errors"
	"fmt"
)

// A Foreign is an entry of another appliance's journal, with what proves that it stands there.
type Foreign struct {
	Node string // of the other appliance
	// Epoch is the one that the other journal is in, that of Checkpoint. The entry's own, Record.Epoch, is an earlier one if
	// the journal was restored in between.
	Epoch      Epoch
	Record     Record
	Payloads   map[string][]byte // all that the entry has, by name
	Proof      []Hash            // inclusion of the entry in the tree of Checkpoint (RFC 6962 §2.1.1)
	Checkpoint Checkpoint
}

// KindForeign is the kind of an entry that says that one of another appliance's directory was applied: its payloads are
// that entry and its payloads, its reference is [Foreign.Ref].
const KindForeign = "peer.directory/applied"

// ErrForeign is what [Foreign.Verify]'s errors are.
var ErrForeign = errors.New("audit: an entry of another journal does not prove what it says")

// Verify holds the entry against logKey, the pinned key of the other appliance's log: the checkpoint is signed by it, and
// of that node and epoch; the entry is that node's, in its one encoding, and a leaf of the checkpoint's tree; the payloads
// are all there and are those that the entry commits to. What is left to the caller is whether the checkpoint continues
// what he has seen before ([VerifyConsistency]). It needs nothing but its arguments.
func (f *Foreign) Verify(logKey crypto.PublicKey) error {
	if err := f.verify(logKey); err != nil {
		return fmt.Errorf("%w: entry %d of %s: %v", ErrForeign, f.Record.Sequence, f.Node, err)
	}
	return nil
}

func (f *Foreign) verify(logKey crypto.PublicKey) error {
	c, r := &f.Checkpoint, &f.Record
	if err := VerifyCheckpoint(logKey, c); err != nil {
		return err
	}
	e, err := ParseEntry(r.EntryDER)
	if err != nil {
		return err
	}
	switch {
	case c.Node != f.Node || c.Epoch != f.Epoch:
		return fmt.Errorf("the checkpoint is that of %s, epoch %s, not of epoch %s", c.Node, c.Epoch, f.Epoch)
	case e.Node != f.Node:
		return fmt.Errorf("the entry is one of %s", e.Node)
	case e.Epoch != r.Epoch || e.Sequence != r.Sequence || LeafHash(r.EntryDER) != r.LeafHash:
		return errors.New("the entry's bytes are not those of its number, epoch and leaf hash")
	}
	// Readers use the parsed form: it is checked as the bytes are.
	if der, err := r.Entry.Marshal(); err != nil || !bytes.Equal(der, r.EntryDER) {
		return errors.New("the entry's fields are not those of its bytes")
	}
	if err := VerifyInclusion(r.Sequence, c.Size, r.LeafHash, f.Proof, c.Root); err != nil {
		return err
	}
	if len(f.Payloads) != len(e.Payloads) {
		return fmt.Errorf("%d payloads for the entry's %d", len(f.Payloads), len(e.Payloads))
	}
	for _, p := range e.Payloads {
		data, ok := f.Payloads[p.Name]
		if !ok || int64(len(data)) != p.Size || Sum(data) != p.SM3 {
			return fmt.Errorf("payload %q is missing or another", p.Name)
		}
	}
	return nil
}

// Ref names the entry among all of all journals: SM3 of "yinjian/journal/foreign/v1" and a zero byte, the node with its
// length in four bytes, the entry's own epoch and its sequence in eight bytes, big-endian. An entry that says that this one
// was applied has it as its reference, so that there is one.
func (f *Foreign) Ref() []byte {
	in := []byte("yinjian/journal/foreign/v1\x00")
	in = binary.BigEndian.AppendUint32(in, uint32(len(f.Node)))
	in = append(in, f.Node...)
	in = append(in, f.Record.Epoch[:]...)
	in = binary.BigEndian.AppendUint64(in, f.Record.Sequence)
	sum := Sum(in)
	return sum[:]
}

// Foreign answers an entry as another appliance takes it, proved in the tree of c, which is one of this journal's
// checkpoints and covers it.
func (j *Journal) Foreign(ctx context.Context, sequence uint64, c Checkpoint) (*Foreign, error) {
	r, err := j.Entry(ctx, sequence)
	if err != nil {
		return nil, err
	}
	f := &Foreign{Node: c.Node, Epoch: c.Epoch, Record: r, Payloads: map[string][]byte{}, Checkpoint: c}
	if f.Proof, err = j.InclusionProof(ctx, sequence, c.Size); err != nil {
		return nil, err
	}
	for _, p := range r.Entry.Payloads {
		if f.Payloads[p.Name], err = j.Payload(ctx, &r.Entry, p.Name); err != nil {
			return nil, err
		}
	}
	return f, nil
}

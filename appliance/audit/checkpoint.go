package audit

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"encoding/base64"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/emmansun/gmsm/sm2"

	"yinjian/ntp"
)

// A CheckpointSigner is the log's key in the cipher machine; an *hsm.Key is one. SignMessage answers the DER of an SM2
// signature over message with the default identity (GM/T 0009-2012 §10).
type CheckpointSigner interface {
	SignMessage(ctx context.Context, message []byte) ([]byte, error)
	Public() crypto.PublicKey
}

// A Stamper makes a timestamp token over data. Tokens of checkpoints must not become entries of the journal that the
// checkpoint is about: each would ask for the next checkpoint.
type Stamper interface {
	Stamp(ctx context.Context, data []byte) (token []byte, error error)
}

// A Checkpoint is a statement of the log's key: at that time the tree had this size and this root.
//
// Its text is a body of C2SP tlog-checkpoint with five extension lines; every line ends in a line feed:
//
//	yinjian/journal/<node>/<epoch, 16 hex digits>
//	<size, decimal, no leading zero>
//	<root, base64 of 32 bytes, standard alphabet, padded>
//	time <RFC 3339, UTC, six decimals: 2026-01-02T03:04:05.000006Z>
//	bound <microseconds, decimal>
//	clock <state of the clock, ntp.State>
//	changes <number of changes of state among the entries>
//	previous <size> <SM3 of the text of the checkpoint before, base64>, or: previous 0 -
//
// epoch is that of the last entry. The signature is SM2 with SM3 over the whole text, with the identity
// 1234567812345678, in DER; it is kept beside the text. `openssl dgst -sm3 -verify log.pem -sigopt
// distid:1234567812345678 -signature note.sig note` checks it.
type Checkpoint struct {
	Node         string
	Epoch        Epoch
	Size         uint64
	Root         Hash
	Time         Time   // without provenance
	Changes      uint64 // entries with State among the first Size
	PreviousSize uint64 // of the checkpoint before; 0: this is the first
	PreviousHash Hash

	Note      []byte // the exact text
	Signature []byte
	Token     []byte // timestamp token over Signature, or nil
	// Cosignature is another appliance's over Note, or nil. Only [Journal.Cosigned] answers it.
	Cosignature *Cosignature
}

const maxNote = 1024

// originPrefix begins each checkpoint's first line.
const originPrefix = "yinjian/journal/"

// text is the checkpoint as it is signed.
func (c *Checkpoint) text() []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "%s%s/%s\n%d\n%s\n", originPrefix, c.Node, c.Epoch, c.Size, base64.StdEncoding.EncodeToString(c.Root[:]))
	fmt.Fprintf(&b, "time %s\n", c.Time.UTC().Format(noteTime))
	fmt.Fprintf(&b, "bound %d\nclock %s\nchanges %d\n", c.Time.BoundMicros, c.Time.State, c.Changes)
	if c.PreviousSize == 0 {
		b.WriteString("previous 0 -\n")
	} else {
		fmt.Fprintf(&b, "previous %d %s\n", c.PreviousSize, base64.StdEncoding.EncodeToString(c.PreviousHash[:]))
	}
	return b.Bytes()
}

const noteTime = "2006-01-02T15:04:05.000000Z"

// ParseCheckpoint reads the text of a checkpoint, strictly: what it accepts has no other spelling. The signature is
// taken over unread; see [VerifyCheckpoint].
func ParseCheckpoint(note, signature []byte) (*Checkpoint, error) {
	bad := func(what string) error { return fmt.Errorf("audit: checkpoint: malformed %s", what) }
	if len(note) > maxNote {
		return nil, fmt.Errorf("audit: checkpoint of %d bytes, at most %d are allowed", len(note), maxNote)
	}
	lines := strings.Split(string(note), "\n")
	if len(lines) != 9 || lines[8] != "" {
		return nil, bad("text: want eight lines, each with a line feed")
	}
	c := &Checkpoint{}
	rest, ok := strings.CutPrefix(lines[0], originPrefix)
	node, epoch, found := strings.Cut(rest, "/")
	if !ok || !found || !isName(node) {
		return nil, bad("origin")
	}
	var err error
	c.Node = node
	if c.Epoch, err = ParseEpoch(epoch); err != nil {
		return nil, bad("epoch")
	}
	number := func(s string) uint64 {
		var n uint64
		if n, err = strconv.ParseUint(s, 10, 63); err == nil && strconv.FormatUint(n, 10) != s {
			err = errors.New("number in another spelling")
		}
		return n
	}
	if c.Size = number(lines[1]); err != nil {
		return nil, bad("size")
	}
	if c.Root, err = parseBase64Hash(lines[2]); err != nil {
		return nil, bad("root")
	}
	value := func(line int, name string) string {
		v, ok := strings.CutPrefix(lines[line], name+" ")
		if !ok {
			err = errors.New("no " + name)
		}
		return v
	}
	when := value(3, "time")
	t, terr := time.Parse(noteTime, when)
	if err != nil || terr != nil || t.Format(noteTime) != when {
		return nil, bad("time")
	}
	c.Time.Micros = t.UnixMicro()
	bound := value(4, "bound")
	if err == nil {
		c.Time.BoundMicros = int64(number(bound))
	}
	if err != nil {
		return nil, bad("bound")
	}
	state := value(5, "clock")
	if err != nil || !isName(state) || len(state) > maxStateBytes {
		return nil, bad("clock")
	}
	c.Time.State = ntp.State(state)
	changes := value(6, "changes")
	if err == nil {
		c.Changes = number(changes)
	}
	if err != nil || c.Changes > c.Size {
		return nil, bad("changes")
	}
	size, hash, _ := strings.Cut(value(7, "previous"), " ")
	if err == nil {
		c.PreviousSize = number(size)
	}
	if err == nil && c.PreviousSize > 0 {
		c.PreviousHash, err = parseBase64Hash(hash)
	} else if hash != "-" {
		err = errors.New("hash of no checkpoint")
	}
	if err != nil || c.PreviousSize > c.Size || c.PreviousSize == c.Size && c.Size > 0 {
		return nil, bad("previous")
	}
	if !bytes.Equal(c.text(), note) {
		return nil, bad("text: not in its one spelling")
	}
	c.Note, c.Signature = bytes.Clone(note), bytes.Clone(signature)
	return c, nil
}

func parseBase64Hash(s string) (Hash, error) {
	b, err := base64.StdEncoding.Strict().DecodeString(s)
	if err != nil || len(b) != len(Hash{}) {
		return Hash{}, errors.New("not the base64 of 32 bytes")
	}
	return Hash(b), nil
}

// VerifyCheckpoint checks c's text against its fields and its signature under pub, an SM2 public key.
func VerifyCheckpoint(pub crypto.PublicKey, c *Checkpoint) error {
	key, ok := pub.(*ecdsa.PublicKey)
	if !ok || !sm2.IsSM2PublicKey(key) {
		return errors.New("audit: checkpoint: the log's key is not an SM2 key")
	}
	parsed, err := ParseCheckpoint(c.Note, nil)
	if err != nil {
		return err
	}
	if parsed.Node != c.Node || parsed.Epoch != c.Epoch || parsed.Size != c.Size || parsed.Root != c.Root ||
		parsed.Time != (Time{c.Time.Micros, c.Time.BoundMicros, c.Time.State, ""}) || parsed.Changes != c.Changes {
		return errors.New("audit: checkpoint: its fields say something else than its text")
	}
	if !sm2.VerifyASN1WithSM2(key, nil, c.Note, c.Signature) { // nil: the default identity
		return fmt.Errorf("audit: checkpoint of size %d: the signature does not verify", c.Size)
	}
	return nil
}

func (c *Checkpoint) stored() StoredCheckpoint {
	return StoredCheckpoint{Size: c.Size, Note: c.Note, Signature: c.Signature, Token: c.Token}
}

// parse reads a stored checkpoint.
func (s StoredCheckpoint) parse() (*Checkpoint, error) {
	c, err := ParseCheckpoint(s.Note, s.Signature)
	if err != nil {
		return nil, err
	}
	if c.Size != s.Size || s.Size > math.MaxInt64 {
		return nil, fmt.Errorf("%w: checkpoint of size %d is stored as one of size %d", ErrCorrupt, c.Size, s.Size)
	}
	c.Token = s.Token
	return c, nil
}

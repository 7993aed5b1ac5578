// Package peer is how two appliances of one hospital speak to each other: a listener and a client, TLS 1.3 on both sides,
// each side known by the SubjectPublicKeyInfo that was agreed on at pairing and by nothing else; no CA has a say.
//
//	GET  /peer/v1/feed?epoch=…&after=…&size=…&wait_ms=…  entries of the directory, with proofs; a long poll
//	POST /peer/v1/cosign                                  a checkpoint, for the other's cosignature
//	GET  /peer/v1/seen                                    the newest checkpoint of the caller's log that was cosigned
//
// The package carries and bounds; it believes nothing. What an answer proves is looked at by whoever asked
// ([audit.Foreign.Verify], [audit.Follow], [audit.VerifyCosignature]). Every body, every wait and the number of connections
// are bounded on both sides, for a peer may be broken or in other hands.
package peer

import (
	"crypto/subtle"
	"crypto/tls"
	"errors"
	"fmt"

	"yinjian/appliance/audit"
)

// Limits of what is sent. A directory's entry has one object: the largest is a revocation list of another CA.
const (
	MaxEntries = 256      // entries of one answer
	softAnswer = 8 << 20  // bytes of entries and payloads after which an answer is ended
	maxAnswer  = 96 << 20 // bytes of an answer that are read; one entry may be larger than softAnswer
	maxRequest = 64 << 10 // bytes of a request's body
	maxProof   = 64       // hashes: twice what a tree of 2^32 needs
	maxSmall   = 64 << 10 // bytes of an answer that is no feed
	maxValues  = 1 << 16  // JSON values of an answer: MaxEntries of them with their proofs and payloads take half
)

// A Refusal is an answer that is no error of the line. Both sides know it by its code.
type Refusal struct {
	Code   string `json:"code"`
	Detail string `json:"detail"`
	// Size, of [Behind]: how many entries the answering side has seen of the asking side's log.
	Size uint64 `json:"size,omitempty"`
}

// Codes of refusals. They are part of the protocol.
const (
	Malformed  = "malformed"   // the request is not understood
	NotPaired  = "not_paired"  // the answering side has no pairing with the caller
	OtherEpoch = "other_epoch" // the answering side's journal is in another epoch than the caller believes: it was restored
	Behind     = "behind"      // cosign: the proof begins elsewhere than at what was seen last, Size
	SplitView  = "split_view"  // the caller's log, or the answering side's, has two histories
	OlderHead  = "older_head"  // cosign: the checkpoint has fewer entries than one that was seen
	Busy       = "busy"        // too many requests at once
	Unable     = "unable"      // the answering side cannot just now
)

func (r *Refusal) Error() string { return "peer: " + r.Code + ": " + r.Detail }

// Refuse makes a refusal.
func Refuse(code, format string, args ...any) *Refusal {
	return &Refusal{Code: code, Detail: fmt.Sprintf(format, args...)}
}

// IsRefusal says whether err is a refusal with this code.
func IsRefusal(err error, code string) bool {
	var r *Refusal
	return errors.As(err, &r) && r.Code == code
}

// A Head is a checkpoint on its way.
type Head struct {
	Note      []byte `json:"note"`
	Signature []byte `json:"signature"`
}

// HeadOf is the head of a checkpoint.
func HeadOf(c *audit.Checkpoint) Head { return Head{c.Note, c.Signature} }

// Checkpoint reads the head. Its signature is not looked at.
func (h Head) Checkpoint() (*audit.Checkpoint, error) {
	return audit.ParseCheckpoint(h.Note, h.Signature)
}

// An Entry is one of the directory's, with its proof under the answer's checkpoint.
type Entry struct {
	DER      []byte            `json:"der"`
	Proof    [][]byte          `json:"proof"`
	Payloads map[string][]byte `json:"payloads"`
}

// EntryOf is the entry of a foreign one.
func EntryOf(f *audit.Foreign) Entry {
	return Entry{DER: f.Record.EntryDER, Proof: hashes(f.Proof), Payloads: f.Payloads}
}

func (e *Entry) size() int {
	n := len(e.DER)
	for _, p := range e.Payloads {
		n += len(p)
	}
	return n
}

// A Feed is the answer to a [Query].
type Feed struct {
	Checkpoint  Head     `json:"checkpoint"`
	Consistency [][]byte `json:"consistency"` // from Query.Size to the checkpoint's size; empty if Size is 0
	Entries     []Entry  `json:"entries"`     // ascending
	// Through: the entries of the directory from Query.After on that come before this number are all in the answer. It is
	// the checkpoint's size, or less when there were too many.
	Through uint64 `json:"through"`
}

// Full says that no more entries go into the answer.
func (f *Feed) Full() bool {
	n := 0
	for i := range f.Entries {
		n += f.Entries[i].size()
	}
	return n >= softAnswer || len(f.Entries) >= MaxEntries
}

// Proof is the consistency proof.
func (f *Feed) Proof() ([]audit.Hash, error) { return parseHashes(f.Consistency) }

// Foreign reads the entries as those of node and epoch, under c, the checkpoint of the feed. Nothing is verified.
func (f *Feed) Foreign(node string, epoch audit.Epoch, c *audit.Checkpoint) ([]*audit.Foreign, error) {
	if len(f.Entries) > MaxEntries {
		return nil, fmt.Errorf("peer: an answer of %d entries, at most %d are taken", len(f.Entries), MaxEntries)
	}
	out := make([]*audit.Foreign, len(f.Entries))
	for i, e := range f.Entries {
		parsed, err := audit.ParseEntry(e.DER)
		if err != nil {
			return nil, fmt.Errorf("peer: entry %d of the answer: %w", i, err)
		}
		proof, err := parseHashes(e.Proof)
		if err != nil {
			return nil, fmt.Errorf("peer: entry %d of the answer: %w", i, err)
		}
		out[i] = &audit.Foreign{
			Node: node, Epoch: epoch, Payloads: e.Payloads, Proof: proof, Checkpoint: *c,
			Record: audit.Record{Epoch: parsed.Epoch, Sequence: parsed.Sequence, LeafHash: audit.LeafHash(e.DER), Entry: *parsed, EntryDER: e.DER},
		}
	}
	return out, nil
}

// A CosignRequest asks for a cosignature.
type CosignRequest struct {
	Checkpoint  Head     `json:"checkpoint"`
	From        uint64   `json:"from"`        // the size that the caller believes was seen last; 0: none
	Consistency [][]byte `json:"consistency"` // from From to the checkpoint's size
}

// Proof is the consistency proof.
func (r *CosignRequest) Proof() ([]audit.Hash, error) { return parseHashes(r.Consistency) }

// Hashes is a proof as it is sent.
func Hashes(proof []audit.Hash) [][]byte { return hashes(proof) }

// Cosigned is a cosignature on its way.
type Cosigned struct {
	Text      []byte `json:"text"`
	Signature []byte `json:"signature"`
}

// Cosignature reads it. Its signature is not looked at.
func (c *Cosigned) Cosignature() (*audit.Cosignature, error) {
	return audit.ParseCosignature(c.Text, c.Signature)
}

// Seen is what the answering side has cosigned last of the caller's log; nothing if nothing.
type Seen struct {
	Checkpoint *Head     `json:"checkpoint,omitempty"`
	Cosigned   *Cosigned `json:"cosigned,omitempty"`
}

func hashes(in []audit.Hash) [][]byte {
	out := make([][]byte, len(in))
	for i := range in {
		out[i] = in[i][:]
	}
	return out
}

func parseHashes(in [][]byte) ([]audit.Hash, error) {
	if len(in) > maxProof {
		return nil, fmt.Errorf("peer: a proof of %d hashes, at most %d are taken", len(in), maxProof)
	}
	out := make([]audit.Hash, len(in))
	for i, h := range in {
		if len(h) != len(audit.Hash{}) {
			return nil, fmt.Errorf("peer: a hash of %d bytes", len(h))
		}
		out[i] = audit.Hash(h)
	}
	return out, nil
}

// ErrPin means that the other side's key is not the one that was agreed on.
var ErrPin = errors.New("peer: the other side's key is not the one that was agreed on at pairing")

// pinned holds a connection against the other side's SubjectPublicKeyInfo. Whoever shows the certificate has its key (RFC
// 8446 §4.4.3); nothing else of it is looked at. It runs for resumed sessions too.
func pinned(spki func() []byte) func(tls.ConnectionState) error {
	return func(s tls.ConnectionState) error {
		want := spki()
		if len(want) == 0 || len(s.PeerCertificates) == 0 || subtle.ConstantTimeCompare(s.PeerCertificates[0].RawSubjectPublicKeyInfo, want) != 1 {
			return ErrPin
		}
		return nil
	}
}

package backup

import (
	"bytes"
	"crypto"
	"encoding/json"
	"errors"
	"fmt"

	"yinjian/appliance/audit"
)

// Kinds of entries about backups, and their fields. An export's object is the backup's id.
const (
	KindCustodians = "backup.custodians"     // payload object: [Custodians]
	KindIntent     = "backup.export/intent"  // a backup is about to be written
	KindOutcome    = "backup.export/outcome" // it was, and is the file with this digest
	KindFailed     = "backup.export/failed"  // it was not
	KindVerified   = "backup.verified"       // payload report
	KindDrill      = "backup.drill"          // payload report
	KindRestored   = "backup.restored"       // this appliance goes on from a backup
	KindMissing    = "backup.missing"        // what the central database has and the restored journal lacks

	FieldSM3     = "backup.sm3"     // of the file
	FieldEntries = "backup.entries" // of the journal in it
	FieldRoot    = "backup.root"    // of their tree
	FieldThrough = "backup.through" // segments up to this number are sealed, and in it or those that it continues
	FieldBase    = "backup.base"    // id of the one that it continues
	FieldSet     = "backup.set"     // of the custodians that it is sealed to
)

// A Receipt proves offline that an appliance's journal has an entry: that it wrote the backup with a digest, or filed a
// report. It holds no secret, and is kept beside the file.
type Receipt struct {
	Version   int               `json:"version"`
	Entry     []byte            `json:"entry"` // DER
	Payloads  map[string][]byte `json:"payloads,omitempty"`
	Proof     []audit.Hash      `json:"proof"` // inclusion in the checkpoint's tree (RFC 6962 §2.1.1)
	Note      []byte            `json:"checkpoint"`
	Signature []byte            `json:"checkpoint_signature"` // SM2 with SM3, by the log's key
}

// NewReceipt is that of a proved entry.
func NewReceipt(f *audit.Foreign) *Receipt {
	return &Receipt{Version: 1, Entry: f.Record.EntryDER, Payloads: f.Payloads, Proof: f.Proof, Note: f.Checkpoint.Note, Signature: f.Checkpoint.Signature}
}

// ParseReceipt reads a receipt and proves it with the log's key.
func ParseReceipt(b []byte, logKey crypto.PublicKey) (*audit.Entry, error) {
	fail := func(err error) (*audit.Entry, error) {
		return nil, fmt.Errorf("回执不能证明 (the receipt proves nothing): %w", err)
	}
	var r Receipt
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&r); err != nil {
		return fail(err)
	}
	if r.Version != 1 {
		return fail(fmt.Errorf("version %d", r.Version))
	}
	e, err := audit.ParseEntry(r.Entry)
	if err != nil {
		return fail(err)
	}
	c, err := audit.ParseCheckpoint(r.Note, r.Signature)
	if err != nil {
		return fail(err)
	}
	f := audit.Foreign{
		Node: c.Node, Epoch: c.Epoch, Proof: r.Proof, Payloads: r.Payloads, Checkpoint: *c,
		Record: audit.Record{Epoch: e.Epoch, Sequence: e.Sequence, LeafHash: audit.LeafHash(r.Entry), Entry: *e, EntryDER: r.Entry},
	}
	if err := f.Verify(logKey); err != nil {
		return fail(err)
	}
	return e, nil
}

// A Statement is what an appliance journalled about a backup that it wrote.
type Statement struct {
	ID, Node  string
	SM3       string // of the file, hexadecimal
	Entries   uint64 // of the journal
	Root      string // of their tree, hexadecimal
	Through   int
	Base      string
	Set       string // of the custodians
	Epoch     string // of the journal
	At        audit.Time
	Sequence  uint64
	Softtoken bool
}

// StatementOf reads the entry of a backup's outcome.
func StatementOf(e *audit.Entry) (*Statement, error) {
	if e.Kind != KindOutcome {
		return nil, fmt.Errorf("backup: entry %d is %s, not a backup's outcome", e.Sequence, e.Kind)
	}
	digest, _ := e.Field(FieldSM3).(audit.Octets)
	root, _ := e.Field(FieldRoot).(audit.Octets)
	entries, _ := e.Field(FieldEntries).(audit.Int)
	through, _ := e.Field(FieldThrough).(audit.Int)
	soft, _ := e.Field("softtoken").(audit.Bool)
	if len(digest) != 32 || len(root) != 32 {
		return nil, errors.New("backup: an outcome without digest or root")
	}
	return &Statement{
		ID: e.Object, Node: e.Node, SM3: fmt.Sprintf("%x", []byte(digest)), Entries: uint64(entries), Root: fmt.Sprintf("%x", []byte(root)),
		Through: int(through), Base: e.Text(FieldBase), Set: e.Text(FieldSet), Epoch: e.Epoch.String(), At: e.Time, Sequence: e.Sequence, Softtoken: bool(soft),
	}, nil
}

package audit

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"strconv"
)

// A ProjectedRow is what the central database keeps of an entry. Every column follows from the entry; absent text is
// "" here and NULL there.
type ProjectedRow struct {
	Node         string
	Epoch        string // 16 hexadecimal digits
	Sequence     uint64
	LeafHash     string // 64 hexadecimal digits
	RecordID     string // ref, 64 hexadecimal digits, or ""
	Kind         string
	Application  string
	Signer       string
	Department   string
	DocumentType string
	Campus       string
	SignedAt     int64 // the entry's time, µs since 1970 UTC
	Bound        int64 // its bound, µs
	Status       string
	CreatedBy    string
	CreatedAt    int64 // µs
	ModifiedBy   string
	ModifiedAt   int64
}

// Statuses of a row as the shipper writes it. Statistics count what is [StatusRecorded].
const (
	StatusRecorded = "recorded"
	StatusTest     = "test"     // an entry with the field test: of a test application or a test signer
	StatusImported = "imported" // a statement of another system ([KindImported])
)

// Writer is who writes a node's rows, as they name it.
func Writer(node string) string {
	by := "shipper/" + node
	return by[:min(len(by), MaxNameBytes)]
}

// Project derives the row of an entry.
func Project(r Record) ProjectedRow {
	e := &r.Entry
	by := Writer(e.Node)
	status := StatusRecorded
	switch {
	case e.Kind == KindImported:
		status = StatusImported
	case e.Field(FieldTest) == Bool(true):
		status = StatusTest
	}
	return ProjectedRow{
		Node: e.Node, Epoch: e.Epoch.String(), Sequence: e.Sequence, LeafHash: r.LeafHash.String(),
		RecordID: hex.EncodeToString(e.Ref), Kind: e.Kind,
		Application: short(e.Text(FieldApplication)), Signer: short(e.Text(FieldSigner)),
		Department: short(e.Text(FieldDepartment)), DocumentType: short(e.Text(FieldDocumentType)),
		Campus: short(e.Text(FieldCampus)), SignedAt: e.Time.Micros, Bound: e.Time.BoundMicros, Status: status,
		CreatedBy: by, CreatedAt: e.Time.Micros, ModifiedBy: by, ModifiedAt: e.Time.Micros,
	}
}

// short cuts text to the 256 bytes of its column. The journal has the whole.
func short(s string) string { return cut(s, MaxSubjectBytes) }

// A column of a row by name, as text, for comparing and for the MAC.
type column struct{ name, value string }

func (p *ProjectedRow) columns() []column {
	num := func(n int64) string { return fmt.Sprint(n) }
	return []column{
		{"node_id", p.Node}, {"epoch_id", p.Epoch}, {"seq_no", fmt.Sprint(p.Sequence)}, {"leaf_hash", p.LeafHash},
		{"record_id", p.RecordID}, {"kind_name", p.Kind}, {"application_id", p.Application}, {"signer_id", p.Signer},
		{"department_name", p.Department}, {"document_type", p.DocumentType}, {"campus_name", p.Campus},
		{"signed_at_us", num(p.SignedAt)}, {"bound_us", num(p.Bound)}, {"created_by", p.CreatedBy},
		{"created_at", num(p.CreatedAt)}, {"status_code", p.Status}, {"modified_by", p.ModifiedBy}, {"modified_at", num(p.ModifiedAt)},
	}
}

// A ProjectedBatch is rows that were shipped together, of one node and epoch and contiguous, and their MAC.
type ProjectedBatch struct {
	Node, Epoch string
	First, Last uint64
	MAC         string // HMAC-SM3, 64 hexadecimal digits
	KeyID       string
	Rows        []ProjectedRow
	// Changes are the rows' entries that changed something, each under a MAC of its own; Sealer computes that of their
	// set's root, which is known in the transaction alone.
	Changes []ProjectedChange
	Sealer  MAC
}

// seal computes the MACs of the batch and of its changes.
func (b *ProjectedBatch) seal(ctx context.Context, mac MAC, keyID string) error {
	sum, err := mac.MAC(ctx, b.MACInput())
	if err != nil {
		return fmt.Errorf("MAC: %w", err)
	}
	b.MAC, b.KeyID, b.Sealer = hex.EncodeToString(sum), keyID, mac
	for i := range b.Changes {
		c := &b.Changes[i]
		if c.MAC, err = RowMAC(ctx, mac, ChangeSet, c.Columns()); err != nil {
			return err
		}
		c.KeyID = keyID
	}
	return nil
}

// MACInput is what a batch's MAC is computed over: "yinjian/projection/batch/v2" and a zero byte; node, epoch; first
// and last; then of each row all columns, node_id … created_at, then status_code, modified_by and modified_at: statistics
// leave out by status. Texts are preceded by their length in four bytes, numbers are decimal texts.
func (b *ProjectedBatch) MACInput() []byte {
	out := append(make([]byte, 0, 64+len(b.Rows)*512), "yinjian/projection/batch/v2\x00"...)
	add := func(s string) {
		out = binary.BigEndian.AppendUint32(out, uint32(len(s)))
		out = append(out, s...)
	}
	add(b.Node)
	add(b.Epoch)
	add(fmt.Sprint(b.First))
	add(fmt.Sprint(b.Last))
	num := func(n int64) {
		var digits [20]byte
		d := strconv.AppendInt(digits[:0], n, 10)
		out = binary.BigEndian.AppendUint32(out, uint32(len(d)))
		out = append(out, d...)
	}
	for i := range b.Rows { // columns would make texts of all: this is done for every entry
		r := &b.Rows[i]
		add(r.Node)
		add(r.Epoch)
		num(int64(r.Sequence)) // below 2^63
		for _, v := range []string{r.LeafHash, r.RecordID, r.Kind, r.Application, r.Signer, r.Department, r.DocumentType, r.Campus} {
			add(v)
		}
		num(r.SignedAt)
		num(r.Bound)
		add(r.CreatedBy)
		num(r.CreatedAt)
		add(r.Status)
		add(r.ModifiedBy)
		num(r.ModifiedAt)
	}
	return out
}

// maxShippedBytes bounds what a batch's MAC is computed over: the software cipher machine takes a megabyte at once.
const maxShippedBytes = 512 << 10

// bytes are those of the row in MACInput, at most.
func (p *ProjectedRow) bytes() int {
	const lengthsAndNumbers = 18*4 + 5*20
	return lengthsAndNumbers + len(p.Node) + len(p.Epoch) + len(p.LeafHash) + len(p.RecordID) + len(p.Kind) + len(p.Application) + len(p.Signer) +
		len(p.Department) + len(p.DocumentType) + len(p.Campus) + len(p.CreatedBy) + len(p.Status) + len(p.ModifiedBy)
}

// A MAC computes HMAC-SM3 (32 bytes) with a key in the cipher machine.
type MAC interface {
	MAC(ctx context.Context, data []byte) ([]byte, error)
}

// A Projection is the database that people query.
type Projection interface {
	// Apply writes rows, batch and changes in one transaction. Applying the same batch again changes nothing. A row whose key
	// is there with another leaf hash is [ErrFork], and nothing is written. Nor is anything where the row before is gone:
	// rows have no gaps, and whoever ships asks for the position again.
	Apply(ctx context.Context, b ProjectedBatch) error
	// Shipped answers how far this node's epoch is: the greatest sequence, or [ErrNotFound].
	Shipped(ctx context.Context, node, epoch string) (uint64, error)
	// Leaf answers the leaf hash stored under a key, or [ErrNotFound].
	Leaf(ctx context.Context, node, epoch string, sequence uint64) (string, error)
	// Rebuilder answers which appliance is making the node's rows anew, "" for none.
	Rebuilder(ctx context.Context, node string) (string, error)
	// Nodes lists the nodes that have rows or batches.
	Nodes(ctx context.Context) ([]string, error)
	// Epochs lists the epochs of a node that have rows or batches.
	Epochs(ctx context.Context, node string) ([]string, error)
	// Rows calls fn with the rows of an epoch from a sequence on, ascending as numbers with a sign: from 2^63 on are all, those
	// below 0, which somebody else put there, first.
	Rows(ctx context.Context, node, epoch string, from uint64, fn func(ProjectedRow) error) error
	// Batches calls fn with the batches of an epoch, without Rows, by First.
	Batches(ctx context.Context, node, epoch string, fn func(ProjectedBatch) error) error
}

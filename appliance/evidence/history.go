package evidence

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"time"

	"yinjian/appliance/audit"
	"yinjian/appliance/pki"
)

// FormatHistory names a file about an imported record. It is no evidence of a signature, and says so.
const FormatHistory = "yinjian-history/1"

// A History is what the journal has of a record that an older system made: what was read, byte for byte, and where that
// stands in the log. It proves what was said when, and not that it was true.
type History struct {
	Format    string  `json:"format"`
	RecordID  string  `json:"record_id"`           // hex of 32 bytes
	Statement string  `json:"statement"`           // [HistoryStatement]
	Record    []byte  `json:"record"`              // a [HistoryRecord] as JSON, byte for byte
	Signature []byte  `json:"signature,omitempty"` // as it came from the older system
	Journal   Journal `json:"journal"`
}

// A HistoryRecord is what an older system says of a record. All but ID and SignedAt may be empty.
type HistoryRecord struct {
	ID              string `json:"id"`        // in the older system
	SignedAt        string `json:"signed_at"` // RFC 3339, as that system says
	Signer          string `json:"signer,omitempty"`
	SignerName      string `json:"signer_name,omitempty"`
	Role            string `json:"role,omitempty"`
	Department      string `json:"department,omitempty"`
	Campus          string `json:"campus,omitempty"`
	Application     string `json:"application,omitempty"`
	DocumentID      string `json:"document_id,omitempty"`
	DocumentType    string `json:"document_type,omitempty"`
	MediaType       string `json:"media_type,omitempty"`
	DigestAlgorithm string `json:"digest_algorithm,omitempty"`
	Digest          string `json:"digest,omitempty"` // hex
	// SignatureForm is "cms", or "opaque" for one that nobody here can read; "" without a signature.
	SignatureForm string `json:"signature_form,omitempty"`
}

// Forms of an older system's signature.
const (
	HistoryCMS    = formCMS
	HistoryOpaque = "opaque"
)

// CheckImported is never passed: what an import says was not looked at when it came.
const CheckImported = "history.imported"

// historyPrefix stands before the checks of the older signature.
const historyPrefix = "history."

// HistoryStatement is the sentence that goes with an imported record wherever it is shown.
func HistoryStatement(e *audit.Entry) string {
	on, system, name := e.Time.UTC().Format(time.DateOnly), e.Text("source.system"), e.Text("source.name")
	return fmt.Sprintf("于 %s 从旧系统 %s（%s）导入，未经本设备核验，不是本设备的签名 (imported on %s from %s, not verified by this appliance; no signature of this appliance)",
		on, system, name, on, system)
}

// BuildHistory makes the file about an imported record's entry. It waits for a checkpoint as [Build] does.
func BuildHistory(ctx context.Context, s Source, rec audit.Record) (*History, error) {
	e := &rec.Entry
	if e.Kind != audit.KindImported {
		return nil, fmt.Errorf("evidence: entry %d is a %s, not an imported record", rec.Sequence, e.Kind)
	}
	c, err := s.WaitCheckpoint(ctx, rec.Sequence)
	if err != nil {
		return nil, fmt.Errorf("evidence: %w", err)
	}
	path, err := s.InclusionProof(ctx, rec.Sequence, c.Size)
	if err != nil {
		return nil, fmt.Errorf("evidence: %w", err)
	}
	h := &History{
		Format: FormatHistory, RecordID: hex.EncodeToString(e.Ref), Statement: HistoryStatement(e),
		Journal: Journal{
			Node: e.Node, Epoch: e.Epoch.String(), Sequence: e.Sequence, Leaf: rec.EntryDER, TreeSize: c.Size,
			Checkpoint: c.Note, CheckpointSignature: c.Signature, CheckpointToken: c.Token, Inclusion: make([][]byte, 0, len(path)),
		},
	}
	for _, p := range path {
		h.Journal.Inclusion = append(h.Journal.Inclusion, p[:])
	}
	if h.Record, err = s.Payload(ctx, e, "record"); err != nil {
		return nil, fmt.Errorf("evidence: payload of entry %d: %w", rec.Sequence, err)
	}
	if _, ok := e.Payload("signature"); ok {
		if h.Signature, err = s.Payload(ctx, e, "signature"); err != nil {
			return nil, fmt.Errorf("evidence: payload of entry %d: %w", rec.Sequence, err)
		}
	}
	return h, nil
}

// Encode is the history as a file.
func (h *History) Encode() ([]byte, error) { return json.MarshalIndent(h, "", "  ") }

// ParseHistory reads such a file as strictly as [Parse] reads a bundle.
func ParseHistory(data []byte) (*History, error) {
	if len(data) > MaxBundle {
		return nil, &FormatError{"", fmt.Errorf("file of %d bytes, at most %d are read", len(data), MaxBundle)}
	}
	tree, err := parseTree(data)
	if err != nil {
		return nil, err
	}
	if o, _ := tree.(map[string]any); o["format"] != FormatHistory {
		return nil, &FormatError{"format", fmt.Errorf("not a file of format %q", FormatHistory)}
	}
	if err := spelt(reflect.TypeFor[History](), tree, ""); err != nil {
		return nil, err
	}
	var h History
	if err := json.Unmarshal(data, &h); err != nil {
		return nil, &FormatError{"", err}
	}
	return &h, nil
}

// IsHistory reports whether a file names the format of a history. It may be none for all that.
func IsHistory(data []byte) bool {
	var o struct{ Format string }
	return json.Unmarshal(data, &o) == nil && o.Format == FormatHistory
}

// VerifyHistory judges what can be judged of an imported record: that it stands in the log as it was read, and, where the
// older system left a CMS, that by itself. It is never valid: invalid, or indeterminate, with what holds in the checks.
func VerifyHistory(h *History, trust Trust, in Input) *Report {
	r := new(builder)
	r.require(CheckImported, CheckLeaf, CheckLeafMatch, CheckPayloads, CheckInclusion, CheckCheckpoint)
	e, err := audit.ParseEntry(h.Journal.Leaf)
	if err != nil {
		r.add(CheckLeaf, pki.Failed, fmt.Sprintf("日志条目无法解析 (leaf: %v)", err))
		return r.report()
	}
	r.hold(CheckLeaf, e.Kind == audit.KindImported, "日志条目编码规范 (leaf is canonical)", "条目不是导入的记录 (leaf is not an imported record's)")
	statement := HistoryStatement(e)
	r.state(statement)
	r.add(CheckImported, pki.NotChecked, statement)
	var said HistoryRecord
	readable := json.Unmarshal(h.Record, &said) == nil
	r.hold(CheckLeafMatch, readable && hex.EncodeToString(e.Ref) == h.RecordID && h.Statement == statement && e.Node == h.Journal.Node &&
		e.Epoch.String() == h.Journal.Epoch && e.Sequence == h.Journal.Sequence && e.Text("source.id") == said.ID && e.Text("signed_at") == said.SignedAt,
		"文件所述与日志条目一致 (the file says what the leaf says)", "文件与日志条目不一致 (the file differs from the leaf)")
	whole := len(e.Payloads) == 1 || len(e.Payloads) == 2 && len(h.Signature) > 0
	for name, data := range map[string][]byte{"record": h.Record, "signature": h.Signature} {
		p, ok := e.Payload(name)
		whole = whole && ok == (len(data) > 0) && (!ok || p.SM3 == audit.Sum(data))
	}
	r.hold(CheckPayloads, whole, "记录与旧签名即导入时所读 (record and older signature are as they were read)", "记录或旧签名已改动 (record or older signature was changed)")
	b := &Bundle{Journal: h.Journal} // of the log everything is as for a signature
	verifyInclusion(r, b, trust)
	verifyCheckpointToken(r, b, nil, trust, in)
	r.state(fmt.Sprintf("旧系统称由 %s %s 于 %s 签署 (signed by %s at %s, as the older system says)", said.Signer, said.SignerName, said.SignedAt, said.Signer, said.SignedAt))

	digest, err := hex.DecodeString(said.Digest)
	switch given, why := in.digest(said.DigestAlgorithm); {
	case err != nil || len(digest) == 0:
		r.add(CheckDocument, pki.NotChecked, "旧系统没有留下摘要 (the older system left no digest)")
	case given == nil:
		r.add(CheckDocument, pki.NotChecked, why)
	default:
		r.hold(CheckDocument, slices.Equal(given, digest), "原文摘要与旧系统所记一致 (document matches what the older system recorded)", "原文摘要与旧系统所记不符 (document differs from what the older system recorded)")
	}

	// The older signature stands or falls by itself, under the anchors that the verifier has for it.
	switch {
	case len(h.Signature) == 0:
		r.add(historyPrefix+CheckSignature, pki.NotChecked, "旧系统没有留下签名 (the older system left no signature)")
	case said.SignatureForm != HistoryCMS:
		r.add(historyPrefix+CheckSignature, pki.NotChecked, "旧签名的格式不明，只能保存 (the older signature is of an unknown form, kept and not read)")
	default:
		old := VerifyCMS(h.Signature, trust, in)
		for _, c := range old.Checks {
			if c.ID != CheckLeaf {
				r.add(historyPrefix+c.ID, c.Status, c.Detail)
			}
		}
		r.state("旧签名单独核验 (the older signature by itself): " + old.Summary)
		r.Signer, r.GenTime, r.Accuracy = old.Signer, old.GenTime, old.Accuracy
	}
	return r.report()
}

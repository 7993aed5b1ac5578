package evidence

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/emmansun/gmsm/sm3"

	"yinjian/appliance/audit"
	"yinjian/appliance/pki"
)

// Place is where a record stands in the log: its leaf, its path, and the newest checkpoint that covers it, a cosigned one
// before any other. It waits as [Build] does.
func Place(ctx context.Context, s Source, rec audit.Record) (Journal, error) {
	e := &rec.Entry
	c, cosigned := s.Cosigned(ctx, rec.Sequence)
	if !cosigned {
		var err error
		if c, err = s.WaitCheckpoint(ctx, rec.Sequence); err != nil {
			return Journal{}, fmt.Errorf("evidence: %w", err)
		}
	}
	path, err := s.InclusionProof(ctx, rec.Sequence, c.Size)
	if err != nil {
		return Journal{}, fmt.Errorf("evidence: %w", err)
	}
	j := Journal{
		Node: e.Node, Epoch: e.Epoch.String(), Sequence: e.Sequence, Leaf: rec.EntryDER, TreeSize: c.Size,
		Checkpoint: c.Note, CheckpointSignature: c.Signature, CheckpointToken: c.Token, Inclusion: make([][]byte, 0, len(path)),
	}
	if cosigned {
		j.Cosigned, j.Cosignature = c.Cosignature.Text, c.Cosignature.Signature
	}
	for _, h := range path {
		j.Inclusion = append(j.Inclusion, h[:])
	}
	return j, nil
}

// An Attested is something that the appliance vouches for as a whole: an entry of its journal names its digest, and holds a
// timestamp token over it.
type Attested struct {
	Kind string // of the entry
	Data []byte // what is vouched for; the entry's field [FieldAttested] is its SM3
	// Token is the entry's payload of that name, with the certificates and lists that it is judged by.
	Token        []byte
	Certificates [][]byte
	CRLs         [][]byte
	Journal      Journal
}

// FieldAttested is the field of the entry in which the digest stands, 32 octets.
const FieldAttested = "report.sm3"

// CheckAttested: the entry vouches for this very thing.
const CheckAttested = "journal.digest"

// maxValidation bounds the certificates and lists beside something attested: those of some units' paths.
const maxValidation = 64

// A Judgement is a report that is being made, for whoever knows more of what is attested.
type Judgement struct{ b *builder }

// Hold adds a check without which nothing is valid.
func (j Judgement) Hold(id string, ok bool, passed, failed string) {
	j.b.require(id)
	j.b.hold(id, ok, passed, failed)
}

// Skip adds a check without which nothing is valid, and that could not be made.
func (j Judgement) Skip(id, why string) {
	j.b.require(id)
	j.b.add(id, pki.NotChecked, why)
}

// State adds what a reader must not miss.
func (j Judgement) State(s string) { j.b.state(s) }

// VerifyAttested judges that the log vouches for a.Data, and when a unit stamped it. more adds what else there is to say;
// its entry is nil when the leaf is none.
func VerifyAttested(a *Attested, trust Trust, in Input, more func(Judgement, *audit.Entry)) *Report {
	r := new(builder)
	if len(a.Certificates) > maxValidation || len(a.CRLs) > maxValidation {
		r.add(CheckFormat, pki.Failed, "证书与吊销列表过多 (too many certificates or CRLs)")
		return r.report()
	}
	r.require(CheckLeaf, CheckAttested, CheckPayloads, CheckInclusion, CheckCheckpoint, CheckToken)
	certs := parseCertificates(r, a.Certificates)
	in.CRLs = slices.Concat(parseCRLs(r, a.CRLs), in.CRLs)
	e, err := audit.ParseEntry(a.Journal.Leaf)
	if err != nil {
		r.add(CheckLeaf, pki.Failed, fmt.Sprintf("日志条目无法解析 (leaf: %v)", err))
		e = nil
	} else {
		r.hold(CheckLeaf, e.Kind == a.Kind && e.Node == a.Journal.Node && e.Epoch.String() == a.Journal.Epoch && e.Sequence == a.Journal.Sequence,
			"日志条目编码规范，编号一致 (leaf is canonical, and of that number)", "条目不是所述的条目 (the leaf is another entry)")
		sum := sm3.Sum(a.Data)
		named, _ := e.Field(FieldAttested).(audit.Octets)
		r.hold(CheckAttested, slices.Equal(named, sum[:]), "内容即日志所记 (the content is what the journal names)", "内容已改动：与日志所记摘要不符 (the content was changed: the journal names another digest)")
		p, ok := e.Payload("token")
		r.hold(CheckPayloads, ok && p.SM3 == audit.Sum(a.Token), "时间戳即日志所记 (the token is the journal's)", "时间戳不是日志所记的那一枚 (the token is not the one in the journal)")
	}
	verifyInclusion(r, &Bundle{Journal: a.Journal}, trust)
	verifyCheckpointToken(r, &Bundle{Journal: a.Journal}, certs, trust, in)
	verifyToken(r, a.Token, a.Data, certs, trust, in, time.Time{})
	more(Judgement{r}, e)
	return r.report()
}

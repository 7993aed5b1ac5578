package sign

import (
	"context"
	"encoding/hex"
	"errors"

	"yinjian/appliance/account"
	"yinjian/appliance/audit"
	"yinjian/appliance/evidence"
	"yinjian/appliance/pki"
	"yinjian/appliance/problem"
	"yinjian/tsa"
)

// Verify judges what the request holds against the appliance's anchors, log keys and newest CRLs. A verdict, also
// "invalid", is no error; an error means that the request itself cannot be understood.
func (s *Service) Verify(_ context.Context, q *VerifyRequest) (*evidence.Report, error) {
	given := 0
	for _, set := range []bool{q.Evidence != nil, q.CMS != nil, q.Token != nil, q.Raw != nil} {
		if set {
			given++
		}
	}
	if given != 1 {
		return nil, problem.Invalid("evidence", "evidence、cms、token、raw 须给出且只给出一项 (give exactly one of evidence, cms, token, raw)")
	}
	if q.Document != nil && q.Digest != nil {
		return nil, problem.Invalid("digest", "document 与 digest 只能给出其一 (give document or digest, not both)")
	}
	// The appliance's newest lists are looked at also for a bundle, which holds those of its time: they make
	// nothing good that is not, and may show that a timestamp unit's key has fallen into other hands since.
	in := evidence.Input{Document: q.Document, CRLs: s.cfg.Directory.CRLs(), AlgorithmEnds: s.cfg.AlgorithmEnds}
	trust := s.cfg.Trust
	trust.Signers, trust.Units = s.cfg.Directory.AnchorsFor(pki.StaffSigning), s.cfg.Directory.AnchorsFor(pki.TimeStamping)
	if q.Digest != nil {
		if q.Digest.Algorithm != nameSM3 && q.Digest.Algorithm != nameSHA256 || len(q.Digest.Value) != 32 {
			return nil, problem.Invalid("digest", "须为 32 字节的 SM3 或 SHA-256 (must be SM3 or SHA-256, 32 bytes)")
		}
		in.Digest, in.DigestAlgorithm = q.Digest.Value, q.Digest.Algorithm
	}
	if now := s.cfg.Clock.Now(); now.Trusted() {
		in.At = now.Time
	}
	switch {
	case q.Evidence != nil:
		b, err := evidence.Parse(q.Evidence)
		if err != nil {
			return nil, problem.Invalid("evidence", "证据文件无法解析 (evidence cannot be read)").With(err)
		}
		return evidence.Verify(b, trust, in), nil
	case q.CMS != nil:
		return evidence.VerifyCMS(q.CMS, trust, in), nil
	case q.Token != nil:
		token := q.Token
		if r, err := tsa.ParseResponse(token); err == nil && r.Token != nil {
			token = r.Token.DER
		}
		return evidence.VerifyToken(token, trust, in), nil
	default:
		if _, ok := digestNames[q.Raw.Algorithm]; !ok {
			return nil, problem.Invalid("raw.algorithm", "须为 SM2 或 RSA-2048 (must be SM2 or RSA-2048)")
		}
		if q.Digest != nil {
			return nil, problem.New(problem.ContentRequired, "裸签名须用原文验证 (a raw signature is verified with the document)", "改传 document (send the document)")
		}
		return evidence.VerifyRaw(q.Raw.Algorithm, q.Raw.Value, q.Raw.Certificate, q.Raw.Chain, q.Raw.Token, trust, in), nil
	}
}

var errNoRecord = problem.New(problem.NotFound, "没有这条记录 (no such record)", "核对记录号；只能查询本应用的记录 (check the id; an application reads its own records only)")

// Evidence answers the bundle of one record, as JSON. An application without the right evidence.any reads its own
// records only, and cannot tell another's from none.
func (s *Service) Evidence(ctx context.Context, app *account.Application, recordID string) ([]byte, error) {
	id, err := hex.DecodeString(recordID)
	if err != nil || len(id) != 32 {
		return nil, problem.Invalid("id", "记录号须为 64 位十六进制 (a record id has 64 hexadecimal digits)")
	}
	recs, err := s.cfg.Journal.ByRef(ctx, id)
	if errors.Is(err, audit.ErrNotFound) {
		return nil, errNoRecord
	}
	if err != nil {
		return nil, journalProblem(err)
	}
	rec := recs[0]
	if rec.Entry.Kind != Kind || rec.Entry.Text("application") != app.ID && !app.Has(account.RightEvidenceAny) {
		return nil, errNoRecord
	}
	b, err := evidence.Build(ctx, s.cfg.Journal, rec)
	if errors.Is(err, audit.ErrNoCheckpoint) {
		return nil, problem.New(problem.NotReady, "覆盖该记录的日志检查点尚未签署 (no signed checkpoint covers the record yet)", "稍后重试 (try again in a few seconds)").With(err)
	}
	if err != nil {
		return nil, journalProblem(err)
	}
	if s.cfg.Archived != nil {
		record, err := s.cfg.Archived(ctx, &rec)
		if err != nil {
			return nil, journalProblem(err)
		}
		if record != nil {
			b = b.WithRecord(record)
		}
	}
	return b.Encode()
}

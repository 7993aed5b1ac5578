package evidence

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/sm3"
	"github.com/emmansun/gmsm/smx509"

	"yinjian/appliance/audit"
	"yinjian/appliance/cms"
	"yinjian/appliance/pki"
	"yinjian/ntp"
	"yinjian/tsa"
)

// Input is what a verifier may hold beside the evidence.
type Input struct {
	Document []byte // the signed content; nil when it is not at hand
	Digest   []byte // instead of Document: its digest
	// DigestAlgorithm is "SM3" or "SHA-256"; "" means that of the signature (of the imprint, for a token alone). A digest
	// by another algorithm than the signature's cannot be compared, which proves nothing either way.
	DigestAlgorithm string
	// Query, for a token alone, is the request that it must answer: imprint, nonce and policy. It stands in for a document.
	Query *tsa.Request
	// CRLs known to the verifier, beside those in the evidence. A list made after the signature clears a certificate only
	// together with At, at which it must be current.
	CRLs []*pki.CRL
	// At is the verifier's own time. Without a timestamp, certificates are judged at it. Zero: such validity is not
	// checked, and the verifier's CRLs must have been current when the key was used. At a time when a timestamp has ended,
	// it counts only as far as archive timestamps renewed it.
	At time.Time
	// AlgorithmEnds are the times from which algorithms are not relied on any more, in the verifier's judgement, by name:
	// SM2, SM3, RSA-2048, SHA-256 …
	AlgorithmEnds map[string]time.Time
}

// IDs of the checks made here; those of packages cms, pki and tsa keep their own behind a prefix.
const (
	CheckFormat          = "evidence.format"
	CheckCertificates    = "evidence.certificates"
	CheckCRLs            = "evidence.crls"
	CheckDocument        = "document.digest"
	CheckCMS             = "signature.cms.parse"
	CheckSignature       = "signature.value"
	CheckSignedDigest    = "signature.digest"
	CheckContext         = "signature.context"
	CheckSigner          = "signer.certificate"
	CheckConsentHash     = "consent.hash"
	CheckConsentBound    = "consent.binding"
	CheckConsentTime     = "consent.time"
	CheckConsentProof    = "consent.proof"
	CheckToken           = "token.present"
	CheckTokenEmbedded   = "token.embedded"
	CheckTokenAnswers    = "token.answers"
	CheckTokenImprint    = "token." + tsa.CheckImprint
	CheckLeaf            = "journal.leaf"
	CheckLeafMatch       = "journal.record"
	CheckPayloads        = "journal.payloads"
	CheckInclusion       = "journal.inclusion"
	CheckCheckpoint      = "journal.checkpoint"
	CheckCheckpointToken = "journal.checkpoint.token"
	CheckCosigned        = "journal.cosignature"
)

const (
	formRaw = "raw"
	formCMS = "cms"
	// stampNone is the policy of an application that asks for no timestamps; any other word means that one is required.
	stampNone = "none"
	// consentSlack is how far the time of a signature may be outside its consent's: what lies between taking the consent
	// and the leaf, for which package sign allows 45 s, and the clock's bounds.
	consentSlack = time.Minute
)

// Unreadable is the report on a file that [Parse] refuses: invalid, for there is one way to write evidence down.
func Unreadable(err error) *Report {
	r := new(builder)
	r.add(CheckFormat, pki.Failed, fmt.Sprintf("证据文件不合格式 (not a well-formed evidence file: %v)", err))
	return r.report()
}

// Verify judges a bundle.
func Verify(b *Bundle, trust Trust, in Input) *Report {
	r := new(builder)
	if n := len(b.Certificates) + len(b.CRLs); n > audit.MaxPayloads { // of which the leaf names no more
		r.add(CheckPayloads, pki.Failed, fmt.Sprintf("证书与吊销列表共 %d 份，过多 (too many certificates and CRLs)", n))
		return r.report()
	}
	certs := parseCertificates(r, b.Certificates)
	archived := readArchive(b.EvidenceRecord)
	in.CRLs = slices.Concat(parseCRLs(r, b.CRLs), archived.lists, in.CRLs)

	// 1. The record: what the leaf says is the truth; the JSON beside it must say the same.
	entry := verifyLeaf(r, b)
	r.require(CheckLeaf, CheckLeafMatch, CheckPayloads)
	verifyInclusion(r, b, trust)
	r.require(CheckInclusion, CheckCheckpoint)
	verifyCheckpointToken(r, b, certs, trust, in)

	// 2. The document.
	recorded, err := hex.DecodeString(b.Record.Digest)
	if err != nil || len(recorded) != 32 {
		r.add(CheckDocument, pki.Failed, "记录中的摘要不是 32 字节 (the record's digest is malformed)")
		recorded = make([]byte, 32)
	}
	switch given, why := in.digest(b.Record.DigestAlgorithm); {
	case given == nil:
		r.add(CheckDocument, pki.NotChecked, why)
	default:
		r.hold(CheckDocument, bytes.Equal(given, recorded), "原文摘要与记录一致 (document matches the record)", "原文已改动：摘要与记录不符 (document was changed: its digest differs)")
	}
	r.require(CheckDocument)

	// 3. The token fixes the time at which certificates are judged.
	value := b.Signature.Value
	var message *cms.SignedData
	if b.Signature.Form == formCMS {
		m, err := cms.Parse(b.Signature.Value)
		if err == nil && len(m.SignerInfos) != 1 {
			err = fmt.Errorf("%d signers: %w", len(m.SignerInfos), cms.ErrSigners)
		}
		if err != nil {
			r.add(CheckSignature, pki.Failed, fmt.Sprintf("CMS 无法解析 (cannot be parsed: %v)", err))
		} else {
			message, value = m, m.SignerInfos[0].Signature
		}
	}
	at, first := verifyToken(r, b.Token, value, certs, trust, in, archived.next(0))
	verifyArchive(r, b, archived, first, certs, trust, in)
	verifyDocumentDigest(r, b, in)
	switch {
	case b.Record.StampPolicy != stampNone:
		r.require(CheckToken)
	case len(b.Token) == 0 && entry != nil && (ntp.Reading{State: entry.Time.State}).Trusted():
		at = entry.Time.UTC()
		r.state("无时间戳（应用策略不要求）：时间仅由本机日志声明 (no timestamp by policy; the time is the appliance's own word)")
	}
	if message != nil && len(b.Token) > 0 {
		embedded := message.SignerInfos[0].TimeStampTokens()
		r.hold(CheckTokenEmbedded, len(embedded) == 1 && bytes.Equal(embedded[0], b.Token), "CMS 内含同一时间戳 (the CMS carries the same token)", "CMS 内的时间戳与证据不一致 (the token inside the CMS differs)")
	}

	// 4. The signature, under the certificate that the leaf names.
	signer := certificateOf(entry, certs)
	switch {
	case message != nil:
		signer = verifyMessage(r, "signature.", message, in, certs, recorded, b.Record.DigestAlgorithm)
		r.require("signature." + cms.CheckSignature)
		verifyContext(r, b, entry, message)
		r.require(CheckContext, CheckSignedDigest)
	case b.Signature.Form == formRaw:
		verifyRaw(r, b.Signature.Algorithm, signer, in.Document, b.Signature.Value)
		r.require(CheckSignature)
	case b.Signature.Form != formCMS:
		r.add(CheckSignature, pki.Failed, fmt.Sprintf("未知的签名形式 %q (unknown form)", b.Signature.Form))
	}
	if signer != nil {
		r.hold(CheckSigner, certificateOf(entry, []*smx509.Certificate{signer}) != nil, "签名证书即日志所记 (the certificate is the journal's)", "签名证书与日志所记不同 (the certificate is not the one in the journal)")
		r.Signer = signer.Subject.String()
	}
	r.require(CheckSigner)
	verifyPath(r, "signer.", signer, certs, trust, in, at, pki.StaffSigning)
	verifyUnstamped(r, b, archived, signer, trust, in)

	// 5. Consent.
	verifyConsent(r, b, entry, at)
	r.require(CheckConsentHash, CheckConsentBound, CheckConsentTime)
	if b.Record.TimeProvenance != "" {
		r.state("时间来源 (time by): " + b.Record.TimeProvenance)
	}
	if entry != nil && entry.Field("revocation") != nil {
		r.state("签署时策略为 soft，吊销状态未核验 (policy soft: revocation was not checked when it was signed)")
	}
	if b.Record.Test {
		r.state("测试记录，无法律意图 (a test record, without legal intent)")
	}
	return r.report()
}

// digest is the document's digest by the named algorithm, or nil and why there is none.
func (in Input) digest(algorithm string) (digest []byte, why string) {
	switch {
	case in.Document == nil && in.Digest == nil:
		return nil, "未提供原文，无法比对摘要 (no document given)"
	case in.Document == nil && in.DigestAlgorithm != "" && in.DigestAlgorithm != algorithm:
		return nil, fmt.Sprintf("给出的是 %s 摘要，签名用的是 %s，无法比对 (digest by another algorithm)", in.DigestAlgorithm, algorithm)
	case in.Document == nil:
		return in.Digest, ""
	case algorithm == nameSM3:
		return sumSM3(in.Document), ""
	case algorithm == nameSHA256:
		sum := sha256.Sum256(in.Document)
		return sum[:], ""
	default:
		return nil, fmt.Sprintf("不支持的摘要算法 %q (digest algorithm)", algorithm)
	}
}

// Names of digest algorithms in records and requests.
const (
	nameSM3    = "SM3"
	nameSHA256 = "SHA-256"
)

func sumSM3(b []byte) []byte { s := sm3.Sum(b); return s[:] }

// certificateOf is the certificate whose digest the leaf holds, nil if it is not there.
func certificateOf(e *audit.Entry, certs []*smx509.Certificate) *smx509.Certificate {
	if e == nil {
		return nil
	}
	want, _ := e.Field("certificate.sm3").(audit.Octets)
	for _, c := range certs {
		if sum := audit.Sum(c.Raw); bytes.Equal(want, sum[:]) {
			return c
		}
	}
	return nil
}

func parseCertificates(r *builder, ders [][]byte) []*smx509.Certificate {
	var out []*smx509.Certificate
	for i, der := range ders {
		c, err := pki.ParseCertificate(der)
		if err != nil {
			r.add(CheckCertificates, pki.Failed, fmt.Sprintf("第 %d 张证书无法解析 (certificate %d: %v)", i+1, i+1, err))
			continue
		}
		out = append(out, c)
	}
	return out
}

func parseCRLs(r *builder, ders [][]byte) []*pki.CRL {
	var out []*pki.CRL
	for i, der := range ders {
		l, err := pki.ParseCRL(der)
		if err != nil {
			r.add(CheckCRLs, pki.Failed, fmt.Sprintf("第 %d 份吊销列表无法解析 (CRL %d: %v)", i+1, i+1, err))
			continue
		}
		out = append(out, l)
	}
	return out
}

// verifyLeaf checks the leaf and that everything in the bundle is what the leaf commits to. It answers the entry, nil if
// the leaf is none.
func verifyLeaf(r *builder, b *Bundle) *audit.Entry {
	e, err := audit.ParseEntry(b.Journal.Leaf)
	if err != nil {
		r.add(CheckLeaf, pki.Failed, fmt.Sprintf("日志条目无法解析 (leaf: %v)", err))
		return nil
	}
	r.hold(CheckLeaf, e.Kind == KindSign, "日志条目编码规范 (leaf is canonical)", "条目不是签名记录 (leaf is not a signature's)")
	var differs []string
	same := func(name string, ok bool) {
		if !ok {
			differs = append(differs, name)
		}
	}
	for name, v := range map[string]string{
		"application": b.Record.Application, "campus": b.Record.Campus, "signer": b.Record.Signer,
		"department": b.Record.Department, "role": b.Record.Role, "document.type": b.Record.DocumentType,
		"document.id": b.Record.DocumentID, "document.media_type": b.Record.MediaType,
		"digest.algorithm": b.Record.DigestAlgorithm, "stamp": b.Record.StampPolicy,
		"time.provenance": b.Record.TimeProvenance, "algorithm": b.Signature.Algorithm, "form": b.Signature.Form,
	} {
		same(name, e.Text(name) == v)
	}
	digest, _ := e.Field("digest.value").(audit.Octets)
	same("digest.value", hex.EncodeToString(digest) == b.Record.Digest)
	same("document.size", e.Field("document.size") == audit.Int(b.Record.Size))
	same("time.bound_us", e.Field("time.bound_us") == audit.Int(b.Record.TimeBoundUS))
	same("test", e.Field("test") == audit.Bool(b.Record.Test))
	same("detached", e.Field("detached") == audit.Bool(b.Signature.Detached))
	same("record_id", hex.EncodeToString(e.Ref) == b.RecordID)
	same("node", e.Node == b.Journal.Node)
	same("epoch", e.Epoch.String() == b.Journal.Epoch)
	same("sequence", e.Sequence == b.Journal.Sequence)
	if by, ok := strings.CutPrefix(e.Text("stamp.by"), "upstream/"); ok {
		r.state(fmt.Sprintf("时间戳由上游设备 %s 签发，本机核验后采用 (the token is of the upstream device %s; the appliance verified it)", by, by))
	}
	slices.Sort(differs)
	r.hold(CheckLeafMatch, len(differs) == 0, "证据所述与日志条目一致 (the record says what the leaf says)", fmt.Sprintf("与日志条目不一致：%v (differs from the leaf)", differs))

	verifyPayloads(r, b, e)
	return e
}

// verifyPayloads holds what the bundle carries against the digests in the leaf. What is missing could not be compared;
// what is missing while something that the leaf does not know stands in the bundle was changed. More certificates and
// CRLs than the leaf names do no harm: whoever keeps evidence for years may add newer lists.
func verifyPayloads(r *builder, b *Bundle, e *audit.Entry) {
	named := map[audit.Hash]bool{}
	for _, p := range e.Payloads {
		named[p.SM3] = true
	}
	held := map[audit.Hash]bool{}
	foreign := false
	for _, p := range slices.Concat(b.Certificates, b.CRLs) {
		sum := audit.Sum(p)
		held[sum] = true
		foreign = foreign || !named[sum]
	}
	single := map[string][]byte{"signature": b.Signature.Value, "token": b.Token, "authorization": b.Authorization}
	var missing, changed []string
	for _, p := range e.Payloads {
		data, ok := single[p.Name]
		switch {
		case ok && len(data) > 0 && audit.Sum(data) != p.SM3, !ok && !held[p.SM3] && foreign:
			changed = append(changed, p.Name)
		case ok && len(data) == 0, !ok && !held[p.SM3]:
			missing = append(missing, p.Name)
		}
	}
	for name, data := range single {
		if _, ok := e.Payload(name); !ok && len(data) > 0 {
			changed = append(changed, name)
		}
	}
	slices.Sort(changed)
	switch {
	case len(changed) > 0:
		r.add(CheckPayloads, pki.Failed, fmt.Sprintf("已改动：%v (not what the leaf names)", changed))
	case len(missing) > 0:
		r.add(CheckPayloads, pki.NotChecked, fmt.Sprintf("证据不全，缺：%v (missing)", missing))
	default:
		r.add(CheckPayloads, pki.Passed, "签名、时间戳、授权、证书与日志所记摘要一致 (payloads hash to what the leaf says)")
	}
}

func verifyInclusion(r *builder, b *Bundle, trust Trust) {
	c, err := audit.ParseCheckpoint(b.Journal.Checkpoint, b.Journal.CheckpointSignature)
	if err != nil {
		r.add(CheckCheckpoint, pki.Failed, fmt.Sprintf("检查点无法解析 (checkpoint: %v)", err))
		return
	}
	if len(trust.LogKeys) == 0 {
		r.add(CheckCheckpoint, pki.NotChecked, "未提供日志公钥 (no log key given)")
	} else {
		signed := slices.ContainsFunc(trust.LogKeys, func(k crypto.PublicKey) bool { return audit.VerifyCheckpoint(k, c) == nil })
		r.hold(CheckCheckpoint, signed && c.Node == b.Journal.Node, "检查点由日志密钥签署 (checkpoint signed by the log's key)", "检查点不是可信日志密钥所签 (checkpoint is not signed by a trusted log key)")
	}
	path := make([]audit.Hash, 0, len(b.Journal.Inclusion))
	for _, h := range b.Journal.Inclusion {
		if len(h) != len(audit.Hash{}) {
			r.add(CheckInclusion, pki.Failed, "包含证明的散列长度不对 (malformed proof)")
			return
		}
		path = append(path, audit.Hash(h))
	}
	// The path's length is checked there against size and index.
	err = audit.VerifyInclusion(b.Journal.Sequence, b.Journal.TreeSize, audit.LeafHash(b.Journal.Leaf), path, c.Root)
	r.hold(CheckInclusion, err == nil && c.Size == b.Journal.TreeSize, "记录在日志树中 (the record is in the log)", "包含证明不成立：记录不在该检查点的日志中 (inclusion proof does not hold)")
	verifyCosignature(r, b, trust)
}

// verifyCosignature judges what another campus says of the checkpoint. It is there or not; one that is there and is not
// about this checkpoint, or does not verify under the keys at hand, was changed. Without a key nothing is known of it.
func verifyCosignature(r *builder, b *Bundle, trust Trust) {
	if len(b.Journal.Cosigned) == 0 && len(b.Journal.Cosignature) == 0 {
		r.add(CheckCosigned, pki.NotChecked, "尚无另一院区的见证签名 (no cosignature of another campus)")
		return
	}
	s, err := audit.ParseCosignature(b.Journal.Cosigned, b.Journal.Cosignature)
	if err != nil {
		r.add(CheckCosigned, pki.Failed, fmt.Sprintf("见证签名无法解析 (cosignature: %v)", err))
		return
	}
	if !bytes.Equal(s.Note, b.Journal.Checkpoint) || s.Node == b.Journal.Node {
		r.add(CheckCosigned, pki.Failed, "见证签名不是对这个检查点的，或是本机自签 (the cosignature is about another checkpoint, or the log's own)")
		return
	}
	if len(trust.CosignerKeys) == 0 {
		r.add(CheckCosigned, pki.NotChecked, fmt.Sprintf("声称由%s院区（%s）见证，未提供其日志公钥 (said to be cosigned by campus %s, node %s; its log key was not given)", s.Campus, s.Node, s.Campus, s.Node))
		return
	}
	i := slices.IndexFunc(trust.CosignerKeys, func(k crypto.PublicKey) bool { return audit.VerifyCosignature(k, s) == nil })
	if !r.hold(CheckCosigned, i >= 0, "另一院区已见证此检查点 (another campus has cosigned the checkpoint)", "见证签名不是所给的另一院区日志密钥所签 (the cosignature is not by the log key given for the other campus)") {
		return
	}
	key := "?"
	if spki, err := smx509.MarshalPKIXPublicKey(trust.CosignerKeys[i]); err == nil {
		key = audit.Sum(spki).String()[:16]
	}
	r.state(fmt.Sprintf("检查点由%s院区（节点 %s，日志公钥 SM3 %s…）于 %s 见证 (cosigned by campus %s, node %s, log key SM3 %s…)",
		s.Campus, s.Node, key, time.UnixMicro(s.Time).UTC().Format(time.RFC3339), s.Campus, s.Node, key))
}

// verifyCheckpointToken judges the timestamp over the checkpoint's signature, which dates the log itself. It is there or
// not; one that is there and wrong was changed. The leaf does not commit to it, and a CMS signs neither the certificates
// in it nor how it is put together, so it is held to what appliances write in this format: it carries its unit's
// certificate, its algorithms are known, and no certificate in it is without an issuer that signed it.
func verifyCheckpointToken(r *builder, b *Bundle, certs []*smx509.Certificate, trust Trust, in Input) {
	if len(b.Journal.CheckpointToken) == 0 {
		r.add(CheckCheckpointToken, pki.NotChecked, "检查点当时尚无时间戳 (the checkpoint had no timestamp then)")
		return
	}
	t, err := tsa.ParseToken(b.Journal.CheckpointToken)
	if err != nil {
		r.add(CheckCheckpointToken, pki.Failed, fmt.Sprintf("检查点的时间戳无法解析 (token: %v)", err))
		return
	}
	report, err := t.VerifyData(b.Journal.CheckpointSignature, certs...)
	if err != nil {
		r.add(CheckCheckpointToken, pki.Failed, fmt.Sprintf("检查点的时间戳不成立 (the checkpoint's token: %v)", err))
		return
	}
	known := slices.Concat(t.Certificates(), certs)
	p := judgePath(report.Signer, known, trust, in, t.GenTime, pki.TimeStamping)
	when := t.GenTime.Format(time.RFC3339Nano)
	anchored := slices.ContainsFunc(p.Checks, func(c pki.Check) bool { return c.ID == pki.CheckPathChain && c.Status == pki.Passed })
	switch {
	case p.Verdict == pki.Invalid && len(b.EvidenceRecord) > 0 && voided(report.Signer, known, trust, in, t.GenTime):
		r.add(CheckCheckpointToken, pki.NotChecked, "检查点的时间戳 "+when+" 因其证书后来被吊销而作废；存档时间戳不含它，也不需要它 (voided by a later revocation; the archive timestamps neither cover nor need it)")
	case p.Verdict == pki.Invalid:
		r.add(CheckCheckpointToken, pki.Failed, "检查点的时间戳证书不可信 (the certificate of the checkpoint's token is not good)")
	case anchored && !vouched(t.Certificates(), slices.Concat(known, trust.Anchors), 8):
		r.add(CheckCheckpointToken, pki.Failed, "检查点的时间戳中有无人签发的证书 (a certificate inside the checkpoint's token is signed by nobody)")
	case p.Verdict == pki.Valid:
		r.add(CheckCheckpointToken, pki.Passed, "检查点于 "+when+" 已存在 (the checkpoint existed then)")
	default:
		// The unit may be of another CA than the signer, whose CRL the bundle need not hold.
		r.add(CheckCheckpointToken, pki.NotChecked, "检查点的时间戳 "+when+" 与签名相符，其证书链或吊销状态未能核实 (the token fits; its certificate could not be judged)")
	}
}

// voided reports whether nothing is wrong with a timestamping certificate but that it was revoked after at.
func voided(leaf *smx509.Certificate, certs []*smx509.Certificate, trust Trust, in Input, at time.Time) bool {
	return pki.VerifyPath(pki.Options{
		Leaf: leaf, Intermediates: certs, Anchors: trust.anchors(pki.TimeStamping), CRLs: in.CRLs, Purpose: pki.TimeStamping, At: at, StoodAt: at,
	}).Verdict != pki.Invalid
}

// vouched reports whether each certificate is signed by the key of one of the issuers, of which there are no more than a
// path is searched among. More certificates than most are in no token of ours: those of a path, or, in an archive
// timestamp, of all units' paths.
func vouched(certs, issuers []*smx509.Certificate, most int) bool {
	if len(certs) > most {
		return false
	}
	for _, c := range certs {
		if !slices.ContainsFunc(issuers, func(i *smx509.Certificate) bool {
			return bytes.Equal(i.RawSubject, c.RawIssuer) && i.CheckSignature(c.SignatureAlgorithm, c.RawTBSCertificate, c.Signature) == nil
		}) {
			return false
		}
	}
	return true
}

// verifyToken judges the token over value and answers its genTime, zero when there is none that holds, and how long it
// stands, nil when there is no token. next is when an archive timestamp covered it, zero for never.
func verifyToken(r *builder, token, value []byte, certs []*smx509.Certificate, trust Trust, in Input, next time.Time) (time.Time, *standing) {
	if len(token) == 0 {
		r.add(CheckToken, pki.NotChecked, "没有时间戳 (no timestamp token)")
		return time.Time{}, nil
	}
	t, err := tsa.ParseToken(token)
	if err != nil {
		r.unreadable(CheckToken, "时间戳", err)
		return time.Time{}, nil
	}
	r.add(CheckToken, pki.Passed, "有时间戳 (a token is there)")
	report, _ := t.VerifyData(value, certs...)
	return judgeToken(r, t, report, certs, trust, in, next)
}

// judgeToken adds the checks of a token and of its certificate, and answers genTime if the token is what it should be.
func judgeToken(r *builder, t *tsa.Token, report *cms.Report, certs []*smx509.Certificate, trust Trust, in Input, next time.Time) (time.Time, *standing) {
	before := len(r.Checks)
	addCMS(r, "token.", report)
	r.require("token."+cms.CheckSignature, CheckTokenImprint)
	ok := report.Result(cms.CheckSignature) == cms.Passed
	for _, c := range r.Checks[before:] {
		ok = ok && c.Status != pki.Failed
	}
	if ok {
		r.GenTime, r.Accuracy = t.GenTime.Format(time.RFC3339Nano), t.Accuracy.String()
	}
	s := stand(t, report.Signer, slices.Concat(t.Certificates(), certs), trust, in, next)
	addPath(r, "tsa.", report.Signer, s.path)
	if in.At.IsZero() {
		r.state(noPresent)
	}
	if next.IsZero() && s.past(in.At) {
		r.require(CheckArchiveCurrent)
		current(r, s, in, false)
	}
	if !ok {
		return time.Time{}, &s
	}
	return t.GenTime, &s
}

// judgePath judges a certificate at a time. Lists that were current then decide; where they do not suffice, lists that are
// current at the verifier's own time may (pki.Options.RevocationAt). A revocation that any list shows counts either way.
func judgePath(leaf *smx509.Certificate, certs []*smx509.Certificate, trust Trust, in Input, at time.Time, purpose pki.Purpose) *pki.PathReport {
	o := pki.Options{Leaf: leaf, Intermediates: certs, Anchors: trust.anchors(purpose), At: at, Purpose: purpose, CRLs: in.CRLs}
	p := pki.VerifyPath(o)
	if p.Verdict == pki.Indeterminate && !at.IsZero() && in.At.After(at) {
		o.RevocationAt = in.At
		if later := pki.VerifyPath(o); later.Verdict != pki.Indeterminate {
			p = later
		}
	}
	return p
}

func verifyPath(r *builder, prefix string, leaf *smx509.Certificate, certs []*smx509.Certificate, trust Trust, in Input, at time.Time, purpose pki.Purpose) {
	addPath(r, prefix, leaf, judgePath(leaf, certs, trust, in, at, purpose))
}

// evaluationOnly is said once of all certificates.
const evaluationOnly = "证书仅供评估，不具法律效力 (certificates are for evaluation only)"

// addPath adds what was found of a certificate's path.
func addPath(r *builder, prefix string, leaf *smx509.Certificate, p *pki.PathReport) {
	for _, id := range pki.PathChecks() {
		r.require(prefix + id)
	}
	if leaf == nil {
		r.add(prefix+pki.CheckPathChain, pki.NotChecked, "没有可判断的证书 (no certificate to judge)")
		return
	}
	r.Checks = append(r.Checks, pki.WithPrefix(prefix, p.Checks)...)
	if p.Evaluation && !slices.Contains(r.Statements, evaluationOnly) {
		r.state(evaluationOnly)
	}
}

// verifyMessage adds the checks of a CMS and answers the signer's certificate, nil when it was not found. recorded is
// the digest of the record, by algorithm, which serves when the content is not at hand and is compared always; nil: there
// is no record.
func verifyMessage(r *builder, prefix string, m *cms.SignedData, in Input, extra []*smx509.Certificate, recorded []byte, algorithm string) *smx509.Certificate {
	var report *cms.Report
	digest, why := in.digest(digestName(m))
	switch {
	case in.Document != nil:
		report, _ = m.Verify(in.Document, extra...)
	case m.Content != nil && digest == nil:
		report, _ = m.Verify(nil, extra...)
	case digest != nil:
		report, _ = m.VerifyDigest(digest, extra...)
	case recorded != nil:
		report, _ = m.VerifyDigest(recorded, extra...)
	default:
		report, _ = m.Verify(nil, extra...)
		if in.Digest != nil {
			r.add(CheckDocument, pki.NotChecked, why)
		}
	}
	addCMS(r, prefix, report)
	if recorded != nil && report.ContentDigest != nil {
		r.hold(CheckSignedDigest, bytes.Equal(report.ContentDigest, recorded) && digestName(m) == algorithm, "签名所及即记录的摘要 (what was signed is the record's digest)", "签名所及与记录的摘要不同 (what was signed is not the record's digest)")
	}
	return report.Signer
}

// digestName is the digest algorithm of the message's first signer, "" for one that is not ours.
func digestName(m *cms.SignedData) string {
	if len(m.SignerInfos) == 0 {
		return ""
	}
	switch oid := m.SignerInfos[0].DigestAlgorithm.OID; {
	case oid.Equal(cms.OIDSM3):
		return nameSM3
	case oid.Equal(cms.OIDSHA256):
		return nameSHA256
	}
	return ""
}

var cmsWords = map[string]string{
	cms.CheckSigner:              "只有一个签名者 (exactly one signer)",
	cms.CheckSignerCertificate:   "签名证书 (signer's certificate)",
	cms.CheckAlgorithms:          "算法与密钥相符 (algorithms fit the key)",
	cms.CheckContent:             "内容 (content)",
	cms.CheckSignedAttributes:    "签名属性 (signed attributes)",
	cms.CheckContentType:         "内容类型属性 (content type)",
	cms.CheckMessageDigest:       "摘要属性与内容一致 (message digest)",
	cms.CheckSigningCertificate:  "签名证书属性 (signing certificate attribute)",
	cms.CheckAlgorithmProtection: "算法保护属性 (algorithm protection)",
	cms.CheckSignature:           "签名值 (signature value)",
	tsa.CheckImprint:             "时间戳所盖即此签名 (the token stamps this)",
	tsa.CheckSigningCertificate:  "时间戳签名证书属性 (signing certificate attribute)",
	tsa.CheckPurpose:             "证书专用于时间戳 (certificate is for timestamping alone)",
	tsa.CheckGenTime:             "时间在证书有效期内 (genTime inside the validity)",
}

// unknowable are reasons why a check could not be made, though package cms counts them as failures: something is not at
// hand or not implemented, which says nothing about the signature.
func unknowable(err error) bool {
	return errors.Is(err, cms.ErrUnsupported) || errors.Is(err, cms.ErrNoContent) || errors.Is(err, cms.ErrSignerCertificate)
}

// unreadable adds that a part could not be parsed: a failure, unless it is of a kind that is not implemented.
func (r *builder) unreadable(id, what string, err error) {
	if errors.Is(err, cms.ErrUnsupported) {
		r.add(id, pki.NotChecked, fmt.Sprintf("%s属于不支持的类型 (not supported: %v)", what, err))
		return
	}
	r.add(id, pki.Failed, fmt.Sprintf("%s无法解析 (malformed: %v)", what, err))
}

// addCMS copies the checks of a CMS report.
func addCMS(r *builder, prefix string, report *cms.Report) {
	for _, c := range report.Checks {
		words := cmsWords[c.ID]
		if words == "" {
			words = c.ID
		}
		switch {
		case c.Result == cms.Passed:
			r.add(prefix+c.ID, pki.Passed, words)
		case c.Result == cms.Failed && unknowable(c.Err):
			r.add(prefix+c.ID, pki.NotChecked, fmt.Sprintf("%s：无从核验 (cannot be checked: %v)", words, c.Err))
		case c.Result == cms.Failed:
			r.add(prefix+c.ID, pki.Failed, fmt.Sprintf("%s: %v", words, c.Err))
		case c.Result == cms.NotPresent:
			// An optional part that is absent: nothing was there to check, and nothing is claimed.
			r.add(prefix+c.ID, pki.NotChecked, words+"：可选项，未出现 (optional, absent)")
		default:
			r.add(prefix+c.ID, pki.NotChecked, words)
		}
	}
}

// verifyContext holds the signed attribute against the record, and its authorisation hash against the leaf's.
func verifyContext(r *builder, b *Bundle, e *audit.Entry, m *cms.SignedData) {
	raw, ok := m.SignerInfos[0].Attribute(pki.OIDSigningContext)
	if !ok {
		r.add(CheckContext, pki.Failed, "缺少签名场景属性 (signing context attribute is missing)")
		return
	}
	c, err := pki.ParseSigningContext(raw)
	if err != nil {
		r.add(CheckContext, pki.Failed, fmt.Sprintf("签名场景属性无法解析 (%v)", err))
		return
	}
	var committed audit.Octets
	if e != nil {
		committed, _ = e.Field("consent.sm3").(audit.Octets)
	}
	ok = c.Application == b.Record.Application && c.Campus == b.Record.Campus && c.RecordID == b.RecordID &&
		c.DocumentType == b.Record.DocumentType && c.SignerRole == b.Record.Role && c.Department == b.Record.Department &&
		c.Test == b.Record.Test && bytes.Equal(c.AuthorisationHash[:], committed)
	r.hold(CheckContext, ok, "签名内含的应用、院区、科室、授权与记录一致 (the signed context is the record's)", "签名内含的场景与记录不符 (the signed context differs from the record)")
}

// verifyRaw checks a signature value over content.
func verifyRaw(r *builder, algorithm string, cert *smx509.Certificate, content, value []byte) {
	if cert == nil {
		r.add(CheckSignature, pki.NotChecked, "没有签名证书 (no certificate)")
		return
	}
	if err := pki.CheckPublicKey(cert.PublicKey); err != nil {
		r.add(CheckSignature, pki.NotChecked, fmt.Sprintf("不支持的公钥 (public key not supported: %v)", err))
		return
	}
	_, isRSA := cert.PublicKey.(*rsa.PublicKey)
	switch {
	case isRSA && algorithm != "RSA-2048" || !isRSA && algorithm != "SM2":
		r.add(CheckSignature, pki.Failed, fmt.Sprintf("证书的公钥不是 %s 的 (the certificate's key is of another algorithm)", algorithm))
	case content == nil:
		r.add(CheckSignature, pki.NotChecked, "裸签名需要原文才能验证 (a raw signature needs the document)")
	case cms.LooksLikeAttributes(content):
		r.add(CheckSignature, pki.Failed, "原文形如 CMS 签名属性，裸签无意义 (content parses as a SET OF Attribute)")
	default:
		ok := false
		switch pub := cert.PublicKey.(type) {
		case *ecdsa.PublicKey:
			ok = sm2.VerifyASN1WithSM2(pub, nil, content, value) // nil: the default identity
		case *rsa.PublicKey:
			sum := sha256.Sum256(content)
			ok = rsa.VerifyPKCS1v15(pub, crypto.SHA256, sum[:], value) == nil
		}
		r.hold(CheckSignature, ok, "签名值正确 (signature verifies)", "签名值不正确：原文或签名已改动 (signature does not verify: document or signature was changed)")
	}
}

// verifyConsent holds the authorisation against the leaf and the record. at is the signature's time, zero when no token
// holds; then the leaf's stands in.
func verifyConsent(r *builder, b *Bundle, e *audit.Entry, at time.Time) {
	if len(b.Authorization) == 0 {
		r.add(CheckConsentHash, pki.NotChecked, "证据中没有授权 (no authorisation in the evidence)")
		return
	}
	hash := HashAuthorization(b.Authorization)
	var committed audit.Octets
	var method, level audit.Value
	if e != nil {
		committed, _ = e.Field("consent.sm3").(audit.Octets)
		method, level = e.Field("consent.method"), e.Field("consent.level")
		if at.IsZero() {
			at = e.Time.UTC()
		}
	}
	r.hold(CheckConsentHash, bytes.Equal(committed, hash[:]), "授权与日志所记摘要一致 (authorisation is the one committed to)", "授权已改动 (authorisation was changed)")
	a, err := ParseAuthorization(b.Authorization)
	if err != nil {
		r.add(CheckConsentBound, pki.Failed, fmt.Sprintf("授权无法解析 (%v)", err))
		return
	}
	ok := a.Application == b.Record.Application && a.Subject == b.Record.Signer && a.covers(Digest{b.Record.DigestAlgorithm, b.Record.Digest}) &&
		method == audit.Text(a.Method) && level == audit.Int(a.Level)
	r.hold(CheckConsentBound, ok, "授权属于该应用、该签名人并覆盖该文档 (authorisation is for this application, signer and document)", "授权不属于该应用、签名人或文档 (authorisation is for something else)")
	if e != nil {
		granted, _ := parseTime(a.GrantedAt) // ParseAuthorization has read both
		ok := !at.Before(granted.Add(-consentSlack))
		if a.NotAfter != "" {
			end, _ := parseTime(a.NotAfter)
			ok = ok && !at.After(end.Add(consentSlack))
		}
		r.hold(CheckConsentTime, ok, "在授权有效期内 (within the authorisation's time)", "不在授权有效期内 (outside the authorisation's time)")
	}
	switch a.Method {
	case AppAsserted:
		r.add(CheckConsentProof, pki.NotChecked, fmt.Sprintf("同意由应用 %s 声明，未经证明 (consent asserted by application %s, not proved)", a.Application, a.Application))
		r.state(fmt.Sprintf("同意由应用 %s 声明，未经证明：“%s” (consent asserted by application %s, not proved)", a.Application, a.Proof, a.Application))
	case SignerPIN:
		// The check happened inside the appliance; what is left of it is the journal's word, bound by the leaf.
		r.add(CheckConsentProof, pki.NotChecked, "PIN 由本机在密码机内核验，事后不可重验 (the PIN was checked inside the cipher machine; that cannot be repeated)")
		r.state("签名人凭 PIN 同意，由本机核验 (the signer consented by PIN, checked by the appliance)")
	default:
		r.add(CheckConsentProof, pki.NotChecked, fmt.Sprintf("未知的同意方式 %q (unknown method)", a.Method))
		r.require(CheckConsentProof) // a later release may know whether it was one
		r.state(fmt.Sprintf("同意方式 %q 不为本程序所知 (a method of consent that this program does not know)", a.Method))
	}
}

// noPresent says what nobody was told: judged is the time of stamping.
const noPresent = "没有说明按何时判断（--at）：时间戳按盖戳的时刻判断，此后是否已经到期没有看 (no time to judge at was given: whether the timestamp has ended since was not looked at)"

// noToken says what a missing timestamp means.
const noToken = "没有时间戳：签署时间没有凭据，证书按验证者所给的时刻判断 (no timestamp: nothing vouches for the time of signing; certificates are judged at the time that the verifier gave)"

// VerifyCMS judges a CMS by itself: signature, timestamp attribute, path. Consent and journal are not looked at. A
// detached message without its document or digest is indeterminate.
func VerifyCMS(der []byte, trust Trust, in Input) *Report {
	r := new(builder)
	m, err := cms.Parse(der)
	if err != nil {
		r.unreadable(CheckCMS, "CMS ", err)
		return r.report()
	}
	signer := verifyMessage(r, "signature.", m, in, nil, nil, "")
	r.require("signature."+cms.CheckContent, "signature."+cms.CheckSignature)
	for _, raw := range m.CRLs {
		if l, err := pki.ParseCRL(raw); err == nil { // one that cannot be read clears nobody
			in.CRLs = append(in.CRLs[:len(in.CRLs):len(in.CRLs)], l)
		}
	}
	at := in.At
	if len(m.SignerInfos) == 1 {
		switch tokens := m.SignerInfos[0].TimeStampTokens(); len(tokens) {
		case 0:
			r.state(noToken)
			verifyUnstampedAlone(r, signer, in)
		default:
			at, _ = verifyToken(r, tokens[0], m.SignerInfos[0].Signature, m.Certificates, trust, in, time.Time{})
			if len(tokens) > 1 {
				r.state(fmt.Sprintf("另有 %d 个时间戳未核验 (more timestamps that were not looked at)", len(tokens)-1))
			}
		}
	}
	verifyPath(r, "signer.", signer, m.Certificates, trust, in, at, pki.StaffSigning)
	if signer != nil {
		r.Signer = signer.Subject.String()
	}
	r.add(CheckLeaf, pki.NotChecked, "单独的 CMS，未核对日志与授权 (a CMS by itself: journal and consent were not looked at)")
	return r.report()
}

// VerifyToken judges a token by itself over in.Document or in.Digest (of the token's own algorithm).
func VerifyToken(der []byte, trust Trust, in Input) *Report {
	r := new(builder)
	t, err := tsa.ParseToken(der)
	if err != nil {
		r.unreadable(CheckToken, "时间戳", err)
		return r.report()
	}
	r.add(CheckToken, pki.Passed, "有时间戳 (a token is there)")
	var report *cms.Report
	unchecked := ""
	name := ""
	switch {
	case t.Imprint.Equal(tsa.Imprint{Algorithm: cms.OIDSM3, Digest: t.Imprint.Digest}): // by either of its numbers
		name = nameSM3
	case t.Imprint.Algorithm.Equal(cms.OIDSHA256):
		name = nameSHA256
	}
	switch {
	case in.Document != nil:
		report, _ = t.VerifyData(in.Document)
	case in.Digest != nil && (in.DigestAlgorithm == "" || in.DigestAlgorithm == name):
		report, _ = t.VerifyDigest(t.Imprint.Algorithm, in.Digest)
	case in.Query != nil:
		report, _ = t.Verify(in.Query.Imprint)
	default:
		_, unchecked = in.digest(name)
		report, _ = t.VerifyDigest(t.Imprint.Algorithm, t.Imprint.Digest)
	}
	if in.Query != nil {
		if err := t.Answers(in.Query); err != nil {
			r.add(CheckTokenAnswers, pki.Failed, fmt.Sprintf("时间戳不是对这个请求的回答 (the token does not answer the request: %v)", err))
		} else {
			r.add(CheckTokenAnswers, pki.Passed, "时间戳所盖、随机数与策略都是请求所要的 (imprint, nonce and policy are those of the request)")
		}
	}
	before := len(r.Checks)
	judgeToken(r, t, report, nil, trust, in, time.Time{})
	if unchecked != "" {
		for i := range r.Checks[before:] {
			if c := &r.Checks[before+i]; c.ID == CheckTokenImprint && c.Status == pki.Passed {
				*c = pki.Check{ID: CheckTokenImprint, Status: pki.NotChecked, Detail: unchecked}
			}
		}
	}
	return r.report()
}

// VerifyRaw judges a signature value with the certificate given for it. token, over the value, may be nil.
func VerifyRaw(algorithm string, value, certificate []byte, chain [][]byte, token []byte, trust Trust, in Input) *Report {
	r := new(builder)
	var signer *smx509.Certificate
	if own := parseCertificates(r, [][]byte{certificate}); len(own) == 1 {
		signer = own[0]
		r.Signer = signer.Subject.String()
	}
	certs := parseCertificates(r, chain)
	verifyRaw(r, algorithm, signer, in.Document, value)
	r.require(CheckSignature)
	at := in.At
	if len(token) > 0 {
		at, _ = verifyToken(r, token, value, certs, trust, in, time.Time{})
	} else {
		r.state(noToken)
		verifyUnstampedAlone(r, signer, in)
	}
	verifyPath(r, "signer.", signer, certs, trust, in, at, pki.StaffSigning)
	return r.report()
}

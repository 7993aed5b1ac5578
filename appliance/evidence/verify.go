package evidence

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/sm3"
	"github.com/emmansun/gmsm/smx509"

	"yinjian/appliance/audit"
	"yinjian/appliance/cms"
	"yinjian/appliance/pki"
	"yinjian/tsa"
)

// MaxBundle bounds a bundle's size in bytes; content is never inside, certificates and CRLs are.
const MaxBundle = 64 << 20

// Parse reads a bundle. Unknown fields and trailing data are errors: a bundle of a later format is not half-read.
func Parse(data []byte) (*Bundle, error) {
	if len(data) > MaxBundle {
		return nil, fmt.Errorf("evidence: bundle of %d bytes, at most %d are read", len(data), MaxBundle)
	}
	var b Bundle
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&b); err != nil {
		return nil, fmt.Errorf("evidence: %w", err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("evidence: data after the bundle")
	}
	if b.Format != Format {
		return nil, fmt.Errorf("evidence: format %q, this release reads %q", b.Format, Format)
	}
	return &b, nil
}

// Input is what a verifier may hold beside the evidence.
type Input struct {
	Document []byte // the signed content; nil when it is not at hand
	Digest   []byte // instead of Document: its digest by the signature's hash
	// CRLs known to the verifier, beside those in the evidence.
	CRLs []*pki.CRL
	// At is the verifier's own time, used only where there is no timestamp. Zero: such validity is not checked.
	At time.Time
}

// IDs of the checks made here; those of packages cms, pki and tsa keep their own behind a prefix.
const (
	CheckDocument     = "document.digest"
	CheckSignature    = "signature.value"
	CheckContext      = "signature.context"
	CheckConsentHash  = "consent.hash"
	CheckConsentBound = "consent.binding"
	CheckConsentProof = "consent.proof"
	CheckToken        = "token.present"
	CheckTokenImprint = "token.tsa.imprint"
	CheckLeaf         = "journal.leaf"
	CheckLeafMatch    = "journal.record"
	CheckPayloads     = "journal.payloads"
	CheckInclusion    = "journal.inclusion"
	CheckCheckpoint   = "journal.checkpoint"
	CheckCosigned     = "journal.cosignature"
)

// Verify judges a bundle.
func Verify(b *Bundle, trust Trust, in Input) *Report {
	r := new(builder)
	certs := parseCertificates(r, b.Certificates)
	in.CRLs = append(parseCRLs(r, b.CRLs), in.CRLs...)

	// The record: what the leaf says is the truth; the JSON beside it must say the same.
	entry := verifyLeaf(r, b)
	r.require(CheckLeaf, CheckLeafMatch, CheckPayloads)
	verifyInclusion(r, b, trust)
	r.require(CheckInclusion, CheckCheckpoint)

	// The document.
	want, _ := hex.DecodeString(b.Record.Digest)
	given := in.digestFor(b.Signature.Algorithm)
	switch {
	case given == nil:
		r.add(CheckDocument, pki.NotChecked, "未提供原文，无法比对摘要 (no document given)")
	default:
		r.hold(CheckDocument, bytes.Equal(given, want), "原文摘要与记录一致 (document matches the record)", "原文已改动：摘要与记录不符 (document was changed: its digest differs)")
	}
	r.require(CheckDocument)

	// The token fixes the time at which certificates are judged.
	value := b.Signature.Value
	var message *cms.SignedData
	if b.Signature.Form == "cms" {
		m, err := cms.Parse(b.Signature.Value)
		if err != nil || len(m.SignerInfos) != 1 {
			r.add(CheckSignature, pki.Failed, fmt.Sprintf("CMS 无法解析 (cannot be parsed: %v)", err))
		} else {
			message, value = m, m.SignerInfos[0].Signature
		}
	}
	at := verifyToken(r, b.Token, value, b.Signature.Algorithm, certs, trust, in.CRLs)
	switch {
	case b.Record.StampPolicy == "required":
		r.require(CheckToken)
	case at.IsZero() && entry != nil:
		at = entry.Time.UTC()
		r.state("无时间戳（应用策略不要求）：时间仅由本机日志声明 (no timestamp by policy; the time is the appliance's own word)")
	}
	if message != nil && len(b.Token) > 0 {
		embedded := message.SignerInfos[0].TimeStampTokens()
		r.hold("token.embedded", len(embedded) == 1 && bytes.Equal(embedded[0], b.Token), "CMS 内含同一时间戳 (the CMS carries the same token)", "CMS 内的时间戳与证据不一致 (the token inside the CMS differs)")
	}

	// The signature.
	var signer *smx509.Certificate
	if b.Signature.Form == "cms" && message != nil {
		signer = verifyMessage(r, "signature.", message, in, want)
		r.require("signature." + cms.CheckSignature)
		verifyContext(r, b, message)
		r.require(CheckContext)
	} else if b.Signature.Form == "raw" {
		if len(certs) > 0 {
			signer = certs[0]
		}
		verifyRaw(r, b.Signature.Algorithm, signer, in.Document, b.Signature.Value)
		r.require(CheckSignature)
	} else if b.Signature.Form != "cms" {
		r.add(CheckSignature, pki.Failed, fmt.Sprintf("未知的签名形式 %q (unknown form)", b.Signature.Form))
	}
	if signer != nil && entry != nil {
		sum := audit.Sum(signer.Raw)
		had, _ := entry.Field("certificate.sm3").(audit.Octets)
		r.hold("signer.certificate", bytes.Equal(had, sum[:]), "签名证书即日志所记 (the certificate is the journal's)", "签名证书与日志所记不同 (the certificate is not the one in the journal)")
	}
	verifyPath(r, "signer.", signer, certs, trust, in.CRLs, at, pki.StaffSigning)
	if signer != nil {
		r.Signer = signer.Subject.String()
	}

	verifyConsent(r, b, want)
	r.require(CheckConsentHash, CheckConsentBound)
	if b.Record.TimeProvenance != "" {
		r.state("时间来源 (time by): " + b.Record.TimeProvenance)
	}
	if b.Record.Test {
		r.state("测试记录，无法律意图 (a test record, without legal intent)")
	}
	return r.report()
}

func (in Input) digestFor(algorithm string) []byte {
	switch {
	case in.Document == nil:
		return in.Digest
	case algorithm == "SM2":
		sum := sm3.Sum(in.Document)
		return sum[:]
	default:
		sum := sha256.Sum256(in.Document)
		return sum[:]
	}
}

func parseCertificates(r *builder, ders [][]byte) []*smx509.Certificate {
	var out []*smx509.Certificate
	for i, der := range ders {
		c, err := pki.ParseCertificate(der)
		if err != nil {
			r.add("evidence.certificates", pki.Failed, fmt.Sprintf("第 %d 张证书无法解析 (certificate %d: %v)", i+1, i+1, err))
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
			r.add("evidence.crls", pki.Failed, fmt.Sprintf("第 %d 份吊销列表无法解析 (CRL %d: %v)", i+1, i+1, err))
			continue
		}
		out = append(out, l)
	}
	return out
}

// verifyLeaf checks the leaf and that everything in the bundle is what the leaf commits to.
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
	slices.Sort(differs)
	r.hold(CheckLeafMatch, len(differs) == 0, "证据所述与日志条目一致 (the record says what the leaf says)", fmt.Sprintf("与日志条目不一致：%v (differs from the leaf)", differs))

	held := map[audit.Hash]bool{}
	for _, p := range slices.Concat(b.Certificates, b.CRLs, [][]byte{b.Signature.Value, b.Authorization, b.Token}) {
		held[audit.Sum(p)] = true
	}
	var missing []string
	for _, p := range e.Payloads {
		if !held[p.SM3] {
			missing = append(missing, p.Name)
		}
	}
	// What is named must be there and be what the leaf hashes; more certificates than the leaf names do no harm.
	exact := func(name string, data []byte) {
		p, ok := e.Payload(name)
		if ok != (len(data) > 0) || ok && p.SM3 != audit.Sum(data) {
			missing = append(missing, name)
		}
	}
	exact("signature", b.Signature.Value)
	exact("token", b.Token)
	exact("authorization", b.Authorization)
	r.hold(CheckPayloads, len(missing) == 0, "签名、时间戳、授权、证书与日志所记摘要一致 (payloads hash to what the leaf says)",
		fmt.Sprintf("已改动或缺失：%v (changed or missing)", missing))
	return e
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
	err = audit.VerifyInclusion(b.Journal.Sequence, b.Journal.TreeSize, audit.LeafHash(b.Journal.Leaf), path, c.Root)
	r.hold(CheckInclusion, err == nil && c.Size == b.Journal.TreeSize, "记录在日志树中 (the record is in the log)", "包含证明不成立：记录不在该检查点的日志中 (inclusion proof does not hold)")
	r.add(CheckCosigned, pki.NotChecked, "尚无另一院区的见证签名 (no cosignature of another campus)")
}

// verifyToken judges the token over value and answers its genTime, zero when there is none that holds.
func verifyToken(r *builder, token, value []byte, algorithm string, certs []*smx509.Certificate, trust Trust, crls []*pki.CRL) time.Time {
	if len(token) == 0 {
		r.add(CheckToken, pki.NotChecked, "没有时间戳 (no timestamp token)")
		return time.Time{}
	}
	t, err := tsa.ParseToken(token)
	if err != nil {
		r.add(CheckToken, pki.Failed, fmt.Sprintf("时间戳无法解析 (token: %v)", err))
		return time.Time{}
	}
	r.add(CheckToken, pki.Passed, "有时间戳 (a token is there)")
	before := len(r.Checks)
	var report *cms.Report
	switch {
	case isSM3(t):
		report, _ = t.VerifyDigest(t.Imprint.Algorithm, sumSM3(value), certs...)
	case t.Imprint.Algorithm.Equal(cms.OIDSHA256):
		sum := sha256.Sum256(value)
		report, _ = t.VerifyDigest(t.Imprint.Algorithm, sum[:], certs...)
	default:
		r.add(CheckTokenImprint, pki.NotChecked, fmt.Sprintf("不支持的摘要算法 %v (imprint algorithm)", t.Imprint.Algorithm))
		return time.Time{}
	}
	addCMS(r, "token.", report)
	r.require("token."+cms.CheckSignature, CheckTokenImprint)
	for _, c := range r.Checks[before:] {
		if c.Status == pki.Failed {
			return time.Time{}
		}
	}
	r.GenTime, r.Accuracy = t.GenTime.Format(time.RFC3339Nano), t.Accuracy.String()
	verifyPath(r, "tsa.", report.Signer, append(t.Certificates(), certs...), trust, crls, t.GenTime, pki.TimeStamping)
	return t.GenTime
}

func isSM3(t *tsa.Token) bool {
	return t.Imprint.Equal(tsa.Imprint{Algorithm: cms.OIDSM3, Digest: t.Imprint.Digest})
}

func sumSM3(b []byte) []byte { s := sm3.Sum(b); return s[:] }

func verifyPath(r *builder, prefix string, leaf *smx509.Certificate, certs []*smx509.Certificate, trust Trust, crls []*pki.CRL, at time.Time, purpose pki.Purpose) {
	for _, id := range pki.PathChecks() {
		r.require(prefix + id)
	}
	if leaf == nil {
		r.add(prefix+pki.CheckPathChain, pki.NotChecked, "没有可判断的证书 (no certificate to judge)")
		return
	}
	p := pki.VerifyPath(pki.Options{Leaf: leaf, Intermediates: certs, Anchors: trust.Anchors, At: at, Purpose: purpose, CRLs: crls})
	r.Checks = append(r.Checks, pki.WithPrefix(prefix, p.Checks)...)
	if p.Evaluation {
		s := "证书仅供评估，不具法律效力 (certificates are for evaluation only)"
		if !slices.Contains(r.Statements, s) {
			r.state(s)
		}
	}
}

// verifyMessage adds the checks of a CMS and answers the signer's certificate. recorded is the digest of the record,
// which serves when the content is not at hand.
func verifyMessage(r *builder, prefix string, m *cms.SignedData, in Input, recorded []byte) *smx509.Certificate {
	var report *cms.Report
	switch {
	case in.Document != nil:
		report, _ = m.Verify(in.Document)
	case m.Content != nil:
		report, _ = m.Verify(nil)
	case in.Digest != nil:
		report, _ = m.VerifyDigest(in.Digest)
	case recorded != nil:
		report, _ = m.VerifyDigest(recorded)
	default:
		report, _ = m.Verify(nil)
	}
	addCMS(r, prefix, report)
	return report.Signer
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

// addCMS copies the checks of a CMS report.
func addCMS(r *builder, prefix string, report *cms.Report) {
	for _, c := range report.Checks {
		words := cmsWords[c.ID]
		if words == "" {
			words = c.ID
		}
		switch c.Result {
		case cms.Passed:
			r.add(prefix+c.ID, pki.Passed, words)
		case cms.Failed:
			r.add(prefix+c.ID, pki.Failed, fmt.Sprintf("%s: %v", words, c.Err))
		case cms.NotPresent:
			// An optional part that is absent: nothing was there to check, and nothing is claimed.
			r.add(prefix+c.ID, pki.NotChecked, words+"：可选项，未出现 (optional, absent)")
		default:
			r.add(prefix+c.ID, pki.NotChecked, words)
		}
	}
}

// verifyContext holds the signed attribute against the record.
func verifyContext(r *builder, b *Bundle, m *cms.SignedData) {
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
	ok = c.Application == b.Record.Application && c.Campus == b.Record.Campus && c.RecordID == b.RecordID &&
		c.DocumentType == b.Record.DocumentType && c.SignerRole == b.Record.Role && c.Department == b.Record.Department &&
		c.Test == b.Record.Test && c.AuthorisationHash == HashAuthorization(b.Authorization)
	r.hold(CheckContext, ok, "签名内含的应用、院区、科室、授权与记录一致 (the signed context is the record's)", "签名内含的场景与记录不符 (the signed context differs from the record)")
}

// verifyRaw checks a signature value over content.
func verifyRaw(r *builder, algorithm string, cert *smx509.Certificate, content, value []byte) {
	switch {
	case cert == nil:
		r.add(CheckSignature, pki.NotChecked, "没有签名证书 (no certificate)")
	case content == nil:
		r.add(CheckSignature, pki.NotChecked, "裸签名需要原文才能验证 (a raw signature needs the document)")
	case cms.LooksLikeAttributes(content):
		r.add(CheckSignature, pki.Failed, "原文形如 CMS 签名属性，裸签无意义 (content parses as a SET OF Attribute)")
	default:
		ok := false
		switch pub := cert.PublicKey.(type) {
		case *ecdsa.PublicKey:
			ok = algorithm == "SM2" && sm2.VerifyASN1WithSM2(pub, nil, content, value)
		case *rsa.PublicKey:
			sum := sha256.Sum256(content)
			ok = algorithm == "RSA-2048" && pub.N.BitLen() >= 2048 && rsa.VerifyPKCS1v15(pub, crypto.SHA256, sum[:], value) == nil
		}
		r.hold(CheckSignature, ok, "签名值正确 (signature verifies)", "签名值不正确：原文或签名已改动 (signature does not verify: document or signature was changed)")
	}
}

// verifyConsent holds the authorisation against the leaf and the record.
func verifyConsent(r *builder, b *Bundle, digest []byte) {
	hash := HashAuthorization(b.Authorization)
	e, err := audit.ParseEntry(b.Journal.Leaf)
	var committed audit.Octets
	if err == nil {
		committed, _ = e.Field("consent.sm3").(audit.Octets)
	}
	r.hold(CheckConsentHash, bytes.Equal(committed, hash[:]), "授权与日志所记摘要一致 (authorisation is the one committed to)", "授权已改动 (authorisation was changed)")
	a, err := ParseAuthorization(b.Authorization)
	if err != nil {
		r.add(CheckConsentBound, pki.Failed, fmt.Sprintf("授权无法解析 (%v)", err))
		return
	}
	ok := a.Application == b.Record.Application && a.Subject == b.Record.Signer &&
		(len(a.Digests) == 0 && a.Count > 0 || slices.Contains(a.Digests, hex.EncodeToString(digest))) &&
		e != nil && e.Text("consent.method") == string(a.Method)
	r.hold(CheckConsentBound, ok, "授权属于该应用、该签名人并覆盖该文档 (authorisation is for this application, signer and document)", "授权不属于该应用、签名人或文档 (authorisation is for something else)")
	if a.NotAfter != "" && e != nil {
		end, err := time.Parse(time.RFC3339Nano, a.NotAfter)
		// The leaf is written right after the signature; a minute is far above what lies between.
		r.hold("consent.time", err == nil && e.Time.UTC().Before(end.Add(time.Minute)), "在授权有效期内 (within the authorisation's time)", "超出授权有效期 (after the authorisation ended)")
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
	}
}

// VerifyCMS judges a CMS by itself: signature, timestamp attribute, path. Consent and journal are not looked at.
func VerifyCMS(der []byte, trust Trust, in Input) *Report {
	r := new(builder)
	m, err := cms.Parse(der)
	if err != nil {
		r.add("signature.cms.parse", pki.Failed, fmt.Sprintf("CMS 无法解析 (%v)", err))
		return r.report()
	}
	signer := verifyMessage(r, "signature.", m, in, nil)
	r.require("signature." + cms.CheckSignature)
	crls := in.CRLs
	for _, raw := range m.CRLs {
		if l, err := pki.ParseCRL(raw); err == nil {
			crls = append(crls, l)
		}
	}
	at := in.At
	if len(m.SignerInfos) == 1 {
		if tokens := m.SignerInfos[0].TimeStampTokens(); len(tokens) > 0 {
			at = verifyToken(r, tokens[0], m.SignerInfos[0].Signature, "", m.Certificates, trust, crls)
		} else {
			r.state("没有时间戳：按验证时刻判断证书 (no timestamp: certificates are judged at the time of verification)")
		}
	}
	verifyPath(r, "signer.", signer, m.Certificates, trust, crls, at, pki.StaffSigning)
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
		r.add(CheckToken, pki.Failed, fmt.Sprintf("时间戳无法解析 (%v)", err))
		return r.report()
	}
	r.add(CheckToken, pki.Passed, "有时间戳 (a token is there)")
	var report *cms.Report
	switch {
	case in.Document != nil:
		report, _ = t.VerifyData(in.Document)
	case in.Digest != nil:
		report, _ = t.VerifyDigest(t.Imprint.Algorithm, in.Digest)
	default:
		report, _ = t.VerifyDigest(t.Imprint.Algorithm, t.Imprint.Digest)
	}
	addCMS(r, "token.", report)
	if in.Document == nil && in.Digest == nil {
		for i := range r.Checks {
			if r.Checks[i].ID == CheckTokenImprint {
				r.Checks[i] = pki.Check{ID: CheckTokenImprint, Status: pki.NotChecked, Detail: "未提供原文或摘要 (no document or digest given)"}
			}
		}
	}
	r.require("token."+cms.CheckSignature, CheckTokenImprint)
	r.GenTime, r.Accuracy = t.GenTime.Format(time.RFC3339Nano), t.Accuracy.String()
	verifyPath(r, "tsa.", report.Signer, t.Certificates(), trust, in.CRLs, t.GenTime, pki.TimeStamping)
	return r.report()
}

// VerifyRaw judges a signature value with the certificate given for it. token, over the value, may be nil.
func VerifyRaw(algorithm string, value, certificate []byte, chain [][]byte, token []byte, trust Trust, in Input) *Report {
	r := new(builder)
	certs := parseCertificates(r, append([][]byte{certificate}, chain...))
	var signer *smx509.Certificate
	if len(certs) > 0 {
		signer = certs[0]
		r.Signer = signer.Subject.String()
	}
	verifyRaw(r, algorithm, signer, in.Document, value)
	r.require(CheckSignature)
	at := in.At
	if len(token) > 0 {
		at = verifyToken(r, token, value, algorithm, certs, trust, in.CRLs)
	} else {
		r.state("没有时间戳：按验证时刻判断证书 (no timestamp: certificates are judged at the time of verification)")
	}
	verifyPath(r, "signer.", signer, certs, trust, in.CRLs, at, pki.StaffSigning)
	return r.report()
}

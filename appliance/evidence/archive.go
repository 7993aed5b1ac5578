package evidence

import (
	"crypto"
	"crypto/rsa"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"time"

	"github.com/emmansun/gmsm/smx509"

	"yinjian/appliance/audit"
	"yinjian/appliance/cms"
	"yinjian/appliance/pki"
	"yinjian/tsa"
	"yinjian/tsa/ers"
)

// IDs of the checks of archive timestamps. Those with one line for each timestamp are listed as often.
const (
	CheckArchive            = "archive.record"      // the evidence record can be read
	CheckArchiveTree        = "archive.tree"        // its trees lead from this evidence to each token
	CheckArchiveTimestamp   = "archive.timestamp"   // each token is genuine
	CheckArchiveCertificate = "archive.certificate" // its certificate was good until the next
	CheckArchiveRenewal     = "archive.renewal"     // each timestamp was renewed before its end
	CheckArchiveCurrent     = "archive.current"     // the last one has not ended at the verifier's time
	CheckArchiveDocument    = "archive.document"    // the algorithm that binds the document counts at that time
	CheckArchiveJournal     = "archive.journal"     // those of what no token of its own stamps count, or were renewed in time
)

// Members is the data group that the evidence record covers: the journal's leaf and every payload that it names. What is
// not in the bundle is left out, and then the group is not the one that was archived.
func (b *Bundle) Members() [][]byte {
	out := [][]byte{b.Journal.Leaf}
	e, err := audit.ParseEntry(b.Journal.Leaf)
	if err != nil {
		return out
	}
	all := slices.Concat([][]byte{b.Signature.Value, b.Token, b.Authorization}, b.Certificates, b.CRLs)
	for _, p := range e.Payloads {
		if i := slices.IndexFunc(all, func(data []byte) bool { return audit.Sum(data) == p.SM3 }); i >= 0 {
			out = append(out, all[i])
		}
	}
	return out
}

// A standing is how long a token counts by itself, and what its certificate is worth.
type standing struct {
	path *pki.PathReport
	end  time.Time // of the first of its certificates and algorithms to end
	word string    // what that is
	// renewed: it counts at the verifier's time only because something stamped it in time. void: otherwise it would be worth
	// nothing, rather than merely have ended.
	renewed, void bool
}

// stand judges a token's certificate. next is when the token is known to have existed, as an archive timestamp proves;
// zero: there is none. While the token counts by itself it is judged by itself, as ever: at genTime, by lists that were
// current then or are current at the verifier's time. Otherwise it is judged as it stood at next, with a list that was
// current then; revocations after that change nothing (RFC 4998 §5.3, RFC 3161 §4).
func stand(t *tsa.Token, signer *smx509.Certificate, certs []*smx509.Certificate, trust Trust, in Input, next time.Time) standing {
	s := standing{path: judgePath(signer, certs, trust, in, t.GenTime, pki.TimeStamping)}
	for _, c := range append(slices.Clone(s.path.Chain), signer) {
		if c != nil && (s.end.IsZero() || c.NotAfter.Before(s.end)) {
			s.end, s.word = c.NotAfter, "证书到期 (its certificate ends)"
		}
	}
	if end, name := in.algorithmEnd(algorithmsOf(t, append(slices.Clone(s.path.Chain), signer)...)...); name != "" && (s.end.IsZero() || end.Before(s.end)) {
		s.end, s.word = end, name+" 不再可信 (no longer relied on)"
	}
	if next.IsZero() || !s.past(in.At) && s.path.Verdict != pki.Invalid {
		return s
	}
	s.renewed, s.void = true, s.path.Verdict == pki.Invalid
	s.path = pki.VerifyPath(pki.Options{
		Leaf: signer, Intermediates: certs, Anchors: trust.anchors(pki.TimeStamping), CRLs: in.CRLs, Purpose: pki.TimeStamping,
		At: t.GenTime, RevocationAt: next, StoodAt: next,
	})
	return s
}

func (s standing) past(at time.Time) bool { return !at.IsZero() && !s.end.IsZero() && at.After(s.end) }

// algorithmEnd is the first of the algorithms to end, and when; "" when none does.
func (in Input) algorithmEnd(names ...string) (end time.Time, name string) {
	for _, a := range names {
		if t, ok := in.AlgorithmEnds[a]; ok && (name == "" || t.Before(end)) {
			end, name = t, a
		}
	}
	return end, name
}

// AlgorithmsOf are those that signatures under the keys of certificates rest on, by the names that people read: "SM2" and
// "SM3", or "RSA-2048" and "SHA-256". Whoever can sign as a CA has certificates at will, so that a path rests on all of its
// keys.
func AlgorithmsOf(path ...*smx509.Certificate) []string {
	var out []string
	for _, c := range path {
		if c != nil {
			out = append(out, algorithmsOfKey(c.PublicKey)...)
		}
	}
	return out
}

var reRSA = regexp.MustCompile(`^RSA-[1-9][0-9]{3,4}$`)

// KnownAlgorithm reports whether a name is one that signatures, digests or trees are known by here. An end under another
// name, "sm2" or "SHA256", would say nothing of anything.
func KnownAlgorithm(name string) bool {
	return name == "SM2" || ers.Algorithm(name).Known() || reRSA.MatchString(name)
}

func algorithmsOfKey(k crypto.PublicKey) []string {
	if key, ok := k.(*rsa.PublicKey); ok {
		return []string{fmt.Sprintf("RSA-%d", key.N.BitLen()), nameSHA256}
	}
	return []string{"SM2", nameSM3}
}

// algorithmsOf are the algorithms that a token and its path rest on.
func algorithmsOf(t *tsa.Token, path ...*smx509.Certificate) []string {
	out := AlgorithmsOf(path...)
	for _, a := range []ers.Algorithm{ers.SM3, ers.SHA256, ers.SHA384, ers.SHA512} {
		if (tsa.Imprint{Algorithm: a.OID(), Digest: t.Imprint.Digest}).Equal(t.Imprint) {
			out = append(out, string(a))
		}
	}
	return out
}

// An archive is the evidence record of a bundle, read.
type archive struct {
	record *ers.Record // nil: there is none that can be read
	err    error
	lists  []*pki.CRL
	bad    map[int]error // tokens with a list inside that cannot be read
}

func readArchive(der []byte) archive {
	if len(der) == 0 {
		return archive{}
	}
	record, err := ers.Parse(der)
	if err != nil {
		return archive{err: err}
	}
	a := archive{record: record, bad: map[int]error{}}
	for i, t := range record.Timestamps() {
		for _, raw := range t.Token.Message().CRLs {
			l, err := pki.ParseCRL(raw)
			if err != nil {
				a.bad[i] = err
				continue
			}
			a.lists = append(a.lists, l)
		}
	}
	return a
}

// next is when what the timestamp before that number stamped is known to have existed; of 0 the evidence itself.
func (a archive) next(i int) time.Time {
	if a.record == nil || i >= len(a.record.Timestamps()) {
		return time.Time{}
	}
	return a.record.Timestamps()[i].Token.GenTime
}

func date(t time.Time) string { return t.UTC().Format("2006-01-02T15:04:05Z") }

// verifyArchive judges the archive timestamps, after the evidence's own token, of which first is what was found: nil when
// it has none that could be judged. They count for the verdict where the token does not count by itself any more; one that
// was altered counts always.
func verifyArchive(r *builder, b *Bundle, a archive, first *standing, certs []*smx509.Certificate, trust Trust, in Input) {
	if a.err != nil {
		r.add(CheckArchive, pki.Failed, fmt.Sprintf("存档证据记录无法解析 (the evidence record cannot be read: %v)", a.err))
	}
	if a.record == nil {
		return
	}
	all := a.record.Timestamps()
	r.add(CheckArchive, pki.Passed, fmt.Sprintf("存档证据记录（RFC 4998）含 %d 次存档时间戳 (archive timestamps)", len(all)))
	if first != nil && first.renewed {
		r.require(CheckArchive, CheckArchiveTree, CheckArchiveTimestamp, CheckArchiveCertificate, CheckArchiveRenewal)
	}
	verifyTrees(r, b, a)

	// Each one's standing, then whether it came in time for the one before.
	before := first
	for i, t := range all {
		next := a.next(i + 1)
		report, err := t.Token.Verify(t.Token.Imprint, certs...)
		known := slices.Concat(t.Token.Certificates(), certs)
		s := stand(t.Token, report.Signer, known, trust, in, next)
		verifyArchiveToken(r, i, t, err, report, s, a.bad[i], slices.Concat(known, trust.anchors(pki.TimeStamping)))
		// One whose key fell into other hands later proves nothing any more. What stands without it still stands; what
		// would be void without it stays so.
		if c := &r.Checks[len(r.Checks)-1]; c.Status == pki.Failed && !(first != nil && first.void) && voided(report.Signer, known, trust, in, t.Token.GenTime) {
			c.Status, c.Detail = pki.NotChecked, c.Detail+"；此次存档时间戳作废，不再证明什么 (this archive timestamp is void and proves nothing)"
		}
		which := fmt.Sprintf("第 %d 次存档时间戳 (archive timestamp %d)", i+1, i+1)
		if before != nil {
			inTime(r, i, t.Token.GenTime, *before, in)
		} else {
			r.add(CheckArchiveRenewal, pki.Passed, fmt.Sprintf("%s：%s 已存在 (existed then)", which, date(t.Token.GenTime)))
		}
		before = &s
	}
	verifyDigests(r, a, in)
	if !in.At.IsZero() {
		current(r, *before, in, true)
	}
	if first != nil && first.past(in.At) {
		r.require(CheckArchiveCurrent)
	}
	if first != nil && first.renewed && first.past(in.At) {
		r.state(fmt.Sprintf("签名的时间戳已于 %s 到期（%s）；在此之前，%s 起的 %d 次存档时间戳依次盖住了它，到期不影响结论 (the timestamp ended then; archive timestamps renewed it in time, so that its end changes nothing)",
			date(first.end), first.word, date(all[0].Token.GenTime), len(all)))
	}
}

// verifyTrees holds the trees against the evidence and each other.
func verifyTrees(r *builder, b *Bundle, a archive) {
	for i, err := range a.record.Check(b.Members()...) {
		if err == nil {
			continue
		}
		missing := slices.ContainsFunc(r.Checks, func(c pki.Check) bool { return c.ID == CheckPayloads && c.Status == pki.NotChecked })
		if missing && errors.Is(err, ers.ErrNotCovered) {
			r.add(CheckArchiveTree, pki.NotChecked, "证据不全，无法与存档时间戳比对 (the evidence is not whole, and cannot be compared)")
		} else {
			r.add(CheckArchiveTree, pki.Failed, fmt.Sprintf("第 %d 次存档时间戳盖的不是这份证据或前一次时间戳 (archive timestamp %d is of something else: %v)", i+1, i+1, err))
		}
		return
	}
	r.add(CheckArchiveTree, pki.Passed, "散列树由本证据通到每次存档时间戳 (the hash trees lead from this evidence to every archive timestamp)")
}

// verifyArchiveToken judges one token and its certificate. Nothing covers what the last token carries unsigned, so that it
// is held to what appliances write in this format, as a checkpoint's token is: its signer's certificate is in it, its
// algorithms are known, and each certificate and list has an issuer that signed it.
func verifyArchiveToken(r *builder, i int, t *ers.Timestamp, err error, report *cms.Report, s standing, bad error, issuers []*smx509.Certificate) {
	which := fmt.Sprintf("第 %d 次，%s", i+1, date(t.Token.GenTime))
	anchored := slices.ContainsFunc(s.path.Checks, func(c pki.Check) bool { return c.ID == pki.CheckPathChain && c.Status == pki.Passed })
	switch {
	case err != nil:
		r.add(CheckArchiveTimestamp, pki.Failed, fmt.Sprintf("%s：时间戳不成立 (does not hold: %v)", which, err))
	case bad != nil:
		r.add(CheckArchiveTimestamp, pki.Failed, fmt.Sprintf("%s：其中的吊销列表无法解析 (a list inside cannot be read: %v)", which, bad))
	case anchored && (!vouched(t.Token.Certificates(), issuers, 64) || !listed(t.Token.Message().CRLs, issuers)):
		r.add(CheckArchiveTimestamp, pki.Failed, which+"：其中有无人签发的证书或吊销列表 (a certificate or list inside is signed by nobody)")
	default:
		r.add(CheckArchiveTimestamp, pki.Passed, which+"：时间戳成立 (the token holds)")
	}
	status, detail := pki.Passed, "证书可信，未吊销 (the certificate is good and not revoked)"
	for _, c := range s.path.Checks {
		if c.Status == pki.Failed || c.Status == pki.NotChecked && status == pki.Passed {
			status, detail = c.Status, c.Detail
		}
	}
	if s.path.Verdict == pki.Indeterminate && status == pki.Passed {
		status = pki.NotChecked
	}
	r.add(CheckArchiveCertificate, status, which+"："+detail)
	if report.Signer != nil && s.path.Evaluation && !slices.Contains(r.Statements, evaluationOnly) {
		r.state(evaluationOnly)
	}
}

// listed reports whether each CRL is signed by one of the issuers.
func listed(lists [][]byte, issuers []*smx509.Certificate) bool {
	for _, raw := range lists {
		l, err := pki.ParseCRL(raw)
		if err != nil || !slices.ContainsFunc(issuers, func(c *smx509.Certificate) bool { return l.CheckIssuer(c) == nil }) {
			return false
		}
	}
	return true
}

// inTime says whether what stood before was stamped again before it ended.
func inTime(r *builder, i int, at time.Time, before standing, in Input) {
	what := "签名的时间戳 (the signature's token)"
	if i > 0 {
		what = fmt.Sprintf("第 %d 次存档时间戳 (archive timestamp %d)", i, i)
	}
	switch {
	case before.past(at):
		r.add(CheckArchiveRenewal, pki.NotChecked, fmt.Sprintf("%s已于 %s %s，%s 才续盖，逾期：到期之后的情形无从证明 (renewed too late)", what, date(before.end), before.word, date(at)))
	default:
		r.add(CheckArchiveRenewal, pki.Passed, fmt.Sprintf("%s于 %s 续盖，早于其终止 %s (renewed in time)", what, date(at), date(before.end)))
	}
}

// verifyDigests holds each chain's digest against the ends of algorithms: it must count until the next chain begins, the
// last one's at the verifier's time (RFC 4998 §5.3).
func verifyDigests(r *builder, a archive, in Input) {
	for i, chain := range a.record.Chains {
		until := in.At
		if i+1 < len(a.record.Chains) {
			until = a.record.Chains[i+1][0].Token.GenTime
		}
		if end, ok := in.AlgorithmEnds[string(chain[0].Algorithm)]; ok && until.After(end) {
			r.add(CheckArchiveRenewal, pki.NotChecked, fmt.Sprintf("散列树用的 %s 自 %s 起不再可信，未及时换用别的摘要算法 (the trees' digest was not renewed in time)", chain[0].Algorithm, date(end)))
		}
	}
}

// current says whether the newest timestamp still counts at the verifier's own time. Past its end nothing is disproved,
// and nothing proved: a CA need not list an expired certificate, and nobody answers for its key any more.
func current(r *builder, s standing, in Input, archived bool) {
	switch {
	case !s.past(in.At):
		r.add(CheckArchiveCurrent, pki.Passed, fmt.Sprintf("最近一次存档时间戳到 %s 为止有效 (the newest archive timestamp counts until then)", date(s.end)))
	case archived:
		r.add(CheckArchiveCurrent, pki.NotChecked, fmt.Sprintf("最近一次存档时间戳已于 %s 终止（%s），此后没有续盖 (the newest archive timestamp has ended, and was not renewed)", date(s.end), s.word))
	default:
		r.add(CheckArchiveCurrent, pki.NotChecked, fmt.Sprintf("时间戳已于 %s 终止（%s），且没有存档时间戳：此后无从证明它当时就在 (the timestamp has ended, and no archive timestamp shows that it was there before)", date(s.end), s.word))
	}
}

// verifyDocumentDigest says when the digest that binds the document does not count any more. The appliance never had the
// document, so that no archive timestamp of its covers it.
func verifyDocumentDigest(r *builder, b *Bundle, in Input) {
	end, ok := in.AlgorithmEnds[b.Record.DigestAlgorithm]
	if !ok || !in.At.After(end) {
		return
	}
	r.require(CheckArchiveDocument)
	r.add(CheckArchiveDocument, pki.NotChecked, fmt.Sprintf("原文只由 %s 摘要约束，该算法自 %s 起不再可信；设备不存原文，存档时间戳不含原文 (the document is bound by that digest alone)", b.Record.DigestAlgorithm, date(end)))
}

// verifyUnstamped looks at what the signature's token does not stamp: the journal's entry, with the consent and all else in
// it, is bound by SM3 and the log's key alone, and a signature without a token by its own algorithms. Past the end of one of
// them archive timestamps have to have covered the entry and its payloads before.
func verifyUnstamped(r *builder, b *Bundle, a archive, signer *smx509.Certificate, trust Trust, in Input) {
	names := []string{nameSM3}
	for _, k := range trust.LogKeys {
		names = append(names, algorithmsOfKey(k)...)
	}
	if len(b.Token) == 0 {
		names = append(names, AlgorithmsOf(signer)...)
	}
	end, name := in.algorithmEnd(names...)
	if name == "" || !in.At.After(end) {
		return
	}
	r.require(CheckArchiveJournal)
	switch at := a.next(0); {
	case at.IsZero():
		r.add(CheckArchiveJournal, pki.NotChecked, fmt.Sprintf("日志条目（及无时间戳的签名）由 %s 约束，该算法自 %s 起不再可信，且没有存档时间戳 (the journal's entry, or a signature without a token, is bound by it, and no archive timestamp covers it)", name, date(end)))
	case at.After(end):
		r.add(CheckArchiveJournal, pki.NotChecked, fmt.Sprintf("日志条目（及无时间戳的签名）由 %s 约束，该算法自 %s 起不再可信，存档时间戳 %s 才盖，逾期 (archived too late)", name, date(end), date(at)))
	default:
		r.require(CheckArchive, CheckArchiveTree, CheckArchiveTimestamp, CheckArchiveCertificate, CheckArchiveRenewal, CheckArchiveCurrent)
		r.add(CheckArchiveJournal, pki.Passed, fmt.Sprintf("%s 自 %s 起不再可信，存档时间戳此前已盖住日志条目与签名 (archived before its algorithm ended)", name, date(end)))
	}
}

// verifyUnstampedAlone is that for a signature by itself without a token: nothing shows that it was there before.
func verifyUnstampedAlone(r *builder, signer *smx509.Certificate, in Input) {
	if end, name := in.algorithmEnd(AlgorithmsOf(signer)...); name != "" && in.At.After(end) {
		r.require(CheckArchiveCurrent)
		r.add(CheckArchiveCurrent, pki.NotChecked, fmt.Sprintf("签名没有时间戳，所用 %s 自 %s 起不再可信 (no timestamp shows that the signature was there before its algorithm ended)", name, date(end)))
	}
}

package pki

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/emmansun/gmsm/smx509"
)

// IDs of the checks in a [PathReport].
const (
	CheckPathChain       = "path.chain"       // a chain of names and keys leads to an anchor
	CheckPathSignatures  = "path.signatures"  // each certificate is signed by the next one's key
	CheckPathAlgorithms  = "path.algorithms"  // SM2 with SM3, or RSA ≥ 2048 with SHA-2, throughout
	CheckPathValidity    = "path.validity"    // the time in question lies within each validity
	CheckPathConstraints = "path.constraints" // CA bits, path lengths, critical extensions
	CheckPathPurpose     = "path.purpose"     // the leaf's key is for this purpose
	CheckPathRevocation  = "path.revocation"  // one for each certificate below the anchor
)

// PathChecks is the required list for [VerdictOf]: all of them.
func PathChecks() []string {
	return []string{CheckPathChain, CheckPathSignatures, CheckPathAlgorithms, CheckPathValidity, CheckPathConstraints,
		CheckPathPurpose, CheckPathRevocation}
}

// Bounds of the search. Real paths have two to four certificates; the rest is room for cross-certificates. Whoever
// sends hundreds of look-alikes gets "not checked" and costs us no more than this.
const (
	maxPathLength  = 8 // certificates, leaf and anchor included
	maxPathInputs  = 256
	maxSignatures  = 128
	maxPathResults = 16
)

// Options of [VerifyPath].
type Options struct {
	Leaf          *smx509.Certificate
	Intermediates []*smx509.Certificate // in any order; not trusted
	Anchors       []*smx509.Certificate // trusted, self-signed or not
	// At is the time in question, when the leaf's key was used: a timestamp's genTime, or the trusted clock's reading.
	At time.Time
	// RevocationAt is when a CRL must be current; zero means At. See [RevocationQuestion].
	RevocationAt time.Time
	// StoodAt is when what the leaf's key signed is known to have existed. See [RevocationQuestion].
	StoodAt time.Time
	Purpose Purpose
	CRLs    []*CRL
}

// A PathReport is what [VerifyPath] found.
type PathReport struct {
	// Chain is the best path found, leaf first. It ends in an anchor only if the check path.chain passed.
	Chain   []*smx509.Certificate `json:"-"`
	Checks  []Check               `json:"checks"`
	Verdict Verdict               `json:"verdict"`
	// Evaluation: a certificate of the path was issued for evaluation only. Whoever shows the verdict must show this.
	Evaluation bool `json:"evaluation"`
}

// VerifyPath builds a path from the leaf to an anchor and judges it at o.At (RFC 5280 §6.1).
//
// The search is ours, because smx509's Verify takes the host's trust store and time by default, ignores keyUsage and
// reads no CRL; only its parser and signature checks are used. Names chain by equal bytes, key identifiers choose
// among candidates of one name, and every candidate must verify. All paths within the bounds are judged and the best
// is reported. The anchor's validity, CA bits and path length count like any other certificate's; its self-signature
// and revocation do not, so a leaf that is itself an anchor has no revocation data and is never valid.
//
// Not implemented, and therefore never passed: name constraints and policy constraints (a path with them is
// indeterminate), delta and indirect CRLs, OCSP. VerifyPath returns a report always, never nil.
func VerifyPath(o Options) *PathReport {
	if o.Leaf == nil || len(o.Leaf.Raw) == 0 {
		return incomplete(Check{CheckPathChain, NotChecked, "没有证书 (no certificate)"})
	}
	if len(o.Intermediates)+len(o.Anchors) > maxPathInputs {
		return incomplete(Check{CheckPathChain, NotChecked, "证书过多，未作查找 (too many certificates)"})
	}
	s := &search{o: o, links: make(map[link]error)}
	s.walk([]*smx509.Certificate{o.Leaf})
	if len(s.paths) == 0 {
		return s.broken()
	}
	var best *PathReport
	for _, chain := range s.paths {
		if r := judge(o, chain); best == nil || better(r, best) {
			best = r
		}
	}
	return best
}

func incomplete(c Check) *PathReport {
	return &PathReport{Checks: []Check{c}, Verdict: VerdictOf([]Check{c}, PathChecks()...)}
}

func better(a, b *PathReport) bool {
	rank := map[Verdict]int{Invalid: 0, Indeterminate: 1, Valid: 2}
	if rank[a.Verdict] != rank[b.Verdict] {
		return rank[a.Verdict] > rank[b.Verdict]
	}
	count := func(r *PathReport) (n int) {
		for _, c := range r.Checks {
			if c.Status != Passed {
				n++
			}
		}
		return n
	}
	return count(a) < count(b)
}

type link struct{ child, parent *smx509.Certificate }

// search walks depth first from the leaf. It prunes by name and signature only: what else is wrong with a path is
// told, not hidden.
type search struct {
	o          Options
	links      map[link]error // outcome of each signature check made
	exhausted  bool
	paths      [][]*smx509.Certificate
	deepest    []*smx509.Certificate // longest chain of good signatures that reached no anchor
	deepestErr error                 // why it went no further: nil when no candidate was at hand
}

func (s *search) walk(chain []*smx509.Certificate) {
	tip := chain[len(chain)-1]
	if contains(s.o.Anchors, tip) {
		s.paths = append(s.paths, slices.Clone(chain))
		return
	}
	if len(chain) >= maxPathLength {
		s.dead(chain, errTooLong)
		return
	}
	var failure error
	for _, parent := range s.candidates(tip) {
		if s.exhausted || len(s.paths) >= maxPathResults {
			return
		}
		if inChain(chain, parent) { // a loop of cross-certificates
			continue
		}
		if err := s.check(tip, parent); err != nil {
			// The wrong key under the right name proves nothing against the leaf: a CA that changed its key looks so.
			// Only a candidate whose key identifier matches, or cannot tell, counts as the issuer.
			if failure == nil && keyFits(tip, parent) != keyOther {
				failure = err
			}
			continue
		}
		failure = nil
		s.walk(append(chain[:len(chain):len(chain)], parent))
	}
	s.dead(chain, failure)
}

var errTooLong = errors.New("chain too long")

func (s *search) dead(chain []*smx509.Certificate, err error) {
	if len(chain) > len(s.deepest) {
		s.deepest, s.deepestErr = slices.Clone(chain), err
	}
}

// candidates are those certificates whose subject is tip's issuer, byte for byte: anchors first, fitting key
// identifiers before absent and other ones.
func (s *search) candidates(tip *smx509.Certificate) []*smx509.Certificate {
	var out []*smx509.Certificate
	for _, pool := range [][]*smx509.Certificate{s.o.Anchors, s.o.Intermediates} {
		for _, c := range pool {
			if c != nil && len(c.Raw) > 0 && bytes.Equal(c.RawSubject, tip.RawIssuer) && !contains(out, c) {
				out = append(out, c)
			}
		}
	}
	slices.SortStableFunc(out, func(a, b *smx509.Certificate) int { return keyFits(tip, a) - keyFits(tip, b) })
	return out
}

const (
	keySame = iota
	keyUntold
	keyOther
)

// keyFits compares child's AKI with parent's SKI. It only orders the search and the blame; trust comes of signatures.
func keyFits(child, parent *smx509.Certificate) int {
	switch {
	case len(child.AuthorityKeyId) == 0 || len(parent.SubjectKeyId) == 0:
		return keyUntold
	case bytes.Equal(child.AuthorityKeyId, parent.SubjectKeyId):
		return keySame
	}
	return keyOther
}

func (s *search) check(child, parent *smx509.Certificate) error {
	l := link{child, parent}
	if err, done := s.links[l]; done {
		return err
	}
	if len(s.links) >= maxSignatures {
		s.exhausted = true
		return errTooLong
	}
	err := checkSignature(parent, child.SignatureAlgorithm, child.RawTBSCertificate, child.Signature)
	s.links[l] = err
	return err
}

func contains(pool []*smx509.Certificate, c *smx509.Certificate) bool {
	return slices.ContainsFunc(pool, func(p *smx509.Certificate) bool { return p != nil && bytes.Equal(p.Raw, c.Raw) })
}

// inChain: the same name with the same key has been passed already, perhaps in another certificate.
func inChain(chain []*smx509.Certificate, c *smx509.Certificate) bool {
	return slices.ContainsFunc(chain, func(p *smx509.Certificate) bool {
		return bytes.Equal(p.RawSubject, c.RawSubject) && bytes.Equal(p.RawSubjectPublicKeyInfo, c.RawSubjectPublicKeyInfo)
	})
}

// broken reports on a leaf from which no anchor was reached.
func (s *search) broken() *PathReport {
	chain := s.deepest
	if len(chain) == 0 {
		chain = []*smx509.Certificate{s.o.Leaf}
	}
	tip := chain[len(chain)-1]
	missing := Check{CheckPathChain, NotChecked, fmt.Sprintf("未找到 %s 的可信颁发者 (no trusted issuer at hand)", name(tip))}
	checks := []Check{missing}
	switch {
	case s.exhausted:
		checks[0].Detail = "证书链查找超出限度 (path search too large)"
	case errors.Is(s.deepestErr, errTooLong):
		// The limit is ours and no fault of the certificates.
		checks[0].Detail = fmt.Sprintf("证书链超过 %d 级，未继续查找 (chain too long)", maxPathLength)
	case errors.Is(s.deepestErr, errAlgorithmUnknown):
		checks = append(checks, Check{CheckPathAlgorithms, NotChecked, fmt.Sprintf("%s 的签名算法不受支持 (%v)", name(tip), s.deepestErr)})
	case errors.Is(s.deepestErr, errAlgorithmInsecure):
		checks = append(checks, Check{CheckPathAlgorithms, Failed, fmt.Sprintf("%s 的签名算法已不安全 (%v)", name(tip), s.deepestErr)})
	case s.deepestErr != nil:
		checks = append(checks, Check{CheckPathSignatures, Failed, fmt.Sprintf("%s 的颁发者签名不正确 (%v)", name(tip), s.deepestErr)})
	}
	checks = append(checks, judgeValidity(s.o, chain)...)
	checks = append(checks, judgeConstraints(s.o, chain)...)
	checks = append(checks, judgePurpose(s.o, chain)...)
	checks = append(checks, judgeRevocation(s.o, chain)...)
	return report(chain, checks)
}

// judge makes all checks on a complete path.
func judge(o Options, chain []*smx509.Certificate) *PathReport {
	checks := []Check{
		{CheckPathChain, Passed, fmt.Sprintf("共 %d 级，根为 %s (chain to an anchor)", len(chain), name(chain[len(chain)-1]))},
		{CheckPathSignatures, Passed, "各级颁发者签名正确 (signatures verify)"},
	}
	checks = append(checks, judgeAlgorithms(chain)...)
	checks = append(checks, judgeValidity(o, chain)...)
	checks = append(checks, judgeConstraints(o, chain)...)
	checks = append(checks, judgePurpose(o, chain)...)
	checks = append(checks, judgeRevocation(o, chain)...)
	return report(chain, checks)
}

func report(chain []*smx509.Certificate, checks []Check) *PathReport {
	return &PathReport{
		Chain:      chain,
		Checks:     checks,
		Verdict:    VerdictOf(checks, PathChecks()...),
		Evaluation: slices.ContainsFunc(chain, IsEvaluation),
	}
}

func judgeAlgorithms(chain []*smx509.Certificate) []Check {
	// The signatures below the anchor passed checkSignature; the leaf's own key has not been looked at yet.
	if err := CheckPublicKey(chain[0].PublicKey); err != nil {
		return []Check{{CheckPathAlgorithms, NotChecked, fmt.Sprintf("%s 的公钥不受支持 (%v)", name(chain[0]), err)}}
	}
	return []Check{{CheckPathAlgorithms, Passed, "算法可接受 (algorithms accepted)"}}
}

func judgeValidity(o Options, chain []*smx509.Certificate) []Check {
	if o.At.IsZero() {
		return []Check{{CheckPathValidity, NotChecked, "没有可信的时刻 (no time to judge at)"}}
	}
	var bad []Check
	for _, c := range chain {
		switch {
		case o.At.Before(c.NotBefore):
			bad = append(bad, Check{CheckPathValidity, Failed, fmt.Sprintf("%s 自 %s 起才有效 (not yet valid)", name(c), stamp(c.NotBefore))})
		case o.At.After(c.NotAfter):
			bad = append(bad, Check{CheckPathValidity, Failed, fmt.Sprintf("%s 已于 %s 过期 (expired)", name(c), stamp(c.NotAfter))})
		}
	}
	if bad != nil {
		return bad
	}
	return []Check{{CheckPathValidity, Passed, "在 " + stamp(o.At) + " 各级证书均在有效期内 (within validity)"}}
}

func judgeConstraints(o Options, chain []*smx509.Certificate) []Check {
	var bad []Check
	add := func(s Status, c *smx509.Certificate, why string) {
		bad = append(bad, Check{CheckPathConstraints, s, name(c) + " " + why})
	}
	below := 0 // intermediates below chain[i] that are not self-issued (RFC 5280 §4.2.1.9)
	for i, c := range chain {
		if len(c.UnhandledCriticalExtensions) > 0 {
			add(Failed, c, "含未知关键扩展 (unknown critical extension "+c.UnhandledCriticalExtensions[0].String()+")")
		}
		if i == 0 {
			continue
		}
		if c.Version != 3 || !c.BasicConstraintsValid || !c.IsCA {
			add(Failed, c, "不是 CA 证书 (not a CA)")
		}
		if c.KeyUsage&smx509.KeyUsageCertSign == 0 { // present in every conforming CA certificate (§4.2.1.3)
			add(Failed, c, "无证书签发用途 (keyCertSign missing)")
		}
		if c.BasicConstraintsValid && c.IsCA && c.MaxPathLen >= 0 && below > c.MaxPathLen {
			add(Failed, c, fmt.Sprintf("路径长度限制为 %d，其下有 %d 级 (pathLenConstraint exceeded)", c.MaxPathLen, below))
		}
		if _, _, present := extension(c, oidNameConstraints); present {
			add(NotChecked, c, "含名称限制，本程序不作判断 (name constraints not evaluated)")
		}
		if _, _, present := extension(c, oidPolicyConstraints); present {
			add(NotChecked, c, "含策略限制，本程序不作判断 (policy constraints not evaluated)")
		}
		if why := forbidsUsage(c, o.Purpose); why != "" {
			add(Failed, c, why)
		}
		if !selfIssued(c) {
			below++
		}
	}
	if bad != nil {
		return bad
	}
	return []Check{{CheckPathConstraints, Passed, "CA 约束满足 (CA constraints hold)"}}
}

// forbidsUsage: a CA whose certificate lists extended usages may only issue for those. RFC 5280 does not say so, but
// CAs rely on it and OpenSSL, Go and the browsers enforce it.
func forbidsUsage(ca *smx509.Certificate, p Purpose) string {
	want := purposeOID(p)
	ids, _, err := extKeyUsages(ca)
	switch {
	case err != nil:
		return "扩展密钥用途无法解析 (extKeyUsage malformed)"
	case len(ids) == 0 || want == nil:
		return ""
	}
	for _, id := range ids {
		if id.Equal(want) || id.Equal(oidExtKeyUsageAny) {
			return ""
		}
	}
	return "不得签发该用途的证书 (extKeyUsage of the CA excludes the purpose)"
}

func judgePurpose(o Options, chain []*smx509.Certificate) []Check {
	if ps := purposeProblems(chain[0], o.Purpose); len(ps) > 0 {
		return []Check{{CheckPathPurpose, Failed, joinProblems(ps)}}
	}
	return []Check{{CheckPathPurpose, Passed, "证书用途相符 (fit for " + string(o.Purpose) + ")"}}
}

func judgeRevocation(o Options, chain []*smx509.Certificate) []Check {
	if len(chain) == 1 {
		return []Check{{CheckPathRevocation, NotChecked, "没有颁发者，无从查询吊销 (no issuer, no revocation data)"}}
	}
	var out []Check
	for i := range len(chain) - 1 {
		q := RevocationQuestion{Certificate: chain[i], Issuer: chain[i+1], CRLs: o.CRLs, At: o.At, ListedAt: o.RevocationAt}
		if i == 0 {
			q.Purpose, q.StoodAt = o.Purpose, o.StoodAt
		}
		out = append(out, CheckRevocation(q))
	}
	return out
}

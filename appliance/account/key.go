package account

import (
	"bytes"
	"crypto"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/emmansun/gmsm/smx509"

	"yinjian/appliance/audit"
	"yinjian/appliance/pki"
	"yinjian/appliance/problem"
	"yinjian/hsm"
)

// Owners of keys: "signer:D10023", "tsa:sm2" and other units, "log", "tls".
const signerOwner = "signer:"

// useOf is what an owner's keys are for, "" for a name that is no owner's.
func useOf(owner string) string {
	switch {
	case strings.HasPrefix(owner, signerOwner):
		return UseStaff
	case strings.HasPrefix(owner, "tsa:"):
		return UseTSA
	case owner == UseLog, owner == UseTLS:
		return owner
	}
	return ""
}

// A heldKey is one key pair of the appliance with what certifies it. Values are never changed in place.
type heldKey struct {
	owner, label, algorithm string
	class                   hsm.SlotClass
	spki                    []byte
	signer                  crypto.Signer // of a key that is not in the cipher machine; else nil
	wrapped                 *Wrapped      // of a custody key; else nil
	node                    string        // of a resident key in another appliance's cipher machine, whose that is; else ""
	born                    time.Time     // zero: with the appliance
	destroyed               time.Time     // zero: it was not
	request                 *Request      // waits for its certificate
	certs                   []*heldCertificate
}

// A heldCertificate is a certificate of a key of ours with the path to its anchor, leaf first.
type heldCertificate struct {
	path       []*smx509.Certificate
	evaluation bool
}

func (c *heldCertificate) leaf() *smx509.Certificate { return c.path[0] }

func (c *heldCertificate) chain() [][]byte {
	var out [][]byte
	for _, above := range c.path[1:] {
		out = append(out, above.Raw)
	}
	return out
}

// covers reports whether at lies in the validity of every certificate of the path.
func (c *heldCertificate) covers(at time.Time) bool {
	return !slices.ContainsFunc(c.path, func(x *smx509.Certificate) bool { return at.Before(x.NotBefore) || at.After(x.NotAfter) })
}

// An OwnKey is a key of the appliance itself with the certificate from its birth, if it had one.
type OwnKey struct {
	Owner, Label, Algorithm string
	Class                   hsm.SlotClass
	Signer                  crypto.Signer    // of a key that is not in the cipher machine; else nil
	Public                  crypto.PublicKey // of a key without a certificate
	Certificate             []byte           // DER
	Chain                   [][]byte         // issuer first, anchor last
}

// AddKey makes a key of the appliance itself known. Call it before the replay.
func (s *Service) AddKey(k OwnKey) error {
	h := &heldKey{owner: k.Owner, label: k.Label, algorithm: k.Algorithm, class: k.Class, signer: k.Signer}
	var err error
	if k.Certificate == nil {
		if h.spki, err = smx509.MarshalPKIXPublicKey(k.Public); err != nil {
			return fmt.Errorf("account: key of %s: %w", k.Owner, err)
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		s.hold(h)
		return nil
	}
	path, err := parsePath(k.Certificate, k.Chain)
	if err != nil {
		return fmt.Errorf("account: key of %s: %w", k.Owner, err)
	}
	h.spki, h.certs = path[0].RawSubjectPublicKeyInfo, []*heldCertificate{{path: path, evaluation: true}}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hold(h)
	s.addCertificate(k.Certificate, k.Chain, useOf(k.Owner), k.Owner)
	return nil
}

func parsePath(der []byte, chain [][]byte) ([]*smx509.Certificate, error) {
	var path []*smx509.Certificate
	for _, c := range append([][]byte{der}, chain...) {
		cert, err := pki.ParseCertificate(c)
		if err != nil {
			return nil, err
		}
		path = append(path, cert)
	}
	return path, nil
}

// pathOf is leaf and the certificates above it, which the paths of thousands of signers share. The caller holds s.mu.
func (s *Service) pathOf(leaf *smx509.Certificate, chain [][]byte) ([]*smx509.Certificate, error) {
	path := []*smx509.Certificate{leaf}
	for _, der := range chain {
		c := s.above[string(der)]
		if c == nil {
			var err error
			if c, err = pki.ParseCertificate(der); err != nil {
				return nil, err
			}
			s.above[string(der)] = c
		}
		path = append(path, c)
	}
	return path, nil
}

// hold adds a key or puts a new value in the place of one with its label. The caller holds s.mu.
func (s *Service) hold(k *heldKey) {
	keys := slices.Clone(s.held[k.owner])
	if i := slices.IndexFunc(keys, func(had *heldKey) bool { return had.label == k.label }); i >= 0 {
		keys[i] = k
	} else {
		keys = append(keys, k)
	}
	if s.held[k.owner] == nil {
		s.heldOrder = ordered(s.heldOrder, k.owner)
	}
	s.held[k.owner] = keys
	s.ownerOf[string(k.spki)] = k.owner
}

// heldKeyOf answers the owner's key with that label. The caller holds s.mu.
func (s *Service) heldKeyOf(owner, label string) *heldKey {
	for _, k := range s.held[owner] {
		if k.label == label {
			return k
		}
	}
	return nil
}

// holdSigner makes a signer's keys known. The caller holds s.mu.
func (s *Service) holdSigner(g *Signer, at time.Time) error {
	for _, k := range g.Keys {
		owner := signerOwner + g.ID
		if s.heldKeyOf(owner, k.Label) != nil {
			continue // it came with the signer's first entry
		}
		node := k.Node
		if node == s.cfg.Node {
			node = ""
		}
		h := &heldKey{owner: owner, label: k.Label, algorithm: k.Algorithm, class: hsm.Staff, spki: k.PublicKey, wrapped: k.Wrapped, node: node, born: at}
		if k.Certificate != nil {
			leaf, err := pki.ParseCertificate(k.Certificate)
			if err != nil {
				return err
			}
			chain, err := s.chainOf(leaf, k.Algorithm)
			if err != nil {
				return err
			}
			path, err := s.pathOf(leaf, chain)
			if err != nil {
				return err
			}
			h.spki, h.certs = path[0].RawSubjectPublicKeyInfo, []*heldCertificate{{path: path, evaluation: true}}
			s.addCertificate(k.Certificate, chain, UseStaff, g.ID)
		}
		s.hold(h)
	}
	return nil
}

// A Standing is what the revocation lists say of a path.
type Standing struct {
	// CRLs, DER, is the list that clears each certificate below the anchor, without repetition. Not to be changed.
	CRLs [][]byte
	// Unchecked says why revocation could not be checked; "" when it was, and always under the policy "hard", which
	// refuses then.
	Unchecked string
}

func unusable(detail, next string) error {
	return problem.New(problem.CertificateUnusable, detail, next)
}

// Standing judges a path of ours, leaf first, at a time: every certificate within its validity, the anchor still admitted
// for the purpose, none revoked. Unknown status refuses, or under the policy "soft" is told in the answer. A refusal is
// [problem.CertificateUnusable].
func (s *Service) Standing(path []*smx509.Certificate, purpose pki.Purpose, at time.Time) (*Standing, error) {
	key := standingKey{path[0], purpose}
	s.standings.RLock()
	good, ok := s.standings.known[key]
	round := s.standings.round
	s.standings.RUnlock()
	if ok && !at.Before(good.from) && !at.After(good.until) {
		return good.standing, nil
	}
	good = goodStanding{from: path[0].NotBefore, until: path[0].NotAfter}
	lasting := true // the answer is the same at every time from good.from to good.until
	for _, c := range path {
		good.within(c.NotBefore, c.NotAfter)
		if at.Before(c.NotBefore) || at.After(c.NotAfter) {
			return nil, unusable(fmt.Sprintf("证书“%s”不在有效期内 (the certificate is not valid now)", c.Subject.CommonName), "请管理员换发证书 (ask an administrator to renew it)")
		}
	}
	s.mu.RLock()
	anchor := s.anchors[fingerprint(path[len(path)-1].Raw)]
	if anchor != nil && s.objects[objectKey{objectAnchor, anchor.ID}].known().frozen != "" {
		anchor = nil // what it vouches for now is not known
	}
	own := s.certificates[pki.SerialHex(path[0].SerialNumber)]
	var lists []*pki.CRL
	for _, c := range path[:len(path)-1] {
		lists = append(lists, s.issued[string(c.RawIssuer)]...)
	}
	s.mu.RUnlock()
	if anchor == nil || !slices.ContainsFunc(anchor.Uses, func(u string) bool { return purposes[u] == purpose && anchor.admits(u) }) {
		return nil, unusable("证书所属 CA 已不再受信任 (the certificate's CA is not trusted for this any more)", "请管理员换发证书 (ask an administrator to renew it)")
	}
	// A revocation of our own CA counts from its entry on, also while its list could not be made.
	if own != nil && own.issuer == string(path[0].RawIssuer) && own.Status == statusRevoked {
		return nil, unusable("证书已吊销 (the certificate is revoked)", "请管理员换发证书 (ask an administrator)")
	}
	out := new(Standing)
	for i, c := range path[:len(path)-1] {
		q := pki.RevocationQuestion{Certificate: c, Issuer: path[i+1], CRLs: lists, At: at}
		if i == 0 {
			q.Purpose = purpose
		}
		switch check := pki.CheckRevocation(q); check.Status {
		case pki.Failed:
			return nil, unusable(check.Detail, "请管理员换发证书 (ask an administrator)")
		case pki.Passed:
		default:
			if !s.cfg.SoftRevocation {
				return nil, unusable("没有在有效期内的吊销列表，证书状态不明 (no current CRL, the certificate's status is unknown): "+check.Detail,
					"请管理员更新吊销列表 (ask an administrator to publish or import a CRL)")
			}
			out.Unchecked, lasting = check.Detail, false
			continue
		}
		// Of the lists that clear it by themselves the newest goes into the evidence.
		var best *pki.CRL
		for _, l := range lists {
			q.CRLs = []*pki.CRL{l}
			if (best == nil || l.ThisUpdate().After(best.ThisUpdate())) && pki.CheckRevocation(q).Status == pki.Passed {
				best = l
			}
		}
		// One that is listed at all was revoked later, or is otherwise not so plain that it could be remembered.
		if best == nil || slices.ContainsFunc(lists, func(l *pki.CRL) bool { return len(l.Lookup(c.SerialNumber)) > 0 }) {
			lasting = false
		} else {
			good.within(best.ThisUpdate(), best.NextUpdate())
		}
		if best != nil && !slices.ContainsFunc(out.CRLs, func(had []byte) bool { return bytes.Equal(had, best.Raw()) }) {
			out.CRLs = append(out.CRLs, best.Raw())
		}
	}
	if lasting {
		good.standing = out
		s.standings.Lock()
		if s.standings.round == round { // else it rests on what is no more
			if s.standings.known == nil {
				s.standings.known = map[standingKey]goodStanding{}
			}
			s.standings.known[key] = good
		}
		s.standings.Unlock()
	}
	return out, nil
}

type standingKey struct {
	leaf    *smx509.Certificate
	purpose pki.Purpose
}

// A goodStanding is an answer that holds at every time from from to until.
type goodStanding struct {
	standing    *Standing
	from, until time.Time
}

func (g *goodStanding) within(from, until time.Time) {
	if from.After(g.from) {
		g.from = from
	}
	if until.Before(g.until) {
		g.until = until
	}
}

func (s *Service) forgetStandings() {
	s.standings.Lock()
	defer s.standings.Unlock()
	s.standings.known = nil
	s.standings.round++
}

// ActiveSigner answers the signer and the key with the certificate to sign with, or why there is none: of the certificates
// of the signer's keys of that algorithm, the one that is valid now and began last. One whose standing is good goes before
// one whose is not; one for evaluation counts only until the first imported one begins. While time is not trusted the newest is answered; whoever signs refuses then.
func (s *Service) ActiveSigner(id, algorithm string) (*Signer, *SignerKey, error) {
	g, ok := s.Signer(id)
	if !ok {
		return nil, nil, errSignerUnknown
	}
	if err := s.usable(signerObject(id)); err != nil {
		return nil, nil, err
	}
	if g.Stopped {
		return nil, nil, errSignerStopped
	}
	k, c, err := s.choose(signerOwner+id, algorithm)
	if err != nil {
		return nil, nil, err
	}
	return g, &SignerKey{Label: k.label, Algorithm: k.algorithm, Wrapped: k.wrapped, Certificate: c.leaf().Raw, Chain: c.chain(), Path: c.path}, nil
}

// Current answers the label of the key and the path, leaf first, that one of the appliance's own keys ("tsa:sm2", "tls")
// works with now. signer is set for a key that is not in the cipher machine.
func (s *Service) Current(owner string) (label string, signer crypto.Signer, path []*smx509.Certificate, err error) {
	k, c, err := s.choose(owner, "")
	if err != nil {
		return "", nil, nil, err
	}
	return k.label, k.signer, c.path, nil
}

// Paths answers the paths, leaf first, of all certificates that an owner's keys ever had, the present one first.
func (s *Service) Paths(owner string) [][]*smx509.Certificate {
	_, all := s.candidates(owner, "")
	_, used, _ := s.choose(owner, "")
	var out [][]*smx509.Certificate
	for _, c := range all {
		if c.cert == used {
			out = append([][]*smx509.Certificate{c.cert.path}, out...)
		} else {
			out = append(out, c.cert.path)
		}
	}
	return out
}

type candidate struct {
	key  *heldKey
	cert *heldCertificate
}

// candidates are an owner's keys and certificates of an algorithm ("": any): imported ones before those for
// evaluation, whatever date the CA has put in, then the latest notBefore first.
func (s *Service) candidates(owner, algorithm string) (keys int, out []candidate) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	out = make([]candidate, 0, 2) // most have one certificate
	for _, k := range s.held[owner] {
		if algorithm != "" && k.algorithm != algorithm || !k.destroyed.IsZero() {
			continue
		}
		keys++
		for _, c := range k.certs {
			out = append(out, candidate{k, c})
		}
	}
	// Of two that began together the one that came later is the newer.
	slices.Reverse(out)
	slices.SortStableFunc(out, func(a, b candidate) int {
		if a.cert.evaluation != b.cert.evaluation {
			return map[bool]int{true: 1, false: -1}[a.cert.evaluation]
		}
		return b.cert.leaf().NotBefore.Compare(a.cert.leaf().NotBefore)
	})
	return keys, out
}

func (s *Service) choose(owner, algorithm string) (*heldKey, *heldCertificate, error) {
	keys, all := s.candidates(owner, algorithm)
	elsewhere := func(c candidate) bool { return c.key.node != "" }
	if i := slices.IndexFunc(all, elsewhere); i >= 0 {
		node := all[0].key.node
		if all = slices.DeleteFunc(all, elsewhere); len(all) == 0 {
			return nil, nil, residentElsewhere(node)
		}
	}
	switch {
	case keys == 0:
		return nil, nil, problem.New(problem.KeyUnknown, "没有此算法的密钥 (there is no key of this algorithm)", "换算法，或请管理员补发 (use another algorithm, or ask an administrator)")
	case len(all) == 0:
		return nil, nil, problem.New(problem.CertificateAwaited, "密钥已生成，证书尚未导入 (the key waits for its certificate)",
			"请管理员向 CA 申请证书并用 yinjian cert import 导入 (ask an administrator to have the certificate issued and imported)")
	}
	now := s.cfg.Clock.Now()
	if !now.Trusted() {
		return all[0].key, all[0].cert, nil
	}
	// Once a certificate of another CA has begun, one for evaluation never signs again: it must not step in unseen when the
	// real one ends, is revoked, or its status is unknown.
	if slices.ContainsFunc(all, func(c candidate) bool { return !c.cert.evaluation && !now.Time.Before(c.cert.leaf().NotBefore) }) {
		all = slices.DeleteFunc(all, func(c candidate) bool { return c.cert.evaluation })
	}
	next := slices.ContainsFunc(all, func(c candidate) bool { return now.Time.Before(c.cert.leaf().NotBefore) })
	valid := slices.DeleteFunc(all, func(c candidate) bool { return !c.cert.covers(now.Time) })
	switch {
	case len(valid) == 0 && next:
		return nil, nil, unusable("证书尚未生效 (the certificate is not valid yet)", "等到生效时刻，或请管理员换发 (wait until it begins, or ask an administrator)")
	case len(valid) == 0:
		return nil, nil, unusable("证书已过期 (the certificate has expired)", "请管理员换发证书 (ask an administrator to renew it)")
	}
	if len(valid) > 1 {
		for _, c := range valid {
			if _, err := s.Standing(c.cert.path, purposes[useOf(owner)], now.Time); err == nil {
				return c.key, c.cert, nil
			}
		}
	}
	return valid[0].key, valid[0].cert, nil
}

func residentElsewhere(node string) *problem.Problem {
	return problem.New(problem.KeyElsewhere, fmt.Sprintf("签名人的密钥驻留在设备 %s 的密码机内，本院区没有 (the signer's key is in the cipher machine of %s and nowhere else)", node, node),
		"在该院区签名；要两院区通用，请管理员换成托管密钥：在该院区 cert csr --new-key (sign there; for both campuses have a custody key made)")
}

// A CertificateLine is one certificate of a key of ours, or a key that has none, as an administrator sees it.
type CertificateLine struct {
	Owner     string `json:"owner"`          // "signer:D10023", "tsa:sm2", "log", "tls"
	Name      string `json:"name,omitempty"` // of a signer
	Use       string `json:"use"`
	Algorithm string `json:"algorithm"`
	Label     string `json:"label"`
	Serial    string `json:"serial,omitempty"`
	Subject   string `json:"subject,omitempty"`
	Issuer    string `json:"issuer,omitempty"`
	// State is active (used now), next (not valid yet), superseded (valid, a newer one is used), expired, revoked,
	// unusable (its CA is not trusted any more, or its status is unknown), pending (requested) or awaited (not requested).
	State      string     `json:"state"`
	NotBefore  *time.Time `json:"not_before,omitempty"`
	NotAfter   *time.Time `json:"not_after,omitempty"`
	DaysLeft   int        `json:"days_left"` // whole days; negative after the end
	Revocation string     `json:"revocation,omitempty"`
	Evaluation bool       `json:"evaluation,omitempty"`
}

// States of a [CertificateLine].
const (
	StateActive     = "active"
	StateNext       = "next"
	StateSuperseded = "superseded"
	StateExpired    = "expired"
	StateRevoked    = "revoked"
	StateUnusable   = "unusable"
	StatePending    = "pending"
	StateAwaited    = "awaited"
)

// Certificates lists the certificates of all keys, and keys without one, by owner. Days and states are of the trusted
// clock; while it is not trusted every state is "unusable".
func (s *Service) Certificates() []CertificateLine {
	s.mu.RLock()
	owners := slices.Clone(s.heldOrder)
	s.mu.RUnlock()
	var out []CertificateLine
	for _, o := range owners {
		out = append(out, s.certificatesOf(o)...)
	}
	return out
}

func (s *Service) certificatesOf(owner string) (out []CertificateLine) {
	now := s.cfg.Clock.Now()
	s.mu.RLock()
	keys := s.held[owner]
	name := ""
	if g := s.signers[strings.TrimPrefix(owner, signerOwner)]; g != nil {
		name = g.Name
	}
	s.mu.RUnlock()
	for _, k := range keys {
		line := CertificateLine{Owner: owner, Name: name, Use: useOf(owner), Algorithm: k.algorithm, Label: k.label}
		if k.request != nil || len(k.certs) == 0 {
			waits := line
			waits.State = StateAwaited
			if k.request != nil {
				waits.State, waits.Subject = StatePending, k.request.Subject
			}
			out = append(out, waits)
		}
		_, used, _ := s.choose(owner, k.algorithm)
		for _, c := range k.certs {
			l := line
			leaf := c.leaf()
			from, to := leaf.NotBefore.UTC(), leaf.NotAfter.UTC()
			l.Serial, l.Subject, l.Issuer = pki.SerialHex(leaf.SerialNumber), leaf.Subject.String(), leaf.Issuer.String()
			l.NotBefore, l.NotAfter, l.Evaluation = &from, &to, c.evaluation
			l.State, l.Revocation, l.DaysLeft = s.state(c, owner, now.Trusted(), now.Time, c == used)
			out = append(out, l)
		}
	}
	return out
}

func (s *Service) state(c *heldCertificate, owner string, trusted bool, now time.Time, used bool) (state, revocation string, days int) {
	if !trusted {
		return StateUnusable, "时间不可信 (time is not trusted)", 0
	}
	leaf := c.leaf()
	left := leaf.NotAfter.Sub(now)
	days = int(left / (24 * time.Hour))
	if left < 0 {
		return StateExpired, "", days - 1
	}
	if now.Before(leaf.NotBefore) {
		return StateNext, "", days
	}
	standing, err := s.Standing(c.path, purposes[useOf(owner)], now)
	switch {
	case err != nil:
		state = StateUnusable
		if s.revoked(c, purposes[useOf(owner)], now) {
			state = StateRevoked
		}
		return state, detailOf(err), days
	case standing.Unchecked != "":
		revocation = "未核验 (not checked): " + standing.Unchecked
	default:
		revocation = "good"
	}
	if used {
		return StateActive, revocation, days
	}
	return StateSuperseded, revocation, days
}

// revoked reports whether a list, or our own CA's entry, says that a certificate of the path is revoked.
func (s *Service) revoked(c *heldCertificate, purpose pki.Purpose, at time.Time) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	own := s.certificates[pki.SerialHex(c.leaf().SerialNumber)]
	if own != nil && own.issuer == string(c.leaf().RawIssuer) && own.Status == statusRevoked {
		return true
	}
	for i, x := range c.path[:len(c.path)-1] {
		q := pki.RevocationQuestion{Certificate: x, Issuer: c.path[i+1], CRLs: s.issued[string(x.RawIssuer)], At: at, Purpose: purpose}
		if pki.CheckRevocation(q).Status == pki.Failed {
			return true
		}
	}
	return false
}

func detailOf(err error) string {
	if p, ok := err.(*problem.Problem); ok {
		return p.Detail
	}
	return err.Error()
}

// imported is the payload of a certificate's outcome: a certificate of a key of ours and the path that was found for it.
type imported struct {
	Owner       string   `json:"owner"`
	Label       string   `json:"label"`
	Certificate []byte   `json:"certificate"`
	Chain       [][]byte `json:"chain"` // issuer first, anchor last
	// AcceptedSubject: the administrator took it although the subject does not name the signer.
	AcceptedSubject bool `json:"accepted_subject,omitempty"`

	leaf *smx509.Certificate
}

func (m *imported) parse() (err error) {
	m.leaf, err = pki.ParseCertificate(m.Certificate)
	return err
}

func (m *imported) set(s *Service, e *audit.Entry) error {
	old := s.heldKeyOf(m.Owner, m.Label)
	if old == nil || !bytes.Equal(old.spki, m.leaf.RawSubjectPublicKeyInfo) {
		return fmt.Errorf("account: entry %d: certificate of an unknown key %s of %s", e.Sequence, m.Label, m.Owner)
	}
	path, err := s.pathOf(m.leaf, m.Chain)
	if err != nil {
		return fmt.Errorf("account: entry %d: %w", e.Sequence, err)
	}
	k := *old
	k.request = nil
	k.certs = slices.DeleteFunc(slices.Clone(old.certs), func(h *heldCertificate) bool { return bytes.Equal(h.leaf().Raw, m.Certificate) })
	k.certs = append(k.certs, &heldCertificate{path: path})
	s.hold(&k)
	s.addCertificate(m.Certificate, m.Chain, useOf(m.Owner), strings.TrimPrefix(m.Owner, signerOwner))
	return nil
}

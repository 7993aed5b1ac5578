package account

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/emmansun/gmsm/smx509"

	"yinjian/appliance/audit"
	"yinjian/appliance/pki"
	"yinjian/appliance/problem"
)

// What a trust anchor may vouch for. A key is for one of these for ever.
const (
	UseStaff = "staff"
	UseTSA   = "tsa"
	UseLog   = "log"
	UseTLS   = "tls"
	// UseClient: the TLS client certificates of applications, see [ClientBinding].
	UseClient = "client"
)

// Uses lists them.
var Uses = []string{UseStaff, UseTSA, UseLog, UseTLS, UseClient}

var purposes = map[string]pki.Purpose{
	UseStaff: pki.StaffSigning, UseTSA: pki.TimeStamping, UseLog: pki.LogSigning, UseTLS: pki.TLSServer,
	UseClient: pki.TLSClient,
}

// An Anchor is a CA that is trusted without another's word, for some uses. It is what its last entry says: the payload of
// an anchor's outcome.
type Anchor struct {
	ID          string    `json:"id"`          // SHA-256 of the certificate, hex
	Certificate []byte    `json:"certificate"` // DER
	Uses        []string  `json:"uses"`
	Note        string    `json:"note"`
	Evaluation  bool      `json:"evaluation,omitempty"` // one of the appliance's own, made at its birth
	Withdrawn   bool      `json:"withdrawn,omitempty"`  // trusted no more
	Reason      string    `json:"reason,omitempty"`     // why it was withdrawn
	ChangedBy   string    `json:"changed_by"`
	ChangedAt   time.Time `json:"changed_at"`

	cert *smx509.Certificate
}

// Subject is the CA's name.
func (a *Anchor) Subject() string { return a.cert.Subject.String() }

// Parsed is its certificate.
func (a *Anchor) Parsed() *smx509.Certificate { return a.cert }

// NotAfter is the end of its certificate.
func (a *Anchor) NotAfter() time.Time { return a.cert.NotAfter }

func (a *Anchor) admits(use string) bool { return !a.Withdrawn && slices.Contains(a.Uses, use) }

func (a *Anchor) parse() (err error) {
	if a.cert, err = pki.ParseCertificate(a.Certificate); err == nil && fingerprint(a.Certificate) != a.ID {
		err = fmt.Errorf("anchor %s is another certificate", a.ID)
	}
	return err
}

func (a *Anchor) set(s *Service, _ *audit.Entry) error {
	s.anchors[a.ID] = a
	return nil
}

// A trustObject is the payload of an entry that concerns certificates: read and checked before any lock is taken, then
// put into the directory under s.mu. Such an entry is the whole act, since nothing outside the journal changes with it;
// only a certificate request, which makes keys and signatures, has an intent before it.
type trustObject interface {
	parse() error
	set(s *Service, e *audit.Entry) error
}

func newTrustObject(kind string) trustObject {
	switch kind {
	case kindAdministrator:
		return new(Administrator)
	case kindAnchor:
		return new(Anchor)
	case kindIntermediates:
		return new(intermediates)
	case kindRequest:
		return new(Request)
	case kindImport:
		return new(imported)
	case kindDestroyed:
		return new(destruction)
	}
	return nil
}

func fingerprint(der []byte) string {
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:])
}

func untrustedTime(what string) error {
	return problem.New(problem.TimeUntrusted, "时间不可信，无法判断证书与列表的有效期 (time is not trusted; "+what+" cannot be judged)",
		"待时间恢复可信后重试 (try again when time is trusted)")
}

// AddAnchor admits a CA certificate (as [pki.ParseBundle] reads it, one) for uses. Given again with other uses or note it
// replaces what was said before; given again alike it changes nothing.
func (s *Service) AddAnchor(ctx context.Context, actor string, file []byte, uses []string, note string) (*Anchor, error) {
	certs, err := pki.ParseBundle(file)
	if err != nil || len(certs) != 1 {
		return nil, problem.New(problem.CertificateMalformed, "无法读出唯一一张 CA 证书 (the file does not hold exactly one certificate)",
			"提供根证书的 PEM 或 DER 文件，一次一张 (give the CA's certificate, PEM or DER, one at a time)").With(err)
	}
	cert := certs[0]
	if note != "" {
		if err := problem.CheckText("note", note, maxReason); err != nil {
			return nil, err
		}
	}
	if len(uses) == 0 {
		return nil, problem.Invalid("uses", "须指明可担保的用途：staff、tsa、log、tls、client (say what it may vouch for)")
	}
	for i, u := range uses {
		if purposes[u] == "" || slices.Contains(uses[:i], u) {
			return nil, problem.Invalid("uses", "未知或重复的用途 %q；可用 staff、tsa、log、tls、client (unknown or repeated use)", u)
		}
	}
	if err := pki.CheckPurpose(cert, pki.CertificateAuthority); err != nil {
		return nil, problem.New(problem.CertificatePurpose, "不是 CA 证书，不能作为信任锚 (not a CA certificate)", "向 CA 索取根证书 (ask the CA for its root certificate)").With(err)
	}
	if err := pki.CheckPublicKey(cert.PublicKey); err != nil {
		return nil, problem.New(problem.CertificateWeak, "根证书的密钥算法或长度不可接受 (the key is too weak or of an algorithm that is not taken)",
			"须为 SM2，或 2048 位以上的 RSA (SM2, or RSA from 2048 bits)").With(err)
	}
	unlock, err := s.beginChange(ctx, objectKey{objectAnchor, fingerprint(cert.Raw)})
	if err != nil {
		return nil, err
	}
	defer unlock()
	now := s.cfg.Clock.Now()
	if !now.Trusted() {
		return nil, untrustedTime("the certificate")
	}
	if now.Time.After(cert.NotAfter) {
		return nil, problem.New(problem.CertificateExpired, "根证书已过期 (the certificate has expired)", "向 CA 索取现行根证书 (ask the CA for its present root)")
	}
	uses = slices.Clone(uses)
	slices.Sort(uses)
	a := Anchor{ID: fingerprint(cert.Raw), Certificate: cert.Raw, Uses: uses, Note: note, ChangedBy: actor, ChangedAt: now.Time}
	if old := s.anchor(a.ID); old != nil {
		if !old.Withdrawn && slices.Equal(old.Uses, uses) && old.Note == note {
			return old, nil
		}
		a.Evaluation = old.Evaluation
	}
	return s.changeAnchor(ctx, actor, "add", a)
}

// WithdrawAnchor ends the trust in an anchor, by its id or the beginning of it (8 characters at least). Certificates below
// it sign no more; what was signed is judged by whoever verifies it.
func (s *Service) WithdrawAnchor(ctx context.Context, actor, id, reason string) (*Anchor, error) {
	if err := problem.CheckText("reason", reason, maxReason); err != nil {
		return nil, err
	}
	unlock, err := s.beginChange(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	var found []*Anchor
	for _, a := range s.Anchors() {
		if len(id) >= 8 && strings.HasPrefix(a.ID, strings.ToLower(id)) {
			found = append(found, a)
		}
	}
	if len(found) != 1 {
		return nil, problem.New(problem.NotFound, "没有这个信任锚，或标识不唯一 (no such anchor, or more than one)", "用 yinjian cert anchor list 查看标识 (look the id up in the list)")
	}
	if err := s.current(ctx, objectKey{objectAnchor, found[0].ID}); err != nil {
		return nil, err
	}
	a := *s.anchor(found[0].ID)
	if a.Withdrawn {
		return &a, nil
	}
	a.Withdrawn, a.Reason, a.ChangedBy, a.ChangedAt = true, reason, actor, s.cfg.Clock.Now().Time
	return s.changeAnchor(ctx, actor, "withdraw", a)
}

func (s *Service) changeAnchor(ctx context.Context, actor, act string, a Anchor) (*Anchor, error) {
	ref, err := newRef()
	if err != nil {
		return nil, err
	}
	d := audit.Draft{Kind: kindAnchor, Actor: actor, Object: a.ID, Fields: []audit.Field{
		text("act", act), text("uses", strings.Join(a.Uses, " ")), text("note", a.Note), text("reason", a.Reason),
	}}
	if err := s.conclude(ctx, d, ref, &a, nil); err != nil {
		return nil, err
	}
	return s.anchor(a.ID), nil
}

func (s *Service) anchor(id string) *Anchor {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.anchors[id]
}

// Anchors lists all, withdrawn ones too, ordered by id.
func (s *Service) Anchors() []*Anchor {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return sorted(s.anchors)
}

// AnchorsFor answers the anchors that may vouch for a purpose now; never nil.
func (s *Service) AnchorsFor(p pki.Purpose) []*smx509.Certificate {
	s.mu.RLock()
	defer s.mu.RUnlock()
	out := []*smx509.Certificate{}
	for _, a := range sorted(s.anchors) {
		for _, use := range a.Uses {
			if purposes[use] == p && !a.Withdrawn {
				out = append(out, a.cert)
			}
		}
	}
	return out
}

// allAnchors are those that are trusted for anything. The caller holds s.mu.
func (s *Service) allAnchors() (out []*smx509.Certificate) {
	for _, a := range sorted(s.anchors) {
		if !a.Withdrawn {
			out = append(out, a.cert)
		}
	}
	return out
}

// intermediatesID names them as one object.
const intermediatesID = "intermediates"

// maxIntermediates is what the search for a path takes well; a hospital needs a handful.
const maxIntermediates = 128

// intermediates is the payload of their outcome: CA certificates that lead to an anchor and need no trust of their own.
type intermediates struct {
	Certificates [][]byte `json:"certificates"`

	certs []*smx509.Certificate
}

func (m *intermediates) parse() error {
	for _, der := range m.Certificates {
		c, err := pki.ParseCertificate(der)
		if err != nil {
			return err
		}
		m.certs = append(m.certs, c)
	}
	return nil
}

func (m *intermediates) set(s *Service, _ *audit.Entry) error {
	for _, c := range m.certs {
		s.intermediates[fingerprint(c.Raw)] = c
	}
	return nil
}

// AddIntermediates takes CA certificates that lead to an anchor, and answers how many were new.
func (s *Service) AddIntermediates(ctx context.Context, actor string, file []byte) (int, error) {
	certs, err := pki.ParseBundle(file)
	if err != nil {
		return 0, malformed(err)
	}
	unlock, err := s.beginChange(ctx)
	if err != nil {
		return 0, err
	}
	defer unlock()
	now := s.cfg.Clock.Now()
	if !now.Trusted() {
		return 0, untrustedTime("the certificates")
	}
	return s.addIntermediates(ctx, actor, certs, now.Time)
}

// addIntermediates journals those that are not known yet. Each must lead to an anchor, or the lists that it signs would be
// anybody's. The caller holds s.changes.
func (s *Service) addIntermediates(ctx context.Context, actor string, certs []*smx509.Certificate, now time.Time) (int, error) {
	s.mu.RLock()
	anchors, known := s.allAnchors(), s.intermediates
	var fresh []*smx509.Certificate
	pool := slices.Clone(certs)
	for _, c := range known {
		pool = append(pool, c)
	}
	for _, c := range certs {
		id := fingerprint(c.Raw)
		if a := s.anchors[id]; known[id] == nil && (a == nil || a.Withdrawn) {
			fresh = append(fresh, c)
		}
	}
	s.mu.RUnlock()
	m := intermediates{}
	var names []string
	for _, c := range fresh {
		r := pki.VerifyPath(pki.Options{Leaf: c, Intermediates: pool, Anchors: anchors, At: now, Purpose: pki.CertificateAuthority})
		if err := pathProblem(r, "中间 CA 证书 intermediate "+c.Subject.String()); err != nil {
			return 0, err
		}
		m.Certificates = append(m.Certificates, c.Raw)
		names = append(names, c.Subject.String())
	}
	if len(m.Certificates) == 0 {
		return 0, nil
	}
	if err := s.current(ctx, objectKey{objectIntermediates, intermediatesID}); err != nil {
		return 0, err
	}
	if len(known)+len(m.Certificates) > maxIntermediates {
		return 0, problem.New(problem.TooLarge, fmt.Sprintf("中间证书超过 %d 张 (more than %d intermediates)", maxIntermediates, maxIntermediates),
			"只导入本院证书用得到的 (import only those that the hospital's certificates need)")
	}
	ref, err := newRef()
	if err != nil {
		return 0, err
	}
	subjects := strings.Join(names, "; ")
	if len(subjects) > audit.MaxTextBytes {
		subjects = fmt.Sprintf("%d certificates", len(names))
	}
	d := audit.Draft{Kind: kindIntermediates, Actor: actor, Object: intermediatesID, Fields: []audit.Field{text("subjects", subjects)}}
	return len(m.Certificates), s.conclude(ctx, d, ref, &m, nil)
}

func malformed(err error) error {
	return problem.New(problem.CertificateMalformed, "无法读出证书 (the file cannot be read as certificates)",
		"须为 PEM、DER 或不含签名者的 PKCS#7；重新向 CA 索取 (PEM, DER, or PKCS#7 with certificates only)").With(err)
}

// pathProblem makes a refusal of a path that does not hold, nil of one that does; that revocation could not be checked is
// no fault here.
func pathProblem(r *pki.PathReport, what string) error {
	worst := map[string]pki.Check{}
	for _, c := range r.Checks {
		if had, ok := worst[c.ID]; !ok || had.Status == pki.Passed || c.Status == pki.Failed && had.Status != pki.Failed {
			worst[c.ID] = c
		}
	}
	refuse := func(code problem.Code, id, next string) error {
		return problem.New(code, what+"："+worst[id].Detail, next)
	}
	const ask = "请 CA 核对并重新签发 (ask the CA to issue another)"
	switch {
	case worst[pki.CheckPathAlgorithms].Status == pki.Failed:
		return refuse(problem.CertificateWeak, pki.CheckPathAlgorithms, "须用 SM2-SM3，或 RSA 2048 位以上与 SHA-256；"+ask)
	case worst[pki.CheckPathSignatures].Status == pki.Failed:
		return refuse(problem.CertificateUntrusted, pki.CheckPathSignatures, "核对信任锚与中间证书 (check anchors and intermediates)")
	case worst[pki.CheckPathChain].Status != pki.Passed:
		return refuse(problem.CertificateUntrusted, pki.CheckPathChain,
			"先用 cert anchor add 加入该 CA 的根证书并允许此用途，缺中间证书时用 --chain 给出 (add the CA's root for this use, give intermediates with --chain)")
	case worst[pki.CheckPathPurpose].Status == pki.Failed:
		return refuse(problem.CertificatePurpose, pki.CheckPathPurpose, ask)
	case worst[pki.CheckPathConstraints].Status != pki.Passed:
		return refuse(problem.CertificateUntrusted, pki.CheckPathConstraints, ask)
	case worst[pki.CheckPathRevocation].Status == pki.Failed:
		return refuse(problem.CertificateRevoked, pki.CheckPathRevocation, "向 CA 申请新证书 (request a new certificate)")
	case worst[pki.CheckPathValidity].Status != pki.Passed:
		return refuse(problem.CertificateExpired, pki.CheckPathValidity, "向 CA 申请新证书 (request a new certificate)")
	case worst[pki.CheckPathAlgorithms].Status != pki.Passed:
		return refuse(problem.CertificateWeak, pki.CheckPathAlgorithms, ask)
	}
	return nil
}

package account

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/emmansun/gmsm/smx509"

	"yinjian/appliance/audit"
	"yinjian/appliance/pki"
	"yinjian/appliance/problem"
)

var reHost = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*$`)

// An Import brings certificates from a CA.
type Import struct {
	File  []byte   // as [pki.ParseBundle] reads it: the certificate, perhaps with those above it
	Chain [][]byte // more files, of CA certificates alone
	Owner string   // if set, the certificate must be for this owner's key: "signer:D10023"
	// AcceptSubject takes a signer's certificate whose subject does not name the signer; the journal says so.
	AcceptSubject bool
}

// An Imported certificate, as the answer shows it.
type Imported struct {
	CertificateLine
	// Already: it was imported before, its path still holds, and nothing has changed.
	Already bool `json:"already,omitempty"`
}

// ImportCertificates takes the certificates in a file that are for keys of ours, each with the CA certificates that lead
// to an anchor admitted for the key's purpose. A key has one purpose for ever: a certificate for another is refused. One
// that is not valid yet is taken and used when its time comes. CA certificates of the file and of the chain become known
// as intermediates. An encryption certificate beside a signing one is passed over.
func (s *Service) ImportCertificates(ctx context.Context, actor string, q Import) ([]Imported, error) {
	certs, err := pki.ParseBundle(q.File)
	if err != nil {
		return nil, malformed(err)
	}
	var above []*smx509.Certificate
	for _, f := range q.Chain {
		more, err := pki.ParseBundle(f)
		if err != nil {
			return nil, malformed(err)
		}
		above = append(above, more...)
	}
	unlock, err := s.beginChange(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	now := s.cfg.Clock.Now()
	if !now.Trusted() {
		return nil, untrustedTime("the certificate")
	}
	// 1. Which of them are for keys of ours? The rest may lead to an anchor.
	var leaves []*smx509.Certificate
	var others error
	for _, c := range certs {
		if _, known := s.ownerOfKey(c); known {
			leaves = append(leaves, c)
			continue
		}
		above = append(above, c)
		if !c.IsCA && others == nil {
			others = strange(c)
		}
	}
	if len(leaves) == 0 {
		if others == nil {
			others = problem.New(problem.CertificatePurpose, "文件中只有 CA 证书 (the file holds CA certificates only)",
				"根证书用 cert anchor add，中间证书用 cert chain add 或 --chain 导入 (import roots as anchors, intermediates with cert chain add or --chain)")
		}
		return nil, others
	}
	if len(leaves) == 1 && len(certs) == 1 && leaves[0].IsCA {
		return nil, purposeProblem(leaves[0], UseStaff)
	}
	for _, c := range leaves {
		owner, _ := s.ownerOfKey(c)
		if err := s.currentOwner(ctx, owner); err != nil {
			return nil, err
		}
	}
	// 2. Everything is judged before anything is written.
	var accepted []imported
	var out []Imported
	for _, c := range leaves {
		m, already, err := s.judgeImport(c, above, q, now.Time)
		if err != nil {
			return nil, err
		}
		line := Imported{CertificateLine: CertificateLine{Owner: m.Owner, Label: m.Label, Serial: pki.SerialHex(c.SerialNumber)}, Already: already}
		out = append(out, line)
		if !already {
			accepted = append(accepted, *m)
		}
	}
	// 3. What lies between leaf and anchor becomes known: lists of those CAs can be judged by it.
	for _, m := range accepted {
		var between []*smx509.Certificate
		for _, der := range m.Chain[:max(0, len(m.Chain)-1)] {
			c, err := pki.ParseCertificate(der)
			if err != nil {
				return nil, err
			}
			between = append(between, c)
		}
		if _, err := s.addIntermediates(ctx, actor, between, now.Time); err != nil {
			return nil, err
		}
		ref, err := newRef()
		if err != nil {
			return nil, err
		}
		d := audit.Draft{Kind: kindImport, Actor: actor, Object: m.Owner, Fields: []audit.Field{
			text("act", "import"), text("label", m.Label), text("certificate", fingerprint(m.Certificate)), boolean("accept_subject", m.AcceptedSubject),
		}}
		if err := s.conclude(ctx, d, ref, &m, nil); err != nil {
			return nil, err
		}
	}
	for i := range out {
		for _, line := range s.certificatesOf(out[i].Owner) {
			if line.Serial == out[i].Serial && line.Label == out[i].Label {
				out[i].CertificateLine = line
			}
		}
	}
	return out, nil
}

func (s *Service) ownerOfKey(c *smx509.Certificate) (string, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	o, ok := s.ownerOf[string(c.RawSubjectPublicKeyInfo)]
	return o, ok
}

// strange says why a certificate for no key of ours is refused.
func strange(c *smx509.Certificate) error {
	if pki.EncryptionOnly(c) {
		return problem.New(problem.CertificateEncryption,
			"这是加密证书（双证书中的第二张，GM/T 0015），其密钥由 CA 的密钥管理中心产生；本机只需签名证书 (an encryption certificate, the second of a pair; only the signing one is used here)",
			"请导入同一申请的签名证书 (import the signing certificate of the same request)")
	}
	return problem.New(problem.CertificateKeyUnknown, fmt.Sprintf("证书“%s”的公钥不属于本机任何密钥 (the certificate is for no key of this appliance)", c.Subject.CommonName),
		"核对是否由本机的证书请求签发 (was it issued for a request of this appliance?)")
}

func purposeProblem(c *smx509.Certificate, use string) error {
	if pki.EncryptionOnly(c) {
		return strange(c)
	}
	err := pki.CheckPurpose(c, purposes[use])
	if err == nil {
		return nil
	}
	var pe *pki.PurposeError
	why := ""
	if errors.As(err, &pe) {
		for _, p := range pe.Problems {
			why += "；" + p.Detail
		}
	}
	return problem.New(problem.CertificatePurpose, "证书用途与该密钥的用途（"+use+"）不符"+why+" (the certificate does not fit the key's one purpose)",
		"请 CA 按该用途重新签发；密钥用途不可更改 (have it issued for this purpose; a key never changes its own)")
}

func (s *Service) judgeImport(c *smx509.Certificate, above []*smx509.Certificate, q Import, now time.Time) (m *imported, already bool, err error) {
	s.mu.RLock()
	owner := s.ownerOf[string(c.RawSubjectPublicKeyInfo)]
	var key *heldKey
	for _, k := range s.held[owner] {
		if bytes.Equal(k.spki, c.RawSubjectPublicKeyInfo) {
			key = k
		}
	}
	g := s.signers[strings.TrimPrefix(owner, signerOwner)]
	var anchors []*smx509.Certificate
	use := useOf(owner)
	for _, a := range sorted(s.anchors) {
		if a.admits(use) {
			anchors = append(anchors, a.cert)
		}
	}
	pool := slices.Clone(above)
	for _, i := range s.intermediates {
		pool = append(pool, i)
	}
	lists := s.allLists()
	s.mu.RUnlock()
	if q.Owner != "" && q.Owner != owner {
		return nil, false, problem.New(problem.CertificateKeyUnknown, fmt.Sprintf("证书属于 %s 的密钥，不是 %s 的 (the certificate is for another owner's key)", owner, q.Owner),
			"核对清单与证书文件 (compare the list with the files)")
	}
	if !key.destroyed.IsZero() {
		return nil, false, problem.New(problem.CertificateKeyUnknown, fmt.Sprintf("证书“%s”的密钥已销毁 (the certificate's key was destroyed)", c.Subject.CommonName),
			"为现用密钥申请证书：cert csr (request one for a key that is there)")
	}
	// One that is there already keeps its path for as long as it leads somewhere. After that, a CA that renewed its root
	// for example, importing it again finds it another.
	for _, h := range key.certs {
		if bytes.Equal(h.leaf().Raw, c.Raw) && !slices.ContainsFunc(h.path, func(x *smx509.Certificate) bool { return now.After(x.NotAfter) }) &&
			slices.ContainsFunc(anchors, func(a *smx509.Certificate) bool { return bytes.Equal(a.Raw, h.path[len(h.path)-1].Raw) }) {
			return &imported{Owner: owner, Label: key.label}, true, nil
		}
	}
	if err := purposeProblem(c, use); err != nil {
		return nil, false, err
	}
	if err := pki.CheckPublicKey(c.PublicKey); err != nil {
		return nil, false, problem.New(problem.CertificateWeak, "证书的密钥算法或长度不可接受 (key too weak)", "重新申请 (request another)").With(err)
	}
	at := now
	if at.Before(c.NotBefore) {
		at = c.NotBefore
	}
	r := pki.VerifyPath(pki.Options{Leaf: c, Intermediates: pool, Anchors: anchors, At: at, RevocationAt: at, Purpose: purposes[use], CRLs: lists})
	if err := pathProblem(r, "证书“"+c.Subject.CommonName+"”"); err != nil {
		return nil, false, err
	}
	m = &imported{Owner: owner, Label: key.label, Certificate: c.Raw}
	if use == UseStaff && !names(c, g) {
		if !q.AcceptSubject {
			return nil, false, problem.New(problem.CertificateSubject,
				fmt.Sprintf("证书主题“%s”与签名人 %s（工号 %s）不符 (the subject does not name the signer)", c.Subject.String(), g.Name, g.ID),
				"请 CA 更正；确认无误可加 --accept-subject，将记入日志 (have it corrected, or accept it explicitly: the journal will say so)")
		}
		m.AcceptedSubject = true
	}
	for _, x := range r.Chain[1:] {
		m.Chain = append(m.Chain, x.Raw)
	}
	return m, false, nil
}

// names reports whether the subject is the signer: the common name is the name, or has it between @ signs as some CAs
// write ("051@张三@…@1"), and a serialNumber, if there is one, is the staff number.
func names(c *smx509.Certificate, g *Signer) bool {
	if g == nil || c.Subject.SerialNumber != "" && c.Subject.SerialNumber != g.ID {
		return false
	}
	return c.Subject.CommonName == g.Name || slices.Contains(strings.Split(c.Subject.CommonName, "@"), g.Name)
}

package account

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"slices"
	"time"

	"github.com/emmansun/gmsm/smx509"

	"yinjian/appliance/pki"
	"yinjian/appliance/problem"
)

// A ClientBinding says by which TLS client certificates (RFC 8446 §4.4.2) an application proves itself: by keys, or by a
// subject below a trust anchor for the use "client".
type ClientBinding struct {
	// Alone: the certificate is enough. Otherwise the request has to carry HMAC-SM3 too.
	Alone bool `json:"alone"`
	// Keys are SHA-256 of the SubjectPublicKeyInfo of keys that may be used, whoever certified them; hexadecimal. To take one
	// out is how it is revoked.
	Keys []string `json:"keys,omitempty"`
	// Subject (DER) is whom the certificate has to name, byte for byte, and Anchor (its id) whose it has to be. Lists say which
	// are revoked.
	Subject     []byte `json:"subject,omitempty"`
	SubjectText string `json:"subject_text,omitempty"`
	Anchor      string `json:"anchor,omitempty"`
}

// How a certificate is bound.
const (
	BindByKey     = "key"
	BindBySubject = "subject"
	BindByNone    = "none" // the binding is ended
)

const (
	maxClientKeys  = 4   // one, its successor, and those of a second machine
	maxClientPaths = 256 // remembered; beyond, all are built again
)

// matches says whether the binding is for a certificate, by its key or its name alone.
func (b *ClientBinding) matches(cert *x509.Certificate) bool {
	if len(b.Keys) > 0 {
		sum := sha256.Sum256(cert.RawSubjectPublicKeyInfo)
		return slices.Contains(b.Keys, hex.EncodeToString(sum[:]))
	}
	return bytes.Equal(b.Subject, cert.RawSubject)
}

// BindClient says by which client certificates the application proves itself from now on; it replaces what was said before.
// By "key" file has one certificate or several, whose keys are meant; by "subject" an example, then those above it that are
// not known yet. It needs no cipher machine.
func (s *Service) BindClient(ctx context.Context, actor, id, by string, file []byte, alone bool, reason string) (*Application, error) {
	now := s.cfg.Clock.Now()
	var b *ClientBinding
	if by != BindByNone {
		if !now.Trusted() {
			return nil, untrustedTime("the certificate")
		}
		certs, err := pki.ParseBundle(file)
		if err != nil {
			return nil, malformed(err)
		}
		b = &ClientBinding{Alone: alone}
		if by == BindByKey {
			err = b.pin(certs, now.Time)
		} else {
			err = s.bindSubject(b, certs, now.Time)
		}
		if err != nil {
			return nil, err
		}
	}
	return s.changeApplication(ctx, actor, id, "client-certificate", reason, func(a *Application, _ []byte) error {
		if b != nil {
			for _, o := range s.Applications() {
				if o.ID != id && o.Client != nil && o.Client.meets(b) {
					return problem.New(problem.Exists, "该证书已登记给应用 "+o.ID+" (the certificate is another application's)", "一个应用一张证书 (each application has its own)")
				}
			}
		}
		a.Client = b
		return nil
	})
}

// meets says whether one certificate could be both bindings'.
func (b *ClientBinding) meets(o *ClientBinding) bool {
	return slices.ContainsFunc(b.Keys, func(k string) bool { return slices.Contains(o.Keys, k) }) ||
		b.Anchor != "" && b.Anchor == o.Anchor && bytes.Equal(b.Subject, o.Subject)
}

func (b *ClientBinding) pin(certs []*smx509.Certificate, now time.Time) error {
	if len(certs) > maxClientKeys {
		return problem.New(problem.TooLarge, fmt.Sprintf("至多 %d 张证书 (at most %d certificates)", maxClientKeys, maxClientKeys), "只给出该应用自己的证书，不含 CA (the application's own alone)")
	}
	for _, c := range certs {
		switch {
		case c.IsCA:
			return problem.New(problem.CertificatePurpose, "CA 证书不能作为客户端证书 (a CA's certificate is no client's)", "按公钥登记时只给出该应用自己的证书 (give the application's own alone)")
		case now.After(c.NotAfter):
			return problem.New(problem.CertificateExpired, "证书已过期 (the certificate has expired)", "换发后再登记 (renew it first)")
		}
		sum := sha256.Sum256(c.RawSubjectPublicKeyInfo)
		if k := hex.EncodeToString(sum[:]); !slices.Contains(b.Keys, k) {
			b.Keys = append(b.Keys, k)
		}
	}
	return nil
}

func (s *Service) bindSubject(b *ClientBinding, certs []*smx509.Certificate, now time.Time) error {
	path, err := s.clientPath(certs, now)
	if err != nil {
		return err
	}
	if _, err := s.Standing(path, pki.TLSClient, now); err != nil {
		return err
	}
	b.Subject, b.SubjectText, b.Anchor = certs[0].RawSubject, certs[0].Subject.String(), fingerprint(path[len(path)-1].Raw)
	return nil
}

// clientPath leads from a client's certificate to an anchor for clients.
func (s *Service) clientPath(certs []*smx509.Certificate, now time.Time) ([]*smx509.Certificate, error) {
	pool := slices.Clone(certs[1:])
	s.mu.RLock()
	for _, c := range s.intermediates {
		pool = append(pool, c)
	}
	s.mu.RUnlock()
	r := pki.VerifyPath(pki.Options{Leaf: certs[0], Intermediates: pool, Anchors: s.AnchorsFor(pki.TLSClient), At: now, Purpose: pki.TLSClient})
	return r.Chain, pathProblem(r, "客户端证书 client certificate "+certs[0].Subject.String())
}

// AsksClients says whether an application is bound to a certificate, so that clients have to be asked for theirs.
func (s *Service) AsksClients() bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, a := range s.applications {
		if a.Client != nil {
			return true
		}
	}
	return false
}

// ClientApplication is the application that proves itself by this certificate alone, "" when there is none, or more than one.
// The handshake has to have proved that the caller has its key. Whether the certificate is fit says [Service.CheckClient].
func (s *Service) ClientApplication(cert *x509.Certificate) (id string) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, a := range s.applications {
		if a.Client != nil && a.Client.Alone && a.Client.matches(cert) {
			if id != "" {
				return "" // two campuses bound it at the same time
			}
			id = a.ID
		}
	}
	return id
}

// CheckClient says whether shown, the certificates of a TLS client, its own first, are what the application is bound to, and
// fit at a time. A refusal is [problem.Unauthenticated].
func (s *Service) CheckClient(app *Application, shown []*x509.Certificate, at time.Time) error {
	refuse := func(detail string) *problem.Problem {
		return problem.New(problem.Unauthenticated, detail, "以登记的客户端证书连接 (TLS 1.3)，见 docs/api-auth.md (connect with the registered client certificate)")
	}
	if len(shown) == 0 {
		return refuse("该应用须出示客户端证书 (the application has to show its client certificate)")
	}
	if !app.Client.matches(shown[0]) {
		return refuse("客户端证书不是该应用的 (the client certificate is not the application's)")
	}
	if at.Before(shown[0].NotBefore) || at.After(shown[0].NotAfter) {
		return refuse("客户端证书不在有效期内 (the client certificate is not valid now)")
	}
	if app.Client.Anchor == "" {
		return nil
	}
	path, err := s.knownPath(shown, at)
	if err == nil && fingerprint(path[len(path)-1].Raw) != app.Client.Anchor {
		return refuse("客户端证书不属于登记的 CA (the client certificate is another CA's)")
	}
	if err == nil {
		_, err = s.Standing(path, pki.TLSClient, at)
	}
	if err != nil {
		return refuse("客户端证书不可用 (the client certificate cannot be used): " + detailOf(err)).With(err)
	}
	return nil
}

// knownPath is clientPath, built once for a certificate. That it is fit now is not remembered.
func (s *Service) knownPath(shown []*x509.Certificate, at time.Time) ([]*smx509.Certificate, error) {
	id := fingerprint(shown[0].Raw)
	s.clients.Lock()
	path := s.clients.paths[id]
	s.clients.Unlock()
	if path != nil {
		return path, nil
	}
	var certs []*smx509.Certificate
	for _, c := range shown[:min(len(shown), 4)] {
		parsed, err := pki.ParseCertificate(c.Raw)
		if err != nil {
			return nil, malformed(err)
		}
		certs = append(certs, parsed)
	}
	path, err := s.clientPath(certs, at)
	if err != nil {
		return nil, err
	}
	s.clients.Lock()
	defer s.clients.Unlock()
	if s.clients.paths == nil || len(s.clients.paths) >= maxClientPaths {
		s.clients.paths = map[string][]*smx509.Certificate{}
	}
	s.clients.paths[id] = path
	return path, nil
}

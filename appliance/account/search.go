package account

import (
	"slices"
	"strings"
	"time"

	"yinjian/appliance/pki"
)

// A SignerQuery asks for some of the signers, in the order of their ids.
type SignerQuery struct {
	// Text is a part of id, name, department, campus or post; A to Z in either case. "" is all.
	Text string
	// Stopped, if set, asks for those alone that are stopped, or that are not.
	Stopped *bool
	// Skip is how many to leave out first; Most how many to answer.
	Skip, Most int
}

// SearchSigners answers a page and how many there are in all. A page without Text and Stopped costs what is on it, however
// many signers there are.
func (s *Service) SearchSigners(q SignerQuery) (page []*Signer, total int) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if q.Text == "" && q.Stopped == nil {
		ids := s.signerOrder[min(q.Skip, len(s.signerOrder)):]
		for _, id := range ids[:min(q.Most, len(ids))] {
			page = append(page, s.signers[id])
		}
		return page, len(s.signerOrder)
	}
	want := strings.ToLower(q.Text)
	for _, id := range s.signerOrder {
		g := s.signers[id]
		if q.Stopped != nil && g.Stopped != *q.Stopped || !g.mentions(want) {
			continue
		}
		if total >= q.Skip && len(page) < q.Most {
			page = append(page, g)
		}
		total++
	}
	return page, total
}

// mentions reports whether the signer's words have the part, which is in lower case.
func (g *Signer) mentions(part string) bool {
	return has(part, g.ID, g.Name, g.Department, g.Campus, g.Role)
}

// ordered is the ids with one more. Called with mu held.
func ordered(ids []string, id string) []string {
	if i, there := slices.BinarySearch(ids, id); !there {
		return slices.Insert(ids, i, id)
	}
	return ids
}

// Scopes of a [HeldQuery].
const (
	ScopeOwn     = "own"     // the appliance's own keys
	ScopeSigners = "signers" // the signers'
)

// A HeldQuery asks for some of the keys, or of their certificates, in the order of their owners.
type HeldQuery struct {
	// Text is a part of an owner, a signer's name, a label, or of certificates serial and subject; A to Z in either case. "" is
	// all.
	Text string
	// Scope is one of those above; "" is both.
	Scope string
	// Within, if it is not 0, asks for certificates alone that end within it, or have ended, and in the place of which there
	// is no newer one that is used.
	Within time.Duration
	// After is the owner that the page before ended with; "" begins.
	After string
	// Most is how many a page has: it ends with the owner with whom there are so many.
	Most int
}

// SearchKeys answers a page and, if there are more, what the next one begins after. A page without Text costs what is on it,
// however many keys there are.
func (s *Service) SearchKeys(q HeldQuery) (page []KeyRecord, next string) {
	want := strings.ToLower(q.Text)
	fits := func(k *heldKey) bool { return has(want, k.label) }
	s.mu.RLock()
	defer s.mu.RUnlock()
	for after := q.After; ; {
		owner := s.nextOwner(q, after, fits)
		switch {
		case owner == "":
			return page, ""
		case len(page) >= q.Most:
			return page, after
		}
		after = owner
		for _, k := range s.held[owner] {
			if s.named(want, owner) || fits(k) {
				page = append(page, k.record())
			}
		}
	}
}

// SearchCertificates answers a page of lines as [Service.Certificates] has them and, if there are more, what the next one
// begins after. A page without Text and Within costs what is on it, however many certificates there are.
func (s *Service) SearchCertificates(q HeldQuery) (page []CertificateLine, next string) {
	want, ends := strings.ToLower(q.Text), s.cfg.Clock.Now().Time.Add(q.Within)
	fits := func(k *heldKey) bool {
		return has(want, k.label) || slices.ContainsFunc(k.certs, func(c *heldCertificate) bool { // the DER has the words as they are, and is not to be made first
			return has(want, pki.SerialHex(c.leaf().SerialNumber), string(c.leaf().RawSubject))
		})
	}
	soon := func(k *heldKey) bool {
		return slices.ContainsFunc(k.certs, func(c *heldCertificate) bool { return c.leaf().NotAfter.Before(ends) })
	}
	for after := q.After; ; {
		s.mu.RLock()
		owner := s.nextOwner(q, after, fits)
		for ; q.Within != 0 && owner != "" && !slices.ContainsFunc(s.held[owner], soon); owner = s.nextOwner(q, after, fits) {
			after = owner
		}
		named := owner != "" && s.named(want, owner)
		s.mu.RUnlock()
		switch {
		case owner == "":
			return page, ""
		case len(page) >= q.Most:
			return page, after
		}
		after = owner
		for _, l := range s.certificatesOf(owner) {
			if q.Within != 0 && (l.NotAfter == nil || !l.NotAfter.Before(ends) || l.State == StateSuperseded || l.State == StateRevoked) {
				continue
			}
			if named || has(want, l.Label, l.Serial, l.Subject) {
				page = append(page, l)
			}
		}
	}
}

// nextOwner is the first owner after one whose name, or one of whose keys, fits; "" if there is none. Called with mu held.
func (s *Service) nextOwner(q HeldQuery, after string, fits func(*heldKey) bool) string {
	want := strings.ToLower(q.Text)
	i, there := slices.BinarySearch(s.heldOrder, after)
	if there {
		i++
	}
	for _, owner := range s.heldOrder[i:] {
		if signers := strings.HasPrefix(owner, signerOwner); q.Scope == ScopeOwn && signers || q.Scope == ScopeSigners && !signers {
			continue
		}
		if s.named(want, owner) || slices.ContainsFunc(s.held[owner], fits) {
			return owner
		}
	}
	return ""
}

// named reports whether an owner's id, or a signer's name, has the part. Called with mu held.
func (s *Service) named(part, owner string) bool {
	name := ""
	if g := s.signers[strings.TrimPrefix(owner, signerOwner)]; g != nil {
		name = g.Name
	}
	return has(part, owner, name)
}

// has reports whether one of the words has the part, which is in lower case.
func has(part string, words ...string) bool {
	return slices.ContainsFunc(words, func(w string) bool { return strings.Contains(strings.ToLower(w), part) })
}

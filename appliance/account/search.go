package account

import (
	"slices"
	"strings"
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
	return slices.ContainsFunc([]string{g.ID, g.Name, g.Department, g.Campus, g.Role}, func(s string) bool {
		return strings.Contains(strings.ToLower(s), part)
	})
}

// ordered is the ids with one more. Called with mu held.
func ordered(ids []string, id string) []string {
	if i, there := slices.BinarySearch(ids, id); !there {
		return slices.Insert(ids, i, id)
	}
	return ids
}

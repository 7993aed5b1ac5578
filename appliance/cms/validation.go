package cms

import (
	"bytes"
	"fmt"
	"slices"

	"github.com/emmansun/gmsm/smx509"
)

// WithValidation is the same message with certificates and revocation lists (DER) added, each once: what somebody needs
// who judges the signer when nobody can be asked any more. Nothing of it is signed (RFC 5652 §5.1).
func (sd *SignedData) WithValidation(certificates []*smx509.Certificate, lists [][]byte) (*SignedData, error) {
	other := *sd
	other.certificates, other.Certificates = slices.Clone(sd.certificates), slices.Clone(sd.Certificates)
	other.CRLs = slices.Clone(sd.CRLs)
	for _, c := range certificates {
		if !contains(other.Certificates, c) {
			other.certificates, other.Certificates = append(other.certificates, c.Raw), append(other.Certificates, c)
		}
	}
	for _, l := range lists {
		if !slices.ContainsFunc(other.CRLs, func(had []byte) bool { return bytes.Equal(had, l) }) {
			other.CRLs = append(other.CRLs, l)
		}
	}
	if len(other.certificates) > maxCertificates || len(other.CRLs) > maxCertificates {
		return nil, fmt.Errorf("cms: %d certificates and %d lists, at most %d of each", len(other.certificates), len(other.CRLs), maxCertificates)
	}
	sortSetOf(other.certificates)
	sortSetOf(other.CRLs)
	slices.SortFunc(other.Certificates, func(a, b *smx509.Certificate) int { return bytes.Compare(a.Raw, b.Raw) })
	return &other, nil
}

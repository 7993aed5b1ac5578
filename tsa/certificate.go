package tsa

import (
	"encoding/asn1"
	"errors"
	"fmt"
	"time"

	"github.com/emmansun/gmsm/smx509"
	"golang.org/x/crypto/cryptobyte"
	der "golang.org/x/crypto/cryptobyte/asn1"
)

var (
	oidExtendedKeyUsage = asn1.ObjectIdentifier{2, 5, 29, 37}
	oidPrivateKeyUsage  = asn1.ObjectIdentifier{2, 5, 29, 16}
	oidTimeStamping     = asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 8}
)

// checkPurpose is RFC 3161 §2.3: extended key usage critical, and timeStamping its only purpose.
func checkPurpose(cert *smx509.Certificate) error {
	for _, e := range cert.Extensions {
		if !e.Id.Equal(oidExtendedKeyUsage) {
			continue
		}
		s := cryptobyte.String(e.Value)
		var seq cryptobyte.String
		var purpose asn1.ObjectIdentifier
		switch {
		case !e.Critical:
			return errors.New("certificate: extended key usage is not critical")
		case !s.ReadASN1(&seq, der.SEQUENCE) || !s.Empty() || !seq.ReadASN1ObjectIdentifier(&purpose):
			return errors.New("certificate: extended key usage is broken")
		case !seq.Empty() || !purpose.Equal(oidTimeStamping):
			return errors.New("certificate: extended key usage is not timeStamping alone")
		}
		return nil
	}
	return errors.New("certificate: no extended key usage")
}

// signingPeriod is when the unit may sign: its certificate's validity, cut by the private key usage period if there is
// one (RFC 3280 §4.2.1.4; dropped from RFC 5280, alive in timestamping, where certificates outlive keys).
func signingPeriod(cert *smx509.Certificate) (period [2]time.Time, err error) {
	period = [2]time.Time{cert.NotBefore, cert.NotAfter}
	for _, e := range cert.Extensions {
		if !e.Id.Equal(oidPrivateKeyUsage) {
			continue
		}
		// PrivateKeyUsagePeriod ::= SEQUENCE { notBefore [0] IMPLICIT GeneralizedTime OPTIONAL, notAfter [1] … OPTIONAL }
		s := cryptobyte.String(e.Value)
		var seq cryptobyte.String
		if !s.ReadASN1(&seq, der.SEQUENCE) || !s.Empty() || seq.Empty() {
			return period, errors.New("certificate: private key usage period is broken")
		}
		for i, tag := range []der.Tag{0x80, 0x81} {
			var text cryptobyte.String
			var present bool
			if !seq.ReadOptionalASN1(&text, &present, tag) {
				return period, errors.New("certificate: private key usage period is broken")
			}
			if !present {
				continue
			}
			t, ok := parseGeneralizedTime(text)
			if !ok {
				return period, fmt.Errorf("certificate: private key usage period: bad time %q", text)
			}
			if i == 0 && t.After(period[0]) || i == 1 && t.Before(period[1]) {
				period[i] = t
			}
		}
		if !seq.Empty() {
			return period, errors.New("certificate: private key usage period is broken")
		}
	}
	return period, nil
}

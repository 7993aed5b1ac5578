package pki

import "encoding/asn1"

// Our object identifiers hang below 2.999, the arc that ITU-T X.660 (joint-iso-itu-t(2) example(999)) leaves to
// examples, because no arc is registered for this product yet. Two makers could use the same numbers there, so the arc
// must be replaced by a registered one before production; it is written in this file only. Documents signed under the
// example arc keep verifying if the old numbers stay readable.
var arc = asn1.ObjectIdentifier{2, 999}

func below(numbers ...int) asn1.ObjectIdentifier {
	return append(append(asn1.ObjectIdentifier{}, arc...), numbers...)
}

// Object identifiers of this product. Read only.
var (
	// OIDSigningContext is the signed attribute whose value is a [SigningContext].
	OIDSigningContext = below(1, 1)
	// OIDPolicyEvaluation is the certificate policy "evaluation only" of package pki/ca.
	OIDPolicyEvaluation = below(2, 1)
	// OIDPolicyTSASM2 and OIDPolicyTSARSA are the timestamp policies of the two units (TSTInfo.policy).
	OIDPolicyTSASM2 = below(2, 2)
	OIDPolicyTSARSA = below(2, 3)
	// OIDExtKeyUsageLog is the extended key usage of a key that signs the journal's checkpoints.
	OIDExtKeyUsageLog = below(3, 1)
)

// Extensions and purposes of RFC 5280.
var (
	oidKeyUsage             = asn1.ObjectIdentifier{2, 5, 29, 15}
	oidBasicConstraints     = asn1.ObjectIdentifier{2, 5, 29, 19}
	oidCRLNumber            = asn1.ObjectIdentifier{2, 5, 29, 20}
	oidReasonCode           = asn1.ObjectIdentifier{2, 5, 29, 21}
	oidInvalidityDate       = asn1.ObjectIdentifier{2, 5, 29, 24}
	oidDeltaCRLIndicator    = asn1.ObjectIdentifier{2, 5, 29, 27}
	oidIssuingDistribution  = asn1.ObjectIdentifier{2, 5, 29, 28}
	oidNameConstraints      = asn1.ObjectIdentifier{2, 5, 29, 30}
	oidDistributionPoints   = asn1.ObjectIdentifier{2, 5, 29, 31}
	oidAuthorityKeyID       = asn1.ObjectIdentifier{2, 5, 29, 35}
	oidPolicyConstraints    = asn1.ObjectIdentifier{2, 5, 29, 36}
	oidExtKeyUsage          = asn1.ObjectIdentifier{2, 5, 29, 37}
	oidExpiredCertsOnCRL    = asn1.ObjectIdentifier{2, 5, 29, 60}
	oidExtKeyUsageAny       = asn1.ObjectIdentifier{2, 5, 29, 37, 0}
	oidExtKeyUsageServer    = asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 1}
	oidExtKeyUsageClient    = asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 2}
	oidExtKeyUsageTimestamp = asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 8}
	oidExtKeyUsageOCSP      = asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 9}
)

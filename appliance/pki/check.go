// Package pki reads certificates and revocation lists and judges them at an explicit time.
//
// It parses strictly, binds a key to one purpose, builds a path to a given anchor and reads CRLs, and it says of each
// check whether it passed, failed or was not made. It knows no trust store but the anchors it is given, fetches
// nothing, and never asks what time it is. It follows RFC 5280 (§4, §5, §6) and RFC 3161 (§2.3, §4) with GM/T 0009-2012
// (SM2 with the default identity) and GM/T 0015-2012 profiles; what it leaves out is said at [VerifyPath] and [CRL].
// Issuing is package pki/ca's. Values of this package are safe for concurrent use once built.
package pki

// A Status is the outcome of one check.
type Status string

const (
	// Passed: the check was made and holds.
	Passed Status = "passed"
	// Failed: the check was made and does not hold.
	Failed Status = "failed"
	// NotChecked: the check could not be made; Detail says why. It is never counted as passed.
	NotChecked Status = "not_checked"
)

// A Check is one line of a verification report.
type Check struct {
	ID     string `json:"id"`     // stable, for programs: "path.signatures"
	Status Status `json:"status"` // "passed", "failed", "not_checked"
	Detail string `json:"detail"` // short reason, Chinese first, for people
}

// A Verdict sums a report up.
type Verdict string

const (
	// Valid: every required check was made and passed, and nothing failed.
	Valid Verdict = "valid"
	// Invalid: at least one check failed.
	Invalid Verdict = "invalid"
	// Indeterminate: nothing failed, but a required check was not made.
	Indeterminate Verdict = "indeterminate"
)

// VerdictOf sums checks up. One that failed makes the whole invalid: a broken signature, a certificate expired or
// revoked at the time in question. Otherwise each ID in required must occur, and every check that bears it must have
// passed; else the verdict is indeterminate. Without any passed check nothing is valid, so an empty report is
// indeterminate. A status this package does not know counts as not checked.
func VerdictOf(checks []Check, required ...string) Verdict {
	passed := make(map[string]bool, len(checks))
	any := false
	for _, c := range checks {
		if c.Status == Failed {
			return Invalid
		}
		ok := c.Status == Passed
		if before, seen := passed[c.ID]; seen {
			ok = ok && before
		}
		passed[c.ID] = ok
		any = any || c.Status == Passed
	}
	if !any {
		return Indeterminate
	}
	for _, id := range required {
		if !passed[id] {
			return Indeterminate
		}
	}
	return Valid
}

// WithPrefix copies checks with prefix put before each ID, so that reports on several paths fit in one list.
func WithPrefix(prefix string, checks []Check) []Check {
	out := make([]Check, len(checks))
	for i, c := range checks {
		c.ID = prefix + c.ID
		out[i] = c
	}
	return out
}

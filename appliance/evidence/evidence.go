// Package evidence is what a signature leaves behind for later: consent, the bundle that proves a record, and the
// judgement of one.
//
// [Verify] needs nothing but the bundle, the trust anchors and the log's public key: no network, no clock, no database.
// It says of each check whether it passed, failed or was not made (GB/T 38629 and the tenders ask for a "rigorous"
// report); without revocation data it never says valid.
package evidence

import (
	"crypto"
	"slices"

	"github.com/emmansun/gmsm/smx509"

	"yinjian/appliance/pki"
)

// KindSign is the journal's kind of a signature's entry.
const KindSign = "sign.v1"

// Trust is what a verifier believes without proof.
type Trust struct {
	Anchors []*smx509.Certificate // of signers and of timestamping units
	// Signers and Units, if set, stand for Anchors where the two are not trusted alike.
	Signers, Units []*smx509.Certificate
	LogKeys        []crypto.PublicKey // keys that sign the journal's checkpoints
	CosignerKeys   []crypto.PublicKey // log keys of other campuses, which cosign them
}

// anchors are those that may vouch for a purpose.
func (t Trust) anchors(p pki.Purpose) []*smx509.Certificate {
	switch {
	case p == pki.StaffSigning && t.Signers != nil:
		return t.Signers
	case p == pki.TimeStamping && t.Units != nil:
		return t.Units
	}
	return t.Anchors
}

// A Report is the outcome of a verification.
type Report struct {
	Verdict pki.Verdict `json:"verdict"`
	// Summary is one sentence, Chinese first.
	Summary string      `json:"summary"`
	Checks  []pki.Check `json:"checks"`
	// Missing are the required checks that were not made, if nothing failed: why the verdict is indeterminate.
	Missing []string `json:"missing,omitempty"`
	// Statements are facts that the evidence asserts and a reader must not miss: how consent was given, who vouches for
	// the time, that certificates are for evaluation only.
	Statements []string `json:"statements"`
	Signer     string   `json:"signer,omitempty"`   // subject of the signer's certificate
	GenTime    string   `json:"gen_time,omitempty"` // of the token, RFC 3339
	Accuracy   string   `json:"accuracy,omitempty"`
}

var summaries = map[pki.Verdict]string{
	pki.Valid:         "有效：所列必需检查均已通过 (valid: every required check passed)",
	pki.Invalid:       "无效：至少一项检查未通过 (invalid: at least one check failed)",
	pki.Indeterminate: "无法判定：有必需的检查未能进行 (indeterminate: a required check could not be made)",
}

// builder collects a report.
type builder struct {
	Report
	required []string
}

// require names checks without which nothing is valid.
func (b *builder) require(ids ...string) { b.required = append(b.required, ids...) }

func (b *builder) add(id string, status pki.Status, detail string) {
	b.Checks = append(b.Checks, pki.Check{ID: id, Status: status, Detail: detail})
}

// hold adds a check that either passes or fails.
func (b *builder) hold(id string, ok bool, passed, failed string) bool {
	if ok {
		b.add(id, pki.Passed, passed)
	} else {
		b.add(id, pki.Failed, failed)
	}
	return ok
}

func (b *builder) state(s string) { b.Statements = append(b.Statements, s) }

func (b *builder) report() *Report {
	b.Verdict = pki.VerdictOf(b.Checks, b.required...)
	b.Summary = summaries[b.Verdict]
	for _, id := range b.required {
		open := func(c pki.Check) bool { return c.ID == id && c.Status != pki.Passed }
		held := slices.ContainsFunc(b.Checks, func(c pki.Check) bool { return c.ID == id }) && !slices.ContainsFunc(b.Checks, open)
		if b.Verdict == pki.Indeterminate && !held && !slices.Contains(b.Missing, id) {
			b.Missing = append(b.Missing, id)
		}
	}
	if b.Statements == nil {
		b.Statements = []string{}
	}
	return &b.Report
}

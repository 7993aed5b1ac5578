package appliance

import (
	"context"
	"crypto/rsa"
	"errors"
	"sort"
	"time"

	"github.com/emmansun/gmsm/smx509"

	"yinjian/appliance/audit"
	"yinjian/appliance/pki"
	"yinjian/tsa"
	"yinjian/tsa/stf"
)

// tokens is what the API's GM/T 0033 routes ask of the appliance.
type tokens struct{ a *Appliance }

// Unit answers the first unit whose key signs so.
func (k tokens) Unit(alg stf.SignatureAlgorithm) string {
	for _, name := range stamps(k).Units() {
		own, chain := stf.SM3SM2, k.a.units[name].Chain()
		if len(chain) == 0 {
			continue
		}
		if _, ok := chain[0].PublicKey.(*rsa.PublicKey); ok {
			own = stf.SHA256RSA
		}
		if own == alg {
			return name
		}
	}
	return ""
}

const (
	knownEntries = 5000        // that a search looks at, not before genTime; seconds of the busiest hour
	knownAfter   = time.Minute // after genTime, by which a token's entry is written or its requester was refused
)

var errFound = errors.New("found")

// Known looks for the token's entry, of its own or of the signature that it stamps. Entries stand in the order of their
// time, so it begins at the first that may be the token's and gives up soon: no index is kept for a question that is asked so
// seldom. GenTime is another clock's, a worker's or a device's, which may be ahead of the journal's by what both may be wrong. A token of before a restored journal's clock went back may not be found.
func (k tokens) Known(ctx context.Context, token *tsa.Token) (*stf.Known, error) {
	first := token.GenTime.Add(-token.Accuracy - time.Duration(k.a.cfg.Time.Accuracy))
	if d := k.a.cfg.TSA.Upstream; d != nil {
		first = first.Add(-time.Duration(d.Allowance))
	}
	var failed error
	from := sort.Search(int(k.a.journal.Size()), func(i int) bool {
		r, err := k.a.journal.Entry(ctx, uint64(i))
		if err != nil {
			failed = err
			return true
		}
		return !r.Entry.Time.UTC().Before(first)
	})
	if failed != nil {
		return nil, failed
	}
	var known *stf.Known
	der, _ := token.Bare()
	sum, bare, seen := audit.Sum(token.DER), audit.Sum(der), 0
	err := k.a.journal.Range(ctx, uint64(from), func(r audit.Record) error {
		e := &r.Entry
		if p, ok := e.Payload("token"); ok && (p.SM3 == sum || e.Kind == kindToken && p.SM3 == bare) {
			known = &stf.Known{TimeSource: e.Text("time.provenance")}
			if e.Kind == kindToken {
				known.Transport = "HTTP"
			}
			return errFound
		}
		if !e.Time.UTC().Before(token.GenTime) {
			seen++
		}
		if seen >= knownEntries || e.Time.UTC().After(token.GenTime.Add(knownAfter)) {
			return errFound
		}
		return ctx.Err()
	})
	if err != nil && !errors.Is(err, errFound) {
		return nil, err
	}
	return known, nil
}

// Judge holds the path against the anchors for timestamps and the newest lists.
func (k tokens) Judge(leaf *smx509.Certificate, others []*smx509.Certificate, at time.Time) *pki.PathReport {
	o := pki.Options{
		Leaf: leaf, Intermediates: others, Anchors: k.a.directory.AnchorsFor(pki.TimeStamping), At: at, Purpose: pki.TimeStamping,
		CRLs: k.a.directory.CRLs(),
	}
	if r := k.a.clock.Now(); r.Trusted() && r.Time.After(at) {
		o.RevocationAt = r.Time
	}
	return pki.VerifyPath(o)
}

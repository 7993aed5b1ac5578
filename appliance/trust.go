package appliance

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/emmansun/gmsm/smx509"
	"github.com/sirupsen/logrus"

	"yinjian/api"
	"yinjian/api/fetch"
	"yinjian/appliance/account"
	"yinjian/appliance/problem"
)

// listSources fetches the lists of other CAs, each address at its interval, and keeps what came of it for people.
type listSources struct {
	a  *Appliance
	mu sync.Mutex
	// last is guarded by mu, by URL.
	last map[string]fetched
}

// A fetched is the outcome of one fetch, as an administrator sees it.
type fetched struct {
	URL   string `json:"url"`
	At    string `json:"at,omitempty"` // RFC 3339
	New   bool   `json:"new"`          // a list that was not there before
	Error string `json:"error,omitempty"`
	next  time.Duration
}

// run fetches until ctx ends. Without trusted time no list can be judged; it waits. An address that fails is tried again
// each minute, or at its interval if that is shorter.
func (l *listSources) run(ctx context.Context) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
		if !l.a.clock.Now().Trusted() {
			continue
		}
		for _, source := range l.a.cfg.Trust.CRL {
			l.mu.Lock()
			due := l.a.sys.Boot() >= l.last[source.URL].next
			l.mu.Unlock()
			if due {
				l.get(ctx, "appliance", source)
			}
		}
	}
}

// get fetches one list and offers it to the directory.
func (l *listSources) get(ctx context.Context, actor string, source CRLSource) fetched {
	log := l.a.log.WithField("source", source.URL)
	f := fetched{URL: source.URL}
	der, err := fetch.Get(ctx, source.URL, account.MaxForeignCRL, func() time.Time { return l.a.clock.Now().Time })
	if err == nil {
		_, f.New, err = l.a.directory.ImportCRL(ctx, actor, der, source.URL)
	}
	wait := time.Duration(source.Interval)
	var p *problem.Problem
	switch {
	case err == nil && f.New:
		log.Info("a new CRL was taken")
	case errors.As(err, &p) && p.Code == problem.CRLOlder: // a mirror behind the others
		f.Error = p.Detail
		log.WithError(err).Warning("a CRL is older than the one at hand")
	case err != nil:
		f.Error, wait = err.Error(), min(wait, time.Minute)
		if p != nil {
			f.Error = p.Detail
		}
		log.WithError(err).Error("a CRL could not be fetched; signing stops when the present one ends")
	}
	if now := l.a.clock.Now(); !now.Time.IsZero() {
		f.At = now.Time.UTC().Format(time.RFC3339)
	}
	f.next = l.a.sys.Boot() + wait
	l.mu.Lock()
	l.last[source.URL] = f
	l.mu.Unlock()
	return f
}

// status lists what came of the last fetches, in the configuration's order.
func (l *listSources) status() []fetched {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := []fetched{}
	for _, source := range l.a.cfg.Trust.CRL {
		f := l.last[source.URL]
		f.URL = source.URL
		out = append(out, f)
	}
	return out
}

// Warnings come this long before a certificate ends.
var expiryDays = []int{90, 30, 7, 1}

// expiryOf is the narrowest of expiryDays that a certificate with so many days left is within; 0 for none. One that has
// ended is within the last.
func expiryOf(daysLeft int) int {
	within := 0
	for _, d := range expiryDays {
		if daysLeft < d {
			within = d
		}
	}
	return within
}

// ofADrill is the owner of a certificate that a drill had made for its own time, and that ends with it as it should.
var ofADrill = regexp.MustCompile(`^signer:` + account.DrillPrefix + `[0-9a-f]{8}$`)

// expiring lists the certificates in use that end soon and have no successor, worst first. One for evaluation is no
// successor of a real one, and one that cannot be used, its list being too old perhaps, of none that can.
func expiring(lines []account.CertificateLine) []account.CertificateLine {
	rank := func(l account.CertificateLine) int {
		switch {
		case l.Evaluation:
			return 0
		case l.State == account.StateUnusable:
			return 1
		}
		return 2
	}
	latest := map[string]account.CertificateLine{} // by owner and algorithm, the one that lasts longest
	for _, l := range lines {
		if l.NotAfter == nil || l.State == account.StateRevoked || ofADrill.MatchString(l.Owner) {
			continue
		}
		key := l.Owner + "/" + l.Algorithm
		if had, ok := latest[key]; !ok || rank(l) > rank(had) || rank(l) == rank(had) && l.NotAfter.After(*had.NotAfter) {
			latest[key] = l
		}
	}
	var out []account.CertificateLine
	for _, l := range latest {
		if expiryOf(l.DaysLeft) > 0 {
			out = append(out, l)
		}
	}
	slices.SortFunc(out, func(x, y account.CertificateLine) int {
		if c := x.NotAfter.Compare(*y.NotAfter); c != 0 {
			return c
		}
		return strings.Compare(x.Owner+x.Algorithm, y.Owner+y.Algorithm)
	})
	return out
}

// expiryWarnings are lines for people: each of the appliance's own certificates, and how many signers' end within which
// time.
func expiryWarnings(soon []account.CertificateLine) (out []string) {
	staff := map[int][]account.CertificateLine{}
	for _, l := range soon {
		if l.Use == account.UseStaff {
			within := expiryOf(l.DaysLeft)
			if l.DaysLeft < 0 {
				within = 0
			}
			staff[within] = append(staff[within], l)
			continue
		}
		out = append(out, fmt.Sprintf("证书 %s（%s）%s：请换发 (certificate %s: renew it)", l.Owner, l.Algorithm, ends(l), l.Owner))
	}
	for _, d := range []int{0, 1, 7, 30, 90} {
		if ls := staff[d]; len(ls) > 0 {
			words := fmt.Sprintf("%d 天内到期 (end within %d days)", d, d)
			if d == 0 {
				words = "已到期 (have ended)"
			}
			out = append(out, fmt.Sprintf("签名人证书 %d 张%s，最早 %s %s", len(ls), words, ls[0].Owner, ends(ls[0])))
		}
	}
	return out
}

func ends(l account.CertificateLine) string {
	if l.DaysLeft < 0 {
		return "已于 " + l.NotAfter.Format(time.DateOnly) + " 到期 (has ended)"
	}
	return fmt.Sprintf("还有 %d 天到期，%s (%d days left)", l.DaysLeft, l.NotAfter.Format(time.DateOnly), l.DaysLeft)
}

// listWarnings tells of other CAs' lists that have ended, or are in the last tenth of their life without a successor.
func listWarnings(lists []account.CRLLine, now time.Time) (out []string) {
	for _, l := range lists {
		left := l.NextUpdate.Sub(now)
		switch {
		case l.Own: // made here in time, or logged
		case left < 0:
			out = append(out, fmt.Sprintf("吊销列表已过期，%s：请更新 (the CRL has ended: import or fetch a new one)", l.Issuer))
		case left*10 < l.NextUpdate.Sub(l.ThisUpdate):
			out = append(out, fmt.Sprintf("吊销列表将于 %s 到期，%s (the CRL ends soon)", l.NextUpdate.Format(time.RFC3339), l.Issuer))
		}
	}
	return out
}

// watchExpiry logs a certificate once for each of expiryDays that it comes within, and keeps the list for the state.
func (a *Appliance) watchExpiry(ctx context.Context) error {
	tick := time.NewTicker(time.Minute)
	defer tick.Stop()
	told := map[string]int{} // by label and serial: the narrowest that was logged
	for {
		if a.clock.Now().Trusted() {
			soon := expiring(a.directory.Certificates())
			a.soon.Store(&soon)
			fresh := 0
			for _, l := range soon {
				within := expiryOf(l.DaysLeft)
				if had, ok := told[l.Label+l.Serial]; ok && had <= within {
					continue
				}
				told[l.Label+l.Serial] = within
				// A hospital's certificates were all issued in one week, and end in one.
				if fresh++; fresh <= 20 || l.Use != account.UseStaff {
					a.log.WithFields(logrus.Fields{"object": l.Owner, "serial": l.Serial, "days_left": l.DaysLeft}).Warning("a certificate ends soon")
				}
			}
			if fresh > 20 {
				a.log.WithField("count", fresh).Warning("certificates end soon, not all of them named here: see yinjian cert list")
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

func (d admin) AddAnchor(ctx context.Context, actor string, req api.AddAnchor) (any, error) {
	return d.published(d.a.directory.AddAnchor(ctx, actor, req.Certificate, req.Uses, req.Note))
}

func (d admin) WithdrawAnchor(ctx context.Context, actor string, req api.Decision) (any, error) {
	return d.published(d.a.directory.WithdrawAnchor(ctx, actor, req.ID, req.Reason))
}

// published answers an anchor after the public files follow the change.
func (d admin) published(anchor *account.Anchor, err error) (any, error) {
	if err != nil {
		return nil, err
	}
	if err := d.a.exportPublic(); err != nil {
		d.a.log.WithError(err).Error("the public files could not be written")
	}
	return anchorView(anchor), nil
}

func anchorView(a *account.Anchor) map[string]any {
	return map[string]any{
		"id": a.ID, "subject": a.Subject(), "not_after": a.NotAfter().UTC(), "uses": a.Uses, "note": a.Note, "evaluation": a.Evaluation,
		"withdrawn": a.Withdrawn, "reason": a.Reason, "changed_by": a.ChangedBy, "changed_at": a.ChangedAt,
	}
}

func (d admin) ListAnchors(context.Context, string) (any, error) {
	out := []map[string]any{}
	for _, a := range d.a.directory.Anchors() {
		out = append(out, anchorView(a))
	}
	return out, nil
}

func (d admin) AddIntermediates(ctx context.Context, actor string, req api.AddIntermediates) (any, error) {
	n, err := d.a.directory.AddIntermediates(ctx, actor, req.File)
	return map[string]any{"new": n}, err
}

func (d admin) RequestCertificate(ctx context.Context, actor string, req api.RequestCertificate) (any, error) {
	r, err := d.a.directory.RequestCertificate(ctx, actor, account.RequestSpec{
		For: req.For, NewKey: req.NewKey, Replace: req.Replace, Subject: req.Subject, Hosts: req.Hosts,
	})
	if err != nil {
		return nil, err
	}
	shown := *r
	shown.Wrapped = nil // nobody needs to see it
	return &shown, nil
}

func (d admin) ImportCertificates(ctx context.Context, actor string, req api.ImportCertificates) (any, error) {
	done, err := d.a.directory.ImportCertificates(ctx, actor, account.Import{
		File: req.File, Chain: req.Chain, Owner: req.Owner, AcceptSubject: req.AcceptSubject,
	})
	if err != nil {
		return nil, err
	}
	if slices.ContainsFunc(done, func(i account.Imported) bool { return i.Use == account.UseTSA || i.Use == account.UseTLS }) {
		if err := d.a.rollOver(ctx); err != nil { // it is imported; the duty tries again
			d.a.log.WithError(err).Error("a new certificate could not be taken into use")
		}
	}
	return done, nil
}

func (d admin) ListCertificates(context.Context, string) (any, error) {
	return d.a.directory.Certificates(), nil
}

func (d admin) ImportCRL(ctx context.Context, actor string, req api.ImportCRL) (any, error) {
	line, fresh, err := d.a.directory.ImportCRL(ctx, actor, req.File, req.Source)
	if err != nil {
		return nil, err
	}
	return map[string]any{"new": fresh, "list": line}, nil
}

func (d admin) FetchCRLs(ctx context.Context, actor string, _ api.FetchCRLs) (any, error) {
	if len(d.a.cfg.Trust.CRL) == 0 {
		return nil, problem.New(problem.NotFound, "没有配置吊销列表地址 (no CRL address is configured)", "在 config.toml 写 [[trust.crl]] url = …，或用 cert crl import (configure one, or import a file)")
	}
	out := []fetched{}
	for _, source := range d.a.cfg.Trust.CRL {
		out = append(out, d.a.lists.get(ctx, actor, source))
	}
	return out, nil
}

func (d admin) ListCRLs(context.Context, string) (any, error) {
	return map[string]any{"lists": d.a.directory.ListCRLs(), "sources": d.a.lists.status(), "revocation": d.a.cfg.Trust.Revocation}, nil
}

// publicAnchors are the imported CAs that vouch for signers or timestamp units: with them anybody can verify.
func (a *Appliance) publicAnchors() (out []*smx509.Certificate) {
	for _, x := range a.directory.Anchors() {
		if x.Evaluation || x.Withdrawn || !slices.Contains(x.Uses, account.UseStaff) && !slices.Contains(x.Uses, account.UseTSA) {
			continue
		}
		out = append(out, x.Parsed())
	}
	return out
}

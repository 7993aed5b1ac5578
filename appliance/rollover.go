package appliance

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/emmansun/gmsm/smx509"

	"yinjian/api"
	"yinjian/appliance/account"
	"yinjian/appliance/pki"
	"yinjian/hsm"
	"yinjian/tsa"
	"yinjian/tsa/stamping"
)

// A unit is one timestamp unit over the lives of its keys and certificates: the directory says which certificate is to be
// used, and a new one takes over without a restart. Each token is made wholly under one of them, by a timestamp worker. It
// is a sign.Stamper. Safe for concurrent use.
type unit struct {
	a       *Appliance
	name    string
	terms   stamping.Terms
	mu      sync.Mutex                    // one refresh at a time
	current atomic.Pointer[stamping.Unit] // nil before its first certificate
}

// refresh takes over another certificate when the directory says so. When it names none, the unit stays what it is: its
// tokens are refused by their own checks.
func (u *unit) refresh(ctx context.Context) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	now := u.current.Load()
	label, _, path, err := u.a.directory.Current("tsa:" + u.name)
	if err != nil && now != nil {
		return nil
	}
	if err != nil { // at a start, when every certificate has ended
		label = (&Unit{Name: u.name}).label()
		if path, err = u.a.identity.chain(u.name); err != nil {
			return err
		}
		if path == nil {
			return nil // it waits for its first
		}
	}
	if now != nil && slices.EqualFunc(now.Chain(), path, (*smx509.Certificate).Equal) {
		return nil
	}
	if _, err := hsm.NewKey(ctx, u.a.tokens[hsm.TSA], label, false); err != nil { // that it is lost is said now, not at the first token
		return err
	}
	next, err := stamping.NewUnit(stamping.UnitConfig{
		Name: u.name, Terms: u.terms, Label: label, Chain: path, Workers: u.a.machines.pools[hsm.TSA], Watch: u.a.watch, Serials: u.a.serials,
		Verify: *u.a.cfg.HSM.VerifyFresh, Discarded: u.a.accounting.discard, Log: u.a.log,
	})
	if err != nil {
		return err
	}
	u.current.Store(next)
	return nil
}

// errUncertified means that a unit has never had a certificate.
var errUncertified = errors.New("appliance: the timestamp unit waits for its certificate")

// Issue satisfies sign.Stamper.
func (u *unit) Issue(ctx context.Context, req *tsa.Request) (*tsa.Token, error) {
	now := u.current.Load()
	if now == nil {
		return nil, fmt.Errorf("unit %s: %w", u.name, errUncertified)
	}
	return now.Issue(ctx, req)
}

// Ready satisfies sign.Foreteller.
func (u *unit) Ready() error {
	now := u.current.Load()
	if now == nil {
		return fmt.Errorf("unit %s: %w", u.name, errUncertified)
	}
	return now.Ready()
}

// Respond answers a DER request (RFC 3161). A unit whose certificate is revoked, or of unknown status under the policy
// "hard", stamps for nobody; package sign looks at it for itself.
func (u *unit) Respond(ctx context.Context, der []byte) []byte {
	if r := u.a.clock.Now(); r.Trusted() && u.current.Load() != nil {
		if _, err := u.a.directory.Standing(u.Chain(), pki.TimeStamping, r.Time); err != nil {
			u.a.log.WithError(err).WithField("unit", u.name).Error("timestamp refused: the unit's certificate")
			return tsa.Reject(tsa.SystemFailure, "the authority cannot serve the request now")
		}
	}
	r := tsa.Responder{Issuer: u, Recorder: gatedRecorder{u.a.service, TokenRecorder{u.a.journal, u.name}}, Discarded: u.a.accounting.discard, Log: u.a.log.WithField("unit", u.name)}
	return r.Respond(ctx, der)
}

// Chain is the present certificate and those above it; none before the first.
func (u *unit) Chain() []*smx509.Certificate {
	now := u.current.Load()
	if now == nil {
		return nil
	}
	return now.Chain()
}

// refreshListener has new handshakes answered with the certificate that the directory names.
func (a *Appliance) refreshListener(ctx context.Context) error {
	label, signer, path, err := a.directory.Current(account.UseTLS)
	if err != nil {
		return nil // what is used goes on; clients see for themselves that it has ended
	}
	var chain [][]byte
	for _, c := range path {
		chain = append(chain, c.Raw)
	}
	if had := a.listener.certificate.Load(); had != nil && slices.EqualFunc(had.Certificate, chain, bytes.Equal) {
		return nil
	}
	if signer != nil || label == tlsLabel {
		return a.listener.use(chain)
	}
	key, err := hsm.NewKey(ctx, a.tokens[hsm.TLS], label, *a.cfg.HSM.VerifyFresh)
	if err != nil {
		return err
	}
	return a.listener.use(chain, newHandshakeKey(key, time.Duration(a.cfg.HSM.CallDeadline), api.MaxHandshakes))
}

// rollOver makes units and listener follow the directory, and the public files after them.
func (a *Appliance) rollOver(ctx context.Context) error {
	errs := []error{a.refreshListener(ctx)}
	for _, u := range a.units {
		errs = append(errs, u.refresh(ctx))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if err := a.exportPublic(); err != nil {
		return fmt.Errorf("public files: %w", err)
	}
	return nil
}

// keepRolling looks each second whether a certificate has begun or ended.
func (a *Appliance) keepRolling(ctx context.Context) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	owners := []string{account.UseTLS}
	for name := range a.units {
		owners = append(owners, "tsa:"+name)
	}
	current := func() (out string) {
		for _, owner := range owners {
			if _, _, path, err := a.directory.Current(owner); err == nil {
				for _, c := range path {
					out += string(c.Raw)
				}
			}
			out += "\x00"
		}
		return out
	}
	used := current()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
		now := current()
		if now == used {
			continue
		}
		if err := a.rollOver(ctx); err != nil {
			if ctx.Err() == nil {
				a.log.WithError(err).Error("a new certificate could not be taken into use")
			}
			continue
		}
		used = now
		a.log.Info("certificates of units or listener were changed over")
	}
}

// publicCertificates are the files of the units' certificates, the present one first, and of the CAs above them and above
// the listener's.
func (a *Appliance) publicCertificates() map[string][]*smx509.Certificate {
	files := map[string][]*smx509.Certificate{}
	add := func(name string, c *smx509.Certificate) {
		for _, had := range files[name] {
			if had.Equal(c) {
				return
			}
		}
		files[name] = append(files[name], c)
	}
	for _, name := range a.unitNames() {
		for _, path := range a.directory.Paths("tsa:" + name) {
			add("tsa-"+name+".pem", path[0])
			add("tsa-ca-"+name+".pem", path[len(path)-1])
		}
	}
	for _, path := range a.directory.Paths(account.UseTLS) {
		add("tls-ca.pem", path[len(path)-1])
	}
	return files
}

// trustAnchorsFile holds the imported CAs; it is there when there are any.
func (a *Appliance) trustAnchorsFile() string { return filepath.Join(a.dir, "trust-anchors.pem") }

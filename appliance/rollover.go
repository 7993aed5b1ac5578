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
)

// A unit is one timestamp unit over the lives of its keys and certificates: the directory says which certificate is to be
// used, and a new one takes over without a restart. Each token is made wholly under one of them. It is a sign.Stamper. Safe
// for concurrent use.
type unit struct {
	a       *Appliance
	name    string
	mu      sync.Mutex // one refresh at a time
	current atomic.Pointer[tsa.Authority]
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
		label = tsaLabels[u.name]
		if path, err = u.a.identity.chain(u.name); err != nil {
			return err
		}
	}
	if now != nil && slices.EqualFunc(now.Chain(), path, (*smx509.Certificate).Equal) {
		return nil
	}
	key, err := hsm.NewKey(ctx, u.a.tokens[hsm.TSA], label, *u.a.cfg.HSM.VerifyFresh)
	if err != nil {
		return err
	}
	next, err := tsa.New(tsa.Config{
		Name: u.name, Policy: unitPolicies[u.name], Accuracy: time.Duration(u.a.cfg.Time.Accuracy), Signer: key, Chain: path,
		Clock: u.a.clock, Serials: u.a.serials, Recorder: TokenRecorder{u.a.journal, u.name}, Discarded: u.a.accounting.discard, Log: u.a.log,
	})
	if err != nil {
		return err
	}
	u.current.Store(next)
	return nil
}

// Issue satisfies sign.Stamper.
func (u *unit) Issue(ctx context.Context, req *tsa.Request) (*tsa.Token, error) {
	return u.current.Load().Issue(ctx, req)
}

// Respond answers a DER request (RFC 3161). A unit whose certificate is revoked, or of unknown status under the policy
// "hard", stamps for nobody; package sign looks at it for itself.
func (u *unit) Respond(ctx context.Context, der []byte) []byte {
	now := u.current.Load()
	if r := u.a.clock.Now(); r.Trusted() {
		if _, err := u.a.directory.Standing(now.Chain(), pki.TimeStamping, r.Time); err != nil {
			u.a.log.WithError(err).WithField("unit", u.name).Error("timestamp refused: the unit's certificate")
			return tsa.Reject(tsa.SystemFailure, "the authority cannot serve the request now")
		}
	}
	return now.Respond(ctx, der)
}

// Chain is the present certificate and those above it.
func (u *unit) Chain() []*smx509.Certificate { return u.current.Load().Chain() }

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
	current := func() (out [3]string) {
		for i, owner := range []string{"tsa:sm2", "tsa:rsa", account.UseTLS} {
			if _, _, path, err := a.directory.Current(owner); err == nil {
				for _, c := range path {
					out[i] += string(c.Raw)
				}
			}
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
	for _, name := range []string{"sm2", "rsa"} {
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

// Package upstream has tokens made by a timestamp device that the hospital has already, by RFC 3161 or in the outer form of
// GM/T 0010, and believes none before it has looked at all of it: that the answer is for this request (imprint, nonce,
// policy), the signature, the certificate's purpose, its path to an admitted anchor and its revocation, and that genTime is
// where the appliance's own clock says it has to be. Each refusal has a [Reason].
//
// A device that fails is left alone for a while, so that not every signature waits for it, and is asked again by
// [Device.Run], not at a signature's expense. Transport is left to package api, the choice between device and own units to
// package appliance.
package upstream

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/asn1"
	"errors"
	"fmt"
	"maps"
	"math/big"
	"slices"
	"sync"
	"time"

	"github.com/emmansun/gmsm/smx509"
	"github.com/sirupsen/logrus"

	"yinjian/appliance/cms"
	"yinjian/appliance/pki"
	"yinjian/ntp"
	"yinjian/tsa"
)

// A Reason is why a device's token was not used.
type Reason string

// Reasons. Those before Down are the device's fault, or of what lies between.
const (
	Unreachable Reason = "unreachable" // no connection, or it ended
	TimedOut    Reason = "timeout"
	BadStatus   Reason = "http-status" // anything but 200
	TooLong     Reason = "too-long"
	Malformed   Reason = "malformed" // not the DER of a TimeStampResp, or one without the token that its status promises
	Rejected    Reason = "rejected"  // it says that it cannot stamp now
	Imprint     Reason = "imprint"
	Nonce       Reason = "nonce"
	Policy      Reason = "policy"
	Signature   Reason = "signature"
	Certificate Reason = "certificate" // the signer's is neither in the token nor configured
	Purpose     Reason = "purpose"
	Untrusted   Reason = "untrusted" // no path to an anchor admitted for timestamps
	Expired     Reason = "expired"   // a certificate of the path at genTime
	Revocation  Reason = "revocation"
	Time        Reason = "time"     // genTime is not where our clock says
	Accuracy    Reason = "accuracy" // none and none assumed, or vaguer than allowed

	Down      Reason = "down"      // left alone after failures
	Busy      Reason = "busy"      // too many are asking it at once
	OwnTime   Reason = "own-time"  // our clock is not trusted, so genTime cannot be judged
	Request   Reason = "request"   // the device refuses what was asked
	Cancelled Reason = "cancelled" // whoever asked waits no more
)

// An Error is a refusal to use the device.
type Error struct {
	Device string
	Reason Reason
	Err    error
}

func (e *Error) Error() string {
	s := fmt.Sprintf("upstream: %s: %s", e.Device, e.Reason)
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	return s
}

// Unwrap is the cause.
func (e *Error) Unwrap() error { return e.Err }

// blamed says whether the device is to be left alone after some of these.
func (r Reason) blamed() bool {
	return r != Down && r != Busy && r != OwnTime && r != Request && r != Cancelled
}

// clients says whether a client's own request may be the cause, as far as the answer shows: devices differ in what they make of
// long nonces, of policies that they do not have, of algorithms.
func (r Reason) clients() bool {
	return slices.Contains([]Reason{BadStatus, Malformed, Rejected, Imprint, Nonce, Policy}, r)
}

// Config describes one device. All fields but those said to be optional are required.
type Config struct {
	Name string
	// Ask sends a DER TimeStampReq and answers what came back, bounded in size; ctx bounds the time. An *Error from it keeps
	// its reason, anything else is Unreachable.
	Ask     func(ctx context.Context, query []byte) ([]byte, error)
	Clock   tsa.Clock
	Timeout time.Duration // of one exchange
	// Failures in a row after which the device is left alone until a probe succeeds.
	Failures int
	Probe    time.Duration // how often an idle or failed device is asked by [Device.Run]
	// Policies that tokens may have; empty: any.
	Policies []asn1.ObjectIdentifier
	// Assumed is the accuracy of tokens that do not say theirs; 0: they are refused.
	Assumed time.Duration
	// MaxAccuracy is the vaguest token taken.
	MaxAccuracy time.Duration
	// Allowance is added to both accuracies when genTime is compared: devices that cut genTime to seconds need one.
	Allowance time.Duration
	// Certificates, optional, are the device's, for tokens without, and those between them and an anchor.
	// What tokens with certificates brought is remembered beside them.
	Certificates []*smx509.Certificate
	// Anchors answers the CAs that are admitted for timestamps now.
	Anchors func() []*smx509.Certificate
	// Standing refuses a path, leaf first and an anchor last, of which a certificate is revoked or not known not to be.
	Standing func(path []*smx509.Certificate, at time.Time) error
	// OnChange, optional, hears when the device goes down, and why, and when it is up again (nil), in that order. It must
	// neither block nor ask the device anything.
	OnChange func(why error)
	Log      logrus.FieldLogger
}

// A Device is a timestamp device elsewhere. Safe for concurrent use.
type Device struct {
	cfg Config

	mu       sync.Mutex              // guards what follows
	paths    [][]*smx509.Certificate // of the certificates that good tokens had, the latest first
	failures int                     // in a row
	down     error                   // why it is left alone
	asked    bool                    // since Run looked last
	stamped  uint64
	refused  map[Reason]uint64
}

// New makes a device. Nothing is asked yet.
func New(c Config) (*Device, error) {
	if c.Name == "" || c.Ask == nil || c.Clock == nil || c.Anchors == nil || c.Standing == nil || c.Log == nil || c.Timeout <= 0 ||
		c.Failures < 1 || c.Probe <= 0 || c.MaxAccuracy <= 0 || c.Assumed < 0 || c.Assumed > c.MaxAccuracy || c.Allowance < 0 {
		return nil, errors.New("upstream: a field of the configuration is missing or out of range")
	}
	return &Device{cfg: c, refused: map[Reason]uint64{}}, nil
}

// Name is the configured name.
func (d *Device) Name() string { return d.cfg.Name }

// Issue has a token made for req, with a nonce of our own when req has none. It is wholly verified; its Provenance says by
// whom, with the accuracy as bound, and its Origin has the certificates. Errors are [*Error].
func (d *Device) Issue(ctx context.Context, req *tsa.Request) (*tsa.Token, error) {
	own := *req
	if own.Nonce == nil {
		var random [8]byte
		rand.Read(random[:]) // never fails (crypto/rand)
		own.Nonce = new(big.Int).SetBytes(random[:])
	}
	query, err := own.Bytes()
	if err != nil {
		return nil, d.refuse(Request, err)
	}
	_, token, err := d.ask(ctx, query, &own, true, ours)
	return token, err
}

// Relay passes a client's DER request on as it is, and answers the device's TimeStampResp as it is, verified like one of
// Issue. ownTime says whether genTime must be held against our clock; without it a token is also had while our clock is not
// trusted, and its Provenance says so. A query that is no request is a *tsa.RequestError, all else an [*Error].
func (d *Device) Relay(ctx context.Context, query []byte, ownTime bool) ([]byte, *tsa.Token, error) {
	req, err := tsa.ParseRequest(query)
	if err != nil {
		return nil, nil, err
	}
	return d.ask(ctx, query, req, ownTime, relayed)
}

// Whose a request is.
const (
	ours = iota
	relayed
	probing
)

func (d *Device) refuse(r Reason, err error) error { return &Error{d.cfg.Name, r, err} }

// ask is one exchange, and what it means for the device's standing. A client cannot have the device called down by what he
// asks: after an answer that may be his own doing it is asked by [Device.Run] soon.
func (d *Device) ask(ctx context.Context, query []byte, req *tsa.Request, ownTime bool, whose int) ([]byte, *tsa.Token, error) {
	probe := whose == probing
	d.mu.Lock()
	down := d.down
	d.asked = d.asked || !probe
	d.mu.Unlock()
	if down != nil && !probe {
		return nil, nil, d.refuse(Down, down)
	}
	response, token, err := d.exchange(ctx, query, req, ownTime)
	if !probe || err != nil {
		d.count(err)
	}
	var e *Error
	if whose == relayed && errors.As(err, &e) && e.Reason.clients() {
		d.mu.Lock()
		d.asked = false
		d.mu.Unlock()
		return nil, nil, err
	}
	d.note(err)
	return response, token, err
}

// count is for the figures.
func (d *Device) count(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	var e *Error
	if errors.As(err, &e) {
		d.refused[e.Reason]++
	} else {
		d.stamped++
	}
}

// note opens the breaker after failures in a row, and closes it after a success.
func (d *Device) note(err error) {
	var e *Error
	if errors.As(err, &e) && !e.Reason.blamed() {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	was := d.down
	if err == nil {
		d.failures, d.down = 0, nil
	} else if d.failures++; d.failures >= d.cfg.Failures {
		d.down = err
	}
	if (was == nil) != (d.down == nil) && d.cfg.OnChange != nil {
		d.cfg.OnChange(d.down) // under the lock, or the last that is heard could be an earlier one
	}
}

// exchange asks and verifies.
func (d *Device) exchange(ctx context.Context, query []byte, req *tsa.Request, ownTime bool) ([]byte, *tsa.Token, error) {
	before := d.cfg.Clock.Now()
	if ownTime && !before.Trusted() {
		return nil, nil, d.refuse(OwnTime, fmt.Errorf("clock is %s", before.State))
	}
	limited, cancel := context.WithTimeout(ctx, d.cfg.Timeout)
	defer cancel()
	in, err := d.cfg.Ask(limited, query)
	if err != nil {
		var e *Error
		switch {
		case ctx.Err() != nil:
			return nil, nil, d.refuse(Cancelled, ctx.Err())
		case errors.As(err, &e) && e.Reason == Busy:
			return nil, nil, d.refuse(e.Reason, e.Err)
		case limited.Err() != nil:
			return nil, nil, d.refuse(TimedOut, fmt.Errorf("no answer within %v", d.cfg.Timeout))
		case errors.As(err, &e):
			return nil, nil, d.refuse(e.Reason, e.Err)
		}
		return nil, nil, d.refuse(Unreachable, err)
	}
	token, err := d.verify(in, req, before, ownTime)
	if err != nil {
		return nil, nil, err
	}
	return in, token, nil
}

// requester are failures that the request is the cause of, not the device.
var requester = []tsa.Failure{tsa.BadAlg, tsa.BadRequest, tsa.BadDataFormat, tsa.UnacceptedPolicy, tsa.UnacceptedExtension}

// verify judges an answer that came while the clock went from before to now.
func (d *Device) verify(in []byte, req *tsa.Request, before ntp.Reading, ownTime bool) (*tsa.Token, error) {
	after := d.cfg.Clock.Now()
	r, err := tsa.ParseResponse(in)
	if err != nil {
		return nil, d.refuse(Malformed, err)
	}
	token := r.Token
	if token == nil {
		if slices.ContainsFunc(r.Failures, func(f tsa.Failure) bool { return slices.Contains(requester, f) }) {
			return nil, d.refuse(Request, r.Err())
		}
		return nil, d.refuse(Rejected, r.Err())
	}

	// 1. Is it for this request?
	if err := token.Answers(req); err != nil {
		for cause, reason := range map[error]Reason{tsa.ErrImprint: Imprint, tsa.ErrNonce: Nonce, tsa.ErrPolicy: Policy} {
			if errors.Is(err, cause) {
				return nil, d.refuse(reason, err)
			}
		}
		return nil, d.refuse(Malformed, err)
	}
	if len(d.cfg.Policies) > 0 && !slices.ContainsFunc(d.cfg.Policies, token.Policy.Equal) {
		return nil, d.refuse(Policy, fmt.Errorf("policy %v is not among those configured", token.Policy))
	}

	// 2. Signature and purpose.
	report, err := token.Verify(req.Imprint, slices.Concat(append(d.remembered(), d.cfg.Certificates)...)...)
	if err != nil {
		reason := Signature
		var check *cms.CheckError
		if errors.As(err, &check) {
			switch check.ID {
			case cms.CheckSignerCertificate:
				reason = Certificate
			case tsa.CheckPurpose:
				reason = Purpose
			case tsa.CheckGenTime:
				reason = Expired
			}
		}
		return nil, d.refuse(reason, err)
	}

	// 3. How exact, and is that the time?
	accuracy := token.Accuracy
	if accuracy == 0 {
		accuracy = d.cfg.Assumed
	}
	switch {
	case accuracy == 0:
		return nil, d.refuse(Accuracy, errors.New("the token does not say, and none is assumed"))
	case accuracy > d.cfg.MaxAccuracy:
		return nil, d.refuse(Accuracy, fmt.Errorf("%v, at most %v is allowed", accuracy, d.cfg.MaxAccuracy))
	}
	token.Provenance = ntp.Reading{Time: token.GenTime, Bound: accuracy, State: after.State, Provenance: "upstream/" + d.cfg.Name}
	if before.Trusted() && after.Trusted() {
		spread := accuracy + d.cfg.Allowance
		early, late := before.Time.Add(-before.Bound), after.Time.Add(after.Bound)
		if token.GenTime.Before(early.Add(-spread)) || token.GenTime.After(late.Add(spread)) {
			return nil, d.refuse(Time, fmt.Errorf("genTime %v is more than %v outside %v to %v", token.GenTime, spread, early, late))
		}
		token.Provenance.Provenance += "; " + after.Provenance
		// What the allowance alone lets through is worse than the token says, and by our clock it is known by how much.
		if token.GenTime.Add(accuracy).Before(early) || token.GenTime.Add(-accuracy).After(late) {
			token.Provenance.Bound = max(late.Sub(token.GenTime), token.GenTime.Sub(early))
			token.Provenance.Provenance += fmt.Sprintf("; its accuracy of %v contradicts own time", accuracy)
		}
	} else if ownTime {
		return nil, d.refuse(OwnTime, fmt.Errorf("clock is %s", after.State))
	} else {
		token.Provenance.Provenance += "; not held against own time"
	}

	// 4. Who vouches for the certificate?
	path, err := d.standing(report.Signer, token.Certificates(), token.GenTime)
	if err != nil {
		return nil, err
	}
	token.Origin = tsa.Origin{By: "upstream/" + d.cfg.Name, Path: path}
	return token, nil
}

// maxPaths is how many paths are remembered. Several machines may answer at one address, each under a certificate of its own.
const maxPaths = 8

// standing answers the path of a certificate that is good at a time. The last paths are remembered: with one of them a token
// costs no search, and whoever remembers answers about the certificate meets the same one again.
func (d *Device) standing(leaf *smx509.Certificate, others []*smx509.Certificate, at time.Time) ([]*smx509.Certificate, error) {
	paths := d.remembered()
	known := func(path []*smx509.Certificate) bool { return bytes.Equal(path[0].Raw, leaf.Raw) }
	if i := slices.IndexFunc(paths, known); i >= 0 && d.cfg.Standing(paths[i], at) == nil {
		d.remember(paths[i])
		return paths[i], nil
	}
	r := pki.VerifyPath(pki.Options{
		Leaf: leaf, Intermediates: slices.Concat(append(paths, others, d.cfg.Certificates)...), Anchors: d.cfg.Anchors(), At: at, Purpose: pki.TimeStamping,
	})
	for _, c := range r.Checks {
		if c.Status == pki.Passed || c.ID == pki.CheckPathRevocation {
			continue
		}
		reason := Untrusted
		switch c.ID {
		case pki.CheckPathValidity:
			reason = Expired
		case pki.CheckPathPurpose:
			reason = Purpose
		}
		return nil, d.refuse(reason, fmt.Errorf("%s: %s", c.ID, c.Detail))
	}
	if err := d.cfg.Standing(r.Chain, at); err != nil {
		return nil, d.refuse(Revocation, err)
	}
	d.remember(r.Chain)
	return r.Chain, nil
}

// remembered is the caller's to change, but for the paths themselves.
func (d *Device) remembered() [][]*smx509.Certificate {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.paths)
}

// remember makes path the latest, in the place of any other for its certificate.
func (d *Device) remember(path []*smx509.Certificate) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.paths) > 0 && &d.paths[0][0] == &path[0] {
		return
	}
	paths := slices.DeleteFunc(slices.Clone(d.paths), func(p []*smx509.Certificate) bool { return bytes.Equal(p[0].Raw, path[0].Raw) })
	d.paths = slices.Insert(paths[:min(len(paths), maxPaths-1)], 0, path)
}

// Path is the device's certificate, and those above it, as its last good token had them; nil before the first.
func (d *Device) Path() []*smx509.Certificate {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.paths) == 0 {
		return nil
	}
	return d.paths[0]
}

// Down is why the device is left alone, nil while it is not.
func (d *Device) Down() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.down
}

// Stats are figures since the start.
type Stats struct {
	Stamped uint64
	Refused map[Reason]uint64
}

// Stats answers the figures.
func (d *Device) Stats() Stats {
	d.mu.Lock()
	defer d.mu.Unlock()
	return Stats{d.stamped, maps.Clone(d.refused)}
}

// Run asks the device at once, and later whenever it is down or nobody has asked it for a while, until ctx ends. What it
// stamps then is random, and nobody gets it.
func (d *Device) Run(ctx context.Context) error {
	tick := time.NewTicker(d.cfg.Probe)
	defer tick.Stop()
	for {
		d.probe(ctx)
		for waiting := true; waiting; {
			select {
			case <-tick.C:
				d.mu.Lock()
				waiting = d.down == nil && d.asked
				d.asked = false
				d.mu.Unlock()
			case <-ctx.Done():
				return nil
			}
		}
	}
}

// probe tries SM3 first; a device that has never heard of it is asked by SHA-256.
func (d *Device) probe(ctx context.Context) {
	var random [32]byte
	rand.Read(random[:]) // never fails (crypto/rand)
	var err error
	for _, algorithm := range []asn1.ObjectIdentifier{cms.OIDSM3, cms.OIDSHA256} {
		var imprint tsa.Imprint
		var query []byte
		if imprint, err = tsa.NewImprint(algorithm, random[:]); err != nil {
			break
		}
		req := &tsa.Request{Imprint: imprint, Nonce: new(big.Int).SetBytes(random[:8]), CertReq: true}
		if query, err = req.Bytes(); err != nil {
			break
		}
		var e *Error
		if _, _, err = d.ask(ctx, query, req, true, probing); !errors.As(err, &e) || e.Reason != Request {
			break
		}
	}
	var e *Error
	if err != nil && ctx.Err() == nil && !(errors.As(err, &e) && e.Reason == OwnTime) { // which is not the device's affair
		d.cfg.Log.WithError(err).WithField("device", d.cfg.Name).Warning("the upstream timestamp device was not usable")
	}
}

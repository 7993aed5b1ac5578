package stamping

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"sync"
	"time"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/smx509"
	"github.com/sirupsen/logrus"

	"yinjian/hsm"
	"yinjian/ntp"
	"yinjian/tsa"
)

// A Worker reaches a [Service]: Extend sends what request makes and answers what came back. request is asked for another
// when whether the first was performed is not known.
type Worker = interface {
	Extend(ctx context.Context, request func() ([]byte, error)) ([]byte, error)
}

// Workers reach the services of the machines that hold a key. hsm/pool's is one.
type Workers interface {
	// Extend has call done with the worker of one machine that holds the key of label and fits, and once more with another
	// one where that is right.
	Extend(ctx context.Context, label string, fits func(machine string) bool,
		call func(ctx context.Context, machine string, w Worker) ([]byte, error)) ([]byte, error)
}

// UnitConfig describes a unit under one key and chain to the process that serves.
type UnitConfig struct {
	Name  string
	Terms Terms // as the services have them
	Label string
	Chain []*smx509.Certificate // the unit's own first
	// Workers make the tokens, Watch keeps what they say of their clocks.
	Workers Workers
	Watch   *Watch
	Serials tsa.SerialStore
	// Verify says whether each token's signature is verified, and with it all that it is over.
	Verify bool
	// Discarded is given what was made and is not used, and why. It must not block.
	Discarded func(reason error, made ...[]byte)
	Log       logrus.FieldLogger
}

// A Unit has tokens made by its workers. It is a tsa.Issuer. Safe for concurrent use.
type Unit struct {
	cfg    UnitConfig
	chain  [][]byte
	digest [32]byte
	tokens *tsa.Authority // makes of a signature the token again
}

// A stranger stands for a key of which only the public half is at hand: its signatures come with the context.
type stranger struct {
	pub    crypto.PublicKey
	verify bool
}

type signatureKey struct{}

func (s stranger) Public() crypto.PublicKey { return s.pub }

func (s stranger) SignMessage(ctx context.Context, message []byte) ([]byte, error) {
	signature, _ := ctx.Value(signatureKey{}).([]byte)
	if s.verify && !verifies(s.pub, message, signature) {
		return nil, hsm.ErrBadSignature
	}
	return signature, nil
}

// verifies says whether a signature is by the key: SM2 with the default identity, or RSASSA-PKCS1-v1_5 with SHA-256.
func verifies(pub crypto.PublicKey, message, signature []byte) bool {
	switch pub := pub.(type) {
	case *ecdsa.PublicKey:
		return sm2.VerifyASN1WithSM2(pub, nil, message, signature)
	case *rsa.PublicKey:
		sum := sha256.Sum256(message)
		return rsa.VerifyPKCS1v15(pub, crypto.SHA256, sum[:], signature) == nil
	}
	return false
}

// NewUnit checks the certificates as [tsa.New] does, so that what the workers would refuse is not taken into use.
func NewUnit(c UnitConfig) (*Unit, error) {
	if len(c.Chain) == 0 || len(c.Chain) > maxCertificates {
		return nil, fmt.Errorf("tsa/stamping: unit %q: chain of %d certificates", c.Name, len(c.Chain))
	}
	tokens, err := tsa.New(tsa.Config{
		Name: c.Name, Policy: c.Terms.Policy, Accuracy: c.Terms.Accuracy, Profile: c.Terms.Profile, ContentType: c.Terms.ContentType, TSAName: c.Terms.TSAName, Signer: stranger{c.Chain[0].PublicKey, c.Verify}, Chain: c.Chain,
		Clock: c.Watch.own, Serials: c.Serials, Log: c.Log,
	})
	if err != nil {
		return nil, err
	}
	u := &Unit{cfg: c, tokens: tokens}
	for _, cert := range c.Chain {
		u.chain = append(u.chain, cert.Raw)
	}
	u.digest = digestOf(c.Label, u.chain)
	return u, nil
}

// Chain is the unit's certificate and those above it. The slice is not to be changed.
func (u *Unit) Chain() []*smx509.Certificate { return u.cfg.Chain }

// Ready says, without asking, why no token would be issued now: [tsa.ErrTimeNotAvailable], hsm.ErrUnavailable, or nil. What the workers said of
// their clocks is a second old at most while they answer.
func (u *Unit) Ready() error { return u.cfg.Watch.Ready(u.cfg.Terms.Accuracy) }

// Issue is as [tsa.Authority.Issue]: the worker reads its clock after the serial number was given and before it signs. The
// token's Provenance is the worker's reading. A token that is not what was asked for, or whose time contradicts the clock
// of this process, is thrown away; another machine may make the next.
func (u *Unit) Issue(ctx context.Context, req *tsa.Request) (*tsa.Token, error) {
	if req.Policy != nil && !req.Policy.Equal(u.cfg.Terms.Policy) {
		return nil, &tsa.RequestError{Failure: tsa.UnacceptedPolicy, Detail: fmt.Sprintf("policy %v is not served here", req.Policy)}
	}
	query, err := req.Bytes()
	if err != nil {
		return nil, err
	}
	if own := u.cfg.Watch.own.Now(); !own.Trusted() {
		return nil, fmt.Errorf("%w: clock is %s, its bound %v", tsa.ErrTimeNotAvailable, own.State, own.Bound)
	}
	var token *tsa.Token
	_, err = u.cfg.Workers.Extend(ctx, u.cfg.Label, u.cfg.Watch.fits, func(ctx context.Context, machine string, w Worker) ([]byte, error) {
		made, err := u.issue(ctx, machine, w, req, query)
		if err != nil {
			return nil, err
		}
		token = made
		return made.DER, nil
	})
	if errors.Is(err, hsm.ErrDeclined) && !errors.Is(err, tsa.ErrTimeNotAvailable) { // none was asked
		err = fmt.Errorf("%w: %w", tsa.ErrTimeNotAvailable, err)
	}
	if err != nil {
		return nil, fmt.Errorf("tsa/stamping: unit %q: %w", u.cfg.Name, err)
	}
	return token, nil
}

// issue has one worker make the token.
func (u *Unit) issue(ctx context.Context, machine string, w Worker, req *tsa.Request, query []byte) (*tsa.Token, error) {
	for whole := false; ; whole = true {
		var serial *big.Int
		var before ntp.Reading
		answer, err := w.Extend(ctx, func() (_ []byte, err error) {
			// A number for each try: what a worker that died has made may be lost, or not.
			if serial, err = u.cfg.Serials.Next(ctx); err != nil {
				return nil, fmt.Errorf("serial number: %w", err)
			}
			before = u.cfg.Watch.own.Now()
			b := addPart(append(make([]byte, 0, 384), askToken), u.cfg.Name)
			b = append(b, u.digest[:]...)
			b = addPart(addPart(b, serial.Bytes()), query)
			if whole {
				b = append(addPart(b, u.cfg.Label), byte(len(u.chain)))
				for _, c := range u.chain {
					b = addPart(b, c)
				}
			}
			return b, nil
		})
		if err != nil {
			return nil, err
		}
		in := parts{b: answer}
		switch kind := in.u8(); kind {
		case answerToken:
			r, signature := in.reading(), in.part()
			if err := in.done(); err != nil {
				return nil, err
			}
			token, err := u.check(ctx, machine, before, r, signature, req, serial)
			if err != nil {
				u.cfg.Discarded(fmt.Errorf("machine %s: %w", machine, err), signature)
			}
			return token, err
		case answerNoTime, answerNotValid:
			r, why := in.reading(), string(in.part())
			if err := in.done(); err != nil {
				return nil, err
			}
			if kind == answerNotValid {
				return nil, fmt.Errorf("%w: machine %s: %s", tsa.ErrCertificateNotValid, machine, why)
			}
			u.cfg.Watch.note(machine, before, r)
			return nil, fmt.Errorf("%w: %w: machine %s: %s", hsm.ErrDeclined, tsa.ErrTimeNotAvailable, machine, why)
		case answerRefused:
			fault := &tsa.RequestError{Failure: tsa.Failure(in.u32()), Detail: string(in.part())}
			if err := in.done(); err != nil {
				return nil, err
			}
			return nil, fault
		case answerNoChain:
			if in.done() == nil && !whole {
				continue
			}
		default:
			return nil, unexpected(kind)
		}
		return nil, unexpected(answerNoChain)
	}
}

// check holds a reading against this process's own clock, as it stood before it was asked for, and makes the token of the
// signature: over anything else than what was asked for, at that reading, it does not verify.
func (u *Unit) check(ctx context.Context, machine string, before, r ntp.Reading, signature []byte, req *tsa.Request, serial *big.Int) (*tsa.Token, error) {
	if err := u.cfg.Watch.note(machine, before, r); err != nil {
		return nil, fmt.Errorf("%w: %w: %w", hsm.ErrDeclined, tsa.ErrTimeNotAvailable, err)
	}
	token, err := u.tokens.Repeat(context.WithValue(ctx, signatureKey{}, signature), req, serial, r)
	if err != nil {
		return nil, fmt.Errorf("%w: the token of machine %s is not what was asked for: %w", hsm.ErrBadSignature, machine, err)
	}
	return token, nil
}

// SignRequest has a certificate request for the key of label signed, of which info is the CertificationRequestInfo. pub is
// the key's; the signature is verified with it.
func SignRequest(ctx context.Context, workers Workers, label string, pub crypto.PublicKey, info []byte, discarded func(error, ...[]byte)) ([]byte, error) {
	return workers.Extend(ctx, label, nil, func(ctx context.Context, machine string, w Worker) ([]byte, error) {
		answer, err := w.Extend(ctx, func() ([]byte, error) { return addPart(addPart([]byte{askRequest}, label), info), nil })
		if err != nil {
			return nil, err
		}
		in := parts{b: answer}
		kind, signature := in.u8(), in.part()
		if err := in.done(); err != nil || kind != answerSignature {
			return nil, unexpected(kind)
		}
		if !verifies(pub, info, signature) {
			err := fmt.Errorf("machine %s, key %q: %w", machine, label, hsm.ErrBadSignature)
			discarded(err, signature)
			return nil, err
		}
		return signature, nil
	})
}

// A Watch keeps what each machine's worker last said of its clock, held against a clock of this process. Safe for
// concurrent use.
type Watch struct {
	own tsa.Clock

	mu  sync.Mutex // guards what follows
	now map[string]WorkerClock
}

// A WorkerClock is what is known of one worker's clock.
type WorkerClock struct {
	Machine string
	Reading ntp.Reading // the last
	// Wrong says how it contradicts this process's clock; nil: it does not.
	Wrong error
}

// NewWatch holds workers' clocks against own.
func NewWatch(own tsa.Clock) *Watch { return &Watch{own: own, now: map[string]WorkerClock{}} }

// note keeps a reading that came after before was read, and answers how the two clocks contradict each other: as bounds go,
// both cannot be right.
func (w *Watch) note(machine string, before, r ntp.Reading) error {
	after := w.own.Now()
	c := WorkerClock{Machine: machine, Reading: r}
	if before.Trusted() && after.Trusted() && r.Trusted() {
		low, high := before.Time.Add(-before.Bound-r.Bound), after.Time.Add(after.Bound+r.Bound)
		if r.Time.Before(low) || r.Time.After(high) {
			c.Wrong = fmt.Errorf("the clock of the timestamp worker of machine %s is %v off, by both clocks' bounds %v at most", machine,
				r.Time.Sub(after.Time).Round(time.Millisecond), (after.Bound + r.Bound).Round(time.Millisecond))
		}
	} else if r.Trusted() {
		c.Wrong = fmt.Errorf("the clock of the timestamp worker of machine %s cannot be compared: this process's clock is %s", machine, after.State)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.now[machine] = c
	return c.Wrong
}

// Look asks a machine's worker for its time and keeps the answer.
func (w *Watch) Look(ctx context.Context, machine string, worker Worker) error {
	var before ntp.Reading
	answer, err := worker.Extend(ctx, func() ([]byte, error) {
		before = w.own.Now()
		return []byte{askState}, nil
	})
	if err != nil {
		return err
	}
	in := parts{b: answer}
	kind, r := in.u8(), in.reading()
	if err := in.done(); err != nil || kind != answerState {
		return unexpected(kind)
	}
	_ = w.note(machine, before, r) // it is kept
	return nil
}

// ErrNotReadmitted means that a worker's clock has no majority that waits.
var ErrNotReadmitted = errors.New("tsa/stamping: the worker readmits nothing")

// Readmit has a worker's clock take the majority that is beyond what it corrects by itself, see ntp.Clock.Readmit. Whoever
// asks cannot say what time that is: the worker's own sources do.
func (w *Watch) Readmit(ctx context.Context, machine string, worker Worker) error {
	answer, err := worker.Extend(ctx, func() ([]byte, error) { return []byte{askReadmit}, nil })
	if err != nil {
		return err
	}
	in := parts{b: answer}
	kind := in.u8()
	in.reading()
	if kind == answerNoTime {
		why := string(in.part())
		if err := in.done(); err != nil {
			return err
		}
		return fmt.Errorf("%w: machine %s: %s", ErrNotReadmitted, machine, why)
	}
	if err := in.done(); err != nil || kind != answerState {
		return unexpected(kind)
	}
	return nil
}

// Forget drops what is known of a machine: its worker has ended, or was taken away.
func (w *Watch) Forget(machine string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.now, machine)
}

// Clocks answers what is known of each machine's worker, by name.
func (w *Watch) Clocks() []WorkerClock {
	w.mu.Lock()
	defer w.mu.Unlock()
	var out []WorkerClock
	for _, c := range w.now {
		out = append(out, c)
	}
	slices.SortFunc(out, func(a, b WorkerClock) int { return bytes.Compare([]byte(a.Machine), []byte(b.Machine)) })
	return out
}

// fits says whether a machine's worker may be asked for a token; one that was not heard of may.
func (w *Watch) fits(machine string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	c, known := w.now[machine]
	return !known || c.Reading.Trusted() && c.Wrong == nil
}

// Ready is nil when some worker's clock is trusted to that accuracy, [tsa.ErrTimeNotAvailable] with why when none is, and
// hsm.ErrUnavailable when no worker answers.
func (w *Watch) Ready(accuracy time.Duration) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.now) == 0 { // which says nothing of the time
		return fmt.Errorf("%w: no timestamp worker answers", hsm.ErrUnavailable)
	}
	var why error
	for _, c := range w.now {
		switch {
		case c.Wrong != nil:
			why = c.Wrong
		case !c.Reading.Trusted() || c.Reading.Bound > accuracy:
			why = fmt.Errorf("the clock of the timestamp worker of machine %s is %s, its bound %v", c.Machine, c.Reading.State, c.Reading.Bound.Round(time.Millisecond))
		default:
			return nil
		}
	}
	return fmt.Errorf("%w: %w", tsa.ErrTimeNotAvailable, why)
}

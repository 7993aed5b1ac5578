// Package tsa is a time-stamping authority: it parses requests, issues tokens and verifies them, as RFC 3161 with
// RFC 5816 describes, for SM2 with SM3 and RSA with SHA-256 units. GM/T 0033-2023 mirrors those structures as far as can
// be told without its text; no conformity with it is claimed.
//
// A token is issued only while the clock vouches for the accuracy that the policy promises, and its accuracy field is
// what the clock vouched for, not a constant. Transport is left to package api, the journal to the [Recorder], the chain
// and revocation of certificates to package pki.
package tsa

import (
	"context"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"sync"
	"time"

	"github.com/emmansun/gmsm/smx509"
	"github.com/sirupsen/logrus"

	"yinjian/appliance/cms"
	"yinjian/ntp"
)

// ErrTimeNotAvailable means that the clock cannot vouch for the accuracy the policy promises. It is sent as
// timeNotAvailable(14), RFC 3161 §2.4.2.
var ErrTimeNotAvailable = errors.New("tsa: trusted time not available")

// ErrCertificateNotValid means that the unit's certificate, or its private key usage period, does not cover the present.
var ErrCertificateNotValid = errors.New("tsa: unit's certificate does not cover this time")

// A Clock tells the time and how wrong it can be. *ntp's clock is one.
type Clock interface {
	Now() ntp.Reading
}

// A SerialStore hands out token serial numbers, each once, ever.
type SerialStore interface {
	// Next returns a number in [1, 2^160) only once no later Next can return it again, not even after a restart. After an
	// error the number may be spent: a gap is harmless, a repeat is not.
	Next(ctx context.Context) (*big.Int, error)
}

// A Recorder writes tokens into the journal.
type Recorder interface {
	// RecordToken returns nil only after the token's entry is durable.
	RecordToken(ctx context.Context, token *Token) error
}

// Config describes one unit (TSU): one key, one certificate, one policy.
type Config struct {
	Name     string                // for logs
	Policy   asn1.ObjectIdentifier // the only policy tokens are issued under
	Accuracy time.Duration         // ceiling of the accuracy field; beyond it nothing is issued
	Signer   cms.Signer
	Chain    []*smx509.Certificate // the unit's own first, each signed by the next
	Profile  cms.Profile           // outer identifiers; RFC5652 by default
	// ContentType is the eContentType: nil for TSTInfo; under the profile GM0010 also cms.OIDGMData, for readers that know no
	// other.
	ContentType asn1.ObjectIdentifier
	TSAName     bool // fill the field tsa with the certificate's subject
	// Ordering promises that the tokens can be ordered by genTime alone. It makes them one after the other, no two in a
	// millisecond, and is a promise for whoever has one Authority for the unit at a time, in one process.
	Ordering bool
	Clock    Clock
	Serials  SerialStore
	Recorder Recorder // nil for a unit that serves [Authority.Issue] alone; Respond then refuses
	// Discarded, if set, is given a token that could not be recorded, and why. It must not block.
	Discarded func(reason error, tokens ...[]byte)
	Log       logrus.FieldLogger
}

// An Authority issues tokens. Safe for concurrent use.
type Authority struct {
	config   Config
	template *cms.Template
	head     []byte // DER of TSTInfo's version and policy
	tail     []byte // DER of its tsa, or empty
	validity [2]time.Time
	log      logrus.FieldLogger

	mu   sync.Mutex // guards last, with Ordering
	last time.Time  // genTime given out last
}

// New checks the configuration and the unit's certificate: it must be for the signer's key, have extended key usage
// critical and timeStamping alone (RFC 3161 §2.3), key usage digitalSignature or nonRepudiation and nothing else, not be a
// CA, and each certificate of the chain must be signed by the next.
func New(c Config) (*Authority, error) {
	var errs []error
	if c.Accuracy < time.Millisecond || c.Accuracy > maxAccuracy {
		errs = append(errs, fmt.Errorf("accuracy %v is outside 1ms to %v", c.Accuracy, maxAccuracy))
	}
	if c.Clock == nil || c.Serials == nil || c.Log == nil || c.Signer == nil {
		errs = append(errs, errors.New("signer, clock, serials and log must be set"))
	}
	if c.ContentType == nil {
		c.ContentType = cms.OIDTSTInfo
	} else if !c.ContentType.Equal(cms.OIDTSTInfo) && !(c.Profile == cms.GM0010 && c.ContentType.Equal(cms.OIDGMData)) {
		errs = append(errs, fmt.Errorf("content type %v under profile %v", c.ContentType, c.Profile))
	}
	if len(c.Chain) == 0 {
		errs = append(errs, errors.New("chain is empty"))
	}
	head, err := encodeHead(c.Policy)
	if err != nil {
		errs = append(errs, fmt.Errorf("policy: %w", err))
	}
	if len(errs) > 0 {
		return nil, fmt.Errorf("tsa: unit %q: %w", c.Name, errors.Join(errs...))
	}
	a := &Authority{config: c, head: head, log: c.Log.WithField("unit", c.Name)}
	for i, cert := range c.Chain[1:] {
		if err := c.Chain[i].CheckSignatureFrom(cert); err != nil {
			errs = append(errs, fmt.Errorf("chain: certificate %d is not signed by the next: %w", i, err))
		}
	}
	own := c.Chain[0]
	if err := checkPurpose(own); err != nil {
		errs = append(errs, err)
	}
	if own.IsCA || own.KeyUsage == 0 || own.KeyUsage&^(smx509.KeyUsageDigitalSignature|smx509.KeyUsageContentCommitment) != 0 {
		errs = append(errs, errors.New("certificate: key usage must be digitalSignature, nonRepudiation or both, of no CA"))
	}
	if a.validity, err = signingPeriod(own); err != nil {
		errs = append(errs, err)
	}
	if c.TSAName {
		a.tail = encodeName(own.RawSubject)
	}
	raw := make([][]byte, len(c.Chain))
	for i, cert := range c.Chain {
		raw[i] = cert.Raw
	}
	if a.template, err = cms.NewTemplate(c.Signer, raw, c.Profile); err != nil {
		errs = append(errs, err)
	}
	if len(errs) > 0 {
		return nil, fmt.Errorf("tsa: unit %q: %w", c.Name, errors.Join(errs...))
	}
	return a, nil
}

// Name is the configured name.
func (a *Authority) Name() string { return a.config.Name }

// Policy is the policy of all tokens.
func (a *Authority) Policy() asn1.ObjectIdentifier { return a.config.Policy }

// Chain is the unit's certificate and those above it. The slice is not to be changed.
func (a *Authority) Chain() []*smx509.Certificate { return a.config.Chain }

// Issue makes a token for req. Recording it is the caller's duty, before anybody sees it.
//
// The clock is read once, after the serial number is stored and before signing, so that genTime is never earlier than the
// request. Unless it is trusted and the accuracy to be published is within the policy's, Issue returns
// [ErrTimeNotAvailable] and nothing is signed. A fault of the requester is a [*RequestError]. Errors of serials and signer
// are wrapped.
func (a *Authority) Issue(ctx context.Context, req *Request) (*Token, error) {
	if req.Policy != nil && !req.Policy.Equal(a.config.Policy) {
		return nil, &RequestError{UnacceptedPolicy, fmt.Sprintf("policy %v is not served here", req.Policy)}
	}
	serial, err := a.config.Serials.Next(ctx)
	if err != nil {
		return nil, fmt.Errorf("tsa: serial number: %w", err)
	}
	if serial == nil {
		return nil, errors.New("tsa: serial number: the store gave none")
	}
	if serial.Sign() <= 0 || serial.BitLen() > maxSerialBits {
		return nil, fmt.Errorf("tsa: serial number of %d bits, sign %d: want positive, at most %d bits",
			serial.BitLen(), serial.Sign(), maxSerialBits)
	}
	reading, genTime, err := a.read(ctx)
	if err != nil {
		return nil, err
	}
	return a.issue(ctx, req, serial, reading, genTime)
}

// Repeat makes the token that another Authority of the same configuration has made for req, under that serial number and from
// that reading: the same bytes, where the signer answers the same signature. Whoever was sent the signature alone has the
// token so, and has held against what was asked for whatever is signed in it.
func (a *Authority) Repeat(ctx context.Context, req *Request, serial *big.Int, reading ntp.Reading) (*Token, error) {
	return a.issue(ctx, req, serial, reading, reading.Time.UTC().Truncate(time.Millisecond))
}

func (a *Authority) issue(ctx context.Context, req *Request, serial *big.Int, reading ntp.Reading, genTime time.Time) (*Token, error) {
	token := &Token{
		Serial:     serial,
		GenTime:    genTime,
		Policy:     a.config.Policy,
		Imprint:    req.Imprint,
		Nonce:      req.Nonce,
		Ordering:   a.config.Ordering,
		Provenance: reading,
	}
	if !reading.Trusted() || reading.Bound < 0 || reading.Bound > a.config.Accuracy {
		return nil, fmt.Errorf("%w: clock is %s, its bound %v", ErrTimeNotAvailable, reading.State, reading.Bound)
	}
	// Cutting off the digits below a millisecond makes genTime wrong by what is cut off; the bound has to say so.
	token.Accuracy = publishedAccuracy(reading.Bound + reading.Time.Sub(token.GenTime))
	if token.Accuracy > a.config.Accuracy {
		return nil, fmt.Errorf("%w: accuracy %v, at most %v is allowed", ErrTimeNotAvailable, token.Accuracy, a.config.Accuracy)
	}
	if token.GenTime.Before(a.validity[0]) || token.GenTime.After(a.validity[1]) {
		return nil, fmt.Errorf("%w: %v", ErrCertificateNotValid, token.GenTime)
	}
	info, err := token.encodeInfo(a.head, a.tail)
	if err != nil {
		return nil, fmt.Errorf("tsa: TSTInfo: %w", err)
	}
	signed, err := a.template.Sign(ctx, cms.Params{
		ContentType:      a.config.ContentType,
		Content:          info,
		OmitCertificates: !req.CertReq,
	})
	if err != nil {
		return nil, fmt.Errorf("tsa: signing TSTInfo: %w", err)
	}
	if req.CertReq {
		token.signed, token.certsOnly = signed, a.template.CertsOnly()
	}
	token.response, token.DER = encodeGranted(signed.Len(), signed.Append)
	return token, nil
}

// read reads the clock, and the genTime from that. With Ordering it waits until that lies after the one before it: each
// reading is later than those before, so that a restart, which takes longer than a millisecond, keeps the promise, too.
func (a *Authority) read(ctx context.Context) (reading ntp.Reading, genTime time.Time, err error) {
	if a.config.Ordering {
		a.mu.Lock()
		defer a.mu.Unlock()
	}
	for {
		reading = a.config.Clock.Now()
		genTime = reading.Time.UTC().Truncate(time.Millisecond)
		if !a.config.Ordering || !reading.Trusted() {
			return reading, genTime, nil
		}
		if genTime.After(a.last) {
			a.last = genTime
			return reading, genTime, nil
		}
		select {
		case <-time.After(time.Millisecond):
		case <-ctx.Done():
			return reading, genTime, fmt.Errorf("tsa: waiting for a genTime after %v: %w", a.last, ctx.Err())
		}
	}
}

// Respond is [Responder.Respond] with the authority's own tokens.
func (a *Authority) Respond(ctx context.Context, reqDER []byte) []byte {
	r := Responder{Issuer: a, Recorder: a.config.Recorder, Discarded: a.config.Discarded, Log: a.log}
	return r.Respond(ctx, reqDER)
}

// maxAccuracy keeps the arithmetic far from overflow; a vaguer clock is of no use to anybody. ETSI EN 319 422 wants 1 s.
const maxAccuracy = time.Hour

// publishedAccuracy rounds an error up to milliseconds, at least one.
func publishedAccuracy(bound time.Duration) time.Duration {
	const unit = time.Millisecond
	return max((bound+unit-1)/unit*unit, unit)
}

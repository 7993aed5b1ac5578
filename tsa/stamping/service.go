// Package stamping keeps a timestamp unit's key and its clock in one process, apart from who serves requests: TSTInfo is
// built, and signed, where the key's worker reads the time itself. Whoever owns the process that serves can ask for a
// token, and cannot say over this stream what time is to stand in it. Whoever starts the worker can: it believes the sources,
// and the terms, that it is started with.
//
// A [Service] is the end in the worker: it has tokens issued by package tsa, of which it answers reading and signature, signs
// certificate requests for its own keys (RFC 2986, seen whole), and signs nothing else. A [Unit] is the end that serves: it
// asks, holds the reading against a clock of its own, and makes of the signature the token again: what the signature does not
// verify over was not asked for. Between the two are the messages of wire.go, carried by whoever joins them (hsm/worker and
// hsm/pool in the appliance).
//
// What a unit is (its name, policy, accuracy, profile) stands in the service's configuration. What may change while it
// runs, its key's label and its certificates, comes with a request when the service does not have it. Who chooses them can
// choose among certificates for the same key, no more.
package stamping

import (
	"bytes"
	"context"
	"crypto"
	"encoding/asn1"
	"encoding/binary"
	"errors"
	"fmt"
	"math/big"
	"sync"
	"time"

	"github.com/emmansun/gmsm/sm3"
	"github.com/emmansun/gmsm/smx509"
	"github.com/sirupsen/logrus"
	"golang.org/x/crypto/cryptobyte"
	der "golang.org/x/crypto/cryptobyte/asn1"

	"yinjian/appliance/cms"
	"yinjian/hsm"
	"yinjian/tsa"
)

// A Terms is what does not change while a service runs.
type Terms struct {
	Policy   asn1.ObjectIdentifier
	Accuracy time.Duration // ceiling of the accuracy field
	Profile  cms.Profile
	// ContentType is as in [tsa.Config].
	ContentType asn1.ObjectIdentifier
	TSAName     bool // likewise
}

// A Service answers requests in the worker. Safe for concurrent use.
type Service struct {
	token hsm.Token
	clock tsa.Clock
	units map[string]Terms
	log   logrus.FieldLogger

	serials used

	mu     sync.Mutex                // guards what follows
	issuer map[issuer]*tsa.Authority // as they were asked for
}

// An issuer is a unit under one key and chain.
type issuer struct {
	unit   string
	digest [32]byte
}

// maxIssuers is how many are kept: each unit has one, and another while its certificate changes.
const maxIssuers = 64

// New makes a service that signs with token and takes its time from clock, for units by name.
func New(token hsm.Token, clock tsa.Clock, units map[string]Terms, log logrus.FieldLogger) *Service {
	return &Service{token: token, clock: clock, units: units, log: log, issuer: map[issuer]*tsa.Authority{}}
}

// Extend answers one request. What the requester or the time is to blame for stands in the answer; an error is the token's,
// or says that the request is malformed.
func (s *Service) Extend(ctx context.Context, request []byte) ([]byte, error) {
	in := parts{b: request}
	switch kind := in.u8(); kind {
	case askToken:
		return s.stamp(ctx, &in)
	case askState:
		if err := in.done(); err != nil {
			return nil, err
		}
		return addReading([]byte{answerState}, s.clock.Now()), nil
	case askReadmit:
		if err := in.done(); err != nil {
			return nil, err
		}
		c, ok := s.clock.(interface{ Readmit() error })
		if !ok {
			return nil, errors.New("tsa/stamping: this clock readmits nothing")
		}
		if err := c.Readmit(); err != nil {
			return addPart(addReading([]byte{answerNoTime}, s.clock.Now()), err.Error()), nil
		}
		return addReading([]byte{answerState}, s.clock.Now()), nil
	case askRequest:
		label, info := string(in.part()), in.part()
		if err := in.done(); err != nil {
			return nil, err
		}
		signature, err := s.signRequest(ctx, label, info)
		if err != nil {
			return nil, err
		}
		return addPart([]byte{answerSignature}, signature), nil
	default:
		return nil, fmt.Errorf("%w: request %d", errFrame, kind)
	}
}

// stamp has one token made.
func (s *Service) stamp(ctx context.Context, in *parts) ([]byte, error) {
	// 1. Under which certificate.
	who := issuer{unit: string(in.part())}
	copy(who.digest[:], in.take(len(who.digest)))
	serial, query := in.part(), in.part()
	whole := !in.bad && len(in.b) > 0
	var label string
	var chain [][]byte
	if whole {
		label = string(in.part())
		for n := in.u8(); n > 0 && !in.bad; n-- {
			chain = append(chain, bytes.Clone(in.part()))
		}
	}
	if err := in.done(); err != nil {
		return nil, err
	}
	s.mu.Lock()
	a := s.issuer[who]
	s.mu.Unlock()
	if a == nil {
		if !whole {
			return []byte{answerNoChain}, nil
		}
		var err error
		if a, err = s.use(ctx, who, label, chain); err != nil {
			return nil, err
		}
	}

	// 2. What is asked.
	req, err := tsa.ParseRequest(query)
	var token *tsa.Token
	call := &call{serial: serial}
	if err == nil {
		token, err = a.Issue(context.WithValue(ctx, callKey{}, call), req)
	}

	// 3. What came of it.
	var fault *tsa.RequestError
	switch {
	case err == nil:
		// The rest of the token is what was asked for, and what both ends have.
		return addPart(addReading(append(make([]byte, 0, 512), answerToken), token.Provenance), call.signature), nil
	case errors.As(err, &fault):
		return addPart(binary.BigEndian.AppendUint32([]byte{answerRefused}, uint32(fault.Failure)), fault.Detail), nil
	case errors.Is(err, tsa.ErrTimeNotAvailable):
		return addPart(addReading([]byte{answerNoTime}, s.clock.Now()), err.Error()), nil
	case errors.Is(err, tsa.ErrCertificateNotValid):
		return addPart(addReading([]byte{answerNotValid}, s.clock.Now()), err.Error()), nil
	}
	return nil, err
}

// use takes a unit's key and certificates into use. tsa.New checks that they belong together and what they are for.
func (s *Service) use(ctx context.Context, who issuer, label string, chain [][]byte) (*tsa.Authority, error) {
	terms, ok := s.units[who.unit]
	if !ok {
		return nil, fmt.Errorf("tsa/stamping: no unit %q in the configuration", who.unit)
	}
	if digestOf(label, chain) != who.digest {
		return nil, fmt.Errorf("%w: another chain than was announced", errFrame)
	}
	key, err := s.key(ctx, label)
	if err != nil {
		return nil, err
	}
	certs := make([]*smx509.Certificate, len(chain))
	for i, raw := range chain {
		if certs[i], err = smx509.ParseCertificate(raw); err != nil {
			return nil, fmt.Errorf("tsa/stamping: unit %q: certificate %d: %w", who.unit, i, err)
		}
	}
	a, err := tsa.New(tsa.Config{
		Name: who.unit, Policy: terms.Policy, Accuracy: terms.Accuracy, Profile: terms.Profile, ContentType: terms.ContentType, TSAName: terms.TSAName, Signer: keeper{key}, Chain: certs,
		Clock: s.clock, Serials: &s.serials, Log: s.log,
	})
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.issuer) >= maxIssuers {
		clear(s.issuer)
	}
	s.issuer[who] = a
	return a, nil
}

// key finds a key of units. Its signatures are verified where they are used.
func (s *Service) key(ctx context.Context, label string) (*hsm.Key, error) {
	if hsm.IsMachines(label) {
		return nil, fmt.Errorf("tsa/stamping: key %q is no unit's", label)
	}
	return hsm.NewKey(ctx, s.token, label, false)
}

// digestOf names a key with its chain.
func digestOf(label string, chain [][]byte) [32]byte {
	h := sm3.New()
	h.Write(addPart(nil, label))
	for _, c := range chain {
		h.Write(addPart(nil, c))
	}
	return [32]byte(h.Sum(nil))
}

// signRequest signs a CertificationRequestInfo (RFC 2986 §4.1) that is for the very key of that label. It is a SEQUENCE of
// version, name, key and [0], so that what is signed can be neither a CMS's SET of signed attributes nor a certificate.
func (s *Service) signRequest(ctx context.Context, label string, info []byte) ([]byte, error) {
	key, err := s.key(ctx, label)
	if err != nil {
		return nil, err
	}
	in := cryptobyte.String(info)
	var body, spki cryptobyte.String
	var version int64
	if !in.ReadASN1(&body, der.SEQUENCE) || !in.Empty() || !body.ReadASN1Int64WithTag(&version, der.INTEGER) || version != 0 ||
		!body.SkipASN1(der.SEQUENCE) || !body.ReadASN1Element(&spki, der.SEQUENCE) || !body.SkipASN1(der.Tag(0).Constructed().ContextSpecific()) || !body.Empty() {
		return nil, fmt.Errorf("tsa/stamping: key %q: not a CertificationRequestInfo; nothing else is signed", label)
	}
	pub, err := smx509.ParsePKIXPublicKey(spki)
	if err != nil {
		return nil, fmt.Errorf("tsa/stamping: key %q: certificate request: %w", label, err)
	}
	if own, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool }); !ok || !own.Equal(pub) {
		return nil, fmt.Errorf("tsa/stamping: key %q: the certificate request is for another key", label)
	}
	return key.SignMessage(ctx, info)
}

// A call is one token's: its serial number goes down to the authority with the context, and its signature comes back.
type call struct{ serial, signature []byte }

type callKey struct{}

// A keeper signs and leaves the signature with the call.
type keeper struct{ *hsm.Key }

func (k keeper) SignMessage(ctx context.Context, message []byte) ([]byte, error) {
	signature, err := k.Key.SignMessage(ctx, message)
	if c, ok := ctx.Value(callKey{}).(*call); ok {
		c.signature = signature
	}
	return signature, err
}

// window is how many numbers behind the highest a serial may come.
const window = 1 << 16

// A used gives out the serial that came with the request, once. Serials of one service share all but their last six bytes,
// which count up (the appliance's: epoch ‖ sequence ‖ counter), and may overtake one another by less than window. It is a
// tsa.SerialStore.
type used struct {
	mu     sync.Mutex // guards what follows
	prefix []byte
	high   uint64
	seen   [window / 64]uint64 // a bit for each of the window numbers up to high
}

func (u *used) Next(ctx context.Context) (*big.Int, error) {
	var serial []byte
	if c, ok := ctx.Value(callKey{}).(*call); ok {
		serial = c.serial
	}
	if len(serial) < 7 || len(serial) > 20 || serial[0] == 0 {
		return nil, fmt.Errorf("%w: serial of %d bytes", errFrame, len(serial))
	}
	cut := len(serial) - 6
	n := binary.BigEndian.Uint64(append([]byte{0, 0}, serial[cut:]...))
	u.mu.Lock()
	defer u.mu.Unlock()
	switch {
	case u.prefix == nil:
		u.prefix, u.high = bytes.Clone(serial[:cut]), n
	case !bytes.Equal(u.prefix, serial[:cut]):
		return nil, fmt.Errorf("tsa/stamping: serial %x is not of the row %x…, which this worker began", serial, u.prefix)
	case n > u.high:
		if n-u.high >= window {
			clear(u.seen[:])
		} else {
			for i := u.high + 1; i < n; i++ {
				u.seen[i%window/64] &^= 1 << (i % 64)
			}
		}
		u.high = n
	case u.high-n >= window || u.seen[n%window/64]&(1<<(n%64)) != 0:
		return nil, fmt.Errorf("tsa/stamping: serial %x was used already", serial)
	}
	u.seen[n%window/64] |= 1 << (n % 64)
	return new(big.Int).SetBytes(serial), nil
}

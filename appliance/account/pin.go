package account

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"errors"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/emmansun/gmsm/sm3"
	"golang.org/x/crypto/pbkdf2"

	"yinjian/appliance/custody"
	"yinjian/appliance/problem"
)

const (
	// pinIterations bounds what a read-out of the verifier alone would cost to search; the verifier is useless
	// without the cipher machine's key in any case, so this is kept small enough for a busy ward (about 5 ms).
	pinIterations = 10000
	// MaxPINTries is how many wrong PINs in a row, sent by one application, lock a signer's PIN for that application until
	// an administrator sets a new one. Others go on: an application that sends nonsense locks doctors out of itself alone.
	MaxPINTries = 5
	// MaxPINTriesAll is how many of them, over all applications, lock a signer's PIN for every application: what bounds
	// the guesses of applications that work together. Each one's count ends with a right PIN that it sends.
	MaxPINTriesAll = 20
	minPIN         = 6  // characters
	maxPIN         = 64 // bytes
)

// checkPINForm refuses what no PIN can be. Two Chinese characters are six bytes, and still two characters; a control
// character is a line end that some program forgot to cut off.
func checkPINForm(pin string) error {
	if utf8.RuneCountInString(pin) < minPIN || len(pin) > maxPIN || !utf8.ValidString(pin) || strings.ContainsFunc(pin, unicode.IsControl) {
		return problem.Invalid("pin", "PIN 须为至少 %d 个字符、至多 %d 字节，不含控制字符 (PIN must have %d characters and at most %d bytes)", minPIN, maxPIN, minPIN, maxPIN)
	}
	return nil
}

// newPINVerifier makes the stored form of pin for a signer.
func newPINVerifier(ctx context.Context, m *macs, signer, pin string) (*PINVerifier, error) {
	if err := checkPINForm(pin); err != nil {
		return nil, err
	}
	v := &PINVerifier{Salt: make([]byte, 16), Iterations: pinIterations}
	if _, err := rand.Read(v.Salt); err != nil {
		return nil, err
	}
	var err error
	if v.MACKey, err = m.present(ctx, PINKeyLabel); err != nil {
		return nil, err
	}
	if v.Tag, err = v.tag(ctx, m, signer, pin); err != nil {
		return nil, err
	}
	return v, nil
}

const pinDomain = "yinjian/signer-pin/v1\x00"

func (v *PINVerifier) tag(ctx context.Context, m *macs, signer, pin string) ([]byte, error) {
	return v.tagOf(ctx, m, pinDomain, signer, pin)
}

// tagOf is tag for a secret of that kind.
func (v *PINVerifier) tagOf(ctx context.Context, m *macs, domain, owner, secret string) ([]byte, error) {
	stretched := pbkdf2.Key([]byte(secret), v.Salt, v.Iterations, 32, sm3.New)
	defer clear(stretched)
	return v.tagOfStretched(ctx, m, domain, owner, stretched)
}

func (v *PINVerifier) tagOfStretched(ctx context.Context, m *macs, domain, owner string, stretched []byte) ([]byte, error) {
	msg := make([]byte, 0, 128) // never moved, so that clear leaves no copy
	msg = append(msg, domain...)
	msg = append(msg, stretched...)
	msg = append(msg, owner...)
	defer clear(msg)
	return m.derive(ctx, PINKeyLabel, v.MACKey, msg)
}

func (v *PINVerifier) check(ctx context.Context, m *macs, signer, pin string) (bool, error) {
	return v.checkOf(ctx, m, pinDomain, signer, pin)
}

func (v *PINVerifier) checkOf(ctx context.Context, m *macs, domain, owner, secret string) (bool, error) {
	tag, err := v.tagOf(ctx, m, domain, owner, secret)
	if err != nil {
		return false, err
	}
	return subtle.ConstantTimeCompare(tag, v.Tag) == 1, nil
}

// applicationKey derives an application's HMAC key (32 bytes). It is never stored in the open: whoever copies the disk has
// the salt only, or what is sealed under what comes from it.
func (m *macs) applicationKey(ctx context.Context, a *Application) ([]byte, error) {
	if a.KeySealed == nil {
		return m.ofApplication(ctx, a, "yinjian/application-key/v1\x00")
	}
	seal, err := m.applicationSeal(ctx, a)
	if err != nil {
		return nil, err
	}
	defer clear(seal)
	return custody.Open(seal, a.KeySealed, applicationName(a.ID))
}

// applicationSeal is what an application's KeySealed is sealed under (16 bytes).
func (m *macs) applicationSeal(ctx context.Context, a *Application) ([]byte, error) {
	key, err := m.ofApplication(ctx, a, "yinjian/application-seal/v1\x00")
	if err != nil {
		return nil, err
	}
	clear(key[16:])
	return key[:16], nil
}

func (m *macs) ofApplication(ctx context.Context, a *Application, use string) ([]byte, error) {
	if len(a.KeySalt) != 16 {
		return nil, errors.New("account: application key salt is not 16 bytes")
	}
	return m.derive(ctx, AppKeyLabel, a.MACKey, append(append([]byte(use), a.KeySalt...), a.ID...))
}

func applicationName(id string) string { return "yinjian/application-key/v1 " + id }

// pinCount answers how many wrong PINs stand against a signer for one application and over all.
func (s *Service) pinCount(application, signer string) (failures, all int) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, n := range s.pinFailures[signer] {
		all += n
	}
	return s.pinFailures[signer][application], all
}

// countWrongPIN is called under s.mu.
func (s *Service) countWrongPIN(application, signer string) {
	if s.pinFailures[signer] == nil {
		s.pinFailures[signer] = map[string]int{}
	}
	s.pinFailures[signer][application]++
}

// pinLocked is nil, or why no PIN is looked at.
func pinLocked(failures, all int) error {
	switch {
	case all >= MaxPINTriesAll:
		return errPINLockedAll
	case failures >= MaxPINTries:
		return errPINLocked
	}
	return nil
}

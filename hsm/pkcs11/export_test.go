package pkcs11

import (
	"time"

	"yinjian/hsm"
	"yinjian/hsm/pkcs11/profiles"
)

// Reconnect forces a reconnect and waits for it, as a return value of that class would.
func (t *Token) Reconnect() {
	t.mu.Lock()
	gen := t.gen
	t.mu.Unlock()
	if done := t.startRepair(gen, repairConnection); done != nil {
		<-done
	}
}

// Generation counts logins.
func (t *Token) Generation() uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.gen
}

// EndBackoff lets the breaker try again now, and a reconnect follow another.
func (t *Token) EndBackoff() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.retryAt, t.calmUntil, t.reconnects = time.Now(), time.Time{}, 0
}

var (
	ECPoint  = ecPoint
	Readings = readings
)

// Resolve is what a profile's file becomes.
func Resolve(file *profiles.Profile) Profile { return resolve(file) }

// Exercise uses a profile in every way in which a token does, with no token.
func (p Profile) Exercise(id profiles.Identity, offered []uint, pin []byte, rv uint) {
	_ = p.fits(id, offered)
	_ = p.checkPIN(pin)
	_ = p.translate(&hsm.Error{Call: "C_Sign", RV: rv})
	for _, k := range p.Keys {
		k.templates("label", []byte{1})
	}
	for _, m := range p.Operations {
		m.input(make([]byte, 32))
		_ = m.Output.check(make([]byte, 64))
	}
}

// SetSM3 has the self-test take another mechanism for SM3.
func SetSM3(p *Profile, number uint) { p.sm3 = number }

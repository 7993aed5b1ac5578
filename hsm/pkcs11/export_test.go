package pkcs11

import "time"

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

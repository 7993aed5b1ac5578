package pkcs11

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	p11 "github.com/miekg/pkcs11"

	"yinjian/hsm"
	"yinjian/hsm/pkcs11/profiles"
)

type repairKind int

const (
	repairLogin repairKind = iota
	repairConnection
)

const (
	firstBackoff = 250 * time.Millisecond
	lastBackoff  = 30 * time.Second
	// After a reconnect none is made for so long that has the same cause: the pause doubles with each that follows the
	// one before within lastBackoff.
	firstCalm = 250 * time.Millisecond
	lastCalm  = 4 * time.Second
	// starvation is how long a token has not room for one session before a reconnect is tried: it gives up what we have.
	starvation = 2 * time.Second
)

// ready answers nil when sessions can be lent. It waits for a repair that is under way, starts one when the breaker's
// time is over, and otherwise answers hsm.ErrUnavailable with the cause, or what latched the token.
func (t *Token) ready(ctx context.Context) error {
	for {
		t.mu.Lock()
		if t.latched != nil {
			defer t.mu.Unlock()
			return t.latched
		}
		var wait <-chan struct{}
		if t.repairing != nil {
			wait = t.repairing
		}
		if wait == nil && t.failures > 0 {
			if time.Now().Before(t.retryAt) { // interval
				defer t.mu.Unlock()
				return fmt.Errorf("%w: %w", hsm.ErrUnavailable, t.lastErr)
			}
			wait = t.startLocked(repairConnection)
		}
		t.mu.Unlock()
		if wait == nil {
			return nil
		}
		select {
		case <-wait:
		case <-ctx.Done():
			return fmt.Errorf("%w: while reconnecting: %w", hsm.ErrUnavailable, context.Cause(ctx))
		}
	}
}

// startRepair starts a repair unless generation gen is past, and answers what will be closed at its end; nil when
// nothing is to be waited for.
func (t *Token) startRepair(gen uint64, kind repairKind) <-chan struct{} {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case t.repairing != nil:
		return t.repairing
	case t.latched != nil, t.gen != gen, t.failures > 0 && time.Now().Before(t.retryAt): // interval
		return nil
	}
	return t.startLocked(kind)
}

// startLocked runs the one repair in a goroutine that Close waits for: the caller whose call failed may have less
// time than it takes. mu is held.
func (t *Token) startLocked(kind repairKind) <-chan struct{} {
	done := make(chan struct{})
	t.repairing = done
	t.repairs.Add(1)
	go func() {
		defer t.repairs.Done()
		var err error
		if kind == repairLogin {
			err = t.relogin()
		}
		connected := kind == repairConnection || err != nil && !errors.Is(err, hsm.ErrNeedsOperator)
		if connected {
			err = t.connect(false)
		}
		log := t.cfg.Log
		if errors.Is(err, hsm.ErrNeedsOperator) {
			t.latch(err)
		}
		t.mu.Lock()
		t.repairing = nil
		if err == nil {
			t.failures, t.lastErr = 0, nil
			if connected {
				now := time.Now() // interval
				if now.Sub(t.calmUntil) > lastBackoff {
					t.reconnects = 0
				}
				t.calmUntil = now.Add(min(firstCalm<<min(t.reconnects, 10), lastCalm))
				t.reconnects++
			}
		} else {
			backoff := min(firstBackoff<<min(t.failures, 10), lastBackoff)
			backoff += time.Duration(rand.Int64N(int64(backoff)/4 + 1))
			t.failures++
			t.retryAt, t.lastErr = time.Now().Add(backoff), err // interval
			log = log.WithError(err).WithField("retry_ms", backoff.Milliseconds())
		}
		t.mu.Unlock()
		close(done)
		if err != nil {
			log.Warning("reconnect to token failed")
		} else {
			log.Info("token reconnected")
		}
	}()
	return done
}

// latch stops the token for good: a PIN was refused.
func (t *Token) latch(err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.latched != nil {
		return
	}
	t.latched = fmt.Errorf("token %q: %w", t.cfg.TokenLabel, err)
	zeroise(t.pin)
	t.pin = nil
	t.cfg.Log.WithError(err).Error("PIN refused, nothing is tried again until an operator has looked")
}

// relogin logs in on the pinned session, for a token that says CKR_USER_NOT_LOGGED_IN. Only one repair runs at once.
func (t *Token) relogin() error {
	t.lib.use.RLock()
	defer t.lib.use.RUnlock()
	t.mu.Lock()
	pinned, have, pin := t.pinned, t.hasPinned && t.lib.up && t.libGen == t.lib.gen, bytes.Clone(t.pin)
	t.mu.Unlock()
	defer zeroise(pin)
	if !have {
		return errStale
	}
	// A session that is gone too would spend the PIN for nothing.
	if !t.cfg.Profile.noSessionInfo {
		if _, err := t.lib.ctx.GetSessionInfo(pinned); err != nil {
			return call("C_GetSessionInfo", err)
		}
	}
	if err := t.login(pinned, pin, true); err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.gen++
	clear(t.handles)
	clear(t.keks)
	return nil
}

// login presents the PIN once. With accepted it was taken before, and CKR_USER_ALREADY_LOGGED_IN is success; without,
// that answer proves nothing about the PIN: whoever is logged in is logged out and the PIN presented.
func (t *Token) login(s p11.SessionHandle, pin []byte, accepted bool) error {
	p := &t.cfg.Profile
	if p.noLogin {
		return nil
	}
	role := uint(p11.CKU_USER)
	if p.loginUser != 0 {
		role = p.loginUser
	}
	present := func() error {
		if t.cfg.BeforeLogin != nil {
			t.cfg.BeforeLogin()
		}
		return p.translate(t.lib.login(s, role, pin))
	}
	err := present()
	var e *hsm.Error
	if !errors.As(err, &e) || e.RV != hsm.CKR_USER_ALREADY_LOGGEDIN {
		return err
	}
	if accepted {
		return nil
	}
	if err := call("C_Logout", t.lib.ctx.Logout(s)); err != nil {
		return err
	}
	return present()
}

// connect brings the token from whatever state to logged in. first is Open's: the library is fresh then, and the PIN
// unproven. Only one repair runs at once, and Open's runs before any.
func (t *Token) connect(first bool) error {
	// 1. A new C_Initialize, unless another Token on the module made one since ours.
	if !first {
		t.mu.Lock()
		seen := t.tried
		t.mu.Unlock()
		if err := t.lib.restart(seen); err != nil {
			return err
		}
	}
	t.lib.use.RLock()
	defer t.lib.use.RUnlock()
	if !t.lib.up {
		return errStale
	}
	t.mu.Lock()
	t.tried = t.lib.gen
	pin := bytes.Clone(t.pin)
	t.mu.Unlock()
	defer zeroise(pin)

	// 2. Slots may have been renumbered: the label finds the token.
	slot, ti, err := t.lib.findToken(t.cfg.TokenLabel)
	if err != nil {
		return err
	}
	if ti.Flags&p11.CKF_USER_PIN_LOCKED != 0 {
		return &hsm.Error{Call: "C_GetTokenInfo", RV: hsm.CKR_PIN_LOCKED}
	}
	if ti.Flags&p11.CKF_USER_PIN_FINAL_TRY != 0 {
		t.cfg.Log.WithField("slot", slot).Warning("a wrong PIN was entered; the next wrong one locks the token")
	}

	if first {
		if err := t.checkProfile(slot, ti, pin); err != nil {
			return err
		}
	}

	// 3. The session that keeps the login, and the PIN, once.
	most := sessionLimit(ti)
	if m := t.cfg.Profile.maxSessions; m > 0 && (most == 0 || m < most) {
		most = m
	}
	solo := most == 1
	flags := uint(p11.CKF_SERIAL_SESSION)
	if solo || t.cfg.Profile.readWrite {
		flags |= p11.CKF_RW_SESSION
	}
	s, err := t.lib.ctx.OpenSession(slot, flags)
	if err != nil {
		return t.cfg.Profile.translate(call("C_OpenSession", err))
	}
	if err := t.login(s, pin, !first); err != nil {
		_ = t.lib.ctx.CloseSession(s)
		return err
	}

	// 4. Sessions and handles of before are void, and are not closed: their numbers may be another's by now.
	limit := cap(t.sem)
	switch {
	case solo:
		limit = 1
	case most > 1:
		limit = min(limit, int(min(most-1, 1<<16)))
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.idle, t.starved = nil, time.Time{}
	clear(t.handles)
	clear(t.keks)
	t.gen++
	t.libGen, t.slot, t.solo, t.limit = t.lib.gen, slot, solo, limit
	if t.pinned, t.hasPinned = s, !solo; solo {
		t.pinned, t.idle = 0, []p11.SessionHandle{s}
	}
	t.resizeLocked()
	return nil
}

// checkProfile refuses a profile that is not this machine's, and a PIN that the token cannot have, before the PIN is
// presented. The caller holds lib.use.
func (t *Token) checkProfile(slot uint, ti p11.TokenInfo, pin []byte) error {
	p := &t.cfg.Profile
	if err := p.checkPIN(pin); err != nil {
		return err
	}
	li, err := t.lib.ctx.GetInfo()
	if err != nil {
		return p.translate(call("C_GetInfo", err))
	}
	var offered []uint
	if !p.noMechanismList {
		list, err := t.lib.ctx.GetMechanismList(slot)
		if err != nil {
			return p.translate(call(profiles.GetMechanismList, err))
		}
		for _, m := range list {
			offered = append(offered, m.Mechanism)
		}
	}
	return p.fits(profiles.Identity{Library: t.cfg.Module, Manufacturers: []string{li.ManufacturerID, ti.ManufacturerID},
		Description: li.LibraryDescription, Model: ti.Model,
		VersionMajor: li.LibraryVersion.Major, VersionMinor: li.LibraryVersion.Minor}, offered)
}

// resizeLocked makes sem hold as many values, lent ones included, as limit says. mu is held.
func (t *Token) resizeLocked() {
	for want := cap(t.sem) - t.limit; t.lost != want; {
		if t.lost > want {
			t.sem <- struct{}{} // never blocks: lost values are missing from it
			t.lost--
			continue
		}
		select {
		case <-t.sem:
			t.lost++
		default:
			// Lent just now; the next CKR_SESSION_COUNT takes it.
			return
		}
	}
}

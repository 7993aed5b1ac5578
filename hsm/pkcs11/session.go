package pkcs11

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	p11 "github.com/miekg/pkcs11"

	"yinjian/hsm"
)

// A finalError must not lead to another try: the call may have had its effect.
type finalError struct{ error }

func (f finalError) Unwrap() error { return f.error }

// final marks err as the outcome, whatever its class.
func final(err error) error {
	if err == nil {
		return nil
	}
	return finalError{err}
}

// run lends f a session and acts on the error it returns, as the package paragraph says: each remedy once, and f's
// C_Sign twice at most. f is told the generation that cached handles must belong to.
func (t *Token) run(ctx context.Context, write bool, f func(s p11.SessionHandle, gen uint64) error) error {
	var session, refind, login, reconnect, room remedy
	signed := 0
	for stale := 0; ; {
		if err := t.ready(ctx); err != nil {
			return err
		}
		gen, err := t.lend(ctx, write, f)
		if err == nil {
			return nil
		}
		// Another Token restarted the module, or a reconnect has not come to its end: nothing was tried yet.
		if errors.Is(err, errStale) && stale < 10 {
			stale++
			if err = t.mend(ctx, gen, repairConnection, true, err); errors.Is(err, errNotMended) {
				return err
			}
			continue
		}
		var e *hsm.Error
		if !errors.As(err, &e) {
			return err
		}
		var isFinal finalError
		may := !errors.As(err, &isFinal)
		if e.Call == "C_Sign" {
			signed++
			may = may && signed < 2
		}
		// What another session, search, login or a smaller pool did not mend, only a reconnect may: the module has lost
		// itself. Numbers that say little come here after another session, since vendors use them for a bad request too.
		again, worse := false, false
		switch class := e.Class(); class {
		case hsm.ClassSession:
			again, worse = session.take(may)
		case hsm.ClassRefind:
			again, worse = refind.take(may)
		case hsm.ClassBackpressure:
			again, worse = room.take(may)
			worse = worse && t.starving() // and not that others have taken what there is, just now
		case hsm.ClassLogin:
			if again, worse = login.take(may); !worse {
				err = t.mend(ctx, gen, repairLogin, again, err)
			}
		case hsm.ClassReconnect, hsm.ClassUnknown:
			worse = true
			if vague := e.RV == hsm.CKR_GENERAL_ERROR || e.RV == hsm.CKR_FUNCTION_FAILED || class == hsm.ClassUnknown; vague && may {
				again, worse = session.take(may)
			}
		case hsm.ClassFatal:
			t.latch(err)
		}
		if worse {
			again, _ = reconnect.take(may)
			err = t.reconnect(ctx, gen, again, err)
		}
		if !again || errors.Is(err, errNotMended) {
			return err
		}
	}
}

// A remedy may be taken once, and only where the call may run again.
type remedy bool

// take answers whether it is taken now, and whether it was before and did not help.
func (r *remedy) take(may bool) (now, failed bool) {
	failed = bool(*r)
	*r = remedy(failed || may)
	return may && !failed, failed
}

var errNotMended = errors.New("not repaired")

// mend starts the repair of what generation gen saw fail with cause. With wait it answers cause or, when the repair
// failed, an error that is errNotMended; without, the repair goes on for the calls to come.
func (t *Token) mend(ctx context.Context, gen uint64, kind repairKind, wait bool, cause error) error {
	done := t.startRepair(gen, kind)
	if !wait || done == nil {
		return cause
	}
	select {
	case <-done:
	case <-ctx.Done():
		return fmt.Errorf("%w: %w: %w", errNotMended, context.Cause(ctx), cause)
	}
	if err := t.ready(ctx); err != nil {
		return fmt.Errorf("%w: %w; at first: %w", errNotMended, err, cause)
	}
	return cause
}

// gone are the answers that leave no doubt that the connection is lost; others may be about one key.
var gone = []uint{hsm.CKR_SLOT_ID_INVALID, 0x32, 0xE0, 0xE1, 0x190} // …, device removed, no token, another token, not initialised

// reconnect is mend with a new connection, unless one that was made a moment ago has not helped, for a reconnect disturbs
// every call.
func (t *Token) reconnect(ctx context.Context, gen uint64, wait bool, cause error) error {
	var e *hsm.Error
	errors.As(cause, &e) // run has looked
	t.mu.Lock()
	tooSoon := !slices.Contains(gone, e.RV) && t.repairing == nil && t.gen == gen && time.Now().Before(t.calmUntil) // interval
	t.mu.Unlock()
	if tooSoon {
		return fmt.Errorf("%w: the last reconnect was just now: %w", errNotMended, cause)
	}
	return t.mend(ctx, gen, repairConnection, wait, cause)
}

// lend gives f a session and takes it back. It answers the generation that f worked in.
func (t *Token) lend(ctx context.Context, write bool, f func(p11.SessionHandle, uint64) error) (uint64, error) {
	t.mu.Lock()
	if t.closed {
		defer t.mu.Unlock()
		return 0, t.latched
	}
	t.lent.Add(1)
	t.mu.Unlock()
	defer t.lent.Done()

	// 1. Room. A value of sem stands for one open or openable session.
	select {
	case <-t.sem:
	case <-ctx.Done():
		return 0, fmt.Errorf("waiting for a session: %w", context.Cause(ctx))
	}
	giveUp := false
	defer func() {
		if giveUp {
			t.mu.Lock()
			t.lost++
			left := cap(t.sem) - t.lost
			t.mu.Unlock()
			t.cfg.Log.WithField("sessions", left).Warning("token is short of sessions or memory, pool shrunk")
			return
		}
		t.sem <- struct{}{}
	}()

	// 2. The library must not be finalised below us, and must be the one our handles belong to.
	t.lib.use.RLock()
	defer t.lib.use.RUnlock()
	t.mu.Lock()
	gen, slot, solo := t.gen, t.slot, t.solo
	if t.latched != nil {
		defer t.mu.Unlock()
		return gen, t.latched
	}
	if !t.lib.up || t.libGen != t.lib.gen {
		t.mu.Unlock()
		return gen, errStale
	}
	var s p11.SessionHandle
	have := len(t.idle) > 0
	if have {
		s, t.idle = t.idle[len(t.idle)-1], t.idle[:len(t.idle)-1]
	}
	t.mu.Unlock()
	if write && have && !solo {
		// A read/write session is used once; it takes this one's place on the token.
		_ = t.lib.ctx.CloseSession(s)
		have = false
	}
	var err error
	if !have {
		flags := uint(p11.CKF_SERIAL_SESSION)
		if write || solo || t.cfg.Profile.readWrite {
			flags |= p11.CKF_RW_SESSION
		}
		if s, err = t.lib.ctx.OpenSession(slot, flags); err != nil {
			err = t.cfg.Profile.translate(call("C_OpenSession", err))
			giveUp = t.mayShrink(err)
			return gen, err
		}
	}

	// 3. The work, then the session goes on top of the stack or is closed.
	var e *hsm.Error
	if err = t.cfg.Profile.translate(f(s, gen)); errors.As(err, &e) || write && !solo {
		_ = t.lib.ctx.CloseSession(s)
		if hsm.ClassifyError(err) == hsm.ClassSession {
			// The token lost this session, and likely the idle ones with it.
			t.dropIdle()
		}
		giveUp = t.mayShrink(err)
		return gen, err
	}
	t.mu.Lock()
	if err == nil { // a key that is not unwrapped, for instance, says nothing about the token
		t.starved = time.Time{}
	}
	t.idle = append(t.idle, s)
	t.mu.Unlock()
	return gen, err
}

// mayShrink says whether err asks for a smaller pool, and leaves at least one session in it.
func (t *Token) mayShrink(err error) bool {
	if hsm.ClassifyError(err) != hsm.ClassBackpressure {
		return false
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if cap(t.sem)-t.lost > 1 {
		return true
	}
	if t.starved.IsZero() {
		t.starved = time.Now() // interval
	}
	return false
}

// starving says that for a while the token had not room for a single session.
func (t *Token) starving() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return !t.starved.IsZero() && time.Since(t.starved) > starvation
}

// dropIdle closes the sessions that are not lent. The caller holds use, and the library is the sessions' own.
func (t *Token) dropIdle() {
	t.mu.Lock()
	idle := t.idle
	t.idle = nil
	t.mu.Unlock()
	for _, s := range idle {
		_ = t.lib.ctx.CloseSession(s)
	}
}

// Package pkcs11 drives one PKCS#11 token through a module loaded into this process (PKCS#11 v2.40, OASIS), and
// satisfies hsm.Token. A module is a vendor's C code with our address space, and a call into it cannot be called off:
// hsm/worker therefore runs this package in a process of its own. cgo and github.com/miekg/pkcs11 stop here.
//
// # Sessions
//
// A session serves one goroutine at a time (SoftHSM2 crashes otherwise). One session is pinned: it is logged in and
// never lent, so that the login outlives the others. The rest are opened at need, up to min(MaxSessions,
// ulMaxSessionCount-1), and lent last in, first out; read-only for operations, read/write and used once for
// generating and destroying keys. A token with room for a single session lends that one, read/write, for everything.
// A session that saw an error of the module is closed, whatever the error.
//
// # Errors
//
// What is done about a failed call follows hsm.Class of its return value, each remedy at most once a call. C_Sign itself
// runs at most twice; C_GenerateKey and C_GenerateKeyPair never again once called, nor what follows a C_DestroyObject.
//
//	permanent     answered to the caller
//	session       another session, then reconnect
//	refind        the key's handle is forgotten and found again, then reconnect
//	login         C_Login on the pinned session, handles forgotten; then reconnect
//	reconnect     C_Finalize, C_Initialize, find the token, C_Login. CKR_GENERAL_ERROR,
//	              CKR_FUNCTION_FAILED and numbers without a name first get another session: vendors use them for
//	              a bad request too, and a reconnect disturbs every call on the module
//	backpressure  the pool gives up one session until the next reconnect; when no session can be had for 2 s, reconnect
//	fatal         the PIN was refused: the token is latched, every call from then on answers hsm.ErrNeedsOperator,
//	              and no PIN is presented again
//
// A reconnect that has not helped is not repeated at once, however many calls fail: there is a pause of 0.25 s, doubling up
// to 4 s, in which calls go on and those that fail are answered as they are.
//
// Login and reconnect are single-flight: the generation counter tells a goroutine whether what it saw fail has been
// repaired since; one repairs, the others wait under their ctx. After a failed reconnect a breaker refuses calls with
// hsm.ErrUnavailable for 0.25 s, doubling up to 30 s; the first call after that tries again. Handles of keys are
// cached by label within a generation.
package pkcs11

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
	"unicode/utf8"

	p11 "github.com/miekg/pkcs11"
	"github.com/sirupsen/logrus"

	"yinjian/hsm"
	"yinjian/hsm/pkcs11/profiles"
)

// DefaultMaxSessions is used where Config says nothing: two to four times the cores of a small cipher machine.
const DefaultMaxSessions = 16

// maxData bounds what Do takes, in bytes; our module's frame holds 1 MiB.
const maxData = 512 << 10

// Config says which token is opened and how.
type Config struct {
	// Module is the absolute path of the shared library.
	Module string
	// ModuleArgs is passed to C_Initialize as pReserved, a C string, when not empty: NSS and our module
	// (socket='/path/p11.sock') read it. SoftHSM2 refuses one.
	ModuleArgs string
	// TokenLabel finds the token: CKA_LABEL as CK_TOKEN_INFO has it, without the padding.
	TokenLabel string
	// PIN is the user's PIN. It is copied; the caller zeroises its own after Open. The copy lives until Close or until
	// the token refuses it, for a reconnect has to log in again.
	PIN     []byte
	Profile Profile
	// MaxSessions bounds the sessions that are lent at once; 0: DefaultMaxSessions.
	MaxSessions int
	// WrappedKeys bounds the wrapped keys that are kept unwrapped; 0: DefaultWrappedKeys.
	WrappedKeys int
	// BeforeLogin, when set, is called before each C_Login. A supervisor counts by it how often a PIN that was never
	// accepted has been presented, should the module crash or hang in C_Login.
	BeforeLogin func()
	Log         logrus.FieldLogger
}

// A Token is one logged-in token. It implements hsm.Token and is safe for concurrent use.
type Token struct {
	cfg     Config // without the PIN
	lib     *library
	sem     chan struct{} // a value for each session that may be lent
	repairs sync.WaitGroup
	lent    sync.WaitGroup
	keygen  sync.Mutex // held while a label is looked for and its key made
	holders []*holder  // of unwrapped keys; a key's digest says which

	mu         sync.Mutex // guards what follows
	pin        []byte     // zeroised when closed or latched; read by the repairing goroutine
	gen        uint64     // counts logins; handles belong to one
	libGen     uint64     // library generation that the sessions belong to
	tried      uint64     // library generation that the last reconnect worked in, successful or not
	slot       uint
	pinned     p11.SessionHandle
	hasPinned  bool
	solo       bool // the token has room for one session
	limit      int  // sessions that may be lent, at most cap(sem)
	lost       int  // values missing from sem: sessions given up, or above limit
	idle       []p11.SessionHandle
	handles    map[handleKey]p11.ObjectHandle
	keks       map[string]p11.ObjectHandle // wrapping keys that were found fit, by label
	repairing  chan struct{}               // not nil while a repair runs; closed at its end
	failures   int                         // consecutive failed repairs
	starved    time.Time                   // monotonic: since when there is no room for a single session; zero while there is
	retryAt    time.Time                   // monotonic: no repair before
	calmUntil  time.Time                   // monotonic: no reconnect before for an error of what the last one made
	reconnects int                         // that followed each other closely
	lastErr    error                       // of the last failed repair
	latched    error                       // a PIN was refused, or the token was closed
	closed     bool
}

var _ hsm.Token = (*Token)(nil)

// Open loads and initialises the module, finds the token by its label, and logs in, presenting the PIN once.
//
// An error that is hsm.ErrNeedsOperator means that the PIN was refused, or that the token says it is locked: it must
// not be opened again with the same PIN. An error with an *hsm.Error of another class may pass. ctx is looked at
// between the steps.
func Open(ctx context.Context, cfg Config) (*Token, error) {
	if cfg.TokenLabel == "" {
		return nil, errors.New("hsm/pkcs11: opening: no token label")
	}
	if cfg.Log == nil {
		return nil, errors.New("hsm/pkcs11: opening: no logger")
	}
	if cfg.MaxSessions == 0 {
		cfg.MaxSessions = DefaultMaxSessions
	}
	if cfg.WrappedKeys == 0 {
		cfg.WrappedKeys = DefaultWrappedKeys
	}
	if cfg.WrappedKeys < 1 || cfg.WrappedKeys > 1<<20 {
		return nil, fmt.Errorf("hsm/pkcs11: opening: %d wrapped keys, want 1 to %d", cfg.WrappedKeys, 1<<20)
	}
	if cfg.MaxSessions < 1 || cfg.MaxSessions > 1024 {
		return nil, fmt.Errorf("hsm/pkcs11: opening: %d sessions, want 1 to 1024", cfg.MaxSessions)
	}
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("hsm/pkcs11: opening token %q: %w", cfg.TokenLabel, err)
	}
	lib, err := acquireLibrary(cfg.Module, cfg.ModuleArgs, cfg.TokenLabel)
	if err != nil {
		return nil, fmt.Errorf("hsm/pkcs11: opening token %q: %w", cfg.TokenLabel, err)
	}
	t := &Token{cfg: cfg, lib: lib, sem: make(chan struct{}, cfg.MaxSessions), limit: cfg.MaxSessions,
		pin: bytes.Clone(cfg.PIN), handles: map[handleKey]p11.ObjectHandle{}, keks: map[string]p11.ObjectHandle{}}
	holders := min(maxHolders, cfg.WrappedKeys, max(1, cfg.MaxSessions/4))
	for range holders {
		t.holders = append(t.holders, newHolder(t, cfg.WrappedKeys/holders))
	}
	t.cfg.PIN = nil
	t.cfg.Log = cfg.Log.WithField("token", cfg.TokenLabel)
	for range cfg.MaxSessions {
		t.sem <- struct{}{}
	}
	err = ctx.Err()
	if err == nil {
		err = t.connect(true)
	}
	if err != nil {
		_ = t.Close()
		return nil, fmt.Errorf("hsm/pkcs11: opening token %q: %w", cfg.TokenLabel, err)
	}
	return t, nil
}

// Sessions is how many operations can be under way at once. It shrinks and grows with what the token allows.
func (t *Token) Sessions() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return cap(t.sem) - t.lost
}

// Info implements hsm.Token.
func (t *Token) Info(ctx context.Context) (hsm.TokenInfo, error) {
	var info hsm.TokenInfo
	err := t.run(ctx, false, func(p11.SessionHandle, uint64) error {
		t.mu.Lock()
		slot := t.slot
		t.mu.Unlock()
		ti, err := t.lib.tokenInfo(slot)
		if err != nil {
			return err
		}
		li, err := t.lib.ctx.GetInfo()
		if err != nil {
			return call("C_GetInfo", err)
		}
		info = describe(slot, ti, li)
		return nil
	})
	if err != nil {
		return hsm.TokenInfo{}, fmt.Errorf("hsm/pkcs11: token information: %w", err)
	}
	return info, nil
}

func describe(slot uint, ti p11.TokenInfo, li p11.Info) hsm.TokenInfo {
	return hsm.TokenInfo{
		Slot: slot, Label: ti.Label, Manufacturer: ti.ManufacturerID, Model: ti.Model, Serial: ti.SerialNumber,
		Firmware:        fmt.Sprintf("%d.%d", ti.FirmwareVersion.Major, ti.FirmwareVersion.Minor),
		Library:         fmt.Sprintf("%s %d.%d", li.LibraryDescription, li.LibraryVersion.Major, li.LibraryVersion.Minor),
		MaxSessions:     sessionLimit(ti),
		Initialized:     ti.Flags&p11.CKF_TOKEN_INITIALIZED != 0,
		UserPINLocked:   ti.Flags&p11.CKF_USER_PIN_LOCKED != 0,
		UserPINFinalTry: ti.Flags&p11.CKF_USER_PIN_FINAL_TRY != 0,
	}
}

// sessionLimit is ulMaxSessionCount, or 0 where it is unknown or unlimited. CK_UNAVAILABLE_INFORMATION is ~0, some
// modules say 32 bits of it.
func sessionLimit(ti p11.TokenInfo) uint {
	if ti.MaxSessionCount == p11.CK_EFFECTIVELY_INFINITE || ti.MaxSessionCount >= 0xFFFFFFFF {
		return 0
	}
	return ti.MaxSessionCount
}

// Random implements hsm.Token.
func (t *Token) Random(ctx context.Context, n int) ([]byte, error) {
	if n < 1 || n > 1024 {
		return nil, fmt.Errorf("hsm/pkcs11: %d random bytes: want 1 to 1024", n)
	}
	if t.cfg.Profile.noRandom {
		return nil, fmt.Errorf("hsm/pkcs11: profile %q avoids the random source: %w", t.cfg.Profile.Name,
			&hsm.Error{Call: profiles.GenerateRandom, RV: 0x54})
	}
	var out []byte
	err := t.run(ctx, false, func(s p11.SessionHandle, _ uint64) (err error) {
		out, err = t.lib.ctx.GenerateRandom(s, n)
		return call("C_GenerateRandom", err)
	})
	if err != nil {
		return nil, fmt.Errorf("hsm/pkcs11: random bytes: %w", err)
	}
	return out, nil
}

// Do implements hsm.Token. data of MACSM3 and SignSM2M is at most 512 KiB, of the others 32 bytes.
func (t *Token) Do(ctx context.Context, label string, op hsm.Operation, data []byte) ([]byte, error) {
	m, ok := t.cfg.Profile.Operations[op]
	if !ok {
		return nil, fmt.Errorf("hsm/pkcs11: profile %q has no operation %s: %w", t.cfg.Profile.Name, op,
			&hsm.Error{Call: "C_SignInit", RV: 0x70})
	}
	whole := op == hsm.MACSM3 || op == hsm.SignSM2M // takes messages
	if !whole && len(data) != 32 || len(data) > maxData {
		return nil, fmt.Errorf("hsm/pkcs11: %s over %d bytes: %w", op, len(data), &hsm.Error{Call: "C_Sign", RV: 0x21})
	}
	key := handleKey{label: label, secret: op == hsm.MACSM3}
	input := m.input(data)
	var out []byte
	err := t.run(ctx, false, func(s p11.SessionHandle, gen uint64) error {
		h, err := t.handle(s, gen, key)
		if err != nil {
			return err
		}
		if m.Input == InputZM {
			if input, err = t.withZA(s, label, data); err != nil {
				return err
			}
		}
		out, err = t.lib.sign(s, m, h, input)
		if err = t.cfg.Profile.translate(err); hsm.ClassifyError(err) == hsm.ClassRefind {
			t.forget(key, h)
			if e := t.loggedIn(s); e != nil {
				return e
			}
		}
		return err
	})
	if err == nil {
		err = m.Output.check(out)
	}
	if err != nil {
		return nil, fmt.Errorf("hsm/pkcs11: %s with key %q: %w", op, label, err)
	}
	return out, nil
}

// Close waits for the sessions that are lent, closes all, and finalises the module unless another Token uses it.
func (t *Token) Close() error {
	t.mu.Lock()
	if t.closed {
		t.mu.Unlock()
		return nil
	}
	t.closed = true
	if t.latched == nil {
		t.latched = fmt.Errorf("%w: the token was closed", hsm.ErrUnavailable)
	}
	t.mu.Unlock()

	t.repairs.Wait()
	t.lent.Wait()
	t.lib.use.RLock()
	for _, h := range t.holders {
		h.use.Lock()
		h.reset(t.lib.up && h.libGen == t.lib.gen)
		h.use.Unlock()
	}
	t.mu.Lock()
	if t.lib.up && t.libGen == t.lib.gen {
		for _, s := range t.idle {
			_ = t.lib.ctx.CloseSession(s)
		}
		if t.hasPinned {
			_ = t.lib.ctx.CloseSession(t.pinned)
		}
	}
	t.idle, t.hasPinned = nil, false
	zeroise(t.pin)
	t.pin = nil
	t.mu.Unlock()
	t.lib.use.RUnlock()
	t.lib.release(t.cfg.TokenLabel)
	return nil
}

func checkLabel(label string) error {
	if label == "" || len(label) > 128 || !utf8.ValidString(label) {
		return fmt.Errorf("hsm/pkcs11: key label of %d bytes: want 1 to 128 bytes of UTF-8", len(label))
	}
	return nil
}

package pkcs11

import (
	"errors"
	"fmt"
	"path/filepath"
	"runtime"
	"strings"
	"sync"

	p11 "github.com/miekg/pkcs11"

	"yinjian/hsm"
)

// A library is one module in this process. PKCS#11 has one C_Initialize a process and module, one login a token, so
// all Tokens on a module share it.
type library struct {
	path string
	ctx  *p11.Ctx
	list listPointer

	refs   int             // guarded by libraries.mu
	args   string          // guarded by libraries.mu: pReserved of the C_Initialize in force
	tokens map[string]bool // guarded by libraries.mu: labels that are open

	// use is held for reading around each use of a session, and for writing around C_Finalize and C_Initialize: a
	// session handle of the old instance may name another's session in the new one.
	use sync.RWMutex
	gen uint64 // guarded by use: counts C_Initialize, so that handles can be told from older ones
	up  bool   // guarded by use: C_Initialize was the last of the two that succeeded
}

// libraries are loaded once and never unloaded.
var libraries = struct {
	mu     sync.Mutex
	byPath map[string]*library
}{byPath: map[string]*library{}}

// acquireLibrary loads and initialises the module unless it is already. label, when not empty, is reserved: one Token
// a label and process, for login is shared by all sessions of a token and closing one Token would log out the other.
func acquireLibrary(path, args, label string) (*library, error) {
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return nil, fmt.Errorf("module: %w", err)
	}
	if !filepath.IsAbs(path) {
		return nil, fmt.Errorf("module %q: the path must be absolute", path)
	}
	if strings.ContainsRune(args, 0) {
		return nil, errors.New("module arguments contain a zero byte")
	}
	libraries.mu.Lock()
	defer libraries.mu.Unlock()
	l, err := loadLocked(real)
	if err != nil {
		return nil, err
	}
	if l.tokens[label] {
		return nil, fmt.Errorf("token %q of module %s is open in this process already", label, path)
	}
	if l.refs > 0 && l.args != args {
		return nil, fmt.Errorf("module %s is in use in this process with other arguments", path)
	}
	if l.refs == 0 {
		l.args = args
		l.use.Lock()
		if !l.up {
			err = l.initializeLocked()
		}
		l.use.Unlock()
		if err != nil {
			return nil, err
		}
	}
	l.refs++
	if label != "" {
		l.tokens[label] = true
	}
	return l, nil
}

// loadLocked loads the module unless it is already. libraries.mu is held.
func loadLocked(real string) (*library, error) {
	l := libraries.byPath[real]
	if l == nil {
		ctx, list, err := loadModule(real)
		if err != nil {
			return nil, err
		}
		l = &library{path: real, ctx: ctx, list: list, tokens: map[string]bool{}}
		libraries.byPath[real] = l
	}
	return l, nil
}

// release gives the library back; the last one out finalises it.
func (l *library) release(label string) {
	libraries.mu.Lock()
	defer libraries.mu.Unlock()
	if label != "" {
		delete(l.tokens, label)
	}
	if l.refs--; l.refs > 0 {
		return
	}
	l.use.Lock()
	defer l.use.Unlock()
	if l.up {
		// An error leaves the module in a state that the next C_Initialize will report.
		_ = l.ctx.Finalize()
		l.up = false
	}
}

// restart finalises and initialises the module, unless that was done since the caller saw generation seen. It waits
// for all sessions in use, of every Token on the module.
func (l *library) restart(seen uint64) error {
	l.use.Lock()
	defer l.use.Unlock()
	if l.up && l.gen != seen {
		return nil
	}
	if l.up {
		l.up = false
		// Whatever is wrong, C_Initialize is the judge: a device that is gone fails both.
		_ = l.ctx.Finalize()
	}
	return l.initializeLocked()
}

func (l *library) initializeLocked() error {
	if err := initialize(l.ctx, l.args); err != nil {
		return err
	}
	l.up = true
	l.gen++
	return nil
}

// errStale means that the module was restarted, or is about to be, since the Token logged in. It has the class of a lost
// connection.
var errStale = fmt.Errorf("the module was restarted: %w", &hsm.Error{Call: "C_OpenSession", RV: 0x190})

// slots lists the slots that hold a token. The caller holds use.
func (l *library) slots() ([]uint, error) {
	s, err := l.ctx.GetSlotList(true)
	return s, call("C_GetSlotList", err)
}

// tokenInfo describes the token in slot. The caller holds use.
func (l *library) tokenInfo(slot uint) (p11.TokenInfo, error) {
	ti, err := l.ctx.GetTokenInfo(slot)
	return ti, call("C_GetTokenInfo", err)
}

// errNoToken has the class of a lost connection: a token that is away may come back.
var errNoToken = fmt.Errorf("no slot holds a token with this label: %w", &hsm.Error{Call: "C_GetSlotList", RV: 0xE0})

// findToken answers the slot of the initialised token with this label; more than one is an error that no retry
// mends. The caller holds use.
func (l *library) findToken(label string) (uint, p11.TokenInfo, error) {
	slots, err := l.slots()
	if err != nil {
		return 0, p11.TokenInfo{}, err
	}
	var found []uint
	var info p11.TokenInfo
	var firstErr error
	for _, slot := range slots {
		ti, err := l.tokenInfo(slot)
		if err != nil {
			// One slot's token pulled out must not hide another's.
			if firstErr == nil {
				firstErr = err
			}
			continue
		}
		if ti.Flags&p11.CKF_TOKEN_INITIALIZED != 0 && ti.Label == label {
			found, info = append(found, slot), ti
		}
	}
	switch {
	case len(found) == 1:
		return found[0], info, nil
	case len(found) > 1:
		return 0, p11.TokenInfo{}, fmt.Errorf("%d tokens are labelled %q", len(found), label)
	case firstErr != nil:
		return 0, p11.TokenInfo{}, firstErr
	}
	return 0, p11.TokenInfo{}, errNoToken
}

func zeroise(b []byte) {
	clear(b)
	runtime.KeepAlive(&b)
}

package pkcs11

import (
	"errors"
	"fmt"
	"strings"

	p11 "github.com/miekg/pkcs11"

	"yinjian/hsm"
)

// labelSize is the width of CK_TOKEN_INFO.label in bytes.
const labelSize = 32

// AnySlot lets Provision take the first slot whose token is not initialised.
const AnySlot = -1

// ProvisionConfig says which token is to exist.
type ProvisionConfig struct {
	Module     string // absolute path
	ModuleArgs string // as in Config
	// Slot is an index into the module's list of slots with a token, or AnySlot.
	Slot           int
	Label          string // 1 to 32 bytes
	SOPIN, UserPIN []byte // the caller zeroises them afterwards
}

// ProvisionResult says what was found or done.
type ProvisionResult struct {
	Slot   uint
	Serial string
	// Outcome is "existing" (the token was there, with a user PIN: nothing was done), "completed" (it was there, and
	// the user PIN was missing: a run before was interrupted) or "created".
	Outcome string
}

// ListSlots describes the tokens of a module, the uninitialised ones too, in the module's order.
func ListSlots(module, moduleArgs string) ([]hsm.TokenInfo, error) {
	infos, err := listSlots(module, moduleArgs)
	if err != nil {
		return nil, fmt.Errorf("hsm/pkcs11: listing slots: %w", err)
	}
	return infos, nil
}

func listSlots(module, moduleArgs string) ([]hsm.TokenInfo, error) {
	lib, err := acquireLibrary(module, moduleArgs, "")
	if err != nil {
		return nil, err
	}
	defer lib.release("")
	lib.use.RLock()
	defer lib.use.RUnlock()
	if !lib.up {
		return nil, errStale
	}
	li, err := lib.ctx.GetInfo()
	if err != nil {
		return nil, call("C_GetInfo", err)
	}
	slots, err := lib.slots()
	if err != nil {
		return nil, err
	}
	infos := make([]hsm.TokenInfo, 0, len(slots))
	for _, slot := range slots {
		ti, err := lib.tokenInfo(slot)
		if err != nil {
			return nil, fmt.Errorf("slot %d: %w", slot, err)
		}
		infos = append(infos, describe(slot, ti, li))
	}
	return infos, nil
}

// Provision makes a token with that label and both PINs (C_InitToken, C_InitPIN), once: a token with the label that
// has a user PIN is left alone, and its PINs are not tried. Where an earlier run stopped between the two steps the
// second one is made up for, which presents the SO PIN once.
//
// It restarts the module (C_Finalize, C_Initialize) after C_InitToken, as some show the new token only then; Tokens
// open on the module in this process reconnect. A slot that holds another initialised token is refused: initialising
// it again would destroy its keys.
func Provision(cfg ProvisionConfig) (ProvisionResult, error) {
	res, err := provision(cfg)
	if err != nil {
		return ProvisionResult{}, fmt.Errorf("hsm/pkcs11: provisioning token %q: %w", cfg.Label, err)
	}
	return res, nil
}

func provision(cfg ProvisionConfig) (ProvisionResult, error) {
	if cfg.Label == "" || len(cfg.Label) > labelSize || strings.TrimSpace(cfg.Label) != cfg.Label || strings.ContainsRune(cfg.Label, 0) {
		return ProvisionResult{}, fmt.Errorf("label: want 1 to %d bytes without blanks at the ends", labelSize)
	}
	if len(cfg.SOPIN) == 0 || len(cfg.UserPIN) == 0 {
		return ProvisionResult{}, errors.New("both PINs are needed")
	}
	lib, err := acquireLibrary(cfg.Module, cfg.ModuleArgs, "")
	if err != nil {
		return ProvisionResult{}, err
	}
	defer lib.release("")

	// 1. The token may be there.
	slot, ti, gen, err := lib.lookup(cfg.Label)
	switch {
	case err == nil && ti.Flags&p11.CKF_USER_PIN_INITIALIZED != 0:
		return ProvisionResult{Slot: slot, Serial: ti.SerialNumber, Outcome: "existing"}, nil
	case err == nil:
		if err := lib.setUserPIN(slot, cfg); err != nil {
			return ProvisionResult{}, err
		}
		return ProvisionResult{Slot: slot, Serial: ti.SerialNumber, Outcome: "completed"}, nil
	case !errors.Is(err, errNoToken):
		return ProvisionResult{}, err
	}

	// 2. C_InitToken on an uninitialised token.
	if err := lib.initFreeSlot(cfg); err != nil {
		return ProvisionResult{}, err
	}

	// 3. See it. A stop from here on is made up for by the next run.
	if err := lib.restart(gen); err != nil {
		return ProvisionResult{}, err
	}
	if slot, ti, _, err = lib.lookup(cfg.Label); err != nil {
		return ProvisionResult{}, fmt.Errorf("after C_InitToken: %w", err)
	}
	if err := lib.setUserPIN(slot, cfg); err != nil {
		return ProvisionResult{}, err
	}
	return ProvisionResult{Slot: slot, Serial: ti.SerialNumber, Outcome: "created"}, nil
}

// lookup is findToken with the lock, and the generation it looked in.
func (l *library) lookup(label string) (uint, p11.TokenInfo, uint64, error) {
	l.use.RLock()
	defer l.use.RUnlock()
	if !l.up {
		return 0, p11.TokenInfo{}, 0, errStale
	}
	slot, ti, err := l.findToken(label)
	return slot, ti, l.gen, err
}

func (l *library) initFreeSlot(cfg ProvisionConfig) error {
	l.use.RLock()
	defer l.use.RUnlock()
	slots, err := l.slots()
	if err != nil {
		return err
	}
	if cfg.Slot != AnySlot && (cfg.Slot < 0 || cfg.Slot >= len(slots)) {
		return fmt.Errorf("slot index %d: the module has %d slots with a token", cfg.Slot, len(slots))
	}
	for i, slot := range slots {
		if cfg.Slot != AnySlot && cfg.Slot != i {
			continue
		}
		ti, err := l.tokenInfo(slot)
		if err != nil {
			return err
		}
		if ti.Flags&p11.CKF_TOKEN_INITIALIZED == 0 {
			return l.initToken(slot, cfg.SOPIN, cfg.Label)
		}
		if cfg.Slot == i {
			return fmt.Errorf("slot index %d holds the initialised token %q, which is left alone", i, ti.Label)
		}
	}
	return errors.New("no slot with an uninitialised token")
}

// setUserPIN logs in as security officer, once, and sets the user's PIN.
func (l *library) setUserPIN(slot uint, cfg ProvisionConfig) error {
	l.use.RLock()
	defer l.use.RUnlock()
	if !l.up {
		return errStale
	}
	s, err := l.ctx.OpenSession(slot, p11.CKF_SERIAL_SESSION|p11.CKF_RW_SESSION)
	if err != nil {
		return call("C_OpenSession", err)
	}
	// Closing the session, the only one on this token, ends the login.
	defer l.ctx.CloseSession(s)
	if err := l.login(s, p11.CKU_SO, cfg.SOPIN); err != nil {
		return err
	}
	defer l.ctx.Logout(s)
	return l.initPIN(s, cfg.UserPIN)
}

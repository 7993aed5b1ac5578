package pkcs11

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"errors"
	"fmt"

	"github.com/emmansun/gmsm/sm3"
	p11 "github.com/miekg/pkcs11"

	"yinjian/hsm"
)

// A KEKConfig says which wrapping key is to be on which token.
type KEKConfig struct {
	Module     string // absolute path
	ModuleArgs string // as in Config
	TokenLabel string
	Profile    Profile
	Label      string // CKA_LABEL
	// Value is the key, KEKSize bytes. It is passed to C_CreateObject; the caller wipes it.
	Value          []byte
	SOPIN, UserPIN []byte // each is presented once, the user's again after a failure of the officer's; the caller wipes them
}

// KEKSize is how many bytes a wrapping key has.
const KEKSize = 16

// InstallKEK brings a wrapping key onto a token, as its user, and has the security officer mark it as trusted. It reads
// the attributes back, and destroys a key that is not sensitive, could leave, or was not marked. A key with that label is an
// error ([hsm.ErrKeyExists]): it is neither replaced, marked nor destroyed.
//
// No Token may be open on the token in this process: login is for all of its sessions. A value that went through C_CreateObject
// was outside, so CKA_LOCAL and CKA_NEVER_EXTRACTABLE stay false for ever. The module's copy of the value lies in memory that
// is not wiped here.
func InstallKEK(cfg KEKConfig) error {
	if err := installKEK(cfg); err != nil {
		return fmt.Errorf("hsm/pkcs11: wrapping key %q on token %q: %w", cfg.Label, cfg.TokenLabel, err)
	}
	return nil
}

func installKEK(cfg KEKConfig) error {
	if cfg.Profile.Wrapping.Form == 0 {
		return fmt.Errorf("%w: profile %q names no wrapping operation", hsm.ErrNoWrapping, cfg.Profile.Name)
	}
	if err := checkLabel(cfg.Label); err != nil {
		return err
	}
	if len(cfg.Value) != KEKSize {
		return fmt.Errorf("a value of %d bytes, want %d", len(cfg.Value), KEKSize)
	}
	if len(cfg.SOPIN) == 0 || len(cfg.UserPIN) == 0 {
		return errors.New("both PINs are needed")
	}
	if err := cfg.Profile.checkPIN(cfg.UserPIN); err != nil {
		return err
	}
	lib, err := acquireLibrary(cfg.Module, cfg.ModuleArgs, cfg.TokenLabel)
	if err != nil {
		return err
	}
	defer lib.release(cfg.TokenLabel)
	lib.use.RLock()
	defer lib.use.RUnlock()
	if !lib.up {
		return errStale
	}
	slot, _, err := lib.findToken(cfg.TokenLabel)
	if err != nil {
		return err
	}
	t := &Token{cfg: Config{Profile: cfg.Profile}, lib: lib} // for its searches alone
	s, err := lib.ctx.OpenSession(slot, p11.CKF_SERIAL_SESSION|p11.CKF_RW_SESSION)
	if err != nil {
		return call("C_OpenSession", err)
	}
	defer func() { _ = lib.ctx.CloseSession(s) }()

	// 1. The user brings the key.
	if err := t.login(s, cfg.UserPIN, false); err != nil {
		return err
	}
	err = t.createKEK(s, cfg)
	if lerr := call("C_Logout", lib.ctx.Logout(s)); err == nil {
		err = lerr
	}
	if err != nil {
		return err
	}

	// 2. The officer marks it. A stop before this leaves a key that wraps nothing that wants a trusted one; a failure, a wrong
	// PIN say, must not leave one that stands in the way of the next attempt.
	if err = t.trustKEK(s, cfg); err == nil {
		return nil
	}
	if derr := t.withdrawKEK(s, cfg); derr != nil {
		return fmt.Errorf("%w; the key is still there, destroying it: %w", err, derr)
	}
	return fmt.Errorf("%w; the key was destroyed", err)
}

// labelled finds the one secret key with the label.
func (t *Token) labelled(s p11.SessionHandle, label string) (p11.ObjectHandle, error) {
	found, err := t.objects(s, 2, p11.NewAttribute(p11.CKA_CLASS, uint(p11.CKO_SECRET_KEY)), p11.NewAttribute(p11.CKA_LABEL, label))
	if err == nil {
		err = exactlyOne(len(found))
	}
	if err != nil {
		return 0, err
	}
	return found[0], nil
}

// trustKEK has the security officer mark the key.
func (t *Token) trustKEK(s p11.SessionHandle, cfg KEKConfig) error {
	lib := t.lib
	if err := cfg.Profile.translate(lib.login(s, p11.CKU_SO, cfg.SOPIN)); err != nil {
		return err
	}
	defer func() { _ = lib.ctx.Logout(s) }()
	key, err := t.labelled(s, cfg.Label)
	if err != nil {
		return fmt.Errorf("as the security officer sees it: %w", err)
	}
	if err := lib.ctx.SetAttributeValue(s, key, []*p11.Attribute{p11.NewAttribute(p11.CKA_TRUSTED, true)}); err != nil {
		return fmt.Errorf("marking it as trusted: %w", call("C_SetAttributeValue", err))
	}
	a, err := t.attributes(s, key, p11.CKA_TRUSTED)
	if err == nil && !boolean(a[p11.CKA_TRUSTED]) {
		err = errors.New("the token says that it is not trusted")
	}
	return err
}

// withdrawKEK has the user destroy the key that createKEK made.
func (t *Token) withdrawKEK(s p11.SessionHandle, cfg KEKConfig) error {
	if err := t.login(s, cfg.UserPIN, false); err != nil {
		return err
	}
	defer func() { _ = t.lib.ctx.Logout(s) }()
	key, err := t.labelled(s, cfg.Label)
	if err != nil {
		return err
	}
	return call("C_DestroyObject", t.lib.ctx.DestroyObject(s, key))
}

// createKEK is C_CreateObject, unless the label is taken, and a look at what came of it.
func (t *Token) createKEK(s p11.SessionHandle, cfg KEKConfig) error {
	found, err := t.objects(s, 1, p11.NewAttribute(p11.CKA_LABEL, cfg.Label))
	if err != nil {
		return err
	}
	if len(found) > 0 {
		return hsm.ErrKeyExists
	}
	kek := cfg.Profile.Wrapping.KEK
	value := bytes.Clone(cfg.Value)
	defer zeroise(value)
	template := kek.finish([]*p11.Attribute{
		p11.NewAttribute(p11.CKA_CLASS, uint(p11.CKO_SECRET_KEY)), p11.NewAttribute(p11.CKA_KEY_TYPE, kek.KeyType),
		p11.NewAttribute(p11.CKA_TOKEN, true), p11.NewAttribute(p11.CKA_PRIVATE, true),
		p11.NewAttribute(p11.CKA_SENSITIVE, true), p11.NewAttribute(p11.CKA_EXTRACTABLE, false),
		p11.NewAttribute(p11.CKA_WRAP, true), p11.NewAttribute(p11.CKA_UNWRAP, true),
		p11.NewAttribute(p11.CKA_ENCRYPT, false), p11.NewAttribute(p11.CKA_DECRYPT, false),
		p11.NewAttribute(p11.CKA_LABEL, cfg.Label), p11.NewAttribute(p11.CKA_VALUE, value),
	}, kek.Private)
	h, err := t.lib.ctx.CreateObject(s, template)
	if err != nil {
		return call("C_CreateObject", err)
	}
	a, err := t.attributes(s, h, p11.CKA_SENSITIVE, p11.CKA_EXTRACTABLE, p11.CKA_DECRYPT)
	if err == nil && (!boolean(a[p11.CKA_SENSITIVE]) || len(a[p11.CKA_EXTRACTABLE]) != 1 || boolean(a[p11.CKA_EXTRACTABLE]) || boolean(a[p11.CKA_DECRYPT])) {
		err = errors.New("the token made the key readable, extractable or able to decrypt; it was destroyed")
	}
	if err != nil {
		if derr := t.lib.ctx.DestroyObject(s, h); derr != nil {
			err = fmt.Errorf("%w; destroying it: %w", err, call("C_DestroyObject", derr))
		}
	}
	return err
}

// MACSize is how many bytes a MAC key has that is brought from outside.
const MACSize = 32

// ImportMAC brings a key for HMAC-SM3 onto the token (C_CreateObject), as custodians' shares make it: sensitive, not
// extractable, and, since it was outside, CKA_LOCAL and CKA_NEVER_EXTRACTABLE false for ever. It has the key answer, and
// destroys one that answers anything but HMAC-SM3 under the value. A key with that label is an error ([hsm.ErrKeyExists]).
// The value has MACSize bytes and is wiped by the caller; the module's copy is not. No worker does it: it is for ceremonies.
func (t *Token) ImportMAC(ctx context.Context, label string, value []byte) error {
	if err := t.importMAC(ctx, label, value); err != nil {
		return fmt.Errorf("hsm/pkcs11: importing MAC key %q: %w", label, err)
	}
	return nil
}

func (t *Token) importMAC(ctx context.Context, label string, value []byte) error {
	if err := checkLabel(label); err != nil {
		return err
	}
	if len(value) != MACSize {
		return fmt.Errorf("a value of %d bytes, want %d", len(value), MACSize)
	}
	template, ok := t.cfg.Profile.Keys[hsm.HMACSM3]
	op, does := t.cfg.Profile.Operations[hsm.MACSM3]
	if !ok || !does {
		return fmt.Errorf("profile %q has no HMAC-SM3 keys: %w", t.cfg.Profile.Name, &hsm.Error{Call: "C_CreateObject", RV: 0x70})
	}
	id, question := make([]byte, 16), make([]byte, 32)
	rand.Read(id) // never fails (crypto/rand)
	rand.Read(question)
	mac := hmac.New(sm3.New, value)
	mac.Write(question)
	want := mac.Sum(nil)
	t.keygen.Lock()
	defer t.keygen.Unlock()
	return t.run(ctx, true, func(s p11.SessionHandle, _ uint64) error {
		if err := t.loggedIn(s); err != nil {
			return err
		}
		found, err := t.objects(s, 1, p11.NewAttribute(p11.CKA_LABEL, label))
		if err != nil {
			return err
		}
		if len(found) > 0 {
			return hsm.ErrKeyExists
		}
		copied := bytes.Clone(value)
		defer zeroise(copied)
		h, err := t.lib.ctx.CreateObject(s, template.finish([]*p11.Attribute{
			p11.NewAttribute(p11.CKA_CLASS, uint(p11.CKO_SECRET_KEY)), p11.NewAttribute(p11.CKA_KEY_TYPE, template.KeyType),
			p11.NewAttribute(p11.CKA_TOKEN, true), p11.NewAttribute(p11.CKA_PRIVATE, true),
			p11.NewAttribute(p11.CKA_SENSITIVE, true), p11.NewAttribute(p11.CKA_EXTRACTABLE, false),
			p11.NewAttribute(p11.CKA_SIGN, true), p11.NewAttribute(p11.CKA_LABEL, label), p11.NewAttribute(p11.CKA_ID, id),
			p11.NewAttribute(p11.CKA_VALUE, copied),
		}, template.Private))
		if err != nil {
			return final(call("C_CreateObject", err))
		}
		a, err := t.attributes(s, h, p11.CKA_SENSITIVE, p11.CKA_EXTRACTABLE)
		if err == nil && (!boolean(a[p11.CKA_SENSITIVE]) || len(a[p11.CKA_EXTRACTABLE]) != 1 || boolean(a[p11.CKA_EXTRACTABLE])) {
			err = errors.New("the token made the key readable or extractable; it was destroyed")
		}
		if err == nil {
			var answer []byte
			if answer, err = t.lib.sign(s, op, h, op.input(question)); err == nil && !hmac.Equal(answer, want) {
				err = errors.New("the token does not answer HMAC-SM3 under the key; it was destroyed")
			}
		}
		if err != nil {
			if derr := t.lib.ctx.DestroyObject(s, h); derr != nil {
				err = fmt.Errorf("%w; destroying it: %w", err, call("C_DestroyObject", derr))
			}
		}
		return final(err)
	})
}

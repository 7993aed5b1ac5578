package softtoken

import (
	"crypto/cipher"
	"crypto/subtle"
	"errors"
	"path/filepath"
	"unicode/utf8"
)

const (
	maxPINTries = 10
	minPIN      = 4
	maxPIN      = 64
)

// A role is who is logged in.
type role uint8

const (
	nobody role = iota
	user
	officer // CKU_SO
)

// A credential is what a token keeps of one PIN: enough to check it and, with it, to open the token key.
type credential struct {
	iterations uint32
	salt       [saltSize]byte
	verifier   [32]byte // HMAC-SM3(PIN key, "verifier")
	wrapped    []byte   // the token key, sealed under HMAC-SM3(PIN key, "wrap")
}

// newCredential stretches pin under a new salt and wraps the token key with it.
func newCredential(pin, tokenKey []byte, where place) (*credential, error) {
	c := &credential{iterations: uint32(pbkdf2Iterations)}
	copy(c.salt[:], randomBytes(saltSize))
	verifier, wrap, err := c.stretch(pin)
	if err != nil {
		return nil, err
	}
	copy(c.verifier[:], verifier)
	c.wrapped = seal(wrap, where, tokenKey)
	return c, nil
}

func (c *credential) stretch(pin []byte) (verifier []byte, wrap cipher.AEAD, err error) {
	key, err := stretch(pin, c.salt[:], int(c.iterations))
	if err != nil {
		return nil, nil, err
	}
	defer clear(key)
	wrap, err = newSealer(key, "wrap")
	return derive(key, "verifier"), wrap, err
}

var errWrongPIN = errors.New("softtoken: wrong PIN")

// open compares pin and, if it is right, answers the token key.
func (c *credential) open(pin []byte, where place) ([]byte, error) {
	verifier, wrap, err := c.stretch(pin)
	if err != nil {
		return nil, err
	}
	if subtle.ConstantTimeCompare(verifier, c.verifier[:]) != 1 {
		return nil, errWrongPIN
	}
	return open(wrap, where, c.wrapped)
}

func (c *credential) encode(w *builder) {
	w.u32(c.iterations)
	w.raw(c.salt[:])
	w.raw(c.verifier[:])
	w.string(c.wrapped)
}

func decodeCredential(in *scanner) *credential {
	c := &credential{iterations: in.u32()}
	copy(c.salt[:], in.take(saltSize))
	copy(c.verifier[:], in.take(32))
	c.wrapped = append([]byte{}, in.string()...)
	if c.iterations == 0 || c.iterations > 100_000_000 {
		in.bad = true
	}
	return c
}

// wrappedPlace is where r's copy of the token key belongs.
func (t *token) wrappedPlace(s serial, r role) place {
	return place{kind: kindWrapped, slot: t.slot, serial: s, item: uint8(r)}
}

// checkNewPIN is what is asked of a PIN that is set. One that is compared may have any form.
func checkNewPIN(pin []byte) rv {
	if len(pin) < minPIN || len(pin) > maxPIN {
		return ckrPINLenRange
	}
	if !utf8.Valid(pin) {
		return ckrPINInvalid // base §3: CK_UTF8CHAR
	}
	return ckrOK
}

// tries counts PINs entered since the last right one: u8 user | u8 officer.
type tries [2]uint8

func (t *tries) of(r role) *uint8 { return &t[r-user] }

// flags are the token's PIN flags (base §3.3, CK_TOKEN_INFO).
func (t tries) flags() uint64 {
	var f uint64
	for i, n := range t {
		shift := 4 * i // the officer's flags are the user's, four bits up
		if n > 0 {
			f |= ckfUserPINCountLow << shift
		}
		if n == maxPINTries-1 {
			f |= ckfUserPINFinalTry << shift
		}
		if n >= maxPINTries {
			f |= ckfUserPINLocked << shift
		}
	}
	return f
}

// tryPIN compares pin with r's and answers the token key. The caller holds pinMu.
//
//  1. The try is counted on disk. If that fails, nothing is compared: a full disk gives no free tries.
//  2. The PIN is stretched and compared. A stop here leaves the try counted.
//  3. If it was right, the count goes back to zero, on disk too. If only that fails, the PIN was still right, and the
//     next right one sets the count anew.
func (t *token) tryPIN(r role, pin []byte) ([]byte, rv) {
	t.mu.RLock()
	rec, counted := t.rec, t.tries
	t.mu.RUnlock()
	if rec == nil {
		return nil, ckrTokenNotRecognized
	}
	cred := rec.officer
	if r == user {
		cred = rec.user
	}
	if cred == nil {
		return nil, ckrUserPINNotInitialized
	}
	if *counted.of(r) >= maxPINTries {
		return nil, ckrPINLocked
	}
	*counted.of(r)++
	if code := t.saveTries(rec.serial, counted); code != ckrOK {
		return nil, code
	}
	key, err := cred.open(pin, t.wrappedPlace(rec.serial, r))
	if errors.Is(err, errWrongPIN) {
		t.log.WithField("tries", *counted.of(r)).Warn("wrong PIN")
		return nil, ckrPINIncorrect
	}
	if err != nil {
		t.log.WithError(err).Error("token key cannot be opened with the right PIN")
		return nil, ckrDeviceError
	}
	*counted.of(r) = 0
	t.saveTries(rec.serial, counted) // logged there
	return key, ckrOK
}

// saveTries makes the counters durable. In memory they are at once what was meant to be written when that is the
// stricter value: after a failed write it is not known what the disk has.
func (t *token) saveTries(s serial, n tries) rv {
	t.mu.Lock()
	for i := range n {
		t.tries[i] = max(t.tries[i], n[i])
	}
	t.mu.Unlock()
	record := seal(t.store.sealer, place{kind: kindPINs, slot: t.slot, serial: s}, n[:])
	if err := t.store.write(t.serialDir(s), pinsFile, record); err != nil {
		t.log.WithError(err).Error("PIN counter cannot be written")
		return storageRV(err)
	}
	t.mu.Lock()
	t.tries = n
	t.mu.Unlock()
	return ckrOK
}

func (t *token) loadTries(s serial) (tries, error) {
	var n tries
	record, err := readRecord(filepath.Join(t.serialDir(s), pinsFile))
	if err != nil {
		return n, err // also when it is not there: a deleted counter is not a counter of zero
	}
	plain, err := open(t.store.sealer, place{kind: kindPINs, slot: t.slot, serial: s}, record)
	if err != nil {
		return n, err
	}
	if len(plain) != len(n) {
		return n, errors.New("PIN counter of a wrong length")
	}
	copy(n[:], plain)
	return n, nil
}

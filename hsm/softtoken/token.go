package softtoken

import (
	"bytes"
	"crypto/cipher"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/sirupsen/logrus"
)

const (
	maxObjects        = 1 << 16 // records of one token
	maxSessions       = 1024    // of one application with one token
	maxSessionObjects = 1 << 15 // of one application with one token; a wrapped key is some 2 KiB unwrapped
)

// A token is what a slot holds. Slots always hold one; it may not be initialised.
type token struct {
	slot  uint64
	store *store
	log   logrus.FieldLogger

	// pinMu makes comparisons of PINs, and changes of token.rec, one at a time. It is held while a PIN is stretched
	// and is taken before mu. It guards nothing that signing needs.
	pinMu sync.Mutex
	// saveMu makes changes of object files one at a time. It is taken after pinMu and before mu, and held while a file
	// is synced. Whoever changes records or a record's items holds both it and mu, so either is enough to read them.
	saveMu sync.Mutex

	uses useCounts

	// mu guards what follows.
	mu           sync.RWMutex
	rec          *tokenRecord // nil: not initialised. Replaced, never changed.
	tries        tries
	records      map[[16]byte]*record
	sessions     int // all applications' sessions
	initialising bool
	users        int         // applications that are logged in, as user or as security officer
	inner        cipher.AEAD // under the token key; nil unless users > 0
	// labels are the objects by CKA_LABEL; nil: to be made anew. Among the keys of thousands of signers a look at each costs
	// more than a signature.
	labels map[string][]*object
}

// A tokenRecord is token.rec.
type tokenRecord struct {
	label   [32]byte // space padded
	serial  serial
	officer *credential
	user    *credential // nil: no user PIN yet
}

// encode: label (32) | serial (16) | officer's credential | u8 user PIN set | user's credential.
func (r *tokenRecord) encode() []byte {
	var w builder
	w.raw(r.label[:])
	w.raw(r.serial[:])
	r.officer.encode(&w)
	if r.user == nil {
		w.u8(0)
	} else {
		w.u8(1)
		r.user.encode(&w)
	}
	return w.b
}

func decodeTokenRecord(b []byte) (*tokenRecord, error) {
	in := scanner{b: b}
	r := &tokenRecord{}
	copy(r.label[:], in.take(32))
	copy(r.serial[:], in.take(16))
	r.officer = decodeCredential(&in)
	switch in.u8() {
	case 0:
	case 1:
		r.user = decodeCredential(&in)
	default:
		in.bad = true
	}
	if in.bad || len(in.b) != 0 {
		return nil, errors.New("token record of a wrong length")
	}
	return r, nil
}

// A record is one object file: an object, or the two of a key pair.
type record struct {
	id    [16]byte
	items []*item // replaced, never changed; see token.saveMu
}

// An item is one object of a record.
type item struct {
	rec    *record
	number uint8 // within the record as it was made; part of the inner seal's place
	sealed []byte
	object *object // guarded by token.mu; nil for a private object of a locked token
	// sealed is the inner seal of a private object, nil for a public one.
}

func (t *token) serialDir(s serial) string {
	return filepath.Join(t.store.slotDir(t.slot), string(s[:]))
}

// loadToken reads a slot's folder. Every record that does not open is named in the error.
func loadToken(s *store, slot uint64, log logrus.FieldLogger) (*token, error) {
	t := &token{slot: slot, store: s, log: log.WithField("slot", slot), records: map[[16]byte]*record{}}
	dir := s.slotDir(slot)
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	if err := removeTemps(dir); err != nil {
		return nil, err
	}
	path := filepath.Join(dir, tokenFile)
	sealed, err := readRecord(path)
	if errors.Is(err, fs.ErrNotExist) {
		return t, t.checkUninitialised()
	}
	if err != nil {
		return nil, err
	}
	plain, err := open(s.sealer, place{kind: kindToken, slot: slot}, sealed)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if t.rec, err = decodeTokenRecord(plain); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if t.tries, err = t.loadTries(t.rec.serial); err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(t.serialDir(t.rec.serial), pinsFile), err)
	}
	if err := t.loadObjects(); err != nil {
		return nil, err
	}
	t.removeRemains()
	return t, nil
}

// checkUninitialised refuses a slot whose objects are there while token.rec is not: that is a lost file, and
// initialising over it would lose the objects too. A first C_InitToken that was cut short leaves no objects.
func (t *token) checkUninitialised() error {
	objects, err := filepath.Glob(filepath.Join(t.store.slotDir(t.slot), "*", "*"+objectExt))
	if err == nil && len(objects) > 0 {
		err = fmt.Errorf("%s is missing, but %s is there", filepath.Join(t.store.slotDir(t.slot), tokenFile), objects[0])
	}
	return err
}

// loadObjects opens the outer seal of every object file. Public objects are made; private ones wait for a login.
func (t *token) loadObjects() error {
	dir := t.serialDir(t.rec.serial)
	if err := removeTemps(dir); err != nil {
		return err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var bad []error
	for _, e := range entries {
		if e.Name() == pinsFile || e.Name() == usesFile {
			continue
		}
		path := filepath.Join(dir, e.Name())
		if err := t.loadObject(path); err != nil {
			bad = append(bad, fmt.Errorf("%s: %w", path, err))
		}
	}
	return errors.Join(bad...)
}

func (t *token) loadObject(path string) error {
	name, ok := strings.CutSuffix(filepath.Base(path), objectExt)
	id, err := hex.DecodeString(name)
	if !ok || err != nil || len(id) != 16 {
		return errors.New("not a file of the software cipher machine")
	}
	sealed, err := readRecord(path)
	if err != nil {
		return err
	}
	rec := &record{id: [16]byte(id)}
	plain, err := open(t.store.sealer, t.recordPlace(t.rec.serial, rec.id), sealed)
	if err != nil {
		return err
	}
	defer clear(plain)
	if err := rec.decode(plain); err != nil {
		return err
	}
	t.records[rec.id] = rec
	return nil
}

func (t *token) recordPlace(s serial, id [16]byte) place {
	return place{kind: kindObjects, slot: t.slot, serial: s, id: id}
}

func (t *token) privatePlace(s serial, it *item) place {
	return place{kind: kindPrivate, slot: t.slot, serial: s, id: it.rec.id, item: it.number}
}

// opened answers the serial and the inner seal, nil while nobody is logged in. The serial stays as it is for as long
// as a session is open.
func (t *token) opened() (serial, cipher.AEAD) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.rec.serial, t.inner
}

// encodeItems: u8 count | count × (u8 number | u8 private | u32 length | object). The object is as encodeObject wrote
// it, and sealed once more if it is private.
func encodeItems(items []*item) []byte {
	var w builder
	w.u8(uint8(len(items)))
	for _, it := range items {
		w.u8(it.number)
		if it.sealed != nil {
			w.u8(1)
			w.string(it.sealed)
		} else {
			w.u8(0)
			w.string(encodeObject(it.object.attributes(), nil))
		}
	}
	return w.b
}

func (r *record) decode(b []byte) error {
	in := scanner{b: b}
	n := in.u8()
	if n < 1 || n > 2 {
		return fmt.Errorf("record of %d objects", n)
	}
	for range n {
		it := &item{rec: r, number: in.u8()}
		private, body := in.u8(), in.string()
		if in.bad || private > 1 {
			return errors.New("record of a wrong length")
		}
		if private == 1 {
			it.sealed = bytes.Clone(body)
		} else {
			attrs, _, err := decodeObject(body)
			if err != nil {
				return err
			}
			if it.object, err = newObject(attrs, nil); err != nil {
				return err
			}
			it.object.item = it
		}
		r.items = append(r.items, it)
	}
	if len(in.b) != 0 {
		return errors.New("record of a wrong length")
	}
	return nil
}

// removeRemains clears folders of earlier initialisations.
func (t *token) removeRemains() {
	dir := t.store.slotDir(t.slot)
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.log.WithError(err).Warn("remains of an earlier token cannot be listed")
		return
	}
	for _, e := range entries {
		if e.IsDir() && e.Name() != string(t.rec.serial[:]) {
			if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
				t.log.WithError(err).Warn("remains of an earlier token cannot be removed")
			}
		}
	}
}

// init initialises the token (C_InitToken): all objects go, the user PIN goes, the security officer's PIN is set by
// the first call and must be presented to later ones. The caller has seen to it that label is 32 bytes.
//
//  1. The new serial's folder is made, with its PIN counter.
//  2. token.rec, which names it, takes the place of the old one: from here on the new token is the one.
//  3. The old folder is removed; what a stop leaves of it, the next start removes.
func (t *token) init(pin []byte, label [32]byte) rv {
	t.pinMu.Lock()
	defer t.pinMu.Unlock()
	t.saveMu.Lock()
	defer t.saveMu.Unlock()
	t.mu.Lock()
	if t.sessions > 0 || t.initialising {
		t.mu.Unlock()
		return ckrSessionExists
	}
	t.initialising = true
	rec := t.rec
	t.mu.Unlock()
	defer func() {
		t.mu.Lock()
		t.initialising = false
		t.mu.Unlock()
	}()
	if rec == nil {
		if code := checkNewPIN(pin); code != ckrOK {
			return code
		}
	} else {
		key, code := t.tryPIN(officer, pin)
		if code != ckrOK {
			return code
		}
		clear(key)
	}
	tokenKey := randomBytes(16)
	defer clear(tokenKey)
	fresh := &tokenRecord{label: label}
	copy(fresh.serial[:], hex.EncodeToString(randomBytes(8)))
	var err error
	fresh.officer, err = newCredential(pin, tokenKey, t.wrappedPlace(fresh.serial, officer))
	if err == nil {
		err = t.commitInit(fresh)
	}
	if err != nil {
		t.log.WithError(err).Error("token cannot be initialised")
		return storageRV(err)
	}
	t.mu.Lock()
	old := t.records
	t.rec, t.tries, t.records, t.labels = fresh, tries{}, map[[16]byte]*record{}, nil
	t.mu.Unlock()
	for _, r := range old {
		for _, it := range r.items {
			if it.object != nil {
				it.object.discard()
			}
		}
	}
	t.removeRemains()
	t.log.WithField("serial", string(fresh.serial[:])).Info("token initialised")
	return ckrOK
}

func (t *token) commitInit(fresh *tokenRecord) error {
	s, dir := t.store, t.store.slotDir(t.slot)
	if err := s.held(); err != nil {
		return err
	}
	if err := os.Mkdir(t.serialDir(fresh.serial), 0o700); err != nil {
		return err
	}
	none := tries{}
	sealed := seal(s.sealer, place{kind: kindPINs, slot: t.slot, serial: fresh.serial}, none[:])
	err := s.write(t.serialDir(fresh.serial), pinsFile, sealed)
	if err == nil {
		err = syncDir(dir)
	}
	if err == nil {
		err = syncDir(s.dir) // the slot's folder may be new as well
	}
	if err != nil {
		os.RemoveAll(t.serialDir(fresh.serial))
		return err
	}
	// After an error from here on, either record may be the one that stays, so the folder stays too.
	return t.saveRecord(fresh)
}

// saveRecord writes token.rec; the caller holds pinMu.
func (t *token) saveRecord(r *tokenRecord) error {
	plain := r.encode()
	defer clear(plain)
	return t.store.write(t.store.slotDir(t.slot), tokenFile, seal(t.store.sealer, place{kind: kindToken, slot: t.slot}, plain))
}

// setPIN gives r a new PIN, which opens the same token key. The caller holds pinMu. The new credential is on disk
// before the count of wrong PINs goes back to zero: a stop between leaves a locked PIN locked.
func (t *token) setPIN(r role, pin, tokenKey []byte) rv {
	t.mu.RLock()
	fresh := *t.rec
	t.mu.RUnlock()
	cred, err := newCredential(pin, tokenKey, t.wrappedPlace(fresh.serial, r))
	if err != nil {
		return ckrGeneralError
	}
	if r == user {
		fresh.user = cred
	} else {
		fresh.officer = cred
	}
	if err := t.saveRecord(&fresh); err != nil {
		t.log.WithError(err).Error("PIN cannot be changed")
		return storageRV(err)
	}
	t.mu.Lock()
	t.rec = &fresh
	counted := t.tries
	t.mu.Unlock()
	if *counted.of(r) == 0 {
		return ckrOK
	}
	*counted.of(r) = 0
	return t.saveTries(fresh.serial, counted)
}

// unlock counts one more application that is logged in. The first opens the private objects. If one does not
// open, it is named in the log and the login is refused: the token is not what it was.
func (t *token) unlock(tokenKey []byte) rv {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.users > 0 {
		t.users++
		return ckrOK
	}
	inner, err := newSealer(tokenKey, "private objects")
	if err != nil {
		return ckrGeneralError
	}
	for _, r := range t.records {
		for _, it := range r.items {
			if err := t.openItem(inner, it); err != nil {
				t.log.WithError(err).WithField("object", hex.EncodeToString(r.id[:])).Error("private object cannot be opened; nobody is logged in")
				t.lockItems()
				return ckrDeviceError
			}
		}
	}
	t.users, t.inner, t.labels = 1, inner, nil
	return ckrOK
}

// openItem opens a private object; the caller holds mu.
func (t *token) openItem(inner cipher.AEAD, it *item) error {
	if it.sealed == nil {
		return nil
	}
	plain, err := open(inner, t.privatePlace(t.rec.serial, it), it.sealed)
	if err != nil {
		return err
	}
	defer clear(plain)
	attrs, secretBytes, err := decodeObject(plain)
	if err != nil {
		return err
	}
	defer clear(secretBytes)
	o, err := newObject(attrs, secretBytes)
	if err != nil {
		return err
	}
	o.item, it.object = it, o
	return nil
}

// lock is the inverse of unlock. The last application's wipes the private objects.
func (t *token) lock() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.users--; t.users == 0 {
		t.inner = nil
		t.lockItems()
	}
}

// lockItems wipes the private objects; the caller holds mu.
func (t *token) lockItems() {
	t.labels = nil
	for _, r := range t.records {
		for _, it := range r.items {
			if it.sealed != nil && it.object != nil {
				it.object.discard()
				it.object = nil
			}
		}
	}
}

// objects answers the token's objects that one may see: all, or the public ones.
func (t *token) objects(private bool) []*object {
	t.mu.RLock()
	defer t.mu.RUnlock()
	var out []*object
	for _, r := range t.records {
		for _, it := range r.items {
			if it.object != nil && (private || it.sealed == nil) {
				out = append(out, it.object)
			}
		}
	}
	return out
}

// labelled is objects of those with the label.
func (t *token) labelled(label string, private bool) []*object {
	t.mu.RLock()
	known := t.labels != nil
	out := t.visible(t.labels[label], private)
	t.mu.RUnlock()
	if known {
		return out
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.labels == nil {
		t.labels = map[string][]*object{}
		for _, r := range t.records {
			for _, it := range r.items {
				t.index(it)
			}
		}
	}
	return t.visible(t.labels[label], private)
}

// index adds an item's object, if it is open; the caller holds mu.
func (t *token) index(it *item) {
	if it.object != nil {
		label := string(it.object.attributes()[ckaLabel])
		t.labels[label] = append(t.labels[label], it.object)
	}
}

// visible answers those that one may see; the caller holds mu.
func (t *token) visible(all []*object, private bool) []*object {
	var out []*object
	for _, o := range all {
		if private || o.item.sealed == nil {
			out = append(out, o)
		}
	}
	return out
}

// add makes objects token objects, durably and all or none. They must be new.
func (t *token) add(objects ...*object) rv {
	t.saveMu.Lock()
	defer t.saveMu.Unlock()
	if len(t.records) >= maxObjects {
		return ckrDeviceMemory
	}
	sn, inner := t.opened()
	rec := &record{id: [16]byte(randomBytes(16))}
	for i, o := range objects {
		it := &item{rec: rec, number: uint8(i), object: o}
		if o.private() {
			if code := t.sealItem(sn, inner, it, o.attributes()); code != ckrOK {
				return code
			}
		}
		rec.items = append(rec.items, it)
	}
	if code := t.save(sn, rec.id, rec.items); code != ckrOK {
		return code
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, it := range rec.items {
		it.object.item = it
		if it.sealed != nil && t.inner == nil {
			it.object.discard() // logged out meanwhile; the next login opens it
			it.object = nil
		}
	}
	t.records[rec.id] = rec
	if t.labels != nil {
		for _, it := range rec.items {
			t.index(it)
		}
	}
	return ckrOK
}

// sealItem seals it.object's key with attrs. It refuses when the user has logged out and the key may be wiped.
func (t *token) sealItem(sn serial, inner cipher.AEAD, it *item, attrs attributes) rv {
	if inner == nil {
		return ckrUserNotLoggedIn
	}
	var secretBytes []byte
	if it.object.secret != nil {
		_, whole := it.object.secret.use(func() rv { secretBytes = it.object.secret.marshal(); return ckrOK })
		if !whole {
			return ckrUserNotLoggedIn
		}
	}
	plain := encodeObject(attrs, secretBytes)
	it.sealed = seal(inner, t.privatePlace(sn, it), plain)
	clear(plain)
	clear(secretBytes)
	return ckrOK
}

// save writes the file of a record. After an error there is no such file if there was none, and otherwise the old or
// the new one. The caller holds saveMu.
func (t *token) save(sn serial, id [16]byte, items []*item) rv {
	dir, name := t.serialDir(sn), hex.EncodeToString(id[:])+objectExt
	_, existed := t.records[id]
	plain := encodeItems(items)
	defer clear(plain)
	err := t.store.write(dir, name, seal(t.store.sealer, t.recordPlace(sn, id), plain))
	if err == nil {
		return ckrOK
	}
	t.log.WithError(err).WithField("object", name).Error("object cannot be stored")
	if !existed {
		// The write may have failed after its rename. The caller is told that there is no object, so let there be none.
		if rerr := os.Remove(filepath.Join(dir, name)); rerr == nil {
			syncDir(dir) // as far as the disk still obeys
		}
	}
	return storageRV(err)
}

// destroy removes a token object, durably.
func (t *token) destroy(o *object) rv {
	t.saveMu.Lock()
	defer t.saveMu.Unlock()
	if o.dead.Load() {
		return ckrObjectHandleInvalid
	}
	sn, _ := t.opened()
	rec := o.item.rec
	rest := slices.DeleteFunc(slices.Clone(rec.items), func(it *item) bool { return it == o.item })
	if len(rest) > 0 {
		if code := t.save(sn, rec.id, rest); code != ckrOK {
			return code
		}
	} else if err := t.store.remove(t.serialDir(sn), hex.EncodeToString(rec.id[:])+objectExt); err != nil {
		t.log.WithError(err).Error("object cannot be removed")
		return ckrDeviceError
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if rec.items = rest; len(rest) == 0 {
		delete(t.records, rec.id)
	}
	o.item.object, t.labels = nil, nil
	o.discard()
	return ckrOK
}

// modify changes attributes of a token object for r, durably.
func (t *token) modify(o *object, changes attributes, r role) rv {
	t.saveMu.Lock()
	defer t.saveMu.Unlock()
	if o.dead.Load() {
		return ckrObjectHandleInvalid
	}
	sn, inner := t.opened()
	attrs := o.attributes()
	if code := attrs.tightens(changes, r); code != ckrOK {
		return code
	}
	attrs = attrs.with(changes) // under saveMu, so that no other change is lost
	old := o.item
	fresh := &item{rec: old.rec, number: old.number, object: o}
	if old.sealed != nil {
		if code := t.sealItem(sn, inner, fresh, attrs); code != ckrOK {
			return code
		}
	} else {
		fresh.object = &object{} // stands in while encodeItems reads the new attributes
		fresh.object.attrs.Store(&attrs)
	}
	items := slices.Clone(old.rec.items)
	items[slices.Index(items, old)] = fresh
	if code := t.save(sn, old.rec.id, items); code != ckrOK {
		return code
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	fresh.object = old.object // nil if the user logged out meanwhile
	old.rec.items = items
	o.item = fresh
	o.attrs.Store(&attrs)
	t.labels = nil
	return ckrOK
}

// close wipes what the token has in memory.
func (t *token) close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.inner = nil
	t.lockItems()
	t.uses.mu.Lock()
	defer t.uses.mu.Unlock()
	t.uses.close()
}

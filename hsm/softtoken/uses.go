package softtoken

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
)

// usesFile, beside a token's objects, counts the signatures of each private key: entries of id (16) | u64, big-endian,
// in any order. It is written in place at each signature and not synced: a kill loses nothing, a power cut may put a
// count back. It is not sealed: whoever can write the folder can set it. Nothing here depends on it; it lets a caller
// see that somebody else has used a key.
const usesFile = "uses.cnt"

const useEntry = 16 + 8

// A useCounts is a token's, read at the first login.
type useCounts struct {
	mu     sync.Mutex // guards what follows
	serial serial
	file   *os.File
	keys   map[[16]byte]*useCount
	size   int64
}

type useCount struct {
	at int64
	n  uint64
}

// of answers the count of a record of the token with that serial; it is made when make is set, and otherwise nil where
// there is none. The caller holds mu.
func (u *useCounts) of(t *token, sn serial, id [16]byte, make bool) (*useCount, error) {
	if u.file == nil || u.serial != sn {
		if err := u.read(filepath.Join(t.serialDir(sn), usesFile)); err != nil {
			return nil, err
		}
		u.serial = sn
	}
	c := u.keys[id]
	if c != nil || !make {
		return c, nil
	}
	c = &useCount{at: u.size}
	if _, err := u.file.WriteAt(append(id[:], 0, 0, 0, 0, 0, 0, 0, 0), c.at); err != nil {
		return nil, err
	}
	u.keys[id], u.size = c, u.size+useEntry
	return c, nil
}

func (u *useCounts) read(path string) error {
	u.close()
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	b, err := os.ReadFile(path)
	if err != nil {
		f.Close()
		return err
	}
	u.file, u.keys, u.size = f, map[[16]byte]*useCount{}, 0
	for ; len(b) >= useEntry; b = b[useEntry:] { // a new entry that was cut short is written over
		u.keys[[16]byte(b)] = &useCount{u.size, binary.BigEndian.Uint64(b[16:])}
		u.size += useEntry
	}
	return nil
}

func (u *useCounts) close() {
	if u.file != nil {
		u.file.Close()
		u.file = nil
	}
}

// stored answers where an object is stored, nil for a session object, and the token's serial.
func (t *token) stored(o *object) (*item, serial) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return o.item, t.rec.serial
}

// openUses opens the file while its folder is there: counting itself needs no folder. An error will be that of the
// first signature.
func (t *token) openUses() {
	sn, _ := t.opened()
	t.uses.mu.Lock()
	defer t.uses.mu.Unlock()
	if _, err := t.uses.of(t, sn, [16]byte{}, false); err != nil {
		t.log.WithError(err).Error("uses of keys cannot be counted")
	}
}

// countUse counts one signature of a private key, before it leaves. A session object's count ends with the object.
func (t *token) countUse(o *object) error {
	it, sn := t.stored(o)
	if it == nil {
		o.uses.Add(1)
		return nil
	}
	t.uses.mu.Lock()
	defer t.uses.mu.Unlock()
	c, err := t.uses.of(t, sn, it.rec.id, true)
	if err == nil {
		_, err = t.uses.file.WriteAt(binary.BigEndian.AppendUint64(nil, c.n+1), c.at+16)
	}
	if err != nil {
		return fmt.Errorf("counting a use: %w", err)
	}
	c.n++
	return nil
}

// usesOf answers how often a private key has signed.
func (t *token) usesOf(o *object) (uint64, error) {
	it, sn := t.stored(o)
	if o.attributes().class() != ckoPrivateKey {
		return 0, errors.New("not a private key")
	}
	if it == nil {
		return o.uses.Load(), nil
	}
	t.uses.mu.Lock()
	defer t.uses.mu.Unlock()
	c, err := t.uses.of(t, sn, it.rec.id, false)
	if c == nil || err != nil {
		return 0, err
	}
	return c.n, nil
}

package softtoken

import (
	"crypto/cipher"
	"crypto/hmac"
	"crypto/pbkdf2"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"

	"github.com/emmansun/gmsm/sm3"
	"github.com/emmansun/gmsm/sm4"
	"golang.org/x/sys/unix"
)

const (
	recordMagic   = "YJTK"
	recordVersion = 1
	aadPrefix     = "yinjian softtoken record"
	nonceSize     = 12
	saltSize      = 32
	maxRecord     = 1 << 20 // bytes of a file; no record comes near it

	kindStore   = 1 // store.rec
	kindToken   = 2 // token.rec
	kindPINs    = 3 // pins.rec
	kindObjects = 4 // *.obj
	kindPrivate = 5 // a private object within *.obj
	kindWrapped = 6 // the token key within token.rec

	storeFile = "store.rec"
	lockFile  = "lock"
	tokenFile = "token.rec"
	pinsFile  = "pins.rec"
	objectExt = ".obj"
	tempExt   = ".tmp"
)

// pbkdf2Iterations is written into new records. At 2026's speed of one core it is a tenth to a third of a second.
// It is a variable so that tests of other things need not wait for it.
var pbkdf2Iterations = 210_000

// A serial is CK_TOKEN_INFO's serialNumber: 16 hexadecimal digits.
type serial [16]byte

// A place says where a record belongs. It is authenticated, so that a record opens nowhere else.
type place struct {
	kind   uint8
	slot   uint64
	serial serial
	id     [16]byte
	item   uint8
}

func (p place) aad() []byte {
	b := make([]byte, 0, len(aadPrefix)+2+8+16+16+1)
	b = append(b, aadPrefix...)
	b = append(b, recordVersion, p.kind)
	b = binary.BigEndian.AppendUint64(b, p.slot)
	b = append(b, p.serial[:]...)
	b = append(b, p.id[:]...)
	return append(b, p.item)
}

// derive is HMAC-SM3(key, purpose), 32 bytes.
func derive(key []byte, purpose string) []byte {
	h := hmac.New(sm3.New, key)
	h.Write([]byte(purpose))
	return h.Sum(nil)
}

// newSealer answers SM4-GCM under the first 16 bytes of derive(key, purpose).
func newSealer(key []byte, purpose string) (cipher.AEAD, error) {
	k := derive(key, purpose)
	defer clear(k)
	block, err := sm4.NewCipher(k[:16])
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

// stretch is PBKDF2-HMAC-SM3, 32 bytes (RFC 8018 §5.2).
func stretch(secret, salt []byte, iterations int) ([]byte, error) {
	// The standard library takes the password as a string, which cannot be wiped afterwards.
	return pbkdf2.Key(sm3.New, string(secret), salt, iterations, 32)
}

func randomBytes(n int) []byte {
	b := make([]byte, n)
	rand.Read(b) // never fails (crypto/rand)
	return b
}

// seal answers a sealed record for p.
func seal(a cipher.AEAD, p place, plaintext []byte) []byte {
	b := append([]byte(recordMagic), recordVersion, p.kind)
	b = append(b, randomBytes(nonceSize)...)
	return a.Seal(b, b[len(b)-nonceSize:], plaintext, p.aad())
}

var errSeal = errors.New("the seal is broken: changed, or not from this place, or not of this store")

// open is the inverse of seal.
func open(a cipher.AEAD, p place, record []byte) ([]byte, error) {
	head := len(recordMagic) + 2
	if len(record) < head+nonceSize+a.Overhead() || string(record[:4]) != recordMagic {
		return nil, errors.New("not a record of the software cipher machine")
	}
	if record[4] != recordVersion {
		return nil, fmt.Errorf("record version %d, only %d is known", record[4], recordVersion)
	}
	if record[5] != p.kind {
		return nil, fmt.Errorf("record of kind %d in place of kind %d", record[5], p.kind)
	}
	plain, err := a.Open(nil, record[head:head+nonceSize], record[head+nonceSize:], p.aad())
	if err != nil {
		return nil, errSeal
	}
	return plain, nil
}

// A store is the daemon's folder. Its methods may be called concurrently for different files.
type store struct {
	dir    string
	lock   *os.File
	sealer cipher.AEAD // outer seal of every record
	// fault, set by tests, is asked before each step of a write ("create", "write", "sync", "rename", "syncdir").
	fault atomic.Pointer[func(step string) error]
}

// openStore takes the folder for this process and unseals the store key. The folder is made if it is not there.
func openStore(dir string, passphrase []byte) (_ *store, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("softtoken: %w", err)
	}
	s := &store{dir: dir}
	_, err = os.Lstat(filepath.Join(dir, storeFile))
	fresh := errors.Is(err, fs.ErrNotExist)
	if err != nil && !fresh {
		return nil, fmt.Errorf("softtoken: %w", err)
	}
	if err := checkFolder(dir, fresh); err != nil {
		return nil, err
	}
	s.lock, err = os.OpenFile(filepath.Join(dir, lockFile), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("softtoken: %w", err)
	}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	if err := unix.Flock(int(s.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, fmt.Errorf("softtoken: folder %s is in use by another software cipher machine (%v)", dir, err)
	}
	if fresh {
		// Another process may have made it between the look above and the lock.
		if _, err := os.Lstat(filepath.Join(dir, storeFile)); errors.Is(err, fs.ErrNotExist) {
			return s, s.create(passphrase)
		}
	}
	return s, s.unseal(passphrase)
}

// checkFolder wants dir to be ours and closed to others. A folder without a store is closed rather than refused.
func checkFolder(dir string, fresh bool) error {
	info, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("softtoken: %w", err)
	}
	if !info.IsDir() {
		return fmt.Errorf("softtoken: %s is not a folder", dir)
	}
	if owner := info.Sys().(*syscall.Stat_t).Uid; int(owner) != os.Geteuid() {
		return fmt.Errorf("softtoken: folder %s belongs to uid %d, not to the daemon's user", dir, owner)
	}
	if info.Mode().Perm()&0o077 == 0 {
		return nil
	}
	if !fresh {
		return fmt.Errorf("softtoken: folder %s has mode %04o and is open to others; chmod 0700 it", dir, info.Mode().Perm())
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		return fmt.Errorf("softtoken: %w", err)
	}
	return nil
}

// create draws the store key. Remains of tokens without their store key cannot be opened any more: they are the sign
// of a lost store.rec and not written over.
func (s *store) create(passphrase []byte) error {
	if left, _ := filepath.Glob(filepath.Join(s.dir, "slot-*")); len(left) > 0 {
		return fmt.Errorf("softtoken: %s is missing, but %s is there; restore the whole folder, or remove it to begin anew", filepath.Join(s.dir, storeFile), left[0])
	}
	head := append([]byte(recordMagic), recordVersion, kindStore)
	head = binary.BigEndian.AppendUint32(head, uint32(pbkdf2Iterations))
	head = append(head, randomBytes(saltSize)...)
	sealer, err := s.passphraseSealer(passphrase, head)
	if err != nil {
		return err
	}
	key := randomBytes(32)
	defer clear(key)
	nonce := randomBytes(nonceSize)
	record := append(append([]byte(nil), head...), nonce...)
	record = sealer.Seal(record, nonce, key, head)
	if err := s.write(s.dir, storeFile, record); err != nil {
		return fmt.Errorf("softtoken: %w", err)
	}
	s.sealer, err = newSealer(key, "records")
	return err
}

func (s *store) passphraseSealer(passphrase, head []byte) (cipher.AEAD, error) {
	iterations := binary.BigEndian.Uint32(head[6:])
	// The upper bound keeps a damaged header from holding up the start for hours.
	if iterations < 1 || iterations > 100_000_000 {
		return nil, fmt.Errorf("softtoken: %s: %d iterations", storeFile, iterations)
	}
	k, err := stretch(passphrase, head[10:10+saltSize], int(iterations))
	if err != nil {
		return nil, fmt.Errorf("softtoken: passphrase: %w", err)
	}
	defer clear(k)
	return newSealer(k, "store")
}

func (s *store) unseal(passphrase []byte) error {
	path := filepath.Join(s.dir, storeFile)
	record, err := readRecord(path)
	if err != nil {
		return fmt.Errorf("softtoken: %w", err)
	}
	const headSize = 4 + 2 + 4 + saltSize
	if len(record) != headSize+nonceSize+32+16 || string(record[:4]) != recordMagic || record[4] != recordVersion || record[5] != kindStore {
		return fmt.Errorf("softtoken: %s is damaged or of another version", path)
	}
	head := record[:headSize]
	sealer, err := s.passphraseSealer(passphrase, head)
	if err != nil {
		return err
	}
	key, err := sealer.Open(nil, record[headSize:headSize+nonceSize], record[headSize+nonceSize:], head)
	if err != nil {
		return fmt.Errorf("softtoken: %s: %w", path, ErrWrongPassphrase)
	}
	defer clear(key)
	s.sealer, err = newSealer(key, "records")
	return err
}

// readRecord reads a sealed file, of bounded size.
func readRecord(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxRecord+1))
	if err == nil && len(b) > maxRecord {
		err = fmt.Errorf("%s is longer than any record", path)
	}
	return b, err
}

// errReplaced means that the folder at the store's path is not the one that this process has locked: it was moved away
// or removed, and perhaps another put in its place, which may be another daemon's.
var errReplaced = errors.New("the folder is gone, or was replaced, since it was locked")

func (s *store) held() error {
	there, err := os.Lstat(filepath.Join(s.dir, lockFile))
	if err != nil {
		return fmt.Errorf("%w: %v", errReplaced, err)
	}
	ours, err := s.lock.Stat()
	if err != nil {
		return err
	}
	if !os.SameFile(there, ours) {
		return errReplaced
	}
	return nil
}

func (s *store) step(name string, do func() error) error {
	if fault := s.fault.Load(); fault != nil {
		if err := (*fault)(name); err != nil {
			return err
		}
	}
	return do()
}

// write makes name in dir hold data, durably. A stop at any line leaves the old file or the new one, and at most a
// temporary file, which the next start removes. After an error of the last step the new file is in place but may not
// survive a power cut; callers that cannot live with either remove it.
func (s *store) write(dir, name string, data []byte) (err error) {
	if err := s.held(); err != nil {
		return err
	}
	temp := filepath.Join(dir, name+tempExt)
	var f *os.File
	err = s.step("create", func() (err error) {
		f, err = os.OpenFile(temp, os.O_CREATE|os.O_WRONLY|os.O_TRUNC|unix.O_NOFOLLOW, 0o600)
		return err
	})
	if err != nil {
		return err
	}
	err = s.step("write", func() error { _, err := f.Write(data); return err })
	if err == nil {
		err = s.step("sync", f.Sync)
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = s.step("rename", func() error { return os.Rename(temp, filepath.Join(dir, name)) })
	}
	if err != nil {
		os.Remove(temp) // the error that counts is at hand already
		return err
	}
	return s.step("syncdir", func() error { return syncDir(dir) })
}

// remove deletes name in dir, durably.
func (s *store) remove(dir, name string) error {
	if err := s.held(); err != nil {
		return err
	}
	if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return s.step("syncdir", func() error { return syncDir(dir) })
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// close gives the folder back. Unlocking comes first: closing alone leaves the lock with a child that some other part
// of the process forked and that has not reached its exec.
func (s *store) close() {
	unix.Flock(int(s.lock.Fd()), unix.LOCK_UN)
	s.lock.Close()
}

func (s *store) slotDir(slot uint64) string {
	return filepath.Join(s.dir, fmt.Sprintf("slot-%d", slot))
}

// removeTemps clears what an interrupted write left.
func removeTemps(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), tempExt) {
			if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}

// storageRV is the return value for a file that could not be written.
func storageRV(err error) rv {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) || errors.Is(err, unix.EFBIG) {
		return ckrDeviceMemory
	}
	return ckrDeviceError
}

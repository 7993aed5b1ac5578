// Package uselog counts what the keys of a slot are used for: one record for each signature that a cipher machine made,
// written before the signature is handed to anybody. Held against the journal (appliance/uses) it names signatures that
// no entry accounts for.
//
// A slot's log is a row of files slot-NUMBER.uses in one folder, NUMBER being the uses before it. One worker writes
// ([Log]), anybody reads ([Reader]). Records are chained with SM3, over the files, so that one that was changed, taken
// out or put in between shows; that the end was cut off, or all of it put back to an older state, shows only against
// what the journal says of it. Nothing is secret here, and nothing proves who wrote: whoever can write the files can
// make a chain of his own from any point on.
//
// A record is synced to disk within a second ([syncEvery]), not before its signature is handed out. The end of a process
// loses none; a power cut may lose those of the last second, and then signatures have entries and no record: what is
// held against the log takes that into account.
package uselog

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/emmansun/gmsm/sm3"

	"yinjian/hsm"
)

// A Hash is an SM3 digest.
type Hash = [32]byte

// A Kind is what a record says.
type Kind uint8

const (
	Begin Kind = iota + 1 // first of a file: Number uses before it, Signature is the chain before it
	Total                 // after Begin, one for each key: its Counter so far
	Start                 // a worker opened the log; Signed names the start of the appliance it belongs to
	Use                   // one signature
)

// A Record is one record, in the file as (integers big-endian):
//
//	u16 length of what follows | u8 kind | u8 operation | u64 number | u64 counter | u64 at, ms |
//	signature (32) | signed (32) | u8 length of label | label | chain (32)
//
// chain is SM3 of the chain before and of the bytes from the length to the label.
type Record struct {
	Kind      Kind
	Operation hsm.Operation // of a Use
	Number    uint64        // uses of the slot so far, this one included
	Counter   uint64        // uses of the key so far, this one included
	At        time.Duration // since the worker opened the log; whole milliseconds
	Signature Hash          // see [Digest]
	Signed    Hash          // what was signed: e, or the digest
	Label     string        // the key's
}

const (
	fixedSize = 2 + 1 + 1 + 8 + 8 + 8 + 32 + 32 + 1
	maxLabel  = 255
	maxRecord = fixedSize + maxLabel + 32
	suffix    = ".uses"
)

// fileUses is how many uses a file takes: some 12 MB. A variable for the tests.
var fileUses uint64 = 1 << 16

// syncEvery is after how long a record is on the disk at the latest, if the disk keeps up. A variable for the tests, as syncFile is.
var (
	syncEvery = time.Second
	syncFile  = (*os.File).Sync
)

var operations = []hsm.Operation{"", hsm.SignSM2E, hsm.SignRSASHA256}

// Counted says whether op makes a signature that is recorded; MACs are not.
func Counted(op hsm.Operation) bool { return op != "" && slices.Contains(operations, op) }

// Digest is how a signature is known: SM3 of the DER of SM2Signature, in whichever form the module gave it, or of an RSA
// signature's bytes. What is no SM2 signature is taken as it is.
func Digest(op hsm.Operation, signature []byte) Hash {
	if op == hsm.SignSM2E {
		if r, s, err := hsm.NormalizeSM2(signature); err == nil {
			if der, err := hsm.MarshalSM2(r, s); err == nil {
				return sm3.Sum(der)
			}
		}
	}
	return sm3.Sum(signature)
}

// appendTo adds the record and answers the chain after it.
func (r *Record) appendTo(b []byte, chain Hash) ([]byte, Hash) {
	at := len(b)
	b = binary.BigEndian.AppendUint16(b, uint16(fixedSize-2+len(r.Label)+32))
	b = append(b, byte(r.Kind), byte(max(0, slices.Index(operations, r.Operation))))
	b = binary.BigEndian.AppendUint64(b, r.Number)
	b = binary.BigEndian.AppendUint64(b, r.Counter)
	b = binary.BigEndian.AppendUint64(b, uint64(r.At.Milliseconds()))
	b = append(b, r.Signature[:]...)
	b = append(b, r.Signed[:]...)
	b = append(b, byte(len(r.Label)))
	b = append(b, r.Label...)
	next := chainOf(chain, b[at:])
	return append(b, next[:]...), next
}

func chainOf(chain Hash, record []byte) Hash {
	var in [32 + maxRecord]byte
	n := copy(in[:], chain[:])
	n += copy(in[n:], record)
	return sm3.Sum(in[:n])
}

var (
	errShort   = errors.New("hsm/uselog: the record is not complete")
	errRecord  = errors.New("hsm/uselog: not a record")
	errChanged = errors.New("hsm/uselog: the record does not follow from the one before")
)

// parse reads the record at the beginning of b, after one with that chain, and answers its size and its own chain. A
// Begin brings the chain before it along.
func parse(b []byte, chain Hash) (r Record, size int, next Hash, err error) {
	if len(b) < 2 {
		return r, 0, next, errShort
	}
	size = 2 + int(binary.BigEndian.Uint16(b))
	if size < fixedSize+32 || size > maxRecord {
		return r, 0, next, errRecord
	}
	if len(b) < size {
		return r, 0, next, errShort
	}
	body := b[:size-32]
	label := body[fixedSize:]
	if int(body[fixedSize-1]) != len(label) || int(body[3]) >= len(operations) || body[2] < byte(Begin) || body[2] > byte(Use) {
		return r, 0, next, errRecord
	}
	r = Record{
		Kind: Kind(body[2]), Operation: operations[body[3]], Number: binary.BigEndian.Uint64(body[4:]), Counter: binary.BigEndian.Uint64(body[12:]),
		At: time.Duration(binary.BigEndian.Uint64(body[20:])) * time.Millisecond, Signature: Hash(body[28:60]), Signed: Hash(body[60:92]), Label: string(label),
	}
	if r.Kind == Begin {
		chain = r.Signature
	}
	if next = chainOf(chain, body); next != Hash(b[size-32:size]) {
		return r, 0, next, errChanged
	}
	return r, size, next, nil
}

// files are a slot's files, the oldest first.
func files(dir, slot string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if n := e.Name(); strings.HasPrefix(n, slot+"-") && strings.HasSuffix(n, suffix) {
			names = append(names, n)
		}
	}
	sort.Strings(names) // numbers of one width
	return names, nil
}

func fileName(slot string, number uint64) string {
	return fmt.Sprintf("%s-%020d%s", slot, number, suffix)
}

// A Log is one slot's, open for writing. Safe for concurrent use.
type Log struct {
	dir, slot string
	lock      *os.File
	begun     time.Time // monotonic

	mu       sync.Mutex // guards what follows
	file     *os.File
	size     int64  // of file; what is beyond is a failed write
	first    uint64 // uses before file
	number   uint64
	chain    Hash
	counters map[string]uint64
	buf      []byte
	err      error // the file can be neither continued nor put right
	dirty    bool  // a sync is due

	closing sync.Once
	closed  chan struct{}
}

// Open opens slot's log in dir for writing, making both where they are missing, and records a Start that names life. One
// process at a time may have it open. What a power cut left of a last record is cut off; a file that is damaged
// otherwise is left as it is, and the log goes on in a new one from the last good record.
func Open(dir, slot string, life Hash) (*Log, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("hsm/uselog: %w", err)
	}
	lock, err := os.OpenFile(filepath.Join(dir, slot+".lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("hsm/uselog: %w", err)
	}
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		lock.Close()
		return nil, fmt.Errorf("hsm/uselog: slot %s: another process writes its log: %w", slot, err)
	}
	l := &Log{dir: dir, slot: slot, lock: lock, begun: time.Now(), counters: map[string]uint64{}, closed: make(chan struct{})} // interval
	err = l.resume()
	if err == nil {
		err = l.append(Record{Kind: Start, Number: l.number, Signed: life})
	}
	if err == nil {
		err = syncFile(l.file) // that there was a worker is known over a power cut
	}
	if err != nil {
		l.Close()
		return nil, fmt.Errorf("hsm/uselog: slot %s: %w", slot, err)
	}
	go l.sync()
	return l, nil
}

// sync puts on the disk what was added, until the log is closed. One that fails is tried again: the journal, on the same
// disk, is what stops signing then.
func (l *Log) sync() {
	for tick := time.NewTicker(syncEvery); ; {
		select {
		case <-l.closed:
			tick.Stop()
			return
		case <-tick.C:
		}
		l.mu.Lock()
		f, due := l.file, l.dirty
		l.dirty = false
		l.mu.Unlock()
		if !due || f == nil {
			continue
		}
		if err := syncFile(f); err != nil && !errors.Is(err, os.ErrClosed) { // closed: a file that is complete was synced then
			l.mu.Lock()
			l.dirty = true
			l.mu.Unlock()
		}
	}
}

// resume finds the end of the log, or begins one.
func (l *Log) resume() error {
	names, err := files(l.dir, l.slot)
	if err != nil {
		return err
	}
	for _, name := range slices.Backward(names) {
		path := filepath.Join(l.dir, name)
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		s := scan{counters: l.counters}
		off := 0
		for {
			var n int
			if n, _, err = s.next(b[off:]); err != nil {
				break
			}
			off += n
		}
		if off == 0 { // not even its beginning can be read: the one before is the last
			if err := os.Rename(path, path+".damaged"); err != nil {
				return err
			}
			continue
		}
		l.first, l.number, l.chain = s.first, s.number, s.chain
		if !errors.Is(err, errShort) && !torn(&s, b[off:]) {
			if s.number == s.first { // the next file would have its name
				if err := os.Rename(path, path+".damaged"); err != nil {
					return err
				}
			}
			return l.roll()
		}
		if l.file, err = os.OpenFile(path, os.O_RDWR, 0); err != nil {
			return err
		}
		l.size = int64(off)
		return l.file.Truncate(l.size)
	}
	return l.roll()
}

// torn: a power cut may leave a file longer than what was written to it, with zeros after a part of the last record.
func torn(s *scan, b []byte) bool {
	_, _, err := s.next(bytes.TrimRight(b, "\x00"))
	return errors.Is(err, errShort)
}

// roll begins the next file. It is complete before it has its name.
func (l *Log) roll() error {
	if l.file != nil {
		if err := syncFile(l.file); err != nil {
			return err
		}
	}
	r := Record{Kind: Begin, Number: l.number, Signature: l.chain}
	b, chain := r.appendTo(nil, l.chain)
	labels := make([]string, 0, len(l.counters))
	for label := range l.counters {
		labels = append(labels, label)
	}
	sort.Strings(labels)
	for _, label := range labels {
		r = Record{Kind: Total, Number: l.number, Counter: l.counters[label], Label: label}
		b, chain = r.appendTo(b, chain)
	}
	name := filepath.Join(l.dir, fileName(l.slot, l.number))
	f, err := os.OpenFile(name+".new", os.O_CREATE|os.O_TRUNC|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = os.Rename(name+".new", name)
	}
	if err != nil {
		f.Close()
		return err
	}
	if l.file != nil {
		l.file.Close() // everything is on the disk already
	}
	l.file, l.size, l.first, l.chain = f, int64(len(b)), l.number, chain
	return nil
}

// append writes one record. The caller holds mu, or nobody else knows the log yet. After an error nothing was added.
func (l *Log) append(r Record) error {
	if l.err != nil {
		return l.err
	}
	r.At = time.Since(l.begun)
	b, chain := r.appendTo(l.buf[:0], l.chain)
	l.buf = b
	if _, err := l.file.WriteAt(b, l.size); err != nil {
		if terr := l.file.Truncate(l.size); terr != nil {
			l.err = fmt.Errorf("hsm/uselog: the log cannot be put right after a failed write: %w", errors.Join(err, terr))
		}
		return err
	}
	l.size += int64(len(b))
	l.number, l.chain, l.dirty = r.Number, chain, true
	return nil
}

// Add records that the key signed: what op was given, and the signature as it left the token. The signature must not be
// handed on when it fails: nothing would account for it.
func (l *Log) Add(label string, op hsm.Operation, signed, signature []byte) error {
	if len(label) > maxLabel {
		return fmt.Errorf("hsm/uselog: label of %d bytes, at most %d", len(label), maxLabel)
	}
	r := Record{Kind: Use, Operation: op, Signature: Digest(op, signature), Label: label}
	if len(signed) == len(r.Signed) {
		r.Signed = Hash(signed)
	} else {
		r.Signed = sm3.Sum(signed)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.number-l.first >= fileUses {
		if err := l.roll(); err != nil {
			return fmt.Errorf("hsm/uselog: %w", err)
		}
	}
	r.Number, r.Counter = l.number+1, l.counters[label]+1
	if err := l.append(r); err != nil {
		return fmt.Errorf("hsm/uselog: %w", err)
	}
	l.counters[label] = r.Counter
	return nil
}

// Close closes the log. What was added stays.
func (l *Log) Close() error {
	l.closing.Do(func() { close(l.closed) })
	l.mu.Lock()
	defer l.mu.Unlock()
	err := l.lock.Close()
	if l.file != nil {
		err = errors.Join(syncFile(l.file), l.file.Close(), err)
	}
	l.file, l.err = nil, errors.New("hsm/uselog: the log is closed")
	return err
}

package uselog

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
)

// A scan follows the records of a file, and of the next.
type scan struct {
	begun         bool
	first, number uint64
	chain         Hash
	counters      map[string]uint64
}

// next reads the record at the beginning of b and answers its size. It must follow from those before.
func (s *scan) next(b []byte) (int, Record, error) {
	r, n, chain, err := parse(b, s.chain)
	if err != nil {
		return 0, r, err
	}
	switch {
	case !s.begun:
		if r.Kind != Begin {
			return 0, r, errRecord
		}
		s.begun, s.first = true, r.Number
		clear(s.counters)
	case r.Kind == Begin:
		return 0, r, errChanged
	case r.Kind != Use && r.Number != s.number:
		return 0, r, errChanged
	case r.Kind == Total:
		s.counters[r.Label] = r.Counter
	case r.Kind == Use:
		if r.Number != s.number+1 || r.Counter != s.counters[r.Label]+1 {
			return 0, r, errChanged
		}
		s.counters[r.Label] = r.Counter
	}
	s.number, s.chain = r.Number, chain
	return n, r, nil
}

// Slots names the slots that have a log in dir, none if there is no such folder.
func Slots(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("hsm/uselog: %w", err)
	}
	var slots []string
	for _, e := range entries {
		if m := reFile.FindStringSubmatch(e.Name()); m != nil && !slices.Contains(slots, m[1]) {
			slots = append(slots, m[1])
		}
	}
	return slots, nil
}

// reFile is the name of a log's file; a slot's name has no hyphen.
var reFile = regexp.MustCompile(`^([a-z0-9._]+)-[0-9]{20}\.uses$`)

// A Position is a place in a slot's log, between two records.
type Position struct {
	File   string `json:"file"`
	Offset int64  `json:"offset"`
	Number uint64 `json:"number"` // uses before it
	Chain  string `json:"chain"`  // hex; of the record before it
}

// A Damage says that a log is not what it was, or cannot be followed.
type Damage struct {
	Slot   string `json:"slot"`
	What   string `json:"what"`   // "missing", "cut", "changed"
	Number uint64 `json:"number"` // uses before the place
	Detail string `json:"detail"`
}

func (d *Damage) Error() string {
	return fmt.Sprintf("hsm/uselog: slot %s: %s: %s", d.Slot, d.What, d.Detail)
}

// A Reader follows a slot's log while it is written. Not safe for concurrent use.
type Reader struct {
	dir, slot string
	file      string
	offset    int64
	scan      scan
	stuck     bool // the file's damage was told
	buffer    []byte
}

// maxBuffer is how much memory for records is kept: what a log grows by in a moment, not what a start finds.
const maxBuffer = 1 << 20

// OpenReader reads from a position that was answered earlier; from nil, from the oldest file's beginning. The error is a
// [*Damage] when the log does not hold the position any more, or nothing before the position follows: then from nil is
// what can be tried.
func OpenReader(dir, slot string, from *Position) (*Reader, error) {
	r := &Reader{dir: dir, slot: slot, scan: scan{counters: map[string]uint64{}}}
	if from == nil || from.File == "" {
		return r, nil
	}
	damage := func(what, format string, args ...any) error {
		return &Damage{Slot: slot, What: what, Number: from.Number, Detail: fmt.Sprintf(format, args...)}
	}
	r.file = from.File
	b, err := os.ReadFile(filepath.Join(dir, from.File))
	if errors.Is(err, os.ErrNotExist) {
		return nil, damage("missing", "%s is gone", from.File)
	} else if err != nil {
		return nil, fmt.Errorf("hsm/uselog: %w", err)
	}
	if int64(len(b)) < from.Offset {
		return nil, damage("cut", "%s has %d bytes and had %d", from.File, len(b), from.Offset)
	}
	for r.offset < from.Offset {
		n, _, err := r.scan.next(b[r.offset:from.Offset])
		if err != nil {
			return nil, damage("changed", "%s at byte %d: %v", from.File, r.offset, err)
		}
		r.offset += int64(n)
	}
	if r.scan.number != from.Number || hex.EncodeToString(r.scan.chain[:]) != from.Chain {
		return nil, damage("changed", "%s holds other records before byte %d than it did", from.File, from.Offset)
	}
	return r, nil
}

// Position is where the reader is; its File is empty while there is no log.
func (r *Reader) Position() Position {
	return Position{r.file, r.offset, r.scan.number, hex.EncodeToString(r.scan.chain[:])}
}

// Counters answers how often each key was used before the position. The map is the reader's.
func (r *Reader) Counters() map[string]uint64 { return r.scan.counters }

// Next calls fn with the records that are new, in order, Total and Begin included. A record that is being written is left for the
// next call. A place that cannot be read answers a [*Damage], once; where a later file goes on from the last good
// record, so does the next call. After an error of fn, which is returned, the record counts as read.
func (r *Reader) Next(fn func(Record) error) error {
	for {
		names, err := files(r.dir, r.slot)
		if errors.Is(err, os.ErrNotExist) {
			names = nil
		} else if err != nil {
			return fmt.Errorf("hsm/uselog: %w", err)
		}
		if r.file == "" {
			if len(names) == 0 {
				return nil
			}
			r.file = names[0]
		}
		err = r.readFile(fn)
		var damage *Damage
		if err != nil && !errors.As(err, &damage) {
			return err
		}
		told := r.stuck
		r.stuck = r.stuck || err != nil
		i := slices.IndexFunc(names, func(n string) bool { return n > r.file })
		if i < 0 {
			if told {
				return nil
			}
			return err
		}
		// The next file is made when the one before is complete, and was there before that one was read.
		if err == nil {
			if err = r.unread(); err == nil {
				err = r.follows(names[i])
			}
		}
		r.file, r.offset, r.stuck, r.scan.begun = names[i], 0, false, false
		if err != nil && !told {
			return err
		}
	}
}

// follows answers a Damage unless the file goes on from the last record that was read.
func (r *Reader) follows(name string) error {
	f, err := os.Open(filepath.Join(r.dir, name))
	if err != nil {
		return fmt.Errorf("hsm/uselog: %w", err)
	}
	defer f.Close()
	b := make([]byte, maxRecord)
	n, err := io.ReadFull(f, b)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		return fmt.Errorf("hsm/uselog: %s: %w", name, err)
	}
	if next, _, _, err := parse(b[:n], Hash{}); err != nil || next.Kind != Begin || next.Number != r.scan.number || next.Signature != r.scan.chain {
		return r.damage("%s does not go on from the record before it", name)
	}
	return nil
}

// unread answers a Damage when bytes are left in a file that has a successor.
func (r *Reader) unread() error {
	st, err := os.Stat(filepath.Join(r.dir, r.file))
	if err != nil || st.Size() == r.offset {
		return nil
	}
	return r.damage("%s: %d bytes after byte %d are no record", r.file, st.Size()-r.offset, r.offset)
}

func (r *Reader) damage(format string, args ...any) error {
	return &Damage{Slot: r.slot, What: "changed", Number: r.scan.number, Detail: fmt.Sprintf(format, args...)}
}

// readFile reads what the present file has beyond the offset.
func (r *Reader) readFile(fn func(Record) error) error {
	f, err := os.Open(filepath.Join(r.dir, r.file))
	if errors.Is(err, os.ErrNotExist) {
		return &Damage{Slot: r.slot, What: "missing", Number: r.scan.number, Detail: r.file + " is gone"}
	} else if err != nil {
		return fmt.Errorf("hsm/uselog: %w", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return fmt.Errorf("hsm/uselog: %w", err)
	}
	if st.Size() < r.offset {
		return &Damage{Slot: r.slot, What: "cut", Number: r.scan.number, Detail: fmt.Sprintf("%s has %d bytes and had %d", r.file, st.Size(), r.offset)}
	}
	size := int(st.Size() - r.offset)
	if size > cap(r.buffer) {
		r.buffer = make([]byte, size)
	}
	b := r.buffer[:size] // whose records are copied out of it
	if size > maxBuffer {
		r.buffer = nil
	}
	if n, err := f.ReadAt(b, r.offset); n < len(b) {
		return fmt.Errorf("hsm/uselog: %s: %w", r.file, err)
	}
	for len(b) > 0 {
		n, rec, err := r.scan.next(b)
		if errors.Is(err, errShort) {
			return nil
		}
		if err != nil {
			return r.damage("%s at byte %d: %v", r.file, r.offset, err)
		}
		b = b[n:]
		r.offset += int64(n)
		if err := fn(rec); err != nil {
			return err
		}
	}
	return nil
}

// Sync puts what the reader has read on disk, so that what is then said of it elsewhere outlives a power cut.
func (r *Reader) Sync() error {
	if r.file == "" {
		return nil
	}
	for _, name := range []string{filepath.Join(r.dir, r.file), r.dir} {
		f, err := os.Open(name)
		if err != nil {
			return fmt.Errorf("hsm/uselog: %w", err)
		}
		if err := errors.Join(f.Sync(), f.Close()); err != nil {
			return fmt.Errorf("hsm/uselog: %w", err)
		}
	}
	return nil
}

// Prune removes the files before the one the reader is in.
func (r *Reader) Prune() error {
	names, err := files(r.dir, r.slot)
	if err != nil {
		return fmt.Errorf("hsm/uselog: %w", err)
	}
	for _, name := range names {
		if r.file != "" && name < r.file {
			if err := os.Remove(filepath.Join(r.dir, name)); err != nil {
				return fmt.Errorf("hsm/uselog: %w", err)
			}
		}
	}
	return nil
}

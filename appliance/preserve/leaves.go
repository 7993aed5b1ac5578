package preserve

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"yinjian/appliance/audit"
	"yinjian/tsa/ers"
)

// A leaf file holds a batch's tree so that one record's path costs the same however many there are: a row for each leaf,
// in order (8 bytes of sequence, big-endian, then the hash), then the root of each chunk of rows. A path is the one within
// its chunk and the one of its chunk's root. Nothing in it is believed: the roots lead to the one that was stamped, or the
// file is made again from the journal.
const chunk = 4096 // a power of two, so that the trees of chunks are parts of the whole tree

func leafFile(dir string, first uint64, chain int) string {
	return filepath.Join(dir, fmt.Sprintf("%016x-%d.leaves", first, chain))
}

// A leafWriter writes one.
type leafWriter struct {
	name      string
	file      *os.File
	out       *bufio.Writer
	algorithm ers.Algorithm
	pending   [][]byte // of the chunk that is not full
	roots     [][]byte
	count     uint64
	done      bool
}

func createLeaves(dir string, first uint64, chain int, a ers.Algorithm) (*leafWriter, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	name := leafFile(dir, first, chain)
	f, err := os.Create(name + ".new")
	if err != nil {
		return nil, err
	}
	return &leafWriter{name: name, file: f, out: bufio.NewWriter(f), algorithm: a}, nil
}

func (w *leafWriter) add(sequence uint64, leaf []byte) error {
	w.count++
	if w.pending = append(w.pending, leaf); len(w.pending) == chunk {
		w.closeChunk()
	}
	var number [8]byte
	binary.BigEndian.PutUint64(number[:], sequence)
	if _, err := w.out.Write(number[:]); err != nil {
		return err
	}
	_, err := w.out.Write(leaf)
	return err
}

func (w *leafWriter) closeChunk() {
	w.roots = append(w.roots, ers.NewTree(w.algorithm, w.pending).Root())
	w.pending = nil
}

// finish puts the file in place and answers the root.
func (w *leafWriter) finish() ([]byte, error) {
	if len(w.pending) > 0 {
		w.closeChunk()
	}
	for _, r := range w.roots {
		if _, err := w.out.Write(r); err != nil {
			return nil, err
		}
	}
	if err := errors.Join(w.out.Flush(), w.file.Close(), os.Rename(w.name+".new", w.name)); err != nil {
		return nil, err
	}
	w.done = true
	return ers.NewTree(w.algorithm, w.roots).Root(), nil
}

// abandon removes what was not finished.
func (w *leafWriter) abandon() {
	if !w.done {
		w.file.Close()
		os.Remove(w.name + ".new")
	}
}

// A leafCache remembers the chunk that was asked for last: neighbours are asked for together.
type leafCache struct {
	mu    sync.Mutex // guards what follows
	name  string
	at    int
	rows  []byte
	tree  *ers.Tree // of the chunk
	above *ers.Tree // of the chunks' roots
}

var errNoLeaf = errors.New("the leaves' file does not fit")

// path are the siblings of a record's leaf in a chain of its batch. The file is made again if it is not what was stamped.
func (s *Service) path(ctx context.Context, b *batch, chain int, sequence uint64) ([][]byte, error) {
	s.mu.Lock()
	a := b.chains[chain]
	s.mu.Unlock()
	name := leafFile(s.cfg.Dir, b.first, chain)
	path, err := s.leaves.path(name, a, sequence)
	if !unfit(err) {
		return path, err
	}
	// One makes it, whoever else wants it waits; a chain's file wants those of the chains before it, never of later ones.
	unlock, err := s.making.Lock(ctx, name)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if path, err = s.leaves.path(name, a, sequence); !unfit(err) {
		return path, err
	}
	s.cfg.Log.WithError(err).Info("leaves of archived records are made again from the journal")
	// Not under ctx: the time that one request has may never be enough, and whoever asks next would begin anew.
	if err := s.remake(context.WithoutCancel(ctx), b, chain, a); err != nil {
		return nil, err
	}
	return s.leaves.path(name, a, sequence)
}

func unfit(err error) bool { return errors.Is(err, errNoLeaf) || errors.Is(err, fs.ErrNotExist) }

// remake makes a chain's file from the journal.
func (s *Service) remake(ctx context.Context, b *batch, chain int, a *archived) error {
	w, err := createLeaves(s.cfg.Dir, b.first, chain, a.algorithm)
	if err != nil {
		return err
	}
	defer w.abandon()
	err = s.Records(ctx, b.first, b.end, func(r *audit.Record) error {
		var before *ers.Record
		if chain > 0 {
			if before, err = s.recordOf(ctx, r, b, chain); err != nil {
				return err
			}
		}
		leaf, err := s.leaf(ctx, r, a.algorithm, before)
		if err != nil {
			return err
		}
		return w.add(r.Sequence, leaf)
	})
	if err != nil {
		return fmt.Errorf("preserve: records from %d: %w", b.first, err)
	}
	root, err := w.finish()
	if err != nil {
		return err
	}
	if !bytes.Equal(root, a.root) {
		return fmt.Errorf("preserve: records from %d do not hash to what entry %d stamped: %w", b.first, a.entry, audit.ErrCorrupt)
	}
	return nil
}

func (c *leafCache) path(name string, a *archived, sequence uint64) ([][]byte, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	hash := len(a.algorithm.Sum())
	row := 8 + hash
	if c.name != name || c.find(row, sequence) < 0 {
		if err := c.load(name, a, row, hash, sequence); err != nil {
			c.name = ""
			return nil, err
		}
	}
	i := c.find(row, sequence)
	if i < 0 {
		return nil, errNoLeaf
	}
	return append(c.tree.Path(i), c.above.Path(c.at)...), nil
}

// find is the number of a record's row in the chunk at hand.
func (c *leafCache) find(row int, sequence uint64) int {
	low, high := 0, len(c.rows)/row
	for low < high {
		mid := (low + high) / 2
		if binary.BigEndian.Uint64(c.rows[mid*row:]) < sequence {
			low = mid + 1
		} else {
			high = mid
		}
	}
	if low*row < len(c.rows) && binary.BigEndian.Uint64(c.rows[low*row:]) == sequence {
		return low
	}
	return -1
}

// load reads the chunk with the record, and the roots, and holds both against what was stamped.
func (c *leafCache) load(name string, a *archived, row, hash int, sequence uint64) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	chunks := int((a.count + chunk - 1) / chunk)
	if st, err := f.Stat(); err != nil || st.Size() != int64(a.count)*int64(row)+int64(chunks*hash) {
		return errNoLeaf
	}
	tail := make([]byte, chunks*hash)
	if _, err := f.ReadAt(tail, int64(a.count)*int64(row)); err != nil {
		return err
	}
	var roots [][]byte
	for i := range chunks {
		roots = append(roots, tail[i*hash:(i+1)*hash])
	}
	above := ers.NewTree(a.algorithm, roots)
	if !bytes.Equal(above.Root(), a.root) {
		return errNoLeaf
	}
	// The last chunk that begins at or before the record.
	at := 0
	for low, high := 0, chunks; low < high; {
		mid := (low + high) / 2
		var number [8]byte
		if _, err := f.ReadAt(number[:], int64(mid)*chunk*int64(row)); err != nil {
			return err
		}
		if binary.BigEndian.Uint64(number[:]) <= sequence {
			at, low = mid, mid+1
		} else {
			high = mid
		}
	}
	n := min(chunk, int(a.count)-at*chunk)
	rows := make([]byte, n*row)
	if _, err := io.ReadFull(io.NewSectionReader(f, int64(at)*chunk*int64(row), int64(len(rows))), rows); err != nil {
		return err
	}
	var leaves [][]byte
	for i := range n {
		leaves = append(leaves, rows[i*row+8:(i+1)*row])
	}
	tree := ers.NewTree(a.algorithm, leaves)
	if !bytes.Equal(tree.Root(), roots[at]) {
		return errNoLeaf
	}
	c.name, c.at, c.rows, c.tree, c.above = name, at, rows, tree, above
	return nil
}

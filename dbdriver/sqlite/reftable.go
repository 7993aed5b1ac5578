package sqlite

import (
	"context"
	"encoding/binary"
	"slices"
	"sync/atomic"
	"time"
)

// A refTable says in memory which entries of a segment that the index of references does not cover may have a reference:
// nearly every look-up is for a new one, and a reading connection starts with an empty cache after each transaction of the
// writer. What it names is asked for by number; an entry too many costs a query and no more. It is a hash table without
// removal: half of each word are bits of the reference, which are an SM3 digest's, the other half is the entry's place in
// the segment. Safe for concurrent use.
type refTable struct {
	first uint64
	words []atomic.Uint64 // a power of two of them; 0: free
	ready atomic.Bool     // what the file held when it was opened is in it
	over  atomic.Bool     // something found no room: the file is asked
}

const (
	// refWords for each entry: a look-up for a new reference then meets a free word after one and a half.
	refWords = 2
	// maxRefEntries is the longest segment that has a table: 64 MiB.
	maxRefEntries = 4 * defaultLength
	// maxRefSteps bounds a look-up where one reference has very many entries.
	maxRefSteps = 1024
)

func newRefTable(first uint64, entries int) *refTable {
	words := 64
	for words < min(entries, maxRefEntries)*refWords {
		words *= 2
	}
	f := &refTable{first: first, words: make([]atomic.Uint64, words)}
	// References are random: a few thousand of them would have the system hand out all of the table, page by page, and what the
	// process takes would grow for as long as that lasts. It has all of it from the start.
	for i := 0; i < len(f.words); i += 4096 / 8 {
		f.words[i].Store(0)
	}
	return f
}

// add is called before the entry's transaction is committed: who is told of the entry finds it.
func (f *refTable) add(ref []byte, sequence uint64) {
	if f == nil || len(ref) != 32 {
		return
	}
	place := sequence - f.first + 1
	if sequence < f.first || place >= 1<<32 {
		f.over.Store(true)
		return
	}
	word := binary.BigEndian.Uint64(ref)&^(1<<32-1) | place
	at := binary.BigEndian.Uint64(ref[8:])
	for range maxRefSteps {
		w := &f.words[at&uint64(len(f.words)-1)]
		if w.Load() == word || w.CompareAndSwap(0, word) || w.Load() == word { // the last: somebody else has just added the same
			return
		}
		at++
	}
	f.over.Store(true)
}

// find answers the numbers of the entries that may have the reference, ascending. Without known it says nothing.
func (f *refTable) find(ref []byte) (named []uint64, known bool) {
	if f == nil || len(ref) != 32 || !f.ready.Load() || f.over.Load() {
		return nil, false
	}
	bits := binary.BigEndian.Uint64(ref) >> 32
	at := binary.BigEndian.Uint64(ref[8:])
	for range maxRefSteps {
		word := f.words[at&uint64(len(f.words)-1)].Load()
		if word == 0 {
			break
		}
		if word>>32 == bits {
			named = append(named, f.first+word&(1<<32-1)-1)
		}
		at++
	}
	slices.Sort(named)
	return named, true
}

// fillAfter is how long after it was opened a segment's references are read: a start comes first.
const fillAfter = time.Second

// fill adds what the segment holds. Until it is done, and after an error, every look-up goes to the file.
func (f *refTable) fill(ctx context.Context, s *segment) error {
	err := s.references(ctx, func(ref []byte, seq int64) {
		if seq >= 0 {
			f.add(ref, uint64(seq))
		}
	})
	if err == nil {
		f.ready.Store(true)
	}
	return err
}

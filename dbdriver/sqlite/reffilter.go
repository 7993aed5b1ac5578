package sqlite

import (
	"context"
	"database/sql"
	"encoding/binary"
	"sync/atomic"
	"time"
)

// A refFilter answers for most references that no entry of the active segment has them: nearly every look-up is for a
// new one, and a reading connection starts with an empty cache after each transaction of the writer. It is a Bloom
// filter over the references' own bits, which are an SM3 digest's. Safe for concurrent use.
type refFilter struct {
	bits  []atomic.Uint64 // a power of two of them
	ready atomic.Bool     // what the file held when it was opened is in it
}

// filterBits for each entry: with four bits set for each reference, 0.3 % are asked for in vain.
const filterBits = 16

func newRefFilter(entries int) *refFilter {
	words := 1
	for words*64 < min(entries, defaultLength)*filterBits {
		words *= 2
	}
	return &refFilter{bits: make([]atomic.Uint64, words)}
}

// places are the four bits of a reference, as word and mask.
func (f *refFilter) places(ref []byte) (words [4]uint64, masks [4]uint64) {
	for i := range words {
		n := binary.BigEndian.Uint64(ref[8*i:])
		words[i], masks[i] = n>>6&uint64(len(f.bits)-1), 1<<(n&63)
	}
	return words, masks
}

// add is called before the entry's transaction is committed: who is told of the entry finds it.
func (f *refFilter) add(ref []byte) {
	if f == nil || len(ref) != 32 {
		return
	}
	words, masks := f.places(ref)
	for i, w := range words {
		f.bits[w].Or(masks[i])
	}
}

// lacks reports that no entry has the reference. False says nothing.
func (f *refFilter) lacks(ref []byte) bool {
	if f == nil || len(ref) != 32 || !f.ready.Load() {
		return false
	}
	words, masks := f.places(ref)
	for i, w := range words {
		if f.bits[w].Load()&masks[i] == 0 {
			return true
		}
	}
	return false
}

// fill adds what the segment holds. While it runs, and after an error, every look-up goes to the file. After each page it
// rests as long as that took: a start comes first.
func (f *refFilter) fill(ctx context.Context, s *segment) error {
	ref, seq := []byte{}, int64(0)
	for {
		n := 0
		begun := time.Now() // interval
		err := s.query(func(db *sql.DB) error {
			rows, err := db.QueryContext(ctx, selectRefs, ref, seq, refPage)
			if err != nil {
				return err
			}
			defer rows.Close()
			for ; rows.Next(); n++ {
				if err := rows.Scan(&ref, &seq); err != nil {
					return err
				}
				f.add(ref)
			}
			return rows.Err()
		})
		if err != nil {
			return err
		}
		if n < refPage {
			f.ready.Store(true)
			return nil
		}
		select {
		case <-time.After(time.Since(begun)):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

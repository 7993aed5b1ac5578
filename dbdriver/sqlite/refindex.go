package sqlite

import (
	"bytes"
	"cmp"
	"context"
	"database/sql"
	"database/sql/driver"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"yinjian/appliance/audit"
)

// A refIndex says which entries of sealed segments may have a reference, so that looking one up costs the same however many
// segments there are. It holds eight bytes of each reference's SM3 and the entry's number; the entry itself is asked
// then, so that a row too many costs a query and no more. A row too few would hide an entry, as it would in the index
// that each segment carries itself: whoever can write this file can write those.
//
// It is derived, built in the background from each segment once it is sealed, and thrown away and built anew when it
// cannot be read, has another schema, or was made of other segments than these. What it does not cover is asked one by one.
// Safe for concurrent use; a nil one covers nothing.
type refIndex struct {
	journal *Journal
	cancel  context.CancelFunc
	done    chan struct{}
	sealed  chan struct{} // told when there may be work
	failed  chan error    // told when it could not be read

	mu      sync.RWMutex // guards what follows; find holds it shared while it asks
	read    *sql.DB      // nil when covered is
	covered map[int]bool // never changed, only replaced
}

const (
	refPage = 4096
	// refRetry is how long the index waits after an error before it is made anew.
	refRetry = time.Minute
)

func (j *Journal) refFile() string { return filepath.Join(j.cfg.Dir, "refs.db") }

func openRefIndex(j *Journal) *refIndex {
	ctx, cancel := context.WithCancel(context.Background())
	x := &refIndex{journal: j, cancel: cancel, done: make(chan struct{}), sealed: make(chan struct{}, 1), failed: make(chan error, 1)}
	x.wake()
	go x.run(ctx)
	return x
}

func (x *refIndex) close() {
	x.cancel()
	<-x.done
}

// wake says that a segment was sealed.
func (x *refIndex) wake() {
	if x == nil {
		return
	}
	select {
	case x.sealed <- struct{}{}:
	default:
	}
}

// find answers the numbers of the entries that may have the reference, ascending, and of which segments that is said.
func (x *refIndex) find(ctx context.Context, ref []byte) (named []int64, covered map[int]bool) {
	if x == nil {
		return nil, nil
	}
	named, covered, err := x.ask(ctx, ref)
	if err != nil { // the segments themselves are asked, all of them
		if ctx.Err() == nil {
			x.giveUp(err)
		}
		return nil, nil
	}
	return named, covered
}

func (x *refIndex) ask(ctx context.Context, ref []byte) (named []int64, covered map[int]bool, err error) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	if len(x.covered) == 0 {
		return nil, nil, nil
	}
	err = direct(ctx, x.read, selectRef, []int64{refNumber(ref)}, func(values []driver.Value) {
		n, _ := values[0].(int64) // the table is STRICT
		named = append(named, n)
	})
	return named, x.covered, classify(err)
}

// giveUp stops asking the index; it is made anew.
func (x *refIndex) giveUp(err error) {
	x.mu.Lock()
	x.covered = nil
	x.mu.Unlock()
	select {
	case x.failed <- err:
	default:
	}
}

func refNumber(ref []byte) int64 {
	sum := audit.Sum(ref)
	return int64(binary.BigEndian.Uint64(sum[:8]))
}

func (x *refIndex) notice(err error) {
	if f := x.journal.cfg.Notice; f != nil {
		f(fmt.Errorf("sqlite: index of references: %w", err))
	}
}

// run builds the index as segments are sealed. After an error it begins anew, from nothing.
func (x *refIndex) run(ctx context.Context) {
	defer close(x.done)
	for ctx.Err() == nil {
		err := x.serve(ctx)
		if ctx.Err() != nil {
			return
		}
		x.notice(err)
		x.remove()
		select {
		case <-ctx.Done():
		case <-time.After(refRetry):
		}
	}
}

func (x *refIndex) remove() {
	for _, suffix := range []string{"", "-wal", "-shm", "-journal"} {
		if err := os.Remove(x.journal.refFile() + suffix); err != nil && !errors.Is(err, os.ErrNotExist) {
			x.notice(err)
		}
	}
}

var errOtherIndex = errors.New("it was made of another journal")

// serve opens the file, publishes it for readers and keeps it complete, until ctx ends or something fails.
func (x *refIndex) serve(ctx context.Context) error {
	db, covered, err := x.openFile(ctx)
	if err != nil && ctx.Err() == nil { // made anew at once: an index that was lost or replaced is no event
		if !errors.Is(err, os.ErrNotExist) {
			x.notice(err)
		}
		x.remove()
		if err = x.make(ctx); err == nil {
			db, covered, err = x.openFile(ctx)
		}
	}
	if err != nil {
		return err
	}
	defer db.Close() // after the readers: the last connection folds the log into the file
	read, err := open(x.journal.refFile(), true, 4)
	if err != nil {
		return err
	}
	defer func() {
		x.mu.Lock()
		x.read, x.covered = nil, nil
		x.mu.Unlock()
		read.Close()
	}()
	x.mu.Lock()
	x.read, x.covered = read, covered
	x.mu.Unlock()
	for {
		segs, err := x.journal.list()
		if err != nil {
			return err
		}
		for _, s := range segs {
			seal := s.sealed()
			if seal == nil || covered[s.number] {
				continue
			}
			if err := x.take(ctx, db, s, seal); err != nil {
				return fmt.Errorf("segment %d: %w", s.number, classify(err))
			}
			covered = maps.Clone(covered)
			covered[s.number] = true
			x.mu.Lock()
			x.covered = covered
			x.mu.Unlock()
			s.refs.Store(nil)
			x.journal.at("index/covered")
		}
		select {
		case <-x.sealed:
		case err := <-x.failed:
			return err
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (x *refIndex) make(ctx context.Context) error {
	f, err := os.OpenFile(x.journal.refFile(), os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	f.Close()
	db, err := open(x.journal.refFile(), false, 1)
	if err != nil {
		return err
	}
	defer db.Close()
	return migrate(ctx, db, "index", math.MaxInt64)
}

// openFile opens the file for writing and compares it with the segments.
func (x *refIndex) openFile(ctx context.Context) (_ *sql.DB, covered map[int]bool, err error) {
	if _, err := os.Stat(x.journal.refFile()); err != nil {
		return nil, nil, err
	}
	db, err := open(x.journal.refFile(), false, 1)
	if err != nil {
		return nil, nil, err
	}
	defer func() {
		if err != nil {
			db.Close()
		}
	}()
	want, err := indexSchema()
	if err != nil {
		return nil, nil, err
	}
	found, _, err := want.differences(ctx, db)
	if err != nil {
		return nil, nil, err
	}
	if err := schemaError(found); err != nil {
		return nil, nil, err
	}
	var mode string
	if err := db.QueryRowContext(ctx, `PRAGMA journal_mode = WAL`).Scan(&mode); err != nil {
		return nil, nil, classify(err)
	}
	segs, err := x.journal.list()
	if err != nil {
		return nil, nil, err
	}
	seals := map[int]*audit.Seal{}
	for _, s := range segs {
		seals[s.number] = s.sealed()
	}
	covered = map[int]bool{}
	rows, err := db.QueryContext(ctx, selectRefSegment)
	if err != nil {
		return nil, nil, classify(err)
	}
	defer rows.Close()
	for rows.Next() {
		var n int
		var sum []byte
		if err := rows.Scan(&n, &sum); err != nil {
			return nil, nil, classify(err)
		}
		if seal := seals[n]; seal == nil || !bytes.Equal(sum, sealSum(seal)) {
			return nil, nil, errOtherIndex
		}
		covered[n] = true
	}
	return db, covered, classify(rows.Err())
}

func sealSum(s *audit.Seal) []byte {
	sum := audit.Sum(s.Marshal())
	return sum[:]
}

// take puts a segment's references into the index, in the order of the index, some thousand in each transaction; the last
// one says that the segment is complete. Between two it rests as long as the last one took: signing comes first.
func (x *refIndex) take(ctx context.Context, db *sql.DB, s *segment, seal *audit.Seal) error {
	type pair struct{ ref, seq int64 }
	pairs := make([]pair, 0, min(seal.Count, defaultLength))
	err := s.references(ctx, func(ref []byte, seq int64) { pairs = append(pairs, pair{refNumber(ref), seq}) })
	if err != nil {
		return err
	}
	slices.SortFunc(pairs, func(a, b pair) int { return cmp.Or(cmp.Compare(a.ref, b.ref), cmp.Compare(a.seq, b.seq)) })
	for chunk := range slices.Chunk(pairs, refPage) {
		begun := time.Now() // interval
		err := inTx(ctx, db, func(tx *sql.Tx) error {
			insert, err := tx.PrepareContext(ctx, insertRef)
			if err != nil {
				return err
			}
			defer insert.Close()
			for _, p := range chunk {
				if _, err := insert.ExecContext(ctx, p.ref, p.seq); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
		x.journal.at("index/chunk")
		select {
		case <-time.After(time.Since(begun)):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return inTx(ctx, db, func(tx *sql.Tx) error {
		return one(tx.ExecContext(ctx, insertRefSegment, s.number, sealSum(seal)))
	})
}

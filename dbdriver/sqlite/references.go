package sqlite

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"yinjian/appliance/audit"
)

// references calls fn with all references of the segment and their entries' numbers, in the order of the file's index. ref
// is fn's until it returns. After each page it rests as long as that took: signing comes first.
func (s *segment) references(ctx context.Context, fn func(ref []byte, seq int64)) error {
	page := s.refPages(fn)
	if s.format >= 3 {
		page = s.refRuns(fn)
	}
	for {
		begun := time.Now() // interval
		more, err := false, error(nil)
		err = s.query(func(db *sql.DB) (err error) {
			more, err = page(ctx, db)
			return err
		})
		if err != nil || !more {
			return err
		}
		select {
		case <-time.After(time.Since(begun)):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// refPages reads a page of the index of formats 1 and 2 with each call.
func (s *segment) refPages(fn func([]byte, int64)) func(context.Context, *sql.DB) (more bool, err error) {
	ref, seq := []byte{}, int64(math.MinInt64)
	return func(ctx context.Context, db *sql.DB) (bool, error) {
		rows, err := db.QueryContext(ctx, selectRefs, ref, seq, refPage)
		if err != nil {
			return false, err
		}
		defer rows.Close()
		n := 0
		for ; rows.Next(); n++ {
			if err := rows.Scan(&ref, &seq); err != nil {
				return false, err
			}
			fn(ref, seq)
		}
		return n == refPage, rows.Err()
	}
}

// refRuns reads a run of format 3 with each call.
func (s *segment) refRuns(fn func([]byte, int64)) func(context.Context, *sql.DB) (more bool, err error) {
	var run *int64 // the last one that was read
	return func(ctx context.Context, db *sql.DB) (bool, error) {
		var next int64
		var err error
		if run == nil {
			err = db.QueryRowContext(ctx, selectFirstRun).Scan(&next)
		} else {
			err = db.QueryRowContext(ctx, selectNextRun+"?"+orderRuns, *run).Scan(&next)
		}
		if errors.Is(err, sql.ErrNoRows) {
			return false, nil
		}
		if err != nil {
			return false, err
		}
		run = &next
		var refs []byte
		var numbers sql.NullString
		if err := db.QueryRowContext(ctx, selectRunRefs, next).Scan(&refs, &numbers); err != nil {
			return false, err
		}
		for rest := numbers.String; rest != ""; refs = refs[32:] {
			var number string
			number, rest, _ = strings.Cut(rest, ",")
			seq, err := strconv.ParseInt(number, 10, 64)
			if err != nil || len(refs) < 32 {
				return false, fmt.Errorf("%w: references of run %d: %d bytes are left, next number %q", audit.ErrCorrupt, next, len(refs), number)
			}
			fn(refs[:32:32], seq)
		}
		return true, nil
	}
}

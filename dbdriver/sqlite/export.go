package sqlite

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	sqlite3 "github.com/mattn/go-sqlite3"

	"yinjian/appliance/audit"
	"yinjian/dbdriver"
)

// An ExportConfig says which journal is copied and how.
type ExportConfig struct {
	Dir   string // of the journal
	After int    // segments up to this number are left out; they are sealed
	// Scratch is a folder for one segment's copy, on a volume of the appliance's own.
	Scratch string
	// Pace is called before n bytes, at most ExportStep, are read; it waits, or ends the export with an error. It is not called
	// for segments that were begun after the export: slower than the journal grows, an export would never end.
	Pace func(n int) error
	// Pinned is called when the last segment is fixed, before its bytes are read: what else has to fit the journal's end is
	// to be copied now.
	Pinned func() error
	// Segment is given each segment's file, ascending. r is valid until it returns.
	Segment func(number int, sealed bool, size int64, r io.Reader) error
}

// An Exported says what was copied.
type Exported struct {
	Segments int    // the last one's number
	Through  int    // the last one that is sealed, and whose file will never change; 0: none
	Entries  uint64 // of the whole journal up to there
}

// Export copies a journal's files as they are at one moment, beside the process that writes it; nothing is written there.
// A sealed segment's file is read as it is. The active one is copied page by page by SQLite's backup API, inside one read
// transaction, so that entries go on being written; its log is not folded into the file meanwhile and grows. Memory does
// not grow with the journal.
//
// It must not be called in the process that has the journal open: closing any descriptor of a file ends the locks that
// SQLite has on it there (https://www.sqlite.org/howtocorrupt.html#_posix_advisory_locks_canceled_by_a_separate_thread_doing_close_).
func Export(ctx context.Context, cfg ExportConfig) (Exported, error) {
	j := &Journal{cfg: JournalConfig{Dir: cfg.Dir}}
	out := Exported{Through: cfg.After}
	active := cfg.After + 1
	for there := func(n int) bool { _, err := os.Stat(j.file(n)); return err == nil }; there(active + 1); active++ {
	}
	for number := cfg.After + 1; ; number++ {
		if number > active {
			cfg.Pace = func(int) error { return ctx.Err() }
		}
		if _, err := os.Stat(j.file(number)); errors.Is(err, os.ErrNotExist) {
			// Roll has sealed the last one and not made the next: opening the copy does.
			if out.Segments == 0 {
				return out, fmt.Errorf("sqlite: exporting: no segment %d in %s: %w", number, cfg.Dir, dbdriver.ErrNotFound)
			}
			return out, cfg.Pinned()
		}
		done, err := exportSegment(ctx, j.file(number), number, &cfg, &out)
		if err != nil {
			return out, fmt.Errorf("sqlite: exporting segment %d: %w", number, err)
		}
		if done {
			return out, nil
		}
	}
}

// exportSegment copies one segment; done: it was the active one.
func exportSegment(ctx context.Context, file string, number int, cfg *ExportConfig, out *Exported) (done bool, err error) {
	db, err := open(file, true, 1)
	if err != nil {
		return false, err
	}
	defer db.Close()
	conn, err := db.Conn(ctx)
	if err != nil {
		return false, classify(err)
	}
	defer conn.Close()
	var mode string
	if err := conn.QueryRowContext(ctx, `PRAGMA journal_mode`).Scan(&mode); err != nil {
		return false, classify(err)
	}
	tx, err := conn.BeginTx(ctx, &sql.TxOptions{ReadOnly: true}) // the first statement in it fixes what is read
	if err != nil {
		return false, classify(err)
	}
	defer tx.Rollback() // nothing was written
	var stored, format int
	var first int64
	var sealed []byte
	if err := tx.QueryRowContext(ctx, selectSegment).Scan(&stored, &format, &first, &sealed); err != nil {
		return false, classify(err)
	}
	if stored != number {
		return false, fmt.Errorf("%w: the file says it is segment %d", audit.ErrCorrupt, stored)
	}
	out.Segments, out.Entries = number, uint64(first)
	row, err := scanRow(tx.QueryRowContext(ctx, (&segment{format: format}).text(selectLastEntry)).Scan)
	switch {
	case err == nil:
		out.Entries = uint64(row.Sequence) + 1
	case !errors.Is(err, sql.ErrNoRows):
		return false, classify(err)
	}
	if sealed != nil && mode == "delete" {
		out.Through = number
		return false, exportFile(file, number, cfg) // the transaction keeps everybody from changing it
	}
	if sealed == nil {
		if err := cfg.Pinned(); err != nil {
			return false, err
		}
	}
	copied := filepath.Join(cfg.Scratch, filepath.Base(file))
	defer os.Remove(copied)
	if err := copyPages(ctx, conn, copied, cfg.Pace); err != nil {
		return false, err
	}
	f, err := os.Open(copied)
	if err != nil {
		return false, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return false, err
	}
	return sealed == nil, cfg.Segment(number, sealed != nil, st.Size(), &paced{f, cfg.Pace})
}

func exportFile(file string, number int, cfg *ExportConfig) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	return cfg.Segment(number, true, st.Size(), &paced{f, cfg.Pace})
}

// ExportStep is what is read between two waits at most, in bytes.
const ExportStep = 256 << 10

// pagesAtOnce are what is copied between two waits; a page has 4 KiB.
const pagesAtOnce = ExportStep / 4096

// copyPages copies the database of a connection with an open read transaction to a new file. The backup goes on from step
// to step only because that transaction stays open: otherwise each write by the journal would begin it anew
// (https://www.sqlite.org/c3ref/backup_finish.html#sqlite3backupstep).
func copyPages(ctx context.Context, from *sql.Conn, file string, pace func(int) error) error {
	if err := os.Remove(file); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(file, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	db, err := openSynchronous(file, false, 1, "OFF") // a copy that a stop leaves is thrown away
	if err != nil {
		return err
	}
	defer db.Close()
	to, err := db.Conn(ctx)
	if err != nil {
		return classify(err)
	}
	defer to.Close()
	err = to.Raw(func(dst any) error {
		return from.Raw(func(src any) error {
			b, err := dst.(*sqlite3.SQLiteConn).Backup("main", src.(*sqlite3.SQLiteConn), "main")
			if err != nil {
				return err
			}
			for {
				done, err := b.Step(pagesAtOnce)
				if err == nil && !done {
					err = pace(ExportStep)
				}
				if err == nil {
					err = ctx.Err()
				}
				if err != nil || done {
					return errors.Join(err, b.Finish())
				}
			}
		})
	})
	return classify(err)
}

// paced asks before each read.
type paced struct {
	r    io.Reader
	pace func(int) error
}

func (p *paced) Read(b []byte) (int, error) {
	b = b[:min(len(b), ExportStep)]
	if err := p.pace(len(b)); err != nil {
		return 0, err
	}
	return p.r.Read(b)
}

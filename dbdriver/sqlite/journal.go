package sqlite

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sort"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"yinjian/appliance/audit"
	"yinjian/dbdriver"
	"yinjian/ntp"
)

// JournalConfig says where the journal is and how long its segments are.
type JournalConfig struct {
	Dir string // made with mode 0700 if it is not there
	// SegmentEntries is the length of a segment, at least 2; 0: 1,000,000.
	SegmentEntries int
	// Monthly also begins a segment with each calendar month (UTC), while the clock is trusted.
	Monthly bool
	// ReadOnly takes no lock and repairs nothing: for verifying a copy, or a journal beside its appliance. A segment
	// that cannot be read is then listed with its error.
	ReadOnly bool
	// Notice, if set, is told what went wrong with the index of references, which the journal can do without: looking a
	// reference up costs more then. It is called from any goroutine.
	Notice func(error)

	fault func(step string) // tests stop the process here
}

const (
	formatNo      = 3
	upgradeNo     = 2 // what an active segment of format 1 is brought to
	defaultLength = 1_000_000
	pageRows      = 128  // rows of one read; bounds memory, an entry with what is in its row has at most 320 KiB
	recentBlobs   = 4096 // digests remembered, so that certificates and CRLs are not sent to the disk again
)

// formatMigrations are the last migrations of the segments' formats. Format 1 kept every payload in yj_blob, under its
// digest; format 2 keeps in own_data those that are one entry's alone. Format 3 has the inner nodes in the order of nodeNo,
// and its index of references in runs of entries, so that those written together change the same few pages of it. A sealed
// segment stays as it is; an active one of format 1 is brought to upgradeNo when the journal is opened for writing, one of
// format 2 goes on as it is until it is full.
var formatMigrations = [...]int64{1: 9, 2: 10, 3: 14}

// Journal is an audit.Store. See [OpenJournal].
type Journal struct {
	cfg   JournalConfig
	locks []*os.File // none when read only
	index *refIndex  // nil when read only

	mu       sync.RWMutex // guards segments and closed; the writer holds it for rolling only
	segments []*segment   // by number, without gaps when writable
	closed   bool

	// writing serialises Append, Roll, PutCheckpoint and PutToken, and guards what follows.
	writing sync.Mutex
	next    uint64 // sequence of the next entry; valid if !doubt
	doubt   bool
	recent  map[audit.Hash]bool
	older   map[audit.Hash]bool // what recent was before it was full
	month   time.Time           // first day of the active segment's month; zero: not known yet

	filling  sync.WaitGroup     // reads the active segment's references
	stopFill context.CancelFunc // guarded by writing, but for the opening
}

// A segment is one file.
type segment struct {
	number int
	format int // 0: its head could not be read
	first  uint64
	file   string
	// writable: the journal was opened for writing, so that what a failed write left may be rolled back.
	writable bool

	// mu guards seal, read and settled. Readers hold it shared while a query runs; rolling holds it to swap the pools. The
	// writer alone changes them, so it may read them without.
	mu      sync.RWMutex
	seal    *audit.Seal
	read    *sql.DB
	settled *sql.DB // see settle; nil: it is not
	write   *writer // nil unless active; the writer's
	err     error   // read-only journals: why it cannot be read

	bare bool // it is known to have no head seal; the writer's

	schema []string // read-only journals: what was found to differ when the file was opened

	// refs is that of a writable journal's active segment, and of one before it that the index of references does not cover yet.
	refs atomic.Pointer[refTable]
}

var segmentName = regexp.MustCompile(`^journal-([0-9]{6,9})\.db$`)

func (j *Journal) file(number int) string {
	return filepath.Join(j.cfg.Dir, fmt.Sprintf("journal-%06d.db", number))
}

// OpenJournal opens the folder's segments, or makes the first. A folder that another process has open is refused with
// dbdriver.ErrInUse.
//
// It finishes what a stop interrupted: unfinished segment files (*.tmp) are removed; a last segment that is sealed and
// has no successor gets one, as Roll would have made it.
//
// A segment whose schema is not the one that was made (a table, index, trigger or view too many, missing or changed) is
// refused with dbdriver.ErrDamaged, which names it; read only, [Journal.SchemaChanges] tells. Read only, a folder
// without any segment is dbdriver.ErrNotFound.
func OpenJournal(ctx context.Context, cfg JournalConfig) (*Journal, error) {
	if cfg.SegmentEntries == 0 {
		cfg.SegmentEntries = defaultLength
	}
	if cfg.SegmentEntries < 2 {
		return nil, errors.New("sqlite: a journal segment has at least two entries")
	}
	j := &Journal{cfg: cfg, doubt: true, recent: map[audit.Hash]bool{}}
	if err := j.open(ctx); err != nil {
		j.Close()
		return nil, fmt.Errorf("sqlite: opening journal: %w", err)
	}
	if !cfg.ReadOnly {
		j.index = openRefIndex(j)
	}
	return j, nil
}

func (j *Journal) open(ctx context.Context) error {
	if !j.cfg.ReadOnly {
		if err := j.claim(); err != nil {
			return err
		}
	}
	files, err := os.ReadDir(j.cfg.Dir)
	if err != nil {
		return err
	}
	for _, f := range files {
		if m := segmentName.FindStringSubmatch(f.Name()); m != nil {
			n, _ := strconv.Atoi(m[1]) // digits only
			j.segments = append(j.segments, &segment{number: n, file: j.file(n), writable: !j.cfg.ReadOnly})
		} else if !j.cfg.ReadOnly && strings.HasPrefix(f.Name(), "journal-") && strings.Contains(f.Name(), ".tmp") {
			if err := os.Remove(filepath.Join(j.cfg.Dir, f.Name())); err != nil {
				return err
			}
		}
	}
	slices.SortFunc(j.segments, func(a, b *segment) int { return a.number - b.number })
	for i, s := range j.segments {
		last := i == len(j.segments)-1
		err := j.openSegment(ctx, s, last)
		if err == nil && !j.cfg.ReadOnly {
			switch {
			case s.number != i+1:
				err = fmt.Errorf("%w: segment %d is missing", audit.ErrCorrupt, i+1)
			case !last && s.seal == nil:
				err = fmt.Errorf("%w: it is not sealed and not the last", audit.ErrCorrupt)
			case i > 0 && s.first != j.segments[i-1].seal.Last+1:
				err = fmt.Errorf("%w: it begins at %d, the one before ends at %d", audit.ErrCorrupt, s.first, j.segments[i-1].seal.Last)
			}
		}
		if err != nil && !j.cfg.ReadOnly {
			return fmt.Errorf("segment %d: %w", s.number, err)
		}
		s.err = err
		if err != nil && i > 0 && s.first == 0 { // so that the others are found by number
			s.first = j.segments[i-1].first + 1
			if seal := j.segments[i-1].seal; seal != nil {
				s.first = seal.Last + 1
			}
		}
	}
	if j.cfg.ReadOnly {
		if len(j.segments) == 0 {
			return fmt.Errorf("%s: no segment is here: the journal is gone, or this is not its folder: %w", j.cfg.Dir, dbdriver.ErrNotFound)
		}
		return nil
	}
	if n := len(j.segments); n == 0 {
		return j.addSegment(ctx, 1, 0)
	} else if seal := j.segments[n-1].seal; seal != nil {
		return j.addSegment(ctx, n+1, seal.Last+1)
	}
	j.clearHeadSeal(ctx)
	j.settle()
	return nil
}

// claim makes the folder and locks it for this process. The lock ends with the process, however that ends.
func (j *Journal) claim() error {
	_, err := os.Stat(j.cfg.Dir)
	fresh := errors.Is(err, os.ErrNotExist)
	if err := os.MkdirAll(j.cfg.Dir, 0o700); err != nil {
		return err
	}
	if fresh {
		if err := syncFolder(filepath.Dir(j.cfg.Dir)); err != nil {
			return err
		}
	}
	// The file is what other programs may look at. The folder is locked too, where its file system can: a lock file that
	// somebody removed would otherwise let a second process in.
	f, err := os.OpenFile(filepath.Join(j.cfg.Dir, "journal.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	j.locks = append(j.locks, f)
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err != nil && !errors.Is(err, unix.EWOULDBLOCK) {
		return fmt.Errorf("locking the journal: %w", err)
	}
	if err == nil {
		d, derr := os.Open(j.cfg.Dir)
		if derr != nil {
			return derr
		}
		j.locks = append(j.locks, d)
		err = unix.Flock(int(d.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	}
	if errors.Is(err, unix.EWOULDBLOCK) {
		return fmt.Errorf("%w: another process has this journal open", dbdriver.ErrInUse)
	}
	return nil
}

// openSegment reads a segment's head and opens its pools. active: it is the last one.
//
// A connection that may write comes first: a stop may have left a log or a rollback journal beside the file, which a
// reading connection cannot apply.
func (j *Journal) openSegment(ctx context.Context, s *segment, active bool) (err error) {
	if !j.cfg.ReadOnly {
		if active || s.hasLog() {
			if err := rewriteLog(s.file + "-wal"); err != nil {
				return err
			}
			db, err := open(s.file, false, 1)
			if err != nil {
				return err
			}
			_, err = s.inspect(ctx, db)
			if err == nil && active && s.seal == nil && s.format < upgradeNo {
				err = s.upgrade(ctx, db)
			}
			db.Close()
			if err == nil && s.seal != nil {
				err = finishFile(ctx, s.file) // the stop came inside Roll
			}
			if err != nil {
				return err
			}
		}
	}
	if active && !j.cfg.ReadOnly && s.seal == nil {
		if s.write, err = openWriter(s.file, s.format); err != nil {
			return err
		}
	}
	if s.read, err = open(s.file, true, 4); err != nil {
		return err
	}
	s.read.SetConnMaxIdleTime(time.Minute) // sealed segments can be many
	readable, err := s.inspect(ctx, s.read)
	if readable && err == nil && s.write != nil {
		err = j.tableRefs(ctx, s)
	}
	if !readable {
		s.read.Close()
		s.read = nil
	} else if j.cfg.ReadOnly && len(s.schema) > 0 {
		err = nil // the verifier reads on and names them
	}
	return err
}

// rewriteLog writes the log that a stop has left over itself, the same bytes, and syncs it. After a sync that failed the
// kernel shows pages that are not on the disk, and no later sync writes them unless they are written again (Linux,
// "fsyncgate"). If power failed while such a log is folded into the file, neither would be whole.
func rewriteLog(name string) error {
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	buf := make([]byte, 1<<20)
	for at := int64(0); ; {
		n, err := f.ReadAt(buf, at)
		if n > 0 {
			if _, err := f.WriteAt(buf[:n], at); err != nil {
				return err
			}
		}
		if at += int64(n); errors.Is(err, io.EOF) {
			return f.Sync()
		} else if err != nil {
			return err
		}
	}
}

// inspect reads the segment's head and compares the file's schema. readable is false when tables are gone or others
// stand in their place.
func (s *segment) inspect(ctx context.Context, db *sql.DB) (readable bool, err error) {
	headErr := s.readHead(ctx, db)
	if errors.Is(headErr, errFormat) {
		return true, headErr
	}
	found, lost, err := s.differences(ctx, db)
	if err != nil {
		return true, err
	}
	s.schema = found
	if lost {
		return false, schemaError(found)
	}
	if headErr != nil {
		s.schema = nil
		return true, errors.Join(headErr, schemaError(found))
	}
	return true, schemaError(found)
}

// differences compares the file with the schema of its format, see [schema.differences].
func (s *segment) differences(ctx context.Context, db *sql.DB) (found []string, lost bool, err error) {
	want, err := s.made()
	if err != nil {
		return nil, false, err
	}
	return want.differences(ctx, db)
}

func (s *segment) made() (*schema, error) {
	if s.format == 0 {
		return journalSchemas[formatNo]()
	}
	return journalSchemas[s.format]()
}

// upgrade brings a segment of an earlier format to upgradeNo, in one transaction. What it holds stays where it is.
func (s *segment) upgrade(ctx context.Context, db *sql.DB) error {
	made, err := s.made()
	if err != nil {
		return err
	}
	files, err := migrationFiles("journal", formatMigrations[upgradeNo])
	if err != nil {
		return err
	}
	err = inTx(ctx, db, func(tx *sql.Tx) error {
		if err := made.unchanged(ctx, tx); err != nil {
			return err
		}
		for _, m := range files {
			if m.no <= formatMigrations[s.format] {
				continue
			}
			if err := m.apply(ctx, tx); err != nil {
				return err
			}
		}
		return one(tx.ExecContext(ctx, updateFormat, upgradeNo, s.number))
	})
	if err != nil {
		return fmt.Errorf("bringing it from format %d to %d: %w", s.format, upgradeNo, err)
	}
	s.format = upgradeNo
	return nil
}

// text is a statement that reads entries, for the segment's format.
func (s *segment) text(statement string) string {
	if s.format == 1 {
		return strings.Replace(statement, "own_data", "NULL", 1)
	}
	return statement
}

// SchemaChanges implements audit.Store.
func (j *Journal) SchemaChanges(ctx context.Context, number int) ([]string, error) {
	segs, err := j.list()
	if err != nil {
		return nil, err
	}
	for _, s := range segs {
		if s.number != number {
			continue
		}
		found := s.schema
		err := s.query(func(db *sql.DB) (err error) {
			found, _, err = s.differences(ctx, db)
			return err
		})
		if s.err != nil { // which was told already
			return s.schema, nil
		}
		return found, err
	}
	return nil, fmt.Errorf("sqlite: no segment %d: %w", number, audit.ErrNotFound)
}

func (s *segment) readHead(ctx context.Context, db *sql.DB) error {
	var number, format int
	var first int64
	var seal []byte
	if err := db.QueryRowContext(ctx, selectSegment).Scan(&number, &format, &first, &seal); err != nil {
		return classify(err)
	}
	if number != s.number || first < 0 {
		return fmt.Errorf("%w: the file says it is segment %d from %d", audit.ErrCorrupt, number, first)
	}
	if format < 1 || format > formatNo {
		return fmt.Errorf("%w: %d", errFormat, format)
	}
	s.format = format
	s.first = uint64(first)
	if seal != nil {
		parsed, err := audit.ParseSeal(seal)
		if err != nil {
			return err
		}
		s.seal = &parsed
	}
	return nil
}

// finishFile folds the write-ahead log into the file and leaves a single file in rollback mode, which can be read from
// a read-only medium.
func finishFile(ctx context.Context, file string) error {
	db, err := open(file, false, 1)
	if err != nil {
		return err
	}
	defer db.Close()
	var mode string
	if err := db.QueryRowContext(ctx, `PRAGMA journal_mode = DELETE`).Scan(&mode); err != nil {
		return classify(err)
	}
	if mode != "delete" {
		return fmt.Errorf("%w: a reader keeps the finished segment in mode %q", dbdriver.ErrUnavailable, mode)
	}
	return nil
}

// finish closes the segment's pools, finishes its file and opens it for reading again. Readers wait.
func (s *segment) finish(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.write != nil {
		s.write.close()
		s.write = nil
	}
	s.read.Close()
	finishErr := finishFile(ctx, s.file)
	read, err := open(s.file, true, 4)
	if err != nil {
		return err
	}
	read.SetConnMaxIdleTime(time.Minute)
	s.read = read
	return finishErr
}

// addSegment makes the file of a new active segment: 1. built under a temporary name, 2. fsync, 3. renamed, 4. fsync of
// the folder. A stop before 3 leaves a *.tmp file that the next open removes; after it, an empty segment, which is
// what this function makes.
func (j *Journal) addSegment(ctx context.Context, number int, first uint64) error {
	s := &segment{number: number, first: first, file: j.file(number), writable: true}
	if _, err := os.Stat(s.file); errors.Is(err, os.ErrNotExist) {
		tmp := s.file + ".tmp"
		for _, f := range []string{tmp, tmp + "-journal"} {
			if err := os.Remove(f); err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
		}
		head, err := j.lastHeadSeal(ctx)
		if err != nil {
			return err
		}
		if err := buildSegment(ctx, tmp, number, first, head); err != nil {
			return err
		}
		j.at("create/built")
		if err := os.Rename(tmp, s.file); err != nil {
			return err
		}
		j.at("create/renamed")
	} else if err != nil {
		return err
	}
	if err := syncFolder(j.cfg.Dir); err != nil {
		return err
	}
	if err := j.openSegment(ctx, s, true); err != nil {
		s.close()
		return err
	}
	j.at("create/opened")
	j.mu.Lock()
	j.segments = append(j.segments, s)
	j.mu.Unlock()
	j.next, j.doubt, j.month = 0, true, time.Time{}
	clear(j.recent)
	clear(j.older)
	j.clearHeadSeal(ctx)
	j.settle()
	return nil
}

// settle opens the files that nobody writes any more once more, without SQLite's locks and without its look at the file's
// counter of changes, which take half of the time of a look-up. Those are all sealed ones but the newest, which clearHeadSeal
// may have to write yet. These connections are for single rows, which are held against their hashes: what somebody changes in
// such a file while the process runs shows when it is read as a whole, with locks (see [segment.lookUp]). A file that cannot
// be opened so is read with locks alone.
func (j *Journal) settle() {
	segs, err := j.list()
	if err != nil {
		return
	}
	for _, s := range segs[:max(len(segs)-2, 0)] {
		if s.settled != nil || s.seal == nil || !s.bare || s.hasLog() {
			continue
		}
		db, err := openImmutable(s.file, 4)
		if err != nil {
			continue
		}
		db.SetConnMaxIdleTime(time.Minute)
		s.mu.Lock()
		s.settled = db
		s.mu.Unlock()
	}
}

// hasLog is whether a stop, or somebody else, has left something beside the file that belongs to it.
func (s *segment) hasLog() bool {
	for _, suffix := range []string{"-wal", "-journal"} {
		if _, err := os.Stat(s.file + suffix); err == nil {
			return true
		}
	}
	return false
}

// lastHeadSeal is what a new segment takes along; nil: there is none.
func (j *Journal) lastHeadSeal(ctx context.Context) (*audit.HeadSeal, error) {
	head, err := j.HeadSeal(ctx)
	if errors.Is(err, audit.ErrNotFound) {
		return nil, nil
	}
	return &head, err
}

// clearHeadSeal removes the head seal from the segments before the active one, which has it now. Left there it would let those
// after be taken away unseen. Where somebody reads a file just now, the next roll or open does it.
func (j *Journal) clearHeadSeal(ctx context.Context) {
	segs, err := j.list()
	if err != nil || len(segs) < 2 {
		return
	}
	_, missing := segs[len(segs)-1].headSeal(ctx)
	for _, s := range segs[:len(segs)-1] {
		if s.bare {
			continue
		}
		_, err := s.headSeal(ctx)
		if err == nil && missing == nil {
			s.bare = s.deleteHeadSeal(ctx) == nil
		}
		s.bare = s.bare || errors.Is(err, audit.ErrNotFound)
	}
}

func (s *segment) deleteHeadSeal(ctx context.Context) error {
	db, err := open(s.file, false, 1)
	if err != nil {
		return err
	}
	defer db.Close()
	for _, text := range []string{`PRAGMA busy_timeout = 200`, `PRAGMA secure_delete = ON`, deleteHeadSeal} {
		if _, err := db.ExecContext(ctx, text); err != nil {
			return err
		}
	}
	return nil
}

func buildSegment(ctx context.Context, file string, number int, first uint64, head *audit.HeadSeal) error {
	f, err := os.OpenFile(file, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	db, err := open(file, false, 1)
	if err != nil {
		return err
	}
	defer db.Close()
	if err := migrate(ctx, db, "journal", formatMigrations[formatNo]); err != nil {
		return err
	}
	if err := one(db.ExecContext(ctx, insertSegment, number, formatNo, int64(first))); err != nil {
		return classify(err)
	}
	if head != nil {
		if err := one(db.ExecContext(ctx, replaceHeadSeal, int64(head.Size), head.MAC)); err != nil {
			return classify(err)
		}
	}
	if err := db.Close(); err != nil {
		return classify(err)
	}
	return f.Sync()
}

func (j *Journal) at(step string) {
	if j.cfg.fault != nil {
		j.cfg.fault(step)
	}
}

// Close closes all files and gives the folder free. It waits for reads that run.
func (j *Journal) Close() error {
	if j.index != nil {
		j.index.close()
	}
	j.writing.Lock()
	defer j.writing.Unlock()
	j.stopFilling()
	j.mu.Lock()
	defer j.mu.Unlock()
	j.closed = true
	var errs []error
	j.at("close/begun")
	for _, s := range j.segments {
		errs = append(errs, s.close())
	}
	j.segments = nil
	j.at("close/files")
	for _, f := range j.locks {
		// Unlocked by name: a process being forked just now has the descriptor too, until its exec. An error means that
		// it was not locked, as after an Open that failed or where folders cannot be.
		unix.Flock(int(f.Fd()), unix.LOCK_UN)
		errs = append(errs, f.Close())
	}
	j.locks = nil
	return errors.Join(errs...)
}

// tableRefs gives the active segment its table of references. What a restart found in the segment is read by a goroutine.
func (j *Journal) tableRefs(ctx context.Context, s *segment) error {
	j.stopFilling()
	f := newRefTable(s.first, j.cfg.SegmentEntries)
	s.refs.Store(f)
	_, err := s.row(ctx, s.read, selectLastEntry)
	if errors.Is(err, sql.ErrNoRows) {
		f.ready.Store(true)
		return nil
	}
	if err != nil {
		return classify(err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	j.stopFill = cancel
	j.filling.Go(func() {
		select {
		case <-time.After(fillAfter):
			_ = f.fill(ctx, s) // without it look-ups go to the file, where the error is met again
		case <-ctx.Done():
		}
	})
	return nil
}

func (j *Journal) stopFilling() {
	if j.stopFill != nil {
		j.stopFill()
		j.filling.Wait()
	}
}

func (s *segment) close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, db := range []*sql.DB{s.read, s.settled} {
		if db != nil {
			errs = append(errs, db.Close())
		}
	}
	if s.write != nil {
		errs = append(errs, s.write.close()) // the last connection folds the log into the file
		s.write = nil
	}
	return errors.Join(errs...)
}

// Reread implements audit.Store. An open connection has pages in memory, and takes them for the file's as long as the file's
// counter of changes says so, which whoever writes past SQLite leaves alone; and it stays with the file that it opened,
// though another was put in its place.
func (j *Journal) Reread() error {
	j.writing.Lock()
	defer j.writing.Unlock()
	j.mu.RLock() // nothing is opened again that Close has closed
	defer j.mu.RUnlock()
	for _, s := range j.segments {
		if err := s.reread(); err != nil {
			return err
		}
	}
	return nil
}

// reread opens the segment's reading pool anew. Readers wait.
func (s *segment) reread() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.read == nil {
		return nil
	}
	read, err := open(s.file, true, 4)
	if err != nil {
		return err
	}
	read.SetConnMaxIdleTime(time.Minute)
	s.read.Close()
	s.read = read
	return nil
}

// list answers the segments as they are now.
func (j *Journal) list() ([]*segment, error) {
	j.mu.RLock()
	defer j.mu.RUnlock()
	if j.closed {
		return nil, fmt.Errorf("sqlite: journal store closed: %w", dbdriver.ErrUnavailable)
	}
	return slices.Clone(j.segments), nil
}

func (j *Journal) active() (*segment, error) {
	segs, err := j.list()
	if err == nil && (j.cfg.ReadOnly || len(segs) == 0) {
		err = fmt.Errorf("sqlite: journal opened for reading only: %w", dbdriver.ErrUnavailable)
	}
	if err != nil {
		return nil, err
	}
	return segs[len(segs)-1], nil
}

// sealed answers the seal; nil for the active segment.
func (s *segment) sealed() *audit.Seal {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.seal
}

// query runs fn with the segment's reading pool.
func (s *segment) query(fn func(*sql.DB) error) error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.read == nil {
		return s.err
	}
	err := fn(s.read)
	if s.writable && halfDone(err) {
		// A write that failed could not take its rollback journal away either. A reading connection may not apply it.
		if rerr := rollBack(s.file); rerr == nil {
			err = fn(s.read)
		}
	}
	if err = classify(err); err != nil {
		return fmt.Errorf("sqlite: segment %d: %w", s.number, err)
	}
	return nil
}

// lookUp is query for few rows, each of which is checked by whoever asks: from settled if there is one. Whatever goes wrong
// there, or is not there, is asked for again with query. fn may run twice.
func (s *segment) lookUp(fn func(*sql.DB) error) error {
	s.mu.RLock()
	if s.settled != nil {
		err := fn(s.settled)
		if err == nil {
			s.mu.RUnlock()
			return nil
		}
	}
	s.mu.RUnlock()
	return s.query(fn)
}

// rollBack opens the file for writing and reads, which takes back what an interrupted transaction has left.
func rollBack(file string) error {
	db, err := open(file, false, 1)
	if err != nil {
		return err
	}
	defer db.Close()
	var n int
	return db.QueryRow(countSegments).Scan(&n)
}

// row reads one row with a statement of entryColumns.
func (s *segment) row(ctx context.Context, db *sql.DB, statement string, args ...any) (audit.Row, error) {
	return scanRow(db.QueryRowContext(ctx, s.text(statement), args...).Scan)
}

func scanRow(scan func(...any) error) (audit.Row, error) {
	var r audit.Row
	var change int
	err := scan(&r.Sequence, &r.Kind, &r.Ref, &change, &r.Leaf, &r.Chain, &r.DER, &r.Own)
	r.Change = change != 0
	return r, err
}

// rowOf reads the columns of entryColumns as the driver hands them out, each in memory of its own. A column of another type,
// which a table that is not ours can have, becomes the bytes that it is written with.
func rowOf(values []driver.Value) audit.Row {
	octets := func(v driver.Value) []byte {
		switch v := v.(type) {
		case nil:
			return nil
		case []byte:
			return v
		}
		return fmt.Append(nil, v)
	}
	var r audit.Row
	r.Sequence, _ = values[0].(int64)
	if kind, ok := values[1].(string); ok {
		r.Kind = kind
	} else {
		r.Kind = string(octets(values[1]))
	}
	change, _ := values[3].(int64)
	r.Ref, r.Change, r.Leaf, r.Chain, r.DER, r.Own = octets(values[2]), change != 0, octets(values[4]), octets(values[5]), octets(values[6]), octets(values[7])
	return r
}

// Head implements audit.Store.
func (j *Journal) Head(ctx context.Context) (uint64, *audit.Row, error) {
	segs, err := j.list()
	if err != nil {
		return 0, nil, err
	}
	for _, s := range slices.Backward(segs) {
		var r audit.Row
		err := s.query(func(db *sql.DB) (err error) {
			r, err = s.row(ctx, db, selectLastEntry)
			return err
		})
		if errors.Is(err, audit.ErrNotFound) {
			continue // the active segment before its first entry
		}
		if err != nil {
			return 0, nil, err
		}
		if r.Sequence < 0 {
			return 0, nil, fmt.Errorf("%w: last entry has sequence %d", audit.ErrCorrupt, r.Sequence)
		}
		return uint64(r.Sequence) + 1, &r, nil
	}
	return 0, nil, nil
}

// Append implements audit.Store: one transaction, on disk when it returns.
func (j *Journal) Append(ctx context.Context, b audit.Batch) error {
	j.writing.Lock()
	defer j.writing.Unlock()
	s, err := j.active()
	if err != nil {
		return err
	}
	if s.write == nil {
		return fmt.Errorf("sqlite: segment %d is sealed: %w", s.number, dbdriver.ErrUnavailable)
	}
	var stored []audit.Hash
	err = s.write.inTx(s.read, func() error {
		for i := range b.Rows {
			s.refs.Load().add(b.Rows[i].Ref, uint64(b.Rows[i].Sequence))
		}
		var fresh []audit.Blob
		var known map[audit.Hash]bool // most batches have none that is not stored
		for _, x := range b.Blobs {
			if j.stored(x.Sum) || known[x.Sum] {
				continue
			}
			if known == nil {
				known = map[audit.Hash]bool{}
			}
			if x.Data == nil {
				x.Data = []byte{} // nil would be NULL
			}
			known[x.Sum] = true
			fresh = append(fresh, x)
			stored = append(stored, x.Sum)
		}
		err := s.write.insertRows(&s.write.blob, len(fresh), func(values []driver.Value, i int) []driver.Value {
			return append(values, fresh[i].Sum[:], fresh[i].Data)
		}, func(from, to int, affected int64) error {
			if affected == int64(to-from) {
				return nil
			}
			for _, x := range fresh[from:to] { // some were there, or were not stored
				if err := s.write.sameBlob(x); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
		err = s.write.insertRows(&s.write.entry, len(b.Rows), func(values []driver.Value, i int) []driver.Value {
			r := &b.Rows[i]
			change := int64(0)
			if r.Change {
				change = 1
			}
			return append(values, r.Sequence, r.Kind, r.Ref, change, r.Leaf, r.Chain, r.DER, r.Own)
		}, all)
		if err != nil {
			return err
		}
		err = s.write.insertRows(&s.write.node, len(b.Nodes), func(values []driver.Value, i int) []driver.Value {
			n := &b.Nodes[i]
			if s.format < 3 {
				return append(values, int64(n.ID.Level), int64(n.ID.Index), n.Hash[:])
			}
			return append(values, nodeNo(n.ID), n.Hash[:])
		}, all)
		if err != nil {
			return err
		}
		if b.Seal == nil {
			return nil
		}
		return s.write.putHead(*b.Seal)
	})
	if err != nil {
		j.doubt = true
		return fmt.Errorf("sqlite: appending %d entries: %w", len(b.Rows), err)
	}
	for _, sum := range stored {
		j.remember(sum)
	}
	if len(b.Rows) > 0 {
		j.next, j.doubt = uint64(b.Rows[len(b.Rows)-1].Sequence)+1, false
	}
	return nil
}

// stored reports whether the segment is known to hold the payload. What is asked for stays known, however many others
// come and go: certificates and CRLs, the longest payloads, recur in every entry.
func (j *Journal) stored(sum audit.Hash) bool {
	if j.recent[sum] {
		return true
	}
	if !j.older[sum] {
		return false
	}
	j.remember(sum)
	return true
}

func (j *Journal) remember(sum audit.Hash) {
	if len(j.recent) >= recentBlobs/2 {
		j.older, j.recent = j.recent, map[audit.Hash]bool{}
	}
	j.recent[sum] = true
}

// PutHeadSeal implements audit.Store.
func (j *Journal) PutHeadSeal(ctx context.Context, seal audit.HeadSeal) error {
	err := j.put(func(w *writer) error { return w.putHead(seal) })
	if err != nil {
		return fmt.Errorf("head seal: %w", err)
	}
	return nil
}

// HeadSeal implements audit.Store. A new segment has it from the one before.
func (j *Journal) HeadSeal(ctx context.Context) (audit.HeadSeal, error) {
	segs, err := j.list()
	if err != nil || len(segs) == 0 {
		return audit.HeadSeal{}, errors.Join(err, audit.ErrNotFound)
	}
	return segs[len(segs)-1].headSeal(ctx)
}

func (s *segment) headSeal(ctx context.Context) (audit.HeadSeal, error) {
	var size int64
	var mac []byte
	err := s.query(func(db *sql.DB) error {
		return db.QueryRowContext(ctx, selectHeadSeal).Scan(&size, &mac)
	})
	if err == nil && size < 0 {
		err = fmt.Errorf("%w: head seal over %d entries", audit.ErrCorrupt, size)
	}
	return audit.HeadSeal{Size: uint64(size), MAC: mac}, err
}

// Room implements audit.Store.
func (j *Journal) Room(ctx context.Context, now time.Time) (int, error) {
	j.writing.Lock()
	defer j.writing.Unlock()
	s, err := j.active()
	if err != nil {
		return 0, err
	}
	if s.seal != nil {
		return 0, nil // Roll was interrupted by an error
	}
	if j.doubt {
		next, _, err := j.Head(ctx)
		if err != nil {
			return 0, err
		}
		j.next, j.doubt = max(next, s.first), false
	}
	if j.next < s.first {
		return 0, fmt.Errorf("%w: segment %d begins at %d, the journal ends at %d", audit.ErrCorrupt, s.number, s.first, j.next)
	}
	count := j.next - s.first
	if count >= uint64(j.cfg.SegmentEntries) {
		return 0, nil
	}
	if j.cfg.Monthly && count > 0 && !now.IsZero() {
		if j.month.IsZero() {
			row, err := j.Row(ctx, s.first)
			if err != nil {
				return 0, err
			}
			e, err := audit.ParseEntry(row.DER)
			if err != nil {
				return 0, err
			}
			j.month = monthOf(e.Time.UTC())
			if st := e.Time.State; st != ntp.Trusted && st != ntp.Holdover {
				j.month = monthOf(now) // begun before the clock was trusted: nobody knows in which month
			}
		}
		if monthOf(now).After(j.month) { // a clock that went back makes no segment
			return 0, nil
		}
	}
	return int(uint64(j.cfg.SegmentEntries) - count), nil
}

func monthOf(t time.Time) time.Time {
	t = t.UTC()
	return time.Date(t.Year(), t.Month(), 1, 0, 0, 0, 0, time.UTC)
}

// Roll implements audit.Store: 1. the seal is written into the segment, 2. the segment becomes a single finished file,
// 3. the next one is made. A stop after 1 or 2 is completed by [OpenJournal], an error by the next Roll.
func (j *Journal) Roll(ctx context.Context, seal audit.Seal) error {
	j.writing.Lock()
	defer j.writing.Unlock()
	s, err := j.active()
	if err != nil {
		return err
	}
	if seal.Segment != s.number {
		return fmt.Errorf("sqlite: the seal is for segment %d, the active one is %d", seal.Segment, s.number)
	}
	if s.seal == nil {
		err := s.write.inTx(s.read, func() error {
			return s.write.writeOne(s.write.seal, seal.Marshal(), int64(s.number))
		})
		if err != nil {
			return fmt.Errorf("sqlite: sealing segment %d: %w", s.number, err)
		}
		s.mu.Lock()
		s.seal = &seal
		s.mu.Unlock()
	} else if *s.seal != seal {
		return fmt.Errorf("%w: segment %d is sealed with another seal", audit.ErrCorrupt, s.number)
	}
	j.at("roll/sealed")
	s.finish(ctx) // if somebody else reads the file just now, it keeps its log until the next open; nothing is lost
	j.at("roll/finished")
	if err := j.addSegment(ctx, s.number+1, seal.Last+1); err != nil {
		return fmt.Errorf("sqlite: making segment %d: %w", s.number+1, err)
	}
	j.index.wake()
	return nil
}

// Segments implements audit.Store.
func (j *Journal) Segments(ctx context.Context) ([]audit.Segment, error) {
	segs, err := j.list()
	if err != nil {
		return nil, err
	}
	out := make([]audit.Segment, len(segs))
	for i, s := range segs {
		out[i] = audit.Segment{Number: s.number, First: s.first, Err: s.err}
		out[i].Seal = s.sealed()
		if out[i].Seal != nil {
			out[i].Count = out[i].Seal.Count
			continue
		}
		err := s.query(func(db *sql.DB) error {
			r, err := s.row(ctx, db, selectLastEntry)
			if err == nil && r.Sequence >= 0 && uint64(r.Sequence) >= s.first {
				out[i].Count = uint64(r.Sequence) - s.first + 1
			}
			if errors.Is(err, sql.ErrNoRows) {
				return nil
			}
			return err
		})
		if err != nil && !j.cfg.ReadOnly {
			return nil, err
		}
		out[i].Err = errors.Join(s.err, err)
	}
	return out, nil
}

// NodeCount implements audit.Store.
func (j *Journal) NodeCount(ctx context.Context, number int) (uint64, error) {
	var n uint64
	err := j.newest(func(s *segment) error {
		if s.number != number {
			return audit.ErrNotFound
		}
		return s.query(func(db *sql.DB) error { return db.QueryRowContext(ctx, countNodes).Scan(&n) })
	})
	return n, err
}

// numbered answers the segment of that number.
func (j *Journal) numbered(number int) (*segment, error) {
	segs, err := j.list()
	if err != nil {
		return nil, err
	}
	for _, s := range segs {
		if s.number == number {
			return s, nil
		}
	}
	return nil, fmt.Errorf("sqlite: no segment %d: %w", number, audit.ErrNotFound)
}

// holding answers the segment in whose range the sequence falls.
func (j *Journal) holding(sequence uint64) (*segment, error) {
	segs, err := j.list()
	if err != nil {
		return nil, err
	}
	s := holder(segs, sequence)
	if s == nil {
		return nil, fmt.Errorf("sqlite: no segment has entry %d: %w", sequence, audit.ErrNotFound)
	}
	return s, nil
}

// holder answers the one of segs in whose range the sequence falls; nil: none.
func holder(segs []*segment, sequence uint64) *segment {
	i := sort.Search(len(segs), func(i int) bool { return segs[i].first > sequence }) - 1
	if i < 0 || sequence > math.MaxInt64 {
		return nil
	}
	return segs[i]
}

// Row implements audit.Store.
func (j *Journal) Row(ctx context.Context, sequence uint64) (audit.Row, error) {
	s, err := j.holding(sequence)
	if err != nil {
		return audit.Row{}, err
	}
	var r audit.Row
	err = s.lookUp(func(db *sql.DB) (err error) {
		r, err = s.row(ctx, db, selectEntry, int64(sequence))
		return err
	})
	return r, err
}

// Rows implements audit.Store.
func (j *Journal) Rows(ctx context.Context, number int, from int64, fn func(audit.Row) error) error {
	s, err := j.numbered(number)
	if err != nil {
		return err
	}
	return s.pages(ctx, selectEntries, from, fn)
}

// pages reads a page, closes the read transaction and hands the rows to fn, so that a slow reader does not keep the
// write-ahead log from being folded into the file.
func (s *segment) pages(ctx context.Context, text string, from int64, fn func(audit.Row) error) error {
	for {
		page := make([]audit.Row, 0, pageRows)
		err := s.query(func(db *sql.DB) error {
			return direct(ctx, db, s.text(text), []int64{from, pageRows}, func(values []driver.Value) { page = append(page, rowOf(values)) })
		})
		if err != nil {
			return err
		}
		for _, r := range page {
			if err := fn(r); err != nil {
				return err
			}
		}
		if len(page) < pageRows || page[len(page)-1].Sequence == math.MaxInt64 {
			return nil
		}
		from = page[len(page)-1].Sequence + 1
	}
}

// direct calls fn with the rows of a query as the driver hands them out: of many rows, database/sql's conversions take more
// than SQLite.
func direct(ctx context.Context, db *sql.DB, text string, args []int64, fn func(values []driver.Value)) error {
	conn, err := db.Conn(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	return conn.Raw(func(c any) error {
		named := make([]driver.NamedValue, len(args))
		for i, a := range args {
			named[i] = driver.NamedValue{Ordinal: i + 1, Value: a}
		}
		rows, err := c.(driver.QueryerContext).QueryContext(ctx, text, named)
		if err != nil {
			return err
		}
		defer rows.Close()
		values := make([]driver.Value, len(rows.Columns()))
		for {
			if err := rows.Next(values); errors.Is(err, io.EOF) {
				return nil
			} else if err != nil {
				return err
			}
			fn(values)
		}
	})
}

// Changes implements audit.Store.
func (j *Journal) Changes(ctx context.Context, from uint64, fn func(audit.Row) error) error {
	segs, err := j.list()
	if err != nil {
		return err
	}
	first := int64(math.MinInt64)
	if from > 0 {
		first = int64(min(from, math.MaxInt64))
	}
	for _, s := range segs {
		if seal := s.sealed(); seal != nil && seal.Last < from {
			continue
		}
		if err := s.pages(ctx, selectChanges, first, fn); err != nil {
			return err
		}
	}
	return nil
}

// LastChange implements audit.Store.
func (j *Journal) LastChange(ctx context.Context) (audit.Row, error) {
	var r audit.Row
	err := j.newest(func(s *segment) error {
		return s.query(func(db *sql.DB) (err error) {
			r, err = s.row(ctx, db, selectLastChange)
			return err
		})
	})
	return r, err
}

// newest calls fn with the segments from the last on until it answers something else than audit.ErrNotFound.
func (j *Journal) newest(fn func(*segment) error) error {
	segs, err := j.list()
	if err != nil {
		return err
	}
	for _, s := range slices.Backward(segs) {
		if err := fn(s); !errors.Is(err, audit.ErrNotFound) {
			return err
		}
	}
	return fmt.Errorf("sqlite: %w", audit.ErrNotFound)
}

// FindRef implements audit.Store. It asks the entries that the index of references names, or a segment's table, and the
// files of segments that neither knows yet.
func (j *Journal) FindRef(ctx context.Context, ref []byte, limit int) ([]uint64, error) {
	segs, err := j.list()
	if err != nil {
		return nil, err
	}
	named, covered := j.index.find(ctx, ref)
	var out []uint64
	for _, s := range segs {
		if len(out) >= limit {
			break
		}
		seal := s.sealed()
		var of []uint64 // entries of this segment that may have it
		known := seal != nil && covered[s.number]
		if known {
			for ; len(named) > 0 && named[0] <= int64(seal.Last); named = named[1:] {
				if named[0] >= 0 {
					of = append(of, uint64(named[0]))
				}
			}
		} else {
			of, known = s.refs.Load().find(ref)
		}
		if known {
			out, err = s.having(ctx, ref, of, limit, out)
		} else {
			out, err = s.byRef(ctx, ref, limit, out)
		}
		if err != nil {
			return nil, err
		}
	}
	return out, nil
}

// having adds those of the entries to out that have the reference, as long as out is shorter than limit.
func (s *segment) having(ctx context.Context, ref []byte, of []uint64, limit int, out []uint64) ([]uint64, error) {
	for _, n := range of {
		if len(out) >= limit {
			break
		}
		err := s.lookUp(func(db *sql.DB) error {
			var seq int64
			return db.QueryRowContext(ctx, selectRefAt, int64(n), ref).Scan(&seq)
		})
		if err == nil {
			out = append(out, n)
		} else if !errors.Is(err, audit.ErrNotFound) {
			return nil, err
		}
	}
	return out, nil
}

// byRef is having with the entries that the file's own index names.
func (s *segment) byRef(ctx context.Context, ref []byte, limit int, out []uint64) ([]uint64, error) {
	statement := selectByRef
	if s.format >= 3 {
		statement = selectByRefInRuns
	}
	err := s.query(func(db *sql.DB) error {
		rows, err := db.QueryContext(ctx, statement, ref, limit-len(out))
		if err != nil {
			return err
		}
		defer rows.Close()
		for rows.Next() {
			var seq int64
			if err := rows.Scan(&seq); err != nil {
				return err
			}
			if seq < 0 {
				return fmt.Errorf("%w: an entry has sequence %d", audit.ErrCorrupt, seq)
			}
			out = append(out, uint64(seq))
		}
		return rows.Err()
	})
	return out, err
}

// Blob implements audit.Store.
func (j *Journal) Blob(ctx context.Context, number int, sum audit.Hash) ([]byte, error) {
	var data []byte
	err := j.newest(func(s *segment) error {
		if number != 0 && s.number != number {
			return audit.ErrNotFound
		}
		return s.query(func(db *sql.DB) error { return db.QueryRowContext(ctx, selectBlob, sum[:]).Scan(&data) })
	})
	return data, err
}

// Blobs implements audit.Store. Keys that are no digests are named by what they begin with.
func (j *Journal) Blobs(ctx context.Context, number int, fn func(audit.Hash) error) error {
	s, err := j.numbered(number)
	if err != nil {
		return err
	}
	return s.keys(ctx, selectSums, func(scan func(...any) error) (at int64, done func() error, err error) {
		var sum []byte
		err = scan(&at, &sum)
		return at, func() error {
			var h audit.Hash
			copy(h[:], sum)
			return fn(h)
		}, err
	})
}

// Tokens implements audit.Store.
func (j *Journal) Tokens(ctx context.Context, fn func(size uint64) error) error {
	segs, err := j.list()
	if err != nil {
		return err
	}
	for _, s := range segs {
		err := s.keys(ctx, selectTokens, func(scan func(...any) error) (at int64, done func() error, err error) {
			err = scan(&at)
			return at, func() error { return fn(uint64(at)) }, err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// keys reads a table in pages by a number that ascends, as [segment.pages] does. row reads one row and answers its
// number and what is to be done with it when no read transaction is open.
func (s *segment) keys(ctx context.Context, text string, row func(scan func(...any) error) (int64, func() error, error)) error {
	at := int64(math.MinInt64)
	for {
		var page []func() error
		err := s.query(func(db *sql.DB) error {
			rows, err := db.QueryContext(ctx, text, at, 8*pageRows)
			if err != nil {
				return err
			}
			defer rows.Close()
			for rows.Next() {
				n, done, err := row(rows.Scan)
				if err != nil {
					return err
				}
				at = n
				page = append(page, done)
			}
			return rows.Err()
		})
		if err != nil {
			return err
		}
		for _, done := range page {
			if err := done(); err != nil {
				return err
			}
		}
		if len(page) < 8*pageRows {
			return nil
		}
	}
}

// PutCheckpoint implements audit.Store.
func (j *Journal) PutCheckpoint(ctx context.Context, c audit.StoredCheckpoint) error {
	return j.put(func(w *writer) error {
		if err := w.writeOne(w.note, int64(c.Size), c.Note, c.Signature); err != nil || c.Token == nil {
			return err
		}
		return w.putToken(c.Size, c.Token)
	})
}

// PutToken implements audit.Store. The token is stored in the active segment; it is looked for in its checkpoint's and
// the one after.
func (j *Journal) PutToken(ctx context.Context, size uint64, token []byte) error {
	return j.put(func(w *writer) error { return w.putToken(size, token) })
}

func (j *Journal) put(fn func(*writer) error) error {
	j.writing.Lock()
	defer j.writing.Unlock()
	s, err := j.active()
	if err != nil {
		return err
	}
	if s.write == nil {
		return fmt.Errorf("sqlite: segment %d is sealed: %w", s.number, dbdriver.ErrUnavailable)
	}
	if err := s.write.inTx(s.read, func() error { return fn(s.write) }); err != nil {
		return fmt.Errorf("sqlite: storing checkpoint: %w", err)
	}
	return nil
}

// LastCheckpoint implements audit.Store.
func (j *Journal) LastCheckpoint(ctx context.Context) (audit.StoredCheckpoint, error) {
	var c audit.StoredCheckpoint
	err := j.newest(func(s *segment) error {
		return s.query(func(db *sql.DB) error {
			return db.QueryRowContext(ctx, selectLastCheckpoint).Scan(&c.Size, &c.Note, &c.Signature)
		})
	})
	if err != nil {
		return c, err
	}
	c.Token, err = j.token(ctx, c.Size, 0)
	return c, err
}

// token looks in the segments with number ≥ from, two of them at most if from is not 0.
func (j *Journal) token(ctx context.Context, size uint64, from int) ([]byte, error) {
	var token []byte
	segs, err := j.list()
	if err != nil {
		return nil, err
	}
	if from == 0 {
		from = len(segs) - 1
	}
	for _, s := range segs {
		if s.number < from || s.number > from+1 {
			continue
		}
		err := s.query(func(db *sql.DB) error { return db.QueryRowContext(ctx, selectToken, int64(size)).Scan(&token) })
		if err == nil {
			return token, nil
		}
		if !errors.Is(err, audit.ErrNotFound) {
			return nil, err
		}
	}
	return nil, nil
}

// Checkpoints implements audit.Store.
func (j *Journal) Checkpoints(ctx context.Context, from uint64, fn func(audit.StoredCheckpoint) error) error {
	segs, err := j.list()
	if err != nil {
		return err
	}
	for _, s := range segs {
		if seal := s.sealed(); seal != nil && seal.Last+1 < from {
			continue
		}
		next := int64(min(from, math.MaxInt64))
		for {
			var page []audit.StoredCheckpoint
			err := s.query(func(db *sql.DB) error {
				rows, err := db.QueryContext(ctx, selectCheckpoints, next, pageRows)
				if err != nil {
					return err
				}
				defer rows.Close()
				for rows.Next() {
					var c audit.StoredCheckpoint
					var size int64
					if err := rows.Scan(&size, &c.Note, &c.Signature); err != nil {
						return err
					}
					c.Size = uint64(size)
					page = append(page, c)
				}
				return rows.Err()
			})
			if err != nil {
				return err
			}
			for _, c := range page {
				if c.Token, err = j.token(ctx, c.Size, s.number); err != nil {
					return err
				}
				if err := fn(c); err != nil {
					return err
				}
			}
			if len(page) < pageRows {
				break
			}
			next = int64(page[len(page)-1].Size) + 1
		}
	}
	return nil
}

// FreeBytes implements audit.Store: what an unprivileged process may still write to the journal's file system.
func (j *Journal) FreeBytes() (uint64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(j.cfg.Dir, &st); err != nil {
		return 0, fmt.Errorf("sqlite: free space: %w", err)
	}
	return st.Bavail * uint64(st.Bsize), nil
}

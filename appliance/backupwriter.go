package appliance

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/emmansun/gmsm/sm3"
	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"yinjian/api/wire"
	"yinjian/appliance/backup"
	"yinjian/dbdriver/sqlite"
	"yinjian/ntp/sysclock"
)

func backupScratch(dir string) string { return filepath.Join(dir, "run", "backup") }

// ClaimBackup empties the folder for what is copied on the way of a backup of the appliance in dir, and keeps every other one
// out.
func ClaimBackup(dir string) (release func(), err error) {
	dir = backupScratch(dir)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		lock.Close()
		return nil, fmt.Errorf("另一份备份正在进行；等它做完 (another backup is under way; wait for it): %w", err)
	}
	empty := func() error {
		left, err := os.ReadDir(dir)
		for _, e := range left {
			if e.Name() != "lock" {
				err = errors.Join(err, os.RemoveAll(filepath.Join(dir, e.Name())))
			}
		}
		return err
	}
	if err := empty(); err != nil {
		lock.Close()
		return nil, err
	}
	return func() {
		_ = empty() // the next one does it, too
		lock.Close()
	}, nil
}

// A BackupWriting is a backup that was begun, and how it is written.
type BackupWriting struct {
	Dir       string // the appliance's
	Begun     *wire.BegunBackup
	Softtoken bool // with the software cipher machine's store
	Rate      int  // MiB read a second; 0: as fast as it goes
}

// WriteBackup writes a backup, for which [ClaimBackup] holds, and says what it is.
func WriteBackup(ctx context.Context, out io.Writer, o BackupWriting) (end wire.EndBackup, err error) {
	scratch := backupScratch(o.Dir)
	custodians, err := backup.ParseCustodians(o.Begun.Custodians)
	if err != nil {
		return end, err
	}
	names, absent, err := BackupFiles(o.Dir)
	if err != nil {
		return end, err
	}
	clock, err := sysclock.Open()
	if err != nil {
		return end, err
	}
	h := backup.Header{
		ID: o.Begun.ID, Node: o.Begun.Node, Epoch: o.Begun.Epoch, Program: Version, At: clock.Realtime().UTC().Format(time.RFC3339),
		Set: custodians.Set(), Threshold: custodians.Threshold, Holders: custodians.Names,
	}
	after := 0
	if b := o.Begun.Base; b != nil {
		h.Base, after = &backup.Base{ID: b.ID, SM3: b.SM3, Through: b.Through}, b.Through
	}
	digest := sm3.New()
	counted := &counter{w: out}
	w, err := backup.NewWriter(io.MultiWriter(counted, digest), h, custodians.Point)
	if err != nil {
		return end, err
	}
	pace := func(int) error { return ctx.Err() }
	if o.Rate > 0 {
		limiter := rate.NewLimiter(rate.Limit(o.Rate<<20), sqlite.ExportStep)
		pace = func(n int) error { return limiter.WaitN(ctx, n) }
	}
	exported, err := sqlite.Export(ctx, sqlite.ExportConfig{
		Dir: filepath.Join(o.Dir, "journal"), After: after, Scratch: scratch, Pace: pace,
		// What has to fit the journal's end is copied at that moment, and is small.
		Pinned: func() error {
			err := copyFiles(UsesDir(o.Dir), filepath.Join(scratch, "uses"))
			if o.Softtoken {
				err = errors.Join(err, copyFiles(filepath.Join(o.Dir, "softtoken"), filepath.Join(scratch, "softtoken")))
			}
			return err
		},
		Segment: func(number int, _ bool, size int64, r io.Reader) error {
			return w.Add(backup.SegmentName(number), size, r)
		},
	})
	if err != nil {
		return end, err
	}
	for _, folder := range []string{"uses", "softtoken"} {
		if err := addFolder(w, scratch, folder); err != nil {
			return end, err
		}
	}
	for _, name := range names {
		if err := addFile(w, filepath.Join(o.Dir, name), filepath.ToSlash(name)); err != nil {
			return end, err
		}
	}
	if err := addFile(w, filepath.Join(o.Dir, "journal.head"), "journal.head.backup"); err != nil {
		return end, err
	}
	m := backup.Manifest{Entries: exported.Entries, Segments: exported.Segments, Through: exported.Through, Softtoken: o.Softtoken, Absent: absent}
	if err := w.Close(m); err != nil {
		return end, err
	}
	end.ID = o.Begun.ID
	end.SM3, end.Size, end.Entries, end.Through = hex.EncodeToString(digest.Sum(nil)), int(counted.n), int(exported.Entries), exported.Through
	return end, nil
}

// A counter counts what is written.
type counter struct {
	w io.Writer
	n int64
}

func (c *counter) Write(b []byte) (int, error) {
	n, err := c.w.Write(b)
	c.n += int64(n)
	return n, err
}

// copyFiles copies a folder's regular files, as they are. One that goes away meanwhile was replaced by another.
func copyFiles(from, to string) error {
	err := filepath.WalkDir(from, func(name string, d fs.DirEntry, err error) error {
		rel, rerr := filepath.Rel(from, name)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil
		case err != nil || rerr != nil:
			return errors.Join(err, rerr)
		case d.IsDir():
			return os.MkdirAll(filepath.Join(to, rel), 0o700)
		case !d.Type().IsRegular() || d.Name() == "lock" || strings.HasSuffix(name, ".tmp") || strings.HasSuffix(name, ".lock"):
			return nil
		}
		b, err := os.ReadFile(name)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(to, rel), b, 0o600)
	})
	return err
}

func addFolder(w *backup.Writer, top, folder string) error {
	err := filepath.WalkDir(filepath.Join(top, folder), func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		rel, err := filepath.Rel(top, name)
		if err != nil {
			return err
		}
		return addFile(w, name, filepath.ToSlash(rel))
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// addFile adds a small file, read as a whole: it may be replaced at any time.
func addFile(w *backup.Writer, name, member string) error {
	b, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	return w.Add(member, int64(len(b)), bytes.NewReader(b))
}

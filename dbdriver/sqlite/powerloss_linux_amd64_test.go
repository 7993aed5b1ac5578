package sqlite_test

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// A disk carries out recorded calls as a file system with a page cache does, and says what may be left when power fails.
//
// The model: a file's pages of 4 KiB reach the disk when it is synced, or earlier, in any order and each in part, down
// to sectors of 512 bytes. Names reach it in their order when the folder is synced, or earlier. After a sync that
// failed, pages count as written although they are not ("fsyncgate"): only a later write to a page makes the next sync
// write it.
//
// What it does not know: that a page may also be left in a version that was overwritten before the failure; names out
// of order; sectors that are torn themselves; a disk that lies about syncs; several file systems.
type disk struct {
	rnd   *rand.Rand
	now   map[string]*diskFile // names as programs see them
	names []map[string]*diskFile
}

// A diskFile is one file; size is part of its metadata.
type diskFile struct {
	cache, disk []byte
	dirty       map[int]bool // pages
}

const (
	diskPage   = 4096
	diskSector = 512
)

func newDisk(rnd *rand.Rand) *disk {
	d := &disk{rnd: rnd, now: map[string]*diskFile{}}
	d.names = []map[string]*diskFile{{}}
	return d
}

// do carries a call out.
func (d *disk) do(c *call) {
	f := d.now[c.Path]
	switch {
	case c.Op == "sync" && c.Path == ".":
		if c.Errno == 0 {
			d.names = d.names[len(d.names)-1:]
		}
		return
	case c.Op == "sync" && f != nil:
		if c.Errno == 0 {
			f.disk = resize(f.disk, len(f.cache))
			for p := range f.dirty {
				copy(f.disk[min(p*diskPage, len(f.disk)):], f.cache[min(p*diskPage, len(f.cache)):min((p+1)*diskPage, len(f.cache))])
			}
		}
		clear(f.dirty)
		return
	case c.Errno != 0 || c.Op == "ack":
		return
	case c.Op == "write" && f != nil:
		end := int(c.Offset) + len(c.Data)
		f.cache = resize(f.cache, max(end, len(f.cache)))
		copy(f.cache[c.Offset:], c.Data)
		for p := int(c.Offset) / diskPage; p*diskPage < end; p++ {
			f.dirty[p] = true
		}
		return
	case c.Op == "truncate" && f != nil:
		f.cache = resize(f.cache, int(c.Offset))
		if n := int(c.Offset); n%diskPage != 0 { // the rest of the last page becomes zero
			f.dirty[n/diskPage] = true
		}
		return
	case c.Op == "create" && f == nil:
		d.now[c.Path] = &diskFile{dirty: map[int]bool{}}
	case c.Op == "unlink":
		delete(d.now, c.Path)
	case c.Op == "rename":
		d.now[c.To] = f
		delete(d.now, c.Path)
	default:
		return
	}
	d.names = append(d.names, maps.Clone(d.now))
}

func resize(b []byte, n int) []byte {
	if n <= len(b) {
		return b[:n:n]
	}
	return append(slices.Clone(b), make([]byte, n-len(b))...)
}

// The ways in which power fails.
const (
	nothingMore = iota // what was not synced is lost
	everything         // it happens to be there
	apart              // some sectors are, some files are as long as they were
	wayCount
)

// cut makes the folder as it is after a power cut just now.
func (d *disk) cut(dir string, way int) error {
	names := d.names[0]
	switch way {
	case everything:
		names = d.now
	case apart:
		names = d.names[d.rnd.IntN(len(d.names))]
	}
	var errs []error
	errs = append(errs, os.Mkdir(dir, 0o700))
	for name, f := range names {
		b := slices.Clone(f.disk)
		if way == everything || way == apart && d.rnd.IntN(2) == 0 {
			b = resize(b, len(f.cache))
		}
		for p := range f.dirty {
			for s := p * diskPage; s < min((p+1)*diskPage, len(b), len(f.cache)); s += diskSector {
				if way == everything || way == apart && d.rnd.IntN(2) == 0 {
					copy(b[s:min(s+diskSector, len(b))], f.cache[s:min(s+diskSector, len(f.cache))])
				}
			}
		}
		errs = append(errs, os.WriteFile(filepath.Join(dir, name), b, 0o600))
	}
	return errors.Join(errs...)
}

// TestPowerCut records what the journal writes and cuts the power between two calls, at every fifth with YINJIAN_LONG=1,
// else at some sixteen of a run, as a seed says, in three ways: what had been acknowledged by then is there at the next start, and proves.
func TestPowerCut(t *testing.T) {
	t.Parallel()
	rnd := seeded(t)
	// 1. A journal from nothing, one that goes on after a kill, with a new epoch, and ones that go on after a failed sync
	// of the log, or of the file that it is folded into, by a process that was killed thereupon.
	tape := func(faults ...fault) []call {
		t.Helper()
		dir, name := filepath.Join(t.TempDir(), "journal"), filepath.Join(t.TempDir(), "calls")
		for i, f := range faults {
			r := runFaulty(t, dir, f, fmt.Sprintf("YJ_BASE=%d", (i+1)*1000), "YJ_RECORD="+name)
			if f.Class != "" && !r.struck || r.code != map[bool]int{true: -1, false: 0}[strings.HasPrefix(f.Action, "kill")] {
				t.Fatalf("%v: exit %d\n%s", f, r.code, r.text)
			}
		}
		return readCalls(t, name)
	}
	whole := fault{}
	for name, calls := range map[string][]call{
		"new":                               tape(whole),
		"after a kill":                      tape(fault{Class: "write wal", Phase: "append", K: 90, Action: "kill"}, whole),
		"sync of the log failed":            tape(fault{Class: "sync wal", Phase: "append", K: 3, Action: "EIO"}, whole),
		"sync of the log failed, then kill": tape(fault{Class: "sync wal", Phase: "append", K: 12, Action: "kill after EIO"}, whole),
		"sync at the folding failed":        tape(fault{Class: "sync db", Phase: "append", K: 1, Action: "EIO"}, whole),
		"no sync of the log, and of the next start's folding": tape(fault{Class: "sync wal", Phase: "append", K: 12, Action: "kill after EIO"},
			fault{Class: "sync db", Phase: "open", K: 1, Action: "EIO"}, whole),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d, acks, cuts := newDisk(rand.New(rand.NewPCG(rnd.Uint64(), 1))), map[uint64]string{}, 0
			for i := range calls {
				d.do(&calls[i])
				if calls[i].Op == "ack" {
					acks[calls[i].Sequence] = calls[i].Leaf
				}
				often := len(calls) / 16
				switch {
				case i == len(calls)-1:
					often = 1
				case calls[i].Phase == "open" && classOf(&calls[i]) == "write db": // folding what was left
					often = 4
				case os.Getenv("YINJIAN_LONG") != "":
					often = 5
				}
				if d.rnd.IntN(often) > 0 {
					continue
				}
				for way := range wayCount {
					dir := filepath.Join(t.TempDir(), "journal")
					if err := d.cut(dir, way); err != nil {
						t.Fatal(err)
					}
					if err := reopened(dir, acks); err != nil {
						t.Errorf("power cut after call %d (%s %s), way %d, %d receipts: %v", i, calls[i].Op, calls[i].Path, way, len(acks), err)
					}
					os.RemoveAll(dir)
					cuts++
				}
			}
			t.Logf("%d cuts in %d calls with %d receipts", cuts, len(calls), len(acks))
		})
	}
}

// TestTornLog cuts the log off, or fills it with noise, from each sector of its last transaction on (with
// YINJIAN_LONG=1; else from a seeded quarter): that transaction is gone, and nothing before it.
func TestTornLog(t *testing.T) {
	t.Parallel()
	rnd := seeded(t)
	calls := record(t, filepath.Join(t.TempDir(), "journal"))
	// 1. The last receipt of the run, the sync of the log before it, and the one before that.
	find := func(from int, what func(c *call) bool) int {
		for from--; from >= 0 && !what(&calls[from]); from-- {
		}
		if from < 0 {
			t.Fatal("no such call")
		}
		return from
	}
	receipt := find(len(calls), func(c *call) bool { return c.Op == "ack" })
	log := ""
	end := find(receipt, func(c *call) bool { log = c.Path; return classOf(c) == "sync wal" })
	begun := find(end, func(c *call) bool { return c.Op == "sync" && c.Path == log })
	d, acks := newDisk(rnd), map[uint64]string{}
	from, to := int64(1<<62), int64(0)
	for i := range calls[:receipt+1] {
		c := &calls[i]
		d.do(c)
		if c.Op == "ack" && i < end {
			acks[c.Sequence] = c.Leaf
		}
		if i > begun && i < end && c.Op == "write" && c.Path == log {
			from, to = min(from, c.Offset), max(to, c.Offset+int64(len(c.Data)))
		}
	}
	if to-from < diskSector || len(acks) < faultEntries/2 {
		t.Fatalf("the last transaction is %d bytes, after %d receipts", to-from, len(acks))
	}
	// 2. Each of its sectors.
	tears := 0
	for at := from / diskSector * diskSector; at < to; at += diskSector {
		for _, noise := range []bool{false, true} {
			if os.Getenv("YINJIAN_LONG") == "" && rnd.IntN(4) > 0 {
				continue
			}
			tears++
			dir := filepath.Join(t.TempDir(), "journal")
			if err := d.cut(dir, everything); err != nil {
				t.Fatal(err)
			}
			name := filepath.Join(dir, log)
			b, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			cut := max(at, from)
			if noise {
				for i := cut; i < int64(len(b)); i++ {
					b[i] = byte(rnd.Uint32())
				}
			} else {
				b = b[:cut]
			}
			if err := os.WriteFile(name, b, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := reopened(dir, acks); err != nil {
				t.Errorf("torn at %d of %d to %d, noise %v: %v", cut, from, to, noise, err)
			}
			os.RemoveAll(dir)
		}
	}
	t.Logf("%d tears of a transaction of %d bytes, after %d receipts", tears, to-from, len(acks))
}

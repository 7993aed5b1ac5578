package appliance

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sirupsen/logrus"
)

func logHouse(t *testing.T) *Appliance {
	t.Helper()
	a := &Appliance{dir: t.TempDir(), log: logrus.New(), cfg: new(Config)}
	a.log.SetOutput(io.Discard)
	return a
}

func TestLogFolders(t *testing.T) {
	t.Parallel()
	a := logHouse(t)
	elsewhere := t.TempDir()
	for dir, mode := range map[string]os.FileMode{"journal": 0o700, "logs/open": 0o777} {
		if err := os.MkdirAll(filepath.Join(a.dir, dir), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(filepath.Join(a.dir, dir), mode); err != nil {
			t.Fatal(err)
		}
	}
	file := filepath.Join(elsewhere, "file")
	if err := errors.Join(os.WriteFile(file, nil, 0o600), os.Symlink(filepath.Join(a.dir, "journal"), filepath.Join(elsewhere, "link")),
		os.Symlink(elsewhere, filepath.Join(a.dir, "logs", "out"))); err != nil {
		t.Fatal(err)
	}
	good := Log{Level: "info", KeepDays: MinLogDays}
	for _, c := range []struct {
		directory string
		ok        bool
	}{
		{"", true}, {"logs", true}, {"logs/2026", true}, {"./logs/x/../y", true}, {elsewhere, true}, {"logs/out", true},
		{"journal", false}, {"..", false}, {"logs/../journal", false}, {"logs/../..", false}, {"secrets", false}, {"/nowhere/at/all", false}, {file, false},
		{filepath.Join(a.dir, "journal"), false}, {a.dir, false}, {filepath.Join(elsewhere, "link"), false}, {"logs/open", false},
		{filepath.Join(a.dir, "logs", "..", "journal"), false},
	} {
		l := good
		l.Directory = c.directory
		f := &logFiles{a: a}
		if err := f.use(l, "test"); (err == nil) != c.ok {
			t.Errorf("%q: %v", c.directory, err)
		}
		if f.out != nil {
			_ = f.out.Close()
		}
	}
	for _, bad := range []Log{{Level: "loud", KeepDays: 200}, {Level: "info", KeepDays: MinLogDays - 1}} {
		if err := bad.check(); err == nil {
			t.Errorf("%+v is taken", bad)
		}
	}
	if os.Geteuid() == 0 {
		theirs := t.TempDir()
		if err := os.Chown(theirs, 1, 1); err != nil {
			t.Fatal(err)
		}
		l := good
		l.Directory = theirs
		if err := (&logFiles{a: a}).use(l, "test"); err == nil {
			t.Error("somebody else's folder is taken")
		}
	}
	// A file that is a link to another is not written to.
	if err := os.Symlink(file, filepath.Join(a.dir, "logs", "2026", "trap")); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Remove(filepath.Join(a.dir, "logs", "2026", logName)), os.Symlink(file, filepath.Join(a.dir, "logs", "2026", logName))); err != nil {
		t.Fatal(err)
	}
	l := good
	l.Directory = "logs/2026"
	if err := (&logFiles{a: a}).use(l, "test"); err == nil {
		t.Error("a link is followed")
	}
}

// The lines stand in the file at their level, and on the disk's reserve in none, counted.
func TestLogLines(t *testing.T) {
	t.Parallel()
	a := logHouse(t)
	f := startLogFiles(a, Log{Directory: "logs", Level: "warning", KeepDays: MinLogDays})
	a.log.Info("not wanted")
	a.log.WithField("who", "\x1b[31mD001\n").Warning("wanted")
	f.mu.Lock()
	f.full = true
	f.mu.Unlock()
	a.log.Error("no room")
	s, err := f.report()
	if err != nil || s.Lost != 1 || s.Files != 1 || s.Bytes == 0 {
		t.Errorf("%+v, %v", s, err)
	}
	lines, err := lastLines(filepath.Join(a.dir, "logs", logName), 10)
	if err != nil || len(lines) != 1 || !strings.Contains(lines[0], "wanted") || strings.Contains(lines[0], "\x1b") {
		t.Errorf("%q, %v", lines, err)
	}
	info, err := os.Stat(filepath.Join(a.dir, "logs", logName))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	if err := f.close(); err != nil {
		t.Error(err)
	}
	a.log.Error("after the end") // to standard error alone
	if lines, err := lastLines(filepath.Join(a.dir, "logs", logName), 10); err != nil || len(lines) != 1 {
		t.Errorf("%q, %v", lines, err)
	}
}

func TestLastLines(t *testing.T) {
	t.Parallel()
	name := filepath.Join(t.TempDir(), "log")
	var b strings.Builder
	for i := range 200_000 {
		fmt.Fprintf(&b, "line %06d\n", i)
	}
	if err := os.WriteFile(name, []byte(b.String()+"half"), 0o600); err != nil {
		t.Fatal(err)
	}
	if lines, err := lastLines(name, 2); err != nil || len(lines) != 2 || lines[0] != "line 199999" || lines[1] != "half" {
		t.Errorf("%q, %v", lines, err)
	}
	if lines, err := lastLines(name, 1<<30); err != nil || !strings.HasPrefix(lines[0], "line ") || len(lines[0]) != len("line 000000") || len(lines) > 100_000 {
		t.Errorf("%d lines, the first %q, %v", len(lines), lines[0], err)
	}
}

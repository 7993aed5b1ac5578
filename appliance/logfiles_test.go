package appliance

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
	"yinjian/api"
	"yinjian/api/wire"
	"yinjian/appliance/problem"

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
		if err := f.close(); err != nil {
			t.Error(err)
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
	if err := f.close(); err != nil { // what was logged before is written
		t.Error(err)
	}
	a.log.Error("after the end") // to standard error alone
	s, err := f.report()
	if err != nil || s.Lost != 1 || s.Files != 1 || s.Bytes == 0 {
		t.Errorf("%+v, %v", s, err)
	}
	lines, err := lastLines(filepath.Join(a.dir, "logs"), logName, 10)
	if err != nil || len(lines) != 1 || !strings.Contains(lines[0], "wanted") || strings.Contains(lines[0], "\x1b") {
		t.Errorf("%q, %v", lines, err)
	}
	info, err := os.Stat(filepath.Join(a.dir, "logs", logName))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
}

// hung is a running log on a volume that does not answer: a pipe that nobody reads.
func hung(t *testing.T) (a *Appliance, f *logFiles, pipe string) {
	t.Helper()
	a = logHouse(t)
	f = startLogFiles(a, Log{Directory: "logs", Level: "info", KeepDays: MinLogDays})
	pipe = filepath.Join(a.dir, "logs", logName)
	if err := errors.Join(os.Remove(pipe), syscall.Mkfifo(pipe, 0o600)); err != nil {
		t.Fatal(err)
	}
	return a, f, pipe
}

// Whoever logs does not wait for a volume that hangs; what found no room is counted, and told of when the volume answers.
func TestLogVolumeHangs(t *testing.T) {
	t.Parallel()
	a, f, pipe := hung(t)
	const lines = logLinesMost + 1000
	for i := range lines {
		a.log.WithField("i", i).Info("a line")
	}
	s, err := f.report()
	if err != nil || s.Lost < lines-logLinesMost-1 || s.Lost > lines-logLinesMost || !strings.Contains(s.Failed, "没有跟上") {
		t.Errorf("%+v, %v", s, err)
	}
	r, err := os.Open(pipe)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	read, in := 0, bufio.NewScanner(r)
	for in.Scan() && !strings.Contains(in.Text(), "were dropped") {
		read++
	}
	if want := fmt.Sprintf("lines=%d", s.Lost); uint64(read) != lines-s.Lost || !strings.Contains(in.Text(), want) {
		t.Errorf("%d lines of %d were written, and then %q, want %s", read, lines, in.Text(), want)
	}
	if err := f.close(); err != nil {
		t.Error(err)
	}
}

// A volume that hangs does not keep the appliance from stopping.
func TestLogVolumeHangsAtTheEnd(t *testing.T) {
	t.Parallel()
	a, f, pipe := hung(t)
	a.log.Info("begun")
	a.log.Info("waits")
	out := f.out
	if err := f.close(); err != nil {
		t.Error(err)
	}
	if s, err := f.report(); err != nil || s.Lost == 0 || !strings.Contains(s.Failed, "没有应答") {
		t.Errorf("%+v, %v", s, err)
	}
	r, err := os.Open(pipe)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := io.Copy(io.Discard, r); err != nil {
		t.Error(err)
	}
	<-out.done
}

// While files on a volume that hangs are looked after an administrator may have the log go elsewhere, and that folder is looked
// after then.
func TestLogVolumeHangsWhileLookedAfter(t *testing.T) {
	t.Parallel()
	a := logHouse(t)
	f := startLogFiles(a, Log{Directory: "logs", Level: "info", KeepDays: MinLogDays})
	folder, keep := f.used()
	index := filepath.Join(folder, logIndex)
	if err := syscall.Mkfifo(index, 0o600); err != nil {
		t.Fatal(err)
	}
	looked := make(chan error, 1)
	go func() { looked <- f.purge(t.Context(), folder, time.Now(), keep) }() // interval
	w, err := os.OpenFile(index, os.O_WRONLY, 0)                             // when it is being read
	if err != nil {
		t.Fatal(err)
	}
	if f.acts.TryLock() {
		f.acts.Unlock()
	} else {
		t.Error("an administrator's act waits for the volume")
	}
	if err := f.use(Log{Directory: "logs/elsewhere", Level: "info", KeepDays: MinLogDays}, "zhang"); err != nil {
		t.Fatal(err)
	}
	tick := make(chan time.Time, 1)
	tick <- time.Time{}
	f.await(t.Context(), folder, looked, tick)
	if err := errors.Join(w.Close(), <-looked, f.close()); err != nil {
		t.Error(err)
	}
}

func TestLastLines(t *testing.T) {
	t.Parallel()
	folder := t.TempDir()
	name := filepath.Join(folder, logName)
	var b strings.Builder
	for i := range 200_000 {
		fmt.Fprintf(&b, "line %06d\n", i)
	}
	if err := os.WriteFile(name, []byte(b.String()+"half"), 0o600); err != nil {
		t.Fatal(err)
	}
	if lines, err := lastLines(folder, logName, 2); err != nil || len(lines) != 2 || lines[0] != "line 199999" || lines[1] != "half" {
		t.Errorf("%q, %v", lines, err)
	}
	if lines, err := lastLines(folder, logName, 1<<30); err != nil || !strings.HasPrefix(lines[0], "line ") || len(lines[0]) != len("line 000000") || len(lines) > 100_000 {
		t.Errorf("%d lines, the first %q, %v", len(lines), lines[0], err)
	}
}

// No name leads to anything in the folder but the files of the running log, nor out of it.
func TestLogFileNames(t *testing.T) {
	t.Parallel()
	a := logHouse(t)
	folder := filepath.Join(a.dir, "logs")
	a.logs = startLogFiles(a, Log{Directory: "logs", Level: "info", KeepDays: MinLogDays})
	a.log.Info("here")
	if err := a.logs.close(); err != nil { // it is written
		t.Fatal(err)
	}
	closed := "yinjian-2026-11-01T00-00-00.000.log"
	if err := errors.Join(os.WriteFile(filepath.Join(a.dir, "yinjian-secret.log"), []byte("secret"), 0o600), os.WriteFile(filepath.Join(folder, "closed.json"), []byte(`{"`+closed+`":"2026-11-02T00:00:00Z"}`), 0o600),
		os.WriteFile(filepath.Join(folder, closed), []byte("older"), 0o600), os.WriteFile(filepath.Join(folder, "other.log"), []byte("secret"), 0o600),
		os.Symlink("../yinjian-secret.log", filepath.Join(folder, "yinjian-link.log")), os.Mkdir(filepath.Join(folder, "yinjian-x.log"), 0o700),
		syscall.Mkfifo(filepath.Join(folder, "yinjian-pipe.log"), 0o600)); err != nil {
		t.Fatal(err)
	}
	s, err := a.logs.report()
	if err != nil || len(s.List) != 2 || s.List[0].Name != "yinjian.log" || s.List[1].Name != closed || s.List[1].Closed != "2026-11-02T00:00:00Z" || s.List[1].Bytes != 5 || s.Files != 2 {
		t.Errorf("%+v, %v", s, err)
	}
	read := func(name string, from int) (*wire.LogPart, error) {
		out, err := admin{a}.ReadLogFile(t.Context(), "test", api.ReadLogFile{Name: name, From: from})
		if err != nil {
			return nil, err
		}
		part := out.(wire.LogPart)
		return &part, nil
	}
	if p, err := read(closed, 2); err != nil || string(p.Content) != "der" || p.Size != 5 {
		t.Errorf("%+v, %v", p, err)
	}
	if p, err := read(closed, 99); err != nil || len(p.Content) != 0 {
		t.Errorf("past the end: %+v, %v", p, err)
	}
	if p, err := read("yinjian.log", 0); err != nil || !strings.Contains(string(p.Content), "here") {
		t.Errorf("%+v, %v", p, err)
	}
	for _, name := range []string{
		"../yinjian-secret.log", "yinjian-/../../yinjian-secret.log", "..", "", ".", "/etc/passwd", "other.log", "closed.json", "yinjian-link.log", "yinjian-x.log", "yinjian-pipe.log",
		"yinjian-none.log", "./yinjian.log", "yinjian.log/", "logs/yinjian.log", "yinjian-\x00.log", filepath.Join(folder, "yinjian.log"),
	} {
		if p, err := read(name, 0); problem.CodeOf(err) != problem.NotFound && !errors.Is(err, syscall.EINVAL) {
			t.Errorf("%q: %+v, %v", name, p, err)
		}
	}
}

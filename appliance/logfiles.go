package appliance

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/sirupsen/logrus"
	"gopkg.in/natefinch/lumberjack.v2"

	"yinjian/api"
	"yinjian/appliance/audit"
	"yinjian/appliance/problem"
)

const (
	kindLogSettings = "log.settings" // an administrator's decision about the running log; the entry is the act
	kindLogPurged   = "log.purged"   // files of the running log that are deleted now, each with what it was

	// MinLogDays is the least that files of the running log are kept: six months, 网络安全法 article 21 (3).
	MinLogDays = 180

	logName       = "yinjian.log"
	logsInside    = "logs" // a folder within the appliance's own is this one, or lies in it
	logFileMB     = 64
	logIndex      = "closed.json"
	logLookEvery  = time.Minute
	logPurgesMost = 64 // files an entry tells of
)

// Log says where the running log goes besides the standard error. It is for whoever looks after the appliance; what
// happened to records and rights is in the journal, whatever becomes of this.
type Log struct {
	Directory string `toml:"directory" json:"directory"` // "": standard error alone. Relative: "logs" in the appliance's folder, or below it
	Level     string `toml:"level" json:"level"`         // error, warning, info, debug
	KeepDays  int    `toml:"keep_days" json:"keep_days"` // days after its last line that a file is kept, at least [MinLogDays]
}

func (l *Log) check() error {
	if _, ok := logLevels[l.Level]; !ok {
		return fmt.Errorf("log.level: %q 须为 error、warning、info、debug 之一 (one of them)", l.Level)
	}
	if l.KeepDays < MinLogDays {
		return fmt.Errorf("log.keep_days: %d 少于法定的 %d 天 (fewer than the law's %d days)", l.KeepDays, MinLogDays, MinLogDays)
	}
	return checkLogName(l.Directory)
}

// checkLogName refuses a relative folder that leads elsewhere than below "logs".
func checkLogName(directory string) error {
	if directory == "" || filepath.IsAbs(directory) {
		return nil
	}
	if first, _, _ := strings.Cut(filepath.ToSlash(filepath.Clean(directory)), "/"); first != logsInside {
		return fmt.Errorf("log.directory: %q 须为 %s 或其下的目录，或绝对路径 (%s, a folder below it, or an absolute path)", directory, logsInside, logsInside)
	}
	return nil
}

var logLevels = map[string]logrus.Level{
	"error": logrus.ErrorLevel, "warning": logrus.WarnLevel, "info": logrus.InfoLevel, "debug": logrus.DebugLevel,
}

// A logFiles is the running log in files: one until it has 64 MB or the day ends. Files are deleted some time after they were
// closed, as trusted time has it, and only when an entry of the journal says which. Safe for concurrent use.
type logFiles struct {
	a    *Appliance
	acts sync.Mutex // held during an administrator's act, and while files are deleted

	mu     sync.Mutex // guards what follows
	set    Log
	from   string // who decided set: "config.toml" or an administrator
	folder string // absolute; "" when nothing is written
	out    *lumberjack.Logger
	day    string // of trusted time, when out was begun; "" before it is known
	full   bool   // the disk's reserve is touched: nothing is written
	lost   uint64 // lines that could not be written
	failed string // why, of the last
}

// startLogFiles writes what log says from now on as l wants it. A folder that cannot be used is no reason not to sign.
func startLogFiles(a *Appliance, l Log) *logFiles {
	f := &logFiles{a: a}
	if err := f.use(l, "config.toml"); err != nil {
		a.log.WithError(err).Error("the running log goes to standard error alone")
	}
	a.log.AddHook(f)
	return f
}

// Levels satisfies logrus.Hook.
func (f *logFiles) Levels() []logrus.Level { return logrus.AllLevels }

// Fire satisfies logrus.Hook. It never fails: what could not be written is counted.
func (f *logFiles) Fire(e *logrus.Entry) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.out == nil {
		return nil
	}
	line, err := e.Bytes()
	if err == nil && f.full {
		err = errors.New("磁盘空间已到保留线 (the disk is down to its reserve)")
	}
	if err == nil {
		_, err = f.out.Write(line)
	}
	if err != nil {
		f.lost++
		f.failed = err.Error()
	}
	return nil
}

// place answers the folder for l, made if it lies in the appliance's own. Another must be there, and nobody else's.
func (f *logFiles) place(l Log) (string, error) {
	if err := l.check(); err != nil || l.Directory == "" {
		return "", err
	}
	dir := l.Directory
	if !filepath.IsAbs(dir) {
		dir = filepath.Join(f.a.dir, dir)
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return "", err
		}
	}
	real, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return "", fmt.Errorf("log.directory: %w", err)
	}
	own, err := filepath.EvalSymlinks(f.a.dir)
	if err != nil {
		return "", err
	}
	if inside, err := filepath.Rel(own, real); err == nil && filepath.IsLocal(inside) {
		if err := checkLogName(inside); err != nil {
			return "", err
		}
	}
	info, err := os.Stat(real)
	if err != nil {
		return "", err
	}
	owner, known := info.Sys().(*syscall.Stat_t)
	if !info.IsDir() || info.Mode().Perm()&0o022 != 0 || !known || int(owner.Uid) != os.Geteuid() {
		return "", fmt.Errorf("log.directory: %s 须为服务用户自己的目录，他人不可写 (want a folder of the service's user that nobody else can write)", real)
	}
	return real, nil
}

// use begins with l. What was written before stays where it is.
func (f *logFiles) use(l Log, from string) error {
	folder, err := f.place(l)
	if err != nil {
		return err
	}
	var out *lumberjack.Logger
	if folder != "" {
		file, err := os.OpenFile(filepath.Join(folder, logName), os.O_CREATE|os.O_APPEND|os.O_WRONLY|syscall.O_NOFOLLOW, 0o600)
		if err != nil {
			return fmt.Errorf("log.directory: %w", err)
		}
		if err := file.Close(); err != nil {
			return err
		}
		out = &lumberjack.Logger{Filename: filepath.Join(folder, logName), MaxSize: logFileMB}
	}
	f.a.log.SetLevel(logLevels[l.Level])
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.out != nil {
		_ = f.out.Close() // each line was written by itself
	}
	f.set, f.from, f.folder, f.out, f.day = l, from, folder, out, ""
	return nil
}

// close ends writing.
func (f *logFiles) close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.out == nil {
		return nil
	}
	err := f.out.Close()
	f.out = nil
	return err
}

// replay takes over from the journal what was decided last.
func (f *logFiles) replay(ctx context.Context) error {
	var last *audit.Entry
	err := f.a.journal.State(ctx, func(r audit.Record) error {
		if r.Entry.Kind == kindLogSettings {
			e := r.Entry
			last = &e
		}
		return nil
	})
	if err != nil || last == nil {
		return err
	}
	var l Log
	if err := json.Unmarshal([]byte(last.Text("settings")), &l); err != nil {
		return fmt.Errorf("entry %s: %w", kindLogSettings, err)
	}
	if err := f.use(l, last.Actor); err != nil {
		f.a.log.WithError(err).Error("the running log does not go where an administrator decided that it goes")
	}
	return nil
}

// run begins a file each day, and deletes those that are old enough.
func (f *logFiles) run(ctx context.Context) error {
	tick := time.NewTicker(logLookEvery)
	defer tick.Stop()
	for {
		if err := f.look(ctx); err != nil && ctx.Err() == nil {
			f.a.log.WithError(err).Error("files of the running log were not looked after")
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

func (f *logFiles) look(ctx context.Context) error {
	now := f.a.clock.Now()
	f.mu.Lock()
	folder, keep := f.folder, f.set.KeepDays
	if folder != "" {
		var disk syscall.Statfs_t
		f.full = syscall.Statfs(folder, &disk) == nil && disk.Bavail*uint64(disk.Bsize) < f.a.cfg.Policy.ReserveBytes
	}
	turned := false
	if f.out != nil && now.Trusted() {
		day := now.Time.UTC().Format(time.DateOnly)
		turned = f.day != "" && f.day != day
		f.day = day
	}
	var err error
	if turned {
		err = f.out.Rotate()
	}
	f.mu.Unlock()
	if err != nil || folder == "" || !now.Trusted() {
		return err
	}
	return f.purge(ctx, folder, now.Time.UTC(), keep)
}

// purge notes files that were closed since the last look, and deletes those that were closed more than keep days ago: by what
// trusted time was then and is now, not by the files' own times, which a clock that was wrong at a start may have set. The entry
// comes first; a file that could not be deleted is told of again.
func (f *logFiles) purge(ctx context.Context, folder string, now time.Time, keep int) error {
	f.acts.Lock()
	defer f.acts.Unlock()
	index := filepath.Join(folder, logIndex)
	closed := map[string]time.Time{}
	b, err := os.ReadFile(index)
	if err == nil && json.Unmarshal(b, &closed) != nil {
		closed = map[string]time.Time{} // begun anew: everything is kept longer
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	files, err := closedLogs(folder)
	if err != nil {
		return err
	}
	before := maps.Clone(closed)
	maps.DeleteFunc(closed, func(name string, _ time.Time) bool { _, there := files[name]; return !there })
	var old []string
	for name := range files {
		at, known := closed[name]
		if !known || at.After(now) {
			closed[name] = now
		} else if now.Sub(at) > time.Duration(keep)*24*time.Hour {
			old = append(old, name)
		}
	}
	slices.Sort(old)
	old = old[:min(len(old), logPurgesMost)]
	if len(old) > 0 {
		type gone struct {
			Name   string `json:"name"`
			Bytes  int64  `json:"bytes"`
			Closed string `json:"closed"`
		}
		var all []gone
		for _, name := range old {
			all = append(all, gone{name, files[name], closed[name].Format(time.RFC3339)})
		}
		told, err := json.Marshal(all)
		if err != nil {
			return err
		}
		_, err = f.a.journal.Append(ctx, audit.Draft{Kind: kindLogPurged, Actor: "appliance", Object: f.a.cfg.Node, Fields: []audit.Field{
			{Name: "folder", Value: audit.Text(cutText(folder))}, {Name: "files", Value: audit.Text(string(told))}, {Name: "keep_days", Value: audit.Int(keep)},
		}})
		if err != nil {
			return journalRefused(err)
		}
		for _, name := range old {
			if err := os.Remove(filepath.Join(folder, name)); err != nil {
				return err
			}
			delete(closed, name)
		}
		f.a.log.WithFields(logrus.Fields{"files": len(old), "first": old[0], "keep_days": keep}).Info("old files of the running log were deleted")
	}
	if maps.Equal(before, closed) {
		return nil
	}
	if b, err = json.Marshal(closed); err != nil {
		return err
	}
	return writeFile(index, b, 0o600)
}

// closedLogs are the files that are written no more, with their sizes.
func closedLogs(folder string) (map[string]int64, error) {
	entries, err := os.ReadDir(folder)
	if err != nil {
		return nil, err
	}
	stem, ext := strings.TrimSuffix(logName, filepath.Ext(logName))+"-", filepath.Ext(logName)
	files := map[string]int64{}
	for _, e := range entries {
		if !e.Type().IsRegular() || !strings.HasPrefix(e.Name(), stem) || !strings.HasSuffix(e.Name(), ext) {
			continue
		}
		info, err := e.Info()
		if err != nil {
			return nil, err
		}
		files[e.Name()] = info.Size()
	}
	return files, nil
}

func (f *logFiles) report() (*api.LogStatus, error) {
	f.mu.Lock()
	s := &api.LogStatus{Directory: f.set.Directory, Folder: f.folder, Level: f.set.Level, KeepDays: f.set.KeepDays, Decided: f.from, Lost: f.lost, Failed: f.failed}
	f.mu.Unlock()
	if s.Folder == "" {
		return s, nil
	}
	files, err := closedLogs(s.Folder)
	if err != nil {
		return nil, err
	}
	s.Files = len(files)
	for _, n := range files {
		s.Bytes += n
	}
	if info, err := os.Stat(filepath.Join(s.Folder, logName)); err == nil {
		s.Files++
		s.Bytes += info.Size()
	}
	return s, nil
}

// LogStatus satisfies api.LogAdmin.
func (d admin) LogStatus(context.Context, string) (any, error) { return d.a.logs.report() }

// SetLog satisfies api.LogAdmin: the entry comes before the change, so that what it says holds from the next start on.
func (d admin) SetLog(ctx context.Context, actor string, req api.SetLog) (any, error) {
	f := d.a.logs
	f.acts.Lock()
	defer f.acts.Unlock()
	f.mu.Lock()
	before, l := f.set, f.set
	f.mu.Unlock()
	if req.Directory != nil {
		l.Directory = *req.Directory
	}
	l.Level, l.KeepDays = cmp.Or(req.Level, l.Level), cmp.Or(req.KeepDays, l.KeepDays)
	if _, err := f.place(l); err != nil {
		return nil, problem.Invalid("directory", "%v", err)
	}
	settings, err := json.Marshal(l)
	if err != nil {
		return nil, err
	}
	changed, err := audit.Changed(before, l)
	if err != nil {
		return nil, err
	}
	_, err = d.a.journal.Append(ctx, audit.Draft{
		Kind: kindLogSettings, Actor: actor, Object: d.a.cfg.Node, State: true,
		Fields: append(changed, audit.Field{Name: "settings", Value: audit.Text(string(settings))}, audit.Field{Name: "reason", Value: audit.Text(req.Reason)}),
	})
	if err != nil {
		return nil, journalRefused(err)
	}
	if err := f.use(l, actor); err != nil {
		return nil, problem.New(problem.NotReady, fmt.Sprintf("已记下，未能改用 (noted, and not obeyed): %s", printable(err.Error())),
			"排除后重启，或再设一次 (remove the cause and restart, or set it again)").With(err)
	}
	return f.report()
}

// ReadLog satisfies api.LogAdmin: the last lines of the file that is written now.
func (d admin) ReadLog(_ context.Context, _ string, req api.ReadLog) (any, error) {
	f := d.a.logs
	f.mu.Lock()
	folder := f.folder
	f.mu.Unlock()
	if folder == "" {
		return nil, problem.New(problem.NotFound, "运行日志没有写入文件 (the running log goes to no file)", "yinjian log set --dir DIR --directory logs --reason …")
	}
	lines, err := lastLines(filepath.Join(folder, logName), cmp.Or(req.Lines, 100))
	if err != nil {
		return nil, err
	}
	return map[string]any{"lines": lines}, nil
}

// lastLines reads at most n lines, and 1 MiB, from a file's end.
func lastLines(name string, n int) ([]string, error) {
	const most = 1 << 20
	file, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return nil, err
	}
	from := max(0, info.Size()-most)
	b, err := io.ReadAll(io.NewSectionReader(file, from, info.Size()-from))
	if err != nil {
		return nil, err
	}
	lines := strings.Split(strings.TrimSuffix(strings.ToValidUTF8(string(b), "\uFFFD"), "\n"), "\n")
	if from > 0 {
		lines = lines[1:] // cut
	}
	return lines[max(0, len(lines)-n):], nil
}

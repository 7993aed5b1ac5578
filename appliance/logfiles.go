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
	"sync/atomic"
	"syscall"
	"time"

	"github.com/sirupsen/logrus"
	"gopkg.in/natefinch/lumberjack.v2"

	"yinjian/api"
	"yinjian/api/wire"
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

	// What waits for a volume that is slow or hangs: some seconds of a busy appliance's lines.
	logLinesMost = 4096
	logBytesMost = 4 << 20
	logPatience  = 5 * time.Second // for what waits to be written, when the appliance stops or the folder changes
)

// Log says where the running log goes besides the standard error. It is for whoever looks after the appliance; what
// happened to records and rights is in the journal, whatever becomes of this.
type Log struct {
	// 运行日志另写入此目录：`logs` 或其下（设备目录内），或一个已有的、属于服务用户而他人不可写的绝对路径；
	// 不写则只写标准错误。该卷剩余空间不足 policy.reserve_bytes 的两倍时不写，不因运行日志而停签。运行中可用 `yinjian log set` 改变 (files of the running log)
	// 缺省：空
	Directory string `toml:"directory" json:"directory"`
	// `error`、`warning`、`info`、`debug`
	// 缺省：`info`
	Level string `toml:"level" json:"level"`
	// 运行日志的文件写完后保留的天数，不得少于 180（网络安全法：不少于六个月；条号请医院核对，见 [records.md](records.md)）；
	// 删除前先记入日志 (days that a file of the running log is kept; at least 180)
	// 缺省：`365`
	KeepDays int `toml:"keep_days" json:"keep_days"`
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

// A logFiles is the running log in files: one until it has 64 MB or the day ends. Whoever logs does not wait for the volume:
// lines are written by one goroutine, and those that find no room before it are dropped and counted. Files are deleted some time
// after they were closed, as trusted time has it, and only when an entry of the journal says which. Safe for concurrent use.
type logFiles struct {
	a    *Appliance
	acts sync.Mutex // held during an administrator's act, and while the journal is told what is deleted

	mu      sync.Mutex // guards what follows; never held while the volume is waited for
	set     Log
	from    string     // who decided set: "config.toml" or an administrator
	folder  string     // absolute; "" when nothing is written
	out     *logWriter // nil when nothing is written
	day     string     // of trusted time, when out was begun; "" before it is known
	full    bool       // the disk has less than twice its reserve: nothing is written
	lost    uint64     // lines that could not be written
	failed  string     // why, of the last
	dropped uint64     // of those that were lost, since there was no room for them, what the log does not tell of yet
}

// A logWriter hands lines to the goroutine that writes them; who sends holds logFiles.mu.
type logWriter struct {
	lines chan []byte // nil: another file is begun
	bytes atomic.Int64
	done  chan struct{} // closed when all is written and the file closed
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

// Fire satisfies logrus.Hook. It never fails, and waits for nothing: what is not written is counted.
func (f *logFiles) Fire(e *logrus.Entry) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.out == nil {
		return nil
	}
	line, err := e.Bytes()
	switch {
	case err != nil:
		f.lose(1, err)
	case f.full:
		f.lose(1, errors.New("磁盘空间不足保留的两倍 (the disk has less than twice its reserve)"))
	case !f.out.send(line):
		f.lose(1, errors.New("等待写入的已满，卷没有跟上 (no room for more lines: the volume does not keep up)"))
		f.dropped++
	}
	return nil
}

// lose is called under f.mu.
func (f *logFiles) lose(lines int, why error) {
	f.lost += uint64(lines)
	f.failed = why.Error()
}

func (w *logWriter) send(line []byte) bool {
	if w.bytes.Load()+int64(len(line)) > logBytesMost {
		return false
	}
	select {
	case w.lines <- line:
		w.bytes.Add(int64(len(line)))
		return true
	default:
		return false
	}
}

// write has what is sent written to a file.
func (f *logFiles) write(file *lumberjack.Logger) *logWriter {
	w := &logWriter{lines: make(chan []byte, logLinesMost), done: make(chan struct{})}
	go func() {
		defer close(w.done)
		for line := range w.lines {
			if line == nil {
				if err := file.Rotate(); err != nil {
					f.a.log.WithError(err).Error("the running log's next file could not be begun")
				}
				continue
			}
			_, err := file.Write(line)
			w.bytes.Add(-int64(len(line)))
			f.mu.Lock()
			if err != nil {
				f.lose(1, err)
			}
			var dropped uint64
			if err == nil && len(w.lines) == 0 { // the volume keeps up again
				dropped, f.dropped = f.dropped, 0
			}
			f.mu.Unlock()
			if dropped > 0 {
				f.a.log.WithField("lines", dropped).Warning("lines of the running log were dropped: its volume did not keep up")
			}
		}
		_ = file.Close() // each line was written by itself
	}()
	return w
}

// end has a writer write what waits, for as long as logPatience allows. Nobody sends to it any more.
func (f *logFiles) end(w *logWriter) {
	if w == nil {
		return
	}
	close(w.lines)
	select {
	case <-w.done:
	case <-time.After(logPatience):
		f.mu.Lock()
		f.lose(len(w.lines), errors.New("卷没有应答 (the volume does not answer)"))
		f.mu.Unlock()
		f.a.log.WithField("lines", len(w.lines)).Error("the running log's volume does not answer: lines were not written")
	}
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
	var out *logWriter
	if folder != "" {
		file, err := os.OpenFile(filepath.Join(folder, logName), os.O_CREATE|os.O_APPEND|os.O_WRONLY|syscall.O_NOFOLLOW, 0o600)
		if err != nil {
			return fmt.Errorf("log.directory: %w", err)
		}
		if err := file.Close(); err != nil {
			return err
		}
		out = f.write(&lumberjack.Logger{Filename: filepath.Join(folder, logName), MaxSize: logFileMB})
	}
	f.a.log.SetLevel(logLevels[l.Level])
	f.mu.Lock()
	before := f.out
	f.set, f.from, f.folder, f.out, f.day = l, from, folder, out, ""
	f.mu.Unlock()
	f.end(before)
	return nil
}

// close ends writing, when what was logged is written.
func (f *logFiles) close() error {
	f.mu.Lock()
	out := f.out
	f.out = nil
	f.mu.Unlock()
	f.end(out)
	return nil
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

// run begins a file each day, and deletes those that are old enough. A volume that hangs does not keep the appliance from
// stopping.
func (f *logFiles) run(ctx context.Context) error {
	tick := time.NewTicker(logLookEvery)
	defer tick.Stop()
	for {
		folder, _ := f.used()
		looked := make(chan error, 1)
		go func() { looked <- f.look(ctx) }()
		f.await(ctx, folder, looked, tick.C)
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// await waits until a folder was looked after. One whose volume hangs is left when an administrator has named another.
func (f *logFiles) await(ctx context.Context, folder string, looked <-chan error, tick <-chan time.Time) {
	for {
		select {
		case err := <-looked:
			if err != nil && ctx.Err() == nil {
				f.a.log.WithError(err).Error("files of the running log were not looked after")
			}
			return
		case <-tick:
			if now, _ := f.used(); now != folder {
				return
			}
		case <-ctx.Done():
			select {
			case <-looked:
			case <-time.After(logPatience):
				f.a.log.Error("the running log's volume does not answer")
			}
			return
		}
	}
}

// used is the folder that is written to now, and for how many days its files are kept.
func (f *logFiles) used() (folder string, keep int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.folder, f.set.KeepDays
}

func (f *logFiles) look(ctx context.Context) error {
	now := f.a.clock.Now()
	folder, keep := f.used()
	if folder == "" {
		return nil
	}
	var disk syscall.Statfs_t
	// At twice the reserve, so that signing, which ends at the reserve, does not end because of this.
	full := syscall.Statfs(folder, &disk) == nil && disk.Bavail*uint64(disk.Bsize) < 2*f.a.cfg.Policy.ReserveBytes
	f.mu.Lock()
	if f.folder != folder { // an administrator has named another
		f.mu.Unlock()
		return nil
	}
	f.full = full
	if f.out != nil && now.Trusted() {
		day := now.Time.UTC().Format(time.DateOnly)
		if f.day == "" || f.day == day || f.out.send(nil) { // without room another time
			f.day = day
		}
	}
	f.mu.Unlock()
	if !now.Trusted() {
		return nil
	}
	return f.purge(ctx, folder, now.Time.UTC(), keep)
}

// purge notes files that were closed since the last look, and deletes those that were closed more than keep days ago: by what
// trusted time was then and is now, not by the files' own times, which a clock that was wrong at a start may have set. The entry
// comes first; a file that could not be deleted is told of again.
func (f *logFiles) purge(ctx context.Context, folder string, now time.Time, keep int) error {
	closed, err := closings(folder)
	if err != nil {
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
		if still, err := f.tellPurge(ctx, folder, string(told), keep); err != nil || !still {
			return err
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
	b, err := json.Marshal(closed)
	if err != nil {
		return err
	}
	return writeFile(filepath.Join(folder, logIndex), b, 0o600)
}

// tellPurge journals which files are deleted, unless an administrator has decided otherwise meanwhile.
func (f *logFiles) tellPurge(ctx context.Context, folder, told string, keep int) (still bool, err error) {
	f.acts.Lock()
	defer f.acts.Unlock()
	if where, days := f.used(); where != folder || days != keep {
		return false, nil
	}
	_, err = f.a.journal.Append(ctx, audit.Draft{Kind: kindLogPurged, Actor: "appliance", Object: f.a.cfg.Node, Fields: []audit.Field{
		{Name: "folder", Value: audit.Text(cutText(folder))}, {Name: "files", Value: audit.Text(told)}, {Name: "keep_days", Value: audit.Int(keep)},
	}})
	if err != nil {
		return false, journalRefused(err)
	}
	return true, nil
}

// isLog says whether a file of the folder is one of the running log, by its name.
func isLog(name string) bool {
	ext := filepath.Ext(logName)
	return name == logName || strings.HasPrefix(name, strings.TrimSuffix(logName, ext)+"-") && strings.HasSuffix(name, ext)
}

// closedLogs are the files that are written no more, with their sizes.
func closedLogs(folder string) (map[string]int64, error) {
	entries, err := os.ReadDir(folder)
	if err != nil {
		return nil, err
	}
	files := map[string]int64{}
	for _, e := range entries {
		if !e.Type().IsRegular() || !isLog(e.Name()) || e.Name() == logName {
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
	s := &api.LogStatus{Directory: f.set.Directory, Folder: f.folder, Level: f.set.Level, KeepDays: f.set.KeepDays, Decided: f.from, Lost: f.lost, Failed: f.failed, List: []wire.LogFile{}}
	f.mu.Unlock()
	if s.Folder == "" {
		return s, nil
	}
	entries, err := os.ReadDir(s.Folder)
	if err != nil {
		return nil, err
	}
	closed, err := closings(s.Folder)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if !isLog(e.Name()) || !e.Type().IsRegular() {
			continue
		}
		info, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue // deleted since
		}
		if err != nil {
			return nil, err
		}
		one := wire.LogFile{Name: e.Name(), Bytes: info.Size(), Modified: info.ModTime().UTC().Format(time.RFC3339)}
		if at, known := closed[one.Name]; known {
			one.Closed = at.UTC().Format(time.RFC3339)
		}
		s.Files++
		s.Bytes += one.Bytes
		s.List = append(s.List, one)
	}
	slices.SortFunc(s.List, func(a, b wire.LogFile) int { // the names have the time
		return cmp.Or(cmp.Compare(btoi(b.Name == logName), btoi(a.Name == logName)), cmp.Compare(b.Name, a.Name))
	})
	return s, nil
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

// closings are since when files are known to be written no more.
func closings(folder string) (map[string]time.Time, error) {
	closed := map[string]time.Time{}
	b, err := os.ReadFile(filepath.Join(folder, logIndex))
	if err == nil && json.Unmarshal(b, &closed) != nil {
		closed = map[string]time.Time{} // begun anew: everything is kept longer
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	return closed, nil
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
		return nil, errNoLogFiles
	}
	lines, err := lastLines(folder, logName, cmp.Or(req.Lines, 100))
	if err != nil {
		return nil, err
	}
	return map[string]any{"lines": lines}, nil
}

var errNoLogFiles = problem.New(problem.NotFound, "运行日志没有写入文件 (the running log goes to no file)", "yinjian log set --dir DIR --directory logs --reason …")

// ReadLogFile satisfies api.LogAdmin: a part of one of the files that the status lists, and of nothing else in the folder.
func (d admin) ReadLogFile(_ context.Context, _ string, req api.ReadLogFile) (any, error) {
	f := d.a.logs
	f.mu.Lock()
	folder := f.folder
	f.mu.Unlock()
	if folder == "" {
		return nil, errNoLogFiles
	}
	file, info, err := openLog(folder, req.Name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, problem.New(problem.NotFound, "没有这个运行日志文件 (there is no such file of the running log)", "见运行日志的文件列表；到期的已删除 (see the list of files; what is old enough was deleted)")
	}
	if err != nil {
		return nil, err
	}
	defer file.Close()
	content, err := io.ReadAll(io.NewSectionReader(file, int64(req.From), logPart))
	if err != nil {
		return nil, err
	}
	return wire.LogPart{Content: content, Size: info.Size()}, nil
}

// logPart is the most that is read of a file at a time.
const logPart = 1 << 20

// openLog opens a file of the running log, within its folder: a name that leads elsewhere, or a link, is none.
func openLog(folder, name string) (*os.File, fs.FileInfo, error) {
	if !isLog(name) || filepath.Base(name) != name {
		return nil, nil, fs.ErrNotExist
	}
	file, err := os.OpenFile(filepath.Join(folder, name), os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if errors.Is(err, syscall.ELOOP) {
		err = fs.ErrNotExist
	}
	if err != nil {
		return nil, nil, err
	}
	info, err := file.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fs.ErrNotExist
	}
	if err != nil {
		file.Close()
		return nil, nil, err
	}
	return file, info, nil
}

// lastLines reads at most n lines, and 1 MiB, from a file's end.
func lastLines(folder, name string, n int) ([]string, error) {
	const most = 1 << 20
	file, info, err := openLog(folder, name)
	if err != nil {
		return nil, err
	}
	defer file.Close()
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

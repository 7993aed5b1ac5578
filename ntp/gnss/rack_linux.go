package gnss

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	beevik "github.com/beevik/ntp"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
)

// RackConfig describes a rack.
type RackConfig struct {
	Dir     string             // for chronyd's files; made if missing, not removed
	NTPPort int                // UDP port on 127.0.0.1; 0: a free one
	Log     logrus.FieldLogger // required; takes what gpsd and chronyd say at level debug
	Clock   func() time.Time   // required: what the receiver takes for UTC, sysclock's Realtime for a demonstration
	Offset  time.Duration      // of the receiver's time from Clock
	// ChronyConf, if set, is the text of a chrony.conf to run in place of the rack's own, and GpsdOptions are gpsd's in place
	// of -n. What names a port, a folder, a user or a piece of shared memory is made the rack's, see [adapt]; the rest is
	// what runs.
	ChronyConf  string
	GpsdOptions []string
	// LockWait is how long to wait for another rack, where two cannot run side by side. Default 60 s.
	LockWait time.Duration
}

// A Rack is a running receiver, gpsd and chronyd.
type Rack struct {
	Address  string // host:port of the NTP server
	Receiver string // host:port where gpsd reads the receiver's sentences
	Feed     *Feed

	stop   context.CancelFunc
	done   chan struct{}
	err    error // why it ended unasked; written before done is closed
	recent *recent
}

// ErrMissing means that gpsd or chronyd is not installed.
var ErrMissing = errors.New("gnss: program not installed")

// LockPath is the file that racks lock which have to share the machine's NTP shared memory.
func LockPath() string { return filepath.Join(os.TempDir(), "yinjian-gpsd-shm.lock") }

// find looks in PATH and where Debian keeps daemons, which an ordinary user's PATH does not name.
func find(program, debianPackage string) (string, error) {
	if path, err := exec.LookPath(program); err == nil {
		return filepath.Abs(path)
	}
	for _, dir := range []string{"/usr/sbin", "/sbin", "/usr/local/sbin"} {
		if path, err := exec.LookPath(filepath.Join(dir, program)); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("%w: %s; on Debian: apt-get install %s", ErrMissing, program, debianPackage)
}

// StartRack starts receiver, gpsd and chronyd and returns when chronyd answers at stratum 1, some seconds later. The rack
// ends with ctx or Close.
//
// gpsd hands the time to chronyd through System V shared memory with fixed keys, of which there is one set per IPC
// namespace. Its other way, a SOCK refclock, serves only pulses (PPS) in gpsd 3.22, and a TCP feed has none. So gpsd and
// chronyd are started in an IPC namespace of their own, and racks run side by side, also beside the machine's own gpsd.
// That takes CAP_SYS_ADMIN. Without it there is one rack per machine at a time, under a lock on [LockPath].
// An ordinary user can run it. Started by root, gpsd runs as nobody: it would change its user by itself otherwise, and
// the kernel forgets PDEATHSIG when a process does that. Either way it uses the shared memory units 2 and 3, which are
// open to all.
//
// gpsd 3.22 hands on the time of a receiver that says it has no fix ([NoFix]), and chronyd takes it for fresh. Only
// [Silent] looks like an outage.
func StartRack(ctx context.Context, cfg RackConfig) (*Rack, error) {
	if cfg.Log == nil || cfg.Clock == nil || cfg.Dir == "" {
		return nil, errors.New("gnss: rack needs a folder, a log and a clock")
	}
	if cfg.LockWait == 0 {
		cfg.LockWait = time.Minute
	}
	gpsd, err := find("gpsd", "gpsd")
	if err != nil {
		return nil, err
	}
	chronyd, err := find("chronyd", "chrony")
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(cfg.Dir, 0o750); err != nil {
		return nil, fmt.Errorf("gnss: %w", err)
	}
	// A port found free can be taken before the daemon binds it. Trying again with another is all that can be done.
	for attempt := 1; ; attempt++ {
		r, err := start(ctx, cfg, gpsd, chronyd)
		if err == nil || ctx.Err() != nil || cfg.NTPPort != 0 || attempt == 3 || !errors.Is(err, errEnded) {
			return r, err
		}
		cfg.Log.WithError(err).Debug("rack did not start, trying other ports")
	}
}

// errEnded means that gpsd or chronyd ended by itself.
var errEnded = errors.New("gnss: daemon ended")

func start(ctx context.Context, cfg RackConfig, gpsd, chronyd string) (*Rack, error) {
	gpsdPort, err := freePort("tcp")
	if err != nil {
		return nil, err
	}
	ntpPort := cfg.NTPPort
	if ntpPort == 0 {
		if ntpPort, err = freePort("udp"); err != nil {
			return nil, err
		}
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("gnss: %w", err)
	}
	options := []string{"-n"}
	if cfg.GpsdOptions != nil {
		options = cfg.GpsdOptions
	}
	run, stop := context.WithCancel(ctx)
	r := &Rack{
		Address:  net.JoinHostPort("127.0.0.1", strconv.Itoa(ntpPort)),
		Receiver: l.Addr().String(),
		Feed:     NewFeed(cfg.Clock, cfg.Offset),
		stop:     stop, done: make(chan struct{}), recent: new(recent),
	}
	var feeding sync.WaitGroup
	feeding.Go(func() { _ = r.Feed.Serve(run, l) }) // it ends by ctx; a listener broken otherwise starves gpsd, which shows
	go func() {
		defer close(r.done)
		defer feeding.Wait()
		defer stop()
		r.err = r.supervise(run, cfg, ntpPort,
			slices.Concat([]string{gpsd, "-N"}, options, []string{"-S", strconv.Itoa(gpsdPort), "tcp://" + l.Addr().String()}), chronyd)
	}()
	if err := r.await(run); err != nil {
		stop()
		<-r.done
		switch {
		case ctx.Err() != nil:
			return nil, context.Cause(ctx)
		case r.err != nil:
			err = r.err
		}
		return nil, fmt.Errorf("%w; last words: %s", err, r.recent)
	}
	return r, nil
}

// Close stops the rack and waits until its processes are gone. It returns why the rack had ended before, if it had.
func (r *Rack) Close() error {
	r.stop()
	<-r.done
	return r.err
}

// Done is closed when the rack has ended, asked or not.
func (r *Rack) Done() <-chan struct{} { return r.done }

// startLimit is more than a loaded machine needs; 3 s is usual.
const startLimit = 60 * time.Second

// await asks chronyd until it is a server of stratum 1.
func (r *Rack) await(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, startLimit, fmt.Errorf("gnss: chronyd is not at stratum 1 after %v", startLimit))
	defer cancel()
	for {
		answer, err := beevik.QueryWithOptions(r.Address, beevik.QueryOptions{Timeout: 200 * time.Millisecond})
		if err == nil && answer.Stratum == 1 && answer.Leap != beevik.LeapNotInSync {
			return nil
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-r.done:
			return fmt.Errorf("gnss: ended before it began: %w", cmp.Or(r.err, context.Canceled))
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// supervise runs the daemons on a thread of its own, for two reasons. The IPC namespace belongs to the thread, and
// children inherit it. And PDEATHSIG kills the children when the *thread* that started them ends, so the thread has to
// last as long as they do: it is locked, and never unlocked, so that the Go runtime ends it with this goroutine instead
// of using it for others, in the wrong namespace.
func (r *Rack) supervise(ctx context.Context, cfg RackConfig, ntpPort int, gpsd []string, chronyd string) error {
	result := make(chan error)
	go func() {
		runtime.LockOSThread()
		result <- func() error {
			// 1. A namespace, or the lock.
			if err := unix.Unshare(unix.CLONE_NEWIPC); err != nil {
				cfg.Log.WithError(err).Debug("no IPC namespace of our own, taking the machine's lock")
				unlock, err := lockSHM(ctx, cfg.LockWait)
				if err != nil {
					return err
				}
				defer unlock()
			}
			// 2. Configuration. chronyd runs in Dir and is given relative names: its file format has no quoting.
			conf, args, err := chronyConfig(ntpPort)
			if err != nil {
				return err
			}
			if cfg.ChronyConf != "" {
				if conf, err = adapt(cfg.ChronyConf, conf); err != nil {
					return err
				}
			}
			if err := os.WriteFile(filepath.Join(cfg.Dir, "chrony.conf"), []byte(conf), 0o640); err != nil {
				return fmt.Errorf("gnss: %w", err)
			}
			// 3. Run both until ctx ends or one of them does; then stop both. Which of them makes the shared memory is a race
			// whatever the order here; chronyd mostly wins this way, and then its perm= has to let gpsd in.
			ctx, cancel := context.WithCancelCause(ctx)
			defer cancel(nil)
			var daemons sync.WaitGroup
			defer daemons.Wait()
			for _, argv := range [][]string{append([]string{chronyd}, args...), gpsd} {
				cmd, err := r.launch(argv, cfg, cancel)
				if err != nil {
					cancel(err)
					return err
				}
				kill := context.AfterFunc(ctx, func() { terminate(cmd) })
				daemons.Go(func() {
					err := cmd.Wait()
					kill()
					cancel(fmt.Errorf("%w: %s: %v", errEnded, filepath.Base(argv[0]), err))
				})
			}
			<-ctx.Done()
			if cause := context.Cause(ctx); errors.Is(cause, errEnded) {
				return cause
			}
			return nil
		}()
		// The goroutine ends locked, and its thread with it.
	}()
	return <-result
}

// nobody is the user that has no rights, everywhere on Linux.
const nobody = 65534

// launch starts a daemon on the calling thread. It calls useless if the daemon runs but has said that it cannot serve.
func (r *Rack) launch(argv []string, cfg RackConfig, useless func(error)) (*exec.Cmd, error) {
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Dir = cfg.Dir
	name := filepath.Base(argv[0])
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C"}
	// A process group of its own: a Ctrl-C meant for us does not kill it before we have asked it to end.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if name == "gpsd" && os.Geteuid() == 0 {
		cmd.Dir = "/"
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: nobody, Gid: nobody}
	}
	cmd.WaitDelay = time.Second
	out := &lines{to: func(line string) {
		r.recent.add(name + ": " + line)
		cfg.Log.WithField("program", name).Debug(line)
		// chronyd goes on without its socket when the port is taken.
		if strings.Contains(line, "Could not open NTP socket") {
			useless(fmt.Errorf("%w: %s: %s", errEnded, name, line))
		}
	}}
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("gnss: starting %s: %w", name, err)
	}
	return cmd, nil
}

// terminate asks the process group to end, and makes it a second later. It runs while Wait does: until Wait returns the
// process id is not given to another.
func terminate(cmd *exec.Cmd) {
	_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM)
	for range 20 {
		time.Sleep(50 * time.Millisecond)
		if cmd.Process.Signal(syscall.Signal(0)) != nil { // waited for
			return
		}
	}
	_ = cmd.Process.Signal(syscall.SIGKILL)
}

// chronyConfig is the configuration file, and the arguments that go with it.
//
//	delay 0.1           half of it, 50 ms, enters the root distance for what a serial line may jitter
//	maxdispersion 1.0   samples older than their dispersion allows are not used
//	cmdport, bindcmdaddress: no command port and no command socket; nobody reconfigures it
func chronyConfig(port int) (conf string, args []string, err error) {
	owner := "root" // chronyd would become _chrony otherwise, who cannot write to Dir
	args = []string{"-x", "-d", "-f", "chrony.conf"}
	if os.Geteuid() != 0 {
		me, err := user.Current()
		if err != nil {
			return "", nil, fmt.Errorf("gnss: %w", err)
		}
		owner = me.Username
		args = append([]string{"-U"}, args...)
	}
	// Whoever comes first makes the segment. chronyd would make it closed to others (0600), and gpsd, which runs as
	// nobody, could then not write to it.
	conf = fmt.Sprintf(`refclock SHM 2:perm=0666 refid BDS poll 0 offset 0.0 delay 0.1 precision 1e-2 maxdispersion 1.0
port %d
bindaddress 127.0.0.1
allow 127.0.0.0/8
cmdport 0
bindcmdaddress /
pidfile chronyd.pid
maxclockerror 50
user %s
`, port, owner)
	return conf, args, nil
}

// PulseSocket is the datagram socket in the rack's folder on which a pulse per second is taken in place of /dev/pps0, as
// chrony's SOCK reference clock takes it.
const PulseSocket = "pps.sock"

// adapt makes a chrony.conf the rack's: ports, addresses, folders and the user are those of own, the rack's own file; the
// shared memory is the unit that is open to all, for gpsd is nobody here; the pulse comes from a socket. Every other
// directive, and every option of a reference clock, stays as it is.
func adapt(text, own string) (string, error) {
	mine := map[string]string{"driftfile": "driftfile chrony.drift"}
	for line := range strings.Lines(own) {
		name, _, _ := strings.Cut(line, " ")
		if slices.Contains([]string{"port", "bindaddress", "allow", "cmdport", "bindcmdaddress", "pidfile", "user"}, name) {
			mine[name] = strings.TrimSpace(line)
		}
	}
	var out strings.Builder
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		fields := strings.Fields(line)
		switch {
		case line == "" || strings.ContainsRune("#!;%", rune(line[0])):
			continue
		case len(fields) > 2 && fields[0] == "refclock" && fields[1] == "SHM":
			line = strings.Join(slices.Concat([]string{"refclock", "SHM", "2:perm=0666"}, fields[3:]), " ")
		case len(fields) > 2 && fields[0] == "refclock" && fields[1] == "PPS":
			line = strings.Join(slices.Concat([]string{"refclock", "SOCK", PulseSocket}, fields[3:]), " ")
		case mine[fields[0]] != "":
			line = mine[fields[0]]
		case fields[0] != "leapsectz" && strings.Contains(line, "/"): // leapsectz has a time zone's name
			return "", fmt.Errorf("gnss: chrony.conf: %q names a file or device that a rack has none of", line)
		}
		out.WriteString(line + "\n")
	}
	return out.String(), nil
}

// lockSHM takes the machine-wide lock, waiting for another rack to end.
func lockSHM(ctx context.Context, wait time.Duration) (unlock func(), err error) {
	path := LockPath()
	// Opened without O_CREAT first: in a sticky folder the kernel refuses O_CREAT on another user's file
	// (fs.protected_regular), while opening it is fine.
	f, err := os.OpenFile(path, os.O_RDONLY, 0)
	if errors.Is(err, os.ErrNotExist) {
		f, err = os.OpenFile(path, os.O_RDONLY|os.O_CREATE, 0o644)
	}
	if err != nil {
		return nil, fmt.Errorf("gnss: lock: %w", err)
	}
	timeout := time.NewTimer(wait)
	defer timeout.Stop()
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { _ = f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			_ = f.Close()
			return nil, fmt.Errorf("gnss: lock %s: %w", path, err)
		}
		select {
		case <-ctx.Done():
			_ = f.Close()
			return nil, context.Cause(ctx)
		case <-timeout.C:
			_ = f.Close()
			return nil, fmt.Errorf("gnss: another rack has held %s for %v; without CAP_SYS_ADMIN only one can run on a machine", path, wait)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func freePort(network string) (int, error) {
	switch network {
	case "udp":
		c, err := net.ListenPacket("udp4", "127.0.0.1:0")
		if err != nil {
			return 0, fmt.Errorf("gnss: %w", err)
		}
		defer c.Close()
		return c.LocalAddr().(*net.UDPAddr).Port, nil
	default:
		l, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			return 0, fmt.Errorf("gnss: %w", err)
		}
		defer l.Close()
		return l.Addr().(*net.TCPAddr).Port, nil
	}
}

// lines is an io.Writer that passes lines on. exec.Cmd calls it from one goroutine.
type lines struct {
	to   func(string)
	rest []byte
}

func (w *lines) Write(b []byte) (int, error) {
	w.rest = append(w.rest, b...)
	for {
		n, line, err := bufio.ScanLines(w.rest, len(w.rest) > 4096)
		if err != nil || n == 0 {
			return len(b), nil
		}
		w.to(string(line))
		w.rest = w.rest[n:]
	}
}

var _ io.Writer = (*lines)(nil)

// recent keeps the last lines that the daemons said, for errors.
type recent struct {
	mu    sync.Mutex
	lines []string
}

func (r *recent) add(line string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lines = append(r.lines, line)
	if len(r.lines) > 6 {
		r.lines = r.lines[1:]
	}
}

func (r *recent) String() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return strings.Join(r.lines, " | ")
}

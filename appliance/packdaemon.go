package appliance

import (
	"context"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/sirupsen/logrus"

	"yinjian/appliance/pack"
	"yinjian/hsm/worker"
)

const (
	// daemonReady is how long libraries wait for their daemon, from its first start on. Then they are loaded all the same, and say
	// themselves what they lack.
	daemonReady = 30 * time.Second
	// daemonPause is between a daemon's end and its next start; it doubles up to daemonRest as long as it does not run for that long.
	daemonPause = time.Second
	daemonRest  = time.Minute
	// daemonStop is how long it may take to end when it is told to.
	daemonStop = 5 * time.Second
)

// daemons are the makers' programs that libraries in packs talk to: one for each pack that a cipher machine uses, restarted when it
// ends, in our sandbox and as our user like the library itself.
type daemons struct {
	acts sync.Mutex // held while one is made or stopped

	mu      sync.Mutex // guards running
	running map[string]*daemon
}

// A daemon is one of them.
type daemon struct {
	pack    string // SM3 of its manifest
	folder  string // in which the pack is mounted
	ready   string // path, or ""
	limit   time.Time
	command func() *exec.Cmd
	log     *logrus.Entry
	stop    context.CancelFunc
	done    chan struct{}

	mu    sync.Mutex // guards what follows
	ends  int        // how often it has ended by itself
	fault string     // how the last time; "" while it runs
}

// need has a pack's daemon run, and waits until it is ready, or was to be. program and ready are paths, "" where readiness does not
// matter.
func (d *daemons) need(ctx context.Context, p *pack.Installed, program, ready string, arguments, env []string, log *logrus.Logger) {
	one := d.make(ctx, p, program, ready, arguments, env, log)
	if ready == "" {
		return
	}
	limit, tick := time.After(time.Until(one.limit)), time.NewTicker(20*time.Millisecond)
	defer tick.Stop()
	for {
		if _, err := os.Lstat(ready); err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-one.done:
			return
		case <-ctx.Done():
			return
		case <-limit:
			one.log.Warning("the maker's daemon is not ready; the library is loaded without it")
			return
		}
	}
}

func (d *daemons) make(ctx context.Context, p *pack.Installed, program, ready string, arguments, env []string, log *logrus.Logger) *daemon {
	d.acts.Lock()
	defer d.acts.Unlock()
	d.mu.Lock()
	one := d.running[p.Name]
	d.mu.Unlock()
	if one != nil && one.pack == p.SM3 {
		return one
	}
	if one != nil {
		one.end()
	}
	one = &daemon{pack: p.SM3, folder: p.Folder, ready: ready, limit: time.Now().Add(daemonReady), log: log.WithField("pack", p.Name), done: make(chan struct{}), command: func() *exec.Cmd { // interval
		cmd := exec.Command(program, arguments...)
		cmd.Env, cmd.Dir = env, "/"
		// It dies with us, however we end, and all that it starts can be told to end.
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
		return cmd
	}}
	one.unready() // of a run before, by a power cut; before anybody waits for it
	run, stop := context.WithCancel(context.WithoutCancel(ctx))
	one.stop = stop
	d.mu.Lock()
	if d.running == nil {
		d.running = map[string]*daemon{}
	}
	d.running[p.Name] = one
	d.mu.Unlock()
	go one.run(run)
	return one
}

// unused ends the daemons of packs that nobody uses.
func (d *daemons) unused(isUsed func(pack string) bool) {
	d.acts.Lock()
	defer d.acts.Unlock()
	d.mu.Lock()
	running := maps.Clone(d.running)
	d.mu.Unlock()
	for name, one := range running {
		if isUsed(name) {
			continue
		}
		one.end()
		d.mu.Lock()
		delete(d.running, name)
		d.mu.Unlock()
	}
}

// faults say which daemons do not run, by their packs' names.
func (d *daemons) faults() (out []string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for name, one := range d.running {
		one.mu.Lock()
		if one.fault != "" {
			out = append(out, fmt.Sprintf("厂商包 %s 的守护进程没有运行，已结束 %d 次，稍后再启动 (the maker's daemon does not run; it is started again): %s", name, one.ends, one.fault))
		}
		one.mu.Unlock()
	}
	slices.Sort(out)
	return out
}

// end stops it and waits until it is gone.
func (o *daemon) end() {
	o.stop()
	<-o.done
}

func (o *daemon) tell(fault string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.fault = fault; fault != "" {
		o.ends++
	}
}

// unready removes what says that it is ready.
func (o *daemon) unready() {
	if o.ready == "" {
		return
	}
	if err := os.RemoveAll(o.ready); err != nil {
		o.log.WithError(err).Warning("what says that the maker's daemon is ready could not be removed")
	}
}

// sweep ends what has left the daemon's group and still runs from its pack: one that went into the background.
func (o *daemon) sweep() {
	if !filepath.IsAbs(o.folder) || len(o.folder) < 2 { // everything that runs lies under /
		return
	}
	found, _ := filepath.Glob("/proc/[0-9]*/exe") // the pattern is well-formed
	for _, link := range found {
		program, err := os.Readlink(link)
		if err != nil || !strings.HasPrefix(program, o.folder+"/") {
			continue // gone, another's, or not of the pack: a worker, which has loaded its library, is a program of ours
		}
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(link))); err == nil {
			o.log.WithField("pid", pid).Warning("a process of the maker's pack has left its daemon, and is ended")
			_ = syscall.Kill(pid, syscall.SIGKILL) // gone already is well
		}
	}
}

// run starts it again and again until ctx ends.
func (o *daemon) run(ctx context.Context) {
	defer close(o.done)
	runtime.LockOSThread() // whose end would be the daemon's: Pdeathsig is about the thread
	for pause := daemonPause; ; {
		began := time.Now() // interval
		err := o.once(ctx)
		o.sweep()
		o.unready()
		if ctx.Err() != nil {
			return
		}
		why := "it ended with 0"
		if err != nil {
			why = err.Error()
		}
		o.log.WithField("reason", why).Error("a maker's daemon has ended; it is started again")
		o.tell(why)
		if time.Since(began) >= daemonRest {
			pause = daemonPause
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return
		}
		pause = min(2*pause, daemonRest)
	}
}

// once runs it until it ends, or ctx does. What it says goes to the log.
func (o *daemon) once(ctx context.Context) error {
	cmd := o.command()
	says := worker.NewLineLog(o.log, "output of a maker's daemon")
	cmd.Stdout, cmd.Stderr = says, says
	cmd.WaitDelay = daemonStop // for what it has started and left behind with its output
	if err := cmd.Start(); err != nil {
		return err
	}
	says.SetPID(cmd.Process.Pid)
	o.tell("")
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	kill := func(signal syscall.Signal) { _ = syscall.Kill(-cmd.Process.Pid, signal) } // its group; gone already is well
	select {
	case err := <-ended:
		kill(syscall.SIGKILL) // what it has left behind
		return err
	case <-ctx.Done():
	}
	kill(syscall.SIGTERM)
	select {
	case err := <-ended:
		kill(syscall.SIGKILL)
		return err
	case <-time.After(daemonStop):
	}
	kill(syscall.SIGKILL)
	return <-ended
}

// daemonOf has the daemon of an installed pack run, if it has one; fill puts the pack's folders for their placeholders.
func (a *Appliance) daemonOf(ctx context.Context, p *pack.Installed, fill *strings.Replacer, env []string) {
	d := p.Daemon
	if d == nil {
		return
	}
	arguments := make([]string, len(d.Arguments))
	for i, arg := range d.Arguments {
		arguments[i] = fill.Replace(arg)
	}
	a.daemons.need(ctx, p, filepath.Join(p.Folder, filepath.FromSlash(d.Program)), fill.Replace(d.Ready), arguments, env, a.log)
}

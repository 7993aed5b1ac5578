// Package worker drives a token in a process of its own. A PKCS#11 module is a vendor's C code: it can crash, and a
// call into it can hang and not be called off, so the process that holds the interfaces and the journal loads none.
//
// [Start] is the parent's end: a [Client] is an hsm.Token that sends each call over a socket pair to the child, where
// [Serve] opens a real token (which one is the caller's choice: this package knows no module) and performs it. Calls
// are told apart by number, so as many are under way as the token has sessions, and a few more wait in the child, so that a
// session that becomes free has its next call at once and not when this process has had its turn. The PIN crosses once per child, in the
// first frame, and stands in no argument and no environment.
//
// # What happens when something fails
//
//   - A call that outlives CallDeadline (KeyGenDeadline for GenerateKey, DestroyKey and Keys), counted from when it has
//     a session: the child is killed (SIGKILL) and the call answers hsm.ErrDeadline. Every other call under way is as if
//     the child had died.
//   - The child dies, or sends what is no answer: calls that may run twice (all but GenerateKey and DestroyKey) are sent
//     once more, to the next child; the others answer hsm.ErrUnavailable, and whether they were performed is not known.
//   - No child is ready: calls wait for RestartWait, at most until their ctx ends, and answer hsm.ErrUnavailable with
//     what happened to the last child. Children are started again, at once after one that worked, then with a pause
//     that doubles from 100 ms to 10 s.
//   - A PIN is refused, at the start or at a later login: the child is ended, none is started again, every call answers
//     hsm.ErrNeedsOperator. The same when a PIN that was never accepted has been presented twice, ten seconds apart,
//     without an answer: a module that crashes in C_Login must not spend the token's tries.
//   - A caller's ctx ends: the caller gets its error; the call keeps its session until it is answered or killed, and
//     Config.Abandoned is told of a signature.
//   - The parent dies: the kernel kills the child (PR_SET_PDEATHSIG), and its end of the stream ends besides.
//
// A child may have an extension ([ServeExtended]), which [Client.Extend] speaks to: what units' keys sign is made there.
//
// Errors cross with what errors.Is and errors.As find in them: *hsm.Error, the sentinels of hsm, context's two.
package worker

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"yinjian/hsm"
	"yinjian/hsm/uselog"
)

// Config says how a child is started and what is expected of it.
type Config struct {
	// Command is the child's program and arguments. It calls Inherited and Serve.
	Command []string
	// Env is the child's environment; nil: the parent's.
	Env    []string
	Class  hsm.SlotClass // what the token's keys are for: no other operation is performed
	Params StartParams   // the PIN is copied; the caller zeroises its own
	// CallDeadline bounds one call from when it has a session; 0: 5 s.
	CallDeadline time.Duration
	// KeyGenDeadline bounds GenerateKey, DestroyKey and Keys; 0: 30 s.
	KeyGenDeadline time.Duration
	// OpenDeadline bounds the time from a child's start until its token is logged in; 0: 30 s.
	OpenDeadline time.Duration
	// RestartWait bounds how long a call waits for a child; 0: 2 s.
	RestartWait time.Duration
	// Abandoned, if set, is given what was signed for a caller that had gone: the answer, and why the caller went. It
	// must not block.
	Abandoned func(answer []byte, reason error)
	// AbandonedExtension, if set, is given an extension's answer likewise.
	AbandonedExtension func(answer []byte, reason error)
	Log                logrus.FieldLogger
}

const (
	firstBackoff = 100 * time.Millisecond
	lastBackoff  = 10 * time.Second
	// settled is how long a child must have worked for the next one to be started without a pause.
	settled = time.Second
	// unprovenLogins is how often a PIN that was never accepted is presented without getting an answer.
	unprovenLogins = 2
	killWait       = 5 * time.Second
)

// unprovenPause is the least time between two such presentations: a cipher machine that is starting up must not use
// up both. A variable for the tests.
var unprovenPause = 10 * time.Second

// A Phase is what a Client is doing.
type Phase string

const (
	Ready         Phase = "ready"
	Restarting    Phase = "restarting"
	NeedsOperator Phase = "needs_operator"
	Closed        Phase = "closed"
)

// State is a Client's health.
type State struct {
	Phase Phase
	// Since is how long the phase has lasted (monotonic).
	Since time.Duration
	// LastError is what ended the last child or start; nil when none has failed.
	LastError error
	// Restarts counts children after the first.
	Restarts int
	// Sessions is how many calls can be under way at once, Ahead how many more wait in the child; PID is the child's. All are 0
	// unless ready.
	Sessions, Ahead, PID int
}

// ahead is how many calls wait in a child of so many sessions: those that are done between two turns of this process.
func ahead(sessions int) int { return min(sessions, 8) }

// A Client is the parent's end: an hsm.Token, safe for concurrent use.
type Client struct {
	cfg  Config // without the PIN; Params.Extension is guarded by mu
	log  logrus.FieldLogger
	stop context.CancelFunc
	done chan struct{} // closed when the supervisor has ended

	mu       sync.Mutex // guards what follows
	pin      []byte     // zeroised at the end; read by the supervisor
	phase    Phase
	since    time.Time // monotonic
	lastErr  error
	latched  error // set for NeedsOperator and Closed
	restarts int
	proc     *process      // the ready child, nil while there is none
	changed  chan struct{} // closed and replaced when phase or proc changes
	latch    chan struct{} // closed when latched is set
	severed  *time.Timer   // ends what Sever began; nil: it is not

	brought broughtKeys // wrapped keys whose blobs the ready child has had
}

var (
	_ hsm.Token      = (*Client)(nil)
	_ hsm.SelfTester = (*Client)(nil)
)

// Start starts the first child and waits for the outcome of its start, OpenDeadline at most.
//
// It fails when the configuration is unusable, when the program cannot be started, and when the PIN is refused
// (hsm.ErrNeedsOperator): nothing is left running then. Where the token cannot be opened for another reason, a cipher
// machine that is away for instance, it succeeds: the Client goes on trying, and State says so.
func Start(cfg Config) (*Client, error) {
	if len(cfg.Command) == 0 || cfg.Log == nil {
		return nil, errors.New("hsm/worker: starting: command and logger are needed")
	}
	if cfg.Params.MaxSessions == 0 {
		cfg.Params.MaxSessions = 16
	}
	cfg.Params.Class = cfg.Class
	if err := cfg.Params.validate(); err != nil {
		return nil, err
	}
	for d, otherwise := range map[*time.Duration]time.Duration{&cfg.CallDeadline: 5 * time.Second,
		&cfg.KeyGenDeadline: 30 * time.Second, &cfg.OpenDeadline: 30 * time.Second, &cfg.RestartWait: 2 * time.Second} {
		if *d == 0 {
			*d = otherwise
		}
		if *d < 0 {
			return nil, errors.New("hsm/worker: starting: negative duration")
		}
	}
	ctx, stop := context.WithCancel(context.Background())
	c := &Client{cfg: cfg, stop: stop, done: make(chan struct{}), pin: bytes.Clone(cfg.Params.PIN), phase: Restarting,
		since: time.Now(), changed: make(chan struct{}), latch: make(chan struct{}), // interval
		log: cfg.Log.WithFields(logrus.Fields{"slot": string(cfg.Class), "token": cfg.Params.TokenLabel})}
	c.cfg.Params.PIN = nil
	first := make(chan error, 1)
	go c.supervise(ctx, first)
	err := <-first
	var cannot *exec.Error
	var path *os.PathError
	if errors.Is(err, hsm.ErrNeedsOperator) || errors.As(err, &cannot) || errors.As(err, &path) {
		c.Close()
		return nil, fmt.Errorf("hsm/worker: starting: %w", err)
	}
	return c, nil
}

// State answers the Client's health.
func (c *Client) State() State {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := State{Phase: c.phase, Since: time.Since(c.since), LastError: c.lastErr, Restarts: c.restarts}
	if c.proc != nil {
		s.Sessions, s.Ahead, s.PID = c.proc.sessions, cap(c.proc.slots)-c.proc.sessions, c.proc.pid
	}
	if c.severed != nil && s.Phase == Ready {
		s.Phase, s.LastError = Restarting, errSevered
	}
	return s
}

var errSevered = errors.New("a drill keeps calls from this machine")

// Sever has no call go to the child for as long as d, as if its machine were away: calls wait as they do for a child that is
// being started, those under way finish. It ends by itself, with Mend, or with the process. It is for drills.
func (c *Client) Sever(d time.Duration) {
	c.Mend()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.severed = time.AfterFunc(d, c.Mend)
}

// Mend ends what [Client.Sever] began.
func (c *Client) Mend() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.severed == nil {
		return
	}
	c.severed.Stop()
	c.severed = nil
	close(c.changed)
	c.changed = make(chan struct{})
}

// Replace has a new child take the present one's place, which finishes what it has; extension is what the new one's is told.
// Calls that come meanwhile wait for it as for any other. When ctx ends first, the present child goes on, and the next one
// is told.
func (c *Client) Replace(ctx context.Context, extension []byte) error {
	if len(extension) > maxExtension {
		return fmt.Errorf("hsm/worker: an extension's parameters of %d bytes, at most %d", len(extension), maxExtension)
	}
	c.mu.Lock()
	c.cfg.Params.Extension = bytes.Clone(extension)
	p := c.proc
	c.mu.Unlock()
	if p == nil {
		return nil // the next is being started
	}
	for taken := range cap(p.slots) {
		select {
		case <-p.slots:
		case <-p.dead:
			return nil
		case <-ctx.Done():
			for range taken {
				p.slots <- struct{}{}
			}
			return fmt.Errorf("hsm/worker: replacing a child: waiting for its calls: %w", context.Cause(ctx))
		}
	}
	p.mu.Lock()
	if p.err == nil {
		p.err = errors.New("it was replaced")
	}
	p.mu.Unlock()
	p.conn.Close()
	return nil
}

// Close ends the child: its stream is closed, and it is killed when that does not end it in two seconds. Calls under
// way answer hsm.ErrUnavailable.
func (c *Client) Close() error {
	c.end(Closed, fmt.Errorf("%w: the worker was closed", hsm.ErrUnavailable))
	c.stop()
	<-c.done
	return nil
}

// end latches the first of NeedsOperator and Closed.
func (c *Client) end(phase Phase, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.latched == nil {
		c.latched = err
		close(c.latch)
		if phase == NeedsOperator {
			c.lastErr = err
			c.log.WithError(err).Error("PIN refused, nothing is tried again until an operator has looked")
		}
	} else if c.phase == Closed || phase != Closed {
		return
	}
	clear(c.pin)
	c.pin = nil
	c.setLocked(phase, nil)
}

func (c *Client) setLocked(phase Phase, p *process) {
	if c.phase != phase {
		c.phase, c.since = phase, time.Now() // interval
	}
	if p != c.proc {
		c.brought.clear()
	}
	c.proc = p
	close(c.changed)
	c.changed = make(chan struct{})
}

// supervise starts children, one after the other, until the Client is latched. first gets the outcome of the first.
//
// It keeps its thread: the kernel delivers PR_SET_PDEATHSIG when the thread that started the child ends.
func (c *Client) supervise(ctx context.Context, first chan<- error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	defer close(c.done)
	accepted, unproven := false, 0
	backoff := time.Duration(0)
	for n := 0; ; n++ {
		p, logins, err := c.startProcess(ctx)
		if err == nil {
			accepted = true
			c.mu.Lock()
			latched := c.latched != nil
			if !latched {
				c.setLocked(Ready, p)
			}
			c.mu.Unlock()
			if n == 0 {
				first <- nil
			}
			ready := time.Now() // interval
			if !latched {
				c.log.WithFields(logrus.Fields{"pid": p.pid, "sessions": p.sessions}).Info("worker ready")
				select {
				case <-p.dead:
				case <-c.latch:
				}
			}
			err = p.shutdown()
			if time.Since(ready) > settled {
				backoff = 0
			}
		} else {
			if !accepted && logins > 0 && !answered(err) {
				unproven += logins
				backoff = max(backoff, unprovenPause)
				if unproven >= unprovenLogins {
					err = fmt.Errorf("%w: C_Login was called %d times and gave no answer; the last: %w", hsm.ErrNeedsOperator, unproven, err)
				}
			}
			if errors.Is(err, hsm.ErrNeedsOperator) {
				c.end(NeedsOperator, err)
			}
			if n == 0 {
				first <- err
			}
		}
		c.mu.Lock()
		if c.latched != nil {
			c.mu.Unlock()
			return
		}
		c.lastErr = err
		c.restarts++
		c.setLocked(Restarting, nil)
		c.mu.Unlock()
		c.log.WithError(err).WithField("retry_ms", backoff.Milliseconds()).Warning("worker ended, starting another")
		select {
		case <-time.After(backoff):
		case <-c.latch:
			return
		}
		backoff = min(max(2*backoff, firstBackoff), lastBackoff)
	}
}

// answered says whether err is a token's own answer to C_Login that is no refusal: the PIN was not judged.
func answered(err error) bool {
	var e *hsm.Error
	return errors.As(err, &e) && e.Call != "C_Login"
}

// A process is one child.
type process struct {
	client *Client
	cmd    *exec.Cmd
	pid    int
	conn   net.Conn
	// slots has a value for each session that is free, and for each call that may wait in the child.
	slots    chan struct{}
	sessions int
	dead     chan struct{} // closed when the stream has ended; err is set before
	reaped   chan struct{} // closed when cmd.Wait has returned

	write sync.Mutex // held while a frame is written

	mu      sync.Mutex // guards what follows
	err     error      // why the stream ended
	next    uint64
	pending map[uint64]*pending
	running int        // calls with a timer
	queued  []*pending // those without, the oldest first
}

// A pending call has been sent, or is being sent.
type pending struct {
	id    uint64
	limit time.Duration
	timer *time.Timer // nil while it waits for a session in the child; guarded by process.mu until the call is taken
	done  chan result // gets exactly one
}

type result struct {
	body []byte
	err  error
	lost bool // the child ended before it answered
}

// Spawn starts cmd with one end of a socket pair as descriptor 3, which [Inherited] answers there, and answers the other
// end. The kernel kills the child when the calling thread ends (PR_SET_PDEATHSIG): the caller keeps it. cmd.Wait is the
// caller's; it does not wait for output that what a module has started holds open.
func Spawn(cmd *exec.Cmd) (net.Conn, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socketpair: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "worker"), os.NewFile(uintptr(fds[1]), "worker")
	defer theirs.Close()
	conn, err := net.FileConn(ours)
	ours.Close()
	if err != nil {
		return nil, fmt.Errorf("worker stream: %w", err)
	}
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = time.Second
	if err := cmd.Start(); err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

// startProcess starts a child and waits until its token is logged in. logins is how often C_Login was announced.
func (c *Client) startProcess(ctx context.Context) (ready *process, logins int, err error) {
	// 1. The process.
	cmd := exec.Command(c.cfg.Command[0], c.cfg.Command[1:]...)
	cmd.Env = c.cfg.Env
	out := NewLineLog(c.log, "worker output")
	cmd.Stdout, cmd.Stderr = out, out
	conn, err := Spawn(cmd)
	if err != nil {
		return nil, 0, err
	}
	p := &process{client: c, cmd: cmd, pid: cmd.Process.Pid, conn: conn, dead: make(chan struct{}),
		reaped: make(chan struct{}), pending: map[uint64]*pending{}}
	out.SetPID(p.pid)
	go func() {
		_ = cmd.Wait()
		close(p.reaped)
	}()
	defer func() {
		if err != nil {
			p.kill()
			p.conn.Close()
			p.reap()
		}
	}()

	// 2. Parameters and PIN.
	quit := context.AfterFunc(ctx, func() { conn.Close() })
	defer quit()
	_ = conn.SetDeadline(time.Now().Add(c.cfg.OpenDeadline)) // interval
	c.mu.Lock()
	params := c.cfg.Params
	if c.latched != nil {
		defer c.mu.Unlock()
		return nil, 0, c.latched // and the PIN is gone: an empty one must not be presented
	}
	params.PIN = c.pin
	frame := startFrame(params)
	c.mu.Unlock()
	_, err = conn.Write(frame)
	clear(frame)
	if err != nil {
		return nil, 0, fmt.Errorf("writing the start frame: %w", err)
	}

	// 3. Its announcements, then its readiness.
	in := bufio.NewReaderSize(conn, 64<<10)
	for {
		k, _, body, err := readFrame(in, maxAnswer)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return nil, logins, fmt.Errorf("%w: opening the token took longer than %v", hsm.ErrDeadline, c.cfg.OpenDeadline)
		}
		if err != nil {
			return nil, logins, fmt.Errorf("worker ended while it opened the token: %w", err)
		}
		s := scanner{b: body}
		switch k {
		case kindLogin:
			logins++
			if err := s.done(); err != nil {
				return nil, logins, err
			}
		case kindFailed:
			failure := s.error()
			if err := s.done(); err != nil {
				return nil, logins, err
			}
			return nil, logins, failure
		case kindReady:
			n := int(s.u32())
			if err := s.done(); err != nil || n < 1 || n > params.MaxSessions {
				return nil, logins, fmt.Errorf("%w: ready with %d sessions", errFrame, n)
			}
			_ = conn.SetDeadline(time.Time{})
			p.sessions, p.slots = n, make(chan struct{}, n+ahead(n))
			for range cap(p.slots) {
				p.slots <- struct{}{}
			}
			go p.read(in)
			return p, logins, nil
		default:
			return nil, logins, fmt.Errorf("%w: kind %#x while opening", errFrame, k)
		}
	}
}

// read owns the reading half until the stream ends, and hands answers to those who wait.
func (p *process) read(in *bufio.Reader) {
	for {
		k, id, body, err := readFrame(in, maxAnswer)
		if err == nil && k == kindLogin && id == 0 && len(body) == 0 {
			continue // the token logs in again
		}
		if err == nil && k != kindResult && k != kindError {
			err = fmt.Errorf("%w: kind %#x", errFrame, k)
		}
		var res result
		if err == nil && k == kindError {
			s := scanner{b: body}
			res.err = s.error()
			err = s.done()
		} else {
			res.body = body
		}
		var call *pending
		if err == nil {
			if call = p.take(id); call == nil {
				err = fmt.Errorf("%w: answer %d to no call", errFrame, id)
			}
		}
		if err != nil {
			if errors.Is(err, errFrame) {
				p.kill()
			}
			p.fail(fmt.Errorf("worker ended: %w", err))
			return
		}
		// A refused PIN latches before anybody hears of it, so that whoever has heard of it finds the door closed.
		if errors.Is(res.err, hsm.ErrNeedsOperator) {
			p.client.end(NeedsOperator, res.err)
		}
		p.settle(call, res)
	}
}

// take answers the call that waits for an answer of this id, nil if none does. It is the taker's to settle.
func (p *process) take(id uint64) *pending {
	p.mu.Lock()
	defer p.mu.Unlock()
	call := p.pending[id]
	delete(p.pending, id)
	switch {
	case call == nil:
	case call.timer == nil: // before its turn, as far as is known here
		p.queued = slices.DeleteFunc(p.queued, func(c *pending) bool { return c == call })
	default:
		p.running--
		p.begin()
	}
	return call
}

// begin counts the time of the oldest calls that wait, for as many as have a session now: the child takes them in the order in
// which they were sent. Should that be another than ours, a hung call is ended all the same, when those before it have gone. The
// caller holds mu.
func (p *process) begin() {
	for p.running < p.sessions && len(p.queued) > 0 {
		call := p.queued[0]
		p.queued = slices.Delete(p.queued, 0, 1)
		p.running++
		call.timer = time.AfterFunc(call.limit, func() { p.expire(call.id, call.limit) })
	}
}

// settle gives a call that was taken its result, and its session back to the others.
func (p *process) settle(call *pending, res result) {
	call.stop()
	p.slots <- struct{}{} // never blocks: the call had taken it
	call.done <- res
}

// stop ends the counting of a call's time. The caller has taken it.
func (call *pending) stop() {
	if call.timer != nil {
		call.timer.Stop()
	}
}

// fail ends the process's calls. The first reason stands.
func (p *process) fail(err error) {
	p.mu.Lock()
	if p.err == nil {
		p.err = err
	}
	err = p.err
	calls := p.pending
	p.pending, p.queued = nil, nil
	p.mu.Unlock()
	select {
	case <-p.dead:
	default:
		close(p.dead) // by the reader alone
	}
	for _, call := range calls {
		call.stop()
		call.done <- result{err: fmt.Errorf("%w: %w", hsm.ErrUnavailable, err), lost: true}
	}
}

// expire kills the child when the call is still under way.
func (p *process) expire(id uint64, after time.Duration) {
	p.mu.Lock()
	call, ok := p.pending[id]
	delete(p.pending, id)
	if ok && p.err == nil {
		p.err = fmt.Errorf("%w: a call took longer than %v", hsm.ErrDeadline, after)
	}
	p.mu.Unlock()
	if !ok {
		return
	}
	p.kill()
	p.conn.Close()
	call.done <- result{err: fmt.Errorf("%w (after %v)", hsm.ErrDeadline, after)}
}

func (p *process) kill() { _ = p.cmd.Process.Kill() }

// shutdown ends the child and answers why it ended. The stream's end asks it to leave; then it is killed.
func (p *process) shutdown() error {
	p.conn.Close()
	<-p.dead
	select {
	case <-p.reaped:
	case <-time.After(closeTimeout):
	}
	p.kill()
	status := p.reap()
	p.mu.Lock()
	defer p.mu.Unlock()
	return fmt.Errorf("%w (%s)", p.err, status)
}

// reap waits for a killed child. One that cannot die (a driver that hangs in the kernel) is left behind.
func (p *process) reap() string {
	select {
	case <-p.reaped:
		return p.cmd.ProcessState.String()
	case <-time.After(killWait):
		p.client.log.WithField("pid", p.pid).Error("killed worker does not end, left behind")
		return "not ended"
	}
}

// send puts one call on the stream; its result comes on the channel. It must hold a session. It answers false when the
// child had ended, and nothing was sent.
func (p *process) send(body []byte, deadline time.Duration) (<-chan result, bool) {
	call := &pending{limit: deadline, done: make(chan result, 1)}
	p.mu.Lock()
	if p.pending == nil {
		p.mu.Unlock()
		return nil, false
	}
	p.next++
	call.id = p.next
	p.pending[call.id] = call
	p.queued = append(p.queued, call)
	p.begin()
	p.mu.Unlock()
	binary.BigEndian.PutUint64(body[5:], call.id)
	p.write.Lock()
	_, err := p.conn.Write(end(body))
	p.write.Unlock()
	if err != nil {
		// The reader sees the end too; a stream that only half works is of no use.
		p.kill()
		p.conn.Close()
	}
	return call.done, true
}

// call performs one call. body is a frame without id and length. again says that it may be sent a second time when
// the child that had it died.
func (c *Client) call(ctx context.Context, body []byte, deadline time.Duration, again bool) (scanner, error) {
	return c.callOr(ctx, body, deadline, again, nil)
}

// callOr is call; abandoned, if not nil, gets the result when ctx ended before it came.
func (c *Client) callOr(ctx context.Context, body []byte, deadline time.Duration, again bool, abandoned func(result)) (scanner, error) {
	sent := 0
	for range 4 {
		p, err := c.ready(ctx)
		if err != nil {
			return scanner{}, err
		}
		select {
		case <-p.slots:
		case <-p.dead:
			continue
		case <-ctx.Done():
			return scanner{}, fmt.Errorf("waiting for a session: %w", context.Cause(ctx))
		}
		done, ok := p.send(body, deadline)
		if !ok {
			continue
		}
		sent++
		var res result
		select {
		case res = <-done:
		case <-ctx.Done():
			select {
			case res = <-done:
			default:
				if abandoned != nil {
					go func() { abandoned(<-done) }() // it comes, or the child is killed
				}
				return scanner{}, fmt.Errorf("waiting for the token: %w", context.Cause(ctx))
			}
		}
		if res.lost && !again {
			return scanner{}, fmt.Errorf("%w: %w", errLost, res.err)
		}
		if !res.lost || sent > 1 {
			return scanner{b: res.body}, res.err
		}
	}
	return scanner{}, fmt.Errorf("%w: workers end as soon as they are started: %w", hsm.ErrUnavailable, c.State().LastError)
}

// errLost means that a call that is not sent twice may have been performed by a child that died with it.
var errLost = errors.New("whether it was performed is not known")

// ready answers the child that takes calls, waiting for one as long as RestartWait and ctx allow.
func (c *Client) ready(ctx context.Context) (*process, error) {
	var late <-chan time.Time
	for {
		c.mu.Lock()
		p, changed, latched, last := c.proc, c.changed, c.latched, c.lastErr
		if c.severed != nil {
			p, last = nil, errSevered
		}
		c.mu.Unlock()
		if latched != nil {
			return nil, latched
		}
		if p != nil {
			select {
			case <-p.dead: // the supervisor has not seen it yet
			default:
				return p, nil
			}
		}
		if late == nil {
			timer := time.NewTimer(c.cfg.RestartWait)
			defer timer.Stop()
			late = timer.C
		}
		select {
		case <-changed:
		case <-late:
			if last == nil {
				return nil, fmt.Errorf("%w: the worker is being started", hsm.ErrUnavailable)
			}
			return nil, fmt.Errorf("%w: the worker is being restarted: %w", hsm.ErrUnavailable, last)
		case <-ctx.Done():
			return nil, fmt.Errorf("%w: the worker is being restarted: %w", hsm.ErrUnavailable, context.Cause(ctx))
		}
	}
}

// finish checks that an answer was read to its end.
func finish(s *scanner, what string, err error) error {
	if err == nil {
		err = s.done()
	}
	if err != nil {
		return fmt.Errorf("hsm/worker: %s: %w", what, err)
	}
	return nil
}

// Info implements hsm.Token.
func (c *Client) Info(ctx context.Context) (hsm.TokenInfo, error) {
	s, err := c.call(ctx, begin(kindInfo, 0), c.cfg.CallDeadline, true)
	var info hsm.TokenInfo
	if err == nil {
		info = s.tokenInfo()
	}
	if err := finish(&s, "token information", err); err != nil {
		return hsm.TokenInfo{}, err
	}
	return info, nil
}

// GenerateKey implements hsm.Token. It is sent once: after an error that is not from the token itself, FindKey says
// whether there is a key.
func (c *Client) GenerateKey(ctx context.Context, spec hsm.KeySpec) (hsm.KeyInfo, error) {
	if len(spec.Label) > maxString || len(spec.ID) > maxString || len(spec.Algorithm) > maxString {
		return hsm.KeyInfo{}, errors.New("hsm/worker: generating a key: specification too long")
	}
	b := addBytes(begin(kindGenerate, 0), spec.Label)
	b = addBytes(b, spec.ID)
	b = addBytes(b, string(spec.Algorithm))
	s, err := c.call(ctx, b, c.cfg.KeyGenDeadline, false)
	return oneKey(s, fmt.Sprintf("generating key %q", spec.Label), err)
}

// FindKey implements hsm.Token.
func (c *Client) FindKey(ctx context.Context, label string) (hsm.KeyInfo, error) {
	if len(label) > maxString {
		return hsm.KeyInfo{}, errors.New("hsm/worker: finding a key: label too long")
	}
	s, err := c.call(ctx, addBytes(begin(kindFind, 0), label), c.cfg.CallDeadline, true)
	return oneKey(s, fmt.Sprintf("finding key %q", label), err)
}

func oneKey(s scanner, what string, err error) (hsm.KeyInfo, error) {
	var info hsm.KeyInfo
	if err == nil {
		info = s.keyInfo()
	}
	if err := finish(&s, what, err); err != nil {
		return hsm.KeyInfo{}, err
	}
	return info, nil
}

// Keys implements hsm.Token.
func (c *Client) Keys(ctx context.Context) ([]hsm.KeyInfo, error) {
	s, err := c.call(ctx, begin(kindKeys, 0), c.cfg.KeyGenDeadline, true)
	var keys []hsm.KeyInfo
	if err == nil {
		for n := s.u32(); n > 0 && !s.bad; n-- {
			keys = append(keys, s.keyInfo())
		}
	}
	if err := finish(&s, "listing keys", err); err != nil {
		return nil, err
	}
	return keys, nil
}

// DestroyKey implements hsm.Token. It is sent once.
func (c *Client) DestroyKey(ctx context.Context, label string) error {
	if len(label) > maxString {
		return errors.New("hsm/worker: destroying a key: label too long")
	}
	s, err := c.call(ctx, addBytes(begin(kindDestroy, 0), label), c.cfg.KeyGenDeadline, false)
	return finish(&s, fmt.Sprintf("destroying key %q", label), err)
}

// Do implements hsm.Token. data is at most 512 KiB. An operation that is not of the token's class is refused here, and
// would be by the child.
func (c *Client) Do(ctx context.Context, label string, op hsm.Operation, data []byte) ([]byte, error) {
	if err := c.cfg.Class.CheckUse(label, op); err != nil {
		return nil, err
	}
	if len(label) > maxString || len(op) > maxString || len(data) > maxData {
		return nil, fmt.Errorf("hsm/worker: %d bytes of data: %w", len(data), &hsm.Error{Call: "C_Sign", RV: 0x21})
	}
	b := addBytes(begin(kindDo, 0), label)
	b = addBytes(b, string(op))
	b = addBytes(b, data)
	return c.sign(ctx, b, label, op)
}

// sign performs the call that body is, of an operation that answers a signature or a MAC.
func (c *Client) sign(ctx context.Context, body []byte, label string, op hsm.Operation) ([]byte, error) {
	var abandoned func(result)
	if c.cfg.Abandoned != nil && uselog.Counted(op) {
		abandoned = func(res result) {
			s := scanner{b: res.body}
			if answer := s.bytes(maxData); res.err == nil && s.done() == nil {
				c.cfg.Abandoned(answer, fmt.Errorf("%s with key %q: the caller had gone: %w", op, label, context.Cause(ctx)))
			}
		}
	}
	s, err := c.callOr(ctx, body, c.cfg.CallDeadline, true, abandoned)
	var out []byte
	if err == nil {
		out = s.bytes(maxData)
	}
	if err := finish(&s, string(op), err); err != nil {
		return nil, err
	}
	return out, nil
}

// Extend has the child's extension answer a request, which request makes: once more when the child died with the first,
// so that no two answers are to the same one. Requests and answers are at most 128 KiB. ctx, deadline and sessions are as
// for Do.
func (c *Client) Extend(ctx context.Context, request func() ([]byte, error)) ([]byte, error) {
	var abandoned func(result)
	if c.cfg.AbandonedExtension != nil {
		abandoned = func(res result) {
			s := scanner{b: res.body}
			if answer := s.bytes(maxExtension); res.err == nil && s.done() == nil {
				c.cfg.AbandonedExtension(answer, fmt.Errorf("the caller had gone: %w", context.Cause(ctx)))
			}
		}
	}
	for last := false; ; last = true {
		r, err := request()
		if err != nil {
			return nil, err
		}
		if len(r) > maxExtension {
			return nil, fmt.Errorf("hsm/worker: a request of %d bytes, at most %d", len(r), maxExtension)
		}
		s, err := c.callOr(ctx, addBytes(begin(kindExtend, 0), r), c.cfg.CallDeadline, false, abandoned)
		if errors.Is(err, errLost) && !last {
			continue
		}
		var out []byte
		if err == nil {
			out = s.bytes(maxExtension)
		}
		if err := finish(&s, "extension", err); err != nil {
			return nil, err
		}
		return out, nil
	}
}

// GenerateWrapped implements hsm.Token. It may be sent twice, for it leaves nothing behind.
func (c *Client) GenerateWrapped(ctx context.Context, spec hsm.KeySpec, kek string) (hsm.KeyInfo, []byte, error) {
	if len(spec.Label) > maxString || len(spec.ID) > maxString || len(spec.Algorithm) > maxString || len(kek) > maxString {
		return hsm.KeyInfo{}, nil, errors.New("hsm/worker: generating a wrapped key: specification too long")
	}
	b := addBytes(begin(kindGenerateWrapped, 0), spec.Label)
	b = addBytes(b, spec.ID)
	b = addBytes(b, string(spec.Algorithm))
	b = addBytes(b, kek)
	s, err := c.call(ctx, b, c.cfg.KeyGenDeadline, true)
	var info hsm.KeyInfo
	var blob []byte
	if err == nil {
		info, blob = s.keyInfo(), bytes.Clone(s.bytes(maxBlob))
	}
	if err := finish(&s, fmt.Sprintf("generating wrapped key %q", spec.Label), err); err != nil {
		return hsm.KeyInfo{}, nil, err
	}
	return info, blob, nil
}

// broughtKeys remembers wrapped keys whose blobs a child has had and probably keeps unwrapped: the last ones, as many as the
// child keeps, and at most as many again.
type broughtKeys struct {
	mu         sync.Mutex // guards what follows
	young, old map[[32]byte]struct{}
}

// use says whether the key was used of late, and remembers it.
func (b *broughtKeys) use(digest [32]byte, most int) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	_, young := b.young[digest]
	_, old := b.old[digest]
	if !young {
		if b.young == nil || len(b.young) >= most {
			b.young, b.old = map[[32]byte]struct{}{}, b.young
		}
		b.young[digest] = struct{}{}
	}
	return young || old
}

func (b *broughtKeys) forget(digest [32]byte) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.young, digest)
	delete(b.old, digest)
}

func (b *broughtKeys) clear() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.young, b.old = nil, nil
}

// DoWrapped implements hsm.Token. The blob crosses only when the child is not likely to have the key unwrapped, or says that
// it has not.
func (c *Client) DoWrapped(ctx context.Context, key *hsm.WrappedKey, op hsm.Operation, data []byte) ([]byte, error) {
	if err := c.cfg.Class.CheckUse("", op); err != nil { // its label is the caller's word
		return nil, err
	}
	if len(key.Label) > maxString || len(key.KEK) > maxString || len(key.Blob) > maxBlob || len(op) > maxString || len(data) > maxData {
		return nil, fmt.Errorf("hsm/worker: %d bytes of data: %w", len(data), &hsm.Error{Call: "C_Sign", RV: 0x21})
	}
	for whole := key.Blob != nil && !c.brought.use(key.Digest(), c.wrappedKeys()); ; whole = true {
		b, err := addWrapped(begin(kindDoWrapped, 0), key, whole)
		if err != nil {
			return nil, err
		}
		b = addBytes(b, string(op))
		b = addBytes(b, data)
		out, err := c.sign(ctx, b, key.Label, op)
		if whole || key.Blob == nil || !errors.Is(err, hsm.ErrNotCached) {
			return out, err
		}
	}
}

// wrappedKeys is how many keys the child keeps unwrapped, or fewer.
func (c *Client) wrappedKeys() int {
	if n := c.cfg.Params.WrappedKeys; n > 0 {
		return n
	}
	return 1024
}

// ForgetWrapped implements hsm.Token.
func (c *Client) ForgetWrapped(ctx context.Context, digest [32]byte) error {
	c.brought.forget(digest)
	s, err := c.call(ctx, append(begin(kindForget, 0), digest[:]...), c.cfg.CallDeadline, true)
	return finish(&s, "forgetting a wrapped key", err)
}

// Random implements hsm.Token.
func (c *Client) Random(ctx context.Context, n int) ([]byte, error) {
	if n < 1 || n > 1024 {
		return nil, fmt.Errorf("hsm/worker: %d random bytes: want 1 to 1024", n)
	}
	s, err := c.call(ctx, binary.BigEndian.AppendUint32(begin(kindRandom, 0), uint32(n)), c.cfg.CallDeadline, true)
	var out []byte
	if err == nil {
		if out = s.bytes(n); len(out) != n {
			s.bad = true
		}
	}
	if err := finish(&s, "random bytes", err); err != nil {
		return nil, err
	}
	return out, nil
}

// SelfTest implements hsm.SelfTester. It may be sent twice, for it leaves nothing behind.
func (c *Client) SelfTest(ctx context.Context) ([]hsm.SelfTest, error) {
	s, err := c.call(ctx, begin(kindSelfTest, 0), c.cfg.KeyGenDeadline, true)
	var answer []byte
	if err == nil {
		answer = s.bytes(maxData)
	}
	if err := finish(&s, "self-test", err); err != nil {
		return nil, err
	}
	var tests []hsm.SelfTest
	if err := json.Unmarshal(answer, &tests); err != nil {
		return nil, fmt.Errorf("hsm/worker: self-test: %w", err)
	}
	return tests, nil
}

// A LineLog logs what a child, or a maker's code in it, prints. Lines are cut at 1 KiB, and no more than 20 come through
// in a second.
type LineLog struct {
	log  logrus.FieldLogger
	what string // the message

	mu     sync.Mutex // guards what follows
	line   []byte
	window time.Time // monotonic
	lines  int
}

var _ io.Writer = (*LineLog)(nil)

// NewLineLog makes one, whose lines are each logged with this message.
func NewLineLog(log logrus.FieldLogger, what string) *LineLog { return &LineLog{log: log, what: what} }

// SetPID has lines say which process prints them.
func (l *LineLog) SetPID(pid int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.log = l.log.WithField("pid", pid)
}

func (l *LineLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, b := range p {
		if b != '\n' {
			if len(l.line) < 1024 {
				l.line = append(l.line, b)
			}
			continue
		}
		if now := time.Now(); now.Sub(l.window) > time.Second { // interval
			l.window, l.lines = now, 0
		}
		if l.lines++; l.lines <= 20 && len(l.line) > 0 {
			l.log.WithField("line", string(l.line)).Info(l.what)
		}
		l.line = l.line[:0]
	}
	return len(p), nil
}

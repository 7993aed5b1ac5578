package softtoken

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
)

const (
	defaultSlots   = 4
	maxSlots       = 64
	maxConnections = 4096
	maxOfProcess   = 2048            // connections of one process; one that leaks sessions leaves room for others
	maxHalfOpen    = 256             // of one process beyond those, which are only told so
	maxHandshakes  = 256             // connections over the network that have not shown who they are; others wait in the kernel
	maxGenerating  = 2               // key pairs that are made at a time; others wait, and signatures have processors
	stopGrace      = 5 * time.Second // for requests that are being served when the daemon stops
)

// ErrWrongPassphrase means that the store does not open with the passphrase of the file, or was changed.
var ErrWrongPassphrase = errors.New("wrong passphrase (or the file was changed)")

// Config says where the software cipher machine keeps its state and how it is reached.
type Config struct {
	// Dir holds state and, by default, the socket. It is made with mode 0700 if it is not there; one that holds
	// state and is open to others is refused.
	Dir string
	// SocketPath is the unix socket, by default Dir/p11.sock; mode 0600; at most 107 bytes.
	SocketPath string
	// Address is an IP:port for modules on other machines, "" is none: TLS 1.3, both sides known by the certificates that
	// are made in Dir. Who has its link-client.pem may use the machine as a process of this user may.
	Address string
	// PassphraseFile holds the passphrase that unseals Dir: 8 to 4096 bytes, closed to group and others. The first
	// Open of an empty Dir seals it with this passphrase.
	PassphraseFile string
	// Slots is how many slots there are, numbered from 0; default 4, at most 64. Each holds one token.
	Slots int
	// Log takes changes of state and refusals; nil: nothing is logged. A PIN or a key is never in it.
	Log logrus.FieldLogger
	// ServiceTime is how long a signature takes at least, to stand for a slower device. Sessions do not wait for one
	// another, so n sessions make at most n ÷ ServiceTime signatures a second.
	ServiceTime time.Duration
	// Impersonate is a vendor's profile (hsm/pkcs11/profiles), by name or file, to which the machine answers instead of
	// its own; its service time holds where ServiceTime is 0. Keys keep the attributes that they were made with.
	Impersonate string
}

// A Server is an open software cipher machine. It listens from [Open] on; connections wait until [Server.Serve].
type Server struct {
	log      logrus.FieldLogger
	profile  *profile
	store    *store
	tokens   []*token
	service  time.Duration
	listener *net.UnixListener
	network  net.Listener  // nil: none
	stopping chan struct{} // closed when Serve is to end
	stopOnce sync.Once
	freeOnce sync.Once
	started  atomic.Bool

	// mu guards what follows.
	mu        sync.Mutex
	apps      map[[16]byte]*application
	peers     map[*peer]struct{}
	processes map[int32]int // connections by pid
	known     int           // connections whose pid is known: all that count

	generating chan struct{} // holds a token for each key pair being made
	handshakes chan struct{} // and for each connection over the network that may be a stranger's
}

// Open unseals the folder, checks every record in it, and binds the socket. It fails if the folder is in use, the
// passphrase is wrong ([ErrWrongPassphrase]), or a record does not open, and then names each of them. The caller must
// call [Server.Serve] or [Server.Close].
func Open(cfg Config) (_ *Server, err error) {
	if cfg.Dir == "" {
		return nil, errors.New("softtoken: no folder is configured")
	}
	if cfg.SocketPath == "" {
		cfg.SocketPath = filepath.Join(cfg.Dir, "p11.sock")
	}
	if cfg.Slots == 0 {
		cfg.Slots = defaultSlots
	}
	if cfg.Slots < 1 || cfg.Slots > maxSlots {
		return nil, fmt.Errorf("softtoken: %d slots, 1 to %d are possible", cfg.Slots, maxSlots)
	}
	if cfg.ServiceTime < 0 {
		return nil, fmt.Errorf("softtoken: service time %v is negative", cfg.ServiceTime)
	}
	if cfg.Log == nil {
		quiet := logrus.New()
		quiet.SetOutput(io.Discard)
		cfg.Log = quiet
	}
	passphrase, err := readPassphrase(cfg.PassphraseFile)
	if err != nil {
		return nil, err
	}
	defer clear(passphrase)
	s := &Server{
		log:      cfg.Log,
		profile:  neutralProfile,
		service:  cfg.ServiceTime,
		stopping: make(chan struct{}),
		apps:     map[[16]byte]*application{},
		peers:    map[*peer]struct{}{},

		processes:  map[int32]int{},
		generating: make(chan struct{}, maxGenerating),
		handshakes: make(chan struct{}, maxHandshakes),
	}
	if cfg.Impersonate != "" && cfg.Impersonate != neutralProfile.name {
		if s.profile, err = impersonate(cfg.Impersonate); err != nil {
			return nil, err
		}
		if s.service == 0 {
			s.service = s.profile.service
		}
	}
	if s.store, err = openStore(cfg.Dir, passphrase); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			s.free()
		}
	}()
	if err := removeTemps(cfg.Dir); err != nil {
		return nil, fmt.Errorf("softtoken: %w", err)
	}
	var bad []error
	for slot := range uint64(cfg.Slots) {
		t, err := loadToken(s.store, slot, cfg.Log)
		if err != nil {
			bad = append(bad, fmt.Errorf("slot %d: %w", slot, err))
			continue
		}
		s.tokens = append(s.tokens, t)
	}
	if len(bad) > 0 {
		return nil, fmt.Errorf("softtoken: the store is refused: %w", errors.Join(bad...))
	}
	if _, err := os.Stat(s.store.slotDir(uint64(cfg.Slots))); err == nil {
		s.log.WithField("slots", cfg.Slots).Warn("the folder has more slots than are configured; they are not served")
	}
	if s.listener, err = listen(cfg.SocketPath); err != nil {
		return nil, err
	}
	if cfg.Address != "" {
		if s.network, err = listenNetwork(s.store, cfg.Address); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// listen binds the socket. A socket file that nobody listens on is what a killed daemon left, and is replaced.
func listen(path string) (*net.UnixListener, error) {
	if len(path) > 107 {
		return nil, fmt.Errorf("softtoken: socket path %s is longer than 107 bytes (sun_path)", path)
	}
	if info, err := os.Lstat(path); err == nil {
		if info.Mode().Type() != fs.ModeSocket {
			return nil, fmt.Errorf("softtoken: %s is there and not a socket", path)
		}
		c, err := net.DialTimeout("unix", path, time.Second)
		if err == nil {
			c.Close()
		}
		// Anything but a refusal may come from somebody who listens and is busy: EAGAIN says that his queue is full.
		if !errors.Is(err, unix.ECONNREFUSED) {
			return nil, fmt.Errorf("softtoken: another process listens on %s", path)
		}
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("softtoken: %w", err)
		}
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("softtoken: %w", err)
	}
	// Whoever connects between bind and chmod is still asked for SO_PEERCRED.
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return nil, fmt.Errorf("softtoken: %w", err)
	}
	return l, nil
}

// Serve serves until ctx ends, then lets requests that are being served finish (up to five seconds), wipes the keys
// and closes the folder. It answers nil after such a stop, and may be called once. It forbids core dumps and tracing
// of the whole process, and locks its memory where that is allowed.
func (s *Server) Serve(ctx context.Context) error {
	if s.started.Swap(true) {
		return errors.New("softtoken: Serve was called before")
	}
	defer s.free()
	harden(s.log)
	s.log.WithFields(logrus.Fields{"socket": s.listener.Addr().String(), "slots": len(s.tokens), "profile": s.profile.name}).
		Warn("software cipher machine started: for evaluation only, not a certified product")
	var peers sync.WaitGroup
	unhook := context.AfterFunc(ctx, s.stop)
	defer unhook()
	listeners := []net.Listener{s.listener}
	if s.network != nil {
		listeners = append(listeners, s.network)
		s.log.WithField("address", s.network.Addr().String()).Warn("it is reached over the network by who has link-client.pem")
	}
	ended := make(chan error, len(listeners))
	for _, l := range listeners {
		go func() { ended <- s.accept(l, &peers) }()
	}
	err := <-ended
	s.stop()
	for range listeners[1:] {
		err = errors.Join(err, <-ended)
	}
	finished := make(chan struct{})
	go func() { peers.Wait(); close(finished) }()
	select {
	case <-finished:
	case <-time.After(stopGrace):
		s.eachPeer(func(p *peer) { p.frames.nc.Close() })
		<-finished
	}
	s.log.Info("software cipher machine stopped")
	return err
}

// Addr is where modules on other machines reach it; nil if they do not.
func (s *Server) Addr() net.Addr {
	if s.network == nil {
		return nil
	}
	return s.network.Addr()
}

// accept takes connections until the listener is closed by stop. Strangers on the network fill no more than maxHandshakes, and
// never the room of those who are known.
func (s *Server) accept(l net.Listener, peers *sync.WaitGroup) error {
	shown := func() {}
	if l == s.network {
		shown = func() { <-s.handshakes }
	}
	for {
		if l == s.network {
			select {
			case s.handshakes <- struct{}{}:
			case <-s.stopping:
				return nil
			}
		}
		nc, err := l.Accept()
		if err == nil {
			p := &peer{srv: s, frames: frameConn{nc: nc}}
			s.mu.Lock()
			s.peers[p] = struct{}{}
			s.mu.Unlock()
			peers.Go(func() { p.run(nc, shown) })
			continue
		}
		shown()
		select {
		case <-s.stopping:
			return nil
		default:
		}
		if !errors.Is(err, unix.EMFILE) && !errors.Is(err, unix.ENFILE) && !errors.Is(err, unix.ENOMEM) && !errors.Is(err, unix.ECONNABORTED) {
			return fmt.Errorf("softtoken: accepting connections: %w", err)
		}
		s.log.WithError(err).Warn("a connection cannot be accepted")
		select {
		case <-time.After(100 * time.Millisecond):
		case <-s.stopping:
			return nil
		}
	}
}

// stop makes accept return, and every connection close once its request is served.
func (s *Server) stop() {
	s.stopOnce.Do(func() {
		close(s.stopping)
		s.listener.Close()
		if s.network != nil {
			s.network.Close()
		}
		s.eachPeer(func(p *peer) { p.frames.nc.SetReadDeadline(time.Unix(1, 0)) })
	})
}

func (s *Server) eachPeer(f func(*peer)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for p := range s.peers {
		f(p)
	}
}

// Close releases what [Open] took if Serve was never called; afterwards it does nothing. To end Serve, end its context.
func (s *Server) Close() error {
	if !s.started.Swap(true) {
		s.stop()
		s.free()
	}
	return nil
}

// free wipes keys and gives the folder back.
func (s *Server) free() {
	s.freeOnce.Do(func() {
		if s.listener != nil {
			s.listener.Close()
		}
		if s.network != nil {
			s.network.Close()
		}
		for _, t := range s.tokens {
			t.close()
		}
		s.store.close()
	})
}

// A peer is one connection of the module.
type peer struct {
	srv     *Server
	frames  frameConn
	pid     int32 // 0: not known yet; guarded by Server.mu
	app     *application
	session *session // set by C_OpenSession
}

func (p *peer) log() logrus.FieldLogger {
	l := p.srv.log.WithField("pid", p.app.pid)
	if p.session != nil {
		l = l.WithField("slot", p.session.slot.token.slot)
	}
	return l
}

// run serves the connection until it ends. shown is called once it is known whose it is.
func (p *peer) run(nc net.Conn, shown func()) {
	s := p.srv
	defer func() {
		nc.Close()
		s.leave(p)
	}()
	cred, err := peerCredentials(nc)
	shown()
	if err != nil {
		s.log.WithError(err).Warn("a peer's credentials cannot be had; refused")
		return
	}
	log := s.log.WithFields(logrus.Fields{"pid": cred.Pid, "uid": cred.Uid})
	if cred.Pid <= 0 && cred.Pid != elsewhere || cred.Uid != 0 && int(cred.Uid) != os.Geteuid() {
		log.Warn("a peer of another user, or not of this process space, was refused")
		return
	}
	s.mu.Lock()
	p.pid = cred.Pid
	s.processes[p.pid]++
	of := s.processes[p.pid]
	s.known++
	crowded := s.known > maxConnections || of > maxOfProcess
	s.mu.Unlock()
	if of == maxOfProcess+1 {
		log.WithField("connections", maxOfProcess).Warn("a process has too many connections; more are refused")
	}
	if of > maxOfProcess+maxHalfOpen {
		return
	}
	id, err := p.frames.hello()
	if err != nil {
		if !errors.Is(err, io.EOF) {
			log.WithError(err).Debug("a connection ended before it began")
		}
		return
	}
	code := ckrSessionCount
	if !crowded {
		code = s.join(p, id, cred)
	}
	if code == ckrFunctionRejected {
		log.Warn("a process presented another process's application id; refused")
	}
	buf := make([]byte, 0, 1024)
	if p.frames.write(finishReply(newReply(buf), code)) != nil || code != ckrOK {
		return
	}
	if err := p.loop(buf); err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
		log.WithError(err).Debug("connection ended")
	}
}

// elsewhere stands in the place of the pid of who comes over the network: all of them are one process, with its limits.
const elsewhere int32 = -1

// peerCredentials are those of the process at the other end, or, over the network, ours: it has proved, within peerTimeout,
// that it has what we gave out.
func peerCredentials(conn net.Conn) (*unix.Ucred, error) {
	if over, ok := conn.(*tls.Conn); ok {
		if err := over.SetDeadline(time.Now().Add(peerTimeout)); err != nil { // interval
			return nil, err
		}
		if err := over.Handshake(); err != nil {
			return nil, err
		}
		return &unix.Ucred{Pid: elsewhere, Uid: uint32(os.Geteuid())}, over.SetDeadline(time.Time{})
	}
	nc, ok := conn.(*net.UnixConn)
	if !ok {
		return nil, fmt.Errorf("softtoken: a connection of type %T", conn)
	}
	raw, err := nc.SyscallConn()
	if err != nil {
		return nil, err
	}
	var cred *unix.Ucred
	var serr error
	if err := raw.Control(func(fd uintptr) {
		cred, serr = unix.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED)
	}); err != nil {
		return nil, err
	}
	return cred, serr
}

// join makes the connection one of the application's.
func (s *Server) join(p *peer, id [16]byte, cred *unix.Ucred) rv {
	s.mu.Lock()
	defer s.mu.Unlock()
	app := s.apps[id]
	if app == nil {
		app = newApplication(id, cred.Pid, cred.Uid, s.tokens)
		s.apps[id] = app
	}
	if app.pid != cred.Pid || app.uid != cred.Uid {
		return ckrFunctionRejected
	}
	app.conns++
	p.app = app
	return ckrOK
}

// leave closes the connection's session and, with an application's last connection, the application.
func (s *Server) leave(p *peer) {
	if p.session != nil {
		p.session.close()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.peers, p)
	if p.pid != 0 {
		s.known--
		if s.processes[p.pid]--; s.processes[p.pid] == 0 {
			delete(s.processes, p.pid)
		}
	}
	if p.app != nil {
		if p.app.conns--; p.app.conns == 0 {
			delete(s.apps, p.app.id)
		}
	}
}

// loop serves one request after the other. An error ends the connection: after a frame that does not parse, what
// follows it means nothing.
func (p *peer) loop(buf []byte) error {
	for {
		select {
		case <-p.srv.stopping:
			return nil
		default:
		}
		frame, err := p.frames.next()
		if err != nil {
			return err
		}
		spec, r, err := parseRequest(frame)
		if err != nil {
			return err
		}
		w := newReply(buf)
		reply := finishReply(w, p.srv.profile.answer(p.serve(spec, &r, w)))
		p.frames.done(len(frame), spec != nil && spec.secret)
		if err := p.frames.write(reply); err != nil {
			return err
		}
		if cap(reply) <= idleBuffer {
			buf = reply // keep the larger buffer
		}
	}
}

// serve does what a request asks.
func (p *peer) serve(spec *callSpec, r *request, w *builder) rv {
	if spec == nil || p.srv.profile.lacks(spec.name) {
		return ckrFunctionNotSupported
	}
	if !spec.session {
		return spec.serve(p, r, w)
	}
	if p.session == nil {
		return ckrSessionHandleInvalid
	}
	p.session.mu.Lock()
	defer p.session.mu.Unlock()
	if p.session.closed {
		return ckrSessionHandleInvalid
	}
	return spec.serve(p, r, w)
}

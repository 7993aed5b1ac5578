package worker

import (
	"bufio"
	"cmp"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"yinjian/hsm"
	"yinjian/hsm/uselog"
)

// inheritedFD is the child's end of the stream.
const inheritedFD = 3

// closeTimeout is how long a child waits for calls and its token when the parent has gone. A hung module must not
// keep the process.
const closeTimeout = 2 * time.Second

// Inherited answers the stream that [Start] gave to this process, for [Serve].
func Inherited() (io.ReadWriteCloser, error) {
	f := os.NewFile(inheritedFD, "worker stream")
	if f == nil {
		return nil, errors.New("hsm/worker: no stream was inherited; this program is started by its parent")
	}
	defer f.Close()
	// FileConn's duplicate is close-on-exec: what a vendor's module starts must not hold the stream.
	conn, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("hsm/worker: inherited stream: %w", err)
	}
	if _, ok := conn.(*net.UnixConn); !ok {
		conn.Close()
		return nil, errors.New("hsm/worker: inherited stream is not a unix socket")
	}
	return conn, nil
}

// Serve is the whole work of a child process: it reads the start parameters from conn, opens the token, and answers
// calls until conn ends, a frame is malformed, or ctx is done. Its caller should then leave the process, for a module
// may hang in calls that cannot be ended otherwise; Serve itself waits two seconds for them at most.
//
// It makes the process undumpable: no core file and no ptrace by others, since the PIN and key handles are in its
// memory. That holds for the whole process.
//
// open gets the parameters with BeforeLogin set, and is called once: an error is told to the parent, and Serve
// returns it.
func Serve(ctx context.Context, conn io.ReadWriteCloser, open func(context.Context, StartParams) (hsm.Token, error)) error {
	return ServeExtended(ctx, conn, open, nil)
}

// An Extension does in the child what its parent must not be able to: it makes what keys sign, and is not handed it.
type Extension interface {
	// Extend answers a request of [Client.Extend]; both are at most 128 KiB. As many run at once as come.
	Extend(ctx context.Context, request []byte) ([]byte, error)
	// Close is called once, when no call is under way or none is waited for any longer.
	Close()
}

// ServeExtended is Serve with an extension, which extend makes when the token is open; a nil one is none. The extension
// signs with the token it is given, whose signatures are counted like all others, and is not bound by what
// hsm.SlotClass.CheckUse refuses to callers.
func ServeExtended(ctx context.Context, conn io.ReadWriteCloser, open func(context.Context, StartParams) (hsm.Token, error),
	extend func(ctx context.Context, token hsm.Token, p StartParams) (Extension, error)) error {
	if err := Undumpable(); err != nil {
		conn.Close()
		return err
	}
	return serve(ctx, conn, open, extend)
}

// Undumpable makes this process leave no core file and be nobody's to trace: a PIN is in its memory.
func Undumpable() error {
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("hsm/worker: core limit: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("hsm/worker: PR_SET_DUMPABLE: %w", err)
	}
	return nil
}

// A server is the child's end.
type server struct {
	conn  io.ReadWriteCloser
	class hsm.SlotClass
	token hsm.Token
	uses  *uselog.Log // nil: signatures are not counted
	more  Extension   // nil: there is none
	write sync.Mutex  // held while a frame is written
}

// A counted token is the child's own use of its token: signatures are recorded as those for callers are.
type counted struct {
	hsm.Token
	s *server
}

func (c counted) Do(ctx context.Context, label string, op hsm.Operation, data []byte) ([]byte, error) {
	answer, err := c.Token.Do(ctx, label, op, data)
	if err = c.s.record(label, op, data, answer, err); err != nil {
		return nil, err
	}
	return answer, nil
}

func serve(ctx context.Context, conn io.ReadWriteCloser, open func(context.Context, StartParams) (hsm.Token, error),
	extend func(ctx context.Context, token hsm.Token, p StartParams) (Extension, error)) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	defer conn.Close()
	s := &server{conn: conn}

	// 1. Parameters and PIN, once, unbuffered: no copy of the PIN stays in a buffer.
	k, _, body, err := readFrame(conn, maxRequest)
	if err != nil {
		return fmt.Errorf("hsm/worker: reading the start frame: %w", err)
	}
	defer clear(body)
	if k != kindStart {
		return fmt.Errorf("%w: kind %#x, want the start", errFrame, k)
	}
	params, err := parseStart(body)
	if err != nil {
		return err
	}
	s.class = params.Class
	params.BeforeLogin = func() { _ = s.send(end(begin(kindLogin, 0))) }

	// 2. The log of uses, before the PIN is spent, and the token.
	if params.Uses.Dir != "" {
		if s.uses, err = uselog.Open(params.Uses.Dir, cmp.Or(params.Uses.Slot, string(params.Class)), params.Uses.Life); err != nil {
			_ = s.send(end(addError(begin(kindFailed, 0), err)))
			return err
		}
		defer s.uses.Close()
	}
	s.token, err = open(ctx, params)
	clear(body)
	runtime.KeepAlive(&body)
	if err != nil {
		_ = s.send(end(addError(begin(kindFailed, 0), err)))
		return err
	}
	if extend != nil {
		params.PIN = nil
		if s.more, err = extend(ctx, counted{s.token, s}, params); err != nil {
			_ = s.send(end(addError(begin(kindFailed, 0), err)))
			return errors.Join(err, s.token.Close())
		}
	}
	sessions := params.MaxSessions
	if t, ok := s.token.(interface{ Sessions() int }); ok {
		sessions = min(sessions, max(t.Sessions(), 1))
	}
	if err := s.send(end(binary.BigEndian.AppendUint32(begin(kindReady, 0), uint32(sessions)))); err != nil {
		return errors.Join(err, s.close())
	}

	// 3. Calls, as many at once as there are sessions; what the parent sends beyond that waits in the stream, and is there when a
	// session is free. A goroutine that has performed one takes the next, for what a call costs most here is that a new
	// goroutine's stack grows.
	var calls sync.WaitGroup
	in := bufio.NewReaderSize(conn, 64<<10)
	waiting := make(chan request)
	for running := 0; ; {
		k, id, body, err := readFrame(in, maxRequest)
		if err == nil && (k < kindInfo || k > kindSelfTest) {
			err = fmt.Errorf("%w: kind %#x", errFrame, k)
		}
		if err != nil {
			cancel()
			close(waiting)
			idle := make(chan error, 1)
			go func() {
				calls.Wait()
				idle <- s.close()
			}()
			select {
			case cerr := <-idle:
				if errors.Is(err, io.EOF) {
					return cerr
				}
			case <-time.After(closeTimeout):
			}
			return fmt.Errorf("hsm/worker: reading a call: %w", err)
		}
		next := request{k, id, body}
		if running < sessions {
			select {
			case waiting <- next:
			default:
				running++
				calls.Go(func() { s.perform(ctx, next, waiting) })
			}
			continue
		}
		waiting <- next
	}
}

func (s *server) close() error {
	if s.more != nil {
		s.more.Close()
	}
	return s.token.Close()
}

// A request is one call, as it came.
type request struct {
	kind kind
	id   uint64
	body []byte
}

// perform answers first, and then what is waiting.
func (s *server) perform(ctx context.Context, first request, waiting <-chan request) {
	for r, ok := first, true; ok; r, ok = <-waiting {
		if err := s.send(s.answer(ctx, r.kind, r.id, r.body)); err != nil {
			// The reader will see it too.
			s.conn.Close()
		}
	}
}

func (s *server) send(frame []byte) error {
	s.write.Lock()
	defer s.write.Unlock()
	_, err := s.conn.Write(frame)
	return err
}

// answer performs one call and encodes what came out. A body that does not fit its kind is answered as an error: the
// parent is at fault, and no other call suffers.
func (s *server) answer(ctx context.Context, k kind, id uint64, body []byte) []byte {
	out, err := s.call(ctx, k, begin(kindResult, id), scanner{b: body})
	if err == nil && len(out)-headerSize > maxAnswer {
		err = fmt.Errorf("hsm/worker: an answer of %d bytes, at most %d", len(out), maxAnswer)
	}
	if ctx.Err() != nil && errors.Is(err, ctx.Err()) {
		// A caller knows no context but its own: what gave up because this process ends is for another worker.
		err = fmt.Errorf("%w: the worker is ending: %v", hsm.ErrUnavailable, err)
	}
	if err != nil {
		out = addError(begin(kindError, id), err)
	}
	return end(out)
}

func (s *server) call(ctx context.Context, k kind, out []byte, in scanner) ([]byte, error) {
	switch k {
	case kindInfo:
		if err := in.done(); err != nil {
			return nil, err
		}
		info, err := s.token.Info(ctx)
		return addTokenInfo(out, info), err
	case kindGenerate:
		spec := hsm.KeySpec{Label: in.string(), ID: in.bytes(maxString), Algorithm: hsm.Algorithm(in.string())}
		if err := in.done(); err != nil {
			return nil, err
		}
		info, err := s.token.GenerateKey(ctx, spec)
		if err != nil {
			return nil, err
		}
		return addKeyInfo(out, info)
	case kindFind:
		label := in.string()
		if err := in.done(); err != nil {
			return nil, err
		}
		info, err := s.token.FindKey(ctx, label)
		if err != nil {
			return nil, err
		}
		return addKeyInfo(out, info)
	case kindKeys:
		if err := in.done(); err != nil {
			return nil, err
		}
		keys, err := s.token.Keys(ctx)
		if err != nil {
			return nil, err
		}
		out = binary.BigEndian.AppendUint32(out, uint32(len(keys)))
		for _, info := range keys {
			if out, err = addKeyInfo(out, info); err != nil {
				return nil, err
			}
		}
		return out, nil
	case kindDestroy:
		label := in.string()
		if err := in.done(); err != nil {
			return nil, err
		}
		return out, s.token.DestroyKey(ctx, label)
	case kindDo:
		label, op, data := in.string(), hsm.Operation(in.string()), in.bytes(maxData)
		if err := in.done(); err != nil {
			return nil, err
		}
		if err := s.class.CheckUse(label, op); err != nil {
			return nil, err
		}
		answer, err := s.token.Do(ctx, label, op, data)
		return s.signed(out, label, op, data, answer, err)
	case kindGenerateWrapped:
		spec := hsm.KeySpec{Label: in.string(), ID: in.bytes(maxString), Algorithm: hsm.Algorithm(in.string())}
		kek := in.string()
		if err := in.done(); err != nil {
			return nil, err
		}
		info, blob, err := s.token.GenerateWrapped(ctx, spec, kek)
		if err != nil {
			return nil, err
		}
		if out, err = addKeyInfo(out, info); err != nil {
			return nil, err
		}
		return addBytes(out, blob), nil
	case kindDoWrapped:
		key, op, data := in.wrapped(), hsm.Operation(in.string()), in.bytes(maxData)
		if err := in.done(); err != nil {
			return nil, err
		}
		if err := s.class.CheckUse("", op); err != nil { // its label is the caller's word
			return nil, err
		}
		answer, err := s.token.DoWrapped(ctx, key, op, data)
		return s.signed(out, key.Label, op, data, answer, err)
	case kindForget:
		var digest [32]byte
		copy(digest[:], in.take(len(digest)))
		if err := in.done(); err != nil {
			return nil, err
		}
		return out, s.token.ForgetWrapped(ctx, digest)
	case kindRandom:
		n := in.u32()
		if err := in.done(); err != nil {
			return nil, err
		}
		answer, err := s.token.Random(ctx, int(n))
		return addBytes(out, answer), err
	case kindExtend:
		request := in.bytes(maxExtension)
		if err := in.done(); err != nil {
			return nil, err
		}
		if s.more == nil {
			return nil, errors.New("hsm/worker: this worker has no extension")
		}
		answer, err := s.more.Extend(ctx, request)
		if err == nil && len(answer) > maxExtension {
			err = fmt.Errorf("hsm/worker: an answer of %d bytes, at most %d", len(answer), maxExtension)
		}
		return addBytes(out, answer), err
	case kindSelfTest:
		if err := in.done(); err != nil {
			return nil, err
		}
		token, ok := s.token.(hsm.SelfTester)
		if !ok {
			return nil, errors.New("hsm/worker: this worker's token has no self-test")
		}
		tests, err := token.SelfTest(ctx)
		if err != nil {
			return nil, err
		}
		answer, err := json.Marshal(tests)
		return addBytes(out, answer), err
	}
	return nil, fmt.Errorf("%w: kind %#x", errFrame, k)
}

// signed records a use and adds the answer to out.
func (s *server) signed(out []byte, label string, op hsm.Operation, data, answer []byte, err error) ([]byte, error) {
	if err = s.record(label, op, data, answer, err); err != nil {
		return nil, err
	}
	return addBytes(out, answer), nil
}

// record records a use, if there was one.
func (s *server) record(label string, op hsm.Operation, data, answer []byte, err error) error {
	if err == nil && s.uses != nil && uselog.Counted(op) {
		// Stopping is meant: a signature that nothing accounts for is not handed out.
		if uerr := s.uses.Add(label, op, data, answer); uerr != nil {
			return fmt.Errorf("hsm/worker: the signature was withheld, its use cannot be recorded: %w: %w", hsm.ErrUnavailable, uerr)
		}
	}
	return err
}

package worker

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"net"
	"os/exec"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"yinjian/hsm"
)

// SetUnprovenPause shortens the pause between presentations of a PIN that was never accepted.
func SetUnprovenPause(d time.Duration) { unprovenPause = d }

// ServeUnhardened is Serve without what concerns the whole process, for a child end within the test's process.
func ServeUnhardened(ctx context.Context, conn io.ReadWriteCloser, open func(context.Context, StartParams) (hsm.Token, error)) error {
	return serve(ctx, conn, open, nil)
}

// ServeExtendedUnhardened is ServeExtended, likewise.
func ServeExtendedUnhardened(ctx context.Context, conn io.ReadWriteCloser, open func(context.Context, StartParams) (hsm.Token, error),
	extend func(ctx context.Context, token hsm.Token, p StartParams) (Extension, error)) error {
	return serve(ctx, conn, open, extend)
}

// StartFrame is the first frame.
func StartFrame(p StartParams) []byte { return startFrame(p) }

// DoFrame is a call of Do.
func DoFrame(id uint64, label string, op hsm.Operation, data []byte) []byte {
	b := addBytes(begin(kindDo, id), label)
	b = addBytes(b, string(op))
	return end(addBytes(b, data))
}

// AnswerDo is what a child with a token of staff says to a call of Do.
func AnswerDo(ctx context.Context, token hsm.Token, label string, op hsm.Operation) (uint8, error) {
	s := &server{class: hsm.Staff, token: token}
	k, _, body, err := readFrame(bytes.NewReader(s.answer(ctx, kindDo, 1, DoFrame(1, label, op, nil)[headerSize:])), maxRequest)
	if err != nil || k != kindError {
		return uint8(k), err
	}
	in := scanner{b: body}
	return uint8(k), in.error()
}

// Frame is any frame.
func Frame(k uint8, id uint64, body []byte) []byte { return end(append(begin(kind(k), id), body...)) }

// ReadFrame reads one.
func ReadFrame(r io.Reader, most int) (uint8, uint64, []byte, error) {
	k, id, body, err := readFrame(r, most)
	return uint8(k), id, body, err
}

const (
	KindStart, KindInfo, KindDo, KindRandom         = uint8(kindStart), uint8(kindInfo), uint8(kindDo), uint8(kindRandom)
	KindSelfTest                                    = uint8(kindSelfTest)
	KindReady, KindFailed, KindResult, KindErrorful = uint8(kindReady), uint8(kindFailed), uint8(kindResult), uint8(kindError)
	MaxRequest                                      = maxRequest
)

// ParseBody takes a body apart as what the first byte says and puts it together again.
func ParseBody(b []byte) (again []byte, err error) {
	if len(b) == 0 {
		return nil, errFrame
	}
	s := scanner{b: b[1:]}
	out := []byte{b[0]}
	switch b[0] {
	case 0:
		k := s.keyInfo()
		if err := s.done(); err != nil {
			return nil, err
		}
		return addKeyInfo(out, k)
	case 1:
		t := s.tokenInfo()
		if err := s.done(); err != nil {
			return nil, err
		}
		return addTokenInfo(out, t), nil
	case 2:
		e := s.error()
		if err := s.done(); err != nil {
			return nil, err
		}
		return addError(out, e), nil
	default:
		p, err := parseStart(b[1:])
		if err != nil {
			return nil, err
		}
		return append(out, startFrame(p)[headerSize:]...), nil
	}
}

// EncodeError and DecodeError are the two ends of an error's way.
func EncodeError(err error) []byte { return addError([]byte{2}, err) }

func DecodeError(b []byte) (error, error) {
	s := scanner{b: b[1:]}
	e := s.error()
	return e, s.done()
}

// EncodeKeyInfo is a body for ParseBody.
func EncodeKeyInfo(k hsm.KeyInfo) ([]byte, error) { return addKeyInfo([]byte{0}, k) }

// EncodeTokenInfo is a body for ParseBody.
func EncodeTokenInfo(t hsm.TokenInfo) []byte { return addTokenInfo([]byte{1}, t) }

// reaped is a child that has ended: killing it does nothing.
var reaped = sync.OnceValue(func() *exec.Cmd {
	cmd := exec.Command("true")
	if err := cmd.Run(); err != nil {
		panic(err)
	}
	return cmd
})

// ReadAnswers has the parent's end read a stream while calls 1 to n are under way, and answers what came of each: true
// for an answer of the child's, false for a call that was lost. It panics when a call has no result or two, or its session
// is not where it belongs.
func ReadAnswers(stream []byte, n int) []bool {
	log := logrus.New()
	log.SetOutput(io.Discard)
	conn, other := net.Pipe()
	other.Close()
	p := &process{cmd: reaped(), conn: conn, slots: make(chan struct{}, n), sessions: n, running: n, dead: make(chan struct{}), pending: map[uint64]*pending{},
		client: &Client{log: log, phase: Ready, changed: make(chan struct{}), latch: make(chan struct{})}}
	calls := make([]*pending, n)
	for i := range calls {
		calls[i] = &pending{timer: time.NewTimer(time.Hour), done: make(chan result, 2)}
		p.pending[uint64(i+1)] = calls[i]
	}
	p.read(bufio.NewReader(bytes.NewReader(stream)))
	<-p.dead
	out, back := make([]bool, n), 0
	for i, call := range calls {
		if len(call.done) != 1 {
			panic("a call has no result, or two")
		}
		if out[i] = !(<-call.done).lost; out[i] {
			back++
		}
	}
	if len(p.slots) != back {
		panic("a session was lost, or came twice")
	}
	return out
}

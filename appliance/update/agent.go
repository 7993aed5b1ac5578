package update

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"yinjian/appliance/problem"
)

// The appliance may not write to disks. An agent, a process of its own that may do nothing else, does it on its behalf behind a
// Unix socket that the appliance's user alone may open, and judges every bundle itself: who has taken the appliance over can
// have the agent install what the release key signed, newer than what runs, and nothing more.
//
// A connection is one question. The caller sends a line of JSON; with "stage" the bundle follows, to the end of the caller's
// half. The agent answers a line of JSON.

// A question is the first line.
type question struct {
	Do  string `json:"do"` // status, stage, commit, cancel, restart, good
	SM3 string `json:"sm3,omitempty"`
}

// A reply is the answer's line; one of its members is set.
type reply struct {
	Status  *Status  `json:"status,omitempty"`
	Offer   *Offer   `json:"offer,omitempty"`
	Floor   *uint64  `json:"floor,omitempty"`
	Refused *refusal `json:"refused,omitempty"`
	Failed  string   `json:"failed,omitempty"` // what is no refusal; for the log
}

// A refusal is a *problem.Problem on the way.
type refusal struct {
	Code   problem.Code `json:"code"`
	Detail string       `json:"detail"`
	Next   string       `json:"next"`
	Field  string       `json:"field,omitempty"`
}

const (
	// agentPatience is how long either side waits for the next bytes.
	agentPatience = time.Minute
	// agentAtOnce are questions under way, and agentUploads those of them that bring something: whoever sends slowly leaves room for
	// the others.
	agentAtOnce  = 4
	agentUploads = 2
	maxAgentLine = 256 << 10
)

// Hooks are what an agent's surroundings do for it.
type Hooks struct {
	// Keep has a floor on the disk when it returns; the next run begins with it.
	Keep func(floor uint64) error
	// Least has it on the disk when it returns that no image below the floor is to start any more: one that is good is there.
	Least func(floor uint64) error
	// Want has it on the disk when it returns that the image of that index brings a floor once it is good; the next run finds it in
	// [Config].
	Want func(index, floor uint64) error
	// Trial has it on the disk when it returns that an image waits to prove itself, or that none does: whoever restarts a machine
	// that does not come to that looks there. It is called before the image may start, and when it may not any more or is good.
	Trial func(waits bool) error
	// Restart has the machine restarted, soon, and does not wait for that.
	Restart func() error
	// Mount makes the EFI system partition appear at its folder while a question is answered, and is asked to undo that; nil: it is
	// there. It is called by one goroutine at a time.
	Mount func() (unmount func() error, err error)
}

// Serve answers questions until ctx ends, which closes ln. MarkGood is among them: the appliance asks it when it has signed with
// its own keys.
func Serve(ctx context.Context, ln net.Listener, u *Updater, hooks Hooks) error {
	m, up := &mounts{hook: hooks.Mount}, make(uploads, agentUploads)
	return accept(ctx, ln, func(conn net.Conn) { answerOne(ctx, conn, u, m, up, hooks) })
}

// uploads has a place for each that is under way.
type uploads chan struct{}

// take has its place until done is called, or refuses.
func (u uploads) take() (done func(), err error) {
	select {
	case u <- struct{}{}:
		return func() { <-u }, nil
	default:
		return nil, wrongState("已有上传正在进行 (others are being uploaded)", "请稍后重试 (try again later)")
	}
}

// accept has answer answer each connection, until ctx ends.
func accept(ctx context.Context, ln net.Listener, answer func(net.Conn)) error {
	defer context.AfterFunc(ctx, func() { ln.Close() })()
	slots := make(chan struct{}, agentAtOnce)
	for {
		conn, err := ln.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			conn.Close()
			return nil
		}
		go func() {
			defer func() { <-slots }()
			defer conn.Close()
			answer(conn)
		}()
	}
}

// mounts counts those who need the EFI system partition.
type mounts struct {
	hook func() (func() error, error)

	mu   sync.Mutex
	used int          // guarded by mu
	undo func() error // guarded by mu
}

func (m *mounts) take() (err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.used == 0 && m.hook != nil {
		m.undo, err = m.hook()
	}
	if err == nil {
		m.used++
	}
	return err
}

func (m *mounts) give() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.used--; m.used > 0 || m.undo == nil {
		return nil
	}
	return m.undo()
}

func answerOne(ctx context.Context, conn net.Conn, u *Updater, m *mounts, up uploads, hooks Hooks) {
	in := bufio.NewReaderSize(patient{conn}, 64<<10)
	var r reply
	err := func() (err error) {
		line, err := readLine(in)
		if err != nil {
			return err
		}
		if err := m.take(); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, m.give()) }()
		var q question
		if err := strict(line, &q); err != nil {
			return err
		}
		switch q.Do {
		case "status":
			r.Status, err = u.Status()
		case "stage":
			var done func()
			if done, err = up.take(); err == nil {
				defer done()
				r.Offer, err = u.Stage(ctx, in)
			}
		case "commit":
			r.Offer, err = u.Commit(q.SM3, func(o *Offer) error {
				if err := hooks.Want(o.Index, o.Manifest.Floor); err != nil {
					return err
				}
				return hooks.Trial(true)
			})
		case "cancel":
			if r.Offer, err = u.Cancel(q.SM3); err == nil {
				err = hooks.Trial(false)
			}
		case "restart":
			if r.Offer, err = u.committed(); err == nil {
				err = hooks.Restart()
			}
		case "good":
			var floor uint64
			if floor, err = u.MarkGood(hooks.Keep); err == nil {
				err = errors.Join(hooks.Least(floor), u.settle(hooks.Trial))
			}
			r.Floor = &floor
		default:
			err = fmt.Errorf("update: agent: nothing is called %q", q.Do)
		}
		return err
	}()
	if err != nil {
		r = reply{}
		r.Refused, r.Failed = told(err)
	}
	say(conn, r)
}

// told is an error on the way: a refusal, or what is none.
func told(err error) (*refusal, string) {
	var p *problem.Problem
	if errors.As(err, &p) {
		return &refusal{p.Code, p.Detail, p.Next, p.Field}, ""
	}
	return nil, err.Error()
}

func say(conn net.Conn, answer any) {
	out, err := json.Marshal(answer)
	if err != nil {
		return
	}
	_, _ = patient{conn}.Write(append(out, '\n')) // the caller has gone: it asks again
}

// patient gives each read and write its time.
type patient struct{ net.Conn }

func (p patient) Read(b []byte) (int, error) {
	if err := p.SetReadDeadline(time.Now().Add(agentPatience)); err != nil { // interval
		return 0, err
	}
	return p.Conn.Read(b)
}

func (p patient) Write(b []byte) (int, error) {
	if err := p.SetWriteDeadline(time.Now().Add(agentPatience)); err != nil { // interval
		return 0, err
	}
	return p.Conn.Write(b)
}

// readLine reads up to a line feed, which is not part of it.
func readLine(in *bufio.Reader) ([]byte, error) {
	var line []byte
	for {
		part, err := in.ReadSlice('\n')
		line = append(line, part...)
		switch {
		case len(line) > maxAgentLine:
			return nil, errors.New("update: agent: a line without end")
		case err == nil:
			return line[:len(line)-1], nil
		case !errors.Is(err, bufio.ErrBufferFull):
			return nil, err
		}
	}
}

// A Client asks the agent behind a socket. Safe for concurrent use. Refusals are *problem.Problem; [ErrNoAgent] where there is
// none, as on a server that is no sealed appliance.
type Client struct{ Socket string }

// ErrNoAgent says that this system has no image that could be replaced.
var ErrNoAgent = errors.New("update: no agent answers")

func (c *Client) Status(ctx context.Context) (*Status, error) {
	r, err := c.ask(ctx, question{Do: "status"}, nil)
	return r.Status, err
}

// Stage sends a bundle.
func (c *Client) Stage(ctx context.Context, bundle io.Reader) (*Offer, error) {
	r, err := c.ask(ctx, question{Do: "stage"}, bundle)
	return r.Offer, err
}

// Commit publishes the bundle whose manifest has that SM3.
func (c *Client) Commit(ctx context.Context, sm3 string) (*Offer, error) {
	r, err := c.ask(ctx, question{Do: "commit", SM3: sm3}, nil)
	return r.Offer, err
}

// Cancel takes back the bundle whose manifest has that SM3, "" for whatever waits; see [Updater.Cancel].
func (c *Client) Cancel(ctx context.Context, sm3 string) (*Offer, error) {
	r, err := c.ask(ctx, question{Do: "cancel", SM3: sm3}, nil)
	return r.Offer, err
}

// Restart has the machine restarted into what was committed.
func (c *Client) Restart(ctx context.Context) (*Offer, error) {
	r, err := c.ask(ctx, question{Do: "restart"}, nil)
	return r.Offer, err
}

// MarkGood says that the running image has proved itself. Where it had before, it ends what an agent that died in the middle left.
func (c *Client) MarkGood(ctx context.Context) error {
	_, err := c.ask(ctx, question{Do: "good"}, nil)
	return err
}

func (c *Client) ask(ctx context.Context, q question, bundle io.Reader) (reply, error) {
	var r reply
	sent, err := exchange(ctx, c.Socket, q, bundle, &r)
	if err == nil {
		err = unwrap(r.Refused, r.Failed)
	}
	if err != nil {
		return reply{}, err
	}
	return r, sent
}

// unwrap is what told was given.
func unwrap(refused *refusal, failed string) error {
	switch {
	case refused != nil:
		return &problem.Problem{Code: refused.Code, Detail: refused.Detail, Next: refused.Next, Field: refused.Field}
	case failed != "":
		return errors.New(failed)
	}
	return nil
}

// exchange sends a question, and body if it is not nil, and reads the answer into r. sent is why not all of the body could be
// sent: where the answer is no refusal, it counts.
func exchange(ctx context.Context, socket string, q any, body io.Reader, r any) (sent, err error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoAgent, err)
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	line, err := json.Marshal(q)
	if err != nil {
		return nil, err
	}
	_, err = patient{conn}.Write(append(line, '\n'))
	// The agent answers a bundle that it refuses before it has read it; then writing on fails, and the answer counts.
	if err == nil && body != nil {
		from := &source{r: body}
		_, sent = io.CopyBuffer(onlyWriter{patient{conn}}, from, make([]byte, 256<<10))
		err = from.err
	}
	if u, ok := conn.(*net.UnixConn); ok && err == nil && sent == nil {
		err = u.CloseWrite()
	}
	if err != nil {
		return nil, err
	}
	answer, err := readLine(bufio.NewReader(patient{conn}))
	if err != nil {
		return nil, errors.Join(sent, err)
	}
	if err := strict(answer, r); err != nil {
		return nil, fmt.Errorf("update: the agent's answer: %w", err)
	}
	return sent, nil
}

// source remembers why there is no more of it.
type source struct {
	r   io.Reader
	err error
}

func (s *source) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		s.err = err
	}
	return n, err
}

// onlyWriter hides what io.Copy would use instead of Write, which has the deadlines.
type onlyWriter struct{ io.Writer }

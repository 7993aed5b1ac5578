// Package probe learns what a cipher machine can do, and says it to people and programs: `yinjian hsm probe`.
//
// The module is a vendor's C code that may crash or hang, so [Run] drives it in a process of its own ([Serve] is that
// process's whole work), which announces each call before it makes it. A child that dies crashed in the call announced
// last; one that is silent for longer than the deadline is killed, and did not return from it. What was known by then
// stands in the report, what was not checked is named, and no second child is started: it would have to present the PIN
// again.
package probe

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"sync"
	"syscall"
	"time"

	"yinjian/hsm/pkcs11"
	"yinjian/hsm/worker"
)

// Config says what is probed and how.
type Config struct {
	// Command is the child's program and arguments. It calls worker.Inherited and Serve.
	Command []string
	Env     []string // of the child; nil: the parent's
	Probe   pkcs11.ProbeConfig
	// Deadline bounds each call into the module.
	Deadline time.Duration
}

// An Error is what kept anything from being learnt, as the child said it.
type Error struct{ Text string }

func (e *Error) Error() string { return e.Text }

// A request is what the child is told; the PIN follows it.
type request struct {
	Module, ModuleArgs, TokenLabel string
	Slot                           *uint
	Profiles                       []string
	MaxSessions                    int
	Measure                        time.Duration
}

// A message is what the child says, one of these.
type message struct {
	Call   *string             `json:"call,omitempty"`
	More   time.Duration       `json:"more,omitempty"` // with Call
	Report *pkcs11.ProbeReport `json:"report,omitempty"`
	Done   bool                `json:"done,omitempty"` // with Report: it is whole
	Error  string              `json:"error,omitempty"`
}

// Bounds in bytes: a request, and a PIN; all that a child says.
const (
	maxRequest = 64 << 10
	maxAnswer  = 64 << 20
)

// Run probes in a child process. It answers a report also where the module crashed or hung. An [*Error] means that nothing
// was learnt; the PIN was not presented then.
func Run(ctx context.Context, cfg Config) (*pkcs11.ProbeReport, error) {
	// The kernel kills the child when the thread that started it ends.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()

	cmd := exec.Command(cfg.Command[0], cfg.Command[1:]...)
	cmd.Env = cfg.Env
	said := &tail{}
	cmd.Stdout, cmd.Stderr = said, said
	conn, err := worker.Spawn(cmd)
	if err != nil {
		return nil, fmt.Errorf("hsm/probe: starting the child: %w", err)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })
	defer stop()

	// 1. The request and the PIN.
	_ = conn.SetDeadline(time.Now().Add(cfg.Deadline)) // interval
	err = writeRequest(conn, cfg.Probe)

	// 2. What the child says, until it is done, dead, or silent for too long.
	report := &pkcs11.ProbeReport{Module: cfg.Probe.Module, Verdict: pkcs11.VerdictNotChecked, SM1: "unavailable",
		SM1Why: "没有试 (not tried)", Findings: []string{}, NotChecked: []string{}}
	in, function := json.NewDecoder(io.LimitReader(conn, maxAnswer)), ""
	waited := cfg.Deadline
	for err == nil {
		var m message
		_ = conn.SetDeadline(time.Now().Add(waited)) // interval
		if err = in.Decode(&m); err != nil {
			break
		}
		waited = cfg.Deadline
		switch {
		case m.Error != "":
			_ = cmd.Wait()
			return nil, &Error{m.Error}
		case m.Report != nil:
			report = m.Report
			if m.Done {
				_ = cmd.Wait()
				return report, nil
			}
		case m.Call != nil:
			function = *m.Call
			waited += m.More
		}
	}

	// 3. The end that was not meant.
	hung := errors.Is(err, os.ErrDeadlineExceeded)
	_ = cmd.Process.Kill()
	waitErr := cmd.Wait()
	if ctx.Err() != nil {
		return nil, fmt.Errorf("hsm/probe: %w", context.Cause(ctx))
	}
	if hung {
		report.Hung = &pkcs11.ProbeEnd{Function: function, Seconds: waited.Seconds()}
	} else {
		report.Crashed = &pkcs11.ProbeEnd{Function: function, Signal: signalOf(cmd.ProcessState, waitErr, said.text())}
	}
	report.NotChecked = append(report.NotChecked, "此后各项：模块已不能再用，不再提交口令 (all that follows: the module cannot be used any more, and the PIN is not presented again)")
	return report, nil
}

// reSignal is how Go's runtime names the signal of a fault in C code: it ends with status 2, not by the signal.
var reSignal = regexp.MustCompile(`(?m)^(?:\[signal )?(SIG[A-Z]+): `)

func signalOf(state *os.ProcessState, err error, said []byte) string {
	if m := reSignal.FindSubmatch(said); m != nil {
		return string(m[1])
	}
	if ws, ok := state.Sys().(syscall.WaitStatus); ok && ws.Signaled() && ws.Signal() != syscall.SIGKILL {
		return ws.Signal().String()
	}
	if err != nil {
		return err.Error()
	}
	return "exit 0"
}

func writeRequest(w io.Writer, c pkcs11.ProbeConfig) error {
	b, err := json.Marshal(request{c.Module, c.ModuleArgs, c.TokenLabel, c.Slot, c.Profiles, c.MaxSessions, c.Measure})
	if err != nil {
		return err
	}
	for _, part := range [][]byte{b, c.PIN} {
		if err := binary.Write(w, binary.BigEndian, uint32(len(part))); err != nil {
			return err
		}
		if _, err := w.Write(part); err != nil {
			return err
		}
	}
	return nil
}

func readPart(r io.Reader) ([]byte, error) {
	var n uint32
	if err := binary.Read(r, binary.BigEndian, &n); err != nil {
		return nil, err
	}
	if n > maxRequest {
		return nil, fmt.Errorf("hsm/probe: a request of %d bytes", n)
	}
	b := make([]byte, n)
	_, err := io.ReadFull(r, b)
	return b, err
}

// Serve is the whole work of the child: it reads the request, probes, and reports on conn. The module's own output goes
// to the process's, which Run keeps for itself. The process cannot be dumped: the PIN is in it.
func Serve(conn io.ReadWriteCloser) error {
	defer conn.Close()
	if err := worker.Undumpable(); err != nil {
		return err
	}
	b, err := readPart(conn)
	if err != nil {
		return fmt.Errorf("hsm/probe: reading the request: %w", err)
	}
	pin, err := readPart(conn)
	if err != nil {
		return fmt.Errorf("hsm/probe: reading the request: %w", err)
	}
	defer clear(pin)
	var r request
	if err := json.Unmarshal(b, &r); err != nil {
		return fmt.Errorf("hsm/probe: reading the request: %w", err)
	}
	// What cannot be said has nobody to hear it: the parent has gone, and its end of the stream with it.
	out := json.NewEncoder(conn)
	report, err := pkcs11.Probe(pkcs11.ProbeConfig{Module: r.Module, ModuleArgs: r.ModuleArgs, TokenLabel: r.TokenLabel, Slot: r.Slot,
		PIN: pin, Profiles: r.Profiles, MaxSessions: r.MaxSessions, Measure: r.Measure},
		pkcs11.ProbeWatch{
			Call:     func(function string, more time.Duration) { _ = out.Encode(message{Call: &function, More: more}) },
			Progress: func(r *pkcs11.ProbeReport) { _ = out.Encode(message{Report: r}) },
		})
	if err != nil {
		return out.Encode(message{Error: err.Error()})
	}
	return out.Encode(message{Report: report, Done: true})
}

// A tail keeps the first 64 KiB of what is written to it: a crash names its signal first, the module rarely says much.
type tail struct {
	mu sync.Mutex
	b  bytes.Buffer // guarded by mu
}

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.b.Write(p[:min(len(p), max(0, 64<<10-t.b.Len()))])
	return len(p), nil
}

func (t *tail) text() []byte {
	t.mu.Lock()
	defer t.mu.Unlock()
	return bytes.Clone(t.b.Bytes())
}

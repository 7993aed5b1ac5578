//go:build linux

package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// openConsole opens all the kernel's consoles: whoever stands before the screen and whoever holds the serial line read the
// same, and either may answer.
func openConsole() (*console, error) {
	names, err := os.ReadFile("/sys/class/tty/console/active")
	if err != nil {
		return nil, err
	}
	var ttys everywhere
	for _, name := range strings.Fields(string(names)) {
		// One without hardware behind it is none.
		if f, err := os.OpenFile("/dev/"+name, os.O_RDWR|unix.O_NOCTTY, 0); err == nil {
			ttys = append(ttys, f)
		}
	}
	if ttys == nil {
		return nil, fmt.Errorf("none of the consoles can be opened: %s", names)
	}
	return consoleOf(ttys), nil
}

// consoleOf is several terminals as one console.
func consoleOf(ttys everywhere) *console {
	k := &keyboards{ttys: ttys, begun: make([][]byte, len(ttys)), gone: make([]bool, len(ttys))}
	c := &console{in: bufio.NewReader(k), out: ttys, echo: ttys.echo}
	c.flush = func() {
		k.flush()
		_, _ = c.in.Discard(c.in.Buffered()) // that many are there
	}
	c.last = func() *console { return consoleOf(everywhere{ttys[k.last]}) }
	return c
}

// keyboards reads what is typed at several terminals, a line at a time, and nothing before it is asked to.
type keyboards struct {
	ttys  everywhere
	begun [][]byte // of a line at each
	gone  []bool   // those that failed
	line  []byte   // what of the last line was not read yet
	last  int      // where that was typed
}

// Read waits for a line, and answers it or its beginning. Where no terminal is left, it waits for ever.
func (k *keyboards) Read(p []byte) (int, error) {
	for len(k.line) == 0 {
		var wait []unix.PollFd
		var at []int
		for i, tty := range k.ttys {
			if !k.gone[i] {
				wait, at = append(wait, unix.PollFd{Fd: int32(tty.Fd()), Events: unix.POLLIN}), append(at, i)
			}
		}
		if _, err := unix.Poll(wait, -1); err != nil {
			if errors.Is(err, unix.EINTR) {
				continue
			}
			return 0, err
		}
		for j, w := range wait {
			if w.Revents != 0 {
				k.take(at[j])
				break
			}
		}
	}
	n := copy(p, k.line)
	k.line = k.line[n:]
	return n, nil
}

// take reads from a terminal that has something, a line at most, as terminals give it.
func (k *keyboards) take(i int) {
	b := make([]byte, 4096)
	n, err := unix.Read(int(k.ttys[i].Fd()), b)
	switch {
	case errors.Is(err, unix.EINTR) || errors.Is(err, unix.EAGAIN):
		return
	case err != nil || n == 0:
		k.gone[i] = true
		return
	}
	if k.begun[i] = append(k.begun[i], b[:n]...); bytes.HasSuffix(k.begun[i], []byte("\n")) {
		k.line, k.begun[i], k.last = k.begun[i], nil, i
	}
}

// flush forgets what was typed.
func (k *keyboards) flush() {
	k.line = nil
	for i, tty := range k.ttys {
		k.begun[i] = nil
		_ = unix.IoctlSetInt(int(tty.Fd()), unix.TCFLSH, unix.TCIFLUSH) // what is no terminal has nothing typed ahead
	}
}

// everywhere is several terminals. One that fails does not silence the others.
type everywhere []*os.File

func (e everywhere) Write(b []byte) (int, error) {
	for _, tty := range e {
		_, _ = tty.Write(b)
	}
	return len(b), nil
}

func (e everywhere) echo(on bool) {
	for _, tty := range e {
		raw, err := tty.SyscallConn()
		if err != nil {
			continue
		}
		_ = raw.Control(func(fd uintptr) { // a terminal that cannot hide what is typed still takes it
			t, err := unix.IoctlGetTermios(int(fd), unix.TCGETS)
			if err != nil {
				return
			}
			t.Lflag = t.Lflag&^unix.ECHO | unix.ECHONL
			if on {
				t.Lflag |= unix.ECHO
			}
			_ = unix.IoctlSetTermios(int(fd), unix.TCSETS, t)
		})
	}
}

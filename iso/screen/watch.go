//go:build linux

// Package screen writes Chinese on the screen of the sealed machine. The kernel's console has room for 512 characters, and its
// own font has none of them Chinese; but it keeps the text of the screen in Unicode, which can be read (vcs(4): /dev/vcsu), and
// where a screen is a frame buffer, that can be written. So whoever has something to say writes it to the console, as ever, and
// this package writes the rows with characters beyond ASCII over what the kernel wrote. It changes neither the console's mode nor
// its font: where it does not run, or ends, or the kernel itself has a last word, the screen is the kernel's, with a box for each
// Chinese character and the English beside it. Nothing waits for it.
//
// The font is GNU Unifont, as the distribution has it.
package screen

import (
	"encoding/binary"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	textDevice = "/dev/vcsu" // the text of the console in the foreground, four bytes a character
	console    = "/dev/tty0" // that console
	graphics   = "/sys/class/graphics/fb0"
	frames     = "/dev/fb0"
)

const (
	gather = 50 * time.Millisecond // what is written in a burst is painted once
	idle   = 5 * time.Second       // after that the screen is painted again, should the kernel have written anew without saying so
)

// Watch paints until something fails, and answers what. The kernel keeps Unicode from the first time that it is asked for it: what
// was written before stays boxes.
func Watch(font func() (Font, error)) error {
	text, err := unix.Open(textDevice, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("%s: %w", textDevice, err)
	}
	defer unix.Close(text)
	if _, err := unix.Pread(text, make([]byte, 4), 0); err != nil { // from now on
		return fmt.Errorf("%s: %w", textDevice, err)
	}
	frame, err := readFrame(os.ReadFile)
	if err != nil {
		return err
	}
	tty, err := unix.Open(console, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("%s: %w", console, err)
	}
	defer unix.Close(tty)
	size, err := unix.IoctlGetWinsize(tty, unix.TIOCGWINSZ)
	if err != nil {
		return err
	}
	wide, err := frame.cell(int(size.Col), int(size.Row))
	if err != nil {
		return err
	}
	// A character of two columns may begin in the last: room for its right half. A kernel that will not loses the half.
	if int(size.Col) == frame.Width/wide {
		size.Col--
		_ = unix.IoctlSetWinsize(tty, unix.TIOCSWINSZ, size)
	}
	out, err := os.OpenFile(frames, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer out.Close()
	p := new(Painter)
	if p.Font, err = font(); err != nil {
		return err
	}
	for {
		t, err := readText(text, tty)
		if err != nil {
			return err
		}
		if err := p.Paint(out, frame, t); err != nil {
			return err
		}
		wait := []unix.PollFd{{Fd: int32(text), Events: unix.POLLPRI}} // vcs_poll: the console has changed
		if _, err := unix.Poll(wait, int(idle.Milliseconds())); err != nil && err != unix.EINTR {
			return err
		}
		time.Sleep(gather)
	}
}

// readText reads what stands on the console.
func readText(text, tty int) (t Text, err error) {
	size, err := unix.IoctlGetWinsize(tty, unix.TIOCGWINSZ)
	if err != nil {
		return t, err
	}
	t = Text{Columns: int(size.Col), Rows: int(size.Row)}
	b := make([]byte, 4*t.Columns*t.Rows)
	n, err := unix.Pread(text, b, 0)
	if err != nil {
		return t, fmt.Errorf("%s: %w", textDevice, err)
	}
	t.Cells = make([]rune, len(b)/4) // spaces where the console became smaller meanwhile
	for i := range n / 4 {
		t.Cells[i] = rune(binary.NativeEndian.Uint32(b[4*i:]))
	}
	return t, nil
}

// readFrame reads the shape of the frame buffer (Documentation/ABI/testing/sysfs-class-graphics). One that is turned or panned is
// left to the kernel.
func readFrame(read func(string) ([]byte, error)) (f Frame, err error) {
	attribute := func(name string) string {
		b, e := read(graphics + "/" + name)
		if e != nil && err == nil {
			err = e
		}
		return strings.TrimSpace(string(b))
	}
	number := func(text string) int {
		n, e := strconv.Atoi(text)
		if e != nil && err == nil {
			err = e
		}
		return n
	}
	width, height, _ := strings.Cut(attribute("virtual_size"), ",")
	f = Frame{Width: number(width), Height: number(height), Stride: number(attribute("stride")), Depth: number(attribute("bits_per_pixel"))}
	if pan, turn := attribute("pan"), attribute("rotate"); err == nil && (pan != "0,0" || turn != "0") {
		err = fmt.Errorf("%w: panned by %s, turned by %s", ErrShape, pan, turn)
	}
	return f, err
}

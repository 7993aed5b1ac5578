package vmtest_test

import (
	"fmt"
	"image"
	"image/png"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"yinjian/iso/layout"
	"yinjian/iso/screen"
	"yinjian/iso/vmtest"
)

// shows waits until a machine's screen shows a text, dot by dot as the image's font has it, and keeps the picture.
func shows(t *testing.T, v *vmtest.VM, name, text string) {
	t.Helper()
	want := dots(t, screenFont(t), text)
	file := picture(t, name)
	for deadline := time.Now().Add(2 * time.Minute); ; v.After(time.Second) {
		v.Screen(file)
		if stands(t, file, want) {
			return
		}
		if time.Now().After(deadline) {
			t.Errorf("%q does not stand on the screen: %s", text, file)
			return
		}
	}
}

// The image's font is read once: a machine that refuses to start shows why for five seconds.
var (
	fontOnce sync.Once
	font     screen.Font
)

// screenFont is the font that the built image has.
func screenFont(t *testing.T) screen.Font {
	t.Helper()
	unsquashfs := vmtest.Tool(t, "unsquashfs")
	fontOnce.Do(func() {
		hex, err := exec.CommandContext(t.Context(), unsquashfs, "-cat", filepath.Join(built(t), "root.img"), strings.TrimPrefix(layout.ScreenFont, "/")).Output()
		if err == nil {
			font, err = screen.ParseFont(hex)
		}
		if err != nil {
			t.Fatal(err)
		}
	})
	if font == nil {
		t.Fatal("the image's font could not be read: another test says why")
	}
	return font
}

// dots are the lines of dots of a text.
func dots(t *testing.T, font screen.Font, text string) (lines [16][]bool) {
	t.Helper()
	row := screen.Text{Rows: 1}
	for _, r := range text { // Chinese, all of it
		row.Cells = append(row.Cells, r, ' ')
	}
	row.Columns = len(row.Cells)
	f := screen.Frame{Width: 8 * row.Columns, Height: 16, Stride: 8 * row.Columns * 4, Depth: 32}
	m := make(memory, f.Stride*f.Height)
	if err := (&screen.Painter{Font: font}).Paint(m, f, row); err != nil {
		t.Fatal(err)
	}
	for y := range lines {
		for x := range f.Width {
			lines[y] = append(lines[y], m[y*f.Stride+4*x] != 0)
		}
	}
	return lines
}

// memory is a frame buffer.
type memory []byte

func (m memory) WriteAt(b []byte, at int64) (int, error) {
	if int(at)+len(b) > len(m) {
		return 0, fmt.Errorf("%d bytes at %d", len(b), at)
	}
	return copy(m[at:], b), nil
}

// stands says whether a picture has these dots somewhere where a row and a column begin.
func stands(t *testing.T, file string, want [16][]bool) bool {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	picture, err := png.Decode(f)
	if err != nil {
		return false // half written
	}
	at := func(x0, y0 int) bool {
		for y, line := range want {
			for x, lit := range line {
				if isLit(picture, x0+x, y0+y) != lit {
					return false
				}
			}
		}
		return true
	}
	size := picture.Bounds().Size()
	for y := 0; y+16 <= size.Y; y += 16 {
		for x := 0; x+len(want[0]) <= size.X; x += 8 {
			if at(x, y) {
				return true
			}
		}
	}
	return false
}

func isLit(p image.Image, x, y int) bool {
	r, g, b, _ := p.At(x, y).RGBA()
	return r|g|b > 0x3fff
}

package screen_test

import (
	"errors"
	"strings"
	"testing"

	"yinjian/iso/screen"
)

// testFont has pictures that can be told apart: 'A' is a stroke on the left of its column, '中' a frame, '…' all dots of every second
// column, which is wide in the font and has one column on the console, and what is missing a bar.
var testFont = "0041:" + strings.Repeat("80", 16) + "\n" +
	"2026:" + strings.Repeat("AAAA", 2) + strings.Repeat("0000", 14) + "\n" +
	"4E2D:FFFF" + strings.Repeat("8001", 14) + "FFFF\n" +
	"FFFD:0000FFFF" + strings.Repeat("0000", 14) + "\n"

func font(t *testing.T) screen.Font {
	t.Helper()
	f, err := screen.ParseFont([]byte(testFont))
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// memory is a frame buffer.
type memory struct {
	screen.Frame
	dots []byte
	rows int // that were written
}

func (m *memory) WriteAt(b []byte, at int64) (int, error) {
	m.rows++
	if int(at)+len(b) > len(m.dots) {
		return 0, errors.New("behind the screen's end")
	}
	return copy(m.dots[at:], b), nil
}

func newMemory(f screen.Frame) *memory {
	return &memory{Frame: f, dots: make([]byte, f.Stride*f.Height)}
}

// line is a line of dots, as text.
func (m *memory) line(y int) string {
	var out strings.Builder
	for x := range m.Width {
		lit := false
		for _, b := range m.dots[y*m.Stride+x*m.Depth/8 : y*m.Stride+(x+1)*m.Depth/8] {
			lit = lit || b != 0
		}
		out.WriteString(map[bool]string{true: "#", false: "."}[lit])
	}
	return out.String()
}

func text(columns int, lines ...string) screen.Text {
	t := screen.Text{Columns: columns, Rows: len(lines)}
	for _, l := range lines {
		t.Cells = append(t.Cells, []rune(l)...)
	}
	return t
}

// Each row with a character beyond ASCII is written, all of it; the others are the kernel's. The rows are dots as the font has them.
func TestPaint(t *testing.T) {
	t.Parallel()
	m := newMemory(screen.Frame{Width: 48, Height: 48, Stride: 48*4 + 16, Depth: 32})
	p := &screen.Painter{Font: font(t)}
	// Five columns of six: a character of two in the last one has room.
	if err := p.Paint(m, m.Frame, text(5, "AA   ", "A中 A中", "…\u4e2e   ")); err != nil {
		t.Fatal(err)
	}
	if m.rows != 2 {
		t.Errorf("%d rows were written, want the two with other characters than ASCII", m.rows)
	}
	for y, want := range map[int]string{
		0:  "................................................",
		16: "#.......#################.......################",
		17: "#.......#..............##.......#..............#",
		31: "#.......#################.......################",
		32: "########........................................",
		33: strings.Repeat("#", 24) + strings.Repeat(".", 24),
		34: "................................................",
	} {
		if got := m.line(y); got != want {
			t.Errorf("line %d is\n%s, want\n%s", y, got, want)
		}
	}
}

// A row that had Chinese and has none any more is written once more: the kernel does not know that there is something of ours, and
// leaves a space that was a space alone.
func TestPaintTakesAway(t *testing.T) {
	t.Parallel()
	m := newMemory(screen.Frame{Width: 48, Height: 16, Stride: 48 * 4, Depth: 32})
	p := &screen.Painter{Font: font(t)}
	// The kernel wrote B while A was on its way, so that A may stand there until the next time.
	for i, line := range []string{"中    ", "A    ", "B    ", "A    ", "A    ", "B    "} {
		if err := p.Paint(m, m.Frame, text(5, line)); err != nil {
			t.Fatal(err)
		}
		if want := []int{1, 2, 3, 4, 4, 4}[i]; m.rows != want {
			t.Errorf("%d rows were written until %q, want %d", m.rows, line, want)
		}
	}
	if got := m.line(1); got != "#"+strings.Repeat(".", 47) {
		t.Errorf("left on the screen: %s", got)
	}
}

// Frame buffers of other depths, and one for which the kernel takes its font of twice the size.
func TestPaintShapes(t *testing.T) {
	t.Parallel()
	for name, f := range map[string]screen.Frame{
		"16 bits":      {Width: 40, Height: 16, Stride: 80, Depth: 16},
		"24 bits":      {Width: 40, Height: 16, Stride: 120, Depth: 24},
		"with a rest":  {Width: 44, Height: 17, Stride: 200, Depth: 32},
		"large screen": {Width: 80, Height: 32, Stride: 320, Depth: 32},
	} {
		m := newMemory(f)
		if err := (&screen.Painter{Font: font(t)}).Paint(m, f, text(5, "中   A")); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		want := "################................#......."
		if f.Width == 80 {
			want = strings.Repeat("#", 32) + strings.Repeat(".", 32) + "##" + strings.Repeat(".", 14)
		}
		if got := m.line(0); got[:len(want)] != want {
			t.Errorf("%s: %s, want %s", name, got, want)
		}
	}
	for name, f := range map[string]screen.Frame{
		"palette":      {Width: 40, Height: 16, Stride: 40, Depth: 8},
		"another font": {Width: 60, Height: 22, Stride: 240, Depth: 32},
		"nothing":      {},
	} {
		m := newMemory(f)
		if err := (&screen.Painter{Font: font(t)}).Paint(m, f, text(5, "中   A")); !errors.Is(err, screen.ErrShape) || m.rows != 0 {
			t.Errorf("%s: %v, %d rows written", name, err, m.rows)
		}
	}
}

func TestParseFontRefuses(t *testing.T) {
	t.Parallel()
	for name, bad := range map[string]string{"no number": "x:00", "no dots": "4E2D", "odd": testFont + "4E2E:0\n", "short": testFont + "4E2E:0000\n",
		"without a picture for what is missing": testFont[:strings.Index(testFont, "FFFD")]} {
		if _, err := screen.ParseFont([]byte(bad)); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
}

// What is shipped are lines of the font as they were.
func TestSelect(t *testing.T) {
	t.Parallel()
	hangul := "AC00:" + strings.Repeat("0", 64) + "\n"
	got, err := screen.Select([]byte(testFont + hangul))
	if err != nil || string(got) != testFont {
		t.Errorf("%s, %v", got, err)
	}
}

package screen

import (
	"bytes"
	"errors"
	"io"
	"slices"
)

// A Frame is the shape of a frame buffer, whose first byte is the screen's upper left corner.
type Frame struct {
	Width, Height int // dots
	Stride        int // bytes from a line to the next
	Depth         int // bits of a dot: 16, 24 or 32
}

// A Text is what stands on the screen, row by row. The column behind a character of double width is a space.
type Text struct {
	Columns, Rows int
	Cells         []rune
}

// ErrShape means a frame buffer or a console of a shape that is left to the kernel.
var ErrShape = errors.New("screen: no frame buffer that can be written on")

// A Painter writes over the kernel's own writing.
type Painter struct {
	Font    Font
	painted map[int][]rune // rows that hold something of ours, as they were written last
}

// cell is how many dots wide a column is: a row is twice as high, whichever of its fonts the kernel took for the screen. The
// console may lack a column of what the screen has room for, see [Watch].
func (f Frame) cell(columns, rows int) (int, error) {
	if f.Depth != 16 && f.Depth != 24 && f.Depth != 32 || f.Stride < f.Width*f.Depth/8 {
		return 0, ErrShape
	}
	for wide := glyphRows / 2; wide <= 4*glyphRows; wide += glyphRows / 2 {
		if right, below := f.Width-columns*wide, f.Height-rows*2*wide; 0 <= right && right < 2*wide && 0 <= below && below < 2*wide {
			return wide, nil
		}
	}
	return 0, ErrShape
}

// Paint writes each row that has a character beyond ASCII, and each that had one, until it is seen that what was written of it
// still stood there afterwards: the kernel may have written something else before us, and does not know that there is something of
// ours. It writes all other rows itself, and the cursor.
func (p *Painter) Paint(out io.WriterAt, f Frame, t Text) error {
	wide, err := f.cell(t.Columns, t.Rows)
	if err != nil {
		return err
	}
	if len(t.Cells) != t.Columns*t.Rows {
		return ErrShape
	}
	size := f.Depth / 8
	lit := bytes.Repeat([]byte{0xaa}, size) // the kernel's grey
	if f.Depth == 16 {
		lit = []byte{0x55, 0xad} // the same as RGB 565
	}
	scale := wide / (glyphRows / 2)
	lines := make([]byte, 2*wide*f.Stride)
	for row := range t.Rows {
		cells := t.Cells[row*t.Columns : (row+1)*t.Columns]
		ours := beyondASCII(cells)
		if last, is := p.painted[row]; !ours && (!is || slices.Equal(last, cells)) {
			delete(p.painted, row)
			continue
		}
		clear(lines)
		for column, r := range cells {
			g, dots := p.picture(r)
			for y, bits := range g {
				for x := range dots {
					if bits<<x&0x8000 == 0 {
						continue
					}
					left := column*wide + x*scale
					for dy := range scale {
						for dx := left; dx < min(left+scale, f.Width); dx++ {
							copy(lines[(y*scale+dy)*f.Stride+dx*size:], lit)
						}
					}
				}
			}
		}
		if _, err := out.WriteAt(lines, int64(row*2*wide*f.Stride)); err != nil {
			return err
		}
		if p.painted == nil {
			p.painted = map[int][]rune{}
		}
		p.painted[row] = slices.Clone(cells)
	}
	return nil
}

func beyondASCII(cells []rune) bool {
	for _, r := range cells {
		if r > '~' {
			return true
		}
	}
	return false
}

// picture is what is written for a character, and how many dots of it: 8 for one that has a column, 16 for one that has two.
func (p *Painter) picture(r rune) (rows [glyphRows]uint16, dots int) {
	if r <= ' ' {
		return rows, 0
	}
	g, ok := p.Font[r]
	if !ok {
		g = p.Font[missing]
	}
	if double(r) {
		return g.rows, 16
	}
	if g.wide { // two dots become one
		for y, bits := range g.rows {
			g.rows[y] = 0
			for x := range 8 {
				if bits<<(2*x)&0xc000 != 0 {
					g.rows[y] |= 0x8000 >> x
				}
			}
		}
	}
	return g.rows, 8
}

package screen

import (
	"encoding/hex"
	"fmt"
	"strings"
)

// glyphRows is how high a character of the font is; it is half as wide, or, where it is wide, as wide as high.
const glyphRows = 16

// A glyph is a character's picture: rows from the top, the leftmost dot in the highest bit.
type glyph struct {
	wide bool // 16 dots, else 8
	rows [glyphRows]uint16
}

// A Font has the pictures of characters.
type Font map[rune]glyph

// ParseFont reads a font in GNU Unifont's format .hex: a line for each character, its number in hexadecimal, a colon, and its
// rows in hexadecimal, of one byte each or of two.
func ParseFont(text []byte) (Font, error) {
	font := make(Font, strings.Count(string(text), "\n"))
	for line := range strings.Lines(string(text)) {
		r, dots, err := parseLine(line)
		if err != nil {
			return nil, fmt.Errorf("screen: the font's line %q: %w", line, err)
		}
		font[r] = dots
	}
	if _, ok := font[missing]; !ok {
		return nil, fmt.Errorf("screen: the font lacks U+%04X, which stands for what it lacks", missing)
	}
	return font, nil
}

func parseLine(line string) (r rune, g glyph, err error) {
	number, dots, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ":")
	if _, err := fmt.Sscanf(number, "%X", &r); err != nil {
		return 0, g, err
	}
	b, err := hex.DecodeString(dots)
	switch {
	case err != nil:
		return 0, g, err
	case len(b) == glyphRows:
		for i := range g.rows {
			g.rows[i] = uint16(b[i]) << 8
		}
	case len(b) == 2*glyphRows:
		g.wide = true
		for i := range g.rows {
			g.rows[i] = uint16(b[2*i])<<8 | uint16(b[2*i+1])
		}
	default:
		return 0, g, fmt.Errorf("%d bytes are no %d rows", len(b), glyphRows)
	}
	return r, g, nil
}

// missing is shown for a character that the font lacks.
const missing = '\uFFFD'

// blocks are the characters that the image's font has, as far as Unifont has them: what our programs write, and what names of
// people and places are written with. First and last of each.
var blocks = [][2]rune{
	{0x20, 0x7e}, {0xa0, 0x17f}, {0x370, 0x3ff}, // Latin and Greek
	{0x2000, 0x206f}, {0x2100, 0x22ff}, {0x2460, 0x25ff}, {0x2700, 0x27bf}, // — … “ ” № ℃ Ⅱ → ≤ ① ■ ✓
	{0x2e80, 0x2fdf}, {0x3000, 0x303f}, {0x3200, 0x33ff}, // radicals, 、。《》〇 ㎡
	{0x3400, 0x4dbf}, {0x4e00, 0x9fff}, {0xf900, 0xfaff}, // Chinese characters
	{0xfe30, 0xfe4f}, {0xff00, 0xffef}, {missing, missing}, // （），：
}

// Wanted says whether the image's font shall have a character.
func Wanted(r rune) bool {
	for _, b := range blocks {
		if b[0] <= r && r <= b[1] {
			return true
		}
	}
	return false
}

// Select takes the lines of the wanted characters from a font in Unifont's format .hex. They stay as they are: the font's
// sources and what is shipped of it are the same.
func Select(text []byte) ([]byte, error) {
	var out strings.Builder
	for line := range strings.Lines(string(text)) {
		r, _, err := parseLine(line)
		if err != nil {
			return nil, fmt.Errorf("screen: the font's line %q: %w", line, err)
		}
		if Wanted(r) {
			out.WriteString(line)
		}
	}
	return []byte(out.String()), nil
}

// double says whether the kernel's console gives a character two columns: is_double_width of drivers/tty/vt/vt.c, Linux 6.1.
func double(r rune) bool {
	for _, b := range [][2]rune{{0x1100, 0x115f}, {0x2329, 0x232a}, {0x2e80, 0x303e}, {0x3040, 0xa4cf}, {0xac00, 0xd7a3}, {0xf900, 0xfaff},
		{0xfe10, 0xfe19}, {0xfe30, 0xfe6f}, {0xff00, 0xff60}, {0xffe0, 0xffe6}, {0x20000, 0x2fffd}, {0x30000, 0x3fffd}} {
		if b[0] <= r && r <= b[1] {
			return true
		}
	}
	return false
}

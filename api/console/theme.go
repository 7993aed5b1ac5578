package console

import (
	"bytes"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"image"
	_ "image/jpeg" // a logo may be one
	"image/png"
	"io"
	"math"
	"os"
	"regexp"
	"strconv"

	"github.com/emmansun/gmsm/sm3"
	"github.com/pelletier/go-toml/v2"
)

// A Theme is how a hospital has the console look.
type Theme struct {
	// Name stands beside the logo: the hospital's.
	Name string `toml:"name"`
	// Accent is the colour of buttons and links, "#rrggbb". White on it and it on white have to be legible.
	Accent string `toml:"accent"`
	// Logo is a PNG, nil for ours.
	Logo []byte `toml:"-"`
}

// What a theme's folder may have: theme.toml, and logo.png or logo.jpg.
const (
	themeFile   = "theme.toml"
	maxTheme    = 16 << 10
	maxLogo     = 512 << 10
	maxLogoSide = 1024 // pixels
	// minContrast is WCAG 2.2's 1.4.3 for text.
	minContrast = 4.5
)

var reColour = regexp.MustCompile(`^#[0-9a-fA-F]{6}$`)

// LoadTheme reads a theme's folder; "" is ours. Only the files above are read, and nothing that a link leads out of the
// folder to. A logo is known by its bytes, not by its name, and drawn anew, so that nothing comes along in it; SVG, which can
// hold more than a picture, is refused.
func LoadTheme(folder string) (*Theme, error) {
	t := &Theme{}
	if folder == "" {
		return t, nil
	}
	root, err := os.OpenRoot(folder)
	if err != nil {
		return nil, fmt.Errorf("console: theme: %w", err)
	}
	defer root.Close()
	text, err := readWithin(root, themeFile, maxTheme)
	if err == nil {
		err = toml.NewDecoder(bytes.NewReader(text)).DisallowUnknownFields().Decode(t)
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("console: theme: %s: %w", themeFile, err)
	}
	if t.Accent != "" {
		if !reColour.MatchString(t.Accent) {
			return nil, fmt.Errorf("console: theme: accent: %q 须为 #rrggbb (must be #rrggbb)", t.Accent)
		}
		if c := contrast(t.Accent, "#ffffff"); c < minContrast {
			return nil, fmt.Errorf("console: theme: accent: %s 与白色的对比度 %.1f，须不低于 %.1f (its contrast with white must be that at least)", t.Accent, c, minContrast)
		}
	}
	if len(t.Name) > 96 {
		return nil, errors.New("console: theme: name: 不得超过 96 字节 (96 bytes at most)")
	}
	for _, name := range []string{"logo.png", "logo.jpg", "logo.svg"} {
		raw, err := readWithin(root, name, maxLogo)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err == nil {
			t.Logo, err = redraw(raw)
		}
		if err != nil {
			return nil, fmt.Errorf("console: theme: %s: %w", name, err)
		}
		break
	}
	return t, nil
}

func readWithin(root *os.Root, name string, most int64) ([]byte, error) {
	f, err := root.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return nil, errors.Join(err, errors.New("不是普通文件 (not a regular file)"))
	}
	b, err := io.ReadAll(io.LimitReader(f, most+1))
	if err == nil && int64(len(b)) > most {
		err = fmt.Errorf("超过 %d 字节 (more than %d bytes)", most, most)
	}
	return b, err
}

// redraw reads a PNG or JPEG and writes its pixels as PNG.
func redraw(raw []byte) ([]byte, error) {
	c, kind, err := image.DecodeConfig(bytes.NewReader(raw))
	if err != nil {
		return nil, errors.New("须为 PNG 或 JPEG 图片；不接受 SVG (must be a PNG or JPEG picture; SVG is refused)")
	}
	if c.Width < 1 || c.Height < 1 || c.Width > maxLogoSide || c.Height > maxLogoSide {
		return nil, fmt.Errorf("%d×%d 像素，至多 %d×%d (pixels)", c.Width, c.Height, maxLogoSide, maxLogoSide)
	}
	picture, _, err := image.Decode(bytes.NewReader(raw))
	if err != nil {
		return nil, fmt.Errorf("%s 图片已损坏 (the picture is damaged): %w", kind, err)
	}
	var out bytes.Buffer
	err = png.Encode(&out, picture)
	return out.Bytes(), err
}

// css is what the theme adds to ours.
func (t *Theme) css() []byte {
	if t.Accent == "" {
		return nil
	}
	return fmt.Appendf(nil, "\n:root { --accent: %s; --accent-strong: %s; }\n", t.Accent, darker(t.Accent))
}

func channels(colour string) (out [3]float64) {
	for i := range out {
		n, _ := strconv.ParseUint(colour[1+2*i:3+2*i], 16, 8) // by reColour
		out[i] = float64(n)
	}
	return out
}

func darker(colour string) string {
	c := channels(colour)
	return fmt.Sprintf("#%02x%02x%02x", int(c[0]*0.8), int(c[1]*0.8), int(c[2]*0.8))
}

// contrast is WCAG 2.2's ratio of two colours, 1 to 21.
func contrast(a, b string) float64 {
	luminance := func(colour string) float64 {
		c := channels(colour)
		for i, v := range c {
			if v /= 255; v <= 0.04045 {
				c[i] = v / 12.92
			} else {
				c[i] = math.Pow((v+0.055)/1.055, 2.4)
			}
		}
		return 0.2126*c[0] + 0.7152*c[1] + 0.0722*c[2]
	}
	x, y := luminance(a), luminance(b)
	return (max(x, y) + 0.05) / (min(x, y) + 0.05)
}

func digest(b []byte) string { s := sm3.Sum(b); return hex.EncodeToString(s[:6]) }

// equalStrings takes the same time whatever is different.
func equalStrings(a, b string) bool {
	return b != "" && subtle.ConstantTimeCompare([]byte(a), []byte(b)) == 1
}

package console_test

import (
	"bytes"
	"image"
	"image/color"
	"image/jpeg"
	"image/png"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"yinjian/api/console"
)

func picture(width, height int) image.Image {
	p := image.NewRGBA(image.Rect(0, 0, width, height))
	for i := range min(width, height) {
		p.Set(i, i, color.RGBA{200, 30, 40, 255})
	}
	return p
}

func encoded(t *testing.T, width, height int) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := png.Encode(&b, picture(width, height)); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// themeOf makes a theme's folder.
func themeOf(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// A theme changes name, colour and logo; of the logo's file nothing but its pixels is served.
func TestTheme(t *testing.T) {
	t.Parallel()
	logo := encoded(t, 160, 48)
	dir := themeOf(t, map[string]string{"theme.toml": "name = \"市第一人民医院 <b>\"\naccent = \"#7a1f5c\"\n", "logo.png": string(logo) + "<script>hidden behind the picture</script>"})
	theme, err := console.LoadTheme(dir)
	if err != nil {
		t.Fatal(err)
	}
	s := newConsole(t, &clinic{}, theme)
	_, body := get(t, s, "system", "/console/?still=1")
	if !strings.Contains(body, "市第一人民医院 &lt;b&gt;") || !strings.Contains(body, `src="/console/assets/logo"`) {
		t.Errorf("%s", body)
	}
	r, served := get(t, s, "", "/console/assets/logo")
	if r.Header.Get("Content-Type") != "image/png" || strings.Contains(served, "script") {
		t.Errorf("the logo as %s, %d bytes", r.Header.Get("Content-Type"), len(served))
	}
	if _, err := png.Decode(strings.NewReader(served)); err != nil {
		t.Error(err)
	}
	if _, css := get(t, s, "", "/console/assets/console.css"); !strings.Contains(css, "--accent: #7a1f5c") {
		t.Error("the colour is not in the style")
	}
	for _, at := range []string{"/console/assets/../theme.toml", "/console/assets/theme.toml", "/console/assets/logo/../../../etc/passwd", "/console/assets/%2e%2e%2ftheme.toml", "/console/assets/logo.png"} {
		if r, body := get(t, s, "", at); r.StatusCode == http.StatusOK || strings.Contains(body, "accent") {
			t.Errorf("%s: %s", at, r.Status)
		}
	}
	var j bytes.Buffer
	if err := jpeg.Encode(&j, picture(64, 64), nil); err != nil {
		t.Fatal(err)
	}
	if theme, err := console.LoadTheme(themeOf(t, map[string]string{"logo.jpg": j.String()})); err != nil || theme.Logo == nil {
		t.Errorf("JPEG: %v", err)
	}
	if theme, err := console.LoadTheme(""); err != nil || theme.Logo != nil {
		t.Errorf("none: %v", err)
	}
}

// What is no theme is refused when the appliance starts, with what is wrong with it.
func TestThemeRefused(t *testing.T) {
	t.Parallel()
	secret := filepath.Join(t.TempDir(), "secret.png")
	if err := os.WriteFile(secret, encoded(t, 8, 8), 0o600); err != nil {
		t.Fatal(err)
	}
	linked := themeOf(t, nil)
	if err := os.Symlink(secret, filepath.Join(linked, "logo.png")); err != nil {
		t.Fatal(err)
	}
	folder := themeOf(t, nil)
	if err := os.Mkdir(filepath.Join(folder, "logo.png"), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct{ dir, want string }{
		"SVG":              {themeOf(t, map[string]string{"logo.svg": `<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>`}), "SVG"},
		"SVG as PNG":       {themeOf(t, map[string]string{"logo.png": `<svg xmlns="http://www.w3.org/2000/svg"/>`}), "SVG"},
		"GIF":              {themeOf(t, map[string]string{"logo.png": "GIF89a\x01\x00\x01\x00\x00\x00\x00;"}), "PNG"},
		"page as PNG":      {themeOf(t, map[string]string{"logo.png": "<html><script>1</script>"}), "PNG"},
		"cut":              {themeOf(t, map[string]string{"logo.png": string(encoded(t, 64, 64)[:60])}), "damaged"},
		"too many pixels":  {themeOf(t, map[string]string{"logo.png": string(encoded(t, 1025, 2))}), "1025×2"},
		"too large":        {themeOf(t, map[string]string{"logo.png": string(encoded(t, 2, 2)) + strings.Repeat("x", 512<<10)}), "524288"},
		"link out":         {linked, "logo.png"},
		"folder":           {folder, "logo.png"},
		"unknown key":      {themeOf(t, map[string]string{"theme.toml": "script = \"x\"\n"}), "theme.toml"},
		"colour of words":  {themeOf(t, map[string]string{"theme.toml": "accent = \"red; } body { display: none\"\n"}), "#rrggbb"},
		"illegible colour": {themeOf(t, map[string]string{"theme.toml": "accent = \"#ffee00\"\n"}), "4.5"},
		"long name":        {themeOf(t, map[string]string{"theme.toml": "name = \"" + strings.Repeat("x", 97) + "\"\n"}), "96"},
		"no folder":        {filepath.Join(folder, "absent"), "absent"},
	} {
		if _, err := console.LoadTheme(c.dir); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}

package build

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"yinjian/iso/layout"
	"yinjian/iso/screen"
)

// said are the characters beyond ASCII of all texts in our programs, each with a place where it stands.
func said(t *testing.T) map[rune]string {
	t.Helper()
	all := map[rune]string{}
	for _, dir := range []string{"iso", "appliance", "api", "dbdriver", "hsm", "ntp", "tsa"} {
		err := filepath.WalkDir(filepath.Join(sources, dir), func(file string, d fs.DirEntry, err error) error {
			if err != nil || filepath.Ext(file) != ".go" || strings.HasSuffix(file, "_test.go") || strings.Contains(file, "dbtest") {
				return err
			}
			positions := token.NewFileSet()
			tree, err := parser.ParseFile(positions, file, nil, parser.SkipObjectResolution)
			if err != nil {
				return err
			}
			ast.Inspect(tree, func(n ast.Node) bool {
				if lit, ok := n.(*ast.BasicLit); ok && lit.Kind == token.STRING {
					text, err := strconv.Unquote(lit.Value)
					if err != nil {
						t.Errorf("%s: %v", positions.Position(lit.Pos()), err)
					}
					for _, r := range text {
						if r > '~' {
							all[r] = positions.Position(lit.Pos()).String()
						}
					}
				}
				return true
			})
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if len(all) < 500 {
		t.Fatalf("only %d characters", len(all))
	}
	return all
}

// notShown are characters that stand in programs and not on a screen, each with the reason.
var notShown = map[rune]string{
	'\ufeff': "a byte order mark in syslog's messages", '\U0001FA7A': "what databases are tried with", '\U00020BB7': "the same", '\U0002A6A5': "the same",
}

// Whatever our programs say, the screen has a picture of it; and so it has of every character with which a person's name in the
// Chinese standard character sets of 1980 and 1993 is written.
func TestScreenShowsEveryCharacter(t *testing.T) {
	t.Parallel()
	all := said(t)
	for r, at := range all {
		if !screen.Wanted(r) && notShown[r] == "" {
			t.Errorf("%s: %q (U+%04X) is in no block that the screen's font has", at, r, r)
		}
	}
	for r := rune(0x4e00); r <= 0x9fa5; r++ { // GB 13000.1-1993
		if !screen.Wanted(r) {
			t.Fatalf("%c is missing", r)
		}
		all[r] = "GB 13000.1"
	}
	t.Run("of the built image", func(t *testing.T) {
		text, err := exec.Command(tool(t, "unsquashfs"), "-cat", filepath.Join(built(t), "root.img"), strings.TrimPrefix(layout.ScreenFont, "/")).Output()
		if err != nil {
			t.Fatal(err)
		}
		font, err := screen.ParseFont(text)
		if err != nil {
			t.Fatal(err)
		}
		for r, at := range all {
			if _, ok := font[r]; !ok && notShown[r] == "" {
				t.Errorf("%s: the font has no %q (U+%04X)", at, r, r)
			}
		}
		t.Logf("%d characters, %d bytes; our programs use %d", len(font), len(text), len(all))
	})
}

package archtest

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// packaging/dev/README.md says of each input from outside which target feeds it; no target is missing there, and none is
// made up.
func TestFuzzTargetsAreListed(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile(filepath.Join(root, "packaging/dev/README.md"))
	if err != nil {
		t.Fatal(err)
	}
	listed := map[string]bool{}
	for _, m := range regexp.MustCompile("(?m)^\\| [^|]+ \\| `([a-z0-9/]+)` (Fuzz\\w+) \\| [^|]+ \\|$").FindAllStringSubmatch(string(page), -1) {
		listed[m[1]+" "+m[2]] = true
	}
	found := map[string]bool{}
	err = filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(name, "_test.go") {
			return err
		}
		f, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		dir, err := filepath.Rel(root, filepath.Dir(name))
		for _, decl := range f.Decls {
			if fn, ok := decl.(*ast.FuncDecl); ok && fn.Recv == nil && strings.HasPrefix(fn.Name.Name, "Fuzz") {
				found[path.Clean(filepath.ToSlash(dir))+" "+fn.Name.Name] = true
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range slices.Sorted(maps.Keys(found)) {
		if !listed[name] {
			t.Errorf("%s is not in the table of packaging/dev/README.md", name)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(listed)) {
		if !found[name] {
			t.Errorf("%s is in the table of packaging/dev/README.md, and there is no such target", name)
		}
	}
}

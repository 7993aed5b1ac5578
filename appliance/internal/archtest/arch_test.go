package archtest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const (
	module = "yinjian"
	root   = "../../.."
	// pins is a package without code that keeps modules in go.mod until somebody uses them.
	pins = "zz"
)

// layers from the bottom; tests may use everything and are used by nobody.
var layers = []string{"formats", "services", "adapters", "wiring", "tests"}

// A drawn is one line of the block "packages".
type drawn struct {
	layer   int
	planned bool
	lateral []string
}

// A picture is what ARCHITECTURE.md says.
type picture struct {
	packages map[string]drawn
	only     map[string][]string // import path, "C" or "clock" → folders; "x/..." for a tree
	pure     map[int][]string    // layer → modules it may use
}

// block is the content of the one fenced block of that name.
func block(page, name string) (string, error) {
	_, rest, found := strings.Cut(page, "\n```"+name+"\n")
	body, after, closed := strings.Cut(rest, "\n```")
	if !found || !closed || strings.Contains(after, "\n```"+name+"\n") {
		return "", fmt.Errorf("ARCHITECTURE.md: want one fenced block %q", name)
	}
	return body, nil
}

func parsePicture(page string) (*picture, error) {
	p := &picture{packages: map[string]drawn{}, only: map[string][]string{}, pure: map[int][]string{}}
	body, err := block(page, "packages")
	if err != nil {
		return nil, err
	}
	for line := range strings.SplitSeq(body, "\n") {
		left, right, _ := strings.Cut(line, "->")
		words := strings.Fields(left)
		if len(words) < 2 || len(words) > 3 || len(words) == 3 && words[2] != "planned" {
			return nil, fmt.Errorf("ARCHITECTURE.md: %q is not: layer package [planned] [-> packages]", line)
		}
		layer := slices.Index(layers, words[0])
		if _, twice := p.packages[words[1]]; twice || layer < 0 {
			return nil, fmt.Errorf("ARCHITECTURE.md: %q: unknown layer, or drawn twice", line)
		}
		p.packages[words[1]] = drawn{layer, len(words) == 3, strings.Fields(right)}
	}
	for name, d := range p.packages {
		for _, to := range d.lateral {
			if other, ok := p.packages[to]; !ok || other.layer != d.layer {
				return nil, fmt.Errorf("ARCHITECTURE.md: %s -> %s: not drawn, or not of the same layer", name, to)
			}
		}
	}
	if body, err = block(page, "only"); err != nil {
		return nil, err
	}
	for line := range strings.SplitSeq(body, "\n") {
		words := strings.Fields(line)
		switch {
		case len(words) >= 3 && words[0] == "pure" && slices.Contains(layers, words[1]):
			p.pure[slices.Index(layers, words[1])] = words[2:]
		case len(words) >= 2 && p.only[words[0]] == nil:
			p.only[words[0]] = words[1:]
		default:
			return nil, fmt.Errorf("ARCHITECTURE.md: %q is not: import folders", line)
		}
	}
	return p, nil
}

// within reports whether folder is one of those listed.
func within(folder string, list []string) bool {
	return slices.ContainsFunc(list, func(l string) bool {
		tree, isTree := strings.CutSuffix(l, "/...")
		return folder == tree || isTree && strings.HasPrefix(folder, tree+"/")
	})
}

func below(importPath, prefix string) bool {
	return importPath == prefix || strings.HasPrefix(importPath, prefix+"/")
}

func standard(importPath string) bool {
	first, _, _ := strings.Cut(importPath, "/")
	return !strings.Contains(first, ".")
}

// check compares the picture with the imports of each package (folder → import paths, tests left out).
func (p *picture) check(code map[string][]string) (faults []string) {
	fault := func(format string, args ...any) { faults = append(faults, fmt.Sprintf(format, args...)) }
	for name, d := range p.packages {
		if _, exists := code[name]; !exists && !d.planned {
			fault("%s is in the picture, does not exist, and is not marked planned", name)
		}
	}
	for from, imports := range code {
		d, ok := p.packages[from]
		if !ok {
			fault("%s is not in the picture: draw it in ARCHITECTURE.md", from)
			continue
		}
		for _, imp := range imports {
			for what, where := range p.only {
				if below(imp, what) && !within(from, where) {
					fault("%s imports %s, which belongs to %s only", from, imp, strings.Join(where, ", "))
				}
			}
			to, ours := strings.CutPrefix(imp, module+"/")
			if !ours {
				modules, pure := p.pure[d.layer]
				if pure && !standard(imp) && !slices.ContainsFunc(modules, func(m string) bool { return below(imp, m) }) {
					fault("%s imports %s: the layer %s is pure", from, imp, layers[d.layer])
				}
				continue
			}
			other, drawn := p.packages[to]
			switch {
			case !drawn: // told above
			case other.layer > d.layer:
				fault("%s (%s) imports %s (%s): the arrow points up", from, layers[d.layer], to, layers[other.layer])
			case other.layer == d.layer && !slices.Contains(d.lateral, to):
				fault("%s imports %s, both %s: an arrow that is not drawn", from, to, layers[d.layer])
			}
		}
	}
	slices.Sort(faults)
	return faults
}

// goList answers the imports of every package of the module.
func goList(t *testing.T) map[string][]string {
	t.Helper()
	if _, err := exec.LookPath("go"); err != nil {
		t.Skip("the go command is not installed")
	}
	cmd := exec.CommandContext(t.Context(), "go", "list", "-e", "-json=ImportPath,Imports,GoFiles,CgoFiles", "./...")
	cmd.Dir = root
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v: %s", err, stderr.Bytes())
	}
	code := map[string][]string{}
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p struct {
			ImportPath                 string
			Imports, GoFiles, CgoFiles []string
		}
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return code
		} else if err != nil {
			t.Fatal(err)
		}
		folder := strings.TrimPrefix(p.ImportPath, module+"/")
		if folder != pins && len(p.GoFiles)+len(p.CgoFiles) > 0 {
			code[folder] = p.Imports
		}
	}
}

func thePicture(t *testing.T) *picture {
	t.Helper()
	page, err := os.ReadFile(filepath.Join(root, "ARCHITECTURE.md"))
	if err != nil {
		t.Fatal(err)
	}
	p, err := parsePicture(string(page))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestPicture(t *testing.T) {
	t.Parallel()
	p, code := thePicture(t), goList(t)
	if len(code) < 5 {
		t.Fatalf("go list found %d packages", len(code))
	}
	for _, f := range p.check(code) {
		t.Error(f)
	}
	for name, d := range p.packages {
		if _, exists := code[name]; exists && d.planned {
			t.Logf("%s exists: it need no longer be marked planned", name)
		}
	}
}

// Every package has its sentence in the table.
func TestSentences(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile(filepath.Join(root, "ARCHITECTURE.md"))
	if err != nil {
		t.Fatal(err)
	}
	told := map[string]bool{}
	for line := range strings.SplitSeq(string(page), "\n") {
		if cells := strings.Split(line, "|"); len(cells) == 4 && strings.TrimSpace(cells[2]) != "" {
			for name := range strings.SplitSeq(cells[1], ",") {
				told[strings.TrimSpace(name)] = true
			}
		}
	}
	for name := range thePicture(t).packages {
		if !told[name] {
			t.Errorf("%s has no sentence in ARCHITECTURE.md", name)
		}
	}
}

// clockCalls finds where a file reads or sets the wall clock: time.Now, called or handed on, and the system calls. A
// line that ends in the comment "// interval" is excused for time.Now. time.Since and time.Until are not looked for:
// they need a time.Time, which comes from time.Now on a line that was, or from a clock's date, whose difference to now
// the compiler cannot tell from an interval; reviewers must.
func clockCalls(name string, src []byte) ([]string, error) {
	fset := token.NewFileSet()
	file, err := parser.ParseFile(fset, name, src, parser.ParseComments)
	if err != nil {
		return nil, err
	}
	excused := map[int]bool{}
	for _, g := range file.Comments {
		for _, c := range g.List {
			if text := strings.TrimSpace(strings.TrimPrefix(c.Text, "//")); text == "interval" || strings.HasPrefix(text, "interval:") {
				excused[fset.Position(c.Pos()).Line] = true
			}
		}
	}
	imported := map[string]string{} // local name → import path
	for _, imp := range file.Imports {
		p, err := strconv.Unquote(imp.Path.Value)
		if err != nil {
			return nil, err
		}
		local := path.Base(p)
		if imp.Name != nil {
			local = imp.Name.Name
		}
		imported[local] = p
	}
	var found []string
	if imported["."] == "time" {
		found = append(found, name+": imports time by dot, which hides time.Now")
	}
	for _, d := range file.Decls {
		if f, ok := d.(*ast.FuncDecl); ok && f.Body != nil {
			for _, n := range dates(fset, f.Body, excused) {
				at := fset.Position(n.Pos())
				found = append(found, fmt.Sprintf("%s:%d: the date of an interval's end", at.Filename, at.Line))
			}
		}
	}
	ast.Inspect(file, func(n ast.Node) bool {
		sel, ok := n.(*ast.SelectorExpr)
		if !ok {
			return true
		}
		id, ok := sel.X.(*ast.Ident)
		if !ok {
			return true
		}
		at := fset.Position(sel.Pos())
		switch from := imported[id.Name]; {
		case from == "time" && sel.Sel.Name == "Now" && !excused[at.Line]:
		case (from == "syscall" || from == "golang.org/x/sys/unix") && slices.Contains(clockSyscalls, sel.Sel.Name):
		default:
			return true
		}
		found = append(found, fmt.Sprintf("%s:%d: %s.%s", at.Filename, at.Line, id.Name, sel.Sel.Name))
		return true
	})
	return found, nil
}

// dates finds where a function takes the date of a time that it has for an interval: a step of the clock is in it.
func dates(fset *token.FileSet, body *ast.BlockStmt, interval map[int]bool) (found []ast.Node) {
	ends := map[string]bool{}
	ast.Inspect(body, func(n ast.Node) bool {
		if a, ok := n.(*ast.AssignStmt); ok && interval[fset.Position(a.End()).Line] {
			for _, l := range a.Lhs {
				if id, ok := l.(*ast.Ident); ok {
					ends[id.Name] = true
				}
			}
		}
		return true
	})
	ast.Inspect(body, func(n ast.Node) bool {
		sel, ok := n.(*ast.SelectorExpr)
		if !ok || !strings.HasPrefix(sel.Sel.Name, "Unix") && sel.Sel.Name != "Format" && sel.Sel.Name != "UTC" {
			return true
		}
		for x := sel.X; ; {
			switch at := x.(type) {
			case *ast.CallExpr:
				x = at.Fun
			case *ast.SelectorExpr:
				x = at.X
			case *ast.Ident:
				if ends[at.Name] {
					found = append(found, sel)
				}
				return true
			default:
				return true
			}
		}
	})
	return found
}

var clockSyscalls = []string{"Adjtime", "Adjtimex", "ClockAdjtime", "ClockGetres", "ClockGettime", "ClockSettime",
	"Gettimeofday", "Settimeofday", "Time"}

// All Go files are read, those of other systems too, except tests and nested modules.
func TestClock(t *testing.T) {
	t.Parallel()
	where := thePicture(t).only["clock"]
	files := 0
	err := filepath.WalkDir(root, func(p string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		folder, err := filepath.Rel(root, p)
		if err != nil {
			return err
		}
		if e.IsDir() {
			nested := false
			if p != root {
				_, err := os.Stat(filepath.Join(p, "go.mod"))
				nested = err == nil
			}
			if nested || e.Name() == "testdata" || folder != "." && strings.HasPrefix(e.Name(), ".") || folder == "out" || folder == "build" {
				return filepath.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(p, ".go") || strings.HasSuffix(p, "_test.go") || within(filepath.ToSlash(filepath.Dir(folder)), where) {
			return nil
		}
		src, err := os.ReadFile(p)
		if errors.Is(err, fs.ErrNotExist) { // an editor's passing file
			return nil
		}
		if err != nil {
			return err
		}
		files++
		calls, err := clockCalls(filepath.ToSlash(folder), src)
		if err != nil {
			return err
		}
		for _, c := range calls {
			t.Errorf("%s: the clock belongs to %s; take a clock as argument, or mark an interval with // interval", c, strings.Join(where, ", "))
		}
		return nil
	})
	if err != nil || files < 20 {
		t.Errorf("%d files read, %v", files, err)
	}
}

// The checker itself must be able to say no.
func TestCheckerFindsFaults(t *testing.T) {
	t.Parallel()
	const page = "\n```packages\nwiring w\nadapters a -> b\nadapters b\nservices s planned\nformats f\nformats g\n```\n" +
		"\n```only\nclock f\nC a\ndatabase/sql a/...\npure formats good.org/m\n```\n"
	p, err := parsePicture(page)
	if err != nil {
		t.Fatal(err)
	}
	good := func() map[string][]string {
		return map[string][]string{
			"w": {"yinjian/a", "yinjian/f", "fmt"},
			"a": {"yinjian/b", "yinjian/f", "C", "database/sql", "database/sql/driver", "bad.org/x"},
			"b": {"os"},
			"f": {"crypto/sha256", "good.org/m/n"},
			"g": {},
		}
	}
	if faults := p.check(good()); len(faults) != 0 {
		t.Errorf("the good case has %q", faults)
	}
	for name, tt := range map[string]struct {
		change func(map[string][]string)
		want   string
	}{
		"arrow up":             {func(c map[string][]string) { c["f"] = []string{"yinjian/a"} }, "points up"},
		"lateral":              {func(c map[string][]string) { c["b"] = []string{"yinjian/a"} }, "not drawn"},
		"lateral formats":      {func(c map[string][]string) { c["f"] = []string{"yinjian/g"} }, "not drawn"},
		"service on adapter":   {func(c map[string][]string) { c["s"] = []string{"yinjian/b"} }, "points up"},
		"unknown package":      {func(c map[string][]string) { c["x"] = nil }, "not in the picture"},
		"missing package":      {func(c map[string][]string) { delete(c, "b") }, "does not exist"},
		"SQL elsewhere":        {func(c map[string][]string) { c["b"] = []string{"database/sql"} }, "belongs to"},
		"SQL's driver too":     {func(c map[string][]string) { c["w"] = []string{"database/sql/driver"} }, "belongs to"},
		"cgo elsewhere":        {func(c map[string][]string) { c["b"] = []string{"C"} }, "belongs to"},
		"impure format":        {func(c map[string][]string) { c["g"] = []string{"bad.org/x"} }, "pure"},
		"prefix is not a path": {func(c map[string][]string) { c["g"] = []string{"good.org/mm"} }, "pure"},
	} {
		c := good()
		tt.change(c)
		faults := p.check(c)
		if len(faults) != 1 || !strings.Contains(faults[0], tt.want) {
			t.Errorf("%s: %q, want one fault with %q", name, faults, tt.want)
		}
	}
	for name, bad := range map[string]string{
		"no block":       "nothing",
		"unknown layer":  strings.Replace(page, "wiring w", "attic w", 1),
		"drawn twice":    strings.Replace(page, "formats g", "formats f", 1),
		"arrow nowhere":  strings.Replace(page, "-> b", "-> z", 1),
		"arrow not flat": strings.Replace(page, "-> b", "-> f", 1),
		"odd mark":       strings.Replace(page, "planned", "someday", 1),
		"only nothing":   strings.Replace(page, "C a", "C", 1),
	} {
		if _, err := parsePicture(bad); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
}

func TestClockCallsFindsFaults(t *testing.T) {
	t.Parallel()
	const head = "package x\nimport (\n\"time\"\nclock \"time\"\n\"golang.org/x/sys/unix\"\n)\nvar _ = clock.Second\nvar _ = time.Second\nvar _ unix.Errno\n"
	for name, tt := range map[string]struct {
		line string
		want int
	}{
		"call":               {"var a = time.Now()", 1},
		"handed on":          {"var a = time.Now", 1},
		"renamed import":     {"var a = clock.Now()", 1},
		"interval":           {"var a = time.Now() // interval", 0},
		"interval, reason":   {"var a = time.Now() // interval: a deadline", 0},
		"other comment":      {"var a = time.Now() // not an interval", 1},
		"comment above":      {"// interval\nvar a = time.Now()", 1},
		"system call":        {"var a = unix.ClockGettime(0, nil)", 1},
		"system call, said":  {"var a = unix.ClockGettime(0, nil) // interval", 1},
		"an interval's date": {"func f() int64 {\na := time.Now() // interval\nreturn a.Add(time.Second).UnixNano()\n}", 1},
		"another date":       {"func f(b time.Time) int64 {\na := time.Now() // interval\n_ = a\nreturn b.UnixNano()\n}", 0},
		"somebody's own Now": {"var t T; var a = t.Now()", 0},
		"words":              {"var a = \"time.Now()\"", 0},
	} {
		got, err := clockCalls("x.go", []byte(head+tt.line+"\n"))
		if err != nil || len(got) != tt.want {
			t.Errorf("%s: %q, %v, want %d", name, got, err, tt.want)
		}
	}
}

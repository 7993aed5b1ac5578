package main

import (
	"bytes"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const verdictPage = "../../../docs/verdict.md"

func page(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile(verdictPage)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// fenced is the content of the first fenced block in that language.
func fenced(t *testing.T, language string) string {
	t.Helper()
	_, rest, found := strings.Cut(page(t), "\n```"+language+"\n")
	body, _, closed := strings.Cut(rest, "\n```")
	if !found || !closed {
		t.Fatalf("no block of %s", language)
	}
	return body + "\n"
}

// checkNames are the values of the constants Check… that a package declares.
func checkNames(t *testing.T, dir string) (names []string) {
	t.Helper()
	pkgs, err := parser.ParseDir(token.NewFileSet(), dir, func(f fs.FileInfo) bool { return !strings.HasSuffix(f.Name(), "_test.go") }, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range pkgs {
		for _, f := range p.Files {
			ast.Inspect(f, func(n ast.Node) bool {
				spec, ok := n.(*ast.ValueSpec)
				if !ok || len(spec.Names) != 1 || len(spec.Values) != 1 || !strings.HasPrefix(spec.Names[0].Name, "Check") {
					return true
				}
				if lit, ok := spec.Values[0].(*ast.BasicLit); ok && lit.Kind == token.STRING {
					name, err := strconv.Unquote(lit.Value)
					if err != nil {
						t.Fatal(err)
					}
					names = append(names, name)
				}
				return true
			})
		}
	}
	if len(names) == 0 {
		t.Fatalf("%s declares no checks", dir)
	}
	return names
}

// The page explains every check that a report can hold, and none that it cannot.
func TestPageExplainsEveryCheck(t *testing.T) {
	t.Parallel()
	want := map[string]bool{}
	for _, name := range checkNames(t, "../../evidence") {
		want[name] = true
	}
	for _, name := range checkNames(t, "../../assess") {
		want[name] = true
	}
	for _, name := range checkNames(t, "../../cms") {
		want["signature."+name], want["token."+name] = true, true
	}
	for _, name := range checkNames(t, "../../../tsa") {
		want["token."+name] = true
	}
	for _, name := range checkNames(t, "../../pki") {
		if strings.HasPrefix(name, "path.") {
			want["signer."+name], want["tsa."+name] = true, true
		}
	}
	got := map[string]bool{}
	quoted := regexp.MustCompile("`([a-z0-9.-]+)`")
	for line := range strings.SplitSeq(page(t), "\n") {
		cells := strings.Split(line, " | ")
		if !strings.HasPrefix(line, "| `") {
			continue
		}
		if len(cells) != 4 || strings.ContainsFunc(strings.Join(cells[1:], ""), func(r rune) bool { return r == '\n' }) {
			t.Errorf("not four cells: %s", line)
		}
		for _, m := range quoted.FindAllStringSubmatch(cells[0], -1) {
			if got[m[1]] {
				t.Errorf("%s is explained twice", m[1])
			}
			got[m[1]] = true
		}
	}
	for _, name := range slices.Sorted(maps.Keys(want)) {
		if !got[name] {
			t.Errorf("%s is not explained", name)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(got)) {
		if !want[name] {
			t.Errorf("%s is explained, and there is no such check", name)
		}
	}
	// And what reports do hold, is among them.
	for _, args := range [][]string{
		{"--log-key", v1 + "log.pem", v1 + "evidence.json"}, {"--log-key", v1 + "log.pem", "--document", v1 + "record.xml", v1 + "evidence-cms.json"},
		{"--log-key", v1 + "log.pem", v1 + "record.xml"}, {"--cms", v1 + "signature.cms"}, {"--cms", v1 + "record.xml"}, {"--token", v1 + "token-rsa.tsr"},
		{"--raw", v1 + "signature.der", "--certificate", v1 + "signer.pem"},
	} {
		_, r := judge(t, append([]string{"--anchors", v1}, args...)...)
		for _, c := range r.Checks {
			if !want[c.ID] {
				t.Errorf("%v: %s is not declared as a constant", args, c.ID)
			}
		}
	}
}

// The example on the page is what the program prints.
func TestPageExample(t *testing.T) {
	t.Parallel()
	var out, errs bytes.Buffer
	args := []string{"--anchors", v1, "--log-key", v1 + "log.pem", "--document", v1 + "record.xml", v1 + "evidence-cms.json"}
	if status := run(args, strings.NewReader(""), &out, &errs); status != 0 {
		t.Fatalf("status %d: %s", status, &errs)
	}
	if got, want := out.String(), fenced(t, "text"); got != want {
		t.Errorf("printed:\n%s\ndocs/verdict.md:\n%s", got, want)
	}
}

// The page's commands are run as they stand there, and notice what was changed.
func TestPageCommands(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("openssl"); err != nil {
		t.Skip("openssl is not installed")
	}
	script := fenced(t, "sh")
	for name, change := range map[string]struct{ file, old, new string }{
		"as it is":              {},
		"document":              {"record.xml", "0/9", "1/9"},
		"recorded digest":       {"evidence.json", `"digest": "8`, `"digest": "9`},
		"checkpoint's text":     {"evidence.json", `"checkpoint": "eWlu`, `"checkpoint": "eWlv`},
		"proof":                 {"evidence.json", "\"inclusion\": [\n      \"", "\"inclusion\": [\n      \"AAAA"},
		"place in the log":      {"evidence.json", `"sequence": 15`, `"sequence": 14`},
		"authorisation":         {"evidence.json", `"authorization": "eyJ2`, `"authorization": "eyJ3`},
		"signature and its end": {"evidence.json", "\"value\": \"MEU", "\"value\": \"MEV"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			for _, f := range []string{"evidence.json", "record.xml", "ca.pem", "log.pem"} {
				b, err := os.ReadFile(v1 + f)
				if err != nil {
					t.Fatal(err)
				}
				if f == change.file {
					changed := bytes.Replace(b, []byte(change.old), []byte(change.new), 1)
					if bytes.Equal(changed, b) {
						t.Fatalf("%s has no %s", f, change.old)
					}
					b = changed
				}
				if err := os.WriteFile(filepath.Join(dir, f), b, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			cmd := exec.Command("sh", "-c", script)
			cmd.Dir = dir
			out, err := cmd.CombinedOutput()
			if (err == nil) != (change.file == "") || (err == nil) != strings.Contains(string(out), "all of it holds") {
				t.Errorf("%v:\n%s", err, out)
			}
		})
	}
}

package main

import (
	"bytes"
	"encoding/json"
	"io"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode"
)

const root = "../.."

// The pages that are generated are what is generated.
func TestPagesAreCurrent(t *testing.T) {
	for name, write := range map[string]func(io.Writer) error{
		"api.md":           func(w io.Writer) error { return writeAPI(w, filepath.Join(root, "api/openapi.json")) },
		"configuration.md": func(w io.Writer) error { return writeConfiguration(w, root) },
		"third-party.md":   func(w io.Writer) error { return writeLicences(w, root) },
	} {
		var b bytes.Buffer
		if err := write(&b); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if page, err := os.ReadFile(filepath.Join(root, "docs", name)); err != nil || !bytes.Equal(page, b.Bytes()) {
			t.Errorf("docs/%s is not what is generated (%v): run make docs", name, err)
		}
	}
}

// Each module that go.mod wants and that is in the product is in the list of parts, with its sum, and the list is the same
// each time.
func TestSBOM(t *testing.T) {
	var a, b bytes.Buffer
	for _, w := range []*bytes.Buffer{&a, &b} {
		if err := writeSBOM(w, root); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(a.Bytes(), b.Bytes()) {
		t.Error("two lists of parts differ")
	}
	var bom struct {
		BOMFormat, SpecVersion string
		Components             []struct {
			Name, Version, Purl string
			Licenses            []any
			Properties          []struct{ Name, Value string }
		}
	}
	if err := json.Unmarshal(a.Bytes(), &bom); err != nil {
		t.Fatal(err)
	}
	sums, err := os.ReadFile(filepath.Join(root, "go.sum"))
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]bool{}
	for _, c := range bom.Components {
		found[c.Name] = true
		if len(c.Properties) != 1 || !strings.Contains(string(sums), c.Name+" "+c.Version+" "+c.Properties[0].Value+"\n") {
			t.Errorf("%s %s: the sum is not go.sum's: %v", c.Name, c.Version, c.Properties)
		}
		if len(c.Licenses) == 0 || c.Purl != "pkg:golang/"+c.Name+"@"+c.Version {
			t.Errorf("%s: licences %v, purl %q", c.Name, c.Licenses, c.Purl)
		}
	}
	for _, fixed := range []string{"github.com/miekg/pkcs11", "github.com/emmansun/gmsm", "github.com/labstack/echo/v4", "github.com/beevik/ntp", "github.com/sirupsen/logrus"} {
		if !found[fixed] {
			t.Errorf("%s is not listed", fixed)
		}
	}
	if found["github.com/google/licensecheck"] || found["github.com/getkin/kin-openapi"] || found["yinjian"] {
		t.Error("something is listed that is not part of the programs")
	}
}

// Every module of the product has a row that says where it comes from, and every row is of one that is in the product.
func TestOrigins(t *testing.T) {
	parts, err := productParts(root)
	if err != nil {
		t.Fatal(err)
	}
	page, err := os.ReadFile(filepath.Join(root, "docs", "xinchuang.md"))
	if err != nil {
		t.Fatal(err)
	}
	used := map[string]bool{}
	for _, m := range regexp.MustCompile("(?m)^\\| `([^`]+)` \\|").FindAllStringSubmatch(string(page), -1) {
		used[m[1]] = false
	}
	for _, p := range parts {
		found := false
		for folder := p.Path; folder != "."; folder = path.Dir(folder) {
			if _, ok := used[folder]; ok {
				used[folder], found = true, true
			}
		}
		if !found {
			t.Errorf("docs/xinchuang.md does not say where %s comes from", p.Path)
		}
	}
	for row, ok := range used {
		if !ok {
			t.Errorf("docs/xinchuang.md has %s, which is no part", row)
		}
	}
}

func TestReport(t *testing.T) {
	const lines = `{"Time":"2026-01-02T03:04:05Z","Action":"start","Package":"yinjian/a"}
{"Time":"2026-01-02T03:04:05Z","Action":"pass","Package":"yinjian/a","Test":"TestOne","Elapsed":1}
{"Time":"2026-01-02T03:04:06Z","Action":"output","Package":"yinjian/a","Test":"TestTwo","Output":"    a_test.go:3: needs <root>\n"}
{"Time":"2026-01-02T03:04:06Z","Action":"output","Package":"yinjian/a","Test":"TestTwo","Output":"--- SKIP: TestTwo (0.00s)\n"}
{"Time":"2026-01-02T03:04:06Z","Action":"skip","Package":"yinjian/a","Test":"TestTwo"}
{"Time":"2026-01-02T03:04:07Z","Action":"pass","Package":"yinjian/a","Elapsed":2}
{"Time":"2026-01-02T03:04:07Z","Action":"skip","Package":"yinjian/none","Elapsed":0}
`
	page := func(in string) string {
		var b bytes.Buffer
		if err := writeReport(&b, strings.NewReader(in)); err != nil {
			t.Fatal(err)
		}
		return b.String()
	}
	good := page(lines)
	for _, want := range []string{"通过 passed：2 个包，通过 1，失败 0，跳过 1", "TestTwo：a_test.go:3: needs &lt;root&gt;", "无测试 no tests", "历时 2s"} {
		if !strings.Contains(good, want) {
			t.Errorf("the page has no %q:\n%s", want, good)
		}
	}
	failed := page(lines + `{"Time":"2026-01-02T03:04:08Z","Action":"fail","Package":"yinjian/b","Test":"TestX"}
{"Time":"2026-01-02T03:04:08Z","Action":"fail","Package":"yinjian/b","Elapsed":1}`)
	if !strings.Contains(failed, "FAILED") || !strings.Contains(failed, `<span class="bad">TestX</span>`) {
		t.Errorf("a failure does not show:\n%s", failed)
	}
	if cut := page(lines + `{"Time":"2026-01-02T03:04:08Z","Action":"pass","Package":"yinjian/c","Test":"TestY"}`); !strings.Contains(cut, "FAILED") {
		t.Error("a package without an end does not show")
	}
	for _, bad := range []string{"", "ok  yinjian/a 1.2s\n"} {
		if err := writeReport(io.Discard, strings.NewReader(bad)); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}

var (
	mdLink  = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	heading = regexp.MustCompile(`(?m)^#+ +(.*)$`)
	fenced  = regexp.MustCompile("(?ms)^ *```.*?^ *```")
)

// Links between pages lead somewhere: to a file of the repository, and to a heading that the page has.
func TestLinks(t *testing.T) {
	var pages []string
	err := filepath.WalkDir(root, func(name string, d os.DirEntry, err error) error {
		if d != nil && d.IsDir() && slices.Contains([]string{".git", "build", "out", "node_modules"}, d.Name()) {
			return filepath.SkipDir
		}
		if strings.HasSuffix(name, ".md") {
			pages = append(pages, name)
		}
		return err
	})
	if err != nil || len(pages) < 30 {
		t.Fatalf("%d pages, %v", len(pages), err)
	}
	read := func(name string) string {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		return fenced.ReplaceAllString(string(b), "")
	}
	links := 0
	for _, page := range pages {
		for _, m := range mdLink.FindAllStringSubmatch(read(page), -1) {
			target, fragment, _ := strings.Cut(m[1], "#")
			if strings.Contains(target, "://") || strings.HasPrefix(target, "mailto:") {
				continue
			}
			links++
			file := filepath.Join(filepath.Dir(page), target)
			if target == "" {
				file = page
			}
			if _, err := os.Stat(file); err != nil {
				t.Errorf("%s: %s leads nowhere", page, m[1])
				continue
			}
			if fragment != "" && strings.HasSuffix(file, ".md") && !slices.Contains(anchors(read(file)), fragment) {
				t.Errorf("%s: %s has no heading for #%s", page, file, fragment)
			}
		}
	}
	if links < 150 {
		t.Errorf("only %d links were found", links)
	}
}

// Every page is in the list of pages, and the list names the folders that the picture has.
func TestPagesAreListed(t *testing.T) {
	list, err := os.ReadFile(filepath.Join(root, "docs", "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	pages, err := filepath.Glob(filepath.Join(root, "docs", "*.md"))
	if err != nil || len(pages) < 25 {
		t.Fatalf("%d pages, %v", len(pages), err)
	}
	for _, page := range pages {
		if name := filepath.Base(page); name != "README.md" && !strings.Contains(string(list), "]("+name+")") {
			t.Errorf("docs/README.md does not list %s", name)
		}
	}
}

// The design names every package of the services and formats, by itself or as what lies below another.
func TestDesignNamesPackages(t *testing.T) {
	page, err := os.ReadFile(filepath.Join(root, "ARCHITECTURE.md"))
	if err != nil {
		t.Fatal(err)
	}
	design, err := os.ReadFile(filepath.Join(root, "docs", "design.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, block, _ := strings.Cut(string(page), "\n```packages\n")
	block, _, _ = strings.Cut(block, "\n```")
	packages := 0
	for line := range strings.Lines(block) {
		words := strings.Fields(line)
		if words[0] == "tests" || strings.Contains(words[1], "internal/") || strings.HasPrefix(words[1], "packaging/") {
			continue
		}
		packages++
		named := false
		for folder := words[1]; folder != "." && !named; folder = path.Dir(folder) {
			named = folder != "appliance" && strings.Contains(string(design), "`"+folder+"`") || folder == words[1] && strings.Contains(string(design), "`"+folder+"`")
		}
		if !named {
			t.Errorf("docs/design.md does not name %s", words[1])
		}
	}
	if packages < 40 {
		t.Errorf("only %d packages were found", packages)
	}
}

// anchors are what a page's headings are called in links.
func anchors(page string) (out []string) {
	for _, m := range heading.FindAllStringSubmatch(page, -1) {
		out = append(out, strings.Map(func(r rune) rune {
			switch {
			case r == ' ':
				return '-'
			case r == '-' || r == '_' || unicode.IsLetter(r) || unicode.IsDigit(r):
				return r
			}
			return -1
		}, strings.ToLower(strings.TrimSpace(m[1]))))
	}
	return out
}

package console_test

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// Every page that the documents name is one that the console has, for somebody.
func TestDocumentedPages(t *testing.T) {
	t.Parallel()
	s := newConsole(t, &clinic{signers: 20}, nil)
	pages, err := filepath.Glob("../../docs/*.md")
	if err != nil || len(pages) < 30 {
		t.Fatalf("%d pages, %v", len(pages), err)
	}
	tried := map[string]bool{}
	for _, page := range append(pages, "../../README.md", "../../README.zh-CN.md") {
		b, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		for _, at := range regexp.MustCompile("/console/[a-z0-9/-]*").FindAllString(string(b), -1) {
			there, known := tried[at]
			for _, role := range []string{"", "system", "security", "audit", "operator"} {
				if there || known {
					break
				}
				r, _ := get(t, s, role, at)
				there = r.StatusCode == 200
			}
			if tried[at] = there; !there {
				t.Errorf("%s names %s, which nobody gets", filepath.Base(page), at)
			}
		}
	}
	if len(tried) < 15 || !tried["/console/signers/new"] {
		t.Errorf("only %d pages were tried", len(tried))
	}
	if r, _ := get(t, s, "system", "/console/nowhere"); r.StatusCode == 200 || strings.Contains(r.Request.URL.Path, "login") {
		t.Error("a page that is not there is answered")
	}
}

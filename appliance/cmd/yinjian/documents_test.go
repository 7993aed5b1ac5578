package main

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

// Every command that a page shows, in a line or in a block, is one that the program has, with the flags that it has.
func TestDocumentedCommands(t *testing.T) {
	t.Parallel()
	top := filepath.Join("..", "..", "..")
	pages, err := filepath.Glob(filepath.Join(top, "docs", "*.md"))
	if err != nil || len(pages) < 20 {
		t.Fatalf("%d pages, %v", len(pages), err)
	}
	pages = append(pages, filepath.Join(top, "README.md"), filepath.Join(top, "README.zh-CN.md"), filepath.Join(top, "CHANGELOG.md"))
	shown := 0
	for _, page := range pages {
		if filepath.Base(page) == "cli.md" {
			continue // written by the program
		}
		b, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		for _, line := range commandLines(string(b)) {
			shown++
			if why := wrongCommand(line); why != "" {
				t.Errorf("%s: %s: %s", filepath.Base(page), line, why)
			}
		}
	}
	if shown < 200 {
		t.Errorf("only %d commands were found", shown)
	}
	for _, bad := range []string{"yinjian db sweeep", "yinjian backup create --dir D --too F", "yinjian signer list extra-word --all-of-them"} {
		if wrongCommand(bad) == "" {
			t.Errorf("%q is taken", bad)
		}
	}
}

var (
	inline   = regexp.MustCompile("`(?:build/)?(yinjian [a-z][^`]*)`")
	inBlock  = regexp.MustCompile(`(?m)^\s*(?:sudo |\$ )?(?:build/)?(yinjian [a-z].*)$`)
	flagWord = regexp.MustCompile(`^-(?:-([a-z][a-z0-9-]*)|([a-zA-Z]))(?:=.*)?$`)
)

// commandLines are the calls of the program that a page shows. A line that ends in a backslash goes on.
func commandLines(page string) (out []string) {
	page = strings.ReplaceAll(page, "\\\n", " ")
	var prose strings.Builder
	for i, part := range strings.Split(page, "```") {
		if i%2 == 0 {
			prose.WriteString(part)
			continue
		}
		for _, m := range inBlock.FindAllStringSubmatch(part, -1) {
			line, _, _ := strings.Cut(m[1], " #")
			out = append(out, strings.TrimSpace(line))
		}
	}
	for _, m := range inline.FindAllStringSubmatch(prose.String(), -1) {
		out = append(out, strings.Join(strings.Fields(m[1]), " "))
	}
	return out
}

// wrongCommand says what is wrong with a call. "a|b" as a word stands for several calls; a word that is no subcommand is an
// argument, which only a command without subcommands takes.
func wrongCommand(line string) string {
	words := strings.Fields(line)[1:]
	for i, w := range words {
		if strings.HasPrefix(w, "-") {
			break
		}
		if alternatives := strings.Split(w, "|"); len(alternatives) > 1 && regexp.MustCompile(`^[a-z|-]+$`).MatchString(w) {
			for _, one := range alternatives {
				if why := wrongCommand(strings.Join(append(append([]string{"yinjian"}, words[:i]...), append([]string{one}, words[i+1:]...)...), " ")); why != "" {
					return why
				}
			}
			return ""
		}
	}
	c := newRoot()
	rest := words
	for len(rest) > 0 {
		var next *cobra.Command
		for _, sub := range c.Commands() {
			if sub.Name() == rest[0] {
				next = sub
			}
		}
		if next == nil {
			break
		}
		c, rest = next, rest[1:]
	}
	if c == c.Root() || c.HasAvailableSubCommands() && len(rest) > 0 && regexp.MustCompile(`^[a-z][a-z-]*$`).MatchString(rest[0]) {
		return "no such command"
	}
	for _, w := range rest {
		m := flagWord.FindStringSubmatch(strings.Trim(w, "[](),，。；"))
		if m == nil {
			continue
		}
		if m[1] == "help" || m[1] != "" && c.Flags().Lookup(m[1]) != nil || m[1] == "" && c.Flags().ShorthandLookup(m[2]) != nil {
			continue
		}
		return "no flag " + w
	}
	return ""
}

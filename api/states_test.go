package api

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"
)

// TestStatesPage holds the table of docs/states.md against the matrix; -update writes it anew.
func TestStatesPage(t *testing.T) {
	t.Parallel()
	const name, from, to = "../docs/states.md", "<!-- states -->\n", "<!-- /states -->"
	var table strings.Builder
	table.WriteString("| 路由 route | 作用 |")
	for _, s := range States {
		fmt.Fprintf(&table, " %s |", s)
	}
	table.WriteString("\n| --- | --- |" + strings.Repeat(" --- |", len(States)) + "\n")
	for _, l := range matrix {
		if len(l.States) == 0 {
			continue
		}
		fmt.Fprintf(&table, "| `%s %s` | %s |", l.Method, l.Pattern, l.Title)
		for _, s := range States {
			if l.Answers(s) {
				table.WriteString(" ✓ |")
			} else {
				table.WriteString("  |")
			}
		}
		table.WriteString("\n")
	}
	page, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	head, rest, ok := strings.Cut(string(page), from)
	had, tail, ok2 := strings.Cut(rest, to)
	if !ok || !ok2 {
		t.Fatalf("%s has no place for the table", name)
	}
	if flag.Lookup("update").Value.String() == "true" {
		if err := os.WriteFile(name, []byte(head+from+table.String()+to+tail), 0o644); err != nil {
			t.Fatal(err)
		}
	} else if had != table.String() {
		t.Errorf("%s differs from the code; want:\n%s", name, &table)
	}
}

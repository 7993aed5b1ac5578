package api

import (
	"fmt"
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
	holdsTable(t, name, from, to, table.String())
}

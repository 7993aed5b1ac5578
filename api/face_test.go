package api

import (
	"cmp"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"yinjian/api/wire"
	"yinjian/appliance/problem"
)

// TestErrorsPage holds the table of docs/errors.md against faces; -update writes it anew.
func TestErrorsPage(t *testing.T) {
	t.Parallel()
	const name, from, to = "../docs/errors.md", "<!-- codes -->\n", "<!-- /codes -->"
	codes := make([]problem.Code, 0, len(faces))
	for code := range faces {
		codes = append(codes, code)
	}
	slices.SortFunc(codes, func(a, b problem.Code) int {
		return cmp.Or(cmp.Compare(faces[a].status, faces[b].status), cmp.Compare(a, b))
	})
	var table strings.Builder
	table.WriteString("| `code` | HTTP | 名称 | `retry` | `Retry-After` |\n| --- | --- | --- | --- | --- |\n")
	for _, code := range codes {
		f, after := faces[code], ""
		if f.after > 0 {
			after = fmt.Sprintf("≥ %d", f.after)
		}
		fmt.Fprintf(&table, "| `%s` | %d | %s | `%s` | %s |\n", code, f.status, f.title, f.retry, after)
	}
	holdsTable(t, name, from, to, table.String())
}

// holdsTable holds what a page has between two marks against what the code says; -update writes it anew.
func holdsTable(t *testing.T, name, from, to, table string) {
	t.Helper()
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
		if err := os.WriteFile(name, []byte(head+from+table+to+tail), 0o644); err != nil {
			t.Fatal(err)
		}
	} else if had != table {
		t.Errorf("%s differs from the code; want:\n%s", name, table)
	}
}

// What a status promises and what retry says must not contradict each other: clients of other makers know the status alone.
func TestRetryAgreesWithStatus(t *testing.T) {
	t.Parallel()
	for code, f := range faces {
		switch f.retry {
		case wire.RetryLater:
			if f.after == 0 || f.status != 408 && f.status != 429 && f.status != 503 {
				t.Errorf("%s: later, status %d, after %d s", code, f.status, f.after)
			}
		case wire.RetrySameKey:
			if f.status < 500 {
				t.Errorf("%s: the outcome of a %d is known", code, f.status)
			}
		case wire.RetryResign:
			if f.status != 401 {
				t.Errorf("%s: resign, status %d", code, f.status)
			}
		case wire.RetryNever, wire.RetryOperator:
			if f.after != 0 {
				t.Errorf("%s: %s, and Retry-After %d", code, f.retry, f.after)
			}
		default:
			t.Errorf("%s: retry %q", code, f.retry)
		}
	}
}

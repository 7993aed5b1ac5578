package main

import (
	"fmt"
	"strings"
	"testing"
)

// Columns begin one below the other as a terminal shows them, and nothing in a cell steers it.
func TestColumns(t *testing.T) {
	t.Parallel()
	var b strings.Builder
	c := &columns{to: &b}
	fmt.Fprintln(c, "名称 name\t状态\t原因")
	fmt.Fprintf(c, "%s\t%s\t%s\n", "b", "一致", "")
	fmt.Fprintf(c, "%s\t%s\t%s\n", "长名称的时间源", "x", "\x1b[2Jno\u202eanswer")
	c.flush()
	want := "" +
		"名称 name       状态  原因\n" +
		"b               一致  \n" +
		"长名称的时间源  x     ?[2Jno?answer\n"
	if b.String() != want {
		t.Errorf("got\n%swant\n%s", b.String(), want)
	}
}

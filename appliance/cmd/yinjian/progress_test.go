package main

import (
	"bytes"
	"strings"
	"testing"
	"time"
)

// On a terminal the bar is drawn over and ends full; elsewhere there is a line now and then, and always the last.
func TestProgress(t *testing.T) {
	t.Parallel()
	for _, terminal := range []bool{true, false} {
		var out bytes.Buffer
		p := &progress{to: &out, terminal: terminal, total: 40, begun: time.Now()}
		for range 20 {
			p.add(2)
		}
		p.end()
		said := out.String()
		if !strings.Contains(said, "2/40") || !strings.Contains(said, "40/40") {
			t.Errorf("terminal %v: first and last are missing: %q", terminal, said)
		}
		if terminal != strings.Contains(said, "\r[") || terminal != strings.Contains(said, strings.Repeat("█", 30)+"]") || !strings.HasSuffix(said, "\n") {
			t.Errorf("terminal %v: %q", terminal, said)
		}
	}
}

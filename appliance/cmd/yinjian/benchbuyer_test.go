package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The READMEs' table is what the results say: whoever types a number there, or measures without writing it down, is found.
func TestReadmeSaysWhatWasMeasured(t *testing.T) {
	t.Parallel()
	root := filepath.Join("..", "..", "..")
	b, err := readBuyer(filepath.Join(root, "bench", "results"))
	if err != nil {
		t.Fatal(err)
	}
	for file, chinese := range map[string]bool{"README.md": false, "README.zh-CN.md": true} {
		raw, err := os.ReadFile(filepath.Join(root, file))
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(raw), buyerBegin+"\n"+b.table(chinese)+buyerEnd) {
			t.Errorf("%s does not say what bench/results does: build/yinjian bench-buyer --readme README.md,README.zh-CN.md", file)
		}
	}
	if picture, err := os.ReadFile(filepath.Join(root, "bench", "results", "buyer.svg")); err != nil || string(picture) != string(b.picture()) {
		t.Errorf("buyer.svg is not that of the results: %v", err)
	}
}

// Each answer is that of its result, what has none is said, and only what lies between the marks is written.
func TestBuyer(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	readme, without := filepath.Join(dir, "README.md"), filepath.Join(dir, "other.md")
	err := errors.Join(
		os.WriteFile(readme, []byte("before\n"+buyerBegin+"\nold\n"+buyerEnd+"\nafter\n"), 0o600),
		os.WriteFile(without, []byte("no marks"), 0o600),
	)
	if err != nil {
		t.Fatal(err)
	}
	page := func() string {
		t.Helper()
		b, err := readBuyer(dir)
		if err == nil {
			err = b.write(readme)
		}
		if err != nil {
			t.Fatal(err)
		}
		raw, err := os.ReadFile(readme)
		if err != nil {
			t.Fatal(err)
		}
		b.picture() // of nothing, too
		return string(raw)
	}
	first := page()
	if strings.Count(first, "| not measured |") != 6 || strings.Contains(first, "old") || !strings.HasPrefix(first, "before\n") || !strings.HasSuffix(first, buyerEnd+"\nafter\n") {
		t.Errorf("without results: %s", first)
	}
	err = errors.Join(
		os.WriteFile(filepath.Join(dir, "load.json"), []byte(`{"users":500,"scenes":[{"name":"sign","samples":[
			{"users":500,"seconds":10,"all":{"requests":40000},"classes":{"sign":{"p50_ms":101,"p99_ms":202}}}]},
			{"name":"mix, long","samples":[{"seconds":600,"all":{"requests":1234,"documents":2345,"errors":{"timeout":3}},"classes":{"sign":{"p99_ms":303}}}]}]}`), 0o600),
		os.WriteFile(filepath.Join(dir, "bench.json"), []byte(`{"cases":[{"name":"csign","samples":[{"ops":30000,"seconds":1}]},{"name":"stamped-1","samples":[{"ops":1,"seconds":1,"p50_ms":0.75,"p99_ms":1.25}]}]}`), 0o600),
		os.WriteFile(filepath.Join(dir, "capacity.json"), []byte(`{"most_a_second":1000,"staff_of_that":150000,"staff":6300,"each":60,"day":378000,"peak_a_second":41,"users":500,"error":0.25}`), 0o600),
		os.WriteFile(filepath.Join(dir, "soak.json"), []byte(`{"seconds":600,"faults":[{"fault":"a"},{"fault":"b"}],"severe":[],"acknowledged":77,"found_in_journal":76}`), 0o600),
	)
	if err != nil {
		t.Fatal(err)
	}
	second := page()
	for _, want := range []string{
		"**4000 a second** (4000 – 4000); p50 101 ms, p99 202 ms", "10 minutes: 1234 requests, 2345 documents, **3 errors**; sign p99 303 ms", "p50 0.75 ms, p99 1.25 ms",
		"| 30000 a second", "1000 stamped signatures a second, that is 150000 staff", "378000 a day, 41 a second in the busiest minute, are 4.1 % of it",
		"errs by +25 % against the run of 500 users", "2 faults, **76 found of 77 acknowledged**",
	} {
		if !strings.Contains(second, want) {
			t.Errorf("no %q in\n%s", want, second)
		}
	}
	err = os.WriteFile(filepath.Join(dir, "soak.json"), []byte(`{"seconds":600,"faults":[{"fault":"a"},{"fault":"b"}],"severe":[],"acknowledged":77,"found_in_journal":77}`), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if third := page(); !strings.Contains(third, "2 faults in 10 minutes: 0 severe failures, all 77 acknowledged signatures found") {
		t.Errorf("a soak in which nothing was lost: %s", third)
	}
	if err := (&buyer{}).write(without); err == nil {
		t.Error("a file without marks is written to")
	}
}

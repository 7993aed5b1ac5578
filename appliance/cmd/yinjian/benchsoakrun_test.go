package main_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
)

// The soak in small: some things are broken, everything is back, and every acknowledged record is where it was said to be.
func TestSoak(t *testing.T) {
	t.Parallel()
	if found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/initdb"); len(found) == 0 {
		t.Skip("PostgreSQL is not installed: packaging/dev/deps.sh test")
	}
	results := tempDir(t)
	mustRun(t, "bench-soak", "--dir", filepath.Join(tempDir(t), "soak"), "--for", "12s", "--users", "4", "--signers", "2", "--volume-gb", "1", "--results", results)
	raw, err := os.ReadFile(filepath.Join(results, "soak.json"))
	if err != nil {
		t.Fatal(err)
	}
	var found struct {
		Acknowledged int64
		Found        int64 `json:"found_in_journal"`
		Judged       int64 `json:"evidence_judged"`
		Severe       []string
		Faults       []struct{ Fault string }
		Points       []struct {
			All         int64 `json:"rss_all_bytes"`
			Parts       map[string]int64
			Goroutines  int
			Descriptors int
			Journal     int64 `json:"journal_bytes"`
		}
	}
	if err := json.Unmarshal(raw, &found); err != nil {
		t.Fatalf("soak.json: %v\n%s", err, raw)
	}
	if found.Acknowledged == 0 || found.Found != found.Acknowledged || found.Judged != found.Acknowledged || len(found.Severe) != 0 || len(found.Faults) == 0 {
		t.Errorf("soak.json: %s", raw)
	}
	for _, p := range found.Points {
		sum := int64(0)
		for _, n := range p.Parts {
			sum += n
		}
		if sum != p.All || len(p.Parts) < 6 {
			t.Errorf("the parts of %d bytes: %v", p.All, p.Parts)
		}
		if p.All < 1<<20 || p.Goroutines == 0 || p.Descriptors == 0 || p.Journal == 0 {
			t.Errorf("%+v", p)
		}
	}
	wellFormed(t, filepath.Join(results, "soak.svg"), 5)
	refused(t, 2, []string{"--for"}, "bench-soak", "--dir", tempDir(t), "--for", "1s")
}

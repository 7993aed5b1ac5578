package main_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The bench in small: each case does its work, each number it speaks of is there, and the profile is divided. How fast
// it was is no matter here.
func TestBench(t *testing.T) {
	t.Parallel()
	dir := initAppliance(t, startTimeServer(t))
	serve(t, dir, "--profile", filepath.Join(dir, "serve"))
	results := tempDir(t)
	mustRun(t, "bench", "--dir", dir, "--attach", "--rounds", "1", "--each", "20ms", "--profile", "300ms", "--results", results)

	page, err := os.ReadFile(filepath.Join(results, "bench.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, heading := range []string{"## Floors", "## Rates", "## Processor time of one operation", "## Where the appliance's time goes: stamped"} {
		if !strings.Contains(string(page), heading) {
			t.Errorf("bench.md has no %q:\n%s", heading, page)
		}
	}
	raw, err := os.ReadFile(filepath.Join(results, "bench.json"))
	if err != nil {
		t.Fatal(err)
	}
	var found struct {
		Machine map[string]any
		Floors  []struct {
			Name   string
			Median float64
		}
		Cases []struct {
			Name    string
			Samples []struct {
				Ops     int64
				Seconds float64
			}
		}
		Profiles []struct {
			Load  string
			Ops   int64
			Parts []struct{ Share float64 }
		}
	}
	if err := json.Unmarshal(raw, &found); err != nil {
		t.Fatalf("bench.json: %v\n%s", err, raw)
	}
	names := map[string]bool{}
	for _, c := range found.Cases {
		names[c.Name] = true
		if len(c.Samples) != 1 || c.Samples[0].Ops == 0 || c.Samples[0].Seconds <= 0 {
			t.Errorf("case %s: %v", c.Name, c.Samples)
		}
	}
	for _, name := range []string{"gmsm", "csign", "sign", "stamped", "sign-1", "stamped-1", "raw-cpu", "token", "token-verified", "journal", "fsync"} {
		if !names[name] {
			t.Errorf("case %s is not measured", name)
		}
	}
	if len(found.Floors) != 10 || found.Machine["cores"] == nil {
		t.Errorf("floors %v, machine %v", found.Floors, found.Machine)
	}
	for _, f := range found.Floors {
		if f.Median <= 0 {
			t.Errorf("floor %s: median %v", f.Name, f.Median)
		}
	}
	for _, p := range found.Profiles {
		sum := 0.0
		for _, part := range p.Parts {
			sum += part.Share
		}
		if p.Ops == 0 || sum < 0.99 || sum > 1.01 {
			t.Errorf("profile of %s: %d operations, the shares are %v together", p.Load, p.Ops, sum)
		}
	}
	if len(found.Profiles) != 2 {
		t.Errorf("%d profiles, want 2", len(found.Profiles))
	}
}

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
	mustRun(t, "bench", "--dir", dir, "--attach", "--rounds", "1", "--each", "20ms", "--profile", "3s", "--results", results)

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
	for _, name := range []string{"gmsm", "csign", "sign", "stamped", "sign-1", "stamped-1", "batch-1", "batch", "raw-cpu", "token", "token-verified", "journal", "fsync", "csign-rsa", "sign-16", "sign-500", "rsa", "digest", "mb", "verify"} {
		if !names[name] {
			t.Errorf("case %s is not measured", name)
		}
	}
	if len(found.Floors) != 15 || found.Machine["cores"] == nil {
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
	var pictures strings.Builder // a short run has few samples
	for _, load := range []string{"sign", "stamped"} {
		picture := readFile(t, filepath.Join(results, "flame-"+load+".svg"))
		if !strings.Contains(picture, "<title>") {
			t.Errorf("the flame graph of %s is empty", load)
		}
		pictures.WriteString(picture)
		wellFormed(t, filepath.Join(results, "flame-"+load+".svg"), 0)
	}
	if !strings.Contains(pictures.String(), "<title>yinjian/appliance/sign.(*Service).Sign, ") {
		t.Error("the flame graphs have no signing")
	}
}

// The timestamp service's bench in small, with our own server in the peer's place; and without a peer it says what it did
// not measure.
func TestBenchTSA(t *testing.T) {
	t.Parallel()
	addr, results := freePort(t), tempDir(t)
	peer := built.binary + " bench-tsa-server --listen " + addr
	mustRun(t, "bench-tsa", "--dir", filepath.Join(tempDir(t), "bench"), "--rounds", "1", "--each", "50ms", "--profile", "300ms", "--results", results,
		"--peer", peer, "--peer-url", "http://"+addr+"/tsa/bench")
	page, err := os.ReadFile(filepath.Join(results, "tsa.md"))
	if err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(filepath.Join(results, "tsa.json"))
	if err != nil {
		t.Fatal(err)
	}
	type found struct {
		Floors []struct {
			Name   string
			Floor  float64
			Median float64
		}
		NotMeasured []string `json:"not_measured"`
		Cases       []struct {
			Name    string
			Samples []struct {
				Ops     int64
				Seconds float64
				CPU     float64 `json:"cpu_us"`
			}
		}
		Profiles []struct{ Ops int64 }
	}
	var f found
	if err := json.Unmarshal(raw, &f); err != nil {
		t.Fatalf("tsa.json: %v\n%s", err, raw)
	}
	asked := 0
	for _, one := range f.Floors {
		if one.Median <= 0 {
			t.Errorf("%s: median %v", one.Name, one.Median)
		}
		if one.Floor > 0 {
			asked++
		}
	}
	if asked != 13 || len(f.NotMeasured) != 0 || len(f.Profiles) != 3 {
		t.Errorf("%d floors, not measured %v, %d profiles\n%s", asked, f.NotMeasured, len(f.Profiles), page)
	}
	for _, c := range f.Cases {
		if len(c.Samples) != 1 || c.Samples[0].Ops == 0 || c.Samples[0].Seconds <= 0 || c.Samples[0].CPU <= 0 {
			t.Errorf("case %s: %v", c.Name, c.Samples)
		}
	}
	if len(f.Cases) != 19 {
		t.Errorf("%d cases", len(f.Cases))
	}
	out := mustRun(t, "bench-tsa", "--dir", filepath.Join(tempDir(t), "bench"), "--rounds", "1", "--each", "20ms")
	if strings.Count(out.stdout, "not measured: no peer") != 8 {
		t.Errorf("without a peer: %v", out)
	}
	for _, args := range [][]string{{"--peer", "true"}, {"--peer-url", "http://" + addr + "/"}, {"--peer", "true", "--peer-pid", "1", "--peer-url", "http://" + addr + "/"}} {
		refused(t, 2, []string{"--peer-url"}, append([]string{"bench-tsa", "--dir", tempDir(t)}, args...)...)
	}
}

// The bench of growth in small: all cases at two sizes, each with a cost, and what verification is over raw SM3.
func TestBenchGrowth(t *testing.T) {
	t.Parallel()
	results := tempDir(t)
	mustRun(t, "bench-growth", "--dir", filepath.Join(tempDir(t), "bench"), "--rounds", "1", "--entries", "10000,20000", "--results", results)
	page, err := os.ReadFile(filepath.Join(results, "growth.md"))
	if err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(filepath.Join(results, "growth.json"))
	if err != nil {
		t.Fatal(err)
	}
	picture, err := os.ReadFile(filepath.Join(results, "growth.svg"))
	if err != nil || strings.Count(string(picture), "<polyline") != 10 {
		t.Errorf("growth.svg: %d lines, %v", strings.Count(string(picture), "<polyline"), err)
	}
	var found struct {
		Cases []struct {
			Name  string
			Costs map[string][]struct {
				CPU  float64 `json:"cpu_us"`
				Wall float64 `json:"wall_us"`
			}
			Rates map[string][]float64 `json:"of_raw_sm3"`
		}
		Bytes map[string]float64 `json:"bytes_an_entry"`
	}
	if err := json.Unmarshal(raw, &found); err != nil {
		t.Fatalf("growth.json: %v\n%s", err, raw)
	}
	names := map[string]bool{}
	for _, c := range found.Cases {
		names[c.Name] = true
		for _, size := range []string{"10000", "20000"} {
			if costs := c.Costs[size]; len(costs) != 1 || costs[0].CPU <= 0 || costs[0].Wall <= 0 {
				t.Errorf("case %s at %s: %v", c.Name, size, costs)
			}
			if c.Name == "verify" && (len(c.Rates[size]) != 1 || c.Rates[size][0] <= 0) {
				t.Errorf("verify at %s over raw SM3: %v", size, c.Rates)
			}
		}
	}
	for _, name := range []string{"append-1", "append-64", "reference", "no-reference", "sequence", "proof", "evidence", "start", "after start", "verify"} {
		if !names[name] || !strings.Contains(string(page), "| "+name+" |") {
			t.Errorf("case %s is not measured, or not in growth.md", name)
		}
	}
	if found.Bytes["20000"] < 1000 {
		t.Errorf("bytes of an entry: %v", found.Bytes)
	}
	refused(t, 2, []string{"--entries"}, "bench-growth", "--dir", tempDir(t), "--entries", "10000")
}

// The central database's bench in small.
func TestBenchDatabase(t *testing.T) {
	t.Parallel()
	if found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/initdb"); len(found) == 0 {
		t.Skip("PostgreSQL is not installed: packaging/dev/deps.sh test")
	}
	results := tempDir(t)
	mustRun(t, "bench-database", "--dir", filepath.Join(tempDir(t), "bench"), "--rounds", "1", "--each", "500ms", "--records", "5000", "--results", results)
	raw, err := os.ReadFile(filepath.Join(results, "database.json"))
	if err != nil {
		t.Fatal(err)
	}
	var found []struct {
		Name    string
		Samples []float64
		Limit   float64
	}
	if err := json.Unmarshal(raw, &found); err != nil {
		t.Fatalf("database.json: %v\n%s", err, raw)
	}
	if len(found) != 3 {
		t.Errorf("%d lines, want 3: %s", len(found), raw)
	}
	for _, f := range found {
		// Half a second's rows may be shipped before anybody looks, and have no rate then.
		if len(f.Samples) != 1 || f.Samples[0] < 0 || f.Samples[0] == 0 && !strings.HasPrefix(f.Name, "(2)") || f.Limit == 0 {
			t.Errorf("%s: %v", f.Name, f.Samples)
		}
	}
	if page, err := os.ReadFile(filepath.Join(results, "database.md")); err != nil || strings.Count(string(page), "\n| (") != 3 {
		t.Errorf("database.md: %v\n%s", err, page)
	}
}

func TestBenchConsole(t *testing.T) {
	t.Parallel()
	results := tempDir(t)
	mustRun(t, "bench-console", "--dir", filepath.Join(tempDir(t), "bench"), "--few", "20", "--many", "60", "--rounds", "1", "--each", "200ms", "--results", results)
	raw, err := os.ReadFile(filepath.Join(results, "console.json"))
	if err != nil {
		t.Fatal(err)
	}
	var found []struct {
		Name    string
		Samples []float64
	}
	if err := json.Unmarshal(raw, &found); err != nil {
		t.Fatal(err)
	}
	if len(found) != 5 {
		t.Fatalf("%d ratios, want 5: %s", len(found), raw)
	}
	for _, r := range found {
		if len(r.Samples) != 1 || r.Samples[0] <= 0 {
			t.Errorf("%s: %v", r.Name, r.Samples)
		}
	}
}

package main_test

import (
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

// The loader in small: every class is asked for and answered, what it saw is told by class, warm-up apart, and processor time and
// memory are those of the appliance's processes.
func TestBenchLoad(t *testing.T) {
	t.Parallel()
	dir := initAppliance(t, startTimeServer(t))
	serve(t, dir).trusted(t)
	results := tempDir(t)
	mustRun(t, "bench-load", "--dir", dir, "--attach", "--users", "8", "--signers", "3", "--rounds", "1", "--each", "700ms", "--warm-up", "300ms", "--stamp", "required", "--results", results)
	raw, err := os.ReadFile(filepath.Join(results, "load.json"))
	if err != nil {
		t.Fatal(err)
	}
	type tally struct {
		Requests, Documents int64
		P50                 float64 `json:"p50_ms"`
		P99                 float64 `json:"p99_ms"`
		Most                float64 `json:"most_ms"`
	}
	var found struct {
		Errors int64
		Limits []struct{ Samples []float64 }
		Scenes []struct {
			Name    string
			Samples []struct {
				Seconds float64
				WarmUp  tally `json:"warm_up"`
				All     tally
				Classes map[string]tally
				CPU     map[string]float64 `json:"cpu_seconds"`
				RSS     map[string]int64   `json:"rss_bytes"`
			}
		}
	}
	if err := json.Unmarshal(raw, &found); err != nil {
		t.Fatalf("load.json: %v\n%s", err, raw)
	}
	scenes := []string{"sign", "mix", "sign, apart", "mix, apart"}
	if runtime.NumCPU() == 1 {
		scenes = scenes[:2]
	}
	if len(found.Scenes) != len(scenes) || found.Errors != 0 || len(found.Limits) != len(scenes)/2 {
		t.Fatalf("scenes, errors or limits: %s", raw)
	}
	for i, s := range found.Scenes {
		if s.Name != scenes[i] || len(s.Samples) != 1 {
			t.Fatalf("scene %d is %q with %d samples", i, s.Name, len(s.Samples))
		}
		one := s.Samples[0]
		sum := int64(0)
		for name, c := range one.Classes {
			sum += c.Requests
			asked := name == "sign" || strings.HasPrefix(s.Name, "mix")
			want := c.Requests
			if name == "batch" {
				want *= 10
			}
			// Of a few requests, on a busy machine, none need be of a tenth's class.
			if c.Requests > 0 && !asked || c.Requests == 0 && asked && (name == "sign" || one.All.Requests > 200) || c.Documents != want || c.P50 > c.P99 || c.P99 > c.Most || c.P50 > 0 != (c.Requests > 0) {
				t.Errorf("%s: %s: %+v", s.Name, name, c)
			}
		}
		if sum != one.All.Requests || one.WarmUp.Requests == 0 || one.Seconds <= 0 {
			t.Errorf("%s: %d answers by class, %+v, warm-up %+v", s.Name, sum, one.All, one.WarmUp)
		}
		for _, role := range []string{"appliance", "softtoken", "worker staff", "worker tsa", "loader"} {
			if one.RSS[role] < 1<<20 {
				t.Errorf("%s: memory of %q: %v", s.Name, role, one.RSS)
			}
		}
		if one.CPU["appliance"] <= 0 {
			t.Errorf("%s: %v", s.Name, one.CPU)
		}
	}
	wellFormed(t, filepath.Join(results, "load.svg"), 3)
	refused(t, 2, []string{"100"}, "bench-load", "--dir", dir, "--mix", "sign=70,batch=10")
	refused(t, 2, []string{"--batch"}, "bench-loader", "nothing.json", "--batch", "501")
}

// wellFormed wants XML with so many lines.
func wellFormed(t *testing.T, file string, lines int) {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	found := 0
	for d := xml.NewDecoder(f); ; {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		if e, ok := token.(xml.StartElement); ok && e.Name.Local == "polyline" {
			found++
		}
	}
	if found != lines {
		t.Errorf("%s: %d lines, want %d", file, found, lines)
	}
}

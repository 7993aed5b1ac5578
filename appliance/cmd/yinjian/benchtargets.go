package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"
)

const benchTargetsText = `把结果目录中各测量的 JSON 汇成一张表：每项要求、测得的中位数与范围、是否达到。不测量；没有结果的写明。
Puts the measurements of a folder of results into one table: what is asked for, the median with its range, met or missed. It measures
nothing; what has no result is named.`

// A benchTarget is one thing that is asked for, and where its figure is.
type benchTarget struct {
	name  string
	limit float64
	least bool
	file  string
	of    func(r *benchResults) (spread, bool)
}

// benchResults are the parts of all results that targets are judged by.
type benchResults struct {
	machine map[string]machineInfo // by file
	floors  map[string]map[string]floor
	ratios  map[string][]poolRatio
	errors  int64
	severe  []string
	rss     float64
	judged  bool
	found   map[string]bool
}

func benchTargetsCommand() *cobra.Command {
	var results string
	c := &cobra.Command{
		Use: "bench-targets", Hidden: true, Short: "汇总测量与要求 (measurements against what is asked for)", Long: benchTargetsText, Args: exactArgs(0),
		RunE: func(*cobra.Command, []string) error {
			r, err := readResults(results)
			if err != nil {
				return err
			}
			page := r.page()
			fmt.Print(page)
			return os.WriteFile(filepath.Join(results, "targets.md"), []byte(page), 0o644)
		},
	}
	c.Flags().StringVar(&results, "results", "bench/results", "结果目录 (folder of the results)")
	return c
}

func readResults(dir string) (*benchResults, error) {
	r := &benchResults{machine: map[string]machineInfo{}, floors: map[string]map[string]floor{}, ratios: map[string][]poolRatio{}, found: map[string]bool{}}
	for _, file := range []string{"bench.json", "price.json", "load.json", "soak.json", "tsa.json"} {
		raw, err := os.ReadFile(filepath.Join(dir, file))
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		var one struct {
			Machine   machineInfo
			Floors    []floor
			Limits    []poolRatio
			Errors    json.RawMessage
			Severe    []string
			RSSRatio  float64 `json:"rss_ratio"`
			RSSJudged bool    `json:"rss_judged"`
		}
		if err := json.Unmarshal(raw, &one); err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		r.found[file], r.machine[file], r.ratios[file], r.floors[file] = true, one.Machine, one.Limits, map[string]floor{}
		for _, f := range one.Floors {
			r.floors[file][f.Name] = f
		}
		switch file {
		case "load.json":
			if err := json.Unmarshal(one.Errors, &r.errors); err != nil {
				return nil, fmt.Errorf("%s: %w", file, err)
			}
		case "soak.json":
			r.severe, r.rss, r.judged = one.Severe, one.RSSRatio, one.RSSJudged
		}
	}
	return r, nil
}

// floorOf is the floor that begins with those words, ratioOf likewise.
func floorOf(file, name string) func(*benchResults) (spread, bool) {
	return func(r *benchResults) (spread, bool) {
		f, ok := r.floors[file][name]
		return f.spread, ok
	}
}

func ratioOf(file, begins string) func(*benchResults) (spread, bool) {
	return func(r *benchResults) (spread, bool) {
		for _, one := range r.ratios[file] {
			if strings.HasPrefix(one.Name, begins) && len(one.Samples) > 0 {
				return spreadOf(one.Samples), true
			}
		}
		return spread{}, false
	}
}

func exactly(file string, of func(*benchResults) (float64, bool)) func(*benchResults) (spread, bool) {
	return func(r *benchResults) (spread, bool) {
		v, ok := of(r)
		return spread{v, v, v}, ok && r.found[file]
	}
}

// benchTargets are the limits of durable signing over TLS. Numerators and denominators: the commands' help.
var benchTargets = []benchTarget{
	{"SM2 unstamped, 64 clients, verify_fresh off ÷ C_Sign", 0.45, true, "price.json", ratioOf("price.json", "(j)")},
	{"SM2 unstamped, 64 clients ÷ C_Sign", 0.35, true, "bench.json", floorOf("bench.json", "(b) unstamped")},
	{"SM2 stamped, 64 clients ÷ C_Sign", 0.25, true, "bench.json", floorOf("bench.json", "(b) stamped")},
	{"RSA unstamped, 64 clients ÷ C_Sign", 0.85, true, "bench.json", floorOf("bench.json", "(g) RSA")},
	{"the same SM2 with a machine of 1 ms", 0.95, true, "price.json", ratioOf("price.json", "(k)")},
	{"p99 at 500 users ÷ (500 ÷ rate)", 3, false, "load.json", ratioOf("load.json", "(1)")},
	{"the same, loader on the other processor", 2, false, "load.json", ratioOf("load.json", "(2)")},
	{"errors at 500 users", 0, false, "load.json", exactly("load.json", func(r *benchResults) (float64, bool) { return float64(r.errors), true })},
	{"batch of 100 ÷ singles, one client", 3, true, "bench.json", floorOf("bench.json", "(f) one client")},
	{"batch of 100 ÷ singles, 64 clients", 1.5, true, "bench.json", floorOf("bench.json", "(f) 64 clients")},
	{"kB allocated for a sign", 20, false, "bench.json", floorOf("bench.json", "(i) allocated")},
	{"severe failures of the soak", 0, false, "soak.json", exactly("soak.json", func(r *benchResults) (float64, bool) { return float64(len(r.severe)), true })},
	{"memory after the soak ÷ after its first minute", 1.1, false, "soak.json", exactly("soak.json", func(r *benchResults) (float64, bool) { return r.rss, r.judged })},
}

func (r *benchResults) page() string {
	var out strings.Builder
	out.WriteString("# 要求与测得 (what is asked for, and what was measured)\n\n由 `yinjian bench-targets` 自各结果写出，请勿手改。(Written by the program from the other results; not to be edited.)\n\n" +
		"| 要求 asked for | 中位数 median | 最小–最大 min – max | 限 limit | | 取自 from |\n| --- | ---: | ---: | ---: | --- | --- |\n")
	for _, t := range benchTargets {
		s, ok := t.of(r)
		if !ok {
			fmt.Fprintf(&out, "| %s | | | %s %g | 未测 not measured | %s |\n", t.name, sideOf(t.least), t.limit, t.file)
			continue
		}
		word := "**未达到 missed**"
		if t.least == (s.Median >= t.limit) || s.Median == t.limit {
			word = "达到 met"
		}
		fmt.Fprintf(&out, "| %s | %.3f | %.3f – %.3f | %s %g | %s | %s |\n", t.name, s.Median, s.Least, s.Most, sideOf(t.least), t.limit, word, t.file)
	}
	for _, f := range r.sorted("tsa.json") {
		if f.Floor > 0 {
			word := "**未达到 missed**"
			if f.Holds {
				word = "达到 met"
			}
			fmt.Fprintf(&out, "| 时间戳 token %s: %s | %.3f | %.3f – %.3f | %s %g | %s | tsa.json |\n", f.Name, f.Of, f.Median, f.Least, f.Most, sideOf(!f.Upper), f.Floor, word)
		}
	}
	out.WriteString("\n| 结果 result | 时间 at | 版本 revision | 负载 load average |\n| --- | --- | --- | --- |\n")
	for _, file := range []string{"bench.json", "price.json", "load.json", "soak.json", "tsa.json"} {
		if m, ok := r.machine[file]; ok {
			fmt.Fprintf(&out, "| %s | %s | %s | %s |\n", file, m.At, m.Revision, m.Load)
		}
	}
	return out.String()
}

func sideOf(least bool) string { return map[bool]string{true: "≥", false: "≤"}[least] }

// sorted are a file's floors by name.
func (r *benchResults) sorted(file string) (all []floor) {
	for _, name := range slices.Sorted(maps.Keys(r.floors[file])) {
		all = append(all, r.floors[file][name])
	}
	return all
}

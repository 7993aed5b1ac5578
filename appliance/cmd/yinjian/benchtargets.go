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
	over  string // numerator
	under string // denominator; "" where it is no ratio
	limit float64
	least bool
	file  string
	of    func(r *benchResults) (spread, bool)
}

// benchResults are the parts of all results that targets are judged by.
type benchResults struct {
	machine map[string]machineInfo // by file
	rounds  map[string]int         // by file, the fewest of its cases
	floors  map[string]map[string]floor
	tsaLeft []string // ratios of the timestamp service without a result
	longest float64  // seconds of the long run of the mix
	users   int      // in it
	ratios  map[string][]poolRatio
	errors  int64
	severe  []string
	rss     float64
	judged  bool
	found   map[string]bool
	cost    map[string]map[string]float64 // µs of processor time an operation: by case of bench.json, then by process or part of the profile
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
	r := &benchResults{rounds: map[string]int{}, machine: map[string]machineInfo{}, floors: map[string]map[string]floor{}, ratios: map[string][]poolRatio{}, found: map[string]bool{}, cost: map[string]map[string]float64{}}
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
			RSSRatio  float64  `json:"rss_ratio"`
			RSSJudged bool     `json:"rss_judged"`
			Left      []string `json:"not_measured"`
			Cases     []struct {
				Name    string
				Samples []struct {
					Ops int
					CPU map[string]float64 `json:"cpu_seconds"`
				}
			}
			Profiles []struct {
				Load    string
				Seconds float64
				Ops     int
				Parts   []struct {
					Part  string
					Share float64
				}
			}
			Items  []struct{ With []json.RawMessage }
			Scenes []struct {
				Name    string
				Samples []struct {
					Users   int
					Seconds float64
				}
			}
		}
		if err := json.Unmarshal(raw, &one); err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		r.found[file], r.machine[file], r.ratios[file], r.floors[file] = true, one.Machine, one.Limits, map[string]floor{}
		fewest := func(n int) {
			if had, ok := r.rounds[file]; !ok || n < had {
				r.rounds[file] = n
			}
		}
		for _, c := range one.Cases {
			fewest(len(c.Samples))
		}
		for _, c := range one.Items {
			fewest(len(c.With))
		}
		for _, c := range one.Scenes {
			if c.Name != "mix, long" {
				fewest(len(c.Samples))
			} else if len(c.Samples) > 0 {
				r.longest, r.users = c.Samples[0].Seconds, c.Samples[0].Users
			}
		}
		for _, f := range one.Floors {
			r.floors[file][f.Name] = f
		}
		switch file {
		case "bench.json":
			for _, c := range one.Cases {
				each := map[string][]float64{}
				for _, sample := range c.Samples {
					for process, seconds := range sample.CPU {
						each[process] = append(each[process], seconds*1e6/float64(max(sample.Ops, 1)))
					}
				}
				r.cost[c.Name] = map[string]float64{}
				for process, all := range each {
					r.cost[c.Name][process] = spreadOf(all).Median
				}
			}
			for _, p := range one.Profiles {
				for _, part := range p.Parts {
					if of := r.cost[p.Load]; of != nil {
						of[part.Part] = part.Share * p.Seconds * 1e6 / float64(max(p.Ops, 1))
					}
				}
			}
		case "load.json":
			if err := json.Unmarshal(one.Errors, &r.errors); err != nil {
				return nil, fmt.Errorf("%s: %w", file, err)
			}
		case "soak.json":
			r.severe, r.rss, r.judged = one.Severe, one.RSSRatio, one.RSSJudged
		case "tsa.json":
			r.tsaLeft = one.Left
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
	{"SM2 unstamped, 64 clients, verify_fresh off ÷ C_Sign", "POST /v1/sign a second: TLS, 64 clients, 2 KiB, durable, hsm.verify_fresh off", "C_Sign of SM2 a second, the same token, worker process, 16 goroutines", 0.45, true, "price.json", ratioOf("price.json", "(j)")},
	{"SM2 unstamped, 64 clients ÷ C_Sign", "the same, verify_fresh on", "the same", 0.35, true, "bench.json", floorOf("bench.json", "(b) unstamped")},
	{"SM2 stamped, 64 clients ÷ C_Sign", "the same, each with a timestamp token", "the same", 0.25, true, "bench.json", floorOf("bench.json", "(b) stamped")},
	{"RSA unstamped, 64 clients ÷ C_Sign", "the same with RSA-2048, unstamped", "C_Sign of RSA-2048 a second, worker process, 16 goroutines", 0.85, true, "bench.json", floorOf("bench.json", "(g) RSA")},
	{"the same SM2 with a machine of 1 ms", "POST /v1/sign a second, SM2, verify_fresh on, cipher machine of 1 ms and two sessions", "C_Sign a second of that machine", 0.95, true, "price.json", ratioOf("price.json", "(k)")},
	{"p99 at 500 users ÷ (500 ÷ rate)", "p99 of POST /v1/sign, 500 connections, no pause, in a round", "500 ÷ the round's signatures a second", 3, false, "load.json", ratioOf("load.json", "(1)")},
	{"the same, loader on the other processor", "the same, appliance on processor 0, loader on 1", "the same", 2, false, "load.json", ratioOf("load.json", "(2)")},
	{"errors at 500 users, ten minutes", "errors of all answers: every round, and the long run of the mix (at least ten minutes)", "", 0, false, "load.json", exactly("load.json", func(r *benchResults) (float64, bool) { return float64(r.errors), r.longest >= 600 && r.users >= 500 })},
	{"batch of 100 ÷ singles, one client", "documents a second in batches of 100, one client", "documents a second one after the other, one client", 3, true, "bench.json", floorOf("bench.json", "(f) one client")},
	{"batch of 100 ÷ singles, 64 clients", "the same, 64 clients", "POST /v1/sign a second, 64 clients", 1.5, true, "bench.json", floorOf("bench.json", "(f) 64 clients")},
	{"kB allocated for a sign", "bytes that the appliance's process allocates under the load of 64 clients, by its profile", "signatures meanwhile", 20, false, "bench.json", floorOf("bench.json", "(i) allocated")},
	{"severe failures of the soak", "severe failures (bench-soak --help), in a run of at least 8 minutes with every kind of fault", "", 0, false, "soak.json", exactly("soak.json", func(r *benchResults) (float64, bool) { return float64(len(r.severe)), r.judged })},
	{"memory after the soak ÷ after its first minute", "resident memory of the appliance's processes, median of the last quiet 40 s", "the same, 40–80 s after the begin", 1.1, false, "soak.json", exactly("soak.json", func(r *benchResults) (float64, bool) { return r.rss, r.judged })},
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
	for _, left := range r.tsaLeft {
		fmt.Fprintf(&out, "| 时间戳 token %s | | | | 未测 not measured | tsa.json |\n", left)
	}
	r.missed(&out)
	out.WriteString("\n## 分子与分母 (numerators and denominators)\n\n时间戳各行见 `yinjian bench-tsa --help`。(Of the tokens: in that help.)\n\n| 要求 asked for | 分子 numerator | 分母 denominator |\n| --- | --- | --- |\n")
	for _, t := range benchTargets {
		fmt.Fprintf(&out, "| %s | %s | %s |\n", t.name, t.over, t.under)
	}
	out.WriteString("\n| 结果 result | 时间 at | 版本 revision | 负载 load average | 轮 rounds |\n| --- | --- | --- | --- | ---: |\n")
	for _, file := range []string{"bench.json", "price.json", "load.json", "soak.json", "tsa.json"} {
		if m, ok := r.machine[file]; ok {
			rounds := ""
			if n, ok := r.rounds[file]; ok {
				rounds = fmt.Sprint(n)
				if n < 7 {
					rounds += "（少于七轮 fewer than seven）"
				}
			}
			fmt.Fprintf(&out, "| %s | %s | %s | %s | %s |\n", file, m.At, m.Revision, m.Load, rounds)
		}
	}
	return out.String()
}

// missed says of signing what its floors leave, and what it takes of each process. Where both processors are busy all the time on both
// sides of a ratio, a rate is the reciprocal of processor time; batches leave some of it unused.
func (r *benchResults) missed(out *strings.Builder) {
	head := false
	for _, row := range []struct {
		of, under, floor, name string
		limit                  float64
	}{
		{"sign", "csign", "(b) unstamped", "SM2 unstamped ÷ C_Sign", 0.35},
		{"stamped", "csign", "(b) stamped", "SM2 stamped ÷ C_Sign", 0.25},
		{"rsa", "csign-rsa", "(g) RSA", "RSA unstamped ÷ C_Sign", 0.85},
		{"batch", "sign", "(f) 64 clients", "batch of 100 ÷ singles, 64 clients", 1.5},
	} {
		of, under := r.cost[row.of], r.cost[row.under]
		if f, ok := r.floors["bench.json"][row.floor]; !ok || f.Median >= row.limit || of == nil || under == nil {
			continue
		}
		if !head {
			head = true
			out.WriteString("\n## 未达到者的时间去向 (where the time of the missed ones goes)\n\n每次操作的处理器时间，微秒（各轮中位数）；「校验」「TLS」在本机之内，取自性能剖析。" +
				"(Processor time of an operation, µs, medians; check and TLS are within the appliance, from the profile.) 分母的处理器时间 ÷ 下限 = 允许 (denominator's ÷ floor = allowed).\n\n" +
				"| 要求 asked for | 分母 denominator | 允许 allowed | 所用 taken | 客户端 client | 密码机与工作进程 machine and workers | 本机 appliance | 其中校验 of it check | 其中 TLS of it |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n")
		}
		total := func(of map[string]float64) (sum, machine float64) {
			for process, cost := range of {
				if process == "softtoken" || strings.HasPrefix(process, "worker ") {
					machine += cost
				}
			}
			return machine + of["client"] + of["appliance"], machine
		}
		takes, machine := total(of)
		has, _ := total(under)
		profiled := func(part string) string {
			if cost, ok := of[part]; ok {
				return fmt.Sprintf("%.0f", cost)
			}
			return ""
		}
		fmt.Fprintf(out, "| %s ≥ %g | %.0f | %.0f | %.0f | %.0f | %.0f | %.0f | %s | %s |\n", row.name, row.limit, has, has/row.limit, takes, of["client"], machine, of["appliance"],
			profiled("verification of the fresh signature"), profiled("TLS"))
	}
}

func sideOf(least bool) string { return map[bool]string{true: "≥", false: "≤"}[least] }

// sorted are a file's floors by name.
func (r *benchResults) sorted(file string) (all []floor) {
	for _, name := range slices.Sorted(maps.Keys(r.floors[file])) {
		all = append(all, r.floors[file][name])
	}
	return all
}

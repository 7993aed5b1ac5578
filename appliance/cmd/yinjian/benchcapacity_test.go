package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The simulation against what is known in closed form: M/M/1 under processor sharing has the mean of M/M/1, M/M/c its utilisation, and a
// closed system that never pauses is answered as fast as its processors go.
func TestCapacityModel(t *testing.T) {
	t.Parallel()
	near := nearly(t)
	// One processor, need 1 ms with little spread, half busy: the mean under PS is need ÷ (1 − ρ) whatever the distribution; with a need that
	// hardly varies the median lies near it.
	one := service{cores: 1, need: 0.001, sigma: 0.01}
	a := one.simulate(1, 200_000, 0, 500)
	near("rate", a.rate, 500, 0.02)
	near("busy", a.busy, 0.5, 0.02)
	if a.p50 < 1.2 || a.p50 > 2.2 || a.p99 < 4 || a.p99 > 14 {
		t.Errorf("p50 %.2f ms, p99 %.2f ms", a.p50, a.p99)
	}
	// Nearly idle: nothing but need and what is beside it.
	idle := service{cores: 2, need: 0.001, sigma: 0.01, wait: 0.003}
	a = idle.simulate(1, 50_000, 0, 1)
	near("p50 of an idle appliance", a.p50, 4, 0.02)
	// 500 users, two processors of 1 ms: 2000 a second, and by Little's law 250 ms on average.
	closed := service{cores: 2, need: 0.001, sigma: 0.01}
	a = closed.simulate(1, 100_000, 500, 0)
	near("rate of 500 users", a.rate, 2000, 0.02)
	near("busy", a.busy, 1, 0.001)
	near("p50 of 500 users", a.p50, 250, 0.05)
	// Few users with a pause outside: each goes round in 4 ms.
	a = service{cores: 2, need: 0.001, sigma: 0.01, wait: 0.003}.simulate(1, 50_000, 2, 0)
	near("rate of two users", a.rate, 500, 0.02)
	if b := closed.simulate(1, 100_000, 500, 0); b != closed.simulate(1, 100_000, 500, 0) {
		t.Error("the same seed gives another result")
	}
	sum := 0.0
	for _, part := range dayProfile {
		sum += part
	}
	near("the day's parts", sum, 100, 1e-9)
	k := capacity{seed: 1, limitMS: 1e9, limitLoad: 0.7}
	near("the rate within the limit", k.most(closed).rate, 1400, 0.03)
}

// nearly answers a check of a figure within a part of what is wanted.
func nearly(t *testing.T) func(what string, got, want, within float64) {
	return func(what string, got, want, within float64) {
		t.Helper()
		if math.Abs(got/want-1) > within {
			t.Errorf("%s is %.4g, want %.4g", what, got, want)
		}
	}
}

func TestCapacityPage(t *testing.T) {
	t.Parallel()
	near := nearly(t)
	dir := t.TempDir()
	point := func(cpu, p50, p99 float64) sample {
		return sample{Ops: 1000, Seconds: 1, CPU: map[string]float64{roleAppliance: cpu, roleClient: cpu / 4}, P50: p50, P99: p99}
	}
	cases := []*benchCase{
		{Name: "sign", Conns: 64, Samples: []sample{point(0.3, 10, 20)}}, {Name: "sign-1", Conns: 1, Samples: []sample{point(0.5, 1, 2)}},
		{Name: "stamped", Conns: 64, Samples: []sample{point(0.4, 10, 20)}}, {Name: "stamped-1", Conns: 1, Samples: []sample{point(0.6, 1.5, 2)}},
	}
	write := func(name string, v any) {
		t.Helper()
		b, err := json.Marshal(v)
		if err = errors.Join(err, os.WriteFile(filepath.Join(dir, name), b, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	write("bench.json", map[string]any{"machine": machineInfo{Cores: 2}, "cases": cases})
	write("soak.json", map[string]any{ // 900 documents of 1,000 requests; half of them lie between the two points
		"classes": map[string]any{"sign": map[string]any{"requests": 700, "documents": 700}, "verify": map[string]any{"requests": 100, "documents": 100}, "timestamp": map[string]any{"requests": 200, "documents": 200}},
		"points":  []any{map[string]any{"requests": 100, "journal_bytes": 50_000}, map[string]any{"requests": 600, "journal_bytes": 950_000}},
	})
	k := capacity{results: dir, page: filepath.Join(dir, "capacity.md"), staff: 6300, each: 60, burst: 3, hospitals: 300, seed: 1, limitMS: 200, limitLoad: 0.7}
	page := func() string {
		t.Helper()
		if err := k.run(); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(k.page)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	first := page()
	// 378,000 a day, 13 % of it in an hour; two processors at 0.4 ms and 70 %: 3,500 a second; 2,000 bytes each.
	for _, want := range []string{"| 378000 |", "| 最忙小时 busiest hour | 13.7 /s |", "| 最忙一分钟 busiest minute | 41.0 /s |", "275.9 GB", "未核对"} {
		if !strings.Contains(first, want) {
			t.Errorf("no %q in\n%s", want, first)
		}
	}
	write("load.json", map[string]any{"stamp": "none", "scenes": []any{map[string]any{"name": "sign", "samples": []any{map[string]any{
		"users": 500, "seconds": 10, "all": map[string]any{"requests": 53_333, "p50_ms": 94, "p99_ms": 200},
	}}}}})
	// The model: 0.3 + 0.075 ms on two processors are 5,333 a second.
	second := page()
	if !strings.Contains(second, " | 5333.3 | 5333.3 – 5333.3 | +0 % |") && !strings.Contains(second, " | 5333.3 | 5333.3 – 5333.3 | -0 % |") {
		t.Errorf("the check against many users: %s", second)
	}
	// Half as many were measured: the model errs by 100 %, and what it says of one appliance is half of what it was.
	write("load.json", map[string]any{"stamp": "none", "scenes": []any{map[string]any{"name": "sign", "samples": []any{map[string]any{
		"users": 500, "seconds": 20, "all": map[string]any{"requests": 53_333, "p50_ms": 188, "p99_ms": 400},
	}}}}})
	carries := func(page string) (rate float64) {
		_, after, _ := strings.Cut(page, "one appliance carries** | **")
		if _, err := fmt.Sscan(after, &rate); err != nil {
			t.Errorf("%v\n%s", err, page)
		}
		return rate
	}
	third := page()
	if !strings.Contains(third, "| +100 % |") {
		t.Errorf("the model's error is not said: %s", third)
	}
	near("what one appliance carries when the model is twice too fast", carries(third), carries(first)/2, 0.05)
	if _, err := os.Stat(filepath.Join(dir, "capacity.svg")); err != nil {
		t.Error(err)
	}
}

package main

import (
	"container/heap"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	mathrand "math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"
)

const benchCapacityText = `容量页：由结果目录中测得的服务时间(bench.json、load.json、soak.json)推算一台设备能承担多少，先用 500 用户的实测核对模型。不测量。
Capacity, from service times that were measured (bench.json, load.json, soak.json): what one appliance carries. It measures nothing.

  model     processor sharing: an appliance has c processors; n requests under way share them, none gets more than one. What a request
            needs is lognormal: its mean is the processor time of one operation at 64 clients, its shape that of the latencies there
            (p99 over p50). What it waits for beside that (fsync, changes of process) is the latency at one client less that need, and no
            queue. Discrete events, seeded.
  check     the model with 500 users who never pause, loader and appliance on the same processors, over what load.json measured. Where the
            model promises more signatures than were measured, every processor time below is multiplied by that error
  hospital  requests come as a Poisson stream whose rate follows the hours; the client is elsewhere, so its processor time is left out`

// A capacity is one computation.
type capacity struct {
	results, page      string
	staff, each        int
	burst              float64
	hospitals          int
	seed               uint64
	limitMS, limitLoad float64
}

// A capacityResult is what others make use of.
type capacityResult struct {
	Most   float64 `json:"most_a_second"` // that one appliance carries
	Staff2 float64 `json:"staff_of_that"`
	Staff  int     `json:"staff"`
	Each   int     `json:"each"`
	Day    float64 `json:"day"`
	Peak   float64 `json:"peak_a_second"`
	Users  int     `json:"users"` // of the run that the model was held against; 0: it was not
	Error  float64 `json:"error"` // of its rate
}

func benchCapacityCommand() *cobra.Command {
	k := &capacity{}
	c := &cobra.Command{
		Use: "bench-capacity", Hidden: true, Short: "推算容量 (compute the capacity)", Long: benchCapacityText, Args: exactArgs(0),
		RunE: func(*cobra.Command, []string) error {
			if k.staff < 1 || k.each < 1 || k.hospitals < 1 || k.burst < 1 || k.limitMS <= 0 || k.limitLoad <= 0 || k.limitLoad >= 1 {
				return usageError{errors.New("参数须为正，--busy 小于 1 (must be positive, --busy below 1)")}
			}
			return k.run()
		},
	}
	f := c.Flags()
	f.StringVar(&k.results, "results", "bench/results", "结果目录 (folder of the results)")
	f.StringVar(&k.page, "page", "docs/capacity.md", "写出的页，图在其旁 (page to write; its picture is beside it)")
	f.IntVar(&k.staff, "staff", 6300, "签名人数 (signers)")
	f.IntVar(&k.each, "each", 60, "每人每日签名数 (signatures of one in a day)")
	f.Float64Var(&k.burst, "burst", 3, "高峰小时内一分钟的倍数 (busiest minute over its hour's mean)")
	f.IntVar(&k.hospitals, "hospitals", 300, "全省医院数 (hospitals of a province)")
	f.Uint64Var(&k.seed, "seed", 1, "种子 (seed)")
	f.Float64Var(&k.limitMS, "p99", 200, "可接受的 p99，毫秒 (p99 that is accepted, ms)")
	f.Float64Var(&k.limitLoad, "busy", 0.7, "处理器占用上限 (processors may be this busy)")
	return c
}

// dayProfile is the part of a day's signatures that each hour has: an assumption, of a hospital whose ward rounds are in the morning.
var dayProfile = [24]float64{
	0.5, 0.4, 0.3, 0.3, 0.4, 0.8, 2, 5, 11, 13, 12, 9, 5, 5, 8, 8.5, 7, 4.5, 2.5, 1.6, 1.2, 0.9, 0.6, 0.5,
}

// A service is what one request needs.
type service struct {
	cores int
	need  float64 // seconds of processor, on average
	sigma float64 // of its logarithm
	wait  float64 // seconds beside that
}

// draw is one request's need.
func (s service) draw(rnd *mathrand.Rand) float64 {
	return s.need * math.Exp(s.sigma*rnd.NormFloat64()-s.sigma*s.sigma/2) // whose mean is need
}

// An answered is a simulation's result.
type answered struct {
	rate, busy, p50, p99 float64 // a second, part of the processors, ms
}

// shared are requests under way, by the attained service at which each is done. Processor sharing: all attain alike.
type shared []sharing

type sharing struct{ done, since float64 }

func (h shared) Len() int           { return len(h) }
func (h shared) Less(i, j int) bool { return h[i].done < h[j].done }
func (h shared) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *shared) Push(x any)        { *h = append(*h, x.(sharing)) }
func (h *shared) Pop() any {
	last := (*h)[len(*h)-1]
	*h = (*h)[:len(*h)-1]
	return last
}

// simulate lets n requests be answered. users > 0: so many who ask again when they are answered; otherwise a Poisson stream of rate. The
// first tenth is not counted.
func (s service) simulate(seed uint64, n, users int, rate float64) answered {
	rnd := mathrand.New(mathrand.NewPCG(seed, 11))
	var jobs shared
	var now, attained, busy, counted float64
	next := math.Inf(1)
	come := func() { heap.Push(&jobs, sharing{attained + s.draw(rnd), now}) }
	// Users who wait for what is no queue come back later.
	var later []float64
	back := func(at float64) {
		i, _ := slices.BinarySearch(later, at)
		later = slices.Insert(later, i, at)
	}
	for range users {
		come()
	}
	if users == 0 {
		next = rnd.ExpFloat64() / rate
	}
	var took []float64
	for done := 0; done < n; {
		speed := min(1, float64(s.cores)/float64(max(1, len(jobs))))
		end := math.Inf(1)
		if len(jobs) > 0 {
			end = now + (jobs[0].done-attained)/speed
		}
		arrival := next
		if len(later) > 0 {
			arrival = min(arrival, later[0])
		}
		step := min(end, arrival) - now
		if done > n/10 {
			counted += step
			busy += step * min(float64(len(jobs)), float64(s.cores)) / float64(s.cores)
		}
		if len(jobs) > 0 {
			attained += step * speed
		}
		now += step
		switch {
		case end <= arrival:
			job := heap.Pop(&jobs).(sharing)
			if done++; done > n/10 {
				took = append(took, now-job.since+s.wait)
			}
			if users > 0 {
				back(now + s.wait)
			}
		case arrival == next:
			come()
			next = now + rnd.ExpFloat64()/rate
		default:
			later = later[1:]
			come()
		}
	}
	slices.Sort(took)
	at := func(q float64) float64 { return 1000 * took[int(q*float64(len(took)-1))] }
	return answered{float64(len(took)) / counted, busy / counted, at(0.5), at(0.99)}
}

// measuredService is what bench.json says of a case, with the client's processor time or without.
func measuredService(cases []benchCase, name, alone string, cores int, client bool) (service, error) {
	find := func(name string) *benchCase {
		for i := range cases {
			if cases[i].Name == name && len(cases[i].Samples) > 0 && cases[i].Samples[0].P50 > 0 {
				return &cases[i]
			}
		}
		return nil
	}
	at64, at1 := find(name), find(alone)
	if at64 == nil || at1 == nil {
		return service{}, fmt.Errorf("bench.json: 没有 %s 与 %s 的延迟，先运行 make bench (run make bench first)", name, alone)
	}
	without := roleClient
	if client {
		without = ""
	}
	middle := func(c *benchCase, f func(sample) float64) float64 { return spreadOf(each(c.Samples, f)).Median }
	s := service{cores: cores, need: middle(at64, func(s sample) float64 { return s.total(without) })}
	// The 99th percentile of the normal distribution is 2.326.
	s.sigma = math.Log(middle(at64, func(s sample) float64 { return s.P99 / s.P50 })) / 2.326
	s.wait = max(0, middle(at1, func(s sample) float64 { return s.P50 / 1000 })-s.need)
	return s, nil
}

func (k *capacity) run() error {
	var bench struct {
		Machine machineInfo
		Cases   []benchCase
	}
	read := func(file string, into any) error {
		raw, err := os.ReadFile(filepath.Join(k.results, file))
		if err == nil {
			err = json.Unmarshal(raw, into)
		}
		return err
	}
	if err := read("bench.json", &bench); err != nil {
		return err
	}
	var load struct {
		Machine machineInfo
		Stamp   string
		Scenes  []*loadScene
	}
	if err := read("load.json", &load); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	var soak soakReport
	if err := read("soak.json", &soak); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	stamped, err := measuredService(bench.Cases, "stamped", "stamped-1", bench.Machine.Cores, false)
	if err != nil {
		return err
	}
	var out strings.Builder
	fmt.Fprintf(&out, "# 容量 (capacity)\n\n由 `make bench` 写出，请勿手改；模型与定义见 `yinjian bench-capacity --help`。数字取自 [bench.json](../bench/results/bench.json)"+
		"(%s，版本 %s，%s，%d 核，测量时负载 %s)。密码机是同机的软件密码机：换成硬件后处理器时间更少，上限由密码机的速率决定，请按其标称值另算。\n\n"+
		"(Written by the program from measured service times; not to be edited. Software cipher machine on the same processors.)\n\n",
		bench.Machine.At, bench.Machine.Revision, bench.Machine.CPU, bench.Machine.Cores, bench.Machine.Load)

	fmt.Fprint(&out, "## 模型与实测 (the model, checked)\n\n")
	users, wrong := k.check(&out, bench.Cases, bench.Machine.Cores, load.Stamp, load.Scenes)
	stamped.need *= max(1, 1+wrong)
	if load.Machine.Revision != "" && (load.Machine.Revision != bench.Machine.Revision || load.Machine.CPU != bench.Machine.CPU) {
		fmt.Fprintf(&out, "\n**两次测量不是同一版本或同一处理器**，误差里有它们的差别 (not of one revision or processor): bench.json %s, %s; load.json %s, %s.\n", bench.Machine.Revision, bench.Machine.CPU, load.Machine.Revision, load.Machine.CPU)
	} else if load.Machine.Load != "" {
		fmt.Fprintf(&out, "\n500 用户的实测 (the run of 500 users)：%s，测量时负载 load average %s。\n", load.Machine.At, load.Machine.Load)
	}

	day := float64(k.staff * k.each)
	hour := slices.Max(dayProfile[:]) / 100
	peak := day * hour / 3600 * k.burst
	most := k.most(stamped)
	fmt.Fprintf(&out, "\n## 一家医院 (one hospital)\n\n假设 assumptions：%d 人，每人每日 %d 次签名，带时间戳；一日各时段的份额 (%% of a day, by hour from 0)：", k.staff, k.each)
	for i, part := range dayProfile {
		if i > 0 {
			out.WriteString("、")
		}
		fmt.Fprintf(&out, "%g", part)
	}
	fmt.Fprintf(&out, "；最忙一分钟为其小时均值的 %g 倍。可接受 accepted：p99 ≤ %g ms，处理器占用 ≤ %.0f %%。\n\n", k.burst, k.limitMS, 100*k.limitLoad)
	fmt.Fprintf(&out, "| | |\n| --- | ---: |\n| 每日签名 signatures a day | %.0f |\n| 全日均值 mean of the day | %.1f /s |\n| 最忙小时 busiest hour | %.1f /s |\n| 最忙一分钟 busiest minute | %.1f /s |\n", day, day/86400, day*hour/3600, peak)
	at := stamped.simulate(k.seed, 100_000, 0, peak)
	fmt.Fprintf(&out, "| 那时 then：p50、p99 | %.2f、%.2f ms |\n| 那时的处理器占用 processors busy then | %.1f %% |\n", at.p50, at.p99, 100*at.busy)
	fmt.Fprintf(&out, "| **一台设备的上限 one appliance carries** | **%.0f /s** |\n| 即同样用法的人数 signers of the same habit | %.0f |\n", most.rate, most.rate/peak*float64(k.staff))
	if bytes := soak.bytesEach(); bytes > 0 {
		fmt.Fprintf(&out, "| 日志 journal | %.1f GB /年 a year (soak.json：%.0f B /份 document，签名带时间戳与单独的时间戳平均 of stamped signatures and tokens) |\n", bytes*day*365/1e9, bytes)
	}

	fmt.Fprint(&out, "\n## 一台设备随负载 (one appliance, by load)\n\n![p50、p99](capacity.svg)\n\n| 每秒签名 a second | 处理器占用 busy | p50, ms | p99, ms |\n| ---: | ---: | ---: | ---: |\n")
	picture := chart{
		title: "一台设备：延迟随每秒签名数 (one appliance: latency by signatures a second)", logX: true, logY: true,
		xText: func(v float64) string { return fmt.Sprintf("%.0f", v) }, yText: func(v float64) string { return fmt.Sprintf("%g ms", v) },
		series: []series{{name: "p50"}, {name: "p99"}},
	}
	full := float64(stamped.cores) / stamped.need
	for _, part := range []float64{0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95} {
		a := stamped.simulate(k.seed, 100_000, 0, part*full)
		fmt.Fprintf(&out, "| %.0f | %.0f %% | %.2f | %.2f |\n", part*full, 100*a.busy, a.p50, a.p99)
		picture.series[0].points = append(picture.series[0].points, [2]float64{part * full, a.p50})
		picture.series[1].points = append(picture.series[1].points, [2]float64{part * full, a.p99})
		if len(picture.xTicks) == 0 || part*full > 2*picture.xTicks[len(picture.xTicks)-1] {
			picture.xTicks = append(picture.xTicks, part*full)
		}
	}

	province := peak * float64(k.hospitals)
	need := int(math.Ceil(province / most.rate))
	share := stamped.simulate(k.seed, 100_000, 0, province/float64(need))
	fmt.Fprintf(&out, "\n## 全省 %d 家 (a province)\n\n每家都如上、同时最忙，是最坏情形 (each as above, all in their busiest minute at once: the worst case).\n\n| | |\n| --- | ---: |\n"+
		"| 每日签名 signatures a day | %.0f |\n| 最忙一分钟 busiest minute | %.0f /s |\n| 各院自有设备 each its own：双院区各一台 two campuses | %d 台 appliances |\n"+
		"| 集中，虚拟地址后的台数 together behind a virtual address | %d 台，另备一台 and one spare |\n| 集中时 then：p50、p99、占用 busy | %.2f、%.2f ms、%.0f %% |\n| 中心库每秒行数 rows a second in the central database | %.0f |\n",
		k.hospitals, day*float64(k.hospitals), province, 2*k.hospitals, need, share.p50, share.p99, 100*share.busy, province)
	fmt.Fprint(&out, "\n外推超出了实测：中心库只在一台 PostgreSQL 上测过，见 [database.md](../bench/results/database.md)；网络与虚拟地址不在模型内。\n"+
		"(This goes beyond what was measured: the central database was measured on one PostgreSQL; network and virtual address are not in the model.)\n")
	fmt.Print(out.String())
	data, err := json.MarshalIndent(capacityResult{most.rate, most.rate / peak * float64(k.staff), k.staff, k.each, day, peak, users, wrong}, "", " ")
	if err != nil {
		return err
	}
	return errors.Join(os.WriteFile(filepath.Join(k.results, "capacity.json"), append(data, '\n'), 0o644), os.WriteFile(k.page, []byte(out.String()), 0o644), os.WriteFile(strings.TrimSuffix(k.page, ".md")+".svg", picture.svg(), 0o644))
}

// check holds the model against the run of many users, says by how much it errs, and answers how many they were, 0 if there is no such run, and the error of its rate.
func (k *capacity) check(out *strings.Builder, cases []benchCase, cores int, stamp string, scenes []*loadScene) (users int, wrong float64) {
	name := map[bool]string{true: "stamped", false: "sign"}[stamp == "required"]
	s, err := measuredService(cases, name, name+"-1", cores, true)
	i := slices.IndexFunc(scenes, func(s *loadScene) bool { return s.Name == "sign" && len(s.Samples) > 0 })
	if err != nil || i < 0 {
		fmt.Fprint(out, "**未核对**：没有 load.json，先运行 `make load`；以下各数只是模型的 (not checked: run `make load` first; what follows is the model's alone)。\n")
		return 0, 0
	}
	samples := scenes[i].Samples
	users = samples[0].Users
	model := s.simulate(k.seed, 100_000, users, 0)
	seen := func(f func(loadSample) float64) spread { return spreadOf(each(samples, f)) }
	fmt.Fprintf(out, "处理器时间一次 processor time of one (%s)：%.0f µs，含客户端；形状 σ %.2f；另等 beside it %.2f ms。%d 个用户不停顿：\n\n| | 模型 model | 实测 measured | 最小–最大 min – max | 模型的误差 the model's error |\n| --- | ---: | ---: | ---: | ---: |\n", name, 1e6*s.need, s.sigma, 1000*s.wait, users)
	rate := seen(loadSample.rate)
	for _, line := range []struct {
		name  string
		model float64
		seen  spread
	}{
		{"每秒 a second", model.rate, rate},
		{"p50, ms", model.p50, seen(func(s loadSample) float64 { return s.All.P50 })},
		{"p99, ms", model.p99, seen(func(s loadSample) float64 { return s.All.P99 })},
	} {
		fmt.Fprintf(out, "| %s | %.1f | %.1f | %.1f – %.1f | %+.0f %% |\n", line.name, line.model, line.seen.Median, line.seen.Least, line.seen.Most, 100*(line.model/line.seen.Median-1))
	}
	fmt.Fprint(out, "\n只核对了饱和这一点；部分负载下的 p50、p99 没有实测可比 (checked where it is saturated; nothing was measured to hold the latencies at part load against).\n")
	wrong = model.rate/rate.Median - 1
	if wrong > 0 {
		fmt.Fprintf(out, "\n模型偏乐观，以下各数因此把处理器时间乘以 %.2f (the model promises too much: processor times below are multiplied by that).\n", 1+wrong)
	}
	return users, wrong
}

// most is the greatest rate that stays within both limits, to one part in a hundred.
func (k *capacity) most(s service) answered {
	low, high := 0.0, float64(s.cores)/s.need
	best := answered{}
	for high-low > high/100 {
		rate := (low + high) / 2
		if a := s.simulate(k.seed, 50_000, 0, rate); a.busy <= k.limitLoad && a.p99 <= k.limitMS {
			low, best = rate, a
		} else {
			high = rate
		}
	}
	return best
}

// bytesEach is what the journal grows by for each document that was signed or stamped, 0 where that is not known.
func (r *soakReport) bytesEach() float64 {
	n := len(r.Points)
	if n < 2 {
		return 0
	}
	var documents int64
	for name, t := range r.Classes {
		if name != loadNames[loadVerify] {
			documents += t.Documents
		}
	}
	// The points are of a part of the run, so are the documents.
	first, last := r.Points[0], r.Points[n-1]
	all := r.requests()
	if documents == 0 || all == 0 || last.Requests <= first.Requests {
		return 0
	}
	return float64(last.Journal-first.Journal) / (float64(documents) * float64(last.Requests-first.Requests) / float64(all))
}

func (r *soakReport) requests() (n int64) {
	for _, t := range r.Classes {
		n += t.Requests
	}
	return n
}

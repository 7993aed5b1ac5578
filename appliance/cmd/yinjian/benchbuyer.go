package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
)

const benchBuyerText = `选型的人要的一张表、一幅图，取自结果目录(load.json、bench.json、capacity.json、soak.json)：写出 buyer.svg，并写进各 README 的标记之间。不测量；
没有测过的写明。
The one table and the one picture that a buyer asks for, from a folder of results: writes buyer.svg, and the table between the marks of
each README. It measures nothing; what was not measured is said.`

// The marks in a README.
const buyerBegin, buyerEnd = "<!-- measured: yinjian bench-buyer -->", "<!-- /measured -->"

// A buyer is what the table and the picture are made of. What has no result is nil or 0.
type buyer struct {
	bench struct {
		Machine machineInfo
		Cases   []*benchCase
	}
	load struct {
		Machine machineInfo
		Users   int
		Scenes  []*loadScene
	}
	capacity capacityResult
	soak     soakReport
}

func benchBuyerCommand() *cobra.Command {
	var results string
	var readmes []string
	c := &cobra.Command{
		Use: "bench-buyer", Hidden: true, Short: "选型的一表一图 (a buyer's table and picture)", Long: benchBuyerText, Args: exactArgs(0),
		RunE: func(*cobra.Command, []string) error {
			b, err := readBuyer(results)
			if err != nil {
				return err
			}
			if err := os.WriteFile(filepath.Join(results, "buyer.svg"), b.picture(), 0o644); err != nil {
				return err
			}
			if len(readmes) == 0 {
				fmt.Print(b.table(false))
			}
			for _, file := range readmes {
				if err := b.write(file); err != nil {
					return err
				}
			}
			return nil
		},
	}
	c.Flags().StringVar(&results, "results", "bench/results", "结果目录 (folder of the results)")
	c.Flags().StringSliceVar(&readmes, "readme", nil, "写进哪些文件；名称含 zh 的用中文 (files to write into; Chinese where the name has zh)")
	return c
}

func readBuyer(dir string) (*buyer, error) {
	b := &buyer{}
	for file, into := range map[string]any{"bench.json": &b.bench, "load.json": &b.load, "capacity.json": &b.capacity, "soak.json": &b.soak} {
		raw, err := os.ReadFile(filepath.Join(dir, file))
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err == nil {
			err = json.Unmarshal(raw, into)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
	}
	return b, nil
}

// write puts the table between the marks.
func (b *buyer) write(file string) error {
	raw, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	before, rest, ok := strings.Cut(string(raw), buyerBegin)
	_, after, ok2 := strings.Cut(rest, buyerEnd)
	if !ok || !ok2 {
		return fmt.Errorf("%s: 没有标记 (no marks) %s … %s", file, buyerBegin, buyerEnd)
	}
	return os.WriteFile(file, []byte(before+buyerBegin+"\n"+b.table(strings.Contains(filepath.Base(file), "zh"))+buyerEnd+after), 0o644)
}

func (b *buyer) scene(name string) *loadScene {
	for _, s := range b.load.Scenes {
		if s.Name == name && len(s.Samples) > 0 {
			return s
		}
	}
	return nil
}

func (b *buyer) measured(name string) *benchCase {
	for _, c := range b.bench.Cases {
		if c.Name == name && len(c.Samples) > 0 {
			return c
		}
	}
	return nil
}

// table is the block: a line for each question, and on what it was measured.
func (b *buyer) table(chinese bool) string {
	say := func(zh, en string) string {
		if chinese {
			return zh
		}
		return en
	}
	var out strings.Builder
	row := func(question, answer, from string) {
		if answer == "" { // nor is its page there
			answer, from = say("未测", "not measured"), ""
		}
		fmt.Fprintf(&out, "| %s | %s | %s |\n", question, answer, from)
	}
	fmt.Fprintf(&out, "| %s | %s | |\n| --- | --- | --- |\n", say("问", "asked"), say("测得（中位数）", "measured (medians)"))

	var answer string
	if s := b.scene("sign"); s != nil {
		rate, sign := spreadOf(each(s.Samples, loadSample.rate)), loadNames[loadSign]
		answer = fmt.Sprintf(say("**每秒 %.0f 个**（%.0f–%.0f）；p50 %.0f ms，p99 %.0f ms", "**%.0f a second** (%.0f – %.0f); p50 %.0f ms, p99 %.0f ms"), rate.Median, rate.Least, rate.Most,
			spreadOf(each(s.Samples, func(s loadSample) float64 { return s.Classes[sign].P50 })).Median, spreadOf(each(s.Samples, func(s loadSample) float64 { return s.Classes[sign].P99 })).Median)
	}
	row(fmt.Sprintf(say("%d 个用户同时签名，应答即发下一个", "%d users sign at once, without a pause"), max(b.load.Users, 500)), answer, "[load.md](bench/results/load.md)")

	answer = ""
	if s := b.scene("mix, long"); s != nil {
		one := s.Samples[0]
		answer = fmt.Sprintf(say("%.0f 分钟：%d 次请求，%d 份文书，**%d 个错误**；签名 p99 %.0f ms", "%.0f minutes: %d requests, %d documents, **%d errors**; sign p99 %.0f ms"),
			one.Seconds/60, one.All.Requests, one.All.Documents, one.errors(), one.Classes[loadNames[loadSign]].P99)
	}
	row(say("他们的混合负载：签名、成批、验证、时间戳", "their mix of sign, batch, verify, timestamp, for long"), answer, "[load.md](bench/results/load.md)")

	answer = ""
	if c := b.measured("stamped-1"); c != nil && c.Samples[0].P50 > 0 {
		answer = fmt.Sprintf("p50 %.2f ms，p99 %.2f ms", spreadOf(each(c.Samples, func(s sample) float64 { return s.P50 })).Median, spreadOf(each(c.Samples, func(s sample) float64 { return s.P99 })).Median)
		answer = say(answer, strings.ReplaceAll(answer, "，", ", "))
	}
	row(say("一名医生的一个签名，带时间戳", "one doctor's signature, stamped"), answer, "[bench.md](bench/results/bench.md)")

	answer = ""
	if c := b.measured("csign"); c != nil {
		answer = fmt.Sprintf(say("每秒 %.0f 个（软件密码机，同机）", "%.0f a second (the software one, on the same processors)"), spreadOf(each(c.Samples, sample.rate)).Median)
	}
	row(say("上限：密码机自己能签多少", "the limit: what the cipher machine itself signs"), answer, "[bench.md](bench/results/bench.md)")

	k := b.capacity
	answer = ""
	if k.Most > 0 {
		answer = fmt.Sprintf(say("每秒 %.0f 个带时间戳的签名，即 %.0f 名同样用法的职工；%d 人 × %d 次 = 每日 %.0f 个，最忙一分钟每秒 %.0f 个，是它的 %.1f %%", "%.0f stamped signatures a second, that is %.0f staff of the same habit; %d × %d = %.0f a day, %.0f a second in the busiest minute, are %.1f %% of it"),
			k.Most, k.Staff2, k.Staff, k.Each, k.Day, k.Peak, 100*k.Peak/k.Most)
		if k.Users == 0 {
			answer += say("；模型未核对", "; the model was not checked")
		} else {
			answer += fmt.Sprintf(say("；推算，模型与 %d 用户实测差 %+.0f %%，已按此折减", "; computed, the model errs by %+.0[2]f %% against the run of %[1]d users, for which it is reduced"), k.Users, 100*k.Error)
		}
	}
	row(say("一台设备承担多少职工", "how many staff one appliance carries"), answer, "[capacity.md](docs/capacity.md)")

	answer = ""
	if b.soak.Seconds > 0 {
		answer = fmt.Sprintf(say("%.0f 分钟内 %d 次故障：严重失效 %d，已应答的 %d 个签名全部在日志中找到", "%[2]d faults in %.0[1]f minutes: %[3]d severe failures, all %[4]d acknowledged signatures found in the journal"),
			b.soak.Seconds/60, len(b.soak.Events), len(b.soak.Severe), b.soak.Acknowledged)
		if b.soak.Found != b.soak.Acknowledged {
			answer = fmt.Sprintf(say("%d 次故障，**找到 %d，已应答 %d**", "%d faults, **%d found of %d acknowledged**"), len(b.soak.Events), b.soak.Found, b.soak.Acknowledged)
		}
	}
	row(say("密码机、数据库、网络、时钟、磁盘轮番出错时", "while machine, database, network, clock and disk fail in turn"), answer, "[soak.md](bench/results/soak.md)")

	if m := b.load.Machine; m.At != "" {
		fmt.Fprintf(&out, say("\n负载一行测于 %s，版本 %s，%s，%d 核（设备、密码机、施压者同机），测量时负载 %s。各行的机器与版本见所引的页；密码机是软件的，换硬件后以其标称值为限。\n", "\nThe load's lines were measured at %s, revision %s, on %s, %d cores shared by appliance, cipher machine and loader, load average %s. Each page names its own machine and revision. The cipher machine is the software one: with hardware its rating is the limit.\n"),
			m.At, m.Revision, m.CPU, m.Cores, m.Load)
	}
	fmt.Fprintf(&out, "\n![%s](bench/results/buyer.svg)\n", say("每秒签名数与延迟", "signatures a second and latency"))
	return out.String()
}

// picture draws what was measured at 1, 16, 64 and 500 connections: latency by rate, with what a hospital needs and what the cipher machine can do.
func (b *buyer) picture() []byte {
	c := chart{
		title: "一台设备：签名延迟随每秒签名数，1、16、64、500 个连接 (latency by signatures a second, 1, 16, 64, 500 connections)", logX: true, logY: true,
		xText:  func(v float64) string { return fmt.Sprintf("%.0f/s", v) },
		yText:  func(v float64) string { return fmt.Sprintf("%g ms", v) },
		series: []series{{name: "p99"}, {name: "p50"}},
	}
	low, high, most := math.Inf(1), 0.0, 0.0
	for _, name := range []string{"sign-1", "sign-16", "sign", "sign-500"} {
		one := b.measured(name)
		if one == nil || one.Samples[0].P50 <= 0 {
			continue
		}
		rate := spreadOf(each(one.Samples, sample.rate)).Median
		p50, p99 := spreadOf(each(one.Samples, func(s sample) float64 { return s.P50 })).Median, spreadOf(each(one.Samples, func(s sample) float64 { return s.P99 })).Median
		c.series[0].points, c.series[1].points = append(c.series[0].points, [2]float64{rate, p99}), append(c.series[1].points, [2]float64{rate, p50})
		low, high, most = min(low, p50), max(high, p99), max(most, rate)
	}
	if high == 0 {
		low, high = 1, 10
	}
	upright := func(name string, at float64) {
		if at > 0 {
			c.series = append(c.series, series{name: name, points: [][2]float64{{at, high}, {at, low}}})
			most = max(most, at)
		}
	}
	upright("~医院最忙一分钟 hospital's peak", b.capacity.Peak)
	if one := b.measured("csign"); one != nil {
		upright("~密码机上限 cipher machine", spreadOf(each(one.Samples, sample.rate)).Median)
	}
	for v := 10.0; v <= most; v *= 10 {
		c.xTicks = append(c.xTicks, v)
	}
	return c.svg()
}

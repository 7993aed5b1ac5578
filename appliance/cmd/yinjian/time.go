package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance/audit"
	"yinjian/ntp"
	"yinjian/ntp/ledger"
	"yinjian/ntp/plot"
)

func timeCommand() *cobra.Command {
	c := group(&cobra.Command{Use: "time", Short: "时间：状态、时间源、每小时台账、图、核准 (time, its sources, ledger and plot)"})
	c.AddCommand(timeStatusCommand(), timeLedgerCommand(), timePlotCommand(), timeSourcesCommand(), readmitCommand())
	return c
}

// shown is adminCommand with a table for people; -o json shows the answer as it is.
func shown[T any](use, short string, flags func(*cobra.Command), ask func(ctx context.Context, a *client.Admin) (json.RawMessage, error), table func(io.Writer, *T)) *cobra.Command {
	var f adminFlags
	c := &cobra.Command{Use: use, Short: short, Args: exactArgs(0), RunE: func(c *cobra.Command, _ []string) error {
		a, err := f.client()
		if err != nil {
			return err
		}
		defer a.Close()
		answer, err := ask(c.Context(), a)
		if err != nil {
			return explain(err)
		}
		if f.output == "json" {
			return f.show(answer)
		}
		var v T
		if err := json.Unmarshal(answer, &v); err != nil {
			return err
		}
		table(os.Stdout, &v)
		return nil
	}}
	f.add(c)
	if flags != nil {
		flags(c)
	}
	return c
}

// beijing is the zone of tables and pictures.
var beijing = audit.Beijing

func local(t time.Time) string {
	if t.IsZero() {
		return "—"
	}
	return t.In(beijing).Format("01-02 15:04:05")
}

// micros writes µs with the digits that matter.
func micros(us int64) string {
	d := time.Duration(us) * time.Microsecond
	switch n := d.Abs(); {
	case n >= 10*time.Second:
		d = d.Round(100 * time.Millisecond)
	case n >= time.Second:
		d = d.Round(10 * time.Millisecond)
	case n >= 10*time.Millisecond:
		d = d.Round(100 * time.Microsecond)
	case n >= time.Millisecond:
		d = d.Round(10 * time.Microsecond)
	}
	return d.String()
}

var stateNames = map[ntp.State]string{
	ntp.Cold: "冷启动，尚无多数源", ntp.Acquiring: "正在获取", ntp.Trusted: "可信", ntp.Holdover: "守时（无多数源，误差渐增）",
	ntp.Untrusted: "不可信，拒绝盖时间戳", ntp.Suspect: "可疑，拒绝盖时间戳",
}

var sourceStates = map[string]string{
	"agreed": "一致", "rejected": "被否决", "candidate": "合格，无多数", "unfit": "不合格", "silent": "无应答", "denied": "拒绝服务", "waiting": "未询问",
}

// A timeReport is the answer about the state.
type timeReport struct {
	State      ntp.State
	Time       time.Time
	BoundUS    int64 `json:"bound_us"`
	Provenance string
	AccuracyUS int64 `json:"accuracy_us"`
	LeftS      int64 `json:"left_s"`
	MinSources int   `json:"min_sources"`
	DriftPPM   int   `json:"drift_ppm"`
	HoldoverS  int64 `json:"holdover_max_s"`
	Round      struct {
		AgoS             float64 `json:"ago_s"`
		Agreed, Rejected []string
		OffsetUS         int64 `json:"offset_us"`
		Error            string
	}
	Workers []struct {
		Machine string
		State   ntp.State
		BoundMS float64 `json:"bound_ms"`
		Wrong   string  `json:"wrong"`
	}
	Sources   []timeSource
	Changes   []ledger.Change
	Stamping  []stampingUnit
	Simulated bool
	Note      string
}

type timeSource struct {
	Name, Group, Address, State, Reason string
	Added                               bool
	Authentication                      string
	OffsetUS                            int64 `json:"offset_us"`
	DistanceUS                          int64 `json:"root_distance_us"`
	RTTUS                               int64 `json:"rtt_us"`
	Stratum                             int
	Leap                                int
	RefID                               string
	ReferenceAge                        float64 `json:"reference_age_s"`
}

func timeStatusCommand() *cobra.Command {
	return shown("status", "状态、误差上限、各源之言、还能守时多久、最近变化 (state, bound, what the sources say)", nil,
		func(ctx context.Context, a *client.Admin) (json.RawMessage, error) { return a.TimeStatus(ctx) }, printTimeStatus)
}

func printTimeStatus(w io.Writer, r *timeReport) {
	fmt.Fprintf(w, "状态 state:     %s（%s）\n", stateNames[r.State], r.State)
	if r.Time.IsZero() {
		fmt.Fprintf(w, "时间 time:      尚无 (none yet)\n")
	} else {
		fmt.Fprintf(w, "时间 time:      %s（UTC+8），误差上限 bound ±%s，准确度 accuracy %s\n", r.Time.In(beijing).Format("2006-01-02 15:04:05.000"), micros(r.BoundUS), micros(r.AccuracyUS))
	}
	fmt.Fprintf(w, "还能守时 left:  %s（若自此再无多数源；%d ppm，至多 %s）\n", hours(r.LeftS), r.DriftPPM, hours(r.HoldoverS))
	fmt.Fprintf(w, "依据 by:        %s\n", cmp.Or(r.Provenance, "—"))
	if r.Round.AgoS > 0 {
		fmt.Fprintf(w, "最近一轮 round: %.0f 秒前，一致 agreed [%s]，否决 rejected [%s]，策略要求 %d 组\n", r.Round.AgoS, strings.Join(r.Round.Agreed, " "), strings.Join(r.Round.Rejected, " "), r.MinSources)
		if r.Round.Error != "" {
			fmt.Fprintf(w, "               %s；与本机时间差 offset %s\n", r.Round.Error, micros(r.Round.OffsetUS))
		}
	}
	for _, k := range r.Workers { // each has a clock of its own, and asks the same sources
		fmt.Fprintf(w, "时间戳进程 worker %s: %s（%s），误差上限 bound ±%s %s\n", k.Machine, stateNames[k.State], k.State, micros(int64(k.BoundMS*1000)), k.Wrong)
	}
	for _, n := range []string{r.Note, map[bool]string{true: "模拟北斗：时间即本机时间，仅供演示 (simulated BeiDou: the machine's own time)"}[r.Simulated]} {
		if n != "" {
			fmt.Fprintf(w, "注意 note:      %s\n", n)
		}
	}
	fmt.Fprintln(w, "\n时间源 sources")
	printTimeSources(w, &r.Sources)
	fmt.Fprintln(w, "\n最近变化 changes（UTC+8）")
	if len(r.Changes) == 0 {
		fmt.Fprintln(w, "  （无 none）")
	}
	t := &columns{to: w}
	for _, c := range r.Changes {
		fmt.Fprintf(t, "  %s\t%s → %s\t%s\n", local(c.At), c.From, c.To, c.Reason)
	}
	t.flush()
	fmt.Fprintln(w, "\n时间戳单元 units")
	printUnits(w, r.Stamping)
}

func hours(s int64) string {
	return (time.Duration(s) * time.Second).String()
}

func printTimeSources(w io.Writer, sources *[]timeSource) {
	t := &columns{to: w}
	fmt.Fprintln(t, "名称 name\t组 group\t地址 address\t状态 state\t偏差 offset\t根距离 root dist.\t往返 rtt\t层 stratum\t参考 refid\t参考年龄 ref. age\t认证 auth\t原因 reason")
	for _, s := range *sources {
		added := map[bool]string{true: "（运行时添加）"}[s.Added]
		if s.Stratum == 0 {
			fmt.Fprintf(t, "%s%s\t%s\t%s\t%s\t—\t—\t—\t—\t—\t—\t%s\t%s\n", s.Name, added, s.Group, s.Address, sourceStates[s.State], cmp.Or(s.Authentication, "无"), s.Reason)
			continue
		}
		fmt.Fprintf(t, "%s%s\t%s\t%s\t%s\t%s\t%s\t%s\t%d\t%s\t%.0fs\t%s\t%s\n", s.Name, added, s.Group, s.Address, sourceStates[s.State], micros(s.OffsetUS), micros(s.DistanceUS), micros(s.RTTUS),
			s.Stratum, s.RefID, s.ReferenceAge, cmp.Or(s.Authentication, "无"), s.Reason)
	}
	t.flush()
}

// A timeHistory is what journal and memory know of a time.
type timeHistory struct {
	From       time.Time       `json:"from"`
	To         time.Time       `json:"to"`
	AccuracyUS int64           `json:"accuracy_us"`
	Hours      []ledger.Hour   `json:"hours"`
	Changes    []ledger.Change `json:"changes"`
	Points     []ledger.Point  `json:"points"`
	PointsFrom time.Time       `json:"points_from"`
}

// A period is what --from and --to say.
type period struct{ from, to string }

func (p *period) add(c *cobra.Command) {
	c.Flags().StringVar(&p.from, "from", "", "自：RFC 3339、“2006-01-02 15:04”（UTC+8）或“6h”（此前） (since; a time, or how long ago; default 24h)")
	c.Flags().StringVar(&p.to, "to", "", "至，缺省为现在 (until; default now)")
}

// parse answers both ends as RFC 3339. The present is the appliance's, and asked for.
func (p *period) parse(ctx context.Context, a *client.Admin) (from, to time.Time, err error) {
	answer, err := a.TimeStatus(ctx)
	if err != nil {
		return from, to, explain(err)
	}
	var r timeReport
	if err := json.Unmarshal(answer, &r); err != nil {
		return from, to, err
	}
	if r.Time.IsZero() && (p.from == "" || p.to == "") {
		return from, to, errors.New("设备尚无时间：请给出 --from 与 --to (the appliance has no time yet: give --from and --to)")
	}
	one := func(flag, s string, def time.Time) (time.Time, error) {
		if s == "" {
			return def, nil
		}
		if t, err := time.Parse(time.RFC3339, s); err == nil {
			return t, nil
		}
		for _, format := range []string{"2006-01-02 15:04:05", "2006-01-02 15:04", "2006-01-02"} {
			if t, err := time.ParseInLocation(format, s, beijing); err == nil {
				return t, nil
			}
		}
		if ago, err := time.ParseDuration(s); err == nil && ago > 0 && !r.Time.IsZero() {
			return r.Time.Add(-ago), nil
		}
		return def, usageError{fmt.Errorf("--%s %q：无法读懂 (not understood)", flag, s)}
	}
	if to, err = one("to", p.to, r.Time); err != nil {
		return from, to, err
	}
	if from, err = one("from", p.from, to.Add(-24*time.Hour)); err != nil {
		return from, to, err
	}
	if !from.Before(to) {
		return from, to, usageError{errors.New("--from 须早于 --to (--from must be before --to)")}
	}
	return from, to, nil
}

// askDays is how much one question asks for; a longer time takes several.
const askDays = 31 * 24 * time.Hour

// history asks for a time of any length. An hour that two answers have is in the result once.
func history(ctx context.Context, a *client.Admin, from, to time.Time) (*timeHistory, error) {
	all := &timeHistory{From: from, To: to, Hours: []ledger.Hour{}, Changes: []ledger.Change{}, Points: []ledger.Point{}}
	for at := from; at.Before(to); at = at.Add(askDays) {
		end := at.Add(askDays)
		if end.After(to) {
			end = to
		}
		answer, err := a.TimeHistory(ctx, wire.TimeHistory{From: at.UTC().Format(time.RFC3339Nano), To: end.UTC().Format(time.RFC3339Nano)})
		if err != nil {
			return nil, explain(err)
		}
		var part timeHistory
		if err := json.Unmarshal(answer, &part); err != nil {
			return nil, err
		}
		all.AccuracyUS, all.PointsFrom = part.AccuracyUS, part.PointsFrom
		for _, h := range part.Hours {
			if n := len(all.Hours); n == 0 || h.From.After(all.Hours[n-1].From) {
				all.Hours = append(all.Hours, h)
			}
		}
		for _, c := range part.Changes {
			if n := len(all.Changes); n == 0 || c.At.After(all.Changes[n-1].At) {
				all.Changes = append(all.Changes, c)
			}
		}
		all.Points = append(all.Points, part.Points...)
	}
	return all, nil
}

func timeLedgerCommand() *cobra.Command {
	var p period
	return shown("ledger", "每小时台账，取自日志 (the hourly ledger, from the journal)", p.add, func(ctx context.Context, a *client.Admin) (json.RawMessage, error) {
		from, to, err := p.parse(ctx, a)
		if err != nil {
			return nil, err
		}
		h, err := history(ctx, a, from, to)
		if err != nil {
			return nil, err
		}
		h.Points = []ledger.Point{}
		return json.Marshal(h)
	}, printLedger)
}

func printLedger(w io.Writer, h *timeHistory) {
	t := &columns{to: w}
	fmt.Fprintln(t, "自 from（UTC+8）\t至 to\t轮 rounds\t确认 conf.\t误差上限 bound\t状态 states\t时间戳 tokens\t因时间拒绝\t时间源 source\t询问/应答/合格/否决\t偏差 offset 末/小/大\t根距离\t层\t参考\t原因 reason")
	for _, one := range h.Hours {
		bound := "—"
		if one.BoundMaxUS > 0 {
			bound = micros(one.BoundMinUS) + "…" + micros(one.BoundMaxUS)
		}
		var states []string
		for _, s := range []ntp.State{ntp.Trusted, ntp.Holdover, ntp.Acquiring, ntp.Cold, ntp.Untrusted, ntp.Suspect} {
			if ms := one.StatesMS[s]; ms > 0 {
				states = append(states, fmt.Sprintf("%s %s", s, (time.Duration(ms)*time.Millisecond).Round(time.Second)))
			}
		}
		head := fmt.Sprintf("%s\t%s\t%d\t%d\t%s\t%s\t%d\t%d", local(one.From), local(one.To), one.Rounds, one.Confirmed, bound, strings.Join(states, " "), one.Tokens.Issued, one.Tokens.RefusedTime)
		for _, s := range one.Sources {
			offset := "—"
			if s.Offsets > 0 {
				offset = micros(s.OffsetUS) + "/" + micros(s.MinUS) + "/" + micros(s.MaxUS)
			}
			fmt.Fprintf(t, "%s\t%s(%s)\t%d/%d/%d/%d\t%s\t%s\t%d\t%s\t%s\n", head, s.Name, s.Group, s.Polls, s.Answers, s.Candidates, s.Rejected, offset, micros(s.DistanceUS), s.Stratum, s.RefID, s.Reason)
			head = strings.Repeat("\t", 7)
		}
		if len(one.Sources) == 0 {
			fmt.Fprintln(t, head)
		}
	}
	t.flush()
	if len(h.Hours) == 0 {
		fmt.Fprintln(w, "（此时段无台账 nothing was recorded in this time）")
	}
}

func timePlotCommand() *cobra.Command {
	var f adminFlags
	var p period
	var file string
	c := &cobra.Command{
		Use: "plot -o FILE.svg", Short: "绘图：各源偏差、误差上限、状态 (draw offsets, bound and state as SVG)", Args: exactArgs(0),
		Long: `绘制 SVG 图：各时间源与设备自身时间之差、误差上限的色带、承诺的准确度、状态条。缺省为最近 24 小时。
内存里有每一轮的时段（约最近 18 小时，设备重启后从头积累）逐轮绘制，更早的时段用日志中的每小时台账绘制。

Draws offset of each source, the bound, the accuracy promised and the state. Where memory has every round (some 18 hours
at 16 s, from the last start on) each is a mark; before that, the hours of the journal's ledger are.`,
		RunE: func(c *cobra.Command, _ []string) error {
			f.output = "text"
			a, err := f.client()
			if err != nil {
				return err
			}
			defer a.Close()
			from, to, err := p.parse(c.Context(), a)
			if err != nil {
				return err
			}
			h, err := history(c.Context(), a, from, to)
			if err != nil {
				return err
			}
			picture, err := plot.Draw(plot.Data{
				Title: "设备时间 appliance time", From: from, To: to, Zone: beijing, Accuracy: time.Duration(h.AccuracyUS) * time.Microsecond,
				Points: h.Points, Hours: h.Hours, Changes: h.Changes,
			})
			if err != nil {
				return fmt.Errorf("没有可绘制的内容 (nothing to draw): %w", err)
			}
			if err := replaceFile(file, picture); err != nil {
				return err
			}
			fmt.Printf("已写出 (written): %s，%d 轮、%d 小时、%d 次状态变化 (rounds, hours, changes)\n", file, len(h.Points), len(h.Hours), len(h.Changes))
			return nil
		},
	}
	c.Flags().StringVar(&f.dir, "dir", "", "设备目录 (the appliance's folder)")
	c.Flags().StringVarP(&file, "out", "o", "", "写到此文件 (where to)；必填 (required)")
	for _, name := range []string{"dir", "out"} {
		_ = c.MarkFlagRequired(name) // the flags are there
	}
	p.add(c)
	return c
}

func timeSourcesCommand() *cobra.Command {
	c := group(&cobra.Command{Use: "sources", Short: "时间源：列出、添加、移除，不必重启 (time sources, changed while the appliance runs)"})
	var add wire.AddTimeSource
	var reason string
	c.AddCommand(
		shown("list", "列出时间源及其状态 (list them, and what they say)", nil,
			func(ctx context.Context, a *client.Admin) (json.RawMessage, error) { return a.ListTimeSources(ctx) }, printTimeSources),
		adminCommand("add NAME", "添加时间源：先试问一次，成功才添加 (add one; it is asked first)", 1, func(c *cobra.Command) {
			required(c, &add.Group, "group", "组：共用天线或上游的源写同一组 (sources that share an antenna or upstream share a group)")
			required(c, &add.Address, "address", "host:port")
			c.Flags().IntVar(&add.KeyID, "key-id", 0, "对称密钥编号 (symmetric key id)")
			c.Flags().StringVar(&add.KeyType, "key-type", "", "SHA256、AES128 或 AES256")
			c.Flags().StringVar(&add.KeyFile, "key-file", "", "密钥文件，chrony 格式，从设备目录算起 (in chrony's format)")
			required(c, &add.Reason, "reason", "原因，记入日志 (why, for the journal)")
			c.Flags().BoolVar(&add.Force, "force", false, "即使试问不成功 (although it does not answer, or contradicts own time)")
		}, func(ctx context.Context, a *client.Admin, args []string) (json.RawMessage, error) {
			add.Name = args[0]
			return a.AddTimeSource(ctx, add)
		}),
		adminCommand("remove NAME", "移除时间源；剩余组数不足策略要求时拒绝 (remove one, unless too few groups would be left)", 1, func(c *cobra.Command) {
			required(c, &reason, "reason", "原因，记入日志 (why, for the journal)")
		}, func(ctx context.Context, a *client.Admin, args []string) (json.RawMessage, error) {
			return a.RemoveTimeSource(ctx, wire.RemoveTimeSource{Name: args[0], Reason: reason})
		}),
	)
	return c
}

func readmitCommand() *cobra.Command {
	var req wire.ReadmitTime
	return adminCommand("readmit", "核准：多数源与本机时间相差过大时，两人核对后让其生效 (let in a majority that is far away, after two persons have checked it)", 0, func(c *cobra.Command) {
		required(c, &req.Reason, "reason", "核对了什么，记入日志 (what it was held against, for the journal)")
		c.Flags().StringArrayVar(&req.Persons, "confirmed-by", nil, "核对人，给两次，记入日志；本命令不核验其身份 (who has checked it, twice; their word is recorded, not proved)")
	}, func(ctx context.Context, a *client.Admin, _ []string) (json.RawMessage, error) {
		if len(req.Persons) != 2 && !(a.LoggedIn() && len(req.Persons) == 0) {
			return nil, usageError{errors.New("--confirmed-by 须给两次 (give it twice)")}
		}
		return a.ReadmitTime(ctx, req)
	})
}

// A stampingUnit is one timestamp unit.
type stampingUnit struct {
	Unit, State, Reason string
	ChangedBy           string    `json:"changed_by"`
	ChangedAt           string    `json:"changed_at"`
	NotAfter            time.Time `json:"not_after"`
	Policy              string
}

var unitStates = map[string]string{"running": "运行", "stopped": "已停止", "unable": "不能盖章"}

func printUnits(w io.Writer, units []stampingUnit) {
	t := &columns{to: w}
	fmt.Fprintln(t, "单元 unit\t状态 state\t策略 policy\t证书有效期止 until\t变更人 by\t变更时间 at\t原因 reason")
	for _, u := range units {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", u.Unit, unitStates[u.State], u.Policy, u.NotAfter.In(beijing).Format(time.DateOnly), cmp.Or(u.ChangedBy, "—"), cmp.Or(u.ChangedAt, "—"), u.Reason)
	}
	t.flush()
}

func stampingCommand() *cobra.Command {
	c := group(&cobra.Command{Use: "tsa", Short: "时间戳服务：状态、停止、启动、记录 (the time-stamping service)"})
	type status struct {
		Units  []stampingUnit
		Tokens ledger.Tokens
	}
	var req wire.StampService
	var lines wire.StampLog
	change := func(act, short string) *cobra.Command {
		return adminCommand(act, short, 0, func(c *cobra.Command) {
			c.Flags().StringVar(&req.Unit, "unit", "", "单元，缺省为全部 (one unit; default all)")
			required(c, &req.Reason, "reason", "原因，记入日志 (why, for the journal)")
		}, func(ctx context.Context, a *client.Admin, _ []string) (json.RawMessage, error) {
			return a.ChangeStamping(ctx, act, req)
		})
	}
	type line struct {
		Sequence                              uint64
		Time                                  time.Time
		Kind, Unit, Requester, Serial, Reason string
		BoundUS                               int64 `json:"bound_us"`
		Count                                 int64
	}
	c.AddCommand(
		shown("status", "各单元的状态与启动以来的次数 (the units, and what was counted since the start)", nil,
			func(ctx context.Context, a *client.Admin) (json.RawMessage, error) { return a.StampStatus(ctx) },
			func(w io.Writer, s *status) {
				printUnits(w, s.Units)
				fmt.Fprintf(w, "启动以来 since the start: 签发 issued %d，因时间拒绝 refused for time %d，其他拒绝 other refusals %d\n", s.Tokens.Issued, s.Tokens.RefusedTime, s.Tokens.RefusedOther)
			}),
		change("stop", "停止盖时间戳：请求得到 systemFailure，须盖时间戳的签名在签之前被拒绝 (stop it; signatures that need a stamp are refused)"),
		change("start", "恢复盖时间戳 (start it again)"),
		shown("log", "最近的时间戳、拒绝与启停，取自日志 (the last tokens, refusals and decisions, from the journal)", func(c *cobra.Command) {
			c.Flags().IntVarP(&lines.Lines, "lines", "n", 20, "行数 1–1000 (how many)")
		}, func(ctx context.Context, a *client.Admin) (json.RawMessage, error) { return a.StampLog(ctx, lines) },
			func(w io.Writer, all *[]line) {
				t := &columns{to: w}
				fmt.Fprintln(t, "条目 entry\t时间 time（UTC+8）\t类别 kind\t单元 unit\t请求者 requester\t序列号 serial\t误差上限 bound\t次数 count\t原因 reason")
				for _, l := range *all {
					bound, count := "", ""
					if l.Kind == "token" {
						bound = micros(l.BoundUS)
					}
					if l.Count > 0 {
						count = fmt.Sprint(l.Count)
					}
					fmt.Fprintf(t, "%d\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", l.Sequence, local(l.Time), l.Kind, l.Unit, l.Requester, l.Serial, bound, count, l.Reason)
				}
				t.flush()
			}),
	)
	return c
}

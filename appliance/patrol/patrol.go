// Package patrol judges an appliance's own answers for a patrol (巡检): what they say, how bad it is, what to do, and what
// was not looked at. Whoever calls it has asked the appliance and read its journal; nothing is asked here.
package patrol

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"yinjian/appliance/alarm"
	"yinjian/appliance/audit"
	"yinjian/ntp"
	"yinjian/ntp/ledger"
)

// A Period is how much a patrol looks back on, and how deep it looks.
type Period string

const (
	Daily     Period = "daily"     // the journal since the last patrol
	Weekly    Period = "weekly"    // and a sample of what is before
	Monthly   Period = "monthly"   // all of the journal, and the central database by day
	Quarterly Period = "quarterly" // and the central database by its MACs
)

var periods = map[Period]struct {
	chinese string
	days    int
}{Daily: {"日巡检", 1}, Weekly: {"周巡检", 7}, Monthly: {"月巡检", 31}, Quarterly: {"季巡检", 92}}

// Days is how far it looks back.
func (p Period) Days() int { return periods[p].days }

// Chinese is its name for people.
func (p Period) Chinese() string { return periods[p].chinese }

// A Line is one thing that was looked at, or was not.
type Line struct {
	Item     string         `json:"item"`
	Value    string         `json:"value"`
	Severity alarm.Severity `json:"severity"`
	Next     string         `json:"next,omitempty"` // what to do, where something is to be done
	// NotChecked: nobody looked. The value says why.
	NotChecked bool `json:"not_checked,omitempty"`
}

// An Area is what belongs together.
type Area struct {
	Name     string         `json:"name"`
	Title    string         `json:"title"`
	Severity alarm.Severity `json:"severity"` // the worst of its lines
	Lines    []Line         `json:"lines"`
}

// A Report is what a patrol found.
type Report struct {
	Format   string         `json:"format"` // "yinjian-patrol/1"
	Period   Period         `json:"period"`
	Node     string         `json:"node"`
	Campus   string         `json:"campus"`
	Version  string         `json:"version"`
	From     string         `json:"from"` // RFC 3339
	To       string         `json:"to"`
	Trusted  bool           `json:"time_trusted"` // To is a trusted time; otherwise it is the machine's clock
	Running  bool           `json:"running"`      // the appliance was, and answered
	Severity alarm.Severity `json:"severity"`
	Areas    []Area         `json:"areas"`
	// Ledger counts the alarms that were raised in the period, by severity and code.
	Ledger []LedgerLine `json:"ledger"`
	// NotChecked says plainly what nobody looked at.
	NotChecked []string `json:"not_checked"`
	Summary    Summary  `json:"summary"`
}

// A LedgerLine is what became of one kind of alarm in the period.
type LedgerLine struct {
	Code     alarm.Code     `json:"code"`
	Severity alarm.Severity `json:"severity"` // the worst
	Title    string         `json:"title"`
	Next     string         `json:"next"`
	Raised   int            `json:"raised"`
	Open     int            `json:"open"` // not over at the end
	Last     string         `json:"last"` // RFC 3339
	// Drill: drills brought these about on purpose; they count as notices.
	Drill bool `json:"drill,omitempty"`
}

// A Summary is what the next patrol goes on from.
type Summary struct {
	Entries  uint64         `json:"entries"` // of the journal, verified up to here; 0: nothing was
	Root     string         `json:"root"`
	Severity alarm.Severity `json:"severity"`
	To       string         `json:"to"`
}

// An AlarmEntry is an entry of the journal about an alarm.
type AlarmEntry struct {
	ID       string
	Code     alarm.Code
	Object   string
	Severity alarm.Severity
	Cleared  bool
	Drill    string // that brought it about, "" for none
	At       time.Time
}

// An Hour is an entry of the journal about an hour of service.
type Hour struct {
	To       time.Time         `json:"to"`
	Refused  map[string]uint64 `json:"refused"`
	Free     uint64            `json:"free_bytes"`
	Entries  uint64            `json:"entries"`
	Lag      uint64            `json:"lag"`
	Machines map[string]struct {
		Done      int64   `json:"done"`
		Failed    int64   `json:"failed"`
		LatencyMS float64 `json:"latency_ms"`
	} `json:"machines"`
}

// A Volume is a file system that the appliance needs.
type Volume struct {
	Name        string // what is there
	Free, Total uint64
	Error       string
}

// A Journal is what was verified.
type Journal struct {
	Entries  uint64
	Spans    []audit.SpanReport
	Whole    *audit.Report // instead of spans
	Last     *audit.Checkpoint
	Previous string // why there is nothing to go on from, "" if there is
}

// An Input is what was asked and read. A nil answer was not had: Missing says why, by the same name.
type Input struct {
	Period   Period
	Node     string
	Campus   string
	Version  string
	From, To time.Time
	Trusted  bool
	Running  bool
	// Answers of the appliance, as JSON: "state", "time", "certificates", "crls", "backups", "compare", "sweep". Missing has
	// "journal" for one that cannot be read, and "period" for one that does not say what the period was like.
	Answers map[string]json.RawMessage
	Missing map[string]string
	Volumes []Volume
	Reserve uint64 // bytes below which signing is refused
	Journal *Journal
	Alarms  []AlarmEntry // of the period, in order
	Hours   []Hour
	Clock   []ledger.Hour
	// BackupVerified is when a backup was last verified; zero: never.
	BackupVerified time.Time
	BackupMaxAge   time.Duration
}

type judge struct {
	in     *Input
	report *Report
	area   *Area
	// drilled are the alarms that a drill brings about now: no more than notices.
	drilled []alarm.Code
}

func (j *judge) begin(name, title string) {
	j.report.Areas = append(j.report.Areas, Area{Name: name, Title: title, Lines: []Line{}})
	j.area = &j.report.Areas[len(j.report.Areas)-1]
}

// say adds a line. Of a code the words of what to do are the alarm's.
func (j *judge) say(severity alarm.Severity, code alarm.Code, item, format string, args ...any) {
	l := Line{Item: item, Value: fmt.Sprintf(format, args...), Severity: severity}
	if severity > alarm.Notice && slices.Contains(j.drilled, code) {
		severity = alarm.Notice
		l.Severity, l.Value = severity, l.Value+"（演练进行中，不作为真的异常 a drill is under way）"
	}
	if severity > alarm.Normal {
		l.Next = alarm.Meanings[code].Next
	}
	j.area.Lines = append(j.area.Lines, l)
	j.area.Severity = max(j.area.Severity, severity)
	j.report.Severity = max(j.report.Severity, severity)
}

func (j *judge) notChecked(item, why string) {
	j.area.Lines = append(j.area.Lines, Line{Item: item, Value: why, NotChecked: true})
	j.report.NotChecked = append(j.report.NotChecked, j.area.Title+"·"+item+"："+why)
}

// blind makes what was to be looked at and could not be a warning: whoever reads the exit status alone must not take it for well.
func (j *judge) blind() {
	j.area.Severity, j.report.Severity = max(j.area.Severity, alarm.Warning), max(j.report.Severity, alarm.Warning)
}

// answer decodes an answer of the appliance; without one the item is said to be not checked.
func (j *judge) answer(name, item string, out any) bool {
	data, ok := j.in.Answers[name]
	why := j.in.Missing[name]
	if ok {
		if err := json.Unmarshal(data, out); err != nil {
			ok, why = false, err.Error()
		}
	}
	if !ok {
		if why == "" {
			why = "没有取得 (not had)"
		}
		j.notChecked(item, why)
		j.blind()
	}
	return ok
}

// silent says that an item was not checked, if the journal does not say what the period was like.
func (j *judge) silent(item string) bool {
	why := j.in.Missing["period"]
	if j.in.Journal == nil {
		why = j.in.Missing["journal"]
	}
	if why != "" {
		j.notChecked(item, why)
		j.blind()
	}
	return why != "" || j.in.Journal == nil
}

// Judge makes the report.
func Judge(in Input) *Report {
	r := &Report{
		Format: "yinjian-patrol/1", Period: in.Period, Node: in.Node, Campus: in.Campus, Version: in.Version,
		From: in.From.UTC().Format(time.RFC3339), To: in.To.UTC().Format(time.RFC3339), Trusted: in.Trusted, Running: in.Running,
		Areas: []Area{}, Ledger: []LedgerLine{}, NotChecked: []string{},
	}
	j := &judge{in: &in, report: r}
	for _, f := range []func(){j.service, j.time, j.machines, j.journal, j.disks, j.database, j.certificates, j.peer, j.backups, j.refusals, j.ledger} {
		f()
	}
	r.Summary.Severity, r.Summary.To = r.Severity, r.To
	return r
}

// when is severity if yes, normal otherwise.
func when(yes bool, severity alarm.Severity) alarm.Severity {
	if yes {
		return severity
	}
	return alarm.Normal
}

func (j *judge) service() {
	j.begin("service", "总体")
	if !j.in.Running {
		j.say(alarm.Severe, alarm.SigningStopped, "运行", "设备没有应答 (the appliance does not answer)：%s", j.in.Missing["state"])
		return
	}
	var s struct {
		State      string
		Ready      bool
		UptimeS    int64 `json:"uptime_s"`
		Evaluation string
		Warnings   []string
		Drill      *struct{ Explains []alarm.Code }
	}
	if !j.answer("state", "运行", &s) {
		return
	}
	if s.Drill != nil { // which the warnings name
		j.drilled = s.Drill.Explains
	}
	j.say(when(!s.Ready, alarm.Severe), alarm.SigningStopped, "可签名", "%v（状态 %s，已运行 %s）", s.Ready, s.State, days(time.Duration(s.UptimeS)*time.Second))
	j.say(when(!strings.HasPrefix(s.Evaluation, "无"), alarm.Notice), alarm.Test, "评估用设置", "%s", s.Evaluation)
	for _, w := range s.Warnings {
		j.say(alarm.Notice, alarm.Test, "设备自述的警告", "%s", w)
	}
}

func days(d time.Duration) string {
	if d < 48*time.Hour {
		return d.Round(time.Minute).String()
	}
	return fmt.Sprintf("%d 天", int(d.Hours()/24))
}

func (j *judge) time() {
	j.begin("time", "时间")
	var t struct {
		State      string
		BoundUS    int64 `json:"bound_us"`
		AccuracyUS int64 `json:"accuracy_us"`
		LeftS      int64 `json:"left_s"`
		MinSources int   `json:"min_sources"`
		Round      *struct {
			AgoS float64 `json:"ago_s"`
		}
		Sources []struct {
			Name, Group, State, Reason string
			OffsetUS                   int64 `json:"offset_us"`
		}
	}
	asked := j.answer("time", "现状", &t)
	if early := j.early(); asked && early > 0 && (t.State == "cold" || t.State == "acquiring" || t.Round != nil && t.Round.AgoS == 0) {
		j.notChecked("现状", fmt.Sprintf("尚未：启动后 %s，时间源还没有问够（%s），稍后再巡检", days(early), t.State))
		j.blind()
	} else if asked {
		good := (t.State == "trusted" || t.State == "holdover") && t.BoundUS <= t.AccuracyUS
		level := when(!good, alarm.Severe)
		if good && t.State == "holdover" {
			level = alarm.Warning
		}
		j.say(level, alarm.TimeUntrusted, "现状", "%s，误差上限 %.1f ms（允许 %.0f ms），源全失后还能守时 %s", t.State, float64(t.BoundUS)/1000, float64(t.AccuracyUS)/1000, days(time.Duration(t.LeftS)*time.Second))
		groups := map[string]bool{}
		for _, s := range t.Sources {
			ok := s.State == "agreed"
			if ok {
				groups[s.Group] = true
			}
			value := fmt.Sprintf("%s，偏差 %.1f ms", s.State, float64(s.OffsetUS)/1000)
			if s.Reason != "" {
				value += "，" + s.Reason
			}
			j.say(when(!ok, alarm.Warning), alarm.TimeUntrusted, "时间源 "+s.Name, "%s", value)
		}
		j.say(when(len(groups) < t.MinSources, alarm.Severe), alarm.TimeUntrusted, "一致的组数", "%d（要求 %d）", len(groups), t.MinSources)
	}
	var bound, refused, untrusted int64
	for _, h := range j.in.Clock {
		bound, refused = max(bound, h.BoundMaxUS), refused+int64(h.Tokens.RefusedTime)
		for state, ms := range h.StatesMS {
			if state != ntp.Trusted && state != ntp.Holdover {
				untrusted += ms
			}
		}
	}
	if j.silent("本期台账") {
		return
	}
	if len(j.in.Clock) == 0 {
		j.notChecked("本期台账", "日志里还没有本期的时间台账（每小时一条）")
		return
	}
	j.say(alarm.Normal, "", "本期误差上限的最大值", "%.1f ms（%d 条台账）", float64(bound)/1000, len(j.in.Clock))
	j.say(when(refused > 0, alarm.Warning), alarm.TimeUntrusted, "本期因时间拒绝的时间戳", "%d", refused)
	j.say(when(untrusted > 60_000, alarm.Notice), alarm.TimeUntrusted, "本期时间不可信的时长", "%s（含启动）", (time.Duration(untrusted) * time.Millisecond).Round(time.Second))
}

// slow is a latency beyond which somebody should look: a call's deadline is 5 s by default.
const slow = 500.0

// soon is how long after a start time may still be on its way.
const soon = 2 * time.Minute

// early is how long the appliance has run, if that is not long; 0 if it is, or if nobody knows.
func (j *judge) early() time.Duration {
	var s struct {
		UptimeS *int64 `json:"uptime_s"`
	}
	if json.Unmarshal(j.in.Answers["state"], &s) != nil || s.UptimeS == nil || time.Duration(*s.UptimeS)*time.Second >= soon {
		return 0
	}
	return time.Duration(max(*s.UptimeS, 1)) * time.Second
}

func (j *judge) machines() {
	j.begin("machines", "密码机")
	var s struct {
		Machines []struct {
			Name, State, Reason string
			Slots               []struct {
				Slot, State string
				Only        int     `json:"keys_only_here"`
				LatencyMS   float64 `json:"latency_ms"`
			}
		}
		Uses struct {
			Alarms uint64
			Error  string `json:"last_error"`
		}
	}
	if !j.answer("state", "各密码机", &s) {
		return
	}
	done, failed := map[string]int64{}, map[string]int64{}
	for _, h := range j.in.Hours {
		for name, m := range h.Machines {
			done[name], failed[name] = done[name]+m.Done, failed[name]+m.Failed
		}
	}
	for _, m := range s.Machines {
		level := when(m.State != "up", alarm.Warning)
		worst, only := 0.0, 0
		for _, slot := range m.Slots {
			worst, only = max(worst, slot.LatencyMS), only+slot.Only
			if slot.State != "up" && len(s.Machines) == 1 {
				level = alarm.Severe
			}
		}
		value := fmt.Sprintf("%s，最慢槽位 %.1f ms，本期完成 %d、失败 %d", m.State, worst, done[m.Name], failed[m.Name])
		if only > 0 && len(s.Machines) > 1 {
			value += fmt.Sprintf("，仅在此机的密钥 %d", only)
		}
		if m.Reason != "" {
			value += "：" + m.Reason
		}
		j.say(max(level, when(worst > slow, alarm.Warning)), alarm.MachineAway, "密码机 "+m.Name, "%s", value)
	}
	if len(s.Machines) == 1 {
		j.say(alarm.Notice, alarm.MachineAway, "台数", "只有一台，它停即停签")
	}
	j.say(when(s.Uses.Alarms > 0, alarm.Severe), alarm.UnaccountedUse, "无记录的密钥使用", "累计 %d 项", s.Uses.Alarms)
	if s.Uses.Error != "" {
		j.say(alarm.Warning, alarm.UnaccountedUse, "密钥使用与日志的核对", "未能完成：%s", s.Uses.Error)
	}
}

func (j *judge) journal() {
	j.begin("journal", "日志")
	journal := j.in.Journal
	if journal == nil {
		j.notChecked("核验", j.in.Missing["journal"])
		j.say(alarm.Severe, alarm.JournalFailed, "读取", "日志读不出 (the journal cannot be read)")
		return
	}
	bad := ""
	switch w := journal.Whole; {
	case w != nil:
		if !w.OK() {
			bad = fmt.Sprintf("%d 处：%s", len(w.Findings)+int(w.Omitted), w.Findings[0].DetailZH)
		}
		j.say(when(bad != "", alarm.Severe), alarm.JournalFailed, "全部核验", "%d 条，%d 个检查点，%d 个附件；%s", w.Entries, w.Checkpoints, w.Payloads, orGood(bad))
		if w.Uncovered > 0 && j.in.Running {
			j.say(alarm.Notice, alarm.JournalUnsealed, "检查点之后", "%d 条尚无检查点覆盖", w.Uncovered)
		}
	case len(journal.Spans) == 0:
		j.notChecked("核验", "什么也没有核验："+journal.Previous)
	default:
		var entries uint64
		for _, s := range journal.Spans {
			entries += s.To - s.From
			if s.Wrong != "" && bad == "" {
				bad = fmt.Sprintf("第 %d–%d 条：%s", s.From, s.To, s.Wrong)
			}
		}
		what := "自上次巡检以来"
		if journal.Previous != "" {
			what = "自头至今（" + journal.Previous + "）"
		}
		if len(journal.Spans) > 1 {
			what += fmt.Sprintf("，另抽查 %d 段", len(journal.Spans)-1)
		}
		j.say(when(bad != "", alarm.Severe), alarm.JournalFailed, "核验", "%s，共 %d 条；%s", what, entries, orGood(bad))
		if journal.Spans[0].From > 0 {
			j.notChecked("更早的条目", fmt.Sprintf("前 %d 条以前核验过，这次没有全部重读；月巡检、季巡检全部重读", journal.Spans[0].From))
		}
		if journal.Last != nil && journal.Entries > journal.Last.Size {
			j.notChecked("检查点之后", fmt.Sprintf("%d 条尚无检查点覆盖，这次没有核验", journal.Entries-journal.Last.Size))
		}
	}
	if journal.Last != nil {
		age := j.in.To.Sub(journal.Last.Time.UTC())
		j.say(alarm.Normal, "", "最近检查点", "%d 条，%s 前", journal.Last.Size, days(max(age, 0)))
		if bad == "" {
			j.report.Summary.Entries, j.report.Summary.Root = journal.Last.Size, journal.Last.Root.String()
		}
	} else {
		j.say(alarm.Warning, alarm.JournalUnsealed, "最近检查点", "没有")
	}
	j.notChecked("整本换成旧的", "只有对照外存的检查点才能发现：另存巡检的回执，见 audit verify --known")
}

func orGood(bad string) string {
	if bad == "" {
		return "未发现改动"
	}
	return "发现改动，" + bad
}

func (j *judge) disks() {
	j.begin("disks", "磁盘")
	for _, v := range j.in.Volumes {
		if v.Error != "" {
			j.notChecked(v.Name, v.Error)
			continue
		}
		percent := 100.0
		if v.Total > 0 {
			percent = float64(v.Free) / float64(v.Total) * 100
		}
		level := when(percent < 20, alarm.Warning)
		code := alarm.DiskLow
		if v.Free < 2*j.in.Reserve {
			level, code = alarm.Severe, alarm.DiskReserve
		}
		j.say(level, code, v.Name, "余 %.1f GiB（%.0f %%）", float64(v.Free)/(1<<30), percent)
	}
	left, why := Forecast(j.in.Hours, j.in.Reserve)
	switch {
	case why != "":
		j.notChecked("增长预测", why)
	case left < 0:
		j.say(alarm.Normal, "", "增长预测", "本期余量没有减少")
	default:
		level := when(left < 90, alarm.Notice)
		if left < 30 {
			level = alarm.Warning
		}
		if left < 7 {
			level = alarm.Severe
		}
		j.say(level, alarm.DiskLow, "增长预测", "按本期的速度，%.0f 天后低于保留值", left)
	}
}

// leastSpan is how much must lie between the first and the last hour of a forecast.
const leastSpan = 6 * time.Hour

// Forecast is in how many days the journal's volume falls below the reserve if it goes on as in these hours; below 0: it does
// not. why says why there is none.
func Forecast(hours []Hour, reserve uint64) (left float64, why string) {
	var known []Hour
	for _, h := range hours {
		if h.Free > 0 && !h.To.IsZero() {
			known = append(known, h)
		}
	}
	if len(known) < 2 || known[len(known)-1].To.Sub(known[0].To) < leastSpan {
		return 0, "日志里本期的小时记录不足 6 小时"
	}
	a, b := known[0], known[len(known)-1]
	perDay := (float64(a.Free) - float64(b.Free)) / (b.To.Sub(a.To).Hours() / 24)
	if perDay <= 0 {
		return -1, ""
	}
	return max(0, float64(b.Free)-float64(reserve)) / perDay, ""
}

func (j *judge) database() {
	j.begin("database", "中心库")
	var s struct {
		Projection struct {
			Lag   uint64
			Fork  bool
			Error string `json:"last_error"`
		}
	}
	if j.answer("state", "投递", &s) {
		level, code, value := alarm.Normal, alarm.DatabaseLag, fmt.Sprintf("落后 %d 条", s.Projection.Lag)
		switch {
		case s.Projection.Fork:
			level, code = alarm.Severe, alarm.Fork
		case s.Projection.Error != "":
			level, code = alarm.Warning, alarm.DatabaseAway
		case s.Projection.Lag > 10_000:
			level = alarm.Warning
		}
		if s.Projection.Error != "" {
			value += "：" + s.Projection.Error
		}
		j.say(level, code, "投递", "%s", value)
		var most uint64
		for _, h := range j.in.Hours {
			most = max(most, h.Lag)
		}
		if len(j.in.Hours) > 0 {
			j.say(alarm.Normal, "", "本期整点时落后的最大值", "%d 条", most)
		}
	}
	var found struct {
		Rows        uint64
		Days        []audit.DayDigest
		Differences []audit.Difference
		Omitted     uint64
	}
	if j.in.Period == Daily || j.in.Period == Weekly {
		j.notChecked("与日志对账", "日、周巡检不做；月、季巡检做，或 yinjian db compare")
	} else if j.answer("compare", "与日志对账", &found) {
		n, of := 0, 0
		first := j.in.From.In(audit.Beijing).Format(time.DateOnly)
		for _, d := range found.Days {
			if d.Node == j.in.Node && d.Day >= first {
				of++
				if !d.Agrees() {
					n++
				}
			}
		}
		j.say(when(len(found.Differences) > 0, alarm.Severe), alarm.DatabaseChanged, "与日志对账", "%d 行，%d 处不符；本期 %d 天，%d 天与日志不一致（当日末尾未投递的也算）", found.Rows, len(found.Differences)+int(found.Omitted), of, n)
	}
	if j.in.Period != Quarterly {
		j.notChecked("按 MAC 清查", "季巡检做；后台按 database.sweep_every 也做，发现改动即告警 database-changed")
		return
	}
	var swept struct {
		MACs        uint64 `json:"macs_checked"`
		Differences []audit.Difference
		Omitted     uint64
	}
	switch {
	case !j.answer("sweep", "按 MAC 清查", &swept):
	case swept.MACs == 0 && len(swept.Differences) == 0:
		j.notChecked("按 MAC 清查", "中心库中没有带 MAC 的行可查")
	default:
		j.say(when(len(swept.Differences) > 0, alarm.Severe), alarm.DatabaseChanged, "按 MAC 清查", "%d 个 MAC，%d 处不符", swept.MACs, len(swept.Differences)+int(swept.Omitted))
	}
}

func (j *judge) certificates() {
	j.begin("certificates", "证书与吊销列表")
	var lines []struct {
		Owner, Use, Algorithm, State, Revocation string
		NotAfter                                 *time.Time `json:"not_after"`
		DaysLeft                                 int        `json:"days_left"`
	}
	if j.answer("certificates", "证书", &lines) {
		inUse := map[string]bool{}
		for _, c := range lines {
			inUse[c.Owner+" "+c.Algorithm] = inUse[c.Owner+" "+c.Algorithm] || c.State == "active"
		}
		staff := map[int]int{}
		usable, unusable, unchecked := 0, 0, 0
		told := map[string]bool{}
		for _, c := range lines {
			of := c.Owner + " " + c.Algorithm
			if c.NotAfter == nil || c.State != "active" && inUse[of] { // another has taken its place
				continue
			}
			open := c.State == "active" && c.Revocation != "" && c.Revocation != "good"
			if c.Use == "staff" {
				switch c.State {
				case "active", "expired":
					usable++
				case "unusable":
					unusable++
					continue
				default: // who leaves has none
					continue
				}
				if open {
					unchecked++
				}
				for _, d := range []int{7, 30, 90} {
					if c.DaysLeft < d {
						staff[d]++
						break
					}
				}
				continue
			}
			if open {
				j.notChecked(of+" 的吊销状态", c.Revocation)
			}
			level := when(c.DaysLeft < 90, alarm.Notice)
			if c.DaysLeft < 30 {
				level = alarm.Warning
			}
			if c.DaysLeft < 7 || c.State == "unusable" {
				level = alarm.Severe
			}
			if c.State != "active" && c.State != "unusable" {
				if !told[of] {
					j.say(alarm.Warning, alarm.CertificateDue, of, "%s，没有现用的证书", c.State)
				}
				told[of] = true
				continue
			}
			j.say(level, alarm.CertificateDue, of, "%s，%d 天后到期（%s）", c.State, c.DaysLeft, c.NotAfter.In(audit.Beijing).Format(time.DateOnly))
		}
		j.say(max(when(staff[7]+unusable > 0, alarm.Warning), when(staff[30]+staff[90] > 0, alarm.Notice)), alarm.CertificateDue, "签名人证书", "%d 张；7 天内到期 %d，30 天内 %d，90 天内 %d；不可用 %d", usable, staff[7], staff[30], staff[90], unusable)
		if unchecked > 0 {
			j.notChecked("签名人证书的吊销状态", fmt.Sprintf("%d 张没有现行的吊销列表可查", unchecked))
		}
	}
	var crls struct {
		Lists []struct {
			Issuer, State string
			ThisUpdate    time.Time `json:"this_update"`
			NextUpdate    time.Time `json:"next_update"`
		}
		Sources []struct{ URL, Error string }
	}
	if !j.answer("crls", "吊销列表", &crls) {
		return
	}
	for _, l := range crls.Lists {
		left := l.NextUpdate.Sub(j.in.To)
		level := when(left*10 < l.NextUpdate.Sub(l.ThisUpdate), alarm.Warning)
		if l.State != "current" {
			level = alarm.Severe
		}
		j.say(level, alarm.ListDue, "吊销列表 "+l.Issuer, "%s，%s 后到期", l.State, days(left))
	}
	for i, s := range crls.Sources {
		if s.Error != "" {
			j.say(alarm.Warning, alarm.ListDue, fmt.Sprintf("吊销列表地址 %d", i+1), "取不到：%s", s.Error)
		}
	}
}

func (j *judge) peer() {
	j.begin("peer", "另一院区")
	var s struct {
		Peer *struct {
			Node, Split, Accused string
			Error                string `json:"last_error"`
			Up                   bool
			AgeS                 float64 `json:"age_s"`
			MaxS                 float64 `json:"max_age_s"`
			Gotten               uint64  `json:"confirmed_entries"`
		}
		Directory struct{ Frozen, Waiting, Missing, Open int }
	}
	if !j.answer("state", "院区", &s) {
		return
	}
	if p := s.Peer; p != nil {
		level := when(!p.Up, alarm.Warning)
		if p.AgeS > p.MaxS {
			level = alarm.Severe
		}
		value := fmt.Sprintf("链路 %v，目录副本 %.0f s（上限 %.0f s），对方已见证本机日志 %d 条", p.Up, p.AgeS, p.MaxS, p.Gotten)
		if p.Error != "" {
			value += "：" + p.Error
		}
		j.say(level, alarm.PeerAway, "院区 "+p.Node, "%s", value)
		j.say(when(p.Split+p.Accused != "", alarm.Severe), alarm.SplitView, "互证", "%s", orGood(p.Split+p.Accused))
	} else {
		j.say(alarm.Notice, alarm.PeerAway, "结对", "没有结对：日志没有第二个见证")
	}
	d := s.Directory
	j.say(max(when(d.Frozen > 0, alarm.Severe), when(d.Waiting+d.Missing+d.Open > 0, alarm.Warning)), alarm.DirectoryFrozen, "目录", "冻结 %d，缺版本 %d，未收到 %d，待裁决 %d", d.Frozen, d.Waiting, d.Missing, d.Open)
}

// verifiedWithin is how old the last verification of a backup may be.
const verifiedWithin = 35 * 24 * time.Hour

func (j *judge) backups() {
	j.begin("backups", "备份")
	var b struct {
		Custodians *struct{ Threshold int }
		Last       *struct {
			ID      string
			Entries uint64
			At      struct{ Micros int64 }
		}
		Unfinished map[string]time.Time
		Lost       *struct{ Entries uint64 }
	}
	if j.answer("backups", "备份", &b) {
		j.say(when(b.Custodians == nil, alarm.Warning), alarm.BackupOverdue, "保管人", "%v", map[bool]string{true: "已设定", false: "还没有（先 yinjian backup custodians）"}[b.Custodians != nil])
		if b.Last == nil {
			j.say(alarm.Warning, alarm.BackupOverdue, "上次备份", "从未备份")
		} else {
			age := j.in.To.Sub(time.UnixMicro(b.Last.At.Micros))
			j.say(when(age > j.in.BackupMaxAge, alarm.Warning), alarm.BackupOverdue, "上次备份", "%s 前，%d 条（允许 %s）", days(age), b.Last.Entries, days(j.in.BackupMaxAge))
		}
		j.say(when(len(b.Unfinished) > 0, alarm.Notice), alarm.BackupOverdue, "没有完成的备份", "%d", len(b.Unfinished))
		if b.Lost != nil && b.Lost.Entries > 0 {
			j.say(alarm.Warning, alarm.BackupOverdue, "恢复丢失的条目", "%d，见 yinjian backup missing", b.Lost.Entries)
		}
	}
	if j.silent("上次核验备份") {
		return
	}
	if at := j.in.BackupVerified; at.IsZero() {
		j.say(alarm.Warning, alarm.BackupOverdue, "上次核验备份", "从未核验（yinjian backup verify --dir）")
	} else {
		age := j.in.To.Sub(at)
		j.say(when(age > verifiedWithin, alarm.Warning), alarm.BackupOverdue, "上次核验备份", "%s 前", days(age))
	}
}

// grave are refusals that are no fault of who asked.
var grave = []string{"internal", "journal_unwritable", "disk_reserve", "time_untrusted", "hsm_unavailable", "hsm_needs_operator", "centre_unavailable", "directory_stale", "timeout"}

func (j *judge) refusals() {
	j.begin("refusals", "本期的拒绝（按错误码）")
	if j.silent("拒绝") {
		return
	}
	if len(j.in.Hours) == 0 {
		j.notChecked("拒绝", "日志里还没有本期的小时记录（每小时一条；不足一小时的在停机时记）")
		return
	}
	total := map[string]uint64{}
	for _, h := range j.in.Hours {
		for code, n := range h.Refused {
			total[code] += n
		}
	}
	for _, code := range slices.Sorted(maps.Keys(total)) {
		level := when(slices.Contains(grave, code), alarm.Warning)
		if code == "internal" {
			j.say(level, alarm.SigningStopped, code, "%d 次：程序的错误，请附 yinjian diag 报告", total[code])
			continue
		}
		j.say(level, alarm.SigningStopped, code, "%d 次", total[code])
	}
	if len(total) == 0 {
		j.say(alarm.Normal, "", "拒绝", "没有")
	}
	j.say(alarm.Normal, "", "小时记录", "%d 条", len(j.in.Hours))
}

func (j *judge) ledger() {
	j.begin("alarms", "本期的告警（严重程度台账）")
	if j.silent("台账") {
		return
	}
	lines := map[string]*LedgerLine{} // by code, those of drills apart
	open := map[string]string{}       // the line of an alarm's id
	for _, a := range j.in.Alarms {
		name := string(a.Code)
		if a.Drill != "" {
			name += "/drill"
		}
		l := lines[name]
		if l == nil {
			m := alarm.Meanings[a.Code]
			l = &LedgerLine{Code: a.Code, Title: m.Title, Next: m.Next, Drill: a.Drill != ""}
			if l.Drill {
				l.Title, l.Next = "演练："+l.Title, "无须处理，见演练报告 (nothing to do; see the drill's report)"
			}
			lines[name] = l
		}
		if a.Cleared {
			delete(open, a.ID)
			continue
		}
		if l.Drill {
			a.Severity = min(a.Severity, alarm.Notice)
		}
		l.Severity, l.Last = max(l.Severity, a.Severity), a.At.UTC().Format(time.RFC3339)
		if open[a.ID] != name { // one that outlasted its drill is raised again
			l.Raised++
		}
		open[a.ID] = name
	}
	for _, name := range open {
		lines[name].Open++
	}
	counts := map[alarm.Severity]int{}
	for _, name := range slices.Sorted(maps.Keys(lines)) {
		l := lines[name]
		if l.Raised == 0 { // raised before the period
			continue
		}
		j.report.Ledger = append(j.report.Ledger, *l)
		counts[l.Severity] += l.Raised
	}
	slices.SortStableFunc(j.report.Ledger, func(a, b LedgerLine) int { return int(b.Severity - a.Severity) })
	for s := alarm.Severe; s > alarm.Normal; s-- {
		// What was severe and is over is for the record; what is still there shows above.
		j.say(when(counts[s] > 0, alarm.Notice), alarm.Test, s.Chinese(), "%d 次", counts[s])
	}
}

package patrol

import (
	"bytes"
	"encoding/json"
	"fmt"
	"time"

	"yinjian/appliance/alarm"
	"yinjian/appliance/audit"
	"yinjian/appliance/report"
)

// Mark is how a line's severity is called and coloured.
func (l Line) Mark() (word, mark string) {
	if l.NotChecked {
		return "未查", "none"
	}
	return l.Severity.Chinese(), l.Severity.String()
}

// Beijing shows a time of the report to people.
func Beijing(text string) string {
	at, err := time.Parse(time.RFC3339, text)
	if err != nil {
		return text
	}
	return at.In(audit.Beijing).Format("2006-01-02 15:04:05")
}

// Page is the report for people. receipt is the name of the file with its signature.
func (r *Report) Page(receipt string) *report.Page {
	clock := "可信时间"
	if !r.Trusted {
		clock = "本机时钟，未经证明"
	}
	p := &report.Page{
		Title: r.Period.Chinese() + "报告", Subtitle: "结论：" + r.Severity.Chinese(),
		Facts: [][2]string{
			{"设备", r.Node + "（" + r.Campus + "）"}, {"程序版本", r.Version}, {"本期", Beijing(r.From) + " 至 " + Beijing(r.To) + "（北京时间，" + clock + "）"},
			{"设备在运行", map[bool]string{true: "是", false: "否"}[r.Running]},
		},
	}
	for _, a := range r.Areas {
		s := report.Section{Title: a.Title, Mark: a.Severity.String(), Head: []string{"项目", "情况", "程度", "怎么办"}}
		for _, l := range a.Lines {
			word, mark := l.Mark()
			s.Rows = append(s.Rows, []report.Cell{{Text: l.Item}, {Text: l.Value}, {Text: word, Mark: mark}, {Text: l.Next}})
		}
		p.Sections = append(p.Sections, s)
	}
	s := report.Section{Title: "严重程度台账明细", Intro: "本期报出的告警，取自日志；提示、警告、严重的含义见 docs/alarms.md。", Head: []string{"程度", "代码", "含义", "次数", "未恢复", "最后一次", "怎么办"}}
	for _, l := range r.Ledger {
		s.Rows = append(s.Rows, []report.Cell{{Text: l.Severity.Chinese(), Mark: l.Severity.String()}, {Text: string(l.Code)}, {Text: l.Title}, {Text: fmt.Sprint(l.Raised)}, {Text: fmt.Sprint(l.Open)}, {Text: Beijing(l.Last)}, {Text: l.Next}})
	}
	p.Sections = append(p.Sections, s)
	unchecked := report.Section{Title: "没有查的", Intro: "以下各项这次没有查，报告对它们什么也没有说。", Head: []string{"项目与原因"}}
	for _, n := range r.NotChecked {
		unchecked.Rows = append(unchecked.Rows, []report.Cell{{Text: n}})
	}
	p.Sections = append(p.Sections, unchecked)
	if receipt == "" {
		p.Notes = append(p.Notes, "这份报告没有签名：设备没有在运行，或没有应答。")
	} else {
		p.Notes = append(p.Notes, "签名："+receipt+" 证明本文件的 SM3 记在设备日志里，由日志密钥签过的检查点覆盖；核对：yinjian report verify --log-key log.pem --receipt "+receipt+" 本文件")
	}
	return p
}

// FileName is how the files of a patrol's report are called, without their ends.
func FileName(p Period, at time.Time) string {
	return fmt.Sprintf("patrol-%s-%s", p, at.In(audit.Beijing).Format("20060102T150405"))
}

// Files are the report's, by name: JSON and the page. receipt is as Page takes it.
func (r *Report) Files(name, receipt string) (map[string][]byte, error) {
	body, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	if err := r.Page(receipt).HTML(&b); err != nil {
		return nil, err
	}
	return map[string][]byte{name + ".json": append(body, '\n'), name + ".html": b.Bytes()}, nil
}

// Exit is the exit status for monitoring.
func (r *Report) Exit() int {
	switch {
	case r.Severity >= alarm.Severe:
		return 2
	case r.Severity == alarm.Warning:
		return 1
	}
	return 0
}

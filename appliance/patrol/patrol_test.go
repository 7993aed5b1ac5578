package patrol_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"yinjian/appliance/alarm"
	"yinjian/appliance/audit"
	"yinjian/appliance/patrol"
)

var now = time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC)

// healthy is an appliance at which nothing is to be said.
func healthy() patrol.Input {
	answers := map[string]json.RawMessage{}
	for name, text := range map[string]string{
		"state": `{"state":"operational","ready":true,"uptime_s":90000,"evaluation":"无 (none)","warnings":[],"uses":{"alarms":0},"projection":{"lag":0,"fork":false},
			"machines":[{"name":"main","state":"up","slots":[{"slot":"staff","state":"up","latency_ms":2}]},{"name":"b","state":"up","slots":[{"slot":"staff","state":"up","latency_ms":3}]}],
			"peer":{"node":"binhai-1","up":true,"age_s":1,"max_age_s":86400,"confirmed_entries":7},"directory":{}}`,
		"time":         `{"state":"trusted","bound_us":1000,"accuracy_us":1000000,"left_s":9000,"min_sources":2,"sources":[{"name":"a","group":"a","state":"agreed"},{"name":"b","group":"b","state":"agreed"}]}`,
		"certificates": `[{"owner":"tsa:sm2","use":"tsa","algorithm":"SM2","state":"active","not_after":"2027-03-04T00:00:00Z","days_left":365},{"owner":"signer:D1","use":"staff","algorithm":"SM2","state":"active","not_after":"2027-03-04T00:00:00Z","days_left":365}]`,
		"crls":         `{"lists":[{"issuer":"CN=a","state":"current","this_update":"2026-03-04T00:00:00Z","next_update":"2026-03-11T00:00:00Z"}],"sources":[{"url":"http://a","error":""}]}`,
		"backups":      fmt.Sprintf(`{"custodians":{"threshold":2},"last":{"ID":"1","Entries":7,"At":{"Micros":%d}},"unfinished":{}}`, now.Add(-24*time.Hour).UnixMicro()),
		"compare":      `{"rows":7,"days":[{"day":"2026-03-04","node":"benbu-1","entries":7,"entries_sm3":"a","rows":7,"rows_sm3":"a"}],"differences":[]}`,
		"sweep":        `{"macs_checked":3,"differences":[]}`,
	} {
		answers[name] = json.RawMessage(text)
	}
	last := &audit.Checkpoint{Size: 100, Time: audit.Time{Micros: now.Add(-time.Minute).UnixMicro()}}
	return patrol.Input{
		Period: patrol.Quarterly, Node: "benbu-1", Campus: "本部", Version: "0", From: now.AddDate(0, 0, -92), To: now, Trusted: true, Running: true,
		Answers: answers, Missing: map[string]string{}, Volumes: []patrol.Volume{{Name: "卷", Free: 80 << 30, Total: 100 << 30}}, Reserve: 256 << 20,
		Journal:        &patrol.Journal{Entries: 100, Whole: &audit.Report{Entries: 100, Covered: true}, Last: last},
		Hours:          []patrol.Hour{{To: now.Add(-20 * time.Hour), Free: 80 << 30, Refused: map[string]uint64{"pin_wrong": 3}}, {To: now.Add(-time.Hour), Free: 80 << 30}},
		BackupVerified: now.Add(-24 * time.Hour), BackupMaxAge: 8 * 24 * time.Hour,
	}
}

func TestHealthy(t *testing.T) {
	t.Parallel()
	r := patrol.Judge(healthy())
	if r.Severity != alarm.Normal || r.Exit() != 0 || r.Summary.Entries != 100 || len(r.Areas) != 11 {
		t.Errorf("%s, exit %d, %+v", r.Severity, r.Exit(), r.Summary)
	}
	for _, a := range r.Areas {
		for _, l := range a.Lines {
			if l.Severity != alarm.Normal || l.Next != "" {
				t.Errorf("%s: %+v", a.Name, l)
			}
		}
	}
}

// What is wrong is said where it belongs, as badly as it is, with what to do; whatever else is there.
func TestJudgement(t *testing.T) {
	t.Parallel()
	replace := func(answer, old, with string) func(*patrol.Input) {
		return func(in *patrol.Input) {
			text := strings.ReplaceAll(string(in.Answers[answer]), old, with)
			if text == string(in.Answers[answer]) {
				panic("the case changes nothing: " + old)
			}
			in.Answers[answer] = json.RawMessage(text)
		}
	}
	both := func(a, b func(*patrol.Input)) func(*patrol.Input) {
		return func(in *patrol.Input) { a(in); b(in) }
	}
	for name, c := range map[string]struct {
		change   func(*patrol.Input)
		area     string
		severity alarm.Severity
	}{
		"not running":          {func(in *patrol.Input) { in.Running = false }, "service", alarm.Severe},
		"not ready":            {replace("state", `"ready":true`, `"ready":false`), "service", alarm.Severe},
		"evaluation":           {replace("state", `无 (none)`, `软件密码机`), "service", alarm.Notice},
		"untrusted":            {replace("time", `"trusted"`, `"suspect"`), "time", alarm.Severe},
		"right after a start":  {both(replace("time", `"trusted"`, `"acquiring"`), replace("state", `"uptime_s":90000`, `"uptime_s":7`)), "time", alarm.Warning},
		"before a first round": {both(replace("time", `"sources":[`, `"round":{"ago_s":0},"sources":[`), replace("state", `"uptime_s":90000`, `"uptime_s":7`)), "time", alarm.Warning},
		"not after that":       {both(replace("time", `"trusted"`, `"acquiring"`), replace("state", `"uptime_s":90000`, `"uptime_s":121`)), "time", alarm.Severe},
		"nor suspect":          {both(replace("time", `"trusted"`, `"suspect"`), replace("state", `"uptime_s":90000`, `"uptime_s":7`)), "time", alarm.Severe},
		"bound":                {replace("time", `"bound_us":1000`, `"bound_us":2000000`), "time", alarm.Severe},
		"holdover":             {replace("time", `"trusted"`, `"holdover"`), "time", alarm.Warning},
		"a source away":        {replace("time", `"b","state":"agreed"`, `"b","state":"silent"`), "time", alarm.Severe}, // of two that are needed
		"machine away":         {replace("state", `"b","state":"up"`, `"b","state":"down"`), "machines", alarm.Warning},
		"slow machine":         {replace("state", `"latency_ms":3`, `"latency_ms":900`), "machines", alarm.Warning},
		"use without entry":    {replace("state", `"uses":{"alarms":0}`, `"uses":{"alarms":1}`), "machines", alarm.Severe},
		"lag":                  {replace("state", `"lag":0`, `"lag":20000`), "database", alarm.Warning},
		"database away":        {replace("state", `"lag":0`, `"lag":0,"last_error":"away"`), "database", alarm.Warning},
		"fork":                 {replace("state", `"fork":false`, `"fork":true`), "database", alarm.Severe},
		"compare":              {replace("compare", `"differences":[]`, `"differences":[{}]`), "database", alarm.Severe},
		"sweep":                {replace("sweep", `"differences":[]`, `"differences":[{}]`), "database", alarm.Severe},
		"peer away":            {replace("state", `"up":true`, `"up":false`), "peer", alarm.Warning},
		"peer stale":           {replace("state", `"age_s":1`, `"age_s":90000`), "peer", alarm.Severe},
		"split view":           {replace("state", `"up":true`, `"up":true,"split":"two roots"`), "peer", alarm.Severe},
		"frozen":               {replace("state", `"directory":{}`, `"directory":{"frozen":1}`), "peer", alarm.Severe},
		"certificate 60 days":  {replace("certificates", `"SM2","state":"active","not_after":"2027-03-04T00:00:00Z","days_left":365},{`, `"SM2","state":"active","not_after":"2027-03-04T00:00:00Z","days_left":60},{`), "certificates", alarm.Notice},
		"certificate 20 days":  {replace("certificates", `"SM2","state":"active","not_after":"2027-03-04T00:00:00Z","days_left":365},{`, `"SM2","state":"active","not_after":"2027-03-04T00:00:00Z","days_left":20},{`), "certificates", alarm.Warning},
		"certificate unusable": {replace("certificates", `"state":"active"`, `"state":"unusable"`), "certificates", alarm.Severe},
		"signer 5 days":        {replace("certificates", `"days_left":365}]`, `"days_left":5}]`), "certificates", alarm.Warning},
		"own revoked":          {replace("certificates", `"SM2","state":"active","not_after":"2027-03-04T00:00:00Z","days_left":365},{`, `"SM2","state":"revoked","not_after":"2027-03-04T00:00:00Z","days_left":365},{`), "certificates", alarm.Warning},
		"own expired":          {replace("certificates", `"SM2","state":"active","not_after":"2027-03-04T00:00:00Z","days_left":365},{`, `"SM2","state":"expired","not_after":"2026-03-03T00:00:00Z","days_left":-2},{`), "certificates", alarm.Warning},
		"signer unusable":      {replace("certificates", `"active","not_after":"2027-03-04T00:00:00Z","days_left":365}]`, `"unusable","not_after":"2027-03-04T00:00:00Z","days_left":365}]`), "certificates", alarm.Warning},
		"signer renewed":       {replace("certificates", `365}]`, `365},{"owner":"signer:D1","use":"staff","algorithm":"SM2","state":"expired","not_after":"2026-03-03T00:00:00Z","days_left":-2}]`), "certificates", alarm.Normal},
		"no answer":            {func(in *patrol.Input) { delete(in.Answers, "backups"); in.Missing["backups"] = "refused" }, "backups", alarm.Warning},
		"list stale":           {replace("crls", `"current"`, `"stale"`), "certificates", alarm.Severe},
		"list ends":            {replace("crls", `2026-03-11`, `2026-03-04T05:30:00Z","x":"`), "certificates", alarm.Warning},
		"list not fetched":     {replace("crls", `"error":""`, `"error":"no route"`), "certificates", alarm.Warning},
		"backup old":           {func(in *patrol.Input) { in.BackupMaxAge = time.Hour }, "backups", alarm.Warning},
		"backup never":         {replace("backups", `"last"`, `"other"`), "backups", alarm.Warning},
		"no custodians":        {replace("backups", `"custodians"`, `"other"`), "backups", alarm.Warning},
		"not verified":         {func(in *patrol.Input) { in.BackupVerified = time.Time{} }, "backups", alarm.Warning},
		"verified long ago":    {func(in *patrol.Input) { in.BackupVerified = now.AddDate(0, -2, 0) }, "backups", alarm.Warning},
		"disk 10 %":            {func(in *patrol.Input) { in.Volumes[0].Free = 10 << 30 }, "disks", alarm.Warning},
		"disk reserve":         {func(in *patrol.Input) { in.Volumes[0].Free = 300 << 20 }, "disks", alarm.Severe},
		"disk in 4 days":       {func(in *patrol.Input) { in.Hours[0].Free = 96 << 30 }, "disks", alarm.Severe},
		"disk in 20 days":      {func(in *patrol.Input) { in.Hours[0].Free = 83 << 30 }, "disks", alarm.Warning},
		"journal changed":      {func(in *patrol.Input) { in.Journal.Whole.Findings = []audit.Finding{{DetailZH: "x"}} }, "journal", alarm.Severe},
		"span changed": {func(in *patrol.Input) {
			in.Journal.Whole, in.Journal.Spans = nil, []audit.SpanReport{{To: 9}, {From: 1, To: 5, Wrong: "x"}}
		}, "journal", alarm.Severe},
		"no checkpoint": {func(in *patrol.Input) { in.Journal.Last = nil }, "journal", alarm.Warning},
		"refused":       {func(in *patrol.Input) { in.Hours[0].Refused["hsm_unavailable"] = 1 }, "refusals", alarm.Warning},
		"alarms": {func(in *patrol.Input) {
			in.Alarms = []patrol.AlarmEntry{{ID: "1", Code: alarm.MachineAway, Severity: alarm.Severe, At: now}, {ID: "1", Code: alarm.MachineAway, Severity: alarm.Severe, Cleared: true, At: now}}
		}, "alarms", alarm.Notice},
		// What a drill brings about is no more than a notice.
		"drilled":     {replace("state", `"ready":true`, `"drill":{"explains":["signing-stopped"]},"ready":false`), "service", alarm.Notice},
		"drill apart": {replace("state", `"ready":true`, `"drill":{"explains":["peer-away"]},"ready":false`), "service", alarm.Severe},
	} {
		t.Run(name, func(t *testing.T) {
			in := healthy()
			c.change(&in)
			r := patrol.Judge(in)
			for _, a := range r.Areas {
				want := alarm.Normal
				if a.Name == c.area {
					want = c.severity
				}
				if a.Severity != want && !(name == "certificate unusable" && a.Name == "certificates") {
					t.Errorf("%s is %s, want %s: %+v", a.Name, a.Severity, want, a.Lines)
				}
				for _, l := range a.Lines {
					if l.Severity >= alarm.Warning && l.Next == "" {
						t.Errorf("%s does not say what to do: %+v", a.Name, l)
					}
				}
			}
			if want := []int{0, 0, 1, 2}[c.severity]; r.Severity != c.severity || r.Exit() != want {
				t.Errorf("%s, exit %d, want %s and %d", r.Severity, r.Exit(), c.severity, want)
			}
		})
	}
}

// What nobody looked at is said, by name, and is no part of what is well.
func TestNotChecked(t *testing.T) {
	t.Parallel()
	in := healthy()
	in.Period = patrol.Daily
	for name := range in.Answers {
		in.Missing[name] = "refused: " + name
	}
	in.Answers, in.Journal, in.Hours = nil, nil, nil
	in.Missing["journal"] = "refused: journal"
	r := patrol.Judge(in)
	said := strings.Join(r.NotChecked, "\n")
	for _, name := range []string{"state", "time", "certificates", "crls", "backups", "journal", "对账", "MAC", "增长预测"} {
		if !strings.Contains(said, name) {
			t.Errorf("%s: not said:\n%s", name, said)
		}
	}
	for _, a := range r.Areas {
		for _, l := range a.Lines {
			if a.Name == "journal" && l.Item == "读取" {
				continue // which is severe by itself
			}
			if l.NotChecked && (l.Severity != alarm.Normal || l.Value == "") {
				t.Errorf("%s: %+v", a.Name, l)
			}
		}
	}
	if r.Summary.Entries != 0 {
		t.Errorf("the next patrol would go on from %+v", r.Summary)
	}
	var page bytes.Buffer
	if err := r.Page("").HTML(&page); err != nil || !strings.Contains(page.String(), "没有签名") || !strings.Contains(page.String(), "refused: crls") {
		t.Errorf("%v\n%s", err, &page)
	}
}

// What was asked for and found nothing to look at is not called well, and what is unknown is said.
func TestNothingToLookAt(t *testing.T) {
	t.Parallel()
	in := healthy()
	in.Answers["sweep"] = json.RawMessage(`{"macs_checked":0,"differences":[]}`)
	in.Answers["certificates"] = json.RawMessage(strings.ReplaceAll(string(in.Answers["certificates"]), `"state":"active"`, `"state":"active","revocation":"未核验: no list"`))
	in.Journal = &patrol.Journal{Entries: 140, Previous: "没有检查点", Last: in.Journal.Last}
	r := patrol.Judge(in)
	for _, want := range []string{"核验：什么也没有核验", "没有带 MAC 的行", "tsa:sm2 SM2 的吊销状态", "1 张没有现行的吊销列表"} {
		if !strings.Contains(strings.Join(r.NotChecked, "\n"), want) {
			t.Errorf("not said: %s\n%s", want, strings.Join(r.NotChecked, "\n"))
		}
	}
	for _, a := range r.Areas {
		for _, l := range a.Lines {
			if strings.Contains(l.Value, "未发现改动") && a.Name == "journal" || strings.Contains(l.Value, "0 处不符") && l.Item == "按 MAC 清查" {
				t.Errorf("%s: %+v", a.Name, l)
			}
		}
	}
	in.Journal.Spans = []audit.SpanReport{{To: 100}}
	if said := strings.Join(patrol.Judge(in).NotChecked, "\n"); !strings.Contains(said, "40 条尚无检查点覆盖") {
		t.Errorf("entries beyond the last checkpoint are not told of:\n%s", said)
	}
}

// The page needs nothing else, and runs nothing, whatever stands in the report.
func TestPage(t *testing.T) {
	t.Parallel()
	in := healthy()
	in.Node = `<script src="http://evil/">`
	in.Answers["state"] = json.RawMessage(strings.Replace(string(in.Answers["state"]), `"warnings":[]`, `"warnings":["<img src=x onerror=alert(1)>"]`, 1))
	var b bytes.Buffer
	if err := patrol.Judge(in).Page("r.receipt.json").HTML(&b); err != nil {
		t.Fatal(err)
	}
	for _, bad := range []string{"<script", "<img", "src=", "href=", "@import", "url("} {
		if strings.Contains(strings.ReplaceAll(strings.ReplaceAll(b.String(), "&lt;script src=&#34;", ""), "&lt;img src=", ""), bad) {
			t.Errorf("the page has %q", bad)
		}
	}
	for _, want := range []string{"季巡检报告", "怎么办", "没有查的", "r.receipt.json", "@media print"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("the page lacks %q", want)
		}
	}
}

func TestForecast(t *testing.T) {
	t.Parallel()
	hours := func(free ...uint64) (out []patrol.Hour) {
		for i, f := range free {
			out = append(out, patrol.Hour{To: now.Add(time.Duration(i) * 12 * time.Hour), Free: f << 30})
		}
		return out
	}
	for _, c := range []struct {
		hours []patrol.Hour
		want  float64
		known bool
	}{
		{hours(100, 99, 98), 98.0 / 2, true}, // 1 GiB in 12 h
		{hours(100, 100), -1, true},
		{hours(90, 100), -1, true},
		{hours(100), 0, false},
		{hours(0, 0, 50), 0, false},
		{nil, 0, false},
	} {
		got, why := patrol.Forecast(c.hours, 0)
		if (why == "") != c.known || c.known && (got-c.want > 0.01 || c.want-got > 0.01) {
			t.Errorf("%v: %v %q, want %v", c.hours, got, why, c.want)
		}
	}
}

// The ledger tells what drills brought about on purpose from what was real, of one alarm that outlasted its drill, too.
func TestLedgerOfDrills(t *testing.T) {
	t.Parallel()
	in := healthy()
	in.Alarms = []patrol.AlarmEntry{
		{ID: "1", Code: alarm.MachineAway, Severity: alarm.Severe, Drill: "d", At: in.To}, {ID: "1", Code: alarm.MachineAway, Severity: alarm.Severe, Drill: "d", Cleared: true, At: in.To},
		{ID: "2", Code: alarm.MachineAway, Severity: alarm.Warning, Drill: "d", At: in.To}, {ID: "2", Code: alarm.MachineAway, Severity: alarm.Warning, At: in.To},
	}
	var got []string
	for _, l := range patrol.Judge(in).Ledger {
		got = append(got, fmt.Sprintf("%s %s %v raised %d open %d", l.Code, l.Severity, l.Drill, l.Raised, l.Open))
	}
	if want := "[machine-away warning false raised 1 open 1 machine-away notice true raised 2 open 0]"; fmt.Sprint(got) != want {
		t.Errorf("%v, want %s", got, want)
	}
}

package main

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance"
	"yinjian/appliance/alarm"
	"yinjian/appliance/audit"
	"yinjian/appliance/evidence"
	"yinjian/appliance/evidence/show"
	"yinjian/appliance/pki"
	"yinjian/appliance/problem"
	"yinjian/appliance/report"
	"yinjian/ntp/sysclock"
)

// A faultReport is what a drill that breaks something found.
type faultReport struct {
	Format  string   `json:"format"` // "yinjian-drill/2"
	Drill   string   `json:"drill"`  // what was broken: hsm, db, time, campus, ca
	ID      string   `json:"id"`
	Node    string   `json:"node"`
	Campus  string   `json:"campus"`
	At      string   `json:"at"` // RFC 3339, the machine's clock
	Persons []string `json:"persons,omitempty"`
	Reason  string   `json:"reason"`
	// Broken says what was done, and for how long.
	Broken   string `json:"broken"`
	BrokenMS int64  `json:"broken_ms"`
	// Held: every signature that was asked for meanwhile was made. Otherwise some were refused, which is what is meant.
	Held    bool           `json:"held"`
	Before  int            `json:"signed_before"`
	During  map[string]int `json:"during"` // outcomes by "signed", "no_answer" or the code of the refusal
	Retried int            `json:"retried"`
	After   int            `json:"signed_after"`
	// Judged evidence was verified offline, of every record that was acknowledged, and was valid.
	Judged  int        `json:"evidence_judged"`
	Alarm   alarm.Code `json:"alarm"`    // that was raised, marked as the drill's
	AlarmMS int64      `json:"alarm_ms"` // from the break until then
	// RecoveredMS is from the repair until the appliance would sign again; ClearedMS until the alarm was over.
	RecoveredMS int64 `json:"recovered_ms"`
	ClearedMS   int64 `json:"cleared_ms"`
	Entries     struct {
		From uint64 `json:"from"`
		To   uint64 `json:"to"`
	} `json:"journal_verified"`
	// Findings are what was seen beyond that, in words, by name.
	Findings map[string]string `json:"findings"`
	NotShown []string          `json:"not_shown"` // what the drill does not prove
	Passed   bool              `json:"passed"`
	Failed   string            `json:"failed,omitempty"`
}

// A drillKind is what a drill breaks, and what it then looks at.
type drillKind struct {
	part        string
	short, long string
	broken      string // what is done to the appliance
	seconds     int    // how long, where nobody says
	least       int    // how short it may be, for its alarm to be raised
	meant       []problem.Code
	alarms      []alarm.Code // of which one has to be raised
	// look is asked beside each signature while it is broken; after once all is whole again and the refused ones were
	// repeated; rows once the drill has ended. Each may be nil.
	look     func(ctx context.Context, r *rehearsal) error
	after    func(ctx context.Context, r *rehearsal) error
	rows     func(r *rehearsal, rows []wire.DrillRow) error
	notShown []string
}

// refusals without the cipher machine.
var machineRefusals = []problem.Code{problem.HSMUnavailable, problem.NotReady, problem.Timeout, problem.JournalUnwritable, problem.TimeUntrusted, problem.RateLimited}

func drillKinds() []*drillKind {
	return []*drillKind{
		{
			part: wire.DrillHSM, short: "密码机演练：断开一台密码机，证明照常或安全拒绝，恢复后一条不少 (a cipher machine goes away, and nothing is lost)",
			long: `评估设备的软件密码机被停住（SIGSTOP，它不应答）；其他密码机与生产设备：设备不再把请求发给它（--machine 选哪台，缺省 main），密码机本身不受影响。
证明：其间每个请求或照常签成（另有密码机持有同一密钥时），或以约定的错误码拒绝。

The software cipher machine of an evaluation set-up is stopped; to any other one the appliance sends nothing.`,
			broken: "密码机不应答 (the cipher machine did not answer)", seconds: 25, least: 10, meant: machineRefusals,
			alarms:   []alarm.Code{alarm.MachineAway, alarm.SigningStopped},
			notShown: []string{"真正的密码机断电、坏卡、口令被锁：程序不能替人去做 (a real machine without power, with a broken card or a locked PIN)"},
		},
		{
			part: wire.DrillDB, short: "中心库演练：断开与中心库的连接，证明签名照常、补投不重不漏 (the central database goes away; signing goes on, and every row comes once)",
			long: `设备关闭自己与中心库的连接，到时再打开；数据库本身不受影响。证明：其间签名全部照常；落后量增长并显示；告警报出；恢复后演练的每条
记录在中心库恰有一行，评估设备另与日志逐行对账。

The appliance closes its connection to the central database for a while. The database itself is not touched.`,
			broken: "设备关闭了与中心库的连接 (the appliance closed its connection to the central database)", seconds: 20, least: 10,
			alarms: []alarm.Code{alarm.DatabaseAway, alarm.DatabaseLag}, look: lookAtDatabase, after: afterDatabase, rows: rowsOnce,
			notShown: []string{"数据库自身的崩溃、磁盘满、主备切换：见 docs/database.md (crash, full disk and switchover of the database)"},
		},
		{
			part: wire.DrillTime, short: "时间演练：不再采信时间源，证明守时期内照常、期外拒绝 (the sources are not believed; tokens come within the policy, and not beyond it)",
			long: `设备在限定时间内不采信任何时间源，并把守时期限收紧到演练时长的一半（只紧不松；系统时钟不动）。证明：先守时（holdover），误差上限按配置的漂移增长，
签名与时间戳照常；超过期限后签名与时间戳都被拒绝（timeNotAvailable）；恢复后重新同步；没有一条是在不可信的时间签的。

Nothing that the sources say is taken for a while, and the holdover is limited to half of it. The system's clock is not touched.`,
			broken: "不采信任何时间源，守时期限收紧到演练时长的一半 (no source was believed, holdover limited to half of the drill)", seconds: 60, least: 18,
			meant: []problem.Code{problem.TimeUntrusted, problem.NotReady}, alarms: []alarm.Code{alarm.TimeUntrusted, alarm.SigningStopped}, look: lookAtTime, after: afterTime,
			notShown: []string{
				"误差上限因漂移超过策略：按 50 ppm 到 1 s 要五个多小时，演练以收紧的期限代替 (a bound that drift alone takes beyond the policy: hours)",
				"时间戳进程自己的时钟：它照常问时间源，拒绝出自本机时钟的怀疑 (the timestamp workers' own clocks went on; the appliance's doubt refused)",
			},
		},
		{
			part: wire.DrillCampus, short: "院区演练：断开与另一院区的线路，证明签名照常、恢复后追平 (the line to the other campus is cut; signing goes on, and all catches up)",
			long: `设备在限定时间内既不连接另一院区，也不应答它；线路本身不受影响。证明：其间签名全部照常；目录副本变旧并显示；告警报出；恢复后目录追平，
互证的检查点补上，中心库中记录不重不漏。没有结对时拒绝。另一院区会报出它自己的 peer-away，先告知那边的人。

The appliance neither asks nor answers the other campus for a while. The other one raises an alarm of its own: tell its people.`,
			broken: "设备断开了与另一院区的线路，双向 (the appliance cut the line to the other campus, both ways)", seconds: 20, least: 12,
			alarms: []alarm.Code{alarm.PeerAway}, look: lookAtCampus, after: afterCampus, rows: rowsOnce,
			notShown: []string{"超过 peer.max_age 后拒绝签名：演练不会断那么久 (that signing is refused beyond peer.max_age: no drill cuts so long)", "同一请求发到两个院区的重复登记 (one request sent to both campuses)"},
		},
		{
			part: wire.DrillCA, short: "CA 演练：吊销列表断供、证书被吊销，证明拒绝签名而旧证据仍有效 (the list of a CA runs out, a certificate is revoked; old evidence stays valid)",
			long: `设备为演练生成一个 CA（密钥只在内存，标明仅供评估），作为签名人的信任锚加入，给测试签名人发证。先让它的吊销列表断供：到期前告警，到期后拒绝签名；
恢复后照常；再吊销该证书：拒绝签名，而此前的证据离线核验仍有效。结束时撤销信任锚、停用测试账号；其余 CA 与签名人不受影响。

A CA of the drill's own, whose key is in memory alone, issues to the test account. First its list runs out, then the
certificate is revoked. At the end its anchor is withdrawn.`,
			broken: "演练的 CA 不再更新吊销列表 (the drill's CA renewed its list no more)", seconds: 30, least: 20,
			meant: []problem.Code{problem.CertificateUnusable}, alarms: []alarm.Code{alarm.ListDue}, look: lookAtList, after: afterRevocation,
			notShown: []string{"医院所用 CA 的分发点与网络：见 yinjian cert crl fetch (the distribution points of the hospital's own CA)"},
		},
	}
}

// A drillOrder is what somebody asked for.
type drillOrder struct {
	dir, out, output, machine, reason string
	seconds                           int
	persons                           []string
}

func faultCommand(f *drillKind) *cobra.Command {
	var o drillOrder
	c := &cobra.Command{
		Use: f.part + " --dir DIR", Short: f.short,
		Long: f.long + `

用测试应用与测试账号签名，结束时停用；断开只在设备的内存里，到时自行恢复，演练被杀、设备重启也一样。生产设备须两人同意：登录的由第二人批准，
否则 --confirmed-by 两次。报告（JSON、HTML）写入 reports/，由日志密钥签名；没有通过时退出码为 1。见 docs/drills.md。

Needs two persons but in an evaluation set-up. What is broken is whole again by itself. Exits 1 if the drill did not pass.`,
		Args: exactArgs(0),
		RunE: func(c *cobra.Command, _ []string) error {
			if err := checkOutput(o.output); err != nil {
				return err
			}
			if o.seconds < f.least || o.seconds > wire.DrillMost {
				return usageError{fmt.Errorf("--seconds 须为 %d–%d (%d to %d)", f.least, wire.DrillMost, f.least, wire.DrillMost)}
			}
			cfg, err := appliance.LoadConfig(o.dir)
			if err != nil {
				return err
			}
			if cfg.Evaluation.Softtoken {
				o.persons = nil
			} else if err := checkPersons(session(o.dir) != "", o.persons); err != nil {
				return err
			}
			flags := adminFlags{dir: o.dir, output: "json"}
			a, err := flags.client()
			if err != nil {
				return err
			}
			defer a.Close()
			r, err := rehearse(c.Context(), a, cfg, f, &o)
			if r == nil {
				return err
			}
			if err != nil {
				r.Failed = err.Error()
			}
			r.Passed = err == nil
			if ferr := fileDrill(context.WithoutCancel(c.Context()), a, r, o.dir, o.out, o.persons); ferr != nil {
				return errors.Join(err, ferr)
			}
			if o.output == "json" {
				return errors.Join(json.NewEncoder(os.Stdout).Encode(r), err)
			}
			r.print()
			return err
		},
	}
	required(c, &o.dir, "dir", "运行中设备的目录 (the running appliance's folder)")
	c.Flags().IntVar(&o.seconds, "seconds", f.seconds, "断开多久 (how long it is broken)")
	c.Flags().StringVar(&o.reason, "reason", "例行演练", "原因，记入日志 (why, for the journal)")
	c.Flags().StringVar(&o.out, "out", "", "报告写到哪里，缺省为设备目录下的 reports (where the report is written)")
	c.Flags().StringVarP(&o.output, "output", "o", "text", "text 或 json")
	if f.part == wire.DrillHSM {
		c.Flags().StringVar(&o.machine, "machine", "", "哪台密码机，缺省 main (which cipher machine)")
	}
	persons(c, &o.persons)
	return c
}

func (r *faultReport) held() string {
	if r.Held {
		return "其间签名照常 (service went on)"
	}
	return "其间有请求被拒绝，恢复后重试各成一条 (some were refused, and made once when tried again)"
}

// lines are the report in words, for the terminal and for the page.
func (r *faultReport) lines() [][2]string {
	out := [][2]string{
		{"断开了什么 (broken)", fmt.Sprintf("%s，%s", r.Broken, ms(r.BrokenMS))},
		{"其间的签名 (signatures meanwhile)", fmt.Sprintf("%s；%v，重试 retried %d；之前 before %d，之后 after %d", r.held(), r.During, r.Retried, r.Before, r.After)},
		{"告警 (alarm)", fmt.Sprintf("%s：%s 后报出，恢复后 %s 解除 (raised, cleared)", r.Alarm, ms(r.AlarmMS), ms(r.ClearedMS))},
		{"恢复 (recovered)", ms(r.RecoveredMS).String()},
		{"证据离线核验有效 (evidence valid)", fmt.Sprint(r.Judged)},
		{"日志核验 (journal verified)", fmt.Sprintf("%d–%d", r.Entries.From, r.Entries.To)},
	}
	for _, name := range slices.Sorted(maps.Keys(r.Findings)) {
		out = append(out, [2]string{name, r.Findings[name]})
	}
	return out
}

func (r *faultReport) verdict() string {
	if r.Passed {
		return "演练通过 (the drill passed)"
	}
	return "演练未通过 (the drill FAILED)：" + r.Failed
}

func (r *faultReport) print() {
	fmt.Println(r.verdict())
	for _, l := range r.lines() {
		fmt.Printf("%s：%s\n", l[0], l[1])
	}
}

// page is the report for people.
func (r *faultReport) page(receipt string) *report.Page {
	mark := map[bool]string{true: "normal", false: "severe"}[r.Passed]
	p := &report.Page{
		Title: "演练报告：" + r.Drill, Subtitle: r.verdict(),
		Facts: [][2]string{{"设备", r.Node + "（" + r.Campus + "）"}, {"时间", r.At + "（本机时钟）"}, {"编号", r.ID}, {"原因", r.Reason}, {"同意的人", strings.Join(r.Persons, "、")}},
	}
	found := report.Section{Title: "断开了什么，看到了什么", Mark: mark, Head: []string{"项目", "情况"}}
	for _, l := range r.lines() {
		found.Rows = append(found.Rows, []report.Cell{{Text: l[0]}, {Text: l[1]}})
	}
	not := report.Section{Title: "没有证明的", Head: []string{"项目"}}
	for _, n := range r.NotShown {
		not.Rows = append(not.Rows, []report.Cell{{Text: n}})
	}
	p.Sections = []report.Section{found, not}
	p.Notes = []string{signedBy(receipt)}
	return p
}

func (r *faultReport) summary() (part, at string, passed bool) { return r.Drill, r.At, r.Passed }

func signedBy(receipt string) string {
	return "签名：" + receipt + " 证明本文件的 SM3 记在设备日志里；核对：yinjian report verify --log-key log.pem --receipt " + receipt + " 本文件"
}

// fileDrill writes a drill's report, as JSON and as a page, and has it signed.
func fileDrill(ctx context.Context, a *client.Admin, r interface {
	summary() (part, at string, passed bool)
	page(receipt string) *report.Page
}, dir, out string, persons []string) error {
	if out == "" {
		out = filepath.Join(dir, "reports")
	}
	if err := os.MkdirAll(out, 0o700); err != nil {
		return err
	}
	body, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	part, when, passed := r.summary()
	at, err := time.Parse(time.RFC3339, when)
	if err != nil {
		return err
	}
	name := "drill-" + part + "-" + at.In(audit.Beijing).Format("20060102T150405")
	receipt := name + ".receipt.json"
	var html bytes.Buffer
	if err := r.page(receipt).HTML(&html); err != nil {
		return err
	}
	files := map[string][]byte{name + ".json": append(body, '\n'), name + ".html": html.Bytes()}
	for _, file := range slices.Sorted(maps.Keys(files)) {
		if err := replaceFile(filepath.Join(out, file), files[file]); err != nil {
			return err
		}
	}
	outcome := map[bool]string{true: "passed", false: "failed"}[passed]
	return signReport(ctx, a, report.Drill, part, outcome, persons, nil, files, filepath.Join(out, receipt))
}

// A rehearsal is a drill while it runs.
type rehearsal struct {
	a       *client.Admin
	cfg     *appliance.Config
	dir     string
	trust   evidence.Trust
	tester  *tester
	report  *faultReport
	made    map[string]string // record ids by key; "" was refused
	leaves  map[string]string // of the records, in hex
	refused []string          // keys

	before, state stateView // as it was before the break, and when it was last looked at
	notes         map[string]float64
	began         time.Time     // when holdover was first seen
	bounds        []boundSample // since then
}

// A stateView is what drills look at in the appliance's state.
type stateView struct {
	Ready   bool
	Uses    struct{ Alarms uint64 }
	Journal struct{ Entries uint64 }
	Time    struct {
		State   string
		BoundMS float64 `json:"bound_ms"`
	}
	Projection struct {
		Shipped, Lag uint64
		LastError    string `json:"last_error"`
	}
	Peer *struct {
		Up        bool
		AgeS      float64 `json:"age_s"`
		Confirmed uint64  `json:"confirmed_entries"`
		LastError string  `json:"last_error"`
	}
	Drill    *wire.DrillState
	Warnings []string
}

func (r *rehearsal) see(ctx context.Context) (stateView, error) {
	var s stateView
	b, err := r.a.State(ctx)
	if err == nil {
		err = json.Unmarshal(b, &s)
	}
	return s, err
}

// note keeps the largest of what was seen.
func (r *rehearsal) note(name string, v float64) { r.notes[name] = max(r.notes[name], v) }

func (r *rehearsal) find(name, format string, args ...any) {
	r.report.Findings[name] = fmt.Sprintf(format, args...)
}

const (
	drillPause   = 300 * time.Millisecond // between two requests
	drillRecover = 2 * time.Minute        // within which all has to be as before
)

// rehearse is the procedure. However it ends, the drill is ended, and with it what it had broken.
func rehearse(ctx context.Context, a *client.Admin, cfg *appliance.Config, f *drillKind, o *drillOrder) (report *faultReport, err error) {
	r := &rehearsal{a: a, cfg: cfg, dir: o.dir, made: map[string]string{}, leaves: map[string]string{}, notes: map[string]float64{}}
	var ends endpoints
	b, err := os.ReadFile(filepath.Join(o.dir, "endpoints.json"))
	if err == nil {
		err = json.Unmarshal(b, &ends)
	}
	if err != nil {
		return nil, err
	}
	sys, err := sysclock.Open()
	if err != nil {
		return nil, err
	}
	if r.before, err = r.see(ctx); err != nil {
		return nil, explain(err)
	}
	from, err := drillCheckpoint(ctx, o.dir)
	if err != nil {
		return nil, err
	}
	begun, err := a.BeginDrill(ctx, wire.BeginDrill{Part: f.part, Seconds: o.seconds, Machine: o.machine, Reason: o.reason, Persons: o.persons})
	if err != nil {
		return nil, explain(err)
	}
	out := &faultReport{
		Format: "yinjian-drill/2", Drill: f.part, ID: begun.ID, Node: cfg.Node, Campus: cfg.Campus, At: sys.Realtime().UTC().Format(time.RFC3339), Reason: o.reason, Persons: o.persons,
		Broken: f.broken, During: map[string]int{}, Findings: map[string]string{}, NotShown: f.notShown,
	}
	r.report = out
	ended := false
	defer func() {
		if !ended {
			if _, eerr := a.EndDrill(context.WithoutCancel(ctx), wire.EndDrill{ID: begun.ID, Abandon: true}); eerr != nil {
				err = errors.Join(err, fmt.Errorf("演练没有结束，设备会自行结束它 (the drill was not ended; the appliance will): %w", explain(eerr)))
			}
		}
	}()
	if r.tester, err = connectTester(ctx, ends, begun.ID, begun.Key, client.Retry{Attempts: 1}); err != nil {
		return out, err
	}
	defer r.tester.client.Close()
	if r.trust, err = show.LoadTrust(o.dir, filepath.Join(o.dir, "log.pem")); err != nil {
		return out, err
	}
	if len(begun.Anchor) > 0 {
		anchor, err := pki.ParseCertificate(begun.Anchor)
		if err != nil {
			return out, err
		}
		r.trust.Anchors = append(r.trust.Anchors, anchor)
	}
	// 1. Before.
	for ; out.Before < 3; out.Before++ {
		if err := r.sign(ctx, "before", out.Before); err != nil {
			return out, explain(err)
		}
	}
	// 2. Broken, until the appliance says that it is whole.
	if _, err := a.BreakDrill(ctx, wire.BreakDrill{ID: begun.ID}); err != nil {
		return out, explain(err)
	}
	started := time.Now() // interval
	long := time.Duration(o.seconds) * time.Second
	watching, stop := context.WithTimeout(ctx, long+5*time.Second)
	defer stop()
	raised := make(chan raisedAlarm, 1)
	go func() { raised <- waitRaised(watching, a, f.alarms, begun.ID, started) }()
	if err := r.during(ctx, f, started, long); err != nil {
		return out, err
	}
	out.BrokenMS = time.Since(started).Milliseconds()
	repaired := time.Now() // interval
	out.Held = len(r.refused) == 0
	got := <-raised
	if out.Alarm, out.AlarmMS = got.code, got.after; got.id == "" {
		return out, fmt.Errorf("其间没有报出标明演练的告警 %v (no alarm was raised that is marked as the drill's)", f.alarms)
	}
	recovering, done := context.WithTimeout(ctx, drillRecover)
	defer done()
	if err := r.await(recovering, "恢复后两分钟内没有恢复签名 (it did not sign again)", func(s stateView) bool { return s.Ready }); err != nil {
		return out, err
	}
	out.RecoveredMS = time.Since(repaired).Milliseconds()
	// 3. After: new ones, and those that were refused, under the same keys.
	for ; out.After < 3; out.After++ {
		if err := r.sign(ctx, "after", out.After); err != nil {
			return out, explain(err)
		}
	}
	for _, key := range r.refused {
		made, err := r.tester.sign(ctx, key, []byte(key))
		if err != nil {
			return out, explain(err)
		}
		r.made[key] = made.RecordID
		out.Retried++
	}
	if f.after != nil {
		if err := f.after(recovering, r); err != nil {
			return out, err
		}
	}
	// 4. Nothing was lost, doubled or left without an account.
	if err := r.judge(ctx); err != nil {
		return out, err
	}
	now, err := r.see(ctx)
	if err != nil {
		return out, explain(err)
	}
	if now.Uses.Alarms != r.before.Uses.Alarms {
		return out, fmt.Errorf("无记录的密钥使用由 %d 变为 %d (uses without an entry)", r.before.Uses.Alarms, now.Uses.Alarms)
	}
	clearing, end := context.WithTimeout(ctx, time.Duration(cfg.Alarms.ClearAfter)+time.Minute)
	defer end()
	if err := waitCleared(clearing, a, got.id); err != nil {
		return out, err
	}
	out.ClearedMS = time.Since(repaired).Milliseconds()
	// 5. Over: nothing of it goes on.
	over, err := a.EndDrill(ctx, wire.EndDrill{ID: begun.ID})
	if err != nil {
		return out, explain(err)
	}
	ended = true
	if err := r.sign(ctx, "over", 0); err == nil {
		return out, errors.New("演练结束后其测试账号仍能签名 (the drill's test account signs after its end)")
	}
	if f.rows != nil {
		if err := f.rows(r, over.Rows); err != nil {
			return out, err
		}
	}
	return out, out.verify(ctx, o.dir, from)
}

// sign asks for one signature.
func (r *rehearsal) sign(ctx context.Context, phase string, n int) error {
	key := fmt.Sprintf("%s-%s-%d", r.tester.id, phase, n)
	one, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	made, err := r.tester.sign(one, key, []byte(key))
	switch {
	case err == nil:
		r.made[key] = made.RecordID
	case phase == "during":
		r.made[key] = ""
		r.refused = append(r.refused, key)
	}
	return err
}

// during signs and looks for as long as it is broken.
func (r *rehearsal) during(ctx context.Context, f *drillKind, started time.Time, long time.Duration) error {
	for n := 0; ; n++ {
		var err error
		if r.state, err = r.see(ctx); err != nil {
			return explain(err)
		}
		switch d := r.state.Drill; {
		case d == nil || d.ID != r.report.ID || !slices.ContainsFunc(r.state.Warnings, func(w string) bool { return strings.Contains(w, r.report.ID) }):
			return errors.New("设备没有说明正在演练 (the appliance does not say that a drill is under way)")
		case !d.Broken:
			return nil
		case time.Since(started) > long+time.Minute:
			return errors.New("到时没有自行恢复 (it was not whole again when its time was over)")
		}
		if err := r.sign(ctx, "during", n); err == nil {
			r.report.During["signed"]++
		} else {
			code := outcomeOf(err)
			r.report.During[code]++
			if !slices.Contains(f.meant, problem.Code(code)) && (code != noAnswer || f.part != wire.DrillHSM) {
				return fmt.Errorf("其间的应答不是约定的 (an answer that is not meant): %w", explain(err))
			}
		}
		if f.look != nil {
			if err := f.look(ctx, r); err != nil {
				return err
			}
		}
		select {
		case <-time.After(drillPause):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// await waits for a state.
func (r *rehearsal) await(ctx context.Context, or string, yes func(stateView) bool) error {
	for {
		s, err := r.see(ctx)
		if err == nil && yes(s) {
			r.state = s
			return nil
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			return errors.Join(errors.New(or), err)
		}
	}
}

// judge verifies offline the evidence of every record that was acknowledged.
func (r *rehearsal) judge(ctx context.Context) error {
	records := map[string]bool{}
	for key, record := range r.made {
		b, err := r.tester.client.Evidence(ctx, record)
		if err != nil {
			return explain(err)
		}
		bundle, err := evidence.Parse(b)
		if err != nil {
			return err
		}
		report := evidence.Verify(bundle, r.trust, evidence.Input{Document: []byte(key)})
		if report.Verdict != pki.Valid || records[record] {
			return fmt.Errorf("记录 %s：%s %s (the evidence does not hold, or two requests have one record)", record, report.Verdict, report.Summary)
		}
		leaf := audit.LeafHash(bundle.Journal.Leaf)
		records[record], r.leaves[record] = true, hex.EncodeToString(leaf[:])
		r.report.Judged++
	}
	return nil
}

// verify reads the journal's entries since from again.
func (r *faultReport) verify(ctx context.Context, dir string, from audit.Checkpoint) error {
	to, err := drillCheckpoint(ctx, dir)
	if err != nil {
		return err
	}
	key, err := show.ReadPublicKey(filepath.Join(dir, "log.pem"))
	if err != nil {
		return err
	}
	store, err := openJournal(ctx, filepath.Join(dir, "journal"))
	if err != nil {
		return err
	}
	defer store.Close()
	span, err := audit.VerifySpan(ctx, store, key, from, to)
	if err != nil {
		return err
	}
	r.Entries.From, r.Entries.To = span.From, span.To
	if span.Wrong != "" {
		return fmt.Errorf("日志 (the journal): %s", span.Wrong)
	}
	return nil
}

// drillCheckpoint is the journal's last one.
func drillCheckpoint(ctx context.Context, dir string) (audit.Checkpoint, error) {
	store, err := openJournal(ctx, filepath.Join(dir, "journal"))
	if err != nil {
		return audit.Checkpoint{}, err
	}
	defer store.Close()
	last, err := store.LastCheckpoint(ctx)
	if err != nil {
		return audit.Checkpoint{}, err
	}
	c, err := audit.ParseCheckpoint(last.Note, last.Signature)
	if err != nil {
		return audit.Checkpoint{}, err
	}
	return *c, nil
}

// A raisedAlarm is one that a drill brought about; without id there was none.
type raisedAlarm struct {
	id    string
	code  alarm.Code
	after int64 // milliseconds
}

type alarmView struct {
	ID    string
	Code  alarm.Code
	Drill string
}

func alarmsOf(ctx context.Context, a *client.Admin) ([]alarmView, error) {
	b, err := a.ListAlarms(ctx)
	var s struct{ Active []alarmView }
	if err == nil {
		err = json.Unmarshal(b, &s)
	}
	return s.Active, err
}

// waitRaised waits for an alarm of these codes that is marked as the drill's.
func waitRaised(ctx context.Context, a *client.Admin, codes []alarm.Code, drill string, since time.Time) raisedAlarm {
	for {
		active, err := alarmsOf(ctx, a)
		if i := slices.IndexFunc(active, func(l alarmView) bool { return l.Drill == drill && slices.Contains(codes, l.Code) }); err == nil && i >= 0 {
			return raisedAlarm{active[i].ID, active[i].Code, time.Since(since).Milliseconds()}
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			return raisedAlarm{}
		}
	}
}

// waitCleared waits until it is over.
func waitCleared(ctx context.Context, a *client.Admin, id string) error {
	for {
		active, err := alarmsOf(ctx, a)
		if err == nil && !slices.ContainsFunc(active, func(l alarmView) bool { return l.ID == id }) {
			return nil
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			return errors.Join(errors.New("恢复后告警没有解除 (the alarm is not over)"), err)
		}
	}
}

// noAnswer is the outcome of a call that got none: a new connection needs the cipher machine, too.
const noAnswer = "no_answer"

// outcomeOf is the code of a refusal, or noAnswer.
func outcomeOf(err error) string {
	var p *client.Problem
	if errors.As(err, &p) {
		return p.Code
	}
	return noAnswer
}

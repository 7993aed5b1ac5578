package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance"
	"yinjian/appliance/alarm"
	"yinjian/appliance/audit"
	"yinjian/appliance/evidence/show"
	"yinjian/appliance/pki"
	"yinjian/appliance/problem"
	"yinjian/appliance/report"
	"yinjian/dbdriver/sqlite"
	"yinjian/ntp/sysclock"
)

// A faultReport is what a drill that breaks something found.
type faultReport struct {
	Format string `json:"format"` // "yinjian-drill/1"
	Drill  string `json:"drill"`
	Node   string `json:"node"`
	At     string `json:"at"` // RFC 3339, the machine's clock
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
	Judged  int   `json:"evidence_judged"`
	AlarmMS int64 `json:"alarm_ms"` // from the break until the alarm was raised
	// RecoveredMS is from the repair until the appliance would sign again; ClearedMS until the alarm was over.
	RecoveredMS int64 `json:"recovered_ms"`
	ClearedMS   int64 `json:"cleared_ms"`
	Entries     struct {
		From uint64 `json:"from"`
		To   uint64 `json:"to"`
	} `json:"journal_verified"`
	Passed bool   `json:"passed"`
	Failed string `json:"failed,omitempty"`
}

// meant are the refusals by which an appliance without its cipher machine keeps safe.
var meant = []problem.Code{problem.HSMUnavailable, problem.NotReady, problem.Timeout, problem.JournalUnwritable, problem.TimeUntrusted, problem.RateLimited}

func drillMachineCommand() *cobra.Command {
	var dir, out, output string
	var seconds int
	c := &cobra.Command{
		Use: "hsm --dir DIR", Short: "密码机演练：停住软件密码机，证明照常或安全拒绝，恢复后一条不少 (stop the software cipher machine, and prove that nothing is lost)",
		Long: `仅用于评估设备：把运行中的软件密码机停住（SIGSTOP）若干秒，其间用测试应用与测试账号不断签名，然后放行。证明：
其间每个请求或照常签成（另有密码机时），或以约定的错误码拒绝；告警报出并恢复；恢复后签名照常；拒绝过的请求用同一幂等键重试，各成一条；每条应答过的
记录，证据离线核验有效；演练前后的日志核验无改动，没有无记录的密钥使用。报告写入 reports/，由日志密钥签名。

演练被杀时，一个看护进程在到时放行密码机。用真正的密码机的设备拒绝这样演练：停住厂商的设备不是程序能做的事；多台时用 yinjian hsm drain 手工演练。

For evaluation only: stops the software cipher machine of the running appliance, signs meanwhile, lets it go on, and files
a signed report. An appliance with a real cipher machine refuses.`,
		Args: exactArgs(0),
		RunE: func(c *cobra.Command, _ []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			if seconds < 10 || seconds > 120 {
				return usageError{errors.New("--seconds 须为 10–120 (10 to 120)")}
			}
			cfg, err := appliance.LoadConfig(dir)
			if err != nil {
				return err
			}
			if !cfg.Evaluation.Softtoken {
				return errors.New("这台设备用真正的密码机，不能这样演练：多台时用 yinjian hsm drain、resume 手工演练 (a real cipher machine: this is no drill for it; drain one of several by hand)")
			}
			f := adminFlags{dir: dir, output: "json"}
			a, err := f.client()
			if err != nil {
				return err
			}
			defer a.Close()
			r, err := drillMachine(c.Context(), a, cfg, dir, time.Duration(seconds)*time.Second)
			if r == nil {
				return err
			}
			if err != nil {
				r.Failed = err.Error()
			}
			r.Passed = err == nil
			if ferr := r.file(c.Context(), a, dir, out); ferr != nil {
				return errors.Join(err, ferr)
			}
			if output == "json" {
				return errors.Join(json.NewEncoder(os.Stdout).Encode(r), err)
			}
			r.print()
			return err
		},
	}
	required(c, &dir, "dir", "运行中设备的目录 (the running appliance's folder)")
	c.Flags().IntVar(&seconds, "seconds", 25, "停住多久 (how long it stands)")
	c.Flags().StringVar(&out, "out", "", "报告写到哪里，缺省为设备目录下的 reports (where the report is written)")
	c.Flags().StringVarP(&output, "output", "o", "text", "text 或 json")
	return c
}

func (r *faultReport) print() {
	words := "演练通过 (the drill passed)"
	if !r.Passed {
		words = "演练未通过 (the drill FAILED)：" + r.Failed
	}
	held := "其间有请求被拒绝，恢复后重试各成一条 (some were refused, and made once when tried again)"
	if r.Held {
		held = "其间签名照常 (service went on)"
	}
	fmt.Printf("%s\n%s，%s；%s\n其间的结果 outcomes %v，重试 retried %d\n告警 alarm %s，恢复 recovered %s，告警解除 cleared %s\n证据离线核验 evidence valid %d，日志核验 journal verified %d–%d\n",
		words, r.Broken, ms(r.BrokenMS), held, r.During, r.Retried, ms(r.AlarmMS), ms(r.RecoveredMS), ms(r.ClearedMS), r.Judged, r.Entries.From, r.Entries.To)
}

// file writes the report, signed.
func (r *faultReport) file(ctx context.Context, a *client.Admin, dir, out string) error {
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
	at, err := time.Parse(time.RFC3339, r.At)
	if err != nil {
		return err
	}
	name := "drill-" + r.Drill + "-" + at.In(audit.Beijing).Format("20060102T150405")
	files := map[string][]byte{name + ".json": append(body, '\n')}
	if err := replaceFile(filepath.Join(out, name+".json"), files[name+".json"]); err != nil {
		return err
	}
	outcome := map[bool]string{true: "passed", false: "failed"}[r.Passed]
	return signReport(ctx, a, report.Drill, r.Drill, outcome, nil, nil, files, filepath.Join(out, name+".receipt.json"))
}

// drillMachine is the procedure. The cipher machine goes on, however it ends.
func drillMachine(ctx context.Context, a *client.Admin, cfg *appliance.Config, dir string, long time.Duration) (*faultReport, error) {
	pid, err := softtokenOf(appliance.AdminSocket(dir))
	if err != nil {
		return nil, err
	}
	var ends endpoints
	b, err := os.ReadFile(filepath.Join(dir, "endpoints.json"))
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
	trust, err := show.LoadTrust(dir, filepath.Join(dir, "log.pem"))
	if err != nil {
		return nil, err
	}
	if ready, _, err := drillState(ctx, a); err != nil || !ready {
		return nil, errors.Join(errors.New("设备此刻不能签名，不演练 (the appliance would not sign now: no drill)"), err)
	}
	r := &faultReport{Format: "yinjian-drill/1", Drill: "hsm", Node: cfg.Node, At: sys.Realtime().UTC().Format(time.RFC3339), During: map[string]int{}}
	t, err := newTester(ctx, a, ends, "密码机演练 (drill)", client.Retry{Attempts: 1})
	if err != nil {
		return r, err
	}
	defer t.client.Close()
	defer func() { // best effort: they are test accounts
		_, _ = a.StopApplication(context.WithoutCancel(ctx), wire.Decision{ID: t.id, Reason: "演练结束 (end of a drill)"})
		_, _ = a.StopSigner(context.WithoutCancel(ctx), wire.Decision{ID: t.id, Reason: "演练结束 (end of a drill)"})
	}()
	_, alarms, err := drillState(ctx, a)
	if err != nil {
		return r, err
	}
	from, err := drillCheckpoint(ctx, dir)
	if err != nil {
		return r, err
	}
	made := map[string]string{} // record ids by key; "" was refused
	sign := func(phase string, n int) error {
		key := fmt.Sprintf("%s-%s-%d", t.id, phase, n)
		one, cancel := context.WithTimeout(ctx, time.Minute)
		defer cancel()
		out, err := t.sign(one, key, []byte(key))
		if err == nil {
			made[key] = out.RecordID
		} else {
			made[key] = ""
		}
		return err
	}
	// 1. Before.
	for ; r.Before < 3; r.Before++ {
		if err := sign("before", r.Before); err != nil {
			return r, explain(err)
		}
	}
	// 2. Broken. Another process lets it go on, should this one be killed.
	guard := exec.Command("/bin/sh", "-c", fmt.Sprintf("sleep %d; kill -CONT %d", int(long.Seconds())+5, pid))
	guard.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	if err := guard.Start(); err != nil {
		return r, err
	}
	defer func() {
		_ = unix.Kill(-guard.Process.Pid, unix.SIGKILL) // it may have ended
		_ = guard.Wait()
	}()
	begun := time.Now() // interval
	if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
		return r, err
	}
	defer func() { _ = unix.Kill(pid, unix.SIGCONT) }() // harmless twice
	r.Broken = fmt.Sprintf("停住软件密码机，进程 %d (the software cipher machine was stopped)", pid)
	raised := make(chan int64, 1)
	watching, stop := context.WithTimeout(ctx, long)
	defer stop()
	go func() { raised <- waitAlarm(watching, a, true, begun) }()
	var refused []string
	for n := 0; time.Since(begun) < long && ctx.Err() == nil; n++ {
		err := sign("during", n)
		if err == nil {
			r.During["signed"]++
		} else {
			code := outcomeOf(err)
			r.During[code]++
			refused = append(refused, fmt.Sprintf("%s-during-%d", t.id, n))
			if code != noAnswer && !slices.Contains(meant, problem.Code(code)) {
				return r, fmt.Errorf("密码机停住时的应答不是约定的拒绝 (an answer that is not meant): %w", explain(err))
			}
		}
		select {
		case <-time.After(300 * time.Millisecond):
		case <-ctx.Done():
		}
	}
	r.Held = len(refused) == 0
	// 3. Repaired.
	if err := unix.Kill(pid, unix.SIGCONT); err != nil {
		return r, err
	}
	r.BrokenMS = time.Since(begun).Milliseconds()
	repaired := time.Now() // interval
	if r.AlarmMS = <-raised; r.AlarmMS < 0 {
		return r, errors.New("停住期间没有报出告警 machine-away (no alarm was raised)")
	}
	recover, done := context.WithTimeout(ctx, 2*time.Minute)
	defer done()
	for {
		ready, _, err := drillState(recover, a)
		if err == nil && ready {
			break
		}
		if recover.Err() != nil {
			return r, errors.Join(errors.New("放行后两分钟内没有恢复 (it did not recover)"), err)
		}
		time.Sleep(200 * time.Millisecond)
	}
	r.RecoveredMS = time.Since(repaired).Milliseconds()
	// 4. After: new ones, and those that were refused, under the same keys.
	for ; r.After < 3; r.After++ {
		if err := sign("after", r.After); err != nil {
			return r, explain(err)
		}
	}
	for _, key := range refused {
		out, err := t.sign(ctx, key, []byte(key))
		if err != nil {
			return r, explain(err)
		}
		made[key] = out.RecordID
		r.Retried++
	}
	// 5. Nothing was lost, doubled or left without an account.
	records := map[string]bool{}
	for key, record := range made {
		verdict, err := t.judge(ctx, record, []byte(key), trust)
		if err != nil {
			return r, err
		}
		if verdict != pki.Valid || records[record] {
			return r, fmt.Errorf("记录 %s：%s (the evidence does not hold, or two requests have one record)", record, verdict)
		}
		records[record] = true
		r.Judged++
	}
	_, now, err := drillState(ctx, a)
	if err != nil {
		return r, err
	}
	if now != alarms {
		return r, fmt.Errorf("无记录的密钥使用由 %d 变为 %d (uses without an entry)", alarms, now)
	}
	cleared, end := context.WithTimeout(ctx, time.Duration(cfg.Alarms.ClearAfter)+time.Minute)
	defer end()
	if r.ClearedMS = waitAlarm(cleared, a, false, repaired); r.ClearedMS < 0 {
		return r, errors.New("恢复后告警没有解除 (the alarm is not over)")
	}
	return r, r.verify(ctx, dir, from)
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
	store, err := sqlite.OpenJournal(ctx, sqlite.JournalConfig{Dir: filepath.Join(dir, "journal"), ReadOnly: true})
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
	store, err := sqlite.OpenJournal(ctx, sqlite.JournalConfig{Dir: filepath.Join(dir, "journal"), ReadOnly: true})
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

// drillState says whether the appliance would sign, and how many uses of keys are without an entry.
func drillState(ctx context.Context, a *client.Admin) (ready bool, unaccounted uint64, err error) {
	b, err := a.State(ctx)
	var s struct {
		Ready bool
		Uses  struct{ Alarms uint64 }
	}
	if err == nil {
		err = json.Unmarshal(b, &s)
	}
	return s.Ready, s.Uses.Alarms, err
}

// waitAlarm waits until the alarm about a machine is raised, or over, and answers how long after since; -1: not within ctx.
func waitAlarm(ctx context.Context, a *client.Admin, raised bool, since time.Time) int64 {
	for {
		b, err := a.ListAlarms(ctx)
		var s struct{ Active []struct{ Code alarm.Code } }
		if err == nil {
			err = json.Unmarshal(b, &s)
		}
		on := slices.ContainsFunc(s.Active, func(l struct{ Code alarm.Code }) bool {
			return l.Code == alarm.MachineAway || l.Code == alarm.SigningStopped
		})
		if err == nil && on == raised {
			return time.Since(since).Milliseconds()
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			return -1
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

// softtokenOf finds the software cipher machine that the appliance at a socket runs: a child of the process that the kernel
// says listens there.
func softtokenOf(socket string) (int, error) {
	conn, err := net.Dial("unix", socket)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	if err := errors.Join(raw.Control(func(fd uintptr) {
		var cerr error
		if cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); cerr != nil {
			err = cerr
		}
	}), err); err != nil {
		return 0, err
	}
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", cred.Pid))
	if err != nil {
		return 0, err
	}
	for _, name := range tasks {
		b, err := os.ReadFile(name)
		if err != nil {
			continue // the thread has ended
		}
		for _, child := range strings.Fields(string(b)) {
			line, err := os.ReadFile("/proc/" + child + "/cmdline")
			if err == nil && slices.ContainsFunc(bytes.Split(line, []byte{0}), func(word []byte) bool { return string(word) == "softtoken" }) {
				return strconv.Atoi(child)
			}
		}
	}
	return 0, errors.New("没有找到设备的软件密码机进程 (the appliance's software cipher machine was not found)")
}

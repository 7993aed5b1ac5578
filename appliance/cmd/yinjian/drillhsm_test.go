package main_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"yinjian/appliance"
)

// The drill of a cipher machine that hangs: the appliance refuses as it should, tells of it, recovers by itself, and nothing
// is lost; the report is signed. With YINJIAN_LONG=1 a drill is killed, too. Where the machine is a real one, nothing
// is broken.
func TestDrillMachine(t *testing.T) {
	t.Parallel()
	dir := initAppliance(t, startTimeServer(t))
	configure(t, dir, func(c *appliance.Config) {
		c.Alarms.RaiseAfter, c.Alarms.ClearAfter = appliance.Duration(time.Second), appliance.Duration(time.Second)
	})
	m := serve(t, dir)
	m.trusted(t)
	out := tempDir(t)
	o := mustRun(t, "drill", "hsm", "--dir", dir, "--seconds", "12", "--out", out, "-o", "json")
	var r struct {
		Passed                 bool
		Held                   bool
		During                 map[string]int
		Before                 int   `json:"signed_before"`
		After                  int   `json:"signed_after"`
		Retried                int   `json:"retried"`
		Judged                 int   `json:"evidence_judged"`
		BrokenMS               int64 `json:"broken_ms"`
		AlarmMS                int64 `json:"alarm_ms"`
		RecoveredMS, ClearedMS int64
	}
	if err := json.Unmarshal([]byte(o.stdout), &r); err != nil {
		t.Fatal(err, o)
	}
	if !r.Passed || r.Held || r.Before != 3 || r.After != 3 || r.Retried == 0 || r.Judged != r.Before+r.After+r.Retried+r.During["signed"] || r.BrokenMS < 12_000 || r.AlarmMS <= 0 {
		t.Errorf("%v", o)
	}
	m.changeOf(t, "/admin/v1/reports", "report.filed", "drill/hsm", "", `"outcome":"passed"`)
	receipt := glob(t, filepath.Join(out, "*.receipt.json"))[0]
	mustRun(t, "report", "verify", "--log-key", filepath.Join(dir, "log.pem"), "--receipt", receipt, strings.TrimSuffix(receipt, ".receipt.json")+".json")

	if os.Getenv("YINJIAN_LONG") != "" {
		killedDrill(t, m, out)
	}
	m.stop(t)

	// Not with a real cipher machine, as far as the configuration says so.
	configure(t, dir, func(c *appliance.Config) { c.Evaluation.Softtoken = false })
	refused(t, 1, []string{"真正的密码机"}, "drill", "hsm", "--dir", dir)
	refused(t, 2, []string{"--seconds"}, "drill", "hsm", "--dir", dir, "--seconds", "1")
}

// killedDrill kills a drill in the middle: its guard lets the machine go on.
func killedDrill(t *testing.T, m *machine, out string) {
	t.Helper()
	soft := childWith(t, m.cmd.Process.Pid, "softtoken --dir")
	second := exec.Command(built.binary, "drill", "hsm", "--dir", m.dir, "--seconds", "10", "--out", out)
	second.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := second.Start(); err != nil {
		t.Fatal(err)
	}
	stands := func() bool {
		_, rest, _ := strings.Cut(readFile(t, fmt.Sprintf("/proc/%d/stat", soft.pid)), ") ")
		return strings.HasPrefix(rest, "T")
	}
	eventually(t, time.Minute, "the machine stands", stands)
	if err := second.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = second.Wait() // it was killed
	eventually(t, time.Minute, "the guard let it go on", func() bool { return !stands() })
	eventually(t, time.Minute, "it signs again", func() bool { return m.state(t).Ready })
}

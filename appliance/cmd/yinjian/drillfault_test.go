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

	"yinjian/api/wire"
	"yinjian/appliance"
	"yinjian/appliance/alarm"
	"yinjian/dbdriver/dbtest"
)

// A drilled is what a drill's report says.
type drilled struct {
	ID       string
	Passed   bool
	Failed   string
	Held     bool
	During   map[string]int
	Before   int `json:"signed_before"`
	After    int `json:"signed_after"`
	Retried  int
	Judged   int   `json:"evidence_judged"`
	BrokenMS int64 `json:"broken_ms"`
	Alarm    string
	AlarmMS  int64 `json:"alarm_ms"`
	Persons  []string
	Findings map[string]string
}

// drill runs one that has to pass, with its report in out.
func (m *machine) drill(t *testing.T, part string, seconds int, out string, flags ...string) drilled {
	t.Helper()
	o := mustRun(t, append([]string{"drill", part, "--dir", m.dir, "--seconds", fmt.Sprint(seconds), "--out", out, "-o", "json"}, flags...)...)
	var r drilled
	if err := json.Unmarshal([]byte(o.stdout), &r); err != nil {
		t.Fatal(err, o)
	}
	if !r.Passed || r.Before != 3 || r.After != 3 || r.Judged != r.Before+r.After+r.Retried+r.During["signed"] || r.BrokenMS < int64(seconds)*1000-1500 || r.AlarmMS <= 0 {
		t.Errorf("%v", o)
	}
	receipt := glob(t, filepath.Join(out, "drill-"+part+"-*.receipt.json"))[0]
	page := strings.TrimSuffix(receipt, ".receipt.json")
	mustRun(t, "report", "verify", "--log-key", filepath.Join(m.dir, "log.pem"), "--receipt", receipt, page+".json", page+".html")
	if html := readFile(t, page+".html"); !strings.Contains(html, "演练通过") || !strings.Contains(html, r.ID) {
		t.Errorf("the page: %s", html)
	}
	m.undone(t, r.ID)
	return r
}

// undone holds that nothing of a drill goes on.
func (m *machine) undone(t *testing.T, id string) {
	t.Helper()
	a := m.admin()
	defer a.Close()
	var state struct{ Drill *wire.DrillState }
	b, err := a.State(t.Context())
	if err == nil {
		err = json.Unmarshal(b, &state)
	}
	if err != nil || state.Drill != nil {
		t.Errorf("%s goes on: %+v, %v", id, state.Drill, err)
	}
	for what, list := range map[string]func() (json.RawMessage, error){
		"application": func() (json.RawMessage, error) { return a.ListApplications(t.Context()) },
		"signer":      func() (json.RawMessage, error) { return a.ListSigners(t.Context()) },
	} {
		b, err := list()
		var all []struct {
			ID            string
			Test, Stopped bool
		}
		if err == nil {
			err = json.Unmarshal(b, &all)
		}
		found := false
		for _, one := range all {
			if one.ID == id {
				found = one.Test && one.Stopped
			}
		}
		if err != nil || !found {
			t.Errorf("the %s of %s: %s, %v; want it there, a test's and stopped", what, id, b, err)
		}
	}
	b, err = a.ListAnchors(t.Context())
	var anchors []struct {
		Note      string
		Withdrawn bool
	}
	if err == nil {
		err = json.Unmarshal(b, &anchors)
	}
	for _, one := range anchors {
		if strings.Contains(one.Note, id) && !one.Withdrawn {
			t.Errorf("the anchor of %s counts", id)
		}
	}
	if err != nil {
		t.Error(err)
	}
}

// quick has alarms raised and cleared soon.
func quick(c *appliance.Config) {
	c.Alarms.RaiseAfter, c.Alarms.ClearAfter = appliance.Duration(time.Second), appliance.Duration(time.Second)
}

// The drills of an evaluation set-up, one after another on one appliance: of a cipher machine that hangs, of the database, of
// a CA. Each raises and clears its alarm, marked as the drill's, and is for a patrol no more than a notice.
func TestDrills(t *testing.T) {
	t.Parallel()
	dir := initAppliance(t, startTimeServer(t))
	configure(t, dir, quick)
	m := serve(t, dir)
	m.trusted(t)
	out := tempDir(t)

	hsm := m.drill(t, "hsm", 12, out)
	if hsm.Held || hsm.Retried == 0 {
		t.Errorf("%+v", hsm)
	}
	m.changeOf(t, "/admin/v1/reports", "report.filed", "drill/hsm", "", `"outcome":"passed"`)
	m.changeOf(t, "/admin/v1/drills", "drill.begun", hsm.ID, "", `"part":"hsm"`)
	if db := m.drill(t, "db", 10, out); !db.Held || db.Alarm != "database-away" || len(db.Findings) != 3 {
		t.Errorf("%+v", db)
	}
	if ca := m.drill(t, "ca", 20, out); ca.Held || ca.Alarm != "crl-due" || ca.During["certificate_unusable"] == 0 || ca.During["signed"] == 0 {
		t.Errorf("%+v", ca)
	}
	refused(t, 1, []string{"没有结对", "yinjian peer"}, "drill", "campus", "--dir", dir)
	refused(t, 2, []string{"--seconds"}, "drill", "db", "--dir", dir, "--seconds", "1")
	refused(t, 1, []string{"没有这台密码机"}, "drill", "hsm", "--dir", dir, "--machine", "z")

	// The ledger of a patrol has them apart from what was not on purpose.
	var p struct {
		Ledger []struct {
			Code, Severity string
			Drill          bool
		}
	}
	o := yinjian(t, "patrol", "--dir", dir, "--out", out, "-o", "json")
	if err := json.Unmarshal([]byte(o.stdout), &p); err != nil {
		t.Fatal(err, o)
	}
	codes := map[string]bool{}
	for _, l := range p.Ledger {
		if l.Drill {
			codes[l.Code] = true
			if l.Severity != "notice" {
				t.Errorf("a drill is %s in the ledger", l.Severity)
			}
		} else if l.Code != "backup-overdue" {
			t.Errorf("%s is not the drill's", l.Code)
		}
	}
	for _, code := range []string{"machine-away", "signing-stopped", "database-away", "crl-due"} {
		if !codes[code] {
			t.Errorf("the ledger has no drilled %s: %v", code, codes)
		}
	}
	if os.Getenv("YINJIAN_LONG") != "" {
		killedDrill(t, m, out)
	}
	m.mustBeClean(t)
	m.stop(t)
	rang(t, dir, alarm.MachineAway, alarm.SigningStopped, alarm.JournalUnsealed, alarm.DatabaseAway, alarm.ListDue)
}

// Time: the appliance's own clock doubts, and nothing is stamped beyond the policy.
func TestDrillTime(t *testing.T) {
	t.Parallel()
	dir := initAppliance(t, startTimeServer(t))
	configure(t, dir, quick)
	m := serve(t, dir)
	m.trusted(t)
	if r := m.drill(t, "time", 24, tempDir(t)); r.Held || r.During["signed"] == 0 || r.During["time_untrusted"] == 0 || len(r.Findings) != 3 {
		t.Errorf("%+v", r)
	}
	m.stop(t)
	rang(t, dir, alarm.TimeUntrusted)
}

// killedDrill kills a drill in the middle, and then the appliance: what is broken is whole again either way, and what the
// drill left in the directory is stopped.
func killedDrill(t *testing.T, m *machine, out string) {
	t.Helper()
	soft := childWith(t, m.cmd.Process.Pid, "softtoken --dir")
	stands := func() bool {
		_, rest, _ := strings.Cut(readFile(t, fmt.Sprintf("/proc/%d/stat", soft.pid)), ") ")
		return strings.HasPrefix(rest, "T")
	}
	second := exec.Command(built.binary, "drill", "hsm", "--dir", m.dir, "--seconds", "10", "--out", out)
	second.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := second.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, time.Minute, "the machine stands", stands)
	if err := second.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = second.Wait() // it was killed
	eventually(t, time.Minute, "the appliance let it go on", func() bool { return !stands() })
	eventually(t, time.Minute, "it signs again", func() bool { return m.state(t).Ready })
}

// A drill that nobody ends, and an appliance that is killed in it: the next start is whole, and stops what the drill made.
func TestDrillLeftAlone(t *testing.T) {
	t.Parallel()
	dir := initAppliance(t, startTimeServer(t))
	configure(t, dir, quick)
	m := serve(t, dir)
	m.trusted(t)
	a := m.admin()
	defer a.Close()
	ctx := t.Context()
	begun, err := a.BeginDrill(ctx, wire.BeginDrill{Part: wire.DrillCA, Seconds: 60, Reason: "试"})
	if err != nil {
		t.Fatal(err)
	}
	_, err = a.BeginDrill(ctx, wire.BeginDrill{Part: wire.DrillDB, Seconds: 60, Reason: "试"})
	wantCode(t, err, "not_ready") // one at a time
	_, err = a.BreakDrill(ctx, wire.BreakDrill{ID: "drill-00000000"})
	wantCode(t, err, "not_found") // nothing is broken without a drill
	_, err = a.BeginDrill(ctx, wire.BeginDrill{Part: "all", Seconds: 60, Reason: "试"})
	wantCode(t, err, "invalid_request")
	_, err = a.BeginDrill(ctx, wire.BeginDrill{Part: wire.DrillDB, Seconds: 3600, Reason: "试"})
	wantCode(t, err, "invalid_request")
	if _, err := a.BreakDrill(ctx, wire.BreakDrill{ID: begun.ID}); err != nil {
		t.Fatal(err)
	}
	m.changeOf(t, "/admin/v1/drills/:id/break", "drill.broken", begun.ID, "", `"part":"ca"`)
	_, err = a.BreakDrill(ctx, wire.BreakDrill{ID: begun.ID})
	wantCode(t, err, "not_ready") // once
	m.kill(t)
	m = serve(t, dir)
	eventually(t, time.Minute, "what the drill left is stopped", func() bool {
		b := m.admin()
		defer b.Close()
		d, err := b.DrillStatus(ctx)
		return err == nil && d == nil
	})
	m.undone(t, begun.ID)

	// Of a database that a drill closes nothing is closed after the next start, either.
	again := m.admin()
	defer again.Close()
	if begun, err = again.BeginDrill(ctx, wire.BeginDrill{Part: wire.DrillDB, Seconds: 300, Reason: "试"}); err != nil {
		t.Fatal(err)
	}
	if _, err := again.BreakDrill(ctx, wire.BreakDrill{ID: begun.ID}); err != nil {
		t.Fatal(err)
	}
	var ended *wire.EndedDrill
	eventually(t, time.Minute, "the database is open again and the drill is over", func() bool {
		ended, err = again.EndDrill(ctx, wire.EndDrill{ID: begun.ID})
		if err != nil {
			wantCode(t, err, "not_ready")
		}
		return err == nil
	})
	if err != nil || len(ended.Rows) != 0 {
		t.Errorf("%+v, %v", ended, err)
	}
	m.undone(t, begun.ID)
	m.changeOf(t, "/admin/v1/drills/:id/end", "drill.ended", begun.ID, "", `"part":"db"`)

	// What a drill does not do: the journal's file is taken away.
	if err := os.RemoveAll(filepath.Join(dir, "journal")); err != nil {
		t.Fatal(err)
	}
	_, _ = again.BeginDrill(ctx, wire.BeginDrill{Part: wire.DrillDB, Seconds: 30, Reason: "试"}) // writes
	m.raises(t, alarm.JournalFailed)
	m.kill(t)
}

// An appliance that is not for evaluation, as its configuration says: a drill needs two, by name on an open socket, by login and
// approval where everybody logs in; and the machine is kept from getting calls, not touched.
func TestDrillInProduction(t *testing.T) {
	t.Parallel()
	dir := initAppliance(t, startTimeServer(t))
	configure(t, dir, quick)
	m := serve(t, dir)
	m.trusted(t)
	m.stop(t)
	machine := startCopy(t, filepath.Join(dir, "softtoken"), filepath.Join(dir, "secrets", "softtoken.passphrase"))
	configure(t, dir, func(c *appliance.Config) {
		c.Evaluation.Softtoken = false
		c.HSM.Module, c.HSM.ModuleArgs = built.module, "socket='"+filepath.Join(dir, "softtoken", "p11.sock")+"'"
	})
	m = serve(t, dir)
	m.trusted(t)
	refused(t, 2, []string{"--confirmed-by"}, "drill", "hsm", "--dir", dir)
	a := m.admin()
	defer a.Close()
	_, err := a.BeginDrill(t.Context(), wire.BeginDrill{Part: wire.DrillHSM, Seconds: 10, Reason: "试"})
	wantCode(t, err, "invalid_request")
	r := m.drill(t, "hsm", 10, tempDir(t), "--confirmed-by", "张三", "--confirmed-by", "李四")
	if r.Held || r.Retried == 0 || len(r.Persons) != 2 {
		t.Errorf("%+v", r)
	}
	m.changeOf(t, "/admin/v1/drills", "drill.begun", r.ID, "", `"persons":"张三、李四"`)

	// With a login.
	zhang, li, wang := m.clerk(t, "zhang", "Xt-guanli-2026"), m.clerk(t, "li", "Aq-guanli-2026"), m.clerk(t, "wang", "Sj-guanli-2026")
	mustRun(t, "admin", "bootstrap", "--dir", dir, "--system", "zhang:张三:"+pinFile(t, zhang.password), "--security", "li:李四:"+pinFile(t, li.password), "--audit", "wang:王五:"+pinFile(t, wang.password))
	configure(t, dir, func(c *appliance.Config) { c.Admin.Local = "login" })
	m.stop(t)
	m = serve(t, dir)
	m.trusted(t)
	zhang.m, li.m = m, m
	zhang.login(t)
	li.login(t)
	li.refused(t, "forbidden", "drill", "db")
	out := tempDir(t)
	if o := zhang.together(t, li, "drill", "db", "--seconds", "10", "--out", out); o.code != 0 || !strings.Contains(o.stdout, "演练通过") || !strings.Contains(o.stdout, "审计管理员") {
		t.Errorf("%v", o)
	}
	glob(t, filepath.Join(out, "drill-db-*.html"))
	m.stop(t)
	if err := machine.Process.Signal(syscall.Signal(0)); err != nil {
		t.Errorf("the machine ended: %v", err)
	}
}

// The line between two campuses, cut by one of them: the other sees it too, and alarms for itself.
func TestDrillCampus(t *testing.T) {
	t.Parallel()
	l := newLand(t)
	pg := dbtest.StartPostgres(t)
	dsn := pg.DSN(pg.Fresh(t))
	a, b := newCampus(t, l, 0, dsn, quick), newCampus(t, l, 1, dsn, quick)
	a.launch(t)
	b.launch(t)
	for _, c := range []*campus{a, b} {
		c.await(t)
		c.trusted(t)
	}
	pairUp(t, a.machine, b.machine)
	r := a.drill(t, "campus", 14, tempDir(t))
	if !r.Held || r.Alarm != "peer-away" || len(r.Findings) != 3 {
		t.Errorf("%+v", r)
	}
	a.stop(t)
	rang(t, a.place, alarm.PeerAway)
	b.stop(t)
	raised := 0
	for _, e := range entries(t, b.place, "alarm.raised") {
		if e.Text("code") == "peer-away" {
			raised++
			if e.Text("drill") != "" {
				t.Error("the other campus takes it for its own drill")
			}
		}
	}
	if raised == 0 {
		t.Error("the other campus did not see the line cut")
	}
}

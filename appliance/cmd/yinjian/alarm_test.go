package main_test

import (
	"bytes"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"yinjian/api/notify"
	"yinjian/api/wire"
	"yinjian/appliance"
	"yinjian/appliance/alarm"
	"yinjian/appliance/audit"
	"yinjian/appliance/backup"
	"yinjian/appliance/report"
	"yinjian/dbdriver/sqlite"
)

// An alarmReceiver is an HTTPS server that keeps what it was sent, and holds each request against the key.
type alarmReceiver struct {
	t   *testing.T
	key string
	url string

	mu  sync.Mutex
	got []notify.Message // guarded by mu
}

// receiveAlarms serves until the test ends, and has the appliance send its alarms there, and to a second receiver that
// never answers: it must not matter.
func receiveAlarms(t *testing.T, dir string) *alarmReceiver {
	t.Helper()
	r := &alarmReceiver{t: t, key: "canary-webhook-key-0123456789"}
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		body, _ := io.ReadAll(q.Body)
		if want := fmt.Sprintf("hmac-sm3=%x", notify.Authenticate([]byte(r.key), q.Header.Get(notify.HeaderTime), body)); q.Header.Get(notify.HeaderSignature) != want {
			t.Errorf("signature %q, want %q", q.Header.Get(notify.HeaderSignature), want)
		}
		var m notify.Message
		if err := json.Unmarshal(body, &m); err != nil {
			t.Errorf("%s: %v", body, err)
		}
		r.mu.Lock()
		r.got = append(r.got, m)
		r.mu.Unlock()
	}))
	t.Cleanup(srv.Close)
	r.url = srv.URL
	hang := make(chan struct{})
	silent := httptest.NewTLSServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-hang }))
	t.Cleanup(silent.Close)
	t.Cleanup(func() { close(hang) })
	roots := func(name string, s *httptest.Server) {
		if err := os.WriteFile(filepath.Join(dir, "secrets", name), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	roots("alarms.pem", srv)
	roots("silent.pem", silent)
	if err := os.WriteFile(filepath.Join(dir, "secrets", "alarms.key"), []byte(r.key+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	configure(t, dir, func(c *appliance.Config) {
		c.Alarms.RaiseAfter, c.Alarms.ClearAfter = appliance.Duration(time.Second), appliance.Duration(time.Second)
		c.Alarms.Webhook = []appliance.AlarmWebhook{
			{URL: srv.URL + "/hook", KeyFile: "secrets/alarms.key", Roots: "secrets/alarms.pem"},
			{URL: silent.URL, KeyFile: "secrets/alarms.key", Roots: "secrets/silent.pem"},
		}
	})
	return r
}

// raises waits until an alarm of a code is active, clears until none is. TestEveryAlarmIsRaisedAndCleared looks for both.
func (m *machine) raises(t *testing.T, code alarm.Code) {
	t.Helper()
	eventually(t, time.Minute, "the alarm "+string(code), func() bool { return m.alarmed(t, code) })
}

func (m *machine) clears(t *testing.T, code alarm.Code) {
	t.Helper()
	eventually(t, time.Minute, "the end of the alarm "+string(code), func() bool { return !m.alarmed(t, code) })
}

func (m *machine) alarmed(t *testing.T, code alarm.Code) bool {
	t.Helper()
	var s struct{ Active []struct{ Code alarm.Code } }
	if err := json.Unmarshal([]byte(mustRun(t, "alarm", "list", "--dir", m.dir, "-o", "json").stdout), &s); err != nil {
		t.Fatal(err)
	}
	return slices.ContainsFunc(s.Active, func(l struct{ Code alarm.Code }) bool { return l.Code == code })
}

// rang holds that alarms were raised and are over, by the journal of an appliance that was stopped.
func rang(t *testing.T, dir string, codes ...alarm.Code) {
	t.Helper()
	raised, cleared := map[string]alarm.Code{}, map[alarm.Code]bool{}
	for _, e := range entries(t, dir, "alarm.raised", "alarm.cleared") {
		if code := alarm.Code(e.Text("code")); e.Kind == "alarm.raised" {
			raised[e.Text("id")] = code
		} else if raised[e.Text("id")] == code {
			cleared[code] = true
		}
	}
	for _, code := range codes {
		if !cleared[code] {
			t.Errorf("the alarm %s was not raised, or not cleared: raised %v", code, raised)
		}
	}
}

// Each alarm is raised by a test, and cleared where it can be while the appliance runs.
func TestEveryAlarmIsRaisedAndCleared(t *testing.T) {
	t.Parallel()
	unit := map[string]string{ // by the appliance's own tests, of its parts
		"CertificateDue": "TestCertificateDue", "BackupOverdue": "TestBackupOverdue", "TimeWorker": "TestTimeWorkerAlarm",
	}
	told := map[string]string{"MachineAway": "TestAlarms", "PINLocked": "TestAlarms", "Test": "TestAlarms", "LoginLocked": "TestAdministrators"} // by what the receiver was sent
	stays := map[string]string{"JournalFailed": "until a restart", "UnaccountedUse": "for good: it is counted"}
	tests := ""
	for _, file := range slices.Concat(glob(t, "*_test.go"), glob(t, "../../*_test.go")) {
		tests += readFile(t, file)
	}
	rings := regexp.MustCompile(`(?s)rang\(t, [^)]*?\)`).FindAllString(tests, -1)
	names := regexp.MustCompile(`(?m)^\t(\w+) +Code = "([a-z-]+)"`).FindAllStringSubmatch(readFile(t, "../../alarm/alarm.go"), -1)
	if len(names) != len(alarm.Meanings) {
		t.Fatalf("%d names, of %d alarms", len(names), len(alarm.Meanings))
	}
	for _, n := range names {
		name := "alarm." + n[1]
		rung := slices.ContainsFunc(rings, func(r string) bool { return regexp.MustCompile(`\b` + name + `\b`).MatchString(r) })
		raised, cleared := strings.Contains(tests, ".raises(t, "+name+")"), strings.Contains(tests, ".clears(t, "+name+")")
		byTest := unit[n[1]] != "" && strings.Contains(tests, "func "+unit[n[1]]+"(") || told[n[1]] != ""
		if !rung && !byTest && !(raised && (cleared || stays[n[1]] != "")) {
			t.Errorf("%s: no test raises and clears it", n[2])
		}
	}
}

// of are the messages about an alarm.
func (r *alarmReceiver) of(code alarm.Code, object string) (out []notify.Message) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, m := range r.got {
		if m.Code == code && (object == "" || m.Object == object) {
			out = append(out, m)
		}
	}
	return out
}

// What goes wrong is told once, and once that it is over, to whoever listens and in the journal; a receiver that does not
// answer keeps nobody waiting. What is filed is signed by the log's key.
func TestAlarms(t *testing.T) {
	t.Parallel()
	dir := initAppliance(t, startTimeServer(t))
	r := receiveAlarms(t, dir)
	m := serve(t, dir)
	m.trusted(t)
	his := m.register(t, "his")
	m.enrol(t, "D1", "271828")

	// 1. A test alarm: one receiver takes it, the other does not answer.
	o := yinjian(t, "alarm", "test", "--dir", dir, "-o", "json")
	var tested wire.TestedAlarms
	if err := json.Unmarshal([]byte(o.stdout), &tested); err != nil || o.code != 1 || tested.Passed || len(tested.Receivers) != 2 || !tested.Receivers[0].Sent || tested.Receivers[1].Sent {
		t.Errorf("alarm test: %v", o)
	}
	if got := r.of(alarm.Test, ""); len(got) != 1 || got[0].ID != tested.ID || got[0].Node == "" || !got[0].Trusted {
		t.Errorf("the test alarm: %+v", got)
	}

	// 2. The software cipher machine hangs: signing is refused, and that is told; it goes on, and that is told.
	soft := childWith(t, m.cmd.Process.Pid, "softtoken --dir")
	soft.signal(t, syscall.SIGSTOP)
	eventually(t, time.Minute, "the machine is missed", func() bool {
		return len(r.of(alarm.MachineAway, "main")) > 0 && len(r.of(alarm.SigningStopped, "")) > 0
	})
	soft.signal(t, syscall.SIGCONT)
	eventually(t, time.Minute, "the machine is back", func() bool {
		return len(r.of(alarm.MachineAway, "main")) > 1 && len(r.of(alarm.SigningStopped, "")) > 1
	})
	for _, of := range [][]notify.Message{r.of(alarm.MachineAway, "main"), r.of(alarm.SigningStopped, "")} {
		if len(of) != 2 || of[0].Event.Event != alarm.Raised || of[1].Event.Event != alarm.Cleared || of[0].ID != of[1].ID || of[0].Title == "" || of[0].Next == "" {
			t.Errorf("told: %+v", of)
		}
	}

	// 3. A PIN that is tried until it is locked.
	for range 5 {
		if _, err := his.Authorize(t.Context(), &wire.AuthorizationRequest{Signer: "D1", PIN: "000000", Count: 1, Seconds: 60}); err == nil {
			t.Fatal("a wrong PIN was taken")
		}
	}
	eventually(t, 30*time.Second, "the lock is told", func() bool { return len(r.of(alarm.PINLocked, "D1")) == 1 })
	list := mustRun(t, "alarm", "list", "--dir", dir).stdout
	if !strings.Contains(list, "pin-locked") || strings.Contains(list, r.key) {
		t.Errorf("alarm list:\n%s", list)
	}
	mustRun(t, "signer", "set-pin", "D1", "--dir", dir, "--pin-file", pinFile(t, "314159"))
	eventually(t, 30*time.Second, "its end is told", func() bool { return len(r.of(alarm.PINLocked, "D1")) == 2 })

	// 4. A report is signed by the log's key; anything else is not that report.
	a := m.admin()
	defer a.Close()
	content := []byte("报告 a report\n")
	receipt, err := a.SignReport(t.Context(), wire.SignReport{Kind: "patrol", Name: "daily", Outcome: "normal", Files: []wire.ReportFile{wire.ReportFile(report.FileOf("r.txt", content))}})
	if err != nil {
		t.Fatal(err)
	}
	m.changeOf(t, "/admin/v1/reports", "report.filed", "patrol/daily", "", `"outcome":"normal"`)
	var forged backup.Receipt
	if err := json.Unmarshal(receipt, &forged); err != nil || len(forged.Proof) == 0 {
		t.Fatalf("%s: %v", receipt, err)
	}
	forged.Proof[0][0] ^= 1
	bad, err := json.Marshal(forged)
	if err != nil {
		t.Fatal(err)
	}
	folder := tempDir(t)
	for name, b := range map[string][]byte{"receipt": receipt, "r.txt": content, "other/r.txt": append(bytes.Clone(content), ' '), "bad": bad} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(folder, name)), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(folder, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	verify := []string{"report", "verify", "--log-key", filepath.Join(dir, "log.pem"), "--receipt", filepath.Join(folder, "receipt")}
	mustRun(t, append(slices.Clone(verify), filepath.Join(folder, "r.txt"))...)
	refused(t, 1, []string{"r.txt", "不符"}, append(slices.Clone(verify), filepath.Join(folder, "other", "r.txt"))...)
	refused(t, 1, []string{"none of the report's"}, append(slices.Clone(verify), filepath.Join(folder, "bad"))...)
	verify[5] = filepath.Join(folder, "bad")
	refused(t, 1, []string{"回执不能证明"}, append(slices.Clone(verify), filepath.Join(folder, "r.txt"))...)

	// 5. All of it is in the journal, and what was refused is summed up with the hour.
	m.stop(t)
	text := audited(t, dir).stdout
	if !strings.Contains(text, "未发现改动") {
		t.Error(text)
	}
	store, err := sqlite.OpenJournal(t.Context(), sqlite.JournalConfig{Dir: filepath.Join(dir, "journal"), ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	size, _, err := store.Head(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	kinds := map[string]int{}
	if err := audit.Scan(t.Context(), store, 0, size, func(r audit.Record) error {
		kinds[r.Entry.Kind]++
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	for kind, least := range map[string]int{"alarm.raised": 3, "alarm.cleared": 3, "service.hour": 1} {
		if kinds[kind] < least {
			t.Errorf("%d entries of %s, want %d at least: %v", kinds[kind], kind, least, kinds)
		}
	}
}

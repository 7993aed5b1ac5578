package main_test

import (
	"database/sql"
	"encoding/hex"
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/emmansun/gmsm/sm3"

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance/patrol"
	"yinjian/appliance/problem"
	"yinjian/appliance/report"
)

// patrolOf runs a patrol and answers its report.
func patrolOf(t *testing.T, dir string, code int, flags ...string) *patrol.Report {
	t.Helper()
	o := yinjian(t, append([]string{"patrol", "--dir", dir, "-o", "json"}, flags...)...)
	r := new(patrol.Report)
	if err := json.Unmarshal([]byte(o.stdout), r); err != nil || o.code != code {
		t.Fatalf("patrol %v: want exit %d: %v, %v", flags, code, err, o)
	}
	return r
}

func areaOf(t *testing.T, r *patrol.Report, name string) patrol.Area {
	t.Helper()
	for _, a := range r.Areas {
		if a.Name == name {
			return a
		}
	}
	t.Fatalf("no area %s", name)
	return patrol.Area{}
}

func words(a patrol.Area) string {
	var b strings.Builder
	for _, l := range a.Lines {
		b.WriteString(l.Item + "：" + l.Value + "\n")
	}
	return b.String()
}

// A patrol says how a running appliance is, goes on from the one before, and is signed by the log's key; of one that stands
// still it says what its folder shows, and of a journal that was changed, that it was.
func TestPatrol(t *testing.T) {
	t.Parallel()
	dir := initAppliance(t, startTimeServer(t))
	m := serve(t, dir)
	m.trusted(t)
	his := m.register(t, "his", "--consent", "app-asserted")
	m.enrol(t, "D1", "271828")
	for _, key := range []string{"p1", "p2", "p3"} {
		if _, err := his.Sign(t.Context(), key, asserted("D1", key)); err != nil {
			t.Fatal(err)
		}
	}
	// 1. A new appliance has no backup: a warning. Everything that can be asked is.
	first := patrolOf(t, dir, 1)
	if !first.Running || !first.Trusted || first.Summary.Entries == 0 {
		t.Errorf("%+v", first)
	}
	for name, want := range map[string]string{"time": "trusted", "machines": "密码机 main", "journal": "未发现改动", "database": "落后", "certificates": "tsa:sm2 SM2", "backups": "从未备份", "peer": "没有结对", "disks": "余"} {
		if got := words(areaOf(t, first, name)); !strings.Contains(got, want) {
			t.Errorf("%s does not say %q:\n%s", name, want, got)
		}
	}
	// 2. The next goes on from it, by the journal; a weekly one samples what is before.
	second := patrolOf(t, dir, 1, "--weekly")
	if got := words(areaOf(t, second, "journal")); !strings.Contains(got, "自上次巡检以来，另抽查 8 段") || !strings.Contains(got, "未发现改动") {
		t.Errorf("the second:\n%s", got)
	}
	if second.Summary.Entries <= first.Summary.Entries {
		t.Errorf("verified to %d, then to %d", first.Summary.Entries, second.Summary.Entries)
	}
	// 3. A quarterly one reads all of it, and the database.
	out := filepath.Join(tempDir(t), "out")
	last := patrolOf(t, dir, 1, "--quarterly", "--out", out)
	if got := words(areaOf(t, last, "journal")); !strings.Contains(got, "全部核验") {
		t.Errorf("journal:\n%s", got)
	}
	if got := words(areaOf(t, last, "database")); !strings.Contains(got, "0 处不符；本期 1 天") || !strings.Contains(got, " 个 MAC，0 处不符") {
		t.Errorf("database:\n%s", got)
	}
	// 4. Its files are signed; a byte more is not what was signed.
	receipt := glob(t, filepath.Join(out, "*.receipt.json"))[0]
	base := strings.TrimSuffix(receipt, ".receipt.json")
	verify := []string{"report", "verify", "--log-key", filepath.Join(dir, "log.pem"), "--receipt", receipt}
	mustRun(t, append(verify, base+".json", base+".html")...)
	page := readFile(t, base+".html")
	if err := os.WriteFile(base+".html", []byte(page+" "), 0o600); err != nil {
		t.Fatal(err)
	}
	refused(t, 1, []string{"不符"}, append(verify, base+".html")...)
	for _, part := range []string{"src=", "href=", "<script"} {
		if strings.Contains(page, part) {
			t.Errorf("the page has %q", part)
		}
	}
	text := yinjian(t, "patrol", "--dir", dir)
	if text.code != 1 || !strings.Contains(text.stdout, "【备份】警告") || !strings.Contains(text.stdout, "没有查的") || strings.Contains(text.stderr, "失败") {
		t.Errorf("%v", text)
	}
	// What somebody files in a patrol's name is taken for one only as far as the appliance finds the same; the next goes on from
	// what the appliance has verified.
	lies(t, m)
	// 5. The appliance patrols itself, finds the same, and keeps what it signed; what was changed since is not given out.
	itself(t, m)
	// 6. It stands still: severe, and not signed; the journal is read all the same.
	m.stop(t)
	still := patrolOf(t, dir, 2)
	if still.Running || !strings.Contains(words(areaOf(t, still, "journal")), "未发现改动") || !strings.Contains(strings.Join(still.NotChecked, "\n"), "设备未在运行") {
		t.Errorf("of one that stands still: %+v", still)
	}
	// 7. Somebody changes an entry that a patrol has not read yet: the next one says so; a daily one does not read what was
	// verified before, and says that.
	segments := glob(t, filepath.Join(dir, "journal", "*.db"))
	changed := false
	for _, file := range segments {
		db, err := sql.Open("sqlite3", file)
		if err != nil {
			t.Fatal(err)
		}
		res, err := db.Exec("UPDATE yj_entry SET entry_der = CAST(entry_der || x'00' AS BLOB) WHERE seq_no = (SELECT MAX(seq_no) FROM yj_entry)")
		if err == nil {
			n, _ := res.RowsAffected()
			changed = changed || n > 0
		}
		db.Close()
	}
	if !changed {
		t.Fatal("no entry was changed")
	}
	if got := words(areaOf(t, patrolOf(t, dir, 2), "journal")); !strings.Contains(got, "发现改动") || strings.Contains(got, "未发现改动") {
		t.Errorf("of a changed journal:\n%s", got)
	}
	// 8. Nothing to look at.
	refused(t, 3, []string{"没能巡检"}, "patrol", "--dir", filepath.Join(dir, "none"))
	refused(t, 2, nil, "patrol", "--dir", dir, "--daily", "--weekly")
}

// lies has somebody file patrols that nobody made.
func lies(t *testing.T, m *machine) {
	t.Helper()
	a := m.admin()
	defer a.Close()
	file := func(summary patrol.Summary) error {
		b, err := json.Marshal(summary)
		if err != nil {
			t.Fatal(err)
		}
		_, err = a.SignReport(t.Context(), wire.SignReport{Kind: "patrol", Name: "daily", Outcome: "normal", Summary: b})
		return err
	}
	before := patrolOf(t, m.dir, 1)
	for name, summary := range map[string]patrol.Summary{
		"another root":   {Entries: before.Summary.Entries, Root: strings.Repeat("00", 32)},
		"no checkpoint":  {Entries: before.Summary.Entries + 1_000_000, Root: before.Summary.Root},
		"another size":   {Entries: before.Summary.Entries - 1, Root: before.Summary.Root},
		"without a root": {Entries: before.Summary.Entries},
	} {
		if err := file(summary); !client.Is(err, problem.InvalidRequest) {
			t.Errorf("%s is filed: %v", name, err)
		}
	}
	// A report that another appliance made is not this one's, though this one has signed it.
	content := []byte(`{"format":"yinjian-patrol/1","node":"binhai-1"}`)
	receipt, err := a.SignReport(t.Context(), wire.SignReport{Kind: "patrol", Name: "daily", Outcome: "normal", Files: []wire.ReportFile{wire.ReportFile(report.FileOf("other.json", content))}})
	if err != nil {
		t.Fatal(err)
	}
	work := tempDir(t)
	for name, b := range map[string][]byte{"receipt": receipt, "other.json": content} {
		if err := os.WriteFile(filepath.Join(work, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	refused(t, 1, []string{"不是签名的设备"}, "report", "verify", "--log-key", filepath.Join(m.dir, "log.pem"), "--receipt", filepath.Join(work, "receipt"), filepath.Join(work, "other.json"))
	// Nor does the next patrol believe it.
	if next := patrolOf(t, m.dir, 1); !strings.Contains(words(areaOf(t, next, "journal")), "自上次巡检以来") || next.Summary.Entries <= before.Summary.Entries {
		t.Errorf("after that: %+v", next.Summary)
	}
}

// itself has the appliance patrol over the route of the console.
func itself(t *testing.T, m *machine) {
	t.Helper()
	a := m.admin()
	defer a.Close()
	into := func(out any) func(json.RawMessage, error) {
		return func(b json.RawMessage, err error) {
			t.Helper()
			if err == nil {
				err = json.Unmarshal(b, out)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	var done wire.Patrolled
	into(&done)(a.RunPatrol(t.Context(), wire.RunPatrol{Period: "monthly"}))
	r := new(patrol.Report)
	if err := json.Unmarshal(done.Report, r); err != nil || !r.Running || !r.Trusted || !strings.Contains(words(areaOf(t, r, "journal")), "全部核验") || !strings.Contains(words(areaOf(t, r, "database")), "0 处不符") {
		t.Errorf("%v: %s", err, done.Report)
	}
	m.changeOf(t, "/admin/v1/patrols", "report.filed", "patrol/monthly", "", `"outcome":"warning"`)
	var list wire.FiledReports
	into(&list)(a.ListReports(t.Context(), wire.ListReports{Kind: "patrol", Most: 6}))
	if len(list.Reports) != 6 || list.Omitted != 2 || !reflect.DeepEqual(list.Reports[0], done.Filed) || list.Reports[0].Outcome != "warning" || !list.Reports[0].Files[0].Kept || list.Reports[5].Files[0].Kept { // the sixth was written elsewhere
		t.Errorf("%+v", list)
	}
	var state struct {
		Reports map[string]struct{ Name, Outcome string }
		Work    []any
	}
	into(&state)(a.State(t.Context()))
	if got := state.Reports["patrol"]; got.Name != "monthly" || got.Outcome != "warning" || len(state.Work) != 0 {
		t.Errorf("%+v", state)
	}
	work := tempDir(t)
	verify := []string{"report", "verify", "--log-key", filepath.Join(m.dir, "log.pem"), "--receipt", filepath.Join(work, "receipt")}
	for _, file := range append([]wire.FiledFile{{}}, done.Filed.Files...) {
		var c wire.ReportContent
		into(&c)(a.ReadReport(t.Context(), wire.ReadReport{Sequence: done.Filed.Sequence, File: file.Name}))
		name := filepath.Join(work, c.Name)
		if file.Name == "" {
			name = filepath.Join(work, "receipt")
		} else {
			verify = append(verify, name)
		}
		if err := os.WriteFile(name, c.Content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	mustRun(t, verify...)
	kept := filepath.Join(m.dir, "reports", done.Filed.Files[0].Name)
	if err := os.WriteFile(kept, []byte(strings.Replace(readFile(t, kept), "<", " ", 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{done.Filed.Files[0].Name, "../config.toml", "x"} {
		if _, err := a.ReadReport(t.Context(), wire.ReadReport{Sequence: done.Filed.Sequence, File: file}); !client.Is(err, problem.NotFound) {
			t.Errorf("%s: %v", file, err)
		}
	}
	if _, err := a.ReadReport(t.Context(), wire.ReadReport{}); !client.Is(err, problem.NotFound) {
		t.Errorf("the first entry as a report: %v", err)
	}
	var system struct {
		Config    struct{ SM3, Started string }
		Program   struct{ SM3 string }
		Listeners []struct {
			Name        string
			Certificate *struct {
				Subject string
				Days    int `json:"days_left"`
			}
		}
		Disks []any
	}
	into(&system)(a.System(t.Context()))
	if sum := sm3.Sum([]byte(readFile(t, filepath.Join(m.dir, "config.toml")))); system.Config.SM3 != hex.EncodeToString(sum[:]) || system.Config.Started != system.Config.SM3 || len(system.Program.SM3) != 64 || len(system.Disks) < 2 {
		t.Errorf("%+v", system)
	}
	if l := system.Listeners[0]; l.Name != "api" || l.Certificate == nil || l.Certificate.Subject == "" || l.Certificate.Days < 1 {
		t.Errorf("%+v", l)
	}
}

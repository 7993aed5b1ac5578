package main_test

import (
	"database/sql"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"yinjian/appliance/patrol"
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
	if text.code != 1 || !strings.Contains(text.stdout, "【备份】警告") || !strings.Contains(text.stdout, "没有查的") {
		t.Errorf("%v", text)
	}
	// 5. It stands still: severe, and not signed; the journal is read all the same.
	m.stop(t)
	still := patrolOf(t, dir, 2)
	if still.Running || !strings.Contains(words(areaOf(t, still, "journal")), "未发现改动") || !strings.Contains(strings.Join(still.NotChecked, "\n"), "设备未在运行") {
		t.Errorf("of one that stands still: %+v", still)
	}
	// 6. Somebody changes an entry that a patrol has not read yet: the next one says so; a daily one does not read what was
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
	// 7. Nothing to look at.
	refused(t, 3, []string{"没能巡检"}, "patrol", "--dir", filepath.Join(dir, "none"))
	refused(t, 2, nil, "patrol", "--dir", dir, "--daily", "--weekly")
}

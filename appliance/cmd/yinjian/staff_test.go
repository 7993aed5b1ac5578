package main_test

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/csv"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	_ "github.com/mattn/go-sqlite3"
	"golang.org/x/text/encoding/simplifiedchinese"

	"yinjian/appliance"
)

// A staffSummary is what `signer import -o json` prints.
type staffSummary struct {
	Rows, New, Enrolled, Present, Differs, Refused int
	NotTried                                       int     `json:"not_tried"`
	PerSecond                                      float64 `json:"per_second"`
}

func summary(t *testing.T, o outcome) (s staffSummary) {
	t.Helper()
	if err := json.Unmarshal([]byte(o.stdout), &s); err != nil {
		t.Fatalf("%v: %v", err, o)
	}
	return s
}

// staffKeys are the labels of the staff slot's keys, as the cipher machine lists them, and how many it should not have.
func (m *machine) staffKeys(t *testing.T) (labels []string, unlisted int) {
	t.Helper()
	var list struct {
		Keys []struct{ Label, Owner string }
	}
	if err := json.Unmarshal([]byte(mustRun(t, "hsm", "keys", "--dir", m.dir, "-o", "json").stdout), &list); err != nil {
		t.Fatal(err)
	}
	for _, k := range list.Keys {
		if strings.HasPrefix(k.Label, "staff/") {
			labels = append(labels, k.Label)
			if k.Owner == "" {
				unlisted++
			}
		}
	}
	slices.Sort(labels)
	return labels, unlisted
}

// The hospital's staff from Excel's table, in the character set that Excel writes, with rows that must not come in. Killed
// in the middle, command and appliance each, it goes on where it was: everybody is enrolled once, with one key. The test
// accounts sign for an application that is not of production, are refused by one that is, and stand apart in the central
// database. With YINJIAN_LONG=1 there are 6,300, else 200.
func TestStaffImport(t *testing.T) {
	t.Parallel()
	people, kills := 200, 2
	if os.Getenv("YINJIAN_LONG") != "" {
		people, kills = 6300, 8
	}
	const tests = 24
	server := startTimeServer(t)
	dir := initAppliance(t, server)
	m := serve(t, dir)
	m.trusted(t)

	var b bytes.Buffer
	w := csv.NewWriter(&b)
	w.UseCRLF = true
	line := func(cells ...string) {
		if err := w.Write(cells); err != nil {
			t.Fatal(err)
		}
	}
	line("工号", "姓名", "所在科室", "岗位", "测试", "备注")
	number := func(i int) string { return fmt.Sprintf("%06d", i) }
	for i := range people {
		line(number(i), fmt.Sprintf("医师%d", i), fmt.Sprintf("内科%d病区", i%40), "主治医师", map[bool]string{true: "是"}[i < tests], "")
	}
	bad := [][]string{
		{"张三", "张三", "内科1病区", "主治医师", "", ""},
		{"900001", "", "内科1病区", "主治医师", "", ""},
		{"900002", "=2+5", "内科1病区", "主治医师", "", ""},
		{"900003", "李\u200b四", "内科1病区", "主治医师", "", ""},
		{"900004", "李\u202e四", "内科1病区", "主治医师", "", ""},
		{"900005", "王五", "没有的科室", "主治医师", "", ""},
		{"900006", "王五", "内科1病区", "没有的岗位", "", ""},
		{"900007", "王五", "内科1病区", "主治医师", "也许", ""},
		{"900008", "王五", "内科1病区", "主治医师", "", "", "多一格"},
		{"900009", "王五", "内科1病区", "主治医师", "", ""},
		{"900009", "王六", "内科1病区", "主治医师", "", ""},
		{number(7), "医师7", "内科7病区", "主治医师", "是", ""}, // as it stands above
	}
	for _, cells := range bad {
		line(cells...)
	}
	w.Flush()
	gb, err := simplifiedchinese.GB18030.NewEncoder().Bytes(b.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	folder := tempDir(t)
	write := func(name string, data []byte) string {
		t.Helper()
		name = filepath.Join(folder, name)
		if err := os.WriteFile(name, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return name
	}
	table := write("staff.csv", gb)
	departments := "科室\n"
	for i := range 40 {
		departments += fmt.Sprintf("内科%d病区\n", i)
	}
	args := []string{
		"signer", "import", table, "--dir", dir, "--campus", "本部", "-o", "json",
		"--departments", write("departments.csv", []byte(departments)), "--roles", write("roles.csv", []byte("岗位\n主治医师\n")),
	}

	before, _ := m.staffKeys(t)
	entries := m.state(t).Journal.Entries
	o := refused(t, 1, []string{"GB18030", "隔离表"}, append(args, "--dry-run")...)
	if s := summary(t, o); s.Rows != people+len(bad) || s.New != people || s.Refused != len(bad) {
		t.Errorf("dry run: %+v; %v", s, o)
	}
	if after, _ := m.staffKeys(t); len(after) != len(before) || m.state(t).Journal.Entries > entries+5 { // the appliance's own go on
		t.Errorf("the dry run made %d keys and %d entries", len(after)-len(before), m.state(t).Journal.Entries-entries)
	}

	// Killed in turns, the command and the appliance under it, each time after some were enrolled.
	signers := func() (n int) {
		var all []json.RawMessage
		if err := json.Unmarshal([]byte(mustRun(t, "signer", "list", "--dir", dir, "-o", "json").stdout), &all); err != nil {
			t.Fatal(err)
		}
		return len(all)
	}
	for i := range kills {
		had := signers()
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
		cmd := exec.CommandContext(ctx, built.binary, args...)
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		eventually(t, time.Minute, "some are enrolled", func() bool { return signers() > had+people/(4*kills) })
		if i%2 == 0 {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		} else {
			m.kill(t)
			if err := cmd.Wait(); err == nil || !strings.Contains(out.String(), "接着做") {
				t.Errorf("import while the appliance is killed: %v\n%s", err, &out)
			}
			m = serve(t, dir)
			m.trusted(t)
		}
		cancel()
	}
	had := signers()
	if had == 0 || had >= people {
		t.Fatalf("%d of %d are enrolled: the kills came too early or too late", had, people)
	}
	begun := time.Now()
	cmd := exec.Command(built.binary, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	_ = cmd.Run() // its code says it
	o = outcome{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
	s := summary(t, o)
	if o.code != 1 || s.Enrolled == 0 || s.Enrolled+s.Present != people || s.Refused != len(bad) || s.Differs+s.NotTried > 0 || signers() != people {
		t.Errorf("the rest: %+v, %d signers; %v", s, signers(), o)
	}
	peak := cmd.ProcessState.SysUsage().(*syscall.Rusage).Maxrss
	t.Logf("%d enrolled in %v, %.1f a second; the command took %d MiB", s.Enrolled, time.Since(begun).Round(time.Second), s.PerSecond, peak>>10)
	// What a process took counts from before its exec, when it was still this one (fs/exec.c, setmax_mm_hiwater_rss).
	var own syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &own); err != nil {
		t.Fatal(err)
	}
	if limit := max(200<<10, own.Maxrss); os.Getenv("YINJIAN_LONG") == "" && peak > limit { // the race detector takes its own
		t.Errorf("the command took %d MiB", peak>>10)
	}
	labels, unlisted := m.staffKeys(t)
	if len(labels) != len(before)+people || unlisted > 0 {
		t.Errorf("%d keys for %d signers, %d of nobody", len(labels)-len(before), people, unlisted)
	}

	// The same again, and with a change: nothing happens, and the change is named.
	o = yinjian(t, args...)
	if s := summary(t, o); s.Present != people || s.Enrolled != 0 || s.Refused != len(bad) {
		t.Errorf("again: %+v", s)
	}
	rows := readCSV(t, table+".quarantine.csv")
	if len(rows) != len(bad)+1 || !slices.Equal(rows[0][:3], []string{"行", "代码", "原因"}) {
		t.Fatalf("quarantine: %q", rows)
	}
	for i, why := range []string{"工号", "name", "公式", "U+200B", "U+202E", "科室表", "岗位表", "测试", "7 格", "内容不同", "内容不同", "重复"} {
		if r := rows[i+1]; r[0] != fmt.Sprint(people+i+2) || !strings.Contains(r[2], why) || r[3] != bad[i][0] {
			t.Errorf("quarantine, row %d: %q, want %q", i, r, why)
		}
	}
	if rows[3][4] != "'=2+5" {
		t.Errorf("a formula is written back as %q", rows[3][4])
	}
	changed := write("changed.csv", []byte("工号,姓名,科室,岗位,院区,测试\n"+number(tests)+",改名,内科1病区,主治医师,本部,\n"))
	o = refused(t, 1, []string{"隔离表"}, "signer", "import", changed, "--dir", dir)
	if !strings.Contains(o.stdout, "与目录不同 differs") || signers() != people {
		t.Errorf("a changed row: %v", o)
	}
	if r := readCSV(t, changed+".quarantine.csv"); len(r) != 2 || r[1][1] != "differs" || !strings.Contains(r[1][2], fmt.Sprintf("医师%d", tests)) || !strings.Contains(r[1][2], "改名") {
		t.Errorf("a changed row: %q", r)
	}

	m.checkTestAccounts(t, number, tests, people)
	m.mustBeClean(t)
}

func readCSV(t *testing.T, name string) [][]string {
	t.Helper()
	data, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	r := csv.NewReader(bytes.NewReader(bytes.TrimPrefix(data, []byte("\xef\xbb\xbf"))))
	r.FieldsPerRecord = -1
	rows, err := r.ReadAll()
	if err != nil {
		t.Fatal(err)
	}
	return rows
}

// checkTestAccounts has test accounts and others sign for both kinds of application. The first of the numbers are the test
// accounts.
func (m *machine) checkTestAccounts(t *testing.T, number func(int) string, tests, people int) {
	t.Helper()
	consent := []string{"--consent", "app-asserted"}
	his, school := m.register(t, "his", append(consent, "--production")...), m.register(t, "school", consent...)
	for i := range tests {
		if _, err := school.Sign(t.Context(), fmt.Sprintf("t%d", i), asserted(number(i), fmt.Sprintf("t%d", i))); err != nil {
			t.Errorf("test account %s: %v", number(i), err)
		}
		_, err := his.Sign(t.Context(), fmt.Sprintf("p%d", i), asserted(number(i), fmt.Sprintf("p%d", i)))
		wantCode(t, err, "signer_test")
	}
	const real = 5
	for i := range real {
		if _, err := his.Sign(t.Context(), fmt.Sprintf("r%d", i), asserted(number(people-1-i), fmt.Sprintf("r%d", i))); err != nil {
			t.Error(err)
		}
	}
	eventually(t, 30*time.Second, "everything is shipped", func() bool { return m.state(t).Projection.Lag == 0 })
	db, err := sql.Open("sqlite3", "file:"+filepath.Join(m.dir, "central.db")+"?mode=ro")
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	for status, want := range map[string]int{"test": tests, "recorded": real} {
		var n int
		if err := db.QueryRow(`SELECT COUNT(*) FROM yj_record WHERE kind_name = 'sign.v1' AND status_code = ?`, status).Scan(&n); err != nil || n != want {
			t.Errorf("%d signatures with status %s, want %d: %v", n, status, want, err)
		}
	}
}

// Where administrators log in, one approval covers a table: the second person computes what he approves of the same file, and
// what runs is that.
func TestStaffImportApproved(t *testing.T) {
	t.Parallel()
	server := startTimeServer(t)
	dir := initAppliance(t, server)
	configure(t, dir, func(c *appliance.Config) { c.Admin.Local = appliance.LocalLogin })
	m := serve(t, dir)
	m.trusted(t)
	zhang, li := m.clerk(t, "zhang", "Xt-guanli-2026"), m.clerk(t, "li", "Aq-guanli-2026")
	mustRun(t, "admin", "bootstrap", "--dir", dir, "--system", "zhang:张三:"+pinFile(t, zhang.password), "--security", "li:李四:"+pinFile(t, li.password), "--audit", "wang:王五:"+pinFile(t, "Sj-guanli-2026"))
	zhang.login(t)
	li.login(t)
	const people = 150
	table := "工号,姓名,科室,院区\n"
	for i := range people {
		table += fmt.Sprintf("D%04d,王%d,内科,本部\n", i, i)
	}
	file := filepath.Join(tempDir(t), "staff.csv")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(table)
	digest := func() string {
		t.Helper()
		o := mustRun(t, "signer", "import", file, "--digest", "--dir", "/nowhere")
		sum, rest, _ := strings.Cut(o.stdout, " ")
		if len(sum) != 64 || strings.Count(o.stdout, "\n") != 1 || !strings.Contains(rest, "150 行") {
			t.Fatalf("%v", o)
		}
		return sum
	}
	sum := digest()
	write(strings.Replace(table, "D0077,王77", "D0077,赵77", 1))
	if digest() == sum {
		t.Error("another table has the same SM3")
	}
	write(table)
	if o := li.must(t, "signer", "import", file, "--dry-run"); !strings.Contains(o.stdout, fmt.Sprint(people)) {
		t.Errorf("%v", o)
	}
	if o := li.together(t, zhang, "signer", "import", file, "-o", "json"); o.code != 0 || !strings.Contains(o.stdout, fmt.Sprintf(`"enrolled": %d`, people)) || !strings.Contains(o.stderr, sum) {
		t.Fatalf("%v", o)
	}
	if o := li.together(t, zhang, "signer", "import", file, "-o", "json"); o.code != 0 || !strings.Contains(o.stdout, fmt.Sprintf(`"present": %d`, people)) {
		t.Errorf("again: %v", o)
	}
	m.stop(t)
	var made []string
	for _, e := range entries(t, dir, "administration.proposal/made") {
		made = append(made, e.Text("request.sm3"))
	}
	if len(made) != 2 || made[0] != sum || made[1] != sum {
		t.Errorf("proposals %v, want %s twice", made, sum)
	}
}

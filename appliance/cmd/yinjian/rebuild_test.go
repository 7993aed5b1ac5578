package main_test

import (
	"encoding/csv"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"yinjian/api/client"
	"yinjian/appliance"
	"yinjian/appliance/alarm"
	"yinjian/dbdriver/dbtest"
)

// signs makes n signatures as an application.
func signs(t *testing.T, c *client.Client, prefix string, n int) {
	t.Helper()
	for i := range n {
		key := fmt.Sprintf("%s-%d", prefix, i)
		if _, err := c.Sign(t.Context(), key, asserted("D1001", key)); err != nil {
			t.Fatalf("%s: %v", key, err)
		}
	}
}

// withPostgres starts an appliance whose central database is on the server, with a signer.
func withPostgres(t *testing.T, c *dbtest.Cluster, name string, more ...string) *machine {
	t.Helper()
	dir := initAppliance(t, startTimeServer(t), more...)
	configure(t, dir, func(cfg *appliance.Config) { cfg.Database.DSN = c.DSN(name) })
	m := serve(t, dir)
	m.trusted(t)
	m.enrol(t, "D1001", "")
	return m
}

// A fork is an alarm wherever somebody looks, signing goes on, and nothing more is shipped; a rebuild ends it. A rebuild
// does nothing that it was not told, mends dropped tables, and brings back what an appliance had shipped that is no more.
func TestForkAndRebuild(t *testing.T) {
	t.Parallel()
	c := dbtest.StartPostgres(t)
	name := c.Fresh(t)
	gone := withPostgres(t, c, name, "--node", "binhai-1")
	signs(t, gone.register(t, "lis", "--consent", "app-asserted"), "west", 3)
	eventually(t, time.Minute, "the other appliance has shipped", func() bool { return gone.state(t).Projection.Lag == 0 })
	gone.stop(t)
	columns := `node_id || epoch_id || seq_no || leaf_hash || coalesce(record_id, '-') || kind_name || coalesce(application_id, '-') || coalesce(signer_id, '-') || coalesce(department_name, '-') || coalesce(document_type, '-') || coalesce(campus_name, '-') || signed_at_us || bound_us || status_code || created_by || created_at`
	query := func(statement string) string {
		t.Helper()
		db := c.Open(t, name)
		defer db.Close()
		var out string
		if err := db.QueryRowContext(t.Context(), statement).Scan(&out); err != nil {
			t.Fatalf("%s: %v", statement, err)
		}
		return out
	}
	west := `SELECT md5(string_agg(` + columns + `, '|' ORDER BY seq_no)) FROM yj_record WHERE node_id = 'binhai-1' AND seq_no <= ` + query(`SELECT MAX(seq_no) FROM yj_record`)
	had := query(west)

	m := withPostgres(t, c, name)
	configure(t, m.dir, func(cfg *appliance.Config) { cfg.Database.Nodes = []string{"binhai-1"} }) // counts from the next start on
	configure(t, m.dir, quick)
	his := m.register(t, "his", "--consent", "app-asserted")
	signs(t, his, "first", 5)
	signs(t, m.register(t, "try", "--consent", "app-asserted", "--test"), "test", 2)
	shipped := func() bool { return m.state(t).Projection.Lag == 0 }
	eventually(t, time.Minute, "everything is shipped", shipped)
	// A sweep remembers how far the database is. This one names the other appliance's rows: it does not know of it yet.
	if o := refused(t, 1, nil, "db", "sweep", "--dir", m.dir); !strings.Contains(o.stdout, "row-foreign") {
		t.Errorf("sweep: %v", o)
	}
	m.stop(t)

	// 1. The last row of this node becomes that of another entry.
	c.Exec(t, name, `UPDATE yj_record SET leaf_hash = repeat('0', 64) WHERE node_id = 'benbu-1' AND seq_no = (SELECT MAX(seq_no) FROM yj_record WHERE node_id = 'benbu-1')`)
	m = serve(t, m.dir)
	m.trusted(t)
	his = m.client(t, "his")
	eventually(t, time.Minute, "the fork is found", func() bool { return m.state(t).Projection.Fork })
	m.raises(t, alarm.Fork)
	signs(t, his, "forked", 1)
	seen := map[string]string{"status": mustRun(t, "status", "--dir", m.dir).stdout}
	state, err := his.State(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	seen["/health/state"] = string(state)
	metrics := func() string {
		return command(t, nil, "curl", "-sS", "--unix-socket", m.ends.Admin, "http://yinjian/metrics").stdout
	}
	seen["/metrics"] = metrics()
	for where, word := range map[string]string{"status": "分叉告警", "/health/state": `"fork":true`, "/metrics": "yinjian_projection_fork 1"} {
		if !strings.Contains(seen[where], word) {
			t.Errorf("%s does not say %q: %s", where, word, seen[where])
		}
	}
	if m.state(t).Projection.Lag == 0 {
		t.Error("over a fork something was shipped")
	}

	// 2. Nothing is replaced that was not named, nor made of a journal that is not there.
	rebuild := func(args ...string) []string {
		return append([]string{"db", "rebuild", "--dir", m.dir, "--reason", "测试"}, args...)
	}
	before := query(`SELECT COUNT(*) FROM yj_record`)
	refused(t, 2, []string{"reason"}, "db", "rebuild", "--dir", m.dir)
	refused(t, 1, []string{"exists", "--replace benbu-1"}, rebuild()...)
	refused(t, 1, []string{"invalid_request", "binhai-1"}, rebuild("--replace", "binhai-1")...)
	refused(t, 1, []string{"invalid_request", "binhai-1"}, rebuild("--replace", "benbu-1", "--remove", "binhai-1")...)
	refused(t, 1, []string{"invalid_request", "log.pem"}, rebuild("--replace", "benbu-1", "--journal", tempDir(t))...)
	eventually(t, time.Minute, "the fork is found again", func() bool { return m.state(t).Projection.Fork })
	if query(`SELECT COUNT(*) FROM yj_record`) != before {
		t.Error("a refused rebuild changed something")
	}
	if o := mustRun(t, rebuild("--replace", "benbu-1")...); !strings.Contains(o.stdout, "与日志一致") {
		t.Errorf("rebuild: %v", o)
	}
	m.mustBeClean(t)
	m.clears(t, alarm.Fork)
	eventually(t, time.Minute, "metrics say that all is shipped, the alarm's end too", func() bool {
		out := metrics()
		return strings.Contains(out, "yinjian_projection_fork 0") && strings.Contains(out, "yinjian_projection_lag_entries 0")
	})
	mustRun(t, "db", "sweep", "--dir", m.dir)

	// 3. The tables are gone, both nodes' rows with them.
	c.Exec(t, name, `DROP TABLE yj_record, yj_batch, yj_change, yj_set_root`)
	signs(t, his, "dropped", 1)
	eventually(t, time.Minute, "the lack is noticed", func() bool {
		return !shipped() && strings.Contains(mustRun(t, "status", "--dir", m.dir).stdout, "库不合用")
	})
	refused(t, 1, []string{"exists", "--replace benbu-1"}, rebuild()...)
	broken := filepath.Join(tempDir(t), "copy")
	if err := os.CopyFS(broken, os.DirFS(gone.dir)); err != nil {
		t.Fatal(err)
	}
	whole := gone.dir
	changeByte(t, filepath.Join(broken, "journal"), "progress-note")
	refused(t, 1, []string{"invalid_request", "cannot be used"}, rebuild("--replace", "benbu-1", "--journal", broken)...)
	if o := mustRun(t, rebuild("--replace", "benbu-1", "--journal", whole)...); strings.Count(o.stdout, "与日志一致") != 2 {
		t.Errorf("rebuild: %v", o)
	}
	m.mustBeClean(t)
	if got := query(west); got != had {
		t.Errorf("the rows of the appliance that is no more: %s, want %s", got, had)
	}
	today := time.Now().In(time.FixedZone("", 8*3600)) // or yesterday, by now
	if o := mustRun(t, "db", "compare", "--dir", m.dir); !strings.Contains(o.stdout, "binhai-1") ||
		!strings.Contains(o.stdout, today.Format(time.DateOnly)) && !strings.Contains(o.stdout, today.AddDate(0, 0, -1).Format(time.DateOnly)) {
		t.Errorf("compare has no line for the other node's day: %v", o)
	}

	// 4. The year's report, against the database's own counting.
	eventually(t, time.Minute, "everything is shipped", shipped)
	file := filepath.Join(tempDir(t), "year.csv")
	year := time.Now().In(time.FixedZone("", 8*3600)).Year()
	o := mustRun(t, "db", "report", "--dir", m.dir, "--year", fmt.Sprint(year), "--csv", file)
	if !strings.Contains(o.stdout, "合计 total: 10 份；测试 2 份未计入") {
		t.Errorf("report: %v", o)
	}
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	lines, err := csv.NewReader(strings.NewReader(strings.TrimPrefix(string(b), "\xef\xbb\xbf"))).ReadAll()
	if err != nil || len(lines) < 3 || !slices.Equal(lines[0], []string{"月份", "院区", "应用", "文书类型", "科室", "状态", "份数"}) {
		t.Fatalf("%v, %v", lines, err)
	}
	want := query(`SELECT string_agg(one, chr(10) ORDER BY one COLLATE "C") FROM (SELECT to_char(to_timestamp(signed_at_us / 1000000) AT TIME ZONE 'UTC' + interval '8 hours', 'YYYY-MM') || ',' || campus_name || ',' || application_id || ',' || document_type || ',' || department_name || ',有效,' || COUNT(*) AS one
		FROM yj_record WHERE kind_name = 'sign.v1' AND status_code = 'recorded' GROUP BY to_char(to_timestamp(signed_at_us / 1000000) AT TIME ZONE 'UTC' + interval '8 hours', 'YYYY-MM'), campus_name, application_id, document_type, department_name) AS lines`)
	var got []string
	for _, l := range lines[1:] {
		got = append(got, strings.Join(l, ","))
	}
	slices.Sort(got)
	if strings.Join(got, "\n") != want {
		t.Errorf("report\n%s\nwant\n%s", strings.Join(got, "\n"), want)
	}
	if o := mustRun(t, "db", "report", "--dir", m.dir, "--year", fmt.Sprint(year-1)); !strings.Contains(o.stdout, "合计 total: 0 份") {
		t.Errorf("the year before: %v", o)
	}
	m.stop(t)
}

// TestRebuildKilled: the appliance is killed while it fills the database. Until the same command has gone on to the end,
// everybody who looks is told that the database is not whole.
func TestRebuildKilled(t *testing.T) {
	t.Parallel()
	c := dbtest.StartPostgres(t)
	name := c.Fresh(t)
	m := withPostgres(t, c, name)
	his := m.register(t, "his", "--consent", "app-asserted")
	signs(t, his, "before", 5)
	eventually(t, time.Minute, "everything is shipped", func() bool { return m.state(t).Projection.Lag == 0 })
	c.Exec(t, name, `UPDATE yj_record SET signer_id = 'D9999' WHERE signer_id = 'D1001'`)
	c.Exec(t, name, `CREATE FUNCTION slow_down() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(5); RETURN NEW; END'`)
	c.Exec(t, name, `CREATE TRIGGER slow_down BEFORE INSERT ON yj_record FOR EACH STATEMENT EXECUTE FUNCTION slow_down()`)
	phase := func() (phase string) {
		db := c.Open(t, name)
		defer db.Close()
		if err := db.QueryRowContext(t.Context(), `SELECT coalesce(max(phase_name), '') FROM yj_rebuild WHERE node_id = 'benbu-1'`).Scan(&phase); err != nil {
			t.Fatal(err)
		}
		return phase
	}
	rebuild := []string{"db", "rebuild", "--dir", m.dir, "--reason", "测试"}
	ended := make(chan outcome)
	go func() { ended <- yinjian(t, append(rebuild, "--replace", "benbu-1")...) }()
	eventually(t, time.Minute, "it fills", func() bool { return phase() == "filling" })
	if !strings.Contains(mustRun(t, "status", "--dir", m.dir).stdout, "正在重建") {
		t.Error("the status does not say that it is being rebuilt")
	}
	refused(t, 1, []string{"not_ready"}, append(rebuild, "--replace", "benbu-1")...) // one at a time
	signs(t, his, "meanwhile", 1)
	m.kill(t)
	if o := <-ended; o.code != 1 {
		t.Errorf("the command ended with %v", o)
	}
	if phase() != "filling" {
		t.Errorf("phase %q after the kill", phase())
	}
	c.Exec(t, name, `DROP TRIGGER slow_down ON yj_record`)
	m = serve(t, m.dir)
	m.trusted(t)
	eventually(t, time.Minute, "the status says that the rebuild is not finished", func() bool {
		return strings.Contains(mustRun(t, "status", "--dir", m.dir).stdout, "没有完成")
	})
	eventually(t, time.Minute, "everything is shipped", func() bool { return m.state(t).Projection.Lag == 0 })
	if o := refused(t, 1, nil, "db", "compare", "--dir", m.dir); !strings.Contains(o.stdout, "rebuild-unfinished") {
		t.Errorf("compare: %v", o)
	}
	if o := mustRun(t, rebuild...); !strings.Contains(o.stdout, "与日志一致") {
		t.Errorf("gone on with: %v", o)
	}
	m.mustBeClean(t)
	if phase() != "" {
		t.Errorf("phase %q at the end", phase())
	}
	m.stop(t)
}

// changeByte changes a byte of a text in a journal's files.
func changeByte(t *testing.T, journal, text string) {
	t.Helper()
	files, _ := filepath.Glob(filepath.Join(journal, "*.db")) // the pattern is well-formed
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		if i := strings.Index(string(b), text); i >= 0 {
			b[i] ^= 1
			if err := os.WriteFile(f, b, 0o600); err != nil {
				t.Fatal(err)
			}
			return
		}
	}
	t.Fatalf("%q is not in %v", text, files)
}

package main_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"yinjian/api/client"
	"yinjian/appliance"
	"yinjian/appliance/audit"
	"yinjian/dbdriver/dbtest"
)

// later has the time server and, as two persons say, the appliance jump ahead, and answers the client that lives then.
func (m *machine) later(t *testing.T, server *timeServer, ahead time.Duration, app string) *client.Client {
	t.Helper()
	server.ahead.Store(int64(ahead))
	eventually(t, time.Minute, "the jump is seen", func() bool {
		return strings.Contains(yinjian(t, "time", "status", "--dir", m.dir).stdout, "yinjian time readmit")
	})
	mustRun(t, "time", "readmit", "--dir", m.dir, "--reason", "测试", "--confirmed-by", "甲", "--confirmed-by", "乙")
	m.trusted(t)
	a := m.admin()
	defer a.Close()
	if _, err := a.IssueCRL(t.Context()); err != nil { // the last one has ended
		t.Fatal(err)
	}
	cfg := m.clientConfig(t, app)
	cfg.Clock = func() time.Time { return time.Now().Add(ahead) }
	c, err := client.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// Rows of closed months are moved, by hand and by themselves; the comparison, the sweep, a rebuild and the year's report say
// the same before and after.
func TestArchive(t *testing.T) {
	t.Parallel()
	c := dbtest.StartPostgres(t)
	name := c.Fresh(t)
	server := startTimeServer(t)
	dir := initAppliance(t, server)
	configure(t, dir, func(cfg *appliance.Config) { cfg.Database.DSN = c.DSN(name) })
	m := serve(t, dir)
	m.trusted(t)
	m.enrol(t, "D1001", "")
	begun := time.Now().In(audit.Beijing)
	signs(t, m.register(t, "his", "--consent", "app-asserted"), "first", 5)
	const ahead = 70 * 24 * time.Hour // two months at the least
	his := m.later(t, server, ahead, "his")
	signs(t, his, "second", 2)
	month := time.Now().Add(ahead).In(audit.Beijing).Format("2006-01")
	next := time.Now().Add(ahead).In(audit.Beijing).AddDate(0, 0, 62).Format("2006-01")
	db := c.Open(t, name)
	defer db.Close()
	count := func(table string) (n uint64) {
		t.Helper()
		if err := db.QueryRowContext(t.Context(), `SELECT COUNT(*) FROM `+table+` WHERE signed_at_us > 0 AND signed_at_us < $1`, begun.Add(24*time.Hour).UnixMicro()).Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	// What people are told of the first two days and of the signatures.
	told := func() (out []string) {
		t.Helper()
		eventually(t, time.Minute, "everything is shipped", func() bool { return m.state(t).Projection.Lag == 0 })
		var r audit.CompareReport
		if err := json.Unmarshal([]byte(mustRun(t, "db", "compare", "--dir", dir, "-o", "json").stdout), &r); err != nil || !r.OK() {
			t.Errorf("compare: %+v, %v", r, err)
		}
		for _, d := range r.Days {
			if d.Day > "2000" && d.Day <= begun.AddDate(0, 0, 1).Format(time.DateOnly) {
				out = append(out, fmt.Sprintf("%+v", d))
			}
		}
		if o := mustRun(t, "db", "sweep", "--dir", dir); !strings.Contains(o.stdout, "未发现改动") {
			t.Errorf("sweep: %s", o.stdout)
		}
		for year := begun.Year(); year <= begun.Add(ahead).Year(); year++ {
			var y appliance.YearReport
			if err := json.Unmarshal([]byte(mustRun(t, "db", "report", "--dir", dir, "--year", fmt.Sprint(year), "-o", "json").stdout), &y); err != nil {
				t.Fatal(err)
			}
			out = append(out, fmt.Sprintf("%d %+v", year, y.Rows))
		}
		return out
	}
	want := told()
	if all := strings.Join(want, "\n"); !strings.Contains(all, "recorded Records:5}") || !strings.Contains(all, "recorded Records:2}") {
		t.Fatalf("before anything:\n%s", all)
	}
	same := func(what string) {
		t.Helper()
		if got := told(); !slices.Equal(got, want) {
			t.Errorf("%s: people are told\n%s\nwant\n%s", what, strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	}
	rows := count("yj_record")
	archive := []string{"db", "archive", "--dir", dir, "--before", month}
	refused(t, 2, []string{"--reason"}, archive...)
	refused(t, 1, []string{"invalid_request", "before"}, "db", "archive", "--dir", dir, "--before", next, "--dry-run")
	refused(t, 1, []string{"invalid_request", "before"}, "db", "archive", "--dir", dir, "--before", "2026", "--dry-run")
	if o := mustRun(t, append(archive, "--dry-run")...); !strings.Contains(o.stdout, begun.Format("2006-01")) || count("yj_record") != rows || count("yj_record_archive") != 0 {
		t.Errorf("dry run of %d rows: %s", rows, o.stdout)
	}

	if o := mustRun(t, append(archive, "--reason", "年度归档")...); count("yj_record") != 0 || count("yj_record_archive") != rows {
		t.Errorf("%d rows in use and %d in the archive, want all %d there: %s", count("yj_record"), count("yj_record_archive"), rows, o)
	}
	same("archived")
	noted := entries(t, dir, "projection.archive/intent", "projection.archive/outcome")
	if len(noted) != 2 || noted[0].Text("reason") != "年度归档" || noted[0].Text("before") != month || noted[0].Field("rows.in_use") != audit.Int(rows) || noted[0].Actor != noted[1].Actor ||
		!strings.HasPrefix(noted[0].Actor, "local uid=") || noted[1].Text("result") != "done" || noted[1].Field("rows.moved").(audit.Int) < audit.Int(rows) || noted[1].Field("rows.in_use") != audit.Int(0) {
		t.Errorf("the journal says %+v", noted)
	}
	// What is signed again is the same record, though its row is in the archive.
	again, err := his.Sign(t.Context(), "first-0", asserted("D1001", "first-0"))
	if p := new(client.Problem); err != nil && !errors.As(err, &p) {
		t.Errorf("the first signature's key again: %+v, %v", again, err)
	}

	// A rebuild takes the archive's rows, too, and makes each once; then they are moved by themselves.
	mustRun(t, "db", "rebuild", "--dir", dir, "--reason", "测试", "--replace", "benbu-1")
	if count("yj_record") != rows || count("yj_record_archive") != 0 {
		t.Errorf("after a rebuild %d rows are in use and %d in the archive, want %d and none", count("yj_record"), count("yj_record_archive"), rows)
	}
	same("rebuilt")
	m.stop(t)
	configure(t, dir, func(cfg *appliance.Config) { cfg.Database.ArchiveAfterMonths = 1 })
	m = serve(t, dir)
	eventually(t, time.Minute, "rows are moved without a command", func() bool { return count("yj_record_archive") == rows })
	same("moved by itself")
	if noted := entries(t, dir, "projection.archive/intent"); noted[len(noted)-1].Actor != "appliance" {
		t.Errorf("the journal says %+v", noted)
	}

	// Somebody put a row back: it is named, and stands in the way of nothing else.
	c.Exec(t, name, `INSERT INTO yj_record SELECT * FROM yj_record_archive WHERE seq_no = (SELECT MAX(seq_no) FROM yj_record_archive)`)
	for _, args := range [][]string{{"db", "compare"}, {"db", "sweep"}} {
		if o := refused(t, 1, nil, append(args, "--dir", dir)...); !strings.Contains(o.stdout, "两份") {
			t.Errorf("%v: %s", args, o.stdout)
		}
	}
	refused(t, 1, []string{"exists", "db sweep"}, append(archive, "--reason", "测试")...)
}

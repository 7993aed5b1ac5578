package main_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance"
	"yinjian/appliance/alarm"
	"yinjian/dbdriver/dbtest"
)

func (m *machine) directory(t *testing.T) (s wire.DirectoryStatus) {
	t.Helper()
	o := mustRun(t, "directory", "status", "--dir", m.dir, "-o", "json")
	if err := json.Unmarshal([]byte(o.stdout), &s); err != nil {
		t.Fatalf("%v: %v", err, o)
	}
	return s
}

// refusal is the code of an administrator's refusal; "" for what was done.
func refusal(t *testing.T, err error) string {
	t.Helper()
	var p *client.Problem
	if err != nil && !errors.As(err, &p) {
		t.Fatal(err)
	}
	if p == nil {
		return ""
	}
	return p.Code
}

// Administrators of both campuses change the same people at the same time; the database goes away, is changed behind our
// backs, and comes back; an appliance is killed meanwhile. Both directories are the same in the end, with each version once.
func TestCampusAdministration(t *testing.T) {
	t.Parallel()
	l := newLand(t)
	pg := dbtest.StartPostgres(t)
	database := pg.Fresh(t)
	a, b := newCampus(t, l, 0, pg.DSN(database), quick), newCampus(t, l, 1, pg.DSN(database), quick)
	ends := [2]*campus{a, b}
	for i, c := range ends {
		c.serve(t)
		c.register(t, [2]string{"his", "emr"}[i], "--consent", "app-asserted")
		c.enrol(t, [2]string{"A", "B"}[i]+"1001", "")
	}
	pairUp(t, a.machine, b.machine)
	same := func() bool {
		versions := func(m *machine) string {
			return mustRun(t, "directory", "versions", "--dir", m.dir, "-o", "json").stdout
		}
		for _, c := range ends {
			if s := c.directory(t); len(s.Frozen)+len(s.Waiting)+len(s.Open)+len(s.Blocked) > 0 || s.Centre != "" || s.Peer == "" {
				return false
			}
		}
		return versions(a.machine) == versions(b.machine)
	}
	eventually(t, time.Minute, "both directories are the same", same)

	// 1. The same two people, from both sides at once.
	var done [2]int
	var wg sync.WaitGroup
	for i, c := range ends {
		wg.Go(func() {
			admin := c.admin()
			defer admin.Close()
			for n := range 12 {
				id := []string{"A1001", "B1001"}[n%2]
				var err error
				if n%3 == 0 {
					_, err = admin.StopSigner(t.Context(), wire.Decision{ID: id, Reason: fmt.Sprint(n)})
				} else {
					_, err = admin.StartSigner(t.Context(), wire.Decision{ID: id, Reason: fmt.Sprint(n)})
				}
				switch code := refusal(t, err); code {
				case "":
					done[i]++
				case "directory_conflict", "directory_behind":
				default:
					t.Errorf("%s: %v", c.place, err)
				}
			}
		})
	}
	wg.Wait()
	if done[0] == 0 || done[1] == 0 {
		t.Errorf("%v changes were made", done)
	}
	eventually(t, time.Minute, "both directories are the same", same)

	// Each checks the decisions that it wrote, by its own key.
	touch := func(sign string) {
		pg.Exec(t, database, `UPDATE yj_decision SET modified_at = modified_at `+sign+` 1 WHERE created_by = 'benbu-1' AND intent_id = (SELECT MAX(intent_id) FROM yj_decision WHERE created_by = 'benbu-1' AND row_mac IS NOT NULL)`)
	}
	clean := func(c *campus) {
		t.Helper()
		if o := mustRun(t, "db", "sweep", "--dir", c.dir); !strings.Contains(o.stdout, "未发现改动") {
			t.Errorf("%s: %s", c.place, o.stdout)
		}
	}
	clean(a)
	touch("+")
	if o := refused(t, 1, nil, "db", "sweep", "--dir", a.dir); !strings.Contains(o.stdout, "row-mac-wrong") || !strings.Contains(o.stdout, "yj_decision") {
		t.Errorf("a decision that was changed: %s", o.stdout)
	}
	clean(b)
	touch("-")

	// 2. Without the database nothing is changed, and signing goes on; what was killed meanwhile starts and signs.
	for _, id := range []string{"A1001", "B1001"} {
		mustRun(t, "signer", "start", id, "--dir", a.dir, "--reason", "复工")
	}
	eventually(t, time.Minute, "both directories are the same", same)
	his := a.client(t, "his")
	pg.Kill()
	for _, c := range ends {
		if o := yinjian(t, "signer", "stop", "A1001", "--dir", c.dir, "--reason", "x"); o.code == 0 || !strings.Contains(o.stderr, "centre_unavailable") {
			t.Errorf("a change without the database: %v", o)
		}
	}
	a.kill(t)
	a.serve(t)
	his = a.client(t, "his")
	if code := codeOf(t, his, "A1001", "away"); code != "" {
		t.Errorf("signing without the database: %s", code)
	}
	if s := b.directory(t); s.Centre == "" {
		t.Errorf("status does not say that the centre is away: %+v", s)
	}
	pg.Start(t)
	eventually(t, 2*time.Minute, "both directories are the same", same)

	// 3. A row that nobody's change stands behind.
	pg.Exec(t, database, fmt.Sprintf(`INSERT INTO yj_decision (object_kind, object_id, version_no, node_id, epoch_id, intent_id, body_sm3, decided_at, created_by, created_at, modified_by, modified_at) VALUES ('application', 'his', 9, 'benbu-1', '0123456789abcdef', '%s', '%s', 1, 'dba', 1, 'dba', 1)`, strings.Repeat("ab", 32), strings.Repeat("cd", 32)))
	for _, c := range ends {
		if o := refused(t, 1, nil, "db", "sweep", "--dir", c.dir); !strings.Contains(o.stdout, "row-foreign") || !strings.Contains(o.stdout, `"dba"`) {
			t.Errorf("a decision by nobody: %s", o.stdout)
		}
		if o := yinjian(t, "app", "stop", "his", "--dir", c.dir, "--reason", "x"); o.code == 0 || !strings.Contains(o.stderr, "directory_behind") {
			t.Errorf("a change of what somebody wrote into the database: %v", o)
		}
		if s := c.directory(t); len(s.Blocked) != 1 || s.Blocked[0].ID != "his" || s.Blocked[0].Node != "benbu-1" || s.Blocked[0].Latest != 9 {
			t.Errorf("status: %+v", s)
		}
	}
	if code := codeOf(t, his, "A1001", "forged"); code != "" {
		t.Errorf("signing beside a forged row: %s", code)
	}
	skip := []string{"directory", "skip", "--kind", "application", "--id", "his", "--reason", "查无此变更", "--dir"}
	if o := yinjian(t, append(skip, b.dir)...); o.code == 0 || !strings.Contains(o.stderr, "forbidden") {
		t.Errorf("skipped where nobody can know: %v", o)
	}
	mustRun(t, append(skip, a.dir)...)
	a.changeOf(t, "/admin/v1/directory/skip", "account.filled/outcome", "his", `"version":1`, `"version":9`)
	eventually(t, time.Minute, "both directories are the same", same)
	mustRun(t, "app", "stop", "his", "--dir", b.dir, "--reason", "合同到期")
	eventually(t, time.Minute, "both directories are the same", same)
	if code := codeOf(t, his, "A1001", "stopped"); code != "application_stopped" {
		t.Errorf("an application that was stopped at the other campus: %q", code)
	}

	// 4. What was changed while the pairing was ended is a fork where it was decided on before. An administrator thaws it there.
	mustRun(t, "peer", "remove", "--dir", a.dir, "--reason", "中心库停", "--confirmed-by", "张三", "--confirmed-by", "李四")
	mustRun(t, "signer", "stop", "A1001", "--dir", a.dir, "--reason", "失卡")
	file, print := b.card(t)
	a.believe(t, file, print)
	eventually(t, time.Minute, "the other campus freezes it", func() bool { return len(b.directory(t).Frozen) == 1 })
	b.raises(t, alarm.DirectoryFrozen)
	mustRun(t, "directory", "thaw", "--kind", "signer", "--id", "A1001", "--reason", "核实", "--dir", b.dir)
	b.changeOf(t, "/admin/v1/directory/thaw", "account.signer/outcome", "A1001", `"stopped":false`, `"stopped":true`)
	b.clears(t, alarm.DirectoryFrozen)
	eventually(t, time.Minute, "both directories are the same", same)
	for _, c := range ends {
		mustRun(t, "signer", "start", "A1001", "--dir", c.dir, "--reason", "补卡")
		eventually(t, time.Minute, "both directories are the same", same)
	}

	// 5. A configuration without the line does not end the pairing.
	b.stop(t)
	configure(t, b.place, func(cfg *appliance.Config) { cfg.Listen.Peer, cfg.Peer.Address = "", "" })
	b.serve(t)
	if s := b.directory(t); s.Peer == "" {
		t.Errorf("without a line to the other campus: %+v", s)
	}
	eventually(t, time.Minute, "the centre answers", func() bool { return b.directory(t).Centre == "" })
	mustRun(t, "signer", "stop", "A1001", "--dir", a.dir, "--reason", "离职")
	if o := yinjian(t, "signer", "start", "A1001", "--dir", b.dir, "--reason", "x"); o.code == 0 || !strings.Contains(o.stderr, "directory_behind") {
		t.Errorf("a change beside the other campus's: %v", o)
	}
	eventually(t, time.Minute, "the state says that a stop does not come", func() bool { return strings.Contains(strings.Join(b.state(t).Warnings, "\n"), "一直没有收到") })
	b.stop(t)
	configure(t, b.place, func(cfg *appliance.Config) { cfg.Listen.Peer = a.land.peer(1) + ":8445" })
	b.serve(t)
	eventually(t, time.Minute, "both directories are the same", same)

	// 6. The table is made anew from either journal.
	rows := pg.Exec(t, database, `DELETE FROM yj_decision WHERE object_kind <> 'spent' AND intent_id <> '`+strings.Repeat("ab", 32)+`'`)
	mustRun(t, "db", "rebuild", "--dir", b.dir, "--replace", "binhai-1", "--reason", "试验")
	if again := pg.Exec(t, database, `UPDATE yj_decision SET modified_by = 'test' WHERE object_kind <> 'spent' AND intent_id <> '`+strings.Repeat("ab", 32)+`'`); again != rows {
		t.Errorf("%d decisions were made anew, want %d", again, rows)
	}
	eventually(t, time.Minute, "both directories are the same", same)

	// 7. What the database loses is put back without anybody's doing.
	lost := pg.Exec(t, database, `DELETE FROM yj_decision WHERE object_kind = 'signer' AND object_id = 'A1001'`)
	eventually(t, time.Minute, "the last decision on a signer is put back", func() bool {
		return pg.Exec(t, database, `UPDATE yj_decision SET modified_by = 'benbu-1' WHERE object_kind = 'signer' AND object_id = 'A1001'`) == 1
	})
	if lost < 2 {
		t.Errorf("%d decisions were deleted", lost)
	}
	for _, c := range ends {
		c.mustBeClean(t)
	}
}

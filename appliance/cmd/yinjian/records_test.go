package main_test

import (
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance"
	"yinjian/appliance/alarm"
)

// changes lists what was changed, once all of it has been shipped.
func (m *machine) changes(t *testing.T, flags ...string) []wire.Change {
	t.Helper()
	eventually(t, time.Minute, "everything is shipped", func() bool { return m.state(t).Projection.Lag == 0 })
	var out wire.Changes
	o := mustRun(t, append([]string{"change", "list", "--dir", m.dir, "--limit", "10000", "-o", "json"}, flags...)...)
	if err := json.Unmarshal([]byte(o.stdout), &out); err != nil {
		t.Fatal(err)
	}
	return out.Changes
}

// changeOf holds the newest change of a kind and object ("": any) against what an administrator did over a route: it says who,
// when, before and after. before and after are parts of the JSON; "" means that there is none.
func (m *machine) changeOf(t *testing.T, route, kind, object, before, after string) {
	t.Helper()
	all := m.changes(t, "--kind", kind)
	for _, c := range slices.Backward(all) {
		if c.Kind != kind || object != "" && c.Object != object {
			continue
		}
		fits := func(got, want string) bool { return (got == "") == (want == "") && strings.Contains(got, want) }
		if !strings.HasPrefix(c.Actor, fmt.Sprintf("local uid=%d", os.Getuid())) || c.Time == "" || c.MAC != "ok" || !fits(c.Before, before) || !fits(c.After, after) {
			t.Errorf("%s: %+v, want before %q and after %q", route, c, before, after)
		}
		return
	}
	t.Errorf("%s left no change of %s %s", route, kind, object)
}

// Each administrative route that changes something leaves who, when, what, before and after: those that change nothing are
// listed here, and every other is tried by a test that holds it against the change log.
func TestEveryAdministrativeRouteLeavesAChange(t *testing.T) {
	t.Parallel()
	nothing := map[string]string{
		"/admin/v1/audit/verify": "looks", "/admin/v1/compare": "looks", "/admin/v1/sweep": "looks; what it saw is journalled", "/admin/v1/changes": "looks",
		"/admin/v1/preserve/record": "looks", "/admin/v1/time/history": "looks", "/admin/v1/tsa/log": "looks", "/admin/v1/log/lines": "looks",
		"/admin/v1/log/file": "looks", "/admin/v1/reports/list": "looks", "/admin/v1/reports/read": "looks", "/admin/v1/settings/check": "looks",
		"/admin/v1/backups/:id/file": "carries out what was begun; its outcome is a route of its own",
		"/admin/v1/rebuild":          "rows are made again as the journals say; intent and outcome are journalled", "/admin/v1/reports/year": "looks",
		"/admin/v1/archive":         "rows move from one table to another, as they are; intent and outcome, with how many, are journalled",
		"/admin/v1/history/records": "records of older systems, each an entry and a row", "/admin/v1/history/totals": "counts them, journalled", "/admin/v1/history/record": "looks",
		"/admin/v1/assessments": "looks; intent, outcome and the report's digest are journalled",
		"/admin/v1/peer/card":   "shows public keys, journalled", "/admin/v1/signers/search": "looks", "/admin/v1/keys/search": "looks", "/admin/v1/certificates/search": "looks", "/admin/v1/records/search": "looks", "/admin/v1/records/:id/examine": "looks",
		"/admin/v1/login": "a session, journalled", "/admin/v1/login/challenge": "a number", "/admin/v1/logout": "a session, journalled",
		"/admin/v1/password":              "one's own, as a session alone can; TestAdministrators and account.TestPasswords",
		"/admin/v1/approvals/:id/approve": "the act itself leaves the change; the approval is journalled", "/admin/v1/approvals/:id/decline": "nothing is done; journalled",
		"/admin/v1/approvals/:id/confirm": "an answer is forgotten",
		"/admin/v1/stamps":                "a token, journalled as every token is", "/admin/v1/alarms/test": "sends a message",
		"/admin/v1/unlock": "journalled by the start that follows", "/admin/v1/provision": "there is no journal yet", "/admin/v1/start": "tries again",
	}
	routes := map[string]bool{}
	for _, file := range glob(t, filepath.Join("..", "..", "..", "api", "*.go")) {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		for _, found := range regexp.MustCompile(`e\.(POST|PUT|PATCH|DELETE)\("(/admin/v1/[^"]+)"`).FindAllStringSubmatch(readFile(t, file), -1) {
			routes[found[2]] = true
		}
	}
	tests := ""
	for _, file := range glob(t, "*_test.go") {
		tests += readFile(t, file)
	}
	for route := range routes {
		if tried := strings.Contains(tests, `.changeOf(t, "`+route+`"`); tried == (nothing[route] != "") {
			t.Errorf("%s: held against the change log by a test: %v; said to change nothing: %q", route, tried, nothing[route])
		}
	}
	for route := range nothing {
		if !routes[route] {
			t.Errorf("there is no %s", route)
		}
	}
	if len(routes) < 38 {
		t.Errorf("only %d routes were found", len(routes))
	}
}

func glob(t *testing.T, pattern string) []string {
	t.Helper()
	names, err := filepath.Glob(pattern)
	if err != nil || len(names) == 0 {
		t.Fatalf("%s: %q, %v", pattern, names, err)
	}
	return names
}

// What administrators do is in the change log; the database is gone through by its MACs, in the background too, and what was
// done to it is named over a restart.
func TestChangesAndSweep(t *testing.T) {
	t.Parallel()
	need(t, "openssl")
	clock := startTimeServer(t)
	dir := initAppliance(t, clock)
	configure(t, dir, func(c *appliance.Config) { c.Database.SweepEvery = appliance.Duration(time.Second) })
	configure(t, dir, quick)
	m := serve(t, dir)
	m.trusted(t)
	a := m.admin()
	defer a.Close()
	ctx := t.Context()

	his := m.register(t, "his", "--consent", "app-asserted")
	m.changeOf(t, "/admin/v1/applications", "account.application/outcome", "his", "", `"name":"测试 his"`)
	mustRun(t, "app", "limit", "his", "--dir", dir, "--rate", "77", "--reason", "扩容")
	m.changeOf(t, "/admin/v1/applications/:id/limits", "account.application/outcome", "his", `"version":1`, `"rate":77`)
	mustRun(t, "app", "production", "his", "--dir", dir, "--reason", "上线")
	m.changeOf(t, "/admin/v1/applications/:id/production", "account.application/outcome", "his", `"version":2`, `"production":true`)
	m.register(t, "old", "--consent", "app-asserted")
	mustRun(t, "app", "stop", "old", "--dir", dir, "--reason", "下线")
	m.changeOf(t, "/admin/v1/applications/:id/stop", "account.application/outcome", "old", `"stopped":false`, `"stopped":true`)

	m.enrol(t, "D1", "482913", "--algorithms", "SM2")
	m.changeOf(t, "/admin/v1/signers", "account.signer/outcome", "D1", "", `"department":"胸外科"`)
	mustRun(t, "signer", "add-key", "D1", "--dir", dir, "--algorithm", "RSA-2048")
	m.changeOf(t, "/admin/v1/signers/:id/keys", "account.signer/outcome", "D1", `"keys":[`, "/RSA-2048")
	mustRun(t, "signer", "set-pin", "D1", "--dir", dir, "--pin-file", pinFile(t, "739155"))
	m.changeOf(t, "/admin/v1/signers/:id/pin", "account.signer/outcome", "D1", `"pin":"sm3:`, `"pin":"sm3:`)
	mustRun(t, "signer", "stop", "D1", "--dir", dir, "--reason", "离职")
	m.changeOf(t, "/admin/v1/signers/:id/stop", "account.signer/outcome", "D1", `"stopped":false`, `"stopped":true`)
	mustRun(t, "signer", "start", "D1", "--dir", dir, "--reason", "返聘")
	m.changeOf(t, "/admin/v1/signers/:id/start", "account.signer/outcome", "D1", `"stopped":true`, `"stopped":false`)
	if _, err := a.ImportSigners(ctx, wire.ImportSigners{Signers: []wire.ImportSigner{{ID: "D7", Name: "王五", Department: "儿科", Campus: "本部", Algorithms: []string{"SM2"}}}}); err != nil {
		t.Fatal(err)
	}
	m.changeOf(t, "/admin/v1/signers/import", "account.signer/outcome", "D7", "", `"department":"儿科"`)

	serial := ""
	for _, c := range m.certificates(t) {
		if c.Owner == "signer:D7" {
			serial = c.Serial
		}
	}
	mustRun(t, "cert", "revoke", serial, "--dir", dir, "--reason", "keyCompromise")
	m.changeOf(t, "/admin/v1/certificates/:serial/revoke", "account.revocation/outcome", serial, `"status":"good"`, `"reason":"keyCompromise"`)
	if _, err := a.IssueCRL(ctx); err != nil {
		t.Fatal(err)
	}
	m.changeOf(t, "/admin/v1/crls", "ca.crl/outcome", "SM2", `"number":`, `"number":`)

	added, err := a.AddAnchor(ctx, wire.AddAnchor{Certificate: []byte(readFile(t, newHospitalCA(t, true).path("root.crt"))), Uses: []string{"staff"}})
	var anchor struct{ ID string }
	if err == nil {
		err = json.Unmarshal(added, &anchor)
	}
	if err == nil {
		_, err = a.WithdrawAnchor(ctx, wire.Decision{ID: anchor.ID, Reason: "误加"})
	}
	if err != nil {
		t.Fatal(err)
	}
	m.changeOf(t, "/admin/v1/anchors/:id/withdraw", "trust.anchor/outcome", anchor.ID, `"changed_at":`, `"withdrawn":true`)

	mustRun(t, "tsa", "stop", "--dir", dir, "--unit", "rsa", "--reason", "检修")
	m.changeOf(t, "/admin/v1/tsa/stop", "tsa.service", "", `{"rsa":"serving"}`, `{"rsa":"stopped"}`)
	mustRun(t, "tsa", "start", "--dir", dir, "--unit", "rsa", "--reason", "检修完毕")
	m.changeOf(t, "/admin/v1/tsa/start", "tsa.service", "", `{"rsa":"stopped"}`, `{"rsa":"serving"}`)
	second := startTimeServer(t)
	mustRun(t, "time", "sources", "add", "b", "--dir", dir, "--group", "lan-b", "--address", second.address, "--reason", "扩容")
	m.changeOf(t, "/admin/v1/time/sources", "time.source/outcome", "b", "", `"group":"lan-b"`)
	mustRun(t, "time", "sources", "remove", "b", "--dir", dir, "--reason", "拆除")
	m.changeOf(t, "/admin/v1/time/sources/:name/remove", "time.source/outcome", "b", second.address, "")
	// The timestamp worker is exchanged for one that asks the new sources: a signature meanwhile is to be tried again.
	var signed error
	eventually(t, time.Minute, "a signature", func() bool {
		_, signed = his.Sign(ctx, "one", asserted("D1", "one"))
		var p *client.Problem
		return !errors.As(signed, &p) || p.Code != "hsm_unavailable"
	})
	if signed != nil {
		t.Fatal(signed)
	}
	mustRun(t, "preserve", "run", "--dir", dir)
	m.changeOf(t, "/admin/v1/preserve/run", "preserve.archived", "", "", `count`)

	// For people, with the reason; and as a table.
	table := filepath.Join(t.TempDir(), "changes.csv")
	o := mustRun(t, "change", "list", "--dir", dir, "--object", "D1", "--csv", table)
	for _, words := range []string{"谁 who：local uid=", "为何 why：离职", `改前 before：{`, `"stopped":true`, "5 条 changes"} {
		if !strings.Contains(o.stdout, words) {
			t.Errorf("change list does not say %q: %s", words, o.stdout)
		}
	}
	if csv := readFile(t, table); strings.Count(csv, "account.signer/outcome") != 5 || strings.Contains(csv, "482913") || strings.Contains(csv, "739155") {
		t.Errorf("table: %s", csv)
	}
	if o := mustRun(t, "change", "list", "--dir", dir, "--since", "2020-01-01", "--until", "2020-01-02"); !strings.Contains(o.stdout, "0 条") {
		t.Errorf("of another time: %s", o.stdout)
	}
	refused(t, 2, []string{"--since"}, "change", "list", "--dir", dir, "--since", "昨天")
	m.mustBeClean(t)

	// The sweep: by hand, and in the background; its word is in the journal.
	if o := mustRun(t, "db", "sweep", "--dir", dir); !strings.Contains(o.stdout, "未发现改动") {
		t.Errorf("sweep: %s", o.stdout)
	}
	eventually(t, time.Minute, "the sweep in the background is journalled", func() bool { return len(entries(t, dir, "projection.swept")) > 2 })
	m.stop(t)
	central := filepath.Join(dir, "central.db")
	kept := readFile(t, central)
	db, err := sql.Open("sqlite3", central)
	if err == nil {
		_, err = db.Exec(`UPDATE yj_change SET reason_text = 'x' WHERE object_id = 'old' AND act_name = 'stop'`)
	}
	if err = errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
	m = serve(t, dir)
	m.trusted(t)
	if o := refused(t, 1, nil, "db", "sweep", "--dir", dir); !strings.Contains(o.stdout, "row-mac-wrong") || !strings.Contains(o.stdout, "reason_text") || !strings.Contains(o.stdout, "下线") {
		t.Errorf("sweep: %s", o.stdout)
	}
	if o := refused(t, 1, nil, "db", "compare", "--dir", dir); !strings.Contains(o.stdout, "yj_change") || !strings.Contains(o.stdout, "reason_text") {
		t.Errorf("compare: %s", o.stdout)
	}
	if o := mustRun(t, "change", "list", "--dir", dir, "--object", "old"); !strings.Contains(o.stdout, "✗ 该行被改动") {
		t.Errorf("change list: %s", o.stdout)
	}
	m.raises(t, alarm.DatabaseChanged)
	eventually(t, time.Minute, "the state warns", func() bool { return strings.Contains(strings.Join(m.state(t).Warnings, "\n"), "yinjian db sweep") })
	// Last week's copy of the whole database, while the appliance is away: it is fed again, and named.
	mustRun(t, "app", "limit", "his", "--dir", dir, "--rate", "78", "--reason", "再扩")
	m.changeOf(t, "/admin/v1/applications/:id/limits", "account.application/outcome", "his", `"rate":77`, `"rate":78`)
	yinjian(t, "db", "sweep", "--dir", dir)
	m.stop(t)
	for _, file := range []string{central + "-wal", central + "-shm", filepath.Join(dir, "run", "time.json")} {
		if err := os.Remove(file); err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(central, []byte(kept), 0o600); err != nil {
		t.Fatal(err)
	}
	clock.silent.Store(true) // what was seen is known before there is a time, as after a power cut
	m = serve(t, dir)
	told := func(words string) func() bool {
		return func() bool {
			b, err := os.ReadFile(m.log)
			return err == nil && strings.Contains(string(b), words)
		}
	}
	eventually(t, time.Minute, "the older copy is named", told("an older copy"))
	clock.silent.Store(false)
	m.mustBeClean(t)
	m.clears(t, alarm.DatabaseChanged)
	// The whole change log is removed, as if it had never been there.
	m.trusted(t)
	mustRun(t, "db", "sweep", "--dir", dir)
	m.stop(t)
	if db, err = sql.Open("sqlite3", central); err == nil {
		_, err = db.Exec(`DELETE FROM yj_change; DELETE FROM yj_set_root`)
	}
	if err = errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
	m = serve(t, dir)
	eventually(t, time.Minute, "that the change log was removed is named", told("the change log that the database had was removed"))
	m.mustBeClean(t)
}

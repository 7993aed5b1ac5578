package main_test

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"yinjian/appliance"
	"yinjian/dbdriver/check"
	"yinjian/dbdriver/dbtest"
)

// An appliance with a PostgreSQL server: the server is killed, frozen and back; signing does not notice, the state shows
// the lag, and in the end the database agrees with the journal. The server's acceptance is signed by the appliance.
func TestPostgresProjection(t *testing.T) {
	t.Parallel()
	c := dbtest.StartPostgres(t)
	name := c.Fresh(t)
	dir := initAppliance(t, startTimeServer(t))
	configure(t, dir, func(cfg *appliance.Config) { cfg.Database.DSN = c.DSN(name) })

	// Before the appliance has its tables there: the whole check.
	prefix := filepath.Join(t.TempDir(), "before")
	out := mustRun(t, "db", "check", "--dir", dir, "--out", prefix)
	if !strings.Contains(out.stdout, "未签名") || !strings.Contains(out.stdout, "通过 (passed)") {
		t.Errorf("db check = %s", out.stdout)
	}

	m := serve(t, dir)
	m.trusted(t)
	m.enrol(t, "D1001", "")
	his := m.register(t, "his", "--consent", "app-asserted")
	sign := func(key string) {
		t.Helper()
		if _, err := his.Sign(t.Context(), key, asserted("D1001", key)); err != nil {
			t.Fatalf("%s: %v", key, err)
		}
	}
	shipped := func() {
		t.Helper()
		eventually(t, 3*time.Minute, "the projection has everything", func() bool { return m.state(t).Projection.Lag == 0 })
		mustRun(t, "db", "compare", "--dir", dir)
	}
	sign("first")
	shipped()
	if warnings := strings.Join(m.state(t).Warnings, "\n"); !strings.Contains(warnings, "fsync = off") {
		t.Errorf("no warning names the doubtful setting: %s", warnings)
	}

	c.Kill()
	sign("down")
	eventually(t, time.Minute, "the state says that the database is away", func() bool {
		return m.state(t).Projection.Lag > 0
	})
	c.Start(t)
	sign("up-again")
	shipped()

	// What the database's owner changes is named.
	c.Exec(t, name, `UPDATE yj_record SET signer_id = 'D9999' WHERE signer_id = 'D1001'`)
	if o := refused(t, 1, nil, "db", "compare", "--dir", dir); !strings.Contains(o.stdout, "signer_id") || !strings.Contains(o.stdout, "D9999") {
		t.Errorf("compare does not name the change: %v", o)
	}

	// The report, stamped by the appliance, and verified without it.
	prefix = filepath.Join(t.TempDir(), "site")
	out = mustRun(t, "db", "check", "--dir", dir, "--out", prefix)
	if !strings.Contains(out.stdout, "site.tsr") || !strings.Contains(out.stdout, "不在使用中的库上试写") {
		t.Errorf("db check = %s", out.stdout)
	}
	if text, err := os.ReadFile(prefix + ".txt"); err != nil || string(text) != out.stdout {
		t.Errorf("the text in the file differs, %v", err)
	}
	var report check.Report
	b, err := os.ReadFile(prefix + ".json")
	if err == nil {
		err = json.Unmarshal(b, &report)
	}
	if err != nil || report.Database != "postgres" || !report.OK() || len(report.Modules) < 2 {
		t.Errorf("report = %s, %v", b, err)
	}
	m.stop(t)
	mustRun(t, "ts", "verify", "--anchors", dir, "--crls", dir, "--document", prefix+".json", prefix+".tsr")
	if err := os.WriteFile(prefix+".json", append(b, ' '), 0o600); err != nil {
		t.Fatal(err)
	}
	refused(t, 1, nil, "ts", "verify", "--anchors", dir, "--crls", dir, "--document", prefix+".json", prefix+".tsr")
}

// A database that does not fit, or whose password is wrong, does not keep the appliance from signing; the password is in
// no log and no state.
func TestUnfitDatabase(t *testing.T) {
	t.Parallel()
	c := dbtest.StartPostgres(t)
	c.Exec(t, "postgres", `CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0`)
	dir := initAppliance(t, startTimeServer(t))
	secret := make([]byte, 12)
	rand.Read(secret)
	password := hex.EncodeToString(secret)
	if err := os.WriteFile(filepath.Join(dir, "secrets", "db.password"), []byte(password+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	configure(t, dir, func(cfg *appliance.Config) {
		cfg.Database = appliance.Database{DSN: c.DSN("latin"), PasswordFile: "secrets/db.password"}
	})
	if o := refused(t, 1, nil, "db", "check", "--dir", dir); !strings.Contains(o.stdout, "server_encoding = LATIN1") {
		t.Errorf("the check does not name the setting: %v", o)
	}
	m := serve(t, dir)
	m.trusted(t)
	m.enrol(t, "D1001", "")
	if _, err := m.register(t, "his", "--consent", "app-asserted").Sign(t.Context(), "first", asserted("D1001", "first")); err != nil {
		t.Fatal(err)
	}
	a := m.admin()
	defer a.Close()
	var state []byte
	eventually(t, time.Minute, "the state says that the database is unfit", func() bool {
		b, err := a.State(context.WithoutCancel(t.Context()))
		state = b
		return err == nil && strings.Contains(string(b), "库不合用")
	})
	if strings.Contains(string(state), c.Run) || strings.Contains(string(state), "latin") {
		t.Errorf("the state shows where the database is: %s", state)
	}
	log, err := os.ReadFile(m.log)
	if err != nil || !strings.Contains(string(log), "server_encoding = LATIN1") || strings.Contains(string(log)+string(state), password) {
		t.Errorf("the log, %v:\n%s", err, log)
	}
	m.stop(t)
	configure(t, dir, func(cfg *appliance.Config) { cfg.Database.DSN = "postgres://u:" + password + "@127.0.0.1/x" })
	if out := refused(t, 1, []string{"database.dsn", "password_file"}, "serve", "--dir", dir); strings.Contains(out.stderr, password) {
		t.Errorf("the password is shown: %s", out.stderr)
	}
}

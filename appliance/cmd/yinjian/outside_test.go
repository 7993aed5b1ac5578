package main_test

import (
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"yinjian/api/client"
	"yinjian/appliance/audit"
	"yinjian/dbdriver/dbtest"
	"yinjian/hsm"
	"yinjian/hsm/hsmtest"
)

// Cipher machine and central database stand elsewhere and are known by the answers alone: nothing of either is in the
// appliance's folder, keys are in the machine, rows in the database, and a restart needs nobody.
func TestEverythingElsewhere(t *testing.T) {
	t.Parallel()
	var labels []string
	for _, class := range hsm.Classes {
		labels = append(labels, "hospital-"+string(class))
	}
	machine := hsmtest.NewDistant(t, built.binary, built.module, labels...)
	pg := dbtest.StartPostgres(t)
	database, ca := pg.Secure(t, "yinjian_app", "long-Enough_1", net.IPv4(127, 0, 0, 1))
	server := startTimeServer(t)
	dir := filepath.Join(tempDir(t), "a")
	read := func(name string) string {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	answers := fmt.Sprintf(`
node = "benbu-9"
time_sources = [%q]
[settings.time]
poll = "1s"
[settings.evaluation]
softtoken = false
[settings.hsm]
module_args = "address=%s credentials='%s/secrets/link-client.pem'"
[settings.database]
dsn = "postgres://yinjian_app@127.0.0.1:%d/%s?sslrootcert=%s/secrets/db-ca.pem"
password_file = "secrets/db.password"
`, server.address, machine.Address, dir, pg.Port, database, dir)
	for _, class := range hsm.Classes {
		answers += fmt.Sprintf("[settings.hsm.slots.%s]\ntoken_label = \"hospital-%s\"\npin_file = \"secrets/hospital.pin\"\n", class, class)
	}
	answers += fmt.Sprintf("[secrets]\n\"db.password\" = \"long-Enough_1\"\n\"hospital.pin\" = %q\n\"db-ca.pem\" = \"\"\"\n%s\"\"\"\n\"link-client.pem\" = \"\"\"\n%s\"\"\"\n", hsmtest.UserPIN, read(ca), read(machine.Credentials))
	file := filepath.Join(tempDir(t), "answers.toml")
	if err := os.WriteFile(file, []byte(answers), 0o600); err != nil {
		t.Fatal(err)
	}
	mustRun(t, "init", "--dir", dir, "--answers", file, "--check")
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Fatalf("--check left something: %v", err)
	}
	bad := filepath.Join(tempDir(t), "bad.toml")
	if err := os.WriteFile(bad, []byte(strings.Replace(answers, "password_file", "pasword_file", 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	refused(t, 2, []string{"settings", "database.pasword_file"}, "init", "--dir", dir, "--answers", bad, "--check")
	mustRun(t, "init", "--dir", dir, "--answers", file)
	for name, mode := range map[string]os.FileMode{"db.password": 0o600, "hospital.pin": 0o600, "link-client.pem": 0o600} {
		if st, err := os.Stat(filepath.Join(dir, "secrets", name)); err != nil || st.Mode().Perm() != mode {
			t.Errorf("%s: %v, %v", name, st, err)
		}
	}
	if text := read(filepath.Join(dir, "config.toml")); strings.Contains(text, "long-Enough_1") || strings.Contains(text, hsmtest.UserPIN) {
		t.Error("a secret stands in config.toml")
	}

	m := serve(t, dir)
	m.trusted(t)
	m.enrol(t, "D1001", "")
	his := m.register(t, "his", "--consent", "app-asserted")
	signs(t, his, "first", 3)
	m.kill(t)
	m = serve(t, dir)
	m.trusted(t)
	his = m.client(t, "his")
	eventually(t, 30*time.Second, "the replay guard's wait after a kill is over", func() bool {
		_, err := his.Certificate(t.Context(), "00")
		return !client.Is(err, "clock_skew")
	})
	signs(t, his, "second", 2)
	for _, name := range []string{"softtoken", "central.db"} {
		if _, err := os.Stat(filepath.Join(dir, name)); !os.IsNotExist(err) {
			t.Errorf("%s is in the appliance's folder: %v", name, err)
		}
	}

	// What stands outside, seen past our own code.
	if keys := machine.Tool(t, "hospital-staff", "--login", "--pin", hsmtest.UserPIN, "-O"); !strings.Contains(keys, "Private Key Object") {
		t.Errorf("the machine has no signer's key:\n%s", keys)
	}
	eventually(t, time.Minute, "everything is shipped", func() bool { return m.state(t).Projection.Lag == 0 })
	db, err := sql.Open("pgx", fmt.Sprintf("postgres://yinjian_app:long-Enough_1@127.0.0.1:%d/%s?sslmode=verify-full&sslrootcert=%s", pg.Port, database, ca))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	var rows int
	if err := db.QueryRowContext(context.WithoutCancel(t.Context()), `SELECT COUNT(*) FROM yj_record WHERE node_id = 'benbu-9' AND application_id = 'his'`).Scan(&rows); err != nil || rows != 5 {
		t.Errorf("%d rows of signatures, %v; want 5", rows, err)
	}
	var r audit.CompareReport
	if err := json.Unmarshal([]byte(mustRun(t, "db", "compare", "--dir", dir, "-o", "json").stdout), &r); err != nil || !r.OK() {
		t.Errorf("compare: %+v, %v", r, err)
	}
}

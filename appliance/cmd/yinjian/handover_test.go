package main_test

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"yinjian/appliance"
	"yinjian/dbdriver/dbtest"
)

// What is handed over is whole, signed, and has no secret in it, in no spelling, wherever one was put.
func TestHandover(t *testing.T) {
	t.Parallel()
	need(t, "openssl", "sha256sum")
	c := dbtest.StartPostgres(t)
	name := c.Fresh(t)
	dir := initAppliance(t, startTimeServer(t))
	const canary = "7QkCanary-in-the-config"
	password := filepath.Join(dir, "secrets", "db.password")
	if err := os.WriteFile(password, []byte("Canary-of-the-database\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	configure(t, dir, func(cfg *appliance.Config) {
		cfg.Database = appliance.Database{DSN: c.DSN(name), PasswordFile: "secrets/db.password"}
	})
	config := filepath.Join(dir, "config.toml")
	if err := os.WriteFile(config, []byte(readFile(t, config)+"\n# "+canary+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(tempDir(t), "移交")
	refused(t, 1, []string{"设备未在运行"}, "handover", "--dir", dir, "--out", out)
	m := serve(t, dir)
	m.trusted(t)
	m.register(t, "his", "--consent", "app-asserted")
	m.enrol(t, "D1", "482913")
	mustRun(t, "admin", "bootstrap", "--dir", dir, "--system", "zhang:张三:"+pinFile(t, "Xt-guanli-2026"), "--security", "li:李四:"+pinFile(t, "Aq-guanli-2026"), "--audit", "wang:王五:"+pinFile(t, "Sj-guanli-2026"))
	mustRun(t, "admin", "add", "zhao", "--dir", dir, "--name", "赵六", "--role", "operator", "--password-file", pinFile(t, "Mima-guanli-26"))
	mustRun(t, "admin", "stop", "zhao", "--dir", dir, "--reason", "调离")
	m.mustBeClean(t)
	refused(t, 2, []string{"--out"}, "handover", "--dir", dir)
	mustRun(t, "handover", "--dir", dir, "--out", out)
	refused(t, 1, []string{"须是新的"}, "handover", "--dir", dir, "--out", out)

	files := glob(t, filepath.Join(out, "*"))
	secrets := secretsOf(t, dir)
	secrets["PIN"], secrets["canary"], secrets["an administrator's password"] = "482913", canary, "Aq-guanli-2026"
	for _, file := range files {
		b := []byte(readFile(t, file))
		for what, secret := range secrets {
			raw, _ := hex.DecodeString(secret)
			for _, spelling := range [][]byte{[]byte(secret), []byte(base64.StdEncoding.EncodeToString([]byte(secret))), []byte(hex.EncodeToString([]byte(secret))), raw, []byte(base64.StdEncoding.EncodeToString(raw))} {
				if len(spelling) > 5 && bytes.Contains(b, spelling) {
					t.Errorf("%s has %s in it", filepath.Base(file), what)
				}
			}
		}
		for _, word := range []string{"PRIVATE KEY", `"key_salt"`, `"tag"`, `"wrapped"`} {
			if strings.Contains(string(b), word) {
				t.Errorf("%s has %s in it", filepath.Base(file), word)
			}
		}
	}
	has := func(file string, words ...string) {
		t.Helper()
		b := readFile(t, filepath.Join(out, file))
		for _, w := range words {
			if !strings.Contains(b, w) {
				t.Errorf("%s does not say %q", file, w)
			}
		}
	}
	has("applications.json", `"id": "his"`, `"rights"`)
	has("signers.json", `"D1"`)
	has("administrators.json", `"id": "li"`, `"role": "security"`, `"password_ends"`)
	if b := readFile(t, filepath.Join(out, "administrators.json")); strings.Count(b, `"stopped": true`) != 1 || strings.Count(b, `"id": "`) != 4 {
		t.Errorf("the administrators are %s", b)
	}
	has("keys.json", `"log/checkpoint"`)
	has("config.toml", "password_file", "min_sources")
	has("schema.sql", "CREATE TABLE yj_change (")
	has("data-dictionary.csv", "改前")
	has("database-rights.csv", "yj_record,SELECT", "SUPERUSER")
	has("versions.csv", "yinjian,"+appliance.Version, "github.com/emmansun/gmsm")
	has("README.md", "检查点", "administrators.json", "不要求登录")
	if o := command(t, nil, "sh", "-c", `cd "$1" && sha256sum -c --quiet SHA256SUMS && test $(wc -l < SHA256SUMS) -eq $(($(ls | wc -l) - 3))`, "sh", out); o.code != 0 {
		t.Errorf("SHA256SUMS: %v", o)
	}
	if o := command(t, nil, "sh", "-c", `cd "$1" && cut -d' ' -f3- SM3SUMS | while read -r f; do openssl dgst -sm3 -r "$f" | cut -c1-64 | tr '\n' ' '; echo " $f"; done | diff - SM3SUMS`, "sh", out); o.code != 0 {
		t.Errorf("SM3SUMS: %v", o)
	}
	// The tables that the statements make are those that the dictionary has.
	again := c.Fresh(t)
	db := c.Open(t, again)
	defer db.Close()
	if _, err := db.ExecContext(t.Context(), readFile(t, filepath.Join(out, "schema.sql"))); err != nil {
		t.Errorf("schema.sql: %v", err)
	}
	if o := refused(t, 1, nil, "db", "dictionary", "--diff", "--dsn", c.DSN(again)); strings.Contains(o.stdout, "类型不同") || strings.Contains(o.stdout, "缺少") || !strings.Contains(o.stdout, "说明不同") {
		t.Errorf("schema.sql makes: %v", o)
	}
	m.stop(t)
	sums := filepath.Join(out, "SM3SUMS")
	mustRun(t, "ts", "verify", "--anchors", dir, "--crls", dir, "--document", sums, sums+".tsr")
}

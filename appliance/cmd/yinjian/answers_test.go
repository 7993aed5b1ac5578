package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pelletier/go-toml/v2"

	"yinjian/appliance"
)

// outside are answers of a machine whose cipher machine and database are elsewhere.
func outside(t *testing.T) string {
	t.Helper()
	module := filepath.Join(t.TempDir(), "vendor.so")
	if err := os.WriteFile(module, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	text := fmt.Sprintf(`
node = "benbu-1"
time_sources = ["192.0.2.21:123", "192.0.2.22:123", "192.0.2.23:123"]
[settings.evaluation]
softtoken = false
[settings.hsm]
module = %q
profile = "softhsm2"
[settings.database]
dsn = "postgres://yinjian@192.0.2.40/yinjian"
password_file = "secrets/db.password"
archive_after_months = 24
[settings.time]
min_sources = 3
[settings.policy]
rate = 100
`, module)
	for _, class := range []string{"staff", "tsa", "log", "ca"} {
		text += fmt.Sprintf("[settings.hsm.slots.%s]\ntoken_label = \"hospital-%s\"\npin_file = \"secrets/%s.pin\"\n", class, class, class)
	}
	text += "[secrets]\n\"db.password\" = \"long enough\"\n"
	for _, class := range []string{"staff", "tsa", "log", "ca"} {
		text += fmt.Sprintf("\"%s.pin\" = \"pin of %s\"\n", class, class)
	}
	return text
}

// The settings reach the configuration that will be read, over what the other answers make, and nothing else changes.
func TestSettingsOfAnswers(t *testing.T) {
	t.Parallel()
	a, err := parseAnswers("answers.toml", []byte(outside(t)))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := a.check(dir); err != nil {
		t.Fatal(err)
	}
	module, err := a.module()
	if err != nil {
		t.Fatal(err)
	}
	text, got, err := a.file(module, dir)
	if err != nil {
		t.Fatal(err)
	}
	var plain answers
	if plain, err = parseAnswers("answers.toml", []byte("node = 'benbu-1'\ntime_sources = ['192.0.2.21:123', '192.0.2.22:123', '192.0.2.23:123']\n")); err != nil {
		t.Fatal(err)
	}
	_, want, err := plain.file(module, dir)
	if err != nil {
		t.Fatal(err)
	}
	slot := func(class string) appliance.Slot {
		return appliance.Slot{TokenLabel: "hospital-" + class, PINFile: filepath.Join(dir, "secrets", class+".pin"), Sessions: 8}
	}
	want.Evaluation.Softtoken = false
	want.HSM.Profile = "softhsm2"
	want.HSM.Slots = map[string]appliance.Slot{"staff": slot("staff"), "tsa": slot("tsa"), "log": slot("log"), "ca": slot("ca")}
	want.Database.DSN, want.Database.PasswordFile, want.Database.ArchiveAfterMonths = "postgres://yinjian@192.0.2.40/yinjian", filepath.Join(dir, "secrets", "db.password"), 24
	want.Time.MinSources, want.Time.PolicyNote = 3, ""
	want.Policy.Rate, want.Policy.Burst = 100, 200
	g, err := toml.Marshal(got)
	if err != nil {
		t.Fatal(err)
	}
	w, err := toml.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	if string(g) != string(w) {
		t.Errorf("%s\nmakes\n%s\nwant\n%s", text, g, w)
	}
	if strings.Contains(string(text), "long enough") || strings.Contains(string(text), "pin of") {
		t.Error("a secret stands in config.toml")
	}
}

// Whatever is wrong with a setting or a secret is named, and where it stands.
func TestFaultsOfSettings(t *testing.T) {
	t.Parallel()
	good := outside(t)
	for what, c := range map[string]struct {
		text  string
		words []string
	}{
		"unknown key":          {strings.Replace(good, "rate = 100", "speed = 100", 1), []string{"settings: ", "policy.speed", "未知的配置项"}},
		"unknown table":        {good + "[settings.colour]\nred = 1\n", []string{"settings: ", "colour", "未知的配置项"}},
		"wrong type":           {strings.Replace(good, "min_sources = 3", "min_sources = \"three\"", 1), []string{"settings: ", "min_sources"}},
		"wrong value":          {strings.Replace(good, "rate = 100", "rate = 0.5", 1), []string{"settings: ", "rate"}},
		"out of range":         {strings.Replace(good, "archive_after_months = 24", "archive_after_months = -1", 1), []string{"settings: database.archive_after_months"}},
		"too few sources":      {strings.Replace(good, "min_sources = 3", "min_sources = 4", 1), []string{"settings: time.min_sources"}},
		"a password in a DSN":  {strings.Replace(good, "yinjian@192", "yinjian:geheim@192", 1), []string{"settings: database.dsn"}},
		"a slot is missing":    {strings.Replace(good, "hsm.slots.tsa", "hsm.slots.other", 1), []string{"settings: hsm.slots.tsa"}},
		"node":                 {good + "[settings]\nnode = \"benbu-2\"\n", []string{"settings", "node"}},
		"who holds the PINs":   {strings.Replace(good, "[settings.hsm]\n", "[settings.hsm]\npin_source = \"unlock\"\n", 1), []string{"settings: hsm.pin_source"}},
		"of its own machine":   {"time_sources = ['192.0.2.21:123']\n[settings.hsm]\npin_source = \"unlock\"\n", []string{"settings: hsm.pin_source"}},
		"secret is missing":    {strings.Replace(good, "\"db.password\"", "\"db.passwort\"", 1), []string{"secrets: password_file", "db.password"}},
		"secret is empty":      {strings.Replace(good, "long enough", " ", 1), []string{"secrets: db.password"}},
		"secret leaves":        {good + "\"../config.toml\" = \"x\"\n", []string{"secrets: ../config.toml"}},
		"the appliance's file": {good + "\"tls.key\" = \"x\"\n", []string{"secrets: tls.key"}},
		"its own machine's":    {strings.Replace(good, "softtoken = false", "softtoken = true", 1), []string{"secrets: staff.pin"}},
		"no module":            {strings.Replace(good, "vendor.so", "absent.so", 1), []string{"module: ", "absent.so"}},
		"locked without a PIN": {"pin_source = \"unlock\"\n" + strings.Replace(good, "\"log.pin\"", "\"lag.pin\"", 1) + "[unlock]\nthreshold = 2\nholders = [\"a\", \"b\", \"c\"]\n", []string{"secrets: ", "log.pin"}},
		"other answers too":    {strings.Replace(good, "benbu-1", "Bad Node", 1), []string{"node: node"}},
	} {
		a, err := parseAnswers("answers.toml", []byte(c.text))
		if err == nil {
			err = a.check(t.TempDir())
		}
		if err == nil {
			t.Errorf("%s: taken", what)
			continue
		}
		for _, w := range c.words {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%s: %q is not in %v", what, w, err)
			}
		}
	}
}

// A DSN names secrets that are not in their folder yet: each is looked at under its own name, in whichever form the DSN is, and no
// other secret is written anywhere.
func TestCertificatesOfADSN(t *testing.T) {
	tmp := t.TempDir()
	t.Setenv("TMPDIR", tmp)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), IsCA: true, BasicConstraintsValid: true, NotAfter: time.Date(2050, 1, 1, 0, 0, 0, 0, time.UTC)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	ca := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	const dir = "/data/yinjian"
	for _, dsn := range []string{
		"postgres://yinjian@192.0.2.40/yinjian?sslrootcert=/data/yinjian/secrets/db.pem",
		"postgres://yinjian@192.0.2.40/yinjian?sslrootcert=%2Fdata%2Fyinjian%2Fsecrets%2Fdb.pem&application_name=yinjian",
		"host=192.0.2.40 user=yinjian sslrootcert='/data/yinjian/secrets/db.pem' dbname=yinjian",
		"host=192.0.2.40 sslrootcert = /data/yinjian/secrets/db.pem user=yinjian",
	} {
		a := defaultAnswers()
		a.TimeSources = []string{"192.0.2.21:123"}
		a.Settings = map[string]any{"database": map[string]any{"dsn": dsn, "password_file": "secrets/db.password"}}
		a.Secrets = map[string]string{"db": "no certificate", "db.pem": ca, "db.password": "geheim", "d": "x", "b.pem": "x"}
		for range 8 { // secrets are a map
			written, cfg, err := a.file("/absent.so", dir)
			if err != nil || cfg == nil || strings.Contains(string(written), tmp) {
				t.Fatalf("%s: %v\n%s", dsn, err, written)
			}
		}
		if left, err := os.ReadDir(tmp); err != nil || len(left) > 0 {
			t.Errorf("%s: %v is left, %v", dsn, left, err)
		}
	}
}

package main_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"

	"yinjian/appliance"
)

// unpack reads a bundle: its members by name, without the folder.
func unpack(t *testing.T, file string) map[string][]byte {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	z, err := gzip.NewReader(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	out := map[string][]byte{}
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		_, name, _ := strings.Cut(path.Clean(h.Name), "/")
		if out[name], err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
	}
}

// A bundle has what a diagnosis needs and none of what is secret: canaries stand wherever an operator, an application or
// the appliance itself could have put one, in the log too. time.policy_note is no such place: all evidence repeats it.
func TestDiagHasNoSecrets(t *testing.T) {
	t.Parallel()
	dir := initAppliance(t, startTimeServer(t))
	canaries := map[string]string{} // by where they were put
	plant := func(name, value string) string {
		canaries[name] = value
		return value
	}
	put := func(name, content string) {
		if err := os.WriteFile(filepath.Join(dir, "secrets", name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	put("hook.key", plant("key of a webhook", "canary-webhook-key-7c31")+"\n")
	put("db.password", plant("password of the database", "canary-db-password-91af"))
	put("left-here", plant("a file that nobody names", "canary-left-here-5be0"))
	configure(t, dir, func(c *appliance.Config) {
		c.Alarms.Webhook = []appliance.AlarmWebhook{{URL: "https://192.0.2.9/robot?access=" + plant("token in an address", "canary-url-token-20dd"), KeyFile: "secrets/hook.key"}}
		c.HSM.ModuleArgs = plant("arguments of a module", "canary-module-args-6e02")
		c.Log.Directory = "logs"
	})
	config := filepath.Join(dir, "config.toml")
	if err := os.WriteFile(config, []byte(readFile(t, config)+"\n# "+plant("a comment", "canary-comment-3f5a")+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	m := serve(t, dir)
	m.trusted(t)
	m.register(t, "his")
	m.enrol(t, "D1", plant("a signer's PIN", "canary-pin-40c2"), "--name", plant("a signer's name", "金丝雀四〇"))
	for _, file := range glob(t, filepath.Join(dir, "secrets", "*")) { // those that init made
		canaries[file] = strings.TrimSpace(readFile(t, file))
	}
	var credential struct {
		Key string `json:"key_hex"`
	}
	if err := json.Unmarshal([]byte(readFile(t, filepath.Join(dir, "credentials", "his.json"))), &credential); err != nil || credential.Key == "" {
		t.Fatal(credential, err)
	}
	canaries["key of an application"] = credential.Key
	// Somebody has put secrets into the running log, as a program could that repeats what it was given.
	logs, err := os.OpenFile(filepath.Join(dir, "logs", "yinjian.log"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	pin := strings.TrimSpace(readFile(t, glob(t, filepath.Join(dir, "secrets", "*.pin"))[0]))
	raw, err := hex.DecodeString(credential.Key)
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{
		"pin " + pin, "hex " + hex.EncodeToString([]byte(canaries["password of the database"])), "base64 " + base64.StdEncoding.EncodeToString(raw),
		"inside " + base64.StdEncoding.EncodeToString([]byte("x"+canaries["key of a webhook"]+"y")), "password=" + plant("called a password", "canary-called-88e1"),
		"postgres://u:" + plant("in an address of the log", "canary-log-dsn-f00d") + "@h/d",
	} {
		if _, err := logs.WriteString(line + "\n"); err != nil {
			t.Fatal(err)
		}
	}
	logs.Close()

	file := filepath.Join(tempDir(t), "d.tar.gz")
	o := mustRun(t, "diag", "--dir", dir, "--out", file)
	if !strings.Contains(o.stdout, "log.txt 里的") {
		t.Errorf("what was taken out is not said: %v", o)
	}
	members := unpack(t, file)
	for name, want := range map[string]string{
		"MANIFEST.txt": "成员", "config.toml": "192.0.2.9", "state.json": `"operational"`, "time.json": `"sources"`, "machines.json": `"main"`, "certificates.json": "tsa:sm2", "journal.txt": "checkpoint",
		"files.txt": "config.toml", "system.txt": "yinjian ", "goroutines.txt": "appliance", "build.txt": "mod", "process.json": `"yj_record"`, "alarms.json": `"receivers"`, "log.txt": "appliance is operational", "public/log.pem": "PUBLIC KEY",
	} {
		if !strings.Contains(string(members[name]), want) {
			t.Errorf("%s does not say %q:\n%.500s", name, want, members[name])
		}
	}
	for name, content := range members {
		for what, canary := range canaries {
			if len(canary) < 6 {
				t.Fatalf("%s: a canary of %d bytes", what, len(canary))
			}
			for form, text := range map[string]string{
				"plain": canary, "hex": hex.EncodeToString([]byte(canary)), "base64": strings.TrimRight(base64.StdEncoding.EncodeToString([]byte(canary)), "=")[:len(canary)],
			} {
				if strings.Contains(string(content), text) {
					t.Errorf("%s has %s, %s", name, what, form)
				}
			}
		}
		if bytes.Contains(content, []byte(base64.StdEncoding.EncodeToString(raw))) || bytes.Contains(content, raw) {
			t.Errorf("%s has the application's key", name)
		}
	}
	refused(t, 1, []string{"exists"}, "diag", "--dir", dir, "--out", file)

	// Of one that stands still there is less, and that is said.
	m.stop(t)
	still := filepath.Join(tempDir(t), "s.tar.gz")
	if o := mustRun(t, "diag", "--dir", dir, "--out", still); !strings.Contains(o.stdout, "运行中的状态") {
		t.Errorf("%v", o)
	}
	if members := unpack(t, still); members["state.json"] != nil || !strings.Contains(string(members["journal.txt"]), "entries") {
		t.Errorf("of one that stands still: %d members", len(members))
	}
	// A secret that cannot be read cannot be looked for.
	if os.Getuid() != 0 {
		if err := os.Chmod(filepath.Join(dir, "secrets", "left-here"), 0); err != nil {
			t.Fatal(err)
		}
		refused(t, 1, []string{"口令文件读不出"}, "diag", "--dir", dir, "--out", still+"2")
	}
}

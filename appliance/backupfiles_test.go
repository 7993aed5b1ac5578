package appliance_test

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"yinjian/appliance"
)

// Every file that a configuration can name is either in a backup or named as absent, and no secret is in one, wherever it
// is named.
func TestBackupFiles(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	neutral, err := os.ReadFile("../hsm/pkcs11/profiles/neutral.toml")
	if err != nil {
		t.Fatal(err)
	}
	config := `node = "benbu-1"
campus = "本部"
[listen]
api = "127.0.0.1:0"
[[listen.tsa_sources]]
name = "lis"
certificates = ["clients/lis.pem"]
[hsm]
module = "/opt/vendor/lib.so"
profile = "profiles/ours.toml"
[hsm.slots.staff]
token_label = "s"
pin_file = "secrets/staff.pin"
[hsm.slots.tsa]
token_label = "t"
pin_file = "pins/tsa"
[hsm.slots.log]
token_label = "l"
pin_file = "secrets/log.pin"
[hsm.slots.ca]
token_label = "c"
pin_file = "secrets/ca.pin"
[hsm.custody]
kek = "kek/2026"
officers = "officers.pem"
[time]
min_sources = 1
[[time.sources]]
name = "a"
group = "a"
address = "192.0.2.1:123"
key_id = 7
key_type = "AES128"
key_file = "ntp.key"
[[hsm.machines]]
name = "packed"
module = "pack:vendor/lib/p11.so"
profile = "profiles/ours.toml"
[hsm.machines.slots.staff]
token_label = "p"
pin_file = "secrets/p.pin"
[packs]
socket = "/run/yinjian-packs/socket"
[update]
socket = "/run/yinjian-update/socket"
[database]
dsn = "postgres://yinjian@192.0.2.9/yinjian"
password_file = "db.password"
[tsa.upstream]
name = "old"
url = "https://192.0.2.5/tsa"
certificates = "/etc/tsa/old.pem"
tls_roots = "secrets/roots.pem"
`
	for name, text := range map[string]string{
		"config.toml": config, "clients/lis.pem": "x", "profiles/ours.toml": string(neutral), "officers.pem": "x", "log.pem": "x", "crl-sm2.crl": "x",
		"machines.toml":    "[[machines]]\nname = \"b\"\n[machines.machine]\nname = \"b\"\nmodule = \"vendor/b.so\"\nprofile = \"profiles/b.toml\"\n[machines.machine.slots.staff]\ntoken_label = \"b\"\npin_file = \"b.pin\"\n",
		"profiles/b.toml":  string(neutral),
		"timesources.toml": "[[sources]]\nname = \"b\"\n[sources.source]\nname = \"b\"\ngroup = \"b\"\naddress = \"192.0.2.2:123\"\nkey_file = \"b.key\"\n",
		"secrets/db":       "x", "credentials/his.json": "x", "central.db": "x", "run/replay.json": "x", "notes.txt": "x",
	} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	names, absent, err := appliance.BackupFiles(dir)
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"clients/lis.pem", "config.toml", "crl-sm2.crl", "log.pem", "machines.toml", "officers.pem", "profiles/b.toml", "profiles/ours.toml", "timesources.toml"}; !slices.Equal(names, want) {
		t.Errorf("in it: %v, want %v", names, want)
	}
	if want := []string{"/etc/tsa/old.pem", "/opt/vendor/lib.so", "b.key", "b.pin", "db.password", "ntp.key", "pack:vendor/lib/p11.so", "pins/tsa", "secrets/ca.pin", "secrets/log.pin", "secrets/p.pin", "secrets/roots.pem", "secrets/staff.pin", "secrets/tls.key", "vendor/b.so"}; !slices.Equal(absent, want) {
		t.Errorf("absent: %v, want %v", absent, want)
	}
	if err := os.Remove(filepath.Join(dir, "officers.pem")); err != nil {
		t.Fatal(err)
	}
	if _, _, err := appliance.BackupFiles(dir); err == nil {
		t.Error("a file that is named and not there is passed over")
	}
}

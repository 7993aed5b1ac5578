package appliance

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"yinjian/appliance/account"
	"yinjian/appliance/assess"
	"yinjian/hsm"
)

// Certificates are shown when each that was looked at is good and another CA's; what is in nobody's use, what nobody could check and
// the evaluation CA's are not.
func TestCertificatesShown(t *testing.T) {
	t.Parallel()
	line := func(owner, state string, evaluation bool) account.CertificateLine {
		use := account.UseTSA
		if owner[0] == 's' {
			use = account.UseStaff
		}
		return account.CertificateLine{Owner: owner, Use: use, Algorithm: "SM2", State: state, Evaluation: evaluation}
	}
	good := func(account.CertificateLine) ([]string, error) { return []string{"CN=a"}, nil }
	unchecked := func(l account.CertificateLine) ([]string, error) { return nil, missing("no list") }
	wrong := func(account.CertificateLine) ([]string, error) { return nil, errors.New("revoked") }
	type lines = []account.CertificateLine
	for name, c := range map[string]struct {
		lines    lines
		standing func(account.CertificateLine) ([]string, error)
		want     assess.Status
	}{
		"all good":                      {lines{line("tsa:a", "active", false), line("tsa:a", "expired", false)}, good, assess.Shown},
		"one is the evaluation CA's":    {lines{line("tsa:a", "active", false), line("tsa:b", "active", true)}, good, assess.NotEvidenced},
		"nobody checked for revocation": {lines{line("tsa:a", "active", false)}, unchecked, assess.NotEvidenced},
		"bad":                           {lines{line("tsa:a", "active", false)}, wrong, assess.Failed},
		"one owner has none in use":     {lines{line("tsa:a", "active", false), line("tsa:b", "revoked", false)}, good, assess.Failed},
		"a signer's CA is unknown":      {lines{line("signer:1", "active", false), line("signer:2", "unusable", false)}, good, assess.Failed},
		"a signer has left":             {lines{line("signer:1", "active", false), line("signer:2", "revoked", false)}, good, assess.Shown},
		"none":                          {nil, good, assess.NotEvidenced},
	} {
		_, err := judgeCertificates(c.lines, 9, c.standing)
		got, none := assess.Shown, missing("")
		switch {
		case errors.As(err, &none):
			got = assess.NotEvidenced
		case err != nil:
			got = assess.Failed
		}
		if got != c.want {
			t.Errorf("%s: %s (%v), want %s", name, got, err, c.want)
		}
	}
}

// Software tokens make the mode soft wherever they are, whatever the configuration says.
func TestModeOf(t *testing.T) {
	t.Parallel()
	vendor, ours, soft := hsm.TokenInfo{Model: "SJJ1012"}, hsm.TokenInfo{Model: "soft-evaluation"}, hsm.TokenInfo{Model: "SoftHSM v2"}
	for _, c := range []struct {
		configured bool
		tokens     []hsm.TokenInfo
		want       string
	}{
		{false, []hsm.TokenInfo{vendor, vendor}, assess.ModeUnsealed}, {false, []hsm.TokenInfo{vendor, ours}, assess.ModeSoft},
		{false, []hsm.TokenInfo{soft}, assess.ModeSoft}, {true, nil, assess.ModeSoft},
	} {
		if got := modeOf(c.configured, c.tokens); got != c.want {
			t.Errorf("%+v: %s", c, got)
		}
	}
}

// Keys and PINs that came while the appliance ran are searched for, too; what cannot be read is said.
func TestSecretsAddedLater(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("ntp.keys", "a-key-of-time")
	write("b.pin", "a-pin-of-b")
	write("timesources.toml", "[[sources]]\nname = 'b'\n[sources.source]\nname = 'b'\ngroup = 'b'\naddress = '192.0.2.1:123'\nkey_file = 'ntp.keys'\n")
	write("machines.toml", "[[machines]]\nname = 'b'\nstate = ''\n[machines.machine]\nname = 'b'\n[machines.machine.slots.staff]\ntoken_label = 'x'\npin_file = 'b.pin'\n")
	found, err := Secrets(new(Config), dir)
	if err != nil || found[filepath.Join(dir, "ntp.keys")] == nil || found[filepath.Join(dir, "b.pin")] == nil {
		t.Errorf("%q, %v", found, err)
	}
	write("machines.toml", "[[[")
	if _, err := Secrets(new(Config), dir); err == nil {
		t.Error("a file of machines that cannot be read was passed over")
	}
}

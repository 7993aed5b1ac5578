package main_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"yinjian/appliance"
)

// vendor turns the neutral profile into one of a vendor who numbers everything differently and signs in DER.
var vendor = strings.NewReplacer(`name = "neutral"`, `name = "vendor"`, "0x1040", "0x80008001", "key_type = 0x3", "key_type = 0x80000004",
	"0x1041", "0x80008000", `output = "raw"`, `output = "der"`, "0xFFFFF009", "0x80000007", `point = "octet-string"`, `point = "raw"`)

// TestVendorProfile runs an appliance on a cipher machine with a vendor's numbers, which it knows from a file alone; a
// profile that does not fit is not used.
func TestVendorProfile(t *testing.T) {
	t.Parallel()
	server := startTimeServer(t)
	dir := initAppliance(t, server)
	text, err := os.ReadFile("../../../hsm/pkcs11/profiles/neutral.toml")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "vendor.toml"), []byte(vendor.Replace(string(text))), 0o600); err != nil {
		t.Fatal(err)
	}
	configure(t, dir, func(c *appliance.Config) { c.HSM.Profile, c.Evaluation.Impersonate = "vendor.toml", "vendor.toml" })
	m := serve(t, dir)
	m.trusted(t)
	m.enrol(t, "D1", "")
	if _, err := m.register(t, "his", "--consent", "app-asserted").Sign(t.Context(), "one", asserted("D1", "one")); err != nil {
		t.Error(err)
	}
	if w := strings.Join(m.state(t).Warnings, "\n"); !strings.Contains(w, "按厂商档案 vendor.toml 应答") {
		t.Errorf("the state does not name the profile: %s", w)
	}
	m.mustBeClean(t)
	m.stop(t)

	configure(t, dir, func(c *appliance.Config) { c.HSM.Profile = "neutral" })
	refused(t, 1, []string{"厂商档案与密码机不符", "operations.sm2-sign-e: 密码机没有机制 0x1041"}, "serve", "--once", "--dir", dir)
	configure(t, dir, func(c *appliance.Config) { c.HSM.Profile, c.Evaluation.Impersonate = "nobody", "absent.toml" })
	refused(t, 1, []string{"hsm.profile", `"nobody"`, "evaluation.impersonate", "absent.toml"}, "serve", "--dir", dir)
}

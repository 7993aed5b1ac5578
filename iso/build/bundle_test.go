package build

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"yinjian/appliance/update"
	"yinjian/hsm"
	"yinjian/hsm/hsmtest"
	"yinjian/hsm/pkcs11"
	"yinjian/iso/layout"
)

// TestMain is two programs: the tests, and the software cipher machine.
func TestMain(m *testing.M) {
	hsmtest.Daemon()
	os.Exit(m.Run())
}

// builtBundle is a bundle of a small root, by these keys, as the updater opens it.
func builtBundle(t *testing.T, keys Keys) (manifest []byte, opened *update.Bundle) {
	t.Helper()
	dir := t.TempDir()
	data := make([]byte, 10*layout.BlockSize)
	tree, err := layout.NewTree("sha256", []byte("salt"))
	if err != nil {
		t.Fatal(err)
	}
	tree.Write(data)
	root, behind, err := tree.Sum()
	if err != nil {
		t.Fatal(err)
	}
	at := func(name string) string { return filepath.Join(dir, name) }
	if err := os.WriteFile(at("root.img"), append(data, behind...), 0o600); err != nil {
		t.Fatal(err)
	}
	image := layout.Image{Version: "1.0.0", Index: 7, Arch: "amd64", Base: "debian12", Variant: layout.Release, VerityHash: "sha256",
		LUKSCipher: "aes-xts-plain64", LUKSKeyBits: 512, ESPBytes: 64 << 20, SlotBytes: 8 << 20, BuiltFrom: "test"}
	cfg := &Config{Keys: keys, MinIndex: 3, Floor: 5, Notes: "说明", Log: func(string, ...any) {}}
	if err := bundle(cfg, image, root, at("root.img"), []byte("kernel"), at("update.json"), at("yinjian.update")); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(at("yinjian.update"))
	if err != nil {
		t.Fatal(err)
	}
	public := keys.Release.Public().(*ecdsa.PublicKey)
	if opened, err = update.Open(bytes.NewReader(whole), update.Keys{Release: public}); err != nil {
		t.Fatal(err)
	}
	if manifest, err = os.ReadFile(at("update.json")); err != nil || !bytes.Equal(manifest, opened.Raw) {
		t.Errorf("update.json is not the bundle's manifest: %v", err)
	}
	return manifest, opened
}

// A bundle says what it was told to, is the same in each build but for its signature, and is signed as OpenSSL judges it.
func TestBundle(t *testing.T) {
	t.Parallel()
	dir, keys := testKeys(t)
	manifest, b := builtBundle(t, keys)
	if m := b.Manifest; m.Image.Index != 7 || m.MinIndex != 3 || m.Floor != 5 || m.Notes != "说明" || b.Root.DataBlocks != 10 {
		t.Errorf("%+v", m)
	}
	if again, _ := builtBundle(t, keys); !bytes.Equal(manifest, again) {
		t.Errorf("two builds: %s and %s", manifest, again)
	}
	value, err := signManifest(manifest, keys.Release)
	if err != nil {
		t.Fatal(err)
	}
	verifiedByOpenSSL(t, manifest, value, keys)
	// OpenSSL's own key files do as well.
	openssl := tool(t, "openssl")
	if out, err := exec.Command(openssl, "genpkey", "-algorithm", "SM2", "-out", filepath.Join(dir, "release.key")).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	other, err := LoadKeys(dir)
	if err != nil {
		t.Fatal(err)
	}
	builtBundle(t, other)
	// A release key that is none is not taken.
	rsa, err := os.ReadFile(filepath.Join(dir, "pcr.key"))
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "release.key"), rsa, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := LoadKeys(dir); err == nil || !strings.Contains(err.Error(), "SM2") {
		t.Errorf("an RSA key as the release's: %v", err)
	}
}

func verifiedByOpenSSL(t *testing.T, manifest, value []byte, keys Keys) {
	t.Helper()
	public, err := publicPEM(keys.Release.Public())
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	for name, data := range map[string][]byte{"release.pem": public, "value": value, "signed": update.Signed(manifest)} {
		if err := os.WriteFile(at(name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	out, err := exec.Command(tool(t, "openssl"), "dgst", "-sm3", "-verify", at("release.pem"), "-sigopt", "distid:1234567812345678", "-signature", at("value"), at("signed")).CombinedOutput()
	if err != nil {
		t.Errorf("OpenSSL: %v: %s", err, out)
	}
}

// With all three keys in a cipher machine the same interface signs: ours stands in for a maker's.
func TestBundleByToken(t *testing.T) {
	t.Parallel()
	m := hsmtest.NewMachine(t)
	token, err := pkcs11.Open(t.Context(), m.Config)
	if err != nil {
		t.Fatal(err)
	}
	for label, algorithm := range map[string]hsm.Algorithm{"db": hsm.RSA2048, "pcr": hsm.RSA2048, "release": hsm.SM2} {
		if _, err := token.GenerateKey(t.Context(), hsm.KeySpec{Label: label, Algorithm: algorithm}); err != nil {
			t.Fatal(err)
		}
	}
	db, err := hsm.NewKey(t.Context(), token, "db", true)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Unix(1750000000, 0), NotAfter: time.Unix(1850000000, 0)}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, db.Public(), db)
	if err != nil {
		t.Fatal(err)
	}
	if err := token.Close(); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for name, text := range map[string]string{
		"pin": string(m.Config.PIN) + "\n", "db.crt": string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert})),
		"token.toml": fmt.Sprintf("module = %q\nmodule_args = %q\ntoken = \"staff\"\npin_file = \"pin\"\nsecure_boot = \"db\"\npcr = \"pcr\"\nrelease = \"release\"\n", m.Module, m.Config.ModuleArgs),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	keys, err := LoadKeys(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer keys.Close()
	manifest, _ := builtBundle(t, keys)
	value, err := signManifest(manifest, keys.Release)
	if err != nil {
		t.Fatal(err)
	}
	verifiedByOpenSSL(t, manifest, value, keys)
}

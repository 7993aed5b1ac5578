package vmtest_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"encoding/pem"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/smx509"

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance/pack"
	"yinjian/appliance/problem"
	"yinjian/hsm/hsmtest"
	"yinjian/iso/vmtest"
)

// makersPack is a pack with SoftHSM2 behind a library of a maker's, one token and its PIN; unsigned.
func makersPack(t *testing.T) []byte {
	t.Helper()
	dir := t.TempDir()
	run := func(name string, args ...string) {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), vmtest.Tool(t, name), args...)
		cmd.Env = append(os.Environ(), "SOFTHSM2_CONF="+filepath.Join(dir, "here.conf"))
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", name, err, out)
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "tokens"), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"here.conf": "directories.tokendir = " + dir + "/tokens\n", "softhsm2.conf": "directories.tokendir = /data/yinjian/packs/vendor/tokens\nlog.level = ERROR\n", "pin": "123456\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	run("softhsm2-util", "--init-token", "--free", "--label", "vendor-staff", "--so-pin", "87654321", "--pin", "123456")
	run("cc", "-shared", "-fPIC", "-o", filepath.Join(dir, "libvendor.so"), "testdata/vendor.c")
	run("cc", "-o", filepath.Join(dir, "vendord"), "testdata/vendord.c")
	token, err := filepath.Glob(filepath.Join(dir, "tokens", "*"))
	if err != nil || len(token) != 1 {
		t.Fatal(token, err)
	}
	c := pack.Content{
		Manifest: pack.Manifest{Kind: pack.PKCS11, Name: "vendor", Version: "2.6.1", Serial: 1, Maker: "某厂商", Library: "lib/libvendor.so", Environment: []pack.Variable{
			{Name: "SOFTHSM2_CONF", Value: pack.AtPack + "/etc/softhsm2.conf"}, {Name: "VENDOR_SHARE", Value: pack.AtPack + "/share"}, {Name: "VENDOR_STATE", Value: pack.AtState},
		}, Daemon: &pack.Daemon{Program: "sbin/vendord", Arguments: []string{pack.AtState + "/vendord"}, Ready: pack.AtState + "/vendord"}},
		Sources: map[string]string{
			"lib/libvendor.so": filepath.Join(dir, "libvendor.so"), "lib/libsofthsm2.so": hsmtest.SoftHSMModule, "etc/softhsm2.conf": filepath.Join(dir, "softhsm2.conf"), "share/pin": filepath.Join(dir, "pin"), "sbin/vendord": filepath.Join(dir, "vendord"),
		},
		Verity: "sha256",
	}
	for _, name := range []string{"generation", "token.lock", "token.object"} {
		c.Sources["share/"+name] = filepath.Join(token[0], name)
	}
	for _, name := range []string{"libcrypto.so.3", "libstdc++.so.6", "libgcc_s.so.1"} {
		c.Sources["lib/"+name] = "/usr/lib/x86_64-linux-gnu/" + name
	}
	var out bytes.Buffer
	if _, err := pack.Create(t.Context(), &out, c); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// signedPack signs a pack.
func signedPack(t *testing.T, file []byte, by map[string]*sm2.PrivateKey) []byte {
	t.Helper()
	in := bytes.NewReader(file)
	p, err := pack.Head(in)
	if err != nil {
		t.Fatal(err)
	}
	signatures := []pack.Signature{}
	for name, key := range by {
		value, err := key.Sign(rand.Reader, pack.Signed(p.Raw), sm2.DefaultSM2SignerOpts)
		if err != nil {
			t.Fatal(err)
		}
		signatures = append(signatures, pack.Signature{By: name, Value: value})
	}
	var out bytes.Buffer
	if err := pack.WriteHead(&out, p.Raw, signatures); err != nil {
		t.Fatal(err)
	}
	if err := p.CopyImage(&out, in); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// packKeys are the image's release key and a hospital's, by whom they are, and the public half of the hospital's.
func packKeys(t *testing.T) (by map[string]*sm2.PrivateKey, hospital []byte) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(keys(t), "release.key"))
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(text)
	if block == nil {
		t.Fatal("release.key is no PEM")
	}
	release, err := smx509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	key, err := sm2.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := smx509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	return map[string]*sm2.PrivateKey{pack.ByRelease: release.(*sm2.PrivateKey), pack.ByHospital: key}, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
}

// refusedAs wants the appliance's refusal, with its words.
func refusedAs(t *testing.T, err error, code problem.Code, words string) {
	t.Helper()
	var p *client.Problem
	if !errors.As(err, &p) || p.Code != string(code) || !strings.Contains(err.Error(), words) {
		t.Errorf("err = %v, want %s with %q", err, code, words)
	}
}

// packs is what the appliance says of its packs.
func packs(t *testing.T, a *client.Admin) (string, []pack.Installed) {
	t.Helper()
	var l struct{ Packs []pack.Installed }
	b, err := a.ListPacks(t.Context())
	if err == nil {
		err = json.Unmarshal(b, &l)
	}
	if err != nil {
		t.Fatal(err)
	}
	return string(b), l.Packs
}

// A maker's pack is there after a power cut. What is done with one before is in the short suite part of TestUpdateImage.
func TestPacks(t *testing.T) {
	long(t)
	s, b := inUse(t)
	v := s.boot(t)
	c := b.client(t, v)
	ready(t, c)
	p := tryPacks(t, v, c, loginAgain(t, v))
	v.Kill()

	v = s.boot(t)
	ready(t, b.client(t, v))
	system := loginAgain(t, v).system(t)
	if said, l := packs(t, system); len(l) != 1 || l[0].SM3 != p.SM3 || l[0].Fault != "" || l[0].Folder == "" {
		t.Error(said)
	}
	if _, err := system.RemovePack(t.Context(), wire.RemovePack{Name: "vendor", Reason: "停用"}); err != nil {
		t.Error(err)
	}
	record(t, "mounted after a power cut", v)
	v.Kill()
}

// tryPacks brings a maker's library and its daemon into the sealed appliance from outside: the agent mounts them by the image's kernel,
// under dm-verity; a worker in the service's sandbox loads the library, which asks the daemon, and signs a record; removed, nothing is
// left. It is installed once more at the end.
func tryPacks(t *testing.T, v *vmtest.VM, c *client.Client, o *officers) *pack.Installed {
	t.Helper()
	file := makersPack(t)
	both, public := packKeys(t)
	system, ctx := o.system(t), t.Context()
	send := func(file []byte) (*pack.Installed, error) {
		answer, err := system.StagePack(ctx, bytes.NewReader(file), int64(len(file)))
		if err != nil {
			return nil, err
		}
		var p pack.Installed
		return &p, json.Unmarshal(answer, &p)
	}
	_, err := send(signedPack(t, file, both))
	refusedAs(t, err, problem.Forbidden, "登记医院的公钥")
	if _, err := o.security(t).RegisterPackKey(ctx, wire.RegisterPackKey{Key: public, Reason: "启用厂商包"}); err != nil {
		t.Fatal(err)
	}
	_, err = send(signedPack(t, file, map[string]*sm2.PrivateKey{pack.ByRelease: both[pack.ByRelease]}))
	refusedAs(t, err, problem.Forbidden, "医院密钥的有效签名")
	p, err := send(signedPack(t, file, both))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := system.InstallPack(ctx, wire.InstallPack{SM3: p.SM3, Reason: "接入密码机"}); err != nil {
		t.Fatal(err)
	}
	if said, l := packs(t, system); len(l) != 1 || l[0].SM3 != p.SM3 || l[0].Fault != "" || l[0].Folder != "/run/yinjian/packs/vendor" {
		t.Fatal(said)
	}
	record(t, "pack installed from outside", v)

	machine := func(token, pin string) error {
		text := "name = 'vendor'\nmodule = 'pack:vendor/lib/libvendor.so'\nprofile = 'softhsm2'\nweight = 100\n[slots.staff]\ntoken_label = '" + token + "'\npin_file = '" + pin + "'\n"
		_, err := system.AddMachine(ctx, wire.AddMachine{File: []byte(text), Reason: "扩容"})
		return err
	}
	// It makes its state when it is loaded for the first time; the token of that name it has not.
	refusedAs(t, machine("none", "secrets/staff.pin"), problem.HSMUnavailable, "none")
	if err := machine("vendor-staff", "packs/vendor/pin"); err != nil {
		t.Fatal(err)
	}
	if _, err := o.security(t).EnrolSigner(ctx, wire.EnrolSigner{ID: "D0002", Name: "周医师", Department: "胸外科", Campus: "本部", Algorithms: []string{"RSA-2048"}}); err != nil {
		t.Fatal(err)
	}
	signs := func(c *client.Client, id string) {
		t.Helper()
		req := request(id)
		req.Signer, req.Algorithm = "D0002", "RSA-2048"
		until(t, "a record is signed by the maker's library", func(ctx context.Context) error {
			r, err := c.Sign(ctx, id, req)
			if err == nil && (len(r.Signature) != 256 || len(r.Token) == 0) {
				t.Errorf("%+v", r)
			}
			return err
		})
	}
	signs(c, "v-1")
	record(t, "a record signed by the maker's library", v)
	_, err = system.RemovePack(ctx, wire.RemovePack{Name: "vendor", Reason: "停用"})
	refusedAs(t, err, problem.WrongState, "vendor")

	if _, err := system.ChangeMachine(ctx, "remove", wire.ChangeMachine{Name: "vendor", Reason: "停用", Force: true}); err != nil {
		t.Fatal(err)
	}
	if _, err := system.RemovePack(ctx, wire.RemovePack{Name: "vendor", Reason: "停用"}); err != nil {
		t.Fatal(err)
	}
	if said, l := packs(t, system); len(l) != 0 {
		t.Error(said)
	}
	// Nothing of it is left in the kernel either: the same pack, whose device has the same name, comes in again.
	if p, err = send(signedPack(t, file, both)); err != nil {
		t.Fatal(err)
	}
	if _, err := system.InstallPack(ctx, wire.InstallPack{SM3: p.SM3, Reason: "再次接入"}); err != nil {
		t.Fatal(err)
	}
	record(t, "removed, and installed again", v)
	return p
}

//go:build linux

package main

import (
	"bytes"
	"crypto/ecdsa"
	crand "crypto/rand"
	"encoding/pem"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/smx509"

	"yinjian/appliance/pack"
	"yinjian/iso/layout"
)

// newKey is a new key, and its public half as it lies on an answer disk.
func newKey(t *testing.T) (*sm2.PrivateKey, []byte) {
	t.Helper()
	key, err := sm2.GenerateKey(crand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := smx509.MarshalPKIXPublicKey((*ecdsa.PublicKey)(&key.PublicKey))
	if err != nil {
		t.Fatal(err)
	}
	return key, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
}

// signedPack is a pack with one file, signed by those.
func signedPack(t *testing.T, name string, by map[string]*sm2.PrivateKey) []byte {
	t.Helper()
	if _, err := exec.LookPath("mksquashfs"); err != nil {
		t.Skip("mksquashfs is not installed (packaging/dev/deps.sh test)")
	}
	program := filepath.Join(t.TempDir(), "program")
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(program, self, 0o700); err != nil {
		t.Fatal(err)
	}
	var unsigned, out bytes.Buffer
	if _, err := pack.Create(t.Context(), &unsigned, pack.Content{
		Manifest: pack.Manifest{Kind: pack.DM, Name: name, Version: "1", Serial: 1, Maker: "某厂商", Program: "program", Product: "0"},
		Sources:  map[string]string{"program": program}, Verity: "sha256",
	}); err != nil {
		t.Fatal(err)
	}
	in := bytes.NewReader(unsigned.Bytes())
	p, err := pack.Head(in)
	if err != nil {
		t.Fatal(err)
	}
	signatures := []pack.Signature{}
	for who, key := range by {
		value, err := key.Sign(crand.Reader, pack.Signed(p.Raw), sm2.DefaultSM2SignerOpts)
		if err != nil {
			t.Fatal(err)
		}
		signatures = append(signatures, pack.Signature{By: who, Value: value})
	}
	if err := pack.WriteHead(&out, p.Raw, signatures); err != nil {
		t.Fatal(err)
	}
	if err := p.CopyImage(&out, in); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// A pack on the answer disk is on the data volume at the first start, byte for byte. What is not signed by both, is damaged, for another
// machine, too large, or changes while it is copied, stops the installation while the disk still counts as blank.
func TestPacksOfTheAnswerDisk(t *testing.T) {
	t.Parallel()
	release, releasePEM := newKey(t)
	hospital, hospitalPEM := newKey(t)
	both := map[string]*sm2.PrivateKey{pack.ByRelease: release, pack.ByHospital: hospital}
	vendor := signedPack(t, "vendor", both)
	image := layout.Image{Version: "0", Index: 1, Arch: "amd64", Variant: layout.Release, VerityHash: "sha256", ESPBytes: 32 * mib, SlotBytes: 32 * mib}
	if int64(len(vendor)) > image.SlotBytes-maxParcel {
		t.Fatalf("a pack of %d bytes", len(vendor))
	}
	find := func(image layout.Image, hospital []byte, files map[string][]byte) (*parcel, string, error) {
		dir := t.TempDir()
		for name, content := range files {
			if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		p := &parcel{Answers: Answers{Seal: sealTPM}, Hospital: hospital}
		return p, dir, findPacks(dir, p, releasePEM, image)
	}
	damaged := bytes.Clone(vendor)
	damaged[len(damaged)-5000]++
	arm, small, chinese, other := image, image, image, image
	other.Version = "1"
	arm.Arch, small.SlotBytes, chinese.VerityHash = "arm64", 2*mib, "sm3"
	for name, c := range map[string]struct {
		image    layout.Image
		hospital []byte
		files    map[string][]byte
		says     string
	}{
		"no key beside it":     {image, nil, map[string][]byte{"a.pack": vendor}, hospitalKey},
		"no release signature": {image, hospitalPEM, map[string][]byte{"a.pack": signedPack(t, "vendor", map[string]*sm2.PrivateKey{pack.ByHospital: hospital})}, "a.pack: "},
		"no hospital's":        {image, hospitalPEM, map[string][]byte{"a.pack": signedPack(t, "vendor", map[string]*sm2.PrivateKey{pack.ByRelease: release})}, "a.pack: "},
		"damaged":              {image, hospitalPEM, map[string][]byte{"a.pack": damaged}, "a.pack: "},
		"no pack":              {image, hospitalPEM, map[string][]byte{"a.pack": []byte("x")}, "a.pack: "},
		"twice":                {image, hospitalPEM, map[string][]byte{"a.pack": vendor, "b.pack": vendor}, "vendor"},
		"capitals":             {image, hospitalPEM, map[string][]byte{"A.PACK": damaged}, "A.PACK: "},
		"another version":      {other, hospitalPEM, map[string][]byte{"a.pack": vendor}, "another version"},
		"another architecture": {arm, hospitalPEM, map[string][]byte{"a.pack": vendor}, "another architecture"},
		"another kernel":       {chinese, hospitalPEM, map[string][]byte{"a.pack": vendor}, "another hash"},
		"too large":            {small, hospitalPEM, map[string][]byte{"a.pack": vendor}, "too large"},
	} {
		if _, _, err := find(c.image, c.hospital, c.files); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v, want %q", name, err, c.says)
		}
	}
	if p, _, err := find(image, nil, nil); err != nil || len(p.Packs) != 0 {
		t.Errorf("none: %v, %v", p.Packs, err)
	}

	// Onto the disk, and from there to the volume.
	const size = 200 * mib
	install := func(spoil func(dir string, m *memory)) (*memory, error) {
		p, dir, err := find(image, hospitalPEM, map[string][]byte{"a.pack": vendor, "b.pack": signedPack(t, "another", both)})
		if err != nil {
			t.Fatal(err)
		}
		j, _ := testJob(t)
		j.image, j.parcel = image, p
		disk := &memory{bytes: make([]byte, size)}
		spoil(dir, disk)
		return disk, j.write(disk, size, 512)
	}
	disk, err := install(func(string, *memory) {})
	if err != nil {
		t.Fatal(err)
	}
	slot := int64(mib) + image.ESPBytes + image.SlotBytes
	p, err := readParcel(bytes.NewReader(disk.bytes[slot:]))
	if err != nil {
		t.Fatal(err)
	}
	p.behind(bytes.NewReader(disk.bytes[slot:]))
	folder := filepath.Join(t.TempDir(), "packs")
	if err := p.keepPacks(folder); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(folder, "vendor.pack")); err != nil || !bytes.Equal(got, vendor) {
		t.Errorf("the pack on the volume is another, %v", err)
	}
	if _, err := os.Stat(filepath.Join(folder, "another.pack")); err != nil {
		t.Error(err)
	}
	disk.bytes[slot+p.offset(1)+70]++
	if err := p.keepPacks(t.TempDir()); err == nil {
		t.Error("a pack that changed on the disk is kept")
	}
	for name, spoil := range map[string]func(dir string, m *memory){
		"changed on the answer disk": func(dir string, _ *memory) {
			if err := os.WriteFile(filepath.Join(dir, "a.pack"), damaged, 0o600); err != nil {
				t.Fatal(err)
			}
		},
		"disk loses a bit": func(_ string, m *memory) { m.flips = slot + maxParcel + 5000 },
	} {
		disk, err := install(spoil)
		if err == nil {
			t.Errorf("%s: installed", name)
		}
		if blank, err := layout.Blank(disk, size); err != nil || !blank {
			t.Errorf("%s: the disk does not count as blank any more (%v)", name, err)
		}
	}
}

// Answers that name a library in a pack need the pack.
func TestNeedPacks(t *testing.T) {
	t.Parallel()
	there := []packed{{Name: "vendor", Library: "lib/a.so"}}
	for text, good := range map[string]bool{
		"node = 'a'\n":                                                             true,
		"module = 'pack:vendor/lib/a.so'\n":                                        true,
		"module = 'pack:other/lib/a.so'\n":                                         false,
		"module = 'pack:vendor/lib/b.so'\n":                                        false,
		"[settings.hsm]\nmodule = 'pack:vendor/lib/a.so'\n":                        true,
		"[settings.hsm]\nmodule = 'pack:other/lib/a.so'\n":                         false,
		"[settings.hsm]\nmodule = '/usr/lib/a.so'\n":                               true,
		"[[settings.hsm.machines]]\nname = 'b'\nmodule = 'pack:other/lib/a.so'\n":  false,
		"[[settings.hsm.machines]]\nname = 'b'\nmodule = 'pack:vendor/lib/a.so'\n": true,
	} {
		if err := needPacks([]byte(text), there); (err == nil) != good {
			t.Errorf("%s: %v", text, err)
		}
	}
}

package pack_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/smx509"

	"yinjian/appliance/pack"
	"yinjian/appliance/problem"
	"yinjian/iso/layout"
)

// made is a signed pack and the keys it is signed with.
type made struct {
	keys    pack.Keys
	private map[string]*sm2.PrivateKey
	file    []byte
}

func key(t testing.TB) *sm2.PrivateKey {
	t.Helper()
	k, err := sm2.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func pemOf(t testing.TB, key *ecdsa.PublicKey) string {
	t.Helper()
	der, err := smx509.MarshalPKIXPublicKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
}

// library is a PKCS#11 module as far as a packer can see: our own, built by cc from a line of C.
func library(t testing.TB) string {
	t.Helper()
	cc, err := exec.LookPath("cc")
	if err != nil {
		t.Skip("no C compiler")
	}
	dir := t.TempDir()
	source, out := filepath.Join(dir, "m.c"), filepath.Join(dir, "libvendor.so")
	if err := os.WriteFile(source, []byte("int C_GetFunctionList(void **p) { return 5; }\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if b, err := exec.Command(cc, "-shared", "-fPIC", "-o", out, source).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, b)
	}
	return out
}

func content(t testing.TB, serial uint64) pack.Content {
	t.Helper()
	conf := filepath.Join(t.TempDir(), "vendor.conf")
	if err := os.WriteFile(conf, []byte("ip = 10.0.0.1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return pack.Content{
		Manifest: pack.Manifest{Kind: pack.PKCS11, Name: "vendor", Version: "5.2.1", Serial: serial, Maker: "某厂商", Library: "lib/libvendor.so",
			Environment: []pack.Variable{{Name: "VENDOR_CONF", Value: pack.AtPack + "/etc/vendor.conf"}}, Notes: "试"},
		Sources: map[string]string{"lib/libvendor.so": library(t), "etc/vendor.conf": conf}, Verity: "sm3",
	}
}

func build(t testing.TB, c pack.Content) []byte {
	t.Helper()
	if _, err := exec.LookPath("mksquashfs"); err != nil {
		t.Skip("mksquashfs is not installed (Debian squashfs-tools)")
	}
	var b bytes.Buffer
	if _, err := pack.Create(t.Context(), &b, c); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// sign signs a pack's file by those.
func sign(t testing.TB, file []byte, by map[string]*sm2.PrivateKey) []byte {
	t.Helper()
	r := bytes.NewReader(file)
	p, err := pack.Head(r)
	if err != nil {
		t.Fatal(err)
	}
	signatures := []pack.Signature{}
	for _, name := range []string{pack.ByRelease, pack.ByHospital} {
		if k := by[name]; k != nil {
			value, err := k.Sign(rand.Reader, pack.Signed(p.Raw), sm2.DefaultSM2SignerOpts)
			if err != nil {
				t.Fatal(err)
			}
			signatures = append(signatures, pack.Signature{By: name, Value: value})
		}
	}
	var out bytes.Buffer
	if err := pack.WriteHead(&out, p.Raw, signatures); err != nil {
		t.Fatal(err)
	}
	if err := p.CopyImage(&out, r); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func newMade(t testing.TB) *made {
	m := &made{private: map[string]*sm2.PrivateKey{pack.ByRelease: key(t), pack.ByHospital: key(t)}}
	m.keys = pack.Keys{Release: &m.private[pack.ByRelease].PublicKey, Hospital: &m.private[pack.ByHospital].PublicKey}
	m.file = sign(t, build(t, content(t, 3)), m.private)
	return m
}

func refused(t *testing.T, err error, code problem.Code, words string) {
	t.Helper()
	if err == nil || problem.CodeOf(err) != code || !strings.Contains(err.Error(), words) {
		t.Errorf("err = %v, want %s with %q", err, code, words)
	}
}

// A whole pack is taken, the same content makes the same bytes, and veritysetup and unsquashfs read the image as we mean it. With
// any byte changed, or cut at any place, nothing is taken.
func TestEveryByte(t *testing.T) {
	t.Parallel()
	m := newMade(t)
	p, err := pack.Whole(bytes.NewReader(m.file), m.keys)
	if err != nil || len(p.Signers) != 2 || p.Manifest.Arch != runtime.GOARCH || len(p.Manifest.Files) != 2 {
		t.Fatalf("%+v, %v", p, err)
	}
	again := build(t, content(t, 3))
	if !bytes.Equal(build(t, content(t, 3)), again) {
		t.Error("the same content made other bytes")
	}
	judges(t, m.file[p.Start:], p)

	step := 1
	for at := 0; at < len(m.file); at += step {
		if int64(at) >= p.Start { // the image: every block at another place
			step = layout.BlockSize - 13
		}
		changed := bytes.Clone(m.file)
		changed[at] ^= 1 << (at % 8)
		if _, err := pack.Whole(bytes.NewReader(changed), m.keys); err == nil {
			t.Fatalf("byte %d of %d was changed, and the pack was taken", at, len(m.file))
		}
	}
	for _, n := range []int{0, 1, 23, 24, 500, int(p.Start) - 1, int(p.Start), len(m.file) - 1} {
		if _, err := pack.Whole(bytes.NewReader(m.file[:n]), m.keys); err == nil {
			t.Errorf("a pack of %d bytes was taken", n)
		}
	}
	if _, err := pack.Whole(bytes.NewReader(append(bytes.Clone(m.file), 0)), m.keys); err == nil {
		t.Error("a pack with a byte behind it was taken")
	}
}

// judges are veritysetup and unsquashfs.
func judges(t *testing.T, image []byte, p *pack.Pack) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(file, image, 0o600); err != nil {
		t.Fatal(err)
	}
	if tool, err := exec.LookPath("unsquashfs"); err == nil {
		to := filepath.Join(filepath.Dir(file), "tree")
		if out, err := exec.Command(tool, "-q", "-n", "-d", to, file).CombinedOutput(); err != nil {
			t.Fatalf("unsquashfs: %v\n%s", err, out)
		}
		if err := p.Manifest.Compare(os.DirFS(to)); err != nil {
			t.Error(err)
		}
	} else {
		t.Log("unsquashfs is not installed")
	}
	tool, err := exec.LookPath("veritysetup")
	if err != nil {
		t.Log("veritysetup is not installed")
		return
	}
	i := p.Manifest.Image
	offset := "--hash-offset=" + strconv.FormatUint(i.DataBlocks*layout.BlockSize, 10)
	if out, err := exec.Command(tool, "verify", offset, file, file, i.Hash).CombinedOutput(); err != nil {
		t.Errorf("veritysetup: %v\n%s", err, out)
	}
}

// Both have to have signed, with the keys that are known, as what they are; OpenSSL judges our signatures.
func TestSigners(t *testing.T) {
	t.Parallel()
	m := newMade(t)
	other := key(t)
	for name, c := range map[string]struct {
		by    map[string]*sm2.PrivateKey
		keys  pack.Keys
		words string
	}{
		"nobody":                     {nil, m.keys, "发布方"},
		"the hospital alone":         {map[string]*sm2.PrivateKey{pack.ByHospital: m.private[pack.ByHospital]}, m.keys, "发布方"},
		"the release alone":          {map[string]*sm2.PrivateKey{pack.ByRelease: m.private[pack.ByRelease]}, m.keys, "医院"},
		"another release key":        {map[string]*sm2.PrivateKey{pack.ByRelease: other, pack.ByHospital: m.private[pack.ByHospital]}, m.keys, "发布方"},
		"another hospital":           {map[string]*sm2.PrivateKey{pack.ByRelease: m.private[pack.ByRelease], pack.ByHospital: other}, m.keys, "医院"},
		"each in the other's place":  {map[string]*sm2.PrivateKey{pack.ByRelease: m.private[pack.ByHospital], pack.ByHospital: m.private[pack.ByRelease]}, m.keys, "发布方"},
		"no hospital key registered": {m.private, pack.Keys{Release: m.keys.Release}, "先登记"},
	} {
		t.Run(name, func(t *testing.T) {
			p, err := pack.Open(bytes.NewReader(sign(t, m.file, c.by)), c.keys)
			if p != nil {
				t.Error("it was opened")
			}
			var told *problem.Problem
			if !errors.As(err, &told) || told.Code != problem.Forbidden || !strings.Contains(told.Detail+told.Next, c.words) {
				t.Errorf("err = %v, want %q", err, c.words)
			}
		})
	}
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		t.Skip("openssl is not installed")
	}
	p, err := pack.Head(bytes.NewReader(m.file))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for name, data := range map[string][]byte{"key": []byte(pemOf(t, m.keys.Release)), "signed": pack.Signed(p.Raw), "value": p.Signatures[0].Value} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command(openssl, "dgst", "-sm3", "-verify", "key", "-sigopt", "distid:1234567812345678", "-signature", "value", "signed")
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("openssl: %v\n%s", err, out)
	}
}

// What a manifest may not say, whoever has signed it.
func TestManifest(t *testing.T) {
	t.Parallel()
	whole := func() *pack.Manifest {
		p, err := pack.Head(bytes.NewReader(build(t, content(t, 3))))
		if err != nil {
			t.Fatal(err)
		}
		return p.Manifest
	}()
	for name, change := range map[string]func(m *pack.Manifest){
		"format":           func(m *pack.Manifest) { m.Format = "yinjian-pack/2" },
		"kind":             func(m *pack.Manifest) { m.Kind = "driver" },
		"name":             func(m *pack.Manifest) { m.Name = "../x" },
		"version":          func(m *pack.Manifest) { m.Version = "a b" },
		"serial":           func(m *pack.Manifest) { m.Serial = 0 },
		"maker":            func(m *pack.Manifest) { m.Maker = "x\ny" },
		"arch":             func(m *pack.Manifest) { m.Arch = "" },
		"notes":            func(m *pack.Manifest) { m.Notes = strings.Repeat("x", 1025) },
		"library":          func(m *pack.Manifest) { m.Library = "lib/other.so" },
		"program":          func(m *pack.Manifest) { m.Program = "lib/libvendor.so" },
		"dm":               func(m *pack.Manifest) { m.Kind, m.Program, m.Product = pack.DM, "lib/libvendor.so", "1.0" },
		"escape":           func(m *pack.Manifest) { m.Files[0].Path = "../etc/passwd" },
		"absolute":         func(m *pack.Manifest) { m.Files[0].Path = "/etc/vendor.conf" },
		"dots":             func(m *pack.Manifest) { m.Files[0].Path = "etc/../vendor.conf" },
		"hidden":           func(m *pack.Manifest) { m.Files[0].Path = "etc/.vendor" },
		"backslash":        func(m *pack.Manifest) { m.Files[0].Path = `etc\vendor` },
		"deep":             func(m *pack.Manifest) { m.Files[0].Path = "a/b/c/d/e/f/g/h/i" },
		"twice":            func(m *pack.Manifest) { m.Files = append(m.Files[:1:1], m.Files[0], m.Files[1]) },
		"order":            func(m *pack.Manifest) { slices.Reverse(m.Files) },
		"file and folder":  func(m *pack.Manifest) { m.Files[0].Path = "lib" },
		"C library":        func(m *pack.Manifest) { m.Files[0].Path = "etc/libc.so.6" },
		"kernel module":    func(m *pack.Manifest) { m.Files[0].Path = "etc/vendor.ko.xz" },
		"size":             func(m *pack.Manifest) { m.Files[0].Size = -1 },
		"sum of sizes":     func(m *pack.Manifest) { m.Files[0].Size, m.Files[1].Size = 300<<20, 300<<20 },
		"digest":           func(m *pack.Manifest) { m.Files[0].SM3 = strings.ToUpper(m.Files[0].SM3) },
		"too many":         func(m *pack.Manifest) { m.Files = make([]pack.File, 513) },
		"no files":         func(m *pack.Manifest) { m.Files = nil },
		"loader":           func(m *pack.Manifest) { m.Environment[0].Name = "LD_PRELOAD" },
		"runtime":          func(m *pack.Manifest) { m.Environment[0].Name = "GODEBUG" },
		"path":             func(m *pack.Manifest) { m.Environment[0].Name = "PATH" },
		"variable":         func(m *pack.Manifest) { m.Environment[0].Value = "a\x00b" },
		"variables":        func(m *pack.Manifest) { m.Environment = append(m.Environment, m.Environment[0]) },
		"image's length":   func(m *pack.Manifest) { m.Image.Size += layout.BlockSize },
		"too large":        func(m *pack.Manifest) { m.Image.DataBlocks, m.Image.Size = 70000, 290<<20 },
		"image's digest":   func(m *pack.Manifest) { m.Image.SM3 = "" },
		"image's hash":     func(m *pack.Manifest) { m.Image.Algorithm = "md5" },
		"image's salt":     func(m *pack.Manifest) { m.Image.Salt = "zz" },
		"what is no UTF-8": func(m *pack.Manifest) { m.Notes = "\xff" },
	} {
		m := *whole
		m.Files, m.Environment = slices.Clone(whole.Files), slices.Clone(whole.Environment)
		change(&m)
		raw, err := m.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := pack.ParseManifest(raw); err == nil {
			t.Errorf("%s: the manifest was taken", name)
		}
	}
	raw, err := whole.Encode()
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"another form": strings.Replace(string(raw), `"format": `, `"format":`, 1), "a member": strings.Replace(string(raw), "{\n", "{\n \"more\": 1,\n", 1),
		"something behind": string(raw) + "{}", "twice": strings.Replace(string(raw), ` "kind": "pkcs11",`, ` "kind": "pkcs11", "kind": "pkcs11",`, 1),
	} {
		if text == string(raw) {
			t.Fatal(name)
		}
		if _, err := pack.ParseManifest([]byte(text)); err == nil {
			t.Errorf("%s: the manifest was taken", name)
		}
	}
	if _, err := pack.ParseManifest(raw); err != nil {
		t.Error(err)
	}
}

// What is packed is looked at as the loader will.
func TestCreate(t *testing.T) {
	t.Parallel()
	base := content(t, 1)
	for name, c := range map[string]struct {
		change func(c *pack.Content)
		words  string
	}{
		"no library":      {func(c *pack.Content) { c.Manifest.Library = "etc/vendor.conf" }, "ELF"},
		"no module":       {func(c *pack.Content) { c.Sources["lib/libvendor.so"] = "/usr/lib/x86_64-linux-gnu/libz.so.1" }, "C_GetFunctionList"},
		"a dependency":    {func(c *pack.Content) { c.Sources["lib/libssl.so.3"] = "/usr/lib/x86_64-linux-gnu/libssl.so.3" }, "--system"},
		"kernel module":   {func(c *pack.Content) { c.Sources["vendor.ko"] = base.Sources["etc/vendor.conf"] }, "内核"},
		"escape":          {func(c *pack.Content) { c.Sources["../x"] = base.Sources["etc/vendor.conf"] }, "不是包内的路径"},
		"no file":         {func(c *pack.Content) { c.Sources["x"] = t.TempDir() }, "不是文件"},
		"hash":            {func(c *pack.Content) { c.Verity = "md5" }, "md5"},
		"architecture":    {func(c *pack.Content) { c.Manifest.Arch = "loong64" }, "loong64"},
		"the C library":   {func(c *pack.Content) { c.Sources["lib/libc.so.6"] = base.Sources["etc/vendor.conf"] }, "C library"},
		"file and folder": {func(c *pack.Content) { c.Sources["lib"] = base.Sources["etc/vendor.conf"] }, ""},
	} {
		one := base
		one.Sources = map[string]string{}
		for k, v := range base.Sources {
			one.Sources[k] = v
		}
		c.change(&one)
		skip := false
		for _, v := range one.Sources {
			if _, err := os.Stat(v); err != nil {
				skip = true // another distribution has it elsewhere
			}
		}
		if skip {
			t.Logf("%s: left out, a file is not there", name)
			continue
		}
		if _, err := pack.Create(t.Context(), io.Discard, one); err == nil || !strings.Contains(err.Error(), c.words) {
			t.Errorf("%s: err = %v, want %q", name, err, c.words)
		}
	}
}

// A tree that is not the manifest's is refused: more, less, other, with privileges.
func TestCompare(t *testing.T) {
	t.Parallel()
	p, err := pack.Head(bytes.NewReader(build(t, content(t, 3))))
	if err != nil {
		t.Fatal(err)
	}
	lib, err := os.ReadFile(library(t))
	if err != nil {
		t.Fatal(err)
	}
	good := func() fstest.MapFS {
		return fstest.MapFS{"etc/vendor.conf": {Data: []byte("ip = 10.0.0.1\n"), Mode: 0o444}, "lib/libvendor.so": {Data: lib, Mode: 0o555}}
	}
	if err := p.Manifest.Compare(good()); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(f fstest.MapFS){
		"one more":   func(f fstest.MapFS) { f["lib/more.so"] = &fstest.MapFile{Mode: 0o444} },
		"a folder":   func(f fstest.MapFS) { f["var"] = &fstest.MapFile{Mode: fs.ModeDir | 0o755} },
		"one less":   func(f fstest.MapFS) { delete(f, "etc/vendor.conf") },
		"other":      func(f fstest.MapFS) { f["etc/vendor.conf"].Data = []byte("ip = 10.0.0.2\n") },
		"longer":     func(f fstest.MapFS) { f["etc/vendor.conf"].Data = []byte("ip = 10.0.0.1\n\n") },
		"a link":     func(f fstest.MapFS) { f["etc/vendor.conf"].Mode = fs.ModeSymlink | 0o777 },
		"setuid":     func(f fstest.MapFS) { f["lib/libvendor.so"].Mode |= fs.ModeSetuid },
		"writable":   func(f fstest.MapFS) { f["etc/vendor.conf"].Mode = 0o644 },
		"executable": func(f fstest.MapFS) { f["etc/vendor.conf"].Mode = 0o555 },
		"a device":   func(f fstest.MapFS) { f["etc/vendor.conf"].Mode = fs.ModeDevice | 0o444 },
	} {
		f := good()
		change(f)
		if err := p.Manifest.Compare(f); err == nil {
			t.Errorf("%s: the tree was taken", name)
		}
	}
}

func FuzzHead(f *testing.F) {
	digest := strings.Repeat("0a", 32)
	m := pack.Manifest{
		Format: pack.Format, Kind: pack.PKCS11, Name: "vendor", Version: "1", Serial: 1, Maker: "某厂商", Arch: "amd64", Library: "lib/a.so",
		Environment: []pack.Variable{{Name: "CONF", Value: pack.AtPack + "/b"}}, Files: []pack.File{{Path: "b", SM3: digest, SHA256: digest}, {Path: "lib/a.so", Size: 7, Executable: true, SM3: digest, SHA256: digest}},
		Image: pack.Image{Size: 2 * layout.BlockSize, SM3: digest, SHA256: digest, Hash: digest, Algorithm: "sm3", DataBlocks: 1, Salt: "0a"},
	}
	raw, err := m.Encode()
	if err != nil {
		f.Fatal(err)
	}
	if _, err := pack.ParseManifest(raw); err != nil {
		f.Fatal(err)
	}
	var seed bytes.Buffer
	if err := pack.WriteHead(&seed, raw, []pack.Signature{{By: pack.ByRelease, Value: []byte{0x30, 0}}}); err != nil {
		f.Fatal(err)
	}
	f.Add(seed.Bytes())
	f.Add([]byte(pack.Magic))
	f.Fuzz(func(t *testing.T, head []byte) {
		p, err := pack.Head(bytes.NewReader(head))
		if err != nil {
			return
		}
		var out bytes.Buffer
		if err := pack.WriteHead(&out, p.Raw, p.Signatures); err != nil {
			t.Fatal(err)
		}
		if !bytes.HasPrefix(head, out.Bytes()) || int64(out.Len()) != p.Start {
			t.Error("what was taken encodes to other bytes")
		}
		if p.Manifest.Image.Size > pack.MaxImage {
			t.Error(p.Manifest.Image.Size)
		}
	})
}

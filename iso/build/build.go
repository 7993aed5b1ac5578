package build

import (
	"crypto"
	"crypto/sha256"
	"encoding/pem"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/emmansun/gmsm/smx509"

	"yinjian/iso/layout"
)

// A Config is one build.
type Config struct {
	Sources  string // the repository
	Base     string // base file; its lock stands beside it, .lock for .toml
	Variant  string // evaluation or release
	Version  string // of the product
	Index    uint64 // of the image, see [layout.Image]
	Revision string // of the sources
	Cache    string // packages, by content
	Repos    string // rpm: see [Fetcher]
	Out      string // folder for what is made
	Time     time.Time
	Keys     Keys
	Overlay  string // folder that goes over the root last; "" is none
	Quick    bool   // the root is packed fast, and larger: for tests
	MinIndex uint64 // of the update bundle, see [update.Manifest]
	Floor    uint64
	Notes    string
	Log      func(format string, args ...any)

	offered Tree // libraries of the packages that the allow-list did not keep
}

// A Result says where things are.
type Result struct {
	Root  layout.Root
	Files map[string]string // name → path of what was made
}

// Build makes the image. In cfg.Out stand then:
//
//	root.img                         a slot: squashfs, superblock, hash tree
//	disk.initrd, iso.initrd          the initramfs
//	disk.efi, iso.efi                kernels, not signed: the same in each build
//	disk.signed.efi, iso.signed.efi  signed ones
//	esp.img, esp.img.gz              the EFI system partition of an installed disk, see [layout.ESPImage]
//	yinjian.iso                      the installation medium
//	update.json                      the manifest of the update bundle, not signed: the same in each build
//	yinjian.update                   the update bundle, see package update
//	sbom.cdx.json                    every file of the root
func Build(cfg Config) (*Result, error) {
	b, err := LoadBase(cfg.Base)
	if err != nil {
		return nil, err
	}
	if cfg.Quick {
		if i := slices.Index(b.Squashfs, "zstd"); i >= 0 {
			b.Squashfs = []string{"-comp", "zstd", "-Xcompression-level", "3"}
		} else {
			b.Squashfs = []string{"-comp", "gzip", "-Xcompression-level", "1"}
		}
	}
	if cfg.Variant != layout.Evaluation && cfg.Variant != layout.Release {
		return nil, fmt.Errorf("variant %q is neither %s nor %s", cfg.Variant, layout.Evaluation, layout.Release)
	}
	if !b.Tried {
		cfg.Log("注意：%s 的镜像尚未试过 (images of this base were not tried on anything yet)", b.Name)
	}
	if err := os.MkdirAll(cfg.Out, 0o755); err != nil {
		return nil, err
	}
	scratch, err := os.MkdirTemp(cfg.Out, "work")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(scratch)
	began := time.Now() // interval
	step := func(name string) {
		cfg.Log("%6.1f s  %s", time.Since(began).Seconds(), name)
	}

	// 1. Packages: locked, fetched, unpacked as far as they are kept. Libraries that were not asked for are put aside:
	// what is linked with them decides.
	lock, err := ReadLock(strings.TrimSuffix(cfg.Base, ".toml") + ".lock")
	if err != nil {
		return nil, err
	}
	fetcher := &Fetcher{Cache: cfg.Cache, Repos: cfg.Repos, Base: b}
	if err := fetcher.Fetch(lock); err != nil {
		return nil, err
	}
	step("packages fetched")
	keep, unused, err := keeper(b)
	if err != nil {
		return nil, err
	}
	t, kernelFiles := Tree{}, Tree{}
	cfg.offered = Tree{}
	var kernelSource string
	firmware := map[string][]byte{b.Stub: nil, b.Loader: nil}
	var font *File
	for _, p := range lock {
		if p.Name == b.Kernel || !slices.Contains(b.Packages, p.Name) && strings.HasPrefix(p.Name, "linux-image-") {
			kernelSource = p.Source()
			if err := fetcher.Unpack(kernelFiles, p, func(string) bool { return true }); err != nil {
				return nil, err
			}
			continue
		}
		if !slices.Contains(b.Packages, p.Name) {
			return nil, fmt.Errorf("the lock file has %s, which the base does not name: make it anew", p.Name)
		}
		all := Tree{}
		if err := fetcher.Unpack(all, p, func(string) bool { return true }); err != nil {
			return nil, err
		}
		for _, name := range all.Names() {
			f := all[name]
			if _, wanted := firmware[name]; wanted {
				firmware[name] = f.Data
			}
			if name == b.Font {
				if font, err = screenFont(f); err != nil {
					return nil, err
				}
			}
			switch {
			case f.Mode.IsDir():
			case keep(name):
				t.place(name, f)
			case strings.Contains(filepath.Base(name), ".so"):
				cfg.offered.place(name, f)
			}
		}
	}
	if err := unused(); err != nil {
		return nil, err
	}
	for name := range firmware {
		if own, ok := strings.CutPrefix(name, "./"); ok {
			if firmware[name], err = os.ReadFile(filepath.Join(cfg.Sources, own)); err != nil {
				return nil, err
			}
		}
		if firmware[name] == nil {
			return nil, fmt.Errorf("no package has %s", name)
		}
	}
	if b.Font != "" && font == nil {
		return nil, fmt.Errorf("no package has %s", b.Font)
	}
	k, err := kernelOf(b, kernelFiles, kernelSource)
	if err != nil {
		return nil, err
	}
	modules, err := k.list(b.Modules, b.Absent)
	if err != nil {
		return nil, err
	}
	step("packages unpacked")

	// 2. Our programs, and the root.
	programs, init, err := compile(&cfg, b, scratch)
	if err != nil {
		return nil, err
	}
	step("programs built")
	if font != nil {
		t.place(strings.TrimPrefix(layout.ScreenFont, "/"), font)
	}
	if err := assemble(&cfg, b, t, k, modules, programs, cfg.Keys); err != nil {
		return nil, err
	}
	if err := Check(t, cfg.Variant, modules); err != nil {
		return nil, err
	}
	out := func(name string) string { return filepath.Join(cfg.Out, name) }
	write := func(name string, data []byte) error { return os.WriteFile(out(name), data, 0o644) }
	sbom, err := SBOM(t, "yinjian-image-"+strings.TrimSuffix(b.Name, "-"+b.Arch)+"-"+b.Arch+"-"+cfg.Variant, cfg.Version)
	if err != nil {
		return nil, err
	}
	if err := write("sbom.cdx.json", sbom); err != nil {
		return nil, err
	}
	step("root assembled and checked")
	root, err := squash(t, b, out("root.img"), cfg.Time)
	if err != nil {
		return nil, err
	}
	step("root packed")
	if err := within(out("root.img"), b.RootBudgetMiB); err != nil {
		return nil, err
	}

	// 3. Kernels: the disk's first, for the medium's names what the installer will write.
	osrel := t["usr/lib/os-release"].Data
	signed := func(name string, c layout.CommandLine, names []string) ([]byte, error) {
		early, err := k.list(names, b.Absent)
		if err != nil {
			return nil, err
		}
		ram, err := initramfs(k, init, font, early)
		if err != nil {
			return nil, err
		}
		if err := write(name+".initrd", ram); err != nil {
			return nil, err
		}
		words := b.CommandLine
		if c.Media == layout.MediaISO {
			words = append(slices.Clone(words), "systemd.unit=yinjian-install.target")
		}
		plain, err := unified(firmware[b.Stub], k.image, ram, osrel, c.String()+" "+strings.Join(words, " "), cfg.Keys.PCR)
		if err != nil {
			return nil, err
		}
		if err := write(name+".efi", plain); err != nil {
			return nil, err
		}
		file, err := cfg.Keys.SecureBoot.Sign(plain)
		if err != nil {
			return nil, err
		}
		return file, write(name+".signed.efi", file)
	}
	disk, err := signed("disk", layout.CommandLine{Root: root, Media: layout.MediaDisk}, b.InitModules)
	if err != nil {
		return nil, err
	}
	loader, err := cfg.Keys.SecureBoot.Sign(firmware[b.Loader])
	if err != nil {
		return nil, err
	}
	boot, err := removable(b.Arch)
	if err != nil {
		return nil, err
	}
	partition := map[string][]byte{
		"EFI/BOOT/" + boot: loader,
		layout.EntryDir + "/" + layout.NewEntry(cfg.Index).String(): disk,
		"loader/loader.conf": []byte("timeout 0\neditor no\nauto-firmware no\nauto-entries no\n"),
	}
	for name, data := range cfg.Keys.Enrol {
		partition["loader/keys/auto/"+name] = data
	}
	system, err := esp(scratch, b.ESPMiB<<20, partition, "YINJIANESP", cfg.Time)
	if err != nil {
		return nil, err
	}
	if err := write("esp.img", system); err != nil {
		return nil, err
	}
	// A kernel that is not compressed, as arm64's, would be on the medium twice.
	packed, err := gzipped(system)
	if err != nil {
		return nil, err
	}
	if err := write(layout.ESPImage, packed); err != nil {
		return nil, err
	}
	installer, err := signed("iso", layout.CommandLine{Root: root, Media: layout.MediaISO, ESP: sha256.Sum256(system)},
		append(slices.Clone(b.InitModules), b.MediumModules...))
	if err != nil {
		return nil, err
	}
	step("kernels signed")

	// 4. The medium.
	room := int64(len(installer)) + 2<<20
	small, err := esp(scratch, room/layout.Align*layout.Align, map[string][]byte{"EFI/BOOT/" + boot: installer}, "YINJIANISO", cfg.Time)
	if err != nil {
		return nil, err
	}
	small = append(small, make([]byte, room/layout.Align*layout.Align-int64(len(small)))...)
	medium := map[string]string{layout.RootImage: out("root.img"), layout.ESPImage: out(layout.ESPImage)}
	if err := iso(scratch, out("yinjian.iso"), small, medium, cfg.Time); err != nil {
		return nil, err
	}
	if err := within(out("yinjian.iso"), b.ISOBudgetMiB); err != nil {
		return nil, err
	}
	step("medium written")

	// 5. The update for machines that run another image.
	if err := bundle(&cfg, b.image(cfg.Version, cfg.Index, cfg.Variant, cfg.Revision), root, out("root.img"), disk, out("update.json"), out("yinjian.update")); err != nil {
		return nil, err
	}
	step("update bundle written")
	r := &Result{Root: root, Files: map[string]string{}}
	for _, name := range []string{"root.img", "disk.initrd", "iso.initrd", "disk.efi", "iso.efi", "disk.signed.efi", "iso.signed.efi", "esp.img", layout.ESPImage, "yinjian.iso", "update.json", "yinjian.update", "sbom.cdx.json"} {
		r.Files[name] = out(name)
	}
	return r, nil
}

// unified joins stub, kernel, initramfs and command line into one file to be signed, with the PCR policy of just that.
func unified(stub, linux, initrd, osrel []byte, commandLine string, key crypto.Signer) ([]byte, error) {
	public, err := publicPEM(key.Public())
	if err != nil {
		return nil, err
	}
	sections := []Section{{".osrel", osrel}, {".cmdline", []byte(commandLine)}, {".pcrpkey", public}, {".initrd", initrd}, {".linux", linux}}
	signature, err := pcrSignature(sections, key)
	if err != nil {
		return nil, err
	}
	return addSections(stub, append([]Section{{".pcrsig", signature}}, sections...))
}

// removable is the file name that firmware starts from a disk that it knows nothing of (UEFI 2.10 table 3.2).
func removable(arch string) (string, error) {
	name, ok := map[string]string{"amd64": "BOOTX64.EFI", "arm64": "BOOTAA64.EFI", "loong64": "BOOTLOONGARCH64.EFI"}[arch]
	if !ok {
		return "", fmt.Errorf("no name of a boot loader for architecture %q", arch)
	}
	return name, nil
}

func publicPEM(key crypto.PublicKey) ([]byte, error) {
	der, err := smx509.MarshalPKIXPublicKey(key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), nil
}

// within is the size budget.
func within(file string, mib int64) error {
	info, err := os.Stat(file)
	if err != nil {
		return err
	}
	if info.Size() > mib<<20 {
		return fmt.Errorf("%s has %d bytes, over its budget of %d MiB", file, info.Size(), mib)
	}
	return nil
}

// compile builds our programs for the base's architecture: those of the root by path, and init.
func compile(cfg *Config, b *Base, dir string) (root map[string][]byte, init []byte, err error) {
	root = map[string][]byte{}
	for _, p := range []struct {
		pkg, to string
		cgo     bool
	}{
		{"./appliance/cmd/yinjian", "usr/lib/yinjian/yinjian", true}, // SQLite and PKCS#11 modules
		{"./appliance/cmd/yinjian-verify", "usr/lib/yinjian/yinjian-verify", false},
		{"./iso/install", "usr/lib/yinjian/yinjian-install", false},
		{"./iso/console", "usr/lib/yinjian/yinjian-console", false},
		{"./iso/power", "usr/lib/yinjian/yinjian-power", false},
		{"./iso/paint", "usr/lib/yinjian/yinjian-paint", false},
	} {
		if root[p.to], err = Program(cfg.Sources, b.Arch, dir, p.pkg, p.cgo); err != nil {
			return nil, nil, err
		}
	}
	if cfg.Variant == layout.Evaluation {
		if root["usr/lib/yinjian/libyinjian-p11.so"], err = Module(cfg.Sources, b.Arch, dir); err != nil {
			return nil, nil, err
		}
	}
	init, err = Program(cfg.Sources, b.Arch, dir, "./iso/init", false)
	return root, init, err
}

// Program builds one of our programs for an architecture, the same bytes each time; dir is for it to work in. With cgo it is
// linked with the C library, without it is static.
func Program(sources, arch, dir, pkg string, cgo bool) ([]byte, error) {
	out, err := filepath.Abs(filepath.Join(dir, filepath.Base(pkg)))
	if err != nil {
		return nil, err
	}
	// -B 0x… would be a build id that changes with the linker; there is none.
	cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w -buildid=", "-o", out, pkg)
	cmd.Dir = sources
	cmd.Env = append(os.Environ(), "GOOS=linux", "GOARCH="+arch, "CGO_ENABLED=0", "GOFLAGS=")
	if cgo {
		cmd.Env = append(cmd.Env, "CGO_ENABLED=1", "CC="+compiler(arch))
	}
	if text, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("go build %s: %w\n%s", pkg, err, text)
	}
	return os.ReadFile(out)
}

// Module builds the software cipher machine's PKCS#11 module for an architecture.
func Module(sources, arch, dir string) ([]byte, error) {
	out, err := filepath.Abs(filepath.Join(dir, "libyinjian-p11.so"))
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(filepath.Join(sources, "hsm/softtoken/module/build.sh"), out)
	cmd.Env = append(os.Environ(), "CC="+compiler(arch), "CFLAGS=-O2", "LDFLAGS=-s -Wl,--build-id=none")
	if text, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("building the software cipher machine's module: %w\n%s", err, text)
	}
	return os.ReadFile(out)
}

func compiler(arch string) string {
	return map[string]string{"amd64": "x86_64-linux-gnu-gcc", "arm64": "aarch64-linux-gnu-gcc", "loong64": "loongarch64-linux-gnu-gcc"}[arch]
}

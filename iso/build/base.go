// Package build makes the sealed image from a base file: packages of a distribution without running their scripts, what
// of them is kept, our own programs and packaging's files; out of that a squashfs under a hash tree, an initramfs, signed
// kernels and an installation medium. What is not signed is the same, byte for byte, in each build from the same inputs.
//
// Programs of others do what is theirs: apt and dpkg-deb (or rpm2archive), mksquashfs, depmod, mkfs.vfat, mtools, xorriso.
package build

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"

	"yinjian/iso/layout"
)

// A Base is one file of iso/bases: everything in which distributions differ. Its lock file stands beside it.
type Base struct {
	Name    string `toml:"name"`
	Like    string `toml:"like"`    // another base of this folder: what this file does not say is as it says
	Format  string `toml:"format"`  // deb or rpm
	Arch    string `toml:"arch"`    // GOARCH
	Tried   bool   `toml:"tried"`   // an image of it was built and booted; without that, every build says so
	Release string `toml:"release"` // of the distribution, as its own os-release says

	// Packages are all that files are taken from. Nothing is resolved: a library that a kept program needs and that no
	// package here has stops the build.
	Packages []string `toml:"packages"`
	// Kernel is the package of the kernel, or a metapackage that depends on it alone.
	Kernel string `toml:"kernel"`
	// KernelImage and KernelConfig are paths in it; %s stands for the version that its module folder has.
	KernelImage  string `toml:"kernel_image"`
	KernelConfig string `toml:"kernel_config"`

	// Keep are patterns of the paths that stay, everything else goes: * matches within a name, ** over slashes.
	// Libraries need not be listed: what a kept program or library is linked with stays.
	Keep []string `toml:"keep"`
	// Kernel modules by name: for the root, for the initramfs, and for the installation medium's besides. What they
	// depend on comes with them. A name that the kernel has built in is passed over, one that it does not have is an error.
	Modules       []string `toml:"modules"`
	InitModules   []string `toml:"init_modules"`
	MediumModules []string `toml:"medium_modules"`
	// Absent are modules of the lists that this base's kernel is known not to have.
	Absent []string `toml:"absent"`
	// Assert are regular expressions of which each must match a whole line of the kernel's configuration.
	Assert []string `toml:"assert"`
	// Enable are links that make systemd start units: "multi-user.target.wants/yinjian.service".
	Enable []string `toml:"enable"`
	// Libraries are the folders that the dynamic loader searches, in its order.
	Libraries []string `toml:"libraries"`

	Squashfs    []string `toml:"squashfs"` // mksquashfs: -comp and what belongs to it
	VerityHash  string   `toml:"verity_hash"`
	LUKSCipher  string   `toml:"luks_cipher"`
	LUKSKeyBits int      `toml:"luks_keybits"`
	Stub        string   `toml:"stub"`   // path of the EFI stub in a package, or in the sources with ./ before it
	Loader      string   `toml:"loader"` // the same of systemd-boot
	Font        string   `toml:"font"`   // path in a package of GNU Unifont's .hex file; "": the screen has no Chinese
	CommandLine []string `toml:"command_line"`

	ESPMiB        int64 `toml:"esp_mib"`
	SlotMiB       int64 `toml:"slot_mib"`
	RootBudgetMiB int64 `toml:"root_budget_mib"`
	ISOBudgetMiB  int64 `toml:"iso_budget_mib"`
}

// LoadBase reads a base file. Unknown keys are errors.
func LoadBase(file string) (*Base, error) {
	var b Base
	if err := b.read(file); err != nil {
		return nil, err
	}
	if b.Like != "" {
		var other Base
		if err := other.read(filepath.Join(filepath.Dir(file), filepath.Base(b.Like)+".toml")); err != nil {
			return nil, fmt.Errorf("%s: like: %w", file, err)
		}
		if other.Like != "" {
			return nil, fmt.Errorf("%s: like: %s says itself that it is like %s", file, b.Like, other.Like)
		}
		other.Tried = false // what was tried on one was not tried on the other
		b = other
		if err := b.read(file); err != nil {
			return nil, err
		}
	}
	if err := b.validate(); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	if want := strings.TrimSuffix(filepath.Base(file), ".toml"); b.Name != want {
		return nil, fmt.Errorf("%s: name = %q, want %q", file, b.Name, want)
	}
	return &b, nil
}

// read sets what a file says, and nothing else.
func (b *Base) read(file string) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	if err := toml.NewDecoder(bytes.NewReader(text)).DisallowUnknownFields().Decode(b); err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	return nil
}

func (b *Base) validate() error {
	var errs []error
	say := func(bad bool, format string, args ...any) {
		if bad {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	say(b.Format != "deb" && b.Format != "rpm", "format = %q is neither deb nor rpm", b.Format)
	for key, list := range map[string][]string{"packages": b.Packages, "keep": b.Keep, "modules": b.Modules, "init_modules": b.InitModules, "medium_modules": b.MediumModules,
		"enable": b.Enable, "assert": b.Assert, "libraries": b.Libraries, "squashfs": b.Squashfs, "command_line": b.CommandLine} {
		say(len(list) == 0, "%s is empty", key)
		say(len(slices.Compact(slices.Sorted(slices.Values(list)))) != len(list) && key != "squashfs", "%s names something twice", key)
	}
	for key, value := range map[string]string{"name": b.Name, "kernel": b.Kernel, "kernel_image": b.KernelImage, "kernel_config": b.KernelConfig,
		"stub": b.Stub, "loader": b.Loader, "release": b.Release} {
		say(value == "", "%s is missing", key)
	}
	for _, p := range b.Assert {
		_, err := regexp.Compile(p)
		say(err != nil, "assert: %v", err)
	}
	say(b.RootBudgetMiB <= 0 || b.RootBudgetMiB > b.SlotMiB, "root_budget_mib = %d does not fit slot_mib", b.RootBudgetMiB)
	say(b.ISOBudgetMiB <= 0, "iso_budget_mib = %d", b.ISOBudgetMiB)
	errs = append(errs, b.image("0", 1, layout.Release, "").Validate())
	return errors.Join(errs...)
}

// image is what an image of this base says about itself.
func (b *Base) image(version string, index uint64, variant, revision string) layout.Image {
	return layout.Image{Version: version, Index: index, Arch: b.Arch, Base: b.Name, Variant: variant,
		VerityHash: b.VerityHash, LUKSCipher: b.LUKSCipher, LUKSKeyBits: b.LUKSKeyBits,
		ESPBytes: b.ESPMiB << 20, SlotBytes: b.SlotMiB << 20, BuiltFrom: revision}
}

// checkKernel holds a kernel's configuration against what this base relies on. Nothing of an image is usable when the
// kernel cannot check its root or open its data with the ciphers that the base names.
func (b *Base) checkKernel(config []byte) error {
	need := slices.Clone(b.Assert)
	// The ciphers that the base chose, whatever its list says.
	switch b.VerityHash {
	case "sm3":
		need = append(need, `CONFIG_CRYPTO_SM3(_GENERIC)?=[ym]`)
	case "sha256":
		need = append(need, `CONFIG_CRYPTO_SHA256=[ym]`)
	}
	cipher, _, _ := strings.Cut(b.LUKSCipher, "-")
	need = append(need, map[string]string{"sm4": `CONFIG_CRYPTO_SM4(_GENERIC)?=[ym]`, "aes": `CONFIG_CRYPTO_AES=[ym]`}[cipher],
		`CONFIG_DM_VERITY=[ym]`, `CONFIG_DM_CRYPT=[ym]`, `CONFIG_SQUASHFS=[ym]`, `CONFIG_CRYPTO_XTS=[ym]`, `CONFIG_RD_GZIP=y`)
	comp := b.Squashfs[slices.Index(b.Squashfs, "-comp")+1]
	if comp == "gzip" {
		comp = "zlib"
	}
	need = append(need, `CONFIG_SQUASHFS_`+strings.ToUpper(comp)+`=y`)
	if comp != "xz" {
		need = append(need, `CONFIG_SQUASHFS_XZ=y`) // makers' packs, whatever the base
	}
	var errs []error
	for _, pattern := range need {
		if !regexp.MustCompile(`(?m)^` + pattern + `$`).Match(config) {
			errs = append(errs, fmt.Errorf("the kernel of %s is configured without %s", b.Name, pattern))
		}
	}
	return errors.Join(errs...)
}

// pattern compiles one of Keep: * within a name, ** over slashes, ? one byte, {a,b} a choice.
func pattern(glob string) (*regexp.Regexp, error) {
	var out strings.Builder
	for i := 0; i < len(glob); i++ {
		switch c := glob[i]; {
		case strings.HasPrefix(glob[i:], "**"):
			out.WriteString(".*")
			i++
		case c == '*':
			out.WriteString("[^/]*")
		case c == '?':
			out.WriteString("[^/]")
		case c == '{':
			out.WriteString("(?:")
		case c == '}':
			out.WriteString(")")
		case c == ',':
			out.WriteString("|")
		default:
			out.WriteString(regexp.QuoteMeta(string(c)))
		}
	}
	re, err := regexp.Compile("^(?:" + out.String() + ")$")
	if err != nil {
		return nil, fmt.Errorf("keep: %q: %w", glob, err)
	}
	return re, nil
}

// Command packages makes the deb and rpm packages and the tar archive by which the appliance is installed on servers that a
// hospital already has: `make packages`, from the top of the repository. What is in them is told by contents.go, what they do
// on the way in and out by packaging/scripts. The packages are written by nfpm, which is a module of its own beside this one
// (packaging/nfpm), so that nothing of it is among the product's parts.
//
// The same sources give the same bytes, but for the signature of the list.
package main

import (
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"yinjian/iso/build"
)

func main() {
	var o options
	c := &cobra.Command{Use: "packages", Short: "制作 deb、rpm、tar (makes deb, rpm and tar)", SilenceUsage: true, Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return o.run() }}
	c.Flags().StringSliceVar(&o.archs, "arch", []string{"amd64", "arm64"}, "架构 (architectures)")
	c.Flags().StringVar(&o.out, "out", "build/packages", "输出目录，原有的软件包会被清除 (folder for what is made; older packages in it go)")
	c.Flags().StringVar(&o.keys, "keys", "build/package-keys", "签名密钥目录：release.key (folder with the key that signs)")
	c.Flags().BoolVar(&o.throwAway, "throw-away", false, "以一次性的密钥签名，只供试验 (sign with a throw-away key, for trials)")
	c.Flags().StringVar(&o.version, "version", "", "版本，缺省由源码与 git 得到 (version, by default from the sources and git)")
	var crossOut string
	crossing := &cobra.Command{Use: "cross", Short: "为别的架构编译 (programs for other architectures)", Args: cobra.NoArgs, RunE: func(*cobra.Command, []string) error { return cross(crossOut) }}
	crossing.Flags().StringVar(&crossOut, "out", "build/cross", "输出目录 (folder for what is made)")
	c.AddCommand(crossing)
	if err := c.Execute(); err != nil {
		os.Exit(1)
	}
}

type options struct {
	archs              []string
	out, keys, version string
	throwAway          bool
}

// A release is what one run packs.
type release struct {
	version string
	time    time.Time
}

func (o *options) run() error {
	r, err := describe(o.version)
	if err != nil {
		return err
	}
	key, err := loadKey(o.keys, o.throwAway)
	if err != nil {
		return fmt.Errorf("签名密钥；试验用 --throw-away (the key that signs; --throw-away for trials): %w", err)
	}
	if err := errors.Join(os.RemoveAll(o.out), os.MkdirAll(o.out, 0o755)); err != nil {
		return err
	}
	for _, arch := range o.archs {
		entries, err := gather(arch)
		if err == nil {
			err = r.pack(arch, entries, o.out)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", arch, err)
		}
	}
	return list(o.out, key)
}

// gather is all that an architecture's packages hold: files of the repository, its list of parts, and programs built for it.
func gather(arch string) ([]entry, error) {
	entries, err := collect(".")
	if err != nil {
		return nil, err
	}
	bom, err := exec.Command("go", "run", "./packaging/docs", "sbom").Output()
	if err != nil {
		return nil, fmt.Errorf("list of parts: %w", err)
	}
	entries = append(entries, entry{product, "/usr/share/doc/yinjian/sbom.cdx.json", 0o644, bom})
	scratch, err := os.MkdirTemp("", "packages")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(scratch)
	for _, p := range []struct {
		pkg string
		cgo bool
	}{{"./appliance/cmd/yinjian", true}, {"./appliance/cmd/yinjian-verify", false}} {
		data, err := build.Program(".", arch, scratch, p.pkg, p.cgo)
		if err != nil {
			return nil, err
		}
		entries = append(entries, entry{product, "/usr/lib/yinjian/" + filepath.Base(p.pkg), 0o755, data})
	}
	module, err := build.Module(".", arch, scratch)
	return append(entries, entry{evaluation, "/usr/lib/yinjian/libyinjian-p11.so", 0o644, module}), err
}

var version = regexp.MustCompile(`(?m)^const Version = "([^"]+)"$`)

// describe says what the sources are: their version, with the number of commits and the commit where they are not a release
// (0.1.0+749.ga549036, which sorts after 0.1.0 and before 0.1.0+750.…), and their date.
func describe(given string) (release, error) {
	r := release{version: given}
	if given == "" {
		source, err := os.ReadFile("appliance/appliance.go")
		if err != nil {
			return r, fmt.Errorf("run it at the top of the repository: %w", err)
		}
		m := version.FindSubmatch(source)
		if m == nil {
			return r, errors.New("appliance/appliance.go has no Version")
		}
		r.version = string(m[1])
		if git("tag", "--points-at", "HEAD", "v"+r.version) == "" {
			count, commit := git("rev-list", "--count", "HEAD"), git("rev-parse", "--short=9", "HEAD")
			if count == "" || commit == "" {
				return r, errors.New("no git here: give --version")
			}
			r.version += "+" + count + ".g" + commit
		}
	}
	epoch := os.Getenv("SOURCE_DATE_EPOCH")
	if epoch == "" {
		epoch = git("log", "-1", "--format=%ct")
	}
	seconds, err := strconv.ParseInt(epoch, 10, 64)
	if err != nil {
		return r, fmt.Errorf("no git and no SOURCE_DATE_EPOCH: %w", err)
	}
	r.time = time.Unix(seconds, 0).UTC()
	return r, nil
}

func git(args ...string) string {
	out, err := exec.Command("git", args...).Output()
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(out))
}

// pack writes one architecture's packages.
func (r release) pack(arch string, entries []entry, out string) error {
	if err := check(entries); err != nil {
		return err
	}
	stage, err := os.MkdirTemp("", "packages")
	if err != nil {
		return err
	}
	defer os.RemoveAll(stage)
	libc, err := libcOf(entries)
	if err != nil {
		return err
	}
	for _, p := range []part{product, evaluation} {
		config, err := r.config(p, arch, libc, stage, entries)
		if err != nil {
			return err
		}
		for _, kind := range []string{"deb", "rpm"} {
			name := fmt.Sprintf("%s_%s_%s.deb", p, r.version, arch)
			if kind == "rpm" {
				name = fmt.Sprintf("%s-%s-1.%s.rpm", p, r.version, rpmArch[arch])
			}
			target, err := filepath.Abs(filepath.Join(out, name))
			if err != nil {
				return err
			}
			cmd := exec.Command("go", "-C", "packaging/nfpm", "tool", "nfpm", "package", "--config", config, "--packager", kind, "--target", target)
			cmd.Env = append(os.Environ(), fmt.Sprint("SOURCE_DATE_EPOCH=", r.time.Unix()))
			if text, err := cmd.CombinedOutput(); err != nil {
				return fmt.Errorf("nfpm %s: %w\n%s", kind, err, text)
			}
			fmt.Println(name)
		}
	}
	name := fmt.Sprintf("yinjian-%s-linux-%s", r.version, arch)
	fmt.Println(name + ".tar.gz")
	return r.archive(filepath.Join(out, name+".tar.gz"), name, entries)
}

var rpmArch = map[string]string{"amd64": "x86_64", "arm64": "aarch64", "loong64": "loongarch64"}

// libcOf is the newest version of the GNU C library that our programs ask for: what a system must have at least.
func libcOf(entries []entry) (string, error) {
	newest := []int{0, 0}
	for _, e := range entries {
		if e.mode&0o111 == 0 && !strings.HasSuffix(e.to, ".so") || e.mode&fs.ModeSymlink != 0 {
			continue
		}
		f, err := elf.NewFile(strings.NewReader(string(e.data)))
		if err != nil {
			return "", fmt.Errorf("%s: %w", e.to, err)
		}
		symbols, err := f.ImportedSymbols()
		if err != nil && !errors.Is(err, elf.ErrNoSymbols) { // a static program has none
			return "", fmt.Errorf("%s: %w", e.to, err)
		}
		libraries, err := f.ImportedLibraries()
		if err != nil {
			return "", fmt.Errorf("%s: %w", e.to, err)
		}
		for _, l := range libraries {
			if !strings.HasPrefix(l, "libc.so.") && !strings.HasPrefix(l, "ld-linux") {
				return "", fmt.Errorf("%s needs %s, which the packages do not ask for", e.to, l)
			}
		}
		for _, s := range symbols {
			var v [2]int
			if n, _ := fmt.Sscanf(s.Version, "GLIBC_%d.%d", &v[0], &v[1]); n == 2 && slices.Compare(v[:], newest) > 0 {
				newest = v[:]
			}
		}
	}
	if newest[0] == 0 {
		return "", errors.New("no program asks for the C library")
	}
	return fmt.Sprintf("%d.%d", newest[0], newest[1]), nil
}

// config stages one package's files and writes what nfpm reads.
func (r release) config(p part, arch, libc, stage string, entries []entry) (string, error) {
	type object = map[string]any
	var contents []object
	for i, e := range entries {
		if e.part != p {
			continue
		}
		c := object{"dst": e.to, "file_info": object{"owner": "root", "group": "root", "mtime": r.time, "mode": e.mode.Perm()}}
		if e.mode&fs.ModeSymlink != 0 {
			c["src"], c["type"] = string(e.data), "symlink"
		} else {
			file := filepath.Join(stage, strconv.Itoa(i))
			if err := os.WriteFile(file, e.data, 0o644); err != nil {
				return "", err
			}
			c["src"] = file
			if e.config() {
				c["type"] = "config|noreplace"
			}
		}
		contents = append(contents, c)
	}
	for _, dir := range folders(p, entries) { // rpm removes what it owns
		contents = append(contents, object{"dst": dir, "type": "dir", "file_info": object{"mode": 0o755, "mtime": r.time}})
	}
	rpmLibc := "libc.so.6(GLIBC_" + libc + ")(64bit)"
	info := object{
		"name": p, "arch": arch, "version": r.version, "version_schema": "none", "mtime": r.time,
		"section": "admin", "priority": "optional", "license": "MulanPSL-2.0", "maintainer": "Yinjian maintainers <yinjian@localhost>",
		"disable_globbing": true, "contents": contents,
		"rpm": object{"buildhost": "localhost", "compression": "xz"},
		"deb": object{"compression": "xz"},
	}
	script := func(name string) string {
		file, _ := filepath.Abs(filepath.Join("packaging/scripts", name)) // fails without a working directory alone
		return file
	}
	if p == product {
		info["description"] = "印鉴：电子签名与时间戳设备 (signing and timestamp appliance)"
		info["scripts"] = object{"postinstall": script("postinstall.sh"), "preremove": script("preremove.sh"), "postremove": script("postremove.sh")}
		info["overrides"] = object{
			"deb": object{"depends": []string{"libc6 (>= " + libc + ")", "systemd"}, "recommends": []string{"chrony"}, "suggests": []string{"gpsd", "nftables"}},
			"rpm": object{"depends": []string{"/bin/sh", rpmLibc, "systemd"}, "recommends": []string{"chrony"}, "suggests": []string{"gpsd", "nftables"}},
		}
	} else {
		info["description"] = "印鉴的软件密码机，仅供评估，非认证产品 (software cipher machine: evaluation only, not certified)"
		info["scripts"] = object{"postinstall": script("evaluation-postinstall.sh"), "preremove": script("evaluation-preremove.sh")}
		info["overrides"] = object{
			"deb": object{"depends": []string{"yinjian (= " + r.version + ")", "libssl3 | libssl3t64"}},
			"rpm": object{"depends": []string{"/bin/sh", "yinjian = " + r.version, rpmLibc, "libssl.so.3()(64bit)"}},
		}
	}
	text, err := json.Marshal(info) // which is YAML
	if err != nil {
		return "", err
	}
	file := filepath.Join(stage, string(p)+".yaml")
	return file, os.WriteFile(file, text, 0o644)
}

package build

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// A Package is a line of a lock file: name=version=SHA-256 of the package's file, in hex.
type Package struct {
	Name, Version, SHA256 string
}

// String is the line.
func (p Package) String() string { return p.Name + "=" + p.Version + "=" + p.SHA256 }

// Source is how files name it.
func (p Package) Source() string { return p.Name + "=" + p.Version }

var lockLine = regexp.MustCompile(`^([a-zA-Z0-9.+_-]+)=([a-zA-Z0-9.+~:^_-]+)=([0-9a-f]{64})$`)

// ReadLock reads a lock file. Lines that begin with # are passed over.
func ReadLock(file string) ([]Package, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var list []Package
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSuffix(line, "\n")
		if strings.HasPrefix(line, "#") {
			continue
		}
		m := lockLine.FindStringSubmatch(line)
		if m == nil {
			return nil, fmt.Errorf("%s: %q is not name=version=SHA-256", file, line)
		}
		list = append(list, Package{m[1], m[2], m[3]})
	}
	return list, nil
}

// A Fetcher gets packages of the machine's own configured sources into a cache. It has a package database of its own
// there: nothing is installed, and what the machine has installed does not matter.
type Fetcher struct {
	Cache string // folder: packages by their SHA-256, and the package manager's lists
	Repos string // rpm: folder of .repo files; "" is the machine's own
	Base  *Base
}

// file is where the cache has a package.
func (f *Fetcher) file(p Package) string {
	return filepath.Join(f.Cache, "packages", p.SHA256+"."+f.Base.Format)
}

// Fetch makes sure that the cache has each package, with the locked content.
func (f *Fetcher) Fetch(list []Package) error {
	var missing []Package
	for _, p := range list {
		if _, err := os.Stat(f.file(p)); err != nil {
			missing = append(missing, p)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	fresh, err := os.MkdirTemp(f.mkdir("incoming"), "")
	if err != nil {
		return err
	}
	defer os.RemoveAll(fresh)
	if err := f.download(fresh, missing); err != nil {
		return err
	}
	got, err := filepath.Glob(filepath.Join(fresh, "*."+f.Base.Format))
	if err != nil {
		return err
	}
	f.mkdir("packages")
	for _, file := range got {
		sum, err := fileSHA256(file)
		if err != nil {
			return err
		}
		if err := os.Rename(file, f.file(Package{SHA256: sum})); err != nil {
			return err
		}
	}
	var errs []error
	for _, p := range missing {
		if _, err := os.Stat(f.file(p)); err != nil {
			errs = append(errs, fmt.Errorf("%s is not to be had with the locked content", p))
		}
	}
	return errors.Join(errs...)
}

// mkdir makes a folder of the cache. That it failed shows at its first use.
func (f *Fetcher) mkdir(name string) string {
	dir := filepath.Join(f.Cache, name)
	_ = os.MkdirAll(dir, 0o755)
	return dir
}

func (f *Fetcher) download(dir string, list []Package) error {
	var names []string
	for _, p := range list {
		names = append(names, p.Name+"="+p.Version)
	}
	if f.Base.Format == "rpm" {
		for i, p := range list {
			names[i] = p.Name + "-" + p.Version
		}
		_, err := f.dnf("download", append([]string{"--destdir", dir}, names...)...)
		return err
	}
	if err := f.apt(dir, "update", "-qq"); err != nil {
		return err
	}
	return f.apt(dir, "download", append([]string{"-qq"}, names...)...)
}

// apt runs apt-get on a package database of its own, with the machine's sources and their keys.
func (f *Fetcher) apt(dir, command string, args ...string) error {
	return f.run(dir, "apt-get", append(append(f.aptOptions(), command), args...)...)
}

func (f *Fetcher) aptOptions() []string {
	state, err := filepath.Abs(f.mkdir("apt-" + f.Base.Arch))
	if err != nil {
		state = "apt"
	}
	f.mkdir("apt-" + f.Base.Arch + "/lists/partial")
	f.mkdir("apt-" + f.Base.Arch + "/archives/partial")
	var out []string
	for _, o := range []string{"Dir::State=" + state, "Dir::State::status=/dev/null", "Dir::Cache=" + state,
		"APT::Architecture=" + f.Base.Arch, "APT::Architectures=" + f.Base.Arch, "APT::Sandbox::User=root",
		"Acquire::Languages=none", "Debug::NoLocking=1"} {
		out = append(out, "-o", o)
	}
	return out
}

func (f *Fetcher) run(dir, name string, args ...string) error {
	cmd := exec.Command(name, args...)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, out)
	}
	return nil
}

// dnf runs it with the repositories and with caches of its own. What it answers is on standard output.
func (f *Fetcher) dnf(command string, args ...string) (string, error) {
	state, err := filepath.Abs(f.mkdir("dnf-" + f.Base.Arch))
	if err != nil {
		return "", err
	}
	options := []string{"--quiet", "--disableplugin=local", "--forcearch", rpmArch(f.Base.Arch), "--releasever", f.Base.Release,
		"--setopt=cachedir=" + state, "--setopt=logdir=" + state, "--setopt=persistdir=" + state}
	if f.Repos != "" {
		repos, err := filepath.Abs(f.Repos)
		if err != nil {
			return "", err
		}
		options = append(options, "--setopt=reposdir="+repos)
	}
	var complaints bytes.Buffer
	cmd := exec.Command("dnf", append(append(options, command), args...)...)
	cmd.Stderr = &complaints
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("dnf %s %s: %w\n%s", command, strings.Join(args, " "), err, &complaints)
	}
	return string(out), nil
}

// lockRPM asks for the latest of each package, and downloads it for its digest.
func (f *Fetcher) lockRPM() ([]Package, error) {
	var list []Package
	for _, name := range append(slices.Clone(f.Base.Packages), f.Base.Kernel) {
		version, err := f.dnf("repoquery", "--latest-limit", "1", "--arch", rpmArch(f.Base.Arch)+",noarch", "--queryformat", "%{version}-%{release}", name)
		if err != nil {
			return nil, err
		}
		dir, err := os.MkdirTemp(f.mkdir("incoming"), "")
		if err != nil {
			return nil, err
		}
		p := Package{Name: name, Version: strings.TrimSpace(version)}
		err = f.download(dir, []Package{p})
		got, _ := filepath.Glob(filepath.Join(dir, "*.rpm")) // the pattern is well-formed
		if err == nil && len(got) == 1 {
			p.SHA256, err = fileSHA256(got[0])
		}
		os.RemoveAll(dir)
		if err != nil {
			return nil, err
		}
		if !lockLine.MatchString(p.String()) {
			return nil, fmt.Errorf("the repositories have no one package %s", name)
		}
		list = append(list, p)
	}
	slices.SortFunc(list, func(a, b Package) int { return strings.Compare(a.Name, b.Name) })
	return list, nil
}

// Lock resolves the base's packages to what the machine's sources have now.
func (f *Fetcher) Lock() ([]Package, error) {
	if f.Base.Format == "rpm" {
		return f.lockRPM()
	}
	dir := f.mkdir("incoming")
	if err := f.apt(dir, "update", "-qq"); err != nil {
		return nil, err
	}
	kernel, err := f.aptCache("depends", "--important", f.Base.Kernel)
	if err != nil {
		return nil, err
	}
	names := append(slices.Clone(f.Base.Packages), f.Base.Kernel)
	if m := regexp.MustCompile(`(?m)^  Depends: (linux-image-\S+)$`).FindStringSubmatch(kernel); m != nil {
		names[len(names)-1] = m[1]
	}
	var list []Package
	for _, name := range names {
		about, err := f.aptCache("show", "--no-all-versions", name)
		if err != nil {
			return nil, err
		}
		field := func(key string) string {
			if m := regexp.MustCompile(`(?m)^` + key + `: (\S+)$`).FindStringSubmatch(about); m != nil {
				return m[1]
			}
			return ""
		}
		p := Package{name, field("Version"), field("SHA256")}
		if !lockLine.MatchString(p.String()) {
			return nil, fmt.Errorf("the sources have no usable record of %s", name)
		}
		list = append(list, p)
	}
	slices.SortFunc(list, func(a, b Package) int { return strings.Compare(a.Name, b.Name) })
	return list, nil
}

func (f *Fetcher) aptCache(command string, args ...string) (string, error) {
	var complaints bytes.Buffer
	cmd := exec.Command("apt-cache", append(append(f.aptOptions(), command), args...)...)
	cmd.Stderr = &complaints
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("apt-cache %s %s: %w\n%s", command, strings.Join(args, " "), err, &complaints)
	}
	return string(out), nil
}

// Unpack adds to the tree what keep lets through of a package. Its scripts are not looked at.
func (f *Fetcher) Unpack(t Tree, p Package, keep func(string) bool) error {
	if sum, err := fileSHA256(f.file(p)); err != nil || sum != p.SHA256 {
		return fmt.Errorf("%s: the cache has other content: %s, %w", p, sum, err)
	}
	cmd := exec.Command("dpkg-deb", "--fsys-tarfile", f.file(p))
	if f.Base.Format == "rpm" {
		cmd = exec.Command("rpm2archive", "-n") // from standard input to standard output
		in, err := os.Open(f.file(p))
		if err != nil {
			return err
		}
		defer in.Close()
		cmd.Stdin = in
	}
	var complaints bytes.Buffer
	cmd.Stderr = &complaints
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	err = t.AddTar(out, p.Source(), keep)
	_, _ = io.Copy(io.Discard, out) // what is behind the archive's end
	if wait := cmd.Wait(); err == nil && wait != nil {
		err = fmt.Errorf("unpacking %s: %w: %s", p.Source(), wait, &complaints)
	}
	return err
}

func fileSHA256(file string) (string, error) {
	f, err := os.Open(file)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return fmt.Sprintf("%x", h.Sum(nil)), nil
}

func rpmArch(goarch string) string {
	return map[string]string{"amd64": "x86_64", "arm64": "aarch64", "loong64": "loongarch64"}[goarch]
}

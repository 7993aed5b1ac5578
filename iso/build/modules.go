package build

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// A kernel is what the kernel's package holds.
type kernel struct {
	version string
	image   []byte
	config  []byte
	files   Tree              // usr/lib/modules/VERSION/…
	module  map[string]string // name with _ for - → path in files
	builtin map[string]bool
	source  string
}

// kernelOf sorts out the kernel's package.
func kernelOf(b *Base, files Tree, source string) (*kernel, error) {
	k := &kernel{files: files, module: map[string]string{}, builtin: map[string]bool{}, source: source}
	for _, name := range files.Names() {
		rest, ok := strings.CutPrefix(name, "usr/lib/modules/")
		if !ok {
			continue
		}
		version, rest, _ := strings.Cut(rest, "/")
		if k.version != "" && version != k.version {
			return nil, fmt.Errorf("%s has modules of two kernels", source)
		}
		k.version = version
		switch base := path.Base(name); {
		case rest == "modules.builtin":
			for line := range strings.Lines(string(files[name].Data)) {
				k.builtin[moduleName(strings.TrimSpace(line))] = true
			}
		case strings.HasSuffix(base, ".ko"), strings.HasSuffix(base, ".ko.xz"), strings.HasSuffix(base, ".ko.zst"):
			k.module[moduleName(name)] = name
		}
	}
	for want, to := range map[string]*[]byte{b.KernelImage: &k.image, b.KernelConfig: &k.config} {
		f := files[strings.ReplaceAll(want, "%s", k.version)]
		if f == nil {
			return nil, fmt.Errorf("%s has no %s", source, strings.ReplaceAll(want, "%s", k.version))
		}
		*to = f.Data
	}
	return k, b.checkKernel(k.config)
}

// moduleName is what modprobe calls a module's file.
func moduleName(file string) string {
	name, _, _ := strings.Cut(path.Base(file), ".ko")
	return strings.ReplaceAll(name, "-", "_")
}

// list returns the named modules and what they depend on, each after what it needs.
func (k *kernel) list(names, absent []string) ([]string, error) {
	var order []string
	var errs []error
	var add func(name string)
	add = func(name string) {
		name = strings.ReplaceAll(name, "-", "_")
		if k.builtin[name] || slices.Contains(order, name) {
			return
		}
		file := k.module[name]
		if file == "" {
			if !slices.Contains(absent, name) {
				errs = append(errs, fmt.Errorf("the kernel %s has no module %s", k.version, name))
			}
			return
		}
		depends, err := k.depends(file)
		if err != nil {
			errs = append(errs, err)
			return
		}
		for _, d := range depends {
			add(d)
		}
		order = append(order, name)
	}
	for _, name := range names {
		add(name)
	}
	return order, errors.Join(errs...)
}

// plain is a module's file, uncompressed.
func (k *kernel) plain(file string) ([]byte, error) {
	data := k.files[file].Data
	var cmd *exec.Cmd
	switch path.Ext(file) {
	case ".xz":
		cmd = exec.Command("xz", "-dc")
	case ".zst":
		cmd = exec.Command("zstd", "-dcq")
	default:
		return data, nil
	}
	cmd.Stdin = bytes.NewReader(data)
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return out, nil
}

// depends reads what a module says of itself in its section .modinfo: hard dependencies, and soft ones to be loaded
// before it (cryptographic algorithms mostly).
func (k *kernel) depends(file string) ([]string, error) {
	data, err := k.plain(file)
	if err != nil {
		return nil, err
	}
	e, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	section := e.Section(".modinfo")
	if section == nil {
		return nil, fmt.Errorf("%s has no .modinfo", file)
	}
	info, err := io.ReadAll(section.Open())
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	var names []string
	for line := range strings.SplitSeq(string(info), "\x00") {
		if list, ok := strings.CutPrefix(line, "depends="); ok && list != "" {
			names = append(names, strings.Split(list, ",")...)
		}
		if list, ok := strings.CutPrefix(line, "softdep=pre:"); ok {
			for _, name := range strings.Fields(list) {
				if strings.HasSuffix(name, ":") {
					break // post:
				}
				if n := strings.ReplaceAll(name, "-", "_"); k.module[n] != "" { // aliases are not looked up
					names = append(names, n)
				}
			}
		}
	}
	return names, nil
}

// install puts the modules into the root, with the tables that depmod makes of them.
func (k *kernel) install(t Tree, names []string) error {
	dir, err := os.MkdirTemp("", "")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	base := "usr/lib/modules/" + k.version
	put := func(name string, data []byte) error {
		t.Put(name, 0o644, data, k.source)
		file := filepath.Join(dir, strings.TrimPrefix(name, "usr/"))
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			return err
		}
		return os.WriteFile(file, data, 0o644)
	}
	for _, name := range names {
		if err := put(k.module[name], k.files[k.module[name]].Data); err != nil {
			return err
		}
	}
	for _, table := range []string{"modules.builtin", "modules.builtin.modinfo", "modules.order"} {
		if f := k.files[base+"/"+table]; f != nil {
			if err := put(base+"/"+table, f.Data); err != nil {
				return err
			}
		}
	}
	if out, err := exec.Command("depmod", "-b", dir, k.version).CombinedOutput(); err != nil {
		return fmt.Errorf("depmod: %w: %s", err, out)
	}
	made, err := filepath.Glob(filepath.Join(dir, "lib/modules", k.version, "modules.*.bin"))
	if err != nil {
		return err
	}
	for _, file := range append(made, filepath.Join(dir, "lib/modules", k.version, "modules.dep")) {
		data, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		t.Put(base+"/"+filepath.Base(file), 0o644, data, "made")
	}
	return nil
}

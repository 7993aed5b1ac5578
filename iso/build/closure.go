package build

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
)

// link moves into the tree every library that its programs and libraries are linked with, out of what the packages
// offered besides. What a program loads by name at run time (dlopen) cannot be seen here: that stands in Keep. A library
// that nobody has is an error.
func link(t, offered Tree, folders []string) error {
	all := Tree{}
	for _, tree := range []Tree{offered, t} {
		for name, f := range tree {
			all[name] = f
		}
	}
	todo := t.Names()
	var errs []error
	for len(todo) > 0 {
		name := todo[0]
		todo = todo[1:]
		needs, runpath, err := needed(t[name])
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		search := slices.Clone(folders)
		for _, dir := range runpath {
			search = append(search, strings.TrimPrefix(strings.ReplaceAll(dir, "$ORIGIN", "/"+path.Dir(name)), "/"))
		}
		// A library beside this one that the program has loaded already is found by its name (systemd's own two).
		search = append(search, path.Dir(name))
		for _, need := range needs {
			found := false
			where := search
			if path.IsAbs(need) { // the loader: the kernel looks nowhere else
				where, need = []string{path.Dir(need)}, path.Base(need)
			}
			for _, dir := range where {
				at, ok := all.Resolve(path.Join(dir, need))
				if !ok {
					continue
				}
				found = true
				for _, file := range []string{path.Join(dir, need), at} { // the link with the plain name, and the library
					if real, _ := all.Resolve(path.Dir(file)); t[path.Join(real, path.Base(file))] == nil {
						file = path.Join(real, path.Base(file))
						t.place(file, all[file])
						todo = append(todo, file)
					}
				}
				break
			}
			if !found {
				errs = append(errs, fmt.Errorf("%s needs %s, which no package of the base has", name, need))
			}
		}
	}
	return errors.Join(errs...)
}

// needed lists the libraries that an ELF file names, its loader among them with its whole path, and where else it
// searches.
func needed(f *File) (names, runpath []string, err error) {
	if !bytes.HasPrefix(f.Data, []byte(elf.ELFMAG)) {
		return nil, nil, nil
	}
	e, err := elf.NewFile(bytes.NewReader(f.Data))
	if err != nil || e.Type == elf.ET_REL { // kernel modules
		return nil, nil, err
	}
	if names, err = e.DynString(elf.DT_NEEDED); err != nil {
		return nil, nil, err
	}
	for _, tag := range []elf.DynTag{elf.DT_RUNPATH, elf.DT_RPATH} {
		list, err := e.DynString(tag)
		if err != nil {
			return nil, nil, err
		}
		for _, l := range list {
			runpath = append(runpath, strings.Split(l, ":")...)
		}
	}
	for _, p := range e.Progs {
		if p.Type == elf.PT_INTERP {
			loader := make([]byte, p.Filesz)
			if _, err := p.ReadAt(loader, 0); err != nil {
				return nil, nil, err
			}
			names = append(names, "/"+merged(strings.TrimRight(string(loader), "\x00")))
		}
	}
	return names, runpath, nil
}

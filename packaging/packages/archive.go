package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
)

// archive writes the tar archive: install.sh, the packages' scripts, and a tree for each package.
func (r release) archive(file, top string, entries []entry) error {
	members := map[string]entry{}
	for _, e := range entries {
		tree := "root"
		if e.part == evaluation {
			tree = "evaluation"
		}
		members[path.Join(tree, e.to)] = e
	}
	for _, name := range []string{"install.sh", "postinstall.sh", "preremove.sh", "postremove.sh", "evaluation-postinstall.sh", "evaluation-preremove.sh"} {
		data, err := os.ReadFile("packaging/scripts/" + name)
		if err != nil {
			return err
		}
		if name != "install.sh" {
			name = "scripts/" + name
		}
		members[name] = entry{mode: 0o755, data: data}
	}
	var names []string
	for name := range members {
		names = append(names, name)
		for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
			names = append(names, dir+"/")
		}
	}
	slices.Sort(names)
	var out bytes.Buffer
	packer, err := gzip.NewWriterLevel(&out, gzip.BestCompression)
	if err != nil {
		return err
	}
	w := tar.NewWriter(packer)
	for _, name := range append([]string{"/"}, slices.Compact(names)...) {
		h := &tar.Header{Name: path.Join(top, name), ModTime: r.time, Uname: "root", Gname: "root", Format: tar.FormatUSTAR}
		e, isFile := members[name]
		switch {
		case !isFile:
			h.Name, h.Typeflag, h.Mode = h.Name+"/", tar.TypeDir, 0o755
		case e.mode&fs.ModeSymlink != 0:
			h.Typeflag, h.Mode, h.Linkname = tar.TypeSymlink, 0o777, string(e.data)
		default:
			h.Typeflag, h.Mode, h.Size = tar.TypeReg, int64(e.mode.Perm()), int64(len(e.data))
		}
		if err := w.WriteHeader(h); err != nil {
			return err
		}
		if h.Typeflag == tar.TypeReg {
			if _, err := w.Write(e.data); err != nil {
				return err
			}
		}
	}
	if err := w.Close(); err != nil {
		return err
	}
	if err := packer.Close(); err != nil {
		return err
	}
	return os.WriteFile(file, out.Bytes(), 0o644)
}

// isPackage says whether a file of the output is one of ours to list.
func isPackage(name string) bool {
	return slices.ContainsFunc([]string{".deb", ".rpm", ".tar.gz"}, func(s string) bool { return strings.HasSuffix(name, s) })
}

package build

import (
	"archive/tar"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// A File is one of the image's. Everything belongs to root: what does not is made at the start, by tmpfiles.
type File struct {
	Mode   fs.FileMode // type and permissions: a regular file, a folder or a symbolic link
	Data   []byte
	Link   string // target of a symbolic link
	Source string // "package=version", or a path in the sources, or "made" for what the builder writes
}

// A Tree is the image's root before it is packed: path without leading slash → file. Folders stand in it too.
type Tree map[string]*File

// Put adds a regular file and the folders above it.
func (t Tree) Put(name string, mode fs.FileMode, data []byte, source string) {
	t.place(name, &File{Mode: mode & (fs.ModePerm | fs.ModeSetuid | fs.ModeSetgid), Data: data, Source: source})
}

// Symlink adds one.
func (t Tree) Symlink(name, target, source string) {
	t.place(name, &File{Mode: fs.ModeSymlink | 0o777, Link: target, Source: source})
}

// Folder adds one, with its own permissions.
func (t Tree) Folder(name string, mode fs.FileMode, source string) {
	t.place(name, &File{Mode: fs.ModeDir | mode.Perm(), Source: source})
}

func (t Tree) place(name string, f *File) {
	t[name] = f
	for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
		if t[dir] != nil {
			return
		}
		t[dir] = &File{Mode: fs.ModeDir | 0o755, Source: "made"}
	}
}

// Names are the tree's paths, sorted: a folder before what is in it.
func (t Tree) Names() []string { return slices.Sorted(maps.Keys(t)) }

// merged is where a path of a package goes in the image: /bin, /sbin, /lib and /lib64 are links into /usr.
func merged(name string) string {
	name = strings.TrimPrefix(path.Clean("/"+name), "/")
	first, rest, _ := strings.Cut(name, "/")
	switch first {
	case "bin", "sbin", "lib", "lib64":
		return path.Join("usr", first, rest)
	}
	return name
}

// Resolve follows symbolic links, of folders above too, and returns the path at which the file itself stands. False
// when there is nothing.
func (t Tree) Resolve(name string) (string, bool) {
	parts := strings.Split(strings.Trim(name, "/"), "/")
	at := ""
	for hops := 0; len(parts) > 0; {
		part := parts[0]
		parts = parts[1:]
		switch part {
		case "", ".":
			continue
		case "..":
			at = strings.TrimPrefix(path.Dir("/"+at), "/")
			continue
		}
		next := path.Join(at, part)
		f := t[next]
		if f == nil {
			return "", false
		}
		if f.Mode&fs.ModeSymlink == 0 {
			at = next
			continue
		}
		if hops++; hops > 20 {
			return "", false
		}
		if path.IsAbs(f.Link) {
			at = ""
		}
		parts = append(strings.Split(strings.Trim(f.Link, "/"), "/"), parts...)
	}
	return at, t[at] != nil
}

// AddTar takes a package's files, in the form of a tar, as far as keep says. Owners, times and what is neither file,
// folder nor symbolic link are left behind; a hard link becomes a file of its own.
func (t Tree) AddTar(r io.Reader, source string, keep func(name string) bool) error {
	in := tar.NewReader(r)
	for {
		h, err := in.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("%s: %w", source, err)
		}
		name := merged(h.Name)
		if !keep(name) {
			continue
		}
		mode := h.FileInfo().Mode()
		switch h.Typeflag {
		case tar.TypeReg:
			data, err := io.ReadAll(in)
			if err != nil {
				return fmt.Errorf("%s: %s: %w", source, name, err)
			}
			t.Put(name, mode.Perm(), data, source) // without setuid: the programs that stay are root's or nobody's
		case tar.TypeSymlink:
			target := h.Linkname
			if !path.IsAbs(target) { // relative to where the package has it, which the merge may have moved
				target = "/" + merged(path.Join(path.Dir(path.Clean("/"+h.Name)), target))
			} else {
				target = "/" + merged(target)
			}
			t.Symlink(name, target, source)
		case tar.TypeLink:
			other := t[merged(h.Linkname)]
			if other == nil {
				return fmt.Errorf("%s: %s is a hard link to %s, which is not kept", source, name, h.Linkname)
			}
			t.Put(name, other.Mode, other.Data, source)
		}
	}
}

// AddFolder takes a folder of the sources to a folder of the image, or a file to a file: files 0644, or 0755 where the owner may execute
// them.
func (t Tree) AddFolder(from, to string) error {
	return filepath.WalkDir(from, func(file string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		rel, err := filepath.Rel(from, file)
		if err != nil {
			return err
		}
		name := path.Join(to, filepath.ToSlash(rel))
		return t.addFile(file, name)
	})
}

func (t Tree) addFile(file, name string) error {
	info, err := os.Lstat(file)
	if err != nil {
		return err
	}
	if info.Mode()&fs.ModeSymlink != 0 {
		target, err := os.Readlink(file)
		if err != nil {
			return err
		}
		t.Symlink(name, target, file)
		return nil
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	mode := fs.FileMode(0o644)
	if info.Mode()&0o100 != 0 {
		mode = 0o755
	}
	t.Put(name, mode, data, file)
	return nil
}

// WriteTar writes the tree as a tar in the order of names, all of root, all at one time.
func (t Tree) WriteTar(w io.Writer, when time.Time) error {
	out := tar.NewWriter(w)
	for _, name := range t.Names() {
		f := t[name]
		h := &tar.Header{Name: name, Mode: int64(f.Mode.Perm()), ModTime: when, Format: tar.FormatPAX}
		switch {
		case f.Mode.IsDir():
			h.Typeflag, h.Name = tar.TypeDir, name+"/"
		case f.Mode&fs.ModeSymlink != 0:
			h.Typeflag, h.Linkname = tar.TypeSymlink, f.Link
		default:
			h.Typeflag, h.Size = tar.TypeReg, int64(len(f.Data))
		}
		if err := out.WriteHeader(h); err != nil {
			return err
		}
		if _, err := out.Write(f.Data); err != nil {
			return err
		}
	}
	return out.Close()
}

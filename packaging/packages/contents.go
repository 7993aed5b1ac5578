package main

import (
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// A part is a package: yinjian, or what only an evaluation has.
type part string

const (
	product    part = "yinjian"
	evaluation part = "yinjian-evaluation"
)

// sources says which files of the repository go into which package, and where to: the very files of the sealed image where
// both have one. A folder goes with what is in it.
var sources = []struct {
	part     part
	from, to string
}{
	{product, "packaging/systemd/yinjian.service", "/usr/lib/systemd/system/yinjian.service"},
	{product, "packaging/sysusers/yinjian.conf", "/usr/lib/sysusers.d/yinjian.conf"},
	{product, "packaging/sysctl/90-yinjian.conf", "/usr/lib/sysctl.d/90-yinjian.conf"},
	{product, "packaging/modprobe/yinjian.conf", "/usr/lib/modprobe.d/yinjian.conf"},
	{product, "packaging/nftables/yinjian.nft", "/etc/yinjian/yinjian.nft"},
	{product, "packaging/time", "/usr/share/yinjian/time"},
	{product, "LICENSE", "/usr/share/doc/yinjian/copyright"},
	{product, "CHANGELOG.md", "/usr/share/doc/yinjian/CHANGELOG.md"},
	{product, "docs/packages.md", "/usr/share/doc/yinjian/packages.md"},
	{product, "docs/third-party.md", "/usr/share/doc/yinjian/third-party.md"},
	{evaluation, "packaging/evaluation/yinjian-softtoken.service", "/usr/lib/systemd/system/yinjian-softtoken.service"},
	{evaluation, "packaging/evaluation/sysusers.conf", "/usr/lib/sysusers.d/yinjian-evaluation.conf"},
	{evaluation, "LICENSE", "/usr/share/doc/yinjian-evaluation/copyright"},
}

// An entry is one file of a package.
type entry struct {
	part part
	to   string
	mode fs.FileMode // permissions; with ModeSymlink, data is the target
	data []byte
}

// config says whether the site may change a file, which an upgrade then leaves alone.
func (e entry) config() bool { return strings.HasPrefix(e.to, "/etc/") }

// collect reads sources below root, and adds the links by which the programs are found.
func collect(root string) ([]entry, error) {
	entries := []entry{
		{product, "/usr/bin/yinjian", fs.ModeSymlink | 0o777, []byte("../lib/yinjian/yinjian")},
		{product, "/usr/bin/yinjian-verify", fs.ModeSymlink | 0o777, []byte("../lib/yinjian/yinjian-verify")},
	}
	for _, s := range sources {
		top := filepath.Join(root, s.from)
		err := filepath.WalkDir(top, func(name string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			if !d.Type().IsRegular() {
				return fmt.Errorf("%s is not a file", name)
			}
			data, err := os.ReadFile(name)
			if err != nil {
				return err
			}
			below, err := filepath.Rel(top, name)
			if err != nil {
				return err
			}
			entries = append(entries, entry{s.part, path.Join(s.to, filepath.ToSlash(below)), 0o644, data})
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return entries, nil
}

// folders are those that only we have files in.
func folders(p part, entries []entry) []string {
	var all []string
	for _, e := range entries {
		for dir := path.Dir(e.to); e.part == p && strings.Contains(dir, "/yinjian"); dir = path.Dir(dir) {
			all = append(all, dir)
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// check refuses what no package of ours may do: the same place twice, write where a site or its data is, be writable or
// setuid, or be put where the system looks for programs but by a link.
func check(entries []entry) error {
	seen := map[string]bool{}
	for _, e := range entries {
		mode := e.mode.Perm()
		switch {
		case seen[e.to]:
			return fmt.Errorf("%s is packed twice", e.to)
		case path.Clean(e.to) != e.to || !slices.ContainsFunc([]string{"/usr/", "/etc/yinjian/"}, func(top string) bool { return strings.HasPrefix(e.to, top) }):
			return fmt.Errorf("%s is not a place for our files", e.to)
		case e.mode&fs.ModeSymlink == 0 && (mode&0o022 != 0 || e.mode&(fs.ModeSetuid|fs.ModeSetgid) != 0 || mode&0o444 != 0o444):
			return fmt.Errorf("%s has mode %v", e.to, e.mode)
		}
		seen[e.to] = true
	}
	return nil
}

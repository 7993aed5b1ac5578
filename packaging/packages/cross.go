package main

import (
	"os"
	"path/filepath"

	"yinjian/iso/build"
)

// static are the programs without cgo: they run on any Linux of their architecture, whatever its C library.
var static = []string{"./appliance/cmd/yinjian-verify", "./iso/init", "./iso/install", "./iso/console", "./iso/power", "./iso/paint"}

// whole are the architectures for which there is a C compiler in Debian 12, and so all programs; static ones are made for
// loong64 too.
var whole = []string{"arm64"}

// cross builds the programs for other architectures, out/ARCH/NAME each.
func cross(out string) error {
	put := func(arch, name string, data []byte, err error) error {
		if err == nil {
			err = os.MkdirAll(filepath.Join(out, arch), 0o755)
		}
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(out, arch, name), data, 0o755)
	}
	scratch, err := os.MkdirTemp("", "cross")
	if err != nil {
		return err
	}
	defer os.RemoveAll(scratch)
	for _, arch := range append([]string{"loong64"}, whole...) {
		for _, pkg := range static {
			data, err := build.Program(".", arch, scratch, pkg, false)
			name := filepath.Base(pkg)
			if filepath.Dir(pkg) == "iso" {
				name = "yinjian-" + name
			}
			if err := put(arch, name, data, err); err != nil {
				return err
			}
		}
	}
	for _, arch := range whole {
		data, err := build.Program(".", arch, scratch, "./appliance/cmd/yinjian", true)
		if err := put(arch, "yinjian", data, err); err != nil {
			return err
		}
		data, err = build.Module(".", arch, scratch)
		if err := put(arch, "libyinjian-p11.so", data, err); err != nil {
			return err
		}
	}
	return nil
}

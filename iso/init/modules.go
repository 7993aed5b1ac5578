//go:build linux

package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"golang.org/x/sys/unix"

	"yinjian/iso/layout"
)

var moduleName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_-]*\.ko$`)

// moduleOrder reads the list of modules: a file name a line, in the order in which they are loaded.
func moduleOrder(list string) (names []string, err error) {
	for name := range strings.Lines(list) {
		name = strings.TrimSuffix(name, "\n")
		if !moduleName.MatchString(name) {
			return nil, fmt.Errorf("%s: %q is no name of a module", layout.ModulesOrder, name)
		}
		names = append(names, name)
	}
	return names, nil
}

// loadModules loads what the initramfs brings. A driver that finds no hardware of its own, or is there already, is no
// fault, and one that cannot be loaded for another reason is told: if the root needs it, the root will be missing.
func loadModules() error {
	list, err := os.ReadFile(layout.ModulesOrder)
	if err != nil {
		return err
	}
	names, err := moduleOrder(string(list))
	if err != nil {
		return err
	}
	for _, name := range names {
		f, err := os.Open(filepath.Join(layout.ModulesDir, name))
		if err != nil {
			return err
		}
		err = unix.FinitModule(int(f.Fd()), "", 0)
		f.Close()
		if err != nil && !errors.Is(err, unix.EEXIST) && !errors.Is(err, unix.ENODEV) {
			tell(4, fmt.Sprintf("module %s: %v", name, err))
		}
	}
	return nil
}

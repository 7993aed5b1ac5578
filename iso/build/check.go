package build

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"regexp"
	"slices"
	"strings"

	"yinjian/iso/layout"
)

// forbidden are programs that a sealed machine must not have, by name: what an intruder would run next.
var forbidden = regexp.MustCompile(`^(sh|bash|dash|ash|ksh|zsh|csh|tcsh|fish|busybox|toybox|rbash|sulogin|login|agetty|getty|su|sudo|doas|pkexec|` +
	`perl[0-9.]*|python[0-9.]*|lua[0-9.]*|ruby[0-9.]*|node|php[0-9.]*|tclsh|expect|awk|gawk|mawk|sed|ed|vi|vim|nano|emacs|` +
	`apt|apt-.*|dpkg|dpkg-.*|rpm|rpm2.*|dnf|yum|microdnf|zypper|snap|flatpak|pip[0-9.]*|` +
	`ssh|sshd|scp|sftp.*|telnet.*|rsh|rlogin|ftp|tftp|curl|wget|nc|ncat|netcat|socat|gdb|gdbserver|strace|ltrace|perf|tcpdump|` +
	`gcc.*|cc|as|ld|ld\..*|make|passwd|chpasswd|useradd|usermod|adduser|systemd-run|systemd-nspawn|machinectl|kexec|debugfs)$`)

// Check is what must hold of every image's tree, before anything is packed. All that is wrong is said.
func Check(t Tree, variant string, modules []string) error {
	var errs []error
	say := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	for _, name := range t.Names() {
		f := t[name]
		switch {
		case f.Mode&(fs.ModeSetuid|fs.ModeSetgid) != 0:
			say("%s is setuid or setgid", name)
		case f.Mode.Perm()&0o022 != 0 && f.Mode&fs.ModeSymlink == 0:
			say("%s can be written by others than root: %#o", name, f.Mode.Perm())
		}
		if f.Mode.IsDir() {
			continue
		}
		if f.Mode&fs.ModeSymlink != 0 {
			// What is made at the start (/run, /proc, /dev, /data, /var) cannot be looked at here.
			target := f.Link
			if !path.IsAbs(target) {
				target = path.Join("/", path.Dir(name), target)
			}
			first, _, _ := strings.Cut(strings.TrimPrefix(target, "/"), "/")
			if _, there := t.Resolve(target); !there && !slices.Contains([]string{"run", "proc", "dev", "data", "var"}, first) {
				say("%s is a link to %s, which is not there", name, f.Link)
			}
			if forbidden.MatchString(path.Base(f.Link)) && !strings.HasPrefix(f.Link, "/dev/") {
				say("%s is a link to %s", name, f.Link)
			}
		}
		if dir := path.Base(path.Dir(name)); (dir == "bin" || dir == "sbin" || f.Mode.Perm()&0o111 != 0 && f.Mode.IsRegular()) &&
			forbidden.MatchString(path.Base(name)) {
			say("%s: no image has such a program", name)
		}
		if bytes.HasPrefix(f.Data, []byte("#!")) {
			say("%s is a script", name)
		}
		if strings.HasPrefix(name, "usr/lib/modules/") && strings.Contains(path.Base(name), ".ko") && !slices.Contains(modules, moduleName(name)) {
			say("%s: this module is not on the base's list", name)
		}
	}
	for name, to := range links {
		if f := t[name]; f == nil || f.Link != to {
			say("%s is no link to %s", name, to)
		}
	}
	for _, name := range []string{"etc/shadow", "etc/gshadow"} {
		if f := t[name]; f != nil {
			for line := range strings.Lines(string(f.Data)) {
				if field := strings.Split(line, ":"); len(field) > 1 && field[1] != "!*" && field[1] != "*" {
					say("%s: %s has something like a password", name, field[0])
				}
			}
		}
	}
	if f := t["etc/passwd"]; f == nil {
		say("etc/passwd is missing")
	} else {
		for line := range strings.Lines(strings.TrimSpace(string(f.Data))) {
			field := strings.Split(strings.TrimSpace(line), ":")
			if len(field) != 7 || field[1] != "x" || field[6] != "/usr/sbin/nologin" {
				say("etc/passwd: %q: want no password and no shell", line)
			}
		}
	}
	_, soft := t["usr/lib/yinjian/libyinjian-p11.so"]
	if soft != (variant == layout.Evaluation) {
		say("the software cipher machine belongs into the evaluation image and into no other")
	}
	return errors.Join(errs...)
}

// unaccounted lists the programs and libraries of which the tree does not say where they came from.
func unaccounted(t Tree) error {
	var errs []error
	for _, name := range t.Names() {
		if f := t[name]; f.Source == "" || f.Source == "made" && bytes.HasPrefix(f.Data, []byte(elf.ELFMAG)) {
			errs = append(errs, fmt.Errorf("%s came from nowhere", name))
		}
	}
	return errors.Join(errs...)
}

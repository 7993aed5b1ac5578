//go:build linux

// Command tiny stands in the place of systemd in the smallest root that init can start: it says that it runs and what it
// was told, reads a large file when it is asked to, and switches the machine off. For the tests of init alone.
package main

import (
	"bufio"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"yinjian/iso/layout"
)

func main() {
	console, err := os.OpenFile("/dev/console", os.O_RDWR, 0)
	if err != nil {
		panic(err)
	}
	say := func(format string, args ...any) { fmt.Fprintf(console, "tiny: "+format+"\r\n", args...) }
	record, err := os.ReadFile(layout.BootRecord)
	say("booted %s %v", record, err)
	mounts, err := os.ReadFile("/proc/mounts")
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, " squashfs ") || strings.Contains(line, " iso9660 ") {
			say("mount %s", strings.TrimSpace(line))
		}
	}
	left, err := os.ReadDir("/")
	for _, e := range left {
		say("root has %s %v", e.Name(), err)
	}
	if err := os.WriteFile("/usr/new", nil, 0o600); err != nil {
		say("write refused: %v", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REMOUNT, ""); err != nil {
		say("remount refused: %v", err)
	}
	say("UP")
	in := bufio.NewScanner(console)
	for in.Scan() {
		switch in.Text() {
		case "read":
			b, err := os.ReadFile("/filler")
			say("read %d bytes, %v", len(b), err)
		case "off":
			if err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF); err != nil {
				say("%v", err)
			}
		}
	}
	panic(in.Err())
}

//go:build linux

// Command init is the first program of the sealed image, alone in its initramfs. It believes the signed command line and
// nothing else: it finds the root that the command line names, on a disk by partition UUID or on the installation medium,
// puts dm-verity over it, reads all of it once, and hands over to systemd. Whatever is not as it should be is told on the
// console in one line, and the machine restarts: there is no shell, no other root and no way to go on.
//
// What the boot loader puts beside us under /.extra is dropped, but for the PCR policy, which carries a signature of its
// own: credentials and extensions there come unsigned from the EFI system partition.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"yinjian/iso/layout"
	"yinjian/iso/screen"
	"yinjian/iso/verity"
)

const (
	sysroot = "/sysroot"
	systemd = "/usr/lib/systemd/systemd"
	extra   = "/.extra" // where systemd-stub puts what it found
)

// A refusal is why nothing is started: a code for programs and tests, and the reason in both languages. The English one
// goes to every console by the kernel's log and is ASCII, since nobody may be there to paint Chinese.
type refusal struct {
	code, zh, en string
	cause        error
}

func (r *refusal) Error() string {
	if r.cause != nil {
		return fmt.Sprintf("REFUSED [%s] %s: %v", r.code, r.en, r.cause)
	}
	return fmt.Sprintf("REFUSED [%s] %s", r.code, r.en)
}

// patience is how often devices are looked for, pause apart: a minute for a slow controller.
const (
	patience = 1200
	pause    = 50 * time.Millisecond
)

func main() {
	err := boot()
	var r *refusal
	if !errors.As(err, &r) {
		r = &refusal{code: "internal", zh: "内部错误", en: "internal error", cause: err}
	}
	tell(2, r.Error())
	console("拒绝启动 REFUSED [" + r.code + "]：" + r.zh + "。数秒后重新启动 (restarting)")
	time.Sleep(5 * time.Second) // for whoever stands before the screen
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART) // no way to fail for the first process; should it, its end panics the kernel
}

// tell writes a line to the kernel's log, which goes to all consoles according to its level.
func tell(level int, text string) {
	k, err := os.OpenFile("/dev/kmsg", os.O_WRONLY, 0)
	if err != nil {
		return // nobody can be told
	}
	defer k.Close()
	fmt.Fprintf(k, "<%d>yinjian-init: %s\n", level, strings.ReplaceAll(text, "\n", "; "))
}

// console writes a line to each of the kernel's consoles, whatever the log level: to the screen and to the serial lines.
func console(text string) {
	names, _ := os.ReadFile("/sys/class/tty/console/active")
	all := strings.Fields(string(names))
	if len(all) == 0 {
		all = []string{"console"}
	}
	for _, name := range all {
		c, err := os.OpenFile("/dev/"+name, os.O_WRONLY|unix.O_NOCTTY, 0)
		if err != nil {
			continue // one without hardware behind it
		}
		fmt.Fprintf(c, "\r\nyinjian-init: %s\r\n", text)
		c.Close()
	}
}

// paint writes Chinese on the screen until init ends or hands over, where there is a screen for it. It is nobody's duty: what fails
// leaves the screen to the kernel, and nothing waits.
func paint() {
	defer func() { _ = recover() }() // the first process must not end for a picture
	_ = screen.Watch(func() (screen.Font, error) {
		text, err := os.ReadFile(layout.ScreenFont)
		if err != nil {
			return nil, err
		}
		return screen.ParseFont(text)
	})
}

func mount(source, target, kind string, flags uintptr, data string) error {
	if err := os.MkdirAll(target, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(source, target, kind, flags, data); err != nil {
		return fmt.Errorf("mounting %s on %s: %w", source, target, err)
	}
	return nil
}

// boot returns only with an error.
func boot() error {
	const closed = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	// 1. The kernel's file systems.
	for _, m := range []struct {
		source, target, kind string
		flags                uintptr
		data                 string
	}{
		{"proc", "/proc", "proc", closed, ""},
		{"sysfs", "/sys", "sysfs", closed, ""},
		{"devtmpfs", "/dev", "devtmpfs", unix.MS_NOSUID | unix.MS_NOEXEC, "mode=0755"},
		{"tmpfs", "/run", "tmpfs", closed, "mode=0755"},
	} {
		if err := mount(m.source, m.target, m.kind, m.flags, m.data); err != nil {
			return err
		}
	}

	go paint()

	// 2. What was signed.
	text, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	line, err := layout.ParseCommandLine(string(text))
	if err != nil {
		return &refusal{"command-line", "内核命令行不是本系统签发的", "the kernel command line is not ours", err}
	}

	// 3. Drivers. One whose hardware is not there loads and finds nothing; a missing file is a fault of the image.
	if err := loadModules(); err != nil {
		return &refusal{"modules", "驱动程序不全", "drivers are missing", err}
	}

	// 4. The device that holds the root.
	found, err := wait(func() (*source, error) {
		if line.Media == layout.MediaISO {
			return onMedium(line.Root)
		}
		return onDisk(os.DirFS("/sys/block"), openDisk, line.Root)
	})
	if err != nil {
		return err
	}

	// 5. Verity, at first with errors instead of restarts, so that what is wrong can be told; and everything read once:
	// verity looks only at what is read, and one changed byte anywhere shall refuse the start, not some day later.
	v, err := verity.Open("root", found.root, line.Root)
	if err == nil {
		err = unix.Mknod(layout.VerityDev, unix.S_IFBLK|0o600, int(v.Number))
	}
	if err != nil {
		return &refusal{"verity", "无法建立根文件系统的校验", "dm-verity cannot be set up", err}
	}
	if err := verity.ReadAll(layout.VerityDev, line.Root.DataBlocks); err != nil {
		return &refusal{"root-changed", "系统盘上的系统已被改动或损坏", "the root is not what was signed", err}
	}
	if err := verity.SameSuperblock(found.root, line.Root); err != nil {
		return &refusal{"root-superblock", "系统盘上的校验块已被改动或损坏", "the root's superblock is not what was signed", err}
	}
	if err := v.Restart(); err != nil {
		return &refusal{"verity", "无法建立根文件系统的校验", "dm-verity cannot be set up", err}
	}
	done := fmt.Sprintf("verified %d blocks of %s", line.Root.DataBlocks, found.root)
	if up, err := os.ReadFile("/proc/uptime"); err == nil { // proc(5): seconds since the kernel's start, and idle
		since, _, _ := strings.Cut(string(up), " ")
		done += ", up " + since + " s"
	}
	tell(6, done)
	console("系统完整性校验通过 " + done)

	if found.held != nil {
		found.held.Close() // dm-verity has it
	}

	// 6. The root, and what the started system is told.
	if err := mount(layout.VerityDev, sysroot, "squashfs", unix.MS_RDONLY|unix.MS_NODEV|unix.MS_NOSUID, ""); err != nil {
		return &refusal{"root-mount", "无法挂载根文件系统", "the root cannot be mounted", err}
	}
	if err := handOver(found, line.Media); err != nil {
		return err
	}
	return switchRoot()
}

// wait tries until there is something, an error that no waiting mends, or no patience left.
func wait(try func() (*source, error)) (*source, error) {
	for range patience {
		if s, err := try(); s != nil || err != nil {
			return s, err
		}
		time.Sleep(pause)
	}
	return nil, &refusal{code: "root-missing", zh: "找不到与本次启动相符的系统盘或安装介质", en: "no disk or medium carries the root that this kernel was signed for"}
}

func handOver(found *source, media string) error {
	record, err := json.Marshal(layout.Booted{Media: media, Disk: found.disk, Root: found.root, Slot: found.slot})
	if err != nil {
		return err
	}
	if err := os.WriteFile(layout.BootRecord, record, 0o444); err != nil {
		return err
	}
	// systemd-cryptsetup looks for these two under /run/systemd.
	if err := os.MkdirAll("/run/systemd", 0o755); err != nil {
		return err
	}
	for _, name := range []string{"tpm2-pcr-signature.json", "tpm2-pcr-public-key.pem"} {
		b, err := os.ReadFile(filepath.Join(extra, name))
		if errors.Is(err, fs.ErrNotExist) {
			continue // a kernel that was signed without a policy, or started in a laboratory without systemd-stub
		}
		if err == nil {
			err = os.WriteFile(filepath.Join("/run/systemd", name), b, 0o444)
		}
		if err != nil {
			return err
		}
	}
	if media == layout.MediaISO {
		return mount(mediumDir, layout.MediaRun, "", unix.MS_MOVE, "")
	}
	return nil
}

// switchRoot makes the root the root and starts systemd in our place.
func switchRoot() error {
	for _, name := range []string{extra, layout.ModulesDir, layout.ScreenFont} { // the memory of the initramfs
		if err := os.RemoveAll(name); err != nil {
			return err
		}
	}
	for _, name := range []string{"/proc", "/sys", "/dev", "/run"} {
		if err := unix.Mount(name, sysroot+name, "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("moving %s: %w", name, err)
		}
	}
	if err := os.Chdir(sysroot); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("moving the root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return err
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}
	return fmt.Errorf("starting %s: %w", systemd, unix.Exec(systemd, []string{systemd}, []string{"TERM=linux"}))
}

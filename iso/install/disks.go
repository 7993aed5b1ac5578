package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"regexp"
	"strconv"
	"strings"

	"yinjian/iso/layout"
)

// A disk is one that could be installed on.
type disk struct {
	name   string // of the kernel
	serial string // "" if the disk does not tell
	size   int64  // bytes
	sector int64
	blank  bool
	token  string // that allows to wipe it, as it is now; "" for a blank one
}

func (d disk) String() string {
	s := fmt.Sprintf("%s  %d GB", d.name, d.size/1e9)
	if d.serial != "" {
		s += "  序列号 " + d.serial
	}
	if d.blank {
		return s + "  空白 (blank)"
	}
	return s + "  有内容，擦除码 (not blank, token to wipe it) " + d.token
}

// A device is an open disk.
type device interface {
	io.ReaderAt
	io.Closer
}

func attribute(sys fs.FS, names ...string) string {
	for _, name := range names {
		if b, err := fs.ReadFile(sys, name); err == nil {
			if s := strings.TrimSpace(strings.Map(func(r rune) rune {
				if r <= ' ' || r > '~' { // some controllers pad with zeros
					return ' '
				}
				return r
			}, string(b))); s != "" {
				return strings.Join(strings.Fields(s), "_")
			}
		}
	}
	return ""
}

// findDisks lists the disks of sys (/sys/block) that are fixed, not on USB, can be written and are not one of the used
// (kernel names).
func findDisks(sys fs.FS, open func(name string) (device, error), used []string) (disks []disk, err error) {
	entries, err := fs.ReadDir(sys, ".")
	if err != nil {
		return nil, err
	}
next:
	for _, e := range entries {
		name := e.Name()
		for _, prefix := range []string{"loop", "ram", "zram", "dm-", "md", "nbd", "fd", "sr"} {
			if strings.HasPrefix(name, prefix) {
				continue next
			}
		}
		for _, u := range used {
			if u == name || partitionOf(u, name) {
				continue next
			}
		}
		sectors, err := strconv.ParseInt(attribute(sys, name+"/size"), 10, 64)
		if err != nil || sectors == 0 || attribute(sys, name+"/ro") == "1" || attribute(sys, name+"/removable") == "1" {
			continue
		}
		if onUSB(sys, name) { // the installed system has no driver for it
			continue
		}
		d := disk{name: name, size: sectors * 512, serial: attribute(sys, name+"/serial", name+"/device/serial", name+"/device/wwid")}
		if d.sector, err = strconv.ParseInt(attribute(sys, name+"/queue/logical_block_size"), 10, 64); err != nil {
			continue
		}
		f, err := open("/dev/" + name)
		if err != nil {
			continue
		}
		d.blank, err = layout.Blank(f, d.size)
		if err == nil && !d.blank {
			d.token, err = wipeToken(f, d)
		}
		f.Close()
		if err != nil {
			continue // a disk that cannot be read
		}
		disks = append(disks, d)
	}
	return disks, nil
}

// onUSB says whether a disk hangs on a USB bus: its entry of sysfs is a link to the device's place.
func onUSB(sys fs.FS, name string) bool {
	place, err := fs.ReadLink(sys, name)
	return err == nil && strings.Contains(place, "/usb")
}

// partitionOf says whether a kernel name is one of disk's partitions.
func partitionOf(name, disk string) bool {
	rest, ok := strings.CutPrefix(name, disk)
	rest = strings.TrimPrefix(rest, "p")
	_, err := strconv.Atoi(rest)
	return ok && err == nil
}

var wipeForm = regexp.MustCompile(`^wipe-[0-9a-f]{16}$`)

// wipeToken is for one disk and what is on it: what the installer writes changes it, so that an answer disk that was
// forgotten in a machine cannot wipe the machine's installation.
func wipeToken(r io.ReaderAt, d disk) (string, error) {
	h := sha256.New()
	fmt.Fprintf(h, "yinjian wipe\x00%s\x00%s\x00%d\x00", d.name, d.serial, d.size)
	b := make([]byte, layout.Align)
	for _, at := range []int64{0, max(0, d.size-layout.Align)} {
		n, err := r.ReadAt(b, at)
		if err != nil && !errors.Is(err, io.EOF) {
			return "", err
		}
		h.Write(b[:n])
	}
	return "wipe-" + hex.EncodeToString(h.Sum(nil)[:8]), nil
}

// choose is the disk that the answers allow, or why there is none; least is the size that is needed.
func choose(disks []disk, a Answers, least int64) (disk, error) {
	list := func() string {
		var b bytes.Buffer
		for _, d := range disks {
			fmt.Fprintf(&b, "\n  %s", d)
		}
		if len(disks) == 0 {
			b.WriteString("\n  没有可用的硬盘 (no disk at all)")
		}
		return b.String()
	}
	var fit []disk
	for _, d := range disks {
		if a.Disk == "" && d.blank && d.size >= least || a.Disk != "" && (d.name == a.Disk || d.serial == a.Disk) {
			fit = append(fit, d)
		}
	}
	switch {
	case len(fit) > 1:
		return disk{}, fmt.Errorf("符合的硬盘不止一块，请用 disk 指明 (more than one disk fits, name one):%s", list())
	case len(fit) == 0 && a.Disk != "":
		return disk{}, fmt.Errorf("找不到硬盘 %s (no such disk):%s", a.Disk, list())
	case len(fit) == 0:
		return disk{}, fmt.Errorf("没有容量足够（%d GB）的空白硬盘 (no blank disk that is large enough):%s", (least+1e9-1)/1e9, list())
	}
	d := fit[0]
	switch {
	case d.size < least:
		return disk{}, fmt.Errorf("硬盘 %s 太小，至少 %d GB (too small):%s", d.name, (least+1e9-1)/1e9, list())
	case d.sector != 512 && d.sector != 4096:
		return disk{}, fmt.Errorf("硬盘 %s 的扇区为 %d 字节，不支持 (sectors of an unsupported size)", d.name, d.sector)
	// A blank one needs no token and takes any: an installation over something old that was cut off goes on by itself.
	case !d.blank && a.Wipe != d.token:
		return disk{}, fmt.Errorf("硬盘 %s 不是擦除码所指的内容，未写入任何数据 (not blank, or changed since the token to wipe it was shown; nothing was written):%s", d.name, list())
	}
	return d, nil
}

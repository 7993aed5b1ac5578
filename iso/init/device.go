//go:build linux

package main

import (
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"yinjian/iso/layout"
	"yinjian/iso/verity"
)

// A source is where the root was found.
type source struct {
	disk string    // whole disk or medium
	root string    // partition or loop device
	slot int       // number of the partition; 0 on a medium
	held io.Closer // a loop device, which goes away with its last user; nil: a partition
}

// number reads a decimal attribute of sysfs.
func number(sys fs.FS, name string) (int64, error) {
	b, err := fs.ReadFile(sys, name)
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
}

// sysfsSector is what sysfs counts sizes in, whatever the disk's sectors are.
const sysfsSector = 512

// onDisk looks through all disks for the partition that has the root's UUID. sys is /sys/block. Nil and no error when
// there is none yet; two are refused, because nobody knows which of two copies has the data that belongs to it.
func onDisk(sys fs.FS, open func(disk string) (diskReader, error), root layout.Root) (*source, error) {
	names, err := disks(sys)
	if err != nil {
		return nil, err
	}
	var found *source
	for _, disk := range names {
		s, err := onThis(sys, disk, open, root)
		if err != nil {
			return nil, err
		}
		if s != nil && found != nil {
			return nil, &refusal{code: "root-twice", zh: "两块硬盘上有同一系统，请取下一块", en: fmt.Sprintf("two disks carry this root, %s and %s: take one out", found.disk, s.disk)}
		}
		if s != nil {
			found = s
		}
	}
	return found, nil
}

// A diskReader is an open disk.
type diskReader interface {
	io.ReaderAt
	io.Closer
}

func openDisk(name string) (diskReader, error) { return os.Open(name) }

// disks are the block devices of hardware, in the order of their names.
func disks(sys fs.FS) (names []string, err error) {
	entries, err := fs.ReadDir(sys, ".")
	for _, e := range entries {
		made := func(prefix string) bool { return strings.HasPrefix(e.Name(), prefix) }
		if !made("loop") && !made("ram") && !made("zram") && !made("dm-") && !made("md") && !made("nbd") && !made("fd") {
			names = append(names, e.Name())
		}
	}
	return names, err
}

func onThis(sys fs.FS, disk string, open func(string) (diskReader, error), root layout.Root) (*source, error) {
	sectors, err := number(sys, disk+"/size")
	if err != nil || sectors == 0 {
		return nil, nil // gone again, or an empty drive
	}
	f, err := open("/dev/" + disk)
	if err != nil {
		return nil, nil
	}
	defer f.Close()
	table, err := layout.ReadTable(f, sectors*sysfsSector)
	if err != nil {
		return nil, nil // somebody else's disk
	}
	slot := table.ByUUID(root.PartitionUUID())
	if slot == 0 {
		return nil, nil
	}
	p := table.Partitions[slot-1]
	name := layout.DeviceName(disk, slot)
	if have, want := table.Size(p), int64(root.Blocks())*layout.BlockSize; have < want {
		return nil, &refusal{code: "root-short", zh: "系统盘上的系统不完整", en: fmt.Sprintf("the partition %s has %d bytes, the root %d", name, have, want)}
	}
	// The kernel reads the table by itself; it must have understood the same.
	start, err1 := number(sys, disk+"/"+name+"/start")
	size, err2 := number(sys, disk+"/"+name+"/size")
	if err1 != nil || err2 != nil {
		return nil, nil // not yet
	}
	if start*sysfsSector != table.Offset(p) || size*sysfsSector != table.Size(p) {
		return nil, &refusal{code: "root-table", zh: "分区表已被改动或损坏", en: fmt.Sprintf("the kernel sees %s elsewhere than the partition table says", name)}
	}
	return &source{disk: "/dev/" + disk, root: "/dev/" + name, slot: slot}, nil
}

// mediumDir is where the installation medium is mounted in the initramfs.
const mediumDir = "/medium"

// The primary volume descriptor (ECMA-119 clause 8.4): sector 16 of 2048 bytes, type 1, and the volume identifier,
// filled with spaces.
const (
	descriptorAt   = 16 * 2048
	volumeIDAt     = 40
	volumeIDLength = 32
)

// isoLabel is the volume identifier of an ISO 9660 file system, "" if that is none.
func isoLabel(r io.ReaderAt) string {
	var d [volumeIDAt + volumeIDLength]byte
	if _, err := r.ReadAt(d[:], descriptorAt); err != nil || string(d[:7]) != "\x01CD001\x01" {
		return ""
	}
	return strings.TrimRight(string(d[volumeIDAt:]), " ")
}

// onMedium looks for the installation medium, a CD or a stick that it was copied to, and puts a loop device over the
// root's file on it. A medium whose file has not the root's size is not the one.
func onMedium(root layout.Root) (*source, error) {
	names, err := disks(os.DirFS("/sys/block"))
	if err != nil {
		return nil, err
	}
	for _, disk := range names {
		f, err := os.Open("/dev/" + disk)
		if err != nil {
			continue
		}
		label := isoLabel(f)
		f.Close()
		if label != layout.ISOLabel {
			continue
		}
		if err := mount("/dev/"+disk, mediumDir, "iso9660", unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
			return nil, &refusal{"medium", "安装介质无法读取", "the installation medium cannot be read", err}
		}
		image, err := os.Open(filepath.Join(mediumDir, layout.MediaDir, layout.RootImage))
		if err != nil {
			return nil, &refusal{"medium", "安装介质不完整", "the installation medium is not whole", err}
		}
		defer image.Close()
		if st, err := image.Stat(); err != nil || st.Size() != int64(root.Blocks())*layout.BlockSize {
			return nil, &refusal{"root-short", "安装介质上的系统不完整", "the root on the medium is of another size than was signed", err}
		}
		loop, err := verity.Loop(image, 0, 0)
		if err != nil {
			return nil, &refusal{"medium", "安装介质无法读取", "no loop device over the medium's root", err}
		}
		return &source{disk: "/dev/" + disk, root: loop.Name(), held: loop}, nil
	}
	return nil, nil
}

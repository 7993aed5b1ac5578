package pack

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"yinjian/appliance/problem"
	"yinjian/iso/layout"
	"yinjian/iso/verity"
)

// System mounts by the kernel: a loop device over the file, dm-verity over that, squashfs over both.
type System struct{}

func (System) Mount(file *os.File, start int64, root layout.Root, name, at string) error {
	loop, err := verity.Loop(file, start, int64(root.Blocks())*layout.BlockSize)
	if err != nil {
		return err
	}
	defer loop.Close() // dm-verity has it, or nobody
	device, err := verity.Open(name, loop.Name(), root)
	if err != nil {
		return err
	}
	if err := Squashfs(device.Node(), at); err != nil {
		return errors.Join(err, verity.Remove(name))
	}
	// The device goes with its last user: nothing is left when the folder is unmounted, by whom ever.
	return verity.Remove(name)
}

// Squashfs mounts a device read-only, without devices and without programs that give privileges.
func Squashfs(device, at string) error {
	if err := unix.Mount(device, at, "squashfs", unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV, ""); err != nil {
		return fmt.Errorf("mounting %s on %s: %w", device, at, err)
	}
	return nil
}

// busyTries is how often an unmount is tried: udev and others look into a device for a moment when it appears.
const busyTries = 20

func (System) Unmount(at string) error {
	var err error
	for range busyTries {
		if err = unix.Unmount(at, unix.UMOUNT_NOFOLLOW); err == nil || !errors.Is(err, unix.EBUSY) {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("%w: %s", ErrBusy, at)
	}
	return err
}

// isMount says whether something is mounted on a folder; one that is not there has nothing.
func isMount(at string) (bool, error) {
	var below, here unix.Stat_t
	if err := unix.Stat(at, &here); errors.Is(err, unix.ENOENT) {
		return false, nil
	} else if err != nil {
		return false, err
	}
	if err := unix.Stat(filepath.Dir(at), &below); err != nil {
		return false, err
	}
	return here.Dev != below.Dev, nil
}

func full(err error) bool { return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) }

// room refuses what would leave too little room on the volume.
func (k *Keeper) room(size int64) error {
	var s unix.Statfs_t
	if err := unix.Statfs(k.cfg.Dir, &s); err != nil {
		return fmt.Errorf("%s: %w", k.cfg.Dir, err)
	}
	if free := int64(s.Bavail) * s.Bsize; free < size+reserve {
		return refuse(problem.DiskReserve, fmt.Sprintf("数据卷余 %d MiB，装此包后须留 %d MiB (too little room on the data volume)", free>>20, reserve>>20), "腾出空间后再试 (make room, and try again)")
	}
	return nil
}

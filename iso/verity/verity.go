//go:build linux

// Package verity puts dm-verity over a device whose hash tree layout describes, by the kernel's own interfaces: what init does
// over the root and the agent of packs over a pack. Documents: Documentation/admin-guide/device-mapper/verity.rst and
// include/uapi/linux/{dm-ioctl,loop}.h.
package verity

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"yinjian/iso/layout"
)

// sector is what device mapper counts in, whatever the disk's sectors are.
const sector = 512

// A Device is a device-mapper device with one verity target.
type Device struct {
	Number uint64 // of the device
	name   string
	below  string // major:minor of the device underneath
	root   layout.Root
}

// Open makes the device, under a name of device mapper's, and loads a table that answers errors for blocks that do not verify.
// Where something fails, no device is left.
func Open(name, device string, root layout.Root) (*Device, error) {
	var st unix.Stat_t
	if err := unix.Stat(device, &st); err != nil {
		return nil, fmt.Errorf("%s: %w", device, err)
	}
	v := &Device{name: name, below: fmt.Sprintf("%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev)), root: root}
	var err error
	if v.Number, err = ioctl(unix.DM_DEV_CREATE, name, 0, nil); err != nil {
		return nil, fmt.Errorf("DM_DEV_CREATE: %w", err)
	}
	if err := v.load(false); err != nil {
		return nil, errors.Join(err, Remove(name))
	}
	return v, nil
}

// Remove takes the device of that name away, or has the kernel do it when its last user has closed it. One that is not there
// is no error.
func Remove(name string) error {
	if _, err := ioctl(unix.DM_DEV_REMOVE, name, deferred, nil); err != nil && !errors.Is(err, unix.ENXIO) {
		return fmt.Errorf("DM_DEV_REMOVE: %w", err)
	}
	return nil
}

// deferred is DM_DEFERRED_REMOVE of dm-ioctl.h.
const deferred = 1 << 17

// Restart has a block that does not verify restart the machine, from now on.
func (v *Device) Restart() error { return v.load(true) }

// Node is the kernel's own name of the device, which devtmpfs has.
func (v *Device) Node() string { return fmt.Sprintf("/dev/dm-%d", unix.Minor(v.Number)) }

// load puts a table in the place of the one before.
func (v *Device) load(restart bool) error {
	spec := target(v.root.DataBlocks*layout.BlockSize/sector, v.root.Table(v.below, restart))
	if _, err := ioctl(unix.DM_TABLE_LOAD, v.name, unix.DM_READONLY_FLAG, spec); err != nil {
		return fmt.Errorf("DM_TABLE_LOAD: %w", err)
	}
	if _, err := ioctl(unix.DM_DEV_SUSPEND, v.name, 0, nil); err != nil { // without DM_SUSPEND_FLAG: resume
		return fmt.Errorf("DM_DEV_SUSPEND: %w", err)
	}
	return nil
}

// ioctl sends a request about the device of that name, with what follows the header, and answers the device's number.
func ioctl(request uint, name string, flags uint32, payload []byte) (uint64, error) {
	control, err := os.OpenFile("/dev/mapper/control", os.O_RDWR, 0)
	if err != nil {
		return 0, err
	}
	defer control.Close()
	h := unix.DmIoctl{Version: [3]uint32{4, 0, 0}, Flags: flags}
	h.Data_start = uint32(unsafe.Sizeof(h))
	h.Data_size = h.Data_start + uint32(len(payload))
	if payload != nil {
		h.Target_count = 1
	}
	if len(name) >= len(h.Name) {
		return 0, unix.ENAMETOOLONG
	}
	for i := range name {
		h.Name[i] = name[i]
	}
	var b bytes.Buffer
	if err := binary.Write(&b, binary.NativeEndian, &h); err != nil {
		return 0, err
	}
	b.Write(payload)
	buffer := b.Bytes()
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, control.Fd(), uintptr(request), uintptr(unsafe.Pointer(&buffer[0]))); e != 0 {
		return 0, e
	}
	return binary.NativeEndian.Uint64(buffer[unsafe.Offsetof(h.Dev):]), nil
}

// target is a dm_target_spec from sector 0 with its parameters, padded to eight bytes.
func target(sectors uint64, table string) []byte {
	spec := unix.DmTargetSpec{Length: sectors}
	for i, c := range []byte("verity") {
		spec.Target_type[i] = c
	}
	text := append([]byte(table), make([]byte, 8-len(table)%8)...) // at least one zero
	spec.Next = uint32(unsafe.Sizeof(spec)) + uint32(len(text))
	b, err := binary.Append(nil, binary.NativeEndian, &spec)
	if err != nil {
		panic(err) // a struct of fixed size
	}
	return append(b, text...)
}

// chunk is what one read takes.
const chunk = 1 << 20

// ReadAll reads each block of data through verity, past the page cache, on all processors. On its way verity reads every
// block of the hash tree: there is none that no data hangs from. The error names the first block that did not verify.
func ReadAll(node string, blocks uint64) error {
	size := int64(blocks) * layout.BlockSize
	f, err := os.OpenFile(node, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if n, err := f.Seek(0, io.SeekEnd); err != nil || n != size {
		return fmt.Errorf("the device has %d bytes, not %d (%v)", n, size, err)
	}
	var next, bad atomic.Int64
	bad.Store(size)
	var readers sync.WaitGroup
	for range runtime.NumCPU() {
		readers.Go(func() {
			// O_DIRECT wants memory at page boundaries.
			b, err := unix.Mmap(-1, 0, chunk, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
			if err != nil {
				bad.Store(0)
				return
			}
			defer unix.Munmap(b)
			for at := next.Add(chunk) - chunk; at < bad.Load(); at = next.Add(chunk) - chunk {
				n := min(chunk, size-at)
				if _, err := f.ReadAt(b[:n], at); err != nil {
					for had := bad.Load(); at < had && !bad.CompareAndSwap(had, at); had = bad.Load() {
					}
				}
			}
		})
	}
	readers.Wait()
	if bad.Load() == size {
		return nil
	}
	b, err := unix.Mmap(-1, 0, layout.BlockSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return err
	}
	defer unix.Munmap(b)
	for at := bad.Load(); at < size; at += layout.BlockSize {
		if _, err := f.ReadAt(b, at); err != nil {
			return fmt.Errorf("block %d of %d: %w", at/layout.BlockSize, blocks, err)
		}
	}
	return errors.New("a block could be read at the second try only") // a disk that wears out is no root either
}

// SameSuperblock compares the block between data and tree, which verity does not look at.
func SameSuperblock(device string, root layout.Root) error {
	f, err := os.Open(device)
	if err != nil {
		return err
	}
	defer f.Close()
	b := make([]byte, layout.BlockSize)
	if _, err := f.ReadAt(b, int64(root.DataBlocks)*layout.BlockSize); err != nil {
		return err
	}
	if !bytes.Equal(b, root.Superblock()) {
		return errors.New("it differs")
	}
	return nil
}

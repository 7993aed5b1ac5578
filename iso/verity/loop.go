//go:build linux

package verity

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// loopTries is how often a free loop device is asked for: somebody else may be quicker.
const loopTries = 10

// Loop makes a loop device over size bytes of a file from at on, size 0: to its end. image is open for reading alone, and so is
// the device. It goes away with its last user: the caller holds the file that is returned until somebody else uses the device.
func Loop(image *os.File, at, size int64) (*os.File, error) {
	control, err := os.Open("/dev/loop-control")
	if err != nil {
		return nil, err
	}
	defer control.Close()
	for range loopTries {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("LOOP_CTL_GET_FREE: %w", err)
		}
		loop, err := os.Open(fmt.Sprintf("/dev/loop%d", n))
		if err != nil {
			return nil, err
		}
		err = unix.IoctlSetInt(int(loop.Fd()), unix.LOOP_SET_FD, int(image.Fd()))
		if err == nil {
			info := unix.LoopInfo64{Offset: uint64(at), Sizelimit: uint64(size), Flags: unix.LO_FLAGS_AUTOCLEAR}
			if err = unix.IoctlLoopSetStatus64(int(loop.Fd()), &info); err == nil {
				return loop, nil
			}
			return nil, fmt.Errorf("LOOP_SET_STATUS64: %w", errors.Join(err, unix.IoctlSetInt(int(loop.Fd()), unix.LOOP_CLR_FD, 0), loop.Close()))
		}
		loop.Close()
		if !errors.Is(err, unix.EBUSY) {
			return nil, fmt.Errorf("LOOP_SET_FD: %w", err)
		}
	}
	return nil, fmt.Errorf("LOOP_SET_FD: %w", unix.EBUSY)
}

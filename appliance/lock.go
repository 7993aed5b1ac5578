package appliance

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// ErrRunning means that an appliance runs in the folder already.
var ErrRunning = errors.New("设备已在该目录运行；先停止它 (an appliance is running in this folder; stop it first)")

// Lock keeps every other appliance out of dir until release is called. The kernel gives the lock back when the process
// ends, however it ends. Whoever finds it held gets [ErrRunning]. dir has to be an appliance's folder.
func Lock(dir string) (release func(), err error) {
	// The folder itself is locked, not a file in it: a file can be removed and made anew under the holder.
	name := filepath.Join(dir, "run")
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	switch err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); {
	case errors.Is(err, unix.EWOULDBLOCK):
		f.Close()
		return nil, fmt.Errorf("%s: %w", dir, ErrRunning)
	case err != nil:
		f.Close()
		return nil, fmt.Errorf("%s: flock: %w", name, err)
	}
	return func() { f.Close() }, nil
}

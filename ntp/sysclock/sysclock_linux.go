// Package sysclock reads the kernel's clocks. It is the only package of the program that does; everything else is given
// a clock, or a time.
//
// What each clock is worth (clock_gettime(2)): CLOCK_REALTIME can be stepped by anybody with the privilege and is used
// for nothing but noticing that. CLOCK_BOOTTIME cannot be stepped and goes on while the machine sleeps; own time is
// counted on it. CLOCK_MONOTONIC stands still in sleep: the difference of the two is the time slept.
// CLOCK_MONOTONIC_RAW is not bent by adjtimex(2) as the other three are, and shows when somebody slews the clock.
package sysclock

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A Clock satisfies ntp.BootClock. Its methods are safe for concurrent use and cannot fail: [Open] has tried each.
type Clock struct {
	bootID string
	start  time.Time     // carries the runtime's reading of CLOCK_MONOTONIC
	mono   time.Duration // CLOCK_MONOTONIC at start
}

// Open tries all clocks and reads the boot identifier.
func Open() (*Clock, error) {
	for name, id := range map[string]int32{
		"CLOCK_REALTIME": unix.CLOCK_REALTIME, "CLOCK_BOOTTIME": unix.CLOCK_BOOTTIME,
		"CLOCK_MONOTONIC": unix.CLOCK_MONOTONIC, "CLOCK_MONOTONIC_RAW": unix.CLOCK_MONOTONIC_RAW,
	} {
		var ts unix.Timespec
		if err := unix.ClockGettime(id, &ts); err != nil {
			return nil, fmt.Errorf("sysclock: clock_gettime %s: %w", name, err)
		}
	}
	raw, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, fmt.Errorf("sysclock: reading the boot identifier: %w", err)
	}
	id := strings.TrimSpace(string(raw))
	if id == "" {
		return nil, errors.New("sysclock: the kernel's boot identifier is empty")
	}
	return &Clock{bootID: id, mono: read(unix.CLOCK_MONOTONIC), start: time.Now()}, nil
}

// BootID names the present boot of this machine; it changes with every boot.
func (c *Clock) BootID() string { return c.bootID }

// Boot is CLOCK_BOOTTIME: time since boot, sleep included.
func (c *Clock) Boot() time.Duration { return read(unix.CLOCK_BOOTTIME) }

// Monotonic is CLOCK_MONOTONIC: time since boot without sleep. It comes from the runtime's vDSO call, not a system call.
func (c *Clock) Monotonic() time.Duration { return c.mono + time.Since(c.start) }

// Raw is CLOCK_MONOTONIC_RAW: as Monotonic, at the oscillator's own rate.
func (c *Clock) Raw() time.Duration { return read(unix.CLOCK_MONOTONIC_RAW) }

// Realtime is CLOCK_REALTIME, UTC as far as the machine believes: never a time for evidence.
func (c *Clock) Realtime() time.Time { return time.Now().Round(0).UTC() }

// read is a raw system call, because Go's vDSO support knows neither BOOTTIME nor RAW and clock_gettime never blocks.
func read(id uintptr) time.Duration {
	var ts unix.Timespec
	if _, _, errno := syscall.RawSyscall(unix.SYS_CLOCK_GETTIME, id, uintptr(unsafe.Pointer(&ts)), 0); errno != 0 {
		panic(fmt.Sprintf("sysclock: clock_gettime %d: %v", id, errno)) // EFAULT or EINVAL: Open has ruled both out
	}
	return time.Duration(ts.Nano())
}

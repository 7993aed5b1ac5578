package ntp

import (
	"errors"
	"fmt"
	"time"
)

// A Snapshot is what a restarted process needs to go on in Holdover, if the machine has not been booted since. The
// caller stores it where it cannot be forged; in JSON its times keep their nanoseconds.
type Snapshot struct {
	BootID     string        `json:"boot_id"`
	State      State         `json:"state"`
	Taken      time.Duration `json:"taken_ns"` // CLOCK_BOOTTIME of the snapshot
	Boot       time.Duration `json:"boot_ns"`  // CLOCK_BOOTTIME of UTC
	UTC        time.Time     `json:"utc"`      // zero: the clock had no anchor
	Bound      time.Duration `json:"bound_ns"`
	Bent       time.Duration `json:"bent_ns"`   // CLOCK_MONOTONIC−CLOCK_MONOTONIC_RAW at Boot
	Agreed     time.Duration `json:"agreed_ns"` // CLOCK_BOOTTIME of the last agreement
	Wall       time.Time     `json:"wall"`      // CLOCK_REALTIME when CLOCK_BOOTTIME was 0: shows a step while we were away
	Slept      time.Duration `json:"slept_ns"`  // CLOCK_BOOTTIME−CLOCK_MONOTONIC
	LeapAt     time.Time     `json:"leap_at"`   // end of a month at which a leap second may come; zero: none
	Leap       Leap          `json:"leap"`
	Moved      time.Duration `json:"moved_ns"` // by re-entries without an operator, see Config.ReentryLimit
	MovedAt    time.Duration `json:"moved_at_ns"`
	Provenance string        `json:"provenance"`
	Emitted    time.Time     `json:"emitted"` // the latest time vouched for; zero: none
}

// Snapshot returns the clock's present anchor, after a look at the machine's clocks: one that nobody has found disturbed
// yet must not be called trusted for those to come. BootID is that of the present boot.
func (c *Clock) Snapshot(bootID string) Snapshot {
	c.mu.Lock()
	defer c.drain()
	defer c.mu.Unlock()
	now := c.sample()
	_ = c.look(now) // told by OnChange
	v := c.view.Load()
	s := Snapshot{BootID: bootID, State: v.state, Taken: now.boot, Agreed: v.agreed, Slept: v.slept, Wall: unixNano(v.wall), Leap: v.leap, Moved: v.moved, MovedAt: v.movedAt, Provenance: v.provenance}
	if a := v.anchor; v.anchored {
		s.Boot, s.UTC, s.Bound, s.Bent = a.boot, unixNano(a.span.mid()), a.span.half()+a.torn, a.bent
	}
	if v.leapAt != 0 {
		s.LeapAt = unixNano(v.leapAt)
	}
	if last := c.emitted.Load(); last != 0 {
		s.Emitted = unixNano(last)
	}
	return s
}

// ErrSnapshot means that a snapshot contradicts itself or the kernel's clocks. The clock stays Cold.
var ErrSnapshot = errors.New("ntp: snapshot refused")

// Restore goes on from s. In the boot that s was taken in, a clock that was Trusted or in Holdover goes on in Holdover,
// with the bound grown meanwhile; one that was Suspect stays so, for a restart is no confirmation. In another boot only
// the latest time vouched for is kept: the clock stays Cold and will not agree to an earlier time.
// Call it once, before the first Update.
func (c *Clock) Restore(s Snapshot, bootID string) error {
	c.mu.Lock()
	defer c.drain()
	defer c.mu.Unlock()
	if c.view.Load().state != Cold {
		return fmt.Errorf("%w: the clock is already in use", ErrSnapshot)
	}
	inRange := func(t time.Time) bool { return t.Year() >= firstYear && t.Year() <= lastYear }
	if !s.Emitted.IsZero() {
		if !inRange(s.Emitted) {
			return fmt.Errorf("%w: vouched for the year %d", ErrSnapshot, s.Emitted.Year())
		}
		c.emitted.Store(max(c.emitted.Load(), s.Emitted.UnixNano()))
	}
	if s.BootID != bootID || bootID == "" || s.UTC.IsZero() {
		return nil
	}
	now := c.sample()
	switch {
	case !inRange(s.UTC) || s.Bound < 0 || s.Bound > 24*time.Hour,
		!s.LeapAt.IsZero() && !inRange(s.LeapAt), s.Leap > LeapDelete, s.LeapAt.IsZero() && s.Leap != LeapNone,
		s.Agreed < 0 || s.Boot < 0, s.Bent.Abs() > 10*366*24*time.Hour, s.Moved < 0 || s.Moved > 24*time.Hour || s.MovedAt < 0:
		return fmt.Errorf("%w: values out of range", ErrSnapshot)
	case s.Taken > now.boot:
		return fmt.Errorf("%w: taken at %v of CLOCK_BOOTTIME, which is %v now", ErrSnapshot, s.Taken, now.boot)
	case s.State != Suspect && max(s.Boot, s.Agreed) > s.Taken: // a clock that was Suspect may have seen CLOCK_BOOTTIME go back
		return fmt.Errorf("%w: its anchor is later than itself", ErrSnapshot)
	}
	to := map[State]State{Trusted: Holdover, Holdover: Holdover, Untrusted: Untrusted, Acquiring: Untrusted, Suspect: Suspect}[s.State]
	if to == "" {
		return fmt.Errorf("%w: state %q with an anchor", ErrSnapshot, s.State)
	}
	mid := s.UTC.UnixNano()
	c.move(to, "restarted in the same boot", func(v *view) {
		v.anchored = true
		v.anchor = anchor{instant{boot: s.Boot, bent: s.Bent}, span{mid - int64(s.Bound), mid + int64(s.Bound)}}
		v.moved, v.movedAt = s.Moved, s.MovedAt
		v.agreed, v.wall, v.slept = s.Agreed, s.Wall.UnixNano(), s.Slept
		v.leap, v.provenance = s.Leap, s.Provenance
		if !s.LeapAt.IsZero() {
			v.leapAt = s.LeapAt.UnixNano()
		}
	})
	_ = c.look(now) // a step, a sleep or too long an absence; told by OnChange
	return nil
}

package ntp

import (
	"errors"
	"fmt"
	"time"
)

// A Leap is the leap indicator of RFC 5905 §7.3.
type Leap uint8

const (
	LeapNone           Leap = 0
	LeapInsert         Leap = 1 // the last minute of the month has 61 seconds
	LeapDelete         Leap = 2 // the last minute of the month has 59 seconds
	LeapUnsynchronized Leap = 3
)

// A Measurement is one source's answer, freed of the local wall clock: at the instant Boot of CLOCK_BOOTTIME it was UTC,
// give or take RootDistance.
type Measurement struct {
	Source string // name from the configuration, unique
	Group  string // sources that share an antenna or an upstream share a group, and have one voice; empty: Source

	Boot time.Duration // CLOCK_BOOTTIME when the answer arrived
	UTC  time.Time     // the source's time at that instant
	Bent time.Duration // CLOCK_MONOTONIC−CLOCK_MONOTONIC_RAW then: what bends the kernel's clock until the round is over shows

	// RootDistance is the half width of the interval that holds the true time if the source is honest: RTT/2, root
	// delay/2, root dispersion, precision and what the local clock may have drifted meanwhile.
	RootDistance time.Duration
	RTT          time.Duration
	Stratum      uint8
	Leap         Leap
	RefID        string        // as the source gives it; names a reference clock at stratum 1, proves nothing
	ReferenceAge time.Duration // the source's transmit time less its reference time
}

// group is the voice m counts for.
func (m Measurement) group() string {
	if m.Group == "" {
		return m.Source
	}
	return m.Group
}

// Limits are the qualities below which an answer is not a candidate. They are ours and far stricter than RFC 5905's
// MAXDISP of 16 s: a GNSS server that has lost its antenna keeps answering as stratum 1, leap 0, and only its root
// dispersion and its reference time show it.
type Limits struct {
	MaxRootDistance time.Duration
	MaxReferenceAge time.Duration
}

// ErrUnfit means that an answer may not take part in the selection.
var ErrUnfit = errors.New("ntp: measurement unfit")

// Times outside these years are not believed from anybody; the range keeps nanosecond arithmetic far from overflow.
const (
	firstYear = 2020
	lastYear  = 2105 // the end of NTP era 1 as read by a 64-bit timestamp without era number
)

// Check returns nil if m may take part in a selection, otherwise an error that wraps [ErrUnfit] and says why.
func (m Measurement) Check(l Limits) error {
	switch {
	case m.Stratum < 1 || m.Stratum > 15:
		return fmt.Errorf("%w: stratum %d", ErrUnfit, m.Stratum)
	case m.Leap > LeapDelete:
		return fmt.Errorf("%w: leap indicator %d, not synchronized", ErrUnfit, m.Leap)
	case m.UTC.Year() < firstYear || m.UTC.Year() > lastYear:
		return fmt.Errorf("%w: year %d", ErrUnfit, m.UTC.Year())
	case m.RTT < 0 || m.RootDistance < m.RTT/2:
		return fmt.Errorf("%w: root distance %v with round trip %v", ErrUnfit, m.RootDistance, m.RTT)
	case m.RootDistance > l.MaxRootDistance:
		return fmt.Errorf("%w: root distance %v exceeds %v", ErrUnfit, m.RootDistance, l.MaxRootDistance)
	case m.ReferenceAge < 0:
		return fmt.Errorf("%w: reference time lies %v ahead", ErrUnfit, -m.ReferenceAge)
	case m.ReferenceAge > l.MaxReferenceAge:
		return fmt.Errorf("%w: reference time is %v old, limit %v", ErrUnfit, m.ReferenceAge, l.MaxReferenceAge)
	}
	return nil
}

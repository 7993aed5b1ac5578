package ntp

import (
	"errors"
	"fmt"
	"time"
)

// ErrWithheld means that a drill keeps what the sources say from the clock.
var ErrWithheld = errors.New("ntp: a drill withholds the sources")

// A withholding is a drill's. It is never changed after it is stored.
type withholding struct {
	from, until time.Duration // CLOCK_BOOTTIME
	fresh, most time.Duration
}

// Withhold has the clock take no round for as long as d, as if no source answered, and hold to a stricter policy meanwhile: it
// is in Holdover after fresh and Untrusted after most, or sooner where its own policy says so. Afterwards rounds count as
// they do after any silence. Nothing that it does makes the clock believe more than it would without.
func (c *Clock) Withhold(fresh, most, d time.Duration) {
	from := c.clock.Boot()
	c.withheld.Store(&withholding{from: from, until: from + d, fresh: fresh, most: most})
}

// Release ends what [Clock.Withhold] began.
func (c *Clock) Release() { c.withheld.Store(nil) }

// withholds is what is under way at boot; nil: nothing.
func (c *Clock) withholds(boot time.Duration) *withholding {
	if w := c.withheld.Load(); w != nil && boot < w.until {
		return w
	}
	return nil
}

// verdict is the state that a drill wants instead of state, and why; "": none.
func (w *withholding) verdict(state State, boot time.Duration) (State, string) {
	away := boot - w.from
	switch why := fmt.Sprintf("%v, for %v", ErrWithheld, away.Round(time.Second)); {
	case away > w.most:
		return Untrusted, why
	case state == Trusted && away > w.fresh:
		return Holdover, why
	}
	return state, ""
}

package ntp

import "time"

// Left is how long the clock would go on being trusted if from now on no round agreed: until the bound exceeds MaxBound or
// HoldoverMax has passed since the last agreement, whichever comes first. It is 0 unless the clock is Trusted or in
// Holdover. A step, a sleep, a leap second, or whoever bends the kernel's clock can end it sooner.
func (c *Clock) Left() time.Duration {
	if !c.Now().Trusted() {
		return 0
	}
	v, now := c.view.Load(), c.glance().instant()
	if !v.usable() {
		return 0
	}
	byBound := HoldoverSpan(v.anchor.at(now, c.cfg.DriftPPM).half(), c.cfg.MaxBound, c.cfg.DriftPPM)
	byAge := v.agreed + c.cfg.HoldoverMax - now.boot
	if w := c.withholds(now.boot); w != nil {
		byAge = min(byAge, w.from+w.most-now.boot)
	}
	return max(min(byBound, byAge), 0)
}

// HoldoverSpan is how long a bound takes to grow from bound to most, at ppm parts per million: what a clock without sources
// has, as far as its accuracy goes.
func HoldoverSpan(bound, most time.Duration, ppm int) time.Duration {
	if bound >= most {
		return 0
	}
	room, million := most-bound, time.Duration(1_000_000)
	return room/time.Duration(ppm)*million + room%time.Duration(ppm)*million/time.Duration(ppm)
}

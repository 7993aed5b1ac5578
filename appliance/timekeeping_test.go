package appliance_test

import (
	"slices"
	"testing"
	"time"

	"yinjian/appliance"
)

// The ledger's hours end with those of UTC as soon as the time is known, and after an hour while it is not.
func TestHoursEnd(t *testing.T) {
	t.Parallel()
	start := time.Date(2026, 12, 31, 22, 40, 30, 0, time.UTC)
	look := func(known func(minute int) bool, step func(minute int) time.Duration) (ends []int) {
		var boots []time.Duration
		var nows []time.Time
		for i := range 240 { // minutes
			now := time.Time{}
			if known(i) {
				now = start.Add(time.Duration(i)*time.Minute + step(i))
			}
			boots, nows = append(boots, 7*time.Hour+time.Duration(i)*time.Minute), append(nows, now)
		}
		return appliance.HoursEnd(boots, nows)
	}
	none := func(int) time.Duration { return 0 }
	for name, c := range map[string]struct {
		known func(int) bool
		step  func(int) time.Duration
		want  []int
	}{
		"never known":    {func(int) bool { return false }, none, []int{60, 120, 180}},
		"from the start": {func(int) bool { return true }, none, []int{20, 80, 140, 200}},
		"after a while":  {func(i int) bool { return i >= 5 }, none, []int{20, 80, 140, 200}},
		// At 20 the hour has ended; a time that was set back by a minute since does not end it again a minute later.
		"set back": {func(int) bool { return true }, func(i int) time.Duration {
			if i < 20 {
				return 0
			}
			return -time.Minute
		}, []int{20, 81, 141, 201}},
	} {
		if got := look(c.known, c.step); !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
}

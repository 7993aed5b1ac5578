package appliance_test

import (
	"testing"
	"time"

	"yinjian/appliance"
)

// The ledger's hours end with those of UTC.
func TestUntilHour(t *testing.T) {
	t.Parallel()
	at := func(clock string) time.Time {
		v, err := time.Parse(time.DateTime, "2026-12-31 "+clock)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	for _, c := range []struct {
		now  time.Time
		want time.Duration
	}{
		{time.Time{}, time.Hour},
		{at("12:00:00"), time.Hour},
		{at("12:15:00"), 45 * time.Minute},
		{at("23:58:30"), 90 * time.Second},
		{at("23:59:30"), time.Hour + 30*time.Second},
	} {
		if got := appliance.UntilHour(c.now); got != c.want {
			t.Errorf("%v: %v, want %v", c.now, got, c.want)
		}
	}
}

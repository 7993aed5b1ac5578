package appliance

import (
	"testing"

	"yinjian/appliance/account"
)

// What the registration leaves open is the configuration's.
func TestRateOf(t *testing.T) {
	t.Parallel()
	p := Policy{Rate: 100, Burst: 300}
	for _, row := range []struct{ rate, burst, wantRate, wantBurst int }{
		{0, 0, 100, 300}, {20, 0, 20, 40}, {0, 7, 100, 7}, {500, 501, 500, 501},
	} {
		if rate, burst := p.rateOf(&account.Application{Rate: row.rate, Burst: row.burst}); rate != row.wantRate || burst != row.wantBurst {
			t.Errorf("%+v: %d and %d", row, rate, burst)
		}
	}
}

package appliance_test

import (
	"testing"
	"time"

	"yinjian/appliance"
	"yinjian/appliance/audit"
	"yinjian/appliance/internal/testkit"
	"yinjian/hsm"
	"yinjian/ntp"
	"yinjian/tsa"
)

// TestTokenOfAnotherClock: genTime is the timestamp worker's, the entry's time is this process's, and both clocks may be
// wrong by what they say. The token is found all the same, and the bound in its entry is no smaller than the reading's.
func TestTokenOfAnotherClock(t *testing.T) {
	t.Parallel()
	h := testkit.New(t)
	for _, ahead := range []time.Duration{0, 3 * time.Millisecond, -3 * time.Millisecond, 900 * time.Millisecond} {
		h.Clock.Advance(time.Minute)
		recorder := appliance.TokenRecorder{Journal: h.Journal.Journal, Unit: "sm2"}
		h.Clock.Change(func(r *ntp.Reading) { r.Time = r.Time.Add(ahead) })
		token, err := h.Stampers[string(hsm.SM2)].Issue(t.Context(), &tsa.Request{Imprint: tsa.ImprintOf([]byte(ahead.String()))})
		if err != nil {
			t.Fatal(err)
		}
		h.Clock.Change(func(r *ntp.Reading) { r.Time = r.Time.Add(-ahead) })
		if err := recorder.RecordToken(t.Context(), token); err != nil {
			t.Fatal(err)
		}
		known, err := appliance.Known(t.Context(), h.Journal.Journal, token)
		if err != nil || known == nil || known.TimeSource != testkit.Provenance || known.Transport != "HTTP" {
			t.Errorf("%v ahead: %+v, %v", ahead, known, err)
		}
		r, err := h.Journal.Entry(t.Context(), h.Journal.Size()-1)
		if err != nil {
			t.Fatal(err)
		}
		if bound, _ := r.Entry.Field("time.bound_us").(audit.Int); time.Duration(bound)*time.Microsecond < token.Provenance.Bound {
			t.Errorf("the entry says %d µs, the reading %v", bound, token.Provenance.Bound)
		}
	}
}

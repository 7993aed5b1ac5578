package appliance_test

import (
	"context"
	"sync"
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

// TestStoppedWhileUnderWay: a token that was made and not yet journalled when its unit was stopped goes to nobody, and no
// token's entry stands behind that of the decision.
func TestStoppedWhileUnderWay(t *testing.T) {
	t.Parallel()
	h := testkit.New(t)
	stop, recorder := appliance.Stamping(h.Journal.Journal)
	issue := func(ctx context.Context) *tsa.Token {
		token, err := h.Stampers[string(hsm.SM2)].Issue(ctx, &tsa.Request{Imprint: tsa.ImprintOf([]byte("x"))})
		if err != nil {
			t.Error(err)
		}
		return token
	}
	busy, end := context.WithCancel(t.Context())
	defer end()
	var wg sync.WaitGroup
	begun := make(chan struct{}, 64)
	for range 4 {
		wg.Go(func() {
			for recorder("sm2").RecordToken(busy, issue(t.Context())) == nil {
				select {
				case begun <- struct{}{}:
				default:
				}
			}
		})
	}
	for range 8 {
		<-begun
	}
	late := issue(t.Context())
	if err := stop(t.Context(), "sm2"); err != nil {
		t.Fatal(err)
	}
	if recorder("sm2").RecordToken(t.Context(), late) == nil {
		t.Error("a token of a stopped unit was journalled")
	}
	end()
	wg.Wait()
	if err := recorder("rsa").RecordToken(t.Context(), late); err != nil {
		t.Errorf("another unit: %v", err)
	}
	stopped := false
	if err := h.Journal.Range(t.Context(), 0, func(r audit.Record) error {
		switch {
		case r.Entry.Kind == "tsa.service":
			stopped = true
		case r.Entry.Kind == "tsa.token.v1" && r.Entry.Object == "unit/sm2" && stopped:
			t.Errorf("entry %d of a token behind the decision", r.Entry.Sequence)
		}
		return nil
	}); err != nil || !stopped {
		t.Fatal(err, stopped)
	}
}

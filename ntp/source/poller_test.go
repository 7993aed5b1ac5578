package source_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"yinjian/ntp"
	"yinjian/ntp/source"
)

// Sources come and go while the poller runs: a new one is asked from the next round on, a removed one is not asked any more
// and forgotten, and what each said is told with its round.
func TestPollerUse(t *testing.T) {
	t.Parallel()
	named := func(name string, silent bool) *source.Source {
		return newSource(t, name, serve(t, func(_ int, req []byte) [][]byte {
			if silent {
				return nil
			}
			a := good()
			a.stratum = 2
			return [][]byte{a.bytes(req)}
		}))
	}
	a, b, c := named("a", false), named("b", false), named("c", true)
	clock, err := ntp.NewClock(ntp.Config{MinSources: 2}, kernel)
	if err != nil {
		t.Fatal(err)
	}
	var said []source.Status
	p := &source.Poller{Sources: []*source.Source{a}, Clock: clock, Log: quiet(), Observe: func(_ ntp.Round, s []source.Status) { said = s }}
	names := func(all []source.Status) string {
		var n []string
		for _, s := range all {
			n = append(n, s.Source)
		}
		return strings.Join(n, " ")
	}
	if r := p.Round(t.Context()); !errors.Is(r.Err, ntp.ErrTooFew) {
		t.Errorf("one source of two: %v", r.Err)
	}
	if err := p.Use([]*source.Source{a, c, b}); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if r := p.Round(t.Context()); r.Err != nil {
			t.Error(r.Err)
		}
	}
	if s := clock.Now().State; s != ntp.Trusted {
		t.Errorf("state %s", s)
	}
	if names(said) != "a c b" || said[0].Err != nil || said[1].Err == nil || said[1].Measurement != (ntp.Measurement{}) || said[2].Measurement.RTT > time.Minute || said[2].Measurement.Source != "b" {
		t.Errorf("told %+v", said)
	}
	if err := p.Use([]*source.Source{b}); err != nil {
		t.Fatal(err)
	}
	if got := names(p.Status()); got != "b" {
		t.Errorf("status of %q after a and c were removed", got)
	}
	p.Round(t.Context())
	if names(said) != "b" {
		t.Errorf("asked %q", names(said))
	}
	// Another source under the name begins anew.
	if err := p.Use([]*source.Source{named("b", false)}); err != nil || len(p.Status()) != 0 {
		t.Errorf("status %+v, %v", p.Status(), err)
	}
	if p.Use([]*source.Source{a, a}) == nil || p.Use(nil) == nil {
		t.Error("two sources of one name, or none, accepted")
	}
}

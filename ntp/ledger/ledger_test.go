package ledger_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"yinjian/ntp"
	"yinjian/ntp/ledger"
)

var noon = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

func reading(s ntp.State, at, bound time.Duration) ntp.Reading {
	return ntp.Reading{Time: noon.Add(at), Bound: bound, State: s}
}

func said(name string, off time.Duration) ledger.Said {
	return ledger.Said{
		Source: name, Group: "g", Offset: off, Known: true,
		Measurement: ntp.Measurement{Source: name, RootDistance: 2 * time.Millisecond, RTT: time.Millisecond, Stratum: 1, RefID: "BDS"},
	}
}

func TestHour(t *testing.T) {
	t.Parallel()
	const boot = 100 * time.Hour
	l := ledger.New(boot, ntp.Cold)
	cold := said("a", 0)
	cold.Known = false
	l.Add(ledger.Round{Boot: boot + 10*time.Second, Reading: ntp.Reading{State: ntp.Cold}, Said: []ledger.Said{cold}})
	l.Changed(boot+20*time.Second, ntp.Trusted)
	for i, off := range []time.Duration{3 * time.Millisecond, -time.Millisecond, time.Millisecond} {
		rejected, silent, unfit := said("b", 5*time.Second), ledger.Said{Source: "c", Group: "h", Reason: "i/o timeout"}, said("d", 0)
		rejected.Rejected = true
		unfit.Reason = ntp.ErrUnfit.Error() + strings.Repeat("印", 100)
		at := time.Duration(i+2) * 20 * time.Second
		l.Add(ledger.Round{
			Boot: boot + at, Reading: reading(ntp.Trusted, at, time.Duration(5-i)*time.Millisecond+1), Confirmed: i > 0,
			Said: []ledger.Said{said("a", off), rejected, silent, unfit},
		})
	}
	l.Changed(boot+50*time.Minute, ntp.Holdover)
	got := l.Close(boot+time.Hour, reading(ntp.Holdover, time.Hour, 0))
	want := ledger.Hour{
		From: noon, To: noon.Add(time.Hour), SpanMS: 3_600_000, Rounds: 4, Confirmed: 2,
		StatesMS:   map[ntp.State]int64{ntp.Cold: 20_000, ntp.Trusted: 2_980_000, ntp.Holdover: 600_000},
		BoundMinUS: 3001, BoundMaxUS: 5001,
		Sources: []ledger.SourceHour{
			{Name: "a", Group: "g", Polls: 4, Answers: 4, Candidates: 4, Offsets: 3, OffsetUS: 1000, MinUS: -1000, MaxUS: 3000, MeanUS: 1000, DistanceUS: 2000, RTTUS: 1000, Stratum: 1, RefID: "BDS"},
			{Name: "b", Group: "g", Polls: 3, Answers: 3, Candidates: 3, Rejected: 3, Offsets: 3, OffsetUS: 5e6, MinUS: 5e6, MaxUS: 5e6, MeanUS: 5e6, DistanceUS: 2000, RTTUS: 1000, Stratum: 1, RefID: "BDS"},
			{Name: "c", Group: "h", Polls: 3, Failed: 3, Reason: "i/o timeout"},
			{Name: "d", Group: "g", Polls: 3, Answers: 3, Unfit: 3, Offsets: 3, DistanceUS: 2000, RTTUS: 1000, Stratum: 1, RefID: "BDS"},
		},
	}
	for i := range got.Sources {
		if n := len(got.Sources[i].Reason); n > ledger.MaxReason || n > 20 && !strings.HasSuffix(got.Sources[i].Reason, "印") {
			t.Errorf("reason %q", got.Sources[i].Reason)
		}
	}
	want.Sources[3].Reason = got.Sources[3].Reason
	if diff := cmp.Diff(want, got, cmpopts.IgnoreUnexported(ledger.SourceHour{})); diff != "" {
		t.Error(diff)
	}
	// The next hour begins where this one ended, in its state.
	next := l.Present(boot+2*time.Hour, reading(ntp.Holdover, 2*time.Hour, 0))
	if !next.From.Equal(noon.Add(time.Hour)) || next.StatesMS[ntp.Holdover] != 3_600_000 || next.Rounds != 0 || len(next.Sources) != 0 {
		t.Errorf("next hour %+v", next)
	}
	// A clock that is still cold has no time for its hour, but its length.
	if h := ledger.New(boot, ntp.Cold).Close(boot+time.Minute, ntp.Reading{State: ntp.Cold}); !h.From.IsZero() || !h.To.IsZero() || h.SpanMS != 60_000 {
		t.Errorf("cold hour %+v", h)
	}
}

// However many rounds and sources there are, and whatever servers send, an hour stays small and the ring bounded.
func TestBounded(t *testing.T) {
	t.Parallel()
	l := ledger.New(0, ntp.Trusted)
	const rounds = 5000
	for i := range rounds {
		r := ledger.Round{Boot: time.Duration(i) * time.Second, Reading: reading(ntp.Trusted, 0, time.Millisecond)}
		s := said(fmt.Sprintf("source-with-a-name-that-is-as-long-as-names-may-be-%03d", i%200), time.Duration(i)*time.Microsecond)
		s.Measurement.RefID, s.Reason = "\x00\"\n"+strings.Repeat("x", 500), errors.New(strings.Repeat("\"", 5000)).Error()
		r.Said = []ledger.Said{s}
		l.Add(r)
	}
	const boot = rounds * time.Second
	now := reading(ntp.Trusted, boot, 0)
	b, err := json.Marshal(l.Present(boot, now))
	if err != nil || len(b) > 64<<10 {
		t.Errorf("an hour has %d bytes, %v", len(b), err)
	}
	all := l.Points(boot, now)
	if len(all) != 4096 {
		t.Fatalf("%d points", len(all))
	}
	for i, p := range all {
		n := rounds - len(all) + i
		if !p.At.Equal(noon.Add(time.Duration(n)*time.Second)) || p.Sources[0].OffsetUS != int64(n) {
			t.Fatalf("point %d: %+v", i, p)
		}
	}
	if l.Points(boot, ntp.Reading{}) != nil {
		t.Error("points without a time")
	}
}

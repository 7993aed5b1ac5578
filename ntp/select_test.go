package ntp_test

import (
	"errors"
	"math/rand/v2"
	"reflect"
	"slices"
	"strconv"
	"testing"
	"time"

	"yinjian/ntp"
)

var noon = time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)

// says is an answer at boot instant 0 that puts noon at off, give or take half.
func says(source string, off, half time.Duration) ntp.Measurement {
	return ntp.Measurement{Source: source, UTC: noon.Add(off), RootDistance: half, Stratum: 2, RefID: "10.0.0.1"}
}

const ms = time.Millisecond

// inside reports whether t lies in the selection.
func inside(s ntp.Selection, t time.Time) bool { return !t.Before(s.Low) && !t.After(s.High) }

func TestSelectLiars(t *testing.T) {
	t.Parallel()
	lie := 5 * time.Second
	for name, c := range map[string]struct {
		in       []ntp.Measurement
		rejected []string // nil and no agreement: refused
		refused  bool
	}{
		"one":                  {in: []ntp.Measurement{says("a", 0, ms)}},
		"two agree":            {in: []ntp.Measurement{says("a", 0, 10*ms), says("b", 5*ms, 10*ms)}},
		"two touch":            {in: []ntp.Measurement{says("a", -10*ms, 10*ms), says("b", 10*ms, 10*ms)}},
		"two disagree":         {in: []ntp.Measurement{says("a", 0, 10*ms), says("b", 20*ms+1, 10*ms)}, refused: true},
		"liar of three":        {in: []ntp.Measurement{says("a", 0, 60*ms), says("b", 10*ms, 20*ms), says("c", lie, 60*ms)}, rejected: []string{"c"}},
		"two liars of five":    {in: []ntp.Measurement{says("a", 0, 60*ms), says("b", 10*ms, 20*ms), says("c", -3*ms, 60*ms), says("d", lie, ms), says("e", lie, ms)}, rejected: []string{"d", "e"}},
		"two liars of four":    {in: []ntp.Measurement{says("a", 0, 60*ms), says("b", 10*ms, 20*ms), says("c", lie, ms), says("d", lie, ms)}, refused: true},
		"all apart":            {in: []ntp.Measurement{says("a", 0, ms), says("b", lie, ms), says("c", -lie, ms)}, refused: true},
		"nobody":               {refused: true},
		"two liars, one group": {in: []ntp.Measurement{says("a", 0, ms), says("b", 0, ms), grouped(says("c", lie, ms), "x"), grouped(says("d", lie, ms), "x"), grouped(says("e", lie, ms), "x")}, rejected: []string{"x"}},
		"a group at odds with itself has no voice but counts": {
			in:      []ntp.Measurement{says("a", 0, ms), grouped(says("b", 0, ms), "x"), grouped(says("c", lie, ms), "x")},
			refused: true,
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			sel, err := ntp.Select(c.in, 0, 50)
			if c.refused {
				if !errors.Is(err, ntp.ErrNoMajority) {
					t.Fatalf("Select = %+v, %v, want ErrNoMajority", sel, err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if !inside(sel, noon) || sel.High.Sub(sel.Low) > 120*ms {
				t.Errorf("selected %v to %v, want noon inside", sel.Low, sel.High)
			}
			if !slices.Equal(sel.Rejected, c.rejected) {
				t.Errorf("rejected %v, want %v", sel.Rejected, c.rejected)
			}
		})
	}
}

func grouped(m ntp.Measurement, group string) ntp.Measurement { m.Group = group; return m }

// TestSmallestAllowanceExcludesTruth is why Select does not look for the fewest falsetickers as RFC 5905 §11.2.1 does:
// allowing one, [1 ms, 8 ms] is shared by four of five, and the true time is 9.5 ms.
func TestSmallestAllowanceExcludesTruth(t *testing.T) {
	t.Parallel()
	half := func(source string, low, high float64) ntp.Measurement {
		mid, h := (low+high)/2, (high-low)/2
		return says(source, time.Duration(mid*float64(ms)), time.Duration(h*float64(ms)))
	}
	in := []ntp.Measurement{half("h1", 0, 10), half("h2", 0, 10), half("h3", 9, 20), half("l1", 1, 8), half("l2", 1, 8)}
	sel, err := ntp.Select(in, 0, 50)
	if err != nil {
		t.Fatal(err)
	}
	if truth := noon.Add(9500 * time.Microsecond); !inside(sel, truth) {
		t.Errorf("selected %v to %v, true time %v is outside", sel.Low, sel.High, truth)
	}
}

// TestSelectProperties draws honest groups around the true time and fewer liars anywhere.
func TestSelectProperties(t *testing.T) {
	t.Parallel()
	for seed := range uint64(4000) {
		rng := rand.New(rand.NewPCG(seed, 1))
		groups := 1 + rng.IntN(9)
		liars := rng.IntN((groups-1)/2 + 1)
		var in []ntp.Measurement
		for g := range groups {
			name := string(rune('a' + g))
			for s := range 1 + rng.IntN(3) {
				half := time.Duration(1 + rng.Int64N(int64(100*ms)))
				off := time.Duration(rng.Int64N(2*int64(half)+1)) - half // honest: noon inside
				if g < liars {
					off = time.Duration(rng.Int64N(int64(400*ms))) - 200*ms
				}
				boot := time.Duration(rng.Int64N(int64(time.Second)))
				m := grouped(says(name+strconv.Itoa(s), off+boot, half), name)
				m.Boot = boot
				in = append(in, m)
			}
		}
		at := 2 * time.Second
		truth := noon.Add(at)
		sel, err := ntp.Select(in, at, 50)
		if err != nil || !inside(sel, truth) {
			t.Fatalf("seed %d: %d of %d lie: %v to %v, %v: true time outside", seed, liars, groups, sel.Low, sel.High, err)
		}
		if 2*len(sel.Agreed) <= groups || len(sel.Agreed)+len(sel.Rejected) != groups {
			t.Fatalf("seed %d: %v agreed, %v rejected, of %d", seed, sel.Agreed, sel.Rejected, groups)
		}

		// The order does not matter.
		mixed := slices.Clone(in)
		rng.Shuffle(len(mixed), func(i, j int) { mixed[i], mixed[j] = mixed[j], mixed[i] })
		if again, _ := ntp.Select(mixed, at, 50); !reflect.DeepEqual(sel, again) {
			t.Fatalf("seed %d: permuted: %+v, was %+v", seed, again, sel)
		}

		// A wider interval loses nothing: no group, no instant.
		wider := slices.Clone(in)
		wider[rng.IntN(len(wider))].RootDistance += time.Duration(rng.Int64N(int64(200 * ms)))
		wide, err := ntp.Select(wider, at, 50)
		if err != nil || wide.Low.After(sel.Low) || wide.High.Before(sel.High) {
			t.Fatalf("seed %d: widened: %v to %v, %v, was %v to %v", seed, wide.Low, wide.High, err, sel.Low, sel.High)
		}
		for _, g := range sel.Agreed {
			if !slices.Contains(wide.Agreed, g) {
				t.Fatalf("seed %d: widening excluded %s", seed, g)
			}
		}
	}
}

// TestSelectBruteForce compares with the definition, instant by instant.
func TestSelectBruteForce(t *testing.T) {
	t.Parallel()
	for seed := range uint64(2000) {
		rng := rand.New(rand.NewPCG(seed, 2))
		n := 1 + rng.IntN(7)
		var in []ntp.Measurement
		for i := range n {
			in = append(in, says(string(rune('a'+i)), time.Duration(rng.IntN(60)), time.Duration(rng.IntN(12))))
		}
		low, high := time.Duration(-1000), time.Duration(-1000)
		for x := time.Duration(-20); x < 90; x++ {
			count := 0
			for _, m := range in {
				if d := m.UTC.Sub(noon) - x; d.Abs() <= m.RootDistance {
					count++
				}
			}
			if 2*count > n {
				if low == -1000 {
					low = x
				}
				high = x
			}
		}
		sel, err := ntp.Select(in, 0, 50)
		if low == -1000 {
			if err == nil {
				t.Fatalf("seed %d: selected %v to %v where no majority is", seed, sel.Low, sel.High)
			}
			continue
		}
		if err != nil || sel.Low.Sub(noon) != low || sel.High.Sub(noon) != high {
			t.Fatalf("seed %d: %v to %v, %v, want %v to %v", seed, sel.Low.Sub(noon), sel.High.Sub(noon), err, low, high)
		}
	}
}

func TestSelectLeapAndNames(t *testing.T) {
	t.Parallel()
	bds := ntp.Measurement{Source: "rack", Group: "beidou", UTC: noon, RootDistance: ms, Stratum: 1, RefID: "BDS", Leap: ntp.LeapInsert}
	rogue := ntp.Measurement{Source: "rogue", UTC: noon, RootDistance: ms, Stratum: 1, RefID: "G\n(+S"}
	lan := says("lan", 0, ms)
	lan.Leap = ntp.LeapInsert
	sel, err := ntp.Select([]ntp.Measurement{bds, rogue, lan}, 0, 50)
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"BDS(beidou)", "GS(rogue)", "lan"}; !slices.Equal(sel.Names, want) {
		t.Errorf("names %q, want %q", sel.Names, want)
	}
	if sel.Leap != ntp.LeapInsert {
		t.Errorf("leap %d, two of three announce %d", sel.Leap, ntp.LeapInsert)
	}
	lan.Leap = ntp.LeapNone
	if sel, _ := ntp.Select([]ntp.Measurement{bds, rogue, lan}, 0, 50); sel.Leap != ntp.LeapNone {
		t.Errorf("leap %d announced by one of three", sel.Leap)
	}
}

func TestCheck(t *testing.T) {
	t.Parallel()
	good := says("a", 0, 50*ms)
	limits := ntp.Limits{MaxRootDistance: 100 * ms, MaxReferenceAge: time.Minute}
	if err := good.Check(limits); err != nil {
		t.Fatal(err)
	}
	for name, spoil := range map[string]func(*ntp.Measurement){
		"stratum 0":                  func(m *ntp.Measurement) { m.Stratum = 0 },
		"stratum 16":                 func(m *ntp.Measurement) { m.Stratum = 16 },
		"leap 3":                     func(m *ntp.Measurement) { m.Leap = ntp.LeapUnsynchronized },
		"root distance":              func(m *ntp.Measurement) { m.RootDistance = 100*ms + 1 },
		"root distance below rtt":    func(m *ntp.Measurement) { m.RTT = 101 * ms },
		"negative root distance":     func(m *ntp.Measurement) { m.RootDistance = -1 },
		"old reference":              func(m *ntp.Measurement) { m.ReferenceAge = time.Minute + 1 },
		"reference ahead":            func(m *ntp.Measurement) { m.ReferenceAge = -1 },
		"before the product existed": func(m *ntp.Measurement) { m.UTC = noon.AddDate(-10, 0, 0) },
		"era without number":         func(m *ntp.Measurement) { m.UTC = noon.AddDate(80, 0, 0) },
	} {
		m := good
		spoil(&m)
		if err := m.Check(limits); !errors.Is(err, ntp.ErrUnfit) {
			t.Errorf("%s: %v, want ErrUnfit", name, err)
		}
	}
}

// FuzzSelect reads groups around the true time from bytes, four to a source: group, half width, offset, and how much wider
// to make it later. An offset beyond the half width is a lie. What fewer than half of the groups say does not matter.
func FuzzSelect(f *testing.F) {
	f.Add([]byte{0, 10, 1, 0, 1, 10, 2, 5, 2, 10, 200, 0})
	f.Add([]byte{0, 60, 0, 0, 1, 60, 0, 0, 2, 60, 90, 0, 2, 60, 90, 0, 3, 1, 200, 9})
	f.Add([]byte{0, 10, 5, 1, 1, 10, 251, 1, 2, 10, 9, 1, 3, 3, 4, 0, 4, 3, 4, 0}) // TestSmallestAllowanceExcludesTruth, or nearly
	f.Add([]byte{0, 10, 0, 0, 1, 10, 100, 0})
	f.Fuzz(func(t *testing.T, raw []byte) {
		var in []ntp.Measurement
		lies := make(map[string]bool) // by group
		var widen []time.Duration
		for ; len(raw) >= 4 && len(in) < 16; raw = raw[4:] {
			group, half, off := string(rune('a'+raw[0]%8)), time.Duration(raw[1]), time.Duration(int8(raw[2]))
			in = append(in, grouped(says("s"+strconv.Itoa(len(in)), off, half), group))
			widen = append(widen, time.Duration(raw[3]))
			lies[group] = lies[group] || off.Abs() > half // with a liar in it a group may contradict itself
		}
		honest := 0
		for _, lie := range lies {
			if !lie {
				honest++
			}
		}
		sel, err := ntp.Select(in, 0, 50)
		if 2*honest > len(lies) && (err != nil || !inside(sel, noon)) {
			t.Errorf("%d of %d groups are honest: selected %v to %v, %v", honest, len(lies), sel.Low.Sub(noon), sel.High.Sub(noon), err)
		}
		if err == nil && (sel.High.Before(sel.Low) || len(sel.Agreed) == 0 || len(sel.Agreed)+len(sel.Rejected) != len(lies)) {
			t.Errorf("selected %+v of %+v", sel, in)
		}
		mixed := slices.Clone(in)
		slices.Reverse(mixed)
		if again, err2 := ntp.Select(mixed, 0, 50); !reflect.DeepEqual(sel, again) || (err == nil) != (err2 == nil) {
			t.Errorf("reversed: %+v, %v, was %+v, %v", again, err2, sel, err)
		}
		// Wider intervals lose no group and no instant.
		for i := range mixed {
			mixed[i] = in[i]
			mixed[i].RootDistance += widen[i]
		}
		wide, err2 := ntp.Select(mixed, 0, 50)
		if err == nil && (err2 != nil || wide.Low.After(sel.Low) || wide.High.Before(sel.High)) {
			t.Errorf("widened: %+v, %v, was %+v", wide, err2, sel)
		}
		for _, g := range sel.Agreed {
			if !slices.Contains(wide.Agreed, g) {
				t.Errorf("widening excluded %s", g)
			}
		}
	})
}

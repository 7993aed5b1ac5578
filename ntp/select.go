package ntp

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"time"
)

// A Selection is what a majority of the groups agreed on.
type Selection struct {
	At        time.Duration // CLOCK_BOOTTIME that Low and High refer to
	Low, High time.Time     // the true time lies between them if less than half of the groups lie
	Agreed    []string      // groups whose interval touches [Low, High], sorted
	Rejected  []string      // the other groups, sorted: falsetickers
	Leap      Leap          // what more than half of the agreeing groups announce
	Names     []string      // Agreed as evidence repeats them: "BDS(beidou)" at stratum 1, otherwise the group
}

// ErrNoMajority means that no instant lies within the intervals of more than half of the groups.
var ErrNoMajority = errors.New("ntp: no majority of sources agrees")

// span is an interval of UTC in Unix nanoseconds, both ends belonging to it.
type span struct{ low, high int64 }

func (s span) mid() int64            { return s.low + (s.high-s.low)/2 }
func (s span) half() time.Duration   { return time.Duration((s.high - s.low + 1) / 2) } // rounded up
func (s span) touches(o span) bool   { return s.low <= o.high && o.low <= s.high }
func (s span) intersect(o span) span { return span{max(s.low, o.low), min(s.high, o.high)} }

// growth is how far a clock may run away in d at ppm parts per million, rounded up. A negative d counts as positive.
func growth(d time.Duration, ppm int) time.Duration {
	if d < 0 {
		d = -d
	}
	const million = 1_000_000
	return d/million*time.Duration(ppm) + (d%million*time.Duration(ppm)+million-1)/million
}

// Select finds what the majority of groups in ms agrees on, at the instant at of CLOCK_BOOTTIME; each interval is carried
// there and widened by driftPPM for the way. The measurements must have passed [Measurement.Check].
//
// It follows the selection of RFC 5905 §11.2.1 with one difference. The RFC looks for the smallest number of falsetickers
// that explains the intervals, and takes the region which all the others share. Two liars of five who hold hands with two
// honest sources can then exclude the true time (TestSmallestAllowanceExcludesTruth has the numbers). Here the number
// of falsetickers allowed is always the largest that leaves a majority, and [Low, High] runs from the first to the last
// instant shared by more than half of the groups. The true time is in every honest interval, honest groups are more than
// half, hence it lies in [Low, High], whatever the others say. The price is a wider bound, never a wrong one.
//
// A group has one voice, the hull of its sources' intervals, provided that they all overlap. Otherwise it contradicts
// itself: it counts as a group and agrees with nobody.
//
// The result does not depend on the order of ms. The error is [ErrNoMajority].
func Select(ms []Measurement, at time.Duration, driftPPM int) (Selection, error) {
	type voice struct {
		name, shown string
		hull, core  span // union and intersection of the group's intervals
		leap        Leap
		leaps       bool // all sources of the group announce the same
		stratum     uint8
	}
	voices := make(map[string]*voice)
	for _, m := range ms {
		way := at - m.Boot
		half := int64(m.RootDistance + growth(way, driftPPM))
		mid := m.UTC.UnixNano() + int64(way)
		s := span{mid - half, mid + half}
		name := m.group()
		v := voices[name]
		if v == nil {
			v = &voice{name: name, hull: s, core: s, leap: m.Leap, leaps: true, stratum: m.Stratum, shown: shown(m)}
			voices[name] = v
			continue
		}
		v.hull = span{min(v.hull.low, s.low), max(v.hull.high, s.high)}
		v.core = v.core.intersect(s)
		v.leaps = v.leaps && v.leap == m.Leap
		// The best source lends its name; ties go by the text, for the order of ms must not show.
		if m.Stratum < v.stratum || m.Stratum == v.stratum && shown(m) < v.shown {
			v.stratum, v.shown = m.Stratum, shown(m)
		}
	}

	// Sweep over the ends. At equal times an interval opens before another closes: touching is agreeing.
	type edge struct {
		at   int64
		step int
	}
	var edges []edge
	for _, v := range voices {
		if v.core.low <= v.core.high {
			edges = append(edges, edge{v.hull.low, +1}, edge{v.hull.high, -1})
		}
	}
	slices.SortFunc(edges, func(a, b edge) int {
		return cmp.Or(cmp.Compare(a.at, b.at), cmp.Compare(b.step, a.step))
	})
	need := len(voices)/2 + 1
	var found bool
	var common span
	depth := 0
	for _, e := range edges {
		if e.step < 0 && depth >= need {
			common.high = e.at // the last one wins
		}
		depth += e.step
		if e.step > 0 && depth == need && !found {
			common.low, found = e.at, true
		}
	}
	if !found {
		return Selection{}, fmt.Errorf("%w: %d groups answered, %d must share an instant", ErrNoMajority, len(voices), need)
	}

	sel := Selection{At: at, Low: unixNano(common.low), High: unixNano(common.high)}
	leaps := make(map[Leap]int)
	for _, v := range voices {
		if v.core.low > v.core.high || !v.hull.touches(common) {
			sel.Rejected = append(sel.Rejected, v.name)
			continue
		}
		sel.Agreed = append(sel.Agreed, v.name)
		sel.Names = append(sel.Names, v.shown)
		if v.leaps {
			leaps[v.leap]++
		}
	}
	for _, l := range []Leap{LeapInsert, LeapDelete} {
		if 2*leaps[l] > len(sel.Agreed) {
			sel.Leap = l
		}
	}
	slices.Sort(sel.Agreed)
	slices.Sort(sel.Rejected)
	slices.Sort(sel.Names)
	return sel, nil
}

func (s Selection) span() span { return span{s.Low.UnixNano(), s.High.UnixNano()} }

func unixNano(ns int64) time.Time { return time.Unix(0, ns).UTC() }

// shown is the group's name in evidence. At stratum 1 the reference identifier stands before it, with anything but
// printable ASCII left out, because it is the server's own word.
func shown(m Measurement) string {
	if m.Stratum != 1 {
		return m.group()
	}
	var id []byte
	for i := range min(len(m.RefID), 16) {
		if b := m.RefID[i]; b > ' ' && b < 0x7f && b != '(' && b != ')' && b != '+' {
			id = append(id, b)
		}
	}
	if len(id) == 0 {
		return m.group()
	}
	return string(id) + "(" + m.group() + ")"
}

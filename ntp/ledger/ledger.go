// Package ledger remembers how own time and its sources did: every round of the last hours in memory, and the sums of an
// hour for the journal. It is pure: rounds are handed in, instants are CLOCK_BOOTTIME, and UTC is put to them when somebody
// asks, from a reading taken then.
package ledger

import (
	"cmp"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"yinjian/ntp"
)

// What one source did in one round.
type Said struct {
	Source, Group string
	Measurement   ntp.Measurement // zero: it did not answer
	// Offset is the source's time less own time, Known if there was an own time.
	Offset time.Duration
	Known  bool
	// Reason is why the answer was no candidate, or why there was none; empty for a candidate.
	Reason   string
	Rejected bool // a candidate that was outvoted
}

func (s Said) answered() bool { return s.Measurement.Source != "" }

// A Round is one round of polling, and the reading right after it.
type Round struct {
	Boot      time.Duration // CLOCK_BOOTTIME
	Reading   ntp.Reading
	Confirmed bool // it confirmed the clock, or counted towards Trusted
	Said      []Said
}

const (
	// points is how many rounds are kept: 18 hours at one every 16 s.
	points = 4096
	// MaxReason bounds a reason in bytes, and maxSources the sources of an hour: what becomes of the journal's entry must
	// have a bounded size.
	MaxReason  = 160
	maxSources = 64
	maxRefID   = 16
)

// A Ledger is fed each round and each change of state. Its methods are safe for concurrent use.
type Ledger struct {
	mu     sync.Mutex
	ring   []point // the oldest at next once it is full
	next   int
	state  ntp.State
	since  time.Duration // when the present hour, or the state within it, was last reckoned
	begun  time.Duration
	hour   Hour
	byName map[string]*SourceHour
	order  []string
}

// A point is a round as the ring keeps it.
type point struct {
	boot    time.Duration
	state   ntp.State
	bound   time.Duration
	offsets []PointSource
}

// New begins at boot, in a state.
func New(boot time.Duration, state ntp.State) *Ledger {
	l := &Ledger{state: state, begun: boot, since: boot}
	l.fresh()
	return l
}

func (l *Ledger) fresh() {
	l.hour = Hour{StatesMS: map[ntp.State]int64{}}
	l.byName, l.order = map[string]*SourceHour{}, nil
}

// reckon adds the time since the last look to the state that it was spent in.
func (l *Ledger) reckon(boot time.Duration) {
	if boot > l.since {
		l.hour.StatesMS[l.state] += (boot - l.since).Milliseconds()
		l.since += (boot - l.since).Truncate(time.Millisecond)
	}
}

// Changed notes that the clock is in another state from boot on.
func (l *Ledger) Changed(boot time.Duration, to ntp.State) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.reckon(boot)
	l.state = to
}

// Add notes a round.
func (l *Ledger) Add(r Round) {
	l.mu.Lock()
	defer l.mu.Unlock()
	p := point{boot: r.Boot, state: r.Reading.State, bound: r.Reading.Bound}
	l.hour.Rounds++
	if r.Confirmed {
		l.hour.Confirmed++
	}
	if r.Reading.Trusted() {
		us := ceilUS(r.Reading.Bound)
		if l.hour.BoundMinUS == 0 || us < l.hour.BoundMinUS {
			l.hour.BoundMinUS = us
		}
		l.hour.BoundMaxUS = max(l.hour.BoundMaxUS, us)
	}
	for _, s := range r.Said {
		h := l.byName[s.Source]
		if h == nil && len(l.order) < maxSources {
			h = &SourceHour{Name: s.Source, Group: s.Group}
			l.byName[s.Source] = h
			l.order = append(l.order, s.Source)
		}
		if h != nil {
			h.add(s)
		}
		if s.answered() && s.Known {
			p.offsets = append(p.offsets, PointSource{
				Name: s.Source, OffsetUS: s.Offset.Microseconds(), DistanceUS: ceilUS(s.Measurement.RootDistance), Candidate: s.Reason == "", Rejected: s.Rejected,
			})
		}
	}
	if len(l.ring) < points {
		l.ring = append(l.ring, p)
		return
	}
	l.ring[l.next] = p
	l.next = (l.next + 1) % points
}

// Close ends the hour and begins the next. Now is a reading taken at boot; if it has no time, the hour has none.
func (l *Ledger) Close(boot time.Duration, now ntp.Reading) Hour {
	l.mu.Lock()
	defer l.mu.Unlock()
	h := l.sum(boot, now)
	l.begun = l.since
	l.fresh()
	return h
}

// Present is the hour as far as it has come.
func (l *Ledger) Present(boot time.Duration, now ntp.Reading) Hour {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.sum(boot, now)
}

func (l *Ledger) sum(boot time.Duration, now ntp.Reading) Hour {
	l.reckon(boot)
	h := l.hour
	h.StatesMS = map[ntp.State]int64{}
	for s, ms := range l.hour.StatesMS {
		h.StatesMS[s] = ms
	}
	h.Sources = []SourceHour{}
	for _, name := range l.order {
		h.Sources = append(h.Sources, *l.byName[name])
	}
	slices.SortFunc(h.Sources, func(a, b SourceHour) int { return cmp.Compare(a.Name, b.Name) })
	h.SpanMS = (boot - l.begun).Milliseconds()
	if !now.Time.IsZero() {
		h.From, h.To = now.Time.Add(l.begun-boot).UTC(), now.Time.UTC()
	}
	return h
}

// Points are the rounds that are kept, oldest first, with UTC by a reading taken at boot. Without a time there are none.
func (l *Ledger) Points(boot time.Duration, now ntp.Reading) []Point {
	if now.Time.IsZero() {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	out := make([]Point, 0, len(l.ring))
	for i := range l.ring {
		p := l.ring[(l.next+i)%len(l.ring)]
		out = append(out, Point{At: now.Time.Add(p.boot - boot).UTC(), State: p.state, BoundUS: ceilUS(p.bound), Sources: p.offsets})
	}
	return out
}

// An Hour is what the journal keeps of an hour, as JSON. Its size is bounded whatever the sources say.
type Hour struct {
	From      time.Time           `json:"from"` // UTC by own time; zero when it was not known
	To        time.Time           `json:"to"`
	SpanMS    int64               `json:"span_ms"` // by CLOCK_BOOTTIME
	Rounds    int                 `json:"rounds"`
	Confirmed int                 `json:"confirmed"` // rounds that confirmed the clock, or counted towards Trusted
	StatesMS  map[ntp.State]int64 `json:"states_ms"`
	// BoundMinUS and BoundMaxUS are of readings that could have been signed; 0: there was none.
	BoundMinUS int64        `json:"bound_min_us"`
	BoundMaxUS int64        `json:"bound_max_us"`
	Sources    []SourceHour `json:"sources"`
	// Tokens are what the appliance's units answered; this package leaves it to the caller.
	Tokens Tokens `json:"tokens"`
}

// Tokens counts the answers of timestamp units.
type Tokens struct {
	Issued       uint64 `json:"issued"`
	RefusedTime  uint64 `json:"refused_time"` // timeNotAvailable
	RefusedOther uint64 `json:"refused_other"`
}

// A SourceHour is one source in an hour. Offsets are its time less own time.
type SourceHour struct {
	Name       string `json:"name"`
	Group      string `json:"group"`
	Polls      int    `json:"polls"`
	Answers    int    `json:"answers"`
	Candidates int    `json:"candidates"` // answers good enough to vote
	Rejected   int    `json:"rejected"`   // candidates that were outvoted
	Offsets    int    `json:"offsets"`    // answers that could be compared with own time; 0: the next four say nothing
	OffsetUS   int64  `json:"offset_us"`  // the last
	MinUS      int64  `json:"offset_min_us"`
	MaxUS      int64  `json:"offset_max_us"`
	MeanUS     int64  `json:"offset_mean_us"`
	DistanceUS int64  `json:"root_distance_us"` // the last
	RTTUS      int64  `json:"rtt_us"`           // the last
	Stratum    uint8  `json:"stratum"`
	RefID      string `json:"refid"`
	Unfit      int    `json:"unfit"`  // answers that were no candidates
	Failed     int    `json:"failed"` // polls without answer
	Reason     string `json:"last_reason,omitempty"`

	sum float64
}

func (h *SourceHour) add(s Said) {
	h.Polls++
	if s.Reason != "" {
		h.Reason = cut(s.Reason)
	}
	if !s.answered() {
		h.Failed++
		return
	}
	m := s.Measurement
	h.Answers++
	h.DistanceUS, h.RTTUS, h.Stratum, h.RefID = ceilUS(m.RootDistance), m.RTT.Microseconds(), m.Stratum, refID(m.RefID)
	switch {
	case s.Reason != "":
		h.Unfit++
	case s.Rejected:
		h.Rejected++
		fallthrough
	default:
		h.Candidates++
	}
	if !s.Known {
		return
	}
	us := s.Offset.Microseconds()
	if h.Offsets == 0 || us < h.MinUS {
		h.MinUS = us
	}
	if h.Offsets == 0 || us > h.MaxUS {
		h.MaxUS = us
	}
	h.Offsets++
	h.OffsetUS = us
	h.sum += float64(us)
	h.MeanUS = int64(h.sum / float64(h.Offsets))
}

// A Point is one round.
type Point struct {
	At      time.Time     `json:"at"`
	State   ntp.State     `json:"state"`
	BoundUS int64         `json:"bound_us"`
	Sources []PointSource `json:"sources"` // those that answered and could be compared with own time
}

// A PointSource is one source in a round.
type PointSource struct {
	Name       string `json:"name"`
	OffsetUS   int64  `json:"offset_us"`
	DistanceUS int64  `json:"root_distance_us"`
	Candidate  bool   `json:"candidate"`
	Rejected   bool   `json:"rejected,omitempty"`
}

// A Change is a change of the clock's state.
type Change struct {
	At     time.Time `json:"at"` // UTC by own time; zero when it was not known
	From   ntp.State `json:"from"`
	To     ntp.State `json:"to"`
	Reason string    `json:"reason"`
}

func ceilUS(d time.Duration) int64 { return int64((d + time.Microsecond - 1) / time.Microsecond) }

// cut shortens a reason: it can quote what a server sent.
func cut(s string) string {
	if len(s) <= MaxReason {
		return s
	}
	return strings.TrimRightFunc(s[:MaxReason], func(r rune) bool { return r == utf8.RuneError })
}

// refID is printable ASCII: it is the server's own word.
func refID(s string) string {
	return strings.Map(func(r rune) rune {
		if r <= ' ' || r >= 0x7f {
			return '?'
		}
		return r
	}, s[:min(len(s), maxRefID)])
}

package alarm

import (
	"crypto/rand"
	"encoding/hex"
	"slices"
	"strings"
	"time"
)

// Kinds of events.
const (
	Raised  = "raised"
	Cleared = "cleared"
	Tested  = "test"
)

// An Event is what leaves the appliance: an alarm was raised, or is over.
type Event struct {
	ID    string `json:"id"`    // 16 hexadecimal digits, the same when it is cleared
	Event string `json:"event"` // Raised, Cleared, Tested
	Condition
}

// An Active alarm was raised and is not over.
type Active struct {
	ID string `json:"id"`
	Condition
	Since time.Duration `json:"-"` // by the caller's clock
}

// A Tracker turns what is found again and again into events: each alarm is raised once and cleared once, however long it
// lasts and however often it comes and goes meanwhile. Not safe for concurrent use.
type Tracker struct {
	// Raise is how long a condition must have held, and Clear how long it must be gone.
	Raise, Clear time.Duration

	of map[key]*track
}

type key struct {
	code   Code
	object string
}

type track struct {
	Condition
	id          string        // "" while it is not raised
	told        Severity      // the worst that was told, of late
	worst       time.Duration // when it was last as bad as that
	first, last time.Duration // when it was seen, since it was not
	since       time.Duration // when it was raised
}

// Look takes what is wrong at now, of a clock that only goes forward, and answers what is new, in the order of codes and
// objects. An alarm that has become more severe, or outlasts the drill that brought it about, is raised again, under its own
// id; one that goes up and down is not, until it was less severe for as long as it takes to clear.
func (t *Tracker) Look(now time.Duration, found []Condition) []Event {
	if t.of == nil {
		t.of = map[key]*track{}
	}
	var out []Event
	for _, c := range fold(found) {
		k := key{c.Code, c.Object}
		one := t.of[k]
		if one == nil {
			one = &track{first: now}
			t.of[k] = one
		}
		if one.id != "" && one.Drill == "" { // it was there before the drill
			c.Drill = ""
		}
		outlasts := one.Drill != "" && c.Drill == ""
		one.last, one.Condition = now, c
		switch {
		case one.id == "" && now-one.first >= t.Raise:
			one.id, one.since, one.told, one.worst = newID(), now, c.Severity, now
			out = append(out, Event{one.id, Raised, c})
		case one.id != "" && (c.Severity > one.told || outlasts):
			one.told, one.worst = c.Severity, now
			out = append(out, Event{one.id, Raised, c})
		case c.Severity == one.told:
			one.worst = now
		case now-one.worst >= t.Clear:
			one.told, one.worst = c.Severity, now
		}
	}
	for k, one := range t.of {
		if one.last == now {
			continue
		}
		if one.id == "" { // it did not last
			delete(t.of, k)
		} else if now-one.last >= t.Clear {
			out = append(out, Event{one.id, Cleared, one.Condition})
			delete(t.of, k)
		}
	}
	slices.SortStableFunc(out, func(a, b Event) int {
		if a.Code != b.Code {
			return strings.Compare(string(a.Code), string(b.Code))
		}
		return strings.Compare(a.Object, b.Object)
	})
	return out
}

// Active lists the alarms that were raised and are not over, the most severe first.
func (t *Tracker) Active() []Active {
	out := []Active{}
	for _, one := range t.of {
		if one.id != "" {
			out = append(out, Active{one.id, one.Condition, one.since})
		}
	}
	slices.SortFunc(out, func(a, b Active) int {
		if a.Severity != b.Severity {
			return int(b.Severity - a.Severity)
		}
		return strings.Compare(string(a.Code)+"\x00"+a.Object, string(b.Code)+"\x00"+b.Object)
	})
	return out
}

func newID() string {
	var b [8]byte
	rand.Read(b[:]) // never fails (crypto/rand)
	return hex.EncodeToString(b[:])
}

// NewTest is an event that says only that alarms arrive.
func NewTest(detail string) Event {
	return Event{newID(), Tested, Condition{Code: Test, Detail: detail}.fill()}
}

package uses

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/sirupsen/logrus"

	"yinjian/appliance/audit"
	"yinjian/hsm/uselog"
)

// A KeyCount is one key's line in a [Report].
type KeyCount struct {
	Slot string `json:"slot"`
	Key  string `json:"key"`
	Count
	Open uint64 `json:"open"` // found nowhere, and not named by the journal yet: under way, or in the report's Open
}

// A NamedAt is a signature that the journal names as unaccounted for.
type NamedAt struct {
	Sequence uint64 `json:"sequence"`
	Named
}

// A BrokenAt is a damage that the journal names.
type BrokenAt struct {
	Sequence uint64 `json:"sequence"`
	uselog.Damage
}

// An ApartAt is a difference of counts that the journal names.
type ApartAt struct {
	Sequence uint64 `json:"sequence"`
	Difference
}

// A Report is what [Verify] found.
type Report struct {
	Absent  bool            `json:"absent,omitempty"` // there is no log of uses, and the journal knows of none
	Entries uint64          `json:"entries"`          // the journal was read to here
	Keys    []KeyCount      `json:"keys"`
	Open    []Named         `json:"open"`   // found nowhere, not under way, and not named by the journal yet
	Broken  []uselog.Damage `json:"broken"` // likewise
	Named   []NamedAt       `json:"named"`  // named by the journal
	Damages []BrokenAt      `json:"damages"`
	Apart   []ApartAt       `json:"apart"`
}

// OK says that every use has its account, or its name in the journal.
func (r *Report) OK() bool { return len(r.Open) == 0 && len(r.Broken) == 0 }

// Verify holds the logs of uses in dir against the journal and changes nothing. Beside a running appliance signatures
// are under way, always others: those that the first look found are judged, and for as long as the journal grows they
// have five times wait to be accounted for, otherwise wait. What is left of them is answered, and named by the appliance
// itself only when it cannot be under way any more.
func Verify(ctx context.Context, store audit.Store, dir string, slots []string, wait time.Duration) (*Report, error) {
	quiet := logrus.New()
	quiet.SetOutput(io.Discard)
	begun := time.Now() // interval
	grown, entries := begun, uint64(0)
	var r *Reconciler
	var judged time.Time // uses that were seen by then are
	for {
		fresh := r == nil
		if fresh {
			var err error
			if r, err = New(ctx, Config{Dir: dir, Slots: slots, Store: store, Log: quiet}); err != nil {
				return nil, err
			}
		}
		if err := r.Pass(ctx, false); err != nil {
			return nil, err
		}
		now := time.Now() // interval
		if fresh {
			judged = now
		}
		if r.st.Entries > entries {
			grown, entries = now, r.st.Entries
		}
		if r.left(judged) == 0 && len(r.broken) == 0 || now.Sub(grown) > wait || now.Sub(begun) > 5*wait {
			break
		}
		if len(r.broken) > 0 {
			r = nil // the appliance may have put files away meanwhile
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	rep := &Report{Entries: r.st.Entries, Keys: []KeyCount{}, Open: []Named{}, Broken: append([]uselog.Damage{}, r.broken...), Named: []NamedAt{}, Damages: []BrokenAt{}, Apart: []ApartAt{}}
	open := map[[2]string]uint64{}
	for _, u := range r.waiting() {
		if !u.seen.After(judged) {
			u.Reason, _ = r.reason(u)
			rep.Open = append(rep.Open, u.told().Named)
		}
		open[[2]string{u.Slot, u.Key}]++
	}
	for name, s := range r.st.Slots {
		for key, c := range s.Keys {
			rep.Keys = append(rep.Keys, KeyCount{name, key, *c, open[[2]string{name, key}]})
		}
	}
	slices.SortFunc(rep.Keys, func(a, b KeyCount) int {
		return cmp.Or(strings.Compare(a.Slot, b.Slot), strings.Compare(a.Key, b.Key))
	})
	if _, err := os.Stat(dir); err != nil && r.first {
		rep.Absent = true
	}
	return rep, rep.history(ctx, store)
}

// left is how many of the uses that had been seen by then wait for their account.
func (r *Reconciler) left(by time.Time) (n int) {
	for _, l := range r.open {
		for _, u := range l {
			if !u.seen.After(by) {
				n++
			}
		}
	}
	return n
}

// history reads what the journal has named.
func (rep *Report) history(ctx context.Context, store audit.Store) error {
	segments, err := store.Segments(ctx)
	if err != nil {
		return fmt.Errorf("uses: %w", err)
	}
	for _, seg := range segments {
		err := store.Rows(ctx, seg.Number, int64(seg.First), func(row audit.Row) error {
			if row.Kind != KindUnaccounted && row.Kind != KindBroken && row.Kind != KindCounter {
				return nil
			}
			e, err := audit.ParseEntry(row.DER)
			if err != nil {
				return err
			}
			if e.Kind == KindCounter {
				number := func(name string) int64 { n, _ := e.Field(name).(audit.Int); return int64(n) }
				rep.Apart = append(rep.Apart, ApartAt{e.Sequence, Difference{
					Slot: e.Object, Key: e.Text("key"), Machine: uint64(number("machine")), Log: uint64(number("log")), More: number("more"), Reason: e.Text("reason"),
				}})
				return nil
			}
			if e.Kind == KindBroken {
				n, _ := e.Field("uses").(audit.Int)
				rep.Damages = append(rep.Damages, BrokenAt{e.Sequence, uselog.Damage{Slot: e.Object, What: e.Text("what"), Number: uint64(n), Detail: e.Text("detail")}})
				return nil
			}
			if _, ok := e.Payload("uses"); !ok {
				return nil
			}
			b, err := audit.ReadPayload(ctx, store, e, "uses")
			var l list
			if err == nil {
				err = json.Unmarshal(b, &l)
			}
			for _, n := range l {
				rep.Named = append(rep.Named, NamedAt{e.Sequence, n})
			}
			return err
		})
		if err != nil {
			return fmt.Errorf("uses: %w", err)
		}
	}
	return nil
}

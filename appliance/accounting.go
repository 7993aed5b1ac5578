package appliance

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"path/filepath"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"yinjian/appliance/audit"
	"yinjian/appliance/uses"
	"yinjian/hsm"
	"yinjian/hsm/uselog"
)

// UsesDir is where the workers record what the keys were used for.
func UsesDir(dir string) string { return filepath.Join(dir, "uses") }

// UsesSlots are the slots whose uses are recorded: all whose signatures are kept. A TLS handshake is not.
func UsesSlots() []string {
	var names []string
	for _, c := range hsm.Classes {
		if c != hsm.TLS {
			names = append(names, string(c))
		}
	}
	return names
}

// An accounting gives account of each signature: it journals those that were thrown away, and has the rest held against
// the journal.
type accounting struct {
	a    *Appliance
	life uselog.Hash // of this start

	reconciler *uses.Reconciler // the running goroutine's; nil while it could not be made

	mu        sync.Mutex // guards what follows
	discarded []uses.Named
	lost      int // discarded while too many waited
	summary   uses.Summary
	counts    *uses.Reconciler // for its KeyUses alone; nil before the first pass
	err       error
}

const (
	reconcileEvery = 30 * time.Second
	followEvery    = 250 * time.Millisecond // entries wait for it in memory
	// discardsKept bounds what waits for a journal that cannot be written; the rest will be named by the reconciler.
	discardsKept  = 10_000
	discardsEntry = 500
	maxReason     = 300
)

func newAccounting(a *Appliance) *accounting {
	c := &accounting{a: a}
	rand.Read(c.life[:]) // never fails (crypto/rand)
	return c
}

// discard remembers signatures that were made and that nobody got. It does not wait.
func (c *accounting) discard(reason error, made ...[]byte) {
	text := reason.Error()
	if len(text) > maxReason {
		text = strings.TrimRightFunc(text[:maxReason], func(r rune) bool { return r == utf8.RuneError })
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, b := range made {
		for _, h := range uses.SignaturesIn(b) {
			if len(c.discarded) >= discardsKept {
				c.lost++
				continue
			}
			c.discarded = append(c.discarded, uses.Named{Signature: hex.EncodeToString(h[:]), Reason: text})
		}
	}
}

// abandoned is discard for what a worker answered when nobody waited any more: a signature as the module gave it.
func (c *accounting) abandoned(answer []byte, reason error) {
	if r, s, err := hsm.NormalizeSM2(answer); err == nil {
		if der, err := hsm.MarshalSM2(r, s); err == nil {
			answer = der
		}
	}
	c.discard(reason, answer)
}

// flush journals what was thrown away. What cannot be written now waits.
func (c *accounting) flush(ctx context.Context) error {
	for {
		c.mu.Lock()
		part := c.discarded[:min(len(c.discarded), discardsEntry)]
		lost := c.lost
		c.lost = 0
		c.mu.Unlock()
		if lost > 0 {
			c.a.log.WithField("count", lost).Error("signatures were thrown away and could not be noted; they will be named as unaccounted for")
		}
		if len(part) == 0 {
			return nil
		}
		if c.a.journal.SealedTo() < c.a.journal.Size() {
			return errors.New("the journal's end is not sealed") // another entry there could keep the next start from happening
		}
		d, err := uses.Discarded(part)
		if err == nil {
			_, err = c.a.journal.Append(ctx, d)
		}
		if err != nil {
			return err
		}
		c.mu.Lock()
		c.discarded = c.discarded[len(part):]
		c.mu.Unlock()
	}
}

// counters asks the cipher machine how often each key of a slot has signed.
func (c *accounting) counters(ctx context.Context, slot string) (map[string]uint64, error) {
	w, _ := c.a.machines.slotOf(slot)
	if w == nil {
		return nil, nil // the machine was removed, is being added, or has refused its PIN
	}
	keys, err := w.Keys(ctx)
	out := map[string]uint64{}
	for _, k := range keys {
		if k.Uses != nil {
			out[k.Label] = *k.Uses
		}
	}
	return out, err
}

func (c *accounting) sessions(slot string) int {
	_, n := c.a.machines.slotOf(slot)
	return n
}

// pass flushes and reconciles. Its failure is shown and tried again; signing goes on, and its uses are recorded.
func (c *accounting) pass(ctx context.Context, final bool) {
	err := c.flush(ctx)
	if err == nil && c.reconciler == nil {
		c.reconciler, err = uses.New(ctx, uses.Config{
			Dir: UsesDir(c.a.dir), Slots: UsesSlots(), Store: c.a.store, Recent: c.a.journal.Recent, Life: c.life, Append: c.a.journal.Append,
			Counters: c.counters, Sessions: c.sessions, Idle: []string{string(hsm.Staff), string(hsm.TSA), string(hsm.CA)},
			Sealed: func() bool { return c.a.journal.SealedTo() >= c.a.journal.Size() }, Log: c.a.log,
		})
	}
	if err == nil {
		err = c.reconciler.Pass(ctx, final)
	}
	if err != nil && (ctx.Err() == nil || final) {
		c.a.log.WithError(err).Error("the uses of keys could not be held against the journal; it is tried again")
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.err = err
	if c.reconciler != nil {
		c.summary, c.counts = c.reconciler.Summary(), c.reconciler
	}
}

// run follows both sides and passes from time to time until ctx ends, and once more.
func (c *accounting) run(ctx context.Context) error {
	flush, follow, tick := time.NewTicker(time.Second), time.NewTicker(followEvery), time.NewTicker(reconcileEvery)
	defer flush.Stop()
	defer follow.Stop()
	defer tick.Stop()
	for {
		select {
		case <-flush.C:
			_ = c.flush(ctx) // pass says what is wrong, with this and with the next
		case <-follow.C:
			if c.reconciler != nil {
				_ = c.reconciler.Follow(ctx)
			}
		case <-tick.C:
			c.pass(ctx, false)
		case <-ctx.Done():
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
			defer cancel()
			c.pass(last, true)
			return nil
		}
	}
}

// status is what /health/state shows.
func (c *accounting) status() usesState {
	c.mu.Lock()
	defer c.mu.Unlock()
	return usesState{Summary: c.summary, Error: errorText(c.err)}
}

// announced is the field of the entry that announces this start: uses of a worker that names another are not ours.
func (c *accounting) announced() audit.Field {
	return audit.Field{Name: uses.FieldLife, Value: audit.Octets(c.life[:])}
}

// Package uses holds what the keys were used for (hsm/uselog) against the journal: each signature that a worker made is
// in an entry, under a checkpoint, named as thrown away, or is named itself, for ever, as one that nothing accounts for.
//
// What an entry accounts for is found in its payloads: the signature itself, a CMS's, a token's, that of a certificate,
// CRL or request. A [Reconciler] reads both sides from where it left off, so that a pass costs what is new. What it knows is kept in
// a file, and the journal says which file ([KindTotal]): a log that was cut, changed, put back or removed shows against
// it ([KindBroken]).
//
// It sees the signatures that came through the appliance's workers. One that another program had made with the PIN, by
// PKCS#11 and past the worker, is in no log of uses: that shows where the cipher machine counts by itself ([KindCounter]),
// as to how many, not which.
package uses

import (
	"cmp"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/emmansun/gmsm/sm3"
	"github.com/sirupsen/logrus"

	"yinjian/appliance/audit"
	"yinjian/hsm"
	"yinjian/hsm/uselog"
)

// Kinds of entries, and the field of an entry that announces a start.
const (
	KindTotal       = "uses.total"          // how far both sides agree: field state.sm3, and each slot's uses and chain
	KindUnaccounted = "uses.unaccounted"    // signatures that nothing accounts for
	KindBroken      = "uses.broken"         // a log of uses is not what it was
	KindDiscarded   = "signature.discarded" // signatures that were thrown away
	FieldLife       = "uses.life"
)

// Reasons of a [Named].
const (
	// Ended: made within the last minute of a worker that ended; a power cut, a crash or a kill came between signature
	// and record.
	Ended = "process ended between signature and record (进程在签名与落盘之间结束)"
	// NoRecord: the worker went on, or had more than a minute for it, and there is no entry.
	NoRecord = "no record (没有记录)"
	// Stopped: made in the name of a start that had ended in order.
	Stopped = "made after the appliance was stopped (设备停机之后产生)"
	// Foreign: made by a worker that no start of the appliance announced.
	Foreign = "made by a worker that no start announced (不属于任何一次启动)"
)

// tail is how long before a worker's end a signature can have been under way; the longest takes 45 s.
const tail = time.Minute

// A Count is what is known of one key.
type Count struct {
	Uses        uint64 `json:"uses"`        // signatures made
	Before      uint64 `json:"before"`      // of these, made before the logs that were there; not held against anything
	Entries     uint64 `json:"entries"`     // found in entries
	Checkpoints uint64 `json:"checkpoints"` // found under checkpoints
	Discarded   uint64 `json:"discarded"`   // named as thrown away
	Unaccounted uint64 `json:"unaccounted"` // named as unaccounted for
	// Health counts signatures of a key that only proves that its machine signs (hsm.HealthPrefix): nobody gets them.
	Health uint64 `json:"health,omitempty"`
	// Elsewhere is how many more the cipher machine itself counts, over those above; 0 also where it does not count.
	Elsewhere int64 `json:"elsewhere"`
	Offset    int64 `json:"offset,omitempty"` // by which its count is ahead, as was seen and named
}

func (c *Count) add(how settled) {
	switch how {
	case byEntry:
		c.Entries++
	case byCheckpoint:
		c.Checkpoints++
	case byDiscard:
		c.Discarded++
	case byName, byAlarm:
		c.Unaccounted++
	}
}

// A use is one that nothing accounts for yet.
type use struct {
	Named
	Ended bool  `json:"ended,omitempty"` // its worker has ended
	Left  int64 `json:"left,omitempty"`  // ms from this use to its worker's last
	After bool  `json:"after,omitempty"` // its start had ended in order before

	seen              time.Time   // when Follow or a pass saw it first; monotonic
	signature, signed uselog.Hash // Signature and Signed, whose texts are made when they are told: nearly every use has its account before
}

// A slot is one slot's side.
type slot struct {
	At    uselog.Position   `json:"at"`
	Life  string            `json:"life"` // of the last worker
	Keys  map[string]*Count `json:"keys"`
	Open  []*use            `json:"open"`
	Final string            `json:"final,omitempty"` // the life that ended in order
	// Of the cipher machine's own counts: there are some; they were compared before; and how many workers ended out of
	// order since.
	Counts  bool `json:"counts,omitempty"`
	Based   bool `json:"based,omitempty"`
	Crashes int  `json:"crashes,omitempty"`

	reader  *uselog.Reader
	pending *reading
	atMS    int64 // of the last use
}

// A state is what is kept over a restart.
type state struct {
	Entries    uint64           `json:"entries"`    // the journal was read to here
	Checkpoint uint64           `json:"checkpoint"` // checkpoints from this size on are read
	Lives      []string         `json:"lives"`      // announced starts that are still of interest
	Alarms     uint64           `json:"alarms"`     // unaccounted other than [Ended], and broken logs
	Slots      map[string]*slot `json:"slots"`
}

// Config makes a [Reconciler].
type Config struct {
	Dir   string   // the logs of uses, and what is kept here
	Slots []string // whose logs there must be; others in Dir, and those that the last total knows, are read as well
	Store audit.Store
	// Recent answers entries that were written just now and are in the store, as [audit.Journal.Recent]; nil: all are read from the store.
	Recent func(into []audit.Record, from uint64, most int) []audit.Record
	Life   uselog.Hash // of this start
	// Append writes an entry; nil: nothing is written, and nothing is kept.
	Append func(context.Context, audit.Draft) (audit.Receipt, error)
	// Counters answers how often each key of a slot has signed as the cipher machine itself counts; none, where it does
	// not, and nothing at all where there is nobody to ask now. nil: nobody is asked. Sessions is how many signatures can be under way in a slot; Idle names the slots that
	// nobody uses before the first pass is over.
	Counters func(ctx context.Context, slot string) (map[string]uint64, error)
	Sessions func(slot string) int
	Idle     []string
	// Sealed says whether the journal may be written to for this; nil: always.
	Sealed func() bool
	// Grace is how long a signature of a worker that goes on may be without an account; 0: two minutes, which is more
	// than a signature and the writing of its entry take.
	Grace time.Duration
	Log   logrus.FieldLogger
}

// A Reconciler holds both sides against each other. Follow and Pass run one at a time; Summary may be asked meanwhile.
type Reconciler struct {
	cfg     Config
	st      state
	slots   []string               // that are read
	open    map[uselog.Hash][]*use // RSA signs the same twice the same way
	broken  []uselog.Damage
	moved   bool      // something but checkpoints was accounted for since the last total
	told    time.Time // of the last total; monotonic
	counted time.Time // when the cipher machine's counts were read last; monotonic
	apart   []Difference
	recent  []audit.Record    // room for entries that are in memory
	passed  bool              // once
	orphans uint64            // signatures that entries hold and whose uses a power cut took; of the first pass after workers crashed
	first   bool              // there was no total
	young   bool              // and the journal begins with this start
	expect  map[string]uint64 // by slot: uses that the last total names, where its state is gone

	mu      sync.Mutex // guards what follows
	summary Summary
	keys    map[string]map[string]uint64 // uses by slot and key
}

// A Summary is what people are shown of it.
type Summary struct {
	Slots       map[string]Count `json:"slots"`
	Open        int              `json:"open"`   // signatures made just now
	Alarms      uint64           `json:"alarms"` // over the appliance's life
	Unaccounted uint64           `json:"unaccounted"`
	Counters    []string         `json:"counters"` // slots whose cipher machine counts by itself
	Entries     uint64           `json:"entries"`  // the journal was read to here
}

const statePrefix, stateSuffix = "state-", ".json"

// New reads what was kept and finds in the journal whether it is what was kept last.
func New(ctx context.Context, cfg Config) (*Reconciler, error) {
	if cfg.Grace == 0 {
		cfg.Grace = 2 * time.Minute
	}
	r := &Reconciler{cfg: cfg, open: map[uselog.Hash][]*use{}, expect: map[string]uint64{}, told: time.Now()} // interval
	if err := r.load(ctx); err != nil {
		return nil, fmt.Errorf("uses: %w", err)
	}
	return r, nil
}

// young is a journal that begins with this start: no key of its slots has signed before.
const young = 8

// load takes over the state that the journal's last total names. Without one that fits, both sides are read from the
// beginning, and the journal is told that the count was lost.
func (r *Reconciler) load(ctx context.Context) error {
	states := map[string]state{} // by SM3, hex
	names, err := filepath.Glob(filepath.Join(r.cfg.Dir, statePrefix+"*"+stateSuffix))
	if err != nil {
		return err
	}
	from := ^uint64(0)
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		var s state
		if json.Unmarshal(b, &s) != nil || s.Slots == nil {
			continue // no total names it
		}
		states[digestOf(b)] = s
		from = min(from, s.Entries)
	}
	size, _, err := r.cfg.Store.Head(ctx)
	if err != nil {
		return err
	}
	var last *audit.Entry
	look := func(from uint64) error {
		return audit.Scan(ctx, r.cfg.Store, min(from, size), size, func(rec audit.Record) error {
			if rec.Entry.Kind == KindTotal {
				last = &rec.Entry
			}
			return nil
		})
	}
	if err := look(from); err != nil {
		return err
	}
	if last == nil {
		if err := look(0); err != nil {
			return err
		}
	}
	r.first = last == nil
	var known bool
	if last != nil {
		sum, _ := last.Field("state.sm3").(audit.Octets)
		if r.st, known = states[hex.EncodeToString(sum)]; known {
			final, _ := last.Field("final").(audit.Bool)
			for _, s := range r.st.Slots {
				if final {
					s.Final = s.Life
				}
			}
		} else {
			r.breaks(uselog.Damage{Slot: "*", What: "missing", Detail: fmt.Sprintf("the state that entry %d names is not there: both sides are read from the beginning", last.Sequence)})
		}
	}
	if !known {
		r.st = state{}
		if last != nil {
			for _, f := range last.Fields {
				if name, ok := strings.CutSuffix(f.Name, ".uses"); ok {
					n, _ := f.Value.(audit.Int)
					r.expect[name] = uint64(n)
				}
			}
		}
	}
	if r.st.Slots == nil {
		r.st.Slots = map[string]*slot{}
	}
	r.young = r.first && size < young
	return r.follow(slices.Concat(r.cfg.Slots, slices.Collect(maps.Keys(r.st.Slots)), slices.Collect(maps.Keys(r.expect))))
}

// follow reads the logs of these slots from now on, and of all that have one in the folder: machines come while the
// appliance runs.
func (r *Reconciler) follow(names []string) error {
	there, err := uselog.Slots(r.cfg.Dir)
	if err != nil {
		return err
	}
	for _, name := range slices.Concat(names, there) {
		if slices.Contains(r.slots, name) {
			continue
		}
		r.slots = append(r.slots, name)
		s := r.st.Slots[name]
		if s == nil {
			s = &slot{Keys: map[string]*Count{}, Based: r.young && slices.Contains(r.cfg.Slots, name)} // a machine that is added may be older
			r.st.Slots[name] = s
		}
		s.reader, err = uselog.OpenReader(r.cfg.Dir, name, &s.At)
		var d *uselog.Damage
		if errors.As(err, &d) {
			if err := r.restart(name, d); err != nil {
				return err
			}
		} else if err != nil {
			return err
		}
		for _, u := range r.st.Slots[name].Open {
			b, _ := hex.DecodeString(u.Signature) // ours
			copy(u.signature[:], b)
			r.add(u)
		}
	}
	slices.Sort(r.slots)
	return nil
}

func digestOf(b []byte) string {
	sum := sm3.Sum(b)
	return hex.EncodeToString(sum[:])
}

// add makes a use wait for its account.
func (r *Reconciler) add(u *use) {
	u.seen = time.Now() // interval
	r.open[u.signature] = append(r.open[u.signature], u)
}

// told is u with its texts.
func (u *use) told() *use {
	if u.Signature == "" {
		u.Signature, u.Signed = hex.EncodeToString(u.signature[:]), hex.EncodeToString(u.signed[:])
	}
	return u
}

// waiting are the uses without an account, in the order in which each slot made them.
func (r *Reconciler) waiting() []*use {
	all := slices.Concat(slices.Collect(maps.Values(r.open))...)
	slices.SortFunc(all, func(a, b *use) int {
		return cmp.Or(strings.Compare(a.Slot, b.Slot), cmp.Compare(a.Number, b.Number))
	})
	return all
}

// remove takes one out.
func (r *Reconciler) remove(u *use) {
	h := u.signature
	if l := slices.DeleteFunc(r.open[h], func(o *use) bool { return o == u }); len(l) > 0 {
		r.open[h] = l
	} else {
		delete(r.open, h)
	}
}

// breaks remembers a damage for the journal.
func (r *Reconciler) breaks(d uselog.Damage) {
	r.broken = append(r.broken, d)
	r.cfg.Log.WithFields(logrus.Fields{"slot": d.Slot, "what": d.What, "uses": d.Number}).Error("a log of uses is not what it was: " + d.Detail)
}

// restart begins a slot anew after a damage. What is left of its log was accounted for anywhere in the journal.
func (r *Reconciler) restart(name string, d *uselog.Damage) error {
	r.breaks(*d)
	for _, u := range r.waiting() {
		if u.Slot == name {
			r.remove(u)
		}
	}
	reader, err := uselog.OpenReader(r.cfg.Dir, name, nil)
	if err != nil {
		return err
	}
	r.st.Slots[name] = &slot{Keys: map[string]*Count{}, reader: reader}
	r.expect[name] = d.Number
	r.st.Entries, r.st.Checkpoint = 0, 0
	return nil
}

// Pass reads what is new on both sides and names what is due. The last pass of a start says that it is final: a
// signature made in the start's name afterwards is not taken for one that a crash left.
func (r *Reconciler) Pass(ctx context.Context, final bool) error {
	err := r.pass(ctx, final)
	r.summarize()
	if err != nil {
		return fmt.Errorf("uses: %w", err)
	}
	return nil
}

// Follow reads what is new on both sides, and neither names nor writes anything. It may be called between passes, which
// then have little to read: a pass that reads half a minute of a busy machine at once has those who sign meanwhile wait for it.
// Before the first pass it does nothing. What it fails at, the next pass will.
func (r *Reconciler) Follow(ctx context.Context) error {
	if !r.passed {
		return nil
	}
	size, _, err := r.cfg.Store.Head(ctx) // first, as in pass
	if err == nil && size == r.st.Entries {
		return nil // nothing that could account for a use
	}
	if err == nil {
		err = r.follow(nil) // before the entries of a machine that has come since are read
	}
	if err != nil {
		return fmt.Errorf("uses: %w", err)
	}
	for _, name := range r.slots {
		if err := r.read(name); err != nil {
			return fmt.Errorf("uses: %w", err)
		}
	}
	if err := r.scan(ctx, size); err != nil {
		return fmt.Errorf("uses: %w", err)
	}
	return nil
}

func (r *Reconciler) pass(ctx context.Context, final bool) error {
	if r.cfg.Append != nil && r.cfg.Sealed != nil && !r.cfg.Sealed() {
		return nil // an entry now could keep the next start from happening
	}
	// 1. How far the journal is, first: what its entries hold was recorded as used before.
	size, _, err := r.cfg.Store.Head(ctx)
	if err != nil {
		return err
	}
	// 2. New uses. The cipher machine's counts are read before.
	if err := r.follow(nil); err != nil {
		return err
	}
	counts, err := r.readCounters(ctx)
	if err != nil {
		return err
	}
	for _, name := range r.slots {
		if err := r.read(name); err != nil {
			return err
		}
	}
	// 3. What accounts for them.
	if err := r.scan(ctx, size); err != nil {
		return err
	}
	// A checkpoint's token comes a moment after it, so the last ones are read again.
	var mark []uint64
	err = r.cfg.Store.Checkpoints(ctx, r.st.Checkpoint, func(c audit.StoredCheckpoint) error {
		for _, b := range [][]byte{c.Signature, c.Token} {
			if len(b) > 0 && len(r.open) > 0 {
				for _, h := range SignaturesIn(b) {
					r.account(h, byCheckpoint)
				}
			}
		}
		if mark = append(mark, c.Size); len(mark) > again {
			mark = mark[1:]
		}
		return nil
	})
	if err != nil {
		return err
	}
	if len(mark) > 0 {
		r.st.Checkpoint = mark[0]
	}
	r.judgeCounters(counts)
	r.passed = true
	if r.cfg.Append == nil {
		return nil
	}
	// 4. What has to be said.
	if err := r.name(ctx); err != nil {
		return err
	}
	if err := r.nameCounters(ctx); err != nil {
		return err
	}
	return r.total(ctx, final)
}

// crashed says of the first pass that workers had ended out of order before.
func (r *Reconciler) crashed() bool {
	return !r.passed && slices.ContainsFunc(r.slots, func(name string) bool { return r.st.Slots[name].Crashes > 0 })
}

// scan has the journal's entries up to size account for uses.
func (r *Reconciler) scan(ctx context.Context, size uint64) error {
	crashed := r.crashed()
	one := func(rec audit.Record) error {
		e := &rec.Entry
		// The next scan begins behind each entry that was settled, or a signature that RSA made twice could be accounted for twice
		// by one entry; and before one that could not be read.
		type found struct {
			signature uselog.Hash
			how       settled
		}
		var all []found
		if len(r.open) > 0 || crashed {
			if err := settle(ctx, r.cfg.Store, e, func(h uselog.Hash, how settled) { all = append(all, found{h, how}) }); err != nil {
				return err
			}
		}
		if life, ok := e.Field(FieldLife).(audit.Octets); ok {
			r.st.Lives = append(r.st.Lives, hex.EncodeToString(life))
		}
		for _, one := range all {
			r.account(one.signature, one.how)
		}
		r.st.Entries = rec.Sequence + 1
		return nil
	}
	if err := r.scanRecent(size, one); err != nil {
		return err
	}
	if r.st.Entries < size {
		if err := audit.Scan(ctx, r.cfg.Store, r.st.Entries, size, one); err != nil {
			return err
		}
	}
	r.st.Entries = size
	if r.cfg.Recent != nil {
		r.cfg.Recent(nil, size, 0) // it can let go of them
	}
	return nil
}

// scanRecent is the part of scan that is in memory.
func (r *Reconciler) scanRecent(size uint64, one func(audit.Record) error) error {
	if r.cfg.Recent == nil {
		return nil
	}
	defer func() { clear(r.recent) }()
	for r.st.Entries < size {
		r.recent = r.cfg.Recent(r.recent[:0], r.st.Entries, int(min(size-r.st.Entries, atOnce)))
		if len(r.recent) == 0 {
			return nil
		}
		for i := range r.recent {
			if r.recent[i].Sequence != r.st.Entries {
				return nil // the store says what is missing
			}
			if err := one(r.recent[i]); err != nil {
				return err
			}
		}
	}
	return nil
}

// atOnce is how many entries are asked for that are in memory.
const atOnce = 256

// account takes one use of a signature out of those that wait.
func (r *Reconciler) account(h uselog.Hash, how settled) {
	if len(r.open[h]) == 0 {
		if how == byEntry && r.crashed() {
			r.orphans++
		}
		return // of another pass, or of before the log
	}
	u := r.open[h][0]
	r.remove(u)
	s := r.st.Slots[u.Slot]
	s.Keys[u.Key].add(how)
	if how == byAlarm {
		r.st.Alarms++
	}
	r.moved = r.moved || how != byCheckpoint
}

// again is how many checkpoints are looked at once more.
const again = 64

// read takes in a slot's new records.
func (r *Reconciler) read(name string) error {
	s := r.st.Slots[name]
	key := func(label string, before uint64) *Count {
		c := s.Keys[label]
		if c == nil {
			c = &Count{Uses: before, Before: before}
			s.Keys[label] = c
		}
		return c
	}
	for {
		err := s.reader.Next(func(rec uselog.Record) error {
			switch rec.Kind {
			case uselog.Total:
				key(rec.Label, rec.Counter)
			case uselog.Start:
				for _, u := range r.waiting() {
					if u.Slot == name && !u.Ended {
						u.Ended, u.Left = true, s.atMS-u.AtMS
					}
				}
				if s.Life != "" && s.Life != s.Final {
					s.Crashes++
				}
				s.Life, s.atMS = hex.EncodeToString(rec.Signed[:]), 0
			case uselog.Use:
				c := key(rec.Label, rec.Counter-1)
				c.Uses, s.atMS = rec.Counter, rec.At.Milliseconds()
				if hsm.IsHealth(rec.Label) {
					c.Health++
					return nil
				}
				r.add(&use{
					Named: Named{
						Slot: name, Key: rec.Label, Number: rec.Number, Counter: rec.Counter, AtMS: s.atMS, Life: s.Life,
					},
					signature: rec.Signature, signed: rec.Signed,
					After: s.Final != "" && s.Life == s.Final,
				})
			}
			return nil
		})
		var d *uselog.Damage
		if errors.As(err, &d) {
			r.breaks(*d)
			continue // each is told once
		}
		if err != nil {
			return err
		}
		break
	}
	s.At = s.reader.Position()
	if n := r.expect[name]; s.At.Number < n {
		r.breaks(uselog.Damage{Slot: name, What: "cut", Number: s.At.Number, Detail: fmt.Sprintf("it has %d uses and had %d", s.At.Number, n)})
	}
	delete(r.expect, name)
	return nil
}

// reason says of a use that nothing accounts for why it is named, and whether it has to be by now.
func (r *Reconciler) reason(u *use) (string, bool) {
	over := u.Ended && u.Life != hex.EncodeToString(r.cfg.Life[:]) // nobody who could still record it is left
	due := over || time.Since(u.seen) >= r.cfg.Grace               // interval
	switch {
	case !slices.Contains(r.st.Lives, u.Life):
		return Foreign, due
	case u.After:
		return Stopped, due
	case u.Ended && time.Duration(u.Left)*time.Millisecond <= tail:
		return Ended, due
	}
	return NoRecord, due
}

// most is how many signatures one entry names.
const most = 500

// name journals what is unaccounted for and what is broken.
func (r *Reconciler) name(ctx context.Context) error {
	var due []*use
	for _, u := range r.waiting() {
		var now bool
		if u.Reason, now = r.reason(u); now {
			due = append(due, u.told())
		}
	}
	for part := range slices.Chunk(due, most) {
		var l list
		for _, u := range part {
			l = append(l, u.Named)
		}
		d, err := named(KindUnaccounted, "uses", l)
		if err == nil {
			_, err = r.cfg.Append(ctx, d)
		}
		if err != nil {
			return err
		}
		for _, u := range part {
			r.remove(u)
			r.st.Slots[u.Slot].Keys[u.Key].Unaccounted++
			log := r.cfg.Log.WithFields(logrus.Fields{"slot": u.Slot, "object": u.Key, "signature_sm3": u.Signature, "reason": u.Reason})
			if u.Reason == Ended {
				log.Warning("a signature that nothing accounts for was left by an end of the process")
				continue
			}
			r.st.Alarms++
			log.Error("ALARM: the cipher machine made a signature that nothing accounts for")
		}
		r.moved = true
	}
	for _, d := range r.broken {
		_, err := r.cfg.Append(ctx, audit.Draft{
			Kind: KindBroken, Actor: "appliance", Object: d.Slot,
			Fields: []audit.Field{{Name: "detail", Value: audit.Text(d.Detail)}, {Name: "uses", Value: audit.Int(d.Number)}, {Name: "what", Value: audit.Text(d.What)}},
		})
		if err != nil {
			return err
		}
		r.broken = r.broken[1:]
		r.st.Alarms++
		r.moved = true
	}
	return nil
}

// totalEvery is how old the last total may be when there is anything new at all. Checkpoints alone do not make one
// earlier: it would itself be followed by the next checkpoint.
const totalEvery = time.Hour

// total keeps the state and has the journal name it. In this order a crash leaves the state that the journal names, and
// perhaps one more.
func (r *Reconciler) total(ctx context.Context, final bool) error {
	if !r.first && !r.moved && !final && time.Since(r.told) < totalEvery { // interval
		return nil
	}
	d := audit.Draft{Kind: KindTotal, Actor: "appliance", Object: "uses", Fields: []audit.Field{{Name: "final", Value: audit.Bool(final)}}}
	open := r.waiting()
	r.st.Lives = slices.DeleteFunc(r.st.Lives, func(life string) bool {
		for _, s := range r.st.Slots {
			if s.Life == life {
				return false
			}
		}
		if slices.ContainsFunc(open, func(u *use) bool { return u.Life == life }) {
			return false
		}
		return life != hex.EncodeToString(r.cfg.Life[:])
	})
	for name, s := range r.st.Slots {
		if err := s.reader.Sync(); err != nil {
			return err
		}
		s.Open = nil
		chain, err := hex.DecodeString(s.At.Chain)
		if err != nil {
			return err
		}
		d.Fields = append(d.Fields, audit.Field{Name: name + ".uses", Value: audit.Int(s.At.Number)}, audit.Field{Name: name + ".chain", Value: audit.Octets(chain)})
	}
	for _, u := range open {
		s := r.st.Slots[u.Slot]
		s.Open = append(s.Open, u.told())
	}
	b, err := json.Marshal(&r.st)
	if err != nil {
		return err
	}
	sum := sm3.Sum(b)
	file := statePrefix + hex.EncodeToString(sum[:])[:16] + stateSuffix
	if err := write(filepath.Join(r.cfg.Dir, file), b); err != nil {
		return err
	}
	d.Fields = append(d.Fields, audit.Field{Name: "state.sm3", Value: audit.Octets(sum[:])})
	if _, err := r.cfg.Append(ctx, d); err != nil {
		return err
	}
	r.first, r.moved, r.told = false, false, time.Now() // interval
	names, err := os.ReadDir(r.cfg.Dir)
	if err != nil {
		return err
	}
	for _, e := range names {
		if n := e.Name(); n != file && strings.HasPrefix(n, statePrefix) {
			if err := os.Remove(filepath.Join(r.cfg.Dir, n)); err != nil {
				return err
			}
		}
	}
	for _, s := range r.st.Slots {
		if err := s.reader.Prune(); err != nil {
			return err
		}
	}
	return nil
}

// write makes a file that is whole or not there.
func write(name string, b []byte) error {
	f, err := os.OpenFile(name+".new", os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(name+".new", name); err != nil {
		return err
	}
	d, err := os.Open(filepath.Dir(name))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func (r *Reconciler) summarize() {
	open := 0
	for _, l := range r.open {
		open += len(l)
	}
	s := Summary{Slots: map[string]Count{}, Counters: []string{}, Open: open, Alarms: r.st.Alarms + uint64(len(r.broken)), Entries: r.st.Entries}
	keys := map[string]map[string]uint64{}
	for name, slot := range r.st.Slots {
		var sum Count
		keys[name] = make(map[string]uint64, len(slot.Keys))
		for label, c := range slot.Keys {
			keys[name][label] = c.Uses
			sum.Uses += c.Uses
			sum.Before += c.Before
			sum.Entries += c.Entries
			sum.Checkpoints += c.Checkpoints
			sum.Discarded += c.Discarded
			sum.Health += c.Health
			sum.Unaccounted += c.Unaccounted
			sum.Elsewhere += c.Elsewhere
		}
		if slot.Counts {
			s.Counters = append(s.Counters, name)
		}
		s.Slots[name] = sum
		s.Unaccounted += sum.Unaccounted
	}
	slices.Sort(s.Counters)
	r.mu.Lock()
	r.summary, r.keys = s, keys
	r.mu.Unlock()
}

// KeyUses answers how often each key of a slot has signed, as of the last pass. It is not to be changed.
func (r *Reconciler) KeyUses(slot string) map[string]uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.keys[slot]
}

// Summary is as of the last pass.
func (r *Reconciler) Summary() Summary {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.summary
}
